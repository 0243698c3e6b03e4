"""Checkpoints in every layout for the tests, written from a transformers model by another road than the package's.

Rows are interleaved by a list of row numbers, shards are cut by slices, and names are spelled out.
"""

import json
import os
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamabook.checkpoint import load_model
from llamabook.errors import LlamaBookError

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# A small Llama 3.2: grouped queries, scaled RoPE, tied head, in the spelling of the published files.
SMALL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96, "hidden_size": 64,
    "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "rope_scaling": {**LLAMA3, "factor": 32.0, "rope_type": "llama3"}, "tie_word_embeddings": True,
    "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
UNTIED = {**SMALL, "tie_word_embeddings": False, "rope_scaling": {**LLAMA3, "rope_type": "llama3"}}
LLAMA2 = {
    **SMALL, "tie_word_embeddings": False, "rope_scaling": None, "rope_theta": 10000.0, "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}  # fmt: skip
TOKENS = (torch.arange(2 * 300) * 37 % 96).view(2, 300)


def config_of_transformers(said: dict):
    """transformers' reading of a config.json. It writes into what it is given, so it gets a copy."""
    from transformers import LlamaConfig

    return LlamaConfig.from_dict(deepcopy({key: value for key, value in said.items() if value is not None}))


def make_oracle(said: dict, seed: int = 0, stored: torch.dtype = torch.float32):
    """transformers' model of a config.json, in float32, with weights that `stored` can hold and that matter."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config_of_transformers(said))
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight = noise.mul_(0.3).add_(1) if "norm" in name else noise.mul_(1.5 / weight.shape[-1] ** 0.5)
        state[name] = weight.to(stored).float()
    if said.get("tie_word_embeddings"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its table is no parameter
    return model.float().eval()


def tensors_of(oracle, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Copies of the weights by Hugging Face's names, the head of a tied model left out."""
    state = {name: weight.detach().to(dtype, copy=True) for name, weight in oracle.state_dict().items()}
    if oracle.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def agrees(model, oracle, tokens=TOKENS, tolerance=1e-4) -> bool:
    """Whether the logits are the oracle's, to `tolerance` of the largest."""
    with torch.no_grad():
        want, got = oracle(tokens).logits, model(tokens).float()
    assert want.abs().max() > 0.5  # or nothing would be seen
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


# ---------------------------------------------------------------- Hugging Face


def write_huggingface(folder: Path, said: dict, tensors: dict, shards: int = 1, ending: str = "safetensors") -> Path:
    """config.json, and `shards` files with an index if there are several; `ending` is safetensors or bin."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(said))
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names, places = list(tensors), {}
    for rank in range(shards):
        file = f"{stem}.{ending}" if shards == 1 else f"{stem}-{rank + 1:05d}-of-{shards:05d}.{ending}"
        part = {name: tensors[name] for name in names[rank::shards]}
        save(folder / file, part)
        places |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return folder


def save(path: Path, tensors: dict) -> None:
    """Write tensors in the format that the ending stands for."""
    if path.suffix == ".safetensors":
        save_file({name: weight.contiguous() for name, weight in tensors.items()}, path, {"format": "pt"})
    else:
        torch.save(tensors, path)


def read(path: Path) -> dict:
    """What `save` has written, in memory of its own."""
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


# ---------------------------------------------------------------- Meta and gpt-fast


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row 2i of a head is Hugging Face's row i, row 2i + 1 its row i + d/2."""
    d = weight.shape[0] // heads
    rows = [head * d + i + half for head in range(heads) for i in range(d // 2) for half in (0, d // 2)]
    return weight[rows]


def meta_tensors(said: dict, tensors: dict) -> dict[str, torch.Tensor]:
    """The weights by Meta's names and in Meta's row order; a tied head is stored again."""
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    out = {
        "tok_embeddings.weight": tensors["model.embed_tokens.weight"],
        "norm.weight": tensors["model.norm.weight"],
        "output.weight": head.clone(),
    }
    for n in range(said["num_hidden_layers"]):
        here, there = f"layers.{n}", f"model.layers.{n}"
        query, key = (tensors[f"{there}.self_attn.{which}_proj.weight"] for which in "qk")
        out[f"{here}.attention.wq.weight"] = interleave(query, said["num_attention_heads"])
        out[f"{here}.attention.wk.weight"] = interleave(key, said["num_key_value_heads"])
        out[f"{here}.attention.wv.weight"] = tensors[f"{there}.self_attn.v_proj.weight"]
        out[f"{here}.attention.wo.weight"] = tensors[f"{there}.self_attn.o_proj.weight"]
        out[f"{here}.feed_forward.w1.weight"] = tensors[f"{there}.mlp.gate_proj.weight"]
        out[f"{here}.feed_forward.w2.weight"] = tensors[f"{there}.mlp.down_proj.weight"]
        out[f"{here}.feed_forward.w3.weight"] = tensors[f"{there}.mlp.up_proj.weight"]
        out[f"{here}.attention_norm.weight"] = tensors[f"{there}.input_layernorm.weight"]
        out[f"{here}.ffn_norm.weight"] = tensors[f"{there}.post_attention_layernorm.weight"]
    return out


def meta_params(said: dict) -> dict:
    """A params.json as Meta writes it: no context, no numbers of the scaling."""
    params = {
        "dim": said["hidden_size"], "n_layers": said["num_hidden_layers"], "n_heads": said["num_attention_heads"],
        "n_kv_heads": said["num_key_value_heads"], "vocab_size": said["vocab_size"], "multiple_of": 16,
        "norm_eps": said["rms_norm_eps"], "rope_theta": said["rope_theta"],
    }  # fmt: skip
    return params | ({"use_scaled_rope": True} if said["rope_scaling"] else {})


def write_meta(folder: Path, said: dict, tensors: dict, shards: int = 1, params: dict | None = None) -> Path:
    """Llama 3's cut: rows of wq wk wv w1 w3 output and tok_embeddings, columns of wo w2."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(shards):
        part = {}
        for name, weight in meta_tensors(said, tensors).items():
            if any(key in name for key in ("wq.", "wk.", "wv.", "w1.", "w3.", "output.", "tok_embeddings.")):
                size = weight.shape[0] // shards
                weight = weight[rank * size : (rank + 1) * size]
            elif any(key in name for key in ("wo.", "w2.")):
                size = weight.shape[1] // shards
                weight = weight[:, rank * size : (rank + 1) * size]
            part[name] = weight.clone()
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(meta_params(said) if params is None else params))
    return folder


def gptfast_tensors(said: dict, tensors: dict) -> dict[str, torch.Tensor]:
    """gpt-fast's names: Meta's, with wq, wk and wv as one."""
    out = meta_tensors(said, tensors)
    for n in range(said["num_hidden_layers"]):
        parts = [out.pop(f"layers.{n}.attention.{which}.weight") for which in ("wq", "wk", "wv")]
        out[f"layers.{n}.attention.wqkv.weight"] = torch.cat(parts)
    return out


def write_gptfast(folder: Path, said: dict, tensors: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(gptfast_tensors(said, tensors), folder / "model.pth")
    (folder / "config.json").write_text(json.dumps(said))
    return folder


# ---------------------------------------------------------------- our own names


def plain_tensors(said: dict, tensors: dict) -> dict[str, torch.Tensor]:
    """The names of the field's llama3.2-1B-instruct.pth."""
    words = {
        "model.embed_tokens": "tok_emb", "model.norm": "final_norm", "lm_head": "out_head", "model.layers.": "trf_blocks.",
        "self_attn.q_proj": "att.W_query", "self_attn.k_proj": "att.W_key", "self_attn.v_proj": "att.W_value",
        "self_attn.o_proj": "att.out_proj", "mlp.gate_proj": "ff.fc1", "mlp.up_proj": "ff.fc2", "mlp.down_proj": "ff.fc3",
        "input_layernorm": "norm1", "post_attention_layernorm": "norm2",
    }  # fmt: skip
    out = {}
    for name, weight in tensors.items():
        for theirs, ours in words.items():
            name = name.replace(theirs, ours)
        out[name] = weight
    return out


def write_plain(folder: Path, said: dict, tensors: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(plain_tensors(said, tensors), folder / "llama3-small.pth")
    (folder / "config.json").write_text(json.dumps(said))
    return folder


# ---------------------------------------------------------------- what must be refused


class Hostile:
    """Makes a folder if anybody runs its pickle."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


def refused(path, *words: str, **arguments) -> str:
    """The message that loading raises: one line of bearable length with all of `words`."""
    with pytest.raises(LlamaBookError) as error:
        load_model(path, **arguments)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400 + len(str(path)), message
    assert all(word in message for word in words), message
    return message
