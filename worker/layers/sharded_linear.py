"""Layers that servers keep and compute, and their loss. Workers never have the weights.

A forward asks every server for its part of the outputs (`ShardedForward`). The answers are all that backward needs too. See
docs/protocol.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import msgspec
import torch
from torch import nn

from roundtable.common.model.row_pages import pages
from roundtable.common.model.sparse_rows import cut, owner_of, page_ids
from roundtable.common.policies import Policy
from roundtable.common.protocol.effects import Send
from roundtable.common.protocol.messages.embedding import InitialRows
from roundtable.common.protocol.messages.setup import Request
from roundtable.common.protocol.messages.sharded import LayerPush, ShardedForward
from roundtable.common.protocol.model_spec import ShardedLayerSpec
from roundtable.common.runtime.errors import UsageError
from roundtable.worker import tensor_names
from roundtable.worker.client.context import is_accepted
from roundtable.worker.client.io_thread import IoThread
from roundtable.worker.client.sharded_client import ShardedClient
from roundtable.worker.layers.margin_losses import Margin
from roundtable.worker.layers.sharded_loss import HiddenGradient, LayerGradient, Losses, Outputs, combine
from roundtable.worker.optim.optimizer import Groups
from roundtable.worker.replica.absent_parameter import absent

#: The first id of a layer's first values is a multiple of this. No table has so many pages.
_FIRST_ID = 1 << 32
#: The attribute of features that names the layer that has returned them.
_LAYER = "roundtable_layer"

Reduction = Literal["mean", "sum", "none"]


class OnServers(nn.Module):
    """A layer like `nn.Linear` whose weight (rows, in_features), and bias if any, are split by rows over the servers.

    Here both are empty tensors of device "meta". The servers draw first values as nn.Linear does. `of` takes over the values of
    an existing layer.
    """

    def __init__(self, in_features: int, rows: int, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.empty(rows, in_features, device="meta"))
        self.bias = nn.Parameter(torch.empty(rows, device="meta")) if bias else None
        self._shards: ShardedLayers | None = None

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """Return a layer that begins with the values of `linear` on worker 0."""
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight = nn.Parameter(linear.weight.detach().clone(), linear.weight.requires_grad)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
        return layer

    @property
    def shards(self) -> ShardedLayers:
        if self._shards is None:
            raise UsageError(
                f"a {type(self).__name__} is on the servers: call run.replicate(model) and run.optimizer(...) before it is used."
            )
        return self._shards

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the run: a copy of the layer, or one read from a file, does not belong to it."""
        return {**self.__dict__, "_shards": None}


class ShardedLinear(OnServers):
    """The last layer of a classifier, `nn.Linear(in_features, num_classes)`, with its rows split over the servers.

    Called with features (B, in_features), the layer returns them for `sharded_cross_entropy`. No process ever has all logits.
    """

    def __init__(self, in_features: int, num_classes: int, bias: bool = False, sample_rate: float = 1.0) -> None:
        """Make the layer. With `sample_rate` below 1, each round draws that share of the classes and uses only these.

        Each sample's own class is always used (An et al., "Partial FC: Training 10 Million Identities on a Single Machine",
        2021).
        """
        if in_features < 1 or num_classes < 2 or not 0.0 < sample_rate <= 1.0:
            raise UsageError(
                f"ShardedLinear({in_features}, {num_classes}, sample_rate={sample_rate:g}) cannot be: it needs at least 1 "
                "feature, at least 2 classes, and a sample_rate above 0 and at most 1."
            )
        super().__init__(in_features, num_classes, bias)
        self.num_classes, self.sample_rate = num_classes, sample_rate

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the same features (B, in_features). `sharded_cross_entropy` then knows that they are this layer's."""
        marked = features.view_as(features)
        setattr(marked, _LAYER, self)
        return marked

    def topk(self, features: torch.Tensor, k: int, cosine: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the k largest logits (B, k) for `features` (B, in_features), largest first, and their classes (B, k), int64.

        With `cosine`, take the largest cosines between features and rows: use it after training with a margin.
        """
        return self.shards.topk(self, features, k, cosine)


class ColumnParallelLinear(OnServers):
    """`nn.Linear(in_features, out_features)` whose outputs are split over the servers, which compute them in float32.

    A forward is one round trip to all servers, and a backward is another. The servers compute the weight's gradient at the end
    of a round ("column parallel": Shoeybi et al., "Megatron-LM", 2019).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        if in_features < 1 or out_features < 1:
            raise UsageError(f"ColumnParallelLinear({in_features}, {out_features}) cannot be: it needs a feature and an output.")
        super().__init__(in_features, out_features, bias)
        self.out_features = out_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the outputs (..., out_features) for features (..., in_features), on their device and of their dtype."""
        flat = features.reshape(-1, features.shape[-1]) if features.dim() else features
        return self.shards.outputs(self, flat).view(*features.shape[:-1], self.out_features)


def sharded_cross_entropy(
    features: torch.Tensor,
    labels: torch.Tensor,
    layer: ShardedLinear | None = None,
    label_smoothing: float = 0.0,
    margin: Margin | None = None,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """Return `nn.functional.cross_entropy(linear(features), labels)` for a ShardedLinear `linear`, in one round trip, float32.

    Features are (B, in_features), and labels (B) integers. `layer` is by default the layer that returned the features.
    `margin`, `CosFace` or `ArcFace`, normalises features and rows. Without gradients, the loss is over all classes, even if the
    layer's sample_rate is below 1. Raises UsageError for labels that are no class of the layer, and for arguments that do not
    fit together.
    """
    layer = layer if layer is not None else getattr(features, _LAYER, None)
    if not isinstance(layer, ShardedLinear):
        raise UsageError("sharded_cross_entropy() needs the output of a ShardedLinear, or the layer itself as `layer`.")
    losses = layer.shards.losses(layer, features, labels, label_smoothing, margin)
    match reduction:
        case "mean":
            return losses.mean()
        case "sum":
            return losses.sum()
        case "none":
            return losses
    raise UsageError(f"reduction is '{reduction}'; it must be mean, sum or none.")


# ---- setting up


@dataclass(frozen=True)
class Sharded:
    """A sharded layer, and its description for the servers."""

    spec: ShardedLayerSpec
    layer: OnServers


def find_layers(model: nn.Module, groups: Groups) -> list[Sharded]:
    """Return all sharded layers of `model`. Raises UsageError for one that cannot be trained."""
    group_of = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
    found = []
    for name, layer in model.named_modules():
        if not isinstance(layer, OnServers):
            continue
        name = tensor_names.plain(f"{name}.weight" if name else "weight")
        parts = [p for p in (layer.weight, layer.bias) if p is not None]
        if len({group_of.get(id(p), -1) for p in parts}) > 1 or id(layer.weight) not in group_of:
            raise UsageError(f"'{name}' is sharded: it and its bias must be trained, and be in one parameter group.")
        if any(p.dtype != torch.float32 for p in parts):
            raise UsageError(f"'{name}' is {layer.weight.dtype}, and sharded layers are kept in torch.float32.")
        std = (3 * layer.in_features) ** -0.5 if layer.weight.is_meta else None
        dim, bias = layer.in_features + len(parts) - 1, layer.bias is not None
        rate, hidden = (layer.sample_rate, False) if isinstance(layer, ShardedLinear) else (1.0, True)
        spec = ShardedLayerSpec(name, len(layer.weight), dim, group_of[id(layer.weight)], std, bias, rate, hidden)
        found.append(Sharded(spec, layer))
    return found


def check_sharding(layers: Sequence[Sharded], policy: Policy, clips: bool) -> None:
    """Raise UsageError if sharded layers cannot be trained under this policy or with clipping."""
    for sharded in layers:
        name, its = f"'{sharded.spec.name}' is sharded", f"policy {policy.settings.policy}"
        if policy.is_local:
            raise UsageError(f"{name}, but {its} trains replicas that have all parameters: choose another policy.")
        if policy.applies == "push" and clips:
            raise UsageError(
                f"{name}, but under {its} workers clip their own gradients, and this layer's gradient is on the servers: "
                "leave out clip_norm, or choose sync or backup."
            )
        if policy.settings.delay_compensation:
            raise UsageError(f"{name}, but servers do not keep old rows: leave out --delay-compensation.")


class ShardedLayers:
    """The sharded layers of one worker's model, and the client that asks servers about them. There may be no layer."""

    def __init__(
        self,
        link: IoThread,
        layers: Sequence[Sharded],
        servers: int,
        version: Callable[[], int],
        timeout: float,
        first_number: int,
        tables: int,
        sends_first: bool,
        may_be_replaced: bool = False,
    ) -> None:
        """Put absent parameters into the layers. The servers must have the Setup.

        If `sends_first`, send first values, whose ids come after those of `tables` tables. `version()` returns the round that is
        computed. For `first_number` and `may_be_replaced` see `ShardedClient`.
        """
        self._link = link
        self._specs = [sharded.spec for sharded in layers]
        self._servers = servers
        self._version = version
        self._timeout = timeout
        self.client = ShardedClient(self._specs, servers, first_number, may_be_replaced)
        self._layers = [sharded.layer for sharded in layers]
        self._used: list[LayerGradient | HiddenGradient] = []
        #: Whether a question was about a round that is over. Nothing computed in it is of use then.
        self.round_invalid = False
        for number, sharded in enumerate(layers):
            if sends_first and sharded.spec.std is None:
                self._send_first(number, sharded, tables)
            layer = sharded.layer
            name = sharded.spec.name
            layer.weight = absent(layer.weight, name)
            if layer.bias is not None:
                layer.bias = absent(layer.bias, f"{name.removesuffix('weight')}bias")
            layer._shards = self

    def _send_first(self, number: int, of: Sharded, tables: int) -> None:
        parts = [of.layer.weight, *([of.layer.bias[:, None]] if of.layer.bias is not None else [])]
        rows = torch.cat([part.detach().cpu() for part in parts], 1)
        for page in pages(of.spec):
            ids = page_ids(of.spec, page)
            owners = owner_of(ids, self._servers)
            id_ = _FIRST_ID * (number + 1) + page
            for server in range(self._servers):
                frames = cut(rows[ids[owners == server]])
                self._link.request(
                    f"server-{server}",
                    InitialRows(id_, tables + number, page),
                    is_accepted(Request.INITIAL_ROWS, id_),
                    self._timeout,
                    frames,
                )

    # ---- asking

    def _ask(self, layer: OnServers, question: ShardedForward, tensors: Sequence[torch.Tensor]) -> bool:
        """Ask, and return whether the answers are here. Return False if the round is over."""
        with self._link.lock:
            messages = self.client.ask(question, tensors, time.monotonic())
        return self._is_answered(layer, messages)

    def _ask_back(self, layer: OnServers, question: ShardedForward, slopes: torch.Tensor, features: torch.Tensor) -> bool:
        """Ask for the gradients of a hidden layer's features, and return whether the answers are here, like `_ask`."""
        with self._link.lock:
            messages = self.client.ask_back(question, slopes, features, time.monotonic())
        return self._is_answered(layer, messages)

    def _is_answered(self, layer: OnServers, messages: Sequence[Send]) -> bool:
        self._link.send(*messages)
        self._wait(layer)
        return not self.client.gone

    def _wait(self, layer: OnServers) -> None:
        client, name = self.client, self._specs[self._number(layer)].name

        def waited_for() -> str:
            return f"the outputs of '{name}' for round {self._version()} from {' and '.join(client.missing())}"

        self._link.wait(lambda: client.complete, self._timeout, waited_for)

    def _number(self, layer: OnServers) -> int:
        return next(number for number, known in enumerate(self._layers) if known is layer)

    def _features(self, layer: OnServers, features: torch.Tensor) -> torch.Tensor:
        if features.dim() != 2 or features.shape[1] != layer.in_features or not len(features):
            kind = type(layer).__name__
            raise UsageError(f"features are {tuple(features.shape)}, but a {kind} takes (samples, {layer.in_features}).")
        return features.detach().to("cpu", torch.float32).contiguous()

    def losses(
        self, layer: ShardedLinear, features: torch.Tensor, labels: torch.Tensor, smoothing: float, margin: Margin | None
    ) -> torch.Tensor:
        """Return the loss of each sample (B); see `sharded_cross_entropy`."""
        name = self._specs[self._number(layer)].name
        if labels.shape != features.shape[:1] or labels.is_floating_point():
            raise UsageError(f"labels are {labels.dtype} {tuple(labels.shape)}; they must be integers, one for each sample.")
        wrong = labels[(labels < 0) | (labels >= layer.num_classes)]
        if len(wrong):
            raise UsageError(f"label {int(wrong[0])} is none of the {layer.num_classes} classes of '{name}', which count from 0.")
        if not 0.0 <= smoothing < 1.0:
            raise UsageError(f"label_smoothing is {smoothing}; it must be 0 or more, and below 1.")
        if smoothing and (margin is not None or layer.sample_rate < 1.0):
            raise UsageError("label_smoothing goes neither with a margin nor with a sample_rate below 1: leave out one of them.")
        if margin is not None:
            if layer.bias is not None:
                raise UsageError(f"'{name}' has a bias, but a margin is between directions: make the layer with bias=False.")
            features = nn.functional.normalize(features) * margin.scale
        contributes = torch.is_grad_enabled()
        question = ShardedForward(
            0, self._number(layer), self._version(), len(features), contributes, margin is not None, sums=smoothing > 0.0
        )
        x, y = self._features(layer, features), labels.detach().to("cpu", torch.int64).contiguous()
        if not self._ask(layer, question, [x, y]):
            self.round_invalid = True
            return torch.zeros(len(features), device=features.device, requires_grad=contributes)
        found = combine(self.client.take(), x, y, self._servers, layer.num_classes, smoothing, margin)
        if not contributes:
            return found.losses.to(features.device)
        number, smoothed = self.client.number, smoothing / layer.num_classes

        def backward(g: torch.Tensor) -> None:
            g = g.cpu()
            self._used.append(LayerGradient(number, smoothed, found.log_total, g, g * found.own_slope))

        device = features.device
        anchor = torch.zeros((), requires_grad=True)  # makes backward run even if features need no gradient
        return Losses.apply(features, anchor, found.losses.to(device), found.slope.to(device), backward)  # type: ignore[no-any-return, no-untyped-call]

    def outputs(self, layer: ColumnParallelLinear, features: torch.Tensor) -> torch.Tensor:
        """Return a hidden layer's outputs (B, out_features) for features (B, D)."""
        x, number, contributes = self._features(layer, features), self._number(layer), torch.is_grad_enabled()
        question = ShardedForward(0, number, self._version(), len(x), contributes)
        if self.round_invalid or not self._ask(layer, question, [x]):
            self.round_invalid = True
            return features.new_zeros(len(x), layer.out_features, requires_grad=contributes)
        y = self.client.take_outputs().to(features)
        if not contributes:
            return y
        question = msgspec.structs.replace(question, back_through=self.client.number)

        def backward(g: torch.Tensor) -> torch.Tensor:
            slopes = g.to("cpu", torch.float32).contiguous()
            if self.round_invalid or not self._ask_back(layer, question, slopes, x):
                self.round_invalid = True
                return torch.zeros_like(features)
            self._used.append(HiddenGradient(self.client.number, slopes))
            return self.client.take_slopes().to(features)

        return Outputs.apply(features, torch.zeros((), requires_grad=True), lambda: y, backward)  # type: ignore[no-any-return, no-untyped-call]

    def topk(self, layer: ShardedLinear, features: torch.Tensor, k: int, cosine: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the largest logits and their classes; see `ShardedLinear.topk`."""
        if not 1 <= k <= layer.num_classes:
            raise UsageError(f"k is {k}; there are {layer.num_classes} classes.")
        x = self._features(layer, nn.functional.normalize(features) if cosine else features)
        self._ask(layer, ShardedForward(0, self._number(layer), self._version(), len(x), normalised=cosine, top=k), [x])
        values, classes = self.client.take_best()
        return values.to(features.device), classes.to(features.device)

    # ---- contributions

    def contribution(self, weight: float) -> list[LayerGradient | HiddenGradient]:
        """Return the gradients that backward has made since the last call, times the micro-batch's weight. None if that is 0."""
        used = [use.times(weight) for use in self._used] if weight else []
        self.forget()
        self.round_invalid = False
        return used

    def forget(self) -> None:
        """Drop the gradients, as zero_grad does."""
        self._used = []

    def push(self, push: LayerPush, uses: Sequence[LayerGradient | HiddenGradient], bases: Mapping[int, int]) -> None:
        """Push contributions to all servers. `push` has no uses yet, nor what differs between servers."""
        if self._layers:
            tensors = [tensor for use in uses for tensor in use.tensors]
            push = msgspec.structs.replace(push, uses=[use.use for use in uses])
            with self._link.lock:
                messages = self.client.push(push, tensors, bases, time.monotonic())
            self._link.send(*messages)
