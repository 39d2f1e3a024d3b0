"""What the processor in use supports."""

import torch


def sums_saturate() -> bool:
    """Whether products of 8-bit numbers are summed in pairs in 16 bits, so that large sums are cut off.

    This is the case on x86 without AVX-512 VNNI; torch does not tell AVX-VNNI. Weights then have to keep to 7 bits.
    """
    return torch.cpu._is_avx2_supported() and not torch.cpu._is_vnni_supported()


def has_bfloat16() -> bool:
    """Return whether oneDNN, which computes PyTorch's convolutions, has optimized bfloat16 kernels here."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_amx() -> bool:
    """Return whether the processor multiplies matrices in tiles (AMX)."""
    return torch.cpu._is_amx_tile_supported()


def slow_at_wide_convolutions() -> bool:
    """Return whether oneDNN's float32 kernel for 1x1 convolutions is the AVX2 one, which is slow with many channels."""
    return torch.cpu._is_avx2_supported() and not torch.cpu._is_avx512_supported()
