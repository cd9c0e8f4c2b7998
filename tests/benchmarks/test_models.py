"""The lists of shapes are those of the models."""

import models
import numpy as np
import pytest


def parameters(shapes):
    return sum(int(np.prod(shape)) for shape in shapes)


def test_resnet50_has_the_parameters_that_it_is_known_for():
    shapes = models.resnet50()
    assert (len(shapes), parameters(shapes)) == (161, 25_557_032)


def test_gpt2_small_has_the_parameters_that_it_is_known_for():
    shapes = models.gpt2_small()
    assert (len(shapes), parameters(shapes)) == (148, 124_439_808)


@pytest.mark.parametrize("model", [models.resnet50, models.gpt2_small])
def test_a_narrow_model_has_as_many_tensors(model):
    assert [len(s) for s in model(0.25)] == [len(s) for s in model()]
    assert parameters(model(0.25)) < parameters(model()) / 3


def test_gradients_know_their_bytes():
    shapes = [(3, 5), (7,)]
    assert models.bytes_of(shapes) == 4 * sum(g.count for g in models.gradients_of(shapes)) == 88
