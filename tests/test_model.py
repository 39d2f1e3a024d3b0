"""The network: names, sizes, costs, golden numbers, lambda and the published interface."""

import copy
import inspect
import json
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

import models
from benchmarking import profiling
from models import VanillaNet
from models.vanillanet import VARIANTS, Block, FadingReLU, SeriesActivation
from models.workarounds import depthwise_conv2d

DATA = Path(__file__).parent / "data"
KEYS = json.loads((DATA / "state_dict_keys.json").read_text())
GOLDEN = ("strides_221", "act_num_4", "ada_pool")

# Deploy form: layers, parameters (M) and multiply-accumulates at 224x224 (G), as the paper prints them.
COSTS = {
    "vanillanet_5": (5, 15.5, 5.2),
    "vanillanet_6": (6, 32.5, 6.0),
    "vanillanet_7": (7, 32.8, 6.9),
    "vanillanet_8": (8, 37.1, 7.7),
    "vanillanet_9": (9, 41.4, 8.6),
    "vanillanet_10": (10, 45.7, 9.4),
    "vanillanet_11": (11, 50.0, 10.3),
    "vanillanet_12": (12, 54.3, 11.1),
    "vanillanet_13": (13, 58.6, 11.9),
    "vanillanet_13_x1_5": (13, 127.8, 26.5),
    "vanillanet_13_x1_5_ada_pool": (13, 127.8, 48.9),
}

TINY = {"num_classes": 10, "dims": (8, 16, 24, 24), "strides": (2, 2, 1)}


def tiny(**kwargs) -> VanillaNet:
    return VanillaNet(**{**TINY, **kwargs})


# -- names, sizes, costs


def test_tables_name_the_eleven_variants():
    assert list(VARIANTS) == list(KEYS) == list(COSTS)
    assert len(VARIANTS) == 11


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("name", KEYS)
def test_state_dict_is_the_published_one(name, form):
    model = getattr(models, name)(deploy=form == "deploy", device="meta")
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == KEYS[name][form]
    assert profiling.count_params(model) == KEYS[name][f"params_{form}"]
    released = {key: torch.empty(shape, device="meta") for key, shape in KEYS[name][form].items()}
    assert str(model.load_state_dict(released, strict=True)) == "<All keys matched successfully>"


@pytest.mark.parametrize("name", COSTS)
def test_layers_params_and_macs_are_the_papers(name):
    # Built without storage and given uninitialized memory: the values are of no interest, and drawing them is slow.
    model = getattr(models, name)(deploy=True, device="meta").to_empty(device="cpu").eval()
    layers, params, macs = COSTS[name]
    assert profiling.count_layers(model) == layers
    assert profiling.count_params(model) / 1e6 == pytest.approx(params, abs=0.05)
    assert profiling.count_macs(model, 224) / 1e9 == pytest.approx(macs, abs=0.1)


def test_profile_counts_on_a_copy():
    model = tiny().train()
    model.change_act(0.5)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layers, params, macs = profiling.profile(model, 32)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert layers == 10  # two each for the stem, three stages and the classifier
    assert params == sum(p.numel() for p in model.parameters())
    assert profiling.profile(model, (3, 32, 32)) == (layers, params, macs)


def test_profile_of_a_network_counted_by_hand():
    model = tiny(deploy=True)
    layers, params, macs = profiling.profile(model, 32)
    convolutions = 8 * 8 * 8 * 3 * 16 + 8 * 8 * 16 * 8 + 4 * 4 * 24 * 16 + 2 * 2 * 24 * 24 + 24 * 10
    activations = 49 * (8 * 8 * 8 + 4 * 4 * 16 + 2 * 2 * 24 + 2 * 2 * 24)
    assert macs == convolutions + activations
    assert layers == 5
    weights = 8 * 3 * 16 + 16 * 8 + 24 * 16 + 24 * 24 + 10 * 24 + 49 * (8 + 16 + 24 + 24)
    biases = 2 * (8 + 16 + 24 + 24) + 10
    assert params == weights + biases


def test_profile_takes_the_depth_of_the_input_from_the_network():
    assert profiling.profile(tiny(deploy=True, in_chans=1), 32)[2] == (
        profiling.profile(tiny(deploy=True), 32)[2] - 8 * 8 * 8 * 2 * 16
    )


def test_throughput_is_measured_in_eval_mode_only():
    model = tiny().train()
    with pytest.raises(ValueError, match="train mode"):
        profiling.throughput([model], torch.zeros(1, 3, 32, 32))


def test_throughput_gives_one_rate_a_network(monkeypatch):
    # A clock that a network advances by its own cost makes the rate exact.
    now = [0.0]
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: now[0])

    class Costly(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds = seconds

        def forward(self, x):
            now[0] += self.seconds
            return x

    rates = profiling.throughput([Costly(0.5).eval(), Costly(0.125).eval()], torch.zeros(4, 3, 8, 8), rounds=3)
    assert rates == [8.0, 32.0]


# -- golden numbers


def golden(case: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Constructor arguments, and arrays by name in float64 where they are floating."""
    kwargs = json.loads((DATA / f"golden_{case}.json").read_text())
    kwargs = {key: value for key, value in kwargs.items() if key not in ("seed", "size")}
    with np.load(DATA / f"golden_{case}.npz") as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return kwargs, {key: t.double() if t.is_floating_point() else t for key, t in tensors.items()}


def golden_network(case: str) -> tuple[VanillaNet, dict[str, torch.Tensor]]:
    kwargs, tensors = golden(case)
    model = VanillaNet(**kwargs, dtype=torch.float64)
    model.load_state_dict({k.removeprefix("train/"): v for k, v in tensors.items() if k.startswith("train/")})
    return model, tensors


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() < 1e-9


@pytest.mark.parametrize("slope", ["0", "0.37", "1"])
@pytest.mark.parametrize("case", GOLDEN)
def test_golden_logits(case, slope):
    model, tensors = golden_network(case)
    model.change_act(float(slope))
    assert_close(model.eval()(tensors["input"]).detach(), tensors[f"logits_act_learn_{slope}"])


@pytest.mark.parametrize("slope", ["0.37", "1"])
@pytest.mark.parametrize("case", GOLDEN)
def test_golden_logits_with_batch_statistics(case, slope):
    model, tensors = golden_network(case)
    model.change_act(float(slope))
    assert_close(model.train()(tensors["input"]).detach(), tensors[f"logits_train_mode_act_learn_{slope}"])


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_deploy_form(case):
    model, tensors = golden_network(case)
    model.eval().switch_to_deploy()
    expected = {k.removeprefix("deploy/"): v for k, v in tensors.items() if k.startswith("deploy/")}
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for key, value in state.items():
        assert_close(value, expected[key])
    assert_close(model(tensors["input"]).detach(), tensors["logits_deploy"])

    built = VanillaNet(**golden(case)[0], deploy=True, dtype=torch.float64).eval()
    built.load_state_dict(expected)
    assert_close(built(tensors["input"]).detach(), tensors["logits_deploy"])


def test_series_activation_is_the_papers_sum():
    dim, n, size = 3, 2, 6
    act = SeriesActivation(dim, act_num=n, dtype=torch.float64).eval()
    x = torch.randn(1, dim, size, size, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for c in range(dim):
        for h in range(size):
            for w in range(size):
                for i in range(-n, n + 1):
                    for j in range(-n, n + 1):
                        if 0 <= h + i < size and 0 <= w + j < size:
                            expected[0, c, h, w] += act.weight[c, 0, i + n, j + n].item() * max(
                                x[0, c, h + i, w + j], 0
                            )
    assert_close(act(x).detach(), expected / (1 + 1e-6) ** 0.5)


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (4, 4), (6, 2), (5, 12), (9, 9)])
@pytest.mark.parametrize("reach", [1, 2])  # with and without AVX-512
def test_training_on_maps_smaller_than_the_kernel_is_the_same_series(reach, size, n, monkeypatch):
    """oneDNN has no kernel for the weight gradient where the convolution's kernel is larger than its input."""
    act = SeriesActivation(3, act_num=n, dtype=torch.float64).train()
    images, gradient = (torch.randn(2, 3, *size, dtype=torch.float64) for _ in range(2))

    def outcome():
        x = images.clone().requires_grad_()
        y = act(x)
        return y, *torch.autograd.grad(y, (x, act.weight), gradient)

    def plain(x, weight, n):
        return F.conv2d(x, weight, padding=n, groups=3)

    convolution, seen = F.conv2d, []
    with monkeypatch.context() as patch:
        patch.setattr(models.workarounds, "depthwise_conv2d", partial(depthwise_conv2d, reach=reach))
        patch.setattr(F, "conv2d", lambda x, w, **kw: seen.append((x.shape, w.shape)) or convolution(x, w, **kw))
        ours = outcome()
    [(x, weight)] = seen
    if min(size) <= reach * n:
        assert x[2] >= weight[2]
        assert x[3] >= weight[3]
    else:
        assert (x[2:], weight[2]) == (size, 2 * n + 1)
    monkeypatch.setattr(models.workarounds, "depthwise_conv2d", plain)
    for value, expected in zip(ours, outcome(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


# -- constructor arguments


def test_unknown_keyword_arguments_are_an_error():
    with pytest.raises(TypeError, match="pretrained"):
        VanillaNet(pretrained=False)
    with pytest.raises(TypeError, match="drop_path_rate"):
        Block(8, 8, drop_path_rate=0.1)
    with pytest.raises(TypeError, match="act_nmu"):
        timm.create_model("vanillanet_5", act_nmu=3, device="meta")
    with pytest.raises(TypeError, match="drop_path_rate"):
        models.vanillanet_5(drop_path_rate=0.1, device="meta")


@pytest.mark.parametrize("deploy", [False, True])
def test_all_arguments_work_together(deploy):
    kwargs = {
        "in_chans": 4,
        "num_classes": 7,
        "dims": (16, 32, 64, 64),
        "drop_rate": 0.25,
        "act_num": 2,
        "strides": (1, 2, 1),
        "ada_pool": (0, 5, 0),
        "width_mult": 0.5,
        "deploy": deploy,
    }
    for model in (VanillaNet(**kwargs), timm.create_model("vanillanet_9", **kwargs)):
        images = torch.randn(2, 4, 29, 29)
        assert model(images).shape == (2, 7)
        assert model.forward_features(images).shape == (2, 32, 5, 5)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        stem, dropout = ("stem", model.cls[1]) if deploy else ("stem1", model.cls1[1])
        assert shapes[f"{stem}.0.weight"] == (8, 4, 4, 4)
        assert shapes["stages.0.act.weight"] == (16, 1, 5, 5)
        assert shapes["stages.1.conv.weight" if deploy else "stages.1.conv2.0.weight"] == (32, 16, 1, 1)
        assert shapes["cls.2.weight" if deploy else "cls1.2.weight"] == (7, 32, 1, 1)
        assert dropout.p == 0.25
        assert model.deploy is deploy


def test_act_num_zero_is_a_scaled_relu():
    act = SeriesActivation(2, act_num=0, deploy=True)
    x = torch.randn(1, 2, 3, 3)
    weight, bias = act.weight.view(2, 1, 1), act.bias.view(2, 1, 1)
    torch.testing.assert_close(act(x), x.relu() * weight + bias, rtol=1e-6, atol=1e-7)


def test_widths_are_rounded_to_whole_channels():
    model = VanillaNet(**{**TINY, "width_mult": 0.3})
    assert [stage.act.out_channels for stage in model.stages] == [5, 7, 7]
    assert model.stem2[2].out_channels == 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dims": (8, 16)}, "one entry more than strides"),
        ({"strides": (2, 2)}, "one entry more than strides"),
        ({"ada_pool": (4, 2)}, "3 and 2"),
        ({"dims": (), "strides": ()}, "one entry more than strides"),
        ({"dims": (8,), "strides": ()}, "there must be stages"),
        ({"strides": (2, 0, 1)}, "strides of 1 or more"),
        ({"width_mult": 0.01}, "without channels"),
        ({"act_num": -1}, "act_num"),
        ({"global_pool": "median"}, "pool types"),
        ({"img_size": 32}, "belongs to ada_pool"),
        ({"ada_pool": (0, 4, 0), "img_size": (32, 64)}, "square"),
    ],
)
def test_bad_arguments_are_value_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny(**kwargs)


# -- lambda


def test_fading_relu_values_and_gradients():
    fading = FadingReLU()
    x = torch.tensor([-2.0, -0.0, 0.0, 3.0], requires_grad=True)
    for slope, negative in ((0.0, 0.0), (0.25, -0.5), (1.0, -2.0)):
        fading.set_slope(slope)
        assert fading(x).tolist() == [negative, 0.0, 0.0, 3.0]
        assert torch.autograd.grad(fading(x).sum(), x)[0].tolist() == [slope, slope, slope, 1.0]


def test_lambda_starts_at_one_and_is_in_no_state_dict():
    model = tiny()
    assert model.act_learn == 1.0
    model.change_act(0.25)
    assert model.act_learn == 0.25
    assert [stage.act_learn for stage in model.stages] == [0.25] * 3
    assert not [key for key in model.state_dict() if "slope" in key or "act_learn" in key or "relu" in key]
    assert copy.deepcopy(model).act_learn == 0.25


def test_lambda_follows_the_module():
    model = tiny()
    model.change_act(0.37)
    fadings = [module for module in model.modules() if isinstance(module, FadingReLU)]
    assert len(fadings) == 4
    # 0.37 is no float32 and no bfloat16: a cast there and back must not leave its rounding behind.
    model.to(torch.bfloat16).double()
    assert [f.slope_tensor.item() for f in fadings] == [0.37] * 4
    assert {f.slope_tensor.dtype for f in fadings} == {torch.float64}
    model.to("meta")
    assert {f.slope_tensor.device.type for f in fadings} == {"meta"}
    model.to_empty(device="cpu")  # undefined memory, but for lambda, which no state dict would bring back
    assert [f.slope_tensor.item() for f in fadings] == [0.37] * 4


def test_tensor_and_number_give_the_same_outputs():
    model = tiny().eval()
    images = torch.randn(2, 3, 32, 32)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for slope in (0.0, 0.37, 1.0):
        model.change_act(slope)
        assert torch.equal(compiled(images), model(images))


@pytest.mark.parametrize("training", [True, False])
def test_a_hundred_changes_of_lambda_recompile_nothing(training):
    model = tiny().train(training)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    images = torch.randn(2, 3, 32, 32)
    outputs = set()
    for step in range(101):
        model.change_act(step / 100)
        outputs.add(compiled(images).double().sum().item())
    assert model.act_learn == 1.0
    assert counter.frame_count == 1
    assert len(outputs) == 101  # each value was seen by the graph


def test_lambda_one_dispatches_no_operator(dispatched):
    model, images = tiny().eval(), torch.randn(1, 3, 32, 32)
    without = copy.deepcopy(model)
    for part in (without, *without.stages):
        part.relu = nn.Identity()
    assert dispatched(model, images) == dispatched(without, images)
    model.change_act(0.5)
    assert len(dispatched(model, images)) > len(dispatched(without, images))


def test_change_act_rejects_what_is_no_lambda():
    model = tiny()
    model.change_act(0.5)
    for slope in (-0.01, 1.01, float("nan")):
        with pytest.raises(ValueError, match="must be in"):
            model.change_act(slope)
    assert model.act_learn == 0.5

    deployed = tiny(deploy=True)
    assert deployed.act_learn == 1.0
    deployed.change_act(1.0)
    with pytest.raises(ValueError, match="no fading activation"):
        deployed.change_act(0.5)


# -- the published interface


def test_published_names_stay():
    entry_points = [f"vanillanet_{n}" for n in range(5, 14)] + ["vanillanet_13_x1_5", "vanillanet_13_x1_5_ada_pool"]
    for name in ("VanillaNet", "Block", *entry_points):
        assert name in models.vanillanet.__all__
        assert getattr(models, name) is getattr(models.vanillanet, name)
    parameters = list(inspect.signature(VanillaNet).parameters.values())
    assert [p.name for p in parameters[:8]] == [
        "in_chans",
        "num_classes",
        "dims",
        "drop_rate",
        "act_num",
        "strides",
        "deploy",
        "ada_pool",
    ]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters[:8])
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[8:])
    block = list(inspect.signature(Block).parameters)
    assert block[:6] == ["dim", "dim_out", "act_num", "stride", "deploy", "ada_pool"]


@pytest.mark.parametrize("build", [tiny, lambda **kwargs: Block(8, 16, **kwargs)])
def test_published_attributes_stay(build):
    part = build()
    assert (part.deploy, part.act_learn) == (False, 1.0)
    part.switch_to_deploy()
    assert (part.deploy, part.act_learn) == (True, 1.0)
    assert (build(deploy=True).deploy, build(deploy=True).act_learn) == (True, 1.0)
