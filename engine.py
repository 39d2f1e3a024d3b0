"""One epoch of training, and evaluation. Numbers come back; where they go is the caller's affair."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn

from records.logs import SumMeter


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; the message names ranks and step. The parameters are as they were before it."""


def build_criterion(*, mixing: bool, smoothing: float, bce: bool, bce_target_thresh: float | None) -> nn.Module:
    """The training loss over (N, classes) logits.

    Args:
        mixing: targets are soft, (N, classes), from mixup or cutmix, with the smoothing already in them.
        smoothing: of hard targets, (N,).
        bce: binary cross-entropy of every class instead of cross-entropy over the classes.
        bce_target_thresh: make targets above it 1 and the others 0.
    """
    if bce:
        return BinaryCrossEntropy(smoothing=0.0 if mixing else smoothing, target_threshold=bce_target_thresh)
    if mixing:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing=smoothing) if smoothing > 0 else nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Precision:
    """Where and how the arithmetic runs; the one path through every precision.

    Args:
        device: of the network.
        dtype: of autocast; None computes in float32.
        channels_last: the memory format of images.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    channels_last: bool = False

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler for float16, which does nothing in the other precisions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def images(self, images: torch.Tensor) -> torch.Tensor:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.to(self.device, non_blocking=True, memory_format=layout)


@dataclass(frozen=True)
class Distiller:
    """Logit distillation (Hinton et al., 2015): part of the loss asks for the teacher's softened class distribution.

    loss = (1 - alpha) hard + alpha tau^2 KL(softmax(teacher / tau) || softmax(student / tau)); tau^2 keeps the size of
    the gradients.

    Args:
        teacher: in eval mode, (N, 3, H, W) -> (N, classes); sees the images that the student sees, mixed as they are.
        alpha: share of the teacher, in [0, 1].
        tau: temperature.
        precision: of the student, under which the teacher runs as well.
    """

    teacher: nn.Module
    alpha: float
    tau: float
    precision: "Precision"

    def __call__(self, images: torch.Tensor, logits: torch.Tensor, hard: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), self.precision.autocast():
            wanted = self.teacher(images)
        soft = F.kl_div(
            F.log_softmax(logits / self.tau, dim=1),
            F.log_softmax(wanted.float() / self.tau, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - self.alpha) * hard + self.alpha * self.tau**2 * soft


class FiniteGuard:
    """Keeps a non-finite loss or gradient of any rank from reaching the parameters, and stops all ranks together.

    On the CPU the verdict is read before the optimizer steps. On a GPU reading it would make the host wait for the
    device in every step, so the step is taken and undone on the device (`torch.where` with a copy of the parameters),
    and the error is raised when the verdict is next read: at a logging step, before a save, at the epoch's end.

    Gradients are examined before they are averaged over the ranks, where infinity on one would be on all of them.

    Args:
        model: the network that the optimizer changes, unwrapped.
        rank, world_size: of this process.
    """

    LOSS, GRADIENT = 1, 2

    def __init__(self, model: nn.Module, *, rank: int, world_size: int):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.rank, self.world_size = rank, world_size
        self.deferred = self.device.type != "cpu"
        self.backup = [torch.empty_like(p) for p in self.parameters] if self.deferred else []
        self.verdict = torch.zeros(world_size, dtype=torch.int32, device=self.device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        self.local_gradient = torch.zeros((), dtype=torch.bool, device=self.device)
        if world_size > 1:
            for parameter in self.parameters:
                parameter.register_hook(self._watch)

    def _watch(self, gradient: torch.Tensor) -> None:
        self.local_gradient |= ~torch.isfinite(gradient).all()

    def examine(self, loss: torch.Tensor, grad_norm: torch.Tensor, *, step: int, scaled: bool) -> None:
        """Judge this step. Raises NonFiniteError at once on the CPU.

        Args:
            loss: of this rank, summed over the step.
            grad_norm: of the averaged gradients.
            scaled: a gradient scaler is on and skips steps of non-finite gradients itself, so only the loss counts.
        """
        code = torch.where(torch.isfinite(loss), 0, self.LOSS).to(torch.int32)
        if not scaled:
            bad_gradient = self.local_gradient if self.world_size > 1 else ~torch.isfinite(grad_norm)
            code = torch.where(bad_gradient & (code == 0), self.GRADIENT, code).to(torch.int32)
        codes = torch.zeros_like(self.verdict)
        codes[self.rank] = code
        if self.world_size > 1:
            dist.all_reduce(codes)
        first = (self.bad_step < 0) & codes.any()
        self.verdict = torch.where(first, codes, self.verdict)
        self.bad_step = torch.where(first, step, self.bad_step)
        self.local_gradient.zero_()
        if self.deferred:
            torch._foreach_copy_(self.backup, self.parameters)
        else:
            self.check()

    @torch.no_grad()
    def undo_if_bad(self) -> None:
        """After the optimizer's step on a GPU: put the parameters back if the verdict on it, or one before, was bad."""
        if self.deferred:
            good = self.bad_step < 0
            for parameter, before in zip(self.parameters, self.backup, strict=True):
                parameter.copy_(torch.where(good, parameter, before))

    def check(self) -> None:
        """Read the verdict; raises NonFiniteError, on all ranks alike."""
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
    """Where training stands; all of it goes into a checkpoint.

    Attributes:
        epoch: counted from 0.
        step: accumulation windows finished in this epoch, skipped ones included: the place in the data.
        updates: optimizer steps taken in the whole run: the place in the schedules.
        samples: images of this epoch that all ranks have taken together.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    samples: int = 0


class Objective(Protocol):
    """What a batch is trained for."""

    def __call__(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor | float]]:
        """The loss, a float32 scalar to take the gradient of, and the batch's sums for the meter; `count`, the number
        of images, is one of them."""
        ...


@dataclass(frozen=True)
class Classification:
    """The loss of images (N, 3, H, W) with class indices (N,).

    Args:
        criterion: of logits (N, classes) and targets, see `build_criterion`.
        precision: to compute in; the loss is taken in float32 whatever it is.
        mixup: mixes a batch and makes its targets soft.
        distiller: adds a teacher's part to the loss.
    """

    criterion: nn.Module
    precision: Precision
    mixup: Mixup | None = None
    distiller: Distiller | None = None

    def __call__(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]):
        images, targets = batch
        images = self.precision.images(images)
        labels = targets = targets.to(self.precision.device, non_blocking=True)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        with self.precision.autocast():
            logits = model(images)
        loss = self.criterion(logits.float(), targets)
        if self.distiller is not None:
            loss = self.distiller(images, logits.float(), loss)
        return loss, {
            "loss": loss.detach() * len(labels),
            "correct": (logits.detach().argmax(1) == labels).sum(),
            "count": len(labels),
        }


def train_one_epoch(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    scaler: torch.amp.GradScaler,
    guard: FiniteGuard,
    progress: Progress,
    meter: SumMeter,
    num_batches: int,
    set_schedules: Callable[[int], None],
    emas: Sequence[ModelEmaV3] = (),
    ema_source: nn.Module | None = None,
    update_freq: int = 1,
    clip_grad: float | None = None,
    world_size: int = 1,
    log_every: int = 10,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
    after_step: Callable[[], bool] | None = None,
) -> bool:
    """Train over `batches` to the end of the epoch, or until `after_step` asks to stop.

    Args:
        model: put into train mode; wrapped in DistributedDataParallel on several ranks.
        batches: what is left of the epoch.
        objective: the loss of a batch.
        guard: see `FiniteGuard`.
        progress: moved on in place after each step.
        meter: the epoch's sums on this rank, of the objective's names; added to in place.
        num_batches: how many `batches` holds; the last accumulation window may be shorter than the others.
        set_schedules: writes the hyperparameters for the number of optimizer steps taken.
        emas, ema_source: moving averages, and the unwrapped network that they follow.
        update_freq: batches accumulated for one optimizer step.
        clip_grad: largest norm of the gradients, in any precision.
        log_every: steps between calls of `on_log(step in the epoch, metrics of this rank)`; the only place, with the
            checks of `after_step`, where the host waits for the device, except that float16's scaler does by itself.
        after_step: called after every step; True ends the epoch early.

    Returns:
        Whether the epoch was finished.

    Raises:
        NonFiniteError: see `FiniteGuard`.
    """
    model.train()
    parameters = guard.parameters
    iterator = iter(batches)
    rate = _Rate()
    remaining = num_batches
    while remaining > 0:
        set_schedules(progress.updates)
        window = min(update_freq, remaining)
        remaining -= window
        loss_sum = torch.zeros((), device=precision.device)
        images_seen = 0
        for micro in range(window):
            batch = next(iterator)
            last = micro == window - 1
            with nullcontext() if last or world_size == 1 else model.no_sync():
                loss, sums = objective(model, batch)
                scaler.scale(loss / window).backward()
            loss_sum += loss.detach() / window
            images_seen += sums["count"]
            meter.add(**sums)
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(parameters, math.inf if clip_grad is None else clip_grad)
        guard.examine(loss_sum, grad_norm, step=progress.step, scaled=scaler.is_enabled())
        skipped = _step(optimizer, scaler)
        guard.undo_if_bad()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.samples += images_seen * world_size
        rate.add(images_seen * world_size)
        if not skipped:
            progress.updates += 1
            for ema in emas:
                ema.update(ema_source)
        if progress.step % log_every == 0 or remaining == 0:
            guard.check()
            if on_log is not None:
                on_log(
                    progress.step,
                    {
                        "loss": loss_sum.item(),
                        "grad_norm": grad_norm.item(),
                        "images_per_second": rate.take(),
                    },
                )
        if after_step is not None and after_step():
            return remaining == 0
    return True


def train_meter(device: torch.device) -> SumMeter:
    """The sums of an epoch of `Classification`: loss and correct top-1 weighted by images, and images."""
    return SumMeter(("loss", "correct", "count"), device)


def _step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> bool:
    """Step, or let the scaler skip it. Returns whether it was skipped."""
    scale = scaler.get_scale() if scaler.is_enabled() else 1.0
    scaler.step(optimizer)
    scaler.update()
    if not scaler.is_enabled():
        return False
    skipped = scaler.get_scale() < scale
    if skipped and scale <= 2.0**-14:
        raise NonFiniteError("float16 gradients overflow at every loss scale; use --amp_dtype bf16 or lower --lr")
    return skipped


class _Rate:
    """Images a second since it was last asked."""

    def __init__(self):
        self.start, self.images = time.perf_counter(), 0

    def add(self, images: int) -> None:
        self.images += images

    def take(self) -> float:
        now = time.perf_counter()
        rate = self.images / (now - self.start)
        self.start, self.images = now, 0
        return rate


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` found, over all ranks.

    Attributes:
        count: images seen.
        loss: mean cross-entropy, each image weighted the same.
        acc1, acc5: top-1 and top-5 accuracy in percent; top-5 of fewer than five classes is over all of them.
        real_acc1: top-1 in percent against ImageNet-ReaL's labels, over the images that have one; None without them.
    """

    count: int
    loss: float
    acc1: float
    acc5: float
    real_acc1: float | None = None

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
) -> EvalResult:
    """Evaluate in eval mode; the model's mode is put back afterwards.

    Args:
        model: (N, 3, H, W) -> (N, classes), not wrapped: ranks may have different numbers of batches.
        batches: images, targets (N,) and each image's index in the data set, (N,).
        real_targets: by index, the labels that count as right.
        reduce: sums a float64 tensor over the ranks.

    Raises:
        ValueError: there was no image.
    """
    training = model.training
    model.eval()
    meter = SumMeter(("loss", "correct1", "correct5", "count"), precision.device)
    predictions, indices = [], []
    for images, targets, index in batches:
        targets = targets.to(precision.device, non_blocking=True)
        with precision.autocast():
            logits = model(precision.images(images))
        logits = logits.float()
        top = logits.topk(min(5, logits.shape[1])).indices  # (N, 5), best first
        hits = top == targets[:, None]
        meter.add(
            loss=F.cross_entropy(logits, targets, reduction="none").double().sum(),
            correct1=hits[:, 0].sum(),
            correct5=hits.sum(),
            count=len(targets),
        )
        if real_targets is not None:
            predictions.append(top[:, 0])
            indices.append(index)
    model.train(training)
    real = torch.zeros(2, dtype=torch.float64)
    if predictions:
        for index, prediction in zip(torch.cat(indices).tolist(), torch.cat(predictions).tolist(), strict=True):
            labels = real_targets[index]
            real += torch.tensor([prediction in labels, len(labels) > 0], dtype=torch.float64)
    sums = reduce(torch.cat([meter.sums, real.to(meter.sums.device)]))
    loss, correct1, correct5, count, real_correct, real_count = sums.tolist()
    if not count:
        raise ValueError("there is no image to evaluate: the validation data are empty, or all of them are broken")
    return EvalResult(
        count=int(count),
        loss=loss / count,
        acc1=100 * correct1 / count,
        acc5=100 * correct5 / count,
        real_acc1=None if real_targets is None else 100 * real_correct / max(real_count, 1),
    )
