"""TensorBoard event files in `tensorboard/` of the run folder."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from medsam2.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from medsam2.training.pictures import Shown
    from medsam2.training.settings import TrainSettings

NAME, FOLDER = "tensorboard", "tensorboard"


def make(settings: TrainSettings, folder: Path, resumed_step: int | None) -> TensorBoardLog:
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("logger=tensorboard needs the package tensorboard; pip install 'medsam2[tensorboard]'.")
    config = settings.model_dump_json(indent=2)
    return TensorBoardLog(folder / FOLDER, config, resumed_step)


class TensorBoardLog(Logger):
    """Scalars, pictures and the configuration; after a resume TensorBoard hides what was logged beyond its step."""

    def __init__(self, folder: Path, config: str, resumed_step: int | None = None) -> None:
        super().__init__()
        self.folder, self.config, self.resumed_step = folder, config, resumed_step
        self._writer: SummaryWriter | None = None

    @property
    def name(self) -> str:
        return NAME

    @property
    def version(self) -> str:
        return ""

    @property
    def writer(self) -> SummaryWriter:
        """Opened with the first figure, so that a refused run leaves nothing."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if self.resumed_step is None else self.resumed_step + 1
            self._writer = SummaryWriter(str(self.folder), purge_step=purge)
            if purge is None:
                self._writer.add_text("config", "\n".join(f"    {line}" for line in self.config.splitlines()), 0)
        return self._writer

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            if name != "epoch":
                self.writer.add_scalar(name, float(value), step)

    @rank_zero_only
    def log_pictures(self, pictures: Sequence[Shown], step: int) -> None:
        from PIL import Image

        for shown in pictures:
            with Image.open(io.BytesIO(shown.webp)) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self.writer.add_image(f"pictures/{shown.name}", pixels, step, dataformats="HWC")

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is logged as text with the first figure."""

    @rank_zero_only
    def save(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer, self.resumed_step = None, self.resumed_step or 0
