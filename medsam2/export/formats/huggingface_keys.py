"""Names of weights: Meta's SAM 2 and transformers' `Sam2VideoModel`, strict in both directions.

Nearly every tensor has one name on each side; the table below turns Meta's into transformers'. Two places differ in
more than the name: transformers keeps the four point embeddings as one table, and the random matrix of the positional
encoding twice (`Sam2Model` and the prompt encoder each hold it). So 471 tensors of tiny become 469.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from medsam2.errors import UserError
from medsam2.model.checkpoint import shortened

MATRIX = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
MATRICES = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")
POINTS = tuple(f"sam_prompt_encoder.point_embeddings.{label}.weight" for label in range(4))
POINT_TABLE = "prompt_encoder.point_embed.weight"


def _downsampler_layer(match: re.Match[str]) -> str:
    """Convolution, norm, activation one after another in Meta's mask downsampler; layers of them in transformers'."""
    layer, part = divmod(int(match[1]), 3)
    return f"memory_encoder.mask_downsampler.layers.{layer}.{'layer_norm' if part else 'conv'}."


DEEP = r"(output_hypernetworks_mlps\.\d+|iou_prediction_head|pred_obj_score_head|obj_ptr_proj)"  # MLPs of three layers

# (Meta's, transformers') as regular expressions, applied one after another to every name
RENAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),
    (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
    (rf"{DEEP}\.layers\.0\.", r"\1.proj_in."),
    (rf"{DEEP}\.layers\.1\.", r"\1.layers.0."),
    (rf"{DEEP}\.layers\.2\.", r"\1.proj_out."),
    (r"^image_encoder\.trunk\.patch_embed\.proj\.", "vision_encoder.backbone.patch_embed.projection."),
    (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"^sam_prompt_encoder\.mask_downscaling\.0\.", "prompt_encoder.mask_embed.conv1."),
    (r"^sam_prompt_encoder\.mask_downscaling\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
    (r"^sam_prompt_encoder\.mask_downscaling\.3\.", "prompt_encoder.mask_embed.conv2."),
    (r"^sam_prompt_encoder\.mask_downscaling\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
    (r"^sam_prompt_encoder\.mask_downscaling\.6\.", "prompt_encoder.mask_embed.conv3."),
    (r"^sam_prompt_encoder\.", "prompt_encoder."),
    (r"^sam_mask_decoder\.output_upscaling\.0\.", "mask_decoder.upscale_conv1."),
    (r"^sam_mask_decoder\.output_upscaling\.1\.", "mask_decoder.upscale_layer_norm."),
    (r"^sam_mask_decoder\.output_upscaling\.3\.", "mask_decoder.upscale_conv2."),
    (r"^sam_mask_decoder\.", "mask_decoder."),
    (r"^memory_encoder\.mask_downsampler\.encoder\.12\.", "memory_encoder.mask_downsampler.final_conv."),
    (r"^memory_encoder\.mask_downsampler\.encoder\.(\d+)\.", _downsampler_layer),
    (r"^memory_encoder\.pix_feat_proj\.", "memory_encoder.feature_projection."),
    (r"^memory_encoder\.out_proj\.", "memory_encoder.projection."),
    (r"^memory_encoder\.fuser\.layers\.(\d+)\.gamma$", r"memory_encoder.memory_fuser.layers.\1.scale"),
    (r"^memory_encoder\.fuser\.", "memory_encoder.memory_fuser."),
    (r"\.dwconv\.", ".depthwise_conv."),
    (r"\.pwconv([12])\.", r".pointwise_conv\1."),
    (r"\.norm(\d?)\.", r".layer_norm\1."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
    (r"\.out_proj\.", ".o_proj."),
    (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
    (r"^no_mem_embed$", "no_memory_embedding"),
    (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
    (r"^no_obj_ptr$", "no_object_pointer"),
    (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
    (r"^obj_ptr_tpos_proj\.", "temporal_positional_encoding_projection_layer."),
    (r"^obj_ptr_proj\.", "object_pointer_proj."),
)


def name_map(official: Iterable[str]) -> dict[str, str]:
    """Meta's names to transformers', of the tensors that have one name on each side."""
    renamed = {name: name for name in official if name != MATRIX and name not in POINTS}
    for pattern, replacement in RENAMES:
        renamed = {name: re.sub(pattern, replacement, new) for name, new in renamed.items()}
    return renamed


def to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Meta's state dict as transformers': the same tensors under other names."""
    renamed = {new: state[old] for old, new in name_map(state).items()}
    renamed[POINT_TABLE] = torch.cat([state[name] for name in POINTS])
    renamed |= {name: state[MATRIX].clone() for name in MATRICES}  # safetensors refuses tensors that share memory
    return renamed


def from_huggingface(state: Mapping[str, Tensor], official: Iterable[str], source: str) -> dict[str, Tensor]:
    """transformers' state dict as Meta's.

    Args:
        official: the names that the network has (of its own state dict).
        source: for the error.

    Raises:
        UserError: a name is missing, or there is one more; the message counts them and names the first few.
    """
    names = list(official)
    renamed = name_map(names)
    # Files of `Sam2Model`s older than the shared matrix hold it once.
    expected = {*renamed.values(), POINT_TABLE, MATRICES[0]}
    missing, extra = sorted(expected - state.keys()), sorted(state.keys() - expected - {MATRICES[1]})
    if missing or extra:
        difference = f"lacks {len(missing)} of {len(expected)}" if missing else f"has {len(extra)} more"
        raise UserError(
            f"{source} {difference} tensors: {shortened(missing or extra)}. Is it a Sam2VideoModel? An image-only "
            "Sam2Model has no memory, so that it cannot follow anything through a volume."
        )
    back = {old: state[new] for old, new in renamed.items()}
    back |= {name: row[None] for name, row in zip(POINTS, state[POINT_TABLE], strict=True)}
    back[MATRIX] = state[MATRICES[0]]
    return {name: back[name] for name in names}
