"""A checkpoint that would run code when it is read. Every way to read one refuses it, and the code does not run."""

import os
import pickle
import shlex
import shutil

import pytest
import torch

from harness import flags
from object_detection import make_garments
from records.checkpoints import CheckpointError, load_checkpoint
from runs import ROOT

# What each command of this repository is given to read the file.
COMMANDS = {
    "export.py": ["FILE", "--to", "onnx", "--output", "OUT.onnx"],
    "predict.py": ["FILE", "IMAGE"],
    "benchmark.py": ["--models", "FILE", "--runtimes", "eager", "--calls", "1"],
    "visualize.py cam": ["IMAGE", "--network", "vanillanet_5=FILE", "--output", "OUT.png"],
    "visualize.py detections": ["IMAGE", "--network", "FILE", "--output", "OUT.png"],
}
TRAINING = {
    "main.py --resume": ["--resume", "FILE"],
    "main.py --finetune": ["--finetune", "FILE"],
    "main.py --eval true": ["--eval", "true", "--finetune", "FILE"],
    "main.py --switch_to_deploy": ["--switch_to_deploy", "OUT", "--finetune", "FILE"],
    "main.py --teacher_weights": ["--teacher", "vanillanet_5", "--teacher_weights", "FILE"],
}
DETECTION = (
    "--model mask_rcnn_vanillanet_5 --width_mult 0.015625 --device cpu --num_workers 0 --data_path {data} --epochs 1 "
    "--annotations train.json --images train --eval_annotations val.json --eval_images val --lr_steps --warmup_steps 0"
)


@pytest.fixture(scope="module")
def garments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("garments")
    make_garments.main([str(folder), "--train", "2", "--val", "2", "--side", "64"])
    return folder


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def write(path, left_behind, *, zipped):
    content = {"model": Payload(str(left_behind)), "epoch": 1}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))


def test_the_payload_is_one(tmp_path):
    evil, zipped, pickled = tmp_path / "evil.pth", tmp_path / "zipped", tmp_path / "pickled"
    write(evil, zipped, zipped=True)
    torch.load(evil, weights_only=False)
    write(evil, pickled, zipped=False)
    pickle.loads(evil.read_bytes())
    assert zipped.exists()
    assert pickled.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_every_command_refuses(server, data, garments, tmp_path, thorough, report, zipped):
    evil, left = tmp_path / "evil.pth", tmp_path / "left-behind"
    write(evil, left, zipped=zipped)
    image = ROOT / "data" / "fashion-mnist" / "t10k-images-idx3-ubyte.gz"
    names = {
        "FILE": str(evil),
        "OUT": str(tmp_path / "out"),
        "OUT.png": str(tmp_path / "out.png"),
        "OUT.onnx": str(tmp_path / "out.onnx"),
        "IMAGE": str(image),
    }

    detection = shlex.split(DETECTION.format(data=garments))

    def named(arguments):
        found = []
        for argument in arguments:
            model, equals, value = argument.rpartition("=")
            found.append(f"{model}{equals}{names.get(value, value)}")
        return found

    runs = {name: ("main:main", flags(data, None, *named(given))) for name, given in TRAINING.items()}
    for name, given in COMMANDS.items():
        if thorough or zipped:
            file, *command = name.split()
            runs[name] = f"{file.removesuffix('.py')}:main", [*command, *named(given)]
    for flag in ("--finetune", "--resume", "--backbone_weights"):
        runs[f"object_detection/main.py {flag}"] = "object_detection.main:main", [*detection, flag, str(evil)]
    started = {name: server.start(*arguments, target=target) for name, (target, arguments) in runs.items()}
    for name, process in started.items():
        assert process.wait() == 2, (name, process.output)
        assert f"cannot load {evil}: refused: " in process.error(), name
        assert not left.exists(), name
        assert not list(tmp_path.glob("out*")), name
    report(
        f"a checkpoint, {'zipped' if zipped else 'a bare pickle'}, that would make a folder when it is read, given to "
        + ", ".join(f"`{name}`" for name in runs),
        injected=len(runs),
        lost="nothing: exit code 2, and no folder was made",
        reads=started["main.py --finetune"].error(),
    )


def test_auto_resume_refuses(server, data, tmp_path, report):
    folder = tmp_path / "run"
    run = flags(data, folder, "--auto_resume", "true")
    server.finish(1, *run, "--early_stop_epochs", 2)
    shutil.copy(folder / "checkpoint-1.pth", tmp_path / "whole.pth")
    write(folder / "checkpoint-1.pth", tmp_path / "left-behind", zipped=True)
    (process,) = server.finish(1, *run)
    message = process.line("refused")
    assert "is not used, trying the one before it" in message
    assert not (tmp_path / "left-behind").exists()
    report(
        "such a file as the newest checkpoint of the output folder",
        injected=1,
        lost="a save interval, as with a damaged file",
        reads=message,
    )


def test_torch_hub_refuses(tmp_path, report):
    evil, left = tmp_path / "evil.pth", tmp_path / "left-behind"
    for zipped in (True, False):
        write(evil, left, zipped=zipped)
        with pytest.raises((RuntimeError, pickle.UnpicklingError)) as raised:
            torch.hub.load(
                str(ROOT), "vanillanet_5", source="local", pretrained=True, pretrained_cfg_overlay={"file": str(evil)}
            )
        assert not left.exists()
    with pytest.raises(CheckpointError, match="refused"):
        load_checkpoint(evil)
    report(
        "such files given to `torch.hub.load` through `hubconf.py`",
        injected=2,
        lost="nothing: an exception, and no folder was made",
        reads=str(raised.value).splitlines()[0],
    )
