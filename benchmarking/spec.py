"""What a row of the results measures."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Spec:
    """What is measured.

    Attributes:
        network: a timm model's name, or a checkpoint.
        engine: of `runtimes.ENGINES`; for training `plain`, `channels_last` or `compile`.
        precision: that it computes in.
        resolution: px.
        batch: images a call.
        device: `cpu` or `cuda`.
        kind: `inference`, or `training` for a step of forward and backward pass and optimizer.
        width_mult: factor on a VanillaNet's channels, for trials.
        twin: a VanillaNet built in deploy form instead of fused from its train form.
        int8_depthwise: quantize its series activations, too.
        grad_checkpointing: of a training step, see `models.checkpointing`.
        guard: a training step is guarded against non-finite losses as on a GPU, see `engine.FiniteGuard`.
    """

    network: str
    engine: str
    precision: str
    resolution: int = 224
    batch: int = 1
    device: str = "cpu"
    kind: str = "inference"
    width_mult: float | None = None
    twin: bool = False
    int8_depthwise: bool = False
    grad_checkpointing: str = "none"
    guard: bool = False

    @property
    def label(self) -> str:
        """The network as tables name it."""
        twin, depthwise = " (built deployed)" * self.twin, " (depthwise in int8)" * self.int8_depthwise
        checkpointing = f" (checkpointing {self.grad_checkpointing})" * (self.grad_checkpointing != "none")
        guard = " (guarded)" * self.guard
        return f"{Path(self.network).stem}{twin}{depthwise}{checkpointing}{guard}"

    def __str__(self) -> str:
        return f"{self.label}, {self.engine}, {self.precision}, {self.resolution} px, batch {self.batch}"
