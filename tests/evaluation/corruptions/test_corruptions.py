"""Every corruption: seeded, gradual, and true to what it imitates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from generated_cases import example
from pydantic import ValidationError

from medsam2.cases.case import Label
from medsam2.config import compose, configs_dir, option_names
from medsam2.evaluation.corruptions.registry import (
    CORRUPTIONS,
    SEVERITIES,
    SUITES,
    CorruptionSettings,
    Scene,
    corrupt,
)
from medsam2.evaluation.loaded_case import LoadedCase

MODALITIES = ("CT", "MR", "US", "ENDOSCOPY")
PAIRS = [(name, m) for name, c in CORRUPTIONS.items() for m in MODALITIES if c.applies_to(m, example(m).kind)]
# The published parameters of these are not in strict order (glass gives up rounds for reach): severities 1, 3 and 5 are
ROUGHLY_ORDERED = ("snow", "frost", "fog", "glass_blur")


def _case(
    frames: np.ndarray, modality: str, kind: str, planes: np.ndarray | None = None, case: str = "c"
) -> LoadedCase:
    """A case of uint8 [T, H, W, C]."""
    labels = np.zeros((1, *frames.shape[:3]), np.uint8) if planes is None else planes
    tensor = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))
    objects = (Label(1, "thing"),)
    return LoadedCase(tensor, labels, objects, (3.0, 1.0, 1.0), kind, modality, "d", case, "p")


def _scene(frames: np.ndarray) -> Scene:
    return Scene(frames, np.zeros((1, *frames.shape[:3]), np.uint8), (0, 1, 2))


def _distance(one: LoadedCase, other: LoadedCase) -> float:
    return float((one.frames.float() - other.frames.float()).abs().mean())


def _unexplained(one: LoadedCase, other: LoadedCase) -> float:
    """Per cent of the variance that is not the other's: frost first whitens, then only hides."""
    both = torch.stack([one.frames.flatten(), other.frames.flatten()]).double()
    return 100 * (1 - float(torch.corrcoef(both)[0, 1]) ** 2)


def _grey(value: float, shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, round(value * 255), np.uint8)


# ------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize(("name", "modality"), PAIRS)
def test_damage_grows_with_severity_and_comes_from_the_seed_alone(name: str, modality: str) -> None:
    case = replace(example(modality), frames=example(modality).frames[8:16], planes=example(modality).planes[:, 8:16])
    before, labels = case.frames.clone(), case.planes.copy()
    damaged = [corrupt(case, name, severity, seed=4) for severity in SEVERITIES]
    for corrupted in damaged:
        assert corrupted.frames.dtype == torch.uint8 and corrupted.frames.shape == case.frames.shape
        assert corrupted.planes is case.planes and corrupted.objects == case.objects
    assert torch.equal(case.frames, before) and np.array_equal(case.planes, labels)
    distances = [(_unexplained if name == "frost" else _distance)(corrupted, case) for corrupted in damaged]
    ordered = distances[::2] if name in ROUGHLY_ORDERED else distances
    assert ordered == sorted(set(ordered)) and distances[0] > 0.2, distances
    assert torch.equal(corrupt(case, name, 3, seed=4).frames, damaged[2].frames)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_grey_and_rgb_stacks_of_any_length_and_odd_size_are_damaged(channels: int, length: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (length, 37, 50, channels)).astype(np.uint8)
    for name, corruption in CORRUPTIONS.items():
        modality = corruption.modalities[0] if corruption.modalities else "OTHER"
        kind = "volume" if "volume" in corruption.kinds else "still" if length == 1 else "clip"
        corrupted = corrupt(_case(frames, modality, kind), name, 5)
        assert corrupted.frames.shape == (length, channels, 37, 50), name


@pytest.mark.parametrize("value", [0, 255])
def test_an_empty_or_a_full_frame_is_no_trouble(value: int) -> None:
    frames = np.full((3, 24, 24, 3), value, np.uint8)
    with np.errstate(all="raise", under="ignore"):
        for name, corruption in CORRUPTIONS.items():
            modality = corruption.modalities[0] if corruption.modalities else "OTHER"
            corrupt(_case(frames, modality, "volume" if corruption.kinds else "clip"), name, 5)


def test_another_seed_or_case_gives_other_noise_and_other_frames_do_not() -> None:
    frames = _grey(0.5, (4, 32, 32, 1))
    case = _case(frames, "MR", "volume")
    noisy = corrupt(case, "rician_noise", 3, seed=0)
    assert not torch.equal(noisy.frames, corrupt(case, "rician_noise", 3, seed=1).frames)
    assert not torch.equal(noisy.frames, corrupt(replace(case, content_hash="other"), "rician_noise", 3).frames)
    assert torch.equal(noisy.frames, corrupt(replace(case, case="another salt"), "rician_noise", 3).frames)
    assert not torch.equal(noisy.frames[0], noisy.frames[1])
    shorter = _case(frames[:2], "MR", "volume")
    assert torch.equal(corrupt(shorter, "rician_noise", 3).frames, noisy.frames[:2])


def test_a_picture_in_the_middle_stays_in_the_middle() -> None:
    frames = np.zeros((1, 129, 129, 1), np.uint8)
    frames[0, 52:77, 52:77] = 200
    grid = np.arange(129) - 64
    for name in (
        "defocus_blur",
        "glass_blur",
        "motion_blur",
        "zoom_blur",
        "gibbs_ringing",
        "pixelate",
        "jpeg_compression",
    ):
        for severity in SEVERITIES:
            image = corrupt(_case(frames, "MR", "still"), name, severity).frames[0, 0].double().numpy()
            off_y, off_x = (image.sum(1) * grid).sum() / image.sum(), (image.sum(0) * grid).sum() / image.sum()
            assert max(abs(off_y), abs(off_x)) < 0.8, (name, severity, off_x, off_y)


# ------------------------------------------------------------------------------------------- what they imitate


def test_shot_noise_has_the_variance_of_counted_photons() -> None:
    noisy = corrupt(_case(_grey(0.3, (2, 128, 128, 1)), "XRAY", "clip"), "shot_noise", 1).frames.double().numpy() / 255
    assert noisy.mean() == pytest.approx(0.3, abs=0.005)
    assert noisy.var() == pytest.approx(0.3 / 60, rel=0.05)


def test_rician_noise_on_air_is_rayleigh() -> None:
    noisy = corrupt(_case(_grey(0, (2, 128, 128, 1)), "MR", "volume"), "rician_noise", 3).frames.double().numpy() / 255
    assert noisy.mean() == pytest.approx(0.1 * np.sqrt(np.pi / 2), rel=0.02)


def test_impulse_noise_hits_the_published_share_half_of_it_white() -> None:
    corrupted = corrupt(_case(_grey(0.5, (2, 128, 128, 3)), "ENDOSCOPY", "clip"), "impulse_noise", 4).frames.numpy()
    assert (corrupted != 128).mean() == pytest.approx(0.17, rel=0.05)
    assert (corrupted == 255).sum() / (corrupted != 128).sum() == pytest.approx(0.5, abs=0.02)


def test_contrast_keeps_the_mean_and_the_published_part_of_the_deviation() -> None:
    frames = np.random.default_rng(1).integers(60, 200, (1, 64, 64, 1)).astype(np.uint8)
    corrupted = corrupt(_case(frames, "CT", "still"), "contrast", 2).frames.double().numpy()
    assert corrupted.mean() == pytest.approx(frames.mean(), abs=0.5)
    assert corrupted.std() == pytest.approx(0.3 * frames.std(), rel=0.02)


def test_brightness_and_jpeg_keep_the_colour() -> None:
    frames = np.tile(np.array([120, 60, 30], np.uint8), (1, 64, 64, 1))
    case = _case(frames, "ENDOSCOPY", "still")
    brighter = corrupt(case, "brightness", 2).frames[0].double().mean((1, 2)).numpy()
    assert brighter == pytest.approx(np.array([120, 60, 30]) * (120 + 51) / 120, abs=1)
    compressed = corrupt(case, "jpeg_compression", 3).frames[0].double().mean((1, 2)).numpy()
    assert compressed == pytest.approx([120, 60, 30], abs=12)


def test_the_bias_field_is_one_cubic_through_the_volume() -> None:
    scene = _scene(np.ones((9, 20, 24, 1), np.uint8))
    apply = CORRUPTIONS["bias_field"].plan(scene, 3)
    field = np.log(np.stack([apply(t, np.ones((20, 24, 1), np.float32))[..., 0] for t in range(9)]).astype(float))
    for axis in range(3):
        assert np.abs(np.diff(field, 4, axis)).max() < 1e-5  # the fourth difference of a cubic is 0
        assert np.abs(np.diff(field, 1, axis)).max() > 1e-3
    assert 0.2 < np.abs(field).max() < 0.45  # the severity's largest log gain is 0.4


def test_thick_slices_are_means_and_keep_what_is_linear_along_z() -> None:
    thirds = np.random.default_rng(2).integers(0, 256, (9, 4, 5, 1)).astype(np.uint8)
    corrupted = corrupt(_case(thirds, "CT", "volume"), "thick_slices", 3).frames.permute(0, 2, 3, 1).double().numpy()
    for middle in (1, 4, 7):  # three times thicker: slices 0-2, 3-5, 6-8
        assert np.abs(corrupted[middle] - thirds[middle - 1 : middle + 2].mean(0, dtype=float)).max() <= 0.51
    ramp = np.broadcast_to(np.arange(20, 220, 10, dtype=np.uint8)[:, None, None, None], (20, 4, 5, 1))
    for severity in SEVERITIES:
        smooth = corrupt(_case(np.ascontiguousarray(ramp), "MR", "volume"), "thick_slices", severity).frames
        assert np.abs(smooth[3:-3, 0].double().numpy() - ramp[3:-3, ..., 0]).max() <= 1, severity
    assert not CORRUPTIONS["thick_slices"].applies_to("MR", "clip")
    assert CORRUPTIONS["thick_slices"].applies_to("MR", "volume")


def test_ghosting_moves_energy_but_loses_none() -> None:
    frames = np.random.default_rng(3).integers(90, 160, (3, 40, 40, 1)).astype(np.uint8)
    scene = _scene(frames)
    apply = CORRUPTIONS["motion_ghosting"].plan(scene, 4)
    moved = apply(1, scene.frame(1))
    assert (moved**2).sum() == pytest.approx((scene.frame(1) ** 2).sum(), rel=1e-3)
    assert np.abs(moved - scene.frame(1)).mean() > 0.01


def test_smoke_drifts_and_fog_too() -> None:
    clip = _case(_grey(0.1, (25, 64, 64, 3)), "ENDOSCOPY", "clip")
    for name in ("smoke", "fog"):
        corrupted = corrupt(clip, name, 3).frames.double()
        steps = [float((corrupted[t] - corrupted[0]).abs().mean()) for t in (1, 4, 12)]
        assert 0 < steps[0] < steps[1] < steps[2], (name, steps)


def test_blood_covers_the_share_of_its_level() -> None:
    case = _case(_grey(0.6, (1, 96, 96, 3)), "ENDOSCOPY", "still")
    for severity, share in zip(SEVERITIES, (0.08, 0.15, 0.24, 0.35, 0.48), strict=True):
        changed = (corrupt(case, "blood", severity).frames != case.frames).any(1)
        assert float(changed.double().mean()) == pytest.approx(share, abs=0.03)


def test_another_background_leaves_labelled_objects_alone() -> None:
    planes = np.zeros((1, 2, 96, 96), np.uint8)
    planes[0, :, 30:60, 20:70] = 3
    frames = np.random.default_rng(4).integers(0, 256, (2, 96, 96, 3)).astype(np.uint8)
    case = _case(frames, "ENDOSCOPY", "clip", planes)
    corrupted = corrupt(case, "background_change", 5).frames
    assert torch.equal(corrupted[..., 33:57, 23:67], case.frames[..., 33:57, 23:67])
    outside = (corrupted != case.frames).any(1)[:, :25]
    assert float(outside.double().mean()) > 0.95
    assert corrupted[..., :20, :].double().std() < case.frames[..., :20, :].double().std()


def test_low_light_and_a_shadow_only_take_light_away() -> None:
    for name, modality in (("low_light", "ENDOSCOPY"), ("acoustic_shadow", "US"), ("attenuation", "US")):
        case = example(modality)
        corrupted = corrupt(case, name, 3).frames.double()
        assert corrupted.mean() < 0.95 * case.frames.double().mean()
        assert (corrupted - case.frames.double()).clamp(min=0).mean() < 0.5, name


# ------------------------------------------------------------------------------------- names, settings, pictures


def test_scans_have_no_weather_and_cameras_no_scanner() -> None:
    every = CorruptionSettings(names=tuple(CORRUPTIONS))
    for modality in ("CT", "MR", "US"):
        names = set(every.applicable(modality, example(modality).kind))
        assert not {"snow", "frost", "fog", "smoke", "blood"} & names
        assert {"gaussian_noise", "jpeg_compression", "contrast_shift"} <= names
    endoscopy = set(every.applicable("ENDOSCOPY", "clip"))
    assert {"snow", "smoke", "background_change"} <= endoscopy
    assert not {"rician_noise", "low_dose", "speckle"} & endoscopy
    assert {CORRUPTIONS[name].suite for name in CORRUPTIONS} == set(SUITES)


def test_settings_refuse_unknown_names_twice_the_same_and_odd_severities() -> None:
    with pytest.raises(ValidationError, match="Did you mean 'bias_field'"):
        CorruptionSettings(names=("bias_feld",))
    with pytest.raises(ValidationError, match="named twice"):
        CorruptionSettings(names=("fog", "fog"))
    for severities in ((), (0, 1), (6,)):
        with pytest.raises(ValidationError, match="severities"):
            CorruptionSettings(names=("fog",), severities=severities)
    assert CorruptionSettings(names=("fog",), severities=(5, 1, 5)).severities == (1, 5)


def test_each_case_gets_what_makes_sense_for_it() -> None:
    settings = CorruptionSettings(names=("fog", "low_dose", "shot_noise", "thick_slices"))
    assert settings.applicable("CT", "volume") == ("low_dose", "shot_noise", "thick_slices")
    assert settings.applicable("CT", "still") == ("low_dose", "shot_noise")
    assert settings.applicable("ENDOSCOPY", "clip") == ("fog", "shot_noise")


@pytest.mark.parametrize("name", option_names(configs_dir() / "corruption"))
def test_every_set_in_the_configuration_is_valid(name: str) -> None:
    config = compose("evaluate", [f"corruption={name}", "checkpoint=nano", "data.source=shards", "output=scores"])
    settings = CorruptionSettings.model_validate(config["corruption"])
    suites = {suite: {key for key, c in CORRUPTIONS.items() if c.suite == suite} for suite in SUITES}
    expected = {"none": set(), "all": set(CORRUPTIONS), **suites}.get(name)
    if expected is None:
        expected = {key for key in suites["medical"] if CORRUPTIONS[key].applies_to(name.upper(), "volume")}
    assert set(settings.names) == expected and settings.severities == SEVERITIES


def test_there_are_the_fourteen_of_imagenet_c_without_elastic() -> None:
    assert sum(corruption.suite == "imagenet_c" for corruption in CORRUPTIONS.values()) == 14
