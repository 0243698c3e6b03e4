"""Learning a tokenizer of Llama 3's kind, written by hand: `train_ranks(texts, size)` gives a tiktoken ranks file.

Byte-level byte-pair encoding (chapter 2, notebook 02): start with the 256 bytes, join the two neighbours that occur
most often, and give the result the next rank. Words are cut anew by the ranks so far whenever they change, exactly as
tiktoken will cut them, so every token can be reached.
"""

from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Iterable

import regex  # knows \p{L}, which Python's own re does not; comes with tiktoken

from llamabook.errors import InputError
from llamabook.tokenizer.llama3 import BYTE_ORDER, SPLIT


def train_ranks(texts: Iterable[str], size: int) -> bytes:
    """Learn `size` tokens (256 bytes included) from texts and return the file: a token in base64 and its rank a line.

    The same texts give the same bytes; a tie goes to the token that sorts first.
    Raises InputError if `size` is below 256 or the texts have too few different words for it.
    """
    if size < 256:
        raise InputError(f"a vocabulary of {size} has no room for the 256 bytes: ask for 256 or more")
    count = Counter(word.encode() for text in texts for word in regex.findall(SPLIT, text))
    ranks = {bytes([byte]): rank for rank, byte in enumerate(BYTE_ORDER)}
    cuts = {word: cut(word, ranks) for word in count}
    pairs: Counter[bytes] = Counter()  # what two neighbours are together: how often it occurs
    users: defaultdict[bytes, set[bytes]] = defaultdict(set)  # … and in which words
    for word, pieces in cuts.items():
        for pair in joins(pieces):
            pairs[pair] += count[word]
            users[pair].add(word)
    while len(ranks) < size:
        if not pairs:
            raise InputError(f"the texts hold {len(ranks)} tokens and no more, not {size}: give more texts or ask for less")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks[best] = len(ranks)
        for word in users.pop(best):
            for pair in joins(cuts[word]):
                pairs[pair] -= count[word]
                users[pair].discard(word)
            cuts[word] = cut(word, ranks)
            for pair in joins(cuts[word]):
                pairs[pair] += count[word]
                users[pair].add(word)
        pairs = +pairs  # drop those that no longer occur
    return b"".join(b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def cut(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The tokens of a word: join the neighbours with the lowest rank, the first of several, until none is left."""
    pieces = [word[i : i + 1] for i in range(len(word))]
    while found := [(ranks[pair], i) for i, pair in enumerate(joins(pieces)) if pair in ranks]:
        i = min(found)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def joins(pieces: list[bytes]) -> list[bytes]:
    """What each two neighbours would be together."""
    return [a + b for a, b in zip(pieces, pieces[1:])]
