"""bench exchange: a row for each size, carrier and wire, and advice that weighs ours against MPI's own. No timings."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pytest

from distconv.benchmarks.exchange import Row, advice
from distconv.benchmarks.predict import bytes_sent
from tests.test_bench import MODEL, MODEL_TEXT, bench, rows_of


def row(carrier: str, wire: str, seconds: float, elements: int = MODEL) -> Row:
    return Row(carrier, wire, 2, 1, elements, seconds, 1, 3, carrier)


def test_exchange_prints_one_row_for_each_size_carrier_and_wire() -> None:
    result = bench(2, "exchange", "--elements", "1Ki,5000", MODEL_TEXT, "--seconds", "9", "--repeats", "4", "--json")
    rows = rows_of(result)
    keys = {"carrier", "wire", "ranks", "hosts", "elements", "median_seconds", "bytes_sent"}
    assert all(keys <= set(one) for one in rows)
    found = [(one["elements"], one["carrier"], one["wire"]) for one in rows]
    assert len(found) == len(set(found))  # from rank 0 only
    for size in (1024, 5000, MODEL):
        ours = {one["wire"]: one for one in rows if one["elements"] == size and one["carrier"] == "flat"}
        assert set(ours) == {"float16", "float32"}
        for wire, one in ours.items():
            assert one["ranks"] == 2 and one["hosts"] == 1 and 0 < one["median_seconds"] < 10
            assert one["bytes_sent"] == bytes_sent(size, 2, wire)
    sent = {one["wire"]: one["bytes_sent"] for one in rows if one["elements"] == MODEL and one["carrier"] == "flat"}
    assert sent["float16"] <= 0.52 * sent["float32"] and 4 * MODEL <= sent["float32"] <= 1.01 * 4 * MODEL
    (library,) = [one for one in rows if (one["elements"], one["carrier"], one["wire"]) == (MODEL, "mpi", "float32")]
    assert library["bytes_sent"] == 4 * MODEL  # 2 (P-1)/P of the vector


def test_exchange_prints_a_table_and_advice_for_people_and_draws(tmp_path: Path) -> None:
    png = ("--png", tmp_path / "exchange.png")
    wires = ("--wires", "float16", "float32")
    result = bench(3, "exchange", "--elements", "1000", MODEL_TEXT, "--seconds", "0.5", *wires, *png)
    assert matplotlib.image.imread(png[1]).std() > 0.05
    assert result.returncode == 0, result.stderr
    head, columns, small, model, *rest = result.stdout.splitlines()
    assert head.startswith("3 ranks on 1 host")
    assert columns.split()[:5] == ["elements", "flat", "float16", "flat", "float32"]
    assert small.split()[0] == "1,000" and model.split()[0] == "123,552"
    assert "(1.00)" in model  # MPI's float32 beside itself
    assert any(line.startswith("for 123,552 parameters use ") for line in rest)


def test_sizes_that_the_time_does_not_suffice_for_are_named_and_left_out() -> None:
    result = bench(2, "exchange", "--elements", "1Ki", MODEL_TEXT, "1Mi", "--seconds", "1ns", "--json")
    assert {one["elements"] for one in rows_of(result)} == {1024, MODEL}  # the first, and the model's own, always
    assert "1,048,576 elements are left out" in result.stderr


def sizes(**seconds: dict[int, float]) -> list[Row]:
    """Rows of what is called flat_float16 and the like: the time for each number of elements."""
    return [row(*name.split("_"), time, n) for name, times in seconds.items() for n, time in times.items()]


def test_the_advice_is_for_the_models_own_size_and_the_largest() -> None:
    half, full, library = {1024: 9.0, MODEL: 0.002, 1 << 22: 0.4}, {1024: 1.0, MODEL: 0.004}, {1024: 1.0, MODEL: 0.005}
    rows = sizes(flat_float16=half, flat_float32={**full, 1 << 22: 0.5}, mpi_float32={**library, 1 << 22: 0.8})
    first, *_ = advice(rows).splitlines()
    assert first == (
        "for 123,552 parameters use float16: 2 ms a step, 0.40 times MPI's float32; "
        "for 4,194,304 parameters use float16: 400 ms a step, 0.50 times MPI's float32"
    )
    small = [one for one in rows if one.elements == 1024]
    assert advice(small).startswith("for 1,024 parameters use float32: 1e+03 ms") and "123,552" not in advice(small)


@pytest.mark.parametrize(
    ("half", "full", "library", "use"),
    [
        (1.0, 2.0, 3.0, "use float16"),
        (1.0, 1.02, 3.0, "use float32"),  # it gains too little for what it rounds
        (1.0, 2.0, 1.02, "use MPI's own float32"),  # which is there without ours
        (2.0, 1.02, 1.0, "use float32"),  # as fast, and its header is in the time
        (2.0, 1.5, 1.0, "use MPI's own float32"),
    ],
)
def test_the_advice_weighs_float16_against_both_float32(half: float, full: float, library: float, use: str) -> None:
    text = advice(sizes(flat_float16={MODEL: half}, flat_float32={MODEL: full}, mpi_float32={MODEL: library}))
    assert use in text.splitlines()[0]
    assert ("do not use float16 for 123,552 parameters" in text) == (use != "use float16")
    assert ("--exchange mpi" in text) == (full > 1.06 * library)


def test_the_advice_warns_of_each_wire_for_the_sizes_at_which_it_gains_nothing() -> None:
    sizes_of = (1024, 4096, 16384, 65536)

    def of(*ratios: float) -> dict[int, float]:
        return {n: ratio * n for n, ratio in zip(sizes_of, ratios, strict=True)}

    library = of(1, 1, 1, 1)
    text = advice(
        sizes(flat_float16=of(2, 1.1, 0.6, 0.96), flat_int8=of(3, 2, 0.5, 0.4), flat_float32=library)
        + sizes(mpi_float32=library, mpi_float16=of(9, 9, 9, 9))
    )
    first, warning = text.splitlines()
    assert first.startswith("for 65,536 parameters use int8")
    assert warning.startswith(
        "do not use float16 for 1,024 to 4,096 and 65,536 parameters, nor int8 for 1,024 to 4,096 parameters: float32"
    )
    worse = advice(sizes(flat_float16=of(2, 2, 2, 2), flat_float32=of(1.5, 1, 1, 1.5), mpi_float32=library))
    assert "do not use float16 for any size measured" in worse
    assert "our float32 is slower than MPI's for 1,024 and 65,536 parameters" in worse
    assert len(worse.splitlines()) == 3


def test_the_advice_takes_the_carrier_that_training_takes_and_any_wires() -> None:
    library = {MODEL: 1.0}
    rows = [row("two-level", "float16", 0.5), row("flat", "float16", 0.1), *sizes(mpi_float32=library)]
    assert "use float16: 500 ms" in advice(rows)
    alone = advice(sizes(flat_int32={MODEL: 2.0}, mpi_float32=library))
    assert alone.startswith("for 123,552 parameters use MPI's own float32") and "do not use int32" in alone
