"""Parameter groups, the optimizer, freezing, and schedules as pure functions of the step or epoch."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import (
    OptimInfo,
    create_optimizer_v2,
    get_optimizer_class,
    get_optimizer_info,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import nn


def cosine_schedule(step: float, total_steps: float, *, base: float, final: float, warmup_steps: int = 0) -> float:
    """Linear warm-up, then half a cosine. As in the published code, the last warm-up step already has the value `base`.

    Args:
        step: number of optimizer steps taken so far; the value is for the next step.
        total_steps: length of the whole schedule; from this step on, the value is `final`.
        warmup_steps: length of the warm-up, which starts at 0. A single warm-up step has the value 0.
    """
    if step < warmup_steps:
        return base * step / max(warmup_steps - 1, 1)
    if step >= total_steps:
        return final
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def step_schedule(
    step: int, *, base: float, milestones: Sequence[int], gamma: float = 0.1, warmup_steps: int = 0
) -> float:
    """Linear warm-up from 0, then `base`, multiplied by `gamma` at each milestone, even one within the warm-up.

    `step` is the number of optimizer steps taken so far; the value is for the next step.
    """
    value = base * gamma ** sum(step >= milestone for milestone in milestones)
    return value * step / warmup_steps if step < warmup_steps else value


def activation_slope(epoch: int, *, decay_epochs: int, linear: bool = True, start: float = 0.0) -> float:
    """Lambda of an epoch (paper, Deep Training Strategy), from `start` at epoch 0 up to exactly 1 at `decay_epochs`.

    Args:
        epoch: counted from 0; lambda is constant within an epoch.
        decay_epochs: length of the ramp; 0 turns deep training off, with lambda 1 throughout.
        linear: the ramp is epoch / decay_epochs; otherwise it is half a cosine.
        start: lambda of the network before training; 1 for a network that has finished its ramp.
    """
    if epoch >= decay_epochs:
        return 1.0
    ramp = epoch / decay_epochs
    if not linear:
        ramp = 0.5 * (1 - math.cos(math.pi * ramp))
    return start + (1 - start) * ramp


def parameter_groups(model: nn.Module, *, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Build the optimizer's parameter groups in the published code's order, so that its checkpoints can be resumed.

    Biases, other one-dimensional parameters (BatchNorms) and those that the model's `no_weight_decay()` names do not
    decay. Without layer decay there are two groups: the parameters that decay, and the others. With `layer_decay` below
    1 there are two for each layer l, with the learning rate scaled by layer_decay ** (layers + 1 - l). The stem is
    layer 0, the classifier is the last one, and the model's `group_matcher` numbers the layers in between.

    Returns:
        Groups with `params`, `weight_decay`, and `lr_scale` for `set_hyperparameters`.
    """
    spared = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    if hasattr(model, "no_weight_decay"):
        spared += model.no_weight_decay()
    # Build the groups with a decay of 1 and scale it, because timm puts all parameters into one group if it is 0.
    shared = {"weight_decay": 1.0, "no_weight_decay_list": spared, "weight_decay_exclude_1d": True}
    if layer_decay < 1.0:
        groups = param_groups_layer_decay(model, layer_decay=layer_decay, **shared)
    else:
        groups = param_groups_weight_decay(model, **shared)
        groups.sort(key=lambda group: group["weight_decay"], reverse=True)
    return [
        {**group, "weight_decay": weight_decay * group["weight_decay"], "lr_scale": group.get("lr_scale", 1.0)}
        for group in groups
    ]


def _optimizer_info(opt: str) -> OptimInfo:
    try:
        return get_optimizer_info(opt.lower().removeprefix("lookahead_"))
    except ValueError as error:
        raise ValueError(f"--opt {opt} is not one of timm's optimizers ({error})") from None


def taken_by(opt: str) -> list[str]:
    """Return which of eps, betas and momentum timm's optimizer `opt` takes. Raises ValueError if it is unknown."""
    return [name for name in ("eps", "betas", "momentum") if getattr(_optimizer_info(opt), f"has_{name}")]


def fusible(opt: str) -> bool:
    """Whether timm's optimizer `opt` is a PyTorch optimizer with a fused implementation."""
    if opt.lower().startswith("lookahead_"):  # Lookahead does not pass `found_inf` on to the optimizer it wraps
        return False
    return "fused" in inspect.signature(get_optimizer_class(opt.lower(), bind_defaults=False)).parameters


def build_optimizer(
    model: nn.Module,
    opt: str,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    eps: float | None = None,
    betas: Sequence[float] | None = None,
    momentum: float | None = None,
) -> torch.optim.Optimizer:
    """Build timm's optimizer `opt` over the model's `parameter_groups`, with those of the other settings that it takes.

    PyTorch's fused implementation is used where there is one: it updates a parameter in one pass, and on a GPU many
    parameters in one kernel. On a GPU without a gradient scaler, `engine.FiniteGuard` then needs no copies of them.

    Raises:
        ValueError: `opt` is unknown, not usable here or needs second derivatives, or the number of betas is wrong.
    """
    info = _optimizer_info(opt)
    if info.second_order:
        raise ValueError(f"--opt {opt} needs second derivatives, which this training loop does not compute")
    settings = {"eps": eps, "betas": betas, "momentum": momentum}
    kwargs = {name: settings[name] for name in taken_by(opt) if settings[name] is not None}
    if "betas" in kwargs and len(kwargs["betas"]) != info.num_betas:
        raise ValueError(f"--opt {opt} takes {info.num_betas} values for --opt_betas, not {len(kwargs['betas'])}")
    try:
        if fusible(opt):
            kwargs["fused"] = True
        groups = parameter_groups(model, weight_decay=weight_decay, layer_decay=layer_decay)
        return create_optimizer_v2(groups, opt=opt, lr=lr, weight_decay=weight_decay, **kwargs)
    except (AssertionError, ImportError) as error:  # its package is not installed, or it is for GPUs only
        raise ValueError(f"--opt {opt} cannot be used here: {error}") from error


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set the learning rate of a step, scaled for each group, and the weight decay of the groups that decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if group["weight_decay"] > 0:
            group["weight_decay"] = weight_decay


def _keep_statistics(module: nn.Module, _inputs: Any) -> None:
    module.training = False


def freeze(model: nn.Module, stages: int | str) -> None:
    """Freeze the stem and the first stages of a timm model, including the statistics of their BatchNorms.

    Args:
        stages: the number of stages; "all" freezes everything but the classifier. ValueError if there are fewer.
    """
    if stages == "all":
        # VanillaNet's classifier is two convolutions and a BatchNorm, of which timm knows the convolutions.
        heads = "cls" if hasattr(model, "change_act") else model.pretrained_cfg.get("classifier")
        if not heads:
            raise ValueError(f"--freeze_stages all: timm does not name the classifier of {type(model).__name__}")
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
        frozen = {name for name, _ in model.named_parameters() if not name.startswith(heads)}
    else:
        if not hasattr(model, "group_matcher"):
            unknown = f"--freeze_stages {stages}: timm does not name the stages of {type(model).__name__}"
            raise ValueError(f"{unknown}; all leaves the classifier alone")
        groups = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
        count = max(groups.values()) - 1  # without the stem (group 0) and the classifier (the last group)
        if stages > count:
            raise ValueError(f"--freeze_stages {stages}: there are {count} stages; all leaves the classifier alone")
        frozen = {name for name, group in groups.items() if group <= stages}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.weight" in frozen:
            module.register_forward_pre_hook(_keep_statistics)  # in a hook, because the model's `train()` would undo it
