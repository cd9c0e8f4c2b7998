"""Batch normalisation whose batch is that of all ranks together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from hvdkit.api import communicator
from hvdkit.dtypes import Sum
from hvdkit.errors import ArgumentError, UnsupportedError, describe_by_rank
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.torch.all_reduce import allreduce_
from hvdkit.torch.collectives import apply_function
from hvdkit.torch.movements import allgather

_batch_norm_backward = torch.ops.aten.native_batch_norm_backward


@dataclass(frozen=True)
class _Peers:
    """The ranks that share their statistics; all of this module's communication is here."""

    process_set: ProcessSet

    def count(self) -> int:
        return communicator(self.process_set).size

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """Return the 1-D `row` of every rank, one below the other."""
        return allgather(row[None], "sync_batch_norm.forward", self.process_set)

    def total(self, sums: torch.Tensor) -> torch.Tensor:
        """Replace `sums` by the sum of all ranks', and return it."""
        name = "sync_batch_norm.backward"
        return allreduce_(sums, op=Sum, name=name, process_set=self.process_set)


class SyncBatchNorm(_BatchNorm):
    """`torch.nn.BatchNorm1d`, `2d` or `3d` over the batches of all ranks, joined.

    While it normalises by the batch (in training; in evaluation too without
    `track_running_stats`), every rank must call it, and run backward: each is collective and
    blocking.  A rank's batch may have any number of rows, also none.  Evaluation by running
    statistics is local.  On one rank it is BatchNorm.

    Outputs, input gradients and running statistics are those of BatchNorm on the joined batch, the
    running statistics bitwise the same on all ranks.  Gradients of `weight` and `bias` are the sums
    over this rank's batch; `DistributedOptimizer` combines them as it does all others.

    Args:
        num_features: channels, C in inputs ``(N, C, ...)``.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics; None: that of a plain mean.
        affine: whether to learn `weight` and `bias`, shape ``(C,)``.
        track_running_stats: whether to keep running statistics, and evaluate by them.
        process_set: the ranks whose batches are joined.

    Inputs are floating-point, of any strides and any number of dimensions from 2.  float16 and
    bfloat16 are computed in float32; what is exchanged is float64.

    Raises:
        ArgumentError: the input is not ``(N, C, ...)``; or, on every rank, the ranks together have
            only one value a channel.
        UnsupportedError: the input is not floating-point.
        MismatchError: on every rank, if they differ in `num_features`.

    Source: Ioffe & Szegedy 2015, section 3; for the statistics Chan, Golub & LeVeque 1979.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_set: ProcessSet = global_process_set,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self._peers = _Peers(process_set)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return `input` normalised, in its dtype.  Collective where it goes by the batch."""
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        if not by_batch or self._peers.count() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        with torch.no_grad():
            batch = combine(self._peers.gather(local_statistics(input)))
            if self.training and self.track_running_stats:
                self._track(batch)
        output: torch.Tensor = apply_function(
            _Normalize, input, self.weight, self.bias, batch, self.eps, self._peers
        )
        return output

    @classmethod
    def convert_sync_batchnorm(
        cls, module: torch.nn.Module, process_set: ProcessSet = global_process_set
    ) -> torch.nn.Module:
        """Replace every BatchNorm in `module` by a SyncBatchNorm.  Local.

        The layers keep their parameters and running statistics: the same tensors, which an
        optimizer may know already.

        Returns:
            `module`, changed in place; or its replacement, if it is a BatchNorm itself.
        """
        converted = module
        if isinstance(module, _BatchNorm):
            converted = cls(
                module.num_features,
                module.eps,
                module.momentum,
                module.affine,
                module.track_running_stats,
                process_set,
            )
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                setattr(converted, name, getattr(module, name))
            converted.training = module.training
        for name, child in module.named_children():
            converted.add_module(name, cls.convert_sync_batchnorm(child, process_set))
        return converted

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ArgumentError(
                f"SyncBatchNorm({self.num_features}) takes inputs of shape "
                f"(N, {self.num_features}, ...), not {tuple(input.shape)}"
            )
        if not input.is_floating_point():
            raise UnsupportedError(
                f"SyncBatchNorm takes floating-point inputs, not {input.dtype}: "
                "call .float() on the input"
            )

    def _track(self, batch: Statistics) -> None:
        """Let the running statistics follow `batch`, as BatchNorm does."""
        factor = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        if batch.count == 0:
            return
        unbiased = batch.variance * (batch.count / (batch.count - 1))
        for running, value in ((self.running_mean, batch.mean), (self.running_var, unbiased)):
            if running is not None:
                running.copy_(running.double().lerp(value, factor))


@dataclass(frozen=True)
class Statistics:
    """Of each channel over a whole batch: `mean` and biased `variance` are float64 ``(C,)``."""

    count: int
    mean: torch.Tensor
    variance: torch.Tensor


def local_statistics(x: torch.Tensor) -> torch.Tensor:
    """Return `x`'s values a channel, their means and sums of squared deviations: ``(1 + 2C,)``.

    Float64, on `x`'s device.  Zeros where `x` ``(N, C, ...)`` is empty.
    """
    channels = x.shape[1]
    row = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=x.device)
    if x.numel() > 0:
        count = x.numel() // channels
        # Running statistics of momentum 0 stay as they are; their dtype is that of the results.
        unused = torch.zeros(channels, dtype=_statistics_dtype(x), device=x.device)
        mean, variance = torch.batch_norm_update_stats(x, unused, unused, 0.0)
        row[0] = count
        row[1 : 1 + channels] = mean
        row[1 + channels :] = variance.double() * count
    return row


def combine(rows: torch.Tensor) -> Statistics:
    """Return the statistics of the joined batch from `local_statistics` of its parts.

    With n values of mean m and sum of squared deviations M a part, in float64, in order of parts:
    mean = sum(n m) / sum(n), and sum(M + n (m - mean)^2) is the joined M.  [Chan et al. 1979,
    STAN-CS-79-773, for two parts]  No square of a mean occurs, so none has to cancel.

    Args:
        rows: float64 ``(parts, 1 + 2C)``.

    Raises:
        ArgumentError: there is one value a channel, which has no variance.
    """
    channels = rows.shape[1] // 2
    counts, means, deviations = rows[:, :1], rows[:, 1 : 1 + channels], rows[:, 1 + channels :]
    count = int(counts.sum())
    if count == 1:
        values = {rank: str(int(n)) for rank, n in enumerate(counts[:, 0].tolist())}
        raise ArgumentError(
            "SyncBatchNorm: all ranks together have 1 value per channel; a variance takes 2\n"
            f"{describe_by_rank(values)}\nGive the ranks a larger batch."
        )
    divisor = max(count, 1)  # of an empty batch all is zero
    mean = (counts * means).sum(0) / divisor
    deviation = (deviations + counts * (means - mean).square()).sum(0)
    return Statistics(count, mean, deviation / divisor)


class _Normalize(torch.autograd.Function):
    """Normalise by statistics that depend on the inputs of all ranks.

    With g the output's gradient, x^ the normalised input and <> the mean over the joined batch, the
    input's gradient is ``weight * (g - <g> - x^ <g x^>) / sqrt(variance + eps)``.
    [Ioffe & Szegedy 2015, section 3]
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        batch: Statistics,
        eps: float,
        peers: _Peers,
    ) -> torch.Tensor:
        dtype = _statistics_dtype(x)
        mean, variance = batch.mean.to(dtype), batch.variance.to(dtype)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.count, ctx.eps, ctx.peers = batch.count, eps, peers
        ctx.bias_dtype = None if bias is None else bias.dtype
        scale = None if weight is None else weight.to(dtype)
        shift = None if bias is None else bias.to(dtype)
        return torch.nn.functional.batch_norm(x, mean, variance, scale, shift, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        dot, plain = _gradient_sums(x, gradient, mean, variance, eps=ctx.eps)
        results: list[torch.Tensor | None] = [None] * 6
        if ctx.needs_input_grad[1]:
            results[1] = dot.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            results[2] = plain.to(ctx.bias_dtype)
        if ctx.needs_input_grad[0]:
            sums = ctx.peers.total(torch.cat([dot, plain]).double())
            mean_dot, mean_plain = (sums / max(ctx.count, 1)).chunk(2)
            scale = (variance.double() + ctx.eps).rsqrt()
            if weight is not None:
                scale = scale * weight
            # Two passes over the data: -scale * (x^ <g x^> + <g>), which is a normalisation
            # again, then + scale * g.  In float32 at least, rounded once.
            input_gradient = torch.nn.functional.batch_norm(
                x.to(mean.dtype),
                mean,
                variance,
                (-scale * mean_dot).to(mean.dtype),
                (-scale * mean_plain).to(mean.dtype),
                eps=ctx.eps,
            )
            scale = scale.to(mean.dtype).reshape(-1, *[1] * (x.dim() - 2))
            results[0] = input_gradient.addcmul_(gradient, scale).to(x.dtype)
        return tuple(results)


def _gradient_sums(
    x: torch.Tensor,
    gradient: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    *,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's sums of ``gradient * x^`` and of `gradient`, each ``(C,)``."""
    if x.numel() == 0:  # on which torch's kernel divides by zero
        return torch.zeros_like(mean), torch.zeros_like(mean)
    _, dot, plain = _batch_norm_backward(
        gradient, x, None, mean, variance, None, None, False, eps, [False, True, True]
    )
    return dot, plain


def _statistics_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
