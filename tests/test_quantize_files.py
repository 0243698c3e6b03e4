"""Quantized checkpoints on disk: the same numbers by every road, whole or not at all, and what is damaged is named."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import (
    LLAMA2,
    SMALL,
    TOKENS,
    UNTIED,
    make_oracle,
    read,
    refused,
    save,
    tensors_of,
    write_gptfast,
    write_huggingface,
    write_meta,
    write_plain,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llamabook import fast, pocket
from llamabook.checkpoint import check_config, load_config, load_model, recognize
from llamabook.checkpoint.convert import convert
from llamabook.checkpoint.huggingface import huggingface_names
from llamabook.checkpoint.streaming import TensorWriter
from llamabook.errors import CheckpointError, InputError, LlamaBookError
from llamabook.fast import kernels
from llamabook.fast.cache import StaticCache
from llamabook.fast.engine import weight_bytes
from llamabook.fast.model import from_llama
from llamabook.fast.quantize.files import load_engine, quantize, read_quantized, writing
from llamabook.fast.quantize.linear import QuantizedLinear
from llamabook.fast.quantize.weight import Scheme

SCHEMES = [Scheme(8), Scheme(4, 32), Scheme(4, 64), Scheme(4, 256), Scheme(4, 32, True), Scheme(4, 128, True)]
KINDS = {"tied": SMALL, "untied": UNTIED, "llama2": LLAMA2}  # widths of 64 and 176, which 64 and more do not divide


def name_of(scheme) -> str:
    return f"{scheme}{'.asymmetric' * scheme.asymmetric}"


@pytest.fixture(scope="module")
def oracles():
    return {kind: make_oracle(said, stored=torch.bfloat16) for kind, said in KINDS.items()}


@pytest.fixture
def src(tmp_path, oracles):
    return write_huggingface(tmp_path / "src", SMALL, tensors_of(oracles["tied"]))


def tree(folder: Path) -> dict:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def decoded(tensors: dict, name: str, bits: int, groupsize: int | None) -> np.ndarray:
    """The matrix that a folder's tensors stand for, by numpy: bit by bit, number by number."""
    N, K = tensors[f"{name}_shape"].tolist()
    words = tensors[f"{name}_packed"].numpy().astype(np.int64) & 0xFFFFFFFF
    scales = tensors[f"{name}_scale"].float().numpy()
    zeros = tensors[f"{name}_zero"].float().numpy() if f"{name}_zero" in tensors else np.zeros_like(scales)
    weight = np.empty((N, K), np.float32)
    for k in range(K):
        word, shift = divmod(k * bits, 32)
        code = (words[:, word] >> shift & (2**bits - 1)) - 2 ** (bits - 1)
        group = k // (groupsize or K)
        weight[:, k] = code.astype(np.float32) * scales[:, group] + zeros[:, group]
    return weight


# ---------------------------------------------------------------- the same numbers by every road


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_holds_the_codes_of_each_matrix(tmp_path, oracles, kind, scheme):
    tensors = tensors_of(oracles[kind], torch.bfloat16)
    src = write_huggingface(tmp_path / "src", {**KINDS[kind], "torch_dtype": "bfloat16"}, tensors)
    dst = quantize(str(src), str(tmp_path / "dst"), scheme)
    found, model = load_file(dst / "model.safetensors"), load_model(dst, dtype=torch.float32)
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    for theirs, ours in huggingface_names(2).items():
        weight = head if theirs == "lm_head.weight" else tensors[theirs]
        if "norm" in theirs or "embed" in theirs:
            assert found.pop(theirs).equal(weight) and model.state_dict()[ours].equal(weight.float())
            continue
        want = torch.from_numpy(decoded(found, theirs, scheme.bits, scheme.groupsize))
        assert torch.equal(model.state_dict()[ours], want), theirs  # to the bit
        worst = (want - weight.float()).abs().max() / weight.float().abs().max()
        assert worst < (0.01 if scheme.bits == 8 else 0.16), (theirs, worst)
        assert torch.equal(want, scheme(weight).dequantize()), theirs  # in blocks of rows as in one piece
        for ending in ("_packed", "_scale", "_shape", *["_zero"] * scheme.asymmetric):
            del found[theirs + ending]
    assert not found
    assert model.cfg == {**load_config(dst), "dtype": torch.float32} and "tie_embeddings" not in model.cfg


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, 64)], ids=name_of)
def test_every_layout_gives_the_same_bytes(tmp_path, oracles, scheme, monkeypatch):
    tensors = tensors_of(oracles["tied"])
    one = write_huggingface(tmp_path / "one", SMALL, tensors)
    want = tree(quantize(one, tmp_path / "want", scheme))
    sources = {
        "shards": write_huggingface(tmp_path / "shards", SMALL, tensors, shards=3),
        "bin": write_huggingface(tmp_path / "bin", SMALL, tensors, ending="bin"),
        "meta": write_meta(tmp_path / "meta", SMALL, tensors),
        "meta in two": write_meta(tmp_path / "meta2", SMALL, tensors, shards=2),
        "gptfast": write_gptfast(tmp_path / "gptfast", SMALL | {"tie_word_embeddings": True}, tensors),
        "plain": write_plain(tmp_path / "plain", SMALL, tensors),
    }
    for name, src in sources.items():
        got = tree(quantize(src, tmp_path / f"{name} out", scheme))
        assert got["model.safetensors"] == want["model.safetensors"], name
    monkeypatch.setattr("llamabook.fast.quantize.files.BLOCK", 1000)  # rows by the dozen, and on two threads
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert tree(quantize(one, tmp_path / "again", scheme)) == want
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_several_files(tmp_path, src):
    want = load_file(quantize(src, tmp_path / "one", Scheme(4, 32)) / "model.safetensors")
    dst = quantize(src, tmp_path / "many", Scheme(4, 32), shard_bytes=30_000)
    files = sorted(dst.glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 30_000 + 10_000 for file in files)
    index = json.loads((dst / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in want.values())
    found = {}
    for file in files:
        part = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in part)
        found |= part
    assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)
    one, many = load_model(tmp_path / "one"), load_model(dst)
    assert all(torch.equal(weight, many.state_dict()[name]) for name, weight in one.state_dict().items())
    with pytest.raises(InputError, match="shard_bytes is 0"):
        quantize(src, tmp_path / "none", Scheme(8), shard_bytes=0)


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, 32), Scheme(4, 128)], ids=name_of)
def test_transformers_reads_what_we_write(tmp_path, scheme):
    import compressed_tensors  # noqa: F401
    from transformers import AutoModelForCausalLM

    dst = quantize(pocket.path("pocket-llama3.2"), tmp_path / "dst", scheme)
    theirs = AutoModelForCausalLM.from_pretrained(dst, dtype=torch.float32)
    ours = load_model(dst, dtype=torch.float32)
    tokens = torch.randint(0, 1700, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, want = theirs(tokens).logits, ours(tokens)
    assert (got - want).abs().max() < 2e-5 * want.abs().max()


def test_others_refuse_our_zeros(tmp_path):
    import compressed_tensors  # noqa: F401
    from transformers import AutoModelForCausalLM

    dst = quantize(pocket.path("pocket-draft"), tmp_path / "dst", Scheme(4, 32, True))
    with pytest.raises(ValueError, match="float_zeros"):
        AutoModelForCausalLM.from_pretrained(dst)


# ---------------------------------------------------------------- in the engine


def logits_of(model, tokens=TOKENS):
    B, T = tokens.shape
    cache = StaticCache(model.cfg, B, T, "cpu")
    with torch.no_grad():
        return model(tokens, torch.arange(T).expand(B, -1), cache).float()


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_computes_what_the_plain_model_does(tmp_path, oracles, kind, scheme):
    src = write_huggingface(tmp_path / "src", KINDS[kind], tensors_of(oracles[kind]))
    stored = read_quantized(quantize(src, tmp_path / "dst", scheme))
    with torch.no_grad():
        want = load_model(tmp_path / "dst")(TOKENS)
    model = load_engine(stored, exact=True)
    assert model.quantization == str(scheme) and not model.training
    assert (logits_of(model) - want).abs().max() < 1e-4 * want.abs().max()
    share = (logits_of(load_engine(stored)) - want).norm() / want.norm()
    assert 1e-3 < share < 0.05 if kernels.rounds_activations() else share < 1e-4
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 4 * 2 + 1 and all(linear.exact for linear in linears)
    assert model.embedding.weight.dtype == torch.float32 and model.cfg["dtype"] == torch.float32


def test_load_takes_a_quantized_folder_with_no_further_flag(tmp_path):
    dst = quantize(pocket.path("pocket-llama3.2"), tmp_path / "dst", Scheme(4, 32))
    model, tokenizer = fast.load(dst)
    assert model.embedding.weight.dtype == torch.bfloat16 and not model.head.exact
    assert fast.load(dst, dtype=None, activations="exact")[0].head.exact
    source = fast.load(pocket.path("pocket-llama3.2"))[0]
    assert not hasattr(source, "quantization")
    D, F, V, kv, dense = 256, 512, 2048, 128, 2
    heads = 512
    matrices = 3 * (D * (heads + 2 * kv) + heads * D + 3 * D * F) + V * D
    assert weight_bytes(source) == dense * (matrices + 7 * D)
    assert weight_bytes(model) == matrices // 2 + 2 * matrices // 32 + dense * 7 * D
    with pytest.raises(InputError, match="activations is 'none': give 'rounded' or 'exact'"):
        fast.load(dst, activations="none")


@pytest.mark.parametrize("name", ["pocket-llama3.2-instruct", "pocket-llama2"])
@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, 32), Scheme(4, 64, True)], ids=name_of)
def test_the_same_text(tmp_path, name, scheme):
    dst = quantize(pocket.path(name), tmp_path / "dst", scheme)
    model, tokenizer = fast.load(dst, dtype=torch.float32, activations="exact")
    prompts = [tokenizer.encode(text, bos=True) for text in ("One sunny morning,", "What do llamas eat?")]
    want = fast.generate(from_llama(load_model(dst, dtype=torch.float32)), prompts, 60, stop=tokenizer.stop_tokens)
    assert fast.generate(model, prompts, 60, stop=tokenizer.stop_tokens) == want


def test_dequantized_by_convert(tmp_path, src):
    dst = quantize(src, tmp_path / "dst", Scheme(4, 32))
    dense = convert(dst, tmp_path / "dense")
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    one, other = load_model(dst).state_dict(), load_model(dense).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(other["out_head.weight"], other["tok_emb.weight"])
    assert recognize(dense)[0] == "huggingface" and recognize(dst)[0] == "quantized"


# ---------------------------------------------------------------- files by others


def rewritten(folder: Path, change, **weights) -> Path:
    """The folder with `change`(tensors) made, and with other words in its quantization_config."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    said["quantization_config"]["config_groups"]["group_0"]["weights"] |= weights
    said["quantization_config"].pop("llamabook")
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def test_matrices_that_were_left_out(tmp_path, src):
    """As most published ones: the head is not quantized, and here the table."""
    dst = quantize(src, tmp_path / "dst", Scheme(4, 32))
    downs = [f"model.layers.{n}.mlp.down_proj.weight" for n in range(2)]
    source = load_file(src / "model.safetensors")

    def change(tensors):
        for name in ("lm_head.weight", *downs):
            for ending in ("_packed", "_scale", "_shape"):
                del tensors[name + ending]
        tensors |= {name: source[name] for name in downs}

    rewritten(dst, change)
    said = json.loads((dst / "config.json").read_text())
    said["tie_word_embeddings"] = True
    said["quantization_config"]["ignore"] = ["lm_head", "re:.*down_proj"]
    (dst / "config.json").write_text(json.dumps(said))
    dense, model = load_model(dst), load_engine(read_quantized(dst), exact=True)
    assert dense.out_head.weight is dense.tok_emb.weight and model.head.weight is model.embedding.weight
    assert torch.equal(dense.trf_blocks[1].ff.fc3.weight, source[downs[1]])
    with torch.no_grad():
        want = dense(TOKENS)
    assert (logits_of(model) - want).abs().max() < 1e-4 * want.abs().max()


def test_a_scale_for_each_row_of_four_bits(tmp_path, src):
    """The engine has no such matrix, but groups that are alike."""
    dst = quantize(src, tmp_path / "dst", Scheme(4, 256))  # all widths are below 256: one group a row
    rewritten(dst, lambda tensors: None, strategy="channel", group_size=None)
    dense = load_model(dst)
    with torch.no_grad():
        want = dense(TOKENS)
    model = load_engine(read_quantized(dst), exact=True)
    assert (logits_of(model) - want).abs().max() < 1e-4 * want.abs().max()
    assert model.quantization == "int4"


def test_groups_larger_than_ours(tmp_path):
    said = {**UNTIED, "hidden_size": 512, "intermediate_size": 1024, "head_dim": 16}
    src = write_huggingface(tmp_path / "src", said, tensors_of(make_oracle(said)))
    dst = quantize(src, tmp_path / "dst", Scheme(4, 256))

    def change(tensors):
        for name in [name for name in tensors if name.endswith("_scale")]:
            tensors[name] = tensors[name][:, ::2].contiguous()  # and so other weights

    rewritten(dst, change, group_size=512)
    with torch.no_grad():
        want = load_model(dst)(TOKENS[:, :50])
    got = logits_of(load_engine(read_quantized(dst), exact=True), TOKENS[:, :50])
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_what_only_the_plain_model_can_be_made_of(tmp_path, src):
    """Read to the bit as numbers, and refused by the engine, which has no kernel for it."""

    def integers(tensors):
        """The zeros of compressed-tensors: whole codes, packed from top to bottom."""
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        for name in [name for name in tensors if name.endswith("_scale")]:
            points = torch.arange(tensors[name].numel()).view(tensors[name].shape) % 16 - 8
            tensors[name.replace("_scale", "_zero_point")] = pack_to_int32(points.to(torch.int8), 4, packed_dim=0)

    def halves(tensors):
        for name in [name for name in tensors if name.endswith("_scale")]:
            tensors[name] = (tensors[name].float() * 1.003).half()

    def groups(tensors):
        for name in [name for name in tensors if name.endswith("_scale")]:
            K = int(tensors[name.replace("_scale", "_shape")][1])
            tensors[name] = tensors[name] * torch.arange(1, -(-K // 32) + 1)

    four, eight = Scheme(4, 32), Scheme(8)
    for number, (scheme, change, weights, words) in enumerate((
        (four, integers, {"symmetric": False}, "4 bits in groups of 32, scales in torch.bfloat16, zeros in torch.float32"),
        (four, halves, {}, "scales in torch.float16"),
        (eight, groups, {"strategy": "group", "group_size": 32}, "8 bits in groups of 32"),
    )):  # fmt: skip
        dst = rewritten(quantize(src, tmp_path / str(number), scheme), change, **weights)
        tensors, model = load_file(dst / "model.safetensors"), load_model(dst, dtype=torch.float32)
        name = "model.layers.1.mlp.down_proj.weight"
        want = decoded(tensors, name, scheme.bits, weights.get("group_size", scheme.groupsize))
        if change is integers:
            points = torch.arange(64 * 6).view(64, 6) % 16 - 8
            shift = (points * tensors[f"{name}_scale"].float()).repeat_interleave(32, 1)[:, :176]
            want = want - shift.numpy()
        assert np.array_equal(model.state_dict()["trf_blocks.1.ff.fc3.weight"].numpy(), want), change
        with pytest.raises(CheckpointError, match=words) as error:
            load_engine(read_quantized(dst))
        assert "`llamabook convert`" in str(error.value) and "\n" not in str(error.value)


def test_parts_of_one_product_that_differ(tmp_path, src):
    dst, name = quantize(src, tmp_path / "dst", Scheme(8)), "model.layers.1.self_attn.k_proj.weight"

    def change(tensors):
        tensors[name] = load_file(src / "model.safetensors")[name]
        for ending in ("_packed", "_scale", "_shape"):
            del tensors[name + ending]

    rewritten(dst, change)
    assert torch.equal(load_model(dst).trf_blocks[1].att.W_key.weight, load_file(src / "model.safetensors")[name])
    with pytest.raises(CheckpointError, match="some are quantized and some are not"):
        load_engine(read_quantized(dst))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "place, change, words",
    [
        ((), {"quant_method": "gptq"}, "quant_method gptq"),
        ((), {"quant_method": "bitsandbytes"}, "quant_method bitsandbytes"),
        ((), {"quant_method": "awq"}, "quant_method awq"),
        ((), {"quant_method": None}, "quant_method None"),
        ((), {"format": "int-quantized"}, "format int-quantized"),
        ((), {"quantization_status": "frozen"}, "quantization_status frozen"),
        ((), {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ((), {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ((), {"config_groups": {}}, "config_groups {}"),
        ((), {"config_groups": {"a": {}, "b": {}}}, "config_groups {'a'"),
        ((), {"config_groups": {"a": "W4A16"}}, "config_groups {'a'"),
        ((), {"config_groups": ["W4A16"]}, "config_groups ['W4A16']"),
        (("config_groups", "group_0"), {"weights": None}, "config_groups"),
        (("config_groups", "group_0"), {"format": "marlin-24"}, "format marlin-24"),
        (("config_groups", "group_0"), {"input_activations": {"num_bits": 8}}, "input_activations"),
        (("config_groups", "group_0", "weights"), {"num_bits": 3}, "num_bits 3"),
        (("config_groups", "group_0", "weights"), {"type": "float"}, "type float"),
        (("config_groups", "group_0", "weights"), {"strategy": "block"}, "strategy block"),
        (("config_groups", "group_0", "weights"), {"actorder": "group"}, "actorder group"),
        (("config_groups", "group_0", "weights"), {"group_size": "32"}, "group_size 32"),
        (("config_groups", "group_0", "weights"), {"group_size": 0}, "group_size 0"),
    ],
)
def test_other_forms_are_refused_by_name(tmp_path, src, place, change, words):
    dst = quantize(src, tmp_path / "dst", Scheme(4, 32))
    said = json.loads((dst / "config.json").read_text())
    inner = said["quantization_config"]
    for key in place:
        inner = inner[key]
    inner |= change
    (dst / "config.json").write_text(json.dumps(said))
    message = refused(dst, str(dst / "config.json"), f"quantized weights (quantization_config: {words}", "before quantization")
    for call in (load_config, fast.load):
        with pytest.raises(CheckpointError) as error:
            call(dst)
        assert str(error.value) == message


NAME = "model.layers.1.self_attn.v_proj.weight"


def without(ending):
    return lambda tensors: tensors.pop(NAME + ending)


def put(ending, tensor):
    return lambda tensors: tensors.update({NAME + ending: tensor})


@pytest.mark.parametrize(
    "change, words",
    [
        (without("_scale"), f"lacks {NAME}_scale"),
        (without("_shape"), f"lacks {NAME}_shape"),
        (without("_packed"), f"lacks {NAME}_packed"),
        (put("_packed", torch.zeros(16, 7, dtype=torch.int32)), f"{NAME}_packed is (16, 7) in torch.int32, and its matrix (16, 64)"),
        (put("_packed", torch.zeros(16, 8)), f"{NAME}_packed is (16, 8) in torch.float32"),
        (put("_scale", torch.ones(16, 1, dtype=torch.bfloat16)), f"{NAME}_scale is (16, 1)"),
        (put("_scale", torch.ones(15, 2, dtype=torch.bfloat16)), f"{NAME}_scale is (15, 2)"),
        (put("_scale", torch.ones(16, 2, dtype=torch.int32)), f"{NAME}_scale is (16, 2) in torch.int32"),
        (put("_shape", torch.tensor([16, 63])), f"{NAME} is (16, 63), the configuration wants (16, 64)"),
        (put("_shape", torch.tensor([16, 65])), f"{NAME}_packed is (16, 8) in torch.int32, and its matrix (16, 65)"),
        (put("_shape", torch.tensor([-1, 64])), "and its matrix (-1, 64)"),
        (put("_shape", torch.tensor([10**15, 10**15])), "which do not fit together"),
        (put("_shape", torch.tensor(3)), "which do not fit together"),
        (put("", torch.ones(16, 64)), f"has {NAME} and its codes, one too many"),
        (put("_g_idx", torch.zeros(64, dtype=torch.int32)), f"has {NAME}_g_idx, which Llama has not"),
        (lambda tensors: tensors.pop("model.norm.weight"), "lacks model.norm.weight"),
    ],
)
def test_damaged_tensors_are_named(tmp_path, src, change, words):
    dst = rewritten(quantize(src, tmp_path / "dst", Scheme(4, 32)), change)
    refused(dst, str(dst), words)
    with pytest.raises(CheckpointError):
        fast.load(dst)


def test_a_configuration_alone(tmp_path, src):
    """As a download checks it before it fetches the weights."""
    dst = quantize(src, tmp_path / "dst", Scheme(4, 32))
    want = load_config(dst)
    (dst / "model.safetensors").unlink()
    assert load_config(dst) == check_config(dst / "config.json") == want
    assert check_config(src / "config.json") == load_config(src)


def test_other_damage(tmp_path, src):
    dst = quantize(src, tmp_path / "dst", Scheme(4, 32))
    file, said = dst / "model.safetensors", json.loads((dst / "config.json").read_text())
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(dst, "model.safetensors is damaged or cut off")
    file.write_bytes(whole)
    (dst / "config.json").write_text(json.dumps(said | {"intermediate_size": 100}))
    refused(dst, "model.layers.0.mlp.gate_proj.weight is (176, 64), the configuration wants (100, 64)")
    (dst / "config.json").write_text(json.dumps(said | {"tie_word_embeddings": True}))
    refused(dst, "ties the head, which is quantized", "set tie_word_embeddings to false")
    (dst / "config.json").unlink()
    refused(dst, "config.json does not exist")
    with pytest.raises(InputError, match="is not quantized"):
        read_quantized(src)


def test_sources_that_can_not_be_quantized(tmp_path, src):
    for scheme in ((3,), (4,), (4, 16), (8, 32)):
        with pytest.raises(InputError):
            Scheme(*scheme)
    before = sorted(path.name for path in tmp_path.iterdir())
    tensors = read(src / "model.safetensors")
    for name, value in ((NAME, float("nan")), ("model.embed_tokens.weight", float("inf")), ("model.norm.weight", float("-inf"))):
        bad = {key: tensor.clone() for key, tensor in tensors.items()}
        bad[name].view(-1)[-1] = value
        save(src / "model.safetensors", bad)
        with pytest.raises(CheckpointError, match=f"src: {name} has numbers that are infinite or none") as error:
            quantize(src, tmp_path / "dst", Scheme(4, 32))
        assert "\n" not in str(error.value)
    save(src / "model.safetensors", tensors)
    data = (src / "model.safetensors").read_bytes()
    (src / "model.safetensors").write_bytes(data[:-5])
    with pytest.raises(CheckpointError, match="damaged or cut off"):
        quantize(src, tmp_path / "dst", Scheme(8))
    (src / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="does not exist"):
        quantize(tmp_path / "nowhere", tmp_path / "dst", Scheme(8))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


# ---------------------------------------------------------------- whole or not at all


def test_targets(tmp_path, src, monkeypatch):
    (src / "tokenizer.model").write_text("ranks")
    (src / "generation_config.json").write_text("{}")
    (src / "README.md").write_text("mine")
    dst = quantize(src, tmp_path / "deep" / "dst", Scheme(8))
    assert sorted(tree(dst)) == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.model"]
    said = json.loads((dst / "config.json").read_text())
    assert (said["bos_token_id"], said["eos_token_id"], said["tie_word_embeddings"]) == (1, 2, False)
    before = tree(dst)
    for source, target, words in (
        (src, dst, "holds a checkpoint already: .*--force"),
        (src, src, "itself"),
        (dst, tmp_path / "x", r"dst is quantized already \(int8\): give the checkpoint it was made from"),
    ):
        with pytest.raises(InputError, match=words):
            quantize(source, target, Scheme(4, 32))
    assert tree(dst) == before
    assert quantize(src, dst, Scheme(4, 32), force=True) == dst and tree(dst) != before
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 2**20, 2**20))
    with pytest.raises(InputError, match="GB free: free some"):
        quantize(src, tmp_path / "new", Scheme(8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "src"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), MemoryError])
def test_an_interruption_leaves_nothing(tmp_path, src, error):
    dst = quantize(src, tmp_path / "dst", Scheme(8))
    before = tree(dst)
    for target in (dst, tmp_path / "new"):
        with pytest.raises(error if isinstance(error, type) else OSError):
            with writing(src, target, Scheme(4, 32), force=True) as (_, out):
                out.put("tok_emb.weight", load_model(src).tok_emb.weight.detach())
                raise error
    assert tree(dst) == before and sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


def test_what_was_not_written_is_noticed(tmp_path, src):
    with pytest.raises(LlamaBookError, match="were never written"):
        with writing(src, tmp_path / "dst", Scheme(8)) as (_, out):
            out.put("tok_emb.weight", load_model(src).tok_emb.weight.detach())
    assert not (tmp_path / "dst").exists()


KILLED = """
import sys, time
from llamabook.fast.quantize import files
real, count = files.Writer.put, 0
def slow(self, *arguments):
    global count
    real(self, *arguments)
    count += 1
    if count == 9:
        print("half", flush=True)
        time.sleep(60)
files.Writer.put = slow
files.quantize(sys.argv[1], sys.argv[2], files.Scheme(4, 32), force=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="kills a process")
def test_killed_and_repeated(tmp_path, src):
    dst = quantize(src, tmp_path / "dst", Scheme(8))
    before, want = tree(dst), tree(quantize(src, tmp_path / "want", Scheme(4, 32)))
    paths = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(src), str(dst)], env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert tree(dst) == before and (tmp_path / ".dst.part").exists()
    quantize(src, dst, Scheme(4, 32), force=True)
    assert tree(dst) == want and sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src", "want"]


# ---------------------------------------------------------------- memory

SPARING = """
import sys, torch
from llamabook.bench.worker import Memory
from llamabook.fast.quantize.files import load_engine, quantize, read_quantized
from llamabook.fast.quantize.weight import Scheme
with Memory() as memory:
    memory.begin(torch.device("cpu"))
    quantize(sys.argv[1], sys.argv[2], Scheme(4, 32))
    print(memory.peak_gb())
    model = load_engine(read_quantized(sys.argv[2]), dtype=torch.bfloat16)
    print(memory.peak_gb())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts anonymous pages as Linux does")
def test_memory_does_not_grow_with_the_model(tmp_path):
    said = {**SMALL, "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    with torch.device("meta"):
        from checkpoints import config_of_transformers
        from transformers import LlamaForCausalLM

        shapes = {name: weight.shape for name, weight in LlamaForCausalLM(config_of_transformers(said)).named_parameters()}
    numbers = torch.randn(1_000_003).mul_(0.02).bfloat16()
    tensors = {name: numbers.repeat(-(-shape.numel() // 1_000_003))[: shape.numel()].view(shape) for name, shape in shapes.items()}
    src = write_meta(tmp_path / "src", said | {"torch_dtype": "bfloat16"}, tensors)
    size = sum(path.stat().st_size for path in src.iterdir())
    assert size > 200e6
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", SPARING, str(src), str(tmp_path / "dst")], env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    writing, loading = (float(line) * 1e9 for line in done.stdout.split())
    packed = (tmp_path / "dst" / "model.safetensors").stat().st_size
    assert writing < 0.25 * size, (writing, size)
    assert loading < packed + 60e6, (loading, packed)


# ---------------------------------------------------------------- a safetensors file in pieces


def test_a_file_written_in_pieces_is_what_the_library_reads(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "b": torch.randn(5, 3, generator=generator).bfloat16(), "a": torch.randn(7, generator=generator).half(),
        "c": torch.randint(-9, 9, (4, 3), generator=generator, dtype=torch.int32), "d": torch.tensor([7, 8]),
        "e": torch.randn(1, 1, 3, generator=generator).double(), 'é "': torch.randn(2, 2, generator=generator),
    }  # fmt: skip
    with TensorWriter(tmp_path, {name: tensor.to("meta") for name, tensor in tensors.items()}) as writer:
        for name, tensor in reversed(tensors.items()):
            for first in reversed(range(0, len(tensor), 2)):
                writer.write(name, tensor[first : first + 2], first)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"} and set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    start = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(start[:8], "little")
    places = json.loads(start[8 : 8 + length])
    assert length % 8 == 0
    assert all(places[name]["data_offsets"][0] % tensor.element_size() == 0 for name, tensor in tensors.items())


def test_pieces_that_have_no_place(tmp_path):
    plan = {"a": torch.empty(4, 3, device="meta")}
    for piece, first in ((torch.ones(2, 3), 3), (torch.ones(2, 2), 0), (torch.ones(2, 3).half(), 0), (torch.ones(3), 0)):
        with pytest.raises(LlamaBookError, match="has no place"):
            with TensorWriter(tmp_path, plan) as writer:
                writer.write("a", piece, first)
