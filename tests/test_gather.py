"""Rows of all ranks with their gradients: uneven and empty ranks, every dtype, and ranks that disagree."""

import pytest
import ranks
import torch
import torch.distributed as dist

from hypercontrast.distributed import gather_with_grad

D = 3
# Even, uneven, an empty rank first, nothing anywhere.
SIZES = {
    1: [(4,)],
    2: [(2, 2), (5, 1), (0, 3), (0, 0)],
    3: [(1, 4, 2), (0, 5, 0)],
    4: [(2, 0, 3, 1)],
}


def whole(sizes, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    return torch.randn(sum(sizes), D, 2, generator=g, dtype=torch.float64).to(dtype)


def rows_of(rank, sizes):
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def check_rows_and_gradients(rank, world):
    for sizes in SIZES[world]:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            everything, mine = whole(sizes, dtype), rows_of(rank, sizes)
            x = everything[mine].clone().requires_grad_()
            gathered = gather_with_grad(x)
            assert gathered.dtype == dtype
            assert torch.equal(gathered, everything)
            # Rank q's upstream gradient is q + 1 times a pattern: the sum tells whether each arrived, and where.
            pattern = torch.arange(everything.numel()).view(everything.shape).to(dtype) % 7
            (grad,) = torch.autograd.grad(gathered, x, (rank + 1) * pattern)
            assert grad.dtype == dtype
            assert torch.equal(grad, (pattern * sum(range(1, world + 1)))[mine])
        labels = torch.arange(sum(sizes))
        assert torch.equal(gather_with_grad(labels[mine]), labels)
        assert torch.equal(gather_with_grad(labels[mine] % 2 == 0), labels % 2 == 0)
        for dtype in (torch.int16, torch.uint32, torch.complex64, torch.float8_e4m3fn):  # not all that Gloo knows
            few = (labels % 5).to(dtype)
            gathered = gather_with_grad(few[mine])
            assert gathered.dtype == dtype
            assert torch.equal(gathered.view(torch.uint8), few.view(torch.uint8))


def check_layouts(rank, world):
    sizes = SIZES[world][0]
    everything, mine = whole(sizes), rows_of(rank, sizes)
    x = everything[mine].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    gathered = gather_with_grad(x)
    assert torch.equal(gathered, everything)
    (grad,) = torch.autograd.grad(gathered.sum(), x)  # an upstream gradient of stride 0
    assert torch.equal(grad, torch.full_like(x, world))


def check_half_precision_sums(rank, world):
    x = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.full((2 * world,), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16)
    (grad,) = torch.autograd.grad(gather_with_grad(x), x, upstream)
    # Rounding after every addition would lose each one: 256 + 1 is 256 in bfloat16, where 258 is a number.
    assert grad.tolist() == [256 + world - 1] * 2


def check_once_differentiable(rank, world):
    x = torch.ones(1 + rank, requires_grad=True)
    (grad,) = torch.autograd.grad(gather_with_grad(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def disagreement(x):
    try:
        gather_with_grad(x)
    except (ValueError, TypeError) as error:
        return str(error)
    return "nothing raised"


def check_disagreements(rank, world):
    last = rank == world - 1
    rule = (
        "every rank must make the same call, got gather_with_grad of torch.float32 [rows, 3] with gradient on rank 0 "
        "and gather_with_grad of {} on rank " + str(world - 1)
    )
    for odd, named in (
        (torch.zeros(2, 4, requires_grad=True), "torch.float32 [rows, 4] with gradient"),
        (torch.zeros(2, requires_grad=True), "torch.float32 [rows] with gradient"),
        (torch.zeros(2, 3).double().requires_grad_(), "torch.float64 [rows, 3] with gradient"),
        (torch.zeros(2, 3), "torch.float32 [rows, 3] without gradient"),
    ):
        x = odd if last else torch.zeros(2, 3, requires_grad=True)
        assert disagreement(x) == rule.format(named)
    with torch.set_grad_enabled(not last):
        assert "without gradient" in disagreement(torch.zeros(2, 3, requires_grad=True))
    for odd, named in (
        (torch.eye(3).to_sparse(), "TypeError: x must be a dense tensor, got torch.sparse_coo"),
        (
            torch.eye(3, device="meta"),
            "ValueError: x must be on a device that the group carries, cpu or cuda, got meta",
        ),
    ):
        said = disagreement(odd if last else torch.eye(3))
        assert said in named if last else said == f"rank {world - 1} could not take part: {named}"
    assert gather_with_grad(torch.zeros(1, 3)).shape == (world, 3)  # and the ranks are still in step


def check_subgroup(rank, world):
    pair = dist.new_group([0, world - 1])
    if rank in (0, world - 1):
        x = torch.full((1 + rank,), float(rank), requires_grad=True)
        gathered = gather_with_grad(x, group=pair)
        assert gathered.tolist() == [0.0] + [world - 1.0] * world
        (grad,) = torch.autograd.grad(gathered.sum(), x)
        assert torch.equal(grad, torch.full_like(x, 2))


CHECKS = {
    1: [check_rows_and_gradients],
    2: [check_rows_and_gradients, check_layouts, check_once_differentiable, check_disagreements],
    3: [check_rows_and_gradients, check_half_precision_sums, check_disagreements, check_subgroup],
    4: [check_rows_and_gradients],
}


def worker(rank, world):
    for check in CHECKS[world]:
        check(rank, world)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_gather_over_ranks(world, tmp_path):
    ranks.spawn(worker, world, tmp_path)


def test_one_process_gets_its_rows_back():
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_with_grad(x) is x
    assert gather_with_grad(x, group=None) is x


def test_bad_arguments():
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        gather_with_grad([1.0])
    with pytest.raises(TypeError, match=r"x must be a dense tensor, got torch\.sparse_coo"):
        gather_with_grad(torch.eye(2).to_sparse())
    with pytest.raises(ValueError, match=r"x must have shape \[n, ...\], got \[\]"):
        gather_with_grad(torch.tensor(1.0))
    with pytest.raises(ValueError, match="group must be 'auto', None or a process group, got 'world'"):
        gather_with_grad(torch.zeros(2), group="world")
