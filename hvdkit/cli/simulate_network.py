"""The options that say on what a simulation is played, and the network that they mean."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from hvdkit.cli.units import parse_rate, parse_seconds, parse_share, parse_size
from hvdkit.config import SEGMENT_BYTES
from hvdkit.errors import ArgumentError
from hvdkit.schedules.machine import USUAL, Level, Machine
from hvdkit.simulation.network import Disturbance, Network
from hvdkit.simulation.topologies import (
    Crossbar,
    FatTree,
    SharedNic,
    Topology,
    Torus,
    nearly_square,
)
from hvdkit.tuning import load

TOPOLOGIES = ("crossbar", "nic", "fat-tree", "torus")


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how nodes are linked, what messages cost, and who is slow."""
    links = parser.add_argument_group("the links")
    links.add_argument(
        "--ranks-per-node", type=int, metavar="N", help="of a full node (default: all on one)"
    )
    links.add_argument(
        "--topology",
        choices=TOPOLOGIES,
        default="nic",
        help="crossbar: nothing is shared; nic (default): a node's ranks share its link; fat-tree: "
        "a leaf's nodes share its uplinks as well; torus: nodes are linked to their neighbours",
    )
    links.add_argument("--radix", type=int, help="ports of a leaf switch (default 32)")
    links.add_argument(
        "--oversubscription", type=float, metavar="X", help="of a leaf's uplinks (default 1: none)"
    )
    links.add_argument(
        "--torus", metavar="AxB", help="nodes along each dimension (default: nearly square)"
    )
    links.add_argument(
        "--placement",
        choices=("block", "round-robin"),
        default="block",
        help="ranks numbered node by node, or a rank of each node in turn (default block)",
    )
    _add_costs(parser.add_argument_group("what messages cost"))
    slow = parser.add_argument_group("who is slow")
    slow.add_argument(
        "--straggler",
        type=_straggler,
        action="append",
        default=[],
        metavar="RANK:FACTOR",
        help="its messages and reductions take so many times as long; more than one may be given",
    )
    slow.add_argument(
        "--jitter", type=parse_share, default=0.0, metavar="SHARE", help="mean delay of a message"
    )
    slow.add_argument("--seed", type=int, default=0, help="of the jitter (default 0)")


def _add_costs(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tuning",
        type=Path,
        metavar="FILE",
        help="what hvdkit tune has fitted: of its entries the last one; the others change it",
    )
    group.add_argument("--latency", type=parse_seconds, metavar="TIME", help="between nodes")
    group.add_argument("--bandwidth", type=parse_rate, metavar="RATE", help="of a link of a node")
    group.add_argument("--within-latency", type=parse_seconds, metavar="TIME", help="in a node")
    group.add_argument("--within-bandwidth", type=parse_rate, metavar="RATE", help="in a node")
    group.add_argument("--reduction", type=parse_rate, metavar="RATE", help="bytes a rank reduces")
    group.add_argument(
        "--switch-latency", type=parse_seconds, default=0.0, metavar="TIME", help="a switch passed"
    )
    group.add_argument(
        "--segment",
        type=parse_size,
        default=SEGMENT_BYTES,
        metavar="SIZE",
        help="of a message, at most (default 512KiB)",
    )


def network_of(args: argparse.Namespace, size: int) -> Network:
    """Return the network of `size` ranks that the options mean.

    Raises:
        ArgumentError: a number makes no sense, or is for another topology.
    """
    per_node = size if args.ranks_per_node is None else args.ranks_per_node
    if size < 1 or per_node < 1:
        raise ArgumentError(f"{size} ranks, {per_node} a node: there must be at least one")
    return Network(
        size=size,
        ranks_per_node=per_node,
        machine=machine_of(args),
        topology=_topology(args, -(-size // min(per_node, size))),
        placement=args.placement,
        switch=args.switch_latency,
        segment_bytes=args.segment,
    )


def machine_of(args: argparse.Namespace) -> Machine:
    """Return the machine: the tuned one or the usual one, but for what the options say.

    Raises:
        ConfigError: the tuning file cannot be read.
    """
    usual = USUAL if args.tuning is None else _tuned(args.tuning)

    def level(known: Level, alpha: float | None, rate: float | None) -> Level:
        return replace(
            known,
            alpha=known.alpha if alpha is None else alpha,
            beta=known.beta if rate is None else 1 / rate,
            gamma=known.gamma if args.reduction is None else 1 / args.reduction,
        )

    return Machine(
        within=level(usual.within, args.within_latency, args.within_bandwidth),
        across=level(usual.across, args.latency, args.bandwidth),
    )


def _tuned(path: Path) -> Machine:
    entries = load(path)
    if not entries:
        raise ArgumentError(f"tuning file {path} is empty")
    return entries[-1].levels.messages


def disturbance_of(args: argparse.Namespace) -> Disturbance:
    """Return who is slow.

    Raises:
        ArgumentError: a factor or the jitter makes no sense.
    """
    return Disturbance(stragglers=dict(args.straggler), jitter=args.jitter, seed=args.seed)


def _topology(args: argparse.Namespace, nodes: int) -> Topology:
    for option, owner in (("radix", "fat-tree"), ("oversubscription", "fat-tree")):
        if getattr(args, option) is not None and args.topology != owner:
            raise ArgumentError(f"--{option} is for --topology {owner}, not {args.topology}")
    if args.torus is not None and args.topology != "torus":
        raise ArgumentError(f"--torus is for --topology torus, not {args.topology}")
    if args.topology == "crossbar":
        return Crossbar()
    if args.topology == "nic":
        return SharedNic()
    if args.topology == "torus":
        return Torus(nearly_square(nodes) if args.torus is None else _shape(args.torus))
    return FatTree(
        radix=32 if args.radix is None else args.radix,
        oversubscription=1.0 if args.oversubscription is None else args.oversubscription,
    )


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.lower().split("x"))
    except ValueError as exc:
        raise ArgumentError(f"--torus {text}: give the nodes along each dimension, as 8x8") from exc


def _straggler(text: str) -> tuple[int, float]:
    rank, _, factor = text.partition(":")
    try:
        return int(rank), float(factor)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is not RANK:FACTOR, as 3:1.5") from exc
