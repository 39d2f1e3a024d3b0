"""Say what images show: the likeliest classes of each, by a network in any engine and format.

python predict.py vanillanet_9.pt2 photograph.jpg
python predict.py outputs/demo/checkpoint-last.pth FOLDER --engine openvino --precision bf16
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch

import deployment
import runtimes
from export import CALIB_COUNT, add_network_flags, open_network
from loading.images import list_images, read_image
from options import COUNT, Parser, canonical
from records.files import mistakes_end

# Flags that choose or prepare a network, which an exported file settles itself.
NETWORK_FLAGS = (
    "model", "model_key", "input_size", "crop_pct", "random_weights", "calib_data", "data_set", "calib_count",
    "int8_depthwise",
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="predict.py", description="Print the likeliest classes of images.")
    parser.add_argument("source", metavar="MODEL", help="an exported file, a checkpoint, or the name of a timm model")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files, and folders with images under them")
    parser.add_argument("--top", type=COUNT, default=5, help="classes to print")
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
    args.calib_count, args.data_set = args.calib_count or CALIB_COUNT, args.data_set or "image_folder"
    return args


def open_runtime(args: argparse.Namespace) -> runtimes.Runtime:
    """The network in its engine; `metadata` are there whatever it was made from."""
    if runtimes.of_file(args.source):
        return runtimes.load(args.source, engine=args.engine, precision=args.precision, device=args.device)
    network, metadata = open_network(args)
    calibration = None
    if args.precision == "int8":
        if not args.calib_data:
            raise ValueError("int8 needs real images to calibrate on: add --calib_data DIR")
        images = deployment.real_images(metadata, args.calib_count, path=args.calib_data, data_set=args.data_set)
        calibration = runtimes.Calibration(images.split(16), args.int8_depthwise)
    runtime = runtimes.load(
        network,
        engine=args.engine or "channels_last",  # a compiler's minute is not worth while for a few images
        precision=args.precision,
        images=torch.zeros(1, 3, metadata.input_size, metadata.input_size),
        calibration=calibration,
        device=args.device,
    )
    runtime.metadata = metadata
    return runtime


def predict(runtime: runtimes.Runtime, paths: Sequence[str], top: int) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """For each file its path, and its likeliest classes with their softmax probabilities, best first."""
    classes, prepare = runtime.metadata.classes, deployment.transform(runtime.metadata)
    for path in paths:
        logits = runtime(prepare(read_image(path))[None])
        chances, indices = logits[0].softmax(0).topk(min(top, len(classes)))
        yield path, [(classes[index], chance) for index, chance in zip(indices.tolist(), chances.tolist(), strict=True)]


def run(args: argparse.Namespace) -> None:
    paths = list_images(args.images)
    for path, found in predict(open_runtime(args), paths, args.top):
        print(path)
        for name, chance in found:
            print(f"  {100 * chance:5.1f} %  {name}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with mistakes_end("predict.py"):
        run(args)


if __name__ == "__main__":
    main()
