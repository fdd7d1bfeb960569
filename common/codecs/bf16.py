"""bfloat16: the range of float32 with 8 bits of precision, in two bytes per value."""

import torch

from roundtable.common.codecs.cast import Cast


class Bf16(Cast):
    """The error is at most 1/256 of a value."""

    dtype = torch.bfloat16


CODEC = Bf16
