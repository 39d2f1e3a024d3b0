"""The fast way to a training image: what Pillow and timm make of the same random numbers, to a grey value."""

import csv
import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from test_datasets import open_folder
from timm.data import auto_augment, create_transform

import benchmark
from benchmarking import loading
from loading import views
from loading.images import BrokenImageError, decode_for_training, decode_image
from loading.loaders import build_train_loader
from loading.order import kept_random_states, seed_all
from loading.processes import Loading
from loading.resampling import move
from loading.transforms import Preprocessing, build_train_transform
from loading.views import stack_views


def photograph(number, size=(90, 70)):
    """Smooth colours with some noise, as cameras see."""
    draw = np.random.RandomState(number)
    coarse = Image.fromarray(draw.randint(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
    noise = draw.normal(0, 4, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize(
    ("aa", "interpolation", "remode", "recount"),
    [
        ("rand-m7-mstd0.5-inc1", "bicubic", "pixel", 2),
        ("rand-m9-mstd0.5", "bilinear", "rand", 2),
        ("original", "random", "const", 2),
        ("augmix-m5-w3", "bicubic", "pixel", 2),
        ("3a", "lanczos", "pixel", 2),
        (None, "random", "rand", 2),
        (None, "bilinear", "pixel", 400),  # so many areas that timm rounds some to no rows or columns
        (None, "bilinear", "const", 400),
    ],
)
def test_the_same_draws_give_what_timm_gives(aa, interpolation, remode, recount):
    preprocessing = Preprocessing(48)
    shared = {"interpolation": interpolation, "color_jitter": 0.4}
    ours = build_train_transform(preprocessing, aa=aa, reprob=0.5, remode=remode, recount=recount, **shared)
    timms = create_transform(
        input_size=48, is_training=True, auto_augment=aa, re_prob=0.5, re_mode=remode, re_count=recount,
        mean=preprocessing.mean, std=preprocessing.std, **shared,
    )  # fmt: skip
    scale = 255 * torch.tensor(preprocessing.std).view(3, 1, 1)
    differences, erased = [], 0
    for number in range(40):
        image = photograph(number, size=(60 + number, 100 - number))
        with kept_random_states():
            seed_all(7, number)
            found = ours(image)
            after = states()
            seed_all(7, number)
            expected = timms(image)
            assert states() == after
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        differences.append(((found - expected).abs() * scale).mean().item())
        with kept_random_states():
            seed_all(7, number)
            for _, top, left, height, width, _ in ours.view(image).areas:
                area = slice(None), slice(top, top + height), slice(left, left + width)
                assert torch.equal(found[area], expected[area])
                erased += 1
    assert np.mean(differences) < 0.3  # of 255
    assert erased > 10


def test_lanczos_goes_with_rotations():
    """Of which Pillow, and so timm, knows nothing wider than bicubic."""
    lanczos, bicubic = (build_train_transform(Preprocessing(32), interpolation=x) for x in ("lanczos", "bicubic"))
    for number in range(20):
        views = []
        for transform in (lanczos, bicubic):
            with kept_random_states():
                seed_all(number)
                views.append(transform(photograph(number)))
        assert not torch.equal(*views)


def test_a_batch_holds_what_the_transform_gives_of_each_image(tmp_path):
    for number in range(6):
        path = tmp_path / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(number).save(path)
    transform = build_train_transform(Preprocessing(32), reprob=0.7, recount=3)
    dataset = open_folder(tmp_path, transform=transform)
    for num_workers in (0, 2):
        loader = build_train_loader(dataset, Loading(3, seed=5, num_workers=num_workers))
        order = list(loader._sampler)
        for (images, targets), batch in zip(loader, order, strict=True):
            for image, target, (epoch, index) in zip(images, targets, batch, strict=True):
                with kept_random_states():
                    seed_all(5, epoch, index)
                    source, expected = dataset.load(index)
                    assert torch.equal(image, transform(source))
                assert target == expected


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.NEAREST])
@pytest.mark.parametrize(
    ("operation", "value"),
    [
        *((getattr(auto_augment, f"shear_{axis}"), value) for axis in "xy" for value in (0.3, -0.21, 0.0, 2.5)),
        *((getattr(auto_augment, f"translate_{axis}_rel"), value) for axis in "xy" for value in (0.45, -0.1, 1.5)),
        *((getattr(auto_augment, f"translate_{axis}_abs"), value) for axis in "xy" for value in (7.0, -0.5, 13.37)),
        (auto_augment.rotate, 20.0),
    ],
)
def test_moved_rows_are_pillows(operation, value, resample):
    for number in range(5):
        image = photograph(number, size=(64, 50))
        options = {"resample": resample, "fillcolor": (124, 116, 104)}
        expected = np.asarray(operation(image, value, **options)).astype(int)
        if operation is auto_augment.rotate:  # is no movement of rows, and never given to `move`
            continue
        difference = np.abs(np.asarray(move(operation, image, value, **options)).astype(int) - expected)
        assert difference.max() <= 1
        assert difference.mean() < 0.05


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": 0, "quality": 95},
        {"subsampling": 1},
        {"progressive": True},
        {"optimize": True, "quality": 20},
    ],
)
def test_a_jpeg_is_decoded_as_pillow_does(tmp_path, options):
    (tmp_path / "x.jpg").write_bytes(jpeg(photograph(0, size=(157, 99)), **options))
    image = decode_for_training(tmp_path / "x.jpg")
    expected = np.asarray(decode_image(tmp_path / "x.jpg"))
    assert np.array_equal(image.pixels.permute(1, 2, 0), expected)
    assert np.array_equal(np.asarray(image), expected)  # Pillow's own, when they are asked for


def test_other_files_are_read_by_pillow(tmp_path):
    image = photograph(0)
    image.save(tmp_path / "x.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.convert("L").save(tmp_path / "grey.jpg")
    for name in ("x.png", "cmyk.jpg", "grey.jpg"):
        found = decode_for_training(tmp_path / name)
        assert not hasattr(found, "pixels")
        assert np.array_equal(np.asarray(found), np.asarray(decode_image(tmp_path / name)))


def test_both_ways_find_the_same_files_broken(tmp_path):
    """Cut at any place, or with a byte changed: an error with the same words, or the same pixels."""
    whole = jpeg(photograph(0), quality=60)
    damaged = [whole[:end] for end in range(0, len(whole), max(1, len(whole) // 60))]
    for place in range(20, len(whole), len(whole) // 40):
        damaged.append(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    broken = 0
    for content in damaged:
        (tmp_path / "x.jpg").write_bytes(content)
        found = []
        for decode in (decode_image, decode_for_training):
            try:
                found.append(np.asarray(decode(tmp_path / "x.jpg")).tolist())
            except BrokenImageError as error:
                found.append(str(error))
        assert found[0] == found[1]
        broken += isinstance(found[0], str)
    assert 20 < broken < len(damaged)


# -- beside timm's loader


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "TURN", 48)
    for number in range(24):
        (tmp_path / "images" / "deeper").mkdir(parents=True, exist_ok=True)
        photograph(number).save(tmp_path / "images" / ("deeper" if number % 2 else ".") / f"{number}.jpg")
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no image")
    return tmp_path / "images"


def test_the_benchmark_of_loading(photographs, tmp_path, capsys):
    arguments = f"--loading true --data_path {photographs} --batch_size 8 --input_size 32 --num_workers 1".split()
    benchmark.main([*arguments, "--output", str(tmp_path / "x.csv")])
    assert "32 px, batch 8, 1 loader processes: " in capsys.readouterr().out
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["images"] for row in rows} == {"24"}  # without the broken one
    whole = {row["loader"]: row for row in rows if row["stage"] == "all"}
    assert set(whole) == {"ours", "timm"}
    assert all(float(row["images_per_s"]) > 0 for row in whole.values())
    stages = {row["stage"]: float(row["ms_per_image"]) for row in rows if row["loader"] == "ours"}
    assert {"decode for training", "RandomResizedCrop", "RandAugment", "batch, normalized and erased"} <= set(stages)
    assert float(whole["ours"]["ratio"]) > 0
    benchmark.main([*arguments, "--output", str(tmp_path / "x.csv")])  # adds to the file
    with (tmp_path / "x.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * len(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--loading true", "--data_path"),
        ("--loading true --data_path {} --model vanillanet_5", "leave --model out"),
        ("--loading true --data_path {} --batch_size 64", "24, --batch_size is 64"),
        ("--loading true --data_path {}/none", "does not exist"),
        ("--model vanillanet_5 --data_path {}", "--data_path"),
        ("--model vanillanet_5 --num_workers 3", "--num_workers"),
    ],
)
def test_the_benchmark_of_loading_refuses(photographs, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(arguments.format(photographs).split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_batch_is_finished_alike_in_parts_and_as_a_whole(monkeypatch):
    """In parts on a CPU, as a whole on other devices."""
    transform = build_train_transform(Preprocessing(40), reprob=0.8, recount=2)
    with kept_random_states():
        seed_all(1)
        singles = [transform.view(photograph(number)) for number in range(5)]
    batch = stack_views(torch.cat([view.pixels for view in singles]), singles)
    found = []
    for values in (1, 1000, 10**9):
        monkeypatch.setattr(views, "SINGLE_THREADED", values)
        found.append(transform.finish(batch, torch.device("cpu")))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], torch.cat([transform.finish(view, torch.device("cpu")) for view in singles]))
