"""Simulated prompts never make the host wait for the device: no value is read, no Python number is copied."""

from __future__ import annotations

import pytest
import torch
from drawn_masks import random_masks
from host_reads import host_traffic

from medsam2.prompts.initial import INITIAL_KINDS
from medsam2.prompts.scene import other_objects
from medsam2.prompts.settings import BoxSettings, PromptSettings, RecistSettings
from medsam2.prompts.simulate import correction_click, dense_prompts, initial_prompts

RECIPE = PromptSettings(click_candidates=3, box=BoxSettings(scale=0.1, grow=5), recist=RecistSettings(jitter=0.1))
KINDS = sorted(INITIAL_KINDS)


def simulate_all(kind: str, device: str) -> None:
    masks = random_masks(0).to(device) if device != "meta" else torch.empty(6, 32, 32, dtype=torch.bool, device="meta")
    seeds, owners = torch.arange(6, device=device), torch.arange(6, device=device) // 2
    with host_traffic() as traffic:
        others = other_objects(masks, owners, 3)
        initial_prompts(masks, kind, seeds, 0, RECIPE, others)
        correction_click(masks.roll(3, 1), masks, seeds, 0, 1, RECIPE)
        dense_prompts(masks, (8, 8), seeds, 0)
    assert not traffic.reads and not traffic.uploads, traffic


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_reads_a_value(kind: str) -> None:
    simulate_all(kind, "cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_simulated_where_there_are_no_values_to_read(kind: str) -> None:
    simulate_all(kind, "meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_synchronises_a_gpu(kind: str) -> None:
    simulate_all(kind, "cuda")  # warm up: the first use of a kernel may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks = torch.zeros(6, 32, 32, dtype=torch.bool, device="cuda")
        seeds = torch.arange(6, device="cuda")
        initial_prompts(masks, kind, seeds, 0, RECIPE, masks)
        correction_click(masks, masks, seeds, 0, 1, RECIPE)
        dense_prompts(masks, (8, 8), seeds, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_counter_sees_what_would_wait() -> None:
    values = torch.arange(4.0)
    faults = {
        "item": lambda: values[0].item(),
        "float": lambda: float(values[0]),
        "bool": lambda: bool(values[0] > 1),
        "tolist": lambda: values.tolist(),
        "numpy": lambda: values.numpy(),
        "boolean index": lambda: values[values > 1],
        "nonzero": lambda: (values > 1).nonzero(),
        "where": lambda: torch.where(values > 1),
        "masked_select": lambda: values.masked_select(values > 1),
        "unique": lambda: values.unique(),
        "equal": lambda: torch.equal(values, values),
        "repeat_interleave": lambda: values.repeat_interleave(torch.tensor([1, 2, 1, 1])),
    }
    for name, fault in faults.items():
        with host_traffic() as traffic:
            fault()
        assert traffic.reads, name
    with host_traffic() as traffic:
        torch.tensor([1.0, 2.0]) + values[torch.arange(2)]
    assert not traffic.reads and traffic.uploads
