"""From logits to a draw: against loops in float64, transformers' own filters and counted draws; and against mutants."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamabook.errors import InputError
from llamabook.sampling import keep_top_k, keep_top_p, next_token_probs, sample

INF = math.inf


def reference(logits, temperature=1.0, top_k=None, top_p=None):
    """Probabilities of one row in Python floats: temperature, top-k, top-p, in the order of their ranks."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if temperature == 0:
        return [float(i == order[0]) for i in range(len(logits))]
    weights = [math.exp((z - max(logits)) / temperature) for z in logits]
    kept = order[:top_k]
    mass, total = 0.0, math.fsum(weights[i] for i in kept)
    nucleus = []
    for i in kept:
        if nucleus and top_p is not None and mass / total >= top_p:
            break
        nucleus.append(i)
        mass += weights[i]
    total = math.fsum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(logits))]


def close(probs, expected, tolerance=1e-5):
    return torch.allclose(probs.double(), torch.tensor(expected, dtype=torch.float64), atol=tolerance, rtol=0)


ROWS = [
    [0.3, -1.2, 2.5, 0.9, -0.4, 1.7],
    [1.0, 2.0, 2.0, 2.0, 0.0],  # ties
    [-INF, 0.5, -INF, 1.5],
    [4.0],
    [-80.0, 0.0, 85.0],
]
KNOBS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 99},
    {"top_p": 0.0},
    {"top_p": 1e-12},
    {"top_p": 0.65},
    {"top_p": 0.97},
    {"top_p": 1.0},
    {"temperature": 2.0, "top_k": 3, "top_p": 0.7},
    {"temperature": 0.3, "top_k": 4, "top_p": 0.9},
    {"temperature": 0.0, "top_k": 1, "top_p": 0.9},
    {"temperature": 1e-6},
    {"temperature": 1e6},
    {"temperature": 2e-38},
]


def battery(probabilities):
    """All that a turner of logits into probabilities must do; raises AssertionError for a wrong one."""
    for row in ROWS:
        for knobs in KNOBS:
            probs = probabilities(torch.tensor(row), **knobs)
            assert probs.dtype == torch.float32 and close(probs, reference(row, **knobs)), (row, knobs)
    batch = torch.tensor([ROWS[0], ROWS[0][::-1]])
    for knobs in KNOBS:
        apart = torch.stack([probabilities(row, **knobs) for row in batch])
        assert torch.allclose(probabilities(batch, **knobs), apart)
    rough = torch.linspace(-9, 9, 50).bfloat16()
    for knobs in KNOBS:
        assert torch.equal(probabilities(rough, **knobs), probabilities(rough.float(), **knobs))


def test_the_battery_passes():
    battery(next_token_probs)


def divide(logits, temperature):
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def mutant(k=keep_top_k, p=keep_top_p, warm=divide, order="tkp", cast=torch.float32):
    """`next_token_probs` with one part exchanged for a wrong one."""

    def probabilities(logits, temperature=1.0, top_k=None, top_p=None):
        logits = logits.to(cast)
        for step in order:
            if step == "t":
                logits = keep_top_k(logits, 1) if temperature == 0 else warm(logits, temperature)
            elif step == "k" and top_k is not None:
                logits = k(logits, top_k)
            elif step == "p" and top_p is not None:
                logits = p(logits, top_p)
        return torch.softmax(logits, dim=-1)

    return probabilities


def threshold(logits, top_k):
    """The usual way, which keeps more than k where logits are equal."""
    kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < kth, -INF)


def nucleus(outside, first_stays=True, per_row=True):
    def keep(logits, top_p):
        probs, ids = torch.softmax(logits, -1).sort(dim=-1, descending=True, stable=True)
        if not per_row:  # the ranks of the first row for all
            ids = ids.reshape(-1, ids.shape[-1])[0].expand(ids.shape)
        out = outside(probs, top_p)
        if first_stays:
            out[..., 0] = False
        return logits.masked_fill(torch.zeros_like(out).scatter(-1, ids, out), -INF)

    return keep


MUTANTS = {
    "temperature multiplies": mutant(warm=lambda z, t: z * t),
    "largest not taken off": mutant(warm=lambda z, t: z / t),
    "temperature ignored": mutant(warm=lambda z, t: z),
    "temperature last": mutant(order="kpt"),
    "top-p before top-k": mutant(order="tpk"),
    "top-k keeps ties": mutant(k=threshold),
    "top-k keeps one more": mutant(k=lambda z, k: keep_top_k(z, k + 1)),
    "top-k over the whole batch": mutant(k=lambda z, k: keep_top_k(z.flatten(), k).reshape(z.shape)),
    "nucleus without the token that reaches p": mutant(p=nucleus(lambda q, p: q.cumsum(-1) >= p)),
    "nucleus of one too many": mutant(p=nucleus(lambda q, p: q.cumsum(-1) - 2 * q >= p)),
    "nucleus may be empty": mutant(p=nucleus(lambda q, p: q.cumsum(-1) - q >= p, first_stays=False)),
    "nucleus by the first row": mutant(p=nucleus(lambda q, p: q.cumsum(-1) - q >= p, per_row=False)),
    "a threshold p on each token": mutant(p=nucleus(lambda q, p: q < p)),
    "bfloat16 where the logits are": lambda logits, **knobs: mutant(cast=logits.dtype)(logits, **knobs).float(),
}


def test_the_parts_of_the_mutants_are_sound_without_a_mutation():
    battery(mutant())
    battery(mutant(p=nucleus(lambda q, p: q.cumsum(-1) - q >= p)))


@pytest.mark.parametrize("wrong", MUTANTS)
def test_the_battery_rejects(wrong):
    with pytest.raises(AssertionError):
        battery(MUTANTS[wrong])


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=30),
    st.sampled_from([0.0, 1e-6, 0.1, 0.7, 1.0, 2.0, 1e6]),
    st.none() | st.integers(1, 40),
    st.none() | st.floats(0, 1),
)
def test_properties(row, temperature, top_k, top_p):
    logits = torch.tensor(row)
    probs = next_token_probs(logits, temperature, top_k, top_p)
    assert probs.shape == logits.shape and probs.dtype == torch.float32
    assert probs.sum().item() == pytest.approx(1, abs=1e-5) and (probs >= 0).all()
    assert probs[logits.argmax()] == probs.max() > 0
    if top_k is not None:
        assert (probs > 0).sum() <= top_k
    kept, cut = logits[probs > 0], logits[probs == 0]
    if temperature > 0 and len(cut) and len(kept):
        assert kept.min() >= cut.max()
    full = next_token_probs(logits, temperature, top_k)
    if top_p is not None:
        mass = full[probs > 0].sum().item()
        smallest = full[probs > 0].min().item()
        assert mass >= top_p - 1e-5
        assert (probs > 0).sum() == 1 or mass - smallest < top_p + 1e-5


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.integers(1, 14))
def test_top_k_keeps_exactly_k_and_of_equals_the_first(row, k):
    kept = keep_top_k(torch.tensor(row, dtype=torch.float32), k).isfinite().nonzero().flatten().tolist()
    assert kept == sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:k])


def test_filters_are_those_of_transformers():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    for temperature, k, p in [(0.7, 40, 0.9), (1.3, 200, 0.5), (1.0, 7, 0.99)]:
        expected = logits
        for warp in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(k), TopPLogitsWarper(p)):
            expected = warp(None, expected)
        assert torch.allclose(next_token_probs(logits, temperature, k, p), expected.softmax(-1), atol=1e-6)


def test_top_p_at_its_edges():
    logits = torch.tensor([0.1, 0.15, 0.25, 0.5]).log()
    for p, n in [(0.0, 1), (1e-30, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.91, 4), (1.0, 4)]:
        assert (next_token_probs(logits, top_p=p) > 0).sum() == n, p


def test_top_p_one_keeps_even_what_rounding_would_lose():
    logits = torch.linspace(0, -60, 3000)
    assert torch.equal(next_token_probs(logits, top_p=1.0), next_token_probs(logits))
    assert (next_token_probs(logits, top_p=1.0) > 0).sum() == 3000


def test_temperature_zero_takes_the_first_of_the_largest():
    assert next_token_probs(torch.tensor([1.0, 3.0, 3.0]), temperature=0).tolist() == [0, 1, 0]
    assert next_token_probs(torch.tensor([1.0, 3.0, 3.0]), top_k=1).tolist() == [0, 1, 0]


@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e-38, 1e-6, 1e6, 3e38])
def test_extreme_temperatures_stay_numbers(temperature):
    logits = torch.tensor([-3e38, -INF, 5.0, 4.0, 3e38])
    probs = next_token_probs(logits, temperature)
    assert probs.isfinite().all() and probs.sum().item() == pytest.approx(1) and probs[1] == 0
    assert probs.argmax() == 4


def test_what_has_minus_infinity_is_never_drawn():
    logits = torch.tensor([-INF, 0.0, -INF, -1.0])
    for knobs in KNOBS:
        probs = next_token_probs(logits, **knobs)
        assert probs[0] == probs[2] == 0
        drawn = sample(probs.expand(500, 4), torch.Generator().manual_seed(0))
        assert set(drawn.flatten().tolist()) <= {1, 3}


def test_float64_and_half_logits_give_float32():
    logits = torch.linspace(-9, 9, 40)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert next_token_probs(logits.to(dtype), 0.8, 20, 0.9).dtype == torch.float32


def test_logits_are_left_as_they_are():
    logits = torch.linspace(-2, 2, 9)
    before = logits.clone()
    next_token_probs(logits, 0.5, 3, 0.5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [INF, 1.0], [INF, INF], [-INF, -INF]])
def test_logits_that_no_model_should_give_are_refused(bad):
    for logits in (torch.tensor(bad), torch.tensor([[0.0, 0.0], bad])):
        for knobs in ({}, {"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.5}):
            with pytest.raises(InputError, match="logits.*weights"):
                next_token_probs(logits, **knobs)


@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": INF},
        {"temperature": 1e39},
        {"top_k": 0},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"temperature": 0.0, "top_k": 0},
        {"temperature": 0.0, "top_p": 2.0},
    ],
)
def test_knobs_out_of_range_are_refused_in_one_line(knobs):
    with pytest.raises(InputError) as caught:
        next_token_probs(torch.zeros(3), **knobs)
    name = list(knobs)[-1]
    assert str(caught.value).startswith(f"{name} is {knobs[name]!r}: give") and "\n" not in str(caught.value)


# ---------------------------------------------------------------- the draw


def chi_square(draw, probs, n=40_000):
    """The statistic and a bound that a right sampler passes in all but about one of 10 000 seeds."""
    drawn = draw(probs.expand(n, -1), torch.Generator().manual_seed(3))  # (n, 1)
    counts = torch.bincount(drawn.flatten(), minlength=len(probs))
    assert counts[probs == 0].sum() == 0
    expected = n * probs[probs > 0]
    freedom = len(expected) - 1
    statistic = ((counts[probs > 0] - expected) ** 2 / expected).sum().item()
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
    return statistic, bound


DISTRIBUTIONS = [
    next_token_probs(torch.linspace(-2, 2, 12)),
    next_token_probs(torch.linspace(-2, 2, 30), temperature=0.7, top_k=9, top_p=0.95),
    torch.tensor([0.0, 0.5, 0.0, 0.49, 0.01]),
]


@pytest.mark.parametrize("probs", DISTRIBUTIONS, ids=["plain", "filtered", "rare"])
def test_draws_have_their_probabilities(probs):
    statistic, bound = chi_square(sample, probs)
    assert statistic < bound


@pytest.mark.parametrize("probs", DISTRIBUTIONS, ids=["plain", "filtered", "rare"])
def test_the_chi_square_rejects_a_slightly_warmer_draw(probs):
    def warmer(probs, generator):
        return torch.multinomial(probs**0.9, 1, generator=generator)

    statistic, bound = chi_square(warmer, probs)
    assert statistic > bound


def test_shapes_and_seeds_of_a_draw():
    probs = next_token_probs(torch.zeros(2, 3, 50))
    first = sample(probs, torch.Generator().manual_seed(5))
    assert first.shape == (2, 3, 1) and first.dtype == torch.long
    assert torch.equal(first, sample(probs, torch.Generator().manual_seed(5)))
    assert not torch.equal(first, sample(probs, torch.Generator().manual_seed(6)))
    assert len(set(first.flatten().tolist())) > 1  # rows are drawn apart
    assert sample(torch.tensor([0.0, 1.0])).tolist() == [1]


def test_an_explicit_generator_leaves_torchs_own_alone():
    state = torch.get_rng_state()
    sample(torch.full((4,), 0.25), torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
