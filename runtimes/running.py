"""Parts of the engines that need torch: forms of a network, fixed batches, and `Runtime`, which all engines return."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .values import Layer, Metadata, Target

Run = Callable[[torch.Tensor], torch.Tensor]
Profile = Callable[[torch.Tensor], list[Layer]]


def set_tf32(precision: str | None, device: str) -> None:
    """Set whether float32 arithmetic on a GPU uses TensorFloat-32. torch keeps this setting for the whole process.

    This uses the older of torch's two interfaces. After a call of the newer one, `fp32_precision`, the older one's
    getters raise (torch 2.11 and 2.14, https://github.com/pytorch/pytorch/issues/166387), and inductor and users still
    read them. The newer interface can be used once that issue is closed.
    """
    if torch.device(device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision in ("tf32", "default")


class Runtime(nn.Module):
    """A network that is ready to run: float32 images (N, C, H, W) in, float32 logits (N, classes) out.

    Args:
        target: the network's target, with all defaults filled in.
        run: always gets contiguous float32 images on the target's device. They are inference tensors, as made in
            `torch.inference_mode()`, because `torch.compile` would compile again for other tensors.
        metadata: of the file that the network was read from; None for a network from memory.
        size: height and width of the images that the network takes; None means the size in `metadata`, or any size.
        profile: None if the network was not built to be profiled.
    """

    def __init__(
        self,
        target: Target,
        run: Run,
        *,
        metadata: Metadata | None = None,
        size: tuple[int, int] | None = None,
        profile: Profile | None = None,
    ):
        super().__init__()
        self.target, self.metadata, self.size = target, metadata, size
        self.name, self.precision, self.device = target.engine, target.precision, torch.device(target.device)
        if metadata and size is None:
            self.size = (metadata.input_size,) * 2
        self._run, self._profile = run, profile
        self.eval()

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._run(self._prepare(images))

    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Prepare images for `run`. Raises ValueError for another size, where some engines would silently be wrong."""
        if self.size not in (None, tuple(images.shape[-2:])):
            found, own = ("x".join(map(str, size)) for size in (images.shape[-2:], self.size))
            raise ValueError(f"the images have {found} px, this {self.name} network takes {own}: export one for them")
        set_tf32(self.precision, self.device)
        images = images.to(self.device, torch.float32).contiguous()
        return images if images.is_inference() else images.new_empty(0).set_(images)  # shares the memory

    @torch.inference_mode()
    def profile(self, images: torch.Tensor) -> list[Layer]:
        """Time each layer in one call, by the engine's own clock. Raises ValueError if not built to be profiled."""
        if self._profile is None:
            raise ValueError(f"{self.name} was not built to be profiled")
        return self._profile(self._prepare(images))


@contextmanager
def beside(stream: "torch.cuda.Stream | None") -> Iterator[None]:
    """Order a library's work on a stream of its own after torch's earlier work and before torch's later work.
    Without a stream, that is, on the CPU, nothing is done.
    """
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
    yield
    if stream is not None:
        torch.cuda.current_stream(stream.device).wait_stream(stream)


def operator_profile(run: Run) -> Profile:
    """Return a function that times the operators of one call, or on a GPU the kernels, with torch's profiler."""

    def profile(images: torch.Tensor) -> list[Layer]:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if images.is_cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        run(images)
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            run(images)
        return own_times(profiler.events(), images.device.type)

    return profile


def own_times(events: Iterable[Any], kind: str) -> list[Layer]:
    """Return the self times of the events in a profile that ran on this kind of device.

    On a GPU each kernel is an event. The operator that launched it is another event, whose time includes the kernel's.
    """
    layers = []
    for event in events:
        if event.device_type.name.lower() == kind and not event.is_user_annotation:
            us = event.self_device_time_total if kind == "cuda" else event.self_cpu_time_total
            if us > 0:
                layers.append(Layer(event.name, _kind(event), us / 1e3))
    return layers


def _kind(event: Any) -> str:
    """Return an operator's name; for a convolution also its kernel size, if the profile has the shapes."""
    images, weight = ([shape for shape in event.input_shapes or () if len(shape) == 4] + [None, None])[:2]
    if weight is None or "conv" not in event.name:
        return event.name
    # A depthwise convolution, or one channel of it where torch has no kernel for all of them at once.
    depthwise = " depthwise" if weight[1] == 1 and (images[1] > 1 or weight[0] == 1) else ""
    return f"{event.name} {weight[2]}x{weight[3]}{depthwise}"


def rebuilt(
    network: nn.Module,
    images: torch.Tensor,
    wanted: Callable[[nn.Module], bool],
    change: Callable[[Any, tuple[int, int]], nn.Module | None],
) -> nn.Module:
    """Return a copy of the network with some layers replaced for images of this size, or the network if none are.

    Args:
        network: in eval mode; not changed.
        images: (N, C, H, W).
        wanted: selects the layers to look at.
        change: maps such a layer and the height and width of its input to its replacement; None keeps the layer.
    """
    sizes: dict[nn.Module, tuple[int, int]] = {}

    def note(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        sizes[module] = tuple(inputs[0].shape[-2:])

    found = {name: module for name, module in network.named_modules() if wanted(module)}
    if not found:
        return network
    # Record the size of each layer's input in one forward pass.
    hooks = [module.register_forward_pre_hook(note) for module in found.values()]
    try:
        with torch.no_grad():
            network(images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    changed = {name: layer for name, module in found.items() if (layer := change(module, sizes[module])) is not None}
    if not changed:
        return network
    network = copy.deepcopy(network)
    for name, layer in changed.items():
        network.set_submodule(name, layer)
    return network


class FixedBatch:
    """Run batches of any size through a function that was compiled for one batch size.

    Larger batches are split, and the last part is padded with zeros. With a free batch size instead, oneDNN could not
    lay out the weights beforehand and would do so again in each call, which takes twice the time at batch 1.
    """

    def __init__(self, run: Run, size: int):
        self.run, self.size = run, size  # (size, C, H, W) -> (size, classes)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) == self.size:
            return self.run(images)
        logits = []
        for part in images.split(self.size):
            padding = part.new_zeros(self.size - len(part), *part.shape[1:])
            logits.append(self.run(torch.cat([part, padding]) if len(padding) else part)[: len(part)].clone())
        return torch.cat(logits)


DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}  # all others use float32


class Form(nn.Module):
    """A copy of a network on a device, with weights and activations in the given precision and memory format:
    float32 images (N, C, H, W) in, float32 logits (N, classes) out.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        precision: str = "fp32",
        layout: torch.memory_format = torch.contiguous_format,
        device: str = "cpu",
    ):
        super().__init__()
        self.dtype, self.layout = DTYPES.get(precision, torch.float32), layout
        self.network = copy.deepcopy(network).to(device=device, dtype=self.dtype, memory_format=layout).eval()
        self.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images.to(self.dtype, memory_format=self.layout)).float()


def exported(
    network: nn.Module, images: torch.Tensor, *, dynamic_batch: bool, strict: bool = False
) -> torch.export.ExportedProgram:
    """Export `network` as a graph for images of this size; with `dynamic_batch`, for batches of any size.

    Args:
        strict: trace as torch.compile does, which also records the module that each operation comes from.
    """
    shapes: Any = None
    if dynamic_batch:
        shapes = ({0: torch.export.Dim("batch")},)
        if len(images) < 2:  # torch.export treats a size of 1 as a constant
            images = images.expand(2, -1, -1, -1).contiguous()
    with torch.no_grad():
        return torch.export.export(network, (images,), dynamic_shapes=shapes, strict=strict)
