"""IEEE half precision: 11 bits of precision from 6e-5 to 65504, in two bytes per value."""

import torch

from roundtable.common.codecs.cast import Cast


class Fp16(Cast):
    """The error is at most 1/2048 of a value, or 3e-8 if that is more. Values beyond 65504 are clipped."""

    dtype = torch.float16


CODEC = Fp16
