"""External checkpoints: recognised by their keys, brought into our format, or refused with what does not fit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from medsam2.errors import UserError
from medsam2.export.formats.huggingface import HuggingFaceExporter
from medsam2.export.formats.huggingface_keys import to_huggingface
from medsam2.export.importing.run import ExternalCheckpoint, import_checkpoint, read_external
from medsam2.export.verify.clip import generated_clip
from medsam2.model.build import LoadedModel, ModelSpec, build_sam, load_model, model_config

State = dict[str, Tensor]
NANO = ModelSpec("hiera_nano")
TINY = ModelSpec("hiera_tiny", image_size=512)


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(0)
    return build_sam(NANO).state_dict()


@pytest.fixture(scope="module")
def tiny() -> State:
    """Half precision, as some are shared, and small on the disk."""
    torch.manual_seed(0)
    return {key: value.half() for key, value in build_sam(TINY).state_dict().items()}


@pytest.fixture(scope="module")
def hub(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers at 256 px, as another tool would have left it: without our header."""
    folder = tmp_path_factory.mktemp("hub")
    sam = build_sam(ModelSpec("hiera_nano", image_size=256))
    sam.load_state_dict(state)
    HuggingFaceExporter().build(LoadedModel(sam, ModelSpec("hiera_nano", image_size=256)), folder)
    save_file(to_huggingface(state), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def saved(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def same(found: ExternalCheckpoint, state: State) -> bool:
    read = found.model.sam.state_dict()
    return list(read) == list(state) and all(torch.equal(read[key], state[key]) for key in state)


# ---------------------------------------------------------------------------------------------------- what is read


WRAPPED: dict[str, tuple[Any, str]] = {
    "official": (lambda state: {"model": state}, ""),
    "bare": (lambda state: state, "bare state dict"),
    "module": (lambda state: {"model": {f"module.{k}": v for k, v in state.items()}}, "'module.' (a distributed"),
    "compiled": (lambda state: {"model": {f"_orig_mod.{k}": v for k, v in state.items()}}, "'_orig_mod.' (torch"),
    "both": (lambda state: {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}}, "_orig_mod"),
    "averaged": (
        lambda state: {"model": {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in state.items()}}},
        "'module.'",
    ),
    "model": (lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}}, "'model.'"),
    "trainer": (
        lambda state: {"model": state, "optimizer": {"state": {}}, "epoch": 7, "steps": {"train": 70}},
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrapper", list(WRAPPED))
def test_wrappers_are_taken_off_and_named(state: State, tmp_path: Path, wrapper: str) -> None:
    wrap, note = WRAPPED[wrapper]
    found = read_external(saved(tmp_path / "weights.pt", wrap(state)))
    assert same(found, state) and found.model.spec == NANO and found.kind == "official"
    notes = [line for line in found.notes if "is assumed" not in line]
    assert (note in " ".join(notes)) if note else not notes
    assert found.model.provenance.imported == "weights.pt (official)"


def test_names_of_transformers_are_read_with_the_side_of_the_folder(state: State, hub: Path) -> None:
    found = read_external(hub)
    assert same(found, state) and found.kind == "huggingface" and found.folder == hub
    assert found.model.spec == ModelSpec("hiera_nano", image_size=256) and not found.notes
    other = read_external(hub, image_size=128)
    assert other.model.spec.image_size == 128 and other.folder is None, "transformers would compute at 256 px"


def test_weights_of_transformers_in_a_pickle_are_read_too(state: State, hub: Path, tmp_path: Path) -> None:
    theirs = to_huggingface(state)
    binary = saved(tmp_path / "other" / "pytorch_model.bin", theirs)
    (binary.parent / "config.json").write_text((hub / "config.json").read_text())
    assert same(read_external(binary.parent), state) and read_external(binary.parent).model.spec.image_size == 256


def test_prefixes_of_transformers_are_taken_off(state: State, tmp_path: Path) -> None:
    path = tmp_path / "wrapped.safetensors"
    save_file({f"sam2_video.{key}": value for key, value in to_huggingface(state).items()}, path)
    found = read_external(path)
    assert same(found, state) and "'sam2_video.'" in " ".join(found.notes) and found.folder is None


def test_medsam2_at_512_px_is_named_by_its_yaml_or_its_name(tiny: State, tmp_path: Path) -> None:
    named = read_external(saved(tmp_path / "a" / "MedSAM2_latest.pt", {"model": tiny}))
    assert named.model.spec == TINY and "MedSAM2" in " ".join(named.notes) and "float16" in " ".join(named.notes)
    assert all(value.dtype == torch.float32 for value in named.model.sam.state_dict().values())
    path = saved(tmp_path / "b" / "latest.pt", {"model": tiny})
    path.with_suffix(".yaml").write_text(yaml.safe_dump({"model": model_config(TINY)}))
    beside = read_external(path)
    assert beside.model.spec == TINY and not any("assumed" in note for note in beside.notes)
    asked = read_external(path, image_size=256)
    assert asked.model.spec.image_size == 256 and "the files say 512 px" in " ".join(asked.notes)


def test_side_that_nobody_states_is_that_of_the_size_and_said_to_be_assumed(tiny: State, tmp_path: Path) -> None:
    found = read_external(saved(tmp_path / "weights.pt", {"model": tiny}))
    assert found.model.spec.image_size == 1024 and "1024 px is assumed" in " ".join(found.notes)


def test_version_2_0_is_recognised_by_what_2_1_added(tiny: State, tmp_path: Path) -> None:
    old = {key: value for key, value in tiny.items() if not key.startswith(("no_obj_embed_spatial", "obj_ptr_tpos"))}
    assert read_external(saved(tmp_path / "old.pt", {"model": old})).model.spec.version == "2.0"


def test_yaml_unlike_metas_is_told(state: State, tmp_path: Path) -> None:
    path = saved(tmp_path / "more.pt", {"model": state})
    path.with_suffix(".yaml").write_text(yaml.safe_dump({"model": {**model_config(NANO), "num_maskmem": 5}}))
    assert "num_maskmem=5 (7 here)" in " ".join(read_external(path).notes)


def test_a_file_of_ours_keeps_what_it_knows(state: State, tmp_path: Path) -> None:
    said = {"spec": ModelSpec("hiera_nano", image_size=192).to_dict(), "content_hashes": ["a"]}
    found = read_external(saved(tmp_path / "ours.pt", {"model": state, "medsam2": said}))
    assert (
        found.kind == "medsam2"
        and found.model.provenance.content_hashes == ("a",)
        and found.model.spec.image_size == 192
    )


# ---------------------------------------------------------------------------------------------------- what is written


def test_what_is_written_is_read_by_everything_of_ours(state: State, tmp_path: Path) -> None:
    source = saved(tmp_path / "sam.pt", {f"module.{key}": value for key, value in state.items()})
    result = import_checkpoint(source, tmp_path / "out", verify=False)
    assert not result.written.verified and not result.transformers, "tests/cli/test_import.py has it verified"
    loaded = load_model(tmp_path / "out")
    assert loaded.spec == NANO and loaded.provenance.imported == "sam.pt (official)"
    assert all(torch.equal(value, state[key]) for key, value in loaded.sam.state_dict().items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "sam.pt (official)" in card


@pytest.mark.slow
def test_a_folder_of_transformers_is_compared_with_transformers(hub: Path, tmp_path: Path) -> None:
    result = import_checkpoint(hub, tmp_path / "out", case=generated_clip(3, 64))
    assert result.transformers["iou"] > 0.999 and result.transformers["max_logit_difference"] < 1e-3
    assert load_model(tmp_path / "out").spec.image_size == 256


def test_existing_folder_is_not_overwritten(state: State, tmp_path: Path) -> None:
    source = saved(tmp_path / "sam.pt", {"model": state})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="--force"):
        import_checkpoint(source, tmp_path / "out", verify=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


# ---------------------------------------------------------------------------------------------------- what does not fit


def test_everything_that_does_not_fit_is_counted_and_named_at_once(state: State, tmp_path: Path) -> None:
    broken = {key: value for key, value in state.items() if not key.startswith("memory_encoder.fuser.")}
    broken |= {"head.weight": torch.zeros(1), "no_obj_ptr": torch.zeros(1, 64)}
    with pytest.raises(UserError) as raised:
        read_external(saved(tmp_path / "broken.pt", {"model": broken}))
    said = str(raised.value)
    lost = len(state) - len(broken) + 1
    assert f"lacks {lost} of {len(state)} tensors (memory_encoder.fuser" in said and f"and {lost - 3} more" in said
    assert "it has 1 more (head.weight)" in said
    assert "1 has another shape (no_obj_ptr: [1, 64] instead of [1, 128])" in said


def test_a_2_0_file_beside_a_2_1_yaml_is_refused(tiny: State, tmp_path: Path) -> None:
    old = {key: value for key, value in tiny.items() if not key.startswith(("no_obj_embed_spatial", "obj_ptr_tpos"))}
    path = saved(tmp_path / "old.pt", {"model": old})
    config = tmp_path / "sam2.1_hiera_t512.yaml"
    config.write_text(yaml.safe_dump({"model": model_config(TINY)}))
    with pytest.raises(UserError, match=r"holds SAM 2\.0 weights .* describes SAM 2\.1"):
        read_external(path, config=config)


def test_an_image_only_model_is_said_to_lack_the_memory(state: State, hub: Path, tmp_path: Path) -> None:
    alone = {k: v for k, v in to_huggingface(state).items() if not k.startswith(("memory_", "object_pointer_proj"))}
    save_file(alone, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks \d+ of 356 tensors: memory_attention.*no memory"):
        read_external(tmp_path)


def test_config_json_that_contradicts_itself_is_refused(hub: Path, tmp_path: Path) -> None:
    config = json.loads((hub / "config.json").read_text())
    config["memory_attention_rope_feat_sizes"] = [64, 64]
    (tmp_path / "model.safetensors").symlink_to(hub / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"contradicts itself .*image_size 256 px.*rope_feat_sizes 1024 px"):
        read_external(tmp_path)


OTHERS = {
    "a SAM 1, as MedSAM is": {"image_encoder.blocks.0.attn.qkv.weight": torch.zeros(1)},
    "a SAM 1 of transformers": {"vision_encoder.layers.0.attn.qkv.weight": torch.zeros(1)},
    "holds no SAM 2 weights: of its 1 tensors": {"conv.weight": torch.zeros(1)},
    "of a size that medsam2 does not know": {"image_encoder.trunk.patch_embed.proj.weight": torch.zeros(72, 3, 7, 7)},
}


@pytest.mark.parametrize("message", list(OTHERS))
def test_another_network_is_named(message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_external(saved(tmp_path / "other.pth", {"model": OTHERS[message]}))


class Canary:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["evil.pt", "evil.pth", "hub/pytorch_model.bin"])
def test_a_pickle_with_code_is_refused_and_never_run(name: str, state: State, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = saved(tmp_path / name, {"model": state, "extra": Canary(canary)})
    with pytest.raises(UserError, match="is not unpickled, since a pickle can run code"):
        read_external(path if path.suffix != ".bin" else path.parent)
    assert not canary.exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.97, 0.9999])
@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors"])
def test_a_cut_file_is_named(name: str, share: float, state: State, hub: Path, tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.pt", {"model": state}) if name.endswith(".pt") else hub / "model.safetensors"
    content = whole.read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=f"{name} is not a readable"):
        read_external(tmp_path / name)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no weights"),
        ({"a.pt": "", "b.pt": ""}, "holds 2 files of weights"),
        ({"model-1-of-2.safetensors": "", "model.safetensors.index.json": "{}"}, "split over several files"),
        ({"checkpoints/last.ckpt": ""}, "is a run of medsam2"),
        ({"adapter_config.json": "{}"}, "is an adapter"),
        ({"notes.txt": ""}, "holds no weights"),
    ],
)
def test_a_folder_that_is_something_else_is_named(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_external(tmp_path)


def test_paths_that_are_wrong_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_external(tmp_path / "nothing.pt")
    (tmp_path / "mask.png").write_bytes(b"")
    with pytest.raises(UserError, match="of no known kind"):
        read_external(tmp_path / "mask.png")
    with pytest.raises(UserError, match="--config .*no such file"):
        read_external(tmp_path / "mask.png", config=tmp_path / "none.yaml")


def test_loading_a_folder_of_transformers_points_to_import(hub: Path) -> None:
    with pytest.raises(UserError, match="medsam2 import .*hub"):
        load_model(hub)
