"""The command line: every command is a few lines that call into a room. `roundtable` and `python launch.py` are the same."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from roundtable.cluster.options.flags import (
    Choice,
    Command,
    Option,
    check_address,
    check_advertised,
    choose,
    given,
    run_options,
    settings_options,
)
from roundtable.cluster.process.output import open_standard_streams
from roundtable.cluster.process.parent_death import PARENT_VARIABLE, die_with_parent
from roundtable.cluster.run.exit_codes import leave, run_command
from roundtable.common.config.settings import START_S
from roundtable.common.runtime.errors import OneLine
from roundtable.common.storage.private_files import keep_private
from roundtable.common.storage.run_files import How

if TYPE_CHECKING:
    from roundtable.common.config.settings import Settings

_COORDINATOR = click.option(
    "--coordinator",
    callback=check_address,
    metavar="ADDRESS",
    required=True,
    envvar=["ROUNDTABLE_COORDINATOR", "PS_COORDINATOR"],
    help="Coordinator address, tcp://HOST:PORT. [env: ROUNDTABLE_COORDINATOR]",
)
_INDEX = click.option(
    "--index",
    cls=Option,
    type=click.IntRange(min=0),
    metavar="N",
    help="The number this process is to have; by default one that is free.",
)
_START = click.option(
    "--start-timeout", "start_s", type=click.FloatRange(0, min_open=True), default=START_S, show_default=True, metavar="X",
    envvar=["ROUNDTABLE_START_TIMEOUT", "PS_START_TIMEOUT"],
    help="Seconds for the coordinator to answer; it may start later. [env: ROUNDTABLE_START_TIMEOUT]",
)  # fmt: skip
_ACCEPT_VERSIONS = (
    "With --resume: go on although the snapshot is of another version of this program or of torch, so that the same bits cannot "
    "be promised."
)
_RESUME = click.option(
    "--resume", cls=Option, section="Run", metavar="RUN|auto",
    help="Go on with this run, a folder or a name under runs/, from its newest snapshot: on other numbers of workers and servers,"
    " or up to other --rounds or --epochs if you like. auto: with that in the run directory, in whatever way fits, or begin it "
    "where there is none; to be given from the first time on.",
)  # fmt: skip
_WORKERS = click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, metavar="N",
                        help="Workers that compute the features.")  # fmt: skip


def _looks_at_a_run(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command function the argument and options that say which run to look at, and on which images."""
    for flag, metavar, text in (
        (
            "--model-file",
            "FILE.py:FACTORY",
            "What makes the model of a run of your own script: a class or function; FILE.py is imported.",
        ),
        ("--data-dir", "DIR", "Folder that holds the images, where --data needs one."),
        ("--data", "NAME", "The images, as in `local`; by default those that the run was trained on."),
    ):
        command = click.option(flag, metavar=metavar, help=text)(command)
    return click.argument("run")(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """Train PyTorch models data-parallel through parameter servers.

    `local` does all on this machine; `coordinator`, `server` and `worker` are its parts, to be started one by one.

    \b
    launch.py local                               the built-in example
    launch.py local --workers 4 train.py -- ARGS  your own script
    launch.py filters runs/NAME                   what it has learnt
    launch.py COMMAND --help                      what can be set
    """


@cli.command(cls=Command)
@click.argument("script", required=False)
@settings_options
@click.option("--port", cls=Option, section="Cluster", type=click.IntRange(0, 65535), default=0, metavar="N",
              help="Port of the coordinator; 0 takes any free one.", show_default=True)  # fmt: skip
@click.option("--max-restarts", cls=Option, section="Cluster", type=click.IntRange(0), default=3, metavar="N", show_default=True,
              help="How often each worker or server that was killed is started again; 0: never. The coordinator is as often, and "
              "5 times at least.")  # fmt: skip
@click.option("--restart-delay", cls=Option, section="Cluster", type=click.FloatRange(0), default=0.5, metavar="X",
              show_default=True, help="Seconds before the first time; each pause is twice the last one, up to 30.")  # fmt: skip
@click.option("--server-device", cls=Option, section="Cluster", metavar="NAME,...", default="cpu", show_default=True,
              help="Where layers are that servers compute, such as cuda:0; of several names, servers take turns.")  # fmt: skip
@run_options
@_RESUME
@click.option("--allow-version-mismatch", cls=Option, section="Run", is_flag=True, help=_ACCEPT_VERSIONS)
@click.pass_context
def local(
    ctx: click.Context, /, config: str | None, script: str | None, resume: str | None, allow_version_mismatch: bool, **_: Any
) -> None:
    """Train on this machine.

    Starts and watches a coordinator, servers and workers, which run SCRIPT with ARGS, or without one the built-in example.
    """
    from rich.console import Console

    from roundtable.cluster.launch.local import LaunchSpec, check_order, run_local
    from roundtable.cluster.run.console import Screen
    from roundtable.cluster.run.run_directory import claim, passed_over
    from roundtable.common.storage.event_log import FILE_NAME

    keep_private()
    choice, take_up = _going_on(resume, given(ctx), config, script, ctx.meta["args"], False, allow_version_mismatch, click.echo)
    check_order(choice.settings, choice.script, choice.port)
    with claim(choice.run_dir, choice.default_name, choice.overwrite, take_up) as (folder, how):
        if choice.run_dir is None and (before := passed_over(folder, choice.default_name)) is not None:
            click.echo(f"{before} holds a run that has not finished: --resume {before} goes on with it. This one begins.")
        if how != "nothing":
            order = LaunchSpec(
                choice.settings, folder, choice.script, choice.args, choice.port, choice.respawn, how,
                accept_versions=allow_version_mismatch, devices=choice.server_device.split(","),
            )  # fmt: skip
            run_local(order, _program(), os.environ, Screen(Console(), folder / FILE_NAME))


@cli.command(cls=Command)
@click.option("--listen", cls=Option, section="Cluster", callback=check_address, metavar="ADDRESS", default="tcp://*:5555",
              show_default=True, help="Where to listen.")  # fmt: skip
@settings_options
@run_options
@_RESUME
@click.option("--recover", is_flag=True, hidden=True, help="The same as --resume auto.")
@click.option("--prepared", type=click.Choice(get_args(How)), hidden=True,
              help="What to do in the run directory, which has been claimed by whoever started this.")  # fmt: skip
@click.option("--allow-version-mismatch", cls=Option, section="Run", is_flag=True, help=_ACCEPT_VERSIONS)
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
    **_: Any,
) -> None:
    """Coordinate one run.

    Waits for as many servers and workers as the settings say, and writes the run directory.
    """
    from roundtable.cluster.options.resume import AUTO, told_to_stop
    from roundtable.cluster.process.signals import stopped
    from roundtable.cluster.run.run_directory import claim, write_settings
    from roundtable.common.runtime.errors import Stopped
    from roundtable.common.storage.run_files import SETTINGS_FILE
    from roundtable.ps.coordinator.main import serve

    _log_to_stderr()
    keep_private()
    if prepared is not None:
        choice = choose(given(ctx), config)
        serve(choice.settings, listen, _folder(choice), prepared, allow_version_mismatch, [signal.SIGINT, signal.SIGTERM])
        return
    resume = AUTO if recover else resume
    choice, take_up = _going_on(resume, given(ctx), config, None, (), True, allow_version_mismatch, logging.getLogger("ps").info)
    with claim(choice.run_dir, choice.default_name, choice.overwrite, take_up) as (folder, how):
        if how != "nothing":
            write_settings(folder / SETTINGS_FILE, choice.settings)
        signal.signal(signal.SIGTERM, stopped)
        signal.signal(signal.SIGINT, stopped)
        try:
            serve(choice.settings, listen, folder, how, allow_version_mismatch, [signal.SIGINT, signal.SIGTERM])
        except Stopped as error:
            raise Stopped(error.number, told_to_stop(error.number, folder, ["coordinator", "--listen", listen])) from None


@cli.command(cls=Command)
@_COORDINATOR
@click.option("--listen", cls=Option, callback=check_address, metavar="ADDRESS", default="tcp://*:0", show_default=True,
              help="Where to listen; port 0 is any free one.")  # fmt: skip
@_INDEX
@click.option("--server-device", cls=Option, old=["--device"], metavar="NAME", default="cpu", show_default=True,
              help="Where layers are that servers compute (ShardedLinear, ColumnParallelLinear), such as cuda:0; all else is in "
              "memory that workers reach.")  # fmt: skip
@_START
@click.option("--advertise", callback=check_advertised, metavar="ADDRESS",
              help="Where others are to connect, HOST, HOST:PORT or tcp://HOST:PORT, such as a router's address that is "
              "forwarded here; by default where it listens, as seen from the coordinator.")  # fmt: skip
def server(coordinator: str, listen: str, index: int | None, server_device: str, start_s: float, advertise: str | None) -> None:
    """Be one of a run's servers.

    Holds a part of the parameters and updates them, until the run ends.
    """
    from roundtable.common.runtime.devices import find_device
    from roundtable.ps.server.server import serve

    _log_to_stderr()
    keep_private()
    serve(coordinator, listen, index, find_device(server_device, "--server-device"), start_s, advertise)


@cli.command(cls=Command)
@click.argument("script", required=False)
@_COORDINATOR
@_INDEX
@click.option("--colocate", is_flag=True,
              help="Be one of its servers too, by a process beside this one that ends with it. Where all workers are, the "
              "coordinator's --servers must be its --workers, and a host moves no more than in a ring all-reduce.")  # fmt: skip
@click.option("--server-device", metavar="NAME", default="cpu", show_default=True,
              help="With --colocate: where layers are that the server computes, such as cuda:0.")  # fmt: skip
@click.option("--max-restarts", cls=Option, type=click.IntRange(0), default=3, metavar="N", show_default=True,
              help="With --colocate: how often the server is started again where it was killed; 0: never.")  # fmt: skip
@click.option("--restart-delay", cls=Option, type=click.FloatRange(0), default=0.5, metavar="X", show_default=True,
              help="Seconds before the first time; each pause is twice the last one, up to 30.")  # fmt: skip
@_START
@click.option("--advertise", callback=check_advertised, metavar="ADDRESS",
              help="With --colocate: where others are to connect to its server, HOST, HOST:PORT or tcp://HOST:PORT. The server "
              "listens at PORT, too.")  # fmt: skip
@click.pass_context
def worker(
    ctx: click.Context,
    script: str | None,
    coordinator: str,
    index: int | None,
    colocate: bool,
    server_device: str,
    max_restarts: int,
    restart_delay: float,
    start_s: float,
    advertise: str | None,
) -> None:
    """Be one of a run's workers.

    Runs SCRIPT with ARGS, or without one the built-in example.
    """
    from roundtable.worker.joining import START_VARIABLE
    from roundtable.worker.tools.run_script import run_script

    _log_to_stderr()
    os.environ[START_VARIABLE] = str(start_s)  # also the server's beside it
    with ExitStack() as beside:
        if colocate:
            from roundtable.cluster.launch.colocated import server_beside
            from roundtable.cluster.process.restart_policy import RestartPolicy

            again = RestartPolicy(max_restarts, restart_delay)
            beside.enter_context(server_beside(_program(), coordinator, index, script, again, server_device, advertise))
        run_script(coordinator, script, list(ctx.meta["args"]), index)


@cli.command()
@click.argument("run")
@click.option("--workers", type=click.IntRange(1), required=True, metavar="N", help="How many workers it is to have.")
def scale(run: str, workers: int) -> None:
    """Have more or fewer workers in a run that goes on.

    RUN is the run directory of a `launch.py local`, or its name under runs/. Workers that are too many finish what they are at
    and leave; new ones join at the round that the others are in.
    """
    from roundtable.cluster.launch.scale import scale as ask

    folder = ask(run, workers)
    click.echo(f"{folder}: {workers} {'worker' if workers == 1 else 'workers'} from now on.")


@cli.group()
def checkpoint() -> None:
    """Look at the snapshots of a run, check them, and take the model out of one.

    RUN is a run directory, or the name of one under runs/.
    """


@checkpoint.command("list")
@click.argument("run")
def list_checkpoints(run: str) -> None:
    """List the snapshots of RUN."""
    from roundtable.cluster.commands.checkpoint import list_snapshots

    list_snapshots(run)


@checkpoint.command()
@click.argument("run")
def verify(run: str) -> None:
    """Compare all files of RUN's snapshots with their check sums, and restore each server from them as a resume does.

    That takes the memory of one server at a time. The exit code is 1 where a snapshot cannot be used.
    """
    from roundtable.cluster.commands.checkpoint import verify_snapshots
    from roundtable.ps.server.restoring import hindrance

    verify_snapshots(run, hindrance)


@checkpoint.command()
@click.argument("run")
@click.option(
    "--round", "round_", type=click.IntRange(min=0), metavar="N", help="Of the snapshot of this round; else the newest."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The safetensors file to write.")
def export(run: str, round_: int | None, out: Path) -> None:
    """Write the model in a snapshot of RUN to a safetensors file, by the names of its state_dict."""
    from roundtable.cluster.commands.checkpoint import export_model

    export_model(run, round_, out)


@cli.command(cls=Command)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Run all again, also what has finished or was begun before.")
def experiment(file: Path, overwrite: bool) -> None:
    """Run many settings and compare them.

    FILE is TOML: [settings] for all runs; a [matrix] of lists of settings, of which every combination is a run; [[case]] tables
    with a name and settings of their own, each run with every combination of the matrix; optional are script, args, name, and
    out, the folder for the runs and results, which by default is runs/experiments/NAME.

    The runs go one after another; what has finished before with the same settings is not run again, and what was begun goes on.
    A table (CSV and Markdown) and a plot of loss and accuracy over time are written.
    """
    from rich.console import Console

    from roundtable.cluster.commands.experiment import read_experiment, run_experiment

    run_experiment(read_experiment(file), _program(), os.environ, Console(force_terminal=False), overwrite)


@cli.command(cls=Command)
@click.argument("model")
@click.option("--image", metavar="CxHxW", help="The size of an image; by default 3x224x224 for alexnets and 1x28x28 for others.")
@click.option("--classes", type=click.IntRange(min=1), metavar="N", help="By default 1000 for alexnets and 10 for others.")
@click.option("--data", metavar="NAME", help="Take both from these images, as for --data of local.")
@click.option("--data-dir", metavar="DIR", help="Folder that holds them, where --data needs one.")
def inspect(model: str, image: str | None, classes: int | None, data: str | None, data_dir: str | None) -> None:
    """Show what a network costs, layer by layer.

    MODEL is the name of a built-in network, or FILE.py:FACTORY, which is called without arguments and returns a torch.nn.Module.
    Beside output, parameters and multiply-adds stand the weights that each layer has, would have if they were not shared, and
    would have fully connected.
    """
    from rich.console import Console

    from roundtable.worker.tools.layer_costs import inspect as show

    show(model, image, data, data_dir, classes, Console())


@cli.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The safetensors file to write.")
@click.option("--how", type=click.Choice(["uniform", "samples", "greedy"]), default="uniform", show_default=True,
              help="How much each counts: all the same, as the samples of its run, or those alone that make the mean better on "
              "held-out images of the built-in example.")  # fmt: skip
@click.option("--weights", metavar="X,X,...", help="How much each counts, in numbers, instead.")
@click.option("--overwrite", is_flag=True, help="Replace FILE.")
def merge(models: tuple[Path, ...], out: Path, how: str, weights: str | None, overwrite: bool) -> None:
    """Merge trained models into one by the mean of their weights.

    MODELS are safetensors files, state_dicts of torch.save or run directories, all of one kind of network. The mean is good only
    of models that started from the same weights.
    """
    from roundtable.common.runtime.errors import UsageError
    from roundtable.worker.tools.merge_models import merge_files

    try:
        numbers = [float(weight) for weight in weights.split(",")] if weights is not None else None
    except ValueError:
        raise UsageError(f"--weights {weights} cannot be: give numbers with commas between them, such as 1,2,0.5.") from None
    merged = merge_files(models, out, how, numbers, overwrite)
    for warning in merged.warnings:
        click.echo(f"warning: {warning}", err=True)
    for part, weight in enumerate(merged.weights):
        measured = f", accuracy {merged.parts_accuracy[part]:.2%}" if merged.parts_accuracy is not None else ""
        click.echo(f"{models[part]}: weight {weight:g}{measured}")
    click.echo(f"{out}: " + (f"accuracy {merged.accuracy:.2%}" if merged.accuracy is not None else "written"))


@cli.command()
@_looks_at_a_run
@click.option("--layer", required=True, metavar="NAME", help="The layer: conv1, relu2, fc1, ..., or its name in named_modules().")
@_WORKERS
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="By default RUN/features/DATA-LAYER.safetensors.")
def features(layer: str, workers: int, out: Path | None, **source: Any) -> None:
    """Compute the features of images by the layer of a trained model.

    RUN is a run's folder, or its name under runs/. What the layer gives for each image of the data set, to train on and held
    out, is flattened and written to a safetensors file: features (N, D), labels, indices and held_out.
    """
    from roundtable.explore.features import command
    from roundtable.explore.trained import Source

    click.echo(command(Source(**source), layer, workers, out, _on_cluster))


@cli.command()
@_looks_at_a_run
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--layer", metavar="NAME", help="The layer whose features are compared; by default that before the last.")
@click.option("-k", type=click.IntRange(min=1), default=8, show_default=True, metavar="N", help="Images to find for each.")
@click.option("--metric", type=click.Choice(["cosine", "euclidean"]), default="cosine", show_default=True)
@click.option("--approximate", is_flag=True, help="Search in a graph (HNSW) instead of looking at all images.")
@click.option("--retrieval/--no-retrieval", default=True, help="Measure how often the nearest are of the same class.")
@_WORKERS
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the galleries; by default RUN/similar.")
def similar(images: tuple[str, ...], out: Path | None, layer: str | None, k: int, metric: Any, approximate: bool,
            retrieval: bool, workers: int, **source: Any) -> None:  # fmt: skip
    """Find the training images that are most like others.

    RUN is a run's folder, or its name under runs/; each IMAGE is a file, or the number of a held-out image. The nearest by
    what a layer of the trained model gives are drawn as a gallery, a PNG and a page of HTML, and how good the features are
    for that is told beside raw pixels. Features are kept in RUN/features.
    """
    from roundtable.explore.similar import command
    from roundtable.explore.trained import Source

    for line in command(Source(**source), images, layer, k, metric, approximate, retrieval, workers, out, _on_cluster):
        click.echo(line)


@cli.command()
@_looks_at_a_run
@click.option("--layer", default="conv1", show_default=True, metavar="NAME", help="A convolution: conv1, conv2, ...")
@click.option(
    "--image",
    default="0",
    show_default=True,
    metavar="IMAGE",
    help="Whose maps are drawn: a file, or the number of a held-out image.",
)
@click.option("--also", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="Another model file, or folder of a snapshot, to draw filters of; may be given again.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the pictures; by default RUN/filters.")
def filters(layer: str, image: str, also: tuple[Path, ...], out: Path | None, **source: Any) -> None:
    """Draw what a convolution has learnt.

    RUN is a run's folder, or its name under runs/. Drawn are the filters before training, in the snapshots that
    there are, and after it, the maps of one image layer by layer, and the patches of training images that excite a filter most.
    """
    from roundtable.explore.filters import command
    from roundtable.explore.trained import Source

    for line in command(Source(**source), layer, image, also, out):
        click.echo(line)


def main() -> int:
    """Run the command line and return the exit code."""
    open_standard_streams()
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is not None:
        die_with_parent(int(parent))
    return run_command(cli, sys.argv[1:] or ["--help"], Path(sys.argv[0]).name)


def _program() -> list[str]:
    return [sys.executable, str(Path(__file__).resolve())]


def _on_cluster(folder: Path, settings: Settings, script: str, args: tuple[str, ...]) -> None:
    """Run a script on a cluster of this machine that is only a means to something else; `folder` is its run directory."""
    from rich.console import Console

    from roundtable.cluster.launch.local import LaunchSpec, run_local
    from roundtable.cluster.run.console import LiveOnly
    from roundtable.common.storage.event_log import FILE_NAME

    run_local(LaunchSpec(settings, folder, script, args), _program(), os.environ, LiveOnly(Console(), folder / FILE_NAME))


def _going_on(
    resume: str | None,
    flags: Mapping[str, Any],
    config: str | None,
    script: str | None,
    args: tuple[str, ...],
    recovers: bool,
    accept_versions: bool,
    say: Callable[[str], None],
) -> tuple[Choice, Callable[[Path], How] | None]:
    """What the user chose, and what is done in the run directory according to --resume; None: it is to be empty."""
    from roundtable.cluster.options.resume import AUTO, resumed, take_up
    from roundtable.common.storage.run_files import find_run

    if resume is not None and resume != AUTO:
        return resumed(find_run(resume), flags, script, args, accept_versions), lambda folder: "resume"
    choice = choose(flags, config, script, args)
    if resume is None:
        return choice, None
    return choice, lambda folder: take_up(folder, choice, recovers, accept_versions, say)


def _folder(choice: Choice) -> Path:
    return choice.run_dir or Path("runs") / choice.default_name


def _log_to_stderr() -> None:
    """Show what our packages log; a script's own logging is left alone."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("roundtable")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False


if __name__ == "__main__":
    leave(main())
