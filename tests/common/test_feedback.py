"""A worker's codec state: committed when counted, and kept by parameter over any layout."""

from __future__ import annotations

from collections.abc import Hashable
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from common.codecs import State
from common.codecs.chunks import coded_runs
from common.codecs.feedback import Feedback
from common.errors import UsageError
from common.layout import Layout, TensorSpec, make_layout

shapes = st.sampled_from([[40, 30], [32, 32], [5], [3, 4], [70, 2, 20]])
models = st.lists(shapes, min_size=1, max_size=8)
chunk_sizes = st.sampled_from([1000, 4096, 10_000, 64 << 10])


def layout_of(shapes: list[list[int]], servers: int = 1, chunk_bytes: int = 4 << 20) -> Layout:
    with mock.patch("common.layout.CHUNK_BYTES", chunk_bytes):
        return make_layout([TensorSpec(f"layer.{n}/w", shape, "float32", 0) for n, shape in enumerate(shapes)], servers)


def coded_numel(layout: Layout, chunk: int) -> int:
    return sum(length for _, length in coded_runs(layout, layout.chunks[chunk]))


def filled(layout: Layout, leave_out: frozenset[int] = frozenset()) -> Feedback:
    """Every element of every state has a value of its own, but those of the chunks left out."""
    feedback, at = Feedback(layout), 1.0
    for chunk in layout.chunks:
        numel = coded_numel(layout, chunk.id)
        if numel and chunk.id not in leave_out:
            values = torch.arange(at, at + numel)
            feedback.sent(chunk.id, "try", {"residual": values, "velocity": -values})
            assert feedback.commit(chunk.id, "try")
        at += numel
    return feedback


class Commits(RuleBasedStateMachine):
    """Two chunks; a model that keeps what was committed and what is pending as plain values."""

    def __init__(self) -> None:
        super().__init__()
        self.feedback = Feedback(layout_of([[40, 30], [40, 30]], chunk_bytes=4800))
        self.committed: dict[int, State] = {}
        self.pending: dict[int, tuple[Hashable, State]] = {}

    @rule(chunk=st.integers(0, 1), key=st.integers(0, 3), value=st.floats(-1, 1, width=32))
    def send(self, chunk: int, key: int, value: float) -> None:
        state = {"residual": torch.full((1200,), value)}
        self.feedback.sent(chunk, key, state)
        self.pending[chunk] = (key, state)

    @rule(chunk=st.integers(0, 1), key=st.integers(0, 3))
    def send_without_a_state(self, chunk: int, key: int) -> None:
        self.feedback.sent(chunk, key, None)
        self.pending.pop(chunk, None)

    @rule(chunk=st.integers(0, 1), key=st.integers(0, 3))
    def count(self, chunk: int, key: int) -> None:
        due = chunk in self.pending and self.pending[chunk][0] == key
        assert self.feedback.commit(chunk, key) == due
        if due:
            self.committed[chunk] = self.pending.pop(chunk)[1]

    @rule(chunk=st.integers(0, 1), key=st.integers(0, 3))
    def refuse(self, chunk: int, key: int) -> None:
        self.feedback.drop(chunk, key)
        if chunk in self.pending and self.pending[chunk][0] == key:
            del self.pending[chunk]

    @rule(chunk=st.integers(0, 1))
    def look(self, chunk: int) -> None:
        assert self.feedback.state(chunk) is self.committed.get(chunk)


TestCommits = Commits.TestCase


def test_a_newer_frame_of_a_chunk_replaces_the_pending_one() -> None:
    feedback = Feedback(layout_of([[32, 32]]))
    old, new = ({"residual": torch.full((1024,), value)} for value in (1.0, 2.0))
    feedback.sent(0, (5, 0), old)
    feedback.sent(0, (5, 1), new)
    assert not feedback.commit(0, (5, 0)) and feedback.state(0) is None
    assert feedback.commit(0, (5, 1)) and feedback.state(0) is new
    assert not feedback.commit(0, (5, 1))


@given(models, st.integers(1, 3), st.integers(1, 3), chunk_sizes, chunk_sizes, st.frozensets(st.integers(0, 3)))
def test_state_survives_another_layout(
    shapes: list[list[int]], m: int, n: int, first: int, second: int, leave_out: frozenset[int]
) -> None:
    saved = filled(layout_of(shapes, m, first), leave_out).state_dict()
    other = Feedback(layout_of(shapes, n, second))
    other.load_state_dict(saved)
    again = other.state_dict()
    assert all(torch.equal(again[key], values) for key, values in saved.items())
    assert not any(values.any() for key, values in again.items() if key not in saved)  # a packed neighbour may have zeros
    back = Feedback(layout_of(shapes, m, first))
    back.load_state_dict(again)
    original = filled(layout_of(shapes, m, first), leave_out)
    for chunk in layout_of(shapes, m, first).chunks:
        before, after = original.state(chunk.id), back.state(chunk.id)
        if before is None:
            assert after is None or not any(values.any() for values in after.values())
        else:
            assert after is not None and all(torch.equal(after[name], values) for name, values in before.items())


def test_names_are_the_parameters_and_small_ones_have_no_state() -> None:
    layout = layout_of([[40, 30], [40], [32, 32]])
    saved = filled(layout).state_dict()
    shapes = {
        f"{state}/{name}": n for state in ("residual", "velocity") for name, n in [("layer.0/w", (1200,)), ("layer.2/w", (1024,))]
    }
    assert {key: tuple(values.shape) for key, values in saved.items()} == shapes
    assert saved["residual/layer.2/w"][0] == 1201


def test_what_is_loaded_for_a_chunk_of_one_parameter_is_not_copied() -> None:
    layout = layout_of([[40, 30]], chunk_bytes=2400)
    saved = {"residual/layer.0/w": torch.arange(1200.0)}
    feedback = Feedback(layout)
    feedback.load_state_dict(saved)
    second = feedback.state(1)
    assert second is not None and second["residual"].data_ptr() == saved["residual/layer.0/w"][600:].data_ptr()


def test_loading_forgets_what_was_there() -> None:
    layout = layout_of([[32, 32]])
    feedback = filled(layout)
    feedback.sent(0, "later", {"residual": torch.ones(1024)})
    feedback.load_state_dict({})
    assert feedback.state(0) is None and not feedback.commit(0, "later") and feedback.state_dict() == {}


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("residual/layer.0/w", torch.zeros(1000)),
        ("residual/layer.0/w", torch.zeros(1024, dtype=torch.float64)),
        ("residual/layer.1/w", torch.zeros(5)),  # too small to be compressed
        ("residual/other", torch.zeros(1024)),
        ("residual", torch.zeros(1024)),
    ],
)
def test_state_of_another_model_is_refused_by_name(key: str, values: torch.Tensor) -> None:
    with pytest.raises(UsageError, match=f"'{key}'"):
        Feedback(layout_of([[32, 32], [5]])).load_state_dict({key: values})
