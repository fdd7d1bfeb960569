"""The parameter server of PyTorch's tutorial "Implementing batch RPC processing using asynchronous executions".

One server process adds up the gradients of the trainers, steps once all have come, and returns the model to each trainer. Two
slips of the tutorial are corrected, because losses are compared: gradients are added under the lock, and are set to zero rather
than to None (the default of zero_grad has changed since).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import rpc

from benchmarks.compare.systems import Command, Job, module_command
from benchmarks.compare.training import STEPS_VARIABLE, WORKERS, Task, parse_task, train

FLAGS: tuple[str, ...] = ()
_SERVER = "server"
#: The most seconds of a call: a step of the slowest model on a busy machine.
_TIMEOUT_S = 300.0


class BatchUpdateParameterServer:
    """The model and its optimizer, in the server process."""

    def __init__(self, task: Task) -> None:
        self.model = task.workload.model()
        self.lock = threading.Lock()
        self.future_model: torch.futures.Future[nn.Module] = torch.futures.Future()
        self.curr_update_size = 0
        self.optimizer = task.workload.optimizer(self.model.parameters(), **task.workload.hyper)
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)

    def get_model(self) -> nn.Module:
        return self.model

    @staticmethod
    @rpc.functions.async_execution  # type: ignore[untyped-decorator,unused-ignore]
    def update_and_fetch_model(ps_rref: Any, grads: list[torch.Tensor]) -> torch.futures.Future[nn.Module]:
        """Add `grads`. Return the model, once the gradients of all trainers have come and are applied."""
        self: BatchUpdateParameterServer = ps_rref.local_value()
        with self.lock:
            for p, g in zip(self.model.parameters(), grads, strict=True):
                assert p.grad is not None
                p.grad += g
            self.curr_update_size += 1
            future = self.future_model
            if self.curr_update_size >= WORKERS:
                for p in self.model.parameters():
                    assert p.grad is not None
                    p.grad /= WORKERS
                self.curr_update_size = 0
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=False)
                future.set_result(self.model)
                self.future_model = torch.futures.Future()
        return future


def run_trainer(ps_rref: Any, task: Task, rank: int) -> None:
    """Train. The server calls this in each trainer's process."""
    torch.set_num_threads(1)
    model: nn.Module = ps_rref.rpc_sync(timeout=_TIMEOUT_S).get_model()

    def update() -> nn.Module:
        nonlocal model
        grads = [p.grad for p in model.parameters()]
        update_and_fetch = BatchUpdateParameterServer.update_and_fetch_model
        model = rpc.rpc_sync(ps_rref.owner(), update_and_fetch, args=(ps_rref, grads), timeout=_TIMEOUT_S)
        return model

    train(task, model, update, rank)


def not_sparse(flags: Sequence[str]) -> str:
    return "its server sends the whole model after every step, and so the whole table."


def commands(job: Job) -> list[Command]:
    """Return a command for each worker, and the server's on host 0, which has rank WORKERS."""
    return [
        Command(
            f"worker-{rank}" if rank < WORKERS else _SERVER,
            rank % WORKERS,
            module_command(__name__, "--rank", str(rank), *job.worker_arguments(), *job.flags),
            _environment(job, rank % WORKERS),
        )
        for rank in range(WORKERS + 1)
    ]


def _environment(job: Job, host: int) -> dict[str, str]:
    interface = job.hosts[host].interface
    # on one machine tensorpipe would find a way around the network between hosts
    return {"TP_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface, "BENCHMARK_TCP_ONLY": str(int(job.networked))}


def main() -> None:
    """Run as one of the processes. The server has the last rank."""
    task = parse_task(*FLAGS)
    over_tcp: dict[str, Any] = {}
    if os.environ.get("BENCHMARK_TCP_ONLY") == "1":
        over_tcp = {"_transports": ["uv"], "_channels": ["basic"]}
    meeting = Path(os.environ[STEPS_VARIABLE]).resolve() / "meeting"
    options = rpc.TensorPipeRpcBackendOptions(rpc_timeout=_TIMEOUT_S, init_method=f"file://{meeting}", **over_tcp)
    name = _SERVER if task.rank == WORKERS else f"trainer-{task.rank}"
    rpc.init_rpc(name, rank=task.rank, world_size=WORKERS + 1, rpc_backend_options=options)
    if task.rank == WORKERS:
        server = rpc.RRef(BatchUpdateParameterServer(task))
        trainers = [
            rpc.rpc_async(f"trainer-{rank}", run_trainer, args=(server, task, rank), timeout=0) for rank in range(WORKERS)
        ]
        torch.futures.wait_all(trainers)
    rpc.shutdown()


if __name__ == "__main__":
    from benchmarks.compare.systems import rpc as this  # else functions would be pickled as __main__'s, another module

    this.main()
