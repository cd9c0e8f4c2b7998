"""Layer-sharded model parallelism for PyTorch; see `PipelineModule`."""

from hvdkit.torch.pipeline.layers import Pop, Stash
from hvdkit.torch.pipeline.module import PipelineModule

__all__ = ["PipelineModule", "Pop", "Stash"]
