"""Measuring samples and reconstructions: statistics of sets, references, checks, evaluations."""
