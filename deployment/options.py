"""Flags for the network to deploy and for the preparation of its images. Does not import torch."""

from options import COUNT, SHARE, Parser, boolean, file_path

# The flags of `add_network_flags`. They choose or prepare a network, as arguments of `deployment.fusing.open_deployed`;
# an exported file has these choices built in.
CHOICES = ("model", "model_key", "input_size", "crop_pct", "random_weights")
CALIBRATION_FLAGS = ("calib_data", "calib_count", "data_set", "int8_depthwise")
NETWORK_FLAGS = (*CHOICES, *CALIBRATION_FLAGS)
SUFFIXES = (".csv", ".json")  # of files of predictions


def add_network_flags(parser: Parser) -> None:
    """Add the flags that the commands for deployment share."""
    add = parser.add_argument
    add("--model", metavar="NAME", help="model's name in timm, for a checkpoint that does not record it")
    add("--model_key", metavar="KEY", help="key of the weights in the checkpoint [model_ema, or else model]")
    add("--input_size", type=COUNT, help="height and width of the images in pixels [the checkpoint's]")
    add("--crop_pct", type=SHARE, help="share of the resized side that is cropped [the checkpoint's]")
    add("--random_weights", type=boolean, default=False, help="take a model's name without its pretrained weights")
    add("--calib_data", type=file_path, metavar="DIR", help="images to calibrate int8 on, and to compare on")
    add("--calib_count", type=COUNT, default=300, help="number of images to calibrate on")
    add("--data_set", default="image_folder", metavar="NAME", help="what --calib_data is, as for main.py")
    add(
        "--int8_depthwise",
        type=boolean,
        help="quantize the series activations as well, which aotinductor and openvino can leave out [only with AMX]",
    )
