"""Gradient compression: what a bucket may travel as instead of itself."""

from hvdkit.engine.compression.base import BucketCodec, Compressor, NoCompression
from hvdkit.engine.compression.casts import Cast
from hvdkit.engine.compression.int8 import Int8
from hvdkit.engine.compression.powersgd import PowerSGD
from hvdkit.engine.compression.topk import TopK

__all__ = ["BucketCodec", "Cast", "Compressor", "Int8", "NoCompression", "PowerSGD", "TopK"]
