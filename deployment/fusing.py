"""Convert a network from train form to deploy form: fuse a copy, compare it with the original, and write it."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.utils import reparameterize_model
from torch import nn

import networks
import runtimes
from deployment.images import RECORDED
from networks import Network
from records.checkpoints import save_checkpoint

TOLERANCE = 1e-4  # the largest allowed difference of the fused network's answers, relative to the largest answer
COMPARED_BATCHES = 4


def deployed(network: Network) -> Network:
    """Return the network in deploy form. Raises ValueError if lambda is below 1, where it cannot be fused."""
    return replace(network, module=reparameterize_model(network.module))


def open_deployed(
    source: str | Path,
    *,
    model: str | None = None,
    model_key: str | None = None,
    input_size: int | None = None,
    crop_pct: float | None = None,
    random_weights: bool = False,
    others: bool = True,
) -> Network:
    """Open a network with `networks.open` and return it in deploy form, on the CPU in eval mode.

    Args:
        model, model_key: `name` and `key` of `networks.open`.
        input_size, crop_pct: override the values that the network records.
        random_weights: do not load the pretrained weights of a model's name.
        others: also fuse networks that are no VanillaNets; timm reads their weights in train form only.
    """
    mend = "give a checkpoint, or add --random_weights true to measure speed alone"
    network = networks.open(source, name=model, key=model_key, pretrained=not random_weights, mend=mend)
    network = network.prepared(input_size=input_size, crop_pct=crop_pct)
    if others or networks.is_vanillanet(network.name):
        network = deployed(network)
    networks.check_input_size(network.module, network.preprocessing.input_size, str(source))
    return network


def metadata_of(network: Network) -> runtimes.Metadata:
    """Return the metadata for an exported file: what a program needs to know besides the network."""
    images = {name: getattr(network.preprocessing, name) for name in RECORDED}
    return runtimes.Metadata(
        model=network.name, classes=network.labels, loss=network.loss, checkpoint=network.digest, **images
    )


@torch.no_grad()
def largest_difference(module: nn.Module, fused: nn.Module, batches: Iterable[torch.Tensor]) -> float:
    """Return the largest |fused - unfused| of the logits, relative to the largest |unfused|.

    Args:
        batches: images (N, 3, H, W) on the device of both networks; the first `COMPARED_BATCHES` batches are compared.
    """
    difference = scale = torch.zeros(())
    for images in islice(batches, COMPARED_BATCHES):
        logits = module(images)
        # `torch.maximum` keeps a NaN, which Python's `max` may drop.
        difference = torch.maximum(difference, (fused(images) - logits).abs().max().cpu())
        scale = torch.maximum(scale, logits.abs().max().cpu())
    return (difference / scale if scale else difference).item()


def write_deployed(
    module: nn.Module,
    path: str | Path,
    *,
    compare: Callable[[nn.Module, nn.Module], float],
    answers: str,
    record: Mapping[str, Any],
    device: torch.device,
    layout: torch.memory_format = torch.contiguous_format,
    is_main: bool = True,
) -> tuple[nn.Module, float]:
    """Fuse a copy of a network, compare it with the original, and write a checkpoint of the deploy form.

    TensorFloat-32 stays off for the rest of the process: its rounding alone makes the two forms differ by some 1e-2.

    Args:
        module: a classifier or a detector in eval mode.
        compare: returns the largest relative difference between two networks' answers.
        answers: what error messages call the answers.
        record: further entries of the checkpoint.
        is_main: write the checkpoint; the other ranks only compare.

    Returns:
        The fused network and the difference.

    Raises:
        ValueError: there is nothing to fuse, lambda is below 1, or the answers differ; nothing is written then.
    """
    if not hasattr(module, "switch_to_deploy"):
        raise ValueError(f"{type(module).__name__} has no deploy form")
    if getattr(module, "deploy", False):
        raise ValueError("the network is in deploy form already: --eval true evaluates it")
    # Fuse a copy, so that both forms can be compared and evaluated.
    fused = copy.deepcopy(module)
    fused.switch_to_deploy()
    fused.to(memory_format=layout)  # fusing returns contiguous tensors
    # Compare before anything is written.
    runtimes.set_tf32("fp32", str(device))
    difference = compare(module, fused)
    if not difference <= TOLERANCE:
        raise ValueError(f"the fused {answers} differ by {difference:.2e}, more than {TOLERANCE:.0e}; nothing written")
    if is_main:
        save_checkpoint({"model": fused.state_dict(), "act_learn": 1.0, "deploy": True, **record}, path)
    return fused, difference
