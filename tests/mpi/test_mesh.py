"""Ranks as a grid: where each is, who is in line with it, and collectives along a line."""

import math
from itertools import product

import numpy as np
import pytest

import hvdkit as hvd
from hvdkit import Mesh

RANK, SIZE = hvd.rank(), hvd.size()

#: Every grid of two axes, and some of three.
GRIDS = [(rows, SIZE // rows) for rows in range(1, SIZE + 1) if SIZE % rows == 0]
CUBES = [sizes for sizes in product(range(1, SIZE + 1), repeat=3) if math.prod(sizes) == SIZE]


def along(mesh, axis, array, **how):
    return hvd.allreduce(array, process_set=mesh.process_set(axis), **how)


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_a_grid(rows, columns):
    mesh = Mesh(data=rows, pipeline=columns)
    assert mesh.size == SIZE
    assert mesh.shape == {"data": rows, "pipeline": columns}
    assert list(mesh.shape) == ["data", "pipeline"]
    assert mesh.rank == RANK
    assert mesh.coordinates == {"data": RANK // columns, "pipeline": RANK % columns}
    assert [mesh.place(axis) for axis in ("data", "pipeline")] == list(divmod(RANK, columns))
    assert [mesh.size_of(axis) for axis in ("data", "pipeline")] == [rows, columns]
    for rank in range(SIZE):
        assert mesh.rank_at(**mesh.coordinates_of(rank)) == rank
    assert mesh.rank_at() == RANK
    assert mesh.rank_at(data=0) == RANK % columns
    assert mesh.rank_at(pipeline=columns - 1) == RANK - RANK % columns + columns - 1
    assert mesh.lines("pipeline") == [
        tuple(range(row * columns, (row + 1) * columns)) for row in range(rows)
    ]
    assert mesh.lines("data") == [tuple(range(column, SIZE, columns)) for column in range(columns)]
    assert repr(mesh) == f"Mesh(data={rows}, pipeline={columns})"


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_collectives_along_the_axes(rows, columns):
    mesh = Mesh(data=rows, pipeline=columns)
    for axis, size in mesh.shape.items():
        (line,) = (line for line in mesh.lines(axis) if RANK in line)
        process_set = mesh.process_set(axis)
        assert process_set.ranks == list(line)
        assert process_set.rank() == mesh.place(axis)
        assert process_set.size() == size
        found = hvd.allgather(np.array([RANK]), process_set=process_set)
        assert found.tolist() == list(line)
        total = along(mesh, axis, np.full(5000, RANK), op=hvd.Sum)
        assert (total == sum(line)).all()


@pytest.mark.parametrize(("data", "tensor", "pipeline"), CUBES)
def test_a_third_axis_costs_a_name(data, tensor, pipeline):
    mesh = Mesh(data=data, tensor=tensor, pipeline=pipeline)
    assert mesh.shape == {"data": data, "tensor": tensor, "pipeline": pipeline}
    rest, last = divmod(RANK, pipeline)
    first, middle = divmod(rest, tensor)
    assert mesh.coordinates == {"data": first, "tensor": middle, "pipeline": last}
    for axis, size in mesh.shape.items():
        line = [mesh.rank_at(**{axis: place}) for place in range(size)]
        assert along(mesh, axis, np.array([RANK]), op=hvd.Sum).tolist() == [sum(line)]
        assert sorted(sum(mesh.lines(axis), ())) == list(range(SIZE))


@pytest.mark.parametrize("known", [rows for rows, _ in GRIDS])
def test_the_rest_of_the_ranks(known):
    assert Mesh(data=known, pipeline=-1).shape == {"data": known, "pipeline": SIZE // known}
    assert Mesh(data=-1, pipeline=known).shape == {"data": SIZE // known, "pipeline": known}
    assert Mesh(data=-1).shape == {"data": SIZE}


def test_an_axis_of_all_ranks_is_the_global_set():
    mesh = Mesh(pipeline=-1)
    assert mesh.process_set("pipeline") is hvd.global_process_set
    assert mesh.lines("pipeline") == [tuple(range(SIZE))]


def test_an_axis_that_there_is_not_has_one_rank():
    mesh = Mesh(pipeline=-1)
    assert mesh.size_of("data") == 1
    assert mesh.place("data") == 0


def test_two_meshes_at_once():
    """What both have in common they share, with the user's own sets as well."""
    theirs = hvd.add_process_set([0, SIZE - 1]) if SIZE > 2 else None
    meshes = [Mesh(data=rows, pipeline=columns) for rows, columns in GRIDS]
    again = [Mesh(data=rows, pipeline=columns) for rows, columns in GRIDS]
    for one, other in zip(meshes, again, strict=True):
        for axis in one.shape:
            assert one.process_set(axis) is other.process_set(axis)
            (line,) = (line for line in one.lines(axis) if RANK in line)
            for mesh in (one, other):
                assert along(mesh, axis, np.array([RANK]), op=hvd.Sum).tolist() == [sum(line)]
    assert theirs is None or hvd.remove_process_set(theirs)


WRONG = {
    "too many": {"data": SIZE, "pipeline": 2},
    "too few": {"pipeline": SIZE + 1},
    "none": {},
    "zero": {"data": 0, "pipeline": -1},
    "less than zero": {"data": -2, "pipeline": -1},
    "two open": {"data": -1, "pipeline": -1},
    "no multiple": {"data": SIZE + 1, "pipeline": -1},
}


@pytest.mark.parametrize("axes", WRONG.values(), ids=WRONG)
def test_grids_that_cannot_be(axes):
    """The same error on every rank, which goes on."""
    with pytest.raises(hvd.ArgumentError) as error:
        Mesh(**axes)
    described = ", ".join(f"{axis}={size}" for axis, size in axes.items())
    assert f"Mesh({described})" in str(error.value)
    told = set(hvd.allgather_object(str(error.value)))
    assert len(told) == 1


def test_the_message_says_what_to_do():
    with pytest.raises(hvd.ArgumentError) as error:
        Mesh(data=SIZE + 1, pipeline=-1)
    assert str(error.value) == (
        f"Mesh(data={SIZE + 1}, pipeline=-1) is for {SIZE + 1} ranks or a multiple, and there are "
        f"{SIZE}: start as many, or change an axis"
    )


def test_places_and_axes_that_there_are_not():
    mesh = Mesh(data=1, pipeline=-1)
    for where in ({"tensor": 0}, {"pipeline": SIZE}, {"pipeline": -1}, {"data": 1}):
        with pytest.raises(hvd.ArgumentError, match=r"in Mesh\(data=1, "):
            mesh.rank_at(**where)
    for call in (mesh.process_set, mesh.lines):
        with pytest.raises(hvd.ArgumentError, match="no axis 'tensor'"):
            call("tensor")


def test_after_a_new_init():
    Mesh(data=SIZE, pipeline=1)
    hvd.shutdown()
    hvd.init()
    mesh = Mesh(data=SIZE, pipeline=1)
    assert along(mesh, "data", np.array([1.0]), op=hvd.Sum).tolist() == [SIZE]
    assert mesh.process_set("pipeline").ranks == [RANK]


def test_a_process_set_of_ones_own_beside_the_meshs():
    """It can be added, once, and removed again; the mesh's stays."""
    mesh = Mesh(data=SIZE, pipeline=1)
    for rank in range(SIZE):
        mine = hvd.ProcessSet([rank])
        if SIZE == 1:
            break  # which is all ranks, whose set is there for good
        assert hvd.add_process_set(mine) is mine
        assert mine.included() == (rank == RANK)
        assert mine.size() == 1
        with pytest.raises(hvd.ArgumentError, match="already"):
            hvd.add_process_set([rank])
        if mine.included():
            assert hvd.allreduce(np.ones(1), process_set=mine).item() == 1
        assert hvd.remove_process_set(mine)
        assert not hvd.remove_process_set(mine)
        with pytest.raises(hvd.ArgumentError, match="not known"):
            hvd.allreduce(np.ones(1), process_set=mine)
    assert mesh.process_set("pipeline").size() == 1
