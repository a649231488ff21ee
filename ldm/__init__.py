"""Floor 0: what both stages share — configuration, data, checkpoints, the run, metrics."""
