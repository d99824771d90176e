"""Make the checkpoint that ships inside the package from a finished pretraining run (`make pretrain`).

    python -m medsam2.export.shipped RUN [OUT]

RUN is the folder of the last phase, e.g. runs/pretrain/run/polish. The weights are stored in half precision; the header
says which recipe, data and commit made them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from medsam2.errors import UserError, explain_errors
from medsam2.model.build import load_model, save_asset
from medsam2.model.sizes import NANO_ASSET

DATA = "medsam2 demo cases --without wall --cases 600 --seed 1000 (generated; no patient data)"
RECIPE = "recipes/pretrain_nano"


@explain_errors
def main(run: str, out: str = str(NANO_ASSET)) -> None:
    """Write the asset; the run's last checkpoint is taken (averaged weights, where the run averaged).

    Raises:
        UserError: the folder is not a finished run.
    """
    checkpoint, environment = Path(run) / "checkpoints" / "last.ckpt", Path(run) / "environment.json"
    if not (checkpoint.is_file() and environment.is_file()):
        raise UserError(f"{checkpoint} does not exist; give the folder of the last phase of a pretraining run.")
    model, recorded = load_model(checkpoint), json.loads(environment.read_text(encoding="utf-8"))
    metadata = {
        "data": DATA,
        # Those of the last phase: a protocol with other prompts is marked in evaluations.
        "recipe": {"file": RECIPE, "prompts": model.provenance.recipe_part("prompts")},
        "phase": Path(run).name,
        "seed": model.provenance.seed,
        "step": model.provenance.step,
        "commit": recorded["git"],
        "versions": recorded["versions"],
        "licence": "Apache-2.0",
    }
    save_asset(out, model.sam.state_dict(), model.spec, metadata)
    print(f"wrote {out} ({Path(out).stat().st_size / 1e6:.1f} MB) from {checkpoint}")


if __name__ == "__main__":
    main(*sys.argv[1:])
