"""launch/box.py: hosts that are hosts to MPI, a network of the rate that was asked for, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.jobs import ENVIRONMENT, MPIRUN, ROOT

BOX = ROOT / "launch" / "box.py"
NAMESPACES = Path("/var/run/netns")
EXAMPLE = """
import socket
from mpi4py import MPI
from distconv.comm.start import start
with start() as world:
    mine = (socket.gethostname(), world.comm.Split_type(MPI.COMM_TYPE_SHARED).size, world.local_size, world.hosts)
    everyone = world.comm.gather(mine)
    if world.rank == 0:
        print(everyone)
"""
TRANSFER = """
import sys, time
from mpi4py import MPI
comm, data = MPI.COMM_WORLD, bytearray(int(sys.argv[1]))
comm.Barrier()
start = time.monotonic()
if comm.rank == 0:
    comm.Send(data, 1)
else:
    comm.Recv(data, 0)
    print(time.monotonic() - start, flush=True)
"""


def why_there_can_be_no_box() -> str:
    """A reason to skip, found without the box; empty where there can be one."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs Linux and root"
    if missing := [tool for tool in ("ip", "tc", "unshare") if not shutil.which(tool)]:
        return f"needs {' and '.join(missing)}"
    links = "ip link add name b0 type bridge && ip link add name v0 type veth && tc qdisc add dev v0 root tbf"
    try_it = ["unshare", "--net", "--uts", "--mount", "sh", "-c", f"{links} rate 1mbit burst 9k limit 9k"]
    result = subprocess.run(try_it, capture_output=True, text=True)
    return f"namespaces and links are not permitted here: {result.stderr.strip()}" if result.returncode else ""


REASON = why_there_can_be_no_box()
needs_a_box = pytest.mark.skipif(bool(REASON), reason=REASON)


def start_box(*arguments: str | Path | int) -> subprocess.Popen[str]:
    command = [sys.executable, str(BOX), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


def run_box(*arguments: str | Path | int) -> subprocess.CompletedProcess[str]:
    process = start_box(*arguments)
    try:
        out, err = process.communicate(timeout=30)
    finally:
        process.terminate()  # the box takes its network down, also when the test has failed
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_python(code: str, ranks: int, *flags: str | int, argument: int = 0) -> tuple[str, dict[str, object]]:
    """Run code on hosts; returns what it printed, and the report."""
    result = run_box("--json", *flags, "--", MPIRUN, "-n", ranks, sys.executable, "-c", code, argument)
    assert result.returncode == 0, result.stdout + result.stderr
    out, report = result.stdout.rstrip().rsplit("\n", 1)
    return out, json.loads(report)


def namespaces(pid: int) -> list[Path]:
    return [path for folder in (NAMESPACES, Path("/etc/netns")) for path in folder.glob(f"dcbox-{pid}-*")]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A box whose two ranks have written a file and sleep, and the processes in it: mpirun, proxies, ranks."""
    code = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], str(os.getpid())).touch(); time.sleep(60)"
    box = start_box("--json", "--", MPIRUN, "-n", 2, sys.executable, "-c", code, tmp_path)
    try:
        deadline = time.monotonic() + 15
        while len(list(tmp_path.iterdir())) < 2:
            assert box.poll() is None, f"ended before: {box.communicate()}"
            assert time.monotonic() < deadline, f"no ranks yet, but {psutil.Process(box.pid).children(recursive=True)}"
            time.sleep(0.02)
        yield box, psutil.Process(box.pid).children(recursive=True)
    finally:
        box.terminate()
        box.wait(timeout=20)
        with box:
            assert not namespaces(box.pid) or run_box("--clean").returncode == 0


def assert_nothing_is_left(box: subprocess.Popen[str], processes: list[psutil.Process]) -> None:
    assert len(processes) >= 5  # mpirun, two proxies, two ranks
    assert namespaces(box.pid) == []
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


@needs_a_box
def test_hosts_have_names_and_share_no_memory_and_their_ranks_do() -> None:
    out, report = run_python(EXAMPLE, 3, "--hosts", 2)
    assert out == "[('h0', 2, 2, 2), ('h0', 2, 2, 2), ('h1', 1, 1, 2)]"
    assert (report["hosts"], report["rate"], report["delay"], report["exit_code"]) == (2, "1gbit", "0", 0)


@pytest.mark.slow
@needs_a_box
def test_a_transfer_takes_its_time_and_is_counted_where_it_leaves_and_where_it_arrives() -> None:
    out, report = run_python(TRANSFER, 2, "--rate", "100mbit", argument=8_000_000)
    assert float(out) > 0.6  # 0.67 on the wire; a busy machine makes it more
    assert report["bytes_sent"][0] == pytest.approx(8_000_000, rel=0.05)  # type: ignore[index]
    assert report["bytes_received"][1] == pytest.approx(8_000_000, rel=0.05)  # type: ignore[index]
    assert report["bytes_sent"][1] < 800_000  # type: ignore[index]


@needs_a_box
def test_the_exit_code_is_that_of_the_command_and_the_report_goes_to_the_error_output() -> None:
    result = run_box("--", MPIRUN, "-n", 2, sys.executable, "-c", "raise SystemExit(3)")
    assert result.returncode == 3
    assert result.stdout == "" and "exit code 3" in result.stderr
    assert [line.split()[0] for line in result.stderr.splitlines()[-2:]] == ["h0", "h1"]


@pytest.mark.slow
@needs_a_box
def test_a_command_that_is_killed_leaves_nothing(running: tuple[subprocess.Popen[str], list[psutil.Process]]) -> None:
    box, processes = running
    (mpirun,) = psutil.Process(box.pid).children()
    mpirun.kill()
    out, _ = box.communicate(timeout=15)
    assert box.returncode == 137 and json.loads(out.splitlines()[-1])["exit_code"] == 137
    assert_nothing_is_left(box, processes)


@pytest.mark.slow
@needs_a_box
def test_a_box_that_is_stopped_leaves_nothing(running: tuple[subprocess.Popen[str], list[psutil.Process]]) -> None:
    box, processes = running
    box.send_signal(signal.SIGTERM)
    out, _ = box.communicate(timeout=15)
    assert box.returncode == json.loads(out.splitlines()[-1])["exit_code"] != 0
    assert_nothing_is_left(box, processes)


@pytest.mark.slow
@needs_a_box
def test_what_a_killed_box_left_is_removed_and_what_no_box_made_stays(
    running: tuple[subprocess.Popen[str], list[psutil.Process]],
) -> None:
    box, processes = running
    others = [f"dcbox-{box.pid}-mine", f"mydcbox-{box.pid}-h0"]
    try:
        for other in others:
            subprocess.run(["ip", "netns", "add", other], check=True)
        box.kill()
        box.wait()
        assert len(namespaces(box.pid)) == 6 and all(process.is_running() for process in processes)
        assert run_box("--clean").returncode == 0
        assert [path.name for path in namespaces(box.pid)] == others[:1]
        assert (NAMESPACES / others[1]).exists()
    finally:
        for other in others:
            subprocess.run(["ip", "netns", "delete", other], check=False)
    assert_nothing_is_left(box, processes)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("", "no command"),
        ("mpirun -n 2 true", "mpirun is not a flag"),
        ("--hosts 0 -- mpirun -n 2 true", "--hosts 0"),
        ("--rate 100gbit -- mpirun -n 2 true", "to 10gbit"),
        ("-- mpirun -n 2 true : true", "number of ranks"),
        ("--hosts 3 -- mpirun -n 2 true", "2 ranks on 3 hosts"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(arguments: str, part: str) -> None:
    result = run_box(*arguments.split())
    (line,) = result.stderr.splitlines()
    assert (result.returncode, result.stdout) == (2, "") and line.startswith("box.py: ") and part in line
