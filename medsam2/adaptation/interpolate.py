"""Interpolate between two checkpoints of one network (Wortsman et al. 2022, "Robust fine-tuning", arXiv 2109.01903).

Weights between the start and the end of a fine-tuning often retain most of its gain and most of the earlier ability.
Both must lie in one basin of the loss, so the end must have been trained from the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from medsam2.errors import UserError
from medsam2.files import atomic_write
from medsam2.model.build import LoadedModel
from medsam2.model.provenance import Provenance


def interpolate(start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Interpolate linearly from `start` (share 0) to `end` (share 1) in float32; 0 and 1 give both exactly.

    Tensors that are not floating point are copied from `end`.

    Raises:
        UserError: names or shapes differ.
    """
    differing = sorted({*start} ^ {*end}) or sorted(name for name in start if start[name].shape != end[name].shape)
    if differing:
        raise UserError(
            f"start and end are different networks: they differ in {', '.join(differing[:3])} ({len(differing)} in "
            "total); give two checkpoints of the same size and version."
        )
    return {
        name: torch.lerp(value.detach().float(), end[name].detach().float(), share)
        if end[name].is_floating_point()
        else end[name].clone()
        for name, value in start.items()
    }


def check_shares(shares: Sequence[float]) -> tuple[float, ...]:
    """Return the shares in ascending order, without duplicates.

    Raises:
        UserError: there are no shares, or one is outside 0 to 1.
    """
    if not shares:
        raise UserError("there are no shares; give some between 0 (start) and 1 (end), such as 0.3,0.5,0.7.")
    for share in shares:
        if not 0 <= share <= 1:
            raise UserError(f"the share {share:g} is not between 0 (start) and 1 (end); give for example 0.3,0.5,0.7.")
    return tuple(sorted(set(shares)))


def save_interpolated(path: Path, state: Mapping[str, Tensor], provenance: Provenance) -> None:
    """Write weights and their metadata."""
    with atomic_write(path) as file:
        torch.save({"model": dict(state), "medsam2": provenance.to_dict()}, file)


def interpolated_provenance(start: LoadedModel, end: LoadedModel, share: float) -> Provenance:
    """Return the metadata of an interpolated checkpoint: that of the end, with the cases and datasets of both.

    Raises:
        UserError: size or version differ.
    """
    if (start.spec.name, start.spec.version) != (end.spec.name, end.spec.version):
        raise UserError(
            f"{start.source} is {start.spec.name} {start.spec.version}, {end.source} is {end.spec.name} "
            f"{end.spec.version}; only checkpoints of one size and version can be interpolated."
        )
    first, last = start.provenance, end.provenance
    update = {
        "spec": end.spec,
        "content_hashes": tuple(sorted({*first.content_hashes, *last.content_hashes})),
        "datasets": {**first.datasets, **last.datasets},
        "adapter": None,  # loading has merged it
        "interpolated": float(share),
    }
    return last.model_copy(update=update)
