"""A folder of images as found in the wild: what cannot be read is counted, and what is merely odd is not."""

import os
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from harness import command, flags
from runs import BASE, rows

KINDS = {
    "broken": ("cut-off JPEG", "empty", "text", "dangling link", "link to itself"),
    "whole": ("CMYK", "16 bits", "palette", "1x1", "20,000 wide", "grey"),
}
FLAGS = [*BASE, *shlex.split("--data_set image_folder --epochs 2 --batch_size 8 --aa none --color_jitter 0")]


def plant(folder, count, unreadable=0):
    """`count` images of each kind in two classes, and links in circles. Returns the number of broken ones."""
    draw = np.random.default_rng(0)
    for number in range(count):
        into = folder / "ab"[number % 2]
        into.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        noise.save(into / f"{number}-cut.jpg")
        content = (into / f"{number}-cut.jpg").read_bytes()
        (into / f"{number}-cut.jpg").write_bytes(content[: len(content) // 2])
        (into / f"{number}-empty.jpg").touch()
        (into / f"{number}-text.jpg").write_text("not an image")
        (into / f"{number}-dangling.png").symlink_to("nowhere.png")
        (into / f"{number}-itself.png").symlink_to(f"{number}-itself.png")
        noise.convert("CMYK").save(into / f"{number}-cmyk.jpg")
        Image.fromarray(draw.integers(0, 2**16, (30, 30), dtype=np.uint16)).save(into / f"{number}-deep.png")
        noise.convert("P").save(into / f"{number}-palette.png")
        noise.resize((1, 1)).save(into / f"{number}-dot.png")
        noise.resize((20_000, 8)).save(into / f"{number}-wide.png")
        noise.convert("L").save(into / f"{number}-grey.jpg")
    for number in range(unreadable):
        path = folder / "a" / f"{number}-unreadable.png"
        noise.save(path)
        path.chmod(0)
    (folder / "a" / "circle").symlink_to("..")
    (folder / "b" / "circle").symlink_to(folder / "b")
    return len(KINDS["broken"]) * count + unreadable


def test_odd_and_broken_images(server, tmp_path, thorough, report):
    count = 40 if thorough else 2
    # Root reads every file, unless it is started without that right.
    rights = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if rights and shutil.which("setpriv") is None:
        pytest.skip("needs setpriv, or another user than root, for files without permission")
    broken = plant(tmp_path / "train", count, unreadable=count)
    in_validation = plant(tmp_path / "val", count)
    whole = len(KINDS["whole"]) * count
    out = tmp_path / "out"
    training = flags(tmp_path, out, "--skip_broken_eval", "true", "--num_workers", 2, base=FLAGS)
    with command([*rights, sys.executable, "main.py", *training], tmp_path / "log") as process:
        assert process.wait() == 0, process.output
        named = set(re.findall(r"left out a broken image, (\S+):", process.output))
        message = process.line("left out a broken image, .*unreadable")
    counts = [row["broken_images"] for row in rows(out)[0]]
    assert counts == [str(broken)] * 2
    assert len([path for path in named if "/train/" in path]) == broken
    report(
        f"training images: {', '.join(KINDS['broken'])}, without permission",
        injected=broken,
        lost=f"{counts[-1]} images, counted in `summary.csv`; others take their places, the training finishes",
        reads=message,
    )
    evaluation = flags(tmp_path, None, "--eval", "true", "--finetune", out / "checkpoint-last.pth", base=EVALUATION)
    for size in (1, 2):
        ranks = server.ranks(size, *evaluation)
        assert 2 in [process.wait() for process in ranks]
        refused = next(process for process in ranks if process.poll() == 2)
        assert re.search(r"cannot read the validation image \S+: .*--skip_broken_eval true", refused.error())
        ranks = server.finish(size, *evaluation, "--skip_broken_eval", "true", "--num_workers", 2)
        line = ranks[0].line("top-1")
        assert f"on {whole} images  ({in_validation} broken images left out)" in line
    report(
        "validation images: the same but the last",
        injected=in_validation,
        lost="the evaluation: it refuses, exit code 2",
        reads=refused.error(),
    )
    report(
        "the same with `--skip_broken_eval true`, on 1 and 2 ranks",
        injected=in_validation,
        lost="exactly these; the report says how many",
        reads=re.sub(r"top-1.*(?=on \d)", "... ", line),
    )
    report(
        f"images: {', '.join(KINDS['whole'])}, and links in circles",
        injected=2 * whole + 4,
        lost="nothing: each is used once, and no folder twice",
        reads="",
    )


EVALUATION = shlex.split(
    "--model vanillanet_6 --width_mult 0.015625 --input_size 32 --data_set image_folder --device cpu --num_workers 0 "
    "--batch_size 8"
)
