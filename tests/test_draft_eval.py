"""The draft laboratory: what it counts, what it foretells, what it refuses. No speed is asserted."""

import json
import math
import statistics
from collections import Counter

import pytest
import torch
from small_llamas import kernels_first, random_weights, write_llama2, write_llama3

from llamabook import fast, llama3, pocket
from llamabook.bench import draft_report, texts, worker
from llamabook.bench.draft import ADAPTIVE, PLAIN, Lab, Run, costs, least_alpha, measure, one_round, turns
from llamabook.checkpoint.huggingface import save_huggingface
from llamabook.cli import main
from llamabook.cli.draft_eval import numbers
from llamabook.errors import InputError, LlamaBookError
from llamabook.fast import Statistics
from llamabook.fast.model import from_llama
from llamabook.llama3 import Llama3Model
from llamabook.pocket import world
from llamabook.tokenizer import load_tokenizer

TINY = {
    **llama3.LLAMA32_CONFIG_1B, "vocab_size": 50, "context_length": 256, "emb_dim": 32, "n_heads": 4, "n_kv_groups": 2,
    "head_dim": 16, "n_layers": 2, "hidden_dim": 48, "rope_freq": None, "dtype": torch.float32,
}  # fmt: skip
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7], [9, 3]]
POCKET = ["--checkpoint_path", str(pocket.path("pocket-llama3.2")), "--draft_checkpoint_path", str(pocket.path("pocket-draft"))]


def model(seed=0, **changes):
    """A random model of the tiny shape, on the engine."""
    return from_llama(random_weights(Llama3Model(TINY | changes), seed=seed))


def noisy(seed=5, much=0.3):
    """The model of seed 0 with a little noise, so that it is right now and then."""
    draft, generator = model(), torch.Generator().manual_seed(seed)
    for parameter in draft.parameters():
        if parameter.dim() == 2:
            parameter += much * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return draft


# ---------------------------------------------------------------- what is asked for


@pytest.mark.parametrize("words, found", [
    ("1,2,4", [1, 2, 4]), ("1..8", list(range(1, 9))), ("3", [3]), ("1..3, 8", [1, 2, 3, 8]), ("8,1", [8, 1]), ("5..5", [5]),
])  # fmt: skip
def test_lists_and_ranges(words, found):
    assert numbers("batch_size", words) == found


@pytest.mark.parametrize("words", ["", ",", "0", "1,", "a", "-1", "1.5", "0..3", "4..2", "1...3", "1..", "1,1", "1..3,2", "1..99999999"])
def test_lists_that_are_none(words):
    with pytest.raises(InputError, match="^--speculate_k is "):
        numbers("speculate_k", words)


# ---------------------------------------------------------------- the formula, by hand


@pytest.mark.parametrize("k, c, v", [(1, 0.1, 1.2), (2, 0.05, 1.3), (2, 0.5, 1.9), (1, 0.9, 1.09)])
def test_the_least_acceptance_solves_the_formula(k, c, v):
    price = k * c + v
    by_hand = price - 1 if k == 1 else (-1 + math.sqrt(1 + 4 * (price - 1))) / 2  # 1 + a (+ a^2) = price
    assert least_alpha(k, c, v) == pytest.approx(by_hand, abs=1e-9)


def test_what_never_pays_and_what_always_does():
    assert least_alpha(4, 1.0, 1.0) is None  # five tokens at the price of five, at best
    assert least_alpha(4, 1.0, 0.99) == pytest.approx(1, abs=0.01)
    assert least_alpha(2, 0.01, 0.9) == pytest.approx(0)


def test_a_draft_that_pays_is_foretold_from_costs():
    rows = [{"speculate_k": k, "check_s": 0.01, "check_cost": 1.0, "needs_alpha": need} for k, need in ((1, 0.625), (2, 0.5), (3, None))]
    batch = {"batch_size": 4, "costs": {"plain_step_s": 0.02, "draft_step_s": 0.002, "draft_cost": 0.1, "rows": rows}}
    said = draft_report.foretold(batch)
    assert "Batch 4" in said and "plain 20.00 ms" in said and "right 50 % of the time to pay, at k = 2" in said and "3: never" in said
    for row in rows:
        row["needs_alpha"] = None
    assert draft_report.foretold(batch).endswith("No draft that costs so much pays, however often it is right.")


# ---------------------------------------------------------------- turns


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_everyone_has_a_turn_beside_a_plain_one(count):
    contenders, firsts = [*range(1, count), ADAPTIVE], []
    for number in range(count):
        order = turns(contenders, number)
        assert order[0] == order[-1] == PLAIN
        assert Counter(k for k in order if k != PLAIN) == Counter(contenders)
        at = [place for place, k in enumerate(order) if k == PLAIN]
        assert all(b - a in (2, 3) for a, b in zip(at, at[1:]))
        firsts.append(order[1])
    assert firsts == contenders  # each begins once


def run_of(token_s: float, k=PLAIN, rows=2) -> Run:
    """Ten plain rounds at this speed."""
    return Run(k, 10, 10 * token_s, Statistics(), Statistics(), [[0] * 12] * rows)


def test_each_is_compared_with_the_plain_ones_around_it():
    seconds = iter([1.0, 5.0, 6.0, 2.0, 7.0, 4.0])
    found = one_round([PLAIN, 1, 2, PLAIN, 3, PLAIN], lambda k: run_of(next(seconds), k))
    assert {k: (run.token_s, plain) for k, (run, plain) in found.items()} == {1: (5, 1.5), 2: (6, 1.5), 3: (7, 3)}


# ---------------------------------------------------------------- a run


def test_what_a_run_says_is_counted_without_its_first_round():
    first = Statistics(draft_seconds=1.0, target_seconds=0.5, stayed=Counter({1: 2, 2: 1}))
    done = Statistics(draft_seconds=2.6, target_seconds=2.5, stayed=Counter({1: 8, 2: 4, 3: 1}))
    run = Run(2, 4, 5.0, first, done, [[7, 0, 1, 2], [1, 2, 3, 0, 5]])
    assert run.tokens_per_s == pytest.approx((2 * 4 + 13 - 3) / 5)
    assert run.token_s == pytest.approx(2 / (18 / 5))
    assert run.draft_s == pytest.approx(1.6 / 8) and run.check_s == pytest.approx(0.5)
    assert run.draft_prefill_s == pytest.approx(1.0 - 2 * 0.2)
    assert run.past_end({0}) == 3 / 9 and run.past_end(set()) == 0
    assert run_of(1.0).draft_s is None and run_of(1.0).draft_prefill_s is None


@pytest.mark.parametrize("k", [1, 3, 8])
def test_a_draft_that_is_the_model_is_always_right(k):
    lab = Lab(model(), model())
    run, plain = lab.decode(PROMPTS, 40, k), lab.decode(PROMPTS, 40, PLAIN)
    assert run.done.acceptance == 1 and run.done.mean_accepted == k
    assert run.rounds == math.ceil(39 / (k + 1)) - 1  # the last one fills row 0; the first is not timed
    assert run.timed("stayed") == 4 * k * run.rounds
    assert run.tokens_per_s == pytest.approx(4 * (k + 1) * run.rounds / run.seconds)
    assert plain.rounds == 38 and plain.tokens_per_s == pytest.approx(4 * 38 / plain.seconds)
    assert run.written[0] == plain.written[0] and len(run.written[0]) == 40  # row 0 is the first that is full


def test_a_run_of_so_many_rounds_ends_there():
    lab = Lab(model(), model())
    assert lab.decode(PROMPTS, 200, 2, rounds=4).rounds == 4 and lab.decode(PROMPTS, 200, PLAIN, rounds=4).rounds == 4


@pytest.mark.parametrize("k", [2, 4])
def test_places_are_counted_as_a_slow_walk_along_the_text_counts_them(k):
    """Another road: the draft alone continues what stands there, token by token, and its guess is laid beside the text."""
    target, draft, prompt = model(), noisy(), PROMPTS[0]
    (text,) = fast.generate(target, [prompt], 60)
    run = Lab(target, draft).decode([prompt], 40, k)
    reached, stayed, at = Counter(), Counter(), 1
    while at < 40:
        (guess,) = fast.generate(draft, [[*prompt, *text[:at]]], k)
        right = next((i for i in range(k) if guess[i] != text[at + i]), k)
        reached.update(range(1, min(right + 1, k) + 1))
        stayed.update(range(1, right + 1))
        at += right + 1
    assert (run.done.reached, run.done.stayed) == (reached, stayed)
    assert 0 < run.done.acceptance < 1


def test_fixed_runs_teach_the_adaptive_ones_nothing():
    lab = Lab(model(), model())
    lab.decode(PROMPTS, 40, 3)
    assert not lab.learned
    lab.decode(PROMPTS, 40, ADAPTIVE)
    noted = {tokens: list(seconds) for tokens, seconds in lab.learned[4].times.items()}
    lab.decode(PROMPTS, 40, 3)
    assert noted and noted == {tokens: list(seconds) for tokens, seconds in lab.learned[4].times.items()}


# ---------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def measured():
    """Two batch sizes and two ks of the tiny models, and what was told on the way."""
    lab, told, said = Lab(model(), noisy()), [], []
    batches = measure(lab, PROMPTS, [1, 3], [2, 4], n=14, rounds=2, say=said.append, tell=lambda batch: told.append(dict(batch)))
    return batches, told, said


def test_costs_come_before_texts(measured):
    batches, told, said = measured
    assert ["rows" in batch for batch in told] == [False, True, False, True]
    assert [batch["batch_size"] for batch in told] == [1, 1, 3, 3]
    assert said[-1] == "batch 3: round 2 of 2"
    for batch in batches:
        found = batch["costs"]
        assert [row["speculate_k"] for row in found["rows"]] == [2, 4]
        for row in found["rows"]:
            c, v = found["draft_step_s"] / found["plain_step_s"], row["check_s"] / found["plain_step_s"]
            assert (c, v) == pytest.approx((found["draft_cost"], row["check_cost"]))
            assert row["needs_alpha"] == least_alpha(row["speculate_k"], c, v)


def test_the_numbers_of_a_row_agree_with_each_other(measured):
    for batch in measured[0]:
        tried = sum(sum(row["reached"]) for row in batch["rows"])
        assert batch["alpha"] == pytest.approx(sum(sum(row["stayed"]) for row in batch["rows"]) / tried)
        for row in batch["rows"]:
            a, k, c, v = batch["alpha"], row["speculate_k"], row["draft_cost"], row["check_cost"]
            assert 0 < a < 1
            assert row["predicted"] == pytest.approx((1 - a ** (k + 1)) / ((1 - a) * (k * c + v)))
            assert row["error"] == pytest.approx(row["predicted"] / row["speedup"] - 1)
            assert row["alpha"] == pytest.approx(sum(row["stayed"]) / sum(row["reached"]))
            assert len(row["reached"]) <= k and row["reached"][1:] == row["stayed"][: len(row["reached"]) - 1]
            rounds = sum(times for _, times in row["accepted"])
            assert rounds == row["reached"][0]
            assert row["mean_accepted"] == pytest.approx(sum(row["stayed"]) / rounds)
            ratios = [one["plain_step_s"] / one["token_s"] for one in row["rounds"]]
            assert row["speedup"] == pytest.approx(statistics.median(ratios))
            assert row["speedup_low"] == min(ratios) and row["speedup_high"] == max(ratios) and len(ratios) == 2
            assert row["plain_step_s"] > 0 and row["draft_step_s"] > 0 and row["check_s"] > 0 and row["draft_prefill_s"] >= 0
        assert sum(rounds for _, rounds in batch["adaptive"]["chosen"]) > 0
        assert batch["adaptive"]["speedup"] > 0


def test_how_far_the_formula_was_off():
    batches = [
        {"batch_size": 1, "rows": [{"speculate_k": 1, "error": 0.02}, {"speculate_k": 2, "error": -0.12}]},
        {"batch_size": 2, "rows": [{"speculate_k": 1, "error": 0.04}]},
    ]
    found = draft_report.accuracy(batches)
    assert found == {"mean": pytest.approx(0.06), "worst": 0.12, "worst_batch_size": 1, "worst_speculate_k": 2}
    assert draft_report.last_line(found) == "The formula is off by 6.0 % on average, by 12.0 % at worst (batch 1, k = 2)."


def test_the_table_and_the_figure(measured):
    batches = measured[0]
    for batch in batches:
        head, names, *lines, adaptive = draft_report.table(batch).splitlines()
        assert head.startswith(f"Batch {batch['batch_size']}: plain") and names.split()[:2] == ["k", "draft"]
        assert [line.split()[0] for line in lines] == ["2", "4", "adaptive"]
        for line, row in zip(lines, batch["rows"]):
            assert f"{row['predicted']:.2f}" in line and f"{row['speedup']:.2f} (" in line
        assert adaptive.startswith("adaptive: k = ")
    fig = draft_report.draw({"batches": batches, "target": {"name": "tiny"}, "draft": {"name": "tinier"}})
    axes = fig.axes[0]
    (image,) = axes.images
    values = torch.tensor(image.get_array().tolist())
    wanted = [[row["speedup"] for row in (*batch["rows"], batch["adaptive"])] for batch in batches]
    assert torch.allclose(2**values, torch.tensor(wanted))
    assert image.norm.vmin == -image.norm.vmax  # so 1.0 is in the middle of the colours, white
    assert image.cmap(0.5)[:3] == pytest.approx((1, 1, 1), abs=0.01)
    assert [text.get_text() for text in axes.texts][:2] == [f"{wanted[0][0]:.2f}", f"predicted {batches[0]['rows'][0]['predicted']:.2f}"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "4", "adaptive"]


def test_temperature_too():
    lab = Lab(model(), noisy(), {"temperature": 1.0})
    first, again, other = (lab.decode(PROMPTS, 20, 3, seed=seed) for seed in (1, 1, 2))
    assert first.written == again.written != other.written
    assert 0 < first.done.acceptance < 1


def test_a_batch_whose_draft_is_never_tried(measured):
    batch = json.loads(json.dumps(measured[0][0]))
    batch["adaptive"] |= {"reached": [], "stayed": [], "chosen": [[0, 9]], "alpha": 0.0}
    assert draft_report.table(batch).endswith("adaptive: k = 0 in 100 % of its rounds")


# ---------------------------------------------------------------- texts


def test_beginnings_are_first_sentences_of_held_out_stories():
    held_out = {document.text for document, _ in zip(world.texts("held_out"), range(60)) if document.kind == "story"}
    found = texts.beginnings(20)
    assert found == texts.beginnings(21)[:20] and len(set(found)) > 10
    for begun in found:
        assert begun[-1] in ".!?" and any(story.startswith(begun + " ") for story in held_out)


@pytest.mark.parametrize("tokens", [1, 8, 60, 300])
def test_rows_of_text_are_as_long_as_asked(tokens):
    tokenizer = load_tokenizer(pocket.path("pocket-llama3.2"))
    rows = texts.rows_of_text(tokenizer, 3, tokens)
    assert [len(row) for row in rows] == [tokens] * 3
    if tokens >= 8:
        assert len({tuple(row) for row in rows}) == 3 and all(row[0] == tokenizer.bos_id for row in rows)
        story = tokenizer.decode(rows[0][1:])
        assert story.startswith(next(texts.stories())[:20])


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfOne.\r\n\nTwo \xc3\xa9.\n  \n")
    assert texts.lines_of(path) == ["One.", "Two é."]


# ---------------------------------------------------------------- drafts from elsewhere

FIELD = {  # the draft of the field: LlamaForCausalLM, 80 million parameters
    "vocab_size": 32000, "context_length": 2048, "emb_dim": 768, "n_heads": 12, "n_kv_groups": 12, "n_layers": 4,
    "hidden_dim": 3072, "rope_base": 10_000.0, "rope_freq": None, "dtype": torch.bfloat16,
}  # fmt: skip


def write(folder, config, tokenizer=None, seed=0):
    save_huggingface(random_weights(Llama3Model(config), seed=seed), folder)
    if tokenizer:
        (folder / "tokenizer.model").write_bytes((tokenizer / "tokenizer.model").read_bytes())
    return folder


@pytest.fixture(scope="module")
def llama2_folder(tmp_path_factory):
    return write_llama2(tmp_path_factory.mktemp("llama2"), 128)


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory, llama2_folder):
    """A modest model with as many tokens as a Llama 2 with some of its own, and a tokenizer."""
    config = TINY | {"vocab_size": 32064, "context_length": 128, "tie_embeddings": False}
    return write(tmp_path_factory.mktemp("target"), config, llama2_folder)


def test_the_draft_of_the_field_needs_neither_conversion_nor_tokenizer(tmp_path, target_folder, capsys):
    draft, output = tmp_path / "draft", tmp_path / "out" / "found.json"
    with torch.device("meta"):
        empty = Llama3Model(FIELD)
    with torch.no_grad():
        save_huggingface(worker.fill(empty.to_empty(device="cpu")), draft)
    code = main([
        "draft-eval", "--checkpoint_path", str(target_folder), "--draft_checkpoint_path", str(draft), "--device", "cpu",
        "--batch_size", "1,2", "--speculate_k", "1..2", "--max_new_tokens", "12", "--rounds", "1", "--output", str(output),
    ])  # fmt: skip
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    found = json.loads(output.read_text())
    per_layer = 4 * 768 * 768 + 3 * 768 * 3072 + 2 * 768
    assert found["draft"]["bytes"] == 2 * (4 * per_layer + 768 + 32000 * 768)
    assert found["draft"]["shape"]["n_layers"] == 4 and found["draft"]["dtype"] == "bfloat16"
    assert [row["speculate_k"] for batch in found["batches"] for row in batch["rows"]] == [1, 2, 1, 2]


@pytest.mark.parametrize("vocab_size", [30, 70])
def test_a_draft_may_have_fewer_tokens_or_more(vocab_size):
    target, draft = model(), model(3, vocab_size=vocab_size)
    wanted = fast.generate(target, PROMPTS, 20)
    run = Lab(target, draft).decode(PROMPTS, 20, 3)
    assert all(wanted[row][: len(written)] == written for row, written in enumerate(run.written))


def test_load_draft(tmp_path, target_folder, llama2_folder):
    bare, named = write(tmp_path / "bare", TINY), write(tmp_path / "named", TINY | {"vocab_size": 400}, llama2_folder)
    assert not hasattr(fast.load_draft(bare), "tokenizer")
    assert fast.load_draft(named, torch.float32).tokenizer.vocab_size == load_tokenizer(llama2_folder).vocab_size
    with pytest.raises(LlamaBookError, match="tokenizer"):
        fast.load(bare)
    (named / "tokenizer.model").write_bytes(b"<html>log in</html>")
    with pytest.raises(LlamaBookError):
        fast.load_draft(named)
    with pytest.raises(InputError, match="activations"):
        fast.load_draft(bare, activations="some")


# ---------------------------------------------------------------- the command


def test_the_command_measures_prints_and_writes(tmp_path, capsys):
    output, prompts = tmp_path / "folder" / "draft.json", tmp_path / "prompts.txt"
    prompts.write_text("One sunny morning, Leo went to the valley.\nWhat do llamas eat?\n")
    code = main([
        "draft_eval", "--device", "cpu", "--batch_size", "2", "--speculate_k", "1,3", "--max_new_tokens", "16", "--rounds", "2",
        "--prompts", str(prompts), "--output", str(output),
    ])  # fmt: skip
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if line]
    assert lines[0].startswith("Batch 2, from what steps cost: plain") and lines[2].startswith("Batch 2: plain")
    assert lines[-1].startswith("The formula is off by")
    found = json.loads(output.read_text())
    assert set(found) == {
        "measured", "target", "draft", "prompts", "temperature", "seed", "max_new_tokens", "compile", "rounds", "device",
        "versions", "machine", "batches", "error",
    }  # fmt: skip
    assert (found["target"]["name"], found["draft"]["name"]) == ("pocket-llama3.2", "pocket-draft")
    assert found["target"]["dtype"] == found["draft"]["dtype"] == "float32"
    assert found["prompts"]["number"] == 2 and found["versions"]["torch"] == torch.__version__ and found["machine"]["cpu"]
    (batch,) = found["batches"]
    assert batch["alpha"] > 0.4  # they learned the same farm
    assert lines[-1] == draft_report.last_line(found["error"]) and found["error"] == draft_report.accuracy([batch])
    png = output.with_suffix(".png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 5000


@pytest.mark.parametrize("flags, words", [
    (["--batch_sizes", "1"], "there is no flag --batch_sizes"),
    (["--batch_size", ""], "--batch_size is ''"),
    (["--batch_size", "0,1"], "--batch_size is '0,1'"),
    (["--speculate_k", "0..3"], "--speculate_k is '0..3'"),
    (["--speculate_k", "x"], "--speculate_k is 'x'"),
    (["--rounds", "0"], "--rounds is 0"),
    (["--output", "found.txt"], "ends in .json"),
    (["--temperature", "-1"], "--temperature is -1.0"),
    (["--dtype", "int7"], "--dtype is 'int7'"),
    (["--draft_dtype", "int7"], "is 'int7'"),
    (["--device", "abacus"], "--device is 'abacus'"),
    (["--max_new_tokens", "9"], "--max_new_tokens is 9: give 11 or more"),
    (["--checkpoint_path", "no/such/folder"], "no/such/folder does not exist"),
    (["--draft_checkpoint_path", "no/such/folder"], "no/such/folder does not exist"),
    (["--draft_checkpoint_path", str(pocket.path("pocket-llama2"))], "the draft's tokenizer gives other ids"),
    (["--prompts", "no/such/file"], "no/such/file: does not exist"),
    (["--prompts", "{folder}"], "is a folder"),
    (["--prompts", "{folder}/empty.txt"], "there is no prompt in it"),
    (["--prompts", "{folder}/blank.txt"], "there is no prompt in it"),
    (["--prompts", "{folder}/latin.txt"], "not valid UTF-8"),
    (["--max_new_tokens", "131072"], "the context length is 131072"),
])  # fmt: skip
def test_a_mistake_is_one_line(flags, words, tmp_path, capsys):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b"\n \n")
    (tmp_path / "latin.txt").write_bytes("Ein Hügel".encode("latin-1"))
    assert main(["draft-eval", *(flag.replace("{folder}", str(tmp_path)) for flag in flags)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err


def test_a_prompt_that_is_too_long_is_one_line(tmp_path, target_folder, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hay " * 150)
    assert main(["draft-eval", "--checkpoint_path", str(target_folder), "--draft_checkpoint_path", str(target_folder),
                 "--prompts", str(prompts), "--device", "cpu"]) == 2  # fmt: skip
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "the context length is 128" in err
