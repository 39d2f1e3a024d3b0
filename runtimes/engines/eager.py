"""PyTorch, operator by operator."""

from .. import base


class Engine(base.Engine):
    """As published: contiguous memory format, nothing tuned. All other engines are compared with this one."""

    on_cpu = ("fp32", "bf16", "fp16")
    on_cuda = ("default", "fp32", "tf32", "bf16", "fp16")
    layout = "contiguous_format"

    def _build(self, network, images, target):
        import torch

        from ..running import Form, Runtime, operator_profile

        layout = getattr(torch, self.layout)
        form = Form(network, precision=target.precision, layout=layout, device=target.device)
        return Runtime(target, form, profile=operator_profile(form))
