"""Commands that look inside: at the costs of a network, and at the features of a trained one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from roundtable.cluster.options.command import Command
from roundtable.commands.shared import complete_runs, on_cluster
from roundtable.common.runtime.extras import require

_WORKERS = click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, metavar="N",
                        help="Workers that compute the features.")  # fmt: skip


def _looks_at_a_run(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the argument and options that name the run to look at, and the images."""
    for flag, metavar, text in (
        (
            "--model-file",
            "FILE.py:FACTORY",
            "Class or function that makes the model, if the run is of your own script. FILE.py is imported.",
        ),
        ("--data-dir", "DIR", "Folder that holds the images, if --data reads files."),
        ("--data", "NAME", "The images, as in `local` (default: those that the run was trained on)."),
    ):
        command = click.option(flag, metavar=metavar, help=text)(command)
    return click.argument("run", shell_complete=complete_runs)(command)


@click.command(cls=Command)
@click.argument("model")
@click.option("--image", metavar="CxHxW", help="Size of an image (default: 3x224x224 for alexnets, 1x28x28 for others).")
@click.option("--classes", type=click.IntRange(min=1), metavar="N", help="Classes (default: 1000 for alexnets, 10 for others).")
@click.option("--data", metavar="NAME", help="Take size and number of classes from these images, as for --data of local.")
@click.option("--data-dir", metavar="DIR", help="Folder that holds them, if --data reads files.")
def inspect(model: str, image: str | None, classes: int | None, data: str | None, data_dir: str | None) -> None:
    """Show what a network costs, layer by layer.

    MODEL is the name of a built-in network, or FILE.py:FACTORY, which is called without arguments and returns a torch.nn.Module.
    The table has a line per layer: output shape, parameters, multiply-adds, and the weights that the layer has, would need
    unshared, and would need if it were fully connected.
    """
    from rich.console import Console

    from roundtable.worker.tools.layer_costs import inspect as show

    show(model, image, data, data_dir, classes, Console())


@click.command()
@_looks_at_a_run
@click.option("--layer", required=True, metavar="NAME", help="The layer: conv1, relu2, fc1, ..., or its name in named_modules().")
@_WORKERS
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Default: RUN/features/DATA-LAYER.safetensors.",
)
def features(layer: str, workers: int, out: Path | None, **source: Any) -> None:
    """Extract a layer's features for every image of a data set.

    RUN is a run's folder, or its name under runs/. The layer's output for each image of the data set, training and held-out, is
    flattened and written to a safetensors file: features (N, D), labels, indices and held_out.
    """
    from roundtable.explore.features import command
    from roundtable.explore.trained import Source

    click.echo(command(Source(**source), layer, workers, out, on_cluster))


@click.command()
@_looks_at_a_run
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--layer", metavar="NAME", help="Layer whose features are compared (default: the one before the last).")
@click.option("-k", type=click.IntRange(min=1), default=8, show_default=True, metavar="N", help="Images to find for each IMAGE.")
@click.option("--metric", type=click.Choice(["cosine", "euclidean"]), default="cosine", show_default=True)
@click.option("--approximate", is_flag=True, help="Search in a graph (HNSW) instead of looking at all images.")
@click.option("--retrieval/--no-retrieval", default=True, help="Measure how often the nearest images are of the same class.")
@_WORKERS
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the galleries (default: RUN/similar).")
def similar(images: tuple[str, ...], out: Path | None, layer: str | None, k: int, metric: Any, approximate: bool,
            retrieval: bool, workers: int, **source: Any) -> None:  # fmt: skip
    """Find the training images that are most like given ones.

    RUN is a run's folder, or its name under runs/. Each IMAGE is a file, or the number of a held-out image. The images that are
    nearest by the output of a layer are drawn as a gallery, a PNG and a page of HTML. A table compares the features with raw
    pixels. Features are kept in RUN/features.
    """
    require("similar", "faiss", "matplotlib", "PIL")
    from roundtable.explore.similar import command
    from roundtable.explore.trained import Source

    for line in command(Source(**source), images, layer, k, metric, approximate, retrieval, workers, out, on_cluster):
        click.echo(line)


@click.command()
@_looks_at_a_run
@click.option("--layer", default="conv1", show_default=True, metavar="NAME", help="A convolution: conv1, conv2, ...")
@click.option(
    "--image",
    default="0",
    show_default=True,
    metavar="IMAGE",
    help="Image whose maps are drawn: a file, or the number of a held-out image.",
)
@click.option("--also", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="Also draw this model file or checkpoint folder (repeatable).")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the pictures (default: RUN/filters).")
def filters(layer: str, image: str, also: tuple[Path, ...], out: Path | None, **source: Any) -> None:
    """Draw the filters that a convolution has learnt.

    RUN is a run's folder, or its name under runs/. Three pictures are drawn: the filters before training, in the checkpoints and
    after training; the maps of one image, layer by layer; and the patches of training images that excite a filter most.
    """
    require("filters", "matplotlib", "PIL")
    from roundtable.explore.filters import command
    from roundtable.explore.trained import Source

    for line in command(Source(**source), layer, image, also, out):
        click.echo(line)
