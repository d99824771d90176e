"""Compute a step again that `guard.py` left out, and name the operation that made it go wrong.

from medsam2.training.replay import replay
print(replay("runs/first/bad/step-000012-rank-0.safetensors"))
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from medsam2.data.augment import AugmentedBatch
from medsam2.errors import UserError
from medsam2.model.adaptation import apply_adaptation
from medsam2.model.build import LoadedModel, ModelSpec, build_sam
from medsam2.model.losses import clip_loss
from medsam2.training.fit import find_module
from medsam2.training.guard import TENSORS, draws_of, gradient_norm, weights_name
from medsam2.training.module import FineTuner
from medsam2.training.settings import TrainSettings

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Replayed:
    """The step computed again.

    Attributes:
        loss: the batch's loss. norm: of its gradients, None where none could be computed.
        fault: the first module whose output was not finite, else the first operation whose gradient was not, as torch's
            anomaly mode names it; "" for none.
        said: the dump's header: step, rank, keys, datasets, names, plan, loss and norm in the run.
    """

    loss: float
    norm: float | None
    fault: str
    said: dict[str, Any]


def replay(dump: str | Path, device: str = "cpu", precision: str | None = None) -> Replayed:
    """The clip loss of a dumped batch and its gradients, with the weights that met it.

    Args:
        dump: a `step-*-rank-*.safetensors` in the `bad/` folder of a run, which must still hold its config.yaml.
        precision: another than the run's, such as "32-true", to see whether the fault is one of precision.

    Raises:
        UserError: a file is missing or damaged.
    """
    path = Path(dump)
    batch, said = read_batch(path)
    module = _module_of(path, int(said["step"])).to(device).train()
    batch = replace(batch, **{name: getattr(batch, name).to(device) for name in TENSORS})
    dtype = AUTOCAST.get(precision or str(said["precision"]))
    with torch.autocast(device, dtype, enabled=dtype is not None), first_bad_output(module) as bad:
        plan = module.plan(draws_of(module.settings, batch), batch)
        objects = torch.tensor(float(batch.num_objects), device=device)
        loss = clip_loss(module.track(batch, plan), batch.masks, module.settings.loss, objects).total
    fault = f"output of {bad[0]}" if bad else ""
    if not fault:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Anomaly Detection has been enabled")
                with torch.autograd.detect_anomaly(check_nan=True):
                    loss.backward()
        except RuntimeError as error:
            fault = str(error).splitlines()[0]
    return Replayed(float(loss.detach()), None if fault else float(gradient_norm(module.parameters())), fault, said)


@contextmanager
def first_bad_output(module: nn.Module) -> Iterator[list[str]]:
    """Collects the names of the modules whose outputs are not finite, in the order in which they were computed."""
    bad: list[str] = []

    def look(name: str, output: Any) -> None:
        values = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
        with torch.no_grad():  # else a checkpointed part would save more tensors now than when it is computed again
            if any(not bool(torch.isfinite(value).all()) for value in values):
                bad.append(name)

    hooks = [
        part.register_forward_hook(lambda _module, _inputs, output, name=name: look(name, output))
        for name, part in module.named_modules()
    ]
    try:
        yield bad
    finally:
        for hook in hooks:
            hook.remove()


def read_batch(path: Path) -> tuple[AugmentedBatch, dict[str, Any]]:
    """The batch of a dump and what its header says.

    Raises:
        UserError: no such file, or not a dump.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            said = json.loads((file.metadata() or {})["medsam2"])
            tensors = {name: file.get_tensor(name) for name in TENSORS}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a dumped batch ({error}); give a step-*-rank-*.safetensors of a run.") from None
    texts: dict[str, Any] = {name: tuple(said[name]) for name in ("keys", "datasets", "names", "modalities")}
    batch = AugmentedBatch(**tensors, **texts, step=said["batch_step"], prompt_frame=said["prompt_frame"])
    return batch, said


def _module_of(dump: Path, step: int) -> FineTuner:
    """The run's module with the weights of the step."""
    from safetensors.torch import load_file

    config, weights = dump.parent.parent / "config.yaml", dump.with_name(weights_name(step))
    for path in (config, weights):
        if not path.is_file():
            raise UserError(f"{path} is missing; a replay needs it beside {dump.name}.")
    settings = TrainSettings.model_validate(yaml.safe_load(config.read_text()))
    spec = ModelSpec(settings.model.name, settings.model.version, settings.model.image_size)
    sam = build_sam(spec)
    apply_adaptation(sam, settings.adaptation)
    sam.load_state_dict(load_file(weights))
    return find_module(settings.module)(LoadedModel(sam, spec, source=str(weights)), settings)
