"""Commands on the results of runs: checkpoints, experiments, and models to merge."""

from __future__ import annotations

import os
from pathlib import Path

import click

from roundtable.cluster.options.command import Command
from roundtable.commands.shared import complete_runs, program


@click.group()
def checkpoint() -> None:
    """List the checkpoints of a run, check them, and export the model of one.

    RUN is a run directory, or the name of one under runs/.
    """


@checkpoint.command("list")
@click.argument("run", shell_complete=complete_runs)
def list_checkpoints(run: str) -> None:
    """List the checkpoints of RUN."""
    from roundtable.cluster.commands.checkpoint import list_checkpoints

    list_checkpoints(run)


@checkpoint.command()
@click.argument("run", shell_complete=complete_runs)
def verify(run: str) -> None:
    """Check all files of RUN's checkpoints by their checksums, and restore each server from them as a resume does.

    This takes the memory of one server at a time. The exit code is 1 if a checkpoint cannot be used.
    """
    from roundtable.cluster.commands.checkpoint import verify_checkpoints
    from roundtable.ps.server.restoring import hindrance

    verify_checkpoints(run, hindrance)


@checkpoint.command()
@click.argument("run", shell_complete=complete_runs)
@click.option("--round", "round_", type=click.IntRange(min=0), metavar="N", help="Checkpoint round to use (default: newest).")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The safetensors file to write.")
def export(run: str, round_: int | None, out: Path) -> None:
    """Write the model in a checkpoint of RUN to a safetensors file, by the names of its state_dict."""
    from roundtable.cluster.commands.checkpoint import export_model

    export_model(run, round_, out)


@click.command(cls=Command)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Rerun cases that already finished or started.")
def experiment(file: Path, overwrite: bool) -> None:
    """Run many settings and compare them.

    FILE is TOML. Put shared values in [settings], and lists to combine in [matrix]: every combination is a run. Put single
    variants in [[case]]: each needs a name, and runs with every combination of the matrix. Optional keys are script, args, name
    and out. out is the folder for the runs and results, by default runs/experiments/NAME.

    The runs go one after another. Runs that have finished with the same settings are not run again, and unfinished runs go on.
    The results are a table (CSV and Markdown) and a plot of loss and accuracy over time.
    """
    from rich.console import Console

    from roundtable.cluster.commands.experiment import read_experiment, run_experiment

    run_experiment(read_experiment(file), program(), os.environ, Console(force_terminal=False), overwrite)


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The safetensors file to write.")
@click.option("--how", type=click.Choice(["uniform", "samples", "greedy"]), default="uniform", show_default=True,
              help="Weighting: uniform; by samples trained; or greedy (keep a model only if it improves held-out accuracy; "
              "built-in example only).")  # fmt: skip
@click.option("--weights", metavar="X,X,...", help="The weight of each model, instead of --how.")
@click.option("--overwrite", is_flag=True, help="Replace FILE.")
def merge(models: tuple[Path, ...], out: Path, how: str, weights: str | None, overwrite: bool) -> None:
    """Average the weights of trained models.

    MODELS are safetensors files, state_dicts of torch.save or run directories, all of one kind of network. The mean is good only
    if the models started from the same weights.
    """
    from roundtable.common.runtime.errors import UsageError
    from roundtable.worker.tools.merge_models import merge_files

    try:
        numbers = [float(weight) for weight in weights.split(",")] if weights is not None else None
    except ValueError:
        raise UsageError(f"--weights must be comma-separated numbers, e.g. 1,2,0.5 (got {weights}).") from None
    merged = merge_files(models, out, how, numbers, overwrite)
    for warning in merged.warnings:
        click.echo(f"warning: {warning}", err=True)
    for part, weight in enumerate(merged.weights):
        measured = f", accuracy {merged.parts_accuracy[part]:.2%}" if merged.parts_accuracy is not None else ""
        click.echo(f"{models[part]}: weight {weight:g}{measured}")
    click.echo(f"{out}: " + (f"accuracy {merged.accuracy:.2%}" if merged.accuracy is not None else "written"))
