from __future__ import annotations

import numpy as np
import pytest
import torch
from packed import pack

from medsam2.data.batch import PackedMasks, pack_labels


@pytest.mark.parametrize("count", [1, 7, 8, 9, 20])
def test_packed_masks_come_back_as_they_went(count: int) -> None:
    masks = torch.rand(count, 3, 6, 5, generator=torch.Generator().manual_seed(count)) > 0.7
    masks[0, 1] = False
    packed = PackedMasks(pack(masks), count)
    assert packed.bits.shape == ((count + 7) // 8, 3, 6, 5)
    assert torch.equal(packed.unpack(), masks)
    assert torch.equal(packed.object(count - 1), masks[-1])
    for frame in range(3):
        assert torch.equal(packed.present(frame), masks[:, frame].flatten(1).any(1))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("count", [1, 2, 5, 6, 8])
@pytest.mark.parametrize("width", [16, 13])
def test_labels_become_the_bits_of_their_objects(dtype: type, count: int, width: int) -> None:
    """Whether objects are compared or looked up, lie in one plane or in two, and whatever the width."""
    rng = np.random.default_rng(count)
    labels = rng.integers(0, 10, (2, 12, width)).astype(dtype)
    labels[:, :3] = labels[:, 9:] = 0
    for planes in ((0,) * count, tuple(i % 2 for i in range(count))):
        pairs = list(zip(planes, range(1, count + 1), strict=True))
        out = pack_labels(labels, pairs)
        for bit, (plane, value) in enumerate(pairs):
            assert np.array_equal(out >> bit & 1, labels[plane] == value)
        assert not (out >> count).any()
