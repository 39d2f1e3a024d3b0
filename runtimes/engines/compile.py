"""torch.compile with inductor: the engine to use with plain PyTorch."""

from .. import base


class Engine(base.Engine):
    """Channels-last, weights frozen, compiled for one batch size and image size. Building takes up to a minute."""

    on_cpu = ("fp32", "bf16", "fp16", "int8")
    on_cuda = ("default", "fp32", "tf32", "bf16", "fp16")
    keeps_freed_memory = True
    leaves_depthwise = True

    def _build(self, network, images, target):
        import torch

        from ..inductor import inductor_form, inductor_settings
        from ..running import FixedBatch, Runtime, operator_profile

        # Builds share the code object of `Form.forward`. torch compiles it up to 8 times; later builds run uncompiled.
        compiled = torch.compile(inductor_form(network, images, target), dynamic=False)
        run = FixedBatch(compiled, len(images))
        profile = operator_profile(run) if target.profile else None
        runtime = Runtime(target, run, size=tuple(images.shape[-2:]), profile=profile)
        with inductor_settings(target.profile):
            runtime(images)
        return runtime
