"""Start a program as the ranks of a job: over TCP, as plain processes, or by mpirun."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvdkit.errors import ArgumentError, LauncherError
from hvdkit.launch import agent, hosts, mpirun
from hvdkit.launch.agents import Agent, Task
from hvdkit.launch.hosts import Place
from hvdkit.launch.mpirun import Host, Mpirun
from hvdkit.launch.output import Display
from hvdkit.launch.remarks import Remarks
from hvdkit.launch.team import Team
from hvdkit.transport.membership import secret_of_user
from hvdkit.transport.stores import RendezvousServer

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What is to be started, and where."""

    command: tuple[str, ...]
    size: int
    hosts: tuple[Host, ...] = ()
    """Hosts and their slots; none: this host, with as many ranks as you like."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Environment variables for the ranks, besides this process's."""
    interfaces: tuple[str, ...] = ()
    start_timeout: float
    peer_timeout: float
    """Seconds after which a host that is silent counts as lost."""
    remote_shell: tuple[str, ...] = ()
    """What runs a command on a host, as ``ssh`` does; none: ssh itself."""
    mpi_arguments: tuple[str, ...] = ()
    verbose: bool = False

    def say(self, text: str) -> None:
        """Write to stderr, if that is wanted."""
        if self.verbose:
            sys.stderr.write(f"hvdrun: {text}\n")
            sys.stderr.flush()


#: Says which command reaches other hosts.
SHELL = "HVDKIT_RSH"

#: It never asks for a password: the job would wait for it.
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15")


def remote_shell(
    command: str | None, port: int | None = None, identity: str | None = None
) -> tuple[str, ...]:
    """Return the command that reaches a host, which is to be appended; empty if all are None."""
    login = [] if port is None else ["-p", str(port)]
    login += [] if identity is None else ["-i", identity]
    told = tuple(shlex.split(command or "")) or (_SSH if login else ())
    return (*told, *login)


def python_of(command: Sequence[str]) -> str:
    """Return the Python that runs a program, as far as its command tells; else this one."""
    program = shutil.which(command[0])
    is_python = program is not None and Path(program).name.startswith("python")
    return program if program is not None and is_python else sys.executable


def find_mpi(python: str, environ: Mapping[str, str]) -> Mpirun:
    """Return the mpirun of the MPI that `python` loads.

    Raises:
        LauncherError: there is none, or it is another MPI's.
    """
    found = mpirun.identify(mpirun.find_mpirun(python))
    mpirun.check_fits(found, python, environ)
    return found


def start_over_tcp(launch: Launch, display: Display) -> tuple[int, str | None]:
    """Start the ranks as processes of this host and others; return when the job has ended.

    Returns:
        its exit status, and what went wrong.

    Raises:
        ArgumentError: the hosts have too few slots.
        ConfigError: HVDKIT_SECRET, which is the job's if it is set, does not parse.
        LauncherError: a host cannot take part; nothing was started.
    """
    places = hosts.place(launch.hosts or (("localhost", launch.size),), launch.size)
    secret = secret_of_user({**os.environ, **launch.settings}) or secrets.token_bytes(32)
    here = all(hosts.is_here(place.host) for place in places)
    addresses = [_LOOPBACK] if here else hosts.own_addresses(launch.interfaces)
    if not addresses:
        raise LauncherError("this host has no address under which the others could reach it")
    try:
        server = RendezvousServer(secret, _LOOPBACK if here else "")
    except OSError as exc:
        raise LauncherError(f"cannot listen for the ranks: {exc}") from exc
    common = dict(launch.settings)
    if launch.interfaces:
        common["HVDKIT_TCP_INTERFACES"] = ",".join(launch.interfaces)
    with server:
        common |= {
            "HVDKIT_RENDEZVOUS_ADDR": ",".join(addresses),
            "HVDKIT_RENDEZVOUS_PORT": str(server.port),
        }
        told = hosts.rank_environments(places)
        for place in places:
            launch.say(f"{place.host}: ranks {', '.join(map(str, place.ranks))}")
            for rank in place.ranks:
                told[rank]["HVDKIT_SECRET"] = secret.hex()
        agents = [_agent_of(launch, place, common, told) for place in places]
        with Team(agents, launch.size, display) as team:
            team.check(launch.start_timeout)
            team.go()
            return team.wait(launch.start_timeout), team.explain()


def mpirun_line(launch: Launch, found: Mpirun) -> tuple[list[str], dict[str, str]]:
    """Return mpirun's command line, which the program's is to follow, and its environment.

    Raises:
        UnsupportedError: MPICH was given several interfaces.
    """
    wanted = {**os.environ, **launch.settings}
    variables = mpirun.environment(
        found, wanted, interfaces=launch.interfaces, root=os.geteuid() == 0
    )
    if launch.remote_shell:
        variables |= mpirun.reach(found, launch.remote_shell)
    if launch.hosts:
        variables = mpirun.watch(found, launch.peer_timeout) | variables
    line = mpirun.command(
        found,
        launch.size,
        launch.hosts,
        interfaces=launch.interfaces,
        arguments=launch.mpi_arguments,
        names=variables,
    )
    return line, variables


def check_hosts(launch: Launch, environment: Mapping[str, str], starter: Sequence[str]) -> None:
    """Check that all hosts can be reached and have the program.

    Args:
        launch: the program and the hosts.
        environment: mpirun's.
        starter: a Python and its file, which mpirun starts on each host for a rank.

    Raises:
        ArgumentError: this host lacks the program; or the hosts have too few slots.
        LauncherError: other hosts cannot be reached or lack something; names them.
    """
    python, file = starter
    places = hosts.place(launch.hosts, launch.size) if launch.hosts else ()
    sent = {name: text for name, text in environment.items() if mpirun.travels(name)}
    files = [*_files(launch.command), file]
    agents = [
        Agent(
            Task(place.host, launch.command, (), sent, files, python=python),
            _reach(launch, place.host),
            os.environ,
        )
        for place in places
        if not hosts.is_here(place.host)
    ]
    with Team(agents, 0, Display.nowhere()) as team:
        team.check(launch.start_timeout)
    if not places or len(agents) < len(places):
        _check_here(launch.command, environment)


def start_by_mpirun(launch: Launch, found: Mpirun, display: Display) -> tuple[int, str | None]:
    """Start the ranks by mpirun; return when the job has ended.

    Returns:
        its exit status, and what went wrong.

    Raises:
        ArgumentError: the hosts have too few slots.
        LauncherError: a host cannot take part; nothing was started.
        UnsupportedError: MPICH was given several interfaces.
    """
    relay = sys.executable, agent.__file__
    line, variables = mpirun_line(launch, found)
    line += [*relay, "--", *launch.command]
    launch.say(shlex.join(line))
    check_hosts(launch, variables, relay)
    task = Task("this host", line, [(0, {})], raw=True)
    remarks = None if launch.verbose else Remarks()
    with Team([Agent(task, (), variables)], launch.size, display, remarks=remarks) as team:
        team.check(launch.start_timeout)
        team.go()
        return team.wait(launch.start_timeout), team.explain()


def _agent_of(
    launch: Launch, place: Place, common: Mapping[str, str], told: Mapping[int, Mapping[str, str]]
) -> Agent:
    """Return the agent that starts a host's ranks."""
    ranks = [(rank, told[rank]) for rank in place.ranks]
    inherited = mpirun.without_launchers(os.environ)
    if hosts.is_here(place.host):
        task = Task(place.host, launch.command, ranks, common, _files(launch.command))
        return Agent(task, (), inherited)
    sent = {name: text for name, text in inherited.items() if mpirun.travels(name)}
    task = Task(place.host, launch.command, ranks, {**sent, **common}, _files(launch.command))
    return Agent(task, _reach(launch, place.host), os.environ)


def _reach(launch: Launch, host: str) -> list[str]:
    shell = launch.remote_shell or _SSH
    if shutil.which(shell[0]) is None:
        raise LauncherError(
            f"{host} cannot be reached: there is no {shell[0]} here; name another with --rsh or "
            "HVDKIT_RSH"
        )
    return [*shell, host]


def _check_here(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Check that this host has the program.

    Raises:
        ArgumentError: it does not.
    """
    task = {"command": command, "files": _files(command)}
    missing = agent.find_missing(task, dict(environment))
    if missing is not None:
        raise ArgumentError(missing)


def _files(command: Sequence[str]) -> list[str]:
    """Return the script in a command such as ``python train.py``, which every host must have."""
    script = next((word for word in command[1:] if not word.startswith("-")), "")
    is_python = Path(command[0]).name.startswith("python")
    options = command[1 : command.index(script)] if script else ()
    is_script = is_python and script.endswith(".py") and not {"-m", "-c"} & set(options)
    return [script] if is_script else []
