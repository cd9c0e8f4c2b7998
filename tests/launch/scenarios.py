"""Jobs of several scenarios, each between an `init` and a `shutdown`, to save their start.

What their ranks print in brackets is what is looked at.
"""

import re
import textwrap
from concurrent.futures import ThreadPoolExecutor

from launching import run, start

RANKS = 3

#: Until a job has ended.
SECONDS = 45

#: With memory that ranks share; with messages between ranks; and with messages in place of mail.
TRANSPORTS = {"shared": {}, "messages": {"HVDKIT_SHM": "0"}, "mail": {"MAIL": "messages"}}

PRELUDE = """
    import logging, os, sys, threading, time
    import numpy as np
    import hvdkit as hvd
    from hvdkit.api import communicator, context
    from hvdkit.engine.bucketing import Gradient
    from hvdkit.transport.mail import PipeMail

    if os.environ.get("MAIL") == "messages":  # as between nodes
        PipeMail.create = lambda local: "there are several nodes"
    heard = []

    class Ears(logging.Handler):
        def emit(self, record):
            heard.append(record.getMessage())

    logging.getLogger("hvdkit").addHandler(Ears())
    logging.getLogger("hvdkit").propagate = False

    def begin(**limits):
        global rank, sets, reducer
        for name, seconds in limits.items():
            os.environ[f"HVDKIT_{name}_TIME_SECONDS"] = str(seconds)
        hvd.init()
        rank = hvd.rank()
        sets = [hvd.add_process_set(pair) for pair in ([0, 1], [1, 2], [0, 2])]
        reducer = context().gradient_reducer([Gradient("w", (5,), np.dtype("f4"))])
        hvd.barrier()

    def asynchronous(name, process_set=None, count=3):
        x = np.ones(count)
        among = communicator(process_set)
        return among.allreduce_async([(x, x)], name=name, op=hvd.Sum, result=x)

    def synchronous(name=None, process_set=None, count=3):
        return hvd.allreduce(np.ones(count), op=hvd.Sum, name=name, process_set=process_set)

    def say(*words):
        sys.stdout.write(f"[{' '.join(str(word) for word in words)}]\\n")
        sys.stdout.flush()

    def outcome(function, *arguments, **keywords):
        # Return the result, or the kind of the error and its message in one line.
        try:
            return function(*arguments, **keywords)
        except hvd.HvdkitError as exc:
            return f"{type(exc).__name__}: " + " | ".join(map(str.strip, str(exc).splitlines()))
"""


def source_of(script):
    """Return the script with the prelude before it."""
    return textwrap.dedent(PRELUDE) + textwrap.dedent(script)


def begin(script, transport, **environment):
    """Start a script on three ranks, after the prelude."""
    return start(source_of(script), RANKS, environment=TRANSPORTS[transport] | environment)


def jobs(script, *transports, **environment):
    """Run a script on three ranks, once for each of the transports, all at the same time.

    Yields what was said, each job's in order, and the outcome.
    """
    with ThreadPoolExecutor() as pool:
        settings = [TRANSPORTS[transport] | environment for transport in transports]
        running = [
            pool.submit(run, source_of(script), RANKS, timeout=SECONDS, environment=setting)
            for setting in settings
        ]
        for each in running:
            ended = each.result()
            yield sorted(re.findall(r"\[(.*?)\]\n", ended.stdout)), ended


def end_well(*arguments, **keywords):
    """Run jobs that must end without an error; yields what was said."""
    for said, ended in jobs(*arguments, **keywords):
        assert ended.status == 0, ended.stderr
        assert "Traceback" not in ended.stderr, ended.stderr
        yield said


#: A script whose rank 1 ends as its argument says, while the others go on.
ENDS = """
import os, signal, sys
import numpy as np
import hvdkit as hvd

def raises():
    raise LookupError("rank 1 finds nothing")

def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)

hvd.init()
if hvd.rank() == 1:
    globals()[sys.argv[1]]()
for _ in range(1000):
    hvd.allreduce(np.ones(100_000))
"""
