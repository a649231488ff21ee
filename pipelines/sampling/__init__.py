"""The parts of sampling: a model that samples one batch, its settings, and sample folders."""
