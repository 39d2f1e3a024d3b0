"""The confusion matrix of an evaluation, and the file of its results, against scikit-learn's."""

import csv
import json

import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, top_k_accuracy_score
from torch import nn

from engine import Precision, evaluate
from records.scores import write_scores

CLASSES = ["cat", "dog, big", "naïve", "none", "e", "f"]  # of `none` there is no image


@pytest.fixture(scope="module")
def found():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, len(CLASSES), generator=generator)
    targets = torch.randint(len(CLASSES), (50,), generator=generator)
    targets[targets == 3] = 2
    batches = [(logits[i : i + 8], targets[i : i + 8], torch.arange(i, min(i + 8, 50))) for i in range(0, 50, 8)]
    result = evaluate(nn.Identity(), batches, precision=Precision(torch.device("cpu")), confusion=len(CLASSES))
    return logits, targets, result


def test_confusion_matrix(found):
    logits, targets, result = found
    expected = confusion_matrix(targets, logits.argmax(1), labels=range(len(CLASSES)))
    assert result.confusion.tolist() == expected.tolist()


def test_results_as_csv(found, tmp_path):
    logits, targets, result = found
    write_scores(tmp_path / "new" / "scores.csv", result, CLASSES)
    with (tmp_path / "new" / "scores.csv").open(newline="", encoding="utf-8") as file:
        total, *rows = csv.DictReader(file)
    assert (total["class"], int(total["images"])) == ("all", 50)
    assert float(total["acc1"]) == pytest.approx(100 * accuracy_score(targets, logits.argmax(1)))
    top5 = top_k_accuracy_score(targets, logits, k=5, labels=range(len(CLASSES)))
    assert float(total["acc5"]) == pytest.approx(100 * top5)
    assert float(total["loss"]) == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)
    assert [row["class"] for row in rows] == CLASSES
    for index, row in enumerate(rows):
        own = targets == index
        assert int(row["images"]) == own.sum()
        assert int(row["correct"]) == (logits.argmax(1)[own] == index).sum()
    assert rows[3]["acc1"] == ""


def test_results_as_json(found, tmp_path):
    write_scores(tmp_path / "scores.json", found[-1], CLASSES)
    content = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert content["images"] == 50
    assert [row["class"] for row in content["classes"]] == CLASSES
    assert content["classes"][3]["acc1"] is None


def test_a_file_that_cannot_be_written_is_one_line(found, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write .*scores\.csv"):
        write_scores(tmp_path / "file" / "scores.csv", found[-1], CLASSES)
