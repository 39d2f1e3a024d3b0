"""Train, evaluate, draw, fuse or export a detector on data in COCO's format.

torchrun --nproc_per_node=8 object_detection/main.py @RECIPE --data_path DIR --output_dir OUT
python object_detection/main.py @RECIPE --eval true --finetune FILE --draw PICTURE
python object_detection/main.py @RECIPE --switch_to_deploy NEW --finetune FILE
python object_detection/main.py @RECIPE --export_onnx NEW --finetune FILE
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts this folder first in sys.path and would import its options.py. Put the parent folder there instead.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from object_detection.options import parse_args
from options import Arguments

if __name__ == "__main__":
    ARGS = parse_args()  # report a wrong flag before the slow imports below

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import training
import utils
from benchmarking import profiling
from deployment.fusing import write_deployed
from engine import Precision, Schedule, at_least_float32
from loading import loaders
from loading.images import BrokenImageError
from object_detection import checkpoints
from object_detection.coco import CocoDataset, collate
from object_detection.comparing import largest_difference
from object_detection.detectors import Detector
from object_detection.draw import draw_images
from object_detection.evaluation import KINDS, STATISTICS, average_precision, detect
from object_detection.export import export_onnx
from optim_factory import step_schedule
from records import curves, logs
from records.files import check_writable

logger = logging.getLogger("object_detection")

COMPARED_IMAGES = 8


# -- the parts, built from the arguments


def build_dataset(args: Arguments, *, train: bool) -> CocoDataset:
    annotations, images = (args.annotations, args.images) if train else (args.eval_annotations, args.eval_images)
    folder, masks = Path(args.data_path), args.model.startswith("mask_rcnn_")
    return CocoDataset(folder / annotations, folder / images, train=train, masks=masks, flip=args.flip)


def build_eval_loader(args: Arguments, dataset: CocoDataset, world: utils.World) -> loaders.EvalLoader:
    """Build a loader of single images: in batches, the padding changes detections a little, so that AP would depend on
    the number of processes."""
    loading = replace(training.loading_of(args, world), batch_size=1, collate=collate)
    return loaders.build_eval_loader(dataset, loading)


def first_images(dataset: CocoDataset, count: int) -> list[torch.Tensor]:
    """Return the first `count` images (3, H, W) that can be read. Raises ValueError if none can."""
    found: list[torch.Tensor] = []
    for index in range(len(dataset)):
        with contextlib.suppress(BrokenImageError):  # reporting broken images is left to evaluation
            found.append(dataset[index][0])
        if len(found) == count:
            break
    if not found:
        raise ValueError(f"no image of {dataset.path} can be read")
    return found


# -- evaluation


def evaluate(
    detector: Detector,
    loader: loaders.EvalLoader,
    dataset: CocoDataset,
    world: utils.World,
    precision: Precision,
    name: str,
    stop: utils.StopRequest | None = None,
) -> dict[str, float]:
    """Compute AP over all images, divided among the ranks. All ranks must call it; only rank 0 gets a non-empty result.

    Raises `training.EvaluationStopped`, see `training.until_stopped`.
    """
    batches = training.until_stopped(loader, world, stop, name=name)
    results = world.gather(detect(detector, batches, dataset=dataset, precision=precision))
    if not world.is_main:
        return {}
    return average_precision(dataset.data, [row for rows in results for row in rows], masks=detector.has_masks)


def ap_rows(found: dict[str, float], name: str) -> Iterator[list[str]]:
    for kind in KINDS.values():
        if any(key.startswith(kind) for key in found):
            values = (found.get(f"{kind}_{statistic}") for statistic in STATISTICS)
            yield [f"{name}{kind}", *("-" if value is None else f"{100 * value:.2f}" for value in values)]


def prepare_eval(args: Arguments, world: utils.World):
    """Return the loader, its data set, and the loaded detector in eval mode."""
    dataset = build_dataset(args, train=False)
    detector = checkpoints.build_detector(vars(args), len(dataset.classes) + 1)
    checkpoints.load_detector(args, detector, dataset)
    loader = build_eval_loader(args, dataset, world)
    return loader, dataset, detector.to(world.device, memory_format=training.layout_of(args)).eval()


def report_broken(world: utils.World, loader: loaders.EvalLoader) -> None:
    broken = training.broken_count(world, loader)
    if broken:
        logger.warning("%d broken images: what is in them counts as missed", broken)


def evaluate_checkpoint(args: Arguments, world: utils.World) -> None:
    if args.draw:
        check_writable(args.draw)
    loader, dataset, detector = prepare_eval(args, world)
    found = evaluate(detector, loader, dataset, world, training.build_precision(args, world.device), args.model)
    report_broken(world, loader)
    if world.is_main:
        title = f"AP (%) on {len(dataset)} images"
        print(logs.table([["", *STATISTICS], *ap_rows(found, "")], title))
        if args.draw:
            images = first_images(dataset, args.draw_images)
            draw_images(detector, images, args.draw, classes=dataset.classes, threshold=args.draw_threshold)
            print(f"picture: {args.draw}")


# -- deploying


def deploy_checkpoint(args: Arguments, world: utils.World) -> None:
    """Fuse the network, compare the detections, write the file on rank 0, and evaluate both forms side by side."""
    # Fuse, compare, write.
    loader, dataset, detector = prepare_eval(args, world)
    images = [image.to(world.device) for image in first_images(dataset, COMPARED_IMAGES)]
    fused, difference = write_deployed(
        detector,
        args.switch_to_deploy,
        compare=lambda unfused, fused: largest_difference(unfused, fused, images),
        answers="detections",
        record={**checkpoints.describe(detector, dataset), "args": dict(vars(args))},
        device=world.device,
        layout=training.layout_of(args),
        is_main=world.is_main,
    )

    # All ranks evaluate both forms. Rank 0 also measures their speed in turns, and prints the results.
    precision = training.build_precision(args, world.device)
    forms = {"train form": detector, "deploy form": fused}
    found = {name: evaluate(form, loader, dataset, world, precision, name) for name, form in forms.items()}
    report_broken(world, loader)
    if not world.is_main:
        return
    rates = profiling.throughput(list(forms.values()), images[:1], autocast=precision.autocast)
    rows = [["", "parameters (M)", "images/s"]]
    for (name, form), rate in zip(forms.items(), rates, strict=True):
        rows.append([name, f"{profiling.count_params(form) / 1e6:.3f}", f"{rate:.2f}"])
    print(logs.table(rows, args.model))
    aps = [row for name in forms for row in ap_rows(found[name], f"{name}, ")]
    print(logs.table([["", *STATISTICS], *aps], f"AP (%) on {len(dataset)} images"))
    print(f"largest difference of a detection: {difference:.1e} over {len(images)} images")
    print(f"speed-up: {rates[1] / rates[0]:.2f}, by medians over interleaved rounds of one image")
    print(f"deploy form: {args.switch_to_deploy}")


def export_checkpoint(args: Arguments, world: utils.World) -> None:
    _, dataset, detector = prepare_eval(args, world)
    if world.is_main:
        difference = export_onnx(detector, args.export_onnx, image=first_images(dataset, 1)[0])
        print(f"{args.export_onnx}: largest difference from PyTorch {difference:.1e}")


# -- training


@dataclass(frozen=True)
class Detection:
    """Objective of training: the sum of the detector's losses for a list of images (3, H, W) and their targets.

    Args:
        precision: precision to compute in; the losses are summed in float32 at least.
        sums: the names of the losses, with `loss` and `count`.
    """

    precision: Precision
    sums: Sequence[str]

    def averages(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {f"train_{name}": sums[name] / sums["count"] for name in self.sums if name != "count"}

    def __call__(self, model: nn.Module, batch: tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]):
        device = self.precision.device
        images = [image.to(device, non_blocking=True) for image in batch[0]]
        targets = [{name: x.to(device, non_blocking=True) for name, x in target.items()} for target in batch[1]]
        with self.precision.autocast():
            losses = model(images, targets)
        losses = {name: at_least_float32(value) for name, value in losses.items()}
        loss = sum(losses.values())
        sums = {name: value.detach() * len(images) for name, value in {"loss": loss, **losses}.items()}
        return loss, {**sums, "count": len(images)}


def open_detector(args: Arguments, world: utils.World, dataset: CocoDataset) -> Detector:
    """Open the detector to train, on its device, with weights from --finetune or a classifier, or with random ones."""
    utils.seed_everything(args.seed)  # all ranks must start from the same weights
    detector = checkpoints.build_detector(vars(args), len(dataset.classes) + 1)
    if args.finetune:
        checkpoints.load_detector(args, detector, dataset)
    elif args.backbone_weights and not args.resume:
        checkpoints.load_classifier(args, detector)
    return training.place(args, detector, world.device)


def open_schedule(args: Arguments, steps_per_epoch: int) -> Schedule:
    """Return a schedule that lowers the learning rate at --lr_steps and keeps the weight decay."""
    warmup_steps = training.checked_warmup(
        args, "warmup_steps", warmup_steps=args.warmup_steps, total_steps=args.epochs * steps_per_epoch
    )
    milestones = [epoch * steps_per_epoch for epoch in args.lr_steps]

    def schedule(updates: int) -> tuple[float, float]:
        lr = step_schedule(updates, base=args.lr, milestones=milestones, gamma=args.lr_gamma, warmup_steps=warmup_steps)
        return lr, args.weight_decay

    return schedule


def train(args: Arguments, world: utils.World) -> None:
    """Train a detector: set up data, detector and state, then call `training.fit`. Lambda is 1 throughout."""
    stop = utils.StopRequest()

    # The data; both splits must have the same categories.
    dataset, eval_dataset = build_dataset(args, train=True), None
    loader = loaders.build_train_loader(dataset, replace(training.loading_of(args, world), collate=collate))
    if not args.disable_eval:
        eval_dataset = build_dataset(args, train=False)
        if eval_dataset.classes != dataset.classes:
            raise ValueError(f"{dataset.path} and {eval_dataset.path} have different categories")
        eval_loader = build_eval_loader(args, eval_dataset, world)

    # The detector, its loss, and the state of the run.
    detector = open_detector(args, world, dataset)
    objective = Detection(training.build_precision(args, world.device), ("loss", *detector.losses, "count"))
    state = training.build_state(
        args, world, detector, loader=loader, objective=objective, classes=len(dataset.classes)
    )

    # The parts of the loop that only detection has.
    def evaluate_all(forms: Mapping[str, Detector]) -> dict[str, float]:
        found = {}
        for prefix, form in forms.items():
            values = evaluate(form, eval_loader, eval_dataset, world, objective.precision, prefix, stop)
            found |= {f"{prefix}_{name}": value for name, value in values.items()}
        return found

    def restored(checkpoint: Mapping[str, Any], path: str | Path) -> None:
        checkpoints.check_categories(checkpoint, dataset, path=path)
        for form in (detector, *(average.module for average in state.averages.values())):
            checkpoints.set_normalization(form, checkpoint)

    task = training.Task(
        loader,
        objective,
        open_schedule(args, state.steps_per_epoch),
        evaluate=evaluate_all if eval_dataset is not None else None,
        score="box_AP",
        describe=lambda: checkpoints.describe(detector, dataset),
        restored=restored,
        panels=curves.DETECTION_CURVES,
    )
    training.fit(args, state, task, stop)
    if "best" in state.best:
        logger.info("best box AP %.2f %%", 100 * state.best["best"])


def main(argv: Sequence[str] | None = None, *, args: Arguments | None = None) -> None:
    args = args or parse_args(argv)
    if args.export_onnx:
        body = export_checkpoint
    elif args.switch_to_deploy is not None:
        body = deploy_checkpoint
    elif args.eval:
        body = evaluate_checkpoint
    else:
        body = train
    folder = args.output_dir if body is train else None
    utils.launch("object_detection/main.py", args, functools.partial(body, args), output_dir=folder)


if __name__ == "__main__":
    main(args=ARGS)
