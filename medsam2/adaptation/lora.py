"""LoRA and DoRA on SAM 2's linear layers by the peft library, and the conversion back to official weights.

peft replaces each targeted `nn.Linear` by an adapter layer that holds it as `base_layer`, which renames keys:
`...qkv.weight` becomes `...qkv.base_layer.weight`. A run therefore exports either official weights (`official_state`)
or the adapter alone (`adapter_state`); both leave the model in training unchanged.

LoRA: Hu et al., arXiv 2106.09685; DoRA: 2402.09353; rank-stabilised: 2312.03732. Other methods of peft are reached by
`PeftSettings.config`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

from medsam2.errors import UserError, did_you_mean

TARGETS: dict[str, str] = {
    "image_encoder": r"image_encoder\.trunk\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.layers\.[01]|proj)",
    "memory_attention": r"memory_attention\.layers\.\d+\.((self_attn|cross_attn_image)\.(q|k|v|out)_proj|linear[12])",
    "mask_decoder": r"sam_mask_decoder\.transformer\..*(_proj|mlp\.layers\.[01])",
}
ADAPTER_NAME = "default"  # peft's default name, so that peft loads saved files without further arguments
BASE = ".base_layer."


class PeftSettings(BaseModel):
    """Settings of adapters: small trained layers beside frozen ones.

    Attributes:
        method: lora, or dora (LoRA that trains the norm of each output's weights separately).
        targets: image_encoder, memory_attention, mask_decoder (their attention and feed-forward layers), or regular
            expressions that match full names of linear layers.
        r: rank; the number of parameters grows with it.
        alpha: the update is scaled by alpha / r.
        dropout: dropout probability of the adapter's input.
        rslora: scale by alpha / sqrt(r) instead, so that large ranks learn as fast.
        config: any other configuration of peft, which replaces method, r, alpha, dropout and rslora:
            {_target_: peft.LoHaConfig, r: 8, alpha: 16}. `targets` still selects the layers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["lora", "dora"] = "lora"
    targets: tuple[str, ...] = Field(("image_encoder",), min_length=1)
    r: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    rslora: bool = False
    config: dict[str, Any] | None = None

    @property
    def method_name(self) -> str:
        """Name of the method: lora, dora, or peft's name for the method of `config` (LoHa, IA3, ...)."""
        return str(self.config["_target_"]).removeprefix("peft.").removesuffix("Config") if self.config else self.method

    @model_validator(mode="before")
    @classmethod
    def _read_version_0_1(cls, values: Any) -> Any:
        """Convert settings of version 0.1, which had four more methods (`config` now) and a `block_size` for one."""
        if not isinstance(values, dict) or "block_size" not in values:
            return values
        values = dict(values)
        block_size, r, alpha, dropout = values.pop("block_size"), values["r"], values["alpha"], values["dropout"]
        retired: dict[str, dict[str, Any]] = {
            "loha": {"_target_": "peft.LoHaConfig", "r": r, "alpha": alpha, "rank_dropout": dropout},
            "lokr": {"_target_": "peft.LoKrConfig", "r": r, "alpha": alpha, "rank_dropout": dropout},
            "ia3": {"_target_": "peft.IA3Config", "feedforward_modules": []},
            "oft": {"_target_": "peft.OFTConfig", "r": 0, "oft_block_size": block_size, "module_dropout": dropout},
        }
        if values["method"] in retired:
            values |= {"method": "lora", "config": retired[values["method"]]}
        return values

    @field_validator("config")
    @classmethod
    def _is_a_class_of_peft(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        """Accept only classes of peft, because untrusted checkpoints contain these settings."""
        if value is not None and not re.fullmatch(r"peft\.[A-Z]\w*Config", str(value.get("_target_"))):
            raise ValueError("its _target_ must be a configuration class of peft, such as peft.LoHaConfig")
        return value

    @property
    def pattern(self) -> str:
        """Regular expression for the full names of all targeted layers."""
        return "|".join(f"({TARGETS.get(target, target)})" for target in self.targets)


def peft_config(settings: PeftSettings, inference: bool = False) -> Any:
    """Return the `peft.PeftConfig` of `settings`; set `inference` for a saved adapter_config.json.

    Raises:
        UserError: peft has no such class, or the class does not take these arguments.
    """
    import peft  # takes seconds, and few runs need it

    common: dict[str, Any] = {"target_modules": settings.pattern, "inference_mode": inference}
    if settings.config is None:
        return peft.LoraConfig(
            r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, use_rslora=settings.rslora,
            use_dora=settings.method == "dora", **common,
        )  # fmt: skip
    arguments = {key: value for key, value in settings.config.items() if key != "_target_"}
    try:
        return getattr(peft, settings.config["_target_"].removeprefix("peft."))(**arguments, **common)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"adaptation.peft.config={settings.config}: {error}; see peft's documentation.") from None


# --------------------------------------------------------------------------------------------- into the model


def inject(sam: nn.Module, settings: PeftSettings, trained: Collection[str] = ()) -> None:
    """Inject adapters into the targeted layers of `sam`, in place; afterwards only the adapters are trained.

    peft initialises adapters such that the output stays the same until the first optimiser step.

    Args:
        trained: official names of parameters that are trained in full, which must not include targeted weights.

    Raises:
        UserError: a target matches no layer, a layer that is not linear, or one that is trained in full; or `sam`
            already has an adapter.
    """
    from peft import inject_adapter_in_model

    if has_adapter(sam):
        raise UserError("the model has an adapter already; merge it before another one is added.")
    for name in targeted_layers(sam, settings):
        if f"{name}.weight" in trained:
            raise UserError(
                f"adaptation: {name} has an adapter and is trained in full; take it out of "
                "adaptation.peft.targets or out of adaptation.train (or add it to adaptation.freeze)."
            )
    inject_adapter_in_model(peft_config(settings), sam, ADAPTER_NAME)


def targeted_layers(sam: nn.Module, settings: PeftSettings) -> list[str]:
    """Return the full names of the linear layers that `settings.targets` select, in the order of the model.

    Raises:
        UserError: see `inject`.
    """
    modules = dict(sam.named_modules())
    selected: set[str] = set()
    for target in settings.targets:
        try:
            matched = [name for name in modules if re.fullmatch(TARGETS.get(target, target), name)]
        except re.error as error:
            raise UserError(f"adaptation.peft.targets: {target!r} is not a regular expression: {error}.") from None
        if not matched:
            raise UserError(
                f"adaptation.peft.targets: {target!r} matches no layer; give {', '.join(TARGETS)} or a regular "
                f"expression of full layer names.{did_you_mean(target, TARGETS)}"
            )
        for name in matched:
            if not isinstance(modules[name], nn.Linear):
                raise UserError(
                    f"adaptation.peft.targets: {target!r} matches {name}, a {type(modules[name]).__name__}; only "
                    "linear layers are adapted, so make the expression match those alone."
                )
        selected.update(matched)
    return [name for name in modules if name in selected]


# ----------------------------------------------------------------------------------------------------- names


def has_adapter(sam: nn.Module) -> bool:
    """Return whether `sam` has an adapter."""
    return is_adapted(name for name, _ in sam.named_parameters())


def is_adapted(keys: Iterable[str]) -> bool:
    """Return whether parameter names (of a model or a checkpoint) are those of a model with an adapter."""
    return any(BASE in key for key in keys)


def official_name(name: str) -> str:
    """Return SAM 2's name of a parameter that may be inside an adapted layer."""
    return name.replace(BASE, ".")


def adapter_names(keys: Collection[str]) -> set[str]:
    """Return those of `keys` that name parameters of an adapter, not of SAM 2."""
    layers = tuple({key.split(BASE)[0] + "." for key in keys if BASE in key})
    return {key for key in keys if BASE not in key and key.startswith(layers)}


# ------------------------------------------------------------------------------------------- out of the model


def official_state(sam: nn.Module) -> dict[str, Tensor]:
    """Return SAM 2's state dict with the adapter merged, without changing `sam`.

    Layers are copied and merged one at a time, which needs additional memory for one layer only. Without an adapter
    the result is the plain state dict.

    Raises:
        UserError: merging gives values that are not finite.
    """
    state = base_state(sam)
    for name, layer in _adapted_layers(sam).items():
        merged = _merged_layer(copy.deepcopy(layer), name)
        state.update({f"{name}.{key}": value.detach() for key, value in merged.state_dict().items()})
    return state


def base_state(sam: nn.Module) -> dict[str, Tensor]:
    """Return SAM 2's state dict without the adapter, under official names."""
    state = sam.state_dict()
    in_adapter = adapter_names(state.keys())
    return {official_name(key): value.detach() for key, value in state.items() if key not in in_adapter}


def merge(sam: nn.Module) -> None:
    """Merge the adapter into the weights in place and restore the plain layers with their official names.

    Raises:
        UserError: merging gives values that are not finite.
    """
    for name, layer in _adapted_layers(sam).items():
        parent, _, child = name.rpartition(".")
        setattr(sam.get_submodule(parent), child, _merged_layer(layer, name))
    if hasattr(sam, "peft_config"):
        del sam.peft_config


def _adapted_layers(sam: nn.Module) -> dict[str, Any]:
    if not has_adapter(sam):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in sam.named_modules() if isinstance(module, BaseTunerLayer)}


def _merged_layer(layer: Any, name: str) -> nn.Module:
    with torch.no_grad():
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise UserError(f"the adapter on {name} cannot be merged: {error}") from None
    base: nn.Module = layer.get_base_layer()
    return base


def adapter_state(sam: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the adapter and all other trained parameters, under peft's names, copied to the CPU.

    Parameters of SAM 2 that are trained in full (`requires_grad`) are included; peft loads them by their names in the
    adapted model.

    Raises:
        UserError: `sam` has no adapter.
    """
    if not has_adapter(sam):
        raise UserError("the model has no adapter.")
    from peft import get_peft_model_state_dict

    state: dict[str, Tensor] = get_peft_model_state_dict(sam, adapter_name=ADAPTER_NAME)
    in_adapter = adapter_names([name for name, _ in sam.named_parameters()])
    state |= {name: value for name, value in sam.named_parameters() if value.requires_grad and name not in in_adapter}
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def load_adapter_state(sam: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state`, the `adapter_state` of another model, into `sam`, which `inject` has adapted.

    Raises:
        UserError: a weight of the adapter is missing, unexpected or of another shape.
    """
    from peft import set_peft_model_state_dict

    try:
        result: Any = set_peft_model_state_dict(sam, dict(state), adapter_name=ADAPTER_NAME)
    except RuntimeError as error:
        raise UserError(f"{source} does not fit the model: {str(error).splitlines()[-1].strip()}") from None
    missing = sorted(set(result.missing_keys) & adapter_names(sam.state_dict().keys()))
    for verb, keys in (("lacks", missing), ("has the extra", sorted(result.unexpected_keys))):
        if keys:
            raise UserError(f"{source} does not fit the model: it {verb} {', '.join(keys[:3])} ({len(keys)} in total).")
