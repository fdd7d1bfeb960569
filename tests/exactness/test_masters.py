"""`run.masters()` has the weights of the model's file where a codec rounds those that workers train with, and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("train_masters.py")


@pytest.mark.parametrize(
    ("codec", "flags"),
    [("bf16", ()), ("int8", ("--transport", "tcp")), ("bf16", ("--policy", "async"))],
    ids=["bf16", "int8", "async"],
)
def test_the_servers_own_weights_can_be_evaluated(codec: str, flags: tuple[str, ...], launch: Any, tmp_path: Path) -> None:
    hashes = set()
    for number, what in enumerate(("looks", "trains")):
        name, saved = f"run{number}", tmp_path / f"{number}.pt"
        flags_ = ("--workers", 1, "--servers", 2, "--compress-weights", codec, *flags)
        hashes.add(launch(*flags_, SCRIPT, "--", what, saved, name=name)["weights_sha256"])
        before, inside, after = torch.load(saved)
        file = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(inside[key], file[key]) for key in file)
        assert all(torch.equal(before[key], after[key]) for key in file)
        assert not torch.equal(before["0.weight"], file["0.weight"])
    assert len(hashes) == 1
