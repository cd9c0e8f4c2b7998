"""The best split into stages, against trying every one; and what is said where none fits."""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdkit.errors import ArgumentError
from hvdkit.parallel import splitting
from hvdkit.parallel.partition import Layer, Partition, by_hand, format_bytes, partition

GIB = 1 << 30


def costing(*costs: float) -> list[Layer]:
    return [Layer(cost) for cost in costs]


def one_f_one_b(stage: int, stages: int) -> int:
    """As many microbatches as stages follow, and one."""
    return stages - stage


def every_split(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        yield (0, *cuts, layers)


def brute_force(
    layers: Sequence[Layer],
    stages: int,
    *,
    ranks: int | None = None,
    speeds: Sequence[float] | None = None,
    limit: Sequence[float] | None = None,
    in_flight: Any = None,
) -> tuple[float, float, tuple[int, ...]] | None:
    """Return the least (slowest, sum of squares, bounds) over every split that fits."""
    ranks = ranks or stages
    found = []
    for bounds in every_split(len(layers), stages):
        parts = [layers[a:b] for a, b in itertools.pairwise(bounds)]
        used = [0] * ranks
        for stage, part in enumerate(parts):
            flight = in_flight(stage, stages) if in_flight else 1
            used[stage % ranks] += sum(x.nbytes + flight * x.activation_bytes for x in part)
        if limit and any(u > room for u, room in zip(used, limit, strict=True)):
            continue
        times = [
            sum(x.cost for x in part) / (speeds[s % ranks] if speeds else 1)
            for s, part in enumerate(parts)
        ]
        found.append((max(times), sum(t * t for t in times), bounds))
    return min(found, default=None)


def cases(seed: int, count: int) -> Iterator[tuple[list[Layer], int, dict[str, Any]]]:
    """Small whole numbers, and speeds that are powers of two: no rounding anywhere."""
    source = random.Random(seed)
    for _ in range(count):
        layers = [
            Layer(source.randint(0, 9), source.randint(0, 9), source.randint(0, 3))
            for _ in range(source.randint(1, 8))
        ]
        stages = source.randint(1, min(4, len(layers)))
        total = sum(x.nbytes + x.activation_bytes for x in layers)
        yield (
            layers,
            stages,
            {
                "speeds": [source.choice([0.5, 1, 2, 4]) for _ in range(stages)],
                "limit": [source.randint(1, max(2, total)) for _ in range(stages)],
                "in_flight": one_f_one_b,
            },
        )


@pytest.mark.parametrize("given_options", [(), ("speeds",), ("limit", "in_flight"), ("limit",)])
def test_every_small_case_against_brute_force(given_options: tuple[str, ...]) -> None:
    for layers, stages, options in cases(1, 250):
        hold_against_brute_force(layers, stages, {key: options[key] for key in given_options})


def test_speeds_and_limits_together_against_brute_force() -> None:
    fitted = [
        hold_against_brute_force(layers, stages, options)
        for layers, stages, options in cases(2, 400)
    ]
    assert min(fitted.count(True), fitted.count(False)) > 50


def hold_against_brute_force(layers: list[Layer], stages: int, options: dict[str, Any]) -> bool:
    wanted = brute_force(layers, stages, **options)
    if wanted is None:
        with pytest.raises(ArgumentError, match="no split of"):
            partition(layers, stages, **options)
        return False
    found = partition(layers, stages, **options)
    assert (found.slowest, sum(t * t for t in found.times), found.bounds) == wanted
    assert found.proven
    return True


def test_stages_that_share_a_ranks_memory_against_brute_force() -> None:
    source = random.Random(3)
    bound = 0
    for _ in range(300):
        layers = [
            Layer(source.randint(0, 9), source.randint(0, 9), source.randint(0, 2))
            for _ in range(source.randint(4, 8))
        ]
        ranks = source.randint(1, 3)
        options = {
            "ranks": ranks,
            "speeds": [source.choice([1, 2]) for _ in range(ranks)],
            "limit": [source.randint(8, 40) for _ in range(ranks)],
            "in_flight": one_f_one_b,
        }
        wanted = brute_force(layers, 4, **options)
        if wanted is None:
            with pytest.raises(ArgumentError, match="no split of"):
                partition(layers, 4, **options)
            continue
        found = partition(layers, 4, **options)
        assert found.slowest == wanted[0]
        assert found.proven
        assert all(u <= room for u, room in zip(found.rank_bytes, options["limit"], strict=True))
        free = brute_force(layers, 4, **{**options, "limit": None})
        assert free is not None
        bound += free[0] < wanted[0]
    assert bound > 20, "the limit hardly ever made a difference"


def test_a_search_that_ends_early_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal shares of memory fit, and something faster may exist: the table must not hide it."""
    layers = [Layer(cost, nbytes) for cost, nbytes in [(5, 3), (2, 4), (5, 1), (1, 5), (5, 5)]]
    best = partition(layers, 4, ranks=2, limit=11)
    monkeypatch.setattr(splitting, "MOST_NODES", 1)
    found = partition(layers, 4, ranks=2, limit=11)
    assert (best.slowest, best.proven, found.proven) == (6, True, False)
    assert found.slowest > best.slowest
    assert max(found.rank_bytes) <= 11
    assert "another split may be faster" in str(found)


floats = st.floats(0, 1e6, allow_nan=False)
models = st.lists(st.builds(Layer, floats, st.integers(0, GIB), st.integers(0, GIB)), min_size=1)


@given(models, st.data())
def test_each_layer_is_in_one_stage_and_each_stage_has_a_layer(
    layers: list[Layer], data: st.DataObject
) -> None:
    stages = data.draw(st.integers(1, len(layers)))
    found = partition(layers, stages)
    assert (found.bounds[0], found.bounds[-1]) == (0, len(layers))
    assert found.stages == stages
    assert all(length >= 1 for length in found.lengths)
    assert [found.stage_of(i) for s in range(stages) for i in found.layers(s)] == [
        s for s in range(stages) for _ in found.layers(s)
    ]
    assert sum(found.nbytes) == sum(x.nbytes + x.activation_bytes for x in layers)


@given(models, st.data())
def test_never_slower_than_any_split_by_hand_nor_faster_than_possible(
    layers: list[Layer], data: st.DataObject
) -> None:
    cuts = data.draw(st.sets(st.integers(1, max(1, len(layers) - 1)), max_size=len(layers) - 1))
    bounds = [0, *sorted(cuts), len(layers)] if len(layers) > 1 else [0, 1]
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    found = partition(layers, len(lengths))
    total = sum(x.cost for x in layers)
    assert found.slowest <= by_hand(layers, lengths).slowest + 1e-9 * total
    assert found.slowest >= max(total / len(lengths), *(x.cost for x in layers)) * (1 - 1e-9)


@given(models, st.data())
def test_a_limit_is_honoured_or_refused(layers: list[Layer], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(layers)))
    limit = data.draw(st.integers(1, 8 * GIB))
    try:
        found = partition(layers, stages, limit=limit, in_flight=one_f_one_b)
    except ArgumentError as exc:
        assert "too much" in str(exc)
    else:
        assert max(found.nbytes) <= limit


def test_the_text_of_a_partition() -> None:
    layers = [Layer(4, GIB), Layer(1, GIB // 2), Layer(2, 100), Layer(6, 0)]
    assert str(partition(layers, 3)) == "\n".join(
        [
            "stage  rank  layers  cost  time  memory",
            "0      0     0       4     4     1.00 GiB",
            "1      1     1-2     3     3     512.00 MiB",
            "2      2     3       6     6 *   0 bytes",
            "* slowest",
        ]
    )


def test_ties_balance_the_other_stages_then_shorten_the_first() -> None:
    assert partition(costing(9, 1, 1, 1, 1), 3).lengths == (1, 2, 2)
    assert partition(costing(1, 1, 1, 1, 1), 3).lengths == (1, 2, 2)
    assert partition(costing(0, 0, 0), 2).lengths == (1, 2)


def test_a_faster_rank_gets_more() -> None:
    assert partition(costing(*[1] * 9), 2, speeds=[2, 1]).lengths == (6, 3)
    assert partition(costing(*[1] * 12), 4, ranks=2, speeds=np.array([2, 1])).lengths == (4, 2) * 2


def test_microbatches_in_flight_shorten_the_first_stages() -> None:
    layers = [Layer(1, 0, 10)] * 6
    assert partition(layers, 3).lengths == (2, 2, 2)
    assert partition(layers, 3, limit=40, in_flight=one_f_one_b).lengths == (1, 2, 3)


def test_a_thousand_layers_in_sixty_four_stages() -> None:
    source = random.Random(4)
    layers = [Layer(source.random(), source.randrange(GIB)) for _ in range(1000)]
    began = time.perf_counter()
    found = partition(layers, 64, limit=12 * GIB, speeds=[1 + s % 2 for s in range(64)])
    assert time.perf_counter() - began < 20  # a second here; a busy machine takes longer
    assert max(found.nbytes) <= 12 * GIB
    assert found.slowest < 1.2 * sum(x.cost for x in layers) / 96


# Refusals


def test_a_refusal_shows_the_sizes_and_how_many_ranks_would_do() -> None:
    layers = [Layer(1, GIB)] * 6
    with pytest.raises(ArgumentError) as refused:
        partition(layers, 2, limit=2 * GIB)
    assert str(refused.value) == "\n".join(
        [
            "no split of 6 layers into 2 stages fits into the memory of 2 ranks; the nearest is",
            "stage  rank  layers  cost  time  memory",
            "0      0     0-2     3     3 *   3.00 GiB of 2.00 GiB, 1.00 GiB too much",
            "1      1     3-5     3     3 *   3.00 GiB of 2.00 GiB, 1.00 GiB too much",
            "* slowest",
            "3 ranks would do",
        ]
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_number_of_ranks_that_would_do_is_the_fewest(seed: int) -> None:
    source = random.Random(seed)
    told = 0
    for _ in range(40):
        layers = [Layer(1, source.randint(0, 9), source.randint(0, 4)) for _ in range(8)]
        limit = source.randint(12, 30)
        enough = [
            stages
            for stages in range(1, 9)
            if brute_force(layers, stages, limit=[limit] * stages, in_flight=one_f_one_b)
        ]
        if 2 in enough:
            continue
        with pytest.raises(ArgumentError) as refused:
            partition(layers, 2, limit=limit, in_flight=one_f_one_b)
        last = str(refused.value).splitlines()[-1]
        enough = [stages for stages in enough if stages > 2]
        if enough:
            assert last == f"{enough[0]} ranks would do"
            told += 1
        else:
            assert "would do: raise" in last or "alone needs" in last
    assert told


def test_a_layer_that_fits_nowhere_is_named() -> None:
    layers = [Layer(1, GIB, name="embedding"), Layer(1, 10), Layer(1, 10)]
    with pytest.raises(ArgumentError, match=r"layer 0 \(embedding\) alone needs 1.00 GiB, and the"):
        partition(layers, 2, limit=[1000, 500])


def test_more_ranks_may_not_help_where_they_mean_more_in_flight() -> None:
    layers = [Layer(1, 1, 10)] * 4
    with pytest.raises(ArgumentError, match="no number of ranks would do: raise the limit, or"):
        partition(layers, 2, limit=25, in_flight=one_f_one_b)


def test_refusals_where_ranks_have_limits_or_stages_of_their_own() -> None:
    layers = [Layer(1, 10)] * 8
    with pytest.raises(ArgumentError, match="raise the limits, or give more ranks"):
        partition(layers, 2, limit=[20, 30])
    with pytest.raises(ArgumentError, match="was found that fits into the memory of 2 ranks; "):
        partition(layers, 4, ranks=2, limit=30)
    with pytest.raises(ArgumentError) as refused:
        partition(layers, 4, ranks=2, limit=25)
    assert str(refused.value).splitlines()[-3:] == [
        "rank 0: 40 bytes of 25 bytes, 15 bytes too much",
        "rank 1: 40 bytes of 25 bytes, 15 bytes too much",
        "4 ranks would do, with 2 stages each",
    ]


@pytest.mark.parametrize("stages", [0, -1, 4, 1.5, True, None])
def test_stages_out_of_range(stages: Any) -> None:
    with pytest.raises(ArgumentError, match=f"3 layers cannot make {stages} stages: give at"):
        partition(costing(1, 2, 3), stages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 3}, "2 stages cannot be on 3 ranks: give 1 to 2"),
        ({"ranks": 0}, "2 stages cannot be on 0 ranks"),
        ({"speeds": [1]}, "speeds has 1 numbers for 2 ranks: give one each"),
        ({"speeds": [1, 0]}, "speeds is [1, 0]: every number must be above 0"),
        ({"limit": [1, 2, 3]}, "limit has 3 numbers for 2 ranks"),
        ({"limit": -5}, "limit is [-5, -5]: every number must be above 0"),
        ({"in_flight": lambda _s, _k: 0.5}, "in_flight gives [0.5, 0.5]: give whole numbers"),
    ],
)
def test_arguments_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        partition(costing(1, 2, 3), 2, **options)


@pytest.mark.parametrize("cost", [-1, float("nan"), float("inf")])
def test_a_cost_that_is_none(cost: float) -> None:
    with pytest.raises(ArgumentError, match=r"layer 'head': its cost is .*; give 0 or more"):
        Layer(cost, name="head")


def test_bytes_below_zero() -> None:
    with pytest.raises(ArgumentError, match="-1 bytes and 0 of activations; neither may be"):
        Layer(1, -1)


# By hand


def test_lengths_by_hand_are_taken_as_they_are() -> None:
    found = by_hand([Layer(1, 10)] * 5, [1, 4], speeds=[1, 2])
    assert found == Partition(
        bounds=(0, 1, 5),
        ranks=2,
        costs=(1, 4),
        times=(1, 2),
        nbytes=(10, 40),
        proven=False,
    )


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([2, 2], "lengths [2, 2] are for 4 layers; there are 3"),
        ([1], "lengths [1] are for 1 layer; there are 3"),
        ([], "lengths [] are for 0 layers; there are 3"),
        ([3, 0], "a stage of 0 layers: each stage needs 1 or more"),
        ([4, -1], "a stage of -1 layers"),
        ([1.5, 1.5], "a stage of 1.5 layers"),
    ],
)
def test_lengths_that_are_wrong(lengths: list[Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        by_hand(costing(1, 2, 3), lengths)


def test_lengths_that_do_not_fit() -> None:
    with pytest.raises(ArgumentError) as refused:
        by_hand([Layer(1, 10)] * 3, [2, 1], limit=15)
    assert "lengths [2, 1] do not fit into the memory of 2 ranks\n" in str(refused.value)
    assert "20 bytes of 15 bytes, 5 bytes too much\n" in str(refused.value)


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(ArgumentError, match="there is no layer 3: the layers are 0 to 2"):
        partition(costing(1, 2, 3), 2).stage_of(3)


def test_sizes_for_people() -> None:
    sizes = [0, 1023, 1024, 5 * GIB // 4, 3 << 40]
    assert [format_bytes(size) for size in sizes] == [
        "0 bytes",
        "1023 bytes",
        "1.00 KiB",
        "1.25 GiB",
        "3.00 TiB",
    ]
