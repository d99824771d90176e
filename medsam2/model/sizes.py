"""Model sizes: names, widths, official file names. Does not import torch, so that `medsam2 models` starts quickly.

Official sizes: SAM 2 (Ravi et al., arXiv 2408.00714). `hiera_nano` is medsam2's: the same modules, narrower and with
fewer layers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medsam2.errors import UserError, did_you_mean

ASSETS = Path(__file__).resolve().parent.parent / "assets"
NANO_ASSET = ASSETS / "hiera_nano.safetensors"
NANO = "hiera_nano"
MAX_IMAGE_SIZE = 8192  # px; a damaged file may state any size, and memory grows with its square
STRIDE = 32  # px; the stride of Hiera's coarsest stage, and 4 (patch) x 8 (first window)
PUBLISHED_AT = {
    "2.1": "https://dl.fbaipublicfiles.com/segment_anything_2/092824/",
    "2.0": "https://dl.fbaipublicfiles.com/segment_anything_2/072824/",
}


@dataclass(frozen=True)
class Size:
    """One model size.

    Attributes:
        yaml: the letter in the package's yaml names (`sam2.1_hiera_t.yaml`); empty for nano, which has no yaml.
        embed_dim, blocks: first width and number of blocks of the Hiera trunk, by which a file is recognised.
        parameters: {version: number of parameters}.
        image_size: side of the square input at which the published weights were trained, px.
    """

    name: str
    yaml: str
    embed_dim: int
    blocks: int
    parameters: dict[str, int]
    image_size: int = 1024

    def file_name(self, version: str) -> str:
        """The official file name of these weights (`sam2.1_hiera_tiny.pt`)."""
        return f"sam{'2.1' if version == '2.1' else '2'}_{self.name}.pt"

    def url(self, version: str) -> str:
        return PUBLISHED_AT[version] + self.file_name(version)


SIZES: dict[str, Size] = {
    size.name: size
    for size in (
        Size(NANO, "", 32, 7, {"2.1": 4_185_218}, image_size=128),
        Size("hiera_tiny", "t", 96, 12, {"2.1": 38_962_498, "2.0": 38_945_986}),
        Size("hiera_small", "s", 96, 16, {"2.1": 46_060_354, "2.0": 46_043_842}),
        Size("hiera_base_plus", "b+", 112, 24, {"2.1": 80_850_178, "2.0": 80_833_666}),
        Size("hiera_large", "l", 144, 48, {"2.1": 224_446_642, "2.0": 224_430_130}),
    )
}
PUBLISHED = [(size, version) for size in SIZES.values() if size.name != NANO for version in size.parameters]
"""The sizes and versions that Meta publishes, smallest first."""


@dataclass(frozen=True)
class ModelSpec:
    """Specification from which a network can be built again, in primitive values.

    Attributes:
        name: hiera_nano, hiera_tiny, hiera_small, hiera_base_plus or hiera_large.
        version: "2.1" or "2.0" (nano exists as 2.1 only).
        image_size: side of the square model input in px, a multiple of 32; 0 for the default of the size (128 or 1024).

    Raises:
        UserError: the name or version is unknown, or the side is not a multiple of 32 or too large.
    """

    name: str
    version: str = "2.1"
    image_size: int = 0

    def __post_init__(self) -> None:
        if self.name not in SIZES:
            raise UserError(
                f"model name {self.name!r} is unknown; choose one of {', '.join(SIZES)}."
                f"{did_you_mean(self.name, SIZES)}"
            )
        versions = SIZES[self.name].parameters
        if self.version not in versions:
            raise UserError(f"model {self.name} has no version {self.version!r}; choose one of {', '.join(versions)}.")
        if self.image_size == 0:
            object.__setattr__(self, "image_size", SIZES[self.name].image_size)
        if self.image_size > MAX_IMAGE_SIZE:
            raise UserError(f"image_size={self.image_size} is too large; give at most {MAX_IMAGE_SIZE} px.")
        if self.image_size < STRIDE or self.image_size % STRIDE:
            below = max(STRIDE, self.image_size // STRIDE * STRIDE)
            raise UserError(f"image_size={self.image_size} is not a multiple of {STRIDE}; the closest is {below}.")

    @property
    def size(self) -> Size:
        return SIZES[self.name]

    @property
    def embedding_side(self) -> int:
        """Side of the image embedding (stride 16), in cells."""
        return self.image_size // 16

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
