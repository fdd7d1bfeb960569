"""Spectral norms keep their promise after a merge: of replicas in a run, and of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from roundtable.common.storage.event_log import FILE_NAME, RunLogReader
from roundtable.worker.merge.constraints import put_back
from roundtable.worker.tools.merge_models import merge_files


def network(seed: int) -> nn.Sequential:
    """With spectral norms of both forms, along the first and the second dimension."""
    torch.manual_seed(seed)
    return nn.Sequential(
        spectral_norm(nn.Conv2d(3, 4, 2)),
        spectral_norm(nn.ConvTranspose2d(4, 4, 2)),
        nn.utils.spectral_norm(nn.Conv2d(4, 5, 2)),
        nn.Flatten(),
        spectral_norm(nn.Linear(320, 6)),
        orthogonal(nn.Linear(6, 6)),
        weight_norm(nn.Linear(6, 6)),
    )


def largest(model: nn.Sequential) -> list[float]:
    """The largest singular value of each normalised weight, as an evaluation uses it."""
    model.eval()
    model(torch.randn(1, 3, 9, 9))
    weights = [model[n].weight.detach() for n in (0, 1, 2, 4)]
    weights[1] = weights[1].transpose(0, 1)
    return [float(torch.linalg.matrix_norm(weight.flatten(1), 2)) for weight in weights]  # type: ignore[operator, union-attr]


def test_unit_vectors_fit_weights_that_were_replaced() -> None:
    model = network(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    assert max(largest(model)) > 2
    model.train()
    before = model[1].training, [hook.n_power_iterations for hook in model[2]._forward_pre_hooks.values()]  # type: ignore[union-attr]
    put_back(model)
    assert before == (True, [hook.n_power_iterations for hook in model[2]._forward_pre_hooks.values()])  # type: ignore[union-attr]
    assert largest(model) == pytest.approx([1.0] * 4, abs=0.06)
    once = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = network(1)
    other.load_state_dict(once)
    put_back(other)
    put_back(model)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("how", ["uniform", "weights"])
def test_a_merged_file_has_unit_vectors_that_fit_its_weights(how: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for n, path in enumerate(paths):
        save_file({name: tensor.contiguous() for name, tensor in network(n).state_dict().items()}, path)
    merge_files(paths, tmp_path / "out.safetensors", "uniform", [1.0, 2.0, 0.0] if how == "weights" else None)
    model = network(9)
    model.load_state_dict(load_file(tmp_path / "out.safetensors"))
    assert [float(b.norm()) for b in model.buffers() if b.ndim == 1] == pytest.approx([1.0] * 8)
    assert largest(model) == pytest.approx([1.0] * 4, abs=0.06)


SCRIPT = """
import torch, roundtable
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import TensorDataset
g = torch.Generator().manual_seed(1)
data = TensorDataset(torch.randn(64, 16, generator=g), torch.randint(0, 4, (64,), generator=g))
class Counting(nn.ReLU):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
    def forward(self, x):
        self.seen += len(x)
        return super().forward(x)
run = roundtable.join()
m = nn.Sequential(spectral_norm(nn.Linear(16, 32)), Counting(), spectral_norm(nn.Linear(32, 4)))
run.replicate(m, buffers={"*.seen": "sum"})
run.merge_by(lambda model: 0.0)
opt = run.optimizer(torch.optim.SGD, lr=0.5)
for x, y in run.batches(data, micro_batch=4, global_batch=16, epochs=6):
    cross_entropy(m(x), y).backward()
    opt.step()
m.eval()
run.log(largest=max(float(torch.linalg.matrix_norm(m[n].weight.detach(), 2)) for n in (0, 2)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["average"], ["average", "--average-weights-by", "greedy"], ["local"]], ids=" ".join)
def test_replicas_that_were_merged_keep_them(flags: list[str], launch: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    launch("--workers", 2, "--policy", *flags, tmp_path / "script.py")
    values = [value for *_, value in RunLogReader(tmp_path / "run" / FILE_NAME).metrics("largest")]
    assert len(values) == 2 and all(0.97 < value < 1.1 for value in values)
    found = load_file(tmp_path / "run" / "model.safetensors")
    seen = int(found.pop("1.seen"))  # greedy merges some of the replicas
    assert seen == 64 * 6 if "greedy" not in flags else seen > 0
    units = [t for name, t in found.items() if name.endswith(("._u", "._v"))]
    assert [float(unit.norm()) for unit in units] == pytest.approx([1.0] * 4)
    model = nn.Sequential(spectral_norm(nn.Linear(16, 32)), nn.ReLU(), spectral_norm(nn.Linear(32, 4)))
    model.load_state_dict(found)
    model.eval()
    in_file = max(float(torch.linalg.matrix_norm(model[n].weight.detach(), 2)) for n in (0, 2))  # type: ignore[arg-type]
    assert values == pytest.approx([in_file] * 2, abs=1e-6)
