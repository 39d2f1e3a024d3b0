"""torch.export and AOTInductor: a `.pt2` package, compiled beforehand, that runs without a compiler."""

import json
import zipfile
from pathlib import Path

import torch
from torch import nn

from records.files import first_line
from utils import keep_freed_memory

from ..base import FileEngine, FixedBatch, Metadata, Runtime, check_precision, exported, in_precision, set_tf32
from .eager import operator_times

METADATA = "metadata.json"


def instructions() -> str:
    """The vector instructions that torch uses on this processor."""
    return torch.backends.cpu.get_cpu_capability()


class AOTInductor(FileEngine):
    """The compiled network as shared library and weights. It runs on processors with the same vector instructions.

    The package holds native code: open only files that you trust.
    """

    name = "aotinductor"
    precisions = ("fp32", "tf32", "bf16", "fp16", "int8")
    devices = ("cpu", "cuda")
    suffix = ".pt2"

    def export(
        self,
        network: nn.Module,
        images: torch.Tensor,
        path: Path,
        *,
        precision="fp32",
        calibration=None,
        metadata: Metadata,
        device="cpu",
        profile=False,
    ) -> list[Path]:
        self.check(precision, device, calibration)
        if precision == "int8" and torch.device(device).type == "cuda":
            raise ValueError(f"int8 in {self.name} runs on the CPU only: use tensorrt or onnxruntime")
        set_tf32(precision, device)
        # Only here, so that a package answers soon: what compiles it takes seconds to import.
        from torch._inductor import aot_compile
        from torch.export.pt2_archive._package import package_pt2

        from .compile import inductor_form, inductor_settings

        form = inductor_form(network, images, precision=precision, calibration=calibration, device=device)
        program = exported(form, images.to(device, torch.float32), dynamic_batch=False)
        with inductor_settings(profile), torch.no_grad():
            files = aot_compile(program.module(), program.example_inputs[0], options={"aot_inductor.package": True})
        strings = {
            **in_precision(metadata, precision).to_strings(),
            "batch_size": str(len(images)),
            "device": torch.device(device).type,
            "instructions": instructions(),
        }
        package_pt2(str(path), aoti_files={"model": files}, extra_files={METADATA: json.dumps(strings)})
        return [path]

    def open(self, path: Path, *, precision=None, device="cpu", profile=False) -> Runtime:
        strings = self.read_strings(path)
        metadata = Metadata.from_strings(strings, path)
        precision = check_precision(metadata, precision, path)
        self.check_place(precision, device)
        set_tf32(precision, device)
        kind = torch.device(device).type
        if strings["device"] != kind:
            raise ValueError(f"{path} was compiled for {strings['device']}, not for {kind}: export it anew")
        if kind == "cpu":
            if strings["instructions"] != instructions():
                raise ValueError(
                    f"{path} was compiled for {strings['instructions']}, this processor has {instructions()}: "
                    "export it here"
                )
            keep_freed_memory()
        # The class behind torch._inductor.aoti_load_package, which would first import the compiler, for a second.
        index = torch.device(device).index
        try:
            loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1 if index is None else index)
        except RuntimeError as error:
            raise ValueError(f"cannot load {path}: {first_line(error)}") from error

        def package(images: torch.Tensor) -> torch.Tensor:
            return loader.boxed_run([images.contiguous()])[0]  # the strides are compiled in, and not checked

        run = FixedBatch(package, int(strings["batch_size"]))
        return Runtime(
            self.name,
            precision,
            run,
            metadata=metadata,
            device=device,
            profile=lambda batch: operator_times(run, batch),
        )

    @staticmethod
    def read_strings(path: Path) -> dict[str, str]:
        try:
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith(f"/extra/{METADATA}"))
                return json.loads(archive.read(name))
        except (OSError, zipfile.BadZipFile, StopIteration) as error:
            raise ValueError(f"cannot read {path}: it is no package that export.py wrote") from error
