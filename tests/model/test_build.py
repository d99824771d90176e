"""Building SAM 2 of any size, and filling it strictly from every kind of file that we read."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medsam2.errors import UserError
from medsam2.model import build, checkpoint, sizes
from medsam2.model.build import ModelSpec, build_sam, load_model, model_config, save_asset

NANO = ModelSpec("hiera_nano")


@pytest.fixture(scope="module")
def nano() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_sam(NANO)


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_sam(ModelSpec("hiera_tiny"))


@pytest.fixture(scope="module")
def tiny_file(tiny: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("official") / "sam2.1_hiera_tiny.pt"
    torch.save({"model": tiny.state_dict()}, path)
    return path


def same(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    other = right.state_dict()
    return all(torch.equal(value, other[key]) for key, value in left.state_dict().items())


def refusal(path: Path | str, spec: ModelSpec | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_model(path, spec)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ specs and sizes


def test_image_size_defaults_to_what_the_weights_were_trained_at() -> None:
    assert ModelSpec("hiera_nano").image_size == 128
    assert ModelSpec("hiera_large").image_size == 1024


def test_spec_survives_a_dictionary_of_primitives() -> None:
    spec = ModelSpec("hiera_small", "2.0", 512)
    assert spec.to_dict() == {"name": "hiera_small", "version": "2.0", "image_size": 512}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "hiera_tinny"}, "Did you mean 'hiera_tiny'?"),
        ({"name": "hiera_nano", "version": "2.0"}, "no version '2.0'"),
        ({"name": "hiera_tiny", "image_size": 500}, "the closest is 480"),
    ],
)
def test_impossible_specs_are_explained(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match="hiera_|image_size") as caught:
        ModelSpec(**arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_table_states_the_true_numbers_of_parameters(nano: torch.nn.Module, tiny: torch.nn.Module) -> None:
    assert sizes.SIZES["hiera_nano"].parameters["2.1"] == sum(p.numel() for p in nano.parameters())
    assert sizes.SIZES["hiera_tiny"].parameters["2.1"] == sum(p.numel() for p in tiny.parameters())


def test_table_names_metas_files() -> None:
    urls = {size.file_name(version): size.url(version) for size, version in sizes.PUBLISHED}
    assert {"sam2.1_hiera_base_plus.pt", "sam2_hiera_large.pt"} <= urls.keys()
    assert all(url.endswith("/" + name) for name, url in urls.items())


# ------------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize("version", ["2.1", "2.0"])
@pytest.mark.parametrize("name", [name for name in sizes.SIZES if name != "hiera_nano"])
def test_every_official_size_has_its_yaml_and_512_px_changes_three_entries(name: str, version: str) -> None:
    large, small = model_config(ModelSpec(name, version)), model_config(ModelSpec(name, version, 512))
    assert large["image_encoder"]["trunk"]["embed_dim"] == sizes.SIZES[name].embed_dim
    layer = small["memory_attention"]["layer"]
    assert small.pop("image_size") == 512 and large.pop("image_size") == 1024
    assert layer["self_attention"].pop("feat_sizes") == layer["cross_attention"].pop("feat_sizes") == [32, 32]
    for key in ("self_attention", "cross_attention"):
        assert large["memory_attention"]["layer"][key].pop("feat_sizes") == [64, 64]
    assert small == large


def test_nano_runs_an_image_through_the_encoder_at_128_px(nano: torch.nn.Module) -> None:
    with torch.no_grad():
        features = nano.forward_image(torch.rand(2, 3, 128, 128))["backbone_fpn"]
    assert [tuple(level.shape) for level in features] == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 128, 8, 8)]


def test_nano_has_no_dropout_and_memory_that_divides_the_width(nano: torch.nn.Module) -> None:
    assert all(module.p == 0.0 for module in nano.modules() if isinstance(module, torch.nn.Dropout))
    assert nano.hidden_dim % nano.mem_dim == 0


def test_nano_weights_fit_the_official_video_predictor_strictly(nano: torch.nn.Module) -> None:
    predictor = build_sam(NANO, target=build.VIDEO_PREDICTOR)
    assert type(predictor).__name__ == "SAM2VideoPredictor"
    predictor.load_state_dict(nano.state_dict(), strict=True)


def test_building_in_a_fresh_process_leaves_hydra_usable() -> None:
    code = """
import sys
from medsam2.model.build import ModelSpec, build_sam, model_config
model_config(ModelSpec("hiera_tiny"))
assert "sam2" not in sys.modules, "reading the yaml imported sam2"
build_sam(ModelSpec("hiera_nano"))
from hydra.core.global_hydra import GlobalHydra
assert not GlobalHydra.instance().is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_initialised_hydra_stays_as_it_was() -> None:
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    with hydra.initialize_config_module("sam2", version_base="1.2"):
        before = GlobalHydra.instance().hydra
        build_sam(NANO)
        assert GlobalHydra.instance().hydra is before
    GlobalHydra.instance().clear()


# ------------------------------------------------------------------------------------------------ loading


def test_official_file_loads_strictly_at_1024_px(tiny: torch.nn.Module, tiny_file: Path) -> None:
    loaded = load_model(tiny_file)
    assert loaded.spec == ModelSpec("hiera_tiny", "2.1", 1024)
    assert same(loaded.sam, tiny) and not loaded.sam.training


def test_official_file_loads_at_512_px_when_asked(tiny: torch.nn.Module, tiny_file: Path) -> None:
    loaded = load_model(tiny_file, ModelSpec("hiera_tiny", image_size=512))
    assert loaded.sam.image_size == 512 and same(loaded.sam, tiny)


def test_a_21_file_is_refused_where_20_was_asked(tiny_file: Path) -> None:
    assert "holds hiera_tiny 2.1, but hiera_tiny 2.0" in refusal(tiny_file, ModelSpec("hiera_tiny", "2.0"))


def test_a_20_file_is_recognised_by_its_keys(tiny: torch.nn.Module, tmp_path: Path) -> None:
    state = {k: v for k, v in tiny.state_dict().items() if not k.startswith(("no_obj_embed_spatial", "obj_ptr_tpos"))}
    torch.save({"model": state}, tmp_path / "old.pt")
    assert load_model(tmp_path / "old.pt").spec.version == "2.0"


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_compiled_and_wrapped_models_are_stripped(
    nano: torch.nn.Module, tmp_path: Path, prefix: str
) -> None:
    state = {prefix + key: value for key, value in nano.state_dict().items()}
    torch.save({"model": {**state, "n_averaged": torch.tensor(3)}}, tmp_path / "wrapped.pt")
    assert same(load_model(tmp_path / "wrapped.pt").sam, nano)


def test_prefix_of_a_compiled_part_is_stripped(nano: torch.nn.Module, tmp_path: Path) -> None:
    state = {key.replace("image_encoder.", "image_encoder._orig_mod."): v for key, v in nano.state_dict().items()}
    torch.save({"model": state}, tmp_path / "compiled.pt")
    assert same(load_model(tmp_path / "compiled.pt").sam, nano)


def lightning_file(nano: torch.nn.Module, path: Path, image_size: int = 128) -> None:
    state = {"tracker.sam." + key: value for key, value in nano.state_dict().items()}
    spec = ModelSpec("hiera_nano", image_size=image_size).to_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "state_dict": {**state, "loss.weight": torch.ones(1)},
        "medsam2": {"spec": spec, "content_hashes": ["a"]},
    }
    torch.save(content, path)


def test_run_folder_gives_its_best_checkpoint_else_its_last(nano: torch.nn.Module, tmp_path: Path) -> None:
    lightning_file(nano, tmp_path / "run" / "checkpoints" / "last.ckpt", image_size=256)
    assert load_model(tmp_path / "run").spec.image_size == 256
    lightning_file(nano, tmp_path / "run" / "checkpoints" / "best.ckpt")
    loaded = load_model(tmp_path / "run")
    assert loaded.spec == NANO and same(loaded.sam, nano)
    assert loaded.source.endswith("best.ckpt") and loaded.provenance.content_hashes == ("a",)


def test_folder_without_checkpoint_is_explained(tmp_path: Path) -> None:
    assert "expected checkpoints/best.ckpt" in refusal(tmp_path)


def test_missing_official_file_says_where_meta_publishes_it(tmp_path: Path) -> None:
    message = refusal(tmp_path / "sam2.1_hiera_small.pt")
    assert "https://dl.fbaipublicfiles.com/segment_anything_2/092824/sam2.1_hiera_small.pt" in message
    assert "sam2.1_hiera_large.pt" in refusal("large")


def test_misspelt_path_gets_the_closest_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "finetuned.pt").touch()
    assert "Did you mean 'finetuned.pt'?" in refusal(tmp_path / "finetund.pt")


def test_missing_and_extra_keys_are_named(nano: torch.nn.Module, tmp_path: Path) -> None:
    state = nano.state_dict()
    torch.save({"model": {k: v for k, v in state.items() if k != "no_mem_embed"}}, tmp_path / "less.pt")
    assert "lacks 1 of" in refusal(tmp_path / "less.pt")
    torch.save({"model": {**state, "head.weight": torch.ones(1)}}, tmp_path / "more.pt")
    assert "it has 1 more (head.weight)" in refusal(tmp_path / "more.pt")
    torch.save({"model": {**state, "no_mem_embed": torch.ones(1, 1, 7)}}, tmp_path / "shape.pt")
    assert "another shape (no_mem_embed" in refusal(tmp_path / "shape.pt")


def test_something_that_is_not_sam2_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.ones(1)}}, tmp_path / "other.pt")
    assert "holds no SAM 2 weights" in refusal(tmp_path / "other.pt")


def test_damaged_file_is_explained(tiny_file: Path, tmp_path: Path) -> None:
    (tmp_path / "short.pt").write_bytes(tiny_file.read_bytes()[:100_000])
    (tmp_path / "empty.pt").touch()
    assert "not a readable checkpoint" in refusal(tmp_path / "short.pt")
    assert "not a readable checkpoint" in refusal(tmp_path / "empty.pt")


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_never_runs(tmp_path: Path, zipped: bool) -> None:
    trap = tmp_path / "trap.pt"
    if zipped:
        torch.save({"model": {}, "extra": Canary(tmp_path / "ran")}, trap)
    else:
        trap.write_bytes(pickle.dumps({"model": Canary(tmp_path / "ran")}))
    assert "pickle" in refusal(trap)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------ the asset


def test_asset_comes_back_in_float32_with_its_metadata(
    nano: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hiera_nano.safetensors"
    save_asset(path, nano.state_dict(), NANO, {"step": 12, "content_hashes": ["a", "b"]})
    monkeypatch.setattr(checkpoint, "NANO_ASSET", path)
    loaded = load_model("nano")
    assert path.stat().st_size < 9_000_000
    assert loaded.spec == NANO and loaded.provenance.content_hashes == ("a", "b")
    for key, value in nano.state_dict().items():
        assert loaded.sam.state_dict()[key].dtype == value.dtype
        torch.testing.assert_close(loaded.sam.state_dict()[key], value, rtol=1e-3, atol=1e-6)


def test_missing_asset_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "NANO_ASSET", tmp_path / "absent.safetensors")
    assert "make pretrain" in refusal("nano")
