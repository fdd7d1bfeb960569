"""Flags and files say the same; whatever cannot be is told in one sentence, before anything is started or written."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import click
import pytest
from click.testing import CliRunner

from roundtable import cli
from roundtable.cluster.launch.checks import check_order
from roundtable.cluster.options.flags import Choice, choose
from roundtable.cluster.run.exit_codes import run_command
from roundtable.cluster.run.run_directory import run_values, to_toml, write_settings
from roundtable.cluster.run.summary import check_trained
from roundtable.commands.train import coordinator, local, worker
from roundtable.common.config.example_settings import ExampleSettings
from roundtable.common.config.settings import FIELDS, Settings, make_settings
from roundtable.common.runtime.errors import ClusterError, UsageError

Fail = Callable[..., str]


@pytest.fixture
def fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fail:
    """`fail("local", "--lr", "x", toml="...")` runs the command line in an empty folder and returns the sentence it ends with."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, toml: str | None = None) -> str:
        if toml is not None:
            (tmp_path / "f.toml").write_text(toml)
        before = sorted(tmp_path.rglob("*"))
        with mock.patch.dict("os.environ"):  # the command `worker` sets variables for its script
            assert run_command(cli.cli, argv, "launch.py") == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1, out + err
        assert sorted(tmp_path.rglob("*")) == before
        return err.removeprefix("error: ").strip()

    return run


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ("locall", "Did you mean 'local'?"),
        ("local --workrs 3", "--workers"),
        ("local --workers 0", "--workers must be a whole number of at least 1 (got 0)."),
        ("local --data imagenet", "'imagenet' is not one of"),
        ("local --data mnist", "--data mnist reads files: name the folder that holds them with --data-dir"),
        ("local --model resnet50", "'resnet50' is not one of 'lenet'"),
        ("local --optimizer adamm", "'adamm' is not one of"),
        ("local --schedule cosine", "'cosine' is not one of 'CosineAnnealingLR'"),
        ("local --workers x", "'x' is not a valid integer"),
        ("local --policy snyc", "'snyc' is not one of 'sync', 'backup'"),
        ("local --micro-batch 128", "micro_batch (128) must not exceed global_batch (64)"),
        ("local --policy backup --backup-micro-batches 4", "backup_micro_batches is 4 but a round has only 4 micro-batches"),
        ("local --policy local --workers 5", "some of 5 workers would never compute"),
        ("local --policy average --workers 5", "some of 5 workers would never compute"),
        ("local --lr nan", "--lr must be a number above 0 (got nan)."),
        ("local train.py", "there is no script train.py"),
        ("local -m no.train", "there is no module no.train"),
        ("local -m a..b", "there is no module a..b"),
        ("local -m train.py", "train.py is a file's: leave -m out."),
        ("local -m", "-m needs a module's name"),
        ("local .", ". is not a file"),
        ("local -- --lr 3", "there are arguments but no SCRIPT before them"),
        ("local --config no.toml", "there is no file no.toml"),
        ("local --data-dir no", "there is no folder no"),
        ("local --name a/b", "name must be the name of one folder (got 'a/b')"),
        ("local --name ..", "name must be the name of one folder (got '..')"),
        ("local --name=", "name must be the name of one folder (got '')"),
        ("local --run-dir=", "run_dir is empty"),
        ("local --run-dir a --name b", "give run_dir or name, not both"),
        ("local --port 70000", "70000 is not in the range"),
        ("coordinator --listen 5555", "expected tcp://HOST:PORT, got '5555'"),
        ("coordinator --listen tcp://*:70000", "the port in 'tcp://*:70000' is above 65535"),
        ("server", "--coordinator"),
        ("server --coordinator http://localhost:5555", "expected tcp://HOST:PORT, got 'http://localhost:5555'"),
        ("worker --coordinator tcp://127.0.0.1:5555 no.py", "there is no script no.py"),
        ("experiment", "FILE"),
        ("experiment no.toml", "there is no file no.toml"),
        ("merge a", "--out"),
        ("merge --out o", "MODELS"),
        ("merge a --out o", "one model alone cannot be merged"),
        ("merge a b --out o", "there is no file a"),
        ("merge a b --out o --weights 1,x", "--weights must be comma-separated numbers"),
        ("merge a b --out o --how best", "'best' is not one of 'uniform', 'samples', 'greedy'"),
        ("local --average-weights-by best", "'best' is not one of 'uniform', 'samples', 'greedy'"),
    ],
)
def test_what_cannot_be_is_one_sentence(fail: Fail, argv: str, part: str) -> None:
    assert part in fail(*argv.split())


@pytest.mark.parametrize(
    ("toml", "part"),
    [
        ("workrs = 3", "f.toml: there is no setting 'workrs'; did you mean 'workers'?"),
        ("run_dri = 'x'", "did you mean 'run_dir'?"),
        ("workers = '3'", "f.toml: workers must be a whole number (got '3')"),
        ("workers = 0", "f.toml: workers must be a whole number of at least 1 (got 0)"),
        ("optimizer = 'adamm'", "did you mean 'Adam'?"),
        ("data = 'mnist'", "--data mnist reads files"),
        ("workers =", "f.toml is not valid TOML"),
        ("[training]\nlr = 1.0", "[training] is not allowed: settings stand at the top"),
        ("run-dir = 3", "run_dir must be text (got 3)"),
        ("overwrite = 'yes'", "overwrite must be true or false (got 'yes')"),
        ("port = -1", "port must be a whole number of at least 0 (got -1)"),
        ("args = ['x']", "no SCRIPT before them"),
        ("micro_batch = 65", "micro_batch (65) must not exceed global_batch (64)"),
        ("script = 'no.py'", "there is no script no.py"),
    ],
)
def test_what_cannot_be_in_a_file_is_one_sentence(fail: Fail, toml: str, part: str) -> None:
    assert part in fail("local", "--config", "f.toml", toml=toml)


def test_a_port_in_use_is_told(fail: Fail) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port} is in use" in fail("local", "--port", str(port))
        assert "is in use by another program" in fail_of_coordinator(port)


def fail_of_coordinator(port: int) -> str:
    from roundtable.ps.coordinator.main import serve

    with pytest.raises(UsageError) as caught:
        serve(Settings(), f"tcp://127.0.0.1:{port}", Path("never"))
    return str(caught.value)


def test_every_setting_is_a_flag_of_the_same_name_with_a_description() -> None:
    options = {p.name: p for p in local.params if isinstance(p, click.Option)}
    for name in [*FIELDS, "config", "run_dir", "name", "overwrite", "port"]:
        assert options[name].help and options[name].opts[0] == "--" + name.replace("_", "-")


@pytest.mark.parametrize("command", ["", "local", "coordinator", "server", "worker", "experiment", "inspect", "scale"])
def test_help_of_every_command_fits_a_terminal_and_says_what_it_is_for(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cli.cli, [*command.split(), "--help"], "launch.py") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: launch.py {command}".strip()) and "--help" in out
    assert max(map(len, out.splitlines())) <= 110


def test_a_flag_beats_the_file_and_the_file_beats_the_default(tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_text("workers = 3\nmicro-batch = 8\nlr = 1\nname = 'there'\n")
    choice = choose({"workers": 5, "run_dir": "here"}, str(file))
    assert (choice.settings.workers, choice.settings.micro_batch, choice.settings.example.lr) == (5, 8, 1.0)
    assert choice.settings.servers == Settings().servers
    assert choice.run_dir == Path("here")


def test_a_value_of_the_file_that_a_flag_makes_right_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_text("micro_batch = 128\n")
    assert choose({"global_batch": 256}, str(file)).settings.micro_batch == 128


def test_script_and_arguments_come_from_the_line_or_the_file(tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_text("script = 'train.py'\nargs = ['a', '--b']\n")
    config = str(file)
    assert scripted(choose({}, config)) == ("train.py", ("a", "--b"))
    assert scripted(choose({}, config, None, ("c",))) == ("train.py", ("c",))
    assert scripted(choose({}, config, "other.py", ())) == ("other.py", ())
    assert choose({}, config).default_name == "train"


def scripted(choice: Choice) -> tuple[str | None, tuple[str, ...]]:
    return choice.script, choice.args


def test_what_follows_two_dashes_is_the_scripts_even_if_it_looks_like_ours() -> None:
    with local.make_context("local", ["--workers", "3", "train.py", "--", "--workers", "9", "--", "x"]) as ctx:
        assert (ctx.params["workers"], ctx.params["script"]) == (3, "train.py")
        assert ctx.meta["args"] == ("--workers", "9", "--", "x")


@pytest.mark.parametrize(
    ("argv", "script", "args"),
    [
        ("train.py --lr 1", "train.py", "--lr 1"),
        ("--servers 1 train.py a --workers 9 -- x --help", "train.py", "a --workers 9 -- x --help"),
        ("--workers=3 train.py", "train.py", ""),
        ("-m pkg.train --workers 9", "pkg.train", "--workers 9"),
        ("-m --workers 3 pkg.train -- -m x", "pkg.train", "-m x"),
        ("--servers 1 -- a --lr", None, "a --lr"),
        ("", None, ""),
    ],
)
def test_what_follows_the_script_is_the_scripts(argv: str, script: str | None, args: str) -> None:
    with local.make_context("local", argv.split()) as ctx:
        assert (ctx.params["script"], ctx.meta["args"]) == (script, tuple(args.split()))


def test_flags_of_the_example_are_refused_where_a_script_would_not_see_them(fail: Fail, tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    assert "--lr is a setting of the built-in example and has no effect on train.py" in fail("local", "--lr", "1", "train.py")
    assert "--model" in fail("local", "--config", "f.toml", "--model", "mlp", toml="script = 'train.py'")


def test_help_shows_a_dozen_flags_and_help_all_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for flag in ("--help", "--help-all"):
        assert run_command(cli.cli, ["local", flag], "launch.py") == 0
        shown[flag] = re.findall(r"^  (?:-\w, )?(--[\w-]+)", capsys.readouterr().out, re.M)
    assert 8 <= len(shown["--help"]) <= 15 and "--workers" in shown["--help"] and "--lr" not in shown["--help"]
    options = [option for option in local.params if isinstance(option, click.Option)]
    assert set(shown["--help-all"]) == {option.opts[0] for option in options} | {"--help"}


def test_every_flag_has_a_section() -> None:
    for command in (local, coordinator):
        text = CliRunner().invoke(command, ["--help-all"]).output
        other = text.partition("Other:")[2]
        assert re.findall(r"--[\w-]+", other) == ["--help-all", "--help"]


def test_the_settings_file_of_a_run_repeats_it(tmp_path: Path) -> None:
    settings = Settings(
        workers=3, policy="ssp", staleness_lr=True,
        example=ExampleSettings(lr=1e-7, clip_norm=0.5, data_dir='a "b" \\ \x7f é'),
    )  # fmt: skip
    write_settings(tmp_path / "settings.toml", settings, "train.py", ["--x", "a\nb"])
    choice = choose({}, str(tmp_path / "settings.toml"))
    assert (choice.settings, *scripted(choice)) == (settings, "train.py", ("--x", "a\nb"))


def test_what_is_not_set_is_not_in_the_settings_file() -> None:
    assert "rounds" not in to_toml(run_values(Settings(), None, ()))


def test_a_script_may_have_more_workers_than_the_settings_have_micro_batches(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.touch()
    check_order(Settings(policy="local", workers=9), str(script), 0)


def test_names_may_be_written_in_any_case() -> None:
    settings = make_settings({"optimizer": "adamw", "data": "Digits", "schedule": "none"}, "a file")
    assert (settings.example.optimizer, settings.example.data, settings.example.schedule) == ("AdamW", "digits", "none")
    with local.make_context("local", ["--optimizer", "SGD", "--model", "LeNet"]) as ctx:
        assert (ctx.params["optimizer"], ctx.params["model"]) == ("SGD", "lenet")


def test_a_run_that_trained_nothing_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"nothing was trained: train.py came to no batch"):
        check_trained({"rounds": 0, "weights_sha256": "ab"}, "train.py", tmp_path)
    check_trained({"rounds": 1, "weights_sha256": "ab"}, "train.py", tmp_path)
    check_trained({"rounds": 0, "weights_sha256": None}, "only_key_values.py", tmp_path)


@pytest.mark.parametrize("given", ["head", "head:5555", "tcp://head:5555"])
def test_the_coordinators_host_is_enough_of_its_address(given: str) -> None:
    with worker.make_context("worker", ["--coordinator", given]) as ctx:
        assert ctx.params["coordinator"] == "tcp://head:5555"


def test_a_group_without_a_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cli.cli, ["checkpoint"], "roundtable") == 2
    assert capsys.readouterr().out.startswith("Usage: roundtable checkpoint")
