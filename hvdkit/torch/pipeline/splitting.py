"""Which layers each rank gets: what layers take is counted, or measured in a dry run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hvdkit.api import context
from hvdkit.parallel import partition
from hvdkit.torch.pipeline.layers import Layer, Pop, Stash, made

#: Of a dry run, how often each layer is run; the quickest counts.
RUNS = 3


def counted(modules: Sequence[torch.nn.Module], *, state: float) -> list[partition.Layer]:
    """Return what layers take by their parameters.

    Args:
        modules: all layers; those without data (on the "meta" device) will do.
        state: what an optimizer keeps for each element of a parameter, in elements.
    """
    found = []
    for index, module in enumerate(modules):
        cost = sum(parameter.numel() for parameter in module.parameters())
        found.append(partition.Layer(cost, _bytes(module, state), name=_title(index, module)))
    return found


def measured(
    layers: Sequence[Layer], example: Any, *, state: float, seed: int, recompute: bool
) -> list[partition.Layer]:
    """Return what layers take by running each, forward and backward.  Collective.

    Rank 0 runs them, one after the other.

    Args:
        layers: of the model.
        example: a microbatch's input.
        state: as `counted` has it.
        seed: for the weights of layers that are yet to be made.
        recompute: whether of a layer's activations the input alone is held.
    """
    found = None
    if context().topology.rank == 0:
        found, stashed, x = [], {}, example
        for index, layer in enumerate(layers):
            module = made(layer, index, seed)
            if isinstance(module, Stash):
                stashed[module.name] = x
            arguments = x if isinstance(x, tuple) else (x,)
            if isinstance(module, Pop):
                arguments = (x, stashed.pop(module.name))
            with _left_as_it_is(module):
                seconds, activations, x = min(
                    (_run(module, arguments, recompute=recompute) for _ in range(RUNS)),
                    key=lambda run: run[0],
                )
            nbytes = _bytes(module, state)
            found.append(partition.Layer(seconds, nbytes, activations, _title(index, module)))
    shared: list[partition.Layer] = context().world.broadcast_object(found, 0, name="dry run")
    return shared


@contextmanager
def _left_as_it_is(module: torch.nn.Module) -> Iterator[None]:
    """Undo what running a layer does to its buffers, and to the state of random numbers."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with torch.random.fork_rng():
        yield
    for buffer, value in before:
        buffer.copy_(value)


def _run(
    module: torch.nn.Module, arguments: tuple[Any, ...], *, recompute: bool
) -> tuple[float, int, Any]:
    """Return seconds, bytes held for backward, and the output."""
    held: dict[int, int] = {}
    known = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaves = [_leaf(argument) for argument in arguments]
    began = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(*leaves)
    ends = output if isinstance(output, tuple | list) else (output,)
    wanted = [end for end in ends if isinstance(end, torch.Tensor) and end.requires_grad]
    if wanted:
        torch.autograd.backward(wanted, [torch.ones_like(end) for end in wanted])
    seconds = time.perf_counter() - began
    module.zero_grad(set_to_none=True)
    activations = sum(held.values())
    if recompute:
        activations = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
    detached = tuple(end.detach() if isinstance(end, torch.Tensor) else end for end in ends)
    return seconds, activations, detached if isinstance(output, tuple | list) else detached[0]


def _leaf(argument: Any) -> Any:
    if not isinstance(argument, torch.Tensor):
        return argument
    leaf = argument.detach().clone()
    return leaf.requires_grad_(leaf.dtype.is_floating_point)


def _bytes(module: torch.nn.Module, state: float) -> int:
    """Return the bytes of parameters, their gradients and optimizer state, and of buffers."""
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in module.parameters() if not p.requires_grad)
    return int(trained * (2 + state)) + frozen + sum(buffer.nbytes for buffer in module.buffers())


def _title(index: int, module: torch.nn.Module) -> str:
    return f"layers.{index} ({type(module).__name__})"
