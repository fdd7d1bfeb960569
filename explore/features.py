"""The features of all images of a data set, computed by the workers of a cluster and kept in one safetensors file.

The workers run `roundtable.explore.compute`, a script like a user's. Micro-batches of images are shared and reassigned as in
training. Each worker writes its rows into one file that all have mapped.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from roundtable.common.config.settings import Settings
from roundtable.common.runtime.errors import ClusterError, UsageError
from roundtable.explore.layers import features_of
from roundtable.explore.trained import Source, Trained, open_run, weights_at
from roundtable.worker.data import Samples
from roundtable.worker.models.layer_names import find_layer

SCRIPT = Path(__file__).with_name("compute.py")
#: Images that are computed together. The bits of features depend on this number, and not on the number of workers.
MICRO_BATCH = 64
_ROUND = 128 * MICRO_BATCH

#: A function that runs a script with arguments on a cluster of these settings, with this folder as its run directory.
Cluster = Callable[[Path, Settings, str, tuple[str, ...]], None]


class Job(msgspec.Struct, frozen=True):
    """The workers' job: compute `layer` of the model of `source` for `rows` images, `width` numbers each, into `folder`."""

    source: Source
    layer: str
    folder: str
    rows: int
    width: int

    def features(self) -> Tensor:
        """Return the features, float32 (rows, width), shared between all processes that map the file."""
        return _mapped(Path(self.folder) / "features.raw", self.rows * self.width, torch.float32).view(self.rows, self.width)

    def labels(self) -> Tensor:
        """Return the labels, int64 (rows), shared in the same way."""
        return _mapped(Path(self.folder) / "labels.raw", self.rows, torch.int64)


def _mapped(path: Path, size: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)


@dataclass(frozen=True)
class Features:
    """Features of N images: first the training images, then the held-out ones."""

    #: float32 (N, D).
    values: Tensor
    #: int64 (N).
    labels: Tensor
    #: int64 (N): the number of each image in its part of the data set.
    indices: Tensor
    #: bool (N).
    held_out: Tensor

    def part(self, held_out: bool) -> Features:
        rows = self.held_out == held_out
        return Features(self.values[rows], self.labels[rows], self.indices[rows], self.held_out[rows])


class AllImages(torch.utils.data.Dataset[tuple[Tensor, int, int]]):
    """A data set of (image, label, row): the training images, then the held-out ones."""

    def __init__(self, train: Samples, test: Samples) -> None:
        self._train, self._test = train, test

    def __len__(self) -> int:
        return len(self._train) + len(self._test)

    def __getitem__(self, row: int) -> tuple[Tensor, int, int]:
        first = len(self._train)
        image, label = self._train[row] if row < first else self._test[row - first]
        return image, label, row


def extract(run: Trained, source: Source, layer: str, workers: int, out: Path, cluster: Cluster) -> Features:
    """Compute the features of all images of `run` on `workers` workers, write them to `out` and return them.

    `layer` is a name in `named_modules()`. The file has `features` float32 (N, D), `labels` and `indices` int64 (N), `held_out`
    bool (N). Its metadata names the model, layer and images. Raise UsageError if `out` cannot be written, and ClusterError if the
    workers fail; their logs are then kept.
    """
    width = features_of(weights_at(run, "last"), layer, run.images.train[0][0][None]).shape[1]
    train, test = len(run.images.train), len(run.images.test)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}.") from None
    job = Job(source, layer, str(folder.resolve()), train + test, width)
    settings = Settings(workers=workers, servers=1, micro_batch=MICRO_BATCH, global_batch=_ROUND, epochs=1, checkpoint_every=0)
    try:
        values, labels = job.features(), job.labels()
        cluster(folder, settings, str(SCRIPT), (msgspec.json.encode(job).decode(),))
        indices = torch.cat([torch.arange(train), torch.arange(test)])
        features = Features(values, labels, indices, torch.arange(train + test) >= train)
        _write(features, _metadata(run, layer), folder / "features.safetensors")
        (folder / "features.safetensors").replace(out)
    except ClusterError:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder)
    return features


def kept(run: Trained, source: Source, layer: str, workers: int, cluster: Cluster) -> Features:
    """Return the features of `layer`, from the run's folder if they are of this model and these images. Else compute them."""
    path = default_file(run, layer)
    return read(path, run, layer) or extract(run, source, layer, workers, path, cluster)


def default_file(run: Trained, layer: str) -> Path:
    """Return the file in which the features of a layer are kept by default."""
    return run.folder / "features" / f"{run.images.name}-{run.called(layer)}.safetensors"


def read(path: Path, run: Trained, layer: str) -> Features | None:
    """Return the features that `extract` wrote to `path`. None if the file is missing or of another model, layer or data set."""
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != _metadata(run, layer):
                return None
        tensors = load_file(path)
    except (OSError, SafetensorError):
        return None
    return Features(tensors["features"], tensors["labels"], tensors["indices"], tensors["held_out"])


def _write(features: Features, metadata: dict[str, str], path: Path) -> None:
    tensors = {
        "features": features.values,
        "labels": features.labels,
        "indices": features.indices,
        "held_out": features.held_out,
    }
    save_file(tensors, path, metadata)


def _metadata(run: Trained, layer: str) -> dict[str, str]:
    images = run.images
    return {
        "format": "pt",
        "layer": run.called(layer),
        "pooling": "none: outputs of more than one dimension are flattened, channels first",
        "model_sha256": run.model_sha256,
        "data": images.name,
        "data_dir": str(Path(run.data_dir).resolve()) if run.data_dir is not None else "",
        "images": f"{len(images.train)} to train on, {len(images.test)} held out",
    }


def command(source: Source, layer: str, workers: int, out: Path | None, cluster: Cluster) -> str:
    """Run `launch.py features`. Return the line to print."""
    run = open_run(source)
    layer = find_layer(weights_at(run, "last"), layer)
    out = out or default_file(run, layer)
    count, width = extract(run, source, layer, workers, out, cluster).values.shape
    return f"{count} images x {width} features of layer {run.called(layer)} are in {out}"
