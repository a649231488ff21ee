"""The command line: Typer parses, each command calls one pipeline and prints its result.

Commands import their pipeline inside the function, so that `ldm --help` answers at once.
"""

import os
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer
from typer import Option

from ldm.cli import data, doctor, exchange, measure, options, results, train
from ldm.console import LastingOutput, exit_status, outlast_console
from ldm.errors import Interrupted, LdmError, brief, escape
from ldm.files import BackgroundWriter

INTERRUPTED = 130  # Typer's, for a KeyboardInterrupt

app = typer.Typer(
    name="ldm",
    help="Two-stage latent diffusion: train LiteVAE or an SD-VAE, a diffusion model on its "
    "latents, sample, and measure. Start with [bold]ldm demo[/bold].",
    epilog="Settings of a preset are given as key=value; `ldm show PRESET` lists them. Add --debug "
    "to any command for a traceback in place of a one-line error.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        options.echo(f"ldm {version('ldm')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


app.command("demo")(results.demo)
app.add_typer(data.app, name="data")
app.command("train-ae")(train.train_ae)
app.command("train-diffusion")(train.train_diffusion)
app.command("ema")(train.ema)
app.command("sample")(train.sample)
app.command("neighbours")(measure.neighbours)
app.command("fid")(measure.fid)
app.command("eval-ae")(measure.eval_ae)
app.add_typer(results.analyze, name="analyze")
app.command("bench")(measure.bench)
app.command("report")(results.report)
app.command("reproduce")(results.reproduce)
app.command("import")(exchange.import_model)
app.command("export")(exchange.export_model)
app.command("doctor")(doctor.doctor)
app.command("presets")(train.presets)
app.command("show")(train.show)


# Typer raises this for arguments that it cannot parse: click's class, or Typer's own copy of it.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]


def main() -> NoReturn:
    """Run the command line; an error is one line, or a traceback with `--debug`."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    if not debug:
        # warnings of libraries are for developers: a user cannot act on them
        warnings.filterwarnings("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    outlast_console()
    try:
        color = False if os.environ.get("NO_COLOR") else None  # https://no-color.org
        code = app(standalone_mode=False, prog_name="ldm", color=color)
    except USAGE_ERROR as error:
        _exit_with_usage(error)
    except Interrupted as error:
        _exit(f"{error}; run the same command to resume", exit_status())
    except Exception as error:
        if debug:
            raise
        if isinstance(error, LdmError):
            _exit_with_error(str(error), error.exit_code)
        text = f"{type(error).__name__}: {brief(error)} (unexpected: --debug shows where)"
        _exit_with_error(text, 1)
    if code == INTERRUPTED:
        # a reader that has seen enough, as in `ldm presets | head -1`, needs no word
        _exit("" if LastingOutput.lost else "interrupted", exit_status())
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # its threads would abort the process at exit
    sys.exit(code or 0)


def _exit_with_usage(error: Any) -> NoReturn:
    """Report a usage error: an unknown command or malformed arguments."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(2)
    command = error.ctx.command_path if error.ctx else "ldm"
    text = error.format_message().rstrip(".?").replace("Value error, ", "")
    takes_settings = error.ctx and any(
        "key=value" in (p.metavar or "") for p in error.ctx.command.params
    )
    if text.startswith("No such option") and takes_settings:
        text += "; settings are given as key=value"
    _exit_with_error(f"{text}; see `{command} --help`", 2)


def _exit_with_error(text: str, code: int) -> NoReturn:
    options.echo("error: ", fg="red", bold=True, nl=False, err=True)
    _exit(text, code)


def _exit(text: str, code: int) -> NoReturn:
    if text:
        options.echo(escape(text), err=True)
    if BackgroundWriter.any_at_work():  # after a third Ctrl-C; at Python's own exit it would crash
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(code)
    sys.exit(code)
