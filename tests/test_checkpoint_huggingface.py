"""Hugging Face folders: configuration in two spellings, features refused by name, ties, shards, and what is written."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import (
    LLAMA2,
    SMALL,
    TOKENS,
    UNTIED,
    agrees,
    config_of_transformers,
    make_oracle,
    refused,
    save,
    tensors_of,
    write_huggingface,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from llamabook.checkpoint import huggingface, load_config, load_model
from llamabook.checkpoint.huggingface import load_huggingface, read_config, read_tensors, save_huggingface
from llamabook.errors import CheckpointError, InputError
from llamabook.llama3 import LLAMA32_CONFIG_1B


@pytest.fixture(scope="module")
def tied():
    return make_oracle(SMALL)


@pytest.fixture(scope="module")
def untied():
    return make_oracle(UNTIED)


def config_of(tmp_path: Path, said: dict) -> dict:
    (tmp_path / "config.json").write_text(json.dumps(said))
    return read_config(tmp_path / "config.json")


# ---------------------------------------------------------------- config.json


def test_both_spellings_mean_the_same(tmp_path):
    old = config_of(tmp_path, SMALL)
    new = {key: value for key, value in SMALL.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new |= {"dtype": "float32", "head_dim": 8, "rope_parameters": {**SMALL["rope_scaling"], "rope_theta": 500000.0}}
    older = SMALL | {"rope_scaling": {**SMALL["rope_scaling"], "type": "llama3"}}
    del older["rope_scaling"]["rope_type"]
    assert old == config_of(tmp_path, new) == config_of(tmp_path, older)
    assert old == {
        "vocab_size": 96, "context_length": 131072, "emb_dim": 64, "n_heads": 8, "n_layers": 2, "hidden_dim": 176,
        "n_kv_groups": 2, "rope_base": 500000.0, "norm_eps": 1e-5, "dtype": torch.float32, "tie_embeddings": True,
        "rope_freq": {
            "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 8192,
        },
    }  # fmt: skip


def test_what_transformers_writes_today(tmp_path):
    for said in (SMALL, UNTIED, LLAMA2):
        want = config_of(tmp_path, said)
        config_of_transformers(said).save_pretrained(tmp_path)
        assert read_config(tmp_path / "config.json") == want


def test_silence_is_as_in_transformers(tmp_path):
    from transformers import LlamaConfig

    needed = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config, oracle = config_of(tmp_path, {k: SMALL[k] for k in needed}), LlamaConfig()
    assert (config["context_length"], config["norm_eps"]) == (oracle.max_position_embeddings, oracle.rms_norm_eps)
    assert (config["rope_base"], config["rope_freq"]) == (oracle.rope_parameters["rope_theta"], None)
    assert config["n_kv_groups"] == 8 and "head_dim" not in config and "tie_embeddings" not in config
    assert config == config_of(tmp_path, {k: SMALL[k] for k in needed} | dict.fromkeys(("rope_scaling", "head_dim")))
    for key in needed[1:]:
        with pytest.raises(CheckpointError, match=f"has no {key}"):
            config_of(tmp_path, {k: SMALL[k] for k in needed if k != key})


def test_a_head_dimension_of_its_own(tmp_path):
    assert config_of(tmp_path, SMALL | {"head_dim": 16})["head_dim"] == 16
    assert "head_dim" not in config_of(tmp_path, SMALL | {"head_dim": 8})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"sliding_window": 4096}, "sliding-window attention (sliding_window: 4096)"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"attention_bias": True}, "biases in attention (attention_bias: True)"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act: gelu"),
        ({"num_local_experts": 8}, "a mixture of experts (num_local_experts: 8)"),
        ({"num_experts": 8}, "num_experts"),
        ({"n_routed_experts": 8}, "n_routed_experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized weights (quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layers of several kinds (layer_types"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types: sliding_attention"),
        ({"model_type": "mistral"}, "another architecture (model_type: mistral)"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE scaling of the type 'linear'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "has no low_freq_factor"),
        ({"rope_scaling": {**SMALL["rope_scaling"], "factor": -8.0}}, "factor is '-8.0'"),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "several RoPE settings"),
        ({"rope_scaling": "llama3"}, "several RoPE settings"),
        ({"rope_theta": True}, "rope_theta is 'True'"),
        ({"hidden_size": 64.0}, "hidden_size is '64.0', not a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is '0'"),
        ({"vocab_size": 10**15}, "vocab_size is '1000000000000000'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is 'nan'"),
        ({"torch_dtype": "int8"}, "the dtype is 'int8'"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
)
def test_what_no_plain_llama_has_is_refused_by_name(tmp_path, tied, change, words):
    refused(write_huggingface(tmp_path, SMALL | change, tensors_of(tied)), str(tmp_path / "config.json"), words)


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": None, "use_sliding_window": False, "attention_bias": False, "mlp_bias": False},
        {"layer_types": ["full_attention"] * 2, "partial_rotary_factor": 1.0, "pretraining_tp": 2, "unknown": [1]},
        {"rope_scaling": {**SMALL["rope_scaling"], "rope_theta": 500000.0}, "num_local_experts": 0},
        {"quantization_config": None, "transformers_version": "4.45.0.dev0", "attention_dropout": 0.0},
    ],
)
def test_what_changes_nothing_is_accepted(tmp_path, tied, change):
    assert agrees(load_model(write_huggingface(tmp_path, SMALL | change, tensors_of(tied))), tied)


def test_impossible_heads(tmp_path, untied):
    folder = write_huggingface(tmp_path, UNTIED | {"num_key_value_heads": 3}, tensors_of(untied))
    refused(folder, "8 query heads can't share 3 groups")
    refused(write_huggingface(tmp_path, UNTIED | {"num_attention_heads": 7}, tensors_of(untied)), str(tmp_path))
    refused(write_huggingface(tmp_path, UNTIED | {"num_attention_heads": 128}, tensors_of(untied)), str(tmp_path))
    refused(write_huggingface(tmp_path, UNTIED | {"num_hidden_layers": 3}, tensors_of(untied)), "layers.2.", "lacks")
    refused(write_huggingface(tmp_path, UNTIED | {"num_hidden_layers": 1}, tensors_of(untied)), "layers.1.", "has not")
    refused(write_huggingface(tmp_path, UNTIED | {"num_hidden_layers": 10**6}, tensors_of(untied)), "n_layers is 1000000")


@pytest.mark.parametrize("dtype", ["float32", "torch.float32"])
def test_a_configuration_in_our_own_keys(tmp_path, tied, dtype):
    folder = write_huggingface(tmp_path, SMALL, tensors_of(tied))
    want = load_config(folder)
    (folder / "config.json").write_text(json.dumps(want | {"dtype": dtype, "author": "me"}))
    assert load_config(folder) == want and agrees(load_model(folder), tied)
    (folder / "config.json").write_text(json.dumps(LLAMA32_CONFIG_1B | {"dtype": "bfloat16"}))
    assert read_config(folder / "config.json") == LLAMA32_CONFIG_1B
    for change, words in (({"n_heads": 0}, "n_heads is '0'"), ({"n_kv_groups": None}, "has no n_kv_groups")):
        (folder / "config.json").write_text(json.dumps(want | {"dtype": dtype} | change))
        refused(folder, words)


@pytest.mark.parametrize("text", ["", "{", "[1]", "<!DOCTYPE html>", "\xff", '{"a": ' * 100_000, "null"])
def test_a_broken_config_json(tmp_path, tied, text):
    folder = write_huggingface(tmp_path, SMALL, tensors_of(tied))
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, str(folder / "config.json"))
    (folder / "config.json").unlink()
    refused(folder, "config.json does not exist")


# ---------------------------------------------------------------- ties


def test_ties(tmp_path, tied, untied):
    tensors = tensors_of(tied)
    again = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    model = load_model(write_huggingface(tmp_path / "again", SMALL, again))
    assert agrees(model, tied) and model.out_head.weight is model.tok_emb.weight
    assert sum(w.numel() for w in model.parameters()) == sum(w.numel() for w in tied.parameters())
    other = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    refused(write_huggingface(tmp_path / "other", SMALL, other), "lm_head.weight differs", "ties them")
    refused(write_huggingface(tmp_path / "lost", UNTIED, tensors), "lacks lm_head.weight")
    assert agrees(load_model(write_huggingface(tmp_path / "untied", UNTIED, tensors_of(untied))), untied)


# ---------------------------------------------------------------- which files


def test_files_without_an_index(tmp_path, untied):
    for ending in ("safetensors", "bin"):
        folder = write_huggingface(tmp_path / ending, UNTIED, tensors_of(untied), 3, ending)
        (index,) = folder.glob("*.index.json")
        index.unlink()
        assert agrees(load_model(folder), untied)
        sorted(folder.glob(f"*.{ending}"))[1].unlink()
        refused(folder, f"has 2 of 3 files *.{ending}")


def test_safetensors_come_before_bin_and_other_names_are_found(tmp_path, untied):
    folder = write_huggingface(tmp_path, UNTIED, tensors_of(untied))
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 and never looked at")
    assert agrees(load_model(folder), untied)
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert agrees(load_model(folder), untied)


@pytest.mark.parametrize(
    "index",
    ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": "../model.safetensors"}}', "<html>"],
)
def test_a_broken_index(tmp_path, untied, index):
    folder = write_huggingface(tmp_path, UNTIED, tensors_of(untied), 2)
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, "model.safetensors.index.json")


def test_a_tensor_in_two_files(tmp_path, untied):
    folder, tensors = tmp_path, tensors_of(untied)
    write_huggingface(folder, UNTIED, tensors, 2)
    save(folder / "model-00002-of-00002.safetensors", {name: tensors[name] for name in list(tensors)[-5:]})
    refused(folder, "model-00002-of-00002.safetensors has ", "an earlier file")


def test_old_files_store_angles(tmp_path, untied):
    tensors = tensors_of(untied) | {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(2)}
    assert agrees(load_model(write_huggingface(tmp_path, UNTIED, tensors, 1, "bin")), untied)


# ---------------------------------------------------------------- dtypes


def test_mixed_dtypes_follow_the_configuration(tmp_path, untied):
    tensors = tensors_of(untied, torch.bfloat16)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    model = load_model(write_huggingface(tmp_path, UNTIED | {"torch_dtype": "bfloat16"}, tensors))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    folder = write_huggingface(tmp_path, UNTIED | {"torch_dtype": "float16"}, tensors)
    refused(folder, "torch.bfloat16 and in torch.float32", "choose with dtype=")
    assert load_model(folder, dtype=torch.float32).cfg["dtype"] == torch.float32
    pure = write_huggingface(tmp_path, UNTIED | {"torch_dtype": "float16"}, tensors_of(untied, torch.bfloat16))
    assert load_model(pure).cfg["dtype"] == torch.bfloat16 == load_config(pure)["dtype"]


# ---------------------------------------------------------------- files


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_bytes_make_it_fall_over(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "broken.safetensors"
    save(path, {"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 150))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        found = read_tensors(path)
        assert all(torch.is_tensor(value) for value in found.values())
    except CheckpointError as error:
        assert "\n" not in str(error) and str(path) in str(error)


def test_a_zip_archive_called_safetensors(tmp_path, untied):
    folder = write_huggingface(tmp_path, UNTIED, tensors_of(untied), 1, "bin")
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    refused(folder, "model.safetensors is cut off, or not what its name says")


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(3)], torch.ones(3), {"a": 1}, {"state_dict": {"a": torch.ones(1)}}, {1: torch.ones(3)},
        {"a": torch.ones(3, 3).to_sparse()}, {"a": torch.ones(3, device="meta")},
    ],
)  # fmt: skip
def test_a_file_that_holds_no_weights(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    refused(tmp_path, "pytorch_model.bin is no dictionary of tensors")


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 40_000, 1])
@pytest.mark.parametrize("said", [SMALL, UNTIED, LLAMA2])
def test_saved_and_read_by_both(tmp_path, said, shard_bytes):
    from transformers import AutoModelForCausalLM

    oracle = make_oracle(said)
    model = load_model(write_huggingface(tmp_path / "old", said, tensors_of(oracle)))
    save_huggingface(model, tmp_path / "new" / "er", shard_bytes=shard_bytes, metadata={"eos_token_id": [7, 8]})
    again = load_model(tmp_path / "new" / "er")
    assert again.cfg == model.cfg
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "er")
    assert agrees(lambda tokens: theirs(tokens).logits, oracle, tolerance=0)
    assert theirs.config.eos_token_id == [7, 8]


def test_shards(tmp_path, untied):
    model = load_model(write_huggingface(tmp_path / "old", UNTIED, tensors_of(untied)))
    save_huggingface(model, tmp_path / "new", shard_bytes=40_000)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "new").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files and files[0].endswith(f"-of-{len(files):05d}.safetensors")
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in model.parameters())
    for file in files:
        with safe_open(tmp_path / "new" / file, framework="pt") as opened:
            names = set(opened.keys())
            assert opened.metadata() == {"format": "pt"}
            sizes = [opened.get_tensor(name).nbytes for name in names]
        assert names == {name for name, place in index["weight_map"].items() if place == file}
        assert sum(sizes) <= 40_000 or len(sizes) == 1


def test_saving_over_what_is_mapped_and_other_shards(tmp_path, untied):
    folder = write_huggingface(tmp_path, UNTIED, tensors_of(untied), 3)
    model = load_model(folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    save_huggingface(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    save_huggingface(model, folder, shard_bytes=40_000)
    assert "model.safetensors" not in {path.name for path in folder.iterdir()}
    for found in (model, load_model(folder)):
        assert all(torch.equal(weight, before[name]) for name, weight in found.state_dict().items())


def test_who_may_read_one_file_may_read_all(tmp_path, untied):
    """safetensors leaves its files to their owner alone, unlike everything else that writes."""
    model = load_model(write_huggingface(tmp_path, UNTIED, tensors_of(untied)))
    save_huggingface(model, tmp_path / "new", shard_bytes=40_000)
    assert len({file.stat().st_mode for file in (tmp_path / "new").iterdir()}) == 1


def test_an_interrupted_save_leaves_the_old_files(tmp_path, untied, monkeypatch):
    folder = write_huggingface(tmp_path, UNTIED, tensors_of(untied))
    model, old = load_model(folder), {path.name: path.read_bytes() for path in folder.iterdir()}

    def stopped(file, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface, "write_json", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_huggingface(model, folder, shard_bytes=40_000)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    with pytest.raises(InputError, match="shard_bytes is 0"):
        save_huggingface(model, folder, shard_bytes=0)


# ---------------------------------------------------------------- mutants: each known mistake must be noticed


def exchanged(one, other):
    return huggingface.PARTS | {one: huggingface.PARTS[other], other: huggingface.PARTS[one]}


def factor_of_31(path, said):
    base, scaling = ROPE_OF(path, said)
    return base, scaling and scaling | {"factor": 8.0}


ROPE_OF = huggingface.rope_of
MUTANTS = {
    "gate and value exchanged": ("PARTS", exchanged("mlp.gate_proj", "mlp.up_proj")),
    "keys and values exchanged": ("PARTS", exchanged("self_attn.k_proj", "self_attn.v_proj")),
    "norms exchanged": ("PARTS", exchanged("input_layernorm", "post_attention_layernorm")),
    "no scaling": ("rope_of", lambda path, said: (ROPE_OF(path, said)[0], None)),
    "the scaling of 3.1": ("rope_of", factor_of_31),
    "the base of Llama 2": ("rope_of", lambda path, said: (10_000.0, ROPE_OF(path, said)[1])),
    "the base of Code Llama": ("rope_of", lambda path, said: (1_000_000.0, ROPE_OF(path, said)[1])),
}


@pytest.mark.parametrize("name", [None, *MUTANTS])
def test_a_wrong_loader_is_noticed(tmp_path, monkeypatch, tied, name):
    folder = write_huggingface(tmp_path, SMALL, tensors_of(tied))
    if name is not None:
        monkeypatch.setattr(huggingface, *MUTANTS[name])
    assert agrees(load_huggingface(folder), tied, TOKENS) == (name is None)
