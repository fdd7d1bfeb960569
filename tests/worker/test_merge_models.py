"""Model files of several runs are merged into one, or refused in one sentence that says what differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

from roundtable.common.runtime.errors import UsageError
from roundtable.worker import data
from roundtable.worker.models import builtin
from roundtable.worker.tools.merge_models import merge_files

Save = Callable[..., Path]
SETTINGS = 'model = "mlp"\ndata = "digits"\nseed = 0\nglobal_batch = 64\n'


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def run(name: str, tensors: dict[str, torch.Tensor], settings: str = "", samples: int | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        if settings:
            (folder / "settings.toml").write_text(settings)
        if samples is not None:
            (folder / "summary.json").write_text(json.dumps({"samples": samples}))
        return folder

    return run


def refusal(*arguments: Any, **more: Any) -> str:
    with pytest.raises(UsageError) as caught:
        merge_files(*arguments, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_count_all_the_same_by_samples_or_as_asked(save: Save, tmp_path: Path) -> None:
    start = 'script = "train.py"\nseed = 0\n'
    a = save("a", {"w": torch.tensor([0.0, 4.0]), "n": torch.tensor(3)}, start, samples=100)
    b = save("b", {"w": torch.tensor([8.0, 0.0]), "n": torch.tensor(2)}, start, samples=300)
    torch.save(load_file(b / "model.safetensors"), b / "model.pt")
    out = tmp_path / "out.safetensors"
    expected: dict[str, list[float]] = {"uniform": [4.0, 2.0], "samples": [6.0, 1.0]}
    for how, values in expected.items():
        merged = merge_files([a, b], out, how, overwrite=True)
        assert load_file(out)["w"].tolist() == values and load_file(out)["n"].item() == 3
        assert merged.warnings == [] and merged.accuracy is None
    assert merge_files([a, b / "model.pt"], out, "uniform", [3, 1], overwrite=True).weights == [3, 1]
    assert load_file(out)["w"].tolist() == [2.0, 3.0]
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["merged"]) == {str(a / "model.safetensors"): 3, str(b / "model.pt"): 1}


def test_buffers_are_merged_as_the_runs_have_merged_them(tmp_path: Path) -> None:
    paths, rules = [tmp_path / name for name in "ab"], {"queue": "last", "tokens": "sum", "norm": "mean", "gone": "last"}
    for n, path in enumerate(paths):
        tensors = {"queue": torch.full((2,), float(n)), "tokens": torch.tensor(4 + n), "norm": torch.tensor(2.0 * n)}
        save_file(tensors, path, metadata={"buffers": json.dumps(rules)})
    out = tmp_path / "out.safetensors"
    merge_files(paths, out, "uniform")
    merge_files([out, paths[0]], tmp_path / "again.safetensors", "uniform")
    found, again = load_file(out), load_file(tmp_path / "again.safetensors")
    assert (found["queue"].tolist(), found["tokens"].item(), found["norm"].item()) == ([1.0, 1.0], 9, 1.0)
    assert (again["queue"].tolist(), again["tokens"].item(), again["norm"].item()) == ([0.0, 0.0], 13, 0.5)
    save_file({"queue": torch.zeros(2)}, paths[0], metadata={"buffers": "no"})
    save_file({"queue": torch.ones(2)}, paths[1])
    merge_files(paths, out, "uniform", overwrite=True)
    assert load_file(out)["queue"].tolist() == [0.5, 0.5]


def test_what_cannot_be_merged_is_named(save: Save, tmp_path: Path) -> None:
    a = save("a", {"w": torch.zeros(2), "v": torch.zeros(1)})
    out = tmp_path / "out.safetensors"
    assert "has no tensor 'v'" in refusal([a, save("b", {"w": torch.zeros(2)})], out, "uniform")
    shape = save("c", {"w": torch.zeros(3), "v": torch.zeros(1)})
    assert f"'w' is float32 [2] in {a / 'model.safetensors'} and float32 [3] in {shape}" in refusal([a, shape], out, "uniform")
    kind = save("d", {"w": torch.zeros(2).half(), "v": torch.zeros(1)})
    assert "float16 [2]" in refusal([a, kind], out, "uniform")
    assert "one model alone" in refusal([a], out, "uniform")
    assert "there is no file" in refusal([a, tmp_path / "no"], out, "uniform")
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "bad.pt").write_bytes(b"x" * 100)
    torch.save({"model": {"w": torch.zeros(2)}}, tmp_path / "nested.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    for name in ("bad.safetensors", "bad.pt", "nested.pt", "module.pt"):
        assert str(tmp_path / name) in refusal([a, tmp_path / name], out, "uniform")
    assert "summary.json" in refusal([a, a], out, "samples")
    assert "--how uniform" in refusal([a, a], out, "greedy")
    assert "3 weights for 2 models" in refusal([a, a], out, "uniform", [1, 1, 1])
    assert "not all 0" in refusal([a, a], out, "uniform", [0, 0])
    assert not out.exists()
    merge_files([a, a], out, "uniform")
    assert "--overwrite" in refusal([a, a], out, "uniform")


def test_a_warning_says_that_starts_differed_or_that_nobody_knows(save: Save, tmp_path: Path) -> None:
    tensors, out = {"w": torch.zeros(2)}, tmp_path / "out.safetensors"
    a, b = save("a", tensors, "seed = 0\n"), save("b", tensors, "seed = 1\n")
    c = save("c", tensors)
    assert "started from different weights (seed 0 and 1)" in merge_files([a, b], out, "uniform").warnings[0]
    d, e = (save(name, tensors, f'seed = {seed}\ninit = "w.pt"\n') for name, seed in (("d", 0), ("e", 1)))
    assert merge_files([d, e], out, "uniform", overwrite=True).warnings == []
    unknown = merge_files([a, c], out, "uniform", overwrite=True).warnings[0]
    assert "not known" in unknown and str(c / "model.safetensors") in unknown


def test_averaged_statistics_of_batch_normalisation_are_warned_of_where_the_data_is_not_known(save: Save, tmp_path: Path) -> None:
    a = save("a", nn.Sequential(nn.BatchNorm1d(2)).state_dict())
    assert "update_bn" in merge_files([a, a], tmp_path / "out.safetensors", "uniform").warnings[-1]


def test_greedy_takes_the_parts_that_help_on_held_out_images(save: Save, tmp_path: Path, one_thread: None) -> None:
    images = data.load("digits", None, 0)
    torch.manual_seed(0)
    model = builtin.build("mlp", images.shape, images.classes)
    parts = [save("start", model.state_dict(), SETTINGS)]
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.stack([images.train[i][0] for i in range(600)])
    y = torch.tensor([images.train[i][1] for i in range(600)])
    for _ in range(2):
        for _ in range(20):
            opt.zero_grad()
            cross_entropy(model(x), y).backward()
            opt.step()
        parts.append(save(f"part-{len(parts)}", model.state_dict(), SETTINGS))
    ruined = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    parts.append(save("ruined", ruined, SETTINGS))
    merged = merge_files(parts, tmp_path / "out.safetensors", "greedy")
    assert merged.weights[3] == 0 and merged.weights[2] == 1
    assert merged.accuracy is not None and merged.parts_accuracy is not None
    assert merged.accuracy > 0.8 > merged.parts_accuracy[3]


def test_of_runs_of_the_built_in_example_the_statistics_of_batch_normalisation_fit_the_mean(
    save: Save, tmp_path: Path, one_thread: None
) -> None:
    images = data.load("digits", None, 0)
    model = builtin.build("cnn", images.shape, images.classes)
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("running_var"):
            tensor.fill_(100.0)
    settings = SETTINGS.replace("mlp", "cnn")
    parts = [save(name, state, settings) for name in ("a", "b")]
    merged = merge_files(parts, tmp_path / "out.safetensors", "uniform")
    assert merged.warnings == []
    assert float(load_file(tmp_path / "out.safetensors")["1.running_var"].max()) < 50
