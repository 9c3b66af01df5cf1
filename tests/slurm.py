"""A real Slurm of two nodes on this machine, in namespaces and a folder of its own: nothing of it outlives the test."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.jobs import ENVIRONMENT, ROOT

TOOLS = ("sbatch", "srun", "scontrol", "slurmctld", "slurmd", "munged", "unshare", "nsenter", "ip")
CONFIGURATION = """
ClusterName=box
SlurmctldHost=n0
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=10
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
TmpFS={folder}/tmp.%n
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=n[0-1] CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# Two hosts, each with its name, network and /dev/shm; files and cores are those of the machine. The first process
# is that of host n0: when its input ends, as it does with the tests, the kernel ends all that was started in there.
START = """
cd "$1" || exit
hostname n0
mount --bind hosts /etc/hosts
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
# --force, as pytest hides its folders from other users.
munged --force --key-file="$1/munge.key" --socket="$1/munge.socket" --pid-file="$1/munged.pid" \
    --seed-file="$1/munge.seed" --log-file="$1/munged.log" || exit
unshare --mount --uts --net sh -c '
    hostname n1
    mount -t tmpfs tmpfs /dev/shm
    ip link set lo up
    ip link add eth0 type veth peer name eth0 netns 1
    ip addr add 10.0.0.2/24 dev eth0
    ip link set eth0 up
    nsenter --target 1 --net sh -c "ip addr add 10.0.0.1/24 dev eth0 && ip link set eth0 up"
    slurmd -f "$1/slurm.conf" -N n1' sh "$1"
slurmctld -c -f "$1/slurm.conf"
slurmd -f "$1/slurm.conf" -N n0
for _ in $(seq 25); do
    [ "$(timeout 2 sinfo -h -N -o %T | grep -c idle)" = 2 ] && echo ready && break
    sleep 0.2
done
exec >&-
read -r _
"""
NAMESPACES = ("unshare", "--mount", "--uts", "--pid", "--net", "--fork", "--kill-child", "--mount-proc")


def why_there_can_be_no_slurm() -> str:
    """A reason to skip; empty where there can be one."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs Linux and root"
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"needs {', '.join(missing)}: apt-get install slurm-wlm munge iproute2"
    result = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True)
    return f"namespaces are not permitted here: {result.stderr.strip()}" if result.returncode else ""


class Slurm:
    """Commands within the cluster."""

    def __init__(self, folder: Path, init: psutil.Process) -> None:
        self.folder, self.init = folder, init
        self.started: list[subprocess.Popen[str]] = []
        self.environment = {**ENVIRONMENT, "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] = (
            f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as in an activated environment
        )
        del self.environment["PRTE_MCA_rmaps_default_mapping_policy"]  # with it, Open MPI puts all ranks on one node

    def command(self, *arguments: str | Path) -> list[str]:
        inside = ["nsenter", "--target", str(self.init.pid), "--mount", "--uts", "--pid", "--net"]
        return [*inside, "--wdns=" + str(ROOT), *map(str, arguments)]

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            self.command(*arguments),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str | Path, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            for started in [*psutil.Process(process.pid).children(recursive=True), process]:
                started.kill()
            out, err = process.communicate()
            raise AssertionError(f"still running after {seconds} s: {arguments}\n{out}\n{err}\n{self.logs()}") from None
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def submit(self, script: Path | str, *flags: str) -> str:
        """sbatch a file, or the text of a script; returns the number of the job."""
        if isinstance(script, str):
            script, text = self.folder / "job.sh", script
            script.write_text(f"#!/bin/bash\n{text}\n")
        result = self.run("sbatch", "--parsable", *flags, script)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, ExitCode, Restarts and so on."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, seconds: float = 60) -> dict[str, str]:
        """Wait until the job is in one of these states, by default at its end; returns what Slurm knows of it."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_until(lambda: self.job(number)["JobState"] in wanted, seconds)
        return self.job(number)

    def go_on(self, number: str) -> None:
        """Start a job that was put back: by itself, Slurm lets it wait for two minutes."""
        # A step takes its sockets away when it ends, which have the same names as those of the next try.
        self.wait_until(lambda: not self.processes("slurmstepd", f"[{number}."))
        # And a node refuses to start again a job that has ended in the same second.
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now+2")
        self.wait(number, "RUNNING")

    def wait_until(self, happened: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, f"did not happen within {seconds} s\n{self.logs()}"
            time.sleep(0.1)  # between looks at Slurm or a file; no event tells of them

    def processes(self, *parts: str) -> list[psutil.Process]:
        """Those within the cluster whose command line holds all these parts."""
        found = []
        for process in self.init.children(recursive=True):
            try:
                line = process.cmdline()
            except psutil.NoSuchProcess:
                continue
            if all(part in " ".join(line) for part in parts):
                found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        return [process for process in self.processes("distconv.train") if process.name().startswith("python")]

    def logs(self) -> str:
        """What the daemons and the jobs have said, for a message of a test that failed."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """The daemons, from here to the end of the block."""
    for name in ("state", "spool.n0", "spool.n1", "tmp.n0", "tmp.n1"):
        (folder / name).mkdir()
    folder.chmod(0o755)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
    (folder / "hosts").write_text("127.0.0.1 localhost\n10.0.0.1 n0\n10.0.0.2 n1\n")
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    with subprocess.Popen(
        [*NAMESPACES, "bash", "-c", START, "bash", folder],
        env={**ENVIRONMENT, "SLURM_CONF": str(folder / "slurm.conf")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        cluster = None
        try:
            assert process.stdout and process.stdout.readline() == "ready\n"
            (init,) = psutil.Process(process.pid).children()
            yield (cluster := Slurm(folder, init))
        finally:
            process.kill()
            for started in cluster.started if cluster else ():
                started.communicate()  # their end, as the kernel ends all processes of the cluster


def edit(script: Path, *places: str | None) -> str:
    """A script of launch/ with new text at the two places that users edit, from a line with EDIT to an empty one.

    None keeps what is there.
    """
    text = script.read_text()
    found = re.findall(r"^( *)(# EDIT \d of 2: .*?\n)(?=\n)", text, flags=re.DOTALL | re.MULTILINE)
    assert len(found) == 2, f"{script} has {len(found)} places to edit"
    for (indent, old), new in zip(found, places, strict=True):
        if new is not None:
            text = text.replace(old, f"{new}\n".replace("\n", f"\n{indent}"))
    return text


def events(out: Path, name: str) -> list[dict[str, object]]:
    """Of a run's metrics.jsonl, those with this name."""
    lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    return [record for line in lines if (record := json.loads(line))["event"] == name]
