"""What must hold of the losses for any input, searched for counterexamples: symmetries, tiling, bounds, temperatures."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import LOSSES, near_collapse

import hypercontrast as hc
from hypercontrast import functional

NAMES = (*LOSSES, "supcon-out", "supcon-in")


@dataclass(frozen=True)
class Problem:
    name: str
    num_samples: int
    num_classes: int
    dim: int
    temperature: float
    spread: float | None
    seed: int
    dtype: torch.dtype = torch.float64

    def tensors(self):
        """features [N, D], prototypes [K, D], labels [N]."""
        g = torch.Generator().manual_seed(self.seed)
        labels = torch.randint(0, self.num_classes, (self.num_samples,), generator=g)
        if self.spread is not None:
            features, prototypes = near_collapse(labels, self.num_classes, self.dim, self.spread, g)
        else:
            sizes = self.num_samples, self.num_classes
            features, prototypes = (torch.randn(n, self.dim, generator=g, dtype=torch.float64) for n in sizes)
        return features.to(self.dtype), prototypes.to(self.dtype), labels

    def each(self, features, prototypes, labels, temperature=None):
        """The loss of every sample [N] and the gradients of their sum; SupCon knows no prototypes."""
        leaves = [x.detach().requires_grad_() for x in (features, prototypes)]
        options = {"temperature": temperature or self.temperature, "reduction": "none", "backend": "blockwise"}
        if self.name in LOSSES:
            function, specific = LOSSES[self.name]
            losses = getattr(functional, function)(*leaves, labels, **options, **specific)
        else:
            losses = hc.supcon_loss(leaves[0], labels, **options, variant=self.name.split("-")[1])
        grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
        return losses.detach(), *grads

    def close(self, got, want) -> bool:
        """Equal but for the order of sums in float64, whose logits are as large as 1/τ."""
        allowed = 1e-12 * (1 + 1 / self.temperature) ** 2
        return all((a - b).norm() <= allowed * (1 + b.norm()) for a, b in zip(got, want, strict=True))


problems = st.builds(
    Problem,
    name=st.sampled_from(NAMES),
    num_samples=st.integers(1, 40),
    num_classes=st.integers(1, 12),
    dim=st.integers(1, 20),
    temperature=st.floats(0.005, 1.0),
    spread=st.sampled_from([None, None, 0.3, 0.01, 0.0]),
    seed=st.integers(0, 2**31),
)


def holds(property_):
    """A test that searches for a problem without the property: among 25 of them, in the long run among 500."""

    @pytest.mark.parametrize("examples", [25, pytest.param(500, marks=pytest.mark.slow)])
    def test(examples, figure):
        tried = set()

        @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
        @given(problems)
        def search(problem):
            property_(problem)
            tried.add(problem)

        search()
        assert len(tried) >= 0.9 * examples, "too few problems that differ"
        figure("R5", f"{property_.__name__.replace('_', ' ')}: {len(tried)} examples, 0 falsified")

    return test


def rows_permuted(problem):
    features, prototypes, labels = problem.tensors()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(problem.seed))
    losses, grad, grad_prototypes = problem.each(features, prototypes, labels)
    got = problem.each(features[order], prototypes, labels[order])
    assert problem.close(got, (losses[order], grad[order], grad_prototypes))


def classes_renamed(problem):
    features, prototypes, labels = problem.tensors()
    name = torch.randperm(len(prototypes), generator=torch.Generator().manual_seed(problem.seed))
    losses, grad, grad_prototypes = problem.each(features, prototypes, labels)
    got = problem.each(features, prototypes[name.argsort()], name[labels])
    assert problem.close(got, (losses, grad, grad_prototypes[name.argsort()]))


def tiles_of_any_size(problem):
    tensors = problem.tensors()
    want = problem.each(*tensors)
    panel, block, tile, edge = torch.randint(
        1, 50, (4,), generator=torch.Generator().manual_seed(problem.seed)
    ).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hypercontrast.blockwise.PANEL_CLASSES", panel)
        patch.setattr("hypercontrast.blockwise.MIN_BLOCK", block)
        patch.setattr("hypercontrast.blockwise.TILE_ELEMENTS", tile)
        patch.setattr("hypercontrast.blockwise._budget_bytes", 0 if edge % 2 else 1 << 20)
        patch.setattr("hypercontrast.blockwise_pairs.EDGE", edge)
        assert problem.close(problem.each(*tensors), want)


# The exponential of a loss, once every class has a copy, is the sum of those of these losses before.
OF_DOUBLED_CLASSES = {
    "normface": ("normface", "normface"),
    "ntce": ("ntce", "ntce"),
    "nonl": ("nonl", "ntce"),
    "nonl-sample": ("nonl-sample", "normface"),
    "nonl-both": ("nonl-both", "normface", "ntce"),
}


def duplicated_classes(problem):
    """Every class comes a second time under a new name, with its prototype and its samples."""
    features, prototypes, labels = problem.tensors()
    k, n = len(prototypes), len(labels)
    twice = torch.cat([features, features]), torch.cat([prototypes, prototypes]), torch.cat([labels, labels + k])
    doubled = problem.each(*twice)
    assert problem.close([x.chunk(2)[0] for x in doubled], [x.chunk(2)[1] for x in doubled])
    losses = doubled[0][:n]
    before = {name: replace(problem, name=name).each(*problem.tensors())[0] for name in (problem.name, *LOSSES)}
    members = torch.bincount(labels, minlength=k)[labels]
    if problem.name in LOSSES:
        without = {"nonl": members == n, "nonl-sample": k == 1, "nonl-both": (members == n) & (k == 1)}
        for name, nothing in without.items():
            before[name] = torch.where(torch.as_tensor(nothing), -torch.inf, before[name])
        want = torch.stack([before[name] for name in OF_DOUBLED_CLASSES[problem.name]]).logsumexp(0)
        assert problem.close([losses], [want])
    else:  # all columns twice and the sample's own copy, which is a negative
        assert (losses >= torch.where(members > 1, before[problem.name] + math.log(2), 0) - 1e-9).all()


def never_below_the_bound(problem):
    """log-sum-exp ≥ its largest term, and every cosine lies in [-1, 1]."""
    features, prototypes, labels = problem.tensors()
    losses, *_ = problem.each(features, prototypes, labels)
    slack = 1e-13 * (1 + 1 / problem.temperature)
    tau, n, k = problem.temperature, len(labels), len(prototypes)
    counts = torch.bincount(labels, minlength=k)[labels]
    assert (losses >= lower_bound(problem.name, counts, n, k, tau) - slack).all()


def lower_bound(name, counts, n, k, tau):
    """Of each sample's loss: a positive is at most 1/τ and each of m negatives at least -1/τ, and a sum that holds its
    own positive is no smaller than that alone.
    """
    counts = counts.double()
    if name in ("normface", "ntce"):
        terms = torch.full_like(counts, k if name == "normface" else n)
        return torch.log1p((terms - 1) * math.exp(-2 / tau))
    if name.startswith("supcon"):  # the mean of P positives is at most the log of their mean exponential
        return torch.where(counts > 1, (counts - 1 + (n - counts) * math.exp(-2 / tau)).log(), 0)
    negatives = {"nonl": n - counts, "nonl-sample": k - 1 + 0 * counts, "nonl-both": n - counts + k - 1}[name]
    return torch.where(negatives > 0, -2 / tau + negatives.clamp(min=1).log(), -1 / tau)


def finite_at_every_temperature(problem):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        narrow = replace(problem, dtype=dtype)
        tensors = narrow.tensors()
        for temperature in (0.005, 0.0157, 0.07, 1.0):  # the second lies past the end of plain sums
            assert all(x.isfinite().all() for x in narrow.each(*tensors, temperature=temperature))


test_rows_permuted = holds(rows_permuted)
test_classes_renamed = holds(classes_renamed)
test_tiles_of_any_size = holds(tiles_of_any_size)
test_duplicated_classes = holds(duplicated_classes)
test_never_below_the_bound = holds(never_below_the_bound)
test_finite_at_every_temperature = holds(finite_at_every_temperature)
