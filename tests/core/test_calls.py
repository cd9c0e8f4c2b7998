"""The messages in which ranks that disagree are shown what each had."""

from hvdkit.collectives.calls import Call, mismatch
from hvdkit.errors import ArgumentError, MismatchError


def call(shape, *, kind="allreduce", name="grad.fc1.weight", dtype="float32", **more):
    parts = (("op", more.pop("op", "Sum")), ("dtype", dtype), ("shape", str(shape)))
    return Call(kind, name, parts + tuple(more.items()))


REMEDY = "Give every rank the same call: the same model, the same arguments, in one order."


def test_the_shape():
    error = mismatch([call((512, 32 if rank == 1 else 64)) for rank in range(8)])
    assert isinstance(error, MismatchError)
    assert str(error) == (
        "allreduce 'grad.fc1.weight': ranks disagree on the shape\n"
        "  ranks 0, 2-7:  float32 (512, 64)\n"
        "  rank 1:        float32 (512, 32)\n" + REMEDY
    )


def test_without_a_name():
    error = mismatch([call((3,), name=None), call((4,), name=None)])
    assert str(error).startswith("allreduce: ranks disagree on the shape\n")


def test_several_things_at_once():
    error = mismatch([call((3,)), call((4,), dtype="int8", op="Max")])
    assert str(error) == (
        "allreduce 'grad.fc1.weight': ranks disagree on the op and dtype and shape\n"
        "  rank 0:  float32 (3,) op=Sum\n"
        "  rank 1:  int8 (4,) op=Max\n" + REMEDY
    )


def test_something_else_than_dtype_and_shape():
    error = mismatch([call((3,), algorithm="ring"), call((3,), algorithm="tree")])
    assert "disagree on the algorithm\n" in str(error)
    assert "  rank 0:  float32 (3,) algorithm=ring\n" in str(error)
    assert "  rank 1:  float32 (3,) algorithm=tree\n" in str(error)


def test_different_collectives():
    error = mismatch([call((3,)), Call("barrier", None), call((5,), kind="broadcast", name=None)])
    assert str(error) == (
        "ranks called different collectives\n"
        "  rank 0:  allreduce 'grad.fc1.weight'  float32 (3,)\n"
        "  rank 1:  barrier\n"
        "  rank 2:  broadcast  float32 (5,)\n"
        "Every rank must make the same collective calls in the same order."
    )


def test_different_names():
    error = mismatch([call((3,), name="a"), call((3,), name="b"), call((3,), name=None)])
    assert str(error) == (
        "allreduce: ranks gave different names\n"
        "  rank 0:  name='a'  float32 (3,)\n"
        "  rank 1:  name='b'  float32 (3,)\n"
        "  rank 2:  name=None  float32 (3,)\n" + REMEDY
    )


def test_a_rank_that_could_not_make_the_call():
    refused = Call.refused("allreduce", "x", ArgumentError("unknown operation 'median'"))
    error = mismatch([call((3,), name="x"), refused, call((3,), name="x")])
    assert str(error) == (
        "allreduce 'x': not every rank could make the call\n"
        "  ranks 0, 2:  ready\n"
        "  rank 1:      ArgumentError: unknown operation 'median'\n"
        "Mend the call on the ranks that show an error."
    )


def test_signatures():
    """Equal for equal calls, in every process; different for whatever may differ."""
    assert call((3,)).signature == call((3,)).signature
    assert Call("barrier", None, ()).signature == Call("barrier", None).signature
    others = [
        call((3,)),
        call((4,)),
        call((3,), dtype="int32"),
        call((3,), op="Max"),
        call((3,), name="other"),
        call((3,), name=None),
        call((3,), name="None"),
        call((3,), kind="broadcast"),
        Call.refused("allreduce", "grad.fc1.weight", ArgumentError("no")),
    ]
    assert len({each.signature for each in others}) == len(others)
    assert all(0 <= each.signature < 2**64 for each in others)


def test_the_signature_does_not_depend_on_the_process():
    """Python's own hash of a string does."""
    assert Call("barrier", None, (("algorithm", "auto"),)).signature == SIGNATURE_OF_BARRIER


SIGNATURE_OF_BARRIER = 15685026346225933080
