"""The Pocket Llama 3.2 family: the shipped models keep their promises, and the questions are what they say they are."""

import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import combinations, islice, permutations

import pytest
import torch

from llamabook import pocket
from llamabook.checkpoint import load_config, load_model
from llamabook.errors import InputError
from llamabook.generate import generate
from llamabook.llama3 import LLAMA32_CONFIG_1B, Llama3Model
from llamabook.pocket import floor, questions, recipes, train, world
from llamabook.pocket.questions import FACTS, Mix, grade, question
from llamabook.tokenizer import ChatFormat, load_tokenizer

BASE, INSTRUCT, DRAFT = FAMILY = ("pocket-llama3.2", "pocket-llama3.2-instruct", "pocket-draft")


@pytest.fixture(scope="module")
def models():
    return {name: load_model(pocket.path(name), dtype=torch.float32).eval() for name in FAMILY}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(pocket.path(BASE))


@pytest.fixture(scope="module")
def held_out():
    return list(islice(world.texts("held_out"), 1000))


# ---- the shipped models -------------------------------------------------------------------------------------------


def test_each_is_a_hugging_face_folder_and_together_they_are_small():
    files = [file for name in FAMILY for file in pocket.path(name).iterdir()]
    expected = {"config.json", "model.safetensors", "tokenizer.model", "training_log.json"}
    assert all({file.name for file in pocket.path(name).iterdir()} == expected for name in FAMILY)
    assert sum(file.stat().st_size for file in files) <= 14_000_000
    assert len({file.read_bytes() for file in files if file.name == "tokenizer.model"}) == 1


@pytest.mark.parametrize("name", FAMILY)
def test_all_that_is_no_size_is_as_in_llama_3_2(name):
    config, sizes = load_config(pocket.path(name)), {"vocab_size", "emb_dim", "n_heads", "n_layers", "hidden_dim"}
    kept = {key: value for key, value in LLAMA32_CONFIG_1B.items() if key not in {*sizes, "n_kv_groups"}}
    assert {key: config[key] for key in kept} == kept
    assert config["head_dim"] == 64 == LLAMA32_CONFIG_1B["emb_dim"] // LLAMA32_CONFIG_1B["n_heads"]
    assert config["vocab_size"] == recipes.RANKS + 256
    written = json.loads((pocket.path(name) / "config.json").read_text())
    assert written["torch_dtype"] == "bfloat16" and written["tie_word_embeddings"] is True


def test_four_query_heads_share_a_group_as_in_the_1b_model(models):
    ratio = LLAMA32_CONFIG_1B["n_heads"] // LLAMA32_CONFIG_1B["n_kv_groups"]
    assert models[BASE].cfg["n_heads"] // models[BASE].cfg["n_kv_groups"] == ratio


def test_the_draft_has_at_most_a_quarter_of_the_parameters(models):
    count = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert 4 * count[DRAFT] <= count[BASE] == count[INSTRUCT]
    for name in FAMILY:  # bfloat16, the embedding once
        size = (pocket.path(name) / "model.safetensors").stat().st_size
        assert 2 * count[name] <= size < 2 * count[name] + 5000
        assert models[name].out_head.weight is models[name].tok_emb.weight


def test_the_base_comes_within_three_percent_of_the_floor(models, tokenizer, held_out):
    measured = floor.gap(models[BASE], tokenizer, held_out)
    assert measured.documents == 1000
    assert measured.nats > -2 * measured.error, "better than the world itself: the floor is wrong"
    assert measured.gap <= 0.03


@pytest.mark.parametrize("name", FAMILY)
def test_the_kept_log_belongs_to_the_model(name, models, tokenizer):
    log, recipe = pocket.training_log(name), recipes.RECIPES[name]
    assert [entry["step"] for entry in log] == sorted({entry["step"] for entry in log})
    assert log[-1]["step"] == recipe.steps
    measured = floor.gap(models[name], tokenizer, list(islice(recipe.source.texts("held_out"), 200)))
    assert measured.floor_per_token == pytest.approx(log[-1]["floor"], abs=1e-4)
    assert measured.loss_per_token == pytest.approx(log[-1]["held_out"], abs=3e-3)  # the file holds bfloat16
    assert measured.nats > -3 * measured.error


@pytest.fixture(scope="module")
def right(models, tokenizer):
    asked = questions.held_out_questions(200)
    return dict(zip(asked, questions.answers_right(models[INSTRUCT], tokenizer, asked)))


def test_instruct_answers_questions_whose_combination_it_never_met(right):
    assert len(right) == 200
    assert sum(right.values()) >= 0.95 * 200
    assert pocket.training_log(INSTRUCT)[-1]["right"] == pytest.approx(sum(right.values()) / 200, abs=0.02)


def answer(model, tokenizer, text: str) -> tuple[str, bool]:
    """What greedy decoding says, and whether it ended with <|eot_id|>."""
    chat = ChatFormat(tokenizer)
    prompt = torch.tensor([chat.encode(text)])
    ids = generate(model, prompt, 40, 256, eos_id=chat.stop_tokens)[0, prompt.shape[1] :].tolist()
    stop = [i for i, token in enumerate(ids) if token in chat.stop_tokens]
    said = ids[: stop[0]] if stop else ids
    return tokenizer.decode(said).strip(), bool(stop) and ids[stop[0]] == tokenizer.special_tokens["<|eot_id|>"]


def test_one_pass_finds_right_what_generation_says_rightly(models, tokenizer, right):
    """Some questions that one pass finds right and, if there are any, some that it finds wrong."""
    asked = [q for q in right if right[q]][:6] + [q for q in right if not right[q]][:3]
    for text in asked:
        said, ended = answer(models[INSTRUCT], tokenizer, text)
        assert (grade(text, said) and ended) == right[text], (text, said)


def test_it_knows_what_llamas_eat(models, tokenizer):
    said, ended = answer(models[INSTRUCT], tokenizer, "What do llamas eat?")
    assert ended and grade("What do llamas eat?", said), said


def test_nearly_every_word_is_one_token(tokenizer, held_out):
    words = Counter(w for d in held_out[:300] for w in re.findall(r"(?<=\w) \w+", d.text))
    whole = sum(n for word, n in words.items() if len(tokenizer.encode(word)) == 1)
    assert whole >= 0.99 * words.total()
    assert all(len(tokenizer.encode(text)) == 1 for text in ("user", "assistant", "system", "\n\n"))


@pytest.mark.long
def test_the_tokenizer_can_be_made_again():
    assert recipes.RECIPES[BASE].tokenizer() == (pocket.path(BASE) / "tokenizer.model").read_bytes()


# ---- rows ---------------------------------------------------------------------------------------------------------


def test_documents_are_encoded_as_llama_3_has_them(tokenizer, held_out):
    story = next(d for d in held_out if d.kind == "story")
    ids = floor.encode_document(story, tokenizer)
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id) and tokenizer.decode(ids[1:-1]) == story.text
    chat = next(d for d in held_out if d.kind == "chat" and len(d.turns) == 4)
    ids = floor.encode_document(chat, tokenizer)
    assert ids[:-1] == ChatFormat(tokenizer).encode_dialog(chat.turns, complete=True)
    assert ids.count(tokenizer.special_tokens["<|eot_id|>"]) == 4 and ids[-1] == tokenizer.eos_id


def test_a_row_shows_where_its_chat_ends(tokenizer):
    """Or the model would not pay for it, and could fall below the world's entropy."""
    longer = next(d for d in map(world.sample, range(1000)) if len(d.turns) == 4)
    shorter = replace(longer, text="\n".join(longer.text.split("\n")[:2]))
    assert world.parse(shorter.text, "chat")
    rows = [floor.encode_document(d, tokenizer) for d in (shorter, longer)]
    assert rows[0] != rows[1][: len(rows[0])]


# ---- questions ----------------------------------------------------------------------------------------------------


def test_every_question_asks_for_its_own_facts():
    asked = {question(*facts): facts for n in (1, 2) for facts in permutations(FACTS, n)}
    assert len(FACTS) == 120 and len(asked) == 120 + 120 * 119
    assert all(questions.facts_of(text) == facts for text, facts in asked.items())
    assert question(("goat", "eats"), ("cow", "young")) == "What do goats eat, and what is the baby of a cow called?"


def test_no_training_text_holds_a_combination_that_is_asked_for():
    """By enumeration of all combinations, each in both orders, alone and behind another question."""
    held = {frozenset(pair) for pair in combinations(FACTS, 2) if questions.is_held_out_combination(*pair)}
    assert abs(len(held) / math.comb(120, 2) - 1 / 8) < 0.02
    harmless = next(pair for pair in combinations(FACTS, 2) if frozenset(pair) not in held)
    for pair in permutations(FACTS, 2):
        text = f"User: {question(*pair)}\nLlama: Yes."
        assert questions.is_held_out(text) == (frozenset(pair) in held)
    for pair in islice(permutations(FACTS, 2), 0, None, 7):
        text = f"User: {question(*harmless)}\nLlama: Yes.\nUser: {question(*pair)}\nLlama: Yes."
        assert questions.is_held_out(text) == (frozenset(pair) in held)
    asked = [frozenset(questions.facts_of(text)) for text in questions.held_out_questions(200)]
    assert len(set(asked)) == 200 and set(asked) <= held


@pytest.mark.parametrize("name", [INSTRUCT, DRAFT])
def test_training_texts_are_split_as_they_should(name):
    source = recipes.RECIPES[name].source
    asked = {q for d in islice(source.texts("train"), 1500) for q in re.findall(r"(?m)^User: (.*)$", d.text)}
    assert not asked & set(questions.held_out_questions(10_000))
    train_texts, held_out = ({d.text for d in islice(source.texts(s), 300)} for s in ("train", "held_out"))
    assert not train_texts & held_out and not any(map(source.is_held_out, train_texts))
    with pytest.raises(ValueError, match="held_out"):
        source.texts("test")


def test_the_same_questions_are_asked_everywhere():
    digest = hashlib.sha256("\n".join(questions.held_out_questions(200)).encode()).hexdigest()
    assert digest[:16] == "fbf3651280a166ec"


def test_reported_probabilities_are_those_of_the_drawing():
    """Against counting: each exchange is one of 120 or of 120 · 119 questions, answered in one of its right ways."""
    drawn, seen = [questions.dialog(seed) for seed in range(3000)], Counter()
    wishes = tuple(world.LEXICONS["wishes"])
    for d in drawn:
        expected = math.log(1 / 3)
        for user, llama in zip(d.turns[::2], d.turns[1::2]):
            facts = questions.facts_of(user["content"])
            ways = {a for a in questions.right_answers(*facts) if not a.endswith(wishes)}
            assert llama["content"] in ways
            expected += math.log((1 / 4 / 120, 3 / 4 / (120 * 119))[len(facts) - 1] / len(ways))
            seen[len(facts)] += 1
        assert d.log_prob == pytest.approx(expected)
    assert abs(seen[2] / seen.total() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / seen.total())
    lengths = Counter(len(d.turns) // 2 for d in drawn)
    assert all(abs(lengths[n] - 1000) < 4 * math.sqrt(3000 * 2 / 9) for n in (1, 2, 3))


def test_a_mix_knows_the_probability_of_its_texts():
    weights = dict(zip(world.KINDS, (weight for weight, _ in world.GRAMMAR.rules["document"])))
    chats = math.log(weights["chat"] / sum(weights.values()))
    for mix, given in ((Mix(0.5, "chat"), chats), (Mix(0.125), 0.0)):
        for d in map(mix.sample, range(150)):
            as_world = world.parse(d.text)  # None for questions: the world draws none of them
            if as_world is None:
                assert all(turn["content"] for turn in d.turns) and "User: " in d.text
                assert questions.facts_of(d.turns[0]["content"])
            else:
                assert (d.kind, d.text) == (as_world.kind, as_world.text)
                assert d.log_prob == pytest.approx(as_world.log_prob - given + math.log(1 - mix.share))


ASKED = "What do goats eat, and what is the baby of a cow called?"
WRONG = {
    "another animal's food": "Goats eat acorns, and the baby of a cow is called calf.",
    "another animal's baby": "Goats eat hay, and the baby of a cow is called kid.",
    "half of it": "Goats eat hay.",
    "the other half": "The baby of a cow is called calf.",
    "right, and more": "Goats eat hay, and the baby of a cow is called calf. Cows eat corn.",
    "right, after more": "Yes. Goats eat hay, and the baby of a cow is called calf.",
    "two foods at once": "Goats eat hay leaves, and the baby of a cow is called calf.",
    "the values swapped": "Goats eat calf, and the baby of a cow is called hay.",
    "the animals swapped": "Cows eat hay, and the baby of a goat is called kid.",
    "cut off": "Goats eat hay, and the baby of a cow is called",
    "no end": "Goats eat hay, and the baby of a cow is called calf",
    "in the wrong order": "The baby of a cow is called calf, and goats eat hay.",
    "a wish that nobody asked for": "Goats eat hay, and the baby of a cow is called calf. I like that too.",
    "nothing": "",
}


def test_the_grader_takes_any_right_food():
    for food in ("leaves", "hay", "bushes"):
        assert grade(ASKED, f"Goats eat {food}, and the baby of a cow is called calf.")
    assert grade(ASKED, " Goats eat hay, and the baby of a cow is called calf.\n")
    assert grade("What do llamas eat?", "Llamas eat grass.")
    assert grade("What do llamas eat?", "Llamas eat alfalfa. Now I am hungry.")  # as in the world's chats


@pytest.mark.parametrize("why", WRONG)
def test_the_grader_rejects(why):
    assert not grade(ASKED, WRONG[why])


def test_what_is_no_question_of_ours_is_not_graded():
    for text in ("What do unicorns eat?", "What do goats eat, and what do goats eat?", ASKED[:-1], ""):
        with pytest.raises(InputError, match="no question"):
            grade(text, "Goats eat hay.")


# ---- training -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The family with tiny models, few texts and the embedded tokenizer."""
    torch.set_num_threads(1)
    config = {**recipes.LLAMA32_CONFIG, "emb_dim": 64, "n_heads": 4, "n_layers": 1, "hidden_dim": 64}
    small = dict(
        build=partial(Llama3Model, config), documents=4, warmup=2,
        tokenizer=(pocket.path(BASE) / "tokenizer.model").read_bytes,
    )  # fmt: skip
    monkeypatch.setitem(train.RECIPES, "tiny", replace(recipes.RECIPES[BASE], **small))
    monkeypatch.setitem(train.RECIPES, "tiny-instruct", replace(recipes.RECIPES[INSTRUCT], **small, measure=count_asked))

    def run(name, folder, **options):
        return train.train(name, tmp_path / folder, evaluate_every=3, held_out=4, log=lambda line: None, **options)

    return run


def count_asked(model, tokenizer) -> dict:
    return {"right": float(sum(questions.answers_right(model, tokenizer, questions.held_out_questions(3))))}


def contents(folder) -> dict[str, bytes]:
    """The files of a training, without what depends on the clock."""
    log = json.loads((folder / "training_log.json").read_text())
    without_time = json.dumps([{k: v for k, v in entry.items() if k != "seconds"} for entry in log]).encode()
    names = ("config.json", "model.safetensors", "tokenizer.model")
    return {"log": without_time} | {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("name", ["tiny", "tiny-instruct"])
def test_a_killed_training_goes_on_as_if_nothing_had_happened(tiny, name, monkeypatch, tmp_path):
    """Killed while the learning rates fall, when the saved optimizers hold other rates than the recipe."""
    options = {"base": tiny("tiny", "base", steps=3)} if name == "tiny-instruct" else {}
    whole, real, seen = tiny(name, "whole", steps=9, **options), train._step, []

    def killed(*arguments):
        if len(seen) == 8:
            raise KeyboardInterrupt
        seen.append(1)
        return real(*arguments)

    monkeypatch.setattr(train, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        tiny(name, "killed", steps=9, **options)
    monkeypatch.setattr(train, "_step", real)
    assert contents(tiny(name, "killed", steps=9, **options)) == contents(whole)


def test_instruct_starts_where_its_base_ended(tiny):
    base = tiny("tiny", "base", steps=9)
    start = load_model(base, dtype=torch.float32).state_dict()
    model, *_ = train._start(train.RECIPES["tiny-instruct"], base, None)
    assert all(torch.equal(weight, start[name]) for name, weight in model.state_dict().items())
    after = json.loads((tiny("tiny-instruct", "instruct", steps=3, base=base) / "training_log.json").read_text())
    assert set(after[-1]) >= {"step", "tokens", "seconds", "loss", "held_out", "floor", "gap", "right"}


def test_a_base_is_asked_for_only_where_there_is_one(tiny, tmp_path):
    with pytest.raises(InputError, match="has no base"):
        tiny("tiny", "a", base=tmp_path)
    with pytest.raises(InputError, match="no tokenizer.model"):
        tiny("tiny-instruct", "b", base=tmp_path)
    with pytest.raises(InputError, match="pocket-draft"):
        train.train("pocket-alpaca")


def test_half_of_the_groups_stay_blind_to_distance(tiny, tmp_path):
    """Through training too: two groups, the first blind in the pairs that turn by a right angle in 256 tokens."""
    model = load_model(tiny("tiny", "run", steps=4))
    attention, d = model.trf_blocks[0].att, 64
    fast = model.frequencies() * 256 > math.pi / 2
    assert 0 < fast.sum() < d // 2
    for layer in (attention.W_query, attention.W_key):
        groups = layer.weight.unflatten(0, (2, -1, 2, d // 2))  # (G, heads, halves, pairs, D)
        assert (groups[0][:, :, fast] == 0).all() and (groups[0][:, :, ~fast] != 0).any()
        assert (groups[1] != 0).float().mean() > 0.99


def test_attention_starts_as_a_copy():
    """Each head's way out is the way in of its group: what all heads see alike comes back at its own size."""
    model = recipes.initialize(Llama3Model({**recipes.LLAMA32_CONFIG, "n_layers": 1}))
    attention = model.trf_blocks[0].att
    value = attention.W_value.weight.unflatten(0, (2, 64))  # (G, d, D)
    for head, way_out in enumerate(attention.out_proj.weight.unflatten(1, (8, 64)).unbind(1)):  # (D, d) each
        assert torch.equal(way_out, value[head // 4].T * 0.5)
    x = torch.linspace(-1, 1, 256)
    seen = attention.out_proj(attention.W_value(x).unflatten(0, (2, 64)).repeat_interleave(4, dim=0).flatten())
    assert (seen @ x / (x @ x)).item() == pytest.approx(1, abs=0.3)
    assert model.out_head.weight is model.tok_emb.weight
    assert not model.trf_blocks[0].ff.fc3.weight.any()
