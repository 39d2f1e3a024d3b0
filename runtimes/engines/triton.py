"""VanillaNet as one CUDA graph with two kernels per layer: a matrix product, and a Triton kernel for the rest."""

from .. import base


class Engine(base.Engine):
    """Channels-last, for one batch size and image size. Takes only deployed VanillaNets without adaptive pools."""

    on_cuda = ("tf32", "bf16", "fp16")
    packages = ("triton",)
    libraries = ("triton",)

    def _build(self, network, images, target):
        from ..graphs import Graph
        from ..running import FixedBatch, Runtime, operator_profile
        from ..series_network import SeriesNetwork

        form = SeriesNetwork(network, images, precision=target.precision, device=target.device)
        runtime = Runtime(target, form)  # sets TensorFloat-32 and inference mode for the recording
        run = FixedBatch(Graph(runtime, images.to(form.device)), len(images))
        return Runtime(target, run, size=tuple(images.shape[-2:]), profile=operator_profile(run))
