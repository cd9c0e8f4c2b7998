"""What is chosen by what was measured, and by the model where nothing was."""

from dataclasses import replace
from functools import partial

import pytest

from core.tunings import KIB, LEVELS, MIB, cells, tuning
from hvdkit.collectives.pick import pick, pick_across, pick_allreduce
from hvdkit.schedules.machine import Machine
from hvdkit.schedules.timing import in_flights, predict
from hvdkit.tuning.estimates import Estimates

TWO_WAYS = tuning(
    allreduce={
        "ring": cells({4: 40e-6, 4 * KIB: 40e-6, MIB: 400e-6}),
        "recursive_doubling": cells({4: 10e-6, 4 * KIB: 20e-6, MIB: 1600e-6}),
    }
)
MEASURED = Estimates(TWO_WAYS, 4)


def test_measured_times_are_interpolated_on_logarithmic_scales():
    at = MEASURED.estimate("allreduce", "ring", 64 * KIB)
    assert at.source == "measured"
    assert at.seconds == pytest.approx((40e-6 * 400e-6) ** 0.5)
    assert MEASURED.estimate("allreduce", "ring", 4 * KIB).seconds == 40e-6
    assert MEASURED.estimate("allreduce", "ring", 0).seconds == 40e-6


def test_beyond_what_was_measured_the_model_goes_on():
    model = Estimates(tuning(), 4).modelled
    growth = model("allreduce", "ring", 8 * MIB) / model("allreduce", "ring", MIB)
    found = MEASURED.estimate("allreduce", "ring", 8 * MIB).seconds
    assert found == pytest.approx(400e-6 * growth)


def test_the_fastest_measured_is_the_best():
    names = ("ring", "recursive_doubling")
    assert MEASURED.best("allreduce", 4, names) == "recursive_doubling"
    assert MEASURED.best("allreduce", MIB, names[::-1]) == "ring"


def test_without_a_tuning_the_default_is_the_best():
    assert Estimates(None, 4).best("allreduce", MIB, ("recursive_doubling", "ring")) == (
        "recursive_doubling"
    )


@pytest.mark.parametrize(
    ("faster", "margin", "wanted"),
    [
        (0.98, 0.0, "tree"),  # too little to be worth it
        (0.90, 0.0, "ring"),
        (0.90, 0.15, "tree"),  # lost in the noise
        (0.50, 0.15, "ring"),
    ],
)
def test_the_default_stays_if_nothing_is_better_beyond_the_noise(faster, margin, wanted):
    grid = {"tree": cells({4: 1e-5}, margin), "ring": cells({4: faster * 1e-5}, margin)}
    estimates = Estimates(tuning(allreduce=grid), 4)
    assert estimates.best("allreduce", 4, ("tree", "ring")) == wanted


def test_what_was_not_measured_is_not_preferred_to_what_was():
    estimates = Estimates(tuning(allreduce={"ring": cells({4: 10.0})}), 4)
    assert estimates.best("allreduce", 4, ("ring", "tree")) == "ring"
    assert estimates.best("allreduce", 4, ("tree", "ring")) == "ring"


def test_the_times_of_all_ranks_are_not_those_of_some():
    some = Estimates(TWO_WAYS, 2)
    assert not some.measured
    found = some.estimate("allreduce", "ring", 4)
    assert found.source == "model"
    by_formula = predict("allreduce", "ring", 4, 2, machine=LEVELS.messages)
    assert found.seconds == pytest.approx(by_formula + LEVELS.check[0])


def test_by_the_model_few_messages_for_few_bytes_and_few_bytes_for_many():
    some = Estimates(tuning((8,)), 4)
    how = {"size": 4, "no_arena": "none", "estimates": some}
    assert pick_allreduce("auto", 4, **how) == "gathered"
    assert pick_allreduce("auto", 64 * MIB, **how) in ("ring", "halving_doubling")


def test_messages_in_flight_together_wait_once():
    """Two waits, and of the other four messages a quarter each; long ones are the executor's."""
    group = Estimates(tuning((1, 1, 1, 1)), 4, 1)
    formula = partial(predict, "allreduce", "all_pairs", size=4, ranks_per_node=1)
    alpha = LEVELS.messages.across.alpha
    saved = formula(4096, machine=LEVELS.messages) - group.modelled("allreduce", "all_pairs", 4096)
    assert saved == pytest.approx(4 * 0.75 * alpha)
    long = group.modelled("allreduce", "all_pairs", 64 * MIB)
    assert long > formula(64 * MIB, machine=LEVELS.messages)


def test_gathered_without_shared_memory_goes_straight_to_every_rank():
    plain = Estimates(tuning((4, 4)), 8, 4, nested=False)
    across = LEVELS.across
    alone = plain.modelled("allreduce", "gathered", 0)
    assert alone == pytest.approx((1 + 6 * 0.25) * across.alpha), "one wait, six messages beside"
    assert Estimates(tuning((4, 4)), 8, 4).modelled("allreduce", "gathered", 0) < alone


def test_gathered_is_never_cut_in_segments():
    cut = Estimates(tuning((1, 1)), 2, 1, segment_bytes=KIB)
    seconds = cut.modelled("allreduce", "gathered", 64 * KIB)
    across = LEVELS.across
    assert seconds == pytest.approx(across.alpha + 64 * KIB * (across.beta + across.gamma))


def test_the_check_is_a_wait_and_a_share_for_each_message_beside():
    within, across = LEVELS.check
    assert Estimates(tuning(), 4).check_seconds() == pytest.approx((1 + 2 * 0.75) * within)
    flat = Estimates(tuning((1, 1, 1)), 3, 1)
    assert flat.check_seconds() == pytest.approx((1 + 0.25) * across)
    nested = Estimates(tuning((2, 2, 2)), 6, 2)
    memory = 2 * LEVELS.shared.within.alpha
    assert nested.check_seconds() == pytest.approx((1 + 0.25) * across + memory)


def test_messages_that_share_a_link_take_longer():
    alone, shared = Estimates(tuning((2, 2)), 2, 1), Estimates(tuning((2, 2)), 2, 1, sharing=2)
    ratio = shared.modelled("allreduce", "ring", 64 * MIB) / alone.modelled(
        "allreduce", "ring", 64 * MIB
    )
    assert ratio == pytest.approx(2.0, rel=0.05)
    assert not Estimates(tuning((2,)), 2, 1, sharing=2).measured


def test_nobody_knows_what_the_library_takes_that_was_not_measured():
    assert MEASURED.estimate("allreduce", "mpi", 4) is None
    measured = Estimates(tuning(allreduce={"mpi": cells({4: 1e-6})}), 4)
    assert measured.estimate("allreduce", "mpi", 8).seconds == 2e-6


def test_segments_are_those_of_the_nearest_size():
    estimates = Estimates(tuning(segments=((MIB, 128 * KIB), (16 * MIB, MIB))), 4)
    assert [estimates.segment_bytes(n) for n in (0, 3 * MIB, 5 * MIB, 1 << 30)] == [
        128 * KIB,
        128 * KIB,
        MIB,
        MIB,
    ]
    assert Estimates(None, 4).segment_bytes(4) == 512 * KIB


def test_a_segment_that_the_user_has_set_stays():
    tuned = tuning(segments=((MIB, 128 * KIB),))
    assert Estimates(tuned, 4, segment_bytes=64).segment_bytes(MIB) == 64


# What auto makes of it


def test_auto_takes_what_was_the_fastest_without_shared_memory():
    how = {"size": 4, "no_arena": "HVDKIT_SHM=0", "estimates": MEASURED}
    assert pick_allreduce("auto", 4, **how) == "recursive_doubling"
    assert pick_allreduce("auto", MIB, **how) == "ring"
    assert pick_allreduce("tree", MIB, **how) == "tree"


def test_auto_never_takes_the_library_which_promises_no_equal_bits():
    grid = {"mpi": cells({4: 1e-9}), "tree": cells({4: 1.0})}
    estimates = Estimates(tuning(allreduce=grid), 4)
    assert pick_allreduce("auto", 4, size=4, no_arena="none", estimates=estimates) == "tree"


def test_auto_leaves_shared_memory_only_for_what_was_faster():
    grid = {"shm": cells({4: 2e-6}), "tree": cells({4: 1e-6})}
    how = {"size": 4, "no_arena": ""}
    faster = Estimates(tuning(allreduce=grid), 4)
    assert pick_allreduce("auto", 4, estimates=faster, **how) == "tree"
    assert pick_allreduce("auto", 4, estimates=Estimates(tuning(), 4), **how) == "shm"
    for kind in ("allgather", "broadcast", "alltoall", "barrier"):
        assert pick(kind, "auto", 4, no_arena="", estimates=faster) == "shm"


def test_auto_of_other_collectives():
    times = {"bruck": cells({4: 2e-5}), "ring": cells({4: 1e-5})}
    estimates = Estimates(tuning(), 4)
    assert pick("allgather", "auto", 4, no_arena="none", estimates=estimates) == "bruck"
    tuned = tuning()
    estimates = Estimates(
        type(tuned)(world=tuned.world, levels=tuned.levels, grid={"allgather": times}), 4
    )
    assert pick("allgather", "auto", 4, no_arena="none", estimates=estimates) == "ring"


def test_auto_over_several_nodes():
    grid = {"hierarchical": cells({4: 2e-4}), "ring": cells({4: 1e-4})}
    how = {"size": 4, "no_arena": "several nodes", "no_hierarchy": "", "per_node": 2}
    tuned = Estimates(tuning((2, 2), allreduce=grid), 4, 2)
    assert pick_allreduce("auto", 4, estimates=tuned, **how) == "ring"
    assert pick_allreduce("auto", 4, **how) == "hierarchical"
    assert pick_allreduce("hierarchical", 4, estimates=tuned, **how) == "hierarchical"
    flat = Estimates(tuning((1, 1, 1), allreduce={"tree": cells({4: 1e-5})}), 3, 1)
    assert pick_across(4, 3, flat) == "tree"
    assert pick_across(4, 3) == "gathered"


def test_shards_cross_by_whichever_schedule_is_best():
    """Short ones between three nodes: gathered; by all pairs, whose messages fly together."""
    across = LEVELS.messages.across
    machine = Machine(LEVELS.shared.within, across)
    assert across.at_once == 0.25, "else nobody sees that it counts"
    formula = partial(predict, "allreduce", "hierarchical", size=6, ranks_per_node=2)
    one = partial(formula, machine=machine)
    shared = Machine(across, replace(across, beta=2 * across.beta))
    flat = partial(predict, "allreduce", size=3, ranks_per_node=1)
    alone = Machine(machine.within, replace(across, alpha=0.0, beta=0.0, gamma=0.0))
    crossing = flat("gathered", 2, machine=shared)
    assert one(4) == pytest.approx(formula(4, machine=alone) + crossing)
    crossing = flat("all_pairs", 8192, machine=in_flights(shared, 3))
    assert one(16384) == pytest.approx(formula(16384, machine=alone) + crossing)
    ring = flat("ring", 4 * MIB, machine=shared)
    assert one(8 * MIB) == pytest.approx(formula(8 * MIB, machine=alone) + ring)
