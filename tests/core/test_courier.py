"""Arrays from rank to rank: whole, in order under a tag, and without a deadlock in any order."""

import gc
import mmap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hvdkit.dtypes import DTYPES
from hvdkit.errors import HvdkitError, NotInitializedError, StallError
from hvdkit.transport import courier as module
from hvdkit.transport.base import Topology
from hvdkit.transport.courier import IN_MAIL, SLOT_BYTES, SLOTS, Courier, Loopback
from hvdkit.transport.threads import ThreadTransport, ThreadWorld

SECONDS = 30
RING = SLOTS * SLOT_BYTES


class OneNode(ThreadTransport):
    """A rank whose peers are all on its node."""

    def split_by_node(self):
        return self, Topology(self.rank, self.size, self.rank, self.size, 0, 1)


class ManyNodes(ThreadTransport):
    """A rank that is alone on its node."""

    def split_by_node(self):
        return self, Topology(self.rank, self.size, 0, 1, self.rank, self.size)


#: With memory that ranks share, and with messages.
WAYS = {"shared": OneNode, "messages": ManyNodes}


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


def on_ranks(size, body, way="shared", **limits):
    """Call `body` with a courier on each rank; return its results, in rank order."""
    world = ThreadWorld(size)

    def rank(transport):
        courier = Courier(WAYS[way](world, transport.rank), shared=True, **limits)
        assert (courier._rings is not None) == (way == "shared")
        try:
            result = body(courier)
        except BaseException:
            transport.world.barrier.abort()
            raise
        transport.allgather_object("everyone has everything")
        courier.close()
        return result

    return world.run(rank, timeout=SECONDS)


def numbers(count, dtype=np.float64, seed=0):
    """Return numbers that are all different, or nearly so."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 250, count).astype(dtype)


def assert_equal(found, wanted):
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_array_equal(found, wanted)


# Whatever the array


ARRAYS = {
    **{str(dtype): numbers((3, 5), dtype) for dtype in DTYPES},
    "0-d": np.array(2.5),
    "0-d bool": np.array(True),
    "empty": np.empty(0, np.float32),
    "empty, of two dimensions": np.empty((0, 3), np.complex128),
    "of no columns": np.empty((3, 0), np.int8),
    "one": np.ones(1),
    "transposed": numbers((4, 6)).T,
    "every other": numbers(40)[::2],
    "backwards": numbers(40)[::-1],
    "in Fortran's order": np.asfortranarray(numbers((5, 7))),
    "repeated": np.broadcast_to(numbers(3), (2, 3)),
    "big-endian": numbers(9, ">i4"),
    "read-only": np.frombuffer(b"12345678", np.uint16),
    "as much as goes in the mail": numbers(IN_MAIL, np.uint8),
    "a little more": numbers(IN_MAIL + 1, np.uint8),
    "a slot": numbers(SLOT_BYTES, np.uint8),
    "a slot and a little": numbers(SLOT_BYTES + 1, np.uint8),
    "the ring and a little": numbers(RING + 1, np.uint8),
    "large and transposed": numbers((SLOT_BYTES // 4, 3), np.float32).T,
}


def test_any_array_arrives_as_it_is_on_every_rank(way):
    """Also on the one that sends it."""

    def body(courier):
        for destination in range(courier.size):
            for name, array in ARRAYS.items():
                courier.send(destination, name, array)
        for source in range(courier.size):
            for name, array in ARRAYS.items():
                assert_equal(courier.receive(source, name), array)

    on_ranks(2, body, way)


def test_what_comes_can_be_changed_and_is_aligned(way):
    """As torch wants it."""

    def body(courier):
        if courier.rank == 0:
            for count in (3, 1000, 100_000):
                courier.send(1, "x", numbers(count, np.complex128))
        else:
            for count in (3, 1000, 100_000):
                array = courier.receive(0, "x")
                assert array.flags.writeable
                assert array.flags.aligned
                array += 1
                assert_equal(array, numbers(count, np.complex128) + 1)

    on_ranks(2, body, way)


def test_a_hundred_megabytes(way):
    data = numbers(100_000_000 // 8)

    def body(courier):
        if courier.rank == 0:
            courier.send(1, "large", data)
        else:
            assert_equal(courier.receive(0, "large"), data)

    on_ranks(2, body, way)


# Whatever the order


def test_many_small_ones_keep_their_order_under_each_tag(way):
    def body(courier):
        peer = 1 - courier.rank
        for number in range(1500):
            courier.send(peer, number % 3, np.array([number, courier.rank]))
        for tag in (2, 0, 1):
            for number in range(tag, 1500, 3):
                assert courier.receive(peer, tag).tolist() == [number, peer]

    on_ranks(2, body, way)


def test_large_and_small_ones_under_one_tag_keep_their_order(way):
    sizes = [5, RING + 3, 0, 2000, 3 * SLOT_BYTES, 2500, 1, RING, 7] * 2

    def body(courier):
        for destination in range(courier.size):
            for number, size in enumerate(sizes):
                courier.send(destination, "x", np.full(size, number, np.uint8))
        for source in reversed(range(courier.size)):
            for number, size in enumerate(sizes):
                assert_equal(courier.receive(source, "x"), np.full(size, number, np.uint8))

    on_ranks(3, body, way)


def test_tags_are_received_in_any_order(way):
    """A large one that is asked for last does not stop those behind it."""
    tags = ["a", ("activations", 3), 7, None]

    def body(courier):
        for number, tag in enumerate(tags):
            courier.send(1 - courier.rank, tag, numbers(2 * RING // 8, seed=number))
        for number, tag in reversed(list(enumerate(tags))):
            assert_equal(
                courier.receive(1 - courier.rank, tag), numbers(2 * RING // 8, seed=number)
            )

    on_ranks(2, body, way)


def test_both_directions_at_once_with_full_rings(way):
    """Everyone sends more than the rings hold to everyone before it receives anything."""
    each, count = RING // 8, 4

    def body(courier):
        began = time.monotonic()
        for number in range(count):
            for destination in range(courier.size):
                courier.send(destination, number, np.full(each, courier.rank * 10.0 + number))
        sent = time.monotonic() - began
        for number in range(count):
            for source in range(courier.size):
                assert_equal(courier.receive(source, number), np.full(each, source * 10.0 + number))
        return sent

    assert max(on_ranks(3, body, way)) < SECONDS / 3


def test_shapes_and_dtypes_that_change_under_one_tag(way):
    arrays = [numbers((n, 3), dtype) for n in (4, 1, 4, 0) for dtype in (np.float32, np.int64)] * 3

    def body(courier):
        for array in arrays:
            courier.send(1 - courier.rank, "x", array)
        for array in arrays:
            assert_equal(courier.receive(1 - courier.rank, "x"), array)
        assert len(courier._peers[1 - courier.rank].known) == 6  # each is told once

    on_ranks(2, body, way)


def test_threads_that_send_and_receive_at_once(way):
    """Under tags of their own."""

    def body(courier):
        failures = []

        def beside(tag):
            try:
                for number in range(60):
                    courier.send(1 - courier.rank, tag, np.full(number * 50, tag + number))
                for number in range(60):
                    found = courier.receive(1 - courier.rank, tag)
                    assert_equal(found, np.full(number * 50, tag + number))
            except Exception as exc:
                failures.append(exc)

        threads = [threading.Thread(target=beside, args=(1000 * n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert not failures, failures

    on_ranks(2, body, way)


# Waits


def test_a_receive_wakes_when_the_array_comes(way):
    def body(courier):
        if courier.rank == 0:
            time.sleep(0.3)
            courier.send(1, "x", np.ones(3))
            return 0.0
        began = time.monotonic()
        courier.receive(0, "x")
        return time.monotonic() - began

    assert 0.2 < on_ranks(2, body, way)[1] < 5


def test_a_long_wait_is_a_warning_and_then_an_error(way, caplog):
    """Both say who waits for what, of whom."""

    def body(courier):
        if courier.rank == 0:
            return None
        with pytest.raises(StallError) as error:
            courier.receive(0, ("activations", 3))
        return str(error.value)

    said = on_ranks(2, body, way, check=0.2, shutdown=0.6)[1]
    assert said.startswith("rank 1 waited 1 s for ('activations', 3) of rank 0\n")
    warnings = [record.getMessage() for record in caplog.records if record.name == "hvdkit"]
    assert warnings == ["rank 1 waited 0 s for ('activations', 3) of rank 0"]


def test_without_limits_a_wait_goes_on(way, caplog):
    def body(courier):
        if courier.rank == 0:
            time.sleep(1.2)
            courier.send(1, "x", np.ones(3))
        else:
            courier.receive(0, "x")

    on_ranks(2, body, way)
    assert not caplog.records


# The end


def test_closing_with_what_nobody_takes_ends_within_seconds(way):
    world = ThreadWorld(2)

    def body(transport):
        courier = Courier(WAYS[way](world, transport.rank), shared=True)
        courier.send(1 - courier.rank, "nobody asks", np.ones(4 * RING // 8))
        began = time.monotonic()
        courier.close()
        return time.monotonic() - began

    assert max(world.run(body, timeout=SECONDS)) < 6


@pytest.mark.parametrize("first", [0, 1])
def test_what_was_sent_before_the_close_still_arrives(way, first):
    """Of a rank that goes on to other things, at once."""
    world = ThreadWorld(2)

    def body(transport):
        courier = Courier(WAYS[way](world, transport.rank), shared=True)
        if courier.rank == first:
            courier.send(1 - first, "last words", numbers(1000))
        else:
            assert_equal(courier.receive(first, "last words"), numbers(1000))
        courier.close()

    world.run(body, timeout=SECONDS)


def test_closed_means_closed(way):
    def body(courier):
        courier.send(courier.rank, "x", np.ones(3))
        return courier

    for courier in on_ranks(2, body, way):
        for call in (lambda c: c.send(0, "x", np.ones(3)), lambda c: c.receive(1, "y")):
            with pytest.raises(NotInitializedError, match="shut down"):
                call(courier)


def test_a_failure_of_its_thread_is_an_error_of_those_who_wait(monkeypatch, caplog):
    number = Courier._number

    def failing(courier, destination, like):
        if like.tag == "x":
            raise ZeroDivisionError("a bug")
        return number(courier, destination, like)

    monkeypatch.setattr(Courier, "_number", failing)

    def body(courier):
        if courier.rank == 1:
            courier.send(0, "x", np.ones(3))
            for call in (lambda: courier.receive(0, "y"), lambda: courier.send(0, "y", np.ones(3))):
                with pytest.raises(HvdkitError, match=r"courier failed.*a bug"):
                    call()

    on_ranks(2, body)
    assert "courier failed" in caplog.text


def test_no_files_are_left_open():
    def open_files():
        gc.collect()  # each mail keeps its bell until it is forgotten
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    for _ in range(3):
        on_ranks(3, lambda courier: courier.send(0, "x", np.ones(10)))
    assert open_files() <= before


def test_memory_that_one_rank_cannot_share_is_done_without(monkeypatch):
    refused = []

    def mmap_or_not(*arguments):
        if not refused:
            refused.append(arguments)
            raise PermissionError("not here")
        return mmap.mmap(*arguments)

    monkeypatch.setattr(module, "mmap", SimpleNamespace(mmap=mmap_or_not))
    world = ThreadWorld(3)

    def body(transport):
        courier = Courier(OneNode(world, transport.rank), shared=True)
        assert courier._rings is None
        for destination in range(3):
            courier.send(destination, "x", numbers(5000))
        for source in range(3):
            assert_equal(courier.receive(source, "x"), numbers(5000))
        transport.allgather_object("everyone has everything")
        courier.close()

    world.run(body, timeout=SECONDS)
    assert refused


# One rank


def test_one_rank():
    def body(courier):
        courier.send(0, "x", numbers(3))
        courier.send(0, "x", numbers(4))
        return [courier.receive(0, "x").size for _ in range(2)]

    courier = Courier(ManyNodes(ThreadWorld(1), 0), shared=True)
    assert body(courier) == [3, 4]
    courier.close()
    assert body(Loopback()) == [3, 4]
