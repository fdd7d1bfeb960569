"""Merging the model files of several runs into one: what `launch.py merge` does."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from roundtable.common.config.settings import Settings, make_settings
from roundtable.common.protocol.model_spec import Rule
from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage.model_file import read_rules, read_weights
from roundtable.common.storage.run_files import MODEL_FILE, SETTINGS_FILE, SUMMARY_FILE
from roundtable.common.storage.safetensors_header import BUFFERS
from roundtable.worker import data
from roundtable.worker.merge import batchnorm
from roundtable.worker.merge.averaging import greedy, mean
from roundtable.worker.merge.constraints import fitted
from roundtable.worker.models import builtin
from roundtable.worker.tools.builtin_script import accuracy, halves

Tensors = Mapping[str, torch.Tensor]

#: Settings that every run of the built-in example has.
_NEEDED = {"model", "data"}


@dataclass(frozen=True)
class Part:
    """A trained model, and the settings and summary beside it. Both are empty if there are none."""

    path: Path
    tensors: Tensors
    #: The rules that merge its buffers, as far as the file has them.
    rules: Mapping[str, Rule]
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Merged:
    """The result of a merge.

    `weights` are the weight of each part. `warnings` has one sentence each. The accuracies, of the parts and of the merged model,
    are on held-out images that did not choose between models. They are None if there are no such images.
    """

    weights: list[float]
    warnings: list[str]
    parts_accuracy: list[float] | None
    accuracy: float | None


def merge_files(
    paths: Sequence[Path], out: Path, how: str, weights: Sequence[float] | None = None, overwrite: bool = False
) -> Merged:
    """Write the mean of models to `out`, a safetensors file, and return the weights used, warnings and accuracies.

    `paths` are safetensors files, state_dicts of torch.save, or run directories. `how` is `uniform`, `samples` (weighted by the
    samples of each run) or `greedy` (see `roundtable.worker.merge.averaging.greedy`). Greedy is for runs of the built-in
    example, and measures on half of their held-out images. `weights`, one for each model, replace `how`. For runs of the
    built-in example, statistics of batch normalisation are computed again.

    Raises UsageError for files that are no models, for models with other names, shapes or dtypes, and if something needed is
    missing.
    """
    if len(paths) < 2:
        raise UsageError("one model alone cannot be merged: give two or more.")
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists: give --overwrite to replace it, or another --out.")
    parts = [read_part(path) for path in paths]
    for part in parts[1:]:
        check_alike(parts[0], part)
    warnings = starts(parts)
    judge = None
    try:
        judge = _judge(parts)
    except UsageError as error:
        if how == "greedy" and weights is None:
            raise
        warnings.append(f"not measured: {error}")
    tensors = [part.tensors for part in parts]
    weights = _weights(parts, how, judge) if weights is None else _checked(weights, parts)
    rules = next((part.rules for part in parts if part.rules), {})
    merged = fitted(
        mean(tensors, weights, rules), next(t for t, weight in zip(reversed(tensors), reversed(weights), strict=True) if weight)
    )
    measured = None
    if judge is not None:
        merged, measured = judge.with_fitting_statistics(merged), [judge.judge(part.tensors) for part in parts]
    elif any(name.endswith("running_mean") for name in merged):
        warnings.append(
            "running statistics of batch normalisation were averaged, and do not fit the mean of the weights: compute them again "
            "with torch.optim.swa_utils.update_bn."
        )
    _write(out, merged, {str(part.path): weight for part, weight in zip(parts, weights, strict=True)}, rules)
    return Merged(list(weights), warnings, measured, judge.judge(merged) if judge is not None else None)


def read_part(path: Path) -> Part:
    """Return the model at `path`. Raises UsageError if there is none."""
    path = path / MODEL_FILE if path.is_dir() else path
    found, rules = read_weights(path), read_rules(path)
    return Part(path, found, rules, _beside(path, SETTINGS_FILE, tomllib.loads), _beside(path, SUMMARY_FILE, json.loads))


def _beside(model: Path, name: str, parse: Callable[[str], Any]) -> Mapping[str, Any]:
    try:
        values: Mapping[str, Any] = parse((model.parent / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values


def check_alike(one: Part, other: Part) -> None:
    """Raise UsageError with the first difference in names, shapes or dtypes."""
    for name in [*one.tensors, *other.tensors]:
        for has, lacks in ((one, other), (other, one)):
            if name not in lacks.tensors:
                raise UsageError(f"{lacks.path} has no tensor '{name}', which {has.path} has: such models cannot be merged.")
        a, b = one.tensors[name], other.tensors[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise UsageError(
                f"'{name}' is {_kind(a)} in {one.path} and {_kind(b)} in {other.path}: such models cannot be merged."
            )


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def starts(parts: Sequence[Part]) -> list[str]:
    """Return warnings if the models started from different weights, or if that is not known."""
    unknown = [str(part.path) for part in parts if not part.settings]
    if unknown:
        names = ", ".join(unknown)
        return [f"it is not known whether all started from the same weights: there is no settings.toml next to {names}."]
    given = any(part.settings.get("init") for part in parts)
    for key in ("script", "model", "init" if given else "seed"):  # the first weights depend on these
        values = list(dict.fromkeys(str(part.settings.get(key)) for part in parts))
        if len(values) > 1:
            differ = f"{key} {' and '.join(values)}"
            return [f"they started from different weights ({differ}): the mean of such models is seldom any good."]
    return []


def _weights(parts: Sequence[Part], how: str, judge: _Judge | None) -> Sequence[float]:
    if how == "uniform":
        return [1.0] * len(parts)
    if how == "samples":
        return [_samples(part) for part in parts]
    if judge is None:
        raise UsageError(
            "greedy measures on held-out images of the built-in example, but there is no settings.toml of such a run next to "
            "each model: give --how uniform, samples, or --weights."
        )
    chosen = greedy(*judge.contest([part.tensors for part in parts]))
    return [float(number in chosen) for number in range(len(parts))]


def _checked(weights: Sequence[float], parts: Sequence[Part]) -> Sequence[float]:
    if len(weights) != len(parts):
        raise UsageError(f"there are {len(weights)} weights for {len(parts)} models: give one for each.")
    if not all(0 <= weight < float("inf") for weight in weights) or not sum(weights):
        raise UsageError("weights must be numbers that are not negative, and not all 0.")
    return weights


def _samples(part: Part) -> float:
    samples = part.summary.get("samples")
    if not isinstance(samples, int) or samples < 1:
        raise UsageError(
            f"next to {part.path} there is no summary.json that tells its samples: give --weights, or --how uniform."
        )
    return float(samples)


class _Judge:
    """Measures models of the built-in example. Half of its held-out images choose a model, and the other half measures it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._images = data.chosen(settings)
        self._model = builtin.build(settings.example.model, self._images.shape, self._images.classes)
        self._choosing, self._judging = halves(self._images.test)

    def contest(self, parts: Sequence[Tensors]) -> tuple[list[float], Callable[[Sequence[int]], float]]:
        """Return the parts' own scores, and a function that returns the score of the mean of some."""

        def score(numbers: Sequence[int]) -> float:
            self.with_fitting_statistics(mean([parts[number] for number in numbers], [1.0] * len(numbers)))
            return accuracy(self._model, self._choosing)

        return [score([number]) for number in range(len(parts))], score

    def with_fitting_statistics(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Return the same weights with statistics of batch normalisation that fit them."""
        self.load(tensors)
        batchnorm.recompute(self._model, self._images.train, self._settings.global_batch, self._settings.seed)
        return {name: tensor.clone() for name, tensor in self._model.state_dict().items()}

    def judge(self, tensors: Tensors) -> float:
        self.load(tensors)
        return accuracy(self._model, self._judging)

    def load(self, tensors: Tensors) -> None:
        try:
            self._model.load_state_dict(tensors)
        except RuntimeError as error:
            line = str(error).splitlines()[-1].strip()
            raise UsageError(f"the weights do not fit the model '{self._settings.example.model}': {line}") from None


def _judge(parts: Sequence[Part]) -> _Judge | None:
    """Return None if the parts are not of the built-in example. Raises UsageError if they are, but its data is missing."""
    if not all(part.settings.keys() >= _NEEDED and "script" not in part.settings for part in parts):
        return None
    judge = _Judge(make_settings(dict(parts[0].settings), str(parts[0].path.with_name(SETTINGS_FILE))))
    judge.load(parts[0].tensors)
    return judge


def _write(out: Path, tensors: Tensors, weights: Mapping[str, float], rules: Mapping[str, Rule]) -> None:
    temporary = out.with_name(out.name + ".tmp")
    try:
        metadata = {"format": "pt", "merged": json.dumps(weights), BUFFERS: json.dumps(rules)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{out} cannot be written: {error}.") from None
