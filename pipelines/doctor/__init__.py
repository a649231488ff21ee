"""Requirements of a recipe on this machine, checked before days of training begin."""
