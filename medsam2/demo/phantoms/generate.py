"""Generate one case as a deterministic function of modality, seed, index and families."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from medsam2.cases.case import Case, Label
from medsam2.demo.phantoms import anatomy, ct, endoscopy, mr, us
from medsam2.demo.phantoms.families import FAMILIES, Choice, check_modality, choose
from medsam2.demo.phantoms.scene import Placement, Scene, pick_labels
from medsam2.demo.phantoms.shapes import Rng, wander

ATTEMPTS = 8
FPS = 12.5
US_PIXEL_MM = 0.5
DrawnScene = tuple[Scene, np.ndarray, Callable[[], np.ndarray]]
DATASETS = {
    "CT": "Dataset001_PhantomCT",
    "MR": "Dataset002_PhantomMR",
    "US": "phantom_us",
    "ENDOSCOPY": "phantom_endoscopy",
}


def dataset_name(modality: str, only: tuple[str, ...] = ()) -> str:
    """Return the name of the dataset of a case; each choice of `only` is a separate dataset.

    >>> dataset_name("CT", ("wall",))
    'Dataset001_PhantomCT_wall'
    """
    return "_".join([DATASETS[modality], *only])


def generate(modality: str, seed: int, index: int, only: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Case:
    """Generate one case; the same arguments give the same voxels.

    Args:
        modality: CT (int16 HU [T, H, W]), MR (uint16 [T, H, W]), US (uint8 [T, H, W]) or ENDOSCOPY
            (uint8 [T, H, W, 3]).
        seed, index: identify the case.
        only: families to label, each in every case; others may be in the picture without a label.
        without: families that are not in the picture at all.

    Raises:
        UserError: the modality or a family is unknown, or no family is left.
    """
    modality = check_modality(modality)
    choice = choose(modality, only, without)
    rng = np.random.default_rng([seed, zlib.crc32(modality.encode()), index, *_codes(choice)])
    draw = _draw_volume if modality in ("CT", "MR") else _draw_ultrasound if modality == "US" else _draw_endoscopy
    for attempt in range(ATTEMPTS):
        labelled = pick_labels(rng, choice)
        scene, regions, render = draw(rng, choice, labelled, modality)
        masks = scene.labels(regions, choice.label_ids())
        if _all_visible(masks, labelled, choice) or attempt == ATTEMPTS - 1:
            break
    spacing, affine = _geometry(rng, modality)
    number = f"{modality.lower() if modality != 'ENDOSCOPY' else 'endo'}_{index:04d}"
    return Case(
        image=render(),
        planes=masks[None],
        labels=tuple(Label(value, name) for name, value in choice.label_ids().items()),
        spacing=spacing,
        modality=modality,  # type: ignore[arg-type]
        kind="volume" if affine is not None else "clip",
        dataset=dataset_name(modality, only),
        case_id=number,
        patient_id=number,
        affine=affine,
    )


def _codes(choice: Choice) -> list[int]:
    """Encode the families as two bit fields for the seed."""
    names = list(FAMILIES)
    return [sum(1 << names.index(n) for n in choice.labels), sum(1 << names.index(n) for n in choice.clutter)]


def _all_visible(masks: np.ndarray, labelled: tuple[str, ...], choice: Choice) -> bool:
    """Return whether each labelled family is on three or more frames and large enough on its largest."""
    ids = choice.label_ids()
    frames = masks.shape[0]
    counts = np.stack([np.bincount(frame.ravel(), minlength=len(ids) + 1) for frame in masks])
    for name in labelled:
        areas = counts[:, ids[name]]
        if areas.max() < FAMILIES[name].min_pixels or (areas > 0).sum() < min(3, frames):
            return False
    return True


def _draw_volume(rng: Rng, choice: Choice, labelled: tuple[str, ...], modality: str) -> DrawnScene:
    scene = Scene(anatomy.volume_shape(rng))
    space = anatomy.body(rng, scene) if rng.random() < 0.65 else anatomy.crop(rng, scene)
    Placement(rng, scene, space, moving=False).populate(choice, labelled, int(rng.integers(3, 9)))
    regions = scene.regions()
    render_volume = ct.render if modality == "CT" else mr.render
    return scene, regions, lambda: render_volume(rng, scene, regions)


def _draw_ultrasound(rng: Rng, choice: Choice, labelled: tuple[str, ...], modality: str) -> DrawnScene:
    frames, height, width = int(rng.integers(14, 25)), int(rng.integers(16, 22)) * 8, int(rng.integers(16, 22)) * 8
    scene = Scene((frames, height, width))
    probe = us.geometry(rng, height, width)
    sway = rng.uniform(1, 6, 2)
    drift = np.stack([wander(rng, frames, sway[0], 1.5), wander(rng, frames, sway[1], 1.5)], 1)
    us.surroundings(rng, scene, drift)
    Placement(rng, scene, probe.field, moving=True, drift=drift).populate(choice, labelled, int(rng.integers(2, 6)))
    regions = scene.regions()
    regions[:, ~probe.inside] = 0
    return scene, regions, lambda: us.render(rng, scene, regions, probe)


def _draw_endoscopy(rng: Rng, choice: Choice, labelled: tuple[str, ...], modality: str) -> DrawnScene:
    frames, height, width = int(rng.integers(14, 25)), int(rng.integers(16, 21)) * 8, int(rng.integers(16, 23)) * 8
    scene = Scene((frames, height, width))
    view = endoscopy.camera(rng, frames, height, width)
    painter = Placement(rng, Scene(scene.shape), endoscopy.canvas_field(view), moving=True)
    painter.in_plane_share = 1.0
    painter.populate(choice, labelled, int(rng.integers(1, 5)))
    endoscopy.project(painter.scene, view, scene)
    if "instrument" in labelled:
        endoscopy.instrument(rng, scene, "instrument")
    elif "instrument" in choice.labels + choice.clutter and rng.random() < 0.25:
        endoscopy.instrument(rng, scene, None)
    regions = scene.regions()
    return scene, regions, lambda: endoscopy.render(rng, scene, regions, view)


def _geometry(rng: Rng, modality: str) -> tuple[tuple[float, float, float], np.ndarray | None]:
    """Draw spacing (z, y, x) in mm and the RAS+ affine of a volume; (seconds, mm, mm) and None for clips."""
    if modality == "ENDOSCOPY":
        return (1 / FPS, 1.0, 1.0), None
    if modality == "US":
        return (1 / FPS, US_PIXEL_MM, US_PIXEL_MM), None
    inplane = round(float(rng.uniform(0.65, 1.4)), 3)
    thickness = float(rng.choice([2.5, 3.0, 3.5, 4.0, 5.0]))
    tilt = rng.uniform(-0.15, 0.15) if modality == "MR" and rng.random() < 0.5 else 0.0
    cos, sin = np.cos(tilt), np.sin(tilt)
    direction = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])  # LPS: x to the left, y to the back, z up
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1.0, -1.0, 1.0]) @ direction @ np.diag([inplane, inplane, thickness])
    affine[:3, 3] = np.round(rng.uniform(-200, 200, 3), 2)
    return (thickness, inplane, inplane), affine
