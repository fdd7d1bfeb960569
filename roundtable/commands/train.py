"""Commands that train. `local` starts all processes of a run on this machine. Each of the others runs one process."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import click

from roundtable.cluster.options.command import (
    Command,
    Option,
    Words,
    check_address,
    check_advertised,
    run_options,
    settings_options,
    whole_address,
)
from roundtable.cluster.options.flags import FOUND, Choice, choose, given, refuse_example_flags
from roundtable.cluster.run.progress import Mode
from roundtable.commands.shared import complete_runs, log_to_stderr, program
from roundtable.common.config.launching import as_module
from roundtable.common.config.settings import START_S
from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage.private_files import keep_private
from roundtable.common.storage.run_files import RUNS, How

_COORDINATOR = click.option(
    "--coordinator",
    cls=Option,
    callback=whole_address,
    metavar="HOST[:PORT]",
    required=True,
    envvar=["ROUNDTABLE_COORDINATOR", "PS_COORDINATOR"],
    help="Coordinator address, also tcp://HOST:PORT. The default port is 5555. [env: ROUNDTABLE_COORDINATOR]",
)
_INDEX = click.option(
    "--index",
    cls=Option,
    type=click.IntRange(min=0),
    metavar="N",
    help="Fixed index of this process (default: the next free one).",
)
_START = click.option(
    "--start-timeout", "start_s", cls=Option, type=click.FloatRange(0, min_open=True), default=START_S, show_default=True,
    metavar="X", envvar=["ROUNDTABLE_START_TIMEOUT", "PS_START_TIMEOUT"],
    help="Seconds to wait for the coordinator, which may start later. [env: ROUNDTABLE_START_TIMEOUT]",
)  # fmt: skip
_MISMATCH = click.option(
    "--allow-version-mismatch", cls=Option, is_flag=True,
    help="Resume from a checkpoint made by another roundtable or torch version. Results may differ in the last bits.",
)  # fmt: skip
_RESUME = click.option(
    "--resume", cls=Option, metavar="RUN|auto", shell_complete=complete_runs,
    help="Resume RUN (a folder, or a name under runs/) from its newest checkpoint. You may change --workers, --servers, --rounds "
    "and --epochs. auto: resume what is in the run directory, or start a run if there is none.",
)  # fmt: skip
_RESTARTS = click.option(
    "--max-restarts", cls=Option, type=click.IntRange(0), default=3, metavar="N", show_default=True,
    help="Restarts allowed per killed worker or server; 0 disables. The coordinator gets at least 5.",
)  # fmt: skip
_DELAY = click.option(
    "--restart-delay", cls=Option, type=click.FloatRange(0), default=0.5, metavar="X", show_default=True,
    help="Seconds before the first restart, doubled each time, at most 30.",
)  # fmt: skip


_QUIET = click.option("--quiet", "-q", cls=Option, is_flag=True, help="Show warnings, errors and the results only.")
_QUIET_LOG = click.option("--quiet", "-q", cls=Option, is_flag=True, help="Log warnings and errors only.")
_TEE = click.option("--tee", cls=Option, is_flag=True, also=["-v"], old=["--verbose"],
                    help="Show what the scripts of all workers print, not that of worker-0 alone.")  # fmt: skip
_MODULE = click.option("--module", "-m", cls=Option, is_flag=True,
                       help="SCRIPT is a module's name, such as package.train: run it as `python -m` does.")  # fmt: skip


@click.command(cls=Command)
@click.argument("script", required=False)
@_MODULE
@settings_options
@click.option("--port", cls=Option, type=click.IntRange(0, 65535), default=0, metavar="N", show_default=True,
              help="Coordinator port (0 = any free port).")  # fmt: skip
@_RESTARTS
@_DELAY
@click.option("--server-device", cls=Option, metavar="NAME,...", default="cpu", show_default=True,
              help="Device for sharded layers on servers, e.g. cuda:0. With a list, servers take turns.")  # fmt: skip
@run_options
@_RESUME
@_MISMATCH
@click.option("--progress", cls=Option, type=Words(get_args(Mode)), default="auto", show_default=True,
              help="How progress is shown: live, in plain lines, or not at all. auto is live on a terminal.")  # fmt: skip
@_QUIET
@_TEE
@click.pass_context
def local(
    ctx: click.Context,
    /,
    config: str | None,
    script: str | None,
    module: bool,
    resume: str | None,
    allow_version_mismatch: bool,
    progress: Mode,
    quiet: bool,
    tee: bool,
    **_: Any,
) -> None:
    """Train on this machine.

    Runs SCRIPT ARGS with one coordinator, --servers and --workers. Without SCRIPT, trains the built-in example.
    Options stand before SCRIPT. `-m package.module ARGS` runs a module.
    """
    from rich.console import Console

    from roundtable.cluster.launch.checks import check_order
    from roundtable.cluster.launch.local import LaunchSpec, run_local
    from roundtable.cluster.run.console import Screen
    from roundtable.cluster.run.run_directory import LOGS, claim, passed_over
    from roundtable.cluster.run.script_output import ScriptOutput
    from roundtable.common.storage.event_log import FILE_NAME

    keep_private()
    choice, take_up = _going_on(ctx, resume, config, _named(script, module), False, allow_version_mismatch, click.echo)
    refuse_example_flags(ctx, choice.script)
    check_order(choice.settings, choice.script, choice.port)
    with claim(choice.run_dir, choice.default_name, choice.overwrite, take_up) as (folder, how):
        if choice.run_dir is None and (before := passed_over(folder, choice.default_name)) is not None:
            click.echo(f"{before} holds an unfinished run; --resume {before} resumes it. This is a new run.")
        if how != "nothing":
            order = LaunchSpec(
                choice.settings, folder, choice.script, choice.args, choice.port, choice.restart_policy, how,
                accept_versions=allow_version_mismatch, devices=choice.server_device.split(","),
            )  # fmt: skip
            output = ScriptOutput(folder / LOGS, everybody=tee)
            screen = Screen(Console(), folder / FILE_NAME, mode=progress, quiet=quiet, output=output)
            run_local(order, program(), os.environ, screen)


@click.command(cls=Command)
@click.option("--listen", cls=Option, callback=check_address, metavar="ADDRESS", default="tcp://*:5555", show_default=True,
              help="Address to listen on.")  # fmt: skip
@settings_options
@run_options
@_RESUME
@click.option("--recover", is_flag=True, hidden=True, help="The same as --resume auto.")
@click.option("--prepared", type=click.Choice(get_args(How)), hidden=True,
              help="What to do in the run directory, which the launcher has claimed.")  # fmt: skip
@_MISMATCH
@_QUIET_LOG
@click.pass_context
def coordinator(
    ctx: click.Context,
    /,
    listen: str,
    config: str | None,
    resume: str | None,
    recover: bool,
    prepared: How | None,
    allow_version_mismatch: bool,
    quiet: bool,
    **_: Any,
) -> None:
    """Run the coordinator of one training run.

    Waits for --servers servers and --workers workers, and writes the run directory.
    """
    from roundtable.cluster.options.resume import AUTO, stop_message
    from roundtable.cluster.process.signals import stopped
    from roundtable.cluster.run.run_directory import claim, write_settings
    from roundtable.common.runtime.errors import Stopped
    from roundtable.common.storage.run_files import SETTINGS_FILE
    from roundtable.ps.coordinator.main import serve

    log_to_stderr(quiet)
    keep_private()
    if prepared is not None:
        choice = choose(given(ctx), config)
        folder = choice.run_dir or RUNS / choice.default_name
        serve(choice.settings, listen, folder, prepared, allow_version_mismatch, [signal.SIGINT, signal.SIGTERM])
        return
    resume = AUTO if recover else resume
    say = logging.getLogger("roundtable.ps").info
    choice, take_up = _going_on(ctx, resume, config, None, True, allow_version_mismatch, say)
    with claim(choice.run_dir, choice.default_name, choice.overwrite, take_up) as (folder, how):
        if how != "nothing":
            write_settings(folder / SETTINGS_FILE, choice.settings)
        signal.signal(signal.SIGTERM, stopped)
        signal.signal(signal.SIGINT, stopped)
        try:
            serve(choice.settings, listen, folder, how, allow_version_mismatch, [signal.SIGINT, signal.SIGTERM])
        except Stopped as error:
            raise Stopped(error.number, stop_message(error.number, folder, ["coordinator", "--listen", listen])) from None


@click.command(cls=Command)
@_COORDINATOR
@click.option("--listen", cls=Option, callback=check_address, metavar="ADDRESS", default="tcp://*:0", show_default=True,
              help="Address to listen on (port 0 = any free port).")  # fmt: skip
@_INDEX
@click.option("--server-device", cls=Option, old=["--device"], metavar="NAME", default="cpu", show_default=True,
              help="Device for sharded layers (ShardedLinear, ColumnParallelLinear), e.g. cuda:0. Everything else stays in CPU "
              "memory.")  # fmt: skip
@_START
@_QUIET_LOG
@click.option("--advertise", cls=Option, callback=check_advertised, metavar="ADDRESS",
              help="Address for others to connect to: HOST, HOST:PORT or tcp://HOST:PORT, e.g. of a router that forwards here "
              "(default: where it listens, as the coordinator sees it).")  # fmt: skip
@click.option("--trust-optimizers", cls=Option, multiple=True, metavar="MODULE",
              help="Import optimizer classes of this module, and run them. May be repeated. * is any module, and a folder is "
              "one to look for modules in.")  # fmt: skip
def server(
    coordinator: str,
    listen: str,
    index: int | None,
    server_device: str,
    start_s: float,
    quiet: bool,
    advertise: str | None,
    trust_optimizers: tuple[str, ...],
) -> None:
    """Run one parameter server.

    Holds a part of the parameters and updates them, until the run ends.
    """
    from roundtable.common.runtime.devices import find_device
    from roundtable.ps.server.server import serve

    log_to_stderr(quiet)
    keep_private()
    folders = [name for name in trust_optimizers if os.sep in name]
    sys.path[1:1] = folders
    trusts = set(trust_optimizers) - set(folders)
    serve(coordinator, listen, index, find_device(server_device, "--server-device"), start_s, advertise, trusts)


@click.command(cls=Command)
@click.argument("script", required=False)
@_MODULE
@_COORDINATOR
@_INDEX
@click.option("--colocate", cls=Option, is_flag=True,
              help="Also start a server next to this worker. If every worker does, set the coordinator's --servers to its "
              "--workers; traffic per host then equals ring all-reduce.")  # fmt: skip
@click.option("--server-device", cls=Option, metavar="NAME", default="cpu", show_default=True,
              help="With --colocate: device for the server's sharded layers, e.g. cuda:0.")  # fmt: skip
@_RESTARTS
@_DELAY
@_START
@_QUIET_LOG
@click.option("--advertise", cls=Option, callback=check_advertised, metavar="ADDRESS",
              help="With --colocate: address for others to connect to its server, HOST, HOST:PORT or tcp://HOST:PORT. The server "
              "listens at PORT, too.")  # fmt: skip
@click.pass_context
def worker(
    ctx: click.Context,
    script: str | None,
    module: bool,
    coordinator: str,
    index: int | None,
    colocate: bool,
    server_device: str,
    max_restarts: int,
    restart_delay: float,
    start_s: float,
    quiet: bool,
    advertise: str | None,
) -> None:
    """Run one worker.

    Runs SCRIPT ARGS, or without SCRIPT the built-in example. Options stand before SCRIPT.
    """
    from roundtable.worker.joining import START_VARIABLE
    from roundtable.worker.tools.run_script import run_script

    log_to_stderr(quiet)
    script = _named(script, module)
    os.environ[START_VARIABLE] = str(start_s)  # for the script, which joins by itself
    with ExitStack() as beside:
        if colocate:
            from roundtable.cluster.launch.colocated import server_beside
            from roundtable.cluster.process.restart_policy import RestartPolicy

            again = RestartPolicy(max_restarts, restart_delay)
            beside.enter_context(server_beside(program(), coordinator, index, script, again, server_device, start_s, advertise))
        run_script(coordinator, script, list(ctx.meta["args"]), index)


@click.command()
@click.argument("run", shell_complete=complete_runs)
@click.option("--workers", type=click.IntRange(1), required=True, metavar="N", help="New number of workers.")
def scale(run: str, workers: int) -> None:
    """Change the number of workers of a running run.

    RUN is the run directory of a `roundtable local`, or its name under runs/. Surplus workers finish their current
    micro-batch and leave; new ones join in the current round.
    """
    from roundtable.cluster.launch.scale import scale as ask

    folder = ask(run, workers)
    click.echo(f"{folder}: scaled to {workers} {'worker' if workers == 1 else 'workers'}.")


def _named(script: str | None, module: bool) -> str | None:
    """Return what names the script from here on. Raise UsageError if a module has no name."""
    if not module:
        return script
    if script is None:
        raise UsageError("-m needs a module's name, such as -m package.train.")
    return as_module(script)


def _going_on(
    ctx: click.Context,
    resume: str | None,
    config: str | None,
    script: str | None,
    recovers: bool,
    accept_versions: bool,
    say: Callable[[str], None],
) -> tuple[Choice, Callable[[Path], How] | None]:
    """Return the user's choice, and the function that --resume gives to decide what is done in the run directory.

    The function is None without --resume: then the run directory must be empty.
    """
    from roundtable.cluster.options.resume import AUTO, resumed, take_up
    from roundtable.common.storage.run_files import find_run

    flags, args = given(ctx), ctx.meta["args"]
    if resume is not None and resume != AUTO:
        return resumed(find_run(resume), flags, script, args, accept_versions), lambda folder: "resume"
    choice = choose(flags, config, script, args, ctx.meta.get(FOUND))
    if resume is None:
        return choice, None
    return choice, lambda folder: take_up(folder, choice, recovers, accept_versions, say)
