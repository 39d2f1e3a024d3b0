"""CUDA graphs: all kernels of a network in one launch."""

from collections.abc import Callable
from functools import partial

import torch

WARM_UP = 3  # calls before recording, in which cuDNN chooses its algorithms


def record(function: Callable[[], torch.Tensor], device: torch.device) -> tuple[Callable[[], None], torch.Tensor]:
    """Record `function` on `device`. Return (function that replays it, tensor that holds each replay's result)."""
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
    """A function of images of one shape, recorded once and replayed in each call.

    Args:
        run: (N, C, H, W) -> (N, classes).
        images: a batch of that shape on the device; it is copied.
    """

    @torch.inference_mode()
    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor):
        self.images = images.clone()
        self.replay, self.logits = record(partial(run, self.images), images.device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.images.copy_(images)
        self.replay()
        return self.logits.clone()  # the next replay overwrites it
