"""The command line: flags in groups, checks across flags, and `@recipes/name.args` files.

The published flags are a contract, which a frozen list in the tests guards. A typed flag that cannot have an effect in
the given combination is an error that names the flags; if only a recipe sets the flag, a line in the log says so.

Importing torch takes seconds, so every command parses its flags first, and nothing imported here imports torch.
"""

import argparse
import difflib
import logging
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from records.files import one_line, replacing, writing
from runtimes import ENGINES, PRECISIONS

logger = logging.getLogger(__name__)

RECIPES = (
    "@FILE reads flags from a recipe: a text file of flags and values, in which # begins a comment, or the args.yaml "
    "of an earlier run. A flag typed on the command line wins over a recipe's. A flag that is true or false may stand "
    "bare: --NAME is --NAME true."
)


# -- types for argparse; the help shows a type's `metavar`


BOOLEANS = dict.fromkeys(("true", "1", "yes", "on", "t", "y"), True)
BOOLEANS |= dict.fromkeys(("false", "0", "no", "off", "f", "n"), False)


def boolean(text: str) -> bool:
    """A type for argparse: true or false, in the usual spellings."""
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return BOOLEANS[text.lower()]


boolean.metavar = "true|false"


def number(kind: type, *, low: float | None = None, high: float | None = None, above: float | None = None):
    """Return a type for argparse: a number in a range. Its error message names the range."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"a number, not {text!r}") from None
        too_low = (low is not None and value < low) or (above is not None and value <= above)
        if too_low or (high is not None and value > high) or not math.isfinite(value):
            least = f"from {low}" if above is None else f"above {above}"
            most = "" if high is None else f" up to {high}"
            raise argparse.ArgumentTypeError(f"a finite number {least}{most}, not {text}")
        return value

    convert.metavar = "N" if kind is int else "X"
    return convert


def stages(text: str) -> int | str:
    """A type for argparse: a number of stages, or all."""
    return text if text == "all" else WHOLE(text)


stages.metavar = "N|all"


def file_path(text: str) -> str:
    """A type for argparse: the path of a file or folder, in which `~` is the user's home.

    The shell does not expand `~` in `--flag=~/x`, and it never sees the text of a recipe.
    """
    return os.path.expanduser(text)


def path(text: str) -> Path:
    """A type for argparse: like `file_path`, but returns a pathlib path."""
    return Path(file_path(text))


def picture(*suffixes: str) -> Callable[[str], Path]:
    """Return a type for argparse: the path of a picture, in a format that its name tells."""

    def parse(text: str) -> Path:
        if not text.lower().endswith(suffixes):
            raise argparse.ArgumentTypeError(f"a name that ends in {' or '.join(suffixes)}, not {text}")
        return path(text)

    parse.metavar = "FILE.png"
    return parse


drawing, photograph = picture(".png", ".jpg", ".pdf", ".svg"), picture(".png", ".jpg", ".pdf")
file_path.metavar = path.metavar = "PATH"

COUNT = number(int, low=1, high=2**31 - 1)
WHOLE = number(int, low=0, high=2**31 - 1)
POSITIVE = number(float, above=0)
FRACTION = number(float, low=0, high=1)
NONNEGATIVE = number(float, low=0)
SHARE = number(float, above=0, high=1)


# -- parsing


class Arguments(argparse.Namespace):
    """The values of all flags, and where they come from. `vars` shows the values only.

    Attributes:
        typed: sorted names of the flags on the command line itself.
        given: sorted names of the flags on the command line or in a recipe.
        defaults: default values of all flags.
        repeated: of those, the flags that were typed in the run whose args.yaml is read.
        notes: lines for the log about flags that a recipe sets without effect.
    """

    __slots__ = ("defaults", "given", "notes", "repeated", "typed")

    def __init__(self, **values):
        super().__init__(**values)
        self.defaults, self.given, self.notes, self.repeated, self.typed = {}, [], [], [], []

    @property
    def chosen(self) -> list[str]:
        """Names of flags that a user typed, here or in the run whose args.yaml is read, which no file overrules."""
        return sorted({*self.typed, *self.repeated})

    def pick(self, *flags: str) -> dict[str, Any]:
        """Return the values of some flags as a dict of keyword arguments."""
        return {flag: getattr(self, flag) for flag in flags}

    def moot(self, flag: str, message: str) -> None:
        """Report a flag without effect: a ValueError if the flag was typed, a line in the log if a recipe set it."""
        if flag in self.typed:
            raise ValueError(message)
        note = f"--{flag} of a recipe is passed over: {message}"
        if flag in self.given and note not in self.notes:
            self.notes.append(note)
            logger.info("%s", note)

    def _asks(self, flag: str) -> bool:
        """Whether the flag asks for something: 0 and false do so only where they are not the default."""
        value, default = getattr(self, flag), self.defaults[flag]
        return value is not None and (bool(value) or (default != 0 and default is not True))

    def needs(self, flags: str, condition: object, mend: str) -> None:
        """Call `pass_over` for each flag that asks for something, unless `condition` holds.

        `flags` names one or more flags, separated by spaces.
        """
        for flag in flags.split():
            if self._asks(flag) and not condition:
                self.pass_over(flag, f"--{flag} has no effect here; {mend}")

    def excludes(self, first: str, second: str) -> None:
        """Raise ValueError if both flags ask for something; if only one was typed, reset the other to its default."""
        if not (self._asks(first) and self._asks(second)):
            return
        if (first in self.typed) == (second in self.typed):
            raise ValueError(f"--{first} and --{second} exclude each other: drop one")
        winner, loser = (first, second) if first in self.typed else (second, first)
        self.pass_over(loser, f"--{loser} has no effect beside --{winner}")

    def pass_over(self, flag: str, message: str) -> None:
        """Report a flag like `moot`, then reset it to its default, as if the recipe had not set it."""
        self.moot(flag, message)
        setattr(self, flag, self.defaults[flag])
        self.given = [name for name in self.given if name != flag]


class _Help(argparse.HelpFormatter):
    """Shows the default of every flag, unless the flag's help text already states a default in brackets."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action: argparse.Action) -> str:
        if not action.option_strings or action.required or action.help.endswith("]") or action.dest == "help":
            return action.help
        default = action.default
        if default is None or default == []:
            default = "none"
        elif isinstance(default, bool):
            default = str(default).lower()
        elif isinstance(default, list):
            default = " ".join(map(str, default))
        return f"{action.help} [{default}]"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return getattr(action.type, "metavar", super()._get_default_metavar_for_optional(action))


def canonical(token: str) -> str:
    """`--batch-size=64` -> `--batch_size=64`: flags are spelled with underscores, and dashes are accepted."""
    return re.sub(r"^--[A-Za-z][\w-]*", lambda flag: "--" + flag[0][2:].replace("-", "_"), token)


class Parser(argparse.ArgumentParser):
    """A parser with recipes, bare booleans and dashes in flags. Errors are one line on stderr and exit code 2.

    Args:
        check: checks the parsed arguments; its ValueError is such an error.
        launched: the command continues with `utils.launch`, which logs the notes on the first process.
    """

    def __init__(self, *, check: Callable[[Arguments], None] = lambda args: None, launched: bool = False, **options):
        self.check, self.launched = check, launched
        super().__init__(**{"epilog": RECIPES, "formatter_class": _Help, "allow_abbrev": False, **options})

    def format_help(self) -> str:
        """Format the help as argparse does, but with a usage line that names only the required arguments."""
        if not self._subparsers:
            needed = [action for action in self._actions if action.required]
            usage = argparse.HelpFormatter(self.prog, width=1000)
            usage.add_usage(None, needed, groups=(), prefix="")
            self.usage = f"{usage.format_help().strip()} [@FILE ...] [--FLAG VALUE ...]"
        return super().format_help()

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> Arguments:
        """Parse as argparse does; the error for an unknown flag also suggests the most similar flag."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            similar = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        try:
            self.check(found)
        except ValueError as error:
            self.error(str(error))
        if not self.launched:
            sys.stderr.writelines(f"{self.prog}: {note}\n" for note in found.notes)
        return found

    def parse_known_args(self, args=None, namespace=None):
        tokens = [canonical(token) for token in (sys.argv[1:] if args is None else args)]
        namespace = namespace or Arguments()
        if self._subparsers:  # the subcommand's own parser reads the recipes
            return super().parse_known_args(tokens, namespace)

        # Flags of recipes come first, so that typed flags win.
        recipes: list[str] = []
        self._repeated: list[str] = []
        for token in tokens:
            if token.startswith("@"):
                self._read_recipe(token[1:], recipes)
        typed = self._with_values([token for token in tokens if not token.startswith("@")])
        recipes = self._with_values(recipes)
        found, unknown = super().parse_known_args([*recipes, *typed], namespace)

        # The checks need to know where each value comes from.
        found.defaults = {action.dest: self.get_default(action.dest) for action in self._actions}
        found.typed, found.repeated = sorted(self._flags_of(typed)), self._repeated
        found.given = sorted(self._flags_of(recipes) | self._flags_of(typed))
        return found, unknown

    def _flags_of(self, tokens: Sequence[str]) -> set[str]:
        actions = (self._option_string_actions.get(token.split("=")[0]) for token in tokens)
        return {action.dest for action in actions if action is not None}

    def _with_values(self, tokens: Sequence[str]) -> list[str]:
        """Join each boolean flag to its value: `--use_amp` and `--use_amp true` -> `--use_amp=true`.

        If the parser has positional arguments, only a spelling of true or false counts as the flag's value.
        """
        positional = any(not action.option_strings for action in self._actions)
        found: list[str] = []
        rest = list(reversed(tokens))
        while rest:
            token = rest.pop()
            action = self._option_string_actions.get(token)
            if action is not None and action.type is boolean:
                has_value = (
                    rest and not rest[-1].startswith("-") and not (positional and rest[-1].lower() not in BOOLEANS)
                )
                token += f"={rest.pop()}" if has_value else "=true"
            found.append(token)
        return found

    def _read_recipe(self, file: str, found: list[str], inside: tuple[str, ...] = ()) -> None:
        """Append a recipe's flags and values to `found`; a run's args.yaml sets all flags, so it replaces `found`."""
        file = file_path(file)
        try:
            if file in inside:
                raise ValueError("it reads itself")
            text = Path(file).read_text(encoding="utf-8-sig")
            if file.endswith((".yaml", ".yml")):
                found[:] = self._tokens_of(yaml.safe_load(text))
                return
            tokens = [token for line in text.splitlines() for token in shlex.split(line, comments=True)]
        except (OSError, ValueError, yaml.YAMLError) as error:
            cause = error.strerror if isinstance(error, OSError) else error
            self.error(f"cannot read the recipe {file}: {cause}")
        for token in tokens:
            if token.startswith("@"):
                self._read_recipe(token[1:], found, (*inside, file))
            else:
                found.append(canonical(token))

    def _tokens_of(self, values: Any) -> list[str]:
        """Return the flags and values of an args.yaml, except flags that were not given and are at their defaults."""
        if not isinstance(values, dict):
            raise ValueError("it is no args.yaml of a run")
        given = values.pop("given", None) or ()
        self._repeated = list(values.pop("typed", None) or ())
        found: list[str] = []
        for flag, value in values.items():
            if value is None or (value == self.get_default(flag) and flag not in given):
                continue
            found += [f"--{flag}", *map(str, value)] if isinstance(value, list) else [f"--{flag}={value}"]
        return found


# -- flags


def add_training_flags(parser: argparse.ArgumentParser, first: Any) -> None:
    """Add the flags of every command that trains. A command can change their defaults with `set_defaults`.

    Args:
        first: the group of flags that most runs need, which the help shows first.
    """
    add = first.add_argument
    add("--batch_size", type=COUNT, default=64, help="number of images in a batch of each process")
    add("--epochs", type=COUNT, default=300, help="number of epochs to train")
    add("--lr", type=POSITIVE, default=4e-3, help="learning rate at the end of the warm-up")
    add("--device", default="cuda", help="device to compute on: cuda, cuda:N, mps or cpu")
    add("--output_dir", type=file_path, help="folder to write checkpoints, logs and curves to [nothing is kept]")
    add("--finetune", type=file_path, help="checkpoint to start from, evaluate or deploy; main.py also takes a name")
    add("--eval", type=boolean, default=False, help="evaluate --finetune instead of training")

    add = parser.add_argument_group("run").add_argument
    add("--early_stop_epochs", type=COUNT, help="stop after this many epochs, with the schedules of --epochs [never]")
    add("--update_freq", type=COUNT, default=1, help="number of batches to accumulate for one optimizer step")
    kept = ("none", "activations", "full")
    add("--grad_checkpointing", choices=kept, default="none", help="what the backward pass recomputes to save memory")
    add("--seed", type=number(int, low=0, high=2**63 - 1), default=0, help="seed of all random numbers")
    add("--num_workers", type=WHOLE, default=10, help="number of loader processes of each process")
    add("--pin_mem", type=boolean, default=True, help="load into page-locked memory, which a GPU reads faster")
    add("--start_epoch", type=WHOLE, default=0, help="epoch to start the schedules and the order of the data at")

    add = parser.add_argument_group("EMA").add_argument
    add("--model_ema", type=boolean, default=False, help="keep exponential moving averages of the weights")
    add("--model_ema_decay", type=FRACTION, nargs="+", default=[0.9999], help="decay per step, of one average for each")
    add("--model_ema_force_cpu", type=boolean, default=False, help="keep the averages in CPU memory")
    add("--model_ema_eval", type=boolean, default=False, help="evaluate the averages as well")

    add = parser.add_argument_group("optimizer").add_argument
    add("--opt", default="adamw", help="name of an optimizer in timm")
    add("--opt_eps", type=POSITIVE, default=1e-8, help="epsilon of the optimizer, if it has one")
    add("--opt_betas", type=FRACTION, nargs="+", help="betas of the optimizer [its own defaults]")
    add("--momentum", type=FRACTION, default=0.9, help="momentum of the optimizer, if it has one")
    add("--clip_grad", type=POSITIVE, help="norm to scale larger gradients down to [no clipping]")
    add("--weight_decay", type=NONNEGATIVE, default=0.05, help="weight decay, except on biases and BatchNorms")
    add("--layer_decay", type=SHARE, default=1.0, help="factor on the learning rate from each layer to the one below")

    add = parser.add_argument_group("checkpoints").add_argument
    add("--model_key", default="model|module", help="key of the weights in --finetune; a | separates alternatives")
    add("--model_prefix", default="", help="load the names in --finetune that start with this prefix [all]")
    add("--resume", type=file_path, help="checkpoint of the run to continue [none]")
    add("--resume_new_sched", type=boolean, default=False, help="resume with other schedules than the checkpoint's")
    add("--auto_resume", type=boolean, default=False, help="resume from the newest intact checkpoint in --output_dir")
    add("--save_ckpt", type=boolean, default=True, help="save checkpoints in --output_dir")
    add("--save_ckpt_freq", type=COUNT, default=1, help="number of epochs between checkpoints")
    add("--save_ckpt_steps", type=WHOLE, default=0, help="number of optimizer steps between checkpoints; 0: none")
    add("--save_ckpt_num", type=COUNT, default=10, help="number of checkpoints to keep, the newest ones")
    add("--log_dir", type=file_path, help="folder to write TensorBoard events to [OUTPUT_DIR/tensorboard]")

    add = parser.add_argument_group("evaluation").add_argument
    add("--disable_eval", type=boolean, default=False, help="train without evaluating")
    add("--test_freq", type=COUNT, default=20, help="number of epochs between evaluations")
    add("--test_epoch", type=WHOLE, default=260, help="epoch from which on every epoch is evaluated")
    add("--skip_broken_eval", type=boolean, default=False, help="leave out validation images that cannot be read")

    add = parser.add_argument_group("processes").add_argument
    add("--world_size", type=COUNT, help="number of processes that must have been started [any]")
    add("--local_rank", type=int, help="rank on this machine, if the launcher passes it as a flag")
    add("--dist_on_itp", type=boolean, default=False, help="take the ranks from OpenMPI's variables")
    add("--dist_url", default="env://", help="where the processes meet: env:// or tcp://HOST:PORT")
    add("--dist_timeout", type=COUNT, default=1800, help="how long to wait for another process, in seconds")
    add("--sync_bn", type=boolean, default=False, help="compute BatchNorm over the batches of all GPUs")

    add = parser.add_argument_group("precision and logging").add_argument
    add("--use_amp", type=boolean, default=False, help="compute in half precision (autocast)")
    add("--amp_dtype", choices=("bf16", "fp16"), help="half precision of --use_amp [fp16 on cuda, otherwise bf16]")
    add("--channels_last", type=boolean, default=False, help="use the channels-last format, faster on a CPU")
    add("--log_freq", type=COUNT, default=10, help="number of optimizer steps between lines of the log")
    add("--enable_wandb", type=boolean, default=False, help="log to Weights & Biases")
    add("--wandb_project", default="vanillanet", help="project of the run at Weights & Biases")
    add("--wandb_name", help="name of the run at Weights & Biases [a generated one]")
    add("--wandb_ckpt", type=boolean, default=False, help="upload the last checkpoint to Weights & Biases")


def build_parser() -> Parser:
    description = "Train, evaluate (--eval true) or deploy (--switch_to_deploy FILE) VanillaNet."
    parser = Parser(prog="main.py", description=description, check=_check, launched=True)
    first = parser.add_argument_group("what most runs need")
    add = first.add_argument
    add("--model", default="vanillanet_5", help="a VanillaNet variant or any timm model")
    add("--data_path", type=file_path, help="folder of the data set; for IMNET one with train/ and val/")
    add("--data_set", default="IMNET", help="IMNET, image_folder, CIFAR, FMNIST or a name of timm's create_dataset")
    add_training_flags(parser, first)

    add = parser.add_argument_group("deep training").add_argument
    add("--decay_epochs", type=WHOLE, default=100, help="epochs in which lambda rises to 1; 0: no deep training")
    add("--decay_linear", type=boolean, default=True, help="raise lambda linearly; false: by half a cosine")
    add("--restart_decay", type=boolean, default=False, help="start lambda at 0, not at the value in --finetune")

    add = parser.add_argument_group("model").add_argument
    add("--keep_classifier", type=boolean, default=False, help="keep the classifier of --finetune for other classes")
    add("--freeze_stages", type=stages, help="freeze the stem and this many stages; all: train the classifier [none]")
    add("--act_num", type=WHOLE, default=3, help="n of the series activation, whose kernel has 2n+1 x 2n+1 taps")
    add("--drop", type=FRACTION, default=0.0, help="probability of dropout before the classifier")
    add("--input_size", type=COUNT, default=224, help="height and width of the images in pixels")
    add("--width_mult", type=POSITIVE, help="factor on the number of channels [the variant's own]")
    add("--deploy", type=boolean, default=False, help="the network in --finetune is already in deploy form")
    add("--switch_to_deploy", type=file_path, help="fuse --finetune, compare both forms, and write this file")

    add = parser.add_argument_group("schedules").add_argument
    add("--warmup_epochs", type=WHOLE, default=5, help="number of epochs of linear warm-up from 0")
    add("--warmup_steps", type=int, default=-1, help="number of warm-up steps; above 0 it replaces --warmup_epochs")
    add("--min_lr", type=NONNEGATIVE, default=1e-6, help="learning rate at the end of the cosine schedule")
    add("--weight_decay_end", type=NONNEGATIVE, help="weight decay at the end of a cosine schedule [constant]")
    add("--layer_decay_num_layers", type=COUNT, default=4, help="number of stages that the network must have, if given")

    add = parser.add_argument_group("distillation").add_argument
    add("--teacher", type=file_path, help="network to learn from: a name, a hub address or a checkpoint")
    add("--teacher_weights", type=file_path, help="checkpoint of --teacher [timm's pretrained weights]")
    add("--teacher_key", default="model_ema|model", help="key of the weights in the teacher's checkpoint")
    add("--distill_alpha", type=FRACTION, default=0.5, help="share of the teacher's part in the loss")
    add("--distill_tau", type=POSITIVE, default=1.0, help="temperature of the softmax of teacher and student")

    add = parser.add_argument_group("augmentation").add_argument
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm's auto-augment policy; none: off")
    add("--color_jitter", type=NONNEGATIVE, default=0.4, help="strength of color jitter, with --aa none")
    sizes = "resize images to --input_size; false: pad and crop [false for CIFAR and FMNIST up to 32 px, else true]"
    add("--resize", type=boolean, help=sizes)
    pair = {"nargs": 2, "metavar": ("MIN", "MAX")}
    add("--scale", type=POSITIVE, default=[0.08, 1.0], help="range of a crop's share of the image's area", **pair)
    add("--ratio", type=POSITIVE, default=[3 / 4, 4 / 3], help="range of a crop's width divided by its height", **pair)
    add("--hflip", type=FRACTION, default=0.5, help="probability of mirroring an image left to right")
    add("--vflip", type=FRACTION, default=0.0, help="probability of mirroring an image top to bottom")
    add("--smoothing", type=FRACTION, default=0.1, help="label smoothing")
    filters = ("random", "bilinear", "bicubic", "lanczos", "nearest")
    add("--train_interpolation", default="bicubic", choices=filters, help="interpolation of random-resized crops")
    add("--reprob", type=FRACTION, default=0.25, help="probability of random erasing")
    fillings = ("const", "rand", "pixel")
    add("--remode", default="pixel", choices=fillings, help="what fills erased areas: zeros, one color, or noise")
    add("--recount", type=COUNT, default=1, help="largest number of areas to erase in an image")
    add("--resplit", type=boolean, default=False, help="published, without effect: there are no splits")
    add("--mixup", type=NONNEGATIVE, default=0.8, help="alpha of mixup; 0: off")
    add("--cutmix", type=NONNEGATIVE, default=1.0, help="alpha of cutmix; 0: off")
    add("--cutmix_minmax", type=FRACTION, help="range of the sides of cutmix's area [drawn by --cutmix]", **pair)
    add("--mixup_prob", type=FRACTION, default=1.0, help="probability of mixup or cutmix")
    add("--mixup_switch_prob", type=FRACTION, default=0.5, help="probability of cutmix instead of mixup if both are on")
    add("--mixup_mode", default="batch", choices=("batch", "pair", "elem"), help="what one random draw applies to")
    add("--bce_loss", type=boolean, default=False, help="take the binary cross-entropy of each class")
    add("--bce_target_thresh", type=FRACTION, help="with --bce_loss, make targets above it 1, others 0")

    add = parser.add_argument_group("data").add_argument
    add("--eval_data_path", type=file_path, help="folder of the validation images [DATA_PATH/val]")
    add("--train_split", help="name of the training folder in --data_path, or of timm's split [train]")
    add("--val_split", help="the same for validation [val; timm's: validation, val or test]")
    add("--exif_transpose", type=boolean, default=False, help="turn images upright by their EXIF orientation")
    add("--nb_classes", type=COUNT, default=1000, help="number of classes that the data must have, if given")
    add("--imagenet_default_mean_and_std", type=boolean, default=True, help="normalize as for ImageNet; false: by 0.5")
    add("--crop_pct", type=SHARE, help="share of the side to crop in evaluation [0.875 below 384 px, otherwise 1]")
    add("--real_labels", type=file_path, help="also report ReaL accuracy, by this real.json; timm: by timm's own")
    add("--results_file", type=file_path, help="write the results of --eval for each class to this .csv or .json file")
    add("--confusion", type=file_path, help="draw the confusion matrix of --eval to this .png file")
    add("--dist_eval", type=boolean, default=True, help="evaluate on all processes; false: only on the first")

    add = parser.add_argument_group("engines").add_argument
    add("--compile", type=boolean, default=False, help="compile the network with torch.compile")
    engines = sorted(ENGINES)
    add("--engine", "--runtime", choices=engines, help="engine of --eval, for a fused network or exported file [none]")
    add("--precision", choices=PRECISIONS, help="precision of --engine; int8 needs training data [the file's or fp32]")
    return parser


# -- checks across flags, and parsing a command


def check_training_flags(args: Arguments, *, exports: bool = False) -> None:
    """Check the flags of `add_training_flags`, --deploy and --switch_to_deploy. Raises ValueError with one line.

    Args:
        exports: the command neither trains nor evaluates, but writes the network in another format.
    """
    evaluates = args.eval or args.switch_to_deploy is not None
    args.excludes("finetune", "resume")
    args.excludes("switch_to_deploy", "deploy")
    args.excludes("eval", "disable_eval")
    args.needs("model_ema_decay model_ema_force_cpu model_ema_eval", args.model_ema, "add --model_ema true")
    args.needs("amp_dtype", args.use_amp, "add --use_amp true")
    args.needs("wandb_project wandb_name wandb_ckpt", args.enable_wandb, "add --enable_wandb true")
    args.needs("wandb_ckpt", args.save_ckpt and args.output_dir, "it needs --save_ckpt true and --output_dir")
    args.needs("sync_bn", args.device.startswith("cuda"), "it works on GPUs only; leave it out with --device cpu")
    args.needs("resume_new_sched", args.resume or args.auto_resume, "add --resume or --auto_resume true")
    args.needs("auto_resume save_ckpt_freq save_ckpt_steps save_ckpt_num", args.output_dir, "add --output_dir")
    args.needs("save_ckpt_freq save_ckpt_steps save_ckpt_num", args.save_ckpt, "--save_ckpt is false")
    args.needs("start_epoch", not args.resume, "a resumed run goes on where it was; leave it out")
    args.needs("model_key model_prefix", args.finetune, "add --finetune")
    args.needs("skip_broken_eval", not args.disable_eval, "--disable_eval is true")
    args.needs("deploy", evaluates or exports, "a deploy form has nothing left to train; add --eval true")
    if evaluates and not (args.finetune or args.resume):
        raise ValueError("--eval and --switch_to_deploy need the weights: add --finetune FILE")
    if args.switch_to_deploy and Path(args.switch_to_deploy).resolve() == Path(args.finetune or args.resume).resolve():
        raise ValueError(
            f"--switch_to_deploy {args.switch_to_deploy} is the file to fuse: give the result another name"
        )
    if len(set(args.model_ema_decay)) < len(args.model_ema_decay):
        raise ValueError("--model_ema_decay names the same decay twice")


def _check(args: Arguments) -> None:
    """Reject combinations in which a typed flag has no effect. Raises ValueError with one line that names the flags."""
    check_training_flags(args)
    args.needs("resplit", False, "it belongs to augmentation in splits, which is not done; leave --resplit out")
    args.needs("bce_target_thresh", args.bce_loss, "add --bce_loss")
    args.needs("layer_decay_num_layers", args.layer_decay < 1, "add --layer_decay")
    args.needs("weight_decay_end", args.weight_decay > 0, "--weight_decay 0 stays 0")
    cuts = args.cutmix > 0 or args.cutmix_minmax is not None
    args.needs("mixup_prob mixup_mode", args.mixup > 0 or cuts, "--mixup and --cutmix are 0")
    args.needs("mixup_switch_prob", args.mixup > 0 and cuts, "it chooses between --mixup and --cutmix, and one is 0")
    args.needs("decay_linear", args.decay_epochs > 0, "--decay_epochs is 0, so there is no ramp")
    args.needs("real_labels val_split", not args.disable_eval, "--disable_eval is true")
    args.needs("remode recount", args.reprob > 0, "--reprob is 0")
    jitters = args.aa.lower() in ("", "none") or "3a" in args.aa  # timm's 3-augment policies keep color jitter
    args.needs("color_jitter", jitters, "it is replaced by --aa; add --aa none")
    args.needs("teacher_weights distill_alpha distill_tau", args.teacher, "add --teacher")
    teacher_file = args.teacher_weights or (args.teacher and Path(args.teacher).is_file())
    args.needs("teacher_key", teacher_file, "add --teacher_weights")
    args.needs("restart_decay keep_classifier", args.finetune, "add --finetune")
    args.needs("freeze_stages", args.finetune or args.resume or args.auto_resume, "add --finetune")
    args.needs("compile", args.switch_to_deploy is None, "--switch_to_deploy compares the forms uncompiled")
    args.needs("engine results_file confusion", args.eval, "add --eval true")
    deploys = args.switch_to_deploy is not None
    args.needs("engine precision results_file confusion", not deploys, "--switch_to_deploy evaluates without it")
    for flag, suffixes in (("results_file", (".csv", ".json")), ("confusion", (".png",))):
        value = getattr(args, flag)
        if value and not value.endswith(suffixes):
            raise ValueError(f"--{flag} must end in {' or '.join(suffixes)}, not be {value}")
    args.needs("precision", args.engine, "add --engine")
    args.needs("compile", args.engine is None, "--engine compile does that")
    args.needs("use_amp amp_dtype channels_last", args.engine is None, "--engine has its own precision and format")
    for flag, most in (("scale", 1.0), ("ratio", math.inf)):
        low, high = getattr(args, flag)
        if not low <= high <= most:
            raise ValueError(f"--{flag} {low:g} {high:g}: give the smaller one first" + ", up to 1" * (most == 1))
    if args.smoothing == 1 and not (args.mixup > 0 or cuts):
        raise ValueError("--smoothing 1 leaves nothing of the classes: lower it, or add --mixup or --cutmix")
    if args.cutmix_minmax and args.cutmix_minmax[0] >= args.cutmix_minmax[1]:
        raise ValueError("--cutmix_minmax must be two ascending shares, the smaller one first")
    if not args.data_path and not ((args.eval or args.switch_to_deploy is not None) and args.eval_data_path):
        raise ValueError("--data_path is missing")


def parse_args(argv: Sequence[str] | None = None) -> Arguments:
    """Parse and check the arguments of main.py."""
    return build_parser().parse_args(argv)


def save_args(args: Arguments, path: Path) -> None:
    """Write all arguments as YAML, with the names of the given ones; `@` before the file's path reads them back."""
    text = yaml.safe_dump({**vars(args), "given": args.given, "typed": args.chosen}, sort_keys=True)
    with writing(path), replacing(path) as temporary:
        temporary.write_text(text)
