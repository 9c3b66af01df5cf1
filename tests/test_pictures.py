"""Pictures: what they say and draw, read from their figures; that nothing is cut, from their pixels."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from distconv.config import WIRES, Config
from distconv.errors import CannotCreateError, UsageError
from distconv.nn.blocks import Residual
from distconv.nn.layers import Affine, Chain, Dropout
from distconv.nn.networks import NETWORKS
from distconv.nn.summary import drops_scores
from distconv.pictures import curves
from distconv.pictures.curves import MOST_DRAWN, draw_curves, smoothed, thinned
from distconv.pictures.measurements import draw_exchange, draw_prediction, draw_proof, draw_scaling
from distconv.pictures.style import COLORS, save
from distconv.run.ending import draw
from distconv.run.log import RunLog


def panel(figure: Figure, title: str) -> Axes:
    """The part of a picture with that title."""
    (axes,) = (axes for axes in figure.axes if axes.get_title() == title)
    return axes


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """The points of each line, by its label."""
    return {str(line.get_label()): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def title(figure: Figure) -> str:
    return str(figure.get_suptitle())


def run_of(
    epochs: int, steps: int = 4, metric: str = "accuracy", last: int | None = None, rate: float = 0.0
) -> list[Mapping[str, Any]]:
    """Records of a run of so many epochs of so many steps, stopped after `last`."""
    records: list[Mapping[str, Any]] = [{"event": "start", "train_images": 10 * steps, "batch_size": 10}]
    for step in range(1, epochs * steps + 1):
        record = {"train_loss": 2 / step, "learning_rate": 0.1 + rate * step, "epoch": (step - 1) // steps + 1}
        records.append({"event": "step", "step": step, **record})
        if step % steps == 0:
            scores = {f"train_{metric}": 0.5, f"test_{metric}": 0.4 + 0.01 * step}
            records.append({"event": "epoch", "step": step, "epoch": step // steps, "train_loss": 1.0, **scores})
        if step == last:
            return records
    return [*records, {"event": "final", "metric": metric, f"test_{metric}": 0.625, "correct": 5, "total": 8}]


# the curves of a run


def test_the_curves_of_a_run_tell_what_became_of_it() -> None:
    figure = draw_curves(run_of(3), "a network on data", ["a note"])
    assert title(figure) == "a network on data: test accuracy 62.50%" and figure.get_supxlabel() == "a note"
    loss, score = panel(figure, "loss in training"), panel(figure, "accuracy in evaluation")
    assert len(figure.axes) == 2  # the learning rate was the same all the time
    assert lines(loss)["a step's batch"] == [(step / 4, 2 / step) for step in range(1, 13)]
    means = [segment.tolist() for segment in loss.collections[0].get_segments()]  # type: ignore[attr-defined]
    assert means == [[[epoch, 1.0], [epoch + 1, 1.0]] for epoch in range(3)]
    drawn = lines(score)
    np.testing.assert_allclose(drawn["test"], [(1, 0.44), (2, 0.48), (3, 0.52)])
    np.testing.assert_allclose(drawn["training"], [(1, 0.5), (2, 0.5), (3, 0.5)])
    assert {y for _, y in drawn["62.50%: test, in the end"]} == {0.625}
    for axes in (loss, score):
        assert axes.get_xlabel() == "epoch" and all(tick == int(tick) for tick in axes.get_xticks())
        assert axes.get_xlim()[0] == 0 and 3 <= axes.get_xlim()[1] < 3.5


def test_a_learning_rate_that_changes_has_a_curve_of_its_own() -> None:
    rate = panel(draw_curves(run_of(2, rate=0.5), ""), "learning rate")
    ((points),) = lines(rate).values()
    np.testing.assert_allclose(points, [(step / 4, 0.1 + 0.5 * step) for step in range(1, 9)])


@pytest.mark.parametrize("epochs", [1, 2, 60])
def test_an_epoch_or_many_have_room(epochs: int) -> None:
    figure = draw_curves(run_of(epochs), "")
    score = panel(figure, "accuracy in evaluation")
    assert len(lines(score)["test"]) == epochs <= score.get_xlim()[1]
    markers = {line.get_marker() for line in score.lines[:2]}
    assert len(markers) == 2 or epochs == 60  # for eyes that see no colours; then dots would hide the line


@pytest.mark.parametrize("records", [[], [{"event": "epoch"}, {"event": "step"}, {}], run_of(1, steps=100, last=30)])
def test_a_run_that_stopped_early_is_drawn_as_far_as_it_came(records: list[Mapping[str, Any]], tmp_path: Path) -> None:
    figure = draw_curves(records, "a network")
    assert title(figure) == "a network"  # without a score
    score = panel(figure, "accuracy in evaluation")
    assert [text.get_text() for text in score.texts] == ["no epoch is finished yet"]
    if len(records) > 3:
        loss = panel(figure, "loss in training")
        assert lines(loss)["a step's batch"][-1][0] == 0.3 and 1 <= loss.get_xlim()[1] < 1.1
    save(figure, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_a_metric_of_ones_own_is_in_percent_only_where_it_is_a_share() -> None:
    assert "test overlap 62.50%" in title(draw_curves(run_of(1, metric="overlap"), ""))
    records = [*run_of(1, metric="return")[:-1], {"event": "final", "metric": "return", "test_return": 241.3}]
    figure = draw_curves(records, "maze")
    assert title(figure) == "maze: test return 241.3"
    figure.draw_without_rendering()
    ticks = panel(figure, "return in evaluation").get_yticklabels()
    assert ticks and not any("%" in tick.get_text() for tick in ticks)


def test_averaged_weights_and_validation_are_told_apart() -> None:
    records: list[dict[str, Any]] = [dict(record) for record in run_of(2)]
    for record in records:
        if record["event"] == "epoch":
            record |= {"validation_accuracy": 0.1, "ema_test_accuracy": 0.2, "ema_validation_accuracy": 0.3}
    records[-1]["ema_test_accuracy"] = 0.75
    figure = draw_curves(records, "")
    assert title(figure).endswith("test accuracy 62.50%, with averaged weights 75.00%")
    drawn = panel(figure, "accuracy in evaluation").lines[:5]
    assert len({line.get_color() for line in drawn}) == len({line.get_marker() for line in drawn}) == 5


def test_losses_over_decades_have_an_axis_of_powers_and_losses_below_0_are_shown() -> None:
    def limits(losses: Sequence[float | None]) -> tuple[str, float]:
        records = [{"event": "step", "step": n, "train_loss": loss} for n, loss in enumerate(losses, start=1)]
        loss = panel(draw_curves(records, ""), "loss in training")
        return loss.get_yscale(), loss.get_ylim()[0]

    assert limits([2.3, 2.0, 1.1]) == ("linear", 0)
    scale, bottom = limits([2.3, 0.1, 0.01, None, 0.004])
    assert scale == "log" and 0 < bottom < 0.004
    scale, bottom = limits([3.0, -7.0])
    assert scale == "linear" and bottom < -7


@pytest.mark.parametrize("largest", [3.0, 1e3, 3e8])
def test_an_axis_of_powers_has_labels_that_have_room(largest: float) -> None:
    records = [{"event": "step", "step": n, "train_loss": largest if n == 7 else 0.02} for n in range(1, 41)]
    loss = panel(draw_curves(records, ""), "loss in training")
    low, high = loss.get_ylim()
    assert loss.get_yscale() == "log" and 3 <= sum(low <= tick <= high for tick in loss.get_yticks()) <= 8


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_scores_that_are_all_alike_have_no_axis_beyond_what_a_share_can_be(score: float) -> None:
    records = [{**record, "train_accuracy": score, "test_accuracy": score} for record in run_of(1)]
    low, high = panel(draw_curves(records, ""), "accuracy in evaluation").get_ylim()
    assert -0.01 < low < score < high < 1.01 if score == 0 else 0.9 < low < score < high < 1.01


def test_a_single_step_and_losses_that_are_not_finite_are_shown_as_such() -> None:
    loss = panel(draw_curves(run_of(1, steps=1), ""), "loss in training")
    assert [line.get_marker() for line in loss.lines if line.get_label() == "smoothed"] == ["o"]
    loss = panel(draw_curves([{"event": "step", "step": 1, "train_loss": None}], ""), "loss in training")
    assert [text.get_text() for text in loss.texts] == ["no loss is finite"]


def test_a_long_run_is_drawn_by_few_points_with_its_peaks() -> None:
    records = run_of(20, steps=600)
    spiked = [{**record, "train_loss": 99.0} if record.get("step") == 7777 else record for record in records]
    points = lines(panel(draw_curves(spiked, ""), "loss in training"))["a step's batch"]
    assert len(points) <= MOST_DRAWN and (7777 / 600, 99.0) in points
    assert points == sorted(points)


@given(st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), max_size=30), st.floats(0.1, 20))
def test_smoothing_is_the_weighted_mean_of_what_is_near(values: list[float], reach: float) -> None:
    for i, found in enumerate(smoothed(values, reach)):
        near = [(math.exp(-abs(i - j) / reach), v) for j, v in enumerate(values) if not math.isnan(v)]
        if sum(weight for weight, _ in near) > 1e-9:
            mean = sum(weight * v for weight, v in near) / sum(weight for weight, _ in near)
            assert found == pytest.approx(mean, rel=1e-6, abs=1e-6 * max(1, *(abs(v) for _, v in near)))


def test_smoothing_keeps_a_constant_and_does_not_lag() -> None:
    np.testing.assert_allclose(smoothed([3.0] * 50, 7), 3.0)
    steep = smoothed([*[1.0] * 100, *[0.0] * 100], 5)
    assert steep[99] > 0.5 > steep[100] and steep[99] + steep[100] == pytest.approx(1)
    assert len(smoothed([], 5)) == 0 and math.isnan(smoothed([math.nan], 5)[0])


def test_thinning_keeps_the_extremes_of_every_stretch() -> None:
    y = np.random.default_rng(0).standard_normal(50_000)
    x = np.arange(50_000.0)
    kept, values = thinned(x, y)
    assert len(kept) <= MOST_DRAWN and (np.diff(kept) >= 0).all()
    np.testing.assert_array_equal(values, y[kept.astype(int)])
    for start in range(0, 50_000, 5_000):
        inside = values[(start <= kept) & (kept < start + 5_000)]
        assert (inside.min(), inside.max()) == (y[start : start + 5_000].min(), y[start : start + 5_000].max())


def test_the_loss_says_little_only_where_the_scores_are_dropped() -> None:
    assert [name for name, network in NETWORKS.items() if drops_scores(network(10))] == ["deepconvnet"]
    for model in (Chain(), Chain(Dropout(0.5), Affine(3)), Chain(Affine(3), Dropout(0.0)), Residual(Dropout(0.5))):
        assert not drops_scores(model)
    assert drops_scores(Chain(Affine(3), Chain(Dropout(0.1))))


@pytest.mark.parametrize(
    ("model", "smoothing", "eval_samples", "notes"),
    [
        ("simpleconvnet", 0.0, 0, []),
        ("simpleconvnet", 0.1, 0, ["smoothed labels (0.1): it is higher"]),
        ("deepconvnet", 0.0, 1000, ["dropout, of the scores too: it is higher", "samples of each part, or all;"]),
        ("deepconvnet", 0.1, 0, ["dropout, of the scores too and smoothed labels (0.1)"]),
    ],
)
def test_a_run_draws_itself_with_its_name_and_what_its_loss_is_taken_with(
    model: str, smoothing: float, eval_samples: int, notes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(curves, "draw_curves", lambda *arguments: told.append(arguments) or Figure())
    settings = Config(model=model, label_smoothing=smoothing, eval_samples=eval_samples, data="auto")
    data = SimpleNamespace(size=lambda part: 10_000)
    replica, world = SimpleNamespace(model=NETWORKS[model](10)), SimpleNamespace(size=3)
    run: Any = SimpleNamespace(config=settings, data=data, replica=replica, world=world)
    draw([{"event": "start", "data": "/scratch/my/mnist"}, {}], run, tmp_path, RunLog(False))
    assert (tmp_path / "curves.png").exists()
    ((_, head, found),) = told
    assert head == f"{model} on mnist, 3 ranks" and len(found) == len(notes)
    assert all(note in line for note, line in zip(notes, found, strict=True))


# what was measured, or predicted


def exchanged(carrier: str, wire: str, elements: int, seconds: float) -> dict[str, Any]:
    return {"carrier": carrier, "wire": wire, "elements": elements, "median_seconds": seconds}


def test_the_exchange_is_drawn_in_ms_and_beside_mpis_float32() -> None:
    sizes = (1024, 123_552, 1 << 20)
    rows = [
        exchanged(*kind, n, factor * 1e-9 * n)
        for n in reversed(sizes)
        for kind, factor in {("flat", "float16"): 1, ("flat", "float32"): 1.5, ("mpi", "float32"): 2}.items()
    ]
    figure = draw_exchange([*rows, exchanged("buckets", "float16", 1 << 20, 0.5)], "two ranks")
    time = panel(figure, "time, ms")
    np.testing.assert_allclose(lines(time)["flat float16"], [(n, 1e-6 * n) for n in sizes])
    ratio = panel(figure, "times MPI's float32: below 1 is faster")
    assert [y for _, y in lines(ratio)["flat float32"]] == pytest.approx([0.75] * 3)
    assert [y for _, y in lines(ratio)["mpi float32"]] == [1, 1, 1]
    assert [text.get_text() for text in ratio.get_xticklabels()] == ["1Ki", "123,552", "1Mi"]
    looks = {line.get_label(): (line.get_color(), line.get_marker(), line.get_linestyle()) for line in ratio.lines}
    assert len({*looks.values()}) == len(looks) == 4
    assert looks["flat float16"][0] == looks["buckets float16"][0] == COLORS["float16"]
    low, high = panel(draw_exchange([exchanged("mpi", "float32", 123_552, 1e-3)], ""), "time, ms").get_xlim()
    assert math.sqrt(low * high) == pytest.approx(123_552)  # a single size stands in the middle


def predicted(ranks: int, wire: str, compute: float, exchange: float, exposed: float) -> dict[str, Any]:
    speed = 100 / (compute + exposed)
    row = {"ranks": ranks, "wire": wire, "compute_seconds": compute, "exchange_seconds": exchange}
    return {**row, "exposed_seconds": exposed, "images_per_second": speed, "efficiency": speed / (50 * ranks)}


def test_a_prediction_is_drawn_beside_the_ideal_and_its_steps_in_parts() -> None:
    rows = [
        predicted(ranks, wire, 2 / ranks, exchange, exchange / 4)
        for ranks, exchange in ((1, 0.0), (2, 0.8), (4, 0.4))
        for wire in ("float32", "float16")
    ]
    figure = draw_prediction(rows, "prediction")
    speed = lines(panel(figure, "images/s"))
    np.testing.assert_allclose(speed["ideal"], [(1, 50), (2, 100), (4, 200)])
    np.testing.assert_allclose(speed["float16"], [(1, 50), (2, 100 / 1.2), (4, 100 / 0.6)])
    parts = panel(figure, "parts of a step, float16")
    compute, hidden, exposed = ([bar.get_height() for bar in container] for container in parts.containers)  # type: ignore[attr-defined]
    assert compute == pytest.approx([1, 0.4 / 1.2, 0.2 / 0.6])
    assert hidden == pytest.approx([0, 0.6 / 1.2, 0.3 / 0.6]) and exposed == pytest.approx([0, 0.2 / 1.2, 0.1 / 0.6])


def rung(ranks: int) -> dict[str, Any]:
    parts = {f"{part}_seconds": 0.1 / ranks for part in ("compute", "exchange", "wait", "step")}
    return {**parts, "ranks": ranks, "images_per_second": 900.0 * ranks, "oversubscribed": ranks > 100}


def proved(wire: str, ranks: int, difference: float, bound: float) -> dict[str, Any]:
    ok = difference <= bound
    return {"wire": wire, "ranks": ranks, "max_relative_difference": difference, "bound": bound, "ok": ok}


def test_a_proof_shows_what_is_broken_and_no_difference_at_the_bottom() -> None:
    rows = [proved("float16", 1, 3e-4, 1e-3), proved("int16", 1, 0.0, 0.0), proved("float16", 2, 0.5, 1e-3)]
    figure = draw_proof([*rows, proved("int16", 2, 0.0, 0.0)], "a network")
    (axes,) = figure.axes
    drawn = lines(axes)
    assert drawn["BROKEN"] == [(1, 0.5)] and drawn["difference"][0] == (0, 3e-4)
    labels = dict(zip(axes.get_yticks(), [text.get_text() for text in axes.get_yticklabels()], strict=True))
    zero = drawn["difference"][1][1]
    assert drawn["difference"][1:] == [(3, zero), (4, zero)] and labels[zero] == "0" and zero < 3e-4 / 10
    assert {"1e-4", "1e-3", "1e-2"} < {*labels.values()}
    close = draw_proof([proved("float16", 1, 3e-4, 1e-3)], "").axes[0]  # all near one power
    assert [text.get_text() for text in close.get_yticklabels()] == ["1e-4", "1e-3", "1e-2"]
    bounds = [segment[0][1] for segment in axes.collections[0].get_segments()]  # type: ignore[attr-defined]
    assert bounds == [1e-3, zero, 1e-3, zero]
    good = draw_proof(rows[:2], "")
    assert "BROKEN" not in lines(good.axes[0])


LONG = "a.very.long.package.of.somebody:network_with_a_long_name on /a/long/path/to/some/data, 4,096 ranks, " * 2


@pytest.mark.parametrize(
    "figure",
    [
        lambda: draw_curves(run_of(3, rate=1e-7), LONG, [LONG]),
        lambda: draw_exchange([exchanged("mpi", "float32", 1 << n, 1e-3 * n) for n in range(10, 26)], LONG),
        lambda: draw_prediction([predicted(1 << n, w, 1, 3, 2) for n in range(13) for w in ("float16", "int8")], LONG),
        lambda: draw_proof([proved(w, 1 << n, 1e-16, 1e-12) for w in ("float64", "int8") for n in range(13)], LONG),
        lambda: draw_scaling([rung(1 << n) for n in range(7)], LONG),
        lambda: draw_scaling([rung(1 << n) for n in range(13)], LONG),
    ],
    ids=["curves", "exchange", "prediction", "proof", "scaling", "scaling far"],
)
def test_nothing_is_cut_nothing_overlaps_and_no_formula_is_left_unread(figure: Any, tmp_path: Path) -> None:
    drawn: Figure = figure()
    save(drawn, tmp_path / "picture.png")
    ink = matplotlib.image.imread(tmp_path / "picture.png")[..., :3].min(axis=-1) < 0.9
    assert not (ink[[0, -1]].any() or ink[:, [0, -1]].any())
    ticks = itertools.chain.from_iterable([*axes.get_xticklabels(), *axes.get_yticklabels()] for axes in drawn.axes)
    minor = itertools.chain.from_iterable(axes.yaxis.get_minorticklabels() for axes in drawn.axes)
    assert not any("$" in text.get_text() for text in [*ticks, *minor])
    for axes in drawn.axes:
        labels = [text for text in axes.get_xticklabels() if text.get_text() and text.get_rotation() != 45]
        boxes = [text.get_window_extent() for text in labels]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("evaluate", ("run",)),
        ("misclassified", ("run",)),
        ("data.__main__", ("show", "digits")),
        ("prove", ("--ranks", "1")),
        ("bench", ("step",)),
        ("bench", ("exchange",)),
        ("bench", ("scaling", "--ranks", "1")),
        ("bench", ("predict", "--step-seconds-per-image", "0.001")),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, flags: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(f"distconv.{command}").main
    (tmp_path / "run.png").mkdir()
    (tmp_path / "config.toml").write_text("a run's own")
    for name, error in (("config.toml", UsageError), ("run.png", CannotCreateError), ("no/a.png", CannotCreateError)):
        with pytest.raises(error, match=f"--png {name}"):
            main([*flags, "--png", name])
    assert (tmp_path / "config.toml").read_text() == "a run's own"


def test_colours_of_one_picture_are_told_apart_without_red_and_green() -> None:
    """By lightness (ITU-R BT.601), which every eye sees, or by blue against yellow."""
    for names in (
        ("train", "validation", "test", "ema_test", "ema_validation"),
        WIRES,
        ("compute", "exchange", "wait", "rest"),
        ("forward", "backward", "rest"),
    ):
        rgb = [tuple(int(to_hex(COLORS[name])[i : i + 2], 16) for i in (1, 3, 5)) for name in names]
        seen = [(0.299 * r + 0.587 * g + 0.114 * b, b - (r + g) / 2) for r, g, b in rgb]
        for one, other in itertools.combinations(seen, 2):
            assert math.dist(one, other) > 20
