"""Become a member of a job over TCP: reach the store in which its ranks meet, share a secret."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping

from hvdkit.errors import ConfigError, LauncherError
from hvdkit.transport.meetings import Meeting
from hvdkit.transport.stores import HTTPStore, RendezvousServer, Store

#: Of a secret that rank 0 makes, and the least of one that a user sets.
_SECRET_BYTES, _LEAST_SECRET_BYTES = 32, 16

#: The stores that this process holds as rank 0, by port.  They last as long as the process, for
#: other ranks may join again before this one does.
_held: dict[int, RendezvousServer] = {}


def store_of(meeting: Meeting, scope: str, secret: bytes | None, timeout: float) -> Store:
    """Return the store that all ranks of the job share."""
    if meeting.size == 1:
        return _Nowhere()
    if meeting.store == "torch":
        # By name, for nothing but the adapters may depend on torch; torchrun's own store can only
        # be spoken to through it.
        try:
            adapter = importlib.import_module("hvdkit.torch.store")
        except ImportError as exc:
            raise LauncherError(
                f"torchrun started this process, but its Python has no torch ({exc}), through "
                "which ranks meet in torchrun's store: install it, or take hvdrun --tcp"
            ) from exc
        found: Store = adapter.TorchStore(meeting.address, meeting.port, scope, timeout=timeout)
        return found
    address = meeting.address
    if meeting.store == "own" and meeting.rank == 0:
        _hold_store(meeting, secret)
        address = "127.0.0.1,::1"
    # Horovod's server knows of no secret, and hvdrun's has the one that is in the environment.
    proven = None if meeting.mark == "HOROVOD_RANK" else secret
    return HTTPStore(address, meeting.port, scope, proven, timeout=timeout)


def _hold_store(meeting: Meeting, secret: bytes | None) -> None:
    if meeting.port in _held:
        return
    try:
        _held[meeting.port] = server = RendezvousServer(secret, port=meeting.port)
    except OSError as exc:
        raise LauncherError(
            f"rank 0 cannot hold the ranks' meeting place at port {meeting.port} ({exc}), perhaps "
            "because torch.distributed has its own there: set HVDKIT_RENDEZVOUS_PORT to a free "
            "port, the same on all ranks"
        ) from exc
    server.start()


def secret_of_user(environ: Mapping[str, str]) -> bytes | None:
    """Return what HVDKIT_SECRET says, which hvdrun sets, or a user."""
    text = environ.get("HVDKIT_SECRET", "")
    if not text:
        return None
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) < _LEAST_SECRET_BYTES:  # the error does not show it
        raise ConfigError(
            f"HVDKIT_SECRET: expected {2 * _LEAST_SECRET_BYTES} hexadecimal digits or more, as "
            "openssl rand -hex 32 prints them"
        )
    return secret


def agree_on_secret(meeting: Meeting, store: Store, timeout: float) -> bytes:
    """Return a secret that rank 0 makes and hands on through the store.  Collective.

    It keeps out of the job whoever cannot read the store: strangers who connect to a rank's port,
    and the ranks of other jobs.  Whoever can reach the store may read it there (neither Horovod's
    nor torch's asks who one is); against these, set HVDKIT_SECRET on all ranks.
    """
    if meeting.rank > 0:
        return store.get("secret", timeout)
    secret = secrets.token_bytes(_SECRET_BYTES)
    store.put("secret", secret)
    return secret


class _Nowhere:
    """The store of a world of one, in which nothing is looked for."""

    def put(self, key: str, value: bytes) -> None:
        pass

    def get(self, key: str, timeout: float) -> bytes:
        raise TimeoutError(f"there is no {key!r}: this rank is alone ({timeout:g} s)")
