"""A step over chunks equals one big batch: loss, every gradient, buffers; alone and under DDP."""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import ranks
import torch
from torch import nn

import hypercontrast as hc

LOSSES = {
    "ntce": lambda z, w, y, group="auto": hc.ntce_loss(z, w, y, group=group),
    "nonl": lambda z, w, y, group="auto": hc.nonl_loss(z, w, y, group=group),
    "normface": lambda z, w, y, group="auto": hc.normface_loss(z, w, y, group=group),
    "supcon": lambda z, w, y, group="auto": hc.supcon_loss(z, y, group=group) + 0 * w.sum(),
}


class Encoder(nn.Module):
    """Features of its input; the prototypes are its own so that DDP averages them too."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), middle, nn.ReLU(), nn.Linear(16, 5))
        self.prototypes = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return self.layers(x)


def make(middle=None, n=30):
    torch.manual_seed(0)
    encoder = Encoder(nn.Identity() if middle is None else middle).double()
    return encoder, torch.randn(n, 6, dtype=torch.float64), torch.randint(0, 4, (n,))


def gradients(encoder):
    grads = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    return grads


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm().clamp(min=1)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [7, 10, 30])
def test_chunks_equal_one_batch(name, size):
    encoder, x, y = make()
    want_loss = LOSSES[name](encoder(x), encoder.prototypes, y)
    want_loss.backward()
    want = gradients(encoder)
    for _ in range(2):  # gradients add up, as they do for backward()
        loss = hc.accumulate_exact(
            encoder, lambda z: LOSSES[name](z, encoder.prototypes, y), x.split(size), [encoder.prototypes]
        )
    assert not loss.requires_grad
    assert torch.allclose(loss, want_loss, rtol=1e-13)
    assert_same(gradients(encoder), [2 * g for g in want])


def test_a_parameter_named_twice_has_its_gradient_once():
    """Of two modules that share it, say."""
    encoder, x, y = make()
    LOSSES["ntce"](encoder(x), encoder.prototypes, y).backward()
    want = gradients(encoder)
    parameters = [*encoder.parameters(), encoder.prototypes]
    hc.accumulate_exact(encoder, lambda z: LOSSES["ntce"](z, encoder.prototypes, y), x.split(7), parameters)
    assert_same(gradients(encoder), want)


def test_adding_up_chunk_losses_is_not_the_same():
    """What the function is for: the usual accumulation is off by far more than rounding."""
    encoder, x, y = make()
    hc.ntce_loss(encoder(x), encoder.prototypes, y).backward()
    want = gradients(encoder)
    for part, labels in zip(x.split(10), y.split(10), strict=True):
        (hc.ntce_loss(encoder(part), encoder.prototypes, labels) / 3).backward()
    assert (gradients(encoder)[0] - want[0]).norm() > 1e-3 * want[0].norm()


def test_views_and_several_inputs():
    encoder, x, y = make()

    def two_views(a, b):
        return torch.stack([encoder(a), encoder(b)], 1)

    hc.supcon_loss(two_views(x, x.flip(1)), y).backward()
    want = [p.grad.clone() for p in encoder.layers.parameters()]
    encoder.zero_grad()
    hc.accumulate_exact(
        two_views, lambda z: hc.supcon_loss(z, y), list(zip(x.split(8), x.flip(1).split(8), strict=True))
    )
    assert_same([p.grad for p in encoder.layers.parameters()], want)


def test_dropout_is_the_same_both_times():
    encoder, x, y = make(nn.Dropout(0.5))
    torch.manual_seed(3)
    LOSSES["nonl"](torch.cat([encoder(part) for part in x.split(7)]), encoder.prototypes, y).backward()
    want, after = gradients(encoder), torch.get_rng_state()
    torch.manual_seed(3)
    hc.accumulate_exact(encoder, lambda z: LOSSES["nonl"](z, encoder.prototypes, y), x.split(7), [encoder.prototypes])
    assert_same(gradients(encoder), want)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("middle", [None, nn.Dropout(0.5)])
def test_random_numbers_of_the_loss_are_drawn_once(middle):
    """Steps go through the generator as those of one batch do: no step draws what the one before has drawn."""

    def drawn_by(step):
        torch.manual_seed(3)
        encoder, x, _ = make(middle)
        drawn = []

        def loss_fn(z):
            drawn.append(torch.rand(()).item())
            return z.square().sum()

        for _ in range(3):
            step(encoder, loss_fn, x.split(7))
        return drawn

    plain = drawn_by(lambda encoder, loss_fn, chunks: loss_fn(torch.cat([encoder(part) for part in chunks])))
    assert len(set(plain)) == 3
    assert drawn_by(hc.accumulate_exact) == plain


def test_dropout_on_a_gpu_that_is_not_the_current_one(monkeypatch):
    gpus = [torch.Generator(), torch.Generator()]
    stand_ins = {
        "is_initialized": lambda: True,
        "get_rng_state": lambda: gpus[0].get_state(),
        "set_rng_state": gpus[0].set_state,
        "get_rng_state_all": lambda: [gpu.get_state() for gpu in gpus],
        "set_rng_state_all": lambda states: [gpu.set_state(x) for gpu, x in zip(gpus, states, strict=True)],
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    encoder, x, y = make()

    def dropping(part):
        return encoder(part * torch.bernoulli(torch.full_like(part, 0.5), generator=gpus[1]))

    loss = hc.accumulate_exact(dropping, lambda z: LOSSES["ntce"](z, encoder.prototypes, y), x.split(7))
    assert torch.isfinite(loss)


def test_running_statistics_see_each_chunk_once():
    (encoder, x, y), (twin, _, _) = make(nn.BatchNorm1d(16)), make(nn.BatchNorm1d(16))
    LOSSES["ntce"](torch.cat([twin(part) for part in x.split(10)]), twin.prototypes, y).backward()
    hc.accumulate_exact(encoder, lambda z: LOSSES["ntce"](z, encoder.prototypes, y), x.split(10), [encoder.prototypes])
    assert_same(gradients(encoder), gradients(twin))
    for got, want in zip(encoder.buffers(), twin.buffers(), strict=True):
        assert torch.equal(got, want)


class RunningMean(nn.Module):
    """Takes a running mean away, whose buffer is assigned instead of written to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16, dtype=torch.float64))

    def forward(self, x):
        before, self.mean = self.mean, 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - before


def test_buffers_that_a_forward_assigns_see_each_chunk_once():
    (encoder, x, y), (twin, _, _) = make(RunningMean()), make(RunningMean())
    LOSSES["ntce"](torch.cat([twin(part) for part in x.split(10)]), twin.prototypes, y).backward()
    hc.accumulate_exact(encoder, lambda z: LOSSES["ntce"](z, encoder.prototypes, y), x.split(10), [encoder.prototypes])
    assert_same(gradients(encoder), gradients(twin))
    assert torch.equal(encoder.layers[1].mean, twin.layers[1].mean)


def test_memory_is_that_of_a_chunk():
    """Bytes that autograd holds at its peak, by its own hooks: at most a chunk's share and the features."""
    encoder, x, y = make(n=4000)

    def peak(step):
        held = {"now": 0, "peak": 0}

        class Held:
            def __init__(self, tensor):
                self.tensor, self.size = tensor, tensor.nbytes
                held["now"] += self.size
                held["peak"] = max(held["peak"], held["now"])

            def __del__(self):
                held["now"] -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda h: h.tensor):
            step()
        encoder.zero_grad()
        return held["peak"]

    whole = peak(lambda: LOSSES["normface"](encoder(x), encoder.prototypes, y).backward())
    loss_alone = peak(
        lambda: LOSSES["normface"](
            torch.zeros(4000, 5, dtype=torch.float64, requires_grad=True), encoder.prototypes, y
        ).backward()
    )
    chunked = peak(
        lambda: hc.accumulate_exact(
            encoder, lambda z: LOSSES["normface"](z, encoder.prototypes, y), x.split(200), [encoder.prototypes]
        )
    )
    assert chunked <= max(loss_alone, (whole - loss_alone) / 10)
    assert whole > 1.5 * loss_alone


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, x: hc.accumulate_exact(e, lambda z: z.sum(), []), "chunks must hold at least one"),
        (lambda e, x: hc.accumulate_exact(lambda a: e(a + torch.rand(()).item() * next(NOISE)), lambda z: z.square().sum(), [x]), "the same features twice"),
        (lambda e, x: hc.accumulate_exact(e, lambda z: e.prototypes.sum(), [x], [e.prototypes]), "must depend on the features"),
    ],
)  # fmt: skip
def test_errors(call, message):
    encoder, x, _ = make()
    with pytest.raises(ValueError, match=message):
        call(encoder, x)


@pytest.mark.parametrize(
    ("frozen", "loss_fn", "error", "message"),
    [
        (False, lambda z: 1.5, TypeError, "loss_fn must return a tensor, got float"),
        (False, lambda z: z.sum(1), ValueError, r"loss_fn must return a scalar, got \[30\]"),
        (False, lambda z: z.detach().sum(), ValueError, "loss_fn must depend on the features"),
        (True, lambda z: z.sum(), ValueError, "encoder must give features with a gradient, got a frozen one"),
    ],
)
def test_nothing_to_send_backward(frozen, loss_fn, error, message):
    encoder, x, _ = make()
    encoder.requires_grad_(not frozen)
    with pytest.raises(error, match=message):
        hc.accumulate_exact(encoder, loss_fn, x.split(7))
    with torch.no_grad(), pytest.raises(RuntimeError, match="with gradients enabled"):
        hc.accumulate_exact(encoder, loss_fn, x.split(7))


@pytest.mark.parametrize(
    ("encoder", "loss_fn", "chunks", "error", "message"),
    [
        (lambda e: e, torch.sum, lambda x: (part for part in x), TypeError, "chunks must be a sequence, got generator"),
        (lambda e: lambda x: (e(x),), torch.sum, list, TypeError, "encoder must return a tensor, got tuple"),
        (lambda e: lambda x: e(x).sum(), torch.sum, list, ValueError, r"encoder must return features \[n, ...\], got \[\]"),
        (lambda e: lambda x: e(x).long(), torch.sum, list, TypeError, r"encoder must return real floats, got torch\.int64"),
        (lambda e: lambda x: e(x) * 1j, torch.sum, list, TypeError, r"encoder must return real floats, got torch\.complex128"),
        (lambda e: e, lambda z: z.sum() * 1j, list, TypeError, r"loss_fn must return a real number, got torch\.complex128"),
    ],
)  # fmt: skip
def test_what_is_no_batch_of_features_or_no_loss_is_named(encoder, loss_fn, chunks, error, message):
    e, x, _ = make()
    with pytest.raises(error, match=message):
        hc.accumulate_exact(encoder(e), loss_fn, chunks(x.split(7)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda head: head.prototypes, "parameters must be several tensors, as in a list, got Parameter"),
        (lambda head: head, "parameters must be several tensors, as in a list, got PrototypeHead"),
        (lambda head: head.named_parameters(), "parameters must hold tensors alone, got tuple"),
    ],
)
def test_parameters_that_would_get_no_gradient(given, message):
    encoder, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.arange(6) % 2
    head = hc.PrototypeHead(3, 2)
    with pytest.raises(TypeError, match=message):
        hc.accumulate_exact(encoder, lambda z: hc.ntce_loss(z, head.prototypes, y), x.split(2), given(head))
    hc.accumulate_exact(encoder, lambda z: hc.ntce_loss(z, head.prototypes, y), x.split(2), head.parameters())
    assert head.prototypes.grad is not None


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize(("change", "rounding"), [(1e-12, True), (1e-6, False), (math.nan, False)])
def test_a_change_in_any_chunk_is_noticed(chunk, change, rounding):
    """But for what kernels differ by that add in another order; however small the features are."""
    encoder, x, _ = make(n=21)
    calls = iter(range(6))

    def drifting(part):
        features = 1e-6 * encoder(part)
        return features * (1 + change) if next(calls) == 3 + chunk else features

    expected = nullcontext() if rounding else pytest.raises(ValueError, match="the same features twice")
    with expected:
        hc.accumulate_exact(drifting, lambda z: z.square().sum(), x.split(7))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("first", [math.nan, math.inf])
def test_features_that_are_not_finite_reach_the_loss(first, bad):
    """That training has diverged is not the encoder's fault, whatever kernels make of it with a graph and without."""
    encoder, x, _ = make()
    x[3] = bad

    def diverged(part):
        features = encoder(part)
        return features if torch.is_grad_enabled() else torch.where(features.isfinite(), features, first)

    loss = hc.accumulate_exact(diverged, lambda z: z.square().sum(), x.split(7))
    assert not loss.isfinite()
    assert not encoder.layers[0].weight.grad.isfinite().all()


@pytest.mark.parametrize(("first", "again"), [(1.0, math.inf), (math.nan, 1.0)])
def test_features_that_are_finite_once_are_not_the_same(first, again):
    encoder, x, _ = make()

    def drifting(part):
        return encoder(part) * (again if torch.is_grad_enabled() else first)

    with pytest.raises(ValueError, match="the same features twice"):
        hc.accumulate_exact(drifting, lambda z: z.square().sum(), x.split(7))


def test_a_chunk_without_rows_adds_nothing():
    encoder, x, _ = make(n=2)
    encoder(x).square().sum().backward()
    want = gradients(encoder.layers)
    hc.accumulate_exact(encoder, lambda z: z.square().sum(), x.tensor_split(3))
    assert_same(gradients(encoder.layers), want)


def test_a_frozen_parameter_stays_without_a_gradient():
    """As fixed prototypes among a head's parameters."""
    encoder, x, y = make()
    encoder.prototypes.requires_grad_(False)
    hc.accumulate_exact(encoder, lambda z: LOSSES["ntce"](z, encoder.prototypes, y), x.split(10), [encoder.prototypes])
    assert encoder.prototypes.grad is None
    assert encoder.layers[0].weight.grad is not None


def test_features_of_zero_in_half_precision():
    """As those of a chunk of padding alone: the same both times, however near zero the smallest number is."""
    encoder, x = nn.Linear(3, 2, bias=False).half(), torch.ones(4, 3).half()
    x[:2] = 0
    hc.accumulate_exact(encoder, lambda z: z.square().sum(), x.split(2))
    assert (encoder.weight.grad != 0).all()


def test_an_encoder_that_raises_has_its_buffers_back():
    encoder, x, _ = make(nn.BatchNorm1d(16))
    before = [buffer.clone() for buffer in encoder.buffers()]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        hc.accumulate_exact(encoder, lambda z: z.sum(), [x, x[:, :5]])
    for got, want in zip(encoder.buffers(), before, strict=True):
        assert torch.equal(got, want)


NOISE = iter(range(1, 100))


WRAPPED = {"itself": lambda ddp: ddp, "inside": nn.Sequential, "compiled": partial(torch.compile, backend="eager")}


def worker(rank, world):
    """Ranks of 3 and of 5 chunks: one that is synchronised once too often would wait for the other."""
    for name, how in [*((name, "itself") for name in LOSSES), ("nonl", "inside"), ("nonl", "compiled")]:
        loss_fn = LOSSES[name]
        encoder, x, y = make()
        loss_fn(encoder(x), encoder.prototypes, y, None).backward()
        want = gradients(encoder)
        ddp = nn.parallel.DistributedDataParallel(encoder)
        mine = [slice(0, 11), slice(11, 30)][rank]
        hc.accumulate_exact(
            WRAPPED[how](ddp),
            lambda z, loss_fn=loss_fn, w=encoder.prototypes, y=y[mine]: loss_fn(z, w, y),
            x[mine].split(4),
            [encoder.prototypes],
        )
        assert_same([p.grad for p in encoder.parameters()], want)
    running_statistics(rank)


class Centred(nn.Module):
    """About the mean of earlier batches: other buffers in the two passes would give other features."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x):
        centred = x - self.mean
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return centred


def running_statistics(rank):
    """Every step begins with those of rank 0, as it does for DDP that accumulates by itself."""
    counted = []
    for exact in (False, True):
        encoder, x, _ = make(Centred())
        centre = encoder.layers[1]
        seen = []
        centre.register_forward_pre_hook(
            lambda m, _, seen=seen: seen.append(m.mean.clone()) if torch.is_grad_enabled() else None
        )
        ddp = nn.parallel.DistributedDataParallel(encoder, find_unused_parameters=True)
        for step in range(3):
            mine = x[rank::2][:15] + step
            if exact:
                hc.accumulate_exact(ddp, lambda z: z.square().sum(), mine.split(8))
            else:
                with ddp.no_sync():
                    ddp(mine[:8]).square().sum().backward()
                ddp(mine[8:]).square().sum().backward()
        counted.append(torch.stack([*seen, centre.mean]))
    assert torch.equal(*counted)
    first = hc.gather_with_grad(counted[0][None, 2])
    assert torch.equal(first[0], first[1])


def test_under_ddp(tmp_path):
    ranks.spawn(worker, 2, tmp_path)
