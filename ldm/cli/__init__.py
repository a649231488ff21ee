"""The roof: Typer parses, each command calls one pipeline and prints what a person wants to know.

Commands import their pipeline inside, so that `ldm --help` answers at once.
"""

import os
import sys
import warnings
from typing import Annotated

import typer

from ldm.cli import analyze, data, doctor, exchange, report, reproduce, sample, train
from ldm.cli import exchange as ema
from ldm.cli import measure as bench
from ldm.cli import measure as evaluate
from ldm.cli import measure as fid
from ldm.cli import measure as neighbours
from ldm.cli import report as demo
from ldm.cli import train as presets
from ldm.errors import Interrupted, LdmError

INTERRUPTED = 130

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


def _tell_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"ldm {version('ldm')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_tell_version),
    ] = False,
) -> None:
    pass


app.command("demo")(demo.demo)
app.add_typer(data.app, name="data", help="Prepare a data set for training.")
app.command("train-ae")(train.train_ae)
app.command("train-diffusion")(train.train_diffusion)
app.command("ema")(ema.ema)
app.command("sample")(sample.sample)
app.command("neighbours")(neighbours.neighbours)
app.command("fid")(fid.fid)
app.command("eval-ae")(evaluate.eval_ae)
app.add_typer(analyze.app, name="analyze", help="Look into autoencoders, as the paper does.")
app.command("bench")(bench.bench)
app.command("report")(report.report)
app.command("reproduce")(reproduce.reproduce)
app.command("import")(exchange.import_model)
app.command("export")(exchange.export_model)
app.command("doctor")(doctor.doctor)
app.command("presets")(presets.presets)
app.command("show")(presets.show)


# What Typer raises for words it cannot parse: click's class, or Typer's copy of it.
USAGE_ERROR = typer.BadParameter.__mro__[1]


def main() -> None:
    """Run the command line; every failure is one line, a traceback only with `--debug`."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    if not debug:
        # libraries' notes to developers: nothing a person at this prompt could act on
        warnings.filterwarnings("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # σ and ² on a terminal that knows neither
            stream.reconfigure(errors="replace")
    try:
        code = app(standalone_mode=False, prog_name="ldm")
    except USAGE_ERROR as error:
        _misused(error)
    except Interrupted as error:
        _leave(f"{error}; the same command goes on from there", INTERRUPTED)
    except LdmError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except Exception as error:
        if debug:
            raise
        text = str(error).strip().partition("\n")[0]
        _fail(f"{type(error).__name__}: {text} (unexpected: --debug shows where)", 1)
    if code == INTERRUPTED:
        _leave("interrupted", code)
    _part()
    sys.exit(code or 0)


def _part() -> None:
    """Take leave of the processes launched together: the group's threads, left running, would
    abort this one on its way out."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _misused(error: Exception) -> None:
    """Words that are no command, or not of its form."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(2)
    where = error.ctx.command_path if error.ctx else "ldm"
    text = error.format_message().rstrip(".").replace("Value error, ", "")
    if text.startswith("No such option"):
        text += "; settings are given as key=value"
    _fail(f"{text}; see `{where} --help`", 2)


def _fail(text: str, code: int) -> None:
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    _leave(text, code)


def _leave(text: str, code: int) -> None:
    typer.echo(text, err=True)
    sys.exit(code)
