"""Gradient checkpointing: keep fewer results of the forward pass, and recompute the rest in the backward pass.

`activations` keeps the results of convolutions and other matrix products, which take most of the time. Normalizations,
activations and pools are recomputed. Keeping the results of the pools, with a 64-bit index for each, would cost
VanillaNet-6 another 13 MiB per image and save no measurable time.

`full` keeps the input of each part of the network, and the results of long products only, where each stored value
saves much work. Recomputing all of VanillaNet-6 adds a quarter to the time of a training step; without the long
products, recomputing adds an eighth, at a cost of 3 MiB per image.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

__all__ = ["MODES", "checkpointed", "set_grad_checkpointing"]

MODES = ("none", "activations", "full")
LONG = 2048  # multiplications per value of the result
_aten = torch.ops.aten
_PRODUCTS = {_aten.convolution.default, _aten.mm.default, _aten.addmm.default, _aten.bmm.default}
_PRODUCTS |= {getattr(_aten, name).default for name in dir(_aten) if name.startswith("_scaled_dot_product")}
# Pass the kept tensors through saved-tensor hooks, so that hooks can count them; older PyTorch lacks this option.
_HOOKS = {name: True for name in inspect.signature(checkpoint).parameters if name == "respect_saved_tensors_hooks"}


@contextmanager
def _second_pass(module: nn.Module, kept: AbstractContextManager) -> Iterator[None]:
    """Let BatchNorms update copies of their running statistics while recomputing, and discard the copies at the end.

    If the statistics were turned off instead, BatchNorms would save fewer tensors for the backward pass than in the
    first forward pass, which checkpointing reports as an error.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    own = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in own:
        setattr(norm, name, buffer.clone())
    try:
        with kept:
            yield
    finally:
        for norm, name, buffer in own:
            setattr(norm, name, buffer)


def _keep_products(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_long_products(context, op, *args, **kwargs) -> CheckpointPolicy:
    long = op is _aten.convolution.default and args[1][0].numel() >= LONG
    return CheckpointPolicy.MUST_SAVE if long else CheckpointPolicy.PREFER_RECOMPUTE


_CONTEXTS = {
    "activations": partial(create_selective_checkpoint_contexts, _keep_products),
    "full": partial(create_selective_checkpoint_contexts, _keep_long_products),
}


def _contexts(module: nn.Module, mode: str) -> tuple[AbstractContextManager, AbstractContextManager]:
    first, second = _CONTEXTS[mode]()
    return first, _second_pass(module, second)


def checkpointed(function: Callable, module: nn.Module, mode: str, *args: Any, **kwargs: Any) -> Any:
    """Call `function(*args, **kwargs)`, keeping for the backward pass only what `mode` says.

    Args:
        module: the module whose BatchNorm statistics are updated only once, although the function runs twice.
        mode: `activations` or `full`.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    if not torch.compiler.is_compiling():
        contexts = partial(_contexts, module, mode)
        return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **_HOOKS, **kwargs)
    # The compiler takes the buffer updates from its trace of the first pass, and plans the second pass itself.
    return checkpoint(function, *args, use_reentrant=False, context_fn=_CONTEXTS[mode], **kwargs)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Return the innermost entries of Sequentials and ModuleLists that have children: ResNet's and Swin's blocks."""
    rows = [module for module in network.modules() if isinstance(module, nn.Sequential | nn.ModuleList)]
    blocks = {child for row in rows for child in row if any(True for _ in child.children())}
    return [block for block in blocks if not any(inner in blocks for inner in block.modules() if inner is not block)]


def set_grad_checkpointing(network: nn.Module, mode: str) -> None:
    """Turn on gradient checkpointing: for the stem and stages of a VanillaNet, or the blocks of any other network.

    Args:
        network: a timm model or its features, as built.
        mode: one of `MODES`.

    Raises:
        ValueError: the network has no blocks; AlexNet, for example.
    """
    if mode == "none":
        return
    if hasattr(network, "checkpoint_mode"):
        network.set_grad_checkpointing(True, mode)
        return
    blocks = _blocks(network)
    if not blocks:
        raise ValueError(f"--grad_checkpointing {mode}: {type(network).__name__} has no blocks to compute again")
    for block in blocks:
        block.forward = partial(checkpointed, block.forward, block, mode)
