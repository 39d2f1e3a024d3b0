"""The command line is a contract: every published flag, its default, and what is rejected."""

import shlex
from pathlib import Path

import pytest

from options import build_parser, parse_args

# The published flags with their defaults; `...` where none is published. Frozen: a change here breaks users' commands.
PUBLISHED = {
    "batch_size": 64, "epochs": 300, "early_stop_epochs": None, "update_freq": 1, "seed": 0, "device": "cuda",
    "num_workers": 10, "pin_mem": True, "start_epoch": 0,
    "decay_epochs": 100, "decay_linear": True,
    "model": "vanillanet_5", "act_num": 3, "drop": 0, "input_size": 224, "deploy": False, "switch_to_deploy": None,
    "model_ema": False, "model_ema_decay": [0.9999], "model_ema_force_cpu": False, "model_ema_eval": False,
    "opt": "adamw", "opt_eps": 1e-8, "opt_betas": ..., "clip_grad": ..., "momentum": 0.9, "weight_decay": 0.05,
    "weight_decay_end": ..., "lr": 4e-3, "min_lr": 1e-6, "warmup_epochs": 5, "warmup_steps": -1, "layer_decay": 1.0,
    "layer_decay_num_layers": 4,
    "color_jitter": 0.4, "aa": "rand-m9-mstd0.5-inc1", "smoothing": 0.1, "train_interpolation": "bicubic",
    "reprob": 0.25, "remode": "pixel", "recount": 1, "resplit": False, "mixup": 0.8, "cutmix": 1.0,
    "cutmix_minmax": ..., "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch", "bce_loss": False,
    "bce_target_thresh": ...,
    "data_path": ..., "eval_data_path": ..., "data_set": "IMNET", "nb_classes": 1000,
    "imagenet_default_mean_and_std": True, "crop_pct": ..., "real_labels": ...,
    "finetune": ..., "model_key": "model|module", "model_prefix": ..., "resume": ..., "resume_new_sched": False,
    "auto_resume": False, "save_ckpt": True, "save_ckpt_freq": 1, "save_ckpt_num": 10,
    "output_dir": ..., "log_dir": ...,
    "eval": False, "dist_eval": True, "disable_eval": False, "test_freq": 20, "test_epoch": 260,
    "world_size": ..., "local_rank": ..., "dist_on_itp": ..., "dist_url": "env://",
    "use_amp": False, "enable_wandb": False, "wandb_ckpt": False,
}  # fmt: skip

PUBLISHED_TRAINING = (
    "--model vanillanet_6 --data_path DIR --batch_size 128 --update_freq 1 --lr 4.8e-3 --weight_decay 0.32 --drop 0.05 "
    "--opt lamb --aa rand-m7-mstd0.5-inc1 --mixup 0.15 --bce_loss --model_ema true --model_ema_eval true "
    "--model_ema_decay 0.99996 --use_amp true --epochs 300 --decay_epochs 100 --layer_decay 0.8 "
    "--layer_decay_num_layers 4 --output_dir OUT"
)
PUBLISHED_EVAL = (
    "--model vanillanet_5 --data_path DIR --real_labels real.json --finetune vanillanet_5.pth --eval True "
    "--model_key model_ema --crop_pct 0.875"
)


def test_published_flags_and_defaults():
    defaults = vars(build_parser().parse_args([]))
    assert set(PUBLISHED) <= set(defaults)
    stated = {name: value for name, value in PUBLISHED.items() if value is not ...}
    assert {name: defaults[name] for name in stated} == stated


@pytest.mark.parametrize(
    "command", [PUBLISHED_TRAINING, PUBLISHED_EVAL, PUBLISHED_EVAL + " --switch_to_deploy vanillanet_5_deploy.pth"]
)
def test_published_commands_parse(command):
    args = parse_args(command.split())
    dashed = [token.replace("_", "-") if token.startswith("--") else token for token in command.split()]
    assert vars(parse_args(dashed)) == vars(args)


def test_dashes_stay_in_values():
    args = parse_args(["--data-path=my_data/a-b_c", "--aa", "rand-m7-mstd0.5-inc1", "--resume=x-y_z.pth"])
    assert (args.data_path, args.aa, args.resume) == ("my_data/a-b_c", "rand-m7-mstd0.5-inc1", "x-y_z.pth")


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("True", True), ("1", True), ("false", False), ("0", False)]
)
def test_bool_values(text, value):
    assert parse_args(["--data_path", "d", "--dist_eval", text]).dist_eval is value


def test_recipe_file(tmp_path):
    recipe = tmp_path / "a.args"
    recipe.write_text("# what it does\n--lr 1e-3 --epochs 7  # and why\n\n--data-path 'a folder'\n--bce_loss\n")
    args = parse_args([f"@{recipe}", "--epochs", "9"])
    assert (args.lr, args.epochs, args.data_path, args.bce_loss) == (1e-3, 9, "a folder", True)
    assert {"lr", "epochs", "data_path", "bce_loss"} == set(args.given)


def test_every_recipe_parses():
    recipes = sorted(Path("recipes").glob("*.args"))
    assert recipes
    for recipe in recipes:
        assert parse_args([f"@{recipe}", "--data_path", "d"]).data_path == "d"


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("--resplit true", ["--resplit"]),
        ("--model_ema_eval true", ["--model_ema_eval", "--model_ema true"]),
        ("--model_ema_decay 0.99", ["--model_ema_decay", "--model_ema true"]),
        ("--model_ema true --model_ema_decay 0.9 0.9", ["--model_ema_decay", "twice"]),
        ("--bce_target_thresh 0.2", ["--bce_target_thresh", "--bce_loss"]),
        ("--amp_dtype bf16", ["--amp_dtype", "--use_amp true"]),
        ("--layer_decay_num_layers 4", ["--layer_decay_num_layers", "--layer_decay"]),
        ("--mixup 0 --cutmix 0 --mixup_prob 0.5", ["--mixup_prob", "--mixup", "--cutmix"]),
        ("--reprob 0 --recount 2", ["--recount", "--reprob"]),
        ("--color_jitter 0.3", ["--color_jitter", "--aa none"]),
        ("--wandb_ckpt true", ["--wandb_ckpt", "--enable_wandb"]),
        ("--auto_resume true", ["--auto_resume", "--output_dir"]),
        ("--finetune a --resume b", ["--finetune", "--resume"]),
        ("--eval true", ["--eval", "--finetune"]),
        ("--eval true --disable_eval true --finetune a", ["--eval", "--disable_eval"]),
        ("--deploy true", ["--deploy", "--eval true"]),
        ("--switch_to_deploy a --deploy true --finetune b", ["--switch_to_deploy", "--deploy"]),
        ("--weight_decay 0 --weight_decay_end 0.1", ["--weight_decay_end", "--weight_decay 0"]),
        ("--model_key model_ema", ["--model_key", "--finetune"]),
        ("--switch_to_deploy a --finetune b --compile true", ["--compile", "--switch_to_deploy"]),
        ("--distill_alpha 0.2", ["--distill_alpha", "--teacher"]),
        ("--save_ckpt false --output_dir a --save_ckpt_num 3", ["--save_ckpt_num", "--save_ckpt is false"]),
        ("--resume a --start_epoch 3", ["--start_epoch"]),
        ("--mixup 0 --mixup_switch_prob 0.3", ["--mixup_switch_prob", "--mixup"]),
        ("--decay_epochs 0 --decay_linear false --decay_linear true", ["--decay_linear", "--decay_epochs"]),
        ("--disable_eval true --real_labels a", ["--real_labels", "--disable_eval"]),
        ("--eval true --finetune ''", ["--eval", "--finetune"]),
        ("--teacher resnet18 --teacher_key model", ["--teacher_key", "--teacher_weights"]),
        ("--restart_decay true", ["--restart_decay", "--finetune"]),
        ("--batch_size 0", ["--batch_size", "0"]),
        ("--lr nan", ["--lr", "nan"]),
        ("--lr -1", ["--lr", "-1"]),
        ("--smoothing 2", ["--smoothing", "2"]),
        ("--use_amp maybe", ["--use_amp", "maybe"]),
        ("--mixup_mode row", ["--mixup_mode", "row"]),
        ("--no_such_flag 1", ["--no_such_flag"]),
        ("@missing.args", ["missing.args"]),
    ],
)
def test_rejected_with_one_line_and_exit_code_2(command, named, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(["--data_path", "d", *shlex.split(command)])
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert message.count("\n") == 1
    assert all(name in message for name in named), message


def test_data_path_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--epochs", "2"])
    assert "--data_path" in capsys.readouterr().err
