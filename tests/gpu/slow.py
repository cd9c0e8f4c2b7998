"""Work that keeps a GPU's streams busy, so that what is not waited for is seen to be missing."""

import gc
from contextlib import contextmanager

import torch

from hvdkit.torch.ports import side_streams

SECONDS = 0.1


def device():
    return torch.device("cuda", torch.cuda.current_device())


def sleep(seconds=SECONDS):
    """Keep the current stream busy, for about so long."""
    torch.cuda._sleep(int(seconds * 1.5e9))  # cycles, of GPUs of about that frequency


def delay_copies():
    """Keep both side streams busy: copies come late."""
    for stream in side_streams(device()):
        with torch.cuda.stream(stream):
            sleep()


def late(tensor):
    """Return a copy of `tensor` on the device, computed late."""
    there = tensor.to(device())
    made = torch.full_like(there, 111 if there.dtype != torch.bool else True)
    sleep()
    return made.copy_(there)


def spoil_free_memory(like, count=8):
    """Take and overwrite memory such as `like` has, which must not be in use any more."""
    rubbish = [torch.full_like(like, 99, device=device()) for _ in range(count)]
    del rubbish


@contextmanager
def without_synchronisation():
    """Let torch raise where it would wait for the GPU unasked."""
    gc.collect()  # what earlier tests have left waits for its last copies
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def on(which):
    """Make "default", or "another", stream the current one."""
    if which == "default":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
