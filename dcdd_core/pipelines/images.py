"""Reads image files and crops them to squares, so that training and evaluation see the same pixels.

Shapes: B batch, H W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F

from ..files import regular_file

# Formats that Pillow decodes itself; others, such as EPS, would start external programs.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MOST_PIXELS = 2**27
"""134 million pixels, which take about 1 GB while an image is read. The largest sensors sold have 151 million."""
MOST_BYTES = 512 * 2**20
"""Size limit of an image file. An uncompressed 16-bit TIFF of `MOST_PIXELS` pixels is larger."""

_SUFFIXES = (".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_HEIF = (".heic", ".heif", ".hif")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_STRIP = 512  # rows that are converted at a time


class UnreadableImage(ValueError):
    """An image that cannot be used: it is skipped, with a warning that names it."""


class TooSmallImage(UnreadableImage):
    """An image with a shorter side below the minimum; any number of them may be skipped."""


@cache
def suffixes() -> tuple[str, ...]:
    """Suffixes of the image files that can be read here: AVIF needs Pillow 11.3, HEIC pillow_heif."""
    return (*_SUFFIXES, *((".avif",) if _reads_avif() else ()), *(_HEIF if _heif() is not None else ()))


@cache
def missing_readers() -> dict[str, str]:
    """Suffixes of images that cannot be read here -> what reads them."""
    known = {".avif": "Pillow 11.3 or newer"} | dict.fromkeys(_HEIF, "pillow_heif")
    return {suffix: reader for suffix, reader in known.items() if suffix not in suffixes()}


def read_rgb(content: bytes | Path, *, min_side: int = 1) -> PIL.Image.Image:
    """The first frame of an image file as upright 8-bit RGB.

    EXIF orientation is applied, transparency becomes white [choice], 16 bits are rounded to 8, colour profiles are
    ignored.

    Args:
        min_side: the smallest allowed shorter side, in pixels.

    Raises:
        UnreadableImage: if it cannot be read, or is larger than `MOST_PIXELS` or `MOST_BYTES`.
        TooSmallImage: if its shorter side is smaller than `min_side`.
    """
    try:
        size = len(content) if isinstance(content, bytes) else _regular(content).stat().st_size
        if size > MOST_BYTES:
            raise UnreadableImage(f"it has {size:,} bytes, more than {MOST_BYTES:,}: shrink it")
        try:
            return _read(content, min_side)
        except UnreadableImage:
            raise
        except ValueError:
            if (bare := _without_text(content)) is None:
                raise
            return _read(bare, min_side)
    except UnreadableImage:
        raise
    except PIL.UnidentifiedImageError as error:  # Its message repeats the name.
        raise UnreadableImage("UnidentifiedImageError: it is no image") from error
    except Exception as error:  # Pillow raises nearly every kind of error for damaged files.
        raise UnreadableImage(f"{type(error).__name__}: {error}"[:200]) from error


def size_of(path: Path) -> tuple[int, int] | None:
    """Width and height in pixels from the file's header, before any rotation; None for a file that cannot be read."""
    try:
        with _open(_regular(path)) as image:
            return image.size
    except Exception:  # As `read_rgb`, which says what is wrong.
        return None


def _regular(path: Path) -> Path:
    try:
        return regular_file(path, "an image")
    except ValueError as error:
        raise UnreadableImage(str(error)) from error


def _read(content: bytes | Path, min_side: int) -> PIL.Image.Image:
    with _open(content) as image:
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise UnreadableImage(f"it has {width} x {height} pixels, more than {MOST_PIXELS:,}: shrink it")
        if min(width, height) < min_side:
            raise TooSmallImage(
                f"it has {width} x {height} pixels and would be enlarged: the shorter side needs at least {min_side}"
            )
        return _to_rgb(PIL.ImageOps.exif_transpose(image))


def _open(content: bytes | Path) -> PIL.Image.Image:
    """An image whose pixels are not decoded yet."""
    source = io.BytesIO(content) if isinstance(content, bytes) else content
    if _is_heif(content):
        if _heif() is None:
            raise UnreadableImage("it is a HEIC image: install pillow_heif to read it")
        return _heif().open_heif(source).to_pillow()
    return PIL.Image.open(source, formats=(*FORMATS, "AVIF") if _reads_avif() else FORMATS)


def square(image: PIL.Image.Image, side: int) -> torch.Tensor:
    """The central square of an RGB image at side x side pixels, uint8 [3, side, side].

    The same as resizing the shorter side and then cropping the centre; bicubic, antialiased.
    """
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    resized = image.resize((side, side), PIL.Image.Resampling.BICUBIC, box=(left, top, left + edge, top + edge))
    return to_tensor(resized)


def to_tensor(image: PIL.Image.Image) -> torch.Tensor:
    """An RGB image as it is, uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def stretched(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Images [B, 3, H, W] in -1..1 at (H, W) = `size`, in -1..1; bicubic, antialiased."""
    if tuple(pixels.shape[2:]) == tuple(size):
        return pixels
    return F.interpolate(pixels, tuple(size), mode="bicubic", antialias=True).clamp(-1, 1)


def to_pixels(images: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """uint8 [B, 3, H, W] -> float32 in -1..1 on the device."""
    return images.to(device).float() / 127.5 - 1.0


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point grey levels have no known white")
    if image.mode.startswith("I"):  # 16 bits, which older Pillows open as 32
        return _in_strips(image, _grey_levels)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        return _in_strips(image, _on_white)
    return image.convert("RGB")


def _in_strips(image: PIL.Image.Image, convert: Callable[[PIL.Image.Image], PIL.Image.Image]) -> PIL.Image.Image:
    """Converts pixels to RGB a strip at a time: intermediates of a whole large image would take gigabytes."""
    rgb = PIL.Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP):
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
        rgb.paste(convert(strip), (0, top))
    return rgb


def _grey_levels(image: PIL.Image.Image) -> PIL.Image.Image:
    values = np.asarray(image).astype(np.float64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"whole numbers of {values.min():g}..{values.max():g} are not 16-bit grey levels")
    return PIL.Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")


def _on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _without_text(content: bytes | Path) -> bytes | None:
    """A PNG without its text and colour profile: Pillow refuses large ones, and nothing here reads them.

    None for any other file.
    """
    data = content if isinstance(content, bytes) else content.read_bytes()
    if not data.startswith(_PNG):
        return None
    kept, at = [_PNG], len(_PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")  # length, kind, content, checksum
        if data[at + 4 : at + 8] not in _PNG_TEXT:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _is_heif(content: bytes | Path) -> bool:
    if isinstance(content, bytes):
        start = content[:64]
    else:
        with content.open("rb") as file:
            start = file.read(64)
    return start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS and b"avif" not in start


@cache
def _reads_avif() -> bool:
    return "avif" in PIL.features.modules and bool(PIL.features.check("avif"))


@cache
def _heif():
    """pillow_heif, if installed. It is called directly: registered with Pillow, it would act in the whole process."""
    try:
        import pillow_heif
    except ImportError:
        return None
    return pillow_heif
