"""Truth and tolerances: every error is judged against float64 and against what eager code of the same dtype makes."""

from __future__ import annotations

import random
from collections.abc import Sequence
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
NUM_SAMPLES = (0, 1, 2, 3, 17, 31, 64, 100, 127, 252, 300)
NUM_CLASSES = (1, 2, 3, 5, 10, 33, 100, 128, 257)
DIMS = (1, 2, 3, 8, 16, 33, 64, 123, 200)
TEMPERATURES = (0.005, 0.01, 0.02, 0.05, 0.07, 0.1, 0.2, 0.5, 1.0)
SPREADS = (None, None, 0.3, 0.03, 0.003, 0.0)
EXTREMES = (*[None] * 7, "zero", "equal", "duplicates", "large", "small", "subnormal", "every length")
# The ways through the blockwise backend: exponentials kept, recomputed, several panels and blocks of which as many are
# kept as fit, and operators alone.
REGIMES = {
    "kept": {},
    "recomputed": {"blockwise._budget_bytes": 0},
    "tiny tiles": {
        "blockwise._budget_bytes": 20_000, "blockwise.PANEL_CLASSES": 7, "blockwise.MIN_BLOCK": 5,
        "blockwise.TILE_ELEMENTS": 35, "blockwise_pairs.EDGE": 37,
    },
    "no extension": {"_extension.quietly": lambda: None},
}  # fmt: skip


def set_regime(name: str, monkeypatch) -> None:
    for attribute, value in REGIMES[name].items():
        monkeypatch.setattr(f"hypercontrast.{attribute}", value)


@dataclass(frozen=True)
class Draw:
    """One random problem; `str()` of it is enough to see what was special."""

    num_samples: int
    num_classes: int
    dim: int
    dtype: torch.dtype
    temperature: float
    spread: float | None  # distance from collapse; None for random features
    extreme: str | None
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
        leaves = [laid_out(made_extreme(x, self.extreme, self.dtype, g), self.layout) for x in (features, prototypes)]
        return *leaves, labels


def made_extreme(x: Tensor, kind: str | None, dtype: torch.dtype, generator) -> Tensor:
    """Rows x [N, D] in `dtype`, at an edge of the type's range or of the sphere's geometry. Even rows remain as they
    are in length, so that ordinary vectors meet extreme ones, unless all are to be equal or have copies.
    """
    info, n = torch.finfo(dtype), len(x)
    smallest = info.tiny * info.eps
    odd = torch.arange(n)[:, None] % 2 == 1
    peak = x.abs().amax(1, keepdim=True).clamp(min=1e-300)
    if kind == "zero":
        x = torch.where(odd, 0, x)
    elif kind == "equal":
        x = torch.ones_like(x)
    elif kind == "duplicates":
        x = x[torch.arange(n) // 3]
    elif kind == "large":
        x = torch.where(odd, x / peak * min(info.max, 1e12 / x.shape[1] ** 0.5), x)
    elif kind == "small":  # little more than the length that has no direction
        x = torch.where(odd, x / peak * max(1e-11, 64 * smallest), x)
    elif kind == "subnormal":
        x = torch.where(odd, (x / peak * 9).round() * smallest, x)
    elif kind == "every length":
        x = x * 2.0 ** torch.randint(-5, 6, (n, 1), generator=generator)
    return x.to(dtype)


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
            spread=rng.choice(SPREADS),
            extreme=rng.choice(EXTREMES),
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
    leaves = [features, prototypes]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    truth = loss_and_gradients(fn, *wide, labels, **specific, **options)
    powers = [1.0, 1.0]
    if options.get("normalize", True):
        leaves, powers = zip(*(of_order_one(x) for x in leaves), strict=True)
    loss, *grads = loss_and_gradients(fn, *leaves, labels, **specific, **options)
    return truth, [loss, *(grad * power for grad, power in zip(grads, powers, strict=True))]


def of_order_one(x: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf with the directions of x and lengths near one, and the powers of two [N, 1] that made them so.

    A loss on the sphere is the same for it. Eager code is not: it loses extreme rows, whose squares leave the range of
    half types, and an error of its own as large as the result would excuse any of ours.
    """
    wide = x.detach().double()
    length = wide.norm(dim=1, keepdim=True)
    power = torch.where(length > reference.MIN_NORM, 2.0 ** -length.clamp(min=reference.MIN_NORM).log2().round(), 1.0)
    return (wide * power).to(x.dtype).requires_grad_(), power


def error_over_bound(
    actual: list[Tensor],
    truth: list[Tensor],
    eager: list[Tensor],
    leaves: Sequence[Tensor],
    units: Sequence[float | Tensor],
    *,
    temperature: float,
    narrow_statistics: bool = False,
) -> float:
    """The largest error against float64, of the loss and of the gradients of `leaves`, as a part of what it may be:
    twice same-dtype eager's, above the rounding floor of the formula. Infinite where a result is not finite.

    Gradients are compared in units of one over the length of their row, so that no short vector hides a long one. The
    floor has three parts, each a few units of rounding: (1) a logit of size 1/τ is rounded to eps/τ, hence so are the
    loss (absolutely) and every exponential (relatively); (2) a probability near 1 minus its positive's 1 leaves eps, in
    the `units` of what positives alone add up to; (3) results are rounded to their dtype, and end where its range ends.
    A single draw's eager error may be zero by luck, which is why a floor is needed at all. Where log-sum-exps, which are
    as large as 1/τ, travel in float32 (`narrow_statistics`: from the kernels), what (2) leaves is eps/τ.
    """
    eps = torch.finfo(torch.promote_types(leaves[0].dtype, torch.float32)).eps
    worst = 0.0
    for got, want, same, unit, leaf in zip(actual, truth, eager, units, (None, *leaves), strict=True):
        length, rounding, underflow = torch.ones(()), 0.0, 0.0
        if leaf is not None:
            info = torch.finfo(leaf.dtype)
            length = leaf.detach().double().norm(dim=1, keepdim=True)
            rounding, underflow = info.eps, info.tiny * info.eps * (length * torch.ones_like(got)).norm()
            if (got[length[:, 0] <= reference.MIN_NORM] != 0).any():
                return torch.inf
            overflows = want.abs() >= info.max
            got, want, same = (torch.where(overflows, x.clamp(-info.max, info.max), x) for x in (got, want, same))
        error, scale, eager_error = ((x * length).norm() for x in (got - want, want, same - want))
        floor = 8 * eps * (scale * (1 + 1 / temperature) + unit) + rounding * scale + underflow
        if narrow_statistics:
            floor += eps / temperature * unit
        assert torch.isfinite(eager_error), "eager code gives no bound"
        ratio = error / (2 * eager_error + floor) if error != 0 else torch.zeros(())
        worst = max(worst, ratio.nan_to_num(nan=torch.inf).item())
    return worst


def prototype_error_over_bound(
    actual: list[Tensor],
    truth: list[Tensor],
    eager: list[Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    *,
    temperature: float,
    narrow_statistics: bool = False,
) -> float:
    """`error_over_bound` of a mean over samples: a positive adds 1/(Mτ) to a sample and n_c/(Mτ) to a class."""
    features, prototypes, labels = inputs
    kept = labels[labels >= 0]
    counts, m_tau = torch.bincount(kept, minlength=len(prototypes)), max(1, len(kept)) * temperature
    units = (1 / temperature, len(kept) ** 0.5 / m_tau, counts.double().norm() / m_tau)
    return error_over_bound(
        actual,
        truth,
        eager,
        (features, prototypes),
        units,
        temperature=temperature,
        narrow_statistics=narrow_statistics,
    )
