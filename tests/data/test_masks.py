from __future__ import annotations

import numpy as np
import pytest
import torch

from medsam2.data.masks import PackedMasks, pack
from medsam2.data.memory import KEPT, Memory


@pytest.mark.parametrize("count", [1, 7, 8, 9, 20])
def test_packed_masks_come_back_as_they_went(count: int) -> None:
    masks = torch.rand(count, 3, 6, 5, generator=torch.Generator().manual_seed(count)) > 0.7
    masks[0, 1] = False
    packed = PackedMasks(pack(masks), count)
    assert packed.bits.shape == ((count + 7) // 8, 3, 6, 5) and packed.size == (6, 5)
    assert torch.equal(packed.unpack(), masks)
    assert torch.equal(packed.object(count - 1), masks[-1])
    for frame in range(3):
        assert torch.equal(packed.present(frame), masks[:, frame].flatten(1).any(1))


def test_memory_is_used_again_when_nobody_refers_to_it_and_not_before() -> None:
    memory = Memory()
    first = torch.from_numpy(memory.empty((4, 1000), np.float32))
    place = first.data_ptr()
    second = memory.empty((4, 1000), np.float32)
    assert second.ctypes.data != place
    view = first[1:, :10]
    del first
    assert memory.empty((4, 1000), np.float32).ctypes.data != place, "a view of it is still there"
    del view
    again = memory.empty((3, 1200), np.float32)
    assert again.ctypes.data == place and again.shape == (3, 1200)


def test_memory_that_autograd_has_saved_is_not_used_again() -> None:
    memory = Memory()
    weight = torch.ones(8, requires_grad=True)
    values = torch.from_numpy(memory.empty((8,), np.float32)).fill_(3.0)
    result = (weight * values).sum()
    del values
    memory.empty((8,), np.float32)[:] = 7.0
    result.backward()
    assert weight.grad is not None and weight.grad.tolist() == [3.0] * 8


def test_memory_keeps_a_few_arrays_only() -> None:
    memory = Memory()
    held = [memory.empty((size,), np.uint8) for size in range(100, 100 + 3 * KEPT)]
    assert len(memory._arrays) == KEPT and len({array.ctypes.data for array in held}) == 3 * KEPT
