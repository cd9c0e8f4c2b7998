"""hvdkit for TensorFlow: ``import hvdkit.tensorflow as hvd``, not ``horovod.tensorflow``."""
