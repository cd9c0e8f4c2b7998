"""DistributedOptimizer: training equals one process with all the data, however it is asked for."""

import contextlib
import copy

import pytest
from adasum_oracle import adasum

import hvdkit.torch as hvd

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from training import (  # noqa: E402  (torch may be missing)
    assert_identical,
    assert_same,
    batch_of,
    build,
    loss_of,
    mine,
    pair,
    train,
    whole,
)

RANK, SIZE = hvd.rank(), hvd.size()
several = pytest.mark.skipif(SIZE == 1, reason="needs several ranks")

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


class Halved(hvd.Compression.none):
    """As Horovod's users write them: a class that inherits, and has its own two functions."""

    calls = 0

    @staticmethod
    def compress(tensor):
        Halved.calls += 1
        return tensor / 2, tensor.dtype

    @staticmethod
    def decompress(tensor, ctx):
        return tensor.to(ctx) * 2


HOWS = {
    "default": {},
    "each alone": {"bucket_bytes": 1},
    "two groups": {"groups": 2},
    "num_groups": {"num_groups": 3},
    "more groups than parameters": {"groups": 99},
    "copied": {"gradient_as_bucket_view": False},
    "copied, each alone": {"gradient_as_bucket_view": False, "bucket_bytes": 1},
    "predivided": {"gradient_predivide_factor": 4.0},
    "custom": {"compression": Halved},
}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_20_steps(kind, how):
    model, ours, reference, theirs = pair(OPTIMIZERS[kind], **HOWS[how])
    train(model, ours, range(20), mine)
    train(reference, theirs, range(20), whole)
    assert_same(model, reference)
    assert_identical(model)


def test_lists_of_groups():
    """A parameter that is in no list travels alone; one that is not trained counts for nothing."""
    model, reference = build(), build()
    weights = [p for p in model.parameters() if p.ndim == 2]
    stranger = torch.nn.Parameter(torch.zeros(3))
    ours = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), groups=[weights, [stranger]]
    )
    train(model, ours, range(3), mine)
    train(reference, torch.optim.SGD(reference.parameters(), lr=0.1), range(3), whole)
    assert_same(model, reference)


def test_a_custom_compressor_is_what_compresses():
    """Found here: one that inherits from Compression's was taken for the one it inherits from."""
    model, ours, _, _ = pair(compression=Halved)
    Halved.calls = 0
    train(model, ours, range(2), mine)
    assert Halved.calls == (0 if SIZE == 1 else 2 * 4)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("as_views", [True, False])
@pytest.mark.parametrize("of_model", [True, False])
def test_ways_to_reset_gradients(set_to_none, as_views, of_model):
    model, ours, reference, theirs = pair(gradient_as_bucket_view=as_views)
    zero_grad = model.zero_grad if of_model else ours.zero_grad
    train(model, ours, range(4), mine, lambda: zero_grad(set_to_none))
    train(reference, theirs, range(4), whole)
    assert_same(model, reference)


@pytest.mark.parametrize("as_views", [True, False])
def test_gradients_that_are_never_reset(as_views):
    """They sum up over steps, as in one process."""
    model, ours, reference, theirs = pair(gradient_as_bucket_view=as_views)
    train(model, ours, range(4), mine, lambda: None)
    train(reference, theirs, range(4), whole, lambda: None)
    assert_same(model, reference)


@pytest.mark.parametrize("how", [{}, {"compression": Halved}], ids=["plain", "custom"])
def test_sum(how):
    """A sum of the ranks' gradients is that of a loss as many times as large."""
    model, ours, reference, theirs = pair(op=hvd.Sum, **how)
    train(model, ours, range(5), mine)
    for step in range(5):
        theirs.zero_grad()
        (SIZE * loss_of(reference, batch_of(step))).backward()
        theirs.step()
    assert_same(model, reference)


COMPRESSIONS = {
    "fp16": (hvd.Compression.fp16, 2e-3),
    "bf16": (hvd.Compression.bf16, 2e-2),
    "int8": (hvd.Compression.int8, 2e-2),
    "topk": (hvd.Compression.topk(0.5), 0.2),
    "powersgd": (hvd.Compression.powersgd(2), 0.2),
}


@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum], ids=str)
@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_lossy_compression(kind, op):
    """Weights end near those without it, by the distance that these have gone; all ranks alike."""
    compression, bound = COMPRESSIONS[kind]
    model, ours, reference, theirs = pair(compression=compression, op=op, dtype=torch.float32)
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    if op == hvd.Sum:
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] /= SIZE
    train(model, ours, range(20), mine)
    for step in range(20):
        theirs.zero_grad()
        loss = loss_of(reference, batch_of(step, torch.float32))
        (loss * (SIZE if op == hvd.Sum else 1)).backward()
        theirs.step()
    ends = [torch.nn.utils.parameters_to_vector(m.parameters()) for m in (model, reference)]
    error = (ends[0] - ends[1]).norm() / (ends[1] - start).norm()
    assert error < bound
    assert SIZE == 1 or error > 0
    assert_identical(model)


# Backward passes


@pytest.mark.parametrize("how", [{}, {"compression": Halved}, {"bucket_bytes": 1}], ids=str)
def test_two_passes_a_step(how):
    model, ours, reference, theirs = pair(backward_passes_per_step=2, **how)
    assert ours.backward_passes_per_step == 2
    for optimizer, net, part in ((ours, model, mine), (theirs, reference, whole)):
        for step in range(3):
            optimizer.zero_grad()
            loss_of(net, part(batch_of(2 * step))).backward()
            loss_of(net, part(batch_of(2 * step + 1))).backward()
            optimizer.step()
    assert_same(model, reference)


def test_fewer_passes_than_said_and_passes_thrown_away():
    model, ours, reference, theirs = pair(backward_passes_per_step=3)
    loss_of(model, mine(batch_of(0))).backward()
    ours.zero_grad()  # the next counts as the first again
    for step in range(2):
        loss_of(model, mine(batch_of(step))).backward()
        loss_of(reference, batch_of(step)).backward()
    assert not any(gradients.in_flight for gradients in ours._gradients)
    ours.step()
    theirs.step()
    ours.set_backward_passes_per_step(1)
    train(model, ours, range(2), mine)
    train(reference, theirs, range(2), whole)
    assert_same(model, reference)
    with pytest.raises(hvd.ArgumentError, match="1 or more"):
        ours.set_backward_passes_per_step(0)


@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum], ids=str)
@pytest.mark.parametrize(
    "how", [{}, {"bucket_bytes": 1}, {"gradient_as_bucket_view": False}], ids=str
)
@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_that_arrive_twice(op, how, passes):
    """Two losses with a backward each, without a word about it: the first waits for no step."""
    model, ours, reference, theirs = pair(op=op, backward_passes_per_step=passes, **how)
    factor = SIZE if op == hvd.Sum else 1
    for step in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        for i in range(2 * passes + 1):
            batch = batch_of(10 * step + i)
            loss_of(model, mine(batch)).backward()
            (factor * loss_of(reference, batch)).backward()
        ours.step()
        theirs.step()
    assert_same(model, reference)
    assert_identical(model)


def test_custom_compression_cannot_take_gradients_twice():
    model, ours, _, _ = pair(compression=Halved)
    loss_of(model, mine(batch_of(0))).backward()
    twice = pytest.raises(hvd.InFlightError, match="backward_passes_per_step")
    with twice if SIZE > 1 else contextlib.nullcontext():
        loss_of(model, mine(batch_of(0))).backward()
    ours.synchronize()


# Adasum


@pytest.mark.parametrize("kind", ["none", "fp16", "custom"])
def test_adasum(kind):
    """Every rank's step is simulated here, with its momentum; they are combined by the formula."""
    compression = Halved if kind == "custom" else getattr(hvd.Compression, kind)
    model = build()
    ours = hvd.DistributedOptimizer(
        OPTIMIZERS["sgd"](model.parameters()),
        model.named_parameters(),
        compression=compression,
        op=hvd.Adasum,
        backward_passes_per_step=2,
    )
    replicas = [build() for _ in range(SIZE)]
    optimizers = [OPTIMIZERS["sgd"](replica.parameters()) for replica in replicas]
    for step in range(3):
        starts = [parameter.detach().clone() for parameter in replicas[0].parameters()]
        for rank, (replica, optimizer) in enumerate(zip(replicas, optimizers, strict=True)):
            optimizer.zero_grad()
            for i in range(2):
                loss_of(replica, mine(batch_of(10 * step + i), rank)).backward()
            optimizer.step()
        for start, *theirs in zip(starts, *(r.parameters() for r in replicas), strict=True):
            deltas = [(parameter.detach() - start).reshape(-1) for parameter in theirs]
            for parameter in theirs:
                parameter.data = start + adasum(list(deltas)).reshape(start.shape)
        ours.zero_grad()
        for i in range(2):
            loss_of(model, mine(batch_of(10 * step + i))).backward()
        ours.synchronize()
        ours.step()
    assert_same(model, replicas[0], 1e-3 if kind == "fp16" else 1e-9)
    assert_identical(model)


def test_adasum_takes_no_compression_with_memory():
    with pytest.raises(hvd.ArgumentError, match="Adasum takes"):
        pair(op=hvd.Adasum, compression=hvd.Compression.powersgd(2))


# Between backward and step


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("how", [{}, {"compression": Halved}, {"op": hvd.Sum}], ids=str)
def test_clipping(how, skip):
    model, ours, reference, theirs = pair(**how)
    for step in range(4):
        ours.zero_grad()
        theirs.zero_grad()
        loss_of(model, mine(batch_of(step))).backward()
        loss = loss_of(reference, batch_of(step))
        (loss * (SIZE if "op" in how else 1)).backward()
        ours.synchronize()
        ours.synchronize()  # again: does nothing
        for net in (model, reference):
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
        with ours.skip_synchronize() if skip else contextlib.nullcontext():
            ours.step()
        theirs.step()
    assert_same(model, reference)


def test_a_backward_after_synchronize_is_averaged_too():
    """Found here: step() took it for averaged."""
    model, ours, reference, theirs = pair()
    for step in range(2):
        loss_of(model, mine(batch_of(step))).backward()
        loss_of(reference, batch_of(step)).backward()
        if step == 0:
            ours.synchronize()
    ours.step()
    theirs.step()
    assert_same(model, reference)


@several
def test_skip_synchronize_is_for_what_is_averaged():
    model, ours, _, _ = pair()
    loss_of(model, mine(batch_of(0))).backward()
    with pytest.raises(hvd.InFlightError, match="skip_synchronize"), ours.skip_synchronize():
        ours.step()
    ours.step()
    assert_identical(model)


@several
def test_reset_while_gradients_are_on_their_way():
    model, ours, _, _ = pair()
    loss_of(model, mine(batch_of(0))).backward()
    with pytest.raises(hvd.InFlightError, match="throw them away"):
        ours.zero_grad()
    ours.synchronize()
    ours.zero_grad()
    train(model, ours, range(2), mine)
    assert_identical(model)


@pytest.mark.parametrize("skip", [True, False])
def test_mixed_precision_with_a_gradient_scaler(skip):
    """An overflow on the last rank alone makes every rank leave out the step."""
    model, ours, reference, theirs = pair(OPTIMIZERS["sgd"], dtype=torch.float32)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2)]
    for step in range(6):
        batch = batch_of(step, torch.float32)
        if step == 3:
            batch[0][SIZE - 1, 0] = float("inf")  # a row of the last rank's
        for scaler, optimizer, net, part in (
            (scalers[0], ours, model, mine),
            (scalers[1], theirs, reference, whole),
        ):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(net, part(batch))
            scaler.scale(loss).backward()
            if optimizer is ours:
                ours.synchronize()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            skipping = skip and optimizer is ours
            with ours.skip_synchronize() if skipping else contextlib.nullcontext():
                scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_identical(model)
    assert_same(model, reference, 1e-2)


# Closures


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_closure(kind):
    model, ours, reference, theirs = pair(OPTIMIZERS[kind])
    for step in range(3):
        for optimizer, net, part in ((ours, model, mine), (theirs, reference, whole)):

            def closure(optimizer=optimizer, net=net, part=part, step=step):
                optimizer.zero_grad()
                loss = loss_of(net, part(batch_of(step)))
                loss.backward()
                return loss

            loss = optimizer.step(closure)
        assert loss.requires_grad  # as the closure gave it
    assert_same(model, reference)


@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum], ids=str)
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("as_number", [True, False])
def test_lbfgs(search, op, as_number):
    """It goes by the loss how often it calls the closure: every rank needs that of all."""
    if op == hvd.Sum and search is None:
        pytest.skip("its first step goes by the size of the gradient")

    def make(parameters):
        return torch.optim.LBFGS(parameters, lr=0.3, max_iter=12, line_search_fn=search)

    model, ours, reference, theirs = pair(make, op=op)
    factor = SIZE if op == hvd.Sum else 1
    calls = {id(ours): 0, id(theirs): 0}
    for optimizer, net, part, times in ((ours, model, mine, 1), (theirs, reference, whole, factor)):

        def closure(optimizer=optimizer, net=net, part=part, times=times):
            optimizer.zero_grad()
            loss = times * loss_of(net, part(batch_of(0)))
            loss.backward()
            calls[id(optimizer)] += 1
            return loss.item() if as_number else loss

        for _ in range(2):
            optimizer.step(closure)
    assert calls[id(ours)] == calls[id(theirs)]
    assert_same(model, reference, 1e-6)
    assert_identical(model)


# Schedulers, state, copies


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_scheduler_that_is_made_before_or_after(when):
    """Found here: one made before held on to the optimizer's own step(), which averages nothing."""
    model, reference = build(), build()
    ours = torch.optim.SGD(model.parameters(), lr=0.4)
    theirs = torch.optim.SGD(reference.parameters(), lr=0.4)
    schedulers = []
    if when == "before":
        schedulers.append(torch.optim.lr_scheduler.StepLR(ours, 1, gamma=0.5))
    assert hvd.DistributedOptimizer(ours) is ours
    assert isinstance(ours, torch.optim.SGD)
    if when == "after":
        schedulers.append(torch.optim.lr_scheduler.StepLR(ours, 1, gamma=0.5))
    schedulers.append(torch.optim.lr_scheduler.StepLR(theirs, 1, gamma=0.5))
    for step in range(3):
        train(model, ours, [step], mine)
        train(reference, theirs, [step], whole)
        for scheduler in schedulers:
            scheduler.step()
    assert ours.param_groups[0]["lr"] == 0.05
    assert_same(model, reference)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_stopped_and_gone_on(kind):
    """From a checkpoint of model and optimizer, training goes on as if it had not stopped."""
    model, ours, reference, theirs = pair(OPTIMIZERS[kind])
    train(model, ours, range(3), mine)
    saved = copy.deepcopy((model.state_dict(), ours.state_dict()))
    train(model, ours, range(10, 13), mine)
    model.load_state_dict(saved[0])
    ours.load_state_dict(saved[1])
    train(model, ours, range(3, 6), mine)
    train(reference, theirs, range(6), whole)
    assert_same(model, reference)


def test_hooks_of_a_step_run_once():
    """Found here: they ran twice after load_state_dict(), which wraps step() again."""
    model, ours, _, _ = pair()
    calls = []
    ours.register_step_pre_hook(lambda *_: calls.append("before"))
    ours.register_step_post_hook(lambda *_: calls.append("after"))
    for _ in range(2):
        train(model, ours, [0], mine)
        assert calls == ["before", "after"]
        calls.clear()
        ours.load_state_dict(ours.state_dict())


def test_a_copy_of_the_model_has_no_hooks():
    model, ours, reference, theirs = pair()
    train(model, ours, range(2), mine)
    twin = copy.deepcopy(model)
    loss_of(twin, batch_of(RANK)).backward()
    if RANK == 0:  # alone: nothing is on its way
        torch.optim.SGD(twin.parameters(), lr=0.1).step()
    train(model, ours, range(2, 4), mine)
    train(reference, theirs, range(4), whole)
    assert_same(model, reference)


# Process sets


@several
@pytest.mark.parametrize("op", [hvd.Average, hvd.Adasum], ids=str)
@pytest.mark.parametrize("compression", [hvd.Compression.none, Halved])
def test_a_process_set(op, compression):
    """Its ranks train together, the last one by itself."""
    process_set = hvd.add_process_set(range(SIZE - 1))
    model = build()
    ours = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        op=op,
        compression=compression,
        process_set=process_set,
    )
    train(model, ours, range(3), mine)
    alone = build()
    train(alone, torch.optim.SGD(alone.parameters(), lr=0.1), range(3), mine)
    everyone = hvd.allgather(torch.nn.utils.parameters_to_vector(model.parameters())[None])
    assert (everyone[:-1] == everyone[0]).all()
    assert not torch.equal(everyone[0], everyone[-1])
    if SIZE == 2 or RANK == SIZE - 1:
        assert_same(model, alone)
    del ours
    hvd.remove_process_set(process_set)


def test_a_process_set_that_is_not_known():
    """Found here: every rank trained by itself."""
    with pytest.raises(hvd.ArgumentError, match="not known"):
        pair(process_set=hvd.ProcessSet([0]))


# Mistakes


def test_arguments():
    for how, message in (
        ({"op": hvd.Max}, "not Max"),
        ({"op": "median"}, "unknown operation"),
        ({"op": hvd.Sum, "gradient_predivide_factor": 2.0}, "predivide"),
        ({"backward_passes_per_step": 0}, "1 or more"),
        ({"groups": 0}, "1 or more"),
        ({"groups": [["weight"]]}, "lists of tensors"),
        ({"compression": "fp16"}, "no compressor"),
    ):
        with pytest.raises(hvd.ArgumentError, match=message):
            pair(**how)
    model = build()
    with pytest.raises(hvd.ArgumentError, match="in two groups"):
        parameters = list(model.parameters())
        hvd.DistributedOptimizer(
            torch.optim.SGD(parameters, lr=0.1), groups=[parameters, parameters[:1]]
        )
    with pytest.raises(hvd.ArgumentError, match="pairs"):
        hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.parameters())
    with pytest.raises(hvd.ArgumentError, match="already"):
        hvd.DistributedOptimizer(
            hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        )


@several
def test_models_that_differ():
    """Every rank gets the error, and keeps a plain optimizer, which can be made distributed yet."""
    for odd, message in (
        ([torch.nn.Parameter(torch.zeros(4))], "differ at gradient"),
        ([torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))], "differ at gradient"),
        ([torch.nn.Parameter(torch.zeros(3)) for _ in range(2)], "2 gradients"),
        ([torch.nn.Parameter(torch.zeros(3), requires_grad=False)], "0 gradients"),
    ):
        parameters = odd if RANK == SIZE - 1 else [torch.nn.Parameter(torch.zeros(3))]
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        for how in ({}, {"compression": Halved}, {"op": hvd.Adasum}):
            if how.get("op") == hvd.Adasum and not odd[0].requires_grad:
                continue  # what is frozen is combined as well
            with pytest.raises(hvd.MismatchError, match=message):
                hvd.DistributedOptimizer(optimizer, **how)
            assert type(optimizer) is torch.optim.SGD
    weight = torch.nn.Parameter(torch.zeros(3))
    named = [(f"weight.{RANK}", weight)]
    with pytest.raises(hvd.MismatchError, match=r"weight\.0 / weight\.1"):
        hvd.DistributedOptimizer(torch.optim.SGD([weight], lr=1.0), named)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([weight], lr=1.0))
    (weight * RANK).sum().backward()
    optimizer.step()
    assert_identical([weight])


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("how", [{}, {"compression": Halved}, {"bucket_bytes": 1}], ids=str)
def test_ranks_that_run_out_of_data(first, how):
    """Rank r has r batches or one more, then joins; the others count its gradients as zeros."""
    model, ours, reference, theirs = pair(**how)
    for step in range(RANK + first):
        ours.zero_grad()
        loss_of(model, mine(batch_of(step))).backward()
        ours.step()
    last = hvd.join()
    assert last == SIZE - 1
    hvd.broadcast_parameters(model.state_dict(), root_rank=last)
    for step in range(SIZE - 1 + first):
        theirs.zero_grad()
        there = range(step + 1 - first, SIZE)
        total = sum(loss_of(reference, mine(batch_of(step), rank)) for rank in there)
        (total / SIZE).backward()
        theirs.step()
    assert_same(model, reference)
