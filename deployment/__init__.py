"""The parts that the commands for deployment share: fusing and comparing, exporting, predicting."""
