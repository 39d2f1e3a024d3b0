"""What only a GPU takes, taken on the CPU: streams, CUDA graphs, providers and the driver's count are stand-ins."""

import contextlib
import ctypes
import functools
import importlib.machinery
import json
import struct
import subprocess
import sys
import types

import numpy as np
import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent, Kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import benchmark
import runtimes
from benchmarking import limit, results, subjects, worker
from benchmarking.spec import Spec
from datasets import ArrayDataset
from loading.loaders import TrainLoader
from loading.processes import Loading
from loading.transforms import Preprocessing, build_train_transform
from loading.views import TrainTransform
from runtimes import Target, graphs, running
from runtimes.engines import cuda_graphs, onnxruntime, tensorrt


@pytest.fixture
def network(randomized):
    network = randomized(timm.create_model("vanillanet_6", num_classes=10, width_mult=1 / 16))
    network.switch_to_deploy()
    return network


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64)


@pytest.fixture
def tf32():
    """The process's settings, put back."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# -- precisions


@pytest.mark.parametrize(
    ("precision", "products", "convolutions"),
    [("tf32", True, True), ("fp32", False, False), ("bf16", False, False), ("default", False, True)],
)
def test_every_getter_answers_after_tf32_is_set(tf32, precision, products, convolutions):
    """Those that inductor and users read raised after the newer interface was used; from any state into any other."""
    for before in ("tf32", "fp32", "default"):
        runtimes.set_tf32(before, "cuda:1")
        runtimes.set_tf32(precision, "cuda:1")
        assert torch.get_float32_matmul_precision() == ("high" if products else "highest")
        assert torch.backends.cuda.matmul.allow_tf32 == products
        assert torch.backends.cudnn.allow_tf32 == convolutions
        assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if products else "ieee")
        assert (torch.backends.cudnn.conv.fp32_precision == "tf32") == convolutions


def test_default_is_what_torch_does_when_nothing_is_set():
    code = (
        "import torch, runtimes; b = torch.backends\n"
        "def state(): return b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32, torch.get_float32_matmul_precision()\n"
        "fresh = state(); runtimes.set_tf32('tf32', 'cuda'); runtimes.set_tf32('default', 'cuda')\n"
        "print(fresh == state())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"


def test_the_cpu_leaves_the_gpu_settings_alone(tf32):
    runtimes.set_tf32("tf32", "cuda")
    runtimes.set_tf32("fp32", "cpu")
    assert torch.backends.cuda.matmul.allow_tf32


def test_training_rows_compute_in_the_precision_they_name(monkeypatch):
    seen = []
    monkeypatch.setattr(runtimes.running, "set_tf32", lambda *arguments: seen.append(arguments))
    subjects.training_step(Spec("vanillanet_5", "plain", "bf16", 32, kind="training", width_mult=1 / 32))
    assert seen == [("bf16", "cpu")]


def test_a_gpu_is_compared_with_torchs_default():
    args = benchmark.build_parser().parse_args(["--models", "vanillanet_5", "--training", "true", "--device", "cuda"])
    assert {precision for _, precision in benchmark._engines(args)} == {"default", "fp32", "tf32", "bf16"}
    rows = [
        {"kind": "inference", "network": "a", "engine": "eager", "precision": precision, "device": "cuda:1",
         "resolution": 224, "batch": 1, "median_ms": ms, "macs_g": 1.0}
        for precision, ms in (("fp32", 4.0), ("default", 2.0), ("bf16", 1.0))
    ]  # fmt: skip
    results.complete(rows, {})
    assert [row["ratio"] for row in rows] == [0.5, 1.0, 2.0]


# -- one compilation


def test_a_network_is_compiled_once_whatever_it_is_called_with(network, images, monkeypatch):
    """Tensors of inference mode and ordinary ones, batches that are split and filled up, other memory formats."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    with torch.inference_mode():
        inside = images.clone()
    for example in (images[:2], inside[:2]):
        counter.frame_count = 0
        runtime = runtimes.load(network, engine="compile", images=example)
        with torch.no_grad():
            expected = network(images)
        for batch in (images, inside, images[:1], inside[1:], images.to(memory_format=torch.channels_last)):
            torch.testing.assert_close(runtime(batch), expected[: len(batch)] if len(batch) != 2 else expected[1:])
            with torch.inference_mode():
                runtime(batch)
        runtime(images.double().requires_grad_())
        assert counter.frame_count == 1
        with pytest.raises(ValueError, match="takes 64x64"):  # it would be compiled anew
            runtime(images[..., :32])


# -- CUDA graphs


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


def record(function, device):
    """A CUDA graph's way on the CPU: each operator again, from the tensors it read into those it wrote."""
    with Recording() as recording:
        result = function()

    def replay():
        for func, args, kwargs, outputs in recording.calls:
            for old, new in zip(tree_leaves(outputs), tree_leaves(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    return replay, result


@pytest.mark.parametrize("engine", ["cuda_graphs", "compile_cuda_graphs"])
def test_a_graph_has_an_input_of_its_own(network, images, monkeypatch, engine):
    monkeypatch.setattr(cuda_graphs.Engine, "on_cpu", ("fp32",))
    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    example, before = images[:1].clone(), images[:1].clone()
    runtime = runtimes.load(network, engine=engine, images=example)
    with torch.no_grad():
        expected = network(images)
    first = runtime(images[1:2])
    kept = first.clone()
    torch.testing.assert_close(runtime(images), expected)
    assert torch.equal(first, kept)  # not written over by later calls
    torch.testing.assert_close(first, expected[1:2])
    assert torch.equal(example, before)
    assert len(runtime.profile(images[:1])) > 6
    with pytest.raises(ValueError, match="takes 64x64"):  # a copy would fill it by broadcasting
        runtime(images[..., :1])


class Cuda:
    """torch.cuda's device, streams and graphs, each of which notes the device that was current when it was made."""

    def __init__(self, monkeypatch):
        self.current, self.used, self.log, self.inside = 0, [], [], "main"
        for name in ("device", "Stream", "current_stream", "stream", "CUDAGraph", "graph", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, torch.device(device).index or 0
        yield
        self.current = before

    def _made(self, name, device=None, handle=0):
        index = self.current if device is None else torch.device(device).index
        self.used.append(index)
        return types.SimpleNamespace(
            name=name,
            device=torch.device("cuda", index or 0),
            cuda_stream=handle,
            wait_stream=lambda other: self.log.append(f"{name} waits"),
            replay=lambda: None,
        )

    def Stream(self, device=None):
        return self._made("side", device, handle=77)

    def current_stream(self, device=None):
        return self._made("main", device)

    def CUDAGraph(self):
        return self._made("graph")

    @contextlib.contextmanager
    def stream(self, stream):
        self.used.append(self.current)
        before, self.inside = self.inside, stream.name
        yield
        self.inside = before

    graph = stream

    def synchronize(self, device=None):
        self.log.append(f"synchronize {device}")


def test_a_graph_is_recorded_on_its_own_device(monkeypatch):
    cuda = Cuda(monkeypatch)
    _, result = graphs.record(lambda: cuda.used.append(cuda.current) or 5, torch.device("cuda:1"))
    assert result == 5
    assert len(cuda.used) >= 3 + graphs.WARM_UP
    assert set(cuda.used) == {1}
    assert cuda.log == ["side waits", "main waits"]


@pytest.mark.parametrize("engine", ["eager", "cuda_graphs"])
def test_a_gpu_that_is_not_there_is_named(network, images, monkeypatch, engine):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="cuda:2: this machine has 2 CUDA devices"):
        runtimes.load(network, engine=engine, images=images, device="cuda:2")


# -- training's batches


def test_the_next_batch_is_made_in_a_stream_of_its_own(monkeypatch):
    cuda, finish = Cuda(monkeypatch), TrainTransform.finish
    transform = build_train_transform(Preprocessing(8), reprob=1.0)
    pixels = np.random.default_rng(0).integers(256, size=(6, 8, 8, 3), dtype=np.uint8)
    dataset = ArrayDataset(pixels, range(6), classes=list("abcdef"), transform=transform, name="six")
    expected = list(TrainLoader(dataset, Loading(2)))

    def on_the_cpu(self, views, device):
        cuda.log.append(f"{cuda.inside} finishes for {device}")
        return finish(self, views, torch.device("cpu"))

    monkeypatch.setattr(TrainTransform, "finish", on_the_cpu)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: cuda.log.append(f"kept for {stream.name}"))
    for batch, wanted in zip(TrainLoader(dataset, Loading(2, device=torch.device("cuda:1"))), expected, strict=True):
        cuda.log.append("step")
        assert all(torch.equal(*pair) for pair in zip(batch, wanted, strict=True))
    taken, ahead = ["main waits", "kept for main"], ["side finishes for cuda:1"]
    assert cuda.log == [*ahead, *taken, *ahead, "step", *taken, *ahead, "step", *taken, "step"]


# -- libraries with streams of their own


def test_tensorrt_runs_beside_torchs_stream(network, images, monkeypatch, tmp_path):
    cuda = Cuda(monkeypatch)
    monkeypatch.setattr(tensorrt.Engine, "on_cpu", ("fp32",))
    addresses = {}

    def execute(handle):
        cuda.log.append(f"execute on {handle}")
        ctypes.memset(addresses["logits"], 0, 4 * 10 * addresses["shape"][0])
        return True

    context = types.SimpleNamespace(
        set_input_shape=lambda name, shape: not addresses.update(shape=shape) and shape[0] <= 256,
        set_tensor_address=addresses.__setitem__,
        execute_async_v3=execute,
    )
    engine = types.SimpleNamespace(
        create_execution_context=lambda: context, get_tensor_shape=lambda name: {"logits": (-1, 10)}[name]
    )
    library = types.ModuleType("tensorrt")
    library.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    library.Logger = type("Logger", (), {"WARNING": 2, "__init__": lambda self, level: None})
    library.Runtime = lambda logger: types.SimpleNamespace(
        deserialize_cuda_engine=lambda plan: engine if plan == b"plan" else None
    )
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    header = json.dumps(runtimes.Metadata("n", (), (), (), 64, None).to_strings()).encode()
    path = tmp_path / "n.engine"
    path.write_bytes(struct.pack("<I", len(header)) + header + b"plan")
    runtime = runtimes.load(path)
    cuda.log.clear()
    assert torch.equal(runtime(images), torch.zeros(3, 10))
    assert cuda.log == ["side waits", "execute on 77", "main waits"]
    assert addresses["images"] == images.data_ptr()
    with pytest.raises(ValueError, match="does not take 257 images in a call: lower --batch_size"):
        runtime(images[:1].expand(257, -1, -1, -1))
    path.write_bytes(struct.pack("<I", len(header)) + header + b"other")
    with pytest.raises(ValueError, match="another GPU: export it anew"):
        runtimes.load(path)


def test_onnxruntime_does_not_fall_back_to_the_cpu(network, images, monkeypatch, tmp_path, tf32):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    Cuda(monkeypatch)
    path = tmp_path / "n.onnx"
    metadata = runtimes.Metadata("n", (), (), (), 64, None)
    onnxruntime.Engine().export(network, images, path, Target(), metadata)
    with pytest.raises(ValueError, match="no CUDAExecutionProvider"):
        runtimes.load(path, device="cuda:1")
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: providers)  # as where CUDA's libraries are missing
    asked, session = [], ort.InferenceSession

    def open_session(path, options, providers):
        asked.extend(providers)
        return session(path, options, providers=providers)

    monkeypatch.setattr(ort, "InferenceSession", open_session)
    with pytest.raises(ValueError, match="no use of its CUDAExecutionProvider"):
        runtimes.load(path, device="cuda:1")
    settings = {"device_id": 1, "use_tf32": 0, "user_compute_stream": "77"}
    assert asked == [("CUDAExecutionProvider", settings)]


# -- measuring


def test_a_kernels_time_is_counted_once():
    """A profile of a GPU has the operator, with its kernel's time in its own, and the kernel."""
    operator = FunctionEvent(1, "aten::conv2d", 0, 0, 50, use_device="cuda")
    operator.kernels = [Kernel("gemm", 0, 30)]
    kernel = FunctionEvent(2, "gemm", 0, 10, 40, use_device="cuda", device_type=DeviceType.CUDA)
    mark = FunctionEvent(
        3, "a user's mark", 0, 0, 90, use_device="cuda", device_type=DeviceType.CUDA, is_user_annotation=True
    )
    assert operator.self_device_time_total == 30
    assert running.own_times([operator, kernel, mark], "cuda") == [runtimes.Layer("gemm", "gemm", 0.03)]
    assert running.own_times([operator, kernel, mark], "cpu") == [runtimes.Layer("aten::conv2d", "aten::conv2d", 0.05)]


def test_the_device_that_is_measured_is_waited_for(monkeypatch):
    cuda = Cuda(monkeypatch)
    worker._times(lambda: None, 2, "cuda:1")
    monkeypatch.setitem(limit.PRODUCTS, "int8", lambda size, device: [lambda: None])
    limit.best_product("int8", "cuda:1")
    assert set(cuda.log) == {"synchronize cuda:1"}
    assert len(cuda.log) == 3 + 3 * limit.REPEATS


def test_memory_on_a_gpu_is_the_drivers(monkeypatch, tmp_path):
    Cuda(monkeypatch)
    free = iter([90_000_000, 25_000_000])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free), 100_000_000))
    monkeypatch.setattr(worker, "_open", lambda spec, folder, profile: (lambda: None, 0.5, list))
    spec = Spec("vanillanet_5", "onnxruntime", "fp32", device="cuda:1")
    threads = torch.get_num_threads()
    ready, respond = worker._begin(spec, tmp_path, threads=threads, profile=False)
    assert ready == {"first_s": 0.5}
    assert respond("peak_mb") == 65


def test_a_turn_on_a_gpu_is_of_fifty_calls(monkeypatch):
    asked = []

    class FakeWorker:
        spec = Spec("vanillanet_5", "eager", "default", device="cuda")

        def times(self, calls):
            asked.append(calls)
            return [1e-3] * calls

        def ask(self, precision):
            return 1.0

        def peak_mb(self):
            return 1.0

    monkeypatch.setattr(subjects, "costs", lambda spec: {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    args = benchmark.build_parser().parse_args(["--model", "vanillanet_5", "--device", "cuda", "--calls", "120"])
    one = FakeWorker()
    (row,) = benchmark._measure_group({one: {}}, one, one, {}, args)
    assert set(asked) == {50}
    assert row["calls"] == 150  # whole turns
    assert row["processor"] == "a card"
