"""The command line. Each command is a few lines that call into a room. `roundtable` and `python launch.py` do the same."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import click
from click.shell_completion import shell_complete

from roundtable.cluster.options.command import CHILD
from roundtable.cluster.options.sources import use_sources
from roundtable.cluster.process.output import open_standard_streams
from roundtable.cluster.process.parent_death import PARENT_VARIABLE, die_with_parent
from roundtable.cluster.run.exit_codes import leave, run_command
from roundtable.commands import look, results, train
from roundtable.common.runtime.versions import versions_here

#: The environment variable by which a shell asks for completions.
_COMPLETION = "_ROUNDTABLE_COMPLETE"
_GROUPS = {
    "Train": (train.local, train.coordinator, train.server, train.worker, train.scale),
    "Results": (results.checkpoint, results.experiment, results.merge),
    "Look inside": (look.inspect, look.filters, look.features, look.similar),
}


class _Program(click.Group):
    """A group that lists its commands in sections of the help text."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in _GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(command.name or "", command.get_short_help_str(80)) for command in commands])


def _show_version(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        here = versions_here()
        click.echo(f"roundtable {here.program} (torch {here.torch}, Python {platform.python_version()})")
        ctx.exit()


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "-V", "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version."
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Train PyTorch models data-parallel through parameter servers.

    Use `local` to train on this machine. For several machines, start `coordinator`, `server` and `worker` yourself.

    \b
    roundtable local                             the built-in example
    roundtable local --workers 4 train.py ARGS   your own script
    roundtable filters NAME                      draw the learned filters
    roundtable COMMAND --help                    what can be set
    """
    if ctx.obj != CHILD:
        use_sources(ctx, {command.name or "": command for command in _GROUPS["Train"]}, Path())


for _commands in _GROUPS.values():
    for _command in _commands:
        cli.add_command(_command)


def main() -> int:
    """Run the command line and return the exit code."""
    open_standard_streams()
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is not None:
        die_with_parent(int(parent))
    prog = Path(sys.argv[0]).name
    if completion := os.environ.get(_COMPLETION):
        return shell_complete(cli, {}, prog, _COMPLETION, completion)
    return run_command(cli, sys.argv[1:] or ["--help"], prog, CHILD if parent is not None else None)


if __name__ == "__main__":
    leave(main())
