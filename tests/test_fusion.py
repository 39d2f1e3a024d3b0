"""Fusion: the algebra of two layers, and the deploy form of a whole network."""

import copy
import inspect

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import models
from models import Block, SeriesActivation, VanillaNet, fold_bn, fusion, merge_pointwise
from models.vanillanet import VARIANTS

# timm has the walk in one place or in two, depending on its version.
WALKS = {
    walk.__module__: walk for walk in (reparameterize_model, getattr(timm.models, "reparameterize_model", None)) if walk
}
TINY = {"num_classes": 10, "dims": (8, 16, 24, 24), "strides": (2, 2, 1)}
GEOMETRIES = [
    {"kernel_size": 1},
    {"kernel_size": 4, "stride": 4},
    {"kernel_size": 4, "stride": 3, "padding": 1},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": (3, 1), "padding": (1, 0), "padding_mode": "reflect"},
]


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_strict_strides(module: nn.Module) -> None:
    """Those of a fresh tensor, on the dimensions of size 1 as well, which `is_contiguous` does not look at."""
    for name, parameter in module.named_parameters():
        assert parameter.stride() == torch.empty(parameter.shape).stride(), name


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


def assert_same_state(module: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


# -- two layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 4], ids=["dense", "depthwise"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_fold_bn_is_the_two_layers(randomized, geometry, groups, bias):
    layers = nn.Sequential(nn.Conv2d(4, 8, groups=groups, bias=bias, **geometry), nn.BatchNorm2d(8, eps=1e-6))
    randomized(layers.double())
    before = state_of(layers)
    folded = fold_bn(*layers)
    x = torch.randn(2, 4, 13, 13, dtype=torch.float64)
    assert type(folded) is nn.Conv2d
    assert (folded(x) - layers(x)).abs().max().item() < 1e-12
    assert_strict_strides(folded)
    assert_same_state(layers, before)


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_merge_pointwise_is_the_two_layers(randomized, geometry, biases):
    layers = nn.Sequential(nn.Conv2d(4, 6, bias=biases[0], **geometry), nn.Conv2d(6, 5, 1, bias=biases[1]))
    randomized(layers.double())
    before = state_of(layers)
    merged = merge_pointwise(*layers)
    x = torch.randn(2, 4, 13, 13, dtype=torch.float64)
    assert type(merged) is nn.Conv2d
    assert (merged(x) - layers(x)).abs().max().item() < 1e-12
    assert_strict_strides(merged)
    assert_same_state(layers, before)


def test_layers_are_computed_in_float64(randomized):
    conv, bn, second = nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 1)
    randomized(nn.Sequential(conv, bn, second))
    double = [copy.deepcopy(layer).double() for layer in (conv, bn, second)]
    for single, exact in (
        (fold_bn(conv, bn), fold_bn(*double[:2])),
        (merge_pointwise(conv, second), merge_pointwise(double[0], double[2])),
    ):
        assert single.weight.dtype == torch.float32
        assert torch.equal(single.weight, exact.weight.float())
        assert torch.equal(single.bias, exact.bias.float())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_layers_keep_mode_and_requires_grad(training, requires_grad):
    conv, bn, second = (
        layer.train(training).requires_grad_(requires_grad)
        for layer in (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    )
    for layer in (fold_bn(conv, bn), merge_pointwise(conv, second)):
        assert layer.training is training
        assert {p.requires_grad for p in layer.parameters()} == {requires_grad}
        assert {p.grad_fn for p in layer.parameters()} == {None}


def test_layers_that_cannot_be_fused():
    conv = nn.Conv2d(4, 8, 1)
    with pytest.raises(ValueError, match="16 channels into 8"):
        fold_bn(conv, nn.BatchNorm2d(16))
    for bn in (nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, track_running_stats=False)):
        with pytest.raises(ValueError, match="running statistics and affine"):
            fold_bn(conv, bn)
    for second in (
        nn.Conv2d(8, 4, 3),
        nn.Conv2d(8, 4, 1, stride=2),
        nn.Conv2d(8, 4, 1, padding=1),
        nn.Conv2d(8, 4, 1, groups=2),
    ):
        with pytest.raises(ValueError, match="dense 1x1 convolution of stride 1"):
            merge_pointwise(conv, second)
    with pytest.raises(ValueError, match="dense convolution followed"):
        merge_pointwise(nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 4, 1))
    with pytest.raises(ValueError, match="8 outputs into 6 inputs"):
        merge_pointwise(conv, nn.Conv2d(6, 4, 1))


# -- all variants


@pytest.mark.parametrize("width", [1 / 16, pytest.param(1, marks=pytest.mark.slow)], ids=["narrow", "full"])
@pytest.mark.parametrize("name", VARIANTS)
def test_deploy_form_is_the_same_function(randomized, name, width):
    size = {"img_size": 64} if VARIANTS[name]["ada_pool"] else {}
    model = getattr(models, name)(width_mult=VARIANTS[name]["width_mult"] * width, **size)
    randomized(model)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        assert relative_difference(expected[0], expected[1]) > 1e-2  # the logits do depend on the image
        fused = copy.deepcopy(model)
        fused.switch_to_deploy()
        assert relative_difference(fused(images), expected) < 1e-4
        assert_strict_strides(fused)
        del fused
        model, images = model.double(), images.double()
        expected = model(images)
        model.switch_to_deploy()
        assert (model(images) - expected).abs().max().item() < 1e-9
    assert_strict_strides(model)


@pytest.mark.parametrize("name", VARIANTS)
def test_deploy_form_is_the_one_that_is_built(dispatched, name):
    size = {"img_size": 64} if VARIANTS[name]["ada_pool"] else {}
    fused = getattr(models, name)(width_mult=1 / 16, **size).eval()
    built = getattr(models, name)(width_mult=1 / 16, deploy=True, **size).eval()
    fused.switch_to_deploy()
    images = torch.randn(1, 3, 64, 64)
    assert dispatched(fused, images) == dispatched(built, images)
    assert [(k, v.shape, v.stride()) for k, v in fused.state_dict().items()] == [
        (k, v.shape, v.stride()) for k, v in built.state_dict().items()
    ]
    assert fused.feature_info == built.feature_info
    built.load_state_dict(fused.state_dict())
    with torch.no_grad():
        assert torch.equal(fused(images), built(images))


# -- the network


@pytest.fixture
def network(randomized) -> VanillaNet:
    return randomized(VanillaNet(**TINY, dtype=torch.float64))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


def test_fusing_twice_does_nothing(network):
    network.switch_to_deploy()
    before, parts = state_of(network), list(network.modules())
    network.switch_to_deploy()
    for part in parts:
        if isinstance(part, Block | SeriesActivation):
            part.switch_to_deploy()
    assert list(network.modules()) == parts
    assert_same_state(network, before)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
def test_timm_fuses_the_whole_network(network, images, walk, inplace):
    expected = network(images)
    reference = copy.deepcopy(network)
    reference.switch_to_deploy()
    before = state_of(network)
    fused = walk(network, inplace=inplace)
    assert fused.deploy
    assert_same_state(fused, reference.state_dict())
    assert (fused(images) - expected).abs().max().item() < 1e-9
    if inplace:
        assert fused is network
    else:
        assert not network.deploy
        assert_same_state(network, before)
        assert torch.equal(network(images), expected)
    assert_same_state(walk(fused, inplace=inplace), reference.state_dict())


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
def test_timm_fuses_a_feature_network(randomized, walk, inplace):
    features = timm.create_model(
        "vanillanet_6", width_mult=1 / 16, features_only=True, out_indices=(0, 2), dtype=torch.float64
    )
    randomized(features)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = features(images)
    fused = walk(features, inplace=inplace)
    assert fused.model.deploy
    assert features.model.deploy is inplace
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert fused.feature_info.module_name() == ["stem.1", "stages.1"]
    assert len(expected) == 2
    for actual, before in zip(fused(images), expected, strict=True):
        assert (actual - before).abs().max().item() < 1e-9


def test_timm_fuses_a_network_inside_another_module(network, images):
    expected = network(images)
    fused = reparameterize_model(nn.Sequential(nn.Identity(), network))
    assert fused[1].deploy
    assert not network.deploy
    assert (fused(images) - expected).abs().max().item() < 1e-9


@pytest.mark.parametrize("slope", [0.0, 0.5, 1 - 1e-6])
def test_fusing_too_early_is_an_error_that_touches_nothing(network, images, slope):
    network.change_act(slope)
    before, parts, expected = state_of(network), list(network.modules()), network(images)
    for fuse in (network.switch_to_deploy, lambda: reparameterize_model(network, inplace=True)):
        with pytest.raises(ValueError, match=f"slope is {slope}"):
            fuse()
        assert not network.deploy
        assert network.act_learn == slope
        assert list(network.modules()) == parts
        assert_same_state(network, before)
        assert torch.equal(network(images), expected)
    with pytest.raises(ValueError, match=f"slope is {slope}"):
        network.stages[0].switch_to_deploy()


def test_one_lambda_below_one_is_too_early(network):
    network.stages[2].relu.set_slope(0.5)
    before = state_of(network)
    with pytest.raises(ValueError, match=r"slope is 0\.5"):
        network.switch_to_deploy()
    assert_same_state(network, before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_mode_and_requires_grad_are_kept(network, training, requires_grad):
    network.train(training).requires_grad_(requires_grad)
    network.switch_to_deploy()
    assert {module.training for module in network.modules()} == {training}
    assert {parameter.requires_grad for parameter in network.parameters()} == {requires_grad}
    assert len(list(network.parameters())) == 2 * (
        4 + 4 + 1
    )  # weight and bias of convolutions, activations, classifier


def test_device_and_dtype_are_kept():
    model = VanillaNet(**TINY, device="meta", dtype=torch.bfloat16)
    model.switch_to_deploy()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_metal_computes_nothing_in_float64():
    """Which it lacks; what can be seen of it without a Mac."""
    with FakeTensorMode():
        wide = fusion._wide(torch.empty(3, device="mps"))
    assert (wide.device.type, wide.dtype) == ("cpu", torch.float64)
    assert ".double()" not in inspect.getsource(fusion).replace(inspect.getsource(fusion._wide), "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fusing_on_a_gpu(network, images):
    network, images = network.cuda(), images.cuda()
    expected = network(images)
    network.switch_to_deploy()
    assert {parameter.device.type for parameter in network.parameters()} == {"cuda"}
    assert (network(images) - expected).abs().max().item() < 1e-9


@pytest.mark.parametrize("kwargs", [{"num_classes": 0}, {"num_classes": 0, "global_pool": ""}, {"global_pool": ""}])
def test_networks_without_classifier_or_pool_fuse(randomized, images, kwargs):
    model = randomized(VanillaNet(**{**TINY, **kwargs}, dtype=torch.float64))
    expected = model(images)
    model.switch_to_deploy()
    assert model(images).shape == expected.shape
    assert (model(images) - expected).abs().max().item() < 1e-9


def test_a_fused_network_trains(network, images):
    network.switch_to_deploy()
    network.train()(images).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
