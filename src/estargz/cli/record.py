"""estargz record: the files that a command opens, for a prefetch list."""

from __future__ import annotations

import click

from estargz.cli.build import terminated_cleanly
from estargz.errors import UsageError
from estargz.recording import json_lines, plain_lines, record
from estargz.writing.sink import open_sink


@click.command("record", context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND [ARGUMENT]...")
@click.option("-o", "--output", required=True, metavar="FILE", help="File to write; the streams are the command's.")
@click.option("--root", default="/", metavar="DIR", help="List only what lies in DIR, relative to it.  [/]")
@click.option("--plain", is_flag=True, help="One path a line, with glob characters escaped, instead of JSON.")
@click.option("--until-exit", is_flag=True, help="Stop when COMMAND ends, whatever it leaves running.")
def command(command: tuple[str, ...], output: str, root: str, plain: bool, until_exit: bool) -> int:
    """Run COMMAND and list the regular files that it and its children open or execute, in order of first opening.

    Writes {"path": ...}, one a line, as ctr-remote does. Symbolic links are resolved. Signals are passed on to COMMAND, and
    the exit status is its own; 127 or 126 when it cannot be found or executed. Needs no privileges; without them, setuid
    programs gain none.
    """
    if output == "-":
        raise UsageError("standard output belongs to the command; name a file with -o")
    with terminated_cleanly(), open_sink(output) as sink:
        recorded = record(command, root=root, until_exit=until_exit, adopt_orphans=True)
        for line in (plain_lines if plain else json_lines)(recorded.paths):
            sink.write(line)
    if recorded.unread:
        click.echo(
            f"estargz: warning: {recorded.unread} opens could not be followed; their files are missing", err=True
        )
    return recorded.status
