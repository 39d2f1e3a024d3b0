"""Networks out of checkpoints: the tensors tell the architecture."""

import argparse
import json

import matplotlib.cbook
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf

import models
import networks
from deployment.exporting import write_safetensors
from deployment.fusing import open_deployed
from loading.transforms import build_eval_transform
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
    network = networks.open(tmp_path / "w.pth")
    loaded = network.module
    assert network.name == "vanillanet_6"
    assert network.preprocessing.input_size == 64
    assert (loaded.deploy, loaded.act_learn, loaded.training) == (fuse, made.act_learn, False)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(images), made(images))


def test_a_checkpoint_that_does_not_fit(tmp_path):
    path = tmp_path / "w.pth"
    save_checkpoint({"model": models.vanillanet_7(width_mult=1 / 64).state_dict()}, path)
    with pytest.raises(ValueError, match="does not record which model it is of: name one by --net"):
        networks.open(path, flag="--net")
    with pytest.raises(ValueError, match="does not fit this network"):
        networks.open(path, name="vanillanet_5")
    with pytest.raises(ValueError, match="another shape"):
        networks.open(path, name="vanillanet_7", num_classes=7)
    with pytest.raises(ValueError, match="--net vanillanet_4 is not known"):
        networks.open(path, name="vanillanet_4", flag="--net")


# -- what travels with a network, held against timm


@pytest.fixture(scope="module")
def photograph():
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        return Image.open(file).convert("RGB")


@pytest.mark.parametrize(
    "name",
    [
        "tf_efficientnet_lite0",  # 0.5 for mean and std
        "tf_mobilenetv3_small_minimal_100.in1k",  # bilinear
        "resnet50.a1_in1k",
        "vit_base_patch16_siglip_224.v2_webli",  # squashed
        "vanillanet_6",
    ],
)
def test_images_are_prepared_as_timm_does(name, photograph, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, **kwargs, device="meta"))
    network = networks.open(name, pretrained=False)
    config = resolve_data_config({}, model=network.module)
    theirs = create_transform(**config, is_training=False)(photograph)
    assert torch.equal(build_eval_transform(network.preprocessing)(photograph), theirs)
    assert networks.named_preprocessing(name) == network.preprocessing


def test_a_checkpoint_of_timm_brings_its_preprocessing(tmp_path, photograph):
    """As timm's train.py writes it: lists, and None for flags that were not given."""
    made = timm.create_model("resnet10t", num_classes=4)
    args = argparse.Namespace(
        model="resnet10t", input_size=[3, 96, 96], img_size=None, mean=[0.5], std=[0.25, 0.3, 0.35], crop_pct=0.9,
        interpolation="bilinear", num_classes=4, bce_loss=True, model_kwargs={}, epochs=300,
    )  # fmt: skip
    state = {"epoch": 7, "arch": "resnet10t", "state_dict": made.state_dict(), "state_dict_ema": made.state_dict()}
    torch.save({**state, "args": args, "version": 2}, tmp_path / "w.pth.tar")
    network = networks.open(tmp_path / "w.pth.tar")
    config = resolve_data_config(vars(args), model=made)
    theirs = create_transform(**config, is_training=False)(photograph)
    assert torch.equal(build_eval_transform(network.preprocessing)(photograph), theirs)
    assert (network.name, network.loss, network.weights.key) == ("resnet10t", "binary_cross_entropy", "state_dict_ema")
    logits = torch.tensor([[0.0, 2.0]])
    assert torch.equal(network.probabilities(logits), logits.sigmoid())


@pytest.mark.parametrize(
    ("recorded", "passed_over"),
    [
        ({"classes": 3}, "classes"),
        ({"act_learn": [1.0]}, "act_learn"),
        ({"epoch": "last", "args": {"decay_epochs": 100}}, "epoch"),
        ({"args": ["--model", "vanillanet_6"]}, "args"),
        ({"args": {"input_size": "large"}}, "input_size"),
        ({"args": {"input_size": [64, 64]}}, "input_size"),
        ({"args": {"mean": [0.5, 0.5], "std": [0, 0, 0]}}, "mean, std"),
        ({"args": {"crop_pct": 87.5, "interpolation": "random"}}, "crop_pct, interpolation"),
        ({"args": {"bce_loss": "yes", "model": 6}}, "bce_loss, model"),
        ({"preprocessing": 7, "loss": "focal"}, "preprocessing, loss"),
        ({"preprocessing": {"mean": [10**400] * 3, "std": [float("inf")] * 3}}, "mean, std"),
        ({"classes": {"cat": 0, "dog": float("inf")}}, "classes"),
        ({"classes": None, "act_learn": None, "epoch": None, "args": None, "loss": None}, None),
    ],
)
def test_what_is_recorded_is_taken_with_care(recorded, passed_over, tmp_path, caplog):
    made = models.vanillanet_6(width_mult=1 / 64, num_classes=5)
    torch.save({"model": made.state_dict(), **recorded}, tmp_path / "w.pth")
    network = networks.open(f"vanillanet_6={tmp_path / 'w.pth'}")
    assert network.labels == tuple(f"class {index}" for index in range(5))
    assert (network.preprocessing.input_size, network.slope) == (224, 1.0)
    lines = [record.message for record in caplog.records if "passed over" in record.message]
    assert len(lines) == (passed_over is not None)
    assert not lines or passed_over in lines[0]
    assert all(str(tmp_path / "w.pth") in line for line in lines)


def test_a_folder_of_the_hubs_form_is_no_name(tmp_path):
    """timm's own names end an address; the name of a folder may be anything."""
    made = timm.create_model("resnet10t", num_classes=4)
    torch.save({"model": made.state_dict(), "args": {"model": f"local-dir:{tmp_path / 'demo'}"}}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"does not record which model it is of: name one by --model$"):
        networks.open(tmp_path / "w.pth")
    assert networks.open(tmp_path / "w.pth", fallback="resnet10t").name == "resnet10t"
    assert networks.read_record({"args": {"model": "hf-hub:timm/resnet18.a1_in1k"}}).model == "resnet18.a1_in1k"


def test_an_address_has_its_own_preprocessing(tmp_path):
    """As timm's `save_for_hf` writes it."""
    config = {"input_size": (3, 96, 96), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.3), "crop_pct": 0.9}
    save_for_hf(timm.create_model("resnet10t", num_classes=4), tmp_path, data_config=config)
    found = networks.named_preprocessing(f"local-dir:{tmp_path}")
    assert (found.input_size, found.mean, found.std, found.crop_pct) == (96, *list(config.values())[1:])


@pytest.mark.parametrize(
    "classes", [["cat", "dog"], {0: "cat", 1: "dog"}, {"1": "dog", "0": "cat"}, {"dog": 1, "cat": 0}]
)
def test_names_of_classes_in_other_forms(classes, tmp_path):
    made = timm.create_model("resnet10t", num_classes=2)
    torch.save({"model": made.state_dict(), "classes": classes, "args": {"model": "resnet10t"}}, tmp_path / "w.pth")
    assert networks.open(tmp_path / "w.pth").classes == ("cat", "dog")


@pytest.mark.parametrize("name", ["vanillanet_6", "resnet10t", "deit_tiny_distilled_patch16_224"])
def test_another_classifier_for_other_classes(name, tmp_path):
    """All but what timm says is the classifier stays, for any model."""
    arguments = {"width_mult": 1 / 64} if name.startswith("vanilla") else {}
    made = timm.create_model(name, num_classes=3, **arguments)
    record = {"classes": ["a", "b", "c"], "args": {"model": name}}
    torch.save({"model": made.state_dict(), **record}, tmp_path / "w.pth")

    def classifier(classes, **keep):
        network = networks.open(tmp_path / "w.pth").for_classes(classes, **keep)
        assert network.module.num_classes == (classes if isinstance(classes, int) else len(classes))
        assert network.classes is None or len(network.classes) == network.module.num_classes
        heads = [f"{head}." for head in np.atleast_1d(timm.get_pretrained_cfg_value(name, "classifier"))]
        own, theirs = network.module.state_dict(), made.state_dict()
        new = [key for key in own if not torch.equal(own[key].flatten()[:7], theirs[key].flatten()[:7])]
        assert all(key.startswith("cls" if "vanilla" in name else tuple(heads)) for key in new)
        return len(new) > 0

    assert not classifier(["a", "b", "c"])
    assert not classifier(3)
    assert classifier(["a", "b", "d"])
    assert classifier(["b", "a", "c"])
    assert not classifier(["a", "b", "d"], keep=True)
    assert classifier(["a", "b"])
    assert classifier(7)
    with pytest.raises(ValueError, match="--keep_classifier true"):
        classifier(5, keep=True)


def test_names_that_are_numbers_stay_names():
    """As torchvision's ImageFolder sorts folders from "1" to "11"."""
    names = sorted(map(str, range(1, 12)))
    by_name = {name: index for index, name in enumerate(names)}
    assert networks.read_record({"classes": by_name}).classes == tuple(names)
    assert networks.unlabelled(("crane", "crane"), ("n02012849", "n03126707")) == ("n02012849", "n03126707")


def test_what_was_settled_wins_over_the_flags_of_the_run():
    """A run that takes its crop from --finetune FILE has a recipe's crop in its flags all the same."""
    settled = {"preprocessing": {"input_size": 64, "crop_pct": 0.95, "exif_transpose": True}}
    flags = {"crop_pct": 0.875, "exif_transpose": False, "input_size": 224}
    assert networks.read_record({**settled, "args": flags}).preprocessing == settled["preprocessing"]


def test_arguments_of_timm_travel_on(tmp_path, randomized):
    """Strides are in no tensor: a network with others than its variant's is told by timm's `model_kwargs` alone."""
    made = randomized(timm.create_model("vanillanet_5", strides=(2, 2, 1), width_mult=1 / 64, num_classes=4))
    args = {"model": "vanillanet_5", "model_kwargs": {"strides": [2, 2, 1]}}
    torch.save({"state_dict": made.state_dict(), "args": args}, tmp_path / "w.pth")
    images = torch.randn(2, 3, 64, 64)
    opened = open_deployed(tmp_path / "w.pth")
    write_safetensors(opened, tmp_path / "out" / "w.safetensors")
    for network in (opened, networks.open(tmp_path / "out" / "w.safetensors")):
        assert torch.allclose(network.module(images), made(images), rtol=1e-3, atol=1e-4)
    assert opened.state()["model_kwargs"] == {"strides": [2, 2, 1]}


def test_a_crop_that_nobody_chose_follows_the_size(tmp_path):
    made = models.vanillanet_5(width_mult=1 / 64, num_classes=4)
    images = {"input_size": 224, "crop_pct": 0.875}
    args = {"model": "vanillanet_5", "input_size": 224, "crop_pct": None, "imagenet_default_mean_and_std": True}
    torch.save({"model": made.state_dict(), "preprocessing": images, "args": args}, tmp_path / "w.pth")
    write_safetensors(networks.open(tmp_path / "w.pth"), tmp_path / "out" / "w.safetensors")
    for path in (tmp_path / "w.pth", tmp_path / "out" / "w.safetensors"):
        assert networks.open(path).prepared(input_size=384).preprocessing.crop_pct == 1.0


def test_adaptive_pools_of_another_size_are_written(tmp_path):
    made = timm.create_model("vanillanet_13_x1_5_ada_pool", width_mult=1 / 64, num_classes=4, img_size=96)
    torch.save({"model": made.state_dict(), "args": {"model": "vanillanet_13_x1_5_ada_pool"}}, tmp_path / "w.pth")
    network = open_deployed(tmp_path / "w.pth", input_size=128)
    write_safetensors(network, tmp_path / "out" / "w.safetensors")
    images = torch.randn(1, 3, 128, 128)
    for source in (tmp_path / "out" / "w.safetensors", f"local-dir:{tmp_path / 'out'}"):
        again = networks.open(source)
        assert again.preprocessing.input_size == 128
        assert torch.equal(again.module(images), network.module(images))


def test_a_folder_tells_loss_and_classes(tmp_path):
    made = models.vanillanet_5(width_mult=1 / 64, num_classes=2)
    record = {"classes": {0: "cat", 1: "dog"}, "loss": "binary_cross_entropy", "args": {"model": "vanillanet_5"}}
    torch.save({"model": made.state_dict(), **record}, tmp_path / "w.pth")
    write_safetensors(networks.open(tmp_path / "w.pth"), tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    names = {"0": "cat", "1": "dog"}  # the form that the hub's own pages have
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "label_names": names}))
    network = networks.open(f"local-dir:{tmp_path / 'out'}")
    assert (network.classes, network.loss) == (("cat", "dog"), "binary_cross_entropy")


def test_two_names_for_one_file(tmp_path):
    with pytest.raises(ValueError, match=r"--model vanillanet_9, but vanillanet_5=.* says vanillanet_5"):
        networks.open(f"vanillanet_5={tmp_path / 'w.pth'}", name="vanillanet_9")
