"""ONNX export of a whole detector, including the selection of detections and the pasting of masks.

torchvision's detectors are exported by tracing (`dynamo=False`), for which torchvision has the operators and the
traceable paths. `torch.export` fails at non-maximum suppression, because its number of boxes depends on the data.
"""

import warnings
from pathlib import Path

import torch
from torch import nn

from object_detection.comparing import largest_gap
from object_detection.detectors import Detector

OPSET = 18


class _OneImage(nn.Module):
    """A detector that takes one image (3, H, W) and returns its outputs as a tuple."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        [detection] = self.detector([image])
        return tuple(detection[name] for name in output_names(self.detector))


def output_names(detector: Detector) -> list[str]:
    return ["boxes", "labels", "scores"] + (["masks"] if detector.has_masks else [])


def export_onnx(detector: Detector, path: str | Path, *, image: torch.Tensor) -> float:
    """Write a detector in eval mode as ONNX. The file takes one `image` (3, height, width) in [0, 1], of any size.

    Args:
        image: the image to trace with and to compare outputs on.

    Returns the largest difference, see `compare_onnx`. Raises ValueError if a package is missing.
    """
    try:
        import onnx  # noqa: F401  needed by the exporter
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--export_onnx needs the package {error.name}: pip install onnx onnxruntime") from None
    detector, image = detector.cpu().float(), image.cpu()
    names = output_names(detector)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about values that tracing freezes; torchvision handles these
        torch.onnx.export(
            _OneImage(detector).eval(),
            args=(image,),
            f=str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=names,
            dynamic_axes={"image": {1: "height", 2: "width"}, **{name: {0: "detections"} for name in names}},
        )
    return compare_onnx(detector, path, image=image)


@torch.no_grad()
def compare_onnx(detector: Detector, path: str | Path, *, image: torch.Tensor) -> float:
    """Return the largest gap between the detector and an ONNX file in ONNX Runtime on the CPU, with masks pasted."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = output_names(detector)
    found = dict(zip(names, map(torch.from_numpy, session.run(names, {"image": image.numpy()})), strict=True))
    [wanted] = detector([image])
    return largest_gap(wanted, found, detector=detector, side=max(image.shape[-2:]))
