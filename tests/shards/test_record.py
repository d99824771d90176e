from __future__ import annotations

import io

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from medsam2.shards.record import CorruptFrameError, decode_frame, decode_mask, encode_frame, encode_mask

frames = hnp.arrays(
    np.uint8,
    st.tuples(st.integers(1, 20), st.integers(1, 20)) | st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3)),
)


@pytest.mark.parametrize("codec", ["zstd", "lz4", "png"])
@given(frame=frames)
@settings(max_examples=40, deadline=None)
def test_frames_come_back_as_they_went(codec: str, frame: np.ndarray):
    assert np.array_equal(decode_frame(encode_frame(frame, codec), codec, frame.shape), frame)


def test_jpeg_comes_back_nearly():
    y, x = np.mgrid[0:64, 0:64]
    frame = np.stack([x * 4, y * 4, x + y], axis=2).astype(np.uint8)
    back = decode_frame(encode_frame(frame, "jpeg"), "jpeg", frame.shape)
    assert np.abs(back.astype(int) - frame).mean() < 3


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
@given(planes=hnp.arrays(st.sampled_from([np.uint8, np.uint16]), st.tuples(*[st.integers(1, 12)] * 3)))
@settings(max_examples=40, deadline=None)
def test_masks_come_back_as_they_went(codec: str, planes: np.ndarray):
    back = decode_mask(encode_mask(planes, codec), codec, planes.shape, planes.dtype.name)
    assert np.array_equal(back, planes)


def test_frames_that_are_not_contiguous_are_encoded_too():
    frame = np.arange(200, dtype=np.uint8).reshape(10, 20)[::2, ::-3]
    assert np.array_equal(decode_frame(encode_frame(frame, "zstd"), "zstd", frame.shape), frame)


@pytest.mark.parametrize("codec", ["zstd", "lz4", "png", "jpeg"])
def test_cut_payloads_and_other_shapes_are_refused(codec: str):
    frame = np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8)
    payload = encode_frame(frame, codec)
    with pytest.raises(CorruptFrameError):
        decode_frame(payload, codec, (32, 31))
    with pytest.raises(CorruptFrameError):
        decode_frame(payload, codec, (33, 32))
    for cut in (0, 5, len(payload) // 2):
        with pytest.raises(CorruptFrameError):
            decode_frame(payload[:cut], codec, frame.shape)


def test_a_bomb_in_a_member_is_not_unpacked():
    bomb = zstandard.ZstdCompressor().compress(b"\0" * (64 << 20))
    with pytest.raises(CorruptFrameError, match="more than the expected 1024"):
        decode_frame(bomb, "zstd", (32, 32))


def test_an_unknown_codec_is_refused():
    with pytest.raises(ValueError, match="unknown codec 'zip'"):
        encode_frame(np.zeros((2, 2), np.uint8), "zip")


@pytest.mark.parametrize("codec", ["zstd", "lz4", "png"])
def test_a_flipped_bit_is_found(codec: str):
    """Without a checksum a flipped bit in a literal would be a wrong grey value and nothing else."""
    frame = np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8)
    payload = encode_frame(frame, codec)
    for place in range(len(payload) // 4, len(payload) - 20, 50):
        broken = bytearray(payload)
        broken[place] ^= 4
        with pytest.raises(CorruptFrameError):
            decode_frame(bytes(broken), codec, frame.shape)


@pytest.mark.parametrize("codec", ["zstd", "lz4", "png"])
def test_frames_and_masks_are_decoded_into_a_given_array(codec: str):
    clip = np.zeros((3, 8, 9), np.uint8)
    frame = np.random.default_rng(0).integers(0, 255, (8, 9), dtype=np.uint8)
    payload = encode_frame(frame, codec)
    assert decode_frame(payload, codec, frame.shape, out=clip[1]) is not None
    assert np.array_equal(clip[1], frame) and not clip[[0, 2]].any()
    assert np.array_equal(decode_mask(payload, codec, (1, 8, 9), "uint8", out=clip[2:3])[0], frame)
    assert np.array_equal(clip[2], frame)


def test_masks_of_palette_pictures_are_their_indices():
    mask = np.arange(72, dtype=np.uint8).reshape(8, 9) % 5
    file = io.BytesIO()
    picture = Image.fromarray(mask)
    picture.putpalette([0, 0, 0, 250, 3, 3, 250, 3, 3, 9, 9, 9, 1, 1, 1])
    picture.save(file, format="PNG")
    assert np.array_equal(decode_mask(file.getvalue(), "png", (1, 8, 9), "uint8")[0], mask)
    with pytest.raises(CorruptFrameError, match="9 x 8|8 x 9"):
        decode_mask(file.getvalue(), "png", (1, 9, 8), "uint8")
    with pytest.raises(CorruptFrameError):
        decode_mask(file.getvalue()[:50], "png", (1, 8, 9), "uint8")
