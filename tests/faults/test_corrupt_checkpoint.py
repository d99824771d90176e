"""A run whose newest checkpoint is damaged goes on from the one before, to the same end."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import SMALLEST, column
from small_shards import build

from medsam2.config import compose
from medsam2.training.fit import fit
from medsam2.training.run_folder.events import read_events


def test_a_flipped_bit_costs_the_steps_between_two_checkpoints_and_is_said(tmp_path: Path) -> None:
    steps = ("trainer.max_steps=4", "trainer.checkpoint_every=2", "trainer.progress=none", "resume=auto")
    words = [*SMALLEST, *steps, f"data.shards={build(tmp_path / 'shards')}", f"output={tmp_path / 'run'}"]
    fit(compose("train", words))
    whole = column(tmp_path / "run", "train/loss")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    last.with_name(".last.ckpt.123.partial").write_bytes(b"of a run that was killed")
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged; trying the checkpoint before it"):
        fit(compose("train", words))
    assert column(tmp_path / "run", "train/loss") == whole and list(whole) == [0, 1, 2, 3]
    texts = [event.text for event in read_events(tmp_path / "run")]
    assert any("went on from previous.ckpt" in text for text in texts)
    assert not list((tmp_path / "run").rglob(".*.partial"))
