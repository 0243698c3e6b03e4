"""Checks of chapter 4's exercises on the cache: what it saves, its slots, rows of different lengths.

Written by hand. No check calls the package's own functions: each has an oracle of its own.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llamabook.checks.ch02_text import id_list
from llamabook.checks.core import Student, Wrong, close, exercise, numbers, off_by, present, require, tensor, whole

# --- what several exercises share ---


@dataclass
class Slots:
    """One layer's cache, for the exercises: keys and values (B, G, S, d), the first `length` of the S slots filled."""

    keys: torch.Tensor
    values: torch.Tensor
    length: int = 0


class Watch(TorchDispatchMode):
    """Counts the operations inside, and notes the most memory, in bytes, that any of them hands out."""

    def __init__(self):
        super().__init__()
        self.count = self.nbytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.count += 1
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.nbytes = max(self.nbytes, value.untyped_storage().nbytes())
        return result


def group_of(value: Any, count: int, what: str) -> tuple | list:
    """`value` if it is a tuple or list of so many."""
    present(value)
    require(isinstance(value, (tuple, list)) and len(value) == count, f"return {what}.")
    return value


# --- 1. What a cache saves ---


@exercise("positions_computed", chapter=4, title="What is computed again?", minutes=8, difficulty="warm-up", points=5)
def check_positions_computed(your: Student) -> None:
    def count(prompt: int, new: int) -> tuple[int, int]:
        without, cached = group_of(your(prompt, new), 2, "two numbers: positions without a cache, and with one")
        return whole(without, "the first number"), whole(cached, "the second number")

    got = count(4, 1)
    require(
        got == (4, 4),
        f"one new token after 4: its forward reads the 4 of the prompt, with a cache and without; you say {got}. "
        "Nobody reads the token that was drawn last.",
    )
    without, cached = count(4, 3)
    hints = {
        (6, 15): "First the number without a cache, then the one with it.",
        (3, 6): "Are these forwards? Count the positions that they compute.",
    }
    require(
        (without, cached) not in hints, f"prompt 4, new 3: you say {(without, cached)}. {hints.get((without, cached))}"
    )
    hints = {
        12: "The text grows from step to step.",
        22: "Three new tokens take three forwards: nobody reads the last one.",
        18: "The first forward reads the prompt alone.",
        7: "Without a cache each forward begins at the first token again.",
    }
    require(
        without == 15,
        f"without a cache, prompt 4 and 3 new tokens: three forwards, of 4, 5 and 6 positions, 15 together; you say "
        f"{without}. {hints.get(without, '')}",
    )
    hints = {
        7: "The last token is drawn, and no forward reads it.",
        3: "The prompt has to go through the model as well, once.",
        2: "The prompt has to go through the model as well, once.",
        4: "Each new token but the last is read, to draw the next one.",
    }
    require(
        cached == 6,
        f"with a cache, prompt 4 and 3 new tokens: every position once, 4 + 1 + 1; you say {cached}. "
        f"{hints.get(cached, '')}",
    )
    require(count(5, 0) == (0, 0), f"no new token, no forward: (0, 0), not {count(5, 0)}.")
    for prompt, new in ((1, 9), (10, 20), (300, 200)):
        text, again, held = prompt, 0, 0
        for _ in range(new):  # another road: generate
            again, held, text = again + text, text, text + 1
        got = count(prompt, new)
        require(got == (again, held), f"prompt {prompt}, {new} new: ({again}, {held}), you say {got}.")


# --- 2. Slots ---


@exercise("append", chapter=4, title="Into the next free slots", minutes=15, difficulty="core", points=10)
def check_append(your: Student) -> None:
    B, G, S, d = 2, 3, 8, 4

    def new_cache(length: int = 0) -> Slots:
        return Slots(numbers(B, G, S, d, seed=8), numbers(B, G, S, d, seed=9), length)

    def add(cache: Slots, T: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """Append T tokens; what came back, and what was given."""
        K, V = numbers(B, G, T, d, seed=seed), numbers(B, G, T, d, seed=seed + 50)
        before, length = cache.keys, whole(cache.length, "cache.length")
        got = group_of(your(cache, K, V), 2, "two tensors: the keys and the values of all tokens so far")
        require(isinstance(cache.keys, torch.Tensor), "cache.keys is no tensor any more.")
        require(
            cache.keys.data_ptr() == before.data_ptr() and cache.keys.shape == before.shape,
            "cache.keys is another tensor than before. Write into the memory that is there: a cache that grows is "
            "copied whole for every token.",
        )
        require(
            whole(cache.length, "cache.length") == length + T,
            f"{T} tokens after {length}: cache.length is {cache.length} afterwards; want {length + T}.",
        )
        shapes = {
            (B, G, S, d): "Attention may see the slots that are filled, not the empty ones.",
            (B, G, T, d): "Attention needs the old tokens, too.",
        }
        for value, name in zip(got, ("the keys that you return", "the values that you return")):
            tensor(value, (B, G, length + T, d), torch.float32, what=name, shapes=shapes)
        return *got, K, V

    cache, fresh = new_cache(), new_cache()
    keys, values, K, V = add(cache, 3)
    require(
        not torch.equal(cache.keys[:, :, :3], fresh.keys[:, :, :3]),
        "after appending 3 tokens to an empty cache, nothing was written to its first slots.",
    )
    require(torch.equal(cache.keys[:, :, :3], K), "slots 0 to 2 of cache.keys don't hold the three keys.")
    require(torch.equal(cache.values[:, :, :3], V), "slots 0 to 2 of cache.values don't hold the three values.")
    require(
        torch.equal(cache.keys[:, :, 3:], fresh.keys[:, :, 3:])
        and torch.equal(cache.values[:, :, 3:], fresh.values[:, :, 3:]),
        "appending 3 tokens changed slots behind them.",
    )
    require(
        torch.equal(keys, K) and torch.equal(values, V), "what you return is not keys, then values, of the 3 tokens."
    )
    keys, values, K, V = add(cache, 2, seed=1)
    require(torch.equal(cache.keys[:, :, 3:5], K), "two more tokens: their keys belong in slots 3 and 4.")
    require(torch.equal(cache.values[:, :, 3:5], V), "two more tokens: their values belong in slots 3 and 4.")
    require(
        torch.equal(keys, cache.keys[:, :, :5]) and torch.equal(values, cache.values[:, :, :5]),
        "what you return is not what the cache holds: keys, then values, of all five tokens.",
    )
    require(
        keys.data_ptr() == cache.keys.data_ptr() and values.data_ptr() == cache.values.data_ptr(),
        "you return a copy of what the cache holds; a slice reads the same memory and copies nothing.",
    )
    try:
        add(cache, 3, seed=2)
    except Wrong as wrong:
        raise Wrong(f"8 slots, 5 filled, 3 more tokens: they fit exactly, but {wrong}") from None
    for filled, more in ((8, 1), (7, 2), (6, 5), (0, 9)):
        cache, fresh = new_cache(filled), new_cache(filled)
        what = f"8 slots, {filled} filled, {more} more token{'s' * (more > 1)}"
        try:
            your(cache, numbers(B, G, more, d), numbers(B, G, more, d, seed=1))
        except Wrong as wrong:
            require("stopped with ValueError" in str(wrong), f"{what}: raise a ValueError that says so; {wrong}")
        else:
            raise Wrong(f"{what}: they don't fit, and nothing is said. Raise a ValueError.")
        same = torch.equal(cache.keys, fresh.keys) and torch.equal(cache.values, fresh.values)
        require(
            same and cache.length == filled,
            f"{what}: refused, and the cache has changed all the same. Look before you write: it may still be of use.",
        )


@exercise("reuse", chapter=4, title="What need not be read again", minutes=12, difficulty="core", points=10)
def check_reuse(your: Student) -> None:
    def split(read: list[int], prompt: list[int]) -> tuple[int, list[int]]:
        got = group_of(your(read, prompt), 2, "two things: how many tokens stay in the cache, and the ids to be read")
        keep, rest = whole(got[0], "the first"), id_list(got[1])
        require(0 <= keep <= len(prompt), f"a prompt of {len(prompt)} tokens, of which you keep {keep}.")
        require(
            prompt[:keep] + rest == prompt,
            f"prompt {prompt}: the first {keep} of it and then {rest} is another prompt. What is not kept must be "
            "read.",
        )
        require(keep <= len(read), f"the cache holds {len(read)} tokens, and you keep {keep}.")
        return keep, rest

    got = split([5, 6, 7], [5, 6, 7, 8, 9])
    require(
        got == (3, [8, 9]),
        f"the cache holds [5, 6, 7], the prompt goes on with [8, 9]: keep 3 and read these two; yours {got}.",
    )
    got = split([5, 6, 7, 8], [5, 6, 1, 2, 3])
    require(got == (2, [1, 2, 3]), f"[5, 6, 7, 8] is held, [5, 6, 1, 2, 3] asked: the first 2 stay; yours {got}.")
    got = split([1, 2, 3, 4, 5], [1, 9, 3, 4, 5, 6])
    require(
        got == (1, [9, 3, 4, 5, 6]),
        f"[1, 2, 3, 4, 5] is held, [1, 9, 3, 4, 5, 6] asked; you keep {got[0]}. What stands behind a different token "
        "has seen it: its keys and values are others.",
    )
    for read, prompt in (([5, 6, 7], [5, 6, 7]), ([4], [4])):
        got = split(read, prompt)
        require(
            got == (len(prompt) - 1, prompt[-1:]),
            f"the whole prompt {prompt} is in the cache, and you keep {got[0]} and read {got[1]}. Keys and values are "
            "no logits: which token gives the first new one?",
        )
    got = split([5, 6, 7, 8, 9, 1], [5, 6, 7])
    require(
        got == (2, [7]),
        f"the cache has gone on behind the prompt [5, 6, 7]; you keep {got[0]} and read {got[1]}. The last token of "
        "the prompt must be read, for its logits.",
    )
    require(split([], [5, 6]) == (0, [5, 6]), "an empty cache: everything is read.")
    require(split([6, 5], [5, 6]) == (0, [5, 6]), "nothing in common at the start: nothing stays.")
    for seed in range(40):
        ids = (numbers(2, 12, seed=seed) > -0.9).int()
        read, prompt = ids[0, : seed % 12].tolist(), ids[1, : 1 + seed * 7 % 11].tolist()
        want = next(n for n in range(len(prompt) - 1, -1, -1) if read[:n] == prompt[:n])  # another road: longest first
        got = split(read, prompt)
        require(got[0] == want, f"{read} is held, {prompt} asked: {want} can stay; you keep {got[0]}.")


@exercise("slots_hold", chapter=4, title="A cache that goes round", minutes=12, difficulty="core", points=10)
def check_slots_hold(your: Student) -> None:
    def held(position: int, slots: int) -> list[int]:
        got = tensor(your(position, slots), (slots,), torch.int64, kind="Positions are whole numbers.")
        return got.tolist()

    def simulated(position: int, slots: int) -> list[int]:
        content = [-1] * slots
        for p in range(position + 1):  # another road: write them all
            content[p % slots] = p
        return content

    for position, slots in ((0, 4), (3, 4), (4, 4), (6, 4)):
        got, want = held(position, slots), simulated(position, slots)
        hint = ""
        if any(p > position for p in got):
            hint = f"Position {max(got)} is still to come: that slot holds what was written a round before."
        elif any(p < -1 for p in got):
            hint = "A slot that was never written holds -1."
        elif sorted(got) == sorted(want):
            hint = "The right positions in other slots: position p is written to slot p mod slots."
        elif position < slots and any(p < 0 <= q for p, q in zip(got, want)):
            hint = "The token at `position` itself has been written, and all before it."
        elif position and got == simulated(position - 1, slots):
            hint = "The token at `position` itself has been written, too."
        require(got == want, f"{slots} slots, after position {position}: they hold {want}, you say {got}. {hint}")
    for slots in (1, 5, 16):
        for position in (*range(2 * slots + 1), 997):
            got, want = held(position, slots), simulated(position, slots)
            require(got == want, f"{slots} slots, after position {position}: they hold {want}, you say {got}.")


# --- 3. Rows of different lengths ---


@exercise("ragged", chapter=4, title="Rows of different lengths", minutes=15, difficulty="core", points=10)
def check_ragged(your: Student) -> None:
    PAD = 99

    def lay_out(new: list[list[int]], held: list[int]) -> tuple[torch.Tensor, ...]:
        got = group_of(your(new, held, PAD), 3, "three tensors: ids (B, T), positions (B, T), last (B,)")
        B, T = len(new), max(map(len, new))
        shapes = {(T, B): "Rows are texts: (B, T)."}
        ids = tensor(got[0], (B, T), torch.int64, what="the first, ids,", shapes=shapes)
        positions = tensor(got[1], (B, T), torch.int64, what="the second, positions,", shapes=shapes)
        return ids, positions, tensor(got[2], (B,), torch.int64, what="the third, last,")

    new, held = [[11, 12, 13, 14], [21], [31, 32]], [0, 0, 0]
    ids, positions, last = lay_out(new, held)
    require(
        ids[1].tolist() != [PAD, PAD, PAD, 21],
        "your pads stand on the left. Then each row's first token is at another place; put them behind the row's end.",
    )
    want = [[11, 12, 13, 14], [21, PAD, PAD, PAD], [31, 32, PAD, PAD]]
    require(ids.tolist() == want, f"rows {new}, pad {PAD}: ids are {want}, yours {ids.tolist()}.")
    require(
        last.tolist() == [3, 0, 1],
        f"rows of 4, 1 and 2 tokens: their last ones stand at the places [3, 0, 1] of T, yours {last.tolist()}.",
    )
    ids, positions, last = lay_out(new, [0, 5, 2])
    first = positions[:, 0].tolist()
    require(
        first == [0, 5, 2],
        f"the cache holds 0, 5 and 2 tokens of the rows: their next ones are at positions [0, 5, 2], yours {first}.",
    )
    require(
        last.tolist() == [3, 0, 1],
        f"`last` are places among the T new tokens, [3, 0, 1] whatever the cache holds; yours {last.tolist()}.",
    )
    for new, held in (
        ([[1, 2, 3], [4], [5, 6]], [0, 5, 2]),
        ([[7], [8]], [3, 0]),
        ([[1, 2], [3, 4, 5, 6], [7]], [4, 0, 1]),
    ):
        ids, positions, last = lay_out(new, held)
        for r, row in enumerate(new):
            slots = {place: ("old", place) for place in range(held[r])}
            for id_, position in zip(ids[r].tolist(), positions[r].tolist()):  # what the model will do
                require(
                    position >= held[r],
                    f"row {r} has {held[r]} tokens in the cache; yours writes "
                    f"{'a pad' if id_ == PAD else f'token {id_}'} "
                    f"to slot {position}, over one of them.",
                )
                require(
                    position not in slots or slots[position] == PAD or id_ != PAD,
                    f"row {r}, tokens {row}: a pad is written to slot {position}, over token {slots.get(position)}. "
                    "Pads get positions, too: those behind their row's end.",
                )
                slots[position] = id_
            want = [("old", place) for place in range(held[r])] + row
            got = [slots.get(place) for place in range(held[r] + len(row))]
            require(
                got == want,
                f"row {r}, tokens {row} after {held[r]} held: they don't end up in the slots from {held[r]} on.",
            )
            at = int(last[r])
            require(
                0 <= at < ids.shape[1] and int(ids[r, at]) == row[-1], f"place {at} is not the last token of {row}."
            )
            places = sorted(positions[r].tolist())
            require(
                places == list(range(held[r], held[r] + ids.shape[1])),
                f"row {r}: your positions are {positions[r].tolist()}; want one after the other, the pads' as well.",
            )


@exercise("write_rows", chapter=4, title="Each row into slots of its own", minutes=15, difficulty="core", points=10)
def check_write_rows(your: Student) -> None:
    B, G, S, d = 3, 2, 7, 4

    def write(keys: torch.Tensor, K: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        rows, groups, T, d = K.shape
        shapes = {(rows, groups, rows, T, d): "Indexing with a matrix gives every row the slots of all rows."}
        return tensor(your(keys, K, at), tuple(keys.shape), keys.dtype, shapes=shapes, kind="Give back keys' dtype.")

    def by_hand(keys: torch.Tensor, K: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        result = keys.clone()
        for b, places in enumerate(at.tolist()):  # another road: one slot after the other
            for t, place in enumerate(places):
                result[b, :, place] = K[b, :, t]
        return result

    keys, K, at = numbers(B, G, S, d), numbers(B, G, 1, d, seed=1), torch.tensor([[2], [0], [6]])
    got = write(keys, K, at)
    require(not torch.equal(got, keys), "nothing was written: the result is what `keys` was.")
    for row, place in enumerate([2, 0, 6]):
        wrong = [s for s in range(S) if s != place and not torch.equal(got[row, :, s], keys[row, :, s])]
        require(
            not wrong,
            f"rows write to the slots 2, 0 and 6, one each; yours changes slot {wrong[:1]} of row {row}, which "
            "belongs to "
            "it alone.",
        )
        written = int((got[row, :, place] == K[row, :, 0]).sum())
        hint = ""
        if 0 < written < G * d:
            hint = f"{written} of its {G * d} numbers are there: an index that is too small writes only what it covers."
        elif torch.equal(got[row, :, place], keys[row, :, place] + K[row, :, 0]):
            hint = "It is added to what was there; a slot is overwritten."
        require(written == G * d, f"slot {place} of row {row} doesn't hold the row's new key, in all groups. {hint}")
    K, at = numbers(B, G, 3, d, seed=2), torch.tensor([[0, 1, 2], [4, 5, 6], [3, 1, 2]])
    got = write(keys, K, at)
    require(close(got, by_hand(keys, K, at), 0), f"three tokens a row, to the slots {at.tolist()}: wrong slots.")
    half = keys.bfloat16()
    require(
        close(write(half, K.bfloat16(), at), by_hand(half, K.bfloat16(), at), 0), "in bfloat16 the result is wrong."
    )
    counts = []
    for rows in (2, 12):
        keys, K = numbers(rows, G, S, d), numbers(rows, G, 2, d, seed=3)
        at = torch.stack([torch.arange(rows) % 3, 3 + torch.arange(rows) % 4], dim=1)
        with Watch() as watch:
            got = write(keys, K, at)
        counts.append(watch.count)
        require(close(got, by_hand(keys, K, at), 0), f"wrong for {rows} rows, slots {at.tolist()[:3]} …")
    require(
        counts[1] <= counts[0] + 2,
        f"right, but 2 rows take you {counts[0]} operations and 12 rows {counts[1]}: there is a loop. A compiler "
        "writes "
        "it out, and does so anew for each size of the batch.",
    )


def _row_by_row(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Another road: float64, one head at a time, the row's own slots cut out."""
    (B, H, d), G = q.shape, keys.shape[1]
    out = torch.zeros(B, H, d, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            K, V = (x[b, h * G // H, : int(lengths[b])].double() for x in (keys, values))
            out[b, h] = torch.softmax(K @ q[b, h].double() / math.sqrt(d), dim=0) @ V
    return out


@exercise(
    "attend_ragged",
    chapter=4,
    title="One query, and a memory full of rubbish",
    minutes=25,
    difficulty="stretch",
    points=20,
)
def check_attend_ragged(your: Student) -> None:
    B, H, G, S, d = 3, 6, 3, 7, 8
    q, keys, values = 2 * numbers(B, H, d), 2 * numbers(B, G, S, d, seed=1), numbers(B, G, S, d, seed=2)
    lengths = torch.tensor([7, 1, 4])
    shapes = {
        (B, H, 1, d): "There is one query a head: no dimension for T.",
        (B, G, H // G, d): "Bring groups and their heads into one dimension of H heads.",
    }

    def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        unwritten = "Every number that was given is finite."
        return tensor(your(q, keys, values, lengths), tuple(q.shape), torch.float32, shapes=shapes, finite=unwritten)

    full = torch.full((B,), S)
    same = values[:, :1, :1].expand_as(values).clone()
    require(
        close(attend(q, keys, same, full), same[:, :1, :1].expand(B, H, 1, d)[:, :, 0]),
        "if all values are equal, so must all results be: do the weights add up to 1 over the slots?",
    )
    marked = torch.arange(float(G))[None, :, None, None].expand(B, G, S, d).clone()
    reads = [round(value, 1) for value in attend(q, keys, marked, full)[0, :, 0].tolist()]
    hint = "A group serves its heads in a row: heads 0 and 1 read group 0." if reads == [0, 1, 2, 0, 1, 2] else ""
    require(
        reads == [0, 0, 1, 1, 2, 2],
        f"6 heads, 3 groups whose values are all 0, all 1 and all 2: yours read {reads}, want [0, 0, 1, 1, 2, 2]. "
        f"{hint}",
    )
    got, want = attend(q, keys, values, full), _row_by_row(q, keys, values, full)
    hint = ""
    for factor, words in ((d**0.5, "Are the scores divided by √d?"), (d**-0.5, "It is the root of d, once.")):
        if close(got, _row_by_row(q * factor, keys, values, full), 1e-3):
            hint = words
    require(close(got, want), f"all slots filled: the weights are wrong ({off_by(got, want)}). {hint}")
    got, want = attend(q, keys, values, lengths), _row_by_row(q, keys, values, lengths)
    alone = values[1, :, 0].repeat_interleave(H // G, dim=0)
    hint = ""
    if not close(got, want) and close(got, _row_by_row(q, keys, values, full)):
        hint = "All see all slots."
    elif not close(got, want) and close(got[:2], _row_by_row(q, keys, values, torch.tensor([7, 2, 5]))[:2]):
        hint = "A row of n tokens fills the slots 0 to n - 1."
    require(
        close(got[1], alone),
        f"row 1 has a single token: whatever it asks, it gets that token's value ({off_by(got[1], alone)}). {hint}",
    )
    require(
        close(got, want), f"rows of 7, 1 and 4 tokens: a row must see its own slots only ({off_by(got, want)}). {hint}"
    )
    for rubbish in (1e4, math.inf, math.nan):
        dirty = [x.clone() for x in (keys, values)]
        for x in dirty:
            for b, n in enumerate(lengths.tolist()):
                x[b, :, n:] = rubbish
        with your._guarded():  # not `your(...)`, which finds NaN changed, since it differs from itself
            given = your.function(q, *dirty, lengths)
        hint = "A weight of 0 times NaN is NaN, not 0." if math.isnan(rubbish) else ""
        if math.isinf(rubbish):
            hint = "A weight of 0 times infinity is NaN."
        clean = isinstance(given, torch.Tensor) and given.shape == want.shape and bool(torch.isfinite(given).all())
        require(
            clean and close(given, want),
            f"the slots behind a row's end hold {rubbish}, as memory may that nobody has written: nothing of it may "
            f"reach the result, yours changes. {hint}",
        )
    q, keys, values = numbers(2, 16, 16), numbers(2, 2, 64, 16, seed=1), numbers(2, 2, 64, 16, seed=2)
    lengths = torch.tensor([64, 9])
    with Watch() as watch:
        got = attend(q, keys, values, lengths)
    require(close(got, _row_by_row(q, keys, values, lengths)), "wrong for 16 heads, 2 groups, rows of 64 and 9 tokens.")
    times = watch.nbytes / keys.nbytes
    require(
        times < 1.5,
        f"right, but somewhere you make a tensor {times:.3g} times as large as the cached keys: they are repeated "
        "for every "
        "head. Bring the queries to the keys.",
    )
