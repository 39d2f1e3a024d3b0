"""Write checkpoints atomically, read them without running code, and manage the folder of a run's checkpoints."""

import contextlib
import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from models.safe_globals import SAFE_GLOBALS
from records.files import TEMPORARY, first_line, replacing, writing

logger = logging.getLogger(__name__)

WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")  # prefixes that DDP and torch.compile add
EXPORTED = (".onnx", ".xml", ".pt2", ".engine")  # suffixes of the files that export.py and its engines write
PROFILED = ("total_ops", "total_params", "n_averaged")  # buffers that thop and AveragedModel leave behind
FOLDER_ATTRIBUTE = 0x10  # marks a record of a zip file as a folder
# Files mistaken for checkpoints: their first bytes, what they are, and what to do about it.
KINDS = (
    (b"version https://git-lfs", "it is a git-lfs pointer, not the file itself: run git lfs pull"),
    ((b"<!doctype html", b"<html"), "it is a web page: download the file itself, not the page that links to it"),
    ((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"), "it is compressed: unpack it first"),
    ((b"\x89PNG", b"\xff\xd8\xff", b"GIF8"), "it is an image"),
    (b"\x89HDF", "it is an HDF5 file, as Keras writes them: convert its weights to PyTorch first"),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read, or used for this network; the message is one line."""


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint atomically: a reader of `path` finds the old file or the whole new one, even after a kill.

    A .safetensors file gets the tensors under `model` and, as JSON in its metadata, the rest of the checkpoint.

    Raises:
        CheckpointError: the message names the path and the cause. The old file is untouched; no temporary file is left.
    """
    path = Path(path)
    with writing(path, CheckpointError), replacing(path) as temporary:
        if path.suffix == ".safetensors":
            weights = {name: value.contiguous() for name, value in checkpoint["model"].items()}
            texts = {name: json.dumps(value) for name, value in checkpoint.items() if name != "model"}
            save_file(weights, temporary, metadata={"format": "pt", **texts})
            return
        try:
            with temporary.open("wb") as file:
                torch.save(dict(checkpoint), file)
        except RuntimeError as error:
            # torch 2.14 reports only a wrong position of its writer; raise the system's error that caused it.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def is_intact(path: str | Path) -> bool:
    """Return whether the file is whole: every record of torch's zip format matches its CRC-32."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch reads nothing from a record that is marked as a folder, so its tensor would stay uninitialized.
            folders = [info for info in archive.infolist() if info.external_attr & FOLDER_ATTRIBUTE and info.file_size]
            return not folders and archive.testzip() is None
    except Exception:  # damaged bytes raise BadZipFile, zlib.error, struct.error, ...
        return False


def _is_zip(path: Path) -> bool:
    """Return whether the file has a zip file's end record, even a damaged one, for which `is_zipfile` may raise."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def _what_it_is(path: Path) -> str | None:
    """Describe a file that is not a checkpoint, with what to do about it; None if its kind is unknown."""
    with path.open("rb") as file:
        head = file.read(500)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()  # a web page may have a BOM, blank lines and capitals
    if not head:
        return "it is empty: download or copy it again"
    for begins, what in KINDS:
        if head.startswith(begins) or start.startswith(begins):
            return what
    members = []
    if is_intact(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    weights = any(name.endswith("data.pkl") for name in members)  # as `torch.save` writes them
    if path.suffix in EXPORTED and not weights:
        return "it is an exported network, not weights: give the checkpoint that it was exported from"
    if any(name.endswith("constants.pkl") for name in members):
        return "it is a TorchScript program: save the weights alone, torch.save(module.state_dict(), FILE)"
    if _is_zip(path) and not weights:
        return "it is a zip file of something else than a checkpoint: unpack it, or take another file"
    if all(c.isprintable() or c.isspace() for c in head.decode(errors="ignore")):
        return "it is a text file"
    return None


def _load_safetensors(path: Path) -> dict[str, Any]:
    """Return the tensors under `model`, and the JSON values of the metadata beside them."""
    try:
        with safe_open(path, framework="pt") as file:
            checkpoint = {"model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118  not a dict
            texts = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        cause = _what_it_is(path) or f"it is damaged or no safetensors file ({first_line(error)})"
        raise CheckpointError(f"cannot load {path}: {cause}") from error
    for name, text in texts.items():
        with contextlib.suppress(ValueError):  # another program's text; ours is JSON
            checkpoint.setdefault(name, json.loads(text))
    return checkpoint


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running code from it; from a safetensors file, read tensors and metadata.

    Raises:
        CheckpointError: the file is missing, damaged, not a checkpoint, or holds objects that could run code;
            see `models.safe_globals` for what a checkpoint may hold besides tensors and plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    if _is_zip(path) and not is_intact(path):
        raise CheckpointError(f"{path} is damaged (a checksum does not match): take another copy or an earlier one")
    if path.suffix in EXPORTED and (known := _what_it_is(path)):
        raise CheckpointError(f"cannot load {path}: {known}")
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"cannot load {path}: {_why_not_loaded(path, str(error))}") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"cannot load {path}: it holds a {type(checkpoint).__name__}, not a dict")
    return checkpoint


def _why_not_loaded(path: Path, message: str) -> str:
    """Explain the failure without torch's own message, which advises letting the file run its code."""
    if known := _what_it_is(path):
        return known
    pattern = r"(?:unsupported )?GLOBAL ([\w.]+)|but got <class '([\w.]+)'>|(unsupported operand [^\n]*)"
    if found := re.search(pattern, message):
        return (
            f"refused: it holds {found[found.lastindex]}, and to load that could run code. Where you trust the file, "
            'save the weights alone: torch.save({"model": model.state_dict()}, FILE)'
        )
    return "it is truncated or no PyTorch checkpoint: take another copy or an earlier one"


def is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(x, torch.Tensor) for x in value.values())


def checkpoint_weights(
    checkpoint: Mapping[str, Any],
    *,
    key: str = "model|module",
    whole_file: bool = False,
    prefix: str = "",
    path: str | Path = "the checkpoint",
) -> dict[str, torch.Tensor]:
    """Return the state dict in a checkpoint under the network's own names: without the prefixes `module.` and
    `_orig_mod.`, which wrappers add, and without the buffers of profilers.

    Args:
        key: alternative keys separated by `|`; the first key present is used.
        whole_file: if no key is present, use the whole file, provided that it is a state dict itself.
        prefix: prefix to remove from the names; names without it are left out.

    Raises:
        CheckpointError: no key is present, its value is not a state dict, or no name has the prefix.
    """
    name = next((name for name in key.split("|") if name in checkpoint), None)
    if name is None and not (whole_file and is_state_dict(checkpoint)):
        keys = ", ".join(map(str, list(checkpoint)[:12]))
        raise CheckpointError(f"{path} has no key {key}; choose one by --model_key: {keys}")
    weights = checkpoint if name is None else checkpoint[name]
    if not (is_state_dict(weights) or (isinstance(weights, Mapping) and not weights)):
        raise CheckpointError(f"what {path} holds under {name} is no state dict")
    # Look for the prefix in the names as they are and, if no name has it, in the names without wrappers' prefixes.
    weights = {str(name): value for name, value in weights.items()}
    if prefix:
        unwrapped = not any(name.startswith(prefix) for name in weights)
        names = {WRAPPERS.sub("", name) if unwrapped else name: value for name, value in weights.items()}
        weights = {name.removeprefix(prefix): value for name, value in names.items() if name.startswith(prefix)}
        if not weights:
            raise CheckpointError(f"no name in {path} begins with --model_prefix {prefix}")
    clean = {WRAPPERS.sub("", name): value for name, value in weights.items()}
    clean = {name: value for name, value in clean.items() if name.rpartition(".")[2] not in PROFILED}
    if clean.keys() != weights.keys():
        logger.info("%s: read without module. and _orig_mod. before the names, and without profilers' buffers", path)
    return clean


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], *, path: str | Path = "the checkpoint") -> None:
    """Load the weights strictly, and all or nothing: on an error, the model is unchanged.

    Raises:
        CheckpointError: the message counts the mismatches and shows the first of each kind.
    """
    # Count all mismatches before anything is loaded.
    own = model.state_dict()
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    shapes = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing ({missing[0]})")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected ({unexpected[0]})")
    if shapes:
        theirs, ours = (tuple(state[shapes[0]].shape) for state in (weights, own))
        problems.append(f"{len(shapes)} of another shape ({shapes[0]}: {theirs}, the network's {ours})")
    if problems:
        hint = "is it of another variant, form (--deploy) or class count?"
        raise CheckpointError(f"{path} does not fit this network: {'; '.join(problems)}; {hint}")
    model.load_state_dict(dict(weights), strict=True)


def rescaled(step: int, ratio: float) -> int:
    """Return the step at the same place of an epoch with `ratio` times as many steps; at least 1 if one is done."""
    return max(round(step * ratio), min(step, 1))


class CheckpointFolder:
    """The checkpoints of a run: the newest `keep` numbered ones, `last`, `best` and, for averages, `best-ema...`.

    `checkpoint-7.pth` was written after epoch 7, `checkpoint-7-120.pth` after 120 steps of epoch 7. `last` and `best`
    are further names of such files, hard links where possible, so they take no extra space while both names exist.
    """

    pattern = re.compile(r"checkpoint-(\d+)(?:-(\d+))?\.pth")

    def __init__(self, folder: str | Path, keep: int = 10):
        self.folder = Path(folder)
        self.keep = keep

    def places(self) -> list[tuple[tuple[int, int], Path]]:
        """Return place and path of each numbered file, newest first; the place is (epochs done, steps after them)."""
        found = []
        for path in self.folder.glob("checkpoint-*.pth"):
            if match := self.pattern.fullmatch(path.name):
                epoch, step = int(match[1]), int(match[2] or 0)
                found.append(((epoch, step) if step else (epoch + 1, 0), path))
        return sorted(found, reverse=True)

    def numbered(self) -> list[Path]:
        """Return the numbered files, newest first."""
        return [path for _, path in self.places()]

    def all(self) -> list[Path]:
        """Return all checkpoints in the order in which to resume from them: numbered ones, `last`, `best` ones."""
        best = sorted(self.folder.glob("checkpoint-best*.pth"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        return [*self.numbered(), *self.folder.glob("checkpoint-last.pth"), *best]

    def save(self, checkpoint: Mapping[str, Any], *, epoch: int, step: int, names: Sequence[str] = ()) -> Path:
        """Write the state after `step` steps of `epoch` or, if `step` is 0, after the whole epoch `epoch` - 1.

        Args:
            names: further names of the file, such as `best` and `best-ema`; `last` is always added.
        """
        path = self.folder / (f"checkpoint-{epoch}-{step}.pth" if step else f"checkpoint-{epoch - 1}.pth")
        save_checkpoint(checkpoint, path)
        for name in ("last", *names):
            further = self.folder / f"checkpoint-{name}.pth"
            with writing(further, CheckpointError), replacing(further) as temporary:
                try:
                    os.link(path, temporary)
                except OSError:  # a copy where the file system has no hard links
                    shutil.copyfile(path, temporary)
        self.delete_old()
        return path

    def renumber(self, epoch: int, ratio: float, *, of: str | Path) -> None:
        """Rename the files in the middle of `epoch` for a run whose epochs have `ratio` times as many steps.

        A file that gets the number of an earlier one replaces it.

        Args:
            of: the file that the run resumed; nothing is renamed unless it is one of them.
        """
        files = [(step, path) for (began, step), path in self.places() if step and began == epoch]  # newest first
        if not any(path.samefile(of) for _, path in files):
            return
        # The newest of them stays the newest throughout, in case the run is killed here.
        for step, path in files if ratio > 1 else reversed(files):
            path.replace(self.folder / f"checkpoint-{epoch}-{rescaled(step, ratio)}.pth")

    def delete_old(self) -> None:
        """Delete all but the newest `keep` numbered files, unless none of those can be read."""
        numbered = self.numbered()
        kept, old = numbered[: self.keep], numbered[self.keep :]
        if old and not any(map(is_intact, kept)):
            logger.warning("%s cannot be read back: older checkpoints are kept", kept[0])
            return
        for path in old:
            try:
                path.unlink()
            except OSError as error:
                logger.warning("cannot delete the old checkpoint %s: %s", path, first_line(error))

    def newest_valid(self) -> Path | None:
        """Return the newest checkpoint that can be read, to resume from. Warn about damaged checkpoints and leave them
        in place. If no numbered checkpoint can be read, use `last`, or else a `best` one, although that may be older.

        Returns:
            The path of the checkpoint, or None if there is no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints, but none can be read.
        """
        candidates = self.all()
        for path in candidates:
            try:
                load_checkpoint(path)  # checksums alone do not cover every part of the file
            except CheckpointError as error:
                logger.warning("%s; it is not used, trying the one before it", error)
            else:
                return path
        if candidates:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read: put an intact one there, or move them away to begin anew"
            )
        return None

    def remove_leftovers(self) -> None:
        """Delete temporary files that a killed save left behind."""
        for path in self.folder.glob("*".join(TEMPORARY)):
            path.unlink(missing_ok=True)
