"""Whether the work-arounds in models/workarounds.py are needed still: a test that fails here says that one may go."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.utils import reparameterize_model
from torch import nn

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
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[1],
        env={"ONEDNN_MAX_CPU_ISA": "AVX2", "ONEDNN_VERBOSE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    chosen = re.findall(r"convolution,([^,]+),backward_weights", run.stdout)
    if not chosen:
        pytest.skip("oneDNN reports nothing on this processor")
    assert len(chosen) == 4  # of two sizes, as it is and as we write it
    assert "jit:avx2" not in chosen[::2], "depthwise_conv2d may go"
    assert chosen[1::2] == ["jit:avx2"] * 2
