"""The tools for style and types find nothing in the whole project."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Words that another one has replaced (docs/glossary.md), also as a part of a name.
RETIRED = re.compile(
    r"(?<![a-z])(leas(?:e|es|ed)|takeovers?|snapshots?|planes?|lanes?|slots?|respawn\w*|crew|keepers?|spoilt)(?![a-z])"
    r"|\bbegin\w* anew\b|\bbooks\b",
    re.IGNORECASE,
)
#: Files with names and settings of before, which still count, and with titles of papers.
MAY_SAY_THEM = {
    "common/config/old_names.py",
    "tests/cluster/test_flags.py",
    "tests/cluster/test_sources.py",
    "tests/test_style.py",
}
TITLES = ("Distributed snapshots", "__slots__")


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
@pytest.mark.usefixtures("links")
def test_the_code_is_clean(command: str) -> None:
    result = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_retired_words_are_in_no_name_message_or_page() -> None:
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md", "*.toml", "*.yml"], cwd=ROOT, capture_output=True, text=True)
    names = [name for name in listed.stdout.split() if name not in MAY_SAY_THEM | {"CHANGELOG.md"}]
    assert len(names) > 400
    found = []
    for name in names:
        if name.startswith("docs/decisions/"):
            continue  # they tell what was before
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1):
            if RETIRED.search(line) and not any(title in line for title in TITLES):
                found.append(f"{name}:{number}: {line.strip()}")
    assert found == []
