"""Checks of chapter 5's exercises on speculation: how often a draft is right, one place, one round, one round's caches.

Written by hand. No check calls the package's own functions: each has an oracle of its own, which counts outcomes or
compares texts where an answer computes.
"""

import torch

from llamabook.checks.core import Student, close, exercise, numbers, off_by, present, require, several, tensor, whole


def shares(*rows: list[float]) -> torch.Tensor:
    """Rows of weights as rows that sum to 1, float32."""
    weights = torch.tensor(rows, dtype=torch.float64)
    return (weights / weights.sum(-1, keepdim=True)).float()


def drawn_shares(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows of probabilities, float32, that depend on nothing but their shape and seed."""
    return (2 * numbers(*shape, seed=seed)).softmax(-1)


# --- 13. The share that two distributions have in common ---


@exercise("overlap", chapter=5, title="How often is a draft right?", minutes=8, difficulty="warm-up", points=5)
def check_overlap(your: Student) -> None:
    def got_from(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        shapes = {
            (): "One number for each place, not one for all.",
            tuple(p.shape): "Add up over the tokens: one number for each place.",
            (p.shape[1],): "Add up over the tokens, not over the places.",
        }
        return tensor(your(p, q), (len(p),), torch.float32, shapes=shapes, kind="Go to float32 before you compare.")

    def wanted(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """By what happens: the draft says x, and x stays with min(1, p / q)."""
        rows = [[qx * min(1.0, px / qx) for px, qx in zip(*pair) if qx] for pair in zip(p.tolist(), q.tolist())]
        return torch.tensor([sum(row) for row in rows], dtype=torch.float64)

    p, q = shares([6, 3, 1]), shares([1, 7, 2])
    got = got_from(p, q).item()
    hints = {
        1.5: "The smaller of the two, not the larger.",
        0.0: "The distance counts every token twice: half of it is lost.",
        0.29: "That is how often two independent draws agree. A drafted token is not drawn again: it stays or goes.",
        0.3: "That looks at the draft's favourite only. It may say any token.",
        0.1: "That looks at the target's favourite only. The draft may say any token.",
        0.5 / 3: "Add up, don't average.",
        1 + 3 / 7 + 0.5: "That is min(1, p / q), added up. How often does the draft say each token?",
    }
    hint = next((words for value, words in hints.items() if abs(got - value) < 1e-3), "")
    require(
        abs(got - 0.5) < 1e-5,
        f"p = [0.6, 0.3, 0.1] and q = [0.1, 0.7, 0.2] have 0.1 + 0.3 + 0.1 = 0.5 in common, yours {got:.4g}. {hint}",
    )
    same = drawn_shares(4, 9)
    require(close(got_from(same, same), torch.ones(4), 1e-5), "a draft that is the target is always right: 1 at each place.")
    got = got_from(shares([1, 1, 0, 0]), shares([0, 0, 1, 3])).item()
    require(abs(got) < 1e-6, f"with no token in common a draft is never right, yours {got:.4g}.")
    for seed in (1, 2):
        p, q = drawn_shares(5, 8, seed=seed), drawn_shares(5, 8, seed=seed + 10)
        got = got_from(p, q)
        require(close(got, wanted(p, q), 1e-5), f"five places, eight tokens: wrong ({off_by(got, wanted(p, q))}).")
    p, q = shares([5, 1, 1, 3], [1, 1, 2, 6]), shares([4, 1], [1, 3])
    got = got_from(p, q)
    hint = "A token that the draft does not have is one that it never says." if not close(got, wanted(p, q), 1e-5) else ""
    cut = p[:, :2] / p[:, :2].sum(-1, keepdim=True)
    hint = "Don't make p sum to 1 again: the target may say the others." if close(got, wanted(cut, q), 1e-5) else hint
    require(
        close(got, wanted(p, q), 1e-5),
        f"the draft has two of four tokens: {wanted(p, q).tolist()}, yours {got.tolist()}. {hint}",
    )
    p, q = drawn_shares(3, 500, seed=3).bfloat16(), drawn_shares(3, 500, seed=3).bfloat16()
    got, want = got_from(p, q), wanted(p.float(), q.float())
    require(close(got, want, 1e-4), f"500 tokens in bfloat16: add up in float32 ({off_by(got, want)}).")


# --- 14. One place ---


@exercise("accept_or_resample", chapter=5, title="It stays, or another comes", minutes=15, difficulty="core", points=10)
def check_accept_or_resample(your: Student) -> None:
    def got_from(p: torch.Tensor, q: torch.Tensor, x: int, u: float, v: float) -> tuple[int, bool]:
        got = several(your(p, q, x, u, v), 2, "return two things: the token, and whether the drafted one stays.")
        token = whole(got[0], "the token")
        require(isinstance(got[1], bool), f"whether it stays is a {type(got[1]).__name__}; want True or False: bool(...).")
        require(0 <= token < len(p), f"the token is {token}, and there are {len(p)}.")
        require(token == x or not got[1], f"token {x} was drafted and stays, and yet your token is {token}.")
        return token, got[1]

    p, q = shares([5, 3, 2], [2, 3, 5])
    what = "p = [0.5, 0.3, 0.2], q = [0.2, 0.3, 0.5]"
    token, stays = got_from(p, q, 0, 0.95, 0.5)
    hint = "The target says it more often than the draft: there is no reason to drop it. Is it p over q?"
    require(stays, f"{what}: token 0, of which p has more, stays for every u, also for 0.95. {hint}")
    require(got_from(p, q, 2, 0.37, 0.5)[1], f"{what}: token 2 stays with probability 0.4, so for u = 0.37.")
    token, stays = got_from(p, q, 2, 0.43, 0.5)
    require(not stays, f"{what}: token 2 stays with probability 0.4, so not for u = 0.43.")
    hint = "Token 1 has its share already: only what p has MORE counts." if token == 1 else ""
    hint = "The dropped token comes back: what p has less of must not count." if token == 2 else hint
    for v in (0.02, 0.5, 0.98):
        token, stays = got_from(p, q, 2, 0.9, v)
        require(
            token == 0 and not stays,
            f"{what}: token 2 is dropped, and only of token 0 p has more; v = {v} gives {token}. {hint}",
        )

    half = shares([4, 0, 0, 4], [1, 3, 3, 1]).unbind()  # p has 3/8 more of each, 0 and 3
    for v, want in ((0.1, 0), (0.45, 0), (0.55, 3), (0.9, 3)):
        token, stays = got_from(*half, 1, 0.5, v)
        hint = "The running sum is to be compared with v times all that p has more, which is less than 1."
        require(
            token == want and not stays,
            f"p = [1/2, 0, 0, 1/2], q = [1/8, 3/8, 3/8, 1/8]: of 0 and 3 p has 3/8 more each, so v = {v} gives {want}, "
            f"yours {token}. {hint}",
        )
    require(not got_from(*half, 1, 0.0, 0.5)[1], "p is 0 at the drafted token: it never stays, not even for u = 0.")
    for seed, size in ((1, 3), (2, 4), (3, 4)):
        p, q = drawn_shares(1, size, seed=seed)[0], drawn_shares(1, size, seed=seed + 10)[0]
        written = counted(got_from, p, q)
        hint = hint_for(written, p.double(), q.double())
        require(
            close(written, p, 0.012),
            f"over all x, u and v the written tokens must be those of p = {rounded(p)}; yours come out as "
            f"{rounded(written)}. {hint}",
        )


def counted(answer, p: torch.Tensor, q: torch.Tensor, n: int = 40) -> torch.Tensor:
    """How often each token is written, (V,): u and v on grids of n numbers, the drafted token as often as q says."""
    found = torch.zeros(len(p), dtype=torch.float64)
    for x, often in enumerate(q.double().tolist()):
        for i in range(n):
            u = (i + 0.5) / n
            token, stays = answer(p, q, x, u, 0.5)
            tokens = [token] if stays else [answer(p, q, x, u, (j + 0.5) / n)[0] for j in range(n)]
            for token in tokens:
                found[token] += often / n / len(tokens)
    return found


def hint_for(written: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> str:
    """Which typical mistake gives these shares."""
    kept = torch.minimum(p, q)
    others = {
        "Instead of a dropped token one is drawn from p: then what both say comes too often.": p,
        "Both directions of the difference are in it: only what p has more counts.": (p - q).abs(),
        "That draws what q has more.": (q - p).clamp(min=0),
        "That draws from the draft again.": q,
    }
    for words, weights in others.items():
        if close(written, kept + (1 - kept.sum()) * weights / weights.sum(), 0.012):
            return words
    return "All drafted tokens stay, it seems." if close(written, q, 0.012) else ""


def rounded(shares: torch.Tensor) -> list[float]:
    return [round(share, 2) for share in shares.tolist()]


# --- 15. One round of several rows ---


@exercise("greedy_round", chapter=5, title="Each row at its own pace", minutes=10, difficulty="core", points=10)
def check_greedy_round(your: Student) -> None:
    def got_from(best: list[list[int]], drafted: list[list[int]], counts: list[int]) -> list[list[int]]:
        logits = numbers(len(best), len(best[0]), 12, seed=len(best))
        for row, tokens in enumerate(best):
            logits[row, range(len(tokens)), tokens] = 9.0
        got = your(logits, torch.tensor(drafted), torch.tensor(counts))
        present(got)
        fine = isinstance(got, list) and len(got) == len(best)
        require(fine, f"return a list with a list of tokens for each of {len(best)} rows.")
        for row in got:
            require(isinstance(row, list), f"a row is a {type(row).__name__}; want a list of ints.")
        return [[whole(token, "a token") for token in row] for row in got]

    def wanted(best: list[list[int]], drafted: list[list[int]], counts: list[int]) -> list[list[int]]:
        """Token by token, as plain decoding would write: it goes on while the draft has foreseen it."""
        rows = []
        for says, guesses, count in zip(best, drafted, counts):
            row = [says[0]]
            while len(row) <= count and guesses[len(row) - 1] == row[-1]:
                row.append(says[len(row)])
            rows.append(row)
        return rows

    got = got_from([[4, 7, 2, 9]], [[4, 7, 2]], [3])[0]
    hint = "The check also says what comes after the last drafted token, for nothing." if got == [4, 7, 2] else ""
    require(got == [4, 7, 2, 9], f"all three drafted tokens are right: four are added, [4, 7, 2, 9], yours {got}. {hint}")
    got = got_from([[4, 7, 2, 9]], [[5, 6, 3]], [3])[0]
    hint = "Even then the round adds one: what the target says in its place." if not got else ""
    hint = "What stands behind a wrong token was an answer to another text." if len(got) > 1 else hint
    hint = "The wrong token must not be added." if got[:1] == [5] else hint
    require(got == [4], f"drafted 5 where the target says 4: one token is added, 4, yours {got}. {hint}")
    got = got_from([[4, 7, 2, 9]], [[4, 6, 2]], [3])[0]
    hint = "The third matches by luck: it was checked behind a 6 that is not there." if len(got) > 2 else ""
    require(got == [4, 7], f"right, wrong, right: 4 stays, 7 comes, and that is all; yours {got}. {hint}")
    best, drafted = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 0]], [[1, 2, 3], [6, 6, 7], [9, 10, 1]]
    got, want = got_from(best, drafted, [3, 3, 3]), wanted(best, drafted, [3, 3, 3])
    hint = "No row waits for another." if len({len(row) for row in got}) == 1 else ""
    require(got == want, f"three rows accept 3, 0 and 2: {want}, yours {got}. {hint}")
    best, drafted = [[1, 2, 3, 4], [5, 0, 0, 8], [0, 0, 0, 0]], [[1, 2, 3], [5, 0, 0], [0, 0, 0]]
    got, want = got_from(best, drafted, [3, 1, 0]), wanted(best, drafted, [3, 1, 0])
    hint = "Behind a row's count stands what only fills it up, even if it matches."
    require(got == want, f"of the three rows 3, 1 and 0 tokens are drafted: {want}, yours {got}. {hint}")
    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        best = torch.randint(12, (4, 6), generator=generator)
        wrong = torch.rand(4, 5, generator=generator) < 0.3
        drafted = torch.where(wrong, torch.randint(12, (4, 5), generator=generator), best[:, :5]).tolist()
        counts = torch.randint(6, (4,), generator=generator).tolist()
        want = wanted(best.tolist(), drafted, counts)
        got = got_from(best.tolist(), drafted, counts)
        require(got == want, f"four rows, {counts} tokens drafted: want {want}, yours {got}.")


# --- 16. What is left in the caches ---


@exercise("after_round", chapter=5, title="After the round", minutes=20, difficulty="stretch", points=20)
def check_after_round(your: Student) -> None:
    def got_from(text, drafted, accepted: int, token: int, stops, room: int) -> tuple[list[int], int, int, bool]:
        got = several(
            your(text, drafted, accepted, token, stops, room), 4,
            "return four things: the added tokens, the target's slots, the draft's slots, whether the row has ended.",
        )  # fmt: skip
        require(isinstance(got[0], list), f"the added tokens are a {type(got[0]).__name__}; want a list of ints.")
        require(isinstance(got[3], bool), f"whether it has ended is a {type(got[3]).__name__}; want True or False.")
        added = [whole(each, "a token") for each in got[0]]
        return added, whole(got[1], "the number of the target's slots"), whole(got[2], "the number of the draft's slots"), got[3]

    def wanted(text, drafted, accepted: int, token: int, stops, room: int) -> tuple[list[int], int, int, bool]:
        """By comparing: what each has read, slot by slot, with the text as it is now."""
        added = []
        for each in [*drafted[:accepted], token]:
            added.append(each)
            if each in stops or len(added) == room:
                break
        now = [*text, *added]
        read = [*text, *drafted], [*text, *drafted[:-1]]  # by the target, by the draft
        slots = [next((i for i, pair in enumerate(zip(one, now)) if pair[0] != pair[1]), min(len(one), len(now))) for one in read]
        return added, *slots, added[-1] in stops or len(added) == room

    text, stops = [1, 20, 21, 22], {0, 9}
    cases = [
        ("two of three stay", (text, [30, 31, 32], 2, 40, stops, 50)),
        ("none of three stays", (text, [30, 31, 32], 0, 40, stops, 50)),
        ("all three stay", (text, [30, 31, 32], 3, 40, stops, 50)),
        ("a stop token is the second of three that stay", (text, [30, 9, 32], 3, 40, stops, 50)),
        ("a stop token is the last of three that stay", (text, [30, 31, 0], 3, 40, stops, 50)),
        ("the token after those that stay is a stop token", (text, [30, 31, 32], 1, 9, stops, 50)),
        ("a stop token was drafted, and rejected", (text, [30, 9, 32], 1, 40, stops, 50)),
        ("a stop token stands in the prompt", ([1, 9, 21, 22], [30, 31], 1, 40, stops, 50)),
        ("three stay, and there is room for two", (text, [30, 31, 32], 3, 40, stops, 2)),
        ("three stay, and there is room for four", (text, [30, 31, 32], 3, 40, stops, 4)),
        ("three stay, and there is room for one", (text, [30, 31, 32], 3, 40, stops, 1)),
        ("one was drafted, and stays", (text, [30], 1, 40, stops, 50)),
        ("one was drafted, and does not stay", (text, [30], 0, 40, stops, 50)),
        ("a row of one token, four of five stay", ([7], [30, 31, 30, 31, 30], 4, 40, stops, 50)),
    ]
    for what, case in cases:
        got, want, n = got_from(*case), wanted(*case), len(case[0])
        drafted, accepted, token = case[1:4]
        hint = "Did you forget the token that follows those that stay?" if got[0] == drafted[:accepted] else ""
        longer = len(got[0]) > len(want[0])
        hint = "The row ends behind its first stop token, wherever in the round it stands." if longer else hint
        hint = "A rejected token is not of the text." if got[0] == [*drafted, token] and accepted < len(drafted) else hint
        hint = "The stop token itself belongs to the row." if got[0] == want[0][:-1] and want[0][-1] in stops else hint
        hint = f"There is room for {case[5]}." if len(got[0]) > case[5] else hint
        require(got[0] == want[0], f"{what}: {want[0]} is added, yours {got[0]}. {hint}")
        says = "has" if want[3] else "has not"
        hint = "Only a token of this round ends it." if 9 in case[0] else "A stop token ends it, and so does a full row."
        require(got[3] == want[3], f"{what}: the row {says} ended. {hint}")
        hint = f"It has read {n} tokens of the text and {len(drafted)} drafted ones."
        unread = "The token that follows those that stay has not been read yet."
        hint = unread if got[1] == want[1] + 1 else hint
        hint = "A slot with a rejected token is worth nothing." if got[1] == n + len(drafted) > want[1] else hint
        cut = len(want[0]) <= accepted and got[1] == n + accepted
        hint = "Of what has been cut off nothing is worth keeping." if cut else hint
        hint = "The slots of tokens that stay are worth keeping: nothing is read twice." if got[1] < want[1] else hint
        require(got[1] == want[1], f"{what}: {want[1]} slots of the target are worth keeping, yours {got[1]}. {hint}")
        hint = f"It has read {n} tokens of the text and {len(drafted) - 1} drafted ones: nobody asked it what follows the last."
        require(got[2] == want[2], f"{what}: {want[2]} slots of the draft are worth keeping, yours {got[2]}. {hint}")
