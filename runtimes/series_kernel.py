"""What follows a deployed layer's 1x1 convolution, in one Triton kernel: max-pool, ReLU, depthwise taps, bias.

It is section 3.2 of the paper, the series-informed activation, in channels-last. Eager PyTorch takes three launches for
it and writes the activations between them.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

PLACES = 4  # neighbouring places of a row that a program computes; each column that it reads serves all of them
CHANNELS = 64  # of a program
WARPS = 1


@triton.jit
def _column(x, row, column, height, width, channels, c, POOL: tl.constexpr):
    """One pooled and rectified place of all the program's channels; zero outside the map."""
    inside = (row >= 0) & (row < height // POOL) & (column >= 0) & (column < width // POOL) & (c < channels)
    value = tl.zeros_like(c).to(tl.float32)  # the ReLU: nothing below zero counts
    for i in tl.static_range(POOL):
        for j in tl.static_range(POOL):
            place = (row * POOL + i) * width + column * POOL + j
            value = tl.maximum(value, tl.load(x + place * channels + c, mask=inside, other=0.0).to(tl.float32))
    return value


@triton.jit
def series_kernel(
    x, weight, bias, out, height, width, channels, POOL: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr
):
    """A row's four places, as four accumulators: in one array of rows the compiler would spill."""
    # A program's place: a row of an image, four neighbours in it, and CHANNELS channels.
    rows, columns = height // POOL, width // POOL
    line, first = tl.program_id(0), tl.program_id(1) * 4
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    row = line % rows
    x += (line // rows).to(tl.int64) * height * width * channels
    known = c < channels
    start = tl.load(bias + c, mask=known, other=0.0).to(tl.float32)
    a0, a1, a2, a3 = start, start, start, start
    # Row by row of taps; a place of the map goes into each of the four sums that has a tap on it.
    for i in range(SIZE):
        taps = weight + i * SIZE * channels + c
        for j in tl.static_range(SIZE + 3):
            value = _column(
                x, row + i - SIZE // 2, first + j - SIZE // 2, height, width, channels, c, POOL
            )  # one read for each row of taps
            if j < SIZE:
                a0 += value * tl.load(taps + j * channels, mask=known, other=0.0).to(tl.float32)
            if j >= 1 and j - 1 < SIZE:
                a1 += value * tl.load(taps + (j - 1) * channels, mask=known, other=0.0).to(tl.float32)
            if j >= 2 and j - 2 < SIZE:
                a2 += value * tl.load(taps + (j - 2) * channels, mask=known, other=0.0).to(tl.float32)
            if j >= 3:
                a3 += value * tl.load(taps + (j - 3) * channels, mask=known, other=0.0).to(tl.float32)
    out += (line.to(tl.int64) * columns + first) * channels + c
    tl.store(out, a0, mask=known & (first < columns))
    tl.store(out + channels, a1, mask=known & (first + 1 < columns))
    tl.store(out + 2 * channels, a2, mask=known & (first + 2 < columns))
    tl.store(out + 3 * channels, a3, mask=known & (first + 3 < columns))


def launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, pool: int) -> torch.Tensor:
    """The kernel on the device of `x`, or with TRITON_INTERPRET=1 on the CPU; arguments as for `series`."""
    batch, height, width, channels = x.shape
    rows, columns = height // pool, width // pool
    out = x.new_empty(batch, rows, columns, channels)
    size = round(len(weight) ** 0.5)
    grid = (batch * rows, triton.cdiv(columns, PLACES), triton.cdiv(channels, CHANNELS))
    series_kernel[grid](
        x, weight, bias, out, height, width, channels, POOL=pool, SIZE=size, CHANNELS=CHANNELS, num_warps=WARPS
    )
    return out


@torch.library.custom_op("vanillanet::series", mutates_args=(), device_types="cuda")
def series(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, pool: int) -> torch.Tensor:
    """max-pool, ReLU, depthwise convolution and bias, in channels-last.

    Args:
        x: (N, H, W, C), contiguous.
        weight: (taps, C), the (2n+1)^2 taps row by row.
        bias: (C,).
        pool: the max-pool's kernel and stride; 1 for none.

    Returns:
        (N, H // pool, W // pool, C)
    """
    return launch(x, weight, bias, pool)


@series.register_kernel("cpu")
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, pool: int) -> torch.Tensor:
    size, channels = round(len(weight) ** 0.5), x.shape[-1]
    taps = weight.T.reshape(channels, 1, size, size)
    maps = F.relu(F.max_pool2d(x.permute(0, 3, 1, 2), kernel_size=pool))
    return F.conv2d(maps, taps, bias, padding=size // 2, groups=channels).permute(0, 2, 3, 1).contiguous()


@series.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, pool: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // pool, x.shape[2] // pool, x.shape[3])
