"""A compiled model keeps the names that its script gave it, and one that changes its dtype too late is told of that."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from train_converted import network

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("train_converted.py")


def test_a_compiled_model_has_the_names_of_the_plain_one(launch: Any, tmp_path: Path) -> None:
    launch("--workers", 2, "--servers", 2, "--checkpoint-every", 2, SCRIPT, "--", "compiled")
    model = network()
    model.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("*/*"))
    assert any(b"0.weight" in file.read_bytes() for file in checkpoints)
    assert not any(b"_orig_mod" in file.read_bytes() for file in checkpoints)


@pytest.mark.parametrize(
    ("mode", "transport", "dtype"), [("before", "auto", "float64"), ("midway", "tcp", "float64"), ("after", "auto", "float16")]
)
def test_a_model_that_is_converted_too_late_is_told_of_that(mode: str, transport: str, dtype: str, launch: Any) -> None:
    sentence = rf"error: .*made '0\.weight' torch\.{dtype}, but servers have it as torch\.float32: convert the model before"
    with pytest.raises(AssertionError, match=sentence):
        launch("--workers", 2, "--transport", transport, SCRIPT, "--", mode)
