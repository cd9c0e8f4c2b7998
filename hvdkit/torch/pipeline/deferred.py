"""Gradients of weights later than those of inputs, as zero-bubble schedules want it.

The linear layers hold nearly all of a transformer's weights.  While `Deferral` is in force,
``torch.nn.functional.linear`` computes no gradient of its weight and bias in backward, but keeps
what that takes; `Deferral.compute` does the rest.  Every other operation's gradients come at once.
[Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024, section 2; their WeightGradStore]
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Deferral(TorchFunctionMode):
    """Puts off the weights' gradients of the linear layers that are called while it is in force."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and torch.is_grad_enabled():
            x, weight, bias = _arguments(*args, **kwargs)
            if isinstance(weight, torch.nn.Parameter) and weight.requires_grad:
                return _Linear.apply(x, weight, bias, self)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)

    def keep(
        self, x: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor, bias: Any
    ) -> None:
        """Keep what the gradients of a weight and its bias are computed from."""
        self._kept.append((x, gradient, weight, bias))

    def compute(self) -> None:
        """Compute what was put off, as backward would have: hooks see it, once a parameter."""
        kept, self._kept = self._kept, []
        sums: dict[torch.Tensor, torch.Tensor] = {}
        for x, gradient, weight, bias in kept:
            rows, outputs = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
            _add(sums, weight, outputs.t() @ rows)
            if bias is not None and bias.requires_grad:
                _add(sums, bias, outputs.sum(0))
        if sums:
            torch.autograd.backward(list(sums), list(sums.values()))


def _add(sums: dict[torch.Tensor, torch.Tensor], key: torch.Tensor, value: torch.Tensor) -> None:
    value = value.to(key.dtype)
    sums[key] = sums[key] + value if key in sums else value


class _Linear(torch.autograd.Function):
    """A linear layer whose backward knows the input's gradient alone."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any, deferral: Deferral
    ) -> torch.Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:  # which it leaves alone
            x = x.to(torch.get_autocast_dtype(kind))
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        ctx.weight, ctx.bias, ctx.deferral = weight, bias, deferral
        with torch.autocast(kind, enabled=False):
            return torch.nn.functional.linear(x, cast, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, cast = ctx.saved_tensors
        ctx.deferral.keep(x, gradients[0], ctx.weight, ctx.bias)
        return gradients[0] @ cast, None, None, None


def _arguments(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> tuple[Any, Any, Any]:
    return x, weight, bias
