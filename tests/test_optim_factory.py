import math

import pytest
import torch

import models
from optim_factory import activation_slope, build_optimizer, cosine_schedule, set_hyperparameters


def test_cosine_schedule_values():
    rate = [cosine_schedule(s, 110, base=1.0, final=0.1, warmup_steps=10) for s in (0, 5, 10, 60, 110, 500)]
    assert rate == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1, 0.1], abs=1e-12)
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


def test_layer_decay_scales_are_the_published_ones():
    model = tiny()
    optimizer = build_optimizer(model, "lamb", lr=1.0, weight_decay=0.3, layer_decay=0.8, eps=1e-8)
    scales = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        part = name.split(".")
        layer = 0 if part[0].startswith("stem") else 5 if part[0].startswith("cls") else int(part[1]) + 1
        assert scales[id(parameter)] == pytest.approx(0.8 ** (4 + 1 - layer), abs=1e-12), name


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
        ("adamw", {"momentum": 0.9, "explicit": ["momentum"]}, "momentum"),
        ("sgd", {"betas": (0.9, 0.99), "explicit": ["betas"]}, "betas"),
        ("adamw", {"betas": (0.9,)}, "2 values"),
    ],
)
def test_bad_optimizer_is_one_clear_line(opt, kwargs, named):
    with pytest.raises(ValueError, match=named) as raised:
        build_optimizer(tiny(), opt, lr=1e-3, weight_decay=0.0, **kwargs)
    assert "\n" not in str(raised.value)
