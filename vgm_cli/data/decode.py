"""Any image file to 8-bit pixels, by one rule for every kind of file.

Grey, bilevel, palette, CMYK, YCbCr: converted by Pillow (colour profiles are not applied). Transparency: composited on
white. 16-bit grey: scaled by 1/257, not clipped; 32-bit integers beyond that: from [0, 2^32). Floats: from the usual
range that holds them (`pixel_range`). EXIF orientation: applied. Animations: first frame. Pictures of more than
VGM_MAX_PIXELS pixels are not decoded.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from vgm_cli import limits
from vgm_cli.errors import USAGE, VgmError

File = str | os.PathLike[str] | BinaryIO
SUFFIXES = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .pfm .jp2 .j2k .jpf .jpx "
    ".j2c .avif .ico .icns .tga .pcx .sgi .rgb .rgba .bw .ras .qoi .dds .xbm .xpm .psd".split()
)
GREY = frozenset(("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N"))
ORIENTATION = 0x0112  # EXIF tag; values from 5 on swap width and height
FORMATS = (  # all that Pillow decodes by itself: not EPS, WMF and others, for which it starts programs
    "PNG JPEG WEBP GIF BMP TIFF PPM JPEG2000 AVIF DIB ICO CUR ICNS TGA PCX DCX PSD SGI SUN QOI DDS XBM XPM MPO BLP "
    "FITS FLI FTEX GBR IM IMT MCIDAS MSP PCD PIXAR SPIDER XVTHUMB"
).split()
PIXELS = 64_000_000  # VGM_MAX_PIXELS: a picture of 8000 x 8000
LARGE = 8_000_000  # pixels from which pictures are decoded one after the other
BAND = 1 << 22  # numbers that are converted at once
_one = threading.Lock()
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # its error is what counts


class Unreadable(Exception):
    """An image that cannot be decoded; the text says why."""


def pixel_range(low: float, high: float, floats: bool) -> tuple[float, float]:
    """(black, white) of pixels whose values go from low to high: the usual range that holds them, give or take.

    Floats: [0, 1], [-1, 1], [0, 255], [0, 65535]; interpolation and sampling overshoot, so that a little more is taken
    too. Integers: [0, 255], [0, 65535], [0, 2^32). Raises ValueError where none fits.
    """
    if floats and low > -2 and high < 2:
        return (0, 1) if low >= -0.1 else (-1, 1)
    for top in (255, 65535) if floats else (255, 65535, 2**32 - 1):
        if high <= (1.5 if floats else 1) * top and low >= (-0.1 * high if floats else 0) and (high > 2 or not floats):
            return 0, top
    raise ValueError(f"values from {low:g} to {high:g} are no usual range of pixels")


def eight_bits(a: np.ndarray, span: tuple[float, float] | None = None) -> np.ndarray:
    """Numbers of any dtype -> uint8 of the same shape. span: (black, white), by default that of an image file.

    Raises ValueError for NaN and infinity, and for values of no usual range.
    """
    if a.dtype == np.uint8:
        return a
    floats = a.dtype.kind == "f"
    if span is None:
        low, high = float(a.min(initial=0)), float(a.max(initial=0))
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("some pixels are NaN or infinite")
        span = pixel_range(low, high if floats else max(high, 256), floats)  # integers of files have 16 bits or more
    black, white = span
    out = np.empty(a.shape, np.uint8)
    rows = max(1, BAND * len(a) // max(1, a.size))
    for i in range(0, len(a), rows):  # in bands: float64 is up to eight times as large
        band = a[i : i + rows].astype(np.float64)
        out[i : i + rows] = ((band - black) * (255 / (white - black)) + 0.5).clip(0, 255).astype(np.uint8)
    return out


def suffix(name: str) -> str:
    """PurePosixPath(name).suffix in lower case, in a tenth of its time: sets have millions of names."""
    base = name.rpartition("/")[2]
    at = base.rfind(".")
    return base[at:].lower() if 0 < at < len(base) - 1 else ""


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # broken EXIF does not spoil the pixels
        return 1


def max_pixels() -> int:
    """VGM_MAX_PIXELS, the most pixels of a picture that is decoded. Raises VgmError when it is no number."""
    text = os.environ.get("VGM_MAX_PIXELS") or str(PIXELS)
    if not text.isascii() or not text.isdigit() or len(text) > 12 or int(text) == 0:
        raise VgmError(f"VGM_MAX_PIXELS={text} is not a number of pixels", f"example: VGM_MAX_PIXELS={PIXELS}", USAGE)
    return int(text)


def open_image(file: File) -> Image.Image:
    """Image.open for files of anybody: regular files of FORMATS, of at most `max_pixels`. Raises Unreadable and what
    Pillow raises."""
    most = max_pixels()
    Image.MAX_IMAGE_PIXELS = max(1, most // 2)  # Pillow's error comes at twice that, also for pictures in pictures
    if isinstance(file, str | os.PathLike):
        try:
            limits.check_regular(file)
        except VgmError as e:
            raise Unreadable(e.message) from e
    Image.init()
    image = Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])
    if image.width * image.height > most:
        image.close()
        raise Unreadable(f"{image.width}×{image.height} pixels are more than {most:,}, which VGM_MAX_PIXELS allows")
    if any(t[0] == "fits_gzip" for t in image.tile):
        raise Unreadable("a packed FITS file, whose size is not known before it is unpacked")
    return image


def on_white(image: Image.Image) -> Image.Image:
    """Transparency composited on white, in bands of rows: four channels three times over would be much memory."""
    width, height = image.size
    out = Image.new("RGB", image.size)
    rows = max(1, BAND // max(1, width))
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(height, top + rows))).convert("RGBA")
        out.paste(Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB"), (0, top))
    return out


def load_image(file: File, least: int = 0) -> Image.Image:
    """A decoded image of mode "L" (the file is grey) or "RGB". Raises Unreadable, whatever is wrong with the file.

    least: a JPEG whose short side is at least twice, four or eight times as long is decoded to a half, a quarter or an
    eighth of its size, which costs less than decoding it whole; 0: never.
    """
    try:
        with open_image(file) as opened, _one if opened.width * opened.height > LARGE else contextlib.nullcontext():
            if least:
                opened.draft(None, (least, least))
            opened.load()
            image: Image.Image = opened
            if _orientation(image) != 1:
                ImageOps.exif_transpose(image, in_place=True)
            grey = image.mode in GREY
            if image.mode.startswith(("I", "F")):
                return Image.fromarray(eight_bits(np.asarray(image)))
            if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
                image = on_white(image)
            return in_mode(image, "L" if grey else "RGB")
    except VgmError:
        raise
    except Exception as e:  # decoders raise OSError, SyntaxError, ValueError, struct.error, bomb errors and more
        raise Unreadable(why(e)) from e


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image converted, or itself: Pillow copies one that has the mode already."""
    return image if image.mode == mode else image.convert(mode)


def load_masked(file: File) -> tuple[Image.Image, Image.Image | None]:
    """A decoded image on white, and how opaque it is, "L"; None of a file that knows no transparency. Raises
    Unreadable."""
    image = load_image(file)
    with open_image(file) as opened:
        if opened.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in opened.info:
            return image, None
        if _orientation(opened) != 1:
            opened = ImageOps.exif_transpose(opened)
        return image, opened.convert("RGBA").getchannel("A")


def why(e: Exception) -> str:
    if isinstance(e, Image.DecompressionBombError):
        return f"more than {max_pixels():,} pixels, which VGM_MAX_PIXELS allows"
    return str(e) or type(e).__name__


def read_header(file: File) -> tuple[int, int, bool]:
    """(width, height, grey?) without decoding pixels; width and height after EXIF rotation. Raises Unreadable."""
    try:
        with open_image(file) as image:
            width, height = image.size
            if _orientation(image) >= 5:
                width, height = height, width
            grey = image.mode in GREY
            if image.mode in ("P", "PA"):
                palette = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
                grey = bool(len(palette)) and bool((palette == palette[:, :1]).all())
            return width, height, grey
    except VgmError:
        raise
    except Exception as e:
        raise Unreadable(why(e)) from e


def image_files(source: str) -> list[Path]:
    """One image, or the images of a folder in the order of their names."""
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise VgmError(f"no such file or folder: {source}", code=USAGE)
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not files:
        raise VgmError(f"no images in {source}", "png, jpg, webp, … or an .npz with 'y'", USAGE)
    return files
