"""The limit of the machine: the rate of its fastest large matrix product in each precision."""

import time
from collections.abc import Callable

import torch

from runtimes.processor import has_bfloat16
from runtimes.running import set_tf32

SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # the smallest at which the rate no longer rises, and twice that
REPEATS = 5
PILOT = 8  # the first size tried is the smallest one divided by this
SLOW = 1.0  # seconds; a kernel that would take longer for the largest size is given up
# Whether oneDNN supports a type on this processor, for the types that not every processor has.
ONEDNN_HAS = {
    torch.bfloat16: has_bfloat16,
    torch.float16: lambda: torch.ops.mkldnn._is_mkldnn_fp16_supported(),  # builds without oneDNN lack the operator
}


def wait(device: str) -> None:
    """Wait until a GPU has finished its work; a CPU has nothing pending."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def _floating(dtype: torch.dtype, precision: str = "fp32"):
    def products(size: int, device: str) -> list[Callable[[], torch.Tensor]]:
        set_tf32(precision, device)
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found = [lambda: a @ b]
        if device == "cpu" and ONEDNN_HAS.get(dtype, torch.backends.mkldnn.is_available)():
            # Reorder the weight beforehand, as an inference engine does.
            packed = torch.ops.mkldnn._reorder_linear_weight(b, size)
            found.append(lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""))
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
        # As in the engine. For results in a type without instructions here, oneDNN would take its reference kernel.
        dtype = torch.bfloat16 if has_bfloat16() else torch.float32

        def quantized() -> torch.Tensor:
            return torch.ops.onednn.qlinear_pointwise(
                unsigned, one, middle, packed, scale, zero, None, 1.0, 0, dtype, "none", [], ""
            )

        found.append(quantized)
    return found


PRODUCTS = {
    "default": _floating(torch.float32, "tf32"),  # `default` runs convolutions in TF32
    "fp32": _floating(torch.float32),
    "tf32": _floating(torch.float32, "tf32"),
    "bf16": _floating(torch.bfloat16),
    "fp16": _floating(torch.float16),
    "int8": _int8,
}


@torch.inference_mode()
def best_product(precision: str, device: str = "cpu") -> float:
    """Return the GFLOP/s (2 n^3 operations) of the fastest square matrix product over sizes, kernels and repeats.

    A kernel that is slow at a small size is given up there: without instructions for a precision, a library falls back
    to a plain loop, which takes minutes for one large product.
    """
    sizes = SIZES[torch.device(device).type]
    best, given_up = 0.0, set()
    for size in (sizes[0] // PILOT, *sizes):
        for number, product in enumerate(PRODUCTS[precision](size, device)):
            if number in given_up:
                continue
            rate = 0.0
            for _ in range(REPEATS):
                start = time.perf_counter()
                product()
                wait(device)
                rate = max(rate, 2 * size**3 / (time.perf_counter() - start) / 1e9)
            if 2 * sizes[-1] ** 3 / 1e9 / rate > SLOW:
                given_up.add(number)
            best = max(best, rate)
    return best
