"""Write a network, as it is deployed, to a file that an engine runs.

python export.py vanillanet_9.pth --to pt2 --precision bf16
python export.py outputs/demo/checkpoint-last.pth --to openvino --int8 --calib_data data/fashion-mnist --data_set FMNIST
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import deployment
import runtimes
from options import COUNT, NONNEGATIVE, Parser, boolean, canonical, number
from records import logs
from records.files import mistakes_end
from runtimes.layer_errors import layer_errors

# The largest difference from PyTorch in float32, relative to the largest logit. A file beyond it is not written.
TOLERANCES = {"default": 1e-2, "fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2, "int8": 2.5e-1}
COMPARED_IMAGES = 32
CALIB_COUNT = 300


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which network, and how its images are preprocessed; shared by the commands that deploy one."""
    parser.add_argument("--model", help="the model's name in timm, for a checkpoint that does not record it")
    parser.add_argument("--model_key", default="model_ema|model|module", help="of the weights in the checkpoint")
    parser.add_argument("--input_size", type=COUNT, help="pixels [the checkpoint's]")
    parser.add_argument("--crop_pct", type=number(float, above=0, high=1), help="[the checkpoint's]")
    parser.add_argument(
        "--random_weights", type=boolean, default=False, help="a model's name without its pretrained weights"
    )
    parser.add_argument("--calib_data", metavar="DIR", help="images to calibrate int8 on, and to compare on")
    parser.add_argument("--data_set", help="what --calib_data is, as for main.py [image_folder]")
    parser.add_argument(
        "--int8_depthwise", type=boolean, default=False, help="quantize the series activations, too (pt2, openvino)"
    )
    parser.add_argument("--calib_count", type=COUNT, help=f"images to calibrate on [{CALIB_COUNT}]")


def open_network(args: argparse.Namespace) -> tuple[nn.Module, runtimes.Metadata]:
    """What `deployment.load` makes of `args.source` and the flags above."""
    return deployment.load(
        args.source,
        name=args.model,
        key=args.model_key,
        input_size=args.input_size,
        crop_pct=args.crop_pct,
        random_weights=args.random_weights,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="export.py", description="Write a network in deploy form to a file that an engine runs.")
    parser.add_argument("source", metavar="MODEL", help="a checkpoint, or the name of a model in timm")
    parser.add_argument("--to", choices=sorted(runtimes.FORMATS), help="the format")
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
        parser.error("--to is missing: " + ", ".join(sorted(runtimes.FORMATS)))
    if (args.layer_errors or args.precision == "int8") and not args.calib_data:
        parser.error("int8 needs real images to calibrate on: add --calib_data DIR")
    if args.calib_count is not None and args.precision != "int8" and not args.layer_errors:
        parser.error("--calib_count is for --int8")
    if args.data_set is not None and not args.calib_data:
        parser.error("--data_set says what --calib_data is: add it")
    args.calib_count = args.calib_count or CALIB_COUNT
    args.data_set = args.data_set or "image_folder"
    engine = runtimes.find(runtimes.FORMATS[args.to]) if args.to else None
    if args.int8_depthwise and (args.precision != "int8" or not engine.leaves_depthwise):
        parser.error("--int8_depthwise true is for --int8 with --to pt2 or openvino; ONNX has it always")
    if args.batch_size > 1 and engine and not engine.fixes_batch:
        parser.error("--batch_size is for --to pt2; the other formats take any batch")
    return args


@torch.inference_mode()
def compare(runtime: runtimes.Runtime, network: nn.Module, images: torch.Tensor) -> tuple[float, int]:
    """The largest difference of the logits, relative to the largest logit; how many images get the same class."""
    expected = network(images)
    found = runtime(images).cpu()
    difference = (found - expected).abs().max() / expected.abs().max()
    return difference.item(), int((found.argmax(1) == expected.argmax(1)).sum())


def write(
    network: nn.Module,
    path: Path,
    target: runtimes.Target,
    *,
    metadata: runtimes.Metadata,
    images: torch.Tensor,
    batch_size: int,
    tolerance: float,
) -> str:
    """Export, compare on `images` with the network itself, and put the files in their place if they agree.

    Returns:
        The comparison in words.

    Raises:
        ValueError: they differ by more than `tolerance`; nothing is written then.
    """
    engine = runtimes.find(target.engine)
    engine.check(target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="writing-", dir=path.parent) as folder:
            batch = images[:1].expand(batch_size, -1, -1, -1).contiguous()
            files = engine.export(network, batch, Path(folder) / path.name, target, metadata)
            difference, same = compare(engine.open(files[0], target), network, images)
            comparison = (
                f"largest logit difference from PyTorch in float32, relative: {difference:.1e}; "
                f"the same class for {same} of {len(images)} images"
            )
            if not difference <= tolerance:
                raise ValueError(f"{comparison}: more than {tolerance:g}, nothing written")
            for file in files:
                shutil.move(file, path.parent / file.name)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
    return comparison


def print_layer_errors(network: nn.Module, images: torch.Tensor) -> None:
    rows = [["in int8", "kind", "error of the logits (%)"]]
    rows += [[found.layer, found.kind, f"{100 * found.error:.3f}"] for found in layer_errors(network, images.split(50))]
    print(logs.table(rows, "root mean square, relative", text_columns=2))


def run(args: argparse.Namespace) -> None:
    network, metadata = open_network(args)
    calibrates = args.layer_errors or args.precision == "int8"
    count = args.calib_count if calibrates else COMPARED_IMAGES
    images = deployment.real_images(metadata, count, path=args.calib_data, data_set=args.data_set)
    if args.layer_errors:
        return print_layer_errors(network, images)
    engine = runtimes.find(runtimes.FORMATS[args.to])
    name = Path(args.source).stem if metadata.checkpoint else metadata.model
    path = Path(args.output or Path("exports") / f"{name}-{args.precision}{engine.suffix}")
    if path.suffix != engine.suffix:
        raise ValueError(f"--output {path}: a file of --to {args.to} ends in {engine.suffix}")
    calibration = runtimes.Calibration(images.split(16), args.int8_depthwise) if calibrates else None
    comparison = write(
        network,
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
    with mistakes_end("export.py"):
        run(args)


if __name__ == "__main__":
    main()
