"""CUDA tensors on their way to the core and back, on a GPU that shows which wait is missing."""

import itertools
import threading
from contextlib import nullcontext

import numpy as np
import pytest

from hvdkit.engine.bucketing import Gradient
from hvdkit.engine.compression.base import BucketCodec, Compressor
from hvdkit.engine.handles import Handle
from hvdkit.engine.reducer import GradientReducer

torch = pytest.importorskip("torch")

import hvdkit.torch as hvd  # noqa: E402
from core.fake_cuda import DEVICE, Gpu, GpuError, OnDevice  # noqa: E402  (torch may be missing)
from hvdkit.torch import all_reduce, asynchronous, collectives, movements, ports  # noqa: E402
from hvdkit.torch.asynchronous import starting  # noqa: E402
from hvdkit.torch.ports import Result, Source  # noqa: E402
from hvdkit.torch.staging import DeviceBuckets  # noqa: E402

STREAMS = ("current", "other", "side 0", "side 1")


@pytest.fixture(
    params=[names for n in (0, 1, 3, 4) for names in itertools.combinations(STREAMS, n)],
    ids=lambda names: f"fast: {', '.join(names)}",
)
def gpu(request, monkeypatch):
    """A GPU of which some streams are fast; at the end, all its work is done without a race."""
    gpu = Gpu(monkeypatch, request.param)
    monkeypatch.setattr(ports, "_side_streams", {})
    ports.side_streams(DEVICE)
    yield gpu
    gpu.finish()
    assert gpu.registered == {}


def elsewhere(work):
    """Call `work` on a thread of its own, as hvdkit's are, and return its result."""
    handle = Handle()
    thread = threading.Thread(target=handle.run, args=(work,))
    thread.start()
    thread.join()
    return handle.wait()


def computed(gpu, values):
    """Return a tensor that has its values when the current stream has come so far."""
    return gpu.tensor(torch.zeros(len(values))) + torch.tensor(values)


# To the host


def test_a_source_has_what_the_current_stream_computes(gpu):
    source = Source(computed(gpu, [1.0, 2.0]))  # which nobody keeps
    elsewhere(source.fetch)
    assert source.array.tolist() == [1, 2]


def test_a_source_that_another_stream_computes(gpu):
    with torch.cuda.device(DEVICE), torch.cuda.stream(gpu.other):
        source = Source(computed(gpu, [1.0, 2.0]))
    elsewhere(source.fetch)
    assert source.array.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        (lambda x: x.view(2, 2).t(), [[1, 3], [2, 4]]),
        (lambda x: x[:0], []),
        (lambda x: x[1].view(()), 2),
        (lambda x: x.view(1, 4)[:, ::2], [[1, 3]]),
    ],
    ids=["transposed", "empty", "scalar", "strided"],
)
def test_a_source_of_any_shape(gpu, make, seen):
    source = Source(make(computed(gpu, [1.0, 2.0, 3.0, 4.0])))
    elsewhere(source.fetch)
    assert source.array.tolist() == seen


def test_a_source_of_which_torch_has_put_off_the_conjugation(gpu):
    """Else the copy would be conjugated by the CPU, before it has arrived."""
    lazy = torch.tensor([1 + 2j, 3 - 4j]).conj()
    assert lazy.is_conj()
    source = Source(OnDevice.of(lazy, gpu.tensor(torch.zeros(1)).lease))
    elsewhere(source.fetch)
    assert source.array.tolist() == [1 - 2j, 3 + 4j]


def test_bfloat16(gpu):
    source = Source(gpu.tensor(torch.tensor([1.5, -2.0], dtype=torch.bfloat16)))
    elsewhere(source.fetch)
    assert source.array.astype(float).tolist() == [1.5, -2]
    result = elsewhere(lambda: Result(source.array, DEVICE)).tensor()
    assert result.dtype == torch.bfloat16
    assert gpu.value(result).tolist() == [1.5, -2]


def test_a_source_that_is_never_fetched(gpu):
    """As when another rank has asked for something else: all is let go of at once."""
    Source(computed(gpu, [1.0, 2.0]))


# To the device


def test_a_result_may_be_used_at_once(gpu):
    result = elsewhere(lambda: Result(np.array([1.0, 2.0], "f4"), DEVICE))
    twice = result.tensor() * 2  # all of which nobody keeps
    del result
    assert gpu.value(twice).tolist() == [2, 4]


def test_a_result_on_another_stream_than_the_one_that_asked(gpu):
    result = elsewhere(lambda: Result(np.array([1.0, 2.0], "f4"), DEVICE))
    with torch.cuda.device(DEVICE), torch.cuda.stream(gpu.other):
        twice = result.tensor() * 2
        del result
        assert gpu.value(twice).tolist() == [2, 4]


def test_a_result_that_nobody_asks_for(gpu):
    elsewhere(lambda: Result(np.array([1.0, 2.0], "f4"), DEVICE))
    target = computed(gpu, [1.0, 2.0])
    elsewhere(lambda: Source(target).fetch())
    elsewhere(lambda: Result(np.array([3.0, 4.0], "f4"), DEVICE, target))


def test_what_was_pinned_for_the_source_goes_back_from_there(gpu):
    sources = [Source(computed(gpu, [1.0, 2.0]))]
    elsewhere(sources[0].fetch)
    sources[0].array *= 2
    result = elsewhere(lambda: Result(sources.pop().array, DEVICE))
    assert len(gpu.pinned) == 0
    assert gpu.value(result.tensor()).tolist() == [2, 4]


@pytest.mark.parametrize("values", [[], 5.0])
def test_results_of_no_dimension_or_no_elements(gpu, values):
    array = np.array(values, "f4")
    result = elsewhere(lambda: Result(array, DEVICE)).tensor()
    assert (tuple(result.shape), gpu.value(result).tolist()) == (array.shape, array.tolist())


def test_a_result_in_place_of_a_tensor_of_any_strides(gpu):
    whole = computed(gpu, [1.0, 2.0, 3.0, 4.0])
    target = whole[::2]
    source = Source(target)
    elsewhere(source.fetch)
    result = elsewhere(lambda: Result(source.array * 10, DEVICE, target))
    assert result.tensor() is target
    assert gpu.value(whole + 0).tolist() == [10, 2, 30, 4]


# Whole operations


class Doubling:
    """A communicator that doubles, on a thread of its own, when it is waited for."""

    group = None

    @property
    def lane(self):
        return self

    def _short(self, *_):
        return NotImplemented

    def _remember(self, *_):
        return None

    def call(self, _, group, array, **how):  # noqa: ARG002
        return np.concatenate([array, array])

    def allreduce(self, array, *_, in_place):
        assert in_place
        array *= 2

    def allreduce_async(self, pairs, *, fetch, store, **_):
        def work():
            if fetch is not None:
                fetch()
            for source, target in pairs:
                np.multiply(source, 2, out=target)
            return store(None)

        return Lazy(work)

    def start(self, _, arrays, work, *, fetch, store, **how):  # noqa: ARG002
        def work():
            fetch()
            return store([array * 2 for array in arrays])

        return Lazy(work)


class Lazy(Handle):
    def __init__(self, work):
        super().__init__()
        self.work = work

    def wait(self, timeout=None):
        if not self.poll():
            elsewhere(lambda: self.run(self.work))
        return super().wait(timeout)


@pytest.fixture
def doubling(monkeypatch):
    for module in (all_reduce, collectives, movements, asynchronous.all_reduce, starting):
        monkeypatch.setattr(module, "communicator", lambda _: Doubling())


@pytest.mark.usefixtures("doubling")
@pytest.mark.parametrize("stream", ["current", "other"])
def test_synchronous_operations(gpu, stream):
    aside = torch.cuda.stream(gpu.other) if stream == "other" else nullcontext()
    with torch.cuda.device(DEVICE), aside:
        tensor = computed(gpu, [1.0, 2.0])
        new = all_reduce.allreduce(tensor) + 1
        assert gpu.value(movements.allgather(tensor) + 1).tolist() == [2, 3, 2, 3]
        assert all_reduce.allreduce_(tensor) is tensor
        tensor.add_(10)
        assert gpu.value(new).tolist() == [3, 5]
        assert gpu.value(tensor).tolist() == [12, 14]


@pytest.mark.usefixtures("doubling")
def test_asynchronous_operations(gpu):
    tensor, on_host = computed(gpu, [1.0, 2.0]), torch.tensor([3.0])
    new = hvd.allreduce_async(tensor + 0, name="a")
    both = hvd.grouped_allreduce_async([tensor, on_host], name="b")
    gathered = hvd.allgather_async(tensor, name="c")
    in_place = hvd.allreduce_async_(tensor, name="d")
    assert gpu.value(hvd.synchronize(new) + 1).tolist() == [3, 5]
    first, second = hvd.synchronize(both)
    assert (gpu.value(first + 1).tolist(), second.tolist()) == ([3, 5], [6])
    assert gpu.value(hvd.synchronize(gathered) + 1).tolist() == [3, 5]
    assert hvd.synchronize(in_place) is tensor
    assert gpu.value(tensor + 1).tolist() == [3, 5]


@pytest.mark.usefixtures("doubling")
def test_a_lazy_conjugate_cannot_be_changed_in_place(gpu):
    lazy = OnDevice.of(torch.tensor([1 + 2j]).conj(), gpu.tensor(torch.zeros(1)).lease)
    for reduce in (all_reduce.allreduce_, hvd.allreduce_async_):
        with pytest.raises(TypeError, match="lazy conjugate"):
            reduce(lazy)


# Buckets

FOUR = [Gradient(f"g{i}", (2,), np.dtype("f4")) for i in range(4)]
ALL = [3, 2, 1, 0]


class Channel(Compressor):
    """Of two ranks with the same gradients, that are added up; it stands for all that does it.

    Args:
        prompt: whether the lane's thread is so quick as to work before `submit` returns.
    """

    def __init__(self, *, prompt=False):
        self.group = self.lane = self.transport = self
        self.prompt = prompt

    def bind(self, *_):
        return Adding()

    def empty(self, count, dtype):
        return np.zeros(count, dtype)

    def submit(self, work):
        handle = Lazy(work)
        if self.prompt:
            handle.wait()
        return handle

    def call(self, function, *arguments):
        return function(*arguments)

    def agree(self, call):
        pass

    def allgather_object(self, value):
        return [value, value]


class Adding(BucketCodec):
    def allreduce(self, _, buffer, **how):  # noqa: ARG002
        buffer *= 2

    def wire_bytes(self, _):
        return 0


class Model:
    """Gradients of some parameters, which an optimizer reads: in place of `Gradients`."""

    def __init__(self, gradients=FOUR, *, prompt=False, bucket_bytes=128):
        channel = Channel(prompt=prompt)
        self.staging = DeviceBuckets(DEVICE)
        self.reducer = GradientReducer(
            gradients,
            channel=channel,
            bucket_bytes=bucket_bytes,
            compression=channel,
            staging=self.staging,
        )
        self.views = self.staging.views(self.reducer)

    def put(self, index, value):
        """As a hook of autograd does, on its stream."""
        self.views[index].copy_(computed_on(self.views[index], value), non_blocking=True)
        self.reducer.ready(index)

    def finish(self):
        self.reducer.finish()
        self.staging.wait()

    def replan(self):
        before = self.views
        self.reducer.replan()
        self.views = self.staging.views(self.reducer)
        for old, new in zip(before, self.views, strict=True):
            new.copy_(old)

    def sums(self, gpu):
        """Return what an optimizer reads, given to the current stream at once."""
        read = [view + 0 for view in self.views]
        return [gpu.value(tensor).tolist() for tensor in read]


def computed_on(like, value):
    return like.detach() * 0 + value


@pytest.mark.parametrize("prompt", [False, True])
def test_buckets_go_to_the_host_and_back(gpu, prompt):
    model = Model(prompt=prompt)
    for step in range(1, 4):
        for index in ALL:
            model.put(index, 10 * step + index)
        model.finish()
        # Read first, and waited for then: by an optimizer that goes on at once.
        assert model.sums(gpu) == [[2 * (10 * step + i)] * 2 for i in range(4)]


@pytest.mark.parametrize("prompt", [False, True])
def test_gradients_of_one_bucket_that_come_on_several_streams(gpu, prompt):
    """As in a model whose forward pass has used several."""
    model = Model(prompt=prompt)
    gpu.other.wait_stream(gpu.current)
    with torch.cuda.device(DEVICE), torch.cuda.stream(gpu.other):
        model.put(3, 3.0)
        model.put(1, 1.0)
    for index in (2, 0):
        model.put(index, float(index))
    model.finish()
    assert model.sums(gpu) == [[2.0 * i] * 2 for i in range(4)]


def test_what_was_put_there_at_the_end_of_a_step_travels_as_well(gpu):
    """Zeros, in place of gradients that have not come."""
    model = Model()
    for _ in range(2):
        gpu.other.wait_stream(gpu.default)
        with torch.cuda.device(DEVICE), torch.cuda.stream(gpu.other):
            model.put(3, 3.0)
        for index in model.reducer.missing():
            model.views[index].fill_(7.0)
        model.finish()
        assert model.sums(gpu) == [[14.0] * 2] * 3 + [[6.0] * 2]


@pytest.mark.parametrize("fails", [False, True])
def test_another_plan_while_copies_are_under_way(gpu, fails):
    """Memory goes back to the host after the last copy, and on the device after the last read."""
    model = Model()
    gpu.refuses = 2 if fails else 0
    with torch.cuda.device(DEVICE), torch.cuda.stream(gpu.other):
        gpu.other.wait_stream(gpu.default)
        for index in (3, 1, 0, 2):
            model.put(index, float(index))
        model.finish()
        with pytest.warns(UserWarning, match="error 2") if fails else nullcontext():
            model.replan()
        assert len(gpu.registered) == (0 if fails else 2)
        assert model.sums(gpu) == [[2.0 * i] * 2 for i in range(4)]
        for index in ALL:
            model.put(index, 1.0)
        model.finish()
        assert model.sums(gpu) == [[2.0] * 2] * 4


def test_memory_that_cannot_be_registered_is_copied_once_more(gpu):
    gpu.refuses = 801
    with pytest.warns(UserWarning, match="cudaHostRegister: error 801"):
        model = Model()
    assert gpu.error == 0  # nobody else finds it
    for step in range(1, 4):
        for index in ALL:
            model.put(index, float(step))
        model.finish()
        assert model.sums(gpu) == [[2.0 * step] * 2] * 4


@pytest.mark.parametrize("gpu", [STREAMS], indirect=True)
def test_a_bucket_travels_while_the_one_before_is_reduced(gpu):
    """It is with the reducer before anybody has asked for it."""
    model = Model()
    assert gpu.streams[0].fast
    for index in ALL:
        model.put(index, 1.0)
    assert [buffer[:2].tolist() for buffer in model.reducer.buffers] == [[1.0, 1.0]] * 2
    model.finish()


def test_an_optimizer_that_is_let_go_of_in_the_middle_of_a_step(gpu):
    model = Model()
    assert len(gpu.registered) == 2
    for index in ALL:
        model.put(index, 1.0)
    model.reducer.finish()
    model.staging.came(0)
    model.staging.filled(0)
    del model
    assert gpu.registered == {}


def test_gradients_without_elements(gpu):
    gradients = [Gradient("g", (0, 3), np.dtype("f4"))]
    model = Model(gradients, bucket_bytes=0)
    model.put(0, 1.0)
    model.finish()
    assert model.sums(gpu) == [[]]


# The fake itself


@pytest.mark.parametrize("gpu", [()], indirect=True)
def test_what_the_fake_notices(gpu):
    """Each of these is what a wait that is missing leads to."""
    with pytest.raises(GpuError, match="whole device"):
        torch.cuda.synchronize()
    with pytest.raises(GpuError, match="device 0"):
        gpu.current.record_event().synchronize()
    with pytest.raises(GpuError, match="waits for a copy"):
        torch.zeros(2).copy_(computed(gpu, [1.0, 2.0]))
    with pytest.raises(GpuError, match="waits for a copy"):
        torch.zeros(2).copy_(computed(gpu, [1.0, 2.0]), non_blocking=True)
