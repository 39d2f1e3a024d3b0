"""The command line is a contract: every published flag, its default, and what is rejected."""

import argparse
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ablation
import benchmark
import export
import object_detection.benchmark
import object_detection.make_garments
import object_detection.options
import predict
import visualize
from options import boolean, build_parser, parse_args, save_args
from runs import ROOT

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
    defaults = vars(build_parser().parse_known_args([])[0])
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
        ("--switch_to_deploy x/../a --finetune a", ["--switch_to_deploy", "is the file to fuse"]),
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
        ("--scale 0.9 0.5", ["--scale 0.9 0.5", "smaller one first"]),
        ("--scale 0.5 1.5", ["--scale 0.5 1.5", "up to 1"]),
        ("--ratio 2 1", ["--ratio 2 1"]),
        ("--batch_size 0", ["--batch_size", "0"]),
        ("--lr nan", ["--lr", "nan"]),
        ("--lr -1", ["--lr", "-1"]),
        ("--epochs 1" + 400 * "0", ["--epochs", "up to"]),
        ("--freeze_stages 0", ["--freeze_stages", "--finetune"]),
        ("--bce_target_thresh 0", ["--bce_target_thresh", "--bce_loss"]),
        ("--smoothing 1 --mixup 0 --cutmix 0", ["--smoothing 1"]),
        ("--eval --switch_to_deploy a --finetune b --engine eager", ["--engine", "--switch_to_deploy"]),
        ("--eval --switch_to_deploy a --finetune b --results_file c.csv", ["--results_file", "--switch_to_deploy"]),
        ("--disable_eval --val_split test", ["--val_split", "--disable_eval"]),
        ("--lr inf", ["--lr", "a finite number above 0, not inf"]),
        ("--crop_pct 2", ["--crop_pct", "a finite number above 0 up to 1, not 2"]),
        ("--smoothing 2", ["--smoothing", "from 0 up to 1, not 2"]),
        ("--eval --finetune a --engine eager --channels_last", ["--channels_last", "--engine"]),
        ("--eval --finetune a --engine eager --use_amp", ["--use_amp", "--engine"]),
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


# -- recipes and the flags typed beside them


@pytest.fixture
def recipe(tmp_path):
    """A function that writes a recipe and returns how it is named on the command line."""

    def write(text, name="a.args", encoding="utf-8"):
        (tmp_path / name).write_text(text, encoding=encoding)
        return f"@{tmp_path / name}"

    return write


def test_typed_flags_are_told_from_those_of_a_recipe(recipe):
    args = parse_args(["--lr", "1", recipe("--lr 2 --epochs 7 --data_path d"), "--use_amp"])
    assert (args.lr, args.epochs) == (1, 7)  # what is typed wins, wherever the recipe stands
    assert (args.typed, args.given) == (["lr", "use_amp"], ["data_path", "epochs", "lr", "use_amp"])
    assert not {"typed", "given", "notes", "defaults"} & set(vars(args))


@pytest.mark.parametrize(
    ("in_recipe", "typed", "flag", "value"),
    [
        ("--model_ema true --model_ema_decay 0.9", "--model_ema false", "model_ema_decay", [0.9999]),
        ("--save_ckpt_num 2", "", "save_ckpt_num", 10),
        ("--model_key model_ema --finetune a", "--resume b", "finetune", None),
        ("--model_key model_ema --finetune a", "--resume b", "model_key", "model|module"),
        ("--resume a", "--finetune b", "resume", None),
        ("--weight_decay_end 0.1", "--weight_decay 0", "weight_decay_end", None),
        ("--disable_eval true", "--eval true --finetune a", "disable_eval", False),
        ("--deploy true", "--switch_to_deploy a --finetune b", "deploy", False),
        ("--engine eager --compile true", "--eval --finetune a", "compile", False),
        ("--use_amp true --amp_dtype bf16", "--eval --finetune a --engine eager", "amp_dtype", None),
    ],
)
def test_a_recipes_value_that_has_no_effect_is_a_note(recipe, in_recipe, typed, flag, value):
    args = parse_args([recipe(in_recipe), "--data_path", "d", *typed.split()])
    assert getattr(args, flag) == value
    assert [note for note in args.notes if f"--{flag} " in note]
    assert flag not in args.given


def test_a_typed_flag_that_has_no_effect_is_an_error(recipe, capsys):
    for typed, in_recipe in (("--save_ckpt_num 2", ""), ("--model_ema_decay 0.9", "--model_ema false")):
        with pytest.raises(SystemExit):
            parse_args([recipe(in_recipe), "--data_path", "d", *typed.split()])
        assert typed.split()[0] in capsys.readouterr().err


def test_what_stands_in_a_recipe(recipe, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    args = parse_args([recipe("--data_path ~/data --use_amp\n--bce_loss", encoding="utf-8-sig"), "--output_dir=~/out"])
    assert (args.data_path, args.output_dir) == ("/home/someone/data", "/home/someone/out")
    assert args.use_amp
    assert args.bce_loss


def test_a_runs_args_give_the_run_again(recipe, tmp_path, capsys):
    commands = (
        "--data_path 'a folder' --model_ema --model_ema_decay 0.9 0.99 --model_prefix=-x --finetune f --aa none",
        "@recipes/vanillanet_6.args --data_path d --cutmix_minmax 0.2 0.8 --seed 7 --nb_classes 1000",
    )
    for command in commands:
        args = parse_args(shlex.split(command))
        save_args(args, tmp_path / "args.yaml")
        again = parse_args([f"@{tmp_path / 'args.yaml'}"])
        assert vars(again) == vars(args)
        assert again.given == args.given
        assert not again.typed
        assert not again.notes
    assert parse_args([f"@{tmp_path / 'args.yaml'}", "--seed", "8", "--data_path=e"]).seed == 8
    # It states every flag, so nothing of an earlier recipe is left; and a flag's old name still counts.
    assert vars(parse_args([recipe("--epochs 3 --drop 0.2"), f"@{tmp_path / 'args.yaml'}"])) == vars(args)
    # One from before it said what was given: what differs from its default.
    old = parse_args([recipe("{data_path: d, runtime: eager, eval: true, finetune: a, lr: 0.004}", name="args.yaml")])
    assert old.engine == "eager"
    assert old.given == ["data_path", "engine", "eval", "finetune"]
    for broken in ("[1, 2]", "a: [", "no_such_flag: 1"):
        with pytest.raises(SystemExit) as ended:
            parse_args([recipe(broken, name="args.yaml")])
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_what_was_typed_in_a_run_is_firm_in_its_args(recipe, tmp_path):
    """So that the size that was typed beside --finetune FILE wins over that of the file again."""
    save_args(parse_args(["--input_size", "48", recipe("--lr 2"), "--data_path", "d"]), tmp_path / "args.yaml")
    again = parse_args([f"@{tmp_path / 'args.yaml'}", "--epochs", "3"])
    assert again.chosen == ["data_path", "epochs", "input_size"]
    assert again.typed == ["epochs"]


def test_the_arguments_of_before_stay_on_a_full_disk(tmp_path):
    path = tmp_path / "args.yaml"
    save_args(parse_args(["--data_path", "d"]), path)
    before, limit = path.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(ValueError, match=r"cannot write .*args\.yaml.*kept"):
            save_args(parse_args(["--data_path", "e"]), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_flag_is_answered_with_the_one_that_is_meant(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--data_path", "d", "--modelema", "true"])
    assert capsys.readouterr().err == (
        "main.py: error: unrecognized arguments: --modelema true; did you mean --model_ema?\n"
    )


def test_the_ten_flags_that_people_need_come_first():
    helped = build_parser().format_help()
    assert re.findall(r"^  --(\w+)", helped, re.MULTILINE)[:10] == [
        "model", "data_path", "data_set", "batch_size", "epochs", "lr", "device", "output_dir", "finetune", "eval",
    ]  # fmt: skip
    assert len(helped.partition("--model")[0].splitlines()) < 12


# -- what all commands have in common

PARSERS = {
    "main.py": build_parser,
    "export.py": export.build_parser,
    "predict.py": predict.build_parser,
    "benchmark.py": benchmark.build_parser,
    "visualize.py": visualize.build_parser,
    "ablation.py": ablation.build_parser,
    "object_detection/main.py": object_detection.options.build_parser,
    "object_detection/benchmark.py": object_detection.benchmark.build_parser,
    "object_detection/make_garments.py": object_detection.make_garments.build_parser,
}
each_command = pytest.mark.parametrize("command", PARSERS)


def parsers_of(command):
    """The parser of a command, or those of its own commands."""
    parser = PARSERS[command]()
    commands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return list(commands[0].choices.values()) if commands else [parser]


@each_command
def test_every_flag_has_a_help_text_with_its_default(command):
    for parser in parsers_of(command):
        helped = " ".join(parser.format_help().split())
        assert "@FILE reads flags from a recipe" in helped
        for action in parser._actions:
            assert action.help, action
            if action.option_strings and not action.required and action.dest != "help":
                shown = " ".join((parser.formatter_class("x")._get_help_string(action) % vars(action)).split())
                assert shown.endswith("]"), action
                assert "[None]" not in shown, action


@each_command
def test_no_flag_may_be_abbreviated(command, capsys):
    for parser in parsers_of(command):
        for action in parser._actions:
            for flag in action.option_strings:
                if flag.startswith("--") and flag[:-1] not in parser._option_string_actions:
                    with pytest.raises(SystemExit):
                        parser.parse_args([f"{flag[:-1]}=1"])
                    assert "unrecognized" in (error := capsys.readouterr().err) or "required" in error


@each_command
def test_a_boolean_may_stand_bare(command):
    for parser in parsers_of(command):
        positional = [action for action in parser._actions if not action.option_strings]
        required = [token for action in parser._actions if action.required and action.option_strings
                    for token in (action.option_strings[0], "x.png")]  # fmt: skip
        names = [action.option_strings[0] for action in parser._actions if action.type is boolean]
        for name in names:
            for tokens, value in (([name], True), ([name, "false"], False), ([f"{name}=no"], False)):
                # In front of what has to follow, a bare flag does not take a file's name for its value.
                args, _ = parser.parse_known_args([*tokens, *(["file"] * len(positional)), *required])
                assert vars(args)[name.removeprefix("--")] is value
                assert all(
                    vars(args)[action.dest] in ("file", ["file"], Path("file"), [Path("file")]) for action in positional
                )


HEAVY = ("torch", "timm", "matplotlib", "numpy", "torchvision", "PIL")


@each_command
@pytest.mark.parametrize("arguments", ["--no_such_flag 1", "--help"])
def test_a_mistake_is_answered_before_the_libraries_are_imported(command, arguments):
    """By Python's own list of imports, in a process of its own."""
    if command == "object_detection/make_garments.py":
        pytest.skip("has no torch to wait for")
    program = ["-m", "object_detection.benchmark"] if command == "object_detection/benchmark.py" else [command]
    line = [sys.executable, "-X", "importtime", *program, *arguments.split()]
    ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    imported = {row.rpartition("|")[2].strip() for row in ended.stderr.splitlines() if row.startswith("import time:")}
    assert "argparse" in imported
    assert not imported & set(HEAVY)
    said = [row for row in ended.stderr.splitlines() if not row.startswith("import time:")]
    if arguments == "--help":
        assert (ended.returncode, said) == (0, [])
        assert "@FILE" in ended.stdout
    else:
        assert ended.returncode == 2
        assert len(said) == 1
