"""The charts of a report: what they draw lies where the numbers say."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np

from distconv.run.report.svg import Line, binned, line_chart


def test_bins_keep_means_and_extremes() -> None:
    x, y = np.arange(1001.0), np.random.default_rng(0).standard_normal(1001)
    y[5] = math.nan
    xs, means, least, largest = binned(x, y, 100)
    assert len(xs) == 100 and least.min() == np.nanmin(y) and largest.max() == np.nanmax(y)
    assert np.all(np.diff(xs) > 0) and np.all((least <= means) & (means <= largest))
    few = binned(x[:3], y[:3], 100)
    assert few[0].tolist() == [0, 1, 2] and few[1].tolist() == y[:3].tolist()
    assert len(binned([], [])[0]) == 0 and len(binned([1.0], [math.nan])[0]) == 0


def test_a_chart_draws_larger_numbers_higher_and_tells_the_last() -> None:
    for log in (False, True):
        chart = line_chart(
            "A <title>", [Line("a & b", [0, 1, 2], [1, 3, 90], "--train")], "epoch", "{:g}".format, log=log
        )
        points = re.search(r'polyline[^>]*points="([^"]*)"', chart)
        assert points is not None
        places = [tuple(map(float, pair.split(","))) for pair in points[1].split()]
        # y goes down in SVG
        assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(places))
        assert "A &lt;title&gt;" in chart and "a &amp; b <b>90</b>" in chart
    assert line_chart("none", [Line("a", [0], [math.nan], "--train")], "epoch", str) == ""
    assert line_chart("none", [Line("a", [0], [0.0], "--train")], "epoch", str, log=True) == ""
