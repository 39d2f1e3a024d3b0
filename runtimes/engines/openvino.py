"""OpenVINO, with quantization by NNCF."""

import functools
import os
from dataclasses import fields

from records.files import first_line

from .. import base
from ..base import quiet, require
from ..values import Calibration, Layer, Metadata

SECTION = "vanillanet"  # in the file's rt_info
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}  # layers that int8 leaves out run in bfloat16 where supported


@functools.cache
def _core():
    """Return the only `Core` of the process, with its CPU plugin loaded for good.

    A plugin gives its thread a signal stack (https://github.com/openvinotoolkit/openvino/pull/11894) and takes it back
    when the last user of its `Core` is gone. If the older of two plugins is unloaded first, the thread is left with a
    signal stack that no longer exists, and the next signal, such as that of an ending child process, kills the process
    (OpenVINO 2026.4). Can be removed when `test_signals_are_survived_after_openvino` passes with a `Core` in each call.
    """
    os.environ.setdefault("OPENVINO_TELEMETRY_DISABLED", "1")  # otherwise the import looks for a network
    import openvino

    core = openvino.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")
    return core


class Engine(base.FileEngine):
    """An `.xml` file with the graph and a `.bin` file beside it with the weights."""

    on_cpu = ("fp32", "bf16", "int8")
    packages = libraries = ("openvino",)
    format = "openvino"
    suffix = ".xml"
    converts = ("fp32", "bf16")
    leaves_depthwise = True

    def _export(self, network, images, path, target, metadata):
        from models.vanillanet import SeriesActivation

        from ..plain import plain
        from ..processor import slow_at_wide_convolutions
        from ..running import Form, exported
        from ..wide import split_wide

        _core()  # before NNCF or other code creates one
        import openvino

        # Plain layers in float32: the precision is only a hint, which is given when the file is opened.
        layers = plain(network, images)
        if target.precision == "fp32" and slow_at_wide_convolutions():
            layers = split_wide(layers, images)
        form = Form(layers)
        with quiet():
            model = openvino.convert_model(exported(form, images, dynamic_batch=True))
            if target.precision == "int8":
                series = any(isinstance(module, SeriesActivation) for module in network.modules())
                model = self._quantize(
                    model, target.calibration, skip_depthwise=series and target.calibration.leaves_depthwise
                )
        # Name input and output and add the metadata, for other programs.
        for port, name in ((model.input(0), "images"), (model.output(0), "logits")):
            port.tensor.set_names({name})
        for name, value in metadata.to_strings().items():
            model.set_rt_info(value, [SECTION, name])
        # A file for bfloat16 would be half as large in float16, but rounding the weights twice costs accuracy.
        openvino.save_model(model, path, compress_to_fp16=False)
        return [path, path.with_suffix(".bin")]

    @staticmethod
    def _quantize(model, calibration: Calibration, *, skip_depthwise: bool):
        from ..processor import sums_saturate

        nncf = require("nncf", "int8 in OpenVINO")
        images = [image.numpy() for image in calibration.images()]
        # Without AMX the series activations stay in bfloat16: int8 saves little time there and loses the most accuracy.
        kept = ["GroupConvolution"] if skip_depthwise else []
        fix = nncf.OverflowFix.ENABLE if sums_saturate() else None  # None: NNCF chooses
        return nncf.quantize(
            model,
            nncf.Dataset(images),
            preset=nncf.QuantizationPreset.MIXED,
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(types=kept, validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
        )

    def _read(self, path, target):
        try:
            model = _core().read_model(path)
        except RuntimeError as error:
            raise ValueError(f"cannot load {path}: {first_line(error)}") from error
        names = [field.name for field in fields(Metadata) if model.has_rt_info([SECTION, field.name])]
        return model, {name: model.get_rt_info([SECTION, name]).astype(str) for name in names}

    def _open(self, content, strings, path, target):
        import torch

        core = _core()
        if target.precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ValueError("this processor has no bfloat16, and OpenVINO would compute in float32: use fp32 or int8")
        # Always give the hint: without it, OpenVINO computes float32 in bfloat16 where the processor supports it.
        compiled = core.compile_model(
            content,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": HINTS[target.precision],
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY",
                "PERF_COUNT": target.profile,
            },
        )
        request = compiled.create_infer_request()

        def run(images: torch.Tensor) -> torch.Tensor:
            result = request.infer([images.numpy()], share_inputs=True)
            return torch.from_numpy(result[0].copy())

        def layers(images: torch.Tensor) -> list[Layer]:
            run(images)
            run(images)  # the first call includes preparation
            infos = request.profiling_info
            return [
                Layer(i.node_name, f"{i.node_type} {i.exec_type}", i.real_time.total_seconds() * 1e3)
                for i in infos
                if i.status == i.Status.EXECUTED
            ]

        return run, layers if target.profile else None
