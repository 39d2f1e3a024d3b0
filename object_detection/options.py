"""The flags of object_detection/main.py: those of every training run, and the detector's own."""

import argparse
from collections.abc import Sequence

from object_detection.detectors import ANCHOR_SIZES, FRAMEWORKS, TRAIN_SIZES
from options import (
    COUNT,
    FRACTION,
    POSITIVE,
    WHOLE,
    Parser,
    Requirements,
    add_training_flags,
    boolean,
    check_training_flags,
    parse_checked,
)

__all__ = ["build_parser", "parse_args"]


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="object_detection/main.py",
        description="Train, evaluate (--eval true), draw (--draw FILE), fuse (--switch_to_deploy FILE) or export "
        "(--export_onnx FILE) a detector.",
        fromfile_prefix_chars="@",
        epilog="@FILE reads flags from a recipe; what follows it on the command line wins.",
    )
    add_training_flags(parser)
    parser.set_defaults(
        batch_size=4, epochs=12, lr=1.3e-4, opt_betas=[0.9, 0.999], layer_decay=0.6, test_freq=1, test_epoch=0,
        num_workers=4, log_freq=50,
    )  # fmt: skip

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        default="mask_rcnn_vanillanet_11",
        help="retinanet_ or mask_rcnn_, then a VanillaNet variant or any timm model with maps of strides 4 to 32",
    )
    model.add_argument("--act_num", type=WHOLE, help="n of the series activation [4]")
    model.add_argument("--width_mult", type=POSITIVE, help="factor on the network's channels [the variant's own]")
    model.add_argument("--fpn_channels", type=COUNT, default=256, help="of the pyramid, and of RetinaNet's head")
    model.add_argument("--box_channels", type=COUNT, help="of Mask R-CNN's box head [1024]")
    model.add_argument("--mask_channels", type=COUNT, nargs="+", help="of Mask R-CNN's mask head [256 256 256 256]")
    model.add_argument("--head_norm", type=boolean, default=False, help="BatchNorm in pyramid and heads")
    model.add_argument(
        "--proposals", type=COUNT, nargs=2, metavar=("TRAIN", "TEST"), help="of Mask R-CNN, an image [2000 1000]"
    )
    model.add_argument("--rois", type=COUNT, help="boxes of an image that its box head learns from [512]")
    model.add_argument("--anchor_sizes", type=COUNT, nargs=5, default=list(ANCHOR_SIZES), help="px, by level")
    model.add_argument(
        "--backbone_weights",
        metavar="FILE",
        help="a classifier's checkpoint to begin with, without --finetune and --resume",
    )
    model.add_argument(
        "--backbone_key", default="model_ema|model|module", help="of its weights; | separates alternatives"
    )
    model.add_argument("--deploy", type=boolean, default=False, help="the detector in --finetune is in deploy form")

    data = parser.add_argument_group("data")
    data.add_argument("--data_path", default=".", help="folder that the following are in")
    data.add_argument("--annotations", default="annotations/instances_train2017.json", help="of the training images")
    data.add_argument("--images", default="train2017", help="folder of the training images")
    data.add_argument("--eval_annotations", default="annotations/instances_val2017.json", help="to evaluate on")
    data.add_argument("--eval_images", default="val2017", help="folder of these images")
    data.add_argument("--train_sizes", type=COUNT, nargs="+", default=list(TRAIN_SIZES), help="px of the short side")
    data.add_argument("--test_size", type=COUNT, default=800, help="px of the short side in evaluation")
    data.add_argument("--max_size", type=COUNT, default=1333, help="px of the long side at most")
    data.add_argument("--flip", type=FRACTION, default=0.5, help="probability of mirroring a training image")
    data.add_argument(
        "--skip_broken_eval", type=boolean, default=False, help="count what is in broken images as missed"
    )

    schedule = parser.add_argument_group("schedule")
    schedule.add_argument("--lr_steps", type=WHOLE, nargs="*", default=[8, 11], help="epochs that lower the rate")
    schedule.add_argument("--lr_gamma", type=FRACTION, default=0.1, help="factor by which they lower it")
    schedule.add_argument("--warmup_steps", type=WHOLE, default=500, help="steps of a linear warm-up from 0")

    outputs = parser.add_argument_group("further modes")
    outputs.add_argument("--switch_to_deploy", metavar="FILE", help="fuse --finetune, compare, evaluate, write to FILE")
    outputs.add_argument("--draw", metavar="FILE", help="with --eval true: a picture of detections in the first images")
    outputs.add_argument("--draw_images", type=COUNT, default=12, help="how many of them")
    outputs.add_argument("--draw_threshold", type=FRACTION, default=0.5, help="score from which a detection is drawn")
    outputs.add_argument("--export_onnx", metavar="FILE", help="export --finetune, and compare it with ONNX Runtime")
    return parser


def _check(args: argparse.Namespace, needs: Requirements) -> None:
    if not args.model.startswith(FRAMEWORKS):
        raise ValueError(f"--model {args.model} is not known: it is retinanet_ or mask_rcnn_, then a model of timm")
    exports = args.export_onnx is not None
    check_training_flags(args, needs, exports=exports)
    needs("backbone_key", args.backbone_weights, "add --backbone_weights")
    needs("draw", args.eval and args.switch_to_deploy is None, "it is for --eval true by itself")
    for flag in ("draw_images", "draw_threshold"):
        needs(flag, args.draw, "add --draw FILE")
    needs("lr_gamma", args.lr_steps, "--lr_steps is empty")
    for flag in ("box_channels", "mask_channels", "proposals", "rois"):
        needs(flag, args.model.startswith("mask_rcnn_"), f"--model {args.model} has no such thing")
    if exports and not args.finetune:
        raise ValueError("--export_onnx needs the weights: add --finetune FILE")
    for flag in ("eval", "switch_to_deploy"):
        needs(flag, not exports, "--export_onnx does nothing else")
    if args.lr_steps and max(args.lr_steps) >= args.epochs:
        raise ValueError(
            f"--lr_steps {max(args.lr_steps)} is never reached in --epochs {args.epochs}: lower it, or give none"
        )
    if args.lr_steps != sorted(set(args.lr_steps)):
        raise ValueError("--lr_steps must rise")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check a command, see `options.parse_checked`."""
    return parse_checked(build_parser(), argv, _check)
