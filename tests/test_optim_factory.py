import copy
import json
import math
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import models
from optim_factory import (
    activation_slope,
    build_optimizer,
    cosine_schedule,
    fusible,
    parameter_groups,
    set_hyperparameters,
    taken_by,
)


def test_cosine_schedule_values():
    rate = [cosine_schedule(s, 111, base=1.0, final=0.1, warmup_steps=11) for s in (0, 5, 10, 11, 61, 111, 500)]
    assert rate == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.55, 0.1, 0.1], abs=1e-12)
    assert [cosine_schedule(s, 9, base=1.0, final=0.0, warmup_steps=1) for s in (0, 1)] == [0.0, 1.0]
    assert cosine_schedule(0, 100, base=0.05, final=0.05) == 0.05
    assert cosine_schedule(0, 100, base=2.0, final=0.0) == 2.0  # no warm-up begins at the base


def test_activation_slope_values():
    assert [activation_slope(e, decay_epochs=4) for e in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    cosine = [activation_slope(e, decay_epochs=4, linear=False) for e in range(5)]
    assert cosine == pytest.approx([0, 0.5 - math.sqrt(0.125), 0.5, 0.5 + math.sqrt(0.125), 1], abs=1e-12)
    assert activation_slope(0, decay_epochs=0) == 1.0  # without deep training
    assert [activation_slope(e, decay_epochs=4, start=1.0) for e in range(5)] == [1.0] * 5
    assert activation_slope(2, decay_epochs=4, start=0.5) == 0.75


def tiny():
    return models.VanillaNet(num_classes=10, dims=(8, 8, 16, 16, 16), strides=(2, 2, 2, 1))


def named_groups(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{**group, "params": [names[id(parameter)] for parameter in group["params"]]} for group in groups]


PUBLISHED_GROUPS = json.loads((Path(__file__).parent / "data" / "param_groups.json").read_text())


@pytest.mark.parametrize("case", PUBLISHED_GROUPS)
@pytest.mark.parametrize("weight_decay", [0.3, 0.0])
def test_groups_are_the_published_ones(case, weight_decay):
    variant, layer_decay = case.split(" layer_decay=")
    model = timm.create_model(variant, width_mult=1 / 64)
    groups = parameter_groups(model, weight_decay=weight_decay, layer_decay=float(layer_decay))
    expected = [{**group, "weight_decay": weight_decay * group["weight_decay"]} for group in PUBLISHED_GROUPS[case]]
    assert named_groups(model, groups) == expected


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "swin_tiny_patch4_window7_224", "levit_128s"])
@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_groups_of_timm_models_are_timms(name, layer_decay):
    """What decays is what timm's own set-up lets decay, less the biases, which it spares with layer decay only by
    their shape."""
    model = timm.create_model(name, num_classes=10)
    theirs = timm.optim.create_optimizer_v2(
        model, opt="sgd", lr=1.0, weight_decay=0.1, layer_decay=layer_decay if layer_decay < 1 else None
    )
    decaying = {
        parameter: group.get("lr_scale", 1.0)
        for group in named_groups(model, theirs.param_groups)
        if group["weight_decay"]
        for parameter in group["params"]
    }
    ours = {
        parameter: group["lr_scale"]
        for group in named_groups(model, parameter_groups(model, weight_decay=0.1, layer_decay=layer_decay))
        if group["weight_decay"]
        for parameter in group["params"]
    }
    assert ours == {parameter: scale for parameter, scale in decaying.items() if not parameter.endswith(".bias")}
    assert 0 < len(ours) < len(list(model.parameters()))


@pytest.mark.parametrize("layer_decay", [1.0, 0.8])
def test_published_optimizer_state_goes_on(layer_decay):
    """LAMB over the published groups, saved after two steps: our next step from there is its own next step."""
    images = torch.randn(4, 3, 32, 32)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()

    published = timm.create_model("vanillanet_6", width_mult=1 / 64, num_classes=10)
    parameters = dict(published.named_parameters())
    groups = [
        {**group, "params": [parameters[name] for name in group["params"]], "weight_decay": 0.3 * group["weight_decay"]}
        for group in PUBLISHED_GROUPS[f"vanillanet_6 layer_decay={layer_decay}"]
    ]
    theirs = timm.optim.Lamb(groups, lr=1e-2, eps=1e-8)
    for _ in range(2):
        step(published, theirs)
    resumed = copy.deepcopy(published)
    ours = build_optimizer(resumed, "lamb", lr=1e-2, weight_decay=0.3, layer_decay=layer_decay, eps=1e-8)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    step(published, theirs)
    step(resumed, ours)
    for expected, found in zip(published.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_weight_decay_spares_vectors_and_schedules_reach_the_groups():
    model = tiny()
    optimizer = build_optimizer(model, "adamw", lr=1.0, weight_decay=0.3, layer_decay=0.5)
    set_hyperparameters(optimizer, 0.25, 0.125)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.25 * group["lr_scale"]
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.125 if parameter.ndim > 1 else 0.0)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("opt", ["adamw", "lamb", "sgd", "lookahead_adam", "lion", "muon", "adafactor"])
def test_timm_optimizers_step(opt):
    model = tiny()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = build_optimizer(model, opt, lr=1e-2, weight_decay=0.05, eps=1e-8, momentum=0.9)
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.isfinite(after).all()
    assert (before != after).any()


@pytest.mark.parametrize(
    ("opt", "kwargs", "named"),
    [
        ("nosuch", {}, "nosuch"),
        ("adahessian", {}, "second derivatives"),
        ("adamw", {"betas": (0.9,)}, "2 values"),
    ],
)
def test_bad_optimizer_is_one_clear_line(opt, kwargs, named):
    with pytest.raises(ValueError, match=named) as raised:
        build_optimizer(tiny(), opt, lr=1e-3, weight_decay=0.0, **kwargs)
    assert "\n" not in str(raised.value)


def test_an_optimizer_gets_what_it_takes():
    assert (taken_by("adamw"), taken_by("sgd"), taken_by("lookahead_lamb")) == (
        ["eps", "betas"],
        ["momentum"],
        ["eps", "betas"],
    )
    sgd = build_optimizer(tiny(), "sgd", lr=1e-3, weight_decay=0.0, eps=1e-3, betas=(0.9, 0.99), momentum=0.7)
    assert sgd.defaults["momentum"] == 0.7
    assert not {"eps", "betas"} & set(sgd.defaults)


@pytest.mark.parametrize(
    ("opt", "expected"),
    [("adamw", True), ("AdamW", True), ("sgd", True), ("lamb", False), ("nadamw", False), ("lookahead_adamw", False)],
)
def test_what_can_be_fused(opt, expected):
    """The published recipes train with LAMB, which is timm's."""
    assert fusible(opt) is expected


@pytest.mark.parametrize("opt", ["adamw", "sgd", "adagrad"])
def test_fused_steps_are_torchs_plain_steps(opt):
    ends = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(5, 3, dtype=torch.float64)
        optimizer = build_optimizer(model, opt, lr=1e-2, weight_decay=0.1)
        assert optimizer.defaults["fused"] is True
        optimizer.load_state_dict(
            {"state": {}, "param_groups": [{**g, "fused": fused} for g in optimizer.state_dict()["param_groups"]]}
        )
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 5, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
        ends.append(model.weight)
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)
