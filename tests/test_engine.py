"""The training step and the evaluation, on tensors."""

import copy
import math
import os
from pathlib import Path

import pytest
import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import nn

import engine
import models
from engine import (
    Classification,
    FiniteGuard,
    NonFiniteError,
    Precision,
    TrainState,
    build_criterion,
    evaluate,
    train_one_epoch,
)
from records.logs import StepLog, SumMeter
from utils import World

CPU = torch.device("cpu")
SILENT = StepLog(10, lambda step, values: None)


def tiny():
    torch.manual_seed(0)
    return models.VanillaNet(num_classes=10, dims=(8, 8, 16), strides=(1, 2))


def batches(count, size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 16, 16, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(count)
    ]


def train(model, data, *, precision=None, criterion=None, mixup=None, lr=0.1, guard=None, **kwargs):
    """One epoch with SGD; returns (finished, progress, sums, the number of updates each schedule call saw)."""
    precision, seen = precision or Precision(CPU), []
    objective = Classification(criterion or nn.CrossEntropyLoss(), precision, mixup)
    state = TrainState(
        model,
        kwargs.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        meter=SumMeter(objective.sums, CPU),
        scaler=kwargs.pop("scaler", precision.scaler()),
        averages=kwargs.pop("averages", {}),
    )
    state.guard = guard or state.guard

    def schedule(updates):
        seen.append(updates)
        return lr, 0.0

    kwargs.setdefault("log", SILENT)
    finished = train_one_epoch(state, data, objective=objective, schedule=schedule, num_batches=len(data), **kwargs)
    sums = dict(zip(state.meter.names, state.meter.sums.tolist(), strict=True))
    return finished, state.progress, sums, seen


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_window_is_the_mean_of_its_batches():
    """Accumulating gives the step that the averaged gradients give; eval mode keeps BatchNorm out of the comparison."""

    class Frozen(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def train(self, mode=True):
            return super().train(False)

        def forward(self, x):
            return self.network(x)

    data = batches(2, size=4)
    accumulated = Frozen(tiny().double())
    joined = copy.deepcopy(accumulated)
    train(accumulated, [(x.double(), y) for x, y in data], update_freq=2)
    both = torch.cat([x.double() for x, _ in data]), torch.cat([y for _, y in data])
    train(joined, [both])
    assert (parameters(accumulated) - parameters(joined)).abs().max() < 1e-14


def test_the_tail_of_the_accumulation_is_not_lost():
    finished, progress, sums, seen = train(tiny(), batches(7), update_freq=3)
    assert finished
    assert (progress.step, progress.updates, progress.samples) == (3, 3, 56)
    assert sums["count"] == 56
    assert seen == [0, 1, 2]


def test_the_tail_window_is_averaged_over_its_own_length():
    data = batches(1)
    alone, tail = tiny(), tiny()
    train(alone, data, update_freq=1)
    train(tail, data, update_freq=4)
    assert torch.equal(parameters(alone), parameters(tail))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_clipping_in_every_precision(dtype):
    model = tiny()
    before = parameters(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=dtype is torch.float16)
    train(model, batches(1), precision=Precision(CPU, dtype), scaler=scaler, clip_grad=0.01, lr=1.0)
    moved = (parameters(model) - before).norm().item()
    assert moved == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_stops_before_the_parameters_change(where):
    model = tiny()
    data = batches(5)
    if where == "loss":
        data[3][0][0] = math.nan
    else:
        calls = []

        def poison(grad):
            calls.append(1)
            return grad * math.inf if len(calls) == 4 else grad

        model.cls2[0].weight.register_hook(poison)
    reference = copy.deepcopy(model) if where == "loss" else tiny()
    average, expected = ModelEmaV3(model, decay=0.5), ModelEmaV3(reference, decay=0.5)
    train(reference, batches(5)[:3], averages={"model_ema": expected})
    with pytest.raises(NonFiniteError, match=f"step 3: non-finite {where} on rank 0"):
        train(model, data, averages={"model_ema": average})
    assert torch.equal(parameters(model), parameters(reference))
    assert torch.equal(parameters(average), parameters(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_deferred_guard_undoes_the_bad_step_and_all_after_it(dtype):
    """What a GPU does, step by step on the CPU: the verdict is read late, and the parameters are still the old ones."""
    model = tiny().to(dtype)
    guard = FiniteGuard(model, World(0, 1, CPU), deferred=True)
    history = []
    for step, loss in enumerate([1.0, math.nan, math.nan]):
        history.append(parameters(model))
        guard.examine(torch.tensor(loss), torch.tensor(1.0), step=step, scaled=False)
        with torch.no_grad():
            for parameter in guard.parameters:
                parameter += loss  # in the bad step and after it, not a number
        guard.undo_if_bad()
    assert torch.equal(history[1], history[0] + 1.0)
    assert torch.equal(parameters(model), history[1])
    with pytest.raises(NonFiniteError, match="step 1"):
        guard.check()


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_a_fused_optimizer_skips_the_bad_step_and_all_after_it(optimizer):
    """By torch's own `found_inf`, without a copy of the parameters; the good steps are those of an unguarded run."""
    model, reference = tiny(), tiny()
    reference.load_state_dict(model.state_dict())
    fused = [optimizer(one.parameters(), lr=0.1, fused=True) for one in (model, reference)]
    guard = FiniteGuard(model, World(0, 1, CPU), deferred=True, fused=fused[0])
    assert guard.backup == []
    for step, loss in enumerate([1.0, 2.0, math.nan, 3.0]):
        for one, steps in ((model, fused[0]), (reference, fused[1])):
            for parameter in one.parameters():
                parameter.grad = torch.full_like(parameter, loss)
            if one is model:
                guard.examine(torch.tensor(loss), torch.tensor(1.0), step=step, scaled=False)
            if one is model or step < 2:
                steps.step()
        guard.undo_if_bad()
        assert torch.equal(parameters(model), parameters(reference)), step
    states = [list(one.state.values()) for one in fused]
    for guarded, plain in zip(*states, strict=True):
        assert all(torch.equal(guarded[name], plain[name]) for name in guarded if guarded[name] is not None)
    with pytest.raises(NonFiniteError, match="step 2"):
        guard.check()


def test_a_fused_optimizer_is_given_to_the_guard_unless_a_scaler_has_it(monkeypatch):
    given = []
    monkeypatch.setattr(engine, "FiniteGuard", lambda *args, fused, **kwargs: given.append(fused))
    model = tiny()
    fused, plain = (torch.optim.AdamW(model.parameters(), fused=fused) for fused in (True, False))
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    for optimizer, scaling in ((fused, None), (fused, scaler), (plain, None)):
        TrainState(model, optimizer, meter=SumMeter(("loss",), CPU), scaler=scaling)
    assert given == [fused, None, None]


@pytest.mark.parametrize("fused", [False, True])
def test_a_resumed_optimizer_stays_fused_or_not(fused):
    """A checkpoint of the CPU goes on on a GPU, and the reverse."""
    model, other = tiny(), tiny()
    first = torch.optim.AdamW(model.parameters(), fused=not fused)
    train(model, batches(2), optimizer=first)
    state = TrainState(
        other, torch.optim.AdamW(other.parameters(), fused=fused), meter=SumMeter(("loss", "count"), CPU)
    )
    state._load_optimizer(first.state_dict(), path="x", new_settings=False)
    assert [group["fused"] for group in state.optimizer.param_groups] == [fused]
    assert all(
        torch.equal(mine["exp_avg"], theirs["exp_avg"])
        for mine, theirs in zip(state.optimizer.state.values(), first.state.values(), strict=True)
    )


def test_deferred_guard_holds_on_to_no_graph():
    """Its copies once kept the graph of every step before: gigabytes of the host's memory in a long run."""
    model = tiny()
    guard = FiniteGuard(model, World(0, 1, CPU), deferred=True)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    sizes = []
    for _ in range(5):
        train(model, batches(1) * 100, guard=guard, lr=1e-3)
        sizes.append(resident())
    assert all(copied.grad_fn is None and not copied.requires_grad for copied in guard.backup)
    assert sizes[-1] - sizes[0] < 2**20


def test_after_step_ends_the_epoch():
    calls = []
    finished, progress, _, _ = train(tiny(), batches(6), after_step=lambda: calls.append(1) or len(calls) == 2)
    assert not finished
    assert progress.step == 2


def test_the_host_reads_the_device_at_logging_steps_only(monkeypatch):
    """Counts the reads that would wait for a GPU."""
    reads = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _o=original, _n=name, **k: reads.append(_n) or _o(self, *a, **k)
        )
    model = tiny()
    guard = FiniteGuard(model, World(0, 1, CPU), deferred=True)
    counts = []
    train(
        model,
        batches(8),
        guard=guard,
        averages={"model_ema": ModelEmaV3(model, decay=0.9)},
        clip_grad=1.0,
        log=StepLog(4, lambda step, values: counts.append((step, len(reads)))),
    )
    per_log = counts[0][1]
    assert [step for step, _ in counts] == [4, 8]
    assert counts[1][1] == 2 * per_log  # nothing was read in between
    assert 0 < per_log <= 4


@pytest.mark.parametrize(
    ("kwargs", "targets", "expected"),
    [
        ({"mixing": False, "smoothing": 0.0, "bce": False}, "hard", lambda z, y: nn.functional.cross_entropy(z, y)),
        (
            {"mixing": False, "smoothing": 0.1, "bce": False},
            "hard",
            lambda z, y: nn.functional.cross_entropy(z, y, label_smoothing=0.1),
        ),
        ({"mixing": True, "smoothing": 0.1, "bce": False}, "soft", lambda z, y: nn.functional.cross_entropy(z, y)),
        (
            {"mixing": True, "smoothing": 0.1, "bce": True},
            "soft",
            lambda z, y: nn.functional.binary_cross_entropy_with_logits(z, y),
        ),
        (
            {"mixing": False, "smoothing": 0.0, "bce": True},
            "hard",
            lambda z, y: nn.functional.binary_cross_entropy_with_logits(z, nn.functional.one_hot(y, 10).float()),
        ),
    ],
)
def test_losses(kwargs, targets, expected):
    torch.manual_seed(0)
    logits, hard = torch.randn(6, 10), torch.randint(10, (6,))
    target = hard if targets == "hard" else torch.softmax(torch.randn(6, 10), 1)
    loss = build_criterion(**kwargs, bce_target_thresh=None)(logits, target)
    assert loss.item() == pytest.approx(expected(logits, target).item(), rel=1e-5)


def test_mixup_reaches_the_loss_and_accuracy_counts_hard_labels():
    torch.manual_seed(0)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
    criterion = build_criterion(mixing=True, smoothing=0.1, bce=True, bce_target_thresh=None)
    _, _, sums, _ = train(tiny(), batches(3), mixup=mixup, criterion=criterion)
    assert sums["count"] == 24
    assert 0 < sums["loss"] / 24 < 1.0  # a cross-entropy over ten classes would begin at 2.3


def test_distillation_loss():
    """Against the formula in probabilities, and the teacher sees what the student sees."""
    torch.manual_seed(0)
    student, wanted, hard = torch.randn(6, 10), torch.randn(6, 10), torch.tensor(1.7)
    seen = []

    def teacher(images):
        seen.append(images)
        return wanted

    images = torch.randn(6, 3, 8, 8)
    loss = engine.Distiller(teacher, 0.3, 2.0, Precision(CPU))(images, student, hard)
    p, q = torch.softmax(wanted / 2, 1), torch.softmax(student / 2, 1)
    expected = 0.7 * 1.7 + 0.3 * 4 * (p * (p / q).log()).sum(1).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert seen[0] is images


class Echo(nn.Module):
    """Logits are the image's own first values."""

    def forward(self, x):
        return x.flatten(1)[:, :10]


def test_evaluate_counts():
    torch.manual_seed(0)
    logits = torch.randn(23, 10)
    targets = torch.randint(10, (23,))
    real = [[int(t)] if i % 3 else [] for i, t in enumerate(targets)]
    real[1] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    index = torch.arange(23)
    parts = [slice(0, 8), slice(8, 16), slice(16, 23)]
    data = [(logits[s].reshape(-1, 1, 2, 5), targets[s], index[s]) for s in parts]
    result = evaluate(Echo().train(), data, precision=Precision(CPU), real_targets=real)
    order = logits.argsort(1, descending=True)
    assert result.count == 23
    assert result.acc1 == pytest.approx(100 * (order[:, 0] == targets).float().mean().item())
    assert result.acc5 == pytest.approx(100 * (order[:, :5] == targets[:, None]).any(1).float().mean().item())
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), abs=1e-6)
    judged = [int(order[i, 0]) in real[i] for i in range(23) if real[i]]
    assert result.real_acc1 == pytest.approx(100 * sum(judged) / len(judged))


def test_evaluate_with_few_classes_and_none_at_all():
    data = [(torch.eye(3).reshape(3, 3, 1, 1), torch.arange(3), torch.arange(3))]

    class Three(nn.Module):
        def forward(self, x):
            return x.flatten(1)

    result = evaluate(Three(), data, precision=Precision(CPU))
    assert (result.acc1, result.acc5) == (100.0, 100.0)
    with pytest.raises(ValueError, match="no image"):
        evaluate(Three(), [], precision=Precision(CPU))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_loop_does_not_synchronize_on_a_gpu():
    device = torch.device("cuda")
    model = tiny().to(device)
    data = [(x.pin_memory(), y.pin_memory()) for x, y in batches(8)]
    objective = Classification(nn.CrossEntropyLoss(), Precision(device, torch.bfloat16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = TrainState(model, optimizer, meter=SumMeter(objective.sums, device))
    torch.cuda.set_sync_debug_mode("error")
    try:
        # One batch more than there are, so that no step is the last, which reads the verdict.
        train_one_epoch(
            state, data, objective=objective, schedule=lambda updates: (0.1, 0.0), num_batches=9, log=SILENT
        )
    except StopIteration:
        pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
