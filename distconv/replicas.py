"""Whether the replica of each rank is what it should be: unchanged since its last update, alike everywhere, and finite.

Memory and processors now and then change a bit by themselves. On one rank, that bit reaches all ranks within a step,
through the gradients, and no later comparison tells what the run would have been. So a state is saved only when all
ranks have agreed on it, and a run that has lost its agreement ends: its newest checkpoint is older than the fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from distconv.errors import DistconvError, ReplicasDifferError
from distconv.run import Run

STEPS = 50  # between looks at whether the ranks agree, where no checkpoint asks for one


def agree(run: Run) -> str:
    """Bring the run's own vectors up to date, and return the SHA-256 of the state that all ranks hold; collective.

    Raises ReplicasDifferError where they differ, DistconvError where a number is not finite; on all ranks alike.
    """
    run.world.at("agree")
    run.engine.pull(run)
    changed = run.changed or run.engine.checksum(run) != run.checksum
    found = run.world.comm.allgather((run.digest(), changed))
    if any(changed for _, changed in found):
        raise changed_by_themselves([rank for rank, (_, changed) in enumerate(found) if changed], run.step)
    digests = [digest for digest, _ in found]
    if len(set(digests)) > 1:
        raise _differ(f"the replicas differ after step {run.step}: {odd_ones(digests)}")
    for name, tensor in run.state().items():
        if not np.isfinite(tensor).all():
            failure = DistconvError(
                f"after step {run.step}, {name} is not finite on any rank: use a smaller --lr than {run.config.lr:g}; "
                "the last checkpoint is good"
            )
            failure.everywhere = True
            raise failure
    run.agreed = str(digests[0])
    return run.agreed


def changed_by_themselves(ranks: Sequence[int], step: int) -> ReplicasDifferError:
    """For ranks whose checksum was another before an update than after the one before."""
    who = f"rank {ranks[0]} differs" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} differ"
    what = "bits of the parameters or of the optimizer's state have changed between two updates"
    return _differ(f"step {step}: {who} from before: {what}")


def odd_ones(digests: Sequence[str]) -> str:
    """Which ranks differ from the majority, or that there is none."""
    commonest, count = Counter(digests).most_common(1)[0]
    odd = [str(rank) for rank, digest in enumerate(digests) if digest != commonest]
    if 2 * count > len(digests):
        return f"rank {odd[0]} differs from the others" if len(odd) == 1 else f"ranks {', '.join(odd)} differ"
    return f"none of the ranks 0 to {len(digests) - 1} has the majority on its side"


def _differ(what: str) -> ReplicasDifferError:
    advice = "the same command goes on from the last good checkpoint; if it comes back, suspect the hardware"
    failure = ReplicasDifferError(f"{what}; {advice}")
    failure.everywhere = True
    return failure
