"""The Triton kernels against float64, on a GPU where there is one and through Triton's interpreter where there is none.

The yardstick is the error of the same formulas in eager PyTorch and the same dtype: a kernel may be at most twice as far from
float64, plus a few units of rounding. Uninitialised memory is filled with NaN throughout, so a value nobody wrote shows.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from cases import TWO, quick
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
pytest.importorskip("triton")

from hypercontrast.kernels import _epilogue, _launch, aot, prototype_loss, prototype_lse  # noqa: E402

pytestmark = [
    # The interpreter computes with NumPy, which warns of the infinities that the kernels rely on.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]

RULES = {  # rows, cols, exclude_own
    "ntce": (True, False, False),
    "nonl": (True, False, True),
    "normface": (False, True, False),
    "nonl-sample": (False, True, True),
    "nonl-both": (True, True, True),
}
# A single tile of everything; one element past a tile and one before; odd everything; a power of two everywhere.
SHAPES = [(1, 1, 1), (2, 1, 5), (3, 9, 16), (65, 63, 17), (129, 10, 40), (252, 507, 123), (64, 128, 128), (40, 33, 200)]
DTYPES = [torch.float32, torch.float16]
QUICK = 24 if DEVICE == "cpu" else 16  # draws: on a GPU most of them compile kernels of their own, a second each


@dataclass(frozen=True)
class Case:
    features: Tensor
    prototypes: Tensor
    labels: Tensor
    rule: str
    tau: float
    ignore_index: int = -100
    normalize: bool = True
    tensor_temperature: bool = False
    counts: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        in_range = (self.labels >= 0) & (self.labels < len(self.prototypes))
        return in_range & (self.labels != self.ignore_index)

    @property
    def is_narrow_float32(self) -> bool:
        """Which no caller can reach, see `check_draw`."""
        return self.features.dtype == torch.float32 and _launch.is_narrow(_launch.BACKWARD_NARROW, self.features)

    @property
    def skips_absent(self) -> bool:
        rows, cols, _ = RULES[self.rule]
        shape = len(self.features), *self.prototypes.shape
        return self.counts is not None and rows and not cols and _launch.skips_absent_classes(*shape)

    def options(self) -> dict:
        rows, cols, exclude_own = RULES[self.rule]
        temperature = torch.tensor(self.tau, device=self.features.device) if self.tensor_temperature else None
        return {
            "counts": self.counts,
            "temperature": temperature,
            "inv_temperature": 1.0 / self.tau,
            "ignore_index": self.ignore_index,
            "rows": rows,
            "cols": cols,
            "exclude_own": exclude_own,
            "normalize": self.normalize,
        }


@dataclass(frozen=True)
class Upstream:
    row: Tensor
    col: Tensor
    pos: Tensor


def random_upstream(case: Case, generator: torch.Generator | None = None) -> Upstream:
    n, k = len(case.features), len(case.prototypes)

    def gradient(size):
        return torch.randn(size, generator=generator).to(DEVICE) / max(size, 1)

    return Upstream(gradient(k), gradient(n), gradient(n))


def loss_upstream(case: Case) -> Upstream:
    """What the loss itself sends: class counts over M to rows, 1/M to columns, -1/M to positives."""
    n, k = len(case.features), len(case.prototypes)
    counts = torch.bincount(case.labels, minlength=k)
    ones = torch.ones(n, device=DEVICE)
    return Upstream(counts / n, ones / n, -ones / n)


def run_kernels(case: Case, upstream: Upstream) -> dict[str, Tensor]:
    tensors = case.features, case.prototypes, case.labels
    options = case.options()
    row, col, pos, *saved = prototype_lse.launch_fwd(*tensors, **options, keep_bytes=2**26)
    *grads, radial = prototype_lse.launch_bwd(*tensors, row, col, pos, *saved, *vars(upstream).values(), **options)
    names = ("row", "col", "pos", "grad_features", "grad_prototypes", "logit_grad_sum")
    return dict(zip(names, (row, col, pos, *grads, radial.sum() / case.tau), strict=True))


def eager(case: Case, upstream: Upstream, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same in plain PyTorch: vectors and logits in `dtype`, sums in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    rows, cols, exclude_own = RULES[case.rule]
    z = case.features.to(dtype).detach().requires_grad_()
    w = case.prototypes.to(case.features.dtype).to(dtype).detach().requires_grad_()
    tau = torch.tensor(case.tau, dtype=wide, device=DEVICE, requires_grad=True)
    u, v = (z, w)
    if case.normalize:
        u, v = (unit_rows(x) for x in (z, w))
    logits = (v @ u.T).to(wide) / tau
    valid = case.valid
    own = (torch.arange(len(w), device=DEVICE)[:, None] == case.labels[None, :]) & valid
    summed = logits.masked_fill(own, -math.inf) if exclude_own else logits
    row = torch.logsumexp(summed.masked_fill(~valid[None, :], -math.inf), dim=1) if rows else logits.new_empty(0)
    if case.skips_absent:
        row = row.masked_fill(case.counts == 0, -math.inf)
    col = torch.logsumexp(summed, dim=0) if cols else logits.new_empty(0)
    pos = torch.where(own, logits, 0).sum(0)
    total = (pos * upstream.pos).sum()
    if rows and row.isfinite().any():
        total = total + (row * upstream.row)[row.isfinite()].sum()
    if cols and (kept := valid & col.isfinite()).any():
        total = total + (col * upstream.col)[kept].sum()
    grad_z, grad_w, grad_tau = torch.autograd.grad(total, (z, w, tau), materialize_grads=True, allow_unused=True)
    sum_gs = -grad_tau * tau
    found = (row, col, pos, grad_z, grad_w, sum_gs)
    names = ("row", "col", "pos", "grad_features", "grad_prototypes", "logit_grad_sum")
    return {name: value.detach() for name, value in zip(names, found, strict=True)}


def unit_rows(x: Tensor) -> Tensor:
    """Rows without a direction become constants of zero, as the kernels promise."""
    norms = torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True)
    return torch.where(norms > 1e-12, torch.nn.functional.normalize(torch.where(norms > 1e-12, x, 1.0), dim=1), 0.0)


def rounding_of(dtype: torch.dtype) -> float:
    """Of the terms of a product. A GPU multiplies float32 as three TF32 products, without that of the low parts."""
    return 2.0**-22 if DEVICE == "cuda" and dtype == torch.float32 else torch.finfo(dtype).eps


def check(case: Case, upstream: Upstream) -> dict[str, Tensor]:
    """Kernels within twice eager's error and a rounding floor; the same infinities; the right types."""
    actual = run_kernels(case, upstream)
    truth = eager(case, upstream, torch.float64)
    same = eager(case, upstream, case.features.dtype)
    # Kernels multiply by 1/τ in float32: they may answer for a temperature one unit of its rounding away.
    nudged = eager(replace(case, tau=case.tau * (1 + torch.finfo(torch.float32).eps)), upstream, torch.float64)
    norms = [case.features.double().norm(dim=1), case.prototypes.double().norm(dim=1)]
    largest = max([1.0, *(n.max().item() for n in norms if n.numel())])
    reach = 1.0 / case.tau if case.normalize else largest**2 / case.tau
    shortest = (
        [n.clamp_min(1e-12).min().item() if n.numel() else 1.0 for n in norms] if case.normalize else [1 / largest] * 2
    )
    strength = max([0.0, *(g.abs().max().item() for g in vars(upstream).values() if g.numel())])
    rounding = rounding_of(case.features.dtype)
    # Exponents in units of log 2 have the column's norm and the log-sum-exp joined to them, numbers as large as 1/τ: so far
    # off is every weight, of itself. The rounding of half types hides it.
    exponent = rounding * reach if case.is_narrow_float32 else 0.0
    floor = {
        "row": 8e-7 * reach + 1e-6,
        "col": 8e-7 * reach + 1e-6,
        "pos": 8e-7 * reach + 1e-6,
        "grad_features": (2 * rounding + exponent) * strength / (case.tau * shortest[0]),
        "grad_prototypes": (2 * rounding + exponent) * strength / (case.tau * shortest[1]),
        # The last term: log-sum-exps are kept in float32, whose rounding (rms .29 units) scales a whole row of exp(s - lse).
        "logit_grad_sum": (4 * rounding + exponent) * strength * reach * max(1.0, math.sqrt(len(case.features)))
        + 0.29 * torch.finfo(torch.float32).eps * strength * reach**2,
    }
    for name, value in actual.items():
        finite = truth[name].isfinite()
        assert value.shape == truth[name].shape, name
        assert torch.equal(value.isfinite(), finite), f"{name}: infinities differ"
        assert not value.isnan().any(), name
        if finite.any():
            error = (value.double() - truth[name])[finite].abs().max().item()
            reference = (same[name].double() - truth[name])[finite].abs().max().item()
            if math.isfinite(reference):
                allowed = 2 * reference + floor[name] + (nudged[name] - truth[name])[finite].abs().max().item()
                assert error <= allowed, f"{name}: {error:.3g} against {reference:.3g} of eager"
    assert actual["grad_features"].dtype == case.features.dtype
    assert actual["grad_prototypes"].dtype == case.prototypes.dtype
    return actual


@pytest.fixture(autouse=True)
def _nan_in_uninitialised_memory():
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN as well
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def few_programs(monkeypatch):
    """So that small inputs are split as large ones are, without hundreds of programs."""
    monkeypatch.setattr(_launch, "TARGET_PROGRAMS", 3)


def make_case(seed: int, shape=None, dtype=None, rule=None) -> tuple[Case, torch.Generator]:
    """A random draw: every property that the kernels treat apart is drawn."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    n, k, d = shape or pick(SHAPES)
    dtype = dtype or pick(DTYPES)
    spread = pick([1.0, 0.05])
    normalize = pick([True, True, True, False])
    tau = (0.005 * 200 ** torch.rand((), generator=generator)).item() if normalize else 1.0
    prototypes = torch.randn(k, d, generator=generator) * pick([1.0, 20.0]) * (1.0 if normalize else d**-0.5 / 4)
    labels = torch.randint(k, (n,), generator=generator)
    features = prototypes[labels] + prototypes.std(correction=0) * torch.randn(n, d, generator=generator) * spread
    if pick([True, False]) and n > 3:
        labels[:4] = torch.tensor([-100, 2**40, k, -1])
        features[n // 2] = 0.0
    layout = pick(["contiguous", "transposed", "sliced"])
    features, prototypes = (
        lay_out(x.to(DEVICE), layout) for x in (features.to(dtype), prototypes.to(pick([dtype, torch.float32])))
    )
    case = Case(
        features,
        prototypes,
        labels.to(DEVICE),
        rule or pick(list(RULES)),
        tau,
        ignore_index=pick([-100, 0]),
        normalize=normalize,
        tensor_temperature=pick([True, False]),
    )
    if pick([True, False]):
        case = replace(case, counts=torch.bincount(case.labels[case.valid], minlength=k))
    return case, generator


def lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "sliced":
        wide = torch.zeros(len(x), x.shape[1] + 3, dtype=x.dtype, device=x.device)
        wide[:, 2:-1] = x
        return wide[:, 2:-1]
    return x


def check_draw(seed: int, monkeypatch) -> None:
    case, generator = make_case(seed)
    monkeypatch.setattr(_launch, "TARGET_PROGRAMS", 1 + seed % 4)
    monkeypatch.setattr(_launch, "COMPACT_FLOP", 0)
    # float32 takes the narrow path only here: half types alone show its errors too coarsely. Its tiles fit no GPU.
    if seed % 3 == 0 and DEVICE == "cpu":
        monkeypatch.setattr(_launch, "is_narrow", lambda tables, x: x.shape[1] <= 128)
    if seed % 3 == 1:
        monkeypatch.setattr(_launch, "is_narrow", lambda tables, x: False)
        monkeypatch.setattr(_launch, "SCRATCH_BYTES", 1)
        monkeypatch.setattr(_launch, "CHUNK_BYTES", 1)  # several chunks
        monkeypatch.setattr(_launch, "KEEP_FLOP", 0)  # half types keep exponentials, or have their columns made ready
        if seed % 2 == 1:
            monkeypatch.setattr(_launch, "KEEP_WIDTH", 1)
    check(case, random_upstream(case, generator))


@pytest.mark.parametrize("seed", range(QUICK))
def test_random_draws(seed, monkeypatch):
    check_draw(seed, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(QUICK, 1040))
def test_many_random_draws(seed, monkeypatch):
    check_draw(seed, monkeypatch)


# Half types: narrow, narrow in the forward alone, wide.
@pytest.mark.parametrize(("width", "wide"), [(24, False), (136, False), (136, True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", quick(RULES, (*TWO, "nonl")))
def test_tangential_gradient_near_collapse(rule, dtype, width, wide, few_programs, monkeypatch):
    """Where G's entries cancel: the loss's own gradient, and of it the part that moves a unit vector."""
    if wide:
        monkeypatch.setattr(_launch, "is_narrow", lambda tables, x: False)
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.linalg.qr(torch.randn(width, width, generator=generator))[0][:20]
    labels = torch.randint(20, (100,), generator=generator)
    features = 3.0 * prototypes[labels] + 0.01 * torch.randn(100, width, generator=generator)
    case = Case(features.to(DEVICE, dtype), prototypes.to(DEVICE, dtype), labels.to(DEVICE), rule, tau=0.1)
    upstream = loss_upstream(case)
    actual, truth, same = check(case, upstream), eager(case, upstream, torch.float64), eager(case, upstream, dtype)
    for name, x in (("grad_features", case.features), ("grad_prototypes", case.prototypes)):
        unit = torch.nn.functional.normalize(x.double(), dim=1)

        def tangential(grad, unit=unit):
            return grad.double() - (grad.double() * unit).sum(1, keepdim=True) * unit

        wanted = tangential(truth[name])
        error = (tangential(actual[name]) - wanted).norm() / wanted.norm()
        reference = (tangential(same[name]) - wanted).norm() / wanted.norm()
        # The second term: logits of size 1/τ are held in float32 whatever the type.
        assert error <= 2 * reference + 4 * torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps / case.tau
        radial = (actual[name].double() * unit).sum(1).norm() / wanted.norm()
        assert radial <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5, 8), (7, 1, 8), (1, 1, 1), (0, 1, 300)])
def test_smallest_batches(shape, dtype, rule):
    n, k, d = shape
    case = Case(
        torch.randn(n, d, device=DEVICE, dtype=dtype),
        torch.randn(k, d, device=DEVICE, dtype=dtype),
        torch.zeros(n, dtype=torch.int64, device=DEVICE),
        rule,
        tau=0.2,
    )
    check(case, random_upstream(case))


@pytest.mark.parametrize("width", [16, 160])
@pytest.mark.parametrize("rule", RULES)
def test_ignored_samples_and_zero_vectors_get_exactly_zero(rule, width):
    labels = torch.tensor([3, 2**40, -100, -1, 5, 0, 4, 2**32, 1])  # 2^32 and 2^40 are class 0 in 32 bits
    case = Case(
        torch.randn(9, width, device=DEVICE, dtype=torch.float16),
        torch.randn(5, width, device=DEVICE, dtype=torch.float16),
        labels.to(DEVICE),
        rule,
        tau=0.1,
        ignore_index=3,
    )
    case.features[5] = 0.0
    case.prototypes[1] = 0.0
    actual = check(case, random_upstream(case))
    assert case.valid.tolist() == [False] * 5 + [True, True, False, True]
    assert not actual["grad_features"][~case.valid].any()
    assert not actual["pos"][~case.valid].any()
    assert not actual["grad_features"][5].any()
    assert not actual["grad_prototypes"][1].any()


def test_the_shortest_vectors_that_have_a_direction():
    """Those of 1e-12 have none."""
    case, generator = make_case(1, (9, 5, 16), torch.float32, "nonl-both")
    case = replace(case, normalize=True, tau=0.1, labels=torch.arange(9, device=DEVICE) % 5, ignore_index=-100)
    features, prototypes = (torch.nn.functional.normalize(x.float()) for x in (case.features, case.prototypes))
    features[0], features[1], prototypes[2] = 0.9e-12 * features[0], 1.1e-12 * features[1], 0.9e-12 * prototypes[2]
    case = replace(case, features=features, prototypes=prototypes, counts=None)
    actual = check(case, random_upstream(case, generator))
    assert (actual["pos"] == 0).tolist() == [True, False, True, False, False, False, False, True, False]


@pytest.mark.parametrize("largest", [1.0, 3e5])
@pytest.mark.parametrize("place", range(6))
def test_range_of_float16(largest, place):
    """The largest upstream gradient, of either sign, times the largest inverse norms is brought to 2^12 or more, but less
    than 2^13.
    """
    vectors = [torch.linspace(-1e-3, 1e-3, 5000, device=DEVICE) for _ in range(6)]
    norms = vectors[4].abs(), vectors[5].abs()
    peak = -largest if place < 4 else largest
    (*vectors[:4], *norms)[place][-1] = peak
    found = _epilogue.fp16_range(torch.float16, vectors[:4], *norms).item()
    product = max(v.abs().max().item() for v in vectors[:4]) * norms[0].max().item() * norms[1].max().item()
    assert 2.0**12 <= found * product < 2.0**13
    assert math.frexp(found)[0] == 0.5


@pytest.mark.parametrize("value", [0.0, 1e-38, 3e38])
def test_range_of_float16_is_a_number(value):
    vector = torch.full((3,), value, device=DEVICE)
    found = _epilogue.fp16_range(torch.float16, [vector], torch.ones(2, device=DEVICE)).item()
    assert 2.0**-120 < found < 2.0**120


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 136])
@pytest.mark.parametrize("rule", ["ntce", "nonl"])
def test_absent_classes_are_skipped(rule, width, dtype, few_programs, monkeypatch):
    monkeypatch.setattr(_launch, "COMPACT_FLOP", 0)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(150, (140,), generator=generator) * 2 + 1  # even classes are absent
    case = Case(
        torch.randn(140, width, generator=generator).to(DEVICE, dtype),
        torch.randn(300, width, generator=generator).to(DEVICE, dtype),
        labels.to(DEVICE),
        rule,
        tau=0.1,
    )
    upstream = loss_upstream(case)
    full = check(case, upstream)
    counts = torch.bincount(case.labels, minlength=300)
    compact = run_kernels(replace(case, counts=counts), upstream)
    assert torch.equal(compact["row"] == -math.inf, counts == 0)
    assert not compact["grad_prototypes"][counts == 0].any()
    for name, value in compact.items():
        kept = value.isfinite()
        if not kept.any():
            continue
        scale = full[name].float()[full[name].isfinite()].abs().max()
        difference = (value.float() - full[name].float())[kept].abs().max()
        assert difference <= 4 * rounding_of(dtype) * scale, name


@pytest.mark.parametrize("width", [24, 136])
@pytest.mark.parametrize("rule", quick(RULES, TWO))
def test_repeats_are_bitwise_equal(rule, width, few_programs):
    case, _ = make_case(5, (150, 90, width), torch.float16, rule)
    upstream = random_upstream(case)
    first, second = run_kernels(case, upstream), run_kernels(case, upstream)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_half_features_reach_float32_prototypes_unrounded(rule):
    case, _ = make_case(8, (40, 33, 48), torch.float16, rule)
    case = replace(case, prototypes=case.prototypes.half().float())
    grads = run_kernels(case, random_upstream(case))["grad_prototypes"]
    assert grads.dtype == torch.float32
    assert not torch.equal(grads, grads.half().float())


@pytest.mark.parametrize("rule", RULES)
def test_tiny_upstream_gradients_survive_float16(rule):
    """G's entries are about 1/N², far below the smallest float16."""
    case, generator = make_case(11, (65, 63, 48), torch.float16, rule)
    case = replace(case, prototypes=case.prototypes.float() * 1e-3, normalize=True, tau=0.1)
    upstream = random_upstream(case, generator)
    small = Upstream(*(g * 2.0**-24 for g in vars(upstream).values()))
    usual, scaled = run_kernels(case, upstream), run_kernels(case, small)
    assert torch.equal(usual["grad_prototypes"] * 2.0**-24, scaled["grad_prototypes"])


@pytest.mark.parametrize("width", [16, 136])
@pytest.mark.parametrize("short", ["features", "prototypes"])
def test_vectors_much_shorter_than_the_others(short, width):
    """Rows of one kind have one length, which the range of float16 must know."""
    case, generator = make_case(3, (30, 20, width), torch.float16, "nonl-both")
    features, prototypes = (torch.randn(n, width, device=DEVICE).half() for n in (30, 20))
    case = replace(case, features=features, prototypes=prototypes, normalize=True, tau=0.1, counts=None)
    case = replace(case, **{short: getattr(case, short) * 2.0**-9})
    check(case, random_upstream(case, generator))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("operand", ["features", "prototypes"])
def test_strides_past_32_bits(operand, wide, tmp_path, monkeypatch):
    """Four rows that lie 2^30 elements apart, in a sparse file: the last begins past 2^31."""
    if wide:
        monkeypatch.setattr(_launch, "is_narrow", lambda tables, x: False)
    stride = 2**30 + 16
    usual, _ = make_case(3, (4, 4, 32), torch.float16, "nonl-both")
    usual = replace(usual, prototypes=usual.prototypes.half(), counts=None)
    x = getattr(usual, operand)
    if DEVICE == "cuda":
        storage = torch.zeros(3 * stride + 32, dtype=torch.float16, device=DEVICE)
    else:
        path = str(tmp_path / "sparse")
        storage = torch.from_file(path, shared=True, size=3 * stride + 32, dtype=torch.float16)
    far = storage.as_strided((4, 32), (stride, 1))
    far.copy_(x)
    upstream = random_upstream(usual)
    expected = run_kernels(usual, upstream)
    for name, value in run_kernels(replace(usual, **{operand: far}), upstream).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("width", [48, 136])
@pytest.mark.parametrize("rule", quick(RULES, TWO))
def test_long_vectors_that_are_not_normalised(rule, width):
    """Logits of hundreds, whose exponentials need their maximum in half types too."""
    case, generator = make_case(14, (40, 33, width), torch.float16, rule)
    features, prototypes = (4 * torch.randn(n, width, device=DEVICE).half() for n in (40, 33))
    case = replace(case, features=features, prototypes=prototypes, normalize=False, tau=1.0, tensor_temperature=False)
    assert check(case, random_upstream(case, generator))["pos"].max() > 89  # exp of it is no float32


def test_bfloat16_is_right_on_any_device():
    case, generator = make_case(2, (65, 63, 48), torch.float32, "nonl")
    case = replace(case, features=case.features.bfloat16(), normalize=True, tau=0.1)
    actual = check(case, random_upstream(case, generator))
    assert actual["grad_features"].dtype == torch.bfloat16


def run_loss(case: Case, *, weighted: bool, mean: bool) -> tuple[prototype_loss.Forward, list[Tensor]]:
    """What the kernel of the loss leaves, and the gradients for an upstream gradient of 3."""
    tensors, options = (case.features, case.prototypes, case.labels), case.options()
    del options["counts"]
    weight = torch.linspace(0.5, 2.0, len(case.prototypes), device=DEVICE) if weighted else None
    found = prototype_loss.launch_fwd(*tensors, weight, **options, zero_empty=False, mean=mean)
    three = torch.tensor(3.0, device=DEVICE)
    saved = found[1:10]  # from the log-sum-exps to the gradient of the positives
    return found, list(prototype_lse.launch_bwd(*tensors, *saved, **options, factor=(three, found.divisor)))


@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize("rule", quick(RULES, (*TWO, "normface")))
def test_loss_over_programs(rule, joins, few_programs, monkeypatch):
    """Blocks so small that samples and classes take several programs and steps, and splits are joined here or before.
    The samples of each class are counted here or, where rows are all, before.
    """
    monkeypatch.setattr(_launch, "joins_in_loss", lambda *shape: joins)
    monkeypatch.setattr(_launch, "MAX_COMPARISONS", 2**22 if joins else 0)
    blocks = {"BLOCK_K": 4, "BLOCK_N": 16, "BLOCK_S": 2 if joins else 1, "num_warps": 4}
    monkeypatch.setattr(_launch, "loss_blocks", lambda *shape: blocks)
    monkeypatch.setattr(_launch, "TOTALS_BLOCKS", {"BLOCK_B": 2, "num_warps": 4})
    case, _ = make_case(13, (150, 70, 24), torch.float32, rule)
    labels = case.labels.clone()
    labels[:5] = torch.tensor([-100, 2**40, 70, -7, 3])
    features = torch.randn(150, 24, device=DEVICE)
    case = replace(case, features=features, labels=labels, normalize=True, tau=0.1, ignore_index=3, counts=None)
    found, (grad_features, grad_prototypes, radial) = run_loss(case, weighted=True, mean=True)

    z, w = (x.double().detach().requires_grad_() for x in (case.features, case.prototypes))
    tau = torch.tensor(0.1, dtype=torch.float64, device=DEVICE, requires_grad=True)
    rows, cols, exclude_own = RULES[rule]
    logits = unit_rows(w) @ unit_rows(z).T / tau
    own = (torch.arange(len(w), device=DEVICE)[:, None] == labels) & case.valid
    summed = logits.masked_fill(own, -math.inf) if exclude_own else logits
    row_lse = summed[:, case.valid].logsumexp(1)[labels[case.valid]]
    col_lse = summed[:, case.valid].logsumexp(0)
    lse = torch.logaddexp(row_lse, col_lse) if rows and cols else row_lse if rows else col_lse
    a = torch.linspace(0.5, 2.0, len(w), dtype=torch.float64, device=DEVICE)[labels[case.valid]]
    loss = (a * (lse - logits.T[own.T])).sum() / a.sum()
    torch.testing.assert_close(found.loss.double(), loss, rtol=1e-6, atol=0)
    truth = torch.autograd.grad(3 * loss, (z, w, tau))
    for actual, want in zip((grad_features, grad_prototypes, -radial.sum() / 0.1**2), truth, strict=True):
        assert (actual - want).norm() <= 1e-5 * want.norm()
    assert found.extremes.tolist() == [-100, 2**40]
    assert all(torch.equal(a, b) for a, b in zip(found, run_loss(case, weighted=True, mean=True)[0], strict=True))


def test_operands_are_copied_only_to_be_aligned():
    wide = torch.randn(9, 80, device=DEVICE)
    for x in (wide, wide[:, :32], wide[::2, 16:48]):
        assert _launch.aligned(x) is x
    for x in (
        wide[:, :17],
        wide[:, 1:33],
        wide[:, 16:48:2],
        wide.view(-1)[: 9 * 66].view(9, 66)[:, :32],
        wide[:, :9].T,
    ):
        copy = _launch.aligned(x)
        assert copy.shape == (len(x), -(-x.shape[1] // 16) * 16)
        assert copy.is_contiguous()
        assert torch.equal(copy[:, : x.shape[1]], x)
        assert not copy[:, x.shape[1] :].any()


@pytest.mark.parametrize(("n", "k"), [(0, 3), (1, 1), (5000, 9), (3000, 2000)])
def test_segment_sum(n, k):
    generator = torch.Generator().manual_seed(n)
    labels = torch.randint(-1, k + 1, (n,), generator=generator).to(DEVICE)
    labels[:1] = 2**40
    values = torch.randn(n, 2, generator=generator).to(DEVICE)[:, 1]
    kept = (labels >= 0) & (labels < k) & (labels != 2)
    truth = torch.zeros(k, dtype=torch.float64, device=DEVICE).index_add_(0, labels[kept], values[kept].double())
    sums = prototype_lse.segment_sum(values, labels, k, 2)
    assert (sums - truth).abs().max() < 1e-5
    assert torch.equal(sums, prototype_lse.segment_sum(values, labels, k, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k", "d", "layout"),
    [(0, 3, 8, "sliced"), (1, 1, 1, "sliced"), (500, 9, 37, "transposed"), (300, 40, 300, "sliced")],
)
def test_class_sums(n, k, d, layout, dtype):
    generator = torch.Generator().manual_seed(n)
    labels = torch.randint(-1, k + 1, (n,), generator=generator).to(DEVICE)
    labels[:1] = 2**40
    features = lay_out(torch.randn(n, d, generator=generator).to(DEVICE, dtype), layout)
    inv_norms = torch.rand(n, generator=generator).to(DEVICE)
    kept = (labels >= 0) & (labels < k) & (labels != 2)
    units = features.double() * inv_norms[:, None]
    truth = torch.zeros(k, d, dtype=torch.float64, device=DEVICE).index_add_(0, labels[kept], units[kept])
    sums, counts = prototype_lse.class_sums(features, inv_norms, labels, k, 2)
    assert (sums - truth).abs().max() < 1e-4
    assert torch.equal(counts, torch.bincount(labels[kept], minlength=k))


class Recorder:
    """A kernel that notes what it would be launched with."""

    def __init__(self, kernel, launched: set) -> None:
        self.name, self.launched = kernel.fn.__name__, launched

    def __getitem__(self, grid):
        return lambda **arguments: self.launched.add((self.name, fixed_arguments(arguments)))


def fixed_arguments(arguments: dict) -> frozenset:
    options = ("num_warps", "num_stages", "maxnreg")
    return frozenset((k, v) for k, v in arguments.items() if v is None or (k.isupper() and len(k) > 1) or k in options)


@contextlib.contextmanager
def record_launches(monkeypatch) -> Iterator[set]:
    """(name of the kernel, what is fixed when it is compiled) of every launch. None runs: launchers see shapes alone."""
    launched: set = set()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", torch.zeros_like)  # class numbers that nobody writes are indices
        for module, name in aot.kernels():
            patch.setattr(module, name, Recorder(getattr(module, name), launched))
        yield launched


def compiled_ahead_of_time() -> set:
    return {(c.kernel.fn.__name__, fixed_arguments({**c.constexprs, **c.options})) for c in aot.aot_configurations()}


def test_every_launch_is_a_configuration_compiled_ahead_of_time(monkeypatch):
    """What the launchers ask for is what tests/test_aot.py compiles."""
    monkeypatch.setattr(_launch, "COMPACT_FLOP", 0)
    with record_launches(monkeypatch) as launched:
        for seed in range(150):
            monkeypatch.setattr(_launch, "TARGET_PROGRAMS", 1 + seed % 4)
            case, generator = make_case(seed, (65, 70, (16, 48, 136, 264)[seed // 4 % 4]))
            run_kernels(case, random_upstream(case, generator))
            run_loss(case, weighted=seed % 2 == 0, mean=seed % 5 > 0)
    kernels = {
        "_columns_kernel",
        "_lse_fwd_tile_kernel",
        "_lse_fwd_kernel",
        "_inverse_norms_kernel",
        "_lse_bwd_kernel",
        "_lse_bwd_tile_kernel",
        "_loss_kernel",
    }
    assert {name for name, _ in launched} == kernels | {"_combine_kernel", "_finish_kernel", "_range_kernel"}
    missing = [(name, sorted(map(str, fixed))) for name, fixed in launched - compiled_ahead_of_time()]
    assert not missing
