"""How a training script is started: as a file or as a module, and what launchers tell it in the environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

#: Stands before a module's name where a script is named, as on the command line.
_AS_MODULE = "-m "
#: A local rank by which libraries know that there is no process group. If a user sets it, no ranks are set here.
_NO_RANK = "-1"
#: Where launchers of other programs say how many processes they have started: the launcher, and the variables, of which the
#: first that is there counts.
_LAUNCHERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("mpirun", ("OMPI_COMM_WORLD_SIZE",)),
    ("srun", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")),
    ("mpirun", ("PMI_SIZE",)),
)
#: Where such launchers number the processes of one host.
_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "MPI_LOCALRANKID")


def as_module(name: str) -> str:
    """Return what names the module `name` in place of a script's path: `-m package.module`."""
    return _AS_MODULE + name


def module_of(script: str) -> str | None:
    """Return the name of the module that `script` stands for; None if it is a file's path."""
    return script.removeprefix(_AS_MODULE).strip() if script.startswith(_AS_MODULE) else None


def name_of(script: str) -> str:
    """Return the name of a run of `script`: the file's without its ending, or the last part of the module's."""
    module = module_of(script)
    return Path(script).stem if module is None else module.rpartition(".")[2]


def words_of(script: str) -> list[str]:
    """Return the words of a command line that name `script`."""
    module = module_of(script)
    return [script] if module is None else [_AS_MODULE.strip(), module]


def rank_variables(env: Mapping[str, str], rank: int, workers: int, local_rank: int) -> dict[str, str]:
    """Return the variables in which other libraries look for the number of a process.

    `rank` is the worker's number, and `workers` how many there are when it begins. `env` may have a local rank already, which
    beats `local_rank`. If it is -1, the user wants none of these variables.
    MASTER_ADDR and MASTER_PORT are left out, so that no library waits for a process group: workers may come and go.
    """
    local = next((env[name] for name in _LOCAL_RANKS if env.get(name)), str(local_rank))
    if local == _NO_RANK:
        return {}
    return {"RANK": str(rank), "WORLD_SIZE": str(max(workers, rank + 1)), "LOCAL_RANK": local}


def other_launcher(env: Mapping[str, str]) -> tuple[str, int] | None:
    """Return the launcher of another program that has started this process beside others, and their number; None if none has."""
    if "TORCHELASTIC_RUN_ID" in env and (count := _number(env, "WORLD_SIZE")) > 1:
        return "torchrun", count
    for name, variables in _LAUNCHERS:
        if (count := next((_number(env, variable) for variable in variables if variable in env), 0)) > 1:
            return name, count
    return None


def _number(env: Mapping[str, str], variable: str) -> int:
    text = env.get(variable, "")
    return int(text) if text.isdecimal() else 0
