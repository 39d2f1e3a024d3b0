"""Checkpoints of real users: wrappers' names, other classes inside, what is no checkpoint, safetensors in and out."""

import collections
import datetime
import json
import pathlib
import shlex
import zipfile

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch.optim.swa_utils import AveragedModel

import export
import main
import models
import networks
from deployment.fusing import open_deployed
from object_detection.checkpoints import open_detector
from optim_factory import freeze
from records.checkpoints import CheckpointError, load_checkpoint, save_checkpoint

SMALL = {"width_mult": 1 / 64, "num_classes": 5}
RECORD = {"act_learn": 1.0, "args": {"model": "vanillanet_6", "input_size": 64, "imagenet_default_mean_and_std": False}}


@pytest.fixture
def made(randomized):
    return randomized(timm.create_model("vanillanet_6", **SMALL))


def same(network, made):
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        return torch.equal(network.module(images), made(images))


# -- names


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_what_wrappers_put_before_names(made, prefix, tmp_path, caplog):
    caplog.set_level("INFO")
    made.change_act(1.0)
    torch.save({"model": {f"{prefix}{name}": x for name, x in made.state_dict().items()}, **RECORD}, tmp_path / "w.pth")
    assert same(networks.open(tmp_path / "w.pth"), made)
    assert "without module. and _orig_mod." in caplog.text


def test_wrappers_themselves(made, tmp_path):
    """As PyTorch's own wrappers write them: data-parallel, averaged, compiled, and compiled part by part."""
    made.change_act(1.0)
    forms = [torch.nn.DataParallel(made), AveragedModel(made), torch.compile(made), AveragedModel(torch.compile(made))]
    for form in forms:
        torch.save({"model": form.state_dict(), **RECORD}, tmp_path / "w.pth")
        assert same(networks.open(tmp_path / "w.pth"), made)
    part = timm.create_model("vanillanet_6", **SMALL)
    part.load_state_dict(made.state_dict())
    part.stages[1] = torch.compile(part.stages[1])
    torch.save({"model": part.state_dict(), **RECORD}, tmp_path / "w.pth")
    assert same(networks.open(tmp_path / "w.pth"), made)


def test_a_prefix_may_be_named_though_it_is_known(made, tmp_path):
    made.change_act(1.0)
    state = {f"module.net.{name}": x for name, x in made.state_dict().items()} | {"module.head": torch.zeros(1)}
    torch.save({"model": state, **RECORD}, tmp_path / "w.pth")
    for prefix in ("module.net.", "net."):
        assert same(networks.open(tmp_path / "w.pth", prefix=prefix), made)


def test_buffers_of_profilers_are_passed_over(made, tmp_path):
    made.change_act(1.0)
    left = {f"{place}{name}": torch.zeros(1) for place in ("", "stages.0.") for name in ("total_ops", "total_params")}
    torch.save({"model": made.state_dict() | left, **RECORD}, tmp_path / "w.pth")
    assert same(networks.open(tmp_path / "w.pth"), made)


@pytest.mark.parametrize(
    ("order", "key"), [(networks.AVERAGE_FIRST, "state_dict_ema"), (networks.NETWORK_FIRST, "state_dict")]
)
def test_keys_of_timm(made, order, key, tmp_path, caplog):
    caplog.set_level("INFO")
    state = {"arch": "vanillanet_6", "state_dict": made.state_dict(), "state_dict_ema": made.state_dict()}
    torch.save(state, tmp_path / "w.pth.tar")
    assert networks.open(tmp_path / "w.pth.tar", order=order).weights.key == key
    assert f"the weights are those of {key}; it holds" in caplog.text


# -- what is inside


def test_harmless_classes_load(made, tmp_path):
    groups = collections.defaultdict(list, a=[1, 2])
    extra = {
        "acc": np.float64(71.5), "count": np.int64(3), "flag": np.bool_(True), "dtype": np.dtype("float32"),
        "name": np.str_("x"), "array": np.arange(3.0), "path": pathlib.Path("/data/run"), "groups": groups,
        "windows": pathlib.PureWindowsPath("C:/run"), "order": collections.OrderedDict(b=1), "set": {1, 2},
        "nested": collections.defaultdict(dict, c={"d": np.float32(0.5)}), "counted": collections.Counter("aab"),
    }  # fmt: skip
    for zipped in (True, False):
        torch.save({"model": made.state_dict(), **extra}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        loaded = load_checkpoint(tmp_path / "w.pth")
        for name, value in extra.items():
            assert np.all(loaded[name] == value), name


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (datetime.datetime(2026, 1, 1), "datetime.datetime"),
        (torch.nn.ReLU(), "torch.nn.modules.activation.ReLU"),
        (np.random.default_rng(0), "numpy.random"),
        (print, "print"),
        (collections.deque([1]), "collections.deque"),
    ],
)
def test_all_else_is_refused_in_words_of_ours(value, named, zipped, tmp_path):
    torch.save({"model": {}, "value": value}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(tmp_path / "w.pth")
    message = str(raised.value)
    assert "\n" not in message
    assert f"refused: it holds {named}" in message
    assert "could run code" in message
    assert 'torch.save({"model": model.state_dict()}, FILE)' in message
    assert "add_safe_globals" not in message
    assert "weights_only" not in message


# -- what is no checkpoint


def onnx_like(path):
    path.write_bytes(b"\x08\x08\x12\x07pytorch" + bytes(range(200)))


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<a/>")


KINDS = [
    ("w.pth", lambda path: path.write_bytes(b""), "it is empty"),
    ("w.pth", lambda path: path.write_text("<!DOCTYPE html><html>Sign in</html>"), "it is a web page"),
    ("w.pth", lambda path: path.write_text("\n <html><body>404</body></html>"), "it is a web page"),
    (
        "w.pth",
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n"),
        "git lfs pull",
    ),
    ("w.pth", zipped, "it is a zip file of something else"),
    ("w.pth", lambda path: torch.jit.save(torch.jit.script(torch.nn.ReLU()), path), "it is a TorchScript program"),
    ("w.pth", lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(50)), "it is compressed"),
    ("w.pth", lambda path: Image.new("RGB", (4, 4)).save(path, "PNG"), "it is an image"),
    ("w.pth", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50)), "HDF5"),
    ("w.pth", lambda path: path.write_text('{"model": 1}'), "it is a text file"),
    ("w.onnx", onnx_like, "it is an exported network"),
    ("w.xml", lambda path: path.write_text("<?xml version='1.0'?><net name='x'/>"), "it is an exported network"),
    ("w.pt2", zipped, "it is an exported network"),
    ("w.safetensors", lambda path: path.write_bytes(b""), "it is empty"),
    ("w.safetensors", lambda path: path.write_text("<html></html>"), "it is a web page"),
    ("w.safetensors", lambda path: path.write_bytes(bytes(range(256)) * 4), "damaged or no safetensors"),
    ("w.pth", lambda path: path.write_bytes(bytes(range(256)) * 4), "truncated or no PyTorch checkpoint"),
    ("w.pth", lambda path: torch.save([1, 2], path), "it holds a list, not a dict"),
]


@pytest.mark.parametrize(("name", "write", "said"), KINDS, ids=[f"{name}-{said}" for name, _, said in KINDS])
def test_what_is_no_checkpoint_says_what_it_is(name, write, said, tmp_path):
    path = tmp_path / name
    write(path)
    with pytest.raises(CheckpointError) as raised:
        networks.open(f"vanillanet_6={path}")
    assert str(raised.value).startswith(f"cannot load {path}: ")
    assert said in str(raised.value)
    assert "run code" not in str(raised.value)


# -- safetensors


def test_safetensors_in(made, tmp_path):
    made.change_act(0.25)
    metadata = {"classes": json.dumps(list("abcde")), "act_learn": "0.25", "loss": json.dumps("binary_cross_entropy")}
    metadata["preprocessing"] = json.dumps({"input_size": 96, "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.8})
    weights = {name: value.contiguous() for name, value in made.state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors", metadata=metadata)
    network = networks.open(f"vanillanet_6={tmp_path / 'w.safetensors'}")
    assert same(network, made)
    assert (network.labels, network.slope, network.loss) == (tuple("abcde"), 0.25, "binary_cross_entropy")
    images = network.preprocessing
    assert (images.input_size, images.mean, images.std, images.crop_pct) == (96, (0.5,) * 3, (0.25,) * 3, 0.8)
    safetensors.torch.save_file(weights, tmp_path / "bare.safetensors", metadata={"format": "pt", "note": "not JSON"})
    assert networks.open(f"vanillanet_6={tmp_path / 'bare.safetensors'}").classes is None


def test_safetensors_out_opens_in_timm(made, tmp_path, capsys):
    made.change_act(1.0)
    save_checkpoint({"model": made.state_dict(), "classes": list("abcde"), **RECORD}, tmp_path / "w.pth")
    export.main([str(tmp_path / "w.pth"), "--to", "safetensors", "--output", str(tmp_path / "hub" / "w.safetensors")])
    assert "config.json" in capsys.readouterr().out
    wanted = open_deployed(tmp_path / "w.pth")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(theirs)
    assert (config["input_size"], tuple(config["mean"]), config["crop_pct"]) == ((3, 64, 64), (0.5,) * 3, 0.875)
    assert theirs.pretrained_cfg["label_names"] == list("abcde")
    for network in (networks.open(tmp_path / "hub" / "w.safetensors"), networks.open(f"local-dir:{tmp_path / 'hub'}")):
        assert same(network, theirs)
        assert same(network, wanted.module)
        assert (network.classes, network.preprocessing) == (tuple("abcde"), wanted.preprocessing)
    with pytest.raises(SystemExit):
        export.main([str(tmp_path / "w.pth"), "--to", "safetensors", "--precision", "bf16"])
    assert "safetensors writes the weights as they are" in capsys.readouterr().err


def test_safetensors_of_timms_own_networks_open_in_timm(tmp_path):
    """Also of one that merges its branches, whose names are others then."""
    target = tmp_path / "hub" / "model.safetensors"
    export.main(["repvgg_a0", "--random_weights", "true", "--to", "safetensors", "--output", str(target)])
    theirs = timm.create_model(f"local-dir:{target.parent}", pretrained=True).eval()
    assert same(networks.open(target), theirs)


def test_switch_to_deploy_writes_safetensors(made, tiny_fmnist, tmp_path, capsys):
    network = timm.create_model("vanillanet_6", width_mult=1 / 64, num_classes=10)
    network.change_act(1.0)
    record = {**RECORD, "args": {**RECORD["args"], "data_set": "FMNIST", "input_size": 32}}
    save_checkpoint({"model": network.state_dict(), **record}, tmp_path / "w.pth")
    flags = shlex.split(f"--data_set FMNIST --data_path {tiny_fmnist} --device cpu --num_workers 0 --batch_size 8")
    target = tmp_path / "new" / "d.safetensors"
    main.main([*flags, "--finetune", str(tmp_path / "w.pth"), "--switch_to_deploy", str(target)])
    found = networks.open(target)
    assert found.module.deploy
    assert (found.name, found.preprocessing.input_size, found.preprocessing.native) == ("vanillanet_6", 32, True)
    main.main([*flags, "--eval", "true", "--finetune", str(target)])
    assert "top-1" in capsys.readouterr().err


def test_code_in_a_folder_of_timm_is_not_run(hostile, tmp_path):
    timm.models.save_for_hf(timm.create_model("resnet10t", num_classes=3), tmp_path / "hub")
    hostile().replace(tmp_path / "hub" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="could run code") as raised:
        networks.open(f"local-dir:{tmp_path / 'hub'}")
    assert "weights_only" not in str(raised.value)
    assert not (tmp_path / "harm").exists()


# -- fine-tuning by name


FLAGS = shlex.split(
    "--data_set FMNIST --device cpu --num_workers 0 --batch_size 20 --epochs 1 --warmup_epochs 0 --mixup 0 --cutmix 0 "
    "--disable_eval true --input_size 32"
)


@pytest.mark.parametrize("address", ["name", "hub"])
def test_fine_tuning_from_a_name_or_address(address, tiny_fmnist, tmp_path, monkeypatch):
    """The weights of ImageNet onto ten classes, by what timm loads for the name."""
    released = timm.create_model("resnet10t", num_classes=7).eval()
    timm.models.save_for_hf(released, tmp_path / "hub", safe_serialization=True)
    source = f"local-dir:{tmp_path / 'hub'}"
    if address == "name":
        create, here = timm.create_model, source

        def from_here(name, pretrained=False, **kwargs):
            return create(here if pretrained else name, pretrained=pretrained, **kwargs)

        monkeypatch.setattr(timm, "create_model", from_here)
        source = "resnet10t"
    flags = ["--finetune", source, "--lr", "1e-9", "--weight_decay", "0", "--output_dir", str(tmp_path / "run")]
    main.main([*FLAGS, "--data_path", str(tiny_fmnist), *flags])
    tuned = load_checkpoint(tmp_path / "run" / "checkpoint-last.pth")
    assert tuned["args"]["model"] == "resnet10t"
    assert torch.allclose(tuned["model"]["conv1.0.weight"], released.conv1[0].weight, atol=1e-6)
    assert tuned["model"]["fc.weight"].shape == (10, 512)
    assert networks.open(tmp_path / "run" / "checkpoint-last.pth").name == "resnet10t"


@pytest.mark.parametrize(
    ("model", "stages", "frozen", "trained"),
    [
        ("vanillanet_6", "2", ("stem", "stages.0.", "stages.1."), ("stages.2.", "stages.3.", "cls")),
        ("vanillanet_6", "all", ("stem", "stages."), ("cls",)),
        ("resnet10t", "1", ("conv1", "bn1", "layer1"), ("layer2", "layer3", "layer4", "fc")),
        ("resnet10t", "all", ("conv1", "bn1", "layer"), ("fc",)),
    ],
)
def test_frozen_stages_stay_as_they_are(model, stages, frozen, trained, tiny_fmnist, tmp_path):
    arguments = {"width_mult": 1 / 64} if model.startswith("vanilla") else {}
    before = timm.create_model(model, num_classes=10, **arguments)
    before.train()(torch.randn(8, 3, 32, 32))  # BatchNorms with statistics of their own
    torch.save({"model": before.state_dict(), "args": {"model": model}, "act_learn": 1.0}, tmp_path / "w.pth")
    flags = ["--finetune", str(tmp_path / "w.pth"), "--freeze_stages", stages, "--output_dir", str(tmp_path / "run")]
    main.main([*FLAGS, "--data_path", str(tiny_fmnist), *flags, "--model_ema", "true", "--model_ema_decay", "0.5"])
    tuned = load_checkpoint(tmp_path / "run" / "checkpoint-last.pth")
    for key in ("model", "model_ema"):
        moved = {name for name, value in before.state_dict().items() if not torch.equal(value, tuned[key][name])}
        assert not [name for name in moved if name.startswith(frozen)], key
        still = [name for name in before.state_dict() if name.startswith(trained) and name not in moved]
        assert not [name for name in still if "num_batches" not in name and not name.endswith("bias")], key


def test_more_stages_than_there_are(tiny_fmnist, tmp_path, capsys):
    made = models.vanillanet_6(width_mult=1 / 64, num_classes=10)
    torch.save({"model": made.state_dict(), "args": {"model": "vanillanet_6"}}, tmp_path / "w.pth")
    command = [*FLAGS, "--data_path", str(tiny_fmnist), "--finetune", str(tmp_path / "w.pth")]
    with pytest.raises(SystemExit):
        main.main([*command, "--freeze_stages", "5"])
    assert "--freeze_stages 5: there are 4 stages" in capsys.readouterr().err


@pytest.mark.parametrize("stages", [1, "all"])
def test_stages_that_timm_does_not_name(stages):
    model = timm.create_model("poolformer_s12", num_classes=10)
    if stages == "all":
        model.pretrained_cfg = {}
    with pytest.raises(ValueError, match=f"^--freeze_stages {stages}: timm does not name the .* of MetaFormer"):
        freeze(model, stages)


# -- detectors


def test_a_detectors_checkpoint_may_lack_newer_flags(tmp_path):
    from object_detection.checkpoints import build_detector

    flags = {"model": "retinanet_vanillanet_11", "width_mult": 1 / 64, "fpn_channels": 16}
    detector = build_detector(flags, 4)
    torch.save({"model": detector.state_dict(), "classes": ["a", "b", "c"], "args": flags}, tmp_path / "w.pth")
    opened, classes = open_detector(tmp_path / "w.pth")
    assert classes == ("a", "b", "c")
    assert all(
        torch.equal(x, y) for x, y in zip(opened.state_dict().values(), detector.state_dict().values(), strict=True)
    )
