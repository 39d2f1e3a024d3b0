"""Rules of the house that can be read off the source."""

import ast
import importlib
import inspect
import subprocess
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

import utils

ROOT = Path(utils.__file__).parent
SOURCES = [
    path
    for path in map(Path, subprocess.check_output(["git", "ls-files", "*.py"], cwd=ROOT, text=True).split())
    if path.parts[0] != "tests"
]
# Libraries that put new parameters in front of old ones, or whose calls have many of them.
LIBRARIES = {
    "torch", "timm", "torchvision", "torchao", "nncf", "onnxruntime", "pycocotools", "tensorboardX", "terminaltables",
}  # fmt: skip


def imported(tree: ast.AST) -> dict[str, Any]:
    """What the names in a file mean that it imports from `LIBRARIES`."""
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.split(".")[0]
                if root in LIBRARIES:
                    module = importlib.import_module(alias.name)
                    names[alias.asname or root] = module if alias.asname else importlib.import_module(root)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in LIBRARIES:
            for alias in node.names:
                try:
                    names[alias.asname or alias.name] = getattr(importlib.import_module(node.module), alias.name)
                except AttributeError:
                    names[alias.asname or alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
    return names


def resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    """The object that `name` or `name.attribute...` is; None for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        return getattr(resolve(node.value, names), node.attr, None)
    return None


def optional_by_place(tree: ast.AST) -> Iterator[str]:
    names = imported(tree)
    for node in ast.walk(tree):
        function = resolve(node.func, names) if isinstance(node, ast.Call) else None
        if function is None:
            continue
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (ValueError, TypeError):  # of C code
            continue
        # Of torch's the first one is what the call is about, optional or not: `nn.Dropout(p)`, `cuda.Stream(device)`.
        first = int((getattr(function, "__module__", None) or "").split(".")[0] == "torch")
        for place, (parameter, _) in enumerate(zip(parameters, node.args, strict=False)):
            if parameter.kind is parameter.VAR_POSITIONAL:
                break
            if parameter.default is not parameter.empty and place >= first:
                yield f"line {node.lineno}: {parameter.name} of {ast.unparse(node.func)}"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_optional_arguments_of_libraries_are_passed_by_keyword(path):
    """timm once put a parameter in front of one that was passed by place, and every bias and BatchNorm was decayed."""
    assert list(optional_by_place(ast.parse((ROOT / path).read_text()))) == []


def test_an_optional_argument_by_place_is_found():
    source = "from timm.optim import param_groups_weight_decay as groups\ngroups(model, 0.1, ())"
    assert list(optional_by_place(ast.parse(source))) == [
        "line 2: weight_decay of groups",
        "line 2: weight_decay_exclude_1d of groups",
    ]
    source = "from torch import nn\nnn.Conv2d(3, 8, 4, 4)\nnn.Dropout(0.5)"
    assert list(optional_by_place(ast.parse(source))) == ["line 2: stride of nn.Conv2d"]


# -- rooms

# Who may import whom: a file imports from its own level and from those below it. The longest entry that fits counts.
LEVELS = [
    ["records.files"],
    ["loading", "models", "optim_factory", "utils"],
    ["datasets", "engine", "networks", "options", "records", "runtimes"],
    ["benchmarking", "deployment", "object_detection", "pictures", "training"],
    ["ablation", "benchmark", "export", "hubconf", "main", "object_detection.main", "predict", "visualize"],
    ["object_detection.benchmark", "object_detection.make_garments", "data.make_subset"],
]
COMMANDS = {*LEVELS[-2], *LEVELS[-1]}


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def level_of(module: str) -> int:
    fitting = {
        entry: level
        for level, entries in enumerate(LEVELS)
        for entry in entries
        if f"{module}.".startswith(f"{entry}.")
    }
    return fitting[max(fitting, key=len)]


def project_imports(module: str) -> set[str]:
    """The project's modules that a module imports, anywhere in its file."""
    found: set[str] = set()
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {base}
    return (found & MODULES.keys()) - {module}


@pytest.mark.parametrize("module", MODULES)
def test_who_imports_whom(module):
    too_high = {other for other in project_imports(module) if level_of(other) > level_of(module)}
    commands = project_imports(module) & COMMANDS
    assert (too_high, commands) == (set(), set())


def test_no_circle():
    graph = {module: project_imports(module) for module in MODULES}
    assert list(TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_no_file_is_too_long_to_read():
    assert [str(path) for path in SOURCES if len((ROOT / path).read_text().splitlines()) > 700] == []
    assert len([path for path in SOURCES if len(path.parts) == 1]) <= 14
