"""The errors that a reader or user can meet, written by hand.

Each message is one line that says what is wrong, where, and what to do. The command line prints
that line and exits with 2; in a notebook it is the last line of the traceback.
"""


class LlamaBookError(Exception):
    """Any error that this package raises on purpose."""


class ConfigError(LlamaBookError):
    """A configuration lacks a key, or its values contradict each other or the class they are given to."""


class CheckpointError(LlamaBookError):
    """A weight or parameter file is missing, damaged, unsafe, or of another shape than the model."""


class TokenizerError(LlamaBookError):
    """A tokenizer file can't be read, or a text or message can't be encoded as asked."""


class ContextError(LlamaBookError):
    """More positions are asked for than the model's context length holds."""


class InputError(LlamaBookError):
    """An argument is outside what the function accepts."""


class DownloadError(LlamaBookError):
    """A file can't be fetched: no access, no connection, no room, or not the bytes that it should be."""
