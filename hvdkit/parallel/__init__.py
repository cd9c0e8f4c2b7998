"""Layer-sharded model parallelism: mesh, partition, pipeline; no framework is imported."""
