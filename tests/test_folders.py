"""Folders and files as users have them: what is an image, what is left out, which way is up, what splits are called."""

import codecs
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features
from test_datasets import fmnist, open_folder, save

import datasets
import main
import options
import utils
from loading.images import EXTENSIONS, decode_image, list_images, read_image
from loading.order import seed_all
from loading.transforms import Preprocessing, build_eval_transform, build_train_transform


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for name in "ab":
            for i in range(count):
                save(tmp_path / split / name / f"{name}{i}.png")
    return tmp_path


# -- what is left out


def clutter(folder):
    """Plant what systems leave behind, images among it."""
    for place in (".ipynb_checkpoints", "__MACOSX/a", ".Trash-1000/files", "lost+found", "@eaDir"):
        save(folder / place / "0.jpg")
    for place in ("a/.ipynb_checkpoints", "a/deeper/.thumbnails", "a/__MACOSX"):
        save(folder / place / "a0-checkpoint.png")
    for name in ("a/._a0.png", "b/._b0.jpg", "b/Thumbs.db", "b/.DS_Store", ".DS_Store"):
        (folder / name).write_bytes(b"no image")


def test_names_that_are_no_data_are_left_out(folder, caplog):
    expected = [open_folder(folder).describe(i) for i in range(6)]
    clutter(folder / "train")
    train = open_folder(folder)
    assert train.classes == ("a", "b")
    assert [train.describe(i) for i in range(len(train))] == expected
    assert len(caplog.records) == 1
    assert "train: left out 13 by name, as no data: .DS_Store, " in caplog.messages[0]
    assert list_images([str(folder / "train")]) == expected
    assert len(caplog.records) == 2


def test_names_that_are_no_text_are_spelled_out(folder, caplog):
    (folder / "train/a" / os.fsdecode(b"._\xff.jpg")).write_bytes(b"?")
    assert len(open_folder(folder)) == 6
    caplog.messages[0].encode("utf-8")  # a surrogate would raise
    assert r"._\udcff.jpg" in caplog.messages[0]


def test_a_folder_that_is_named_is_read_whatever_its_name(folder):
    shutil.copytree(folder / "train", folder / ".cache/__MACOSX/train")
    assert len(open_folder(folder / ".cache/__MACOSX")) == 6
    assert len(list_images([str(folder / ".cache/__MACOSX")])) == 6
    with pytest.raises(ValueError, match="no image is in the folder"):
        list_images([str(folder / ".cache")])


def test_formats_that_are_not_read_are_told(folder, caplog):
    for name in ("a/1.heic", "a/2.HEIC", "b/x/3.svg", "b/4.cr2", "b/5.jxl", "b/photo", "b/notes.txt", "b/labels.json"):
        (folder / "train" / name).parent.mkdir(exist_ok=True)
        (folder / "train" / name).write_bytes(b"?")
    assert len(open_folder(folder)) == 6
    assert len(caplog.records) == 1
    assert "left out 6 by extension" in caplog.messages[0]
    for part in ("2 .heic", "1 .svg", "1 .cr2", "1 .jxl", "1 without an extension"):
        assert part in caplog.messages[0]
    for name in ("a0", "a1", "a2"):
        (folder / f"train/a/{name}.png").unlink()
    with pytest.raises(ValueError, match=r"no image \(.jpg, .*\) in these class folders of .*: a$"):
        open_folder(folder)
    assert "2 .heic" in caplog.messages[-1]


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_extension_is_read(tmp_path, extension):
    image = Image.fromarray(np.full((6, 8, 3), 128, np.uint8))
    image.convert("1" if extension == ".pbm" else "RGB").save(tmp_path / f"x{extension.upper()}")
    [path] = list_images([str(tmp_path)])
    assert read_image(path).size == (8, 6)


def test_avif_is_read_where_pillow_reads_it():
    assert (".avif" in EXTENSIONS) == bool(features.check("avif"))
    assert {".jfif", ".gif"} <= set(EXTENSIONS)


# -- which way is up


def photograph(path, orientation, **options):
    """Four colours in the corners; saved as `orientation` says it has to be turned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(0).randint(0, 255, (3, 5, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.kron(pixels, np.ones((8, 8, 1), np.uint8))).save(path, exif=exif, **options)
    return path


FORMATS_WITH_EXIF = ("jpg", "png", "webp", "tiff", *(["avif"] if ".avif" in EXTENSIONS else []))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", FORMATS_WITH_EXIF)
def test_photographs_are_turned_upright(tmp_path, kind, orientation):
    path = photograph(tmp_path / f"x.{kind}", orientation)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    found = read_image(path)
    assert np.array_equal(np.asarray(found), expected)
    assert found.size == ((24, 40) if orientation > 4 else (40, 24))
    # Data sets ask for it, and turning twice is turning once.
    for image in (decode_image(path), found):
        turned = build_eval_transform(Preprocessing(32, native=True, exif_transpose=True))(image)
        plain = build_eval_transform(Preprocessing(32, native=True))(Image.fromarray(expected))
        assert torch.equal(turned, plain)


def test_data_sets_leave_photographs_as_they_are_stored(tmp_path):
    image = decode_image(photograph(tmp_path / "x.jpg", 6))
    plain, turned = (Preprocessing(24, crop_pct=1.0, exif_transpose=value) for value in (False, True))
    assert torch.equal(
        build_eval_transform(plain)(image), build_eval_transform(plain)(Image.fromarray(np.array(image)))
    )
    assert not torch.equal(build_eval_transform(plain)(image), build_eval_transform(turned)(image))
    still = {"aa": None, "color_jitter": 0, "reprob": 0, "hflip": 0}
    views = []
    for preprocessing, source in ((turned, image), (plain, read_image(tmp_path / "x.jpg")), (plain, image)):
        seed_all(0)
        views.append(build_train_transform(preprocessing, **still)(source))
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b""])
def test_damaged_exif_is_no_damaged_image(tmp_path, exif):
    Image.new("RGB", (40, 24)).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").size == (40, 24)


def test_16_bit_and_palette_images_keep_their_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((8, 12), np.uint16)).save(tmp_path / "grey.png", exif=exif)
    Image.new("P", (12, 8)).save(tmp_path / "palette.png", exif=exif, transparency=0)
    assert [read_image(tmp_path / f"{name}.png").size for name in ("grey", "palette")] == [(8, 12)] * 2


# -- splits


def test_splits_by_other_names(folder):
    expected = [len(open_folder(folder)), len(open_folder(folder, train=False))]
    (folder / "train").rename(folder / "Training")
    (folder / "val").rename(folder / "valid")
    with pytest.raises(ValueError, match="has no folder train, but Training: add --train_split Training"):
        open_folder(folder)
    with pytest.raises(ValueError, match="has no folder val, but valid: add --val_split valid"):
        open_folder(folder, train=False)
    found = [len(open_folder(folder, split="Training")), len(open_folder(folder, train=False, split="valid"))]
    assert found == expected
    with pytest.raises(ValueError, match="has no folder no, but valid: add --val_split valid"):
        open_folder(folder, train=False, split="no")
    (folder / "test").mkdir()
    with pytest.raises(ValueError, match="has no folder val, but test, valid: add --val_split test"):
        open_folder(folder, train=False)
    with pytest.raises(ValueError, match="leave out --val_split valid"):
        open_folder(folder, train=False, split="valid", eval_data_path=folder / "valid")
    with pytest.raises(ValueError, match="--val_split has no effect on --data_set FMNIST"):
        fmnist(False, split="valid")


def test_the_flags_of_main(folder):
    """--train_split, --val_split and --exif_transpose, from the command line to the tensors."""
    photograph(folder / "elsewhere/a/x.png", 6)
    flags = f"--data_set image_folder --data_path {folder} --input_size 24 --val_split elsewhere --train_split val"
    args = options.parse_args([*flags.split(), "--exif_transpose", "true"])
    world = utils.World(0, 1, torch.device("cpu"))

    def opened(args, *, train):
        transform = build_eval_transform(main.settle(args, None, train=True))
        return main.build_dataset(args, world, train=train, transform=transform)

    assert len(opened(args, train=True)) == 4
    [(image, _)] = opened(args, train=False)
    assert torch.equal(image, build_eval_transform(Preprocessing(24))(read_image(folder / "elsewhere/a/x.png")))
    plain = opened(options.parse_args(flags.split()), train=False)
    assert not torch.equal(image, plain[0][0])


def test_a_single_class_is_warned_of(folder, caplog):
    shutil.move(folder / "train", folder / "moved")
    shutil.move(folder / "moved", folder / "train/train")
    assert open_folder(folder).classes == ("train",)
    assert (
        "train holds a single class folder, train, and with one class there is nothing to learn" in caplog.messages[0]
    )
    caplog.clear()
    shutil.rmtree(folder / "val/b")
    open_folder(folder, train=False)  # a part of the classes can be evaluated
    assert not caplog.records


# -- text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_are_passed_over(tmp_path, encoding):
    text = json.dumps({"é.JPEG": [3]}, ensure_ascii=False).encode(encoding)
    assert text.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16))
    (tmp_path / "real.json").write_bytes(text)
    assert datasets.load_real_labels(tmp_path / "real.json") == {"é.JPEG": [3]}
