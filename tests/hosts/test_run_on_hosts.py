"""``hvdkit.run`` over several hosts, from a script on one of them."""

import json
import sys
import textwrap

import pytest

SCRIPT = """
    import json, os, sys
    import hvdkit as hvd

    def where(offset):
        hvd.init()
        total = float(hvd.allreduce(offset + hvd.rank(), op=hvd.Sum))
        return os.uname().nodename, hvd.rank(), hvd.local_rank(), total

    def fail():
        hvd.init()
        hvd.barrier()
        if hvd.rank() == 2:
            raise OverflowError("the loss of rank 2")
        hvd.barrier()

    if __name__ == "__main__":
        options = json.loads(sys.argv[1])
        print(hvd.run(where, (10,), np=3, hosts="alpha:2,beta:1", **options))
        try:
            hvd.run(fail, np=3, hosts="alpha:2,beta:1", **options)
        except hvd.JobError as exc:
            print(f"rank {exc.rank} raised: {exc}")
"""


@pytest.mark.parametrize("transport", ["mpi", "tcp"])
def test_results_and_errors(hosts, tmp_path, transport):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    options = {"use_tcp": True} if transport == "tcp" else {}
    ended = hosts.run(
        "alpha",
        [sys.executable, str(script), json.dumps(options)],
        timeout=90,
        environment={"HVDKIT_RSH": hosts.ssh, "PRTE_MCA_plm_ssh_agent": hosts.ssh}
        | {"HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXEC": hosts.ssh},
    )
    assert ended.status == 0, ended.stderr
    places = [("alpha", 0, 0, 33.0), ("alpha", 1, 1, 33.0), ("beta", 2, 0, 33.0)]
    said = [line for line in ended.stdout.splitlines() if "UCX" not in line]  # which may warn
    assert said[0] == str(places), ended.stderr
    assert "rank 2 raised: " in ended.stdout
    assert "OverflowError: the loss of rank 2" in ended.stdout
