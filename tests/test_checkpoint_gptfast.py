"""gpt-fast's model.pth and the plain .pth by our own names: loaded to transformers' logits, written back, refused."""

import json

import pytest
import torch
from checkpoints import (
    LLAMA2,
    SMALL,
    UNTIED,
    agrees,
    gptfast_tensors,
    make_oracle,
    meta_params,
    meta_tensors,
    plain_tensors,
    refused,
    tensors_of,
    write_gptfast,
    write_plain,
)

from llamabook import llama2
from llamabook.checkpoint import gptfast, load_config, load_model
from llamabook.checkpoint.gptfast import load_gptfast, save_gptfast
from llamabook.checkpoint.plain import load_plain
from llamabook.llama3 import Llama3Model, Llama3ModelFast

# The draft model that gpt-fast's forks speculate with: multi-head, four layers, here a quarter as wide.
DRAFT = {
    **LLAMA2, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 12, "num_key_value_heads": 12,
    "intermediate_size": 768,
}  # fmt: skip
KINDS = {"tied": SMALL, "untied": UNTIED, "llama2": LLAMA2, "draft": DRAFT}


@pytest.fixture(scope="module")
def oracles():
    return {kind: make_oracle(said) for kind, said in KINDS.items()}


# ---------------------------------------------------------------- gpt-fast


@pytest.mark.parametrize("kind", KINDS)
def test_same_logits_as_transformers(tmp_path, oracles, kind):
    folder = write_gptfast(tmp_path, KINDS[kind], tensors_of(oracles[kind]))
    for path in (folder, folder / "model.pth", str(folder / "model.pth")):
        model = load_model(path)
        assert agrees(model, oracles[kind])
    assert agrees(load_gptfast(folder), oracles[kind])
    assert (model.out_head.weight is model.tok_emb.weight) == (kind == "tied")


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_metas_params_beside_it(tmp_path, oracles, kind):
    folder = write_gptfast(tmp_path, KINDS[kind], tensors_of(oracles[kind]))
    want = load_config(folder)
    (folder / "config.json").unlink()
    refused(folder, "holds weights but no configuration", "config.json beside it", "config=")
    (folder / "params.json").write_text(json.dumps(meta_params(KINDS[kind])))
    assert load_config(folder) == want and agrees(load_model(folder), oracles[kind])


def test_unfused_and_other_names_for_the_file(tmp_path, oracles):
    folder = write_gptfast(tmp_path, UNTIED, tensors_of(oracles["untied"]))
    torch.save(meta_tensors(UNTIED, tensors_of(oracles["untied"])), folder / "model.pth")
    (folder / "model.pth").rename(folder / "draft.pt")
    assert agrees(load_model(folder), oracles["untied"])


def test_no_tensor_is_a_view(tmp_path, oracles):
    model = load_model(write_gptfast(tmp_path, UNTIED, tensors_of(oracles["untied"])))
    for name, weight in model.state_dict().items():
        assert weight.untyped_storage().nbytes() == weight.nbytes, name


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_again(tmp_path, oracles, kind):
    said, tensors = KINDS[kind], tensors_of(oracles[kind])
    model = load_model(write_gptfast(tmp_path / "old", said, tensors))
    save_gptfast(model, tmp_path / "new", metadata={"eos_token_id": 7})
    again = load_model(tmp_path / "new")
    assert again.cfg == model.cfg
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
    got, want = torch.load(tmp_path / "new" / "model.pth", weights_only=True), gptfast_tensors(said, tensors)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["eos_token_id"] == 7


def test_codes_without_scales_are_refused(tmp_path, oracles):
    folder, tensors = tmp_path, gptfast_tensors(UNTIED, tensors_of(oracles["untied"]))
    write_gptfast(folder, UNTIED, tensors_of(oracles["untied"]))
    tensors["output.weight"] = tensors["output.weight"].to(torch.int8)
    torch.save(tensors, folder / "model.pth")
    refused(folder, "output.weight is torch.int8", "before quantization")


@pytest.mark.parametrize(
    "shape, words", [((95, 64), "wqkv.weight is (95, 64)"), ((64, 64), "wqkv.weight is (64, 64)"), ((96,), "is (96,)")]
)
def test_a_wqkv_of_no_sense(tmp_path, oracles, shape, words):
    tensors = gptfast_tensors(UNTIED, tensors_of(oracles["untied"]))
    write_gptfast(tmp_path, UNTIED, tensors_of(oracles["untied"]))
    torch.save(tensors | {"layers.1.attention.wqkv.weight": torch.ones(shape)}, tmp_path / "model.pth")
    refused(tmp_path, words, "no queries, keys and values")


def test_a_wqkv_of_another_model(tmp_path, oracles):
    tensors = gptfast_tensors(UNTIED, tensors_of(oracles["untied"]))
    write_gptfast(tmp_path, UNTIED, tensors_of(oracles["untied"]))
    torch.save(tensors | {"layers.1.attention.wqkv.weight": torch.ones(128, 64)}, tmp_path / "model.pth")
    refused(tmp_path, "layers.1.attention.wk.weight is (32, 64)", "wants (16, 64)")


def exchanged(where, tensors):
    parts = SPLIT(where, tensors)
    return {name.replace("wk.", "w?.").replace("wv.", "wk.").replace("w?.", "wv."): w for name, w in parts.items()}


SPLIT = gptfast.split_fused
MUTANTS = {  # name: (what is patched in checkpoint/gptfast.py, how)
    "not permuted": ("interleaved_to_half_split", lambda weight, heads: weight),
    "permuted the wrong way": ("interleaved_to_half_split", llama2.half_split_to_interleaved),
    "keys permuted over the query heads": ("rotated_heads", lambda name, cfg: 8 * ("W_query" in name or "W_key" in name)),
    "only queries permuted": ("rotated_heads", lambda name, cfg: 8 * ("W_query" in name)),
    "values permuted, too": ("rotated_heads", lambda name, cfg: {"W_qu": 8, "W_ke": 2, "W_va": 2}.get(name[17:21], 0)),
    "values before keys": ("split_fused", exchanged),
}


@pytest.mark.parametrize("name", [None, *MUTANTS])
def test_a_wrong_loader_is_noticed(tmp_path, monkeypatch, oracles, name):
    folder = write_gptfast(tmp_path, UNTIED, tensors_of(oracles["untied"]))
    if name is not None:
        monkeypatch.setattr(gptfast, *MUTANTS[name])
    assert agrees(load_gptfast(folder), oracles["untied"]) == (name is None)


# ---------------------------------------------------------------- our own names


@pytest.mark.parametrize("kind", KINDS)
def test_plain_files(tmp_path, oracles, kind):
    folder = write_plain(tmp_path, KINDS[kind], tensors_of(oracles[kind]))
    for path in (folder, folder / "llama3-small.pth"):
        model = load_model(path)
        assert agrees(model, oracles[kind])
    config = load_config(folder)
    (folder / "config.json").unlink()
    refused(folder, "holds weights but no configuration: put the model's config.json beside it, or give config=")
    assert agrees(load_plain(folder / "llama3-small.pth", config=config), oracles[kind])


def test_a_plain_file_in_our_own_keys(tmp_path, oracles):
    folder = write_plain(tmp_path, SMALL, tensors_of(oracles["tied"]))
    config = load_config(folder)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    assert load_config(folder) == config and agrees(load_model(folder), oracles["tied"])


def test_stored_tables_are_passed_over(tmp_path, oracles):
    tensors = plain_tensors(SMALL, tensors_of(oracles["tied"]))
    extra = {"cos": torch.ones(3, 8), "sin": torch.ones(3, 8), "mask": torch.ones(3, 3, dtype=torch.bool)}
    extra |= {f"trf_blocks.{n}.att.{name}": table for n in range(2) for name, table in list(extra.items())}
    head = {"out_head.weight": tensors["tok_emb.weight"].clone()}
    write_plain(tmp_path, SMALL, tensors_of(oracles["tied"]))
    torch.save(tensors | extra | head, tmp_path / "llama3-small.pth")
    model = load_model(tmp_path)
    assert agrees(model, oracles["tied"]) and model.out_head.weight is model.tok_emb.weight
    assert load_config(tmp_path)["dtype"] == torch.float32
    torch.save(tensors | {"trf_blocks.0.att.q_norm.weight": torch.ones(8)}, tmp_path / "llama3-small.pth")
    refused(tmp_path, "has trf_blocks.0.att.q_norm.weight, which Llama has not")


def test_a_file_for_load_state_dict_and_load_model_alike(tmp_path, oracles):
    config = load_config(write_plain(tmp_path, SMALL, tensors_of(oracles["tied"])))
    for model_class in (Llama3Model, Llama3ModelFast):
        model = model_class(config)
        model.load_state_dict(torch.load(tmp_path / "llama3-small.pth", weights_only=True))
        assert agrees(model, oracles["tied"])
