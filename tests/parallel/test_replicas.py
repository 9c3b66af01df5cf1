"""A bit that changes by itself is found before its state is saved, and the right rank is named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from distconv.comm.world import World
from distconv.errors import DistconvError, DivergedError, ReplicasDifferError
from distconv.run import agreement as replicas
from distconv.run import loop
from distconv.run.run import Run
from tests.parallel.test_training import SETTINGS, make_run, never

FLIPS = [(0, "value", 0, 30), (1, "m", 777, 0), (2, "v", 123_551, 22), (3, "value", 50_000, 1), (0, "v", 31_415, 31)]


def flip(run: Run, slot: str, index: int, bit: int) -> None:
    vector = run.parameters.vector if slot == "value" else run.replica.state[slot]
    vector.view(np.uint32)[index] ^= np.uint32(1 << bit)


@pytest.mark.parametrize(("number", "slot", "index", "bit"), FLIPS)
@pytest.mark.parametrize("step", [1, 2, 5])  # 5 is the last of an epoch
def test_a_rank_whose_bits_change_between_updates_is_named_within_two_steps(
    world: World, number: int, slot: str, index: int, bit: int, step: int
) -> None:
    run, odd = make_run(world, dataclasses.replace(SETTINGS, epochs=2)), number % world.size
    with pytest.raises(ReplicasDifferError, match=f"rank {odd} differs from before"):
        for record in loop.train(run, never):
            if isinstance(record, loop.StepRecord) and record.step == step and world.rank == odd:
                flip(run, slot, index, bit)
    assert run.step <= step + 2


@pytest.mark.parametrize(("number", "slot", "index", "bit"), FLIPS)
def test_a_bit_that_changes_while_an_epoch_is_evaluated_is_not_saved(
    world: World, monkeypatch: pytest.MonkeyPatch, number: int, slot: str, index: int, bit: int
) -> None:
    run, odd = make_run(world), number % world.size
    score = loop._score

    def flipping(run: Run, part: str) -> float:
        if world.rank == odd:
            flip(run, slot, index, bit)
        monkeypatch.setattr(loop, "_score", score)
        return score(run, part)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_score", flipping)
    with pytest.raises(ReplicasDifferError, match=f"rank {odd} differs from before"):
        assert not [record for record in loop.train(run, never) if isinstance(record, loop.EpochRecord)]


def odd_one(world: World, rank: int) -> str:
    if world.size == 2:
        return "none of the ranks 0 to 1 has the majority"
    return f"rank {rank} differs from {'the others' if rank == 0 else 'rank 0'}"


@pytest.mark.parametrize(("number", "slot", "index", "bit"), FLIPS)
def test_a_rank_whose_update_goes_wrong_is_found_by_all_in_the_next_step(
    world: World, monkeypatch: pytest.MonkeyPatch, number: int, slot: str, index: int, bit: int
) -> None:
    if world.size == 1:
        pytest.skip("one replica cannot differ from another")
    run, odd = make_run(world), number % world.size
    update = run.replica.update

    def wrong(step: int) -> bool:
        good = update(step)
        if step == 1 and world.rank == odd:
            flip(run, slot, index, bit)
        return good

    monkeypatch.setattr(run.replica, "update", wrong)
    with pytest.raises(ReplicasDifferError, match=odd_one(world, odd)):
        list(loop.train(run, never))
    assert run.step == 2


@pytest.mark.parametrize(("number", "slot", "index", "bit"), FLIPS)
def test_what_has_no_checksum_is_compared_before_it_is_saved(
    world: World, monkeypatch: pytest.MonkeyPatch, number: int, slot: str, index: int, bit: int
) -> None:
    if world.size == 1:
        pytest.skip("one replica cannot differ from another")
    run, odd = make_run(world), number % world.size
    monkeypatch.setattr(run.replica, "checksum", lambda: 0)  # as on a GPU
    wants = iter([False, False, False, world.rank == 0])
    with pytest.raises(ReplicasDifferError, match=odd_one(world, odd)):
        for record in loop.train(run, never, lambda: next(wants)):
            if isinstance(record, loop.StepRecord) and record.step == 2 and world.rank == odd:
                flip(run, slot, index, max(bit, 12))  # two updates may round a lower one away
    assert run.step == 4


def test_a_state_is_looked_at_when_any_rank_wants_to_save_it(world: World) -> None:
    run = make_run(world)
    wants = iter([False, world.rank == world.size - 1, False, False, False])
    steps = [record for record in loop.train(run, never, lambda: next(wants)) if isinstance(record, loop.StepRecord)]
    assert [step.agreed for step in steps] == [False, True, False, False, False]
    assert run.agreed_sha256 == run.digest()


def test_a_number_that_is_not_finite_is_never_agreed_on(world: World) -> None:
    run = make_run(world)
    run.replica.state["v"][4] = np.inf  # on all ranks alike
    with pytest.raises(DistconvError, match=r"after step 1, value/conv1\.W holds NaN"):
        list(loop.train(run, never, lambda: True))


def test_a_loss_far_above_the_first_ends_the_run_on_every_rank(world: World) -> None:
    run = make_run(world, dataclasses.replace(SETTINGS, epochs=6, lr=1.0))
    with pytest.raises(DivergedError, match="5 steps in a row had a loss") as caught:
        list(loop.train(run, never))
    assert run.step == caught.value.bad_from + 5 == run.good_until + 6
    assert len(set(world.comm.allgather(run.step))) == 1


def test_a_first_loss_that_is_small_by_luck_is_no_measure(world: World) -> None:
    run = make_run(world, dataclasses.replace(SETTINGS, epochs=2))
    run.first_loss = 1e-3  # ten classes that are guessed blindly give 2.3
    assert sum(isinstance(record, loop.EpochRecord) for record in loop.train(run, never)) == 2


def test_a_run_that_ends_far_above_its_first_loss_has_failed(world: World) -> None:
    run = make_run(world, dataclasses.replace(SETTINGS, lr=1.0))
    with pytest.raises(DivergedError, match="use a smaller --lr than 1"):
        list(loop.train(run, never))


@pytest.mark.parametrize(
    ("digests", "told"),
    [
        ("aab", "rank 2 differs from rank 0"),
        ("baaa", "rank 0 differs from the others"),
        ("bacaa", "ranks 0, 2 differ from the others"),
        ("ab", "none of the ranks 0 to 1 has the majority"),
        ("aabb", "none of the ranks 0 to 3 has the majority"),
    ],
)
def test_the_majority_is_right(digests: str, told: str) -> None:
    with pytest.raises(ReplicasDifferError, match=f"after step 7: {told}"):
        replicas.compare(7, digests, [False] * len(digests))


def test_who_says_that_its_bits_have_changed_is_believed() -> None:
    with pytest.raises(ReplicasDifferError, match="step 7: rank 1 differs from before"):
        replicas.compare(7, "aab", [False, True, False])
