"""Small raw data sets in real file formats, and the real data where there is any."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _salt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never touch the salt of the user who runs them."""
    monkeypatch.setenv("MEDSAM2_SALT", "salt of the tests")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Real labelled data: `MEDSAM2_TEST_DATA`, by default `../shared/data` from the project's root."""
    path = Path(os.environ.get("MEDSAM2_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real test data not found at {path}; set MEDSAM2_TEST_DATA")
    return path


@dataclass(frozen=True)
class Writers:
    """Write volumes, frames and whole data sets as other programs would."""

    @staticmethod
    def volume(
        path: Path,
        array: np.ndarray,
        spacing: tuple[float, float, float] = (1.0, 1.0, 4.0),
        origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
        direction: tuple[float, ...] | None = None,
    ) -> Path:
        """Array [z, y, x] with spacing and origin in (x, y, z), LPS."""
        import SimpleITK as sitk

        image = sitk.GetImageFromArray(array)
        image.SetSpacing(spacing)
        image.SetOrigin(origin)
        if direction:
            image.SetDirection(direction)
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(path), True)
        return path

    @staticmethod
    def scan(seed: int, shape: tuple[int, int, int] = (12, 40, 48)) -> tuple[np.ndarray, np.ndarray]:
        """HU-like int16 and a mask with organ (1) on slices 3-8 and lesion (2) on slices 5-6."""
        rng = np.random.default_rng(seed)
        image = rng.normal(-20, 80, shape).astype(np.int16)
        mask = np.zeros(shape, np.uint8)
        mask[3:9, 8:24, 10 : 30 + seed % 5] = 1
        mask[5:7, 12:16, 14:20] = 2
        image[mask > 0] += 90
        return image, mask

    @classmethod
    def nnunet(cls, folder: Path, cases: int = 4, channel: str = "CT") -> Path:
        labels = {"background": 0, "organ": 1, "lesion": 2}
        folder.mkdir(parents=True)
        description = {
            "channel_names": {"0": channel},
            "labels": labels,
            "numTraining": cases,
            "file_ending": ".nii.gz",
        }
        (folder / "dataset.json").write_text(json.dumps(description))
        for number in range(cases):
            image, mask = cls.scan(number)
            cls.volume(folder / "imagesTr" / f"smith_{number:03d}_0000.nii.gz", image)
            cls.volume(folder / "labelsTr" / f"smith_{number:03d}.nii.gz", mask)
        return folder

    @staticmethod
    def clip(seed: int, frames: int = 10, colour: bool = False) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        image = rng.integers(0, 255, (frames, 32, 48, *([3] if colour else [])), dtype=np.uint8)
        mask = np.zeros((frames, 32, 48), np.uint8)
        for frame in range(frames):
            mask[frame, 8:20, 5 + frame : 20 + frame] = 1
        return image, mask

    @staticmethod
    def palette(path: Path, mask: np.ndarray) -> None:
        from PIL import Image

        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(mask).convert("P") if mask.dtype != np.uint8 else Image.fromarray(mask)
        picture = picture.convert("L")
        picture.putpalette([c for i in range(256) for c in ((i * 53) % 256, (i * 97) % 256, i)])
        picture.save(path)

    @classmethod
    def davis(cls, folder: Path, clips: int = 2, meta: dict[str, object] | None = None) -> Path:
        from PIL import Image

        for number in range(clips):
            image, mask = cls.clip(number)
            (folder / "JPEGImages" / f"clip{number}").mkdir(parents=True)
            for frame in range(image.shape[0]):
                Image.fromarray(image[frame]).save(folder / "JPEGImages" / f"clip{number}" / f"{frame:05d}.jpg")
                cls.palette(folder / "Annotations" / f"clip{number}" / f"{frame:05d}.png", mask[frame])
        meta = {"modality": "US", "labels": {"organ": 1}, "fps": 10, "spacing_mm": 0.3} if meta is None else meta
        (folder / "meta.json").write_text(json.dumps(meta))
        return folder

    @staticmethod
    def mp4(path: Path, image: np.ndarray) -> Path:
        import av

        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.height, stream.width, stream.pix_fmt = image.shape[1], image.shape[2], "yuv420p"
            for frame in image:
                for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
        return path

    @classmethod
    def videos(cls, folder: Path, clips: int = 2) -> Path:
        for number in range(clips):
            image, mask = cls.clip(number, colour=True)
            cls.mp4(folder / "videos" / f"v{number}.mp4", image)
            for frame in range(mask.shape[0]):
                cls.palette(folder / "masks" / f"v{number}" / f"{frame:05d}.png", mask[frame])
        meta = {"modality": "ENDOSCOPY", "labels": {"instrument": 1}, "fps": 25, "spacing_mm": None}
        (folder / "meta.json").write_text(json.dumps(meta))
        return folder

    @classmethod
    def npz(cls, path: Path, seed: int = 0) -> Path:
        image, mask = cls.scan(seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            path,
            imgs=np.clip(image + 128, 0, 255).astype(np.uint8),
            gts=(mask == 2).astype(np.uint8),
            spacing=np.array([0.8, 0.7, 5.0]),
            direction=np.array([1.0, 0, 0, 0, 1, 0, 0, 0, 1]),
            origin=np.array([-10.0, 20, 30]),
        )
        return path

    @classmethod
    def everything(cls, folder: Path) -> Path:
        """Four data sets in four layouts below one folder."""
        cls.nnunet(folder / "Dataset001_Test")
        cls.davis(folder / "deep" / "echo")
        cls.videos(folder / "deep" / "scope")
        for number, (patient, slices) in enumerate(
            (("000015", "081-093"), ("000015", "103-115"), ("000001", "008-023"))
        ):
            cls.npz(folder / "recist" / f"CT_Lesion_{patient}_01_01_{slices}.npz", number)
        return folder


@pytest.fixture(scope="session")
def write() -> type[Writers]:
    return Writers


@pytest.fixture(scope="session")
def raw_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All layouts below one folder; read only."""
    return Writers.everything(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="session")
def shards(raw_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`raw_folder` prepared with the defaults; read only."""
    from medsam2.shards.prepare.run import PrepareOptions, prepare

    out = tmp_path_factory.mktemp("prepared") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSAM2_SALT", "salt of the tests")
        prepare(raw_folder, out, PrepareOptions())
    return out
