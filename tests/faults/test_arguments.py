"""Wrong arguments and files: one line that names the mend, exit code 2, before any epoch begins."""

import contextlib
import io
import shlex
import shutil
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import main
import models
import options
from harness import flags
from options import build_parser

NARROW = {"width_mult": 1 / 64, "num_classes": 10}


def outcome(function, *arguments):
    """The exit code, 0 for a return, and what was written to standard error. Anything else that is raised passes."""
    written = io.StringIO()
    code = 0
    with contextlib.redirect_stderr(written), contextlib.redirect_stdout(io.StringIO()):
        try:
            function(*arguments)
        except SystemExit as ended:
            code = ended.code or 0
    return code, written.getvalue()


def error_lines(text):
    return [line for line in text.splitlines() if line.startswith("main.py: error: ")]


# -- what people get wrong


def spoil(path, kind):
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "seven classes":
        torch.save({"model": models.vanillanet_6(**{**NARROW, "num_classes": 7}).state_dict()}, path)
    elif kind == "another variant":
        torch.save({"model": models.vanillanet_7(**NARROW).state_dict()}, path)
    elif kind == "no checkpoint":
        path.write_text("no checkpoint")
    elif kind == "missing":
        path.unlink()


def folders(root):
    """Folders of images that cannot be used."""
    for name in ("empty/train", "empty/val", "no images/train/a", "no images/val/a", "other/train/a", "other/val/b"):
        (root / name).mkdir(parents=True)
    for name in ("other/train/a", "other/val/b"):
        Image.new("RGB", (32, 32)).save(root / name / "image.png")


CASES = [
    # what becomes of the checkpoint, arguments besides evaluation of it, what the line names
    ("truncated", "", "w.pth"),
    ("no checkpoint", "", "w.pth"),
    ("missing", "", "does not exist"),
    ("seven classes", "", "knows 7 classes, the data have 10"),
    ("another variant", "", "does not fit"),
    (None, "--model_key ema", "has no key ema"),
    (None, "--nb_classes 1000", "10 classes"),
    (None, "--model no_such_net", "no_such_net"),
    (None, "--data_set image_folder --data_path no/such/folder", "no/such/folder"),
    (None, "--data_set image_folder --data_path empty", "no class folders"),
    (None, "--data_set image_folder --data_path 'no images'", "no image"),
    (None, "--eval false --data_set image_folder --data_path other", "unknown to the training data: b (known: a)"),
    (None, "--real_labels no/real.json", "real.json"),
    (None, "--device cuda:77", "--device"),
    (None, "--device no_such_device", "--device"),
    (None, "--world_size 4", "torchrun"),
    (None, "--eval true --disable_eval true", "--disable_eval"),
    (None, "--resume w.pth", "--finetune and --resume exclude each other"),
    (None, "--deploy true --switch_to_deploy d.pth", "--switch_to_deploy"),
    (None, "--eval false --resplit true", "--resplit"),
    (None, "--eval false --opt nosuch", "nosuch"),
    (None, "--eval false --lr inf", "--lr"),
    (None, "--eval false --batch_size 5", "even"),
    (None, "--eval false --batch_size 1 --mixup 0 --cutmix 0", "--batch_size"),
    (None, "--eval false --warmup_epochs 9", "--warmup_epochs"),
    (None, "--eval false --aa nonsense", "--aa nonsense"),
    (None, "--eval false --layer_decay 0.8 --layer_decay_num_layers 5", "vanillanet_6 has 4"),
    (None, "--eval false --momentum 0.5", "momentum"),
    (None, "--eval false --teacher nosuch", "--teacher nosuch"),
    (None, "--eval false --teacher resnet18 --teacher_weights gone.pth", "gone.pth"),
    (None, "@no_such_recipe.args", "no_such_recipe.args"),
    (None, "@unbalanced.args", "unbalanced.args"),
    (None, "@itself.args", "itself.args"),
    (None, "@bytes.args", "bytes.args"),
]


def test_what_people_get_wrong(data, undisturbed, tmp_path, monkeypatch, report):
    monkeypatch.chdir(tmp_path)
    folders(tmp_path)
    Path("unbalanced.args").write_text("--model 'vanillanet_6\n")
    Path("itself.args").write_text("--epochs 3\n@itself.args\n")
    Path("bytes.args").write_bytes(b"--model \xff\xfe\n")
    weights = undisturbed(1) / "checkpoint-last.pth"
    for kind, arguments, named in CASES:
        shutil.copy(weights, "w.pth")
        spoil(Path("w.pth"), kind)
        run = flags(data, Path("out"), "--eval", "true", "--finetune", "w.pth", *shlex.split(arguments))
        code, written = outcome(main.main, run)
        errors = error_lines(written)
        assert code == 2, (arguments, written)
        assert len(errors) == 1, (arguments, written)
        assert named in errors[0], (arguments, written)
        assert not Path("out/log.jsonl").exists()
        assert not Path("out/summary.csv").exists()
    report(
        "a wrong flag, file, folder or checkpoint",
        injected=len(CASES),
        lost="nothing: exit code 2 before the first epoch",
        reads=errors[0],
    )


# -- what nobody thinks of

ACTIONS = [action for action in build_parser()._actions if action.dest != "help"]
SETTINGS = {
    "database": None,
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.generate, Phase.shrink),
}
WORDS = "'' - -- @ @@@ = nan inf -inf -0 0 1 -1 1e400 1e-400 0x10 1_000 true None --no_such_flag -h5 --lr= --lr ٣"
ODD = st.sampled_from([*shlex.split(WORDS), "a\nb", "\x00", "\udcff", "9" * 5000, "é" * 300])
TEXT = st.text(max_size=20)


@st.composite
def command_line(draw):
    """Flags, some of them misspelt, with values of which some are right."""
    tokens = []
    for action in draw(st.lists(st.sampled_from(ACTIONS), max_size=6)):
        flag = action.option_strings[0]
        flag = draw(st.sampled_from([flag, flag, flag.replace("_", "-"), flag[:-1], flag.upper()]))
        count = draw(st.sampled_from([1, 1, 1, 0, 2]))
        right = st.sampled_from(["1", "2", "0.5", "true", "false", *(map(str, action.choices or ()))])
        values = [draw(st.one_of(right, right, ODD, TEXT)) for _ in range(count)]
        tokens += [f"{flag}={values[0]}"] if values and draw(st.booleans()) else [flag, *values]
    return tokens + draw(st.lists(st.one_of(ODD, TEXT), max_size=2))


def parsed(tokens):
    code, written = outcome(options.parse_args, tokens)
    if code:
        assert code == 2
        assert len(written.splitlines()) == 1, written
        assert error_lines(written), written
    return code


def test_no_command_line_ends_in_a_traceback(thorough, tmp_path, monkeypatch, report):
    monkeypatch.chdir(tmp_path)
    codes = []
    count = 5_000 if thorough else 300

    @settings(max_examples=count, **SETTINGS)
    @given(command_line())
    def try_one(tokens):
        codes.append(parsed(["--data_path", "DIR", *tokens]))

    @settings(max_examples=count // 10, **SETTINGS)
    @given(
        st.one_of(st.binary(max_size=60), command_line().map(lambda tokens: "\n".join(tokens).encode(errors="replace")))
    )
    def try_recipe(content):
        Path("recipe.args").write_bytes(content)
        codes.append(parsed(["--data_path", "DIR", "@recipe.args"]))

    try_one()
    try_recipe()
    assert codes.count(0) > 0.02 * len(codes)
    assert codes.count(2) > 0.2 * len(codes)
    _, written = outcome(options.parse_args, ["--data_path", "DIR", "--lr", "fast"])
    report(
        "a command line or recipe of random flags and values",
        injected=f"{len(codes)}, of which {codes.count(0)} are right",
        lost="nothing: one line, exit code 2; never a traceback",
        reads=written,
    )


REALS = (options.POSITIVE, options.FRACTION, options.NONNEGATIVE)
# Values that a run of a second can have, right and wrong ones.
VALUES = {
    "model": ["vanillanet_5", "vanillanet_6", "vanillanet_13_x1_5_ada_pool", "resnet10t", "test_vit", "no_such_net"],
    "input_size": [1, 31, 32, 33, 64, 96],
    "batch_size": [1, 2, 3, 4, 8, 64],
    "epochs": [1, 2, 3],
    "early_stop_epochs": [1, 2],
    "update_freq": [1, 2, 100],
    "num_workers": [0],
    "width_mult": [1e-9, 1 / 64, 1 / 32],
    "act_num": [0, 1, 3, 9],
    "device": ["cpu", "cpu", "cuda:9", "meta"],
    "data_path": ["DATA", "DATA", "FILE", "FOLDER", "MISSING"],
    "eval_data_path": ["DATA", "FILE", "FOLDER"],
    "data_set": ["FMNIST", "image_folder", "IMNET", "wds/", "torch/", "nonsense"],
    "opt": ["adamw", "lamb", "sgd", "lion", "adafactor", "muon", "lookahead_adam", "lbfgs", "no_such"],
    "opt_betas": [0, 0.5, 0.999, 1],
    "model_ema_decay": [0, 0.5, 1],
    "aa": ["none", "rand-m9-mstd0.5-inc1", "original", "3a", "augmix-m5", "rand-m99-n0", "rand", "v0r"],
    "teacher": ["vanillanet_5", "vanillanet_6", "resnet10t", "no_such_net"],
    "teacher_weights": ["FILE", "WEIGHTS", "WEIGHTS"],
    "resume": ["MISSING", "WEIGHTS", "WEIGHTS"],
    "finetune": ["FOLDER", "WEIGHTS", "WEIGHTS"],
    "switch_to_deploy": ["NEW", "FOLDER", "FILE/NEW"],
    "real_labels": ["FILE", "FOLDER", "MISSING"],
    "output_dir": ["NEW", "NEW", "FILE", "FILE/NEW"],
    "log_dir": ["NEW", "FILE"],
    "model_key": ["model", "ema|model", "args", "epoch", "", "|"],
    "teacher_key": ["model", "ema|model", "args", ""],
    "model_prefix": ["", "stem", "x"],
    "lr": [1e-3, 1e30, 1e-30],
    "dist_url": ["env://", "tcp://nowhere:1"],
    "world_size": [1, 2],
    "compile": ["false"],
    "cutmix_minmax": [0, 0.2, 0.8, 1],
    "crop_pct": [0.01, 0.5, 1],
}
NUMBERS = {options.COUNT: [1, 2, 5], options.WHOLE: [0, 1, 2], **{kind: [0.1, 0.5, 1] for kind in REALS}}
COUNTS = {"opt_betas": [1, 2, 3, 4], "model_ema_decay": [1, 2], "cutmix_minmax": [2]}


@st.composite
def whole_run(draw):
    """Arguments that the parser mostly takes, in combinations that may make no sense."""
    arguments = []
    for action in draw(
        st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=4, unique_by=lambda action: action.dest)
    ):
        if action.nargs == 0:
            arguments.append(action.option_strings[0])
            continue
        if action.type is options.boolean and action.dest not in VALUES:
            values = ["true", "true", "false"]
        else:
            values = VALUES.get(action.dest) or list(action.choices or ()) or NUMBERS.get(action.type, [0, 1, -1, "x"])
        count = draw(st.sampled_from(COUNTS.get(action.dest, [1])))
        arguments += [action.option_strings[0], *(str(draw(st.sampled_from(values))) for _ in range(count))]
    return arguments


BASE = shlex.split(
    "--model vanillanet_5 --width_mult 0.015625 --input_size 32 --data_set FMNIST --device cpu --num_workers 0 "
    "--batch_size 16 --epochs 2 --warmup_epochs 0 --data_path DATA"
)


def test_no_run_ends_in_a_traceback(data, undisturbed, tmp_path, thorough, monkeypatch, report):
    """Whatever the parser lets pass: a run goes well, or ends in one line."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing is downloaded
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("neither this nor that")
    Path("folder").mkdir()
    paths = {
        "DATA": str(data), "FILE": "file", "FOLDER": "folder", "MISSING": "missing",
        "WEIGHTS": str(undisturbed(1) / "checkpoint-last.pth"),
    }  # fmt: skip
    codes, written = [], ""

    @settings(max_examples=400 if thorough else 20, **SETTINGS)
    @given(whole_run())
    def try_one(arguments):
        names = {**paths, "NEW": f"new-{len(codes)}"}
        run = [names.get(token, token.replace("FILE/NEW", "file/new")) for token in [*BASE, *arguments]]
        nonlocal written
        code, text = outcome(main.main, run)
        codes.append(code)
        assert code in (0, 1, 2)
        assert len(error_lines(text)) == (code != 0), text
        assert "Traceback" not in text
        written = error_lines(text)[0] if code else written

    try_one()
    assert codes.count(0) > 0.1 * len(codes)
    report(
        "a run with a random combination of flags",
        injected=f"{len(codes)}, of which {codes.count(0)} went well",
        lost=f"nothing: {codes.count(2)} ended in a line and exit code 2, {codes.count(1)} in one and 1; no traceback",
        reads=written,
    )
