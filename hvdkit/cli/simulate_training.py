"""``hvdkit simulate training``: the time of a step, and what bounds it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from hvdkit.cli.simulate_layers import FORMAT, Device, read_layers
from hvdkit.cli.simulate_network import add_network_options, disturbance_of, network_of
from hvdkit.cli.units import format_seconds, format_size, parse_count, parse_share, parse_size
from hvdkit.config import MIB
from hvdkit.parallel.pipeline.registry import SCHEDULES
from hvdkit.simulation.job import BEST, Job
from hvdkit.simulation.training import Step, simulate_training

if TYPE_CHECKING:
    # argparse has no public name for the type of what add_subparsers() returns.
    from argparse import _SubParsersAction

#: Bytes a parameter, by the gradients' dtype.
DTYPES = ("float32", "float16", "float64")


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``training`` to what can be simulated."""
    parser = subparsers.add_parser(
        "training",
        help="a step: buckets, overlap, pipeline and mesh together",
        description="Say how long a training step takes, what its time is made of, and what bounds "
        "it.",
        epilog=FORMAT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", required=True, metavar="LIST|FILE", help="see below")
    parser.add_argument("--flops", type=parse_count, metavar="RATE", help="of a rank, a second")
    parser.add_argument(
        "--samples", type=parse_count, default=1.0, help="of a microbatch: tokens (default 1)"
    )
    for axis, what in (
        ("data", "replicas"),
        ("pipeline", "ranks that share the layers"),
        ("tensor", "ranks that share each layer"),
    ):
        parser.add_argument(f"--{axis}", type=int, default=1, help=f"{what} (default 1)")
    parser.add_argument("--microbatches", type=int, default=1, help="of a step (default 1)")
    parser.add_argument(
        "--schedule", choices=tuple(SCHEDULES), default="1f1b", help="of the pipeline"
    )
    parser.add_argument(
        "--chunks", type=int, default=1, help="stages a rank, of interleaved (default 1)"
    )
    parser.add_argument(
        "--bucket", type=parse_size, default=25 * MIB, metavar="SIZE", help="(default 25MiB)"
    )
    parser.add_argument(
        "--algorithm", default=BEST, help=f"of the all-reduces (default {BEST}: the fastest)"
    )
    parser.add_argument(
        "--compression",
        type=parse_share,
        default=1.0,
        metavar="SHARE",
        help="of the gradients' bytes that travels (default 1)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the gradients")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds")
    add_network_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the time of a step, its parts, its efficiency and what bounds it.

    Raises:
        ArgumentError: layers that cannot be read, or numbers that make no sense.
    """
    job = Job(
        layers=read_layers(args.layers, Device(args.flops, args.samples)),
        data=args.data,
        pipeline=args.pipeline,
        tensor=args.tensor,
        microbatches=args.microbatches,
        schedule=args.schedule,
        chunks=args.chunks,
        bucket_bytes=int(args.bucket),
        algorithm=args.algorithm,
        compression=args.compression,
        dtype=args.dtype,
    )
    network = network_of(args, job.size)
    step = simulate_training(job, network, disturbance=disturbance_of(args))
    print(_json(step) if args.json else _text(job, step))
    return 0


def _text(job: Job, step: Step) -> str:
    lines = [
        f"{sum(layer.parameters for layer in job.layers) / 1e6:g} million parameters in "
        f"{len(job.layers)} layers; {job.size} ranks: data {job.data}, pipeline {job.pipeline}, "
        f"tensor {job.tensor}",
        f"step {format_seconds(step.seconds)}, efficiency {100 * step.efficiency:.1f} %; bound by "
        f"{step.bound_by}",
        f"on rank {step.last} along the pipeline, which is the last:",
    ]
    for name, seconds in step.parts.items():
        share = 100 * seconds / step.seconds if step.seconds else 0.0
        lines.append(f"  {name:<18} {format_seconds(seconds):>10}  {share:5.1f} %")
    if step.buckets:
        lines.append(f"  its all-reduces are hidden for {format_seconds(step.hidden)}")
        lines += ["", "bucket      bytes       ready        begin          end  algorithm"]
    for number, sent in enumerate(step.buckets):
        lines.append(
            f"{number:>6}  {format_size(sent.nbytes):>9}  {format_seconds(sent.ready):>10}  "
            f"{format_seconds(sent.begin):>10}   {format_seconds(sent.end):>10}  "
            f"{sent.reduced.algorithm}"
        )
    return "\n".join(lines)


def _json(step: Step) -> str:
    record = asdict(step) | {"efficiency": step.efficiency, "bound_by": step.bound_by}
    return json.dumps(record, indent=2)
