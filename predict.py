"""Say what images show: the likeliest classes of each, by a network in any engine and format.

python predict.py vanillanet_9.pt2 photograph.jpg
python predict.py outputs/demo/checkpoint-last.pth FOLDER --engine openvino --precision bf16
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import runtimes
import utils
from deployment.fusing import metadata_of, open_deployed
from deployment.images import real_images, transform
from deployment.predicting import SUFFIXES, Prediction, predict, printable, write_predictions
from loading.images import BrokenImageError, list_images
from options import CALIB_COUNT, COUNT, Parser, add_network_flags, canonical, file_path, network_choices
from records import logs
from records.files import mistakes_end, one_line

# Flags that choose or prepare a network, which an exported file settles itself.
NETWORK_FLAGS = (
    "model", "model_key", "input_size", "crop_pct", "random_weights", "calib_data", "data_set", "calib_count",
    "int8_depthwise",
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="predict.py", description="Print the likeliest classes of images.")
    parser.add_argument("source", metavar="MODEL", help="an exported file, a checkpoint, or the name of a timm model")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files, and folders with images under them")
    parser.add_argument("--topk", "--top", type=COUNT, default=5, help="how many classes of each image")
    parser.add_argument("--batch_size", type=COUNT, default=1, help="images in a call of the network")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=file_path,
        help="write a row for each class of each image, .csv or .json [print]",
    )
    parser.add_argument("--engine", choices=sorted(runtimes.ENGINES), help="[the file's; for a network channels_last]")
    parser.add_argument("--precision", choices=runtimes.PRECISIONS, help="[the file's; for a network fp32]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    add_network_flags(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check a command. Errors end the process with exit code 2 and one line on standard error."""
    parser = build_parser()
    args = parser.parse_args([canonical(token) for token in (sys.argv[1:] if argv is None else argv)])
    if runtimes.of_file(args.source):
        for flag in NETWORK_FLAGS:
            if getattr(args, flag) != parser.get_default(flag):
                parser.error(f"--{flag} has no effect here: {args.source} was exported with all that it needs")
    elif args.precision != "int8":
        for flag in ("calib_data", "calib_count", "data_set", "int8_depthwise"):
            if getattr(args, flag) != parser.get_default(flag):
                parser.error(f"--{flag} is for --precision int8")
    if args.output and Path(args.output).suffix not in SUFFIXES:
        parser.error(f"--output {args.output} must end in {' or '.join(SUFFIXES)}")
    args.calib_count, args.data_set = args.calib_count or CALIB_COUNT, args.data_set or "image_folder"
    return args


def open_runtime(args: argparse.Namespace) -> runtimes.Runtime:
    """The network in its engine; `metadata` are there whatever it was made from."""
    if runtimes.of_file(args.source):
        return runtimes.load(args.source, engine=args.engine, precision=args.precision, device=args.device)
    network = open_deployed(args.source, **network_choices(args))
    metadata = metadata_of(network)
    calibration = None
    if args.precision == "int8":
        if not args.calib_data:
            raise ValueError("int8 needs real images to calibrate on: add --calib_data DIR")
        images = real_images(transform(metadata), args.calib_count, path=args.calib_data, data_set=args.data_set)
        calibration = runtimes.Calibration(images.split(16), args.int8_depthwise)
    runtime = runtimes.load(
        network.module,
        engine=args.engine or "channels_last",  # a compiler's minute is not worth while for a few images
        precision=args.precision,
        images=torch.zeros(args.batch_size, 3, metadata.input_size, metadata.input_size),
        calibration=calibration,
        device=args.device,
    )
    runtime.metadata = metadata
    return runtime


def run(args: argparse.Namespace) -> int:
    """Print, and write to --output. Returns the exit code: 1 if an image is broken."""
    paths = list_images(args.images)
    found = predict(open_runtime(args), paths, top=args.topk, batch_size=args.batch_size)
    kept: list[Prediction] = []
    broken = 0
    shown = args.output is not None or not sys.stdout.isatty()
    for path, predictions in logs.progress(found, description="images", total=len(paths), enabled=shown):
        if isinstance(predictions, BrokenImageError):
            broken += 1
            if len(paths) == 1:
                raise ValueError(f"cannot read the image {printable(path)}: {predictions}")
            sys.stderr.write(f"predict.py: cannot read the image {one_line(printable(path))}: {predictions}\n")
            continue
        kept += predictions
        if args.output is None:
            print(printable(path))
            for prediction in predictions:
                print(f"  {100 * prediction.chance:5.1f} %  {prediction.name}")
            kept.clear()
    if args.output is not None:
        write_predictions(args.output, kept)
        print(f"{args.output}: {len(paths) - broken} images")
    return int(broken > 0)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    utils.setup_logging(rank=0)
    with mistakes_end("predict.py"):
        code = run(args)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
