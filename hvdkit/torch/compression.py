"""`Compression` for tensors of PyTorch; see `hvdkit.engine.compression.choices`."""

from __future__ import annotations

import numpy as np
import torch

from hvdkit.dtypes import bfloat16
from hvdkit.engine import compression as core
from hvdkit.engine.compression import choices
from hvdkit.engine.compression.choices import TensorCompressor as Compressor
from hvdkit.errors import ArgumentError


class FP16Compressor(Compressor):
    """Floating-point tensors travel as float16."""

    bucket: core.Compressor = core.Cast(np.dtype(np.float16))

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
        return _cast(tensor, torch.float16)

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: torch.dtype) -> torch.Tensor:
        return tensor.to(ctx)


class BF16Compressor(Compressor):
    """Floating-point tensors travel as bfloat16."""

    bucket: core.Compressor = core.Cast(bfloat16)

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
        return _cast(tensor, torch.bfloat16)

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: torch.dtype) -> torch.Tensor:
        return tensor.to(ctx)


class Compression(choices.Compression):
    """The compressors there are."""

    fp16 = FP16Compressor
    bf16 = BF16Compressor


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
