"""Train, evaluate or deploy VanillaNet.

python main.py @recipes/demo.args                                        # one process
torchrun --nproc_per_node=8 main.py @recipes/vanillanet_6.args --data_path DIR
python main.py --eval true --finetune FILE --data_path DIR               # evaluate
python main.py --switch_to_deploy NEW --finetune FILE --data_path DIR    # fuse, compare, evaluate
"""

from options import Arguments, parse_args

if __name__ == "__main__":
    ARGS = parse_args()  # report a wrong flag before the imports below, which take seconds

import copy
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from torch import nn

import datasets
import networks
import runtimes
import training
import utils
from benchmarking import profiling
from deployment.fusing import COMPARED_BATCHES, deployed, largest_difference, write_deployed
from deployment.images import spread, transform
from engine import Classification, Distiller, EvalResult, Precision, Schedule, build_criterion, evaluate
from loading import loaders, transforms
from loading.streams import StreamDataset
from loading.transforms import Preprocessing
from optim_factory import activation_slope, cosine_schedule, freeze
from records import logs, scores
from records.checkpoints import CheckpointError, checkpoint_weights, is_state_dict, load_weights
from records.files import check_writable

logger = logging.getLogger("main")

CALIBRATION_IMAGES = 300


# -- the parts, built from the arguments


def build_train_transform(args: Arguments, preprocessing: Preprocessing) -> transforms.Transform:
    own = "train_interpolation" in args.given
    return transforms.build_train_transform(
        preprocessing,
        interpolation=args.train_interpolation if own else preprocessing.interpolation,
        **args.pick("color_jitter", "aa", "reprob", "remode", "recount", "scale", "ratio", "hflip", "vflip"),
    )


def build_dataset(args: Arguments, world: utils.World, *, train: bool, transform: transforms.Transform):
    """Open one split. Rank 0 goes first, because opening the data set may download it."""
    split = args.train_split if train else args.val_split
    for turn in (True, False):
        if world.is_main is turn:
            dataset = datasets.build_dataset(
                **args.pick("data_set", "data_path", "eval_data_path"),
                train=train,
                transform=transform,
                split=split,
                download=turn,
            )
        world.barrier()
    return dataset


def build_eval_loader(
    args: Arguments, dataset, world: utils.World, *, classes: Sequence[str] | None, num_classes: int, of: str
):
    """Return the validation loader, and the ReaL labels by index (None without --real_labels).

    Args:
        classes: names of the network's or training data's `num_classes` classes, to match with the data set's; or None.
        of: the owner of `classes`, for messages.
    """
    classes = networks.known_classes(classes, num_classes, dataset.classes)
    indices = datasets.match_classes(dataset, classes, of=of)
    found = args.nb_classes if args.nb_classes == num_classes and indices else class_count(args, dataset)
    if found != num_classes and not indices:
        raise ValueError(f"{of} knows {num_classes} classes, the data have {found}")
    loading = training.loading_of(args, world if args.dist_eval else utils.World(0, 1, world.device))
    loader = loaders.build_eval_loader(dataset, replace(loading, class_indices=indices, num_classes=num_classes))
    real = None
    if args.real_labels:
        real = datasets.real_targets(datasets.load_real_labels(args.real_labels), dataset, num_classes, classes)
    return loader, real


def class_count(args: Arguments, dataset) -> int:
    """Return the number of classes in the data, or --nb_classes for a stream that does not know its classes."""
    if dataset.classes is None:
        return args.nb_classes
    if args.nb_classes != len(dataset.classes):
        args.moot("nb_classes", f"--nb_classes {args.nb_classes}, but the data have {len(dataset.classes)} classes")
    return len(dataset.classes)


def open_source(args: Arguments) -> networks.Network:
    """Open the network of --finetune or --resume, with the classes it was trained on."""
    own = args.pick(*(flag for flag in ("act_num", "width_mult") if flag in args.chosen))
    return networks.open(
        args.finetune or args.resume,
        name=args.model if "model" in args.chosen and args.model != args.finetune else None,
        fallback=args.model,
        key=args.model_key if "model_key" in args.given else None,
        order=networks.NETWORK_FIRST,
        prefix=args.model_prefix,
        mend="give a file of weights",
        drop_rate=args.drop,
        **own,
    )


def settle(args: Arguments, network: networks.Network | None, *, train: bool = False) -> Preprocessing:
    """Return how images are prepared: by flags, else by the network's file, else by timm's configuration of the model.

    The settings that the file decides are written to `args` as well, for the reports and the record of the run. The log
    names the recorded values that a flag overrides.

    Args:
        network: the opened network; None for --model with random weights.
        train: prepare images for training, where without --resize the data decide whether images are resized.
    """
    recorded = network.record.preprocessing if network else {}
    flags = {"data_set": args.data_set}
    if networks.is_vanillanet(network.name if network else args.model):
        flags["crop_pct"] = None  # the published script derives the crop from the size

    # A typed flag overrides what a file records and any default; a flag from a recipe overrides only a default.
    mean, std = transforms.mean_and_std(args.imagenet_default_mean_and_std)
    changes: dict[str, Any] = {}
    for flag, values in (
        ("input_size", {"input_size": args.input_size}),
        ("crop_pct", {"crop_pct": args.crop_pct}),
        ("exif_transpose", {"exif_transpose": args.exif_transpose}),
        ("imagenet_default_mean_and_std", {"mean": mean, "std": std}),
    ):
        told = any(recorded.get(name) is not None for name in values)
        if flag in (args.chosen if told else args.given):
            changes |= values
            if other := {name: recorded[name] for name in values if recorded.get(name, values[name]) != values[name]}:
                logger.info("--%s %s instead of what %s records, %s", flag, getattr(args, flag), network.source, other)

    # Without --resize, the network's preprocessing decides whether images are resized; in training, the data decide.
    preprocessing = network.preprocessing if network else networks.named_preprocessing(args.model)
    native = None if args.resize is None else not args.resize
    if train and native is None:
        native = transforms.keeps_native_size(args.data_set, changes.get("input_size", preprocessing.input_size))
    for flag in ("scale", "ratio", "crop_pct") if native else ():
        args.moot(flag, f"--{flag} has no effect on images that are not resized: add --resize true")
        changes.pop(flag, None)
    arguments = network.record.arguments if recorded else flags
    preprocessing = networks.prepare(preprocessing, arguments, native=native, **changes)

    # The run's arguments record the settled values.
    args.input_size = preprocessing.input_size
    if network:
        args.model = network.name
        networks.check_input_size(network.module, args.input_size, f"--model {args.model}")
        if networks.is_vanillanet(args.model) and network.weights:
            args.act_num = networks.shape_arguments(args.model, network.weights.tensors)["act_num"]
            args.width_mult = network.record.arguments.get("width_mult", args.width_mult)
    return preprocessing


def build_model(args: Arguments, num_classes: int) -> nn.Module:
    """Build the network on the CPU, initialized from the current seed."""
    own = args.pick(*(flag for flag in ("act_num", "width_mult") if flag in args.given))
    if not networks.is_vanillanet(args.model):
        for flag in own:
            args.moot(flag, f"--{flag} belongs to VanillaNet, --model {args.model} has no such thing")
        own = {}
    network = networks.open(args.model, pretrained=False, num_classes=num_classes, drop_rate=args.drop, **own)
    networks.check_input_size(network.module, args.input_size, f"--model {args.model}")
    args.model = network.name  # of an address: the checkpoints record what timm can build
    return network.module.train()


def build_teacher(
    args: Arguments, preprocessing: Preprocessing, *, classes: Sequence[str] | None, num_classes: int
) -> nn.Module:
    """Open the teacher, on the CPU in eval mode, for images that `preprocessing` has prepared for the student.

    The teacher is a checkpoint (--teacher FILE, or --teacher MODEL --teacher_weights FILE) or a pretrained timm model.
    """
    # --teacher is a file, a name, or a name with a file.
    source, name = args.teacher, None
    if args.teacher_weights:
        if networks.is_file(args.teacher):
            args.moot("teacher_weights", f"--teacher {args.teacher} has weights already: leave out --teacher_weights")
        else:
            source, name = args.teacher_weights, args.teacher
    teacher = networks.open(
        source,
        name=name,
        key=args.teacher_key if "teacher_key" in args.given else None,
        flag="--teacher MODEL --teacher_weights FILE" if networks.is_file(source) else "--teacher",
        mend="add --teacher_weights",
    )
    # The teacher's logits must stand for the student's classes, in the same order.
    found = teacher.module.num_classes
    if found != num_classes:
        raise ValueError(f"--teacher {args.teacher} knows {found} classes, the data have {num_classes}")
    if classes and teacher.weights and tuple(classes) != (teacher.classes or tuple(classes)):
        raise ValueError(f"--teacher {args.teacher} was trained on other classes, or on them in another order")
    networks.check_input_size(teacher.module, preprocessing.input_size, f"--teacher {args.teacher}")
    given, wanted = ((images.mean, images.std) for images in (preprocessing, teacher.preprocessing))
    module = teacher.module.requires_grad_(False)
    return module if given == wanted else networks.Renormalized(module, given=given, wanted=wanted).eval()


# -- evaluation


def run_eval(
    args: Arguments,
    world: utils.World,
    model: nn.Module,
    loader,
    real,
    precision: Precision,
    name: str,
    stop: utils.StopRequest | None = None,
    *,
    confusion: int | None = None,
) -> EvalResult | None:
    """Evaluate on all ranks, or with --dist_eval false on rank 0 only; the other ranks then return None.

    Args:
        confusion: the network's number of classes, to count the confusion matrix as well.

    Raises `training.EvaluationStopped` as `training.until_stopped` does.
    """
    if not (args.dist_eval or world.is_main):
        return training.meet(world, stop)
    return evaluate(
        model,
        training.until_stopped(loader, world, stop, name=name),
        precision=precision,
        real_targets=real,
        reduce=world.sum if args.dist_eval else (lambda sums: sums),
        confusion=confusion,
    )


def report_eval(name: str, result: EvalResult, broken: int) -> None:
    real = "" if result.real_acc1 is None else f"  ReaL {result.real_acc1:.3f}"
    left_out = f"  ({broken} broken images left out)" if broken else ""
    logger.info(
        f"{name}: top-1 {result.acc1:.3f}  top-5 {result.acc5:.3f}{real}  loss {result.loss:.4f}  "
        f"on {result.count} images{left_out}"
    )


def prepare_eval(args: Arguments, world: utils.World):
    """Return what --eval and --switch_to_deploy share: the loader, the ReaL labels, and the network on the device."""
    network = open_source(args)
    if args.deploy and not getattr(network.module, "deploy", True):
        raise ValueError(f"--deploy true, but {network.source} is in training form: leave it out")
    network = replace(network, preprocessing=settle(args, network))
    transform = transforms.build_eval_transform(network.preprocessing)
    dataset = build_dataset(args, world, train=False, transform=transform)
    loader, real = build_eval_loader(
        args, dataset, world, classes=network.classes, num_classes=network.module.num_classes, of=network.source
    )
    network.module.to(world.device, memory_format=training.layout_of(args))
    return loader, real, network


def calibrate(args: Arguments, world: utils.World, preprocessing: Preprocessing) -> runtimes.Calibration:
    """Return evenly spread training images, prepared as for evaluation."""
    dataset = build_dataset(args, world, train=True, transform=transforms.build_eval_transform(preprocessing))
    if isinstance(dataset, StreamDataset):
        raise ValueError(f"--data_set {args.data_set} is a stream, which cannot calibrate int8: use export.py")
    images = torch.stack([dataset[place][0] for place in spread(len(dataset), CALIBRATION_IMAGES)])
    return runtimes.Calibration(images.split(args.batch_size))


def open_exported(args: Arguments, world: utils.World, path: str):
    """Return the loader, ReaL labels and runtime of an exported file, with the preprocessing that the file records."""
    runtime = runtimes.load(path, engine=args.engine, precision=args.precision, device=str(world.device))
    metadata = runtime.metadata
    for flag in ("model", "input_size", "crop_pct", "exif_transpose"):
        value = getattr(metadata, flag)
        if getattr(args, flag) != value:
            args.moot(flag, f"--{flag} {getattr(args, flag)}, but {path} was exported with {value}")
    for flag in ("resize", "imagenet_default_mean_and_std"):
        args.moot(flag, f"--{flag} has no effect: {path} was exported with all that it needs")
    dataset = build_dataset(args, world, train=False, transform=transform(metadata))
    classes = networks.unlabelled(metadata.classes, dataset.classes)
    found = build_eval_loader(args, dataset, world, classes=classes, num_classes=len(metadata.classes), of=path)
    return *found, runtime


def open_deployed(args: Arguments, world: utils.World, network: networks.Network) -> runtimes.Runtime:
    """Fuse the network and build it for --engine."""
    return runtimes.load(
        deployed(network).module.cpu(),
        engine=args.engine,
        precision=args.precision,
        images=torch.zeros(args.batch_size, 3, args.input_size, args.input_size),
        calibration=calibrate(args, world, network.preprocessing) if args.precision == "int8" else None,
        device=str(world.device),
    )


def evaluate_checkpoint(args: Arguments, world: utils.World) -> None:
    """Evaluate a network as it is, fused and built for --engine, or from an exported file."""
    # Check that the results can be written before opening the network, which takes time.
    for wanted in filter(None, (args.results_file, args.confusion)):
        check_writable(wanted)

    # The network: an exported file in its engine, a network fused and built for --engine, or the network as it is.
    path, runtime = args.finetune or args.resume, None
    if args.engine and runtimes.of_file(path):
        loader, real, runtime = open_exported(args, world, path)
        classes = runtime.metadata.classes
    else:
        loader, real, network = prepare_eval(args, world)
        classes = network.labels
        runtime = open_deployed(args, world, network) if args.engine else None
    if runtime:
        model, precision = runtime, Precision(world.device)
        name = f"{path} in {runtime.name}, {runtime.precision}"
    else:
        model, precision = network.module, training.build_precision(args, world.device)
        name = f"{args.model} ({network.source})"
    if args.compile:
        model.compile()

    confusion = len(classes) if args.results_file or args.confusion else None
    result = run_eval(args, world, model, loader, real, precision, name, confusion=confusion)
    broken = training.broken_count(world, loader)
    if world.is_main:
        report_eval(name, result, broken)
        if args.results_file:
            scores.write_scores(args.results_file, result, classes)
        if args.confusion:
            from pictures import style  # here, because importing matplotlib takes a second
            from pictures.confusion import confusion_figure

            style.save(confusion_figure(result.confusion.numpy(), classes), Path(args.confusion))


# -- deploying


def other_forms(network: networks.Network) -> Iterator[tuple[str, nn.Module]]:
    """Yield (key, network) for each of the other weights in the network's file, such as a moving average."""
    weights = network.weights
    for key in weights.checkpoint if weights and weights.key else ():
        named = key != weights.key and str(key).startswith(("model", "state_dict"))
        if named and is_state_dict(weights.checkpoint[key]):
            other = copy.deepcopy(network.module)
            try:
                tensors = checkpoint_weights(weights.checkpoint, key=key, path=weights.path)
                load_weights(other, tensors, path=weights.path)
            except CheckpointError as error:  # a teacher's weights, for example
                logger.warning("%s is not evaluated: %s", key, error)
            else:
                yield key, other


def deploy_checkpoint(args: Arguments, world: utils.World) -> None:
    """Fuse the network, compare both forms, write the fused one, and evaluate all forms side by side."""
    # Fuse, compare on validation images, and write on rank 0.
    loader, real, network = prepare_eval(args, world)
    target = Path(args.switch_to_deploy)
    fused, difference = write_deployed(
        network.module,
        target,
        compare=functools.partial(largest_difference, batches=(images.to(world.device) for images, _, _ in loader)),
        answers="logits",
        record={**network.state(), "args": dict(vars(args))},
        device=world.device,
        layout=training.layout_of(args),
        is_main=world.is_main,
    )

    # Evaluate the fused network, the unfused one, and the other weights in the file.
    used = network.weights.key if network.weights else ""
    forms = {f"train form, {used}" if used else "train form": network.module}
    forms |= {f"train form, {key}": module for key, module in other_forms(network)}
    forms[f"deploy form of {used}" if used else "deploy form"] = fused
    precision = training.build_precision(args, world.device)
    results = {name: run_eval(args, world, form, loader, real, precision, name) for name, form in forms.items()}
    broken = training.broken_count(world, loader)
    if not world.is_main:
        return

    # Rank 0 measures the speed of the forms in turns, and prints all results in one table.
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
    if args.output_dir:
        for label, name in (("checkpoint", "checkpoint-last.pth"), ("curves", "curves.png"), ("log", "summary.csv")):
            if (Path(args.output_dir) / name).exists():
                print(f"{label}: {Path(args.output_dir) / name}")


# -- training


@dataclass(frozen=True)
class Data:
    """What a classifier is trained on.

    Attributes:
        loader, validation: this rank's training and validation batches; validation is None with --disable_eval.
        real: ReaL labels of the validation images by index; None without --real_labels.
        classes, num_classes: the names of the classes, None for a stream that does not know them, and their number.
        mixup: mixes a training batch; None mixes nothing.
    """

    loader: Any
    validation: Any | None
    real: Sequence[Sequence[int]] | None
    classes: Sequence[str] | None
    num_classes: int
    mixup: Mixup | None


def build_mixup(args: Arguments, num_classes: int) -> Mixup | None:
    """Build timm's mixup and cutmix for images (B, 3, H, W) and classes (B,), which become soft targets (B, classes).

    Returns None if both are off. Raises ValueError for an odd batch size, because images are mixed in pairs.
    """
    if args.mixup <= 0 and args.cutmix <= 0 and args.cutmix_minmax is None:
        return None
    if args.batch_size % 2:
        raise ValueError(f"mixup and cutmix need an even --batch_size, not {args.batch_size}; or --mixup 0 --cutmix 0")
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def open_data(args: Arguments, world: utils.World, preprocessing: Preprocessing) -> Data:
    dataset = build_dataset(args, world, train=True, transform=build_train_transform(args, preprocessing))
    num_classes = class_count(args, dataset)
    validation = real = None
    if not args.disable_eval:
        transform = transforms.build_eval_transform(preprocessing)
        eval_dataset = build_dataset(args, world, train=False, transform=transform)
        validation, real = build_eval_loader(
            args, eval_dataset, world, classes=dataset.classes, num_classes=num_classes, of="the training data"
        )
    loader = loaders.build_train_loader(dataset, replace(training.loading_of(args, world), num_classes=num_classes))
    return Data(loader, validation, real, dataset.classes, num_classes, build_mixup(args, num_classes))


def open_network(
    args: Arguments, world: utils.World, data: Data, source: networks.Network | None
) -> tuple[nn.Module, float]:
    """Return the network on its device, and its initial lambda: that of `source`, or 0 if new or by --restart_decay."""
    # A new network, or the one of --finetune with a classifier for these classes.
    utils.seed_everything(args.seed)  # the same on all ranks, so that they start from the same weights
    start_slope = 0.0
    if source:
        if getattr(source.module, "deploy", False):
            raise ValueError(f"{source.source} is in deploy form, which has nothing left to train")
        source = source.for_classes(data.classes or data.num_classes, keep=args.keep_classifier)
        model, start_slope = source.module.train(), 0.0 if args.restart_decay else source.slope
    else:
        model = build_model(args, data.num_classes)

    # Check the flags that depend on the network.
    if args.batch_size == 1 and networks.is_vanillanet(args.model) and not (args.sync_bn and world.distributed):
        raise ValueError("BatchNorm needs more than one image in a batch: raise --batch_size")
    asked, layers = args.layer_decay_num_layers, len(getattr(model, "stages", ()))
    if layers and asked != layers:
        args.moot("layer_decay_num_layers", f"--layer_decay_num_layers {asked}, but {args.model} has {layers}")
    if start_slope < 1 and hasattr(model, "change_act") and args.epochs <= args.decay_epochs:
        ends = f"--epochs {args.epochs} ends before --decay_epochs {args.decay_epochs}"
        logger.warning(f"{ends}: lambda will not reach 1, so the network cannot be deployed")

    # Move the network to its device, and freeze parameters before the optimizer collects those to train.
    model = training.place(args, model, world.device)
    if args.freeze_stages is not None:
        freeze(model, args.freeze_stages)
    return model, start_slope


def open_objective(args: Arguments, world: utils.World, data: Data, preprocessing: Preprocessing) -> Classification:
    """Build the loss of a batch, to which --teacher adds a distillation term."""
    precision = training.build_precision(args, world.device)
    distiller = None
    if args.teacher:
        teacher = build_teacher(args, preprocessing, classes=data.classes, num_classes=data.num_classes)
        teacher = teacher.to(world.device, memory_format=training.layout_of(args))
        distiller = Distiller(teacher, args.distill_alpha, args.distill_tau, precision)
    criterion = build_criterion(
        mixing=data.mixup is not None,
        smoothing=args.smoothing,
        bce=args.bce_loss,
        bce_target_thresh=args.bce_target_thresh,
    )
    return Classification(criterion, precision, data.mixup, distiller)


def open_schedule(args: Arguments, steps_per_epoch: int) -> Schedule:
    """Build the schedule: warm-up and half a cosine for the learning rate, half a cosine for the weight decay."""
    total_steps = args.epochs * steps_per_epoch
    flag, warmup_steps = "warmup_steps", args.warmup_steps
    if warmup_steps <= 0:
        flag, warmup_steps = "warmup_epochs", args.warmup_epochs * steps_per_epoch
    warmup_steps = training.checked_warmup(args, flag, warmup_steps=warmup_steps, total_steps=total_steps)
    end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end

    def schedule(updates: int) -> tuple[float, float]:
        lr = cosine_schedule(updates, total_steps, base=args.lr, final=args.min_lr, warmup_steps=warmup_steps)
        return lr, cosine_schedule(updates, total_steps, base=args.weight_decay, final=end)

    return schedule


def train(args: Arguments, world: utils.World) -> None:
    """Train a classifier: open the data and the network, build the state and the task, and call `training.fit`."""
    stop = utils.StopRequest()

    # The data, prepared for the network, and the network, which may start from the weights of --finetune.
    source = open_source(args) if args.finetune else None
    preprocessing = settle(args, source, train=True)
    data = open_data(args, world, preprocessing)
    model, start_slope = open_network(args, world, data, source)
    model_kwargs = source.record.model_kwargs if source else {}
    del source  # frees the tensors of its file

    # The loss, and the state that the run changes.
    objective = open_objective(args, world, data, preprocessing)
    state = training.build_state(args, world, model, loader=data.loader, objective=objective, classes=data.num_classes)
    state.start_slope = start_slope
    if args.compile:
        model.compile()

    # The parts of the loop that only classification has.
    def slope(epoch: int) -> float:
        start = state.start_slope
        return activation_slope(epoch, decay_epochs=args.decay_epochs, linear=args.decay_linear, start=start)

    def evaluate_all(forms: Mapping[str, nn.Module]) -> dict[str, float]:
        found = {}
        for prefix, network in forms.items():
            result = run_eval(args, world, network, data.validation, data.real, objective.precision, prefix, stop)
            found |= result.metrics(prefix) if result else {}
        return found

    loss = networks.BINARY_CROSS_ENTROPY if args.bce_loss else networks.CROSS_ENTROPY

    def restored(checkpoint: Mapping[str, Any], path: str | Path) -> None:
        networks.warn_of_other_preprocessing(preprocessing, checkpoint, path)
        if data.classes and checkpoint.get("classes", list(data.classes)) != list(data.classes):
            other = f"{path} was trained on other classes, or on them in another order"
            raise ValueError(f"{other}: begin anew with --finetune")

    task = training.Task(
        data.loader,
        objective,
        open_schedule(args, state.steps_per_epoch),
        evaluate=evaluate_all if data.validation is not None else None,  # a loader without images is false
        score="acc1",
        describe=lambda: networks.describe(preprocessing, loss, data.classes, model_kwargs),
        restored=restored,
        slope=slope,
    )
    training.fit(args, state, task, stop)
    if state.best:
        logger.info("best top-1: %s", ", ".join(f"{score:.3f} ({name})" for name, score in state.best.items()))


def main(argv: Sequence[str] | None = None, *, args: Arguments | None = None) -> None:
    args = args or parse_args(argv)
    if args.switch_to_deploy is not None:
        body = deploy_checkpoint
    elif args.eval:
        body = evaluate_checkpoint
    else:
        body = train
    utils.launch("main.py", args, functools.partial(body, args), output_dir=args.output_dir if body is train else None)


if __name__ == "__main__":
    main(args=ARGS)
