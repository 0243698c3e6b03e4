"""Answers to chapter 2's exercises: known wrong ones (test_exercises.py says how to read them) and other right ones."""

import torch
from torch.nn import functional as F

MUTANTS = {
    "positions_that_fit": [
        ("2 * cfg", "cfg", "keys *and* values"),
        ('cfg["n_kv_groups"]', 'cfg["n_heads"]', "queries are not kept"),
        ('cfg["n_layers"] * ', "", "each layer has its own"),
        (" * batch", "", "keys and values of its own"),
        (" * bytes_per_number", " * 2", "in float32"),
        ("free_bytes // per_position", "-(-free_bytes // per_position)", "only 399 fit whole"),
        ("free_bytes // per_position", "free_bytes / per_position", "a count is an int"),
        ("free_bytes // per_position", "round(free_bytes / per_position)", "only 399 fit whole"),
        (
            'min(free_bytes // per_position, cfg["context_length"])',
            "free_bytes // per_position",
            "no more positions than that",
        ),
        ('cfg.get("head_dim") or ', "", "head_dim means it|only keys and values stay"),
        ("min(free", "max(free", "twice the free memory"),
    ],
    "repeat_kv": [
        ("x.repeat_interleave(each, dim=1)", "x.repeat(1, each, 1, 1)", "serves its heads in a row"),
        ("dim=1", "dim=2", "Dimension 2 holds positions"),
        ("dim=1", "dim=3", "a head's numbers"),
        ("dim=1", "dim=0", "is the batch"),
        ("x.repeat_interleave(each, dim=1)", "x", "Nothing has been repeated"),
        ("x.repeat_interleave(each, dim=1)", "x.repeat_interleave(n_heads, dim=1)", "not the number of repetitions"),
        ("x.repeat_interleave(each, dim=1)", "x.unsqueeze(2).expand(-1, -1, each, -1, -1)", "one dimension of heads"),
        ("x.repeat_interleave", "x.float().repeat_interleave", "Give back x's dtype"),
        ("x.repeat_interleave", "x.flip(1).repeat_interleave", "yours read the groups"),
        ("n_heads // x.shape[1]", "2", "has shape"),
    ],
    "grouped_attention": [
        (" / d**0.5", "", "divided by √d"),
        ("d**0.5", "d", "the root of d, once"),
        ("tril(S - T)", "tril()", "sees all keys"),
        ("tril(S - T)", "tril(S - T + 1)", "see the future"),
        ("tril(S - T)", "tril(S)", "see the future"),
        ("tril(S - T)", "triu(S - T)", "see the future|the oldest key|are all 0"),
        ("softmax(dim=-1)", "softmax(dim=-2)", "add up to 1 over the"),
        (
            "q.reshape(B, G, H // G * T, d)",
            "q.unflatten(1, (H // G, G)).transpose(1, 2).reshape(B, G, H // G * T, d)",
            "the wrong weights",
        ),
        (
            [
                ("q.reshape(B, G, H // G * T, d)", "q"),
                ("folded @ k", "folded @ k.repeat(1, H // G, 1, 1)"),
                ("weights.reshape(B, G, H // G * T, S) @ v", "weights @ v.repeat(1, H // G, 1, 1)"),
            ],
            "heads 0 and 1 read group 0",
        ),
        (
            [
                ("q.reshape(B, G, H // G * T, d)", "q"),
                ("folded @ k", "folded @ k.repeat_interleave(H // G, 1)"),
                ("weights.reshape(B, G, H // G * T, S) @ v", "weights @ v.repeat_interleave(H // G, 1)"),
            ],
            "copied for every head",
        ),
        (
            [
                ("q.reshape(B, G, H // G * T, d)", "q.reshape(B, G, H // G, T, d)"),
                ("folded @ k.transpose(-2, -1)", "folded @ k.unsqueeze(2).transpose(-2, -1)"),
                ("weights.reshape(B, G, H // G * T, S) @ v", "weights.reshape(B, G, H // G, T, S) @ v.unsqueeze(2)"),
            ],
            "copies what it must broadcast",
        ),
        (
            ".reshape(B, H, T, d)\n    # END",
            ".reshape(B, G, H // G, T, d)\n    # END",
            "one dimension of H heads",
        ),
    ],
    "unfinished_pairs": [
        ("< 2 * torch.pi", ">= 2 * torch.pi", "that have finished"),
        ("< 2 * torch.pi", "< 1", "A turn has 2π radians|that have finished"),
        ("< 2 * torch.pi", "< torch.pi", "A turn has 2π radians"),
        ("< 2 * torch.pi", "< 360", "after 7 positions"),
        ("base**-exponents", "10_000.0**-exponents", "Is the base an argument"),
        ("base**-exponents", "base**exponents", "turn more slowly than the first"),
        ("/ head_dim", "/ (2 * head_dim)", "Is it 2i/d"),
        ("torch.arange(0, head_dim, 2,", "torch.arange(0, head_dim,", "makes 8 pairs"),
        ("torch.arange(0, head_dim, 2,", "torch.arange(2, head_dim + 2, 2,", "after 7 positions"),
        ("return int(", "return float(", "a count is an int"),
        ("return int(", "return (", "want an int"),
    ],
    "scaled_frequency": [
        (
            [
                ("turns >= high", "turns <= low"),
                (
                    "turns <= low:\n        return frequency / factor",
                    "turns >= high:\n        return frequency / factor",
                ),
            ],
            "the wrong way round",
        ),
        ("    if turns >= high:\n        return frequency\n", "", "keeps its frequency"),
        ("    if turns <= low:\n        return frequency / factor\n", "", "is slow and is divided"),
        (
            "return keep * frequency + (1 - keep) * frequency / factor",
            "return (1 - keep) * frequency + keep * frequency / factor",
            "the blend meets both",
        ),
        ("/ (2 * torch.pi)", "", "Is a turn 2π radians"),
        ("2 * torch.pi", "torch.pi", "Is a turn 2π radians"),
        (
            "return keep * frequency + (1 - keep) * frequency / factor",
            "return frequency / (keep + (1 - keep) * factor)",
            "blend the frequencies",
        ),
        (
            "keep = (turns - low) / (high - low)",
            "keep = (1 / low - 1 / turns) / (1 / low - 1 / high)",
            "the blend meets|Linear in the number",
        ),
        ("keep = (turns - low) / (high - low)", "keep = (high - turns) / (high - low)", "the blend meets both"),
        ("keep = (turns - low) / (high - low)", "keep = 0.5", "the blend meets both"),
        ("keep = (turns - low) / (high - low)", "keep = (turns - 1) / 3", "use the arguments"),
        ("original * frequency", "8192 * frequency", "use the argument"),
        ("frequency / factor\n    keep", "frequency / 8\n    keep", "use the argument"),
        ("turns >= high", "turns > low", "The bands end at"),
        (
            "return keep * frequency + (1 - keep) * frequency / factor",
            "return torch.tensor(keep * frequency + (1 - keep) * frequency / factor)",
            "want one float",
        ),
    ],
    "scaled_frequencies": [
        (".clamp(0, 1)", "", "zero or negative|faster than before"),
        (".clamp(0, 1)", ".clamp(max=1)", "zero or negative|by more than the factor"),
        (".clamp(0, 1)", ".clamp(min=0)", "faster than before"),
        ("s * frequencies + (1 - s)", "(1 - s) * frequencies + s", "change places|pairs turn 4 times"),
        ("/ (2 * torch.pi)", "", "turn 4 times or more"),
        ('rope_freq["original_context_length"]', "8192", "another original_context_length"),
        ('rope_freq["factor"]', "8", "another factor"),
        ('rope_freq["low_freq_factor"]', "1", "another low_freq_factor"),
        ('rope_freq["high_freq_factor"]', "4", "another high_freq_factor"),
        (
            "s = ((r - low) / (high - low)).clamp(0, 1)",
            "s = (r >= (low + high) / 2).float()",
            "pairs turn 4 times",
        ),
        (
            'return s * frequencies + (1 - s) * frequencies / rope_freq["factor"]',
            'return frequencies / (s + (1 - s) * rope_freq["factor"])',
            "must get the frequency",
        ),
        ("return s", "s = s.double()\n    return s", "tables are float32"),
        (
            'return s * frequencies + (1 - s) * frequencies / rope_freq["factor"]',
            'pairs = zip(s, frequencies)\n    return torch.stack([a * f + (1 - a) * f / rope_freq["factor"]'
            " for a, f in pairs])",
            "no loop over the pairs",
        ),
    ],
    "held_bytes": [
        ("model.state_dict().values()", "model.parameters()", "hands out what is shared only once"),
        (
            "{storage.data_ptr(): storage.nbytes() for storage in storages}",
            "{number: storage.nbytes() for number, storage in enumerate(storages)}",
            "mean the same 160 bytes",
        ),
        (
            "held = {storage.data_ptr(): storage.nbytes() for storage in storages}",
            "held = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}",
            "the whole matrix stays",
        ),
        (
            "held = {storage.data_ptr(): storage.nbytes() for storage in storages}",
            "held = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}",
            "in one storage",
        ),
        (
            "held = {storage.data_ptr(): storage.nbytes() for storage in storages}",
            "held = {id(tensor): tensor.nbytes for tensor in model.parameters()}",
            "Ask for the memory",
        ),
        (
            "held = {storage.data_ptr(): storage.nbytes() for storage in storages}",
            "held = {str(tensor.tolist()): tensor.nbytes for tensor in tensors}",
            "Equal is not shared",
        ),
        ("tensor.nbytes for", "tensor.numel() for", "float32 has 4 bytes"),
        ("tensor.nbytes for", "4 * tensor.numel() for", "has its own dtype"),
        (
            "return sum(tensor.nbytes for tensor in tensors), sum(held.values())",
            "return sum(held.values())",
            "return two numbers",
        ),
        (
            "return sum(tensor.nbytes for tensor in tensors), sum(held.values())",
            "return sum(held.values()), sum(tensor.nbytes for tensor in tensors)",
            "tied: two names",
        ),
    ],
    "merge_bytes": [
        ("min(pairs)[1]", "pairs[0][1]", "the one of lowest rank"),
        ("min(pairs)[1]", "max(pairs)[1]", "the one of lowest rank"),
        ("min(pairs)[1]", "max(pairs, key=lambda pair: (-pair[0], pair[1]))[1]", "the left one is merged"),
        ("while True:", "for _ in range(1):", "did you forget|Did you forget"),
        (
            [
                ("while True:", "for _ in range(2):"),
                (
                    "        if not pairs:\n            return [ranks[part] for part in parts]\n",
                    "        if not pairs:\n            break\n",
                ),
                (
                    "+ parts[i + 1]]\n    # END",
                    "+ parts[i + 1]]\n    return [ranks[part] for part in parts]\n    # END",
                ),
            ],
            "can be merged again|until no pair|anew after each",
        ),
        (
            "        if not pairs:\n            return [ranks[part] for part in parts]\n",
            "        return [ranks[part] for part in parts]\n",
            "nothing is merged",
        ),
        ("return [ranks[part] for part in parts]", "return parts", "ids are ints"),
        (
            "return [ranks[part] for part in parts]",
            "return [list(ranks).index(part) for part in parts]",
            "not by the order",
        ),
        ("return [ranks[part] for part in parts]", "return [ranks[part] for part in parts][::-1]", "don't make up"),
        ("[bytes([byte]) for byte in word]", "[char.encode() for char in word.decode()]", "stopped with"),
        (
            "    parts = [bytes([byte]) for byte in word]\n",
            "    ids = []\n    while word:\n        n = max(n for n in range(1, len(word) + 1) if word[:n] in ranks)\n"
            "        ids.append(ranks[word[:n]])\n        word = word[n:]\n    return ids\n    parts = []\n",
            "the one of lowest rank",
        ),
        (
            "    while True:\n",
            "    for token in sorted(ranks, key=ranks.get):\n        i = 0\n        while i < len(parts) - 1:\n"
            "            if parts[i] + parts[i + 1] == token:\n                parts[i : i + 2] = [token]\n"
            "            i += 1\n    return [ranks[part] for part in parts]\n    while True:\n",
            "lowest rank anew",
        ),
    ],
    "chat_ids": [
        ("tokenizer.encode(text) +", "tokenizer.encode_with_control(text) +", "by your hand only"),
        (".strip()", "", "must be stripped"),
        (' + [("assistant", None)]', "", "the one that invites the assistant"),
        ('        ids += tokenizer.encode("\\n\\n")\n', "", "one message becomes"),
        ('"\\n\\n"', '"\\n"', "one message becomes"),
        (' + [control["<|eot_id|>"]]', "", "one <|eot_id|>"),
        ("<|eot_id|>", "<|end_of_text|>", "one <|eot_id|>"),
        ("<|eot_id|>", "<|eom_id|>", "one <|eot_id|>"),
        ('ids = [control["<|begin_of_text|>"]]', "ids = []", "begins with"),
        (
            '        ids += tokenizer.encode("\\n\\n")',
            '        ids += tokenizer.encode("\\n\\n")\n'
            '        ids += [control["<|begin_of_text|>"]] * (role == "assistant")',
            "comes once",
        ),
        ("tokenizer.encode(role)", 'tokenizer.encode("user")', "one message becomes"),
        (
            "        if text is not None:\n            ids += tokenizer.encode(text)",
            "        if True:\n            ids += tokenizer.encode(text or '')",
            "one <|eot_id|>",
        ),
        ('m["content"].strip()', 'm["content"].strip().replace("<|eot_id|>", "")', "letter by letter"),
        ("return ids", "return torch.tensor(ids)", "want a list"),
        (
            '(m["role"], m["content"].strip()) for m in messages]',
            '(m["role"], m["content"].strip()) for m in messages if m["role"] != "system"]',
            "a system message is",
        ),
        ('m["content"].strip()', 'm.pop("content").strip()', "changes its arguments"),
        ("return ids", "return tokenizer.encode_with_control(tokenizer.decode(ids))", "by your hand only"),
    ],
    "answer_mask": [
        ("mask[first : last + 1]", "mask[first:last]", "learn to end its turn"),
        ("mask[first : last + 1]", "mask[place : last + 1]", "The header is written"),
        ('*tokenizer.encode("\\n\\n")]', "]", "part of the prompt"),
        ('"assistant"', '"user"', "nothing to learn|are given"),
        (
            "ids.index(end, first) if end in ids[first:] else len(ids)",
            "ids.index(end, first)",
            "stopped with ValueError",
        ),
        ("ids.index(end, first) if end in ids[first:] else len(ids)", "len(ids)", "both are to be learned"),
        (
            "            mask[first : last + 1] = True\n",
            "            mask[first : last + 1] = True\n            break\n",
            "both are to be learned",
        ),
        ("    return mask", "    return mask.int()", "want bool"),
        ("    return mask", "    return mask.tolist()", "want a boolean tensor"),
        ("    return mask", "    return ~mask", "nothing to learn"),
        ("    return mask", "    return mask[1:]", "one value for each id"),
        (
            "    mask = torch.zeros(len(ids), dtype=torch.bool)\n",
            "    mask = torch.zeros(len(ids), dtype=torch.bool)\n"
            "    ids = tokenizer.encode_with_control(tokenizer.decode(ids))\n",
            "typed letters are no control token|stopped with",
        ),
        (
            "ids.index(end, first) if end in ids[first:] else len(ids)",
            "ids.index(10, first) if 10 in ids[first:] else ids.index(end, first) if end in ids[first:] else len(ids)",
            "both are to be learned|marked whole",
        ),
    ],
    "to_our_names": [
        (
            '("gate", "up", "down"), ("fc1", "fc2", "fc3")',
            '("up", "gate", "down"), ("fc1", "fc2", "fc3")',
            "ff.fc1.weight must hold",
        ),
        (
            '"input_layernorm": "norm1", "post_attention_layernorm": "norm2"',
            '"input_layernorm": "norm2", "post_attention_layernorm": "norm1"',
            "norm1.weight must hold",
        ),
        ('zip("qkvo"', 'zip("kqvo"', "W_query.weight must hold"),
        ('        if name.endswith("inv_freq"):\n            continue\n', "", "stopped with KeyError"),
        (
            '        if name.endswith("inv_freq"):\n            continue\n',
            '        if name.endswith("inv_freq"):\n            ours[name] = tensor\n            continue\n',
            "is a table, no weight",
        ),
        ('    ours.setdefault("out_head.weight", ours.get("tok_emb.weight"))\n', "", "its head is the embedding"),
        ('ours.get("tok_emb.weight"))', 'ours["tok_emb.weight"].clone())', "Two names, one tensor"),
        ('ours.get("tok_emb.weight"))', "torch.zeros(2, 2))", "must be the embedding"),
        (
            '_, _, layer, kind = name.split(".", maxsplit=3)',
            "layer, kind = name[13], name[15:]",
            "stopped with KeyError",
        ),
        ("trf_blocks.{layer}.", "trf_blocks.{int(layer) + 1}.", "there is no such name"),
        ('{inside[kind]}.weight"] = tensor', '{inside[kind]}"] = tensor', "there is no such name"),
        (
            '"model.norm": "final_norm", "lm_head": "out_head"',
            '"model.norm": "out_head", "lm_head": "final_norm"',
            "final_norm.weight must hold",
        ),
        ("= tensor\n        else", "= tensor.T.contiguous() + 1\n        else", "must hold"),
        ("    return ours", "    return list(ours)", "want one dict"),
    ],
    "split_wqkv": [
        ("halves(key, n_kv_groups)", "halves(key, n_heads)", "It has G = 2 heads"),
        (
            "halves(key, n_kv_groups), value",
            "halves(key, n_kv_groups), halves(value, n_kv_groups)",
            "never turned by RoPE",
        ),
        ("halves(key, n_kv_groups), value", "key, value", "keys as well as queries"),
        ("halves(query, n_heads)", "query", "pairs of neighbours"),
        ("halves(query, n_heads)", "halves(query, 1)", "from one head to another"),
        ("(heads, -1, 2)", "(heads, 2, -1)", "This is the way back"),
        ("[n_heads * d, n_kv_groups * d, n_kv_groups * d]", "len(wqkv) // 3", "stopped with|G heads are fewer"),
        ("query, key, value = wqkv", "key, value, query = wqkv", "stopped with|has shape|first H"),
        ("query, key, value = wqkv", "query, value, key = wqkv", "after W_query"),
        ("d = len(wqkv) // (n_heads + 2 * n_kv_groups)", "d = wqkv.shape[1] // n_heads", "stopped with"),
        (".flatten(0, 2)", ".flatten(0, 2).flip(0)", "head 0 of W_query"),
        ("return halves(query, n_heads), ", "return ", "return three tensors"),
        ("n_kv_groups), value", "n_kv_groups), value.float()", "want bfloat16"),
    ],
    "repaired_loader": [
        ('"wk": n_kv_groups', '"wk": n_heads', "symptom 5"),
        ('turned = {"wq": n_heads', 'turned = {"wv": n_kv_groups, "wq": n_heads', "symptom 4"),
        ('"w1": "ff.fc1", "w3": "ff.fc2"', '"w3": "ff.fc1", "w1": "ff.fc2"', "symptom 2"),
        (
            '"attention_norm": "norm1", "ffn_norm": "norm2"',
            '"attention_norm": "norm2", "ffn_norm": "norm1"',
            "symptom 1",
        ),
        ("(head[::2], head[1::2])", "(head[: len(head) // 2], head[len(head) // 2 :])", "symptom 6"),
        ("(head[::2], head[1::2])", "(head[1::2], head[::2])", "symptom 6"),
        ('"wq": n_heads, ', "", "symptom 5"),
        ('{"wo", "w2"}', '{"w2"}', "has shape"),
        ('{"wo", "w2"}', '{"wo", "w2", "tok_embeddings"}', "has shape"),
        ("for file in files]", "for file in files[::-1]]", "in the order of the files|symptom"),
        ('"output": "out_head"', '"output": "head"', "names are missing"),
        ("where[1]", "0", "names are missing"),
        ("if first.dim() == 2:", "if first.dim() == 2 or kind == 'norm':", "has shape|stopped with"),
    ],
}


def by_einsum(q, k, v):
    """Grouped attention with the groups as a dimension of their own."""
    B, H, T, d = q.shape
    G, S = k.shape[1:3]
    scores = torch.einsum("bghtd,bgsd->bghts", q.reshape(B, G, H // G, T, d), k) * d**-0.5
    scores = scores + torch.full((T, S), -torch.inf).triu(S - T + 1)
    return torch.einsum("bghts,bgsd->bghtd", F.softmax(scores, dim=-1), v).reshape(q.shape)


def by_wavelength(frequency, factor, low, high, original):
    wave = 2 * torch.pi / frequency
    if wave <= original / high:
        return frequency
    if wave >= original / low:
        return frequency / factor
    share = (original / wave - low) / (high - low)
    return frequency * (share + (1 - share) / factor)


def by_where(frequencies, rope):
    low, high, wave = rope["low_freq_factor"], rope["high_freq_factor"], 2 * torch.pi / frequencies
    original, slowed = rope["original_context_length"], frequencies / rope["factor"]
    share = (original / wave - low) / (high - low)
    mixed = torch.where(wave > original / low, slowed, (1 - share) * slowed + share * frequencies)
    return torch.where(wave < original / high, frequencies, mixed)


def by_tokens(model):
    """Shared memory found through sets of storages."""
    tensors = model.state_dict()
    seen, held = set(), 0
    for tensor in tensors.values():
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            held += len(storage)
    return sum(t.numel() * t.element_size() for t in tensors.values()), held


def by_best_pair(word, ranks):
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 10**9))
        if parts[best] + parts[best + 1] not in ranks:
            break
        parts = parts[:best] + [parts[best] + parts[best + 1]] + parts[best + 2 :]
    return list(map(ranks.__getitem__, parts))


def by_state(ids, tokenizer):
    """The mask with a window of the last ids: inside an answer or outside."""
    names = tokenizer.special_tokens
    head = [names["<|start_header_id|>"], *b"assistant", names["<|end_header_id|>"], 10, 10]
    inside, mask = False, []
    for at, token in enumerate(ids):
        mask.append(inside)
        if token == names["<|eot_id|>"]:
            inside = False
        if ids[max(0, at + 1 - len(head)) : at + 1] == head:
            inside = True
    return torch.tensor(mask, dtype=torch.bool)


def by_rows(weight, heads, groups):
    d = weight.shape[0] // (heads + 2 * groups)
    order = torch.cat([torch.arange(0, d, 2), torch.arange(1, d, 2)])
    turned = (torch.arange(heads + groups)[:, None] * d + order).flatten()
    both = weight[turned]
    return both[: heads * d], both[heads * d :], weight[(heads + groups) * d :]


OTHERS = {
    "positions_that_fit": lambda cfg, free, batch, size: min(
        cfg["context_length"],
        int(
            free
            / (2 * batch * size * cfg["n_layers"] * cfg["n_kv_groups"])
            / cfg.get("head_dim", cfg["emb_dim"] // cfg["n_heads"])
        ),
    ),
    "repeat_kv": lambda x, heads: x[:, torch.arange(heads) * x.shape[1] // heads],
    "grouped_attention": by_einsum,
    "unfinished_pairs": lambda d, base, n: sum(2 * torch.pi * base ** (2 * i / d) > n for i in range(d // 2)),
    "scaled_frequency": by_wavelength,
    "scaled_frequencies": by_where,
    "held_bytes": by_tokens,
    "merge_bytes": by_best_pair,
    "answer_mask": by_state,
    "split_wqkv": by_rows,
}
