"""PyTorch with CUDA graphs: one launch for the whole network instead of one for each operator."""

from .. import base
from . import channels_last


class Engine(base.Engine):
    """Another engine's network as a CUDA graph, for one batch size and image size."""

    on_cuda = channels_last.Engine.on_cuda
    recorded: type[base.Engine] = channels_last.Engine

    def _build(self, network, images, target):
        import torch

        from ..graphs import Graph
        from ..running import FixedBatch, Runtime, operator_profile

        runtime = self.recorded()._build(network, images, target)
        run = FixedBatch(Graph(runtime, images.to(target.device, torch.float32)), len(images))
        return Runtime(target, run, size=tuple(images.shape[-2:]), profile=operator_profile(run))
