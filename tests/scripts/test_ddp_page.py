"""The script of the tutorial's page for people who come from DDP trains, with the same result on any cluster."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tutorial" / "coming-from-ddp.md"


@pytest.mark.slow
def test_the_script_trains_alike_on_one_worker_and_on_three(launch, tmp_path: Path) -> None:
    (script,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    (tmp_path / "train.py").write_text(script)
    one, three = (launch("--workers", n, "--servers", 2, "--threads", 1, "train.py", name=f"run{n}") for n in (1, 3))
    assert one["weights_sha256"] == three["weights_sha256"] and one["accuracy"] == three["accuracy"] > 0.9
    assert (one["rounds"], one["accuracy_of"]) == (60, "256 held-out samples, after round 60")
    assert one["saved"] == three["saved"] and one["saved"].keys() == {"best"}
