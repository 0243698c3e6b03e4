"""`llamabook quantize`, and what generate and chat make of its folders: texts, sizes, and one line for every mistake."""

import io
import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from small_llamas import kernels_first, shown, write_llama2, write_llama3  # noqa: F401

from llamabook import pocket
from llamabook.checkpoint import load_model
from llamabook.cli import main
from llamabook.cli.quantize import beside
from llamabook.fast import engine
from llamabook.fast.quantize.files import quantize, read_quantized
from llamabook.fast.quantize.weight import Scheme
from llamabook.generate import generate
from llamabook.tokenizer import load_tokenizer


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(capsys):
    """Call the command line; gives (exit code, stdout, stderr)."""

    def call(*words):
        return main(list(map(str, words))), *capsys.readouterr()

    return call


def one_line(result, *words):
    code, out, err = result
    assert (code, out) == (2, "") and err.endswith("\n") and err.count("\n") == 1, result
    assert all(word in err for word in words), err


def greedy(folder: Path, prompt: str, n: int) -> str:
    """The text by another road: the plain model of the numbers that the codes mean, without a cache."""
    tokenizer, model = load_tokenizer(folder), load_model(folder, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(prompt, bos=True)])
    return shown(tokenizer, generate(model, ids, n, 256, eos_id=tokenizer.stop_tokens)[0].tolist())


# ---------------------------------------------------------------- what it writes, and what becomes of that


@pytest.mark.parametrize("name", ["pocket-llama3.2", "pocket-llama2"])
@pytest.mark.parametrize("flags, label", [(["--mode", "int8"], "int8"), (["--mode=int4"], "int4.g32"),
                                          (["--mode", "int4", "--groupsize", 128, "--asymmetric"], "int4.g128")])  # fmt: skip
def test_from_a_checkpoint_to_a_text(here, cli, name, flags, label):
    code, out, err = cli("quantize", "--checkpoint_path", pocket.path(name), "--output", here / "small", *flags)
    assert (code, err) == (0, "")
    weights = 2 * sum(weight.numel() for weight in load_model(pocket.path(name)).parameters())
    written, sizes, following = out.splitlines()
    assert written == f"Written to {here / 'small'}: config.json, model.safetensors, tokenizer.model"
    now = (here / "small" / "model.safetensors").stat().st_size
    assert sizes.startswith(f"{label}: {weights / 1e6:.1f} MB of weights before, {now / 1e6:.1f} MB now; ")
    assert following == f"Next: python -m llamabook generate --checkpoint_path {here / 'small'}"
    flags = ["--temperature", 0, "--dtype", "float32", "--exact_activations", "--max_new_tokens", 40]
    for prompt in ("One sunny morning,", "What do llamas eat?"):
        code, out, err = cli("generate", "--checkpoint_path", here / "small", "--prompt", prompt, *flags)
        assert (code, out) == (0, greedy(here / "small", prompt, 40) + "\n")
        assert "Bandwidth achieved" in err


@pytest.mark.parametrize("scheme, bits", [(Scheme(8), 8), (Scheme(4, 32), 4.5), (Scheme(4, 256), 4.0625), (Scheme(4, 32, True), 5)])
def test_bits_of_a_weight(here, cli, scheme, bits):
    flags = ["--mode", "int8"] if scheme.bits == 8 else ["--mode", "int4", "--groupsize", scheme.groupsize]
    out = cli("quantize", *flags, *["--asymmetric"] * scheme.asymmetric)[1]
    said = float(re.search(r"([\d.]+) bits for each quantized weight", out)[1])
    rows = 16 / 256 if scheme.bits == 8 else 0  # a scale for 256 to 512 columns
    assert bits - 0.01 < said <= bits + rows + 0.005


def test_names(here, cli):
    """Beside the checkpoint; for an embedded one, or where nothing can be written, here."""
    for flags, ending in (
        ([], "int8"), (["--mode", "int4"], "int4.g32"), (["--mode", "int4", "--groupsize", 64], "int4.g64")
    ):  # fmt: skip
        assert cli("quantize", *flags)[1].startswith(f"Written to pocket-llama3.2-{ending}: ")
        assert (here / f"pocket-llama3.2-{ending}" / "model.safetensors").exists()
    place = write_llama3(here / "models" / "mine", 64)
    assert cli("quantize", "--checkpoint_path", place)[1].startswith(f"Written to {here / 'models' / 'mine-int8'}: ")
    (here / "elsewhere").mkdir()
    os.chdir(place)
    assert cli("quantize", "--checkpoint_path", ".", "--mode", "int4")[0] == 0
    assert (here / "models" / "mine-int4.g32").is_dir()


def test_where_a_folder_goes(tmp_path, monkeypatch):
    folder = tmp_path / "org" / "Llama-3.2-1B"
    folder.mkdir(parents=True)
    for file in ("model.pth", "consolidated.00.pth", "model.safetensors", "llama3.2-1B-instruct.pth"):
        (folder / file).write_bytes(b"")
    beside_it = folder.parent / "Llama-3.2-1B-int8"
    for file in ("", "model.pth", "consolidated.00.pth", "model.safetensors"):
        assert beside(folder / file, "int8", False) == beside_it
    assert beside(folder / "llama3.2-1B-instruct.pth", "int8", False) == folder / "llama3.2-1B-instruct-int8"
    assert beside(folder, "int8", True) == Path("Llama-3.2-1B-int8")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder.parent)
    assert beside(folder, "int8", False) == Path("Llama-3.2-1B-int8")


def test_generate_and_chat_round_unless_told_otherwise(here, cli, monkeypatch):
    small, seen = quantize(pocket.path("pocket-llama3.2-instruct"), here / "small", Scheme(4, 32)), []
    real = engine.load_engine

    def load(stored, device, dtype, exact):
        seen.append(exact)
        return real(stored, device, dtype, exact)

    monkeypatch.setattr(engine, "load_engine", load)
    words = ["--checkpoint_path", small, "--temperature", 0, "--max_new_tokens", 5]
    for exact in (False, True):
        flags = ["--exact_activations"] * exact
        assert cli("generate", *words, *flags)[0] == 0
        monkeypatch.setattr(sys, "stdin", io.StringIO("What do llamas eat?\n"))
        code, out, _ = cli("chat", *words, *flags)
        assert code == 0 and out.startswith("Llamas")
    assert seen == [False, False, True, True]
    assert cli("generate", "--exact_activations", "--max_new_tokens", 2)[0] == 0  # of no effect without codes


def test_force(here, cli):
    assert cli("quantize")[0] == 0
    before = (here / "pocket-llama3.2-int8" / "model.safetensors").stat().st_mtime_ns
    one_line(cli("quantize"), "pocket-llama3.2-int8 holds a checkpoint already", "--force")
    assert cli("quantize", "--force")[0] == 0
    assert (here / "pocket-llama3.2-int8" / "model.safetensors").stat().st_mtime_ns > before


# ---------------------------------------------------------------- GPTQ


@pytest.fixture
def gptq(monkeypatch):
    """In place of GPTQ: notes what it is asked for, and rounds."""
    seen = {}

    def calibration_ids(tokenizer, **arguments):
        seen["ids"] = arguments
        return [tokenizer.encode("A llama", bos=True)]

    def quantize_gptq(src, dst, scheme, texts, **arguments):
        seen["gptq"] = {"texts": texts, "scheme": scheme, **arguments}
        return quantize(src, dst, scheme, force=arguments["force"])

    module = types.SimpleNamespace(calibration_ids=calibration_ids, quantize_gptq=quantize_gptq)
    monkeypatch.setitem(sys.modules, "llamabook.fast.quantize.calibrate", module)
    return seen


def test_gptq_gets_what_was_said_and_no_more(here, cli, gptq):
    assert cli("quantize", "--mode", "int4-gptq")[1].startswith("Written to pocket-llama3.2-int4-gptq.g32: ")
    texts = [load_tokenizer(pocket.path("pocket-llama3.2")).encode("A llama", bos=True)]
    assert gptq == {"ids": {}, "gptq": {"texts": texts, "scheme": Scheme(4, 32), "force": False}}
    flags = ["--groupsize", 64, "--asymmetric", "--calibration_file", "text.txt", "--calibration_limit", 3, "--force"]
    flags += ["--calibration_seq_length", 100, "--percdamp", 0.02, "--blocksize", 64, "--act_order"]
    out = cli("quantize", "--mode", "int4-gptq", "--checkpoint_path", pocket.path("pocket-llama2"), "--output", "two", *flags)[1]
    assert out.startswith("Written to two: ")
    assert gptq["ids"] == {"file": Path("text.txt"), "limit": 3, "seq_length": 100}
    assert {key: value for key, value in gptq["gptq"].items() if key != "texts"} == {
        "scheme": Scheme(4, 64, True), "percdamp": 0.02, "blocksize": 64, "act_order": True, "force": True,
    }  # fmt: skip
    assert cli("quantize", "--mode", "int4-gptq", "--output", "three", "--calibration_tasks", "a", "b,c")[0] == 0
    assert gptq["ids"] == {"tasks": ["a", "b", "c"]}


# ---------------------------------------------------------------- one line for every mistake


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--mode", "int3"], ["--mode is 'int3': give int8, int4 or int4-gptq"]),
        (["--mode"], ["--mode"]),
        (["--mode", "--force"], ["--mode", "needs a value"]),
        (["--mode", "int4", "--groupsize", "48"], ["the group size is 48: give one of 32, 64, 128, 256"]),
        (["--mode", "int4", "--groupsize", "many"], ["groupsize"]),
        (["--groupsize", "32"], ["--groupsize belongs to --mode int4 and int4-gptq"]),
        (["--mode", "int8", "--asymmetric"], ["--asymmetric belongs to --mode int4 and int4-gptq"]),
        (["--mode", "int4", "--percdamp", "0.1"], ["--percdamp belongs to --mode int4-gptq: leave it out"]),
        (["--mode", "int8", "--act_order"], ["--act_order belongs to --mode int4-gptq"]),
        (["--mode", "int4", "--calibration_limit", "3"], ["--calibration_limit belongs to --mode int4-gptq"]),
        (["--mode", "int4", "--calibration_file", "x"], ["--calibration_file belongs to --mode int4-gptq"]),
        (["--mode", "int4-gptq", "--calibration_file", "x", "--calibration_tasks", "y"], ["give one of them"]),
        (["--checkpoint_path", "nowhere"], ["nowhere does not exist"]),
        (["--output", "file"], ["file is a file: give a folder to write"]),
        (["--output", "full"], ["full holds notes.txt, which is no part of a checkpoint"]),
        (["more"], ["unexpected extra argument"]),
    ],
)
def test_mistakes(here, cli, flags, words):
    (here / "file").write_text("")
    (here / "full").mkdir()
    (here / "full" / "notes.txt").write_text("")
    before = sorted(here.rglob("*"))
    one_line(cli("quantize", *flags), *words)
    assert sorted(here.rglob("*")) == before


def test_files_that_can_not_be_used(here, cli):
    place = write_llama2(here / "mine", 64)
    assert cli("quantize", "--checkpoint_path", place, "--mode", "int4")[0] == 0
    small = here / "mine-int4.g32"
    one_line(cli("quantize", "--checkpoint_path", small), "mine-int4.g32 is quantized already (int4.g32)")
    data = (small / "model.safetensors").read_bytes()
    (small / "model.safetensors").write_bytes(data[:-9])
    one_line(cli("generate", "--checkpoint_path", small), "model.safetensors is damaged or cut off")
    file = place / "consolidated.00.pth"
    file.write_bytes(file.read_bytes()[:-9])
    one_line(cli("quantize", "--checkpoint_path", place), "damaged or cut off")
    assert sorted(path.name for path in here.iterdir()) == ["mine", "mine-int4.g32"]


def test_convert_gives_the_plain_numbers_back(here, cli):
    cli("quantize", "--mode", "int4")
    code, out, _ = cli("convert", "pocket-llama3.2-int4.g32", "dense", "--dtype", "float32")
    assert code == 0 and out.startswith("Written to dense: config.json, model.safetensors, tokenizer.model")
    stored, model = read_quantized("pocket-llama3.2-int4.g32"), load_model("dense")
    name = "trf_blocks.2.ff.fc1.weight"
    assert torch.equal(model.state_dict()[name], stored.matrices[name]().dequantize())
