"""``hvdkit simulate``: a collective, or a training step, on ranks that nobody has."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from hvdkit.cli import simulate_training
from hvdkit.cli.simulate_network import add_network_options, disturbance_of, network_of
from hvdkit.cli.units import format_seconds, format_size, parse_size
from hvdkit.schedules.registry import ALGORITHMS
from hvdkit.simulation.collective import Outcome, names, simulate
from hvdkit.simulation.network import Network

if TYPE_CHECKING:
    # argparse has no public name for the type of what add_subparsers() returns.
    from argparse import _SubParsersAction


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``simulate`` to the subcommands of ``hvdkit``."""
    parser = subparsers.add_parser(
        "simulate",
        help="play a collective or a training step on ranks that nobody has",
        description="Play the real schedules, all ranks' steps, over links with latency, bandwidth "
        "and contention.",
    )
    whats = parser.add_subparsers(title="what", required=True, metavar="WHAT")
    for collective in ALGORITHMS:
        _add_collective(whats, collective)
    simulate_training.add_parser(whats)


def _add_collective(
    subparsers: _SubParsersAction[argparse.ArgumentParser], collective: str
) -> None:
    parser = subparsers.add_parser(collective, help=f"by {', '.join(ALGORITHMS[collective])}")
    parser.add_argument("--ranks", type=int, required=True, help="number of ranks")
    parser.add_argument(
        "--bytes",
        type=_sizes,
        default=[0.0] if collective == "barrier" else None,
        required=collective != "barrier",
        metavar="SIZE[,SIZE...]",
        help="of the message; of several, where one algorithm overtakes the other is said as well",
    )
    parser.add_argument(
        "--algorithm",
        default="all",
        metavar="NAME[,NAME...]",
        help="all (default), or some of them; an all-reduce may be hierarchical/NAME as well, with "
        "the algorithm that shards take across nodes",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds")
    add_network_options(parser)
    parser.set_defaults(run=run, collective=collective)


def run(args: argparse.Namespace) -> int:
    """Print what each algorithm takes, what bounds it, and which is best.

    Raises:
        ArgumentError: an algorithm that there is not, or numbers that make no sense.
    """
    network, disturbance = network_of(args, args.ranks), disturbance_of(args)
    chosen = args.algorithm.split(",")
    algorithms = names(args.collective, network) if chosen == ["all"] else chosen
    outcomes = [
        [
            simulate(name, nbytes, network, collective=args.collective, disturbance=disturbance)
            for name in algorithms
        ]
        for nbytes in args.bytes
    ]
    if args.json:
        print(json.dumps([_record(some) for row in outcomes for some in row], indent=2))
        return 0
    print(f"{args.collective} among {_describe(network, args.topology)}")
    for row in outcomes:
        print("\n" + _table(row))
    if len(outcomes) > 1:
        print("\n" + _crossovers([_best(row) for row in outcomes]))
    return 0


def _sizes(text: str) -> list[float]:
    return sorted(parse_size(part) for part in text.split(","))


def _describe(network: Network, topology: str) -> str:
    if network.nodes == 1:
        return f"{network.size} ranks on one node"
    return (
        f"{network.size} ranks on {network.nodes} nodes of {network.per_node} "
        f"({topology}, {network.placement})"
    )


def _best(row: Sequence[Outcome]) -> Outcome:
    return min(row, key=lambda some: some.seconds)


def _table(row: Sequence[Outcome]) -> str:
    """Return a line an algorithm, the best one first."""
    width = max(len("algorithm"), *(len(some.algorithm) for some in row))
    lines = [
        f"{format_size(row[0].nbytes)}; no algorithm can be below {format_seconds(row[0].least)}",
        f"{'algorithm':<{width}}  {'time':>10}  {'busbw':>11}  {'x least':>8}  bound by",
    ]
    lines += [
        f"{some.algorithm:<{width}}  {format_seconds(some.seconds):>10}  "
        f"{some.busbw / 1e9:>6.3g} GB/s  {some.times_least:>8.3g}  {_bounds(some)}"
        for some in sorted(row, key=lambda some: some.seconds)
    ]
    return "\n".join(lines)


def _bounds(some: Outcome) -> str:
    """Return the parts that matter, largest first: ``"latency 62 %, NICs 35 %"``."""
    parts = sorted(some.parts.items(), key=lambda part: -part[1])
    shares = [(name, part / some.seconds) for name, part in parts if part > 0]
    return ", ".join(f"{name} {share:.0%}".replace("%", " %") for name, share in shares[:2])


def _crossovers(best: Sequence[Outcome]) -> str:
    """Return which algorithm is best from which size to which."""
    spans = [list(some) for _, some in groupby(best, key=lambda some: some.algorithm)]
    lines = [
        f"  {format_size(span[0].nbytes)} to {format_size(span[-1].nbytes)}: {span[0].algorithm}"
        if len(span) > 1
        else f"  {format_size(span[0].nbytes)}: {span[0].algorithm}"
        for span in spans
    ]
    return "best:\n" + "\n".join(lines)


def _record(some: Outcome) -> dict[str, object]:
    return {
        "collective": some.collective,
        "algorithm": some.algorithm,
        "bytes": some.nbytes,
        "ranks": some.size,
        "seconds": some.seconds,
        "busbw": some.busbw,
        "least_seconds": some.least,
        "bound_by": some.bound_by,
        "parts": some.parts,
        "messages": some.messages,
    }
