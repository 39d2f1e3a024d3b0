"""Images per second, parameters and multiply-accumulates of detectors on several networks, taking turns in one run.

    python -m object_detection.benchmark --device cuda

The weights are random. They affect a detector's cost only through the number of candidates in its last step and, for
Mask R-CNN, the number of masks. Each detector therefore gets the score threshold that about `--candidates` boxes pass.
"""

from collections.abc import Sequence

from object_detection import FRAMEWORKS
from options import COUNT, WHOLE, Arguments, Parser, boolean

NETWORKS = ("vanillanet_11", "resnet50", "swin_tiny_patch4_window7_224")


def build_parser() -> Parser:
    parser = Parser(prog="object_detection.benchmark", description="Speed of detectors on several networks.")
    add, kinds = parser.add_argument, [name.rstrip("_") for name in FRAMEWORKS]
    add("--frameworks", nargs="+", choices=kinds, default=kinds, help="kinds of detectors to measure")
    add("--networks", nargs="+", default=list(NETWORKS), help="VanillaNet variants or timm models")
    size = {"nargs": 2, "default": [800, 1280], "metavar": ("HEIGHT", "WIDTH")}
    add("--size", type=COUNT, help="size of the image in pixels", **size)
    add("--device", default="cuda", help="what to compute on: cuda, cuda:N or cpu")
    add("--channels_last", type=boolean, default=False, help="memory format of images and weights")
    add("--candidates", type=COUNT, default=1000, help="boxes that pass the score threshold")
    add("--rounds", type=COUNT, default=50, help="forward passes that count, of each detector")
    add("--seed", type=WHOLE, default=0, help="seed of weights and image")
    return parser


if __name__ == "__main__":
    ARGS = build_parser().parse_args()  # report a wrong flag before the slow imports below

import argparse
import copy
import logging
from dataclasses import dataclass

import torch
from torch import nn

import utils
from benchmarking import profiling
from object_detection.detectors import Detector, create_detector
from records import logs
from records.files import mistakes_end
from runtimes import set_tf32

logger = logging.getLogger("object_detection")

CLASSES = 81  # COCO's categories and the background
PROPOSALS, MASKS = 1000, 100  # per image, as is usual when counting multiply-accumulates


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one image, by part."""

    backbone: int
    neck: int
    heads: int

    @property
    def total(self) -> int:
        return self.backbone + self.neck + self.heads


def count_macs(detector: Detector, height: int, width: int) -> Cost:
    """Count the cost of a detector in eval mode for an image of this size after resizing, on the meta device.

    The pyramid is the neck. Mask R-CNN's box head is counted for 1000 proposals, its mask head for 100 detections.
    """
    detector = copy.deepcopy(detector).to("meta")
    multiple = detector.transform.size_divisible  # to which torchvision pads every image
    height, width = (-(-side // multiple) * multiple for side in (height, width))
    backbone, maps = profiling.macs_of(detector.backbone.body, torch.empty(1, 3, height, width, device="meta"))
    both, maps = profiling.macs_of(detector.backbone, torch.empty(1, 3, height, width, device="meta"))
    levels = list(maps.values())
    if not detector.has_masks:
        return Cost(backbone, both - backbone, profiling.macs_of(detector.head, levels)[0])
    heads, channels = detector.roi_heads, detector.backbone.out_channels
    box = nn.Sequential(heads.box_head, heads.box_predictor)
    mask = nn.Sequential(heads.mask_head, heads.mask_predictor)
    parts = (
        (detector.rpn.head, levels),
        (box, torch.empty(PROPOSALS, channels, *heads.box_roi_pool.output_size, device="meta")),
        (mask, torch.empty(MASKS, channels, *heads.mask_roi_pool.output_size, device="meta")),
    )
    return Cost(backbone, both - backbone, sum(profiling.macs_of(*part)[0] for part in parts))


@torch.no_grad()
def calibrate(detector: Detector, image: torch.Tensor, candidates: int) -> None:
    """Set the score threshold that about `candidates` (box, class) pairs of the image pass."""
    seen: list[torch.Tensor] = []
    if detector.has_masks:
        source = detector.roi_heads.box_predictor
        hook = source.register_forward_hook(lambda _, __, out: seen.append(out[0].softmax(-1)[:, 1:]))
    else:
        hook = detector.head.register_forward_hook(lambda _, __, out: seen.append(out["cls_logits"][..., 1:].sigmoid()))
    # No score is above 1, so the forward pass that collects the scores selects nothing.
    detector.selection.score_thresh = 1.0
    detector([image])
    hook.remove()
    scores = seen[0].flatten()
    detector.selection.score_thresh = scores.topk(min(candidates, len(scores))).values[-1].item()


def build_forms(name: str, device: torch.device, *, channels_last: bool) -> dict[str, Detector]:
    """Build a detector in eval mode and, if its network has a deploy form, a fused copy."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    detector = create_detector(name, num_classes=CLASSES).eval()
    forms = {name: detector}
    if hasattr(detector.network, "switch_to_deploy"):
        forms[f"{name}, fused"] = copy.deepcopy(detector)
        forms[f"{name}, fused"].switch_to_deploy()
    return {form: network.to(device, memory_format=layout) for form, network in forms.items()}


def run(args: argparse.Namespace, device: torch.device) -> str:
    """Measure all detectors and return the table of results."""
    height, width = args.size
    rows = [["", "params (M)", "backbone", "neck", "heads", "MACs (G)", "images/s"]]
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(args.seed)).to(device)
    for framework in args.frameworks:
        forms: dict[str, Detector] = {}
        for network in args.networks:
            utils.seed_everything(args.seed)
            forms |= build_forms(f"{framework}_{network}", device, channels_last=args.channels_last)
        for detector in forms.values():
            # The image keeps its size, so that speed and multiply-accumulates are for the same size.
            detector.test_size, detector.transform.max_size = min(args.size), max(args.size)
            detector.eval()
            calibrate(detector, image, args.candidates)
        rates = profiling.throughput(list(forms.values()), [image], rounds=args.rounds)
        for (name, detector), rate in zip(forms.items(), rates, strict=True):
            cost = count_macs(detector, height, width)
            giga = [f"{value / 1e9:.1f}" for value in (cost.backbone, cost.neck, cost.heads, cost.total)]
            rows.append([name, f"{profiling.count_params(detector) / 1e6:.2f}", *giga, f"{rate:.3g}"])
    return logs.table(rows, f"{width}x{height} px, batch 1, float32")


def main(argv: Sequence[str] | None = None, *, args: Arguments | None = None) -> None:
    args = args or build_parser().parse_args(argv)
    utils.setup_logging(0)
    with mistakes_end("object_detection.benchmark"):
        world = utils.init_world(args.device)
        if world.device.type == "mps":
            raise ValueError(f"--device {args.device} is not measured: use cuda or cpu")
        set_tf32("fp32", str(world.device))
        print(run(args, world.device))
    threads = f"{torch.get_num_threads()} threads" if world.device.type == "cpu" else torch.cuda.get_device_name()
    print(f"images/s: median of {args.rounds} rounds in which the detectors take turns, {threads}; random weights")


if __name__ == "__main__":
    main(args=ARGS)
