"""Lines for the person at the prompt, once however many processes were launched."""

import os

import typer


def say(*lines: str) -> None:
    """Print lines on the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            typer.echo(line)
