"""TensorRT, from ONNX. A plan runs only on the kind of GPU and the version of TensorRT that it was built with."""

import json
import struct
import tempfile
from pathlib import Path

from .. import base
from .onnxruntime import INPUT, OUTPUT, write_onnx

LARGEST_BATCH = 256
WORKSPACE = 4 << 30  # bytes


class Engine(base.FileEngine):
    """A plan behind our own header: an unsigned 32-bit length, the metadata as JSON, and then TensorRT's bytes.

    TensorRT 11 types every network strictly, so the precision is that of the ONNX graph: graphs in fp16 and bf16, and
    graphs with quantization nodes for int8. tf32 is a float32 graph that may use TensorFloat-32.
    """

    on_cuda = ("fp32", "tf32", "bf16", "fp16", "int8")
    packages = libraries = ("tensorrt",)
    format = "tensorrt"
    suffix = ".engine"

    def _export(self, network, images, path, target, metadata):
        import torch

        with torch.cuda.device(target.device):  # TensorRT builds for the current one
            return self._write(network, images, path, target, metadata)

    def _write(self, network, images, path, target, metadata):
        import tensorrt as trt

        # Read the graph from a temporary ONNX file.
        logger = trt.Logger(trt.Logger.WARNING)
        builder = trt.Builder(logger)
        graph = builder.create_network(0)
        parser = trt.OnnxParser(graph, logger)
        with tempfile.TemporaryDirectory() as folder:
            onnx = Path(folder) / "network.onnx"
            write_onnx(network, images, onnx, target, metadata, symmetric=True)
            if not parser.parse_from_file(str(onnx)):
                raise ValueError(f"TensorRT cannot read the graph: {parser.get_error(0)}")
        # Take batches of 1 to LARGEST_BATCH, fastest at the batch size of `images`.
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
        if target.precision != "tf32":
            config.clear_flag(trt.BuilderFlag.TF32)
        shape = tuple(images.shape)
        sizes = builder.create_optimization_profile()
        sizes.set_shape(INPUT, (1, *shape[1:]), shape, (max(LARGEST_BATCH, shape[0]), *shape[1:]))
        config.add_optimization_profile(sizes)
        plan = builder.build_serialized_network(graph, config)
        if plan is None:
            raise ValueError("TensorRT could not build the network; its log says why")
        # A plan has no place for metadata, so a header holds them.
        header = json.dumps(metadata.to_strings()).encode()
        path.write_bytes(struct.pack("<I", len(header)) + header + bytes(plan))
        return [path]

    def _read(self, path, target):
        content = path.read_bytes()
        try:
            (length,) = struct.unpack_from("<I", content)
            return content[4 + length :], json.loads(content[4 : 4 + length])
        except (struct.error, ValueError) as error:
            raise ValueError(f"cannot read {path}: it is no plan that export.py wrote") from error

    def _open(self, content, strings, path, target):
        import tensorrt as trt
        import torch

        from ..running import beside

        with torch.cuda.device(target.device):
            engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(content)
            if engine is None:
                raise ValueError(f"{path} was built by another TensorRT or for another GPU: export it anew")
            context = engine.create_execution_context()
            stream = torch.cuda.Stream()  # on the default stream, TensorRT would wait for the device in each call
        classes = engine.get_tensor_shape(OUTPUT)[1]

        def run(images: torch.Tensor) -> torch.Tensor:
            logits = images.new_empty(len(images), classes)
            if not context.set_input_shape(INPUT, tuple(images.shape)):
                raise ValueError(f"{path} does not take {len(images)} images in a call: lower --batch_size")
            context.set_tensor_address(INPUT, images.data_ptr())
            context.set_tensor_address(OUTPUT, logits.data_ptr())
            with torch.cuda.device(target.device), beside(stream):
                done = context.execute_async_v3(stream.cuda_stream)
            if not done:
                raise RuntimeError("TensorRT could not run the network; its log says why")
            return logits

        return run, None
