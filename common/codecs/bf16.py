"""bfloat16: the range of float32 with 8 bits of precision, in two bytes a value."""

import torch

from roundtable.common.codecs.cast import Cast


class Bf16(Cast):
    """Off by at most 1/256 of a value."""

    dtype = torch.bfloat16


CODEC = Bf16
