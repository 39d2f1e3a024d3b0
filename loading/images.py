"""Find, read and decode image files."""

import errno
import importlib.util
import io
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg

from records.files import first_line, one_line

logger = logging.getLogger(__name__)

AVIF = importlib.util.find_spec("PIL._avif") is not None  # Pillow from 11.3 on reads it, if built to do so
# Pillow reads more formats, but some run other programs (EPS calls Ghostscript), which no file named .jpg may do.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP") + AVIF * ("AVIF",)
_READ = ".jpg .jpeg .jpe .jfif .mpo .png .apng .gif .bmp .ppm .pgm .pbm .pnm .tif .tiff .webp"
EXTENSIONS = (*_READ.split(), *AVIF * (".avif",))
# Extensions of image formats that are not read. A file without an extension may be an image as well.
_OTHERS = """.dib .avif .avifs .heic .heics .heif .heifs .hif .jxl .jp2 .j2k .j2c .jpc .jpf .jpx .jxr .wdp .svg .svgz
    .eps .ai .psd .xcf .tga .dds .exr .hdr .pfm .pcx .ico .icns .qoi .sgi .ras .xbm .xpm .emf .wmf .fits .dcm .raw .dng
    .cr2 .cr3 .crw .nef .nrw .arw .sr2 .srw .orf .rw2 .raf .pef .x3f .erf .kdc .dcr .mrw .mos .3fr .iiq"""
OTHER_EXTENSIONS = frozenset(("", *_OTHERS.split()))
# Left behind by archives, synchronization and file systems, as are names that begin with a dot.
LEFT_BEHIND = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db")
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation
MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # not the fault of the file being read


class BrokenImageError(ValueError):
    """An image cannot be read. The message is the reason, without the name of the file."""


@contextmanager
def reading() -> Iterator[None]:
    """Turn whatever an unreadable image raises into BrokenImageError."""
    try:
        yield
    except Exception as error:  # OSError, SyntaxError, ValueError, EOFError, zlib.error, ...: they vary by format
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in MACHINE_ERRORS:
            raise
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image, or of an unknown format"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:
            reason = first_line(error)
        raise BrokenImageError(reason) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB. 16-bit grey is scaled to 8 bits; an alpha channel is dropped, as in torchvision.

    Raises ValueError for pixels of unknown range: floating point, and integers beyond 16 bits.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range: convert the image to 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)  # (H, W); Pillow itself would clip at 255
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("integer pixels beyond 16 bits have no known range: convert the image to 8 or 16 bits")
        grey = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
        grey.info = image.info
        image = grey
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about the direct conversion
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()  # `convert` would make a copy
    return image


def decode_image(source: str | os.PathLike | BinaryIO) -> Image.Image:
    """Read an image as RGB. The file's content, not its name, must be of one of `FORMATS`. Raises BrokenImageError."""
    with reading(), Image.open(source, formats=FORMATS) as image:
        return to_rgb(image)


def decode_for_training(path: str | os.PathLike) -> Image.Image:
    """Read an image like `decode_image`; an RGB JPEG also has its `pixels` as torchvision's tensor: uint8, (3, H, W).

    Both libraries use libjpeg, but Pillow stores a pixel in four bytes. It decodes such a JPEG only on first access.
    """
    with reading():
        with open(path, "rb") as file:
            content = bytearray(file.read())
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.format in ("JPEG", "MPO") and image.mode == "RGB":
            with suppress(RuntimeError):  # Pillow reports the reason, or can read the image
                image.pixels = decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), mode=ImageReadMode.RGB)
                return image
        return to_rgb(image)


def upright(image: Image.Image) -> Image.Image:
    """Turn and mirror an image by its EXIF orientation. If that cannot be read, the image stays as it is.

    Pillow's `exif_transpose` also rewrites the EXIF data, which fails if another part of the data is damaged.
    """
    method = None
    with suppress(Exception):  # any program may have written the EXIF data
        method = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    if method is None:
        return image
    image = image.transpose(method)
    for key in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):  # each may repeat the orientation
        image.info.pop(key, None)
    return image


def folder_identity(folder: str | os.PathLike) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _raise(error: OSError) -> None:
    raise error


class LeftOut:
    """Names that a search for images leaves out, and a count of the files in formats that are not read."""

    def __init__(self):
        self.names: list[str] = []
        self.extensions: Counter[str] = Counter()

    def visible(self, names: Iterable[str]) -> list[str]:
        """Return the names that may be data, sorted, and record the others."""
        kept = []
        for name in sorted(names):
            (self.names if name.startswith(".") or name in LEFT_BEHIND else kept).append(name)
        return kept

    def report(self, folder: str) -> None:
        """Log one warning for the names and one for the extensions, if there are any."""
        if self.names:
            names = one_line(some(sorted(set(self.names))))
            logger.warning(f"{folder}: left out {len(self.names)} by name, as no data: {names}")
        if self.extensions:
            count = self.extensions.total()
            found = ", ".join(f"{n} {ext or 'without an extension'}" for ext, n in self.extensions.most_common())
            logger.warning(f"{folder}: left out {count} by extension, as not read ({found}): convert or rename them")


def some(names: Sequence[str]) -> str:
    """Return the first five names as text, with the number of further names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def find_images(folder: str, left_out: LeftOut, above: Collection[tuple[int, int]] = ()) -> list[str]:
    """Find images by extension under a (class) folder and return paths in the order of torchvision's ImageFolder.

    Links are followed, but each folder is read only once, and the folders `above` are not read: a link upwards would
    never end and would give the class the images of all others. Raises OSError if a folder cannot be read.
    """
    seen = set(above)
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        identity = folder_identity(parent)
        if identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = left_out.visible(folders)
        files = left_out.visible(files)
        extensions = [os.path.splitext(name)[1].lower() for name in files]
        found.append((parent, [name for name, ext in zip(files, extensions, strict=True) if ext in EXTENSIONS]))
        left_out.extensions.update(ext for ext in extensions if ext not in EXTENSIONS and ext in OTHER_EXTENSIONS)
    return [os.path.join(parent, name) for parent, files in sorted(found) for name in files]


def list_images(paths: Sequence[str]) -> list[str]:
    """List image files: the given files, and all images anywhere under the given folders, in the order of `paths`.

    Raises ValueError for a path that does not exist, and for a folder that cannot be read or has no image.
    """
    found = []
    for path in paths:
        left_out = LeftOut()
        if not os.path.isdir(path):
            if not os.path.exists(path):
                raise ValueError(f"{path} does not exist")
            found.append(os.fspath(path))
            continue
        try:
            inside = find_images(path, left_out)
        except OSError as error:
            raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from error
        left_out.report(path)
        if not inside:
            raise ValueError(f"no image is in the folder {path}")
        found += inside
    return found


def read_image(path: str | os.PathLike) -> Image.Image:
    """Read an image as RGB and upright. Raises ValueError with the name of the file if it cannot be read."""
    try:
        return upright(decode_image(path))
    except BrokenImageError as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error
