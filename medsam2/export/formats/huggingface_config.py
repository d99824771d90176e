"""The configuration files of a Hugging Face folder, made from the network's own configuration.

transformers loads a folder whose sizes are wrong without a word (the weights of SAM 2 do not depend on the side of the
input) and then gives other masks, so every entry that a size or a width enters is set here, also where it equals
transformers' default.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsam2.model.build import ModelSpec, import_sam2, model_config
from medsam2.pixels import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from transformers import Sam2VideoConfig

DECODER_MLP = 2048  # built into the package's `SAM2Base`, whatever the width
DECODER_HEADS = 8
IOU_HEAD = 256
PATCH = 16  # px of the input that one cell of the image embedding covers
FIRST_STRIDE = 4  # the stride of the finest feature map, and of the masks that come out


def video_config(spec: ModelSpec) -> Sam2VideoConfig:
    """The configuration of `Sam2VideoModel` for a network; `Sam2Model` reads the same file."""
    from transformers import Sam2VideoConfig

    config, side = model_config(spec), spec.image_size
    width = config["image_encoder"]["neck"]["d_model"]
    attention, layer = config["memory_attention"], config["memory_attention"]["layer"]
    encoder = config["memory_encoder"]
    fuser = encoder["fuser"]["layer"]
    pointers = bool(config["add_tpos_enc_to_obj_ptrs"])  # what SAM 2.1 added to 2.0
    return Sam2VideoConfig(
        vision_config=_vision(config, side),
        prompt_encoder_config={"hidden_size": width, "image_size": side, "patch_size": PATCH},
        mask_decoder_config={
            "hidden_size": width,
            "mlp_dim": DECODER_MLP,
            "num_attention_heads": DECODER_HEADS,
            "iou_head_hidden_dim": IOU_HEAD,
            "dynamic_multimask_via_stability": True,
            "dynamic_multimask_stability_delta": 0.05,
            "dynamic_multimask_stability_thresh": 0.98,
        },
        image_size=side,
        num_maskmem=config["num_maskmem"],
        sigmoid_scale_for_mem_enc=config["sigmoid_scale_for_mem_enc"],
        sigmoid_bias_for_mem_enc=config["sigmoid_bias_for_mem_enc"],
        enable_occlusion_spatial_embedding=bool(config.get("no_obj_embed_spatial")),
        enable_temporal_pos_encoding_for_object_pointers=pointers,
        multimask_output_in_sam=config["multimask_output_in_sam"],
        multimask_min_pt_num=config["multimask_min_pt_num"],
        multimask_max_pt_num=config["multimask_max_pt_num"],
        multimask_output_for_tracking=config["multimask_output_for_tracking"],
        memory_attention_hidden_size=attention["d_model"],
        memory_attention_num_layers=attention["num_layers"],
        memory_attention_num_attention_heads=layer["self_attention"]["num_heads"],
        memory_attention_downsample_rate=layer["self_attention"]["downsample_rate"],
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
        memory_fuser_kernel_size=fuser["kernel_size"],
        memory_fuser_padding=fuser["padding"],
        memory_fuser_layer_scale_init_value=float(fuser["layer_scale_init_value"]),
        architectures=["Sam2VideoModel"],
        dtype="float32",
    )


def _vision(config: dict[str, Any], side: int) -> dict[str, Any]:
    """The image encoder: Hiera's four stages, each twice as wide and with twice the heads, and the feature pyramid."""
    trunk, neck = _hiera_defaults() | config["image_encoder"]["trunk"], config["image_encoder"]["neck"]
    stages = len(trunk["stages"])
    return {
        "model_type": "sam2_vision_model",
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": trunk["embed_dim"],
            "num_attention_heads": trunk["num_heads"],
            "image_size": [side, side],
            "blocks_per_stage": list(trunk["stages"]),
            "embed_dim_per_stage": [trunk["embed_dim"] * 2**stage for stage in range(stages)],
            "num_attention_heads_per_stage": [trunk["num_heads"] * 2**stage for stage in range(stages)],
            "window_size_per_stage": list(trunk["window_spec"]),
            "global_attention_blocks": list(trunk["global_att_blocks"]),
            "window_positional_embedding_background_size": list(trunk["window_pos_embed_bkg_spatial_size"]),
        },
        "backbone_channel_list": list(neck["backbone_channel_list"]),
        "backbone_feature_sizes": [[side // stride] * 2 for stride in (4, 8, 16)],
        "fpn_hidden_size": neck["d_model"],
        "fpn_top_down_levels": list(neck["fpn_top_down_levels"]),
    }


def _hiera_defaults() -> dict[str, Any]:
    """What Hiera's constructor takes where a yaml says nothing (base_plus leaves its stages to it)."""
    hiera = import_sam2("sam2.modeling.backbones.hieradet").Hiera
    return {name: parameter.default for name, parameter in inspect.signature(hiera).parameters.items()}


def write_configs(folder: Path, spec: ModelSpec) -> None:
    """config.json, and the processors' files: one for `Sam2VideoProcessor` and `Sam2Processor`, one each for its parts.

    The parts' own files are what transformers before version 5 reads.
    """
    from transformers import Sam2ImageProcessor, Sam2VideoProcessor, Sam2VideoVideoProcessor

    side = {"height": spec.image_size, "width": spec.image_size}
    mask = {"height": spec.image_size // FIRST_STRIDE, "width": spec.image_size // FIRST_STRIDE}
    pixels: dict[str, Any] = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
    image = Sam2ImageProcessor(size=side, mask_size=mask, **pixels)
    video = Sam2VideoVideoProcessor(size=side, **pixels)
    video_config(spec).save_pretrained(folder)
    image.save_pretrained(folder)
    video.save_pretrained(folder)
    Sam2VideoProcessor(image, video, target_size=spec.image_size).save_pretrained(folder)
