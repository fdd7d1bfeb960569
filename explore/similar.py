"""Find images that are alike by the features of a layer, and measure how often they are of the same class."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from roundtable.common.runtime.errors import UsageError
from roundtable.explore.features import Cluster, Features, kept
from roundtable.explore.gallery import Gallery, Match, Row, draw, write_page
from roundtable.explore.layers import features_of, last_hidden
from roundtable.explore.pictures import ask
from roundtable.explore.trained import Source, Trained, open_run, weights_at
from roundtable.worker.data import Samples
from roundtable.worker.models.layer_names import find_layer

Metric = Literal["cosine", "euclidean"]
Rows = npt.NDArray[np.int64]

#: HNSW (Malkov and Yashunin 2018): links of a point, and how many candidates are kept while building and while searching.
_LINKS, _BUILD, _SEARCH = 32, 80, 64
#: The most held-out images that are measured for the table.
_MEASURED = 1000


class Neighbours:
    """Finds the nearest of many points with faiss: exactly, or approximately in a graph (HNSW)."""

    def __init__(self, points: Tensor, metric: Metric, approximate: bool) -> None:
        """`points` is float32 (N, D)."""
        import faiss

        self._metric = metric
        self._points = self._ready(points)
        width = self._points.shape[1]
        if approximate:
            faiss.omp_set_num_threads(1)  # the graph depends on the order in which points come into it
            self._index: Any = faiss.IndexHNSWFlat(width, _LINKS)
            self._index.hnsw.efConstruction, self._index.hnsw.efSearch = _BUILD, _SEARCH
        else:
            self._index = faiss.IndexFlatL2(width)
        self._index.add(self._points)

    def nearest(self, queries: Tensor, k: int) -> Rows:
        """Return the rows (Q, k) of the points nearest to `queries` (Q, D), the nearest first. k is at most N."""
        _, rows = self._index.search(self._ready(queries), k)
        return np.asarray(rows)

    def distances(self, query: Tensor, rows: Rows) -> npt.NDArray[np.float32]:
        """Return the distances (k) of points to one query (D): Euclidean, or 1 - cosine. The same point has exactly 0."""
        apart = self._points[rows] - self._ready(query[None])
        squares = (apart * apart).sum(1)
        return np.asarray(np.sqrt(squares) if self._metric == "euclidean" else squares / 2, np.float32)

    def _ready(self, points: Tensor) -> npt.NDArray[np.float32]:
        """Scale points to length 1 for cosine: then the squared Euclidean distance is twice 1 - cosine."""
        if self._metric == "cosine":
            points = torch.nn.functional.normalize(points)
        return np.ascontiguousarray(points.numpy())


@dataclass(frozen=True)
class Retrieval:
    """A measure of how well held-out images find training images of their class."""

    what: str
    width: int
    search: str
    #: Mean share of the 1 and of the k nearest that have the query's label.
    first: float
    precision: float
    #: Mean share of the true k nearest that were found.
    recall: float
    #: Seconds for building the index, and for one query.
    build_s: float
    query_s: float


def measure(what: str, train: Features, test: Features, k: int, metric: Metric) -> list[Retrieval]:
    """Measure the exact and the approximate search in `train` with images of `test`, at most _MEASURED of them, evenly chosen."""
    chosen = torch.arange(0, len(test.values), -(-len(test.values) // _MEASURED))
    queries, labels = test.values[chosen], test.labels[chosen].numpy()
    found = []
    truth: Rows | None = None
    for approximate in (False, True):
        begin = time.perf_counter()
        index = Neighbours(train.values, metric, approximate)
        built = time.perf_counter()
        rows = index.nearest(queries, k)
        end = time.perf_counter()
        truth = rows if truth is None else truth
        same = train.labels.numpy()[rows] == labels[:, None]
        recall = float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(rows, truth, strict=True)]))
        search = "approximate" if approximate else "exact"
        built_s, query_s = built - begin, (end - built) / len(queries)
        found.append(
            Retrieval(what, queries.shape[1], search, float(same[:, 0].mean()), float(same.mean()), recall, built_s, query_s)
        )
    return found


def raw_pixels(samples: Samples) -> Tensor:
    """Return the images themselves as features: float32 (N, C*H*W)."""
    return torch.stack([samples[index][0].flatten() for index in range(len(samples))])


def chance(train: Features, test: Features) -> float:
    """Return the precision of images that are drawn at random."""
    share = [torch.bincount(part.labels, minlength=int(train.labels.max()) + 1) / len(part.labels) for part in (train, test)]
    return float((share[0] * share[1][: len(share[0])]).sum())


def table(found: Sequence[Retrieval], k: int) -> list[tuple[str, ...]]:
    """Return the cells of the table, its head first."""
    cells: list[tuple[str, ...]] = [
        ("features", "numbers", "search", "precision@1", f"precision@{k}", f"recall@{k}", "build", "a query")
    ]
    for r in found:
        shares = (f"{share:.1%}" for share in (r.first, r.precision, r.recall))
        cells.append((r.what, str(r.width), r.search, *shares, f"{r.build_s:.2f} s", f"{r.query_s * 1000:.2f} ms"))
    return cells


def command(
    source: Source,
    asked: Sequence[str],
    layer: str | None,
    k: int,
    metric: Metric,
    approximate: bool,
    retrieval: bool,
    workers: int,
    out: Path | None,
    cluster: Cluster,
) -> list[str]:
    """Run `launch.py similar`. Return the lines to print."""
    run = open_run(source)
    model = weights_at(run, "last")
    layer = find_layer(model, layer) if layer is not None else last_hidden(model)
    images = run.images
    if k > len(images.train):
        raise UsageError(f"-k is {k}, but there are only {len(images.train)} images to train on in '{images.name}'.")
    queries = [ask(text, images) for text in asked]
    features = kept(run, source, layer, workers, cluster)
    train, test = features.part(False), features.part(True)
    index = Neighbours(train.values, metric, approximate)
    rows = []
    for query in queries:
        point = test.values[query.number] if query.number is not None else features_of(model, layer, query.image[None])[0]
        found = index.nearest(point[None], k)[0]
        matches = [
            Match(int(row), int(train.labels[row]), float(distance))
            for row, distance in zip(found, index.distances(point, found), strict=True)
            if row >= 0  # an approximate search may find fewer
        ]
        rows.append(Row(query, sorted(matches, key=lambda match: match.distance)))
    search = "approximate" if approximate else "exact"
    what = f"{run.called(layer)}, {features.values.shape[1]} numbers"
    title = f"Nearest training images of {images.name}, by {what}: {metric} distance, {search} search"
    cells, note = _retrieval(run, train, test, run.called(layer), k, metric) if retrieval else ([], "")
    gallery = Gallery(title, images, rows, cells, note)
    folder = out or run.folder / "similar"
    png, page = draw(gallery, folder / "gallery.png"), write_page(gallery, folder / "gallery.html")
    notes = [f"note: {query.note}" for query in queries if query.note]
    return [*notes, *_markdown(cells), *([note] if note else []), f"the galleries are {png} and {page}"]


def _retrieval(
    run: Trained, train: Features, test: Features, name: str, k: int, metric: Metric
) -> tuple[list[tuple[str, ...]], str]:
    pixels = [
        Features(raw_pixels(samples), part.labels, part.indices, part.held_out)
        for samples, part in ((run.images.train, train), (run.images.test, test))
    ]
    found = [*measure("raw pixels", pixels[0], pixels[1], k, metric), *measure(name, train, test, k, metric)]
    note = (
        f"Precision is the share of the nearest of {len(train.labels)} training images that have the label of a held-out image, "
        f"over {min(len(test.labels), _MEASURED)} of these; by chance it is {chance(train, test):.1%}. "
        "Recall is the share of the truly nearest that a search finds."
    )
    return table(found, k), note


def _markdown(cells: Sequence[tuple[str, ...]]) -> list[str]:
    if not cells:
        return []
    widths = [max(len(line[at]) for line in cells) for at in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
