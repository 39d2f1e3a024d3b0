"""predict.py on real photographs, in every format; main.py --runtime: the accuracy of what is deployed."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.cbook
import pytest
import timm
import torch
from PIL import Image

import export
import main
import predict
import runtimes
from deployment import predicting
from deployment.fusing import metadata_of, open_deployed
from deployment.images import transform
from loading.images import decode_image
from processors import openvino_has_bfloat16
from records.checkpoints import save_checkpoint
from runtimes.engines import aotinductor
from runtimes.running import Runtime

ROOT = Path(main.__file__).parent


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two real photographs that come with matplotlib, one of them grey, in a folder and one below it."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "inner").mkdir()
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        Image.open(file).save(folder / "hopper.jpg")
    with matplotlib.cbook.get_sample_data("Minduka_Present_Blue_Pack.png") as file:
        Image.open(file).save(folder / "inner" / "pack.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(recorded, tmp_path_factory):
    """A VanillaNet-6 whose logits depend on the image, as a run on Fashion-MNIST would leave it, at 64 px."""
    torch.manual_seed(0)
    network = timm.create_model("vanillanet_6", width_mult=1 / 16, num_classes=10)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.normal_(std=(2 / module.weight[0].numel()) ** 0.5)
    path = tmp_path_factory.mktemp("checkpoint") / "trained.pth"
    save_checkpoint({"model": network.state_dict(), "act_learn": 1.0, "args": recorded(input_size=64)}, path)
    return path


def run(capsys, *arguments):
    """What is printed: the images, and of each the (class, percent) pairs."""
    predict.main([str(argument) for argument in arguments])
    found: dict[str, list[tuple[str, float]]] = {}
    for line in capsys.readouterr().out.splitlines():
        if match := re.fullmatch(r" +([\d.]+) %  (.+)", line):
            found[list(found)[-1]].append((match.group(2), float(match.group(1))))
        else:
            found[line] = []
    return found


def test_photographs_by_a_checkpoint(checkpoint, photographs, capsys):
    found = run(capsys, checkpoint, photographs)
    assert list(found) == [str(photographs / "hopper.jpg"), str(photographs / "inner" / "pack.png")]
    opened = open_deployed(checkpoint)
    network, metadata = opened.module, metadata_of(opened)
    assert (metadata.input_size, metadata.crop_pct) == (64, 0.875)
    for path, pairs in found.items():
        image = transform(metadata)(decode_image(path))
        with torch.no_grad():
            chances = network(image[None])[0].softmax(0)
        best = chances.topk(5)
        assert [name for name, _ in pairs] == [metadata.classes[index] for index in best.indices.tolist()]
        assert [percent for _, percent in pairs] == pytest.approx((100 * best.values).tolist(), abs=0.06)


@pytest.fixture(scope="module")
def package(checkpoint, tmp_path_factory):
    """The checkpoint as an AOTInductor package for two images a call."""
    path = tmp_path_factory.mktemp("package") / "network.pt2"
    export.main([str(checkpoint), "--to", "pt2", "--precision", "bf16", "--batch_size", "2", "--output", str(path)])
    return path


@pytest.mark.parametrize(("to", "precision"), [("onnx", "fp32"), ("openvino", "bf16"), ("pt2", "bf16")])
def test_a_file_says_the_same(checkpoint, photographs, request, tmp_path, capsys, to, precision):
    if to == "pt2":
        path = request.getfixturevalue("package")
    else:
        pytest.importorskip({"onnx": "onnxscript"}.get(to, to))
        path = tmp_path / f"network{runtimes.find(runtimes.FORMATS[to]).suffix}"
        arguments = [str(checkpoint), "--to", to, "--precision", precision, "--output", str(path)]
        if (to, precision) == ("openvino", "bf16") and not openvino_has_bfloat16():
            with pytest.raises(SystemExit):
                export.main(arguments)
            assert "no bfloat16" in capsys.readouterr().err
            return
        export.main(arguments)
    capsys.readouterr()
    expected, found = run(capsys, checkpoint, photographs, "--top", 3), run(capsys, path, photographs, "--top", 3)
    assert list(found) == list(expected)
    for image, pairs in found.items():
        assert len(pairs) == 3
        assert pairs[0][0] == expected[image][0][0]
        assert dict(pairs)[pairs[0][0]] == pytest.approx(expected[image][0][1], abs=0.1 if precision == "fp32" else 3)


def test_another_engine_and_precision(checkpoint, photographs, capsys):
    pytest.importorskip("nncf")
    plain = run(capsys, checkpoint, photographs / "hopper.jpg")
    int8 = run(
        capsys, checkpoint, photographs / "hopper.jpg", "--engine", "openvino", "--precision", "int8",
        "--calib_data", photographs,
    )  # fmt: skip
    (expected,), (found,) = plain.values(), int8.values()
    assert found[0][0] == expected[0][0]
    assert found != expected


def test_imagenet_names_by_a_models_name(photographs, capsys):
    (found,) = run(capsys, "mobilenetv3_small_050", photographs / "hopper.jpg", "--random_weights", "true").values()
    assert len(found) == 5
    info = timm.data.ImageNetInfo()
    assert {name for name, _ in found} <= {info.index_to_description(index) for index in range(1000)}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["MODEL", "no/such.jpg"], "no/such.jpg does not exist"),
        (["MODEL", "MODEL"], "cannot read the image"),
        (["MODEL", "PHOTO", "--precision", "int8"], "--calib_data"),
        (["MODEL", "PHOTO", "--calib_data", "DIR"], "--precision int8"),
        (["MODEL", "PHOTO", "--calib_count", "7"], "--precision int8"),
        (["MODEL", "PHOTO", "--topk", "11"], "--topk 11 is more than the 10 classes of"),
        (["MODEL", "PHOTO", "--device", "gpu"], "--device gpu"),
        (["MODEL", "PHOTO", "--engine", "tensorrt"], "not on cpu"),
        (
            [
                "MODEL",
                "PHOTO",
                "--engine",
                "onnxruntime",
                "--precision",
                "int8",
                "--calib_data",
                "DIR",
                "--int8_depthwise",
                "false",
            ],
            "--int8_depthwise has no effect here; it is for --engine compile",
        ),
        (["gone.pth", "PHOTO"], "gone.pth does not exist"),
        (["gone.pt2", "PHOTO"], "gone.pt2 does not exist"),
        (["gone.pt2", "PHOTO", "--input_size", "64"], "--input_size has no effect"),
        (["nosuchnet", "PHOTO"], "nosuchnet"),
    ],
)
def test_bad_requests(checkpoint, photographs, capsys, arguments, named):
    stands = {"MODEL": str(checkpoint), "PHOTO": str(photographs / "hopper.jpg"), "DIR": str(photographs)}
    with pytest.raises(SystemExit) as ended:
        predict.main([stands.get(argument, argument) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert len(lines) == 1
    assert named in lines[0]


def test_code_in_a_checkpoint_is_not_run(hostile, photographs, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        predict.main([str(hostile()), str(photographs)])
    assert ended.value.code == 2
    assert "hostile.pth" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.pth"]


ANSWER = """
import sys, torch
import runtimes
for count in (1, 2, 5):
    assert runtimes.load(sys.argv[1])(torch.zeros(count, 3, 64, 64)).shape == (count, 10)
print([name for name in ("timm", "torchvision", "sympy", "torch._inductor", "torch._dynamo") if name in sys.modules])
"""


def test_a_package_answers_without_what_made_it(package):
    """Without a compiler to be found, and without the second that importing inductor takes."""
    environment = {**os.environ, "PATH": "", "CXX": "no-compiler"}
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, package], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_package_for_another_processor_is_refused(package, photographs, capsys, monkeypatch):
    here = aotinductor.instructions()
    for lacking in ("NEON", *([here.rpartition(" ")[0]] if " " in here else [])):
        monkeypatch.setattr(aotinductor, "instructions", lambda lacking=lacking: lacking)
        with pytest.raises(SystemExit) as ended:
            predict.main([str(package), str(photographs)])
        assert ended.value.code == 2
        assert f"was compiled for {here}, this processor has {lacking}: export it here" in capsys.readouterr().err
    monkeypatch.setattr(aotinductor, "instructions", lambda: f"{here} MORE")
    predict.main([str(package), str(photographs)])


# -- main.py --runtime


def evaluate(capsys, data, *arguments):
    main.main(
        ["--model", "vanillanet_6", "--width_mult", str(1 / 16), "--input_size", "64", "--data_set", "FMNIST",
         "--device", "cpu", "--num_workers", "0", "--batch_size", "16", "--eval", "true", "--data_path", str(data),
         *map(str, arguments)]
    )  # fmt: skip
    line = next(line for line in capsys.readouterr().err.splitlines() if "top-1" in line)
    return {name: float(value) for name, value in re.findall(r"(top-1|top-5|loss|on) ([\d.]+)", line)}


@pytest.mark.parametrize(("engine", "precision"), [("onnxruntime", "fp32"), ("openvino", "int8"), ("eager", "bf16")])
def test_the_accuracy_of_what_is_deployed(checkpoint, tiny_fmnist, capsys, engine, precision):
    pytest.importorskip({"onnxruntime": "onnxscript", "openvino": "nncf"}.get(engine, "torch"))
    expected = evaluate(capsys, tiny_fmnist, "--finetune", checkpoint)
    found = evaluate(capsys, tiny_fmnist, "--finetune", checkpoint, "--runtime", engine, "--precision", precision)
    assert found["on"] == expected["on"] == 40
    tolerance = {"fp32": 2e-4, "bf16": 5e-2, "int8": 0.3}[precision]
    assert found["loss"] == pytest.approx(expected["loss"], abs=tolerance)
    assert (found["loss"] == expected["loss"]) == (precision == "fp32")


def test_the_accuracy_of_a_file(checkpoint, tiny_fmnist, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    path = tmp_path / "network.onnx"
    export.main([str(checkpoint), "--to", "onnx", "--output", str(path)])
    expected = evaluate(capsys, tiny_fmnist, "--finetune", checkpoint)
    found = evaluate(capsys, tiny_fmnist, "--finetune", path, "--runtime", "onnxruntime")
    assert found["loss"] == pytest.approx(expected["loss"], abs=2e-4)
    for extra, named in (
        (["--runtime", "openvino"], "file of onnxruntime"),
        (["--runtime", "onnxruntime", "--input_size", "32"], "--input_size 32"),
        (["--runtime", "onnxruntime", "--model", "vanillanet_7"], "--model vanillanet_7"),
    ):
        with pytest.raises(SystemExit) as ended:
            evaluate(capsys, tiny_fmnist, "--finetune", path, *extra)
        assert ended.value.code == 2
        assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--runtime", "openvino", "--eval", "false"], "--eval true"),
        (["--precision", "bf16"], "--engine"),
        (["--runtime", "openvino", "--precision", "fp16"], "fp32, bf16, int8"),
        (["--runtime", "eager", "--compile", "true"], "--compile"),
    ],
)
def test_bad_combinations(checkpoint, tiny_fmnist, capsys, arguments, named):
    with pytest.raises(SystemExit) as ended:
        evaluate(capsys, tiny_fmnist, "--finetune", checkpoint, *arguments)
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


# -- accuracy, with a trained network


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_low_precision_keeps_the_accuracy(tmp_path, capsys):
    """The demo's network, shortened to half its epochs, on 2,000 test images; a point is twenty of them."""
    recipe = [f"@{ROOT}/recipes/demo.args", "--data_path", str(ROOT / "data" / "fashion-mnist")]
    main.main(
        [*recipe, "--epochs", "10", "--decay_epochs", "6", "--output_dir", str(tmp_path), "--test_freq", "9",
         "--num_workers", "0"]
    )  # fmt: skip
    capsys.readouterr()
    weights = ["--eval", "true", "--finetune", str(tmp_path / "checkpoint-last.pth"), "--num_workers", "0"]

    def accuracy(*arguments):
        main.main([*recipe, *weights, *arguments])
        return float(re.search(r"top-1 ([\d.]+)", capsys.readouterr().err).group(1))

    plain = accuracy()
    assert plain > 80
    for engine in ("openvino", "onnxruntime", "aotinductor"):
        for precision, loss in (("bf16", 0.5), ("int8", 1.0)):
            if precision in runtimes.find(engine).on_cpu:
                assert accuracy("--runtime", engine, "--precision", precision) > plain - loss


# -- many files


@pytest.fixture
def folder(photographs, tmp_path):
    """Three photographs, a broken file between them, and one whose name is no UTF-8."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.jpg", "c.jpg", os.fsdecode(b"d\xff.jpg")):
        shutil.copy(photographs / "hopper.jpg", folder / name)
    (folder / "b.jpg").write_bytes(b"no image")
    return folder


def test_a_broken_file_does_not_stop_the_others(checkpoint, folder, capsys):
    with pytest.raises(SystemExit) as ended:
        predict.main([str(checkpoint), str(folder)])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    names = [line for line in printed.out.splitlines() if not line.startswith("  ")]
    assert names == [f"{folder}/a.jpg", f"{folder}/c.jpg", f"{folder}/d\\xff.jpg"]
    assert [line for line in printed.err.splitlines() if "b.jpg" in line] == [
        f"predict.py: cannot read the image {folder}/b.jpg: not an image, or of an unknown format"
    ]


def test_a_folder_of_one_broken_file(checkpoint, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("no image")
    for named, code in ((tmp_path / "photos", 1), (tmp_path / "photos" / "a.jpg", 2)):
        with pytest.raises(SystemExit) as ended:
            predict.main([str(checkpoint), str(named)])
        assert ended.value.code == code
        assert f"cannot read the image {tmp_path}/photos/a.jpg" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_said_before_the_work(
    checkpoint, photographs, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(predict, "open_runtime", lambda args: pytest.fail("the network was opened"))
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "new.csv", tmp_path / "folder.csv"):
        (tmp_path / "folder.csv").mkdir(exist_ok=True)
        with pytest.raises(SystemExit) as ended:
            predict.main([str(checkpoint), str(photographs), "--output", str(output)])
        assert ended.value.code == 2
        assert f"cannot write {output}" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_standard_output_that_is_strict(checkpoint, folder, encoding, monkeypatch):
    (folder / "b.jpg").unlink()
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors="strict"))
    predict.main([str(checkpoint), str(folder)])
    assert f"{folder}/d\\xff.jpg".encode() in written.getvalue().splitlines()


def test_a_reader_that_has_gone(checkpoint, photographs):
    many = " ".join([str(photographs / "hopper.jpg")] * 4)
    command = f"{sys.executable} predict.py {checkpoint} {many} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == f"{photographs / 'hopper.jpg'}\n"
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE


def test_batches_change_no_number(checkpoint, photographs, capsys):
    one = run(capsys, checkpoint, photographs)
    assert run(capsys, checkpoint, photographs, "--batch_size", 2) == one
    few = run(capsys, checkpoint, photographs, "--batch_size", 3, "--topk", 2)
    assert few == {path: pairs[:2] for path, pairs in one.items()}


def test_a_call_has_the_images_of_a_batch(checkpoint, photographs, tmp_path):
    sizes = []

    def logits(images):
        sizes.append(len(images))
        return torch.zeros(len(images), 10)

    runtime = Runtime(runtimes.Target("eager"), logits, metadata=metadata_of(open_deployed(checkpoint)))
    paths = [str(shutil.copy(photographs / "hopper.jpg", tmp_path / f"{place}.jpg")) for place in range(5)]
    assert len(list(predicting.predict(runtime, paths, top=1, batch_size=2))) == 5
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_results_as_a_file(checkpoint, photographs, tmp_path, capsys, suffix):
    wanted = run(capsys, checkpoint, photographs, "--topk", 3)
    target = tmp_path / "new" / f"found{suffix}"
    predict.main([str(checkpoint), str(photographs), "--topk", "3", "--output", str(target)])
    assert capsys.readouterr().out == f"{target}: 2 images\n"
    with target.open(newline="") as file:
        rows = json.load(file) if suffix == ".json" else list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "rank", "class", "index", "chance"]
    classes = metadata_of(open_deployed(checkpoint)).classes
    assert [classes[int(row["index"])] for row in rows] == [row["class"] for row in rows]
    assert [int(row["rank"]) for row in rows] == [1, 2, 3, 1, 2, 3]
    found = [(row["class"], pytest.approx(100 * float(row["chance"]), abs=0.051)) for row in rows]
    assert [pair for pairs in wanted.values() for pair in pairs] == found
    with pytest.raises(SystemExit):
        predict.main([str(checkpoint), str(photographs), "--output", "found.txt"])
    assert "must end in .csv or .json" in capsys.readouterr().err
