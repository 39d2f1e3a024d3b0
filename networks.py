"""A network with what must travel with it, and the one door to it: a name, a hub's address, or a file of weights.

network = networks.open("outputs/demo/checkpoint-best.pth")
network = networks.open("vanillanet_6=weights.safetensors")
network = networks.open("hf-hub:timm/resnet18.a1_in1k")
logits = network.module(images)
"""

import argparse
import hashlib
import logging
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

# Where the weights are in a checkpoint of ours, of the published code, of timm; the first that is there is taken.
AVERAGE_FIRST = "model_ema|state_dict_ema|model|module|state_dict"
NETWORK_FIRST = "model|module|state_dict|model_ema|state_dict_ema"
SUFFIXES = (".pth", ".pt", ".tar", ".ckpt", ".bin", ".safetensors")
HUBS = ("hf-hub:", "hf_hub:", "local-dir:")
CROSS_ENTROPY, BINARY_CROSS_ENTROPY = "cross_entropy", "binary_cross_entropy"  # as torch.nn.functional names them
Normalization = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each channel, of pixels in [0, 1]


# -- what a file records


@dataclass(frozen=True)
class Record:
    """What a file says of its network beside the weights, as far as that is valid; None where it says nothing."""

    model: str | None = None  # the name in timm
    classes: tuple[str, ...] | None = None  # the names of the logits in order
    slope: float | None = None  # lambda that it was trained with
    loss: str | None = None  # `cross_entropy` or `binary_cross_entropy`
    preprocessing: Mapping[str, Any] = field(default_factory=dict)  # fields of `Preprocessing`
    arguments: Mapping[str, Any] = field(default_factory=dict)  # the flags of the run that wrote it


# Each of these returns a valid value in the form that is used here, and else raises an error, see `read_record`.


def _ensure(value: Any, valid: bool) -> Any:
    if not valid:
        raise ValueError
    return value


def _number(value: Any, low: float, high: float = float("inf")) -> float:
    return float(_ensure(value, isinstance(value, Real) and not isinstance(value, bool) and low <= value <= high))


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
    return _whole(value[-1] if isinstance(value, list | tuple) and len(value) == 3 else value, 1)  # timm's: (3, H, W)


def _mapping(value: Any) -> dict[str, Any]:
    return dict(vars(value)) if isinstance(value, argparse.Namespace) else dict(value)


def _names(value: Any) -> tuple[str, ...]:
    """A list of names, a dict of them by index, or one of indices by name, as torchvision's `class_to_idx`."""
    if isinstance(value, Mapping):
        by_index = value if all(str(key).isdigit() for key in value) else {index: name for name, index in value.items()}
        by_index = {int(index): name for index, name in by_index.items()}
        value = [by_index[index] for index in range(len(by_index))]
    valid = isinstance(value, list | tuple) and value and all(isinstance(name, str | int) for name in value)
    return tuple(map(str, _ensure(value, valid)))


# What a file may record of `Preprocessing`, with the check of each field and its arguments.
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
    """What a checkpoint records, taken with care, since it may be another program's; what is not valid is named in a
    warning and passed over."""
    passed_over: dict[str, None] = {}

    def take(values: Mapping[str, Any], name: str, valid: Callable[..., Any], *limits: Any) -> Any:
        value = values.get(name)
        if value is None or (isinstance(value, str) and not value):  # as timm's flags that were not given
            return None
        try:
            return valid(value, *limits)
        except (ValueError, TypeError, KeyError, AttributeError):
            passed_over[name] = None
            return None

    arguments = take(checkpoint, "args", _mapping) or {}
    found: dict[str, Any] = {}
    # A run of ours or of the published code says it by a flag, and has evaluated by a crop and filter of its own.
    if "imagenet_default_mean_and_std" in arguments:
        imagenet = take(arguments, "imagenet_default_mean_and_std", _instance, bool)
        found["mean"], found["std"] = transforms.mean_and_std(imagenet is not False)
        found |= {"interpolation": "bicubic", "crop_pct": None}
        size = take(arguments, "input_size", _size)
        found["native"] = size is not None and transforms.keeps_native_size(str(arguments.get("data_set")), size)
    # Our own record and the flags of a run of ours say the same, as far as flags can say it.
    for values in (take(checkpoint, "preprocessing", _mapping) or {}, arguments):
        given = {name: take(values, name, *check) for name, check in FIELDS.items()}
        found |= {name: value for name, value in given.items() if value is not None}
    if "img_size" in arguments and "input_size" not in found and (side := take(arguments, "img_size", _size)):
        found["input_size"] = side
    loss = take(checkpoint, "loss", _one_of, (CROSS_ENTROPY, BINARY_CROSS_ENTROPY))
    if loss is None and "bce_loss" in arguments:
        loss = BINARY_CROSS_ENTROPY if take(arguments, "bce_loss", _instance, bool) else CROSS_ENTROPY
    slope = take(checkpoint, "act_learn", _number, 0, 1)
    if slope is None and "decay_epochs" in arguments:  # a published checkpoint, of which lambda follows from these
        epoch, ramp = take(checkpoint, "epoch", _whole), take(arguments, "decay_epochs", _whole)
        if epoch is not None and ramp is not None:
            slope = activation_slope(epoch, decay_epochs=ramp, linear=arguments.get("decay_linear", True) is not False)
    model = take(arguments, "model", _instance, str) or take(checkpoint, "arch", _instance, str)
    if model and model.startswith(HUBS):  # an address ends in the model's name
        model = model.rpartition("/")[2]
    record = Record(model, take(checkpoint, "classes", _names), slope, loss, found, arguments)
    if passed_over:
        logger.warning("%s: passed over what it records of %s, which is not valid", path, ", ".join(passed_over))
    return record


@dataclass(frozen=True)
class Weights:
    """A file of weights: the tensors by name, and what the file says of them."""

    path: str
    tensors: Mapping[str, torch.Tensor]  # the state dict
    key: str  # what they were under in the file; empty where the file is a state dict itself
    record: Record
    checkpoint: Mapping[str, Any]  # all that the file holds
    choice: str = ""  # a line for the user on which weights these are, where the file holds several


def read(path: str | Path, *, key: str | None = None, order: str = AVERAGE_FIRST, prefix: str = "") -> Weights:
    """The weights in a file, onto the CPU; the log says which ones, where it holds several.

    Args:
        key: of the weights, `|` separates alternatives; None takes those of `order`, or the whole file.
        order: likewise, for a key of None.
        prefix: what the names are prefixed with; names without it are left out.

    Raises:
        ValueError: it cannot be read, or does not hold them.
    """
    checkpoint = load_checkpoint(path)
    tensors = checkpoint_weights(checkpoint, key=key or order, whole_file=key is None, prefix=prefix, path=path)
    used = next((name for name in (key or order).split("|") if name in checkpoint), "")
    others = [name for name, value in checkpoint.items() if is_state_dict(value) and name != used]
    choice = ""
    if used and others:
        choice = f"{path}: the weights are those of {used}; it holds {', '.join(others)}, too (--model_key)"
        logger.info("%s", choice)
    return Weights(str(path), tensors, used, read_record(checkpoint, path), checkpoint, choice)


# -- the network


@dataclass(frozen=True)
class Network:
    """A network with what must travel with it."""

    module: nn.Module  # images (N, 3, H, W) -> logits (N, classes); on the CPU in eval mode, as it was opened
    name: str  # of the model in timm
    preprocessing: Preprocessing  # how an image becomes its input
    classes: tuple[str, ...] | None = None  # the names of the logits in order, None where they are not known
    loss: str = CROSS_ENTROPY  # that it was trained with, or `binary_cross_entropy`
    source: str = ""  # what it was opened from
    weights: Weights | None = None  # of the file that it was opened from; None for a name or address

    @property
    def slope(self) -> float:
        """Lambda; 1 for a network without deep training."""
        return float(getattr(self.module, "act_learn", 1.0))

    @property
    def record(self) -> Record:
        return self.weights.record if self.weights else Record()

    @property
    def digest(self) -> str:
        """The SHA-256 of its file; empty without one."""
        if self.weights is None:
            return ""
        with Path(self.weights.path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes in words, numbered where nothing is known of them."""
        number = self.module.num_classes
        return class_labels(self.classes or _imagenet_names(number), number)

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the network holds beside its weights and `args`, for `read_record`."""
        return describe(self.preprocessing, self.loss, self.classes)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return probabilities(logits, self.loss)

    def prepared(self, **changes: Any) -> "Network":
        """The network for images that are prepared otherwise, see `prepare`."""
        return replace(self, preprocessing=prepare(self.preprocessing, self.record.arguments, **changes))

    def for_classes(self, classes: Sequence[str] | int, *, keep: bool = False) -> "Network":
        """The network with a classifier for these classes: its own, or a new one if it was trained on others.

        Args:
            classes: their names, or where these are not known their number.
            keep: keep the classifier for as many other classes.

        Raises:
            ValueError: `keep` for another number of classes.
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
        return replace(self, classes=names or self.classes)


def prepare(
    preprocessing: Preprocessing, arguments: Mapping[str, Any], *, native: bool | None = None, **changes: Any
) -> Preprocessing:
    """The preprocessing with other fields, of which None leaves one as it is.

    Args:
        arguments: the flags of the run that it is of. With another size, images are resized or not as that run would
            have done it, and a crop that was not asked for is that of the new size.
        native: do not resize, or do, whatever that run did.

    Raises:
        ValueError: a crop of images that are not resized.
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
        changes.setdefault("crop_pct", None)  # that of the new size
    return replace(preprocessing, **changes)


def describe(preprocessing: Preprocessing, loss: str, classes: Sequence[str] | None) -> dict[str, Any]:
    """What a checkpoint records of these, in plain data."""
    fields = {name: list(x) if isinstance(x, tuple) else x for name, x in vars(preprocessing).items()}
    return {"preprocessing": fields, "loss": loss} | ({"classes": list(classes)} if classes else {})


def probabilities(logits: torch.Tensor, loss: str) -> torch.Tensor:
    """Of each class, (N, classes): the sigmoid of the logits after binary cross-entropy, or else their softmax."""
    return logits.sigmoid() if loss == BINARY_CROSS_ENTROPY else logits.softmax(1)


def class_labels(classes: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """The classes in words: names of ImageNet's folders (n01440764) are spelled out, unknown ones are numbered."""
    if classes is None or len(classes) != num_classes:
        return tuple(f"class {index}" for index in range(num_classes))
    imagenet = ImageNetInfo()
    known = set(imagenet.label_names())
    return tuple(imagenet.label_name_to_description(name) if name in known else name for name in classes)


def _imagenet_names(num_classes: int) -> tuple[str, ...] | None:
    """The names of ImageNet's folders, if that is how many there are."""
    imagenet = ImageNetInfo()
    return tuple(imagenet.label_names()) if num_classes == imagenet.num_classes() else None


def known_classes(
    classes: Sequence[str] | None, num_classes: int, found: Sequence[str] | None
) -> tuple[str, ...] | None:
    """The names of a network's classes; those of ImageNet's folders for a network without names, if there are 1000 and
    the data's, `found`, are among them."""
    imagenet = _imagenet_names(num_classes)
    if classes is None and imagenet and found and set(found) <= set(imagenet):
        return imagenet
    return None if classes is None else tuple(classes)


def unlabelled(labels: Sequence[str], found: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names of classes that an exported file has in words (`class_labels`), as the data set, `found`, has them."""
    if tuple(labels) == class_labels(None, len(labels)):
        return None
    imagenet = _imagenet_names(len(labels))
    if imagenet and tuple(labels) == class_labels(imagenet, len(imagenet)):
        return imagenet if found and set(found) <= set(imagenet) else None  # which may just have been guessed
    names = dict(zip(class_labels(found, len(found)), found, strict=True)) if found else {}
    return tuple(names.get(label, label) for label in labels)


def warn_of_other_preprocessing(preprocessing: Preprocessing, checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Warn if a run that goes on from a checkpoint prepares its images otherwise than before."""
    recorded = read_record(checkpoint, path).preprocessing
    other = {name: value for name, value in recorded.items() if value not in (None, getattr(preprocessing, name))}
    if other:
        logger.warning("%s was trained with other images than this run's (%s): it had %s", path, preprocessing, other)


def config_preprocessing(config: Mapping[str, Any]) -> Preprocessing:
    """How timm's configuration of a model (`pretrained_cfg`) has images prepared."""
    found = resolve_data_config(pretrained_cfg=dict(config) or {"mean": None})
    fields = {name: found[name] for name in ("crop_pct", "interpolation", "crop_mode")}
    return Preprocessing(found["input_size"][-1], mean=tuple(found["mean"]), std=tuple(found["std"]), **fields)


def named_preprocessing(name: str) -> Preprocessing:
    """How the model of this name in timm has images prepared."""
    config = timm.models.get_pretrained_cfg(name)
    return config_preprocessing(config.to_dict() if config else {})


def check_name(name: str, flag: str, *, family: str = "") -> None:
    """Raise ValueError, which names `flag`, if timm knows no such model; `family` narrows the list it points to."""
    if not timm.models.is_model(name.split(".")[0]):
        raise ValueError(f"{flag} {name} is not known; see timm.list_models({family!r})")


def check_input_size(module: nn.Module, size: int, what: str) -> None:
    """Raise ValueError, which names `what`, if the network cannot take images of size x size px.

    Its shapes are tried on the meta device, where nothing is computed; its mode is put back.
    """
    tensors = chain(module.named_parameters(), module.named_buffers())
    training = module.training
    try:
        image = torch.empty(1, 3, size, size, device="meta")
        with torch.no_grad():
            functional_call(module.eval(), {name: tensor.to("meta") for name, tensor in tensors}, args=(image,))
    except (RuntimeError, AssertionError, ValueError) as error:
        cause = first_line(error)
        if "meta" not in cause:  # a network that mixes devices cannot be tried so
            raise ValueError(f"{what} cannot take --input_size {size}: {cause}") from error
    finally:
        module.train(training)


def set_slope(slope: float, *modules: nn.Module) -> None:
    """Set lambda in the networks that have one; other timm models do not."""
    for module in modules:
        if hasattr(module, "change_act"):
            module.change_act(slope)


class Renormalized(nn.Module):
    """The network for images (N, 3, H, W) that are normalized with `given` mean and std, where it wants others."""

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


# -- the door


def is_vanillanet(name: str) -> bool:
    return name.split(".")[0] in VARIANTS


def shape_arguments(name: str, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments of the model `name` that the shapes in a state dict tell.

    For any timm model that is the number of classes; for a VanillaNet also the form, the channels, and n of the series
    activation. Its strides and adaptive pools are in no tensor: they are the variant's. What a state dict of something
    else does not tell is left out, and loading it then says what does not fit.
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
        found["act_num"] = weights[f"{act}.weight"].shape[-1] // 2  # a kernel of 2n + 1
    dims = [len(weights[layer]) for layer in (f"{stem}.weight", *stages) if layer in weights]
    if len(dims) == len(VARIANTS[name.split(".")[0]]["dims"]):
        found.update(dims=dims, width_mult=1.0)
    return found


def is_file(source: str | Path) -> bool:
    """Whether a source of a network is a file, be it a missing one, and no name of a model or address of a hub."""
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
    """A network on the CPU in eval mode, with its weights and lambda, and what travels with it.

    Args:
        source: a file of weights (a checkpoint of ours, of the published code or of timm, safetensors), MODEL=FILE for
            one that does not record its model, a name in timm, or an address: hf-hub:OWNER/NAME, local-dir:FOLDER.
        name: of the model, for a file, in place of the one that it records.
        fallback: likewise, for a file that records none.
        key, order, prefix: of the weights in a file, as for `read`.
        pretrained: load the weights of a name or address.
        flag, mend: what the user named it by, and can do where there are no weights, for messages.
        arguments: of the model in timm; they win over those that the tensors tell.

    Raises:
        ValueError: there is no such model or file, it cannot be read, or the weights do not fit.
    """
    # What is meant: MODEL=FILE, a name or an address, or else a file.
    model, equals, file = str(source).partition("=")
    if equals and not os.path.isfile(source) and os.sep not in model:
        name, source = model, file
    elif not is_file(source):
        if name is not None:
            raise ValueError(f"{flag} {name} is for a checkpoint that does not name its model; {source} is a name")
        return _open_name(str(source), pretrained=pretrained, flag=flag, mend=mend, arguments=arguments)
    if not pretrained:
        raise ValueError(f"--random_weights is for a model's name, and {source} is a file of weights")
    # Which model the weights are of: as the user says, or the file, or the caller.
    weights = read(source, key=key, order=order, prefix=prefix)
    record = weights.record
    wanted, name = name, name or record.model or fallback
    if name is None:
        raise ValueError(f"{source} does not record which model it is of: name one by {flag}")
    check_name(name, flag)
    if wanted is not None and record.model not in (None, wanted):
        logger.info("%s %s instead of %s, which %s records", flag, wanted, record.model, source)
    # Its arguments: from the shapes of the tensors, if the caller does not set them.
    _check_arguments(name, arguments, flag)
    told = shape_arguments(name, weights.tensors)
    if "width_mult" in arguments:
        told.pop("dims", None)
    # timm's own record of arguments comes last: a tensor's shape and a caller know better.
    extra = record.arguments.get("model_kwargs")
    try:
        module = timm.create_model(name, **(dict(extra or {}) | told | arguments))
    except (TypeError, ValueError, RuntimeError, AssertionError):
        if not extra:
            raise
        logger.warning("%s: passed over what it records of model_kwargs, which %s does not take", source, name)
        module = timm.create_model(name, **(told | arguments))
    load_weights(module, weights.tensors, path=source)
    set_slope(1.0 if record.slope is None else record.slope, module)
    # As the file records it, and as timm has it for what it does not record.
    images = dict(record.preprocessing) | ({"crop_pct": None} if record.preprocessing.get("native") else {})
    images = replace(config_preprocessing(module.pretrained_cfg), **images)
    classes = record.classes
    fashion = tuple(torchvision.datasets.FashionMNIST.classes)
    if classes is None and record.arguments.get("data_set") == "FMNIST" and module.num_classes == len(fashion):
        classes = fashion  # which older checkpoints do not name
    if classes is not None and len(classes) != module.num_classes:
        logger.warning(
            "%s: passed over its %d names of classes: there are %d", source, len(classes), module.num_classes
        )
        classes = None
    return Network(module.eval(), name, images, classes, record.loss or CROSS_ENTROPY, str(source), weights)


def _check_arguments(name: str, arguments: Mapping[str, Any], flag: str) -> None:
    """Raise ValueError for arguments of a VanillaNet that another model does not have."""
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
    classes = module.pretrained_cfg.get("label_names") if pretrained else None
    if pretrained and classes is None and not name.startswith("local-dir:"):
        classes = _imagenet_names(module.num_classes)
    own_name = module.pretrained_cfg["architecture"] if name.startswith(HUBS) else name
    return Network(
        module.eval(), own_name, config_preprocessing(module.pretrained_cfg), tuple(classes or ()) or None, source=name
    )
