"""The inner loop of the CPU losses, compiled and as operators: both against float64, and against each other in a loss."""

import pytest
import torch
from oracle import LOSSES

import hypercontrast as hc
from hypercontrast import _extension, tiles

EXTENSION = _extension.quietly()
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")
SHAPES = [(1, 1), (3, 7), (65, 130), (200, 1000), (2, 4096), (1000, 3)]


@pytest.fixture(params=["operators", pytest.param("compiled", marks=needs_extension)])
def _way(request, monkeypatch):
    monkeypatch.setattr(_extension, "quietly", lambda: EXTENSION if request.param == "compiled" else None)


@pytest.fixture(params=[1, 3])
def _threads(request):
    """conftest.py's one, and several: each sums up rows of its own."""
    torch.set_num_threads(request.param)


def relative(got, want):
    return ((got.double() - want) / want).abs().max().item()


def some_tile(rows, columns):
    g = torch.Generator().manual_seed(rows * columns)
    tile = 10 * torch.randn(rows, columns, generator=g)
    factors = torch.rand(rows, generator=g) + 0.5
    own = torch.randint(-1, columns, (rows,), generator=g)
    return tile, factors, own


@pytest.mark.usefixtures("_way", "_threads")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("exclude_own", [False, True])
def test_exponentials_and_their_sums(shape, exclude_own):
    tile, factors, own = some_tile(*shape)
    logits = tile.double() * factors.double()[:, None]
    want = logits.exp()
    rows = (own >= 0).nonzero()[:, 0]
    if exclude_own:
        want[rows, own[rows]] = 0
    positives = torch.full((shape[0],), 7.0)
    row_sums, column_sums = torch.ones(shape[0], dtype=torch.float64), torch.ones(shape[1], dtype=torch.float64)
    tiles.exponentiate_(tile, factors, own, positives, exclude_own, row_sums, column_sums)
    # A logit of 30 that is off by half a last place moves its exponential by 1e-6.
    torch.testing.assert_close(tile.double(), want, rtol=5e-6, atol=0)
    torch.testing.assert_close(row_sums, 1 + want.sum(1), rtol=5e-6, atol=0)
    torch.testing.assert_close(column_sums, 1 + want.sum(0), rtol=5e-6, atol=0)
    torch.testing.assert_close(positives[rows].double(), logits[rows, own[rows]], rtol=2e-7, atol=0)
    assert (positives[own < 0] == 7).all()


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("transposed", ["neither", "left", "right"])
@pytest.mark.parametrize("add", [False, True])
def test_products(transposed, add):
    """Small and large ones, wide and narrow, of none, of numbers that lie apart; the same bits every time."""
    g = torch.Generator().manual_seed(0)
    for m, k, n in [(0, 3, 2), (2, 0, 3), (3, 7, 5), (1, 2000, 700), (700, 2000, 1), (300, 1, 4000), (257, 1000, 129)]:
        a = torch.randn(k, m, generator=g).T if transposed == "left" else torch.randn(m, k, generator=g)
        b = torch.randn(n, k, generator=g).T if transposed == "right" else torch.randn(k, n, generator=g)
        before = torch.randn(m, n, generator=g)
        want = a.double() @ b.double() + (before.double() if add else 0)
        got, again = before.clone(), before.clone()
        assert tiles.product_(a, b, got, add) is got
        assert (got - want).norm() <= 1e-6 * want.norm()
        assert torch.equal(got, tiles.product_(a, b, again, add))
        spread_a, spread_b = torch.zeros(m, 2 * k + 1)[:, : 2 * k : 2].copy_(a), torch.zeros(k, n + 3)[:, 2:-1].copy_(b)
        assert (tiles.product_(spread_a, spread_b, before.clone(), add) - want).norm() <= 1e-6 * want.norm()


@needs_extension
def test_without_onednn_products_are_those_of_pytorch():
    a, b = torch.randn(500, 300), torch.randn(300, 200)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not EXTENSION.takes_onednn()
        assert torch.equal(tiles.product_(a, b, torch.empty(500, 200)), a @ b)
        assert torch.equal(tiles.product_(a, b, torch.ones(500, 200), add=True), torch.ones(500, 200).addmm_(a, b))


@pytest.mark.usefixtures("_way")
def test_exponentials_are_exact_to_the_last_places():
    x = torch.linspace(-86, 86, 100_003)[None]
    tile = x.clone()
    tiles.exponentiate_(tile, None, None, None, False, None, None)
    assert relative(tile, x.double().exp()) < 1.5 * torch.finfo(torch.float32).eps


@pytest.mark.usefixtures("_way")
def test_nothing_adds_nothing():
    tile, sums = torch.full((3, 20), tiles.NOTHING), torch.zeros(3, dtype=torch.float64)
    tiles.exponentiate_(tile, None, None, None, False, sums, None)
    assert (tile == 0).all()
    assert (sums == 0).all()


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sides", ["rows", "columns", "both"])
@pytest.mark.parametrize("are_exponentials", [False, True])
def test_weights(shape, sides, are_exponentials):
    tile, factors, _ = some_tile(*shape)
    g = torch.Generator().manual_seed(1)
    row_weights = None if sides == "columns" else torch.randn(shape[0], generator=g)
    column_weights = None if sides == "rows" else torch.randn(shape[1], generator=g)
    weights = torch.zeros(shape)
    weights += 0 if row_weights is None else row_weights[:, None]
    weights += 0 if column_weights is None else column_weights
    taken = tile.clone()
    tiles.exponentiate_(taken, factors, None, None, False, None, None)
    source = taken if are_exponentials else tile
    out = tiles.weigh(source, factors, are_exponentials, row_weights, column_weights, torch.empty_like(tile))
    assert torch.equal(out, taken * weights), "the exponentials of both passes have the same bits"
    assert torch.equal(tiles.weigh(source, factors, are_exponentials, row_weights, column_weights, out=source), out)


@pytest.mark.usefixtures("_way", "_threads")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("project", [False, True])
def test_the_gradient_through_the_norm(shape, project):
    x, inv, _ = some_tile(*shape)
    grad, outer = torch.randn(shape), torch.rand(shape[0])
    wide, radial = grad.double(), (x.double() * grad.double()).sum(1)
    want = wide - x.double() * (radial * inv.double() ** 2)[:, None] if project else wide
    total = tiles.through_norm_(grad, x, inv, outer, project)
    scale = want.abs().max().item()
    torch.testing.assert_close(grad.double(), want * outer.double()[:, None], rtol=1e-5, atol=1e-5 * scale)
    expected = (radial * outer).sum().item()
    assert float(total) == pytest.approx(expected, rel=1e-4, abs=1e-4 * (x * grad).abs().sum().item())


@needs_extension
def test_results_repeat():
    tile, factors, own = some_tile(700, 900)
    results = []
    for _ in range(3):
        again, positives = tile.clone(), torch.zeros(700)
        sums = torch.zeros(900, dtype=torch.float64)
        tiles.exponentiate_(again, factors, own, positives, True, None, sums)
        results.append((again, sums))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@needs_extension
def test_memory_waits_for_its_next_use():
    like = torch.empty(0)
    tiles.release()
    first, second = tiles.reusable(5000, like), tiles.reusable(5000, like)
    places = {first.data_ptr(), second.data_ptr()}
    assert len(places) == 2, "memory in use is nobody else's"
    first.fill_(1)
    view = first[10:]
    del first
    third = tiles.reusable(5000, like)
    third.fill_(2)
    assert (view == 1).all(), "a view holds on to it"
    place = third.data_ptr()
    del view, second, third
    assert tiles.reusable(4000, like).data_ptr() == place, "the one given back last"
    assert tiles.reusable(1000, like).numel() == 1000


@needs_extension
def test_no_more_than_256_mib_wait():
    """Memory that waited still holds what was written to it; large blocks new from the system hold zeros."""
    like = torch.empty(0)

    def waited(mib, count=3):
        blocks = [tiles.reusable(mib << 18, like) for _ in range(count)]
        held = [block[0].item() == 1 for block in blocks]
        for block in blocks:
            block[0] = 1
        return sum(held)

    tiles.release()
    assert [waited(100), waited(100)] == [0, 2], "two of 100 MiB"
    assert [waited(300), waited(300)] == [0, 0], "none larger than the limit"
    tiles.release()
    assert [waited(32, 8), waited(32, 8)] == [0, 6], "and not more than six"
    tiles.release()
    assert waited(100) == 0
    tiles.release()


@needs_extension
@pytest.mark.parametrize("name", [*LOSSES, "supcon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_is_the_same_without_it(name, dtype, monkeypatch):
    g = torch.Generator().manual_seed(0)
    z, w = torch.randn(300, 48, generator=g).to(dtype), torch.randn(37, 48, generator=g).to(dtype)
    y = torch.randint(0, 37, (300,), generator=g)

    function, options = LOSSES.get(name, ("supcon_loss", {}))
    function = getattr(hc, function)

    def results():
        leaves = [x.clone().requires_grad_() for x in ((z, w) if name in LOSSES else (z,))]
        loss = function(*leaves, y, **options)
        return [loss, *torch.autograd.grad(loss, leaves)]

    with_it = results()
    monkeypatch.setattr(_extension, "quietly", lambda: None)
    for a, b in zip(with_it, results(), strict=True):
        bound = 2e-6 if dtype == torch.float32 else 1e-2
        assert (a - b).norm() <= bound * b.norm()
