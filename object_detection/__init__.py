"""RetinaNet and Mask R-CNN on VanillaNet, with torchvision's detection package. See README.md for the commands.

The flags and the detectors share the constants below. Importing them does not import torch.
"""

FRAMEWORKS = ("retinanet_", "mask_rcnn_")
ANCHOR_SIZES = (32, 64, 128, 256, 512)  # px, for the five levels of a pyramid
TRAIN_SIZES = tuple(range(480, 1025, 32))  # px, length of the short side
