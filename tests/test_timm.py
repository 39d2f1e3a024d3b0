"""A citizen of timm: what timm asks of its own families, over all registered variants, and loading.

The variants come from timm's registry, so that a new one is covered by being registered.
"""

import argparse
import copy
import io
import math
import pickle
import urllib.error
from pathlib import Path

import pytest
import timm
import torch
from timm.models import FeatureInfo, save_for_hf
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.utils import hooks
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import models  # registers the variants
from models import VanillaNet
from models.vanillanet import VARIANTS

ROOT = Path(__file__).parents[1]
NAMES = timm.list_models("vanillanet*", module=models.vanillanet.__name__.rpartition(".")[2])
# Pixels; a variant of fixed input size keeps its own.
FORWARD_SIZE, SMALL_SIZE, FEATURE_SIZE = 224, 64, 96

each_variant = pytest.mark.parametrize("name", NAMES)
# One of each kind: with stages of stride 1 and without, and with adaptive pools.
KINDS = ("vanillanet_5", "vanillanet_8", "vanillanet_13_x1_5_ada_pool")
each_kind = pytest.mark.parametrize(
    "name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
# The narrow networks differ from the real ones in nothing but the width; those are left to the thorough run.
each_width = pytest.mark.parametrize("width", [1 / 16, pytest.param(1, marks=pytest.mark.slow)], ids=["narrow", "full"])


def create(name: str, width: float = 1 / 16, **kwargs) -> nn.Module:
    return timm.create_model(name, width_mult=VARIANTS[name]["width_mult"] * width, **kwargs)


def draw(model: nn.Module, size: int, batch: int = 1) -> torch.Tensor:
    """Random images as timm's tests draw them, of at most `size` pixels unless the network's size is fixed."""
    channels, *full = model.default_cfg["input_size"]
    sides = full if model.default_cfg["fixed_input_size"] else [min(side, size) for side in full]
    return torch.randn(batch, channels, *sides)


def assert_every_gradient(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def assert_equal(actual, expected) -> None:
    assert len(actual) == len(expected)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def assert_same_state(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_the_registry_holds_the_table():
    assert list(VARIANTS) == NAMES
    assert timm.list_models("vanillanet*", pretrained=True) == [f"{name}.in1k" for name in VARIANTS]


# -- what timm's own test file asks


@each_width
@each_variant
def test_forward(name, width):
    model = create(name, width).eval()
    with torch.no_grad():
        outputs = model(draw(model, FORWARD_SIZE))
    assert outputs.shape == (1, 1000)
    assert torch.isfinite(outputs).all()


@each_width
@each_variant
def test_backward(name, width):
    model = create(name, width, num_classes=42).train()
    model.change_act(0.5)
    outputs = model(draw(model, SMALL_SIZE, batch=2))
    outputs.mean().backward()
    assert outputs.shape == (2, 42)
    assert torch.isfinite(outputs).all()
    assert_every_gradient(model)


@each_width
@each_variant
def test_default_cfg(name, width):
    model = create(name, width).eval()
    cfg, state = model.default_cfg, model.state_dict()
    assert cfg["architecture"] == name
    assert cfg["url"].endswith(f"/{name}.pth")
    assert (cfg["license"], cfg["num_classes"]) == ("mit", 1000)
    for layer in (*cfg["classifier"], cfg["first_conv"]):
        assert f"{layer}.weight" in state
    assert state[f"{cfg['first_conv']}.weight"].shape[1] == cfg["input_size"][0]
    assert state[f"{cfg['classifier'][-1]}.weight"].shape[0] == cfg["num_classes"]

    images = torch.randn(1, *cfg["input_size"])
    with torch.no_grad():
        features = model.forward_features(images)
        assert features.shape == (1, model.num_features, *cfg["pool_size"])
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (1, model.head_hidden_size)
        assert torch.equal(model.forward_head(features), model(images))
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert torch.equal(model(images), pooled)
        model.reset_classifier(0, "")
        assert torch.equal(model(images), features)
        bare = create(name, width, num_classes=0, global_pool="").eval()
        assert bare(images).shape == features.shape
        assert not [key for key in bare.state_dict() if key.startswith("cls")]


@each_width
@each_variant
def test_features_only(name, width):
    model = create(name, width, features_only=True).eval()
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert len(channels) >= 4
    assert channels[-1] == round(VARIANTS[name]["dims"][-1] * VARIANTS[name]["width_mult"] * width)
    sizes = (FORWARD_SIZE, FEATURE_SIZE) if width < 1 else (FEATURE_SIZE,)
    for size in sizes:
        if model.default_cfg["fixed_input_size"]:
            torch.manual_seed(0)
            model = create(name, width, features_only=True, img_size=size).eval()
        with torch.no_grad():
            outputs = model(torch.randn(2, 3, size, size))
        # True reductions: each map has the input's size divided by its own, rounded up.
        sides = [math.ceil(size / reduction) for reduction in reductions]
        assert [tuple(o.shape) for o in outputs] == [(2, c, s, s) for c, s in zip(channels, sides, strict=True)]
        assert all(torch.isfinite(o).all() for o in outputs)


@pytest.mark.parametrize("deploy", [False, True], ids=["train", "deploy"])
@pytest.mark.parametrize("feature_cls", ["getter", "fx", "hook", "list", "dict"])
@each_variant
def test_all_feature_classes_give_the_same_maps(name, feature_cls, deploy):
    torch.manual_seed(1)
    plain = create(name, deploy=deploy).eval()
    torch.manual_seed(1)
    model = create(name, deploy=deploy, features_only=True, feature_cls=feature_cls, out_indices=(1, 3)).eval()
    images = draw(plain, SMALL_SIZE)
    with torch.no_grad():
        expected = plain.forward_intermediates(images, indices=[1, 3], intermediates_only=True)
        outputs = model(images)
    if feature_cls == "dict":
        assert list(outputs) == ["1", "3"]
        outputs = list(outputs.values())
    assert_equal(outputs, expected)
    assert model.feature_info.channels() == [maps.shape[1] for maps in expected]


@each_width
@each_variant
def test_forward_intermediates(name, width):
    model = create(name, width).eval()
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    images = draw(model, FEATURE_SIZE)
    with torch.no_grad():
        final, maps = model.forward_intermediates(images)
        assert torch.equal(final, model.forward_features(images))
        assert [m.shape[1] for m in maps] == info.channels()
        side = images.shape[-1]
        assert [m.shape[-1] for m in maps] == [math.ceil(side / reduction) for reduction in info.reduction()]
        assert torch.equal(maps[-1], final)
        assert all(torch.isfinite(m).all() for m in maps)
        model.set_grad_checkpointing()
        assert_equal(model.forward_intermediates(images, intermediates_only=True), maps)


def test_forward_intermediates_options():
    model = create("vanillanet_7").eval()
    images = torch.randn(1, 3, SMALL_SIZE, SMALL_SIZE)
    final, maps = model.forward_intermediates(images)
    for indices, expected in ((2, maps[-2:]), ([0, -1], [maps[0], maps[-1]]), ((1,), maps[1:2]), (4, maps)):
        for stop_early in (False, True):
            actual = model.forward_intermediates(
                images, indices=indices, stop_early=stop_early, norm=True, intermediates_only=True
            )
            assert_equal(actual, expected)
    assert torch.equal(model.forward_intermediates(images, indices=[1])[0], final)
    # Stopping early leaves the later stages out, and what it calls final is the last map asked for.
    ran = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, *_: ran.append(module))
    early, _ = model.forward_intermediates(images, indices=[1], stop_early=True)
    assert torch.equal(early, maps[1])
    assert ran == list(model.stages)[:2]
    with pytest.raises(ValueError, match="NLC"):
        model.forward_intermediates(images, output_fmt="NLC")
    with pytest.raises(AssertionError, match="out of range"):
        model.forward_intermediates(images, indices=[4])


def trace(model: nn.Module) -> nn.Module:
    """The network's graph with its last node as output, for either mode, as timm's tests trace it."""
    train_nodes, eval_nodes = get_graph_node_names(model)
    return create_feature_extractor(model, train_return_nodes=train_nodes[-1:], eval_return_nodes=eval_nodes[-1:])


@each_width
@each_variant
def test_fx_forward(name, width):
    model = create(name, width).eval()
    images = draw(model, SMALL_SIZE)
    with torch.no_grad():
        (outputs,) = trace(model)(images).values()
        assert torch.equal(outputs, model(images))
        assert torch.equal(torch.fx.symbolic_trace(model)(images), outputs)


@each_width
@each_variant
def test_fx_backward(name, width):
    model = create(name, width, num_classes=42).train()
    model.change_act(0.5)
    images = draw(model, SMALL_SIZE, batch=2)
    traced = trace(copy.deepcopy(model)).train()
    symbolic = torch.fx.symbolic_trace(copy.deepcopy(model))
    expected = model(images)
    (outputs,) = traced(images).values()
    assert torch.equal(outputs, expected)
    assert torch.equal(symbolic(images), expected)
    outputs.mean().backward()
    assert outputs.shape == (2, 42)
    assert_every_gradient(traced)
    expected.mean().backward()
    assert sum(p.numel() for p in traced.parameters()) == sum(p.numel() for p in model.parameters())
    gradients = {key: p.grad for key, p in traced.named_parameters()}
    assert all(torch.equal(gradients[key], p.grad) for key, p in model.named_parameters())
    buffers = dict(traced.named_buffers())
    moved = [(key, b) for key, b in model.named_buffers() if "slope" not in key]
    assert all(torch.equal(buffers[key], b) for key, b in moved)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@each_width
@each_kind
def test_torchscript(name, width):
    model = create(name, width, scriptable=True).eval()
    images = draw(model, SMALL_SIZE)
    with torch.no_grad():
        for slope in (1.0, 0.5):
            model.change_act(slope)
            assert torch.equal(torch.jit.script(model)(images), model(images))
        (outputs,) = torch.jit.script(trace(model))(images).values()
        assert torch.equal(outputs, model(images))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize(
    "kwargs", [{"deploy": True}, {"num_classes": 0}, {"num_classes": 0, "global_pool": ""}, {"drop_rate": 0.5}], ids=str
)
def test_torchscript_of_other_forms(kwargs):
    model = create("vanillanet_5", **kwargs).eval()
    images = torch.randn(1, 3, SMALL_SIZE, SMALL_SIZE)
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(images), model(images))
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(images), model(images))


# -- the rest of timm's model interface


@pytest.mark.parametrize("deploy", [False, True], ids=["train", "deploy"])
def test_classifier_is_found_and_replaced(deploy):
    model = create("vanillanet_5", num_classes=7, deploy=deploy, drop_rate=0.25, dtype=torch.float64).train()
    found = model.get_classifier()
    found = found if isinstance(found, tuple) else (found,)
    names = ("cls.2",) if deploy else model.default_cfg["classifier"]
    assert [id(layer) for layer in found] == [id(model.get_submodule(name)) for name in names]

    model.change_act(1.0)
    model.reset_classifier(5)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert model(images).shape == (2, 5)
    head = (model.cls,) if deploy else (model.cls1, model.cls2)
    assert {module.training for part in head for module in part.modules()} == {True}
    assert head[0][1].p == 0.25
    for layer in head[0][2:3]:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)  # as initialized by the constructor
        assert layer.bias.abs().max().item() == 0

    model.reset_classifier(0, "max")
    assert type(model.get_classifier()) is nn.Identity
    model.eval()
    assert torch.equal(model(images), model.forward_features(images).amax((2, 3)))
    model.reset_classifier(3)  # the pool stays
    with torch.no_grad():
        hidden = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(hidden, model.forward_features(images).amax((2, 3)))
    assert model(images).shape == (2, 3)


@pytest.mark.parametrize(("pool", "factor"), [("avg", 1), ("max", 1), ("avgmax", 1), ("catavgmax", 2), ("fast", 1)])
def test_pool_types(pool, factor):
    model = create("vanillanet_5", num_classes=7, global_pool=pool).eval()
    images = torch.randn(2, 3, SMALL_SIZE, SMALL_SIZE)
    features = model.forward_features(images)
    average, largest = features.mean((2, 3)), features.amax((2, 3))
    expected = {
        "avg": average,
        "fast": average,
        "max": largest,
        "avgmax": (average + largest) / 2,
        "catavgmax": torch.cat((average, largest), 1),
    }[pool]
    assert model.head_hidden_size == factor * model.num_features
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected, rtol=1e-5, atol=1e-6)
    assert model(images).shape == (2, 7)


def test_a_map_of_logits_without_a_pool():
    model = create("vanillanet_5", num_classes=7, global_pool="").eval()
    assert model(torch.randn(2, 3, SMALL_SIZE, SMALL_SIZE)).shape == (2, 7, 2, 2)


def test_pruned_networks():
    model = create("vanillanet_7").eval()
    images = torch.randn(1, 3, SMALL_SIZE, SMALL_SIZE)
    maps = model.forward_intermediates(images, intermediates_only=True)
    whole = copy.deepcopy(model)
    assert whole.prune_intermediate_layers([0, -1], prune_head=False) == [0, 3]
    assert whole.num_classes == 1000
    assert_same_state(whole, model.state_dict())  # all stages are needed, and the head was to stay

    assert model.prune_intermediate_layers([-3]) == [1]
    assert len(model.stages) == 2
    assert not [key for key in model.state_dict() if key.startswith("cls")]
    assert torch.equal(model(images), maps[1])
    assert_equal(model.forward_intermediates(images, intermediates_only=True), maps[:2])
    assert len(model.feature_info) == 2
    model.reset_classifier(5, "avg")
    assert model(images).shape == (1, 5)
    assert model.num_features == maps[1].shape[1]


def test_image_size_of_adaptive_pooling():
    name = "vanillanet_13_x1_5_ada_pool"
    for kwargs, size, side in (({}, 224, 10), ({"img_size": 96}, 96, 4), ({"img_size": (320, 320)}, 320, 14)):
        model = create(name, num_classes=0, global_pool="", **kwargs).eval()
        with torch.no_grad():
            assert model(torch.randn(1, 3, size, size)).shape[2:] == (side, side)
    with pytest.raises(ValueError, match="square"):
        create(name, img_size=(96, 128))
    with pytest.raises(ValueError, match="belongs to ada_pool"):
        create("vanillanet_13_x1_5", img_size=96)


def test_device_and_dtype():
    model = create("vanillanet_5", device="meta", dtype=torch.bfloat16)
    model.reset_classifier(7)
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    assert {t.device.type for t in tensors} == {"meta"}
    assert {t.dtype for t in tensors} == {torch.bfloat16}
    half = create("vanillanet_5", dtype=torch.bfloat16)
    assert half.stem1[0].weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("deploy", [False, True], ids=["train", "deploy"])
@each_variant
def test_layer_decay_is_the_published_one(name, deploy):
    model = create(name, deploy=deploy)
    layers = len(model.stages)
    scales = {
        id(p): (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(model, weight_decay=0.3, layer_decay=0.8)
        for p in group["params"]
    }
    assert len(scales) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        part, index = key.split(".")[:2]
        layer = {"stem": 0, "stages": int(index) + 1, "cls": layers + 1}[part.rstrip("12")]
        scale, decay = scales[id(parameter)]
        assert scale == pytest.approx(0.8 ** (layers + 1 - layer), rel=1e-12), key
        assert decay == (0.3 if parameter.ndim > 1 else 0.0), key


def test_no_weight_decay_beyond_vectors():
    model = create("vanillanet_5")
    assert model.no_weight_decay() == set()
    spared, decayed = param_groups_weight_decay(model, 0.3, no_weight_decay_list=model.no_weight_decay())
    assert {p.ndim for p in spared["params"]} == {1}
    assert {p.ndim for p in decayed["params"]} == {4}
    assert model.group_matcher(coarse=True).keys() == model.group_matcher(coarse=False).keys()


# -- gradient checkpointing


def step(model: nn.Module, images: torch.Tensor, **checkpointing) -> tuple[torch.Tensor, dict, dict]:
    """Outputs, gradients and buffers after one forward and backward pass of a copy."""
    model = copy.deepcopy(model)
    if checkpointing:
        model.set_grad_checkpointing(**checkpointing)
    outputs = model(images)
    outputs.square().sum().backward()
    assert_every_gradient(model)
    return outputs, {key: p.grad for key, p in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("deploy", [False, True], ids=["train form", "deploy form"])
def test_checkpointing_changes_no_number(randomized, deploy, training):
    model = randomized(create("vanillanet_6", num_classes=10, deploy=deploy)).train(training)
    model.change_act(1.0 if deploy else 0.5)
    images = torch.randn(4, 3, SMALL_SIZE, SMALL_SIZE)
    outputs, gradients, buffers = step(model, images)
    for enable in (True, False):
        other_outputs, other_gradients, other_buffers = step(model, images, enable=enable)
        assert torch.equal(other_outputs, outputs)
        assert_equal(list(other_gradients.values()), list(gradients.values()))
        assert other_buffers.keys() == buffers.keys()
        assert_equal(list(other_buffers.values()), list(buffers.values()))
    tracked = [b.item() for key, b in buffers.items() if key.endswith("num_batches_tracked")]
    assert set(tracked) == (set() if deploy else {8 if training else 7})  # 7 is where `randomized` starts


def count_forwards(module: nn.Module) -> tuple[list[int], hooks.RemovableHandle]:
    calls: list[int] = []
    return calls, module.register_forward_hook(lambda *_: calls.append(1))


@pytest.mark.parametrize("features_only", [False, True], ids=["classifier", "features"])
def test_checkpointing_recomputes(features_only):
    model = create("vanillanet_6", features_only=features_only).train()
    network = model.model if features_only else model
    # The last module of a checkpointed part is not recomputed when nothing before the end needs it; the first is.
    calls, _ = count_forwards(network.stages[1].conv1)
    for enable, expected in ((False, 1), (True, 2)):
        network.set_grad_checkpointing(enable)
        calls.clear()
        outputs = model(torch.randn(2, 3, SMALL_SIZE, SMALL_SIZE))
        (outputs[-1] if features_only else outputs).sum().backward()
        assert len(calls) == expected
    tracked = {b.item() for key, b in network.named_buffers() if key.startswith("stages.1") and "tracked" in key}
    assert tracked == {2}  # two steps


# -- copies


def test_copies_are_whole_and_independent(randomized):
    model = randomized(create("vanillanet_5", num_classes=10))
    images = torch.randn(1, 3, SMALL_SIZE, SMALL_SIZE)
    expected = model(images)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for other in copies:
        assert torch.equal(other(images), expected)
        timm.utils.model.reparameterize_model(other, inplace=True)  # reaches the copy's root, not the original's
        assert other.deploy
        torch.testing.assert_close(other(images), expected, rtol=1e-4, atol=1e-5)
        other.reset_classifier(3)
    assert not model.deploy
    assert torch.equal(model(images), expected)


# -- released weights


class Released:
    """A file like the published ones: `model`, `model_ema` and an `argparse.Namespace`."""

    def __init__(self, folder: Path, name: str, randomized, **kwargs):
        self.path = folder / f"{name}.pth"
        self.ema = randomized(create(name, **kwargs))
        self.weights = copy.deepcopy(self.ema.state_dict())
        checkpoint = {
            "model": randomized(create(name, **kwargs)).state_dict(),
            "model_ema": self.weights,
            "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
            "epoch": 299,
            "args": argparse.Namespace(model=name, lr=3.5e-3, opt_betas=None),
        }
        torch.save(checkpoint, self.path)

    @property
    def source(self) -> dict:
        """What makes timm take this file for the released one; its downloads go to a folder of their own."""
        return {
            "pretrained": True,
            "pretrained_cfg_overlay": {"url": self.path.as_uri()},
            "cache_dir": self.path.parent / "cache",
        }


@pytest.fixture
def released(tmp_path, randomized) -> Released:
    return Released(tmp_path, "vanillanet_6", randomized)


def body(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if not key.startswith("cls")}


@each_variant
def test_pretrained(name, tmp_path, randomized):
    released = Released(tmp_path, name, randomized)
    allowed = set(torch.serialization.get_safe_globals())
    model = create(name, **released.source)
    assert_same_state(model, released.weights)
    assert model.act_learn == 1.0
    assert set(torch.serialization.get_safe_globals()) == allowed

    adapted = create(name, **released.source, num_classes=5, in_chans=1).state_dict()
    stem = adapted.pop("stem1.0.weight")
    expected = body(released.weights)
    torch.testing.assert_close(stem, expected.pop("stem1.0.weight").sum(1, keepdim=True))
    assert body(adapted).keys() == expected.keys()
    assert all(torch.equal(adapted[key], expected[key]) for key in expected)

    bare = create(name, **released.source, num_classes=0)
    assert_same_state(bare, body(released.weights))

    features = create(name, **released.source, features_only=True).eval()
    images = draw(model, SMALL_SIZE)
    with torch.no_grad():
        assert_equal(features(images), released.ema.forward_intermediates(images, intermediates_only=True))


def test_pretrained_with_other_classes_has_a_fresh_classifier(released):
    model = create("vanillanet_6", **released.source, num_classes=5).eval()
    state = model.state_dict()
    assert all(torch.equal(value, released.weights[key]) for key, value in body(state).items())
    classifier = {key: value for key, value in state.items() if key.startswith("cls")}
    assert sorted(classifier) == sorted(key for key in released.weights if key.startswith("cls"))
    for key, value in classifier.items():
        if key in ("cls1.2.weight", "cls2.0.weight"):
            assert value.shape[0] == 5
            assert 0 < value.abs().max() <= 0.1  # freshly drawn with a deviation of 0.02
        else:
            expected = 1 if key in ("cls1.3.weight", "cls1.3.running_var") else 0
            assert value.eq(expected).all(), key
    assert model(torch.randn(2, 3, SMALL_SIZE, SMALL_SIZE)).shape == (2, 5)


def test_pretrained_with_other_channels(released):
    weight = released.weights["stem1.0.weight"]
    model = create("vanillanet_6", **released.source, in_chans=6)
    torch.testing.assert_close(model.stem1[0].weight.data, torch.cat((weight, weight), 1) / 2)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in released.weights.items() if key != "stem1.0.weight")


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 0}, {"features_only": True}], ids=str)
def test_pretrained_deploy_form(released, kwargs):
    images = torch.randn(1, 3, SMALL_SIZE, SMALL_SIZE)
    reference = copy.deepcopy(released.ema)
    if "num_classes" in kwargs:
        reference.reset_classifier(0)
    reference.switch_to_deploy()
    model = create("vanillanet_6", **released.source, **kwargs, deploy=True).eval()
    network = getattr(model, "model", model)
    assert network.deploy
    with torch.no_grad():
        if "features_only" in kwargs:
            assert_equal(model(images), reference.forward_intermediates(images, intermediates_only=True))
        else:
            assert_same_state(network, reference.state_dict())
            assert torch.equal(model(images), reference(images))


def test_pretrained_deploy_form_has_no_other_features(released):
    with pytest.raises(ValueError, match="feature_cls='getter' only"):
        create("vanillanet_6", **released.source, deploy=True, features_only=True, feature_cls="fx")


def test_pretrained_deploy_file(tmp_path, released):
    released.ema.switch_to_deploy()
    path = tmp_path / "deploy.pth"
    torch.save({"model": released.ema.state_dict()}, path)
    source = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    assert_same_state(create("vanillanet_6", **source, deploy=True), released.ema.state_dict())
    with pytest.raises(RuntimeError, match="not the weights of this network"):
        create("vanillanet_6", **source)  # cannot be undone into the train form
    source = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": {"model": released.ema.state_dict()}}}
    assert_same_state(create("vanillanet_6", **source, deploy=True), released.ema.state_dict())


def test_pretrained_from_a_file(released):
    model = create("vanillanet_6", pretrained=True, pretrained_cfg_overlay={"file": str(released.path)})
    assert_same_state(model, released.weights)
    model = create("vanillanet_6", checkpoint_path=str(released.path))
    assert_same_state(model, released.weights)


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 5}, {"num_classes": 0}, {"features_only": True}], ids=str)
def test_the_wrong_file_is_an_error(released, kwargs):
    with pytest.raises(RuntimeError, match="not the weights of this network"):
        create("vanillanet_7", **released.source, **kwargs)
    with pytest.raises(RuntimeError, match="size mismatch"):
        create("vanillanet_6", width=1 / 8, **released.source, **kwargs)


def test_a_file_that_cannot_be_reached_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    for url in ((tmp_path / "missing.pth").as_uri(), "http://127.0.0.1:9/vanillanet_5.pth"):
        with pytest.raises(urllib.error.URLError):
            create("vanillanet_5", pretrained=True, pretrained_cfg_overlay={"url": url}, cache_dir=tmp_path / "cache")
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        create("vanillanet_5", pretrained=True, pretrained_cfg_overlay={"url": ""})


@pytest.mark.parametrize("kind", ["url", "file"])
def test_no_code_runs_from_a_file(hostile, tmp_path, kind):
    path = hostile()
    source = {"url": path.as_uri()} if kind == "url" else {"file": str(path)}
    with pytest.raises((pickle.UnpicklingError, RuntimeError), match="open"):
        create("vanillanet_5", pretrained=True, pretrained_cfg_overlay=source, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "harm").exists()


# -- the hubs


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [
        ("vanillanet_9", {"num_classes": 7}, SMALL_SIZE),
        ("vanillanet_9", {"deploy": True, "in_chans": 1, "global_pool": "max"}, SMALL_SIZE),
        ("vanillanet_13_x1_5_ada_pool", {"img_size": 96, "num_classes": 7}, 96),
    ],
    ids=str,
)
def test_saved_for_the_hugging_face_hub(tmp_path, randomized, name, kwargs, size):
    model = randomized(create(name, **kwargs))
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_same_state(loaded, model.state_dict())
    images = torch.randn(1, model.in_chans, size, size)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    tuned = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=30)
    assert all(torch.equal(tuned.state_dict()[key], value) for key, value in body(model.state_dict()).items())
    classifiers = tuned.get_classifier() if isinstance(tuned.get_classifier(), tuple) else (tuned.get_classifier(),)
    assert all(layer.weight.std().item() == pytest.approx(0.02, rel=0.2) for layer in classifiers)  # fresh, as any


def saved_and_loaded(model, folder, **kwargs):
    save_for_hf(model, folder, safe_serialization=True)
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


def test_a_network_fused_later_is_saved_as_what_it_is(tmp_path, randomized):
    model = randomized(create("vanillanet_5"))
    model.change_act(0.5)
    model.change_act(1.0)
    model.switch_to_deploy()
    loaded = saved_and_loaded(model, tmp_path)
    assert loaded.deploy
    assert_same_state(loaded, model.state_dict())
    grey = saved_and_loaded(model, tmp_path, in_chans=1)
    torch.testing.assert_close(grey.stem[0].weight, model.stem[0].weight.sum(1, keepdim=True))


def test_a_network_is_saved_with_its_lambda_and_its_pool(tmp_path, randomized):
    """Else the loaded one computes something else, and says nothing."""
    model = randomized(create("vanillanet_5", num_classes=7))
    model.reset_classifier(5, "max")
    model.change_act(0.375)
    loaded = saved_and_loaded(model, tmp_path)
    assert (loaded.act_learn, loaded.global_pool, loaded.num_classes) == (0.375, "max", 5)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
    with pytest.raises(ValueError, match=r"slope is 0\.375"):
        loaded.switch_to_deploy()
    with pytest.raises(ValueError, match=r"no fading activation to set to 0\.5"):
        VanillaNet(dims=(4, 4, 4), strides=(2, 1), deploy=True, act_learn=0.5)


def test_a_downloaded_checkpoint_sets_lambda(tmp_path, randomized):
    model = randomized(create("vanillanet_5"))
    torch.save({"model": model.state_dict(), "act_learn": 0.25}, tmp_path / "ramp.pth")
    overlay = {"url": (tmp_path / "ramp.pth").as_uri()}
    loaded = create("vanillanet_5", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "cache")
    assert loaded.act_learn == 0.25
    assert_same_state(loaded, model.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_the_layers_that_timm_looks_for_are_there_in_deploy_form(fused):
    model = create("vanillanet_6", deploy=not fused)
    if fused:
        model.switch_to_deploy()
    assert type(model.get_submodule(model.default_cfg["first_conv"])) is nn.Conv2d
    assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()
    assert create("vanillanet_6").default_cfg["classifier"] == ("cls1.2", "cls2.0")  # a class's own is untouched


def test_torch_hub_has_every_variant():
    for name in NAMES:
        model = torch.hub.load(str(ROOT), name, source="local", device="meta", num_classes=7)
        assert type(model) is VanillaNet
        assert (model.default_cfg["architecture"], model.num_classes) == (name, 7)


def test_torch_hub_takes_timms_arguments(released):
    model = torch.hub.load(str(ROOT), "vanillanet_6", source="local", width_mult=1 / 16, **released.source)
    assert_same_state(model, released.weights)
    with pytest.raises(TypeError, match="act_nmu"):
        torch.hub.load(str(ROOT), "vanillanet_6", source="local", device="meta", act_nmu=4)
