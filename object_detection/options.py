"""The flags of object_detection/main.py: those of every training run and those of detectors."""

from collections.abc import Sequence

import options
from object_detection import ANCHOR_SIZES, FRAMEWORKS, TRAIN_SIZES
from options import COUNT, FRACTION, POSITIVE, WHOLE, Arguments, Parser, boolean, file_path


def build_parser() -> Parser:
    parser = Parser(
        prog="object_detection/main.py",
        check=_check,
        launched=True,
        description="Train, evaluate (--eval true), draw (--draw FILE), fuse (--switch_to_deploy FILE) or export "
        "(--export_onnx FILE) a detector.",
    )
    first = parser.add_argument_group("what most runs need")
    add = first.add_argument
    maps = "retinanet_ or mask_rcnn_, then a VanillaNet variant or any timm model with maps of strides 4 to 32"
    add("--model", default="mask_rcnn_vanillanet_11", help=maps)
    add("--backbone_weights", type=file_path, help="classifier to start from, unless --finetune or --resume is given")
    add("--data_path", type=file_path, default=".", help="folder that all paths of data are relative to")
    options.add_training_flags(parser, first)
    parser.set_defaults(
        batch_size=4, epochs=12, lr=1.3e-4, opt_betas=[0.9, 0.999], layer_decay=0.6, test_freq=1, test_epoch=0,
        num_workers=4, log_freq=50,
    )  # fmt: skip

    add = parser.add_argument_group("model").add_argument
    add("--act_num", type=WHOLE, help="n of the series activation, whose kernel has 2n+1 x 2n+1 taps [4]")
    add("--width_mult", type=POSITIVE, help="factor on the number of the network's channels [the variant's own]")
    add("--fpn_channels", type=COUNT, default=256, help="number of channels of the pyramid and of RetinaNet's head")
    add("--box_channels", type=COUNT, help="number of channels of Mask R-CNN's box head [1024]")
    add("--mask_channels", type=COUNT, nargs="+", help="channels of Mask R-CNN's mask head, by layer [256 256 256 256]")
    add("--head_norm", type=boolean, default=False, help="put BatchNorm into pyramid and heads")
    add("--proposals", type=COUNT, nargs=2, metavar=("TRAIN", "TEST"), help="boxes of Mask R-CNN an image [2000 1000]")
    add("--rois", type=COUNT, help="boxes of an image that Mask R-CNN's box head trains on [512]")
    add("--anchor_sizes", type=COUNT, nargs=5, default=list(ANCHOR_SIZES), help="sides of anchors in pixels, by level")
    add("--backbone_key", default="model_ema|model|module", help="key of the weights in --backbone_weights")
    add("--deploy", type=boolean, default=False, help="the detector in --finetune is already in deploy form")

    add = parser.add_argument_group("data").add_argument
    coco = "annotations/instances_{}2017.json"
    add("--annotations", type=file_path, default=coco.format("train"), help="COCO's JSON file of the training images")
    add("--images", type=file_path, default="train2017", help="folder of the training images")
    add("--eval_annotations", type=file_path, default=coco.format("val"), help="as --annotations, for validation")
    add("--eval_images", type=file_path, default="val2017", help="folder of the validation images")
    sizes = "lengths in pixels, one of which the short side of a training image gets at random"
    add("--train_sizes", type=COUNT, nargs="+", default=list(TRAIN_SIZES), help=sizes)
    add("--test_size", type=COUNT, default=800, help="length of the short side in evaluation, in pixels")
    add("--max_size", type=COUNT, default=1333, help="largest length of the long side, in pixels")
    add("--flip", type=FRACTION, default=0.5, help="probability of mirroring a training image")

    add = parser.add_argument_group("schedule").add_argument
    add("--lr_steps", type=WHOLE, nargs="*", default=[8, 11], help="epochs at which to lower the learning rate")
    add("--lr_gamma", type=FRACTION, default=0.1, help="factor by which --lr_steps lower the learning rate")
    add("--warmup_steps", type=WHOLE, default=500, help="number of optimizer steps of linear warm-up from 0")

    add = parser.add_argument_group("further modes").add_argument
    add("--switch_to_deploy", type=file_path, help="fuse --finetune, compare both forms, and write this file")
    add("--draw", type=options.photograph, help="with --eval true, draw detections in the first images to this file")
    add("--draw_images", type=COUNT, default=12, help="number of images that --draw shows")
    add("--draw_threshold", type=FRACTION, default=0.5, help="lowest score of a detection that --draw shows")
    add("--export_onnx", type=file_path, help="write --finetune to this ONNX file and compare it with PyTorch")
    return parser


def _check(args: Arguments) -> None:
    if not args.model.startswith(FRAMEWORKS):
        raise ValueError(f"--model {args.model} is not known: it is retinanet_ or mask_rcnn_, then a model of timm")
    exports = args.export_onnx is not None
    args.needs("eval switch_to_deploy", not exports, "--export_onnx does nothing else")
    options.check_training_flags(args, exports=exports)
    args.needs("use_amp amp_dtype channels_last", not exports, "--export_onnx writes float32")
    args.needs("backbone_key", args.backbone_weights, "add --backbone_weights")
    args.needs("draw", args.eval and args.switch_to_deploy is None, "it is for --eval true by itself")
    args.needs("draw_images draw_threshold", args.draw, "add --draw FILE")
    args.needs("lr_gamma", args.lr_steps, "--lr_steps is empty")
    masks = args.model.startswith("mask_rcnn_")
    args.needs("box_channels mask_channels proposals rois", masks, f"--model {args.model} has no such thing")
    if exports and not args.finetune:
        raise ValueError("--export_onnx needs the weights: add --finetune FILE")
    if args.lr_steps != sorted(set(args.lr_steps)):
        raise ValueError("--lr_steps must rise")
    trains = not (exports or args.eval or args.switch_to_deploy is not None)
    for flag in ("annotations", "images"):
        if not trains and flag in args.typed and f"eval_{flag}" not in args.typed:
            raise ValueError(f"--{flag} is for training, which this command does not do: did you mean --eval_{flag}?")
    reached = [step for step in args.lr_steps if step < args.epochs]
    if trains and len(reached) < len(args.lr_steps):
        unreached = f"--lr_steps {args.lr_steps[-1]} is never reached in --epochs {args.epochs}"
        if "lr_steps" not in args.given:
            raise ValueError(f"{unreached}: add --lr_steps with lower ones, or with none")
        args.moot("lr_steps", f"{unreached}, and {reached or 'none'} is left: lower it, or give none")
        args.lr_steps = reached


def parse_args(argv: Sequence[str] | None = None) -> Arguments:
    """Parse and check a command."""
    return build_parser().parse_args(argv)
