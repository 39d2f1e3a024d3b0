"""Checkpoints: atomic, verified, never executed; and how the processes find each other."""

import argparse
import os
import pickle
import random
import resource
import signal

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import models
import utils
from records.checkpoints import (
    CheckpointError,
    CheckpointFolder,
    checkpoint_weights,
    is_intact,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from records.logs import SumMeter


def tiny(num_classes=10, **kwargs):
    return models.VanillaNet(num_classes=num_classes, dims=(8, 8, 16), strides=(1, 2), **kwargs)


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint({"model": tiny().state_dict(), "epoch": 3, "args": {"lr": 0.1}}, path)
    return path


def test_round_trip(checkpoint):
    loaded = load_checkpoint(checkpoint)
    assert loaded["epoch"] == 3
    assert loaded["args"] == {"lr": 0.1}
    assert [p.name for p in checkpoint.parent.iterdir()] == ["a.pth"]
    umask = os.umask(0)
    os.umask(umask)
    assert checkpoint.stat().st_mode & 0o777 == 0o666 & ~umask


def test_published_namespace_loads(tmp_path):
    torch.save({"model": {}, "args": argparse.Namespace(decay_epochs=100)}, tmp_path / "p.pth")
    assert load_checkpoint(tmp_path / "p.pth")["args"].decay_epochs == 100


class _Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_foreign_code_is_refused_and_not_run(tmp_path, zipped):
    path, target = tmp_path / "evil.pth", tmp_path / "left-behind"
    if zipped:
        torch.save({"model": _Payload(str(target))}, path)
    else:
        path.write_bytes(pickle.dumps({"model": _Payload(str(target))}))
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(path)
    assert "\n" not in str(raised.value)
    assert not target.exists()


@pytest.mark.parametrize("damage", ["missing", "folder", "empty", "half", "text", "bit", "no dict"])
def test_bad_files_are_one_clear_line(checkpoint, damage):
    data = checkpoint.read_bytes()
    if damage == "missing":
        checkpoint.unlink()
    elif damage == "folder":
        checkpoint.unlink()
        checkpoint.mkdir()
    elif damage == "no dict":
        torch.save([1], checkpoint)
    else:
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 4
        contents = {"empty": b"", "half": data[: len(data) // 2], "text": b"hello\n" * 50, "bit": bytes(flipped)}
        checkpoint.write_bytes(contents[damage])
    with pytest.raises(CheckpointError, match=r"a\.pth") as raised:
        load_checkpoint(checkpoint)
    assert "\n" not in str(raised.value)


def test_every_flipped_bit_of_a_record_is_noticed(checkpoint):
    """The weights themselves are covered by the checksum, wherever the bit lies."""
    data = bytearray(checkpoint.read_bytes())
    weight = tiny().state_dict()["stem1.1.running_var"].numpy().tobytes()
    start = bytes(data).find(weight)
    assert start > 0
    for position in random.Random(0).sample(range(start, start + len(weight)), 16):
        data[position] ^= 1
        checkpoint.write_bytes(bytes(data))
        assert not is_intact(checkpoint)
        data[position] ^= 1
    checkpoint.write_bytes(bytes(data))
    assert is_intact(checkpoint)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(checkpoint):
    before = checkpoint.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        with pytest.raises(CheckpointError, match=r"cannot write .*a\.pth"):
            save_checkpoint({"model": torch.zeros(100_000)}, checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoint.read_bytes() == before
    assert [p.name for p in checkpoint.parent.iterdir()] == ["a.pth"]


def test_weights_of_a_checkpoint():
    weights = {"x": torch.ones(1)}
    file = {"model": weights, "model_ema": {"x": torch.zeros(1)}, "epoch": 1}
    assert checkpoint_weights(file)["x"] == 1
    assert checkpoint_weights(file, key="nothing|model_ema")["x"] == 0
    assert checkpoint_weights(weights, whole_file=True) == weights
    assert list(checkpoint_weights({"model": {"net.x": weights["x"], "y": weights["x"]}}, prefix="net.")) == ["x"]
    for bad in ({"key": "ema"}, {"key": "epoch"}, {"prefix": "net."}, {"key": "array"}):
        with pytest.raises(CheckpointError):
            checkpoint_weights({**file, "array": np.zeros(2)}, **bad)
    with pytest.raises(CheckpointError, match="model, model_ema, epoch"):
        checkpoint_weights(file, key="ema", whole_file=True)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (lambda: tiny(num_classes=7), "of another shape (cls1.2.weight: (7, 16, 1, 1), the network's (10, 16, 1, 1))"),
        (lambda: models.VanillaNet(num_classes=10, dims=(8, 8, 16, 16), strides=(1, 2, 1)), "unexpected"),
        (lambda: tiny(act_num=1), "stem2.2.weight"),
        (lambda: tiny(deploy=True), "missing"),
    ],
)
def test_a_mismatch_is_an_error_and_nothing_is_half_loaded(other, problem):
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as raised:
        load_weights(model, other().state_dict(), path="w.pth")
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_folder_keeps_the_newest_and_finds_the_newest_valid(tmp_path, caplog):
    folder = CheckpointFolder(tmp_path, keep=3)
    for epoch in range(3):
        folder.save({"at": (epoch, 0)}, epoch=epoch, step=5)
        folder.save({"at": (epoch, 1)}, epoch=epoch + 1, step=0, names=["best"] if epoch == 0 else [])
    names = [path.name for path in folder.numbered()]
    assert names == ["checkpoint-2.pth", "checkpoint-2-5.pth", "checkpoint-1.pth"]
    assert load_checkpoint(tmp_path / "checkpoint-last.pth")["at"] == (2, 1)
    assert load_checkpoint(tmp_path / "checkpoint-best.pth")["at"] == (0, 1)  # outlives its number
    newest = tmp_path / names[0]
    newest.write_bytes(newest.read_bytes()[:100])
    (tmp_path / names[1]).write_bytes(b"")
    assert folder.newest_valid().name == "checkpoint-1.pth"
    assert sum("is not used" in record.message for record in caplog.records) == 2
    (tmp_path / "writing-abc.tmp").write_bytes(b"x")
    folder.remove_leftovers()
    assert not list(tmp_path.glob("*.tmp"))


def test_rng_state_round_trips_through_a_file(tmp_path):
    device = torch.device("cpu")
    utils.seed_everything(5)
    random.gauss(0, 1), np.random.randn(), torch.rand(3)
    save_checkpoint({"rng": utils.rng_state(device)}, tmp_path / "r.pth")
    expected = random.gauss(0, 1), np.random.randn(), torch.randn(3)
    utils.set_rng_state(load_checkpoint(tmp_path / "r.pth")["rng"], device)
    again = random.gauss(0, 1), np.random.randn(), torch.randn(3)
    assert expected[:2] == again[:2]
    assert torch.equal(expected[2], again[2])


@pytest.mark.parametrize(
    ("env", "itp", "expected"),
    [
        ({}, False, None),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, False, (3, 8, 1)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "5"}, False, (5, 16, 5)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, False, None),  # a batch script's own shell
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            True,
            (1, 2, 1),
        ),
    ],
)
def test_ranks_from_the_launcher(env, itp, expected):
    assert utils._launched_as(env, itp) == expected


@pytest.mark.parametrize(
    ("nodes", "first"), [("gpu7", "gpu7"), ("gpu[003-010,12],x", "gpu003"), ("a1,a2", "a1"), ("n[5,7]", "n5")]
)
def test_first_slurm_host(nodes, first):
    assert utils._first_slurm_host(nodes) == first


def test_wrong_world_is_one_clear_line(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="torchrun --nproc_per_node=4"):
        utils.init_world("cpu", world_size=4)
    with pytest.raises(ValueError, match="mpirun"):
        utils.init_world("cpu", dist_on_itp=True)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cpu"):
            utils.init_world("cuda")
    with pytest.raises(ValueError, match="--device must be cuda, cuda:N, mps or cpu, not gpu"):
        utils.init_world("gpu")


def test_metal(monkeypatch):
    """What can be seen of it without a Mac: no float64, one process, and a line where it is missing."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device mps: Metal is not available here; use --device cpu"):
        utils.init_world("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert utils.init_world("mps").device == torch.device("mps")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--device mps computes in one process, and 2 were started"):
        utils.init_world("mps")
    with pytest.raises(ValueError, match="--dist_url localhost:29500 must be env:// or tcp://HOST:PORT"):
        utils.init_world("cpu", dist_url="localhost:29500")
    with FakeTensorMode():
        assert SumMeter(["loss"], torch.device("mps")).sums.dtype == torch.float32
    assert SumMeter(["loss"], torch.device("cpu")).sums.dtype == torch.float64
