"""OpenVINO, quantized by NNCF."""

import functools
import os
from pathlib import Path

import torch

from records.files import first_line

from ..base import Calibration, FileEngine, Form, Layer, Metadata, Runtime, exported, in_precision, quiet, require
from ..processor import slow_at_wide_convolutions, sums_saturate

SECTION = "vanillanet"  # in the file's rt_info
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}  # what int8 leaves runs in bfloat16, where there is any


@functools.cache
def _core(openvino):
    """The one `Core` of the process, with its CPU plugin loaded, which stays.

    A plugin gives its thread a stack for signals, and takes it back when it goes, with the last use of its `Core`. With
    two, of which the first goes first, the thread is left with a stack that is gone, and the next signal, such as that
    of a child process that ends, kills the process.
    """
    core = openvino.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")
    return core


class OpenVINO(FileEngine):
    """An `.xml` file with the graph and a `.bin` beside it with the weights."""

    name = "openvino"
    precisions = ("fp32", "bf16", "int8")
    suffix = ".xml"

    def export(
        self, network, images, path, *, precision="fp32", calibration=None, metadata, device="cpu", profile=False
    ):
        self.check(precision, device, calibration)
        from models.vanillanet import SeriesActivation

        from ..plain import plain
        from ..wide import split_wide

        openvino = self._library()
        layers = plain(network, images)
        if precision == "fp32" and slow_at_wide_convolutions():
            layers = split_wide(layers, images)
        form = Form(layers)
        with quiet():
            model = openvino.convert_model(exported(form, images, dynamic_batch=True))
            if precision == "int8":
                series = any(isinstance(module, SeriesActivation) for module in network.modules())
                model = self._quantize(model, calibration, skip_depthwise=series and not calibration.depthwise)
        for name, value in in_precision(metadata, precision).to_strings().items():
            model.set_rt_info(value, [SECTION, name])
        # In float16 a file for bfloat16 would be half as large, but weights that are rounded twice cost accuracy.
        openvino.save_model(model, path, compress_to_fp16=False)
        return [path, path.with_suffix(".bin")]

    @staticmethod
    def _quantize(model, calibration: Calibration, *, skip_depthwise: bool):
        nncf = require("nncf", "nncf", "int8 in OpenVINO")
        images = [image.numpy() for image in calibration.images()]
        # The series activations stay in bfloat16: int8 saves little time there and loses the most accuracy.
        kept = ["GroupConvolution"] if skip_depthwise else []
        fix = nncf.OverflowFix.ENABLE if sums_saturate() else None  # None: as NNCF chooses
        return nncf.quantize(
            model,
            nncf.Dataset(images),
            preset=nncf.QuantizationPreset.MIXED,
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(types=kept, validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
        )

    def open(self, path: Path, *, precision=None, device="cpu", profile=False) -> Runtime:
        core = _core(self._library())
        try:
            model = core.read_model(path)
        except RuntimeError as error:
            raise ValueError(f"cannot load {path}: {first_line(error)}") from error
        strings = {
            name: model.get_rt_info([SECTION, name]).astype(str)
            for name in Metadata.names()
            if model.has_rt_info([SECTION, name])
        }
        metadata = Metadata.from_strings(strings, path)
        precision = precision or metadata.precision
        self.check_place(precision, device)
        if "int8" in (precision, metadata.precision) and precision != metadata.precision:
            raise ValueError(f"{path} computes in {metadata.precision}, not in {precision}: export it anew")
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ValueError("this processor has no bfloat16, and OpenVINO would compute in float32: use fp32 or int8")
        compiled = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": HINTS[precision],
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY",
                "PERF_COUNT": profile,
            },
        )
        request = compiled.create_infer_request()

        def run(images: torch.Tensor) -> torch.Tensor:
            result = request.infer([images.contiguous().numpy()], share_inputs=True)
            return torch.from_numpy(result[0].copy())

        def layers(images: torch.Tensor) -> list[Layer]:
            run(images)
            run(images)
            infos = request.profiling_info
            return [
                Layer(i.node_name, f"{i.node_type} {i.exec_type}", i.real_time.total_seconds() * 1e3)
                for i in infos
                if i.status == i.Status.EXECUTED
            ]

        return Runtime(self.name, precision, run, metadata=metadata, profile=layers if profile else None)

    @staticmethod
    def _library():
        # Its telemetry would look for a network.
        os.environ.setdefault("OPENVINO_TELEMETRY_DISABLED", "1")
        openvino = require("openvino", "openvino", "openvino")
        _core(openvino)  # before NNCF, or whoever else, makes one
        return openvino
