"""Measuring samples and reconstructions: statistics of sets, references, evaluations."""
