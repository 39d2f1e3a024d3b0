"""What travels with a network through the commands: preprocessing, architecture, names of classes, loss."""

import json
import shlex
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config

import datasets
import export
import main
import networks
import predict
import runtimes
from records.checkpoints import load_checkpoint, save_checkpoint
from runs import EMBEDDED

CLASSES = ("bag", "boot", "coat", "shirt")
TIMM = "test_efficientnet_gn"  # a small one, which wants 0.5 for mean and std, 160 px and a crop of 0.95
CPU = shlex.split("--device cpu --num_workers 0 --data_set image_folder")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Ten colourful images of each class, to train on and to evaluate."""
    root = tmp_path_factory.mktemp("folders")
    images = datasets.read_idx(EMBEDDED / "t10k-images-idx3-ubyte.gz")
    labels = datasets.read_idx(EMBEDDED / "t10k-labels-idx1-ubyte.gz")
    for name, label in zip(CLASSES, (8, 9, 4, 6), strict=True):
        for place, index in enumerate(np.flatnonzero(labels == label)[:20]):
            folder = root / ("train" if place % 2 else "val") / name
            folder.mkdir(parents=True, exist_ok=True)
            gray = images[index]
            colours = np.stack([gray, gray // 2, 255 - gray], axis=-1)
            Image.fromarray(colours).resize((60 + place, 72)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model of timm whose logits depend on the image; the file is the state dict alone."""
    torch.manual_seed(0)
    model = timm.create_model(TIMM, num_classes=len(CLASSES))
    with torch.no_grad():
        model.classifier.weight.normal_(std=0.5)
    path = tmp_path_factory.mktemp("weights") / "timm.pth"
    torch.save(model.state_dict(), path)
    return path


def run(*arguments):
    main.main([*CPU, *map(str, arguments)])


def reported(capsys):
    """What the evaluation printed, the line of figures in it as a dict, and the log."""
    log = capsys.readouterr().err
    line = next(line for line in log.splitlines() if "top-1" in line)
    words = line[line.index("top-1") :].replace("on ", "").split()
    return dict(zip(words[0:-2:2], map(float, words[1:-2:2]), strict=True)) | {"images": int(words[-2])}, log


@torch.no_grad()
def validated(model, folder, *, order=None, **config):
    """Top-1 and loss as timm's validate.py finds them."""
    config = resolve_data_config(config, model=model)
    names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    dataset = create_dataset("", root=str(folder))
    loader = create_loader(
        dataset, batch_size=7, use_prefetcher=False, num_workers=0, **{name: config[name] for name in names}
    )
    batches = [(model.eval()(images), targets) for images, targets in loader]
    logits, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    targets = targets if order is None else torch.tensor(order)[targets]
    return 100 * (logits.argmax(1) == targets).double().mean().item(), F.cross_entropy(logits, targets).item()


def loaded(path, **arguments):
    model = timm.create_model(TIMM, num_classes=len(CLASSES), **arguments)
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state.get("model", state))
    return model


# -- preprocessing


def test_a_model_of_timm_is_evaluated_as_timm_does(folders, weights, capsys):
    run("--eval", "--model", TIMM, "--finetune", weights, "--data_path", folders)
    found, _ = reported(capsys)
    top1, loss = validated(loaded(weights), folders / "val")
    assert (found["top-1"], found["loss"]) == (pytest.approx(top1, abs=1e-3), pytest.approx(loss, abs=2e-4))
    # A flag wins.
    imagenet = networks.transforms.mean_and_std(True)
    flags = ["--imagenet_default_mean_and_std", "true", "--input_size", "96", "--crop_pct", "0.9"]
    run("--eval", "--model", TIMM, "--finetune", weights, "--data_path", folders, *flags)
    found, _ = reported(capsys)
    top1, other = validated(
        loaded(weights), folders / "val", mean=imagenet[0], std=imagenet[1], img_size=96, crop_pct=0.9
    )
    assert (found["top-1"], found["loss"]) == (pytest.approx(top1, abs=1e-3), pytest.approx(other, abs=2e-4))
    assert abs(other - loss) > 0.01


TRAIN = [
    "--epochs",
    "1",
    "--warmup_epochs",
    "0",
    "--batch_size",
    "20",
    "--mixup",
    "0",
    "--cutmix",
    "0",
    "--test_freq",
    "1",
]


@pytest.fixture(scope="module")
def trained(folders, weights, tmp_path_factory):
    """Runs of a model of timm: one as its configuration has it, but for the size, and one as flags have it."""
    root = tmp_path_factory.mktemp("trained")
    common = [*TRAIN, "--data_path", folders, "--finetune", weights, "--model", TIMM, "--lr", "1e-5", "--bce_loss"]
    run(*common, "--input_size", "64", "--output_dir", root / "own")
    flags = ["--imagenet_default_mean_and_std", "true", "--crop_pct", "0.7"]
    run(*common, "--input_size", "64", *flags, "--output_dir", root / "flags")
    return root


def test_a_run_records_how_it_prepares_images(trained):
    own = load_checkpoint(trained / "own" / "checkpoint-last.pth")["preprocessing"]
    assert own["mean"] == own["std"] == [0.5] * 3
    assert (own["input_size"], own["crop_pct"], own["interpolation"]) == (64, 0.95, "bicubic")
    flags = load_checkpoint(trained / "flags" / "checkpoint-last.pth")["preprocessing"]
    assert (tuple(flags["mean"]), flags["crop_pct"]) == (networks.transforms.IMAGENET_DEFAULT_MEAN, 0.7)


@pytest.mark.parametrize("name", ["own", "flags"])
def test_a_checkpoint_is_used_as_it_was_trained(trained, folders, name, capsys):
    path = trained / name / "checkpoint-last.pth"
    run("--eval", "--data_path", folders, "--finetune", path)  # not even the model is named
    found, _ = reported(capsys)
    record = load_checkpoint(path)["preprocessing"]
    config = {key: record[key] for key in ("mean", "std", "crop_pct")}
    top1, loss = validated(loaded(path), folders / "val", img_size=64, **config)
    assert (found["top-1"], found["loss"]) == (pytest.approx(top1, abs=1e-3), pytest.approx(loss, abs=2e-4))
    metadata = {key: (tuple(x) if isinstance(x, list) else x) for key, x in record.items()}
    image = next((folders / "val" / "bag").iterdir())
    predict.main([str(path), str(image)])
    printed = capsys.readouterr().out
    network = networks.open(path)
    assert vars(network.preprocessing) == metadata
    prepared = networks.transforms.build_eval_transform(network.preprocessing)(Image.open(image).convert("RGB"))
    with torch.no_grad():
        chances = loaded(path).eval()(prepared[None])[0].sigmoid()  # --bce_loss
    shown = {line.split("%  ")[1]: float(line.split("%")[0]) for line in printed.splitlines() if "%" in line}
    assert shown == pytest.approx({name: 100 * x for name, x in zip(CLASSES, chances.tolist(), strict=True)}, abs=0.06)
    assert sum(shown.values()) != pytest.approx(100, abs=1)


def test_a_typed_flag_overrides_the_file_and_the_log_says_so(trained, folders, capsys):
    path = trained / "own" / "checkpoint-last.pth"
    run("--eval", "--data_path", folders, "--finetune", path, "--input_size", "96")
    found, log = reported(capsys)
    _, loss = validated(loaded(path), folders / "val", img_size=96)
    assert found["loss"] == pytest.approx(loss, abs=2e-4)
    assert f"--input_size 96 instead of what {path} records, {{'input_size': 64}}" in log


def test_a_recipe_does_not_override_the_file(trained, folders, tmp_path, capsys):
    (tmp_path / "r.args").write_text("--input_size 96 --model vanillanet_6 --width_mult 0.5 --crop_pct 1\n")
    path = trained / "own" / "checkpoint-last.pth"
    run(f"@{tmp_path / 'r.args'}", "--eval", "--data_path", folders, "--finetune", path)
    found, _ = reported(capsys)
    _, loss = validated(loaded(path), folders / "val", img_size=64)
    assert found["loss"] == pytest.approx(loss, abs=2e-4)


@pytest.fixture(scope="module")
def vanilla(folders, tmp_path_factory):
    """A VanillaNet-6 of another width and n, trained at 48 px."""
    folder = tmp_path_factory.mktemp("vanilla")
    flags = "--model vanillanet_6 --width_mult 0.0625 --act_num 2 --input_size 48 --decay_epochs 0 --model_ema true"
    run(*TRAIN, *shlex.split(flags), "--data_path", folders, "--output_dir", folder)
    return folder / "checkpoint-last.pth"


def test_architecture_and_size_come_from_the_file(vanilla, folders, tmp_path, capsys):
    flags = ["--model", "vanillanet_6", "--width_mult", "0.0625", "--act_num", "2", "--input_size", "48"]
    run("--eval", "--data_path", folders, "--finetune", vanilla, *flags)
    wanted, _ = reported(capsys)
    run("--eval", "--data_path", folders, "--finetune", vanilla)
    found, log = reported(capsys)
    assert found == wanted
    assert "the weights are those of model; it holds model_ema, too" in log  # the default of the published script
    predict.main([str(vanilla), str(next((folders / "val" / "bag").iterdir()))])  # takes the average, and says so
    assert "the weights are those of model_ema; it holds model, too" in capsys.readouterr().err
    run("--switch_to_deploy", tmp_path / "d.pth", "--data_path", folders, "--finetune", vanilla)
    assert "deploy form of model" in capsys.readouterr().out
    run("--eval", "--data_path", folders, "--finetune", tmp_path / "d.pth")  # --deploy is in the file, too
    assert reported(capsys)[0] == pytest.approx(wanted, abs=2e-3)
    run(*TRAIN, "--data_path", folders, "--finetune", vanilla, "--output_dir", tmp_path / "tuned")
    tuned = load_checkpoint(tmp_path / "tuned" / "checkpoint-last.pth")
    assert (tuned["args"]["model"], tuned["args"]["input_size"]) == ("vanillanet_6", 48)
    assert tuned["model"]["stem1.0.weight"].shape == load_checkpoint(vanilla)["model"]["stem1.0.weight"].shape
    with pytest.raises(SystemExit):
        run("--eval", "--data_path", folders, "--finetune", vanilla, "--act_num", "3")
    assert "another shape" in capsys.readouterr().err


# -- classes


@pytest.fixture(scope="module")
def other_folders(folders, tmp_path_factory):
    """Validation data of a part of the classes, and of classes under names that sort otherwise."""
    root = tmp_path_factory.mktemp("others")
    for name in ("coat", "boot"):
        shutil.copytree(folders / "val" / name, root / "part" / name)
    for name in CLASSES:
        shutil.copytree(folders / "val" / name, root / "renamed" / f"{9 - len(name)}-{name}")
    return root


def test_a_part_of_the_classes_is_evaluated_over_all_logits(trained, other_folders, capsys):
    path = trained / "own" / "checkpoint-last.pth"
    run("--eval", "--eval_data_path", other_folders / "part", "--finetune", path)
    found, log = reported(capsys)
    order = [CLASSES.index("boot"), CLASSES.index("coat")]
    top1, loss = validated(loaded(path), other_folders / "part", order=order, img_size=64)
    assert (found["top-1"], found["loss"]) == (pytest.approx(top1, abs=1e-3), pytest.approx(loss, abs=2e-4))
    assert found["images"] == 20
    assert "lack 2 of the 4 classes" in log


def test_another_order_of_the_classes(trained, folders, tmp_path, capsys):
    path = trained / "own" / "checkpoint-last.pth"
    state = load_checkpoint(path)
    order = [2, 0, 3, 1]
    for name in ("classifier.weight", "classifier.bias"):
        state["model"][name] = state["model"][name][order]
    state["classes"] = [CLASSES[index] for index in order]
    save_checkpoint(state, tmp_path / "w.pth")
    run("--eval", "--data_path", folders, "--finetune", path)
    wanted, _ = reported(capsys)
    run("--eval", "--data_path", folders, "--finetune", tmp_path / "w.pth")
    found, log = reported(capsys)
    assert found == wanted
    assert "in another order: they are matched by name" in log


@pytest.mark.parametrize("command", ["--eval", "--switch_to_deploy=d.pth", "--eval --engine=eager"])
def test_unknown_classes_are_an_error_that_lists_them(vanilla, other_folders, command, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*command.split(), "--eval_data_path", other_folders / "renamed", "--finetune", vanilla)
    assert ended.value.code == 2
    assert "classes that are unknown to" in (error := capsys.readouterr().err)
    assert "4-shirt" in error


def test_fine_tuning_onto_as_many_other_classes(vanilla, other_folders, tmp_path, capsys):
    data = tmp_path / "data"
    for split in ("train", "val"):
        shutil.copytree(other_folders / "renamed", data / split)
    before = load_checkpoint(vanilla)["model"]
    flags = [*TRAIN, "--data_path", data, "--finetune", vanilla, "--lr", "1e-9", "--weight_decay", "0"]

    def tuned(name, *arguments):
        run(*flags, "--output_dir", tmp_path / name, *arguments)
        after = load_checkpoint(tmp_path / name / "checkpoint-last.pth")
        assert after["classes"] == sorted(folder.name for folder in (data / "train").iterdir())
        assert torch.allclose(after["model"]["stem1.0.weight"], before["stem1.0.weight"], atol=1e-6)
        return torch.allclose(after["model"]["cls2.0.weight"], before["cls2.0.weight"], atol=1e-6)

    assert not tuned("new")
    assert "the classifier is new, since the data's 4 classes are not its own but others" in capsys.readouterr().err
    assert tuned("kept", "--keep_classifier", "true")


def test_resuming_on_other_classes_is_an_error(vanilla, other_folders, tmp_path, capsys):
    data = tmp_path / "data"
    for split in ("train", "val"):
        shutil.copytree(other_folders / "renamed", data / split)
    flags = "--model vanillanet_6 --width_mult 0.0625 --act_num 2 --input_size 48 --decay_epochs 0 --model_ema true"
    with pytest.raises(SystemExit):
        run(
            *TRAIN, *shlex.split(flags), "--data_path", data, "--resume", vanilla, "--epochs", "2", "--resume_new_sched"
        )
    assert "other classes" in capsys.readouterr().err


# -- exported files


def test_an_exported_file_knows_it_all(trained, folders, other_folders, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    path, file = trained / "own" / "checkpoint-last.pth", tmp_path / "network.onnx"
    export.main([str(path), "--to", "onnx", "--output", str(file)])
    metadata = runtimes.load(file).metadata
    assert (metadata.interpolation, metadata.loss) == ("bicubic", "binary_cross_entropy")
    assert (metadata.mean, metadata.classes) == ((0.5,) * 3, CLASSES)
    image = str(next((folders / "val" / "bag").iterdir()))
    capsys.readouterr()
    predict.main([str(path), image])
    wanted = capsys.readouterr().out
    predict.main([str(file), image])
    assert capsys.readouterr().out == wanted
    run("--eval", "--engine", "onnxruntime", "--eval_data_path", other_folders / "part", "--finetune", file)
    found, _ = reported(capsys)
    order = [CLASSES.index("boot"), CLASSES.index("coat")]
    _, loss = validated(loaded(path), other_folders / "part", order=order, img_size=64)
    assert found["loss"] == pytest.approx(loss, abs=5e-4)
    with pytest.raises(SystemExit):
        run("--eval", "--engine", "onnxruntime", "--eval_data_path", other_folders / "renamed", "--finetune", file)
    assert "classes that are unknown to" in capsys.readouterr().err


def test_metadata_of_older_files_can_be_read():
    old = {
        "model": "m", "classes": ["a"], "mean": [0.5] * 3, "std": [0.5] * 3, "input_size": 32, "crop_pct": 0.9,
        "checkpoint": "", "precision": "fp32",
    }  # fmt: skip
    found = runtimes.Metadata.from_strings({name: json.dumps(value) for name, value in old.items()}, "f.onnx")
    assert (found.interpolation, found.loss) == ("bicubic", "cross_entropy")
