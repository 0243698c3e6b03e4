"""Speculation against plain decoding, against the distribution that it must draw from, and against mutants of itself."""

import inspect
import io
from pathlib import Path

import pytest
import torch
from small_llamas import random_weights
from torch._dynamo.utils import counters

from llamabook import fast, pocket
from llamabook.cli import app
from llamabook.cli.speak import draft_folder
from llamabook.errors import InputError
from llamabook.fast import payoff, speculative
from llamabook.fast.model import from_llama
from llamabook.fast.payoff import Payoff, expected_tokens, predicted_speedup
from llamabook.fast.quantize import QuantizedLinear, scheme_of
from llamabook.fast.sampling import draw
from llamabook.llama3 import LLAMA32_CONFIG_1B, Llama3Model

CONFIG = {
    **LLAMA32_CONFIG_1B, "vocab_size": 101, "context_length": 700, "emb_dim": 48, "n_heads": 6, "n_kv_groups": 2,
    "head_dim": 16, "n_layers": 3, "hidden_dim": 80, "rope_base": 10_000.0, "dtype": torch.float32,
}  # fmt: skip
PROMPTS = [[5, 17, 3, 99, 20], list(range(40, 77)), [8], [100, 0, 100, 0, 100, 0, 55, 54, 53, 12]]


def llama(seed=0, size=2.0, **changes):
    return random_weights(Llama3Model({**CONFIG, **changes}), size, seed)


def like(model, noise, seed=1, **changes):
    """A draft that often says what `model` says: the same weights, and a little noise."""
    source, generator = llama(**changes), torch.Generator().manual_seed(seed)
    for p in source.parameters():
        p.data += noise * p.std() * torch.randn(p.shape, generator=generator)
    return from_llama(source)


@pytest.fixture(scope="module")
def target():
    return from_llama(llama())


@pytest.fixture(scope="module")
def drafts(target):
    return {
        "a like one": like(target, 0.05),
        "itself": target,
        "itself in int8": from_llama(llama(), lambda *a, **k: QuantizedLinear(*a, scheme=scheme_of("int8"), **k)),
        "another": from_llama(llama(seed=9, n_layers=1)),
        "of fewer tokens": from_llama(llama(seed=3, vocab_size=64)),
        "of more tokens": from_llama(llama(seed=4, vocab_size=200)),
        "look-up": fast.PromptLookup(),
        "eager look-up": fast.PromptLookup(longest=1, shortest=1),
    }


NAMES = ["a like one", "itself", "itself in int8", "another", "of fewer tokens", "of more tokens", "look-up", "eager look-up"]

# ---------------------------------------------------------------- greedy: the same text, whatever drafts


@pytest.fixture(scope="module")
def plain(target):
    return fast.generate(target, PROMPTS, 500), *fast.generate(target, PROMPTS[2:3], 500)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_is_the_plain_one(target, drafts, plain, name):
    statistics = fast.Statistics()
    for k in (1, 7, None) if name == "a like one" else (4,):
        assert fast.generate(target, PROMPTS, 500, draft=drafts[name], speculate_k=k, statistics=statistics) == plain[0]
    assert fast.generate(target, PROMPTS[2:3], 500, draft=drafts[name], speculate_k=5) == [plain[1]]
    if name in ("a like one", "itself", "itself in int8"):
        assert statistics.acceptance > 0.3  # or the test would prove little
    if "look-up" in name:
        assert len(statistics.histogram) >= 3


@pytest.mark.parametrize("name", ["pocket-llama3.2", "pocket-llama3.2-instruct"])
def test_greedy_stories(name):
    """The embedded models, with the draft that was trained for them."""
    model, tokenizer = fast.load(pocket.path(name), dtype=torch.float32)
    draft, _ = fast.load(pocket.path("pocket-draft"), dtype=torch.float32)
    prompts = [tokenizer.encode(text, bos=True) for text in ("One day", "A llama", "Do goats", "Nina went to the river.")]
    plain, statistics = fast.generate(model, prompts, 500), fast.Statistics()
    assert fast.generate(model, prompts, 500, draft=draft, speculate_k=5, statistics=statistics) == plain
    assert fast.generate(model, prompts[:1], 500, draft=draft) == plain[:1]
    assert statistics.mean_accepted > 1


@pytest.mark.parametrize("compile", ["blocks", "whole"])
def test_compiled(compile):
    """Compiled, the text stays; and no number of accepted tokens, no length of a prompt compiles anything anew."""
    model, draft = from_llama(llama()), like(None, 0.05)
    plain = fast.generate(model, PROMPTS, 60)
    runs = [{"speculate_k": 3}, {"speculate_k": 5}]
    assert all(fast.generate(model, PROMPTS, 60, draft=draft, compile=compile, **run) == plain for run in runs)
    counters.clear()
    statistics = fast.Statistics()
    for k, prompts in ((4, PROMPTS), (2, PROMPTS[::-1]), (7, [[1] * 9] * 4)):
        fast.generate(model, prompts, 40, draft=draft, speculate_k=k, compile=compile, statistics=statistics)
    assert len(statistics.histogram) > 4 and not counters["stats"]["unique_graphs"]


# ---------------------------------------------------------------- sampling: the same distribution


def p_value(counts, expected):
    """The chance of counts at least as far from what was expected, by Pearson's chi-square test."""
    counts, expected = counts.double().flatten(), expected.double().flatten()
    assert counts[expected == 0].sum() == 0, "what can't be drawn was drawn"
    counts, expected = counts[expected > 0], expected[expected > 0]
    expected = expected / expected.sum() * counts.sum()
    assert expected.min() > 1  # or the statistic is far from the distribution it is compared with
    distance = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2.0).double(), distance / 2))


def pairs(seed):
    """(p, q) of 7 tokens: likes, opposites, some zeros on either side, and differences that bfloat16 can't hold."""
    g = torch.Generator().manual_seed(seed)
    p, q = torch.rand(2, 7, generator=g).double() ** 2
    yield "any", p, q
    yield "zero in q", p, q * torch.tensor([1, 0, 1, 0, 1, 1, 1])
    yield "zero in p", p * torch.tensor([0, 1, 1, 0, 1, 1, 1]), q
    yield "zero in each", p * torch.tensor([0, 1, 1, 0, 1, 1, 1]), q * torch.tensor([1, 1, 0, 1, 0, 0, 1])
    yield "nothing in common", p * torch.tensor([1, 1, 1, 0, 0, 0, 0]), q * torch.tensor([0, 0, 0, 1, 1, 1, 1])
    yield "alike", p, p + 0.02 * q
    yield "the same", p, p
    for name, bulk in (("on", [96, 128, 144, 184, 216, 256, 0]), ("off", [102.4, 122.9, 143.4, 184.8, 220.7, 249.8, 0])):
        yield f"a rare one, {name} the grid", torch.tensor(bulk) + torch.tensor([0, 0, 0, 0, 0, 0, 1]), torch.tensor(bulk)


PAIRS = {name: (p / p.sum(), q / q.sum()) for name, p, q in pairs(0)}
DRAWS = 1_000_000


def first_tokens(accept, p, q, sure=False, k=2, seed=0, draws=DRAWS):
    """How often each token comes out first, in as many rows: of the draft where it stays, else the one after."""
    g = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(draws, 2 * k + 1, generator=g, dtype=torch.float64)
    counts = torch.zeros(len(p))
    for u in uniforms.split(250_000):
        B = len(u)
        of_q = q.float().expand(B, k, -1)
        drafted = torch.cat([draw(of_q[:, i], u[:, i : i + 1]) for i in range(k)], 1)
        of_p = p.float().expand(B, k + 1, -1)
        n, token = accept(of_p, drafted, torch.full((B,), k), None if sure else of_q, u[:, k : 2 * k], u[:, 2 * k :])
        first = torch.where(n > 0, drafted[:, 0], token[:, 0])
        counts += torch.bincount(first, minlength=len(p))
    return counts


@pytest.mark.parametrize("name", PAIRS)
def test_first_token_is_drawn_from_p(name):
    p, q = PAIRS[name]
    assert p_value(first_tokens(speculative.accept, p, q), p) > 1e-3


def test_acceptance_is_what_p_and_q_share():
    """The sum of min(p, q) (Leviathan et al., 2023, theorem 3.5); all, where they are the same."""
    for name, (p, q) in PAIRS.items():
        g = torch.Generator().manual_seed(1)
        u = torch.rand(200_000, 3, generator=g, dtype=torch.float64)
        of_q = q.float().expand(len(u), 1, -1)
        drafted = draw(of_q[:, 0], u[:, :1])
        n, _ = speculative.accept(p.float().expand(len(u), 2, -1), drafted, torch.ones(len(u)), of_q, u[:, 1:2], u[:, 2:])
        shared = torch.minimum(p, q).sum().item()
        assert abs(n.double().mean().item() - shared) < 4 * (0.25 / len(u)) ** 0.5, name
        if name == "the same":
            assert n.all()


def test_a_sure_draft():
    """A draft without probabilities, as of a look-up: it stays with p, and never comes back where it was rejected."""
    p, q = PAIRS["zero in p"]
    assert p_value(first_tokens(speculative.accept, p, q, sure=True), p) > 1e-3


def mutant(name, *changes):
    """A function of `speculative` whose source says something else; all its callers are mutated with it."""
    source = inspect.getsource(getattr(speculative, name))
    for old, new in changes:
        assert old in source, f"{name} does not say {old!r}"
        source = source.replace(old, new)
    namespace = dict(vars(speculative))
    exec(source, namespace)
    return namespace[name]


WRONG_RULES = {
    "always accept": [("trials * of_q < of_p", "trials < 2")],
    "accept the likelier": [("trials * of_q < of_p", "of_q < of_p")],
    "forget q": [("trials * of_q < of_p", "trials < of_p")],
    "p and q exchanged": [("trials * of_q < of_p", "trials * of_p < of_q")],
    "half as strict": [("trials * of_q < of_p", "trials * of_q < 1.02 * of_p")],
    "in bfloat16": [("trials * of_q < of_p", "(trials.bfloat16() * of_q.bfloat16() < of_p.bfloat16())")],
    "probabilities in bfloat16": [("trials * of_q < of_p", "(trials * of_q.bfloat16() < of_p.bfloat16())")],
    "from p after a rejection": [("rejected[:, None]", "rejected[:, None] & False")],
    "from q after a rejection": [("excess, here)", "F.pad(guess, (0, p.shape[2] - guess.shape[1])).float(), here)")],
    "the difference, signs lost": [(".clamp(min=0)", ".abs()")],
    "half of q taken away": [("(here - F.pad", "(here - 0.5 * F.pad")],
    "the excess in bfloat16": [("(here - F.pad", "(here.bfloat16() - F.pad")],
    "the place after the rejected": [("n.clamp(max=k - 1)", "(n + 1).clamp(max=k - 1)")],
    "no excess behind the last": [("(n < counts) &", "(n <= counts) &")],
    "the accepted after a rejected": [("before_first_false(stays, counts)", "stays.sum(1)")],
}


ON, OFF = "a rare one, on the grid", "a rare one, off the grid"  # of bfloat16
TWO = [("any", "zero in q", 1), ("any", "zero in q", 2), (ON, OFF, 2)]  # distributions of the first and the second; k


@pytest.mark.parametrize("name", WRONG_RULES)
def test_wrong_rules_are_noticed(name):
    wrong = mutant("accept", *WRONG_RULES[name])
    assert any(p_value(two_tokens(wrong, *case), two_chances(*case)) < 1e-9 for case in TWO)


@pytest.mark.parametrize("case", TWO)
def test_two_tokens_are_drawn_from_p(case):
    assert p_value(two_tokens(speculative.accept, *case), two_chances(*case)) > 1e-3


def two_chances(first, second, k):
    return PAIRS[first][0][:, None] * PAIRS[second][0]


def two_tokens(accept, first, second, k, draws=2 * DRAWS):
    """How often each pair of tokens comes out, each token from a distribution of its own, by one round of k.

    Where the round ends after one token, the second is drawn plainly.
    """
    g = torch.Generator().manual_seed(0)
    p, q = (torch.stack([a, b, b]).float() for a, b in zip(PAIRS[first], PAIRS[second]))
    counts, V = 0, p.shape[1]
    for _ in range(draws // 500_000):
        u = torch.rand(500_000, 2 * k + 2, generator=g, dtype=torch.float64)
        of_p, of_q, B = p[: k + 1].expand(len(u), -1, -1), q[:k].expand(len(u), -1, -1), len(u)
        drafted = torch.cat([draw(of_q[:, i], u[:, i : i + 1]) for i in range(k)], 1)
        n, token = accept(of_p, drafted, torch.full((B,), k), of_q, u[:, k : 2 * k], u[:, -2:-1])
        plain = draw(p[1].expand(B, -1), u[:, -1:])
        run = torch.cat([drafted, token], 1).scatter(1, n[:, None], token)
        two = torch.where(n > 0, run[:, 1], plain[:, 0])
        counts = counts + torch.bincount(V * run[:, 0] + two, minlength=V * V)
    return counts


SMALL = {"vocab_size": 5, "context_length": 16, "emb_dim": 16, "n_heads": 2, "n_kv_groups": 1, "head_dim": 16, "n_layers": 1, "hidden_dim": 16}


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 4}, {"temperature": 1.3, "top_p": 0.85, "min_p": 0.05}])
@pytest.mark.parametrize("kind", ["another", "of fewer tokens", "look-up"])
def test_texts_of_the_engine(settings, kind):
    """All of it at once: 10 000 rows of four tokens, against the product of what the target says of each."""
    model = from_llama(llama(size=1.0, **SMALL))
    draft = {
        "another": from_llama(llama(seed=5, size=1.0, **SMALL)),
        "of fewer tokens": from_llama(llama(seed=5, size=1.0, **{**SMALL, "vocab_size": 3})),
        "look-up": fast.PromptLookup(2, 1),
    }[kind]
    prompt, rows, statistics = [0, 1, 2, 0, 1], 10_000, fast.Statistics()
    drawn = fast.generate(model, [prompt] * rows, 4, seed=0, draft=draft, speculate_k=3, statistics=statistics, **settings)
    texts = torch.cartesian_prod(*[torch.arange(5)] * 4)  # all 625
    whole = torch.cat([torch.tensor([prompt]).expand(625, -1), texts], 1)
    sampler = fast.engine.Sampler(1, **settings)
    plain = llama(size=1.0, **SMALL)  # chapter 2's, without a cache
    with torch.no_grad():
        probs = sampler.probs(plain(whole)[:, 4:8].flatten(0, 1)).view(625, 4, 5).double()
    chances = probs.gather(2, texts[..., None]).squeeze(2).prod(1)
    counts = torch.bincount((torch.tensor(drawn) * torch.tensor([125, 25, 5, 1])).sum(1), minlength=625)
    rare = chances * rows < 10  # these count together
    together = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, chances)]
    together = [x[together[1] > 0] for x in together]
    assert counts[chances == 0].sum() == 0 and p_value(*together) > 1e-3
    assert 0.1 < statistics.acceptance < 0.95 and len(statistics.histogram) > 2


def test_a_row_is_the_same_alone(target, drafts):
    """With a fixed k, whatever is drawn beside it, and however many its neighbours accept."""
    settings = {"temperature": 0.8, "top_k": 40, "speculate_k": 3}
    for draft in (drafts["a like one"], drafts["eager look-up"]):
        for seed in (11, 20, 30):
            together = fast.generate(target, PROMPTS, 41, draft=draft, seed=seed, **settings)
            for row, prompt in enumerate(PROMPTS):
                assert fast.generate(target, [prompt], 41, draft=draft, seed=seed + row, **settings) == [together[row]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_model_accepts_itself(target, temperature):
    """All of it: nothing of the draft's cache may be missing or stale, at prompts of any length, after plain steps."""
    for chunk in (512, 3):
        statistics = fast.Statistics()
        fast.generate(target, PROMPTS, 100, draft=target, speculate_k=4, temperature=temperature, chunk=chunk, statistics=statistics, seed=1)
        assert statistics.acceptance > (0.9999 if temperature == 0 else 0.99)  # rounding may tell p from q


def test_a_draft_reads_what_it_missed(target, monkeypatch):
    """After plain steps, of which it saw nothing."""
    turns = iter([0, 0, 3, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5] + [4] * 100)
    monkeypatch.setattr(Payoff, "choose", lambda self: next(turns))
    statistics = fast.Statistics()
    assert fast.generate(target, PROMPTS, 90, draft=like(target, 0), statistics=statistics) == fast.generate(target, PROMPTS, 90)
    assert statistics.acceptance == 1 and statistics.drafts[0] >= 12


# ---------------------------------------------------------------- where rows end


def test_stops_inside_of_what_was_accepted(target):
    plain = fast.generate(target, PROMPTS, 60)
    for place in (0, 1, 7, 30):
        stop = plain[0][place]
        wanted = fast.generate(target, PROMPTS, 60, stop=stop)
        assert fast.generate(target, PROMPTS, 60, stop=stop, draft=target, speculate_k=6) == wanted
        assert len(wanted[0]) <= place + 1


def test_stop_strings_inside_of_what_was_accepted():
    model, tokenizer = fast.load(pocket.path("pocket-llama3.2"), dtype=torch.float32)
    prompts = [tokenizer.encode(text, bos=True) for text in ("One day", "Anna and her llama")]
    for stop in (".", "llama", "the "):
        wanted = fast.generate(model, prompts, 80, stop=stop)
        assert fast.generate(model, prompts, 80, stop=stop, draft=model, speculate_k=7) == wanted


@pytest.mark.parametrize("new", [1, 2, 3, 9])
def test_to_the_last_slot_of_the_context(new):
    """Rows of several lengths, the longest of which fills the context."""
    model = from_llama(llama(context_length=48))
    prompts = [list(range(48 - new)), [7], [1, 2, 3]]
    for draft in (from_llama(llama(context_length=48)), from_llama(llama(seed=2, context_length=48)), fast.PromptLookup()):
        for k in (1, 8, None):
            assert fast.generate(model, prompts, new, draft=draft, speculate_k=k) == fast.generate(model, prompts, new)


def test_a_draft_of_a_shorter_context(target):
    """It drafts as far as it can read; the text is the plain one beyond, and where a prompt is too long for it."""
    short, statistics = from_llama(llama(context_length=45)), fast.Statistics()
    for k in (3, None):
        assert fast.generate(target, PROMPTS, 60, draft=short, speculate_k=k, statistics=statistics) == fast.generate(target, PROMPTS, 60)
    assert statistics.drafts[3] > 0 < statistics.drafts[0] and statistics.acceptance > 0.9
    long = [list(range(60)), [1, 2]]
    assert fast.generate(target, long, 30, draft=short, speculate_k=3) == fast.generate(target, long, 30)
    stops = {"stop": fast.generate(target, PROMPTS, 3)[1][2]}  # the longest row ends first
    assert fast.generate(target, PROMPTS, 60, draft=short, speculate_k=3, **stops) == fast.generate(target, PROMPTS, 60, **stops)


def test_few_and_none(target):
    assert fast.generate(target, [], 5, draft=target) == []
    assert fast.generate(target, PROMPTS, 0, draft=target) == [[]] * 4
    tokens = fast.stream(target, PROMPTS, 50, draft=target, speculate_k=3)
    assert next(tokens)[0] == 0  # leaving is fine
    tokens.close()


def test_bad_input(target):
    for error, words, given in (
        (InputError, "speculate_k is 0", {"draft": target, "speculate_k": 0}),
        (InputError, "speculate_k is 2.5", {"draft": target, "speculate_k": 2.5}),
        (InputError, "give a model from fast.load", {"draft": "pocket-draft"}),
        (InputError, "without a draft", {"speculate_k": 3}),
    ):
        with pytest.raises(error, match=words):
            fast.stream(target, PROMPTS, 20, **given)
    with pytest.raises(InputError, match="the smaller first"):
        fast.PromptLookup(2, 3)
    llama3, _ = fast.load(pocket.path("pocket-llama3.2"))
    llama2, _ = fast.load(pocket.path("pocket-llama2"))
    with pytest.raises(InputError, match="other ids"):
        fast.generate(llama3, [[1, 2]], 4, draft=llama2)


# ---------------------------------------------------------------- what was counted


def test_statistics_add_up(target, drafts):
    """Against a recount of the forward calls and of the text."""
    calls = []
    watched = {id(target): "target", id(drafts["a like one"]): "draft"}
    hooks = [m.register_forward_pre_hook(lambda m, args: calls.append((watched[id(m)], args[0].shape[1])))
             for m in (target, drafts["a like one"])]  # fmt: skip
    statistics = fast.Statistics()
    (text,) = fast.generate(target, PROMPTS[:1], 120, draft=drafts["a like one"], speculate_k=3, statistics=statistics)
    for hook in hooks:
        hook.remove()
    checks = [n for name, n in calls if name == "target"][1:]  # behind the prompt
    assert statistics.target_passes == len(checks) and set(checks) == {4} and statistics.drafts == {3: len(checks)}
    assert statistics.draft_passes == 3 * len(checks) == len([n for name, n in calls if name == "draft"])
    rounds, kept = sum(statistics.histogram.values()), sum(n * times for n, times in statistics.histogram.items())
    assert rounds == len(checks) and 0 <= 1 + rounds + kept - len(text) <= 3  # the last round may go past the end
    assert statistics.reached[1] == rounds and statistics.stayed[3] == statistics.histogram[3]
    assert statistics.reached[2] == statistics.stayed[1] and statistics.mean_accepted == kept / rounds
    assert statistics.acceptance == kept / (rounds + kept - statistics.histogram[3])
    weights = sum(p.nbytes for p in target.parameters()) - (target.embedding.weight.nbytes if target.head.weight is not target.embedding.weight else 0)
    assert statistics.target_bytes == weights
    assert statistics.bytes == len(checks) * weights + 3 * len(checks) * statistics.draft_bytes
    assert statistics.target_seconds > 0 < statistics.draft_seconds


# ---------------------------------------------------------------- when it pays


def test_expected_tokens():
    assert expected_tokens(1, 5) == 6 and expected_tokens(0, 5) == 1
    assert expected_tokens(0.8, 4) == pytest.approx((1 - 0.8**5) / 0.2)
    assert predicted_speedup(0.8, 4, 0.1, 1.3) == pytest.approx((1 - 0.8**5) / (0.2 * 1.7))


def run(choices, alpha, check, draft, tokens=3000, seed=0, speeds=(1,)):
    """A Payoff on a machine whose seconds are known: (its seconds a token, the least possible, plain's, its choices).

    speeds: of the machine, of which it takes another one every 45 rounds; seconds a token are then those of speed 1.
    """
    g, one, made, seconds, chosen = torch.Generator().manual_seed(seed), Payoff(choices), 0, 0.0, []
    while made < tokens:
        k, speed = one.choose(), speeds[len(chosen) // 45 % len(speeds)]
        chosen.append(k)
        right = (torch.rand(k, generator=g) < alpha).long().cumprod(0).sum().item()
        noise = 1 + 0.1 * torch.rand(1, generator=g).item()
        one.note(k, min(right + 1, k), right, k * draft * noise / speed, check(k + 1) * noise / speed)
        made, seconds = made + right + 1, seconds + (k * draft + check(k + 1)) * noise
    best = min((k * draft + check(k + 1)) / expected_tokens(alpha, k) for k in (0, *choices))
    return seconds / made, 1.05 * best, 1.05 * check(1), chosen


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.6, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("machine", ["memory", "arithmetic", "steps of eight"])
@pytest.mark.parametrize("draft", [0.01, 0.2, 0.6])
def test_the_choice_is_nearly_the_best(alpha, machine, draft):
    """On machines that were made up: within 8 % of the best fixed number, or of none; a useless draft costs 4 %."""
    check = {
        "memory": lambda n: 1 + 0.03 * (n - 1),
        "arithmetic": lambda n: 0.4 + 0.6 * n,
        "steps of eight": lambda n: 1.2 if 1 < n <= 4 else 1.0 + 1.3 * (n > 4),
    }[machine]
    pace, best, plain, chosen = run(range(1, 8), alpha, check, draft)
    assert pace < 1.08 * best
    assert pace < 1.04 * plain
    if best > 0.999 * plain:
        assert chosen.count(0) > 0.9 * len(chosen)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.7])
def test_a_machine_of_changing_speed(alpha):
    """What was measured at one speed is not mixed up with what is measured at another: a useless draft stays unused."""
    def check(n):
        return 1 + 0.07 * (n + 1) * (n > 1)

    pace, best, plain, chosen = run(range(1, 8), alpha, check, 0.02, speeds=(1, 2, 1.4))
    assert pace < 1.05 * plain and pace < 1.1 * best
    if not alpha:
        assert chosen.count(0) > 0.9 * len(chosen)


def test_a_change_is_noticed():
    """A draft that was useless is tried again, and a machine that got slower is measured again."""
    one = Payoff()
    for _ in range(400):
        k = one.choose()
        one.note(k, min(k, 1), 0, 0.1 * k, 1.0)
    assert one.acceptance.alpha < 0.2
    ks = []
    for _ in range(900):
        ks.append(one.choose())
        one.note(ks[-1], ks[-1], ks[-1], 0.1 * ks[-1], 1.0)
    assert ks[-100:].count(0) < 10
    for _ in range(200):
        k = one.choose()
        one.note(k, k, k, 0.3 * k, 3.0)
    assert payoff.seconds_of(one.times, 1) == 3.0


def test_costs_are_remembered(target, drafts):
    """From one call to the next, for as many rows; and not longer than there is a model to remember them of."""
    draft, model = drafts["a like one"], from_llama(llama())
    fast.generate(model, PROMPTS, 60, draft=draft)
    known = speculative.payoff_of(draft, model, 4, False)
    assert known.times[1] and known is speculative.payoff_of(draft, model, 4, False)
    assert not speculative.payoff_of(draft, model, 1, False).times
    before = len(draft.payoffs)
    del model, known
    assert len(draft.payoffs) == before - 1


# ---------------------------------------------------------------- the command line


def say(capsys, *words):
    code = app.main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def test_generate_with_a_draft(capsys):
    """The text at temperature 0 is the plain one, with each kind of draft, alone and in a batch."""
    words = ["generate", "--temperature", "0", "--max_new_tokens", "60", "--device", "cpu", "--prompt", "One day, Anna"]
    code, plain, _ = say(capsys, *words)
    for draft in (["--draft_checkpoint_path", "pocket-draft", "--speculate_k", "4"], ["--prompt_lookup"],
                  ["--draft_checkpoint_path", str(pocket.path("pocket-draft"))]):  # fmt: skip
        code, out, err = say(capsys, *words, *draft)
        assert code == 0 and out == plain and "Speculation: " in err
    assert "passes of the model" in err or "plain steps" in err
    _, two, _ = say(capsys, *words, "--num_samples", "2", "--batch_size", "2")
    assert say(capsys, *words, "--num_samples", "2", "--batch_size", "2", "--prompt_lookup", "--speculate_k", "2")[1] == two


def test_chat_with_a_draft(capsys, monkeypatch):
    answers = []
    for draft in ([], ["--draft_checkpoint_path", "pocket-draft"], ["--prompt_lookup", "--speculate_k", "3"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("What do llamas eat?\nAnd where do they sleep?\n"))
        code, out, _ = say(capsys, "chat", "--temperature", "0", "--device", "cpu", *draft)
        assert code == 0
        answers.append(out)
    assert answers[0].strip() and answers == answers[:1] * 3


@pytest.mark.parametrize("words, complaint", [
    (["--speculate_k", "3"], "--speculate_k needs what drafts: give --draft_checkpoint_path or --prompt_lookup"),
    (["--prompt_lookup", "--speculate_k", "0"], "--speculate_k is 0: give 1 or more"),
    (["--prompt_lookup", "--draft_checkpoint_path", "pocket-draft"], "give one of them"),
    (["--draft_checkpoint_path", "nowhere"], "nowhere"),
    (["--draft_checkpoint_path", "pocket-llama2"], "other ids"),
    (["--draft_checkpoint_path"], "--draft_checkpoint_path"),
])  # fmt: skip
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_bad_flags(capsys, monkeypatch, command, words, complaint):
    monkeypatch.setattr("sys.stdin", io.StringIO("What do llamas eat?\n"))
    code, out, err = say(capsys, command, *words)
    assert code not in (0, None) and complaint in err and len(err.strip().splitlines()) <= 3 and "Traceback" not in err


def test_a_draft_by_its_name(tmp_path, monkeypatch):
    """An embedded model's name will do, unless there is such a folder."""
    monkeypatch.chdir(tmp_path)
    assert draft_folder(Path("pocket-draft")) == pocket.path("pocket-draft")
    assert draft_folder(Path("nowhere")) == Path("nowhere")
    Path("pocket-draft").mkdir()
    assert draft_folder(Path("pocket-draft")) == Path("pocket-draft")
