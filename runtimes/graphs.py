"""CUDA graphs: all kernels of a network in one launch."""

from collections.abc import Callable
from functools import partial

import torch

WARM_UP = 3  # calls before the recording, in which cuDNN chooses its algorithms


def record(function: Callable[[], torch.Tensor], device: torch.device) -> tuple[Callable[[], None], torch.Tensor]:
    """(a launch of all that `function` does on `device`, the tensor in which each launch leaves its result)."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()
    return graph.replay, result


class Graph:
    """A function of images of one shape, recorded and replayed.

    Args:
        run: (N, C, H, W) -> (N, classes).
        images: of that shape, on the device; they are not kept.
    """

    @torch.inference_mode()
    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor):
        self.images = images.clone()
        self.replay, self.logits = record(partial(run, self.images), images.device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.images.copy_(images)
        self.replay()
        return self.logits.clone()  # the next replay writes over it
