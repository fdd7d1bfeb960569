"""IEEE half precision: 11 bits of precision from 6e-5 to 65504, in two bytes a value."""

import torch

from roundtable.common.codecs.cast import Cast


class Fp16(Cast):
    """Off by at most 1/2048 of a value or 3e-8, whichever is more; beyond 65504 values are cut off there."""

    dtype = torch.float16


CODEC = Fp16
