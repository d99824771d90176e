"""Lightning's TensorBoard logger, with pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

if TYPE_CHECKING:
    from medsam2.training.callbacks.pictures import Shown


class TensorBoardLog(TensorBoardLogger):
    """Event files in `tensorboard/` of the run folder."""

    @rank_zero_only
    def log_pictures(self, pictures: Sequence[Shown], step: int) -> None:
        from PIL import Image

        for shown in pictures:
            with Image.open(io.BytesIO(shown.webp)) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self.experiment.add_image(f"pictures/{shown.name}", pixels, step, dataformats="HWC")
