"""Counter-based random numbers: repeatable, independent of the batch, and uniform."""

import torch

from medsam2.prompts.randomness import Draws, normal, uniform


def test_an_object_gets_the_same_numbers_in_any_batch() -> None:
    seeds = torch.arange(50) * 12345
    together = uniform(seeds, stream=3, count=4)
    alone = torch.cat([uniform(seed[None], stream=3, count=4) for seed in seeds])
    assert torch.equal(together, alone)


def test_streams_and_seeds_give_different_numbers() -> None:
    seeds = torch.arange(1000)
    assert not torch.equal(uniform(seeds, 1), uniform(seeds, 2))
    assert len(torch.unique(uniform(seeds, 1, 4))) > 3990


def test_numbers_are_uniform_and_normal() -> None:
    seeds = torch.arange(20000)
    numbers = uniform(seeds, 7, 2)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert torch.allclose(numbers.mean(0), torch.tensor([0.5, 0.5]), atol=0.01)
    assert abs(torch.corrcoef(numbers.T)[0, 1]) < 0.03
    bell = normal(seeds, 8, 1)
    assert abs(bell.mean()) < 0.02 and abs(bell.std() - 1) < 0.02


def test_draws_depend_on_seed_and_step_alone() -> None:
    def numbers(seed: int, step: int) -> list[float]:
        draws = Draws(seed, step)
        return [draws.number() for _ in range(5)]

    assert numbers(1, 2) == numbers(1, 2)
    assert numbers(1, 2) != numbers(1, 3)
    assert numbers(1, 2) != numbers(2, 2)


def test_choice_follows_the_weights() -> None:
    picked = [Draws(0, step).choice({"mask": 0.5, "box": 0.25, "click": 0.25, "never": 0.0}) for step in range(4000)]
    assert abs(picked.count("mask") / 4000 - 0.5) < 0.03
    assert abs(picked.count("box") / 4000 - 0.25) < 0.03
    assert "never" not in picked


def test_sample_has_no_repeats_and_is_sorted() -> None:
    for step in range(50):
        sample = Draws(3, step).sample(list(range(6)), 4)
        assert sample == sorted(set(sample)) and len(sample) == 4
