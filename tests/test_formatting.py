"""Numbers as people read them, at the places where one form ends and the next begins."""

from __future__ import annotations

import pytest

from distconv.formatting import amount, in_bytes, milliseconds, short


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
        (amount(1_234_567), "1,234,567"),
        (amount(21.437648955119332), "21.4376"),  # returns of a user's own task, summed
    ],
)
def test_a_number_of_four_digits_has_no_exponent_and_no_more_digits_than_tell(text: str, expected: str) -> None:
    assert text == expected
