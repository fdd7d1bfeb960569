"""Each source reads what it should from real files, and tells in one sentence which file is wrong."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from roundtable.common.config.settings import choices
from roundtable.common.runtime.errors import UsageError
from roundtable.worker.data import Images, load, names
from roundtable.worker.data.formats.packaged import package_file, read_table
from roundtable.worker.data.formats.pickled import read_batch
from roundtable.worker.data.image_files import read_image
from roundtable.worker.data.sources.cifar_10 import shift_and_flip
from roundtable.worker.data.sources.synthetic import make

RANDOM = np.random.default_rng(0)


def refusal(name: str, data_dir: Path | None) -> str:
    """The sentence that `load` refuses with, checked to be one: it ends in a full stop and has no line break."""
    with pytest.raises(UsageError) as caught:
        load(name, None if data_dir is None else str(data_dir), seed=0)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text
    return text


def check(images: Images, train: int, test: int) -> None:
    assert (len(images.train), len(images.test)) == (train, test)
    for samples in (images.train, images.test):
        for index in (0, len(samples) - 1):
            image, label = samples[index]
            assert image.dtype == torch.float32 and tuple(image.shape) == images.shape
            assert type(label) is int and 0 <= label < images.classes


# --- sources by name


def test_every_choice_of_the_setting_data_is_a_source_and_no_helper_is() -> None:
    assert set(choices("data")) == set(names())
    assert not any(name.startswith(("-", "_")) for name in names())


def test_an_unknown_source_is_refused_with_the_names_there_are() -> None:
    text = refusal("mnist-6k", None)
    assert "mnist-6k" in text and all(name in text for name in names())


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar-10", "folder"])
def test_a_source_that_reads_files_asks_for_their_folder(name: str, tmp_path: Path) -> None:
    assert "--data-dir" in refusal(name, None)
    assert str(tmp_path / "nowhere") in refusal(name, tmp_path / "nowhere")


# --- images that come with packages


@pytest.mark.parametrize(("name", "train", "held_out"), [("mnist-5k", 4000, 100), ("digits", 1437, 36)])
def test_packaged_digits_hold_out_equally_many_of_each_class(name: str, train: int, held_out: int) -> None:
    images: Any = load(name, None, seed=0)
    check(images, train, 10 * held_out)
    assert torch.bincount(images.test.labels).tolist() == [held_out] * 10
    pixels = torch.stack([images.train[index][0] for index in range(0, train, 7)])
    assert abs(float(pixels.mean())) < 0.05 and abs(float(pixels.std()) - 1) < 0.05


def test_the_held_out_thousand_is_the_same_in_every_run_and_disjoint_from_training() -> None:
    images, again = (load("mnist-5k", None, seed=seed) for seed in (0, 1))
    assert isinstance(images, Images)
    train, test = images.train.pixels, images.test.pixels  # type: ignore[attr-defined]
    assert torch.equal(test, again.test.pixels)  # type: ignore[attr-defined]
    assert not {image.numpy().tobytes() for image in train} & {image.numpy().tobytes() for image in test}
    assert hashlib.sha256(test.numpy().tobytes()).hexdigest()[:16] == "7edb45d6cd81ff1c"


def test_packaged_digits_are_what_their_packages_load() -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    images: Any = load("digits", None, seed=0)
    ours = torch.cat([images.train.pixels, images.test.pixels]).flatten(1).to(torch.int64)
    theirs = torch.from_numpy(sklearn_datasets.load_digits().data).to(torch.int64)
    assert sorted(ours.tolist()) == sorted(theirs.tolist())


DIGITS = b"1,2,3,4,5\n" * 6


@pytest.mark.parametrize(
    "data",
    [
        b"",
        DIGITS,
        gzip.compress(b""),
        gzip.compress(DIGITS)[:-9],
        gzip.compress(DIGITS + b"1,2,3,x,5\n"),
        gzip.compress(DIGITS + b"1,2,3,4\n"),
        gzip.compress(DIGITS.replace(b"\n", b",") + b"1,2,3,4,5"),
        gzip.compress("1,2,3,4,\u0665".encode()),
    ],
    ids=["empty", "not packed", "packed empty", "cut off", "a letter", "a number short", "one line", "another digit"],
)
def test_a_damaged_table_in_a_package_is_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "table.csv.gz"
    path.write_bytes(gzip.compress(DIGITS))
    assert read_table(path, columns=5).tolist() == [[1, 2, 3, 4, 5]] * 6
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"table\.csv\.gz.*reinstall"):
        read_table(path, columns=5)


def test_a_package_that_is_missing_or_lacks_its_table_is_named() -> None:
    with pytest.raises(UsageError, match=r"no_such_package.*install"):
        package_file("no_such_package", "table.csv.gz")
    with pytest.raises(UsageError, match=r"mlxtend.*no_such_table|no_such_table.*mlxtend"):
        package_file("mlxtend", "no_such_table")


# --- IDX


def idx(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, packed: bool = False, infix: str = "-idx") -> dict[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    """The four files of a little MNIST; the arrays in them, by the beginnings of the files' names."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part, count in (("train", 30), ("t10k", 20)):
        arrays[f"{part}-images"] = RANDOM.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels"] = (np.arange(count) % 10).astype(np.uint8)
    for stem, array in arrays.items():
        name = f"{stem}{infix}{array.ndim}-ubyte"
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return arrays


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", [".", "raw", "MNIST/raw", "MNIST"])
def test_mnist_is_found_plain_or_gzipped_at_the_top_or_where_torchvision_puts_it(
    place: str, packed: bool, tmp_path: Path
) -> None:
    arrays = write_idx(tmp_path / place, packed)
    images = load("mnist", str(tmp_path), seed=0)
    check(images, 30, 20)
    image, label = images.train[7]
    assert label == 7
    expected = (torch.from_numpy(arrays["train-images"][7]).float() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(image[0], expected)


def test_fashion_mnist_is_not_taken_from_the_folder_of_mnist(tmp_path: Path) -> None:
    write_idx(tmp_path / "MNIST" / "raw")
    assert "FashionMNIST" in refusal("fashion-mnist", tmp_path)
    arrays = write_idx(tmp_path / "FashionMNIST" / "raw", infix=".idx")
    images: Any = load("fashion-mnist", str(tmp_path), seed=0)
    assert np.array_equal(images.test.pixels[:, 0].numpy(), arrays["t10k-images"])


def _cut(data: bytes) -> bytes:
    return data[:-1]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut short": _cut,
    "too long": lambda data: data + b"\0",
    "cut in the header": lambda data: data[:6],
    "empty": lambda data: b"",
    "of wrong magic": lambda data: b"\x89PNG" + data[4:],
    "promising terabytes": lambda data: data[:4] + b"\xff" * 12 + data[16:],
    "promising nothing": lambda data: data[:4] + b"\0" * 12 + data[16:],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_idx_file_is_named(damage: str, packed: bool, tmp_path: Path) -> None:
    arrays = write_idx(tmp_path, packed)
    path = tmp_path / ("t10k-images-idx3-ubyte" + (".gz" if packed else ""))
    round_invalid = DAMAGE[damage](idx(arrays["t10k-images"]))
    path.write_bytes(gzip.compress(round_invalid) if packed else round_invalid)
    assert path.name in refusal("mnist", tmp_path)


@pytest.mark.parametrize("spoil", [_cut, lambda data: data[:40] + b"\xff" * 20 + data[60:], lambda data: b"not gzip"])
def test_a_damaged_gzip_file_is_named(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    write_idx(tmp_path, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(spoil(path.read_bytes()))
    assert path.name in refusal("mnist", tmp_path)


def test_a_missing_idx_file_is_named_with_the_places_it_may_be_in(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    text = refusal("mnist", tmp_path)
    assert "t10k-labels-idx1-ubyte" in text and str(tmp_path) in text and "MNIST" in text


def test_idx_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.zeros(29, dtype=np.uint8)))
    assert "29" in refusal("mnist", tmp_path)
    labels.write_bytes(idx(np.full(30, 11, dtype=np.uint8)))
    assert labels.name in refusal("mnist", tmp_path)
    labels.write_bytes(idx(np.zeros(30, dtype=np.uint8)))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((20, 32, 32), dtype=np.uint8)))
    assert "32" in refusal("mnist", tmp_path)


# --- CIFAR-10

BATCHES = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]


def write_cifar_binary(folder: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Six files of four images; the records (24, 3073) in them, the last four being the test ones."""
    folder.mkdir(parents=True, exist_ok=True)
    records = RANDOM.integers(0, 256, (24, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(24) % 10
    for n, name in enumerate(BATCHES):
        (folder / f"{name}.bin").write_bytes(records[4 * n : 4 * n + 4].tobytes())
    return records


def write_cifar_python(folder: Path, protocol: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    folder.mkdir(parents=True, exist_ok=True)
    records = RANDOM.integers(0, 256, (24, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(24) % 10
    for n, name in enumerate(BATCHES):
        part = records[4 * n : 4 * n + 4]
        batch = {b"batch_label": b"x", b"labels": part[:, 0].tolist(), b"data": part[:, 1:].copy(), b"filenames": [b"a.png"] * 4}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))
    return records


def check_cifar(folder: Path, records: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    images: Any = load("cifar-10", str(folder), seed=0, augment=False)
    check(images, 20, 4)
    assert images.shape == (3, 32, 32)
    got = torch.cat([images.train.pixels, images.test.pixels])
    assert np.array_equal(got.numpy().reshape(24, 3072), records[:, 1:])
    assert [images.train[index][1] for index in range(20)] == records[:20, 0].tolist()


@pytest.mark.parametrize("place", [".", "cifar-10-batches-bin"])
def test_cifar_10_is_read_from_its_binary_batches(place: str, tmp_path: Path) -> None:
    check_cifar(tmp_path, write_cifar_binary(tmp_path / place))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_cifar_10_is_read_from_its_python_batches(protocol: int, tmp_path: Path) -> None:
    check_cifar(tmp_path, write_cifar_python(tmp_path / "cifar-10-batches-py", protocol))


def test_cifar_10_is_read_from_batches_that_python_2_pickled(tmp_path: Path) -> None:
    """The archive on offer was written by Python 2: str for bytes, and numpy's names of that time."""
    records = write_cifar_binary(tmp_path)
    for n, name in enumerate(BATCHES):
        part = records[4 * n : 4 * n + 4]
        (tmp_path / f"{name}.bin").unlink()
        (tmp_path / name).write_bytes(_python_2_pickle(part[:, 1:].tobytes(), part[:, 0].tolist()))
    check_cifar(tmp_path, records)


def _python_2_pickle(data: bytes, labels: list[int]) -> bytes:
    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value  # SHORT_BINSTRING

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n"
        + b"(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
        + b"(K\x01K" + bytes([len(labels)]) + b"M\x00\x0c\x86"
        + b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + b"\x89T" + struct.pack("<I", len(data)) + data + b"tb"
    )  # fmt: skip
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


class _Attack:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


def test_a_pickle_that_asks_for_anything_but_arrays_is_refused_and_nothing_is_run(tmp_path: Path) -> None:
    write_cifar_python(tmp_path, protocol=2)
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps({b"data": _Attack(tmp_path / "owned")}))
    text = refusal("cifar-10", tmp_path)
    assert "data_batch_2" in text and "mkdir" in text
    assert not (tmp_path / "owned").exists()


_DTYPE = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
#: Pickles of a few bytes, or of a few million, that ask for gigabytes.
_BOMBS = {
    "a memo with room for 2^27 objects": b"\x80\x02Nr" + struct.pack("<I", 1 << 27) + b".",
    "the same in letters": b"Np134217728\n.",
    "zeros instead of an array's bytes": (
        b"\x80\x05cnumpy.core.numeric\n_frombuffer\n(\x8a\x05" + (1 << 33).to_bytes(5, "little") + _DTYPE + b"K\x01\x85U\x01CtR."
    ),
    "bytes that are not there": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
    "an array that is not there": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
    "the same text encoded again and again": (
        b"\x80\x02](X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20) + b"q\x00c_codecs\nencode\nq\x01"
        + b"h\x01(h\x00U\x06latin1tR" * 3000 + b"e."
    ),
    "millions of maps": b"\x80\x02(" + b"}" * 4_000_000 + b"l.",
}  # fmt: skip


@pytest.mark.parametrize("name", _BOMBS)
def test_a_pickle_that_asks_for_more_memory_than_it_has_bytes_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(_BOMBS[name])
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match="data_batch_1 cannot be read"):
            read_batch(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * len(_BOMBS[name]) + (4 << 20)


@pytest.mark.parametrize("array", [np.zeros((2, 3), dtype=object), np.zeros(3), np.zeros((2, 3), dtype=np.uint8, order="F")])
@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_that_are_not_of_bytes_in_c_order_are_refused(array: Any, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": array}, protocol=protocol))
    with pytest.raises(UsageError, match="data_batch_1"):
        read_batch(path)


@pytest.mark.parametrize(
    "batch",
    [
        [1, 2],
        {},
        {"labels": [1], "data": 7},
        {"labels": [], "data": np.zeros((0, 3072), np.uint8)},
        {"labels": [1, 2], "data": np.zeros((1, 3072), np.uint8)},
        {"labels": [10], "data": np.zeros((1, 3072), np.uint8)},
        {"labels": [2**70], "data": np.zeros((1, 3072), np.uint8)},
        {"labels": [-1], "data": np.zeros((1, 3072), np.uint8)},
        {"labels": ["a"], "data": np.zeros((1, 3072), np.uint8)},
        {"labels": [1], "data": np.zeros((1, 100), np.uint8)},
    ],
)
def test_a_pickle_that_is_no_cifar_batch_is_named(batch: Any, tmp_path: Path) -> None:
    write_cifar_python(tmp_path, protocol=2)
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    assert "test_batch" in refusal("cifar-10", tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 100, 5000])
def test_a_batch_that_is_cut_short_is_named(keep: int, tmp_path: Path) -> None:
    write_cifar_python(tmp_path / "python", protocol=2)
    write_cifar_binary(tmp_path / "binary")
    for folder, name in (("python", "data_batch_3"), ("binary", "data_batch_3.bin")):
        path = tmp_path / folder / name
        path.write_bytes(path.read_bytes()[:keep])
        assert name in refusal("cifar-10", tmp_path / folder)


def test_missing_batches_are_named_and_a_packed_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    assert "data_batch_1" in refusal("cifar-10", tmp_path)
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"")
    text = refusal("cifar-10", tmp_path)
    assert archive.name in text and "unpack" in text
    write_cifar_binary(tmp_path)
    (tmp_path / "data_batch_4.bin").unlink()
    assert "data_batch_4.bin" in refusal("cifar-10", tmp_path)


def test_augmentation_moves_and_mirrors_by_the_global_generator_alone() -> None:
    image = torch.from_numpy(RANDOM.integers(1, 256, (3, 32, 32), dtype=np.uint8))
    framed = torch.zeros(3, 40, 40, dtype=torch.uint8)
    framed[:, 4:36, 4:36] = image
    moved = [framed[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    plain, mirrored = {each.numpy().tobytes() for each in moved}, {each.flip(2).numpy().tobytes() for each in moved}

    def draw() -> list[bytes]:
        torch.manual_seed(5)
        return [shift_and_flip(image).numpy().tobytes() for _ in range(60)]

    drawn = set(draw())
    assert drawn <= plain | mirrored
    assert len(drawn & plain) > 10 and len(drawn & mirrored) > 10
    assert draw() == draw()


def test_cifar_10_varies_training_images_only_and_not_where_told_not_to(tmp_path: Path) -> None:
    write_cifar_binary(tmp_path)
    varied, plain = load("cifar-10", str(tmp_path), seed=0), load("cifar-10", str(tmp_path), seed=0, augment=False)
    assert len({varied.train[0][0].numpy().tobytes() for _ in range(10)}) > 1
    assert len({plain.train[0][0].numpy().tobytes() for _ in range(10)}) == 1
    assert torch.equal(varied.test[0][0], plain.test[0][0])


# --- folders of images


def paint(path: Path, size: tuple[int, int] = (20, 10), colour: Any = (255, 0, 0), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.mark.parametrize("apart", ["test", "val"])
def test_a_folder_with_held_out_images_of_its_own_uses_them(apart: str, tmp_path: Path) -> None:
    for name, colour in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
        for n in range(3):
            paint(tmp_path / "train" / name / f"{n}.png", colour=colour)
        paint(tmp_path / apart / name / "0.JPG", size=(90, 70), colour=colour)
    images = load("folder", str(tmp_path), seed=0)
    check(images, 6, 2)
    assert images.shape == (3, 64, 64) and images.classes == 2
    image, label = images.train[5]
    assert label == 1 and image[:, 0, 0].tolist() == [-1, -1, 1]


@pytest.mark.parametrize("top", [".", "train"])
def test_otherwise_a_fifth_of_each_class_is_held_out_by_the_names_of_its_files(top: str, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for n in range(20):
            paint(tmp_path / top / name / f"{n}.png")
    images, again = (load("folder", str(tmp_path), seed=seed) for seed in (0, 1))
    check(images, 32, 8)
    files, files_again = images.test.files, again.test.files  # type: ignore[attr-defined]
    assert files == files_again and [label for _, label in files] == [0] * 4 + [1] * 4
    assert not set(files) & set(images.train.files)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("mode", "colour"), [("L", 9), ("RGBA", (1, 2, 3, 4)), ("P", 3), ("1", 1), ("I;16", 500), ("CMYK", 0)])
def test_images_of_any_mode_become_rgb(mode: str, colour: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        for n in range(2):
            paint(tmp_path / name / f"{n}.tif", mode=mode, colour=colour)
    check(load("folder", str(tmp_path), seed=0), 2, 2)


def test_what_is_no_image_by_its_name_is_passed_over(tmp_path: Path) -> None:
    for name in ("a", "b", ".cache"):
        for n in range(2):
            paint(tmp_path / name / f"{n}.png")
    (tmp_path / "a" / "readme.txt").write_text("hello")
    (tmp_path / "a" / ".0.png").write_text("hello")
    (tmp_path / "notes").mkdir()
    images = load("folder", str(tmp_path), seed=0)
    assert images.classes == 2 and len(images.train) + len(images.test) == 4


@pytest.mark.parametrize("spoil", [lambda data: b"", lambda data: b"no image", lambda data: data[: len(data) // 2]])
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_an_unreadable_image_is_named_when_it_is_read(suffix: str, spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    for name in ("a", "b"):
        for n in range(2):
            path = tmp_path / name / f"{n}.{suffix}"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(RANDOM.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    images = load("folder", str(tmp_path), seed=0)
    path = images.train.files[0][0]  # type: ignore[attr-defined]
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UsageError) as caught:
        images.train[0]
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_folders_without_classes_or_with_strange_ones_are_refused(tmp_path: Path) -> None:
    assert str(tmp_path) in refusal("folder", tmp_path)
    paint(tmp_path / "train" / "a" / "0.png")
    assert "but it has 1" in refusal("folder", tmp_path)
    paint(tmp_path / "train" / "b" / "0.png")
    assert "hold out" in refusal("folder", tmp_path)
    (tmp_path / "val").mkdir()
    assert str(tmp_path / "val") in refusal("folder", tmp_path)
    paint(tmp_path / "val" / "c" / "0.png")
    assert str(tmp_path / "val" / "c") in refusal("folder", tmp_path)


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_values_of_16_bits_are_scaled_and_not_cut_off(kind: str, mode: str, tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"grey.{kind}")
    pixels = np.asarray(read_image(tmp_path / f"grey.{kind}", mode)).reshape(64, 64, -1)
    assert np.array_equal(pixels[..., 0], np.round(values / 257).astype(np.uint8))


def test_image_files_that_would_harm_or_mislead_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "postscript.eps")
    (tmp_path / "postscript.eps").rename(tmp_path / "postscript.png")  # Pillow would have another program draw it
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "wide.tif")
    Image.new("L", (8, 8)).save(tmp_path / "large.png")
    monkeypatch.setattr("roundtable.worker.data.image_files.MOST_PIXELS", 63)
    for name, reason in (("postscript.png", "cannot be read"), ("wide.tif", "32 bits"), ("large.png", "8x8 pixels; 63")):
        with pytest.raises(UsageError, match=reason) as caught:
            read_image(tmp_path / name, "RGB")
        assert str(tmp_path / name) in str(caught.value)


# --- synthetic


def test_synthetic_images_follow_from_their_seed() -> None:
    first, second, other = (load("synthetic", None, seed=seed) for seed in (1, 1, 2))
    check(first, 2000, 500)
    assert torch.equal(first.train[3][0], second.train[3][0]) and not torch.equal(first.train[3][0], other.train[3][0])


def test_synthetic_images_can_be_told_apart_and_have_the_shape_asked_for() -> None:
    images = make(0, classes=4, shape=(3, 10, 14), train=400, test=80)
    check(images, 400, 80)
    pixels = torch.stack([images.train[index][0] for index in range(400)])
    centres = torch.stack([pixels[label::4].mean(0) for label in range(4)])
    nearest = [int((centres - images.test[index][0]).square().sum((1, 2, 3)).argmin()) for index in range(80)]
    assert sum(guess == images.test[index][1] for index, guess in enumerate(nearest)) > 72


def test_synthetic_images_of_any_size_and_number_of_classes_are_drawn_one_by_one() -> None:
    images, again = (load("synthetic", None, seed=1, shape=(3, 224, 224), classes=1000) for _ in range(2))
    check(images, 2000, 500)
    assert (images.shape, images.classes, images.train[1999][1]) == ((3, 224, 224), 1000, 999)
    assert torch.equal(images.train[1999][0], again.train[1999][0])
    assert not torch.equal(images.train[3][0], images.test[3][0]) and images.train[3][1] == images.test[3][1]
    pixels = images.train[3][0]
    assert abs(float(pixels.mean())) < 0.2 and abs(float(pixels.std()) - 1) < 0.2


def test_drawn_images_can_be_told_apart() -> None:
    images = load("synthetic", None, seed=0, shape=(1, 10, 14), classes=4)
    pixels = torch.stack([images.train[index][0] for index in range(400)])
    centres = torch.stack([pixels[label::4].mean(0) for label in range(4)])
    nearest = [int((centres - images.test[index][0]).square().sum((1, 2, 3)).argmin()) for index in range(80)]
    assert sum(guess == images.test[index][1] for index, guess in enumerate(nearest)) > 64


def test_images_of_a_folder_are_stretched_to_the_shape_asked_for(tmp_path: Path) -> None:
    for name in "ab":
        for number in range(2):
            paint(tmp_path / name / f"{number}.png")
    images = load("folder", str(tmp_path), seed=0, shape=(3, 20, 30))
    check(images, 2, 2)
    assert images.shape == (3, 20, 30)
    with pytest.raises(UsageError, match=r"3x20x30.*--image"):
        load("folder", str(tmp_path), seed=0, shape=(1, 20, 30))


@pytest.mark.parametrize(
    ("asked", "sentence"), [({"shape": (3, 28, 28)}, r"1x28x28.*--image"), ({"classes": 11}, r"10.*--classes")]
)
def test_images_that_have_another_shape_or_other_classes_are_refused(asked: dict[str, Any], sentence: str) -> None:
    assert load("mnist-5k", None, seed=0, shape=(1, 28, 28), classes=10).classes == 10
    with pytest.raises(UsageError, match=sentence):
        load("mnist-5k", None, seed=0, **asked)
