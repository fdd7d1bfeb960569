"""Features that three workers compute are those of one process, bit for bit, and the file says what it holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader

from roundtable.common.config.settings import Settings
from roundtable.common.runtime.errors import ClusterError
from roundtable.explore.features import MICRO_BATCH, AllImages, Features, default_file, extract, read
from roundtable.explore.layers import features_of
from roundtable.explore.trained import Source, Trained, weights_at

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("one_thread")
def test_three_workers_compute_what_one_process_does_to_the_bit(run: Trained, features: Features) -> None:
    model = weights_at(run, "last")
    loader = DataLoader(AllImages(run.images.train, run.images.test), batch_size=MICRO_BATCH)
    assert torch.equal(features.values, torch.cat([features_of(model, "10", images) for images, _, _ in loader]))


def test_every_image_has_its_row_its_label_and_its_number(run: Trained, features: Features) -> None:
    assert features.values.shape == (5000, 84) and features.values.dtype == torch.float32
    for held_out, samples in ((False, run.images.train), (True, run.images.test)):
        part = features.part(held_out)
        assert part.indices.tolist() == list(range(len(samples)))
        assert part.labels.tolist() == [samples[index][1] for index in range(len(samples))]


def test_the_file_says_what_it_is_of_and_nothing_else_is_left(run: Trained) -> None:
    path = default_file(run, "10")
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
        assert sorted(file.keys()) == ["features", "held_out", "indices", "labels"]
    assert (told["layer"], told["data"], told["model_sha256"]) == ("relu4", "mnist-5k", run.model_sha256)
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_features_of_another_layer_or_a_damaged_file_are_not_taken_for_these(run: Trained, tmp_path: Path) -> None:
    assert read(default_file(run, "10"), run, "9") is None
    (tmp_path / "cut").write_bytes(default_file(run, "10").read_bytes()[:1000])
    assert read(tmp_path / "cut", run, "10") is None


def test_where_workers_fail_their_logs_are_kept_and_no_file_is_made(run: Trained, tmp_path: Path) -> None:
    def fail(folder: Path, settings: Settings, script: str, args: tuple[str, ...]) -> None:
        (folder / "worker-0.log").touch()
        raise ClusterError("worker-0 failed.")

    with pytest.raises(ClusterError):
        extract(run, Source(str(run.folder)), "10", 2, tmp_path / "out", fail)
    assert len(list(tmp_path.rglob("worker-0.log"))) == 1 and not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_refused(folder: Path, refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal("features", folder, "--layer", "conv1", "--out", tmp_path / "file" / "x")
    assert "conv1 (0)" in refusal("features", folder, "--layer", "conv7")
