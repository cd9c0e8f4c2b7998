"""What Horovod has and hvdkit does not: what a script that asks for it is told."""

from __future__ import annotations

import sys
from typing import NoReturn

from hvdkit.errors import MissingError

_ELASTIC = (
    "a job keeps the ranks that it starts with. Take away the state and what @hvd.elastic.run "
    "decorates, write checkpoints on rank 0, and start the job again from the last one"
)
_HERE = "its functions stand in this module itself: write  from {module} import allreduce"
_RUN = "start the ranks by hvdrun, or from Python by hvdkit.run(function, np=4)"

#: Names of Horovod 0.28, and what there is instead.
_INSTEAD = {
    "elastic": _ELASTIC,
    "HostsUpdatedInterrupt": _ELASTIC,
    "mpi_ops": _HERE,
    "functions": _HERE,
    "common": "what scripts need of it stands in hvdkit, hvdkit.torch and hvdkit.tensorflow",
    "runner": _RUN,
    "ray": _RUN,
    "spark": f"its estimators have no counterpart; {_RUN}",
    "mxnet": "MXNet was retired in 2023; there are hvdkit.torch, hvdkit.tensorflow, hvdkit.keras",
    "data": "its loaders have no counterpart; let each rank read rows[hvd.rank() :: hvd.size()]",
    "BroadcastGlobalVariablesHook": (
        "sessions are of TensorFlow 1: call hvd.broadcast_variables(variables, root_rank=0) once "
        "they are made, or give fit() hvdkit.keras.callbacks.BroadcastGlobalVariablesCallback(0)"
    ),
    "HorovodVersionMismatchError": "nothing is compiled against a framework, so nothing can differ",
    "gpu_available": "ask torch.cuda.is_available() or tf.config.list_physical_devices('GPU')",
    "check_num_rank_power_of_2": "Adasum takes any number of ranks here",
    "num_rank_is_power_2": "Adasum takes any number of ranks here",
}


def refuse_name(module: str, name: str) -> NoReturn:
    """Raise the error of a module that is asked for a name that it does not have.

    Raises:
        MissingError: Horovod has it; says what to do instead.
        AttributeError: nobody has.
    """
    if name in _INSTEAD:
        instead = _INSTEAD[name].format(module=module)
        raise MissingError(f"{module} does not have Horovod's {name!r}: {instead}")
    text = f"module {module!r} has no attribute {name!r}"
    raise AttributeError(text, name=name, obj=sys.modules[module])  # lets Python suggest one
