"""Gradient checkpointing: less of the forward pass is kept for the backward pass, which computes the rest again.

`activations` keeps what convolutions and other matrix products return, which is what costs time, and computes
normalizations, activations and pools again. Pools are among these because keeping their results, with an index of 64
bits for each, costs VanillaNet-6 13 MiB an image more and saves no time that could be measured.

`full` keeps the input of each part of the network, and of the products only those that are long, where a number that is
kept saves much work. Computing VanillaNet-6 again as a whole adds a quarter to the time of its step;
without the long products it adds an eighth, for 3 MiB an image.
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
LONG = 2048  # multiplications for one number of the result
_aten = torch.ops.aten
_PRODUCTS = {_aten.convolution.default, _aten.mm.default, _aten.addmm.default, _aten.bmm.default}
_PRODUCTS |= {getattr(_aten, name).default for name in dir(_aten) if name.startswith("_scaled_dot_product")}
# What is kept passes through hooks on saved tensors, so that they can count it; older PyTorch has no such option.
_HOOKS = {name: True for name in inspect.signature(checkpoint).parameters if name == "respect_saved_tensors_hooks"}


@contextmanager
def _second_pass(module: nn.Module, kept: AbstractContextManager) -> Iterator[None]:
    """BatchNorms move copies of their running statistics, which are thrown away at the end.

    They are not just told to keep none: that saves fewer tensors for the backward pass than the first forward pass
    did, which checkpointing takes for an error.
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
    """`function(*args, **kwargs)`, of which the backward pass keeps what `mode` says.

    Args:
        module: whose BatchNorm statistics move once, although the function is computed twice.
        mode: `activations` or `full`.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    if not torch.compiler.is_compiling():
        contexts = partial(_contexts, module, mode)
        return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **_HOOKS, **kwargs)
    # The compiler traces the first pass, takes what it moves from there, and plans the second pass by itself.
    return checkpoint(function, *args, use_reentrant=False, context_fn=_CONTEXTS[mode], **kwargs)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Modules with layers of their own that stand in a row with others: ResNet's bottlenecks, Swin's blocks."""
    rows = [module for module in network.modules() if isinstance(module, nn.Sequential | nn.ModuleList)]
    blocks = {child for row in rows for child in row if any(True for _ in child.children())}
    return [block for block in blocks if not any(inner in blocks for inner in block.modules() if inner is not block)]


def set_grad_checkpointing(network: nn.Module, mode: str) -> None:
    """Train a network with gradient checkpointing from now on: a VanillaNet by its stages, any other by its blocks.

    Args:
        network: as built; a timm model or features of one.
        mode: of `MODES`.

    Raises:
        ValueError: the network has no blocks, as AlexNet has none.
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
