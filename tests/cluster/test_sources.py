"""Flags may be set by files of the folder and by the environment, and one beats the other as documented."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from roundtable import cli
from roundtable.cluster.options.command import CHILD, Command, settings_options
from roundtable.cluster.options.flags import FOUND, Choice, choose, given
from roundtable.cluster.options.sources import use_sources
from roundtable.cluster.run.exit_codes import run_command
from roundtable.cluster.run.run_directory import write_settings
from roundtable.commands import train
from roundtable.common.config.settings import Settings

Choose = Callable[..., Choice]


@pytest.fixture
def chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Choose:
    """`chosen("--workers", "3", toml="...", pyproject="...", WORKERS="4")` is what a command that trains would do."""
    monkeypatch.chdir(tmp_path)
    found: list[Choice] = []

    @click.command("local", cls=Command)
    @click.argument("script", required=False)
    @settings_options
    @click.pass_context
    def local(ctx: click.Context, script: str | None, **_: Any) -> None:
        found.append(choose(given(ctx), None, script, ctx.meta["args"], ctx.meta.get(FOUND)))

    @click.group()
    @click.pass_context
    def group(ctx: click.Context) -> None:
        if ctx.obj != CHILD:
            use_sources(ctx, {"local": local}, Path())

    group.add_command(local)

    def run(*argv: str, toml: str = "", pyproject: str = "", obj: object = None, **env: str) -> Choice:
        (tmp_path / "roundtable.toml").write_text(toml)
        (tmp_path / "pyproject.toml").write_text(pyproject)
        variables = {f"ROUNDTABLE_{name}": value for name, value in env.items()}
        CliRunner().invoke(group, ["local", *argv], env=variables, obj=obj, catch_exceptions=False)
        return found.pop()

    return run


def test_the_line_beats_the_environment_that_the_files_and_roundtable_toml_pyproject(chosen: Choose) -> None:
    pyproject = "[tool.roundtable]\nworkers = 5\nservers = 5\nepochs = 5\nmicro-batch = 5"
    toml = "workers = 4\nservers = 4\nepochs = 4"
    settings = chosen("--workers", "2", toml=toml, pyproject=pyproject, WORKERS="3", SERVERS="3").settings
    assert (settings.workers, settings.servers, settings.epochs, settings.micro_batch) == (2, 3, 4, 5)


def test_files_may_use_old_names_and_name_the_script(chosen: Choose) -> None:
    choice = chosen(toml='lane = "socket"\nscript = "train.py"\nargs = ["--lr", "1"]\nmax-restarts = 7\nname = "mine"')
    assert choice.settings.transport == "tcp" and (choice.script, choice.args) == ("train.py", ("--lr", "1"))
    assert choice.restart_policy.times == 7 and choice.run_dir == Path("runs/mine")
    assert chosen("other.py", "-x", toml='script = "train.py"\nargs = ["--lr", "1"]').args == ("-x",)


@pytest.mark.parametrize("toml", ["workers = 3", "prepared = 'resume'"])
def test_files_set_neither_what_a_command_is_about_nor_what_nobody_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toml: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "roundtable.toml").write_text(toml)
    result = CliRunner().invoke(cli.cli, ["scale", "run"], standalone_mode=False)
    missing = ("Missing parameter: workers", "there is no setting 'prepared'")
    assert any(text in str(result.exception) for text in missing)


def test_a_process_of_the_launcher_does_what_it_is_told_alone(chosen: Choose) -> None:
    settings = chosen("--workers", "2", toml="epochs = 4", obj=CHILD, SERVERS="7").settings
    assert (settings.workers, settings.servers, settings.epochs) == (2, 2, 10)


@pytest.mark.parametrize(
    ("file", "text", "part"),
    [
        ("roundtable.toml", "workrs = 3", "roundtable.toml: there is no setting 'workrs'; did you mean 'workers'?"),
        ("roundtable.toml", "workers = 'two'", "roundtable.toml: workers must be a whole number"),
        ("roundtable.toml", "port = 70000", "roundtable.toml: port must be a whole number"),
        ("pyproject.toml", "[tool.roundtable]\nlrr = 3", "[tool.roundtable] of pyproject.toml: there is no setting 'lrr'"),
        ("pyproject.toml", "[tool]\nroundtable = 3", "[tool.roundtable] of pyproject.toml must be a table"),
    ],
)
def test_a_mistake_in_a_file_names_the_file_and_the_key(
    file: str, text: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).write_text(text)
    assert run_command(cli.cli, ["local"], "roundtable") == 2
    assert part in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == [file]


def test_every_flag_of_commands_that_train_has_a_variable() -> None:
    for command in (train.local, train.coordinator, train.server, train.worker):
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden and option.name != "help_all":
                assert option.envvar, (command.name, option.name)


def test_version_is_told_and_runs_are_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert CliRunner().invoke(cli.cli, ["--version"]).output.startswith("roundtable 0.")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    write_settings(tmp_path / "runs" / "mine" / "settings.toml", Settings())
    monkeypatch.setattr("sys.argv", ["roundtable"])
    for name, value in {"_ROUNDTABLE_COMPLETE": "bash_complete", "COMP_WORDS": "roundtable scale m", "COMP_CWORD": "2"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main() == 0 and capsys.readouterr().out.strip() == "plain,mine"
