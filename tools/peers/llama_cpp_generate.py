#!/usr/bin/env python3
"""llama.cpp as a guest in the benchmark's rotation, with random weights of the same shape, on the CPU.

In an environment of its own, where it is compiled for the CPU at hand:

    python -m venv .venv-llama-cpp
    CMAKE_ARGS=-DGGML_NATIVE=ON .venv-llama-cpp/bin/pip install --no-binary llama-cpp-python \\
        llama-cpp-python==0.3.36 gguf==0.19.0 -c requirements.txt -e ./pkg

    python -m llamabook bench --shape llama3.2-1b --modes static,static_compiled \\
        --peer "llama.cpp=.venv-llama-cpp/bin/python tools/peers/llama_cpp_generate.py"

The weights lie in a GGUF file, written by the first run and kept for the next. --type q8_0 or q4_0 quantizes them, all of
them. Keys and values are in float16, which is llama.cpp's choice.
"""

import argparse
import hashlib
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

try:
    import gguf
    import llama_cpp
except ImportError as missing:
    sys.exit(f"{missing.name} is not installed: pip install --no-binary llama-cpp-python llama-cpp-python gguf")

from llamabook.bench import worker
from llamabook.bench.job import Job, config_of
from llamabook.errors import InputError
from llamabook.files import replacing
from llamabook.llama2 import head_dim_of, rope_frequencies
from llamabook.llama3 import scale_frequencies

TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
NUMBERS = 32 * 31_247  # random ones, over and over: whole blocks of a quantized type, and a prime number of those


class Guest(worker.Subject):
    """A mode of the benchmark whose model is llama.cpp's; the loop around it is a few lines of Python."""

    packages = ("llama-cpp-python",)
    folder, type = Path(tempfile.gettempdir()), None  # what the flags below can change

    def __init__(self, mode: str, job: Job, memory: worker.Memory):
        self.file = self.written(job, config_of(job))  # before memory is counted
        super().__init__(mode, job, memory)

    def written(self, job: Job, config: dict) -> Path:
        """The GGUF file of this shape and type, written if it isn't there."""
        kind = self.type or TYPES[job.dtype]
        shape = hashlib.sha256(repr(sorted(config.items())).encode()).hexdigest()[:12]
        path = self.folder / f"llamabook-{shape}-{kind}.gguf"
        if not path.exists():
            write(path, config, kind)
        return path

    def make(self):
        if self.device.type != "cpu":
            raise InputError(f"--device is {self.job.device}: this guest measures llama.cpp on the CPU")
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(str(self.file).encode(), options)
        rows, length = self.prompt.shape
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max = rows * (length + self.job.max_new_tokens), rows
        options.n_batch, options.n_ubatch = rows * length, 512
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.offload_kqv = options.op_offload = False
        context = model and llama_cpp.llama_init_from_model(model, options)
        if not context:
            raise InputError(f"llama.cpp does not take {self.file}: delete it, and it is written again")
        self.batch = llama_cpp.llama_batch_init(rows * length, 0, 1)
        self.memory.base -= self.file.stat().st_size  # it is mapped, but held all the same
        return context

    def largest(self) -> torch.Tensor:
        """As much of the mapped file as the largest matrix takes: the very pages that llama.cpp reads."""
        dtype = self.config["dtype"]
        size = max(math.prod(shape) for shape in tensors(self.config).values())
        size = min(size, self.file.stat().st_size // dtype.itemsize)  # a quantized file may be smaller
        return torch.from_file(str(self.file), shared=False, size=size, dtype=dtype)

    def weight_bytes(self) -> int:
        if self.type is None:
            return super().weight_bytes()
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type.upper()]]
        shapes = [shape for name, shape in tensors(self.config).items() if name != "token_embd" or self.tied()]
        return sum(math.prod(s) * size // block if len(s) > 1 else 4 * s[0] for s in shapes)

    def tied(self) -> bool:
        return self.config.get("tie_embeddings", False)

    def run(self, n: int) -> list[float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.model), False)
        tokens, begin, times = self.prompt.numpy(), 0, [self.now()]
        for _ in range(n):
            tokens, begin = self.decode(tokens, begin), begin + tokens.shape[1]
            times.append(self.now())
        return times

    def decode(self, tokens: np.ndarray, begin: int) -> np.ndarray:
        """The likeliest next token of each row (B, 1), after `tokens` (B, T) at the positions from `begin` on."""
        rows, length = tokens.shape
        batch = self.batch
        batch.n_tokens = tokens.size
        for i, token in enumerate(tokens.ravel().tolist()):
            row, at = divmod(i, length)
            batch.token[i], batch.pos[i] = token, begin + at
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = at == length - 1
        code = llama_cpp.llama_decode(self.model, batch)
        if code:
            raise RuntimeError(f"llama_decode says {code} to {tokens.size} tokens from position {begin} on")
        last = (llama_cpp.llama_get_logits_ith(self.model, i) for i in range(length - 1, tokens.size, length))
        return np.array([[np.ctypeslib.as_array(logits, (self.config["vocab_size"],)).argmax()] for logits in last])


def tensors(config: dict) -> dict[str, tuple[int, ...]]:
    """The shapes of the model's weights, by the names that llama.cpp has for them."""
    D, F, V, d = config["emb_dim"], config["hidden_dim"], config["vocab_size"], head_dim_of(config)
    queries, keys = config["n_heads"] * d, config["n_kv_groups"] * d
    layer = {
        "attn_norm": (D,), "attn_q": (queries, D), "attn_k": (keys, D), "attn_v": (keys, D),
        "attn_output": (D, queries), "ffn_norm": (D,), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F),
    }  # fmt: skip
    shapes = {"token_embd": (V, D), "output_norm": (D,)}
    if not config.get("tie_embeddings", False):
        shapes["output"] = (V, D)
    for i in range(config["n_layers"]):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def write(path: Path, config: dict, kind: str) -> None:
    """A GGUF file without a tokenizer: random matrices of this type, and norms of ones."""
    d, matrix, vector = head_dim_of(config), gguf.GGMLQuantizationType[kind.upper()], gguf.GGMLQuantizationType.F32
    numbers = np.random.default_rng(1).normal(0, 0.02, NUMBERS).astype(np.float32)
    random, ones = gguf.quants.quantize(numbers, matrix).view(np.uint8), np.ones(1, np.float32).view(np.uint8)
    with replacing(path) as file:
        writer = gguf.GGUFWriter(file.name, "llama")
        for name, value in {
            "vocab_size": config["vocab_size"], "context_length": config["context_length"],
            "embedding_length": config["emb_dim"], "feed_forward_length": config["hidden_dim"],
            "block_count": config["n_layers"], "head_count": config["n_heads"], "head_count_kv": config["n_kv_groups"],
            "key_length": d, "value_length": d, "rope_dimension_count": d, "rope_freq_base": config["rope_base"],
            "layer_norm_rms_eps": config.get("norm_eps", 1e-5), "tokenizer_model": "no_vocab",
        }.items():  # fmt: skip
            getattr(writer, f"add_{name}")(value)
        if config["rope_freq"] is not None:
            plain = rope_frequencies(d, config["rope_base"])
            writer.add_tensor("rope_freqs.weight", (plain / scale_frequencies(plain, config["rope_freq"])).numpy())
        for name, shape in tensors(config).items():
            dtype, pattern = (vector, ones) if len(shape) == 1 else (matrix, random)
            size = gguf.quants.quant_shape_to_byte_shape(shape, dtype)
            writer.add_tensor(f"{name}.weight", np.resize(pattern, size), raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--type", choices=("q8_0", "q4_0"), help="quantize the weights; else they have the job's dtype")
    parser.add_argument("--folder", type=Path, default=Guest.folder, help="where the GGUF files are kept")
    parser.parse_args(namespace=Guest)
    worker.main(Guest)
