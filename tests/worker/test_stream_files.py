"""Tar files of WebDataset and streaming data sets of Hugging Face open at any position, and have the samples that those have."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from roundtable import Stream, stream_of, tar_stream
from roundtable.common.config.batch_plan import Task, make_segment
from roundtable.common.runtime.errors import UsageError
from roundtable.worker.data.arguments import BatchArguments, resolve
from roundtable.worker.data.loader import Loader, Processes
from roundtable.worker.data.streams.reader import ShardReader

SEED = 3


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: Any = "w", format: int = tarfile.GNU_FORMAT) -> str:
    with tarfile.open(path, mode, format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def members_of(shard: int, samples: int) -> list[tuple[str, bytes]]:
    """Samples of an image and a class, with paths of all lengths, and some members that belong to none."""
    found = [("__meta__", b"no sample"), ("README", b"no sample")]
    for number in range(samples):
        key = f"{'long/' * (25 * (number % 2))}{shard:03}/{number:05}"
        found += [(f"{key}.jpg", bytes([shard, number]) * (1 + 700 * number)), (f"{key}.CLS", str(number).encode())]
    return found


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("shards")
    formats = [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]
    return [
        write_tar(folder / f"train-{n:03}.tar", members_of(n, size), format=formats[n % 2]) for n, size in enumerate((5, 8, 3))
    ]


def read(stream: Stream, sample: int) -> Any:
    """A sample that is read by opening its shard at it."""
    return ShardReader(stream).read(0, sample, lambda n: None)


def test_tar_files_have_the_samples_that_webdataset_reads(shards: list[str]) -> None:
    wds = pytest.importorskip("webdataset")
    theirs = [
        {name: data for name, data in sample.items() if name != "__local_path__"}
        for sample in wds.WebDataset(shards, shardshuffle=False)
    ]
    stream = tar_stream(shards)
    assert list(stream) == theirs == [read(stream, n) for n in range(16)]


def test_a_tar_file_that_webdataset_has_written_is_read(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "a.tar")) as sink:
        for number in range(4):
            sink.write({"__key__": f"{number:04}", "cls": number, "pth": torch.full((2,), number)})
    stream = tar_stream(tmp_path / "a.tar", lambda sample: (int(sample["cls"]), torch.load(io.BytesIO(sample["pth"]))))
    assert [(number, tensor.tolist()) for number, tensor in stream] == [(n, [n, n]) for n in range(4)]


def test_a_pipeline_of_webdataset_is_refused_in_favour_of_its_files(shards: list[str]) -> None:
    wds = pytest.importorskip("webdataset")
    with pytest.raises(UsageError, match=r"^a WebDataset pipeline cannot begin at a position: pass roundtable\.tar_stream"):
        resolve(wds.WebDataset(shards, shardshuffle=False).decode(), BatchArguments(), SEED, 0)


def test_a_sample_is_all_members_in_a_row_with_one_path_up_to_the_first_dot(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a/b.c.jpg", b"1"), ("a/b.Seg.PNG", b"2"), ("d.x/b.txt", b"3"), ("e.txt", b"")])
    url = {"__url__": path}
    assert list(tar_stream(path)) == [
        {"__key__": "a/b", "c.jpg": b"1", "seg.png": b"2"} | url,
        {"__key__": "d.x/b", "txt": b"3"} | url,
        {"__key__": "e", "txt": b""} | url,
    ]
    twice = write_tar(tmp_path / "b.tar", [("a.txt", b"1"), ("a.TXT", b"2")])
    with pytest.raises(UsageError, match=r"b\.tar' has two members 'a\.txt' in a row: a sample has each name once\.$"):
        list(tar_stream(twice))


def test_any_position_opens_with_one_seek_and_compressed_files_from_their_start(tmp_path: Path, shards: list[str]) -> None:
    whole = list(tar_stream(shards[1]))
    for mode, end in (("w", "tar"), ("w:gz", "tar.gz"), ("w:bz2", "tar.bz2"), ("w:xz", "tar.xz")):
        path = write_tar(tmp_path / f"x.{end}", members_of(1, 8), mode)
        stream = tar_stream(path)
        assert stream.lengths == [8] and stream.reads_from_start == (mode != "w")
        for position in (7, 0, 3):
            found = list(stream.open(path, position))
            assert [sample | {"__url__": shards[1]} for sample in found] == whole[position:]
        assert list(stream.open(path, 9)) == []


def test_a_path_with_numbers_in_braces_stands_for_all_of_them(shards: list[str]) -> None:
    folder = Path(shards[0]).parent
    assert tar_stream(folder / "train-{000..002}.tar").shards == shards
    assert tar_stream("{1..2}-{09..10}.tar").shards == ["1-09.tar", "1-10.tar", "2-09.tar", "2-10.tar"]
    assert len(tar_stream(["a.tar", "b-{0..3}.tar"]).shards) == 5


def test_headers_are_read_once_and_the_cache_keeps_them_while_the_file_is_the_same(tmp_path: Path) -> None:
    opened: list[str] = []

    def open_file(path: str) -> Any:
        opened.append(path)
        return Path(path).open("rb")

    path = write_tar(tmp_path / "a.tar", members_of(0, 4))
    for _ in range(2):
        assert len(tar_stream(path, cache=tmp_path / "cache", open_file=open_file)) == 4
    assert opened == [path]
    write_tar(tmp_path / "a.tar", members_of(0, 6))
    assert len(tar_stream(path, cache=tmp_path / "cache", open_file=open_file)) == 6 and len(opened) == 2
    said = tar_stream(path, samples=6, open_file=open_file)
    assert (len(said), read(said, 0)["cls"], len(opened)) == (6, b"0", 3)  # opened at its start, without a look at the headers
    assert (read(said, 5)["cls"], len(opened)) == (b"5", 5)


@pytest.mark.parametrize(
    ("contents", "said"), [(None, "No such file"), (b"no tar file" * 100, "invalid header"), (b"", "empty file")]
)
def test_a_file_that_is_missing_or_damaged_is_named(contents: bytes | None, said: str, tmp_path: Path) -> None:
    if contents is not None:
        (tmp_path / "x.tar").write_bytes(contents)
    for use in (len, list):
        with pytest.raises(UsageError, match=rf"^the shard '.*x\.tar' cannot be read: .*{said}.*\.$"):
            use(tar_stream(tmp_path / "x.tar"))


def test_a_file_that_ends_in_the_middle_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", members_of(0, 5))
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:5000])
    with pytest.raises(UsageError, match=r"x\.tar' cannot be read: "):
        list(tar_stream(path, samples=5))


def batches(stream: Any, processes: int = 0, **arguments: Any) -> list[Any]:
    """All micro-batches of an epoch, by one worker."""
    data = resolve(stream, BatchArguments(num_workers=processes, **arguments), SEED, 0)
    plan = make_segment(before=None, samples=data.samples, global_batch=6, micro_batch=2, epochs=1, round_limit=None)
    tasks = [Task(r, k) for r in range(plan.rounds) for k in range(plan.round(r).micro_batches)]
    loads = Processes(data, SEED, torch.device("cpu")) if processes else None
    mine = Loader(data, plan, SEED, forecast=lambda: iter(tasks), processes=loads)
    found = [mine.load(task) for task in tasks]
    mine.close()
    return found


def number_of(sample: dict[str, Any]) -> tuple[int, int]:
    return sample["jpg"][0], int(sample["cls"])


def test_loading_processes_read_tar_files_too(shards: list[str]) -> None:
    stream = tar_stream(shards, number_of)
    alone = [[part.tolist() for part in batch] for batch in batches(stream, shuffle_window=4)]
    assert [[part.tolist() for part in batch] for batch in batches(stream, 2, shuffle_window=4)] == alone
    travelled = pickle.loads(pickle.dumps(stream))  # to a process that is not forked
    assert [[part.tolist() for part in batch] for batch in batches(travelled, shuffle_window=4)] == alone
    samples = sorted((shard, number) for batch in alone for shard, number in zip(*batch, strict=True))
    assert samples == [(shard, number) for shard, size in enumerate((5, 8, 3)) for number in range(size)]


# ---- Hugging Face


def hugging_face(generator: bool = False) -> Any:
    datasets = pytest.importorskip("datasets")
    if generator:
        return datasets.IterableDataset.from_generator(numbers, gen_kwargs={"parts": [10, 20, 30, 40]})
    table = datasets.Dataset.from_dict({"x": list(range(22)), "text": [f"number {n}" for n in range(22)]})
    return table.to_iterable_dataset(num_shards=4)


def numbers(parts: list[int]) -> Iterator[dict[str, int]]:
    for part in parts:
        for number in range(part, part + 5):
            yield {"x": number}


@pytest.mark.parametrize("generator", [False, True], ids=["table", "generator"])
def test_streaming_data_sets_of_hugging_face_open_at_any_position(generator: bool) -> None:
    dataset = hugging_face(generator)
    stream = stream_of(dataset)
    assert len(stream.shards) == 4 and len(stream) == (20 if generator else 22)
    assert list(stream) == list(dataset) == [read(stream, n) for n in range(len(stream))]


@pytest.mark.parametrize("processes", [0, 2])
def test_run_batches_takes_them_with_what_was_mapped_and_filtered(processes: int) -> None:
    dataset = hugging_face().map(lambda sample: {"twice": 2 * sample["x"]}).filter(lambda sample: sample["x"] % 5 != 3)
    found = batches(dataset, processes, shuffle_window=3)
    expected = [n for n in range(22) if n % 5 != 3]
    assert sorted(n for batch in found for n in batch["x"].tolist()) == expected
    assert all(batch["twice"].tolist() == (2 * batch["x"]).tolist() for batch in found)
    assert [n for batch in batches(dataset, processes, shuffle=False) for n in batch["x"].tolist()] == expected
