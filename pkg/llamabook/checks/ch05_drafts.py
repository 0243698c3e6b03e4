"""Checks of chapter 5's exercises on drafts: the best k, costs from shapes, an estimate with its error, shared noise.

Written by hand. No check calls the package's own functions: each has an oracle of its own, which counts cases, tensors
or races where an answer has a formula.
"""

import math
from typing import Any

import torch

from llamabook.checks.core import Student, exercise, numbers, present, require, several, tensor, whole


def number(value: Any, what: str) -> float:
    """`value` if it is a finite float (or an int)."""
    present(value)
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(plain, f"{what} is a {type(value).__name__}; want a float.")
    require(math.isfinite(value), f"{what} is not finite.")
    return float(value)


def tokens_of_a_round(alpha: float, k: int) -> float:
    """Expected tokens, by adding up what may happen: n stay and the next does not, or all k stay."""
    return sum((n + 1) * alpha**n * (1 - alpha) for n in range(k)) + (k + 1) * alpha**k


# --- 17. How many tokens to draft ---


@exercise("best_k", chapter=5, title="How far ahead?", minutes=8, difficulty="warm-up", points=5)
def check_best_k(your: Student) -> None:
    def got_from(alpha: float, c: float, v: list[float]) -> tuple[int, float]:
        got = several(your(alpha, c, v), 2, "return two things: the best k, and the speed-up with it.")
        return whole(got[0], "k"), number(got[1], "the speed-up")

    def speedups(alpha: float, c: float, v: list[float]) -> list[float]:
        return [tokens_of_a_round(alpha, k) / (k * c + v[k]) for k in range(len(v))]

    cases = [
        ("acceptance 0.5, a draft that costs nothing, checks as dear as a step", 0.5, 0.0, [1.0, 1.0]),
        ("acceptance 0.8, a draft of a tenth, checks as dear as a step", 0.8, 0.1, [1.0] * 9),
        ("acceptance 0.8, checks that grow", 0.8, 0.1, [1.0, 1.05, 1.1, 1.3, 1.7, 2.4]),
        ("a draft that is never right", 0.0, 0.1, [1.0, 1.0, 1.0]),
        ("a draft that is nearly as dear as the target", 0.6, 0.9, [1.0, 1.1, 1.2, 1.3]),
        ("a draft that is always right", 1.0, 0.2, [1.0, 1.0, 1.0, 1.0]),
        ("a draft that is never right and costs nothing", 0.0, 0.0, [1.0, 1.0, 1.0]),
        ("no choice but a plain step", 0.9, 0.1, [1.0]),
        ("acceptance 0.9, a check that is cheap only for 5 tokens", 0.9, 0.05, [1.0, 1.9, 2.0, 2.1, 1.2, 2.3]),
    ]
    for what, alpha, c, v in cases:
        all_k = speedups(alpha, c, v)
        best = max(all_k)
        want = next(k for k, value in enumerate(all_k) if value > best - 1e-9)
        got = got_from(alpha, c, v)
        geometric = [sum(alpha**i for i in range(k)) / (k * c + v[k]) if k else 1.0 for k in range(len(v))]
        hint = "If no draft pays, k is 0." if want == 0 else ""
        hint = "The target adds a token of its own to those that stay." if abs(got[1] - max(geometric)) < 1e-6 else hint
        hint = "Of equal ones the smallest k." if 0 <= got[0] < len(v) and abs(all_k[got[0]] - best) < 1e-9 else hint
        hint = "k counts drafted tokens; the check reads one more." if got[0] == want + 1 else hint
        hint = "That is the worst." if min(all_k) < best - 1e-9 and abs(got[1] - min(all_k)) < 1e-9 else hint
        once = max(tokens_of_a_round(alpha, k) / (c * (k > 0) + v[k]) for k in range(len(v)))
        hint = "All k drafted tokens cost, each of them c." if c and abs(got[1] - once) < 1e-9 else hint
        require(
            got[0] == want,
            f"{what}: k = {want} is the best, with {best:.4g}; yours is k = {got[0]} with {got[1]:.4g}. {hint}",
        )
        hint = "That is the number of tokens; divide by what the round costs." if got[1] > best * 1.001 else ""
        hint = "The target adds a token of its own to those that stay." if abs(got[1] - geometric[want]) < 1e-6 else hint
        require(abs(got[1] - best) < 1e-6, f"{what}: with k = {want} it is {best:.6g} times as fast, yours {got[1]:.6g}. {hint}")


# --- 18. Costs from shapes ---


@exercise(
    "draft_cost", chapter=5, title="What a draft costs, before anybody has run it", minutes=10, difficulty="core", points=10
)  # fmt: skip
def check_draft_cost(your: Student) -> None:
    def got_from(*args: Any) -> float:
        got = number(your(*args), "the cost")
        require(got > 0, f"the cost is {got:.4g}; a draft reads something.")
        return got

    def read(cfg: dict, bits: int, group: int | None, also: str = "", without: str = "") -> float:
        """Bytes of one pass, matrix by matrix; `also` and `without`: a typical mistake."""
        D, H, G, F = (cfg[name] for name in ("emb_dim", "n_heads", "n_kv_groups", "hidden_dim"))
        d, V = cfg.get("head_dim") or D // H, cfg["vocab_size"]
        d = D // H if without == "head_dim" else d
        keys = H * d if without == "groups" else G * d
        layer = [(H * d, D), (keys, D), (keys, D), (D, H * d), (F, D), (F, D), (D, F)]
        layer = layer[:-1] if without == "fc3" else layer
        matrices = (layer[:] if without == "layers" else layer * cfg["n_layers"]) + [(V, D)] * (without != "head")
        matrices += [(V, D)] * (also == "table" or (also == "untied table" and not cfg.get("tie_embeddings", False)))
        scales = 0 if group is None or without == "scales" else 16 / group
        scales *= 2 if also == "32-bit scales" else 1
        return sum(N * K * (bits + scales) / 8 for N, K in matrices)

    small = {"vocab_size": 1000, "emb_dim": 64, "n_heads": 4, "n_kv_groups": 4, "hidden_dim": 128, "n_layers": 2}
    grouped = small | {"n_kv_groups": 1, "n_layers": 3}
    wide_heads = small | {"head_dim": 64, "hidden_dim": 96}
    tied = small | {"tie_embeddings": True, "vocab_size": 5000}
    big = {"vocab_size": 32000, "emb_dim": 256, "n_heads": 8, "n_kv_groups": 2, "hidden_dim": 768, "n_layers": 6}
    cases = [
        ("a model as its own draft", (big, 16, None), (big, 16, None)),
        ("a model in 8 bits, with no groups, as its own draft", (big, 16, None), (big, 8, None)),
        ("two models of 16 bits", (big, 16, None), (small, 16, None)),
        ("grouped queries in the draft", (big, 16, None), (grouped, 16, None)),
        ("a head_dim of its own in the draft", (big, 16, None), (wide_heads, 16, None)),
        ("tied embeddings in the draft", (big, 16, None), (tied, 16, None)),
        ("4 bits in groups of 32 beside 16 bits", (big, 16, None), (big, 4, 32)),
        ("4 bits in groups of 32 beside 4 bits in groups of 128", (big, 4, 128), (small, 4, 32)),
        ("everything at once", (big | {"tie_embeddings": True}, 4, 32), (wide_heads | {"n_kv_groups": 2}, 8, None)),
    ]
    mistakes = {
        "The head is a matrix, too, and read in every pass.": {"without": "head"},
        "Of a table that is not the head, a pass reads a row: leave it out.": {"also": "untied table"},
        "The table of embeddings is read a row at a time, and a tied one once, as the head.": {"also": "table"},
        "Keys and values have n_kv_groups heads.": {"without": "groups"},
        "If the config has a head_dim, it counts, not emb_dim / n_heads.": {"without": "head_dim"},
        "Each layer has matrices of its own.": {"without": "layers"},
        "The feed-forward part has three matrices.": {"without": "fc3"},
        "Each group of weights has a scale of 16 bits.": {"without": "scales"},
        "A scale has 16 bits.": {"also": "32-bit scales"},
    }
    for what, target, draft in cases:
        got, want = got_from(target, draft), read(*draft) / read(*target)
        hint = ""
        for words, how in mistakes.items():
            other = read(*draft, **how) / read(*target, **how)
            if not math.isclose(other, want, rel_tol=1e-9) and math.isclose(got, other, rel_tol=1e-7):
                hint = hint or words
        turned = math.isclose(got * want, 1, rel_tol=1e-6) and want != 1
        hint = "The draft's bytes by the target's, not the other way." if turned else hint
        require(math.isclose(got, want, rel_tol=1e-6), f"{what}: the cost is {want:.6g} of a step, yours {got:.6g}. {hint}")


# --- 19. An estimate with its error ---


@exercise("estimate_alpha", chapter=5, title="How well do we know it?", minutes=10, difficulty="core", points=10)
def check_estimate_alpha(your: Student) -> None:
    def got_from(drafted: list[int], kept: list[int]) -> tuple[float, float]:
        got = several(your(drafted, kept), 2, "return two numbers: the estimate of alpha, and its standard error.")
        return number(got[0], "the estimate"), number(got[1], "the error")

    def tries(drafted: list[int], kept: list[int]) -> list[tuple[int, int]]:
        """(tried, kept) of each round with a draft, token by token: the first that does not stay is the last tried."""
        rounds = []
        for k, stay in zip(drafted, kept):
            tried = next((place + 1 for place in range(k) if place >= stay), k)
            if k:
                rounds.append((tried, stay))
        return rounds

    def error(rounds: list[tuple[int, int]], bessel: bool = True) -> float:
        """Of a ratio of two means, from their variances and covariance."""
        n, alpha = len(rounds), sum(y for _, y in rounds) / sum(t for t, _ in rounds)
        mt, my = (sum(pair[i] for pair in rounds) / n for i in (0, 1))
        vt, vy = sum((t - mt) ** 2 for t, _ in rounds), sum((y - my) ** 2 for _, y in rounds)
        cov = sum((t - mt) * (y - my) for t, y in rounds)
        return math.sqrt(max(vy - 2 * alpha * cov + alpha**2 * vt, 0) / (n - bessel) / n) / mt

    generator = torch.Generator().manual_seed(8)
    long = [min(int(torch.empty(1).geometric_(0.3, generator=generator)) - 1, 5) for _ in range(200)]
    uneven = [int(k) for k in torch.randint(0, 7, (60,), generator=generator)]
    cases = [
        ("rounds of 4 that keep 4, 0, 2", [4, 4, 4], [4, 0, 2]),
        ("rounds of 5 that keep 1, 1, 1, 5", [5, 5, 5, 5], [1, 1, 1, 5]),
        ("rounds of 3, 6 and 2 that keep 3, 4 and 0", [3, 6, 2], [3, 4, 0]),
        ("two rounds that keep all", [3, 3], [3, 3]),
        ("rounds of 4 and plain steps between", [4, 0, 4, 0, 0, 4], [4, 0, 0, 0, 0, 2]),
        ("200 rounds of 5", [5] * 200, long),
        ("60 rounds of 0 to 6", uneven, [min(k, i % 4) for i, k in enumerate(uneven)]),
    ]
    for what, drafted, kept in cases:
        rounds, got = tries(drafted, kept), got_from(drafted, kept)
        tried, stayed = sum(t for t, _ in rounds), sum(y for _, y in rounds)
        alpha, n = stayed / tried, len(rounds)
        shares = [y / k for k, y in zip(drafted, kept) if k]
        hints = {
            sum(kept) / sum(drafted): "Tokens behind the first that went were never tried: they say nothing.",
            sum(shares) / n: "A mean of the rounds' shares is not the share of the tokens; what was never tried doesn't count.",
            sum(y / t for t, y in rounds) / n: "A round that tried more tokens counts more: one sum by the other.",
            stayed / (tried + sum(y == k for k, y in zip(drafted, kept) if k)): "If all stay, none was tried beyond the last.",
        }
        hint = next((words for value, words in hints.items() if abs(got[0] - value) < 1e-9 and abs(value - alpha) > 1e-6), "")
        require(
            abs(got[0] - alpha) < 1e-6,
            f"{what}: {stayed} of {tried} tried tokens stayed, alpha is {alpha:.5g}, yours {got[0]:.5g}. {hint}",
        )
        want = error(rounds)
        hints = {
            math.sqrt(alpha * (1 - alpha) / tried): "That takes all tokens for independent. Count by rounds.",
            want * math.sqrt((n - 1) / n): "With n rounds it is n / (n - 1) under the root.",
            want * n: "Divide by all tried tokens, not by those of a round.",
            want * math.sqrt(n): "That is the scatter of one round.",
        }
        if len(drafted) > n:
            m = len(drafted)
            hints[want * math.sqrt(m * (n - 1) / (m - 1) / n)] = "A plain step is no round with a draft: n does not count it."
        hint = next((words for value, words in hints.items() if abs(got[1] - value) < 1e-9 and abs(value - want) > 1e-7), "")
        require(abs(got[1] - want) < 1e-6, f"{what}: the standard error is {want:.5g}, yours {got[1]:.5g}. {hint}")


# --- 20. Shared noise ---


@exercise("coupled_round", chapter=5, title="The same dice for both", minutes=20, difficulty="stretch", points=20)
def check_coupled_round(your: Student) -> None:
    def got_from(p: torch.Tensor, q: torch.Tensor, noise: torch.Tensor) -> list[int]:
        got = tensor_or_list(your(p, q, noise))
        most = len(p)
        require(1 <= len(got) <= most, f"a round of {most - 1} drafted tokens adds 1 to {most}, yours {len(got)}.")
        return got

    def tensor_or_list(value: Any) -> list[int]:
        present(value)
        if isinstance(value, torch.Tensor):
            value = tensor(value, (value.numel(),), torch.int64, what="the list of tokens").tolist()
        require(isinstance(value, list), f"the result is a {type(value).__name__}; want a list of ints.")
        return [whole(token, "a token") for token in value]

    def race(p: torch.Tensor, noise: torch.Tensor) -> list[int]:
        """Of each place, who arrives first: token x after an exponential time of rate p(x), the same as the Gumbel noise."""
        times = torch.exp(-noise.double())
        rows = zip(p.double().tolist(), times.tolist())
        return [min((t / px, x) for x, (px, t) in enumerate(zip(*row)) if px > 0)[1] for row in rows]

    def gumbel(*shape: int, seed: int) -> torch.Tensor:
        uniform = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
        return (-(-uniform.log()).log()).float()

    def rows(*shape: int, seed: int) -> torch.Tensor:
        return numbers(*shape, seed=seed).mul(1.5).softmax(-1)

    still, p = torch.zeros(3, 3), torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.3, 0.6, 0.1]])
    got = got_from(p, p[:2], still)
    hint = "Behind the last drafted token comes one more of the target's." if len(got) == 2 else ""
    require(got == [0, 2, 1], f"no noise, draft and target alike: the favourites of three places, [0, 2, 1], yours {got}. {hint}")
    q = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]])
    got = got_from(p, q, still)
    hint = "It is the target's token that is written, and the draft's that is dropped." if got == [0, 0] else ""
    hint = "After the first that differs the round is over: the next was drafted for another text." if len(got) > 2 else hint
    require(got == [0, 2], f"no noise, the draft's second favourite is another: [0, 2], yours {got}. {hint}")
    noise = torch.tensor([[-2.0, 3.0, 0.0], [4.0, 0.0, -1.0], [0.0, -3.0, 5.0]])
    got, want = got_from(p, p[:2], noise), race(p, noise)
    hint = "Where has the noise gone?" if got == [0, 2, 1] else ""
    require(got == want, f"with noise, draft and target alike: {want}, yours {got}. {hint} Gumbel noise is added to ln p.")
    for seed in range(40):
        k, V = 1 + seed % 5, 2 + seed % 6
        p, noise = rows(k + 1, V, seed=seed), gumbel(k + 1, V, seed=seed)
        q = (p[:k].log() + 0.7 * numbers(k, V, seed=seed + 100)).softmax(-1)
        if seed % 4 == 3:  # tokens that cannot be
            p = torch.where(torch.arange(V) == seed % V, 0, p)
            p = p / p.sum(-1, keepdim=True)
        says, guesses = race(p, noise), race(q, noise[:k])
        same = next((i for i in range(k) if says[i] != guesses[i]), k)
        got, want = got_from(p, q, noise), says[: same + 1]
        by_q = [*guesses[:same], guesses[same]] if same < k else want
        impossible = [x for place, x in enumerate(got) if p[place, x] == 0] if max(got) < V else []
        hint = "A token of probability 0 is never drawn: ln 0 is -inf, and stays so." if impossible else ""
        hint = "The draft's own token must not be written." if got == by_q != want else hint
        others = got[0] != want[0] and not hint
        hint = "The target draws with the same noise as the draft, at each place its own row of it." if others else hint
        hint = "The draft has drawn another token there: stop behind the target's." if got[: len(want)] == want else hint
        hint = "Draft and target agree there: go on." if want[: len(got)] == got else hint
        require(got == want, f"{k} drafted, {V} tokens, noise of seed {seed}: {want}, yours {got}. {hint}")
