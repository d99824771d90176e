"""Starting values of the trained parameters, used to regularise a run, as a teacher, and to interpolate weights.

Only trained parameters are copied; frozen parameters are shared. If only adapters are trained, the copies take
megabytes: adapters at their starting values change nothing, so that the network with them equals the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from medsam2.adaptation.lora import adapter_names, base_state, official_name


class Anchors:
    """A copy of the current values of the trained parameters (`requires_grad`) of `sam`.

    Create it after the adaptation is applied and before the checkpoint of an interrupted run is loaded.

    Args:
        sam: the network; no reference to it is stored.
    """

    def __init__(self, sam: nn.Module) -> None:
        self.values = {
            name: parameter.detach().clone() for name, parameter in sam.named_parameters() if parameter.requires_grad
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> Anchors:
        """Return `self`: a copy of the module, as for a moving average, has the same starting values."""
        return self

    def to(self, device: torch.device) -> None:
        """Move the values to the network's device."""
        self.values = {name: value.to(device) for name, value in self.values.items()}

    @contextmanager
    def at_start(self, sam: nn.Module) -> Iterator[None]:
        """Let `sam` compute with the starting values inside the context, without copying them.

        Do not use an autograd graph across the border of the context: neither graphs built before it inside, nor
        graphs built inside afterwards.
        """
        parameters = self._parameters(sam)
        current = {name: parameter.data for name, parameter in parameters.items()}
        torch.clear_autocast_cache()  # autocast caches casts per parameter, whatever its values
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
        """Move each trained parameter in place towards its starting value, by its share (0 to 1) of the distance."""
        for name, parameter in self._parameters(sam).items():
            if shares.get(name, 0.0) > 0:
                parameter.lerp_(self.values[name], min(shares[name], 1.0))

    def start_state(self, sam: nn.Module) -> dict[str, Tensor]:
        """Return SAM 2's state dict with the starting values: official names, without adapters, detached."""
        in_adapter = adapter_names([name for name, _ in sam.named_parameters()])
        trained = {official_name(name): value for name, value in self.values.items() if name not in in_adapter}
        return {**base_state(sam), **trained}

    def _parameters(self, sam: nn.Module) -> dict[str, nn.Parameter]:
        parameters = dict(sam.named_parameters())
        return {name: parameters[name] for name in self.values}  # a KeyError for a network that lacks one
