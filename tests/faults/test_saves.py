"""Saves that fail, checkpoints that are damaged afterwards, and what retention must not delete."""

import contextlib
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess

import pytest
import torch

import models
from harness import flags, mount, needs_mounts, saved, temporary_files, until
from records.checkpoints import CheckpointFolder, load_checkpoint, save_checkpoint
from runs import assert_same_run, differences

SAVING = ("--save_ckpt_steps", 5)  # at most 6 checkpoints in all, so that none is deleted


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.pth")}


def assert_only_whole_checkpoints(folder, straight):
    """Every checkpoint there is loads, and holds what the undisturbed run had at that step; nothing else is left."""
    assert temporary_files(folder) == []
    for path in CheckpointFolder(folder).numbered():
        states = load_checkpoint(path), load_checkpoint(straight / path.name)
        for state in states:
            del state["args"]
        if states[0]["step"] != states[1]["step"]:  # before the evaluation of the epoch, and after it
            assert [state["step"] for state in states] == [states[0]["steps_per_epoch"], 0]
            for state in states:
                del state["step"], state["samples"], state["best"]
                for rank in state["ranks"]:
                    del rank["meter"]
        assert differences(*states) == []


# -- saves that fail


def test_a_limit_on_the_size_of_files(server, data, undisturbed, tmp_path, thorough, report):
    """Each file fails where it passes the limit: logs, curves or checkpoint."""
    straight = undisturbed(1, *SAVING)
    size = max(path.stat().st_size for path in straight.glob("*.pth"))
    limits = [size - 1, *(int(size / 1.3**i) for i in range(1, 20))] if thorough else [size // 2]
    for limit in limits:
        folder = tmp_path / str(limit)
        run = flags(data, folder, *SAVING, "--auto_resume", "true")
        process = server.start(*run, limits={"RLIMIT_FSIZE": limit})
        assert process.wait() == 2
        message = process.error()
        assert f"cannot write {folder}/" in message
        assert "File too large; what was there before is kept" in message
        assert_only_whole_checkpoints(folder, straight)
        server.finish(1, *run)
        assert_same_run(straight, folder)
    # A file that is there already is untouched.
    linear, target = tmp_path / "linear.pth", tmp_path / "deployed.pth"
    save_checkpoint({"model": load_checkpoint(straight / "checkpoint-last.pth")["model"]}, linear)
    target.write_bytes(b"before")
    network = (
        "--model vanillanet_6 --width_mult 0.015625 --input_size 32 --data_set FMNIST --device cpu --num_workers 0"
    )
    deploying = flags(data, None, "--finetune", linear, "--switch_to_deploy", target, base=network.split())
    process = server.start(*deploying, limits={"RLIMIT_FSIZE": 4096})
    assert process.wait() == 2
    assert f"cannot write {target}: File too large" in process.error()
    assert target.read_bytes() == b"before"
    report(
        "a limit on the size of files (RLIMIT_FSIZE), which checkpoint, logs or curves pass",
        injected=len(limits) + 1,
        lost="the steps since the last save, exit code 2; without the limit the same end",
        reads=message,
    )


@needs_mounts
@pytest.mark.parametrize("size", [1, 2])
def test_a_full_disk(server, data, undisturbed, tmp_path, thorough, report, size):
    if size == 2 and not thorough:
        pytest.skip("as with one rank; by `make faults`")
    straight = undisturbed(size, *SAVING)
    folder = tmp_path / "run"
    folder.mkdir()
    run = flags(data, folder, *SAVING, "--auto_resume", "true")
    times = 0
    with mount(("-t", "tmpfs", "-o", "size=1M"), "tmpfs", folder):
        for kilobytes in range(1200, 6000, 300) if thorough else [1800]:
            subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", folder], check=True)
            ranks = server.ranks(size, *run)
            codes = [process.wait() for process in ranks]
            if codes == [0] * size:
                break
            times += 1
            message = ranks[0].error()
            assert codes[0] == 2
            assert set(codes) <= {1, 2}  # the other rank learns of a failed save, and loses one that fails otherwise
            assert f"cannot write {folder}/" in message
            assert "No space left on device" in message
            assert_only_whole_checkpoints(folder, straight)
        subprocess.run(["mount", "-o", "remount,size=50M", folder], check=True)
        server.finish(size, *run)
        assert_same_run(straight, folder)
    assert times
    report(
        f"a full disk (tmpfs), {size} rank{'s' * (size > 1)}",
        injected=times,
        lost="the steps since the last save, exit code 2; with more room the same end",
        reads=message,
    )


@needs_mounts
def test_a_folder_that_becomes_read_only(server, data, undisturbed, tmp_path, thorough, report):
    straight = undisturbed(1, *SAVING)
    times = 5 if thorough else 1
    for i in range(times):
        folder = tmp_path / str(i)
        run = flags(data, folder, *SAVING, "--auto_resume", "true")
        process = server.start(*run)
        until(lambda: saved(folder) >= 5 * (1 + i), what="a save")  # noqa: B023  called at once
        process.freeze()
        before = digests(folder)
        with mount(("--bind",), folder, folder), contextlib.ExitStack() as remounted:
            subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
            remounted.callback(process.kill, signal.SIGCONT)
            remounted.close()
            assert process.wait() == 2
            message = process.error()
            assert f"cannot write {folder}/" in message
            assert "Read-only file system" in message
            again = server.start(*run)  # before its first epoch
            assert again.wait() == 2
            assert "Read-only file system" in again.error()
            assert "step" not in again.output
        assert {name: digest for name, digest in digests(folder).items() if name in before} == before
        server.finish(1, *run)  # and deletes a temporary file, which could not be deleted in a read-only folder
        assert_only_whole_checkpoints(folder, straight)
        assert_same_run(straight, folder)
    report(
        "an output folder that becomes read-only",
        injected=times,
        lost="the steps since the last save, exit code 2; begun in such a folder a run ends before its first step",
        reads=message,
    )


# -- damaged checkpoints


def halve(content):
    return content[: len(content) // 2]


def flip(content, position):
    changed = bytearray(content)
    changed[position // 8] ^= 1 << position % 8
    return bytes(changed)


def test_a_damaged_checkpoint(server, data, undisturbed, tmp_path, thorough, report):
    """Runs that go on from the one before it, to the same end."""
    straight = undisturbed(1, *SAVING)
    damages = {
        "cut in half": halve,
        "emptied": lambda content: b"",
        "with one bit flipped": lambda content: flip(content, 4 * len(content)),
    }
    for number, (name, damage) in enumerate(damages.items()):
        if not thorough and number != 2:
            continue
        folder = tmp_path / str(number)
        shutil.copytree(straight, folder)
        newest, before = CheckpointFolder(folder).numbered()[:2]
        newest.write_bytes(damage(newest.read_bytes()))
        run = flags(data, folder, *SAVING, "--auto_resume", "true")
        process = server.start(*run)
        assert process.wait() == 0, process.output
        message = process.line(f"{newest.name}.* is not used, trying the one before it")
        assert f"resumed {before}" in process.output, name
        assert_same_run(straight, folder)
    report(
        f"the newest checkpoint {', '.join(damages)}",
        injected=len(damages),
        lost="a save interval, done again from the one before it: the same end",
        reads=message,
    )


def test_any_flipped_bit(tmp_path, thorough, report):
    """Anywhere in the file: in the weights, or in what the archive keeps about itself, where no checksum looks.

    A flip there that changes nothing of what is read, such as in a date, is no damage.
    """
    folder = CheckpointFolder(tmp_path)
    model = models.VanillaNet(num_classes=10, dims=(4, 8), strides=(2,))
    state = {"model": model.state_dict(), "epoch": 1, "args": {"lr": 0.1, "opt": "lamb"}}
    folder.save(state, epoch=1, step=0)
    newest = folder.save(state, epoch=2, step=0)
    content = newest.read_bytes()
    bits = range(8 * len(content))
    end = bits[-8 * 98 :: 1 if thorough else 7]  # the archive's three end records
    noticed = harmless = 0
    for position in [*random.Random(0).sample(bits, 20_000 if thorough else 100), *end]:
        newest.write_bytes(flip(content, position))
        if folder.newest_valid() != newest:
            noticed += 1
        else:
            harmless += 1
            assert differences(load_checkpoint(newest), state) == [], position
    start = content.find(state["model"]["stem1.0.weight"].numpy().tobytes())
    assert start > 0
    for position in random.Random(1).sample(range(8 * start, 8 * (start + 64)), 50 if thorough else 15):  # a weight
        newest.write_bytes(flip(content, position))
        assert folder.newest_valid() != newest
    # The mark of a folder in the archive's directory: torch would read nothing into the tensor, without a word.
    entries = [found.start() for found in re.finditer(b"PK\x01\x02", content)]
    assert len(entries) > len(state["model"])
    for entry in entries:
        newest.write_bytes(flip(content, 8 * (entry + 38) + 4))
        assert folder.newest_valid() != newest
    report(
        "one bit flipped at a random place of a checkpoint, or in the end of its archive",
        injected=noticed + harmless,
        lost=f"nothing: {noticed} were noticed, and the other {harmless} change nothing of what is read from the file",
        reads="",
    )


def test_no_checkpoint_can_be_read(server, data, undisturbed, tmp_path, report):
    """The run does not begin anew over what may still be rescued."""
    straight = undisturbed(1, *SAVING)
    shutil.copytree(straight, tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint-*.pth"):
        path.write_bytes(halve(path.read_bytes()))
    before = digests(tmp_path / "run")
    process = server.start(*flags(data, tmp_path / "run", *SAVING, "--auto_resume", "true"))
    assert process.wait() == 2
    assert digests(tmp_path / "run") == before
    report("all checkpoints cut in half", injected=1, lost="nothing more: exit code 2", reads=process.error())


# -- retention


def test_retention_keeps_what_is_needed(tmp_path, thorough, report):
    """After every save the newest and the best can be read; when all that would stay is damaged, the last one stays."""
    runs = 300 if thorough else 8
    chance = random.Random(0)
    saves = 0
    for number in range(runs):
        path = tmp_path / str(number)
        path.mkdir()
        folder = CheckpointFolder(path, keep=chance.randint(1, 3))
        best = None
        for epoch in range(8):
            names = ["best"] if chance.random() < 0.3 else []
            best = epoch if names else best
            folder.save(
                {"epoch": epoch, "weights": torch.full((8,), float(epoch))}, epoch=epoch + 1, step=0, names=names
            )
            saves += 1
            readable = folder.newest_valid()
            assert load_checkpoint(readable)["epoch"] == epoch
            assert len(folder.numbered()) == min(folder.keep, epoch + 1)
            if best is not None:
                assert load_checkpoint(path / "checkpoint-best.pth")["epoch"] == best
        # All that retention would keep is damaged: it does not delete the one that is left.
        folder.keep += 1
        folder.save({"epoch": 8}, epoch=9, step=0)
        *kept, only = folder.numbered()
        for damaged in kept:
            rewritten = halve(damaged.read_bytes())
            damaged.unlink()  # and not its other name, the best
            damaged.write_bytes(rewritten)
        folder.keep -= 1
        folder.delete_old()
        assert only.exists()
        assert folder.newest_valid() == only
    report(
        "retention, with damaged files among those to keep",
        injected=f"{runs}, after {saves} saves",
        lost="nothing: the best and the only one that can be read stay",
        reads="",
    )


@needs_mounts
def test_a_delete_that_fails(server, data, tmp_path, report):
    """An old checkpoint that is a mount point cannot be deleted."""
    folder = tmp_path / "run"
    run = flags(data, folder, "--save_ckpt_num", 1, "--auto_resume", "true")
    server.finish(1, *run, "--early_stop_epochs", 1)
    old = folder / "checkpoint-0.pth"
    with mount(("--bind",), old, old):
        (process,) = server.finish(1, *run)
        message = process.line("cannot delete the old checkpoint")
        assert os.fspath(old) in message
    assert [path.name for path in CheckpointFolder(folder).numbered()] == ["checkpoint-1.pth", old.name]
    report("an old checkpoint that cannot be deleted", injected=2, lost="nothing, the run goes on", reads=message)
