"""From the notebook ch05_quantization_speculative/09_speculative_decoding.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

from collections import defaultdict, deque


def expected_tokens(alpha: float, k: int) -> float:
    """Tokens of a pass that checks k drafted ones, each right with probability alpha.

    (1 - alpha^(k+1)) / (1 - alpha), one more than are accepted, since the target adds one of its own
    (Leviathan et al., 2023, section 3.1).
    """
    return sum(alpha**accepted for accepted in range(k + 1))  # which also holds for alpha = 1


def predicted_speedup(alpha: float, k: int, c: float, v: float) -> float:
    """Tokens per second, in plain decoding's; c, v: what a drafted token and a check cost, in plain steps."""
    return expected_tokens(alpha, k) / (k * c + v)


class Acceptance:
    """The share of tried tokens that were accepted; those of long ago count less. At the start it is 3/4."""

    FADE = 0.99  # what a token's weight loses with each later one

    def __init__(self):
        self.tried, self.kept = 4.0, 3.0  # as if four had been tried: soon outweighed

    def note(self, tried: int, kept: int) -> None:
        fade = self.FADE**tried
        self.tried, self.kept = fade * self.tried + tried, fade * self.kept + kept

    @property
    def alpha(self) -> float:
        return self.kept / self.tried


class Payoff:
    """Chooses how many tokens to draft, from what the run itself shows: acceptance and seconds.

    Args: choices, the numbers to choose from; 0, a plain step, always is one.
    """

    SAMPLES = 5  # seconds of each kind that are kept
    REFRESH = 8, 64  # rounds, after which plain decoding is measured again: where little is gained, or much
    LITTLE, MUCH = 1.03, 1.2  # times plain decoding: up to here it is not worth it, from here beyond doubt

    def __init__(self, choices=range(1, 8)):
        self.choices, self.acceptance, self.pause, self.since_plain = list(choices), Acceptance(), Pause(), 0
        self.times = defaultdict(lambda: deque(maxlen=self.SAMPLES))  # tokens checked -> seconds
        self.draft_times = deque(maxlen=self.SAMPLES)  # seconds a drafted token

    def note(self, k: int, tried: int, kept: int, draft_seconds: float, check_seconds: float) -> None:
        """Remember a round that drafted k tokens a row; tried, kept: of all rows."""
        self.acceptance.note(tried, kept)
        self.times[k + 1].append(check_seconds)
        self.since_plain = self.since_plain + 1 if k else 0
        if k:
            self.draft_times.append(draft_seconds / k)

    def speedup(self, k: int) -> float:
        """What k drafted tokens a round promise, in plain decoding's tokens per second."""
        plain, draft = seconds_of(self.times, 1), middle(self.draft_times) if self.draft_times else 0.0
        check = seconds_of(self.times, k + 1)
        return predicted_speedup(self.acceptance.alpha, k, draft / plain, check / plain)

    def choose(self) -> int:
        """How many tokens the next round should draft."""
        if len(self.times[1]) < 2 or self.pause.goes_on():
            return 0
        if len(self.times) == 1:
            return self.choices[len(self.choices) // 3]  # a middling one, to begin with
        best = max(self.choices, key=self.speedup)
        gain = self.speedup(best)
        old = self.since_plain >= self.REFRESH[gain > self.MUCH]
        return 0 if old or self.pause.begins(gain <= self.LITTLE, self.acceptance.tried) else best


class Pause:
    """Plain steps where no draft pays, twice as many each time, with a few rounds between that try again."""

    ENOUGH = 12  # tokens tried before the first
    TRIAL, LENGTHS = 4, (32, 512)

    def __init__(self):
        self.left, self.length, self.trial = 0, self.LENGTHS[0], 0

    def goes_on(self) -> bool:
        """Whether the next step is one of its own."""
        if self.left:
            self.left, self.trial = self.left - 1, self.TRIAL
            return True
        self.trial -= 1
        return False

    def begins(self, useless: bool, tried: float) -> bool:
        """Whether it begins now, a draft being `useless` by what `tried` tokens have shown."""
        if not useless:
            self.length = self.LENGTHS[0]
        elif self.trial < 0 and tried >= self.ENOUGH:
            self.left, self.length = self.length - 1, min(2 * self.length, self.LENGTHS[1])
            return True
        return False


def middle(seconds) -> float:
    """The median, of two the smaller: a disturbed step takes longer, never less."""
    return sorted(seconds)[(len(seconds) - 1) // 2]


def seconds_of(times: dict, tokens: int) -> float:
    """Seconds to check `tokens` a row: measured, or between what fewer and more took.

    For fewer than any check had it says a plain step, for more what the largest took: so that they are tried.
    """
    known = [n for n in times if times[n]]
    fewer = max((n for n in known if n <= tokens), default=min(known))
    more = min((n for n in known if n >= tokens), default=fewer)
    least, most = middle(times[fewer]), middle(times[more])
    if fewer == 1:
        return least
    return least + (most - least) * (tokens - fewer) / max(more - fewer, 1)
