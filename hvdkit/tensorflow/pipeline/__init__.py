"""Layer-sharded model parallelism for Keras layers on TensorFlow; see `PipelineModel`."""

from hvdkit.tensorflow.pipeline.layers import Pop, Stash
from hvdkit.tensorflow.pipeline.model import PipelineModel

__all__ = ["PipelineModel", "Pop", "Stash"]
