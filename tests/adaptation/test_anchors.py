"""The starting values that a run is held to."""

from __future__ import annotations

import pytest
from torch import nn

from medsam2.adaptation.anchors import Anchors


def test_a_network_that_lacks_an_anchored_parameter_is_refused_and_not_held_in_part() -> None:
    anchors = Anchors(nn.Linear(2, 2))
    with pytest.raises(KeyError, match="bias"):
        anchors.pull(nn.Linear(2, 2, bias=False), {"weight": 0.5})
