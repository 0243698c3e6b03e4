"""The engine: a static cache, a position per row, and decoding at the speed of the memory. Written by hand.

    from llamabook import fast
    model, tokenizer = fast.load("path/to/checkpoint")
    rows = fast.generate(model, [tokenizer.encode("What do llamas eat?", bos=True)], 100, stop=tokenizer.stop_tokens)
"""

from llamabook.fast.engine import generate, load, load_draft, stream
from llamabook.fast.speculative import PromptLookup, Statistics

__all__ = ["PromptLookup", "Statistics", "generate", "load", "load_draft", "stream"]
