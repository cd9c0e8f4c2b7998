"""`Compression` for tensors of TensorFlow; see `hvdkit.engine.compression.choices`."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from hvdkit.dtypes import bfloat16
from hvdkit.engine import compression as core
from hvdkit.engine.compression import choices
from hvdkit.engine.compression.choices import TensorCompressor as Compressor


class FP16Compressor(Compressor):
    """Floating-point tensors travel as float16."""

    bucket: core.Compressor = core.Cast(np.dtype(np.float16))

    @staticmethod
    def compress(tensor: tf.Tensor) -> tuple[tf.Tensor, tf.DType]:
        return _cast(tensor, tf.float16)

    @staticmethod
    def decompress(tensor: tf.Tensor, ctx: tf.DType) -> tf.Tensor:
        return tf.cast(tensor, ctx)


class BF16Compressor(Compressor):
    """Floating-point tensors travel as bfloat16."""

    bucket: core.Compressor = core.Cast(bfloat16)

    @staticmethod
    def compress(tensor: tf.Tensor) -> tuple[tf.Tensor, tf.DType]:
        return _cast(tensor, tf.bfloat16)

    @staticmethod
    def decompress(tensor: tf.Tensor, ctx: tf.DType) -> tf.Tensor:
        return tf.cast(tensor, ctx)


class Compression(choices.Compression):
    """The compressors there are."""

    fp16 = FP16Compressor
    bf16 = BF16Compressor


def _cast(tensor: tf.Tensor, dtype: tf.DType) -> tuple[tf.Tensor, tf.DType]:
    return (tf.cast(tensor, dtype) if tensor.dtype.is_floating else tensor), tensor.dtype
