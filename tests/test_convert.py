"""convert: the same bits in every layout, whole or not at all, and never over what it should not touch."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from checkpoints import (
    LLAMA2,
    SMALL,
    UNTIED,
    agrees,
    gptfast_tensors,
    make_oracle,
    meta_tensors,
    tensors_of,
    write_gptfast,
    write_huggingface,
    write_meta,
    write_plain,
)

from llamabook.checkpoint import convert as module
from llamabook.checkpoint import load_config, load_model
from llamabook.checkpoint.convert import LAYOUTS, convert
from llamabook.checkpoint.llama3_meta import to_llama3_params
from llamabook.cli import main
from llamabook.errors import CheckpointError, InputError
from llamabook.llama3 import LLAMA31_CONFIG_8B, LLAMA32_CONFIG_1B

SOURCES = {"huggingface": write_huggingface, "meta": write_meta, "gptfast": write_gptfast, "plain": write_plain}
KINDS = {"tied": SMALL, "untied": UNTIED, "llama2": LLAMA2}
UNUSUAL = {  # what Meta's own files have no word for
    **UNTIED, "max_position_embeddings": 1024, "hidden_size": 48, "head_dim": 16,
    "rope_scaling": {
        "factor": 5.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0, "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def oracles():
    return {kind: make_oracle(said) for kind, said in KINDS.items()}


def same(one, other) -> bool:
    """Whether two models have the same configuration and the same bits."""
    weights, others = one.state_dict(), other.state_dict()
    return one.cfg == other.cfg and all(torch.equal(weight, others[name]) for name, weight in weights.items())


def tree(folder: Path) -> dict:
    """Every file below a folder, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_around_through_all_layouts(tmp_path, oracles, kind, dtype):
    source = write_huggingface(tmp_path / "0", KINDS[kind], tensors_of(oracles[kind], dtype))
    first = load_model(source)
    for number, layout in enumerate(("gptfast", "meta", "gptfast", "huggingface", "meta", "huggingface"), start=1):
        source = convert(source, tmp_path / str(number), layout=layout)
        assert same(load_model(source), first)
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(number) for number in range(7)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", SOURCES)
def test_from_every_layout_to_every_other(tmp_path, oracles, source, layout):
    src = SOURCES[source](tmp_path / "src", SMALL, tensors_of(oracles["tied"]))
    before = tree(src)
    dst = convert(str(src), str(tmp_path / "deep" / "dst"), layout=layout)
    assert same(load_model(dst), load_model(src)) and agrees(load_model(dst), oracles["tied"])
    assert tree(src) == before


def test_what_is_written_is_what_the_others_would_write(tmp_path, oracles):
    for kind in KINDS:
        tensors = tensors_of(oracles[kind])
        src = write_huggingface(tmp_path / kind, KINDS[kind], tensors)
        for layout, file, make in (
            ("gptfast", "model.pth", gptfast_tensors), ("meta", "consolidated.00.pth", meta_tensors)
        ):  # fmt: skip
            path = convert(src, tmp_path / f"{kind} {layout}", layout=layout) / file
            got, want = torch.load(path, weights_only=True), make(KINDS[kind], tensors)
            assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
            held = sum(weight.nbytes for weight in load_model(src).parameters())
            assert os.path.getsize(path) < held * 1.02 + 20_000  # a tied head is stored once, no view is saved whole


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unusual_configurations_survive(tmp_path, layout):
    said = {**UNUSUAL, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
    oracle = make_oracle(said)
    src = write_huggingface(tmp_path / "src", said, tensors_of(oracle))
    dst = convert(src, tmp_path / "dst", layout=layout)
    assert same(load_model(dst), load_model(src)) and agrees(load_model(dst), oracle)


def test_transformers_reads_what_we_write(tmp_path, oracles):
    from transformers import AutoModelForCausalLM

    for kind, oracle in oracles.items():
        src = write_meta(tmp_path / f"{kind} src", KINDS[kind], tensors_of(oracle))
        again = AutoModelForCausalLM.from_pretrained(convert(src, tmp_path / kind))
        assert agrees(lambda tokens, again=again: again(tokens).logits, oracle)


def test_dtype(tmp_path, oracles):
    src = write_huggingface(tmp_path / "src", SMALL, tensors_of(oracles["tied"]))
    dst = convert(src, tmp_path / "dst", layout="gptfast", dtype=torch.bfloat16)
    assert load_config(dst)["dtype"] == torch.bfloat16 == load_model(dst).tok_emb.weight.dtype


def test_metas_parameters_say_as_little_as_theirs():
    assert to_llama3_params(LLAMA31_CONFIG_8B) == {
        "dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 128256, "norm_eps": 1e-5, "multiple_of": 256,
        "ffn_dim_multiplier": 1.3, "n_kv_heads": 8, "rope_theta": 500000.0, "use_scaled_rope": True,
    }  # fmt: skip
    small = to_llama3_params(LLAMA32_CONFIG_1B)  # its factor of 32 is known by the tie
    assert small.keys() - {"ffn_dim_multiplier"} == to_llama3_params(LLAMA31_CONFIG_8B).keys() - {"ffn_dim_multiplier"}


# ---------------------------------------------------------------- what goes along


def test_the_tokenizer_goes_along(tmp_path, oracles):
    src = write_huggingface(tmp_path / "src", SMALL, tensors_of(oracles["tied"]))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md", "secret.env"):
        (src / name).write_text("{}")
    dst = convert(src, tmp_path / "dst")
    wanted = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in dst.iterdir()) == wanted
    said = json.loads((dst / "config.json").read_text())
    assert (said["bos_token_id"], said["eos_token_id"]) == (1, 2)


def test_the_tokenizer_is_found_where_the_publishers_put_it(tmp_path, oracles):
    tensors = tensors_of(oracles["tied"])
    one = write_huggingface(tmp_path / "one", SMALL, tensors)
    (one / "original").mkdir()
    (one / "original" / "tokenizer.model").write_text("ranks")
    two = write_meta(tmp_path / "two" / "llama-2-7b", SMALL, tensors)
    (tmp_path / "two" / "tokenizer.model").write_text("pieces")
    assert (convert(one, tmp_path / "a") / "tokenizer.model").read_text() == "ranks"
    assert (convert(two, tmp_path / "b") / "tokenizer.model").read_text() == "pieces"


def test_the_embedded_tokenizers_ids(tmp_path):
    from llamabook import pocket

    dst = convert(pocket.path("pocket-llama2"), tmp_path / "dst")
    said = json.loads((dst / "config.json").read_text())
    assert (said["bos_token_id"], said["eos_token_id"]) == (1, 2)
    assert (dst / "tokenizer.model").read_bytes() == (pocket.path("pocket-llama2") / "tokenizer.model").read_bytes()


# ---------------------------------------------------------------- whole or not at all


@pytest.fixture
def src(tmp_path, oracles):
    return write_huggingface(tmp_path / "src", SMALL, tensors_of(oracles["tied"]))


@pytest.fixture
def dst(tmp_path, src):
    """A folder that holds another checkpoint already."""
    return write_meta(tmp_path / "dst", LLAMA2, tensors_of(make_oracle(LLAMA2, seed=5)))


def test_no_overwriting_without_force(src, dst):
    before = tree(dst)
    with pytest.raises(InputError, match="holds a checkpoint already: .*--force"):
        convert(src, dst)
    assert tree(dst) == before
    convert(src, dst, force=True)
    assert same(load_model(dst), load_model(src)) and "params.json" not in tree(dst)
    assert sorted(path.name for path in dst.parent.iterdir()) == ["dst", "src"]


def test_an_empty_folder_is_free(tmp_path, src):
    (tmp_path / "dst").mkdir()
    assert same(load_model(convert(src, tmp_path / "dst")), load_model(src))


@pytest.mark.parametrize("name", ["notes.txt", "thesis.tex", "photos"])
@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_checkpoint_is_never_replaced(tmp_path, src, name, force):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / name).mkdir() if name == "photos" else (tmp_path / "dst" / name).write_text("mine")
    with pytest.raises(InputError, match=f"holds {name}, which is no part of a checkpoint"):
        convert(src, tmp_path / "dst", force=force)
    assert (tmp_path / "dst" / name).exists()


def test_a_checkpoint_with_something_beside_it_stays(src, dst):
    (dst / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="thesis.tex"):
        convert(src, dst, force=True)


def test_targets_that_can_not_be(tmp_path, src):
    (tmp_path / "file").write_text("")
    for dst, words in ((src, "itself"), (tmp_path, "itself"), (tmp_path / "file", "is a file")):
        with pytest.raises(InputError, match=words):
            convert(src, dst, force=True)
    with pytest.raises(InputError, match="layout is 'ggml': choose one of huggingface, meta, gptfast"):
        convert(src, tmp_path / "dst", layout="ggml")
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "dst")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "src"]


def test_too_little_room(tmp_path, src, dst, monkeypatch):
    usage, before = namedtuple("usage", "total used free"), tree(dst)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 2**20, 2**20))
    for target in (dst, tmp_path / "new" / "folder"):
        with pytest.raises(InputError, match=r"needs 0.00 GB, and its disk has 0.00 GB free: free some"):
            convert(src, target, force=True)
    assert tree(dst) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), MemoryError])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, src, dst, monkeypatch, layout, error):
    before = tree(tmp_path)
    saver = {"huggingface": "save_huggingface", "meta": "save_llama3_meta", "gptfast": "save_gptfast"}[layout]
    real = getattr(module, saver)

    def stopped(model, folder, **arguments):
        real(model, folder, **arguments)
        raise error

    monkeypatch.setattr(module, saver, stopped)
    for target in (dst, tmp_path / "new"):
        with pytest.raises(error if isinstance(error, type) else OSError):
            convert(src, target, layout=layout, force=True)
    assert tree(tmp_path) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("moment", [1, 2])
def test_stopped_while_renaming(tmp_path, src, dst, monkeypatch, moment):
    before, calls, real = tree(dst), [], Path.rename

    def rename(self, target):
        calls.append(self)
        if len(calls) == moment:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        convert(src, dst, force=True)
    assert tree(dst) == before and sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


def test_what_a_killed_conversion_left_is_cleared(tmp_path, src, dst):
    before = load_model(dst).state_dict()
    before = {name: weight.clone() for name, weight in before.items()}
    dst.rename(tmp_path / ".dst.old")  # killed between the two renames
    (tmp_path / ".dst.part").mkdir()
    (tmp_path / ".dst.part" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="holds a checkpoint already"):
        convert(src, dst)
    assert all(torch.equal(weight, before[name]) for name, weight in load_model(dst).state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


KILLED = """
import sys, time
from llamabook.checkpoint import convert as module
real = module.save_huggingface
def slow(model, folder, **arguments):
    real(model, folder, **arguments)
    print("written", flush=True)
    time.sleep(60)
module.save_huggingface = slow
module.convert(sys.argv[1], sys.argv[2], force=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="kills a process")
def test_killed_and_repeated(tmp_path, src, dst):
    before = tree(dst)
    paths = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", KILLED, str(src), str(dst)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert tree(dst) == before
    convert(src, dst, force=True)
    assert same(load_model(dst), load_model(src)) and sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


# ---------------------------------------------------------------- on the command line


def test_the_command(tmp_path, src, capsys):
    dst = tmp_path / "dst"
    assert main(["convert", str(src), str(dst), "--layout", "gptfast", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.startswith(f"Written to {dst}: config.json, model.pth (0.")
    for arguments, words in (
        ([str(src), str(dst)], "holds a checkpoint already"),
        ([str(src), str(tmp_path / "x"), "--layout", "gguf"], "choose one of huggingface, meta, gptfast"),
        ([str(src), str(tmp_path / "x"), "--dtype", "int8"], "--dtype is 'int8'"),
        ([str(tmp_path / "nowhere"), str(tmp_path / "x")], "does not exist"),
        ([str(src)], "missing argument"),
    ):
        assert main(["convert", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert main(["convert", str(src), str(dst), "--force"]) == 0
    assert same(load_model(dst), load_model(src))
