"""Callbacks of Keras for many ranks; names, arguments and defaults are Horovod's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras

from hvdkit.api import rank, size
from hvdkit.array_collectives import allgather_object
from hvdkit.errors import ArgumentError, MismatchError, describe_by_rank
from hvdkit.keras.values import broadcast_variables


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Gives every rank the root's model and optimizer state, before the first step.

    What random numbers are drawn from stays each rank's own, and so does what metrics have counted.

    Args:
        root_rank: the rank to copy from.
        device: without effect.
        local_variables: a variable or several that stay each rank's own.
    """

    def __init__(self, root_rank: int, device: str = "", local_variables: Any = None) -> None:
        super().__init__()
        del device
        self.root_rank = root_rank
        self.broadcast_done = False
        if local_variables is None:
            local_variables = []
        elif not isinstance(local_variables, list | tuple | set):
            local_variables = [local_variables]
        self._local = {_identity(variable) for variable in local_variables}

    def register_local_var(self, var: Any) -> None:
        """Leave a variable as it is on each rank."""
        self._local.add(_identity(var))

    def on_train_begin(self, logs: Any = None) -> None:
        """Broadcast, if the model is built: ``fit`` builds it before."""
        del logs
        if self.model.built:
            self._broadcast()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Broadcast what could not be before."""
        del batch, logs
        self._broadcast()

    def _broadcast(self) -> None:
        if self.broadcast_done:
            return
        self.broadcast_done = True
        optimizer = self.model.optimizer
        if not optimizer.built:
            optimizer.build(self.model.trainable_variables)
        variables = [*self.model.weights, *optimizer.variables]
        chosen = [variable for variable in variables if _identity(variable) not in self._local]
        broadcast_variables(chosen, self.root_rank)


class MetricAverageCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Averages the metrics of an epoch over all ranks, for the callbacks that come after it.

    Put it before ReduceLROnPlateau, EarlyStopping, ModelCheckpoint and the like, so that all ranks
    decide alike.  Each rank counts as much as another, however many rows it had.

    Args:
        device: without effect.
    """

    def __init__(self, device: str = "") -> None:
        super().__init__()
        del device

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Average.  Collective.

        Raises:
            MismatchError: on every rank, if they have different metrics.
        """
        mine = {name: float(value) for name, value in (logs or {}).items()}
        everyone = allgather_object(mine, name="metrics")
        if any(theirs.keys() != mine.keys() for theirs in everyone):
            names = {i: ", ".join(sorted(theirs)) for i, theirs in enumerate(everyone)}
            raise MismatchError(
                f"MetricAverageCallback: ranks have different metrics in epoch {epoch}\n"
                f"{describe_by_rank(names)}\n"
                "Give every rank the same metrics, and validation data on all or on none."
            )
        for name in mine:
            assert logs is not None
            logs[name] = math.fsum(theirs[name] for theirs in everyone) / len(everyone)


class LearningRateScheduleCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Sets the learning rate to ``initial_lr * multiplier`` in some epochs.

    Args:
        initial_lr: the rate at the start.
        multiplier: a function of the epoch, or a number, of which it is the power.
        start_epoch: the first epoch that it is for.
        end_epoch: the first that it is not for any more; None: there is none.
        staircase: whether the rate changes at the start of an epoch; else in every batch, and the
            epoch is then a fraction.
        momentum_correction: whether, when the rate changes, what an optimizer keeps of earlier
            steps changes with it, as [Goyal et al. 2017, section 3.2] have it: for SGD and RMSprop,
            whose momentum has the rate in it.
        steps_per_epoch: batches in an epoch; None: as many as Keras says.

    Raises:
        ArgumentError: there is no `initial_lr`.
    """

    def __init__(
        self,
        initial_lr: float,
        multiplier: float | Callable[[float], float],
        start_epoch: int = 0,
        end_epoch: int | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        if initial_lr is None:
            raise ArgumentError("initial_lr is needed: the learning rate at the start")
        self.initial_lr = initial_lr
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.staircase = staircase
        self.momentum_correction = momentum_correction
        self.steps_per_epoch = steps_per_epoch
        self.current_epoch = 0
        if not callable(multiplier):
            factor = multiplier

            def multiplier(epoch: float) -> float:
                return float(factor ** (epoch - start_epoch))

        self.multiplier = multiplier

    def on_train_begin(self, logs: Any = None) -> None:
        """Find out how many steps an epoch has.

        Raises:
            ArgumentError: Keras does not know.
        """
        del logs
        if not self.staircase and not self.steps_per_epoch:
            self.steps_per_epoch = self.params.get("steps")
            if not self.steps_per_epoch:
                raise ArgumentError(
                    f"{type(self).__name__} needs steps_per_epoch=, for Keras cannot tell how many "
                    "batches there are"
                )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Take note of the epoch."""
        del logs
        self.current_epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Set the learning rate, if it is due."""
        del logs
        epoch = self.current_epoch
        if epoch < self.start_epoch or (self.end_epoch is not None and epoch >= self.end_epoch):
            return
        if not self.staircase:
            assert self.steps_per_epoch
            self._set_learning_rate(epoch + batch / self.steps_per_epoch)
        elif batch == 0:
            self._set_learning_rate(epoch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Tell the learning rate in the logs."""
        del epoch
        if logs is not None:
            logs["lr"] = self._learning_rate()

    def _optimizer(self) -> Any:
        optimizer = self.model.optimizer
        return getattr(optimizer, "inner_optimizer", optimizer)

    def _learning_rate(self) -> float:
        return float(keras.ops.convert_to_numpy(self._optimizer().learning_rate))

    def _set_learning_rate(self, epoch: float) -> None:
        optimizer = self._optimizer()
        old, new = self._learning_rate(), self.initial_lr * self.multiplier(epoch)
        try:
            optimizer.learning_rate = new
        except TypeError as exc:
            raise ArgumentError(
                f"{type(self).__name__} cannot set the learning rate, which is a "
                "LearningRateSchedule: give the optimizer a number"
            ) from exc
        if self.momentum_correction and old and new != old:
            for momentum in _scaled_by_learning_rate(optimizer):
                momentum.assign(momentum * (new / old))


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raises the learning rate from ``initial_lr / size()`` to ``initial_lr``, batch by batch.

    After [Goyal et al. 2017, section 2.2]: in epoch e of w,
    ``lr = initial_lr / size() * (e * (size() - 1) / w + 1)``.

    Args:
        initial_lr: the rate at the end.
        warmup_epochs: how many it takes.
        momentum_correction: as `LearningRateScheduleCallback`.
        steps_per_epoch: batches in an epoch; None: as many as Keras says.
        verbose: whether rank 0 prints a line when it is done.
    """

    def __init__(
        self,
        initial_lr: float,
        warmup_epochs: int = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ) -> None:
        def multiplier(epoch: float) -> float:
            assert self.steps_per_epoch
            done = epoch + 1 / self.steps_per_epoch  # so that it is round at an epoch's end
            return (done * (size() - 1) / warmup_epochs + 1) / size()

        super().__init__(
            initial_lr,
            multiplier,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self.verbose = verbose

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Tell the learning rate in the logs, and in words when it is what it should be."""
        super().on_epoch_end(epoch, logs)
        if self.verbose and rank() == 0 and self.end_epoch == epoch + 1:
            lr = self._learning_rate()
            print(f"\nEpoch {epoch + 1}: warmup is done, the learning rate is {lr:g}")  # noqa: T201


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):  # type: ignore[misc]
    """Saves the best model so far; rank 0 does.

    Args:
        monitor: the metric that says which is the best.
        verbose: whether it says what it does.
        mode: ``"min"``, ``"max"`` or ``"auto"``, by the metric's name.
        save_freq: ``"epoch"``, or after how many batches.
        save_weights_only: whether the weights alone are saved.
        filepath: where to; may be set as an attribute before training.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        save_weights_only: bool = False,
        filepath: Any = None,
    ) -> None:
        super().__init__(
            filepath=filepath or (".weights.h5" if save_weights_only else ".keras"),
            monitor=monitor,
            verbose=verbose,
            save_best_only=True,
            save_weights_only=save_weights_only,
            mode=mode,
            save_freq=save_freq,
        )
        if filepath is None:
            self.filepath = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Check that there is somewhere to save to.

        Raises:
            ArgumentError: there is not.
        """
        super().on_train_begin(logs)
        if self.filepath is None:
            raise ArgumentError("BestModelCheckpoint has nowhere to save to: give it filepath=")

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Save on rank 0, if it is time and the best."""
        if rank() == 0:
            super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Save on rank 0, if it is time and the best."""
        if rank() == 0:
            super().on_epoch_end(epoch, logs)


def _identity(variable: Any) -> int:
    """Return what is the same of a variable of Keras and of the framework's inside it."""
    return id(variable.value if isinstance(variable, keras.Variable) else variable)


def _scaled_by_learning_rate(optimizer: Any) -> Sequence[Any]:
    """Return the variables of an optimizer that are sums of updates, with the rate in them."""
    found: Sequence[Any] = ()
    if isinstance(optimizer, keras.optimizers.SGD):
        found = getattr(optimizer, "momentums", ())
    elif isinstance(optimizer, keras.optimizers.RMSprop):
        found = getattr(optimizer, "_momentums", ())
    return [variable for variable in found if variable is not None]
