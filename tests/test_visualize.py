"""Pictures: the maps against their definition, the curves and figures against their tables, bad input in one line."""

import builtins
import csv
import re
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import datasets
import main
import models
import utils
import visualize
from loading.transforms import build_eval_transform
from pictures import style
from pictures.cam import activation_maps
from pictures.confusion import confusion_figure, worst_pairs
from pictures.figures import PAPER_RESULTS, accuracy_figure, paper_results, results_figures
from pictures.subjects import label, open_network, read_images, short_name, true_class
from records import curves
from records.checkpoints import load_checkpoint, load_weights, save_checkpoint
from records.logs import CsvSink

ROOT = Path(visualize.__file__).parent
IMAGES = ROOT / "data" / "fashion-mnist" / "t10k-images-idx3-ubyte.gz"
PAPER = paper_results()


def scaled(cam):
    """ReLU, then each map to [0, 1]."""
    cam = cam.clamp(min=0)
    low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
    return ((cam - low) / (high - low)).detach().numpy()


# -- the maps


class Analytic(nn.Module):
    """Features A = M x at every pixel, logits W mean(A) + b, with numbers written down: the map is ReLU(W[k] A)."""

    num_classes = 2

    def __init__(self):
        super().__init__()
        self.mixing = nn.Parameter(torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 1.0]]))
        self.weight = nn.Parameter(torch.tensor([[1.0, -1.0], [-0.5, 2.0]]))

    def forward_features(self, x):
        return torch.einsum("fc,nchw->nfhw", self.mixing, x)

    def forward_head(self, features):
        return features.mean((2, 3)) @ self.weight.T + torch.tensor([0.25, -0.25])


@pytest.mark.parametrize("target", [None, 0, 1])
def test_the_map_is_the_one_computed_by_hand(target):
    images = torch.randn(3, 3, 5, 5)
    maps, logits = activation_maps(Analytic(), images, target=target)
    first = images[:, 0] - 2 * images[:, 1] + 0.5 * images[:, 2]
    second = images[:, 1] + images[:, 2]
    evidence = torch.stack([first - second, -0.5 * first + 2 * second], 1)  # of either class, (N, 2, 5, 5)
    expected = evidence.mean((2, 3)) + torch.tensor([0.25, -0.25])
    chosen = expected.argmax(1) if target is None else torch.full((3,), target)
    assert np.abs(logits - expected.numpy()).max() < 1e-6
    assert np.abs(maps - scaled(evidence[torch.arange(3), chosen])).max() < 1e-6
    assert maps.min() == 0
    assert maps.max() == pytest.approx(1, abs=1e-6)


def test_nothing_speaks_for_the_class():
    model = Analytic()
    with torch.no_grad():
        model.weight[0] = torch.tensor([-1.0, -1.0])
        model.mixing.copy_(torch.ones(2, 3))
    maps, _ = activation_maps(model, torch.rand(1, 3, 5, 5), target=0)
    assert not maps.any()


def test_a_linear_vanillanet_has_the_class_activation_map(randomized):
    """At lambda 1, gradients give the classifier's own weights, which fusing writes down."""
    model = randomized(models.vanillanet_6(width_mult=1 / 64, num_classes=5))
    images = torch.randn(2, 3, 96, 96)
    maps, _ = activation_maps(model, images, target=3)
    with torch.no_grad():
        features = model.forward_features(images)  # (2, 64, 3, 3)
    model.switch_to_deploy()
    weights = model.get_classifier().weight[3, :, 0, 0]
    cam = torch.einsum("c,nchw->nhw", weights, features).clamp(min=0)
    expected = F.interpolate(torch.from_numpy(scaled(cam))[:, None], size=96, mode="bilinear")[:, 0]
    assert maps.shape == (2, 96, 96)
    assert np.abs(maps - scaled(expected)).max() < 1e-5


@pytest.mark.parametrize("level", [None, 0, -2])
@pytest.mark.parametrize("variant", ["vanillanet_6", "vanillanet_13_x1_5_ada_pool"])
def test_both_forms_look_at_the_same(randomized, variant, level):
    model = randomized(timm.create_model(variant, width_mult=1 / 64, num_classes=5))
    images = torch.randn(2, 3, 96, 96)
    before, logits = activation_maps(model, images, level=level)
    model.switch_to_deploy()
    after, fused_logits = activation_maps(model, images, level=level)
    assert before.std() > 0.05
    assert np.abs(before - after).max() < 1e-4
    assert np.abs(logits - fused_logits).max() < 1e-4 * np.abs(logits).max()


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("resnet18", lambda model, x: model.forward_features(x)),
        ("swin_tiny_patch4_window7_224", lambda model, x: model.forward_features(x).permute(0, 3, 1, 2)),
        ("mixer_s32_224", lambda model, x: model.forward_features(x).transpose(1, 2).unflatten(2, (7, 7))),
    ],
)
def test_layouts_of_other_models(name, features):
    """Channels first, channels last and tokens; a linear classifier after the average, so the map is known."""
    model = timm.create_model(name, num_classes=4).eval()
    classifier = model.get_classifier()
    nn.init.uniform_(classifier.weight)  # some start at 0; none may leave the map empty
    images = torch.randn(1, 3, 224, 224)
    maps, logits = activation_maps(model, images, target=2)
    with torch.no_grad():
        assert np.abs(model(images).numpy() - logits).max() < 1e-5
        cam = torch.einsum("c,nchw->nhw", classifier.weight[2], features(model, images)).clamp(min=0)
    expected = F.interpolate(torch.from_numpy(scaled(cam))[:, None], size=224, mode="bilinear")[:, 0]
    assert np.abs(maps - scaled(expected)).max() < 1e-4


def test_a_class_token_is_looked_at_through_its_attention():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=2).eval()
    maps, _ = activation_maps(model, torch.randn(1, 3, 224, 224), target=2)
    assert maps.max() > 0.99
    assert len(np.unique(maps.reshape(14, 16, 14, 16)[:, 8, :, 8])) > 50  # of 14 x 14 patches


def test_in_place_activations_do_not_spoil_the_map():
    """A layer whose output a ReLU overwrites: the gradient is that before the ReLU, and so must the features be."""

    class Overwritten(Analytic):
        feature_info = ({"module": "scale"},)

        def __init__(self):
            super().__init__()
            self.scale = nn.Conv2d(3, 3, 1, bias=False)
            self.act = nn.ReLU(inplace=True)

        def forward_features(self, x):
            return super().forward_features(self.act(self.scale(x)))

    model, images = Overwritten(), torch.randn(1, 3, 5, 5)
    maps, _ = activation_maps(model, images, target=0, level=0)
    with torch.no_grad():
        features = model.scale(images)
        pull = model.weight[0] @ model.mixing  # by each channel after the ReLU, and before it where that is open
        expected = torch.einsum("nc,nchw->nhw", pull * (features > 0).float().mean((2, 3)), features)
    assert features.min() < 0
    assert np.abs(maps - scaled(expected)).max() < 1e-6


# -- through the command


@pytest.fixture(scope="module")
def run_folder(tiny_fmnist, tmp_path_factory):
    """Two epochs of main.py at 64 px on 60 images; lambda ends at 1."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    arguments = (
        f"--data_set FMNIST --data_path {tiny_fmnist} --output_dir {folder} --model vanillanet_6 --width_mult 0.0273 "
        "--act_num 2 --input_size 64 --device cpu --num_workers 0 --batch_size 20 --lr 1e-3 --warmup_epochs 0 "
        "--epochs 2 --decay_epochs 1 --model_ema true --model_ema_decay 0.5 --model_ema_eval true --test_freq 1 "
        "--bce_loss --imagenet_default_mean_and_std false --save_ckpt_num 1"
    )
    handlers = {number: signal.getsignal(number) for number in utils.StopRequest.signals}
    main.main(arguments.split())
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Two image files in nested folders beside a text."""
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    Image.fromarray(datasets.read_idx(IMAGES)[0]).resize((90, 70)).save(folder / "b.png")
    Image.fromarray(datasets.read_idx(IMAGES)[1]).resize((70, 90)).save(folder / "deeper" / "a.jpg")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def figures(monkeypatch):
    """What a command draws, by the name of the file."""
    saved = {}
    save = visualize._save
    monkeypatch.setattr(
        visualize, "_save", lambda figure, path: (saved.update({path.name: figure}), save(figure, path))
    )
    return saved


def test_an_idx_file_without_images(tmp_path):
    empty = tmp_path / "empty-idx3-ubyte"
    empty.write_bytes(b"\0\0\x08\x03" + struct.pack(">III", 0, 28, 28))
    with pytest.raises(ValueError, match=r"empty-idx3-ubyte: there is no image in it$"):
        read_images([str(empty)], 8)


def test_networks_side_by_side(run_folder, photos, tmp_path, figures, capsys):
    """The checkpoint says its width, n, size, normalization, form and loss; the picture is what the network answers."""
    last, deployed = run_folder / "checkpoint-last.pth", tmp_path / "deployed.pth"
    network = open_network(str(last))
    fused = models.vanillanet_6(width_mult=0.0273, act_num=2, num_classes=10)
    load_weights(fused, load_checkpoint(last)["model_ema"])
    fused.switch_to_deploy()
    save_checkpoint({"model": fused.state_dict(), "args": load_checkpoint(last)["args"]}, deployed)
    command = [
        "cam",
        photos,
        "--network",
        last,
        "--network",
        f"vanillanet_6={deployed}",
        "--output",
        tmp_path / "o" / "c.png",
    ]
    visualize.main([str(token) for token in command])
    assert capsys.readouterr().out == f"{tmp_path / 'o' / 'c.png'}\n"
    with Image.open(tmp_path / "o" / "c.png") as image:
        assert image.size == (round(140 * 6.3), round(140 * 5.9))
    axes = np.array(figures["c.png"].axes).reshape(2, 3)
    assert [a.get_title() for a in axes[0]] == [
        "",
        "vanillanet_6\ncheckpoint-last.pth",
        "vanillanet_6, deployed\ndeployed.pth",
    ]
    assert [a.get_xlabel() for a in axes[:, 0]] == ["b.png", "a.jpg"]
    found, total, broken = read_images([str(photos)], 8)
    assert ([photo.name for photo in found], total, broken) == (["b.png", "a.jpg"], 2, [])
    inputs = torch.stack([build_eval_transform(network.preprocessing)(photo.image) for photo in found])
    assert inputs.shape == (2, 3, 64, 64)
    assert inputs.min() == pytest.approx(-1)  # normalized by 0.5, as the run was told
    maps, logits = activation_maps(network.module, inputs)
    for row, heat, answer in zip(axes, maps, torch.from_numpy(logits).sigmoid(), strict=True):  # --bce_loss
        assert np.array_equal(row[0].images[0].get_array(), row[1].images[0].get_array())
        assert np.array_equal(row[1].images[1].get_array(), heat)
        assert np.abs(row[2].images[1].get_array() - heat).max() < 1e-4
        words = f"{network.labels[answer.argmax()]} {answer.max():.2f}"
        assert row[1].get_xlabel() == row[2].get_xlabel() == words
    with Image.open(photos / "b.png") as image:  # 90 x 70 -> 93 x 73 -> the middle 64 x 64
        expected = np.asarray(image.convert("RGB").resize((93, 73), Image.Resampling.BICUBIC))[4:68, 14:78] / 255
    assert np.abs(axes[0, 0].images[0].get_array() - expected).max() < 1e-6


def test_a_class_to_explain_a_level_and_a_limit(run_folder, tmp_path, figures, capsys):
    last = str(run_folder / "checkpoint-last.pth")
    output = ["--output", str(tmp_path / "c.png")]
    flags = ["--target", "7", "--level", "0", "--max-images=3", "--model_key", "model"]
    visualize.main(["cam", str(IMAGES), "--network", last, "--network", last, *flags, *output])
    assert "first 3 of 2000 images" in capsys.readouterr().out
    axes = np.array(figures["c.png"].axes).reshape(3, 3)
    network = open_network(last, key="model")
    inputs = torch.stack(
        [build_eval_transform(network.preprocessing)(photo.image) for photo in read_images([str(IMAGES)], 3)[0]]
    )
    maps, logits = activation_maps(network.module, inputs, target=7, level=0)
    chances = torch.from_numpy(logits).sigmoid()
    for row, heat, chance in zip(axes, maps, chances, strict=True):
        assert np.array_equal(row[1].images[1].get_array(), heat)
        assert row[1].get_xlabel().startswith(f"map of Sneaker {chance[7]:.2f}\nanswer ")
    averaged = open_network(last)
    assert not torch.equal(averaged.module.stem1[0].weight, network.module.stem1[0].weight)  # the EMA is the default


def test_a_folder_named_as_a_class_tells_what_is_right(run_folder, tmp_path, figures, capsys):
    """Images of one network stand two beside each other; a broken file is named, and the others are drawn."""
    photos = tmp_path / "photos"
    pixels, labels = (
        datasets.read_idx(str(IMAGES).replace("images-idx3", kind)) for kind in ("images-idx3", "labels-idx1")
    )
    classes = torchvision.datasets.FashionMNIST.classes
    network = open_network(str(run_folder / "checkpoint-last.pth"))
    for index, number in enumerate((0, 0, 1)):  # two ankle boots, one of which has the name of the pullover
        folder = photos / classes[labels[number]] / ("deeper" * (index == 1))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number]).save(folder / f"{index // 2}.png")
    (photos / "Pullover" / "broken.png").write_bytes(b"nothing")
    command = ["cam", str(photos), "--network", str(run_folder / "checkpoint-last.pth"), "--level", "0"]
    with pytest.raises(SystemExit) as ended:
        visualize.main([*command, "--output", str(tmp_path / "c.png")])
    assert ended.value.code == 1
    assert re.fullmatch(r"visualize.py: error: .*broken.png: not an image.*\n", capsys.readouterr().err)
    axes = figures["c.png"].axes
    assert len(axes) == 6  # of eight places in a grid of two rows
    assert len({round(panel.get_position().y0, 3) for panel in axes}) == 2
    found = read_images([str(photos)], 8)[0]
    assert [photo.name for photo in found] == ["Ankle boot/0.png", "deeper/0.png", "1.png"]
    _, logits = activation_maps(
        network.module, torch.stack([build_eval_transform(network.preprocessing)(photo.image) for photo in found])
    )
    answers = [classes[index] for index in logits.argmax(1)]
    assert [panel.get_xlabel() for panel in axes[::2]] == [
        "Ankle boot/0.png\ntrue: Ankle boot", "deeper/0.png", "1.png\ntrue: Pullover"
    ]  # fmt: skip
    for panel, answer, truth in zip(axes[1::2], answers, ("Ankle boot", None, "Pullover"), strict=True):
        mark = {True: "\u2713 ", False: "\u2717 "}[answer == truth] if truth else ""
        assert panel.get_xlabel().startswith(f"{mark}{answer} 0.")
        assert panel.images[1].get_cmap().name == "inferno"


def test_a_folder_of_imagenet_is_a_class(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name))
    network = open_network("starnet_s050")
    assert [true_class(network, name) for name in ("n02099601", "golden retriever", "photos")] == [207, 207, None]


def test_a_bare_state_dict_and_pretrained_weights(tmp_path, monkeypatch):
    torch.save(timm.create_model("resnet18", num_classes=3).state_dict(), tmp_path / "w=1.pth")
    network = open_network(f"resnet18={tmp_path / 'w=1.pth'}")
    assert label(network) == "resnet18\nw=1.pth"
    assert short_name(network, 2) == "class 2"
    assert build_eval_transform(network.preprocessing)(Image.new("RGB", (300, 300))).shape == (3, 224, 224)
    logits = torch.tensor([[0.0, np.log(3.0)]])
    assert network.probabilities(logits)[0].tolist() == pytest.approx([0.25, 0.75])
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name))
    assert short_name(open_network("starnet_s050"), 207) == "golden retriever"


def test_curves_of_a_detector_are_its_own(tmp_path, figures):
    (tmp_path / "summary.csv").write_text("epoch,train_loss,lr,test_box_AP\n0,2.5,0.1,0.25\n1,1.5,0.01,0.5\n")
    visualize.main(["curves", str(tmp_path), "--output", str(tmp_path / "curves.png")])
    drawn = {
        axes.get_title("left"): [line.get_ydata().tolist() for line in axes.lines]
        for axes in figures["curves.png"].axes
    }
    assert drawn == {"loss": [[2.5, 1.5]], "box AP": [[0.25, 0.5]], "mask AP": [], "learning rate": [[0.1, 0.01]]}


def test_a_runs_curves_are_drawn_now_and_then_and_at_the_end(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(curves.time, "monotonic", lambda: clock[0])
    table = CsvSink(tmp_path / "summary.csv", 0)
    sink, drawn = curves.CurvesSink(tmp_path / "curves.png", table, curves.CURVES), []
    monkeypatch.setattr(sink, "_draw", lambda draw=sink._draw: (drawn.append(len(table.rows)), draw()))
    for epoch, clock[0] in enumerate((4.0, 10.0, 14.0, 19.9, 21.0, 22.0)):
        table.log({"train_loss": 1.0}, epoch)
        sink.log({"train_loss": 1.0}, epoch)
    sink.close()
    assert drawn == [2, 5, 6]
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1000, 600)


def test_curves_hold_the_numbers_of_their_tables(run_folder, tmp_path, figures):
    second = tmp_path / "second"
    second.mkdir()
    table = list(csv.DictReader((run_folder / "summary.csv").open()))
    rows = [
        {"epoch": e, "train_loss": 2 - e / 4, "test_acc1": [10, "", 30][e], "lr": 0.1, "act_learn": 0.5}
        for e in range(3)
    ]
    with (second / "summary.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    visualize.main(["curves", str(run_folder), str(second), "--output", str(tmp_path / "curves.png")])
    figure = figures["curves.png"]
    drawn = {line.get_label(): line.get_xydata().tolist() for axes in figure.axes for line in axes.lines}
    expected = {
        f"first: {name}": [[int(row["epoch"]), float(row[name])] for row in table]
        for _, names in curves.CURVES
        for name in names
    }
    assert len(expected) == 6
    assert drawn == expected | {
        "second: train_loss": [[0, 2], [1, 1.75], [2, 1.5]],
        "second: test_acc1": [[0, 10], [2, 30]],
        "second: lr": [[0, 0.1], [1, 0.1], [2, 0.1]],
        "second: act_learn": [[0, 0.5], [1, 0.5], [2, 0.5]],
    }
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "second"]
    colors = {line.get_label().partition(":")[0]: line.get_color() for axes in figure.axes for line in axes.lines}
    assert colors["first"] != colors["second"]


def test_folders_of_one_name_and_many_runs(run_folder, tmp_path, figures):
    copies = [tmp_path / str(i) / "first" for i in range(12)]
    for copy in copies:
        copy.mkdir(parents=True)
        (copy / "summary.csv").write_bytes((run_folder / "summary.csv").read_bytes())
    visualize.main(["curves", *map(str, copies), "--output", str(tmp_path / "c.png")])
    assert [text.get_text() for text in figures["c.png"].legends[0].get_texts()] == list(map(str, copies))
    assert len({str(line.get_color()) for line in figures["c.png"].axes[2].lines}) == 12


# -- the paper's figures


def test_the_papers_table_is_the_readmes():
    """Number by number; the README's own copy is frozen in another test. Peers have a latency and nothing else."""
    rows = list(csv.DictReader(PAPER_RESULTS.open()))
    ours = [row for row in rows if row["top1"]]
    cells = [[row[key] for key in ("network", "params_m", "macs_g", "latency_ms", "top1", "real")] for row in ours]
    readme = (ROOT / "README.md").read_text()
    assert len(cells) == 11
    assert all(f"| {' | '.join(row)} |" in readme for row in cells)
    layers = [re.match(r"VanillaNet-(\d+)", row["network"]).group(1) for row in ours]
    assert [row["layers"] for row in ours] == layers
    assert {row["network"]: float(row["latency_ms"]) for row in rows if not row["top1"]} == {
        "ResNet-18": 3.12, "ResNet-34": 5.57, "ResNet-50": 7.64, "ResNet-101": 15.35, "Swin-T": 10.51, "Swin-S": 20.25,
        "ConvNeXtV2-N": 6.85, "ConvNeXtV2-T": 8.40, "RepVGG-A0": 3.22, "RepVGG-B3": 4.21, "MobileNetV3-L": 7.83,
    }  # fmt: skip
    assert all("2305.12972" in row["source"] and "A100, fp32, batch 1" in row["conditions"] for row in rows)


@pytest.mark.parametrize("quantity", ["layers", "latency_ms"])
def test_the_figures_hold_their_table(quantity):
    figure = results_figures(PAPER)[{"layers": "depth_accuracy.png", "latency_ms": "latency_accuracy.png"}[quantity]]
    best = {"layers": "13 layers reach 83.11 % top-1", "latency_ms": "VanillaNet needs 9.72 ms for 83.11 % top-1"}
    assert figure.get_suptitle() == best[quantity]
    assert "the paper, arXiv 2305.12972: A100, fp32, batch 1" in " ".join(figure.get_supxlabel().split())
    drawn = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines if line.get_marker() == "o"}
    known = [result for result in PAPER if result.top1 is not None]
    assert drawn == {
        series: [[getattr(result, quantity), result.top1] for result in known if result.series == series]
        for series in ("VanillaNet", "VanillaNet, 1.5x wide")
    }
    strips = [axes for axes in figure.axes if axes.get_ylabel() == "latency alone"]
    alone = [{line.get_label(): line.get_xdata()[0] for line in axes.lines} for axes in strips]
    expected = {result.network: result.latency_ms for result in PAPER if result.top1 is None}
    assert alone == ([expected] if quantity == "latency_ms" else [])


def drawn_texts(axes):
    """The names in a panel with their places, in pixels, once it is drawn."""
    figure = axes.figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    return {text: text.get_window_extent(renderer) for text in axes.texts if text.get_text()}


@pytest.mark.parametrize("quantity", ["layers", "latency_ms"])
def test_names_are_all_there_and_lie_on_nothing(quantity):
    figure = accuracy_figure({"the paper": PAPER}, quantity, title="t", xlabel="x")
    axes = figure.axes[0]
    boxes = list(drawn_texts(axes).values())
    shown = [result for result in PAPER if result.top1 is not None]
    assert len(boxes) == len(shown) == 11
    dots = axes.transData.transform([(getattr(result, quantity), result.top1) for result in shown])
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index])
        assert not any(box.contains(*dot) for dot in dots)
        inside = axes.bbox
        assert (inside.x0 <= box.x0, box.x1 <= inside.x1, inside.y0 <= box.y0, box.y1 <= inside.y1) == (True,) * 4


def test_a_logarithmic_axis_has_plain_numbers():
    axis = accuracy_figure({"the paper": PAPER}, "latency_ms", title="t", xlabel="x").axes[-1].xaxis
    labels = [label.get_text() for label in axis.get_ticklabels() if label.get_text()]
    assert {"2", "5", "10", "20"} <= set(labels)
    assert all(re.fullmatch(r"\d+(\.\d+)?", label) for label in labels)


def test_the_committed_figures_are_drawn_from_the_committed_table_and_suit_a_dark_page(tmp_path, figures):
    """Not bit by bit, as matplotlib's versions differ in how they smooth a line.

    No background; and what is drawn, blended onto white or black, stands out from it.
    """
    visualize.main(["figures", "--output_dir", str(tmp_path)])
    assert sorted(figures) == ["depth_accuracy.png", "latency_accuracy.png"]
    for name in figures:
        with Image.open(tmp_path / name) as drawn, Image.open(ROOT / "docs" / name) as committed:
            assert drawn.size == committed.size
            difference = np.asarray(drawn.convert("LA"), float) - np.asarray(committed.convert("LA"), float)
            pixels = np.asarray(drawn.convert("RGBA"), float)
        assert np.abs(difference).mean() < 1  # of 255
        assert pixels[0, 0, 3] == 0
        ink = pixels[pixels[..., 3] > 250][:, :3]
        assert len(ink) > 1000
        luminance = ((ink / 255) ** 2.2) @ (0.2126, 0.7152, 0.0722)
        assert (1.05 / (luminance + 0.05)).min() > 2.5  # contrast with white, by WCAG
        assert ((luminance + 0.05) / 0.05).min() > 2.5


# -- confusion matrices


def test_the_worst_pairs_are_the_errors_of_the_largest_share():
    counts = np.array([[8, 2, 0, 0], [30, 60, 10, 0], [0, 0, 5, 5], [0, 0, 0, 0]])  # no image of the last class
    assert worst_pairs(counts) == [(2, 3), (1, 0), (0, 1), (1, 2)]
    assert worst_pairs(counts, 1) == [(2, 3)]
    assert worst_pairs(np.diag([3, 4])) == []


def test_a_confusion_matrix_has_true_classes_down():
    counts = np.array([[8, 2, 0], [30, 60, 10], [0, 5, 5]])
    figure = confusion_figure(counts, ["tench, Tinca tinca", "cat", "dog"])
    (axes,) = figure.axes
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "prediction")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["tench", "cat", "dog"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["tench", "cat", "dog"]
    numbers = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts}
    assert numbers == {place: str(count or "") for place, count in np.ndenumerate(counts)}
    assert np.abs(axes.images[0].get_array() - counts / [[10], [100], [10]]).max() < 1e-12
    assert figure.get_suptitle().replace("\n", " ") == "Right for 60.83 % of 120 images; 50 % of dog taken for cat"


def test_of_many_classes_the_worst_pairs_are_listed(tmp_path):
    counts = 9 * np.eye(50, dtype=int)
    counts[np.arange(30), np.arange(30) + 1] = np.arange(30) + 1  # ever more
    figure = confusion_figure(counts, [f"name {index}" for index in range(50)])
    pairs = figure.axes[1]
    assert [label.get_text() for label in pairs.get_yticklabels()] == [
        f"name {index} \u2192 name {index + 1}" for index in range(29, 9, -1)
    ]
    assert [text.get_text() for text in pairs.texts][:2] == ["30 of 39", "29 of 38"]
    assert pairs.patches[0].get_width() == pytest.approx(100 * 30 / 39)
    style.save(figure, tmp_path / "new" / "confusion.png")
    with Image.open(tmp_path / "new" / "confusion.png") as image:
        assert image.getpixel((0, 0))[3] == 0


# -- bad input


def spoil(folder, hostile):
    """Files that are wrong, each in its own way."""
    (folder / "empty").mkdir()
    (folder / "text.png").write_text("no image")
    (folder / "text.pth").write_text("no checkpoint")
    hostile().rename(folder / "payload.pth")
    hostile(pickled=True).rename(folder / "legacy.pth")
    torch.save({"model": models.vanillanet_6(width_mult=1 / 64).state_dict()}, folder / "bare.pth")
    for name, text in {
        "cut": "epoch,train_loss\n0,1.5\n1,oops\n",
        "nothing": "epoch,train_loss\n",
        "alien": "a,b\n1,2\n",
    }.items():
        (folder / name).mkdir()
        (folder / name / "summary.csv").write_text(text)


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("cam gone.png --network LAST", "gone.png"),
        ("cam text.png --network LAST", "text.png: not an image"),
        ("cam empty --network LAST", "folder empty"),
        ("cam IMAGES --network gone.pth", "gone.pth does not exist"),
        ("cam IMAGES --network nosuch=bare.pth", "nosuch is not known"),
        ("cam IMAGES --network vanillanet_6=gone.pth", "gone.pth does not exist"),
        ("cam IMAGES --network text.pth", "cannot load text.pth"),
        ("cam IMAGES --network bare.pth", "bare.pth does not record which model"),
        ("cam IMAGES --network vanillanet_9=bare.pth", "bare.pth does not fit"),
        ("cam IMAGES --network starnet_s050", "starnet_s050=FILE"),
        ("cam IMAGES --network payload.pth", "payload.pth: refused"),
        ("cam IMAGES --network legacy.pth", "legacy.pth: refused"),
        ("cam IMAGES --network vanillanet_6=payload.pth", "payload.pth: refused"),
        ("cam IMAGES --network LAST --model_key ema", "no key ema"),
        ("cam IMAGES --network LAST --target 10", "--target 10 is no class"),
        ("cam IMAGES --network LAST --target -1", "--target"),
        ("cam IMAGES --network LAST --level 4", "--level 4 is not there"),
        ("cam IMAGES --network LAST --max_images 0", "--max_images"),
        ("cam IMAGES", "--network"),
        ("cam IMAGES --network LAST --output out.nosuch", "nosuch"),
        ("curves gone", "gone/summary.csv"),
        ("curves empty", "empty/summary.csv"),
        ("curves cut", "cut/summary.csv"),
        ("curves nothing", "no finished epoch"),
        ("curves alien", "alien/summary.csv"),
        ("curves cut cut", "twice"),
        ("figures --output_dir text.png", "text.png"),
        ("detections gone.png --network gone.pth", "gone.pth does not exist"),
        ("detections IMAGES --network LAST", "LAST is not the checkpoint of a detector"),
        ("detections IMAGES --network bare.pth", "bare.pth is not the checkpoint of a detector"),
        ("detections IMAGES --network payload.pth", "payload.pth: refused"),
        ("detections IMAGES --network LAST --threshold 2", "--threshold"),
        ("nosuch", "nosuch"),
    ],
)
def test_bad_input(run_folder, hostile, tmp_path, monkeypatch, capsys, command, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)  # a download would fail otherwise than it should
    spoil(tmp_path, hostile)
    places = {"LAST": str(run_folder / "checkpoint-last.pth"), "IMAGES": str(IMAGES)}
    argv = [places.get(token, token) for token in command.split()]
    if argv[0] != "nosuch" and not any(token.startswith("--output") for token in argv):
        argv += ["--output_dir", "out"] if argv[0] == "figures" else ["--output", "out.png"]
    with pytest.raises(SystemExit) as ended:
        visualize.main(argv)
    errors = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert len(errors) == 1, errors
    assert re.match(r"visualize\.py( \w+)?: error: ", errors[0])
    assert named.replace("LAST", places["LAST"]) in errors[0]
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "out.png").exists()


def test_a_map_of_one_position_and_a_missing_package(run_folder, tmp_path, monkeypatch, capsys):
    state = load_checkpoint(run_folder / "checkpoint-last.pth")
    state["preprocessing"]["input_size"] = 32
    save_checkpoint(state, tmp_path / "small.pth")
    argv = ["cam", str(IMAGES), "--network", str(tmp_path / "small.pth"), "--output", str(tmp_path / "c.png")]
    with pytest.raises(SystemExit) as ended:
        visualize.main(argv)
    assert ended.value.code == 2
    assert "single position at this input size: choose an earlier one by --level" in capsys.readouterr().err
    visualize.main([*argv, "--level", "1"])
    real = builtins.__import__

    def without(name, *rest, **kwargs):
        if name.partition(".")[0] == "pytorch_grad_cam":
            raise ImportError(name)
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        visualize.main([*argv, "--level", "1"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
