"""The benchmark counts what it should, takes turns, survives what dies, and says it all. No speed is asserted."""

import json
import math
import os
import runpy
import statistics
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch
from small_llamas import kernels_first, write_llama3
from torch.utils._python_dispatch import TorchDispatchMode
from torch import nn

from llamabook import llama2, llama3, pocket
from llamabook.bench import job as jobs
from llamabook.bench import micro, report, rotation, texts, worker
from llamabook.bench.job import Job, bytes_per_step, check_modes, config_of, weight_bytes
from llamabook.bench.rotation import BenchError, Process
from llamabook.cli import main
from llamabook.errors import ContextError, InputError
from llamabook.fast import kernels
from llamabook.fast.quantize import packing
from llamabook.llama2 import Llama2Model
from llamabook.llama3 import Llama3Model
from llamabook.tokenizer import load_tokenizer

TINY = {
    **llama3.LLAMA32_CONFIG_1B, "vocab_size": 50, "context_length": 64, "emb_dim": 32, "n_heads": 4, "n_kv_groups": 2,
    "head_dim": 16, "n_layers": 2, "hidden_dim": 48, "rope_freq": None, "dtype": torch.float32,
}  # fmt: skip
JOB = Job(None, "tiny", "cpu", "float32", batch_size=1, prompt_tokens=5, max_new_tokens=6)
ALONE = [mode for mode in jobs.MODES if mode != "speculative"]  # need no draft


@pytest.fixture
def tiny(monkeypatch):
    """A shape `tiny` that can be measured in milliseconds."""
    monkeypatch.setattr(jobs, "shapes", lambda: {"tiny": TINY})


# ---------------------------------------------------------------- what is counted


@pytest.mark.parametrize("name, config", [
    ("1B", llama3.LLAMA32_CONFIG_1B), ("3B", llama3.LLAMA32_CONFIG_3B), ("8B", llama3.LLAMA31_CONFIG_8B),
    ("tiny", TINY), ("Llama 2", llama2.LLAMA2_CONFIG_7B),
])  # fmt: skip
def test_the_weights_of_a_step_are_those_of_the_model(name, config):
    """All parameters, but of an embedding that isn't the head none, by building the model without memory."""
    with torch.device("meta"):
        model = (Llama2Model if name == "Llama 2" else Llama3Model)(config)
    tied = model.out_head.weight is model.tok_emb.weight
    expected = sum(p.nbytes for p in model.parameters()) - (0 if tied else model.tok_emb.weight.nbytes)
    assert weight_bytes({"n_kv_groups": config["n_heads"], **config}) == expected
    assert tied == (name in ("1B", "3B", "tiny"))


@pytest.mark.parametrize("mode, name, precision", [
    ("static", "static", None), ("static_compiled", "static", None), ("static_int8", "static", "int8"),
    ("static_int4_compiled", "static", "int4"), ("static_int4.g128", "static", "int4.g128"), ("regular", "regular", None),
    ("kv_cache_compiled", "kv_cache", None), ("llama.cpp_q8_0", "llama.cpp_q8_0", None),
    ("speculative", "speculative", None), ("speculative_int4.g64_compiled", "speculative", "int4.g64"),
])  # fmt: skip
def test_a_mode_says_how_precise_its_weights_are(mode, name, precision):
    assert jobs.parts_of(mode) == (name, precision)


@pytest.mark.parametrize("mode, bits", [("static_int8", 8), ("static_int4", 4 + 16 / 32), ("static_int4.g64", 4 + 16 / 64)])
def test_few_bits_are_counted_as_they_lie_in_memory(mode, bits, monkeypatch):
    config = TINY | {"emb_dim": 256, "hidden_dim": 512, "n_heads": 16, "vocab_size": 64}
    monkeypatch.setattr(jobs, "shapes", lambda: {"tiny": config})
    matrices = weight_bytes(config) // 4 - (2 * config["n_layers"] + 1) * 256  # numbers, without the norms
    scales = 0 if bits < 8 else 2 * (config["n_layers"] * (16 * 16 + 4 * 16 + 256 + 1024 + 256) + 64)  # one a row
    expected = matrices * bits / 8 + scales + (2 * config["n_layers"] + 1) * 256 * 4
    assert subject(mode).weight_bytes() == expected
    assert subject("static").weight_bytes() == weight_bytes(config)


@pytest.mark.parametrize("mode", ["static", "static_int8", "static_int4_compiled"])
def test_random_codes_make_numbers_of_the_same_size(mode, tiny):
    made = subject(mode)
    for linear in made.linears():
        x = torch.eye(linear.in_features) if mode != "static" else torch.eye(linear.weight.shape[1])
        assert 0.01 < linear(x).std() < 0.03
    assert made.largest().nbytes == max(
        tensor.nbytes for linear in made.linears() for tensor in (*linear.parameters(), *linear.buffers())
    )


def test_what_checking_costs_is_measured_in_steps(tiny):
    made = subject("static", check_tokens=3)
    widths, forward = [], made.model.forward
    made.model.forward = lambda idx, *others: widths.append(idx.shape[1]) or forward(idx, *others)
    found = made.round()
    assert found["check_cost"] > 0 and widths[-2 * worker.CHECKS :] == [1, 3] * worker.CHECKS
    assert "check_cost" not in subject("static").round() and "check_cost" not in subject("kv_cache", check_tokens=3).round()


def test_the_published_numbers():
    assert weight_bytes(llama3.LLAMA32_CONFIG_1B) == 2 * 1_235_814_400
    assert jobs.cache_bytes_per_slot(llama3.LLAMA32_CONFIG_1B) == 32 * 1024
    assert jobs.cache_bytes_per_slot(llama3.LLAMA31_CONFIG_405B) == 2 * 126 * 8 * 128 * 2


def test_the_cache_is_counted_step_by_step():
    job, slot, weights = replace(JOB, batch_size=3), jobs.cache_bytes_per_slot(TINY), weight_bytes(TINY)
    steps = []
    for new in range(1, job.max_new_tokens):  # the first token comes from the prompt, the others from steps
        seen = job.prompt_tokens + new
        steps.append(weights + job.batch_size * (seen + 1) * slot)  # read what is seen, write one
    assert bytes_per_step("static_compiled", job, TINY) == bytes_per_step("kv_cache", job, TINY)
    assert bytes_per_step("static", job, TINY) == statistics.mean(steps)
    assert bytes_per_step("regular", job, TINY) == bytes_per_step("fast_compiled", job, TINY) == weights


@pytest.mark.parametrize("n, low, high", [(1, 1, 1), (2, 1, 2), (5, 1, 5), (9, 2, 8), (20, 6, 15), (30, 11, 20)])
def test_the_interval_of_a_median(n, low, high):
    """Which of n ordered values bound the median with 90 %, from tables of the sign test."""
    values = [value * 7 % 31 for value in range(1, n + 1)]  # in some order
    ordered = sorted(values)
    assert report.median_interval(values) == (ordered[low - 1], ordered[high - 1])
    if n >= 5:
        outside = 2 * sum(math.comb(n, k) for k in range(low)) / 2**n
        assert outside <= 0.1 < 2 * sum(math.comb(n, k) for k in range(low + 1)) / 2**n


# ---------------------------------------------------------------- what is asked for


def test_modes():
    assert check_modes("regular, static_compiled") == ["regular", "static_compiled"]
    assert check_modes("static_int8,static_int4.g64_compiled") == ["static_int8", "static_int4.g64_compiled"]
    assert check_modes("speculative_int8_compiled") == ["speculative_int8_compiled"]
    wrong = ("static_compiled_compiled", "static_int3", "static_int4.g48", "regular_int8", "static_compiled_int8")
    for words in ("", "regular,regular", "slow", "compiled", *wrong):
        with pytest.raises(InputError, match="modes|mode"):
            check_modes(words)


def test_a_job_that_can_not_be(tiny):
    config = config_of(JOB)
    JOB.check(config)
    replace(JOB, prompt_tokens=58).check(config)
    with pytest.raises(ContextError, match="65, the context is 64"):
        replace(JOB, prompt_tokens=59).check(config)
    for change in ({"batch_size": 0}, {"prompt_tokens": 0}, {"max_new_tokens": 1}):
        with pytest.raises(InputError, match=next(iter(change))):
            replace(JOB, **change).check(config)
    with pytest.raises(InputError, match="no shape 'huge'.*tiny"):
        config_of(replace(JOB, shape="huge"))


def test_shapes():
    for shape in (*jobs.shapes(), *(name for name in pocket.names() if "llama" in name)):
        config = config_of(replace(JOB, shape=shape, dtype="bfloat16"))
        assert config["dtype"] is torch.bfloat16 and config["n_kv_groups"] > 0
        with torch.device("meta"):
            Llama3Model(config)


# ---------------------------------------------------------------- one mode


def subject(mode, job=JOB, **changes) -> worker.Subject:
    memory = worker.Memory()
    made = worker.KINDS[jobs.parts_of(mode)[0]](mode, replace(job, **changes), memory)
    memory.done.set()
    return made


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("mode", ALONE)
def test_each_step_is_timed_and_none_is_wasted(mode, batch_size, tiny):
    made = subject(mode, replace(JOB, batch_size=batch_size))
    widths = []
    inner = made.model.forward

    def forward(idx, *args, **kwargs):
        widths.append(idx.shape[1])
        return inner(idx, *args, **kwargs)

    made.model.forward = forward
    times = made.run(6)
    assert len(times) == 7 and times == sorted(times)
    assert widths == ([5, 6, 7, 8, 9, 10] if mode in jobs.UNCACHED else [5, 1, 1, 1, 1, 1])
    measured = made.round()
    assert set(measured) == {"prefill_s", "step_s", "read_gb_per_s", "peak_memory_gb"}
    assert all(value > 0 for value in (measured["prefill_s"], measured["step_s"], *measured["read_gb_per_s"]))


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A Llama 3.2 with random weights, and its tokenizer."""
    return write_llama3(tmp_path_factory.mktemp("small"), 64)


def speculative(folder, mode="speculative", **changes) -> worker.Subject:
    paths = {"checkpoint_path": str(folder), "draft_checkpoint_path": str(folder), "shape": None}
    return subject(mode, **{"speculate_k": 3, **paths, **changes})


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_draft_that_is_the_model_is_always_right(batch_size, small):
    """Twelve tokens: one of the prompt, then 4 a round, of which the last can give but 3."""
    made = speculative(small, batch_size=batch_size, max_new_tokens=12)
    widths, drafted = [], []
    for model, noted in ((made.model, widths), (made.draft, drafted)):
        model.forward = lambda idx, *others, inner=model.forward, noted=noted: noted.append(idx.shape[1]) or inner(idx, *others)
    times = made.run(12)
    assert len(times) == 13 and times == sorted(times)
    assert widths == [5, 4, 4, 4] and drafted == [6, 1, 1, *[2, 1, 1] * 2]
    assert made.done.acceptance > 0.8 and made.done.drafts == {3: 3}  # the last round drafts beyond the text's end


def test_a_draft_is_counted_with_what_it_reads(small):
    """By hand: each pass reads its model's weights once, and in each row the slots so far and the one that is written."""
    made = speculative(small, batch_size=2, max_new_tokens=12)
    found, slots = made.round(), 5 + (1 + 11) / 2
    one = made.weight_bytes() + 2 * (slots + 1) * 2 * 2 * 2 * 8 * 4  # rows; keys and values, layers, groups, head_dim, bytes
    assert found["drafts"] == [(3, 3)]
    assert found["step_bytes"] == pytest.approx((3 + 9) * one / 11)
    assert set(found) > {"acceptance", "mean_accepted", "prefill_s", "step_s", "read_gb_per_s"}


def test_with_a_draft_all_modes_read_the_same_text(small):
    tokenizer = load_tokenizer(small)
    prompts = [speculative(small, mode, batch_size=2, prompt_tokens=20).prompt for mode in ("speculative", "static", "kv_cache")]
    assert all(torch.equal(prompts[0], prompt) for prompt in prompts) and prompts[0].shape == (2, 20)
    assert next(texts.stories()).startswith(tokenizer.decode(prompts[0][0, 1:-3].tolist()))


def test_few_bits_for_the_model_and_not_for_the_draft():
    made = speculative(pocket.path("pocket-draft"), "speculative_int8", dtype="bfloat16")
    assert made.weight_bytes() < 0.55 * weight_bytes(made.config)
    assert {type(linear).__name__ for linear in made.linears()} == {"QuantizedLinear"}
    assert type(made.draft.head).__name__ == "Linear" and made.draft.cfg["dtype"] is torch.bfloat16


def test_all_modes_have_the_same_weights(tiny):
    sizes = {mode: sum(p.nbytes for p in subject(mode).model.parameters()) for mode in ALONE}
    assert set(sizes.values()) == {weight_bytes(TINY)}, "tied, and nothing twice"


def test_a_start_says_what_runs_where(tiny, monkeypatch):
    monkeypatch.setattr(worker.Cached, "packages", ("numpy",))
    start = subject("kv_cache").start()
    assert start["first_token_s"] > 0 and start["compile_s"] == 0 and start["matmul_gflop_per_s"] > 0
    assert start["versions"]["torch"] == torch.__version__ and start["versions"]["numpy"] == version("numpy")
    assert start["machine"]["threads"] == torch.get_num_threads() and start["machine"]["cpu"]
    json.dumps(start)


def test_random_weights_fill_everything():
    model = nn.ModuleList([nn.Linear(1500, 1001), nn.Linear(3, 2), nn.RMSNorm(4)])
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    with torch.no_grad():
        worker.fill(model)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    weight = model[0].weight
    assert 0.015 < weight.std() < 0.025 and not torch.equal(weight[0], weight[1])
    assert (model[2].weight == 1).all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is Linux's")
def test_memory_counts_what_is_held():
    memory = worker.Memory()
    memory.begin(torch.device("cpu"))
    with memory:
        kept = torch.ones(20_000_000)  # 80 MB
        for _ in range(200):
            if memory.peak_gb() > 0.07:
                break
            memory.done.wait(0.01)
    assert 0.07 < memory.peak_gb() < 0.3 and len(kept)


# ---------------------------------------------------------------- processes in turns

TALKER = """
import json, os, sys
order = json.loads(sys.stdin.readline())
print("a library says hello")
print("@@" + json.dumps({"first_token_s": 1.0, "compile_s": 0.5, "versions": {}, "machine": {}, "of": order,
                         "cache": os.environ.get("TORCHINDUCTOR_CACHE_DIR")}), flush=True)
for line in sys.stdin:
    with open(sys.argv[1], "a") as file:
        file.write(order["mode"] + "\\n")
    print("@@" + json.dumps({"prefill_s": 0.5, "step_s": 0.1, "read_gb_per_s": [1.0, 3.0]}), flush=True)
"""


def talker(path, text=TALKER) -> tuple[str, ...]:
    return (sys.executable, "-c", text, str(path))


def test_the_rounds_rotate(tiny, tmp_path):
    turns = tmp_path / "turns"
    peers = {name: talker(turns) for name in "abc"}
    results = rotation.measure([], JOB, TINY, rounds=4, peers=peers)
    assert turns.read_text().split() == list("abc" "bca" "cab" "abc")
    assert [result["mode"] for result in results] == list("abc")
    assert [one["round"] for one in results[1]["rounds"]] == [0, 1, 2, 3]
    assert results[0]["start"]["of"] == {"mode": "a", "job": JOB.as_dict()}


def test_what_does_not_fit_together_comes_in_waves(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(rotation, "free_bytes", lambda device: 2.5 * rotation.OVERHEAD)
    turns = tmp_path / "turns"
    results = rotation.measure([], JOB, TINY, rounds=2, peers={name: talker(turns) for name in "abc"})
    assert turns.read_text().split() == list("abba" "cc") and len(results) == 3
    assert rotation.waves(["a", "b", "c"], JOB, TINY, None) == [["a", "b", "c"]]
    assert rotation.waves(["a", "b"], JOB, TINY, 1.0) == [["a"], ["b"]], "one at a time, if need be"


def test_a_compiled_mode_starts_cold_and_then_warm(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(rotation, "WORKER", talker(tmp_path / "turns"))
    (result,) = rotation.measure(["static_compiled"], JOB, TINY, rounds=1)
    assert result["cold"]["cache"] == result["start"]["cache"] and "llamabook-bench-" in result["cold"]["cache"]
    assert not os.path.exists(result["cold"]["cache"])


@pytest.mark.parametrize("text, words", [
    ("import sys; sys.exit('out of luck')", "code 1: out of luck"),
    ("print('hello')", "code 0: it said nothing"),
])  # fmt: skip
def test_a_process_that_dies_is_one_line(text, words, tmp_path):
    with pytest.raises(BenchError, match=words), Process("a", JOB, talker(tmp_path, text)) as process:
        process.answer()


def test_no_process_is_left_when_one_dies(tiny, tmp_path):
    peers = {"a": talker(tmp_path / "turns"), "b": talker(tmp_path, "raise SystemExit(3)")}
    with pytest.raises(BenchError, match="b ended with code 3"):
        rotation.measure([], JOB, TINY, rounds=1, peers=peers)


# ---------------------------------------------------------------- guests

PEERS = Path(__file__).parents[1] / "tools" / "peers"
LLAMA_CPP = PEERS / "llama_cpp_generate.py"


def test_a_guest_without_its_program_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", ModuleType("gguf"))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # as if it weren't installed
    with pytest.raises(SystemExit, match=r"^llama_cpp is not installed: pip install .*llama-cpp-python"):
        runpy.run_path(str(LLAMA_CPP))


class Calls(TorchDispatchMode):
    """Notes the names of all operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", [None, "int8", "int4"])
def test_the_guest_on_torchs_operators_calls_none_of_ours(precision, tiny, monkeypatch):
    for name in ("linear", "decode_attention", "takes_layer"):
        monkeypatch.setattr(kernels, name, getattr(kernels, name))  # given back after this test
    monkeypatch.setattr(packing.Blocks, "takes", packing.Blocks.takes)
    called, stock = {}, runpy.run_path(str(PEERS / "stock_torch.py"))["Stock"]
    stock.asked = precision
    for kind in (worker.Static, stock):
        memory = worker.Memory()
        made = kind(f"static_{precision}" if precision else "static", JOB, memory)
        memory.done.set()
        with Calls() as calls:
            made.run(3)
        called[kind.__name__] = {name for name in calls.names if name.startswith("llamabook::")}
    assert not called["Stock"] and bool(called["Static"]) == kernels.ready()


@pytest.mark.parametrize("config", [TINY, llama3.LLAMA32_CONFIG_1B, llama3.LLAMA31_CONFIG_8B, llama2.LLAMA2_CONFIG_7B])
def test_a_guest_has_the_weights_of_our_model(config, monkeypatch):
    for name in ("gguf", "llama_cpp"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    config = {"n_kv_groups": config["n_heads"], **config}
    found = runpy.run_path(str(LLAMA_CPP))["tensors"](config)
    with torch.device("meta"):
        ours = (Llama3Model if "rope_freq" in config else Llama2Model)(config)
    assert sorted(found.values()) == sorted(tuple(parameter.shape) for parameter in ours.parameters())


# ---------------------------------------------------------------- what is reported


def rows(**speeds):
    results = [
        {
            "mode": mode, "cold": None,
            "start": {"first_token_s": 0.5, "compile_s": 0.0, "versions": {}, "machine": {}, "matmul_gflop_per_s": 9.0},
            "rounds": [
                {"round": n, "prefill_s": 0.1, "step_s": 1 / speed, "read_gb_per_s": [0.01, 0.03], "peak_memory_gb": n}
                for n, speed in enumerate(values)
            ],
        }
        for mode, values in speeds.items()
    ]  # fmt: skip
    return report.rows_of(results, JOB, TINY, "2026-01-01")


def test_a_row():
    row, _ = rows(static=[10, 30, 20], regular=[1, 2, 3])
    assert (row["tokens_per_s"], row["tokens_per_s_min"], row["tokens_per_s_max"]) == pytest.approx((20, 10, 30))
    assert row["prefill_tokens_per_s"] == pytest.approx(50)
    assert row["gb_per_s"] == pytest.approx(20 * bytes_per_step("static", JOB, TINY) / 1e9)
    assert row["read_bandwidth_gb_per_s"] == pytest.approx(0.02)
    assert row["share_of_bandwidth"] == pytest.approx(row["gb_per_s"] / 0.02)
    assert row["peak_memory_gb"] == 2 and len(row["rounds"]) == 3
    wanted = {
        "mode", "tokens_per_s", "prefill_tokens_per_s", "first_token_s", "compile_s", "bytes_per_token", "gb_per_s",
        "read_bandwidth_gb_per_s", "share_of_bandwidth", "peak_memory_gb", "versions", "machine",
    }  # fmt: skip
    assert wanted <= set(row)


def test_rows_with_a_draft():
    both = rows(regular=[10, 10, 10], static=[10, 30, 20], speculative=[20, 30, 60], speculative_int8=[1, 1, 1])
    step = bytes_per_step("static", JOB, TINY)
    results = [
        {"mode": mode, "cold": None, "start": {"first_token_s": 0.5, "compile_s": 0.0, "versions": {}, "machine": {}},
         "rounds": [{"round": n, "prefill_s": 0.1, "step_s": 1 / speed, "read_gb_per_s": [1.0, 1.0], **more} for n, speed in enumerate(speeds)]}
        for mode, speeds, more in (
            ("static", [10, 30, 20], {}),
            ("speculative", [20, 30, 60], {"step_bytes": 5e8, "drafts": [(0, 1), (3, 4)], "acceptance": 0.75, "mean_accepted": 1.5}),
            ("speculative_int8", [10, 10, 10], {"step_bytes": 4e8, "drafts": [(0, 5)]}),
        )
    ]  # fmt: skip
    static, drafted, silent = found = report.rows_of(results, JOB, TINY, "2026-01-01")
    assert static["bytes_per_token"] == step and drafted["bytes_per_token"] == 5e8 and silent["bytes_per_token"] == 4e8
    assert drafted["gb_per_s"] == pytest.approx(15) and drafted["share_of_bandwidth"] == pytest.approx(15)
    assert drafted["drafts"] == [(0, 3), (3, 12)] and drafted["acceptance"] == 0.75 and "acceptance" not in silent
    head, *lines = report.table(found).splitlines()
    assert head.split()[-5:] == ["times", "static", "right", "kept", "k"]
    assert [line.split()[-4:] for line in lines] == [["-"] * 4, ["(1.00-3.00)", "75%", "1.50", "3"], ["-", "-", "-", "0"]]
    assert "times static" not in report.table(both[:2])
    assert [bar.get_width() for bar in report.draw(found).axes[0].patches] == pytest.approx([20, 30, 10])


def test_ratios_are_those_of_the_same_round():
    both = rows(static=[10, 30, 20], regular=[5, 10, 20])
    assert report.paired(both, "static", "regular") == pytest.approx((2, 1, 3))


def test_the_table_the_file_and_the_figure(tmp_path):
    both = rows(regular=[5, 10, 20], static=[10, 30, 20])
    head, *lines = report.table(both).splitlines()
    assert [line.split()[0] for line in lines] == ["regular", "static"] and "2.00 (1.00-3.00)" in lines[1]
    path = tmp_path / "folder" / "speed.json"
    report.write_json(both, path)
    assert json.loads(path.read_text()) == both
    axes = report.draw(both).axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([10, 20])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["regular", "static"]


def test_kernels_alone(capsys):
    found = micro.measure(rounds=1, size=2**20)
    assert {(row["what"], row["by"]) for row in found} == {(a, b) for a in ("linear", "attention") for b in ("torch", "ours")}
    assert [row["rows"] for row in found if row.get("rows") and row["by"] == "ours"] == list(micro.ROWS)
    assert all(row["gb_per_s"] > 0 and row["read_bandwidth_gb_per_s"] > 0 for row in found)
    assert len(micro.table(found).splitlines()) == 1 + len(found)


# ---------------------------------------------------------------- the command

TARGET = ["--checkpoint_path", str(pocket.path("pocket-llama3.2"))]
DRAFT = ["--draft_checkpoint_path", str(pocket.path("pocket-draft"))]


def in_this_process(modes, job, *others):
    """What `rotation.measure` gives, of one round."""
    made = {mode: subject(mode, job) for mode in modes}
    found = [{"mode": mode, "cold": None, "start": of.start(), "rounds": [{"round": 0, **of.round()}]} for mode, of in made.items()]
    return json.loads(json.dumps(found))


def test_with_a_draft_the_command_compares_static_and_speculative(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rotation, "measure", in_this_process)
    output = tmp_path / "speed.json"
    code = main([
        "bench", *TARGET, *DRAFT, "--device", "cpu", "--rounds", "1", "--prompt_tokens", "8", "--max_new_tokens", "9",
        "--dtype", "float32", "--speculate_k", "2", "--output", str(output),
    ])  # fmt: skip
    out, err = capsys.readouterr()
    assert (code, err) == (0, ""), err
    assert [line.split()[0] for line in out.splitlines()] == ["mode", "static", "speculative"]
    static, drafted = json.loads(output.read_text())
    assert set(static) <= set(drafted) and "acceptance" not in static
    assert drafted["acceptance"] > 0 and [k for k, _ in drafted["drafts"]] == [2] and drafted["draft_checkpoint_path"] == DRAFT[1]


def test_the_command_measures_prints_and_writes(tmp_path, capsys):
    """The smallest embedded model, in processes of its own: loading them is what takes the time."""
    output = tmp_path / "speed.json"
    shape = min(pocket.names(), key=lambda name: "llama" not in name)
    code = main([
        "bench", "--shape", shape, "--modes", "kv_cache,static", "--device", "cpu", "--rounds", "1",
        "--prompt_tokens", "4", "--max_new_tokens", "4", "--output", str(output),
    ])  # fmt: skip
    out, err = capsys.readouterr()
    assert (code, err) == (0, ""), err
    assert [line.split()[0] for line in out.splitlines()] == ["mode", "kv_cache", "static"]
    found = json.loads(output.read_text())
    assert [row["mode"] for row in found] == ["kv_cache", "static"]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags, words", [
    (["--modes", "slow"], "there is no mode 'slow'"),
    (["--rounds", "0"], "--rounds is 0"),
    (["--output", "speed.txt"], "ends in .json"),
    (["--shape", "huge"], "there is no shape 'huge'"),
    (["--shape", "llama3.2-1b", "--checkpoint_path", "x"], "give one of them"),
    (["--shape", "llama3.2-1b", "--prompt_tokens", "131072"], "the context is 131072"),
    (["--peer", "other"], "NAME=COMMAND"),
    (["--dtype", "int7"], "--dtype is 'int7'"),
    (["--checkpoint_path", "no/such/folder"], "no/such/folder"),
    (["--modes", "speculative"], "speculative needs a draft: give --draft_checkpoint_path"),
    (["--modes", ""], "--modes is ''"),
    (["--speculate_k", "3"], "--speculate_k is for a draft"),
    (["--draft_checkpoint_path", "x"], "give --checkpoint_path"),
    ([*TARGET, "--draft_checkpoint_path", "no/such/draft"], "no/such/draft does not exist"),
    ([*TARGET, "--draft_checkpoint_path", str(pocket.path("pocket-llama2"))], "the draft's tokenizer gives other ids"),
    ([*TARGET, *DRAFT, "--modes", "static"], "is for the speculative modes"),
    ([*TARGET, *DRAFT, "--speculate_k", "0"], "--speculate_k is 0"),
    ([*TARGET, *DRAFT, "--modes", "speculative_int3"], "there is no mode 'speculative_int3'"),
])  # fmt: skip
def test_a_mistake_is_one_line(flags, words, capsys):
    assert main(["bench", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err
