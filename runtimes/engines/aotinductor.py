"""torch.export and AOTInductor: a `.pt2` package, compiled ahead of time, that runs without a compiler."""

import json
import zipfile

from records.files import first_line

from .. import base

METADATA = "metadata.json"


def instructions() -> str:
    """Return the kinds of vector instructions that this processor has, separated by spaces."""
    import torch

    also = {
        "VNNI": torch.cpu._is_vnni_supported(),
        "BF16": torch.cpu._is_avx512_bf16_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    return " ".join([torch.backends.cpu.get_cpu_capability(), *(name for name, there in also.items() if there)])


class Engine(base.FileEngine):
    """The compiled network as a shared library and weights. It runs on processors with the same vector instructions.

    The package holds native code: open only files that you trust.
    """

    on_cpu = ("fp32", "bf16", "fp16", "int8")
    on_cuda = ("default", "fp32", "tf32", "bf16", "fp16")
    keeps_freed_memory = True
    leaves_depthwise = True
    format = "pt2"
    suffix = ".pt2"
    fixes_batch = True

    def _export(self, network, images, path, target, metadata):
        # Imported only here, because the compiler takes seconds to import and opening a package does not need it.
        import torch
        from torch._inductor import aot_compile
        from torch.export.pt2_archive._package import package_pt2

        from ..inductor import inductor_form, inductor_settings
        from ..running import exported

        # One batch size is compiled in; see `FixedBatch`.
        form = inductor_form(network, images, target)
        program = exported(form, images.to(target.device, torch.float32), dynamic_batch=False)
        with inductor_settings(target.profile), torch.no_grad():
            files = aot_compile(program.module(), program.example_inputs[0], options={"aot_inductor.package": True})
        # The package records what its native code was compiled for, which `_open` compares.
        strings = {
            **metadata.to_strings(),
            "batch_size": str(len(images)),
            "device": target.kind,
            "instructions": instructions(),
        }
        package_pt2(str(path), aoti_files={"model": files}, extra_files={METADATA: json.dumps(strings)})
        return [path]

    def _read(self, path, target):
        try:
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith(f"/extra/{METADATA}"))
                return None, json.loads(archive.read(name))
        except (OSError, zipfile.BadZipFile, StopIteration) as error:
            raise ValueError(f"cannot read {path}: it is no package that export.py wrote") from error

    def _open(self, content, strings, path, target):
        import torch

        from ..running import FixedBatch, operator_profile

        if strings["device"] != target.kind:
            raise ValueError(f"{path} was compiled for {strings['device']}, not for {target.kind}: export it anew")
        if target.kind == "cpu" and not {*strings["instructions"].split()} <= {*instructions().split()}:
            raise ValueError(
                f"{path} was compiled for {strings['instructions']}, this processor has {instructions()}: "
                "export it here"
            )
        # torch._inductor.aoti_load_package would first import the compiler for a second (torch 2.14), so use the class
        # behind it. Can be removed when `test_a_package_answers_without_what_made_it` passes with that function.
        index = torch.device(target.device).index
        try:
            loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1 if index is None else index)
        except RuntimeError as error:
            raise ValueError(f"cannot load {path}: {first_line(error)}") from error

        def package(images: torch.Tensor) -> torch.Tensor:
            return loader.boxed_run([images])[0]  # images must be contiguous: strides are compiled in, not checked

        run = FixedBatch(package, int(strings["batch_size"]))
        return run, operator_profile(run)
