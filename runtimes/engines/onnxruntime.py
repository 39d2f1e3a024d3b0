"""ONNX: PyTorch's exporter, ONNX Runtime's quantization, and ONNX Runtime itself."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from records.files import first_line

from .. import base
from ..base import quiet, require
from ..values import Calibration, Layer, Metadata, Target

if TYPE_CHECKING:
    import torch
    from torch import nn

INPUT, OUTPUT = "images", "logits"
OPSET = 20


def _quantize(path: Path, calibration: Calibration, *, symmetric: bool) -> None:
    """Quantize an ONNX file in place: weights per output channel, activations per tensor, by their minimum and maximum.

    Args:
        symmetric: activations in int8 around zero, as GPUs expect; otherwise uint8 with a zero point, as CPUs expect.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from ..processor import sums_saturate

    inputs = ({INPUT: image.numpy()} for image in calibration.images())

    class Reader(quantization.CalibrationDataReader):
        def get_next(self):
            return next(inputs, None)

    # Quantization needs an optimized graph with known shapes. Only the batch size is symbolic.
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
            # GPUs have no integers of 32 bits for biases: TensorRT reads weights and activations of 8 bits only.
            extra_options={"ActivationSymmetric": symmetric, "QuantizeBias": not symmetric},
        )


def write_onnx(
    network: "nn.Module",
    images: "torch.Tensor",
    path: Path,
    target: Target,
    metadata: Metadata,
    *,
    symmetric: bool = False,
) -> None:
    """Write a single ONNX file with a free batch size, float32 in and out, and the metadata as its properties."""
    onnx = require("onnx", "ONNX")
    require("onnxscript", "ONNX")
    import torch

    from ..plain import plain
    from ..running import Form, exported

    # Export in the file's precision; int8 starts from float32.
    form = Form(plain(network, images), precision=target.precision)
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
            dynamic_shapes=({0: "batch"},),  # name of the free dimension
            verbose=False,
        )
        if target.precision == "int8":
            require("onnxruntime", "int8 in ONNX")
            _quantize(path, target.calibration, symmetric=symmetric)
    # Add the properties that other programs need last, because quantization would drop them.
    model = onnx.load(path)
    onnx.helper.set_model_props(model, metadata.to_strings())
    onnx.checker.check_model(model)
    onnx.save(model, path)


class Engine(base.FileEngine):
    """An `.onnx` file. In int8 the depthwise convolutions are always quantized as well, because one in float32 between
    8-bit layers would need conversions, which cost more than it saves.
    """

    on_cpu = ("fp32", "fp16", "int8")
    on_cuda = ("fp32", "fp16", "int8")
    libraries = ("onnxruntime", "onnxruntime-gpu")
    format = "onnx"
    suffix = ".onnx"

    def _export(self, network, images, path, target, metadata):
        write_onnx(network, images, path, target, metadata)
        return [path]

    def _read(self, path, target):
        import torch

        ort = require("onnxruntime", self.name)
        # Use as many threads as torch, hide warnings, and write the profile to a temporary folder.
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        folder = tempfile.TemporaryDirectory() if target.profile else None
        if folder:
            options.enable_profiling, options.profile_file_prefix = True, str(Path(folder.name) / "profile")
        # On a GPU, use IEEE arithmetic, and a stream from torch, so that torch can wait for it.
        provider, settings, stream = "CPUExecutionProvider", {}, None
        if target.kind == "cuda":
            provider, stream = "CUDAExecutionProvider", torch.cuda.Stream(target.device)
            settings = {
                "device_id": torch.device(target.device).index or 0,
                "use_tf32": 0,
                "user_compute_stream": str(stream.cuda_stream),
            }
        if provider not in ort.get_available_providers():
            raise ValueError(f"this onnxruntime has no {provider}: pip install onnxruntime-gpu")
        try:
            session = ort.InferenceSession(str(path), options, providers=[(provider, settings)])
        except Exception as error:  # ONNX Runtime's exceptions have no common class
            raise ValueError(f"cannot load {path}: {first_line(error)}") from error
        if session.get_providers()[0] != provider:  # it would silently run on the CPU
            raise ValueError(f"onnxruntime has no use of its {provider}: install the CUDA and cuDNN that it asks for")
        return (session, stream, folder), session.get_modelmeta().custom_metadata_map

    def _open(self, content, strings, path, target):
        import torch

        from ..running import beside

        session, stream, folder = content
        device = torch.device(target.device)
        classes = session.get_outputs()[0].shape[1]

        def run(images: torch.Tensor) -> torch.Tensor:
            logits = images.new_empty(len(images), classes)
            binding = session.io_binding()  # input and output stay in torch's memory, so nothing is copied
            for bind, name, tensor in ((binding.bind_input, INPUT, images), (binding.bind_output, OUTPUT, logits)):
                bind(
                    name,
                    device_type=device.type,
                    device_id=device.index or 0,
                    element_type="float32",
                    shape=tuple(tensor.shape),
                    buffer_ptr=tensor.data_ptr(),
                )
            with beside(stream):
                session.run_with_iobinding(binding)
            return logits

        def layers(images: torch.Tensor) -> list[Layer]:
            if not Path(folder.name).exists():
                raise ValueError("onnxruntime profiles a network once: load it again")
            run(images)
            with folder:
                events = json.loads(Path(session.end_profiling()).read_text())
            begun = max(event["ts"] for event in events if event["name"] == "model_run")  # of the last call
            nodes = [event for event in events if event["ts"] >= begun and event["name"].endswith("_kernel_time")]
            return [Layer(event["name"], event["args"]["op_name"], event["dur"] / 1e3) for event in nodes]

        return run, layers if target.profile else None
