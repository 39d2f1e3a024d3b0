"""What the processor at hand can do, as far as quantizers have to know."""

import torch


def sums_saturate() -> bool:
    """Whether products of 8-bit numbers are summed in pairs of 16 bits, so that large ones are cut off.

    It is so on x86 without VNNI's instructions. Weights then have to keep to 7 bits.
    """
    return torch.cpu._is_avx2_supported() and not torch.cpu._is_vnni_supported()
