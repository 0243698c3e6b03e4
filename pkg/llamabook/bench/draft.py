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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from llamabook import fast
from llamabook.bench.report import median_interval
from llamabook.errors import InputError
from llamabook.fast import Statistics
from llamabook.fast.payoff import Payoff, predicted_speedup
from llamabook.fast.speculative import payoff_of

PLAIN, ADAPTIVE = 0, None  # as speculate_k: no draft at all; as many as the run finds good
WARM_ROUNDS = 3
ROUNDS_OF_COSTS, REPEATS_OF_COSTS = 4, 5  # rounds of a decoding that is to show what steps cost, and how often it runs
SIDE_BY_SIDE = 2  # decodings with the draft between two without


@dataclass(frozen=True)
class Run:
    """A decoding of a batch, timed from the end of its first round on.

    k: as speculate_k, or PLAIN; rounds: how many are timed; seconds: what they took; first, done: what speculation had done
    after the first round, and at the end; written: the new tokens of each row.
    """

    k: int | None
    rounds: int
    seconds: float
    first: Statistics
    done: Statistics
    written: list[list[int]]

    def timed(self, name: str) -> float:
        """What the timed rounds added to the field `name` of their statistics."""
        last, first = vars(self.done)[name], vars(self.first)[name]
        return last.total() - first.total() if isinstance(last, Counter) else last - first

    @property
    def tokens_per_s(self) -> float:
        """Of all rows together. Rounds count in full, though a row may be full before its last one ends."""
        return (len(self.written) * self.rounds + self.timed("stayed")) / self.seconds

    @property
    def token_s(self) -> float:
        """Seconds until each row has one more token."""
        return len(self.written) / self.tokens_per_s

    @property
    def draft_s(self) -> float | None:
        """Seconds of a drafted token; None where the number of them changes, or is 0."""
        return self.timed("draft_seconds") / (self.k * self.rounds) if self.k else None

    @property
    def check_s(self) -> float:
        """Seconds of a check."""
        return self.timed("target_seconds") / self.rounds

    @property
    def draft_prefill_s(self) -> float | None:
        """What the first draft took longer than the others: it read the prompts."""
        return max(self.first.draft_seconds - self.k * self.draft_s, 0.0) if self.k else None

    def past_end(self, ends: set[int]) -> float:
        """The share of tokens that stand behind their text's own end."""
        past = [any(token in ends for token in row[:place]) for row in self.written for place in range(len(row))]
        return sum(past) / len(past)


def reach(*ks: int | None) -> int:
    """How far beyond its last token a round can draft. There must be room, or what is there counts as a wrong guess."""
    return max(choice for k in ks for choice in (Payoff().choices if k is ADAPTIVE else [k]))


def check_length(n: int, ks: Sequence[int]) -> None:
    """Raises InputError where n new tokens leave no round to be timed behind the first token, a full round and one more."""
    least = reach(*ks, ADAPTIVE) + 3
    if n < least:
        raise InputError(f"--max_new_tokens is {n}: give {least} or more, so that there are rounds to measure")


@dataclass
class Lab:
    """A model, its draft, and how they are to decode: `options` of `fast.stream`, without draft and seed."""

    model: torch.nn.Module
    draft: torch.nn.Module
    options: dict = field(default_factory=dict)
    learned: dict[int, Payoff] = field(default_factory=dict)  # by batch size, what adaptive runs go by

    def recall(self, batch_size: int, k: int | None) -> None:
        """Let an adaptive run go by what adaptive runs have learned, and others leave no trace in that."""
        payoff_of(self.draft, self.model, batch_size, compiled := bool(self.options.get("compile")))
        payoff = self.learned.setdefault(batch_size, Payoff()) if k is ADAPTIVE else Payoff()
        self.draft.payoffs[self.model][batch_size, compiled] = payoff

    def decode(self, prompts: Sequence[Sequence[int]], n: int, k: int | None, rounds: int | None = None, seed: int = 0) -> Run:
        """Decode until a row has n new tokens, or for so many timed rounds."""
        first, done, seen, start, end = Statistics(), Statistics(), 0, 0.0, 0.0
        written: list[list[int]] = [[] for _ in prompts]
        use = {} if k == PLAIN else {"draft": self.draft, "speculate_k": k, "statistics": done}
        if use:
            self.recall(len(prompts), k)
        for row, token in fast.stream(self.model, prompts, n + reach(k), seed=seed, **use, **self.options):
            passes = done.target_passes if use else len(written[0])
            if passes > seen:  # the first token of a round: all of it is there
                seen, end = passes, time.perf_counter()
                if seen == 1:
                    first, start = copy.deepcopy(done), time.perf_counter()
                if rounds is not None and seen > rounds:
                    break
            written[row].append(token)
            if len(written[row]) == n:
                break
        return Run(k, seen - 1, end - start, first, done, written)


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

    {"plain_step_s", "draft_step_s", "draft_cost", "rows": [{"speculate_k", "check_s", "check_cost", "needs_alpha"}]}, costs in
    plain steps. Every kind of step takes its turn, a few times, of which the quickest counts: what disturbs a step never
    makes it quicker. What is accepted has no part in it.
    """
    plain, draft, checks = [], [], {k: [] for k in ks}
    for _ in range(REPEATS_OF_COSTS):
        plain.append(lab.decode(prompts, min(n, ROUNDS_OF_COSTS + 2), PLAIN, ROUNDS_OF_COSTS).token_s)
        for k, seconds in checks.items():
            run = lab.decode(prompts, min(n, (ROUNDS_OF_COSTS + 2) * (k + 1)), k, ROUNDS_OF_COSTS)
            draft.append(run.draft_s)
            seconds.append(run.check_s)
    step, c = min(plain), min(draft) / min(plain)
    rows = []
    for k, seconds in checks.items():
        v = min(seconds) / step
        rows.append({"speculate_k": k, "check_s": min(seconds), "check_cost": v, "needs_alpha": least_alpha(k, c, v)})
    return {"plain_step_s": step, "draft_step_s": min(draft), "draft_cost": c, "rows": rows}


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
    seed: int = 0, say: Callable[[str], None] = lambda text: None, tell: Callable[[dict], None] = lambda batch: None,
) -> list[dict]:  # fmt: skip
    """For each batch size {"batch_size", "costs", "alpha", "past_end", "rows", "adaptive"}, a row for each k.

    Round r takes the next `batch_size` of the prompts, from the first on when all were used. say: called with what is being
    done; tell: with a batch size and its costs, as soon as they are known, and again with all of it.
    """
    results = []
    for B in batch_sizes:
        batches = [[prompts[(number * B + row) % len(prompts)] for row in range(B)] for number in range(rounds)]
        say(f"batch {B}: warming up")
        for k in (PLAIN, *ks, ADAPTIVE):
            lab.decode(batches[0], n, k, None if k is ADAPTIVE else WARM_ROUNDS, seed)
        say(f"batch {B}: what steps cost")
        batch = {"batch_size": B, "costs": costs(lab, batches[0], ks, n)}
        tell(batch)
        measured: dict[int | None, list] = {k: [] for k in (*ks, ADAPTIVE)}
        for number, rows in enumerate(batches):
            say(f"batch {B}: round {number + 1} of {rounds}")
            order = turns([*ks, ADAPTIVE], number)
            for k, pair in one_round(order, lambda k: lab.decode(rows, n, k, seed=seed + number * B)).items():
                measured[k].append(pair)
        ends = set(getattr(getattr(lab.model, "tokenizer", None), "stop_tokens", ()))
        past_end = statistics.mean(run.past_end(ends) for pairs in measured.values() for run, _ in pairs)
        batch |= {"past_end": past_end, **summary(measured, batch["costs"])}
        tell(batch)
        results.append(batch)
    return results


def summary(measured: dict[int | None, list[tuple[Run, float]]], before: dict) -> dict:
    """{"alpha", "rows", "adaptive"}: what the runs of one batch size say, each with the plain step beside it.

    A prediction takes its costs from the runs, and its acceptance from all of the batch size together: one share for
    every k and every place, as the formula has it.
    """
    ks = [k for k in measured if k is not ADAPTIVE]
    alpha = merged([run for k in ks for run, _ in measured[k]]).acceptance
    rows = []
    for k, cost in zip(ks, before["rows"]):
        pairs = measured[k]
        c, v = (statistics.median(getattr(run, name) / plain for run, plain in pairs) for name in ("draft_s", "check_s"))
        row = {"speculate_k": k, **seen_in(pairs), "draft_cost": c, "check_cost": v, "needs_alpha": cost["needs_alpha"]}
        for name, of in (("draft_step_s", "draft_s"), ("check_s", "check_s"), ("draft_prefill_s", "draft_prefill_s")):
            row[name] = statistics.median(getattr(run, of) for run, _ in pairs)
        row["predicted"] = predicted_speedup(alpha, k, c, v)
        rows.append(row | {"error": row["predicted"] / row["speedup"] - 1})
    chosen = sorted(merged([run for run, _ in measured[ADAPTIVE]]).drafts.items())
    return {"alpha": alpha, "rows": rows, "adaptive": seen_in(measured[ADAPTIVE]) | {"chosen": chosen}}


def merged(runs: list[Run]) -> Statistics:
    """The counts of several runs together."""
    whole = Statistics()
    for run in runs:
        for name in ("drafts", "histogram", "reached", "stayed"):
            getattr(whole, name).update(getattr(run.done, name))
    return whole


def seen_in(pairs: list[tuple[Run, float]]) -> dict:
    """What is said of a fixed k and of the adaptive row alike: speed, paired speed-up, acceptance place by place."""
    runs, done = [run for run, _ in pairs], merged([run for run, _ in pairs])
    ratios, speeds = [plain / run.token_s for run, plain in pairs], [run.tokens_per_s for run in runs]
    low, high = median_interval(ratios)
    return {
        "plain_step_s": statistics.median(plain for _, plain in pairs),
        "tokens_per_s": statistics.median(speeds), "tokens_per_s_min": min(speeds), "tokens_per_s_max": max(speeds),
        "speedup": statistics.median(ratios), "speedup_low": low, "speedup_high": high,
        "alpha": done.acceptance, "mean_accepted": done.mean_accepted,
        "reached": [done.reached[place] for place in sorted(done.reached)],  # by place in the draft, from 1
        "stayed": [done.stayed[place] for place in sorted(done.reached)],
        "accepted": sorted(done.histogram.items()),  # tokens of a round -> how often
        "rounds": [
            {"token_s": run.token_s, "plain_step_s": plain, "draft_step_s": run.draft_s, "check_s": run.check_s,
             "draft_prefill_s": run.draft_prefill_s, "rounds": run.rounds, "seconds": run.seconds}
            for run, plain in pairs
        ],
    }  # fmt: skip
