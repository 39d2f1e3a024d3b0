"""What a row of the results measures."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Spec:
    """What is measured."""

    network: str  # a timm model's name, or a checkpoint
    engine: str  # of `runtimes.ENGINES`; for training `plain`, `channels_last` or `compile`
    precision: str  # that it computes in
    resolution: int = 224  # px
    batch: int = 1  # images a call
    device: str = "cpu"  # `cpu` or `cuda`
    kind: str = "inference"  # or `training` for a step of forward and backward pass and optimizer
    width_mult: float | None = None  # factor on a VanillaNet's channels, for trials
    twin: bool = False  # a VanillaNet built in deploy form instead of fused from its train form
    int8_depthwise: bool = False  # quantize its series activations, too
    grad_checkpointing: str = "none"  # of a training step, see `models.checkpointing`
    guard: bool = False  # a training step is guarded against non-finite losses as on a GPU, see `engine.FiniteGuard`

    @property
    def label(self) -> str:
        """The network as tables name it."""
        twin, depthwise = " (built deployed)" * self.twin, " (depthwise in int8)" * self.int8_depthwise
        checkpointing = f" (checkpointing {self.grad_checkpointing})" * (self.grad_checkpointing != "none")
        guard = " (guarded)" * self.guard
        return f"{Path(self.network).stem}{twin}{depthwise}{checkpointing}{guard}"

    def __str__(self) -> str:
        return f"{self.label}, {self.engine}, {self.precision}, {self.resolution} px, batch {self.batch}"
