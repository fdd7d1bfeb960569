"""Flags: their names of today, those of before, and those that other programs use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from roundtable.cli import cli
from roundtable.cluster.commands.experiment import read_experiment
from roundtable.cluster.options.command import Command, settings_options
from roundtable.cluster.options.flags import choose, given
from roundtable.common.config.old_names import OLD_NAMES
from roundtable.common.config.settings import FIELDS, Settings, make_settings
from roundtable.common.runtime.errors import UsageError


def parsed(*argv: str) -> tuple[dict[str, Any], Result]:
    """Return the user's settings, as a command that has all settings reads them."""
    found: dict[str, Any] = {}

    @click.command(cls=Command)
    @settings_options
    @click.pass_context
    def command(ctx: click.Context, **_: Any) -> None:
        found.update(given(ctx))

    return found, CliRunner().invoke(command, argv)


def test_an_old_flag_gives_the_setting_and_one_line_about_its_new_name() -> None:
    found, result = parsed("--lane", "socket", "--silence=7")
    assert found == {"transport": "tcp", "heartbeat_timeout": 7.0} and result.exit_code == 0
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and "--lane is now called --transport" in lines[0] + lines[1]


def test_a_new_flag_says_nothing() -> None:
    found, result = parsed("--transport", "tcp", "--nproc-per-node", "3", "--checkpoint-every", "0")
    assert found == {"transport": "tcp", "workers": 3, "checkpoint_every": 0.0} and result.output == ""


@pytest.mark.parametrize("both", [("--lane", "auto", "--transport", "tcp"), ("--workers", "2", "-n", "3")])
def test_two_names_of_one_flag_are_one_too_many(both: tuple[str, ...]) -> None:
    _, result = parsed(*both)
    assert result.exit_code == 2 and "are one option: give" in result.stderr and both[2] in result.stderr


def test_no_old_name_is_in_the_help() -> None:
    for command in ("local", "coordinator", "worker", "server"):
        text = CliRunner().invoke(cli, [command, "--help"]).output
        for old in OLD_NAMES:
            assert f"--{old.replace('_', '-')} " not in text, old


def test_files_understand_old_names(tmp_path: Path) -> None:
    (tmp_path / "old.toml").write_text('lane = "socket"\nsnapshot-every = 5\nrespawn = 1\n')
    choice = choose({}, str(tmp_path / "old.toml"))
    assert choice.settings == Settings(transport="tcp", checkpoint_every=5.0) and choice.restart_policy.times == 1
    (tmp_path / "many.toml").write_text('[matrix]\nlane = ["auto", "socket"]\n[settings]\nsilence = 9\n')
    cases = read_experiment(tmp_path / "many.toml").cases
    assert [case.settings.transport for case in cases] == ["auto", "tcp"]
    assert all(case.settings.heartbeat_timeout == 9.0 for case in cases)
    with pytest.raises(UsageError, match="lane and transport are one setting"):
        make_settings({"lane": "auto", "transport": "auto"}, "a file")


def test_every_old_name_leads_to_a_flag_of_today() -> None:
    flags = {name for command in cli.commands.values() for option in command.params for name in option.opts}
    assert {"--" + new.replace("_", "-") for new in OLD_NAMES.values()} <= flags
    assert not OLD_NAMES.keys() & FIELDS.keys()
