"""Score checkpoints: python evaluate.py checkpoint=C data.source=PATH protocol=NAME output=FOLDER [key=value ...].

Under torchrun or srun every rank runs this file, and the ranks share the cases.
"""

import os
from typing import Any

# Waiting threads sleep instead of spinning: on a shared machine, spinning makes a small model ten times slower. OpenMP
# reads the variable when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from medsam2.config import hydra_entry  # noqa: E402


def main(config: dict[str, Any]) -> None:
    from medsam2.evaluation.evaluate import evaluate, evaluate_share
    from medsam2.evaluation.run.ranks import find_rank
    from medsam2.evaluation.settings import load_settings

    settings, rank = load_settings(config), find_rank()
    if rank.leads:
        evaluate(settings, rank)
    else:
        evaluate_share(settings, rank)


if __name__ == "__main__":
    hydra_entry("evaluate", main)
