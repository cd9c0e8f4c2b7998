"""What a machine costs, in the terms of Hockney's model: what is fitted, predicted with, simulated.

A message of n bytes takes alpha + n beta; to reduce n bytes takes n gamma.  R. W. Hockney, "The
communication challenge for MPP: Intel Paragon and Meiko CS-2", Parallel Computing 20 (1994).
"""

from __future__ import annotations

from dataclasses import dataclass

#: What is taken for `Level.at_once` where nobody has measured it.
AT_ONCE = 0.1


@dataclass(frozen=True, slots=True)
class Level:
    """What messages between two ranks cost, within a node or between nodes.

    Args:
        alpha: seconds a message, whatever it carries.
        beta: seconds a byte on the way.
        gamma: seconds a byte that is reduced.
        at_once: what a message costs that is in flight beside another one, of alpha.
    """

    alpha: float
    beta: float
    gamma: float
    at_once: float = AT_ONCE


@dataclass(frozen=True, slots=True)
class Machine:
    """The two levels of a machine.

    Args:
        within: between ranks of one node.
        across: between ranks of different nodes.
    """

    within: Level
    across: Level


#: What is taken for a machine that nobody has measured: shared memory, and a link of 10 Gbit/s.
USUAL = Machine(
    within=Level(alpha=2e-6, beta=1e-10, gamma=5e-11),
    across=Level(alpha=20e-6, beta=8e-10, gamma=5e-11),
)
