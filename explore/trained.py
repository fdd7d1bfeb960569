"""Open a finished run: its settings, its images, and its model with weights before, during or after training."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import nn

from roundtable.common.config.batch_plan import derive_seed
from roundtable.common.config.example_settings import parse_shape
from roundtable.common.config.settings import FIELDS, Settings, make_settings, read_toml
from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage import checkpoint
from roundtable.common.storage.model_file import write_model
from roundtable.common.storage.run_files import MODEL_FILE, SETTINGS_FILE, find_run
from roundtable.worker import data
from roundtable.worker.data import Images
from roundtable.worker.data.loader import seed_everything
from roundtable.worker.models import builtin
from roundtable.worker.models.layer_names import short_names
from roundtable.worker.models.user_model import load_factory
from roundtable.worker.tools.builtin_script import load_weights


class Source(msgspec.Struct, frozen=True):
    """The run to look at, and the images: its own if `data` is None.

    `run` is a folder, or the name of one in runs/. If the run trained a user's script, `model_file`, FILE.py:FACTORY, makes its
    model.
    """

    run: str
    data: str | None = None
    data_dir: str | None = None
    model_file: str | None = None


@dataclass(frozen=True)
class Trained:
    """A finished run. `make` returns a new model with weights drawn from torch's global generator."""

    folder: Path
    settings: Settings
    images: Images
    data_dir: str | None
    make: Callable[[], nn.Module]

    @property
    def model_file(self) -> Path:
        return self.folder / MODEL_FILE

    @functools.cached_property
    def model_sha256(self) -> str:
        """Return the hash of the whole file of the trained model, buffers included."""
        with self.model_file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def called(self, layer: str) -> str:
        """Return the short name of `layer`, a name in `named_modules()`."""
        return self._short_names.get(layer, layer)

    @functools.cached_property
    def _short_names(self) -> dict[str, str]:
        return {name: short for short, name in short_names(weights_at(self, "last")).items()}


def open_run(source: Source) -> Trained:
    """Open `source`, and check that its model takes its images.

    Raise UsageError if there is no such run, or if it has no model yet. It is an error too if the model is a user's and
    `model_file` is missing, or if model and images do not fit.
    """
    folder = find_run(source.run)
    settings, script = _read_settings(folder)
    if not (folder / MODEL_FILE).is_file():
        raise UsageError(
            f"the run in {folder} has no {MODEL_FILE}: it has not finished, so there is no trained model to look at."
        )
    if script is not None and source.model_file is None:
        raise UsageError(
            f"the run in {folder} trained the model of a script, {script}: say what makes it with --model-file FILE.py:FACTORY, "
            "where FACTORY is a class or function that takes no arguments."
        )
    if source.model_file is not None and source.data is None:
        raise UsageError("a model of your own needs --data: which images to show it.")
    example = settings.example
    name = source.data or example.data
    data_dir = source.data_dir or (example.data_dir if source.data in (None, example.data) else None)
    own = source.data in (None, example.data)
    shape = parse_shape(example.image) if own and example.image is not None else None
    images = data.load(name, data_dir, settings.seed, augment=False, shape=shape, classes=example.classes if own else None)
    if source.model_file is not None:
        make = load_factory(source.model_file)
    else:
        make = functools.partial(builtin.build, example.model, images.shape, images.classes)
    trained = Trained(folder, settings, images, data_dir, make)
    _check_fit(trained)
    return trained


def weights_at(run: Trained, when: str | Path) -> nn.Module:
    """Return the model of `run` in evaluation mode.

    `when` is 'first' before training, 'last' after it, or the path of a model file or of a checkpoint's folder. The first weights
    are those of --init, or else drawn again from the run's seed. Raise UsageError if a file cannot be read or is of another
    model.
    """
    seed_everything(derive_seed(run.settings.seed, "model"))
    model = run.make()
    if when == "first":
        if run.settings.example.init is not None:
            load_weights(model, Path(run.settings.example.init))
        return model.eval()
    path = run.model_file if when == "last" else Path(when)
    if not path.is_dir():
        load_weights(model, path)
        return model.eval()
    found = checkpoint.read(path)
    if damage := found.damage():
        raise UsageError(damage)
    with tempfile.TemporaryDirectory() as folder:
        write_model(found, Path(folder) / MODEL_FILE)
        load_weights(model, Path(folder) / MODEL_FILE)
    return model.eval()


def checkpoints_of(run: Trained) -> list[Path]:
    """Return the folders of the run's finished checkpoints, oldest first."""
    return checkpoint.finished(run.folder)


def _read_settings(folder: Path) -> tuple[Settings, str | None]:
    """Return the settings of a run, and the script that it trained, None for the built-in example."""
    values = read_toml(folder / SETTINGS_FILE)
    script = values.get("script")
    return make_settings({key: value for key, value in values.items() if key in FIELDS}, str(folder / SETTINGS_FILE)), script


def _check_fit(run: Trained) -> None:
    try:
        with torch.no_grad():
            weights_at(run, "last")(run.images.train[0][0][None])
    except (UsageError, RuntimeError, TypeError, ValueError) as error:
        what = f"images of '{run.images.name}', {'x'.join(map(str, run.images.shape))}"
        raise UsageError(f"the model of {run.folder} does not take {what}: {_reason(error)}.") from None


def _reason(error: Exception) -> str:
    """Return the first of torch's reasons. There may be one for each layer."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[min(1, len(lines) - 1)].rstrip(".")
