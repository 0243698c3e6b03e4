"""Checks of chapter 2's exercises on the model: grouped queries, a larger base, scaled frequencies, shared memory.

Written by hand. No check calls the package's model: each has an oracle of its own.
"""

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llamabook.checks.core import (
    Student, Wrong, close, exercise, numbers, off_by, present, require, several, tensor, whole,
)  # fmt: skip

# --- 1. Grouped queries ---


@exercise(
    "positions_that_fit", chapter=2, title="How long may the text be?", minutes=10, difficulty="warm-up", points=5
)
def check_positions_that_fit(your: Student) -> None:
    small = {"n_layers": 4, "n_heads": 8, "n_kv_groups": 2, "emb_dim": 64, "context_length": 10_000}

    def fit(free: int = 102_400, batch: int = 1, bytes_per_number: int = 2, **changes: int) -> int:
        return whole(your(small | changes, free, batch, bytes_per_number))

    usual = fit()
    require(usual > 0, "102 400 free bytes are enough for some positions of a small model; you say 0.")
    require(fit(204_800) == 2 * usual, "twice the free memory must hold twice the positions.")
    require(
        fit(batch=2) * 2 == usual,
        f"two texts at once: {fit(batch=2)} positions, one text: {usual}. Each text has keys and values of its own.",
    )
    require(fit(bytes_per_number=4) * 2 == usual, "in float32 (4 bytes) half as many positions must fit.")
    require(fit(n_layers=8) * 2 == usual, "twice the layers: half the positions, each layer has its own cache.")
    groups = fit(n_kv_groups=1), fit(n_kv_groups=8)
    hint = "The number of query heads plays no part: queries are not kept." if groups[0] == usual else ""
    require(
        groups == (2 * usual, usual // 4),
        f"for G = 1, 2 and 8 your numbers are {groups[0]}, {usual} and {groups[1]}: half the groups, twice the "
        f"positions. {hint}",
    )
    require(fit(n_heads=16, head_dim=8) == usual, "more query heads need no more cache: only keys and values stay.")
    require(fit(head_dim=16) * 2 == usual, "a config with head_dim means it, whatever emb_dim / n_heads would be.")
    hint = "There are keys *and* values." if usual == 800 else ""
    require(
        usual == 400,
        f"4 layers, 2 groups, d = 8, 2 bytes a number: 102 400 bytes hold 400 positions, not {usual}. {hint}",
    )
    nearly = fit(102_400 - 1)
    require(nearly == 399, f"one byte less than 400 positions need: only 399 fit whole; you say {nearly}.")
    require(fit(100) == 0, "100 bytes don't hold a single position: 0 fit.")
    endless = fit(10**12)
    require(
        endless == 10_000,
        f"memory without end, a context length of 10 000: no more positions than that, not {endless}.",
    )
    real = {"n_layers": 32, "n_heads": 32, "n_kv_groups": 8, "emb_dim": 4096, "context_length": 131_072}
    for free in (3 * 10**9, 8 * 2**30):
        got = fit(free, 2, 2, **real)
        sizes = [torch.empty(32, 2, 2, 8, n, 128, device="meta", dtype=torch.bfloat16).nbytes for n in (got, got + 1)]
        require(sizes[0] <= free, f"Llama 3.1 8B, two texts: the cache for {got} positions is larger than {free}.")
        require(sizes[1] > free, f"Llama 3.1 8B, two texts: a position more than {got} would fit into {free} bytes.")


@exercise("repeat_kv", chapter=2, title="Whose keys does a head read?", minutes=8, difficulty="warm-up", points=5)
def check_repeat_kv(your: Student) -> None:
    G, d = 3, 4
    groups = torch.arange(3.0)[None, :, None, None].expand(1, G, 2, d).clone()  # group g is full of g
    shapes = {
        (1, G, 2, 2, d): "Join groups and their repetitions into one dimension of heads.",
        (1, G, 4, d): "Dimension 2 holds positions: repeat along dimension 1, the heads.",
        (1, G, 2, 2 * d): "The last dimension holds a head's numbers: repeat along dimension 1.",
        (2, G, 2, d): "Dimension 0 is the batch: repeat along dimension 1.",
        (1, G, 2, d): "Nothing has been repeated.",
        (1, 18, 2, d): "n_heads is the number of heads that come out, not the number of repetitions.",
    }
    got = tensor(your(groups, 6), (1, 6, 2, d), torch.float32, shapes=shapes)
    reads = [int(head.flatten()[0]) for head in got[0]]
    hint = ""
    if reads == [0, 1, 2, 0, 1, 2]:
        hint = "You repeat the whole row of groups; each group serves its heads in a row."
    require(
        reads == [0, 0, 1, 1, 2, 2],
        f"3 groups, 6 heads: yours read the groups {reads}, want [0, 0, 1, 1, 2, 2]. {hint}",
    )
    for heads, kept in ((4, 4), (4, 1), (8, 2), (12, 4)):
        x = numbers(2, kept, 5, d, seed=heads)
        got = tensor(your(x, heads), (2, heads, 5, d), torch.float32)
        for head in range(heads):
            require(
                torch.equal(got[:, head], x[:, head * kept // heads]),
                f"{heads} heads, {kept} group{'s' * (kept > 1)}: head {head} doesn't hold the keys of group "
                f"{head * kept // heads}.",
            )
    half = numbers(1, 2, 3, d).bfloat16()
    tensor(your(half, 4), (1, 4, 3, d), torch.bfloat16, kind="Give back x's dtype.")


class _Largest(TorchDispatchMode):
    """Notes the largest memory, in bytes, that any operation inside hands out."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.nbytes = max(self.nbytes, value.untyped_storage().nbytes())
        return result


def _head_by_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Another road: float64, one head, one query at a time."""
    B, H, T, d = q.shape
    G, S = k.shape[1:3]
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(B, H, T, d, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            keys, values = k[b, h * G // H], v[b, h * G // H]
            for t in range(T):
                seen = S - T + t + 1
                weights = torch.softmax(keys[:seen] @ q[b, h, t] / math.sqrt(d), dim=0)
                out[b, h, t] = weights @ values[:seen]
    return out


@exercise(
    "grouped_attention",
    chapter=2,
    title="Share the keys, don't copy them",
    minutes=25,
    difficulty="stretch",
    points=20,
)
def check_grouped_attention(your: Student) -> None:
    B, H, G, T, S, d = 2, 6, 3, 4, 7, 8
    q, k, v = 2 * numbers(B, H, T, d), 2 * numbers(B, G, S, d, seed=1), numbers(B, G, S, d, seed=2)
    shapes = {(B, G, H // G, T, d): "Bring groups and their heads into one dimension of H heads."}
    got = tensor(your(q, k, v), q.shape, torch.float32, shapes=shapes)
    same = v[:, :1, :1].expand_as(v).clone()
    equal = tensor(your(q, k, same), q.shape)
    require(
        close(equal, same[:, :1, :1].expand(B, H, T, d)),
        "if all values are equal, so must all results be: do the weights add up to 1 over the *keys*?",
    )
    marked = torch.arange(3.0)[None, :, None, None].expand(B, G, S, d).clone()
    reads = [round(value, 1) for value in tensor(your(q, k, marked), q.shape)[0, :, 0, 0].tolist()]
    hint = "A group serves its heads in a row: heads 0 and 1 read group 0." if reads == [0, 1, 2, 0, 1, 2] else ""
    require(
        reads == [0, 0, 1, 1, 2, 2],
        f"6 heads, 3 groups whose values are all 0, all 1 and all 2: yours read {reads}, want "
        f"[0, 0, 1, 1, 2, 2]. {hint}",
    )
    later = k.clone()
    later[:, :, -1] += 3
    changed = (tensor(your(q, later, v), q.shape) - got).abs().amax(dim=(0, 1, 3)) > 1e-6
    require(
        not changed[:-1].any(),
        "changing the last key changes more than the last query: queries see the future.",
    )
    require(
        changed[-1],
        "changing the last key changes nothing: the queries stand at the *last* T of the S positions, so "
        "the last one sees all keys.",
    )
    oldest = k.clone()
    oldest[:, :, 0] += 3
    seen = (tensor(your(q, oldest, v), q.shape) - got).abs().amax(dim=(0, 1, 3)) > 1e-6
    require(seen.all(), "some query doesn't see the oldest key: all of them come after it.")
    want = _head_by_head(q, k, v)
    hint = ""
    for factor, words in ((d**0.5, "Are the scores divided by √d?"), (d**-0.5, "It is the root of d, once.")):
        if close(got, _head_by_head(q * factor, k, v), 1e-3):
            hint = words
    require(close(got, want), f"the right keys, the wrong weights ({off_by(got, want)}). {hint}")
    for heads, kept, queries in ((4, 4, 3), (4, 1, 2), (8, 2, 1), (8, 2, 5)):
        q, k, v = numbers(1, heads, queries, d), numbers(1, kept, 5, d, seed=1), numbers(1, kept, 5, d, seed=2)
        mine, want = tensor(your(q, k, v), q.shape), _head_by_head(q, k, v)
        require(
            close(mine, want),
            f"wrong for {heads} heads, {kept} group{'s' * (kept > 1)}, T = {queries}, S = 5 ({off_by(mine, want)}).",
        )
    q, k, v = numbers(1, 16, 1, 16), numbers(1, 2, 64, 16, seed=1), numbers(1, 2, 64, 16, seed=2)
    with _Largest() as largest:
        your(q, k, v)
    times = largest.nbytes / k.nbytes
    require(
        times < 1.5,
        f"right, but somewhere you make a tensor {times:.3g} times as large as the cached keys: they are copied for "
        "every head. Mind that `@` copies what it must broadcast. Bring the queries to the keys.",
    )


# --- 2. Positions ---


@exercise(
    "unfinished_pairs",
    chapter=2,
    title="Which pairs never come round?",
    minutes=8,
    difficulty="warm-up",
    points=5,
)
def check_unfinished_pairs(your: Student) -> None:
    def count(head_dim: int, base: float, positions: int) -> int:
        return whole(your(head_dim, base, positions))

    six, seven = count(16, 1e4, 6), count(16, 1e4, 7)
    require(0 <= six <= 8, f"head_dim = 16 makes 8 pairs; you count {six}. Each pair has two of the dimensions.")
    require(
        six != 0,
        "after 6 positions no pair has come round, the fastest stands at 6 radians; you count 0 unfinished. Do you "
        "count those that have finished?",
    )
    hint = "A turn has 2π radians."
    if count(16, 1e4, 1) < 7:
        hint = "Later pairs turn more slowly than the first, not faster."
    require(
        six == 8,
        f"after 6 positions the fastest pair stands at 6 radians, less than a full turn: all 8 are unfinished, not "
        f"{six}. {hint}",
    )
    require(seven == 7, f"after 7 positions the fastest of 8 pairs has come round, and only that; you count {seven}.")
    require(count(16, 1e4, 10**9) == 0, "after a billion positions every pair with base 10 000 has come round.")
    for base in (1e4, 5e5):
        longer = [count(64, base, n) for n in (10, 100, 1000, 10_000)]
        require(longer == sorted(longer, reverse=True), "a longer text leaves fewer pairs unfinished, never more.")
    for head_dim, base, positions in ((128, 1e4, 4096), (128, 5e5, 8192), (64, 5e5, 8192), (64, 1e4, 2048)):
        # another road: pair i takes 2 pi base^(2 i / d) positions for a turn, solved for i
        done = math.floor(head_dim / 2 * math.log(positions / (2 * math.pi), base)) + 1
        got, want = count(head_dim, base, positions), head_dim // 2 - done
        hint = "Is it 2i/d in the exponent?" if abs(got - want) >= 10 else ""
        if base != 1e4 and got == count(head_dim, 1e4, positions):
            hint = "Is the base an argument?"
        require(
            got == want,
            f"d = {head_dim}, base {base:,.0f}, {positions} positions: {want} pairs are unfinished, you count {got}. "
            f"{hint}",
        )


def _one_scaled(theta: float, factor: float, low: float, high: float, original: int) -> float:
    """Another road: by wavelengths, as Meta's code has it."""
    wave = 2 * math.pi / theta
    if wave < original / high:
        return theta
    if wave > original / low:
        return theta / factor
    smooth = (original / wave - low) / (high - low)
    return (1 - smooth) * theta / factor + smooth * theta


def _turning(turns: float, original: int) -> float:
    """The frequency of a pair that makes so many turns in the original context."""
    return turns * 2 * math.pi / original


@exercise("scaled_frequency", chapter=2, title="Three bands, one pair", minutes=12, difficulty="core", points=10)
def check_scaled_frequency(your: Student) -> None:
    def scale(turns: float, factor: float = 8.0, low: float = 1.0, high: float = 4.0, original: int = 8192) -> float:
        """What becomes of a pair with so many turns, as a share of its frequency."""
        theta = _turning(turns, original)
        got = your(theta, factor, low, high, original)
        present(got)
        require(isinstance(got, float), f"the result is a {type(got).__name__}; want one float, the new frequency.")
        require(math.isfinite(got), "the result is NaN or infinite.")
        return got / theta

    def near(one: float, two: float) -> bool:
        return math.isclose(one, two, rel_tol=1e-6)

    fast, slow = scale(100), scale(0.1)
    require(
        not (near(fast, 1 / 8) and near(slow, 1)),
        "the bands are the wrong way round: a pair that turns often keeps its frequency, a slow one is slowed.",
    )
    hint = "Is a turn 2π radians?" if not near(scale(1000), 1) or near(scale(1e5), 1) else ""
    require(
        near(fast, 1),
        f"a pair that makes 100 turns in the original context is fast and keeps its frequency; yours becomes "
        f"{fast:.4g} times it. {hint}",
    )
    require(
        near(slow, 1 / 8),
        f"a pair that makes a tenth of a turn is slow and is divided by the factor 8; yours becomes {slow:.4g} "
        "times what it was.",
    )
    edges = [(r, scale(r)) for r in (0.5, 0.99, 1.01, 3.99, 4.01, 6)]
    for r, got in edges:
        want = 1 if r > 3.9 else 1 / 8
        require(
            abs(got - want) < 0.06,
            f"a pair that makes {r} turns becomes {got:.4g} times what it was, want about {want}. The bands end at "
            "low = 1 and high = 4 turns, and the blend meets both. Is a turn 2π radians?",
        )
    middle = scale(2.5)
    hint = ""
    if near(middle, 1) or near(middle, 1 / 8):
        hint = "Between the bands there is a blend, no edge."
    elif near(1 / middle, (8 + 1) / 2):
        hint = "You blend the wavelengths; blend the frequencies."
    elif near(middle, 1 - (1 - 1 / 8) * (1 / 2.5 - 1 / 4) / (1 - 1 / 4)):
        hint = "Linear in the number of turns, not in the wavelength."
    elif near(middle, 8**-0.5):
        hint = "The two are averaged, not multiplied."
    require(
        near(middle, 9 / 16),
        f"halfway between the bands (2.5 turns) the result is the mean of kept and slowed, 0.5625 times the "
        f"frequency; yours is {middle:.4g}. {hint}",
    )
    quarter = scale(1.75)
    hint = "Are the two parts swapped?" if near(quarter, 0.75 + 0.25 / 8) else ""
    require(
        near(quarter, 0.25 + 0.75 / 8),
        f"at 1.75 turns a quarter is kept and three quarters are slowed: 0.3438 times; yours is {quarter:.4g}. {hint}",
    )
    require(near(scale(0.1, factor=32.0), 1 / 32), "with factor 32 a slow pair is divided by 32: use the argument.")
    require(
        near(scale(5, low=2.0, high=8.0), 9 / 16),
        "with low = 2 and high = 8, halfway is at 5 turns: use the arguments, in the blend, too.",
    )
    require(
        near(scale(2.5, original=2048), 9 / 16),
        "with another original context the number of *turns* in it decides: use the argument.",
    )
    for i in range(64):
        theta = 500_000.0 ** (-i / 64)
        got, want = your(theta, 8.0, 1.0, 4.0, 8192), _one_scaled(theta, 8.0, 1.0, 4.0, 8192)
        require(
            isinstance(got, float) and near(got, want), f"pair {i} of Llama 3.1 must turn by {want:.4g}, not {got}."
        )


class _Count(TorchDispatchMode):
    """Counts the operations inside."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return operation(*args, **(kwargs or {}))


@exercise("scaled_frequencies", chapter=2, title="Three bands, all pairs", minutes=12, difficulty="core", points=10)
def check_scaled_frequencies(your: Student) -> None:
    llama31 = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_context_length": 8192,
    }
    odd = {"factor": 3.0, "low_freq_factor": 2.0, "high_freq_factor": 5.0, "original_context_length": 500}

    def table(d: int, base: float = 500_000.0) -> torch.Tensor:
        return torch.tensor([base ** (-2 * i / d) for i in range(d // 2)])

    def scale(frequencies: torch.Tensor, rope: dict) -> torch.Tensor:
        kind = "RoPE's tables are float32."
        return tensor(your(frequencies, rope), frequencies.shape, torch.float32, kind=kind)

    theta = table(128)
    got = scale(theta, llama31)
    share = got / theta
    require((got > 0).all(), "a frequency has become zero or negative. Is the blend used outside of its band?")
    require(
        not (share > 1.0001).any(),
        "some pairs turn faster than before; scaling only ever slows them. Does the kept share stay below 1?",
    )
    require(
        not (share < 0.1249).any(),
        "some pairs are slowed by more than the factor. Does the kept share stay above 0?",
    )
    require((got[1:] < got[:-1]).all(), "pair i + 1 must stay slower than pair i; yours change places somewhere.")
    kept = int((share > 0.9999).sum())
    require(kept == 29, f"29 of Llama 3.1's 64 pairs turn 4 times or more and are kept; you keep {kept}.")
    slowed = int((share < 0.12501).sum())
    require(
        slowed == 29,
        f"29 of Llama 3.1's 64 pairs don't come round once and are divided by 8; you divide {slowed}.",
    )
    for rope, words in (
        (llama31 | {"factor": 32.0}, "factor"),
        (llama31 | {"low_freq_factor": 2.0}, "low_freq_factor"),
        (llama31 | {"high_freq_factor": 8.0}, "high_freq_factor"),
        (llama31 | {"original_context_length": 2048}, "original_context_length"),
    ):
        require(
            not torch.equal(scale(theta, rope), got), f"another {words} changes nothing: read it from `rope_freq`."
        )
    for rope in (llama31, llama31 | {"factor": 32.0}, odd):
        for frequencies in (table(128), table(64), table(64, 1e4), table(2)):
            mine = scale(frequencies, rope)
            want = torch.tensor([_one_scaled(value, *rope.values()) for value in frequencies.tolist()])
            wrong = (mine - want).abs() > 1e-5 * want
            if wrong.any():
                i = int(wrong.nonzero()[0])
                turns = float(frequencies[i]) * rope["original_context_length"] / (2 * math.pi)
                raise Wrong(
                    f"pair {i} of {len(wrong)}, which makes {turns:.3g} turns, must get the frequency "
                    f"{float(want[i]):.4g}; yours is {float(mine[i]):.4g} (with {rope})."
                )
    calls = []
    for d in (16, 128):
        with _Count() as counted:
            your(table(d), llama31)
        calls.append(counted.calls)
    require(
        calls[1] <= calls[0] + 8,
        f"{calls[0]} operations for 8 pairs, {calls[1]} for 64: no loop over the pairs, please. Work on the whole "
        "tensor at once.",
    )


# --- 3. Shared memory ---


@exercise("held_bytes", chapter=2, title="Two names, one matrix", minutes=15, difficulty="core", points=10)
def check_held_bytes(your: Student) -> None:
    nn = torch.nn

    def measure(model: nn.Module) -> tuple[int, int]:
        got = several(your(model), 2, "return two numbers: bytes by name, and bytes that are held.")
        return whole(got[0], "the first"), whole(got[1], "the second")

    def pair(tied: bool) -> nn.Module:
        model = nn.ModuleDict({"tok_emb": nn.Embedding(10, 4), "out_head": nn.Linear(4, 10, bias=False)})
        if tied:
            model["out_head"].weight = model["tok_emb"].weight
        return model

    def holding(**tensors: torch.Tensor) -> nn.Module:
        model = nn.Module()
        for name, value in tensors.items():
            setattr(model, name, nn.Parameter(value, requires_grad=False))
        return model

    free = measure(pair(tied=False))
    hints = {80: " That is the number of numbers; float32 has 4 bytes for each."}
    require(
        free[0] == 320 and free[1] == 320,
        f"an embedding (10, 4) and a head (10, 4) in float32, not tied: 320 bytes both ways; you say {free}."
        f"{hints.get(free[0], '')}",
    )
    named, held = measure(pair(tied=True))
    require(
        named == 320,
        f"tied: two names of 160 bytes each in state_dict(), 320 together; you say {named}. `parameters()` hands out "
        "what is shared only once.",
    )
    require(held == 160, f"tied: both names mean the same 160 bytes; you say that {held} are held.")
    twins = measure(holding(one=torch.ones(5, 4), two=torch.ones(5, 4)))
    require(
        twins == (160, 160),
        f"two matrices with equal numbers in memory of their own hold 160 bytes; you say {twins}. Equal is not shared.",
    )
    matrix = torch.ones(6, 4)
    view = measure(holding(one=matrix, two=matrix.view(4, 6)))
    require(
        view == (192, 96),
        f"a matrix and a view of it, two objects with one memory: (192, 96); you say {view}. Ask for the memory, not "
        "for the object.",
    )
    fused = torch.ones(12, 4)
    sliced = measure(holding(query=fused[:8], key=fused[8:10], value=fused[10:]))
    require(
        sliced == (192, 192),
        f"three slices that make up one fused matrix of 192 bytes: (192, 192); you say {sliced}. The slices begin at "
        "different addresses, in one storage.",
    )
    large = torch.ones(100, 4)
    part = measure(holding(row=large[3:5]))
    require(
        part == (32, 1600),
        f"two rows of a matrix of 1600 bytes: 32 bytes by name, but the whole matrix stays in memory; you say {part}.",
    )
    mixed = holding(narrow=torch.ones(8, dtype=torch.bfloat16), wide=torch.ones(8))
    mixed.register_buffer("table", torch.ones(3, dtype=torch.int64))
    require(
        measure(mixed) == (72, 72),
        f"8 bfloat16, 8 float32 and a buffer of 3 int64: 72 bytes; you say {measure(mixed)}. Every tensor has its own "
        "dtype, and buffers are in state_dict(), too.",
    )
