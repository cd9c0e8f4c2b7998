"""`hvdrun` without a job: options, places, environments, command lines and what is shown."""

import argparse
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from hvdkit.cli import hvdrun, hvdrun_options
from hvdkit.errors import ArgumentError, HvdkitError, LauncherError, UnsupportedError
from hvdkit.launch import agent, hosts, mpirun, output, start
from hvdkit.launch.agents import Agent, Task
from hvdkit.launch.hosts import Place
from hvdkit.launch.mpirun import Mpirun
from hvdkit.launch.output import Display, Style
from hvdkit.launch.team import Team


def parse(line):
    parser = argparse.ArgumentParser(prog="hvdrun", allow_abbrev=False)
    hvdrun_options.add_options(parser)
    return parser.parse_args(shlex.split(line))


# Options


def test_the_program_keeps_its_own_options():
    args = parse("-np 4 -H a:2,b:2 --tcp python -u train.py --verbose -np 7 -- x")
    assert (args.num_proc, args.hosts, args.tcp, args.mpi, args.verbose) == (
        4,
        "a:2,b:2",
        True,
        False,
        False,
    )
    assert args.command == shlex.split("python -u train.py --verbose -np 7 -- x")


def test_options_become_the_variables_of_the_configuration():
    line = """-np 2 --fusion-threshold-mb 32 --timeline-filename t.json --no-stall-check
        --stall-check-warning-time-seconds 5 --stall-check-shutdown-time-seconds 7.5
        --log-level debug --start-timeout 33 --gloo-timeout-seconds 40 python x.py"""
    assert hvdrun_options.settings(parse(line)) == {
        "HVDKIT_FUSION_THRESHOLD": "33554432",
        "HVDKIT_TIMELINE": "t.json",
        "HVDKIT_STALL_CHECK_DISABLE": "1",
        "HVDKIT_STALL_CHECK_TIME_SECONDS": "5",
        "HVDKIT_STALL_SHUTDOWN_TIME_SECONDS": "7.5",
        "HVDKIT_LOG_LEVEL": "DEBUG",
        "HVDKIT_START_TIMEOUT": "33",
        "HOROVOD_GLOO_TIMEOUT_SECONDS": "40",
    }
    assert hvdrun_options.settings(parse("-np 2 python")) == {}


def test_the_configuration_understands_every_variable_that_is_set():
    line = "-np 2 --fusion-threshold-mb 0.5 --stall-check --start-timeout 9 --log-level ERROR x"
    told = hvdrun_options.settings(parse(line))
    config = hvdrun.Config.from_environment(told)
    assert config.bucket_bytes == 2**19
    assert config.stall_check_disable is False
    assert config.start_timeout == 9
    assert config.log_level == 40


#: All of horovodrun's (0.28).
HOROVODRUN = """
    -v --version -np --num-proc -cb --check-build --disable-cache --start-timeout
    --network-interfaces --network-interface --output-filename --verbose --config-file -p --ssh-port
    -i --ssh-identity-file --fusion-threshold-mb --cycle-time-ms --cache-capacity
    --hierarchical-allreduce --no-hierarchical-allreduce --hierarchical-allgather
    --no-hierarchical-allgather --torus-allreduce --no-torus-allreduce --autotune --no-autotune
    --autotune-log-file --autotune-warmup-samples --autotune-steps-per-sample
    --autotune-bayes-opt-max-samples --autotune-gaussian-process-noise --min-np --min-num-proc
    --max-np --max-num-proc --slots-per-host --elastic-timeout --reset-limit
    --blacklist-cooldown-range --timeline-filename --timeline-mark-cycles
    --no-timeline-mark-cycles --no-stall-check --stall-check --stall-check-warning-time-seconds
    --stall-check-shutdown-time-seconds --mpi-threads-disable --no-mpi-threads-disable --mpi-args
    --tcp --binding-args --num-nccl-streams --thread-affinity --gloo-timeout-seconds --log-level
    --log-with-timestamp --log-without-timestamp -prefix-timestamp --prefix-output-with-timestamp
    --log-hide-timestamp --no-log-hide-timestamp -H --hosts -hostfile --hostfile
    --host-discovery-script --gloo --mpi --jsrun
"""


def test_every_option_of_horovodrun_is_known():
    parser = argparse.ArgumentParser()
    hvdrun_options.add_options(parser)
    known = {name for action in parser._actions for name in action.option_strings}
    assert set(HOROVODRUN.split()) - known == {"-v", "--version"}  # which main() adds


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--cycle-time-ms 3", ["--cycle-time-ms has no effect"]),
        ("--autotune --thread-affinity 0", ["--autotune has", "--thread-affinity has"]),
        ("--disable-cache --no-autotune --log-without-timestamp", []),
    ],
)
def test_options_that_only_tune_horovod_are_said_to_have_no_effect(options, said):
    args = parse(f"-np 2 {options} python")
    hvdrun_options.refuse(args)
    lines = list(hvdrun_options.without_effect(args))
    assert len(lines) == len(said)
    for line, beginning in zip(lines, said, strict=True):
        assert line.startswith(beginning)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ("--min-np 2", UnsupportedError, "--min-np: .*elastic jobs are not supported"),
        ("--host-discovery-script x", UnsupportedError, "elastic jobs are not supported"),
        ("--blacklist-cooldown-range 1 2", UnsupportedError, "elastic jobs"),
        ("--jsrun", UnsupportedError, "start the program with jsrun itself"),
        ("--mpi --gloo", ArgumentError, "exclude each other"),
        ("--tcp --mpi-args=-v", ArgumentError, "--mpi-args is for mpirun"),
        ("--tcp --binding-args=x", ArgumentError, "--binding-args is for mpirun"),
    ],
)
def test_options_that_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        hvdrun_options.refuse(parse(f"-np 2 {options} python"))


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("", "no program is given"),
        ("python x.py", "how many ranks"),
        ("-np 2 -H a:1 --hostfile b python", "give one"),
        ("-np 2 -H a python", "expected host1:2,host2:4"),
        ("-np 2 --hostfile /nowhere/at/all python", "/nowhere/at/all cannot be read"),
        ("-np 2 --start-timeout nan python", "expected a number of seconds"),
        ("-np 3 -H a:1,b:1 --tcp python", "the hosts have 2 slots in all"),
    ],
)
def test_mistakes_are_status_2_and_one_message(line, text, capsys):
    assert hvdrun.main(shlex.split(line)) == 2
    said = capsys.readouterr().err
    assert said.startswith("hvdrun: ")
    assert text in said
    assert "Traceback" not in said


def test_the_transport_variable_is_followed(monkeypatch, capsys):
    monkeypatch.setenv("HVDKIT_TRANSPORT", "tcp")
    args = parse("-np 1 python")
    assert hvdrun._choose(args, hvdrun._read(args)) is None
    assert hvdrun.main(["-np", "1", "--mpi", "python"]) == 2
    assert hvdrun.main(["-np", "1", "--mpi-args=-v", "python"]) == 2
    monkeypatch.setenv("HVDKIT_TRANSPORT", "mpi")
    assert hvdrun.main(["-np", "1", "--tcp", "python"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "hvdrun: HVDKIT_TRANSPORT=tcp and --mpi contradict each other; give one",
        "hvdrun: --mpi-args is for mpirun, which --tcp does without; give one",
        "hvdrun: HVDKIT_TRANSPORT=mpi and --tcp contradict each other; give one",
    ]


def test_the_secret_that_a_user_has_set(monkeypatch):
    show = "import os; print(os.environ['HVDKIT_SECRET'])"
    program = ["-np", "1", "--tcp", sys.executable, "-c", show]
    code = "import sys; from hvdkit.cli.hvdrun import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *program]
    for secret, status, said in (("ab" * 32, 0, "[0] " + "ab" * 32), ("short", 2, "")):
        monkeypatch.setenv("HVDKIT_SECRET", secret)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout.strip()) == (status, said)
    assert done.stderr.startswith("hvdrun: HVDKIT_SECRET: expected 32 hexadecimal digits or more")


def test_a_file_that_is_no_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, hint in (("mean.py", "write  python mean.py"), ("mean", "see chmod +x")):
        (tmp_path / name).write_text("")
        said = agent.find_missing({"command": [name], "files": []}, dict(os.environ))
        assert said == f"{name!r} is a file, but no program that can be executed; {hint}"


def test_output_files_that_cannot_be_written(tmp_path):
    file = tmp_path / "plain"
    file.write_text("")
    code = "import sys; from hvdkit.cli.hvdrun import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-np", "1", "--tcp", "--output-filename", str(file), "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"hvdrun: --output-filename={file}: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_misspelt_option_and_a_number_that_is_none(capsys):
    for line, said in (
        ("-np 2 --fusion-treshold-mb=3 python", "--fusion-treshold-mb=3"),
        ("-np 0 python", "'0' is not a whole number, 1 or more"),
        ("-np 2 --log-level x y", "invalid choice: 'X'"),
    ):
        with pytest.raises(SystemExit) as ended:
            hvdrun.main(shlex.split(line))
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_without_a_number_all_slots_are_used(tmp_path):
    (tmp_path / "hosts").write_text("a slots=2\nb slots=3 # more\n")
    launch = hvdrun._read(parse(f"--hostfile {tmp_path / 'hosts'} -- python x.py"))
    assert (launch.size, launch.hosts) == (5, (("a", 2), ("b", 3)))
    assert launch.command == ("python", "x.py")


def test_interfaces_may_be_given_together_or_one_by_one():
    line = "-np 1 --network-interfaces a,b --network-interface c python"
    assert hvdrun._read(parse(line)).interfaces == ("a", "b", "c")


# The configuration file


@pytest.fixture
def yaml(monkeypatch):
    """A parser of JSON, which is YAML, in PyYAML's place."""
    parser = types.ModuleType("yaml")
    parser.YAMLError = json.JSONDecodeError
    parser.safe_load = json.loads
    monkeypatch.setitem(sys.modules, "yaml", parser)


def read_config(tmp_path, sections, line):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(sections))
    args = parse(f"--config-file {path} {line}")
    hvdrun_options.read_config_file(args)
    return args


@pytest.mark.usefixtures("yaml")
def test_a_configuration_file_fills_in_what_the_command_line_leaves_out(tmp_path):
    sections = {
        "controller": "gloo",
        "params": {"fusion_threshold_mb": 16, "cycle_time_ms": 2},
        "autotune": {"enabled": False, "log_file": None},
        "timeline": {"filename": "t.json"},
        "stall_check": {"enabled": False, "warning_time_seconds": 9},
        "logging": {"level": "INFO"},
    }
    args = read_config(tmp_path, sections, "--fusion-threshold-mb=8 -np 2 python --log-level")
    assert args.tcp
    assert args.fusion_threshold_mb == 8
    told = hvdrun_options.settings(args)
    assert told["HVDKIT_STALL_CHECK_DISABLE"] == "1"
    assert told["HVDKIT_STALL_CHECK_TIME_SECONDS"] == "9"
    assert told["HVDKIT_TIMELINE"] == "t.json"
    assert told["HVDKIT_LOG_LEVEL"] == "INFO"
    assert [line.split()[0] for line in hvdrun_options.without_effect(args)] == ["--cycle-time-ms"]


@pytest.mark.usefixtures("yaml")
@pytest.mark.parametrize("name", ["num-proc", "num_proc", "np"])
def test_a_configuration_file_may_be_written_as_the_options_are(tmp_path, name):
    sections = {name: 2, "stall-check": {"enabled": False, "warning-time-seconds": 9}}
    args = read_config(tmp_path, sections, "python")
    assert args.num_proc == 2
    told = hvdrun_options.settings(args)
    assert told["HVDKIT_STALL_CHECK_DISABLE"] == "1"
    assert told["HVDKIT_STALL_CHECK_TIME_SECONDS"] == "9"


@pytest.mark.usefixtures("yaml")
@pytest.mark.parametrize("sections", [{"parms": {}}, {"params": {"fusion": 1}}, [1]])
def test_a_configuration_file_with_something_unknown(tmp_path, sections):
    with pytest.raises(ArgumentError, match=r"config\.yaml"):
        read_config(tmp_path, sections, "-np 2 python")


def test_a_configuration_file_without_a_parser(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(UnsupportedError, match="pip install pyyaml"):
        read_config(tmp_path, {}, "-np 2 python")


# Places


def test_hosts_are_filled_up_in_their_order():
    three = (("a", 2), ("b", 1), ("c", 4))
    assert hosts.place(three, 4) == (Place("a", (0, 1)), Place("b", (2,)), Place("c", (3,)))
    assert hosts.place(three, 2) == (Place("a", (0, 1)),)
    assert hosts.place((("a", 1), ("b", 1), ("a", 1)), 3) == (Place("a", (0, 1)), Place("b", (2,)))
    with pytest.raises(ArgumentError, match="8 ranks are asked for, but the hosts have 7 slots"):
        hosts.place(three, 8)


def test_what_ranks_are_told_of_their_place():
    told = hosts.rank_environments(hosts.place((("a", 2), ("b", 1), ("c", 2)), 5))
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
    rows = {rank: [int(told[rank][f"HVDKIT_{name}"]) for name in names] for rank in told}
    assert rows == {
        0: [0, 5, 0, 2, 0, 3],
        1: [1, 5, 1, 2, 0, 2],
        2: [2, 5, 0, 1, 1, 3],
        3: [3, 5, 0, 2, 2, 3],
        4: [4, 5, 1, 2, 1, 2],
    }


def test_this_host():
    name = os.uname().nodename
    assert all(hosts.is_here(each) for each in ("localhost", "127.0.0.1", "::1", name))
    assert not hosts.is_here("a-host-of-another-name")
    assert not hosts.is_here("192.0.2.1")


def test_own_addresses():
    assert "127.0.0.1" in hosts.own_addresses(["lo"])
    assert "127.0.0.1" not in hosts.own_addresses()
    with pytest.raises(ArgumentError, match=r"no network interface 'nosuch0'.* it has .*lo"):
        hosts.own_addresses(["nosuch0"])


# Command lines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None,), []),
        (("rsh -l me",), ["rsh", "-l", "me"]),
        (("rsh", 22, "key"), ["rsh", "-p", "22", "-i", "key"]),
        ((None, 22), ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-p", "22"]),
    ],
)
def test_how_other_hosts_are_reached(arguments, words):
    assert list(start.remote_shell(*arguments)) == words


def test_how_mpirun_is_told_to_reach_other_hosts():
    words = ("/bin/sh", "-x", "y")
    agent_5 = {"PRTE_MCA_plm_ssh_agent": "/bin/sh", "PRTE_MCA_plm_ssh_args": "-x y"}
    assert mpirun.reach(Mpirun("m", 5), words) == agent_5
    assert mpirun.reach(Mpirun("m", 4), words[:1]) == {"OMPI_MCA_plm_rsh_agent": "/bin/sh"}
    hydra = {"HYDRA_LAUNCHER_EXEC": "/bin/sh", "HYDRA_LAUNCHER_EXTRA_ARGS": "-x y"}
    assert mpirun.reach(Mpirun("m", None), words) == hydra | {"HYDRA_LAUNCHER": "rsh"}
    assert mpirun.reach(Mpirun("m", None), ("/nowhere/ssh",))["HYDRA_LAUNCHER"] == "ssh"


@pytest.mark.parametrize(
    ("line", "files"),
    [
        ("python train.py --data x.py", ["train.py"]),
        ("/usr/bin/python3.11 -u -O a/b.py", ["a/b.py"]),
        ("python -m package.py", []),
        ("python -c x.py", []),
        ("./train.py", []),
        ("bash train.py", []),
    ],
)
def test_the_script_that_every_host_must_have(line, files):
    assert start._files(shlex.split(line)) == files


@pytest.mark.parametrize(
    ("open_mpi", "said", "fits"),
    [
        (5, "Open MPI v5.0.11, package: x", True),
        (4, "Open MPI v5.0.11, package: x", False),
        (None, "Open MPI v5.0.11", False),
        (None, "MPICH Version:      5.0.2", True),
        (5, "MPICH Version:      5.0.2", False),
        (None, "Some other MPI 1.0", False),
    ],
)
def test_whether_mpirun_and_the_library_fit(tmp_path, open_mpi, said, fits):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {shlex.quote(said)}\n")
    python.chmod(0o755)
    if fits:
        mpirun.check_fits(Mpirun("/bin/mpirun", open_mpi), str(python), os.environ)
        return
    with pytest.raises(LauncherError, match="worlds of one") as error:
        mpirun.check_fits(Mpirun("/bin/mpirun", open_mpi), str(python), os.environ)
    assert said in str(error.value)
    assert "/bin/mpirun" in str(error.value)


def test_a_python_whose_mpi4py_finds_no_library(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'RuntimeError: cannot load MPI library' >&2; exit 1\n")
    python.chmod(0o755)
    with pytest.raises(LauncherError, match=r"loads no MPI library in .*cannot load MPI library"):
        mpirun.check_fits(Mpirun("/bin/mpirun", 5), str(python), os.environ)


def test_tcp_where_no_mpirun_fits_and_an_error_where_mpi_is_asked_for(monkeypatch, capsys):
    def find(*_):
        raise LauncherError("there is none")

    monkeypatch.setattr(hvdrun, "find_mpi", find)
    for line, error in (("-np 2 --verbose x", False), ("-np 2 --mpi x", True)):
        args = parse(line)
        if error:
            with pytest.raises(LauncherError, match="there is none"):
                hvdrun._choose(args, hvdrun._read(args))
        else:
            assert hvdrun._choose(args, hvdrun._read(args)) is None
    assert (
        "over TCP, because there is no mpirun that fits: there is none" in capsys.readouterr().err
    )


# What is shown


class Shown:
    """A display, and what it has shown."""

    def __init__(self, **options):
        self.stdout, self.stderr = io.BytesIO(), io.BytesIO()
        folder, size = options.pop("folder", None), options.pop("size", 4)
        self.display = Display(
            self.stdout, self.stderr, style=Style(**options), folder=folder, size=size
        )

    @property
    def out(self):
        return self.stdout.getvalue().decode()

    @property
    def err(self):
        return self.stderr.getvalue().decode()


def test_labels():
    shown = Shown()
    shown.display.write(0, "o", b"hello")
    shown.display.write(3, "e", b"oh")
    shown.display.write_unlabelled(b"by mpirun\n")
    assert shown.out == "[0] hello\n"
    assert shown.err == "[3:err] oh\nby mpirun\n"


def test_colours_are_of_the_label_alone_and_by_rank():
    shown = Shown(colours=(True, False))
    for rank in (0, 1):
        shown.display.write(rank, "o", b"x")
        shown.display.write(rank, "e", b"x")
    assert shown.out == "\x1b[36m[0]\x1b[0m x\n\x1b[32m[1]\x1b[0m x\n"
    assert "\x1b" not in shown.err


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_colours_on_a_terminal_only(environ, wanted):
    terminal = io.BytesIO()
    terminal.isatty = lambda: True
    assert output.wants_colours(terminal, environ) == wanted
    assert not output.wants_colours(io.BytesIO(), environ)


def test_timestamps_and_no_labels():
    shown = Shown(labels=False)
    shown.display.write(1, "o", b"plain")
    assert shown.out == "plain\n"
    shown = Shown(timestamps=True)
    shown.display.write(1, "o", b"text")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[1\] text\n", shown.out)


def test_parts_of_lines_wait_for_their_end_and_never_mix():
    shown = Shown()
    shown.display.write(0, "O", b"one ")
    shown.display.write(1, "O", b"two ")
    shown.display.write(0, "o", b"of 0")
    assert shown.out == "[0] one of 0\n"
    shown.display.end_rank(1, failed=False)
    assert shown.out == "[0] one of 0\n[1] two \n"


def test_a_line_without_an_end_does_not_fill_the_memory():
    shown = Shown()
    for _ in range(5):
        shown.display.write(0, "O", b"x" * 2**19)
    assert shown.out.count("\n") == 1
    shown.display.close()
    assert shown.out.count("x") == 5 * 2**19


def test_a_progress_bar_moves_until_another_rank_speaks():
    shown = Shown()
    shown.display.write(0, "O", b"10%\r")
    shown.display.write(0, "O", b"20%\r30%\r")
    shown.display.write(1, "o", b"hello")
    shown.display.write(0, "o", b"with carriage return\r")
    bars = "[0] 10%\r[0] 20%\r[0] 30%\r"
    assert shown.out == f"{bars}\n[1] hello\n[0] with carriage return\r\n"


TRACEBACK = b"Traceback (most recent call last):"


def fail(shown, rank, *lines):
    for line in (TRACEBACK, b"  File x", *lines):
        shown.display.write(rank, "e", line)


def errors(shown):
    return re.findall(r"\[(\d):err\] (?:hvdkit\.errors\.)?(\w+Error)", shown.err)


def test_the_first_failures_traceback_comes_before_those_that_tell_of_it():
    shown = Shown()
    fail(shown, 2, b"hvdkit.errors.PeerError: rank 1 died")
    fail(shown, 1, b"ZeroDivisionError: the cause")
    shown.display.write(0, "e", b"RuntimeError in the meantime")
    shown.display.write_unlabelled(b"mpirun's own\n")
    shown.display.end_rank(2, failed=True)
    assert shown.err == ""
    shown.display.end_rank(1, failed=True)
    assert errors(shown) == [("1", "ZeroDivisionError"), ("2", "PeerError"), ("0", "RuntimeError")]
    assert shown.err.endswith("mpirun's own\n")
    assert [shown.display.is_secondary(rank) for rank in range(3)] == [False, False, True]


def test_a_traceback_of_a_rank_that_goes_on_is_shown_soon(monkeypatch):
    shown = Shown()
    fail(shown, 0, b"ValueError: caught and logged")
    shown.display.release_overdue()
    assert shown.err == ""
    monkeypatch.setattr(output, "SECONDS_TO_KEEP", -1.0)
    shown.display.release_overdue()
    assert errors(shown) == [("0", "ValueError")]


def test_at_the_end_everything_is_shown():
    shown = Shown()
    fail(shown, 0, b"hvdkit.errors.PeerError: rank 3 died")
    fail(shown, 3, b"KeyError: 'x'")
    shown.display.write(1, "O", b"no end")
    shown.display.close()
    assert errors(shown) == [("3", "KeyError"), ("0", "PeerError")]
    assert shown.out == "[1] no end\n"


def test_output_files_are_without_labels(tmp_path):
    shown = Shown(folder=tmp_path / "new/folder", size=11)
    shown.display.write(3, "O", b"a ")
    shown.display.write(3, "o", b"line")
    shown.display.write(10, "e", b"error")
    shown.display.close()
    assert (tmp_path / "new/folder/rank.03/stdout").read_bytes() == b"a line\n"
    assert (tmp_path / "new/folder/rank.10/stderr").read_bytes() == b"error\n"
    assert shown.out == "[3] a line\n"


# The agent


def test_records():
    reading, writing = os.pipe()
    outlet = agent.Outlet(writing, paced=False)
    outlet.send("O", 12, b"a \x1ehvd b")
    outlet.send("x", 0, b"-9 1")
    outlet.flush()
    lines = os.read(reading, 4096).split(b"\n")
    assert [agent.read_record(line) for line in lines] == [
        ("O", 12, b"a \x1ehvd b"),
        ("x", 0, b"-9 1"),
        None,
    ]
    os.close(reading)
    os.close(writing)


def test_lines_are_cut_into_pieces_that_mpirun_passes_on_whole():
    data = b"x" * 8000 + b"\nshort\n\nrest"
    pieces = agent._PIECES.findall(data)
    assert b"".join(pieces) == data
    assert max(map(len, pieces)) < 3600
    assert [piece[-1:] == b"\n" for piece in pieces] == [False, False, True, True, True, False]


def team_of(command, *, reach=(), raw=False, ranks=1):
    shown = Shown()
    task = Task("n1", command, [(rank, {"R": str(rank)}) for rank in range(ranks)], raw=raw)
    agents = [Agent(task, reach, os.environ)]
    return Team(agents, ranks, shown.display), shown


def test_an_agent_starts_ranks_and_tells_how_they_end():
    team, shown = team_of(["sh", "-c", "echo out $R; echo err >&2; exit $R"], ranks=2)
    with team:
        team.check(30)
        team.go()
        assert team.wait(30) == 1
    assert sorted(shown.out.splitlines()) == ["[0] out 0", "[1] out 1"]
    assert team.explain() == f"rank 1 of 2 on {os.uname().nodename} ended with status 1"


def test_what_a_killed_mpirun_has_left_is_named():
    says = 'echo "The PMIx server\'s listener thread failed to start." >&2; exit 3'
    team, shown = team_of(["sh", "-c", says], raw=True)
    with team:
        team.check(30)
        team.go()
        assert team.wait(30) == 3
        assert re.search(r"earlier one .* was killed.* Remove ompi\.\* in /", team.explain())
    assert "listener thread" in shown.err


def test_what_mpirun_says_is_text():
    """Open MPI's is not: what a NUL is in, grep takes for a binary file."""
    team, shown = team_of(["printf", r"sorry\n\0\n"], raw=True)
    with team:
        team.check(30)
        team.go()
        team.wait(30)
    assert shown.out + shown.err == "sorry\n\n"


def test_a_job_is_over_with_its_agents_whoever_holds_their_pipes_open():
    """As a shared ssh connection does, and what mpirun has left on a host that was lost."""
    team, shown = team_of(["sh", "-c", "setsid sleep 25 & echo the end"], raw=True)
    began = time.monotonic()
    with team:
        team.check(30)
        team.go()
        team.wait(30)
        assert time.monotonic() - began < 20
    assert shown.out + shown.err == "the end\n"


def test_ranks_of_which_nothing_is_heard_fail_a_job_that_mpirun_says_went_well():
    """As Open MPI's does when a host is lost."""
    told = r"\036hvd s 0 here\n\036hvd s 1 there\n\036hvd s 2 there\n\036hvd x 0 0 0\n"
    mpirun = f"[ $R != 0 ] || printf '{told}'"
    team, _ = team_of(["sh", "-c", mpirun], raw=True, ranks=3)
    with team:
        team.check(30)
        team.go()
        assert team.wait(30) == 1
        said = "mpirun ended without word of how ranks 1-2 did; what it said stands above"
        assert team.explain() == said


def test_an_agent_that_does_not_answer_is_not_waited_for():
    team, _ = team_of(["true"], reach=["sh", "-c", "sleep 100"])
    with pytest.raises(LauncherError, match=r"n1: no answer within 0\.3 s"), team:
        team.check(0.3)


def test_noise_of_a_login_shell_does_no_harm():
    team, shown = team_of(["echo", "x"], reach=["sh", "-c", 'echo "Welcome!"; eval "$0"'])
    with team:
        team.check(30)
        team.go()
        assert team.wait(30) == 0
    assert shown.out == "[0] x\n"


def test_the_agent_imports_nothing_of_the_directory_it_runs_in(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(tmp_path)
    team, shown = team_of(["echo", "x"])
    with team:
        team.check(30)
        team.go()
        assert team.wait(30) == 0
    assert shown.out == "[0] x\n"


def test_the_agent_needs_nothing_but_the_standard_library():
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", f"exec(open({agent.__file__!r}).read(), {{}})"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_hvdrun_is_a_script_of_the_package():
    text = Path(hvdrun.__file__).parents[2].joinpath("pyproject.toml").read_text()
    assert 'hvdrun = "hvdkit.cli.hvdrun:main"' in text
    assert issubclass(LauncherError, HvdkitError)
