"""An operator of torch.library that eager code calls without the dispatcher, where no one is there to see the call.

Registration is what lets torch.compile, fake tensors, tracers, function transforms, tensor subclasses and profilers see
an operator instead of what it does. A plain eager call needs none of it, and the way there takes a GPU's host longer
than the kernels take the GPU: through custom_op's wrappers a forward with a graph 230 µs and a backward 135 µs here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # what torch.autograd.grad makes for is_grads_batched


class Operator:
    """What `torch.library.custom_op(name)` makes of a function, by whichever way is shorter.

    The schema comes from the function's annotations. Arguments are given by position, all of them.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.__doc__ = function.__doc__
        self._registered = torch.library.custom_op(name, function, mutates_args=())
        self._overload = self._registered._opoverload
        self._function = function
        self._with_graph = _with_graph(function, lambda ctx, inputs, output: None, _refuse_gradient)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """With sizes by `x.shape`: `len(x)` is a plain number, so that each batch size would be compiled anew."""
        return self._registered.register_fake(function)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As of custom_op: `setup_context(ctx, inputs, output)`, and a gradient for every input or None."""
        self._registered.register_autograd(backward, setup_context=setup_context)
        self._with_graph = _with_graph(self._function, setup_context, backward)

    def __call__(self, *args: Any) -> Any:
        if not torch.compiler.is_compiling():
            _refuse_transforms(args)
        if is_traced(*args) or torch._C._autograd._profiler_enabled():
            return self._overload(*args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return self._function(*args)
        return self._with_graph.apply(*args)


def _with_graph(
    function: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    class WithGraph(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    return WithGraph


def _refuse_gradient(ctx: Any, *grads: Any) -> Any:
    """The backward of an operator that has none registered: those that the losses' own backwards call."""
    raise NotImplementedError("second derivatives of these losses need backend='reference'")


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorate the implementation of an operator that changes none of its arguments."""
    return lambda function: Operator(name, function)


def _refuse_transforms(args: tuple[Any, ...]) -> None:
    """torch.library's operators have no forward-mode derivative, which torch takes for zero, nor one by torch.func."""
    transform = torch._C._functorch.peek_interpreter_stack()
    differentiated = transform is not None and transform.key() == torch._C._functorch.TransformType.Grad
    if forward_ad._current_level >= 0:
        tensors = (x for x in args if isinstance(x, Tensor))
        differentiated = differentiated or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    if differentiated:
        raise NotImplementedError(
            "torch.func.grad, jvp and forward-mode derivatives of these losses need backend='reference'"
        )


def is_traced(*args: Any) -> bool:
    """Whether a compiler, mode, transform, tracer or kind of tensor takes part in calls of operators."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or any(
            isinstance(x, Tensor) and (type(x) not in _PLAIN or x.is_meta or x.is_neg() or _is_batched(x)) for x in args
        )
    )
