"""export.py: files that agree with PyTorch, or none; what the file knows."""

import functools
import hashlib
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import datasets
import export
import models
import networks
import runtimes
from deployment.fusing import largest_difference, write_deployed
from deployment.images import EMBEDDED, real_images, transform
from loading.images import read_image
from loading.streams import StreamDataset
from loading.transforms import build_eval_transform
from records.checkpoints import load_checkpoint, save_checkpoint

SMALL = {"width_mult": 1 / 16, "num_classes": 10}


@pytest.fixture
def checkpoint(randomized, recorded, tmp_path):
    network = randomized(timm.create_model("vanillanet_6", **SMALL))
    path = tmp_path / "trained.pth"
    save_checkpoint({"model": network.state_dict(), "act_learn": 1.0, "args": recorded()}, path)
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Twelve images of the embedded data, as files in folders."""
    folder = tmp_path_factory.mktemp("photographs")
    images = datasets.read_idx(EMBEDDED / "t10k-images-idx3-ubyte.gz")
    for i in range(12):
        (folder / str(i % 3)).mkdir(exist_ok=True)
        Image.fromarray(images[i]).resize((40, 48)).save(folder / str(i % 3) / f"{i}.png")
    return folder


def run(*arguments):
    export.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """The one line of an error, after which the exit code is 2."""
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert len(lines) == 1
    assert lines[0].startswith("export.py: error: ")
    return lines[0]


def test_a_checkpoint_becomes_a_file(checkpoint, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    target = tmp_path / "new" / "network.onnx"
    run(checkpoint, "--to", "onnx", "--output", target)
    printed = capsys.readouterr().out
    assert float(printed.split("relative: ")[1].split(";")[0]) < 1e-5
    assert "the same class for 32 of 32 images" in printed
    assert [path.name for path in target.parent.iterdir()] == ["network.onnx"]
    metadata = runtimes.load(target).metadata
    assert (metadata.model, metadata.input_size, metadata.crop_pct) == ("vanillanet_6", 32, None)
    assert metadata.classes[:3] == ("T-shirt/top", "Trouser", "Pullover")
    assert metadata.checkpoint == hashlib.sha256(checkpoint.read_bytes()).hexdigest()


def test_int8_on_images_of_a_folder(checkpoint, photographs, tmp_path, capsys):
    pytest.importorskip("nncf")
    target = tmp_path / "network.xml"
    run(checkpoint, "--to", "openvino", "--int8", "--calib_data", photographs, "--output", target, "--input_size", 64)
    assert 1e-5 < float(capsys.readouterr().out.split("relative: ")[1].split(";")[0]) < 0.25
    runtime = runtimes.load(target)
    assert runtime.precision == "int8"
    assert (runtime.metadata.input_size, runtime.metadata.crop_pct) == (64, 0.875)


def test_past_the_tolerance_nothing_is_written(checkpoint, photographs, tmp_path, capsys):
    pytest.importorskip("nncf")
    folder = tmp_path / "new"
    line = refused(
        capsys, checkpoint, "--to", "openvino", "--int8", "--calib_data", photographs, "--tolerance", 1e-6,
        "--output", folder / "network.xml",
    )  # fmt: skip
    assert "more than 1e-06, nothing written" in line
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("size", [("--input_size", "64", "--crop_pct", "0.8"), ()], ids=["resized", "as they are"])
@pytest.mark.parametrize(("engine", "suffix"), [("onnxruntime", ".onnx"), ("openvino", ".xml")])
def test_a_file_is_used_without_this_project(checkpoint, photographs, tmp_path, engine, suffix, size):
    """The programs in docs/examples know the file alone, and find what predict.py finds with our own preprocessing."""
    pytest.importorskip(engine)
    pytest.importorskip("onnxscript")
    path = tmp_path / f"network{suffix}"
    if not size:
        torch.save(load_checkpoint(checkpoint) | {"loss": networks.BINARY_CROSS_ENTROPY}, checkpoint)
    run(checkpoint, "--engine", engine, *size, "--output", path)
    program = Path(export.__file__).with_name("docs") / "examples" / f"with_{engine}.py"
    shutil.copy(program, tmp_path / program.name)  # from where nothing of the project can be imported
    runtime = runtimes.load(path)
    prepare = transform(runtime.metadata)
    first = sorted(photographs.glob("*/*.png"))[:3]
    # Times 80 / 77, the shorter side would come out just below 80 px. An image smaller than 32 px is padded.
    Image.open(first[0]).resize((92, 77)).save(tmp_path / "77.png")
    Image.open(first[0]).resize((29, 35)).save(tmp_path / "29.png")
    for photograph in (*first, tmp_path / "77.png", tmp_path / "29.png"):
        command = [sys.executable, program.name, path, photograph]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        name, chance = done.stdout.removesuffix(" %\n").rsplit(": ", 1)
        expected = networks.probabilities(runtime(prepare(read_image(photograph))[None]), runtime.metadata.loss)
        assert name == runtime.metadata.classes[expected.argmax()]
        assert float(chance) == pytest.approx(100 * expected.max().item(), abs=0.05)


def test_names_in_the_files(checkpoint, tmp_path):
    onnx = pytest.importorskip("onnx")
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    run(checkpoint, "--engine", "onnxruntime", "--output", tmp_path / "n.onnx")
    graph = onnx.load(tmp_path / "n.onnx").graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {"images": ["batch", 3, 32, 32], "logits": ["batch", 10]}
    run(checkpoint, "--engine", "openvino", "--output", tmp_path / "n.xml")
    model = openvino.Core().read_model(tmp_path / "n.xml")
    assert ([port.names for port in model.inputs], [port.names for port in model.outputs]) == (
        [{"images"}],
        [{"logits"}],
    )


# -- what a checkpoint says of its images and classes


def test_other_normalization_and_crop_are_taken_from_the_run(recorded, tmp_path):
    network = timm.create_model("vanillanet_5", width_mult=1 / 64)
    args = recorded(data_set="IMNET", imagenet_default_mean_and_std=False, crop_pct=0.9, input_size=256)
    save_checkpoint({"model": network.state_dict(), "args": args}, tmp_path / "w.pth")
    found = networks.open(tmp_path / "w.pth", name="vanillanet_5").preprocessing
    assert (found.mean, found.std, found.input_size, found.crop_pct) == ((0.5,) * 3, (0.5,) * 3, 256, 0.9)

    def larger(args):
        save_checkpoint({"model": network.state_dict(), "args": args}, tmp_path / "w.pth")
        return networks.open(tmp_path / "w.pth", name="vanillanet_5").prepared(input_size=384).preprocessing

    assert larger({}).crop_pct == 0.875  # timm's, for any size
    assert larger(recorded(data_set="IMNET")).crop_pct == 1.0


@pytest.mark.parametrize(
    ("found", "count", "names"),
    [
        ({"classes": ["cat", "dog"]}, 2, ("cat", "dog")),
        ({"classes": ["n01440764", "n01443537"]}, 2, ("tench, Tinca tinca", "goldfish, Carassius auratus")),
        ({}, 1000, ("tench, Tinca tinca",)),
        ({"args": {"data_set": "FMNIST"}}, 10, ("T-shirt/top",)),
        ({"args": {"data_set": "image_folder"}}, 3, ("class 0", "class 1", "class 2")),
        ({"classes": ["cat", "dog"]}, 3, ("class 0", "class 1", "class 2")),
    ],
)
def test_class_names(found, count, names, tmp_path):
    network = timm.create_model("vanillanet_5", width_mult=1 / 64, num_classes=count)
    save_checkpoint({"model": network.state_dict(), **found}, tmp_path / "w.pth")
    labels = networks.open(f"vanillanet_5={tmp_path / 'w.pth'}").labels
    assert labels[: len(names)] == names
    assert len(labels) == count


def test_images_are_spread_over_the_folder(photographs, checkpoint):
    prepare = build_eval_transform(networks.open(checkpoint).preprocessing)
    few, all_of_them = (real_images(prepare, count, path=photographs, data_set="image_folder") for count in (4, 99))
    assert all_of_them.shape == (12, 3, 32, 32)
    assert torch.equal(few, all_of_them[::3])


# -- refusals


def test_a_stream_has_no_images_to_take(monkeypatch, tmp_path):
    stream = StreamDataset.__new__(StreamDataset)
    monkeypatch.setattr(datasets, "build_dataset", lambda *args, **kwargs: stream)
    with pytest.raises(ValueError, match="--data_set wds/ is a stream"):
        real_images(lambda image: image, 3, path=tmp_path, data_set="wds/")


@pytest.mark.parametrize("pickled", [False, True])
def test_code_in_a_checkpoint_is_not_run(hostile, tmp_path, capsys, pickled):
    path = hostile(pickled=pickled)
    assert "hostile.pth" in refused(capsys, path, "--to", "onnx", "--output", tmp_path / "network.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["hostile.pth"]


@pytest.mark.parametrize("pickled", [False, True])
def test_the_payload_would_work(hostile, tmp_path, pickled):
    """Or no test with such a file could fail."""
    path = hostile(pickled=pickled)
    if pickled:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("", "--engine"),
        ("--to onnx --int8", "--calib_data"),
        ("--to onnx --int8 --precision fp16", "exclude"),
        ("--to onnx --precision bf16", "fp32, fp16, int8"),
        ("--to onnx --output network.pt2", ".onnx"),
        ("--to onnx --batch_size 4", "--batch_size"),
        ("--to pt2 --int8_depthwise true", "--int8_depthwise"),
        ("--to onnx --int8 --calib_data DIR --int8_depthwise true", "ONNX has it always"),
        ("--to onnx --int8 --calib_data DIR --int8_depthwise false", "ONNX has it always"),
        ("--to safetensors --int8_depthwise false", "--int8_depthwise"),
        ("--to openvino --device cuda", "not on cuda"),
        ("--to onnx --calib_data no/folder", "no/folder"),
        ("--to onnx --random_weights true", "--random_weights"),
        ("--to onnx --calib_count 7", "--calib_count"),
        ("--to onnx --data_set FMNIST", "--data_set"),
        ("--to onnx --device gpu", "--device gpu"),
        ("--to onnx --input_size 16", "cannot take --input_size 16"),
        ("--to onnx --model nosuch", "nosuch"),
        ("--to onnx --model_key nosuch", "nosuch"),
        ("--to onnx --crop_pct 0.9", "--crop_pct"),
    ],
)
def test_bad_requests(checkpoint, tmp_path, capsys, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    assert named in refused(capsys, checkpoint, *shlex.split(arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["trained.pth"]


def test_a_network_that_diverged_is_not_written(randomized, tmp_path):
    """Its fused form has NaN for logits, which Python's `max` would pass over."""
    module = randomized(timm.create_model("vanillanet_6", **SMALL))
    module.cls2[0].weight.data.fill_(float("nan"))
    compare = functools.partial(largest_difference, batches=[torch.randn(2, 3, 64, 64)])
    with pytest.raises(ValueError, match="differ by nan, more than 1e-04; nothing written"):
        write_deployed(
            module, tmp_path / "d.pth", compare=compare, answers="logits", record={}, device=torch.device("cpu")
        )
    assert not (tmp_path / "d.pth").exists()


def test_a_network_before_its_time_is_not_fused(randomized, recorded, tmp_path, capsys):
    network = randomized(timm.create_model("vanillanet_6", **SMALL))
    save_checkpoint({"model": network.state_dict(), "act_learn": 0.5, "args": recorded()}, tmp_path / "mid.pth")
    assert "slope is 0.5" in refused(capsys, tmp_path / "mid.pth", "--to", "onnx")


def test_a_name_needs_weights_or_the_wish_for_none(capsys, monkeypatch):
    def no_weights(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(networks.timm, "create_model", no_weights)
    assert "--random_weights true" in refused(capsys, "vanillanet_5", "--to", "onnx")
    assert "vanilanet_5" in refused(capsys, "vanilanet_5", "--to", "onnx")


def test_a_missing_package_is_one_line(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    line = refused(capsys, checkpoint, "--to", "openvino", "--output", tmp_path / "network.xml")
    assert line.endswith("pip install openvino")


@pytest.mark.slow
@pytest.mark.timeout(900)  # the largest variants take minutes on two busy cores
@pytest.mark.parametrize("variant", models.vanillanet.VARIANTS)
def test_every_variant_in_full_width(tmp_path, variant, capsys):
    pytest.importorskip("onnxscript")
    run(variant, "--random_weights", "true", "--to", "onnx", "--output", tmp_path / "network.onnx")
    assert float(capsys.readouterr().out.split("relative: ")[1].split(";")[0]) < 1e-4
