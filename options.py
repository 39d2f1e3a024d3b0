"""The command line: flags in groups, checks across flags, and `@recipes/name.args` files.

The published flags are a contract (a frozen list in the tests guards it). A flag that could have no effect in the given
combination is an error that names the flags, never ignored.
"""

import argparse
import math
import re
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from records.files import cannot_write, one_line
from runtimes import ENGINES, PRECISIONS

__all__ = [
    "COUNT",
    "FRACTION",
    "NONNEGATIVE",
    "POSITIVE",
    "WHOLE",
    "Parser",
    "Requirements",
    "add_training_flags",
    "boolean",
    "build_parser",
    "canonical",
    "check_training_flags",
    "number",
    "parse_args",
    "parse_checked",
    "plain_args",
    "save_args",
]


def boolean(text: str) -> bool:
    """A type for argparse: true or false, in the spellings that people use."""
    if text.lower() in ("true", "1", "yes", "on", "t", "y"):
        return True
    if text.lower() in ("false", "0", "no", "off", "f", "n"):
        return False
    raise argparse.ArgumentTypeError(f"true or false, not {text!r}")


def number(kind: type, *, low: float | None = None, high: float | None = None, above: float | None = None):
    """A type for argparse: a number in a range, whose message names the range."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"a number, not {text!r}") from None
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            raise argparse.ArgumentTypeError(
                f"a number from {low} to {high if high is not None else 'any'}, not {text}"
            )
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"a number above {above}, not {text}")
        return value

    return convert


COUNT = number(int, low=1, high=2**31 - 1)
WHOLE = number(int, low=0, high=2**31 - 1)
POSITIVE = number(float, above=0)
FRACTION = number(float, low=0, high=1)
NONNEGATIVE = number(float, low=0)


def canonical(token: str) -> str:
    """`--batch-size=64` -> `--batch_size=64`: flags are spelled with underscores, and dashes are accepted."""
    match = re.match(r"--[A-Za-z][\w-]*", token)
    if not match:
        return token
    return "--" + match.group(0)[2:].replace("-", "_") + token[match.end() :]


class Parser(argparse.ArgumentParser):
    """An error is one line on standard error and exit code 2; pass tokens through `canonical` first."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """A line of a recipe: flags and values as on the command line, `#` begins a comment."""
        return [canonical(token) for token in shlex.split(arg_line, comments=True)]

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `training.Run`, which every command that trains has; `set_defaults` gives them other defaults."""
    run = parser.add_argument_group("run")
    run.add_argument("--batch_size", type=COUNT, default=64, help="images per process and accumulation step")
    run.add_argument("--epochs", type=COUNT, default=300)
    run.add_argument("--early_stop_epochs", type=COUNT, help="end after so many epochs, with the schedules of --epochs")
    run.add_argument("--update_freq", type=COUNT, default=1, help="batches accumulated for one optimizer step")
    run.add_argument("--seed", type=number(int, low=0, high=2**63 - 1), default=0)
    run.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    run.add_argument("--num_workers", type=WHOLE, default=10, help="loader processes per process")
    run.add_argument("--pin_mem", type=boolean, default=True, help="page-locked batches, for a GPU")
    run.add_argument("--start_epoch", type=WHOLE, default=0, help="epoch to begin the schedules and data order at")

    ema = parser.add_argument_group("EMA")
    ema.add_argument("--model_ema", type=boolean, default=False, help="keep moving averages of the weights")
    ema.add_argument("--model_ema_decay", type=FRACTION, nargs="+", default=[0.9999], help="one average for each")
    ema.add_argument("--model_ema_force_cpu", type=boolean, default=False)
    ema.add_argument("--model_ema_eval", type=boolean, default=False, help="evaluate the averages, too")

    optimizer = parser.add_argument_group("optimizer")
    optimizer.add_argument("--opt", default="adamw", help="any of timm's optimizers")
    optimizer.add_argument("--opt_eps", type=POSITIVE, default=1e-8)
    optimizer.add_argument("--opt_betas", type=FRACTION, nargs="+")
    optimizer.add_argument("--clip_grad", type=POSITIVE, help="largest norm of the gradients")
    optimizer.add_argument("--momentum", type=FRACTION, default=0.9)
    optimizer.add_argument("--weight_decay", type=NONNEGATIVE, default=0.05)
    optimizer.add_argument("--lr", type=POSITIVE, default=4e-3)
    optimizer.add_argument("--layer_decay", type=number(float, above=0, high=1), default=1.0)

    checkpoints = parser.add_argument_group("checkpoints")
    checkpoints.add_argument("--finetune", metavar="FILE", help="weights to begin with, or to evaluate or deploy")
    checkpoints.add_argument(
        "--model_key", default="model|module", help="of the weights in --finetune; | separates alternatives"
    )
    checkpoints.add_argument("--model_prefix", default="", help="of the names in --finetune")
    checkpoints.add_argument("--resume", metavar="FILE", help="checkpoint to go on from")
    checkpoints.add_argument(
        "--resume_new_sched", action="store_true", help="resume under schedules other than the checkpoint's"
    )
    checkpoints.add_argument(
        "--auto_resume", type=boolean, default=False, help="resume the newest valid of --output_dir"
    )
    checkpoints.add_argument("--save_ckpt", type=boolean, default=True)
    checkpoints.add_argument("--save_ckpt_freq", type=COUNT, default=1, help="epochs between checkpoints")
    checkpoints.add_argument("--save_ckpt_steps", type=WHOLE, default=0, help="steps between them; 0: epochs only")
    checkpoints.add_argument("--save_ckpt_num", type=COUNT, default=10, help="how many of the newest to keep")
    checkpoints.add_argument("--output_dir", help="folder of checkpoints, logs and curves")
    checkpoints.add_argument("--log_dir", help="folder of TensorBoard events [OUTPUT_DIR/tensorboard]")

    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--eval", type=boolean, default=False, help="evaluate --finetune, train nothing")
    evaluation.add_argument("--disable_eval", type=boolean, default=False, help="train without evaluating")
    evaluation.add_argument("--test_freq", type=COUNT, default=20, help="epochs between evaluations")
    evaluation.add_argument("--test_epoch", type=WHOLE, default=260, help="evaluate every epoch from there on")

    processes = parser.add_argument_group("processes")
    processes.add_argument("--world_size", type=COUNT, help="checked against the launcher, which sets it")
    processes.add_argument("--local_rank", type=int, help="for launchers that pass it as a flag")
    processes.add_argument(
        "--dist_on_itp", type=boolean, nargs="?", const=True, default=False, help="ranks from OpenMPI"
    )
    processes.add_argument("--dist_url", default="env://")
    processes.add_argument("--dist_timeout", type=COUNT, default=1800, help="seconds to wait for another process")
    processes.add_argument("--sync_bn", type=boolean, default=False, help="BatchNorm over all processes' batches")

    precision = parser.add_argument_group("precision and logging")
    precision.add_argument("--use_amp", type=boolean, default=False, help="autocast")
    precision.add_argument("--amp_dtype", choices=("bf16", "fp16"), help="[fp16 on a GPU, bf16 on the CPU]")
    precision.add_argument("--channels_last", type=boolean, default=False, help="memory format of images and weights")
    precision.add_argument("--log_freq", type=COUNT, default=10, help="steps between log lines")
    precision.add_argument("--enable_wandb", type=boolean, default=False, help="log to Weights & Biases")
    precision.add_argument("--wandb_ckpt", type=boolean, default=False, help="upload the last checkpoint there")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="main.py",
        description="Train, evaluate (--eval true) or deploy (--switch_to_deploy FILE) VanillaNet.",
        fromfile_prefix_chars="@",
        epilog="@FILE reads flags from a recipe; what follows it on the command line wins.",
    )

    add_training_flags(parser)

    deep = parser.add_argument_group("deep training")
    deep.add_argument("--decay_epochs", type=WHOLE, default=100, help="epochs until lambda is 1; 0: always 1")
    deep.add_argument("--decay_linear", type=boolean, default=True, help="false: half a cosine")
    deep.add_argument(
        "--restart_decay",
        type=boolean,
        default=False,
        help="with --finetune: begin the ramp at 0 again instead of at the checkpoint's lambda",
    )

    model = parser.add_argument_group("model")
    model.add_argument("--model", default="vanillanet_5", help="a VanillaNet variant or any timm model")
    model.add_argument("--act_num", type=WHOLE, default=3, help="n of the series activation")
    model.add_argument("--drop", type=FRACTION, default=0.0, help="dropout before the classifier")
    model.add_argument("--input_size", type=COUNT, default=224, help="pixels")
    model.add_argument("--width_mult", type=POSITIVE, help="factor on the channels [the variant's own]")
    model.add_argument("--deploy", type=boolean, default=False, help="the network in --finetune is in deploy form")
    model.add_argument(
        "--switch_to_deploy", metavar="FILE", help="fuse --finetune, compare, evaluate and write to FILE"
    )

    schedules = parser.add_argument_group("schedules")
    schedules.add_argument("--weight_decay_end", type=NONNEGATIVE, help="its value at the end of half a cosine")
    schedules.add_argument("--min_lr", type=NONNEGATIVE, default=1e-6)
    schedules.add_argument("--warmup_epochs", type=WHOLE, default=5)
    schedules.add_argument("--warmup_steps", type=int, default=-1, help="wins over --warmup_epochs if above 0")
    schedules.add_argument("--layer_decay_num_layers", type=COUNT, default=4, help="checked if given: the model knows")

    teacher = parser.add_argument_group("distillation")
    teacher.add_argument(
        "--teacher",
        metavar="MODEL",
        help="to learn from: a timm model or VanillaNet variant, hf-hub:OWNER/NAME, local-dir:FOLDER, or a checkpoint "
        "that records its model",
    )
    teacher.add_argument("--teacher_weights", metavar="FILE", help="its checkpoint [the pretrained weights of timm]")
    teacher.add_argument("--teacher_key", default="model_ema|model", help="key of the weights in the teacher's file")
    teacher.add_argument(
        "--distill_alpha", type=FRACTION, default=0.5, help="the teacher's share of the loss; see docs/training.md"
    )
    teacher.add_argument("--distill_tau", type=POSITIVE, default=1.0, help="temperature")

    augmentation = parser.add_argument_group("augmentation")
    augmentation.add_argument("--color_jitter", type=NONNEGATIVE, default=0.4, help="without --aa only")
    augmentation.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="timm's auto-augment policy; none: off")
    augmentation.add_argument("--smoothing", type=FRACTION, default=0.1)
    augmentation.add_argument(
        "--train_interpolation", default="bicubic", choices=("random", "bilinear", "bicubic", "lanczos", "nearest")
    )
    augmentation.add_argument("--reprob", type=FRACTION, default=0.25, help="probability of random erasing")
    augmentation.add_argument("--remode", default="pixel", choices=("const", "rand", "pixel"))
    augmentation.add_argument("--recount", type=COUNT, default=1)
    augmentation.add_argument("--resplit", type=boolean, default=False)
    augmentation.add_argument("--mixup", type=NONNEGATIVE, default=0.8)
    augmentation.add_argument("--cutmix", type=NONNEGATIVE, default=1.0)
    augmentation.add_argument("--cutmix_minmax", type=FRACTION, nargs=2, metavar=("MIN", "MAX"))
    augmentation.add_argument("--mixup_prob", type=FRACTION, default=1.0)
    augmentation.add_argument("--mixup_switch_prob", type=FRACTION, default=0.5)
    augmentation.add_argument("--mixup_mode", default="batch", choices=("batch", "pair", "elem"))
    augmentation.add_argument(
        "--bce_loss", type=boolean, nargs="?", const=True, default=False, help="binary cross-entropy over the classes"
    )
    augmentation.add_argument("--bce_target_thresh", type=FRACTION)

    data = parser.add_argument_group("data")
    data.add_argument("--data_path", help="folder of the data set, with train/ and val/ for folders of images")
    data.add_argument("--eval_data_path", help="the validation folder itself, if it is elsewhere")
    data.add_argument(
        "--data_set", default="IMNET", help="IMNET, image_folder, CIFAR, FMNIST, or a name of timm's create_dataset"
    )
    data.add_argument("--nb_classes", type=COUNT, default=1000, help="checked if given: the data know")
    data.add_argument("--imagenet_default_mean_and_std", type=boolean, default=True, help="false: 0.5 for all")
    data.add_argument("--crop_pct", type=number(float, above=0, high=1), help="[0.875 below 384 px, 1 from there]")
    data.add_argument("--real_labels", metavar="FILE", help="ImageNet-ReaL's real.json")
    data.add_argument("--skip_broken_eval", type=boolean, default=False, help="leave broken validation images out")

    further = parser.add_argument_group("further")
    further.add_argument("--dist_eval", type=boolean, default=True, help="false: on rank 0 alone")
    further.add_argument("--compile", type=boolean, default=False, help="torch.compile the network")

    deployed = parser.add_argument_group("what is deployed")
    deployed.add_argument(
        "--runtime", choices=sorted(ENGINES), help="evaluate the fused network, or an exported file, in this engine"
    )
    deployed.add_argument(
        "--precision", choices=PRECISIONS, help="of --runtime [fp32, or the file's]; int8 needs training images"
    )
    return parser


class Requirements:
    """Rejects flags that were given where they cannot do anything; called `needs` by those who ask it.

    Args:
        args: the parsed flags.
        given: those of them that were written out, in the command or a recipe.
    """

    def __init__(self, args: argparse.Namespace, given: Collection[str]):
        self.args, self.given = args, given

    def __call__(self, flag: str, condition: object, mend: str) -> None:
        """Raises ValueError if `flag` was given, asks for something, and `condition` does not hold."""
        if flag in self.given and getattr(self.args, flag) not in (False, None) and not condition:
            raise ValueError(f"--{flag} has no effect here; {mend}")


def check_training_flags(args: argparse.Namespace, needs: Requirements, *, exports: bool = False) -> None:
    """The checks of what `add_training_flags` adds, with --deploy and --switch_to_deploy. Raises ValueError, a line.

    Args:
        exports: the command neither trains nor evaluates, but writes the network in another format.
    """
    evaluates = args.eval or args.switch_to_deploy is not None
    for flag in ("model_ema_decay", "model_ema_force_cpu", "model_ema_eval"):
        needs(flag, args.model_ema, "add --model_ema true")
    needs("amp_dtype", args.use_amp, "add --use_amp true")
    needs("wandb_ckpt", args.enable_wandb, "add --enable_wandb true")
    needs("wandb_ckpt", args.save_ckpt and args.output_dir, "it needs --save_ckpt true and --output_dir")
    needs("resume_new_sched", args.resume or args.auto_resume, "add --resume or --auto_resume true")
    for flag in ("auto_resume", "save_ckpt_freq", "save_ckpt_steps", "save_ckpt_num"):
        needs(flag, args.output_dir, "add --output_dir")
    for flag in ("save_ckpt_freq", "save_ckpt_steps", "save_ckpt_num"):
        needs(flag, args.save_ckpt, "--save_ckpt is false")
    needs("start_epoch", not args.resume, "a resumed run goes on where it was; leave it out")
    for flag in ("model_key", "model_prefix"):
        needs(flag, args.finetune, "add --finetune")
    needs("deploy", evaluates or exports, "a deploy form has nothing left to train; add --eval true")
    if evaluates and not (args.finetune or args.resume):
        raise ValueError("--eval and --switch_to_deploy need the weights: add --finetune FILE")
    if args.finetune and args.resume:
        raise ValueError("--finetune and --resume exclude each other: one begins with weights, the other goes on")
    if args.switch_to_deploy is not None and args.deploy:
        raise ValueError("--switch_to_deploy fuses a train form, --deploy true says that it is fused already: drop one")
    if args.eval and args.disable_eval:
        raise ValueError("--eval true and --disable_eval true exclude each other")
    if len(set(args.model_ema_decay)) < len(args.model_ema_decay):
        raise ValueError("--model_ema_decay names the same decay twice")


def _check(args: argparse.Namespace, needs: Requirements) -> None:
    """Reject combinations in which a flag that was given cannot do anything. Raises ValueError, a line naming them."""
    needs("resplit", False, "it belongs to augmentation in splits, which is not done; leave --resplit out")
    needs("bce_target_thresh", args.bce_loss, "add --bce_loss")
    needs("layer_decay_num_layers", args.layer_decay < 1, "add --layer_decay")
    cuts = args.cutmix > 0 or args.cutmix_minmax is not None
    for flag in ("mixup_prob", "mixup_mode"):
        needs(flag, args.mixup > 0 or cuts, "--mixup and --cutmix are 0")
    needs("mixup_switch_prob", args.mixup > 0 and cuts, "it chooses between --mixup and --cutmix, and one is 0")
    needs("decay_linear", args.decay_epochs > 0, "--decay_epochs is 0, so there is no ramp")
    needs("real_labels", not args.disable_eval, "--disable_eval is true")
    for flag in ("remode", "recount"):
        needs(flag, args.reprob > 0, "--reprob is 0")
    jitters = args.aa.lower() in ("", "none") or "3a" in args.aa  # timm's three-augment policies bring none
    needs("color_jitter", jitters, "it is replaced by --aa; add --aa none")
    for flag in ("teacher_weights", "distill_alpha", "distill_tau"):
        needs(flag, args.teacher, "add --teacher")
    teacher_file = args.teacher_weights or (args.teacher and Path(args.teacher).is_file())
    needs("teacher_key", teacher_file, "add --teacher_weights")
    needs("restart_decay", args.finetune, "add --finetune")
    needs("compile", args.switch_to_deploy is None, "--switch_to_deploy compares the forms uncompiled")
    needs("runtime", args.eval, "add --eval true")
    needs("precision", args.runtime, "add --runtime")
    # Precision and memory format are the runtime's too, but recipes set those of training.
    needs("compile", args.runtime is None, "--runtime compile does that")
    check_training_flags(args, needs)
    if args.weight_decay_end is not None and args.weight_decay == 0:
        raise ValueError("--weight_decay_end has no effect with --weight_decay 0")
    if not args.data_path and not ((args.eval or args.switch_to_deploy is not None) and args.eval_data_path):
        raise ValueError("--data_path is missing")


def parse_checked(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    check: Callable[[argparse.Namespace, Requirements], None],
) -> argparse.Namespace:
    """Parse a command, the process's own for None, and check it; `args.given` holds the flags that were written out.

    Errors, also a ValueError of `check`, end the process with exit code 2 and one line on standard error.
    """
    argv = [canonical(token) for token in (sys.argv[1:] if argv is None else argv)]
    try:
        args = parser.parse_args(argv)
    except (ValueError, RecursionError) as error:  # argparse itself knows of files that are missing
        recipes = ", ".join(token[1:] for token in argv if token.startswith("@"))
        cause = "it reads itself" if isinstance(error, RecursionError) else error
        parser.error(f"cannot read the recipe {recipes}: {cause}")
    # Parsed once more without defaults, which leaves just what was written out.
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser._defaults.clear()  # those of set_defaults
    given = set(vars(parser.parse_args(argv)))
    try:
        check(args, Requirements(args, given))
    except ValueError as error:
        parser.error(str(error))
    args.given = sorted(given)
    return args


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of main.py; see `parse_checked`."""
    return parse_checked(build_parser(), argv, _check)


def plain_args(args: argparse.Namespace) -> dict[str, Any]:
    """The flags and their values, for a checkpoint or file."""
    return {name: value for name, value in vars(args).items() if name != "given"}


def save_args(args: argparse.Namespace, path: Path) -> None:
    """Write the arguments, all of them, as YAML."""
    text = yaml.safe_dump(plain_args(args), sort_keys=True)
    try:
        path.write_text(text)
    except OSError as error:
        raise ValueError(cannot_write(path, error)) from error
