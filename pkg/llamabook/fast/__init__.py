"""The engine: a static cache, a position per row, and decoding at the speed of the memory. Written by hand."""
