"""torch.compile with inductor: the engine to use with plain PyTorch."""

from types import FunctionType, MethodType

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

        # Each build gets its own code object: torch compiles a code object up to 8 times, and then no more.
        form = inductor_form(network, images, target)
        forward = type(form).forward
        form.forward = MethodType(FunctionType(forward.__code__.replace(), forward.__globals__), form)
        compiled = torch.compile(form, dynamic=False)
        run = FixedBatch(compiled, len(images))
        profile = operator_profile(run) if target.profile else None
        runtime = Runtime(target, run, size=tuple(images.shape[-2:]), profile=profile)
        with inductor_settings(target.profile):
            runtime(images)
        return runtime
