"""Train, evaluate or deploy VanillaNet; the only place that sees all the arguments.

python main.py @recipes/demo.args                                        # one process
torchrun --nproc_per_node=8 main.py @recipes/vanillanet_6.args --data_path DIR
python main.py --eval true --finetune FILE --data_path DIR               # evaluate
python main.py --switch_to_deploy NEW --finetune FILE --data_path DIR    # fuse, compare, evaluate
"""

import argparse
import copy
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

import datasets
import metrics
import models  # noqa: F401  registers the variants
import networks
import profiling
import utils
from engine import (
    Distiller,
    EvalResult,
    FiniteGuard,
    NonFiniteError,
    Precision,
    Progress,
    build_criterion,
    evaluate,
    train_meter,
    train_one_epoch,
)
from optim_factory import activation_slope, build_optimizer, cosine_schedule, set_hyperparameters
from options import parse_args, save_args

logger = logging.getLogger("main")

DEPLOY_TOLERANCE = 1e-4  # largest difference of fused from unfused logits, relative to the largest logit
COMPARED_BATCHES = 4


# -- the parts, built from the arguments


def build_precision(args: argparse.Namespace, device: torch.device) -> Precision:
    names = {"bf16": torch.bfloat16, "fp16": torch.float16}
    default = "fp16" if device.type == "cuda" else "bf16"
    dtype = names[args.amp_dtype or default] if args.use_amp else None
    return Precision(device, dtype, args.channels_last)


def layout_of(args: argparse.Namespace) -> torch.memory_format:
    return torch.channels_last if args.channels_last else torch.contiguous_format


def build_transform(args: argparse.Namespace, *, train: bool):
    mean, std = datasets.mean_and_std(args.imagenet_default_mean_and_std)
    shared = {
        "mean": mean,
        "std": std,
        "small": datasets.keeps_native_size(args.data_set, args.input_size),
    }
    if not train:
        return datasets.build_eval_transform(args.input_size, crop_pct=args.crop_pct, **shared)
    return datasets.build_train_transform(
        args.input_size,
        color_jitter=args.color_jitter,
        aa=args.aa,
        interpolation=args.train_interpolation,
        reprob=args.reprob,
        remode=args.remode,
        recount=args.recount,
        **shared,
    )


def build_dataset(args: argparse.Namespace, world: utils.World, *, train: bool):
    """One split. Rank 0 opens it first, since that may download it."""
    for turn in (True, False):
        if world.is_main is turn:
            dataset = datasets.build_dataset(
                args.data_set,
                args.data_path,
                train=train,
                transform=build_transform(args, train=train),
                eval_data_path=args.eval_data_path,
                download=turn,
            )
        world.barrier()
    return dataset


def build_eval_loader(args: argparse.Namespace, dataset, world: utils.World):
    """The validation loader, and ReaL's labels by index if there are any."""
    rank, size = (world.rank, world.size) if args.dist_eval else (0, 1)
    loader = datasets.build_eval_loader(
        dataset,
        batch_size=args.batch_size,
        rank=rank,
        world_size=size,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and world.device.type == "cuda",
        skip_broken=args.skip_broken_eval,
    )
    real = datasets.real_targets(datasets.load_real_labels(args.real_labels), dataset) if args.real_labels else None
    return loader, real


def class_count(args: argparse.Namespace, dataset) -> int:
    """The number of classes, from the data; from --nb_classes for a stream that does not know its own."""
    if dataset.classes is None:
        return args.nb_classes
    if "nb_classes" in args.given and args.nb_classes != len(dataset.classes):
        raise ValueError(f"--nb_classes {args.nb_classes}, but the data have {len(dataset.classes)} classes")
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
        if flag in args.given and flag not in kwargs:
            raise ValueError(f"--{flag} belongs to VanillaNet, --model {args.model} has no such thing")
    return timm.create_model(args.model, **kwargs)


def load_network(args: argparse.Namespace, model: nn.Module, *, fine_tuning: bool) -> tuple[float, dict[str, Any]]:
    """Load --finetune into `model`. Returns the checkpoint's lambda, to which the model is set, and the checkpoint."""
    path = args.finetune or args.resume
    checkpoint = utils.load_checkpoint(path)
    weights = utils.checkpoint_weights(
        checkpoint,
        key=args.model_key,
        whole_file="model_key" not in args.given,
        prefix=args.model_prefix,
        path=path,
    )
    skipped = utils.load_weights(model, weights, path=path, allow_other_classes=fine_tuning)
    if skipped:
        logger.info("%s has other classes: its classifier (%d tensors) is not loaded", path, len(skipped))
    slope = networks.recorded_slope(checkpoint)
    networks.set_slope(slope, model)
    return slope, checkpoint


def build_teacher(args: argparse.Namespace, num_classes: int, device: torch.device) -> nn.Module:
    """The network to learn from, in eval mode: --teacher_weights, or else timm's pretrained weights."""
    if args.teacher_weights:
        _, teacher, _ = networks.create_trained(
            args.teacher_weights,
            name=args.teacher,
            num_classes=num_classes,
            key=args.teacher_key,
            whole_file="teacher_key" not in args.given,
            flag="--teacher",
        )
    else:
        teacher = networks.create_pretrained(args.teacher, "--teacher", mend="add --teacher_weights")
        if teacher.num_classes != num_classes:
            raise ValueError(
                f"--teacher {args.teacher} knows {teacher.num_classes} classes, the data have {num_classes}"
            )
    return teacher.to(device, memory_format=layout_of(args)).requires_grad_(False)


# -- evaluation


def run_eval(
    args: argparse.Namespace, world: utils.World, model: nn.Module, loader, real, precision: Precision, name: str
) -> EvalResult | None:
    """Evaluate on all ranks, or with --dist_eval false on rank 0; the others then return None."""
    result = None
    if args.dist_eval or world.is_main:
        batches = metrics.progress(loader, description=f"eval {name}", total=len(loader), enabled=world.is_main)
        reduce = world.sum if args.dist_eval else (lambda sums: sums)
        result = evaluate(model, batches, precision=precision, real_targets=real, reduce=reduce)
    world.barrier()
    return result


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


def broken_count(world: utils.World, loader) -> int:
    return len(set().union(*world.gather(loader.broken)))


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


# -- deploying


@torch.no_grad()
def largest_difference(model: nn.Module, fused: nn.Module, loader, device: torch.device) -> float:
    """The largest |fused - unfused| logit over some real batches, relative to the largest |unfused|; in float32."""
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
        utils.save_checkpoint(
            {
                "model": fused.state_dict(),
                "act_learn": 1.0,
                "deploy": True,
                "args": {name: value for name, value in vars(args).items() if name != "given"},
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
            utils.load_weights(other, utils.checkpoint_weights(checkpoint, key=key), path=args.finetune)
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
    print(metrics.table(rows, args.model))
    print(f"largest logit difference, relative: {difference:.1e} over {min(COMPARED_BATCHES, len(loader))} batches")
    print(f"images/s: median over interleaved rounds of {len(images)} images, {torch.get_num_threads()} threads")
    print(f"deploy form: {target}")
    if args.output_dir and Path(args.output_dir).is_dir():
        for label, name in (("checkpoint", "checkpoint-last.pth"), ("curves", "curves.png"), ("log", "summary.csv")):
            if (Path(args.output_dir) / name).exists():
                print(f"{label}: {Path(args.output_dir) / name}")


# -- training


class Training:
    """The state of a run, and what is done with it between steps and epochs."""

    def __init__(self, args: argparse.Namespace, world: utils.World, stop: utils.StopRequest):
        self.args, self.world, self.stop = args, world, stop
        self.precision = build_precision(args, world.device)
        self.build_data()
        utils.seed_everything(args.seed)  # the same on all ranks, so that the initial weights are
        self.build_networks()
        self.build_schedules()
        self.scaler = self.precision.scaler()
        self.progress = Progress(epoch=args.start_epoch, updates=args.start_epoch * self.steps_per_epoch)
        self.meter = train_meter(world.device)
        self.best = {"acc1": -1.0, "ema_acc1": -1.0}
        utils.seed_everything(args.seed + world.rank)  # dropout and mixup differ between ranks
        self.checkpoints = utils.CheckpointFolder(args.output_dir, args.save_ckpt_num) if args.output_dir else None
        self.restore()
        self.wrap()
        self.step_sinks, self.epoch_sinks = self.build_sinks()

    # set-up

    def build_data(self) -> None:
        args, world = self.args, self.world
        self.eval_loader = self.real = None
        if not args.disable_eval:
            eval_dataset = build_dataset(args, world, train=False)
            self.eval_loader, self.real = build_eval_loader(args, eval_dataset, world)
        train_dataset = build_dataset(args, world, train=True)
        if not args.disable_eval:
            datasets.check_same_classes(train_dataset, eval_dataset)
        self.num_classes = class_count(args, train_dataset)
        self.loader = datasets.build_train_loader(
            train_dataset,
            batch_size=args.batch_size,
            rank=world.rank,
            world_size=world.size,
            seed=args.seed,
            num_workers=args.num_workers,
            pin_memory=args.pin_mem and world.device.type == "cuda",
        )
        self.steps_per_epoch = -(-len(self.loader) // args.update_freq)
        self.mixup = datasets.build_mixup(
            args.batch_size,
            self.num_classes,
            mixup=args.mixup,
            cutmix=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            mixup_prob=args.mixup_prob,
            mixup_switch_prob=args.mixup_switch_prob,
            mixup_mode=args.mixup_mode,
            smoothing=args.smoothing,
        )
        if args.batch_size == 1 and not args.sync_bn:
            raise ValueError("BatchNorm needs more than one image in a batch: raise --batch_size")

    def build_networks(self) -> None:
        args, world = self.args, self.world
        model = build_model(args, self.num_classes)
        self.start_slope = 0.0
        if args.finetune:
            slope, _ = load_network(args, model, fine_tuning=True)
            self.start_slope = 0.0 if args.restart_decay else slope
        self.model = model.to(world.device, memory_format=layout_of(args))
        if args.sync_bn:
            if world.device.type != "cuda":
                raise ValueError("--sync_bn true works on GPUs only; leave it out with --device cpu")
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.distiller = None
        if args.teacher:
            teacher = build_teacher(args, self.num_classes, world.device)
            self.distiller = Distiller(teacher, args.distill_alpha, args.distill_tau, self.precision)
        decays = args.model_ema_decay if args.model_ema else []
        device = "cpu" if args.model_ema_force_cpu else None
        self.emas = [ModelEmaV3(self.model, decay, device=device) for decay in decays]
        self.optimizer = build_optimizer(
            self.model,
            args.opt,
            lr=args.lr,
            weight_decay=args.weight_decay,
            layer_decay=args.layer_decay,
            eps=args.opt_eps,
            betas=args.opt_betas,
            momentum=args.momentum,
            explicit=[name for name in ("eps", "betas", "momentum") if {name, f"opt_{name}"} & set(args.given)],
        )
        if "layer_decay_num_layers" in args.given and hasattr(self.model, "stages"):
            layers = len(self.model.stages)
            if args.layer_decay_num_layers != layers:
                raise ValueError(
                    f"--layer_decay_num_layers {args.layer_decay_num_layers}, but {args.model} has {layers}"
                )

    def build_schedules(self) -> None:
        args = self.args
        self.total_steps = args.epochs * self.steps_per_epoch
        self.warmup_steps = args.warmup_steps if args.warmup_steps > 0 else args.warmup_epochs * self.steps_per_epoch
        if self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"the warm-up ({self.warmup_steps} steps) leaves nothing of --epochs {args.epochs} "
                f"({self.total_steps} steps): lower --warmup_epochs or --warmup_steps"
            )
        self.last_epoch = min(args.epochs, args.early_stop_epochs or args.epochs)
        if self.start_slope < 1 and hasattr(self.model, "change_act") and args.epochs <= args.decay_epochs:
            logger.warning(
                "--epochs %d ends before --decay_epochs %d: lambda will not reach 1, so the network cannot be deployed",
                args.epochs,
                args.decay_epochs,
            )

    def wrap(self) -> None:
        """Compile and distribute; the state above stays that of the plain network."""
        if self.args.compile:
            self.model.compile()
        self.guard = FiniteGuard(self.model, rank=self.world.rank, world_size=self.world.size)
        self.wrapped = self.model
        if self.world.distributed:
            devices = [self.world.device] if self.world.device.type == "cuda" else None
            self.wrapped = nn.parallel.DistributedDataParallel(self.model, device_ids=devices)

    def build_sinks(self) -> tuple[metrics.Sinks, metrics.Sinks]:
        """What takes the numbers of a step, and of an epoch; nothing on ranks other than 0."""
        args = self.args
        if not self.world.is_main:
            return metrics.Sinks(), metrics.Sinks()
        step_sinks: list[metrics.Sink] = [metrics.ConsoleSink("step")]
        epoch_sinks: list[metrics.Sink] = [metrics.ConsoleSink("epoch")]
        start_step = self.progress.epoch * self.steps_per_epoch + self.progress.step
        if args.output_dir:
            folder = Path(args.output_dir)
            save_args(args, folder / "args.yaml")
            csv = metrics.CsvSink(folder / "summary.csv", self.progress.epoch)
            epoch_sinks += [csv, metrics.CurvesSink(folder / "curves.png", csv)]
            step_sinks.append(metrics.JsonLinesSink(folder / "log.jsonl", "step", start_step + 1))
        events = args.log_dir or (Path(args.output_dir) / "tensorboard" if args.output_dir else None)
        if events:
            step_sinks.append(metrics.TensorBoardSink(Path(events), "step"))
            epoch_sinks.append(metrics.TensorBoardSink(Path(events), "epoch"))
        self.wandb = None
        if args.enable_wandb:
            try:
                import wandb
            except ImportError:
                raise ValueError("--enable_wandb true needs the package wandb: pip install wandb") from None
            self.wandb = wandb.init(project="vanillanet", config=vars(args), dir=args.output_dir)
            step_sinks.append(metrics.WandbSink(self.wandb, "step"))
            epoch_sinks.append(metrics.WandbSink(self.wandb, "epoch"))
        return metrics.Sinks(*step_sinks), metrics.Sinks(*epoch_sinks)

    # schedules

    def schedule(self, updates: int) -> tuple[float, float]:
        """Learning rate and weight decay after so many optimizer steps."""
        args = self.args
        lr = cosine_schedule(updates, self.total_steps, base=args.lr, final=args.min_lr, warmup_steps=self.warmup_steps)
        end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
        return lr, cosine_schedule(updates, self.total_steps, base=args.weight_decay, final=end)

    def slope(self) -> float:
        args = self.args
        return activation_slope(
            self.progress.epoch, decay_epochs=args.decay_epochs, linear=args.decay_linear, start=self.start_slope
        )

    # checkpoints

    SCHEDULE_FLAGS = (
        "epochs", "decay_epochs", "decay_linear", "lr", "min_lr", "warmup_epochs", "warmup_steps", "weight_decay",
        "weight_decay_end", "opt", "update_freq",
    )  # fmt: skip

    def ema_names(self) -> list[str]:
        """Keys of the averages in a checkpoint: the first is `model_ema`, further ones carry their decay."""
        return ["model_ema" if i == 0 else f"model_ema_{ema.decay}" for i, ema in enumerate(self.emas)]

    def snapshot(self, *, finished_epoch: bool) -> dict[str, Any]:
        """Everything that the rest of the run depends on. A collective: every rank calls it."""
        rank_state = {
            "rng": utils.rng_state(self.world.device),
            "meter": self.meter.sums.cpu(),
            "broken": sorted(self.loader.broken),
        }
        return {
            "model": self.model.state_dict(),
            **{name: ema.module.state_dict() for name, ema in zip(self.ema_names(), self.emas, strict=True)},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.progress.epoch,
            "step": 0 if finished_epoch else self.progress.step,
            "samples": 0 if finished_epoch else self.progress.samples,
            "updates": self.progress.updates,
            "steps_per_epoch": self.steps_per_epoch,
            "act_learn": self.slope(),
            "start_slope": self.start_slope,
            "best": dict(self.best),
            "ranks": self.world.gather(rank_state),
            "args": {name: value for name, value in vars(self.args).items() if name != "given"},
        }

    def save(self, *, finished_epoch: bool, names: Sequence[str] = ()) -> None:
        """Save if there is a folder to save to; all ranks call it, rank 0 writes, and all learn of a failure."""
        if self.checkpoints is None or not self.args.save_ckpt:
            return
        self.guard.check()
        checkpoint = self.snapshot(finished_epoch=finished_epoch)
        failure = None
        if self.world.is_main:
            epoch, step = self.progress.epoch, self.progress.step
            try:
                self.checkpoints.save(
                    checkpoint,
                    epoch=epoch + 1 if finished_epoch else epoch,
                    step=0 if finished_epoch else step,
                    names=names,
                )
            except utils.CheckpointError as error:
                failure = str(error)
        failure = self.world.gather(failure)[0]
        if failure:
            raise utils.CheckpointError(failure)

    def restore(self) -> None:
        """Go on from --resume or, with --auto_resume true, from the newest valid checkpoint of the output folder."""
        args = self.args
        path = args.resume
        if self.checkpoints is not None:
            existing = self.checkpoints.numbered()
            if self.world.is_main:
                Path(args.output_dir).mkdir(parents=True, exist_ok=True)
                self.checkpoints.remove_leftovers()
            if args.auto_resume and not path:
                path = self.world.gather(self.checkpoints.newest_valid() if self.world.is_main else None)[0]
            elif existing and not path and args.save_ckpt:
                raise ValueError(
                    f"{args.output_dir} holds checkpoints of an earlier run ({existing[0].name}): "
                    "add --auto_resume true to go on with it, or choose another --output_dir"
                )
        if path:
            self.load(utils.load_checkpoint(path), path)

    def load(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        self.check_schedules(checkpoint, path)
        emas = list(zip(self.ema_names(), self.emas, strict=True))
        absent = [key for key in ("model", "optimizer", "epoch", *(name for name, _ in emas)) if key not in checkpoint]
        if absent:
            raise utils.CheckpointError(
                f"cannot resume from {path}: it has no {', '.join(absent)}; use --finetune for weights"
            )
        utils.load_weights(self.model, utils.checkpoint_weights(checkpoint, key="model", path=path), path=path)
        for name, ema in emas:
            utils.load_weights(ema.module, utils.checkpoint_weights(checkpoint, key=name, path=path), path=path)
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except (ValueError, KeyError) as error:
            raise utils.CheckpointError(f"cannot resume from {path}: its optimizer differs ({error})") from None
        if checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        step = checkpoint.get("step", 0)
        self.progress.epoch = checkpoint["epoch"] + (0 if step else 1)
        self.progress.samples = checkpoint.get("samples", 0)
        old_steps = checkpoint.get("steps_per_epoch", self.steps_per_epoch)
        updates = checkpoint.get("updates", self.progress.epoch * old_steps)
        # With another number of ranks an epoch has another number of steps; the place in it stays.
        self.progress.updates = round(updates * self.steps_per_epoch / old_steps)
        self.progress.step = round(step * self.steps_per_epoch / old_steps)
        self.start_slope = checkpoint.get("start_slope", self.start_slope)
        self.best.update(checkpoint.get("best", {}))
        ranks = checkpoint.get("ranks")
        self.loader.broken.update(index for rank in ranks or [] for index in rank["broken"])
        if ranks and len(ranks) == self.world.size:
            own = ranks[self.world.rank]
            utils.set_rng_state(own["rng"], self.world.device)
            self.meter.sums.copy_(own["meter"])
        elif ranks:
            logger.warning("%s is of %d process(es): random numbers are seeded anew", path, len(ranks))
            if self.world.is_main:
                self.meter.sums.copy_(sum(rank["meter"] for rank in ranks))
        logger.info("resumed %s: epoch %d, step %d", path, self.progress.epoch, self.progress.step)

    def check_schedules(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        """A resumed run keeps its schedules unless --resume_new_sched says otherwise."""
        old = networks.recorded_args(checkpoint)
        for flag in self.SCHEDULE_FLAGS:
            if not self.args.resume_new_sched and flag in old and old[flag] != getattr(self.args, flag):
                raise ValueError(
                    f"--{flag} {getattr(self.args, flag)}, but {path} was trained with {old[flag]}: "
                    "add --resume_new_sched to change it"
                )

    # the run

    def run(self) -> None:
        while self.progress.epoch < self.last_epoch:
            self.train_epoch()
            row, names = self.finish_epoch()
            epoch = self.progress.epoch
            last = epoch + 1 == self.last_epoch
            self.meter.sums.zero_()
            # The row first: a run killed in between repeats the epoch and replaces the row.
            self.epoch_sinks.log(row, epoch)
            if names or last or (epoch + 1) % self.args.save_ckpt_freq == 0:
                self.save(finished_epoch=True, names=names)
            self.progress.epoch, self.progress.step, self.progress.samples = epoch + 1, 0, 0
            if self.world.any(self.stop.received is not None):
                self.leave()
        if self.args.wandb_ckpt and self.wandb is not None:
            self.wandb.save(str(self.checkpoints.folder / "checkpoint-last.pth"), policy="now")
        self.close()

    def train_epoch(self) -> None:
        progress, args = self.progress, self.args
        networks.set_slope(self.slope(), self.model, *(ema.module for ema in self.emas))
        self.loader.set_epoch(progress.epoch, start_sample=progress.samples)
        remaining = self.loader.remaining_batches
        batches = metrics.progress(
            self.loader,
            description=f"epoch {progress.epoch}",
            total=len(self.loader),
            initial=len(self.loader) - remaining,
            enabled=self.world.is_main,
        )
        first_step = progress.epoch * self.steps_per_epoch

        def on_log(step: int, values: dict[str, float]) -> None:
            lr, weight_decay = self.schedule(progress.updates)
            self.step_sinks.log({**values, "lr": lr, "weight_decay": weight_decay}, first_step + step)

        def after_step() -> bool:
            if self.world.any(self.stop.received is not None):
                return True
            due = args.save_ckpt_steps and progress.step % args.save_ckpt_steps == 0
            if due and progress.step < self.steps_per_epoch:
                self.save(finished_epoch=False)
            return False

        finished = train_one_epoch(
            self.wrapped,
            batches,
            optimizer=self.optimizer,
            criterion=build_criterion(
                mixing=self.mixup is not None,
                smoothing=args.smoothing,
                bce=args.bce_loss,
                bce_target_thresh=args.bce_target_thresh,
            ),
            precision=self.precision,
            scaler=self.scaler,
            guard=self.guard,
            progress=progress,
            meter=self.meter,
            num_batches=remaining,
            set_schedules=lambda updates: set_hyperparameters(self.optimizer, *self.schedule(updates)),
            mixup=self.mixup,
            distiller=self.distiller,
            emas=self.emas,
            ema_source=self.model,
            update_freq=args.update_freq,
            clip_grad=args.clip_grad,
            world_size=self.world.size,
            log_every=args.log_freq,
            on_log=on_log,
            after_step=after_step,
        )
        if not finished or self.world.any(self.stop.received is not None):
            self.save(finished_epoch=False)
            self.leave()

    def finish_epoch(self) -> tuple[dict[str, float], list[str]]:
        """Evaluate if it is due. Returns the epoch's row, and the names under which its checkpoint is the best."""
        args, epoch, world = self.args, self.progress.epoch, self.world
        self.guard.check()
        world.sync_buffers(self.model, *(ema.module for ema in self.emas))
        loss, correct, count = world.sum(self.meter.sums.clone()).tolist()
        lr, weight_decay = self.schedule(self.progress.updates)
        row = {"train_loss": loss / count}
        if self.mixup is None:
            row["train_acc1"] = 100 * correct / count
        row |= {"lr": lr, "weight_decay": weight_decay, "act_learn": self.slope()}
        broken = broken_count(world, self.loader)
        if broken:
            row["broken_images"] = broken
        names = []
        due = epoch % args.test_freq == 0 or epoch >= args.test_epoch or epoch + 1 == self.last_epoch
        if self.eval_loader is not None and due:
            result = run_eval(args, world, self.model, self.eval_loader, self.real, self.precision, "model")
            averages = []
            if args.model_ema_eval:
                for i, ema in enumerate(self.emas):
                    network = copy.deepcopy(ema.module).to(world.device) if args.model_ema_force_cpu else ema.module
                    prefix = "ema" if i == 0 else f"ema_{ema.decay}"
                    averages.append(
                        (prefix, run_eval(args, world, network, self.eval_loader, self.real, self.precision, prefix))
                    )
            if world.is_main:
                row |= result.metrics("test")
                for prefix, average in averages:
                    row |= average.metrics(prefix)
                best_average = max((average.acc1 for _, average in averages), default=-1.0)
                for key, value, name in (("acc1", result.acc1, "best"), ("ema_acc1", best_average, "best-ema")):
                    if value > self.best[key]:
                        self.best[key] = value
                        names.append(name)
        return row, world.gather(names)[0]

    def leave(self) -> None:
        """End after a signal; the state has been saved."""
        kept = (
            "the state is saved, --auto_resume true goes on" if self.checkpoints else "no --output_dir, nothing saved"
        )
        logger.warning("stopped by a signal in epoch %d, step %d: %s", self.progress.epoch, self.progress.step, kept)
        self.close()
        raise SystemExit(max(self.world.gather(self.stop.exit_code)))

    def close(self) -> None:
        self.step_sinks.close()
        self.epoch_sinks.close()


def train(args: argparse.Namespace, world: utils.World, stop: utils.StopRequest) -> None:
    training = Training(args, world, stop)
    parameters = sum(p.numel() for p in training.model.parameters())
    logger.info(
        "%s: %.3f M parameters, %d classes, %d steps an epoch of %d images, on %s",
        args.model,
        parameters / 1e6,
        training.num_classes,
        training.steps_per_epoch,
        args.batch_size * args.update_freq * world.size,
        world.device,
    )
    training.run()
    if training.eval_loader is not None:
        best = training.best
        ema = f", of an EMA {best['ema_acc1']:.3f}" if best["ema_acc1"] >= 0 else ""
        logger.info("best top-1 %.3f%s", best["acc1"], ema)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    world = utils.World(0, 1, torch.device("cpu"))
    failure = None
    try:
        world = utils.init_world(
            args.device,
            dist_url=args.dist_url,
            on_itp=args.dist_on_itp,
            world_size=args.world_size,
            local_rank=args.local_rank,
        )
        utils.setup_logging(world.rank)
        if args.switch_to_deploy is not None:
            deploy_checkpoint(args, world)
        elif args.eval:
            evaluate_checkpoint(args, world)
        else:
            train(args, world, utils.StopRequest())
    except NonFiniteError as error:
        failure = 1, str(error)
    except (ValueError, OSError) as error:
        failure = 2, str(error)
    finally:
        # Past the except clauses, so that no traceback holds on to the networks of a distributed run any more.
        utils.close_world(world)
    if failure:
        code, message = failure
        sys.stderr.write(f"main.py: error: {message}\n")
        raise SystemExit(code)


if __name__ == "__main__":
    main()
