"""Print the likeliest classes of images, by a network in any engine and format.

python predict.py vanillanet_9.pt2 photograph.jpg
python predict.py outputs/demo/checkpoint-last.pth FOLDER --engine openvino --precision bf16
"""

from collections.abc import Sequence
from pathlib import Path

import runtimes
from deployment.options import CALIBRATION_FLAGS, CHOICES, NETWORK_FLAGS, SUFFIXES, add_network_flags
from options import COUNT, Arguments, Parser, file_path

DEFAULT_ENGINE = "channels_last"  # a few images are not worth a minute of compiling


def build_parser() -> Parser:
    parser = Parser(prog="predict.py", description="Print the likeliest classes of images.", check=_check)
    add = parser.add_argument
    add("source", type=file_path, metavar="MODEL", help="an exported file, a checkpoint, or the name of a timm model")
    add("images", type=file_path, metavar="IMAGE", nargs="+", help="image files, and folders with images under them")
    add("--topk", "--top", type=COUNT, default=5, help="number of classes of each image")
    add("--batch_size", type=COUNT, default=1, help="images in a call of the network")
    add("--output", type=file_path, help="write a row for each class of each image to this .csv or .json file [print]")
    add("--engine", choices=runtimes.ENGINES, help="engine to compute in [the file's; for a network channels_last]")
    add("--precision", choices=runtimes.PRECISIONS, help="precision to compute in [the file's; for a network fp32]")
    add("--device", default="cpu", help="what to compute on: cpu or cuda")
    add_network_flags(parser)
    return parser


def _check(args: Arguments) -> None:
    exported = runtimes.of_file(args.source)
    for flag in NETWORK_FLAGS:
        args.needs(flag, not exported, f"{args.source} was exported with all that it needs")
    for flag in CALIBRATION_FLAGS:
        args.needs(flag, exported or args.precision == "int8", "it is for --precision int8")
    mend = "it is for --engine compile, aotinductor or openvino"
    args.needs("int8_depthwise", runtimes.find(args.engine or DEFAULT_ENGINE).leaves_depthwise, mend)
    if args.precision == "int8" and not exported and not args.calib_data:
        raise ValueError("int8 needs real images to calibrate on: add --calib_data DIR")
    if args.output and Path(args.output).suffix not in SUFFIXES:
        raise ValueError(f"--output {args.output} must end in {' or '.join(SUFFIXES)}")


if __name__ == "__main__":
    ARGS = build_parser().parse_args()  # report a wrong flag before the slow imports below

import io
import sys

import torch

from deployment.fusing import metadata_of, open_deployed
from deployment.images import real_images, transform
from deployment.predicting import Prediction, predict, printable, write_predictions
from loading.images import BrokenImageError, list_images
from records import logs
from records.files import check_writable, mistakes_end, one_line


def open_runtime(args: Arguments) -> runtimes.Runtime:
    """Open the network in its engine. The runtime always has `metadata`, whatever the source is."""
    if runtimes.of_file(args.source):
        return runtimes.load(args.source, engine=args.engine, precision=args.precision, device=args.device)
    network = open_deployed(args.source, **args.pick(*CHOICES))
    if network.weights and network.weights.choice:
        sys.stderr.write(f"predict.py: {network.weights.choice}\n")
    metadata = metadata_of(network)
    calibration = None
    if args.precision == "int8":
        images = real_images(transform(metadata), args.calib_count, path=args.calib_data, data_set=args.data_set)
        calibration = runtimes.Calibration(images.split(16), args.int8_depthwise)
    runtime = runtimes.load(
        network.module,
        engine=args.engine or DEFAULT_ENGINE,
        precision=args.precision,
        images=torch.zeros(args.batch_size, 3, metadata.input_size, metadata.input_size),
        calibration=calibration,
        device=args.device,
    )
    runtime.metadata = metadata
    return runtime


def run(args: Arguments) -> int:
    """Print the predictions, or write them to --output. Returns the exit code: 1 if an image is broken."""
    # Check the images' paths and --output before opening the network, which takes time.
    paths = list_images(args.images)
    if args.output is not None:
        check_writable(args.output)
    runtime = open_runtime(args)
    number = len(runtime.metadata.classes)
    if not number:
        raise ValueError(f"{args.source} has no classes, only features: there is nothing to predict")
    if args.topk > number:
        args.moot("topk", f"--topk {args.topk} is more than the {number} classes of {args.source}")
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack letters of a class name
        sys.stdout.reconfigure(errors="backslashreplace")
    # A broken image is reported and skipped. It is an error only if it is the single file asked for.
    found = predict(runtime, paths, top=args.topk, batch_size=args.batch_size)
    kept: list[Prediction] = []
    broken = 0
    shown = args.output is not None or not sys.stdout.isatty()
    for path, predictions in logs.progress(found, description="images", total=len(paths), enabled=shown):
        if isinstance(predictions, BrokenImageError):
            broken += 1
            if len(paths) == 1 and paths == args.images:
                raise ValueError(f"cannot read the image {printable(path)}: {predictions}")
            sys.stderr.write(f"predict.py: cannot read the image {one_line(printable(path))}: {predictions}\n")
        elif args.output is not None:
            kept += predictions
        else:
            print(printable(path))
            for prediction in predictions:
                print(f"  {100 * prediction['chance']:5.1f} %  {prediction['class']}")
    if args.output is not None:
        write_predictions(args.output, kept)
        print(f"{args.output}: {len(paths) - broken} images")
    return int(broken > 0)


def main(argv: Sequence[str] | None = None, *, args: Arguments | None = None) -> None:
    args = args or build_parser().parse_args(argv)
    with mistakes_end("predict.py"):
        code = run(args)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main(args=ARGS)
