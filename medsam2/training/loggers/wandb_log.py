"""Lightning's Weights & Biases logger, for runs that must not wait for a server.

A server that is dead, or takes connections and never answers, costs the run at most `init_seconds` at its begin and
`finish_seconds` at its end: wandb's own process does the sending, and everything is in files of the run folder, too.
"""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from medsam2.errors import first_line
from medsam2.training.callbacks.log import NOTE, WARNING, note

if TYPE_CHECKING:
    from medsam2.training.callbacks.pictures import Shown


class WandbLog(WandbLogger):
    """One wandb run for a run folder; a resumed run goes on in it.

    Args:
        save_dir: the run folder; `wandb/` is made in it.
        init_seconds, finish_seconds: so long the run waits for the server at its begin and at its end.
        options: more arguments of Lightning's `WandbLogger` and of `wandb.init`.
    """

    def __init__(self, save_dir: str, init_seconds: float, finish_seconds: float, **options: Any) -> None:
        import wandb

        self.folder, self.begun, self.failed = Path(save_dir), False, False
        earlier = sorted(self.folder.glob("wandb/*run-*-*"))  # [offline-]run-TIME-ID
        new_id = os.environ.get("WANDB_RUN_ID", secrets.token_hex(4))
        run_id = earlier[-1].name.partition("run-")[2].partition("-")[2] if earlier else new_id
        settings = wandb.Settings(
            init_timeout=init_seconds, finish_timeout=finish_seconds, finish_timeout_raises=True, console="off",
            disable_git=True, save_code=False, host="", silent=True, x_disable_meta=True, x_save_requirements=False,
        )  # fmt: skip
        super().__init__(
            **{"name": os.environ.get("WANDB_NAME", self.folder.name), "id": run_id, "save_dir": save_dir, **options},
            settings=settings,
        )

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The wandb run, offline where the server does not answer in time."""
        import wandb

        if not self.begun:
            wandb.setup(wandb.Settings(silent=True))  # it asks nothing: a question in the middle of a run would stop it
            try:
                run = super().experiment
            except Exception as error:  # whatever a service can raise
                self._tell(
                    WARNING, f"wandb cannot be reached ({first_line(error)}); this run is logged offline and goes on"
                )
                wandb.teardown()  # wandb's process still has the run that it could not announce
                self._wandb_init["mode"] = "offline"  # Lightning keeps the arguments of wandb.init here alone
                run = super().experiment
            self.begun = True
            if run.offline:
                self._tell(NOTE, "wandb is offline", run)
            else:
                print(f"wandb: {run.url}", flush=True)
        return super().experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {key: float(value) for key, value in metrics.items() if key != "epoch"}
        self._attempt(lambda: super(WandbLog, self).log_metrics(values, step))

    def log_hyperparams(self, params: Any) -> None:
        """The configuration, of each path just its last part."""
        self._attempt(lambda: super(WandbLog, self).log_hyperparams(without_paths(params)))

    def log_pictures(self, pictures: Sequence[Shown], step: int) -> None:
        import wandb
        from PIL import Image

        def send() -> None:
            images = {
                f"pictures/{shown.name}": wandb.Image(Image.open(io.BytesIO(shown.webp)), caption=shown.caption)
                for shown in pictures
            }
            self.experiment.log({**images, "trainer/global_step": step})

        self._attempt(send)

    @rank_zero_only
    def _attempt(self, action: Callable[[], Any]) -> None:
        """Hand something to wandb; a failure there is reported once, and the run goes on."""
        if not self.failed:
            try:
                action()
            except Exception as error:
                self.failed = True
                self._tell(WARNING, f"wandb has failed and is left alone from here on ({first_line(error)})")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Send what is left, for a bounded time, else say how to send it later."""
        if self.begun:
            run, self.begun = super().experiment, False
            try:
                run.finish(exit_code=int(status != "success"))
            except Exception as error:
                self._tell(WARNING, f"wandb did not take everything in time ({first_line(error)})", run)

    def _tell(self, kind: str, text: str, run: Any = None) -> None:
        """Print something and note it for the report, which is passed on and so has no path of this machine in it."""
        shown = noted = text
        if run is not None:
            local = Path(run.dir).parent
            shown, noted = (f"{text}; send it with: wandb sync {path}" for path in (local, Path("wandb", local.name)))
        note(self.folder, kind, noted)
        print(shown, flush=True)


def without_paths(value: Any) -> Any:
    """The configuration without folders, addresses and their secrets: of each path just its last part."""
    if isinstance(value, Mapping):
        return {without_paths(key): without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(entry) for entry in value]
    if not isinstance(value, str) or "/" not in value:
        return value
    return value.partition("?")[0].rstrip("/").rpartition("/")[2].rpartition("@")[2]
