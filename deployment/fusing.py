"""From a network in training form to the one that is deployed: fused, compared with what it was, and written."""

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

TOLERANCE = 1e-4  # the largest difference of the fused network's answers, relative to the largest
COMPARED_BATCHES = 4


def deployed(network: Network) -> Network:
    """The network in deploy form. ValueError if its lambda is below 1, so that it cannot be fused."""
    return replace(network, module=reparameterize_model(network.module))


def open_deployed(
    source: str | Path,
    *,
    model: str | None = None,
    model_key: str | None = None,
    input_size: int | None = None,
    crop_pct: float | None = None,
    random_weights: bool = False,
) -> Network:
    """A network in deploy form, on the CPU in eval mode, opened by `networks.open`.

    Args:
        model, model_key: the `name` of the model, and the `key` of its weights.
        input_size, crop_pct: instead of those that the network records.
        random_weights: do without the pretrained weights of a name.
    """
    mend = "give a checkpoint, or add --random_weights true to measure speed alone"
    network = networks.open(source, name=model, key=model_key, pretrained=not random_weights, mend=mend)
    network = deployed(network.prepared(input_size=input_size, crop_pct=crop_pct))
    networks.check_input_size(network.module, network.preprocessing.input_size, str(source))
    return network


def metadata_of(network: Network) -> runtimes.Metadata:
    """What a program needs to know besides the network, for an exported file."""
    images = {name: getattr(network.preprocessing, name) for name in RECORDED}
    return runtimes.Metadata(
        model=network.name, classes=network.labels, loss=network.loss, checkpoint=network.digest, **images
    )


@torch.no_grad()
def largest_difference(module: nn.Module, fused: nn.Module, batches: Iterable[torch.Tensor]) -> float:
    """The largest |fused - unfused| logit over the first batches, relative to the largest |unfused|, in float32.

    Args:
        batches: images (N, 3, H, W) on the device of both, of which `COMPARED_BATCHES` are looked at.
    """
    difference = scale = 0.0
    for images in islice(batches, COMPARED_BATCHES):
        logits = module(images)
        difference = max(difference, (fused(images) - logits).abs().max().item())
        scale = max(scale, logits.abs().max().item())
    return difference / scale if scale else difference


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
    """Fuse a copy of a network, compare it with the network, and write the checkpoint of the deploy form.

    From now on the process does without TensorFloat-32: by its rounding alone the two forms differ by some 1e-2.

    Args:
        module: a classifier or a detector in eval mode.
        compare: the largest relative difference of the answers of two networks.
        answers: what these are called in an error.
        record: what the checkpoint holds beside the weights.
        is_main: write; the other ranks only compare.

    Returns:
        The fused network, and the difference.

    Raises:
        ValueError: there is nothing to fuse, lambda is below 1, or the answers differ; nothing is written then.
    """
    if not hasattr(module, "switch_to_deploy"):
        raise ValueError(f"{type(module).__name__} has no deploy form")
    if getattr(module, "deploy", False):
        raise ValueError("the network is in deploy form already: --eval true evaluates it")
    # A copy is fused, so that both forms are there to be compared and evaluated.
    fused = copy.deepcopy(module)
    fused.switch_to_deploy()
    fused.to(memory_format=layout)  # what fusing returns is contiguous
    # Compared on real data before anything is written.
    runtimes.set_tf32("fp32", str(device))
    difference = compare(module, fused)
    if not difference <= TOLERANCE:
        raise ValueError(f"the fused {answers} differ by {difference:.2e}, more than {TOLERANCE:.0e}; nothing written")
    if is_main:
        save_checkpoint({"model": fused.state_dict(), "act_learn": 1.0, "deploy": True, **record}, path)
    return fused, difference
