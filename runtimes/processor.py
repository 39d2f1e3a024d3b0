"""What the processor at hand can compute in."""

import torch


def sums_saturate() -> bool:
    """Whether products of 8-bit numbers are summed in pairs of 16 bits, so that large ones are cut off.

    It is so on x86 without VNNI's instructions. Weights then have to keep to 7 bits.
    """
    return torch.cpu._is_avx2_supported() and not torch.cpu._is_vnni_supported()


def has_bfloat16() -> bool:
    """Whether oneDNN, which computes PyTorch's convolutions, has kernels for bfloat16 here and no mere reference."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def slow_at_wide_convolutions() -> bool:
    """Whether oneDNN's float32 kernel for 1x1 convolutions is the one for AVX2, slow at many channels."""
    return torch.cpu._is_avx2_supported() and not torch.cpu._is_avx512_supported()
