from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

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
    with pytest.raises(CorruptFrameError, match="more than the promised 1024"):
        decode_frame(bomb, "zstd", (32, 32))


def test_an_unknown_codec_is_refused():
    with pytest.raises(ValueError, match="unknown codec 'zip'"):
        encode_frame(np.zeros((2, 2), np.uint8), "zip")
