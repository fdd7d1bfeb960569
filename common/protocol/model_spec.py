"""The description of a model in messages: its parameters, buffers, embedding rows and sharded layers."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from roundtable.common.config.field_types import Amount, Count, CountOrNone, Name, Positive

Kind = Literal["param", "mean", "max", "sum", "last"]
#: How a round's contributions to a buffer are merged.
Rule = Literal["mean", "max", "sum", "last"]
#: dtype → (bytes of an element on the wire, dtype of gradient sums and of the servers' weights)
DTYPES = {
    "float32": (4, "float32"),
    "float64": (8, "float64"),
    "bfloat16": (2, "float32"),
    "float16": (2, "float32"),
    "int64": (8, "int64"),
    "int32": (4, "int32"),
    "uint8": (1, "uint8"),
    "bool": (1, "bool"),
}
ELEMENT_BYTES = {name: size for name, (size, _) in DTYPES.items()}
#: dtype → bytes of an element, for all dtypes that can travel as bytes.
BYTES_OF_ANY = ELEMENT_BYTES | {
    **dict.fromkeys(("int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("int16", "uint16"), 2),
    **dict.fromkeys(("uint32", "complex32"), 4),
    **dict.fromkeys(("uint64", "complex64"), 8),
    "complex128": 16,
}


def is_trainable(dtype: str) -> bool:
    """Return whether servers can train a parameter of this dtype."""
    return dtype in DTYPES and "float" in dtype


class TensorSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """A parameter (`group` is its parameter group) or a buffer (`group` is -1) of the model.

    A `frozen` parameter required no gradient when the optimizer was made. If it was not given to the optimizer, its `group` is
    -1. It then travels as bytes and may have any dtype.

    `rule` says how a round's contributions to a buffer are merged:

    - `mean`: weighted by samples,
    - `max`: element by element,
    - `sum`: the total of all changes,
    - `last`: the value from the last micro-batch, in order, that changed it. Such a buffer travels as bytes, in any dtype.
    """

    name: Name
    shape: Annotated[list[Count], msgspec.Meta(max_length=64)]
    dtype: Name
    group: CountOrNone
    rule: Rule = "last"
    frozen: bool = False
    #: The update of an element depends on others, so all of the parameter is on one server.
    whole: bool = False

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def kind(self) -> Kind:
        """How contributions are merged: gradients by the optimizer, buffers by their rule."""
        return "param" if self.group >= 0 or self.frozen else self.rule

    @property
    def is_buffer(self) -> bool:
        return self.kind != "param"

    @property
    def is_bytes(self) -> bool:
        """Whether the tensor travels as bytes."""
        return self.kind == "last" or (self.frozen and self.group < 0)

    @property
    def units(self) -> int:
        """The number of elements in chunks: bytes, if the tensor travels as bytes."""
        return self.numel * (BYTES_OF_ANY[self.dtype] if self.is_bytes else 1)

    @property
    def unit(self) -> str:
        """The dtype of these elements."""
        return "uint8" if self.is_bytes else self.dtype


class TableSpec(msgspec.Struct, frozen=True):
    """A float32 parameter, `rows` x `dim`, whose rows are sent one by one. It is in no chunk.

    `common/model/sparse_rows.py` says which server has which rows. If `std` is set, servers draw first values with that standard
    deviation. If it is None, worker 0 sends them.
    """

    name: Name
    rows: Positive
    dim: Positive
    group: Count
    std: Amount | None = None


class ShardedLayerSpec(TableSpec, frozen=True):
    """A fully connected layer that servers keep and compute: `rows` outputs with `dim` numbers each. The last one is the bias,
    if any.

    `std` is as in `TableSpec`, but values are uniform from -sqrt(3)*std to sqrt(3)*std. In a classifier, each round draws a share
    `sample_rate` of the classes as negative ones. `hidden`: the layer is no classifier, and its outputs go on to another layer.
    """

    bias: bool = False
    sample_rate: float = 1.0
    hidden: bool = False
