"""The small benchmarks run and print their figures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import kv, server_step


def test_a_servers_step_is_shown_beside_memcpy() -> None:
    done = CliRunner().invoke(server_step.cli, ["--values", "5000", "--times", "1"], catch_exceptions=False)
    assert done.exit_code == 0 and re.search(r"of memcpy's [\d.]+ GB/s$", done.output, re.MULTILINE)
    assert {line.partition(":")[0] for line in done.output.splitlines()} >= {"SGD", "SGD-momentum", "Adam", "Adam-fused"}


def test_pushes_and_pulls_of_the_key_value_client_are_timed() -> None:
    done = CliRunner().invoke(kv.cli, ["--values", "1000", "--times", "2", "--servers", "1"], catch_exceptions=False)
    assert done.exit_code == 0
    assert re.search(r"^1 server, 1,000 float32: push \d+ ms \(\d+..\d+\), pull \d+ ms", done.output, re.MULTILINE)


@pytest.mark.parametrize("module", ["benchmarks", "benchmarks.kv", "benchmarks.faults", "benchmarks.classes"])
def test_without_what_they_need_beside_the_package_they_say_so_in_a_sentence(module: str) -> None:
    code = f"import sys; sys.modules['psutil'] = None; import runpy; runpy.run_module({module!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: the benchmarks need psutil, of the extra 'dev': run pip install -e '.[dev]' in a checkout.\n"
