"""Meta's training step on one clip, as one line of JSON. `train_step.py` runs it in a separate process.

`SAM2Train` and `MultiStepMultiMasksAndIous` of sam2 1.1.0 with the settings of `sam2.1_hiera_b+_MOSE_finetune.yaml` for
hiera tiny. Random choices are fixed, so that all steps are equal: a click on the first frame, corrections on two
frames.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import train_work

PEERS = Path(__file__).resolve().parents[1] / "build" / "peers"
RECIPE = {
    "prob_to_use_pt_input_for_train": 1.0,
    "prob_to_sample_from_gt_for_train": 0.1,
    "num_frames_to_correct_for_train": 2,
    "add_all_frames_to_correct_as_cond": True,
    "num_correction_pt_per_frame": train_work.CORRECTIONS,
}


def main() -> None:
    work = train_work.given()
    source = next(iter(sorted(PEERS.glob("sam2-*/training"))), None)
    if source is None:
        sys.exit(f"{PEERS}: holds no sam2-*/training, the package to compare with; run `make peers` first.")
    import torch

    from medsam2.fast.execution import set_attention_dropout
    from medsam2.model.build import ModelSpec, build_sam, import_sam2

    import_sam2()
    sys.path += [str(source.parent), str(PEERS / "site")]
    # the losses import one name from Meta's trainer, which needs tensorboard
    sys.modules["training.trainer"] = ModuleType("training.trainer")
    sys.modules["training.trainer"].CORE_LOSS_KEY = "core_loss"  # type: ignore[attr-defined]
    from training.loss_fns import MultiStepMultiMasksAndIous
    from training.model import sam2 as _  # noqa: F401 (its import is part of an idle process)

    idle = train_work.peak_mb()
    spec = ModelSpec("hiera_tiny", image_size=work.side)
    recipe = {**RECIPE, "freeze_image_encoder": work.frozen}
    sam: Any = build_sam(spec, target="training.model.sam2.SAM2Train", overrides=recipe)
    sam.load_state_dict(torch.load(work.weights, weights_only=True)["model"], strict=True)
    sam.to(work.device).train()
    set_attention_dropout(sam, work.dropout)
    frames, masks = train_work.clip(work)
    times = torch.arange(work.frames, device=work.device)[:, None].expand(work.frames, work.objects)
    batch = SimpleNamespace(
        flat_img_batch=frames, num_frames=work.frames, masks=masks.transpose(0, 1), flat_obj_to_img_idx=times
    )
    weights = {"loss_mask": 20, "loss_dice": 1, "loss_iou": 1, "loss_class": 1}
    criterion = MultiStepMultiMasksAndIous(weights, supervise_all_iou=True, iou_use_l1_loss=True, pred_obj_scores=True)
    optimizer = torch.optim.AdamW(sam.parameters(), lr=1e-6, weight_decay=0.1)
    prepare = sam.prepare_prompt_inputs

    def prepared(*arguments: Any) -> dict[str, Any]:
        plan: dict[str, Any] = prepare(*arguments)
        return {**plan, "frames_to_add_correction_pt": work.corrected}

    sam.prepare_prompt_inputs = prepared
    train_work.measure(work, idle, lambda: criterion(sam(batch), batch.masks)["core_loss"], sam, optimizer)


if __name__ == "__main__":
    main()
