"""What the facts of all ranks mean: each check reads them and says what it found and, where that is bad, what to do.

Pure functions, so that every fault can be shown without the cluster that has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from distconv.checkup.facts import SAME_EVERYWHERE, Facts
from distconv.formatting import plural

MIB = 1 << 20
LEAST_SHARED = 8 * MIB  # the exchange of DeepConvNet takes half a MiB a rank
LEAST_DISK = 1024 * MIB
MOST_SKEW = 1.0  # seconds between clocks


@dataclass(frozen=True)
class Finding:
    """What a check found. status: ok; slow, where a run works but not as well as it could; or fault."""

    check: str
    status: str
    found: str
    advice: str = ""


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def where(facts: Iterable[Facts]) -> str:
    """rank 1 on h0, rank 2 on h1"""
    places = [f"rank {fact['rank']} on {fact['host']}" for fact in facts]
    return ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")


def launcher(ranks: Sequence[Facts]) -> Finding:
    names = {"pmi": "an mpirun or srun that speaks PMI", "prrte": "Open MPI's mpirun", "none": "no launcher"}
    name = ranks[0]["launcher"]
    hosts = Counter(fact["host"] for fact in ranks)
    spread = ", ".join(f"{count} on {host}" for host, count in list(hosts.items())[:8])
    return ok("launcher", f"{names.get(name, name)}; ranks: {spread}{', ...' if len(hosts) > 8 else ''}")


def versions(ranks: Sequence[Facts]) -> Finding:
    """All ranks compute with the same programs."""
    differing, odd = [], {}
    for name in SAME_EVERYWHERE:
        usual = Counter(str(fact[name]) for fact in ranks).most_common(1)[0][0]
        for fact in ranks:
            if fact[name] != usual:
                differing.append(f"{name} {fact[name]} on rank {fact['rank']} ({fact['host']}), {usual} elsewhere")
                odd[fact["rank"]] = fact
    if differing:
        more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
        advice = (
            f"give all hosts the same environment; {where(odd.values())} run {next(iter(odd.values()))['executable']}"
        )
        return Finding("versions", "fault", "; ".join(differing[:4]) + more, advice)
    broken = [name for name in ("numpy", "numba") if "cannot be imported" in ranks[0][name]]
    if broken:
        return Finding(
            "versions", "fault", f"{broken[0]} {ranks[0][broken[0]]}", "install distconv again: pip install ."
        )
    fact = ranks[0]
    found = (
        f"distconv {fact['distconv']} ({fact['code']}), Python {fact['python']}, NumPy {fact['numpy']}, Numba "
        f"{fact['numba']}, mpi4py {fact['mpi4py']}, {fact['mpi']}, {fact['machine']}"
    )
    return ok("versions", found + (": the same on all ranks" if len(ranks) > 1 else ""))


def host_names(ranks: Sequence[Facts]) -> Finding:
    bad = [fact for fact in ranks if not fact["name_resolves"]]
    if bad:
        return Finding(
            "host names",
            "fault",
            f"no address for the host's own name: {where(bad)}",
            "put the name into /etc/hosts or the name service: launchers hand it to the other hosts",
        )
    return ok("host names", "every host finds its own address")


def cores(ranks: Sequence[Facts]) -> Finding:
    """The ranks of a host and their threads have cores to run on."""
    notes = []
    for host, mine in _by_host(ranks).items():
        usable = {core for fact in mine for core in fact["cores"]}
        count, threads = len(usable), sum(fact["blas_threads"] for fact in mine)
        limit = mine[0]["core_limit"]
        if len(mine) > count and count < mine[0]["host_cores"]:
            return Finding(
                "cores",
                "slow",
                f"the {len(mine)} ranks of {host} may use {count} of its {mine[0]['host_cores']} cores",
                "bind each rank to cores of its own: srun --cpus-per-task, mpirun --bind-to none, or a larger request",
            )
        if limit is not None and limit < min(len(mine), count):
            return Finding(
                "cores",
                "slow",
                f"a limit of {limit:g} cores holds for the {len(mine)} ranks of {host}",
                "ask for more (docker run --cpus, resources in Kubernetes), or start fewer ranks",
            )
        if len(mine) > 1 and threads > count and threads > len(mine):
            return Finding(
                "cores",
                "slow",
                f"{threads} BLAS threads on {count} cores of {host}",
                f"set OMP_NUM_THREADS={max(1, count // len(mine))}",
            )
        more = ", more ranks than cores" if len(mine) > count else ""
        notes.append(f"{host}: {plural(len(mine), 'rank')} on {count} cores{more}")
    threads = ranks[0]["blas_threads"]
    limits = [fact["memory_limit"] for fact in ranks if fact["memory_limit"]]
    memory = f"; memory limited to {min(limits) / 2**30:.1f} GiB" if limits else ""
    shown = ", ".join(notes[:4]) + (", ..." if len(notes) > 4 else "")
    return ok("cores", f"{shown}; {plural(threads, 'BLAS thread')} a rank{memory}")


def shared_memory(ranks: Sequence[Facts]) -> Finding:
    tight = [fact for fact in ranks if fact["shared_memory"] is not None and fact["shared_memory"] < LEAST_SHARED]
    if tight and len(ranks) > 1:
        return Finding(
            "shared memory",
            "slow",
            f"/dev/shm has {tight[0]['shared_memory'] / MIB:.0f} MiB left: {where(tight)}",
            "give a container a larger one (docker run --shm-size 256m), or remove what dead jobs have left there",
        )
    refused = [fact for fact in ranks if fact["reading_refused"]]
    if refused:
        return Finding(
            "shared memory",
            "slow",
            f"process_vm_readv (CMA) is refused, so MPI copies messages within a host twice: {where(refused)}",
            "docker run --cap-add SYS_PTRACE allows it; distconv has told MPI to do without",
        )
    free = [fact["shared_memory"] for fact in ranks if fact["shared_memory"] is not None]
    return ok("shared memory", f"{min(free) / MIB:,.0f} MiB free in /dev/shm" if free else "no /dev/shm here")


def disks(ranks: Sequence[Facts]) -> Finding:
    """Rank 0 can write a run's folder, and every host its compiled kernels."""
    first = ranks[0]
    if first["folder_problem"]:
        found = f"rank 0 cannot write in {first['folder']}: {first['folder_problem']}"
        return Finding("disks", "slow", found, "give train an --out elsewhere, on a disk that all nodes see")
    if (first["folder_free"] or LEAST_DISK) < LEAST_DISK:
        found = f"{first['folder_free'] / MIB:.0f} MiB free in {first['folder']}"
        return Finding("disks", "slow", found, "remove something, or give train an --out elsewhere")
    unwritable = [fact for fact in ranks if fact["cache_problem"]]
    if unwritable:
        return Finding(
            "disks",
            "slow",
            f"the kernels' cache cannot be written ({unwritable[0]['cache_problem']}), so every start compiles them: "
            f"{where(unwritable)}",
            "set XDG_CACHE_HOME to a folder that can be written",
        )
    compiled = (
        "kernels are compiled" if all(f["compiled"] for f in ranks) else "kernels will be compiled at a first run"
    )
    return ok("disks", f"{(first['folder_free'] or 0) / 2**30:.1f} GiB free in {first['folder']}; {compiled}")


def gpus(ranks: Sequence[Facts]) -> Finding:
    """Every rank sees a GPU, or none does; the drivers are the same."""
    with_gpu = [fact for fact in ranks if fact["gpus"]]
    if not with_gpu:
        return ok("GPUs", f"none: {ranks[0]['gpu_problem'].partition(' (')[0] or 'CUDA finds none'}")
    without = [fact for fact in ranks if not fact["gpus"]]
    if without:
        found = f"no GPU for {where(without)} ({without[0]['gpu_problem']}), but for others: so all compute on the CPU"
        return Finding("GPUs", "fault", found, "request GPUs on every node, and load the same driver and CUDA extra")
    drivers = sorted({fact["driver"] for fact in ranks})
    if len(drivers) > 1:
        return Finding(
            "GPUs", "slow", f"drivers differ: {', '.join(drivers)}", "update the nodes with the older driver"
        )
    crowded = [host for host, mine in _by_host(ranks).items() if len(mine) > len(mine[0]["gpus"]) > 1]
    if crowded:
        found = f"more ranks than GPUs on {', '.join(crowded[:4])}"
        return Finding("GPUs", "slow", found, "start as many ranks on a host as it has GPUs")
    fact = ranks[0]
    found = f"{len(fact['gpus'])} x {fact['gpus'][0]} on {fact['host']}, {fact['driver']}, NCCL {fact['nccl']}"
    return ok("GPUs", f"{found}; CUDA-aware MPI: {fact['cuda_mpi']}")


def clocks(skews: Mapping[int, float], ranks: Sequence[Facts]) -> Finding:
    """skews: seconds by which the clock of each host, by its first rank, is ahead of rank 0's."""
    ahead = max(skews, key=lambda rank: abs(skews[rank]))
    if abs(skews[ahead]) > MOST_SKEW:
        return Finding(
            "clocks",
            "slow",
            f"the clock of {where([ranks[ahead]])} is {skews[ahead]:+.1f} s off rank 0's",
            "run a time service (chrony, ntpd): logs and file dates of the nodes do not fit together",
        )
    return ok("clocks", f"within {1e3 * abs(skews[ahead]):.1f} ms of rank 0's")


def no_time(check: str) -> Finding:
    advice = "try again when the hosts are idle; if it stays so, starts are slow: a shared file system, mostly"
    return Finding(check, "slow", "there was no time left for it, as gathering the facts took so long", advice)


def data(ranks: Sequence[Facts]) -> Finding:
    """Every host has MNIST if rank 0 has."""
    lacking = [fact for fact in ranks if not fact["mnist"]]
    if len(lacking) == len(ranks):
        return ok("data", "no MNIST here: training fetches it, or takes the built-in digits where there is no network")
    if lacking:
        advice = "distconv data fetch mnist, into a folder that all nodes see; DISTCONV_DATA_DIR names it"
        return Finding("data", "fault", f"no MNIST for {where(lacking)}, but for others", advice)
    return ok("data", f"MNIST is in {ranks[0]['mnist']}")


def _by_host(ranks: Sequence[Facts]) -> dict[str, list[Facts]]:
    hosts: dict[str, list[Facts]] = {}
    for fact in ranks:
        hosts.setdefault(fact["host"], []).append(fact)
    return hosts


CHECKS: tuple[Callable[[Sequence[Facts]], Finding], ...] = (
    launcher,
    versions,
    host_names,
    cores,
    shared_memory,
    disks,
    data,
    gpus,
)
