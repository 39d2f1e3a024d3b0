"""What the commands that deploy a network share: fusing and comparing, exporting, predicting."""
