"""Write a network in deploy form to a file that an engine runs.

python export.py vanillanet_9.pth --engine aotinductor --precision bf16
python export.py outputs/demo/checkpoint-last.pth --engine openvino --int8 --calib_data FOLDER
"""

from collections.abc import Sequence
from pathlib import Path

import runtimes
from deployment.options import CHOICES, add_network_flags
from options import COUNT, NONNEGATIVE, Arguments, Parser, boolean, file_path

WEIGHTS = "safetensors"  # a format that belongs to no engine
ENGINES = (*sorted(runtimes.FORMATS.values()), WEIGHTS)


def build_parser() -> Parser:
    parser = Parser(prog="export.py", description="Write a network in deploy form to an engine's file.", check=_check)
    add = parser.add_argument
    add("source", type=file_path, metavar="MODEL", help="a checkpoint, or the name of a model in timm")
    add(
        "--engine",
        "--to",
        type=lambda name: runtimes.FORMATS.get(name, name),
        choices=ENGINES,
        help="engine that the file is for; pt2 is aotinductor, onnx is onnxruntime; safetensors: weights for timm",
    )
    add("--precision", choices=runtimes.PRECISIONS, help="precision that the file computes in [fp32]")
    add("--int8", type=boolean, default=False, help="short for --precision int8")
    add("--output", type=file_path, help="file to write [exports/MODEL-PRECISION with the format's suffix]")
    add_network_flags(parser)
    add("--batch_size", type=COUNT, default=1, help="images in a call that aotinductor compiles the file for")
    add("--device", default="cpu", help="what the file is to run on: cpu, or cuda for aotinductor and tensorrt")
    add(
        "--tolerance",
        type=NONNEGATIVE,
        help="largest difference from PyTorch, relative to the largest logit [by --precision: from 1e-4 to 0.25]",
    )
    return parser


def _check(args: Arguments) -> None:
    if not args.engine:
        raise ValueError("--engine is missing: " + ", ".join(ENGINES))
    engine = None if args.engine == WEIGHTS else runtimes.find(args.engine)
    suffix = engine.suffix if engine else ".safetensors"
    if args.output and Path(args.output).suffix != suffix:
        raise ValueError(f"--output {args.output}: a file of --engine {args.engine} ends in {suffix}")
    if args.precision != "int8":
        args.excludes("int8", "precision")
    args.needs("device", args.device == "cpu" or engine, "--engine safetensors is for any device")
    for flag in ("precision", "int8", "batch_size", "tolerance", "calib_data", "int8_depthwise"):
        args.needs(flag, engine, "--engine safetensors writes the weights as they are")
    args.precision = "int8" if args.int8 else args.precision or "fp32"
    # Any precision can use real images for the comparison; int8 also calibrates on them, and so requires them.
    quantizes = args.precision == "int8"
    if quantizes and not args.calib_data:
        raise ValueError("int8 needs real images to calibrate on: add --calib_data DIR")
    args.needs("calib_count", quantizes, "it is for --int8")
    args.needs("data_set", args.calib_data, "it says what --calib_data is: add that")
    if engine:
        mend = "it is for --int8 with --engine aotinductor or openvino; ONNX has it always"
        args.needs("int8_depthwise", quantizes and engine.leaves_depthwise, mend)
        mend = "it is for --engine aotinductor; the other formats take any batch"
        args.needs("batch_size", args.batch_size == 1 or engine.fixes_batch, mend)


if __name__ == "__main__":
    ARGS = build_parser().parse_args()  # report a wrong flag before the slow imports below

import sys

from deployment.exporting import COMPARED_IMAGES, write_exported, write_safetensors
from deployment.fusing import metadata_of, open_deployed
from deployment.images import real_images, transform
from records.files import mistakes_end


def run(args: Arguments) -> None:
    network = open_deployed(args.source, **args.pick(*CHOICES), others=args.engine != WEIGHTS)
    if network.weights and network.weights.choice:
        sys.stderr.write(f"export.py: {network.weights.choice}\n")
    metadata = metadata_of(network)
    # Name the file after the checkpoint, or after the model if there is no checkpoint.
    name = Path(args.source).stem if metadata.checkpoint else metadata.model
    if args.engine == WEIGHTS:
        path = Path(args.output or Path("exports") / name / "model.safetensors")
        config = write_safetensors(network, path)
        print(f"{metadata.model}, {metadata.input_size} px: {path}, {config}")
        return

    # Read the images for calibrating int8 and for comparing the file with the network.
    quantizes = args.precision == "int8"
    count = args.calib_count if quantizes else COMPARED_IMAGES
    images = real_images(transform(metadata), count, path=args.calib_data, data_set=args.data_set)
    calibration = runtimes.Calibration(images.split(16), args.int8_depthwise) if quantizes else None

    # Write the file, compare it with the network, and keep it only if they agree.
    path = Path(args.output or Path("exports") / f"{name}-{args.precision}{runtimes.find(args.engine).suffix}")
    comparison = write_exported(
        network.module,
        path,
        runtimes.Target(args.engine, args.precision, args.device, calibration=calibration),
        metadata=metadata,
        images=images[:COMPARED_IMAGES],
        batch_size=args.batch_size,
        tolerance=args.tolerance,
    )
    print(comparison)
    print(f"{metadata.model}, {args.precision}, {metadata.input_size} px: {path}")


def main(argv: Sequence[str] | None = None, *, args: Arguments | None = None) -> None:
    args = args or build_parser().parse_args(argv)
    with mistakes_end("export.py"):
        run(args)


if __name__ == "__main__":
    main(args=ARGS)
