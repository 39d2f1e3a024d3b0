"""Post-training quantization in PyTorch: torchao's PT2E with the quantizer for inductor on x86."""

import torch
from torch import nn

from .base import quiet, require
from .plain import DEPTHWISE
from .processor import has_bfloat16, sums_saturate
from .running import Form, exported
from .values import Calibration


class Mixed(nn.Module):
    """A quantized graph whose other operators run in bfloat16, if the processor has it; float32 in and out.

    Elsewhere they run in float32: oneDNN computes an int8 convolution with bfloat16 results there by its reference
    implementation, hundreds of times slower.
    """

    def __init__(self, graph: nn.Module):
        super().__init__()
        self.network = graph
        self.bfloat16 = has_bfloat16()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bfloat16):
            return self.network(images).float()


def quantize(network: nn.Module, images: torch.Tensor, calibration: Calibration) -> Mixed:
    """`network` with its dense convolutions in int8: weights per output channel, activations uint8 per tensor.

    The rest is as in `Mixed`. The depthwise convolutions of the series activations are left out because they suit 8
    bits least and save a sixth of the time at best, with AVX-512 next to none; the pools because in 8 bits they cost
    accuracy and save nothing (docs/int8.md).

    Args:
        network: in eval mode, in deploy form.
        images: (N, C, H, W); the graph takes batches of N.
        calibration: the ranges of the activations come from all of its images.

    Raises:
        ValueError: nothing of the network can be quantized.
    """
    with quiet():
        require("torchao", "int8 in PyTorch")
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
            X86InductorQuantizer,
            get_default_x86_inductor_quantization_config,
        )

        # What is quantized: all but the pools, and on request the series activations.
        quantizer = X86InductorQuantizer().set_global(
            get_default_x86_inductor_quantization_config(reduce_range=sums_saturate())
        )
        quantizer.set_module_type_qconfig(nn.MaxPool2d, None)
        for name, _ in network.named_modules():
            if name.endswith(f".{DEPTHWISE}") and not calibration.depthwise:
                quantizer.set_module_name_qconfig(f"network.{name}", None)
        # Observers see the calibration images in batches of the graph's size, and give the scales.
        form = Form(network, layout=torch.channels_last)
        # Strict, since torchao 0.18 finds layers by their `source_fn_stack`, which torch.export notes only then: else
        # torch 2.11 quantizes nothing. torch 2.14 finds them in another way; once that is required, this may go.
        graph = exported(form, images, dynamic_batch=False, strict=True).module()
        with torch.no_grad():
            graph = prepare_pt2e(graph, quantizer)
            for batch in calibration.batches:
                for part in batch.split(len(images)):
                    graph(part[torch.arange(len(images)) % len(part)])  # the last one filled up from its beginning
            graph = convert_pt2e(graph)
    if not any("quantize_per_tensor" in str(node.target) for node in graph.graph.nodes):
        raise ValueError("int8 in PyTorch found no layer to quantize in this network: use another precision or engine")
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            # Export's note that a tensor was float32, which under autocast it no longer is (torch 2.14).
            graph.graph.erase_node(node)
    graph.recompile()
    return Mixed(graph)
