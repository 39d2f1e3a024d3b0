"""The worked page docs/finetune.md: its commands one after another, on a small folder of JPEG files."""

import csv
import re
import shlex
from pathlib import Path

from PIL import Image

import datasets
from runs import EMBEDDED, ROOT

CLASSES = {1: "trousers", 5: "sandal", 8: "bag"}


def photographs(folder):
    """18 training and 6 validation images of three classes, as JPEG files."""
    images = datasets.read_idx(EMBEDDED / "train-images-idx3-ubyte.gz")
    labels = datasets.read_idx(EMBEDDED / "train-labels-idx1-ubyte.gz")
    for label, name in CLASSES.items():
        for number, image in enumerate(images[labels == label][:8]):
            path = folder / ("train" if number < 6 else "val") / name / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).convert("RGB").resize((120, 90)).save(path)
    return folder


def test_the_commands_lead_from_a_folder_to_a_deployed_file(server, tmp_path):
    page = (ROOT / "docs" / "finetune.md").read_text()
    section = page[page.index("## From a folder") : page.index("## Fine-tuning")]
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", section, re.DOTALL)).replace("\\\n", " ")
    data, out = photographs(tmp_path / "data"), tmp_path / "own_data"
    commands = [line for line in blocks.splitlines() if line]
    assert len(commands) == 5
    for command in commands:
        words = shlex.split(command.replace("outputs/own_data", str(out)).replace("DIR", str(data)))
        assert words[0] == "python"
        if words[-2:] == ["--data_path", str(data)]:  # the training, in a few steps
            words += ["--epochs", "3", "--decay_epochs", "1", "--warmup_epochs", "0", "--output_dir", str(out)]
        done = server.start(*words[2:], target=f"{Path(words[1]).stem}:main")
        assert done.wait() == 0, (command, done.output)
    with (out / "results.csv").open(newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == ["all", "bag", "sandal", "trousers"]
    with (out / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["path"] for row in rows}) == 6
    assert {row["class"] for row in rows} == set(CLASSES.values())
    assert Image.open(out / "confusion.png").size[0] > 300
