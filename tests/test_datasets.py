"""Data: what is read, in which order and by whom; what is broken; randomness hangs on (seed, epoch, index) only."""

import gzip
import hashlib
import importlib.util
import io
import json
import logging
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from multiprocessing.connection import Client
from multiprocessing.resource_sharer import _ResourceSharer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet, auto_augment, create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from torch.utils.data import Dataset

import datasets
import main
import options
from loading import loaders, transforms
from loading.hugging_face import hugging_face
from loading.images import BrokenImageError, decode_image
from loading.order import EpochSampler, seed_all
from loading.processes import Loading, iterate, make_loader
from loading.streams import StreamDataset, TimmSource, _TrainStream, timm_classes

ROOT = Path(__file__).parent.parent
EMBEDDED = ROOT / "data" / "fashion-mnist"
FULL_SET = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
IDX_FILES = [f"{s}-{kind}-ubyte.gz" for s in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def preprocessing(input_size, **kwargs):
    return transforms.Preprocessing(input_size, (0.5,) * 3, (0.5,) * 3, **kwargs)


def to_tensor(image):
    return torchvision.transforms.functional.to_tensor(image)


def indexed(length, transform=to_tensor):
    """A data set whose images are 1x1 and hold their index, as their class does."""
    values = np.arange(length, dtype=np.uint8).reshape(-1, 1, 1)
    classes = [str(i) for i in range(length)]
    return datasets.ArrayDataset(values, range(length), classes=classes, transform=transform, name="indexed")


def fmnist(train=True, transform=to_tensor, path=EMBEDDED, **kwargs):
    return datasets.build_dataset("FMNIST", path, train=train, transform=transform, **kwargs)


def train_loader(dataset, batch_size=4, rank=0, world_size=1, seed=0, num_workers=0):
    return loaders.build_train_loader(dataset, Loading(batch_size, rank, world_size, seed, num_workers))


def eval_loader(dataset, batch_size=4, rank=0, world_size=1, num_workers=0, **kwargs):
    return loaders.build_eval_loader(dataset, Loading(batch_size, rank, world_size, num_workers=num_workers, **kwargs))


def save(path, color=(10, 20, 30), size=(8, 6), **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **kwargs)
    return path


@pytest.fixture
def folder(tmp_path):
    """train/ and val/ with the classes a and b, three and two images of each, PNG so that pixels are exact."""
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate("ab"):
            for i in range(count):
                save(tmp_path / split / name / f"{name}{i}.png", color=(label, i, 0))
    return tmp_path


def open_folder(path, train=True, transform=to_tensor, **kwargs):
    return datasets.build_dataset("image_folder", path, train=train, transform=transform, **kwargs)


# -- the embedded data


def test_embedded_files_are_those_of_the_readme():
    rows = re.findall(r"\| `(\S+\.gz)` \| `(\w{64})` \| `(\w{64})` \|", (ROOT / "data/README.md").read_text())
    assert sorted(name for name, *_ in rows) == sorted(IDX_FILES)
    for name, packed, content in rows:
        payload = (EMBEDDED / name).read_bytes()
        assert hashlib.sha256(payload).hexdigest() == packed
        assert hashlib.sha256(gzip.decompress(payload)).hexdigest() == content
    assert sum(path.stat().st_size for path in (ROOT / "data").rglob("*") if path.is_file()) <= 6_000_000


@pytest.mark.parametrize(("train", "per_class"), [(True, 1000), (False, 200)])
def test_embedded_is_balanced(train, per_class):
    dataset = fmnist(train)
    assert len(dataset) == 10 * per_class
    assert np.bincount(dataset.targets).tolist() == [per_class] * 10
    assert dataset.classes[0] == "T-shirt/top"
    assert dataset.classes[9] == "Ankle boot"
    image, target = dataset[0]
    assert image.shape == (3, 28, 28)
    assert torch.equal(image[0], image[2])
    assert target == 9  # the full sets both begin with an ankle boot


@pytest.mark.skipif(not FULL_SET.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_subset_is_cut_again(tmp_path):
    script = [sys.executable, str(ROOT / "data/make_subset.py")]
    subprocess.run([*script, str(FULL_SET), "--target", str(tmp_path)], check=True, capture_output=True)
    for name in IDX_FILES:
        payload = (tmp_path / name).read_bytes()
        assert payload[:10] == b"\x1f\x8b\x08\0\0\0\0\0\x02\xff"  # no name, no time
        assert gzip.decompress(payload) == gzip.decompress((EMBEDDED / name).read_bytes())
    refused = subprocess.run([*script, str(EMBEDDED / "missing")], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr


# -- Fashion-MNIST and CIFAR


@pytest.mark.parametrize("packed", [True, False])
def test_fmnist_from_torchvision_root(tmp_path, packed):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in IDX_FILES[2:]:  # evaluation needs the test files only
        if packed:
            shutil.copy(EMBEDDED / name, raw)
        else:
            (raw / name.removesuffix(".gz")).write_bytes(gzip.decompress((EMBEDDED / name).read_bytes()))
    found, expected = fmnist(False, path=tmp_path), fmnist(False)
    assert np.array_equal(found.images, expected.images)
    assert np.array_equal(found.targets, expected.targets)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.* are neither in"):
        fmnist(True, path=tmp_path)
    assert len(fmnist(False, path="nowhere", eval_data_path=tmp_path)) == 2000


@pytest.mark.skipif(not FULL_SET.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fmnist_from_the_full_set():
    assert len(fmnist(False, path=FULL_SET)) == 10_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an idx file"),
        (b"some text", "is not an idx file"),
        (b"\0\0\x08\x03\0\0", "is not an idx file"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "is not an idx file"),  # floats
        (b"\0\0\x08\x01\0\0\0\x05\1\2", "holds 2 values where its header says"),
        (b"\x1f\x8b\x08\0 not gzip", "cannot read"),
        (gzip.compress(bytes(range(250)), mtime=0)[:80], "cannot read"),
    ],
)
def test_bad_idx_file(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        datasets.read_idx(tmp_path / "x")
    assert str(tmp_path / "x") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_idx_files_that_do_not_fit_together(tmp_path):
    shutil.copy(EMBEDDED / IDX_FILES[2], tmp_path)
    shutil.copy(EMBEDDED / IDX_FILES[1], tmp_path / IDX_FILES[3])
    with pytest.raises(ValueError, match="do not fit together"):
        fmnist(False, path=tmp_path)
    (tmp_path / IDX_FILES[3]).write_bytes(b"\0\0\x08\x01" + (2000).to_bytes(4, "big") + bytes([11] * 2000))
    with pytest.raises(ValueError, match="holds class 11"):
        fmnist(False, path=tmp_path)


def test_cifar(tmp_path, monkeypatch):
    pixels = np.arange(2 * 3072, dtype=np.int64).astype(np.uint8).reshape(2, 3072)
    base = tmp_path / "cifar-100-python"
    base.mkdir()
    for name in ("train", "test"):
        (base / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": [1, 0]}))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "pear"]}))
    with pytest.raises(ValueError, match=r"no CIFAR-100 in .*corrupted"):  # the hashes are not the real ones
        datasets.build_dataset("CIFAR", tmp_path, train=True, transform=to_tensor)
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "train_list", [["train", None]])
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "test_list", [["test", None]])
    monkeypatch.setitem(torchvision.datasets.CIFAR100.meta, "md5", None)
    dataset = datasets.build_dataset("CIFAR", tmp_path, train=True, transform=to_tensor)
    assert dataset.classes == ("apple", "pear")
    image, target = dataset[1]
    assert target == 1 - 1
    assert torch.equal((image * 255).round().to(torch.uint8).flatten(), torch.from_numpy(pixels[1]))


# -- decoding


def encoded(image, kind, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    buffer.seek(0)
    return buffer


def pixels(source):
    image = decode_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(kind):
    values = np.array([[0, 128, 129, 257], [1000, 32768, 65406, 65535]], np.uint16)
    expected = np.array([[0, 0, 1, 1], [4, 128, 254, 255]], np.uint8)
    assert np.array_equal(pixels(encoded(Image.fromarray(values), kind)), np.stack([expected] * 3, -1))


def test_16_bit_pgm_is_scaled():
    values = np.array([[0, 257, 65535]], ">u2")
    assert pixels(io.BytesIO(b"P5 3 1 65535\n" + values.tobytes()))[0, :, 0].tolist() == [0, 1, 255]


def test_pixels_of_unknown_range_are_refused():
    for values in (np.full((2, 2), 0.5, np.float32), np.full((2, 2), 70_000, np.int32)):
        with pytest.raises(BrokenImageError, match="no known range"):
            decode_image(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.filterwarnings("error")
def test_palette_and_one_bit():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 100, 50, 1, 2, 3])
    image.putdata([1, 0])
    expected = [[[1, 2, 3], [200, 100, 50]]]
    assert pixels(encoded(image, "PNG")).tolist() == expected
    assert pixels(encoded(image, "PNG", transparency=bytes([0, 128]))).tolist() == expected
    bits = Image.fromarray(np.array([[True, False]]))
    assert pixels(encoded(bits, "PNG")).tolist() == [[[255] * 3, [0] * 3]]


def test_alpha_is_dropped():
    assert pixels(encoded(Image.new("RGBA", (1, 1), (9, 8, 7, 0)), "PNG")).tolist() == [[[9, 8, 7]]]
    assert pixels(encoded(Image.new("LA", (1, 1), (9, 100)), "PNG")).tolist() == [[[9, 9, 9]]]
    assert pixels(encoded(Image.new("L", (1, 1), 77), "JPEG")).tolist() == [[[77, 77, 77]]]


def test_cmyk_jpeg():
    # C = 255, M = 0, Y = 0, K = 51 is (0, 204, 204): (255 - C) (255 - K) / 255 and so on
    found = pixels(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 51)), "JPEG", quality=100))
    assert np.abs(found.astype(int) - [0, 204, 204]).max() <= 2


def test_content_decides_not_the_name(tmp_path):
    assert decode_image(save(tmp_path / "x.png").rename(tmp_path / "x.JPEG")).getpixel((0, 0)) == (10, 20, 30)
    (tmp_path / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n")
    with pytest.raises(BrokenImageError, match="unknown format"):
        decode_image(tmp_path / "eps.jpg")


# -- folders


def test_folder(folder):
    (folder / "train/a/notes.txt").write_text("no image")
    save(folder / "train/a/deeper/a9.JPG")
    dataset = open_folder(folder)
    assert dataset.classes == ("a", "b")
    assert [dataset.filename(i) for i in range(7)] == [
        "a0.png",
        "a1.png",
        "a2.png",
        "a9.JPG",
        "b0.png",
        "b1.png",
        "b2.png",
    ]
    assert dataset.targets.tolist() == [0] * 4 + [1] * 3
    image, target = dataset[5]
    assert (target, (image[:, 0, 0] * 255).tolist()) == (1, [1, 1, 0])
    reference = torchvision.datasets.ImageFolder(folder / "train")
    assert [dataset.describe(i) for i in range(7)] == [path for path, _ in reference.samples]


def test_evaluation_needs_the_validation_folder_only(folder):
    shutil.move(folder / "val", folder / "elsewhere")
    shutil.rmtree(folder / "train")
    for data_set in ("IMNET", "image_folder"):
        for data_path in (None, folder / "missing"):
            val = datasets.build_dataset(
                data_set, data_path, train=False, transform=to_tensor, eval_data_path=folder / "elsewhere"
            )
            assert len(val) == 4
    with pytest.raises(ValueError, match=r"cannot read the folder .*val: No such file"):
        open_folder(folder, train=False)


def test_training_folder_itself_as_in_the_published_script(folder):
    train = open_folder(folder / "train", eval_data_path=folder / "val")
    assert len(train) == 6
    assert len(open_folder(folder, eval_data_path=folder / "val")) == 6


def test_symbolic_links(folder, caplog):
    shutil.move(folder / "train/b", folder / "stored")
    (folder / "train/b").symlink_to(folder / "stored", target_is_directory=True)
    (folder / "train/b/again").symlink_to(folder / "stored", target_is_directory=True)  # itself
    (folder / "train/a/up").symlink_to("..", target_is_directory=True)
    (folder / "train/a/further").symlink_to("../..", target_is_directory=True)  # would give it the images of val
    (folder / "train/loop").symlink_to(".", target_is_directory=True)
    (folder / "train/self").symlink_to("self")
    dataset = open_folder(folder)
    assert dataset.classes == ("a", "b")
    assert [dataset.filename(i) for i in range(len(dataset))] == [
        "a0.png",
        "a1.png",
        "a2.png",
        "b0.png",
        "b1.png",
        "b2.png",
    ]
    assert len([record for record in caplog.records if "link to a folder above" in record.message]) == 1


def test_folders_that_cannot_be(folder):
    (folder / "train/c").mkdir()
    (folder / "train/c/readme.txt").write_text("")
    with pytest.raises(ValueError, match=r"no image .* in these class folders of .*train: c$"):
        open_folder(folder)
    (folder / "flat/train").mkdir(parents=True)
    save(folder / "flat/train/x.png")
    with pytest.raises(ValueError, match="has no class folders"):
        open_folder(folder / "flat")
    with pytest.raises(ValueError, match=r"cannot read the folder .*missing"):
        open_folder(folder / "missing")
    with pytest.raises(ValueError, match="needs --data_path"):
        open_folder(None)


def test_classes_are_matched_by_name(folder, caplog):
    val = open_folder(folder, train=False)
    caplog.set_level(logging.INFO)
    assert datasets.match_classes(val, ("a", "b")) is None
    assert datasets.match_classes(val, ["a", "b"]) is None
    assert datasets.match_classes(val, None) is None
    assert not caplog.records
    assert datasets.match_classes(val, ("b", "a")) == (1, 0)
    assert "another order: they are matched by name" in caplog.messages[-1]
    assert datasets.match_classes(val, ("x", "b", "a", "y", "y"), of="the training data") == (2, 1)
    assert caplog.messages[-1] == "the validation data lack 3 of the 5 classes of the training data: x, y, y"
    for i in range(7):
        save(folder / f"val/x{i}/x.png")
    more = open_folder(folder, train=False)
    with pytest.raises(ValueError, match=r"unknown to the network: x0, x1, x2, x3, x4 and 2 more \(known: a, b\)$"):
        datasets.match_classes(more, ("a", "b"))
    with pytest.raises(ValueError, match=r"unknown to the training data: b \(known: B, a\)$"):
        datasets.match_classes(val, ("B", "a"), of="the training data")
    with pytest.raises(ValueError, match="the network has two of the name b"):
        datasets.match_classes(val, ("b", "a", "b"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_evaluation_loader_gives_the_indices_asked_for(folder, num_workers):
    val = open_folder(folder, train=False)
    targets = torch.cat([batch[1] for batch in eval_loader(val, num_workers=num_workers, class_indices=(7, 2))])
    assert targets.tolist() == [7, 7, 2, 2]


@pytest.mark.parametrize("name", ["CIFAR10", "imnet", "hfds", "bucket/x"])
def test_unknown_data_set(name):
    with pytest.raises(ValueError, match=rf"unknown --data_set {name}; known are IMNET, image_folder, CIFAR, FMNIST"):
        datasets.build_dataset(name, ".", train=True, transform=to_tensor)


# -- broken images


def plant(folder):
    """Plant 8 broken files and 5 odd but readable ones into class a; returns the names of the broken ones."""
    a = folder / "train/a"
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 40, 3), dtype=np.uint8))
    for kind in ("jpg", "png", "tiff", "webp"):
        noise.save(a / f"whole.{kind}")
        content = (a / f"whole.{kind}").read_bytes()
        (a / f"truncated.{kind}").write_bytes(content[: len(content) // 2])
        (a / f"whole.{kind}").unlink()
    png = (a / "a0.png").read_bytes()
    (a / "damaged.png").write_bytes(png[:20] + b"\xff" + png[21:])
    (a / "empty.jpg").touch()
    (a / "text.jpg").write_text("not an image")
    (a / "dangling.png").symlink_to("nothing")
    save(a / "tiny.png", size=(1, 1))
    save(a / "wide.png", size=(20_000, 1))
    Image.new("CMYK", (9, 9)).save(a / "cmyk.jpg")
    Image.fromarray(np.full((9, 9), 5000, np.uint16)).save(a / "deep.png")
    Image.new("P", (9, 9)).save(a / "palette.png")
    truncated = [f"truncated.{kind}" for kind in ("jpg", "png", "tiff", "webp")]
    return ["damaged.png", "dangling.png", "empty.jpg", "text.jpg", *truncated]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_training_images_are_counted_once(folder, caplog, num_workers):
    broken = plant(folder)
    transform = transforms.build_train_transform(preprocessing(16))
    dataset = open_folder(folder, transform=transform)
    assert len(dataset) == 6 + 8 + 5
    loader = train_loader(dataset, num_workers=num_workers)
    with caplog.at_level(logging.WARNING):
        for epoch in range(2):
            loader.set_epoch(epoch)
            batches = list(loader)
            assert [images.shape for images, _ in batches] == [(4, 3, 16, 16)] * 5
    assert sorted(dataset.filename(index) for index in loader.broken) == broken
    assert len(caplog.records) == 8
    assert any("dangling.png: No such file or directory" in record.message for record in caplog.records)


def test_replacements_do_not_hang_on_the_workers(folder):
    plant(folder)
    dataset = open_folder(folder, transform=transforms.build_train_transform(preprocessing(16)))
    first, second = (list(train_loader(dataset, num_workers=n)) for n in (0, 2))
    for (images, targets), (other_images, other_targets) in zip(first, second, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(targets, other_targets)


def test_one_readable_image_is_enough_and_none_is_an_error(folder):
    dataset = open_folder(folder)
    for index in range(5):
        Path(dataset.describe(index)).write_bytes(b"")
    loader = train_loader(dataset)
    assert [targets.tolist() for _, targets in loader] == [[1] * 4] * 2
    assert loader.broken == set(range(5))
    Path(dataset.describe(5)).write_bytes(b"")
    for num_workers in (0, 1):
        with pytest.raises(
            ValueError, match=r"^no readable training image in 6 tries, the last was .*\.png: not an image"
        ):
            list(train_loader(dataset, num_workers=num_workers))


def test_as_many_images_are_tried_as_the_error_says():
    class Broken(datasets.ImageDataset):
        classes, transform, tried = ("a",), staticmethod(to_tensor), []

        def __len__(self):
            return 500

        def describe(self, index):
            return str(index)

        def load(self, index):
            self.tried.append(index)
            raise BrokenImageError("gone")

    with pytest.raises(ValueError, match=r"^no readable training image in 100 tries"):
        list(loaders.build_train_loader(Broken(), Loading(1)))
    assert len(Broken.tried) == len(set(Broken.tried)) == 100


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_validation_images(folder, num_workers):
    for name in ("a0", "a1", "b1"):
        (folder / f"val/a/{name}.png").write_bytes(b"GIF89a")
    dataset = open_folder(folder, train=False)  # a0 to b1 of class a, then b0 and b1 of class b
    with pytest.raises(ValueError, match=r"^cannot read the validation image .*a0\.png: .*--skip_broken_eval"):
        list(eval_loader(dataset, batch_size=2, num_workers=num_workers))
    loader = eval_loader(dataset, batch_size=2, num_workers=num_workers, skip_broken=True)
    for _ in range(2):  # a batch that is broken altogether does not come at all
        assert [indices.tolist() for _, _, indices in loader] == [[3], [4]]
    assert loader.broken == {0, 1, 2}


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
def test_unreadable_files_and_folders():
    # Not in tmp_path, which other users cannot enter: root reads everything and has to become another user.
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        for i in range(3):
            save(root / f"a/{i}.png")
        save(root / "a/deeper/3.png")
        (root / "a/1.png").chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            loader = train_loader(datasets.FolderDataset(root, to_tensor), batch_size=2)
            list(loader)
            os.seteuid(user)
            (root / "a/deeper").chmod(0)
            if user == 0:
                os.seteuid(65534)
            with pytest.raises(ValueError, match=r"cannot read the folder .*deeper: Permission denied"):
                datasets.FolderDataset(root, to_tensor)
        finally:
            os.seteuid(user)
            (root / "a/deeper").chmod(0o755)
        assert loader.broken == {1}


def test_lack_of_resources_is_no_broken_image(tmp_path, monkeypatch):
    path = save(tmp_path / "x.png")

    def fail(*args, **kwargs):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="Too many open files"):
        decode_image(path)


# -- order


def sampler(length, **kwargs):
    return EpochSampler(length, Loading(**{"batch_size": 3, "seed": 5, **kwargs}))


def global_order(length, world_size, epoch=0, start_sample=0, **kwargs):
    """The indices of all ranks' batches, in global order."""
    ranks = []
    for rank in range(world_size):
        part = sampler(length, rank=rank, world_size=world_size, **kwargs)
        part.set_epoch(epoch, start_sample)
        ranks.append(list(part))
        assert len(ranks[-1]) == part.remaining_batches
        assert all(len(batch) == part.loading.batch_size for batch in ranks[-1])
        assert {pair[0] for batch in ranks[-1] for pair in batch} <= {epoch}
    return [index for batches in zip(*ranks, strict=True) for batch in batches for _, index in batch]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_of_an_epoch(world_size):
    for length in range(1, 41):
        order = global_order(length, world_size)
        step = 3 * world_size
        assert len(order) == -(-length // step) * step
        assert sorted(order[:length]) == list(range(length))
        # Filled up from the start of the same order, here also several times.
        assert order == [order[i % length] for i in range(len(order))]


def test_order_is_one_for_all_ranks_and_new_in_each_epoch():
    orders = {w: global_order(40, w, epoch=3)[:40] for w in (1, 2, 3)}
    assert orders[1] == orders[2] == orders[3]
    assert orders[1] != global_order(40, 1, epoch=4)[:40]
    assert orders[1] != global_order(40, 1, epoch=3, seed=6)[:40]
    assert global_order(8, 1, epoch=1, batch_size=8) == [1, 6, 2, 3, 4, 5, 7, 0]  # must not change: runs are resumed


def test_resume_with_another_number_of_ranks():
    whole = global_order(40, 1)
    for before in (1, 2, 3):
        for after in (1, 2, 3):
            start = 2 * 3 * before
            rest = global_order(40, after, start_sample=start)
            assert rest[: 40 - start] == whole[start:40]
            assert sorted(whole[:start] + rest[: 40 - start]) == list(range(40))
            assert rest[40 - start :] == whole[: len(rest) - 40 + start]
    assert global_order(40, 2, start_sample=42) == []  # 42 = 7 x 6 samples were seen
    assert global_order(40, 2, start_sample=17)[:23] == whole[17:40]


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(ValueError, match="1 or more samples to train on, not 0"):
        sampler(0)


# -- loaders


def states():
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
        torch.get_rng_state().tolist(),
    )


def batches_of(loader, epoch, start_sample=0):
    loader.set_epoch(epoch, start_sample)
    return list(loader)


def assert_equal_batches(first, second):
    assert len(first) == len(second) > 0
    for batch, other in zip(first, second, strict=True):
        for tensor, reference in zip(batch, other, strict=True):
            assert torch.equal(tensor, reference)


def test_samples_hang_on_seed_epoch_and_index_only():
    transform = transforms.build_train_transform(
        preprocessing(32, native=True), aa="rand-m9-mstd0.5-inc1", interpolation="random", reprob=0.5, recount=2
    )
    dataset = fmnist(False, transform)
    dataset.images, dataset.targets = dataset.images[:50], dataset.targets[:50]
    plain, parallel = train_loader(dataset, seed=3), train_loader(dataset, seed=3, num_workers=2)
    assert len(plain) == len(parallel) == 13
    epochs = []
    for epoch in range(2):
        random.random(), np.random.rand(), torch.rand(1)  # what else happens does not matter
        epochs.append(batches_of(plain, epoch))
        assert_equal_batches(epochs[epoch], batches_of(parallel, epoch))
        for done in (3, 8):
            assert_equal_batches(epochs[epoch][done:], batches_of(parallel, epoch, 4 * done))
    images, targets = epochs[0][0]
    assert (images.dtype, images.shape, targets.dtype) == (torch.float32, (4, 3, 32, 32), torch.int64)
    # The second rank of two begins with the second batch of one.
    assert_equal_batches(epochs[0][1:2], batches_of(train_loader(dataset, seed=3, rank=1, world_size=2), 0)[:1])
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])
    assert not torch.equal(epochs[0][0][0], batches_of(train_loader(dataset, seed=4), 0)[0][0])


def test_loaders_leave_the_global_generators_alone():
    dataset = indexed(20, transforms.build_train_transform(preprocessing(32)))
    val = indexed(20, transforms.build_eval_transform(preprocessing(32)))
    before = states()
    for num_workers in (0, 1):
        batches_of(train_loader(dataset, num_workers=num_workers), 0)
        assert len(list(eval_loader(val, num_workers=num_workers))) == 5
    assert states() == before


def test_an_iteration_may_be_left_in_the_middle():
    loader = train_loader(indexed(20), num_workers=2)
    whole = batches_of(loader, 1)
    loader.set_epoch(1)
    for number, _ in enumerate(loader):
        if number == 1:
            break
    loader.set_epoch(1, 8)
    assert loader.remaining_batches == 3
    assert len(loader) == 5
    assert_equal_batches(list(loader), whole[2:])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_each_image_once(world_size):
    for length in range(1, 41):
        dataset = indexed(length)
        seen = []
        for rank in range(world_size):
            loader = eval_loader(dataset, rank=rank, world_size=world_size)
            batches = list(loader)
            assert len(loader) == len(batches)
            for images, targets, indices in batches:
                assert len(images) <= 4
                assert torch.equal(targets, indices)
                assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), indices)
            mine = [index for *_, indices in batches for index in indices.tolist()]
            assert mine == list(range(rank, length, world_size))
            seen += mine
        assert sorted(seen) == list(range(length))


def test_evaluation_on_a_rank_without_images():
    assert list(eval_loader(indexed(1), rank=1, world_size=2, num_workers=1)) == []


PROGRAM = """
import multiprocessing, os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_datasets
for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda number, frame: None)
loader = test_datasets.train_loader(test_datasets.indexed(200), num_workers=2)
iterator = iter(loader)
next(iterator)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
input()
print(sum(1 for batch in iterator), flush=True)
iterator = iter(loader)
next(iterator)
sys.exit(3)  # with loader processes that are still at work
"""


@pytest.fixture
def program():
    """A main process that has taken one of 50 batches and waits for a line to take the others, and its children."""
    code = PROGRAM.format(root=str(ROOT), tests=str(Path(__file__).parent))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **pipes) as process:
        children = [int(pid) for pid in process.stdout.readline().split()]
        assert len(children) == 2
        yield process, children
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


posix = pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")


@posix
def test_signals_are_left_to_the_main_process(program):
    process, _ = program
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.killpg(process.pid, number)
    start = time.monotonic()
    output, _ = process.communicate("\n", timeout=20)
    assert output == "49\n"
    assert process.returncode == 3
    assert time.monotonic() - start < 10


def test_a_loader_process_is_silent_when_the_main_process_hangs_up(monkeypatch, capfd):
    """As it does when another loader process has died while it fetches a batch."""
    hung_up = []

    def hang_up(ident):
        Client(ident[0], authkey=multiprocessing.current_process().authkey).close()
        hung_up.append(ident)
        return fetch(ident)

    fetch = _ResourceSharer.get_connection
    monkeypatch.setattr(_ResourceSharer, "get_connection", staticmethod(hang_up))
    assert len(list(iterate(train_loader(indexed(8), num_workers=1)))) == 2
    assert hung_up
    assert capfd.readouterr().err == ""


def test_an_error_of_the_data_is_no_lost_process():
    """A network's error in a stream has the class of the one that a dying loader process leaves."""

    class Streaming(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            raise ConnectionError("server disconnected")

    before = {process.pid for process in multiprocessing.active_children()}
    for num_workers in (0, 1):
        with pytest.raises(ConnectionError, match="server disconnected") as raised:
            next(iterate(make_loader(Streaming(), Loading(4, num_workers=num_workers), batch_size=4)))
        traceback.clear_frames(raised.tb)  # they hold the iterator, which ends its processes when it is freed
    assert not {process.pid for process in multiprocessing.active_children()} - before


@pytest.mark.parametrize("indices", [None, (1, 0)])
def test_labels_must_be_classes(indices):
    images = np.zeros((4, 8, 8), np.uint8)
    for label in (-1, 2):
        dataset = datasets.ArrayDataset(images, [0, 1, 1, label], classes="ab", transform=to_tensor, name="X")
        loading = Loading(4, num_classes=2, class_indices=indices)
        with pytest.raises(ValueError, match=f"an image has label {label}, and there are 2 classes"):
            list(loaders.build_eval_loader(dataset, loading))
        if indices is None:
            with pytest.raises(ValueError, match=f"an image has label {label}"):
                list(loaders.build_train_loader(dataset, loading))


def test_classes_of_torchvisions_imagenet_are_its_folders():
    """Its `class_to_idx` has every synonym, and one entry for a word that two classes share."""
    source = SimpleNamespace(wnids=["n01440764", "n02012849"], class_to_idx={"tench": 0, "Tinca tinca": 0, "crane": 1})
    assert timm_classes(source) == ("n01440764", "n02012849")
    assert timm_classes(SimpleNamespace(class_to_idx={"b": 1, "a": 0})) == ("a", "b")
    assert timm_classes(SimpleNamespace(class_to_idx={"a": 0, "A": 0, "b": 1})) is None
    assert timm_classes(SimpleNamespace(class_to_idx={"a": 1, "b": 2})) is None


def test_a_stream_is_opened_again_where_it_is_unpickled():
    class Unpicklable:
        def __reduce__(self):
            raise AssertionError("Hugging Face's objects cannot be unpickled in a process that is not a fork")

    stream = StreamDataset.__new__(StreamDataset)
    again = pickle.loads(pickle.dumps(_TrainStream(stream, Loading(4), Unpicklable(), key=(1, 2))))
    assert (again.images, again.key, again.loading) == (None, (1, 2), Loading(4))


def test_tfds_needs_loader_processes_for_several_ranks():
    stream = StreamDataset.__new__(StreamDataset)
    stream.name, stream.source = "tfds/x", TimmSource("tfds/x", None, train=True)
    with pytest.raises(ValueError, match="--num_workers 1"):
        stream.open(Loading(4, rank=1, world_size=2))


def test_a_class_called_train(tmp_path):
    """As Pascal VOC has it; validation has a path of its own, so --data_path is the folder of classes."""
    for name in ("cat", "train"):
        for split in ("own", "val"):
            save(tmp_path / split / name / "x.png")
    paths = {"data_path": tmp_path / "own", "eval_data_path": tmp_path / "val", "transform": to_tensor}
    assert datasets.build_dataset("image_folder", train=True, **paths).classes == ("cat", "train")
    save(tmp_path / "own" / "train" / "dog" / "x.png")
    assert datasets.build_dataset("image_folder", train=True, **paths).classes == ("dog",)


def test_images_plain_and_labels_packed(tmp_path):
    for name in IDX_FILES:
        content = (EMBEDDED / name).read_bytes()
        plain = "images" in name
        (tmp_path / name.removesuffix(".gz" * plain)).write_bytes(gzip.decompress(content) if plain else content)
    assert len(datasets.build_dataset("FMNIST", tmp_path, train=False, transform=to_tensor)) == len(fmnist(False))


# -- transforms


def test_evaluation_crops_and_does_not_warp():
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (500, 750, 3), dtype=np.uint8))
    resize, crop, bicubic = torchvision.transforms.Resize, torchvision.transforms.CenterCrop, Image.BICUBIC
    for input_size, crop_pct, side in ((224, None, 256), (224, 0.95, 235), (384, None, 384), (384, 0.9, 426)):
        found = transforms.build_eval_transform(preprocessing(input_size, crop_pct=crop_pct))(image)
        assert found.shape == (3, input_size, input_size)
        expected = crop(input_size)(image.resize((int(side * 750 / 500), side), bicubic))
        assert torch.equal(found, (to_tensor(expected) - 0.5) / 0.5)
    # At 384 px a disc stays a disc: its width in the middle row is its height in the middle column.
    disc = np.hypot(*np.mgrid[-250:250, -375:375]) < 200
    found = transforms.build_eval_transform(preprocessing(384))(Image.fromarray(disc).convert("RGB"))[0] > 0
    assert abs(int(found[192].sum()) - int(found[:, 192].sum())) <= 1
    assert resize(384)(image).size == (576, 384)


def test_extreme_aspect_ratio_is_cut_before_it_is_resized():
    image = Image.new("RGB", (20_000, 1), (0, 0, 0))
    image.paste((255, 255, 255), (9_998, 0, 10_002, 1))
    found = transforms.build_eval_transform(preprocessing(224))(image)
    assert found.shape == (3, 224, 224)
    assert torch.equal(found, torch.ones(3, 224, 224))  # 4 white px in the middle, each 256 px wide now
    assert transforms.build_eval_transform(preprocessing(224))(Image.new("RGB", (1, 1))).shape == (3, 224, 224)


def test_small_images_keep_their_size():
    image = Image.new("L", (28, 28), 255).convert("RGB")
    found = transforms.build_eval_transform(preprocessing(32, native=True))(image)[0]
    assert (found[2:30, 2:30] == 1).all()
    assert int((found == 1).sum()) == 28 * 28
    plain = {"aa": None, "color_jitter": 0, "reprob": 0, "hflip": 0}
    transform = transforms.build_train_transform(preprocessing(32, native=True), **plain)
    torch.manual_seed(0)
    places = set()
    for _ in range(200):
        rows, columns = torch.nonzero(transform(image)[0] == 1, as_tuple=True)
        assert len(rows) == 28 * 28  # moved as a whole, never resized
        places.add((int(rows[0]), int(columns[0])))
    assert places == {(i, j) for i in range(5) for j in range(5)}
    assert transforms.keeps_native_size("FMNIST", 32)
    assert not transforms.keeps_native_size("FMNIST", 33)
    assert not transforms.keeps_native_size("image_folder", 32)
    with pytest.raises(ValueError, match="--crop_pct has no effect"):
        transforms.build_eval_transform(preprocessing(32, native=True, crop_pct=0.9))


def test_every_augmentation_setting_has_an_effect():
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (60, 60, 3), dtype=np.uint8))
    off = {"aa": "none", "color_jitter": 0, "reprob": 0, "hflip": 0}

    def view(**kwargs):
        seed_all(1, 2, 3)
        return transforms.build_train_transform(preprocessing(48), **{**off, **kwargs})(image)

    base = view()
    assert base.shape == (3, 48, 48)
    assert torch.equal(base, view(aa=""))
    assert torch.equal(base, view(aa=None))
    assert torch.equal(view(hflip=1), base.flip(2))
    assert torch.equal(view(vflip=1), base.flip(1))
    # The whole image, resized as Pillow does it, but for the rounding of grey values.
    whole = torch.from_numpy(np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255)
    mean, std = (torch.tensor(getattr(preprocessing(48), name))[:, None, None] for name in ("mean", "std"))
    assert (view(scale=(1, 1), ratio=(1, 1)) * std + mean - whole).abs().max() < 1.5 / 255
    assert not torch.equal(base, view(scale=(0.08, 0.09)))
    assert not torch.equal(base, view(ratio=(2, 2)))
    for setting in ({"aa": "rand-m9-mstd0.5-inc1"}, {"color_jitter": 0.4}, {"interpolation": "bilinear"}):
        assert not torch.equal(base, view(**setting)), setting
    erased = {mode: view(reprob=1, remode=mode) for mode in ("const", "rand", "pixel")}
    areas = {mode: int((image != base).any(0).sum()) for mode, image in erased.items()}
    assert min(areas.values()) > 0.02 * 48 * 48 * 0.9
    assert torch.unique(erased["const"][:, (erased["const"] != base).any(0)]).tolist() == [0]
    assert not torch.equal(view(reprob=1, recount=3), view(reprob=1))


@pytest.mark.parametrize(
    "wrong", [{"aa": "rund-m9"}, {"aa": "rand-m9-foo"}, {"aa": "rand-x9"}, {"remode": "x"}, {"interpolation": "x"}]
)
def test_train_transform_refuses(wrong):
    with pytest.raises(ValueError, match=r"^timm cannot augment by --aa .*$"):
        transforms.build_train_transform(preprocessing(32), **wrong)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18.tv_in1k",
        "tf_efficientnet_lite0.in1k",
        "vit_base_patch16_siglip_224.v2_webli",
        "convnext_tiny.fb_in22k_ft_in1k_384",
        "deepseek_vit_412m",
    ],
)
def test_evaluation_prepares_images_as_timm_does(name):
    """By the config of each: bilinear and bicubic, each way of cropping, several crops and sizes."""
    config = resolve_data_config(pretrained_cfg=get_pretrained_cfg(name).to_dict())
    size = config["input_size"][-1]
    keys = ("mean", "std", "crop_pct", "interpolation", "crop_mode")
    found = transforms.build_eval_transform(transforms.Preprocessing(size, **{key: config[key] for key in keys}))
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (300, 420, 3), dtype=np.uint8))
    assert torch.equal(found(image), create_transform(**config, is_training=False)(image))


@pytest.mark.parametrize("interpolation", transforms.INTERPOLATIONS)
def test_evaluation_resizes_by_the_interpolation_asked_for(interpolation):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (90, 90, 3), dtype=np.uint8))
    found = transforms.build_eval_transform(preprocessing(64, crop_pct=1.0, interpolation=interpolation))(image)
    assert torch.equal(found, (to_tensor(image.resize((64, 64), Image.Resampling[interpolation.upper()])) - 0.5) / 0.5)


@pytest.mark.parametrize("wrong", [{"interpolation": "random"}, {"crop_mode": "middle"}])
def test_preprocessing_refuses(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be one of .*, not {next(iter(wrong.values()))}"):
        preprocessing(64, **wrong)


@pytest.mark.parametrize("crop_pct", [0, -1, 1.1])
def test_crop_pct_out_of_range(crop_pct):
    with pytest.raises(ValueError, match="--crop_pct must be above 0"):
        transforms.build_eval_transform(preprocessing(224, crop_pct=crop_pct))


@pytest.mark.parametrize("aa", ["rand-m10-inc1", "v0", "augmix-m5"])
def test_posterizing_to_no_bits_gives_black(aa):
    """timm's policies come to it at magnitude 10, which m9-mstd0.5 draws in 2 of 100 cases."""
    transform = transforms.build_train_transform(preprocessing(32), aa=aa)
    policy = next(step for step in transform.transforms if type(step).__module__ == auto_augment.__name__)
    ops = policy.ops if hasattr(policy, "ops") else [op for pair in policy.policy for op in pair]
    found = [op for op in ops if op.name.startswith("Posterize")]
    assert found
    for op in found:
        op.prob, op.magnitude_std = 1, 0
        op.magnitude = 10 if op.name == "PosterizeIncreasing" else 0
        assert not np.asarray(op(Image.new("RGB", (2, 2), (255, 255, 255)))).any()
        op.magnitude = 5  # keeps 2 bits
        assert np.asarray(op(Image.new("RGB", (2, 2), (255, 255, 255)))).flatten().tolist() == [192] * 12


# -- mixup


def mixup_of(batch_size, num_classes, **flags):
    words = [word for flag, value in flags.items() for word in (f"--{flag}", *map(str, np.ravel(value)))]
    args = options.parse_args(["--data_path", "d", "--batch_size", str(batch_size), *words])
    return main.build_mixup(args, num_classes)


def test_mixup(capsys):
    assert mixup_of(5, 10, mixup=0, cutmix=0) is None
    with pytest.raises(ValueError, match="even --batch_size, not 5"):
        mixup_of(5, 10)
    with pytest.raises(SystemExit):
        mixup_of(4, 10, cutmix_minmax=(0.5, 0.2))
    assert "--cutmix_minmax must be two ascending shares" in capsys.readouterr().err
    mixup = mixup_of(4, 10, mixup=0.8, cutmix=0, smoothing=0)
    np.random.seed(0)
    images, targets = mixup(torch.arange(4.0).reshape(4, 1, 1, 1).repeat(1, 3, 2, 2), torch.tensor([0, 1, 2, 3]))
    share = targets[0, 0]
    assert 0 < share < 1
    assert torch.allclose(targets[0, 3], 1 - share)
    assert torch.allclose(images[0], (1 - share) * 3 * torch.ones(3, 2, 2))
    cut = mixup_of(2, 3, mixup=0, cutmix=0, cutmix_minmax=(0.3, 0.6), smoothing=0.3)
    images, targets = cut(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).repeat(1, 3, 32, 32), torch.tensor([0, 1]))
    share = images[0, 0].mean()
    assert torch.allclose(targets[0], torch.tensor([0.8 - 0.7 * share, 0.1 + 0.7 * share, 0.1]))
    assert mixup_of(4, 10, mixup_prob=0.3, mixup_switch_prob=0.7, mixup_mode="pair").switch_prob == 0.7


# -- ReaL


def imagenet_like(folder, names):
    """Validation images in two class folders, so that the data set's order is not the names' order."""
    for number, name in enumerate(names):
        save(folder / "val" / ("n01", "n00")[number % 2] / name)
    return open_folder(folder, train=False)


def test_real_labels_are_matched_by_name(tmp_path):
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2, 3, 4, 5)]
    labels = [[0], [1], [], [0, 1], [1]]
    dataset = imagenet_like(tmp_path, names)
    expected = dict(zip(names, labels, strict=True))
    assert [dataset.filename(i) for i in range(5)] != names
    (tmp_path / "list.json").write_text(json.dumps(labels))
    reordered = dict(sorted(expected.items(), reverse=True))
    (tmp_path / "dict.json").write_text(json.dumps(reordered))
    for file in ("list.json", "dict.json"):
        found = datasets.real_targets(datasets.load_real_labels(tmp_path / file), dataset, 2)
        assert found == [expected[dataset.filename(i)] for i in range(5)]


def test_real_labels_of_timm(tmp_path):
    """Those that timm's own evaluation uses."""
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50_001)]
    assert datasets.load_real_labels("timm") == RealLabelsImagenet(names).real_labels


def test_real_labels_that_do_not_fit(tmp_path):
    dataset = imagenet_like(tmp_path, ["x1.JPEG", "x2.JPEG", "x3.JPEG"])
    good = {"x1.JPEG": [0], "x2.JPEG": [1], "x3.JPEG": []}
    assert datasets.real_targets(good, dataset, 2) == [[1], [0], []]
    assert datasets.real_targets({**good, "x1.JPEG": [8]}, dataset, 9)[1] == [8]  # of a network that knows more classes
    with pytest.raises(ValueError, match=r"no entry for the validation image x2\.JPEG$"):
        datasets.real_targets({"x1.JPEG": [0]}, dataset, 2)
    with pytest.raises(ValueError, match="names class 2, but there are only 2 classes"):
        datasets.real_targets({**good, "x1.JPEG": [2]}, dataset, 2)
    with pytest.raises(ValueError, match="needs image files"):
        datasets.real_targets(good, fmnist(False), 10)
    with pytest.raises(ValueError, match="in the order of ImageNet's folders"):
        datasets.real_targets(good, dataset, 1000, [f"class {index}" for index in range(1000)])
    assert datasets.real_targets(good, dataset, 1000, ImageNetInfo().label_names()) == [[1], [0], []]
    save(tmp_path / "val/n00/x1.JPEG")
    with pytest.raises(ValueError, match=r"2 validation images are called x1\.JPEG"):
        datasets.real_targets(good, open_folder(tmp_path, train=False), 2)


@pytest.mark.parametrize(
    "content", [None, "", "[1, 2", "[1, 2]", '{"a": 1}', '[["cat"]]', "3", "[[true]]", '{"a": [1.5]}']
)
def test_bad_real_file(tmp_path, content):
    if content is not None:
        (tmp_path / "real.json").write_text(content)
    with pytest.raises(ValueError, match=r"^(cannot read the ReaL labels|.*real\.json holds no ReaL labels).*$"):
        datasets.load_real_labels(tmp_path / "real.json")


# -- data sets of timm's


def test_cifar_10_of_torchvision(tmp_path, monkeypatch):
    """Its folder, in its own format, as recipes/cifar10.args names it."""
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (2, 3072), dtype=np.uint8)
    (base / "data").write_bytes(pickle.dumps({"data": pixels, "labels": [1, 0]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": ["frog", "ship"]}))
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, [["data", None]])
    monkeypatch.setitem(torchvision.datasets.CIFAR10.meta, "md5", None)
    for train in (True, False):
        dataset = datasets.build_dataset("torch/cifar10", tmp_path, train=train, transform=to_tensor)
        assert (len(dataset), list(dataset.classes)) == (2, ["frog", "ship"])
        image, target = dataset[1]
        assert target == 0
        assert torch.equal((image * 255).round().to(torch.uint8).flatten(), torch.from_numpy(pixels[1]))


def test_torch_data_set_of_timm(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in IDX_FILES:
        (raw / name.removesuffix(".gz")).write_bytes(gzip.decompress((EMBEDDED / name).read_bytes()))
    dataset = datasets.build_dataset("torch/fashion_mnist", tmp_path, train=False, transform=to_tensor)
    expected = fmnist(False)
    assert len(dataset) == 2000
    other = datasets.build_dataset("torch/fashion_mnist", tmp_path, train=False, transform=to_tensor, split="train")
    assert len(other) == len(pickle.loads(pickle.dumps(other))) == len(fmnist()) != 2000
    assert set(dataset.classes) == set(expected.classes)
    for index in (0, 1999):
        assert torch.equal(dataset[index][0], expected[index][0])
        assert torch.equal(pickle.loads(pickle.dumps(dataset))[index][0], expected[index][0])
    with pytest.raises(ValueError, match=r"cannot open --data_set torch/fashion_mnist: .*not found"):
        datasets.build_dataset("torch/fashion_mnist", tmp_path / "x", train=True, transform=to_tensor)
    with pytest.raises(ValueError, match="needs --data_path"):
        datasets.build_dataset("torch/fashion_mnist", None, train=True, transform=to_tensor)
    with pytest.raises(ValueError, match="cannot open --data_set torch/x: Unknown torchvision dataset x"):
        datasets.build_dataset("torch/x", tmp_path, train=True, transform=to_tensor)


has_webdataset = importlib.util.find_spec("webdataset") is not None
needs_webdataset = pytest.mark.skipif(not has_webdataset, reason="needs webdataset")


def has_hugging_face():
    try:
        with hugging_face():
            return True
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("data_set", "package", "missing"),
    [
        ("wds/", "webdataset", not has_webdataset),
        ("hfds/x", "datasets", not has_hugging_face()),
        ("hfids/x", "datasets", not has_hugging_face()),
        ("tfds/x", "tensorflow_datasets", importlib.util.find_spec("tensorflow_datasets") is None),
    ],
)
def test_missing_package_is_named(data_set, package, missing, tmp_path):
    if not missing:
        pytest.skip(f"{package} is installed")
    with pytest.raises(ValueError, match=rf"^.*pip install {package}$"):
        datasets.build_dataset(data_set, tmp_path, train=True, transform=to_tensor)


@pytest.fixture
def shards(tmp_path):
    """Two splits of two shards in webdataset's form: 20 training and 11 validation images, of their number's grey."""
    splits = {}
    for split, sizes in (("train", (12, 8)), ("validation", (6, 5))):
        number, names = 0, []
        for shard, size in enumerate(sizes):
            names.append(f"{split}-{shard}.tar")
            with tarfile.open(tmp_path / names[-1], "w") as archive:
                for _ in range(size):
                    image = encoded(Image.new("L", (4, 4), number), "PNG").getvalue()
                    for suffix, payload in (("png", image), ("cls", str(number % 3).encode())):
                        info = tarfile.TarInfo(f"{split}{number:03d}.{suffix}")
                        info.size = len(payload)
                        archive.addfile(info, io.BytesIO(payload))
                    number += 1
        splits[split] = {"name": split, "num_samples": number, "filenames": names, "shard_lengths": sizes}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    return tmp_path


def numbers(batches):
    return [number for images, *_ in batches for number in (images[:, 0, 0, 0] * 255).round().long().tolist()]


@needs_webdataset
@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_for_training(shards, num_workers):
    dataset = datasets.build_dataset("wds/", shards, train=True, transform=to_tensor)
    assert len(dataset) == 20
    loader = train_loader(dataset, num_workers=num_workers)
    before = states()
    first = batches_of(loader, 0)
    assert states() == before
    assert len(first) == len(loader) == loader.remaining_batches == (5 if num_workers == 0 else 6)
    assert all(images.shape == (4, 3, 4, 4) for images, _ in first)
    if num_workers == 0:
        assert sorted(numbers(first)) == list(range(20))
    second = batches_of(loader, 1)
    assert numbers(first) != numbers(second)
    again = train_loader(dataset, num_workers=num_workers)  # as a run that is resumed at the end of an epoch
    assert_equal_batches(batches_of(again, 1), second)
    with pytest.raises(ValueError, match="cannot be resumed in the middle of an epoch"):
        loader.set_epoch(1, 8)


@needs_webdataset
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_stream_without_a_shard_for_each_worker(shards):
    dataset = datasets.build_dataset("wds/", shards, train=True, transform=to_tensor)
    with pytest.raises(ValueError, match=r"ended after \d of \d batches.*lower --num_workers"):
        list(train_loader(dataset, num_workers=3))


@needs_webdataset
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_stream_for_evaluation(shards, world_size, num_workers):
    dataset = datasets.build_dataset("wds/", shards, train=False, transform=to_tensor)
    loaders = [eval_loader(dataset, 2, rank, world_size, num_workers) for rank in range(world_size)]
    batches = [batch for loader in loaders for batch in loader]
    assert sorted(numbers(batches)) == list(range(11))
    assert len({index for *_, indices in batches for index in indices.tolist()}) == 11
    assert all(loader.broken == set() for loader in loaders)
    renamed = eval_loader(dataset, num_workers=num_workers, class_indices=(7, 8, 9))
    assert sorted(torch.cat([targets for _, targets, _ in renamed])) == sorted(7 + number % 3 for number in range(11))


@needs_webdataset
def test_broken_images_of_a_stream(shards):
    with tarfile.open(shards / "validation-1.tar", "w") as archive:
        for suffix in ("png", "cls"):
            info = tarfile.TarInfo(f"x.{suffix}")
            info.size = 1
            archive.addfile(info, io.BytesIO(b"1"))
    dataset = datasets.build_dataset("wds/", shards, train=False, transform=to_tensor)
    with pytest.raises(ValueError, match=r"5 of the 11 validation images .* are broken or missing"):
        list(eval_loader(dataset))
    loader = eval_loader(dataset, skip_broken=True)
    assert sorted(numbers(loader)) == list(range(6))
    assert len(loader.broken) == 5
    (shards / "_info.json").unlink()
    with pytest.raises(ValueError, match="cannot open --data_set wds/: split"):
        datasets.build_dataset("wds/", shards, train=False, transform=to_tensor)


@pytest.mark.skipif(not has_hugging_face(), reason="needs Hugging Face's datasets")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_hugging_face(tmp_path, num_workers, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    classes = "dtype: {class_label: {names: {'0': cat, '1': dog}}}"
    features = f"features: [{{name: image, dtype: image}}, {{name: label, {classes}}}]"
    splits = "splits: [{name: train, num_examples: 6}, {name: test, num_examples: 6}]"
    (tmp_path / "data").mkdir()
    (tmp_path / "data/README.md").write_text(f"---\ndataset_info:\n  {features}\n  {splits}\n---\n")
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            for i in range(3):
                save(tmp_path / f"data/{split}/{name}/{i}.png", color=(10 * label + i, 0, 0))
    data_set = f"hfds/{tmp_path}/data"
    dataset = datasets.build_dataset(data_set, tmp_path / "cache", train=True, transform=to_tensor)
    assert sys.modules["datasets"] is datasets
    assert dataset.classes == ("cat", "dog")
    assert sorted(numbers(train_loader(dataset, 2, num_workers=num_workers))) == [0, 1, 2, 10, 11, 12]
    val = datasets.build_dataset(data_set, tmp_path / "cache", train=False, transform=to_tensor)
    batches = list(eval_loader(val, num_workers=num_workers))
    assert [target for _, targets, _ in batches for target in targets.tolist()] == [0, 0, 0, 1, 1, 1]
    assert torch.equal(pickle.loads(pickle.dumps(val))[4][0], val[4][0])
    train, val = (
        datasets.build_dataset(f"hfids/{tmp_path}/data", tmp_path / "cache", train=train, transform=to_tensor)
        for train in (True, False)
    )
    assert sorted(numbers(train_loader(train, 2))) == [0, 1, 2, 10, 11, 12]
    assert sorted(numbers(eval_loader(val, num_workers=num_workers))) == [0, 1, 2, 10, 11, 12]
    with pytest.raises(ValueError, match="cannot open --data_set hfds/"):
        datasets.build_dataset(f"hfds/{tmp_path}/none", tmp_path / "cache", train=False, transform=to_tensor)
