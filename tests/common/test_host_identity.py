"""Hosts are told apart by what the kernel says of them, whatever they are called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from roundtable.common.network.host_identity import Place, here, is_own

ROOT = Path(__file__).parents[2]


def elsewhere(*flags: str) -> Place:
    """The place of a process in namespaces of its own."""
    code = "from roundtable.common.network.host_identity import here; print(here().pids); print(here().network)"
    done = subprocess.run(["unshare", *flags, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no namespaces can be made here: {done.stderr.strip()}")
    return Place(*done.stdout.splitlines())


def test_processes_of_one_host_know_that() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from roundtable.common.network.host_identity import here; print(here().pids)"],
        cwd=ROOT,
        capture_output=True,
    )
    assert here().sees(Place(done.stdout.decode().strip())) and os.getpid() != 0


def test_a_container_that_is_called_alike_is_another_host() -> None:
    other = elsewhere("--pid", "--fork", "--mount-proc", "--net")
    assert other.pids and not here().sees(other) and here().cannot_reach(other)


def test_a_process_of_another_network_alone_can_be_looked_up() -> None:
    other = elsewhere("--net")
    assert here().sees(other) and here().cannot_reach(other)


def test_where_proc_shows_other_processes_than_the_own_nobody_is_looked_up() -> None:
    other = elsewhere("--pid", "--fork")
    assert other.pids == "" and not here().sees(other) and not other.sees(other)


def test_of_who_does_not_tell_nothing_is_known() -> None:
    assert not Place().sees(Place()) and not Place().cannot_reach(here()) and not here().cannot_reach(Place())


@pytest.mark.parametrize(
    ("address", "expected"),
    [("tcp://127.0.0.1:5555", True), ("tcp://localhost:1", True), ("tcp://192.0.2.1:53", False), ("junk", False)],
)
def test_an_address_of_this_host_is_known_as_such(address: str, expected: bool) -> None:
    assert is_own(address) == expected
