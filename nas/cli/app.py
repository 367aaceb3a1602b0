"""The command line. Every verb imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from contextlib import suppress
from typing import Annotated

import typer

from nas.cli import (
    LONG,
    bench,
    dashboard,
    evaluate,
    export,
    models,
    predict,
    prune,
    push,
    runs,
    search,
    show,
    storage,
    train,
)
from nas.cli.options import command_line, log
from nas.errors import DiskFull, UserError, is_full

EPILOG = (
    "Examples:\n\n"
    "  vitnas search --latency-budget 2ms --device cpu\n\n"
    "  vitnas bench efficientvit_m0 shvit_s1 runs/cpu-onnxruntime-2ms-all\n\n"
    "  vitnas dashboard"
)

app = typer.Typer(
    name="vitnas",
    help="Find the vision transformer for your device, under a latency budget measured on it.",
    epilog=EPILOG,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

for verb in (search, runs, models, show, bench, prune, train, evaluate, export, predict, push, dashboard):
    app.add_typer(verb.app)
app.add_typer(storage.app, name="storage")

VERSIONS = (("vitnas",), ("torch",), ("onnxruntime", "onnxruntime-gpu"), ("optuna",))
"""Packages, each with the names of its builds."""
AGAIN_S = 0.05
"""After which an interrupt that was ignored is raised again."""


def tell_version(asked: bool) -> None:
    """Print the versions of this program and of what its figures depend on."""
    if not asked:
        return
    from importlib.metadata import PackageNotFoundError, version

    told = []
    for names in VERSIONS:
        found = f"{names[0]} not installed"
        for name in names:
            with suppress(PackageNotFoundError):
                found = f"{name} {version(name)}"
        told.append(found)
    print(", ".join([*told, f"Python {sys.version.split()[0]}"]))
    raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Show the versions and exit.", callback=tell_version, is_eager=True)
    ] = False,
) -> None:
    """Find the vision transformer for your device, under a latency budget measured on it."""


def main() -> None:
    """Run the command line; errors are one line on standard error and exit code 2, of a full disk 1."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was started is ended, files are whole
    sys.unraisablehook = interrupt_again
    try:
        code = app(standalone_mode=False)
        if code == 130:  # what typer makes of it
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except UserError as error:
        log.debug("traceback", exc_info=True)
        fail(str(error), 1 if isinstance(error, DiskFull) else 2)
    except KeyboardInterrupt:
        goes_on = any(verb in LONG for verb in sys.argv[1:2])
        print("interrupted" + f"; to go on: {command_line()}" * goes_on, file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        log.debug("traceback", exc_info=True)
        fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 1 if is_full(error) else 2)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            sys.exit(2)
        fail(error.format_message())


def interrupt_again(lost: sys.UnraisableHookArgs) -> None:
    """Interrupt once more where Python has ignored an interrupt, as it does within the callback of a weak reference."""
    if lost.exc_type is KeyboardInterrupt:
        threading.Timer(AGAIN_S, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(lost)


def fail(message: str, code: int = 2) -> None:
    """Print one line and exit with a code."""
    print("vitnas: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
