"""What deploy/ has for clusters: files that fit each other, this package and the MPI Operator."""

import re
import shutil
import subprocess

import pytest

from .helpers import REPOSITORY

DEPLOY = REPOSITORY / "deploy"

#: The fields of an MPIJob, kubeflow.org/v2beta1, that the operator knows: of MPIJobSpec, RunPolicy
#: and ReplicaSpec.  (The API server drops others without a word.)
SPEC = {
    "launcherCreationPolicy",
    "mpiImplementation",
    "mpiReplicaSpecs",
    "runLauncherAsWorker",
    "runPolicy",
    "slotsPerWorker",
    "sshAuthMountPath",
}
RUN_POLICY = {
    "activeDeadlineSeconds",
    "backoffLimit",
    "cleanPodPolicy",
    "managedBy",
    "schedulingPolicy",
    "suspend",
    "ttlSecondsAfterFinished",
}
REPLICA = {"replicas", "restartPolicy", "template"}


@pytest.fixture(scope="module")
def job():
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((DEPLOY / "mpijob.yaml").read_text())


@pytest.fixture(scope="module")
def dockerfile():
    """The instructions of the Dockerfile, as (name, rest)."""
    text = (DEPLOY / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines()]


def pod(job, role):
    return job["spec"]["mpiReplicaSpecs"][role]["template"]["spec"]


def container(job, role):
    (only,) = pod(job, role)["containers"]
    return only


def settings(name):
    """Return the settings of an ssh configuration."""
    lines = [line.split("#")[0].split() for line in (DEPLOY / name).read_text().splitlines()]
    return {line[0]: line[1] for line in lines if line and line[0] != "Host"}


def test_the_operator_knows_every_field(job):
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    spec = job["spec"]
    assert spec.keys() <= SPEC
    assert spec["mpiImplementation"] in ("OpenMPI", "Intel", "MPICH")
    assert spec["launcherCreationPolicy"] in ("AtStartup", "WaitForWorkersReady")
    assert spec["runPolicy"].keys() <= RUN_POLICY
    assert spec["runPolicy"]["cleanPodPolicy"] in ("None", "Running", "All")
    assert spec["mpiReplicaSpecs"].keys() == {"Launcher", "Worker"}
    for replicas in spec["mpiReplicaSpecs"].values():
        assert replicas.keys() <= REPLICA
        assert replicas["restartPolicy"] in ("Never", "OnFailure")
    assert spec["mpiReplicaSpecs"]["Launcher"]["replicas"] == 1


def test_there_are_as_many_ranks_as_slots(job):
    args = container(job, "Launcher")["args"]
    slots = job["spec"]["slotsPerWorker"] * job["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"]
    assert int(args[args.index("-n") + 1]) == slots


def test_nobody_is_root(job, dockerfile):
    (user,) = (rest for name, rest in dockerfile if name == "USER")
    for role in ("Launcher", "Worker"):
        context = container(job, role)["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert str(context["runAsUser"]) == user
    created = next(rest for _, rest in dockerfile if "useradd" in rest)
    assert f"--uid {user} " in created


def test_shared_memory_is_more_than_a_containers_own(job):
    (mount,) = container(job, "Worker")["volumeMounts"]
    (volume,) = pod(job, "Worker")["volumes"]
    assert (mount["mountPath"], mount["name"]) == ("/dev/shm", volume["name"])
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}


def test_ssh_and_sshd_agree_with_the_job(job, dockerfile):
    home = job["spec"]["sshAuthMountPath"]
    client, server = settings("ssh_config"), settings("sshd_config")
    probe = container(job, "Worker")["readinessProbe"]["tcpSocket"]["port"]
    assert client["Port"] == server["Port"] == str(probe)
    assert server["HostKey"] == f"{home}/id_rsa"
    assert server["AuthorizedKeysFile"] == f"{home}/authorized_keys"
    used = container(job, "Worker")["args"]
    copied = [rest.split()[-1] for name, rest in dockerfile if name == "COPY"]
    assert used[used.index("-f") + 1] in copied


def test_sshd_takes_its_configuration(tmp_path):
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    if sshd is None or shutil.which("ssh-keygen") is None:
        pytest.skip("there is no sshd, or no ssh-keygen")
    key = tmp_path / "id_rsa"
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", str(key)], check=True)
    text = (DEPLOY / "sshd_config").read_text().replace("/home/mpiuser/.ssh", str(tmp_path))
    (tmp_path / "config").write_text(text)
    done = subprocess.run(
        [sshd, "-t", "-f", str(tmp_path / "config")], capture_output=True, text=True, check=False
    )
    if "privilege separation" in done.stderr.lower():
        pytest.skip("this sshd was never started as root")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_image_has_what_the_job_runs(job, dockerfile):
    python, script = container(job, "Launcher")["args"][-5], container(job, "Launcher")["args"][-3]
    environments = [rest.split()[-1] for _, rest in dockerfile if "-m venv" in rest]
    assert python == f"{environments[0]}/bin/python"
    assert (REPOSITORY / script).exists()
    assert ("COPY", "examples /home/mpiuser/examples") in dockerfile
    assert ("WORKDIR", "/home/mpiuser") in dockerfile


def test_what_the_image_copies_is_there(dockerfile):
    assert dockerfile[0][0] == "FROM"
    known = {"FROM", "ARG", "ENV", "RUN", "COPY", "USER", "WORKDIR"}
    assert {name for name, _ in dockerfile} <= known
    for name, rest in dockerfile:
        if name == "COPY":
            *sources, _ = rest.split()
            for source in sources:
                assert (REPOSITORY / source).exists(), source


def test_the_extras_that_the_image_installs_are_there(dockerfile):
    text = (REPOSITORY / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = {line.split(" =")[0] for line in section.splitlines() if "=" in line}
    (wanted,) = (
        match[1] for _, rest in dockerfile if (match := re.search(r"/opt/hvdkit\[(.*?)\]", rest))
    )
    assert set(wanted.split(",")) <= extras


def test_the_batch_script_is_a_script():
    text = (DEPLOY / "train.sbatch").read_text()
    assert text.startswith("#!/bin/bash\n")
    assert subprocess.run(["bash", "-n", DEPLOY / "train.sbatch"], check=False).returncode == 0
    options = re.findall(r"^#SBATCH (--\S+)=", text, re.MULTILINE)
    assert {"--nodes", "--ntasks-per-node", "--time"} <= set(options)
