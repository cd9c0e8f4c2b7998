"""What a distributed optimizer does with gradients before its own class applies them.

    apply(gradients)        by fit, train_on_batch, a train_step or a loop of one's own
      sums of passes        [1]  only where backward_passes_per_step is more than 1
      reduction             [2]  the backend's; local variables' gradients stay as they are
      loss scale            [3]  of an optimizer around this one: finite on all ranks or on none
      the plain apply       [4]  clips, decays weights, updates

For Adasum, [2] comes after [4], of what that did to the variables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from hvdkit.api import alone
from hvdkit.dtypes import Average, ReduceOp, as_op
from hvdkit.engine.wishes import check_passes
from hvdkit.errors import UnsupportedError
from hvdkit.keras import backends
from hvdkit.process_sets import ProcessSet, global_process_set


@dataclass(frozen=True)
class Wishes:
    """How gradients are combined; see `DistributedOptimizer`."""

    compression: Any
    op: Any = Average
    predivide: float = 1.0
    sparse_as_dense: bool = False
    groups: Any = None
    process_set: ProcessSet = global_process_set
    passes: int = 1
    mean_of_passes: bool = False
    scale_local: bool = True


class Distribution:
    """The gradients of one optimizer on their way.

    Args:
        wishes: how.

    Raises:
        ArgumentError: they do not fit together.
        UnsupportedError: Keras uses a backend that hvdkit does not know.
    """

    def __init__(self, wishes: Wishes) -> None:
        check_passes(wishes.passes)
        self.wishes = wishes
        self._reduce = backends.chosen().reduction(wishes)
        self._local: set[Any] = set()
        self._applying = False
        self._sums: dict[Any, Any] = {}
        self._passes_done: Any = None

    @property
    def combines_steps(self) -> bool:
        """Whether it is not gradients that are combined, but what is made of them."""
        return as_op(self.wishes.op) is ReduceOp.ADASUM

    def leave_alone(self, key: Any) -> None:
        """Leave out the gradient of a variable, which the optimizer knows by `key`."""
        self._local.add(key)

    def has_others(self) -> bool:
        """Return whether there is another rank to combine gradients with.

        Raises:
            NotInitializedError: ``init()`` was not called.
        """
        return not alone(self.wishes.process_set)

    def apply(
        self,
        optimizer: Any,
        outer: Any,
        plain: Callable[[Sequence[Any], Any], None],
        gradients: Sequence[Any],
        variables: Any,
    ) -> None:
        """Combine the gradients of all ranks, and let `plain` apply them.  Collective.

        Args:
            optimizer: the distributed one.
            outer: itself, or the one around it that scales losses.
            plain: `outer`'s own way to apply them.
            gradients: of tensors or None.
            variables: theirs; None: those that `outer` was built with.
        """
        if self._applying or not len(gradients) or (variables is None and not outer.built):
            plain(gradients, variables)  # reduced already; or nothing, of which Keras has its say
            return
        if variables is None:
            variables = outer._trainable_variables
        if self.combines_steps and outer is not optimizer:
            raise UnsupportedError(
                "op=Adasum combines what optimizers do, which with a LossScaleOptimizer around "
                "them some ranks may do and others not: use op=Average, or no loss scale"
            )
        gradients, variables = list(gradients), list(variables)
        if self.wishes.passes > 1:
            self._add(optimizer, outer, plain, gradients, variables)
        else:
            self._apply(optimizer, plain, gradients, variables)

    def _apply(
        self,
        optimizer: Any,
        plain: Callable[[Sequence[Any], Any], None],
        gradients: Sequence[Any],
        variables: Sequence[Any],
    ) -> None:
        by_steps = self.combines_steps and self.has_others()
        if by_steps:
            starts = [keras.ops.stop_gradient(keras.ops.copy(v)) for v in variables]
        else:
            gradients = self._combined(optimizer, gradients, variables)  # [2]
        self._applying = True
        try:
            plain(gradients, variables)  # [3] and [4]
        finally:
            self._applying = False
        if by_steps:
            self._combine_steps(optimizer, starts, variables)

    def _combine_steps(
        self, optimizer: Any, starts: Sequence[Any], variables: Sequence[Any]
    ) -> None:
        """Combine what each rank did to the variables since `starts`.  Collective.

        Adasum of gradients knows nothing of what an optimizer makes of them [Maleki et al., MLSys
        2021, section 4].
        """
        steps = [keras.ops.subtract(v, s) for v, s in zip(variables, starts, strict=True)]
        combined = self._combined(optimizer, steps, variables)
        for variable, start, step in zip(variables, starts, combined, strict=True):
            variable.assign(keras.ops.add(start, step))
            if variable.constraint is not None:
                variable.assign(variable.constraint(variable))

    def _combined(
        self, optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]
    ) -> list[Any]:
        """Return all ranks' gradients combined, where they are not local.  Collective."""
        results = list(gradients)
        if not self.has_others():
            return results
        is_local = [optimizer._var_key(variable) in self._local for variable in variables]
        common = [i for i, local in enumerate(is_local) if not local]
        reduced = self._reduce([results[i] for i in common], [variables[i] for i in common])
        for i, gradient in zip(common, reduced, strict=True):
            results[i] = gradient
        if self.wishes.scale_local:
            ranks = self.wishes.process_set.size()
            for i, local in enumerate(is_local):
                if local and results[i] is not None:
                    results[i] = keras.ops.divide(results[i], ranks)
        return results

    # Sums of passes

    def _add(
        self,
        optimizer: Any,
        outer: Any,
        plain: Callable[[Sequence[Any], Any], None],
        gradients: Sequence[Any],
        variables: Sequence[Any],
    ) -> None:
        """Sum gradients up, and apply the sums in every so many-th pass.

        The sums are not among the optimizer's variables: a saved file is what it is without them.
        """
        if not outer.built:
            outer.build(variables)  # not in a branch
        sums = [
            None if gradient is None else self._sum(optimizer._var_key(variable), variable)
            for gradient, variable in zip(gradients, variables, strict=True)
        ]
        for total, gradient in zip(sums, gradients, strict=True):
            if total is not None:
                optimizer.assign_add(total, gradient)
        if self._passes_done is None:
            self._passes_done = keras.Variable(0, dtype="int32", trainable=False)
        self._passes_done.assign_add(1)
        share = self.wishes.passes if self.wishes.mean_of_passes else 1

        def step() -> None:
            means = [None if t is None else keras.ops.divide(t.value, share) for t in sums]
            self._apply(optimizer, plain, means, variables)
            for total in sums:
                if total is not None:
                    total.assign(keras.ops.zeros_like(total))

        def wait() -> None:
            optimizer._iterations.assign_add(1)

        is_due = keras.ops.equal(keras.ops.mod(self._passes_done, self.wishes.passes), 0)
        keras.ops.cond(is_due, step, wait)

    def _sum(self, key: Any, variable: Any) -> Any:
        if key not in self._sums:
            shape, dtype = tuple(variable.shape), keras.backend.standardize_dtype(variable.dtype)
            self._sums[key] = keras.Variable("zeros", shape=shape, dtype=dtype, trainable=False)
        return self._sums[key]


def distribution_of(optimizer: Any) -> Distribution | None:
    """Return what combines an optimizer's gradients, or those of the one that it scales losses for.

    None if nothing does.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    found: Distribution | None = getattr(inner, "distribution", None)
    return found if isinstance(found, Distribution) else None
