"""The detectors: what they are made of and cost, layer decay, backbones, fusing, comparison, export."""

import copy
import math
from contextlib import nullcontext

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torch.utils._pytree import tree_leaves

import models
import optim_factory
from benchmarking import profiling
from models.checkpointing import MODES, set_grad_checkpointing
from object_detection import benchmark, detectors
from object_detection.comparing import largest_difference, largest_gap
from object_detection.detectors import TRAIN_SIZES, create_detector, load_backbone
from records.checkpoints import CheckpointError

# The paper's table: parameters (M) in the form named, MACs (G) at 1280 x 800. Frozen: these are not ours to change.
PAPER = {
    ("retinanet_vanillanet_11", "fused"): (67.0, 386),
    ("mask_rcnn_vanillanet_11", "unfused"): (107.5, None),
    ("mask_rcnn_vanillanet_11", "fused"): (None, 404),
    ("retinanet_swin_tiny_patch4_window7_224", "unfused"): (38.5, 245),
    ("mask_rcnn_swin_tiny_patch4_window7_224", "unfused"): (47.8, 267),
    ("mask_rcnn_convnextv2_nano", "unfused"): (35.2, 221),
}
TINY = {"width_mult": 1 / 64, "act_num": 1, "fpn_channels": 8, "test_size": 64, "train_sizes": (64,), "max_size": 96,
        "anchor_sizes": (8, 12, 16, 24, 32)}  # fmt: skip
HEADS = {"box_channels": 16, "mask_channels": (8, 8), "rpn_post_nms_top_n_test": 50, "rpn_pre_nms_top_n_test": 50}


def tiny(name, **kwargs):
    return create_detector(name, num_classes=4, **TINY | (HEADS if name.startswith("mask") else {}) | kwargs)


def batch():
    images = [torch.rand(3, 60, 80), torch.rand(3, 80, 64), torch.rand(3, 64, 64)]
    boxes = [[[5.0, 5, 40, 50], [30, 10, 70, 30]], [[10, 20, 60, 70]], []]
    targets = []
    for image, rows in zip(images, boxes, strict=True):
        masks = torch.zeros(len(rows), *image.shape[-2:], dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, rows, strict=True):
            mask[int(y1) : int(y2), int(x1) : int(x2)] = 1
        labels = torch.arange(1, len(rows) + 1)
        targets.append({"boxes": torch.tensor(rows).reshape(-1, 4), "labels": labels, "masks": masks})
    return images, targets


@torch.no_grad()
def lively(detector, randomized):
    """In eval mode, with scores that spread over images, places and classes, as those of a trained detector."""
    network = set(randomized(detector.network).modules())
    for module in detector.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module not in network:
            module.weight.normal_(std=(2 / module.weight[0].numel()) ** 0.5)
            module.bias.zero_()
    if detector.has_masks:
        scoring = [detector.rpn.head.cls_logits, detector.roi_heads.box_predictor.cls_score]
        placing = [detector.rpn.head.bbox_pred, detector.roi_heads.box_predictor.bbox_pred]
    else:
        scoring, placing = [detector.head.classification_head.cls_logits], [detector.head.regression_head.bbox_reg]
    detector.eval()
    for module, spread in [*((layer, 1.0) for layer in scoring), *((layer, 0.5) for layer in placing)]:
        outputs = []
        hook = module.register_forward_hook(lambda _, __, out, outputs=outputs: outputs.append(out.flatten()))
        detector([torch.rand(3, 64, 64)])
        hook.remove()
        module.weight.mul_(spread / torch.cat(outputs).std())
    return detector


# -- what they are


@pytest.mark.parametrize("name", ["retinanet_vanillanet_6", "mask_rcnn_vanillanet_6"])
def test_boxes_are_in_float32_under_autocast(name):
    """Anchors, decoding and losses; in bfloat16 a coordinate beyond 512 px would be a multiple of 4."""
    torch.manual_seed(0)
    detector = tiny(name)
    anchors, dtypes = [], {}
    generator = detector.rpn.anchor_generator if detector.has_masks else detector.anchor_generator
    generator.register_forward_hook(lambda _, __, output: anchors.append(torch.cat(output)))
    for part in ("backbone.body", *detector.heads):
        detector.get_submodule(part).register_forward_hook(
            lambda _, __, output, part=part: dtypes.update({part: {value.dtype for value in tree_leaves(output)}})
        )
    images, targets = batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector(images, targets)
        [detection] = detector.eval()(images[:1])
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert detection["boxes"].dtype is torch.float32
    assert dtypes.pop("backbone.body") == {torch.bfloat16}
    assert all(found == {torch.float32} for found in dtypes.values())
    detector(images[:1])
    assert torch.equal(anchors[1], anchors[2])


def test_images_are_normalized_as_the_network_wants_them():
    assert tiny("retinanet_vanillanet_6").normalization == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    other = create_detector("retinanet_tf_mobilenetv3_small_minimal_100", num_classes=4, fpn_channels=8)
    assert other.normalization == ((0.5,) * 3, (0.5,) * 3)
    assert other.transform.image_mean == [0.5] * 3
    own = create_detector("retinanet_resnet10t", num_classes=4, fpn_channels=8, image_mean=[0.4] * 3)
    assert own.transform.image_mean == [0.4] * 3
    with pytest.raises(ValueError, match="train_sizes and test_size"):
        create_detector("retinanet_resnet10t", num_classes=4, min_size=320)


def test_the_background_is_not_detected():
    """torchvision's RetinaNet has a logit for it, and would detect it where that logit is high."""
    detector = tiny("retinanet_vanillanet_5").eval()
    with torch.no_grad():
        detector.head.classification_head.cls_logits.bias.view(-1, 4).copy_(torch.tensor([5.0, -9, 1, -9]))
        [found] = detector([torch.rand(3, 64, 64)])
    assert set(found["labels"].tolist()) == {2}


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenetv3_small_050", "vgg11_bn", "resnet10t"])
def test_classifiers_of_timm_load(name):
    """timm's feature extractors lack more layers than the classifier: convolutions of heads, whole stages."""
    detector = create_detector(f"retinanet_{name}", num_classes=4, fpn_channels=8)
    classifier = timm.create_model(name)
    load_backbone(detector, classifier.state_dict())
    assert torch.equal(next(detector.network.parameters()), next(classifier.parameters()))
    with pytest.raises(CheckpointError, match="1 unexpected"):
        load_backbone(detector, {**classifier.state_dict(), "other.weight": torch.zeros(1)})


def test_layers_that_timm_does_not_name():
    with pytest.raises(ValueError, match=r"--layer_decay: timm does not name the layers of .*; add --layer_decay 1"):
        create_detector("retinanet_poolformer_s12", num_classes=4, fpn_channels=8).group_matcher()


def test_padding_is_counted():
    with torch.device("meta"):
        detector = tiny("retinanet_vanillanet_5").eval()
    assert benchmark.count_macs(detector, 100, 97) == benchmark.count_macs(detector, 128, 128)


@pytest.mark.parametrize(("name", "form"), PAPER)
def test_sizes_are_the_papers(name, form):
    with torch.device("meta"):
        detector = create_detector(name, num_classes=81).eval()
    if form == "fused":
        detector.switch_to_deploy()
    params, macs = PAPER[name, form]
    if params is not None:
        assert profiling.count_params(detector) / 1e6 == pytest.approx(params, rel=0.01)
    if macs is not None:
        # The peers agree as counted here; VanillaNet-11 lies below the table, see object_detection/README.md.
        tolerance = 0.035 if "vanillanet" in name else 0.015
        assert benchmark.count_macs(detector, 800, 1280).total / 1e9 == pytest.approx(macs, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "params", "fused", "cost", "fused_backbone"),
    [
        ("retinanet_vanillanet_11", 106_364_413, 66_668_541, (381.29, 22.22, 138.24), 213.52),
        ("retinanet_vanillanet_13", 123_506_173, 75_397_117, (449.72, 22.22, 138.24), 248.40),
        ("mask_rcnn_vanillanet_11", 108_122_613, 68_426_741, (381.29, 65.86, 117.93), 213.52),
        ("mask_rcnn_vanillanet_13", 125_264_373, 77_155_317, (449.72, 65.86, 117.93), 248.40),
    ],
)
def test_exact_sizes(name, params, fused, cost, fused_backbone):
    with torch.device("meta"):
        detector = getattr(detectors, name)(num_classes=81).eval()
    assert profiling.count_params(detector) == params
    counted = benchmark.count_macs(detector, 800, 1280)
    giga = [round(value / 1e9, 2) for value in (counted.backbone, counted.neck, counted.heads)]
    assert giga == pytest.approx(cost, abs=0.011)
    assert detector.selection.detections_per_img == 100
    assert detector.network.stages[-1].act.kernel_size == (9, 9)  # n is 4
    detector.switch_to_deploy()
    assert profiling.count_params(detector) == fused
    counted = benchmark.count_macs(detector, 800, 1280)
    assert counted.backbone / 1e9 == pytest.approx(fused_backbone, abs=0.01)


@pytest.mark.parametrize("variant", [name for name in sorted(models.vanillanet.VARIANTS) if "ada" not in name])
def test_levels_of_every_depth(variant):
    """Strides 4, 8, 16, 32, each from the last stage before a downsampling; P6 from C5."""
    for framework, maps in (("retinanet", (8, 16, 32, 64, 128)), ("mask_rcnn", (4, 8, 16, 32, 64))):
        detector = tiny(f"{framework}_{variant}")
        levels = detector.backbone(torch.rand(1, 3, 128, 256))
        assert [tuple(x.shape[1:]) for x in levels.values()] == [(8, 128 // s, 256 // s) for s in maps]
    width = detector.network.num_features
    assert tiny(f"retinanet_{variant}").backbone.fpn.extra_blocks.p6.in_channels == width


@pytest.mark.parametrize(
    "name",
    ["retinanet_vanillanet_11", "retinanet_vanillanet_13", "mask_rcnn_vanillanet_11", "mask_rcnn_vanillanet_13"],
)
def test_forward_and_backward(name):
    detector = tiny(name)
    losses = detector(*batch())
    assert tuple(losses) == detector.losses
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in detector.parameters())
    detector.selection.score_thresh = 0.0
    with torch.no_grad():
        found = detector.eval()([torch.rand(3, 50, 90)])[0]
    assert set(found) == {"boxes", "labels", "scores"} | ({"masks"} if detector.has_masks else set())
    assert 10 < len(found["boxes"]) <= 100
    assert set(found["labels"].tolist()) <= {1, 2, 3}
    if detector.has_masks:
        assert found["masks"].shape == (len(found["boxes"]), 1, 50, 90)
        assert 0 not in found["labels"]


@pytest.mark.parametrize("name", ["retinanet_vanillanet_5", "mask_rcnn_vanillanet_5"])
def test_a_batch_without_objects(name):
    """Every parameter gets a gradient all the same, as several processes need it; it teaches no box and no mask."""
    detector = tiny(name)
    images, targets = batch()
    losses = detector([images[2]] * 2, [targets[2]] * 2)
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in detector.parameters())
    without = {"bbox_regression", "loss_box_reg", "loss_mask", "loss_rpn_box_reg"} & set(losses)
    assert len(without) == (3 if detector.has_masks else 1)
    assert all(losses[loss] == 0 for loss in without)


def test_norms_in_the_heads():
    """In the pyramid's 2 x 3 or 2 x 4 convolutions, RetinaNet's 2 x 4, Mask R-CNN's box head (2) and mask head (2)."""
    for name, count in (("retinanet_vanillanet_5", 6 + 8), ("mask_rcnn_vanillanet_5", 8 + 2 + 2)):
        for head_norm in (False, True):
            detector = tiny(name, head_norm=head_norm)
            network = set(detector.network.modules())
            norms = [m for m in detector.modules() if isinstance(m, nn.BatchNorm2d) and m not in network]
            assert len(norms) == (count if head_norm else 0)
            sum(detector(*batch()).values()).backward()


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_other_networks(backbone):
    """In the same place, with windows that do not divide the maps, too."""
    plain = {key: value for key, value in TINY.items() if key not in ("width_mult", "act_num")}
    detector = create_detector(f"retinanet_{backbone}", num_classes=4, **plain)
    losses = detector(*batch())
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(p.grad is not None for p in detector.backbone.parameters())
    with pytest.raises(ValueError, match="has no deploy form"):
        detector.switch_to_deploy()
    groups = optim_factory.build_optimizer(detector, "adamw", lr=1, weight_decay=0.1, layer_decay=0.6).param_groups
    assert {group["lr_scale"] for group in groups} >= {1.0, 0.6}


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("vanillanet_11", {}, "retinanet_ or mask_rcnn_"),
        ("retinanet_vanillanet_4", {}, "vanillanet_4 is not known"),
        ("mask_rcnn_vanillanet_13_x1_5_ada_pool", {"width_mult": 1 / 64}, r"strides .* \[4, 8, 16, 32\] are needed"),
        ("retinanet_vit_tiny_patch16_224", {}, "gives no pyramid|are needed"),
        ("retinanet_resnet18", {"act_num": 3}, "belong to VanillaNet"),
        ("retinanet_vanillanet_5", {"anchor_sizes": (8, 16)}, "5 anchor sizes, not 2"),
    ],
)
def test_impossible_detectors(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_detector(name, num_classes=4, **kwargs)


def test_sizes_of_images():
    """Drawn in training, fixed in evaluation, the long side bounded in both."""
    detector = create_detector("retinanet_vanillanet_5", num_classes=4, width_mult=1 / 64, fpn_channels=8)
    torch.manual_seed(0)
    short = {detector.transform([torch.rand(3, 4, 4)])[0].image_sizes[0][0] for _ in range(120)}
    assert short == set(range(480, 1025, 32)) == set(TRAIN_SIZES)
    assert detector.transform([torch.rand(3, 10, 100)])[0].image_sizes[0][1] == 1333
    detector.eval()
    assert {detector.transform([torch.rand(3, 4, 4)])[0].image_sizes[0] for _ in range(5)} == {(800, 800)}
    assert copy.deepcopy(detector).train().transform.min_size == TRAIN_SIZES


def test_layer_decay():
    """The stem and nine stages of VanillaNet-11 in six groups; neck and heads at the full rate."""
    detector = tiny("mask_rcnn_vanillanet_11")
    optimizer = optim_factory.build_optimizer(detector, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.6)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for name, parameter in detector.named_parameters():
        key = name.removeprefix("backbone.body.model.")
        layer = ".".join(key.split(".")[:2]) if key.startswith("stages") else key.split(".")[0]
        found.setdefault(layer, set()).add(scale[id(parameter)])
        assert decay[id(parameter)] == (0 if parameter.ndim == 1 else 0.05)
    powers = {"stem1": 6, "stem2": 6, "backbone": 0, "rpn": 0, "roi_heads": 0}
    powers |= {f"stages.{i}": 6 - group for i, group in enumerate((0, 1, 1, 2, 3, 3, 4, 4, 5))}
    assert {layer: len(scales) for layer, scales in found.items()} == dict.fromkeys(powers, 1)
    assert {layer: min(scales) for layer, scales in found.items()} == pytest.approx(
        {layer: 0.6**power for layer, power in powers.items()}
    )


@pytest.mark.parametrize("name", ["retinanet_vanillanet_6", "mask_rcnn_resnet18"])
def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(name):
    detector = tiny(name, **({} if "vanillanet" in name else {"width_mult": None, "act_num": None}))
    images, targets = batch()
    gradients, saved = {}, {}
    for mode in MODES:
        chosen = copy.deepcopy(detector)
        set_grad_checkpointing(chosen.network, mode)
        saved[mode] = profiling._saved(lambda images, chosen=chosen: chosen(images, targets), images, nullcontext())
        torch.manual_seed(1)  # of the boxes that Mask R-CNN draws
        sum(chosen(images, targets).values()).backward()
        gradients[mode] = [p.grad for p in chosen.parameters()]
    assert saved["none"] > saved["activations"] > saved["full"]
    for mode in MODES[1:]:
        assert all(torch.equal(*pair) for pair in zip(gradients[mode], gradients["none"], strict=True))


# -- backbones


def test_a_classifier_becomes_a_backbone(randomized):
    """Its activations of n = 3 get a margin of zeros, and compute the same in a network of n = 4."""
    classifier = randomized(timm.create_model("vanillanet_9", width_mult=1 / 64, act_num=3, num_classes=5))
    detector = tiny("retinanet_vanillanet_9", act_num=4).eval()
    load_backbone(detector, classifier.state_dict())
    images = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        wanted = classifier.forward_intermediates(images, intermediates_only=True)
        found = detector.backbone.body(images)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backbone", ["resnet18", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_other_classifiers_become_backbones(backbone):
    classifier = timm.create_model(backbone)
    detector = create_detector(f"retinanet_{backbone}", num_classes=4, fpn_channels=8)
    load_backbone(detector, classifier.state_dict())
    own = classifier.state_dict()
    assert all(torch.equal(own[name], value) for name, value in detector.network.state_dict().items())


def test_backbones_that_do_not_fit():
    detector = tiny("retinanet_vanillanet_9")
    good = timm.create_model("vanillanet_9", width_mult=1 / 64, act_num=1).state_dict()
    for weights in (
        timm.create_model("vanillanet_10", width_mult=1 / 64, act_num=1).state_dict(),
        timm.create_model("vanillanet_9", width_mult=1 / 64, act_num=2).state_dict(),
        {name: value for name, value in good.items() if "stages.3" not in name},
        {**good, "extra": torch.zeros(1)},
    ):
        with pytest.raises(CheckpointError, match="does not fit"):
            load_backbone(detector, weights)
    load_backbone(detector, good)


# -- comparing


def test_fusing_changes_no_detection(randomized):
    for name in ("retinanet_vanillanet_9", "mask_rcnn_vanillanet_9"):
        # In float64: through random layers float32's rounding grows to about 1e-4, how far depends on the processor.
        detector = lively(tiny(name), randomized).double()
        fused = copy.deepcopy(detector)
        fused.switch_to_deploy()
        assert (fused.deploy, detector.deploy) == (True, False)
        images = [torch.rand(3, 60, 90).double(), torch.rand(3, 100, 70).double()]
        scores = [detector([image])[0]["scores"] for image in images]
        assert all(len(x) > 10 and x.max() - x.min() > 0.02 for x in scores), scores
        assert largest_difference(detector, fused, images) < 1e-9
        assert profiling.count_layers(fused.network) < profiling.count_layers(detector.network)
        with torch.no_grad():  # a wrong fusion shows
            fused.network.stages[2].conv.bias.add_(0.3)
        assert largest_difference(detector, fused, images) > 0.01


def test_fusing_below_lambda_1():
    detector = tiny("retinanet_vanillanet_5")
    detector.network.change_act(0.5)
    with pytest.raises(ValueError, match="slope is 0"):
        detector.switch_to_deploy()


def test_gaps_between_detections():
    detector = tiny("retinanet_vanillanet_5")
    detector.selection.score_thresh, detector.selection.detections_per_img = 0.05, 3

    def found(*rows):
        boxes, labels, scores = zip(*rows, strict=True) if rows else ((), (), ())
        return {
            "boxes": torch.tensor(boxes).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.tensor(scores),
        }

    def gap(one, other):
        return largest_gap(found(*one), found(*other), detector=detector, side=100)

    a, b = ([10.0, 10, 20, 20], 1, 0.9), ([50.0, 50, 80, 90], 2, 0.4)
    assert gap([a, b], [b, a]) == 0  # the order does not matter
    assert gap([a, b], [a, ([50.0, 50, 80, 93], 2, 0.4)]) == pytest.approx(0.03)
    assert gap([a, b], [a, ([50.0, 50, 80, 90], 2, 0.35)]) == pytest.approx(0.05)
    assert gap([a, b], [a, ([50.0, 50, 80, 90], 1, 0.4)]) == pytest.approx(0.35)  # of another class
    for one, other in (([a], [a, b]), ([a, b], [a])):
        assert gap(one, other) == pytest.approx(0.35)  # lacking: by what it is above the threshold
    assert gap([], []) == 0
    assert math.isnan(gap([a, b], [a, ([50.0, 50, math.nan, 90], 2, 0.4)]))
    full = [a, a, b]
    # Of a full list the last may be pushed out by one as good.
    assert gap(full, [a, a, ([0.0, 0, 9, 9], 3, 0.41)]) == pytest.approx(0.01)


# -- the benchmark


def test_calibration(randomized):
    """The score threshold lets as many candidates through as were asked for."""
    for name in ("retinanet_vanillanet_5", "mask_rcnn_vanillanet_5"):
        detector = lively(tiny(name), randomized)
        image = torch.rand(3, 64, 64)
        benchmark.calibrate(detector, image, 40)
        detector.selection.nms_thresh = 1.0  # suppresses nothing
        found = detector([image])[0]["scores"]
        assert 30 <= len(found) <= 40  # less those that fall on the threshold or, clipped, have no area


@pytest.mark.parametrize("framework", ["retinanet", pytest.param("mask_rcnn", marks=pytest.mark.slow)])
def test_benchmark(capsys, framework):
    flags = f"--device cpu --size 64 64 --rounds 1 --candidates 20 --frameworks {framework} --networks"
    benchmark.main([*flags.split(), "vanillanet_5", "resnet18"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {framework}")]
    assert [row[0].strip() for row in rows] == [
        f"{framework}_vanillanet_5", f"{framework}_vanillanet_5, fused", f"{framework}_resnet18"
    ]  # fmt: skip
    values = [[float(cell) for cell in row[1:]] for row in rows]
    assert all(sum(row[1:4]) == pytest.approx(row[4], abs=0.2) and row[5] > 0 for row in values)
    assert values[1][0] < values[0][0]
    assert values[1][1] < values[0][1]


def test_benchmark_of_nothing(capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--device", "cpu", "--networks", "no_such_net"])
    assert ended.value.code == 2
    assert "no_such_net is not known" in capsys.readouterr().err


# -- export


@pytest.mark.parametrize("name", ["retinanet_vanillanet_6", "mask_rcnn_vanillanet_6"])
def test_onnx(name, randomized, tmp_path):
    """The whole detector, fused and not, at the size that it was traced with and at others."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from object_detection.export import compare_onnx, export_onnx

    detector = lively(tiny(name), randomized)
    for form in ("train", "deploy"):
        if form == "deploy":
            detector.switch_to_deploy()
        image = torch.rand(3, 60, 90)
        assert len(detector([image])[0]["scores"]) > 10
        assert export_onnx(detector, tmp_path / "d.onnx", image=image) < 1e-3
        assert compare_onnx(detector, tmp_path / "d.onnx", image=torch.rand(3, 90, 50)) < 1e-3
    with torch.no_grad():  # another detector's file shows
        detector.network.stages[1].conv.bias.add_(0.3)
    assert compare_onnx(detector, tmp_path / "d.onnx", image=image) > 0.01
