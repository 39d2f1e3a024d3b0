"""Write a network, as it is deployed, to a file that an engine runs.

python export.py vanillanet_9.pth --to pt2 --precision bf16
python export.py outputs/demo/checkpoint-last.pth --to openvino --int8 --calib_data data/fashion-mnist --data_set FMNIST
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import runtimes
import utils
from deployment.exporting import COMPARED_IMAGES, TOLERANCES, write_exported, write_safetensors
from deployment.fusing import metadata_of, open_deployed
from deployment.images import real_images, transform
from options import (
    CALIB_COUNT,
    COUNT,
    NONNEGATIVE,
    Parser,
    add_network_flags,
    boolean,
    canonical,
    network_choices,
)
from records import logs
from records.files import mistakes_end
from runtimes.layer_errors import layer_errors

FORMATS = sorted([*runtimes.FORMATS, "safetensors"])


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="export.py", description="Write a network in deploy form to a file that an engine runs.")
    parser.add_argument("source", metavar="MODEL", help="a checkpoint, or the name of a model in timm")
    parser.add_argument("--to", choices=FORMATS, help="the format")
    parser.add_argument("--precision", choices=runtimes.PRECISIONS, help="[fp32]")
    parser.add_argument("--int8", action="store_true", help="short for --precision int8")
    parser.add_argument("--output", metavar="FILE", help="[exports/MODEL-PRECISION with the format's suffix]")
    add_network_flags(parser)
    parser.add_argument("--batch_size", type=COUNT, default=1, help="pt2: the batch that it is compiled for")
    parser.add_argument("--device", default="cpu", help="that the file is to run on: cpu, or cuda for pt2 and tensorrt")
    parser.add_argument("--tolerance", type=NONNEGATIVE, help=f"largest difference, relative {TOLERANCES}")
    parser.add_argument(
        "--layer_errors", type=boolean, default=False, help="print what int8 costs layer by layer, and write nothing"
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check a command. Errors end the process with exit code 2 and one line on standard error."""
    parser = build_parser()
    args = parser.parse_args([canonical(token) for token in (sys.argv[1:] if argv is None else argv)])
    if args.int8 and args.precision not in (None, "int8"):
        parser.error(f"--int8 and --precision {args.precision} exclude each other")
    if args.layer_errors and (args.precision or args.tolerance is not None or args.device != "cpu"):
        parser.error("--layer_errors true is about int8, in PyTorch: leave --precision, --tolerance and --device out")
    args.precision = "int8" if args.int8 else args.precision or "fp32"
    if args.layer_errors:
        if args.to or args.output:
            parser.error("--layer_errors true writes no file: leave --to and --output out")
    elif not args.to:
        parser.error("--to is missing: " + ", ".join(FORMATS))
    if (args.layer_errors or args.precision == "int8") and not args.calib_data:
        parser.error("int8 needs real images to calibrate on: add --calib_data DIR")
    if args.calib_count is not None and args.precision != "int8" and not args.layer_errors:
        parser.error("--calib_count is for --int8")
    if args.data_set is not None and not args.calib_data:
        parser.error("--data_set says what --calib_data is: add it")
    args.calib_count = args.calib_count or CALIB_COUNT
    args.data_set = args.data_set or "image_folder"
    if args.to == "safetensors":
        if args.precision != "fp32" or args.batch_size > 1 or args.tolerance is not None or args.device != "cpu":
            parser.error("--to safetensors writes weights: leave --precision, --batch_size, --tolerance, --device out")
        if args.calib_data or args.int8_depthwise:
            parser.error("--to safetensors compares on no images: leave --calib_data and --int8_depthwise out")
        return args
    engine = runtimes.find(runtimes.FORMATS[args.to]) if args.to else None
    if args.int8_depthwise and (args.precision != "int8" or not engine.leaves_depthwise):
        parser.error("--int8_depthwise true is for --int8 with --to pt2 or openvino; ONNX has it always")
    if args.batch_size > 1 and engine and not engine.fixes_batch:
        parser.error("--batch_size is for --to pt2; the other formats take any batch")
    return args


def print_layer_errors(network: nn.Module, images: torch.Tensor) -> None:
    rows = [["in int8", "kind", "error of the logits (%)"]]
    rows += [[found.layer, found.kind, f"{100 * found.error:.3f}"] for found in layer_errors(network, images.split(50))]
    print(logs.table(rows, "root mean square, relative", text_columns=2))


def run(args: argparse.Namespace) -> None:
    network = open_deployed(args.source, **network_choices(args))
    metadata = metadata_of(network)
    name = Path(args.source).stem if metadata.checkpoint else metadata.model
    if args.to == "safetensors":
        path = Path(args.output or Path("exports") / name / "model.safetensors")
        if path.suffix != ".safetensors":
            raise ValueError(f"--output {path}: a file of --to safetensors ends in .safetensors")
        config = write_safetensors(network, path)
        print(f"{metadata.model}, {metadata.input_size} px: {path}, {config}")
        return None
    calibrates = args.layer_errors or args.precision == "int8"
    count = args.calib_count if calibrates else COMPARED_IMAGES
    images = real_images(transform(metadata), count, path=args.calib_data, data_set=args.data_set)
    if args.layer_errors:
        return print_layer_errors(network.module, images)
    engine = runtimes.find(runtimes.FORMATS[args.to])
    path = Path(args.output or Path("exports") / f"{name}-{args.precision}{engine.suffix}")
    if path.suffix != engine.suffix:
        raise ValueError(f"--output {path}: a file of --to {args.to} ends in {engine.suffix}")
    calibration = runtimes.Calibration(images.split(16), args.int8_depthwise) if calibrates else None
    comparison = write_exported(
        network.module,
        path,
        runtimes.Target(engine.name, args.precision, args.device, calibration=calibration),
        metadata=metadata,
        images=images[:COMPARED_IMAGES],
        batch_size=args.batch_size,
        tolerance=TOLERANCES[args.precision] if args.tolerance is None else args.tolerance,
    )
    print(comparison)
    print(f"{metadata.model}, {args.precision}, {metadata.input_size} px: {path}")
    return None


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    utils.setup_logging(rank=0)
    with mistakes_end("export.py"):
        run(args)


if __name__ == "__main__":
    main()
