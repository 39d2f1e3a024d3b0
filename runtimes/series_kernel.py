"""One Triton kernel for what follows a deployed layer's dense convolution: max-pool, ReLU, depthwise taps, bias.

The last three are the series-informed activation (section 3.2 of the paper). Tensors are channels-last. Eager PyTorch
takes three launches for all of it and writes the activations to memory in between.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

PLACES = 4  # neighbouring positions of a row for each program; every column that it reads serves all of them
CHANNELS = 64  # for each program
WARPS = 1


@triton.jit
def _column(x, row, column, height, width, channels, c, POOL: tl.constexpr):
    """Return one position after max-pool and ReLU, for all channels of the program; zero outside the map."""
    inside = (row >= 0) & (row < height // POOL) & (column >= 0) & (column < width // POOL) & (c < channels)
    value = tl.zeros_like(c).to(tl.float32)  # a maximum that starts at zero includes the ReLU
    for i in tl.static_range(POOL):
        for j in tl.static_range(POOL):
            place = (row * POOL + i) * width + column * POOL + j
            value = tl.maximum(value, tl.load(x + place * channels + c, mask=inside, other=0.0).to(tl.float32))
    return value


@triton.jit
def series_kernel(
    x, weight, bias, out, height, width, channels, POOL: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr
):
    """Compute four positions of a row, in four accumulators because the compiler would spill one array of them."""
    # Each program computes four neighbouring positions in one row of an image, for CHANNELS channels.
    rows, columns = height // POOL, width // POOL
    line, first = tl.program_id(0), tl.program_id(1) * 4
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    row = line % rows
    x += (line // rows).to(tl.int64) * height * width * channels
    known = c < channels
    start = tl.load(bias + c, mask=known, other=0.0).to(tl.float32)
    a0, a1, a2, a3 = start, start, start, start
    # Go through the rows of taps. Each position of the map is added to those of the four sums that have a tap on it.
    for i in range(SIZE):
        taps = weight + i * SIZE * channels + c
        for j in tl.static_range(SIZE + 3):
            value = _column(
                x, row + i - SIZE // 2, first + j - SIZE // 2, height, width, channels, c, POOL
            )  # read once for each row of taps
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
    """Run the kernel on the device of `x`, or on the CPU with TRITON_INTERPRET=1; arguments as for `series`."""
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
    """Apply max-pool, ReLU, depthwise convolution and bias, in channels-last.

    Args:
        x: (N, H, W, C), contiguous.
        weight: (taps, C), the (2n+1)^2 taps row by row.
        bias: (C,).
        pool: kernel size and stride of the max-pool; 1 for none.

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
