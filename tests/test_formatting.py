"""Numbers as people read them, at the places where one form ends and the next begins."""

from __future__ import annotations

import pytest

from distconv.formatting import in_bytes, milliseconds, short


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (short(999.4), "999"),
        (short(999.6), "1,000"),  # three digits of it would be 1e+03
        (short(-999.6), "-1,000"),
        (milliseconds(2006.0), "2,006 ms"),  # a step of a large network
        (milliseconds(0.0421), "0.0421 ms"),
        (in_bytes(1010 * 2**20), "1,010 MiB"),  # a GiB has 1,024 of them
        (in_bytes(1_040_000), "1,040 kB"),
        (in_bytes(512), "512 bytes"),
    ],
)
def test_a_number_of_four_digits_has_no_exponent(text: str, expected: str) -> None:
    assert text == expected
