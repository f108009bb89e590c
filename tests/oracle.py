"""Truth and tolerances: every error is judged against float64 and against what eager code of the same dtype makes."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from hypercontrast import reference, simplex_etf

# name → (public function's name, its extra options): the five label rules
LOSSES = {
    "normface": ("normface_loss", {}),
    "ntce": ("ntce_loss", {}),
    "nonl": ("nonl_loss", {}),
    "nonl-sample": ("nonl_loss", {"anchor": "sample"}),
    "nonl-both": ("nonl_loss", {"anchor": "both"}),
}
# Sizes around one tile, primes, and the degenerate ones.
NUM_SAMPLES = (1, 2, 3, 17, 31, 64, 100, 127, 252, 300)
NUM_CLASSES = (1, 2, 3, 5, 10, 33, 100, 128, 257)
DIMS = (1, 2, 3, 8, 16, 33, 64, 123, 200)
TEMPERATURES = (0.005, 0.01, 0.02, 0.05, 0.07, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Draw:
    """One random problem; `str()` of it is enough to see what was special."""

    num_samples: int
    num_classes: int
    dim: int
    dtype: torch.dtype
    temperature: float
    spread: float | None  # distance from collapse; None for random features
    layout: str
    ignored: bool
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """features, prototypes (leaves that require a gradient, in the wanted layout) and labels."""
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        labels = torch.randint(0, self.num_classes, (self.num_samples,), generator=g)
        if self.spread is None:
            features, prototypes = normal(self.num_samples, self.dim), normal(self.num_classes, self.dim)
        else:
            features, prototypes = near_collapse(labels, self.num_classes, self.dim, self.spread, g)
        if self.ignored:
            labels[torch.rand(self.num_samples, generator=g) < 0.3] = -100
        return laid_out(features.to(self.dtype), self.layout), laid_out(prototypes.to(self.dtype), self.layout), labels


def near_collapse(labels: Tensor, num_classes: int, dim: int, spread: float, generator) -> tuple[Tensor, Tensor]:
    """Features at their class's prototype, prototypes at a simplex ETF where it fits, both off by `spread`."""
    if dim >= num_classes - 1:
        frame = simplex_etf(num_classes, dim, generator=generator)
    else:
        frame = reference.unit_rows(torch.randn(num_classes, dim, generator=generator, dtype=torch.float64))
    noise = torch.randn(len(labels), dim, generator=generator, dtype=torch.float64) / dim**0.5
    nudge = torch.randn(num_classes, dim, generator=generator, dtype=torch.float64) / dim**0.5
    return 3 * (frame[labels] + spread * noise), 2 * (frame + spread * nudge)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values, as a leaf that requires a gradient, with other strides."""
    if layout == "transposed":
        x = x.T.contiguous().T
    elif layout == "sliced":
        wide = torch.full((x.shape[0] * 2, x.shape[1] + 3), torch.nan, dtype=x.dtype)
        wide[::2, 1:-2] = x
        x = wide[::2, 1:-2]
    return x.detach().requires_grad_()


def draws(
    count: int, seed: int, dtypes: tuple[torch.dtype, ...], shapes=(NUM_SAMPLES, NUM_CLASSES, DIMS)
) -> list[Draw]:
    rng = random.Random(seed)
    return [
        Draw(
            *(rng.choice(sizes) for sizes in shapes),
            dtype=rng.choice(dtypes),
            temperature=rng.choice(TEMPERATURES),
            spread=rng.choice((None, None, 0.3, 0.03, 0.003)),
            layout=rng.choice(("contiguous", "contiguous", "transposed", "sliced")),
            ignored=rng.random() < 0.3,
            seed=seed * 100_000 + i,
        )
        for i in range(count)
    ]


def loss_and_gradients(loss_fn, features, prototypes, labels, upstream=None, **options) -> list[Tensor]:
    """[loss, d features, d prototypes] as float64."""
    loss = loss_fn(features, prototypes, labels, **options)
    grads = torch.autograd.grad(loss, (features, prototypes), upstream)
    return [x.detach().double() for x in (loss, *grads)]


def truth_and_eager(name: str, features, prototypes, labels, **options) -> tuple[list[Tensor], list[Tensor]]:
    """The specification in float64 on the same (rounded) inputs, and in the inputs' own dtype."""
    function, specific = LOSSES[name]
    fn = getattr(reference, function)
    wide = [x.detach().double().requires_grad_() for x in (features, prototypes)]
    truth = loss_and_gradients(fn, *wide, labels, **specific, **options)
    return truth, loss_and_gradients(fn, features, prototypes, labels, **specific, **options)


def assert_within(
    actual: list[Tensor],
    truth: list[Tensor],
    eager: list[Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    *,
    temperature: float,
    factor: float = 2.0,
    context: object = "",
) -> None:
    """Error against float64 at most `factor` times same-dtype eager's, above the rounding floor of the formula.

    The floor has three parts, each a few units of rounding: (1) a logit of size 1/τ is rounded to eps/τ, hence so are the
    loss (absolutely) and every exponential (relatively); (2) a probability near 1 minus its positive's 1 leaves eps, in
    units of the gradient of one positive, 1/(Mτ|z|) a sample and n_c/(Mτ|w_c|) a class; (3) results are rounded to their
    dtype. A single draw's eager error may be zero by luck, which is why a floor is needed at all.
    """
    features, prototypes, labels = (x.detach() for x in inputs)
    eps = torch.finfo(torch.promote_types(features.dtype, torch.float32)).eps
    kept = labels[labels >= 0]
    per_sample = torch.full((len(kept),), 1.0) / features[labels >= 0].double().norm(dim=1)
    per_class = torch.bincount(kept, minlength=len(prototypes)) / prototypes.double().norm(dim=1)
    unit = [1 / temperature, *(x.norm() / (max(1, len(kept)) * temperature) for x in (per_sample, per_class))]
    for i, what in enumerate(("loss", "d features", "d prototypes")):
        got, want = actual[i], truth[i]
        assert torch.isfinite(got).all(), f"{what} is not finite: {context}"
        error, scale = (got - want).norm(), want.norm()
        rounding = 0 if what == "loss" else torch.finfo(inputs[i - 1].dtype).eps
        floor = 8 * eps * (scale * (1 + 1 / temperature) + unit[i]) + rounding * scale
        allowed = factor * (eager[i] - want).norm() + floor
        assert error <= allowed, f"{what}: error {error:.3g} above {allowed:.3g} (|truth| {scale:.3g}): {context}"
