"""The gradients of known models, as lists of shapes, in the order in which layers are made.

A width scales every inner dimension, so that a machine with little memory has the same number of
tensors, of the same proportions.
"""

from __future__ import annotations

import numpy as np

from hvdkit.engine.bucketing import Gradient

Shape = tuple[int, ...]


def resnet50(width: float = 1.0) -> list[Shape]:
    """Return ResNet-50's 161 gradients: 25.6 million parameters at width 1.

    [He et al., Deep Residual Learning, CVPR 2016, table 1; bottlenecks of 3, 4, 6, 3 blocks.]
    """

    def wide(channels: int) -> int:
        return max(1, round(channels * width))

    def convolution(out: int, into: int, kernel: int) -> list[Shape]:
        return [(out, into, kernel, kernel), (out,), (out,)]  # with its batch norm

    shapes = convolution(wide(64), 3, 7)
    into = wide(64)
    for stage, blocks in enumerate((3, 4, 6, 3)):
        middle, out = wide(64 * 2**stage), wide(256 * 2**stage)
        for block in range(blocks):
            shapes += convolution(middle, into, 1) + convolution(middle, middle, 3)
            shapes += convolution(out, middle, 1)
            if block == 0:
                shapes += convolution(out, into, 1)  # of the shortcut
            into = out
    return [*shapes, (1000, into), (1000,)]


def gpt2_small(width: float = 1.0) -> list[Shape]:
    """Return GPT-2 small's 148 gradients: 124 million parameters at width 1, its head tied.

    [Radford et al., Language Models are Unsupervised Multitask Learners, 2019, table 2.]
    """
    d = max(1, round(768 * width))
    shapes: list[Shape] = [(50257, d), (1024, d)]
    for _ in range(12):
        shapes += [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,)]
        shapes += [(d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [*shapes, (d,), (d,)]


#: By name, with the width that is taken for a machine of few cores.
MODELS = {"ResNet-50": (resnet50, 0.5), "GPT-2 small": (gpt2_small, 0.25)}


def gradients_of(shapes: list[Shape]) -> list[Gradient]:
    """Return what a plan of buckets needs to know."""
    return [
        Gradient(f"gradient.{number}", shape, np.dtype(np.float32))
        for number, shape in enumerate(shapes)
    ]


def bytes_of(shapes: list[Shape]) -> int:
    return 4 * sum(int(np.prod(shape)) for shape in shapes)
