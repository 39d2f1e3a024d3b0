"""RetinaNet and Mask R-CNN on VanillaNet, by torchvision's detection package. The commands are in README.md here.

What follows is shared by the flags and the detectors, and importing it does not import torch.
"""

FRAMEWORKS = ("retinanet_", "mask_rcnn_")
ANCHOR_SIZES = (32, 64, 128, 256, 512)  # px, of the five levels of a pyramid
TRAIN_SIZES = tuple(range(480, 1025, 32))  # px of the short side
