"""Computes the stages of a rank, microbatch by microbatch, with autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from hvdkit.errors import ArgumentError
from hvdkit.parallel.pipeline.executor import Bundle
from hvdkit.torch.collectives import apply_function
from hvdkit.torch.convert import array_of, tensor_of
from hvdkit.torch.pipeline.deferred import Deferral
from hvdkit.torch.pipeline.layers import Pop, Stash

#: Of a microbatch's output and target, the loss.
Loss = Callable[[Any, Any], torch.Tensor]


@dataclass
class Stage:
    """Some layers in a row.

    Args:
        layers: by their place among all.
        arriving: skip connections that end here and begin in another stage.
        leaving: those that begin here and end in another.
    """

    layers: Mapping[int, torch.nn.Module]
    arriving: tuple[str, ...] = ()
    leaving: tuple[str, ...] = ()


@dataclass
class Microbatch:
    """What the ends of the pipeline are given of a microbatch, and make of it."""

    inputs: Any
    target: Any = None
    weight: float = 1.0
    """Of its loss in that of the whole batch."""
    loss: torch.Tensor | None = None
    output: Any = None


@dataclass
class _Held:
    """What is held of a microbatch in a stage, from forward to backward."""

    inputs: dict[str, list[torch.Tensor]]
    outputs: dict[str, list[torch.Tensor]]
    loss: torch.Tensor | None
    deferral: Deferral | None = None


@dataclass
class TorchWorker:
    """Computes stages.

    Args:
        stages: of this rank, by number.
        last: number of the last stage of all.
        loss: of output and target; None where the pipeline only predicts.
        recompute: whether activations are computed again in backward, layer by layer.
        deferred: whether the gradients of weights come later.
        training: whether there will be a backward.
        scale: multiplies the losses before backward.
        device: where to compute.
    """

    stages: Mapping[int, Stage]
    last: int
    loss: Loss | None
    recompute: bool = False
    deferred: bool = False
    training: bool = True
    scale: Callable[[torch.Tensor], torch.Tensor] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    microbatches: Sequence[Microbatch] = ()
    _held: dict[tuple[int, int], _Held] = field(default_factory=dict)

    def forward(self, stage: int, microbatch: int, inputs: dict[str, Bundle]) -> dict[str, Bundle]:
        given = self.microbatches[microbatch]
        leaves = {label: [self._leaf(a) for a in bundle] for label, bundle in inputs.items()}
        entering = {label: _unpacked(tensors) for label, tensors in leaves.items()}
        x = given.inputs if stage == 0 else entering[""]
        deferral = Deferral() if self.training and self.deferred else None
        with deferral or nullcontext(), torch.set_grad_enabled(self.training):
            x, leaving = self._compute(self.stages[stage], x, entering, deferral)
            if stage == self.last:
                given.output = x
                if self.loss is not None and given.target is not None:
                    given.loss = self.loss(x, given.target) * given.weight
        if stage != self.last:
            leaving[""] = _packed(x)
        if self.training:
            self._held[stage, microbatch] = _Held(leaves, leaving, given.loss, deferral)
            given.output = None
        return {
            label: [array_of(tensor.detach().contiguous().cpu()) for tensor in tensors]
            for label, tensors in leaving.items()
        }

    def _leaf(self, array: Any) -> torch.Tensor:
        tensor = tensor_of(array).to(self.device)
        has_gradient = tensor.is_floating_point() or tensor.is_complex()
        return tensor.requires_grad_(self.training and has_gradient)

    def _compute(
        self,
        stage: Stage,
        x: Any,
        entering: Mapping[str, Any],
        deferral: Deferral | None,
    ) -> tuple[Any, dict[str, list[torch.Tensor]]]:
        """Return what the layers make of `x`, and what leaves the stage by skip connections."""
        stashed = {name: entering[name] for name in stage.arriving}
        for layer in stage.layers.values():
            if isinstance(layer, Stash):
                stashed[layer.name] = x
            elif isinstance(layer, Pop):
                x = layer(x, stashed.pop(layer.name))
            else:
                x = self._call(layer, x, deferral)
        return x, {name: _packed(stashed[name]) for name in stage.leaving}

    def _call(self, layer: torch.nn.Module, x: Any, deferral: Deferral | None) -> Any:
        arguments = x if isinstance(x, tuple) else (x,)
        if not (self.recompute and self.training):
            return layer(*arguments)
        again = deferral or nullcontext()  # what is put off is put off the second time as well
        return checkpoint(
            layer, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), again)
        )

    def backward(
        self, stage: int, microbatch: int, gradients: dict[str, Bundle], *, weights: bool
    ) -> dict[str, Bundle]:
        held = self._held[stage, microbatch]
        ends: list[torch.Tensor] = []
        seeds: list[torch.Tensor | None] = []
        if held.loss is not None:
            ends.append(self.scale(held.loss) if self.scale else held.loss)
            seeds.append(None)
        for label, bundle in gradients.items():
            for tensor, array in zip(held.outputs[label], bundle, strict=True):
                if array is not None and tensor.requires_grad:
                    ends.append(tensor)
                    seeds.append(tensor_of(array).to(tensor.device, tensor.dtype))
        if ends:
            torch.autograd.backward(ends, seeds)
        if weights or held.deferral is None:
            self._weights(held)
            del self._held[stage, microbatch]
        else:
            held.outputs, held.loss = {}, None
        results: dict[str, Bundle] = {
            label: [
                None if tensor.grad is None else array_of(tensor.grad.contiguous().cpu())
                for tensor in tensors
            ]
            for label, tensors in held.inputs.items()
        }
        held.inputs = {}
        return results

    def backward_weight(self, stage: int, microbatch: int) -> None:
        held = self._held.pop((stage, microbatch), None)
        if held is not None:
            self._weights(held)

    def _weights(self, held: _Held) -> None:
        if held.deferral is not None:
            held.deferral.compute()

    def forget(self) -> None:
        """Let go of what an error left behind."""
        self._held.clear()


class _Entrance(torch.autograd.Function):
    """Lets a leaf into a stage as a tensor that layers may change in place, as they may no leaf."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor) -> torch.Tensor:
        del ctx
        return leaf.data

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        del ctx
        return gradients[0]


def _packed(x: Any) -> list[torch.Tensor]:
    """Return the tensors that go along an edge.

    Raises:
        ArgumentError: a layer returned something else.
    """
    tensors = list(x) if isinstance(x, tuple | list) else [x]
    others = [type(each).__name__ for each in tensors if not isinstance(each, torch.Tensor)]
    if others:
        raise ArgumentError(
            f"between stages go tensors, and tuples of them, not what a layer returned: {others[0]}"
        )
    return tensors


def _unpacked(leaves: list[torch.Tensor]) -> Any:
    """Return what the layers of a stage get: a tensor, or a tuple of several."""
    tensors = [apply_function(_Entrance, leaf) if leaf.requires_grad else leaf for leaf in leaves]
    return tensors[0] if len(tensors) == 1 else tuple(tensors)
