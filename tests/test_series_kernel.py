"""The Triton kernel without a card: interpreted against float64, compiled ahead of time, and the network around it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import models
import runtimes
from runtimes import graphs

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from runtimes import series_kernel
from runtimes.series_network import SeriesNetwork

ROOT = Path(__file__).parents[1]
# Pool sizes, n of 1 to 4, odd maps and channels, batches, precisions; with `every`, each with each. In a process of its
# own, which Triton is imported into as an interpreter.
INTERPRETED = """
import sys
import torch
from runtimes.series_kernel import launch, series
torch.manual_seed(0)
SHAPES = (1, 1, 2, 3, 5, 70), (2, 2, 1, 5, 6, 3), (3, 1, 1, 2, 2, 8), (4, 2, 2, 3, 7, 5)
KINDS = (torch.float32, 1e-6, SHAPES), (torch.float16, 2e-3, SHAPES[1:2]), (torch.bfloat16, 1e-2, SHAPES[2:3])
for dtype, bound, shapes in KINDS:
    for n, pool, batch, height, width, channels in SHAPES if "every" in sys.argv else shapes:
        taps = torch.randn((2 * n + 1) ** 2, channels).div(2 * n + 1).to(dtype)
        x, bias = torch.randn(batch, height, width, channels).to(dtype), torch.randn(channels).to(dtype)
        expected = series(x.double(), taps.double(), bias.double(), pool)  # PyTorch's own operators
        found = launch(x, taps, bias, pool)
        assert found.dtype == dtype and found.shape == expected.shape
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error < bound, (dtype, n, pool, error)
print("agrees")
"""


WHOLE = """
import timm, torch
import models
from runtimes import series_kernel, series_network
series_network.series = series_kernel.launch  # the kernel itself, in place of the operator's way on the CPU
torch.manual_seed(0)
network = timm.create_model("vanillanet_5", width_mult=1 / 64, num_classes=10, deploy=True).eval()
with torch.no_grad():
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.normal_(std=(2 / module.weight[0].numel()) ** 0.5)
    images = torch.randn(1, 3, 64, 64)
    expected = network(images)
    found = series_network.SeriesNetwork(network, images, precision="tf32", device="cpu")(images)
assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
print("agrees")
"""


def deployed(randomized, name="vanillanet_5", **arguments):
    network = randomized(timm.create_model(name, num_classes=10, width_mult=1 / 32, **arguments))
    network.switch_to_deploy()
    return network


@pytest.mark.parametrize(
    "program",
    [
        (INTERPRETED,),
        pytest.param((INTERPRETED, "every"), marks=pytest.mark.slow),
        pytest.param((WHOLE,), marks=pytest.mark.slow),
    ],
    ids=["kernel", "every kernel", "whole"],
)
def test_the_kernel_agrees_with_pytorch(program):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", *program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "agrees\n", done.stderr


@pytest.mark.parametrize("capability", [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (80, 100))])
def test_nothing_is_spilled(tmp_path, capability):
    """Compiled without a driver. Registers beyond 168 would leave room for fewer than 12 warps of 32 threads."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    names = ("x", "weight", "bias", "out")
    for kind in ("fp16", "bf16", "fp32"):
        for pool, size in ((1, 7), (2, 7)):
            constants = {"POOL": pool, "SIZE": size, "CHANNELS": series_kernel.CHANNELS}
            signature = dict.fromkeys(names, f"*{kind}") | dict.fromkeys(("height", "width", "channels"), "i32")
            source = ASTSource(
                series_kernel.series_kernel,
                signature=signature | dict.fromkeys(constants, "constexpr"),
                constexprs=constants,
                attrs={(place,): [["tt.divisibility", 16]] for place in (0, 1, 2, 3, 6)},
            )
            options = {"num_warps": series_kernel.WARPS}
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            path = tmp_path / "kernel.cubin"
            path.write_bytes(compiled.asm["cubin"])
            used = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
            registers, stack, local = (
                int(re.search(rf"{name}:(\d+)", used.stdout + used.stderr)[1]) for name in ("REG", "STACK", "LOCAL")
            )
            assert (stack, local) == (0, 0)
            assert registers <= 168


@pytest.mark.parametrize(("pool", "n"), [(1, 3), (2, 4)])
def test_the_operator_is_a_proper_one(pool, n):
    arguments = torch.randn(2, 5, 7, 6), torch.randn((2 * n + 1) ** 2, 6), torch.randn(6), pool
    torch.library.opcheck(series_kernel.series, arguments)
    compiled = torch.compile(lambda *tensors: series_kernel.series(*tensors, pool), backend="aot_eager")
    assert torch.equal(compiled(*arguments[:3]), series_kernel.series(*arguments))


@pytest.mark.parametrize("variant", [name for name in models.vanillanet.VARIANTS if "ada_pool" not in name])
def test_the_network_in_channels_last_agrees(randomized, variant):
    network, images = deployed(randomized, variant), torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)
    found = SeriesNetwork(network, images, precision="tf32", device="cpu")(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_the_engine(randomized, monkeypatch):
    engine = type(runtimes.find("triton"))
    monkeypatch.setattr(engine, "on_cpu", ("bf16",))
    monkeypatch.setattr(graphs, "record", lambda function, device: (lambda: result.copy_(function()), result))
    network, images = deployed(randomized), torch.randn(3, 3, 64, 64)
    result = torch.empty(1, 10)
    runtime = runtimes.load(network, engine="triton", precision="bf16", images=images[:1])
    with torch.no_grad():
        expected = network(images)
    error = (runtime(images) - expected).abs().max() / expected.abs().max()
    assert 1e-5 < error < 5e-2


def test_what_it_cannot_run_is_said(randomized):
    images = torch.randn(1, 3, 64, 64)
    pooled = deployed(randomized, "vanillanet_13_x1_5_ada_pool")
    for network, batch, message in (
        (pooled, images, "padding"),
        (timm.create_model("resnet10t").eval(), images, "deployed VanillaNets alone"),
        (deployed(randomized), images[..., :62], "patches of 4"),
        (timm.create_model("vanillanet_5", width_mult=1 / 32, deploy=True, num_classes=0), images, "classifier"),
        (timm.create_model("vanillanet_5", width_mult=1 / 32, deploy=True, global_pool="max"), images, "average"),
    ):
        with pytest.raises(ValueError, match=message):
            SeriesNetwork(network, batch, precision="bf16", device="cpu")
