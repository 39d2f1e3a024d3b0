"""Whole runs through object_detection/main.py: resume bit by bit, ranks, evaluation, fusing, export, bad input."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import options
import utils
import visualize
from engine import Precision
from object_detection import main, make_garments
from object_detection.checkpoints import build_detector, open_detector
from object_detection.coco import CocoDataset
from object_detection.comparing import largest_difference
from object_detection.evaluation import average_precision, detect
from object_detection.options import parse_args
from optim_factory import step_schedule
from records.checkpoints import load_checkpoint, save_checkpoint
from runs import assert_same_run, rows

ROOT = Path(main.__file__).parents[1]
BASE = shlex.split(
    "--model mask_rcnn_vanillanet_6 --width_mult 0.015625 --act_num 1 --fpn_channels 8 --box_channels 16 "
    "--mask_channels 8 --anchor_sizes 16 24 36 54 80 --proposals 30 20 --rois 16 --train_sizes 64 80 96 "
    "--test_size 80 --max_size 96 --annotations train.json --images train --eval_annotations val.json "
    "--eval_images val --device cpu --num_workers 0 --batch_size 2 --update_freq 2 --epochs 4 --lr_steps 2 3 "
    "--warmup_steps 3 --lr 2e-3 --clip_grad 5 --model_ema true --model_ema_decay 0.5 --model_ema_eval true --log_freq 1"
)
RETINANET = shlex.split(
    "--model retinanet_vanillanet_6 --width_mult 0.015625 --act_num 1 --fpn_channels 8 --anchor_sizes 16 24 36 54 80 "
    "--train_sizes 80 --test_size 80 --max_size 80 --annotations train.json --images train --eval_annotations val.json "
    "--eval_images val --device cpu --num_workers 0 --batch_size 2 --epochs 1 --lr_steps --warmup_steps 2"
)

ONE_EPOCH = ["--epochs", "1", "--warmup_steps", "1", "--lr_steps"]


@pytest.fixture(scope="session")
def garments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("garments")
    make_garments.main([str(folder), "--train", "11", "--val", "5", "--side", "80"])
    return folder


def run(data, *arguments, base=BASE):
    main.main([*base, "--data_path", str(data), *map(str, arguments)])


@pytest.fixture(scope="session")
def straight(garments, tmp_path_factory):
    """An undisturbed run that also saved in the middle of its epochs."""
    folder = tmp_path_factory.mktemp("straight")
    run(garments, "--output_dir", folder, "--save_ckpt_steps", 2)
    return folder


# -- training


def test_outputs(straight):
    summary, lines = rows(straight)
    # 11 images in batches of 2 are 6, the windows of 2 make 3 steps.
    assert [line["step"] for line in lines] == list(range(1, 13))
    found = {line["step"]: line["lr"] for line in lines}
    assert found == {
        step: step_schedule(step - 1, base=2e-3, milestones=[6, 9], warmup_steps=3) for step in range(1, 13)
    }
    for name in ("loss", "loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"):
        assert 0 <= float(summary[0][f"train_{name}"]) < 10
    total = sum(float(value) for name, value in summary[1].items() if name.startswith("train_loss_"))
    assert total == pytest.approx(float(summary[1]["train_loss"]), rel=1e-4)
    assert {"test_box_AP", "test_mask_AP50", "ema_box_AP", "ema_mask_AP75"} <= set(summary[0])
    state = load_checkpoint(straight / "checkpoint-last.pth")
    assert state["classes"] == ["top", "trousers", "dress", "shoe", "bag", "boot"]
    assert state["category_ids"] == [1, 2, 4, 5, 8, 9]
    assert (state["act_learn"], state["updates"]) == (1.0, 12)
    with Image.open(straight / "curves.png") as image:
        assert image.size == (1000, 600)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_a_straight_one(garments, straight, tmp_path, workers):
    """Bit by bit, interrupted at the end of an epoch and within one."""
    run(garments, "--output_dir", tmp_path, "--early_stop_epochs", 1)
    middle = load_checkpoint(straight / "checkpoint-1-2.pth")
    assert middle["step"] == 2
    middle["args"]["output_dir"] = str(tmp_path)
    save_checkpoint(middle, tmp_path / "checkpoint-1-2.pth")
    # The log of the steps before, which came from the straight run.
    lines = (straight / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_text("".join(lines[:5]))
    run(garments, "--output_dir", tmp_path, "--auto_resume", "true", "--num_workers", workers)
    assert_same_run(straight, tmp_path)


def test_other_schedules_are_not_resumed(garments, straight, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(garments, "--output_dir", tmp_path, "--resume", straight / "checkpoint-1.pth", "--lr_steps", 3)
    assert ended.value.code == 2
    assert "--lr_steps [3], but" in capsys.readouterr().err


def test_a_step_schedule():
    rate = [step_schedule(s, base=1.0, milestones=[20, 30], gamma=0.1, warmup_steps=10) for s in (0, 5, 10, 19, 20, 30)]
    assert rate == pytest.approx([0, 0.5, 1, 1, 0.1, 0.01])
    assert step_schedule(0, base=2.0, milestones=[]) == 2.0


def test_a_backbone_to_begin_with(garments, tmp_path):
    """It is loaded, less its classifier, before the first step."""
    classifier = timm.create_model("vanillanet_6", width_mult=1 / 64, act_num=1, num_classes=5)
    save_checkpoint({"model_ema": classifier.state_dict(), "act_learn": 1.0}, tmp_path / "w.pth")
    arguments = [*ONE_EPOCH, "--lr", "1e-12", "--weight_decay", "0", "--disable_eval", "true"]
    run(garments, "--output_dir", tmp_path / "out", "--backbone_weights", tmp_path / "w.pth", *arguments)
    after = load_checkpoint(tmp_path / "out" / "checkpoint-last.pth")["model"]
    for name, parameter in classifier.named_parameters():
        found = after.get(f"backbone.body.model.{name}")
        assert found is None if name.startswith("cls") else torch.allclose(found, parameter, atol=1e-8)


def test_images_are_normalized_as_those_of_the_classifier(garments, tmp_path):
    classifier = timm.create_model("vanillanet_6", width_mult=1 / 64, act_num=1, num_classes=5)
    recorded = {"imagenet_default_mean_and_std": False}
    save_checkpoint({"model": classifier.state_dict(), "args": recorded}, tmp_path / "w.pth")
    run(garments, "--output_dir", tmp_path / "out", "--backbone_weights", tmp_path / "w.pth", *ONE_EPOCH)
    last = tmp_path / "out" / "checkpoint-last.pth"
    assert load_checkpoint(last)["normalization"] == [[0.5] * 3, [0.5] * 3]
    assert open_detector(last)[0].normalization == ((0.5,) * 3, (0.5,) * 3)


def test_mixed_precision_and_channels_last(garments, tmp_path):
    flags = ["--use_amp", "true", "--amp_dtype", "bf16", "--channels_last", "true", "--head_norm", "true", *ONE_EPOCH]
    run(garments, "--output_dir", tmp_path, *flags)
    assert 0 < float(rows(tmp_path)[0][0]["train_loss"]) < 10


# -- several processes


def test_ap_does_not_depend_on_the_ranks(garments, straight):
    """What the ranks find, put together, is what one finds, to the last bit."""
    args = parse_args([*BASE, "--data_path", str(garments), "--eval", "true", "--finetune", str(straight / "x")])
    dataset = CocoDataset(garments / "val.json", garments / "val", train=False, masks=True)
    detector = build_detector(vars(args), 7)
    detector.load_state_dict(load_checkpoint(straight / "checkpoint-last.pth")["model"])
    detector.selection.score_thresh = 0.0

    def shard(rank, size):
        loader = main.build_eval_loader(args, dataset, utils.World(rank, size, torch.device("cpu")))
        return detect(detector.train(), loader, dataset=dataset, precision=Precision(torch.device("cpu")))

    alone, first, second = shard(0, 1), shard(0, 2), shard(1, 2)
    assert detector.training  # the mode is put back
    assert {row["image_id"] for row in first} | {row["image_id"] for row in second} == {1, 2, 3, 4, 5}
    assert not {row["image_id"] for row in first} & {row["image_id"] for row in second}
    order = lambda results: sorted(results, key=lambda row: row["image_id"])  # noqa: E731
    assert order(first + second) == alone
    assert average_precision(dataset.data, second + first, masks=True) == average_precision(
        dataset.data, alone, masks=True
    )


def test_it_starts_from_anywhere(tmp_path):
    """As a file, with `options.py` and the like of this folder out of the way of those above it."""
    for start in ([str(ROOT / "object_detection" / "main.py")], ["-m", "object_detection.main"]):
        folder = tmp_path if start[0] != "-m" else ROOT
        done = subprocess.run(
            [sys.executable, *start, "--help"], cwd=folder, capture_output=True, text=True, timeout=100, check=True
        )
        assert "--lr_steps" in done.stdout


@pytest.mark.slow
def test_two_ranks(garments, straight, tmp_path):
    """They train, and evaluate as one does; started by torchrun, from another folder."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    script = str(ROOT / "object_detection" / "main.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = [*BASE, "--data_path", str(garments)]

    def start(*arguments, ranks=2):
        command = [*launcher, script] if ranks == 2 else [sys.executable, script]
        done = subprocess.run(
            [*command, *flags, *map(str, arguments)], cwd=tmp_path, env=environment, capture_output=True, text=True,
            timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    start("--output_dir", tmp_path / "out", "--epochs", "2", "--lr_steps", "--update_freq", "1")
    weights = tmp_path / "out" / "checkpoint-last.pth"
    tables = [start("--eval", "true", "--finetune", weights, ranks=ranks) for ranks in (1, 2)]
    assert "AP50" in tables[0]
    assert tables[0] == tables[1]


# -- evaluation, fusing, export


def test_evaluating_and_drawing(garments, straight, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    run(garments, "--eval", "true", "--finetune", straight / "checkpoint-last.pth", "--draw", picture,
        "--draw_images", 3, "--draw_threshold", 0.1)  # fmt: skip
    printed = capsys.readouterr().out
    assert "AP (%) on 5 images" in printed
    summary, _ = rows(straight)
    for kind in ("box", "mask"):
        assert f"{100 * float(summary[-1][f'test_{kind}_AP50']):.2f}" in printed  # as in training
    with Image.open(picture) as image:
        assert image.size == (3 * 320 + 4 * 4, 320 + 2 * 4)
    assert not list(tmp_path.glob("*.pth"))
    # visualize.py needs no flags for it, and no annotations.
    again = tmp_path / "new" / "again.png"
    options = ["--model_key", "model", "--max_images", "3", "--threshold", "0.1", "--output", str(again)]
    last = str(straight / "checkpoint-last.pth")
    visualize.main(["detections", str(garments / "val"), "--network", last, *options])
    assert capsys.readouterr().out == f"the first 3 of 5 images; --max_images takes more\n{again}\n"
    assert again.read_bytes() == picture.read_bytes()
    visualize.main(["detections", str(garments / "val"), "--network", last, *options, "--threshold", "1"])
    assert again.read_bytes() != picture.read_bytes()  # there are detections in it


def test_fusing_a_trained_detector(garments, straight, tmp_path, capsys):
    target = tmp_path / "new" / "deploy.pth"
    run(garments, "--switch_to_deploy", target, "--finetune", straight / "checkpoint-best.pth")
    printed = capsys.readouterr().out
    assert "speed-up" in printed
    aps = [line.split("|")[2:-1] for line in printed.splitlines() if "form, " in line]
    assert len(aps) == 4
    assert aps[:2] == aps[2:]  # boxes and masks, before and after
    state = load_checkpoint(target)
    assert "backbone.body.model.stem.0.weight" in state["model"]
    run(garments, "--deploy", "true", "--eval", "true", "--finetune", target)
    again = [
        line.split("|")[2:-1] for line in capsys.readouterr().out.splitlines() if line.startswith(("| box", "| mask"))
    ]
    assert again == aps[2:]


def test_a_checkpoint_tells_what_it_is_of(garments, straight, tmp_path):
    """Its detector finds what the run's does, in both forms."""
    detector, classes = open_detector(straight / "checkpoint-last.pth", key="model")
    assert classes == ("top", "trousers", "dress", "shoe", "bag", "boot")
    assert (detector.training, detector.test_size, detector.transform.max_size) == (False, 80, 96)
    run(garments, "--switch_to_deploy", tmp_path / "d.pth", "--finetune", straight / "checkpoint-last.pth")
    fused, _ = open_detector(tmp_path / "d.pth")
    assert fused.deploy
    image = CocoDataset(garments / "val.json", garments / "val", train=False, masks=True)[1][0]
    assert largest_difference(detector, fused, [image]) < 1e-4
    save_checkpoint({"model": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="is not the checkpoint of a detector"):
        open_detector(tmp_path / "other.pth")


def test_a_wrong_fusion_writes_nothing(garments, straight, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(main, "largest_difference", lambda *_: 2e-4)
    with pytest.raises(SystemExit) as ended:
        run(garments, "--switch_to_deploy", tmp_path / "d.pth", "--finetune", straight / "checkpoint-last.pth")
    assert ended.value.code == 2
    assert "differ by 2.00e-04, more than 1e-04; nothing written" in capsys.readouterr().err
    assert not (tmp_path / "d.pth").exists()


def test_exporting(garments, straight, tmp_path, capsys):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    run(garments, "--export_onnx", tmp_path / "d.onnx", "--finetune", straight / "checkpoint-last.pth")
    assert "largest difference from PyTorch" in capsys.readouterr().out
    assert (tmp_path / "d.onnx").stat().st_size > 10_000
    run(garments, "--switch_to_deploy", tmp_path / "d.pth", "--finetune", straight / "checkpoint-last.pth")
    run(garments, "--deploy", "true", "--export_onnx", tmp_path / "fused.onnx", "--finetune", tmp_path / "d.pth")
    assert (tmp_path / "fused.onnx").stat().st_size < (tmp_path / "d.onnx").stat().st_size


def test_a_retinanet(garments, tmp_path, capsys):
    run(garments, "--output_dir", tmp_path, base=RETINANET)
    [row], _ = rows(tmp_path)
    assert float(row["train_classification"]) + float(row["train_bbox_regression"]) == pytest.approx(
        float(row["train_loss"]), rel=1e-5
    )
    run(
        garments,
        "--switch_to_deploy",
        tmp_path / "d.pth",
        "--finetune",
        tmp_path / "checkpoint-last.pth",
        base=RETINANET,
    )
    assert "deploy form, box" in capsys.readouterr().out


# -- bad input


def other_categories(data):
    """A copy of the annotations whose first category has another name."""
    changed = json.loads((data / "val.json").read_text())
    changed["categories"][0]["name"] = "hat"
    return changed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--annotations", "gone.json"], "gone.json does not exist"),
        (["--annotations", "cut.json"], "cut.json is no JSON"),
        (["--images", "val"], "images of"),
        (["--images", "gone"], "cannot read the image folder"),
        (["--eval_annotations", "other.json"], "have different categories"),
        (["--eval", "true", "--eval_annotations", "other.json"], "what differs: hat, top"),
        (["--eval", "true", "--finetune", "gone.pth"], "gone.pth does not exist"),
        (["--eval", "true", "--deploy", "true"], "does not fit this network"),
        (["--model", "mask_rcnn_vanillanet_4"], "vanillanet_4 is not known"),
        (["--model", "fcos_vanillanet_6"], "fcos_vanillanet_6 is not known: it is retinanet_ or mask_rcnn_"),
        (["--sync_bn", "true"], "it works on GPUs only"),
        (["--eval", "true", "--finetune", "x.pth", "--draw", "a.svg"], "ends in .png or .jpg or .pdf, not a.svg"),
        (["--warmup_steps", "99"], "lower --warmup_steps"),
        (["--backbone_weights", "ramp.pth"], "within deep training, at lambda 0.4"),
        (["--backbone_weights", "other.pth"], "does not fit"),
        (["--device", "cuda:77"], "--device"),
    ],
)
def test_bad_input(garments, straight, tmp_path, capsys, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    (garments / "cut.json").write_text((garments / "train.json").read_text()[:-50])
    (garments / "other.json").write_text(json.dumps(other_categories(garments)))
    for name, slope, variant in (("ramp", 0.4, "vanillanet_6"), ("other", 1.0, "vanillanet_7")):
        weights = timm.create_model(variant, width_mult=1 / 64, act_num=1).state_dict()
        save_checkpoint({"model": weights, "act_learn": slope}, tmp_path / f"{name}.pth")
    weights = [] if "--eval" not in arguments else ["--finetune", straight / "checkpoint-last.pth"]
    with pytest.raises(SystemExit) as ended:
        run(garments, *weights, *arguments)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert ended.value.code == 2
    assert len(errors) == 1
    assert named in errors[0], errors


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--lr_steps 2 4", "--lr_steps 4 is never reached in --epochs 4"),
        ("--lr_steps 3 2", "--lr_steps must rise"),
        ("--lr_steps --lr_gamma 0.5", "--lr_gamma has no effect"),
        ("--model retinanet_vanillanet_6", "--box_channels has no effect"),
        ("--eval true", "--finetune"),
        ("--export_onnx F", "--export_onnx needs the weights"),
        ("--export_onnx F --finetune G --eval true", "--eval has no effect"),
        ("--draw F.png", "--draw has no effect"),
        ("--draw_images 3", "--draw_images has no effect"),
        ("--backbone_key model", "--backbone_key has no effect"),
        ("--deploy true", "--deploy has no effect"),
        ("--eval true --switch_to_deploy a --finetune b --draw c.png", "--draw has no effect"),
        ("--anchor_sizes 3", "5 arguments"),
    ],
)
def test_flags_that_exclude_each_other(capsys, arguments, named):
    with pytest.raises(SystemExit) as ended:
        parse_args([*BASE, *arguments.split()])
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert named in line


def test_a_recipes_flags_that_have_no_effect_are_notes(monkeypatch):
    monkeypatch.chdir(ROOT)
    typed = "--epochs 1 --model retinanet_vanillanet_6"
    args = parse_args(["@object_detection/recipes/demo.args", *typed.split()])
    passed_over = {note.split()[0].removeprefix("--") for note in args.notes}
    assert passed_over == {"box_channels", "mask_channels", "proposals", "rois", "lr_steps"}
    assert (args.rois, args.mask_channels) == (None, None)
    monkeypatch.chdir(ROOT / "object_detection")
    args = parse_args(["@recipes/mask_rcnn_vanillanet_11.args", "--device", "cpu"])
    assert not args.sync_bn


def test_a_broken_validation_image(garments, straight, tmp_path, capsys, caplog):
    for split in ("train", "val"):
        os.symlink(garments / f"{split}.json", tmp_path / f"{split}.json")
        (tmp_path / split).mkdir()
        for path in (garments / split).iterdir():
            (tmp_path / split / path.name).write_bytes(path.read_bytes())
    (tmp_path / "val" / "00002.png").write_bytes(b"nothing")
    arguments = ["--eval", "true", "--finetune", straight / "checkpoint-last.pth"]
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, *arguments)
    assert ended.value.code == 2
    assert "00002.png: not an image" in capsys.readouterr().err
    run(tmp_path, *arguments, "--skip_broken_eval", "true", "--draw", tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (4 * 320 + 5 * 4, 320 + 2 * 4)  # the four that can be read
    assert "1 broken images: what is in them counts as missed" in capsys.readouterr().err
    (tmp_path / "train" / "00003.png").write_bytes(b"nothing")
    run(tmp_path, "--output_dir", tmp_path / "out", "--skip_broken_eval", "true", *ONE_EPOCH)
    assert rows(tmp_path / "out")[0][0]["broken_images"] == "1"  # its place in training is taken by another


# -- recipes

PUBLISHED = (
    "--lr 1.3e-4 --opt adamw --opt_betas 0.9 0.999 --weight_decay 0.05 --layer_decay 0.6 --batch_size 4 --epochs 12 "
    "--warmup_steps 500 --lr_steps 8 11 --max_size 1333 --flip 0.5 --sync_bn true --num_workers 4 --use_amp false "
    "--train_sizes 480 512 544 576 608 640 672 704 736 768 800 832 864 896 928 960 992 1024"
)


@pytest.mark.parametrize(
    "model",
    ["retinanet_vanillanet_11", "retinanet_vanillanet_13", "mask_rcnn_vanillanet_11", "mask_rcnn_vanillanet_13"],
)
def test_recipes_are_as_published(model):
    backbone = model.removeprefix("retinanet_").removeprefix("mask_rcnn_")
    wanted = parse_args(f"--model {model} {PUBLISHED} --backbone_weights {backbone}.pth".split())
    assert vars(parse_args([f"@{ROOT}/object_detection/recipes/{model}.args"])) == vars(wanted)


def test_the_demos_recipes_fit_together(monkeypatch):
    monkeypatch.chdir(ROOT)
    classifier = options.parse_args(["@object_detection/recipes/demo_backbone.args"])
    detector = parse_args(["@object_detection/recipes/demo.args"])
    assert detector.model == f"mask_rcnn_{classifier.model}"
    assert (detector.width_mult, detector.act_num) == (classifier.width_mult, classifier.act_num)
    assert classifier.decay_epochs < classifier.epochs  # its lambda ends at 1
    assert f"{classifier.output_dir}/" == f"{detector.output_dir}/backbone/"
