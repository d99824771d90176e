"""Windows of tokens and their inverse, against the operators of torch."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medsam2.fast.encoder import join_padded_windows, join_windows, split_padded_windows, split_windows

SIDES = st.integers(1, 9)


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def padded(x: Tensor, edge: Tensor, side: int) -> Tensor:
    """`split_padded_windows` by concatenation."""
    rows, columns = -x.shape[1] % side, -x.shape[2] % side
    x = torch.cat([x, edge.expand(len(x), x.shape[1], columns, -1)], 2)
    x = torch.cat([x, edge.expand(len(x), rows, x.shape[2], -1)], 1)
    return split_windows(x, side)


@settings(deadline=None, max_examples=40)
@given(height=SIDES, width=SIDES, side=st.integers(1, 5))
def test_windows_beyond_the_grid_hold_the_edge_and_come_back(height: int, width: int, side: int) -> None:
    x, edge = tokens(2, height, width, 3), tokens(3)
    parts = split_padded_windows(x, edge, side)
    assert torch.equal(parts, padded(x, edge, side))
    assert torch.equal(join_padded_windows(parts, (height, width)), x)
    if not (height % side or width % side):
        assert torch.equal(parts, split_windows(x, side)) and torch.equal(join_windows(parts, (height, width)), x)


def test_gradients_of_windows_are_right() -> None:
    x, edge = tokens(1, 5, 4, 2).requires_grad_(), tokens(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, edge: split_padded_windows(x, edge, 3), (x, edge))
    parts = tokens(4, 3, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda parts: join_padded_windows(parts, (5, 4)), (parts,))
