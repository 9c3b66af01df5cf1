"""What distconv.launch decides, with a stand-in for mpirun: accidents are mended, mistakes are not repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distconv.supervise.supervisor import last_record, useful_seconds
from tests import jobs
from tests.stand_in import lines, starts, supervise


@pytest.mark.parametrize("code", [2, 65, 66, 69, 73, 78])
def test_what_another_start_would_not_mend_ends_at_once_with_its_code(out: Path, code: int) -> None:
    assert supervise(out, f"sys.exit({code})").finish(20).returncode == code
    assert starts(out) == 1


def test_a_stop_that_a_batch_system_asked_of_the_ranks_is_not_undone(out: Path) -> None:
    assert (
        supervise(out, "trains(3); note('metrics.jsonl', event='stop', step=3); sys.exit(75)").finish(20).returncode
        == 75
    )
    assert starts(out) == 1


@pytest.mark.parametrize("come_so_far", ["", "note('metrics.jsonl', event='start'); ", "trains(3); "])
def test_ranks_that_a_launcher_ends_as_one_of_them_failed_have_not_stopped_on_request(
    out: Path, come_so_far: str
) -> None:
    result = supervise(out, f"{come_so_far}sys.exit(75) | finishes()").finish(20)
    assert result.returncode == 0 and "exit code 143 (SIGTERM)" in result.stderr
    assert starts(out) == 2


@pytest.mark.parametrize("code", [0, 1])  # 1: the target accuracy is missed
def test_a_run_that_is_done_is_not_repeated(out: Path, code: int) -> None:
    assert supervise(out, f"finishes({code})").finish(20).returncode == code
    assert starts(out) == 1


def test_whatever_else_happens_to_a_job_it_is_started_again(out: Path) -> None:
    accidents = [
        *(f"sys.exit({code})" for code in (0, 1, 9, 70, 74, 76, 137, 255)),
        *(f"killed({number})" for number in (9, 11)),
        "fails('OSError: the disk is gone', 74)",
    ]
    play = " | ".join(f"saves({step}); {accident}" for step, accident in enumerate(accidents, 1))
    result = supervise(out, f"killed() | {play} | finishes()").finish(60)  # the first one before the first step
    assert result.returncode == 0 and starts(out) == len(accidents) + 2
    for part in ("exit code 0, but without DONE", "exit code 137 (SIGKILL)", "rank 1 on n1 failed: OSError: the disk"):
        assert part in result.stderr
    assert f"{len(accidents) + 1} restarts" in result.stderr.splitlines()[-1]


def test_two_is_a_signal_once_there_are_records(out: Path) -> None:
    result = supervise(out, "trains(3); sys.exit(2) | finishes()").finish(20)  # as MPICH tells of SIGINT
    assert result.returncode == 0 and "exit code 130 (SIGINT)" in result.stderr


def test_done_of_an_earlier_run_does_not_make_an_accident_a_success(out: Path) -> None:
    """As where a finished run was asked for more epochs."""
    result = supervise(out, "(out / 'DONE').touch(); saves(1); sys.exit(0) | finishes()").finish(20)
    assert result.returncode == 0 and starts(out) == 2


def test_the_same_error_at_the_same_step_is_not_tried_a_third_time(out: Path) -> None:
    result = supervise(
        out, "saves(1); trains(3); fails('ValueError: odd', 70) | trains(3); fails('ValueError: odd', 70)"
    )
    ended = result.finish(20)
    assert ended.returncode == 70 and starts(out) == 2
    for part in ("rank 1 on n1 failed: ValueError: odd", "twice in a row after step 3", str(out / "errors")):
        assert part in ended.stderr


@pytest.mark.parametrize("other", ["trains(4); fails('ValueError: odd')", "trains(3); fails('OSError: even')"])
def test_another_error_or_another_step_may_be_an_accident(out: Path, other: str) -> None:
    result = supervise(out, f"trains(3); fails('ValueError: odd') | {other} | finishes()").finish(20)
    assert result.returncode == 0 and starts(out) == 3


def test_a_report_of_an_earlier_start_proves_nothing(out: Path) -> None:
    result = supervise(out, "trains(3); fails('ValueError: odd') | trains(3); killed() | finishes()").finish(20)
    assert result.returncode == 0 and starts(out) == 3


@pytest.mark.parametrize(("before", "code"), [("", 1), ("", 0), ("note('metrics.jsonl', event='start'); ", 255)])
def test_a_mistake_before_the_first_step_is_not_tried_a_third_time(out: Path, before: str, code: int) -> None:
    """As in a user's model, in --mpirun, or where mpirun cannot write its output."""
    result = supervise(out, f"{before}sys.exit({code})").finish(20)
    assert result.returncode == (code or 1) and starts(out) == 2
    assert "twice in a row" in result.stderr


@pytest.mark.slow
def test_restarts_in_vain_are_counted_and_a_checkpoint_resets_them(out: Path) -> None:
    play = "trains(2); killed() | trains(2); killed() | saves(5); killed() | trains(5); killed()"
    result = supervise(out, play, "--restarts", "1").finish(20)
    assert result.returncode == 137 and starts(out) == 2
    assert "given up after 1 restarts in a row without a new checkpoint" in result.stderr
    result = supervise(out.with_name("other"), play, "--restarts", "2").finish(20)
    assert result.returncode == 137 and starts(out.with_name("other")) == 6
    history = [line.rpartition("restart ")[2] for line in result.stderr.splitlines() if "; restart" in line]
    assert history == [
        "1 from the beginning",
        "2 in 1 s from the beginning",
        "3 from step 5",
        "4 from step 5",
        "5 in 1 s from step 5",
    ]


def test_what_a_dead_job_has_left_is_gone_before_the_next_one_starts(out: Path) -> None:
    alive = "note('alive', it_is=psutil.pid_exists(json.loads((out / 'left').read_text())['pid']))"
    result = supervise(out, f"leaves(); killed() | import psutil; {alive}; finishes()").finish(20)
    assert result.returncode == 0 and lines(out / "alive") == [{"it_is": False}]


def test_of_all_reports_the_one_that_tells_the_cause_is_said(out: Path) -> None:
    where = '{"rank": 0, "host": "n0", "error": "in exchange", "exit_code": 76}'
    cause = '{"rank": 1, "host": "n1", "error": "in compute", "exit_code": 76, "cause": "rank 1 did not come on"}'
    writes = "; ".join(f"(out / 'errors/rank-{n}.json').write_text({text!r})" for n, text in enumerate((where, cause)))
    result = supervise(out, f"{writes}; sys.exit(76) | finishes()").finish(20)
    assert result.returncode == 0 and "rank 1 did not come on, after step 0; restart 1" in result.stderr


STUCK = """
import pathlib, sys
from distconv.supervise import supervisor
supervisor.LOOK, supervisor.SECONDS_AFTER_A_REPORT = 0.1, 0.3
print(supervisor.Supervisor(None, pathlib.Path(sys.argv[1]), 0).start([sys.executable, "-c", sys.argv[2]]))
"""


def test_a_launcher_that_does_not_end_after_a_failure_is_ended(out: Path) -> None:
    (out / "errors").mkdir(parents=True)
    report = json.dumps({"rank": 1, "host": "n1", "error": "the host is gone", "exit_code": 76})
    reports = f"import pathlib, time; pathlib.Path({str(out / 'errors' / 'rank-1.json')!r}).write_text({report!r})"
    result = jobs.run(0, "-c", STUCK, out, f"{reports}; time.sleep(60)", seconds=30)
    assert result.stdout == "76\n", result.stderr


RECORDS = [
    {"event": "start", "time": 1.0},  # of an earlier day
    {"event": "step", "time": 2.0},
    {"event": "start", "time": 100.0},
    {"event": "step", "time": 110.0},
    {"event": "epoch", "time": 112.0},
    {"event": "start", "time": 120.0},  # was killed before the first step that stayed
    {"event": "start", "time": 130.0},
    {"event": "step", "time": 140.0},
    {"event": "final", "time": 145.0},
]


def test_only_time_that_gets_a_run_ahead_for_good_counts() -> None:
    assert useful_seconds(RECORDS) == 1 + 12 + 15
    assert useful_seconds(RECORDS, starts_before=1) == 12 + 15
    assert useful_seconds(RECORDS[:2], starts_before=1) == useful_seconds([]) == 0


@pytest.mark.parametrize("torn", ["", "\n", '{"event": "st', '{"event": "step", "step": 8}\n7\n{"eve'])
@pytest.mark.parametrize(
    "foreign", ["", '{"step": "x"}\n', '{"step": null}\n', '{"resumed_step": null}\n', "[" * 9_999 + "\n"]
)
def test_the_last_record_is_found_behind_what_a_kill_or_another_program_has_left(
    torn: str, foreign: str, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "step": 8}\n' * 5_000 + foreign + torn)
    assert last_record(path) == {"event": "step", "step": 8} and last_record(tmp_path / "none") == {}
