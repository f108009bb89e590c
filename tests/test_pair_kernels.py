"""The kernels over pairs of samples against float64, on a GPU where there is one and through Triton's interpreter elsewhere.

The yardstick is that of test_kernels.py: at most twice the error of eager PyTorch in the same dtype, plus a few units of
rounding. Three settings cover what a loss asks for: samples against themselves; the shards of a global batch, each against
all; and samples against others, with the gradients of both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from test_kernels import DEVICE, DTYPES, QUICK, compiled_ahead_of_time, lay_out, record_launches, unit_rows
from torch import Tensor

from hypercontrast.kernels import _launch, class_sums, pair_backward, pair_loss, pair_lse

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy warns of the infinities that the kernels rely on
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]

SETTINGS = ("itself", "global", "others")
# One element; odd everything; just past a tile and just before; a power of two; and beyond one step of the wide product.
SHAPES = [(1, 1), (2, 5), (7, 16), (65, 17), (129, 40), (130, 123), (64, 128), (40, 200), (127, 33)]
ABSENT = -(2**63)


@dataclass(frozen=True)
class Case:
    anchors: Tensor  # [n, D]
    anchor_ids: Tensor  # [n]
    setting: str
    tau: float
    columns: Tensor | None = None  # [m, D], for "others"
    column_ids: Tensor | None = None
    mask: Tensor | None = None  # [n, m]
    offset: int | None = None
    inside: bool = False
    normalize: bool = True
    tensor_temperature: bool = False

    def options(self, offset: int | None) -> dict:
        return {
            "offset": offset,
            "temperature": torch.tensor(self.tau, device=DEVICE) if self.tensor_temperature else None,
            "inv_temperature": 1.0 / self.tau,
            "normalize": self.normalize,
            "inside": self.inside,
        }

    @property
    def against(self) -> tuple[Tensor, Tensor, int | None]:
        """Columns, their ids and the offset, also where they are the anchors."""
        if self.setting == "others":
            return self.columns, self.column_ids, self.offset
        return self.anchors, self.anchor_ids, 0

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """[n, m]: which pairs are valid, and which are positive."""
        columns, column_ids, offset = self.against
        valid = torch.ones(len(self.anchors), len(columns), dtype=torch.bool, device=DEVICE)
        positive = self.mask
        if self.mask is None:
            valid = (self.anchor_ids >= 0)[:, None] & (column_ids >= 0)[None, :]
            positive = self.anchor_ids[:, None] == column_ids[None, :]
        if offset is not None:
            valid &= (
                torch.arange(len(columns), device=DEVICE) != torch.arange(len(valid), device=DEVICE)[:, None] + offset
            )
        return valid, valid & positive


@dataclass(frozen=True)
class Upstream:
    lse: Tensor
    positives: Tensor


def random_upstream(case: Case, generator: torch.Generator | None = None) -> Upstream:
    n = len(case.anchors)
    return Upstream(*(torch.randn(n, generator=generator).to(DEVICE) / max(n, 1) for _ in range(2)))


def loss_upstream(case: Case) -> Upstream:
    """What the loss sends: 1/n to each log-sum-exp, and -1/n to each mean (`inside`: log) of the positives."""
    n = len(case.anchors)
    count = torch.ones(n, device=DEVICE) if case.inside else case.pairs[1].sum(1).clamp_min(1)
    return Upstream(torch.full((n,), 1.0 / n, device=DEVICE), -1.0 / (n * count))


def run_kernels(case: Case, upstream: Upstream) -> dict[str, Tensor]:
    """The results, and the gradient of the anchors; that of the columns where they are others."""
    x, ids, mask = case.anchors, None if case.mask is not None else case.anchor_ids, case.mask
    if case.setting == "itself":
        options = case.options(0)
        lse, positives, inv, _ = pair_lse.launch_fwd(x, None, ids, None, mask, **options)
        side = pair_lse.Side(lse, upstream.lse, positives, upstream.positives)
        transposed = None if mask is None else mask.T
        grad, total = pair_lse.launch_bwd(x, None, ids, None, inv, inv, side, side, mask, transposed, **options)
        return {"lse": lse, "positives": positives, "grad": grad, "logit_grad_sum": total}
    if case.setting == "global":
        return run_shards(case, upstream)
    column_ids = None if mask is not None else case.column_ids
    options = case.options(case.offset)
    lse, positives, inv, inv_columns = pair_lse.launch_fwd(x, case.columns, ids, column_ids, mask, **options)
    side = pair_lse.Side(lse, upstream.lse, positives, upstream.positives)
    grad, total = pair_lse.launch_bwd(
        x, case.columns, ids, column_ids, inv, inv_columns, side, None, mask, None, **options
    )
    options = case.options(None if case.offset is None else -case.offset)
    transposed = None if mask is None else mask.T
    grad_columns, _ = pair_lse.launch_bwd(
        case.columns, x, column_ids, ids, inv_columns, inv, None, side, None, transposed, **options
    )
    return {
        "lse": lse, "positives": positives, "grad": grad, "grad_columns": grad_columns, "logit_grad_sum": total
    }  # fmt: skip


def run_loss(case: Case, exclude: bool, mean: bool) -> tuple[Tensor, Tensor]:
    """The loss of the anchors against themselves, and its gradient; of a fixed temperature."""
    options = {"inv_temperature": 1.0 / case.tau, "normalize": case.normalize, "inside": case.inside}
    found = pair_loss.launch_fwd(
        case.anchors, case.anchor_ids, absent=ABSENT, scale=0.7, exclude=exclude, mean=mean, **options
    )
    loss, _, divisor, *statistics = found
    factor = torch.ones((), device=DEVICE), divisor
    return loss, pair_loss.launch_bwd(case.anchors, *statistics, factor=factor, **options)


def run_shards(case: Case, upstream: Upstream) -> dict[str, Tensor]:
    """Uneven shards of the batch, one of them empty, each against all samples."""
    x, n = case.anchors, len(case.anchors)
    ids = None if case.mask is not None else case.anchor_ids
    shards = [slice(0, n // 3), slice(n // 3, n // 3), slice(n // 3, n)]
    forwards = []
    for shard in shards:
        row_ids, mask = (None if t is None else t[shard] for t in (ids, case.mask))
        forwards.append(pair_lse.launch_fwd(x[shard], x, row_ids, ids, mask, **case.options(shard.start)))
    lse, positives = (torch.cat([forward[i] for forward in forwards]) for i in range(2))
    grads, totals = [], []
    for shard, (_, _, inv, inv_columns) in zip(shards, forwards, strict=True):
        sides = [
            pair_lse.Side(lse[part], upstream.lse[part], positives[part], upstream.positives[part])
            for part in (shard, slice(None))
        ]
        row_ids = None if ids is None else ids[shard]
        masks = (None, None) if case.mask is None else (case.mask[shard], case.mask.T[shard])
        grad, total = pair_lse.launch_bwd(
            x[shard], x, row_ids, ids, inv, inv_columns, *sides, *masks, **case.options(shard.start)
        )
        grads.append(grad)
        totals.append(total)
    return {"lse": lse, "positives": positives, "grad": torch.cat(grads), "logit_grad_sum": sum(totals)}


def eager(case: Case, upstream: Upstream, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same in plain PyTorch: vectors and logits in `dtype`, sums in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    x = case.anchors.to(dtype).detach().requires_grad_()
    leaves = [x]
    if case.setting == "others":
        leaves.append(case.columns.to(case.anchors.dtype).to(dtype).detach().requires_grad_())
    u, v = ((unit_rows(t) if case.normalize else t) for t in (leaves[0], leaves[-1]))
    logits = (u @ v.T).to(wide) / case.tau
    valid, positive = case.pairs
    lse = torch.logsumexp(logits.masked_fill(~valid, -math.inf), dim=1)
    if case.inside:
        positives = torch.logsumexp(logits.masked_fill(~positive, -math.inf), dim=1)
    else:
        positives = torch.where(positive, logits, 0).sum(1)
    total = (lse * upstream.lse)[lse.isfinite()].sum() + (positives * upstream.positives)[positives.isfinite()].sum()
    *grads, grad_logits = torch.autograd.grad(total, (*leaves, logits), materialize_grads=True)
    # Against themselves, pairs are met by the kernels from both sides.
    logit_grad_sum = (grad_logits * logits).sum() * (1 if case.setting == "others" else 2)
    names = ("lse", "positives", "grad", *(["grad_columns"] if len(leaves) > 1 else []), "logit_grad_sum")
    found = (lse, positives, *grads, logit_grad_sum)
    return {name: value.detach() for name, value in zip(names, found, strict=True)}


def check(case: Case, upstream: Upstream) -> dict[str, Tensor]:
    """Kernels within twice eager's error and a rounding floor; the same infinities; the right types."""
    actual = run_kernels(case, upstream)
    truth = eager(case, upstream, torch.float64)
    same = eager(case, upstream, case.anchors.dtype)
    # Kernels multiply by √(1/τ) twice in float32: they may answer for a temperature two units of its rounding away.
    nudged = eager(replace(case, tau=case.tau * (1 + 2 * torch.finfo(torch.float32).eps)), upstream, torch.float64)
    columns = case.against[0]
    norms = [t.double().norm(dim=1) for t in (case.anchors, columns)]
    largest = max([1.0, *(n.max().item() for n in norms if n.numel())])
    reach = 1.0 / case.tau if case.normalize else largest**2 / case.tau
    shortest = [n.clamp_min(1e-12).min().item() if case.normalize and n.numel() else 1 / largest for n in norms]
    strength = max([0.0, *(g.abs().max().item() for g in vars(upstream).values() if g.numel())])
    if case.setting != "others":
        strength *= 2  # either side
    rounding, single = (torch.finfo(dtype).eps for dtype in (case.anchors.dtype, torch.float32))
    # Narrow float32 no caller can reach, see `check_draw`. A pair's two products, in either order of its samples, are each
    # half a unit off, and logits as large as 1/τ with them. The rounding of half types hides that.
    narrow = case.anchors.dtype == torch.float32 and _launch.is_narrow(_launch.PAIR_BACKWARD_NARROW, case.anchors)
    exponent = rounding * reach if narrow else 0.0
    rows = max(1, len(case.anchors))
    most_positives = max([1, *case.pairs[1].sum(1).tolist()])
    # The radial part of a sum over positives is taken away in float32.
    cancelled = single * most_positives
    floor = {
        "lse": 8e-7 * reach + 1e-6,
        "positives": 8e-7 * reach * (1 if case.inside else most_positives) + 1e-6,
        "grad": (2 * (rounding + cancelled) + exponent) * strength / (case.tau * shortest[0]),
        "grad_columns": (2 * (rounding + cancelled) + exponent) * strength / (case.tau * shortest[1]),
        # The factors of float32 that all weights share; a weight rounded for every positive; and log-sum-exps kept in
        # float32, whose rounding scales a whole row of exp(s - lse).
        "logit_grad_sum": 8 * single * truth["logit_grad_sum"].abs().item()
        + strength * rows**0.5 * (4 * rounding * reach * most_positives**0.5 + 0.29 * single * reach**2),
    }
    assert actual.keys() == truth.keys()
    for name, value in actual.items():
        finite = truth[name].isfinite()
        assert value.shape == truth[name].shape, name
        assert torch.equal(value.isfinite(), finite), f"{name}: infinities differ"
        assert not value.isnan().any()
        if finite.any():
            error = (value.double() - truth[name])[finite].abs().max().item()
            reference = (same[name].double() - truth[name])[finite].abs().max().item()
            if math.isfinite(reference):
                allowed = 2 * reference + floor[name] + (nudged[name] - truth[name])[finite].abs().max().item()
                assert error <= allowed, f"{name}: {error:.3g} against {reference:.3g} of eager"
    assert actual["grad"].dtype == case.anchors.dtype
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


def make_case(seed: int, shape=None, dtype=None, setting=None) -> tuple[Case, torch.Generator]:
    """A random draw: every property that the kernels treat apart is drawn."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    n, d = shape or pick(SHAPES)
    m = pick([0, 1, 30, 64, 100])
    setting = setting or pick(SETTINGS)
    dtype = dtype or pick(DTYPES)
    normalize = pick([True, True, True, False])
    tau = (0.005 * 200 ** torch.rand((), generator=generator)).item() if normalize else 1.0
    num_classes = max(1, min(n, pick([1, 2, 5, 20, 200])))  # ids are dense
    spread = pick([1.0, 0.05])
    centres = torch.randn(num_classes, d, generator=generator) * pick([1.0, 20.0]) * (1 if normalize else d**-0.5 / 8)
    layout = pick(["contiguous", "transposed", "sliced"])
    with_mask = pick([True, False, False])

    def samples(size):
        ids = torch.randint(num_classes, (size,), generator=generator)
        x = centres[ids] + centres.std(correction=0) * spread * torch.randn(size, d, generator=generator)
        if pick([True, False]) and size > 3 and not with_mask:
            ids[[1, size // 2]] = torch.tensor([-1, ABSENT])
        if pick([True, False]) and size > 3:
            x[0] = 0.0
        return lay_out(x.to(dtype).to(DEVICE), layout), ids.to(DEVICE)

    anchors, anchor_ids = samples(n)
    case = Case(
        anchors,
        anchor_ids,
        setting,
        tau,
        inside=pick([False, False, True]),
        normalize=normalize,
        tensor_temperature=pick([True, False]),
    )
    if setting == "others":
        columns, column_ids = samples(m)
        case = replace(case, columns=columns, column_ids=column_ids, offset=pick([None, 0, 3, -5]))
    if with_mask:
        size = len(case.against[0])
        mask = torch.rand(size, n, generator=generator) < pick([0.0, 0.1, 0.6])
        case = replace(case, mask=mask.to(DEVICE).T if pick([True, False]) else mask.T.contiguous().to(DEVICE))
    return case, generator


def check_draw(seed: int, monkeypatch) -> None:
    case, generator = make_case(seed)
    monkeypatch.setattr(_launch, "TARGET_PROGRAMS", 1 + seed % 4)
    if seed % 2:  # of large batches
        monkeypatch.setattr(_launch, "MAX_POSITIVES_IN_TILES", 0)
    if seed % 3 == 0:  # float32 takes the narrow path only here: half types alone show its errors too coarsely
        monkeypatch.setattr(_launch, "is_narrow", lambda tables, x: x.shape[1] <= 128)
    if seed % 3 == 1:
        monkeypatch.setattr(_launch, "is_narrow", lambda tables, x: False)
        monkeypatch.setattr(
            _launch, "SCRATCH_BYTES", (2048, 16384)[seed % 2]
        )  # several chunks, strips, groups of classes
        monkeypatch.setattr(_launch, "CHUNK_COLUMNS", 64)
    check(case, random_upstream(case, generator))


@pytest.mark.parametrize("seed", range(QUICK))
def test_random_draws(seed, monkeypatch):
    check_draw(seed, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(QUICK, 640))
def test_many_random_draws(seed, monkeypatch):
    check_draw(seed, monkeypatch)


def clustered(n: int, width: int, dtype: torch.dtype, **options) -> Case:
    """Samples of a few classes."""
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(5, (n,), generator=generator)
    x = torch.randn(5, width, generator=generator)[ids] + torch.randn(n, width, generator=generator)
    return Case(x.to(DEVICE, dtype), ids.to(DEVICE), **{"setting": "itself", "tau": 0.1, **options})


# Half types: narrow, narrow in the forward alone, wide.
@pytest.mark.parametrize(("width", "wide"), [(24, False), (136, False), (136, True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inside", [False, True])
def test_tangential_gradient_near_collapse(inside, dtype, width, wide, few_programs, monkeypatch):
    """Where G's entries cancel: the loss's own gradient, and of it the part that moves a unit vector."""
    if wide:
        monkeypatch.setattr(_launch, "is_narrow", lambda tables, x: False)
    generator = torch.Generator().manual_seed(0)
    centres = torch.linalg.qr(torch.randn(width, width, generator=generator))[0][:20]
    ids = torch.randint(20, (100,), generator=generator)
    x = 3.0 * centres[ids] + 0.01 * torch.randn(100, width, generator=generator)
    case = Case(x.to(DEVICE, dtype), ids.to(DEVICE), "itself", tau=0.1, inside=inside)
    upstream = loss_upstream(case)
    actual, truth, same = check(case, upstream), eager(case, upstream, torch.float64), eager(case, upstream, dtype)
    unit = torch.nn.functional.normalize(case.anchors.double(), dim=1)

    def tangential(grad):
        return grad.double() - (grad.double() * unit).sum(1, keepdim=True) * unit

    wanted = tangential(truth["grad"])
    error = (tangential(actual["grad"]) - wanted).norm() / wanted.norm()
    reference = (tangential(same["grad"]) - wanted).norm() / wanted.norm()
    # The second term: logits of size 1/τ are held in float32 whatever the type.
    assert error <= 2 * reference + 4 * torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps / case.tau
    assert error <= 0.01
    radial = (actual["grad"].double() * unit).sum(1).norm() / wanted.norm()
    assert radial <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n", "m", "width"), [(0, 0, 8), (0, 3, 8), (3, 0, 8), (1, 1, 1), (1, 0, 300), (2, 1, 300)])
def test_smallest_batches(n, m, width, masked, inside):
    for setting in SETTINGS:
        case = Case(
            torch.randn(n, width, device=DEVICE),
            torch.zeros(n, dtype=torch.int64, device=DEVICE),
            setting,
            tau=0.2,
            inside=inside,
        )
        if setting == "others":
            column_ids = torch.zeros(m, dtype=torch.int64, device=DEVICE)
            case = replace(case, columns=torch.randn(m, width, device=DEVICE), column_ids=column_ids)
        if masked:
            case = replace(case, mask=torch.ones(n, len(case.against[0]), dtype=torch.bool, device=DEVICE))
        check(case, random_upstream(case))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["one class", "all different"])
def test_extreme_classes(kind, setting, inside):
    n = 70
    ids = torch.zeros(n, dtype=torch.int64) if kind == "one class" else torch.randperm(n)
    case = replace(clustered(n, 24, torch.float16), anchor_ids=ids.to(DEVICE), setting=setting, inside=inside)
    if setting == "others":
        case = replace(case, columns=case.anchors[:40], column_ids=case.anchor_ids[:40])
    actual = check(case, random_upstream(case))
    if kind == "all different" and setting != "others":
        assert torch.equal(actual["positives"], torch.full_like(actual["positives"], -math.inf if inside else 0.0))


# The second has absent samples in tiles beside a sample's own.
@pytest.mark.parametrize(("n", "width"), [(9, 16), (200, 16), (9, 160)])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("setting", ["itself", "global"])
def test_absent_samples_and_zero_vectors_get_exactly_zero(setting, inside, n, width):
    """Whatever is sent upstream of samples that are not there."""
    case = clustered(n, width, torch.float16, setting=setting, inside=inside)
    absent = torch.tensor([0, 4, n - 1], device=DEVICE)
    case.anchor_ids[absent] = torch.tensor([-1, ABSENT, -(2**32)], device=DEVICE)
    case.anchors[absent] = math.inf  # not read
    case.anchors[absent[:1]] = 0.0
    case.anchors[5] = 0.0
    case = replace(case, anchors=torch.where(case.anchors.isinf(), 7.0, case.anchors))
    upstream = random_upstream(case)
    without = check(case, upstream)
    upstream.lse[absent] = math.nan
    actual = run_kernels(case, upstream)
    for name, value in actual.items():
        assert torch.equal(value, without[name]), name
    assert not actual["grad"][absent].any()
    assert not actual["grad"][5].any()
    assert torch.equal(actual["lse"][absent], torch.full((3,), -math.inf, device=DEVICE))


@pytest.mark.parametrize("tau", [0.1, 0.01])
@pytest.mark.parametrize("width", [16, 160])
@pytest.mark.parametrize("inside", [False, True])
def test_a_sample_alone_gets_exactly_zero(inside, width, tau):
    """Whatever is sent upstream of its log-sum-exp, which is of nothing."""
    case = clustered(3, width, torch.float16, inside=inside, tau=tau)
    case.anchor_ids[1:] = -1
    upstream = random_upstream(case)
    upstream.lse[:] = math.nan
    actual = run_kernels(case, upstream)
    assert not actual["grad"].any()
    assert actual["logit_grad_sum"] == 0


@pytest.mark.parametrize("setting", SETTINGS)
def test_long_vectors_that_are_not_normalised(setting):
    """Logits of hundreds, whose exponentials need their maximum in half types too."""
    case = clustered(40, 48, torch.float16, setting=setting, normalize=False, tau=0.25)
    if setting == "others":
        case = replace(case, columns=case.anchors.flip(0)[:30], column_ids=case.anchor_ids.flip(0)[:30])
    assert check(case, random_upstream(case))["lse"].max() > 89  # exp of it is no float32


@pytest.mark.parametrize("setting", SETTINGS)
def test_class_ids_of_any_stride(setting):
    case = clustered(20, 16, torch.float16, setting=setting)
    spread = replace(case, anchor_ids=torch.stack([case.anchor_ids, -case.anchor_ids], 1)[:, 0])
    if setting == "others":
        case, spread = (replace(x, columns=x.anchors, column_ids=x.anchor_ids, offset=0) for x in (case, spread))
    upstream = random_upstream(case)
    expected = run_kernels(case, upstream)
    for name, value in run_kernels(spread, upstream).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_mask_of_equal_classes_does_what_the_classes_do(setting, inside):
    case = clustered(70, 40, torch.float32, setting=setting, inside=inside)
    if setting == "others":
        case = replace(case, columns=case.anchors.flip(0)[:50], column_ids=case.anchor_ids.flip(0)[:50])
    upstream = random_upstream(case)
    usual = run_kernels(case, upstream)
    masked = run_kernels(replace(case, mask=case.anchor_ids[:, None] == case.against[1][None, :]), upstream)
    for name, value in masked.items():
        torch.testing.assert_close(value, usual[name], rtol=1e-5, atol=1e-5 * usual[name].abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strips", [1, 2])
def test_triangle_in_groups_of_strips(strips, dtype, few_programs, monkeypatch):
    case = clustered(300, 16, dtype)
    monkeypatch.setattr(_launch, "SCRATCH_BYTES", strips * 4 * 300)
    check(case, random_upstream(case))


@pytest.mark.parametrize("first_counted", [0, 100])
@pytest.mark.parametrize("kind", ["few", "all different", "one slot", "last slot"])
def test_classes_of_any_labels(kind, first_counted):
    if kind == "few":
        labels = torch.tensor([ABSENT, ABSENT + 1, -1, 0, 2**32, 2**63 - 1])[torch.randint(6, (300,))]
    elif kind == "all different":
        labels = torch.randperm(300) << 40
    else:  # their hashes differ in bits that are dropped alone
        inverse = pow(-7046029254386353131, -1, 2**64)
        hashes = range(40) if kind == "one slot" else range(-40, 0)
        labels = torch.tensor([(i * inverse + 2**63) % 2**64 - 2**63 for i in hashes])[torch.randint(40, (300,))]
    labels = labels.to(DEVICE)
    ids, counts = class_sums.classes(labels, first_counted, ABSENT)
    same = (labels[:, None] == labels[None, :]) & (labels != ABSENT)
    assert torch.equal((ids[:, None] == ids[None, :]) & (ids >= 0)[:, None], same)
    assert torch.equal(ids < 0, labels == ABSENT)
    assert int(ids.max()) < len(ids)
    assert torch.equal(counts[ids][ids >= 0], same[:, first_counted:].sum(1)[ids >= 0].int())
    assert counts.sum() == (ids >= 0)[first_counted:].sum()


@pytest.mark.parametrize("width", [24, 136])
@pytest.mark.parametrize("setting", SETTINGS)
def test_repeats_are_bitwise_equal(setting, width, few_programs):
    case, _ = make_case(6, (150, width), torch.float16, setting)
    upstream = random_upstream(case)
    first, second = run_kernels(case, upstream), run_kernels(case, upstream)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("width", [48, 160])
@pytest.mark.parametrize("inside", [False, True])
def test_tiny_upstream_gradients_survive_float16(inside, width):
    """G's entries are about 1/N², far below the smallest float16; short vectors make gradients large enough to tell."""
    case = clustered(65, width, torch.float16, inside=inside)
    case = replace(case, anchors=case.anchors * 2.0**-12)
    upstream = random_upstream(case)
    small = Upstream(*(g * 2.0**-10 for g in vars(upstream).values()))
    usual, scaled = run_kernels(case, upstream), run_kernels(case, small)
    sizeable = scaled["grad"].abs() >= 2.0**-13  # no subnormals
    assert sizeable.float().mean() > 0.9
    assert torch.equal((usual["grad"] * 2.0**-10)[sizeable], scaled["grad"][sizeable])


@pytest.mark.parametrize("inside", [False, True])
def test_tiny_upstream_gradients_survive_small_temperatures(inside):
    """Near collapse exp(-lse) is about e^(-1/τ): times a small upstream gradient it is no number of float32."""
    case = clustered(30, 16, torch.float16, setting="others", inside=inside, tau=1 / 60)
    anchors = torch.ones_like(case.anchors) + 0.01 * case.anchors
    case = replace(case, anchors=anchors, columns=anchors.flip(0).float(), column_ids=case.anchor_ids.flip(0))
    upstream = random_upstream(case)
    small = Upstream(*(g * 2.0**-60 for g in vars(upstream).values()))
    usual, scaled = run_kernels(case, upstream)["grad_columns"], run_kernels(case, small)["grad_columns"]
    assert usual.any()
    assert torch.equal(usual * 2.0**-60, scaled)


@pytest.mark.parametrize("tau", [0.1, 1 / 60])
@pytest.mark.parametrize("short", ["anchors", "columns"])
def test_vectors_much_shorter_than_the_others(short, tau):
    """Rows of one kind have one length, which the range of float16 must know."""
    case = clustered(30, 16, torch.float16, setting="others", tau=tau)
    case = replace(case, columns=case.anchors.flip(0)[:20], column_ids=case.anchor_ids.flip(0)[:20])
    case = replace(case, **{short: getattr(case, short) * 2.0**-9})
    check(case, random_upstream(case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_upstream_gradients_are_looked_through_for_float16_alone(dtype, monkeypatch):
    """Those that reach G take launches to be found, and its range is a scale of float16."""
    asked = []
    monkeypatch.setattr(pair_backward.Side, "upstream", lambda side: asked.append(side) or (side.grad_lse,))
    case = clustered(6, 24, dtype)
    run_kernels(case, random_upstream(case))
    assert bool(asked) == (dtype == torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_widths_beyond_one_tile(dtype, few_programs):
    case = clustered(6, 4097, dtype)
    check(case, random_upstream(case))


@pytest.mark.parametrize(("masked", "tau"), [(True, 0.1), (False, 0.1), (False, 0.01)])
@pytest.mark.parametrize("setting", ["itself", "others"])
def test_strides_past_32_bits(setting, masked, tau, tmp_path):
    """Four rows that lie 2^30 elements apart, in a sparse file: the last begins past 2^31. So do the masks'."""
    stride = 2**30 + 16

    def far(x, name):
        if DEVICE == "cuda":
            storage = torch.zeros(3 * stride + 32, dtype=x.dtype, device=DEVICE)
        else:
            storage = torch.from_file(str(tmp_path / name), shared=True, size=3 * stride + 32, dtype=x.dtype)
        return storage.as_strided(x.shape, (stride, 1)).copy_(x)

    case = clustered(4, 32, torch.float16, setting=setting, tau=tau)
    if setting == "others":
        case = replace(case, columns=case.anchors.flip(0).contiguous(), column_ids=case.anchor_ids)
    if masked:
        case = replace(case, mask=torch.eye(4, dtype=torch.bool, device=DEVICE).roll(1, 0))
    upstream = random_upstream(case)
    expected = run_kernels(case, upstream)
    distant = replace(case, anchors=far(case.anchors, "anchors"))
    if masked:
        distant = replace(distant, mask=far(case.mask, "mask"))
    if setting == "others":
        distant = replace(distant, columns=far(case.columns, "columns"))
    for name, value in run_kernels(distant, upstream).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("setting", SETTINGS)
def test_bfloat16_is_right_on_any_device(setting):
    case, generator = make_case(2, (65, 48), torch.float32, setting)
    case = replace(case, anchors=case.anchors.bfloat16(), normalize=True, tau=0.1)
    if setting == "others":
        case = replace(case, columns=case.columns.bfloat16())
    actual = check(case, random_upstream(case, generator))
    assert actual["grad"].dtype == torch.bfloat16


def test_columns_of_another_type_are_cast_to_that_of_the_anchors():
    case = clustered(30, 16, torch.float16, setting="others")
    case = replace(case, columns=case.anchors.flip(0).float() + 1e-5, column_ids=case.anchor_ids)
    rounded = replace(case, columns=case.columns.half())
    upstream = random_upstream(case)
    expected, actual = run_kernels(rounded, upstream), run_kernels(case, upstream)
    assert actual["grad_columns"].dtype == torch.float32
    assert torch.equal(actual["grad_columns"].half(), expected.pop("grad_columns"))
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_every_launch_is_a_configuration_compiled_ahead_of_time(monkeypatch):
    """What the launchers ask for is what tests/test_aot.py compiles."""
    with record_launches(monkeypatch) as launched:
        for seed in range(150):
            monkeypatch.setattr(_launch, "TARGET_PROGRAMS", 1 + seed % 4)
            case, generator = make_case(seed, (20, (16, 48, 136, 264)[seed // 4 % 4]))
            run_kernels(case, random_upstream(case, generator))
            run_loss(case, exclude=seed % 2 == 0, mean=seed % 3 > 0)
    names = {name for name, _ in launched}
    assert {
        "_pair_fwd_kernel",
        "_pair_triangle_kernel",
        "_pair_bwd_kernel",
        "_pair_bwd_tile_kernel",
        "_pair_loss_kernel",
        "_classes_kernel",
    } < names
    missing = [(name, sorted(map(str, fixed))) for name, fixed in launched - compiled_ahead_of_time()]
    assert not missing
