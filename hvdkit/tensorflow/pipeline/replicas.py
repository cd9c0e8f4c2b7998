"""Replicas: the ranks along ``data``, which have the same layers and train on other rows."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf

from hvdkit.dtypes import Average
from hvdkit.parallel.mesh import DATA, Mesh
from hvdkit.tensorflow.gradients import Reduction, Settings
from hvdkit.tensorflow.pipeline.worker import unique
from hvdkit.tensorflow.state import broadcast_variables


def start_alike(layers: Sequence[keras.layers.Layer], mesh: Mesh) -> Reduction:
    """Give the ranks along ``data`` the same weights; return what averages gradients there.

    Random layers draw from a state of their own on each: the rows are others.  Collective.
    """
    process_set = mesh.process_set(DATA)
    weights = [weight for layer in layers for weight in layer.weights]
    root = mesh.rank_at(**{DATA: 0})
    if weights:
        broadcast_variables(unique(weights), root, process_set)
    same = {id(weight) for weight in weights}
    for variable in unique([v for layer in layers for v in layer.variables]):
        if id(variable) not in same and variable.name == "seed_generator_state":
            place = tf.constant([mesh.place(DATA), 0], variable.dtype)
            variable.assign(variable.value + place)
    return Reduction(Settings.of(op=Average, process_set=process_set))
