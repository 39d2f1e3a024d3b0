"""Finding, reading and decoding image files."""

import errno
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from records.files import first_line

# Pillow reads more, but some of that runs other programs (EPS calls Ghostscript), which no file named .jpg may do.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # no fault of the file that was being read


class BrokenImageError(ValueError):
    """An image cannot be read. The message is the reason, without the name of the file."""


@contextmanager
def reading() -> Iterator[None]:
    """Turn whatever an unreadable image raises into BrokenImageError."""
    try:
        yield
    except Exception as error:  # OSError, SyntaxError, ValueError, EOFError, zlib.error, ...: each format has its own
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
    """Convert to RGB. 16-bit grey is scaled to 8 bits; an alpha channel is dropped, as torchvision does.

    Raises ValueError for pixels whose range is not known: floating point, and integers beyond 16 bits.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range: convert the image to 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)  # (H, W); Pillow itself would clip at 255
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("integer pixels beyond 16 bits have no known range: convert the image to 8 or 16 bits")
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of the direct way
    return image.convert("RGB")


def decode_image(source: str | os.PathLike | BinaryIO) -> Image.Image:
    """Read a file of one of `FORMATS`, told by its content, as RGB. Raises BrokenImageError."""
    with reading(), Image.open(source, formats=FORMATS) as image:
        return to_rgb(image)


def folder_identity(folder: str | os.PathLike) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _raise(error: OSError) -> None:
    raise error


def find_images(folder: str, above: Collection[tuple[int, int]] = ()) -> list[str]:
    """Paths of the images under a (class) folder by their extensions, in the order of torchvision's ImageFolder.

    Links are followed, but each folder is read once, and none of those `above` the class folder: a link upwards would
    go on for ever, and give the class the images of all others. Raises OSError where a folder cannot be read.
    """
    seen = set(above)
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        identity = folder_identity(parent)
        if identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders.sort()
        found.append((parent, sorted(files)))
    return [
        os.path.join(parent, name)
        for parent, files in sorted(found)
        for name in files
        if name.lower().endswith(IMG_EXTENSIONS)
    ]


def list_images(paths: Sequence[str]) -> list[str]:
    """Image files that are named, and those anywhere under folders that are named, in order.

    Raises:
        ValueError: a path is not there or cannot be read, or a folder has no image.
    """
    found = []
    for path in paths:
        if not os.path.isdir(path):
            if not os.path.exists(path):
                raise ValueError(f"{path} does not exist")
            found.append(os.fspath(path))
            continue
        try:
            inside = find_images(path)
        except OSError as error:
            raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from error
        if not inside:
            raise ValueError(f"no image is in the folder {path}")
        found += inside
    return found


def read_image(path: str | os.PathLike) -> Image.Image:
    """An RGB image; ValueError, which names the file, where there is none."""
    try:
        return decode_image(path)
    except BrokenImageError as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error
