"""Checks of chapter 1's exercises on the model itself: norm, feed-forward, positions, attention, sizes.

Written by hand. No check calls the package's model: each has an oracle of its own.
"""

import math

import torch
import torch.nn.functional as F

from llamabook.checks.core import Student, close, exercise, numbers, off_by, require, several, tensor, whole

# --- 1. Norm and feed-forward ---


@exercise("rms_norm", chapter=1, title="RMSNorm from its formula", minutes=8, difficulty="warm-up", points=5)
def check_rms_norm(your: Student) -> None:
    x, ones = numbers(2, 3, 8), torch.ones(8)
    got = tensor(your(x, ones, 1e-6), x.shape, torch.float32)
    fives = tensor(your(torch.full((1, 8), 5.0), ones, 1e-6), (1, 8))
    require(
        not close(fives, torch.zeros(1, 8)),
        "a vector of fives became zeros: RMSNorm does not subtract the mean.",
    )
    other = torch.cat([x[:1], 10 * x[1:]])
    alone = close(tensor(your(other, ones, 1e-6), x.shape)[0], got[0])
    require(
        alone, "x[0] changes its result when x[1] does: take the mean over the last dimension only (dim=-1)."
    )
    square = float(got.double().pow(2).mean(dim=-1).mean())
    hint = (
        "Is it the mean of the squares, or their sum?" if abs(square * 8 - 1) < 0.05 else "Is the root there?"
    )
    require(
        abs(square - 1) < 1e-3,
        f"with weights of 1 the mean square of a row must be 1; yours is {square:.3g}. {hint}",
    )
    weight = torch.linspace(-1, 2, 8)
    scaled = tensor(your(x, weight, 1e-6), x.shape)
    require(not close(scaled, got), "another weight gives the same result: multiply by `weight` at the end.")
    require(
        close(scaled, got * weight), "the result must be proportional to `weight`, dimension by dimension."
    )
    zeros = your(torch.zeros(1, 8), ones, 1e-5)
    tensor(zeros, (1, 8), finite="A vector of zeros must stay one: that is what eps is for.")
    small = x / 100
    want = F.rms_norm(small.double(), (8,), eps=1e-3)
    given = tensor(your(small, ones, 1e-3), x.shape)
    require(
        close(given, want),
        f"wrong for small x, where eps counts ({off_by(given, want)}): eps is added to the mean "
        "square, inside the root, and it is an argument.",
    )
    wide = torch.linspace(-2, 3, 4096).bfloat16()
    want = F.rms_norm(wide.double(), (4096,), eps=1e-5).bfloat16()
    half = tensor(
        your(wide, torch.ones(4096).bfloat16(), 1e-5), (4096,), torch.bfloat16, kind="Give back x's dtype."
    )
    wrong = int((half != want).sum())
    require(
        wrong < 40,
        f"for bfloat16 input {wrong} of 4096 results are rounded wrongly: go to float32 first, then back.",
    )


@exercise("silu_slope", chapter=1, title="The slope of SiLU", minutes=10, difficulty="warm-up", points=5)
def check_silu_slope(your: Student) -> None:
    zero = float(tensor(your(torch.zeros(1)), (1,), torch.float32))
    hints = {
        0.0: "That is SiLU's value; its slope is asked for.",
        0.25: "That is the slope of the sigmoid alone.",
    }
    require(
        abs(zero - 0.5) < 1e-5, f"at 0 the slope is 1/2; yours is {zero:.3g}. {hints.get(round(zero, 3), '')}"
    )
    far = torch.tensor([-200.0, -100.0, 100.0, 200.0])
    ends = tensor(your(far), (4,), finite="Far from 0, exp overflows: torch.sigmoid does not.")
    require(
        close(ends[2:], torch.ones(2)), "far to the right SiLU is the line y = x: its slope must go to 1."
    )
    require(close(ends[:2], torch.zeros(2)), "far to the left SiLU is flat: its slope must go to 0.")
    x = torch.linspace(-6, 6, 49).reshape(7, 7)
    got = tensor(your(x), (7, 7), torch.float32)
    require(
        bool((got < 0).any()),
        "SiLU falls before it rises, so its slope is negative somewhere; yours never is. "
        "A product has two terms in its derivative.",
    )
    require(
        close(got + got.flip(0, 1), torch.ones(7, 7)),
        "the slopes at x and at -x must add up to 1; yours do not.",
    )
    wide = x.double().requires_grad_()
    (want,) = torch.autograd.grad(F.silu(wide).sum(), wide)
    require(
        close(got, want, 1e-5), f"not autograd's slope ({off_by(got, want)}). Look at the second term again."
    )


@exercise(
    "swiglu", chapter=1, title="A feed-forward layer with a gate", minutes=8, difficulty="warm-up", points=5
)
def check_swiglu(your: Student) -> None:
    x, gate, up, down = (
        numbers(2, 5, 6),
        numbers(10, 6, seed=1),
        numbers(10, 6, seed=2),
        numbers(6, 10, seed=3),
    )
    shapes = {(2, 5, 10): "Did you forget the way back down to D?"}
    got = tensor(your(x, gate, up, down), x.shape, torch.float32, shapes=shapes)
    shut = tensor(your(x, gate, 0 * up, down), x.shape)
    require(
        close(shut, 0 * x), "with W_up all zeros nothing can pass, yet something does: multiply, don't add."
    )
    shut = tensor(your(x, 0 * gate, up, down), x.shape)
    require(
        close(shut, 0 * x),
        "with W_gate all zeros the gate is SiLU(0) = 0 and nothing can pass, yet something "
        "does. Is there a SiLU on the gate, or only a sigmoid?",
    )
    doubled = tensor(your(x, gate, up, 2 * down), x.shape)
    require(close(doubled, 2 * got), "doubling W_down must double the result: nothing comes after it.")
    doubled = tensor(your(x, gate, 2 * up, down), x.shape)
    require(
        close(doubled, 2 * got),
        "doubling W_up must double the result: there is no activation on that branch.",
    )
    wide = x.double()
    gates, ups = (
        torch.einsum("btd,fd->btf", wide, gate.double()),
        torch.einsum("btd,fd->btf", wide, up.double()),
    )

    def with_gate(activation: torch.Tensor) -> torch.Tensor:
        return torch.einsum("btf,df->btd", activation * ups, down.double())

    for name, other in {"GELU": F.gelu(gates), "ReLU": gates.relu(), "nothing": gates}.items():
        require(not close(got, with_gate(other)), f"the gate has {name} on it; Llama puts SiLU there.")
    want = with_gate(gates / (1 + torch.exp(-gates)))
    require(close(got, want), f"not the formula's result ({off_by(got, want)}). Which branch goes where?")


@exercise(
    "hidden_width", chapter=1, title="Where does 11008 come from?", minutes=8, difficulty="warm-up", points=5
)
def check_hidden_width(your: Student) -> None:
    def want(emb_dim: int, multiple_of: int, multiplier: float | None = None) -> int:
        width = 8 * emb_dim // 3
        width = width if multiplier is None else int(multiplier * width)
        return next(
            w for w in range(width, width + multiple_of + 1) if w % multiple_of == 0
        )  # by counting up

    got = whole(your(4096, 256, None))
    require(got % 256 == 0, f"hidden_width(4096, 256, None) gives {got}, which is not a multiple of 256.")
    hints = {16384: "Is the 2/3 there?", 10752: "Round up, never down.", 10922: "Round up to a multiple."}
    require(
        got == want(4096, 256),
        f"hidden_width(4096, 256, None) gives {got}, but Llama 2 7B has 11008. {hints.get(got, '')}",
    )
    for emb_dim, multiple_of in ((5120, 256), (96, 256), (192, 64), (100, 1), (300, 32), (64, 100)):
        got, right = whole(your(emb_dim, multiple_of, None)), want(emb_dim, multiple_of)
        hint = (
            "It was a multiple already: leave it."
            if got == right + multiple_of
            else "Up to the next multiple."
        )
        require(
            got == right, f"hidden_width({emb_dim}, {multiple_of}, None) gives {got}, want {right}. {hint}"
        )
    got = whole(your(8192, 4096, 1.3))
    hint = (
        "Is the multiplier used?"
        if got == want(8192, 4096)
        else "First the multiplier, then the rounding up."
    )
    require(got == 28672, f"hidden_width(8192, 4096, 1.3) gives {got}, but Llama 2 70B has 28672. {hint}")
    for emb_dim in range(1, 60):
        got, right = whole(your(emb_dim, 1, 1.3)), want(emb_dim, 1, 1.3)
        require(
            got == right,
            f"hidden_width({emb_dim}, 1, 1.3) gives {got}, want {right}: drop the fraction after "
            "the 2/3, and again after the multiplier.",
        )


# --- 2. Positions ---


@exercise(
    "rope_frequencies",
    chapter=1,
    title="How fast does each pair turn?",
    minutes=8,
    difficulty="warm-up",
    points=5,
)
def check_rope_frequencies(your: Student) -> None:
    shapes = {
        (16,): "One frequency for each pair, not for each dimension.",
        (7,): "Is the last pair missing?",
    }
    got = tensor(
        your(16, 10_000.0), (8,), torch.float32, shapes=shapes, kind="Frequencies are kept in float32."
    )
    first = float(got[0])
    require(
        abs(first - 1) < 1e-6,
        f"the first pair turns by 1 radian per position; yours turns by {first:.3g}. "
        "Do you count the pairs from 1?",
    )
    require(
        float(got[1]) < 1,
        "the frequencies grow; each pair must turn slower than the one before. Look at the sign.",
    )
    ratios = got[1:].double() / got[:-1].double()
    require(
        close(ratios, ratios[:1].expand(7), 1e-4),
        "each frequency must be the same fraction of the one before.",
    )
    last = float(got[-1])
    require(
        abs(last * 10_000 - 1) > 1e-3,
        "the last frequency is exactly 1/base: the exponents go up to (d - 2)/d, not to 1.",
    )
    want = [math.exp(-math.log(10_000.0) * pair / 8) for pair in range(8)]
    hint = (
        "Is it 2i/d in the exponent?"
        if abs(float(got[1]) - want[1] ** 0.5) < 1e-4
        else "Look at the exponent."
    )
    require(
        close(got, torch.tensor(want, dtype=torch.float64), 1e-6),
        f"the second pair turns by {float(got[1]):.4f}, want {want[1]:.4f}. {hint}",
    )
    got = tensor(your(8, 500_000.0), (4,))
    want = [math.exp(-math.log(500_000.0) * pair / 4) for pair in range(4)]
    require(
        close(got * 1000, 1000 * torch.tensor(want, dtype=torch.float64), 1e-5),
        "wrong for base 500000, right for 10000: use the argument.",
    )


def turned(
    x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """Another road: pairs as complex numbers in float64, multiplied by exp(i * position * frequency)."""
    x = x.double()
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    angles = torch.outer(positions.double(), frequencies.double())
    product = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    if interleaved:
        return torch.view_as_real(product).flatten(-2)
    return torch.cat([product.real, product.imag], dim=-1)


@exercise("apply_rope", chapter=1, title="Turn the queries", minutes=15, difficulty="core", points=10)
def check_apply_rope(your: Student) -> None:
    x, frequencies = numbers(2, 3, 5, 8), 100.0 ** -(torch.arange(4) / 4)
    at = torch.arange(5)
    got = tensor(your(x, at, frequencies), x.shape, torch.float32)
    alone = close(got[:, :, 0], x[:, :, 0])
    require(
        alone,
        "position 0 must be left alone (its angle is 0). Do your positions start at 1? "
        "Are cos and sin swapped?",
    )
    require(not close(got, x), "nothing has turned: the result is x.")
    require(
        close(got.norm(dim=-1), x.norm(dim=-1)),
        "the lengths change; a rotation keeps them. Look at the signs: one of the two sines has a minus.",
    )
    neighbours = got.unflatten(-1, (4, 2)).norm(dim=-1)
    if close(neighbours, x.unflatten(-1, (4, 2)).norm(dim=-1)) or close(got, turned(x, at, frequencies, True)):
        require(
            False,
            "you pair neighbours (0, 1), (2, 3): that is Meta's layout. "
            "In ours dimension i turns with i + d/2.",
        )
    turned_pairs = got.unflatten(-1, (2, 4)).norm(dim=-2)
    require(
        close(turned_pairs, x.unflatten(-1, (2, 4)).norm(dim=-2)),
        "a pair (i, i + d/2) has changed its length: each pair must turn by itself, with its own angle.",
    )
    require(
        not close(got, turned(x, -at, frequencies)), "you turn the other way: (1, 0) must become (cos, +sin)."
    )
    later = torch.tensor([7, 3, 0, 11, 100])
    given, want = tensor(your(x, later, frequencies), x.shape), turned(x, later, frequencies)
    require(
        not close(given, turned(x, at, frequencies)),
        "you count positions yourself from 0; use those that are given.",
    )
    require(
        close(given, want), f"wrong angles ({off_by(given, want)}): the angle is position times frequency."
    )
    require(close(got, turned(x, at, frequencies)), "wrong angles: the angle is position times frequency.")
    far, half = torch.arange(1000, 1005), x.bfloat16()
    want = turned(half, far, frequencies)
    given = tensor(your(half, far, frequencies), x.shape, torch.bfloat16, kind="Give back x's dtype.")
    require(
        close(given, want, 0.01),
        f"at position 1000 bfloat16 results are off ({off_by(given, want)}): bfloat16 has 8 "
        "bits, too few for an angle of 1000 radians. Compute angles, cos and sin in float32.",
    )


@exercise(
    "interleaved_to_half_split",
    chapter=1,
    title="From Meta's rows to ours",
    minutes=20,
    difficulty="core",
    points=10,
)
def check_interleaved_to_half_split(your: Student) -> None:
    heads, d, width = 3, 8, 5
    rows = torch.arange(heads * d)
    weight = rows[:, None] + torch.linspace(
        0, 0.5, width
    )  # the row's number can be read from each of its entries
    got = tensor(your(weight, heads), weight.shape, torch.float32)
    order = got[:, 0].round().long()
    whole_rows = torch.equal(got, weight[order.clamp(0, heads * d - 1)])
    require(whole_rows, "rows must move as a whole; the columns (the inputs) keep their order.")
    require(torch.equal(order.sort().values, rows), "some rows are there twice, and some are lost.")
    require(not torch.equal(order, rows), "no row has moved.")
    homes = torch.div(order, d, rounding_mode="floor")
    stay = torch.equal(homes, torch.div(rows, d, rounding_mode="floor"))
    require(stay, "rows have moved from one head to another: reorder within each head.")
    forward = [head * d + row for head in range(heads) for row in (0, 2, 4, 6, 1, 3, 5, 7)]  # by listing
    backward = [head * d + row for head in range(heads) for row in (0, 4, 1, 5, 2, 6, 3, 7)]
    require(
        order.tolist() != backward,
        "this is the way back, from half-split to interleaved: which of the two sizes, "
        "2 and d/2, stands first before you transpose?",
    )
    require(
        order.tolist() == forward,
        f"head 0's rows come out as {order[:d].tolist()}: in our layout the first half "
        "holds every pair's first row, the second half every pair's second.",
    )
    bias = tensor(your(rows.float(), heads), (heads * d,), what="the result for a bias, of one dimension,")
    require(
        bias.long().tolist() == forward,
        "wrong for a bias (one dimension): reorder dimension 0, whatever follows.",
    )
    at, frequencies, x = torch.arange(4), 10.0 ** -(torch.arange(d // 2) / 4), numbers(4, width)
    q, k = numbers(heads * d, width, seed=1), numbers(heads * d, width, seed=2)
    ours = [(x @ tensor(your(w, heads), w.shape).T).unflatten(-1, (heads, d)).transpose(0, 1) for w in (q, k)]
    metas = [(x @ w.T).unflatten(-1, (heads, d)).transpose(0, 1) for w in (q, k)]
    q, k = (turned(w, at, frequencies) for w in ours)
    want_q, want_k = (turned(w, at, frequencies, interleaved=True) for w in metas)
    require(close(q @ k.mT, want_q @ want_k.mT), "attention scores differ from those of Meta's layout.")


@exercise(
    "rope_score", chapter=1, title="Only the distance counts", minutes=25, difficulty="stretch", points=20
)
def check_rope_score(your: Student) -> None:
    q, k, frequencies = numbers(8), numbers(8, seed=1), 100.0 ** -(torch.arange(4) / 4)
    distances = torch.arange(-3, 9)
    got = tensor(
        your(q, k, distances, frequencies),
        (12,),
        torch.float32,
        shapes={(12, 4): "Add up the pairs.", (): "One score for each distance."},
    )
    zero = float(q.double() @ k.double())
    mine = float(got[3])
    require(
        abs(mine - zero) < 1e-4,
        f"at distance 0 nothing is turned: the score is q · k = {zero:.3f}; yours is {mine:.3f}.",
    )
    doubled = tensor(your(2 * q, k, distances, frequencies), (12,))
    require(close(doubled, 2 * got), "doubling q must double every score: each term holds q once and k once.")
    behind = tensor(your(q, k, -distances, frequencies), (12,))
    require(
        not close(behind, got), "your score is the same for a key ahead and a key behind: where is the sine?"
    )
    mirrored = tensor(your(k, q, -distances, frequencies), (12,))
    require(
        close(mirrored, got),
        "swapping q and k and the sign of the distance must change nothing. Look at the sine's factor.",
    )
    m = torch.arange(12) + 5

    def scores(turn: torch.Tensor, keys_at: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
        a = turned(q.expand(12, 8), turn, frequencies, interleaved)
        return (a * turned(k.expand(12, 8), keys_at, frequencies, interleaved)).sum(dim=-1)

    require(
        not close(got, scores(m, m + distances)),
        "you turn the other way: distance is the query's position minus the key's.",
    )
    layout = "you pair neighbours (0, 1), (2, 3); in our layout dimension i goes with i + d/2."
    require(not close(got, scores(m, m - distances, interleaved=True)), layout)
    for start in (0, 5, 1000):
        want = scores(m + start, m + start - distances)
        require(
            close(got, want),
            f"turn q to position {start + 5} and k to {start + 5} minus the distance, and the score "
            f"is another one ({off_by(got, want)}).",
        )


# --- 3. Attention ---


@exercise("causal_mask", chapter=1, title="Who may look where?", minutes=8, difficulty="warm-up", points=5)
def check_causal_mask(your: Student) -> None:
    got = tensor(your(4, 4), (4, 4), torch.bool, kind="Make it a boolean mask: True where a query may look.")
    require(not got.all(), "every query sees everything: the future must be hidden.")
    if torch.equal(got, torch.ones(4, 4).triu(1).bool()):
        require(False, "inverted: True stands where a query may look, not where it may not.")
    require(got.diagonal().all(), "a query must see its own position. Is your diagonal off by one?")
    require(
        not got.triu(1).any(),
        "a query sees a position that comes after it. Which triangle, and from which diagonal?",
    )
    require(got.tril().sum() == 10, "a query must see all positions before it, too.")
    got = tensor(your(1, 6), (1, 6), torch.bool)
    require(
        got.all(),
        "one query at the end of six positions sees all six: the queries are the *last* positions, so "
        "query 0 does not stand at position 0.",
    )
    for queries, keys in ((2, 5), (3, 4), (1, 1), (5, 9)):
        got = tensor(your(queries, keys), (queries, keys), torch.bool)
        want = [[key <= keys - queries + query for key in range(keys)] for query in range(queries)]
        require(
            got.tolist() == want,
            f"causal_mask({queries}, {keys}) is wrong in {int((got != torch.tensor(want)).sum())} places. "
            "Query t stands at position n_keys - n_queries + t.",
        )


def _attention_by_loops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Another road: one query at a time over the keys that it may see, in float64."""
    q, k, v, d = q.double(), k.double(), v.double(), q.shape[-1]
    rows = []
    for t in range(q.shape[-2]):
        scores = (k[..., : t + 1, :] * q[..., t : t + 1, :]).sum(dim=-1) / math.sqrt(d)
        shares = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
        shares = shares / shares.sum(dim=-1, keepdim=True)
        rows.append((shares[..., None] * v[..., : t + 1, :]).sum(dim=-2))
    return torch.stack(rows, dim=-2)


@exercise(
    "causal_attention", chapter=1, title="Attention without a loop", minutes=20, difficulty="core", points=10
)
def check_causal_attention(your: Student) -> None:
    q, k, v = (numbers(2, 3, 5, 4, seed=seed) for seed in range(3))
    finite = "A row in which everything is hidden gives NaN: may a query see its own position?"
    got = tensor(your(q, k, v), (2, 3, 5, 4), torch.float32, finite=finite)
    same = tensor(your(q, k, torch.full_like(v, 2.0)), v.shape)
    require(
        close(same, torch.full_like(v, 2.0)),
        "if all values are 2 every result is 2, since a query's weights add up "
        "to 1; yours do not. Softmax over the keys (the last dimension), after hiding, not before.",
    )
    changed = v.clone()
    changed[:, :, -1] += 10
    early = tensor(your(q, k, changed), v.shape)[:, :, :-1]
    require(
        close(early, got[:, :, :-1]),
        "changing the last position's value changes earlier results: they see the future.",
    )
    require(close(got[:, :, 0], v[:, :, 0]), "the first position sees only itself: its result must be v[0].")
    want = _attention_by_loops(q, k, v)
    if not close(got, want):
        for factor, words in ((2.0, "not scaled at all"), (0.5, "divided by d instead of its root")):
            require(
                not close(got, _attention_by_loops(q * factor, k, v)),
                f"the scores are {words}: divide by √d.",
            )
    require(close(got, want), f"not what a loop over queries gives ({off_by(got, want)}).")
    q, k, v = (numbers(1, 2, 40, 64, seed=seed) for seed in range(3))
    got, want = tensor(your(q, k, v), q.shape), _attention_by_loops(q, k, v)
    require(
        close(got, want),
        f"right for d = 4, wrong for d = 64 ({off_by(got, want)}): the scale is √d, whatever d is.",
    )
    big = tensor(
        your(200 * q, 200 * k, v), q.shape, finite="Large scores overflow in exp: torch.softmax does not."
    )
    require(close(big, _attention_by_loops(200 * q, 200 * k, v), 1e-2), "wrong for large scores.")
    half = tensor(
        your(q.bfloat16(), k.bfloat16(), v.bfloat16()), q.shape, torch.bfloat16, kind="Give back v's dtype."
    )
    require(close(half, want, 0.05), "wrong in bfloat16.")


def block_weights(width: int = 6, hidden: int = 10, scale: float = 0.6) -> dict[str, torch.Tensor]:
    """Random weights for the block of the debugging exercise, one head, with the book's names."""
    shapes = {
        "norm1": (width,),
        "W_query": (width, width),
        "W_key": (width, width),
        "W_value": (width, width),
        "out_proj": (width, width),
        "norm2": (width,),
        "fc1": (hidden, width),
        "fc2": (hidden, width),
        "fc3": (width, hidden),
    }
    drawn = {name: scale * numbers(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    return drawn | {name: 1 + drawn[name] for name in ("norm1", "norm2")}


def _block(x: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    """Another road: float64, position by position, the norms by torch's own op."""
    x, w, D = x.double(), {name: value.double() for name, value in w.items()}, x.shape[-1]
    h = F.rms_norm(x, (D,), w["norm1"], eps=1e-5)
    q, k, v = (torch.einsum("td,ed->te", h, w[name]) for name in ("W_query", "W_key", "W_value"))
    middle = x + torch.einsum("td,ed->te", _attention_by_loops(q, k, v), w["out_proj"])
    h = F.rms_norm(middle, (D,), w["norm2"], eps=1e-5)
    gate, up = torch.einsum("td,fd->tf", h, w["fc1"]), torch.einsum("td,fd->tf", h, w["fc2"])
    return middle + torch.einsum("tf,df->td", gate / (1 + torch.exp(-gate)) * up, w["fc3"])


@exercise(
    "repaired_block",
    chapter=1,
    title="It trains, and it is wrong",
    minutes=25,
    difficulty="stretch",
    points=20,
)
def check_repaired_block(your: Student) -> None:
    x, w = numbers(5, 6, seed=20), block_weights()
    got = tensor(your(x, w), x.shape, torch.float32)
    changed = x.clone()
    changed[-1] += 1
    early = tensor(your(changed, w), x.shape)[:-1]
    require(
        close(early, got[:-1]),
        "symptom 1: changing the last token changes what stands before it. The block reads the future.",
    )
    silent = w | {"out_proj": 0 * w["out_proj"], "fc3": 0 * w["fc3"]}
    through = tensor(your(x, silent), x.shape)
    require(
        close(through, x),
        "symptom 2: with out_proj and fc3 all zeros both halves are silent and x must come through "
        "unchanged; it does not. Follow the residual path.",
    )
    feed = w | {"out_proj": 0 * w["out_proj"]}
    added = tensor(your(x, feed), x.shape) - x
    doubled = tensor(your(x, feed | {"fc2": 2 * w["fc2"]}), x.shape) - x
    require(
        close(doubled, 2 * added),
        "symptom 3: with attention silent, doubling fc2 must double what the feed-forward "
        "adds; it does not. Which branch carries the SiLU?",
    )
    louder = tensor(your(100 * x, feed), x.shape) - 100 * x
    require(
        close(louder, added, 0.02),
        "symptom 4: with attention silent, a hundredfold x must add nearly the same, since "
        "the feed-forward reads a normalized x; yours grows.",
    )
    other = w | {"norm2": 2 * w["norm2"]}
    require(not close(tensor(your(x, other), x.shape), got), "symptom 5: another norm2 changes nothing.")
    talk = w | {"fc3": 0 * w["fc3"]}
    louder = tensor(your(100 * x, talk), x.shape) - 100 * x
    require(
        close(louder, tensor(your(x, talk), x.shape) - x, 0.02),
        "symptom 6: with the feed-forward silent, a "
        "hundredfold x must add nearly the same, since attention reads a normalized x; yours grows.",
    )
    mine, want = tensor(your(x, talk), x.shape), _block(x, talk)
    require(
        close(mine, want),
        f"symptom 7: the feed-forward is silent and attention is off ({off_by(mine, want)}), though "
        "it hides the future: how sharp are its weights?",
    )
    mine, want = tensor(your(x, feed), x.shape), _block(x, feed)
    require(
        close(mine, want),
        f"symptom 8: attention is silent and the feed-forward is off ({off_by(mine, want)}).",
    )
    require(
        close(got, _block(x, w)), f"each half is right, together they are off ({off_by(got, _block(x, w))})."
    )


# --- 4. Counting ---


def _weight_shapes(cfg: dict) -> list[tuple[int, ...]]:
    """Another road: every weight's shape, one by one."""
    D, F_, V = cfg["emb_dim"], cfg["hidden_dim"], cfg["vocab_size"]
    d = cfg.get("head_dim") or D // cfg["n_heads"]
    queries, keys = cfg["n_heads"] * d, cfg["n_kv_groups"] * d
    block = [(D,), (queries, D), (keys, D), (keys, D), (D, queries), (D,), (F_, D), (F_, D), (D, F_)]
    return [(V, D)] + block * cfg["n_layers"] + [(D,)] + ([] if cfg.get("tie_embeddings") else [(V, D)])


def _config(**changes: object) -> dict:
    small = {
        "vocab_size": 100,
        "context_length": 64,
        "emb_dim": 24,
        "n_heads": 4,
        "n_layers": 3,
        "hidden_dim": 40,
    }
    return (
        small | {"n_kv_groups": 4, "rope_base": 10_000.0, "rope_freq": None, "dtype": torch.float32} | changes
    )


LLAMA2_7B = _config(
    vocab_size=32000,
    context_length=4096,
    emb_dim=4096,
    n_heads=32,
    n_layers=32,
    hidden_dim=11008,
    n_kv_groups=32,
)
LLAMA2_70B = LLAMA2_7B | {
    "emb_dim": 8192,
    "n_heads": 64,
    "n_layers": 80,
    "hidden_dim": 28672,
    "n_kv_groups": 8,
}


@exercise(
    "count_parameters", chapter=1, title="Seven billion, exactly", minutes=15, difficulty="core", points=10
)
def check_count_parameters(your: Student) -> None:
    def difference(**changes: object) -> int:
        return whole(your(_config(**changes))) - whole(your(_config()))

    longer = difference(context_length=128)
    require(
        longer == 0,
        f"a longer context adds {longer} parameters; in Llama it adds none: RoPE has nothing to learn.",
    )
    wider = difference(vocab_size=101)
    hint = "The embedding and the output head are two matrices here." if wider == 24 else ""
    require(
        wider == 48,
        f"one more word in the vocabulary must add 2 D = 48 parameters; yours adds {wider}. {hint}",
    )
    hidden = difference(hidden_dim=41)
    hint = {2 * 24 * 3: "SwiGLU has three matrices.", 3 * 26 * 3: "Llama's layers have no biases."}.get(
        hidden, ""
    )
    require(
        hidden == 3 * 24 * 3,
        f"one more hidden unit must add 3 D in each of 3 blocks, 216 parameters; yours adds {hidden}. {hint}",
    )
    empty, want = whole(your(_config(n_layers=0))), 2 * 100 * 24 + 24
    hint = "The norm before the head is missing." if empty == want - 24 else ""
    require(empty == want, f"without any block {want} parameters are left; you count {empty}. {hint}")
    block, want = difference(n_layers=4), sum(map(math.prod, _weight_shapes(_config(n_layers=1)))) - want
    hint = {
        48: "Each block has two norms of D weights.",
        24: "Each block has two norms of D weights.",
        -48: "RMSNorm has D weights, no bias.",
        -96: "Attention has no biases.",
    }.get(want - block, "")
    require(
        block == want,
        f"one more block adds {block} parameters for D = 24, F = 40, 4 heads; want {want}. {hint}",
    )
    grouped = -difference(n_kv_groups=2)
    require(
        grouped == 3 * 2 * 12 * 24,
        f"half as many key-value heads must save 2 · 12 · D in each of 3 blocks, 1728 "
        f"parameters; yours saves {grouped}. W_key and W_value have n_kv_groups · head_dim rows.",
    )
    wide = whole(your(_config(head_dim=10)))
    require(
        wide == sum(map(math.prod, _weight_shapes(_config(head_dim=10)))),
        f"with head_dim = 10 in the config you count "
        f"{wide}: a config that has the key means it, whatever emb_dim / n_heads would be.",
    )
    tied = whole(your(_config(tie_embeddings=True)))
    require(
        tied == whole(your(_config())) - 2400,
        "with tie_embeddings the head *is* the embedding: count it once.",
    )
    for cfg in (LLAMA2_7B, LLAMA2_70B):
        got, want = whole(your(cfg)), sum(map(math.prod, _weight_shapes(cfg)))
        require(
            got == want,
            f"for {cfg['n_layers']} layers of width {cfg['emb_dim']} you count {got:,}; "
            f"the published weights hold {want:,}.",
        )


@exercise("inference_bytes", chapter=1, title="Does it fit?", minutes=10, difficulty="core", points=10)
def check_inference_bytes(your: Student) -> None:
    def measure(**changes: object) -> tuple[int, int]:
        ask = {
            "cfg": LLAMA2_7B,
            "n_parameters": 1000,
            "batch": 1,
            "positions": 128,
            "bytes_per_number": 2,
        } | changes
        got = several(your(*ask.values()), 2, "return two numbers: the weights' bytes, and the cache's.")
        return whole(got[0], "the first"), whole(got[1], "the second")

    weights, cache = measure()
    hints = {
        4000: "Inference keeps no gradients.",
        8000: "Inference keeps neither gradients nor optimizer state.",
    }
    hint = hints.get(weights, "")
    require(
        weights == 2000,
        f"1000 parameters of 2 bytes are 2000 bytes, you say {weights}. {hint}",
    )
    require(
        measure(batch=3)[0] == 2000, "the weights are read by every text of the batch: they are there once."
    )
    require(
        measure(batch=3)[1] == 3 * cache,
        "three texts need three times the cache: each has its own keys and values.",
    )
    require(
        measure(positions=256)[1] != 4 * cache,
        "twice the positions cost you four times the cache: it holds keys and values, not scores.",
    )
    require(measure(positions=256)[1] == 2 * cache, "twice the positions need twice the cache.")
    require(
        measure(bytes_per_number=4) == (4000, 2 * cache),
        "in float32 (4 bytes) both parts are twice as large.",
    )
    deeper = measure(cfg=LLAMA2_7B | {"n_layers": 64})[1]
    require(deeper == 2 * cache, "twice the layers need twice the cache: each layer has its own.")
    want = torch.empty(32, 2, 1, 32, 128, 128, device="meta", dtype=torch.bfloat16).nbytes
    hint = "There are keys *and* values." if 2 * cache == want else ""
    require(
        cache == want,
        f"Llama 2 7B keeps {want:,} bytes for 128 positions in 2-byte numbers; you say {cache:,}. {hint}",
    )
    got = measure(cfg=LLAMA2_70B)[1]
    want = torch.empty(80, 2, 1, 8, 128, 128, device="meta", dtype=torch.bfloat16).nbytes
    hint = "Only n_kv_groups heads are kept, not n_heads." if got == 8 * want else ""
    require(
        got == want,
        f"Llama 2 70B keeps {want:,} bytes for 128 positions in 2-byte numbers; you say {got:,}. {hint}",
    )
    require(measure(cfg=LLAMA2_7B | {"head_dim": 64})[1] * 2 == cache, "a config that has head_dim means it.")
