"""The world's probabilities are exact: by enumeration, by frequency, by a second walk (parsing), and by mutants."""

import collections
import itertools
import math
import random
import re

import pytest

from llamabook.pocket import world
from llamabook.pocket.grammar import Grammar, GrammarError

# A farm small enough to enumerate, with every feature of the notation.
SMALL = dict(
    rules={
        "text": [(3, "<meet><asides> <end>"), "In the {place}, {hero} slept."],
        "meet": ["{hero} met {llama}, {color.a} llama.", "{Color.a} llama named {llama} met {hero}."],
        "asides": ["", " <aside>", " <aside> <aside>"],
        "aside": ["{friends} saw them.", "{llama} {llama.does}.", (2, "{hero.He} laughed.")],
        "end": ["{hero} fed {hero.his} llama.", "{llama} ate {animal.eats}.", "{friend} came to the {place}."],
    },
    lexicons={
        "friends": {"Ruth": {"his": "her"}, "Otto": {"his": "his"}, "Max": {"his": "his"}},
        "people": {"Ana": {"he": "she", "his": "her"}, "Tom": {"he": "he", "his": "his"}, "Kai": {"he": "he", "his": "his"}},
        "llamas": {"Coco": {"does": ("hums", "sits", "hums and sits")}, "Dusty": {"does": "eats"}},
        "colors": {"white": {}, "orange": {}},
        "places": {"barn": {}, "pond": {}, "wood": {}},
        "animals": {"goat": {"eats": ("hay", "leaves")}, "hen": {"eats": "corn"}},
    },
    slots={"hero": "people", "friend": "friends", "llama": "llamas", "color": "colors", "place": "places", "animal": "animals"},
)


def changed(**rules) -> Grammar:
    return Grammar({**SMALL["rules"], **rules}, SMALL["lexicons"], SMALL["slots"])


def total_over_distinct_texts(grammar: Grammar) -> float:
    """The sum of the reported probability over the distinct texts, each counted once."""
    reported = {}
    for derivation in grammar.enumerate("text"):
        reported.setdefault(derivation.text, derivation.log_prob)
    return math.fsum(math.exp(p) for p in reported.values())


def most_derivations(grammar: Grammar) -> int:
    counts = collections.Counter(d.text for d in grammar.enumerate("text"))
    return max(counts.values())


@pytest.fixture(scope="module")
def small() -> Grammar:
    # `goat` and `hen` are told apart by what they eat; "corn", "hay" and "leaves" show which one was drawn.
    return Grammar(**SMALL)


def test_probabilities_of_the_distinct_texts_sum_to_one(small):
    assert most_derivations(small) == 1
    assert total_over_distinct_texts(small) == pytest.approx(1, abs=1e-12)


def test_sampling_frequencies_match_the_reported_probabilities(small):
    drawn = [small.sample(random.Random(seed), "text") for seed in range(20_000)]
    truth = {d.text: math.exp(d.log_prob) for d in small.enumerate("text")}
    for d in drawn[:500]:
        assert truth[d.text] == pytest.approx(math.exp(d.log_prob))
    # Chi-square over cells of texts that share their first 18 characters: enough draws in each.
    cell = lambda text: text[:18]  # noqa: E731
    expected, seen = collections.Counter(), collections.Counter(cell(d.text) for d in drawn)
    for text, p in truth.items():
        expected[cell(text)] += p * len(drawn)
    assert min(expected.values()) > 5 and len(expected) > 20
    chi2 = sum((seen[c] - e) ** 2 / e for c, e in expected.items())
    freedom = len(expected) - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


def test_parse_finds_the_one_derivation_and_its_probability(small):
    for d in small.enumerate("text"):
        (found,) = small.parse(d.text, "text", limit=5)
        assert found.log_prob == pytest.approx(d.log_prob) and found.path == d.path
    assert small.parse("Ana met Coco.", "text") == []
    assert small.parse("", "text") == []


MUTANTS = {
    "two ways to the same text": changed(end=["{hero} fed {hero.his} llama.", "{hero} fed {hero.his} llama.", "{friend} came."]),
    "optional twice": changed(asides=["", " <aside>", "<more>"], more=["", " <aside>"]),
    "a draw that is never shown": changed(end=["{hero} fed {hero.his} llama.", "The hat was in {friends.his} hand."]),
    "an attribute that several entries share": changed(end=["{friend.His} hat was red."]),
    "the same rule twice, each time optional": changed(text=["<asides><asides>"], asides=["", "<aside>"]),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_ambiguity_and_unshown_choices_are_caught(name):
    mutant = MUTANTS[name]
    assert most_derivations(mutant) > 1
    assert total_over_distinct_texts(mutant) < 1 - 1e-6
    ambiguous = next(t for t, n in collections.Counter(d.text for d in mutant.enumerate("text")).items() if n > 1)
    assert len(mutant.parse(ambiguous, "text")) == 2


def test_the_notation_keeps_forgets_and_draws_anew(small):
    for d in itertools.islice(small.enumerate("text"), 5000):
        assert "  " not in d.text and "{" not in d.text and "<" not in d.text
    names = lambda d: tuple(re.findall(r"Ana|Tom|Kai", d.text))  # noqa: E731
    kept = {names(d) for d in changed(text=["{hero}, {hero}"]).enumerate("text")}
    assert kept == {(n, n) for n in ("Ana", "Tom", "Kai")}
    forgot = {names(d) for d in changed(text=["{hero}, {hero}{~hero}, {hero}, {hero}"]).enumerate("text")}
    assert forgot == {(a, a, b, b) for a, b in itertools.product(("Ana", "Tom", "Kai"), repeat=2)}
    anew = {names(d) for d in changed(text=["{hero}, {people}, {hero}, {people}"]).enumerate("text")}
    assert anew == {(a, b, a, c) for a, b, c in itertools.product(("Ana", "Tom", "Kai"), repeat=3)}
    assert {d.text for d in changed(text=["{Color.a} and {color.a}"]).enumerate("text")} == {"A white and a white", "An orange and an orange"}


def test_a_mark_that_names_nothing_is_refused():
    with pytest.raises(GrammarError, match="<nowhere>"):
        changed(end=["<nowhere>"])
    with pytest.raises(GrammarError, match="{nobody}"):
        changed(end=["{nobody} came."])
    with pytest.raises(GrammarError, match="no attribute"):
        list(changed(end=["{hero.age} years."]).enumerate("text"))
    with pytest.raises(GrammarError, match="slot and lexicon at once: people"):
        Grammar(SMALL["rules"], SMALL["lexicons"], {**SMALL["slots"], "people": "people"})


# ---- the farm itself ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents() -> list[world.Document]:
    return [world.sample(seed) for seed in range(4000)]


def test_the_same_seed_gives_the_same_text(documents):
    assert [world.sample(seed) for seed in range(50)] == documents[:50]
    assert len({d.text for d in documents[:1000] if d.kind == "story"}) == sum(d.kind == "story" for d in documents[:1000])


def test_every_text_of_the_farm_has_one_derivation(documents):
    """Of the first texts all, and of the others enough that every alternative of every rule was taken."""
    untried = {(rule, i) for rule, alternatives in world.GRAMMAR.rules.items() for i in range(len(alternatives))}
    for seed, d in enumerate(documents):
        path = set(world.GRAMMAR.sample(random.Random(seed), "document").path)
        if seed < 300 or path & untried:
            untried -= path
            (found,) = world.GRAMMAR.parse(d.text, "document", limit=3)
            assert found.log_prob == pytest.approx(d.log_prob, abs=1e-9)
    assert not untried
    assert world.parse(documents[0].text) == documents[0]


def test_a_wrong_word_leaves_the_language():
    story = next(d for d in map(world.sample, range(100)) if d.kind == "story")
    words = story.text.split()
    broken = " ".join([*words[:20], "spaceship", *words[21:]])
    assert world.parse(broken) is None
    assert len(" ".join(words[:20])) <= world.GRAMMAR.furthest(broken, "document") < len(broken)
    assert world.parse(story.text, "chat") is None and world.parse(story.text, "story") == story


def test_stories_are_rich(documents):
    stories = [d for d in documents if d.kind == "story"]
    lengths = {world.sentences(d.text) for d in stories}
    assert min(lengths) >= 5 and max(lengths) <= 15
    words = {w.lower() for d in documents for w in re.findall(r"[A-Za-z]+", d.text)}
    assert len(words) >= 600
    patterns = [a for rule in world.STORY_RULES.values() for a in rule if "{" in str(a)]
    assert len(patterns) >= 60
    openings = {" ".join(d.text.split()[:12]) for d in stories[:10]}
    assert len(openings) == 10


def test_characters_places_and_things_stay_the_same(documents):
    """Checked on the texts alone: in a story of the lost thing, only one thing is lost, found and asked for."""
    for d in documents:
        if d.kind == "story" and (asked := re.search(r'"Where is my (\w+)\?"', d.text)):
            endings = re.findall(r"(?:found the|there lay the|In the end the|had kept the) (\w+)", d.text)
            assert endings == [asked[1]]
        if opening := re.match(r"Once there was a (girl|boy) named (\w+),", d.text):
            assert opening[1] == world.LEXICONS["people"][opening[2]]["child"]
            pronoun = {"girl": ("he", "his", "him"), "boy": ("she", "her")}[opening[1]]
            assert opening[2] in d.text and not re.search(rf"There {pronoun[0]} met", d.text)


def test_kinds_come_in_their_proportions(documents):
    share = collections.Counter(d.kind for d in documents)
    for kind, weight in zip(world.KINDS, (0.64, 0.08, 0.12, 0.16)):
        assert abs(share[kind] / len(documents) - weight) < 4 * math.sqrt(weight * (1 - weight) / len(documents))


def test_chats_have_alternating_turns(documents):
    chats = [d for d in documents if d.kind == "chat"]
    assert {len(d.turns) for d in chats} == {2, 4, 6}
    for d in chats:
        assert [t["role"] for t in d.turns] == ["user", "assistant"] * (len(d.turns) // 2)
        assert all(t["content"].strip() == t["content"] != "" for t in d.turns)
    assert all(d.turns == [] for d in documents if d.kind != "chat")


def test_training_and_held_out_texts_never_meet():
    train = [d.text for d in itertools.islice(world.texts("train"), 3000)]
    held_out = [d.text for d in itertools.islice(world.texts("held_out"), 400)]
    assert not set(train) & set(held_out)
    assert all(map(world.is_held_out, held_out)) and not any(map(world.is_held_out, train))
    with pytest.raises(ValueError, match="held_out"):
        next(world.texts("test"))


def test_entropy_is_the_mean_surprise_with_its_error():
    estimate = world.entropy(1500, count_tokens=lambda d: len(d.text.split()))
    again = world.entropy(1500, seed=50_000, count_tokens=lambda d: len(d.text.split()))
    for name in ("per_document", "per_character", "per_token"):
        (a, ea), (b, eb) = getattr(estimate, name), getattr(again, name)
        assert a > 0 and 0 < ea < 0.02 * a
        assert abs(a - b) < 4 * math.hypot(ea, eb)
    assert estimate.per_document[0] / estimate.per_character[0] == pytest.approx(
        sum(len(world.sample(s).text) for s in range(1500)) / 1500
    )


def test_entropy_of_a_small_grammar_is_the_enumerated_one(small, monkeypatch):
    truth = -math.fsum(math.exp(d.log_prob) * d.log_prob for d in small.enumerate("text"))
    nats = [-small.sample(random.Random(s), "text").log_prob for s in range(20_000)]
    mean = sum(nats) / len(nats)
    error = math.sqrt(sum((x - mean) ** 2 for x in nats) / len(nats)) / math.sqrt(len(nats))
    assert abs(mean - truth) < 4 * error
