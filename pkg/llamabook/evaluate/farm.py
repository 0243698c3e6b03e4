"""Three tasks about the llama farm, for lm-eval, that need no download. Written by hand.

| task | what is asked | chance | the world itself |
|---|---|---|---|
| `farm_facts` | questions, the last one about an animal; which of four answers follows? | 1/4 | 1 |
| `farm_endings` | a story; which of four endings follows? | 1/4 | 1 |
| `farm_answers` | questions; the last answer is to be written, word for word | 0 | 1 |

All are made of texts that no embedded model was trained on. A wrong answer is one about another animal, or for another
animal; a wrong ending has a name or a place that is not the story's, or who is who mixed up. The grammar gives them
probability 0, so a model that has learnt the world is always right. The same seed gives the same questions everywhere.
"""

import copy
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, islice

from llamabook.pocket import world
from llamabook.pocket.grammar import Grammar
from llamabook.pocket.world import GRAMMAR, LEXICONS, QUESTION_RULES, SLOTS, STORY_RULES

WRONG = 3  # choices beside the right one
FACTS_ASKED = QUESTION_RULES["pair"][:6]  # about an animal, one for each attribute but its coat
DRAWN = 400  # questions of a task


@dataclass(frozen=True)
class FarmTask:
    """A task: its name, how it is answered, and its questions, rows with the keys query and, for a choice, choices
    and gold, the place of the right one, else right, the list of right answers.
    """

    name: str
    output_type: str  # multiple_choice or generate_until
    rows: Callable[[], list[dict]]

    def config(self) -> dict:
        """The task as lm-eval takes it: the keys of one of its YAML files."""
        common = {
            "task": self.name,
            "custom_dataset": self.dataset,
            "output_type": self.output_type,
            "test_split": "test",
            "doc_to_text": "query",
            "num_fewshot": 0,
        }
        if self.output_type == "multiple_choice":
            metrics = [metric(name) for name in ("acc", "acc_norm")]
            return common | {"doc_to_choice": "choices", "doc_to_target": "gold", "metric_list": metrics}
        return common | {
            "doc_to_target": "right",
            "metric_list": [metric("exact_match")],
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 32, "do_sample": False},
            "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        }

    def dataset(self, **_) -> dict:
        """The questions as lm-eval wants to hold them."""
        from datasets import Dataset

        return {"test": Dataset.from_list(self.rows())}


def metric(name: str) -> dict:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


# ---- farm_facts and farm_answers: texts of questions and answers, without the last answer --------------------------


@cache
def facts(seed: int = 0, number: int = DRAWN) -> list[dict]:
    """Texts that end with a question about an animal; the wrong answers are right for other animals."""
    known = facts_asked()
    drawn = (fact(text, known, random.Random(f"{seed} {i}")) for i, text in enumerate(held_out_texts(seed)))
    return list(islice(filter(None, drawn), number))


def fact(text: str, known: dict, generator: random.Random) -> dict | None:
    """One text, or None if it does not end with a question about an animal."""
    query, _, told = text.rpartition(" Answer: ")
    question = query.rpartition("\n")[2]
    if question not in known:
        return None
    rule, right = known[question]
    others = {answer for other, answers in known.values() if other == rule for answer in answers}
    return choice(f"{query} Answer:", told, generator.sample(sorted(others - right), WRONG), generator)


def facts_asked() -> dict[str, tuple[str, set[str]]]:
    """Each of the 120 questions about an animal: the rule that asks it, and all its right answers."""
    known: dict[str, tuple[str, set[str]]] = {}
    for rule in FACTS_ASKED:
        for pair in Grammar({"pair": [rule]}, LEXICONS, SLOTS).enumerate("pair"):
            question, answer = pair.text.split(" Answer: ")
            known.setdefault(question, (rule, set()))[1].add(answer)
    return known


@cache
def answers(seed: int = 0, number: int = DRAWN) -> list[dict]:
    """Texts that end with any question."""
    return [answer(text) for text in islice(held_out_texts(seed), number)]


def answer(text: str) -> dict:
    """One text. Where an animal eats several foods, each of them is right."""
    query, _, told = text.rpartition(" Answer: ")
    question = query.rpartition("\n")[2]
    foods = {food for animal in LEXICONS["animals"].values() for food in animal["eats"]}
    others = {re.sub(r"( eats?) \w+\.$", rf"\1 {food}.", told) for food in foods}
    right = [other for other in others if GRAMMAR.parse(f"{question} Answer: {other}", "pair", limit=1)]
    return {"query": f"{query} Answer:", "right": sorted(right)}


def held_out_texts(seed: int) -> Iterator[str]:
    """Texts of questions that nobody was trained on, each up to its last answer once."""
    begun: set[str] = set()
    for i in count():
        text = GRAMMAR.sample(random.Random(f"{seed} {i}"), "questions").text
        query = text.rpartition(" Answer: ")[0]
        if world.is_held_out(text) and query not in begun:
            begun.add(query)
            yield text


# ---- farm_endings --------------------------------------------------------------------------------------------------


@cache
def endings(seed: int = 0, number: int = DRAWN) -> list[dict]:
    """Held-out stories without their last words, which are to be chosen among four."""
    drawn = (ending(random.Random(f"{seed} {i}")) for i in count())
    return list(islice(filter(None, drawn), number))


def ending(generator: random.Random) -> dict | None:
    """One story, or None if it is not held out. The wrong endings name somebody or some place else in the same words."""
    names = [generator.choice(list(LEXICONS[lexicon])) for lexicon in ("people", "llamas", "homes")]
    begun, words = generator.getrandbits(32), generator.getrandbits(32)
    story, right = part("begun", begun, *names), part("closing", words, *names)
    if not world.is_held_out(f"{story} {right}"):
        return None
    hero, llama, place = names
    wrong = {part("closing", words, llama, hero, place)}  # who is who
    while len(wrong - {right}) < WRONG:
        other = list(names)
        changed = generator.randrange(3)
        other[changed] = generator.choice(list(LEXICONS[("people", "llamas", "homes")[changed]]))
        wrong.add(part("closing", words, *other))
    return choice(story, right, generator.sample(sorted(wrong - {right}), WRONG), generator)


def part(rule: str, seed: int, hero: str, llama: str, place: str) -> str:
    """The words of a rule of this seed, with this hero, llama and place."""
    return story_of(hero, llama, place).sample(random.Random(seed), rule).text


STORIES = Grammar({**STORY_RULES, "begun": ["<opening> <meeting><asides> <plot>"]}, LEXICONS, SLOTS)


def story_of(hero: str, llama: str, place: str) -> Grammar:
    """The grammar of stories, with one entry where it would draw a hero, a llama or a place."""
    everybody, grammar = LEXICONS["people"] | LEXICONS["llamas"], copy.copy(STORIES)
    held = {"people": {hero: everybody[hero]}, "llamas": {llama: everybody[llama]}, "homes": {place: LEXICONS["homes"][place]}}
    grammar.lexicons = LEXICONS | held
    return grammar


def choice(query: str, right: str, wrong: list[str], generator: random.Random) -> dict:
    """A row whose right choice stands anywhere among the wrong ones."""
    choices = [right, *wrong]
    generator.shuffle(choices)
    return {"query": query, "choices": choices, "gold": choices.index(right)}


TASKS = {
    task.name: task
    for task in (
        FarmTask("farm_facts", "multiple_choice", facts),
        FarmTask("farm_endings", "multiple_choice", endings),
        FarmTask("farm_answers", "generate_until", answers),
    )
}
