"""A training run: the loop over epochs that every command which trains calls, and what it leaves in its folder.

A command opens its data and network, builds a `TrainState` and a `Task`, and calls `fit`. Like the commands, this file
sees the arguments as a whole.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

import networks
import utils
from benchmarking.profiling import count_params
from engine import Objective, Precision, Schedule, TrainState, train_one_epoch
from loading.processes import Loading
from models.checkpointing import set_grad_checkpointing
from optim_factory import build_optimizer, taken_by
from options import Arguments, save_args
from records import curves, logs
from records.checkpoints import CheckpointFolder, load_checkpoint

logger = logging.getLogger(__name__)

# What a resumed run keeps, of the flags that its command has; --resume_new_sched lets all but the optimizer change.
SCHEDULE_FLAGS = (
    "epochs", "lr", "min_lr", "warmup_epochs", "warmup_steps", "weight_decay", "weight_decay_end", "lr_steps",
    "lr_gamma", "opt", "opt_betas", "opt_eps", "momentum", "layer_decay", "update_freq", "decay_epochs", "decay_linear",
)  # fmt: skip


def build_precision(args: Arguments, device: torch.device) -> Precision:
    names = {"bf16": torch.bfloat16, "fp16": torch.float16}
    default = "fp16" if device.type == "cuda" else "bf16"
    dtype = names[args.amp_dtype or default] if args.use_amp else None
    return Precision(device, dtype, layout_of(args))


def layout_of(args: Arguments) -> torch.memory_format:
    return torch.channels_last if args.channels_last else torch.contiguous_format


def broken_count(world: utils.World, loader) -> int:
    """How many images of a loader could not be read, over all ranks."""
    return len(set().union(*world.gather(loader.broken)))


class EvaluationStopped(Exception):
    """A signal came during the evaluation. The state is saved, and a run that goes on begins the evaluation again."""


def until_stopped(loader: Any, world: utils.World, stop: utils.StopRequest | None, *, name: str) -> Iterator[Any]:
    """The batches of an evaluation, called `name` on rank 0's bar, up to a signal; then all ranks meet.

    Raises:
        EvaluationStopped: on all ranks, after the last batch, if any of them received a signal that `stop` remembers.
    """
    for batch in logs.progress(loader, description=f"eval {name}", total=len(loader), enabled=world.is_main):
        if stop is not None and stop.received is not None:
            break
        yield batch
    meet(world, stop)


def meet(world: utils.World, stop: utils.StopRequest | None) -> None:
    """The end of `until_stopped`, for a rank that has no batches."""
    if world.any(stop is not None and stop.received is not None):
        raise EvaluationStopped


# -- what a command brings


@dataclass(frozen=True)
class Task:
    """What a run trains: all in which one command that trains differs from another.

    Attributes:
        loader: this rank's training batches, as `loading.loaders.TrainLoader` gives them.
        evaluate: metrics of the networks, each of which comes with their prefix; rank 0 has to know them. May raise
            EvaluationStopped, on all ranks. None without validation data.
        score: the metric by which a checkpoint is the best, without prefix; the higher the better.
        describe: gives what a checkpoint holds beside the state.
        restored: takes a checkpoint that is resumed, and its path; ValueError if it is of other data.
        slope: lambda by epoch; None where there is no deep training.
        panels: of curves.png.
    """

    loader: Any
    objective: Objective
    schedule: Schedule
    evaluate: Callable[[Mapping[str, nn.Module]], dict[str, float]] | None
    score: str
    describe: Callable[[], dict[str, Any]]
    restored: Callable[[Mapping[str, Any], str | Path], None]
    slope: Callable[[int], float] | None = None
    panels: curves.Panels = curves.CURVES


def loading_of(args: Arguments, world: utils.World) -> Loading:
    """How this rank's batches are loaded."""
    return Loading(
        rank=world.rank,
        world_size=world.size,
        pin_memory=args.pin_mem and world.device.type == "cuda",
        device=world.device,
        skip_broken=args.skip_broken_eval,
        **args.pick("batch_size", "seed", "num_workers"),
    )


def place(args: Arguments, model: nn.Module, device: torch.device) -> nn.Module:
    """A network on the device in its memory format, with the BatchNorms and the gradient checkpointing asked for."""
    model = model.to(device, memory_format=layout_of(args))
    set_grad_checkpointing(getattr(model, "network", model), args.grad_checkpointing)  # a detector's network
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def build_state(
    args: Arguments, world: utils.World, model: nn.Module, *, loader: Any, objective: Objective, classes: int
) -> TrainState:
    """The state at the beginning of a run of `model`, which is in its place; the log says how large the run is."""
    # Optimizer, which not every setting goes with, and averages.
    for name, flag in {"eps": "opt_eps", "betas": "opt_betas", "momentum": "momentum"}.items():
        if name not in taken_by(args.opt):
            args.moot(flag, f"--opt {args.opt} takes no {name}; leave --{flag} out")
    optimizer = build_optimizer(
        model,
        args.opt,
        eps=args.opt_eps,
        betas=args.opt_betas,
        **args.pick("lr", "weight_decay", "layer_decay", "momentum"),
    )
    kept_on = "cpu" if args.model_ema_force_cpu else None
    averages = {
        f"model_ema_{decay}" if i else "model_ema": ModelEmaV3(model, decay=decay, device=kept_on)
        for i, decay in enumerate(args.model_ema_decay if args.model_ema else ())
    }

    # A step is a window of --update_freq batches.
    steps = -(-len(loader) // args.update_freq)  # the last one of an epoch may be of fewer batches
    logger.info(
        f"{args.model}: {count_params(model) / 1e6:.3f} M parameters, {classes} classes, {steps} steps an epoch of "
        f"{args.batch_size * args.update_freq * world.size} images, on {world.device}"
    )
    return TrainState(
        model,
        optimizer,
        meter=logs.SumMeter(objective.sums, world.device),
        scaler=build_precision(args, world.device).scaler(),
        averages=averages,
        steps_per_epoch=steps,
        start_epoch=args.start_epoch,
        broken=loader.broken,
        world=world,
    )


def checked_warmup(args: Arguments, flag: str, *, warmup_steps: int, total_steps: int) -> int:
    """The steps of the warm-up, which `flag` sets. ValueError if they leave nothing; 0 if a recipe's do."""
    if warmup_steps < total_steps:
        return warmup_steps
    message = f"the warm-up ({warmup_steps} steps) leaves nothing of --epochs {args.epochs}: lower --{flag}"
    if flag not in args.given:
        raise ValueError(message)
    args.moot(flag, message)
    return 0


# -- the loop


def fit(args: Arguments, state: TrainState, task: Task, stop: utils.StopRequest) -> None:
    """Train to the last epoch: for each, train, save, evaluate, log, save.

    Args:
        state: of a new run; --resume and --auto_resume move it to where the earlier run was.
        stop: asked after each step. After a signal the state is saved, and the process ends with its exit code.
    """
    world, progress = state.world, state.progress
    if world.device.type == "cpu":  # a step's activations are larger than what glibc keeps: a fifth of its time
        utils.keep_freed_memory()
    last_epoch = min(args.epochs, args.early_stop_epochs or args.epochs)
    utils.seed_everything(args.seed + world.rank)  # dropout and mixup differ between ranks
    run = RunFolder(args, state, task)
    run.restore()
    asked = args.resume_new_sched if args.resume else not args.auto_resume  # a finished run may be called again
    if asked and progress.epoch >= last_epoch:
        raise ValueError(f"the run would begin with epoch {progress.epoch} of {last_epoch}: raise --epochs")
    run.open_logs()

    while progress.epoch < last_epoch:
        epoch, last = progress.epoch, progress.epoch + 1 == last_epoch
        # Lambda is constant within an epoch, for the network and its averages alike.
        if task.slope is not None:
            networks.set_slope(task.slope(epoch), state.model, *(average.module for average in state.averages.values()))

        # Train what is left of the epoch, which is nothing if the run was ended in its evaluation.
        finished = progress.step >= state.steps_per_epoch or _train_epoch(args, state, task, run, stop)
        if not finished or world.any(stop.received is not None):
            run.save()
            run.leave(stop)
        state.guard.check()
        world.sync_buffers(state.model, *(average.module for average in state.averages.values()))
        row, names = run.row(), []

        # Evaluate. The epoch is saved before, since a broken validation image must not cost it.
        if task.evaluate is not None and (epoch % args.test_freq == 0 or epoch >= args.test_epoch or last):
            if last or (epoch + 1) % args.save_ckpt_freq == 0:
                run.save(trained=True)
            try:
                found = world.gather(task.evaluate(_evaluated(args, state)))[0]
            except EvaluationStopped:
                run.save()
                run.leave(stop)
            row |= found
            names = _improved(state, found, task.score)

        # Log and save. The row comes first: a run killed in between repeats the epoch and replaces the row.
        run.epoch_sinks.log(row, epoch)
        progress.next_epoch()
        state.meter.sums.zero_()
        if names or last or progress.epoch % args.save_ckpt_freq == 0:
            run.save(names=names)
        if world.any(stop.received is not None):
            run.leave(stop)
    run.close()


def _train_epoch(args: Arguments, state: TrainState, task: Task, run: "RunFolder", stop: utils.StopRequest) -> bool:
    """Train to the end of the epoch or to a signal. Returns whether it was the end."""
    # The batches that are left of the epoch, all of them unless the run goes on in its middle.
    progress, world, loader = state.progress, state.world, task.loader
    loader.set_epoch(progress.epoch, start_sample=progress.samples)
    remaining = loader.remaining_batches
    batches = logs.progress(
        loader,
        description=f"epoch {progress.epoch}",
        total=len(loader),
        initial=len(loader) - remaining,
        enabled=world.is_main,
    )
    first_step = progress.epoch * state.steps_per_epoch

    # Between steps: a signal ends the epoch, and --save_ckpt_steps saves in its middle.
    def after_step() -> bool:
        if world.any(stop.received is not None):
            return True
        due = args.save_ckpt_steps and progress.step % args.save_ckpt_steps == 0
        if due and progress.step < state.steps_per_epoch:
            run.save()
        return False

    return train_one_epoch(
        state,
        batches,
        objective=task.objective,
        schedule=task.schedule,
        num_batches=remaining,
        update_freq=args.update_freq,
        clip_grad=args.clip_grad,
        log=logs.StepLog(args.log_freq, lambda step, values: run.step_sinks.log(values, first_step + step)),
        after_step=after_step,
    )


def _evaluated(args: Arguments, state: TrainState) -> dict[str, nn.Module]:
    """The network, as `test`, and with --model_ema_eval its averages, each by the prefix of its metrics."""
    found = {"test": state.model}
    for key, average in state.averages.items() if args.model_ema_eval else ():
        moved = copy.deepcopy(average.module).to(state.world.device) if args.model_ema_force_cpu else average.module
        found[key.removeprefix("model_")] = moved
    return found


def _improved(state: TrainState, found: Mapping[str, float], score: str) -> list[str]:
    """The names under which this checkpoint is the best: `best`, and of averages `best-ema`, `best-ema-0.99`."""
    names = {"best": "test"} | {
        f"best-{prefix}".replace("_", "-"): prefix for prefix in (key.removeprefix("model_") for key in state.averages)
    }
    scores = {name: found.get(f"{prefix}_{score}", -1.0) for name, prefix in names.items()}
    better = {name: value for name, value in scores.items() if value > state.best.get(name, -1.0)}
    state.best.update(better)
    return list(better)


# -- the folder


class RunFolder:
    """What a run leaves behind: checkpoints, curves and logs in --output_dir; without that, lines on the console.

    Attributes:
        step_sinks, epoch_sinks: what takes the numbers of a step, and of an epoch; nothing on ranks other than 0.
    """

    def __init__(self, args: Arguments, state: TrainState, task: Task):
        self.args, self.state, self.task = args, state, task
        self.checkpoints = CheckpointFolder(args.output_dir, args.save_ckpt_num) if args.output_dir else None
        if args.save_ckpt_steps and not task.loader.resumable:
            stream = f"{args.data_set} is a stream, which cannot be resumed in the middle of an epoch; leave it out"
            args.moot("save_ckpt_steps", f"--save_ckpt_steps {args.save_ckpt_steps}: {stream}")

    def save(self, *, trained: bool = False, names: Sequence[str] = ()) -> None:
        """Save if there is a folder to save to; all ranks call it, rank 0 writes, and all learn of a failure.

        In the middle of an epoch nothing is saved of a run on a stream, which could not go on there.

        Args:
            trained: the epoch has been trained and is about to be evaluated. The file has the epoch's name already.
            names: further names of the file, such as `best`.
        """
        progress = self.state.progress
        resumable = self.task.loader.resumable or trained or not progress.step
        if self.checkpoints is None or not self.args.save_ckpt or not resumable:
            return
        self.state.guard.check()
        checkpoint = self.state.state_dict()
        slope = 1.0 if self.task.slope is None else self.task.slope(checkpoint["epoch"])
        checkpoint |= {"act_learn": slope, **self.task.describe(), "args": dict(vars(self.args))}
        epoch, step = (progress.epoch + 1, 0) if trained else (progress.epoch, progress.step)
        self.state.world.from_main(lambda: self.checkpoints.save(checkpoint, epoch=epoch, step=step, names=names))

    def restore(self) -> None:
        """Go on from --resume or, with --auto_resume true, from the newest valid checkpoint of the folder."""
        args, world = self.args, self.state.world

        # Which checkpoint? A folder that holds some is gone on with on request only.
        path, existing = args.resume, []
        if self.checkpoints is not None:
            existing = self.checkpoints.places()
            world.from_main(self.checkpoints.remove_leftovers)
            if args.auto_resume and not path:
                path = world.from_main(self.checkpoints.newest_valid)
            elif existing and not path and args.save_ckpt:
                earlier = f"{args.output_dir} holds checkpoints of an earlier run ({existing[0][1].name})"
                raise ValueError(f"{earlier}: add --auto_resume true to go on, or choose another --output_dir")
        if not path:
            return

        # Its state, if it is of the same schedules and data.
        checkpoint = load_checkpoint(path)
        self._check_schedules(checkpoint, path)
        self.state.load_state_dict(checkpoint, path=path, new_settings=args.resume_new_sched)
        self.task.restored(checkpoint, path)
        progress = self.state.progress
        logger.info("resumed %s: epoch %d, step %d", path, progress.epoch, progress.step)

        # Newer ones would be taken for this run's by a later --auto_resume.
        place = progress.epoch, checkpoint.get("step", 0)
        newer = [file for where, file in existing if where > place and not file.samefile(path)]
        if newer and args.resume and args.save_ckpt:
            newest = f"{args.output_dir} holds checkpoints newer than --resume {path} ({newer[0].name})"
            raise ValueError(f"{newest}: move them away, or choose another --output_dir")

    def _check_schedules(self, checkpoint: Mapping[str, Any], path: str | Path) -> None:
        """A resumed run keeps its schedules unless --resume_new_sched says otherwise, and always its optimizer."""
        old = networks.read_record(checkpoint, path).arguments
        if old.get("opt", self.args.opt) != self.args.opt:
            other = f"--opt {self.args.opt} cannot go on with the state of --opt {old['opt']} in {path}"
            raise ValueError(f"{other}: leave it, or begin anew with --finetune")
        for flag in SCHEDULE_FLAGS if not self.args.resume_new_sched else ():
            if hasattr(self.args, flag) and flag in old and old[flag] != getattr(self.args, flag):
                other = f"--{flag} {getattr(self.args, flag)}, but {path} was trained with {old[flag]}"
                raise ValueError(f"{other}: add --resume_new_sched to change it")

    def open_logs(self) -> None:
        """Open the sinks at the place where the state is; what an earlier run logged after it goes."""
        args, progress = self.args, self.state.progress
        self.step_sinks, self.epoch_sinks, self.wandb = logs.Sinks(), logs.Sinks(), None
        if not self.state.world.is_main:
            return
        # The console and the folder. CSV and JSON lines are cut to the place where the run goes on.
        labels = ("step", "epoch")
        sinks: dict[str, list[logs.Sink]] = {label: [logs.ConsoleSink(label)] for label in labels}
        if args.output_dir:
            folder = Path(args.output_dir)
            save_args(args, folder / "args.yaml")
            csv = logs.CsvSink(folder / "summary.csv", progress.epoch)
            sinks["epoch"] += [csv, curves.CurvesSink(folder / "curves.png", csv, self.task.panels)]
            next_step = progress.epoch * self.state.steps_per_epoch + progress.step + 1
            sinks["step"].append(logs.JsonLinesSink(folder / "log.jsonl", next_step))
        else:
            logger.warning("without --output_dir nothing of this run is kept: no checkpoint, no curve, no log")
        # Where others look: TensorBoard and Weights & Biases.
        events = args.log_dir or (Path(args.output_dir) / "tensorboard" if args.output_dir else None)
        if events:
            for label in labels:
                sinks[label].append(logs.TensorBoardSink(Path(events), label))
        if args.enable_wandb:
            try:
                import wandb
            except ImportError:
                raise ValueError("--enable_wandb true needs the package wandb: pip install wandb") from None
            self.wandb = wandb.init(
                project=args.wandb_project, name=args.wandb_name, config=vars(args), dir=args.output_dir
            )
            for label in labels:
                sinks[label].append(logs.WandbSink(self.wandb, label))
        self.step_sinks, self.epoch_sinks = logs.Sinks(*sinks["step"]), logs.Sinks(*sinks["epoch"])

    def row(self) -> dict[str, float]:
        """What the epoch's row says of training: the meter's averages over all ranks, and where the schedules are."""
        state, task, world = self.state, self.task, self.state.world
        sums = dict(zip(state.meter.names, world.sum(state.meter.sums.clone()).tolist(), strict=True))
        lr, weight_decay = task.schedule(state.progress.updates)
        row = {**task.objective.averages(sums), "lr": lr, "weight_decay": weight_decay}
        if task.slope is not None:
            row["act_learn"] = task.slope(state.progress.epoch)
        broken = broken_count(world, task.loader)
        return row | ({"broken_images": broken} if broken else {})

    def leave(self, stop: utils.StopRequest) -> None:
        """End after a signal; the state has been saved."""
        kept, progress = "no checkpoints, nothing saved", self.state.progress
        if self.checkpoints is not None and self.args.save_ckpt:
            kept = "the state is saved, --auto_resume true goes on"
            if not self.task.loader.resumable:
                kept = "--auto_resume true goes on from the last whole epoch, since the data are a stream"
        logger.warning("stopped by a signal in epoch %d, step %d: %s", progress.epoch, progress.step, kept)
        self.step_sinks.close()
        self.epoch_sinks.close()
        raise SystemExit(max(self.state.world.gather(stop.exit_code)))

    def close(self) -> None:
        """End after the last epoch."""
        if self.args.wandb_ckpt and self.wandb is not None:
            self.wandb.save(str(self.checkpoints.folder / "checkpoint-last.pth"), policy="now")
        self.step_sinks.close()
        self.epoch_sinks.close()
