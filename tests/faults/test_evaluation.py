"""An evaluation counts each image once, on any number of ranks."""

import json

import pytest

from harness import flags
from runs import cut_fmnist, rows


def test_every_number_of_images_on_every_number_of_ranks(server, tmp_path, report):
    sizes = (1, 2, 3)
    for size in sizes:
        server.finish(size, 40, tmp_path / f"{size}.json", target="workers:evaluate_all_sizes")
    alone, *others = (json.loads((tmp_path / f"{size}.json").read_text()) for size in sizes)
    assert [result[0] for result in alone] == list(range(1, 41))
    largest = 0.0
    for together in others:
        for ours, theirs in zip(together, alone, strict=True):
            assert ours[:4] == theirs[:4]  # count, top-1, top-5, ReaL
            assert ours[4] == pytest.approx(theirs[4], abs=1e-6)
            largest = max(largest, abs(ours[4] - theirs[4]))
    report(
        "evaluation of 1 to 40 images on 1, 2 and 3 ranks, in batches of 3",
        injected=40 * len(sizes),
        lost=f"nothing: count, top-1, top-5 and ReaL are equal, the loss to {largest:.0e}",
        reads="",
    )


def test_a_rank_without_validation_images(server, tmp_path, report):
    """It has to take part in what the other one does with its image."""
    data = cut_fmnist(tmp_path, train=16, test=1)
    folder = tmp_path / "run"
    server.finish(2, *flags(data, folder, "--epochs", 1, "--warmup_epochs", 0, "--dist_timeout", 60))
    assert float(rows(folder)[0][0]["test_acc1"]) in (0, 100)
    assert (folder / "checkpoint-best.pth").exists()
    report("one validation image for 2 ranks", injected=1, lost="nothing", reads="")
