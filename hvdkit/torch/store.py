"""The key-value store that torchrun's agent holds, for ranks that meet in it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch import distributed

dist: Any = distributed  # whose stubs do not export its stores


class TorchStore:
    """A client of torch's TCPStore; fulfils `hvdkit.transport.stores.Store`.

    Args:
        address: where the store is held.
        port: of it.
        scope: of the keys: what other scopes store is apart.
        timeout: seconds in which it must be reached.

    Raises:
        TimeoutError: it was not.
    """

    def __init__(self, address: str, port: int, scope: str, *, timeout: float) -> None:
        self._place = f"{address} port {port}"
        try:
            store = dist.TCPStore(
                address,
                port,
                is_master=False,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,
            )
        except (dist.DistError, RuntimeError) as exc:
            raise TimeoutError(f"cannot reach torchrun's store, {self._place}: {exc}") from exc
        self._store = dist.PrefixStore(scope, store)

    def put(self, key: str, value: bytes) -> None:
        try:
            self._store.set(key, value)
        except (dist.DistError, RuntimeError) as exc:
            raise TimeoutError(f"cannot store {key!r} in torchrun's store: {exc}") from exc

    def get(self, key: str, timeout: float) -> bytes:
        try:
            self._store.wait([key], timedelta(seconds=timeout))
            return bytes(self._store.get(key))
        except (dist.DistError, RuntimeError) as exc:
            raise TimeoutError(
                f"cannot get {key!r} within {timeout:g} s from torchrun's store, {self._place}"
            ) from exc
