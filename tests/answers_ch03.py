"""Answers to chapter 3's exercises: known wrong ones (test_exercises.py says how to read them) and other right ones."""

from torch.nn import functional as F

MUTANTS = {
    "answer_log_prob": [
        ("[start - 1 : -1]", "[start:]", "about the token at t + 1|stopped with"),
        ([("[start - 1 : -1]", "[:-1]"), ("ids[start:]", "ids[1:]")], "only the answer counts"),
        ([("[start - 1 : -1]", "[start:-1]"), ("ids[start:]", "ids[start + 1 :]")], "first token counts too"),
        (
            "    return float(log_probs[torch.arange(len(answer)), answer].sum())",
            "    return float(log_probs[torch.arange(len(answer)), answer].mean())",
            "did you take the mean",
        ),
        (".log_softmax(dim=-1)", "", "no log-probabilities yet"),
        (".log_softmax(dim=-1)", ".softmax(dim=-1)", "is never positive|is 2 · log|yours is"),
        (".log_softmax(dim=-1)", ".softmax(dim=-1).add(1e-9).log()", "nearly impossible"),
        (".log_softmax(dim=-1)", ".softmax(dim=-1).log()", "not the log of softmax|nearly impossible"),
        (".sum())", ".sum().exp())", "want its logarithm"),
        ("return float(", "return -float(", "never positive"),
        ("dim=-1", "dim=0", "yours is"),
        ("logits.float()", "logits", "Go to float32"),
        (".sum())", ".min())", "first token counts too"),
    ],
    "load_tied": [
        ("    model.out_head.weight = model.tok_emb.weight\n", "", "two tensors|two parameters"),
        (
            "model.out_head.weight = model.tok_emb.weight",
            "model.out_head.weight = torch.nn.Parameter(embedding.clone())",
            "two tensors with equal numbers",
        ),
        (
            "model.out_head.weight = model.tok_emb.weight",
            "model.out_head.weight = torch.nn.Parameter(embedding)",
            "two parameters look at one memory",
        ),
        (", assign=True", "", "Assign the"),
        ('complete = {"out_head.weight": embedding} | state', "complete = state", "stopped with KeyError"),
        (
            [("complete, assign=True", "complete, assign=True, strict=False")],
            "loads it without a word",
        ),
        (
            [
                (
                    '    if not torch.equal(complete["out_head.weight"], embedding):\n'
                    '        raise ValueError("out_head.weight differs from tok_emb.weight: '
                    'these weights are not tied")\n',
                    "",
                )
            ],
            "a file whose head differs",
        ),
        (
            'complete = {"out_head.weight": embedding} | state',
            'complete = state\n    state.setdefault("out_head.weight", embedding)',
            "changes its arguments",
        ),
        ("    return model", "    return None", "return"),
        ("    return model", "    return state", "want the model"),
        (
            "    model.load_state_dict(complete, assign=True)\n    model.out_head.weight = model.tok_emb.weight\n",
            "    model.out_head.weight = model.tok_emb.weight\n    model.load_state_dict(complete, assign=True)\n",
            "two tensors|two parameters",
        ),
        ("model.load_state_dict(complete, assign=True)", "pass", "Does anything get loaded"),
        (
            "model.load_state_dict(complete, assign=True)",
            'model.load_state_dict(complete | {"tok_emb.weight": 0 * embedding}, assign=True)',
            "the embedding is not the file's",
        ),
    ],
    "draw_top_p": [
        ("int(ids[min(place, len(sums) - 1)])", "min(place, len(sums) - 1)", "a place is not yet a token"),
        (".sort(descending=True)", ".sort()", "means the likeliest token"),
        ("sums / sums[-1] <= u", "sums <= u", "must add up to 1 again"),
        ("sums[sums - probs < top_p]", "sums[sums < top_p]", "nothing is dropped"),
        ("sums[sums - probs < top_p]", "sums[sums - probs <= top_p]", "reaches it alone"),
        ("    sums = sums[sums - probs < top_p]\n", "", "reaches it alone"),
        ("logits.float() / temperature", "logits.float() * temperature", "the wrong way round"),
        ("logits.float() / temperature", "logits.float()", "divided by the temperature"),
        (
            "    if temperature == 0:\n        return int(logits.argmax())\n",
            "",
            "temperature 0 is|stopped with|whatever u is",
        ),
        ("int(logits.argmax())", "int(logits.argmax() + 1)", "temperature 0 is"),
        ("ids[min(place, len(sums) - 1)]", "ids[place]", "stopped with IndexError|draws no token"),
        ("<= u).sum()", "<= 1 - u).sum()", "means the likeliest token"),
        ("return int(ids", "return float(ids", "want one token id"),
        (
            "probs, ids = (logits.float() / temperature).softmax(dim=-1).sort(descending=True)\n"
            "    sums = probs.cumsum(dim=-1)\n    sums = sums[sums - probs < top_p]",
            "probs, ids = logits.float().softmax(dim=-1).sort(descending=True)\n    sums = probs.cumsum(dim=-1)\n"
            "    kept = (probs[sums - probs < top_p].log() / temperature).exp()\n    sums = kept.cumsum(dim=-1)",
            "temperature first",
        ),
    ],
    "add_turn": [
        (
            "answer[:-1] if answer and answer[-1] in tokenizer.stop_tokens else answer",
            "answer",
            "three turns are ended",
        ),
        (
            "answer[:-1] if answer and answer[-1] in tokenizer.stop_tokens else answer",
            "answer[:-1]",
            "stopped by the limit",
        ),
        ("answer[-1] in tokenizer.stop_tokens", "answer[-1] in end", "is over, too"),
        ("if answer and answer[-1]", "if answer[-1]", "stopped with IndexError"),
        ("ids + words + end", "ids + words", "three turns are ended"),
        ("return ids + words", "return words", "must begin with all that was read"),
        ("ids + words + end", "ids + end", "must follow the prompt"),
        ("text.strip()", "text", "must be stripped"),
        ("tokenizer.encode(text.strip())", "tokenizer.encode_with_control(text.strip())", "Text must stay text"),
        (' + header("assistant")', "", "the control tokens must be"),
        (
            "    words = ",
            "    answer = tokenizer.encode_with_control(tokenizer.decode(answer))\n    words = ",
            "don't decode and encode",
        ),
        (
            "    words = ",
            "    answer = tokenizer.encode_with_control(tokenizer.decode(answer).strip())\n    words = ",
            "don't decode|blanks of the answer",
        ),
        ("question = header", 'question = [control["<|begin_of_text|>"]] + header', "stands once"),
        ('return name + tokenizer.encode("\\n\\n")', "return name", "the second prompt must read"),
        ('header("user")', 'header("system")', "the second prompt must read"),
        ("return ids +", "ids += [0]\n    return ids +", "changes its arguments"),
    ],
    "fit_dialog": [
        ("turns = turns[2:]", "turns = turns[1:]", "an answer whose question is gone|drop a question"),
        ("turns = turns[2:]", "turns = turns[:-2]", "the last question must stay"),
        ("count(system + turns) > room", "count(turns) > room", "84 ids|system message"),
        ("return system + turns", "return turns", "with a system message"),
        ("> room", ">= room", "nothing is dropped"),
        (" and len(turns) > 1", "", "the last question must stay|did not go in|only the last question|stopped|stays"),
        ("    while count", "    if count", "only the last question fits"),
        ("turns = turns[2:]", "del messages[:2]\n        turns = turns[2:]", "changes its arguments"),
        ("turns = turns[2:]", "turns = turns[-1:]", "dropping the first question and its answer is enough"),
        ("    while count", "    while len(turns) > 3 or count", "nothing is dropped"),
        (
            "return system + turns",
            'return [m | {"content": m["content"][:5]} for m in system + turns]',
            "Keep messages whole",
        ),
        (
            'system = [message for message in messages if message["role"] == "system"]',
            "system = []",
            "with a system|must stay|84 ids",
        ),
        ("count(system + turns)", 'sum(len(m["content"]) for m in turns)', "nothing was dropped"),
    ],
    "until_stop": [
        ("waiting += piece", "waiting = piece", "must come through|three pieces|comes in"),
        ("min(found)", "found[0]", "the *first in the text* counts"),
        ("            return\n", "", "yours goes on"),
        ("yield waiting[: min(found)]", "yield waiting", "must not be shown|goes on"),
        ("yield waiting[: min(found)]", "pass", "all before the stop"),
        ("        sure = len(waiting) - max(begun, default=0)\n", "        sure = len(waiting)\n", "has to wait"),
        ("max(begun, default=0)", "min(begun, default=0)", "has to wait|must become|is before it"),
        (
            "len(waiting) - max(begun, default=0)",
            "max(0, len(waiting) - max(map(len, stops)))",
            "must be shown at once",
        ),
        ("    yield waiting\n    # END", "    # END", "show it, nothing more comes"),
        ("range(1, len(stop))", "range(1, 2)", "has to wait|must become|yours is"),
        ("for piece in pieces:", "for piece in list(pieces):", "yield while you read"),
        ("waiting = waiting[sure:]", 'waiting = ""', "shown with what follows|comes in three"),
        ("yield waiting[:sure]", "yield waiting[:sure].encode()", "yield text"),
        ("stop in waiting]", "stop in piece]", "comes in three pieces|goes on"),
        ("stop[:n]", "stop[0]", "must be shown|be shown|yours is|certain"),
        (
            "            return\n",
            "            for rest in pieces:\n                pass\n            return\n",
            "each one costs a call",
        ),
        (
            "sure = len(waiting) - max(begun, default=0)",
            "sure = 0 if begun else len(waiting)",
            "Hold back no more than must wait",
        ),
    ],
}


def by_cross_entropy(logits, ids, start):
    targets = logits.new_tensor(ids[start:]).long()
    return -F.cross_entropy(logits[start - 1 : -1].double(), targets, reduction="sum")


def tied_afterwards(model, state):
    """Only the head may be missing, and torch is asked what was."""
    result = model.load_state_dict(state, strict=False, assign=True)
    missing, unknown = set(result.missing_keys) - {"out_head.weight"}, result.unexpected_keys
    head = state.get("out_head.weight", state["tok_emb.weight"])
    if missing or unknown or (head != state["tok_emb.weight"]).any():
        raise KeyError(f"{missing} {unknown}")
    model.out_head.weight = model.tok_emb.weight
    return model


def one_at_a_time(logits, temperature, top_p, u):
    probs = F.softmax(logits.double() / (temperature or 1), dim=-1).tolist()
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    if temperature == 0:
        return order[0]
    kept, mass = [], 0.0
    for token in order:
        kept.append(token)
        mass += probs[token]
        if mass >= top_p - 1e-9:
            break
    u *= mass
    for token in kept:
        u -= probs[token]
        if u < 0:
            break
    return token


def by_pairs(messages, count, room):
    first = int(messages[0]["role"] == "system")
    for start in range(first, len(messages), 2):
        kept = messages[:first] + messages[start:]
        if count(kept) <= room:
            return kept
    return messages[:first] + messages[-1:]


def letter_by_letter(pieces, stops):
    waiting = ""
    for piece in pieces:
        sure = ""
        for letter in piece:
            waiting += letter
            for stop in stops:
                if waiting.endswith(stop):
                    yield sure + waiting[: -len(stop)]
                    return
            while waiting and not any(stop.startswith(waiting) for stop in stops):
                sure, waiting = sure + waiting[0], waiting[1:]
        yield sure
    yield waiting


OTHERS = {
    "answer_log_prob": by_cross_entropy,
    "load_tied": tied_afterwards,
    "draw_top_p": one_at_a_time,
    "fit_dialog": by_pairs,
    "until_stop": letter_by_letter,
}
