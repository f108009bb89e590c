"""Exact gradient accumulation: a step over many chunks that equals one big batch, at the memory of one chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hypercontrast import _checks


def accumulate_exact(
    encoder: Callable[..., Tensor],
    loss_fn: Callable[[Tensor], Tensor],
    chunks: Sequence[Any],
    parameters: Iterable[Tensor] = (),
) -> Tensor:
    """Add to every `.grad` what one batch of all the chunks would, without ever holding that batch's activations.

    Adding up the chunks' own losses is another objective: each chunk's samples would see no other chunk's as negatives.
    Here

        1. every chunk is encoded without a graph, which leaves the features, N·D numbers,
        2. `loss_fn` of all features gives the loss and its gradient with respect to them,
        3. every chunk is encoded again, and its rows of that gradient go backward through it.

    So the price is one more forward, and the effective batch is bound by the features alone. Exact for any loss of
    features: `ntce_loss`, `nonl_loss`, `normface_loss`, `supcon_loss` or your own; and over a global batch, as exact as
    the loss itself. An encoder wrapped in DDP, or with such inside, synchronises once, in the last chunk; a function
    that calls one would in every chunk, and so has no place here.

    Example::

        loss = hc.accumulate_exact(
            encoder, lambda z: hc.ntce_loss(z, head.prototypes, labels), images.split(256), [head.prototypes]
        )
        optimizer.step()

    Args:
        encoder: a module or function from a chunk to features [n, ...]; a tuple is passed as several arguments. It must
            give the same features both times: the random state is restored for it, and a module's buffers (running
            statistics) take only the second pass. Batch norm sees a chunk at a time, as under any accumulation.
        loss_fn: from the features [N, ...] of all chunks, in their order, to a scalar loss.
        chunks: inputs of the encoder, one a chunk; at least one.
        parameters: what `loss_fn` uses besides the features and should get gradients: prototypes, a temperature. With
            DDP they are averaged if they are parameters of the wrapped module.

    Returns:
        The loss, detached.

    Raises:
        ValueError: without chunks; when the features have no gradient, or are not the same both times (the gradients
            are then useless) or have no rows; for a loss that is no scalar.
        TypeError: for chunks that can be read only once, for features or a loss that are no tensor of real floats, and
            for parameters that are one tensor or a module.
        RuntimeError: under `torch.no_grad()`.
    """
    if not torch.is_grad_enabled():
        raise RuntimeError("accumulate_exact must be called with gradients enabled, got it under no_grad()")
    if not isinstance(chunks, Sized):  # they are read twice
        raise TypeError(f"chunks must be a sequence, got {type(chunks).__name__}")
    if not len(chunks):
        raise ValueError("chunks must hold at least one, got none")
    parameters = [p for p in _checked_parameters(parameters) if p.requires_grad]
    features, random_states = _encode_without_graph(encoder, chunks)
    everything = torch.cat(features).requires_grad_()
    loss = loss_fn(everything)
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}")
    if loss.is_complex():
        raise TypeError(f"loss_fn must return a real number, got {loss.dtype}")
    if loss.dim() != 0:
        raise ValueError(f"loss_fn must return a scalar, got {list(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError("loss_fn must depend on the features it is given, got a loss without their gradient")
    grad_features, *grad_parameters = torch.autograd.grad(loss, [everything, *parameters], allow_unused=True)
    if grad_features is None:
        raise ValueError("loss_fn must depend on the features it is given, got a loss without their gradient")
    used = [(p, g) for p, g in zip(parameters, grad_parameters, strict=True) if g is not None]
    after_loss = _random_state()

    drift = torch.zeros((), dtype=_checks.accumulator(everything), device=everything.device)
    parts = zip(chunks, features, random_states, grad_features.split([len(x) for x in features]), strict=True)
    for i, (chunk, first, state, grad) in enumerate(parts):
        last = i == len(chunks) - 1
        _set_random_state(state)
        with nullcontext() if last else _without_sync(encoder):
            again = _encode(encoder, chunk)
            if not again.requires_grad:
                raise ValueError("encoder must give features with a gradient, got a frozen one")
            roots = [(again, grad), *(used if last else [])]
            torch.autograd.backward([root for root, _ in roots], [g for _, g in roots])
        if len(first):
            again, first = again.detach().to(drift.dtype), first.to(drift.dtype)  # half precision takes 1e-30 for 0
            # What is not finite both times is the same: a training that diverges shows it in its loss.
            lost = ~(again.isfinite() | first.isfinite())
            change, largest = (again - first).masked_fill(lost, 0).abs().amax(), first.nan_to_num(0, 0, 0).abs().amax()
            drift = torch.maximum(drift, change / largest.clamp(min=1e-30))
    _set_random_state(after_loss)  # else the next step would draw what loss_fn has drawn in this one
    if not drift <= torch.finfo(everything.dtype).eps ** 0.5:  # more than kernels differ that add in another order
        raise ValueError(f"encoder must give the same features twice, got a difference of {drift.item():.3g}")
    return loss.detach()


def _checked_parameters(parameters: Iterable[Tensor]) -> list[Tensor]:
    # A tensor is an iterable too, of rows that no loss uses: it would end without a gradient, and without a word.
    if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        raise TypeError(f"parameters must be several tensors, as in a list, got {type(parameters).__name__}")
    parameters = list(parameters)
    for p in parameters:
        if not isinstance(p, Tensor):
            raise TypeError(f"parameters must hold tensors alone, got {type(p).__name__}")
    return list(dict.fromkeys(parameters))  # each once, else its gradient is added for every entry


def _encode(encoder: Callable[..., Tensor], chunk: Any) -> Tensor:
    features = encoder(*chunk) if isinstance(chunk, (tuple, list)) else encoder(chunk)
    if not isinstance(features, Tensor):
        raise TypeError(f"encoder must return a tensor, got {type(features).__name__}")
    if not features.is_floating_point():
        raise TypeError(f"encoder must return real floats, got {features.dtype}")
    if features.dim() == 0:
        raise ValueError("encoder must return features [n, ...], got []")
    return features


@torch.no_grad()
def _encode_without_graph(encoder: Callable[..., Tensor], chunks: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
    """Every chunk's features, and the random state each started from."""
    features, states = [], []
    with _unchanged(encoder), _without_sync(encoder):
        for chunk in chunks:
            states.append(_random_state())
            features.append(_encode(encoder, chunk))
    return features, states


@contextmanager
def _unchanged(encoder: Callable) -> Iterator[None]:
    """Put back a module's buffers, and whether DDP's next forward will have those of rank 0, as the first one here may
    have had: both passes then begin with the same.
    """
    modules = encoder.modules() if isinstance(encoder, nn.Module) else ()
    buffers = [(module, name, x) for module in modules for name, x in module._buffers.items() if x is not None]
    before = [x.clone() for _, _, x in buffers]
    broadcasts = [(ddp, ddp.require_forward_param_sync) for ddp in _ddp_modules(encoder)]
    try:
        yield
    finally:
        for (module, name, x), value in zip(buffers, before, strict=True):
            module._buffers[name] = x.copy_(value)  # put back too, for a forward may have assigned another tensor
        for ddp, due in broadcasts:
            ddp.require_forward_param_sync = due


@contextmanager
def _without_sync(encoder: Callable) -> Iterator[None]:
    with ExitStack() as stack:
        for ddp in _ddp_modules(encoder):
            stack.enter_context(ddp.no_sync())
        yield


def _ddp_modules(encoder: Callable) -> list[DistributedDataParallel]:
    """The encoder itself, or those inside it: `torch.compile` wraps them too."""
    modules = encoder.modules() if isinstance(encoder, nn.Module) else ()
    return [module for module in modules if isinstance(module, DistributedDataParallel)]


def _random_state() -> tuple[Tensor, list[Tensor]]:
    """Of the CPU and of every GPU: an encoder need not be on the current one."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
