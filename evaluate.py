"""Score checkpoints: python evaluate.py checkpoint=C data.source=PATH protocol=NAME output=FOLDER [key=value ...]."""

import os
from typing import Any

# Threads that wait for each other sleep instead of spinning: on a machine that does something else as well, spinning
# makes a small model ten times slower. OpenMP reads it when torch is imported, so it is set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from medsam2.config import hydra_entry, validate  # noqa: E402


def main(config: dict[str, Any]) -> None:
    from medsam2.evaluation.evaluate import evaluate
    from medsam2.evaluation.settings import EvaluateSettings

    evaluate(validate(EvaluateSettings, config, "the evaluation's configuration"))


if __name__ == "__main__":
    hydra_entry("evaluate", main)
