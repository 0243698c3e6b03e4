"""Answers to chapter 5's exercises on speculation: known wrong ones (test_exercises.py says how to read them), right ones."""

import torch

MUTANTS = {
    "overlap": [
        ("torch.minimum", "torch.maximum", "not the larger"),
        (
            "torch.minimum(shared, q.float()).sum(dim=-1)",
            "1 - (shared - q.float()).abs().sum(dim=-1)",
            "counts every token twice",
        ),
        ("torch.minimum(shared, q.float()).sum(dim=-1)", "(shared * q.float()).sum(dim=-1)", "two independent draws"),
        (
            "torch.minimum(shared, q.float()).sum(dim=-1)",
            "shared.gather(1, q.argmax(-1, keepdim=True))[:, 0]",
            "the draft's favourite only",
        ),
        (
            "torch.minimum(shared, q.float()).sum(dim=-1)",
            "q.float().gather(1, shared.argmax(-1, keepdim=True))[:, 0]",
            "the target's favourite only",
        ),
        (".sum(dim=-1)", ".mean(dim=-1)", "don't average"),
        ("torch.minimum(shared, q.float())", "(shared / q.float()).clamp(max=1)", "How often does the draft say each token"),
        (".sum(dim=-1)", "", "over the tokens"),
        (".sum(dim=-1)", ".sum(dim=0)", "not over the places"),
        (".sum(dim=-1)", ".sum()", "not one for all"),
        ("p[:, : q.shape[1]].float()", "p.float()", "stopped with RuntimeError"),
        (
            "    return",
            "    shared = shared / shared.sum(-1, keepdim=True)\n    return",
            "Don't make p sum to 1 again",
        ),
        (
            "torch.minimum(shared, q.float()).sum(dim=-1)",
            "torch.minimum(p[:, : q.shape[1]], q).sum(dim=-1)",
            "Go to float32|add up in float32",
        ),
        (
            "torch.minimum(shared, q.float()).sum(dim=-1)",
            "torch.minimum(p[:, : q.shape[1]], q).cumsum(dim=-1)[:, -1].float()",
            "add up in float32",
        ),
    ],
    "accept_or_resample": [
        ("u * float(q[x]) < float(p[x])", "u * float(p[x]) < float(q[x])", "Is it p over q"),
        ("u * float(q[x]) < float(p[x])", "u < float(p[x])", "Is it p over q"),
        ("u * float(q[x]) < float(p[x])", "u * float(q[x]) <= float(p[x])", "not even for u = 0"),
        ("u * float(q[x]) < float(p[x])", "u < 1", "not for u = 0.43"),
        ("u * float(q[x]) < float(p[x])", "float(q[x]) <= float(p[x])", "with probability 0.4, so for u"),
        ("(p - q).clamp(min=0)", "p", "its share already|what both say comes too often|comes back"),
        ("(p - q).clamp(min=0)", "(p - q).abs()", "must not count|Both directions"),
        ("(p - q).clamp(min=0)", "(q - p).clamp(min=0)", "must not count|what q has more"),
        ("(p - q).clamp(min=0)", "q", "its share already|from the draft again|must not count"),
        ("v * mass[-1]", "v", "which is less than 1|the token is"),
        ("v * mass[-1]", "u * mass[-1]", "gives 0, yours|those of p"),
        ("int((mass <= v * mass[-1]).sum())", "int((p - q).argmax())", "gives 3|those of p"),
        ("mass <= v * mass[-1]).sum()), False", "mass <= v * mass[-1]).sum()), True", "and yet your token"),
        ("return x, True", "return x", "two things"),
        ("return x, True", "return True, x", "is a bool"),
        ("int((mass <= v * mass[-1]).sum())", "int((mass < v * mass[-1]).sum()) + 1", "of token 0 p has more"),
    ],
    "greedy_round": [
        ("best[: n + 1]", "best[:n]", "for nothing"),
        ("best[: n + 1]", "guesses[: n + 1]", "for nothing|must not be added"),
        ("best[: n + 1]", "guesses[:n] + best[-1:]", "one token is added|4 stays"),
        ("best[: n + 1]", "best", "an answer to another text"),
        ("n < count and ", "n < len(guesses) and ", "only fills it up"),
        (
            "        while n < count and guesses[n] == best[n]:\n            n += 1\n",
            "        n = sum(guesses[i] == best[i] for i in range(count))\n",
            "by luck",
        ),
        ("guesses[n] == best[n]", "guesses[n] == best[n + 1]", "all three"),
        (
            "    return added\n",
            "    least = min(len(row) for row in added)\n    return [row[:least] for row in added]\n",
            "No row waits",
        ),
        ("    return added\n", "    return torch.tensor(added)\n", "a list with a list|stopped with"),
        ("    return added\n", "    return added[0]\n", "a list with a list|a row is"),
        ("logits.argmax(dim=-1).tolist()", "logits.argmin(dim=-1).tolist()", "all three drafted tokens are right"),
    ],
    "after_round": [
        ("drafted[:accepted] + [token]", "drafted[:accepted]", "forget the token|stopped with"),
        ("drafted[:accepted] + [token]", "drafted + [token]", "A rejected token"),
        ("added[: ends[0] + 1]", "added[: ends[0]]", "itself belongs|stopped with"),
        ("[place for place, each in enumerate(added) if each in stops]", "[len(added) - 1] * (added[-1] in stops)", "first stop token"),
        ("added[: ends[0] + 1] if ends else added", "added", "first stop token"),
        ("    added = added[:room]\n", "", "room for"),
        ("target = min(n + len(added), n + accepted)", "target = n + len(drafted)", "worth nothing"),
        ("target = min(n + len(added), n + accepted)", "target = n + accepted", "has been cut off"),
        ("target = min(n + len(added), n + accepted)", "target = n + len(added)", "worth nothing"),
        ("target = min(n + len(added), n + accepted)", "target = n + min(len(added), accepted + 1)", "worth nothing"),
        ("target = min(n + len(added), n + accepted)", "target = n + len(added) - 1", "nothing is read twice"),
        ("draft = min(target, n + len(drafted) - 1)", "draft = target", "nobody asked it"),
        ("draft = min(target, n + len(drafted) - 1)", "draft = n + len(drafted) - 1", "slots of the draft"),
        (" or len(added) == room", "", "so does a full row"),
        ("added[-1] in stops or", "bool(set(text) & stops) or added[-1] in stops or", "Only a token of this round"),
        ("added[-1] in stops or", "bool(set(drafted) & stops) or added[-1] in stops or", "has not ended"),
        ("return added, target, draft, ", "return added, target, ", "four things"),
    ],
}  # fmt: skip


def by_distance(p, q):
    wide = torch.zeros(p.shape, dtype=torch.float64)
    wide[:, : q.shape[1]] = q.double()
    return (1 - (p.double() - wide).abs().sum(1) / 2 + (wide.sum(1) - 1) / 2 + (p.double().sum(1) - 1) / 2).float()


def by_lists(p, q, x, u, v):
    p, q = p.tolist(), q.tolist()
    if q[x] <= p[x] or u < p[x] / q[x]:
        return x, True
    more = [max(a - b, 0.0) for a, b in zip(p, q)]
    left = v * sum(more)
    for token, weight in enumerate(more):
        left -= weight
        if left < 0:
            return token, False


def by_products(logits, drafted, counts):
    best = logits.argmax(-1)
    same = (drafted == best[:, :-1]) & (torch.arange(drafted.shape[1]) < counts[:, None])
    n = same.long().cumprod(1).sum(1)
    return [row[: m + 1].tolist() for row, m in zip(best, n)]


def by_writing(text, drafted, accepted, token, stops, room):
    now, ended = list(text), False
    for each in [*drafted[:accepted], token]:
        now.append(each)
        ended = each in stops or len(now) - len(text) == room
        if ended:
            break
    target = 0
    while target < min(len(text) + len(drafted), len(now)) and [*text, *drafted][target] == now[target]:
        target += 1
    return now[len(text) :], target, min(target, len(text) + len(drafted) - 1), ended


OTHERS = {
    "overlap": by_distance, "accept_or_resample": by_lists, "greedy_round": by_products, "after_round": by_writing,
}  # fmt: skip
