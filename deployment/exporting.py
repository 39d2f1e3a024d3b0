"""Writing a network to a file that an engine runs, once the file was compared with the network."""

import shutil
import tempfile
from pathlib import Path

import torch
from timm.models import save_for_hf
from torch import nn

import runtimes
from networks import Network
from records.checkpoints import save_checkpoint
from records.files import writing

# The largest difference from PyTorch in float32, relative to the largest logit. A file beyond it is not written.
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
    """Export, compare with the network itself, and put the files in their place if they agree.

    Args:
        images: to compare on, (N, 3, H, W).
        tolerance: None is that of the precision in `TOLERANCES`.

    Returns:
        The comparison in words.

    Raises:
        ValueError: they differ by more than `tolerance`; nothing is written then.
    """
    engine = runtimes.find(target.engine)
    engine.check(target)  # before the folder is made
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
            if not difference <= tolerance:  # so that nan is refused, too
                raise ValueError(f"{comparison}: more than {tolerance:g}, nothing written")
            for file in files:
                shutil.move(file, path.parent / file.name)
    return comparison


def write_safetensors(network: Network, path: Path) -> Path:
    """Write the weights as safetensors, with what travels with them in its metadata, and timm's `config.json` beside.

    So `networks.open(path)` reads it, and `timm.create_model("local-dir:FOLDER", pretrained=True)` where VanillaNet is
    registered.

    Returns:
        The path of the configuration.

    Raises:
        ValueError: a file cannot be written, or timm cannot describe the network.
    """
    images = network.preprocessing
    save_checkpoint(
        {
            "model": network.module.state_dict(),
            "act_learn": network.slope,
            "deploy": getattr(network.module, "deploy", False),
            **network.state(),
            "args": {"model": network.name, "data_set": network.record.arguments.get("data_set")},
        },
        path,
    )
    config = path.parent / "config.json"
    data = {"input_size": (3, images.input_size, images.input_size), "mean": images.mean, "std": images.std}
    data |= {"interpolation": images.interpolation, "crop_mode": images.crop_mode, "crop_pct": images.crop_pct or 1.0}
    labels = {"label_names": list(network.classes)} if network.classes else {}
    with writing(config), tempfile.TemporaryDirectory(prefix="writing-", dir=path.parent) as folder:
        # timm writes weights of its own beside it, without our record in their metadata: these are not kept.
        save_for_hf(network.module, folder, model_config=labels, data_config=data, safe_serialization=True)
        shutil.move(Path(folder) / "config.json", config)
    return config
