"""Combine the gradients of some variables over all ranks, in the buckets of a `GradientReducer`.

    graph of a step     ... g5 g4 | g3 g2 | g1 g0
    bucket 0 [g5 g4]    copied into its buffer, all-reduced beside what follows          [1]
    bucket 1 [g3 g2]                                                                     [2]
    bucket 2 [g1 g0]                                                                     [3]
    the end             waits for all; tensors of the results                            [4]

Each of these is a call of its own in the graph, which TensorFlow makes as soon as its gradients are
computed, in this order.  The order of buckets is that in which backward makes its ops.  In eager
mode backward is over before anything is communicated.

Which gradients there are is learnt once, when the first step is traced, and the same on all ranks:
one that only some ranks have counts as zeros on the others; one that none has stays None; one that
is tf.IndexedSlices wherever it is, is gathered.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.api import alone, communicator, context
from hvdkit.context import Context
from hvdkit.dtypes import Average, ReduceOp
from hvdkit.engine.agreement import agree_on_gradients
from hvdkit.engine.bucketing import Gradient
from hvdkit.engine.compression.choices import bucket_compressor
from hvdkit.engine.reducer import GradientReducer
from hvdkit.engine.wishes import check_groups, gradient_op, places_of
from hvdkit.errors import UnsupportedError
from hvdkit.process_sets import ProcessSet, global_process_set
from hvdkit.tensorflow.all_reduce import allreduce_slices
from hvdkit.tensorflow.collectives import numpy_dtype
from hvdkit.tensorflow.compression import Compression
from hvdkit.tensorflow.convert import array_of, copied, tensor_of, variable_of
from hvdkit.tensorflow.graph import call

#: Plans that one `Reduction` keeps, each with its buffers, and reductions for tapes: one a model.
MOST_PLANS = 8


@dataclass(frozen=True)
class Settings:
    """How gradients are combined; see `DistributedGradientTape`.

    Raises:
        ArgumentError: they do not fit together.
    """

    compression: Any = Compression.none
    op: ReduceOp = Average
    predivide: float = 1.0
    sparse_as_dense: bool = False
    groups: int | tuple[tuple[int, ...], ...] | None = None
    process_set: ProcessSet = global_process_set

    @staticmethod
    def of(**wishes: Any) -> Settings:
        """Return the settings that a user asks for, checked.

        Args:
            wishes: the fields; `groups` as lists of variables.
        """
        settings = Settings(**wishes)
        op = gradient_op(settings.op, settings.predivide)
        bucket_compressor(settings.compression)
        groups: Any = settings.groups
        if groups is not None and not isinstance(groups, int):
            groups = [[variable_of(variable) for variable in group] for group in groups]
        check_groups(groups, tf.Variable, "variables")
        if isinstance(groups, list):
            groups = tuple(tuple(id(variable) for variable in group) for group in groups)
        return replace(settings, op=op, groups=groups)


@dataclass(frozen=True)
class Kind:
    """What a rank knows of a gradient before it has it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    form: str
    """``"none"``, ``"sparse"`` or ``"dense"``."""

    def described(self, name: str) -> Gradient:
        return Gradient(name, self.shape, np.dtype(self.dtype))


@dataclass(frozen=True)
class Plan:
    """What all ranks do with the gradients of some variables."""

    forms: tuple[str, ...]
    dense: tuple[int, ...]
    """Places of those that travel in buckets, in the reducer's order."""
    reducer: GradientReducer | None


class Reduction:
    """Combines gradients step by step, of one model or several, over the same ranks.

    Args:
        settings: how.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._plans: dict[Hashable, Plan] = {}
        self._context: Callable[[], Context | None] = lambda: None

    def __call__(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Return the combined gradients.  Collective, blocking.

        Args:
            gradients: tensors, tf.IndexedSlices or None, one for each variable.
            variables: of TensorFlow or Keras, the same in the same order on every rank; or other
                tensors of static shape.

        Raises:
            MismatchError: on every rank, naming the first variable that differs.
            UnsupportedError: in a graph for XLA; or a shape that is not static.
        """
        if alone(self.settings.process_set):
            return list(gradients)
        if self.settings.sparse_as_dense:
            gradients = [None if g is None else tf.convert_to_tensor(g) for g in gradients]
        packed, forms = self._compress(gradients)
        reduced = self._reduce(packed, variables)
        return [
            g if form is None or g is None else self.settings.compression.decompress(g, form[0])
            for g, form in zip(reduced, forms, strict=True)
        ]

    def _compress(self, gradients: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Apply a compressor of the user's own, which knows single tensors."""
        packed, forms = list(gradients), [None] * len(gradients)
        if bucket_compressor(self.settings.compression) is None:
            for i, gradient in enumerate(gradients):
                if gradient is not None and not isinstance(gradient, tf.IndexedSlices):
                    packed[i], form = self.settings.compression.compress(gradient)
                    forms[i] = (form,)  # type: ignore[call-overload]
        return packed, forms

    def _reduce(self, gradients: list[Any], variables: Sequence[Any]) -> list[Any]:
        kinds = tuple(_kind(*pair) for pair in zip(gradients, variables, strict=True))
        places = places_of([id(variable_of(v)) for v in variables], self.settings.groups)
        order = _backward_order(gradients)
        plan = self._plan(kinds, order, places)
        results: list[Any] = [None] * len(gradients)
        if plan.reducer is not None:
            ready = [_dense(gradients[i], kinds[i]) for i in plan.dense]
            reduced = self._in_buckets(ready, self._reducer(kinds, order, places))
            for i, tensor in zip(plan.dense, reduced, strict=True):
                results[i] = tensor
        for i, form in enumerate(plan.forms):
            if form == "sparse":
                results[i] = self._gathered(_sparse(gradients[i], kinds[i]), kinds[i].name)
        return results

    def _gathered(self, slices: tf.IndexedSlices, name: str) -> tf.IndexedSlices:
        settings = self.settings
        return allreduce_slices(slices, (settings.op, 1.0, 1.0), name, settings.process_set)

    # The plan

    def _plan(
        self, kinds: tuple[Kind, ...], order: Sequence[int], groups: list[list[int]] | None
    ) -> Plan:
        """Return the plan, made when it is first asked for; then collective."""
        here = context()
        if self._context() is not here:  # since the last time was shutdown()
            self._plans.clear()
            self._context = weakref.ref(here)
        plan = self._plans.get(kinds)
        if plan is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans.pop(next(iter(self._plans)))
            plan = self._plans[kinds] = self._make(kinds, order, groups)
        return plan

    def _reducer(
        self, kinds: tuple[Kind, ...], order: Sequence[int], groups: list[list[int]] | None
    ) -> Callable[[], GradientReducer | None]:
        """Return what gives the plan's reducer, step by step: another one after a shutdown()."""
        plan, made_in = self._plan(kinds, order, groups), self._context

        def reducer() -> GradientReducer | None:
            nonlocal plan, made_in
            if made_in() is not context():
                plan = self._plan(kinds, order, groups)
                made_in = self._context
            return plan.reducer

        return reducer

    def _make(
        self, kinds: tuple[Kind, ...], order: Sequence[int], groups: list[list[int]] | None
    ) -> Plan:
        among = communicator(self.settings.process_set)
        everyone = among.allgather_object((kinds, tuple(order)), name="gradients")
        first, order = everyone[0]
        # Keras numbers names, differently where one rank has made other models besides.
        names = [kind.name for kind in (first if len(first) == len(kinds) else kinds)]
        described = [kind.described(name) for kind, name in zip(kinds, names, strict=True)]
        among.call(agree_on_gradients, tuple(described))
        forms = tuple(
            _common_form([theirs[i].form for theirs, _ in everyone]) for i in range(len(kinds))
        )
        dense = tuple(i for i in order if forms[i] == "dense")
        if not dense:
            return Plan(forms, dense, None)
        place = {i: position for position, i in enumerate(dense)}
        settings = self.settings
        reducer = context().gradient_reducer(
            [described[i] for i in dense],
            communicator=among,
            op=settings.op,
            prescale=1.0 / settings.predivide,
            postscale=settings.predivide,
            compression=bucket_compressor(settings.compression),
            groups=groups and [[place[i] for i in group if i in place] for group in groups],
        )
        reducer.keep_plan()  # the order is known already
        return Plan(forms, dense, reducer)

    # A step

    def _in_buckets(
        self, tensors: Sequence[tf.Tensor], reducer: Callable[[], GradientReducer | None]
    ) -> list[tf.Tensor]:
        """Return the combination of dense tensors, which stand in the reducer's order."""
        now = reducer()
        assert now is not None
        for bucket in now.buckets:
            call(_Launch(reducer, bucket.members), [tensors[i] for i in bucket.members], [])

        def finish() -> list[tf.Tensor]:
            now = reducer()
            assert now is not None
            now.finish()
            return [tensor_of(copied(view)) for view in now.views if view is not None]

        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors]
        return call(finish, [], specs)


@dataclass(frozen=True)
class _Launch:
    """Brings gradients into their bucket, which then travels."""

    reducer: Callable[[], GradientReducer | None]
    members: tuple[int, ...]

    def __call__(self, *tensors: tf.Tensor) -> list[tf.Tensor]:
        reducer = self.reducer()
        assert reducer is not None
        if any(map(reducer.has_come, self.members)):  # of a step that another op's error ended
            reducer.finish()
        for index, tensor in zip(self.members, tensors, strict=True):
            view = reducer.views[index]
            assert view is not None
            np.copyto(view, array_of(tensor))
            reducer.ready(index)
        return []


#: What tapes have asked for: a tape lives for one step, what it needs for all.
_for_tapes: weakref.WeakKeyDictionary[Context, dict[Settings, Reduction]] = (
    weakref.WeakKeyDictionary()
)


def reduction_for(settings: Settings) -> Reduction:
    """Return what combines gradients so, the same for all who ask."""
    known = _for_tapes.setdefault(context(), {})
    if settings not in known:
        if len(known) >= MOST_PLANS:
            known.pop(next(iter(known)))
        known[settings] = Reduction(settings)
    return known[settings]


# Gradients


def _kind(gradient: Any, variable: Any) -> Kind:
    name = str(getattr(variable, "path", None) or getattr(variable, "name", None) or "a tensor")
    given = variable if gradient is None else gradient
    shape = tf.TensorShape(given.shape)
    if not shape.is_fully_defined():
        shape = shape.merge_with(variable.shape)
    if not shape.is_fully_defined():
        raise UnsupportedError(
            f"the gradient of {name} has the shape {shape}: buckets need to know it all; give it "
            "one with set_shape()"
        )
    form = "dense"
    if gradient is None or isinstance(gradient, tf.IndexedSlices):
        form = "none" if gradient is None else "sparse"
    dtype = numpy_dtype(tf.as_dtype(given.dtype))
    return Kind(name, tuple(shape.as_list()), dtype.name, form)


def _common_form(forms: Sequence[str]) -> str:
    """Return the form that a gradient has on all ranks, by those that it has on each."""
    for form in ("dense", "sparse"):
        if form in forms:
            return form
    return "none"


def _dense(gradient: Any, kind: Kind) -> tf.Tensor:
    return tf.zeros(kind.shape, kind.dtype) if gradient is None else tf.convert_to_tensor(gradient)


def _sparse(gradient: Any, kind: Kind) -> tf.IndexedSlices:
    """Return slices whose indices have the dtype of those of every rank."""
    if gradient is None:
        values, indices = tf.zeros((0, *kind.shape[1:]), kind.dtype), tf.zeros((0,), tf.int64)
    else:
        values, indices = gradient.values, tf.cast(gradient.indices, tf.int64)
    return tf.IndexedSlices(values, indices, tf.constant(kind.shape, tf.int64))


def _backward_order(gradients: Sequence[Any]) -> list[int]:
    """Return places from the gradient that backward makes last to that which it makes first.

    In eager mode all are there: the order of creation.
    """
    places = range(len(gradients))
    if tf.executing_eagerly():
        return list(places)
    operations = tf.compat.v1.get_default_graph().get_operations()
    made = {operation.name: number for number, operation in enumerate(operations)}

    def when(place: int) -> tuple[int, int]:
        gradient = gradients[place]
        tensor = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
        return (-1 if tensor is None else made.get(tensor.op.name, -1), -place)

    return sorted(places, key=when, reverse=True)
