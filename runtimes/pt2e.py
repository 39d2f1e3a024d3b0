"""Post-training quantization in PyTorch: torchao's PT2E with its quantizer for inductor on x86."""

import torch
from torch import nn

from .base import quiet, require
from .plain import DEPTHWISE
from .processor import has_bfloat16, sums_saturate
from .running import Form, exported
from .values import Calibration


class Mixed(nn.Module):
    """A quantized graph whose other operators run in bfloat16 if the processor supports it; float32 in and out.

    On other processors they run in float32. With bfloat16 results, oneDNN would compute the int8 convolutions there by
    its reference implementation, which is hundreds of times slower.
    """

    def __init__(self, graph: nn.Module):
        super().__init__()
        self.network = graph
        self.bfloat16 = has_bfloat16()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bfloat16):
            return self.network(images).float()


def quantize(network: nn.Module, images: torch.Tensor, calibration: Calibration) -> Mixed:
    """Return `network` with dense convolutions in int8: weights per output channel, activations uint8 per tensor.

    The rest runs as in `Mixed`. Without AMX, the depthwise convolutions of the series activations are left out by
    default, because they suit 8 bits least and save a sixth of the time at best, next to none with AVX-512. The pools
    are left out because in 8 bits they cost accuracy and save nothing (docs/int8.md).

    Args:
        network: in eval mode, in deploy form.
        images: (N, C, H, W); the graph takes batches of N.
        calibration: the ranges of the activations come from all of its images.

    Raises:
        ValueError: nothing in the network can be quantized.
    """
    with quiet():
        require("torchao", "int8 in PyTorch")
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
            X86InductorQuantizer,
            get_default_x86_inductor_quantization_config,
        )

        # Quantize everything except the pools, and the series activations only on request.
        quantizer = X86InductorQuantizer().set_global(
            get_default_x86_inductor_quantization_config(reduce_range=sums_saturate())
        )
        quantizer.set_module_type_qconfig(nn.MaxPool2d, None)
        for name, _ in network.named_modules():
            if name.endswith(f".{DEPTHWISE}") and calibration.leaves_depthwise:
                quantizer.set_module_name_qconfig(f"network.{name}", None)
        # Observers see the calibration images in batches of the graph's size and set the scales.
        form = Form(network, layout=torch.channels_last)
        # Strict, because torchao 0.18 finds layers by `source_fn_stack`, which only a strict export records: otherwise
        # torch 2.11 quantizes nothing. torch 2.14 finds layers in another way; drop this once torch 2.14 is required.
        graph = exported(form, images, dynamic_batch=False, strict=True).module()
        with torch.no_grad():
            graph = prepare_pt2e(graph, quantizer)
            for batch in calibration.batches:
                for part in batch.split(len(images)):
                    graph(part[torch.arange(len(images)) % len(part)])  # a short last part repeats its images
            graph = convert_pt2e(graph)
    if not any("quantize_per_tensor" in str(node.target) for node in graph.graph.nodes):
        raise ValueError("int8 in PyTorch found no layer to quantize in this network: use another precision or engine")
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            # torch.export's assertion that a tensor is float32 no longer holds under autocast (torch 2.14).
            graph.graph.erase_node(node)
    graph.recompile()
    return Mixed(graph)
