"""Training held against recordings of the published loop, in float64: `data/training_*.json` and `.npz`.

A recording's keys are explained in `data/README.md`. Each runs on the path that `main.py` takes, from flags to the
files that a run leaves; only the images and the network, whose arguments no flag gives, are put in the place of main's.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import main
import models
from options import build_parser
from records.checkpoints import load_checkpoint

DATA = Path(__file__).parent / "data"
RECORDINGS = sorted(path.stem for path in DATA.glob("training_*.json"))
OWN_KEYS = {"cfg", "num_classes", "criterion", "smoothing", "steps", "ema", "ramp", "np_seed_before_training"}


class RecordedLoader:
    """Batches as they were fed: X (epochs, batches, N, 3, H, W), Y (epochs, batches, N)."""

    resumable = True

    def __init__(self, images, targets):
        self.images, self.targets, self.broken = images, targets, set()

    def __len__(self):
        return len(self.images[0])

    def set_epoch(self, epoch, start_sample=0):
        self.epoch = epoch

    @property
    def remaining_batches(self):
        return len(self)

    def __iter__(self):
        for images, targets in zip(self.images[self.epoch], self.targets[self.epoch], strict=True):
            yield torch.from_numpy(images).double(), torch.from_numpy(targets)


def flags_of(recording: dict) -> list[str]:
    """The command line of a recording: its own keys that are flags, and what follows from the others."""
    criterion = recording["criterion"]
    # A flag at its default is left out: not all go with all others.
    defaults = vars(build_parser().parse_known_args([])[0])
    flags = {key: value for key, value in recording.items() if key not in OWN_KEYS and value != defaults[key]}
    # A loop that was given plain cross-entropy had no smoothing, whatever its flag.
    flags["smoothing"] = 0 if criterion == "CrossEntropyLoss" else recording["smoothing"]
    flags["bce_loss"] = criterion == "BinaryCrossEntropy"
    flags["decay_epochs"] = re.match(r"epoch */ *(\d+)", recording["ramp"]).group(1)
    flags["seed"] = recording["np_seed_before_training"]  # main seeds NumPy with it, just before the first step
    flags |= {"device": "cpu", "log_freq": 1, "disable_eval": True, "data_path": "recorded", "model_ema": True}
    words = [f"--{flag}={value}" for flag, value in flags.items()]
    return [*words, "--model_ema_decay", *map(str, recording["ema"])]


def windows(values: np.ndarray, update_freq: int) -> np.ndarray:
    """One value an optimizer step; a recording may hold one a batch."""
    return values.reshape(-1, update_freq).mean(1)


def largest_difference(found: dict, arrays: dict, prefix: str) -> float:
    names = [name for name in arrays if name.startswith(f"{prefix}/") and not name.endswith("num_batches_tracked")]
    assert {name.removeprefix(f"{prefix}/") for name in names} == {
        name for name in found if not name.endswith("num_batches_tracked")
    }
    return max(np.abs(found[name.removeprefix(f"{prefix}/")].numpy() - arrays[name]).max() for name in names)


@pytest.mark.parametrize("name", RECORDINGS)
def test_training_is_the_published_training(name, tmp_path, monkeypatch):
    recording = json.loads((DATA / f"{name}.json").read_text())
    arrays = dict(np.load(DATA / f"{name}.npz"))
    loader = RecordedLoader(arrays["X"], arrays["Y"])
    network = models.VanillaNet(num_classes=recording["num_classes"], **recording["cfg"]).double()
    network.load_state_dict(
        {key.removeprefix("init/"): torch.from_numpy(x) for key, x in arrays.items() if key.startswith("init/")}
    )

    def open_data(args, world, preprocessing):
        mixup = main.build_mixup(args, recording["num_classes"])
        return main.Data(loader, None, None, None, recording["num_classes"], mixup)

    monkeypatch.setattr(main, "open_data", open_data)
    monkeypatch.setattr(main, "open_network", lambda args, world, data, source: (network, 0.0))
    criteria = []
    build_criterion = main.build_criterion
    monkeypatch.setattr(
        main, "build_criterion", lambda **kwargs: criteria.append(build_criterion(**kwargs)) or criteria[0]
    )
    main.main([*flags_of(recording), f"--batch_size={arrays['X'].shape[2]}", f"--output_dir={tmp_path}"])

    assert type(criteria[0]).__name__ == recording["criterion"]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for key, recorded in (("loss", "losses"), ("lr", "lrs"), ("weight_decay", "wds")):
        found = np.array([line[key] for line in lines])
        expected = windows(arrays[recorded], len(arrays[recorded]) // len(lines))
        assert np.abs(found - expected).max() < 1e-9, key
    checkpoint = load_checkpoint(tmp_path / "checkpoint-last.pth")
    assert largest_difference(checkpoint["model"], arrays, "final") < 1e-9
    for number, key in enumerate(["model_ema", *(f"model_ema_{decay}" for decay in recording["ema"][1:])]):
        assert largest_difference(checkpoint[key], arrays, f"ema{number}") < 1e-9
