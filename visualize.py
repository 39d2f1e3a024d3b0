"""Draw pictures of networks, runs and results.

python visualize.py cam IMAGE_OR_FOLDER --network CHECKPOINT --network resnet50 --output FILE.png
python visualize.py curves RUN_DIR RUN_DIR --output FILE.png
python visualize.py figures --output_dir docs
python visualize.py detections IMAGE_OR_FOLDER --network CHECKPOINT --output FILE.png
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from options import COUNT, FRACTION, WHOLE, Arguments, Parser, drawing, file_path, path, photograph


def _add_output(parser: Parser, kind: Callable[[str], Path] = drawing) -> None:
    parser.add_argument("--output", type=kind, required=True, help="picture to write")


def _add_images(parser: Parser, kind: Callable[[str], Path] = drawing, *, shown: str) -> None:
    """Add the flags for a command's images, and for the picture to write."""
    what = "image files, folders of them, or idx files"
    parser.add_argument("images", nargs="+", type=file_path, metavar="IMAGES", help=what)
    _add_output(parser, kind)
    parser.add_argument("--max_images", type=COUNT, default=8, help=f"largest number of {shown}")


def _named_file(text: str) -> str:
    """Expand `~` in MODEL=FILE, FILE or MODEL."""
    name, equals, file = text.rpartition("=")
    return f"{name}{equals}{file_path(file)}"


def build_parser() -> Parser:
    parser = Parser(prog="visualize.py", description="Draw pictures of networks, runs and results.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    cam = commands.add_parser("cam", help="class-activation maps: where a network looks")
    _add_images(cam, shown="images, each a row of the picture")
    what = "a column; repeat it to compare. MODEL alone takes timm's pretrained weights"
    form = {"type": _named_file, "metavar": "[MODEL=]CHECKPOINT"}
    cam.add_argument("--network", action="append", required=True, help=what, **form)
    what = "number of the class to explain [that which is predicted]"
    cam.add_argument("--target", type=WHOLE, metavar="CLASS", help=what)
    what = "feature map to look at, as an index of timm's feature_info [the last]"
    cam.add_argument("--level", type=int, metavar="N", help=what)
    what = "key of the weights in the checkpoints [model_ema, or else model]"
    cam.add_argument("--model_key", metavar="KEY", help=what)

    curves = commands.add_parser("curves", help="training curves of several runs over each other")
    curves.add_argument("runs", nargs="+", type=path, metavar="RUN_DIR", help="output folders of main.py")
    _add_output(curves)

    figures = commands.add_parser("figures", help="the paper's depth and latency against accuracy")
    what = "folder for depth_accuracy.png and latency_accuracy.png"
    figures.add_argument("--output_dir", type=path, required=True, help=what)

    detections = commands.add_parser("detections", help="boxes and masks that a detector finds in images")
    _add_images(detections, photograph, shown="images in the picture")
    what = "checkpoint of object_detection/main.py"
    detections.add_argument("--network", type=file_path, required=True, metavar="CHECKPOINT", help=what)
    detections.add_argument("--threshold", type=FRACTION, default=0.5, help="score from which a detection is drawn")
    what = "key of the weights in the checkpoint"
    detections.add_argument("--model_key", default="model_ema|model", metavar="KEY", help=what)
    return parser


if __name__ == "__main__":
    ARGS = build_parser().parse_args()  # report a wrong flag before the slow imports below

import sys

from matplotlib.figure import Figure
from torchvision.transforms.functional import to_tensor

from object_detection.checkpoints import open_detector
from object_detection.draw import draw_images
from pictures import style
from pictures.cam import cam_figure
from pictures.figures import paper_results, results_figures
from pictures.subjects import Photo, open_network, read_images
from records import curves
from records.files import mistakes_end, one_line


def _save(figure: Figure, path: Path) -> None:
    style.save(figure, path)
    print(path)


def _images(args: Arguments) -> tuple[list[Photo], int]:
    """Return the images to draw and the number of broken ones; report these, and whether --max_images left some out."""
    photos, total, broken = read_images(args.images, args.max_images)
    for line in broken:
        sys.stderr.write(f"visualize.py: error: {one_line(line)}\n")
    if total > len(photos) + len(broken):
        print(f"the first {len(photos)} of {total} images; --max_images takes more")
    return photos, len(broken)


def draw_cam(args: Arguments) -> int:
    opened = [open_network(spec, key=args.model_key) for spec in args.network]
    photos, broken = _images(args)
    _save(cam_figure(opened, photos, target=args.target, level=args.level), args.output)
    return broken


def draw_curves(args: Arguments) -> None:
    _save(style.styled(curves.runs_figure)(args.runs), args.output)


def draw_figures(args: Arguments) -> None:
    for name, figure in results_figures(paper_results()).items():
        _save(figure, args.output_dir / name)


def draw_detected(args: Arguments) -> int:
    detector, classes = open_detector(args.network, key=args.model_key)
    photos, broken = _images(args)
    images = (to_tensor(photo.image) for photo in photos)
    draw_images(detector, images, args.output, classes=classes, threshold=args.threshold)
    print(args.output)
    return broken


def main(argv: Sequence[str] | None = None, *, args: Arguments | None = None) -> None:
    args = args or build_parser().parse_args(argv)
    draw = {"cam": draw_cam, "curves": draw_curves, "figures": draw_figures, "detections": draw_detected}
    with mistakes_end("visualize.py"):
        broken = draw[args.command](args)
    if broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main(args=ARGS)
