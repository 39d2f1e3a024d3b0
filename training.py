"""A training run: the loop over epochs, which all commands that train share, and the files that a run writes.

A command opens its data and network, builds a `TrainState` and a `Task`, and calls `fit`. Like the commands, this file
takes the arguments as a whole.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
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
from records.files import first_line

logger = logging.getLogger(__name__)

# The flags that a resumed run must not change, if its command has them; --resume_new_sched allows all except --opt.
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
    """Return the number of images that the loader could not read, over all ranks."""
    return len(set().union(*world.gather(loader.broken)))


class EvaluationStopped(Exception):
    """A signal arrived during the evaluation. The run saves its state; when resumed, it repeats the evaluation."""


def until_stopped(loader: Any, world: utils.World, stop: utils.StopRequest | None, *, name: str) -> Iterator[Any]:
    """Yield the batches of an evaluation until a signal arrives, behind a progress bar on rank 0 that shows `name`.

    Raises:
        EvaluationStopped: on all ranks, after their last batches, if `stop` has received a signal on any of them.
    """
    for batch in logs.progress(loader, description=f"eval {name}", total=len(loader), enabled=world.is_main):
        if stop is not None and stop.received is not None:
            break
        yield batch
    meet(world, stop)


def meet(world: utils.World, stop: utils.StopRequest | None) -> None:
    """Wait for all ranks, and raise as `until_stopped` does at its end; a rank without batches calls this directly."""
    if world.any(stop is not None and stop.received is not None):
        raise EvaluationStopped


# -- what a command provides


@dataclass(frozen=True)
class Task:
    """What a run trains: everything that differs between the commands that train.

    Attributes:
        loader: this rank's training batches, with the interface of `loading.loaders.TrainLoader`.
        evaluate: takes networks by prefix and returns their metrics, named with the prefix. Only rank 0's are used. May
            raise EvaluationStopped, on all ranks. None without validation data.
        score: the metric that decides which checkpoint is best, without its prefix; higher is better.
        describe: returns what a checkpoint holds besides the state.
        restored: called with a checkpoint that is resumed and its path; raises ValueError if it is of other data.
        slope: returns lambda of an epoch; None without deep training.
        panels: the panels of curves.png.
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
    """Return the settings with which this rank loads its batches."""
    return Loading(
        rank=world.rank,
        world_size=world.size,
        pin_memory=args.pin_mem and world.device.type == "cuda",
        device=world.device,
        skip_broken=args.skip_broken_eval,
        **args.pick("batch_size", "seed", "num_workers"),
    )


def place(args: Arguments, model: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to the device and its memory format, and apply --grad_checkpointing and --sync_bn."""
    model = model.to(device, memory_format=layout_of(args))
    set_grad_checkpointing(getattr(model, "network", model), args.grad_checkpointing)  # a detector wraps its network
    if args.sync_bn:
        model = convert_sync_batchnorm(model)  # torch's would drop the activations in timm's BatchNorms
    return model


def build_state(
    args: Arguments, world: utils.World, model: nn.Module, *, loader: Any, objective: Objective, classes: int
) -> TrainState:
    """Build the initial state of a run of `model`, which is already on its device, and log the size of the run."""
    # The optimizer, which may not take every setting, and the averages.
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
    steps = -(-len(loader) // args.update_freq)  # the last step of an epoch may have fewer batches
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
    """Return `warmup_steps`. If they fill the whole run, return 0 if a recipe set `flag`, else raise ValueError."""
    if warmup_steps < total_steps:
        return warmup_steps
    message = f"the warm-up ({warmup_steps} steps) leaves nothing of --epochs {args.epochs}: lower --{flag}"
    if flag not in args.given:
        raise ValueError(message)
    args.moot(flag, message)
    return 0


# -- the loop


def fit(args: Arguments, state: TrainState, task: Task, stop: utils.StopRequest) -> None:
    """Train up to the last epoch. Each epoch is trained, saved, evaluated, logged, and saved again.

    Args:
        state: the state of a new run, into which --resume and --auto_resume load that of an earlier run.
        stop: checked after each step. After a signal, the state is saved and the process ends with its exit code.
    """
    world, progress = state.world, state.progress
    if world.device.type == "cpu":  # glibc would return freed activations to the system, a fifth of a step's time
        utils.keep_freed_memory()
    last_epoch = min(args.epochs, args.early_stop_epochs or args.epochs)
    utils.seed_everything(args.seed + world.rank)  # dropout and mixup differ between ranks
    run = RunFolder(args, state, task)
    run.restore()
    asked = args.resume_new_sched if args.resume else not args.auto_resume  # restarting a finished run is no error
    if asked and progress.epoch >= last_epoch:
        raise ValueError(f"the run would begin with epoch {progress.epoch} of {last_epoch}: raise --epochs")
    run.open_logs()

    while progress.epoch < last_epoch:
        epoch, last = progress.epoch, progress.epoch + 1 == last_epoch
        # Lambda is constant within an epoch, for the network and its averages alike.
        if task.slope is not None:
            networks.set_slope(task.slope(epoch), state.model, *(average.module for average in state.averages.values()))

        # Train the rest of the epoch. Nothing is left of it if the earlier run ended during the evaluation.
        finished = run.trained() or _train_epoch(args, state, task, run, stop)
        if not finished or world.any(stop.received is not None):
            run.save(trained=finished)
            run.leave(stop)
        state.guard.check()
        world.sync_buffers(state.model, *(average.module for average in state.averages.values()))
        row, names = run.row(), []

        # Evaluate. Save the epoch first, because a broken validation image must not cost it.
        if task.evaluate is not None and (epoch % args.test_freq == 0 or epoch >= args.test_epoch or last):
            run.save(trained=True)
            try:
                found = world.gather(task.evaluate(_evaluated(args, state)))[0]
            except EvaluationStopped:
                run.leave(stop)
            row |= found
            names = _improved(state, found, task.score)

        # Log and save. Log first: a run that is killed in between repeats the epoch and replaces its row.
        run.epoch_sinks.log(row, epoch)
        progress.next_epoch()
        state.meter.sums.zero_()
        stopped = world.any(stop.received is not None)
        if names or last or stopped or progress.epoch % args.save_ckpt_freq == 0:
            run.save(names=names)
        if stopped:
            run.leave(stop)
    run.close()


def _train_epoch(args: Arguments, state: TrainState, task: Task, run: "RunFolder", stop: utils.StopRequest) -> bool:
    """Train to the end of the epoch or until a signal. Returns whether the epoch was finished."""
    # The remaining batches of the epoch: all of them, unless the run resumes in the middle of it.
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

    # After each step: a signal ends the epoch, and --save_ckpt_steps saves in the middle of it.
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
        log=logs.StepLog(
            args.log_freq,
            lambda step, values: run.step_sinks.log({"epoch": progress.epoch, **values}, first_step + step),
        ),
        after_step=after_step,
    )


def _evaluated(args: Arguments, state: TrainState) -> dict[str, nn.Module]:
    """Return the networks to evaluate by metric prefix: `test`, and with --model_ema_eval the averages."""
    found = {"test": state.model}
    for key, average in state.averages.items() if args.model_ema_eval else ():
        moved = copy.deepcopy(average.module).to(state.world.device) if args.model_ema_force_cpu else average.module
        found[key.removeprefix("model_")] = moved
    return found


def _improved(state: TrainState, found: Mapping[str, float], score: str) -> list[str]:
    """Update `state.best` and return the names that improved: `best`, and for averages `best-ema`, `best-ema-0.99`."""
    names = {"best": "test"} | {
        f"best-{prefix}".replace("_", "-"): prefix for prefix in (key.removeprefix("model_") for key in state.averages)
    }
    scores = {name: found.get(f"{prefix}_{score}", -1.0) for name, prefix in names.items()}
    better = {name: value for name, value in scores.items() if value > state.best.get(name, -1.0)}
    state.best.update(better)
    return list(better)


# -- the folder


class RunFolder:
    """What a run writes: checkpoints, curves and logs in --output_dir, if it is given, and logs in other places.

    Attributes:
        step_sinks, epoch_sinks: take the numbers of each step and each epoch; they do nothing on ranks other than 0.
    """

    def __init__(self, args: Arguments, state: TrainState, task: Task):
        self.args, self.state, self.task = args, state, task
        self.checkpoints = CheckpointFolder(args.output_dir, args.save_ckpt_num) if args.output_dir else None
        self.resumed_at = 0  # steps of the whole run before it was resumed, as that run counted them
        if args.save_ckpt_steps and not task.loader.resumable:
            stream = f"{args.data_set} is a stream, which cannot be resumed in the middle of an epoch; leave it out"
            args.moot("save_ckpt_steps", f"--save_ckpt_steps {args.save_ckpt_steps}: {stream}")

    def save(self, *, trained: bool = False, names: Sequence[str] = ()) -> None:
        """Save a checkpoint if the run keeps any. All ranks must call this: rank 0 writes, and a failure raises on all.

        A run on a stream saves nothing in the middle of an epoch, because it could not resume there.

        Args:
            trained: the epoch is trained but not yet evaluated; the file already gets the name of the finished epoch.
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

    def trained(self) -> bool:
        """Whether nothing is left of the epoch: by its images, since a step of another run may be of more or fewer."""
        progress, loader = self.state.progress, self.task.loader
        if not loader.resumable:
            return progress.step >= self.state.steps_per_epoch
        loader.set_epoch(progress.epoch, start_sample=progress.samples)
        return loader.remaining_batches == 0

    def restore(self) -> None:
        """Resume from --resume or, with --auto_resume true, from the newest valid checkpoint in the folder."""
        args, world = self.args, self.state.world

        # Choose the checkpoint. A folder that already holds checkpoints is continued only on request.
        path, existing = args.resume, []
        if self.checkpoints is not None:
            existing = self.checkpoints.places()
            world.from_main(self.checkpoints.remove_leftovers)
            if args.auto_resume and not path:
                path = world.from_main(self.checkpoints.newest_valid)
            elif not path and (earlier := self.checkpoints.all()):
                earlier = f"{args.output_dir} holds checkpoints of an earlier run ({earlier[0].name})"
                raise ValueError(f"{earlier}: add --auto_resume true to go on, or choose another --output_dir")
        if not path:
            return

        # Load the checkpoint's state if its schedules and data are those of this run.
        checkpoint = load_checkpoint(path)
        self._check_schedules(checkpoint, path)
        self.state.load_state_dict(checkpoint, path=path, new_settings=args.resume_new_sched)
        self.task.restored(checkpoint, path)
        progress, step = self.state.progress, checkpoint.get("step", 0)
        self.resumed_at = progress.epoch * checkpoint.get("steps_per_epoch", self.state.steps_per_epoch) + step
        logger.info("resumed %s: epoch %d, step %d", path, progress.epoch, progress.step)

        # A later --auto_resume would mistake newer checkpoints in the folder for this run's.
        place = progress.epoch, step
        newer = [file for where, file in existing if where > place and not file.samefile(path)]
        if newer and args.resume and args.save_ckpt:
            newest = f"{args.output_dir} holds checkpoints newer than --resume {path} ({newer[0].name})"
            raise ValueError(f"{newest}: move them away, or choose another --output_dir")

        # Files of this epoch count the steps of the earlier run, which may have been larger or smaller.
        if progress.step != step and self.checkpoints is not None:
            ratio = self.state.steps_per_epoch / checkpoint["steps_per_epoch"]
            world.gather(None)  # until all ranks have looked at the files above
            world.from_main(lambda: self.checkpoints.renumber(progress.epoch, ratio, of=path))

    def _check_schedules(self, checkpoint: Mapping[str, Any], path: str | Path) -> None:
        """Raise ValueError if a resumed run changes --opt, or its schedules without --resume_new_sched."""
        old = networks.read_record(checkpoint, path).arguments
        if old.get("opt", self.args.opt) != self.args.opt:
            other = f"--opt {self.args.opt} cannot go on with the state of --opt {old['opt']} in {path}"
            raise ValueError(f"{other}: leave it, or begin anew with --finetune")
        own, theirs = self.args.model_ema_decay, old.get("model_ema_decay")
        theirs = [theirs] if isinstance(theirs, float) else theirs  # as other programs have it
        if self.state.averages and "model_ema" in checkpoint and theirs and list(theirs)[: len(own)] != own:
            other = (
                f"--model_ema_decay {' '.join(map(str, own))}, but {path} has averages of {' '.join(map(str, theirs))}"
            )
            raise ValueError(f"{other}: begin anew with --finetune")
        for flag in SCHEDULE_FLAGS if not self.args.resume_new_sched else ():
            if hasattr(self.args, flag) and flag in old and old[flag] != getattr(self.args, flag):
                other = f"--{flag} {getattr(self.args, flag)}, but {path} was trained with {old[flag]}"
                raise ValueError(f"{other}: add --resume_new_sched to change it")

    def open_logs(self) -> None:
        """Open the sinks at the state's place in the run, and drop what an earlier run logged after it."""
        args, progress = self.args, self.state.progress
        self.step_sinks, self.epoch_sinks, self.wandb = logs.Sinks(), logs.Sinks(), None
        if not self.state.world.is_main:
            return
        # The console and the folder, whose CSV and JSON Lines files are cut off where the run resumes.
        labels = ("step", "epoch")
        sinks: dict[str, list[logs.Sink]] = {label: [logs.ConsoleSink(label)] for label in labels}
        if args.output_dir:
            folder = Path(args.output_dir)
            save_args(args, folder / "args.yaml")
            csv = logs.CsvSink(folder / "summary.csv", progress.epoch)
            sinks["epoch"] += [csv, curves.CurvesSink(folder / "curves.png", csv, self.task.panels)]
            sinks["step"].append(logs.JsonLinesSink(folder / "log.jsonl", progress.epoch, self.resumed_at))
        else:
            log = "" if args.log_dir or args.enable_wandb else ", no log"
            logger.warning("without --output_dir this run keeps no checkpoint, no curve%s", log)
        # TensorBoard and Weights & Biases.
        events = args.log_dir or (Path(args.output_dir) / "tensorboard" if args.output_dir else None)
        if events:
            for label in labels:
                sinks[label].append(logs.TensorBoardSink(Path(events), label))
        if args.enable_wandb:
            try:
                import wandb
            except ImportError:
                raise ValueError("--enable_wandb true needs the package wandb: pip install wandb") from None
            try:
                self.wandb = wandb.init(
                    project=args.wandb_project, name=args.wandb_name, config=vars(args), dir=args.output_dir
                )
            except wandb.errors.Error as error:  # no account, for example
                raise ValueError(f"--enable_wandb true: wandb refuses: {first_line(error)}") from error
            for label in labels:
                sinks[label].append(logs.WandbSink(self.wandb, label))
        self.step_sinks, self.epoch_sinks = logs.Sinks(*sinks["step"]), logs.Sinks(*sinks["epoch"])

    def row(self) -> dict[str, float]:
        """Return the epoch's training columns: averages over all ranks, schedule values, and broken images, if any."""
        state, task, world = self.state, self.task, self.state.world
        sums = dict(zip(state.meter.names, world.sum(state.meter.sums.clone()).tolist(), strict=True))
        lr, weight_decay = task.schedule(state.progress.updates)
        row = {**task.objective.averages(sums), "lr": lr, "weight_decay": weight_decay}
        if task.slope is not None:
            row["act_learn"] = task.slope(state.progress.epoch)
        broken = broken_count(world, task.loader)
        return row | ({"broken_images": broken} if broken else {})

    def leave(self, stop: utils.StopRequest) -> None:
        """Close the logs and end the process after a signal; the caller has saved the state."""
        kept, progress = "no checkpoints, nothing saved", self.state.progress
        if self.checkpoints is not None and self.args.save_ckpt:
            kept = "the state is saved, --auto_resume true goes on"
            if not self.task.loader.resumable:
                kept = "--auto_resume true goes on from the last epoch that was saved, since the data are a stream"
        logger.warning("stopped by a signal in epoch %d, step %d: %s", progress.epoch, progress.step, kept)
        self.step_sinks.close()
        self.epoch_sinks.close()
        signals = [number for number in self.state.world.gather(stop.received) if number is not None]
        raise SystemExit(128 + max(signals))

    def close(self) -> None:
        """Close the logs after the last epoch; with --wandb_ckpt, upload the last checkpoint first."""
        if self.args.wandb_ckpt and self.wandb is not None:
            self.wandb.save(str(self.checkpoints.folder / "checkpoint-last.pth"), policy="now")
        self.step_sinks.close()
        self.epoch_sinks.close()
