"""Train, evaluate or deploy VanillaNet; the only place that sees all the arguments.

python main.py @recipes/demo.args                                        # one process
torchrun --nproc_per_node=8 main.py @recipes/vanillanet_6.args --data_path DIR
python main.py --eval true --finetune FILE --data_path DIR               # evaluate
python main.py --switch_to_deploy NEW --finetune FILE --data_path DIR    # fuse, compare, evaluate
"""

from options import Arguments, parse_args, plain_args

if __name__ == "__main__":
    ARGS = parse_args()  # a mistake is answered before the imports below, which take seconds

import argparse
import copy
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup
from torch import nn

import datasets
import deployment
import models  # noqa: F401  registers the variants
import networks
import runtimes
import utils
from benchmarking import profiling
from engine import Classification, Distiller, EvalResult, Precision, Schedule, build_criterion, evaluate
from loading import loaders, transforms
from loading.streams import StreamDataset
from optim_factory import activation_slope, cosine_schedule
from records import logs
from records.checkpoints import checkpoint_weights, load_checkpoint, load_weights, save_checkpoint
from training import (
    Task,
    broken_count,
    build_precision,
    build_state,
    checked_warmup,
    fit,
    layout_of,
    loading_of,
    meet,
    place,
    until_stopped,
)

logger = logging.getLogger("main")

DEPLOY_TOLERANCE = 1e-4  # largest difference of fused from unfused logits, relative to the largest logit
COMPARED_BATCHES = 4
CALIBRATION_IMAGES = 300


# -- the parts, built from the arguments


def build_transform(args: argparse.Namespace, *, train: bool):
    preprocessing = transforms.Preprocessing(
        args.input_size,
        *transforms.mean_and_std(args.imagenet_default_mean_and_std),
        crop_pct=args.crop_pct,
        native=transforms.keeps_native_size(args.data_set, args.input_size),
        exif_transpose=args.exif_transpose,
    )
    if not train:
        return transforms.build_eval_transform(preprocessing)
    return transforms.build_train_transform(
        preprocessing,
        color_jitter=args.color_jitter,
        aa=args.aa,
        interpolation=args.train_interpolation,
        reprob=args.reprob,
        remode=args.remode,
        recount=args.recount,
    )


def build_dataset(args: argparse.Namespace, world: utils.World, *, train: bool, transform=None):
    """One split, with its own transform if none is given. Rank 0 opens it first, since that may download it."""
    for turn in (True, False):
        if world.is_main is turn:
            dataset = datasets.build_dataset(
                args.data_set,
                args.data_path,
                train=train,
                transform=transform or build_transform(args, train=train),
                eval_data_path=args.eval_data_path,
                split=args.train_split if train else args.val_split,
                download=turn,
            )
        world.barrier()
    return dataset


def build_eval_loader(
    args: argparse.Namespace,
    dataset,
    world: utils.World,
    *,
    classes: Sequence[str] | None = None,
    of: str = "the network",
):
    """The validation loader, and ReaL's labels by index if there are any; for the rest see `match_classes`."""
    loading = loading_of(args, world if args.dist_eval else utils.World(0, 1, world.device))
    indices = datasets.match_classes(dataset, classes, of=of)
    loader = loaders.build_eval_loader(dataset, loading, skip_broken=args.skip_broken_eval, class_indices=indices)
    real = None
    if args.real_labels:
        labels = datasets.load_real_labels(args.real_labels)
        real = datasets.real_targets(labels, dataset, None if classes is None else len(classes))
    return loader, real


def class_count(args: argparse.Namespace, dataset) -> int:
    """The number of classes, from the data; from --nb_classes for a stream that does not know its own."""
    if dataset.classes is None:
        return args.nb_classes
    if args.nb_classes != len(dataset.classes):
        args.moot("nb_classes", f"--nb_classes {args.nb_classes}, but the data have {len(dataset.classes)} classes")
    return len(dataset.classes)


def build_model(args: argparse.Namespace, num_classes: int, *, deploy: bool = False) -> nn.Module:
    """The network on the CPU, initialized from the current seed."""
    kwargs: dict[str, Any] = {"num_classes": num_classes, "drop_rate": args.drop}
    networks.check_name(args.model, "--model", family="vanillanet*")
    if args.model.startswith("vanillanet"):
        kwargs.update(act_num=args.act_num, deploy=deploy)
        if args.width_mult is not None:
            kwargs["width_mult"] = args.width_mult
    for flag in ("act_num", "width_mult", "deploy"):
        if flag not in kwargs:
            args.moot(flag, f"--{flag} belongs to VanillaNet, --model {args.model} has no such thing")
    model = timm.create_model(args.model, **kwargs)
    networks.check_input_size(model, args.input_size, f"--model {args.model}")
    return model


def load_network(args: argparse.Namespace, model: nn.Module, *, fine_tuning: bool) -> tuple[float, dict[str, Any]]:
    """Load --finetune into `model`. Returns the checkpoint's lambda, to which the model is set, and the checkpoint."""
    path = args.finetune or args.resume
    checkpoint = load_checkpoint(path)
    weights = checkpoint_weights(
        checkpoint,
        key=args.model_key,
        whole_file="model_key" not in args.given,
        prefix=args.model_prefix,
        path=path,
    )
    skipped = load_weights(model, weights, path=path, allow_other_classes=fine_tuning)
    if skipped:
        logger.info("%s has other classes: its classifier (%d tensors) is not loaded", path, len(skipped))
    slope = networks.recorded_slope(checkpoint)
    networks.set_slope(slope, model)
    return slope, checkpoint


def build_teacher(args: argparse.Namespace, classes: Sequence[str] | None, num_classes: int) -> nn.Module:
    """The network to learn from, on the CPU in eval mode, for images as the student gets them.

    It is a checkpoint's (--teacher FILE, or --teacher MODEL --teacher_weights FILE), or a model of timm's.

    Args:
        classes: names of the data's, where they are known.
    """
    checkpoint: dict[str, Any] = {}
    is_file = Path(args.teacher).is_file()
    if is_file and args.teacher_weights:
        args.moot("teacher_weights", f"--teacher {args.teacher} has weights already: leave out --teacher_weights")
    if is_file or args.teacher_weights:
        _, teacher, checkpoint = networks.create_trained(
            args.teacher if is_file else args.teacher_weights,
            name=None if is_file else args.teacher,
            num_classes=num_classes,
            key=args.teacher_key,
            whole_file="teacher_key" not in args.given,
            flag="--teacher MODEL --teacher_weights FILE",
        )
    else:
        teacher = networks.create_pretrained(args.teacher, "--teacher", mend="add --teacher_weights")
    if teacher.num_classes != num_classes:
        raise ValueError(f"--teacher {args.teacher} knows {teacher.num_classes} classes, the data have {num_classes}")
    if classes and checkpoint.get("classes", list(classes)) != list(classes):
        raise ValueError(
            f"--teacher {args.teacher} was trained on other classes than the data's, or on them in another order"
        )
    networks.check_input_size(teacher, args.input_size, f"--teacher {args.teacher}")
    return networks.renormalized(
        teacher.requires_grad_(False),
        given=transforms.mean_and_std(args.imagenet_default_mean_and_std),
        wanted=networks.mean_and_std(teacher, checkpoint),
    )


# -- evaluation


def run_eval(
    args: argparse.Namespace,
    world: utils.World,
    model: nn.Module,
    loader,
    real,
    precision: Precision,
    name: str,
    stop: utils.StopRequest | None = None,
) -> EvalResult | None:
    """Evaluate on all ranks, or with --dist_eval false on rank 0; the others then return None.

    Raises:
        EvaluationStopped: see `training.until_stopped`.
    """
    if not (args.dist_eval or world.is_main):
        return meet(world, stop)
    batches = logs.progress(loader, description=f"eval {name}", total=len(loader), enabled=world.is_main)
    return evaluate(
        model,
        until_stopped(batches, world, stop),
        precision=precision,
        real_targets=real,
        reduce=world.sum if args.dist_eval else (lambda sums: sums),
    )


def report_eval(name: str, result: EvalResult, broken: int) -> None:
    real = "" if result.real_acc1 is None else f"  ReaL {result.real_acc1:.3f}"
    left_out = f"  ({broken} broken images left out)" if broken else ""
    logger.info(
        "%s: top-1 %.3f  top-5 %.3f%s  loss %.4f  on %d images%s",
        name,
        result.acc1,
        result.acc5,
        real,
        result.loss,
        result.count,
        left_out,
    )


def prepare_eval(args: argparse.Namespace, world: utils.World):
    """What --eval and --switch_to_deploy share: the loader, ReaL labels, the loaded network and its checkpoint."""
    dataset = build_dataset(args, world, train=False)
    loader, real = build_eval_loader(args, dataset, world)
    model = build_model(args, class_count(args, dataset), deploy=args.deploy)
    _, checkpoint = load_network(args, model, fine_tuning=False)
    return loader, real, model.to(world.device, memory_format=layout_of(args)).eval(), checkpoint


def evaluate_checkpoint(args: argparse.Namespace, world: utils.World) -> None:
    loader, real, model, _ = prepare_eval(args, world)
    if args.compile:
        model.compile()
    result = run_eval(args, world, model, loader, real, build_precision(args, world.device), args.model)
    broken = broken_count(world, loader)
    if world.is_main:
        report_eval(f"{args.model} ({args.finetune or args.resume})", result, broken)


class _Deployed(nn.Module):
    """A runtime where a network is expected."""

    def __init__(self, runtime: runtimes.Runtime):
        super().__init__()
        self.runtime = runtime

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.runtime(images)


def calibrate(args: argparse.Namespace, world: utils.World) -> runtimes.Calibration:
    """Training images, evenly spread, as they are prepared for evaluation."""
    dataset = build_dataset(args, world, train=True, transform=build_transform(args, train=False))
    if isinstance(dataset, StreamDataset):
        raise ValueError(
            f"int8 cannot be calibrated on a stream (--data_set {args.data_set}): use export.py --calib_data"
        )
    images = torch.stack([dataset[place][0] for place in deployment.spread(len(dataset), CALIBRATION_IMAGES)])
    return runtimes.Calibration(images.split(args.batch_size))


def open_exported(args: argparse.Namespace, world: utils.World, path: str):
    """The loader, ReaL labels and runtime of an exported file, with the preprocessing that is written in it."""
    runtime = runtimes.load(path, engine=args.engine, precision=args.precision, device=str(world.device))
    metadata = runtime.metadata
    for flag, value in (
        ("model", metadata.model),
        ("input_size", metadata.input_size),
        ("crop_pct", metadata.crop_pct),
    ):
        if getattr(args, flag) != value:
            args.moot(flag, f"--{flag} {getattr(args, flag)}, but {path} was exported with {value}")
    dataset = build_dataset(args, world, train=False, transform=deployment.transform(metadata))
    if class_count(args, dataset) != len(metadata.classes):
        raise ValueError(f"{path} knows {len(metadata.classes)} classes, the data have {class_count(args, dataset)}")
    return *build_eval_loader(args, dataset, world), runtime


def evaluate_deployed(args: argparse.Namespace, world: utils.World) -> None:
    """Evaluate in the engine of --runtime: an exported file, or a checkpoint's network, fused and built here."""
    path = args.finetune or args.resume
    if runtimes.of_file(path):
        loader, real, runtime = open_exported(args, world, path)
    else:
        loader, real, model, _ = prepare_eval(args, world)
        runtime = runtimes.load(
            timm.utils.reparameterize_model(model.cpu()),
            engine=args.engine,
            precision=args.precision,
            images=torch.zeros(args.batch_size, 3, args.input_size, args.input_size),
            calibration=calibrate(args, world) if args.precision == "int8" else None,
            device=str(world.device),
        )
    name = f"{path} in {runtime.name}, {runtime.precision}"
    result = run_eval(args, world, _Deployed(runtime), loader, real, Precision(world.device), name)
    broken = broken_count(world, loader)
    if world.is_main:
        report_eval(name, result, broken)


# -- deploying


@torch.no_grad()
def largest_difference(model: nn.Module, fused: nn.Module, loader, device: torch.device) -> float:
    """The largest |fused - unfused| logit over some real batches, relative to the largest |unfused|; in float32.

    The process does without TensorFloat-32 from now on: by its rounding alone the two forms differ by some 1e-2.
    """
    runtimes.set_tf32("fp32", str(device))
    difference = scale = 0.0
    for number, (images, _, _) in enumerate(loader):
        if number == COMPARED_BATCHES:
            break
        images = images.to(device)
        logits = model(images)
        difference = max(difference, (fused(images) - logits).abs().max().item())
        scale = max(scale, logits.abs().max().item())
    return difference / scale if scale else difference


def deploy_checkpoint(args: argparse.Namespace, world: utils.World) -> None:
    """Fuse, compare with the unfused network, write the file once, evaluate all forms side by side."""
    loader, real, model, checkpoint = prepare_eval(args, world)
    if not hasattr(model, "switch_to_deploy"):
        raise ValueError(f"--model {args.model} has no deploy form")
    fused = copy.deepcopy(model)
    fused.switch_to_deploy()
    fused.to(memory_format=layout_of(args))  # what fusing returns is contiguous
    difference = largest_difference(model, fused, loader, world.device)
    if not difference <= DEPLOY_TOLERANCE:
        raise ValueError(
            f"the fused logits differ by {difference:.2e}, more than {DEPLOY_TOLERANCE:.0e}; nothing written"
        )
    target = Path(args.switch_to_deploy)
    if world.is_main:
        save_checkpoint(
            {
                "model": fused.state_dict(),
                "act_learn": 1.0,
                "deploy": True,
                **{key: checkpoint[key] for key in ("classes",) if key in checkpoint},
                "args": plain_args(args),
            },
            target,
        )
    forms = {f"train form ({args.model_key})": model}
    used = next((key for key in args.model_key.split("|") if key in checkpoint), None)
    if used:
        forms = {f"train form, {used}": model}
    for key in checkpoint:
        if (key == "model" or key.startswith("model_ema")) and key != used and isinstance(checkpoint[key], dict):
            other = copy.deepcopy(model)
            load_weights(other, checkpoint_weights(checkpoint, key=key), path=args.finetune)
            forms[f"train form, {key}"] = other
    forms[f"deploy form of {used}" if used else "deploy form"] = fused
    precision = build_precision(args, world.device)
    results = {name: run_eval(args, world, form, loader, real, precision, name) for name, form in forms.items()}
    broken = broken_count(world, loader)
    if not world.is_main:
        return
    images = next(iter(loader))[0]
    rates = profiling.throughput(list(forms.values()), precision.images(images), autocast=precision.autocast)
    rows = [["", "layers", "params (M)", "MACs (G)", "top-1", *(["ReaL"] if real else []), "images/s"]]
    for (name, form), rate in zip(forms.items(), rates, strict=True):
        layers, params, macs = profiling.profile(form, args.input_size)
        report_eval(name, results[name], broken)
        accuracies = [f"{results[name].acc1:.2f}", *([f"{results[name].real_acc1:.2f}"] if real else [])]
        rows.append([name, layers, f"{params / 1e6:.3f}", f"{macs / 1e9:.4f}", *accuracies, f"{rate:.0f}"])
    print(logs.table(rows, args.model))
    print(f"largest logit difference, relative: {difference:.1e} over {min(COMPARED_BATCHES, len(loader))} batches")
    print(f"images/s: median over interleaved rounds of {len(images)} images, {torch.get_num_threads()} threads")
    print(f"deploy form: {target}")
    if args.output_dir and Path(args.output_dir).is_dir():
        for label, name in (("checkpoint", "checkpoint-last.pth"), ("curves", "curves.png"), ("log", "summary.csv")):
            if (Path(args.output_dir) / name).exists():
                print(f"{label}: {Path(args.output_dir) / name}")


# -- training


@dataclass(frozen=True)
class Data:
    """What a classifier is trained on.

    Attributes:
        loader: this rank's training batches.
        validation: this rank's validation batches, None with --disable_eval.
        real: ReaL's labels of the validation images by index, if there are any.
        classes: their names, None for a stream that does not know them.
        num_classes: how many there are.
        mixup: mixes a training batch; None mixes nothing.
    """

    loader: Any
    validation: Any | None
    real: Sequence[Sequence[int]] | None
    classes: Sequence[str] | None
    num_classes: int
    mixup: Mixup | None


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    return transforms.build_mixup(
        args.batch_size,
        num_classes,
        mixup=args.mixup,
        cutmix=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        mixup_prob=args.mixup_prob,
        mixup_switch_prob=args.mixup_switch_prob,
        mixup_mode=args.mixup_mode,
        smoothing=args.smoothing,
    )


def open_data(args: argparse.Namespace, world: utils.World) -> Data:
    dataset = build_dataset(args, world, train=True)
    validation = real = None
    if not args.disable_eval:
        eval_dataset = build_dataset(args, world, train=False)
        validation, real = build_eval_loader(args, eval_dataset, world, classes=dataset.classes, of="the training data")
    if args.batch_size == 1 and not args.sync_bn:
        raise ValueError("BatchNorm needs more than one image in a batch: raise --batch_size")
    num_classes = class_count(args, dataset)
    loader = loaders.build_train_loader(dataset, loading_of(args, world))
    return Data(loader, validation, real, dataset.classes, num_classes, build_mixup(args, num_classes))


def open_network(args: argparse.Namespace, world: utils.World, data: Data) -> tuple[nn.Module, float]:
    """The network to train on its device, and lambda to begin with: that of --finetune, else 0."""
    utils.seed_everything(args.seed)  # the same on all ranks, so that the initial weights are
    model, start_slope = build_model(args, data.num_classes), 0.0
    if args.finetune:
        slope, _ = load_network(args, model, fine_tuning=True)
        start_slope = 0.0 if args.restart_decay else slope
    asked, layers = args.layer_decay_num_layers, len(getattr(model, "stages", ()))
    if layers and asked != layers:
        args.moot("layer_decay_num_layers", f"--layer_decay_num_layers {asked}, but {args.model} has {layers}")
    if start_slope < 1 and hasattr(model, "change_act") and args.epochs <= args.decay_epochs:
        logger.warning(
            "--epochs %d ends before --decay_epochs %d: lambda will not reach 1, so the network cannot be deployed",
            args.epochs,
            args.decay_epochs,
        )
    return place(args, model, world.device), start_slope


def open_objective(args: argparse.Namespace, world: utils.World, data: Data) -> Classification:
    """The loss of a batch, to which --teacher adds its part."""
    precision = build_precision(args, world.device)
    distiller = None
    if args.teacher:
        teacher = build_teacher(args, data.classes, data.num_classes)
        teacher = teacher.to(world.device, memory_format=layout_of(args))
        distiller = Distiller(teacher, args.distill_alpha, args.distill_tau, precision)
    criterion = build_criterion(
        mixing=data.mixup is not None,
        smoothing=args.smoothing,
        bce=args.bce_loss,
        bce_target_thresh=args.bce_target_thresh,
    )
    return Classification(criterion, precision, data.mixup, distiller)


def open_schedule(args: argparse.Namespace, steps_per_epoch: int) -> Schedule:
    """Half a cosine for learning rate and weight decay, after a warm-up of the former."""
    total_steps = args.epochs * steps_per_epoch
    flag, warmup_steps = "warmup_steps", args.warmup_steps
    if warmup_steps <= 0:
        flag, warmup_steps = "warmup_epochs", args.warmup_epochs * steps_per_epoch
    warmup_steps = checked_warmup(args, flag, warmup_steps=warmup_steps, total_steps=total_steps)
    end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end

    def schedule(updates: int) -> tuple[float, float]:
        lr = cosine_schedule(updates, total_steps, base=args.lr, final=args.min_lr, warmup_steps=warmup_steps)
        return lr, cosine_schedule(updates, total_steps, base=args.weight_decay, final=end)

    return schedule


def train(args: argparse.Namespace, world: utils.World) -> None:
    """A run: data, network, state, and then epoch by epoch, as `training.fit` shows it."""
    stop = utils.StopRequest()
    data = open_data(args, world)
    model, start_slope = open_network(args, world, data)
    objective = open_objective(args, world, data)
    state = build_state(args, world, model, loader=data.loader, objective=objective)
    state.start_slope = start_slope
    if args.compile:
        model.compile()

    def slope(epoch: int) -> float:
        return activation_slope(
            epoch, decay_epochs=args.decay_epochs, linear=args.decay_linear, start=state.start_slope
        )

    def evaluate_all(forms: Mapping[str, nn.Module]) -> dict[str, float]:
        found = {}
        for prefix, network in forms.items():
            result = run_eval(args, world, network, data.validation, data.real, objective.precision, prefix, stop)
            found |= result.metrics(prefix) if result else {}
        return found

    def restored(checkpoint: Mapping[str, Any], path: str | Path) -> None:
        if data.classes and checkpoint.get("classes", list(data.classes)) != list(data.classes):
            raise ValueError(
                f"{path} was trained on other classes than the data's, or on them in another order: "
                "begin anew with --finetune"
            )

    logger.info(
        "%s: %.3f M parameters, %d classes, %d steps an epoch of %d images, on %s",
        args.model,
        profiling.count_params(model) / 1e6,
        data.num_classes,
        state.steps_per_epoch,
        args.batch_size * args.update_freq * world.size,
        world.device,
    )
    task = Task(
        data.loader,
        objective,
        open_schedule(args, state.steps_per_epoch),
        evaluate=evaluate_all if data.validation else None,
        score="acc1",
        describe=lambda: {"classes": list(data.classes)} if data.classes else {},
        restored=restored,
        slope=slope,
    )
    fit(args, state, task, stop)
    if state.best:
        logger.info("best top-1: %s", ", ".join(f"{score:.3f} ({name})" for name, score in state.best.items()))


def main(argv: Sequence[str] | None = None, *, args: Arguments | None = None) -> None:
    args = args or parse_args(argv)
    if args.switch_to_deploy is not None:
        body = deploy_checkpoint
    elif args.eval:
        body = evaluate_deployed if args.engine else evaluate_checkpoint
    else:
        body = train
    utils.launch("main.py", args, functools.partial(body, args), output_dir=args.output_dir if body is train else None)


if __name__ == "__main__":
    main(args=ARGS)
