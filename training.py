"""A training run: its state, checkpoints, schedules and logs; what every entry point that trains shares.

An entry point subclasses `Run` with its data, network, loss and evaluation, and starts with `launch`. Like `main.py`,
this file sees the arguments of the command as a whole.
"""

import argparse
import copy
import logging
import re
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

import utils
from engine import FiniteGuard, NonFiniteError, Objective, Precision, Progress, train_one_epoch
from loading.processes import Loading
from optim_factory import build_optimizer, set_hyperparameters
from options import plain_args, save_args
from records import curves, logs
from records.checkpoints import CheckpointError, CheckpointFolder, checkpoint_weights, load_checkpoint, load_weights
from records.files import first_line, one_line

logger = logging.getLogger(__name__)

GROUP_SETTINGS = ("betas", "eps", "momentum", "weight_decay", "lr_scale")  # of an optimizer's parameter group


def build_precision(args: argparse.Namespace, device: torch.device) -> Precision:
    names = {"bf16": torch.bfloat16, "fp16": torch.float16}
    default = "fp16" if device.type == "cuda" else "bf16"
    dtype = names[args.amp_dtype or default] if args.use_amp else None
    return Precision(device, dtype, args.channels_last)


def layout_of(args: argparse.Namespace) -> torch.memory_format:
    return torch.channels_last if args.channels_last else torch.contiguous_format


def broken_count(world: utils.World, loader) -> int:
    """How many images of a loader could not be read, over all ranks."""
    return len(set().union(*world.gather(loader.broken)))


class EvaluationStopped(Exception):
    """A signal came during the evaluation. The state is saved, and a run that goes on begins the evaluation again."""


def until_stopped(batches: Iterable[Any], world: utils.World, stop: utils.StopRequest | None) -> Iterator[Any]:
    """`batches`, up to a signal; then all ranks meet.

    Raises:
        EvaluationStopped: on all ranks, after the last batch, if any of them received a signal that `stop` remembers.
    """
    for batch in batches:
        if stop is not None and stop.received is not None:
            break
        yield batch
    meet(world, stop)


def meet(world: utils.World, stop: utils.StopRequest | None) -> None:
    """The end of `until_stopped`, for a rank that has no batches."""
    if world.any(stop is not None and stop.received is not None):
        raise EvaluationStopped


class Run(ABC):
    """The state of a run, and what is done with it between steps and epochs.

    A subclass says in `build_data` what `loader` is, whose `remaining_batches`, `set_epoch(epoch, start_sample=)`,
    `resumable` and `broken` the run relies on.
    """

    panels = curves.CURVES  # of curves.png
    # What a resumed run keeps; --resume_new_sched lets all but the optimizer's kind change.
    schedule_flags: tuple[str, ...] = (
        "epochs", "lr", "warmup_steps", "weight_decay", "opt", "update_freq", "opt_betas", "opt_eps", "momentum",
        "layer_decay",
    )  # fmt: skip

    def __init__(self, args: argparse.Namespace, world: utils.World, stop: utils.StopRequest):
        self.args, self.world, self.stop = args, world, stop
        if world.device.type == "cpu":  # a step's activations are larger than what glibc keeps: a fifth of its time
            utils.keep_freed_memory()
        self.precision = build_precision(args, world.device)
        self.build_data()
        if args.save_ckpt_steps and not self.loader.resumable:
            raise ValueError(
                f"--save_ckpt_steps {args.save_ckpt_steps}: {args.data_set} is a stream, which cannot be resumed in "
                "the middle of an epoch; leave it out"
            )
        self.steps_per_epoch = -(-len(self.loader) // args.update_freq)
        utils.seed_everything(args.seed)  # the same on all ranks, so that the initial weights are
        self.model = self.build_model()
        self.emas = self.build_emas()
        self.optimizer = self.build_optimizer()
        self.build_schedules()
        self.scaler = self.precision.scaler()
        self.progress = Progress(epoch=args.start_epoch, updates=args.start_epoch * self.steps_per_epoch)
        self.meter = self.build_meter()
        self.best: dict[str, float] = {}  # by name of the checkpoint that is the best, its score
        utils.seed_everything(args.seed + world.rank)  # dropout and mixup differ between ranks
        self.checkpoints = CheckpointFolder(args.output_dir, args.save_ckpt_num) if args.output_dir else None
        self.restore()
        asked = args.resume_new_sched if args.resume else not args.auto_resume  # a finished run may be called again
        if asked and self.progress.epoch >= self.last_epoch:
            raise ValueError(
                f"the run would begin with epoch {self.progress.epoch} and end before epoch {self.last_epoch}: raise "
                "--epochs"
            )
        self.wrap()
        self.step_sinks, self.epoch_sinks = self.build_sinks()

    # what a subclass brings

    @abstractmethod
    def build_data(self) -> None:
        """Set `loader`, of this rank's batches, and whatever evaluation needs."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The network, on its device, initialized from the current seed or from the weights asked for."""

    @abstractmethod
    def count_warmup_steps(self) -> int:
        """Length of the warm-up in optimizer steps."""

    @abstractmethod
    def schedule(self, updates: int) -> tuple[float, float]:
        """Learning rate and weight decay after so many optimizer steps."""

    @abstractmethod
    def build_meter(self) -> logs.SumMeter:
        """The sums of an epoch; `loss` and `count` are two of them."""

    @abstractmethod
    def objective(self) -> Objective:
        """The loss of a batch, asked for at the beginning of an epoch."""

    @abstractmethod
    def evaluate(self) -> dict[str, float] | None:
        """The metrics of the networks on the validation data, which rank 0 has to know; None without such data.

        May raise EvaluationStopped, on all ranks, if `stop` was received.
        """

    @abstractmethod
    def scores(self, found: dict[str, float]) -> dict[str, float]:
        """From the metrics that `evaluate` found, how good a checkpoint of each name (`best`, ...) would be."""

    def averages(self, sums: dict[str, float]) -> dict[str, float]:
        """What the epoch's row says of the training data, from the meter's sums over all ranks."""
        return {"train_loss": sums["loss"] / sums["count"]}

    def conditions(self) -> dict[str, float]:
        """What else the epoch's row holds: the state of schedules of the subclass's own."""
        return {}

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint holds beyond the state kept here."""
        return {}

    def load_extra_state(self, checkpoint: dict[str, Any]) -> None:  # noqa: B027  a subclass may have none
        """Take `extra_state` back; a published checkpoint may lack it."""

    def begin_epoch(self) -> None:  # noqa: B027  a subclass may have nothing of the kind
        """Set what is constant within an epoch."""

    # set-up

    def place(self, model: nn.Module) -> nn.Module:
        """A network on the device in its memory format, with the BatchNorms asked for."""
        model = model.to(self.world.device, memory_format=layout_of(self.args))
        if self.args.sync_bn:
            if self.world.device.type != "cuda":
                raise ValueError("--sync_bn true works on GPUs only; leave it out with --device cpu")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model

    def loading(self) -> Loading:
        """How this rank's training batches are loaded."""
        args, world = self.args, self.world
        return Loading(
            args.batch_size,
            rank=world.rank,
            world_size=world.size,
            seed=args.seed,
            num_workers=args.num_workers,
            pin_memory=args.pin_mem and world.device.type == "cuda",
        )

    def build_emas(self) -> list[ModelEmaV3]:
        args = self.args
        device = "cpu" if args.model_ema_force_cpu else None
        return [
            ModelEmaV3(self.model, decay=decay, device=device)
            for decay in (args.model_ema_decay if args.model_ema else [])
        ]

    def build_optimizer(self) -> torch.optim.Optimizer:
        args = self.args
        return build_optimizer(
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

    def build_schedules(self) -> None:
        args = self.args
        self.total_steps = args.epochs * self.steps_per_epoch
        self.warmup_steps = self.count_warmup_steps()
        if self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"the warm-up ({self.warmup_steps} steps) leaves nothing of --epochs {args.epochs} "
                f"({self.total_steps} steps): lower "
                + " or ".join(f"--{flag}" for flag in self.schedule_flags if flag.startswith("warmup"))
            )
        self.last_epoch = min(args.epochs, args.early_stop_epochs or args.epochs)

    def wrap(self) -> None:
        """Distribute; the state above stays that of the plain network."""
        self.guard = FiniteGuard(self.model, rank=self.world.rank, world_size=self.world.size)
        self.wrapped = self.model
        if self.world.distributed:
            devices = [self.world.device] if self.world.device.type == "cuda" else None
            self.wrapped = nn.parallel.DistributedDataParallel(self.model, device_ids=devices)

    def build_sinks(self) -> tuple[logs.Sinks, logs.Sinks]:
        """What takes the numbers of a step, and of an epoch; nothing on ranks other than 0."""
        args = self.args
        self.wandb = None
        if not self.world.is_main:
            return logs.Sinks(), logs.Sinks()
        step_sinks: list[logs.Sink] = [logs.ConsoleSink("step")]
        epoch_sinks: list[logs.Sink] = [logs.ConsoleSink("epoch")]
        start_step = self.progress.epoch * self.steps_per_epoch + self.progress.step
        if args.output_dir:
            folder = Path(args.output_dir)
            save_args(args, folder / "args.yaml")
            csv = logs.CsvSink(folder / "summary.csv", self.progress.epoch)
            epoch_sinks += [csv, curves.CurvesSink(folder / "curves.png", csv, self.panels)]
            step_sinks.append(logs.JsonLinesSink(folder / "log.jsonl", "step", start_step + 1))
        events = args.log_dir or (Path(args.output_dir) / "tensorboard" if args.output_dir else None)
        if events:
            step_sinks.append(logs.TensorBoardSink(Path(events), "step"))
            epoch_sinks.append(logs.TensorBoardSink(Path(events), "epoch"))
        if args.enable_wandb:
            try:
                import wandb
            except ImportError:
                raise ValueError("--enable_wandb true needs the package wandb: pip install wandb") from None
            self.wandb = wandb.init(project="vanillanet", config=vars(args), dir=args.output_dir)
            step_sinks.append(logs.WandbSink(self.wandb, "step"))
            epoch_sinks.append(logs.WandbSink(self.wandb, "epoch"))
        return logs.Sinks(*step_sinks), logs.Sinks(*epoch_sinks)

    # checkpoints

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
            **self.extra_state(),
            "best": dict(self.best),
            "ranks": self.world.gather(rank_state),
            "args": plain_args(self.args),
        }

    def save(self, *, finished_epoch: bool, names: Sequence[str] = ()) -> None:
        """Save if there is a folder to save to; all ranks call it, rank 0 writes, and all learn of a failure.

        In the middle of an epoch nothing is saved of a run on a stream, which could not go on there.
        """
        if self.checkpoints is None or not self.args.save_ckpt or not (finished_epoch or self.loader.resumable):
            return
        self.guard.check()
        checkpoint = self.snapshot(finished_epoch=finished_epoch)
        epoch, step = (self.progress.epoch + 1, 0) if finished_epoch else (self.progress.epoch, self.progress.step)
        self.world.from_main(lambda: self.checkpoints.save(checkpoint, epoch=epoch, step=step, names=names))

    def restore(self) -> None:
        """Go on from --resume or, with --auto_resume true, from the newest valid checkpoint of the output folder."""
        args = self.args
        path, existing = args.resume, []
        if self.checkpoints is not None:
            existing = self.checkpoints.places()
            self.world.from_main(self.checkpoints.remove_leftovers)
            if args.auto_resume and not path:
                path = self.world.from_main(self.checkpoints.newest_valid)
            elif existing and not path and args.save_ckpt:
                raise ValueError(
                    f"{args.output_dir} holds checkpoints of an earlier run ({existing[0][1].name}): "
                    "add --auto_resume true to go on with it, or choose another --output_dir"
                )
        if path:
            checkpoint = load_checkpoint(path)
            self.load(checkpoint, path)
            place = self.progress.epoch, checkpoint.get("step", 0)
            newer = [file for where, file in existing if where > place] if args.resume and args.save_ckpt else []
            if newer:
                raise ValueError(
                    f"{args.output_dir} holds checkpoints newer than --resume {path} ({newer[0].name}), with which "
                    "this run's would be mixed up: move them away, or choose another --output_dir"
                )

    def load(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        self.check_schedules(checkpoint, path)
        emas = list(zip(self.ema_names(), self.emas, strict=True))
        absent = [key for key in ("model", "optimizer", "epoch", *(name for name, _ in emas)) if key not in checkpoint]
        if absent:
            raise CheckpointError(
                f"cannot resume from {path}: it has no {', '.join(absent)}; use --finetune for weights"
            )
        load_weights(self.model, checkpoint_weights(checkpoint, key="model", path=path), path=path)
        for name, ema in emas:
            load_weights(ema.module, checkpoint_weights(checkpoint, key=name, path=path), path=path)
        own = [{key: group[key] for key in GROUP_SETTINGS if key in group} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"cannot resume from {path}: its optimizer differs ({error})") from None
        if self.args.resume_new_sched:
            for group, settings in zip(self.optimizer.param_groups, own, strict=True):
                group.update(settings)
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
        self.load_extra_state(checkpoint)
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
        """A resumed run keeps its schedules unless --resume_new_sched says otherwise, and always its optimizer."""
        old = checkpoint.get("args")
        old = vars(old) if isinstance(old, argparse.Namespace) else old or {}
        if old.get("opt", self.args.opt) != self.args.opt:
            raise ValueError(
                f"--opt {self.args.opt} cannot go on with the state of --opt {old['opt']} in {path}: leave it, or "
                "begin anew with --finetune"
            )
        for flag in self.schedule_flags:
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
        self.begin_epoch()
        self.loader.set_epoch(progress.epoch, start_sample=progress.samples)
        remaining = self.loader.remaining_batches
        batches = logs.progress(
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
            objective=self.objective(),
            optimizer=self.optimizer,
            precision=self.precision,
            scaler=self.scaler,
            guard=self.guard,
            progress=progress,
            meter=self.meter,
            num_batches=remaining,
            set_schedules=lambda updates: set_hyperparameters(self.optimizer, *self.schedule(updates)),
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
        sums = dict(zip(self.meter.names, world.sum(self.meter.sums.clone()).tolist(), strict=True))
        lr, weight_decay = self.schedule(self.progress.updates)
        row = {**self.averages(sums), "lr": lr, "weight_decay": weight_decay, **self.conditions()}
        broken = broken_count(world, self.loader)
        if broken:
            row["broken_images"] = broken
        due = epoch % args.test_freq == 0 or epoch >= args.test_epoch or epoch + 1 == self.last_epoch
        try:
            found = self.world.gather(self.evaluate() if due else None)[0]
        except EvaluationStopped:
            self.save(finished_epoch=False)
            self.leave()
        names = []
        for name, score in (self.scores(found) if found else {}).items():
            if score > self.best.get(name, -1.0):
                self.best[name] = score
                names.append(name)
        return row | (found or {}), names

    def ema_prefixes(self) -> list[str]:
        """What the averages' metrics begin with: the first `ema`, further ones with their decay."""
        return ["ema" if i == 0 else f"ema_{ema.decay}" for i, ema in enumerate(self.emas)]

    def ema_scores(self, found: dict[str, float], metric: str) -> dict[str, float]:
        """By name of the checkpoint, which is that of the average: `best-ema`, `best-ema-0.99`."""
        scores = {f"best-{prefix}".replace("_", "-"): f"{prefix}_{metric}" for prefix in self.ema_prefixes()}
        return {name: found[column] for name, column in scores.items() if column in found}

    def networks_to_evaluate(self) -> Iterator[tuple[str, nn.Module]]:
        """The network, as `test`, and with --model_ema_eval its averages, each with the prefix of its metrics."""
        yield "test", self.model
        for prefix, ema in zip(self.ema_prefixes(), self.emas, strict=True) if self.args.model_ema_eval else ():
            moved = self.args.model_ema_force_cpu
            yield prefix, copy.deepcopy(ema.module).to(self.world.device) if moved else ema.module

    def leave(self) -> None:
        """End after a signal; the state has been saved."""
        kept = "no checkpoints, nothing saved"
        if self.checkpoints is not None and self.args.save_ckpt:
            kept = "the state is saved, --auto_resume true goes on"
            if not self.loader.resumable:
                kept = "--auto_resume true goes on from the last whole epoch, since the data are a stream"
        logger.warning("stopped by a signal in epoch %d, step %d: %s", self.progress.epoch, self.progress.step, kept)
        self.close()
        raise SystemExit(max(self.world.gather(self.stop.exit_code)))

    def close(self) -> None:
        self.step_sinks.close()
        self.epoch_sinks.close()


def _explained(error: BaseException) -> str | None:
    """One line for the user on what went wrong in the machine and what to do; None for a mistake of ours."""
    if isinstance(error, NonFiniteError):
        return str(error)
    if re.search(r"DataLoader worker \(pid", str(error)):
        worker = first_line(error).rstrip(" .")
        return (
            f"{worker}. Most often the memory is full: lower --num_workers and start again, a training run with "
            "--auto_resume true"
        )
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory: lower --batch_size (and raise --update_freq by as much), the image size or --num_workers"
    if utils.lost_contact(error):
        first = first_line(error).split(". ")[0]
        cause = re.sub(r"^\[\S+:\d+\] ", "", first)  # without the line of gloo's source
        return (
            f"another process of the run has ended or cannot be reached ({cause}). Look at what it wrote last, then "
            "start all of them again, a training run with --auto_resume true"
        )
    return None


def _last_line(error: BaseException) -> str:
    """The message; of an error in a loader process, which brings its traceback along, the last line of that."""
    lines = str(error).strip().splitlines()
    return lines[-1] if any("Original Traceback" in line for line in lines) else str(error)


def launch(
    prog: str,
    args: argparse.Namespace,
    body: Callable[[utils.World], None],
    *,
    output_dir: str | None = None,
) -> None:
    """Run `body` among the processes of the command, and turn what the user can mend into a line and an exit code.

    Exit codes: 2 for a wrong argument or a file that cannot be read or written, 130 for SIGINT where no checkpoint can
    be saved, and 1 for a loss or gradient that is not finite, too little memory, or a process that was lost.

    Args:
        output_dir: a folder that `body` must have for itself.
    """
    world = utils.World(0, 1, torch.device("cpu"))
    failure = None
    held = ExitStack()

    def lock() -> None:
        held.callback(utils.FolderLock(output_dir).release)

    try:
        world = utils.init_world(
            args.device,
            dist_url=args.dist_url,
            on_itp=args.dist_on_itp,
            world_size=args.world_size,
            local_rank=args.local_rank,
            timeout=timedelta(seconds=args.dist_timeout),
        )
        utils.setup_logging(world.rank)
        for note in args.notes:
            logger.info("%s", note)
        if output_dir:
            world.from_main(lock)
        body(world)
    except (ValueError, OSError) as error:
        failure = 2, _last_line(error)
    except (RuntimeError, MemoryError) as error:
        failure = 1, _explained(error)
        if failure[1] is None:
            raise
    except KeyboardInterrupt:
        failure = 128 + signal.SIGINT, "interrupted"
    finally:
        # Past the except clauses, so that no traceback holds on to the networks of a distributed run any more.
        utils.close_world(world)
        held.close()
    if failure:
        code, message = failure
        sys.stderr.write(f"{prog}: error: {one_line(message)}\n")
        raise SystemExit(code)
