"""PyTorch with CUDA graphs: one launch for the whole network instead of one for each operator."""

import torch
from torch import nn

from ..base import DTYPES, Engine, FixedBatch, Form, Runtime, set_tf32

WARM_UP = 3  # calls before the capture, in which cuDNN chooses its algorithms


class CudaGraphs(Engine):
    name = "cuda_graphs"
    precisions = ("fp32", "tf32", "bf16", "fp16")
    devices = ("cuda",)

    def build(self, network: nn.Module, images, *, precision="fp32", calibration=None, device="cuda", profile=False):
        self.check(precision, device, calibration)
        set_tf32(precision, device)
        form = Form(network, dtype=DTYPES[precision], layout=torch.channels_last, device=device)
        static_images = images.to(device, torch.float32)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                form(static_images)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            static_logits = form(static_images)

        def run(batch: torch.Tensor) -> torch.Tensor:
            static_images.copy_(batch)
            graph.replay()
            return static_logits.clone()  # the next replay writes over it

        return Runtime(self.name, precision, FixedBatch(run, len(images)), device=device)
