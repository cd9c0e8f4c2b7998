"""A cable that holds frames back and loses some, for kernels without netem.

    relay.py DEVICE DEVICE SECONDS LOSS

Makes two TAP devices; what is sent on the first comes out of the second after some seconds, unless
it gets lost; the way back takes no time.  With one such cable a host, each frame between two hosts
is held back once.  Frames are not reordered.  Writes a line when the devices are there; the cable
is gone, and its devices with it, when this process ends.
"""

from __future__ import annotations

import fcntl
import os
import random
import selectors
import struct
import sys
import time
from collections import deque
from contextlib import suppress

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000

#: No frame is longer.
FRAME = 2**16

#: How many frames wait at most: more than a link of 10 Gbit/s and 10 ms holds.
WAITING = 20_000


def open_tap(name: str) -> int:
    """Make a TAP device; return the descriptor through which its frames go."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI)
    fcntl.ioctl(descriptor, _TUNSETIFF, request)
    return descriptor


def pass_on(source: int, target: int) -> None:
    """Move all frames that are there."""
    with suppress(BlockingIOError):
        while True:
            frame = os.read(source, FRAME)
            with suppress(OSError):  # a device that is down, or full, loses frames
                os.write(target, frame)


def hold_back(source: int, waiting: deque[tuple[float, bytes]], due: float, loss: float) -> None:
    """Take in all frames that are there."""
    with suppress(BlockingIOError):
        while True:
            frame = os.read(source, FRAME)
            if len(waiting) < WAITING and random.random() >= loss:
                waiting.append((due, frame))


def relay(host: int, network: int, delay: float, loss: float) -> None:
    """Move frames, for ever."""
    waiting: deque[tuple[float, bytes]] = deque()
    selector = selectors.SelectSelector()  # the one that takes fractions of milliseconds
    selector.register(host, selectors.EVENT_READ)
    selector.register(network, selectors.EVENT_READ)
    while True:
        left = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready = {key.fd for key, _ in selector.select(left)}
        if host in ready:
            hold_back(host, waiting, time.monotonic() + delay, loss)
        if network in ready:
            pass_on(network, host)
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            with suppress(OSError):
                os.write(network, waiting.popleft()[1])


def main() -> None:
    host, network, delay, loss = sys.argv[1:]
    descriptors = open_tap(host), open_tap(network)
    with suppress(PermissionError):  # where ranks keep all cores busy, the cable gets longer
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    relay(*descriptors, float(delay), float(loss))


if __name__ == "__main__":
    main()
