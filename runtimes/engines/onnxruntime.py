"""ONNX: the exporter of PyTorch, ONNX Runtime's quantization, and ONNX Runtime itself."""

import json
import os
import tempfile
from pathlib import Path

import torch
from torch import nn

from records.files import first_line

from ..base import (
    DTYPES,
    Calibration,
    FileEngine,
    Form,
    Layer,
    Metadata,
    Runtime,
    check_precision,
    device_type,
    exported,
    in_precision,
    quiet,
    require,
)
from ..processor import sums_saturate

INPUT, OUTPUT = "images", "logits"
OPSET = 20


def _quantize(path: Path, calibration: Calibration, *, symmetric: bool) -> None:
    """Quantize an ONNX file in place: weights per output channel, activations per tensor from the extremes seen.

    Args:
        symmetric: activations in int8 around zero, as GPUs want them; else uint8 with a zero point, as CPUs do.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.images = calibration.images()

        def get_next(self):
            image = next(self.images, None)
            return None if image is None else {INPUT: image.numpy()}

    kind = quantization.QuantType
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(input_model=str(path), output_model_path=str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(path),
            calibration_data_reader=Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=kind.QInt8 if symmetric else kind.QUInt8,
            weight_type=kind.QInt8,
            reduce_range=not symmetric and sums_saturate(),
            extra_options={"ActivationSymmetric": symmetric},
        )


def write_onnx(
    network: nn.Module,
    images: torch.Tensor,
    path: Path,
    *,
    precision: str,
    calibration: Calibration | None,
    metadata: Metadata,
    symmetric: bool = False,
) -> None:
    """Write a single ONNX file with a free batch size, float32 in and out, and the metadata as its properties."""
    for module, package in (("onnx", "onnx"), ("onnxscript", "onnxscript")):
        require(module, package, "ONNX")
    import onnx

    from ..plain import plain

    network = plain(network, images)
    form = Form(network, dtype=DTYPES.get(precision, torch.float32))
    program = exported(form, images, dynamic_batch=True)
    with quiet():
        torch.onnx.export(
            program,
            f=str(path),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            external_data=False,
            dynamo=True,
            verbose=False,
        )
        if precision == "int8":
            require("onnxruntime", "onnxruntime", "int8 in ONNX")
            _quantize(path, calibration, symmetric=symmetric)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, in_precision(metadata, precision).to_strings())
    onnx.checker.check_model(model)
    onnx.save(model, path)


class OnnxRuntime(FileEngine):
    """An `.onnx` file. In int8 the depthwise convolutions are always quantized, too: between layers in 8 bits, one in
    float32 costs half as much again in conversions.
    """

    name = "onnxruntime"
    precisions = ("fp32", "fp16", "int8")
    devices = ("cpu", "cuda")
    suffix = ".onnx"

    def export(
        self, network, images, path, *, precision="fp32", calibration=None, metadata, device="cpu", profile=False
    ):
        self.check(precision, device, calibration)
        write_onnx(network, images, path, precision=precision, calibration=calibration, metadata=metadata)
        return [path]

    def open(self, path: Path, *, precision=None, device="cpu", profile=False) -> Runtime:
        ort = require("onnxruntime", "onnxruntime", self.name)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        options.enable_profiling = profile
        if profile:
            folder = tempfile.mkdtemp()
            options.profile_file_prefix = os.path.join(folder, "profile")
        provider, settings = "CPUExecutionProvider", {}
        if device_type(device) == "cuda":
            provider = "CUDAExecutionProvider"
            settings = {"device_id": torch.device(device).index or 0, "use_tf32": 0}
        if provider not in ort.get_available_providers():
            raise ValueError(f"this onnxruntime has no {provider}: pip install onnxruntime-gpu")
        try:
            session = ort.InferenceSession(str(path), options, providers=[(provider, settings)])
        except Exception as error:  # its exceptions have no common class
            raise ValueError(f"cannot load {path}: {first_line(error)}") from error
        metadata = Metadata.from_strings(session.get_modelmeta().custom_metadata_map, path)
        precision = check_precision(metadata, precision, path)

        def run(images: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(session.run([OUTPUT], {INPUT: images.cpu().contiguous().numpy()})[0]).to(device)

        def layers(images: torch.Tensor) -> list[Layer]:
            run(images)
            events = json.loads(Path(session.end_profiling()).read_text())
            begun = max(event["ts"] for event in events if event["name"] == "model_run")  # of all calls the last
            nodes = [event for event in events if event["ts"] >= begun and event["name"].endswith("_kernel_time")]
            return [Layer(event["name"], event["args"]["op_name"], event["dur"] / 1e3) for event in nodes]

        return Runtime(self.name, precision, run, metadata=metadata, device=device, profile=layers if profile else None)
