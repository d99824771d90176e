"""Graphs of the network: they compute what it computes, and are followed through a volume without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medsam2.errors import UserError
from medsam2.export.formats import propagate
from medsam2.export.formats.graphs import EXAMPLE_SIZES, OnnxExporter, Part, annotation_tools, parts_of, settings_of
from medsam2.export.run import export_model
from medsam2.export.verify.clip import ReferenceClip, generated_clip
from medsam2.export.verify.questions import reference_questions
from medsam2.export.verify.run import compare, verify_export
from medsam2.inference.predictor import FramePrompt, Predictor
from medsam2.model.build import LoadedModel, ModelSpec, build_sam, load_model
from medsam2.model.tracker import Tracker
from medsam2.pixels import resize as resize_frames

ENCODER = ["high_res_feats_0", "high_res_feats_1", "image_embed"]
DECODER = ["image_embed", "high_res_feats_0", "high_res_feats_1", "point_coords", "point_labels", "mask_input",
           "has_mask_input"]  # fmt: skip


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("nano")


@pytest.fixture(scope="module")
def parts(loaded: LoadedModel) -> dict[str, Part]:
    return {part.name: part for part in parts_of(loaded)}


def runner(parts: dict[str, Part]) -> propagate.Run:
    """`propagate.graphs` over the modules themselves."""

    @torch.no_grad()
    def run(part: str, **inputs: np.ndarray) -> list[np.ndarray]:
        assert list(inputs) == list(parts[part].inputs), "graphs are bound by position"
        found = parts[part].module(*(torch.from_numpy(np.ascontiguousarray(value)) for value in inputs.values()))
        return [value.numpy() for value in (found if isinstance(found, tuple) else (found,))]

    return run


SMALLEST = dict.fromkeys(EXAMPLE_SIZES, 1)


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest value (at least 1)."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))


def test_names_and_order_are_those_that_annotation_tools_bind_by_position(parts: dict[str, Part]) -> None:
    assert list(parts["encoder"].inputs) == ["image"] and list(parts["encoder"].outputs) == ENCODER
    assert list(parts["decoder"].inputs) == DECODER
    assert list(parts["decoder"].outputs) == ["masks", "iou_predictions"]
    assert list(parts) == ["encoder", "decoder", "tracker", "memory_encoder", "memory_attention"]


def test_a_box_gives_its_one_mask_three_times_and_a_click_three_masks(parts: dict[str, Part]) -> None:
    inputs = parts["decoder"].example(SMALLEST)
    with torch.no_grad():
        click, _ = parts["decoder"].module(*{**inputs, "point_labels": torch.ones(1, 1)}.values())
        corners = {
            "point_coords": torch.tensor([[[20.0, 20.0], [90.0, 80.0]]]),
            "point_labels": torch.tensor([[2, 3.0]]),
        }
        box, ious = parts["decoder"].module(*{**inputs, **corners}.values())
    assert click.shape == box.shape == (1, 3, 32, 32)
    assert not torch.equal(click[:, 0], click[:, 1])
    assert torch.equal(box[:, 0], box[:, 2]) and torch.equal(ious[:, 0], ious[:, 1])


@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_memory_attention_with_cosines_is_that_with_complex_numbers(version: str) -> None:
    torch.manual_seed(0)
    spec = ModelSpec("hiera_tiny", version, image_size=128)
    sam: Any = build_sam(spec).eval()
    for name in ("maskmem_tpos_enc", "no_mem_embed"):
        torch.nn.init.normal_(getattr(sam, name))
    part = {part.name: part for part in parts_of(LoadedModel(sam, spec))}["memory_attention"]
    given = part.example()
    from sam2.modeling.sam2_utils import get_1d_sine_pe

    curr = (given["image_embed"] - sam.no_mem_embed.reshape(1, -1, 1, 1)).flatten(2).permute(2, 0, 1)
    place = sam.image_encoder.neck.position_encoding(given["image_embed"]).flatten(2).permute(2, 0, 1)
    memories, tokens, encodings = given["memories"], [], []
    grid = sam.memory_encoder.position_encoding(memories).flatten(2).permute(0, 2, 1)
    for memory, time, here in zip(memories, given["memory_times"], grid, strict=True):
        tokens.append(memory.flatten(1).t()[:, None])
        encodings.append((here + sam.maskmem_tpos_enc[time].reshape(1, -1))[:, None])
    pieces = given["pointers"].reshape(-1, 1, sam.mem_dim)
    ages = torch.zeros_like(pieces)
    if sam.add_tpos_enc_to_obj_ptrs:
        wide = sam.hidden_dim if sam.proj_tpos_enc_in_obj_ptrs else sam.mem_dim
        ages = sam.obj_ptr_tpos_proj(get_1d_sine_pe(given["pointer_times"], dim=wide))
        ages = ages.repeat_interleave(len(pieces) // len(ages), 0)[:, None]
    with torch.no_grad():
        expected = sam.memory_attention(
            curr=[curr], curr_pos=[place], memory=torch.cat([*tokens, pieces]),
            memory_pos=torch.cat([*encodings, ages]), num_obj_ptr_tokens=len(pieces),
        )  # fmt: skip
        found = part.module(*given.values())
    assert relative_difference(found.flatten(2).permute(2, 0, 1), expected) < 1e-6


def test_the_script_follows_boxes_clicks_and_masks_as_our_predictor(
    loaded: LoadedModel, parts: dict[str, Part]
) -> None:
    clip = generated_clip(length=6)
    say = json.loads(json.dumps(settings_of(loaded)))
    for question in reference_questions(loaded, clip, torch.float32)[:3]:
        frames = clip.frames[slice(*question.request["frames"]), 0].numpy()
        prompts = [
            {**one, **({"mask": question.inputs[one["mask"]].numpy()} if "mask" in one else {})}
            for one in question.request["prompts"]
        ]
        found = propagate.propagate(runner(parts), say, frames, prompts)
        one = compare(question.expected, [torch.from_numpy(found[name]) for name in ("logits", "scores")])
        assert one["foreground"] > 0.02, "the comparison proves nothing"
        assert one["iou"] == 1 and one["max_logit_difference"] < 1e-3 and one["max_score_difference"] < 1e-4, (
            question.name
        )


def test_prompts_on_two_frames_of_a_colour_clip_are_followed_too(loaded: LoadedModel, parts: dict[str, Part]) -> None:
    grey = generated_clip(length=8)
    frames = grey.frames.expand(-1, 3, -1, -1).clone()
    frames[:, 1] //= 2
    box = grey.prompts[0].box
    prompts = (FramePrompt(2, 0, points=np.array([[50.0, 60.0]]), labels=np.array([1])), FramePrompt(5, 0, box=box))
    sam = build_sam(loaded.spec)
    sam.load_state_dict(loaded.sam.state_dict())
    ours = Predictor(Tracker(sam).eval(), memory_dtype=torch.float32).predict(frames, prompts, "both", logits=True)
    said = [
        {"object": 0, "frame": 2, "points": [[50, 60]], "labels": [1]},
        {"object": 0, "frame": 5, "box": list(box or ())},
    ]
    found = propagate.propagate(runner(parts), settings_of(loaded), frames.permute(0, 2, 3, 1).numpy(), said)
    assert ours.logits is not None
    assert float((torch.from_numpy(found["logits"]) - ours.logits).abs().max()) < 1e-3


@pytest.mark.parametrize(("given", "wanted"), [((37, 53), (64, 64)), ((200, 150), (64, 64)), ((64, 64), (64, 64))])
def test_pictures_and_logits_are_resampled_as_by_pytorch(given: tuple[int, int], wanted: tuple[int, int]) -> None:
    values = torch.randint(0, 256, (2, 1, *given), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = resize_frames(values, 64)
    found = propagate.resize(values.numpy(), *wanted) / 255
    assert np.abs(found - expected.numpy()).max() < 1e-6
    plain = F.interpolate(values.float(), wanted, mode="bilinear", align_corners=False)
    assert np.abs(propagate.resize(values.numpy(), *wanted, antialias=False) - plain.numpy()).max() < 1e-3


def test_an_empty_mask_is_refused_by_the_script(loaded: LoadedModel, parts: dict[str, Part]) -> None:
    frames = generated_clip(length=2).frames[:, 0].numpy()
    prompt = {"object": 4, "frame": 1, "mask": np.zeros(frames.shape[1:], bool)}
    with pytest.raises(SystemExit, match="mask of object 4 on frame 1 is empty"):
        propagate.propagate(runner(parts), settings_of(loaded), frames, [prompt])


def test_one_graph_is_one_file_of_opset_18_with_free_sizes(parts: dict[str, Part], tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    part = parts["memory_attention"]
    OnnxExporter().write(part, tmp_path / "graph.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["graph.onnx"], "weights lie beside the graph"
    model = onnx.load(str(tmp_path / "graph.onnx"))
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 18
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == list(part.inputs)
    for inputs in (part.example(), part.example(SMALLEST)):  # three memories and five pointers; one of each
        (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        with torch.no_grad():
            expected = part.module(*inputs.values())
        assert relative_difference(torch.from_numpy(found), expected) < 1e-5


def test_each_annotation_tool_gets_a_model_file_that_names_the_graphs_relative_to_itself(loaded: LoadedModel) -> None:
    contents = annotation_tools(loaded)
    assert contents.keys() == {"x-anylabeling.yaml", "anylabeling.yaml"}
    assert all(entry["encoder_model_path"] == "medsam2_nano_128_encoder.onnx" for entry in contents.values())
    assert all(entry["decoder_model_path"] == "medsam2_nano_128_decoder.onnx" for entry in contents.values())
    assert contents["x-anylabeling.yaml"]["type"] == "segment_anything_2"
    assert [contents["anylabeling.yaml"][key] for key in ("input_size", "max_width", "max_height")] == [128, 128, 128]


# ------------------------------------------------------------------------------------------------ whole exports


@pytest.fixture(scope="module")
def exported(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "onnx"
    export_model(loaded, "onnx", out)
    return out


@pytest.mark.slow
def test_the_export_proves_itself_and_its_card_runs_in_a_fresh_process(exported: Path) -> None:
    report = json.loads((exported / "verify.json").read_text())
    assert report["verified"] and report["iou"] >= 0.999 and report["max_logit_difference"] < 1e-3
    assert {"propagation from a mask", "image, boxes"} <= set(report["items"])
    assert not [path.name for path in exported.iterdir() if path.suffix == ".data" or path.is_dir()]
    code = "".join(part.split("```")[0] for part in (exported / "README.md").read_text().split("```python\n")[1:])
    code += "\nimport sys\nassert 'torch' not in sys.modules and found['logits'].shape == (1, 5, 200, 240)"
    done = subprocess.run([sys.executable, "-c", code], cwd=exported, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_steps_of_an_annotation_tool_give_our_mask_of_a_box(exported: Path, loaded: LoadedModel) -> None:
    """What X-AnyLabeling does with an encoder and a decoder, and other tools that take the same pair."""
    import onnxruntime

    encoder, decoder = (
        onnxruntime.InferenceSession(
            str(exported / f"medsam2_nano_128_{name}.onnx"), providers=["CPUExecutionProvider"]
        )
        for name in ("encoder", "decoder")
    )
    side = encoder.get_inputs()[0].shape[2]
    picture = resize_frames(generated_clip(length=3).frames[1:2], side)[0].mul(255).round().to(torch.uint8)
    image = picture.expand(3, -1, -1).permute(1, 2, 0).numpy()
    values = (image / 255.0 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    outputs = encoder.run(None, {encoder.get_inputs()[0].name: values.transpose(2, 0, 1)[None].astype(np.float32)})
    box = (20.0, 30.0, 65.0, 75.0)
    given = (
        outputs[2], outputs[0], outputs[1], np.array(box, np.float32).reshape(1, 2, 2), np.array([[2, 3]], np.float32),
        np.zeros((1, 1, side // 4, side // 4), np.float32), np.array([0], np.float32),
    )  # fmt: skip
    names = [entry.name for entry in decoder.get_inputs()]
    masks, ious = decoder.run(None, dict(zip(names, given, strict=True)))
    best = torch.from_numpy(masks[0][np.argmax(ious.squeeze())])[None, None]
    found = F.interpolate(best, (side, side), mode="bilinear", align_corners=False)[0, 0] > 0
    sam = build_sam(loaded.spec)
    sam.load_state_dict(loaded.sam.state_dict())
    ours = Predictor(Tracker(sam).eval()).predict(picture[None], [FramePrompt(0, 0, box=box)]).masks[0, 0]
    assert ours.any() and torch.equal(found, ours)


@pytest.mark.slow
def test_the_script_is_a_command_that_needs_no_pytorch(exported: Path, tmp_path: Path) -> None:
    clip = generated_clip(length=3)
    np.save(tmp_path / "frames.npy", clip.frames[:, 0].numpy())
    prompts = [{"object": p.object, "frame": p.frame, "box": list(map(float, p.box or ()))} for p in clip.prompts]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "torch.py").write_text("raise ImportError('there is no torch here')")
    command = [sys.executable, str(exported / "propagate.py"), "frames.npy", "prompts.json", "masks.npz", "--logits"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "masks.npz") as found:
        assert found["masks"].shape == (2, 3, 160, 160) and found["masks"].any()
        assert np.array_equal(found["logits"] > 0, found["masks"])


@pytest.mark.slow
def test_a_graph_of_other_weights_fails_the_check(exported: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    sam = build_sam(loaded.spec)
    state = loaded.sam.state_dict()
    state["memory_encoder.out_proj.weight"] = state["memory_encoder.out_proj.weight"] * 1.01
    sam.load_state_dict(state)
    with pytest.raises(UserError, match="ONNX Runtime overlap ours by .*logits differ by"):
        consumer = OnnxExporter().load_as_consumer(LoadedModel(sam, loaded.spec), exported, tmp_path)
        verify_export(consumer, LoadedModel(sam, loaded.spec), generated_clip(length=3), tmp_path)


@pytest.mark.slow
def test_torch_programs_prove_themselves_and_their_card_runs(loaded: LoadedModel, tmp_path: Path) -> None:
    clip = generated_clip(length=4)
    short = ReferenceClip(clip.frames, clip.prompts, "a short clip")
    (result,) = export_model(loaded, "torch", tmp_path / "programs", case=short)
    assert result.report["iou"] == 1 and result.report["max_logit_difference"] < 1e-3
    code = "".join(part.split("```")[0] for part in (result.folder / "README.md").read_text().split("```python\n")[1:])
    code += "\nimport sys\nassert 'medsam2' not in sys.modules and 'sam2' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=result.folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
