"""load_model and load_config: every published configuration, every layout, every fault.

The files are written in tests/checkpoints.py from transformers models, whose logits are the measure.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import (
    LLAMA2,
    LLAMA3,
    SMALL,
    UNTIED,
    Hostile,
    agrees,
    config_of_transformers,
    make_oracle,
    meta_params,
    read,
    refused,
    save,
    tensors_of,
    write_gptfast,
    write_huggingface,
    write_meta,
    write_plain,
)

from llamabook.checkpoint import load_config, load_model, recognize
from llamabook.checkpoint.gptfast import save_gptfast
from llamabook.checkpoint.huggingface import build_llama, huggingface_names, save_huggingface
from llamabook.checkpoint.llama3_meta import save_llama3_meta
from llamabook.errors import CheckpointError
from llamabook.llama2 import LLAMA2_CONFIG_7B, LLAMA2_CONFIG_13B, LLAMA2_CONFIG_70B, Llama2Model
from llamabook.llama3 import (
    LLAMA3_CONFIG_8B,
    LLAMA3_CONFIG_70B,
    LLAMA31_CONFIG_8B,
    LLAMA31_CONFIG_70B,
    LLAMA31_CONFIG_405B,
    LLAMA32_CONFIG_1B,
    LLAMA32_CONFIG_3B,
    LLAMA33_CONFIG_70B,
    Llama3Model,
)

# ---------------------------------------------------------------- the published configurations


def published(D, F, L, H, G=None, *, V=32000, context=4096, theta=None, eps=1e-5, factor=None, dtype="float16", **more):
    """A config.json as it lies in the repositories; keys that old files leave out are left out."""
    said = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": V,
        "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": H,
        "max_position_embeddings": context, "rms_norm_eps": eps, "torch_dtype": dtype, "initializer_range": 0.02,
        "tie_word_embeddings": False, "use_cache": True, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    said |= {} if G is None else {"num_key_value_heads": G}
    said |= {} if theta is None else {"rope_theta": theta}
    if factor is not None:
        said |= {"rope_scaling": {**LLAMA3, "factor": factor, "rope_type": "llama3"}}
    return said | more


NEW = dict(V=128256, theta=500000.0, dtype="bfloat16", attention_bias=False, attention_dropout=0.0, pretraining_tp=1)
LONG = dict(NEW, context=131072, mlp_bias=False)
PUBLISHED = {
    "open_llama_7b": published(4096, 11008, 32, 32, context=2048, eps=1e-6),
    "Llama-2-7b-chat": published(4096, 11008, 32, 32, 32, rope_scaling=None, pretraining_tp=1),
    "Llama-2-13b-chat": published(5120, 13824, 40, 40, 40, rope_scaling=None),
    "Llama-2-70b-chat": published(8192, 28672, 80, 64, 8, rope_scaling=None),
    "CodeLlama-7b-Python": published(4096, 11008, 32, 32, 32, context=16384, theta=1000000, dtype="bfloat16"),
    "CodeLlama-34b-Python": published(8192, 22016, 48, 64, 8, context=16384, theta=1000000, dtype="bfloat16"),
    "Meta-Llama-3-8B": published(4096, 14336, 32, 32, 8, context=8192, rope_scaling=None, **NEW),
    "Meta-Llama-3-70B": published(8192, 28672, 80, 64, 8, context=8192, rope_scaling=None, **NEW),
    "Llama-3.1-8B": published(4096, 14336, 32, 32, 8, factor=8.0, **LONG),
    "Llama-3.1-70B": published(8192, 28672, 80, 64, 8, factor=8.0, **LONG),
    "Llama-3.1-405B": published(16384, 53248, 126, 128, 8, factor=8.0, **LONG),
    "Llama-3.2-1B": published(2048, 8192, 16, 32, 8, factor=32.0, head_dim=64, **LONG) | {"tie_word_embeddings": True},
    "Llama-3.2-3B": published(3072, 8192, 28, 24, 8, factor=32.0, head_dim=128, **LONG) | {"tie_word_embeddings": True},
    "Llama-3.3-70B": published(8192, 28672, 80, 64, 8, factor=8.0, head_dim=128, **LONG),
    "TinyLlama-1.1B": published(2048, 5632, 22, 32, 4, context=2048, rope_scaling=None, dtype="bfloat16"),
}
OURS = {
    "Llama-2-7b-chat": LLAMA2_CONFIG_7B, "Llama-2-13b-chat": LLAMA2_CONFIG_13B, "Llama-2-70b-chat": LLAMA2_CONFIG_70B,
    "Meta-Llama-3-8B": LLAMA3_CONFIG_8B, "Meta-Llama-3-70B": LLAMA3_CONFIG_70B, "Llama-3.1-8B": LLAMA31_CONFIG_8B,
    "Llama-3.1-70B": LLAMA31_CONFIG_70B, "Llama-3.1-405B": LLAMA31_CONFIG_405B, "Llama-3.2-1B": LLAMA32_CONFIG_1B,
    "Llama-3.2-3B": LLAMA32_CONFIG_3B, "Llama-3.3-70B": LLAMA33_CONFIG_70B,
}  # fmt: skip


def shrunk(said: dict) -> dict:
    """The same ratios, head dimension, base, scaling and tie, in two layers with few heads and words."""
    H, G = said["num_attention_heads"], said.get("num_key_value_heads", said["num_attention_heads"])
    d, each = said["hidden_size"] // H, H // G
    choices = (2 if each * d <= 512 else 1, 4, 5)
    groups = next(g for g in choices if said["intermediate_size"] * each * g % H == 0 and g * each > 1)
    heads = each * groups
    small = said | {"num_hidden_layers": 2, "vocab_size": 500, "num_attention_heads": heads, "hidden_size": heads * d}
    small |= {"intermediate_size": said["intermediate_size"] * heads // H}
    return small | ({"num_key_value_heads": groups} if "num_key_value_heads" in said else {})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_compute_what_transformers_computes(tmp_path, name):
    said = shrunk(PUBLISHED[name])
    assert said["hidden_size"] <= 2048
    dtype = getattr(torch, said["torch_dtype"])
    oracle = make_oracle(said, stored=dtype)
    folder = write_huggingface(tmp_path / "model", said, tensors_of(oracle, dtype), shards=2)
    model = load_model(folder, dtype=torch.float32)
    tokens = (torch.arange(100 if said["hidden_size"] > 1024 else 300) * 37 % 500)[None]
    assert agrees(model, oracle, tokens)
    assert {weight.dtype for weight in load_model(folder).parameters()} == {dtype} == {load_config(folder)["dtype"]}
    assert (model.out_head.weight is model.tok_emb.weight) == said["tie_word_embeddings"]


def test_long_inputs_see_the_scaling(tmp_path):
    said = shrunk(PUBLISHED["Llama-3.2-1B"])
    oracle = make_oracle(said)
    model = load_model(write_huggingface(tmp_path / "model", said, tensors_of(oracle)))
    tokens = (torch.arange(2000) * 37 % 500)[None]
    assert agrees(model, oracle, tokens)
    model.cfg["rope_freq"] = {**model.cfg["rope_freq"], "factor": 8.0}
    assert not agrees(model, oracle, tokens, tolerance=1e-2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_by_name_and_shape(tmp_path, name):
    from transformers import LlamaForCausalLM

    said = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(said))
    config = load_config(tmp_path)
    with torch.device("meta"):
        oracle = LlamaForCausalLM(config_of_transformers(said))
        model = build_llama(config)
    ours, theirs = model.state_dict(), oracle.state_dict()
    names = huggingface_names(config["n_layers"])
    assert set(names) == set(theirs) and set(names.values()) == set(ours)
    assert all(theirs[their].shape == ours[our].shape for their, our in names.items())
    assert sum(w.numel() for w in model.parameters()) == sum(w.numel() for w in oracle.parameters())
    assert torch.allclose(model.frequencies(), type(oracle.model.rotary_emb)(oracle.config).inv_freq, rtol=1e-5)
    if name in OURS:
        assert config == {**OURS[name], "dtype": config["dtype"]}


# ---------------------------------------------------------------- the layouts

LAYOUTS = {
    "huggingface": (lambda folder, said, tensors: write_huggingface(folder, said, tensors), "huggingface"),
    "huggingface, 3 files": (lambda folder, said, tensors: write_huggingface(folder, said, tensors, 3), "huggingface"),
    "bin": (lambda folder, said, tensors: write_huggingface(folder, said, tensors, 1, "bin"), "huggingface"),
    "bin, 3 files": (lambda folder, said, tensors: write_huggingface(folder, said, tensors, 3, "bin"), "huggingface"),
    "meta": (lambda folder, said, tensors: write_meta(folder, said, tensors), "meta"),
    "meta, 2 shards": (lambda folder, said, tensors: write_meta(folder, said, tensors, 2), "meta"),
    "gptfast": (write_gptfast, "gptfast"),
    "plain": (write_plain, "plain"),
}


@pytest.fixture(scope="module")
def oracles():
    return {name: (said, make_oracle(said)) for name, said in (("tied", SMALL), ("untied", UNTIED), ("llama2", LLAMA2))}


@pytest.mark.parametrize("kind", ["tied", "untied", "llama2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_the_same(tmp_path, oracles, layout, kind):
    said, oracle = oracles[kind]
    write, name = LAYOUTS[layout]
    folder = write(tmp_path / "model", said, tensors_of(oracle))
    assert recognize(folder)[0] == name
    model, config = load_model(folder), load_config(folder)
    assert agrees(model, oracle) and not model.training
    assert model.cfg == config and config["dtype"] == torch.float32
    assert config["context_length"] == said["max_position_embeddings"]
    assert type(model) is (Llama2Model if kind == "llama2" else Llama3Model)
    assert (model.out_head.weight is model.tok_emb.weight) == (kind == "tied")
    assert all(weight.requires_grad for weight in model.parameters())
    single = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth")]
    for path in single[:1]:
        assert load_model(str(path)).cfg == config  # one of its files stands for the folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stored, asked", [(torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.bfloat16)])
def test_dtype(tmp_path, oracles, layout, stored, asked):
    said, oracle = oracles["tied"]
    folder = LAYOUTS[layout][0](tmp_path / "model", said, tensors_of(oracle, stored))
    model = load_model(folder, dtype=asked)
    assert {weight.dtype for weight in model.parameters()} == {asked or stored} == {model.cfg["dtype"]}
    assert load_config(folder)["dtype"] == stored


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_own_configuration_replaces_the_files(tmp_path, oracles, layout):
    said, oracle = oracles["untied"]
    folder = LAYOUTS[layout][0](tmp_path / "model", said, tensors_of(oracle))
    config = load_config(folder)
    for name in ("config.json", "params.json"):
        (folder / name).unlink(missing_ok=True)
    assert agrees(load_model(folder, config=config), oracle)
    assert load_model(folder, config=config | {"rope_base": 99.0}).cfg["rope_base"] == 99.0
    assert config["rope_base"] == 500_000.0
    refused(folder, "json")
    refused(folder, "n_layers", config=config | {"n_layers": 10**9})
    refused(folder, "wants", config=config | {"hidden_dim": 99})
    refused(folder, config={key: config[key] for key in config if key != "rope_base"})


def test_what_a_folder_may_hold_beside(tmp_path, oracles):
    said, oracle = oracles["untied"]
    folder = write_huggingface(tmp_path / "repository", said, tensors_of(oracle))
    write_meta(folder / "original", said, tensors_of(oracle))
    assert recognize(folder) == ("huggingface", folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert recognize(folder) == ("meta", folder / "original")
    assert agrees(load_model(folder), oracle)


def test_several_files_without_a_layout(tmp_path, oracles):
    said, oracle = oracles["tied"]
    folder = write_plain(tmp_path, said, tensors_of(oracle))
    torch.save({}, folder / "optimizer.pth")
    refused(folder, "several files of weights", "llama3-small.pth, optimizer.pth")
    assert agrees(load_model(folder / "llama3-small.pth"), oracle)
    refused(folder / "optimizer.pth", "no weights of a Llama (but nothing)")


def test_names_that_are_no_llamas(tmp_path):
    torch.save({"transformer.h.0.attn.c_attn.weight": torch.ones(2, 2)}, tmp_path / "gpt2.pth")
    refused(tmp_path, "no weights of a Llama", "transformer.h.0.attn.c_attn.weight")


def test_a_configuration_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    assert load_config(tmp_path)["tie_embeddings"] is True
    refused(tmp_path, "has no model.safetensors, consolidated.00.pth or model.pth", "it holds config.json")
    refused(tmp_path / "config.json", "it holds config.json")


# ---------------------------------------------------------------- Meta's Llama 3


@pytest.mark.parametrize("shards", [1, 2])
def test_what_metas_params_leave_out(tmp_path, oracles, shards):
    for kind, factor in (("tied", 32.0), ("untied", 8.0)):
        said, oracle = oracles[kind]
        config = load_config(write_meta(tmp_path / kind, said, tensors_of(oracle), shards))
        assert config["rope_freq"]["factor"] == factor and config["rope_freq"]["original_context_length"] == 8192
        assert config["context_length"] == 131072 and config["vocab_size"] == 96


@pytest.mark.parametrize(
    "change, words",
    [
        ({"quantization_args": {"scheme": "int4"}}, "quantized weights (quantization_args)"),
        ({"moe_args": {"num_experts": 16}}, "a mixture of experts (moe_args)"),
        ({"vision_chunk_size": 560}, "images (vision_chunk_size)"),
        ({"sliding_window": 4096}, "sliding-window attention (sliding_window)"),
        ({"rope_scaling_factor": "8"}, "rope_scaling_factor is '8'"),
        ({"n_layers": 10**9}, "n_layers is 1000000000"),
        ({"vocab_size": 97}, "vocab_size is 97"),
    ],
)
def test_params_that_no_plain_llama_has(tmp_path, oracles, change, words):
    said, oracle = oracles["untied"]
    refused(write_meta(tmp_path, said, tensors_of(oracle), params=meta_params(said) | change), words)


def test_params_that_may_be_there(tmp_path, oracles):
    said, oracle = oracles["untied"]
    more = {"rope_scaling_factor": 32.0, "vision_chunk_size": -1, "max_seq_len": 77, "max_batch_size": 4, "head_dim": 8}
    config = load_config(write_meta(tmp_path, said, tensors_of(oracle), params=meta_params(said) | more))
    assert config["rope_freq"]["factor"] == 32.0 and config["context_length"] == 77 and "head_dim" not in config


@pytest.mark.parametrize("context, theta", [(4096, 10_000.0), (8192, 500_000.0), (16384, 1_000_000.0), (4096, 777.0)])
def test_metas_context_by_family(tmp_path, oracles, context, theta):
    said, oracle = oracles["llama2"]
    params = meta_params(said) | {"rope_theta": theta}
    assert load_config(write_meta(tmp_path, said, tensors_of(oracle), params=params))["context_length"] == context


# ---------------------------------------------------------------- every layout x every fault


def edited(path: Path, change) -> None:
    tensors = read(path)
    change(tensors)
    save(path, tensors)


def target(tensors: dict) -> str:
    """A matrix of the feed-forward that is in this file, else any."""
    matrices = [name for name, weight in tensors.items() if weight.ndim == 2]
    return next((name for name in matrices if any(key in name for key in ("w3", "up_proj", "fc2"))), matrices[-1])


def replaced(tensors: dict, value) -> None:
    name = target(tensors)
    tensors[name] = value(tensors[name])


FAULTS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3]),
    "last byte missing": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "missing shard": lambda path: path.unlink(),
    "web page": lambda path: path.write_bytes(b"<!DOCTYPE html><html>Log in</html>"),
    "empty": lambda path: path.write_bytes(b""),
    "git lfs pointer": lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "integers": lambda path: edited(path, lambda t: replaced(t, lambda w: w.to(torch.int8))),
    "float8": lambda path: edited(path, lambda t: replaced(t, lambda w: w.to(torch.float8_e4m3fn))),
    "wrong shape": lambda path: edited(path, lambda t: replaced(t, lambda w: w[:, :-1].contiguous())),
    "transposed": lambda path: edited(path, lambda t: replaced(t, lambda w: w.T.contiguous())),
    "one dimension too many": lambda path: edited(path, lambda t: replaced(t, lambda w: w[None])),
    "a number": lambda path: edited(path, lambda t: replaced(t, lambda w: torch.tensor(1.0))),
    "extra key": lambda path: edited(path, lambda t: t.update({target(t).replace("weight", "bias"): torch.ones(2)})),
    "missing key": lambda path: edited(path, lambda t: t.pop(target(t))),
}
NAMED = ("integers", "float8", "wrong shape", "transposed", "one dimension too many", "a number", "extra key", "missing key")


@pytest.mark.parametrize("fault", [*FAULTS, "code"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_fault_gets_one_line(tmp_path, oracles, layout, fault):
    said, oracle = oracles["untied"]
    folder = LAYOUTS[layout][0](tmp_path / "model", said, tensors_of(oracle))
    path = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth"))[-1]
    if fault == "code":
        torch.save({"model.embed_tokens.weight": Hostile(tmp_path / "victim")}, path)
    else:
        name = target(read(path))
        FAULTS[fault](path)
    message = refused(folder, str(tmp_path))
    assert not (tmp_path / "victim").exists()
    if fault in NAMED and not (layout.startswith("meta") and fault == "integers"):
        stem = name.removesuffix(".weight")
        assert stem in message, message


def test_the_hostile_file_is_hostile(tmp_path):
    torch.save({"a": Hostile(tmp_path / "victim")}, tmp_path / "a.pth")
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "victim").exists()


def test_no_such_path(tmp_path):
    for function in (load_model, load_config):
        with pytest.raises(CheckpointError, match="does not exist: check the path"):
            function(tmp_path / "nowhere")


# ---------------------------------------------------------------- memory

MEASURE = """
import json, os, sys, threading, time, torch
from llamabook.checkpoint import load_model

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

load_model(sys.argv[1], dtype=torch.bfloat16)  # what torch sets up once
for folder in sys.argv[2:]:
    for dtype in (None, torch.bfloat16):
        read, write = os.pipe()
        if os.fork():
            os.wait()
            print(os.read(read, 99).decode())
            continue
        before, peak, done = anonymous(), [0], threading.Event()
        def watch():
            while not done.is_set():
                peak.append(anonymous())
                time.sleep(0.001)
        watcher = threading.Thread(target=watch)
        watcher.start()
        model = load_model(folder, dtype=dtype)
        done.set()
        watcher.join()
        size = sum(weight.nbytes for weight in model.parameters())
        growth = max(*peak, anonymous()) - before
        os.write(write, json.dumps([growth, size]).encode())
        os._exit(0)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_stays_within_the_weights(tmp_path):
    config = {
        "vocab_size": 1000, "context_length": 4096, "emb_dim": 512, "n_heads": 8, "n_layers": 8, "hidden_dim": 1408,
        "n_kv_groups": 2, "rope_base": 500_000.0, "rope_freq": None, "dtype": torch.float32, "tie_embeddings": True,
    }  # fmt: skip
    model = Llama3Model(config)
    save_huggingface(model, tmp_path / "hf", shard_bytes=30_000_000)
    save_gptfast(model, tmp_path / "gptfast")
    save_llama3_meta(model, tmp_path / "meta")
    save_llama3_meta(model, tmp_path / "meta2", shards=2)
    (tmp_path / "plain").mkdir()
    torch.save(model.state_dict(), tmp_path / "plain" / "model.pth")
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    warm = write_huggingface(tmp_path / "warm", SMALL, tensors_of(make_oracle(SMALL)))
    folders = [str(tmp_path / name) for name in ("hf", "plain", "gptfast", "meta", "meta2")]
    command = [sys.executable, "-c", MEASURE, str(warm), *folders]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}  # threads do not survive a fork
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed counts as freed, as with the large tensors of real models
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    measured = [json.loads(line) for line in result.stdout.split("\n") if line]
    assert len(measured) == 10
    for name, (growth, size) in zip([name for name in folders for _ in range(2)], measured):
        assert growth <= 1.1 * size + 2**20, f"{name}: {growth / 2**20:.1f} MB for {size / 2**20:.1f} MB of weights"
    for growth, size in measured[:4:2]:
        assert growth < 0.05 * size  # nothing of Hugging Face's and of our own layout is copied
