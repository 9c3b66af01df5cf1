"""Philox against its authors' known answers, and random numbers that belong to a sample."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from distconv.kernels.philox import permutation, philox4x32, random_words
from tests import reference

KEY = 0xA4093822, 0x299F31D0

# kat_vectors of Random123, "philox4x32 10": counter, key, random words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers_of_the_authors_come_out(counter, key, answer):
    found = philox4x32(np.array(words(counter), np.uint64)[:, None], tuple(words(key)))
    assert found[:, 0].tolist() == words(answer)
    assert reference.philox4x32(words(counter), words(key)) == words(answer)


@pytest.mark.parametrize("step", [0, 7, 2**32 + 5])
def test_a_word_is_found_from_its_own_counter_alone(step):
    # The counter is (block of four words, sample, step, its upper half): what a kernel on a GPU has to repeat.
    samples = np.array([0, 59_999, 2**32 - 1])
    found = random_words(KEY, step, samples, 10)
    assert found.shape == (3, 10)
    for row, sample in zip(found, samples.tolist(), strict=True):
        counters = [(block, sample, step % 2**32, step >> 32) for block in range(3)]
        assert row.tolist() == [word for counter in counters for word in reference.philox4x32(counter, KEY)][:10]


def test_words_of_a_sample_depend_neither_on_its_company_nor_on_the_order():
    samples = np.array([5, 123, 0, 77])
    together = random_words(KEY, 3, samples, 9)
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(random_words(KEY, 3, np.array([sample]), 9)[0], together[i])
    np.testing.assert_array_equal(random_words(KEY, 3, samples[::-1], 9), together[::-1])
    np.testing.assert_array_equal(random_words(KEY, 3, samples, 4), together[:, :4])  # nor on how many are drawn


@pytest.mark.parametrize(
    ("key", "step", "sample"), [((1, 2), 3, 4), ((2, 1), 3, 4), ((1, 3), 3, 4), ((1, 2), 4, 4), ((1, 2), 3, 5)]
)
def test_another_key_step_or_sample_gives_words_of_its_own(key, step, sample):
    mine = random_words(key, step, np.array([sample]), 400)
    other = random_words((1, 2), 2**32 + 3, np.array([4]), 400)  # differs from the first case in the step's upper half
    assert not np.any(mine == other)


def test_every_bit_is_set_half_of_the_time():
    drawn = random_words((0, 0), 0, np.arange(400), 100).ravel()  # the plainest key and counters
    assert drawn.max() < 2**32
    bits = (drawn[:, None] >> np.arange(32, dtype=np.uint64)) & np.uint64(1)
    five_deviations = 5 * 0.5 / np.sqrt(len(drawn))
    np.testing.assert_allclose(bits.mean(axis=0), 0.5, atol=five_deviations)


@pytest.mark.parametrize("n", [0, 1, 2, 100, 5000])
def test_permutation_holds_each_index_once(n):
    np.testing.assert_array_equal(np.sort(permutation(KEY, n)), np.arange(n))


def test_permutation_belongs_to_its_key():
    np.testing.assert_array_equal(permutation((1, 2), 100), permutation((1, 2), 100))
    for key in ((2, 2), (1, 3), (2, 1)):
        assert np.any(permutation(key, 100) != permutation((1, 2), 100))


def test_all_orders_are_equally_likely():
    drawn = Counter(tuple(permutation((0, key), 3).tolist()) for key in range(600))
    assert len(drawn) == 6
    assert all(abs(count - 100) < 46 for count in drawn.values())  # five deviations of a binomial count
