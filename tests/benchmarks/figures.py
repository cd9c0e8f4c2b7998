"""Made-up figures of known noise."""

import numpy as np
from records import OURS, PEER, ROOF, Result, Run

SIZES = (4, 4096, 65536, 2**20, 2**24)

#: Seconds of a call without noise, by name; and what the candidate is.
CANDIDATES = {
    "shm": (1e-6, OURS),
    "ring": (9e-6, OURS),
    "MPI library": (2e-6, PEER),
    "gloo": (5e-4, PEER),
    "memory roof": (5e-7, ROOF),
}


def made_run(seed, *, turns=21, scale=1.0, drift=0.0, slower=None, without=()):
    """Return a run of an all-reduce on 2 ranks.

    Args:
        seed: of the noise.
        turns: of each candidate.
        scale: factor of everything, as of a machine that is slower today.
        drift: deviation of the logarithm of each figure, as from one run to the next.
        slower: factors by (name, bytes) or by name.
        without: names that are left out.
    """
    rng = np.random.default_rng(seed)
    results = []
    for nbytes in SIZES:
        for name, (latency, kind) in CANDIDATES.items():
            if name in without:
                continue
            seconds = (latency + nbytes * 1e-10) * scale * np.exp(drift * rng.standard_normal())
            factors = slower or {}
            seconds *= factors.get((name, nbytes), factors.get(name, 1.0))
            samples = seconds * np.exp(0.05 * rng.standard_normal(turns))
            results.append(
                Result("Open MPI 5", 2, "allreduce", name, nbytes, tuple(samples), 0, kind)
            )
    machine = {"processor": "made up", "cores": "2 of 2"}
    versions = {"hvdkit": "0.1.0", "MPI": "Open MPI 5"}
    return Run("allreduce", "2026-11-21T12:00:00+0000", machine, versions, tuple(results))
