"""RetinaNet and Mask R-CNN on VanillaNet, by torchvision's detection package. The commands are in README.md here."""
