"""Settings: what is wrong is refused in one sentence that names the place, the key and a way out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roundtable.common.config.example_settings import parse_shape
from roundtable.common.config.settings import FIELDS, Settings, check_values, choices, flat, make_settings, read_toml
from roundtable.common.runtime.errors import UsageError


def refusal(values: dict[str, Any]) -> str:
    """Why `values` cannot be: checked to be one line that ends like a sentence."""
    with pytest.raises(UsageError) as caught:
        make_settings(values, "run.toml")
    text = str(caught.value)
    assert "\n" not in text and re.search(r"[.?]$", text) and "msgspec" not in text, text
    return text


@pytest.mark.parametrize(
    ("key", "meant"), [("polcy", "policy"), ("worker", "workers"), ("microbatch", "micro_batch"), ("learning-rate", None)]
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(key: str, meant: str | None) -> None:
    text = refusal({key: 1})
    assert text.startswith(f"run.toml: there is no setting '{key.replace('-', '_')}'")
    assert text.endswith(f"did you mean '{meant}'?") if meant else "did you mean" not in text


WRONG = [
    ("workers", 0), ("workers", "two"), ("workers", 2.5), ("workers", None), ("servers", -1), ("policy", "bsp"), ("policy", 3),
    ("global_batch", 0), ("rounds", 0), ("seed", -1), ("max_staleness", -1), ("outer_momentum", 1.0), ("outer_lr", 0),
    ("lr", 0), ("lr", "fast"), ("momentum", 1), ("clip_norm", 0), ("staleness_lr", "yes"), ("delay_compensation", -0.1),
    ("progress_timeout", 0), ("data_dir", 7), ("num_data_workers", -1),
    ("compress_gradients", "zip"), ("compress_weights", "topk"), ("topk_ratio", 0), ("topk_ratio", 1.1),
    ("compress_gradients", "randomk"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_value_that_cannot_be_is_refused_with_file_key_and_value(key: str, value: Any) -> None:
    text = refusal({key: value})
    assert text.startswith(f"run.toml: {key} must be ") and f" (got {value!r})" in text


def test_a_word_that_is_no_choice_is_answered_with_the_choices() -> None:
    words = "must be one of sync, backup, ssp, async, local, average"
    assert refusal({"policy": "bsp"}).endswith(f"{words} (got 'bsp'); did you mean 'ssp'?")
    assert refusal({"policy": "round"}).endswith(f"{words} (got 'round').")
    assert choices("policy") == ("sync", "backup", "ssp", "async", "local", "average")
    assert choices("workers") == choices("data_dir") == ()


@pytest.mark.parametrize("image", ["28", "28x28", "3x224x224x1", "3x0x4", "3X4X4", "axbxc"])
def test_the_size_of_an_image_has_three_numbers(image: str) -> None:
    with pytest.raises(UsageError, match=f"image is '{image}'.*3x224x224"):
        make_settings({"image": image}, "")
    assert parse_shape("3x224x16") == (3, 224, 16)


def test_numbers_are_finite() -> None:
    with pytest.raises(UsageError, match="lr must be a finite number"):
        make_settings({"lr": float("inf")}, "")


@given(st.integers(1, 100), st.integers(1, 100))
def test_a_micro_batch_is_no_larger_than_the_global_batch(global_batch: int, micro_batch: int) -> None:
    values = {"global_batch": global_batch, "micro_batch": micro_batch}
    if micro_batch <= global_batch:
        assert make_settings(values, "").micro_batch == micro_batch
    else:
        text = refusal(values)
        assert f"micro_batch ({micro_batch}) must not exceed global_batch ({global_batch})" in text


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 60))
def test_backup_leaves_at_least_one_micro_batch_to_apply(a: int, b: int, backup: int) -> None:
    values = {"policy": "backup", "global_batch": max(a, b), "micro_batch": min(a, b), "backup_micro_batches": backup}
    count = -(-max(a, b) // min(a, b))
    if backup < count:
        assert make_settings(values, "").backup_micro_batches == backup
    else:
        assert f"a round has only {count} micro-batches" in refusal(values)
    assert make_settings({**values, "policy": "sync"}, "").backup_micro_batches == backup  # elsewhere it means nothing


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"policy": "ssp", "compress_weights": "int8"}, "compress_weights is int8, which sends changes"),
        ({"policy": "async", "compress_weights": "onebit"}, "choose bf16 or fp16, or policy sync or backup"),
        ({"policy": "average", "compress_gradients": "bf16"}, "set compress_gradients to none"),
        ({"policy": "average", "compress_weights": "bf16"}, "policy average takes none"),
        ({"policy": "local", "compress_weights": "fp16"}, "policy local takes none"),
    ],
)
def test_codecs_that_do_not_go_with_the_rest_are_refused(values: dict[str, Any], text: str) -> None:
    assert text in refusal(values)


@pytest.mark.parametrize(
    "values",
    [
        {"policy": "local", "compress_gradients": "topk"},
        {"policy": "backup", "compress_gradients": "onebit", "compress_weights": "onebit"},
        {"policy": "async", "compress_gradients": "topk", "compress_weights": "fp16", "topk_ratio": 1},
    ],
)
def test_codecs_that_go_with_the_rest_are_taken(values: dict[str, Any]) -> None:
    assert make_settings(values, "").compress_gradients == values["compress_gradients"]


def test_files_of_runs_that_did_without_a_setting_that_is_gone_still_open() -> None:
    assert make_settings({"codec_momentum": 0.0}, "") == Settings()
    assert "there is no setting 'codec_momentum'" in refusal({"codec_momentum": 0.9})


def test_keys_may_be_written_with_dashes() -> None:
    assert make_settings({"global-batch": 128, "micro-batch": 32}, "").global_batch == 128
    assert check_values({"outer-lr": 0.5}, "") == {"outer_lr": 0.5}


def test_every_field_has_a_default_and_a_help_text() -> None:
    assert make_settings({}, "") == Settings()
    for name, info in FIELDS.items():
        assert info.default is not msgspec.NODEFAULT, name
        assert "_help(" not in name and re.search(r"\w+\.$", _description(info.type)), name


def _description(annotated: Any) -> str:
    return next(meta.description for meta in annotated.__metadata__ if getattr(meta, "description", None))


@given(st.fixed_dictionaries({}, optional={"workers": st.integers(1, 9), "policy": st.sampled_from(choices("policy")), "rounds": st.none() | st.integers(1, 9), "lr": st.floats(0.001, 9), "staleness_lr": st.booleans()}))  # fmt: skip  # noqa: E501
def test_settings_come_over_the_wire_as_they_were(values: dict[str, Any]) -> None:
    settings = make_settings(values, "")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(settings), type=Settings) == settings
    assert {key: flat(settings)[key] for key in values} == values and make_settings(flat(settings), "") == settings


def test_a_toml_file_is_read_or_refused_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    with pytest.raises(UsageError, match=f"no file {path}"):
        read_toml(path)
    path.write_text("workers = 3\npolicy = 'ssp'\n")
    assert read_toml(path) == {"workers": 3, "policy": "ssp"}
    path.write_text("workers = \n")
    with pytest.raises(UsageError, match=f"{path} is not valid TOML"):
        read_toml(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=f"{path} cannot be read"):
        read_toml(path)
