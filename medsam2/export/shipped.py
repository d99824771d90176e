"""Make the checkpoint that ships inside the package from a finished pretraining run (`make pretrain`).

    python -m medsam2.export.shipped RUN [--out FILE]

The weights are stored in half precision; the header says which recipe, data and commit made them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from medsam2.errors import UserError, explain_errors
from medsam2.model.build import load_model, save_asset
from medsam2.model.sizes import NANO_ASSET

DATA = "medsam2 demo cases --without wall --cases 600 --seed 1000 (generated; no patient data)"


def shipped_metadata(run: Path, step: int, prompts: Mapping[str, Any]) -> dict[str, Any]:
    """What the header says beside the model's spec: data, recipe, commit, versions, steps.

    Args:
        prompts: settings of the last phase's prompts; a protocol with others is marked in evaluations.
    """
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    return {
        "data": DATA,
        "recipe": {"file": "recipes/pretrain_nano", "prompts": prompts},
        "phase": run.name,
        "seed": config["seed"],
        "steps_of_last_phase": step,
        "commit": environment["git"],
        "versions": environment["versions"],
        "licence": "Apache-2.0",
    }


@explain_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Write the asset; the run's last checkpoint is taken (averaged weights, where the run averaged).

    Raises:
        UserError: the folder is not a finished run.
    """
    parser = argparse.ArgumentParser(prog="python -m medsam2.export.shipped", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of the last phase, e.g. runs/pretrain/run/polish")
    parser.add_argument("--out", type=Path, default=NANO_ASSET, help="the file to write")
    given = parser.parse_args(arguments)
    checkpoint = given.run / "checkpoints" / "last.ckpt"
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint} does not exist; give the folder of the last phase of a pretraining run.")
    loaded = load_model(str(checkpoint))
    metadata = shipped_metadata(given.run, int(loaded.metadata["step"]), loaded.metadata["recipe"]["prompts"])
    save_asset(given.out, loaded.sam.state_dict(), loaded.spec, metadata)
    print(f"wrote {given.out} ({given.out.stat().st_size / 1e6:.1f} MB) from {checkpoint}")


if __name__ == "__main__":
    main()
