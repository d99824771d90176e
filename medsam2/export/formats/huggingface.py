"""The Hugging Face format: a folder that `Sam2VideoModel`, `Sam2Model` and their processors load by its path.

transformers loads a folder whose sizes are wrong without a word (the weights of SAM 2 do not depend on the side of the
input) and then gives other masks, so every entry that a size or a width enters is set here. What is the same for all
networks is transformers' default; the export's check sees when that changes.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medsam2.errors import UserError
from medsam2.export.formats.exporter import Exporter, shareable
from medsam2.export.formats.huggingface_keys import to_huggingface
from medsam2.export.verify.run import Consumer
from medsam2.files import atomic_write
from medsam2.model.build import LoadedModel, ModelSpec, import_sam2, model_config
from medsam2.pixels import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from transformers import Sam2VideoConfig

FIRST_STRIDE = 4  # the stride of the finest feature map, and of the masks that come out
MAX_LOGIT_DIFFERENCE = 0.01
"""Memories are kept in bfloat16 on both sides, so that one rounding on the way of a clip shows here; the masks (logits
above 0) must agree all the same."""
MIN_IOU_FROM_MASK = 0.9
"""transformers treats a mask prompt in two ways unlike Meta's predictor and ours: it keeps the mask in memory at the
whole side instead of a quarter (other pixels on the outline), and makes the object pointer from the best of three
candidates instead of the single mask. Logits then differ by tenths in any case."""


class HuggingFaceExporter(Exporter):
    """Configurations and weights, as transformers' own `save_pretrained` would name them."""

    title, library, tags = "transformers (`Sam2VideoModel`, `Sam2Model`)", "transformers", ("safetensors",)

    def build(self, model: LoadedModel, folder: Path) -> None:
        from safetensors.torch import save

        try:
            write_configs(folder, model.spec)
        except ImportError as error:
            raise UserError(
                f"the installed transformers has no SAM 2 ({error}): pip install 'transformers>=4.56'."
            ) from None
        # Readers compute in float32 either way: config.json asks for it.
        dtype = torch.bfloat16 if model.provenance.dtype == "bf16" else torch.float32
        state = {key: value.detach().cpu().to(dtype) for key, value in model.sam.state_dict().items()}
        tensors = {key: value.contiguous() for key, value in to_huggingface(state).items()}
        header = {"format": "pt", "medsam2": json.dumps(shareable(model).to_dict(), sort_keys=True)}
        with atomic_write(folder / "model.safetensors") as file:
            file.write(save(tensors, metadata=header))

    def load_as_consumer(self, model: LoadedModel, folder: Path, scratch: Path) -> Consumer:
        return Consumer(
            "transformers",
            "huggingface_consumer.py",
            (folder,),
            "strictly, by transformers in a process without medsam2",
            max_logit_difference=MAX_LOGIT_DIFFERENCE,
            min_iou_from_mask=MIN_IOU_FROM_MASK,
        )


def write_configs(folder: Path, spec: ModelSpec) -> None:
    """config.json, and the processors' files: one for `Sam2VideoProcessor` and `Sam2Processor`, one each for its parts.

    The parts' own files are what transformers before version 5 reads.
    """
    from transformers import Sam2ImageProcessor, Sam2VideoProcessor, Sam2VideoVideoProcessor

    side = {"height": spec.image_size, "width": spec.image_size}
    mask = {key: value // FIRST_STRIDE for key, value in side.items()}
    pixels: dict[str, Any] = {"size": side, "image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
    image, video = Sam2ImageProcessor(mask_size=mask, **pixels), Sam2VideoVideoProcessor(**pixels)
    for part in (video_config(spec), image, video, Sam2VideoProcessor(image, video, target_size=spec.image_size)):
        part.save_pretrained(folder)


def video_config(spec: ModelSpec) -> Sam2VideoConfig:
    """The configuration of `Sam2VideoModel` for a network; `Sam2Model` reads the same file."""
    from transformers import Sam2VideoConfig

    config, side = model_config(spec), spec.image_size
    width = config["image_encoder"]["neck"]["d_model"]
    attention, layer = config["memory_attention"], config["memory_attention"]["layer"]
    encoder = config["memory_encoder"]
    fuser = encoder["fuser"]["layer"]
    return Sam2VideoConfig(
        vision_config=_vision(config, side),
        prompt_encoder_config={"hidden_size": width, "image_size": side},
        mask_decoder_config={"hidden_size": width},
        image_size=side,
        enable_occlusion_spatial_embedding=bool(config.get("no_obj_embed_spatial")),
        enable_temporal_pos_encoding_for_object_pointers=bool(config["add_tpos_enc_to_obj_ptrs"]),
        memory_attention_hidden_size=attention["d_model"],
        memory_attention_num_layers=attention["num_layers"],
        memory_attention_feed_forward_hidden_size=layer["dim_feedforward"],
        memory_attention_dropout=layer["dropout"],
        memory_attention_rope_feat_sizes=[spec.embedding_side] * 2,
        memory_attention_rope_dropout=layer["self_attention"]["dropout"],
        memory_encoder_hidden_size=width,
        memory_encoder_output_channels=encoder["out_dim"],
        mask_downsampler_embed_dim=encoder["mask_downsampler"].get("embed_dim", width),
        memory_fuser_num_layers=encoder["fuser"]["num_layers"],
        memory_fuser_embed_dim=fuser["dim"],
        memory_fuser_intermediate_dim=4 * fuser["dim"],
        architectures=["Sam2VideoModel"],
        dtype="float32",
    )


def _vision(config: dict[str, Any], side: int) -> dict[str, Any]:
    """The image encoder: Hiera's four stages, each twice as wide and with twice the heads, and the feature pyramid."""
    # base_plus leaves its stages to the defaults of the constructor.
    hiera = inspect.signature(import_sam2("sam2.modeling.backbones.hieradet").Hiera).parameters
    trunk = {name: one.default for name, one in hiera.items()} | config["image_encoder"]["trunk"]
    neck = config["image_encoder"]["neck"]
    scales = [2**stage for stage in range(len(trunk["stages"]))]
    return {
        "model_type": "sam2_vision_model",
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": trunk["embed_dim"],
            "num_attention_heads": trunk["num_heads"],
            "image_size": [side, side],
            "blocks_per_stage": list(trunk["stages"]),
            "embed_dim_per_stage": [trunk["embed_dim"] * scale for scale in scales],
            "num_attention_heads_per_stage": [trunk["num_heads"] * scale for scale in scales],
            "window_size_per_stage": list(trunk["window_spec"]),
            "global_attention_blocks": list(trunk["global_att_blocks"]),
            "window_positional_embedding_background_size": list(trunk["window_pos_embed_bkg_spatial_size"]),
        },
        "backbone_channel_list": list(neck["backbone_channel_list"]),
        "backbone_feature_sizes": [[side // stride] * 2 for stride in (4, 8, 16)],
        "fpn_hidden_size": neck["d_model"],
        "fpn_top_down_levels": list(neck["fpn_top_down_levels"]),
    }
