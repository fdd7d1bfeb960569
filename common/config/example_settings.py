"""The settings of the built-in example: which network it trains, on which images, and how.

They travel with the run's settings, so that a worker on any host trains the same. Only the built-in script, the command line and
`explore` read them.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from roundtable.common.config.field_types import Name, Text
from roundtable.common.config.kinds import NonNegative, Positive, PositiveFloat, check_finite, doc
from roundtable.common.runtime.errors import UsageError

ModelName = Literal["lenet", "mlp", "cnn", "alexnet", "alexnet-2012", "alexnet-text"]
DataName = Literal["mnist-5k", "digits", "mnist", "fashion-mnist", "cifar-10", "folder", "synthetic"]
#: Classes of torch.optim that servers can apply, because they need no closure.
OptimizerName = Literal[
    "SGD", "Adam", "AdamW", "Adadelta", "Adagrad", "Adamax", "ASGD", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SparseAdam",
]  # fmt: skip
ScheduleName = Literal["CosineAnnealingLR", "OneCycleLR", "LinearLR", "none"]
#: Data sources that read files, from the folder that --data-dir names.
READ_FILES = frozenset({"mnist", "fashion-mnist", "cifar-10", "folder"})


class ExampleSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings that only the built-in example has. Field descriptions are the flags' help texts."""

    model: Annotated[ModelName, doc("The network.")] = "lenet"
    parallel: Annotated[
        Literal["data", "hybrid"],
        doc("data: whole model on each worker. hybrid: fully connected layers run on the servers."),
    ] = "data"
    data: Annotated[DataName, doc("The images.")] = "mnist-5k"
    data_dir: Annotated[Text | None, doc("Folder that holds the images, if --data reads files.")] = None
    init: Annotated[Text | None, doc("File with weights to start from, safetensors or a state_dict of torch.save.")] = None
    image: Annotated[Name | None, doc("Size of the images of --data synthetic or folder, e.g. 3x224x224.")] = None
    classes: Annotated[Positive | None, doc("Number of classes of --data synthetic.")] = None
    column_devices: Annotated[
        Name | None, doc("Two devices for the columns of alexnet-2012 or alexnet-text, e.g. cuda:0,cuda:1.")
    ] = None
    loss: Annotated[Literal["cross-entropy", "mse"], doc("The loss; mse is against one-hot targets.")] = "cross-entropy"
    optimizer: Annotated[OptimizerName, doc("A class of torch.optim.")] = "SGD"
    lr: Annotated[PositiveFloat, doc("Learning rate.")] = 0.02
    momentum: Annotated[float, Meta(ge=0, lt=1), doc("Momentum, if the optimizer has one.")] = 0.9
    weight_decay: Annotated[float, Meta(ge=0), doc("Weight decay.")] = 0.0
    clip_norm: Annotated[PositiveFloat | None, doc("Clip the gradient to this global norm.")] = None
    schedule: Annotated[ScheduleName, doc("Learning-rate schedule.")] = "CosineAnnealingLR"
    num_data_workers: Annotated[NonNegative, doc("Processes that load data, per worker.")] = 0

    def __post_init__(self) -> None:
        check_finite(self)
        if self.image is not None:
            parse_shape(self.image)
        if self.parallel == "hybrid" and self.loss != "cross-entropy":
            raise UsageError(
                f"loss is {self.loss} but parallel is hybrid, and servers compute cross-entropy: choose one of the two."
            )
        if self.parallel == "hybrid" and self.column_devices is not None:
            raise UsageError(
                f"column_devices is {self.column_devices} but parallel is hybrid: fully connected layers are on two devices or "
                "on the servers, so choose one of the two."
            )


def parse_shape(text: str) -> tuple[int, int, int]:
    """Return (channels, height, width) of "3x224x224". Raises UsageError for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if found is None:
        raise UsageError(f"image is '{text}': it must be channels x height x width, such as 3x224x224.")
    return int(found[1]), int(found[2]), int(found[3])
