"""Whole runs through main.py, on a few real images: resume bit by bit, evaluate, fine-tune, deploy, bad input."""

import argparse
import csv
import json
import os
import shlex
import shutil
import signal
import sys
import types

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf
from torch._dynamo.utils import counters
from torchvision.datasets import FashionMNIST

import datasets
import harness
import main
import models
import networks
import training
import utils
from engine import Progress
from loading import loaders, transforms
from loading.transforms import Preprocessing, build_eval_transform
from optim_factory import cosine_schedule
from options import parse_args
from records import logs
from records.checkpoints import load_checkpoint, load_weights, save_checkpoint
from runs import BASE, EMBEDDED, ROOT, assert_same_run, rows, torchrun


def run(data, *arguments, base=BASE):
    main.main([*base, "--data_path", str(data), *map(str, arguments)])


@pytest.fixture(scope="session")
def straight(tiny_fmnist, tmp_path_factory):
    """An undisturbed run that also saved in the middle of its epochs."""
    folder = tmp_path_factory.mktemp("straight")
    run(tiny_fmnist, "--output_dir", folder, "--save_ckpt_steps", 3)
    return folder


# -- what a run leaves behind


def test_outputs(straight):
    summary, lines = rows(straight)
    assert [row["epoch"] for row in summary] == ["0", "1", "2", "3"]
    assert [float(row["act_learn"]) for row in summary] == [0, 0.2, 0.4, 0.6]
    # 60 images in batches of 4 are 15, the windows of 2 make 8 steps; logged every second one.
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32]
    assert {"ema_acc1", "ema_0.5_acc1", "test_acc1", "test_loss", "lr", "weight_decay"} <= set(summary[0])
    # After all 32 steps the schedules are at their ends.
    assert float(summary[-1]["lr"]) == pytest.approx(1e-6)
    assert float(summary[-1]["weight_decay"]) == pytest.approx(0.2)
    with Image.open(straight / "curves.png") as image:
        assert image.size == (1000, 600)
    assert "vanillanet_6" in (straight / "args.yaml").read_text()
    assert list((straight / "tensorboard").iterdir())
    state = load_checkpoint(straight / "checkpoint-last.pth")
    assert {"model", "model_ema", "model_ema_0.5", "optimizer", "scaler", "ranks", "args"} <= set(state)
    assert (state["epoch"], state["step"], state["updates"], state["act_learn"]) == (3, 0, 32, 0.6)
    assert type(state["args"]) is dict
    assert not list(straight.glob("*.tmp"))
    # Each average has its own best checkpoint, of the epoch in which it was at its best.
    for name, column in {"best": "test_acc1", "best-ema": "ema_acc1", "best-ema-0.5": "ema_0.5_acc1"}.items():
        scores = [float(row[column]) for row in summary]
        best = load_checkpoint(straight / f"checkpoint-{name}.pth")
        assert (best["epoch"], best["best"][name]) == (scores.index(max(scores)), max(scores))


def test_a_learning_rate_of_each_step(straight):
    """Cosine after one epoch of warm-up, as a function of the steps taken."""
    _, lines = rows(straight)
    expected = {
        line["step"]: cosine_schedule(line["step"] - 1, 32, base=1e-2, final=1e-6, warmup_steps=8) for line in lines
    }
    assert {line["step"]: line["lr"] for line in lines} == expected


# -- resume


@pytest.mark.parametrize("launcher", ["forked", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_ranks_train_and_evaluate(server, tiny_fmnist, tmp_path, launcher):
    """With gloo: the evaluation of two ranks equals that of one."""
    arguments = ["--output_dir", tmp_path, "--epochs", 3]
    if launcher == "torchrun":
        done = torchrun(2, tiny_fmnist, *arguments)
        assert done.returncode == 0, done.stderr
    else:
        server.finish(2, *harness.flags(tiny_fmnist, None, *arguments, base=BASE))
    state = load_checkpoint(tmp_path / "checkpoint-last.pth")
    assert len(state["ranks"]) == 2
    assert state["updates"] == 3 * 4  # 60 images, 2 x 4 a batch, 2 batches a step
    # What rank 0 wrote after a distributed evaluation is what one process finds in the file.
    summary, _ = rows(tmp_path)
    model = models.VanillaNet(**vanillanet_6_tiny()).eval()
    load_weights(model, state["model"])
    model.change_act(state["act_learn"])
    result = evaluate_on(tiny_fmnist, model)
    assert float(summary[-1]["test_acc1"]) == result.acc1
    assert float(summary[-1]["test_loss"]) == pytest.approx(result.loss, abs=1e-6)


def vanillanet_6_tiny(classes=10):
    spec = models.vanillanet.VARIANTS["vanillanet_6"]
    return {**spec, "width_mult": 1 / 64, "num_classes": classes}


def evaluate_on(data, model):
    args = main.parse_args([*BASE, "--data_path", str(data)])
    world = utils.World(0, 1, torch.device("cpu"))
    transform = build_eval_transform(main.settle(args, None, train=True))
    dataset = main.build_dataset(args, world, train=False, transform=transform)
    loader, _ = main.build_eval_loader(args, dataset, world, classes=dataset.classes, num_classes=10, of="the data")
    return main.evaluate(model, loader, precision=training.build_precision(args, world.device))


def test_resume_under_other_schedules_is_asked_for(tiny_fmnist, straight, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(tiny_fmnist, "--output_dir", tmp_path, "--resume", straight / "checkpoint-0.pth", "--epochs", 9)
    assert ended.value.code == 2
    assert "--resume_new_sched" in capsys.readouterr().err
    run(
        tiny_fmnist, "--output_dir", tmp_path, "--resume", straight / "checkpoint-2.pth", "--epochs", 5,
        "--resume_new_sched",
    )  # fmt: skip
    assert load_checkpoint(tmp_path / "checkpoint-last.pth")["epoch"] == 4


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--output_dir", "own"], "checkpoint-3.pth"),  # newer ones would be kept, and gone on with, in their place
        (["--resume_new_sched", "--epochs", "2"], "raise --epochs"),
        (["--resume_new_sched", "--opt", "sgd"], "--finetune"),
        (["--opt_betas", "0.5", "0.6"], "--resume_new_sched"),
        (["--layer_decay", "0.5"], "--resume_new_sched"),
        (["--start_epoch", "1"], "leave it out"),
    ],
)
def test_what_a_resumed_run_cannot_do_is_refused(tiny_fmnist, straight, tmp_path, capsys, flags, named):
    before = {path.name: path.stat().st_mtime_ns for path in straight.glob("*.pth")}
    folder = ["--output_dir", straight if "own" in flags else tmp_path]
    flags = [flag for flag in flags if flag not in ("--output_dir", "own")]
    with pytest.raises(SystemExit) as ended:
        run(tiny_fmnist, *folder, "--resume", straight / "checkpoint-1.pth", *flags)
    assert ended.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert {path.name: path.stat().st_mtime_ns for path in straight.glob("*.pth")} == before


def folder_of(monkeypatch, tiny_fmnist, *flags):
    """The run folder of a command, opened as `training.fit` does it, without its epochs."""
    found = []

    def fit(args, state, task, stop):
        found.append(training.RunFolder(args, state, task))

    monkeypatch.setattr(training, "fit", fit)
    run(tiny_fmnist, *flags)
    found[0].restore()
    return found[0]


def test_new_schedules_bring_new_settings_of_the_optimizer(tiny_fmnist, straight, tmp_path, monkeypatch):
    flags = ["--resume_new_sched", "--opt_eps", 1e-3, "--opt_betas", 0.5, 0.6]
    resumed = ["--output_dir", tmp_path, "--resume", straight / "checkpoint-1.pth"]
    groups = folder_of(monkeypatch, tiny_fmnist, *resumed, *flags).state.optimizer.param_groups
    assert {tuple(group["betas"]) for group in groups} == {(0.5, 0.6)}
    assert {group["eps"] for group in groups} == {1e-3}


def test_a_run_on_a_stream_saves_only_whole_epochs(tiny_fmnist, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loaders.TrainLoader, "resumable", False)
    begun = folder_of(monkeypatch, tiny_fmnist, "--output_dir", tmp_path)
    begun.state.progress.step = 3
    begun.save()
    assert not list(tmp_path.glob("*.pth"))
    begun.state.progress.next_epoch()
    begun.save()
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["checkpoint-0.pth", "checkpoint-last.pth"]
    with pytest.raises(SystemExit):
        folder_of(monkeypatch, tiny_fmnist, "--output_dir", tmp_path / "b", "--save_ckpt_steps", 3)
    assert "--save_ckpt_steps 3: FMNIST is a stream" in capsys.readouterr().err


def test_a_broken_validation_image_does_not_cost_the_epoch(tmp_path, capsys):
    draw = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for number in range(count):
            path = tmp_path / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    flags = ["--data_set", "image_folder", "--epochs", 2]
    run(tmp_path, *flags, "--output_dir", tmp_path / "straight")

    content = path.read_bytes()
    path.write_bytes(content[:60])
    mended = [*flags, "--output_dir", tmp_path / "mended"]
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, *mended)
    assert ended.value.code == 2
    assert str(path) in capsys.readouterr().err
    kept = load_checkpoint(tmp_path / "mended" / "checkpoint-0.pth")
    assert (kept["epoch"], kept["step"]) == (0, kept["steps_per_epoch"])
    assert not (tmp_path / "mended" / "summary.csv").exists()

    path.write_bytes(content)
    run(tmp_path, *mended, "--auto_resume", "true")
    assert assert_same_run(tmp_path / "straight", tmp_path / "mended") > 1000


def test_resuming_on_other_classes_is_an_error(tiny_fmnist, straight, tmp_path, capsys):
    checkpoint = load_checkpoint(straight / "checkpoint-1.pth")
    checkpoint["classes"] = checkpoint["classes"][::-1]
    torch.save(checkpoint, tmp_path / "checkpoint-1.pth")
    for resume in (["--resume", tmp_path / "checkpoint-1.pth"], ["--output_dir", tmp_path, "--auto_resume", "true"]):
        with pytest.raises(SystemExit) as ended:
            run(tiny_fmnist, *resume)
        assert ended.value.code == 2
        assert "another order" in capsys.readouterr().err


@pytest.mark.parametrize("saves", ["true", "false"])
def test_a_used_folder_is_not_overwritten(tiny_fmnist, straight, capsys, saves):
    def files():
        return {path: path.stat().st_mtime_ns for path in straight.iterdir() if path.name != "run.lock"}

    before = files()
    with pytest.raises(SystemExit) as ended:
        run(tiny_fmnist, "--output_dir", straight, "--save_ckpt", saves)
    assert ended.value.code == 2
    assert "--auto_resume true" in capsys.readouterr().err
    assert files() == before


def test_a_table_of_something_else_is_not_overwritten(tiny_fmnist, tmp_path, capsys):
    (tmp_path / "summary.csv").write_text("epoch;lr\n0;0.1\n")
    with pytest.raises(SystemExit) as ended:
        run(tiny_fmnist, "--output_dir", tmp_path)
    assert ended.value.code == 2
    assert "summary.csv is no table of epochs, and this run would overwrite it" in capsys.readouterr().err
    assert (tmp_path / "summary.csv").read_text() == "epoch;lr\n0;0.1\n"


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"epoch": "best"}, "its epoch is 'best'"), ({"optimizer": {}}, "its optimizer has no state")],
)
def test_a_checkpoint_that_cannot_be_resumed_says_what_can_be_done(
    tiny_fmnist, straight, tmp_path, capsys, changed, message
):
    save_checkpoint(load_checkpoint(straight / "checkpoint-1.pth") | changed, tmp_path / "w.pth")
    with pytest.raises(SystemExit) as ended:
        run(tiny_fmnist, "--resume", tmp_path / "w.pth")
    assert ended.value.code == 2
    assert f"w.pth: {message}; use --finetune" in capsys.readouterr().err.splitlines()[-1]


def test_synchronized_norms_keep_the_activations_of_timms():
    args = parse_args([*BASE, "--data_path", "x"])
    args.sync_bn = True  # the command takes it on GPUs only
    model, images = timm.create_model("mobilenetv3_small_050").eval(), torch.randn(2, 3, 64, 64)
    expected = model(images)
    model = training.place(args, model, torch.device("cpu"))
    assert sum(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules()) > 30
    assert torch.equal(model(images), expected)


# -- evaluation


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """101 validation images in folders, without a training folder, named as ImageNet's are."""
    root = tmp_path_factory.mktemp("images")
    images = datasets.read_idx(EMBEDDED / "t10k-images-idx3-ubyte.gz")
    labels = datasets.read_idx(EMBEDDED / "t10k-labels-idx1-ubyte.gz")
    for i in range(101):
        folder = root / "val" / f"class{labels[i]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).resize((40, 48)).save(folder / f"ILSVRC2012_val_{i + 1:08d}.JPEG")
    real = [[int(labels[i])] if i % 4 else [] for i in range(101)]
    (root / "real.json").write_text(json.dumps(real + [[0]] * 49_899))
    return root


FOLDER = shlex.split(
    "--model vanillanet_6 --width_mult 0.015625 --input_size 32 --data_set image_folder --device cpu --num_workers 0 "
    "--batch_size 16 --eval true"
)


def reported(text):
    """The figures of an evaluation's report line."""
    line = next(line for line in text.splitlines() if "top-1" in line)
    words = line[line.index("top-1") :].replace("on ", "").split()
    return dict(zip(words[0:-2:2], map(float, words[1:-2:2]), strict=True)) | {"images": int(words[-2])}


def test_every_image_once_on_any_number_of_ranks(server, folders, straight, tmp_path, capsys):
    state = load_checkpoint(straight / "checkpoint-last.pth")
    state.pop("classes")  # whose names are other ones than the folders'
    state["args"]["data_set"] = "image_folder"
    save_checkpoint(state, tmp_path / "nameless.pth")
    arguments = ["--finetune", tmp_path / "nameless.pth", "--real_labels", folders / "real.json"]
    run(folders, *arguments, "--results_file", tmp_path / "one.json", base=FOLDER)
    alone = reported(capsys.readouterr().err)
    arguments += ["--results_file", tmp_path / "two.json"]
    together = reported(server.finish(2, *harness.flags(folders, None, *arguments, base=FOLDER))[0].output)
    assert alone == together
    assert alone["images"] == 101
    assert {"top-1", "top-5", "ReaL", "loss"} <= set(alone)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["classes"] == two["classes"]
    assert sum(row["images"] for row in one["classes"]) == 101


def test_results_and_confusion_as_files(tiny_fmnist, straight, tmp_path, capsys):
    """The same numbers as on the console, and a picture."""
    weights = ["--finetune", straight / "checkpoint-last.pth", "--eval", "--batch_size", 7]
    asked = ["--results_file", tmp_path / "new" / "one.csv", "--confusion", tmp_path / "new" / "confusion.png"]
    run(tiny_fmnist, *weights, *asked)
    console = reported(capsys.readouterr().err)
    with (tmp_path / "new" / "one.csv").open(newline="") as file:
        total, *rows = csv.DictReader(file)
    assert (float(total["acc1"]), int(total["images"])) == (pytest.approx(console["top-1"], abs=1e-3), 40)
    assert [row["class"] for row in rows] == list(FashionMNIST.classes)
    labels = datasets.read_idx(EMBEDDED / "t10k-labels-idx1-ubyte.gz")[:40]
    assert [int(row["images"]) for row in rows] == np.bincount(labels, minlength=10).tolist()
    assert sum(int(row["correct"]) for row in rows) == int(total["correct"])
    assert Image.open(tmp_path / "new" / "confusion.png").size[0] > 500
    with pytest.raises(SystemExit):
        run(tiny_fmnist, *weights, "--results_file", tmp_path / "scores.txt")
    assert "--results_file must end in .csv or .json" in capsys.readouterr().err


def test_validation_data_without_some_classes(folders, tmp_path, capsys):
    """Trained on class0 to class9, evaluated on class4 and class7: their targets are 4 and 7 of 10."""
    shutil.copytree(folders / "val", tmp_path / "train")
    for name in ("class4", "class7"):
        shutil.copytree(folders / "val" / name, tmp_path / "val" / name)
    arguments = ["--output_dir", tmp_path / "out", "--eval", "false", "--epochs", 1, "--warmup_epochs", 0]
    run(tmp_path, *arguments, base=FOLDER)
    assert "the validation data lack 8 of the 10 classes of the training data: class0, " in capsys.readouterr().err
    checkpoint = load_checkpoint(tmp_path / "out" / "checkpoint-last.pth")
    assert checkpoint["classes"] == [f"class{i}" for i in range(10)]
    model = models.VanillaNet(**vanillanet_6_tiny()).eval()
    load_weights(model, checkpoint["model"])
    model.change_act(checkpoint["act_learn"])
    transform = build_eval_transform(Preprocessing(32))
    losses = []
    for name in ("class4", "class7"):
        images = [transform(Image.open(path).convert("RGB")) for path in sorted((tmp_path / "val" / name).iterdir())]
        logits = model(torch.stack(images))
        losses += torch.nn.functional.cross_entropy(
            logits, torch.full((len(images),), int(name[-1])), reduction="none"
        ).tolist()
    summary, _ = rows(tmp_path / "out")
    assert float(summary[0]["test_loss"]) == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_a_mid_ramp_checkpoint_evaluates_as_it_trained(tiny_fmnist, straight, capsys):
    run(tiny_fmnist, "--eval", "true", "--finetune", straight / "checkpoint-1.pth")
    summary, _ = rows(straight)
    found = reported(capsys.readouterr().err)
    assert found["top-1"] == pytest.approx(float(summary[1]["test_acc1"]), abs=5e-4)
    assert found["loss"] == pytest.approx(float(summary[1]["test_loss"]), abs=5e-5)
    for key, column in (("model_ema", "ema"), ("model_ema_0.5", "ema_0.5")):
        run(tiny_fmnist, "--eval", "true", "--finetune", straight / "checkpoint-1.pth", "--model_key", key)
        assert reported(capsys.readouterr().err)["loss"] == pytest.approx(float(summary[1][f"{column}_loss"]), abs=5e-5)


def test_lambda_of_a_published_checkpoint_follows_from_its_epoch(tmp_path):
    arguments = argparse.Namespace(decay_epochs=100, decay_linear=True)
    assert networks.read_record({"epoch": 37, "args": arguments}).slope == 0.37
    assert networks.read_record({"epoch": 299, "args": arguments}).slope == 1.0
    assert networks.read_record({"model": {}}).slope is None
    assert networks.read_record({"act_learn": 0.5, "epoch": 299, "args": arguments}).slope == 0.5


def test_a_signal_while_an_epoch_is_logged_saves_the_epoch(tiny_fmnist, tmp_path, monkeypatch):
    """Also one that --save_ckpt_freq would not save."""
    log = logs.CsvSink.log

    def stopped(sink, metrics, step):
        log(sink, metrics, step)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(logs.CsvSink, "log", stopped)
    with pytest.raises(SystemExit) as ended:
        run(tiny_fmnist, "--output_dir", tmp_path, "--save_ckpt_freq", 4)
    assert ended.value.code == 143
    last = load_checkpoint(tmp_path / "checkpoint-last.pth")
    assert (last["epoch"], last["step"]) == (1, 0)


def test_a_signal_on_one_rank_ends_all_with_its_code():
    world = types.SimpleNamespace(gather=lambda received: [None, signal.SIGUSR1, None])
    state = types.SimpleNamespace(world=world, progress=Progress())
    folder = types.SimpleNamespace(checkpoints=None, state=state, step_sinks=logs.Sinks(), epoch_sinks=logs.Sinks())
    with pytest.raises(SystemExit) as ended:
        training.RunFolder.leave(folder, types.SimpleNamespace(received=None))
    assert ended.value.code == 128 + signal.SIGUSR1


def test_larger_steps_go_on_with_what_is_left(tiny_fmnist, straight, tmp_path):
    """6 steps of 8 images are 1.5 of 32, and 12 of the 60 images are left; the log keeps what was before."""
    shutil.copy(straight / "log.jsonl", tmp_path)
    resume = ["--resume", straight / "checkpoint-1-6.pth", "--batch_size", 16, "--early_stop_epochs", 2]
    run(tiny_fmnist, "--output_dir", tmp_path, *resume)
    _, lines = rows(tmp_path)
    assert [line["step"] for line in lines if line["epoch"] == 0] == [2, 4, 6, 8]
    assert [line["step"] for line in lines if line["epoch"] == 1] == [10, 12, 14, 5]
    last = load_checkpoint(tmp_path / "checkpoint-last.pth")
    assert (last["epoch"], last["updates"]) == (1, round(14 * 2 / 8) + 1)


@pytest.mark.parametrize(("batch_size", "expected"), [(16, ["1-2", "1-1"]), (2, ["1-11", "1-6"])])
def test_files_of_other_steps_are_numbered_anew(tiny_fmnist, straight, tmp_path, monkeypatch, batch_size, expected):
    """So that the next file of the run is also the newest by its number: 8 steps an epoch become 2 or 15."""
    for name in ("1-6", "1-3", "0"):
        shutil.copy(straight / f"checkpoint-{name}.pth", tmp_path)
    flags = ["--output_dir", tmp_path, "--auto_resume", "true", "--batch_size", batch_size]
    folder = folder_of(monkeypatch, tiny_fmnist, *flags)
    assert [path.name for path in folder.checkpoints.numbered()] == [
        f"checkpoint-{name}.pth" for name in (*expected, "0")
    ]
    assert load_checkpoint(tmp_path / f"checkpoint-{expected[0]}.pth")["samples"] == 48
    progress = folder.state.progress
    assert (progress.epoch, f"1-{progress.step}", progress.samples) == (1, expected[0], 48)


def test_other_averages_are_not_resumed(tiny_fmnist, straight, tmp_path, capsys):
    """They stand in a file by their place, whatever their decay is."""
    resume = ["--resume", straight / "checkpoint-1.pth", "--model_ema_decay", 0.5]
    with pytest.raises(SystemExit) as ended:
        run(tiny_fmnist, "--output_dir", tmp_path, *resume)
    assert ended.value.code == 2
    assert "--model_ema_decay 0.5, but" in capsys.readouterr().err


# -- deploying and fine-tuning


@pytest.fixture(scope="module")
def finished(tiny_fmnist, tmp_path_factory):
    """A run whose lambda reached 1."""
    folder = tmp_path_factory.mktemp("finished")
    run(tiny_fmnist, "--output_dir", folder, "--decay_epochs", 2)
    return folder


def test_deploy(tiny_fmnist, finished, tmp_path, capsys):
    target = tmp_path / "new" / "deploy.pth"
    run(
        tiny_fmnist,
        "--finetune",
        finished / "checkpoint-last.pth",
        "--model_key",
        "model_ema",
        "--switch_to_deploy",
        target,
    )
    printed = capsys.readouterr()
    evaluated = [line for line in printed.err.splitlines() if "top-1" in line]
    assert [line.split(" top-1")[0].split(" ", 1)[1] for line in evaluated] == [
        "train form, model_ema:", "train form, model:", "train form, model_ema_0.5:", "deploy form of model_ema:",
    ]  # fmt: skip
    assert reported(evaluated[0]) == reported(evaluated[3])
    table = [line.split("|")[1:-1] for line in printed.out.splitlines() if line.startswith("|")]
    layers = {row[0].strip(): row[1].strip() for row in table}
    assert layers["train form, model_ema"] == "12"
    assert layers["deploy form of model_ema"] == "6"
    difference = float(printed.out.split("largest logit difference, relative: ")[1].split()[0])
    assert 0 <= difference < 1e-4
    # The file is a network of its own.
    run(tiny_fmnist, "--eval", "true", "--deploy", "true", "--finetune", target)
    assert reported(capsys.readouterr().err) == reported(evaluated[3])


def test_weights_of_another_network_are_not_evaluated(tiny_fmnist, finished, tmp_path, capsys):
    other = {"x": torch.zeros(1)}
    torch.save(
        {**load_checkpoint(finished / "checkpoint-last.pth"), "model_teacher": other, 0: other}, tmp_path / "w.pth"
    )
    run(tiny_fmnist, "--finetune", tmp_path / "w.pth", "--switch_to_deploy", tmp_path / "d.pth")
    printed = capsys.readouterr()
    assert "model_teacher is not evaluated: " in printed.err
    assert "| train form, model_ema " in printed.out


def test_deploying_mid_ramp_is_refused(tiny_fmnist, straight, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(tiny_fmnist, "--finetune", straight / "checkpoint-1.pth", "--switch_to_deploy", tmp_path / "d.pth")
    assert ended.value.code == 2
    assert "slope is 0.2" in capsys.readouterr().err
    assert not (tmp_path / "d.pth").exists()


@pytest.mark.parametrize(("extra", "slopes"), [([], [1, 1, 1]), (["--restart_decay", "true"], [0, 0.5, 1])])
def test_fine_tuning_keeps_lambda(tiny_fmnist, finished, tmp_path, extra, slopes):
    flags = [
        "--output_dir",
        tmp_path,
        "--epochs",
        3,
        "--decay_epochs",
        2,
        "--finetune",
        finished / "checkpoint-last.pth",
    ]
    run(tiny_fmnist, *flags, *extra)
    assert [float(row["act_learn"]) for row in rows(tmp_path)[0]] == slopes


def test_distillation_from_a_run_of_ours(tiny_fmnist, finished, tmp_path):
    teacher = ["--teacher", "vanillanet_6", "--teacher_weights", finished / "checkpoint-last.pth"]
    short = ["--epochs", 1, "--warmup_epochs", 0]
    run(tiny_fmnist, "--output_dir", tmp_path / "a", *short, *teacher, "--distill_tau", 3)
    run(tiny_fmnist, "--output_dir", tmp_path / "b", *short, *teacher, "--distill_alpha", 0)
    run(tiny_fmnist, "--output_dir", tmp_path / "c", *short)
    loss = {name: float(rows(tmp_path / name)[0][-1]["train_loss"]) for name in "abc"}
    assert loss["b"] == loss["c"]  # without its share the teacher changes no bit
    assert loss["a"] != loss["c"]


def teacher_of(tiny_fmnist, tmp_path, *flags, classes=None):
    args = main.parse_args([*BASE, "--data_path", str(tiny_fmnist), "--output_dir", str(tmp_path), *map(str, flags)])
    preprocessing = main.settle(args, None, train=True)
    return main.build_teacher(args, preprocessing, classes=classes, num_classes=10)


def test_a_teacher_is_a_checkpoint_or_a_folder_and_gets_images_as_it_knows_them(tiny_fmnist, finished, tmp_path):
    path = finished / "checkpoint-last.pth"
    found = networks.open(path)
    network, classes = found.module, list(found.classes)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        logits = network(images)
        own = teacher_of(tiny_fmnist, tmp_path, "--teacher", path, classes=classes)
        assert torch.equal(own(images), logits)
        halves = teacher_of(tiny_fmnist, tmp_path, "--teacher", path, "--imagenet_default_mean_and_std", "false")
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        torch.testing.assert_close(halves(((images * std + mean) - 0.5) / 0.5), logits)
        save_for_hf(timm.create_model("resnet10t", num_classes=10), tmp_path / "hub", safe_serialization=True)
        folder = teacher_of(tiny_fmnist, tmp_path, "--teacher", f"local-dir:{tmp_path / 'hub'}")
        assert folder(images).shape == (4, 10)
    with pytest.raises(ValueError, match="in another order"):
        teacher_of(tiny_fmnist, tmp_path, "--teacher", path, classes=classes[::-1])
    with pytest.raises(ValueError, match="leave out --teacher_weights"):
        teacher_of(tiny_fmnist, tmp_path, "--teacher", path, "--teacher_weights", path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--use_amp", "true", "--amp_dtype", "bf16", "--channels_last", "true"],
        ["--use_amp", "true", "--amp_dtype", "fp16"],
        ["--opt", "lamb", "--layer_decay", "0.8", "--layer_decay_num_layers", "4", "--bce_loss"],
        ["--mixup", "0", "--cutmix", "0", "--smoothing", "0", "--disable_eval", "true"],
        ["--decay_epochs", "0", "--warmup_epochs", "0", "--warmup_steps", "3", "--dist_eval", "false"],
        ["--model", "test_resnet", "--batch_size", "30"],
        ["--model_ema_force_cpu", "true", "--input_size", "40"],
        ["--batch_size", "128", "--update_freq", "1"],  # fewer images than a batch
    ],
)
def test_flags_work_together(tiny_fmnist, tmp_path, arguments):
    base = BASE if "test_resnet" not in arguments else [t for t in BASE if t not in ("--width_mult", "0.015625")]
    run(tiny_fmnist, "--output_dir", tmp_path, "--epochs", "2", *arguments, base=base)
    assert len(rows(tmp_path)[0]) == 2


NARROW = shlex.split(
    "--data_set FMNIST --device cpu --num_workers 0 --width_mult 0.015625 --input_size 64 --resize true"
)


TRAINING_RECIPES = sorted({path.stem for path in (ROOT / "recipes").glob("*.args")} - {"evaluate", "finetune"})


def test_every_variant_has_a_recipe():
    assert set(models.vanillanet.VARIANTS) <= set(TRAINING_RECIPES)


@pytest.mark.parametrize("recipe", TRAINING_RECIPES)
def test_every_recipe_takes_two_steps(tiny_fmnist, tmp_path, recipe):
    """With the recipe's optimizer, losses and augmentation; narrow, on small images, without a GPU."""
    recipe = f"@{ROOT}/recipes/{recipe}.args"
    flags = [*NARROW, "--batch_size", "30", "--early_stop_epochs", "1", "--log_freq", "1"]
    flags += ["--amp_dtype", "bf16"] if main.parse_args([recipe, "--data_path", "x"]).use_amp else []
    run(tiny_fmnist, *flags, "--output_dir", tmp_path, base=[recipe])
    summary, lines = rows(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert np.isfinite([line["loss"] for line in lines]).all()
    assert "test_acc1" in summary[0]
    assert ("ema_acc1" in summary[0]) == main.parse_args([recipe, "--data_path", "x"]).model_ema


def test_the_other_recipes_run(tiny_fmnist, finished, tmp_path, capsys):
    weights = ["--model", "vanillanet_6", "--finetune", finished / "checkpoint-last.pth"]
    run(tiny_fmnist, *NARROW, *weights, base=[f"@{ROOT}/recipes/evaluate.args"])
    assert reported(capsys.readouterr().err)["images"] == 40
    flags = [*weights, "--batch_size", "30", "--early_stop_epochs", "1", "--output_dir", tmp_path]
    run(tiny_fmnist, *NARROW, *flags, base=[f"@{ROOT}/recipes/finetune.args"])
    assert [float(row["act_learn"]) for row in rows(tmp_path)[0]] == [1.0]


def test_without_an_output_folder_nothing_is_written(tiny_fmnist, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tiny_fmnist, "--epochs", 1, "--warmup_epochs", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_compile_changes_no_number_and_recompiles_for_no_lambda(tiny_fmnist, tmp_path):
    """Without dropout, whose random numbers a compiled network draws in its own way."""
    graphs = {}
    for name, flags in (("one", ["--early_stop_epochs", 1]), ("three", ["--early_stop_epochs", 3])):
        torch._dynamo.reset()
        counters.clear()
        flags += ["--compile", "true", "--drop", 0, "--lr", 1e-5]
        run(tiny_fmnist, "--output_dir", tmp_path / name, *flags)
        graphs[name] = counters["stats"]["unique_graphs"]
    assert graphs["one"] == graphs["three"] > 0
    run(tiny_fmnist, "--output_dir", tmp_path / "eager", "--early_stop_epochs", 3, "--drop", 0, "--lr", 1e-5)
    compiled, eager = (rows(tmp_path / name)[0] for name in ("three", "eager"))
    assert [row["act_learn"] for row in compiled] == ["0.0", "0.2", "0.4"]
    for ours, theirs in zip(compiled, eager, strict=True):
        assert float(ours["train_loss"]) == pytest.approx(float(theirs["train_loss"]), rel=1e-4)


def test_what_a_recipe_says_in_vain_is_a_line_in_the_log(tiny_fmnist, tmp_path, capsys):
    """A network without stages of ours, another optimizer, and fewer epochs than the recipe's warm-up."""
    recipe = tmp_path / "recipe.args"
    recipe.write_text(
        "--model vanillanet_6 --act_num 2 --width_mult 0.02 --opt sgd --momentum 0.8 --warmup_epochs 1 --nb_classes 7 "
        "--save_ckpt_num 3 --model_ema_decay 0.5 --sync_bn true --mixup 0 --cutmix 0"
    )
    arguments = "--model resnet10t --opt adamw --epochs 1 --device cpu --input_size 32 --num_workers 0 --batch_size 8"
    main.main([f"@{recipe}", *arguments.split(), "--data_set", "FMNIST", "--data_path", str(tiny_fmnist)])
    log = capsys.readouterr().err
    for flag in ("act_num", "width_mult", "momentum", "warmup_epochs", "nb_classes", "save_ckpt_num", "sync_bn"):
        assert log.count(f"--{flag} of a recipe is passed over") == 1, flag


class FakeWandb(types.ModuleType):
    """Stands in for the package: keeps what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.logged = {}, []

    def init(self, **settings):
        self.begun = settings
        return self

    def define_metric(self, name, step_metric=None):
        pass

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


def test_weights_and_biases(tiny_fmnist, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run(tiny_fmnist, "--epochs", 1, "--warmup_epochs", 0, "--enable_wandb", "--wandb_project", "p", "--wandb_name", "n")
    assert (wandb.begun["project"], wandb.begun["name"]) == ("p", "n")
    assert wandb.begun["config"]["epochs"] == 1
    assert any("epoch/test_acc1" in values for values in wandb.logged)
    assert wandb.finished


def test_weights_and_biases_without_an_account(tiny_fmnist, monkeypatch, capsys):
    wandb = FakeWandb()
    wandb.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))

    def init(**settings):
        raise wandb.errors.Error("api_key not configured (no-tty). call wandb.login()\nmore")

    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(SystemExit) as ended:
        run(tiny_fmnist, "--enable_wandb", "--wandb_project", "p")
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("--enable_wandb true: wandb refuses: api_key not configured (no-tty). call wandb.login()")


def test_flags_of_random_views_reach_them(tiny_fmnist, monkeypatch):
    seen = {}
    build = transforms.build_train_transform

    def build_train_transform(preprocessing, **settings):
        seen.update(settings)
        return build(preprocessing, **settings)

    monkeypatch.setattr(transforms, "build_train_transform", build_train_transform)
    asked = {"scale": [0.5, 0.9], "ratio": [1.0, 2.0], "hflip": 0.25, "vflip": 0.75}
    flags = [token for flag, value in asked.items() for token in (f"--{flag}", *np.ravel(value).tolist())]
    run(tiny_fmnist, "--epochs", 1, "--warmup_epochs", 0, "--input_size", 48, *flags)
    assert {name: seen[name] for name in asked} == asked


def test_a_crop_of_images_that_are_not_resized(tiny_fmnist, tmp_path, capsys):
    """A flag that is typed is an error, one of a recipe a line in the log."""
    with pytest.raises(SystemExit):
        run(tiny_fmnist, "--scale", 0.5, 1)
    assert "--scale has no effect on images that are not resized" in capsys.readouterr().err
    (tmp_path / "recipe.args").write_text("--scale 0.5 1 --crop_pct 0.9")
    run(tiny_fmnist, "--epochs", 1, "--warmup_epochs", 0, f"@{tmp_path / 'recipe.args'}")
    log = capsys.readouterr().err
    assert log.count("of a recipe is passed over: --scale has no effect on images that are not resized") == 1
    assert log.count("of a recipe is passed over: --crop_pct has no effect on images that are not resized") == 1


def photographs(folder, side, number=8):
    """Images of noise in folders by the names of CIFAR-10's."""
    noise = np.random.RandomState(0)
    for split in ("train", "test"):
        for name in ("frog", "ship"):
            (folder / split / name).mkdir(parents=True)
            for index in range(number):
                image = Image.fromarray(noise.randint(0, 256, (side, side, 3), dtype=np.uint8))
                image.save(folder / split / name / f"{index}.png")
    return folder


def test_images_in_a_folder_that_are_not_resized(tmp_path, monkeypatch, capsys):
    """Evaluated pixel by pixel, also from the checkpoint alone, and trained with crops from 4 px of padding."""
    data = photographs(tmp_path / "data", 40)
    seen = []
    build = transforms.build_train_transform
    monkeypatch.setattr(
        transforms, "build_train_transform", lambda *args, **kwargs: seen.append(build(*args, **kwargs)) or seen[-1]
    )
    flags = ("--data_set", "image_folder", "--val_split", "test", "--input_size", 40, "--output_dir", tmp_path / "run")
    base = [*shlex.split("--model vanillanet_5 --width_mult 0.03125 --device cpu --num_workers 0 --batch_size 8")]
    short = shlex.split("--epochs 1 --warmup_epochs 0 --decay_epochs 0 --aa none --reprob 0 --mixup 0 --cutmix 0")
    run(data, *flags, *short, "--resize", "false", base=base)
    crop = seen[0].transforms[0]
    assert (crop.size, crop.padding) == ((40, 40), 4)
    assert crop(Image.new("RGB", (30, 50))).size == (40, 40)  # a smaller one is padded further
    network = networks.open(tmp_path / "run" / "checkpoint-last.pth")
    assert network.preprocessing.native
    with Image.open(data / "test" / "frog" / "0.png") as image:
        exact = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - 0.5) / 0.5
        mean, std = (torch.tensor(x)[:, None, None] for x in (network.preprocessing.mean, network.preprocessing.std))
        found = build_eval_transform(network.preprocessing)(image)
    assert torch.allclose(found * std + mean, exact * 0.5 + 0.5, atol=1e-6)
    with pytest.raises(SystemExit):
        run(data, *flags, *short, "--resize", "false", "--scale", 0.5, 1, base=base)
    assert "--scale has no effect on images that are not resized: add --resize true" in capsys.readouterr().err


def test_small_images_are_resized_if_that_is_asked_for(tiny_fmnist, tmp_path):
    run(
        tiny_fmnist,
        "--epochs",
        1,
        "--warmup_epochs",
        0,
        "--resize",
        "true",
        "--scale",
        0.5,
        1,
        "--output_dir",
        tmp_path,
    )
    network = networks.open(tmp_path / "checkpoint-last.pth")
    assert (network.preprocessing.native, network.preprocessing.crop_pct) == (False, 0.875)


def test_a_runs_own_arguments_repeat_it(tiny_fmnist, tmp_path):
    run(tiny_fmnist, "--epochs", 2, "--output_dir", tmp_path / "first", "--opt", "sgd", "--momentum", 0.9)
    main.main([f"@{tmp_path / 'first' / 'args.yaml'}", f"--output_dir={tmp_path / 'second'}"])
    assert assert_same_run(tmp_path / "first", tmp_path / "second") > 1000
