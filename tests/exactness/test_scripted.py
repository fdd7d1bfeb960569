"""A scripted model ends with the same bits, whatever number of calls to it each worker makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("train_scripted.py")


def test_a_scripted_model_has_the_same_bits_on_any_cluster(launch: Any) -> None:
    one = launch("--workers", 1, "--servers", 1, SCRIPT, name="one")
    two = launch("--workers", 2, "--servers", 2, "--transport", "tcp", SCRIPT, name="two")
    assert one["weights_sha256"] == two["weights_sha256"]
