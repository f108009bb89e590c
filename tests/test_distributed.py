"""The loss over a global batch: Gloo ranks with different, uneven and even empty batches equal one process."""

import itertools

import pytest
import ranks
import torch
import torch.distributed as dist
from oracle import LOSSES

import hypercontrast as hc
from hypercontrast import _agreement, functional
from hypercontrast.distributed import all_sum

K, D = 6, 5
# Uneven on purpose; a rank holds nothing in one case. Rank r's labels favour class r.
SPLITS = {1: [(9,)], 2: [(9, 4), (5, 0)], 3: [(7, 2, 5), (3, 8, 0)], 4: [(4, 1, 6, 3), (0, 5, 2, 7)]}
CASES = list(itertools.product(LOSSES, ["mean", "sum", "none"], [0.1, 0.01]))
SUPCON = list(
    itertools.product(
        ["rows", "views", "ntxent", "queue", "buffer"], ["out", "in"], ["mean", "sum", "none"], [0.1, 0.01]
    )
)


def make_batch(sizes, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    n = sum(sizes)
    features = torch.randn(n, D, generator=g, dtype=torch.float64)
    labels = torch.cat([torch.randint(r, r + 3, (size,), generator=g) for r, size in enumerate(sizes)])
    labels[::5] = -100
    upstream = torch.rand(n, generator=g, dtype=torch.float64)
    prototypes = torch.randn(K, D, generator=g, dtype=torch.float64)
    return features.to(dtype), labels, upstream.to(dtype), prototypes.to(dtype)


def run_case(case, features, labels, upstream, start, group, world):
    """Loss and gradients of a linear layer below and the prototypes, as DDP would average them."""
    name, reduction, tau = case
    function, specific = LOSSES[name]
    torch.manual_seed(0)
    layer, prototypes = torch.nn.Linear(D, D).to(start.dtype), start.clone().requires_grad_()
    weight = torch.linspace(0.5, 1.5, K).to(start.dtype)
    options = {"temperature": tau, "weight": weight, "reduction": reduction, "group": group}
    loss = getattr(functional, function)(layer(features), prototypes, labels, **options, **specific)
    # With "none" every rank averages as it likes; DDP then averages over ranks, so world·Σ stands for the global sum.
    objective = world * (loss * upstream).sum() if reduction == "none" else loss
    grads = torch.autograd.grad(objective, (*layer.parameters(), prototypes))
    return loss.detach(), grads


def run_supcon(case, features, labels, upstream, past, group, world):
    """The same of SupCon, for its features and a learned temperature; `past` is what every rank holds in its queue."""
    form, variant, reduction, tau = case
    torch.manual_seed(0)
    layer = torch.nn.Linear(D, 2 * D if form in ("views", "ntxent") else D).to(features.dtype)
    tau = torch.tensor(tau, dtype=features.dtype, requires_grad=True)
    options = {"temperature": tau, "variant": variant, "reduction": reduction, "group": group}
    if form == "queue":
        options["queue"] = past
    if form == "buffer":
        options["queue"] = hc.NegativeBuffer(D, 16, queue=len(past[0]), dtype=features.dtype, group=group)
        options["queue"].push(*past)
    z = layer(features)
    in_pairs = form in ("views", "ntxent")
    loss = hc.supcon_loss(z.view(-1, 2, D) if in_pairs else z, None if form == "ntxent" else labels, **options)
    weights = upstream[:, None] if in_pairs else upstream
    objective = world * (loss * weights).sum() if reduction == "none" else loss
    return loss.detach(), torch.autograd.grad(objective, (*layer.parameters(), tau))


def relative_error(got, want):
    """Largest difference, in units of the largest value (at least 1); infinite for NaN, which `max` would pass over."""
    if not want.numel():
        return 0.0
    return ((got - want).abs().max() / want.abs().max().clamp(min=1)).nan_to_num(nan=torch.inf).item()


def errors_over_ranks(rank, world, dtype):
    """Every case's error against one process, worst of loss and gradients."""
    errors = {}
    for sizes in SPLITS[world]:
        features, labels, upstream, start = make_batch(sizes, dtype)
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        past = (torch.randn(7, D, generator=torch.Generator().manual_seed(2)).to(dtype), labels[:1].repeat(7))
        runs = [(run_case, case, start) for case in CASES] + [(run_supcon, case, past) for case in SUPCON]
        for run, case, other in runs:
            want_loss, want = run(case, features, labels, upstream, other, None, 1)
            loss, grads = run(case, features[mine], labels[mine], upstream[mine], other, "auto", world)
            for grad in grads:
                dist.all_reduce(grad)
            got = [loss, *(grad / world for grad in grads)]
            want = [want_loss[mine] if "none" in case else want_loss, *want]
            errors[sizes, case] = max(relative_error(a, b) for a, b in zip(got, want, strict=True))
    return errors


@pytest.mark.parametrize(
    ("dtype", "worlds"),
    [
        (torch.float64, (2, 3)),
        (torch.float32, (3,)),
        pytest.param(torch.float64, tuple(SPLITS), marks=pytest.mark.slow),
        pytest.param(torch.float32, tuple(SPLITS), marks=pytest.mark.slow),
    ],
)
def test_ranks_equal_one_process(dtype, worlds, tmp_path, figure):
    """To 1e-12 in float64. In float32 logits of up to 1/τ are rounded, and so are the rows that a buffer sends."""
    target = 1e-12 if dtype == torch.float64 else 1e-6
    errors = {}
    for world in worlds:
        (tmp_path / str(world)).mkdir()
        for of_rank in ranks.spawn(errors_over_ranks, world, tmp_path / str(world), dtype):
            for case, error in of_rank.items():
                errors[case] = max(error, errors.get(case, 0))
    for (sizes, case), error in errors.items():
        tau = case[-1]
        roundings = 3 if case[0] == "buffer" else 2  # of logits: the rows that a buffer sends have one more
        limit = target if dtype == torch.float64 else roundings * torch.finfo(dtype).eps / tau
        assert error <= limit, f"{case} over {sizes}: off by {error:.3g}"
    within = sum(error <= target for error in errors.values())
    worst = max(errors, key=errors.get)
    name, of = str(dtype).removeprefix("torch."), "-".join(map(str, sorted({worlds[0], worlds[-1]})))
    figure(
        "R6",
        f"{name}: {within} of {len(errors)} losses over {of} ranks within {target:g} of one process, gradients too;"
        f" worst {errors[worst]:.1e} ({worst[1][0]}, temperature {worst[1][-1]})",
    )


def errors_over_a_pair(rank, world):
    """Of ranks 1 and 2 of three, which have other numbers in their group: worst error against one process."""
    pair, errors = dist.new_group([1, 2]), {}
    summed = torch.ones(2)
    if rank:
        assert all_sum(summed, pair).tolist() == [2, 2]
        assert summed.tolist() == [1, 1]
        features, labels, upstream, start = make_batch((9, 4))
        mine = slice(0, 9) if rank == 1 else slice(9, 13)
        past = (torch.randn(7, D, generator=torch.Generator().manual_seed(2)).double(), labels[:1].repeat(7))
        # By plain sums, and by sums in units of the largest term; of one class, which has no negatives, no terms at all.
        cases = [
            (run_case, (name, reduction, tau), y, start)
            for name, reduction in (("nonl", "mean"), ("nonl", "none"), ("nonl-both", "mean"))
            for tau in (0.1, 1e-4)
            for y in (labels, torch.full_like(labels, 2))
        ]
        cases += [(run_supcon, (form, "out", "mean", 0.1), labels, past) for form in ("rows", "buffer")]
        for run, case, y, other in cases:
            _, want = run(case, features, y, upstream, other, None, 1)
            _, grads = run(case, features[mine], y[mine], upstream[mine], other, pair, 2)
            for grad in grads:
                dist.all_reduce(grad, group=pair)
            error = max(relative_error(grad / 2, b) for grad, b in zip(grads, want, strict=True))
            errors[case, len(y.unique())] = error
        # Rows of another dtype than the features are rounded once.
        z = features[mine].clone().requires_grad_()
        rounded = hc.supcon_loss(
            z, labels[mine], queue=hc.NegativeBuffer(D, 16, dtype=torch.float32, group=pair), group=pair
        )
        exact = hc.supcon_loss(features, labels, group=None)
        assert rounded.dtype == torch.float64
        assert 0 < (rounded - exact).abs() < 1e-5
        (gradient,) = torch.autograd.grad(rounded, z)
        assert gradient.dtype == torch.float64
    # Buffers that only the pair has made set nobody apart.
    assert hc.NegativeBuffer(D, 2).gather(torch.ones(1, D), torch.tensor([rank])).labels[::2].tolist() == [0, 1, 2]
    return errors


def test_a_group_whose_ranks_have_other_numbers(tmp_path):
    errors = ranks.spawn(errors_over_a_pair, 3, tmp_path)
    assert [len(of_rank) for of_rank in errors] == [0, 14, 14]
    for of_rank in errors:
        for (case, classes), error in of_rank.items():
            assert error <= (1e-12 if case[-1] == 0.1 else 1e-9), f"{case}, {classes} classes: off by {error:.3g}"


def class_means(rank, world):
    sizes = SPLITS[world][0]
    features, labels, _, start = make_batch(sizes, torch.float64)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    means, whole = hc.ClassMeans(K, D), hc.ClassMeans(K, D)
    hc.ntce_loss(features[mine], start, labels[mine], class_means=means)
    means.all_reduce()
    whole.update(features, labels)
    assert torch.allclose(means.prototypes(), whole.prototypes(), atol=1e-6)
    means.all_reduce()  # with nothing new
    means.update(features[mine], labels[mine])
    restored = hc.ClassMeans(K, D)
    restored.load_state_dict(means.state_dict())
    whole.update(features, labels)
    for resumed in (means, restored):
        resumed.all_reduce()
        assert torch.allclose(resumed.sums, whole.sums, atol=1e-12)
        assert torch.equal(resumed.counts, whole.counts)
    means.reset()
    means.update(features[mine], labels[mine])
    means.all_reduce()
    assert torch.allclose(2 * means.sums, whole.sums, atol=1e-12)
    average_of_running_means(rank, world)


def average_of_running_means(rank, world):
    """Class 0 is seen by all ranks, class 1 by the last alone; each weighs later as if one process had averaged."""
    first, later = torch.eye(3)[:2], torch.eye(3)[2:]
    classes = [0, 1] if rank == world - 1 else [0]
    means, alone = (hc.ClassMeans(2, 3, mode="ema", momentum=0.75) for _ in range(2))
    means.update(first[: len(classes)], torch.tensor(classes))
    alone.update(first, torch.tensor([0, 1]))
    for total in ([world, 1], [world, 1]):
        means.all_reduce()
        assert torch.equal(means.sums, alone.sums)
        assert means.counts.tolist() == total
    for each in (means, alone):
        each.update(later, torch.tensor([0]))
    means.all_reduce()
    assert torch.allclose(means.sums, alone.sums, atol=1e-12)
    assert means.counts.tolist() == [2 * world, 1]


def test_class_means_over_ranks(tmp_path):
    ranks.spawn(class_means, 3, tmp_path)


def twice(rank, world):
    """The gradient may be asked for with a graph; going through that is refused, as it is in one process."""
    features, labels, _, _ = make_batch((4, 3))
    z = features.split([4, 3])[rank].requires_grad_()
    (once,) = torch.autograd.grad(hc.supcon_loss(z, labels.split([4, 3])[rank]), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives of these losses need backend='reference'"):
        torch.autograd.grad(once.sum(), z)


def test_a_gradient_of_pairs_has_none_itself(tmp_path):
    ranks.spawn(twice, 2, tmp_path)


def test_default_group_of_one_is_no_group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        features, labels, _, start = make_batch((5,))
        alone = hc.nonl_loss(features, start, labels, group=None)
        assert torch.equal(hc.nonl_loss(features, start, labels), alone)
        hc.nonl_loss(features, start, labels, backend="reference")  # which takes no group
    finally:
        dist.destroy_process_group()


def test_headers_on_a_gpu_are_awaited_on_its_own_stream(monkeypatch):
    """Whatever device is the current one: on an idle one they would be read before they have arrived."""
    empty, watched = torch.empty, []

    class Event:
        def record(self, stream=None):
            watched.append(stream)

        def query(self):
            return True

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **options: empty(*size, **options))
    watch, read = _agreement.HeaderWatch(), []
    watch.send(torch.tensor([1, 2]), read.append)
    watch.check_arrived()
    assert [x.tolist() for x in read] == [[1, 2]]
    assert watched == ["stream of cpu"]
