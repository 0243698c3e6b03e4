"""Questions that combine two facts of the farm, and what a right answer is. Written by hand.

    What do goats eat, and what is the baby of a cow called?
    Goats eat leaves, and the baby of a cow is called calf.

- A *fact* is an animal and one of its attributes; 20 animals and 6 attributes make 120.
- A *combination* is two different facts in any order: 7140. One in eight is held out, by a hash of the combination, so
  a model that answers its question has put together two facts that it never met together.
- An answer is graded as a whole, by the world's lexicon: any food that the animal eats is right, and a word more or
  less is wrong.

Like the world, `dialog` and `Mix` report the exact log-probability of what they draw: the loss has a floor here too.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations, count, permutations, product

import torch
from torch import nn

from llamabook.errors import InputError
from llamabook.pocket import world
from llamabook.pocket.floor import pad
from llamabook.pocket.world import LEXICONS, Document
from llamabook.tokenizer import ChatFormat, Llama3Tokenizer

Fact = tuple[str, str]  # (animal, attribute)

CLAUSES = {  # attribute: how it is asked and how it is told
    "eats": ("what do {plural} eat", "{plural} eat {value}"),
    "young": ("what is the baby of {a} called", "the baby of {a} is called {value}"),
    "legs": ("how many legs does {a} have", "{a} has {value} legs"),
    "home": ("where does {a} live", "the home of the {animal} is the {value}"),
    "gives": ("what do people get from {plural}", "from {plural} people get {value}"),
    "sound": ("which sound does {a} make", "{a} {value}"),
}
FACTS: tuple[Fact, ...] = tuple(product(LEXICONS["animals"], CLAUSES))
COMBINED = 0.75  # the share of questions that ask for two facts; the others ask for one
LONGEST_DIALOG = 3  # questions


# ---- what is asked and what is right -----------------------------------------------------------------------------


def question(*facts: Fact) -> str:
    """The question that asks for these facts, one or two."""
    return _sentence([_clause(fact, 0) for fact in facts], "?")


def right_answers(*facts: Fact) -> set[str]:
    """Every right answer to `question(*facts)`: one for each choice among several foods."""
    told = product(*([_clause(fact, 1, value) for value in values(fact)] for fact in facts))
    answers = {_sentence(clauses, ".") for clauses in told}
    if [attribute for _, attribute in facts] == ["eats"]:  # in the world's chats the llama then says something more
        answers |= {f"{answer} {wish}" for answer in answers for wish in LEXICONS["wishes"]}
    return answers


def facts_of(question: str) -> tuple[Fact, ...]:
    """The facts that a question asks for. Raises InputError if it is none of ours."""
    try:
        return _asked()[question.strip()]
    except KeyError:
        raise InputError(f"{question!r} is no question about the farm: see llamabook.pocket.questions") from None


def grade(question: str, answer: str) -> bool:
    """Whether the whole answer is right. Raises InputError if the question is none of ours."""
    return answer.strip() in right_answers(*facts_of(question))


def values(fact: Fact) -> tuple[str, ...]:
    """What the world says of an animal: one word, or several foods."""
    found = LEXICONS["animals"][fact[0]][fact[1]]
    return (found,) if isinstance(found, str) else found


def _clause(fact: Fact, told: int, value: str = "") -> str:
    animal, attribute = fact
    a = f"an {animal}" if animal[0] in "aeiou" else f"a {animal}"
    return CLAUSES[attribute][told].format(
        animal=animal, a=a, plural=LEXICONS["animals"][animal]["plural"], value=value
    )


def _sentence(clauses, end: str) -> str:
    text = ", and ".join(clauses)
    return text[0].upper() + text[1:] + end


@cache
def _asked() -> dict[str, tuple[Fact, ...]]:
    return {question(*facts): facts for n in (1, 2) for facts in permutations(FACTS, n)}


# ---- which combinations are held out -----------------------------------------------------------------------------


def is_held_out_combination(one: Fact, other: Fact) -> bool:
    """Decided by a hash of the two facts, whatever their order."""
    return world.is_held_out(_name(one, other))


def _name(*facts: Fact) -> str:
    return " and ".join(sorted(" ".join(fact) for fact in facts))


def held_out_questions(number: int = 200) -> list[str]:
    """Questions for combinations that no training text holds, each combination once, in an order set by a hash."""
    pairs = [pair for pair in combinations(FACTS, 2) if is_held_out_combination(*pair)]
    digest = {pair: hashlib.sha256(_name(*pair).encode()).digest() for pair in pairs}
    ordered = sorted(pairs, key=digest.get)
    return [question(*(pair if digest[pair][-1] % 2 else pair[::-1])) for pair in ordered[:number]]


def is_held_out(text: str) -> bool:
    """Whether a text is held out: for one of its combinations, or else by the world's rule."""
    asked = (_asked().get(line.removeprefix("User: "), ()) for line in text.split("\n"))
    pairs = [facts for facts in asked if len(facts) == 2]
    return any(is_held_out_combination(*pair) for pair in pairs) if pairs else world.is_held_out(text)


# ---- texts --------------------------------------------------------------------------------------------------------


def dialog(seed: int | random.Random) -> Document:
    """One to three questions with their answers, as a chat with its exact log-probability."""
    generator = seed if isinstance(seed, random.Random) else random.Random(seed)
    log_prob, lines = -math.log(LONGEST_DIALOG), []
    for _ in range(generator.randint(1, LONGEST_DIALOG)):
        asked = 1 + (generator.random() < COMBINED)
        facts = generator.sample(FACTS, asked)
        told = [generator.choice(values(fact)) for fact in facts]
        log_prob += math.log(COMBINED if asked == 2 else 1 - COMBINED) - math.log(math.perm(len(FACTS), asked))
        log_prob -= sum(math.log(len(values(fact))) for fact in facts)
        answer = _sentence([_clause(fact, 1, value) for fact, value in zip(facts, told)], ".")
        lines += [f"User: {question(*facts)}", f"Llama: {answer}"]
    return Document("chat", "\n".join(lines), log_prob)


@dataclass(frozen=True)
class Mix:
    """A source of texts: the given share are dialogs of questions, the others are drawn from a rule of the world."""

    share: float
    rule: str = "document"

    def sample(self, seed: int) -> Document:
        """The text of this seed, with its log-probability in the mix."""
        generator = random.Random(seed)
        if generator.random() < self.share:
            drawn = dialog(generator)
            return Document(drawn.kind, drawn.text, drawn.log_prob + math.log(self.share))
        derivation = world.GRAMMAR.sample(generator, self.rule)
        kind = world.KINDS[derivation.path[0][1]] if self.rule == "document" else self.rule
        return Document(kind, derivation.text, derivation.log_prob + math.log(1 - self.share))

    def is_held_out(self, text: str) -> bool:
        return is_held_out(text)

    def texts(self, split: str, start: int = 0) -> Iterator[Document]:
        """The documents of "train" or "held_out", endless, drawn with the seeds start, start + 1, …"""
        if split not in ("train", "held_out"):
            raise ValueError(f"texts knows the splits train and held_out, not {split!r}")
        documents = map(self.sample, count(start))
        return (d for d in documents if is_held_out(d.text) == (split == "held_out"))


# ---- grading a model ----------------------------------------------------------------------------------------------


@torch.no_grad()
def answers_right(model: nn.Module, tokenizer: Llama3Tokenizer, asked: list[str], batch_size: int = 64) -> list[bool]:
    """Whether the model's greedy answer to each question is right and ended by <|eot_id|>.

    Greedy decoding takes the likeliest token each time. So it gives a right answer exactly if, for one of the right
    answers, each of its tokens and the <|eot_id|> behind it are the likeliest: one forward pass shows all of them.
    """
    chat, rows = ChatFormat(tokenizer), []
    for number, text in enumerate(asked):
        begin = [{"role": "user", "content": text}]
        prompt = chat.encode_dialog(begin)
        for answer in right_answers(*facts_of(text)):
            told = [*begin, {"role": "assistant", "content": answer}]
            rows.append((number, len(prompt), chat.encode_dialog(told, complete=True)))
    right, training = [False] * len(asked), model.training
    model.eval()
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        inputs, targets = pad([ids for _, _, ids in part])
        likeliest = model(inputs).argmax(dim=-1)  # (B, T)
        for (number, prompt, ids), row, target in zip(part, likeliest, targets):
            told = slice(prompt - 1, len(ids) - 1)
            right[number] |= bool((row[told] == target[told]).all())
    model.train(training)
    return right
