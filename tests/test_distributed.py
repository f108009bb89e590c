"""The loss over a global batch: Gloo ranks with different, uneven and even empty batches equal one process."""

import itertools
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import LOSSES

import hypercontrast as hc
from hypercontrast import functional

K, D = 6, 5
# Uneven on purpose; a rank holds nothing in one case. Rank r's labels favour class r.
SPLITS = {2: [(9, 4), (5, 0)], 3: [(7, 2, 5), (3, 8, 0)], 4: [(4, 1, 6, 3), (0, 5, 2, 7)]}
CASES = list(itertools.product(LOSSES, ["mean", "sum", "none"], [0.1, 0.01]))
SUPCON = list(
    itertools.product(
        ["rows", "views", "ntxent", "queue", "buffer"], ["out", "in"], ["mean", "sum", "none"], [0.1, 0.01]
    )
)


def make_batch(sizes):
    g = torch.Generator().manual_seed(1)
    n = sum(sizes)
    features = torch.randn(n, D, generator=g, dtype=torch.float64)
    labels = torch.cat([torch.randint(r, r + 3, (size,), generator=g) for r, size in enumerate(sizes)])
    labels[::5] = -100
    upstream = torch.rand(n, generator=g, dtype=torch.float64)
    return features, labels, upstream, torch.randn(K, D, generator=g, dtype=torch.float64)


def run_case(case, features, labels, upstream, start, group, ranks):
    """Loss and gradients of a linear layer below and the prototypes, as DDP would average them."""
    name, reduction, tau = case
    function, specific = LOSSES[name]
    torch.manual_seed(0)
    layer, prototypes = torch.nn.Linear(D, D).double(), start.clone().requires_grad_()
    weight = torch.linspace(0.5, 1.5, K).double()
    options = {"temperature": tau, "weight": weight, "reduction": reduction, "group": group}
    loss = getattr(functional, function)(layer(features), prototypes, labels, **options, **specific)
    # With "none" every rank averages as it likes; DDP then averages over ranks, so ranks·Σ stands for the global sum.
    objective = ranks * (loss * upstream).sum() if reduction == "none" else loss
    grads = torch.autograd.grad(objective, (*layer.parameters(), prototypes))
    return loss.detach(), grads


def run_supcon(case, features, labels, upstream, past, group, ranks):
    """The same of SupCon, for its features and a learned temperature; `past` is what every rank holds in its queue."""
    form, variant, reduction, tau = case
    torch.manual_seed(0)
    layer = torch.nn.Linear(D, 2 * D if form in ("views", "ntxent") else D).double()
    tau = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    options = {"temperature": tau, "variant": variant, "reduction": reduction, "group": group}
    if form == "queue":
        options["queue"] = past
    if form == "buffer":
        options["queue"] = hc.NegativeBuffer(D, 16, queue=len(past[0]), dtype=torch.float64, group=group)
        options["queue"].push(*past)
    z = layer(features)
    in_pairs = form in ("views", "ntxent")
    loss = hc.supcon_loss(z.view(-1, 2, D) if in_pairs else z, None if form == "ntxent" else labels, **options)
    weights = upstream[:, None] if in_pairs else upstream
    objective = ranks * (loss * weights).sum() if reduction == "none" else loss
    return loss.detach(), torch.autograd.grad(objective, (*layer.parameters(), tau))


def relative_error(got, want):
    """Largest difference, in units of the largest value (at least 1)."""
    return ((got - want).abs().max() / want.abs().max().clamp(min=1)).item() if want.numel() else 0.0


def worker(rank, world, path, errors):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(path, world), rank=rank, world_size=world)
    try:
        for sizes in SPLITS[world]:
            features, labels, upstream, start = make_batch(sizes)
            mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            past = (
                torch.randn(7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
                labels[:1].repeat(7),
            )
            runs = [(run_case, case, start) for case in CASES] + [(run_supcon, case, past) for case in SUPCON]
            for run, case, other in runs:
                want_loss, want = run(case, features, labels, upstream, other, None, 1)
                loss, grads = run(case, features[mine], labels[mine], upstream[mine], other, "auto", world)
                for grad in grads:
                    dist.all_reduce(grad)
                got = [loss, *(grad / world for grad in grads)]
                want = [want_loss[mine] if "none" in case else want_loss, *want]
                worst = max(relative_error(a, b) for a, b in zip(got, want, strict=True))
                if not worst <= 1e-12:
                    errors.append(f"{case} over {sizes}, rank {rank}: off by {worst:.3g}")
        means = hc.ClassMeans(K, D)
        features, labels, _, start = make_batch(SPLITS[world][0])
        mine = slice(sum(SPLITS[world][0][:rank]), sum(SPLITS[world][0][: rank + 1]))
        hc.ntce_loss(features[mine], start, labels[mine], class_means=means)
        means.all_reduce()
        whole = hc.ClassMeans(K, D)
        whole.update(features, labels)
        if not torch.allclose(means.prototypes(), whole.prototypes(), atol=1e-6):
            errors.append(f"class means differ on rank {rank}")
        errors.append("finished")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_equal_one_process(world, tmp_path):
    with mp.get_context("spawn").Manager() as manager:
        errors = manager.list()
        context = mp.start_processes(
            worker, (world, str(tmp_path / "store"), errors), nprocs=world, start_method="spawn", join=False
        )
        deadline = time.monotonic() + 120
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks hang"
        assert list(errors) == ["finished"] * world


def test_default_group_of_one_is_no_group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        features, labels, _, start = make_batch((5,))
        alone = hc.nonl_loss(features, start, labels, group=None)
        assert torch.equal(hc.nonl_loss(features, start, labels), alone)
    finally:
        dist.destroy_process_group()
