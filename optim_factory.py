"""Parameter groups, the optimizer, and the schedules as pure functions of a step."""

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
    """A linear warm-up followed by half a cosine, as the published code has it: the value `base` comes twice.

    Args:
        step: optimizer steps taken so far, counted from 0; the value is the one to take the next step with.
        total_steps: length of the whole schedule; from there on the value is `final`.
        warmup_steps: length of the warm-up, which begins at 0; a single step has the value 0, and 0 is no warm-up.
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
    """A linear warm-up from 0, then `base`, multiplied by `gamma` at each milestone, also at one within the warm-up.

    `step` counts the optimizer steps taken so far; the value is the one to take the next step with.
    """
    value = base * gamma ** sum(step >= milestone for milestone in milestones)
    return value * step / warmup_steps if step < warmup_steps else value


def activation_slope(epoch: int, *, decay_epochs: int, linear: bool = True, start: float = 0.0) -> float:
    """Lambda of an epoch (paper, Deep Training Strategy): from `start` at epoch 0 to exactly 1 at `decay_epochs`.

    Args:
        epoch: counted from 0; lambda is constant within an epoch.
        decay_epochs: length of the ramp; 0 trains without deep training, lambda 1 throughout.
        linear: epoch / decay_epochs; otherwise half a cosine.
        start: lambda of the network that training begins with, 1 for a finished one.
    """
    if epoch >= decay_epochs:
        return 1.0
    ramp = epoch / decay_epochs
    if not linear:
        ramp = 0.5 * (1 - math.cos(math.pi * ramp))
    return start + (1 - start) * ramp


def parameter_groups(model: nn.Module, *, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """The optimizer's parameter groups, in the order of the published code, so that its checkpoints resume.

    Biases, other one-dimensional parameters (BatchNorms), and what the model's `no_weight_decay()` names do not decay.
    Without layer decay there are two groups: the parameters that decay, and the others. With `layer_decay` below 1
    there are two a layer, whose learning rate is scaled by layer_decay ** (layers + 1 - l): the stem is layer 0, the
    classifier the last, and the model's `group_matcher` counts those between.

    Returns:
        Groups of `params`, `weight_decay` and `lr_scale`, which `set_hyperparameters` reads.
    """
    spared = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    if hasattr(model, "no_weight_decay"):
        spared += model.no_weight_decay()
    # The groups are asked for with a decay of 1 and scaled, because timm puts everything into one group where it is 0.
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
    """Which of eps, betas and momentum one of timm's optimizers takes. ValueError for an unknown one."""
    return [name for name in ("eps", "betas", "momentum") if getattr(_optimizer_info(opt), f"has_{name}")]


def fusible(opt: str) -> bool:
    """Whether one of timm's optimizers is one of torch's that can be fused."""
    if opt.lower().startswith("lookahead_"):  # its optimizer is behind another, which hands on no `found_inf`
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
    """One of timm's optimizers over the `parameter_groups` of the model, with what it takes of the other settings.

    On a GPU it is fused where torch has it so: one kernel for many parameters, and none for the guard's copies.

    Raises:
        ValueError: an unknown optimizer, one that needs second derivatives or is not installed, or as many betas as it
            does not have.
    """
    info = _optimizer_info(opt)
    if info.second_order:
        raise ValueError(f"--opt {opt} needs second derivatives, which this training loop does not compute")
    settings = {"eps": eps, "betas": betas, "momentum": momentum}
    kwargs = {name: settings[name] for name in taken_by(opt) if settings[name] is not None}
    if "betas" in kwargs and len(kwargs["betas"]) != info.num_betas:
        raise ValueError(f"--opt {opt} takes {info.num_betas} values for --opt_betas, not {len(kwargs['betas'])}")
    try:
        if next(model.parameters()).is_cuda and fusible(opt):
            kwargs["fused"] = True
        groups = parameter_groups(model, weight_decay=weight_decay, layer_decay=layer_decay)
        return create_optimizer_v2(groups, opt=opt, lr=lr, weight_decay=weight_decay, **kwargs)
    except (AssertionError, ImportError) as error:  # of one from a package that is not installed, or for GPUs only
        raise ValueError(f"--opt {opt} cannot be used here: {error}") from error


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Write a step's learning rate, scaled by group, and weight decay into the groups that have one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if group["weight_decay"] > 0:
            group["weight_decay"] = weight_decay


def _keep_statistics(module: nn.Module, _inputs: Any) -> None:
    module.training = False


def freeze(model: nn.Module, stages: int | str) -> None:
    """Keep the stem and the first stages of a model of timm's as they are, the statistics of their BatchNorms included.

    Args:
        stages: how many; "all" leaves the classifier alone to be trained. ValueError if there are not as many.
    """
    if stages == "all":
        heads = model.pretrained_cfg["classifier"]
        if hasattr(model, "change_act"):
            heads = "cls"  # VanillaNet's two convolutions and the BatchNorm between them
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
        frozen = {name for name, _ in model.named_parameters() if not name.startswith(heads)}
    else:
        groups = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
        count = max(groups.values()) - 1  # without the stem, 0, and the classifier, the last one
        if stages > count:
            raise ValueError(f"--freeze_stages {stages}: there are {count} stages; all leaves the classifier alone")
        frozen = {name for name, group in groups.items() if group <= stages}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.weight" in frozen:
            module.register_forward_pre_hook(_keep_statistics)  # `train()` of the whole model reaches it, too
