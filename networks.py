"""A network with its preprocessing, classes and loss, opened from a model's name, a hub address or a file of weights.

network = networks.open("outputs/demo/checkpoint-best.pth")
network = networks.open("vanillanet_6=weights.safetensors")
network = networks.open("hf-hub:timm/resnet18.a1_in1k")
logits = network.module(images)
"""

import argparse
import hashlib
import logging
import math
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count, takewhile
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.data import ImageNetInfo, resolve_data_config
from torch import nn
from torch.func import functional_call

import models  # noqa: F401  registers the variants
from loading import transforms
from loading.transforms import Preprocessing
from models.vanillanet import VARIANTS
from optim_factory import activation_slope
from records.checkpoints import checkpoint_weights, is_state_dict, load_checkpoint, load_weights
from records.files import first_line

logger = logging.getLogger(__name__)

# Keys of the weights in our checkpoints, the published code's and timm's; the first key present is used.
AVERAGE_FIRST = "model_ema|state_dict_ema|model|module|state_dict"
NETWORK_FIRST = "model|module|state_dict|model_ema|state_dict_ema"
SUFFIXES = (".pth", ".pt", ".tar", ".ckpt", ".bin", ".safetensors")
HUBS = ("hf-hub:", "hf_hub:", "local-dir:")
CROSS_ENTROPY, BINARY_CROSS_ENTROPY = "cross_entropy", "binary_cross_entropy"  # as torch.nn.functional names them
Normalization = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each channel, for pixels in [0, 1]


# -- what a file records


@dataclass(frozen=True)
class Record:
    """What a file records about its network besides the weights; None or empty where it records nothing valid."""

    model: str | None = None  # the model's name in timm
    classes: tuple[str, ...] | None = None  # class names in the order of the logits
    slope: float | None = None  # lambda of the saved network
    loss: str | None = None  # the training loss, `cross_entropy` or `binary_cross_entropy`
    preprocessing: Mapping[str, Any] = field(default_factory=dict)  # fields of `Preprocessing`
    arguments: Mapping[str, Any] = field(default_factory=dict)  # the flags of the run that wrote the file
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)  # arguments of the model, as timm records them


# Each check returns a valid value in the form used here, and raises an error for any other value; see `read_record`.


def _ensure(value: Any, valid: bool) -> Any:
    if not valid:
        raise ValueError
    return value


def _number(value: Any, low: float, high: float = float("inf")) -> float:
    number = isinstance(value, Real) and not isinstance(value, bool)
    return float(_ensure(value, number and math.isfinite(value) and low <= value <= high))


def _channels(value: Any, low: float) -> tuple[float, ...]:
    _ensure(value, isinstance(value, list | tuple) and len(value) in (1, 3))
    return tuple(_number(part, low) for part in value) * (3 // len(value))


def _instance(value: Any, kind: type) -> Any:
    return _ensure(value, isinstance(value, kind))


def _one_of(value: Any, known: Sequence[str]) -> str:
    return _ensure(value, value in known)


def _whole(value: Any, low: int = 0) -> int:
    return int(_ensure(value, isinstance(value, Integral) and not isinstance(value, bool) and value >= low))


def _size(value: Any) -> int:
    return _whole(value[-1] if isinstance(value, list | tuple) and len(value) == 3 else value, 1)  # timm: (3, H, W)


def _mapping(value: Any) -> dict[str, Any]:
    return dict(vars(value)) if isinstance(value, argparse.Namespace) else dict(value)


def _names(value: Any) -> tuple[str, ...]:
    """Class names from a list, a dict of names by index, or one of indices by name (torchvision's `class_to_idx`)."""
    if isinstance(value, Mapping):
        # Names that are numbers are names all the same, if what they stand for are whole numbers.
        by_name = all(isinstance(key, str) for key in value) and all(isinstance(x, Integral) for x in value.values())
        by_index = {int(index): name for name, index in value.items()} if by_name else value
        by_index = {int(index): name for index, name in by_index.items()}
        value = [by_index[index] for index in range(len(by_index))]
    valid = isinstance(value, list | tuple) and value and all(isinstance(name, str | int) for name in value)
    return tuple(map(str, _ensure(value, valid)))


# Fields of `Preprocessing` that a file may record, each with its check and the arguments of the check.
FIELDS = {
    "input_size": (_size,),
    "mean": (_channels, float("-inf")),
    "std": (_channels, 1e-9),
    "crop_pct": (_number, 1e-9, 1),
    "native": (_instance, bool),
    "exif_transpose": (_instance, bool),
    "interpolation": (_one_of, transforms.INTERPOLATIONS),
    "crop_mode": (_one_of, transforms.CROP_MODES),
}


def read_record(checkpoint: Mapping[str, Any], path: str | Path = "the checkpoint") -> Record:
    """Read what a checkpoint records about its network. Another program may have written it, so invalid values are
    skipped with a warning."""
    passed_over: dict[str, None] = {}

    def take(values: Mapping[str, Any], name: str, valid: Callable[..., Any], *limits: Any) -> Any:
        value = values.get(name)
        if value is None or (isinstance(value, str) and not value):  # how timm records a flag that was not given
            return None
        try:
            return valid(value, *limits)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            passed_over[name] = None
            return None

    arguments = take(checkpoint, "args", _mapping) or {}
    found: dict[str, Any] = {}
    # Our runs and the published code's record the normalization as a flag and evaluate with their own crop and filter.
    if "imagenet_default_mean_and_std" in arguments:
        imagenet = take(arguments, "imagenet_default_mean_and_std", _instance, bool)
        found["mean"], found["std"] = transforms.mean_and_std(imagenet is not False)
        found |= {"interpolation": "bicubic", "crop_pct": None}
        size = take(arguments, "input_size", _size)
        found["native"] = size is not None and transforms.keeps_native_size(str(arguments.get("data_set")), size)
    # Our own record wins over the run's flags: it holds what was settled, also where a file decided and no flag.
    for values in (arguments, take(checkpoint, "preprocessing", _mapping) or {}):
        given = {name: take(values, name, *check) for name, check in FIELDS.items()}
        found |= {name: value for name, value in given.items() if value is not None}
    if "img_size" in arguments and "input_size" not in found and (side := take(arguments, "img_size", _size)):
        found["input_size"] = side
    loss = take(checkpoint, "loss", _one_of, (CROSS_ENTROPY, BINARY_CROSS_ENTROPY))
    if loss is None and "bce_loss" in arguments:
        loss = BINARY_CROSS_ENTROPY if take(arguments, "bce_loss", _instance, bool) else CROSS_ENTROPY
    slope = take(checkpoint, "act_learn", _number, 0, 1)
    if slope is None and "decay_epochs" in arguments:  # a published checkpoint: lambda follows from the epoch
        epoch, ramp = take(checkpoint, "epoch", _whole), take(arguments, "decay_epochs", _whole)
        if epoch is not None and ramp is not None:
            slope = activation_slope(epoch, decay_epochs=ramp, linear=arguments.get("decay_linear", True) is not False)
    model = take(arguments, "model", _instance, str) or take(checkpoint, "arch", _instance, str)
    if model and model.startswith(HUBS):  # timm's hub addresses end in the model's name
        model = model.rpartition("/")[2]
        model = model if _is_known(model) else None
    # Of timm's own checkpoints, and of ours that go back to one.
    kwargs = take(checkpoint, "model_kwargs", _mapping) or take(arguments, "model_kwargs", _mapping) or {}
    record = Record(model, take(checkpoint, "classes", _names), slope, loss, found, arguments, kwargs)
    if passed_over:
        logger.warning("%s: passed over what it records of %s, which is not valid", path, ", ".join(passed_over))
    return record


@dataclass(frozen=True)
class Weights:
    """A file of weights: its tensors by name, and what it records about their network."""

    path: str
    tensors: Mapping[str, torch.Tensor]  # the state dict
    key: str  # the tensors' key in the file; empty if the file itself is a state dict
    record: Record
    checkpoint: Mapping[str, Any]  # the whole content of the file
    choice: str = ""  # tells the user which weights were taken, if the file holds several


def read(path: str | Path, *, key: str | None = None, order: str = AVERAGE_FIRST, prefix: str = "") -> Weights:
    """Read the weights in a file onto the CPU. If the file holds several state dicts, the log says which one is taken.

    Args:
        key: key of the weights; `|` separates alternatives. None tries the keys in `order`, then the whole file.
        order: alternatives for a `key` of None, separated in the same way.
        prefix: prefix to strip from the tensors' names; tensors without it are left out.

    Raises:
        ValueError: the file cannot be read, or does not hold such weights.
    """
    checkpoint = load_checkpoint(path)
    tensors = checkpoint_weights(checkpoint, key=key or order, whole_file=key is None, prefix=prefix, path=path)
    used = next((name for name in (key or order).split("|") if name in checkpoint), "")
    others = [name for name, value in checkpoint.items() if is_state_dict(value) and name != used]
    choice = ""
    if used and others:
        choice = f"{path}: the weights are those of {used}; it holds {', '.join(map(str, others))}, too (--model_key)"
        logger.info("%s", choice)
    return Weights(str(path), tensors, used, read_record(checkpoint, path), checkpoint, choice)


# -- the network


@dataclass(frozen=True)
class Network:
    """A network with its preprocessing, classes and loss."""

    module: nn.Module  # images (N, 3, H, W) -> logits (N, classes); `open` leaves it on the CPU in eval mode
    name: str  # the model's name in timm
    preprocessing: Preprocessing  # how an image is turned into the network's input
    classes: tuple[str, ...] | None = None  # class names in the order of the logits; None if they are unknown
    loss: str = CROSS_ENTROPY  # the training loss, this or `binary_cross_entropy`
    source: str = ""  # what the network was opened from
    weights: Weights | None = None  # the file that the network was opened from; None for a name or an address

    @property
    def slope(self) -> float:
        """Lambda; 1 for a network without deep training."""
        return float(getattr(self.module, "act_learn", 1.0))

    @property
    def record(self) -> Record:
        return self.weights.record if self.weights else Record()

    @property
    def digest(self) -> str:
        """The SHA-256 of the file of weights; empty for a network without a file."""
        if self.weights is None:
            return ""
        with Path(self.weights.path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes for people; numbers where no names are known."""
        number = self.module.num_classes
        return class_labels(self.classes or _imagenet_names(number), number)

    def state(self) -> dict[str, Any]:
        """Preprocessing, loss and classes, as a checkpoint records them for `read_record`."""
        return describe(self.preprocessing, self.loss, self.classes, self.record.model_kwargs)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return probabilities(logits, self.loss)

    def prepared(self, **changes: Any) -> "Network":
        """Return the network with changes to its preprocessing, see `prepare`."""
        return replace(self, preprocessing=prepare(self.preprocessing, self.record.arguments, **changes))

    def for_classes(self, classes: Sequence[str] | int, *, keep: bool = False) -> "Network":
        """Return the network with a classifier for these classes: its own, or a new one if it was trained on others.

        Args:
            classes: the names of the classes, or their number if the names are unknown.
            keep: keep the classifier even if the classes differ; their number must be the same.

        Raises:
            ValueError: `keep` with a different number of classes.
        """
        number = classes if isinstance(classes, int) else len(classes)
        names = None if isinstance(classes, int) else tuple(classes)
        why = None
        if number != self.module.num_classes:
            why = f"it tells {self.module.num_classes} classes, the data have {number}"
            if keep:
                raise ValueError(f"--keep_classifier true, but {self.source} cannot keep it: {why}")
        elif names and self.classes and names != self.classes and not keep:
            other = [name for name in names if name not in self.classes]
            which = f"others, such as {', '.join(other[:3])}" if other else "the same in another order"
            why = f"the data's {number} classes are not its own but {which} (--keep_classifier true keeps it)"
        if why:
            logger.info("%s: the classifier is new, since %s", self.source, why)
            self.module.reset_classifier(number)
        return replace(self, classes=names or (None if why else self.classes))


def prepare(
    preprocessing: Preprocessing, arguments: Mapping[str, Any], *, native: bool | None = None, **changes: Any
) -> Preprocessing:
    """Return the preprocessing with some fields changed; None leaves a field as it is.

    Args:
        arguments: the flags of the run that `preprocessing` comes from. For another input size, images are resized only
            if that run would have resized them, and a crop_pct that the run did not set becomes the new size's default.
        native: True does not resize images and False does, whatever that run did.

    Raises:
        ValueError: a crop_pct for images that are not resized.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    size = changes.get("input_size", preprocessing.input_size)
    if native is None and "input_size" in changes:
        small = size <= transforms.NATIVE_SIZE and preprocessing.native
        native = small or transforms.keeps_native_size(str(arguments.get("data_set")), size)
    if native is not None:
        changes["native"] = native
    own = preprocessing.crop_pct
    default = own is None or (
        arguments.get("crop_pct", own) is None and own == transforms.default_crop_pct(preprocessing.input_size)
    )
    if native or default:
        changes.setdefault("crop_pct", None)  # the new size's default
    return replace(preprocessing, **changes)


def describe(
    preprocessing: Preprocessing, loss: str, classes: Sequence[str] | None, model_kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a checkpoint records of these, as plain data; see `Record`."""
    fields = {name: list(x) if isinstance(x, tuple) else x for name, x in vars(preprocessing).items()}
    optional = {"classes": list(classes or ()), "model_kwargs": dict(model_kwargs)}
    return {"preprocessing": fields, "loss": loss} | {name: value for name, value in optional.items() if value}


def probabilities(logits: torch.Tensor, loss: str) -> torch.Tensor:
    """Probabilities of the classes, (N, classes): sigmoid of the logits for binary cross-entropy, otherwise softmax."""
    return logits.sigmoid() if loss == BINARY_CROSS_ENTROPY else logits.softmax(1)


def class_labels(classes: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Names of the classes for people: ImageNet's folder names (n01440764) in words, numbers for unknown classes."""
    if classes is None or len(classes) != num_classes:
        return tuple(f"class {index}" for index in range(num_classes))
    imagenet = ImageNetInfo()
    known = set(imagenet.label_names())
    return tuple(imagenet.label_name_to_description(name) if name in known else name for name in classes)


def _imagenet_names(num_classes: int) -> tuple[str, ...] | None:
    """The names of ImageNet's folders if `num_classes` is their number, otherwise None."""
    imagenet = ImageNetInfo()
    return tuple(imagenet.label_names()) if num_classes == imagenet.num_classes() else None


def known_classes(
    classes: Sequence[str] | None, num_classes: int, found: Sequence[str] | None
) -> tuple[str, ...] | None:
    """Return the names of a network's classes. A network of 1000 classes without names gets ImageNet's folder names if
    the data's class names, `found`, are among them."""
    imagenet = _imagenet_names(num_classes)
    if classes is None and imagenet and found and set(found) <= set(imagenet):
        return imagenet
    return None if classes is None else tuple(classes)


def unlabelled(labels: Sequence[str], found: Sequence[str] | None) -> tuple[str, ...] | None:
    """Undo `class_labels` for the labels in an exported file, given the class names of the data set, `found`."""
    if tuple(labels) == class_labels(None, len(labels)):
        return None
    if found and tuple(labels) == class_labels(found, len(found)):  # two classes may have one label
        return tuple(found)
    imagenet = _imagenet_names(len(labels))
    if imagenet and tuple(labels) == class_labels(imagenet, len(imagenet)):
        return imagenet if found and set(found) <= set(imagenet) else None  # `Network.labels` may have guessed them
    names = dict(zip(class_labels(found, len(found)), found, strict=True)) if found else {}
    return tuple(names.get(label, label) for label in labels)


def warn_of_other_preprocessing(preprocessing: Preprocessing, checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Warn if a run that continues from a checkpoint prepares its images differently."""
    recorded = read_record(checkpoint, path).preprocessing
    other = {name: value for name, value in recorded.items() if value not in (None, getattr(preprocessing, name))}
    if other:
        logger.warning("%s was trained with other images than this run's (%s): it had %s", path, preprocessing, other)


def config_preprocessing(config: Mapping[str, Any]) -> Preprocessing:
    """Return the preprocessing in timm's configuration of a model (`pretrained_cfg`)."""
    found = resolve_data_config(pretrained_cfg=dict(config) or {"mean": None})
    fields = {name: found[name] for name in ("crop_pct", "interpolation", "crop_mode")}
    return Preprocessing(found["input_size"][-1], mean=tuple(found["mean"]), std=tuple(found["std"]), **fields)


def named_preprocessing(name: str) -> Preprocessing:
    """Return the preprocessing of the timm model with this name or hub address."""
    if name.startswith(HUBS):
        return open(name, pretrained=False).preprocessing
    config = timm.models.get_pretrained_cfg(name)
    return config_preprocessing(config.to_dict() if config else {})


def _is_known(name: str) -> bool:
    return timm.models.is_model(name.split(".")[0])


def check_name(name: str, flag: str, *, family: str = "") -> None:
    """Raise ValueError, naming `flag`, if timm has no such model; `family` narrows the list in the message."""
    if not _is_known(name):
        raise ValueError(f"{flag} {name} is not known; see timm.list_models({family!r})")


def check_input_size(module: nn.Module, size: int, what: str) -> None:
    """Raise ValueError, naming `what`, if the network cannot take images of size x size px.

    The check runs on the meta device, which only computes shapes, and restores the network's mode.
    """
    tensors = chain(module.named_parameters(), module.named_buffers())
    training = module.training
    try:
        image = torch.empty(1, 3, size, size, device="meta")
        with torch.no_grad():
            functional_call(module.eval(), {name: tensor.to("meta") for name, tensor in tensors}, args=(image,))
    except (RuntimeError, AssertionError, ValueError) as error:
        cause = first_line(error)
        if "meta" not in cause:  # a network that mixes devices cannot be checked this way
            raise ValueError(f"{what} cannot take --input_size {size}: {cause}") from error
    finally:
        module.train(training)


def set_slope(slope: float, *modules: nn.Module) -> None:
    """Set lambda in the networks that have one; other timm models are left alone."""
    for module in modules:
        if hasattr(module, "change_act"):
            module.change_act(slope)


class Renormalized(nn.Module):
    """Adapt a network to images (N, 3, H, W) that are normalized with `given` mean and std instead of `wanted`."""

    def __init__(self, network: nn.Module, *, given: Normalization, wanted: Normalization):
        super().__init__()
        self.network = network
        (mean, std), (own_mean, own_std) = (
            torch.tensor(pair, dtype=torch.float64).view(2, 3, 1, 1) for pair in (given, wanted)
        )
        self.register_buffer("scale", (std / own_std).float())
        self.register_buffer("shift", ((mean - own_mean) / own_std).float())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(torch.addcmul(self.shift, images, self.scale))


# -- opening a network


def is_vanillanet(name: str) -> bool:
    return name.split(".")[0] in VARIANTS


def shape_arguments(name: str, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the arguments of the model `name` that follow from the shapes in a state dict.

    For any timm model this is the number of classes; for a VanillaNet also the form, the channels, and n of the series
    activation. Strides and adaptive pools leave no trace in the tensors, so the variant's apply. Arguments that cannot
    be found in another network's state dict are left out; loading it then reports what does not fit.
    """
    if not is_vanillanet(name):
        classifier = timm.get_pretrained_cfg_value(name, "classifier")
        first = f"{classifier if isinstance(classifier, str) else (classifier or [''])[0]}.weight"
        return {"num_classes": len(weights[first])} if first in weights else {}
    deploy = "stem.0.weight" in weights
    stem, act, conv, head = (
        ("stem.0", "stem.1", "conv", "cls.2") if deploy else ("stem1.0", "stem2.2", "conv2.0", "cls2.0")
    )
    stages = takewhile(lambda layer: layer in weights, (f"stages.{i}.{conv}.weight" for i in count()))
    found: dict[str, Any] = {"deploy": deploy}
    if f"{head}.weight" in weights:
        found["num_classes"] = len(weights[f"{head}.weight"])
    if f"{act}.weight" in weights:
        found["act_num"] = weights[f"{act}.weight"].shape[-1] // 2  # kernel size 2n + 1
    dims = [len(weights[layer]) for layer in (f"{stem}.weight", *stages) if layer in weights]
    if len(dims) == len(VARIANTS[name.split(".")[0]]["dims"]):
        found.update(dims=dims, width_mult=1.0)
    return found


def is_file(source: str | Path) -> bool:
    """Whether `source` is a file, existing or not, rather than a model's name or a hub address."""
    text = str(source)
    return os.path.isfile(text) or (not text.startswith(HUBS) and (os.sep in text or text.endswith(SUFFIXES)))


def open(
    source: str | Path,
    *,
    name: str | None = None,
    fallback: str | None = None,
    key: str | None = None,
    order: str = AVERAGE_FIRST,
    prefix: str = "",
    pretrained: bool = True,
    flag: str = "--model",
    mend: str = "",
    **arguments: Any,
) -> Network:
    """Open a network on the CPU in eval mode, with its weights, lambda, preprocessing, classes and loss.

    Args:
        source: a file of weights (our checkpoints, the published code's or timm's, safetensors), MODEL=FILE for a file
            that does not record its model, a model's name in timm, or an address: hf-hub:OWNER/NAME, local-dir:FOLDER.
        name: the model's name for a file; overrides the name that the file records.
        fallback: the model's name for a file that records none.
        key, order, prefix: select the weights in a file, see `read`.
        pretrained: load the pretrained weights of a name or an address.
        flag, mend: for messages: the flag that names the model, and advice if there are no pretrained weights.
        arguments: arguments of the timm model; they override those found from the tensors' shapes.

    Raises:
        ValueError: there is no such model or file, the file cannot be read, or the weights do not fit.
    """
    # Tell MODEL=FILE, a name or an address, and a file apart.
    model, equals, file = str(source).partition("=")
    if equals and not os.path.isfile(source) and os.sep not in model:
        if name not in (None, model):
            raise ValueError(f"{flag} {name}, but {source} says {model}: leave one of them out")
        name, source = model, file
    elif not is_file(source):
        if name is not None:
            raise ValueError(f"{flag} {name} is for a checkpoint that does not name its model; {source} is a name")
        return _open_name(str(source), pretrained=pretrained, flag=flag, mend=mend, arguments=arguments)
    if not pretrained:
        raise ValueError(f"--random_weights is for a model's name, and {source} is a file of weights")
    # Find the model of the weights: first `name`, then what the file records, then `fallback`.
    weights = read(source, key=key, order=order, prefix=prefix)
    record = weights.record
    wanted, name = name, name or record.model or fallback
    if name is None:
        raise ValueError(f"{source} does not record which model it is of: name one by {flag}")
    check_name(name, flag)
    if wanted is not None and record.model not in (None, wanted):
        logger.info("%s %s instead of %s, which %s records", flag, wanted, record.model, source)
    # Find the model's arguments from the shapes of the tensors, unless the caller sets them.
    _check_arguments(name, arguments, flag)
    told = shape_arguments(name, weights.tensors)
    if "width_mult" in arguments:
        told.pop("dims", None)
    # The arguments that timm recorded have the lowest priority: the tensors' shapes and the caller know better.
    extra = record.model_kwargs
    try:
        module = timm.create_model(name, **(dict(extra) | told | arguments))
    except (TypeError, ValueError, RuntimeError, AssertionError):
        if not extra:
            raise
        logger.warning("%s: passed over what it records of model_kwargs, which %s does not take", source, name)
        module = timm.create_model(name, **(told | arguments))
    load_weights(module, weights.tensors, path=source)
    set_slope(1.0 if record.slope is None else record.slope, module)
    # Preprocessing as the file records it; timm's configuration fills in the rest.
    images = dict(record.preprocessing) | ({"crop_pct": None} if record.preprocessing.get("native") else {})
    images = replace(config_preprocessing(module.pretrained_cfg), **images)
    classes = record.classes
    fashion = tuple(torchvision.datasets.FashionMNIST.classes)
    if classes is None and record.arguments.get("data_set") == "FMNIST" and module.num_classes == len(fashion):
        classes = fashion  # older checkpoints do not record these names
    if classes is not None and len(classes) != module.num_classes:
        logger.warning(
            "%s: passed over its %d names of classes: there are %d", source, len(classes), module.num_classes
        )
        classes = None
    return Network(module.eval(), name, images, classes, record.loss or CROSS_ENTROPY, str(source), weights)


def _check_arguments(name: str, arguments: Mapping[str, Any], flag: str) -> None:
    """Raise ValueError if a model other than a VanillaNet is given arguments that only VanillaNet has."""
    for own in ("act_num", "width_mult", "deploy"):
        if own in arguments and not is_vanillanet(name):
            raise ValueError(f"--{own} belongs to VanillaNet, {flag} {name} has no such thing")


def _open_name(name: str, *, pretrained: bool, flag: str, mend: str, arguments: Mapping[str, Any]) -> Network:
    if not name.startswith(HUBS):
        check_name(name, flag, family="vanillanet*")
        _check_arguments(name, arguments, flag)
    try:
        module = timm.create_model(name, pretrained=pretrained, **arguments)
    except (OSError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        if not pretrained:
            raise
        cause = first_line(error) if "weights_only" not in str(error) else "refused, since to load them could run code"
        mend = mend or "give a file of weights"
        raise ValueError(f"no pretrained weights for {flag} {name} ({cause}): {mend}") from error
    # timm's configuration may name the classes. It has no place for the loss, which our own file in a folder records.
    record = read_record({"classes": module.pretrained_cfg.get("label_names")}, name) if pretrained else Record()
    if pretrained and name.startswith("local-dir:"):
        files = [*Path(name.removeprefix("local-dir:")).glob("*.safetensors")]
        record = replace(record, loss=read(files[0]).record.loss if len(files) == 1 else None)
    classes = record.classes if record.classes and len(record.classes) == module.num_classes else None
    if pretrained and classes is None and not name.startswith("local-dir:"):
        classes = _imagenet_names(module.num_classes)
    own_name = module.pretrained_cfg["architecture"] if name.startswith(HUBS) else name
    images = config_preprocessing(module.pretrained_cfg)
    return Network(module.eval(), own_name, images, classes, record.loss or CROSS_ENTROPY, source=name)
