"""The specification of what a row of the results measures."""

import re
from dataclasses import dataclass
from pathlib import Path

# What `Spec.label` adds to a network's name for a variant of it.
VARIANT = re.compile(r"( \((built deployed|depthwise in int8|checkpointing \w+|guarded)\))+$")


@dataclass(frozen=True)
class Spec:
    """A network in an engine, as it is to be measured."""

    network: str  # a timm model's name, or a checkpoint
    engine: str  # one of `runtimes.ENGINES`; for training `plain`, `channels_last` or `compile`
    precision: str  # one of `runtimes.PRECISIONS`
    resolution: int = 224  # px
    batch: int = 1  # images per call
    device: str = "cpu"  # `cpu`, `cuda` or `cuda:N`
    kind: str = "inference"  # or `training`, for a step of forward pass, backward pass and optimizer
    width_mult: float | None = None  # factor on a VanillaNet's channels, for trials
    twin: bool = False  # a VanillaNet built in deploy form instead of fused from its train form
    int8_depthwise: bool = False  # also quantize a VanillaNet's series activations
    grad_checkpointing: str = "none"  # mode in a training step, see `models.checkpointing`
    guard: bool = False  # guard a training step against non-finite losses as on a GPU, see `engine.FiniteGuard`

    @property
    def label(self) -> str:
        """The name of the network in tables."""
        twin, depthwise = " (built deployed)" * self.twin, " (depthwise in int8)" * self.int8_depthwise
        checkpointing = f" (checkpointing {self.grad_checkpointing})" * (self.grad_checkpointing != "none")
        guard = " (guarded)" * self.guard
        return f"{Path(self.network).stem}{twin}{depthwise}{checkpointing}{guard}"

    def __str__(self) -> str:
        return f"{self.label}, {self.engine}, {self.precision}, {self.resolution} px, batch {self.batch}"
