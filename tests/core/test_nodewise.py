"""Small all-gathers over nodes of several ranks: one rank of each crosses for all of them."""

import threading

import numpy as np
import pytest

from hvdkit import collectives
from hvdkit.collectives import gathered
from hvdkit.dtypes import ReduceOp
from hvdkit.errors import HorovodInternalError, MismatchError, StallError
from hvdkit.native import why_unavailable

from .nodes import on_nodes

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

LAYOUTS = [
    (2, 2),
    (3, 1),
    (1, 3),
    (2, 3, 1),
    ((0, 2), (1, 3)),
    ((0, 3), (1, 2, 4)),
    ((0,), (1, 3), (2,)),
]

HOW = {"op": ReduceOp.SUM, "name": None, "prescale": 1.0, "postscale": 1.0, "algorithm": "gathered"}


def allreduce(group, x, **changes):
    out = np.empty_like(x)
    collectives.allreduce(group, x, out, **(HOW | changes))
    return out


@pytest.mark.parametrize("nodes", LAYOUTS, ids=str)
@pytest.mark.parametrize("length", [1, 9, 900])
def test_everyone_gets_everyones_row(nodes, length):
    def body(group):
        rows = np.zeros((group.size, length), np.int64)
        exchange = group.hierarchy.prepare_allgather(group, rows)
        for turn in range(4):
            rows[group.rank] = 100 * group.rank + turn
            exchange.run()
            assert (rows == 100 * np.arange(group.size)[:, None] + turn).all()
        exchange.free()

    on_nodes(nodes, body)


@pytest.mark.parametrize("nodes", [(2, 2), ((0, 2), (1, 3))], ids=str)
def test_only_the_first_ranks_of_the_nodes_send_messages(nodes):
    sent = []

    def body(group):
        for transport in (group.transport, group.hierarchy.cross.transport):
            plain = transport.allgather_ints

            def noted(values, plain=plain):
                sent.append(group.rank)
                return plain(values)

            transport.allgather_ints = noted
        for _ in range(5):
            assert (allreduce(group, np.ones(3)) == 4).all()

    on_nodes(nodes, body)
    firsts = {0, 2} if nodes == (2, 2) else {0, 1}
    assert set(sent) == firsts
    assert len(sent) == 10


@pytest.mark.parametrize("nodes", LAYOUTS, ids=str)
@pytest.mark.parametrize("count", [0, 1, 130, 3000])
def test_small_all_reduces(nodes, count):
    def body(group):
        for turn in range(4):
            result = allreduce(group, np.arange(count, dtype=np.float32) + group.rank + turn)
            added = sum(range(group.size)) + group.size * turn
            assert (result == group.size * np.arange(count) + added).all()

    on_nodes(nodes, body)


def test_the_native_module_makes_what_comes_as_it_came(monkeypatch):
    python = []
    plain = gathered.GatheredAllreduce.__call__

    def counted(self, source, target):
        python.append(source.size)
        return plain(self, source, target)

    monkeypatch.setattr(gathered.GatheredAllreduce, "__call__", counted)

    def body(group):
        for _ in range(50):
            assert (allreduce(group, np.ones(500, np.float32)) == 4).all()

    on_nodes((2, 2), body)
    assert len(python) <= 4 * 4


def test_ranks_that_disagree_all_learn_it_and_go_on():
    def body(group):
        for turn in range(3):
            with pytest.raises(MismatchError, match="rank 3"):
                allreduce(group, np.ones(3 + (group.rank == 3)))
            assert (allreduce(group, np.full(3, turn)) == 4 * turn).all()

    on_nodes((2, 2), body)


def test_an_error_across_ends_the_waits_of_the_node():
    everyone = threading.Barrier(4)

    def body(group):
        assert (allreduce(group, np.ones(3)) == 4).all()
        everyone.wait(30)
        if group.rank in (0, 2):
            group.hierarchy.cross.abort(HorovodInternalError("the link is down"))
        with pytest.raises(HorovodInternalError) as error:
            allreduce(group, np.ones(3))
        return str(error.value)

    words = on_nodes((2, 2), body)
    assert words[0] == words[2] == "the link is down"
    assert all("cannot go on together" in words[rank] for rank in (1, 3))


def test_ranks_of_a_node_that_are_not_in_step_are_an_error_not_a_wrong_result():
    def body(group):
        if group.rank > 1:
            return
        rows = np.zeros((4, 1), np.int64)
        exchange = group.hierarchy.prepare_allgather(group, rows)
        if group.rank == 0:
            with pytest.raises(HorovodInternalError, match="not in step"):
                exchange.run()
        else:
            assert group.hierarchy.arena.native.barrier(5) == 1

    on_nodes((2, 2), body)


@pytest.mark.parametrize("missing", range(4))
def test_abort_ends_all_waits(missing):
    def body(group):
        allreduce(group, np.ones(3))
        if group.rank == missing:
            return
        timer = threading.Timer(0.2, group.abort, [StallError("given up")])
        timer.start()
        with pytest.raises(StallError, match="given up"):
            allreduce(group, np.ones(3))
        timer.join()

    on_nodes((2, 2), body)
