"""What a draft is worth, written by hand: `python -m llamabook draft-eval`.

For each batch size, in one process: first what steps cost, and how often a draft must be right to pay at that; then texts,
in rounds. A round decodes the same prompts plainly and with each number of drafted tokens, plainly again after every
second of these, and compares neighbours, since the machine's speed may change from one second to the next.

Rows never stop at an end of text, and a decoding ends when the first row is full, so that all rows of a batch are always
at work. It is timed from the end of its first round on, in which the draft reads the prompts.
"""

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from llamabook import fast
from llamabook.bench.report import median_interval
from llamabook.fast import Statistics
from llamabook.fast.payoff import Payoff, predicted_speedup
from llamabook.fast.speculative import payoff_of

PLAIN, ADAPTIVE = 0, None  # as speculate_k: no draft at all; as many as the run finds good
ROUNDS_OF_COSTS, REPEATS_OF_COSTS = 4, 3  # rounds of a decoding that is to show what steps cost, and how often it runs
SIDE_BY_SIDE = 2  # decodings with the draft between two without


@dataclass(frozen=True)
class Run:
    """A decoding of a batch, timed from the end of its first round on.

    rounds: how many are timed; tokens: what they added to all rows; seconds: what they took; draft_s, check_s: of that,
    what one drafted token took (None where k is not fixed), and one check; prefill_s: what the draft's reading of the
    prompts took; past_end: tokens behind a text's own end; done: what speculation did, the first round included.
    """

    batch_size: int
    rounds: int
    tokens: int
    seconds: float
    draft_s: float | None
    check_s: float | None
    prefill_s: float | None
    past_end: int
    done: Statistics

    @property
    def token_s(self) -> float:
        """Seconds for one more token in each row."""
        return self.seconds * self.batch_size / self.tokens


@dataclass
class Lab:
    """A model, its draft, and how they are to decode: `options` of `fast.stream`, without draft and seed."""

    model: torch.nn.Module
    draft: torch.nn.Module
    options: dict = field(default_factory=dict)
    learned: dict = field(default_factory=dict)  # batch size -> what adaptive runs have learned; fixed ones teach it nothing

    @contextmanager
    def own_memory(self, batch_size: int, k: int | None) -> Iterator[None]:
        """Within the block a run with a fixed k leaves no trace in what `ADAPTIVE` runs go by."""
        compiled = bool(self.options.get("compile"))
        payoff_of(self.draft, self.model, batch_size, compiled)
        shelf = self.draft.payoffs[self.model]
        shelf[batch_size, compiled] = self.learned.setdefault(batch_size, Payoff()) if k is ADAPTIVE else Payoff()
        yield

    def decode(self, prompts: Sequence[Sequence[int]], n: int, k: int | None, rounds: int | None = None, seed: int = 0) -> Run:
        """Add n tokens to the first row that is full, or as many as `rounds` timed rounds do, k drafted a round."""
        B, done, seen, start, end = len(prompts), Statistics(), 0, 0.0, 0.0
        written: list[list[int]] = [[] for _ in prompts]
        use = {} if k == PLAIN else {"draft": self.draft, "speculate_k": k, "statistics": done}
        with self.own_memory(B, k):
            for row, token in fast.stream(self.model, prompts, n, seed=seed, **use, **self.options):
                passes = done.target_passes if use else len(written[0])
                if passes > seen:  # the first token of a round: all of it is there
                    seen, end = passes, time.perf_counter()
                    if seen == 1:
                        first = copy.deepcopy(done)
                        start = end = time.perf_counter()
                    if rounds is not None and seen > rounds:
                        break
                written[row].append(token)
                if len(written[row]) == n:
                    break
        return self.timed(written, B, k, seen - 1, end - start, done, first)

    def timed(self, written, B: int, k: int | None, rounds: int, seconds: float, done: Statistics, first: Statistics) -> Run:
        """The `Run` of what was `done`, without the `first` round."""
        kept = sum(done.stayed.values()) - sum(first.stayed.values())
        draft_s = check_s = prefill_s = None
        if k != PLAIN:
            check_s = (done.target_seconds - first.target_seconds) / rounds
        if k:
            draft_s = (done.draft_seconds - first.draft_seconds) / (k * rounds)
            prefill_s = max(first.draft_seconds - k * draft_s, 0.0)
        ends = set(getattr(getattr(self.model, "tokenizer", None), "stop_tokens", ()))
        past = sum(len(row) - 1 - next((i for i, token in enumerate(row) if token in ends), len(row) - 1) for row in written if row)
        return Run(B, rounds, B * rounds + kept, seconds, draft_s, check_s, prefill_s, past, done)


def least_alpha(k: int, c: float, v: float) -> float | None:
    """How often a drafted token must be right for k of them to pay, by halving; None if it is never enough.

    c, v: a drafted token and a check of k + 1 tokens, in plain steps.
    """
    if predicted_speedup(1.0, k, c, v) <= 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if predicted_speedup(middle, k, c, v) > 1 else (middle, high)
    return high


def costs(lab: Lab, prompts: Sequence[Sequence[int]], ks: Sequence[int], n: int) -> dict:
    """What steps cost for these rows, before any text is measured, and how often a draft must be right to pay at that.

    {"plain_step_s", "draft_step_s", "check_s": {k: seconds}, "needs_alpha": {k: share or None}}. Every kind of step takes
    its turn, a few times; the text has no part in it.
    """
    plain, draft, check = [], [], {k: [] for k in ks}
    for _ in range(REPEATS_OF_COSTS):
        for k in (PLAIN, *ks):
            run = lab.decode(prompts, min(n, (ROUNDS_OF_COSTS + 2) * (k + 1)), k, ROUNDS_OF_COSTS)
            if k == PLAIN:
                plain.append(run.token_s)
            else:
                draft.append(run.draft_s)
                check[k].append(run.check_s)
    step, drafted = statistics.median(plain), statistics.median(draft)
    checks = {k: statistics.median(seconds) for k, seconds in check.items()}
    needs = {k: least_alpha(k, drafted / step, checks[k] / step) for k in ks}
    return {"plain_step_s": step, "draft_step_s": drafted, "check_s": checks, "needs_alpha": needs}


def turns(contenders: Sequence, number: int) -> list:
    """A round: the contenders, beginning one further on than in the round before, with PLAIN around every two."""
    at = number % len(contenders)
    order = [PLAIN]
    for place, contender in enumerate([*contenders[at:], *contenders[:at]], 1):
        order.append(contender)
        if place % SIDE_BY_SIDE == 0 or place == len(contenders):
            order.append(PLAIN)
    return order


def one_round(order: Sequence, decode: Callable[[int | None], Run]) -> dict:
    """Each contender's run, and the mean seconds of a plain step before and after it: {contender: (run, seconds)}."""
    runs = [decode(k) for k in order]
    found = {}
    for place, k in enumerate(order):
        if k == PLAIN:
            continue
        before = next(run for run, at in zip(runs[place::-1], order[place::-1]) if at == PLAIN)
        after = next(run for run, at in zip(runs[place:], order[place:]) if at == PLAIN)
        found[k] = runs[place], (before.token_s + after.token_s) / 2
    return found


def measure(
    lab: Lab, prompts: Sequence[Sequence[int]], batch_sizes: Sequence[int], ks: Sequence[int], n: int, rounds: int,
    seed: int = 0, say: Callable[[str], None] = lambda text: None, told: Callable[[dict], None] = lambda batch: None,
) -> list[dict]:  # fmt: skip
    """For each batch size {"batch_size", "costs", "alpha", "rows", "adaptive"}; the ks of `rows` are as asked for.

    Round r takes the next `batch_size` of the prompts, from the first on when all were used. say: called with what is being
    done; told: with a batch size and its costs, as soon as they are known, and again with all of it.
    """
    results = []
    for B in batch_sizes:
        def rows_of(number: int) -> list:
            return [prompts[(number * B + row) % len(prompts)] for row in range(B)]

        for k in (PLAIN, *ks, ADAPTIVE):
            say(f"batch {B}: warming up")
            lab.decode(rows_of(0), n, k, 3 if k is not ADAPTIVE else None, seed)
        say(f"batch {B}: what steps cost")
        batch = {"batch_size": B, "costs": costs(lab, rows_of(0), ks, n)}
        told(batch)
        measured: dict = {k: [] for k in (*ks, ADAPTIVE)}
        for number in range(rounds):
            say(f"batch {B}: round {number + 1} of {rounds}")
            order = turns([*ks, ADAPTIVE], number)
            found = one_round(order, lambda k: lab.decode(rows_of(number), n, k, seed=seed + number * B))
            for k, pair in found.items():
                measured[k].append(pair)
        results.append(batch | summary(measured, ks, batch["costs"]))
        told(results[-1])
    return results


def summary(measured: dict, ks: Sequence[int], before: dict) -> dict:
    """What the runs of one batch size say: {"alpha", "past_end", "rows", "adaptive"}; measured: k -> [(run, plain seconds)]."""
    fixed = [run.done for k in ks for run, _ in measured[k]]
    kept, tried = (sum(sum(getattr(done, name).values()) for done in fixed) for name in ("stayed", "reached"))
    alpha = kept / max(tried, 1)
    runs = [run for pairs in measured.values() for run, _ in pairs]
    past = sum(run.past_end for run in runs) / sum(run.tokens for run in runs)
    rows = []
    for k in ks:
        row = {"speculate_k": k, **common(measured[k])}
        c, v = (statistics.median(getattr(run, name) / plain for run, plain in measured[k]) for name in ("draft_s", "check_s"))
        row |= {
            "draft_step_s": statistics.median(run.draft_s for run, _ in measured[k]),
            "check_s": statistics.median(run.check_s for run, _ in measured[k]),
            "draft_prefill_s": statistics.median(run.prefill_s for run, _ in measured[k]),
            "draft_cost": c, "check_cost": v, "needs_alpha": before["needs_alpha"][k],
            "predicted": predicted_speedup(alpha, k, c, v),
        }  # fmt: skip
        rows.append(row | {"error": row["predicted"] / row["speedup"] - 1})
    adaptive = common(measured[ADAPTIVE])
    adaptive["chosen"] = dict(sorted(sum((run.done.drafts for run, _ in measured[ADAPTIVE]), Counter()).items()))
    adaptive["best_fixed"] = max(rows, key=lambda row: row["speedup"])["speculate_k"]
    return {"alpha": alpha, "past_end": past, "rows": rows, "adaptive": adaptive}


def common(pairs: list[tuple[Run, float]]) -> dict:
    """What is said of a fixed k and of the adaptive one alike: speed, paired speed-up, acceptance by position."""
    ratios = [plain / run.token_s for run, plain in pairs]
    low, high = median_interval(ratios)
    speeds = [run.batch_size / run.token_s for run, _ in pairs]
    stayed, reached, histogram = (
        sum((getattr(run.done, name) for run, _ in pairs), Counter()) for name in ("stayed", "reached", "histogram")
    )
    places = range(1, max(reached, default=0) + 1)
    return {
        "plain_step_s": statistics.median(plain for _, plain in pairs),
        "tokens_per_s": statistics.median(speeds), "tokens_per_s_min": min(speeds), "tokens_per_s_max": max(speeds),
        "speedup": statistics.median(ratios), "speedup_low": low, "speedup_high": high,
        "alpha": sum(stayed.values()) / max(sum(reached.values()), 1),
        "reached": [reached[place] for place in places], "stayed": [stayed[place] for place in places],
        "acceptance": [stayed[place] / reached[place] for place in places],
        "mean_accepted": sum(stayed.values()) / max(sum(histogram.values()), 1),
        "histogram": dict(sorted(histogram.items())),
        "rounds": [
            {"token_s": run.token_s, "plain_step_s": plain, "draft_step_s": run.draft_s, "check_s": run.check_s,
             "draft_prefill_s": run.prefill_s, "rounds": run.rounds, "tokens": run.tokens}
            for run, plain in pairs
        ],
    }  # fmt: skip
