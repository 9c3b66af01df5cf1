#!/usr/bin/env python3
"""A cluster in a box: hosts made of network namespaces, on links of a given rate, and an mpirun command across them.

    launch/box.py --hosts 2 --rate 100mbit -- mpirun -n 2 python -m distconv.train --epochs 1
    launch/box.py --hosts 4 --rate 1gbit --delay 50us --json -- mpirun -n 8 python my_program.py
    launch/box.py --clean

Type the command as for one machine: what spreads its ranks evenly over the hosts is inserted, for MPICH and Open MPI.
A host has a hostname (h0, h1, ...), a loopback and eth0, through which it reaches the other hosts, by name, and nothing
else. Ranks of one host share memory; ranks of different hosts have TCP. Only the network is a cluster's: files and
cores stay those of the machine, and OMP_NUM_THREADS is 1 if it is not set.

At the end: seconds, exit code, and the bytes at each host's eth0 from the start of the command to its end; packet
headers are in them (up to 3 %), and the launcher's own traffic (some 20 kB a rank). The report goes to the error
output, with --json to the last line of the output. Exit code: that of the command, 128 + N if signal N ended it; 2 for
wrong usage; 1 if there can be no box. Needs Linux, root and iproute2.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

SELF = Path(__file__).resolve()
NAMESPACES = Path("/var/run/netns")  # where `ip netns` keeps the names
HOSTS_FILES = Path("/etc/netns")  # `ip netns exec NAME` shows HOSTS_FILES/NAME/hosts as /etc/hosts
MADE_BY_A_BOX = re.compile(r"dcbox-(\d+)-(h\d+|switch)")  # the number is the box's process id
PROCESS_NAME = "dcbox"  # by which a living box is known
MOST_HOSTS = 64
GRACE_SECONDS = 30  # from a request to stop, which distconv answers with a checkpoint, to the end by force
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# For the command, unless its environment has them already. The hosts share the cores: two ranks that each take all of
# them are ten times as slow. UCX, in MPICH, would see that the hosts are one machine, and send through its memory. Open
# MPI needs the rest, and to be told (below) not to bind the ranks of every host to the same first cores.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "UCX_TLS": "tcp,self",
    "UCX_NET_DEVICES": "eth0",
    "FI_PROVIDER": "tcp",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "tcp,sm,self",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
OPEN_MPI_PLACES = ["--map-by", "slot:oversubscribe", "--bind-to", "none"]


class BoxError(Exception):
    """One sentence for the user, and exit code 1."""


class StopRequest(BaseException):
    """A signal asked the box to stop."""


def main(argv: Sequence[str]) -> int:
    if "--enter" in argv[:2]:  # started by mpirun in place of ssh, or by run_command
        enter_host(*[word for word in argv if word not in ("-x", "--enter")])
    options, command = from_command_line(argv)
    for number in STOPPING:
        signal.signal(number, raise_stop_request)
    try:
        check_machine()
        Path("/proc/self/comm").write_text(PROCESS_NAME)
        remove_leftovers()
        return 0 if options.clean else run_box(options, command)
    except (BoxError, OSError) as error:
        print(f"box.py: {error}", file=sys.stderr)
        return 1
    except StopRequest as request:  # before the command was there to be stopped
        return 128 + int(request.args[0])


def raise_stop_request(number: int, frame: Any) -> NoReturn:
    raise StopRequest(number)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"box.py: {message} (box.py --help has examples)\n")


def from_command_line(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the box, and the command behind `--` as it was typed."""
    usage = "box.py [--hosts N] [--rate RATE] [--delay TIME] [--json] -- mpirun -n RANKS PROGRAM... | box.py --clean"
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="box.py", usage=usage, description=__doc__, formatter_class=layout, allow_abbrev=False)
    add = parser.add_argument
    add("--hosts", type=int, default=2, metavar="N", help=f"1 to {MOST_HOSTS} (default 2)")
    add("--rate", default="1gbit", help="each host sends and receives at it at once: 1mbit to 10gbit (default 1gbit)")
    add("--delay", default="0", metavar="TIME", help="one way, up to 1000ms (default 0); back and forth takes twice it")
    add("--json", action="store_true", help="report as one JSON object, the last line of the output")
    add("--clean", action="store_true", help="only remove what killed boxes have left, as each start of a box does")
    end = list(argv).index("--") if "--" in argv else len(argv)
    options, unknown = parser.parse_known_args(argv[:end])
    command = list(argv[end + 1 :])
    first = command[0] if command else ""
    ranks = count_ranks(command)

    if unknown:
        parser.error(
            f"{unknown[0]} is not a flag of the box: write the command behind --, as in -- mpirun -n 2 PROGRAM"
        )
    if not 1 <= options.hosts <= MOST_HOSTS:
        parser.error(f"--hosts {options.hosts}: give a number from 1 to {MOST_HOSTS}")
    if not 1e6 <= bits_per_second(options.rate) <= 10e9:
        parser.error(f"--rate {options.rate}: give a rate from 1mbit to 10gbit, such as 100mbit")
    if not re.fullmatch(r"0|\d{1,6}us|\d{1,3}ms|1000ms", options.delay):
        parser.error(f"--delay {options.delay}: give a time up to 1000ms, such as 50us or 1ms")
    if options.clean and command:
        parser.error("--clean runs no command: leave out the one or the other")
    if not options.clean and not command:
        parser.error("there is no command: write it last, as in -- mpirun -n 2 PROGRAM")
    if command and not re.fullmatch(r"mpi(run|exec)\b.*", Path(first).name):
        parser.error(f"the command starts with {first}: put mpirun -n RANKS before it, which spreads it over the hosts")
    if command and not ranks:
        parser.error(f"{first} without a number of ranks: write it first, as in {first} -n {options.hosts}")
    if command and ranks < options.hosts:
        parser.error(f"{ranks} ranks on {options.hosts} hosts: give every host one, or make fewer hosts")
    return options, command


def bits_per_second(rate: str) -> float:
    """0 for what is not a rate."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", rate)
    return float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2]] if match else 0


def count_ranks(command: Sequence[str]) -> int:
    """The sum over the parts of `mpirun -n A ... : -n B ...`; 0 where a part does not start with its number."""
    starts = [1, *(place + 1 for place, word in enumerate(command) if word == ":")]
    heads = [" ".join(command[start : start + 2]) for start in starts]
    counts = [re.fullmatch(r"-(?:n|np) ([1-9]\d{0,5})", head) for head in heads]
    return sum(int(count[1]) for count in counts if count) if all(counts) else 0


def check_machine() -> None:
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # where tc is, for any root's PATH
    missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if missing:
        raise BoxError(f"there is no {' and no '.join(missing)} here: install iproute2 (apt-get install iproute2)")
    if os.geteuid() != 0:
        raise BoxError("only root may make hosts and links: start it as root, with sudo for instance")


def ip(words: str, tool: str = "ip") -> str:
    """The output of an `ip` command (or `tc`). Raises BoxError where it fails."""
    result = subprocess.run([tool, *words.split()], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode:
        raise BoxError(f"`{tool} {words}` failed: {' '.join(result.stderr.split())}")
    return result.stdout


def make_network(box: str, hosts: int, rate: str, delay: str) -> None:
    """A switch, which is a bridge in a namespace of its own, and hosts, each on a link that is shaped at both ends."""
    switch = f"{box}-switch"
    ip(f"netns add {switch}")
    ip(f"-n {switch} link add name bridge type bridge mcast_snooping 0")
    ip(f"-n {switch} link set bridge addrgenmode none up")  # addrgenmode none: no chatter of IPv6 in the counts
    names = "127.0.0.1 localhost\n" + "".join(f"10.0.0.{host + 1} h{host}\n" for host in range(hosts))
    for host in range(hosts):
        name, port = f"{box}-h{host}", f"port{host}"
        (HOSTS_FILES / name).mkdir(parents=True)
        (HOSTS_FILES / name / "hosts").write_text(names)
        ip(f"netns add {name}")
        ip(f"-n {switch} link add name {port} type veth peer name eth0 netns {name}")
        ip(f"-n {switch} link set {port} master bridge")
        shape(name, "eth0", rate, delay)
        shape(switch, port, rate)
        for namespace, device in ((name, "lo"), (name, "eth0"), (switch, port)):
            ip(f"-n {namespace} link set {device} addrgenmode none up")
        ip(f"-n {name} address add 10.0.0.{host + 1}/24 dev eth0 noprefixroute")
        ip(f"-n {name} route add 10.0.0.0/24 dev eth0 congctl cubic")  # whatever this machine's default is


def shape(namespace: str, device: str, rate: str, delay: str = "0") -> None:
    """Let the device send at the rate, each packet no sooner than after the delay.

    A quarter of a millisecond's worth may go out at once, or four packets: less, and a late timer loses time; more, and
    short messages travel for nothing. Packets of half that size fit uncut; cutting larger ones takes most of a core.
    """
    at_once = max(6200, int(bits_per_second(rate) / 8 * 0.25e-3))
    waiting = max(1_000_000, int(bits_per_second(rate) / 8 * 50e-3))  # what does not fit is lost, and TCP slows down
    ip(f"-n {namespace} link set {device} gso_max_size {min(max(at_once // 2, 1514), 65536)}")
    place = "root"
    if delay != "0":
        try:
            ip(f"-n {namespace} qdisc add dev {device} root handle 1: netem delay {delay} limit 1000000", tool="tc")
        except BoxError as error:
            raise BoxError(f"--delay needs a kernel with netem (modprobe sch_netem), or drop it: {error}") from None
        place = "parent 1:1"
    ip(f"-n {namespace} qdisc add dev {device} {place} tbf rate {rate} burst {at_once} limit {waiting}", tool="tc")


def count_bytes(box: str, hosts: int) -> list[tuple[int, int]]:
    """What eth0 of each host has sent and received so far."""
    links = [json.loads(ip(f"-n {box}-h{host} -s -j link show dev eth0"))[0]["stats64"] for host in range(hosts)]
    return [(link["tx"]["bytes"], link["rx"]["bytes"]) for link in links]


def remove_leftovers() -> None:
    """Remove the boxes whose process is gone; one with this process's id is older, for this one has made none yet."""
    folders = [folder for folder in (NAMESPACES, HOSTS_FILES) if folder.is_dir()]
    matches = [MADE_BY_A_BOX.fullmatch(path.name) for folder in folders for path in folder.iterdir()]
    for pid in {int(match[1]) for match in matches if match}:
        try:
            alive = pid != os.getpid() and Path(f"/proc/{pid}/comm").read_text().strip() == PROCESS_NAME
        except OSError:
            alive = False
        if not alive:
            remove(f"dcbox-{pid}")


def remove(box: str) -> None:
    """End what runs in a box, then remove its namespaces; the links go with them. Another box may do so too."""
    names = [path.name for path in NAMESPACES.glob(f"{box}-*") if MADE_BY_A_BOX.fullmatch(path.name)]
    for name in names:
        with contextlib.suppress(BoxError):  # it is gone already
            for _ in range(100):  # what is being ended may start something before it ends
                alive = ip(f"netns pids {name}").split()
                for pid in alive:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                if not alive:
                    break
                time.sleep(0.02)
            ip(f"netns delete {name}")
    for folder in HOSTS_FILES.glob(f"{box}-*"):
        shutil.rmtree(folder, ignore_errors=True)
    left = [name for name in names if (NAMESPACES / name).exists()]
    if left:
        raise BoxError(f"{', '.join(left)} cannot be removed: end what uses it, then box.py --clean")


def enter_host(box: str, host: str, *command: str) -> NoReturn:
    """Become a shell command in a host, as ssh does: `box.py --enter BOX HOST COMMAND...`."""
    hostname_of_its_own = 0x04000000  # CLONE_NEWUTS; os.unshare is there from Python 3.12 on
    if ctypes.CDLL(None).unshare(hostname_of_its_own):
        sys.exit("box.py: no process may have a hostname of its own here: start the box outside of the container")
    socket.sethostname(host)
    os.execvp("ip", ["ip", "netns", "exec", f"{box}-{host}", "sh", "-c", " ".join(command)])


def spread(command: Sequence[str], box: str, hosts: int) -> list[str]:
    """The command with what makes mpirun start so many ranks on each host, through enter_host."""
    mpirun = shutil.which(command[0])
    if not mpirun:
        raise BoxError(f"there is no {command[0]} on the PATH: activate the environment that has it, or write its path")
    each, more = divmod(count_ranks(command), hosts)
    places = ",".join(f"h{host}:{each + (host < more)}" for host in range(hosts))
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, env=ENVIRONMENT | os.environ)
    if "Open MPI" not in version.stdout:
        return [mpirun, "-hosts", places, "-launcher", "ssh", "-launcher-exec", str(SELF), *command[1:]]
    if ":" in command:
        raise BoxError("Open MPI would put each part of a command with ':' on host 0: give one program, or use MPICH")
    agent = ["--prtemca", "plm_ssh_agent", f"{SELF} --enter {box}"]
    return [mpirun, "--host", places, *agent, *OPEN_MPI_PLACES, *command[1:]]


def run_command(box: str, command: Sequence[str]) -> int:
    """Run mpirun in host 0, where the other hosts can reach it; returns the exit code."""
    process = subprocess.Popen(
        [sys.executable, str(SELF), "--enter", box, "h0", "exec", shlex.join(command)],
        env={**ENVIRONMENT, **os.environ, "HYDRA_LAUNCHER_EXTRA_ARGS": f"--enter {box}"},
        stdin=subprocess.DEVNULL if os.isatty(0) else None,
        start_new_session=True,  # Ctrl-C reaches it once, from here
    )
    try:
        code = process.wait()
    except StopRequest as request:
        process.send_signal(request.args[0])
        try:
            code = process.wait(GRACE_SECONDS)
        except (StopRequest, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    return code if code >= 0 else 128 - code


def run_box(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Make the network, run the command on it, take the network down, report."""
    box = f"dcbox-{os.getpid()}"
    full_command = spread(command, box, options.hosts)
    try:
        make_network(box, options.hosts, options.rate, options.delay)
        before, start = count_bytes(box, options.hosts), time.monotonic()
        code = run_command(box, full_command)
        seconds, after = time.monotonic() - start, count_bytes(box, options.hosts)
    finally:
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
        remove(box)
    sent, received = ([new[way] - old[way] for new, old in zip(after, before, strict=True)] for way in (0, 1))
    if options.json:
        asked = {"hosts": options.hosts, "rate": options.rate, "delay": options.delay}
        found = {"seconds": round(seconds, 3), "exit_code": code, "bytes_sent": sent, "bytes_received": received}
        print(json.dumps(asked | found), flush=True)
    else:
        lines = [f"{options.hosts} hosts, {options.rate}, delay {options.delay}: {seconds:.2f} s, exit code {code}"]
        lines.append(f"{'host':<6}{'bytes sent':>16}{'bytes received':>16}")
        lines += [f"h{host:<5}{sent[host]:>16,}{received[host]:>16,}" for host in range(options.hosts)]
        print(*lines, sep="\n", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
