"""torch.compile's kernels as a CUDA graph: fused, and in one launch."""

from . import compile, cuda_graphs


class Engine(cuda_graphs.Engine):
    """Compiled as `compile` does it, then recorded as `cuda_graphs` does it."""

    recorded = compile.Engine
