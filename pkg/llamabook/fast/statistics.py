"""What speculation did, counted. Written by hand.

    statistics = fast.Statistics()
    fast.generate(model, prompts, 100, draft=draft, statistics=statistics)
    print(statistics)
"""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Statistics:
    """What speculation did, in one call or several; the reading of prompts is left out.

    drafts: drafted tokens a row -> rounds, 0 for plain steps. Of all rows, each counted for itself: histogram, accepted
    tokens of a round -> how often; reached and stayed, place in the draft, from 1 -> how often it was tried, and kept.
    target_bytes, draft_bytes: of the weights that one pass reads; seconds: of all passes.
    """

    target_bytes: int = 0
    draft_bytes: int = 0
    target_seconds: float = 0.0
    draft_seconds: float = 0.0
    drafts: Counter = field(default_factory=Counter)
    histogram: Counter = field(default_factory=Counter)
    reached: Counter = field(default_factory=Counter)
    stayed: Counter = field(default_factory=Counter)

    @property
    def target_passes(self) -> int:
        return sum(self.drafts.values())

    @property
    def draft_passes(self) -> int:
        """Of a draft model; looking up takes none."""
        return sum(k * rounds for k, rounds in self.drafts.items()) if self.draft_bytes else 0

    @property
    def bytes(self) -> int:
        """Of weights, read by target and draft."""
        return self.target_passes * self.target_bytes + self.draft_passes * self.draft_bytes

    @property
    def acceptance(self) -> float:
        """The share of tried tokens that were kept."""
        return sum(self.stayed.values()) / max(sum(self.reached.values()), 1)

    @property
    def mean_accepted(self) -> float:
        """Kept tokens of a row in a round with a draft."""
        return sum(self.stayed.values()) / max(sum(self.histogram.values()), 1)

    def __str__(self) -> str:
        plain = self.drafts[0]
        if plain == self.target_passes:
            return f"{plain} plain steps" + ", since no draft would have paid" * (plain > 3)
        text = f"{self.acceptance:.0%} of the tried tokens accepted, {self.mean_accepted:.1f} a round; "
        text += f"{self.target_passes} passes of the model"
        return text + f", {plain} of them plain, where no draft pays or reads so far" * (plain > 0.5 * self.target_passes)

    def note(self, drafted: int, rows: list[tuple[int, int]], draft_seconds: float, target_seconds: float) -> tuple[int, int]:
        """A round: (drafted, accepted) of each row. Returns how many tokens were tried and kept."""
        self.drafts[drafted] += 1
        self.draft_seconds += draft_seconds
        self.target_seconds += target_seconds
        tried = kept = 0
        for count, accepted in rows:
            reached = min(accepted + 1, count)
            self.histogram.update([accepted] * (count > 0))
            self.reached.update(range(1, reached + 1))
            self.stayed.update(range(1, accepted + 1))
            tried, kept = tried + reached, kept + accepted
        return tried, kept
