"""Answers to chapter 4's exercises: known wrong ones (test_exercises.py says how to read them) and other right ones."""

import torch
import torch.nn.functional as F

MUTANTS = {
    "positions_computed": [
        ("range(new)", "range(new + 1)", "nobody reads the last one|Nobody reads"),
        ("return again, prompt + new - 1", "return again, prompt + new", "Nobody reads the token"),
        ("return again, prompt + new - 1", "return again, new", "its forward reads the 4 of the prompt"),
        ("return again, prompt + new - 1", "return prompt + new - 1, again", "First the number without"),
        ("prompt + written for", "prompt for", "grows from step to step"),
        ("prompt + written for", "prompt + written + 1 for", "its forward reads the 4"),
        ("    if new == 0:\n        return 0, 0\n", "", "no new token, no forward"),
        ("return again, prompt + new - 1", "return again", "return two numbers"),
        ("return again, prompt + new - 1", "return new, new", "its forward reads the 4"),
        ("return again, prompt + new - 1", "return again / 1, prompt + new - 1", "a count is an int"),
    ],
    "append": [
        ("] = K", "] += K", "don't hold the three keys"),
        ("cache.values[:, :, cache.length : end] = V", "cache.values[:, :, cache.length : end] = K", "three values"),
        ("    cache.values[:, :, cache.length : end] = V\n", "", "three values"),
        ("    cache.length = end\n", "", "cache.length is 0 afterwards"),
        ("    cache.length = end\n", "    cache.length = K.shape[2]\n", "cache.length is 2 afterwards"),
        (
            "return cache.keys[:, :, :end], cache.values[:, :, :end]",
            "return cache.keys, cache.values",
            "not the empty ones",
        ),
        ("return cache.keys[:, :, :end], cache.values[:, :, :end]", "return K, V", "needs the old tokens"),
        (
            "return cache.keys[:, :, :end], cache.values[:, :, :end]",
            "return cache.values[:, :, :end], cache.keys[:, :, :end]",
            "not keys, then values",
        ),
        ("return cache.keys[:, :, :end], ", "return cache.keys[:, :, :end].clone(), ", "you return a copy"),
        ("if end > cache", "if end >= cache", "they fit exactly"),
        ("if end > cache.keys.shape[2]:", "if False:", "nothing is said"),
        ("if end > cache.keys.shape[2]:", "if cache.length > cache.keys.shape[2]:", "nothing is said"),
        ("raise ValueError", "raise IndexError", "raise a ValueError"),
        (
            [
                ("    if end > cache.keys.shape[2]:\n", ""),
                ('        raise ValueError(f"{end} tokens, but the cache has {cache.keys.shape[2]} slots")\n', ""),
                (
                    "    cache.length = end\n",
                    "    cache.length = end\n    if end > cache.keys.shape[2]:\n        raise ValueError\n",
                ),
            ],
            "the cache has changed all the same",
        ),
        ("cache.keys[:, :, cache.length : end] = K", "cache.keys[:, :, : K.shape[2]] = K", "slots 3 and 4"),
        (
            "    cache.keys[:, :, cache.length : end] = K\n",
            "    cache.keys = torch.cat([cache.keys[:, :, : cache.length], K, cache.keys[:, :, end:]], dim=2)\n",
            "another tensor than before",
        ),
    ],
    "reuse": [
        ("len(prompt) - 1", "len(prompt)", "no logits"),
        ("        keep += 1", "        keep += 1\n    keep -= keep == len(read)", "keep 3 and read these two"),
        (
            [
                ("    keep = 0\n", "    keep = sum(a == b for a, b in zip(read, prompt[:-1]))\n"),
                ("while keep <", "while False and keep <"),
            ],
            "has seen it|another prompt",
        ),
        ("return keep, prompt[keep:]", "return keep, prompt[keep + 1 :]", "What is not kept must be read"),
        ("return keep, prompt[keep:]", "return keep, prompt", "What is not kept must be read"),
        ("return keep, prompt[keep:]", "return prompt[keep:], keep", "want an int"),
        ("return keep, prompt[keep:]", "return 0, prompt", "keep 3 and read these two"),
        ("keep = 0", "keep = len(read)", "of which you keep|another prompt|stopped with|the first"),
        ("min(len(read), len(prompt) - 1)", "len(prompt) - 1", "stopped with IndexError"),
        (
            "    return keep, prompt[keep:]",
            "    keep = keep if keep == len(read) else 0\n    return keep, prompt[keep:]",
            "the first 2 stay",
        ),
    ],
    "slots_hold": [
        (
            "held = position - (position - slot) % slots",
            "held = position // slots * slots + slot",
            "still to come|never written",
        ),
        ("return held.clamp(min=-1)", "return held", "holds -1"),
        ("return held.clamp(min=-1)", "return held.clamp(min=0)", "they hold"),
        ("(position - slot) % slots", "(position + slot) % slots", "other slots|they hold"),
        ("held = position - (", "held = position - 1 - (", "they hold"),
        ("    held = ", "    position = position - 1\n    held = ", "has been written"),
        ("return held.clamp(min=-1)", "return held.clamp(min=-1).float()", "whole numbers"),
        ("return held.clamp(min=-1)", "return held.clamp(min=-1).sort().values", "other slots"),
    ],
    "ragged": [
        ("row + [pad] * (T - len(row))", "[pad] * (T - len(row)) + row", "pads stand on the left"),
        (
            "torch.tensor(held)[:, None] + torch.arange(T)",
            "torch.arange(T).repeat(len(new), 1)",
            "their next ones are at",
        ),
        ("len(row) - 1 for", "len(row) for", "their last ones stand at"),
        ("torch.tensor([len(row) - 1 for row in new])", "torch.full((len(new),), T - 1)", "their last ones stand at"),
        (
            "torch.tensor([len(row) - 1 for row in new])",
            "torch.tensor([len(row) - 1 + n for row, n in zip(new, held)])",
            "whatever the cache holds",
        ),
        (
            "    return ids",
            "    positions = torch.where(ids == pad, 0, positions)\n    return ids",
            "over one of them|a pad is written",
        ),
        (
            "    return ids",
            "    positions = positions.minimum(torch.tensor(held)[:, None] + last[:, None])\n    return ids",
            "a pad is written",
        ),
        ("    return ids", "    positions = positions + 1\n    return ids", "their next ones are at"),
        ("    return ids, positions, last", "    return ids.T, positions, last", "Rows are texts"),
        ("    return ids, positions, last", "    return ids, positions", "return three tensors"),
        ("[pad] *", "[0] *", "ids are"),
    ],
    "write_rows": [
        ("input_pos[:, None, :, None].expand(K.shape)", "input_pos[:, None, :, None]", "an index that is too small"),
        (
            "input_pos[:, None, :, None].expand(K.shape)",
            "input_pos[:, None, :, None].expand(*K.shape[:3], 1)",
            "an index that is too small",
        ),
        (
            "input_pos[:, None, :, None].expand(K.shape)",
            "input_pos[:, None, :, None].expand(len(K), 1, *K.shape[2:])",
            "only what it covers",
        ),
        ("input_pos[:, None", "input_pos[:1, None", "belongs to it alone"),
        ("keys.scatter(2, index, K)", "keys.scatter_(2, index, K)", "changes its arguments"),
        ("keys.scatter(2, index, K)", "keys.scatter_add(2, index, K)", "added to what was there"),
        ("    return keys.scatter(2, index, K)", "    return keys.clone()", "nothing was written"),
        (
            "    return keys.scatter(2, index, K)",
            "    out = keys.clone()\n    for b, at in enumerate(input_pos):\n        out[b, :, at] = K[b]\n    "
            "return out",
            "there is a loop",
        ),
        (
            "    return keys.scatter(2, index, K)",
            "    out = keys.clone()\n    out[:, :, input_pos[:, 0]] = K[:, :, :1]\n    return out",
            "stopped with|belongs to it alone|row's new key",
        ),
        ("    return keys.scatter(2, index, K)", "    return keys[:, :, input_pos]", "the slots of all rows"),
        ("keys.scatter(2, index, K)", "keys.float().scatter(2, index, K.float())", "Give back keys' dtype"),
    ],
    "attend_ragged": [
        ("clean = values.masked_fill(unseen.mT, 0.0)", "clean = values", "0 times infinity|0 times NaN"),
        ("values.masked_fill(unseen.mT, 0.0)", "values.nan_to_num(posinf=torch.inf)", "may reach the result"),
        (">= lengths", "> lengths", "slots 0 to n - 1"),
        ("scores.masked_fill(unseen, -torch.inf)", "scores", "All see all slots|its own slots only|that token's value"),
        (
            "scores.masked_fill(unseen, -torch.inf)",
            "(scores + torch.where(unseen, -torch.inf, 0.0))",
            "may reach the result",
        ),
        ("scores.masked_fill(unseen, -torch.inf)", "scores.masked_fill(unseen, 0.0)", "that token's value"),
        (" / d**0.5", "", "divided by √d"),
        (" / d**0.5", " / d", "root of d, once"),
        (
            "    return (weights @ clean).flatten(1, 2)",
            "    return (weights @ clean).transpose(1, 2).flatten(1, 2)",
            "group",
        ),
        ("    return (weights @ clean).flatten(1, 2)", "    return weights @ clean", "Bring groups and their heads"),
        ("softmax(dim=-1)", "softmax(dim=-2)", "add up to 1"),
        (
            [
                (
                    "    scores = q.unflatten(1, (G, -1)) @ keys.mT / d**0.5",
                    "    keys, values = (x.repeat_interleave(q.shape[1] // G, 1) for x in (keys, values))\n    "
                    "scores = q[:, :, None] @ keys.mT / d**0.5",
                ),
                (".flatten(1, 2)", ".squeeze(2)"),
            ],
            "repeated for every head",
        ),
    ],
    "visible_scores": [
        (
            "unseen = torch.arange(keys.shape[0]) > position",
            "unseen = torch.arange(keys.shape[0]) >= position",
            "sees its own slot",
        ),
        ("-torch.inf", "0.0", "must be -inf"),
        (
            "    return (keys @ q).masked_fill(unseen, -torch.inf)",
            "    return keys[: position + 1] @ q",
            "new shape for every token",
        ),
        (
            "    return (keys @ q).masked_fill(unseen, -torch.inf)",
            "    n = position.item() + 1\n    return F.pad(keys[:n] @ q, (0, len(keys) - n), value=-torch.inf)",
            "graphs of it, not one",
        ),
        ("(keys @ q).masked_fill(unseen, -torch.inf)", "(keys @ q) * ~unseen - 1e9 * unseen", "must be -inf"),
        ("(keys @ q)", "(keys @ q).softmax(-1)", "not keys times q"),
        ("(keys @ q).masked_fill(unseen, -torch.inf)", "(keys @ q) + torch.where(unseen, -torch.inf, 0.0)", "NaN"),
        ("(keys @ q)", "(keys @ q).double()", "as q"),
    ],
    "row_probs": [
        (
            [
                ("torch.where(greedy, 1.0, temperature[:, None])", "temperature[:, None].clamp(min=1e-5)"),
                ("return torch.where(greedy, sure, warm)", "return warm"),
            ],
            "nearly 0 is not 0",
        ),
        ("return torch.where(greedy, sure, warm)", "return warm", "puts all on the largest|nearly 0"),
        ("temperature == 0", "temperature >= 0", "at temperature 1"),
        ("temperature[:, None])", "temperature.flip(0)[:, None])", "one a row"),
        ("temperature[:, None])", "temperature.mean())", "one a row"),
        ("logits.float() / divisor", "logits.float() * divisor", "Divide by it"),
        ("softmax(dim=-1)", "softmax(dim=0)", "must add up to 1"),
        ("logits.float() / divisor", "logits / divisor.to(logits.dtype)", "Probabilities are float32|go to float32"),
        (".argmax(dim=-1)", ".argmin(dim=-1)", "not the largest"),
        (
            "    return torch.where(greedy, sure, warm)",
            "    return torch.stack([s if t.item() == 0 else w for s, w, t in zip(sure, warm, temperature)])",
            "graphs of it, not one",
        ),
        (
            "    return torch.where(greedy, sure, warm)",
            "    return sure.index_copy(0, torch.where(temperature > 0)[0], warm[temperature > 0])",
            "graphs of it, not one",
        ),
        (
            "    return torch.where(greedy, sure, warm)",
            "    return torch.stack([torch.where(g, s, w) for s, w, g in zip(sure, warm, greedy)])",
            "a loop over rows",
        ),
        (".softmax(dim=-1)", ".exp()\n    warm = warm / warm.sum(-1, keepdim=True)", "overflow|NaN"),
    ],
    "draw_rows": [
        ("generator=generator, dtype", "generator=generators[0], dtype", "takes exactly one"),
        ("dtype=torch.float64) for", "dtype=torch.float32) for", "takes exactly one"),
        (
            "    return (sums <= limit).sum(dim=-1)",
            "    return torch.cat([torch.multinomial(p, 1, generator=g) for p, g in zip(probs, generators)])",
            "takes exactly one",
        ),
        ("    return (sums <= limit).sum(dim=-1)", "    return probs.argmax(dim=-1)", "first running sums"),
        (" * sums[:, -1:]", "", "row's own sum|and you draw id"),
        ("probs.double().cumsum(dim=-1)", "probs.cumsum(dim=-1)", "Add up in float64"),
        ("cumsum(dim=-1)", "cumsum(dim=0)", "each row is certain|and you draw id"),
        (".cumsum(dim=-1)", "", "first running sums|have probability 0|each row is certain"),
        ("limit).sum(dim=-1)", "limit).sum(dim=-1, keepdim=True)", "Want (B,)"),
        ("(sums <= limit)", "(sums > limit)", "each row is certain|and you draw id"),
        (
            "    u = [",
            "    generators = [torch.Generator().manual_seed(g.initial_seed()) for g in generators]\n    u = [",
            "takes exactly one",
        ),
        ("torch.stack(u)[:, None]", "torch.stack(u).flip(0)[:, None]", "first running sums"),
        ("    u = [", "    torch.rand((), generator=generators[0])\n    u = [", "takes exactly one"),
    ],
    "most_tokens_per_s": [
        ("weight_bytes + rows * context", "rows * weight_bytes + rows * context", "read once for all rows"),
        ("return rows * gb_per_s", "return gb_per_s", "read once for all rows|together"),
        ("* 1e9", "* 2**30", "1e9 bytes"),
        ("* 1e9", "", "25 steps a second"),
        ("rows * context * cache_bytes", "context * cache_bytes", "a cache of its own"),
        ("rows * context * cache_bytes", "rows * cache_bytes", "25 steps a second|for each position"),
        ("rows * context * cache_bytes", "0 * context", "the whole cache of its row"),
        ("return rows * gb_per_s * 1e9 / step_bytes", "return step_bytes / (gb_per_s * 1e9)", "seconds of a step"),
        ("* 1e9 / step_bytes", "* 1e9 // step_bytes", "tokens/s"),
    ],
    "step_costs": [
        ("flops = 2 * rows", "flops = rows", "FLOPs, you say"),
        ("4 * queries * seen", "2 * queries * seen", "two products"),
        ("4 * queries * seen", "0 * seen", "are products, too"),
        ("4 * queries * seen", "4 * groups * seen", "H query heads|FLOPs, you say"),
        ("2 * groups * seen", "groups * seen", "keys *and* values"),
        ("2 * groups * seen", "2 * queries * seen", "G heads, not H"),
        ("size * (matrices", "size * (rows * matrices", "read once for all rows"),
        (' + cfg["emb_dim"] * cfg["vocab_size"]', "", "The head is"),
        (' + cfg["emb_dim"] * cfg["vocab_size"]', ' + 2 * cfg["emb_dim"] * cfg["vocab_size"]', "FLOPs, you say"),
        ("3 * cfg", "2 * cfg", "three matrices"),
        (
            'cfg.get("head_dim") or cfg["emb_dim"] // cfg["n_heads"]',
            'cfg["emb_dim"] // cfg["n_heads"]',
            "with head_dim means it",
        ),
        ("context * rows", "context", "times the arithmetic|cache of its own"),
        ("size * (matrices", "2 * (matrices", "twice as many bytes"),
    ],
    "rows_until_compute": [
        ("-(-weights * flop_per_s // gain)", "weights * flop_per_s // gain", "a byte more to read"),
        (" - cache * flop_per_s", "", "brings a cache"),
        ("if gain <= 0", "if gain < 0", "stopped with ZeroDivisionError"),
        ("        return None", "        return 0", "Return None"),
        ("    if gain <= 0:\n        return None\n", "    gain = abs(gain) or 1\n", "no number of rows"),
        ("flops * bytes_per_s - cache * flop_per_s", "flops * flop_per_s - cache * bytes_per_s", "512 rows"),
        ("-(-weights * flop_per_s // gain)", "-(-weights * flop_per_s // gain) + 1", "512 rows"),
        ("-(-weights * flop_per_s // gain)", "weights * flop_per_s / gain", "a count is an int"),
        ("-(-weights * flop_per_s // gain)", "int(weights * flop_per_s / gain) + 1", "512 rows"),
    ],
    "join_chunks": [
        ("(largest - largest.amax(dim=0)).exp()", "torch.ones_like(largest)", "bring them to one"),
        (
            "    return (factor[:, :, None] * context).sum(dim=0) / whole[:, None]",
            "    return (context / total[:, :, None]).mean(dim=0)",
            "equally heavy",
        ),
        ("(largest - largest.amax(dim=0)).exp()", "largest.exp()", "exp only differences|differences only"),
        (
            "(largest - largest.amax(dim=0)).exp()",
            "(largest - largest.amax()).exp()",
            "a largest score of its own|a largest of its own",
        ),
        (
            "(largest - largest.amax(dim=0)).exp()",
            "(largest - largest[0]).exp()",
            "overflow|from which score|empty chunk",
        ),
        ("largest.amax(dim=0)).exp()", "largest.mean(dim=0)).exp()", "overflow|from which score|empty chunk"),
        ("(factor * total)", "total", "two chunks"),
        (" / whole[:, None]", "", "divided by its total"),
        (".sum(dim=0) / whole[:, None]", " / whole[:, None]", "Dimension 0, the chunks, goes"),
        ("(factor * total).sum(dim=0)", "factor.sum(dim=0)", "divided by its total"),
        (
            "    factor = ",
            "    while len(largest) > 1:\n"
            "        m = largest[:2].amax(dim=0)\n"
            "        f = (largest[:2] - m).exp()\n"
            "        total = torch.cat([(f * total[:2]).sum(0, keepdim=True), total[2:]])\n"
            "        context = torch.cat([(f[..., None] * context[:2]).sum(0, keepdim=True), context[2:]])\n"
            "        largest = torch.cat([m[None], largest[2:]])\n"
            "    factor = ",
            "minus -inf",
        ),
    ],
}


def by_simulation(prompt, new):
    texts = range(prompt, prompt + new)
    return sum(texts), max([0, *texts])


def by_index_copy(cache, K, V):
    places = torch.arange(cache.length, cache.length + K.shape[2])
    if len(places) and places[-1] >= cache.keys.shape[2]:
        raise ValueError("too long")
    cache.keys.index_copy_(2, places, K)
    cache.values.index_copy_(2, places, V)
    cache.length += len(places)
    return cache.keys.narrow(2, 0, cache.length), cache.values.narrow(2, 0, cache.length)


def by_comparing_all(read, prompt):
    equal = [a == b for a, b in zip(read, prompt)][: len(prompt) - 1] + [False]
    return equal.index(False), prompt[equal.index(False) :]


def by_writing(position, slots):
    held = torch.full((slots,), -1)
    for p in range(max(0, position - slots + 1), position + 1):
        held[p % slots] = p
    return held


def by_filling(new, held, pad):
    T = max(map(len, new))
    ids, positions = torch.full((len(new), T), pad), torch.zeros(len(new), T, dtype=torch.long)
    for r, row in enumerate(new):
        ids[r, : len(row)] = torch.tensor(row)
        positions[r] = torch.arange(held[r], held[r] + T)
    return ids, positions, torch.tensor(list(map(len, new))) - 1


def by_index_put(keys, K, input_pos):
    out = keys.clone()
    out[torch.arange(len(keys))[:, None], :, input_pos] = K.transpose(1, 2)
    return out


def by_fused_attention(q, keys, values, lengths):
    seen = (torch.arange(keys.shape[2]) < lengths[:, None])[:, None, None]  # (B, 1, 1, S)
    keys, values = (torch.where(seen.mT, x, 0.0) for x in (keys, values))
    return F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=seen, enable_gqa=True)[:, :, 0]


def by_two_at_a_time(largest, total, context):
    m, t, c = largest[0], total[0], context[0]
    for m2, t2, c2 in zip(largest[1:], total[1:], context[1:]):
        top = torch.maximum(m, m2).clamp(min=-1e30)
        a, b = (m - top).exp(), (m2 - top).exp()
        m, t, c = top, a * t + b * t2, a[:, None] * c + b[:, None] * c2
    return c / t[:, None]


def by_scatter(logits, temperature):
    logits = logits.float() - logits.float().amax(dim=-1, keepdim=True)
    hot = torch.zeros_like(logits).scatter(1, logits.argmax(dim=-1, keepdim=True), 1.0)
    return torch.where(temperature[:, None] == 0, hot, (logits / temperature[:, None]).softmax(dim=-1))


def by_searching(probs, generators):
    tokens = []
    for row, generator in zip(probs.double(), generators):
        sums = row.cumsum(dim=0)
        u = torch.rand((), generator=generator, dtype=torch.float64)
        tokens.append(torch.searchsorted(sums, u * sums[-1], right=True))
    return torch.stack(tokens)


def by_parts(cfg, rows, context, size):
    d, D, H, G = (
        cfg.get("head_dim", cfg["emb_dim"] // cfg["n_heads"]),
        cfg["emb_dim"],
        cfg["n_heads"],
        cfg["n_kv_groups"],
    )
    flops, numbers = 2 * rows * D * cfg["vocab_size"], D * cfg["vocab_size"]
    for _ in range(cfg["n_layers"]):
        for a, b in ((D, H * d), (D, G * d), (D, G * d), (H * d, D), (D, cfg["hidden_dim"] * 3)):
            flops, numbers = flops + 2 * rows * a * b, numbers + a * b
        flops, numbers = flops + 2 * (2 * rows * H * d * context), numbers + 2 * rows * G * d * context
    return flops, numbers * size


OTHERS = {
    "positions_computed": by_simulation,
    "append": by_index_copy,
    "reuse": by_comparing_all,
    "slots_hold": by_writing,
    "ragged": by_filling,
    "write_rows": by_index_put,
    "attend_ragged": by_fused_attention,
    "visible_scores": lambda q, keys, at: torch.where(torch.arange(len(keys)) <= at, (keys * q).sum(-1), -torch.inf),
    "row_probs": by_scatter,
    "draw_rows": by_searching,
    "most_tokens_per_s": lambda bw, w, c, n, rows: rows / ((w / 1e9 + rows * n * c / 1e9) / bw),
    "step_costs": by_parts,
    "rows_until_compute": lambda f, w, c, p, m: (
        None if f * m <= c * p else (w * p + f * m - c * p - 1) // (f * m - c * p)
    ),
    "join_chunks": by_two_at_a_time,
}
