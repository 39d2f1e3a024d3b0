"""Write a network to a file for an engine, after comparing the file with the network, or to safetensors."""

import copy
import shutil
import tempfile
from pathlib import Path

import torch
from timm.models import save_for_hf
from torch import nn

import runtimes
from networks import Network, is_vanillanet
from records.checkpoints import save_checkpoint
from records.files import writing

# The largest allowed difference from PyTorch in float32, relative to the largest logit.
TOLERANCES = {"default": 1e-2, "fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2, "int8": 2.5e-1}
COMPARED_IMAGES = 32


def write_exported(
    network: nn.Module,
    path: Path,
    target: runtimes.Target,
    *,
    metadata: runtimes.Metadata,
    images: torch.Tensor,
    batch_size: int,
    tolerance: float | None = None,
) -> str:
    """Export a network, compare the exported file with it, and move the files into place if the two agree.

    Args:
        images: the images to compare on, (N, 3, H, W).
        tolerance: the largest allowed relative difference; None takes it from `TOLERANCES` by precision.

    Returns:
        A description of the comparison for the user.

    Raises:
        ValueError: the two differ by more than `tolerance`; nothing is written then.
    """
    engine = runtimes.find(target.engine)
    engine.check(target)  # before the folder is created
    tolerance = TOLERANCES[target.precision] if tolerance is None else tolerance
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="writing-", dir=path.parent) as folder:
            batch = images[:1].expand(batch_size, -1, -1, -1).contiguous()
            files = engine.export(network, batch, Path(folder) / path.name, target, metadata)
            with torch.inference_mode():
                expected, found = network(images), engine.open(files[0], target)(images).cpu()  # (N, classes)
            difference = ((found - expected).abs().max() / expected.abs().max()).item()
            same = int((found.argmax(1) == expected.argmax(1)).sum())
            comparison = (
                f"largest logit difference from PyTorch in float32, relative: {difference:.1e}; "
                f"the same class for {same} of {len(images)} images"
            )
            if not difference <= tolerance:  # also refuses NaN
                raise ValueError(f"{comparison}: more than {tolerance:g}, nothing written")
            for file in files:
                shutil.move(file, path.parent / file.name)
    return comparison


def write_safetensors(network: Network, path: Path) -> Path:
    """Write the network's weights and metadata to a safetensors file, and timm's `config.json` beside it.

    Both `networks.open(path)` and, where the VanillaNet variants are registered,
    `timm.create_model("local-dir:FOLDER", pretrained=True)` can read the result.

    Returns:
        The path of the configuration.

    Raises:
        ValueError: a file cannot be written, or timm cannot describe the network.
    """
    images, recorded = network.preprocessing, network.record.arguments
    config = path.parent / "config.json"
    data = {"input_size": (3, images.input_size, images.input_size), "mean": images.mean, "std": images.std}
    data |= {"interpolation": images.interpolation, "crop_mode": images.crop_mode, "crop_pct": images.crop_pct or 1.0}
    labels = {"label_names": list(network.classes)} if network.classes else {}
    module = copy.copy(network.module)
    if is_vanillanet(network.name):  # with adaptive pools of one size, it takes images of others all the same
        module._traits = {**getattr(module, "_traits", {}), "fixed_input_size": False}
    with writing(config):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="writing-", dir=path.parent) as folder:
            # timm also writes a file of weights, but without our metadata, so only its config.json is kept.
            save_for_hf(module, folder, model_config=labels, data_config=data, safe_serialization=True)
            flags = {name: recorded[name] for name in ("data_set", "crop_pct") if name in recorded}
            save_checkpoint(
                {
                    "model": network.module.state_dict(),
                    "act_learn": network.slope,
                    "deploy": getattr(network.module, "deploy", False),
                    **network.state(),
                    "args": {"model": network.name, **flags},
                },
                path,
            )
            shutil.move(Path(folder) / "config.json", config)
    return config
