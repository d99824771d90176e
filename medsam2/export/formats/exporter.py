"""What a format is: one `Exporter`, of which each file beside this one defines one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from medsam2 import __version__
from medsam2.export.verify.run import Consumer
from medsam2.files import file_name
from medsam2.model.build import LoadedModel
from medsam2.model.provenance import Provenance


class Exporter(ABC):
    """A format in which a model can be written.

    Attributes:
        title: whom it is for, on the model card.
        library: how model hubs call the library that loads it; tags: likewise.
    """

    title: str
    library: str
    tags: tuple[str, ...] = ()

    def supports(self, model: LoadedModel) -> bool:
        """Whether a release of this model has the format."""
        return True

    @abstractmethod
    def build(self, model: LoadedModel, folder: Path) -> None:
        """Write the format's files into an existing, empty folder.

        Raises:
            UserError: the model cannot be written in this format.
        """

    @abstractmethod
    def load_as_consumer(self, model: LoadedModel, folder: Path, scratch: Path) -> Consumer:
        """The program that loads what `build` wrote, as its users do.

        Args:
            scratch: a folder for files that the program needs beside those.
        """

    def describe(self, model: LoadedModel, folder: Path) -> dict[str, Any]:
        """Values for the format's section of the card's template, of what `build` wrote."""
        return {}


def file_stem(model: LoadedModel) -> str:
    """`medsam2_tiny_512`: no dots, since some consumers cut the name at the first one."""
    return f"medsam2_{model.spec.name.removeprefix('hiera_')}_{model.spec.image_size}"


def shareable(model: LoadedModel) -> Provenance:
    """What an exported file says about itself: nothing of the machine that trained it."""
    start = model.provenance.start
    update = {
        "spec": model.spec,
        "start": None if start is None else file_name(start),
        "adapter": None,  # loading has merged it
        "exported_by": f"medsam2 {__version__}",
    }
    return model.provenance.model_copy(update=update)
