"""Mail: whole messages in order, however many write at once, and sleep that ends when it should."""

import hashlib
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from hvdkit.transport import mail
from hvdkit.transport.base import Backoff
from hvdkit.transport.mail import MessageMail, PipeMail
from hvdkit.transport.threads import ThreadTransport, ThreadWorld

SECONDS = 20
PIPE = 1 << 20  # bytes that fit into a pipe, at the most


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def pipe_mail(size):
    return ThreadWorld(size).run(PipeMail.create, timeout=SECONDS)


def message_mail(size):
    world = ThreadWorld(size)
    return [MessageMail(ThreadTransport(world, rank)) for rank in range(size)]


@pytest.fixture(params=[pipe_mail, message_mail], ids=["pipes", "messages"])
def mails(request):
    """Return a function that connects so many ranks."""
    everyone = []

    def connect(size):
        everyone.extend(request.param(size))
        return everyone

    yield connect
    for box in everyone:
        box.close()


def receive(box, count):
    """Return `count` messages, as ``(source, message)``."""
    found, deadline = [], time.monotonic() + SECONDS
    while len(found) < count and time.monotonic() < deadline:
        found += box.receive(0.1)
    assert len(found) == count
    return found


def pump(boxes, stop):
    """Let ranks go on sending what they could not send yet, until `stop` is set."""

    def run(box):
        while not stop.is_set():
            assert box.receive(0.01) == []

    threads = [threading.Thread(target=run, args=(box,), daemon=True) for box in boxes]
    for thread in threads:
        thread.start()
    return threads


# Messages


@pytest.mark.parametrize("size", [1, 2, 3])
def test_everyone_to_everyone_and_to_itself(mails, size):
    boxes = mails(size)
    for source, box in enumerate(boxes):
        for destination in range(size):
            box.send(destination, f"{source} to {destination}".encode())
    for rank, box in enumerate(boxes):
        assert sorted(receive(box, size)) == [
            (source, f"{source} to {rank}".encode()) for source in range(size)
        ]
        assert box.receive(0.0) == []


@pytest.mark.parametrize("nbytes", [0, 1, 4087, 4088, 4089, 8176, 8177, 100_000])
def test_messages_of_any_length_are_whole(mails, nbytes):
    """A record in a pipe holds 4088 bytes."""
    boxes = mails(2)
    message = os.urandom(nbytes)
    boxes[0].send(1, message)
    boxes[0].send(1, b"next")
    assert receive(boxes[1], 2) == [(0, message), (0, b"next")]


def test_messages_keep_their_order(mails):
    boxes = mails(2)
    for number in range(500):
        boxes[0].send(1, number.to_bytes(2, "little") * (1 + number % 40))
    found = receive(boxes[1], 500)
    assert [int.from_bytes(message[:2], "little") for _, message in found] == list(range(500))


def test_sending_more_than_fits_never_blocks_and_all_of_it_arrives(mails):
    boxes = mails(3)
    messages = [os.urandom(3 * PIPE), b"small", os.urandom(PIPE), b"", b"last"]
    began = time.monotonic()
    for message in messages:
        boxes[0].send(1, message)
        boxes[0].send(2, message[:10])
    assert time.monotonic() - began < SECONDS / 4
    assert receive(boxes[2], 5) == [(0, message[:10]) for message in messages]
    stop = threading.Event()
    (thread,) = pump([boxes[0]], stop)
    assert receive(boxes[1], 5) == [(0, message) for message in messages]
    stop.set()
    thread.join(SECONDS)


def test_two_that_send_more_than_fits_to_each_other(mails):
    boxes = mails(2)
    big = [os.urandom(2 * PIPE), os.urandom(2 * PIPE)]
    found = [None, None]

    def run(rank):
        boxes[rank].send(1 - rank, big[rank])
        found[rank] = receive(boxes[rank], 1)
        deadline = time.monotonic() + SECONDS
        while None in found and time.monotonic() < deadline:  # the other may need the rest of mine
            boxes[rank].receive(0.01)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert found == [[(1, big[1])], [(0, big[0])]]


def test_many_that_write_to_one_at_once_do_not_mix(mails):
    size, each = 6, 40
    boxes = mails(size)

    def message(source, number):
        return bytes([source]) * (1 + 977 * ((source + number) % 13))

    done = threading.Event()

    def write(source):
        for number in range(each):
            boxes[source].send(0, message(source, number))
            boxes[source].receive(0.0)
        while not done.is_set():
            boxes[source].receive(0.01)

    threads = [threading.Thread(target=write, args=(source,)) for source in range(1, size)]
    for thread in threads:
        thread.start()
    found = receive(boxes[0], (size - 1) * each)
    done.set()
    for thread in threads:
        thread.join(SECONDS)
    for source in range(1, size):
        assert [m for s, m in found if s == source] == [message(source, n) for n in range(each)]


# Sleep


def test_a_message_ends_the_sleep(mails):
    boxes = mails(2)
    timer = threading.Timer(0.05, boxes[1].send, (0, b"good morning"))
    timer.start()
    assert boxes[0].receive(None) == [(1, b"good morning")]
    timer.join()


def test_time_is_up(mails):
    (box, _) = mails(2)
    began = time.monotonic()
    assert box.receive(0.05) == []
    assert 0.045 < time.monotonic() - began < SECONDS / 2


def test_no_time_at_all(mails):
    """Whoever asks so has work to do: a millisecond of sleep each time would be its whole time."""
    (box, _) = mails(2)
    began = time.monotonic()
    for _ in range(1000):
        assert box.receive(0.0) == []
    assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("patient", [False, True])
def test_another_thread_ends_the_sleep(mails, patient):
    (box, _) = mails(2)
    timer = threading.Timer(0.05, box.wake)
    timer.start()
    began = time.monotonic()
    assert box.receive(None, patient=patient) == []
    assert time.monotonic() - began < SECONDS / 2
    timer.join()


def test_one_who_is_patient_looks_less_often(monkeypatch):
    """Each look takes the core from the ranks that share it."""
    looks = {False: 0, True: 0}
    (box, _) = message_mail(2)
    monkeypatch.setattr(MessageMail, "PATIENCE", SECONDS)

    def look():
        looks[patient] += 1

    monkeypatch.setattr(box._transport, "incoming", look)
    for patient in looks:
        box.receive(1.0, patient=patient)
    assert looks[True] < looks[False] - 100  # of one each millisecond


def test_what_comes_reaches_one_who_is_patient_too(mails):
    boxes = mails(2)
    timer = threading.Timer(0.05, boxes[1].send, (0, b"good morning"))
    timer.start()
    assert boxes[0].receive(None, patient=True) == [(1, b"good morning")]
    timer.join()


def test_a_wake_ends_a_long_nap_at_once(monkeypatch):
    def reset(naps):
        Backoff.reset(naps)
        naps._sleep = SECONDS

    monkeypatch.setattr(mail._Naps, "reset", reset)
    (box, _) = message_mail(2)
    timer = threading.Timer(0.2, box.wake)
    timer.start()
    began = time.monotonic()
    assert box.receive(None, patient=True) == []
    assert time.monotonic() - began < SECONDS / 2
    timer.join()


def test_whoever_was_woken_before_does_not_fall_asleep(mails):
    """Once: several calls of `wake` before it are one."""
    (box, _) = mails(2)
    for _ in range(3):
        box.wake()
    assert box.receive(None) == []
    began = time.monotonic()
    assert box.receive(0.05) == []
    assert time.monotonic() - began > 0.045


def test_a_wake_and_a_message(mails):
    boxes = mails(2)
    boxes[1].send(0, b"x")
    boxes[0].wake()
    assert receive(boxes[0], 1) == [(1, b"x")]


# The end


def test_a_peer_that_is_gone_does_not_disturb(mails, monkeypatch):
    monkeypatch.setattr(mail, "SECONDS_TO_DELIVER", 0.05)
    boxes = mails(3)
    boxes[0].send(2, os.urandom(3 * PIPE))  # it reads nothing of it
    gone = boxes.pop()
    gone.close()
    for number in range(50):
        boxes[0].send(2, os.urandom(number * 100))
        boxes[0].send(1, bytes([number]))
        boxes[0].receive(0.0)
    assert [message for _, message in receive(boxes[1], 50)] == [bytes([n]) for n in range(50)]
    began = time.monotonic()
    boxes[0].close()
    assert time.monotonic() - began < SECONDS / 2
    boxes.pop(0)


def test_close_delivers_what_could_not_be_sent_before(mails):
    boxes = mails(2)
    messages = [os.urandom(3 * PIPE), b"left"]
    for message in messages:
        boxes[0].send(1, message)
    found = []
    thread = threading.Thread(target=lambda: found.extend(receive(boxes[1], 2)))
    thread.start()
    boxes[0].close()
    thread.join(SECONDS)
    assert found == [(0, message) for message in messages]
    boxes.pop(0)


def test_pipes_are_closed():
    pipe_mail(2)[0].close()
    before = open_files()
    for _ in range(3):
        boxes = pipe_mail(3)
        assert open_files() > before
        for box in boxes:
            box.close()
    del box, boxes
    assert open_files() == before


def test_a_wake_that_comes_after_the_end_writes_into_nobodys_file(tmp_path):
    """A thread may be about to wake the mail while another closes it."""
    boxes = pipe_mail(1)
    boxes[0].close()
    files = [(tmp_path / f"{i}").open("wb") for i in range(10)]  # take the freed numbers
    boxes[0].wake()
    for file in files:
        file.close()
    assert [path.stat().st_size for path in sorted(tmp_path.iterdir())] == [0] * 10


# Where there can be none


class Elsewhere(ThreadTransport):
    """Changes what a rank hears of the others' addresses."""

    def __init__(self, transport, change):
        super().__init__(transport.world, transport.rank)
        self.change = change

    def allgather_object(self, value):
        values = super().allgather_object(value)
        return [self.change(v) for v in values] if isinstance(value, tuple) else values


@pytest.mark.parametrize(
    "change",
    [
        lambda address: (2**22 + 1, *address[1:]),  # no such process
        lambda address: (address[0], 2, *address[2:]),  # another file
        lambda address: (*address[:2], address[2] + 1),  # the same number in another container
    ],
    ids=["process", "file", "container"],
)
def test_ranks_that_cannot_reach_each_other_all_learn_why(change):
    before = open_files()
    found = ThreadWorld(3).run(
        lambda t: PipeMail.create(Elsewhere(t, change) if t.rank == 1 else t), timeout=SECONDS
    )
    assert set(map(type, found)) == {str}
    assert len(set(found)) == 1
    assert "rank 1 of this node cannot open its peers' pipes (" in found[0]
    assert open_files() == before


# Among processes


class Processes:
    """A transport stand-in whose ranks are processes: enough to connect mail."""

    def __init__(self, rank, queues):
        self.rank, self.size, self.queues = rank, len(queues), queues
        self.round, self.early = 0, []

    def allgather_object(self, value):
        for queue in self.queues:
            queue.put((self.round, self.rank, value))
        values = {}
        while len(values) < self.size:
            found, self.early = [self.queues[self.rank].get(), *self.early], []
            for number, rank, theirs in found:
                if number == self.round:
                    values[rank] = theirs
                else:
                    self.early.append((number, rank, theirs))
        self.round += 1
        return [values[rank] for rank in range(self.size)]


def message_of(source, destination, number):
    length = [0, 3, 5000, 70_000, 2 * PIPE][number % 5] + source + 3 * destination
    return hashlib.shake_128(f"{source} {destination} {number}".encode()).digest(length)


def exchange(rank, queues, results):
    """Send 20 messages to everyone and receive everyone's; then rank 2 dies, the others go on."""
    local = Processes(rank, queues)
    box = PipeMail.create(local)
    size, found = local.size, {source: [] for source in range(local.size)}
    for number in range(20):
        for destination in range(size):
            box.send(destination, message_of(rank, destination, number))
    while sum(map(len, found.values())) < 20 * size or box._unsent:
        for source, message in box.receive(1.0):
            found[source].append(message)
    right = all(
        found[source] == [message_of(source, rank, number) for number in range(20)]
        for source in range(size)
    )
    local.allgather_object("everyone has everything")
    if rank == 2:
        results.put((rank, right))
        os._exit(1)
    assert queues[rank].get() == "rank 2 is gone"
    box.send(2, b"are you there?" * PIPE)
    box.send(1 - rank, b"go on")
    (answer,) = receive(box, 1)
    box.close()
    results.put((rank, right and answer == (1 - rank, b"go on")))


def test_processes_send_whatever_they_want_at_once_and_outlive_each_other():
    context = multiprocessing.get_context("spawn")
    queues, results = [context.SimpleQueue() for _ in range(3)], context.SimpleQueue()
    ranks = [
        context.Process(target=exchange, args=(rank, queues, results), daemon=True)
        for rank in range(3)
    ]
    try:
        for rank in ranks:
            rank.start()
        ranks[2].join(SECONDS)
        assert ranks[2].exitcode == 1
        for queue in queues[:2]:
            queue.put("rank 2 is gone")
        for rank in ranks[:2]:
            rank.join(SECONDS)
            assert rank.exitcode == 0
        assert sorted(results.get() for _ in ranks) == [(0, True), (1, True), (2, True)]
    finally:
        for rank in ranks:
            rank.kill()
