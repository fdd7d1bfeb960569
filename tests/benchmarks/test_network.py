"""A benchmark removes the network that a killed one has left, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from benchmarks import network


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True, timeout=20).stdout
    return {line.split()[0] for line in listed.splitlines()}


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2")
def test_what_a_killed_benchmark_has_left_is_removed() -> None:
    waits = [sys.executable, "-c", "input()", "benchmarks"]
    with subprocess.Popen(waits, stdin=subprocess.PIPE) as lives, subprocess.Popen(waits, stdin=subprocess.PIPE) as killed:
        kept, left = (f"bench{process.pid}h0" for process in (lives, killed))
        try:
            for name in (kept, left):
                added = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False, timeout=20)
                if added.returncode:
                    pytest.skip(f"no network namespaces here: {added.stderr.strip()}")
            killed.kill()
            killed.wait(timeout=20)
            network.remove_stale()
            assert kept in namespaces() and left not in namespaces()
        finally:
            for name in (kept, left):
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False, timeout=20)
            lives.kill()
