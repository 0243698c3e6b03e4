#!/usr/bin/env python3
"""transformers' `generate` as a guest in the benchmark's rotation, with random weights of the same shape.

    python -m llamabook bench --shape llama3.2-1b --modes static,static_compiled \\
        --peer "transformers=python tools/peers/transformers_generate.py" \\
        --peer "transformers_compiled=python tools/peers/transformers_generate.py"

It has a static cache, and as transformers_compiled a compiled forward, which is what its documentation calls fastest.
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llamabook.bench import worker
from llamabook.llama2 import head_dim_of


class Times:
    """A streamer that notes when each token came; the first thing it is given is the prompt."""

    def __init__(self):
        self.times = []

    def put(self, value) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Guest(worker.Subject):
    """A mode of the benchmark whose model and loop are transformers'."""

    packages = ("transformers",)

    def make(self) -> LlamaForCausalLM:
        cfg = self.config
        config = LlamaConfig(
            vocab_size=cfg["vocab_size"], hidden_size=cfg["emb_dim"], intermediate_size=cfg["hidden_dim"],
            num_hidden_layers=cfg["n_layers"], num_attention_heads=cfg["n_heads"],
            num_key_value_heads=cfg["n_kv_groups"], head_dim=head_dim_of(cfg),
            max_position_embeddings=cfg["context_length"], rms_norm_eps=cfg.get("norm_eps", 1e-5),
            tie_word_embeddings=cfg.get("tie_embeddings", False), eos_token_id=None, bos_token_id=None, pad_token_id=0,
            dtype=cfg["dtype"],
        )  # fmt: skip
        model = worker.fill(AutoModelForCausalLM.from_config(config, dtype=cfg["dtype"]).to(self.device)).eval()
        model.generation_config.disable_compile = True  # we say what is compiled
        if self.compiled:
            model.forward = torch.compile(model.forward)
        return model

    def run(self, n: int) -> list[float]:
        streamer, start = Times(), self.now()
        options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "cache_implementation": "static"}
        mask = torch.ones_like(self.prompt)
        self.model.generate(self.prompt, attention_mask=mask, streamer=streamer, **options)
        return [start, *streamer.times[1:]]


if __name__ == "__main__":
    worker.main(Guest)
