"""``hvd.run``: call a function on several new ranks, from a process that is none of them."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hvdkit.config import Config
from hvdkit.errors import ArgumentError, ConfigError, LauncherError, UnsupportedError
from hvdkit.launch import guard, mpirun
from hvdkit.launch.job import Job, read_results, unwinding_on_sigterm
from hvdkit.launch.mpirun import Host, Mpirun, parse_hostfile, parse_hosts
from hvdkit.launch.parcel import pack
from hvdkit.launch.start import (
    SHELL,
    Launch,
    check_hosts,
    find_mpi,
    mpirun_line,
    remote_shell,
)

R = TypeVar("R")

#: Four times Horovod's: Python on a cold file system takes its time.
_START_TIMEOUT = 120.0

_NOT_ELASTIC = "a job keeps the ranks that it starts with; elastic jobs are not supported"
_UNSUPPORTED = {
    "min_num_proc": _NOT_ELASTIC,
    "max_num_proc": _NOT_ELASTIC,
    "min_np": _NOT_ELASTIC,
    "max_np": _NOT_ELASTIC,
    "slots": _NOT_ELASTIC,
    "reset_limit": _NOT_ELASTIC,
    "cooldown_range": _NOT_ELASTIC,
    "host_discovery_script": _NOT_ELASTIC,
}

#: What is so anyway: no check of hosts is cached.
_WITHOUT_EFFECT = ("disable_cache",)

#: hvdrun with this process's modules, which come as the first argument.
_HVDRUN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from hvdkit.cli.hvdrun import main; sys.exit(main())"
)


def run(
    func: Callable[..., R],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    num_proc: int = 1,
    *,
    np: int | None = None,
    hosts: str | None = None,
    hostfile: str | os.PathLike[str] | None = None,
    start_timeout: float | None = None,
    timeout: float | None = None,
    output_filename: str | os.PathLike[str] | None = None,
    verbose: int | None = None,
    mpi_args: str | Sequence[str] | None = None,
    network_interfaces: Sequence[str] | None = None,
    network_interface: str | None = None,
    use_tcp: bool | None = None,
    use_gloo: bool | None = None,
    use_mpi: bool | None = None,
    ssh_port: int | None = None,
    ssh_identity_file: str | None = None,
    executable: str | None = None,
    env: Mapping[str, str] | None = None,
    **others: Any,
) -> list[R]:
    """Call ``func(*args, **kwargs)`` on new ranks; return their results in rank order.  Blocking.

    The ranks are started by this environment's mpirun, Open MPI's or MPICH's, and not bound to
    cores; where no mpirun fits, they are plain processes that speak TCP.  They work in this
    directory, and what they write to stdout and stderr appears here.  `func` calls ``hvd.init()``
    itself.  It travels by cloudpickle, if that is installed, and may then be a lambda or a
    notebook's function.  Else it must be a function of a module, or of a script that calls `run`
    under ``if __name__ == "__main__":``.  When this process ends, be it by Ctrl-C or SIGKILL, so do
    the ranks.

    Args:
        func: called on every rank; it, its arguments and its results must be picklable.
        args, kwargs: its arguments.
        num_proc: how many ranks.
        np: the same, by its older name.
        hosts: ``"host1:2,host2:4"``, hosts and their slots, this host first; None: this host,
            with as many ranks as you like.
        hostfile: a file of lines such as ``host1 slots=2``, instead.
        start_timeout: seconds in which all ranks must have started; None:
            ``HOROVOD_START_TIMEOUT``, else 120.
        timeout: seconds in which the job must have ended; None: no limit.
        output_filename: a folder; rank 3 writes to ``rank.3/stdout`` and ``rank.3/stderr`` in it,
            and not here.
        verbose: 1 or more: write the launcher's command line to stderr.
        mpi_args: more arguments for mpirun, in its own language.
        network_interfaces: names of the networks to use between hosts; None: any.
        network_interface: the same, separated by commas.
        use_tcp: start plain processes that speak TCP, even if there is an mpirun.
        use_gloo: the same, by Horovod's name.
        use_mpi: start them by mpirun; without one it is an error.
        ssh_port, ssh_identity_file: of other hosts.
        executable: the ranks' Python, in which hvdkit and what `func` needs are installed; None:
            this one, with this process's ``sys.path``.
        env: environment variables for the ranks, besides this process's.
        others: Horovod's other parameters.  Their default, None, does nothing.

    Raises:
        JobError: a rank raised, was killed or ended early: its ``rank``, and its traceback; or the
            job took longer than `timeout`.  All ranks have been ended.
        LauncherError: no mpirun, or one that is not known; hosts cannot take part; or the ranks
            did not start.
        ArgumentError: an argument is out of range.
        ConfigError: an environment variable of hvdkit's does not parse.
        UnsupportedError: `func` or its arguments cannot be pickled; or a parameter of Horovod's
            is set that cannot be honoured.
    """
    _refuse(others)
    if not callable(func):
        raise ArgumentError(f"func must be a function to call on every rank, not {func!r}")
    size = _count(num_proc, np)
    places = _places(hosts, hostfile, size)
    networks = _networks(network_interfaces, network_interface)
    limit = _start_timeout(start_timeout)
    parcel = pack(func, args, kwargs or {})
    python = executable or sys.executable
    wanted = {**os.environ, **(env or {})}
    more = shlex.split(mpi_args) if isinstance(mpi_args, str) else mpi_args or ()
    found = _choose(python, wanted, tcp=use_tcp or use_gloo, mpi=use_mpi or bool(more))
    starter = python, guard.__file__
    launch = Launch(
        command=starter,
        size=size,
        hosts=places,
        settings=env or {},
        interfaces=tuple(networks),
        start_timeout=limit,
        peer_timeout=Config.from_environment(wanted).peer_timeout,
        remote_shell=remote_shell(wanted.get(SHELL), ssh_port, ssh_identity_file),
        mpi_arguments=tuple(more),
    )
    if found is None:
        line, variables = _hvdrun_line(launch)  # it checks the hosts itself
    else:
        line, variables = mpirun_line(launch, found)
        check_hosts(launch, variables, starter)
    with unwinding_on_sigterm(), _private_directory() as directory:
        (directory / "call").write_bytes(pickle.dumps(parcel))
        task = _task(directory, size, output_filename, same_python=python == sys.executable)
        line += [*starter, json.dumps(task)]
        if verbose:
            sys.stderr.write(f"hvdkit: {shlex.join(line)}\n")
        sys.stdout.flush()
        with Job(line, variables, directory) as job:
            status = job.wait(start_timeout=limit, timeout=timeout)
        launcher = "hvdrun" if found is None else "mpirun"
        return read_results(directory, size, status, launcher=launcher)


def _refuse(others: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for what cannot be honoured, TypeError for what nobody knows."""
    for name, value in others.items():
        if name not in _UNSUPPORTED and name not in _WITHOUT_EFFECT:
            raise TypeError(f"run() got an unexpected keyword argument {name!r}")
        if name in _UNSUPPORTED and value is not None and value is not False:
            raise UnsupportedError(f"run({name}={value!r}): {_UNSUPPORTED[name]}")


def _choose(
    python: str, environ: Mapping[str, str], *, tcp: bool | None, mpi: bool | None
) -> Mpirun | None:
    """Return the mpirun to use; None: none, the ranks speak TCP."""
    if tcp and mpi:
        raise ArgumentError("use_mpi (or mpi_args) and use_tcp exclude each other; give one")
    if tcp:
        return None
    try:
        return find_mpi(python, environ)
    except LauncherError:
        if mpi:
            raise
        return None


def _hvdrun_line(launch: Launch) -> tuple[list[str], dict[str, str]]:
    """Return hvdrun's command line, which the program's is to follow, and its environment."""
    path = json.dumps([str(Path(entry).absolute()) for entry in sys.path])
    line = [sys.executable, "-c", _HVDRUN, path, "--tcp", "--no-labels", "-np", str(launch.size)]
    line += ["--start-timeout", f"{launch.start_timeout:g}"]
    if launch.hosts:
        line += ["--hosts", ",".join(f"{host}:{slots}" for host, slots in launch.hosts)]
    if launch.interfaces:
        line += ["--network-interfaces", ",".join(launch.interfaces)]
    if launch.remote_shell:
        line += ["--rsh", shlex.join(launch.remote_shell)]
    return line, mpirun.without_launchers({**os.environ, **launch.settings})


def _count(num_proc: int, np: int | None) -> int:
    count = num_proc if np is None else np
    if np is not None and num_proc not in (1, np):
        raise ArgumentError(f"num_proc={num_proc} and np={np} are the same parameter; give one")
    if not isinstance(count, int) or count < 1:
        name = "num_proc" if np is None else "np"
        raise ArgumentError(f"{name} must be a whole number, 1 or more, not {count!r}")
    return count


def _places(
    hosts: str | None, hostfile: str | os.PathLike[str] | None, size: int
) -> tuple[Host, ...]:
    """Return the hosts and their slots; none: this host."""
    if hosts is not None and hostfile is not None:
        raise ArgumentError("hosts and hostfile are two ways to say the same; give one")
    if hosts is not None:
        places = parse_hosts(hosts)
    elif hostfile is not None:
        places = parse_hostfile(Path(hostfile).read_text().splitlines(), hostfile)
    else:
        return ()
    slots = sum(count for _, count in places)
    if slots < size:
        raise ArgumentError(f"num_proc={size}, but the hosts have {slots} slots in all")
    return places


def _networks(names: Sequence[str] | None, joined: str | None) -> list[str]:
    if joined is not None:
        return joined.split(",")
    return list(names or ())


def _start_timeout(seconds: float | None) -> float:
    if seconds is not None:
        return seconds
    text = os.environ.get("HOROVOD_START_TIMEOUT") or str(_START_TIMEOUT)
    try:
        return float(text)
    except ValueError as exc:
        raise ConfigError(f"HOROVOD_START_TIMEOUT={text!r}: expected seconds") from exc


@contextmanager
def _private_directory() -> Iterator[Path]:
    """Yield a directory that only this user can enter: what lies in it is unpickled."""
    with tempfile.TemporaryDirectory(prefix="hvdkit-run-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _task(
    directory: Path, size: int, output: str | os.PathLike[str] | None, *, same_python: bool
) -> dict[str, str | int | list[str] | None]:
    """Return what a guard is told; another Python finds its modules by itself."""
    return {
        "directory": str(directory),
        "host": os.uname().nodename,
        "size": size,
        "path": [str(Path(entry).absolute()) for entry in sys.path] if same_python else None,
        "output": None if output is None else str(Path(output).absolute()),
    }
