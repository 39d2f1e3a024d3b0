"""torch.compile's kernels as a CUDA graph: fused and in one launch."""

from . import compile, cuda_graphs


class Engine(cuda_graphs.Engine):
    """The network of `compile`, recorded by `cuda_graphs`."""

    recorded = compile.Engine
