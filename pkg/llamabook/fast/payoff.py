"""When speculation pays: what a draft is worth, from how often it is right and what it costs."""

from collections import defaultdict, deque


def expected_tokens(alpha: float, k: int) -> float:
    """Tokens of a pass that checks k drafted ones, each right with probability alpha: (1 - alpha^(k+1)) / (1 - alpha).

    One more than are accepted, since the target adds one of its own (Leviathan et al., 2023, section 3.1).
    """
    return sum(alpha**accepted for accepted in range(k + 1))  # which also holds for alpha = 1


def predicted_speedup(alpha: float, k: int, c: float, v: float) -> float:
    """Tokens per second against plain decoding; c, v: a draft step and a check of k + 1 tokens, in plain steps."""
    return expected_tokens(alpha, k) / (k * c + v)


class Payoff:
    """Chooses how many tokens to draft, from what the run itself shows: acceptance and seconds.

    Args: choices, the numbers to choose from. A choice of 0 is a plain step. All times are measured on rounds that
    yield tokens, so trying costs little: what was never measured is estimated from its neighbours.
    """

    SAMPLES = 5  # seconds of each kind that are kept
    ENOUGH = 12  # tokens tried before it may give up
    REFRESH = 64  # rounds, after which plain decoding is measured again
    TRIAL, REST = 4, (32, 512)  # rounds with a draft, and plain ones between: twice as many each time, up to these

    def __init__(self, choices=range(1, 8)):
        self.choices = list(choices)
        self.tried, self.kept = 4.0, 3.0  # as if four had been tried: soon outweighed
        self.times = defaultdict(lambda: deque(maxlen=self.SAMPLES))  # tokens checked -> seconds
        self.draft_times = deque(maxlen=self.SAMPLES)  # seconds a drafted token
        self.since_plain = self.rest = self.trial = 0
        self.patience = self.REST[0]

    @property
    def alpha(self) -> float:
        """The share of tried tokens that were accepted; those of long ago count less."""
        return self.kept / self.tried

    def note(self, k: int, tried: int, kept: int, draft_seconds: float, check_seconds: float) -> None:
        """Remember a round that drafted k tokens a row; tried, kept: of all rows, to the first rejection of each."""
        self.times[k + 1].append(check_seconds)
        self.since_plain = self.since_plain + 1 if k else 0
        if k:
            self.draft_times.append(draft_seconds / k)
        if tried:
            fade = 0.99**tried
            self.tried, self.kept = fade * self.tried + tried, fade * self.kept + kept

    def check(self, tokens: int) -> float:
        """Seconds to check `tokens` a row: measured, or between what fewer and more took, or, of more than ever, the same
        as the most did: so that it will be tried.
        """
        fewer = max((n for n in self.times if n <= tokens), default=min(self.times))
        more = min((n for n in self.times if n >= tokens), default=fewer)
        least, most = middle(self.times[fewer]), middle(self.times[more])
        return least + (most - least) * (tokens - fewer) / max(more - fewer, 1)

    def speedup(self, k: int) -> float:
        """What k drafted tokens a round promise, as a multiple of plain decoding's tokens per second."""
        plain, draft = self.check(1), middle(self.draft_times) if self.draft_times else 0.0
        return predicted_speedup(self.alpha, k, draft / plain, self.check(k + 1) / plain)

    def choose(self) -> int:
        """How many tokens the next round should draft."""
        if len(self.times[1]) < 2 or self.since_plain >= self.REFRESH:
            return 0
        if self.rest:
            self.rest, self.trial = self.rest - 1, self.TRIAL
            return 0
        if len(self.times) == 1:
            return self.choices[len(self.choices) // 3]  # a middling one, to begin with
        best, self.trial = max(self.choices, key=self.speedup), self.trial - 1
        if self.speedup(best) > 1:
            self.patience = self.REST[0]
        elif self.trial < 0 and self.tried >= self.ENOUGH:
            self.rest, self.patience = self.patience, min(2 * self.patience, self.REST[1])
            return 0
        return best


def middle(times) -> float:
    """The median, of two the smaller: a disturbed step takes longer, never less."""
    return sorted(times)[(len(times) - 1) // 2]
