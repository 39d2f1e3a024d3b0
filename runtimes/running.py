"""What engines do with torch: forms of a network, their batches, and `Runtime`, which all of them return."""

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
    """Let float32 arithmetic on a GPU use TensorFloat-32, or not. It holds for the process, as torch has it.

    By the older of torch's two interfaces: after the newer one, `fp32_precision`, the getters of the older, which
    inductor and users still read, raise (torch 2.11 and 2.14, https://github.com/pytorch/pytorch/issues/166387). May be
    the newer one when that is closed.
    """
    if torch.device(device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision in ("tf32", "default")


class Runtime:
    """A network that is ready to run: images (N, C, H, W), float32, in, logits (N, classes), float32, out.

    Args:
        target: what it runs in, with nothing left open.
        run: is always given contiguous float32 images on the target's device that are inference tensors, as torch
            calls those made in `torch.inference_mode()`: for other tensors `torch.compile` would compile again.
        metadata: of the file that it was read from, None for a network from memory.
        size: height and width of the images that it was made for; None is what `metadata` say, or any.
        profile: None where it was not built to be profiled.
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
        self.target, self.metadata, self.size = target, metadata, size
        self.name, self.precision, self.device = target.engine, target.precision, torch.device(target.device)
        if metadata and size is None:
            self.size = (metadata.input_size,) * 2
        self._run, self._profile = run, profile

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self._run(self._prepare(images))

    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Raises ValueError for another size, at which some engines would compute something else and not say so."""
        if self.size not in (None, tuple(images.shape[-2:])):
            found, own = ("x".join(map(str, size)) for size in (images.shape[-2:], self.size))
            raise ValueError(f"the images have {found} px, this {self.name} network takes {own}: export one for them")
        set_tf32(self.precision, self.device)
        images = images.to(self.device, torch.float32).contiguous()
        return images if images.is_inference() else images.new_empty(0).set_(images)  # the same memory

    @torch.inference_mode()
    def profile(self, images: torch.Tensor) -> list[Layer]:
        """The time of each layer in one call, by the engine's own clock. ValueError where it has none."""
        if self._profile is None:
            raise ValueError(f"{self.name} was not built to be profiled")
        return self._profile(self._prepare(images))


@contextmanager
def beside(stream: "torch.cuda.Stream | None") -> Iterator[None]:
    """Around a library's call on a stream of its own: after what torch was asked for before, before what comes after.
    Without a stream, on the CPU, nothing is done.
    """
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
    yield
    if stream is not None:
        torch.cuda.current_stream(stream.device).wait_stream(stream)


def operator_profile(run: Run) -> Profile:
    """The operators of one call and their own times, from torch's profiler; on a GPU its kernels."""

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
    """Of a profile's events those that ran on a kind of device, and their own times.

    On a GPU each kernel is an event; the operator that launched it is another, with the kernel's time in its own.
    """
    layers = []
    for event in events:
        if event.device_type.name.lower() == kind and not event.is_user_annotation:
            us = event.self_device_time_total if kind == "cuda" else event.self_cpu_time_total
            if us > 0:
                layers.append(Layer(event.name, _kind(event), us / 1e3))
    return layers


def _kind(event: Any) -> str:
    """An operator's name; of a convolution also its kernel, where the profile has the shapes."""
    images, weight = ([shape for shape in event.input_shapes or () if len(shape) == 4] + [None, None])[:2]
    if weight is None or "conv" not in event.name:
        return event.name
    depthwise = " depthwise" if weight[1] == 1 < images[1] else ""
    return f"{event.name} {weight[2]}x{weight[3]}{depthwise}"


def rebuilt(
    network: nn.Module,
    images: torch.Tensor,
    wanted: Callable[[nn.Module], bool],
    change: Callable[[Any, tuple[int, int]], nn.Module | None],
) -> nn.Module:
    """The network for images of this size with some layers replaced; itself where none is.

    Args:
        network: in eval mode; not changed.
        images: (N, C, H, W).
        wanted: which layers are looked at.
        change: from such a layer, and height and width of its input, to the one in its place; None leaves it.
    """
    sizes: dict[nn.Module, tuple[int, int]] = {}

    def note(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        sizes[module] = tuple(inputs[0].shape[-2:])

    found = {name: module for name, module in network.named_modules() if wanted(module)}
    if not found:
        return network
    # One pass tells the size of each layer's input.
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
    """Batches of any size through a function that was compiled for one size.

    A larger batch is split, and the last part filled up with zeros. Compiled for a free size instead, oneDNN would not
    know how to lay out the weights beforehand, and would do that anew in each call: twice the time at batch 1.
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


DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}  # all others: float32


class Form(nn.Module):
    """A copy of a network (N, C, H, W) -> (N, classes) in another precision and memory format, of weights and
    activations, on a device; float32 in, float32 out.
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
    """`network` as a graph, for the size of `images`, and with `dynamic_batch` for batches of any size.

    Args:
        strict: by torch.compile's tracer, which also notes the module that each operation comes from.
    """
    shapes: Any = None
    if dynamic_batch:
        shapes = ({0: torch.export.Dim("batch")},)
        if len(images) < 2:  # torch.export takes a size of one for a constant
            images = images.expand(2, -1, -1, -1).contiguous()
    with torch.no_grad():
        return torch.export.export(network, (images,), dynamic_shapes=shapes, strict=strict)
