"""Checks of chapter 1's exercises around the model: sampling, tokens, weight files, the entropy floor.

Written by hand. No check calls the package's own functions: each has an oracle of its own.
"""

import itertools
import math
import statistics

import torch

from llamabook.checks.core import Student, Wrong, close, exercise, numbers, off_by, present, require, several, tensor

# --- 5. From logits to text ---


@exercise("top_k_probs", chapter=1, title="Temperature and top-k", minutes=15, difficulty="core", points=10)
def check_top_k_probs(your: Student) -> None:
    logits = 2 * numbers(3, 7)
    finite = "At temperature 0 a division by 0 gives NaN: treat it as a case of its own."
    plain = tensor(your(logits, 1.0, 7), (3, 7), torch.float32)
    rows = [[math.exp(value) for value in row] for row in logits.tolist()]
    soft = torch.tensor([[value / sum(row) for value in row] for row in rows], dtype=torch.float64)
    require(close(plain.sum(dim=-1), torch.ones(3)), "the probabilities of a row must add up to 1.")
    require(
        close(plain, soft),
        "at temperature 1, with k as large as the vocabulary, this is a plain softmax; yours is not.",
    )
    cold, hot = tensor(your(logits, 0.5, 7), (3, 7)), tensor(your(logits, 2.0, 7), (3, 7))
    require(
        cold.amax() > plain.amax() > hot.amax(),
        "a low temperature must sharpen, a high one flatten: is yours the wrong way round?",
    )
    for temperature, got in ((0.5, cold), (2.0, hot)):
        want = soft ** (1 / temperature)
        want = want / want.sum(dim=-1, keepdim=True)
        require(
            close(got, want),
            f"wrong at temperature {temperature} ({off_by(got, want)}): the logits are divided by it.",
        )
    for k in (1, 2, 5):
        got = tensor(your(logits, 1.0, k), (3, 7))
        kept = (got > 0).sum(dim=-1).tolist()
        require(
            kept == [k] * 3,
            f"with top_k = {k} the number of tokens with a probability must be {k} in each row; "
            f"yours leaves {kept}.",
        )
        require(close(got.sum(dim=-1), torch.ones(3)), "after top-k the rest must add up to 1 again.")
        for row, mine in zip(soft.tolist(), got):
            best = sorted(range(7), key=lambda token: -row[token])[:k]
            share = [row[token] / sum(row[t] for t in best) if token in best else 0.0 for token in range(7)]
            require(
                close(mine, torch.tensor(share)),
                f"with top_k = {k} the {k} likeliest keep their proportions; yours do not.",
            )
    ties = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]])
    for k in (2, 3):
        kept = int((tensor(your(ties, 1.0, k), (1, 5)) > 0).sum())
        require(
            kept == k,
            f"three logits are equal and top_k = {k}: {kept} tokens are left. Comparing with the k-th "
            "largest value keeps every tie; torch.topk gives you places.",
        )
    greedy = tensor(your(ties, 0.0, 3), (1, 5), torch.float32, finite=finite)
    require(
        greedy.tolist() == [[0, 1, 0, 0, 0]],
        "at temperature 0 the largest logit has probability 1, all others 0.",
    )
    equal = tensor(your(torch.zeros(2, 4), 0.0, 4), (2, 4), finite=finite)
    require(
        equal.sum(dim=-1).tolist() == [1, 1] and equal.amax() == 1,
        "at temperature 0, with equal logits, one token is chosen, not all.",
    )
    banned = torch.tensor([[0.5, -torch.inf, 0.0, -torch.inf]])
    got = tensor(
        your(banned, 1.0, 3), (1, 4), finite="A logit of -inf is a token that must not come: probability 0."
    )
    require(got[0, 1] == 0 and got[0, 3] == 0, "a logit of -inf must keep probability 0.")
    require(tensor(your(logits, 1.0, 50), (3, 7)).gt(0).all(), "top_k = 50 with 7 tokens: keep them all.")
    tensor(
        your(logits.bfloat16(), 0.7, 3),
        (3, 7),
        torch.float32,
        kind="Probabilities are float32, whatever the logits are.",
    )


@exercise(
    "top_p_probs",
    chapter=1,
    title="The smallest set that is likely enough",
    minutes=20,
    difficulty="core",
    points=10,
)
def check_top_p_probs(your: Student) -> None:
    def one(probs: list[float], top_p: float) -> list[float]:
        finite = "A division by 0, since nothing is left? The likeliest token always stays."
        got = tensor(your(torch.tensor(probs), top_p), (len(probs),), torch.float32, finite=finite)
        return [round(value, 4) for value in got.tolist()]

    falling = [0.5, 0.25, 0.125, 0.125]
    same = one(falling, 1.0)
    require(same == falling, f"with top_p = 1 nothing is cut: {falling} must stay, yours is {same}.")
    winner = one(falling, 0.25)
    require(
        sum(winner) > 0,
        "top_p = 0.25, the likeliest token has 0.5: nothing is left. The winner always stays.",
    )
    require(abs(sum(winner) - 1) < 1e-3, "what is left must add up to 1 again: divide by its sum.")
    require(winner[0] > 0, "the likeliest token is gone: take the tokens from the top, not from the bottom.")
    require(
        winner == [1, 0, 0, 0],
        f"top_p = 0.25, the likeliest token has 0.5: it alone is enough; yours is {winner}.",
    )
    crossing = one(falling, 0.7)
    require(
        crossing != [1, 0, 0, 0],
        "top_p = 0.7 of [0.5, 0.25, 0.125, 0.125]: 0.5 alone does not reach 0.7. The token "
        "that crosses the line stays.",
    )
    require(
        crossing == [0.6667, 0.3333, 0, 0],
        f"top_p = 0.7 of {falling}: two tokens reach it; yours is {crossing}.",
    )
    exactly = one(falling, 0.75)
    require(
        exactly == [0.6667, 0.3333, 0, 0],
        "top_p = 0.75 of [0.5, 0.25, 0.125, 0.125]: two tokens reach it exactly, a third one is too many.",
    )
    mixed = one([0.125, 0.5, 0.125, 0.25], 0.7)
    require(
        mixed == [0, 0.6667, 0, 0.3333],
        f"unsorted input [0.125, 0.5, 0.125, 0.25]: yours is {mixed}. After sorting, "
        "bring each probability back to its token's place.",
    )
    probs = torch.softmax(2 * numbers(2, 3, 6), dim=-1)
    for top_p in (0.1, 0.6, 0.9, 0.97):
        got = tensor(your(probs, top_p), (2, 3, 6), torch.float32)
        for row, mine in zip(probs.flatten(0, 1).tolist(), got.flatten(0, 1)):
            sets = itertools.chain(*(itertools.combinations(range(6), size) for size in range(1, 7)))
            enough = [tokens for tokens in sets if sum(row[token] for token in tokens) >= top_p - 1e-6]
            best = min(enough, key=lambda tokens: (len(tokens), -sum(row[token] for token in tokens)))
            mass = sum(row[token] for token in best)
            want = torch.tensor([row[token] / mass if token in best else 0.0 for token in range(6)])
            kept = int((mine > 0).sum())
            require(
                kept == len(best),
                f"in a batch, top_p = {top_p}: the smallest set has {len(best)} tokens, yours {kept}.",
            )
            require(
                close(mine, want),
                f"in a batch, top_p = {top_p}: the right number of tokens, with wrong probabilities.",
            )


class _Script:
    """A model that doesn't care what it reads: row r says script[r][t] at step t. It counts its calls."""

    def __init__(self, script: list[list[int]], prompt: int, vocabulary: int = 10):
        self.script, self.prompt, self.vocabulary, self.calls = script, prompt, vocabulary, 0

    def __call__(self, idx: torch.Tensor) -> torch.Tensor:
        if not isinstance(idx, torch.Tensor) or idx.dim() != 2 or len(idx) != len(self.script):
            shape = tuple(idx.shape) if isinstance(idx, torch.Tensor) else type(idx).__name__
            raise Wrong(f"you called the model with {shape}; it reads token ids (B, T), all rows at once.")
        self.calls += 1
        logits = -numbers(*idx.shape, self.vocabulary).abs()  # at all places but the last: noise
        step = idx.shape[1] - self.prompt
        if not 0 <= step < len(self.script[0]):
            raise Wrong(
                f"you called the model with T = {idx.shape[1]} in call {self.calls}; give it the prompt and "
                "all that came after it, and stop in time."
            )
        for row, tokens in enumerate(self.script):
            logits[row, :-1, (tokens[step] + 1) % self.vocabulary] = (
                3.0  # a wrong answer for who reads another place
            )
            logits[row, -1, tokens[step]] = 5.0
        return logits


@exercise(
    "generate_batch",
    chapter=1,
    title="Stop, but not all at once",
    minutes=25,
    difficulty="stretch",
    points=20,
)
def check_generate_batch(your: Student) -> None:
    end = 9

    def run(script: list[list[int]], prompt: list[list[int]], limit: int) -> tuple[list[list[int]], int]:
        model, idx = _Script(script, len(prompt[0])), torch.tensor(prompt)
        got = your(model, idx, limit, end)
        present(got)
        require(
            isinstance(got, torch.Tensor) and got.dim() == 2 and len(got) == len(prompt),
            "return token ids (B, T + n): the prompt and what came after it.",
        )
        require(not got.is_floating_point(), "token ids are whole numbers (long).")
        if got.shape[1] < len(prompt[0]) or not torch.equal(got[:, : len(prompt[0])], idx):
            raise Wrong("the result must begin with the prompt, and go on with the new tokens.")
        return got[:, len(prompt[0]) :].tolist(), model.calls

    alone, calls = run([[1, 2, 3, 4]], [[5, 6]], 3)
    require(
        len(alone[0]) <= 3,
        f"max_new_tokens = 3, and yours makes {len(alone[0])} new tokens.",
    )
    require(
        alone == [[1, 2, 3]],
        f"one row, no end, max_new_tokens = 3: the likeliest tokens are [1, 2, 3], yours {alone[0]}. "
        "Only the last position's logits say what comes next.",
    )
    require(calls == 3, f"three new tokens took {calls} calls of the model; three are enough.")
    alone, calls = run([[1, end, 3, 4, 5]], [[5, 6]], 4)
    require(alone == [[1, end]], f"one row that ends after two tokens: want [1, {end}], yours {alone[0]}.")
    require(calls == 2, f"the row ended after two tokens, yet the model was called {calls} times.")
    alone, _ = run([[1, 2, end, 4]], [[5, end, 6]], 3)
    require(
        alone == [[1, 2, end]], "an end in the *prompt* (an earlier turn of a chat) must not stop the row."
    )
    alone, _ = run([[1, 2, end, 4]], [[5, end]], 3)
    require(alone == [[1, 2, end]], "a prompt whose last token is the end must still be answered.")
    both, _ = run([[1, 2, 3], [4, 5, 6]], [[5, 6], [7, 8]], 2)
    require(
        both == [[1, 2], [4, 5]],
        f"two rows without an end: want [[1, 2], [4, 5]], yours {both}. Each row has its "
        "own likeliest token.",
    )
    both, calls = run([[1, end, 3, 4, 5, 6], [2, 2, 2, end, 5, 6]], [[5, 6], [7, 8]], 5)
    require(
        len(both[0]) > 2,
        "the first row ends, and the second is cut off with it: stop only when all rows have ended.",
    )
    require(
        len(both[0]) == 4,
        f"rows end after 2 and after 4 tokens, so 4 steps are enough; yours makes {len(both[0])}. Rows "
        "need not end in the same step: remember which have ended.",
    )
    require(
        both[1] == [2, 2, 2, end],
        f"the row that goes on must not notice the other's end: yours is {both[1]}.",
    )
    require(
        both[0] == [1, end, end, end],
        f"a row that has ended is filled with the end's id: yours is {both[0]}.",
    )
    require(calls == 4, f"four steps took {calls} calls of the model.")
    none, calls = run([[1, 2], [3, 4]], [[5], [6]], 0)
    require(
        none == [[], []] and calls == 0,
        "max_new_tokens = 0 must give back the prompt, without a call of the model.",
    )


# --- 6. Tokens, chats, files ---


def _certain(data: bytes) -> str:
    """Another road: try ever shorter beginnings until one is text."""
    for length in range(len(data), -1, -1):
        try:
            return data[:length].decode("utf-8")
        except UnicodeDecodeError:
            continue
    return ""


@exercise("stream_text", chapter=1, title="Never half a character", minutes=20, difficulty="core", points=10)
def check_stream_text(your: Student) -> None:
    def run(pieces: list[bytes]) -> list[str]:
        steps = list(your.steps(pieces))
        for step in steps:
            require(
                isinstance(step, str), f"you yield a value of type {type(step).__name__}; yield text (str)."
            )
        return steps

    plain = "".join(run([b"Ll", b"ama", b" eats"]))
    require(
        plain == "Llama eats", f"the pieces b'Ll', b'ama' and b' eats' give 'Llama eats'; yours is '{plain}'."
    )
    taken: list[int] = []

    def source():
        for number, piece in enumerate([b"a", b"b", b"c"]):
            taken.append(number)
            yield piece

    first = next(your.steps(source()), None)
    require(first == "a", "the first piece is complete text: it must be yielded first, by itself.")
    require(
        len(taken) == 1,
        f"you read {len(taken)} pieces before the first text comes out: yield while you read.",
    )
    texts = ["naïve 🦙", "ñandú, 羊駝", "🦙🦙"]
    cuts = {text: [text.encode()[i : i + 1] for i in range(len(text.encode()))] for text in texts}
    cuts["a🦙é!"] = [
        b"a\xf0\x9f",
        b"\xa6\x99\xc3",
        b"\xa9!",
    ]  # a piece that ends one character and begins another
    for text, pieces in cuts.items():
        steps = run(pieces)
        shown = "".join(steps)
        require(
            "\ufffd" not in shown,
            f"'{text}' came out as '{shown}': a piece that ends inside a character must wait for the rest.",
        )
        require(
            shown == text, f"'{text}' came out as '{shown[:60]}': no character may be lost or come twice."
        )
        require(
            len(steps) == len(pieces),
            f"{len(pieces)} pieces gave {len(steps)} strings: yield one for each piece, empty "
            "where nothing is certain yet, and no more if no byte is left over.",
        )
        for count in range(1, len(pieces) + 1):
            now, sure = "".join(steps[:count]), _certain(b"".join(pieces[:count]))
            require(
                now == sure,
                f"after {count} of the pieces {pieces} the text '{sure}' is certain; you have shown '{now}'.",
            )
    steps = run([b"ok ", b"\xf0\x9f", b"\xa6"])
    require(
        steps[:3] == ["ok ", "", ""],
        "the last character is cut off; before the end nothing of it may be shown.",
    )
    require(
        "".join(steps) == "ok \ufffd",
        f"the stream stops inside a character: at the end yield one '\ufffd' for what is "
        f"left, so that nobody believes it complete. Yours: '{''.join(steps)}'.",
    )


@exercise(
    "chat_prompt", chapter=1, title="What Llama 2 reads in a chat", minutes=15, difficulty="core", points=10
)
def check_chat_prompt(your: Student) -> None:
    def say(*turns: str, system: str | None = None) -> str:
        roles = itertools.cycle(("user", "assistant"))
        messages = [] if system is None else [{"role": "system", "content": system}]
        got = your(messages + [{"role": role, "content": turn} for role, turn in zip(roles, turns)])
        present(got)
        require(isinstance(got, str), f"you return a {type(got).__name__}; the prompt is one string.")
        return got

    def compare(got: str, want: str, hint: str) -> None:
        at = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
        require(
            got == want,
            f"{hint} From character {at} on you have {got[at : at + 12]!r}, want {want[at : at + 12]!r}.",
        )

    got = say("Hi")
    require(
        not got.rstrip().endswith("</s>"),
        "the last message waits for its answer: </s> stands after an answer only.",
    )
    require(got.startswith("<s>"), "each exchange begins with <s>; yours does not.")
    require("<<SYS>>" not in got, "without a system message there is no <<SYS>>.")
    compare(got, "<s>[INST] Hi [/INST]", "one user message is wrong.")
    compare(say("  Hi\n"), "<s>[INST] Hi [/INST]", "blanks around a message must be stripped.")
    got = say("Hi", "Hello.", "Who?")
    require(
        got.count("<s>") == 2,
        f"two exchanges need two <s>, one at the start of each; yours has {got.count('<s>')}.",
    )
    require(
        got.count("</s>") == 1,
        f"one answer is complete, so there is one </s>; yours has {got.count('</s>')}.",
    )
    compare(
        got,
        "<s>[INST] Hi [/INST] Hello. </s><s>[INST] Who? [/INST]",
        "an answered message and a new one are wrong.",
    )
    got = say("Hi", system="Be brief.")
    require(
        got.count("[INST]") == 1,
        "the system message has no [INST] of its own: it stands inside the first user message.",
    )
    inside = got.find("[INST]") < got.find("<<SYS>>") < got.find("Hi")
    require(inside, "the system message stands inside the first user message, between [INST] and its words.")
    compare(
        got,
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]",
        "the system message is framed wrongly (mind the newlines).",
    )
    got = say("a", "b", "c", "d", "e", system="S")
    want = "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST] d </s><s>[INST] e [/INST]"
    require(got.count("<<SYS>>") == 1, "the system message stands in the first exchange only.")
    compare(got, want, "three exchanges with a system message are wrong.")


@exercise(
    "merge_shards", chapter=1, title="One model out of eight files", minutes=15, difficulty="core", points=10
)
def check_merge_shards(your: Student) -> None:
    D, hidden, V = 16, 24, 40
    shapes = {"tok_embeddings.weight": (V, D), "norm.weight": (D,), "output.weight": (V, D)}
    for layer in range(2):
        name = f"layers.{layer}."
        shapes |= {f"{name}attention.{part}.weight": (D, D) for part in ("wq", "wk", "wv", "wo")}
        shapes |= {f"{name}feed_forward.w1.weight": (hidden, D), f"{name}feed_forward.w3.weight": (hidden, D)}
        shapes |= {f"{name}feed_forward.w2.weight": (D, hidden)}
        shapes |= {f"{name}attention_norm.weight": (D,), f"{name}ffn_norm.weight": (D,)}
    whole = {name: numbers(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    columns = ("tok_embeddings.", ".wo.", ".w2.")

    def shards(count: int) -> list[dict]:
        def cut(name: str, value: torch.Tensor) -> tuple:
            if value.dim() == 1:
                return (value,) * count
            return value.tensor_split(count, dim=1 if any(part in name for part in columns) else 0)

        parts = {name: cut(name, value) for name, value in whole.items()}
        return [
            {n: p[i].clone() for n, p in parts.items()} | {"rope.freqs": torch.ones(4)} for i in range(count)
        ]

    for count in (1, 2, 4, 8):
        where, got = f"{count} shard{'s' * (count > 1)}", your(shards(count))
        present(got)
        require(
            isinstance(got, dict), f"you return a {type(got).__name__}; want one dict from names to tensors."
        )
        require("rope.freqs" not in got, "rope.freqs is no weight: it can be computed, so leave it out.")
        missing = sorted(set(whole) - set(got))
        require(
            not missing, f"{where}: {len(missing)} weights are missing, {', '.join(missing[:2])} among them."
        )
        require(
            set(got) == set(whole),
            f"{where}: there is a name that no shard has: {sorted(set(got) - set(whole))[:1]}.",
        )
        for name, want in whole.items():
            value = got[name]
            require(
                isinstance(value, torch.Tensor),
                f"{where}: {name} is a {type(value).__name__}; want a tensor.",
            )
            shape = tuple(value.shape)
            if value.dim() == 1 or want.dim() == 1:
                require(
                    shape == tuple(want.shape),
                    f"{where}: {name} has shape {shape}: every shard holds the whole norm, so "
                    "take one of them.",
                )
            other = "It was cut along the other dimension." if value.numel() == want.numel() else ""
            require(
                shape == tuple(want.shape),
                f"{where}: {name} has shape {shape}, want {tuple(want.shape)}. {other}",
            )
            require(value.dtype == want.dtype, f"{where}: {name} has changed its dtype.")
            order = (
                "Are the shards in order?"
                if want.dim() == 2
                else "Every shard holds the whole norm: take one of them."
            )
            require(
                torch.equal(value, want), f"{where}: {name} has the right shape and wrong numbers. {order}"
            )


# --- 7. The floor ---


@exercise(
    "entropy_gap", chapter=1, title="How far above the floor?", minutes=15, difficulty="core", points=10
)
def check_entropy_gap(your: Student) -> None:
    def measure(losses: torch.Tensor, log_probs: torch.Tensor) -> tuple[float, float, float]:
        got = several(your(losses, log_probs), 3, "return three numbers: gap, standard error, share.")
        for value in got:
            single = (
                value.numel() == 1 if isinstance(value, torch.Tensor) else isinstance(value, (int, float))
            )
            require(single, "gap, standard error and share are one number each: take means over the texts.")
        gap, spread, share = map(float, got)
        require(math.isfinite(gap + spread + share), "a result is NaN or infinite.")
        return gap, spread, share

    def near(one: float, two: float) -> bool:
        return math.isclose(one, two, rel_tol=1e-4, abs_tol=1e-5)

    world = -40 - 8 * numbers(50).double().abs()  # log-probabilities, all negative
    excess = 1 + 0.5 * numbers(50, seed=1).double()
    gap, spread, share = measure(-world, world)
    require(
        near(gap, 0),
        f"a model that knows the world's own probabilities has a gap of 0; yours is {gap:.4g}. Mind the "
        "sign: log-probabilities are negative, losses positive.",
    )
    require(
        near(spread, 0),
        f"a perfect model is perfect on every text, so the standard error is 0; yours is {spread:.3g}. Take "
        "the difference text by text, then its spread.",
    )
    gap, spread, share = measure(-world + 2, world)
    require(
        near(gap, 2),
        f"a model that loses 2 nats more on each text has a gap of 2; yours is {gap:.4g}. A mean over texts?",
    )
    below = measure(-world - 2, world)[0]
    require(
        near(below, -2),
        f"2 nats below the floor on each text is a gap of -2; yours is {below:.4g}. Don't hide it: a "
        "negative gap says that the floor is wrong.",
    )
    differences = excess.tolist()
    gap, spread, share = measure(-world + excess, world)
    require(near(gap, statistics.fmean(differences)), f"the gap is the mean difference; yours is {gap:.4g}.")
    right = statistics.stdev(differences) / math.sqrt(50)
    hints = {
        math.sqrt(50): "Divide the spread by the root of the number of texts.",
        math.sqrt(49 / 50): "Divide by N - 1 inside the spread: the mean came from the same texts.",
    }
    hint = next((words for factor, words in hints.items() if near(spread, right * factor)), "")
    require(
        near(spread, right),
        f"the standard error of the mean of these 50 differences is {right:.4g}, not {spread:.4g}. {hint}",
    )
    entropy = -statistics.fmean(world.tolist())
    hint = "Compare with the entropy, not with the loss." if near(share, gap / (entropy + gap)) else ""
    hint = "A share, not per cent." if near(share, 100 * gap / entropy) else hint
    require(
        near(share, gap / entropy),
        f"a gap of {gap:.3f} above an entropy of {entropy:.2f} is a share of {gap / entropy:.4f}; "
        f"yours is {share:.4f}. {hint}",
    )
