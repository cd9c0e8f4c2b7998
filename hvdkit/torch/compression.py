"""`Compression`: what gradients may travel as instead of themselves.

``none``, ``fp16`` and ``bf16`` serve every collective and the optimizer.  ``int8``, ``topk(ratio)``
and ``powersgd(rank)`` carry what they lose over to the next step, so they are for the optimizer.  A
class of one's own with Horovod's two functions is taken by both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hvdkit.dtypes import bfloat16
from hvdkit.engine import compression as core
from hvdkit.errors import ArgumentError


class Compressor:
    """Base of compressors of one's own, as Horovod has it."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Return what is to travel, and whatever `decompress` needs."""
        raise NotImplementedError

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Return the tensor of which this was made."""
        raise NotImplementedError


class NoneCompressor(Compressor):
    """Tensors travel as they are."""

    bucket: core.Compressor = core.NoCompression()

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return tensor, None

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        del ctx
        return tensor


class FP16Compressor(Compressor):
    """Floating-point tensors travel as float16."""

    bucket: core.Compressor = core.Cast(np.dtype(np.float16))

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return _cast(tensor, torch.float16)

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        return tensor.to(ctx)


class BF16Compressor(Compressor):
    """Floating-point tensors travel as bfloat16."""

    bucket: core.Compressor = core.Cast(bfloat16)

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return _cast(tensor, torch.bfloat16)

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        return tensor.to(ctx)


class BucketCompressor:
    """A compressor of the core, which the optimizer applies to whole buckets."""

    def __init__(self, bucket: core.Compressor) -> None:
        self.bucket = bucket

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Refuse: there is nowhere to keep what would be lost.

        Raises:
            ArgumentError: always.
        """
        del tensor
        raise ArgumentError(
            f"{self.bucket} carries its error from step to step, which only DistributedOptimizer "
            "does; a single collective takes Compression.none, fp16 or bf16"
        )

    def __repr__(self) -> str:
        return repr(self.bucket)


class Compression:
    """The compressors there are."""

    none = NoneCompressor
    fp16 = FP16Compressor
    bf16 = BF16Compressor
    int8 = BucketCompressor(core.Int8())

    @staticmethod
    def topk(ratio: float) -> BucketCompressor:
        """Send the elements of largest magnitude: this share of them, above 0 to 1."""
        return BucketCompressor(core.TopK(ratio))

    @staticmethod
    def powersgd(rank: int) -> BucketCompressor:
        """Send each matrix as a product of two thin ones, `rank` columns each."""
        return BucketCompressor(core.PowerSGD(rank))


def bucket_compressor(compression: Any) -> core.Compressor | None:
    """Return the core's compressor; None for one that works on single tensors.

    Raises:
        ArgumentError: `compression` is no compressor.
    """
    if isinstance(compression, BucketCompressor):
        return compression.bucket
    if not (hasattr(compression, "compress") and hasattr(compression, "decompress")):
        raise ArgumentError(
            f"{compression!r} is no compressor: take one of Compression's, or a class with "
            "compress(tensor) and decompress(tensor, ctx)"
        )
    # Not what is inherited: a subclass compresses in its own way.
    kind = compression if isinstance(compression, type) else type(compression)
    found: core.Compressor | None = vars(kind).get("bucket")
    return found


def single_compressor(bucket: core.Compressor) -> type[Compressor]:
    """Return the compressor of single tensors that does what `bucket` does.

    Raises:
        ArgumentError: there is none.
    """
    for single in (Compression.none, Compression.fp16, Compression.bf16):
        if bucket == single.bucket:
            return single
    raise ArgumentError(f"Adasum takes Compression.none, fp16 or bf16, not {bucket}")


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.dtype]:
    return (tensor.to(dtype) if tensor.dtype.is_floating_point else tensor), tensor.dtype
