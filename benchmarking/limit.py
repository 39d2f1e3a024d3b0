"""How fast the machine is: its best large matrix product in each precision."""

import time
from collections.abc import Callable

import torch

SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # the smallest at which the rate has stopped rising, and twice it
REPEATS = 5


def _packed(weight: torch.Tensor, a: torch.Tensor) -> Callable[[], torch.Tensor]:
    """oneDNN's product with a weight laid out beforehand, as an inference engine calls it."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(a))
    return lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")


def _floating(dtype: torch.dtype, tf32: bool = False):
    def products(size: int, device: str) -> list[Callable[[], torch.Tensor]]:
        if device != "cpu":
            torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found = [lambda: a @ b]
        if device == "cpu" and torch.backends.mkldnn.is_available():
            found.append(_packed(b, a))
        return found

    return products


def _int8(size: int, device: str) -> list[Callable[[], torch.Tensor]]:
    a, b = (torch.randint(-128, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2))
    found = [lambda: torch._int_mm(a, b)]
    if device == "cpu" and torch.backends.mkldnn.is_available():
        unsigned = (a.int() + 128).to(torch.uint8)
        packed = torch.ops.onednn.qlinear_prepack(b, [size, size])
        scale, zero = torch.ones(size), torch.zeros(size, dtype=torch.int32)
        one, middle = torch.tensor(1.0), torch.tensor(128)

        def quantized() -> torch.Tensor:
            return torch.ops.onednn.qlinear_pointwise(
                unsigned, one, middle, packed, scale, zero, None, 1.0, 0, torch.bfloat16, "none", [], ""
            )

        found.append(quantized)
    return found


PRODUCTS = {
    "fp32": _floating(torch.float32),
    "tf32": _floating(torch.float32, tf32=True),
    "bf16": _floating(torch.bfloat16),
    "fp16": _floating(torch.float16),
    "int8": _int8,
}


@torch.inference_mode()
def best_product(precision: str, device: str = "cpu") -> float:
    """GFLOP/s (2 n^3 operations) of the fastest product of square matrices found, over sizes, kernels and repeats."""
    best = 0.0
    for size in SIZES[torch.device(device).type]:
        for product in PRODUCTS[precision](size, device):
            for _ in range(REPEATS):
                start = time.perf_counter()
                product()
                if device != "cpu":
                    torch.cuda.synchronize()
                best = max(best, 2 * size**3 / (time.perf_counter() - start) / 1e9)
    return best
