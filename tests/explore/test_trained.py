"""Runs are found and opened, their weights of before and after training are the right ones, and refusals say what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from roundtable.cluster.run.run_directory import write_settings
from roundtable.common.config.settings import Settings
from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage.run_files import find_run
from roundtable.explore.trained import Source, Trained, checkpoints_of, open_run, weights_at

MODEL = """
import torch
class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, 10))
def broken():
    raise ValueError("no")
"""


@pytest.fixture
def users_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of a user's script in runs/mine, and the model's file net.py beside it."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(MODEL)
    folder = Path("runs/mine")
    folder.mkdir(parents=True)
    write_settings(folder / "settings.toml", Settings(), "train.py")
    save_file({"1.weight": torch.ones(10, 64), "1.bias": torch.zeros(10)}, folder / "model.safetensors")
    return folder


def test_the_first_weights_are_those_that_the_run_began_with(launch: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    launch("--data", "digits", "--seed", 3, "--rounds", 1, "--lr", 1e-30, "--workers", 1, "--servers", 1)
    run = open_run(Source(str(tmp_path / "run")))
    first, last = (weights_at(run, when).state_dict() for when in ("first", "last"))
    assert all(torch.equal(first[name], last[name]) for name in first) and first.keys() == last.keys()


def test_the_last_weights_are_the_trained_ones_and_a_file_stands_for_any_time(run: Trained) -> None:
    trained = load_file(run.model_file)
    for when in ("last", run.model_file):
        found = weights_at(run, when)
        assert not found.training
        assert all(torch.equal(tensor, trained[name]) for name, tensor in found.state_dict().items())
    assert not torch.equal(weights_at(run, "first").state_dict()["0.weight"], trained["0.weight"])


def test_the_last_checkpoint_has_the_last_weights_and_an_earlier_one_others(run: Trained) -> None:
    last = weights_at(run, "last").state_dict()
    earlier, newest = (weights_at(run, folder).state_dict() for folder in checkpoints_of(run)[-2:])
    assert all(torch.equal(newest[name], last[name]) for name in last)
    assert not torch.equal(earlier["0.weight"], last["0.weight"])


def test_a_run_is_found_by_its_folder_and_by_its_name(users_run: Path) -> None:
    assert find_run("mine") == find_run("runs/mine") == users_run
    with pytest.raises(UsageError, match=r"run 'yours' not found.* mine"):
        find_run("yours")


def test_a_model_of_ones_own_is_made_by_its_factory(users_run: Path) -> None:
    found = open_run(Source("mine", data="digits", model_file="net.py:Net"))
    layer = weights_at(found, "last").get_submodule("1")
    assert isinstance(layer, nn.Linear) and (layer.weight == 1).all()


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (Source("mine"), "script, train.py: say what makes it with --model-file"),
        (Source("mine", model_file="net.py:Net"), "needs --data"),
        (Source("mine", "digits", None, "nets.py:Net"), "no file nets.py"),
        (Source("mine", "digits", None, "net.py:Nets"), "made no model: AttributeError"),
        (Source("mine", "digits", None, "net.py:broken"), "made no model: ValueError: no"),
        (Source("mine", "digits", None, "net.py:torch.nn"), "made no model"),
        (Source("mine", "mnist-5k", None, "net.py:Net"), "does not take images of 'mnist-5k', 1x28x28"),
        (Source("mine", "letters", None, "net.py:Net"), "no data source 'letters'"),
    ],
)
def test_what_does_not_fit_is_refused(users_run: Path, source: Source, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        open_run(source)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_run_without_a_trained_model_and_one_whose_file_is_that_of_another_is_refused(
    folder: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    shutil.copy(folder / "settings.toml", tmp_path)
    assert "has not finished" in refusal("features", tmp_path, "--layer", "conv1")
    save_file({"0.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "give the weights of the same model" in refusal("filters", tmp_path)
    assert "'digits'" in refusal("filters", folder, "--data", "digits")
