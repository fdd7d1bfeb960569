"""A stream's samples come exactly once an epoch, and are the same whoever reads them, when, and after what."""

from __future__ import annotations

import itertools
import pickle
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from roundtable import Stream, stream_of
from roundtable.common.config.batch_plan import Segment, Task, make_segment, samples_per_epoch
from roundtable.common.config.worker_facts import FirstFacts, difference
from roundtable.common.runtime.errors import UsageError
from roundtable.worker import facts as alike
from roundtable.worker.data.arguments import BatchArguments, Data, resolve
from roundtable.worker.data.loader import Loader, Processes, StreamSamples
from roundtable.worker.data.streams.order import tracks_of
from roundtable.worker.data.streams.reader import ShardReader

SEED = 5


class Shards:
    """Shards of numbers, with random numbers beside each. Counts what is opened, and what is read."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.opened: list[tuple[int, int]] = []
        self.read = 0

    def open(self, shard: int, position: int) -> Iterator[tuple[int, float]]:
        self.opened.append((shard, position))
        for number in range(position, self.lengths[shard]):
            self.read += 1
            yield 1000 * shard + number, random.random()

    def stream(self, **said: Any) -> Stream:
        return Stream(len(self.lengths), self.open, self.lengths, **said)


def decoded(sample: tuple[int, float]) -> list[Any]:
    return [*sample, float(torch.rand(1)), float(np.random.rand())]


def as_it_is(samples: list[Any]) -> list[Any]:
    return samples


def segment_of(
    data: Data, global_batch: int = 8, micro_batch: int = 2, epochs: int = 1, before: Segment | None = None
) -> Segment:
    least = data.min_micro_batch
    samples = samples_per_epoch(data.order.places, global_batch, micro_batch, least, data.drop_last)
    return make_segment(
        before=before, samples=samples, global_batch=global_batch, micro_batch=micro_batch, epochs=epochs, round_limit=None,
        min_micro_batch=least,
    )  # fmt: skip


def asked(stream: Any, **arguments: Any) -> Data:
    return resolve(stream, BatchArguments(collate_fn=as_it_is, **arguments), SEED, 0)


def loader(data: Data, segment: Segment, tasks: list[Task] | None = None) -> Loader:
    processes = Processes(data, SEED, torch.device("cpu")) if tasks is not None else None
    return Loader(data, segment, SEED, forecast=lambda: iter(tasks or []), processes=processes)


def tasks_of(plan: Segment) -> list[Task]:
    return [Task(r, k) for r in range(plan.first_round, plan.end) for k in range(plan.round(r).micro_batches)]


def everything(lengths: list[int]) -> list[int]:
    return [1000 * shard + number for shard, length in enumerate(lengths) for number in range(length)]


# ---- exactly once


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[int], dict[str, Any], list[tuple[int, Task]]]:
    """Shards, the arguments of batches, and who computes which micro-batch: also twice, late, and by workers that come anew."""
    lengths = draw(st.lists(st.integers(0, 30), min_size=1, max_size=7).filter(any))
    micro = draw(st.integers(1, 4))
    sizes = {"global_batch": draw(st.integers(micro, 16)), "micro_batch": micro, "epochs": draw(st.integers(1, 2))}
    arguments = {"shuffle": draw(st.booleans()), "shuffle_window": draw(st.sampled_from([1, 2, 5, 100])), **sizes}
    plan = segment_of(asked(Shards(lengths).stream()), **sizes)
    workers = draw(st.integers(1, 4))
    shares = draw(st.randoms(use_true_random=False))
    order = []
    for round_ in range(plan.rounds):
        count = plan.round(round_).micro_batches
        for k in range(count):
            order.append((k * workers // count, Task(round_, k)))
            if shares.random() < 0.1:  # another worker computes it too, and worker numbers from 10 on are new ones
                order.append((shares.choice([*range(workers), 10 + len(order)]), Task(round_, shares.randrange(count))))
    return lengths, arguments, order


@given(schedules())
def test_each_sample_comes_once_an_epoch_and_is_the_same_whoever_reads_it(schedule: Any) -> None:
    lengths, arguments, order = schedule
    sizes = {name: arguments[name] for name in ("global_batch", "micro_batch", "epochs")}
    data = asked(Shards(lengths).stream(decode=decoded), **arguments)
    plan = segment_of(data, **sizes)
    found: dict[Task, list[Any]] = {}
    workers: dict[int, Loader] = {}
    for worker, task in order:
        if worker not in workers:
            workers[worker] = loader(asked(Shards(lengths).stream(decode=decoded), **arguments), plan)
        batch = workers[worker].load(task)
        assert found.setdefault(task, batch) == batch
    for epoch in range(plan.epochs):
        seen = [sample[0] for task, batch in found.items() if plan.round(task.round).epoch == epoch for sample in batch]
        assert sorted(seen) == everything(lengths)
        draws = [sample[2] for task, batch in found.items() if plan.round(task.round).epoch == epoch for sample in batch]
        assert len(set(draws)) == len(draws)


def test_shards_in_order_are_the_order_of_the_stream() -> None:
    data = asked(Shards([3, 0, 6, 4]).stream(), shuffle=False)
    plan = segment_of(data, 4, 2, epochs=2)
    mine = loader(data, plan)
    seen = [sample[0] for task in tasks_of(plan) for sample in mine.load(task)]
    assert [data.order.indices(1)[place] for place in range(13)] == list(range(13))
    assert seen == everything([3, 0, 6, 4]) * 2 == [sample[0] for sample in Shards([3, 0, 6, 4]).stream()] * 2


def test_shuffled_shards_come_in_another_order_each_epoch_and_a_round_has_samples_of_several() -> None:
    lengths = [16] * 12
    data = asked(Shards(lengths).stream())
    plan = segment_of(data, 16, 4, epochs=2)
    assert tracks_of(plan, 12) == 4
    mine = loader(data, plan)
    rounds = [[s[0] // 1000 for k in range(4) for s in mine.load(Task(r, k))] for r in range(plan.rounds)]
    assert all(set(Counter(shards).values()) == {4} for shards in rounds)  # four shards of four samples each
    assert rounds[:12] != rounds[12:] and sorted(itertools.chain(*rounds[:12])) == sorted(itertools.chain(*rounds[12:]))
    other = resolve(Shards(lengths).stream(), BatchArguments(), SEED + 1, 0).order.of(plan, 0)
    assert [other[place] for place in range(192)] != [data.order.of(plan, 0)[place] for place in range(192)]


def test_a_window_shuffles_so_many_samples_in_a_row() -> None:
    data = asked(Shards([50, 50]).stream(), shuffle=False, shuffle_window=10)
    order = data.order.of(segment_of(data, 10, 5), 3)
    blocks = [[order[place] for place in range(lo, lo + 10)] for lo in range(0, 100, 10)]
    assert [sorted(block) for block in blocks] == [list(range(lo, lo + 10)) for lo in range(0, 100, 10)]
    assert len({tuple(n - 10 * at for n in block) for at, block in enumerate(blocks)}) == 10  # another order in each


@pytest.mark.parametrize(
    ("lengths", "least", "drop_last", "used"), [([9, 8], 1, False, 17), ([9, 8], 2, False, 16), ([9, 8], 1, True, 16)]
)
def test_small_batches_are_left_out_as_of_a_data_set(lengths: list[int], least: int, drop_last: bool, used: int) -> None:
    data = asked(Shards(lengths).stream(), min_micro_batch=least, drop_last=drop_last)
    plan = segment_of(data)
    mine = loader(data, plan)
    batches = [mine.load(task) for task in tasks_of(plan)]
    assert sum(map(len, batches)) == used == len({s[0] for batch in batches for s in batch})
    assert min(map(len, batches)) >= least


# ---- what is read


def test_a_worker_that_keeps_its_share_opens_each_shard_once_and_reads_no_sample_for_nothing() -> None:
    lengths = [64] * 8
    shards = [Shards(lengths) for _ in range(4)]
    for number, mine in enumerate(shards):  # worker `number` has micro-batches 2n and 2n + 1 of 8
        data = asked(mine.stream())
        plan = segment_of(data, 32, 4)
        of_worker = loader(data, plan)
        for round_, k in itertools.product(range(plan.rounds), (2 * number, 2 * number + 1)):
            of_worker.load(Task(round_, k))
    assert [len(mine.opened) for mine in shards] == [2] * 4 and [mine.read for mine in shards] == [128] * 4
    assert all(position == 0 for mine in shards for _, position in mine.opened)


def test_samples_in_between_are_read_if_that_is_faster_than_to_open_again() -> None:
    def slow(seconds: float) -> None:
        clock[0] += seconds

    clock = [0.0]
    for opening, expected in ((0.0, 4), (1000.0, 1)):
        mine = Shards([100])

        def open_(shard: int, position: int, mine: Shards = mine, opening: float = opening) -> Iterator[Any]:
            slow(opening)
            for sample in mine.open(shard, position):
                slow(1.0)
                yield sample

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("roundtable.worker.data.streams.reader.time.perf_counter", lambda: clock[0])
            reader = ShardReader(Stream(1, open_, 100))
            found = [reader.read(0, sample, lambda n: None)[0] for sample in (0, 1, 20, 21, 40, 41, 60, 61)]
        assert found == [0, 1, 20, 21, 40, 41, 60, 61] and len(mine.opened) == expected


def test_a_reader_goes_back_for_a_sample_that_it_has_passed_and_then_goes_on_where_it_was() -> None:
    mine = Shards([100])
    stream = mine.stream()
    stream.reads_from_start = True
    reader = ShardReader(stream)
    for sample in (0, 1, 2, 50, 51, 7, 52, 8, 53):
        assert reader.read(0, sample, lambda n: None)[0] == sample
    assert mine.opened == [(0, 0), (0, 0)] and mine.read == 54 + 9


def test_samples_of_a_window_are_read_once_by_a_worker_that_has_all() -> None:
    mine = Shards([40, 40, 40])
    mine_stream = mine.stream()
    mine_stream.reads_from_start = True
    data = asked(mine_stream, shuffle=False, shuffle_window=30)
    plan = segment_of(data, 10, 5)
    of_worker = loader(data, plan)
    assert sum(len(of_worker.load(task)) for task in tasks_of(plan)) == 120 == mine.read


def test_a_reader_travels_to_another_process_without_its_open_shards() -> None:
    reader = ShardReader(Stream(1, opened_numbers, 10))
    assert reader.read(0, 3, lambda n: None) == 3
    copy = pickle.loads(pickle.dumps(reader))
    assert copy._open == [] and copy.read(0, 4, lambda n: None) == 4


def opened_numbers(shard: int, position: int) -> Iterator[int]:
    return iter(range(position, 10))


# ---- data sets


class Numbered(IterableDataset[int]):
    """Says its shards by the documented method."""

    num_shards, shard_lengths = 3, (4, 5, 6)

    def open_shard(self, shard: int, position: int) -> Iterator[int]:
        return iter(range(100 * shard + position, 100 * shard + self.shard_lengths[shard]))

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(self.open_shard(shard, 0) for shard in range(3))


class Plain(IterableDataset[int]):
    """Leaves out samples for other processes that load, as torch's documentation has it."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        return iter(range(10) if info is None else range(info.id, 10, info.num_workers))

    def __len__(self) -> int:
        return 10


def test_an_iterable_data_set_says_its_shards() -> None:
    stream = stream_of(Numbered())
    assert (list(stream), len(stream), stream.lengths, stream.kind) == (list(Numbered()), 15, [4, 5, 6], "Numbered")
    counted = Numbered()
    counted.shard_lengths = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        stream_of(counted).lengths  # noqa: B018  # this data set needs them itself
    kept = Numbered()
    assert stream_of(kept) is stream_of(kept) and stream_of(stream) is stream
    assert stream_of(kept, samples=4) is not stream_of(kept)


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("dataset", [Plain(), Numbered()], ids=["plain", "shards"])
def test_loading_processes_read_all_samples_once(dataset: Any, processes: int) -> None:
    data = resolve(DataLoader(dataset, batch_size=2, num_workers=processes), BatchArguments(), SEED, 0)
    plan = segment_of(data, 4, 2)
    tasks = tasks_of(plan)
    mine = loader(data, plan, tasks if processes else None)
    batches = [mine.load(task) for task in tasks]
    mine.close()
    assert torch.cat(batches).tolist() == list(dataset)


def test_a_plain_data_set_draws_the_same_random_numbers_wherever_reading_begins() -> None:
    class Noisy(Plain):
        def __iter__(self) -> Iterator[Any]:
            return ((number, random.random(), float(torch.rand(1))) for number in range(10))

    def at(*samples: int) -> list[Any]:
        reads = StreamSamples(stream_of(Noisy()), SEED)
        return [reads[1, sample] for sample in samples]

    assert at(0, 1, 2, 3, 7, 9)[3:] == at(3, 7, 9) == at(3) + at(7) + at(9)


def test_epochs_of_a_stream_without_an_end_have_as_many_samples_as_are_said() -> None:
    class Unending(Plain):
        def __iter__(self) -> Iterator[int]:
            return itertools.count()

    stream = stream_of(Unending(), samples=7)
    assert list(stream) == list(range(7)) and ShardReader(stream).read(0, 6, lambda n: None) == 6


def test_shards_are_counted_once_and_the_cache_keeps_it(tmp_path: Path) -> None:
    mine, cache = Shards([3, 5]), tmp_path / "new" / "counts.json"
    for _ in range(2):
        stream = Stream(["a", "b"], lambda name, position: mine.open("ab".index(name), position), cache=cache)
        assert (stream.lengths, len(stream)) == ([3, 5], 8)
    assert mine.opened == [(0, 0), (1, 0)]
    more = Stream(["b", "c"], opened_numbers, lambda name: {"b": 0, "c": 2}[name], cache=cache)
    assert more.lengths == [5, 2]  # "b" was known
    assert Stream(2, opened_numbers, np.array([1, 2])).lengths == [1, 2]
    cache.write_text("[")
    said = refusal(lambda: Stream(["a"], opened_numbers, cache=cache).lengths)
    assert "counts.json cannot be read (" in said and said.endswith("delete it, and the shards are counted again.")


# ---- wrong use


def refusal(make: Any) -> str:
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Stream([], opened_numbers), "the stream has no shards: pass the shards' names, or their number."),
        (
            lambda: Stream(3, opened_numbers, [1, 2]),
            "the stream has 3 shards, but samples has 2 numbers: pass one for each shard.",
        ),
        (lambda: Stream(["x"], opened_numbers, [-1]).lengths, "shard 0 ('x') has -1 samples: this must be a whole number"),
        (lambda: Stream(["x"], opened_numbers, lambda name: 2.5).lengths, "shard 0 ('x') has 2.5 samples: this must be"),
        (lambda: Stream(2, opened_numbers, 0).lengths, "Stream(2 shards) has no samples."),
        (lambda: stream_of([1, 2]), "list is no stream: pass an IterableDataset, or roundtable.Stream(shards, open, samples)."),
        (lambda: stream_of(Plain(), samples=[1]), "Plain is one shard: samples must be a number."),
    ],
)
def test_what_is_no_stream_is_refused_in_a_sentence(make: Any, said: str) -> None:
    assert refusal(make).startswith(said)


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize(
    ("said", "text"),
    [
        (11, "shard 1 ('b') of Stream has no sample 10, though it was said to have 11: correct this, or delete a cache="),
        (9, "shard 1 ('b') of Stream has more than the 9 samples that it was said to have: correct this, or delete"),
    ],
)
def test_a_shard_of_another_length_than_said_is_named(said: int, text: str, processes: int) -> None:
    data = resolve(Stream(["a", "b"], opened_numbers, [10, said]), BatchArguments(num_workers=processes, shuffle=False), SEED, 0)
    plan = segment_of(data, 4, 2)
    tasks = tasks_of(plan)
    mine = loader(data, plan, tasks if processes else None)
    assert refusal(lambda: [mine.load(task) for task in tasks]).startswith(text)
    mine.close()


@pytest.mark.parametrize(("said", "text"), [(12, "has no sample 10, though"), (8, "has more than the 8 samples that")])
def test_a_plain_data_set_of_another_length_than_it_says_is_named(said: int, text: str) -> None:
    class Wrong(Plain):
        def __len__(self) -> int:
            return said

    samples = StreamSamples(stream_of(Wrong()), SEED)
    assert refusal(lambda: [samples[0, n] for n in range(said)]).startswith(f"shard 0 of Wrong {text}")


def test_what_open_returns_must_be_samples() -> None:
    samples = StreamSamples(Stream(1, lambda shard, position: 3, 1), SEED)  # type: ignore[arg-type, return-value]
    assert refusal(lambda: samples[0, 0]) == "open(shard, position) of Stream returns int: it must return an iterator of samples."


def test_an_error_of_the_stream_is_the_scripts_own() -> None:
    def broken(shard: int, position: int) -> Iterator[int]:
        if position == 0:
            yield 1
        raise OSError("gone")

    samples = StreamSamples(Stream(1, broken, 3), SEED)
    assert samples[0, 0] == 1
    for _ in range(2):  # it is opened again
        with pytest.raises(OSError, match="gone"):
            samples[0, 1]


# ---- what workers compare


def facts(stream: Any, in_process: bool = True) -> list[Any]:
    return alike.sample_facts(stream_of(stream), SEED, 0, len(stream_of(stream)), in_process)


def differs(one: Any, other: Any) -> str:
    return difference(FirstFacts("worker-0 on a", facts(one)), facts(other), "worker-1 on b")


@pytest.mark.parametrize("in_process", [True, False])
def test_workers_compare_the_shards_and_a_few_samples(in_process: bool) -> None:
    found = facts(Numbered(), in_process)
    assert [fact.name for fact in found] == ["the shards", "sample 0", "sample 1", "sample 14"]
    assert found == facts(Numbered()) and found[0].text.startswith("3 shards of 4 to 6 samples (")


def test_streams_that_differ_are_told_by_what_differs() -> None:
    class Shifted(Numbered):
        def open_shard(self, shard: int, position: int) -> Iterator[int]:
            return (number + 1 for number in super().open_shard(shard, position))

    class Longer(Numbered):
        shard_lengths = (4, 5, 7)

    assert differs(Numbered(), Numbered()) == ""
    assert differs(Numbered(), Shifted()).startswith("worker-1 on b has sample 0 ")
    assert differs(Numbered(), Longer()).startswith("worker-1 on b has the shards 3 shards of 4 to 7 samples (")


@pytest.mark.parametrize("in_process", [True, False])
def test_a_stream_that_is_not_opened_at_its_position_is_refused(in_process: bool) -> None:
    stream = Stream(["x"], lambda shard, position: iter(range(10)), 10)
    said = refusal(lambda: facts(stream, in_process))
    assert said.startswith("Stream cannot be opened at a position: shard 0 ('x') at position 1 does not begin with its second")


def test_a_stream_that_is_other_each_time_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    wild = itertools.count()
    stream = Stream(2, lambda shard, position: (next(wild) for _ in range(position, 4)), 4)
    assert [fact.name for fact in facts(stream)] == ["the shards"]
    assert "Stream gives other samples when it is read again, so results depend on which worker reads what" in caplog.text
