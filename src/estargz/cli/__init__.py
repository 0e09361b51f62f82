"""The command line. A command is a module of this package with an attribute ``command``, imported when it is run.

Results go to standard output, everything else to standard error. Exit status: that of the error's class in
estargz.errors (1; 2 for wrong usage), 1 for errors of the system, 130 when interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import click

from estargz.errors import EstargzError

__all__ = ["main", "silence", "tell"]

# command -> module, help line; the modules are slow to import, so listing the commands does not touch them
_COMMANDS = {
    "build": ("estargz.cli.build", "Build a layer from a directory, two directories or a tar."),
    "cache": ("estargz.cli.cache", "Show and prune the cache of finished layers."),
    "cat": ("estargz.cli.cat", "Write a file of a blob to standard output, verified."),
    "convert": ("estargz.cli.convert", "Copy an image with its layers in another compression."),
    "extract": ("estargz.cli.extract", "Apply layers to a directory."),
    "image": ("estargz.cli.image", "Build an image from layers, or show what one is."),
    "info": ("estargz.cli.info", "Show a blob's sizes, digests and counts."),
    "ls": ("estargz.cli.ls", "List the entries of a blob."),
    "record": ("estargz.cli.record", "Run a command and list the files that it opens."),
    "unpack": ("estargz.cli.unpack", "Write the tar inside a layer."),
    "verify": ("estargz.cli.verify", "Prove that a blob is what it claims to be."),
}


class _Commands(click.Group):
    """A group whose commands are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(_COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"no command {args[0]!r}; there are {', '.join(_COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="estargz", prog_name="estargz")
def _cli() -> None:
    """Container image layers that runtimes can pull lazily: build, inspect and verify eStargz blobs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. ``arguments`` defaults to the process's own."""
    for stream in (sys.stdout, sys.stderr):
        _escape_unencodable(stream)
    try:
        status = _cli.main(args=arguments, prog_name="estargz", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except click.UsageError as error:
        if error.ctx is not None:
            tell(error.ctx.get_usage())
        return _complain(error.format_message(), error.exit_code)
    except click.ClickException as error:
        return _complain(error.format_message(), error.exit_code)
    except BrokenPipeError:
        silence(sys.stdout)
        return 1
    except EstargzError as error:
        return _complain(str(error), error.exit_code)
    except OSError as error:
        _flush_or_drop()
        return _complain(_system_message(error), 1)
    except MemoryError as error:
        return _complain(str(error) or "out of memory", 1)


def _escape_unencodable(stream: Any) -> None:
    """Names may hold what the terminal's encoding does not."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def _complain(message: str, status: int) -> int:
    tell(f"estargz: error: {message}")
    return status


def _system_message(error: OSError) -> str:
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{os.fsdecode(error.filename)}: {error.strerror}"


def _flush_or_drop() -> None:
    """What standard output cannot take now it will not take while shutting down either."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        silence(sys.stdout)


def tell(text: str, *, end: str = "\n") -> None:
    """Writes to standard error. That nobody can read it there is no reason to give up the work that it tells of."""
    try:
        click.echo(text + end, err=True, nl=False)
    except OSError:
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """Whoever read a standard stream is gone: nothing more can be said there, not even while shutting down."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stream.fileno())
    os.close(devnull)
