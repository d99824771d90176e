"""Counter-based random numbers: their values, their distributions and their independence of the platform."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from medsam2.data.plan.randomness import CounterGenerator, combine, hashes, mix, permutation, seed63, uniforms

U64 = st.integers(0, 2**64 - 1)


@given(U64)
def test_the_vector_form_equals_the_scalar_form(stream: int) -> None:
    expected = [mix((stream + i) % 2**64) for i in range(5)]
    assert hashes(stream, 5).tolist() == expected


def test_the_numbers_are_those_of_the_published_splitmix64() -> None:
    """First outputs of splitmix64 from state 0 (Steele et al.), so that runs resume after any upgrade."""
    assert [mix(i * 0x9E3779B97F4A7C15 % 2**64) for i in range(2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@given(U64, st.integers(1, 200))
def test_a_permutation_holds_every_place_once(stream: int, count: int) -> None:
    assert sorted(permutation(stream, count).tolist()) == list(range(count))


def test_seeds_fit_a_signed_tensor_and_depend_on_order() -> None:
    assert all(0 <= seed63(7, i) < 2**63 for i in range(100))
    assert combine(1, 2) != combine(2, 1)


def test_uniform_numbers_are_uniform() -> None:
    numbers = uniforms(5, 20_000)
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(numbers.var() - 1 / 12) < 0.003


def test_weighted_choices_follow_their_weights_and_skip_zeros() -> None:
    weights = np.array([0.0, 1.0, 3.0, 0.0])
    generator = CounterGenerator(3)
    counts = np.bincount([generator.weighted(weights) for _ in range(4000)], minlength=4)
    assert counts[0] == counts[3] == 0
    assert abs(counts[2] / 4000 - 0.75) < 0.03
