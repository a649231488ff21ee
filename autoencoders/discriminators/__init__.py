"""Discriminators: images to logits, high where they look real."""
