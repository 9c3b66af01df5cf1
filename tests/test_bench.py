"""bench: rows that programs can rely on, a predictor with the right limits, mistakes in one sentence. No timings."""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path

import matplotlib.image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distconv.bench import main
from distconv.benchmarks import ELEMENTS, SECONDS, quantity, rank_list
from distconv.benchmarks.predict import (
    GOODPUT,
    Network,
    bytes_sent,
    exchange_seconds,
    ladder,
    measured_seconds_per_image,
    predict,
    with_goal,
)
from distconv.benchmarks.scaling import Rung, table
from distconv.benchmarks.scaling import with_goal as scaling_goal
from distconv.errors import BadDataError, CannotCreateError, MissingInputError, UsageError
from tests import jobs

MODEL, MODEL_TEXT = 123_552, "123552"
IDEAL = Network(latency=0.0, bandwidth=math.inf)


def bench(ranks: int, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return jobs.run(ranks, "-m", "distconv.bench", *arguments, **environment)


def rows_of(result: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
    """Every line of the output must be an object."""
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


# predict

counts = st.integers(1, 10_000_000)
ranks = st.integers(1, 5000)
networks = st.builds(Network, st.floats(0, 0.1), st.floats(1e6, 1e12))


@given(counts, st.integers(1, 1000), networks)
def test_one_rank_exchanges_nothing(parameters: int, batch: int, network: Network) -> None:
    alone = predict(0.001, parameters, batch, 1, "float16", network)
    assert alone.exchange_seconds == 0 and alone.bytes_sent == 0
    assert alone.efficiency == pytest.approx(1) and alone.images_per_second == pytest.approx(1000)


def test_uneven_shards_wait_for_the_largest() -> None:
    assert predict(0.001, MODEL, 100, 3, "float32", IDEAL).efficiency == pytest.approx(100 / (3 * 34))


def test_an_exchange_bound_job_halves_its_time_with_half_the_bytes_and_gains_nothing_from_more_ranks() -> None:
    slow = Network(0.0, 1e6)
    full, half = (predict(1e-9, 1 << 24, 4096, 64, wire, slow) for wire in ("float32", "float16"))
    assert half.images_per_second / full.images_per_second == pytest.approx(2, rel=0.02)
    vector_seconds = 2 * 4 * (1 << 24) * 8 / (GOODPUT * 1e6)
    headers_and_looks = 16 * 63 * 104 * 8 / (GOODPUT * 1e6) + 16 * 7 * 1e-4
    assert full.exchange_seconds == pytest.approx(vector_seconds * 63 / 64 + headers_and_looks, rel=1e-6)
    more = predict(1e-9, 1 << 24, 4096, 128, "float32", slow)
    assert more.images_per_second <= full.images_per_second


BUCKET_NUMBERS, BUCKETS = 1 << 20, 12
DEEP = BUCKETS * BUCKET_NUMBERS  # parameters, and as many seconds of backward pass for each bucket


@pytest.mark.parametrize("wire", ["float16", "float32"])
@pytest.mark.parametrize("bandwidth", [1e7, 1e8, 3e8, 1e9, 1e11])
def test_buckets_hide_behind_the_backward_pass_but_for_the_first_numbers(wire: str, bandwidth: float) -> None:
    """Of K equal buckets of e seconds, the last one is exposed, or K e - B (K-1)/K of a backward pass of B seconds."""
    network, image = Network(1e-4, bandwidth), 0.01
    row = predict(image, DEEP, 4 * 100, 4, wire, network)
    each = exchange_seconds(BUCKET_NUMBERS, 4, wire, network) + 3 * 1e-4  # and three looks of the thread
    backward = 2 / 3 * 100 * image
    assert row.exchange_seconds == pytest.approx(BUCKETS * each)
    hideable = backward * (BUCKETS - 1) / BUCKETS
    assert row.exposed_seconds == pytest.approx(max(each, BUCKETS * each - hideable))
    assert row.images_per_second == pytest.approx(400 / (100 * image + row.exposed_seconds))


def test_small_gradients_and_one_rank_hide_nothing() -> None:
    network = Network(1e-4, 1e9)
    small = predict(0.01, (2 << 20) - 1, 400, 4, "float32", network)
    alone = predict(0.01, DEEP, 400, 1, "float32", IDEAL)
    assert small.exposed_seconds == small.exchange_seconds == exchange_seconds((2 << 20) - 1, 4, "float32", network)
    assert alone.exposed_seconds == alone.exchange_seconds == 0
    assert predict(0.01, 2 << 20, 400, 4, "float32", network).exposed_seconds < 0.6 * small.exposed_seconds


@given(counts, st.integers(2, 300), networks)
def test_what_is_exposed_is_a_part_of_the_exchange(parameters: int, P: int, network: Network) -> None:
    row = predict(0.001, parameters, P, P, "float16", network)
    assert 0 < row.exposed_seconds <= row.exchange_seconds * (1 + 1e-9)


def test_with_fewer_blocks_than_ranks_bytes_do_not_grow_with_empty_parts() -> None:
    """483 blocks: 482 other owners get a part, and 4095 ranks a header and what rank 0 has summed."""
    half_block = 2 * 256 + 8
    assert bytes_sent(MODEL, 4096, "float16") == 4095 * (104 + half_block) + 482 * half_block
    assert bytes_sent(256, 8, "float32") == 7 * (104 + 1024)
    some, more = (exchange_seconds(MODEL, P, "float16", Network(0.0, 1e9)) for P in (1024, 4096))
    assert more - some == pytest.approx(3072 * (104 + half_block) * 8 / GOODPUT / 1e9)  # the all-gather is as long


def test_the_ladder_leaves_out_ranks_without_an_image() -> None:
    strong = list(ladder(0.001, MODEL, 10, [1, 8, 16], ["float16"], IDEAL, weak=False))
    weak = list(ladder(0.001, MODEL, 10, [1, 8, 16], ["float16"], IDEAL, weak=True))
    assert [(p.ranks, p.batch_size) for p in strong] == [(1, 10), (8, 10)]
    assert [(p.ranks, p.batch_size) for p in weak] == [(1, 10), (8, 80), (16, 160)]


def test_predict_prints_rows_or_a_table_with_its_formula(tmp_path: Path) -> None:
    arguments = ("predict", "--step-seconds-per-image", "0.8ms", "--weak", "--latency", "0", "--bandwidth", "100mbit")
    png = tmp_path / "prediction.png"
    rows = rows_of(bench(0, *arguments, "--json", "--png", png, MPLBACKEND="garbage"))
    assert matplotlib.image.imread(png).std() > 0.05
    assert [(one["ranks"], one["wire"]) for one in rows[:3]] == [(1, "float32"), (1, "float16"), (2, "float32")]
    assert rows[-1]["ranks"] == 4096
    assert rows[0]["images_per_second"] == pytest.approx(1250)
    assert rows[2]["exchange_seconds"] == pytest.approx(exchange_seconds(MODEL, 2, "float32", Network(0.0, 1e8)))
    text = bench(0, *arguments[:-4], "--ranks", "1,2", "--parameters", "25Mi").stdout
    assert "goodput" in text and "26,214,400 parameters" in text and "efficiency" in text.splitlines()[-3]
    assert [line.split()[0] for line in text.splitlines()[-2:]] == ["1", "2"]


def test_as_many_steps_take_as_long_as_the_noise_scale_says() -> None:
    strong, weak = (
        [
            with_goal(row, noise_scale=900, steps=400, batch_size=100)
            for row in ladder(0.001, MODEL, 100, [1, 3, 9, 64], ["float16"], IDEAL, weak)
        ]
        for weak in (False, True)
    )
    assert [row.steps for row in strong] == [400] * 4
    assert [row.training_seconds for row in strong] == pytest.approx([40, 400 * 0.034, 400 * 0.012, 400 * 0.002])
    # A step of 100 images a rank takes 0.1 s. 400 steps at 100 are (1 + 900/100) x 40, which no batch falls below.
    assert [row.steps for row in weak] == [400, 160, 80, 46]
    assert [row.training_seconds for row in weak] == pytest.approx([40, 16, 8, 4.6])


@given(st.floats(1e-3, 1e9), st.integers(1, 10_000_000), st.integers(1, 10_000))
def test_the_batch_that_was_measured_takes_the_steps_that_were_measured(N: float, steps: int, batch: int) -> None:
    row = with_goal(predict(0.001, MODEL, batch, 1, "float16", IDEAL), N, steps, batch)
    assert row.steps == steps and row.training_seconds == pytest.approx(0.001 * batch * steps)
    larger = with_goal(predict(0.001, MODEL, 2 * batch, 2, "float16", IDEAL), N, steps, batch)
    assert steps / 2 <= larger.steps <= steps and larger.training_seconds <= row.training_seconds * (1 + 1e-12)


def test_predict_tells_steps_and_time_only_if_it_is_asked() -> None:
    arguments = ("predict", "--step-seconds-per-image", "1ms", "--weak", "--ranks", "1,3", "--bandwidth", "100mbit")
    asked = (*arguments, "--noise-scale", "900", "--goal-steps", "400")
    plain, more = rows_of(bench(0, *arguments, "--json")), rows_of(bench(0, *asked, "--json"))
    for one, other in zip(plain, more, strict=True):
        assert set(other) - set(one) == {"steps", "training_seconds"} and one.items() <= other.items()
        step = one["compute_seconds"] + one["exposed_seconds"]  # type: ignore[operator]
        assert other["training_seconds"] == pytest.approx(other["steps"] * step)
    text = bench(0, *asked).stdout
    assert "noise scale / batch" in text and "noise" not in bench(0, *arguments).stdout
    *_, head, _, last = text.splitlines()
    assert head.split()[:2] == ["ranks", "steps"] and head.count("time") == 2
    assert last.split()[:2] == ["3", "160"] and f"{more[2]['training_seconds']:.4g} s" in last


def test_predict_says_that_it_has_nothing_to_predict(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["predict", "--step-seconds-per-image", "1ms", "--batch-size", "100"]
    assert main([*flags, "--ranks", "100,200"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("more ranks than images")
    for form in ([], ["--json"], ["--png", "none.png"]):
        with pytest.raises(UsageError, match=r"--batch-size 100: .*do not give every rank one"):
            main([*flags, "--ranks", "200", *form])
        assert capsys.readouterr().out == ""


def test_predict_reads_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    lines = [
        {"ranks": 2, "images_per_second": 900.0},
        {"ranks": 1, "engine": "torch", "images_per_second": 100.0},
        {"ranks": 1, "images_per_second": 500.0},
    ]
    path.write_text("a line for people\n" + "\n".join(map(json.dumps, lines)))
    assert measured_seconds_per_image(path) == 1 / 500
    path.write_text(json.dumps(lines[0]))
    with pytest.raises(BadDataError, match="one rank"):
        measured_seconds_per_image(path)
    with pytest.raises(MissingInputError):
        measured_seconds_per_image(tmp_path / "none")


# scaling


@pytest.mark.slow
def test_scaling_runs_its_own_jobs_and_draws(tmp_path: Path) -> None:
    png = tmp_path / "scaling.png"
    arguments = ("scaling", "--ranks", "2,1", "--steps", "2", "--batch-size", "10", "--weak")
    goal = ("--noise-scale", "30", "--goal-steps", "400")
    rows = rows_of(bench(0, *arguments, *goal, "--model", "simpleconvnet", "--png", png, "--json"))
    assert [(one["ranks"], one["batch_size"]) for one in rows] == [(1, 10), (2, 20)]
    one, two = rows
    assert one["speedup"] == one["efficiency"] == pytest.approx(1)
    assert two["speedup"] == pytest.approx(two["images_per_second"] / one["images_per_second"])
    assert two["efficiency"] == pytest.approx(two["speedup"] / 2)
    for rung in rows:
        assert rung["images_per_second"] == pytest.approx(rung["batch_size"] / rung["step_seconds"])
        assert 0 < rung["compute_seconds"] <= rung["step_seconds"] and 0 <= rung["slowest_rank"] < rung["ranks"]
        assert rung["exchange_seconds"] >= 0 and rung["wait_seconds"] >= 0
        assert rung["training_seconds"] == pytest.approx(rung["steps"] * rung["step_seconds"])
    assert [rung["steps"] for rung in rows] == [400, 250]  # (1 + 30/10) x 100 = 400, (1 + 30/20) x 100 = 250
    assert matplotlib.image.imread(png).std() > 0.05


def test_scaling_prints_a_table_that_names_oversubscription() -> None:
    few = Rung(1, 1, 100, "float16", 900.0, 1.0, 1.0, 0.1, 0.09, 0.005, 0.002, 0, oversubscribed=False)
    many = Rung(64, 1, 100, "float16", 450.0, 0.5, 1 / 128, 0.2, 0.15, 0.02, 0.01, 17, oversubscribed=True)
    head, first, second = table([few, many]).splitlines()
    assert "images/s" in head and "slowest rank" in head
    assert first.split() == ["1", "100", "900", "1.00", "100%", "100.00", "90.00", "5.00", "2.00", "0"]
    assert "oversubscribed" in second and second.split()[9] == "17"
    head, first, second = table([scaling_goal(rung, 900, 400, 50) for rung in (few, many)]).splitlines()
    assert head.split()[-2:] == ["steps", "time"] and first.split()[-3:] == ["211", "21.1", "s"]  # 400 x 10/19
    assert second.split()[10:13] == ["211", "42.2", "s"]


# mistakes


@pytest.mark.parametrize(
    ("ranks", "arguments", "named"),
    [(0, ("exchange", "--elements", "1Mi"), "mpirun"), (2, ("exchange", "--elements", "1000000000000"), "GiB")],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(ranks: int, arguments: tuple[str, ...], named: str) -> None:
    result = bench(ranks, *arguments)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and named in result.stderr and result.stdout == ""


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("", "BENCHMARK"),
        ("exchange --wires float16,float17", "float16,float17"),
        ("exchange --repeats 0", "--repeats 0"),
        ("scaling --ranks 1,8 --batch-size 4", "--batch-size 4 with 8 ranks"),
        ("scaling --wire float17", "--wire float17"),
        ("scaling --noise-scale 900", "--goal-steps"),
        ("scaling --noise-scale 900 --goal-steps many", "--goal-steps many"),
        ("predict", "--measured"),
        ("predict --step-seconds-per-image 1ms --latency 50", "--latency 50"),
        ("predict --step-seconds-per-image 1 --batch-size 0", "--batch-size 0"),
        ("step --batch-size 10 99999999999", "--batch-size 99999999999: expected a whole number from 1 to 2147483647"),
        ("predict --step-seconds-per-image=", "--step-seconds-per-image : expected a number above 0 with its unit"),
        (
            "predict --step-seconds-per-image 1e308",
            "--step-seconds-per-image 1e308: expected a number above 0 up to 1e+30",
        ),
        ("predict --step-seconds-per-image 1 --parameters 1e15", "from 1 to 1000000000000"),
        (
            "predict --step-seconds-per-image 1 --noise-scale= --goal-steps=",
            "--noise-scale : expected a number above 0, 900 say",
        ),
        ("predict --step-seconds-per-image 1 --noise-scale 1e308 --goal-steps 1", "--noise-scale 1e308"),
        ("predict --step-seconds-per-image 1 --noise-scale 900", "--goal-steps"),
        ("predict --step-seconds-per-image 1 --goal-steps 400", "--noise-scale"),
        ("predict --step-seconds-per-image 1 --goal-steps 400 --noise-scale -1", "--noise-scale -1"),
    ],
)
def test_a_mistake_is_seen_before_anything_starts(line: str, named: str) -> None:
    with pytest.raises(UsageError, match=re.escape(named)):
        main(line.split())


def test_scaling_refuses_to_be_nested() -> None:
    result = bench(2, "scaling", "--ranks", "1")
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "without mpirun" in result.stderr


@pytest.mark.parametrize("benchmark", ["scaling", "exchange", "predict --step-seconds-per-image 1ms"])
def test_a_picture_without_a_folder_is_seen_before_anything_is_measured(benchmark: str, tmp_path: Path) -> None:
    with pytest.raises(CannotCreateError, match=r"none: |none; "):
        main([*benchmark.split(), "--png", str(tmp_path / "none" / "a.png")])


@pytest.mark.parametrize("text", ["", "-1", "1e999", "nan", "1Gi", "Mi"])
def test_a_quantity_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="--n "):
        quantity("--n", text, ELEMENTS, "64Ki")


def test_quantities_and_lists_of_ranks() -> None:
    assert quantity("--n", "64Mi", ELEMENTS, "") == 64 << 20
    assert quantity("--t", "50us", SECONDS, "") == pytest.approx(50e-6)
    assert quantity("--t", "1.5e-3s", SECONDS, "") == pytest.approx(1.5e-3)
    assert rank_list("4,1,4") == [1, 4]
    for wrong in ("", "0", "1,,2", "1.5", "-1", "99999999"):
        with pytest.raises(UsageError):
            rank_list(wrong)
