"""The command line: one subcommand per verb. Parse, call, print.

Results go to stdout, everything else to stderr. A mistake is one line and exit code 2.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
import typer.main

from bevel import __version__
from bevel.cli import doctor, exported, files, listing, package, runs, search, surgery
from bevel.cli.console import interrupted, say_error
from bevel.core.errors import BevelError, one_line

app = typer.Typer(
    name="bevel",
    help="Cuts a trained PyTorch network down for an embedded device, and proves that it works.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
runs.register(app)
search.register(app)
surgery.register(app)
files.register(app)
exported.register(app)
doctor.register(app)
package.register(app)
listing.register(app)

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

# Usage errors share this base; Typer exports only its subclass.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bevel {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _bevel(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001  (handled by its callback)
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
    debug: Annotated[  # noqa: ARG001  (taken out of the arguments by main; here for --help)
        bool, typer.Option("--debug", help="Show the traceback of an error. Anywhere on the line.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done; 1: bevel could not; 2: something the user can mend; 130: interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    command = typer.main.get_command(app)
    try:
        code = command.main(args=given, prog_name="bevel", standalone_mode=False)
    except BevelError as error:
        return _fail(str(error), error.exit_code, debug=debug)
    except _USAGE_ERROR as error:
        message = one_line(error.format_message())  # type: ignore[attr-defined]
        message += "" if message.endswith((".", "?", "!")) else "."
        return _fail(f"{message} See: bevel {_verb(given)}--help", 2, debug=debug)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; nothing is left to say, and nothing to flush it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(_system(error), 2, debug=debug)
    if code == INTERRUPTED:
        interrupted(given)
    return int(code or 0)


def _fail(message: str, code: int, *, debug: bool) -> int:
    """Say what went wrong in one line, after the traceback where it is wanted."""
    if debug:
        traceback.print_exc()
    say_error(message)
    return code


def _verb(given: Sequence[str]) -> str:
    """The subcommand that was meant, for a pointer to its help."""
    known = getattr(typer.main.get_command(app), "commands", ())
    return f"{given[0]} " if given and given[0] in known else ""


def _system(error: OSError) -> str:
    """An operating system's refusal, with the file it is about."""
    reason = (error.strerror or str(error)).lower()
    if error.filename is None:
        return f"the system refused: {reason}"
    return f"cannot read or write {error.filename}: {reason}; check the path and its permissions"
