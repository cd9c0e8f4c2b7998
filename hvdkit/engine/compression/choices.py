"""`Compression`, as an adapter shows it: what gradients may travel as instead of themselves.

``none``, ``fp16`` and ``bf16`` serve every collective and the optimizer; the last two are casts,
which an adapter adds.  ``int8``, ``topk(ratio)`` and ``powersgd(rank)`` carry what they lose over
to the next step, so they are for the optimizer.  A class of one's own with Horovod's two functions
is taken by both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hvdkit.engine.compression.base import Compressor, NoCompression
from hvdkit.engine.compression.int8 import Int8
from hvdkit.engine.compression.powersgd import PowerSGD
from hvdkit.engine.compression.topk import TopK
from hvdkit.errors import ArgumentError


class TensorCompressor:
    """Base of compressors of single tensors, as Horovod has it.  Tensors are the framework's."""

    @staticmethod
    def compress(tensor: Any) -> tuple[Any, Any]:
        """Return what is to travel, and whatever `decompress` needs."""
        raise NotImplementedError

    @staticmethod
    def decompress(tensor: Any, ctx: Any) -> Any:
        """Return the tensor of which this was made."""
        raise NotImplementedError


class NoneCompressor(TensorCompressor):
    """Tensors travel as they are."""

    bucket: Compressor = NoCompression()

    @staticmethod
    def compress(tensor: Any) -> tuple[Any, Any]:
        return tensor, None

    @staticmethod
    def decompress(tensor: Any, ctx: Any) -> Any:
        del ctx
        return tensor


@dataclass(frozen=True, repr=False)
class BucketCompressor:
    """A compressor of the core, which the optimizer applies to whole buckets."""

    bucket: Compressor

    def compress(self, tensor: Any) -> tuple[Any, Any]:
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
    """The compressors that need no framework; an adapter adds ``fp16`` and ``bf16``."""

    none = NoneCompressor
    int8 = BucketCompressor(Int8())

    @staticmethod
    def topk(ratio: float) -> BucketCompressor:
        """Send the elements of largest magnitude: this share of them, above 0 to 1."""
        return BucketCompressor(TopK(ratio))

    @staticmethod
    def powersgd(rank: int) -> BucketCompressor:
        """Send each matrix as a product of two thin ones, `rank` columns each."""
        return BucketCompressor(PowerSGD(rank))


def bucket_compressor(compression: Any) -> Compressor | None:
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
    found: Compressor | None = vars(kind).get("bucket")
    return found
