"""Generated cases of four modalities with named families of structures, for tests, tutorials and pretraining."""

from medsam2.demo.phantoms.families import FAMILIES, PHANTOM_MODALITIES, Choice, Family, choose
from medsam2.demo.phantoms.generate import generate
from medsam2.demo.phantoms.write import write_cases

__all__ = ["FAMILIES", "PHANTOM_MODALITIES", "Choice", "Family", "choose", "generate", "write_cases"]
