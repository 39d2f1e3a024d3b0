"""The algebra that makes a trained VanillaNet shallow (paper, Deep Training Strategy).

Both functions are pure: they read their arguments, compute in float64 and return a new plain layer in the dtype of the
first argument. They know nothing about the network; each module decides which of its layers to pass.
"""

import torch
from einops import einsum, rearrange
from torch import nn


@torch.no_grad()
def _conv_like(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> nn.Conv2d:
    """Return a Conv2d with the geometry of `conv`, and with `weight` and `bias` in strictly contiguous memory.

    The values are copied into newly allocated parameters. A matrix product may return strides for dimensions of size 1
    that look like channels-last, and a convolution with such strides takes a slow path.
    """
    layer = nn.Conv2d(
        conv.in_channels,
        len(weight),
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        padding_mode=conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    layer.requires_grad_(conv.weight.requires_grad)
    return layer.train(conv.training)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in float64, which MPS lacks, so from there on the CPU."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device).double()


def _bias(conv: nn.Conv2d) -> torch.Tensor:
    """Return the bias of `conv` in float64, (out,), or zeros if `conv` has no bias."""
    return _wide(conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias)


@torch.no_grad()
def fold_bn(conv: nn.Conv2d, bn: nn.modules.batchnorm._BatchNorm) -> nn.Conv2d:
    """Return one convolution equal to `bn(conv(x))` in eval mode.

    BN(y) = gamma (y - mean) / sqrt(var + eps) + beta is an affine map of each output channel, so with
    s = gamma / sqrt(var + eps) the weight becomes s W and the bias s (b - mean) + beta.

    Args:
        conv: weight (out, in / groups, kh, kw), with or without bias; depthwise or dense.
        bn: affine BatchNorm over `out` channels with running statistics.

    Raises:
        ValueError: the widths differ, or the BatchNorm has no affine parameters or no running statistics.
    """
    if bn.num_features != conv.out_channels:
        raise ValueError(f"cannot fold a BatchNorm of {bn.num_features} channels into {conv.out_channels}")
    if bn.running_var is None or bn.weight is None:
        raise ValueError("cannot fold a BatchNorm without running statistics and affine parameters")
    scale = _wide(bn.weight) / (_wide(bn.running_var) + bn.eps).sqrt()
    weight = _wide(conv.weight) * rearrange(scale, "out -> out 1 1 1")
    bias = scale * (_bias(conv) - _wide(bn.running_mean)) + _wide(bn.bias)
    return _conv_like(conv, weight, bias)


@torch.no_grad()
def merge_pointwise(first: nn.Conv2d, second: nn.Conv2d) -> nn.Conv2d:
    """Return one convolution equal to `second(first(x))`, where `second` is 1x1 (paper, Deep Training Strategy).

    W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2). `first` may have any kernel, stride and padding, because
    `second` acts only on the outputs of `first`, which leaves the zero padding of `first` unaffected.

    Args:
        first: weight (mid, in, kh, kw).
        second: weight (out, mid, 1, 1), stride 1, no padding.

    Raises:
        ValueError: `second` is not pointwise, either convolution is grouped, or the widths do not match.
    """
    pointwise = second.kernel_size == (1, 1) and second.stride == (1, 1) and second.padding == (0, 0)
    if not pointwise or second.groups != 1 or first.groups != 1:
        raise ValueError("only a dense convolution followed by a dense 1x1 convolution of stride 1 can be merged")
    if first.out_channels != second.in_channels:
        raise ValueError(f"cannot merge {first.out_channels} outputs into {second.in_channels} inputs")
    mixing = rearrange(_wide(second.weight), "out mid 1 1 -> out mid")
    weight = einsum(mixing, _wide(first.weight), "out mid, mid cin kh kw -> out cin kh kw")
    bias = einsum(mixing, _bias(first), "out mid, mid -> out") + _bias(second)
    return _conv_like(first, weight, bias)
