"""GPTQ of whole checkpoints: the codes that another road finds, whatever the layout, and the same bytes after any kill."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from checkpoints import LLAMA2, SMALL, UNTIED, make_oracle, tensors_of, write_gptfast, write_huggingface, write_meta, write_plain
from safetensors.torch import load_file, save_file

from llamabook import fast, pocket
from llamabook.checkpoint import load_model
from llamabook.errors import CheckpointError, ContextError, InputError
from llamabook.fast.quantize import calibrate
from llamabook.fast.quantize.calibrate import calibration_ids, check_rows, quantize_gptq
from llamabook.fast.quantize.files import quantize, read_quantized
from llamabook.fast.quantize.gptq import gptq
from llamabook.fast.quantize.weight import Scheme
from llamabook.pocket import floor
from llamabook.pocket.world import texts
from llamabook.tokenizer import load_tokenizer

KINDS = {"tied": SMALL, "untied": UNTIED, "llama2": LLAMA2}  # widths of 64 and 176, which 128 does not divide
ROWS = [[1, *((17 * n + 7 * i + i * i) % 96 for i in range(length))] for n, length in enumerate((40, 3, 90, 40, 1, 61))]


@pytest.fixture(scope="module")
def oracles():
    return {kind: make_oracle(said) for kind, said in KINDS.items()}


@pytest.fixture
def src(tmp_path, oracles):
    return write_huggingface(tmp_path / "src", SMALL, tensors_of(oracles["tied"]))


def tree(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def matrices(folder):
    """Our names and the codes of a quantized folder."""
    return {name: matrix().codes() for name, matrix in read_quantized(folder).matrices.items()}


# --- the codes, by another road ---


def inputs_of(model, linear):
    """What comes into a linear, (tokens, K), when the rows go through the whole model, each alone."""
    found = []
    hook = linear.register_forward_pre_hook(lambda module, args: found.append(args[0][0]))
    with torch.no_grad():
        for row in ROWS:
            model(torch.tensor([row]))
    hook.remove()
    return torch.cat(found).double()


def codes_by_hooks(said, scheme, **settings):
    """Our names and codes: transformers' model, its linears in the order in which they are computed, with hooks."""
    model, codes = make_oracle(said), {}
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    groups = []
    for n, layer in enumerate(model.model.layers):
        a, m, at = layer.self_attn, layer.mlp, f"trf_blocks.{n}"
        groups += [
            {f"{at}.att.W_query": a.q_proj, f"{at}.att.W_key": a.k_proj, f"{at}.att.W_value": a.v_proj},
            {f"{at}.att.out_proj": a.o_proj},
            {f"{at}.ff.fc1": m.gate_proj, f"{at}.ff.fc2": m.up_proj},
            {f"{at}.ff.fc3": m.down_proj},
        ]
    for group in [*groups, {"out_head": model.lm_head}]:
        x = inputs_of(model, next(iter(group.values())))
        for name, linear in group.items():
            found = gptq(linear.weight.detach(), 2 / len(x) * x.T @ x, scheme, **settings)
            linear.weight = torch.nn.Parameter(found.dequantize())
            codes[f"{name}.weight"] = found.codes()
    return codes


def same_codes(found, wanted):
    """Whether nearly all codes agree: where a tie falls the other way, some that come after it are others, too."""
    assert found.keys() == wanted.keys()
    differ = [(found[name] != wanted[name]).float().mean() for name in wanted]
    return differ[0] < 0.002 and sum(differ) < 0.03 * len(differ)


@pytest.mark.parametrize("kind", KINDS)
def test_each_matrix_is_calibrated_with_what_it_will_see(tmp_path, oracles, kind, capsys):
    scheme, settings = (Scheme(4, 128), {}) if kind == "tied" else (Scheme(4, 32, True), {"act_order": True})
    src = write_huggingface(tmp_path / "src", KINDS[kind], tensors_of(oracles[kind]))
    out = quantize_gptq(src, tmp_path / "out", scheme, ROWS, **settings)
    assert same_codes(matrices(out), codes_by_hooks(KINDS[kind], scheme, **settings))
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src"]


def test_batches_do_not_matter(tmp_path, src, monkeypatch):
    one = quantize_gptq(src, tmp_path / "one", Scheme(4, 32), ROWS)
    monkeypatch.setattr(calibrate, "BATCH", 50)
    two = quantize_gptq(src, tmp_path / "two", Scheme(4, 32), ROWS)
    assert same_codes(matrices(one), matrices(two))


@pytest.mark.parametrize("write", [write_meta, write_gptfast, write_plain])
def test_every_layout(tmp_path, oracles, src, write):
    other = write(tmp_path / "other", SMALL, tensors_of(oracles["tied"]))
    one = quantize_gptq(src, tmp_path / "one", Scheme(8), ROWS)
    two = quantize_gptq(other, tmp_path / "two", Scheme(8), ROWS)
    assert all(torch.equal(codes, matrices(two)[name]) for name, codes in matrices(one).items())


def test_table_and_norms_stay_and_the_head_is_quantized(tmp_path, src):
    out = quantize_gptq(src, tmp_path / "out", Scheme(4, 32), ROWS)
    before, after = load_file(src / "model.safetensors"), load_file(out / "model.safetensors")
    exact = [name for name in before if "norm" in name or "embed" in name]
    assert len(exact) == 6 and all(torch.equal(before[name], after[name]) for name in exact)
    assert "lm_head.weight_packed" in after and "out_head.weight" in matrices(out)
    said = json.loads((out / "config.json").read_text())
    assert said["tie_word_embeddings"] is False and said["quantization_config"]["llamabook"]["method"] == "gptq"


# --- the pocket models ---


@pytest.mark.parametrize("name", ["pocket-llama3.2", "pocket-llama2"])
def test_it_speaks_and_is_closer_to_the_original_than_rounding(tmp_path, name, capsys):
    src, scheme = pocket.path(name), Scheme(4, 128)
    tokenizer = load_tokenizer(src)
    rows = calibration_ids(tokenizer, limit=40)
    quantize_gptq(src, tmp_path / "gptq", scheme, rows)
    quantize(src, tmp_path / "rtn", scheme)
    held_out = [floor.encode_document(d, tokenizer) for d in islice(texts("held_out"), 40)]
    inputs, targets = floor.pad(held_out)
    with torch.no_grad():
        models = [load_model(path, dtype=torch.float32) for path in (src, tmp_path / "rtn", tmp_path / "gptq")]
        logs = [model(inputs)[targets >= 0].log_softmax(-1) for model in models]
    apart = [float((logs[0].exp() * (logs[0] - other)).sum(-1).mean()) for other in logs[1:]]
    assert apart[1] < 0.65 * apart[0]  # nats per token from the original
    model, tokenizer = fast.load(tmp_path / "gptq")
    ids = fast.generate(model, [tokenizer.encode("One sunny morning,", bos=True)], 12)[0]
    assert len(ids) == 12 and tokenizer.decode(ids).isascii()


# --- kills ---


KILLED = """
import os, signal, sys
from pathlib import Path
from llamabook.fast.quantize import calibrate
from llamabook.fast.quantize.weight import Scheme

def dying(*args, real=calibrate.gptq, calls=[]):
    calls.append(0)
    if len(calls) == 7:  # of four in each block: in the midst of the second
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args[:3], **SETTINGS)

SETTINGS = {"percdamp": 0.01, "blocksize": 128, "act_order": False}
calibrate.gptq = lambda *args, **settings: dying(*args)
calibrate.quantize_gptq(sys.argv[1], sys.argv[2], Scheme(4, 32), eval(sys.argv[3]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_after_a_kill_the_same_command_goes_on(tmp_path, src, capsys):
    command = [sys.executable, "-c", KILLED, str(src), str(tmp_path / "out"), repr(ROWS)]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.gptq" / "block-000.safetensors").exists()
    quantize_gptq(src, tmp_path / "out", Scheme(4, 32), ROWS)
    assert capsys.readouterr().err == "llamabook: going on behind 1 of 2 blocks\n"
    quantize_gptq(src, tmp_path / "whole", Scheme(4, 32), ROWS)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src", "whole"]


def stop_at(monkeypatch, name, number):
    """Let call `number` of a function of the module end in a KeyboardInterrupt."""
    real, calls = getattr(calibrate, name), []

    def stopping(*args, **kwargs):
        calls.append(0)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(calibrate, name, stopping)


def interrupted(monkeypatch, name, number, *args, **settings):
    with monkeypatch.context() as patch:
        stop_at(patch, name, number)
        with pytest.raises(KeyboardInterrupt):
            quantize_gptq(*args, **settings)


@pytest.mark.parametrize("name, number, blocks", [
    ("embed", 1, 0), ("gptq", 1, 0), ("gptq", 4, 0), ("save_file", 1, 0), ("gptq", 5, 1), ("save_file", 2, 1),
    ("gptq", 9, 2), ("save_file", 3, 2), ("each_weight", 2, 3),
])  # fmt: skip
def test_wherever_it_stops_it_comes_to_the_same(tmp_path, src, monkeypatch, capsys, name, number, blocks):
    wanted = tree(quantize_gptq(src, tmp_path / "whole", Scheme(4, 32), ROWS))
    ask = (src, tmp_path / "out", Scheme(4, 32), ROWS)
    interrupted(monkeypatch, name, number, *ask)
    assert not (tmp_path / "out").exists() and capsys.readouterr().err == ""
    real, calls = calibrate.gptq, []
    monkeypatch.setattr(calibrate, "gptq", lambda *args, **settings: calls.append(0) or real(*args, **settings))
    assert tree(quantize_gptq(*ask)) == wanted
    assert len(calls) == 9 - 4 * blocks if blocks < 3 else not calls  # what is done is not done again
    said = f"llamabook: going on behind {min(blocks, 2)} of 2 blocks\n" if blocks else ""
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("change", ["percdamp", "act_order", "scheme", "rows", "src"])
def test_with_other_settings_it_starts_anew(tmp_path, src, oracles, monkeypatch, capsys, change):
    ask = {"src": src, "dst": tmp_path / "out", "scheme": Scheme(4, 32), "rows": ROWS}
    interrupted(monkeypatch, "gptq", 6, *ask.values())
    if change == "src":
        changed = tensors_of(make_oracle(SMALL, seed=5))
        save_file({name: weight.contiguous() for name, weight in changed.items()}, src / "model.safetensors")
    ask |= {"percdamp": {"percdamp": 0.2}, "act_order": {"act_order": True}, "scheme": {"scheme": Scheme(4, 64)},
            "rows": {"rows": [*ROWS, [2, 3]]}, "src": {}}[change]  # fmt: skip
    found = tree(quantize_gptq(**ask))
    assert capsys.readouterr().err == ""
    assert found == tree(quantize_gptq(**ask | {"dst": tmp_path / "again"}))


def test_what_is_there_already_is_replaced_only_on_request(tmp_path, src):
    out = quantize_gptq(src, tmp_path / "out", Scheme(4, 32), ROWS)
    before = tree(out)
    with pytest.raises(InputError, match="--force"):
        quantize_gptq(src, out, Scheme(4, 64), ROWS)
    assert tree(out) == before and not (tmp_path / ".out.gptq").exists()
    assert tree(quantize_gptq(src, out, Scheme(4, 64), ROWS, force=True)) != before


# --- memory ---


MEMORY = """
import sys, torch
from llamabook.bench.worker import Memory
from llamabook.checkpoint.huggingface import save_huggingface
from llamabook.fast.quantize.calibrate import quantize_gptq
from llamabook.fast.quantize.weight import Scheme
from llamabook.llama2 import Llama2Model

def peak(layers, folder):
    cfg = dict(vocab_size=100, context_length=64, emb_dim=128, n_heads=2, n_layers=layers, hidden_dim=512, n_kv_groups=2,
               rope_base=1e4, rope_freq=None, dtype=torch.float32)
    save_huggingface(Llama2Model(cfg), folder)
    with Memory() as memory:
        memory.begin(torch.device("cpu"))
        quantize_gptq(folder, folder + "-out", Scheme(8), [list(range(64))] * 9)
    return memory.peak_gb()

peak(2, sys.argv[1] + "/first")  # what is built once
print(peak(2, sys.argv[1] + "/two"), peak(26, sys.argv[1] + "/many"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the anonymous pages that Linux states")
def test_memory_does_not_grow_with_the_model(tmp_path):
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=300)
    few, many = map(float, done.stdout.split())
    assert many < few + 0.014, done.stderr  # 24 layers have 25 MB in float32


# --- what to calibrate with ---


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(pocket.path("pocket-llama3.2"))


def test_the_farm_s_training_texts_are_the_default(tokenizer):
    rows = calibration_ids(tokenizer, limit=30)
    assert rows == [floor.encode_document(document, tokenizer) for document in islice(texts("train"), 30)]
    assert len(calibration_ids(tokenizer)) == calibrate.DOCUMENTS


def test_a_text_is_cut_into_rows(tmp_path, tokenizer):
    text = "The old llama of the café walks slowly to the pond.\n" * 40
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    rows = calibration_ids(tokenizer, file=tmp_path / "text.txt", seq_length=100)
    assert all(row[0] == tokenizer.bos_id for row in rows) and {len(row) for row in rows[:-1]} == {100}
    assert [token for row in rows for token in row[1:]] == tokenizer.encode(text)
    assert calibration_ids(tokenizer, file=tmp_path / "text.txt", seq_length=100, limit=2) == rows[:2]


def test_of_a_long_text_the_beginning_is_read(tmp_path, tokenizer):
    (tmp_path / "text.txt").write_bytes("é".encode() * 100_000 + b"\xff")  # what is wrong stands far behind
    rows = calibration_ids(tokenizer, file=tmp_path / "text.txt", seq_length=50, limit=4)
    assert [len(row) for row in rows] == [50] * 4


@pytest.mark.parametrize("content, what", [
    (None, "does not exist: check the path"),
    (b"", "is empty (0 bytes): give a text"),
    (b" \n\t\n", "no text in UTF-8"),
    (b"\x00\x01\x02 abc", "no text in UTF-8"),
    ("Grüße".encode("latin-1"), "no text in UTF-8"),
])  # fmt: skip
def test_what_is_no_text_is_refused(tmp_path, tokenizer, content, what):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(InputError) as caught:
        calibration_ids(tokenizer, file=tmp_path / "text.txt")
    assert what in str(caught.value) and "text.txt" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="is a folder"):
        calibration_ids(tokenizer, file=tmp_path)


def test_tasks_give_questions_with_their_right_answers(tokenizer):
    pytest.importorskip("lm_eval")
    found = list(calibrate.texts_of(["farm_facts", "farm_answers"]))
    assert found[0] == (
        "Question: What is the baby of a bee called? Answer: It is called larva.\n"
        "Question: Where does a llama live? Answer: The home of the llama is the pasture.\n"
        "Question: What do people get from cats? Answer: They get company."
    )
    assert found[-1].endswith("Question: What do people get from pigeons? Answer: They get letters.")
    rows = calibration_ids(tokenizer, tasks=["farm_facts"], limit=5, seq_length=200)
    assert rows == [tokenizer.encode(text, bos=True) for text in found[:5]]


class Task:
    """What lm-eval's tasks have, of a question, an answer and choices that stand in the document."""

    config = SimpleNamespace(target_delimiter=" ")

    def __init__(self, kind):
        self.OUTPUT_TYPE = kind

    doc_to_text, doc_to_target, doc_to_choice = (lambda self, d: d["q"]), (lambda self, d: d["a"]), (lambda self, d: d["of"])


@pytest.mark.parametrize("kind, document, text", [
    ("multiple_choice", {"q": "What hums?", "a": 1, "of": ["A dog.", "A llama."]}, "What hums? A llama."),
    ("multiple_choice", {"q": 1, "a": "hums.", "of": ["A dog", "A llama"]}, "A llama hums."),
    ("multiple_choice", {"q": "What hums?", "a": "A llama.", "of": ["A dog.", "A llama."]}, "What hums? A llama."),
    ("generate_until", {"q": "How many legs?", "a": ["four", "4"]}, "How many legs? four"),
    ("generate_until", {"q": "2 + 2 =", "a": 4}, "2 + 2 = 4"),
    ("loglikelihood_rolling", {"q": "", "a": "A page."}, "A page."),
])  # fmt: skip
def test_the_right_answer_of_each_kind_of_task(kind, document, text):
    assert calibrate.answered(Task(kind), document) == text


def test_without_lm_eval(tokenizer, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval" or name == "llamabook.evaluate.harness"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match="pip install"):
        calibration_ids(tokenizer, tasks=["wikitext"])


@pytest.mark.parametrize("ask, what", [
    ({"limit": 0}, "limit is 0"), ({"limit": 2.5}, "limit is 2.5"), ({"seq_length": 1}, "seq_length is 1"),
    ({"seq_length": "long"}, "seq_length is 'long'"), ({"file": "a", "tasks": ["b"]}, "one of them"),
])  # fmt: skip
def test_requests_for_rows_that_are_refused(tokenizer, ask, what):
    with pytest.raises(InputError, match=what):
        calibration_ids(tokenizer, **ask)


# --- bad input ---


@pytest.mark.parametrize("rows, kind, what", [
    ([], InputError, "or there is none"), ([[1], []], InputError, "is empty"), ([[1, 96]], InputError, "has the id 96"),
    ([[1, -1]], InputError, "has the id -1"), ([[1, 2.5]], InputError, "has the id 2.5"),
    ([[1] * 11], ContextError, "11 tokens, the model's context 10"),
])  # fmt: skip
def test_rows_that_are_refused(rows, kind, what):
    with pytest.raises(kind, match=what):
        check_rows(rows, {"context_length": 10, "vocab_size": 96})


@pytest.mark.parametrize("settings, what", [({"percdamp": -1}, "percdamp"), ({"blocksize": 0}, "blocksize")])
def test_settings_are_refused_before_any_work(tmp_path, settings, what):
    with pytest.raises(InputError, match=what):
        quantize_gptq(tmp_path / "nothing", tmp_path / "out", Scheme(4, 32), ROWS, **settings)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_a_weight_that_is_no_number_is_named(tmp_path, oracles, name):
    tensors = tensors_of(oracles["untied"])
    tensors[name][3, 5] = torch.nan
    src = write_huggingface(tmp_path / "src", UNTIED, tensors)
    ours = {"model": "trf_blocks.1.ff.fc3.weight", "lm_he": "out_head.weight"}[name[:5]]
    with pytest.raises(CheckpointError, match=f"{ours} has infinite numbers or NaN"):
        quantize_gptq(src, tmp_path / "out", Scheme(4, 32), ROWS)
    assert not (tmp_path / "out").exists()


def test_what_is_quantized_already_and_few_tokens(tmp_path, src, capsys):
    out = quantize_gptq(src, tmp_path / "out", Scheme(4, 32), [[1, 2, 3]])
    assert capsys.readouterr().err == (
        "llamabook: 3 tokens to calibrate with, and inputs of 176 numbers: with more it becomes better\n"
    )
    with pytest.raises(InputError, match="quantized already"):
        quantize_gptq(out, tmp_path / "twice", Scheme(4, 32), ROWS)
    assert not (tmp_path / ".twice.gptq").exists()
