"""Sharded checkpoints, written by ranks that are threads, and what is said of damaged ones."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core.worlds import on_ranks
from numpy.typing import NDArray

from hvdkit.dtypes import DTYPES, exported
from hvdkit.errors import (
    ArgumentError,
    HvdkitError,
    MismatchError,
    PeerError,
    UnsupportedError,
)
from hvdkit.parallel import checkpoint, checkpoint_shards
from hvdkit.parallel.checkpoint import CheckpointError, Index, Tensor, load, read_index, save

pytest.importorskip("safetensors")

Arrays = dict[str, NDArray[Any]]


def model(layers: int = 6, seed: int = 0) -> Arrays:
    """A weight, and what an optimizer keeps of it, for each layer."""
    source = np.random.default_rng(seed)
    names = [f"layers.{i}.weight" for i in range(layers)]
    names += [f"optimizer.{name}.exp_avg" for name in names]
    return {name: source.standard_normal((3, i + 1)) for i, name in enumerate(names)}


def owned(tensors: Arrays, rank: int, size: int) -> Arrays:
    """Return the tensors of every size-th layer, beginning with layer `rank`."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if int(re.findall(r"layers\.(\d+)", name)[0]) % size == rank
    }


def save_on(size: int, folder: Path, tensors: Arrays, **options: Any) -> None:
    on_ranks(size, lambda t: save(folder, owned(tensors, t.rank, size), among=t, **options))


def failures_on(size: int, folder: Path, parts: list[Mapping[str, Any]]) -> list[Exception | None]:
    def body(transport: Any) -> Exception | None:
        try:
            save(folder, parts[transport.rank], among=transport)
        except Exception as exc:
            return exc
        return None

    return on_ranks(size, body)


def assert_same(found: Mapping[str, NDArray[Any]], wanted: Mapping[str, NDArray[Any]]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        assert (array.dtype, array.shape) == (wanted[name].dtype, wanted[name].shape), name
        assert array.tobytes() == wanted[name].tobytes(), name


@pytest.mark.parametrize("writers", [1, 2, 3])
@pytest.mark.parametrize("readers", [1, 2, 3])
def test_another_number_of_ranks_loads_what_it_owns(
    tmp_path: Path, writers: int, readers: int
) -> None:
    tensors = model()
    save_on(writers, tmp_path, tensors)
    for rank in range(readers):
        mine = owned(tensors, rank, readers)
        assert_same(load(tmp_path, mine), mine)
    assert_same(load(tmp_path), tensors)


def test_one_rank_needs_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    save(str(folder), model(), metadata={"step": 12})
    assert read_index(folder).metadata == {"step": 12}
    name = "layers.1.weight"
    assert_same(load(str(folder), iter([name])), {name: model()[name]})


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 7)])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != np.complex128], ids=str)
def test_every_dtype_and_shape_comes_back_bitwise(
    tmp_path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> None:
    source = np.random.default_rng(1)
    count = int(np.prod(shape)) * dtype.itemsize
    raw = source.integers(0, 2 if dtype == np.bool_ else 256, count, np.uint8)  # NaNs among them
    array = np.frombuffer(raw.tobytes(), dtype).reshape(shape)
    save(tmp_path, {"x": array})
    found = load(tmp_path, {"x": array})["x"]
    assert (found.dtype, found.shape) == (dtype, shape)
    assert exported(found).tobytes() == raw.tobytes()
    assert found.flags.writeable


def test_strided_arrays_are_saved_as_they_look(tmp_path: Path) -> None:
    array = np.arange(24.0).reshape(4, 6)
    save(tmp_path, {"t": array.T, "step": array[::2, ::-3], "list": [1, 2]})
    found = load(tmp_path)
    np.testing.assert_array_equal(found["t"], array.T)
    np.testing.assert_array_equal(found["step"], array[::2, ::-3])
    np.testing.assert_array_equal(found["list"], [1, 2])


def test_what_is_loaded_is_new_memory(tmp_path: Path) -> None:
    save(tmp_path, {"x": np.zeros(3)})
    load(tmp_path)["x"][...] = 1
    assert load(tmp_path)["x"].sum() == 0


def test_the_index_says_what_is_where(tmp_path: Path) -> None:
    metadata = {"step": 3, "mesh": {"data": 1, "pipeline": 2}, "best": None}
    save_on(2, tmp_path, model(2), metadata=metadata)
    index = read_index(tmp_path)
    assert isinstance(index, Index)
    assert index.metadata == metadata
    assert sorted(index.shards) == sorted(path.name for path in tmp_path.glob("shard-*"))
    assert all((tmp_path / name).stat().st_size == n for name, n in index.shards.items())
    first, second = sorted(index.shards)
    assert first.endswith("-00001-of-00002.safetensors")
    assert second.endswith("-00002-of-00002.safetensors")
    tensor = index.tensors["layers.1.weight"]
    assert tensor == Tensor(second, "float64", (3, 2), tensor.crc32)
    assert json.loads((tmp_path / "index.json").read_text())["version"] == 1


def test_ranks_may_own_nothing(tmp_path: Path) -> None:
    save_on(3, tmp_path, model(1))
    assert len(read_index(tmp_path).shards) == 3
    assert_same(load(tmp_path), model(1))
    save(tmp_path, {})
    assert load(tmp_path) == {}


def test_only_files_that_hold_something_wanted_are_opened(tmp_path: Path) -> None:
    tensors = model()
    save_on(3, tmp_path, tensors)
    (tmp_path / read_index(tmp_path).tensors["layers.1.weight"].shard).unlink()
    mine = owned(tensors, 2, 3)
    assert_same(load(tmp_path, mine), mine)
    with pytest.raises(CheckpointError, match=r"cannot read .*00002-of-00003.safetensors: No such"):
        load(tmp_path)


# Replacing an older checkpoint


def test_a_save_replaces_the_older_one_and_sweeps_up(tmp_path: Path) -> None:
    save_on(3, tmp_path, model(seed=1))
    (tmp_path / "notes.safetensors").write_text("the user's own")
    save_on(2, tmp_path, model(seed=2))
    assert_same(load(tmp_path), model(seed=2))
    assert {path.name for path in tmp_path.iterdir()} == {
        "index.json",
        "notes.safetensors",
        *read_index(tmp_path).shards,
    }


class Killed(BaseException):
    """The process ends here: nobody catches it."""


@pytest.mark.parametrize(
    ("call", "after"),
    [(call, number) for call, most in (("fsync", 5), ("replace", 3)) for number in range(most)],
)
def test_a_crash_leaves_the_older_checkpoint_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, after: int
) -> None:
    """A rank is killed at the n-th flush to disk of all; the other learns of it when they meet."""
    old, new = model(seed=1), model(seed=2)
    save_on(2, tmp_path, old)
    owner, name = (os, "fsync") if call == "fsync" else (Path, "replace")
    real, calls = getattr(owner, name), []

    def dying(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > after:
            raise Killed
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises((Killed, RuntimeError)):
            save_on(2, tmp_path, new)
    found = load(tmp_path)
    replaced = np.array_equal(found["layers.0.weight"], new["layers.0.weight"])
    assert_same(found, new if replaced else old)
    save_on(3, tmp_path, new)
    assert_same(load(tmp_path), new)
    assert len(list(tmp_path.iterdir())) == 4, "something of the crash is still there"


def test_what_a_crash_in_the_library_leaves_is_swept_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes to a file with a random name, which it renames at the end."""

    def dying(_tensors: Arrays, path: Path) -> None:
        (path.parent / ".tmpXyZ123").write_bytes(b"half of it")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", dying)
        with pytest.raises(Killed):
            save(tmp_path, model(seed=1))
    assert list(tmp_path.rglob(".tmp*"))
    save(tmp_path, model(seed=2))
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "index.json",
        *read_index(tmp_path).shards,
    ]


def test_shards_can_be_read_by_whom_the_index_can(tmp_path: Path) -> None:
    """The library makes its files readable to their owner only."""
    save(tmp_path, model())
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


class LosingTouch:
    """A rank whose n-th exchange with the others fails on its own side alone."""

    def __init__(self, transport: Any, exchanges: int) -> None:
        self.transport, self.rank, self.size = transport, transport.rank, transport.size
        self.left = exchanges

    def allgather_object(self, value: Any) -> list[Any]:
        values = self.transport.allgather_object(value)
        self.left -= 1
        if self.left == 0:
            raise PeerError("lost touch")
        return values


@pytest.mark.parametrize("exchanges", [2, 3])
def test_a_rank_that_loses_touch_leaves_its_shard_to_a_checkpoint_in_force(
    tmp_path: Path, exchanges: int
) -> None:
    """Rank 0 goes on to replace the index: a shard cleared away now would be missing for ever."""
    save_on(2, tmp_path, model(seed=1))
    new = model(seed=2)

    def body(transport: Any) -> None:
        mine = owned(new, transport.rank, 2)
        if transport.rank == 1:
            with pytest.raises(PeerError):
                save(tmp_path, mine, among=LosingTouch(transport, exchanges))
            if exchanges == 2:  # rank 0 has not lost it
                transport.allgather_object((None, None))
        else:
            save(tmp_path, mine, among=transport)

    on_ranks(2, body)
    assert_same(load(tmp_path), new)


def test_a_full_disk_on_one_rank_fails_on_all_and_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = model(seed=1)
    save_on(3, tmp_path, old)
    before = sorted(tmp_path.iterdir())
    flush = checkpoint_shards.flush

    def full(path: Path) -> None:
        if "00002-of-00003" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    monkeypatch.setattr(checkpoint_shards, "flush", full)
    new = model(seed=2)
    failed = failures_on(3, tmp_path, [owned(new, rank, 3) for rank in range(3)])
    for error in failed:
        assert isinstance(error, CheckpointError)
        assert f"the checkpoint in {tmp_path} is as it was before\n  rank 1:  OSError: " in str(
            error
        )
    assert sorted(tmp_path.iterdir()) == before
    assert_same(load(tmp_path), old)


def test_folders_that_are_not_shared_are_noticed(tmp_path: Path) -> None:
    def body(transport: Any) -> str:
        with pytest.raises(CheckpointError) as failed:
            save(
                tmp_path / str(transport.rank), {f"x{transport.rank}": np.ones(2)}, among=transport
            )
        return str(failed.value)

    first, second = on_ranks(2, body)
    assert re.match(
        r"rank 0 does not see .*00002-of-00002.safetensors, which rank 1 wrote: ", first
    )
    assert "into force\n  rank 0:  CheckpointError: rank 0 does not see" in second
    assert not (tmp_path / "0" / "index.json").exists()


def test_a_save_in_the_middle_of_a_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, model(seed=1))
    read, saved = checkpoint.read_shard, []

    def reading(*args: Any) -> Arrays:
        if not saved:
            saved.append(save(tmp_path, model(seed=2)))
        return read(*args)

    monkeypatch.setattr(checkpoint, "read_shard", reading)
    assert_same(load(tmp_path), model(seed=2))


# What cannot be saved


def test_a_tensor_that_two_ranks_own_is_refused_on_all(tmp_path: Path) -> None:
    same = {"a": np.ones(2), "b": np.ones(2)}
    for error in failures_on(3, tmp_path / "new", [same, {"c": np.ones(1)}, same]):
        assert isinstance(error, MismatchError)
        assert str(error).startswith("ranks 0, 2 all handed over tensor 'a' (and 1 more): of the")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["", "__metadata__", "a\nb", "\ud800", 3, None])
def test_names_that_cannot_be(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ArgumentError, match=re.escape(f"a tensor cannot be called {name!r}: give")):
        save(tmp_path, {name: np.ones(1)})


def test_names_are_no_paths(tmp_path: Path) -> None:
    tensors = {"../../x": np.ones(1), "/etc/x": np.zeros(1), "dense/kernel:0": np.ones(2)}
    folder = tmp_path / "a" / "b" / "c"
    save(folder, tensors)
    assert_same(load(folder, tensors), tensors)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "index.json",
        *read_index(folder).shards,
    ]


def test_an_error_on_one_rank_is_told_to_the_others(tmp_path: Path) -> None:
    bad = {"x": np.ones(2, np.complex128)}
    first, second = failures_on(2, tmp_path, [{}, bad])
    assert isinstance(second, ArgumentError)
    assert str(second).startswith("tensor 'x' is complex128; a checkpoint holds bool, uint8, ")
    assert isinstance(first, CheckpointError)
    assert f"cannot save a checkpoint to {tmp_path}\n  rank 1:  ArgumentError: tensor" in str(first)


def test_objects_are_refused_not_pickled(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="tensor 'x' is object; a checkpoint holds bool"):
        save(tmp_path, {"x": np.array([{}, None])})
    with pytest.raises(UnsupportedError, match="object is not an array of numbers"):
        save(tmp_path, {"x": object()})


@pytest.mark.parametrize("metadata", [{"x": {1, 2}}, {"x": float("nan")}, {(1, 2): 3}, 5])
def test_metadata_that_json_has_not(tmp_path: Path, metadata: Any) -> None:
    with pytest.raises(ArgumentError, match="metadata of a checkpoint cannot be written as JSON: "):
        save(tmp_path, {}, metadata=metadata)


def test_without_the_library_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, {"x": np.ones(1)})
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for act in (lambda: save(tmp_path, {}), lambda: load(tmp_path)):
        with pytest.raises(HvdkitError, match="need the safetensors library: pip install safetens"):
            act()
    assert read_index(tmp_path).tensors.keys() == {"x"}


# What cannot be loaded


def test_a_missing_tensor_is_named_with_the_nearest(tmp_path: Path) -> None:
    save(tmp_path, model(2))
    with pytest.raises(CheckpointError, match=r"no tensor 'layers.0.wieght' among its 4; did you "):
        load(tmp_path, ["layers.0.wieght"])
    with pytest.raises(CheckpointError, match=r"no tensor 'zzz' among its 4$"):
        load(tmp_path, ["layers.0.weight", "zzz"])


@pytest.mark.parametrize("like", [np.zeros((3, 2)), np.zeros((3, 1), np.float32), np.zeros(3)])
def test_another_shape_or_dtype_is_refused(tmp_path: Path, like: NDArray[Any]) -> None:
    save(tmp_path, model(1))
    wanted = f"is float64 (3, 1), but {like.dtype} {like.shape} is wanted: build the model that"
    with pytest.raises(CheckpointError, match=re.escape(wanted)):
        load(tmp_path, {"layers.0.weight": like})


def test_an_empty_folder_and_none(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match=r"there is no checkpoint in .*No such file"):
            load(folder)


def test_a_truncated_shard(tmp_path: Path) -> None:
    save(tmp_path, model())
    (shard,) = tmp_path.glob("shard-*")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    wanted = f"is truncated: {len(whole) - 1} bytes, where the index says {len(whole)}"
    with pytest.raises(CheckpointError, match=wanted):
        load(tmp_path)
    shard.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="is damaged"):
        load(tmp_path)


def test_no_changed_byte_goes_unnoticed(tmp_path: Path) -> None:
    """Of a shard, each byte in turn has a bit flipped: the same tensors come back, or an error."""
    tensors = {"x": np.arange(4, dtype=np.int16), "y": np.float32([1, 2])}
    save(tmp_path, tensors)
    (shard,) = tmp_path.glob("shard-*")
    whole = shard.read_bytes()
    noticed = 0
    for place in range(len(whole)):
        for bit in (1, 64):
            shard.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            try:
                found = load(tmp_path)
            except CheckpointError as exc:
                assert "is damaged" in str(exc)
                noticed += 1
            else:
                assert_same(found, tensors)
    assert noticed > len(whole)


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_index_of_a_newer_version(tmp_path: Path) -> None:
    save(tmp_path, model(1))
    edited(tmp_path, version=2, tensors="something else altogether")
    with pytest.raises(CheckpointError, match="format version 2, and this hvdkit reads 1 at most"):
        load(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", "{}", '{"version": 1}', pytest.param("[" * 100_000, id="deep"), "\udcff"],
)
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"index\.json is damaged: "):
        read_index(tmp_path)


NAME = "shard-00000000-{}-of-{}.safetensors"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "1"}, "version '1'"),
        ({"shards": {}}, "which is no shard"),
        ({"shards": {"../../etc/passwd": 3}}, "'../../etc/passwd' is not the name of a shard"),
        ({"shards": {"/tmp/" + NAME.format("00001", "00001"): 3}}, "is not the name of a shard"),
        ({"shards": {NAME.format("00001", "00002"): 3}}, "the shards are not those of one save"),
        ({"shards": {NAME.format("00002", "00001"): 3}}, "the shards are not those of one save"),
        ({"shards": {NAME.format("00001", "00001"): -3}}, "-3 is not a whole number"),
        ({"shards": []}, "AttributeError"),
        ({"tensors": {"x": {}}}, "KeyError"),
        ({"tensors": {"x": {"shard": [], "dtype": "int8", "shape": [], "crc32": 0}}}, "TypeError"),
        ({"tensors": {"x": {"shard": "", "dtype": "O", "shape": [], "crc32": 0}}}, "dtype 'O'"),
        ({"tensors": {"x": {"shard": "", "dtype": "int8", "shape": [1.5], "crc32": 0}}}, "1.5 is"),
        ({"metadata": 3}, "TypeError"),
    ],
)
def test_an_index_with_something_wrong(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    save(tmp_path, model(1))
    edited(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=f"index.json is damaged: .*{re.escape(message)}"):
        read_index(tmp_path)


def test_an_index_that_promises_more_than_its_shard_holds(tmp_path: Path) -> None:
    save(tmp_path, model(1))
    tensors = json.loads((tmp_path / "index.json").read_text())["tensors"]
    edited(tmp_path, tensors={**tensors, "extra": tensors["layers.0.weight"]})
    with pytest.raises(CheckpointError, match=r"00001-of-00001.safetensors is damaged: .*extra"):
        load(tmp_path)
