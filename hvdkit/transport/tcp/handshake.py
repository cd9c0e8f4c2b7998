"""Mutual proof of a shared secret, before a link carries anything else.

    the higher rank connects                       the lower rank accepts
    hello: job, ranks, size, nonce   ------------>
                                     <------------ nonce, HMAC("accepts", hello, nonce)     [1]
    HMAC("connects", hello, nonce)   ------------>                                          [2]
                                     <------------ HMAC("admitted", hello, nonce)           [3]

Each side proves the secret over the other's fresh nonce ([1], [2]), so that nothing recorded is of
use again; the words differ, so that nothing can be sent back to where it came from; the ranks and
the job are in the hello, so that nothing fits another link.  [3] tells who connects that it is in.

Every part is of a fixed length, and no more than that is read: a stranger's bytes are compared,
never interpreted.  The secret proves who connects; what follows on the link is neither encrypted
nor signed.

These are generators without any socket: each yields what to send and how much to wait for.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from collections.abc import Generator
from dataclasses import dataclass

MAGIC = b"hvdkit\x00\x01"  # the last byte is the version of the protocol
JOB_BYTES = 16
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_HELLO = struct.Struct(f">8s{JOB_BYTES}sIII{_NONCE_BYTES}s")  # job, from, to, size, nonce


class RefusedError(Exception):
    """Whoever is at the other end is not the rank that belongs there."""


@dataclass(frozen=True)
class Identity:
    """What a rank is, and what it can prove."""

    rank: int
    size: int
    job: bytes
    secret: bytes


@dataclass(frozen=True)
class Turn:
    """Send `send`, then wait for `want` bytes.

    `committed`: the other side may have admitted this one, so that giving up would leave it with a
    link that leads nowhere.
    """

    send: bytes
    want: int
    committed: bool = False


Script = Generator[Turn, bytes, int]


def offer(me: Identity, peer: int) -> Script:
    """Play the part of who connects to rank `peer`; return its rank.

    Raises:
        RefusedError: the other end does not prove that it is.
    """
    hello = _HELLO.pack(MAGIC, me.job, me.rank, peer, me.size, secrets.token_bytes(_NONCE_BYTES))
    answer = yield Turn(hello, _NONCE_BYTES + _PROOF_BYTES)
    transcript = hello + answer[:_NONCE_BYTES]
    _check(me, answer[_NONCE_BYTES:], b"accepts", transcript)
    verdict = yield Turn(_proof(me, b"connects", transcript), _PROOF_BYTES, committed=True)
    _check(me, verdict, b"admitted", transcript)
    return peer


def admit(me: Identity) -> Script:
    """Play the part of who accepts; return the rank of who has connected.

    Raises:
        RefusedError: that is no higher rank of this job.
    """
    hello = yield Turn(b"", _HELLO.size)
    magic, job, theirs, mine, size, _ = _HELLO.unpack(hello)
    if (magic, job, mine, size) != (MAGIC, me.job, me.rank, me.size):
        raise RefusedError("it is not of this job")
    if not me.rank < theirs < me.size:
        raise RefusedError(f"rank {theirs} has no reason to connect to rank {me.rank}")
    nonce = secrets.token_bytes(_NONCE_BYTES)
    transcript = hello + nonce
    proof = yield Turn(nonce + _proof(me, b"accepts", transcript), _PROOF_BYTES)
    _check(me, proof, b"connects", transcript)
    yield Turn(_proof(me, b"admitted", transcript), 0)
    return int(theirs)


def _proof(me: Identity, part: bytes, transcript: bytes) -> bytes:
    return hmac.digest(me.secret, part + b"\x00" + transcript, "sha256")


def _check(me: Identity, proof: bytes, part: bytes, transcript: bytes) -> None:
    if not hmac.compare_digest(proof, _proof(me, part, transcript)):
        raise RefusedError("it does not prove the job's secret")
