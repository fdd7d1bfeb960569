"""Memory shared between real processes: found to be the same by touching it, and outlived by nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from roundtable.common.protocol.shared_memory import HEADER_BYTES, Handle, NotShared, attach, create

ROOT = Path(__file__).parents[2]

#: A process that makes a region, writes into it, tells its handle and waits.
OWNER = """
import sys
import msgspec
from roundtable.common.protocol.shared_memory import HEADER_BYTES, create
region = create(100)
region.memory[HEADER_BYTES:HEADER_BYTES + 5] = b"hello"
print(msgspec.json.encode(region.handle).decode(), flush=True)
for line in sys.stdin:
    region.memory[HEADER_BYTES:HEADER_BYTES + 5] = line.strip().encode()
    print("done", flush=True)
"""


@pytest.fixture
def owner():
    process = subprocess.Popen([sys.executable, "-c", OWNER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def handle_of(process: subprocess.Popen[str]) -> Handle:
    assert process.stdout is not None
    return msgspec.json.decode(process.stdout.readline(), type=Handle)


def say(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(word + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"


def words(region) -> bytes:
    return bytes(region.memory[HEADER_BYTES : HEADER_BYTES + 5])


def test_what_one_process_writes_another_reads(owner) -> None:
    region = attach(handle_of(owner))
    assert words(region) == b"hello"
    say(owner, "again")
    assert words(region) == b"again"
    with pytest.raises(TypeError):
        region.memory[HEADER_BYTES] = 1  # a reader cannot spoil it


def test_what_is_written_into_a_private_mapping_stays_in_this_process(owner) -> None:
    handle = handle_of(owner)
    ours, others = attach(handle, private=True), attach(handle)
    ours.memory[HEADER_BYTES : HEADER_BYTES + 5] = b"local"
    assert (words(ours), words(others)) == (b"local", b"hello")


def test_the_memory_outlives_an_owner_that_was_killed_as_long_as_somebody_reads_it(owner) -> None:
    handle = handle_of(owner)
    region = attach(handle)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert words(region) == b"hello"
    with pytest.raises(NotShared, match=f"process {handle.pid}"):
        attach(handle)


@pytest.mark.parametrize(
    "change",
    [{"token": "00" * 16}, {"size": 4096}, {"fd": 9999}, {"pid": 1 << 30}, {"fd": 0}],
    ids=["token", "size", "no-file", "no-process", "other-file"],
)
def test_memory_that_is_not_the_one_meant_is_refused(change: dict[str, object], owner) -> None:
    handle = msgspec.structs.replace(handle_of(owner), **change)
    with pytest.raises(NotShared):
        attach(handle)


def test_nobody_can_pull_the_memory_away_from_under_a_reader() -> None:
    region = create(100)
    with pytest.raises(OSError):
        os.ftruncate(region.fd, 10)


def test_where_the_system_gives_no_memory_that_is_said_and_nothing_is_left_open() -> None:
    code = (
        "import os, resource; from roundtable.common.protocol.shared_memory import NotShared, create\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "before = len(os.listdir('/proc/self/fd'))\n"
        "try: create(1 << 30)\n"
        "except NotShared as error: print(error)\n"
        "assert len(os.listdir('/proc/self/fd')) == before"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "1024 MiB cannot be had" in result.stdout
