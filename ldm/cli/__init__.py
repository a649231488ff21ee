"""The roof: Typer parses, each command calls one pipeline and prints what a person wants to know.

Commands import their pipeline inside, so that `ldm --help` answers at once.
"""

import os
import sys
import warnings

import typer

from ldm.cli import data, demo, evaluate, presets, sample, train
from ldm.errors import LdmError

app = typer.Typer(
    name="ldm",
    help="Two-stage latent diffusion: train LiteVAE, train an EDM model on its latents, sample, "
    "measure. Start with [bold]ldm demo[/bold].",
    epilog="Any setting of a preset is given as key=value; `ldm show PRESET` lists them all. "
    "--debug, anywhere, shows a traceback where there would be one line.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.add_typer(data.app, name="data", help="Prepare a data set for training.")
app.command("train-ae")(train.train_ae)
app.command("train-diffusion")(train.train_diffusion)
app.command("sample")(sample.sample)
app.command("fid")(evaluate.fid)
app.command("eval-ae")(evaluate.eval_ae)
app.command("presets")(presets.presets)
app.command("show")(presets.show)


def main() -> None:
    """Run the command line; every failure is one line, a traceback only with `--debug`."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    if not debug:
        # libraries' notes to developers: nothing a person at this prompt could act on
        warnings.filterwarnings("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
    try:
        app()
    except LdmError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        if debug:
            raise
        if type(error).__name__ == "Interrupted":  # a run that has saved itself
            _fail(f"{error}; the same command goes on from there", 130)
        text = str(error).strip().partition("\n")[0]
        _fail(f"{type(error).__name__}: {text} (unexpected: --debug shows where)", 1)


def _fail(text: str, code: int) -> None:
    typer.secho("error: " if code != 130 else "", fg="red", bold=True, nl=False, err=True)
    typer.echo(text, err=True)
    sys.exit(code)
