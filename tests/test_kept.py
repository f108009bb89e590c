"""Exponentials that the wide forward keeps for its backward: the kernels, what rounding them costs, when they are kept.

The interpreter computes bfloat16 in float32, so its rounding is tested in two ways: the kernels take float32 exponentials
that were rounded to bfloat16 in between, and a model of the whole algorithm rounds where a GPU does.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import TWO, quick
from oracle import LOSSES
from test_kernels import (
    DEVICE,
    DTYPES,
    RULES,
    Case,
    check,
    compiled_ahead_of_time,
    eager,
    few_programs,  # noqa: F401
    loss_upstream,
    make_case,
    random_upstream,
    record_launches,
    run_kernels,
)

import hypercontrast as hc
from hypercontrast import _ops, functional
from hypercontrast.kernels import _launch, prototype_loss, prototype_lse

HALVES = [torch.bfloat16, torch.float16]
TYPES = DTYPES if DEVICE == "cpu" else HALVES  # see `keeping`
BUDGET = 2**26


@pytest.fixture
def keeping(monkeypatch):
    """Every width and type takes the wide path and keeps: float32 shows errors of logic that half types would hide, in
    the interpreter, which has room for tiles of twice the bytes.
    """
    monkeypatch.setattr(_launch, "is_narrow", lambda tables, x: False)
    monkeypatch.setattr(_launch, "KEEP_WIDTH", 1)
    monkeypatch.setattr(_launch, "KEEP_FLOP", 0)
    monkeypatch.setitem(_launch.KEEP_INV_TEMPERATURE, torch.float32, 64.0)
    for tables in (_launch.FORWARD_KEEP_WIDE, _launch.FORWARD_KEEP_WIDE_CROWDED):
        for small in (False, True):
            monkeypatch.setitem(tables[90], (4, small), tables[90][2, small])


def forward(case: Case) -> tuple:
    tensors = case.features, case.prototypes, case.labels
    return prototype_lse.launch_fwd(*tensors, **case.options(), keep_bytes=BUDGET)


def backward(case: Case, outputs: tuple, upstream) -> tuple:
    tensors = case.features, case.prototypes, case.labels
    *grads, radial = prototype_lse.launch_bwd(*tensors, *outputs, *vars(upstream).values(), **case.options())
    return *grads, radial.sum() / case.tau


def keepable(case: Case, tau: float = 0.1) -> Case:
    return replace(case, tau=tau, normalize=True, tensor_temperature=False)


# Inside a tile, past the small tiles (64 x 64) and past the large ones (256 x 128), odd and even.
SHAPES = {"small": [(1, 1, 1), (65, 63, 17), (128, 256, 16)], "large": [(300, 129, 40), (130, 257, 24)]}


@pytest.mark.parametrize(
    ("tiles", "shape"),
    [
        pytest.param(tiles, shape, marks=() if tiles == past else pytest.mark.slow)
        for tiles, (past, shapes) in product(SHAPES, SHAPES.items())
        for shape in shapes
    ],
)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rule", quick(RULES, (*TWO, "normface")))
def test_against_float64(rule, dtype, tiles, shape, keeping, monkeypatch):
    if tiles == "large":  # and several chunks
        monkeypatch.setattr(_launch, "TARGET_PROGRAMS", 3)
        monkeypatch.setattr(_launch, "SCRATCH_BYTES", 1)
        monkeypatch.setattr(_launch, "CHUNK_BYTES", 1)
    case, generator = make_case(int(tiles == "large"), shape, dtype, rule)
    case = keepable(case)
    assert forward(case)[-1].numel()
    check(case, random_upstream(case, generator))


@pytest.mark.parametrize("rule", ["ntce", "nonl"])
def test_absent_classes_are_skipped(rule, keeping, monkeypatch):
    monkeypatch.setattr(_launch, "COMPACT_FLOP", 0)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(150, (140,), generator=generator) * 2 + 1  # even classes are absent
    features, prototypes = (torch.randn(n, 24, generator=generator).to(DEVICE) for n in (140, 300))
    counts = torch.bincount(labels, minlength=300).to(DEVICE)
    case = Case(features, prototypes, labels.to(DEVICE), rule, tau=0.1, counts=counts)
    assert forward(case)[-1].shape == (140, 192)
    for part in (1, 2**26):
        monkeypatch.setattr(_launch, "SCRATCH_BYTES", part)
        monkeypatch.setattr(_launch, "CHUNK_BYTES", part)
        actual = check(case, loss_upstream(case))
        assert torch.equal(actual["row"].isfinite(), counts > 0)
        assert not actual["grad_prototypes"][counts == 0].any()


@pytest.mark.parametrize("rule", RULES)
def test_a_backward_leaves_what_was_kept(rule, keeping):
    case, generator = make_case(4, (150, 90, 40), torch.float16, rule)
    case, upstream = keepable(case), random_upstream(case, generator)
    outputs = forward(case)
    kept = outputs[-1].clone()
    first, second = (backward(case, outputs, upstream) for _ in range(2))
    assert torch.equal(outputs[-1], kept)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("rule", ["ntce", "nonl-both"])
def test_every_launch_is_a_configuration_compiled_ahead_of_time(rule, monkeypatch):
    monkeypatch.setattr(_launch, "COMPACT_FLOP", 0)
    monkeypatch.setattr(_launch, "KEEP_FLOP", 0)
    with record_launches(monkeypatch) as launched:
        for targets in (3, 264):
            monkeypatch.setattr(_launch, "TARGET_PROGRAMS", targets)
            case, generator = make_case(targets, (65, 70, 528), torch.float16, rule)
            for counts in (None, torch.bincount(case.labels[case.valid], minlength=70)):
                run_kernels(replace(keepable(case), counts=counts), random_upstream(case, generator))
    assert {"_lse_fwd_tile_kernel", "_lse_bwd_tile_kernel"} <= {name for name, _ in launched}
    assert "_lse_fwd_kernel" not in {name for name, _ in launched}
    assert not launched - compiled_ahead_of_time()


# ---------------------------------------------------------------------------------------------------------------------
# What rounding exp(s) costs


def drawn(rule: str, dtype: torch.dtype, spread: float | None) -> Case:
    """Random features, or features that lie `spread` from their orthonormal prototypes."""
    n, k, d = 300, 60, 136
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.linalg.qr(torch.randn(d, d, generator=generator))[0][:k]
    labels = torch.randint(k, (n,), generator=generator)
    features = torch.randn(n, d, generator=generator)
    if spread is not None:
        features = 3 * (prototypes[labels] + spread * features / d**0.5)
    return Case(features.to(DEVICE, dtype), prototypes.to(DEVICE, dtype), labels.to(DEVICE), rule, tau=0.1)


def modelled(case: Case, *, kept: bool, exact_own: bool = True) -> dict[str, torch.Tensor]:
    """The wide path in float64, rounded where the kernels round: log-sum-exps, H, gradients, exp(s) when it is kept."""
    half, upstream = case.features.dtype, loss_upstream(case)
    rows, cols, exclude_own = RULES[case.rule]
    z, w = case.features.double(), case.prototypes.double()
    inv_z, inv_w = 1 / z.norm(dim=1), 1 / w.norm(dim=1)
    logits = (w @ z.T) * inv_w[:, None] * inv_z / case.tau
    own = torch.arange(len(w), device=DEVICE)[:, None] == case.labels
    e = logits.masked_fill(own, -math.inf).exp() if exclude_own else logits.exp()
    factor = torch.zeros_like(e)
    if rows:
        factor += (upstream.row * torch.exp(-e.sum(1).log().float())).double()[:, None]
    if cols:
        factor += (upstream.col * torch.exp(-e.sum(0).log().float())).double()
    if kept:
        rounded = e.to(half).double()
        e = torch.where(own, e, rounded) if exact_own else rounded
    h = (e * factor + own * upstream.pos.double()) * inv_w[:, None] * inv_z
    scale = 2.0 ** (13 - math.ceil(math.log2(h.abs().max()))) if half == torch.float16 else 1.0
    h = (h * scale).to(half).double() / scale
    gradients = {}
    for name, p, x in (("grad_features", h.T @ w, z), ("grad_prototypes", h @ z, w)):
        unit = torch.nn.functional.normalize(x, dim=1)
        gradients[name] = ((p - (p * unit).sum(1, keepdim=True) * unit) / case.tau).to(half)
    return gradients


def tangential_errors(case: Case, actual: dict[str, torch.Tensor]) -> list[float]:
    """Of both gradients, relative to float64's."""
    truth, errors = eager(case, loss_upstream(case), torch.float64), []
    for name, x in (("grad_features", case.features), ("grad_prototypes", case.prototypes)):
        unit = torch.nn.functional.normalize(x.double(), dim=1)
        difference = actual[name].double() - truth[name]
        difference -= (difference * unit).sum(1, keepdim=True) * unit
        errors.append((difference.norm() / truth[name].norm()).item())
    return errors


SPREADS = [None, 0.1, 0.01, 0.001]


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rule", RULES)
def test_modelled_error_is_that_of_recomputing(rule, dtype, spread):
    """Two roundings in place of one: a factor of √2 at most. Eager code in the same type is further from float64."""
    case = drawn(rule, dtype, spread)
    kept, recomputed = (tangential_errors(case, modelled(case, kept=kept)) for kept in (True, False))
    same = tangential_errors(case, eager(case, loss_upstream(case), dtype))
    for error, reference, of_eager in zip(kept, recomputed, same, strict=True):
        assert error <= 1.45 * reference
        assert error < of_eager


@pytest.mark.parametrize("rule", ["ntce", "normface"])
def test_a_rounded_own_entry_would_lose_the_gradient(rule):
    """Why it is taken from the positives."""
    case = drawn(rule, torch.bfloat16, 0.1)
    lost = tangential_errors(case, modelled(case, kept=True, exact_own=False))
    right = tangential_errors(case, modelled(case, kept=True))
    assert all(a > 50 * b for a, b in zip(lost, right, strict=True))


@pytest.mark.parametrize(
    "spread", [None, *(pytest.param(s, marks=pytest.mark.slow) for s in SPREADS[1:-1]), SPREADS[-1]]
)
@pytest.mark.parametrize("rule", quick(RULES, (*TWO, "normface")))
def test_kernels_with_exponentials_rounded_to_bfloat16(rule, spread, keeping):
    case = drawn(rule, torch.bfloat16, spread)
    wide = replace(case, features=case.features.float(), prototypes=case.prototypes.float())
    *statistics, kept = forward(wide)
    grads = backward(wide, (*statistics, kept.bfloat16().float()), loss_upstream(wide))
    actual = {"grad_features": grads[0], "grad_prototypes": grads[1]}
    recomputed = tangential_errors(case, modelled(case, kept=False))
    for error, reference in zip(tangential_errors(case, actual), recomputed, strict=True):
        assert 0.05 * reference < error <= 1.45 * reference  # the rounding shows, and costs no more than that of H


# ---------------------------------------------------------------------------------------------------------------------
# When they are kept


def shape_of(n, k, d, dtype=torch.bfloat16, **changes):
    options = {
        "counts": None, "temperature": None, "inv_temperature": 10.0, "rows": True, "cols": False, "normalize": True,
        "keep_bytes": BUDGET,
    }  # fmt: skip
    tensors = (torch.empty(size, d, dtype=dtype, device="meta") for size in (n, k))
    return _launch.kept_shape(*tensors, **{**options, **changes})


def test_rule(monkeypatch):
    monkeypatch.setattr(_launch, "kernel_dtype", lambda x: x.dtype)  # as on a GPU
    assert shape_of(4096, 1000, 2048) == (1000, 4096)
    assert shape_of(4095, 1000, 2048, rows=False, cols=True) == (1000, 4096)
    nothing = (0, 0)
    assert shape_of(4096, 1000, 2048, torch.float32) == nothing
    assert shape_of(12288, 1000, 511) == nothing
    assert shape_of(12288, 1000, 511, cols=True) == (1000, 12288)
    assert shape_of(4096, 1000, 2048, temperature=torch.tensor(0.1)) == nothing
    assert shape_of(4096, 1000, 2048, normalize=False) == nothing
    assert shape_of(4096, 1000, 2048, inv_temperature=64.0) == (1000, 4096)
    assert shape_of(4096, 1000, 2048, inv_temperature=64.1) == nothing
    assert shape_of(4096, 1000, 2048, torch.float16) == (1000, 4096)
    assert shape_of(4096, 1000, 2048, torch.float16, inv_temperature=10.1) == nothing
    assert shape_of(4096, 1000, 2048, keep_bytes=2 * 4096 * 1000 - 1) == nothing
    assert shape_of(4096, 21841, 2048) == nothing
    assert shape_of(4096, 21841, 2048, counts=torch.empty(21841, device="meta")) == (4096, 4096)
    assert shape_of(0, 1000, 2048) == nothing
    assert shape_of(512, 1000, 2048) == nothing  # launches count, not products


@pytest.mark.parametrize("name", quick(LOSSES, TWO))
def test_public_losses_keep_within_the_budget(name, monkeypatch):
    """Kept or not, twice through one graph; the budget and a learned temperature are heeded."""
    monkeypatch.setattr(_launch, "KEEP_FLOP", 0)
    function, specific = LOSSES[name]
    features, prototypes = (torch.randn(n, 512, device=DEVICE, dtype=torch.float16).requires_grad_() for n in (50, 20))
    labels = torch.randint(0, 20, (50,), device=DEVICE)
    seen = []
    original = prototype_loss.launch_fwd
    monkeypatch.setattr(
        prototype_loss, "launch_fwd", lambda *a, **o: seen.append((out := original(*a, **o)).kept.numel()) or out
    )

    def gradients(temperature=0.1):
        loss = getattr(functional, function)(
            features, prototypes, labels, temperature=temperature, backend="triton", **specific
        )
        first, second = (torch.autograd.grad(loss, (features, prototypes), retain_graph=keep) for keep in (True, False))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        return first

    kept = gradients()
    monkeypatch.setattr("hypercontrast.blockwise._budget_bytes", 0)
    recomputed = gradients()
    monkeypatch.setattr("hypercontrast.blockwise._budget_bytes", BUDGET)
    gradients(torch.tensor(0.1, device=DEVICE, requires_grad=True))
    with torch.no_grad():
        getattr(hc, function)(features, prototypes, labels, backend="triton", **specific)
    assert seen == [20 * 64, 0, 0, 0]
    for a, b in zip(kept, recomputed, strict=True):
        assert (a - b).float().norm() <= 2 * torch.finfo(torch.float16).eps * b.float().norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "cols", "exclude_own"), [(True, False, True), (False, True, False), (True, True, True)]
)
def test_opcheck(rows, cols, exclude_own, monkeypatch):
    monkeypatch.setattr(_launch, "KEEP_FLOP", 0)
    features, prototypes = (torch.randn(n, 512, device=DEVICE, dtype=torch.float16).requires_grad_() for n in (9, 4))
    labels = torch.randint(0, 4, (9,), device=DEVICE)
    arguments = features, prototypes, labels, torch.bincount(labels, minlength=4)
    options = (None, 5.0, -100, rows, cols, exclude_own, True, BUDGET, "triton")
    assert _ops.lse(*(x.detach() for x in arguments), *options)[-1].shape == (4, 64)
    torch.library.opcheck(torch.ops.hypercontrast.lse.default, (*arguments, *options))
