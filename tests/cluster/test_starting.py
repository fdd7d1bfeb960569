"""Starting a script: as a module, with the variables of ranks, and not by another program's launcher."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import START_S, Launched

from roundtable.common.config.launching import as_module, module_of, name_of, other_launcher, rank_variables, words_of

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch.py"

#: Runs a script as a worker does, up to its joining.
AS_WORKER = "from roundtable.worker.tools.run_script import run_script; run_script('tcp://h:1', {script!r}, ['--lr', '1'], 1)"
SAYS = "from . import conf; import sys; print(__name__, __package__, conf.N, sys.path[0], *sys.argv, common.HERE)"

TRAIN = """
import os, signal, sys, time
from pathlib import Path
import torch, roundtable
from common import HERE
from .conf import N

before = os.environ.get("RANK")
run = roundtable.join()
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
print("ranks", before, *(os.environ.get(name) for name in names), *sys.argv[1:], HERE, flush=True)
if "late" in sys.argv:
    Path("late").touch()
model = run.replicate(torch.nn.Linear(8, N))
opt = run.optimizer(torch.optim.SGD, lr=0.1)
data = torch.utils.data.TensorDataset(torch.ones(8, 8), torch.ones(8, N))
for x, y in run.batches(data, micro_batch=1, global_batch=4, epochs=2):
    if before == "1" and run.round == 1 and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while run.index == 0 and run.round == 2 and not Path("late").exists():
        time.sleep(0.05)
    torch.nn.functional.mse_loss(model(x), y).backward()
    opt.step()
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Make a package with a relative import, beside one that is called as a room of ours, and return their folder."""
    for name, files in {
        "mine": {"__init__": "", "conf": "N = 4", "train": TRAIN, "__main__": f"import common\n{SAYS}"},
        "common": {"__init__": "HERE = 'ours is another'"},
    }.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / f"{file}.py").write_text(text)
    return tmp_path


def test_a_script_is_a_file_or_a_module() -> None:
    assert module_of(as_module("a.train")) == "a.train" and module_of("a/train.py") is None
    assert words_of("-m a.train") == ["-m", "a.train"] and words_of("a train.py") == ["a train.py"]
    assert (name_of("-m a.train"), name_of("a/train.py")) == ("train", "train")


def test_ranks_are_set_unless_the_user_says_that_there_are_none() -> None:
    assert rank_variables({}, 1, 4, 1) == {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert rank_variables({"SLURM_LOCALID": "0"}, 5, 4, 5) == {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "0"}
    assert rank_variables({"LOCAL_RANK": "-1"}, 1, 4, 1) == {}


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, None),
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4"}, ("torchrun", 4)),
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "4"}, None),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "8"}, ("srun", 8)),
        ({"SLURM_NTASKS": "8", "OMPI_COMM_WORLD_SIZE": "2"}, ("mpirun", 2)),
        ({"PMI_SIZE": "3"}, ("mpirun", 3)),
        ({"PMI_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "", "SLURM_NTASKS": "1"}, None),
    ],
)
def test_other_launchers_are_known_by_their_variables(env: dict[str, str], found: tuple[str, int] | None) -> None:
    assert other_launcher(env) == found


def run_python(folder: Path, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *argv]
    return subprocess.run(command, cwd=folder, env=os.environ | env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", ["-m mine", "-m mine.__main__"])
def test_a_module_runs_as_python_runs_it(package: Path, script: str) -> None:
    asked = run_python(package, "-c", AS_WORKER.format(script=script))
    plain = run_python(package, *words_of(script), "--lr", "1")
    assert plain.stdout == asked.stdout, asked.stderr
    assert plain.stdout == f"__main__ mine 4 {package} {package / 'mine' / '__main__.py'} --lr 1 ours is another\n"


def test_a_file_finds_what_stands_beside_it_before_all_else(package: Path) -> None:
    (package / "train.py").write_text("import sys, common; print(sys.path[:2], common.HERE)")
    asked, plain = run_python(ROOT, "-c", AS_WORKER.format(script=f"{package}/train.py")), run_python(ROOT, f"{package}/train.py")
    assert asked.stdout == plain.stdout and "ours is another" in plain.stdout, asked.stderr


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("mine.trian", "there is no module mine.trian that can be run"),
        ("mine.conf.N", "there is no module mine.conf.N that can be run"),
        ("common", "there is no module common that can be run"),  # it has no __main__
    ],
)
def test_a_module_that_is_not_there_is_told_in_a_sentence(package: Path, name: str, sentence: str) -> None:
    code = f"try:\n {AS_WORKER.format(script=as_module(name))}\nexcept Exception as error: print(type(error).__name__, error)"
    assert f"UsageError {sentence}" in run_python(package, "-c", code).stdout


@pytest.mark.parametrize("variables", [{"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4"}, {"PMI_SIZE": "4"}])
def test_a_script_that_another_launcher_starts_is_told_how_to_start_it(tmp_path: Path, variables: dict[str, str]) -> None:
    (tmp_path / "train.py").write_text("import roundtable\nroundtable.join()")
    done = run_python(tmp_path, "train.py", "--lr", "1", **variables)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "`roundtable local --workers 4 train.py --lr 1`" in done.stderr and "ROUNDTABLE_ALONE=1" in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "train.py"]


def lines_of(log: Path) -> list[str]:
    return re.findall(r"^ranks .*$", log.read_text(), re.M)


@pytest.mark.slow
def test_modules_train_with_ranks_also_if_they_restart_or_come_late(start: Callable[..., Launched], package: Path) -> None:
    flags = ("--workers", 2, "--servers", 1, "--run-dir", "run", "--restart-delay", 0, "--tee")
    local = start(LAUNCH, "local", *flags, "-m", "mine.train", "--", "--lr", 1)
    deadline = time.monotonic() + START_S
    while not (package / "killed").exists():
        assert time.monotonic() < deadline and local.popen.poll() is None
        time.sleep(0.05)
    address = (package / "run" / "address").read_text().strip()
    late = start(LAUNCH, "worker", "--coordinator", address, "-m", "mine.train", "late")
    code, shown = local.end(START_S)
    late_code, late_shown = late.end(START_S)
    assert (code, late_code) == (0, 0), [*shown, *late_shown]
    logs = package / "run" / "logs"
    assert lines_of(logs / "worker-0.log") == ["ranks 0 0 2 0 None --lr 1 ours is another"]
    first, again = lines_of(logs / "worker-1.log")
    assert first == "ranks 1 1 2 1 None --lr 1 ours is another"
    own = again.split()[2]  # another number, if the coordinator has not missed the killed one yet
    assert again.split()[:5] == ["ranks", "1", own, str(max(2, int(own) + 1)), "1"] and own in "123"
    (came,) = [line for line in late_shown if line.startswith("ranks ")]
    assert re.fullmatch(r"ranks None [1-3] [2-4] 0 None late ours is another", came)
    assert {line.partition(":")[0] for line in shown if ": ranks" in line} == {"worker-0", "worker-1"}
