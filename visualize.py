"""Pictures of networks, runs and results.

python visualize.py cam IMAGE_OR_FOLDER --network CHECKPOINT --network resnet50 --output FILE.png
python visualize.py curves RUN_DIR RUN_DIR --output FILE.png
python visualize.py figures --output_dir docs
python visualize.py detections IMAGE_OR_FOLDER --network CHECKPOINT --output FILE.png
"""

from collections.abc import Sequence
from pathlib import Path

from options import COUNT, FRACTION, WHOLE, Arguments, Parser, file_path, path

PAPER_RESULTS = Path(__file__).parent / "docs" / "paper_results.csv"


def _add_images(parser: Parser, *, shown: str) -> None:
    """What images a command is about, and where the picture goes."""
    parser.add_argument(
        "images", nargs="+", type=file_path, metavar="IMAGES", help="image files, folders of them, or idx files"
    )
    parser.add_argument("--output", type=path, required=True, metavar="FILE.png", help="picture to write")
    parser.add_argument("--max_images", type=COUNT, default=8, help=f"largest number of {shown}")


def _named_file(text: str) -> str:
    """MODEL=FILE, FILE or MODEL, with `~` expanded."""
    name, equals, file = text.rpartition("=")
    return f"{name}{equals}{file_path(file)}"


def build_parser() -> Parser:
    parser = Parser(prog="visualize.py", description="Draw pictures of networks, runs and results.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    cam = commands.add_parser("cam", help="class-activation maps: where a network looks")
    _add_images(cam, shown="images, each a row of the picture")
    cam.add_argument(
        "--network",
        type=_named_file,
        action="append",
        required=True,
        metavar="[MODEL=]CHECKPOINT",
        help="a column; repeat it to compare. MODEL alone takes timm's pretrained weights",
    )
    cam.add_argument(
        "--target", type=WHOLE, metavar="CLASS", help="number of the class to explain [that which is predicted]"
    )
    cam.add_argument(
        "--level", type=int, metavar="N", help="feature map to look at, as an index of timm's feature_info [the last]"
    )
    cam.add_argument(
        "--model_key", metavar="KEY", help="key of the weights in the checkpoints [model_ema, or else model]"
    )

    curves = commands.add_parser("curves", help="training curves of several runs over each other")
    curves.add_argument("runs", nargs="+", type=path, metavar="RUN_DIR", help="output folders of main.py")
    curves.add_argument("--output", type=path, required=True, metavar="FILE.png", help="picture to write")

    figures = commands.add_parser("figures", help="the paper's depth and latency against accuracy")
    figures.add_argument(
        "--output_dir", type=path, required=True, help="folder for depth_accuracy.png and latency_accuracy.png"
    )
    figures.add_argument(
        "--paper", type=path, default=PAPER_RESULTS, help="table of the paper's results [docs/paper_results.csv]"
    )
    figures.add_argument("--measured", type=path, help="table of our own results, drawn beside the paper's")

    detections = commands.add_parser("detections", help="boxes and masks that a detector finds in images")
    _add_images(detections, shown="images in the picture")
    detections.add_argument(
        "--network", type=file_path, required=True, metavar="CHECKPOINT", help="checkpoint of object_detection/main.py"
    )
    detections.add_argument("--threshold", type=FRACTION, default=0.5, help="score from which a detection is drawn")
    detections.add_argument(
        "--model_key", default="model_ema|model", metavar="KEY", help="key of the weights in the checkpoint"
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> Arguments:
    """Parse a command. Errors end the process with exit code 2 and one line on standard error."""
    return build_parser().parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # a mistake is answered before the imports below, which take seconds

import argparse
import sys

import torch
from matplotlib.figure import Figure
from torchvision.transforms.functional import to_tensor

import networks
from loading.transforms import build_eval_transform
from object_detection.checkpoints import open_detector
from object_detection.draw import draw_images
from pictures import style
from pictures.cam import View, activation_maps, cam_figure
from pictures.figures import read_results, results_figures
from pictures.subjects import Photo, label, open_network, pixels, read_images, short_name, true_class
from records import curves, logs
from records.files import mistakes_end, one_line


def _save(figure: Figure, path: Path) -> None:
    style.save(figure, path)
    print(path)


def _images(args: argparse.Namespace) -> tuple[list[Photo], int]:
    """The images to draw, and how many cannot be read, each of which is named; says so if --max_images takes a part."""
    photos, total, broken = read_images(args.images, args.max_images)
    for line in broken:
        sys.stderr.write(f"visualize.py: error: {one_line(line)}\n")
    if total > len(photos) + len(broken):
        print(f"the first {len(photos)} of {total} images; --max_images takes more")
    return photos, len(broken)


# -- class-activation maps


def _views(network: networks.Network, photos: Sequence[Photo], target: int | None, level: int | None) -> list[View]:
    """What a network makes of each image; the title has its answer, or with `target` that class's probability too."""
    prepare = build_eval_transform(network.preprocessing)
    inputs = torch.stack([prepare(photo.image) for photo in photos])
    maps, logits = activation_maps(network.module, inputs, target=target, level=level)
    chances_of_all = network.probabilities(torch.from_numpy(logits))
    views = []
    for photo, view, heat, chances in zip(photos, pixels(network, inputs).numpy(), maps, chances_of_all, strict=True):
        answer, truth = int(chances.argmax()), true_class(network, photo.folder)
        title = f"{short_name(network, answer)} {chances[answer]:.2f}"
        if target is not None:
            title = f"map of {short_name(network, target)} {chances[target]:.2f}\nanswer {title}"
        views.append(View(view, heat, title, None if truth is None else truth == answer))
    return views


def draw_cam(args: argparse.Namespace) -> int:
    opened = [open_network(spec, key=args.model_key) for spec in args.network]
    photos, broken = _images(args)
    columns: dict[str, list[View]] = {}
    for number, network in enumerate(opened, 1):
        column = label(network) if label(network) not in columns else f"{label(network)} ({number})"
        try:
            columns[column] = _views(network, photos, args.target, args.level)
        except ValueError as error:
            raise ValueError(f"{' '.join(column.split())}: {error}") from error
    # The first network's name for the true class stands for all.
    first = opened[0]
    truths = [true_class(first, photo.folder) for photo in photos]
    names = [
        photo.name if truth is None else f"{photo.name}\ntrue: {short_name(first, truth)}"
        for photo, truth in zip(photos, truths, strict=True)
    ]
    what = "its answer" if args.target is None else f"the class {short_name(first, args.target)}"
    _save(cam_figure(columns, names, title=f"Where a network sees evidence for {what}"), args.output)
    return broken


# -- curves of runs


def _run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or their paths if two have the same name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _read_run(folder: Path) -> list[dict[str, str]]:
    path = folder / "summary.csv"
    try:
        rows = logs.read_rows(path)
        points = [point for _, columns in curves.CURVES for column in columns for point in curves.curve(rows, column)]
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; name the folder of a run of main.py") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of epochs: {error}") from error
    if not points:
        raise ValueError(f"{path} has no finished epoch")
    return rows


def draw_curves(args: argparse.Namespace) -> None:
    if len(set(args.runs)) < len(args.runs):
        raise ValueError("the same run is named twice")
    runs = {name: _read_run(folder) for name, folder in zip(_run_names(args.runs), args.runs, strict=True)}
    classifies = any("act_learn" in rows[0] for rows in runs.values())
    panels = curves.CURVES if classifies else curves.DETECTION_CURVES
    _save(style.styled(curves.curves_figure)(runs, panels), args.output)


# -- the paper's figures


def draw_figures(args: argparse.Namespace) -> None:
    tables = {"the paper": read_results(args.paper)}
    if args.measured is not None:
        tables["measured here"] = read_results(args.measured)
    for name, figure in results_figures(tables).items():
        _save(figure, args.output_dir / name)


# -- detections


def draw_detected(args: argparse.Namespace) -> int:
    detector, classes = open_detector(args.network, key=args.model_key)
    photos, broken = _images(args)
    draw_images(
        detector, (to_tensor(photo.image) for photo in photos), args.output, classes=classes, threshold=args.threshold
    )
    print(args.output)
    return broken


def main(argv: Sequence[str] | None = None, *, args: Arguments | None = None) -> None:
    args = args or parse_args(argv)
    draw = {"cam": draw_cam, "curves": draw_curves, "figures": draw_figures, "detections": draw_detected}
    with mistakes_end("visualize.py"):
        broken = draw[args.command](args)
    if broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main(args=ARGS)
