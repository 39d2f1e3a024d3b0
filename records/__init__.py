"""What a run writes and reads again: checkpoints, logs, curves."""
