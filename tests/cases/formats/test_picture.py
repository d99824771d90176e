from __future__ import annotations

import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from medsam2.cases.case import CaseError
from medsam2.cases.formats.picture import read, read_mask, recognises
from medsam2.cases.formats.registry import find_format
from medsam2.cases.formats.tiff import read_tiff
from medsam2.cases.geometry import CaseWarning
from medsam2.cases.settings import DatasetSettings

PLAIN = DatasetSettings()
NOISE = np.random.default_rng(0).integers(0, 255, (61, 47, 3), dtype=np.uint8)


def stack(path: Path, pages: np.ndarray, description: str = "", **tags: object) -> Path:
    """A TIFF with one page a slice of [Z, Y, X]."""
    pictures = [Image.fromarray(page) for page in pages]
    info = TiffImagePlugin.ImageFileDirectory_v2()
    if description:
        info[270] = description
    pictures[0].save(path, save_all=True, append_images=pictures[1:], tiffinfo=info, **tags)
    return path


@pytest.mark.parametrize("ending", ["png", "bmp", "tif"])
def test_a_colour_still_is_one_slice_with_its_pixels(tmp_path: Path, ending: str):
    path = tmp_path / f"a.{ending}"
    Image.fromarray(NOISE).save(path)
    raster = read(path, PLAIN)
    assert np.array_equal(raster.array, NOISE[None])
    assert (raster.spacing, raster.moving, raster.affine) == ((1.0, 1.0, 1.0), False, None)
    assert find_format(path).NAME == "picture"


def test_a_still_of_equal_channels_is_grey(tmp_path: Path):
    Image.fromarray(np.repeat(NOISE[..., :1], 3, axis=2)).save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png", PLAIN).array, NOISE[None, ..., 0])


@pytest.mark.parametrize("kind", [np.uint16, np.int16, np.float32, np.uint8])
def test_a_tiff_keeps_its_type(tmp_path: Path, kind: type):
    array = (np.arange(300).reshape(15, 20) * 7 - (50 if kind in (np.int16, np.float32) else 0)).astype(kind)
    (tmp_path / "a.tif").write_bytes(imagecodecs.tiff_encode(array))
    raster = read(tmp_path / "a.tif", PLAIN)
    assert raster.array.dtype == kind
    assert np.array_equal(raster.array[0], array)


def test_a_png_of_sixteen_bits_keeps_them_and_is_refused_in_colours(tmp_path: Path):
    array = np.random.default_rng(1).integers(0, 65535, (15, 20), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(array))
    raster = read(tmp_path / "a.png", PLAIN)
    assert raster.array.dtype == np.uint16
    assert np.array_equal(raster.array[0], array)
    (tmp_path / "b.png").write_bytes(imagecodecs.png_encode(np.stack([array] * 3, axis=-1)))
    for reader in (read, read_mask):
        with pytest.raises(CaseError, match=r"b\.png: colours of 16 bits"):
            reader(tmp_path / "b.png", PLAIN)


def test_sixteen_bit_colour_tiffs_are_read(tmp_path: Path):
    array = np.random.default_rng(1).integers(0, 65535, (15, 20, 3), dtype=np.uint16)
    (tmp_path / "a.tif").write_bytes(imagecodecs.tiff_encode(array, photometric="rgb"))
    assert np.array_equal(read(tmp_path / "a.tif", PLAIN).array[0], array)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate"])
def test_pages_are_slices_of_a_volume(tmp_path: Path, compression: str | None):
    pages = np.random.default_rng(2).integers(0, 4000, (5, 12, 9), dtype=np.uint16)
    path = stack(tmp_path / "a.tif", pages, **({"compression": compression} if compression else {}))
    raster = read(path, PLAIN)
    assert np.array_equal(raster.array, pages)
    assert not raster.moving
    assert np.array_equal(read_mask(path, PLAIN).planes, pages[None])


def test_imagej_tells_spacing_and_time(tmp_path: Path):
    pages = np.zeros((4, 12, 9), np.uint8)
    text = "ImageJ=1.53t\nimages=4\nslices=4\nunit=micron\nspacing=2.5\n"
    raster = read(stack(tmp_path / "z.tif", pages, text, resolution=4.0), PLAIN)
    assert raster.spacing == pytest.approx((0.0025, 0.00025, 0.00025))
    assert not raster.moving
    text = "ImageJ=1.53t\nimages=4\nframes=4\nfinterval=0.2\n"
    raster = read(stack(tmp_path / "t.tif", pages, text), PLAIN)
    assert raster.moving
    assert raster.spacing == pytest.approx((0.2, 1.0, 1.0))


@pytest.mark.parametrize("counts", ["images=8\nslices=8", "images=2\nslices=2", "images=4\nchannels=3\nslices=2"])
def test_an_imagej_description_that_does_not_fit_its_pages_is_refused(tmp_path: Path, counts: str):
    path = stack(tmp_path / "a.tif", np.zeros((4, 12, 9), np.uint8), f"ImageJ=1.53t\n{counts}\n")
    with pytest.raises(CaseError, match=r"a\.tif: its description names pixels of shape"):
        read(path, PLAIN)


def test_an_imagej_stack_that_lists_its_first_page_alone_is_read_whole(tmp_path: Path):
    pages = np.random.default_rng(3).integers(0, 255, (4, 12, 9), dtype=np.uint8)
    path = stack(tmp_path / "a.tif", pages[:1], "ImageJ=1.53t\nimages=4\nslices=4\n")
    with Image.open(path) as picture:
        at = picture.tag_v2[273][0]
    content = path.read_bytes()
    assert at + pages[0].size == len(content)
    path.write_bytes(content + pages[1:].tobytes())
    assert np.array_equal(read(path, PLAIN).array, pages)
    path.write_bytes(content + pages[1:].tobytes()[:-5])
    with pytest.raises(CaseError, match=r"a\.tif: damaged or cut short"):
        read(path, PLAIN)


def test_ome_tells_spacing_and_order(tmp_path: Path):
    pages = np.arange(4, dtype=np.uint8)[:, None, None] * np.ones((1, 12, 9), np.uint8)
    text = (
        '<OME><Image><Pixels DimensionOrder="XYCZT" SizeX="9" SizeY="12" SizeC="{c}" SizeZ="{z}" SizeT="1" '
        'Type="uint8" PhysicalSizeX="0.5" PhysicalSizeY="0.5" PhysicalSizeZ="2">{end}</Pixels></Image></OME>'
    )
    raster = read(stack(tmp_path / "a.tif", pages, text.format(c=1, z=4, end="<TiffData/>")), PLAIN)
    assert raster.spacing == pytest.approx((0.002, 0.0005, 0.0005))
    path = stack(tmp_path / "c.tif", pages, text.format(c=2, z=2, end="<TiffData/>"))
    with pytest.raises(CaseError, match=r"c\.tif: 2 channels"):
        read(path, PLAIN)
    assert read(path, DatasetSettings(channels="first")).array[:, 0, 0].tolist() == [0, 2]
    with pytest.raises(CaseError, match=r"b\.tif: its OME description does not fit"):
        read(stack(tmp_path / "b.tif", pages, text.format(c=2, z=2, end="")), PLAIN)


def test_other_files_that_an_ome_description_names_are_not_opened(tmp_path: Path):
    page = np.arange(108, dtype=np.uint8).reshape(1, 12, 9)
    planes = "".join(
        f'<TiffData IFD="0" FirstZ="{z}" PlaneCount="1"><UUID FileName="{name}.tif">urn:uuid:{z}</UUID></TiffData>'
        for z, name in enumerate("ab")
    )
    text = (
        '<OME><Image><Pixels DimensionOrder="XYCZT" SizeX="9" SizeY="12" SizeC="1" SizeZ="2" SizeT="1" Type="uint8">'
        f"{planes}</Pixels></Image></OME>"
    )
    for name in "ab":
        stack(tmp_path / f"{name}.tif", page, text)
    with pytest.raises(CaseError, match=r"a\.tif: its OME description does not fit the pages in it"):
        read(tmp_path / "a.tif", PLAIN)


@pytest.mark.parametrize(("dpi", "expected"), [((72, 72), 1.0), ((300, 300), 1.0), ((254, 254), 0.1)])
def test_a_resolution_counts_unless_it_is_that_of_a_screen(tmp_path: Path, dpi: tuple[int, int], expected: float):
    Image.fromarray(NOISE).save(tmp_path / "a.tif", dpi=dpi)
    assert read(tmp_path / "a.tif", PLAIN).spacing == pytest.approx((1.0, expected, expected))


def test_transparency_is_dropped_and_said_where_there_is_any(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    picture = Image.fromarray(NOISE)
    picture.putalpha(255)
    picture.save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png", PLAIN).array[0], NOISE)
    assert not recwarn.list
    picture.putalpha(100)
    picture.save(tmp_path / "b.png")
    with pytest.warns(CaseWarning, match=r"b\.png: its transparency was dropped"):
        assert np.array_equal(read(tmp_path / "b.png", PLAIN).array[0], NOISE)


def test_masks_keep_255_labels_above_it_and_one_bit(tmp_path: Path):
    white = np.zeros((8, 9), np.uint8)
    white[2:4] = 255
    many = (np.arange(600, dtype=np.uint16)).reshape(20, 30)
    Image.fromarray(white).save(tmp_path / "white.png")
    Image.fromarray(np.repeat(white[..., None], 3, 2)).save(tmp_path / "rgb.png")
    Image.fromarray(white > 0).save(tmp_path / "bit.png")
    Image.fromarray(many).save(tmp_path / "many.png")
    (tmp_path / "many.tif").write_bytes(imagecodecs.tiff_encode(many))
    for name in ("white", "rgb"):
        assert np.array_equal(read_mask(tmp_path / f"{name}.png", PLAIN).planes[0, 0], white)
    assert np.array_equal(read_mask(tmp_path / "bit.png", PLAIN).planes[0, 0], white // 255)
    for ending in ("png", "tif"):
        mask = read_mask(tmp_path / f"many.{ending}", PLAIN)
        assert mask.planes.dtype == np.uint16
        assert np.array_equal(mask.planes[0, 0], many)
        assert not mask.lossy


def test_fractions_stay_fractions_and_negative_labels_are_refused(tmp_path: Path):
    (tmp_path / "p.tif").write_bytes(imagecodecs.tiff_encode(np.full((4, 5), 0.25, np.float32)))
    assert read_mask(tmp_path / "p.tif", PLAIN).planes.dtype.kind == "f"
    (tmp_path / "n.tif").write_bytes(imagecodecs.tiff_encode(np.full((4, 5), -3, np.int16)))
    with pytest.raises(CaseError, match=r"n\.tif: label values -3"):
        read_mask(tmp_path / "n.tif", PLAIN)


def test_a_mask_in_colours_is_refused_and_a_jpeg_mask_is_marked(tmp_path: Path):
    Image.fromarray(NOISE).save(tmp_path / "c.png")
    with pytest.raises(CaseError, match=r"c\.png: a mask must be a palette or grey picture, found mode RGB"):
        read_mask(tmp_path / "c.png", PLAIN)
    mask = np.zeros((40, 40), np.uint8)
    mask[10:30, 5:20] = 255
    Image.fromarray(np.repeat(mask[..., None], 3, 2)).save(tmp_path / "m.jpg", quality=80)
    raster = read_mask(tmp_path / "m.jpg", PLAIN)
    assert raster.lossy
    assert np.array_equal(raster.planes[0, 0] > 127, mask > 127)


def test_palette_images_are_seen_in_their_colours_and_palette_masks_as_indices(tmp_path: Path):
    indices = (np.arange(72, dtype=np.uint8) % 5).reshape(8, 9)
    picture = Image.fromarray(indices, "L")
    picture.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9, 1, 2, 3])
    for ending in ("png", "tif"):
        picture.save(tmp_path / f"a.{ending}")
        assert read(tmp_path / f"a.{ending}", PLAIN).array[0, 0, :3].tolist() == [[200, 0, 0], [0, 200, 0], [0, 0, 200]]
        assert np.array_equal(read_mask(tmp_path / f"a.{ending}", PLAIN).planes[0, 0], indices)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.4, 0.7, 0.95])
@pytest.mark.parametrize("ending", ["jpg", "png", "bmp", "tif", "stack.tif", "deflate.tif"])
def test_a_cut_picture_is_refused_and_named(tmp_path: Path, ending: str, share: float):
    path = tmp_path / f"a.{ending}"
    if ending == "stack.tif":
        stack(path, np.ascontiguousarray(np.moveaxis(NOISE, -1, 0)))
    elif ending == "deflate.tif":
        stack(path, np.ascontiguousarray(np.moveaxis(NOISE, -1, 0)), compression="tiff_deflate")
    else:
        Image.fromarray(NOISE).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    for reader in (read, read_mask):
        with pytest.raises(CaseError, match=r"/a\."):
            reader(path, PLAIN)


def png_bomb(path: Path, side: int = 60_000) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)))


def tiff_bomb(path: Path, side: int = 60_000) -> None:
    tags = [(256, side), (257, side), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, side), (279, 10)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0))


def test_bombs_are_refused_before_they_unpack(tmp_path: Path):
    png_bomb(tmp_path / "a.png")
    with pytest.raises(CaseError, match=r"a\.png: too many pixels"):
        read(tmp_path / "a.png", PLAIN)
    tiff_bomb(tmp_path / "a.tif")
    with pytest.raises(CaseError, match=r"a\.tif: 122 bytes that claim to be 60000 x 60000"):
        read(tmp_path / "a.tif", PLAIN)
    with pytest.raises(CaseError, match=r"a\.tif: unpacks to 13\.41 GiB"):
        read_tiff(tmp_path / "a.tif", PLAIN, count=2)


def test_a_tiff_whose_pages_form_a_circle_or_differ_is_refused(tmp_path: Path):
    tiff_bomb(tmp_path / "a.tif", side=2)
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(content[:-4] + struct.pack("<I", 8))
    with pytest.raises(CaseError, match=r"a\.tif: damaged .*circular"):
        read(tmp_path / "a.tif", PLAIN)
    first = Image.fromarray(NOISE[..., 0])
    first.save(tmp_path / "b.tif", save_all=True, append_images=[first.crop((0, 0, 10, 10))])
    with pytest.raises(CaseError, match=r"b\.tif: its pages differ"):
        read(tmp_path / "b.tif", PLAIN)


def test_text_and_empty_files_are_no_pictures(tmp_path: Path):
    for ending in ("png", "jpg", "tif"):
        (tmp_path / f"a.{ending}").write_text("hello" * 50)
        with pytest.raises(CaseError, match=rf"a\.{ending}"):
            read(tmp_path / f"a.{ending}", PLAIN)
    assert not recognises(tmp_path / "a.txt")
    assert not recognises(tmp_path / "missing.png")


def test_real_microscopy_keeps_its_instances(test_data: Path):
    folder = test_data / "microscopy" / "stardist"
    mask = read_mask(folder / "mask2d.tif", PLAIN)
    assert mask.planes.shape == (1, 1, 512, 512)
    assert len(np.unique(mask.planes)) == 126
    image, mask = read(folder / "img3d.tif", PLAIN), read_mask(folder / "mask3d.tif", PLAIN)
    assert image.array.shape == mask.planes.shape[1:] == (31, 61, 57)
    with Image.open(folder / "img3d.tif") as picture:
        picture.seek(17)
        assert np.array_equal(image.array[17], np.asarray(picture))
