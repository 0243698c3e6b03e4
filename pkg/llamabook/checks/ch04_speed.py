"""Checks of chapter 4's exercises on speed: graphs that stand still, draws of one's own, the roofline.

Written by hand. No check calls the package's own functions: each has an oracle of its own. Nothing is timed, and
no C++ compiler is needed: where graphs are counted, torch's tracer writes them and runs them as they are.
"""

import contextlib
import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from llamabook.checks.ch04_cache import group_of
from llamabook.checks.core import Student, Wrong, close, exercise, numbers, off_by, present, require, tensor, whole

# --- 1. Graphs ---


@contextlib.contextmanager
def tracing(your: Student) -> Iterator[None]:
    """Within this block torch's tracer knows nothing yet and says nothing; afterwards it has forgotten again."""
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    with warnings.catch_warnings(), your._guarded():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        torch.compiler.reset()
        try:
            yield
        finally:
            torch.compiler.reset()
            logger.setLevel(level)


def graph_of(your: Student, *args: Any) -> int:
    """The number of operations in the one graph that the reader's function is; Wrong if it is not one."""
    with tracing(your):
        found = torch._dynamo.explain(your.function)(*args)
    if found.graph_break_count or found.graph_count != 1:
        reasons = [reason for reason in found.break_reasons if reason.user_stack]
        line = f", first at your line {reasons[0].user_stack[-1].line!r}" if reasons else ""
        raise Wrong(
            f"right, but the compiler makes {found.graph_count} graphs of it, not one{line}. There Python needs a "
            "value "
            "that only a run knows."
        )
    return found.op_count


def graphs_for(your: Student, calls: list[tuple]) -> int:
    """How many graphs the compiler writes for these calls, one after the other."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    with tracing(your):
        compiled = torch.compile(your.function, backend=backend)
        for args in calls:
            compiled(*args)
    return len(graphs)


@exercise("visible_scores", chapter=4, title="A shape that stands still", minutes=8, difficulty="warm-up", points=5)
def check_visible_scores(your: Student) -> None:
    S, d = 8, 4

    def scores(q: torch.Tensor, keys: torch.Tensor, position: int) -> torch.Tensor:
        got = your(q, keys, torch.tensor(position))
        present(got)
        require(isinstance(got, torch.Tensor), f"the result is a {type(got).__name__}; want a tensor.")
        hint = "A result that grows with the position has a new shape for every token." if len(got.shape) == 1 else ""
        require(
            tuple(got.shape) == (len(keys),),
            f"{len(keys)} slots, position {position}: the result has shape {tuple(got.shape)}, want ({len(keys)},). "
            f"{hint}",
        )
        require(got.dtype == q.dtype, f"the result is {str(got.dtype)[6:]}, want {str(q.dtype)[6:]}, as q.")
        require(not bool(got.isnan().any()), "the result holds NaN.")
        return got

    q, keys = numbers(d), numbers(S, d, seed=1)
    dots = torch.tensor([math.fsum(a * b for a, b in zip(q.tolist(), row)) for row in keys.tolist()])
    for position in (7, 3, 0):
        got = scores(q, keys, position)
        seen = int((got != -torch.inf).sum())
        hint = "A token sees its own slot." if seen == position else ""
        require(
            bool((got[position + 1 :] == -torch.inf).all()),
            f"position {position}: the slots from {position + 1} on must be -inf; yours are "
            f"{got[position + 1 :].tolist()[:3]}.",
        )
        require(seen == position + 1, f"position {position} sees {position + 1} slots, yours {seen}. {hint}")
        require(
            close(got[: position + 1], dots[: position + 1]), f"position {position}: the scores are not keys times q."
        )
    got = scores(q, torch.full((S, d), torch.inf).index_copy(0, torch.tensor([0]), keys[:1]), 0)
    require(close(got[:1], dots[:1]), "unseen keys of infinity change the scores of those that are seen.")
    graph_of(your, q, keys, torch.tensor(3))
    count = graphs_for(your, [(q, keys, torch.tensor(position)) for position in range(S)])
    require(count == 1, f"one graph must serve all positions; for positions 0 to {S - 1} yours needs {count}.")


@exercise("row_probs", chapter=4, title="One graph for every temperature", minutes=20, difficulty="core", points=10)
def check_row_probs(your: Student) -> None:
    def probs(logits: torch.Tensor, temperature: list[float]) -> torch.Tensor:
        shapes = {tuple(logits.T.shape): "Rows are texts: (B, V)."}
        finite = "Is something divided by a temperature of 0?"
        got = your(logits, torch.tensor(temperature))
        kind = "Probabilities are float32, whatever the logits are."
        return tensor(got, tuple(logits.shape), torch.float32, shapes=shapes, finite=finite, kind=kind)

    def by_hand(row: torch.Tensor, t: float) -> list[float]:
        numbers_, top = row.tolist(), max(row.tolist())
        if t == 0:
            best = numbers_.index(top)
            return [float(i == best) for i in range(len(numbers_))]
        powers = [math.exp((x - top) / t) for x in numbers_]
        return [p / sum(powers) for p in powers]

    logits = 2 * numbers(3, 6)
    got = probs(logits, [1.0, 1.0, 1.0])
    require(close(got.sum(dim=-1), torch.ones(3)), "each row's probabilities must add up to 1.")
    require(
        close(got, logits.softmax(dim=-1)), f"at temperature 1 it is the softmax ({off_by(got, logits.softmax(-1))})."
    )
    got = probs(logits, [0.5, 1.0, 2.0])
    want = torch.tensor([by_hand(row, t) for row, t in zip(logits, (0.5, 1.0, 2.0))])
    hint = "Is a temperature missing, or another row's?"
    if close(got, torch.tensor([by_hand(row, 1 / t) for row, t in zip(logits, (0.5, 1.0, 2.0))])):
        hint = "Divide by it."
    require(close(got, want), f"temperatures 0.5, 1 and 2, one a row: wrong probabilities. {hint}")
    got = probs(logits, [0.0, 1.0, 0.0])
    require(
        sorted(got[0].tolist())[-1] == 1 and got[0].sum() == 1,
        f"temperature 0 puts all on the largest logit, exactly; your row is {[round(p, 3) for p in got[0].tolist()]}.",
    )
    require(
        close(got[1], logits[1].softmax(dim=-1)), "rows 0 and 2 have temperature 0, and row 1, which has 1, is wrong."
    )
    require(
        got[0].argmax() == logits[0].argmax() and got[2].argmax() == logits[2].argmax(),
        "temperature 0: the 1 stands at a logit that is not the largest.",
    )
    equal = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    got = probs(equal, [0.0, 0.0])
    require(
        got.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]],
        "temperature 0 and two logits that are equally large: the lower id gets all, as with argmax; yours "
        f"{got.tolist()}. "
        "A temperature that is nearly 0 is not 0.",
    )
    got = probs(torch.tensor([[300.0, -300.0, 299.0]]), [0.01])
    require(close(got[0, :1], torch.ones(1)), "logits of 300 at temperature 0.01 overflow or lose the largest.")
    half = logits.bfloat16()
    want = torch.tensor([by_hand(row.float(), 0.7) for row in half])
    require(close(probs(half, [0.7] * 3), want), "bfloat16 logits: go to float32 before you divide.")
    counts = [graph_of(your, numbers(B, 5), torch.arange(float(B))) for B in (2, 9)]
    require(
        counts[0] == counts[1],
        f"one graph, but for 2 rows it has {counts[0]} operations and for 9 rows {counts[1]}: a loop over rows is "
        "written "
        "out. Treat all rows at once.",
    )


# --- 2. Sampling ---


@exercise("draw_rows", chapter=4, title="Every row its own luck", minutes=20, difficulty="core", points=10)
def check_draw_rows(your: Student) -> None:
    def dice(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(probs: torch.Tensor, generators: list[torch.Generator]) -> list[int]:
        B, V = probs.shape
        got = tensor(
            your(probs, generators), (B,), torch.int64, shapes={(B, 1): "Want (B,)."}, kind="Token ids are int64."
        )
        out = [token for token in got.tolist() if not 0 <= token < V]
        require(not out, f"{V} tokens, and you draw id {out[:1]}.")
        return got.tolist()

    sure = torch.eye(4)[[2, 0, 3]]
    got = draw(sure, dice(1, 2, 3))
    require(got == [2, 0, 3], f"each row is certain of its token, [2, 0, 3]; you draw {got}.")
    probs = torch.tensor([[0.25, 0.25, 0.25, 0.25]]).repeat(3, 1)
    generators, wanted = dice(1, 2, 3), dice(1, 2, 3)
    draw(probs, generators)
    for generator in wanted:
        torch.rand((), generator=generator, dtype=torch.float64)
    used = [torch.equal(a.get_state(), b.get_state()) for a, b in zip(generators, wanted)]
    idle = [torch.equal(a.get_state(), b.get_state()) for a, b in zip(generators, dice(1, 2, 3))]
    hint = "Not all generators are used." if any(idle) else "More or fewer, and all later tokens are others."
    require(all(used), f"every row takes exactly one float64 number from its own generator. {hint}")
    gaps = torch.tensor([[0.0, 0.0, 0.5, 0.0, 0.5, 0.0, 0.0]]).repeat(64, 1)
    wrong = sorted({token for token in draw(gaps, dice(*range(64)))} - {2, 4})
    require(not wrong, f"tokens {wrong} have probability 0 and are drawn.")

    def by_hand(row: torch.Tensor, generator: torch.Generator) -> int:
        weights = row.tolist()
        left = float(torch.rand((), generator=generator, dtype=torch.float64)) * math.fsum(weights)
        for token, weight in enumerate(weights):  # another road: walk until the number is used up
            left -= weight
            if left < 0:
                return token
        raise AssertionError

    probs = (2 * numbers(6, 30)).softmax(dim=-1)
    seeds = (3, 14, 15, 92, 65, 35)
    got, want = draw(probs, dice(*seeds)), [by_hand(row, g) for row, g in zip(probs, dice(*seeds))]
    hint = "Does one row's number decide for others?" if got[0] == want[0] else ""
    require(
        got == want,
        f"six rows, seeds {seeds}: the first running sums to exceed their numbers are at {want}; you draw {got}. "
        f"{hint}",
    )
    alone = [draw(row[None], dice(seed))[0] for row, seed in zip(probs, seeds)]
    require(alone == got, f"in a batch rows draw {got}, alone {alone}: a row's luck must not depend on its company.")
    twice, generators = [], dice(7)
    for _ in range(8):
        twice += draw(probs[:1], generators)
    generators = dice(7)
    want = [by_hand(probs[0], generators[0]) for _ in range(8)]
    require(twice == want, f"eight draws from one generator are {want}; yours {twice}. Do you seed it anew?")
    short = torch.tensor([[0.1, 0.2, 0.1]]).repeat(64, 1)
    got = draw(short, dice(*range(64)))
    want = [by_hand(row, g) for row, g in zip(short, dice(*range(64)))]
    require(
        got == want,
        "weights [0.1, 0.2, 0.1] add up to 0.4, as rounding makes real ones add up to a little less than 1: compare "
        "with "
        "the number times the row's own sum.",
    )
    tiny = torch.tensor([[1.0, 1e-4, 1e-4]]).bfloat16().repeat(2, 1)
    got = {token for n in range(0, 400, 2) for token in draw(tiny[:, [1] * 300 + [0] + [2] * 300], dice(n, n + 1))}
    want = {by_hand(tiny[0, [1] * 300 + [0] + [2] * 300], g) for g in dice(*range(400))}
    require(got == want, "bfloat16 probabilities: a running sum in bfloat16 stands still at 1. Add up in float64.")


# --- 3. The roofline ---


@exercise("most_tokens_per_s", chapter=4, title="The roof", minutes=8, difficulty="warm-up", points=5)
def check_most_tokens_per_s(your: Student) -> None:
    def roof(
        gb_per_s: float = 50.0,
        weight_bytes: int = 2_000_000_000,
        cache_bytes: int = 50_000,
        context: int = 0,
        rows: int = 1,
    ) -> float:
        got = your(gb_per_s, weight_bytes, cache_bytes, context, rows)
        present(got)
        number = isinstance(got, (int, float)) and not isinstance(got, bool)
        require(number and math.isfinite(got), f"you return {got!r:.40}; want one finite number: tokens per second.")
        return float(got)

    def near(one: float, two: float) -> bool:
        return math.isclose(one, two, rel_tol=1e-9)

    usual = roof()
    hints = {0.04: "That is the seconds of a step.", 50 / 2 * 1e9: "Bytes and gigabytes are mixed.",
             50 * 2**30 / 2e9: "Here a GB is 1e9 bytes, as for bandwidths everywhere."}  # fmt: skip
    hint = next((words for value, words in hints.items() if near(usual, value)), "")
    require(
        near(usual, 25),
        f"2 GB of weights, 50 GB/s, no context: 25 steps a second, one token each; you say {usual:.6g}. {hint}",
    )
    require(near(roof(gb_per_s=100.0), 50), "twice the bandwidth, twice the tokens.")
    longer = roof(context=40_000)
    hint = "Each step reads the whole cache of its row." if near(longer, usual) else ""
    if near(longer, 50e9 / (2e9 + 50_000)):
        hint = "The cache is read whole, one key and value for each position of the context."
    require(
        near(longer, 12.5),
        "with 40 000 tokens of 50 000 bytes the cache is as large as the weights: 12.5 tokens/s, you say "
        f"{longer:.6g}. {hint}",
    )
    batch = roof(rows=8)
    hint = "The weights are read once for all rows." if near(batch, 25) or near(batch, 25 / 8) else ""
    require(near(batch, 200), f"8 rows, no context: 8 tokens a step, 200/s together; you say {batch:.6g}. {hint}")
    both = roof(context=10_000, rows=8)
    hint = "Each row has a cache of its own." if near(both, 8 * 50e9 / 2.5e9) else ""
    require(
        near(both, 8 * 50e9 / 6e9),
        f"8 rows of 10 000 tokens: {8 * 50e9 / 6e9:.4g} tokens/s, you say {both:.6g}. {hint}",
    )
    draw = random.Random(5)
    for _ in range(20):
        ask = (
            draw.uniform(10, 4000),
            draw.randrange(10**8, 10**11),
            draw.randrange(10**3, 10**6),
            draw.randrange(10**5),
            3,
        )
        # another road: exact fractions, seconds first
        seconds = (Fraction(ask[1]) + ask[4] * ask[3] * Fraction(ask[2])) / (Fraction(ask[0]) * 10**9)
        require(near(roof(*ask), float(ask[4] / seconds)), f"wrong for {ask}, in the order of the arguments.")


@exercise("step_costs", chapter=4, title="What one step costs", minutes=20, difficulty="core", points=10)
def check_step_costs(your: Student) -> None:
    base = {"vocab_size": 50, "emb_dim": 16, "n_heads": 4, "n_kv_groups": 2, "n_layers": 3, "hidden_dim": 24}

    def costs(rows: int = 1, context: int = 1, size: int = 2, **changes: int) -> tuple[int, int]:
        flops, moved = group_of(your(base | changes, rows, context, size), 2, "two numbers: FLOPs, and bytes")
        return whole(flops, "the first, FLOPs,"), whole(moved, "the second, bytes,")

    def counted(rows: int, context: int, size: int, **changes: int) -> tuple[int, int]:
        """Another road: multiply tensors that have no memory, and let torch count."""
        cfg = base | changes
        d, D, F = cfg.get("head_dim", cfg["emb_dim"] // cfg["n_heads"]), cfg["emb_dim"], cfg["hidden_dim"]
        H, G = cfg["n_heads"], cfg["n_kv_groups"]
        dtype = {1: torch.int8, 2: torch.bfloat16, 4: torch.float32}[size]
        shapes = [(D, H * d), (D, G * d), (D, G * d), (H * d, D), (D, F), (D, F), (F, D)] * cfg["n_layers"]
        moved = 0
        with FlopCounterMode(display=False) as counter, torch.device("meta"):
            for inputs, outputs in [*shapes, (D, cfg["vocab_size"])]:
                moved += torch.empty(inputs, outputs, dtype=dtype).nbytes
                torch.empty(rows, inputs) @ torch.empty(inputs, outputs)
            for _ in range(cfg["n_layers"]):
                q, keys = torch.empty(rows * G, H // G, d), torch.empty(rows * G, context, d)
                torch.bmm(torch.bmm(q, keys.mT), keys)
                moved += 2 * torch.empty(rows * G, context, d, dtype=dtype).nbytes
        return counter.get_total_flops(), moved

    (flops, moved), want = costs(), counted(1, 1, 2)
    attention = 4 * 3 * 4 * 4
    hints = {
        want[0] // 2: "A multiplication and an addition are two FLOPs.",
        want[0] - attention: "Scores, and values times weights, are products, too.",
        want[0] - 2 * 50 * 16: "The head is a product, too.",
        want[0] - attention // 2: "Attention has two products: the scores, and values times weights.",
        want[0] - 2 * 3 * 16 * 24: "SwiGLU has three matrices.",
    }
    require(
        flops == want[0],
        f"one row that sees one token, 3 layers: {want[0]} FLOPs, you say {flops}. {hints.get(flops, '')}",
    )
    hints = {
        want[1] // 2: "Is it 2 bytes a number?",
        want[1] - 3 * 2 * 8 * 2: "The cache is read, too.",
        want[1] - 3 * 8 * 2: "The cache has keys *and* values.",
        want[1] + 3 * 2 * 8 * 2: "The cache has G heads, not H.",
        want[1] + 2 * 50 * 16: "Of the embedding one row a token is read, not the table.",
        want[1] - 2 * 50 * 16: "The head is read whole for every token.",
    }
    require(moved == want[1], f"one row that sees one token: {want[1]} bytes, you say {moved}. {hints.get(moved, '')}")
    flops, moved = (b - a for a, b in zip(costs(), costs(context=11)))
    require(
        flops == 10 * attention,
        f"ten more tokens of context add {10 * attention} FLOPs here, yours {flops}: each of H query heads "
        "multiplies with all.",
    )
    require(
        moved == 10 * 3 * 2 * 8 * 2, f"ten more tokens of context add {10 * 3 * 2 * 8 * 2} bytes here, yours {moved}."
    )
    one, five = costs(rows=1, context=9), costs(rows=5, context=9)
    require(five[0] == 5 * one[0], "five rows do five times the arithmetic.")
    want = counted(5, 9, 2)[1]
    hint = "The weights are read once for all rows." if five[1] == 5 * one[1] else "Each row has a cache of its own."
    require(five[1] == want, f"five rows that see 9 tokens: {want} bytes, you say {five[1]}. {hint}")
    require(costs(size=4)[1] == 2 * costs()[1], "in float32 twice as many bytes are read.")
    require(costs(size=4)[0] == costs()[0], "FLOPs don't depend on the bytes of a number.")
    for changes in ({"head_dim": 8}, {"n_kv_groups": 4}, {"n_layers": 5, "hidden_dim": 40}, {"n_kv_groups": 1}):
        got, want = costs(3, 7, 1, **changes), counted(3, 7, 1, **changes)
        hint = "A config with head_dim means it." if "head_dim" in changes else ""
        require(got == want, f"{base | changes}, 3 rows, 7 tokens, 1 byte: {want}, you say {got}. {hint}")


@exercise("rows_until_compute", chapter=4, title="When arithmetic takes over", minutes=15, difficulty="core", points=10)
def check_rows_until_compute(your: Student) -> None:
    def rows(
        flops: int = 1000, weights: int = 4096, cache: int = 0, flop_per_s: int = 8000, bytes_per_s: int = 64
    ) -> int:
        return whole(your(flops, weights, cache, flop_per_s, bytes_per_s))

    usual = rows()
    hint = "Is it rounded down?" if usual == 511 else "The weights are read once for all rows." if usual == 1 else ""
    require(
        usual == 512,
        "1000 FLOPs a row at 8000/s, 4096 bytes of weights at 64/s: reading takes 64 s, 512 rows of 1/8 s take as "
        "long; you "
        f"say {usual}. {hint}",
    )
    require(
        rows(weights=4097) == 513,
        f"a byte more to read: 512 rows are no longer enough, 513; you say {rows(weights=4097)}.",
    )
    require(rows(flop_per_s=16_000) == 1024, "twice the arithmetic: twice the rows.")
    require(rows(bytes_per_s=128) == 256, "twice the bandwidth: half the rows.")
    longer = rows(cache=4)
    hint = "Every row brings a cache to be read, so each closes the gap by less." if longer in (512, 513) else ""
    require(
        longer == 1024,
        f"with 4 bytes of cache a row (1/16 s) each row closes the gap by 1/16 s only: 1024 rows, you say {longer}. "
        f"{hint}",
    )
    require(rows(flops=10**9) == 1, "one row that computes longer than it reads: 1.")
    for cache in (8, 9, 100):
        got = your(1000, 4096, cache, 8000, 64)
        same = "as much time as" if cache == 8 else "more time than"
        require(
            got is None,
            f"a row's cache of {cache} bytes takes {same} its arithmetic: no number of rows is enough. Return None; "
            "yours is "
            f"{got!r:.40}.",
        )
    draw = random.Random(3)
    for _ in range(40):
        ask = [
            draw.randrange(1, 10**6),
            draw.randrange(1, 10**6),
            draw.randrange(0, 200),
            2 ** draw.randrange(9, 14),
            64,
        ]
        flops, weights, cache, per_s, memory = map(Fraction, ask)
        if flops / per_s <= cache / memory:
            require(your(*ask) is None, f"{tuple(ask)}: a row reads for longer than it computes, so None.")
            continue
        low, high = 0, 1  # another road: double, then halve, in exact fractions
        while high * flops / per_s < (weights + high * cache) / memory:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            enough = middle * flops / per_s >= (weights + middle * cache) / memory
            low, high = (low, middle) if enough else (middle, high)
        got = rows(*ask)
        require(got == high, f"{tuple(ask)}, in the order of the arguments: {high} rows, you say {got}.")


# --- 4. One long row for many threads ---


@exercise("join_chunks", chapter=4, title="Many threads, one softmax", minutes=25, difficulty="stretch", points=20)
def check_join_chunks(your: Student) -> None:
    H, S, d = 3, 20, 4
    keys_dot_q, values = 3 * numbers(H, S), numbers(H, S, d, seed=1)

    def parts(scores: torch.Tensor, values: torch.Tensor, cuts: list[int]) -> list[torch.Tensor]:
        """What each thread hands over about its own slots: (C, H), (C, H), (C, H, d)."""
        made = []
        for x, v in zip(scores.split(cuts, dim=1), values.split(cuts, dim=1)):
            top = x.amax(dim=1) if x.shape[1] else torch.full((len(x),), -torch.inf)
            weights = (x - top[:, None]).exp()
            made.append((top, weights.sum(dim=1), (weights[..., None] * v).sum(dim=1)))
        return [torch.stack(kind) for kind in zip(*made)]

    def join(scores: torch.Tensor, values: torch.Tensor, cuts: list[int], finite: str = "") -> torch.Tensor:
        heads, d = values.shape[0], values.shape[2]
        shapes = {(len(cuts), heads, d): "The chunks must be added up: dimension 0 goes.",
                  (1, heads, d): "Dimension 0, the chunks, goes."}  # fmt: skip
        return tensor(your(*parts(scores, values, cuts)), (heads, d), torch.float32, shapes=shapes, finite=finite)

    def whole_row(scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Another road: all scores at once, float64."""
        return (scores.double().softmax(dim=1)[..., None] * values.double()).sum(dim=1)

    want = whole_row(keys_dot_q, values)
    got = join(keys_dot_q, values, [S])
    require(
        close(got, want), f"a single chunk: its context divided by its total; largest error {off_by(got, want)[14:]}."
    )
    flat = torch.zeros(H, S)
    got = join(flat, values, [5, 15])
    hint = "Chunks are not equally heavy: don't average their results." if not close(got, values.mean(dim=1)) else ""
    require(
        close(got, values.mean(dim=1)),
        f"all scores equal, chunks of 5 and 15 slots: want the mean of all values. {hint}",
    )
    got = join(keys_dot_q, values, [8, 12])
    totals = parts(keys_dot_q, values, [8, 12])
    naive = totals[2].sum(dim=0) / totals[1].sum(dim=0)[..., None]
    hint = "Each chunk's sums are relative to its own largest score: bring them to one." if close(got, naive) else ""
    require(close(got, want), f"two chunks of 8 and 12 slots ({off_by(got, want)}). {hint}")
    for cuts in ([1] * S, [3, 3, 3, 3, 8], [12, 8]):
        got = join(keys_dot_q, values, cuts)
        require(
            close(got, want), f"chunks of {cuts}: the same row must come out however it is cut ({off_by(got, want)})."
        )
    for shift in (1000.0, -1000.0):
        got = join(keys_dot_q + shift, values, [8, 12], "Scores can be large: exp only differences from the largest.")
        require(
            close(got, want, 1e-3),
            f"scores around {shift:.0f}: adding a number to all changes no weight ({off_by(got, want)}). Take exp of "
            "differences only.",
        )
    steep = keys_dot_q.clone()
    steep[:, 10:] += 500
    for x, order in ((steep, "later"), (steep.flip(1), "first")):
        got = join(x, values, [10, 10], "Nothing may overflow: from which score must the differences be taken?")
        require(close(got, whole_row(x, values), 1e-3), f"the {order} chunk's scores are 500 larger: it alone counts.")
    steep = torch.cat([keys_dot_q[:1], keys_dot_q[1:] + 700])
    got = join(steep, values, [8, 12], "Each head has a largest score of its own.")
    require(close(got, want, 1e-3), "heads with scores around 0 and around 700: each head needs a largest of its own.")
    for cuts in ([0, 8, 12], [8, 0, 12], [0, 0, 20], [8, 12, 0]):
        empty = "An empty chunk hands over -inf, 0 and 0. What is -inf minus -inf?"
        got = join(keys_dot_q, values, cuts, empty)
        require(close(got, want), f"chunks of {cuts}: one without slots must change nothing. {empty}")
    short = keys_dot_q[:, :9], values[:, :9]
    require(close(join(*short, [2, 7]), whole_row(*short)), "wrong for 9 slots, cut into 2 and 7.")
    wide = 3 * numbers(1, 6, seed=7), numbers(1, 6, 16, seed=8)
    require(close(join(*wide, [4, 2]), whole_row(*wide)), "wrong for one head with d = 16.")
