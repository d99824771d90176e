"""Two ranks with batch b give the gradients of one rank with batch 2b, whatever prompts are drawn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gradients
import pytest
import torch
from ranks import ROOT, finish
from safetensors.torch import load_file
from torch import Tensor

from medsam2.config import compose

RELATIVE = 1e-5  # of a tensor's gradient, in fp32
NOTHING = 1e-6  # of the whole gradient: rounding of small gradients that are sums of large terms
Gradients = dict[str, Tensor]


def launch(folder: Path, strategy: str) -> None:
    """Two ranks; Lightning starts the second itself, as in `python train.py trainer=ddp`."""
    folder.mkdir()
    paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    run = subprocess.Popen(
        [sys.executable, gradients.__file__, str(folder), "2", strategy],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    done = finish(run)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradients") / "one"
    folder.mkdir()
    gradients.run(folder, 1, "auto", tuple(gradients.kinds()))
    return folder


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the strategy that `trainer=ddp` gives, one kind of batch after the other, so that a parameter that is left
    without a gradient in one step would stop the next."""
    strategy = compose("train", ["trainer=ddp", "data.shards=none", "output=none"])["trainer"]["strategy"]
    folder = tmp_path_factory.mktemp("gradients") / "two"
    launch(folder, strategy)
    return folder


@pytest.mark.parametrize("kind", gradients.kinds())
def test_two_ranks_give_the_gradients_of_one_with_twice_the_batch(kind: str, one_rank: Path, two_ranks: Path) -> None:
    whole = load_file(one_rank / f"{kind}-rank-0.safetensors")
    first, second = (load_file(two_ranks / f"{kind}-rank-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    # a parameter that no rank used has no gradient at all, as on one rank: AdamW leaves it and its averages alone
    assert set(first) == set(second) == set(whole)
    size = length(whole)
    assert size > 0 and length({n: first[n] - whole[n] for n in whole}) < RELATIVE * size
    for name, grad in whole.items():
        assert float((first[name] - grad).norm()) <= RELATIVE * float(grad.norm()) + NOTHING * size, name


def test_the_kinds_leave_different_parameters_without_a_gradient(one_rank: Path) -> None:
    """Else the strategy would not be put to the test."""
    used = {kind: set(load_file(one_rank / f"{kind}-rank-0.safetensors")) for kind in ("mask", "box", "box on a still")}
    assert used["mask"] - used["box"] and used["box"] - used["box on a still"]


def test_ranks_that_normalise_by_their_own_objects_give_other_gradients(one_rank: Path, tmp_path: Path) -> None:
    """What the first test would find: the mean over ranks of means over each rank's own objects."""
    halves = []
    for name, clips in (("first", range(1)), ("second", range(1, 2))):
        (tmp_path / name).mkdir()
        gradients.run(tmp_path / name, 1, "auto", ("box",), clips)
        halves.append(load_file(tmp_path / name / "box-rank-0.safetensors"))
    whole = load_file(one_rank / "box-rank-0.safetensors")
    naive = {name: (halves[0][name] + halves[1][name]) / 2 for name in whole}
    assert length({name: naive[name] - whole[name] for name in whole}) > 1e-2 * length(whole)


def length(found: Gradients) -> float:
    return float(torch.stack([grad.double().norm() for grad in found.values()]).norm())
