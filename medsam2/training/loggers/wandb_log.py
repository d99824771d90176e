"""Weights & Biases: online, offline (`WANDB_MODE=offline`), or out of reach.

A server that is dead, or takes connections and never answers, costs the run at most `INIT_SECONDS` at its begin and
`FINISH_SECONDS` at its end: wandb's own process does the sending, and everything is in files of the run folder, too.
"""

from __future__ import annotations

import io
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from medsam2.files import atomic_write
from medsam2.training.events import NOTE, WARNING, note

if TYPE_CHECKING:
    from medsam2.training.pictures import Shown
    from medsam2.training.settings import TrainSettings

NAME, IDENTITY = "wandb", "wandb.json"
STEP = "trainer/global_step"
INIT_SECONDS, FINISH_SECONDS = 20.0, 30.0


def make(settings: TrainSettings, folder: Path, resumed_step: int | None) -> WandbLog:
    return WandbLog(folder, shareable(settings.model_dump(mode="json")))


class WandbLog(Logger):
    """One wandb run for a run folder: its id is kept in `wandb.json`, and a resumed run goes on in it.

    Args:
        folder: the run folder; `wandb/` is made in it. config: what wandb shows as the configuration.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.folder, self.config = folder, config
        self.local: Path | None = None
        self._run: Any = None
        self.given_up = self.offline = False

    @property
    def name(self) -> str:
        return NAME

    @property
    def version(self) -> str:
        return self._run.id if self._run is not None else ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {key: float(value) for key, value in metrics.items() if key != "epoch"}
        self._attempt(lambda run: run.log({**values, STEP: int(step or 0)}))

    @rank_zero_only
    def log_pictures(self, pictures: Sequence[Shown], step: int) -> None:
        import wandb
        from PIL import Image

        def send(run: Any) -> None:
            images = {
                f"pictures/{shown.name}": wandb.Image(Image.open(io.BytesIO(shown.webp)), caption=shown.caption)
                for shown in pictures
            }
            run.log({**images, STEP: step})

        self._attempt(send)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is given when the run begins."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Send what is left, for a bounded time; then say how to send it later."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish(exit_code=0 if status == "success" else 1)
        except Exception as error:  # observing a run never ends it
            self._say(f"wandb did not take everything within {FINISH_SECONDS:.0f} s ({reason(error)})")
            return
        if self.offline:
            print(f"wandb was offline{self._how(self.local)}", flush=True)

    # ---------------------------------------------------------------------------------------------- the wandb run

    def _attempt(self, action: Callable[[Any], None]) -> None:
        """Hand something to wandb; what fails there is said once, and the run goes on."""
        if self.given_up:
            return
        try:
            if self._run is None:
                self._run = self._begin()
            action(self._run)
        except Exception as error:  # whatever a service can raise
            self.given_up = True
            self._say(f"wandb has failed and is left alone from here on ({reason(error)})")

    def _begin(self) -> Any:
        """The wandb run, offline where the server does not answer in time."""
        try:
            run = self._init(None)
        except Exception as error:
            text = f"wandb cannot be reached ({reason(error)}); this run is logged offline and goes on"
            note(self.folder, WARNING, text)
            print(text, flush=True)
            import wandb

            wandb.teardown()  # wandb's process still has the run that it could not announce
            run = self._init("offline")
        self.local, self.offline = Path(run.dir).parent, bool(run.offline)
        if self.offline:  # said now, so that the run's report has it
            note(self.folder, NOTE, f"wandb is offline{self._how(Path(NAME, self.local.name))}")
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)
        if run.url:
            print(f"wandb: {run.url}", flush=True)
        return run

    def _init(self, mode: Literal["offline"] | None) -> Any:
        import wandb

        wandb.setup(wandb.Settings(silent=True))  # it asks nothing: a question in the middle of a run would stop it
        asked = os.environ.get("WANDB_INIT_TIMEOUT")
        settings = wandb.Settings(
            init_timeout=float(asked) if asked else INIT_SECONDS, finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True, console="off", disable_git=True, save_code=False, host="", silent=True,
            x_disable_meta=True, x_save_requirements=False,
        )  # fmt: skip
        return wandb.init(
            dir=str(self.folder), project=os.environ.get("WANDB_PROJECT", "medsam2"), id=self._identity(),
            name=os.environ.get("WANDB_NAME", self.folder.name), config=dict(self.config), resume="allow", mode=mode,
            settings=settings,
        )  # fmt: skip

    def _identity(self) -> str:
        """The id of the wandb run, the same after a resume."""
        path = self.folder / IDENTITY
        if path.is_file():
            return str(json.loads(path.read_text(encoding="utf-8"))["id"])
        found = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        with atomic_write(path, "w") as file:
            json.dump({"id": found}, file)
        return found

    def _say(self, what: str) -> None:
        text = what + self._how(self.local)
        note(self.folder, WARNING, text)
        print(text, flush=True)

    @staticmethod
    def _how(local: Path | None) -> str:
        return f"; send it with: wandb sync {local}" if local is not None else ""


def reason(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shareable(value: Any) -> Any:
    """The configuration without folders and addresses: of each path just its last part."""
    if isinstance(value, Mapping):
        return {shareable(key): shareable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [shareable(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and "/" in value else value
