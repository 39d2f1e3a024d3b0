"""What processes of the suite run, apart from main.py: ranks that meet a bad gradient, or evaluate again and again."""

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import nn

import datasets
import engine
import models
import utils
from engine import Classification, NonFiniteError, Precision, TrainState, train_one_epoch
from loading import loaders, transforms
from loading.processes import Loading
from records.logs import StepLog, SumMeter

STEPS, WINDOW = 3, 2  # of batches


def small_network(classes: int = 10) -> models.VanillaNet:
    torch.manual_seed(0)
    return models.VanillaNet(num_classes=classes, dims=(8, 8, 16), strides=(1, 2))


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def train_badly(arguments: list[str]) -> None:
    """Three steps of two batches each; the last rank meets `fault` in its third step.

    Writes what the rank saw to FOLDER/RANK.json.

    Args:
        arguments: fault ("none", "loss" or "gradient"), FOLDER.
    """
    fault, folder = arguments
    world = utils.init_world("cpu")
    model = small_network()
    generator = torch.Generator().manual_seed(world.rank)

    def draw():
        return torch.randn(4, 3, 16, 16, generator=generator), torch.randint(10, (4,), generator=generator)

    data = [draw() for _ in range(STEPS * WINDOW)]
    bad_batch = (STEPS - 1) * WINDOW
    if world.rank == world.size - 1 and fault == "loss":
        data[bad_batch][0][0] = math.nan
    if world.rank == world.size - 1 and fault == "gradient":
        seen = []

        def poison(gradient: torch.Tensor) -> torch.Tensor:
            seen.append(1)
            return gradient * math.inf if len(seen) == bad_batch + 1 else gradient

        model.cls2[0].weight.register_hook(poison)
    objective = Classification(nn.CrossEntropyLoss(), Precision(world.device))
    average = ModelEmaV3(model, decay=0.5)
    state = TrainState(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        meter=SumMeter(objective.sums, world.device),
        averages={"model_ema": average},
        world=world,
    )
    states, error = [(flat(model), flat(average))], None
    start = time.monotonic()

    def after_step() -> bool:
        nonlocal start
        states.append((flat(model), flat(average)))
        start = time.monotonic()
        return False

    try:
        train_one_epoch(
            state,
            data,
            objective=objective,
            schedule=lambda updates: (0.1, 0.0),
            num_batches=len(data),
            update_freq=WINDOW,
            log=StepLog(10, lambda step, values: None),
            after_step=after_step,
        )
    except NonFiniteError as found:
        error = str(found)
    found = {
        "error": error,
        "steps": len(states) - 1,
        "seconds": time.monotonic() - start,
        "unchanged": torch.equal(states[-1][0], flat(model)) and torch.equal(states[-1][1], flat(average)),
        "sum": flat(model).double().sum().item(),
    }
    (Path(folder) / f"{world.rank}.json").write_text(json.dumps(found))
    utils.close_world(world)


def evaluate_all_sizes(arguments: list[str]) -> None:
    """Evaluate the first N images for each N from 1 to LARGEST, with ReaL labels. Rank 0 writes the results to FILE.

    Args:
        arguments: LARGEST, FILE.
    """
    largest, file = int(arguments[0]), Path(arguments[1])
    world = utils.init_world("cpu")
    model = small_network()
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (largest, 16, 16, 3), dtype=np.uint8)
    targets = draw.integers(0, 10, largest)
    real = [sorted(set(draw.integers(0, 10, draw.integers(0, 4)).tolist())) for _ in range(largest)]
    transform = transforms.build_eval_transform(transforms.Preprocessing(16, (0.5,) * 3, (0.5,) * 3, crop_pct=1.0))
    results = []
    for count in range(1, largest + 1):
        dataset = datasets.ArrayDataset(
            images[:count], targets[:count], classes=[str(c) for c in range(10)], transform=transform, name="drawn"
        )
        loader = loaders.build_eval_loader(dataset, Loading(3, rank=world.rank, world_size=world.size))
        found = engine.evaluate(
            model, loader, precision=Precision(world.device), real_targets=real[:count], reduce=world.sum
        )
        results.append([found.count, found.acc1, found.acc5, found.real_acc1, found.loss])
    if world.is_main:
        file.write_text(json.dumps(results))
    utils.close_world(world)
