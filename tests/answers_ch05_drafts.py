"""Answers to chapter 5's exercises on drafts: known wrong ones (test_exercises.py says how to read them), right ones."""

import math

import torch

MUTANTS = {
    "best_k": [
        ("range(k + 1)", "range(k)", "a token of its own|If no draft pays"),
        ("range(k + 1)", "max(k, 1) * [0]", "k = "),
        ("(k * c + v[k])", "(c + v[k])", "each of them c|If no draft pays"),
        ("(k * c + v[k])", "v[k]", "with k|k = |is the best"),
        (" / (k * c + v[k])", "", "divide by what the round costs|If no draft|is the best"),
        ("max(speedups)", "min(speedups)", "the worst|k = 1 is the best"),
        ("return k, ", "return k + 1, ", "the check reads one more"),
        ("sum(alpha**n for n in range(k + 1))", "(1 - alpha ** (k + 1)) / (1 - alpha)", "stopped with ZeroDivisionError"),
        ("k = speedups.index(max(speedups))", "k = max(range(1, len(v)), key=speedups.__getitem__)", "the check reads one more|k is 0"),
        (
            "k = speedups.index(max(speedups))",
            "k = max(range(len(v)), key=lambda k: (speedups[k], k))",
            "the smallest k|k is 0",
        ),
        ("return k, float(speedups[k])", "return k", "two things"),
        ("return k, float(speedups[k])", "return float(speedups[k]), k", "k is"),
        ("sum(alpha**n for n in range(k + 1))", "(1 + k * alpha)", "k = "),
    ],
    "draft_cost": [
        ("bytes_of(*draft) / bytes_of(*target)", "bytes_of(*target) / bytes_of(*draft)", "not the other way"),
        ("+ cfg[\"vocab_size\"] * D", "", "The head is a matrix"),
        ("+ cfg[\"vocab_size\"] * D", "+ cfg[\"vocab_size\"] * D * (1 if cfg.get(\"tie_embeddings\") else 2)", "leave it out"),
        ("+ cfg[\"vocab_size\"] * D", "+ 2 * cfg[\"vocab_size\"] * D", "leave it out"),
        ("2 * D * G * d", "2 * D * H * d", "n_kv_groups heads"),
        ("cfg.get(\"head_dim\") or D // H", "D // H", "has a head_dim"),
        ("cfg[\"n_layers\"] * layer", "layer", "Each layer"),
        ("3 * D * F", "2 * D * F", "three matrices"),
        ("(bits + (16 / group if group else 0))", "bits", "a scale of 16 bits"),
        ("16 / group", "32 / group", "A scale has 16 bits"),
        ("16 / group if group else 0", "16 / group", "stopped with TypeError"),
        ("bytes_of(*draft) / bytes_of(*target)", "bytes_of(*draft)", "cost is"),
        ("* (bits + (16 / group if group else 0)) / 8", "", "8 bits|cost is"),
    ],
    "estimate_alpha": [
        ("min(y + 1, k)", "k", "never tried"),
        ("min(y + 1, k)", "y + 1", "none was tried beyond"),
        (
            "alpha = sum(y for _, y in rounds) / tried",
            "alpha = sum(y / t for t, y in rounds) / n",
            "one sum by the other",
        ),
        (
            "alpha = sum(y for _, y in rounds) / tried",
            "alpha = sum(y / k for k, y in zip(drafted, kept) if k) / n",
            "a mean of the rounds|A mean of the rounds",
        ),
        ("(n / (n - 1) * squares) ** 0.5 / tried", "(alpha * (1 - alpha) / tried) ** 0.5", "Count by rounds"),
        ("n / (n - 1) * squares", "squares", "n / (n - 1) under the root"),
        ("** 0.5 / tried", "** 0.5 / tried * n", "not by those of a round"),
        ("** 0.5 / tried", "** 0.5 / tried * n ** 0.5", "scatter of one round"),
        ("tried, n = sum(t for t, _ in rounds), len(rounds)", "tried, n = sum(t for t, _ in rounds), len(drafted)", "does not count it"),
        (" if k]", "]", "does not count it"),
        ("return alpha, ", "return ", "two numbers"),
        ("(n / (n - 1) * squares) ** 0.5 / tried", "(n / (n - 1) * squares) / tried", "standard error is"),
        ("(y - alpha * t) ** 2", "abs(y - alpha * t)", "standard error is"),
    ],
    "coupled_round": [
        ("(p.log() + noise).argmax", "(p + noise).argmax", "added to ln p|seed"),
        ("(p.log() + noise).argmax", "p.log().argmax", "added to ln p"),
        ("(p.log() + noise)", "(p.log() - noise)", "with noise"),
        ([("(p.log() + noise)", "p.log()"), ("(q.log() + noise[:-1])", "q.log()")], "Where has the noise gone"),
        ("(p.log() + noise)", "(p.log() + noise.flip(0))", "its own row|with noise"),
        ("(q.log() + noise[:-1])", "(q.log() + noise[1:])", "with noise|Draft and target agree"),
        ("says[: n + 1]", "says[:n]", "one more of the target's|adds 1 to"),
        ("says[: n + 1]", "(guesses[: n + 1] + says)[: n + 1] if n < len(guesses) else says", "the draft's that is dropped"),
        ("return says[: n + 1]", "return says", "drafted for another text"),
        ("(q.log() + noise[:-1])", "q.log()", "with noise|Draft and target agree|drawn another"),
        ("p.log()", "(p + 1e-2).log()", "never drawn|seed"),
        ("return says[: n + 1]", "return says[: max(n, 1)]", "one more of the target's|seed"),
        ("    n = 0\n    while n < len(guesses) and guesses[n] == says[n]:\n        n += 1\n",
         "    n = sum(a == b for a, b in zip(guesses, says))\n", "seed|\\[0, 2\\]"),
    ],
}  # fmt: skip


def by_comparing(alpha, c, v):
    best = (0, 1.0)
    for k in range(1, len(v)):
        tokens = float(k + 1) if alpha == 1 else (1 - alpha ** (k + 1)) / (1 - alpha)
        if tokens / (k * c + v[k]) > best[1] + 1e-12:
            best = k, tokens / (k * c + v[k])
    return best


def by_tensors(target, draft):
    def bits_of(cfg, bits, group):
        D, H, G = cfg["emb_dim"], cfg["n_heads"], cfg["n_kv_groups"]
        d = cfg["head_dim"] if cfg.get("head_dim") is not None else D // H
        rows = cfg["n_layers"] * ((H + 2 * G) * d + 2 * cfg["hidden_dim"]) + cfg["vocab_size"]  # of D weights
        weights = rows * D + cfg["n_layers"] * D * (H * d + cfg["hidden_dim"])
        return weights * bits + (0 if group is None else weights / group * 16)

    return bits_of(*draft) / bits_of(*target)


def by_counting(drafted, kept):
    rounds = [([1] * y + [0] * (y < k)) for k, y in zip(drafted, kept) if k > 0]
    tried = sum(map(len, rounds))
    alpha = sum(map(sum, rounds)) / tried
    n = len(rounds)
    off = [sum(one - alpha for one in each) for each in rounds]
    return alpha, math.sqrt(sum(x * x for x in off) * n / (n - 1)) / tried


def by_racing(p, q, noise):
    says = (torch.exp(-noise.double()) / p.double()).argmin(-1)
    guesses = (torch.exp(-noise[: len(q)].double()) / q.double()).argmin(-1)
    n = int((says[: len(q)] == guesses).long().cumprod(0).sum())
    return says[: n + 1].tolist()


OTHERS = {
    "best_k": by_comparing, "draft_cost": by_tensors, "estimate_alpha": by_counting, "coupled_round": by_racing,
}  # fmt: skip
