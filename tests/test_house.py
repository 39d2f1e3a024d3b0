"""Rules of the house that can be read off the source."""

import ast
import importlib
import inspect
import subprocess
from collections.abc import Iterator
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
LIBRARIES = {"timm", "torchvision", "torchao", "nncf", "onnxruntime", "pycocotools", "tensorboardX", "terminaltables"}


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
        for parameter, _ in zip(parameters, node.args, strict=False):
            if parameter.kind is parameter.VAR_POSITIONAL:
                break
            if parameter.default is not parameter.empty:
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
