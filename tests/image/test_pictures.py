from __future__ import annotations

import io
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tests.conftest import draw

from litune.curation.facts import read_facts
from litune.errors import ConfigError, DataError
from litune.image.pictures import FORMATS, ImageTransform, cut_thin, decode_file, map_ahead, open_rgb, to_levels


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_modes() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(open_rgb(encoded(clear))).min() == 255, "transparent pixels are put on white"
    deep = Image.fromarray(np.full((4, 4), 128 * 256, np.uint16))
    assert np.asarray(open_rgb(encoded(deep)))[0, 0].tolist() == [128] * 3
    for mode in ("L", "P", "1", "LA"):
        assert open_rgb(encoded(draw("red", "box").convert(mode))).mode == "RGB"
    assert open_rgb(encoded(draw("red", "box").convert("CMYK"), "JPEG")).mode == "RGB"


SAMPLES = Path(__file__).parents[1] / "golden" / "samples"
"""One picture in many kinds of samples, written by tifffile: from black to white, in gray and in colors."""


@pytest.mark.parametrize(
    ("name", "same", "apart"),
    [
        ("gray16", "gray8", 1), ("gray12in16", "gray8", 1), ("gray32", "gray8", 1), ("gray8in32", "gray8", 0),
        ("signed8", "gray8", 0), ("signed16", "gray8", 1), ("signed32", "gray8", 1), ("white0is16", "gray8", 1),
        ("float", "gray8", 0), ("float255", "gray8", 1), ("floatwide", "gray8", 1),
        ("rgb16", "rgb8", 1), ("planes16", "rgb8", 1), ("planes16big", "rgb8", 1),
    ],
)  # fmt: skip
def test_samples_of_every_kind(name: str, same: str, apart: int) -> None:
    """Levels are those of the same picture in 8 bits, but for rounding."""
    deep, plain = (np.asarray(open_rgb((SAMPLES / f"{n}.tif").read_bytes())).astype(int) for n in (name, same))
    assert np.abs(deep - plain).max() <= apart


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nan", "not finite"), ("rgb12in16", "16 bits hold no more than 12"),
        ("float64", "a TIFF of a kind"), ("rgbfloat", "a TIFF of a kind"),
    ],
)  # fmt: skip
def test_samples_that_are_not_read(name: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        open_rgb((SAMPLES / f"{name}.tif").read_bytes())


def test_levels_by_what_the_samples_hold() -> None:
    assert to_levels(np.array([[0, 1023]])).tolist() == [[0, 255]]
    assert to_levels(np.array([[0, 255]], np.uint16)).tolist() == [[0, 255]]
    assert to_levels(np.array([[0, 65280]])).tolist() == [[0, 255]]
    assert to_levels(np.array([[-1000, 0, 1000]])).tolist() == [[0, 128, 255]]
    assert to_levels(np.array([[0.0, 0.5]])).tolist() == [[0, 128]]
    assert to_levels(np.array([[5.0, 10.0]])).tolist() == [[128, 255]]
    assert to_levels(np.zeros((1, 1))).tolist() == [[0]]


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_long_texts_in_a_png(kind: str, tmp_path: Path) -> None:
    """A picture whose texts or profile are longer than Pillow reads is read, with its orientation."""
    text = "x" * (2 << 20)
    info = PngInfo()
    exif = Image.Exif()
    exif[0x0112] = 6
    options: dict[str, object] = {"pnginfo": info, "exif": exif}
    if kind == "iCCP":
        options["icc_profile"] = text.encode()
    elif kind == "iTXt":
        info.add_itxt("comment", text, zip=True)
    else:
        info.add_text("comment", text, zip=kind == "zTXt")
    data = encoded(draw("red", "box").resize((8, 4)), **options)
    with pytest.raises(ValueError, match="MAX_TEXT"):
        Image.open(io.BytesIO(data)).load()
    assert open_rgb(data).size == (4, 8)
    (tmp_path / "a.png").write_bytes(data)
    assert read_facts(str(tmp_path / "a.png"))["damage"] == ""


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", r"HEIC needs the package pillow-heif: .*litune\[pictures\]"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", r"JPEG XL needs the package pillow-jxl-plugin"),
        (b"<?xml version='1.0'?><svg xmlns=''/>", "a drawing"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
def test_files_that_are_not_read_are_named(head: bytes, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litune.image.pictures._formats", lambda: FORMATS)
    with pytest.raises(DataError, match=reason):
        open_rgb(head)


@pytest.mark.parametrize(("module", "kind"), [("pillow_heif", "HEIF"), ("pillow_jxl", "JXL")])
def test_formats_of_the_extra(module: str, kind: str) -> None:
    pytest.importorskip(module, reason="HEIC and JPEG XL need the extra pictures")
    open_rgb(encoded(draw("red", "box")))  # the formats are known from here on
    exif = Image.Exif()
    exif[0x0112] = 6
    image = draw("red", "box").resize((60, 40))
    read = open_rgb(encoded(image, kind, exif=exif.tobytes(), quality=95))
    assert read.size == (40, 60)
    assert np.abs(np.asarray(read).astype(int) - np.asarray(image.rotate(-90, expand=True))).mean() < 8


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
@pytest.mark.parametrize("mode", ["center", "border", "squash"])
def test_thin_pictures_are_cheap(size: tuple[int, int], mode: Literal["center", "border", "squash"]) -> None:
    """Of a picture that is far longer than wide the middle is scaled: all of it would take three gigabytes."""
    transform = ImageTransform((128, 128), (0.5,) * 3, (0.5,) * 3, crop_mode=mode)
    image = Image.new("RGB", size)
    assert cut_thin(image).size == tuple(min(side, 100) for side in size)
    assert np.array_equal(transform(image), transform(cut_thin(image)))


def test_all_else_is_scaled_whole() -> None:
    image = Image.new("RGB", (100, 1))
    assert cut_thin(image) is image


def test_exif_rotation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = open_rgb(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif))
    assert turned.size == (4, 8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty"), (b"<html>", "not an image"), (encoded(draw("red", "box"))[:100], "truncated|not enough|broken")],
)
def test_damaged(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        open_rgb(data)


def test_every_truncation_is_an_error_or_the_whole_picture() -> None:
    whole = encoded(draw("blue", "ring"), "JPEG")
    for cut in range(0, len(whole) - 2, 97):
        with pytest.raises(DataError):
            open_rgb(whole[:cut])


def test_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litune.image.pictures.MAX_PIXELS", 100)
    with pytest.raises(DataError, match=r"48×48 pixels, more than 100"):
        open_rgb(encoded(draw("red", "box")))


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("size", [(31, 57), (64, 40)])
def test_transform_is_timms(crop_pct: float, size: tuple[int, int]) -> None:
    from timm.data import create_transform

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    ours = ImageTransform((32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), crop_pct=crop_pct)
    theirs = create_transform(
        (3, 32, 32), mean=ours.mean, std=ours.std, crop_pct=crop_pct, interpolation="bicubic", crop_mode="center"
    )
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (ours.mean, ours.std))
    assert np.allclose((ours(image) / 255 - mean) / std, theirs(image).numpy(), atol=1e-6)


@pytest.mark.parametrize("size", [(37, 53), (300, 451), (7, 5), (16, 24)])
def test_tensorflow_resize(size: tuple[int, int]) -> None:
    """Bilinear, not antialiased, cut off: the formula in float64, but where float32 rounds across a whole level."""
    values = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    found = ImageTransform((16, 24), (0.5,) * 3, (0.5,) * 3, crop_mode="squash", interpolation="tensorflow")(
        Image.fromarray(values)
    )
    exact = np.zeros((3, 16, 24))
    for y in range(16):
        for x in range(24):
            row = min(max((y + 0.5) * size[0] / 16 - 0.5, 0), size[0] - 1)
            column = min(max((x + 0.5) * size[1] / 24 - 0.5, 0), size[1] - 1)
            top, left = int(row), int(column)
            bottom, right = min(top + 1, size[0] - 1), min(left + 1, size[1] - 1)
            for weight, i, j in (
                ((1 - row % 1) * (1 - column % 1), top, left),
                ((1 - row % 1) * (column % 1), top, right),
                ((row % 1) * (1 - column % 1), bottom, left),
                ((row % 1) * (column % 1), bottom, right),
            ):
                exact[:, y, x] += weight * values[i, j]
    clear = np.abs(exact - exact.round()) > 1e-3
    assert found.dtype == np.uint8
    assert np.array_equal(found[clear], exact.astype(np.uint8)[clear])
    assert np.abs(found - exact).max() <= 1.001
    if size == (16, 24):
        assert np.array_equal(found, values.transpose(2, 0, 1))


def test_tensorflow_resize_keeps_what_is_even() -> None:
    """The cast cuts off: 255 must not become 254.99998 on the way."""
    white = Image.new("RGB", (53, 37), (255, 254, 1))
    transform = ImageTransform((16, 16), (0.5,) * 3, (0.5,) * 3, crop_mode="squash", interpolation="tensorflow")
    assert transform(white).reshape(3, -1).tolist() == [[255] * 256, [254] * 256, [1] * 256]
    with pytest.raises(ConfigError, match="needs crop_mode squash"):
        ImageTransform((16, 16), (0.5,) * 3, (0.5,) * 3, interpolation="tensorflow")


def test_decode_file(tmp_path: Path) -> None:
    transform = ImageTransform((16, 16), (0.5,) * 3, (0.5,) * 3)
    draw("red", "bar").save(tmp_path / "a.png")
    good = decode_file(3, "a", tmp_path / "a.png", transform)
    assert (good.row, good.width, good.height, good.damage) == (3, 48, 48, None)
    assert good.pixels is not None
    assert (good.pixels.shape, good.pixels.dtype) == ((3, 16, 16), np.uint8)
    assert len(good.sha256) == 64
    missing = decode_file(0, "b", tmp_path / "b.png", transform)
    assert missing.damage is not None
    assert "does not exist" in missing.damage.reason
    folder = decode_file(0, "c", tmp_path, transform)
    assert folder.damage is not None


def test_map_ahead_keeps_order_and_stays_flat() -> None:
    started = 0
    lock = threading.Lock()

    def work(i: int) -> int:
        nonlocal started
        with lock:
            started += 1
        time.sleep(0.001 * (i % 3))
        return i

    for i, result in enumerate(map_ahead(work, range(100), workers=4, ahead=8)):
        assert result == i
        assert started <= i + 8 + 1


@pytest.mark.parametrize("name", ["a.txt", "a.png", "a"])
def test_the_bytes_say_what_a_file_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(encoded(draw("red", "box"), "JPEG"))
    transform = ImageTransform((16, 16), (0.5,) * 3, (0.5,) * 3)
    assert decode_file(0, name, tmp_path / name, transform).damage is None


def test_nothing_is_run_to_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would hand an EPS file to Ghostscript."""
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(DataError, match="not an image"):
        open_rgb(encoded(draw("red", "box"), "EPS"))


def test_a_bomb_is_seen_before_it_is_decoded() -> None:
    """A PNG of a hundred bytes that says that it has 60,000 × 60,000 pixels."""
    data = bytearray(encoded(Image.new("RGB", (1, 1))))
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(DataError, match=r"60000×60000 pixels|exceeds limit"):
        open_rgb(bytes(data))


def test_cmyk_palette_and_depths() -> None:
    """Each kind of pixel becomes the colour that it means."""
    red = Image.new("RGB", (8, 8), (220, 30, 30))
    for data, most in (
        (encoded(red.convert("CMYK"), "JPEG", quality=95), 6),
        (encoded(red.convert("CMYK"), "TIFF"), 0),
        (encoded(red.quantize(4), "PNG"), 0),
        (encoded(red, "WEBP", lossless=True), 0),
    ):
        assert np.abs(np.asarray(open_rgb(data)).astype(int) - (220, 30, 30)).max() <= most
    deep = np.array([[0, 32768, 65535, 70000, -5]], np.int32)
    assert np.asarray(open_rgb(encoded(Image.fromarray(deep), "TIFF")))[0, :, 0].tolist() == [0, 119, 239, 255, 0]
    ramp = np.linspace(0, 2**32 - 1, 256).astype(np.uint32)[None].repeat(2, axis=0)  # which Pillow declares as signed
    unsigned = np.asarray(open_rgb(encoded(Image.fromarray(ramp.view(np.int32)), "TIFF")))
    assert unsigned[0, :, 0].tolist() == list(range(256))
    clear = Image.new("P", (4, 4), 0)
    clear.putpalette([255, 0, 0] * 256)
    assert open_rgb(encoded(clear, "PNG", transparency=0)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_are_their_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options: dict[str, object] = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert open_rgb(data).getpixel((0, 0)) == (255, 0, 0)


def test_damaged_exif_leaves_the_picture_as_it_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)
    at = data.index(b"Exif\0\0") + 6
    assert open_rgb(data[:at] + b"garbage!" + data[at + 8 :]).size == (8, 4)
    assert open_rgb(data).size == (4, 8)
