"""All-reduce between hosts: links of several rates and delays, over MPI's messages and over TCP.

    python benchmarks/hosts.py [--links "1 Gbit/s; unlimited"] [--layouts "2 x 2; 2 + 1"]
        [--sizes 4 1MiB] [--algorithms ring tree] [--out FILE.json]

The hosts are namespaces on this machine (see tests/hosts/testbed), so their ranks share its cores,
and only the links are what they are called.  Open MPI is told to yield when idle, and so is hvdkit
where there are more ranks than cores, for the ranks of a host cannot know of those of the others.
In each job, of which links.py is a rank, hvdkit's algorithms and the MPI library's own all-reduce
take turns on the same link.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "hosts"))

import options
from options import Choice
from testbed import Link, Testbed, why_not
from testbed.launchers import over_mpi, run_ranks, slots_of
from tqdm import tqdm

LINKS = {
    "100 Mbit/s": Link(rate=1e8),
    "1 Gbit/s": Link(rate=1e9),
    "10 Gbit/s": Link(rate=1e10),
    "unlimited": Link(),
    "1 Gbit/s + 1 ms": Link(rate=1e9, delay=1e-3),
    "unlimited + 1 ms": Link(delay=1e-3),
}
DEFAULT_LINKS = ("100 Mbit/s", "1 Gbit/s", "unlimited", "1 Gbit/s + 1 ms")
SHORT_LINKS = ("1 Gbit/s",)

#: Hosts x ranks on each, or the ranks of one host + those of another.
LAYOUTS = {
    "2 x 1": "alpha:1,beta:1",
    "2 + 1": "alpha:2,beta:1",
    "2 x 2": "alpha:2,beta:2",
    "3 x 1": "alpha:1,beta:1,gamma:1",
    "3 x 2": "alpha:2,beta:2,gamma:2",
}

#: What hvdkit's messages go over.
TRANSPORTS = ("mpi", "tcp")

SHORT_LAYOUTS = ("2 x 1", "2 x 2")

SIZES = ("4", "4KiB", "64KiB", "512KiB", "4MiB")

#: A size is left out if the link alone would need longer for it.
LONGEST = 0.05

TURNS = 15

#: Those that cannot be had between the ranks are left out.
ALGORITHMS = (
    "auto",
    "gathered",
    "hierarchical",
    "recursive_doubling",
    "halving_doubling",
    "all_pairs",
    "ring",
    "tree",
)

#: Seconds that a job may take.
JOB_SECONDS = 240.0

RANK = Path(__file__).with_name("links.py")


def main() -> int:
    parser = options.parser(
        __doc__,
        turns=TURNS,
        sizes=Choice(SIZES),
        algorithms=Choice(ALGORITHMS, ALGORITHMS),
        peers=Choice(["mpi"], ["mpi"]),
    )
    parser.add_argument("--links", type=names_of(LINKS), default=())
    parser.add_argument("--layouts", type=names_of(LAYOUTS), default=())
    parser.add_argument("--transports", nargs="+", default=TRANSPORTS, choices=TRANSPORTS)
    args = options.read(parser)
    options.say_ignored(args)
    links = args.links or (SHORT_LINKS if args.short else DEFAULT_LINKS)
    layouts = args.layouts or (SHORT_LAYOUTS if args.short else list(LAYOUTS))
    reason = why_not(Link())
    if reason:
        print(f"nothing is measured: {reason}")
        return 0
    cases = [
        (link, layout, over) for link in links for layout in layouts for over in args.transports
    ]
    began, failed, shaped = time.monotonic(), 0, ""
    with Testbed(["alpha", "beta", "gamma"]) as hosts:
        for case in tqdm(cases, unit="job"):
            link = case[0]
            reason = why_not(LINKS[link])
            if reason:
                print(f"\n{link}: not measured, {reason}")
                continue
            if link != shaped:
                hosts.shape(LINKS[link])
                shaped = link
            failed += not run_job(hosts, case, args)
    print(f"\n{time.monotonic() - began:.0f} s")
    return min(failed, 1)


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return what reads some of the `known` names: semicolons between them, spaces as you like."""
    spelled = {"".join(name.split()): name for name in known}

    def read(text: str) -> list[str]:
        asked = ["".join(name.split()) for name in text.split(";")]
        unknown = [name for name in asked if name not in spelled]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"there is no {unknown[0]!r}; there are {'; '.join(spelled.values())}"
            )
        return [spelled[name] for name in asked]

    return read


def run_job(hosts: Testbed, case: tuple[str, str, str], args: argparse.Namespace) -> bool:
    """Run a job, and show what its first rank says; return whether it ended well."""
    link, layout, transport = case
    rate = LINKS[link].rate
    sizes = [n for n in args.sizes if rate is None or 8 * n / rate <= LONGEST]
    title = f"allreduce, {layout} ranks, {link}, over {transport.upper()}"
    program = [sys.executable, str(RANK), title, transport, "--turns", str(args.turns)]
    program += ["--sizes", *map(str, sizes)]
    program += ["--algorithms", *args.algorithms, "--peers", *args.peers]
    if args.out:
        program += ["--out", str(args.out.resolve())]
    ranks = sum(slots_of(LAYOUTS[layout]).values())
    told = {"HVDKIT_SPIN": "0"} if ranks > (os.cpu_count() or 1) else {}
    try:
        ended = run_ranks(
            hosts, over_mpi, LAYOUTS[layout], program, timeout=JOB_SECONDS, variables=told
        )
    except AssertionError as exc:
        print(f"\n{title}: FAILED, {exc}", flush=True)
        return False
    hosts.sweep()
    print(ended.stdout, end="", flush=True)
    if ended.status:
        print(f"\n{title}: FAILED\n{ended.stderr}", flush=True)
    return ended.status == 0


if __name__ == "__main__":
    sys.exit(main())
