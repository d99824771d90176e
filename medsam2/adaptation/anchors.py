"""The starting values of everything that is trained: what a run is held to, compared with and interpolated from.

Only trained parameters are copied. Where adapters alone are trained that is megabytes: at their starting values they
change nothing, so the network with them is the base. Frozen parameters are shared, never copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from medsam2.adaptation.lora import adapter_names, base_state, official_name


class Anchors:
    """The values that the trained parameters (`requires_grad`) of `sam` have now.

    Make it once the adaptation is applied and before a checkpoint of an interrupted run is loaded.

    Args:
        sam: the network; it is not held.
    """

    def __init__(self, sam: nn.Module) -> None:
        self.values = {
            name: parameter.detach().clone() for name, parameter in sam.named_parameters() if parameter.requires_grad
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> Anchors:
        """Itself: a copy of the module that holds it (a moving average's) has the same start."""
        return self

    def to(self, device: torch.device) -> None:
        """Move the values to where the network is."""
        self.values = {name: value.to(device) for name, value in self.values.items()}

    @contextmanager
    def at_start(self, sam: nn.Module) -> Iterator[None]:
        """Inside, `sam` computes with the starting values; afterwards with its current ones. Nothing is copied.

        Graphs that autograd built before must not be used inside, nor those built inside afterwards.
        """
        parameters = self._parameters(sam)
        current = {name: parameter.data for name, parameter in parameters.items()}
        torch.clear_autocast_cache()  # it holds casts by parameter, which would be those of the other values
        try:
            for name, parameter in parameters.items():
                parameter.data = self.values[name]
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = current[name]
            torch.clear_autocast_cache()

    @torch.no_grad()
    def pull(self, sam: nn.Module, shares: dict[str, float]) -> None:
        """Move each trained parameter by its share (0 to 1) of the way back to the start, in place."""
        for name, parameter in self._parameters(sam).items():
            if shares.get(name, 0.0) > 0:
                parameter.lerp_(self.values[name], min(shares[name], 1.0))

    def start_state(self, sam: nn.Module) -> dict[str, Tensor]:
        """SAM 2's state dict at the start: official names, adapters left out, detached."""
        adapters = adapter_names([name for name, _ in sam.named_parameters()])
        trained = {official_name(name): value for name, value in self.values.items() if name not in adapters}
        return {**base_state(sam), **trained}

    def _parameters(self, sam: nn.Module) -> dict[str, nn.Parameter]:
        parameters = dict(sam.named_parameters())
        return {name: parameters[name] for name in self.values}  # a KeyError for a network that lacks one
