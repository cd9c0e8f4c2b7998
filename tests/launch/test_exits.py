"""A SystemExit that a script raises by itself, not by sys.exit: its status ends the job as well."""

import pytest

from .helpers import python, under_mpirun

#: One rank without a job: what would end the others is printed.
ALONE = """
import atexit
import sys
from types import SimpleNamespace
from hvdkit.endings import LastWords

here = SimpleNamespace(rank=1, size=2)
flush = sys.stderr.flush
words = LastWords(SimpleNamespace(topology=here, abort=lambda status: print("aborts", status)))
words.install()

def leave():
    words.at_exit()
    words.remove()
    assert sys.stderr.flush == flush

atexit.register(leave)
never_raised = SystemExit(9)
try:
    raise SystemExit(7)
except SystemExit as exc:
    caught = exc

def end(how):
    if how != "well":
        raise SystemExit(eval(how))

end(sys.argv[1])
"""

JOB = """
import time
import hvdkit as hvd

hvd.init()
hvd.barrier()
if hvd.rank() == 1:
    raise SystemExit({status})
time.sleep({seconds})
raise SystemExit(0)
"""


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        ("3", 3, "aborts 3\n"),
        ("'a message'", 1, "aborts 1\n"),
        ("0", 0, ""),
        ("None", 0, ""),
        ("well", 0, ""),
    ],
)
def test_the_status_of_a_script_is_known_before_it_ends(tmp_path, how, status, said):
    script = tmp_path / "script.py"
    script.write_text(ALONE)
    outcome = python(str(script), how)
    assert (outcome.status, outcome.stdout) == (status, said), outcome.stderr
    line = f"hvdkit: rank 1 of 2 exits with status {status}; ending the job\n"
    assert (line in outcome.stderr) == bool(status)


def test_it_ends_the_job_though_the_others_make_no_call(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(JOB.format(status=3, seconds=600))
    outcome = under_mpirun(2, str(script), timeout=60)
    assert outcome.status != 0
    assert "hvdkit: rank 1 of 2 exits with status 3; ending the job" in outcome.stderr


def test_with_status_0_the_job_ends_well(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(JOB.format(status=0, seconds=0))
    outcome = under_mpirun(2, str(script), timeout=60)
    assert outcome.status == 0, outcome.stderr


def test_nobodys_objects_are_asked_what_they_are(tmp_path):
    """Some answer with a warning, such as torch.distributed's deprecated ones."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "import hvdkit as hvd\n"
        "class Touchy:\n"
        "    def __init__(self):\n"
        "        self.kept = []\n"
        "    @property\n"
        "    def __class__(self):\n"
        "        os.write(2, b'asked')\n"
        "        return Touchy\n"
        "touchy = Touchy()\n"
        "hvd.init()\n"
    )
    outcome = under_mpirun(2, str(script), timeout=60)
    assert outcome.status == 0, outcome.stderr
    assert "asked" not in outcome.stderr
