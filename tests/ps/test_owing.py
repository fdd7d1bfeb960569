"""What codecs have left out and servers keep: dealt out to workers, taken from who leaves, and in snapshots of any layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from roundtable.common.config.settings import Settings
from roundtable.common.model.layout import Layout, make_layout
from roundtable.common.model.tensor_bytes import to_frame
from roundtable.common.protocol.messages.gradients import Residual
from roundtable.common.protocol.model_spec import TensorSpec
from roundtable.common.protocol.transport import SEND_AGAIN_S, Frames
from roundtable.common.runtime.errors import WireError
from roundtable.common.storage import tensor_file
from roundtable.common.storage.tensor_file import TensorFiles
from roundtable.ps.params.residuals import ResidualStore

SETTINGS = Settings(workers=2, compress_gradients="topk", topk_momentum=0.5)


def layout_of(servers: int) -> Layout:
    specs = [TensorSpec(f"layer.{n}", [1200, 1000], "float32", 0) for n in range(2)]
    return make_layout([*specs, TensorSpec("bias", [5], "float32", 0)], servers)


def owing_of(layout: Layout, server: int, settings: Settings = SETTINGS) -> ResidualStore:
    return ResidualStore(layout, layout.on(server), settings)


def numel(layout: Layout, chunk: int) -> int:
    """Elements that are compressed: all but the bias."""
    return sum(piece.length for piece in layout.chunks[chunk].pieces if layout.tensors[piece.tensor].name != "bias")


def told(layout: Layout, server: int, value: float, cut: int = -1) -> list[tuple[Residual, Frames]]:
    """What a worker that has left out `value` of every element says."""
    ids = [chunk.id for chunk in layout.on(server) if numel(layout, chunk.id)]
    return [
        (
            Residual(chunk, ["residual", "velocity"], len(ids), number, cut),
            [to_frame(torch.full((numel(layout, chunk),), value)), to_frame(torch.full((numel(layout, chunk),), 2 * value))],
        )
        for number, chunk in enumerate(ids)
    ]


def leaves(owing: ResidualStore, worker: str, layout: Layout, value: float) -> None:
    """A worker of server 0 hands over all that it has left out."""
    for owed, frames in told(layout, 0, value):
        owing.takes(worker, owed, frames)


def held(owing: ResidualStore) -> set[float]:
    """The residuals that it has."""
    return {float(x) for e in owing.end() if e.name.startswith("owed/residual") for part in e.parts for x in part.unique()}


def values(handed: list[tuple[Residual, Frames]]) -> set[tuple[float, ...]]:
    return {tuple(float(torch.frombuffer(bytearray(frame), dtype=torch.float32)[0]) for frame in frames) for _, frames in handed}


def test_who_leaves_hands_over_all_once_and_the_next_one_gets_it() -> None:
    layout = layout_of(1)
    owing = owing_of(layout, 0)
    messages = told(layout, 0, 3.0)
    assert len(messages) > 1
    for owed, frames in [*messages[:1], *messages]:
        assert owing.hand_out("worker-1", 0.0) == []
        owing.takes("worker-0", owed, frames)
    owing.takes("worker-0", *messages[0])  # late, again
    assert owing.hand_out("worker-0", 0.0) == []  # it is on its way out
    handed = owing.hand_out("worker-1", 0.0)
    assert values(handed) == {(3.0, 6.0)} and [owed.chunk for owed, _ in handed] == [owed.chunk for owed, _ in messages]
    assert owing.hand_out("worker-1", 0.0) == []


def test_what_is_not_acknowledged_is_sent_again_and_is_not_lost_with_its_worker() -> None:
    layout = layout_of(1)
    owing = owing_of(layout, 0)
    leaves(owing, "worker-0", layout, 3.0)
    first, *rest = owing.hand_out("worker-1", 0.0)
    owing.got("worker-1", first[0].number)
    assert not owing.again(SEND_AGAIN_S / 2)
    assert [(worker, owed) for worker, owed, _ in owing.again(SEND_AGAIN_S)] == [("worker-1", owed) for owed, _ in rest]
    owing.has_left("worker-1")
    assert not owing.again(2 * SEND_AGAIN_S)
    again = owing.hand_out("worker-2", 0.0)
    assert [owed.chunk for owed, _ in again] == [owed.chunk for owed, _ in rest] and values(again) == {(3.0, 6.0)}


def test_what_was_under_way_to_who_leaves_is_for_another_unless_it_says_that_it_came() -> None:
    layout = layout_of(1)
    owing = owing_of(layout, 0)
    leaves(owing, "worker-0", layout, 3.0)
    first, *rest = owing.hand_out("worker-1", 0.0)
    for owed, frames in told(layout, 0, 4.0):
        owing.takes("worker-1", replace(owed, taken=[first[0].number]), frames)
    assert not owing.again(SEND_AGAIN_S)
    handed = [owing.hand_out("worker-2", 0.0) for _ in range(3)]
    assert values(handed[0]) == {(4.0, 8.0)} and len(handed[0]) == 1 + len(rest)
    assert values(handed[1]) == {(3.0, 6.0)} and [owed.chunk for owed, _ in handed[1]] == [owed.chunk for owed, _ in rest]
    assert handed[2] == []


def test_two_shares_that_did_not_arrive_are_both_for_another() -> None:
    layout = layout_of(1)
    owing = owing_of(layout, 0)
    leaves(owing, "worker-0", layout, 3.0)
    leaves(owing, "worker-1", layout, 4.0)
    assert values([*owing.hand_out("worker-2", 0.0), *owing.hand_out("worker-2", 0.0)]) == {(3.0, 6.0), (4.0, 8.0)}
    owing.has_left("worker-2")
    assert values(owing.hand_out("worker-3", 0.0)) == {(7.0, 14.0)}


def test_a_snapshot_waits_for_all_who_are_there_and_has_their_sum() -> None:
    layout = layout_of(1)
    owing = owing_of(layout, 0)
    owing.begin(7, ["worker-0", "worker-1", "worker-2", "worker-3"])
    assert [owing.asks(f"worker-{n}") for n in (0, 4)] == [7, -1]
    for worker in (0, 1):
        for owed, frames in told(layout, 0, 1.0 + worker, cut=7):
            owing.takes(f"worker-{worker}", owed, frames)
            owing.takes(f"worker-{worker}", owed, frames)
    for owed, frames in told(layout, 0, 50.0, cut=6):
        owing.takes("worker-2", owed, frames)  # of another snapshot
    assert owing.asks("worker-0") == -1 and not owing.complete(0.0)
    leaves(owing, "worker-2", layout, 4.0)
    owing.has_left("worker-3")
    assert owing.complete(0.0)
    assert held(owing) == {1.0 + 2.0 + 4.0}


def test_who_tells_for_a_snapshot_and_then_leaves_is_in_it_once() -> None:
    layout = layout_of(1)
    owing = owing_of(layout, 0)
    owing.begin(7, ["worker-0", "worker-1", "worker-2"])
    for worker in ("worker-0", "worker-1"):
        for owed, frames in told(layout, 0, 1.0, cut=7):
            owing.takes(worker, owed, frames)
    owing.has_left("worker-1")  # killed, but what it had is in there
    *first, last = told(layout, 0, 4.0)
    for owed, frames in first:
        owing.takes("worker-0", owed, frames)
    owing.takes("worker-0", *last)
    owing.has_left("worker-2")
    assert owing.complete(0.0) and held(owing) == {1.0 + 4.0}


def test_a_snapshot_does_not_wait_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    layout = layout_of(1)
    owing = owing_of(layout, 0)
    owing.begin(7, ["worker-0", "worker-1"])
    for owed, frames in told(layout, 0, 1.0, cut=7):
        owing.takes("worker-0", owed, frames)
    assert not owing.complete(5.0) and not owing.complete(64.0)
    assert owing.complete(66.0) and held(owing) == {1.0}
    assert "the snapshot of round 7 lacks what the codec of worker-1 has left out" in caplog.text


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 3), (3, 1)])
def test_all_workers_of_a_run_that_goes_on_get_their_part(before: int, after: int, tmp_path: Path) -> None:
    first, second = layout_of(before), layout_of(after)
    paths = []
    for server in range(before):
        owing = owing_of(first, server)
        for owed, frames in told(first, server, 6.0):
            owing.takes("worker-0", owed, frames)
        paths.append(tmp_path / f"{server}.safetensors")
        tensor_file.write(paths[-1], list(owing.end()), {})
    for server in range(after):
        owing = owing_of(second, server)
        owing.restore(TensorFiles(paths))
        for worker in ("worker-0", "worker-1"):
            handed = owing.hand_out(worker, 0.0)
            assert {owed.chunk for owed, _ in handed} == {c.id for c in second.on(server) if numel(second, c.id)}
            assert values(handed) == {(3.0, 6.0)}
        assert owing.hand_out("worker-2", 0.0) == [] and held(owing) == {3.0 + 3.0}  # not acknowledged yet


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_codecs_that_leave_nothing_out_ask_for_nothing(codec: str) -> None:
    layout = layout_of(1)
    owing = owing_of(layout, 0, Settings(compress_gradients=codec))  # type: ignore[arg-type]
    owing.begin(3, ["worker-0"])
    assert owing.asks("worker-0") == -1 and owing.complete(0.0) and list(owing.end()) == []
    with pytest.raises(WireError, match="worker-0 says that it owes"):
        owing.takes("worker-0", Residual(), [])


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    layout = layout_of(2)
    owing = owing_of(layout, 0)
    (good, frames), foreign = told(layout, 0, 1.0)[0], told(layout, 1, 1.0)[0][0]
    nan = to_frame(torch.full((numel(layout, good.chunk),), float("nan")))
    for owed, bad in [
        (foreign, frames),
        (Residual(good.chunk, ["residual", "velocity"], 10**6), frames),
        (good, frames[:1]),
        (good, [frames[0], frames[1][:-4]]),
        (good, [frames[0], nan]),
        (Residual(good.chunk, ["residual", "other"], 1), frames),
        (Residual(good.chunk, ["residual", "residual"], 1), frames),
    ]:
        with pytest.raises(WireError):
            owing.takes("worker-0", owed, bad)
    assert held(owing) == set()
