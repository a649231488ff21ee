"""Presets as YAML, each holding only what differs from the defaults of its config class."""
