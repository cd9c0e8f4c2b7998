import os
import signal

# A shell's background job ignores Ctrl-C, and so would all that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What a developer has tuned must not change which algorithms the tests see.
os.environ.setdefault("HVDKIT_TUNING_FILE", "off")
