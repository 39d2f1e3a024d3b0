"""Networks by their names in timm, and out of checkpoints, built as the checkpoint's tensors are shaped."""

import argparse
from collections.abc import Mapping
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch.func import functional_call

from loading import transforms
from models.vanillanet import VARIANTS
from optim_factory import activation_slope
from records.checkpoints import checkpoint_weights, load_checkpoint, load_weights
from records.files import first_line

__all__ = [
    "Normalization",
    "check_input_size",
    "check_name",
    "create_pretrained",
    "create_trained",
    "mean_and_std",
    "recorded_args",
    "recorded_slope",
    "renormalized",
    "set_slope",
    "shape_arguments",
]


def check_name(name: str, flag: str, *, family: str = "") -> None:
    """Raise ValueError, which names `flag`, if timm knows no such model; `family` narrows the list it points to."""
    if not timm.models.is_model(name.split(".")[0]):
        raise ValueError(f"{flag} {name} is not known; see timm.list_models({family!r})")


def check_input_size(network: nn.Module, size: int, what: str) -> None:
    """Raise ValueError, which names `what`, if the network cannot take images of size x size px.

    Its shapes are tried on the meta device, where nothing is computed; its mode is put back.
    """
    tensors = chain(network.named_parameters(), network.named_buffers())
    training = network.training
    try:
        image = torch.empty(1, 3, size, size, device="meta")
        with torch.no_grad():
            functional_call(network.eval(), {name: tensor.to("meta") for name, tensor in tensors}, (image,))
    except (RuntimeError, AssertionError, ValueError) as error:
        cause = first_line(error)
        if "meta" not in cause:  # a network that mixes devices cannot be tried so
            raise ValueError(f"{what} cannot take --input_size {size}: {cause}") from error
    finally:
        network.train(training)


# -- what a checkpoint records


def recorded_args(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the run that wrote it, empty if it records none. Published checkpoints hold a Namespace."""
    arguments = checkpoint.get("args")
    return dict(vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments or {})


def recorded_slope(checkpoint: Mapping[str, Any]) -> float:
    """Lambda that it was trained with, 1 if that cannot be known.

    Published checkpoints do not record it; it follows from their epoch and arguments.
    """
    if "act_learn" in checkpoint:
        return float(checkpoint["act_learn"])
    arguments = recorded_args(checkpoint)
    if "epoch" in checkpoint and "decay_epochs" in arguments:
        linear = arguments.get("decay_linear", True)
        return activation_slope(checkpoint["epoch"], decay_epochs=arguments["decay_epochs"], linear=linear)
    return 1.0


Normalization = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each channel, of pixels in [0, 1]


def mean_and_std(network: nn.Module, checkpoint: Mapping[str, Any]) -> Normalization:
    """What the network's images are normalized with: as its checkpoint's run did it, else as timm has it."""
    recorded = recorded_args(checkpoint)
    if "imagenet_default_mean_and_std" in recorded:
        return transforms.mean_and_std(recorded["imagenet_default_mean_and_std"])
    config = resolve_model_data_config(network)
    return tuple(config["mean"]), tuple(config["std"])


class _Renormalized(nn.Module):
    def __init__(self, network: nn.Module, scale: torch.Tensor, shift: torch.Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("scale", scale.view(3, 1, 1))
        self.register_buffer("shift", shift.view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(torch.addcmul(self.shift, images, self.scale))


def renormalized(network: nn.Module, *, given: Normalization, wanted: Normalization) -> nn.Module:
    """The network for images (N, 3, H, W) that are normalized with `given` mean and std, where it wants others."""
    if given == wanted:
        return network
    (mean, std), (own_mean, own_std) = (torch.tensor(pair, dtype=torch.float64) for pair in (given, wanted))
    return _Renormalized(network, (std / own_std).float(), ((mean - own_mean) / own_std).float()).eval()


def set_slope(slope: float, *networks: nn.Module) -> None:
    """Set lambda in the networks that have one; other timm models do not."""
    for network in networks:
        if hasattr(network, "change_act"):
            network.change_act(slope)


# -- building


def _vanillanet_arguments(variant: str, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    deploy = "stem.0.weight" in weights
    stem, act, conv, head = (
        ("stem.0", "stem.1", "conv", "cls.2") if deploy else ("stem1.0", "stem2.2", "conv2.0", "cls2.0")
    )
    stages = takewhile(lambda name: name in weights, (f"stages.{i}.{conv}.weight" for i in count()))
    found: dict[str, Any] = {"deploy": deploy}
    if f"{head}.weight" in weights:
        found["num_classes"] = len(weights[f"{head}.weight"])
    if f"{act}.weight" in weights:
        found["act_num"] = weights[f"{act}.weight"].shape[-1] // 2  # a kernel of 2n + 1
    dims = [len(weights[name]) for name in (f"{stem}.weight", *stages) if name in weights]
    if len(dims) == len(VARIANTS[variant]["dims"]):
        found.update(dims=dims, width_mult=1.0)
    return found


def shape_arguments(name: str, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments of the model `name` that the shapes in a state dict tell.

    For any timm model that is the number of classes; for a VanillaNet also the form, the channels, and n of the series
    activation. Its strides and adaptive pools are in no tensor: they are the variant's. What a state dict of something
    else does not tell is left out, and loading it then says what does not fit.
    """
    variant = name.split(".")[0]
    if variant in VARIANTS:
        return _vanillanet_arguments(variant, weights)
    classifier = timm.get_pretrained_cfg_value(name, "classifier")
    first = f"{classifier if isinstance(classifier, str) else (classifier or [''])[0]}.weight"
    return {"num_classes": len(weights[first])} if first in weights else {}


def create_trained(
    path: str | Path,
    *,
    name: str | None = None,
    num_classes: int | None = None,
    key: str = "model_ema|model|module",
    whole_file: bool = True,
    flag: str = "--model",
) -> tuple[str, nn.Module, dict[str, Any]]:
    """The network of a checkpoint on the CPU, with its weights and lambda, in eval mode.

    Args:
        name: of the model in timm; None takes the one that the checkpoint records.
        num_classes: that there must be; None takes the checkpoint's.
        key, whole_file: of the weights, as for `utils.checkpoint_weights`.
        flag: what the user named the model by, for messages.

    Returns:
        The model's name, the model and the checkpoint.

    Raises:
        ValueError: the model's name is unknown, or the checkpoint cannot be read or does not fit.
    """
    checkpoint = load_checkpoint(path)
    name = name or recorded_args(checkpoint).get("model")
    if name is None:
        raise ValueError(f"{path} does not record which model it is of: name one by {flag}")
    check_name(name, flag)
    weights = checkpoint_weights(checkpoint, key=key, whole_file=whole_file, path=path)
    arguments = shape_arguments(name, weights)
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    model = timm.create_model(name, **arguments)
    load_weights(model, weights, path=path)
    set_slope(recorded_slope(checkpoint), model)
    return name, model.eval(), checkpoint


def create_pretrained(name: str, flag: str, *, mend: str) -> nn.Module:
    """The model `name` with timm's pretrained weights, on the CPU in eval mode.

    Args:
        name: of a model in timm, or one with the source of its weights, as in hf-hub:OWNER/NAME and local-dir:FOLDER.
        flag, mend: what the user named it by, and can do instead of the download, for messages.

    Raises:
        ValueError: the name is unknown, or there are no weights to be had.
    """
    if not name.startswith(("hf-hub:", "local-dir:")):
        check_name(name, flag)
    try:
        return timm.create_model(name, pretrained=True).eval()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"no pretrained weights for {flag} {name}: {mend}") from error
