"""Every engine against PyTorch's own answer, on small networks; the files carry what they must."""

import functools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch._inductor import cpp_builder
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
import runtimes
import utils
from models.vanillanet import VanillaNet
from processors import openvino_has_bfloat16
from runtimes import Target, inductor, pt2e, wide
from runtimes.adaptive_pool import AxisMaxPool, _as_strided_pool, fix_adaptive_pools, windows
from runtimes.engines.onnxruntime import write_onnx
from runtimes.plain import plain
from runtimes.running import FixedBatch
from utils import keep_freed_memory

ROOT = Path(__file__).parents[1]
METADATA = runtimes.Metadata(
    model="vanillanet_6",
    classes=("T-shirt/top", "café"),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    input_size=64,
    crop_pct=0.875,
    checkpoint="0f" * 32,
)
# Of the largest logit. bf16 has 8 bits of mantissa, and so has int8, with a shared exponent.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "int8": 1e-1}
FAST = [
    ("eager", "bf16"),
    ("channels_last", "fp32"),
    ("channels_last", "bf16"),
    ("onnxruntime", "fp32"),
    ("onnxruntime", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
]
# Half a minute each, in C++ compilers. What they are given is tested below, and a package in tests/test_predict.py.
SLOW = [(name, precision) for name in ("compile", "aotinductor") for precision in ("fp32", "bf16", "int8")]
PACKAGES = {"onnxruntime": ["onnx", "onnxscript", "onnxruntime"], "openvino": ["openvino", "nncf"]}


def skip_without(*packages):
    for package in packages:
        pytest.importorskip(package, reason=f"pip install {package}")


@pytest.fixture
def network(randomized):
    return small(randomized, "vanillanet_6")


def small(randomized, variant, width=1 / 16):
    network = randomized(timm.create_model(variant, num_classes=10, width_mult=width))
    network.switch_to_deploy()
    return network


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64)


@pytest.fixture(scope="module")
def file_of(randomized, tmp_path_factory):
    """A function from a suffix to a network and its file in float32, which is written once."""
    torch.manual_seed(0)
    network, folder = small(randomized, "vanillanet_6"), tmp_path_factory.mktemp("files")

    @functools.cache
    def write(suffix):
        path = folder / f"network{suffix}"
        engine = runtimes.find(runtimes.of_file(path))
        skip_without(*PACKAGES.get(engine.name, ()))
        engine.export(network, torch.randn(1, 3, 64, 64), path, Target(), METADATA)
        return network, path

    return write


def difference(logits, expected):
    """The largest difference, relative to the largest logit."""
    assert logits.dtype is torch.float32
    assert logits.shape == expected.shape
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def check_engine(network, images, engine, precision):
    skip_without(*PACKAGES.get(engine, ()), *(["torchao"] if precision == "int8" and engine not in PACKAGES else []))
    with torch.no_grad():
        expected = network(images)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    calibration = runtimes.Calibration([torch.randn(4, 3, 64, 64), images])
    load = functools.partial(
        runtimes.load, network, engine=engine, precision=precision, images=images[:1], calibration=calibration
    )
    if (engine, precision) == ("openvino", "bf16") and not openvino_has_bfloat16():
        with pytest.raises(ValueError, match="no bfloat16"):
            load()
        return
    runtime = load(profile=True)
    assert (runtime.name, runtime.precision) == (engine, precision)
    found = difference(runtime(images), expected)
    assert found < TOLERANCE[precision]
    assert precision == "fp32" or found > 1e-6  # it is not the same network in float32
    assert difference(runtime(images[:1]), expected[:1]) < TOLERANCE[precision]
    assert torch.equal(runtime(images), runtime(images))
    layers = runtime.profile(images[:1])
    assert len(layers) >= 6
    if engine == "onnxruntime":  # whose clock runs from the session's beginning, and whose profile ends once
        assert len({layer.name for layer in layers}) == len(layers)
        with pytest.raises(ValueError, match="once: load it again"):
            runtime.profile(images[:1])
    elif engine == "openvino":  # which leaves out what takes less than a microsecond
        again = runtime.profile(images[:1])
        assert len({layer.name for layer in again}) == len(again)
    else:
        assert len(runtime.profile(images[:1])) == len(layers)
    assert all(layer.ms >= 0 for layer in layers)
    if engine in ("eager", "channels_last", "compile"):  # where torch's profiler sees the shapes
        kernels = {layer.kind.partition(" ")[2] for layer in layers if "conv" in layer.name}
        assert kernels == {"4x4", "7x7 depthwise", "1x1"}
    # The network of the caller is not touched.
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.stem[0].weight.is_contiguous()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", pytest.param("aotinductor", marks=pytest.mark.slow)])
def test_images_of_another_size_are_refused(file_of, images, engine):
    """Some engines would compute something else, and not say so."""
    network, path = file_of(runtimes.find(engine).suffix)
    for runtime in (runtimes.load(path), runtimes.load(network, engine=engine, images=images[:1])):
        with pytest.raises(ValueError, match=rf"have 32x64 px, this {engine} network takes 64x64"):
            runtime(images[:, :, :32])
        with torch.no_grad():
            expected = network(images)
        assert difference(runtime(images.to(memory_format=torch.channels_last)), expected) < TOLERANCE["fp32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"precision": "tf32"}, "not in tf32"), ({"device": "cuda"}, "not on cuda"), ({"device": "gpu"}, "--device gpu")],
)
def test_what_an_openvino_file_cannot_do_is_said(file_of, arguments, message):
    _, path = file_of(".xml")
    with pytest.raises(ValueError, match=message):
        runtimes.load(path, **arguments)


@pytest.mark.parametrize(("engine", "precision"), FAST)
def test_an_engine_agrees_with_pytorch(network, images, engine, precision):
    check_engine(network, images, engine, precision)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "precision"), SLOW)
def test_a_compiled_engine_agrees_with_pytorch(network, images, engine, precision):
    check_engine(network, images, engine, precision)


def test_the_published_way_is_the_network_itself(network, images):
    with torch.inference_mode():
        expected = network(images)
    assert torch.equal(runtimes.load(network, engine="eager", images=images)(images), expected)


GPU_ENGINES = [
    (name, precision)
    for name in runtimes.ENGINES
    for precision in runtimes.find(name).on_cuda
    if name != "onnxruntime" and precision != "int8"
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("engine", "precision"), GPU_ENGINES)
def test_an_engine_on_a_gpu_agrees_with_the_cpu(network, images, engine, precision):
    if engine == "tensorrt":
        skip_without("tensorrt", "onnx", "onnxscript")
    with torch.no_grad():
        expected = network(images)
    runtime = runtimes.load(network, engine=engine, precision=precision, images=images[:1], device="cuda")
    logits = runtime(images)
    assert logits.is_cuda
    assert difference(logits.cpu(), expected) < {"fp32": 1e-4, "bf16": 3e-2}.get(precision, 1e-2)


# -- files


def export(network, images, path, precision="fp32"):
    engine = runtimes.find(runtimes.of_file(path))
    return engine.export(
        network,
        images,
        path,
        Target(precision=precision, calibration=runtimes.Calibration([images, images])),
        replace(METADATA, input_size=images.shape[-1]),
    )


FAST_VARIANTS = ("vanillanet_5", "vanillanet_13_x1_5_ada_pool")
EVERY = [
    pytest.param(variant, suffix, marks=[] if variant in FAST_VARIANTS else pytest.mark.slow)
    for variant in models.vanillanet.VARIANTS
    for suffix in (".onnx", ".xml")
]


@pytest.mark.parametrize(("variant", "suffix"), EVERY)
def test_every_variant_is_exported_for_any_batch(randomized, tmp_path, variant, suffix):
    skip_without(*PACKAGES[runtimes.SUFFIXES[suffix]])
    network = small(randomized, variant, width=1 / 32)
    size = 64 if "ada_pool" in variant else 32
    images = torch.randn(3, 3, size, size)
    path = tmp_path / f"network{suffix}"
    export(network, images[:1], path)
    runtime = runtimes.load(path)
    with torch.no_grad():
        assert difference(runtime(images), network(images)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("variant", models.vanillanet.VARIANTS)
def test_every_variant_is_packaged(randomized, tmp_path, variant):
    network = small(randomized, variant, width=1 / 32)
    images = torch.randn(2, 3, 64, 64)
    export(network, images, tmp_path / "network.pt2", "bf16")
    with torch.no_grad():
        assert difference(runtimes.load(tmp_path / "network.pt2")(images), network(images)) < TOLERANCE["bf16"]


@pytest.mark.parametrize(
    ("suffix", "precision"),
    [(".onnx", "int8"), (".xml", "bf16"), (".xml", "int8"), pytest.param(".pt2", "fp32", marks=pytest.mark.slow)],
)
def test_metadata_travel_in_the_file(network, images, tmp_path, suffix, precision):
    skip_without(*PACKAGES.get(runtimes.SUFFIXES[suffix], ()))
    files = export(network, images, tmp_path / f"network{suffix}", precision)
    assert sorted(files) == sorted(tmp_path.iterdir())
    if (suffix, precision) == (".xml", "bf16") and not openvino_has_bfloat16():
        with pytest.raises(ValueError, match="no bfloat16"):
            runtimes.load(files[0])
        return
    runtime = runtimes.load(files[0])
    assert runtime.precision == precision
    assert runtime.metadata == runtimes.Metadata(**{**vars(METADATA), "precision": precision})
    with pytest.raises(ValueError, match=r"export it anew|computes in"):
        runtimes.load(files[0], precision="fp16" if suffix != ".xml" else ("fp32" if precision == "int8" else "int8"))


def test_weights_are_quantized_per_channel(network, images, tmp_path):
    skip_without(*PACKAGES["onnxruntime"])
    import onnx

    export(network, images, tmp_path / "network.onnx", "int8")
    graph = onnx.load(tmp_path / "network.onnx").graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made = {node.output[0]: node for node in graph.node}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 11  # 6 layers, 5 depthwise
    for convolution in convolutions:
        source = made[convolution.input[1]]
        weight, scale = (constants[name] for name in source.input[:2])
        assert source.op_type == "DequantizeLinear"
        assert weight.dtype == "int8"
        assert scale.shape == weight.shape[:1]
        assert made[convolution.input[0]].op_type == "DequantizeLinear"


def test_tensorrt_is_given_numbers_of_8_bits_only(network, images, tmp_path):
    """Its parser refuses the biases of 32 bits that ONNX Runtime quantizes for processors."""
    skip_without(*PACKAGES["onnxruntime"])
    import onnx

    path, target = tmp_path / "network.onnx", Target(precision="int8", calibration=runtimes.Calibration([images]))
    write_onnx(network, images, path, target, METADATA, symmetric=True)
    graph = onnx.load(path).graph
    types = {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
    found = {types.get(node.input[0], "INT8") for node in graph.node if node.op_type == "DequantizeLinear"}
    assert found == {"INT8"}
    assert sum(node.op_type == "Conv" for node in graph.node) == 11
    runtime = runtimes.find("onnxruntime").open(path, Target())
    assert difference(runtime(images), network(images).detach()) < TOLERANCE["int8"]


def test_a_missing_compiler_is_one_line(network, images):
    cpp_builder.cpp_compiler_search.cache_clear()
    with (
        inductor.inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ValueError, match=r"needs a C\+\+ compiler: install g\+\+"),
    ):
        runtimes.load(network, engine="compile", images=images[:, :, :40, :40])
    cpp_builder.cpp_compiler_search.cache_clear()


@pytest.mark.parametrize("amx", [False, True])
def test_depthwise_convolutions_are_quantized_on_request_and_with_amx(network, images, tmp_path, monkeypatch, amx):
    skip_without(*PACKAGES["openvino"])
    import openvino

    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    for depthwise, expected in ((not amx, 5 * (not amx)), (None, 5 * amx)):
        path = tmp_path / f"{depthwise}.xml"
        target = Target(precision="int8", calibration=runtimes.Calibration([images], depthwise))
        runtimes.find("openvino").export(network, images, path, target, METADATA)
        nodes = openvino.Core().read_model(path).get_ops()
        depthwise_nodes = [node for node in nodes if node.get_type_name() == "GroupConvolution"]
        weights = [openvino_bits(node) for node in depthwise_nodes]
        assert len(depthwise_nodes) == 5
        assert weights.count(8) == expected


@pytest.mark.parametrize("bfloat16", [False, True])
def test_what_int8_leaves_is_in_bfloat16_where_the_processor_has_it(network, images, monkeypatch, bfloat16):
    skip_without("torchao")
    monkeypatch.setattr(pt2e, "has_bfloat16", lambda: bfloat16)
    quantized = pt2e.quantize(plain(network, images), images, runtimes.Calibration([images]))
    found = set()

    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            found.update(tensor.dtype for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor))
            return result

    with torch.no_grad(), Dtypes():
        logits = quantized(images)
    assert (torch.bfloat16 in found) == bfloat16
    assert found >= {torch.uint8, torch.float32}
    assert difference(logits, network(images).detach()) < TOLERANCE["int8"]


def test_int8_that_quantizes_nothing_is_refused(images):
    skip_without("torchao")
    with pytest.raises(ValueError, match="no layer to quantize"):
        pt2e.quantize(torch.nn.Flatten().eval(), images, runtimes.Calibration([images]))


def openvino_bits(node):
    """The bits of the numbers that a convolution's weights are stored in."""
    while node.get_type_name() != "Constant":
        node = node.input_value(0 if "Convolution" not in node.get_type_name() else 1).get_node()
    return node.get_element_type().bitwidth


def test_a_float32_openvino_file_also_runs_in_bfloat16(file_of, images):
    network, path = file_of(".xml")
    with torch.no_grad():
        expected = network(images)
    assert difference(runtimes.load(path)(images), expected) < 1e-5
    if not openvino_has_bfloat16():
        pytest.skip("this processor has no bfloat16")
    assert 1e-4 < difference(runtimes.load(path, precision="bf16")(images), expected) < 2e-2


def test_a_file_of_another_writer_is_refused(tmp_path):
    skip_without(*PACKAGES["onnxruntime"])
    torch.onnx.export(torch.nn.ReLU(), (torch.zeros(1, 3),), tmp_path / "other.onnx", verbose=False)
    with pytest.raises(ValueError, match="not written by export"):
        runtimes.load(tmp_path / "other.onnx")


@pytest.mark.parametrize("suffix", runtimes.SUFFIXES)
def test_a_damaged_file_is_one_line(tmp_path, suffix):
    skip_without(*PACKAGES.get(runtimes.SUFFIXES[suffix], ()), *(["tensorrt"] if suffix == ".engine" else []))
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(b"nothing that an engine would read" * 9)
    with pytest.raises(ValueError, match=r"broken\.") as raised:
        runtimes.load(path)
    assert "\n" not in str(raised.value)


# -- requests that cannot be met


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "nosuch"}, "no engine nosuch"),
        ({"engine": "openvino", "precision": "fp16"}, "fp32, bf16, int8"),
        ({"engine": "openvino", "precision": "int8"}, "calibrate"),
        ({"engine": "cuda_graphs"}, "not on cpu"),
        ({"engine": "eager", "precision": "tf32"}, "NVIDIA"),
        ({"engine": "eager", "images": None}, "batch of images"),
    ],
)
def test_what_cannot_be_done_is_said(network, images, arguments, message):
    with pytest.raises(ValueError, match=message):
        runtimes.load(network, **{"images": images, **arguments})


@pytest.mark.parametrize(
    ("engine", "package"), [("openvino", "openvino"), ("onnxruntime", "onnx"), ("tensorrt", "tensorrt")]
)
def test_a_missing_package_is_named(network, images, tmp_path, monkeypatch, engine, package):
    monkeypatch.setitem(sys.modules, package, None)  # importing it now fails
    found = runtimes.find(engine)
    target = Target(device=next(iter(found.computes)))
    with pytest.raises(ValueError, match=f"pip install {package}"):
        found.export(network, images, tmp_path / f"network{found.suffix}", target, METADATA)


@pytest.mark.parametrize(("path", "message"), [("gone.onnx", "does not exist"), ("network.txt", "no format")])
def test_files_that_cannot_be_read(tmp_path, path, message):
    with pytest.raises(ValueError, match=message):
        runtimes.load(tmp_path / path)


def test_importing_the_package_imports_no_engine():
    libraries = ("torch", "onnx", "onnxruntime", "openvino", "nncf", "torchao", "torch._inductor")
    code = f"import sys, runtimes; print([name for name in {libraries} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- batches


def test_other_batches_than_the_compiled_one():
    seen = []

    def run(images):
        seen.append(len(images))
        return images.sum((1, 2, 3))[:, None]

    images = torch.randn(11, 3, 4, 4)
    for size, calls in ((4, 3), (11, 1), (16, 1), (1, 11)):
        seen.clear()
        assert torch.equal(FixedBatch(run, size)(images), images.sum((1, 2, 3))[:, None])
        assert seen == [size] * calls


# -- adaptive pooling


@pytest.mark.parametrize(("size", "out", "pool"), [(75, 38, (3, 2, 1)), (38, 19, (2, 2, 0)), (19, 10, (3, 2, 1))])
def test_the_published_pools_are_plain_max_pools(size, out, pool):
    assert _as_strided_pool(size, out) == pool


@pytest.mark.parametrize("size", [5, 7, 19, 33, 38, 75, 96])
@pytest.mark.parametrize("ratio", [0.4, 1, 1.3, 1.97, 2, 2.5, 3.1, 5])
def test_adaptive_pools_are_rewritten_exactly(size, ratio):
    out = max(1, round(size / ratio))
    x = torch.randn(2, 3, size, size + 2)
    expected = F.adaptive_max_pool2d(x, (out, out))
    assert torch.equal(AxisMaxPool((size, size + 2), (out, out))(x), expected)
    fixed = fix_adaptive_pools(torch.nn.Sequential(torch.nn.AdaptiveMaxPool2d(out)), x)
    assert torch.equal(fixed(x), expected)
    assert len(windows(size, out)) == out


@pytest.mark.parametrize("size", [32, 64, 97, 224])
def test_a_network_with_adaptive_pools_is_rewritten_exactly(randomized, size):
    network = small(randomized, "vanillanet_13_x1_5_ada_pool", width=1 / 64)
    images = torch.randn(2, 3, size, size)
    fixed = fix_adaptive_pools(network, images)
    assert not any(isinstance(module, torch.nn.AdaptiveMaxPool2d) for module in fixed.modules())
    with torch.no_grad():
        assert torch.equal(fixed(images), network(images))


@pytest.mark.parametrize("variant", models.vanillanet.VARIANTS)
def test_the_plain_form_is_the_network_bit_by_bit(randomized, variant):
    network = small(randomized, variant, width=1 / 64)
    images = torch.randn(2, 3, 96, 96)
    form = plain(network, images)
    assert not any(isinstance(module, models.vanillanet.SeriesActivation) for module in form.modules())
    with torch.no_grad():
        assert torch.equal(form(images), network(images))
    # A ReLU follows its convolution in every layer, so that an engine fuses the two.
    names = [name.rpartition(".")[2] for name, module in form.named_modules() if not list(module.children())]
    assert all(names[i + 1] == "relu" for i, name in enumerate(names) if name == "conv")
    assert names.count("relu") == len(network.stages) + 1


# -- wide convolutions


class Wide(torch.nn.Sequential):
    """A 1x1 convolution of 7 channels on a large map; others are narrow, 3x3, grouped, padded or on a small map."""

    def __init__(self):
        super().__init__(
            torch.nn.Conv2d(3, 7, 1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(7, 8, 1, stride=2),
            torch.nn.Conv2d(8, 8, 3, padding=1),
            torch.nn.Conv2d(8, 8, 1, groups=2),
            torch.nn.Conv2d(8, 5, 1, padding=1, bias=False),
            torch.nn.AdaptiveAvgPool2d(2),
            torch.nn.Conv2d(5, 4, 1),
            torch.nn.Flatten(),
        )


@pytest.fixture
def narrow(monkeypatch):
    """As on a processor without AVX-512, and with 3 channels or 2x2 places as the most that are fast."""
    monkeypatch.setattr(wide, "WIDEST", 3)
    monkeypatch.setattr(wide, "LARGEST", 4)
    monkeypatch.setattr("runtimes.inductor.slow_at_wide_convolutions", lambda: True)


def test_wide_convolutions_are_split(narrow):
    network = Wide().eval()
    images = torch.randn(2, 3, 9, 9)
    split = wide.split_wide(network, images)
    assert [name for name, module in split.named_children() if isinstance(module, wide.SplitConv)] == ["2"]
    assert split[2].sizes == [3, 2, 2]
    assert sum(p.numel() for p in split.parameters()) == sum(p.numel() for p in network.parameters())
    with torch.no_grad():
        torch.testing.assert_close(split(images), network(images), rtol=1e-5, atol=1e-6)
    narrower = torch.nn.Sequential(torch.nn.Conv2d(3, 7, 1))
    assert wide.split_wide(narrower, images) is narrower


@pytest.mark.parametrize("variant", models.vanillanet.VARIANTS)
def test_only_the_widest_variants_are_split(variant):
    with torch.device("meta"):
        network = plain(timm.create_model(variant, deploy=True).eval(), torch.zeros(1, 3, 224, 224))
        split = wide.split_wide(network, torch.zeros(1, 3, 224, 224))
    count = sum(isinstance(module, wide.SplitConv) for module in split.modules())
    # The layers of 3072 input channels, at 14x14 and 19x19; the last one's 6144 are at 7x7 and 10x10.
    assert count == (7 if "x1_5" in variant else 0)


@pytest.mark.parametrize(("precision", "count"), [("fp32", 1), ("bf16", 0)])
def test_inductor_is_given_split_convolutions_in_float32(narrow, precision, count):
    images = torch.randn(2, 3, 9, 9)
    form = inductor.inductor_form(Wide().eval(), images, Target(precision=precision))
    assert sum(isinstance(module, wide.SplitConv) for module in form.modules()) == count


@pytest.mark.parametrize(("precision", "count"), [("fp32", 6 + 2), ("bf16", 6)])
def test_openvino_is_given_split_convolutions_in_float32(narrow, monkeypatch, tmp_path, precision, count):
    openvino = pytest.importorskip("openvino")
    monkeypatch.setattr("runtimes.processor.slow_at_wide_convolutions", lambda: True)
    network, images = Wide().eval(), torch.randn(2, 3, 9, 9)
    path = tmp_path / "wide.xml"
    metadata = replace(METADATA, input_size=9)
    runtimes.find("openvino").export(network, images, path, Target(precision=precision), metadata)
    found = [node.get_type_name() for node in openvino.Core().read_model(path).get_ops()]
    assert sum(name in ("Convolution", "GroupConvolution") for name in found) == count
    if precision == "fp32":
        with torch.no_grad():
            torch.testing.assert_close(runtimes.load(path)(images), network(images), rtol=1e-4, atol=1e-5)


# -- signals and memory


# A handler of Python's runs on the stack that faulthandler has given the thread; DataLoader leaves one for SIGCHLD.
SIGNALS = """
import faulthandler, signal, subprocess, sys
import runtimes
faulthandler.enable()
signal.signal(signal.SIGCHLD, lambda *_: None)
loaded = [runtimes.load(sys.argv[1]) for _ in range(2)]
while loaded:
    del loaded[0]  # the first goes first
    print(subprocess.run(["true"]).returncode, flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs signal stacks")
def test_signals_are_survived_after_openvino(file_of):
    command = [sys.executable, "-c", SIGNALS, file_of(".xml")[1]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0\n0\n"), done.stderr


# 64 MiB are beyond what glibc's own threshold, which adapts to a program, rises to.
FAULTS = """
import resource, torch
from utils import keep_freed_memory
def faults(calls=4):
    for _ in range(20):  # the heap grows until freed blocks, aligned as they are, hold a new one
        torch.ones(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        torch.ones(1 << 24)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls
before = faults()
print(keep_freed_memory(), before, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_kept_memory_spares_page_faults():
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    kept, before, after = done.stdout.split()
    if kept != "True":
        pytest.skip("needs glibc")
    assert float(after) < 0.1 * float(before)


def test_older_glibc_keeps_as_much_as_it_allows(monkeypatch):
    """Before 2.35 it refuses a threshold of mmap above 32 MiB, `HEAP_MAX_SIZE / 2` in its malloc.c."""
    settings = {}

    class Library:
        gnu_get_libc_version = None

        @staticmethod
        def mallopt(setting, value):
            allowed = setting != utils.M_MMAP_THRESHOLD or value <= 32 << 20
            if allowed:
                settings[setting] = value
            return int(allowed)

    monkeypatch.setattr(utils.ctypes, "CDLL", lambda name: Library)
    assert keep_freed_memory()
    assert settings == {utils.M_MMAP_THRESHOLD: 32 << 20, utils.M_TRIM_THRESHOLD: 1 << 30}


def test_any_number_of_networks_is_compiled(monkeypatch, images):
    """torch compiles a code object 8 times, and runs it uncompiled then, which is no error."""
    compiled, compile = [], torch.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(compile, backend=backend))
    networks = [VanillaNet(num_classes=5, dims=(4, 4, 8), strides=(2, 1), deploy=True).eval() for _ in range(10)]
    for network in networks:
        runtime = runtimes.load(network, engine="compile", images=images[:1])
        with torch.no_grad():
            assert torch.allclose(runtime(images[:1]), network(images[:1]), atol=1e-6)
    assert len(compiled) == len(networks)
