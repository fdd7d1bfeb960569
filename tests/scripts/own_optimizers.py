"""A user's own classes of optimizers."""

from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """The sign of a momentum (Chen et al. 2023). It counts its steps with an int, as older classes do, and warms up by it."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"], state["momentum"] = 0, torch.zeros_like(p)
                state["step"] += 1
                one, other = group["betas"]
                direction = (state["momentum"] * one + p.grad * (1 - one)).sign_()
                p.sub_(direction, alpha=group["lr"] * min(1.0, state["step"] / 4))
                state["momentum"].mul_(other).add_(p.grad, alpha=1 - other)


class TrustRatio(torch.optim.SGD):
    """Scales each tensor's gradient to the tensor's norm, as LARS and LAMB do (You et al. 2017)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = p.grad * (p.norm() / (p.grad.norm() + 1e-6))
        super().step(closure)
