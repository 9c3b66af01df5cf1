"""launch/: scripts are sound, have two places to edit, and know when to go on, when all is done, when to give up."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.conftest import HERE
from tests.jobs import ROOT
from tests.slurm import edit

LAUNCH = ROOT / "launch"
JOB = LAUNCH / "kubernetes-mpijob.yaml"
BATCH = {  # a script, and how it says "again": a command that it runs, or an exit code
    "slurm.sbatch": "scontrol requeue 7",
    "pbs.sh": "qsub pbs.sh",
    "lsf.sh": "75",
    "gridengine.sh": "99",
}
TRAINING = [*BATCH, "hosts.sh", "kubernetes-mpijob.yaml"]
SHELL = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / ".ci" / "run"])

# Stands for a training that, in its first try, gets nowhere, comes further, waits for USR1 to come further, or comes
# further and is done, and ends with a code. Later tries get nowhere.
TRAIN = """
import pathlib, signal, sys, time
what, code = sys.argv[1], int(sys.argv[2])
tries = pathlib.Path("tries")
tries.mkdir(exist_ok=True)
first = not any(tries.iterdir())
(tries / str(time.monotonic_ns())).touch()
checkpoints = pathlib.Path("run/checkpoints")
checkpoints.mkdir(parents=True, exist_ok=True)
if what == "stops":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    pathlib.Path("waits").touch()
    if signal.sigtimedwait([signal.SIGUSR1], 20) is None:
        sys.exit("nobody asked")
    time.sleep(0.2)  # a signal must not make the script forget this process
if what == "done":
    pathlib.Path("run/DONE").touch()
if what != "nowhere" and first:
    (checkpoints / "step-0000000001.safetensors").touch()
sys.exit(code)
"""


def tool(name: str, *arguments: str | Path, text: str | None = None) -> None:
    """Run a linter of this Python environment; it must be content."""
    command = [str(Path(sys.executable).parent / name), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, input=text)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_scripts_are_sound(path: Path) -> None:
    tool("shellcheck", "--exclude=SC1091", path)  # it does not find what is made by `python3 -m venv`


def container_script(job: str) -> str:
    """What the launcher's pod runs."""
    launcher = yaml.safe_load(job)["spec"]["mpiReplicaSpecs"]["Launcher"]
    (script,) = launcher["template"]["spec"]["containers"][0]["args"]
    return str(script)


def test_the_script_in_the_pod_is_sound() -> None:
    tool("shellcheck", "--shell=bash", "-", text=container_script(JOB.read_text()))


def closed(schema: object) -> object:
    """The schema with no properties but those that it names: so the API server prunes what is misspelt."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(part) for key, part in schema.items()}
    if "properties" in schema and "additionalProperties" not in schema:
        schema["additionalProperties"] = False
    return schema


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    """Of an MPIJob, by the definition that the operator installs in a cluster."""
    path = HERE.parent.parent / "shared/data/k8s/mpijob-crd.yaml.gz"
    if not path.is_file():
        pytest.skip(
            "the definition of an MPIJob is not at hand: shared/data/k8s/mpijob-crd.yaml.gz beside the checkout"
        )
    (version,) = yaml.safe_load(gzip.decompress(path.read_bytes()))["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"]["properties"] = {"name": {"type": "string"}}
    return Draft202012Validator(closed(schema))


@pytest.mark.parametrize("role", ["Launcher", "Worker"])
def test_its_pods_are_such_as_kubernetes_takes(role: str) -> None:
    template = yaml.safe_load(JOB.read_text())["spec"]["mpiReplicaSpecs"][role]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template["spec"]}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    template["spec"]["containerz"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_the_mpijob_is_one_that_the_operator_understands(validator: Draft202012Validator) -> None:
    job = yaml.safe_load(JOB.read_text())
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(job)] == []
    job["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    assert len(list(validator.iter_errors(job))) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "docker").glob("Dockerfile*")), ids=lambda path: path.name)
def test_dockerfiles_are_sound(path: Path) -> None:
    tool("hadolint", path)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a script with a stand-in for the training, and with stand-ins for what puts a job back into the queue."""
    (tmp_path / "train.py").write_text(TRAIN)
    for command in ("scontrol", "qsub"):
        (tmp_path / command).write_text('#!/bin/sh\necho "${0##*/} $*" > again\n')
        (tmp_path / command).chmod(0o755)
    jobs = {"SLURM_JOB_ID": "7", "PBS_JOBNAME": "pbs.sh", "PBS_O_WORKDIR": str(tmp_path)}
    environment = {**os.environ, **jobs, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    started: list[subprocess.Popen[str]] = []

    def start(name: str, what: str, code: int) -> subprocess.Popen[str]:
        command = f"out=run\nrun=({sys.executable} train.py {what} {code})"
        if name == JOB.name:
            script = container_script(edit(JOB, None, command))
        else:
            script = edit(LAUNCH / name, "seconds=60", command)
        started.append(subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=environment, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def ask_to_stop(folder: Path, process: subprocess.Popen[str], number: int) -> None:
    deadline = time.monotonic() + 20
    while not (folder / "waits").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)  # between looks at a file; no event tells of it
    process.send_signal(number)


def goes_on(name: str, folder: Path, code: int) -> bool:
    """Whether the script has put the job back into the queue."""
    if BATCH[name].isdigit():
        return code == int(BATCH[name])
    return (folder / "again").exists() and (folder / "again").read_text() == f"{BATCH[name]}\n"


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.mark.slow
@pytest.mark.parametrize("name", BATCH)
@pytest.mark.parametrize("code", [75, 0])  # an mpirun may lose the 75
def test_a_run_that_is_asked_to_stop_goes_on_later(name: str, code: int, start: Start, tmp_path: Path) -> None:
    process = start(name, "stops", code)
    ask_to_stop(tmp_path, process, signal.SIGUSR1)
    assert goes_on(name, tmp_path, process.wait(timeout=20))


@pytest.mark.parametrize("name", BATCH)
def test_a_run_that_came_further_before_an_accident_goes_on(name: str, start: Start, tmp_path: Path) -> None:
    assert goes_on(name, tmp_path, start(name, "further", 137).wait(timeout=20))


@pytest.mark.parametrize("name", [*BATCH, "hosts.sh"])
def test_a_run_that_gets_nowhere_is_not_repeated(name: str, start: Start, tmp_path: Path) -> None:
    assert start(name, "nowhere", 66).wait(timeout=20) == 66
    assert not (tmp_path / "again").exists() and len(list((tmp_path / "tries").iterdir())) == 1


@pytest.mark.parametrize("name", TRAINING)
def test_a_finished_run_is_not_repeated(name: str, start: Start, tmp_path: Path) -> None:
    assert start(name, "done", 1).wait(timeout=20) == 1  # as where the target accuracy is missed
    assert not (tmp_path / "again").exists() and len(list((tmp_path / "tries").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT, signal.SIGTERM])
def test_without_a_batch_system_a_stop_is_a_stop(number: signal.Signals, start: Start, tmp_path: Path) -> None:
    process = start("hosts.sh", "stops", 75)
    ask_to_stop(tmp_path, process, number)
    assert process.wait(timeout=20) == 75
    assert len(list((tmp_path / "tries").iterdir())) == 1


def test_without_a_batch_system_a_run_goes_on_by_itself_after_an_accident(start: Start, tmp_path: Path) -> None:
    assert start("hosts.sh", "further", 137).wait(timeout=20) == 137
    assert len(list((tmp_path / "tries").iterdir())) == 2  # the second one gets nowhere


@pytest.mark.slow
@pytest.mark.parametrize(("code", "number"), [(75, signal.SIGUSR1), (0, signal.SIGTERM)])
def test_a_pod_that_is_asked_to_stop_ends_so_that_it_is_started_again(
    code: int, number: signal.Signals, start: Start, tmp_path: Path
) -> None:
    process = start("kubernetes-mpijob.yaml", "stops", code)
    ask_to_stop(tmp_path, process, number)
    assert process.wait(timeout=20) == 75
