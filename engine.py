"""One epoch of training, the state that it changes, and evaluation."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn

import utils
from optim_factory import set_hyperparameters
from records.checkpoints import CheckpointError, checkpoint_weights, load_weights, rescaled
from records.logs import StepLog, SumMeter
from utils import World

logger = logging.getLogger(__name__)

Schedule = Callable[[int], tuple[float, float]]  # optimizer steps taken -> learning rate, weight decay

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer types by their size in bytes


class NonFiniteError(utils.RunError):
    """Raised for a loss or gradient that is not finite. The parameters are as they were before that step."""


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Convert 16-bit results of autocast to float32; float64 stays as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def build_criterion(*, mixing: bool, smoothing: float, bce: bool, bce_target_thresh: float | None) -> nn.Module:
    """Return the training loss over (N, classes) logits.

    Args:
        mixing: targets are soft, (N, classes), and already smoothed, as mixup and cutmix return them.
        smoothing: label smoothing of hard targets, (N,).
        bce: use binary cross-entropy of each class instead of cross-entropy over the classes.
        bce_target_thresh: with `bce`, set targets above this threshold to 1 and the others to 0.
    """
    if bce:
        return BinaryCrossEntropy(smoothing=0.0 if mixing else smoothing, target_threshold=bce_target_thresh)
    if mixing:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing=smoothing) if smoothing > 0 else nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Precision:
    """Device, precision and memory format of the computation. All precisions share one code path.

    Args:
        device: the network's device.
        dtype: autocast's dtype; None computes in float32.
        layout: memory format of the images.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    layout: torch.memory_format = torch.contiguous_format

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """Return a gradient scaler for float16, which does nothing in the other precisions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def images(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(self.device, non_blocking=True, memory_format=self.layout)


@dataclass(frozen=True)
class Distiller:
    """Logit distillation (Hinton et al., 2015): part of the loss matches the teacher's softened class distribution.

    loss = (1 - alpha) hard + alpha tau^2 KL(softmax(teacher / tau) || softmax(student / tau)); tau^2 preserves the
    scale of the gradients.

    Args:
        teacher: network in eval mode, (N, 3, H, W) -> (N, classes); it sees the student's images, mixed or not.
        alpha: weight of the teacher's term, in [0, 1].
        tau: temperature.
        precision: the student's precision, in which the teacher runs as well.
    """

    teacher: nn.Module
    alpha: float
    tau: float
    precision: Precision

    def __call__(self, images: torch.Tensor, logits: torch.Tensor, hard: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), self.precision.autocast():
            wanted = self.teacher(images)  # (N, classes)
        soft = F.kl_div(
            F.log_softmax(logits / self.tau, dim=1),
            F.log_softmax(at_least_float32(wanted) / self.tau, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - self.alpha) * hard + self.alpha * self.tau**2 * soft


class FiniteGuard:
    """Keeps a non-finite loss or gradient on any rank from reaching the parameters, and stops all ranks together.

    On the CPU, the verdict is read before the optimizer steps. On a GPU, reading it would make the host wait for the
    device in every step. Instead, a bad step is undone on the device from a copy of the parameters, and the error is
    raised when the verdict is next read: at a logging step, before a save, or at the end of the epoch. torch's fused
    optimizers need no copy, because they skip the step themselves if their `found_inf` is set.

    Gradients are examined before they are averaged over the ranks, which would spread one rank's infinity to all ranks.

    Args:
        model: the network that the optimizer changes, unwrapped.
        world: the processes that stop together.
        deferred: read the verdict late; None defers it unless the network is on the CPU.
        fused: the optimizer, if it is one of torch's fused ones and no gradient scaler sets its `found_inf` already.
    """

    LOSS, GRADIENT = 1, 2

    def __init__(
        self,
        model: nn.Module,
        world: World,
        *,
        deferred: bool | None = None,
        fused: torch.optim.Optimizer | None = None,
    ):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.world = world
        self.deferred = self.device.type != "cpu" if deferred is None else deferred
        self.fused = fused if self.deferred else None
        undone = self.parameters if self.deferred and fused is None else []
        # Copy detached bits: copies of the parameters themselves would keep the graphs of all earlier steps alive.
        self.bits = [p.detach().view(BITS[p.element_size()]) for p in undone]
        self.backup = [torch.empty_like(bits) for bits in self.bits]
        self.verdict = torch.zeros(world.size, dtype=torch.int32, device=self.device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        self.local_gradient = torch.zeros((), dtype=torch.bool, device=self.device)
        if world.distributed:
            for parameter in self.parameters:
                parameter.register_hook(self._watch)

    def _watch(self, gradient: torch.Tensor) -> None:
        # Test the norm, as `examine` does for a single process: it takes one pass over the gradient, isfinite several.
        self.local_gradient |= ~torch.isfinite(torch.linalg.vector_norm(gradient))

    def examine(self, loss: torch.Tensor, grad_norm: torch.Tensor, *, step: int, scaled: bool) -> None:
        """Judge this step. Raises NonFiniteError at once unless the verdict is deferred.

        Args:
            loss: this rank's mean loss over the batches of the step.
            grad_norm: norm of the gradients after averaging over the ranks.
            scaled: a gradient scaler is on. It skips steps with non-finite gradients itself, so only the loss counts.
        """
        # This rank's verdict. A non-finite loss takes precedence, because it explains a non-finite gradient.
        code = torch.where(torch.isfinite(loss), 0, self.LOSS).to(torch.int32)
        if not scaled:
            bad_gradient = self.local_gradient if self.world.distributed else ~torch.isfinite(grad_norm)
            code = torch.where(bad_gradient & (code == 0), self.GRADIENT, code).to(torch.int32)
        # All ranks' verdicts. Keep the first bad one.
        codes = torch.zeros_like(self.verdict)
        codes[self.world.rank] = code
        codes = self.world.sum(codes)
        first = (self.bad_step < 0) & codes.any()
        self.verdict = torch.where(first, codes, self.verdict)
        self.bad_step = torch.where(first, step, self.bad_step)
        self.local_gradient.zero_()

        # Stop here, or prepare for an optimizer step that may have to be undone or skipped.
        if not self.deferred:
            self.check()
        elif self.fused is None:
            torch._foreach_copy_(self.backup, self.bits)
        else:
            self.fused.grad_scale, self.fused.found_inf = None, (self.bad_step >= 0).float()

    def undo_if_bad(self) -> None:
        """Undo the optimizer's step if this verdict or an earlier one was bad. Does nothing if there is no backup."""
        if self.backup:
            # As integers, a NaN times 0 is 0. Three kernels run over many tensors, instead of two for each tensor.
            good = (self.bad_step < 0).to(torch.int32)
            torch._foreach_mul_(self.bits, good)
            torch._foreach_mul_(self.backup, 1 - good)
            torch._foreach_add_(self.bits, self.backup)

    def check(self) -> None:
        """Read the verdict. Raises NonFiniteError, on all ranks, if it is bad."""
        step = int(self.bad_step)
        if step < 0:
            return
        kinds = {self.LOSS: "loss", self.GRADIENT: "gradient"}
        found = [f"{kinds[code]} on rank {rank}" for rank, code in enumerate(self.verdict.tolist()) if code]
        raise NonFiniteError(
            f"step {step}: non-finite {', '.join(found)}; stopped before the parameters changed. "
            "Lower --lr, set --clip_grad, or use --amp_dtype bf16 if this is float16"
        )


@dataclass
class Progress:
    """How far training has come. A checkpoint records all of it.

    Attributes:
        epoch: the current epoch, counted from 0.
        step: accumulation windows finished in this epoch, including skipped ones: the place in the data.
        updates: optimizer steps taken in the whole run: the place in the schedules.
        samples: images of this epoch trained on so far, over all ranks.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    samples: int = 0

    def next_epoch(self) -> None:
        self.epoch, self.step, self.samples = self.epoch + 1, 0, 0


class TrainState:
    """Everything that a run changes and a checkpoint saves.

    Args:
        model: the network on its device, unwrapped, as checkpoints, averages and evaluation use it.
        meter: this rank's sums of the epoch, named as in `Objective.sums`.
        scaler: gradient scaler, see `Precision.scaler`; None scales nothing.
        averages: moving averages of the weights, by their keys in a checkpoint.
        steps_per_epoch: accumulation windows per epoch.
        start_epoch: epoch with which a new run begins.
        broken: indices of the training images that could not be read; the loader adds to this set.
        world: the processes that share the run; None for this process alone.

    Attributes:
        network: the network that batches go through: the model, or DistributedDataParallel around it.
        best: the best score so far, by the name of the checkpoint with this score.
        start_slope: lambda of the network with which the run began.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        meter: SumMeter,
        scaler: torch.amp.GradScaler | None = None,
        averages: Mapping[str, ModelEmaV3] | None = None,
        steps_per_epoch: int = 1,
        start_epoch: int = 0,
        broken: set[int] | None = None,
        world: World | None = None,
    ):
        device = next(model.parameters()).device
        self.model, self.optimizer, self.meter = model, optimizer, meter
        self.scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
        self.averages = dict(averages or {})
        self.steps_per_epoch = steps_per_epoch
        self.broken = set() if broken is None else broken
        self.world = world or World(0, 1, device)
        self.progress = Progress(epoch=start_epoch, updates=start_epoch * steps_per_epoch)
        self.best: dict[str, float] = {}
        self.start_slope = 1.0
        skips = optimizer.defaults.get("fused") and not self.scaler.is_enabled()
        self.guard = FiniteGuard(model, self.world, fused=optimizer if skips else None)
        self.network = model
        if self.world.distributed:
            self.network = nn.parallel.DistributedDataParallel(
                model, device_ids=[device] if device.type == "cuda" else None
            )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on. This is a collective: every rank must call it.

        `epoch` is the last finished epoch or, if `step` is above 0, the epoch in which `step` steps have been taken.
        """
        progress = self.progress
        own = {
            "rng": utils.rng_state(self.world.device),
            "meter": self.meter.sums.cpu(),
            "broken": sorted(self.broken),
        }
        return {
            "model": self.model.state_dict(),
            **{key: average.module.state_dict() for key, average in self.averages.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": progress.epoch if progress.step else progress.epoch - 1,
            "step": progress.step,
            "samples": progress.samples,
            "updates": progress.updates,
            "steps_per_epoch": self.steps_per_epoch,
            "best": dict(self.best),
            "start_slope": self.start_slope,
            "ranks": self.world.gather(own),
        }

    def load_state_dict(self, checkpoint: Mapping[str, Any], *, path: str | Path, new_settings: bool = False) -> None:
        """Resume from one of our checkpoints, or from the published code's, which hold less.

        With a different number of processes, an epoch has a different number of steps; the place in the epoch is kept.

        Args:
            path: path of the checkpoint, for messages.
            new_settings: keep this run's optimizer settings instead of the checkpoint's.

        Raises:
            CheckpointError: something is missing or does not fit.
        """
        absent = [key for key in ("model", "optimizer", "epoch", *self.averages) if key not in checkpoint]
        if absent:
            raise CheckpointError(
                f"cannot resume from {path}: it has no {', '.join(absent)}; use --finetune for weights"
            )
        if not isinstance(checkpoint["epoch"], int):
            raise CheckpointError(f"cannot resume from {path}: its epoch is {checkpoint['epoch']!r}; use --finetune")
        if not isinstance(checkpoint["optimizer"], dict) or "param_groups" not in checkpoint["optimizer"]:
            raise CheckpointError(f"cannot resume from {path}: its optimizer has no state; use --finetune")
        networks = {"model": self.model, **{key: average.module for key, average in self.averages.items()}}
        for key, network in networks.items():
            load_weights(network, checkpoint_weights(checkpoint, key=key, path=path), path=path)
        self._load_optimizer(checkpoint["optimizer"], path=path, new_settings=new_settings)
        if checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])

        # The place in the run.
        step, progress = checkpoint.get("step", 0), self.progress
        progress.epoch = checkpoint["epoch"] + (0 if step else 1)
        progress.samples = checkpoint.get("samples", 0)
        old_steps = checkpoint.get("steps_per_epoch", self.steps_per_epoch)
        progress.updates = round(
            checkpoint.get("updates", progress.epoch * old_steps) * self.steps_per_epoch / old_steps
        )
        progress.step = rescaled(step, self.steps_per_epoch / old_steps)
        self.best.update(checkpoint.get("best", {}))
        self.start_slope = checkpoint.get("start_slope", self.start_slope)

        # The state that each process has for itself.
        ranks = checkpoint.get("ranks") or []
        self.broken.update(index for rank in ranks for index in rank["broken"])
        if len(ranks) == self.world.size:
            own = ranks[self.world.rank]
            utils.set_rng_state(own["rng"], self.world.device)
            self.meter.sums.copy_(own["meter"])
        elif ranks:
            logger.warning("%s is of %d process(es): random numbers are seeded anew", path, len(ranks))
            if self.world.is_main:
                self.meter.sums.copy_(sum(rank["meter"] for rank in ranks))

    def _load_optimizer(self, saved: Mapping[str, Any], *, path: str | Path, new_settings: bool) -> None:
        own = [{key: value for key, value in g.items() if key != "params"} for g in self.optimizer.param_groups]
        # `fused` is this run's choice, because a run that began on the CPU may be resumed on a GPU.
        fused = self.optimizer.defaults.get("fused")
        groups = [{**group, "fused": fused} if "fused" in group else group for group in saved["param_groups"]]
        try:
            self.optimizer.load_state_dict({**saved, "param_groups": groups})
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"cannot resume from {path}: its optimizer differs ({error}): begin anew with --finetune"
            ) from None
        renewed = ("betas", "eps", "momentum", "weight_decay", "lr_scale") if new_settings else ()
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            for key, value in settings.items():
                if key not in group or key in renewed:  # older versions had fewer settings
                    group[key] = value


class Objective(Protocol):
    """The loss of a training batch, and the sums for the training metrics.

    Attributes:
        sums: names of the sums that a call returns for the meter, among them `count`, the number of images.
    """

    sums: Sequence[str]

    def __call__(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor | float]]:
        """Return the loss, a differentiable scalar in float32 or wider, and the batch's sums by name."""
        ...

    def averages(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the training metrics of an epoch's row, from the sums over all batches."""
        ...


@dataclass(frozen=True)
class Classification:
    """The classification loss of images (N, 3, H, W) with class indices (N,).

    Args:
        criterion: loss of logits (N, classes) and targets, see `build_criterion`.
        precision: precision of the network; the loss is computed in float32 or wider.
        mixup: mixes a batch and makes its targets soft.
        distiller: adds a teacher's term to the loss.
    """

    criterion: nn.Module
    precision: Precision
    mixup: Mixup | None = None
    distiller: Distiller | None = None
    sums: ClassVar[Sequence[str]] = ("loss", "correct", "count")

    def averages(self, sums: Mapping[str, float]) -> dict[str, float]:
        averages = {"train_loss": sums["loss"] / sums["count"]}
        if self.mixup is None:  # with mixup, the batch is not trained on its labels
            averages["train_acc1"] = 100 * sums["correct"] / sums["count"]
        return averages

    def __call__(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]):
        images, targets = batch
        images = self.precision.images(images)
        labels = targets = targets.to(self.precision.device, non_blocking=True)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        with self.precision.autocast():
            logits = model(images)  # (N, 3, H, W) -> (N, classes)
        logits = at_least_float32(logits)
        loss = self.criterion(logits, targets)
        if self.distiller is not None:
            loss = self.distiller(images, logits, loss)
        return loss, {
            "loss": loss.detach() * len(labels),
            "correct": (logits.detach().argmax(1) == labels).sum(),
            "count": len(labels),
        }


def train_one_epoch(
    state: TrainState,
    batches: Iterable[Any],
    *,
    objective: Objective,
    schedule: Schedule,
    num_batches: int,
    log: StepLog,
    update_freq: int = 1,
    clip_grad: float | None = None,
    after_step: Callable[[], bool] = lambda: False,
) -> bool:
    """Train over `batches` to the end of the epoch, or until `after_step` asks to stop.

    The host waits for the device only at logging steps and in `after_step`, except that the gradient scaler for
    float16 waits in every step.

    Args:
        state: the run's state, changed in place.
        batches: the remaining batches of the epoch.
        num_batches: number of batches in `batches`.
        log: receives the metrics of a logging step.
        update_freq: number of batches to accumulate for one optimizer step.
        clip_grad: maximum norm of the gradients, in any precision; None does not clip them.
        after_step: called after every step; True ends the epoch early.

    Returns:
        Whether the epoch was finished.

    Raises:
        NonFiniteError: see `FiniteGuard`.
    """
    state.network.train()
    progress, optimizer, scaler, guard = state.progress, state.optimizer, state.scaler, state.guard
    iterator, remaining = iter(batches), num_batches
    while remaining > 0:
        # Schedules count optimizer steps, so a step that the scaler skips does not advance them.
        lr, weight_decay = schedule(progress.updates)
        set_hyperparameters(optimizer, lr, weight_decay)

        # Forward and backward. A window's loss is the mean over its batches; the epoch's last window may be shorter.
        window = min(update_freq, remaining)
        remaining -= window
        loss, images = 0.0, 0
        for micro in range(window):
            batch = next(iterator)
            averaging = micro == window - 1 or not state.world.distributed  # over the ranks, once per window
            with nullcontext() if averaging else state.network.no_sync():
                batch_loss, sums = objective(state.network, batch)
                scaler.scale(batch_loss / window).backward()
            loss += batch_loss.detach() / window
            images += sums["count"]
            state.meter.add(**sums)

        # Clip the true gradients, not the scaled ones.
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.get_total_norm([p.grad for p in guard.parameters if p.grad is not None])
        if clip_grad is not None:
            nn.utils.clip_grads_with_norm_(guard.parameters, clip_grad, grad_norm)

        # Guard and step: non-finite values on any rank must not reach the parameters.
        guard.examine(loss, grad_norm, step=progress.step, scaled=scaler.is_enabled())
        skipped = _step(optimizer, scaler)
        guard.undo_if_bad()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.samples += images * state.world.size

        # Averages follow only the steps that were taken.
        if not skipped:
            progress.updates += 1
            for average in state.averages.values():
                average.update(state.model)

        # Log. Only logging reads the numbers of a step from the device.
        log.images += images * state.world.size
        if remaining == 0 or progress.step % log.every == 0:
            guard.check()
            log(progress.step, loss=loss.item(), grad_norm=grad_norm.item(), lr=lr, weight_decay=weight_decay)
        if after_step():
            return remaining == 0
    return True


def _step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> bool:
    """Take an optimizer step, unless the scaler skips it. Returns whether it was skipped."""
    scale = scaler.get_scale()  # 1 if the scaler is off
    scaler.step(optimizer)
    scaler.update()
    skipped = scaler.get_scale() < scale
    if skipped and scale <= 2.0**-14:
        raise NonFiniteError("float16 gradients overflow at every loss scale; use --amp_dtype bf16 or lower --lr")
    return skipped


@dataclass(frozen=True)
class EvalResult:
    """Results of `evaluate`, over all ranks.

    Attributes:
        count: number of images evaluated.
        loss: mean cross-entropy, with the same weight for each image.
        acc1, acc5: top-1 and top-5 accuracy in percent; with fewer than five classes, top-5 is over all of them.
        real_acc1: top-1 accuracy in percent on ImageNet-ReaL, over the images that have its labels; None without ReaL.
        confusion: images of true class i predicted as class j, int64 (classes, classes); None if not requested.
    """

    count: int
    loss: float
    acc1: float
    acc5: float
    real_acc1: float | None = None
    confusion: torch.Tensor | None = None

    def metrics(self, prefix: str) -> dict[str, float]:
        values = {f"{prefix}_loss": self.loss, f"{prefix}_acc1": self.acc1, f"{prefix}_acc5": self.acc5}
        if self.real_acc1 is not None:
            values[f"{prefix}_real_acc1"] = self.real_acc1
        return values


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    *,
    precision: Precision,
    real_targets: Sequence[Sequence[int]] | None = None,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
    confusion: int | None = None,
) -> EvalResult:
    """Evaluate the model in eval mode, and restore its mode afterwards.

    Args:
        model: (N, 3, H, W) -> (N, classes); unwrapped, because ranks may have different numbers of batches.
        batches: images, targets (N,) and each image's index in the data set, (N,).
        real_targets: for each index, the labels that count as correct.
        reduce: sums a tensor over the ranks.
        confusion: number of classes; if given, the confusion matrix is counted as well.

    Raises:
        ValueError: there are no images.
    """
    # Sums stay on the device, and nothing is read before the last batch.
    training = model.training
    model.eval()
    meter = SumMeter(("loss", "correct1", "correct5", "count"), precision.device)
    taken_for = torch.zeros(confusion or 0, confusion or 0, dtype=torch.int64, device=precision.device)
    predictions: list[tuple[torch.Tensor, torch.Tensor]] = []
    for images, targets, index in batches:
        targets = targets.to(precision.device, non_blocking=True)
        with precision.autocast():
            logits = model(precision.images(images))
        logits = at_least_float32(logits)
        top = logits.topk(min(5, logits.shape[1])).indices  # (N, 5), best first
        hits = top == targets[:, None]
        meter.add(
            loss=F.cross_entropy(logits, targets, reduction="none").sum(dtype=meter.sums.dtype),
            correct1=hits[:, 0].sum(),
            correct5=hits.sum(),
            count=len(targets),
        )
        if confusion is not None:
            taken_for.index_put_((targets, top[:, 0]), torch.ones_like(targets), accumulate=True)
        if real_targets is not None:
            predictions.append((index, top[:, 0]))
    model.train(training)

    # Count ReaL's labels, of which an image may have several or none. Then sum everything over the ranks.
    real_correct = real_count = 0
    for places, taken in predictions:
        for place, prediction in zip(places.tolist(), taken.tolist(), strict=True):
            labels = real_targets[place]
            real_correct += prediction in labels
            real_count += len(labels) > 0
    sums = reduce(torch.cat([meter.sums, meter.sums.new_tensor([real_correct, real_count])]))
    loss, correct1, correct5, count, real_correct, real_count = sums.tolist()
    if not count:
        raise ValueError("there is no image to evaluate: the validation data are empty, or all of them are broken")
    return EvalResult(
        count=int(count),
        loss=loss / count,
        acc1=100 * correct1 / count,
        acc5=100 * correct5 / count,
        real_acc1=None if real_targets is None else 100 * real_correct / max(real_count, 1),
        confusion=None if confusion is None else reduce(taken_for).cpu(),
    )
