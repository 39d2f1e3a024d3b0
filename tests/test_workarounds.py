"""Whether the work-arounds in models/workarounds.py are needed still: a test that fails here says that one may go."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import nn

from models.workarounds import PointwiseConv2d

PROGRAM = """
import torch, torch.nn.functional as F
from models.workarounds import depthwise_conv2d

def plain(x, weight, padding):
    return F.conv2d(x, weight, padding=padding, groups=len(weight))

for size in (3, 6):
    for convolution in (plain, depthwise_conv2d):
        x = torch.randn(2, 16, size, size).to(memory_format=torch.channels_last).requires_grad_()
        weight = torch.randn(16, 1, 7, 7, requires_grad=True)
        convolution(x, weight, 3).sum().backward()
"""


def test_timm_does_not_fuse_the_root():
    class Root(nn.Module):
        fused = False

        def switch_to_deploy(self):
            self.fused = True

    assert not reparameterize_model(Root()).fused, "RootFusion may go"


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_onednn_has_no_weight_gradient_of_a_kernel_larger_than_the_map():
    """By the names of the implementations that oneDNN chooses on a processor without AVX-512."""
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[1],
        env={**limits, "ONEDNN_VERBOSE": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    chosen = re.findall(r"convolution,([^,]+),backward_weights", run.stdout)
    if not chosen:
        pytest.skip("oneDNN reports nothing on this processor")
    assert len(chosen) == 4  # of two sizes, as it is and as we write it
    assert "jit:avx2" not in chosen[::2], "depthwise_conv2d may go"
    assert chosen[1::2] == ["jit:avx2"] * 2


MAPS = """
import torch, torch.nn.functional as F
from models.workarounds import pointwise_conv2d

for convolution in (F.conv2d, pointwise_conv2d):
    x = torch.randn(32, 48, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
    convolution(x, torch.randn(80, 48, 1, 1, requires_grad=True), torch.randn(80, requires_grad=True)).sum().backward()
    print("next", flush=True)
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_onednn_rearranges_the_weight_of_a_pointwise_convolution():
    run = subprocess.run(
        [sys.executable, "-c", MAPS],
        cwd=Path(__file__).parents[1],
        env={"ONEDNN_VERBOSE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    plain, ours, _ = run.stdout.split("next\n")
    if "exec" not in plain:
        pytest.skip("oneDNN reports nothing on this processor")
    assert re.search(r",reorder,.*,80x48x1x1,", plain), "pointwise_conv2d may go"
    assert not re.search(r",reorder,.*,80x48x1x1,", ours)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 4), (3, 2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pointwise_convolution_is_the_plain_one(size, memory_format):
    """In float64: the result and the gradients of all three arguments."""
    layer = PointwiseConv2d(5, 7, dtype=torch.float64)
    x = torch.randn(3, 5, *size, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    gradient = torch.randn(3, 7, *size, dtype=torch.float64)
    arguments = (x, layer.weight, layer.bias)
    y, plain = layer(x), F.conv2d(*arguments)
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(y, arguments, gradient)
    for value, expected in zip(ours, torch.autograd.grad(plain, arguments, gradient), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
