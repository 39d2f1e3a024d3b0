"""Gradient checkpointing: the same numbers from less memory."""

import copy

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import models  # noqa: F401  registers the variants
from benchmarking.profiling import alive_per_image, saved_per_image
from harness import flags
from models.checkpointing import MODES, set_grad_checkpointing
from runs import assert_same_run

SWIN = "swin_tiny_patch4_window7_224"
NETWORKS = {
    "vanillanet_6": {"width_mult": 1 / 16},
    "resnet18": {},
    SWIN: {"img_size": 64, "embed_dim": 24, "depths": (2, 2, 2, 2), "drop_path_rate": 0.3},
}
each_network = pytest.mark.parametrize("name", NETWORKS)
each_mode = pytest.mark.parametrize("mode", MODES[1:])


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10, **NETWORKS[name]).train()
    if hasattr(network, "change_act"):
        network.change_act(0.5)
    return network


def step(network: nn.Module, images: torch.Tensor, *, dtype: torch.dtype | None = None, seed: int = 3):
    """Outputs, gradients and buffers after one forward and backward pass."""
    torch.manual_seed(seed)  # of a stochastic depth, which the second forward pass has to repeat
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        outputs = network(images)
    outputs.float().square().sum().backward()
    return [outputs, *(p.grad for p in network.parameters()), *network.buffers()]


def assert_equal(found, expected) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@each_mode
@each_network
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_and_statistics_are_equal_bit_by_bit(name, mode, dtype):
    network = build(name)
    images = torch.randn(4, 3, 64, 64)
    expected = step(copy.deepcopy(network), images, dtype=dtype)
    set_grad_checkpointing(network, mode)
    average = ModelEmaV3(network)  # copies it
    assert_equal(step(network, images, dtype=dtype), expected)
    assert_equal(step(average.module.requires_grad_().train(), images, dtype=dtype), expected)
    tracked = {b.item() for key, b in network.named_buffers() if key.endswith("num_batches_tracked")}
    assert tracked <= {1}  # not twice
    with torch.no_grad():
        before = [b.clone() for b in network.buffers()]
        assert torch.equal(network.eval()(images), average.module.eval()(images))
    assert_equal(list(network.buffers()), before)


class Count(TorchDispatchMode):
    """Counts convolutions' forward passes."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "again"), [("vanillanet_6", 15), ("resnet18", 19 - 7)])
def test_what_is_computed_again(name, again):
    """Seven convolutions of ResNet-18 have at least 256 channels and 3 x 3 taps, and are kept."""
    counts = {}
    for mode in MODES:
        network = build(name)
        set_grad_checkpointing(network, mode)
        loss = network(torch.randn(2, 3, 96, 96)).sum()  # on smaller maps than 3x3 VanillaNet trains with products
        with Count() as counter:
            loss.backward()
        counts[mode] = counter.count
    assert counts == {"none": 0, "activations": 0, "full": again}


# -- memory


@pytest.mark.parametrize(("mode", "most"), [("none", 81), ("activations", 50), ("full", 10)])
def test_memory_of_vanillanet_6_in_bfloat16(mode, most):
    """MiB an image at 224 px; without checkpointing it is 80.3."""
    network = timm.create_model("vanillanet_6").train()
    network.change_act(0.5)
    set_grad_checkpointing(network, mode)
    found = saved_per_image(network, 224, dtype=torch.bfloat16) / 2**20
    assert most * 0.6 < found <= most


def test_the_bytes_of_a_small_network_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).train()
    images, hidden, outputs = (4 * 8 * 8 * channels for channels in (3, 4, 2))  # float32, 8 x 8 px
    assert saved_per_image(network, 8) == images + hidden  # what ReLU returns is what the second convolution takes
    # The most is there when ReLU's gradient is taken, from that of its output into that of its input.
    assert alive_per_image(network, 8) == images + hidden + outputs + 2 * hidden


@each_network
def test_less_is_saved_and_counting_is_right(name):
    """Against a count on real tensors by another way: what autograd's nodes hold."""
    found = []
    for mode in MODES:
        network = build(name)
        state = copy.deepcopy(network.state_dict())
        set_grad_checkpointing(network, mode)
        found.append(saved_per_image(network, 64))
        assert_equal(list(network.state_dict().values()), list(state.values()))  # counting moves nothing
    assert found[0] > found[1] > found[2] > 0
    sizes = []
    for count in (2, 4):
        outputs = build(name)(torch.randn(count, 3, 64, 64))
        nodes, seen, storages = [outputs.grad_fn], set(), {}
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            for attribute in dir(node):
                value = getattr(node, attribute) if attribute.startswith("_saved_") else None
                if isinstance(value, torch.Tensor):
                    storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        sizes.append(sum(storages.values()))
    assert found[0] == pytest.approx((sizes[1] - sizes[0]) / 2, rel=1e-3)


# -- with the rest


@pytest.mark.parametrize(
    "name", ["vanillanet_6", *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", SWIN))]
)
def test_compiled(name):
    network = build(name)
    images = torch.randn(4, 3, 64, 64)
    found = {}
    for mode in MODES:
        compiled = copy.deepcopy(network)
        set_grad_checkpointing(compiled, mode)
        torch._dynamo.reset()
        compiled.compile(backend="aot_eager")
        found[mode] = step(compiled, images)
    assert_equal(found["activations"], found["none"])
    assert_equal(found["full"], found["none"])


def test_networks_that_cannot():
    with pytest.raises(ValueError, match=r"--grad_checkpointing full: VGG has no blocks"):
        set_grad_checkpointing(timm.create_model("vgg11", device="meta"), "full")


@each_mode
def test_a_feature_network(mode):
    network = timm.create_model("vanillanet_6", features_only=True, width_mult=1 / 16).train()
    images = torch.randn(2, 3, 64, 64)

    def gradients(network):
        sum(maps.square().sum() for maps in network(images)).backward()
        return [p.grad for p in network.parameters()]

    expected = gradients(copy.deepcopy(network))
    before = saved_per_image(Sum(network), 64)
    set_grad_checkpointing(network.model, mode)
    assert_equal(gradients(network), expected)
    assert saved_per_image(Sum(network), 64) < before


class Sum(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, images):
        return sum(maps.sum() for maps in self.features(images))


def test_a_run_on_two_processes_is_the_same_run(server, tiny_fmnist, tmp_path):
    """With a teacher, and with the accumulation, averages, dropout and clipping of `runs.BASE`."""
    teacher = tmp_path / "teacher.pth"
    torch.save(timm.create_model("resnet10t", num_classes=10).state_dict(), teacher)
    for mode in MODES:
        own = ("--grad_checkpointing", mode, "--teacher", "resnet10t", "--teacher_weights", teacher)
        server.finish(2, *flags(tiny_fmnist, tmp_path / mode, *own))
    for mode in MODES[1:]:
        assert assert_same_run(tmp_path / "none", tmp_path / mode) > 0
