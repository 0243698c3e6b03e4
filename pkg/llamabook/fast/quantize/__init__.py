"""Weights in 8 and 4 bits: how they are made, kept and multiplied. This file is written by hand.

The parts are taught in chapter 5: `int8` and `int4` round to codes, `weight` is how a matrix of codes is stored, `packing`
how it lies in a device's memory, `linear` the module that computes with it.
"""

from llamabook.errors import InputError
from llamabook.fast.quantize.int4 import GROUP_SIZES
from llamabook.fast.quantize.linear import QuantizedLinear
from llamabook.fast.quantize.weight import Quantized, Scheme

__all__ = ["GROUP_SIZES", "Quantized", "QuantizedLinear", "Scheme", "scheme_of"]


def scheme_of(name: str) -> Scheme:
    """The scheme called int8, int4 (in groups of 32) or int4.g64 and so on. Raises InputError for another name."""
    bits, _, group = name.partition(".g")
    if name == "int8":
        return Scheme(8)
    if bits != "int4" or not (group or "32").isdigit():
        raise InputError(f"there is no precision {name!r}: give int8, int4 or int4.g and a group size, as int4.g64")
    return Scheme(4, int(group or 32))
