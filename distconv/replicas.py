"""Whether the replica of each rank is what it should be: unchanged since its last update, alike everywhere, and finite.

Memory and processors now and then change a bit by themselves. On one rank, that bit reaches all ranks within a step,
through the gradients, and no later comparison tells what the run would have been. So a state is saved only when all
ranks have agreed on it, and a run that has lost its agreement ends: its newest checkpoint is older than the fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NoReturn

from distconv.errors import DistconvError, ReplicasDifferError
from distconv.run import Run


def agree(run: Run) -> str:
    """Bring the run's own vectors up to date, and return the SHA-256 of the state that all ranks hold; collective.

    Raises ReplicasDifferError where they differ, DistconvError where a number is not finite; on all ranks alike.
    """
    run.world.at("agree")
    run.engine.pull(run)
    changed = run.changed or run.engine.checksum(run) != run.checksum
    found: list[tuple[str, bool]] = run.world.comm.allgather((run.digest(), changed))
    digests = [digest for digest, _ in found]
    compare(run.step, digests, [changed for _, changed in found])
    for slot, vector in {"value": run.parameters.vector, **run.optimizer.state}.items():
        if (bad := run.exchange.wire.first_bad(vector)) >= 0:
            failure = DistconvError(
                f"after step {run.step}, {slot}/{run.parameters.name_at(bad)} is not finite on any rank: use a smaller "
                f"--lr than {run.config.lr:g}; the last checkpoint is good"
            )
            failure.everywhere = True
            raise failure
    run.agreed = digests[0]
    return digests[0]


def compare(step: int, digests: Sequence[object], changed: Sequence[object]) -> None:
    """Raise ReplicasDifferError where a rank has another digest than the others, or says that its state has changed.

    digests: of each rank's state after so many steps; changed: whether it was another before an update than after the
    one before.
    """
    if ranks := [str(rank) for rank, has_changed in enumerate(changed) if has_changed]:
        who = f"rank {ranks[0]} differs" if len(ranks) == 1 else f"ranks {', '.join(ranks)} differ"
        what = "bits of the parameters or of the optimizer's state have changed between two updates"
        _refuse(f"step {step}: {who} from before: {what}")
    if len(set(digests)) > 1:
        _refuse(f"the replicas differ after step {step}: {odd_ones(digests)}")


def odd_ones(digests: Sequence[object]) -> str:
    """Which ranks differ from the majority, or that there is none."""
    commonest, count = Counter(digests).most_common(1)[0]
    odd = [str(rank) for rank, digest in enumerate(digests) if digest != commonest]
    if 2 * count > len(digests):
        return f"rank {odd[0]} differs from the others" if len(odd) == 1 else f"ranks {', '.join(odd)} differ"
    return f"none of the ranks 0 to {len(digests) - 1} has the majority on its side"


def _refuse(what: str) -> NoReturn:
    advice = "the same command goes on from the last good checkpoint; if it comes back, suspect the hardware"
    failure = ReplicasDifferError(f"{what}; {advice}")
    failure.everywhere = True
    raise failure
