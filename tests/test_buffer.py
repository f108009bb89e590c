"""The negative buffer: one process, Gloo ranks, and a GPU where there is one; in C++ and in Python, which are bitwise equal."""

import itertools
import random
import time

import pytest
import ranks
import torch
import torch.distributed as dist

import hypercontrast as hc
from hypercontrast import _extension, buffer
from hypercontrast.reference import unit_rows

ABSENT = hc.NegativeBuffer.ABSENT
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Of one cast after float32 arithmetic.
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8, torch.float16: 2**-11}
EXTENSION = _extension.load()
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")


@pytest.fixture(params=["python", pytest.param("cpp", marks=needs_extension)])
def operators(request, monkeypatch):
    monkeypatch.setattr(_extension, "load", lambda: EXTENSION if request.param == "cpp" else None)


in_both = pytest.mark.usefixtures("operators")


def samples(n, dim, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(n, dim, generator=g, dtype=torch.float64).to(dtype)
    return features.to(device), torch.randint(-5, 100, (n,), generator=g).to(device)


def unit(features, dtype):
    """What is stored of features: normalised in float32 at least, rounded once."""
    return unit_rows(features.to(torch.promote_types(features.dtype, torch.float32))).to(dtype)


@in_both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
def test_gather_alone(dtype, given):
    """A slot: normalised rows, then absent ones; nothing left of a fuller batch before."""
    b = hc.NegativeBuffer(7, 5, dtype=dtype, group=None)
    b.gather(*samples(5, 7, given, seed=1))
    features, labels = samples(3, 7, given)
    features[1] = 0
    features[2] = 1e-13 if given != torch.float16 else 0
    got = b.gather(features, labels)
    assert got.offset == 0
    assert got.features.dtype == dtype
    assert got.features.shape == (5, 7)
    assert torch.equal(got.features[:3], unit(features, dtype))
    assert not got.features[1:].any()
    assert got.labels.tolist() == [*labels.tolist(), ABSENT, ABSENT]


@in_both
def test_a_row_of_the_least_length_is_zero_and_a_longer_one_a_unit_vector():
    longer = torch.nextafter(torch.tensor(1e-12, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    b = hc.NegativeBuffer(2, 3, dtype=torch.float64, group=None)
    features = torch.tensor([[0, 1e-12], [-1e-12, 0], [0, longer]], dtype=torch.float64)
    assert b.gather(features, torch.arange(3)).features.tolist() == [[0, 0], [0, 0], [0, 1]]


def test_rows_begin_on_16_bytes():
    for dim, dtype in itertools.product((1, 3, 8, 127, 128), DTYPES):
        features = hc.NegativeBuffer(dim, 3, 2, dtype, group=None).queued()[0]
        assert features.data_ptr() % 16 == 0
        assert features.stride(0) * dtype.itemsize % 16 == 0
        assert features.stride(1) == 1


@in_both
def test_without_normalising():
    b = hc.NegativeBuffer(4, 3, dtype=torch.bfloat16, group=None, normalize=False)
    features, labels = samples(3, 4)
    assert torch.equal(b.gather(features, labels).features, features.bfloat16())


@in_both
def test_gathers_strided_and_differentiable_samples():
    b = hc.NegativeBuffer(6, 4, group=None)
    features = torch.randn(6, 8).T[::2].requires_grad_()
    labels = torch.arange(8)[::2]
    got = b.gather(features, labels)
    assert torch.equal(got.features, unit(features.detach().contiguous(), torch.float32))
    assert torch.equal(got.labels, labels)
    assert not got.features.requires_grad


@in_both
def test_ring_keeps_the_newest():
    """Against a list, over pushes shorter than the queue, longer, empty, and of whole gathers."""
    b = hc.NegativeBuffer(3, 4, queue=5, group=None)
    kept = []
    for step, n in enumerate((2, 0, 4, 1, 7, 5, 3, 12)):
        features, labels = samples(n, 3, seed=step)
        if n <= 4:
            b.gather(features, labels)
            b.push()  # the whole slot, absent rows too
            labels = torch.nn.functional.pad(labels, (0, 4 - n), value=ABSENT)
            features = torch.nn.functional.pad(features, (0, 0, 0, 4 - n))
        else:
            b.push(features, labels)
        rows = unit(features, torch.float32).tolist()
        kept = [*kept, *zip(labels.tolist(), rows, strict=True)][-5:]
        got = zip(b.queued()[1].tolist(), b.queued()[0].tolist(), strict=True)
        empty = [(ABSENT, [0.0] * 3)] * (5 - len(kept))
        assert sorted(got) == sorted(kept + empty)


@in_both
def test_no_queue():
    b = hc.NegativeBuffer(3, 4, group=None)
    b.gather(*samples(4, 3))
    b.push()
    b.push(*samples(2, 3))
    assert b.queued()[0].shape == (0, 3)
    assert b.queued()[1].shape == (0,)


@in_both
def test_pushing_leaves_the_gathered_rows():
    b = hc.NegativeBuffer(3, 4, queue=6, group=None)
    got = b.gather(*samples(4, 3))
    before = got.features.clone()
    for seed in range(5):
        b.push(*samples(4, 3, seed=seed))
    assert torch.equal(got.features, before)


@in_both
def test_memory_is_allocated_once():
    b = hc.NegativeBuffer(3, 4, queue=6, group=None)
    places = set()
    for seed in range(4):
        places.add((b.gather(*samples(4, 3, seed=seed)).features.data_ptr(), b.queued()[0].data_ptr()))
        b.push()
    (place,) = places
    assert place[1] - place[0] == 4 * 32  # one piece of memory: the queue begins where the gathered rows end


@in_both
def test_state_survives():
    b = hc.NegativeBuffer(3, 4, queue=5, group=None)
    b.push(*samples(7, 3))
    state = b.state_dict()
    b.push(*samples(2, 3, seed=1))
    later = hc.NegativeBuffer(3, 4, queue=5, group=None)
    later.load_state_dict(state)
    later.push(*samples(2, 3, seed=1))
    for got, want in zip(later.queued(), b.queued(), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match=r"state must hold features \[4, 3\] of torch.float32, got \[5, 3\]"):
        hc.NegativeBuffer(3, 4, queue=4, group=None).load_state_dict(state)
    with pytest.raises(ValueError, match=r"features .* of torch.bfloat16, got"):
        hc.NegativeBuffer(3, 4, queue=5, dtype=torch.bfloat16, group=None).load_state_dict(state)
    with pytest.raises(ValueError, match=r"cursor must lie in \[0, 5\), got 5"):
        later.load_state_dict({**state, "cursor": 5})


BAD_STATES = [
    (None, TypeError, "state must be a dict, got NoneType"),
    ({}, ValueError, "state must hold features, labels and cursor, got nothing"),
    ({"labels": None, "cursor": 0}, ValueError, "state must hold features, labels and cursor, got labels, cursor"),
    ({"cursor": 1.0}, TypeError, "state's cursor must be an integer, got float"),
    ({"cursor": -1}, ValueError, r"state's cursor must lie in \[0, 5\), got -1"),
    ({"features": [[0.0]]}, TypeError, "state's features must be a tensor, got list"),
    ({"labels": torch.zeros(5)}, ValueError, r"labels \[5\] of torch.int64, got \[5\] of torch.float32"),
    ({"labels": torch.zeros(4).long()}, ValueError, r"labels \[5\] of torch.int64, got \[4\] of torch.int64"),
    (
        {"features": torch.full((5, 3), torch.nan)},
        ValueError,
        "state's features must have finite norms, got nan in row 0",
    ),
]


@pytest.mark.parametrize(("state", "error", "message"), BAD_STATES)
def test_a_damaged_state_changes_nothing(state, error, message):
    b = hc.NegativeBuffer(3, 4, queue=5, group=None)
    b.push(*samples(7, 3))
    before = b.state_dict()
    if state and len(state) == 1:  # what is wrong; the rest is new and right
        state = {"features": torch.ones(5, 3), "labels": torch.arange(5), "cursor": 1} | state
    with pytest.raises(error, match=message):
        b.load_state_dict(state)
    after = b.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in ("features", "labels"))
    assert after["cursor"] == before["cursor"]


@in_both
def test_stale_rows_are_an_error_in_the_backward():
    b = hc.NegativeBuffer(3, 4, group=None)
    x = torch.randn(4, 3, requires_grad=True)
    loss = (x * b.gather(*samples(4, 3)).features).sum()
    b.gather(*samples(4, 3, seed=1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_calls_out_of_order():
    b = hc.NegativeBuffer(3, 4, queue=5, group=None)
    with pytest.raises(RuntimeError, match="push without samples needs a gather before it"):
        b.push()
    first = b.gather_async(*samples(4, 3))
    with pytest.raises(RuntimeError, match=r"gather must come after wait\(\) of the gather under way"):
        b.gather_async(*samples(4, 3))
    with pytest.raises(RuntimeError, match=r"push must come after wait\(\)"):
        b.push()
    first.wait()
    with pytest.raises(RuntimeError, match="can be waited for once"):
        first.wait()


BAD_ARGUMENTS = [
    ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
    ({"dim": 2.0}, TypeError, "dim must be an integer, got float"),
    ({"batch": 0}, ValueError, "batch must be at least 1, got 0"),
    ({"queue": -1}, ValueError, "queue must be at least 0, got -1"),
    ({"queue": True}, TypeError, "queue must be an integer, got bool"),
    ({"dtype": torch.int8}, TypeError, "dtype must be float32, bfloat16, float16 or float64, got torch.int8"),
    ({"normalize": 1}, TypeError, "normalize must be True or False, got 1"),
    ({"group": "all"}, ValueError, "group must be 'auto', None or a process group, got 'all'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        hc.NegativeBuffer(**{"dim": 3, "batch": 4, **arguments})


BAD_SAMPLES = {
    "rows": (torch.ones(5, 3), torch.zeros(5, dtype=torch.int64), ValueError, "at most batch = 4 rows, got 5"),
    "dimension": (torch.ones(2, 4), torch.zeros(2, dtype=torch.int64), ValueError, r"dimension 3, got \[2, 4\]"),
    "rank": (torch.ones(3), torch.zeros(3, dtype=torch.int64), ValueError, r"shape \[n, D\], got \[3\]"),
    "dtype": (torch.ones(2, 3).int(), torch.zeros(2, dtype=torch.int64), TypeError, "got torch.int32"),
    "device": (torch.ones(2, 3, device="meta"), torch.zeros(2).long(), ValueError, "device cpu, got meta"),
    "none": (None, torch.zeros(2).long(), TypeError, "features must be a tensor, got NoneType"),
    "infinite": (
        torch.tensor([[1, 1, 1], [1, torch.inf, 1]]),
        torch.zeros(2).long(),
        ValueError,
        "finite norms, got inf in row 1",
    ),
    "label dtype": (torch.ones(2, 3), torch.zeros(2), TypeError, "labels must be int64, got torch.float32"),
    "label shape": (torch.ones(2, 3), torch.zeros(3).long(), ValueError, r"labels must have shape \[2\]"),
    "absent": (torch.ones(2, 3), torch.tensor([0, ABSENT]), ValueError, "not be NegativeBuffer.ABSENT, .* row 1"),
}


@in_both
@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_bad_samples(name):
    features, labels, error, message = BAD_SAMPLES[name]
    b = hc.NegativeBuffer(3, 4, queue=5, group=None)
    b.gather(*samples(4, 3))
    before = b._gathered.bytes.clone()
    with pytest.raises(error, match=message):
        b.gather(features, labels)
    if name != "rows":
        with pytest.raises(error, match=message):
            b.push(features, labels)
    assert torch.equal(b._gathered.bytes, before)
    assert (b.queued()[1] == ABSENT).all()


@in_both
def test_overflow_of_stored_values():
    b = hc.NegativeBuffer(2, 4, dtype=torch.float16, group=None, normalize=False)
    with pytest.raises(ValueError, match="finite norms, got inf in row 0"):
        b.gather(torch.tensor([[70000.0, 1.0]]), torch.tensor([1]))


def make_pair(*arguments, **options):
    """The same buffer twice, in Python and in C++."""
    pair = [hc.NegativeBuffer(*arguments, **options) for _ in range(2)]
    pair[0]._operators, pair[1]._operators = buffer._Twin, EXTENSION
    return pair


def assert_bitwise_equal(pair):
    """The whole memory, padding and headers included; headers differ in the signature where there is one."""
    ours, theirs = pair
    assert torch.equal(ours._gathered.bytes, theirs._gathered.bytes)
    assert torch.equal(ours._ring.bytes, theirs._ring.bytes)
    assert ours._cursor == theirs._cursor


@needs_extension
def test_cpp_and_python_are_bitwise_equal():
    draw = random.Random(0)
    for trial in range(150):
        dim, batch, queue = draw.choice((1, 3, 8, 33, 128)), draw.randint(1, 40), draw.randint(0, 50)
        pair = make_pair(dim, batch, queue, draw.choice(DTYPES), group=None, normalize=draw.random() < 0.7)
        for call in range(8):
            push_given = draw.random() < 0.3
            n = draw.randint(0, 2 * queue + 1 if push_given else batch)
            features, labels = samples(n, dim, draw.choice(DTYPES), seed=8 * trial + call)
            if n and draw.random() < 0.3:
                features[draw.randrange(n)] *= draw.choice((0, 1e-13, 1e-12))
            if draw.random() < 0.3:
                features, labels = features.T.contiguous().T, torch.stack([labels, labels], 1)[:, 0]
            for b in pair:
                if push_given:
                    b.push(features, labels)
                else:
                    b.gather(features, labels)
                    if call % 2:
                        b.push()
            assert_bitwise_equal(pair)


# ---- several ranks


def attempt(errors, what, call, *, expected):
    """Run a call that must raise on this rank, within seconds."""
    started = time.monotonic()
    try:
        call()
    except (ValueError, TypeError) as error:
        if type(error) is not expected[0] or expected[1] not in str(error):
            errors.append(f"{what}: {error!r} instead of {expected}")
    else:
        errors.append(f"{what}: nothing raised")
    if time.monotonic() - started > 5:
        errors.append(f"{what}: took {time.monotonic() - started:.0f} s")


def check_gathers(rank, world, errors):
    """Uneven and empty ranks equal a concatenation; the queue holds all ranks' slots; C++ equals Python."""
    sizes = [[(5 * r + 3 * step) % 6 for r in range(world)] for step in range(4)] + [[0] * world, [6] * world]
    for dtype, given in zip(DTYPES, (torch.bfloat16, torch.float64, torch.float32, torch.float32), strict=True):
        buffers = [hc.NegativeBuffer(7, 6, 6 * world + 4, dtype)]
        if EXTENSION is not None:
            buffers.append(hc.NegativeBuffer(7, 6, 6 * world + 4, dtype))
            buffers[0]._operators, buffers[1]._operators = buffer._Twin, EXTENSION
        for step, ns in enumerate(sizes):
            all_ranks = [samples(n, 7, given, seed=world * step + r) for r, n in enumerate(ns)]
            want_features, want_labels = torch.zeros(6 * world, 7, dtype=dtype), torch.full((6 * world,), ABSENT)
            for r, (features, labels) in enumerate(all_ranks):
                want_features[6 * r : 6 * r + ns[r]] = unit(features, dtype)
                want_labels[6 * r : 6 * r + ns[r]] = labels
            for b in buffers:
                got = b.gather(*all_ranks[rank]) if step % 2 else b.gather_async(*all_ranks[rank]).wait()
                b.push()
                same = torch.equal(got.features, want_features) and torch.equal(got.labels, want_labels)
                if not same or got.offset != 6 * rank:
                    errors.append(f"{dtype} step {step}: not the concatenation on rank {rank}")
                newest = {(y, *z) for y, z in zip(want_labels.tolist(), want_features.tolist(), strict=True)}
                queue = {(y, *z) for z, y in zip(*(x.tolist() for x in b.queued()), strict=True)}
                if not newest <= queue:
                    errors.append(f"{dtype} step {step}: the queue misses samples on rank {rank}")
            for whole in ("_gathered", "_ring"):
                rows = [(getattr(b, whole).features, getattr(b, whole).tails[:, 0]) for b in buffers]
                if not all(torch.equal(x, y) for x, y in zip(rows[0], rows[-1], strict=True)):
                    errors.append(f"{dtype} step {step}: C++ and Python differ on rank {rank}")


def check_disagreements(rank, world, errors):
    """One rank differs, has bad arguments or bad samples: an error on every rank, and the next call works."""
    last = world - 1
    base = {"dim": 3, "batch": 4, "queue": 5, "dtype": torch.float32, "normalize": True}
    for name, value in {"dim": 4, "batch": 5, "queue": 6, "dtype": torch.float16, "normalize": False}.items():
        arguments = {**base, name: value} if rank == last else base
        listed = ", ".join(map(str, [base[name]] * last + [value]))
        expected = (ValueError, f"{name} must be the same on every rank, got {listed}")
        attempt(errors, name, lambda arguments=arguments: hc.NegativeBuffer(**arguments), expected=expected)
    mine = (ValueError, "batch must be at least 1, got 0")
    theirs = (ValueError, "rank 0 could not make its NegativeBuffer: batch must be at least 1, got 0")
    arguments = {**base, "batch": 0 if rank == 0 else 4}
    attempt(errors, "bad batch", lambda: hc.NegativeBuffer(**arguments), expected=theirs if rank else mine)

    for operators in filter(None, (buffer._Twin, EXTENSION)):
        b = hc.NegativeBuffer(**base)
        b._operators = operators
        for name, (features, labels, error, _) in BAD_SAMPLES.items():
            given = (features, labels) if rank == last else samples(2, 3)
            expected = (error, "") if rank == last else (ValueError, f"rank {last} could not take part")
            attempt(errors, name, lambda b=b, given=given: b.gather(*given), expected=expected)
        if b.gather(*samples(rank, 3)).labels.ne(ABSENT).sum() != sum(range(world)):
            errors.append(f"a gather after errors fails on rank {rank}")

    pair = [hc.NegativeBuffer(**base) for _ in range(2)]
    expected = (ValueError, "every rank must make the same call, got gather, call 1 of NegativeBuffer")
    attempt(errors, "order", lambda: pair[rank == 0].gather(*samples(2, 3)), expected=expected)


def check_destroyed_group(rank, world, errors):
    group = dist.new_group(list(range(world)))
    b = hc.NegativeBuffer(3, 4, group=group)
    dist.destroy_process_group(group)
    expected = (ValueError, "group must exist, got one that destroy_process_group has ended")
    attempt(errors, "destroyed", lambda: b.gather(*samples(2, 3)), expected=expected)
    attempt(errors, "made for a destroyed one", lambda: hc.NegativeBuffer(3, 4, group=group), expected=expected)


def worker(rank, world):
    errors = []
    check_gathers(rank, world, errors)
    check_disagreements(rank, world, errors)
    check_destroyed_group(rank, world, errors)
    return errors


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks(world, tmp_path):
    assert ranks.spawn(worker, world, tmp_path) == [[]] * world


# ---- on a GPU


def tolerance(dtype, given):
    """Sums come in another order, in float32 unless the samples are float64."""
    bound = max(ROUNDING[dtype], ROUNDING[torch.promote_types(given, torch.float32)])
    return {"atol": bound, "rtol": bound}


@needs_gpu
@in_both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
def test_gpu_packs_as_the_cpu_does(dtype, given):
    """Widths around a warp's four-element steps; samples aligned, unaligned and strided both ways."""
    for dim in (1, 3, 4, 33, 127, 128, 129, 513, 2048):
        whole, labels = samples(40, 2 * dim + 4, given)
        whole[3] = 0
        b = hc.NegativeBuffer(dim, 50, 30, dtype, device="cuda", group=None)
        for view in (whole[:, :dim], whole[:, 1 : dim + 1], whole[:, : 2 * dim : 2], whole[::2, 4 : 4 + dim]):
            y = labels[: len(view)]
            got = b.gather(view.cuda() if view.is_contiguous() else lay_out_on_gpu(view), y.cuda())
            want = torch.nn.functional.pad(unit(view, dtype), (0, 0, 0, 50 - len(view)))
            torch.testing.assert_close(got.features.cpu(), want, **tolerance(dtype, given))
            assert got.labels.tolist() == [*y.tolist(), *[ABSENT] * (50 - len(view))]
        b.push()
        assert torch.equal(b.queued()[0], got.features[-30:])
        assert torch.equal(b.queued()[1], got.labels[-30:])


def lay_out_on_gpu(view):
    """The same strides and offset on the GPU."""
    whole = torch.empty(view.untyped_storage().size() // view.element_size(), dtype=view.dtype, device="cuda")
    return whole.as_strided(view.size(), view.stride(), view.storage_offset()).copy_(view)


@needs_gpu
@in_both
def test_gpu_waits_for_streams_not_for_the_host():
    """No call stalls the host; the samples may be in the making, and the rows are read right after."""
    b = hc.NegativeBuffer(64, 512, 1000, device="cuda", group=None)
    slow = torch.randn(4096, 4096, device="cuda")
    features, labels = samples(512, 64, device="cuda")
    b.gather(features, labels)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            noise = (slow @ slow @ slow)[:512, :64]
            pending = b.gather_async(features + 0 * noise, labels)
            del noise
            got = pending.wait().features.clone()
            b.push()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got, unit_rows(features))
    assert torch.equal(b.queued()[0][48:560], got)  # five times 512 rows into a ring of 1000


@needs_gpu
@in_both
def test_stale_rows_are_an_error_in_the_backward_on_a_gpu():
    b = hc.NegativeBuffer(3, 4, device="cuda", group=None)
    x = torch.randn(4, 3, device="cuda", requires_grad=True)
    loss = (x * b.gather(*samples(4, 3, device="cuda")).features).sum()
    b.gather(*samples(4, 3, device="cuda", seed=1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_gpu
@in_both
def test_over_nccl(tmp_path, monkeypatch):
    """A group of one rank, which the buffer is made to treat as several: an error shows in a later call."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        monkeypatch.setattr(buffer, "resolve_group", lambda group: dist.group.WORLD)
        b = hc.NegativeBuffer(5, 6, 4, torch.bfloat16, device="cuda")
        features, labels = samples(4, 5)
        got = b.gather(features.cuda(), labels.cuda())
        want = unit(features, torch.bfloat16)
        torch.testing.assert_close(got.features[:4].cpu(), want, **tolerance(want.dtype, features.dtype))
        assert got.labels.tolist() == [*labels.tolist(), ABSENT, ABSENT]
        with pytest.raises(ValueError, match="at most batch = 6 rows, got 7"):
            b.gather(*samples(7, 5, device="cuda"))
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match="rank 0 could not gather"):
            b.gather(features.cuda(), labels.cuda())
    finally:
        dist.destroy_process_group()


def gpu_worker(rank, world):
    errors = []
    sizes = [(2 * r + 1) % 4 for r in range(world)]
    for operators in filter(None, (buffer._Twin, EXTENSION)):
        b = hc.NegativeBuffer(7, 4, 8, device="cuda:0")
        b._operators = operators
        for step in range(3):
            all_ranks = [samples(n, 7, seed=world * step + r) for r, n in enumerate(sizes)]
            got = b.gather(*(x.cuda() for x in all_ranks[rank]))
            b.push()
            for r, (features, labels) in enumerate(all_ranks):
                rows = slice(4 * r, 4 * r + sizes[r])
                same = torch.allclose(got.features[rows].cpu(), unit_rows(features), atol=1e-6)
                if not same or not torch.equal(got.labels[rows].cpu(), labels):
                    errors.append(f"step {step}: not the concatenation on rank {rank}")
            if got.labels.ne(ABSENT).sum() != sum(sizes):
                errors.append(f"step {step}: rows that no rank sent on rank {rank}")
        given = samples(9 if rank == 0 else 2, 7, device="cuda")
        expected = (ValueError, "at most batch = 4" if rank == 0 else "rank 0 could not take part")
        attempt(errors, "rows", lambda b=b, given=given: b.gather(*given), expected=expected)
    return errors


@needs_gpu
def test_ranks_share_a_gpu(tmp_path):
    """Gloo carries the rows of two ranks on one GPU."""
    assert ranks.spawn(gpu_worker, 2, tmp_path) == [[], []]


@needs_gpu
@needs_extension
@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """Samples and memory both; rows near the end against float64."""
    n, dim = 2**31 // 128 + 1000, 128
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    features = torch.randn(n, dim, device="cuda", dtype=torch.bfloat16)
    b = hc.NegativeBuffer(dim, n, dtype=torch.bfloat16, device="cuda", group=None)
    got = b.gather(features, torch.arange(n, device="cuda"))
    rows = torch.tensor([0, 2**24 - 1, 2**24, n - 1], device="cuda")
    want = unit_rows(features[rows].double()).to(torch.bfloat16)
    torch.testing.assert_close(got.features[rows], want, **tolerance(want.dtype, features.dtype))
    assert torch.equal(got.labels[rows], rows)


@pytest.mark.parametrize("queue", [0, 3])
def test_a_state_is_a_copy_and_comes_back(queue):
    buffer, labels = hc.NegativeBuffer(4, 2, queue=queue, group=None), torch.arange(2)
    buffer.push(torch.randn(2, 4), labels)
    state = buffer.state_dict()
    before = [x.clone() for x in (state["features"], state["labels"])]
    buffer.push(torch.randn(2, 4), labels + 5)
    assert all(map(torch.equal, before, (state["features"], state["labels"])))
    buffer.load_state_dict(state)
    assert all(map(torch.equal, before, buffer.queued()))
