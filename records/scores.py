"""Write the results of an evaluation to a file: over all images, and for each class."""

from collections.abc import Sequence
from pathlib import Path

from engine import EvalResult
from records.logs import write_json, write_rows

COLUMNS = ("class", "images", "correct", "acc1", "acc5", "loss", "real_acc1")


def write_scores(path: str | Path, result: EvalResult, classes: Sequence[str]) -> None:
    """Write one row for all images and one for each class: as JSON, with a list of the classes, if the suffix is .json,
    else as CSV. Accuracies are in percent; a class without images has none (null in JSON, an empty cell in CSV).

    Args:
        result: results that include the confusion matrix.
        classes: names of the network's classes, in the order of its logits.

    Raises:
        ValueError: the file cannot be written.
    """
    path = Path(path)
    images, correct = result.confusion.sum(1).tolist(), result.confusion.diagonal().tolist()
    total = {"images": result.count, "correct": sum(correct), "acc1": result.acc1}
    total |= {"acc5": result.acc5, "loss": result.loss}
    if result.real_acc1 is not None:
        total["real_acc1"] = result.real_acc1
    by_class = [
        {"class": name, "images": seen, "correct": right, "acc1": 100 * right / seen if seen else None}
        for name, seen, right in zip(classes, images, correct, strict=True)
    ]
    if path.suffix == ".json":
        write_json(path, {**total, "classes": by_class})
    else:
        write_rows(path, [{"class": "all", **total}, *by_class], COLUMNS)
