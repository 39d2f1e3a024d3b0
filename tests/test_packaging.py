"""The network in programs of other people: through torch.hub, and installed by pip as the package `vanillanet`."""

import importlib.util
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from models.vanillanet import VARIANTS

ROOT = Path(__file__).parents[1]


def run_elsewhere(program: str, folder: Path, **environment: str) -> str:
    """Run a program in `folder`, whose modules it can import and this repository's not; its standard output."""
    (folder / "program.py").write_text(program)
    command = [sys.executable, "-W", "error::UserWarning", "program.py"]
    environment = {"PATH": "", "OMP_NUM_THREADS": "1", **environment}
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


# -- torch.hub


@pytest.fixture
def host(tmp_path):
    """A program's folder, with modules that have the names of ours."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("from utils import WHOSE\n")
    (tmp_path / "models" / "vanillanet.py").write_text("WHOSE = 'theirs'\n")
    for name in ("utils", "datasets", "engine", "networks"):
        (tmp_path / f"{name}.py").write_text("WHOSE = 'theirs'\n")
    return tmp_path


IMPORTS = "import datasets, engine, models.vanillanet, networks, utils\n"
LOADING = f"""
import sys, timm, torch, torchvision
modules, path = dict(sys.modules), list(sys.path)
network = torch.hub.load({str(ROOT)!r}, "vanillanet_5", source="local", width_mult=1 / 16, num_classes=7).eval()
assert sys.path == path
assert {{name: sys.modules[name] for name in modules}} == modules
ours = [name for name in sys.modules if str(getattr(sys.modules[name], "__file__", "")).startswith({str(ROOT)!r})]
assert not [n for n in ours if ".venv" not in sys.modules[n].__file__ and not n.startswith("vanillanet_")], ours
assert not {{"matplotlib", "tensorboardX", "terminaltables", "wandb"}} & set(sys.modules)
images = torch.randn(2, 3, 64, 64)
assert network(images).shape == (2, 7)
"""
THEIRS = """
assert {m.WHOSE for m in (datasets, engine, models, models.vanillanet, networks, utils)} == {"theirs"}
"""


# Its class is found again by those who ask for it by its module's name, and loading twice gives one class.
LIKE_ANY_OTHER = f"""
import copy, runpy
ROOT, NAMES = {str(ROOT)!r}, {set(VARIANTS)}
again = torch.hub.load(ROOT, "vanillanet_6", source="local", device="meta")
assert type(again) is type(network)
assert {{"vanillanet_5", "vanillanet_6"}} <= set(timm.list_models("vanillanet*"))
assert type(timm.create_model("vanillanet_6", device="meta")) is type(network)
entries = {{name for name, value in runpy.run_path(ROOT + "/hubconf.py").items() if callable(value) and name[0] != "_"}}
assert entries == NAMES  # as torch.hub.list reads them
expected = network(images)
torch.save(network, "network.pt")
assert torch.equal(torch.load("network.pt", weights_only=False)(images), expected)
network.change_act(0.5)
faded = network(images)
copied = copy.deepcopy(network)
copied.compile(backend="eager", fullgraph=True)
torch.testing.assert_close(copied(images), faded)
torch.testing.assert_close(torch.export.export(network, (images,)).module()(images), faded)
"""


@pytest.mark.parametrize(
    "program", [IMPORTS + LOADING, LOADING + LIKE_ANY_OTHER + IMPORTS], ids=["after their imports", "before them"]
)
def test_torch_hub_beside_modules_of_the_same_names(host, program):
    run_elsewhere(program + THEIRS, host)


def test_a_failed_load_leaves_nothing_behind(monkeypatch):
    monkeypatch.delitem(sys.modules, "models")
    before = set(sys.modules)
    for name in [name for name in before if name.partition(".")[0] == "timm"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="timm"):
        runpy.run_path(str(ROOT / "hubconf.py"))
    assert not [name for name in set(sys.modules) - before if name.startswith("vanillanet_")]


# -- pip


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder into which pip installed a wheel of the repository's files."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    for name in ("pyproject.toml", "LICENSE", "main.py", "utils.py"):  # two that must stay out of it
        shutil.copy(ROOT / name, source)
    for name in ("models", "runtimes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*pip, "wheel", *offline, "--wheel-dir", wheels, source], check=True)
    (wheel,) = wheels.iterdir()
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert files == {f"vanillanet/{path.name}" for path in (ROOT / "models").glob("*.py")}
    subprocess.run([*pip, "install", *offline, "--target", target, wheel], check=True)
    return target


def test_the_package_has_the_network_alone(installed):
    assert sorted(path.name.split("-")[0] for path in installed.iterdir()) == ["vanillanet", "vanillanet"]
    assert (installed / "vanillanet").is_dir()


VARIANTS_OF_TIMM = f"""
import timm, torch, vanillanet
assert timm.list_models("vanillanet*") == {list(VARIANTS)}
network = timm.create_model("vanillanet_9", width_mult=1 / 16).eval()
assert type(network) is vanillanet.VanillaNet is type(vanillanet.vanillanet_9(device="meta"))
images = torch.randn(2, 3, 64, 64)
logits = network(images)
network.switch_to_deploy()
assert torch.allclose(network(images), logits, atol=1e-5)
"""
DETECTORS = """
import timm, torch, torchvision, vanillanet
from torchvision.models.detection import FasterRCNN
from torchvision.ops import FeaturePyramidNetwork

class Backbone(torch.nn.Module):
    out_channels = 32

    def __init__(self):
        super().__init__()
        self.body = timm.create_model("vanillanet_6", features_only=True, width_mult=1 / 16, act_num=4)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

    def forward(self, images):
        return self.fpn({str(level): maps for level, maps in enumerate(self.body(images))})

images = [torch.rand(3, 96, 128)]
targets = [{"boxes": torch.tensor([[8.0, 8.0, 60.0, 60.0]]), "labels": torch.tensor([1])}]
anchors = torchvision.models.detection.anchor_utils.AnchorGenerator(((16,), (32,), (64,), (128,)), ((1.0,),) * 4)
detector = FasterRCNN(
    Backbone(), num_classes=2, rpn_anchor_generator=anchors, min_size=96, max_size=128,
    box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2),
)
losses = detector(images, targets)
sum(losses.values()).backward()
gradient = detector.backbone.body.model.stem1[0].weight.grad
assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
assert set(detector.eval()(images)[0]) == {"boxes", "labels", "scores"}
"""
SEGMENTATION = """
import segmentation_models_pytorch as smp, torch, vanillanet

for decoder in (smp.Unet, smp.FPN):
    network = decoder("tu-vanillanet_6", encoder_weights=None, classes=3, width_mult=1 / 16)
    masks = network(torch.randn(2, 3, 64, 96))
    assert masks.shape == (2, 3, 64, 96)
    masks.mean().backward()
    assert network.encoder.model.model.stem1[0].weight.grad is not None
"""


def test_other_libraries_take_the_package(installed, tmp_path):
    """timm, torchvision's detectors and segmentation_models_pytorch, in one program, which imports torch once."""
    program = VARIANTS_OF_TIMM + DETECTORS
    if importlib.util.find_spec("segmentation_models_pytorch"):
        program += SEGMENTATION
    run_elsewhere(program, tmp_path, PYTHONPATH=str(installed))
