"""Weights in 8 and 4 bits, written by hand: how they are made, kept and multiplied; the parts are taught in chapter 5."""
