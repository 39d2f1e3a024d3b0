"""The documentation: commands parse, the Python runs, links lead somewhere, pages are listed, tables are the code's."""

import argparse
import json
import re
import shlex
import string
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
from torch.distributed.run import get_args_parser as torchrun_parser

import ablation
import benchmark
import export
import models  # noqa: F401  registers the variants
import object_detection.benchmark
import object_detection.options
import options
import predict
import visualize
from options import parse_args

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
ELSEWHERE = [ROOT / folder / "README.md" for folder in ("object_detection", "data", "tests/data")]
PAGES = [README, *ELSEWHERE, *sorted(DOCS.glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
KEYS = json.loads((ROOT / "tests/data/state_dict_keys.json").read_text())

# The paper's table: parameters (M), MACs (G), latency (ms), top-1 and ReaL (%). Frozen: these are not ours to change.
PAPER = """
VanillaNet-5 15.5 5.2 1.61 72.49 79.66
VanillaNet-6 32.5 6.0 2.01 76.36 82.86
VanillaNet-7 32.8 6.9 2.27 77.98 84.16
VanillaNet-8 37.1 7.7 2.56 79.13 85.14
VanillaNet-9 41.4 8.6 2.91 79.87 85.66
VanillaNet-10 45.7 9.4 3.24 80.57 86.25
VanillaNet-11 50.0 10.3 3.59 81.08 86.54
VanillaNet-12 54.3 11.1 3.82 81.55 86.81
VanillaNet-13 58.6 11.9 4.26 82.05 87.15
VanillaNet-13-1.5x 127.8 26.5 7.83 82.53 87.48
VanillaNet-13-1.5x,_adaptive_pooling 127.8 48.9 9.72 83.11 87.85
"""
# The scripts, with what parses their arguments.
PARSERS = {
    "main.py": parse_args,
    "visualize.py": visualize.build_parser().parse_args,
    "export.py": export.build_parser().parse_args,
    "predict.py": predict.build_parser().parse_args,
    "benchmark.py": benchmark.build_parser().parse_args,
    "object_detection/main.py": object_detection.options.parse_args,
    "object_detection.benchmark": object_detection.benchmark.build_parser().parse_args,
}
# What else a block of commands may call.
OTHER_COMMANDS = {"curl", ".", "pip", "py-spy"}


def blocks(language: str) -> list[SimpleNamespace]:
    """The fenced blocks of a language on all pages: `text` and `where` it stands."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 2
            found.append(SimpleNamespace(text=match.group(1), where=f"{page.relative_to(ROOT)}:{line}"))
    return found


def commands(block: str) -> list[list[str]]:
    """The commands of a block as a shell would split them, its own variables put in. KeyError for an undefined one."""
    block = re.sub(r"(?:^|(?<=\s))#[^'\"\n]*$", "", block.replace("\\\n", " "), flags=re.MULTILINE)  # comments
    lexer = shlex.shlex(block, posix=True, punctuation_chars="\n;|&")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    variables: dict[str, str] = {}
    found: list[list[str]] = [[]]
    for token in lexer:
        if set(token) <= set("\n;|&"):
            found.append([])
        elif not found[-1] and (match := re.fullmatch(r"(\w+)=(.*)", token)):
            variables[match.group(1)] = match.group(2)
        else:
            found[-1].append(string.Template(token).substitute(variables))
    return [command for command in found if command]


def arguments_of(command: list[str], script: str = "main.py") -> list[str] | None:
    """What `script` is given by a command; None if the command does not start it."""
    if command[0] == "srun":
        command = command[next(i for i, token in enumerate(command) if i and not token.startswith("-")) :]
    if command[0] == "torchrun":
        started = torchrun_parser().parse_args(command[1:])
        assert started.training_script in PARSERS
        return started.training_script_args if script == started.training_script else None
    started = ["python", "-m", script] if script.startswith("object_detection.") else ["python", script]
    return command[len(started) :] if command[: len(started)] == started else None


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """The names of all options, those of its commands included."""
    flags = {flag.removeprefix("--") for action in parser._actions for flag in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags = flags.union(*map(flags_of, action.choices.values()))
    return flags


def table(first_header: str, page: Path = README) -> list[list[str]]:
    """The rows, without header, of the page's table whose first column is called so."""
    lines = page.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_header} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


SHELL, PYTHON = blocks("sh"), blocks("python")
each_shell_block = pytest.mark.parametrize("block", SHELL, ids=lambda block: block.where)


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@each_shell_block
def test_every_command_parses(block):
    assert subprocess.run(["bash", "-n"], input=block.text, text=True, check=False).returncode == 0
    for command in commands(block.text):
        given = {script: arguments_of(command, script) for script in PARSERS}
        script = next((script for script, arguments in given.items() if arguments is not None), None)
        if script:
            if given[script] != ["--help"]:
                PARSERS[script](given[script])
        elif command[0] == "make":
            targets = re.findall(r"^([\w-]+):(?!=)", Path("Makefile").read_text(), re.MULTILINE)
            assert set(command[1:]) <= set(targets)
        elif command[:2] == ["python", "-c"]:
            compile(command[2], block.where, "exec")
        else:
            assert command[0] in OTHER_COMMANDS, command


def test_the_pages_hold_what_they_must():
    found = [arguments_of(command) for block in SHELL for command in commands(block.text)]
    parsed = [parse_args(arguments) for arguments in found if arguments is not None]
    assert any(args.eval and not args.switch_to_deploy for args in parsed)
    assert any(args.switch_to_deploy for args in parsed)
    assert any(args.auto_resume for args in parsed)
    assert any(args.finetune and not args.eval for args in parsed)
    pictures = [arguments_of(command, "visualize.py") for block in SHELL for command in commands(block.text)]
    assert {arguments[0] for arguments in pictures if arguments} == {"cam", "curves", "figures", "detections"}
    assert {"torchrun", "srun", "make"} <= {command[0] for block in SHELL for command in commands(block.text)}


def test_a_wrong_command_is_noticed():
    assert commands("A=1\npython main.py --lr $A \\\n  --aa 'a b' # why\nmake demo; make test\n") == [
        ["python", "main.py", "--lr", "1", "--aa", "a b"],
        ["make", "demo"],
        ["make", "test"],
    ]
    with pytest.raises(KeyError, match="NOT_THERE"):
        commands("python main.py --data_path $NOT_THERE")
    with pytest.raises(SystemExit):
        parse_args(arguments_of(shlex.split("srun --nodes=2 python main.py --data_path DIR --no_such_flag 1")))


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.where)
def test_python_blocks_run(block):
    code = compile(block.text, block.where, "exec")
    if "pretrained=True" not in block.text and ".pth" not in block.text:  # these need a file from elsewhere
        exec(code, {})


def test_enough_python_blocks_run():
    assert sum("pretrained=True" not in block.text and ".pth" not in block.text for block in PYTHON) >= 2


@each_page
def test_flags_in_the_text_exist(page):
    commands = (options, visualize, export, predict, benchmark, ablation)
    modules = (*commands, object_detection.options, object_detection.benchmark)
    flags = set().union(*(flags_of(module.build_parser()) for module in modules))
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text))
    launcher = {"node_rank", "nnodes", "max-restarts", "use-train-size"}  # the last is timm's
    assert named - flags - launcher == set()


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target


def links_of(page: Path) -> set[str]:
    """The paths in the repository that a page links to."""
    targets = (target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()))
    paths = [(page.parent / target).resolve() for target in targets if target and not target.startswith("https://")]
    return {str(path.relative_to(ROOT)) for path in paths}


def test_every_page_is_listed_with_a_line():
    rows = re.findall(r"^- \[([^\]]+)\]\(([^)]+)\): (.+)$", (DOCS / "README.md").read_text(), re.MULTILINE)
    listed = [(DOCS / target).resolve() for _, target, _ in rows]
    assert sorted(listed) == sorted(set(PAGES) - {README, DOCS / "README.md"})
    assert all(name == target for name, target, _ in rows)


def test_the_page_of_the_faults_has_the_suites_text():
    text = re.search(r'PAGE = """\\\n(.*?)"""', (ROOT / "tests/faults/page.py").read_text(), re.DOTALL).group(1)
    head, _, tail = re.split(r"\{(conditions)\}\n\n\{table\}", text)
    page = (DOCS / "RELIABILITY.md").read_text()
    assert page.startswith(head)
    assert page.endswith(tail)


def test_the_readme_is_short_and_leads_to_the_pages():
    assert len(README.read_text().split()) <= 1400
    assert "docs/README.md" in links_of(README)


def test_every_file_has_a_door():
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs the git repository, to know what belongs to it")
    files = {path for path in listed.stdout.splitlines() if path not in (".gitignore", "README.md")}
    linked = links_of(DOCS / "code.md")
    top = {path.partition("/")[0] for path in files}
    assert top - {path.partition("/")[0] for path in linked} == set()
    by_name = {path for path in files if "/" not in path or path.startswith("models/")}
    assert by_name - linked - {"models/__init__.py"} == set()
    assert {path for path in files if path.startswith("recipes/")} - links_of(DOCS / "variants.md") == set()
    shown = set().union(*map(links_of, PAGES))
    assert {path for path in files if path.startswith("docs/")} - shown == set()


def test_every_requirement_is_explained():
    install = DOCS / "install.md"
    lines = Path("requirements.txt").read_text().splitlines()
    required = [re.match(r"[\w-]+", line).group() for line in lines if line and not line.startswith("#")]
    rows = table("package", install)
    assert [row[0] for row in rows] == required
    assert all(job for _, job in rows)
    for further in ("requirements-deploy.txt", "requirements-dev.txt"):
        for line in Path(further).read_text().splitlines():
            name = re.match(r"[\w-]*", line).group()
            assert line.startswith("-r ") or name in install.read_text(), name


def test_the_papers_table_is_the_papers():
    expected = [[cell.replace("_", " ") for cell in line.split()] for line in PAPER.split("\n") if line]
    rows = table("variant")
    assert [row[:-1] for row in rows] == expected
    for name, (*_, weights) in zip(KEYS, rows, strict=True):
        assert weights == f"[{name}]({timm.get_pretrained_cfg_value(name, 'url')})"


def test_our_table_is_the_networks():
    rows = table("counted here", DOCS / "variants.md")
    assert [row[0].strip("`") for row in rows] == list(KEYS) == timm.list_models("vanillanet*")
    for (name, recipe, trained, deployed, macs), paper in zip(rows, table("variant"), strict=True):
        counts = KEYS[name.strip("`")]
        assert recipe.endswith(f"(../recipes/{name.strip('`')}.args)")
        assert (trained, deployed) == tuple(f"{counts[f'params_{form}'] / 1e6:.3f}" for form in ("train", "deploy"))
        assert float(paper[1]) == pytest.approx(float(deployed), abs=0.05)
        assert float(paper[2]) == pytest.approx(float(macs), abs=0.1)  # counted by tests/test_model.py
        head = [line for line in Path(f"recipes/{name.strip('`')}.args").read_text().splitlines() if line[0] == "#"]
        assert f"The paper reports {paper[4]} % top-1" in " ".join(head)
        assert ("as published" in head[0]) == recipe.startswith("[published]")
        assert ("Ours, not yet run" in " ".join(head)) == recipe.startswith("[ours]")


# -- recipes

SHARED = (
    "--batch_size 128 --epochs 300 --decay_epochs 100 --opt lamb --aa rand-m7-mstd0.5-inc1 --bce_loss --drop 0.05 "
    "--model_ema true --model_ema_eval true --model_ema_decay 0.99996 --use_amp true"
)
PUBLISHED = {
    "5": "--lr 3.5e-3 --weight_decay 0.35 --mixup 0.1",
    "6": "--lr 4.8e-3 --weight_decay 0.32 --mixup 0.15 --layer_decay 0.8 --layer_decay_num_layers 4",
    "7": "--lr 4.7e-3 --weight_decay 0.35 --mixup 0.4 --layer_decay 0.8 --layer_decay_num_layers 5",
    "8": "--lr 3.5e-3 --weight_decay 0.3 --mixup 0.4",
    "9": "--lr 3.5e-3 --weight_decay 0.3 --mixup 0.4",
    "10": "--lr 3.5e-3 --weight_decay 0.25 --mixup 0.4",
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_recipes_are_as_published(variant):
    name = f"vanillanet_{variant}"
    published = f"--model {name} {SHARED} {PUBLISHED[variant]} --data_path DIR".split()
    found, wanted = parse_args([f"@recipes/{name}.args", "--data_path", "DIR"]), parse_args(published)
    assert vars(found) == vars(wanted)
    assert found.given == wanted.given
