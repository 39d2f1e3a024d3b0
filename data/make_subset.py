"""Cut the embedded subset of Fashion-MNIST out of the full set: 1,000 training and 200 test images of each class.

    python data/make_subset.py /usr/share/datasets/fashion-mnist

The source is a folder with the four gzipped idx files of the full set (Debian's package `dataset-fashion-mnist`, or
`FashionMNIST/raw` as torchvision downloads it). The first images of each class are taken from each split, in their
order, so the result depends only on the source.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np

PER_CLASS = {"train": 1000, "t10k": 200}
IMAGE_HEADER, LABEL_HEADER = 16, 8  # bytes before the pixels and labels in the idx format
CLASSES = 10


def select(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Return the ascending indices of the first `per_class` samples of each class; `labels` is (N,).

    Raises ValueError if a class has fewer samples.
    """
    groups = [np.flatnonzero(labels == label)[:per_class] for label in range(CLASSES)]
    if min(map(len, groups)) < per_class:
        raise ValueError(f"a class has fewer than {per_class} images: is this the full set?")
    return np.sort(np.concatenate(groups))


def cut(source: Path, target: Path, split: str) -> int:
    """Cut one split ("train" or "t10k") of the set in `source` and write it to `target`. Returns its image count."""
    image_name, label_name = f"{split}-images-idx3-ubyte.gz", f"{split}-labels-idx1-ubyte.gz"
    images, labels = (gzip.decompress((source / name).read_bytes()) for name in (image_name, label_name))
    classes = np.frombuffer(labels, np.uint8, offset=LABEL_HEADER)
    chosen = select(classes, PER_CLASS[split])
    target.mkdir(parents=True, exist_ok=True)
    for name, content, header in ((image_name, images, IMAGE_HEADER), (label_name, labels, LABEL_HEADER)):
        values = np.frombuffer(content, np.uint8, offset=header).reshape(len(classes), -1)
        count = len(chosen).to_bytes(4, "big")  # the first dimension, after the magic number
        # The archive's header contains no time and no name, so that equal content gives equal files.
        with (
            open(target / name, "wb") as file,
            gzip.GzipFile("", "wb", compresslevel=9, fileobj=file, mtime=0) as archive,
        ):
            archive.write(content[:4] + count + content[8:header] + values[chosen].tobytes())
    return len(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cut the embedded subset of Fashion-MNIST out of the full set.")
    parser.add_argument("source", type=Path, help="folder with the four gzipped idx files of the full set")
    parser.add_argument("--target", type=Path, default=Path(__file__).parent / "fashion-mnist", help="folder to write")
    args = parser.parse_args()
    for split in PER_CLASS:
        try:
            print(f"{split}: {cut(args.source, args.target, split)} images to {args.target}")
        except (OSError, EOFError, ValueError) as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
