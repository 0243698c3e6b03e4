"""A probabilistic grammar with memory, written by hand: it samples, enumerates and parses texts with exact probabilities.

A *rule* names alternatives. An alternative is text with two kinds of marks:

- `<rule>` is replaced by an alternative of that rule;
- `{name}` shows an entry of a lexicon, drawn uniformly. If the name is that of a lexicon (`{foods}`), it is drawn anew
  each time. If it is that of a *slot* (`{hero}`), the slot remembers it: a name that was drawn once stays the same to
  the end of the text. `{~slot}` makes the slot forget, and shows nothing.

`{name.attribute}` shows an attribute of the entry instead of the entry itself (`{hero.his}`); an attribute with several
values draws one of them. `{name.a}` puts the article before the entry. A capital (`{Name}`, `{name.He}`) capitalizes
what is shown.

Sampling, enumerating and parsing are three ways to walk through the same choices (`Grammar._options`), so they can't
disagree about a probability. A text's reported log-probability is that of one derivation: it is the text's own exactly
when no text has two derivations, which `parse` counts and the tests check.
"""

import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

MARK = re.compile(r"<(?P<rule>\w+)>|\{(?P<draw>[~\w.]+)\}")


class GrammarError(ValueError):
    """A rule, slot or attribute that the grammar does not define."""


@dataclass(frozen=True)
class Derivation:
    """One way to derive a text: the text, its natural log-probability, and the alternatives taken, in order."""

    text: str
    log_prob: float
    path: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class _Option:
    """One possible next step: its probability, the text it shows and what it changes."""

    prob: float
    text: str = ""
    push: tuple = ()  # symbols that replace the current one
    bind: tuple | None = None  # (slot, entry or None)
    taken: tuple | None = None  # (rule, number of the alternative)


@dataclass(frozen=True)
class _State:
    """A position in a derivation. `pending` is a linked list of symbols still to be replaced: (symbol, rest) or None."""

    pending: tuple | None
    bound: dict = field(default_factory=dict)
    log_prob: float = 0.0
    path: tuple = ()

    def step(self, option: _Option) -> "_State":
        pending = self.pending[1]
        for symbol in reversed(option.push):
            pending = (symbol, pending)
        bound = self.bound if option.bind is None else {**self.bound, option.bind[0]: option.bind[1]}
        path = self.path if option.taken is None else (*self.path, option.taken)
        return _State(pending, bound, self.log_prob + math.log(option.prob), path)


class Grammar:
    """Rules and lexicons.

    Args:
        rules: rule name to alternatives, each a text or a pair (weight, text); weights are relative.
        lexicons: lexicon name to entries, each entry (its text) to its attributes, texts or tuples of texts.
        slots: slot name to the name of the lexicon it draws from.
    Raises GrammarError for a mark that names no rule, slot or lexicon, and for a slot that is named like a lexicon.
    """

    def __init__(self, rules: dict, lexicons: dict, slots: dict[str, str]):
        self.lexicons, self.slots = lexicons, slots
        self.rules = {name: [_alternative(a) for a in alternatives] for name, alternatives in rules.items()}
        if both := set(slots) & set(lexicons):
            raise GrammarError(f"slot and lexicon at once: {', '.join(sorted(both))}")
        for name, alternatives in self.rules.items():
            for _, symbols in alternatives:
                for kind, value in symbols:
                    if kind == "rule" and value not in self.rules:
                        raise GrammarError(f"rule <{name}> mentions <{value}>, which no rule defines")
                    if kind == "draw" and _mark(value)[0] not in {*slots, *lexicons}:
                        raise GrammarError(f"rule <{name}> mentions {{{value}}}, which is no slot and no lexicon")
        self._expansions = {name: self._expand(name) for name in self.rules}

    # ---- the choices: the only place where probabilities come from ------------------------------------------------

    def _options(self, state: _State) -> list[_Option]:
        kind, value = state.pending[0]
        if kind == "text":
            return [_Option(1.0, value)]
        return self._expansions[value] if kind == "rule" else self._draw(value, state)

    def _expand(self, rule: str) -> list[_Option]:
        alternatives = self.rules[rule]
        total = sum(weight for weight, _ in alternatives)
        return [_Option(w / total, push=s, taken=(rule, i)) for i, (w, s) in enumerate(alternatives)]

    def _draw(self, mark: str, state: _State) -> list[_Option]:
        name, attribute, capital, forget = _mark(mark)
        if forget:
            return [_Option(1.0, bind=(name, None))]
        lexicon = self.slots.get(name, name)
        held = state.bound.get(name)
        options = []
        entries = self.lexicons[lexicon] if held is None else [held]
        for entry in entries:
            texts = self._texts(lexicon, entry, attribute, capital)
            bind = (name, entry) if name in self.slots and held is None else None
            options += [_Option(1 / (len(entries) * len(texts)), text, bind=bind) for text in texts]
        return options

    def _texts(self, lexicon: str, entry: str, attribute: str | None, capital: bool) -> tuple[str, ...]:
        """What `{name.attribute}` can show for this entry."""
        attributes = self.lexicons[lexicon][entry]
        if attribute is None:
            found = entry
        elif attribute in attributes:
            found = attributes[attribute]
        elif attribute == "a":
            found = f"an {entry}" if entry[0].lower() in "aeiou" else f"a {entry}"
        else:
            raise GrammarError(f"{entry!r} of {lexicon} has no attribute {attribute!r}")
        texts = (found,) if isinstance(found, str) else found
        return tuple(t[0].upper() + t[1:] for t in texts) if capital else tuple(texts)

    # ---- three walks through the choices --------------------------------------------------------------------------

    def sample(self, generator: random.Random, start: str) -> Derivation:
        """Draw one derivation of `<start>`."""
        state, text = _State((("rule", start), None)), []
        while state.pending:
            options = self._options(state)
            option = options[0]
            if len(options) > 1:
                left = generator.random()
                for option in options:
                    left -= option.prob
                    if left < 0:
                        break
            text.append(option.text)
            state = state.step(option)
        return Derivation("".join(text), state.log_prob, state.path)

    def enumerate(self, start: str) -> Iterator[Derivation]:
        """Every derivation of `<start>`. Only for small grammars."""
        stack = [(_State((("rule", start), None)), "")]
        while stack:
            state, text = stack.pop()
            if state.pending is None:
                yield Derivation(text, state.log_prob, state.path)
                continue
            stack += [(state.step(o), text + o.text) for o in reversed(self._options(state))]

    def parse(self, text: str, start: str, limit: int = 2) -> list[Derivation]:
        """The derivations of `text` from `<start>`, at most `limit` of them: none if the text is not in the language."""
        found, stack = [], [(_State((("rule", start), None)), 0)]
        while stack and len(found) < limit:
            state, at = stack.pop()
            if state.pending is None:
                if at == len(text):
                    found.append(Derivation(text, state.log_prob, state.path))
                continue
            for option in reversed(self._options(state)):
                if text.startswith(option.text, at):
                    stack.append((state.step(option), at + len(option.text)))
        return found

    def furthest(self, text: str, start: str) -> int:
        """How many leading characters of `text` some derivation of `<start>` shows: where a text leaves the language."""
        best, stack = 0, [(_State((("rule", start), None)), 0)]
        while stack:
            state, at = stack.pop()
            best = max(best, at)
            if state.pending is None:
                continue
            for option in self._options(state):
                if text.startswith(option.text, at):
                    stack.append((state.step(option), at + len(option.text)))
        return best


def _alternative(alternative) -> tuple[float, tuple]:
    """'text with <rule> and {name}' or (weight, 'text …') to (weight, symbols)."""
    weight, text = (1.0, alternative) if isinstance(alternative, str) else alternative
    symbols, at = [], 0
    for mark in MARK.finditer(text):
        if mark.start() > at:
            symbols.append(("text", text[at : mark.start()]))
        symbols.append(("rule", mark["rule"]) if mark["rule"] else ("draw", mark["draw"]))
        at = mark.end()
    if at < len(text):
        symbols.append(("text", text[at:]))
    return float(weight), tuple(symbols)


def _mark(mark: str) -> tuple[str, str | None, bool, bool]:
    """'{Name.attribute}' to (name, attribute, capital, forget)."""
    forget = mark.startswith("~")
    name, _, attribute = mark.lstrip("~").partition(".")
    capital = name[0].isupper() or attribute[:1].isupper()
    return name[0].lower() + name[1:], (attribute[0].lower() + attribute[1:]) if attribute else None, capital, forget
