"""The charts of a report: what they draw lies where the numbers say."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest

from distconv.run.report.svg import BOTTOM, HEIGHT, MOST_CELLS, TOP, Line, binned, heat_map, line_chart


def test_bins_keep_means_and_extremes() -> None:
    x, y = np.arange(1001.0), np.random.default_rng(0).standard_normal(1001)
    y[5] = math.nan
    xs, means, least, largest = binned(x, y, 100)
    assert len(xs) == 100 and least.min() == np.nanmin(y) and largest.max() == np.nanmax(y)
    assert np.all(np.diff(xs) > 0) and np.all((least <= means) & (means <= largest))
    few = binned(x[:3], y[:3], 100)
    assert few[0].tolist() == [0, 1, 2] and few[1].tolist() == y[:3].tolist()
    assert len(binned([], [])[0]) == 0 and len(binned([1.0], [math.nan])[0]) == 0


def test_an_axis_that_ends_below_some_lines_has_its_ticks_for_the_others() -> None:
    lines = [Line("a", [0, 1], [2.0, 1.0], "--c0"), Line("b", [0, 1], [2.0, 6e18], "--c1")]
    for from_zero in (True, False):
        chart = line_chart("loss", lines, (0, 1), "{:g}".format, from_zero, most=8.0)
        labels = [float(text) for text in re.findall(r'text-anchor="end">([^<]*)<', chart)]
        assert len(labels) >= 4 and labels[0] <= 1 and 6 < labels[-1] <= 8
        y = [float(point.split(",")[1]) for line in re.findall(r'points="([^"]*)"', chart) for point in line.split()]
        assert max(y) - min(y) > HEIGHT / 2 and y[1] - y[0] > 10  # the lower line is not pressed flat


def test_a_chart_draws_larger_numbers_higher_and_tells_the_last() -> None:
    for log in (False, True):
        chart = line_chart(
            "A <title>", [Line("a & b", [0, 1, 2], [1, 3, 90], "--train")], (0, 2), "{:g}".format, log=log
        )
        points = re.search(r'polyline[^>]*points="([^"]*)"', chart)
        assert points is not None
        places = [tuple(map(float, pair.split(","))) for pair in points[1].split()]
        # y goes down in SVG
        assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(places))
        assert "A &lt;title&gt;" in chart and "a &amp; b <b>90</b>" in chart
    assert line_chart("none", [Line("a", [0], [math.nan], "--train")], (0, 1), str) == ""
    assert line_chart("none", [Line("a", [0], [0.0], "--train")], (0, 1), str, log=True) == ""


@pytest.mark.parametrize("raw", [False, True])
def test_losses_below_0_lie_within_the_axis_and_its_ticks_are_round(raw: bool) -> None:
    """As those of a likelihood do."""
    y = [-1.3, -40.0, -73.0, -88.0]
    chart = line_chart("loss", [Line("a", range(4), y, "--c0", raw=raw)], (0, 3), "{:g}".format, from_zero=True)
    assert re.findall(r'text-anchor="end">([^<]*)<', chart) == ["-80", "-60", "-40", "-20", "0"]
    places = [float(pair.split(",")[1]) for points in re.findall(r'points="([^"]*)"', chart) for pair in points.split()]
    assert len(set(places)) == 4 and min(places) >= TOP and max(places) <= HEIGHT - BOTTOM


def test_a_chart_of_few_noisy_numbers_shows_them_all() -> None:
    """Between the least and the largest of a single number is no area, so it has an outline."""
    chart = line_chart("t", [Line("", [0, 1, 2], [1, 5, 2], "--train", raw=True)], (0, 2), str)
    band = re.search(r'class="band" style="([^"]*)" points="([^"]*)"', chart)
    assert band is not None and "stroke:var(--train)" in band[1] and len(band[2].split()) == 6


def cells(chart: str) -> list[tuple[float, float, float, str]]:
    """(x, y, opacity, title) of each."""
    found = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)".*?opacity="([\d.]+)"><title>(.*?)</title>', chart)
    return [(float(x), float(y), float(opacity), title) for x, y, opacity, title in found]


def test_a_heat_map_is_darker_where_numbers_are_larger_and_empty_where_there_are_none() -> None:
    chart = heat_map("t", [0, 1, 3], ["a", "<b>"], np.array([[6.0, math.nan], [8.0, 10.0]]), "{:g}".format)
    found = cells(chart)
    assert [title for *_, title in found] == ["a: 6", "&lt;b&gt;: 8", "&lt;b&gt;: 10"]
    (_, top, _, _), (left, bottom, _, _), (right, _, _, _) = found
    assert top < bottom and left < right
    assert found[0][2] < found[1][2] < found[2][2] == 1.0
    # palest is half of the largest: 6 of 10 is a fifth of the way from there
    assert math.isclose(found[0][2], 0.1 + 0.9 / 5, abs_tol=0.01)


def test_a_heat_map_of_many_columns_shows_means_of_neighbours() -> None:
    values = np.random.default_rng(0).random((2, 10 * MOST_CELLS))
    found = cells(heat_map("t", np.arange(10 * MOST_CELLS + 1), ["a", "b"], values, "{:.6f}".format))
    shown = [float(title.split(": ")[1]) for *_, title in found]
    assert np.allclose(shown, values.reshape(2 * MOST_CELLS, 10).mean(axis=1), atol=1e-6)
