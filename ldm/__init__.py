"""Floor 0, shared by both stages: configuration, data, checkpoints, runs, metrics."""
