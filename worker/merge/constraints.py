"""Constraints that a parametrization sets for a layer's weight, restored after a merge.

A spectral norm divides a weight by its largest singular value. It estimates that value from two unit vectors, which are buffers
and follow the weight by a step of power iteration in each forward. The vectors of one replica do not fit the mean of several
weights. Orthogonal weights and weight normalisation need no such step, because they hold for any values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

#: Steps of power iteration: as many as torch takes when it makes such a layer.
STEPS = 15


@torch.no_grad()
def put_back(model: nn.Module) -> None:
    """Fit the unit vectors of all spectral norms in `model` to its weights.

    All workers get the same bits from the same weights and vectors.
    """
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                before, hook.n_power_iterations = hook.n_power_iterations, STEPS
                hook.compute_weight(module, do_power_iteration=True)
                hook.n_power_iterations = before
        for several in getattr(module, "parametrizations", {}).values():
            if any(isinstance(one, _SpectralNorm) for one in several):
                _fit(several)


def unit_vectors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the unit vectors of all spectral norms in `model`, by their names in its state_dict."""
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
        ours = [f"{hook.name}_{end}" for hook in hooks for end in "uv"]
        ours += ["_u", "_v"] if isinstance(module, _SpectralNorm) else []
        buffers = dict(module.named_buffers(recurse=False))
        found |= {f"{name}.{key}" if name else key: buffers[key] for key in ours if key in buffers}
    return found


def _fit(several: Any) -> None:
    """Fit the unit vectors of one weight's parametrizations. Each of these makes a weight for the next one."""
    weight: Any = getattr(several, "original", None)  # other parametrizations have several originals
    for one in several if weight is not None else ():
        if isinstance(one, _SpectralNorm) and weight.ndim > 1:
            one._power_method(one._reshape_weight_to_matrix(weight), STEPS)
        was_training, _ = one.training, one.eval()
        weight = one(weight)
        one.train(was_training)


def fitted(merged: dict[str, torch.Tensor], part: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `merged`, a mean of models by name, with unit vectors of spectral norms that fit its weights.

    The vectors start from those of `part`, one of the models. torch's names for them tell which tensors they are.
    """
    out = dict(merged)
    for name in merged:
        for u, v, weight in _SPECTRAL:
            stem = name.removesuffix(u)
            if stem != name and {stem + v, stem + weight} <= merged.keys():
                out[name], out[stem + v] = _iterated(merged[stem + weight], part[name], part[stem + v], part[stem + weight])
    return out


#: Suffixes of unit vectors and their weight, in a parametrization and in the older form.
_SPECTRAL = (("0._u", "0._v", "original"), ("_u", "_v", "_orig"))


def _iterated(weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return u and v after power iteration with `weight`.

    The dimension of u is not known. It is the one along which u and v best fit `theirs`, the weight that they come with.
    """
    fits = [dim for dim in range(weight.ndim) if (weight.shape[dim], weight.numel() // len(u)) == (len(u), len(v))]
    if not fits:
        return u, v
    best = max(fits, key=lambda dim: float(abs(u.double() @ _matrix(theirs, dim).double() @ v.double())))
    matrix = _matrix(weight, best)
    for _ in range(STEPS):
        u = nn.functional.normalize(matrix @ v, dim=0, eps=1e-12)
        v = nn.functional.normalize(matrix.t() @ u, dim=0, eps=1e-12)
    return u, v


def _matrix(weight: torch.Tensor, dim: int) -> torch.Tensor:
    return weight.movedim(dim, 0).flatten(1)
