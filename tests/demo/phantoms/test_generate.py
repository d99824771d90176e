"""What a generated case is: deterministic, of its modality, with labels that can be trusted."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medsam2.demo.phantoms import FAMILIES, PHANTOM_MODALITIES, choose, generate
from medsam2.errors import UserError

SEED = 1234


def families_of(modality: str) -> list[str]:
    return [name for name, family in FAMILIES.items() if modality in family.modalities]


@pytest.mark.parametrize("modality", PHANTOM_MODALITIES)
def test_same_arguments_give_the_same_voxels_and_another_index_others(modality):
    first, again, other = (generate(modality, SEED, index) for index in (4, 4, 5))
    assert first.content_hash == again.content_hash
    assert np.array_equal(first.planes, again.planes)
    assert first.content_hash != other.content_hash
    assert first.spacing == again.spacing and first.case_id != other.case_id
    assert first.content_hash != generate(modality, SEED + 1, 4).content_hash


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(modality=st.sampled_from(PHANTOM_MODALITIES), index=st.integers(0, 10_000), data=st.data())
def test_any_choice_of_families_gives_a_sound_case(modality, index, data):
    here = families_of(modality)
    only = tuple(data.draw(st.lists(st.sampled_from(here), max_size=2, unique=True)))
    rest = [name for name in here if name not in only]
    without = tuple(data.draw(st.lists(st.sampled_from(rest), max_size=len(here) - 2, unique=True))) if rest else ()
    case = generate(modality, SEED, index, only, without)
    frames, height, width = case.planes.shape[1:]
    assert case.image.shape[:3] == case.planes.shape[1:] and case.planes.shape[0] == 1
    assert 14 <= frames <= 26 and min(height, width) >= 128 and max(height, width) <= 176
    assert [label.name for label in case.labels] == [n for n in here if n not in without and (not only or n in only)]
    assert [label.id for label in case.labels] == list(range(1, len(case.labels) + 1))
    assert set(np.unique(case.planes)) <= {0, *(label.id for label in case.labels)}
    assert case.planes.any()


@pytest.mark.parametrize("modality", PHANTOM_MODALITIES)
def test_only_wall_labels_a_wall_in_every_case_and_it_is_a_ring(modality):
    for index in range(6):
        case = generate(modality, SEED, index, only=("wall",))
        assert [(label.id, label.name) for label in case.labels] == [(1, "wall")]
        areas = (case.planes[0] == 1).sum((1, 2))
        assert areas.max() >= FAMILIES["wall"].min_pixels
        largest = case.planes[0, areas.argmax()] == 1
        rows, columns = np.nonzero(largest)
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert largest.sum() < 0.55 * box, "a filled disc covers 0.78 of its box"


@pytest.mark.parametrize("modality", PHANTOM_MODALITIES)
def test_families_left_out_are_drawn_neither_with_nor_without_a_label(modality, monkeypatch):
    from medsam2.demo.phantoms.scene import Placement

    def forbidden(self, label):
        raise AssertionError("a wall was drawn")

    monkeypatch.setattr(Placement, "wall", forbidden)
    for index in range(8):
        generate(modality, SEED, index, without=("wall",))
    with pytest.raises(AssertionError, match="a wall was drawn"):
        generate(modality, SEED, 0, only=("wall",))


def test_ct_is_in_hounsfield_units_with_air_fat_soft_tissue_and_bone():
    volumes = [generate("CT", SEED, index).image for index in range(12)]
    assert all(volume.dtype == np.int16 and volume.min() >= -1024 and volume.max() <= 3071 for volume in volumes)
    values = np.concatenate([volume.ravel() for volume in volumes])
    for low, high in ((-1024, -900), (-140, -60), (20, 80), (90, 300), (300, 1000)):
        assert ((values >= low) & (values <= high)).mean() > 0.005, (low, high)


def test_mr_has_an_arbitrary_scale_and_no_negative_value():
    volumes = [generate("MR", SEED, index).image for index in range(8)]
    assert all(volume.dtype == np.uint16 for volume in volumes)
    tops = [float(np.percentile(volume, 99)) for volume in volumes]
    assert max(tops) > 3 * min(tops)


def test_ultrasound_is_dark_outside_its_sector_and_labels_stay_inside():
    for index in range(6):
        case = generate("US", SEED, index)
        outside = (case.image == 0).all(0)
        assert case.image.dtype == np.uint8
        assert not case.planes[0][:, outside].any()


@pytest.mark.parametrize("modality", PHANTOM_MODALITIES)
def test_most_structures_are_absent_on_some_frames_and_large_enough_on_one(modality):
    absent, large, seen = 0, 0, 0
    for index in range(12):
        case = generate(modality, SEED, index)
        for label in case.labels:
            areas = (case.planes[0] == label.id).sum((1, 2))
            if areas.any():
                seen += 1
                absent += bool((areas == 0).any())
                large += bool(areas.max() > 150)
    assert absent > 0.55 * seen
    assert large > 0.8 * seen


@pytest.mark.parametrize("modality", PHANTOM_MODALITIES)
def test_borders_of_labelled_structures_can_be_seen(modality):
    """The mean inside differs from the mean of a narrow band outside, by more than noise of the band's mean."""
    import cv2

    visible, seen = 0, 0
    for index in range(8):
        case = generate(modality, SEED, index)
        grey = case.image.astype(np.float32) if case.image.ndim == 3 else case.image.astype(np.float32).mean(-1)
        for label in case.labels:
            mask = (case.planes[0] == label.id).astype(np.uint8)
            frame = int(mask.sum((1, 2)).argmax())
            if mask[frame].any():
                kernel = np.ones((3, 3), np.uint8)
                band = cv2.dilate(mask[frame], kernel, iterations=4) - cv2.dilate(mask[frame], kernel)
                inside, outside = grey[frame][mask[frame] > 0], grey[frame][band > 0]
                pooled = np.sqrt(inside.var() / inside.size + outside.var() / outside.size)
                seen += 1
                visible += bool(abs(inside.mean() - outside.mean()) > 3 * pooled)
    assert visible > 0.8 * seen


def test_unknown_family_and_modality_name_the_closest():
    with pytest.raises(UserError, match="Did you mean 'kidney'"):
        generate("CT", 0, 0, only=("kidny",))
    with pytest.raises(UserError, match="Did you mean 'ENDOSCOPY'"):
        generate("endoscopie", 0, 0)


def test_a_choice_that_leaves_nothing_says_what_the_modality_has():
    with pytest.raises(UserError, match="no family for CT; it has organ"):
        choose("CT", only=("instrument",))
    with pytest.raises(UserError, match="none left"):
        choose("US", without=tuple(FAMILIES))


def test_volumes_carry_a_world_matrix_that_agrees_with_their_spacing():
    for modality in ("CT", "MR"):
        case = generate(modality, SEED, 3)
        steps = np.linalg.norm(case.affine[:3, :3], axis=0)
        assert np.allclose(steps, case.spacing[::-1])
        assert case.spacing[0] > 1.5 * case.spacing[1]
        assert case.kind == "volume"
    assert generate("US", SEED, 3).kind == "clip" and generate("US", SEED, 3).affine is None
