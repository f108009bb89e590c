"""The registered operators: opcheck, gradcheck in float64, torch.compile without graph breaks, saved memory."""

import pytest
import torch
from cases import quick
from oracle import LOSSES
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import hypercontrast as hc
from hypercontrast import _extension, _ops, _pair_ops, functional
from hypercontrast.distributed import ABSENT

NAMES = list(LOSSES)
DEVICE = {"blockwise": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}


def lse_arguments(rows, cols, exclude_own, *, inv_temperature=5.0, temperature=None, keep_bytes=0, ignored=True):
    torch.manual_seed(0)
    features, prototypes = torch.randn(7, 4).double().requires_grad_(), torch.randn(5, 4).double().requires_grad_()
    labels = torch.tensor([0, 1, 1, 3, -100 if ignored else 0, 0, 3])
    counts = torch.bincount(labels[labels >= 0], minlength=5) if rows else None
    return (
        features, prototypes, labels, counts, temperature, inv_temperature, -100, rows, cols, exclude_own, True,
        keep_bytes, "blockwise",
    )  # fmt: skip


@pytest.mark.parametrize("exclude_own", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
@pytest.mark.parametrize("inv_temperature", [5.0, 100.0])
def test_opcheck_lse(rows, cols, exclude_own, keep_bytes, inv_temperature):
    arguments = lse_arguments(rows, cols, exclude_own, keep_bytes=keep_bytes, inv_temperature=inv_temperature)
    torch.library.opcheck(torch.ops.hypercontrast.lse.default, arguments)


# What tests call every operator with: (backend) -> tuples of arguments, those to differentiate requiring a gradient.
CASES = {}
TRITON_ALONE = ("label_classes",)
# On a CPU by the extension, in float32 alone.
COMPILED = ("prototype_loss", "prototype_loss_backward", "pair_loss", "pair_loss_backward")


def cases(make):
    CASES[make.__name__] = make
    return make


def leaf(*shape, backend):
    """Triton has no float64."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    return torch.randn(*shape, dtype=dtype, device=DEVICE[backend], requires_grad=True)


def temperature(backend):
    return torch.full_like(leaf(1, backend=backend), 0.2)[0].requires_grad_()


@cases
def lse(backend):
    z, w, tau = leaf(7, 4, backend=backend), leaf(5, 4, backend=backend), temperature(backend)
    y = torch.tensor([0, 1, 1, 3, -100, 0, 3], device=z.device)
    counts = torch.bincount(y[y >= 0], minlength=5)
    return [
        (z, w, y, counts, None, 5.0, -100, True, False, True, True, 0, backend),
        (z, w, y, counts, None, 100.0, -100, True, True, False, True, 1 << 20, backend),
        (z, w, y, None, tau, 1.0, -100, False, True, True, True, 0, backend),
        (z, w, y, None, None, 1.0, -100, True, True, True, False, 0, backend),
    ]


@cases
def lse_backward(backend):
    calls = []
    for z, w, y, counts, tau, *options in lse(backend):
        arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in (z, w, y, counts, tau, *options)]
        *statistics, inv_z, inv_w, kept = _ops.lse(*arguments)
        upstream = [torch.randn_like(s) for s in statistics]
        del options[-2]  # keep_bytes
        saved = (*arguments[:3], *statistics, inv_z, inv_w, kept, *upstream)
        calls.append((*saved, counts, arguments[4], *options, True, True))
    calls.append((*calls[0][:-2], True, False))
    calls.append((*calls[1][:-2], False, True))
    return calls


@cases
def prototype_loss(backend):
    z, w = (torch.randn(size, 4, device=DEVICE[backend], requires_grad=True) for size in (7, 5))
    y, weight = torch.tensor([0, 1, 1, 3, -100, 0, 3], device=z.device), torch.rand(5, device=z.device)
    tau = torch.tensor(0.2, device=z.device, requires_grad=True)
    normalize = backend != "triton"
    return [
        (z, w, y, weight, None, 5.0, -100, True, False, True, True, False, True, 1 << 20, backend),
        (z, w, y, None, tau, 1.0, -100, False, True, True, True, True, False, 0, backend),
        (z, w, y, weight, tau, 1.0, -100, True, True, False, normalize, False, True, 0, backend),
    ]


@cases
def prototype_loss_backward(backend):
    calls = []
    for z, w, y, weight, *options in prototype_loss(backend):
        z, w, *options = (x.detach() if isinstance(x, torch.Tensor) else x for x in (z, w, *options))
        loss, *saved, divisor, _ = _ops.prototype_loss(z, w, y, weight, *options)
        calls.append((torch.rand_like(loss), divisor, z, w, y, *saved, *options[:-4], backend, True, True))
    calls.append((*calls[0][:-2], True, False))
    calls.append((*calls[1][:-2], False, True))
    return calls


@cases
def segment_sum(backend):
    values = torch.randn(7, device=DEVICE[backend])
    return [(values, torch.tensor([0, 1, 1, 3, -100, 0, 3], device=values.device), 5, -100, backend)]


@cases
def class_sums(backend):
    z, inv_norms = (torch.randn(*shape, device=DEVICE[backend]) for shape in ((7, 4), (7,)))
    return [(z, inv_norms, torch.tensor([0, 1, 1, 3, -100, 0, 3], device=z.device), 5, -100, backend)]


@cases
def pair_lse(backend):
    z, ref, tau = leaf(9, 4, backend=backend), leaf(5, 4, backend=backend), temperature(backend)
    y, mask = torch.arange(9, device=z.device) % 3, torch.rand(9, 9, device=z.device) < 0.5
    y[4] = -1  # not there
    return [
        (z, None, y, y, None, None, 0, 5.0, True, False, backend),
        (z, ref, y, y[:5], None, tau, None, 1.0, True, True, backend),
        (z, None, None, None, mask, None, 0, 100.0, True, False, backend),
        (z, ref, y, y[:5], None, None, None, 1.0, False, False, backend),
    ]


@cases
def pair_lse_backward(backend):
    calls = []
    for z, ref, y, column_y, mask, tau, *options in pair_lse(backend):
        z, ref, tau = (None if x is None else x.detach() for x in (z, ref, tau))
        lse, positives, inv_z, inv_ref = _pair_ops.pair_lse(z, ref, y, column_y, mask, tau, *options)
        side = [lse, torch.randn_like(lse), positives, torch.randn_like(lse)]
        masks = (mask, None if mask is None else mask.T)
        others = side if ref is None else [None] * 4
        calls.append((z, ref, y, column_y, inv_z, inv_ref, *side, *others, *masks, tau, *options))
    return calls


@cases
def label_classes(backend):
    labels = torch.tensor([5, -7, 5, 2**40, 5, 2**40, ABSENT], device=DEVICE[backend])
    return [(labels, 0), (labels, 3)]


@cases
def pair_loss(backend):
    z = torch.randn(9, 4, device=DEVICE[backend], requires_grad=True)
    y = torch.arange(9, device=z.device) % 4 * 100 - 7
    y[4] = ABSENT
    by_triton = backend == "triton"
    tau = None if by_triton else torch.tensor(0.2, requires_grad=True)
    return [
        (z, y, None, 5.0, 1.0, True, False, True, True, 0, backend),
        (z, y, tau, 1.0, 0.5, not by_triton, by_triton, False, False, 1 << 20, backend),
    ]


@cases
def pair_loss_backward(backend):
    calls = []
    for z, y, tau, inv_temperature, scale, normalize, inside, *reduction in pair_loss(backend):
        z, tau = z.detach(), None if tau is None else tau.detach()
        loss, _, *saved = _pair_ops.pair_loss(z, y, tau, inv_temperature, scale, normalize, inside, *reduction)
        divisor, *statistics = saved
        calls.append((torch.rand_like(loss), divisor, z, *statistics, tau, inv_temperature, normalize, inside, backend))
    return calls


def registered() -> set[str]:
    names = (name.split(".")[0].split("::") for name in torch._C._dispatch_get_all_op_names())
    return {name for library, name in names if library == "hypercontrast"}


def differentiable() -> list[str]:
    """Those with a formula for their gradient."""
    return [name for name in CASES if OPDEFS[f"hypercontrast::{name}"]._backward_fn is not None]


def backends(name) -> tuple[str, ...]:
    alone = name in TRITON_ALONE or (name in COMPILED and _extension.quietly() is None)
    return ("triton",) if alone else ("blockwise", "triton")


def operator(name):
    return getattr(torch.ops.hypercontrast, name).default


def test_every_operator_has_cases():
    assert registered() == CASES.keys(), "what is missing wants arguments in CASES: its other tests follow from them"


# The kernels' longest checks are of parts that the losses' own operators take in as well.
@pytest.mark.parametrize(
    ("name", "backend"),
    quick(
        [(name, backend) for name in CASES for backend in backends(name)],
        lambda case: case not in [(name, "triton") for name in ("lse", "lse_backward", "pair_lse")],
    ),
)
def test_opcheck(name, backend, figure):
    calls = CASES[name](backend)
    for arguments in calls:
        checks = torch.library.opcheck(operator(name), arguments)
    figure("R4", f"{name}, {backend}: opcheck, {len(calls)} calls, {len(checks)} checks each")


@pytest.mark.parametrize("name", [name for name in differentiable() if name not in TRITON_ALONE + COMPILED])
def test_gradcheck_of_the_operator(name, figure):
    calls = CASES[name]("blockwise")
    for arguments in calls:
        where = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor) and x.requires_grad]

        def call(*leaves, arguments=arguments, where=where):
            arguments = list(arguments)
            for i, x in zip(where, leaves, strict=True):
                arguments[i] = x
            outputs = operator(name)(*arguments)
            # A sum over nothing is -inf, which has no differences.
            return [x[x.isfinite()] for x in outputs if x.requires_grad and x.numel()]

        assert torch.autograd.gradcheck(call, [arguments[i] for i in where], eps=1e-7, atol=1e-5, rtol=1e-4)
    figure("R4", f"{name}: gradcheck in float64, {len(calls)} calls")


@pytest.mark.parametrize("name", CASES)
def test_compiled_whole_equals_eager(name, figure):
    calls = CASES[name](backends(name)[0])
    for arguments in calls:
        leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]

        def outcome(fn, arguments=arguments, leaves=leaves):
            outputs = fn(*arguments)
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
            total = sum(x[x.isfinite()].square().sum() for x in outputs if x.requires_grad)
            return outputs + list(torch.autograd.grad(total, leaves) if leaves else ())

        torch._dynamo.reset()
        compiled = torch.compile(operator(name), fullgraph=True, backend="aot_eager")
        for got, want in zip(outcome(compiled), outcome(operator(name)), strict=True):
            assert torch.equal(got, want)
    figure("R4", f"{name}: compiled with fullgraph equals eager in all bits, {len(calls)} calls")


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tau", [0.2, 0.01])
def test_gradcheck(name, reduction, tau, keep_bytes, monkeypatch):
    monkeypatch.setattr("hypercontrast.blockwise._budget_bytes", keep_bytes)
    function, specific = LOSSES[name]
    labels = torch.tensor([0, 1, 1, 2, -100, 0])
    features, prototypes = torch.randn(6, 3).double().requires_grad_(), torch.randn(4, 3).double().requires_grad_()
    weight = torch.tensor([1.0, 0.5, 2.0, 1.0]).double()

    def loss(z, w, t):
        options = {"temperature": t, "weight": weight, "reduction": reduction}
        return getattr(functional, function)(z, w, labels, **options, **specific)

    learned = torch.tensor(tau).double().requires_grad_()
    assert torch.autograd.gradcheck(loss, (features, prototypes, learned), eps=1e-7, atol=1e-5, rtol=1e-4)
    assert torch.autograd.gradcheck(
        lambda z, w: loss(z, w, tau), (features, prototypes), eps=1e-7, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(name, reduction):
    function, specific = LOSSES[name]
    features, prototypes = torch.randn(20, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    labels = torch.randint(0, 5, (20,))

    def loss(z, w):
        value = getattr(functional, function)(3 * z, w, labels, reduction=reduction, **specific)
        return value.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for actual, want in zip(
        torch.autograd.grad(compiled(features, prototypes), (features, prototypes)),
        torch.autograd.grad(loss(features, prototypes), (features, prototypes)),
        strict=True,
    ):
        torch.testing.assert_close(actual, want)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, w, y: hc.ntce_loss(z, w, y),
        lambda z, w, y: hc.nonl_loss(z, w, y, anchor="both", reduction="none").sum(),
        lambda z, w, y: hc.supcon_loss(z, y),
        lambda z, w, y: hc.supcon_loss(z, y, variant="in"),
        lambda z, w, y: hc.supcon_loss(z, y, ref_features=w, ref_labels=torch.arange(5)),
    ],
    ids=["loss", "statistics", "pair loss", "pair statistics", "references"],
)
def test_one_graph_serves_every_batch_size(loss):
    """Not one for each: after the eighth size fullgraph=True would raise, and the default run uncompiled."""
    torch._dynamo.reset()
    prototypes = torch.randn(5, 6)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, n in enumerate((17, 19, 33)):
        features, labels = torch.randn(n, 6, requires_grad=True), torch.arange(n) % 5
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            actual = compiled(features, prototypes, labels)
        want = loss(features, prototypes, labels)
        torch.testing.assert_close(actual, want)
        torch.testing.assert_close(*(torch.autograd.grad(x, features)[0] for x in (actual, want)))


class _Exported(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, *args):
        return self.loss(*args)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, w, y: hc.nonl_loss(z, w, y, anchor="both", reduction="none"),
        lambda z, w, y: hc.logit_adjusted_loss(z, w, y, w[:, 0]),
        lambda z, w, y: hc.proxy_anchor_loss(z, w, y),
        lambda z, w, y: hc.supcon_loss(z, y, variant="in"),
        lambda z, w, y: hc.supcon_loss(z, y, ref_features=w, ref_labels=torch.arange(5)),
        lambda z, w, y: hc.dcl_loss(z.view(-1, 2, 3)),
        lambda z, w, y: hc.CELoss()(z @ w.T, y),
        lambda z, w, y: hc.ETFDRLoss()(z, w, y),
    ],
    ids=["statistics", "logit adjustment", "proxy anchor", "pair statistics", "references", "dcl", "ce", "etf-dr"],
)
def test_one_export_serves_every_batch_size(loss):
    prototypes, samples = torch.randn(5, 6), torch.export.Dim("samples", min=3)
    example, sizes = (torch.randn(9, 6), prototypes, torch.arange(9) % 5), ({0: samples}, None, {0: samples})
    exported = torch.export.export(_Exported(loss), example, dynamic_shapes=(sizes,)).module()
    for n in (4, 17):
        arguments = torch.randn(n, 6), prototypes, torch.arange(n) % 5
        torch.testing.assert_close(exported(*arguments), loss(*arguments))


def test_values_are_still_checked_when_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(hc.ntce_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), got 7"):
        compiled(torch.randn(2, 4), torch.randn(3, 4), torch.tensor([0, 7]))


def test_gradients_wanted_of_one_argument_only():
    features, prototypes, labels = torch.randn(9, 4), torch.randn(3, 4), torch.randint(0, 3, (9,))
    for needs in ((True, False), (False, True)):
        z, w = features.clone().requires_grad_(needs[0]), prototypes.clone().requires_grad_(needs[1])
        hc.nonl_loss(z, w, labels).backward()
        assert (z.grad is not None, w.grad is not None) == needs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss_of", [hc.ntce_loss, hc.nonl_loss])
def test_backward_twice_through_one_graph(loss_of, dtype):
    """Kept exponentials must survive the first backward, which writes positives among them."""
    features, prototypes = (torch.randn(n, 4, dtype=dtype, requires_grad=True) for n in (9, 3))
    loss = loss_of(features, prototypes, torch.arange(9) % 3)
    first = torch.autograd.grad(loss, (features, prototypes), retain_graph=True)
    second = torch.autograd.grad(loss, (features, prototypes))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_is_kept_only_within_the_budget(monkeypatch):
    arguments = lse_arguments(False, True, False, keep_bytes=7 * 5 * 8, ignored=False)
    assert _ops.lse(*arguments)[-1].numel() == 7 * 5
    arguments = lse_arguments(False, True, False, keep_bytes=7 * 5 * 8 - 1, ignored=False)
    assert (_ops.lse(*arguments)[-1] == torch.zeros(7 * 5 - 1)).all(), "the only tile does not fit"
    with pytest.raises(ValueError, match=r"num_bytes must lie in \[0, 2\^63\), got -1"):
        hc.set_memory_budget(-1)
    for wrong in ("64", True, None):
        with pytest.raises(TypeError, match=f"num_bytes must be a number of bytes, got {type(wrong).__name__}"):
            hc.set_memory_budget(wrong)


@pytest.mark.parametrize(("text", "budget"), [("0", 0), ("1.5", 3 << 19), ("many", None), ("-1", None), ("nan", None)])
def test_the_environment_sets_the_first_budget(text, budget, monkeypatch):
    monkeypatch.setenv("HYPERCONTRAST_MEMORY_BUDGET_MIB", text)
    if budget is None:
        with pytest.raises(ValueError, match=f"HYPERCONTRAST_MEMORY_BUDGET_MIB must be a number of MiB.* got '{text}'"):
            _ops.blockwise._initial_budget()
    else:
        assert _ops.blockwise._initial_budget() == budget


def test_nothing_is_kept_without_a_gradient(monkeypatch):
    seen = []
    original = _ops.blockwise.launch_fwd
    monkeypatch.setattr(_ops.blockwise, "launch_fwd", lambda *a, **o: seen.append(o["keep_bytes"]) or original(*a, **o))
    features, prototypes, labels = torch.randn(9, 4, requires_grad=True), torch.randn(3, 4), torch.randint(0, 3, (9,))
    hc.ntce_loss(features, prototypes, labels, reduction="none")
    with torch.no_grad():
        hc.ntce_loss(features, prototypes, labels, reduction="none")
    assert seen == [hc.memory_budget(), 0]


def test_what_rounding_takes_from_a_shift_is_in_the_factor():
    """A log-sum-exp of 100 in float32 is off by up to 4e-6, which the gradient near collapse would be too."""
    lse = torch.linspace(70, 130, 601, dtype=torch.float64)
    shift, factor = _ops.blockwise.exponent(lse, torch.ones_like(lse), torch.float32, bounded=False)
    exact = factor.double() * (lse - shift.double()).exp()  # at s = lse
    torch.testing.assert_close(exact, torch.ones_like(lse), rtol=0, atol=1e-7)


def test_a_plain_call_and_one_through_the_dispatcher_are_the_same():
    for arguments in lse("blockwise"):
        leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
        found = []
        for call in (_ops.lse, operator("lse")):
            row, col, positives, *_ = call(*arguments)
            total = sum(x[x.isfinite()].square().sum() for x in (row, col, positives))
            found.append((row, col, positives, *torch.autograd.grad(total, leaves)))
        for got, want in zip(*found, strict=True):
            assert torch.equal(got, want)


def test_who_watches_operators_sees_ours():
    """Modes, fake tensors, subclasses, transforms and profilers."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **kwargs or {})

    class Subclass(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            names.append(str(function))
            return super().__torch_function__(function, types, args, kwargs)

    def loss(z, w, y):
        return hc.nonl_loss(z, w, y, reduction="none", backend="blockwise").sum()

    z, w, y = torch.randn(9, 4, requires_grad=True), torch.randn(3, 4), torch.randint(0, 3, (9,))
    names: list[str] = []
    with Seen():
        loss(z, w, y).backward()
    assert {"hypercontrast::lse", "hypercontrast::lse_backward"} <= set(names)
    names.clear()
    loss(z.detach().as_subclass(Subclass), w, y)
    assert any("hypercontrast.lse" in name for name in names)
    with torch.profiler.profile() as profiled:
        loss(z, w, y)
    assert "hypercontrast::lse" in {event.name for event in profiled.events()}
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(x) for x in (z.detach(), w, y)]
    with mode:
        assert loss(*fakes).shape == ()
    row_lse, *_ = _ops.lse(*(x.to("meta") for x in (z, w, y)), *(None, None, 5.0, -100), *[True] * 4, 0, "blockwise")
    assert row_lse.is_meta


def test_a_second_derivative_is_refused():
    z, w, y = torch.randn(9, 4, requires_grad=True), torch.randn(3, 4), torch.randint(0, 3, (9,))
    (gradient,) = torch.autograd.grad(hc.nonl_loss(z, w, y), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives of these losses need backend='reference'"):
        gradient.sum().backward()


def test_values_that_are_not_there_are_not_asked_for():
    with FakeTensorMode():
        z, w, y = torch.randn(6, 4), torch.randn(3, 4), torch.zeros(6, dtype=torch.int64)
        past = torch.randn(2, 4), torch.zeros(2, dtype=torch.int64)
        for loss in (
            hc.nonl_loss(z, w, y, weight=torch.ones(3), queue=past),
            hc.supcon_loss(z, y, queue=past),
            hc.logit_adjusted_loss(z, w, y, torch.zeros(3)),
        ):
            assert loss.shape == ()
