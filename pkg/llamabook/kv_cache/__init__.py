"""Generation with a KV cache: `cache` holds keys and values, `llama3` the model that reads on from them, `generate`
the loops. Written by hand; the modules are taught in chapter 4."""

from llamabook.kv_cache.cache import KVCache

__all__ = ["KVCache"]
