"""The Llama Book's package: Llama from scratch, then fast.

Each module names the notebook that teaches it, or says, as this one does, that it is written by hand.
"""

__version__ = "0.1.0"
