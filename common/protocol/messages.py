"""Every message there is, and its header: MessagePack, decoded into these typed structs or refused.

Tensors never travel inside a header: they follow as raw frames, in the order the header lists them, and their dtype and
shape come from the agreed layout. What waits for an answer asks again until it comes, so every request here is idempotent
and every message may be lost, repeated or late. docs/design.md says who sends what when.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec

from roundtable.common.config.batch_plan import Segment
from roundtable.common.config.field_types import Amount, ByName, Count, CountOrNone, Few, Hypers, Many, Name, Text
from roundtable.common.config.settings import Settings
from roundtable.common.config.work_shares import ShareTable
from roundtable.common.config.worker_facts import Facts
from roundtable.common.network.host_identity import NOWHERE, Place
from roundtable.common.protocol.model_spec import ClassSpec, TableSpec, TensorSpec
from roundtable.common.protocol.rejections import Kind
from roundtable.common.protocol.shared_memory import Handle
from roundtable.common.runtime.errors import UsageError, WireError, printable

T = TypeVar("T")

#: Means of a micro-batch's metrics x samples, and the samples, by name.
Sums = ByName[tuple[float, Amount]]
#: Micro-batches that a Heartbeat tells of, the first ones, in each of its lists: it is kept, and every process has one.
MOST_TOLD = 1 << 14
#: Tensors that one message names whose values were computed anew.
MOST_RECOMPUTED = 1000
Told = Annotated[list[Count], msgspec.Meta(max_length=MOST_TOLD)]
_MOST_REASON = 4000


class Body(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Base of all messages."""


def _keep_printable(message: Refused | Stop | CheckpointStatus | Goodbye) -> None:
    """Cut the reason to what may be sent, and leave nothing in it that would be more than letters on a terminal or in a log."""
    msgspec.structs.force_setattr(message, "reason", printable(message.reason)[:_MOST_REASON])


# ---- joining (server or worker <-> coordinator)


class Hello(Body, frozen=True):
    """May I take part? `address` is where workers reach a server. `arithmetic` is what equal bits need to be equal.
    `host` is a name for people; `place` is what tells hosts apart."""

    role: Literal["server", "worker"]
    index: Count | None = None
    address: Annotated[str, msgspec.Meta(max_length=300)] = ""
    host: Annotated[str, msgspec.Meta(max_length=300)] = ""
    pid: Count = 0
    arithmetic: ByName[Name] = {}
    place: Place = NOWHERE

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "host", printable(self.host))


class Peer(msgspec.Struct, frozen=True, array_like=True):
    """A server, by where it is reached. Another incarnation is another process, which has the shard of the one before it. Only
    servers are told the true one."""

    address: Annotated[str, msgspec.Meta(max_length=300)]
    incarnation: Count


class Welcome(Body, frozen=True):
    """You are `process` of run `run`. Sent when all expected processes are there. The run directory is `run_dir` where the
    coordinator is; the run goes on from the snapshot of round `resume` in it (-1: it begins). `replaces`: you are in the place
    of a server that is gone, and the next one has a copy of its shard. A worker writes `ticket` on what it sends to servers
    (`common/protocol/tickets.py`), which check it with `key`."""

    process: Name
    run: Name
    settings: Settings
    servers: Many[Peer]
    tables: Annotated[list[ShareTable], msgspec.Meta(min_length=1, max_length=1000)]
    run_dir: Text = ""
    resume: int = -1
    replaces: bool = False
    ticket: Count = 0
    key: Annotated[bytes, msgspec.Meta(max_length=64)] = b""


class Refused(Body, frozen=True):
    """No, and why, in a sentence. `about` is the type of the refused message."""

    about: Name
    reason: Text

    def __post_init__(self) -> None:
        _keep_printable(self)


# ---- staying in touch


class Traffic(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a process has had to do with tensors in frames so far: bytes that a worker has sent and received, repetitions
    included, and seconds that codecs took."""

    pushed_bytes: Count = 0
    pulled_bytes: Count = 0
    encode_seconds: Amount = 0.0
    decode_seconds: Amount = 0.0


class Heartbeat(Body, frozen=True):
    """I am alive. A worker tells where it is; the coordinator's answer is a Heartbeat as well.

    `round` is the round worked on or waited for, `at` its micro-batch being computed (-1: none), `left` those leased and not
    begun, `sent` those pushed that servers have not acknowledged, `seconds` how long a micro-batch takes, `rate` samples per
    second while computing, `transfer` seconds until servers have a contribution. Of a server, `round` is the open one, `left`
    its micro-batches that have not arrived, and `at` grows while it is at something that takes long. Of a script without rounds,
    `at` counts answers of the key-value store. `keeps` are the servers of whose shards it has a whole copy. `refused` are the
    messages that were refused here so far, by kind.

    Where many rounds can be open, a worker in round `reached` may be at a micro-batch of an earlier one, and `taken` are those
    (round, micro-batch) that it has taken over and not begun, of other rounds than `round`; and `later` are micro-batches that
    have not arrived at a server, of each of the rounds after its earliest open one.

    `unreached` are numbers of servers to which this process has had no connection for a while. To a process that has joined a
    run which has not started, the coordinator says who is `missing`.

    A process that was told to stop says that it `leaves`, and goes on until it may. The coordinator answers a worker likewise,
    and counts a server as lost.

    `unsteady` is the first parameter whose gradient had other bits when a worker computed its first micro-batch a second time.
    """

    state: Literal["", "starting", "computing", "waiting", "done"] = ""
    round: CountOrNone = -1
    at: CountOrNone = -1
    left: Told = []
    sent: Told = []
    seconds: Amount = 0.0
    rate: Amount = 0.0
    transfer: Amount = 0.0
    traffic: Traffic = Traffic()
    keeps: Few[Count] = []
    refused: Annotated[dict[Kind, Count], msgspec.Meta(max_length=20)] = {}
    reached: CountOrNone = -1
    taken: Annotated[list[tuple[Count, Count]], msgspec.Meta(max_length=MOST_TOLD)] = []
    later: Annotated[list[Told], msgspec.Meta(max_length=MOST_TOLD)] = []
    missing: Name = ""
    unreached: Few[Count] = []
    leaves: bool = False
    unsteady: Name = ""

    def __post_init__(self) -> None:
        if self.later and sum(map(len, self.later)) > MOST_TOLD:
            raise ValueError(f"more than {MOST_TOLD} micro-batches are told to be missing in later rounds")


class MembershipUpdate(Body, frozen=True):
    """The shares in force from some rounds on, oldest first; a new one opens a membership epoch. The servers are these."""

    tables: Annotated[list[ShareTable], msgspec.Meta(min_length=1, max_length=1000)]
    servers: Many[Peer] = []


class RequestWork(Body, frozen=True):
    """My micro-batches of `round` are done and it is not complete: is there one that I can take over?"""

    round: Count


class Reassign(Body, frozen=True):
    """Micro-batch `k` of `round` is now `to`'s; `owner`, who had it, leaves it out unless it is being computed."""

    round: Count
    k: Count
    to: Name
    owner: Name


class MembersLost(Body, frozen=True):
    """To servers: as of membership epoch `epoch` these workers are lost, or have left early. Refuse what they send, and keep
    nothing for them. The servers are these. Who knows it has that epoch in its headers."""

    epoch: Count
    workers: Many[Name]
    servers: Many[Peer] = []


class Stop(Body, frozen=True):
    """The run is over. `ok`: finished and saved. Else `reason` is a sentence; `again`: it goes on, from its newest snapshot or
    just without you, so begin anew; `told`: somebody has told it to stop, and it can go on later."""

    ok: bool
    reason: Text = ""
    again: bool = False
    told: bool = False

    def __post_init__(self) -> None:
        _keep_printable(self)


# ---- setting up (worker -> coordinator and servers)


class Update(msgspec.Struct, frozen=True):
    """How servers turn a merged contribution into new weights.

    `optimizer` names a class of torch.optim; None replaces the weights by the contribution. `groups` are its parameter
    groups' arguments. `clip_norm` bounds the gradient's norm over all servers.
    """

    optimizer: Name | None
    groups: Many[Hypers]
    clip_norm: float | None = None


class InFile(msgspec.Struct, frozen=True, array_like=True):
    """A tensor of the model's file, under a name of the model's state_dict. `dtype` is what safetensors calls it.

    `of` says which tensor of a Setup it is, or which several, one after another; none of an empty tensor, which no server has. A
    Setup's tensors are counted first, then its tables, then the weights of its classifiers, then their biases. `counts`: its
    bytes are among those of weights_sha256.
    """

    name: Name
    dtype: Name
    shape: Annotated[list[Count], msgspec.Meta(max_length=64)]
    of: Annotated[list[Count], msgspec.Meta(max_length=64)]
    counts: bool = False


class Setup(Body, frozen=True):
    """This is the model and its optimizer. The first one defines them; every other must be the same. `file` are the tensors of
    the model's file, in their order there. The coordinator is told of `facts` too, which all workers must have in common."""

    tensors: Many[TensorSpec]
    update: Update
    tables: Many[TableSpec] = []
    classifiers: Many[ClassSpec] = []
    file: Annotated[list[InFile], msgspec.Meta(max_length=1_000_000)] = []
    facts: Facts = []


class Plan(Body, frozen=True):
    """The next rounds are these. The first one defines them; every other must be the same; `facts` as in Setup. Servers take it
    with the `seal` that the coordinator gave."""

    segment: Segment
    seal: Count = 0
    facts: Facts = []


class Ready(Body, frozen=True):
    """Setup, Plan or Init number `id` is known here. In answer to Setup, `lacks` says that this server has no first weights yet,
    or, of the coordinator, that whoever asks is the one to send them, and `first` names that worker. `seal` is for the Plan."""

    about: Name
    id: Count = 0
    lacks: bool = False
    seal: Count = 0
    first: Name = ""


class InitialWeights(Body, frozen=True):
    """Weights to start from: one frame of weights (in their own dtype) for each of `chunks`. Only the first copy counts."""

    chunks: Many[Count]


class OfferSharedMemory(Body, frozen=True):
    """My gradients lie in this memory, if any: can you read it?"""

    gradients: Handle | None


class SharedMemoryReply(Body, frozen=True):
    """Whether the worker's gradients can be read here, and the memory in which weights are laid out, if any."""

    reads: bool
    weights: Handle | None


# ---- rounds (worker <-> server)


class Push(Body, frozen=True):
    """The sum over micro-batches lo..hi-1 of `round` (gradient x samples), one frame for each of `chunks` but those of parameters
    none of which had a gradient.

    Where worker and server share memory there are no frames: the values are in `slot` of the worker's region, and stay there
    until the round is applied. They are still to be multiplied by `scale`, a power of two.
    What is sent `early`, while the rest of it is being computed, is only kept: it counts when the same without frames says
    `confirm`.
    Where workers step locally, `lo` is the worker's number and `round` counts merges. `present[i]` has bit p set where
    piece p of chunks[i] had a gradient, or is a buffer that has changed. `metrics` (only to server 0, once per span) maps
    names to [sum x samples, samples]. `base` is the version of the weights it was computed from, and `hypers` the parameter
    groups' settings for the round. The frames of `coded`, some of `chunks`, are the push codec's (`common/codecs/registry.py`);
    `scale` is in them already. Unless the whole contribution, on all servers, is `finite`, it moves nothing. Where workers step
    locally, values are multiplied by `weight`, and not by samples.
    """

    round: Count
    lo: Count
    hi: Count
    samples: Count
    micro_batches: Count
    chunks: Many[Count]
    present: Many[int]
    base: Count = 0
    metrics: Sums | None = None
    hypers: Many[Hypers] = []
    slot: CountOrNone = -1
    scale: float = 1.0
    stage: Literal["whole", "early", "confirm"] = "whole"
    coded: Many[Count] = []
    finite: bool = True
    weight: Count = 0

    @property
    def key(self) -> tuple[int, int, int]:
        """Which contribution it is, or is a part of."""
        return self.round, self.lo, self.hi


class Ack(Body, frozen=True):
    """That push (`chunks`, and the metrics if it had any) needs not be sent again. No copy of it has counted in the chunks
    `ignored`: others did that before, or the round is over. `early`: it is here, and does not count yet."""

    round: Count
    lo: Count
    hi: Count
    chunks: Many[Count]
    metrics: bool = False
    early: bool = False
    ignored: Many[Count] = []


class Residual(Body, frozen=True):
    """What a push codec with error feedback has left out of `chunk` so far, in a float32 frame for each of its state's `names`.
    It is one of `of` such messages; where there is nothing, `of` is 0 and `chunk` -1. From a worker it is for the snapshot of
    round `cut`, or, as it leaves (-1), for somebody else to send, and `taken` are the numbers of what it has got of that server,
    which is in this; from a server it is what that worker is to send. Answered by Ready with its `number`."""

    chunk: CountOrNone = -1
    names: Few[Name] = []
    of: Count = 0
    number: Count = 0
    cut: CountOrNone = -1
    taken: Many[Count] = []


class Pull(Body, frozen=True):
    """Send me the weights to start round `clock` from: all chunks but `have`. `settled`: only when all before is applied.

    `shared`: tell me where they are in the server's memory instead; `plane` is the one that the model's weights are in now.
    `number` counts a worker's pulls: it is the same when one is sent again. `holds` is the version that the worker has got whole
    from this server in frames (-1: none), and changes can be added to. `masters`: send the weights that no codec has rounded.
    Frozen chunks that nothing was contributed to are sent only for `still`.
    """

    clock: Count
    number: Count = 0
    have: Many[Count] = []
    settled: bool = False
    shared: bool = False
    plane: CountOrNone = -1
    holds: CountOrNone = -1
    masters: bool = False
    still: bool = False


class Weights(Body, frozen=True):
    """Weights to start round `clock` from, one frame for each of `chunks`; or no frame and the `plane` of the server's memory
    that they lie in. `closed`: the server has got and applied all there is to earlier rounds; weights that are still missing
    then follow by themselves. The frames of `coded`, some of `chunks`, are the weight codec's: of the weights, or of their change
    since the version before. `cut` is the round of a snapshot for which the server is to be told what is Owed (-1: none).
    `still` are more chunks, frozen ones that lie in the plane `home`, which nobody writes to again. `moved`, in what is `closed`,
    are all frozen chunks that something was contributed to: they come with every round."""

    clock: Count
    version: Count
    chunks: Many[Count]
    closed: bool = False
    plane: CountOrNone = -1
    coded: Many[Count] = []
    cut: CountOrNone = -1
    still: Many[Count] = []
    home: CountOrNone = -1
    moved: Many[Count] = []


class WeightsCredit(Body, frozen=True):
    """The frames of these chunks of the weights for round `clock` are here: there is room for more."""

    clock: Count
    chunks: Many[Count]


class VersionExpired(Body, frozen=True):
    """Round `clock` is over and its weights are gone; the newest are those of round `newest`."""

    clock: Count
    newest: Count


# ---- rows of tables (worker <-> server; frames are cut as common/model/sparse_rows.py says)


class InitialRows(Body, frozen=True):
    """First values of the rows of page `page` that are this server's, in order. Only the first copy counts. Answered by Ready
    with the same `id`. Classifiers are counted after the tables."""

    id: Count
    table: Count
    page: Count


class RowPull(Body, frozen=True):
    """Send me rows as they are at the beginning of round `version`: those whose ids follow, which are sorted and all on this
    server.

    Where each push is applied at once, and where that version is gone, they are sent as they are now. `number` tells which
    question an answer is for.
    """

    number: Count
    table: Count
    version: Count
    count: Count = 0


class Rows(Body, frozen=True):
    """Answer to RowPull `number`: `count` rows."""

    number: Count
    count: Count


class RowPush(Body, frozen=True):
    """The sum over micro-batches lo..hi-1 of `round` (gradient x samples) for the rows of all tables that are on this server:
    of each table, sorted ids and then values. `counts` are the numbers of rows, which may be none."""

    round: Count
    lo: Count
    hi: Count
    samples: Count
    counts: Many[CountOrNone]
    base: Count = 0
    hypers: Many[Hypers] = []
    finite: bool = True


class RowAck(Body, frozen=True):
    """That RowPush needs not be sent again, whatever became of it."""

    round: Count
    lo: Count
    hi: Count


# ---- classifiers that servers compute (worker <-> server; frames are cut likewise)


class ShardedForward(Body, frozen=True):
    """Go through your classes for `count` samples, as they are at the beginning of round `version`: their features (count, dim)
    follow, float32, and unless `top` their labels, int64.

    Where that version is gone, what is for training (`keeps`) is refused, and all else answered from the present one. Where each
    push is applied at once, everything is. `top`: I
    want the so many best classes of each sample. `normalised`: rows count as of length 1. `sums`: I need the sum of all rows too.

    Of a hidden layer: I want its outputs; only features follow. Or (`back_through` is the number of that question) its loss's
    gradient by the features; the gradient by your outputs follows, (count, rows), and then the features if you may not know
    them (`again`).
    """

    number: Count
    classifier: Count
    version: Count
    count: Count = 0
    keeps: bool = False
    normalised: bool = False
    sums: bool = False
    top: Count = 0
    back_through: CountOrNone = -1
    again: bool = False


class ShardedForwardReply(Body, frozen=True):
    """Answer to Classify `number`. Over the server's classes but a sample's own, with z a logit, the largest z, the sum of
    exp(z - largest), and the sum of exp(z - largest) x row follow, for each sample; then the sum of all rows where it was wanted;
    then the rows of labels that are here, in the order of the samples.

    Or the best logits of each sample and their classes, int64; or of a hidden layer, this server's outputs (count, rows) or its
    part of the features' gradient (count, D); or nothing, as the version that was wanted is `gone`.
    """

    number: Count
    gone: bool = False


class LayerUse(msgspec.Struct, frozen=True, array_like=True):
    """What a micro-batch contributes through its question `number`, of `count` samples. Every class but a sample's own has a
    logit's gradient of (p - smoothing) x g. Of a hidden layer it is the question about the features' gradient, whose gradient by
    outputs is to be multiplied by `scale`; nothing more is told of it."""

    number: Count
    count: Count
    smoothing: float = 0.0
    scale: float = 1.0


class LayerPush(Body, frozen=True):
    """What micro-batches lo..hi-1 of `round` contribute to classifiers, in order of the micro-batches. Of each of `uses`, there
    follow for every sample the logarithm of the sum of all exp(z); g, the gradient of its loss x samples; and the gradient
    of its own class's logit, which is in there already. Features and labels are those that were asked about: of questions
    that you may not know, as you have taken another server's place, they come first (`asked`). `base` and `finite` are as in
    Push."""

    round: Count
    lo: Count
    hi: Count
    samples: Count
    uses: Many[LayerUse]
    hypers: Many[Hypers] = []
    base: Count = 0
    finite: bool = True
    asked: Many[ShardedForward] = []


class LayerAck(Body, frozen=True):
    """That ClassPush needs not be sent again, whatever became of it."""

    round: Count
    lo: Count
    hi: Count


# ---- rounds (server <-> coordinator)


class Contribution(msgspec.Struct, frozen=True):
    """What became of one push, as the ledger has it. A micro-batch that was dropped without one has a row without a `worker`; a
    push of it that comes afterwards is `late`."""

    round: Count
    lo: Count
    hi: Count
    worker: Name
    samples: Count
    micro_batches: Count
    outcome: Literal["committed", "duplicate", "dropped", "dropped in part", "late"]
    staleness: Count | None = None


class Committed(msgspec.Struct, frozen=True):
    """A round applied on server 0: its samples, micro-batches and mean metrics."""

    round: Count
    samples: Count
    micro_batches: Count
    dropped: Count
    metrics: ByName[float]


class Report(Body, frozen=True):
    """News of a server: rounds below `version` are applied. Server 0 also tells the rounds and contributions. `again`: the one
    in whose place it is may have told some of them before. `left_out`: what was dropped here where each push is decided on alone
    (`ssp`, `async`), all that is here of its micro-batch or a part of that."""

    seq: Count
    version: Count
    rounds: Many[Committed] = []
    contributions: Many[Contribution] = []
    again: bool = False
    left_out: Many[Contribution] = []


class ReportAck(Body, frozen=True):
    """Reports up to `seq` are in the ledger."""

    seq: Count


class RoundReady(Body, frozen=True):
    """`backup`: these micro-batches of the round have fully arrived here. May the round be closed?

    `coordinator` is the incarnation of the one that is asked: its asker takes no earlier one's word any more. A coordinator that
    has taken over the run passes on to all servers what may have been decided before; who was told answers with just that.
    """

    round: Count
    ks: Many[Count]
    coordinator: int = 0


class CloseRound(Body, frozen=True):
    """`backup`: apply the round with exactly these micro-batches."""

    round: Count
    ks: Many[Count]


class Norms(Body, frozen=True):
    """Gradient norms of this server's pieces for the round, as (tensor, start of piece, 2-norm); of tables and then classifiers,
    which count on from the tensors, as (number, server, 2-norm). Asked and passed on as `RoundReady` is."""

    round: Count
    norms: Many[tuple[Count, Count, float]]
    coordinator: int = 0


class AllNorms(Body, frozen=True):
    """Gradient norms of all servers' pieces, sorted."""

    round: Count
    norms: Many[tuple[Count, Count, float]]


class TakeCheckpoint(Body, frozen=True):
    """Write down your state as it is when every round below `round` is applied and nothing else, into the folder that has the
    file with `token`. `reached`: every server has got that far; `final`: and no worker is left that could take it further.
    Answered by CheckpointStatus."""

    round: Count
    token: Name
    reached: bool = False
    final: bool = False


class CheckpointStatus(Body, frozen=True):
    """Say what has become of a TakeCheckpoint.

    It `waits` for the round, was `missed` as the round is over, is being or was `written`, or `failed` for a reason.
    `done` changes as the server gets on while it is `writing`; its unit is the server's own.
    """

    round: Count
    state: Literal["waits", "missed", "writing", "written", "failed"]
    sha256: Name = ""
    bytes: Count = 0
    reason: Text = ""
    done: Count = 0

    def __post_init__(self) -> None:
        _keep_printable(self)


# ---- copies of shards (server <-> the server that keeps a copy of its shard)


class Replicate(Body, frozen=True):
    """The mean contribution to `chunk` in `round`, in a frame, unless it moves nothing (`present` is 0). Clipping multiplies it
    by `factor`; `hypers` are the settings of its parameter group."""

    round: Count
    chunk: Count
    present: int = 0
    hypers: Hypers = {}
    factor: float | None = None


class ReplicateRows(Body, frozen=True):
    """What `round` contributes to the rows of all tables, summed over `samples` samples: `counts` and frames as in RowPush, the
    settings of each parameter group, and `factor` as in Forward."""

    round: Count
    samples: Count
    counts: Many[CountOrNone]
    hypers: Many[Hypers] = []
    factor: float | None = None


class LossTerms(msgspec.Struct, frozen=True, array_like=True):
    """What `count` samples contribute to a classifier, or a hidden layer; `normalised` as in Classify."""

    classifier: Count
    count: Count
    normalised: bool = False


class ReplicateLayers(Body, frozen=True):
    """What `round` contributes to classifiers over `samples` samples; the rest is as in ForwardRows. Of each of `terms` there
    follow, for every sample, features, with a 1 where there is a bias; the place of its class among the rows, int64, or -1; the
    logarithm of the sum of all exp(z), g and the gradient of its own class's logit, as in ClassPush; and what is taken off
    every p. Of hidden layers, the features and the gradient by this server's outputs."""

    round: Count
    samples: Count
    terms: Many[LossTerms]
    hypers: Many[Hypers] = []
    factor: float | None = None


class RoundReplicated(Body, frozen=True):
    """All of `round` has been forwarded. Of server 0: what the books are to have of it, and that the coordinator has all of the
    rounds below `reported`. Answered by RoundReplicatedAck."""

    round: Count
    rounds: Many[Committed] = []
    contributions: Many[Contribution] = []
    reported: Count = 0


class RoundReplicatedAck(Body, frozen=True):
    """All of `round` that is for your shard is here."""

    round: Count


class RequestState(Body, frozen=True):
    """I am in the place of the server whose shard you have a copy of: send it to me. Answered by State."""


class StateHeader(Body, frozen=True):
    """The state of server `shard`'s shard when `round` rounds are applied follows, in `parts` parts. Classifiers may still lack
    the last of them, which is `pending` then; its tensors are among the parts. Answered by StatePartAck."""

    shard: Count
    round: Count
    parts: Count
    setup: Setup
    segments: Many[Segment]
    filed: Many[RoundReplicated] = []
    pending: ReplicateLayers | None = None


class StatePart(Body, frozen=True):
    """A tensor of that state, as snapshots call it, in the frames that follow; or its rows from `first` on."""

    shard: Count
    round: Count
    number: Count
    name: Name
    dtype: Name
    shape: Annotated[list[Count], msgspec.Meta(max_length=64)]
    first: CountOrNone = -1


class StatePartAck(Body, frozen=True):
    """That part is here; -1 is the State itself."""

    shard: Count
    round: Count
    number: CountOrNone


# ---- reporting and leaving (worker -> coordinator)


class Mean(Body, frozen=True):
    """What is the mean of metric `name` over `epoch`? Answered by the same with `value`, final once `complete`."""

    epoch: Count
    name: Name
    value: float | None = None
    complete: bool = False


class Metrics(Body, frozen=True):
    """Values the script logged outside a micro-batch, after `round` rounds."""

    id: Count
    round: Count
    values: ByName[float]


class Goodbye(Body, frozen=True):
    """My script has ended, when `round` rounds were in my model. `reason` is a sentence if it failed. Answered by Stop when the
    run is over; at once where others do what I have not done, as I leave before the last round, or as I was asked to (`early`).
    `cut_off`: I failed as a server did not answer me, which may well answer others. `keyed`: I have used the key-value store, so
    nobody can do what I have not done. `changed` are tensors of the model that the script has changed since its last round."""

    reason: Text = ""
    early: bool = False
    cut_off: bool = False
    keyed: bool = False
    round: Count = 0
    changed: Annotated[list[Name], msgspec.Meta(max_length=100)] = []

    def __post_init__(self) -> None:
        _keep_printable(self)


class Recomputed(Body, frozen=True):
    """From the weights after `round` rounds every worker has computed these tensors of the model's file anew; their bytes follow,
    a frame for each. Only the first copy counts. Answered by Ready with the same `id`, once they are in the file."""

    id: Count
    round: Count
    names: Annotated[list[Name], msgspec.Meta(max_length=MOST_RECOMPUTED)]


# ---- the model's file (coordinator -> server, and back)


class SendModel(Body, frozen=True):
    """Send me these of your parts of the model, as they are when every round below `round` is applied and nothing else is.
    `ps/model_parts.py` numbers them. Each is answered by a ModelPart."""

    round: Count
    parts: Annotated[list[Count], msgspec.Meta(max_length=4000)]


class ModelPart(Body, frozen=True):
    """Part number `part` of the sender's parts of the model, in the frames that follow."""

    round: Count
    part: Count


# ---- key-value store (worker <-> server)


class KvPush(Body, frozen=True):
    """Block `block` of what is added to `key`, or what it is set to: of push number `push`, which has `numel` elements in all its
    blocks and counts when they are here. `id` makes the block count once, however often it is sent."""

    id: Count
    key: Name
    block: Count
    numel: Count
    dtype: Name
    op: Literal["add", "set"]
    push: Count


class KvPull(Body, frozen=True):
    """Send the value of `key`, which has `numel` elements."""

    id: Count
    key: Name
    numel: Count


class KvReply(Body, frozen=True):
    """The block is here; to a pull, a frame follows with the bytes of block `block`, one of as many messages as there are blocks.
    `version` counts the pushes applied to the key."""

    id: Count
    version: Count
    dtype: Name = ""
    block: Count = 0


Message = (
    Hello | Welcome | Refused | Heartbeat | MembershipUpdate | RequestWork | Reassign | MembersLost | Stop
    | Setup | Plan | Ready | InitialWeights | OfferSharedMemory | SharedMemoryReply
    | Push | Ack | Residual | Pull | Weights | WeightsCredit | VersionExpired
    | InitialRows | RowPull | Rows | RowPush | RowAck | ShardedForward | ShardedForwardReply | LayerPush | LayerAck
    | Report | ReportAck | RoundReady | CloseRound | Norms | AllNorms | TakeCheckpoint | CheckpointStatus
    | Replicate | ReplicateRows | ReplicateLayers | RoundReplicated | RoundReplicatedAck
    | RequestState | StateHeader | StatePart | StatePartAck
    | Mean | Metrics | Goodbye | Recomputed | SendModel | ModelPart | KvPush | KvPull | KvReply
)  # fmt: skip


#: Bytes that a Hello may have.
_MOST_HELLO_BYTES = 64 << 10
_MESSAGE = msgspec.msgpack.Decoder(Message)
_HELLO = msgspec.msgpack.Decoder(Hello)


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """What every header carries. `run` is empty until the coordinator's Welcome has told it; `incarnation` tells a process
    from others of its name, and of what workers send to servers is the worker's ticket; `epoch` is the newest
    membership epoch of which the sender has been told: a worker its shares, a server its losses; 0 elsewhere. The message
    itself is bytes until it is known from whom they are: a stranger's are never decoded, unless they say Hello."""

    protocol: int
    run: Name
    sender: Name
    incarnation: Count
    epoch: Count
    body: msgspec.Raw

    def read(self) -> Message:
        """The message. Raises WireError unless it is one."""
        return self._decoded(_MESSAGE)

    def read_hello(self) -> Hello:
        """The same of somebody unknown, from whom only a Hello is taken."""
        if memoryview(self.body).nbytes > _MOST_HELLO_BYTES:
            raise WireError(f"a Hello of more than {_MOST_HELLO_BYTES} bytes", "oversized")
        return self._decoded(_HELLO)

    def _decoded(self, decoder: msgspec.msgpack.Decoder[T]) -> T:
        try:
            return decoder.decode(self.body)
        except (msgspec.DecodeError, UnicodeDecodeError, UsageError, RecursionError) as error:
            raise WireError(f"a message of {self.sender or 'a peer'} could not be read: {error}", "malformed") from None
