"""Networks out of checkpoints: the tensors tell the architecture."""

import argparse

import pytest
import timm
import torch

import models
import networks
from records.checkpoints import save_checkpoint


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("variant", sorted(models.vanillanet.VARIANTS))
def test_the_shapes_tell_the_arguments(variant, deploy):
    """Of every variant, also at a width that rounds its channels to no common factor."""
    small = 0.0131 / models.vanillanet.VARIANTS[variant]["width_mult"]
    made = timm.create_model(variant, width_mult=small, act_num=2, num_classes=7, deploy=deploy, device="meta")
    found = networks.shape_arguments(f"{variant}.in1k", made.state_dict())
    assert (found["deploy"], found["act_num"], found["num_classes"]) == (deploy, 2, 7)
    again = timm.create_model(variant, device="meta", **found)
    shapes = [{name: value.shape for name, value in net.state_dict().items()} for net in (made, again)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("name", "classes"), [("resnet18", 5), ("starnet_s050", 6), ("deit_tiny_distilled_patch16_224", 4)]
)
def test_the_shapes_of_other_models_tell_the_classes(name, classes):
    made = timm.create_model(name, num_classes=classes, device="meta")
    assert networks.shape_arguments(name, made.state_dict()) == {"num_classes": classes}


@pytest.mark.parametrize("fuse", [False, True])
def test_a_checkpoint_is_rebuilt(randomized, tmp_path, fuse):
    made = randomized(models.vanillanet_6(width_mult=1 / 64, act_num=1, num_classes=5))
    if fuse:
        made.switch_to_deploy()
    else:
        made.change_act(0.37)
    recorded = argparse.Namespace(model="vanillanet_6", input_size=64)
    state = {"model": made.state_dict(), "act_learn": made.act_learn, "args": recorded}
    save_checkpoint(state, tmp_path / "w.pth")
    name, loaded, checkpoint = networks.create_trained(tmp_path / "w.pth")
    assert name == "vanillanet_6"
    assert networks.recorded_args(checkpoint)["input_size"] == 64
    assert (loaded.deploy, loaded.act_learn, loaded.training) == (fuse, made.act_learn, False)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(images), made(images))


def test_a_checkpoint_that_does_not_fit(tmp_path):
    path = tmp_path / "w.pth"
    save_checkpoint({"model": models.vanillanet_7(width_mult=1 / 64).state_dict()}, path)
    with pytest.raises(ValueError, match="does not record which model it is of: name one by --net"):
        networks.create_trained(path, flag="--net")
    with pytest.raises(ValueError, match="does not fit this network"):
        networks.create_trained(path, name="vanillanet_5")
    with pytest.raises(ValueError, match="another shape"):
        networks.create_trained(path, name="vanillanet_7", num_classes=7)
    with pytest.raises(ValueError, match="--net vanillanet_4 is not known"):
        networks.create_trained(path, name="vanillanet_4", flag="--net")
