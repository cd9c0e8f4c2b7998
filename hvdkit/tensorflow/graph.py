"""Collectives where TensorFlow wants an op: called at once in eager mode, and from graphs.

In a graph each is a `tf.py_function`, so that there is nothing to compile against TensorFlow.
TensorFlow's executor runs whatever is ready; but ranks must call in one order, and one that waits
must not keep another from being called.  So all of them take the same resource, and TensorFlow runs
ops that share a resource in the order in which the program made them: through branches, loops
and functions called by functions.  [AutoControlDependencies in
tensorflow/python/framework/auto_control_deps.py]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import tensorflow as tf
from tensorflow.python.framework.func_graph import FuncGraph
from tensorflow.python.ops import control_flow_util

from hvdkit.errors import HvdkitError, UnsupportedError

#: Takes tensors that have values and returns such.
Function = Callable[..., Sequence[Any]]

F = TypeVar("F", bound=Callable[..., Any])

_order: list[tf.Variable] = []


def call(
    function: Function, tensors: Sequence[tf.Tensor], results: Sequence[tf.TensorSpec]
) -> list[tf.Tensor]:
    """Return ``function(*tensors)``: now, or in a graph whenever that is run.

    Args:
        function: is given tensors that have values, and returns such.
        tensors: its arguments.
        results: the dtype, and what is known of the shape, of each tensor that it returns.

    Raises:
        UnsupportedError: the graph is compiled by XLA, which cannot call Python.
    """
    if tf.executing_eagerly():
        return list(function(*tensors))
    _refuse_others()
    made = tf.py_function(
        lambda _, *values: function(*values),
        [_resource(), *tensors],
        [spec.dtype for spec in results],
    )
    if not results:
        return []
    for tensor, spec in zip(made, results, strict=True):
        tensor.set_shape(spec.shape)
    return list(made)


def in_xla() -> bool:
    """Return whether the graph that is being made is for XLA."""
    if tf.executing_eagerly():
        return False
    graph = tf.compat.v1.get_default_graph()
    return bool(control_flow_util.GraphOrParentsInXlaContext(graph))


def unconverted(function: F) -> F:
    """Keep AutoGraph out of a function, which has no branch or loop over tensors.

    Its errors come out of tf.function as what they are: AutoGraph would make them others.
    """

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except HvdkitError as exc:
            vars(exc)["ag_pass_through"] = True  # AutoGraph's own mark
            raise

    kept: F = tf.autograph.experimental.do_not_convert(wrapper)
    return kept


def _refuse_others() -> None:
    """Refuse the graphs in which Python cannot be called, or not in order.

    Raises:
        UnsupportedError: with what to do.
    """
    if in_xla():
        raise UnsupportedError(
            "XLA cannot compile what communicates: take jit_compile=True off the tf.function (or "
            "model.compile) around hvdkit's functions; the parts between them may keep it"
        )
    if not isinstance(tf.compat.v1.get_default_graph(), FuncGraph):
        raise UnsupportedError("hvdkit works eagerly and inside tf.function, not in a tf.Graph")


def _resource() -> tf.Tensor:
    """Return what orders all calls, as the graph that is being made sees it.

    Each graph has it from the one around it, as gradients of branches and loops must.
    """
    with tf.init_scope():
        if not _order:
            _order.append(tf.Variable(0, trainable=False, name="hvdkit_order"))
    graphs = [tf.compat.v1.get_default_graph()]
    while isinstance(getattr(graphs[-1], "outer_graph", None), FuncGraph):
        graphs.append(graphs[-1].outer_graph)
    handle = _order[0].handle
    for graph in reversed(graphs):
        handle = graph.capture(handle)
    return handle
