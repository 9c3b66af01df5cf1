"""Whether the replica of each rank is what it should be: unchanged since its last update, alike everywhere, and finite.

Memory and processors now and then change a bit by themselves. On one rank, that bit reaches all ranks within a step,
through the gradients: then all hold the same wrong state, and to compare them shows nothing. So a state is saved only
when all ranks have agreed on it, and a run that has lost its agreement ends: its newest checkpoint is older than that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NoReturn

from distconv.comm.world import odd_ones, who_differ
from distconv.errors import DivergedError, ReplicasDifferError
from distconv.run.run import Run


def agree(run: Run) -> None:
    """Bring the run's own vectors up to date, and note the SHA-256 of the state that all ranks hold; collective.

    Raises ReplicasDifferError where they differ, DivergedError where a number is not finite; on all ranks alike.
    """
    run.world.at("agree")
    run.replica.pull()
    changed = run.corrupted or run.replica.checksum() != run.checksum
    found: list[tuple[str, bool]] = run.world.comm.allgather((run.digest(), changed))
    digests = [digest for digest, _ in found]
    compare(run.step, digests, [changed for _, changed in found])
    for slot, vector in run.vectors().items():
        if (bad := run.replica.exchange.wire.first_bad(vector)) >= 0:
            raise DivergedError(
                f"after step {run.step}, {slot}/{run.parameters.name_at(bad)} holds NaN or infinity, on all ranks "
                f"alike: use a smaller --lr than {run.config.lr:g}",
                bad_from=run.good_until + 1,
            ).on_all_ranks()
    run.agreed_sha256 = digests[0]


def compare(step: int, digests: Sequence[object], changed: Sequence[object]) -> None:
    """Raise ReplicasDifferError where a rank has another digest than the others, or says that its state has changed.

    digests: of each rank's state after so many steps; changed: whether it was another before an update than after the
    one before.
    """
    if ranks := [rank for rank, has_changed in enumerate(changed) if has_changed]:
        what = "bits of the parameters or of the optimizer's state have changed between two updates"
        _refuse(f"step {step}: {who_differ(ranks)} from before: {what}")
    if len(set(digests)) > 1:
        P, most = len(digests), Counter(digests).most_common(1)[0][1]
        who = odd_ones(digests) if 2 * most > P else f"none of the ranks 0 to {P - 1} has the majority"
        _refuse(f"the replicas differ after step {step}: {who}")


def _refuse(what: str) -> NoReturn:
    advice = (
        "the same command with this --out and --resume auto goes on from the last good checkpoint; if it comes back, "
        "suspect the hardware"
    )
    raise ReplicasDifferError(f"{what}; {advice}").on_all_ranks()
