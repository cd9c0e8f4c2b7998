"""All-reduce by dtype and operation, against the float32 sum of as many bytes, in one run.

    mpirun -n 2 python benchmarks/dtypes.py [--sizes 64KiB 16MiB] [--out FILE.json]

In place, in shared memory, on ordinary buffers and on buffers in the arena.  See measuring.py for
the method.  "x float32 Sum" above 1 is faster than the float32 sum of the same number of bytes.
"""

from __future__ import annotations

import measuring
import numpy as np
import options
from measuring import Candidate, Prepared
from options import Choice

import hvdkit as hvd
from hvdkit.dtypes import DTYPES, ReduceOp

SIZES = ["64KiB", "1MiB", "16MiB", "64MiB"]
SHORT_SIZES = ["64KiB", "16MiB"]
DTYPE_NAMES = ["float16", "bfloat16", "float64", "int8", "int32", "int64"]
REFERENCE = "float32 Sum"


def candidate(dtype: np.dtype, op: ReduceOp, *, arena: bool) -> Candidate:
    def prepare(nbytes: int) -> Prepared:
        count = nbytes // dtype.itemsize
        x = hvd.empty(count, dtype) if arena else np.zeros(count, dtype)

        def call() -> None:
            hvd.allreduce_(x, op=op, algorithm="shm")

        def check() -> int:
            x[:] = (np.arange(count) % 3 + hvd.rank()).astype(dtype)
            everyone = [(np.arange(count) % 3 + rank) for rank in range(hvd.size())]
            combine = {hvd.Sum: np.add, hvd.Min: np.minimum, hvd.Max: np.maximum}
            wanted = combine.get(op, np.multiply).reduce(everyone).astype(dtype)
            call()
            wrong = int(np.count_nonzero(x != wanted))
            x[:] = 0
            return wrong

        return call, check

    return Candidate(f"{dtype.name} {op}", prepare)


def main() -> None:
    parser = options.parser(
        __doc__,
        sizes=Choice(SIZES, short=SHORT_SIZES),
        dtype=Choice(DTYPE_NAMES, DTYPE_NAMES),
    )
    args = options.start(parser)
    measuring.show_machine()
    by_name = {dtype.name: dtype for dtype in DTYPES}
    pairs = [(by_name["float32"], op) for op in (hvd.Sum, hvd.Min, hvd.Max, hvd.Product)]
    pairs += [(by_name[name], hvd.Sum) for name in args.dtype]
    results = []
    for arena in (False, True):
        everyone = [candidate(dtype, op, arena=arena) for dtype, op in pairs]
        where = "arena" if arena else "shm"
        results += measuring.run(f"allreduce, {where}", args.sizes, everyone, turns=args.turns)
    measuring.report("dtypes", results, args.out)


if __name__ == "__main__":
    main()
