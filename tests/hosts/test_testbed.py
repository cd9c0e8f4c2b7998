"""The hosts themselves: apart from one another, linked as asked, and gone when their owner is."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from testbed import Link, Testbed

SECONDS = 30

#: Namespaces that each host has of its own.
KINDS = ("net", "uts", "ipc", "mnt")

#: Sends some bytes, until one comes back, some times over; prints the median time.
PROBE = """
    import socket, statistics, sys, threading, time
    count, nbytes = int(sys.argv[2]), int(sys.argv[3])
    def serve(listener):
        with listener.accept()[0] as peer:
            for _ in range(count):
                left = nbytes
                while left:
                    left -= len(peer.recv(left))
                peer.sendall(b"!")
    if sys.argv[1] == "serve":
        both = {"family": socket.AF_INET6, "dualstack_ipv6": True}
        with socket.create_server(("", 5000), **both) as listener:
            print("ready", flush=True)
            serve(listener)
    else:
        times = []
        with socket.create_connection((sys.argv[1], 5000), 30) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(count):
                began = time.perf_counter()
                peer.sendall(bytes(nbytes))
                peer.recv(1)
                times.append(time.perf_counter() - began)
        print(statistics.median(times))
"""


def seconds_between(hosts, count, nbytes, to="beta"):
    """Return the median time of sending `nbytes` from alpha to beta, until a byte comes back."""
    probe = [sys.executable, "-I", "-c", textwrap.dedent(PROBE)]
    amounts = [str(count), str(nbytes)]
    server = hosts.start("beta", [*probe, "serve", *amounts])
    assert server.stdout.readline() == "ready\n", server.communicate()[1]
    ended = hosts.run("alpha", [*probe, to, *amounts], timeout=SECONDS)
    hosts.finish(server, timeout=SECONDS)
    assert ended.status == 0, ended.stderr
    return float(ended.stdout)


def test_hosts_share_nothing_but_files(hosts):
    hosts.run("alpha", ["touch", "/dev/shm/of-alpha"])
    namespaces = {str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in KINDS}
    for name in hosts.names:
        links = " ".join(f"/proc/self/ns/{kind}" for kind in KINDS)
        ended = hosts.run(name, ["sh", "-c", f"hostname; pwd; readlink {links}; ls /dev/shm"])
        said = ended.stdout.splitlines()
        assert said[:2] == [name, str(Path.cwd())]
        assert namespaces.isdisjoint(said[2:6])
        namespaces.update(said[2:6])
        # MPICH leaves files of its own there, where a job was killed.
        assert ("of-alpha" in said[6:]) == (name == "alpha")
    assert not Path("/dev/shm/of-alpha").exists()
    hosts.run("alpha", ["rm", "/dev/shm/of-alpha"])


@pytest.mark.parametrize("to", ["beta", "beta-v6"])
def test_hosts_reach_one_another_by_name(hosts, to):
    assert 0 < seconds_between(hosts, 5, 1, to) < 10


def test_the_agent_takes_sshs_place(hosts):
    def ssh(*arguments):
        return hosts.run("alpha", [hosts.ssh, *arguments], timeout=SECONDS)

    ended = ssh("-x", "-o", "BatchMode=yes", "-p", "22", "me@beta", "hostname;", "exit", "3")
    assert (ended.status, ended.stdout) == (3, "beta\n")
    piped = hosts.run("alpha", ["sh", "-c", f"echo words | {hosts.ssh} beta cat"])
    assert piped.stdout == "words\n"
    assert ssh("beta", "echo", "[$ONLY_HERE]").stdout == "[]\n"
    nowhere = ssh("nowhere", "true")
    assert nowhere.status == 255
    assert "Could not resolve hostname nowhere" in nowhere.stderr


def test_a_host_that_is_cut_off_is_not_reached(hosts, cut):
    cut("beta")
    ended = hosts.run("alpha", [hosts.ssh, "beta", "true"], timeout=SECONDS)
    assert ended.status == 255
    assert "ssh: connect to host beta port 22" in ended.stderr
    assert hosts.run("alpha", [hosts.ssh, "gamma", "true"], timeout=SECONDS).status == 0


def test_signals_reach_commands_and_nothing_outlives_them(hosts):
    apart = "setsid sh -c 'echo up; exec sleep 60 > /dev/null 2>&1'"
    script = f"trap 'echo heard; exit 4' INT; {apart} & wait"
    job = hosts.start("alpha", ["sh", "-c", script])
    assert job.stdout.readline() == "up\n"
    job.send_signal(signal.SIGINT)
    assert job.communicate(timeout=SECONDS)[0] == "heard\n"
    assert job.returncode == 4
    assert hosts.sweep() == ["alpha: sleep 60"]
    assert hosts.sweep() == []


def test_rate(hosts, shaped):
    shaped(Link(rate=1e8))
    seconds = seconds_between(hosts, 3, 2_500_000)
    assert 0.17 < seconds < 20  # 0.2 s, and what the machine is busy with


def test_delay(hosts, shaped):
    shaped(Link(delay=0.02))
    assert 0.04 < seconds_between(hosts, 7, 1) < 10


def test_rate_and_delay(hosts, shaped):
    shaped(Link(rate=1e8, delay=0.005))
    assert 0.01 < seconds_between(hosts, 7, 1) < 10
    assert 0.17 < seconds_between(hosts, 2, 2_500_000) < 20


#: For up to a minute, for what asks for beta's address may itself get lost, several times.
SEND = """
    import socket, time
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as to:
        for number in range(12_000):
            to.sendto(b"%d" % number, ("beta", 5001))
            time.sleep(0.005)
"""
RECEIVE = """
    import socket
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here:
        here.bind(("", 5001))
        here.settimeout(60)
        print("ready", flush=True)
        numbers = [int(here.recv(9)) for _ in range(100)]
        print(numbers[-1] - numbers[0] + 1)
"""


def test_loss(hosts, shaped):
    """Of many datagrams some arrive and some do not."""
    shaped(Link(loss=0.5))
    run = [sys.executable, "-I", "-c"]
    receiver = hosts.start("beta", [*run, textwrap.dedent(RECEIVE)])
    assert receiver.stdout.readline() == "ready\n"
    sender = hosts.start("alpha", [*run, textwrap.dedent(SEND)])
    sent = int(hosts.finish(receiver, timeout=90).stdout)
    sender.terminate()
    sender.communicate()
    assert 120 < sent < 1000, "while 100 have arrived"


@pytest.mark.usefixtures("hosts")
def test_nothing_is_left_of_an_owner_that_is_killed(tmp_path):
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(OWNER)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "TMPDIR": str(tmp_path)},
    )
    try:
        assert owner.stdout.readline() == "up\n"
        assert len(processes_with(tmp_path)) >= 4
    finally:
        owner.kill()
        owner.communicate()
    deadline = time.monotonic() + SECONDS
    while processes_with(tmp_path):
        assert time.monotonic() < deadline, processes_with(tmp_path)
        time.sleep(0.05)
    assert [path.name for path in tmp_path.glob("hvdkit-hosts-*")] != []
    again = subprocess.run(
        [sys.executable, "-c", "from testbed import Testbed\nwith Testbed(['one']): pass"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "TMPDIR": str(tmp_path)},
        timeout=SECONDS,
        check=False,
    )
    assert again.returncode == 0
    assert list(tmp_path.glob("hvdkit-hosts-*")) == []


OWNER = """
    import time
    from testbed import Link, Testbed, why_not
    link = Link(delay=0.001)
    with Testbed(["one", "two"], Link() if why_not(link) else link) as hosts:
        hosts.start("one", ["sleep", "1000", str(hosts.directory)])
        hosts.start("one", [hosts.ssh, "two", "sleep", "1001", str(hosts.directory)])
        print("up", flush=True)
        time.sleep(600)
"""


def processes_with(path):
    """Return the command lines in which `path` stands."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        found += [line] if str(path) in line else []
    return found


@pytest.mark.usefixtures("hosts")
def test_an_error_while_hosts_are_made_leaves_none(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"on switch: .*qdisc"), Testbed(["a"], Link(rate=-1.0)):
        pass
    assert list(tmp_path.iterdir()) == []
    assert processes_with(tmp_path) == []
