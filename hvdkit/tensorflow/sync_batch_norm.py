"""Batch normalisation of Keras whose batch is that of all ranks together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from hvdkit.api import communicator, context, is_initialized
from hvdkit.dtypes import Sum
from hvdkit.errors import UnsupportedError
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.tensorflow.all_reduce import allreduce


@keras.saving.register_keras_serializable(package="hvdkit")
class SyncBatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    """`keras.layers.BatchNormalization` over the batches of all ranks, joined.

    While it normalises by the batch, which is in training, every rank must call it, and compute
    gradients: each is collective and blocking.  A rank's batch may have any number of rows or
    unmasked positions, also none.  Inference is local.  On one rank it is BatchNormalization.

    Outputs, input gradients and moving statistics are those of BatchNormalization on the joined
    batch, the moving statistics bitwise the same on all ranks that began alike.  Gradients of
    `gamma` and `beta` are the sums over this rank's batch; `DistributedOptimizer` combines them as
    it does all others.  float16 and bfloat16 are computed in float32; what is exchanged is float64.

    Args:
        args, kwargs: BatchNormalization's.
        fused: nothing but False, Horovod's only choice.
        process_set: whose ranks' batches are joined, or these ranks; it must be known when the
            layer is called.

    Raises:
        UnsupportedError: `fused`, or Keras computes with something other than TensorFlow.
        MismatchError: on every rank, if they differ in the number of channels.

    Source: Ioffe & Szegedy 2015, section 3.
    """

    def __init__(
        self,
        *args: Any,
        fused: bool | None = False,
        process_set: ProcessSet | Sequence[int] = global_process_set,
        **kwargs: Any,
    ) -> None:
        if fused is not False:
            raise UnsupportedError("SyncBatchNormalization has no fused kernel: leave fused out")
        if keras.backend.backend() != "tensorflow":
            raise UnsupportedError(
                "hvdkit.tensorflow.SyncBatchNormalization needs Keras's TensorFlow backend, not "
                f"{keras.backend.backend()!r}"
            )
        super().__init__(*args, **kwargs)
        self.supports_jit = False  # XLA cannot compile what communicates
        if not isinstance(process_set, ProcessSet):
            known = context().process_sets.find(process_set) if is_initialized() else None
            process_set = known or ProcessSet(process_set)
        self.process_set: ProcessSet = process_set

    def get_config(self) -> dict[str, Any]:
        """Return what makes an equal layer; a process set as its ranks."""
        config: dict[str, Any] = super().get_config()
        if self.process_set is not global_process_set:
            config["process_set"] = list(self.process_set.ranks or ())
        return config

    def _moments(self, inputs: tf.Tensor, mask: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Return mean and biased variance of each channel over the joined batch.

        With n values of mean m and sum of squared deviations M on a rank, the sums over ranks of
        n, n m and M + n m^2 give both.  In float64 the difference of squares leaves a variance of
        float32 inputs as exact as they are; and one all-reduce each way does.
        """
        if communicator(self.process_set).size == 1:
            found: tuple[tf.Tensor, tf.Tensor] = super()._moments(inputs, mask)
            return found
        count, mean, deviation = _local_moments(inputs, mask, self._reduction_axes)
        mine = tf.stack([count, count * mean, deviation + count * mean**2])
        total = allreduce(mine, op=Sum, name="sync_batch_norm", process_set=self.process_set)
        mean = tf.math.divide_no_nan(total[1], total[0])
        # Rounding must not leave a constant channel a negative variance.
        variance = tf.maximum(tf.math.divide_no_nan(total[2], total[0]) - mean**2, 0.0)
        return tf.cast(mean, inputs.dtype), tf.cast(variance, inputs.dtype)


def _local_moments(
    inputs: tf.Tensor, mask: Any, axes: Sequence[int]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return each channel's number of values, their mean and sum of squared deviations: float64.

    Zeros where there are no values.

    Args:
        inputs: this rank's batch, float32 or float64.
        mask: true where a position counts, of `inputs`'s shape without the last dimension; or None.
        axes: all but the channels'.
    """
    kept = None if mask is None else tf.cast(mask, tf.bool)[..., None]
    counted = inputs if kept is None else tf.where(kept, inputs, 0)
    count = _count(inputs, kept, axes)
    total = tf.reduce_sum(counted, axes, keepdims=True)
    mean = tf.math.divide_no_nan(total, tf.cast(count, inputs.dtype))
    # What does not count becomes the mean, not 0 after the difference: it may be a NaN.
    counted = inputs if kept is None else tf.where(kept, inputs, mean)
    deviation = tf.reduce_sum(tf.math.squared_difference(counted, mean), axes)
    found = [tf.squeeze(count, axes), tf.squeeze(mean, axes), deviation]
    counts, means, deviations = (tf.cast(tensor, tf.float64) for tensor in found)
    return counts, means, deviations


def _count(inputs: tf.Tensor, kept: tf.Tensor | None, axes: Sequence[int]) -> tf.Tensor:
    """Return each channel's number of values, int64, with `inputs`'s number of dimensions."""
    if kept is None:
        shape = tf.shape(inputs, tf.int64)
        ones = tf.ones([1 if axis in axes else n for axis, n in enumerate(inputs.shape)], tf.int64)
        return ones * tf.reduce_prod(tf.gather(shape, axes))
    everywhere = tf.broadcast_to(kept, tf.shape(inputs))
    return tf.math.count_nonzero(everywhere, axes, keepdims=True)
