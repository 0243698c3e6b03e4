"""Weights in 8 and 4 bits, and every way to multiply with them, against float64 and the bits of the words."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llamas import random_weights
from test_fast_model import read
from test_kernels import DTYPES, LAYERS, a_layer, both, close, copies, is_noticed, layer, matrices, needs_kernels, others, random
from test_llama3 import SHORT, relative_error, token_ids
from torch.utils._python_dispatch import TorchDispatchMode

from llamabook.errors import InputError, LlamaBookError
from llamabook.fast import kernels
from llamabook.fast.model import from_llama
from llamabook.fast.quantize import packing
from llamabook.fast.quantize.int4 import GROUP_SIZES, pack, quantize_int4, quantize_int4_asymmetric, unpack
from llamabook.fast.quantize.int8 import quantize_int8
from llamabook.fast.quantize.linear import QuantizedLinear
from llamabook.fast.quantize.packing import Blocks, Plain, Stock, choose
from llamabook.fast.quantize.weight import Quantized, Scheme, stack
from llamabook.llama3 import Llama3Model

SCHEMES = [Scheme(8), *(Scheme(4, size, asymmetric) for size in GROUP_SIZES for asymmetric in (False, True))]
FEW_SCHEMES = [Scheme(8), Scheme(4, 32), Scheme(4, 64, asymmetric=True)]
SHAPES = [(48, 256), (33, 70), (7, 31), (5, 1), (1, 40), (16, 32), (100, 130), (70, 1000)]  # N, K
ROUNDING = 2.0**-24  # the most that float32 is off, relative to the number

needs_rounding = pytest.mark.skipif(not kernels.rounds_activations(), reason="this CPU has no path that rounds x")


def name(scheme):
    return f"{scheme}{' with zeros' if scheme.asymmetric else ''}" if scheme else "dense"


each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=name)
some_schemes = pytest.mark.parametrize("scheme", FEW_SCHEMES, ids=name)


# ---------------------------------------------------------------- oracles


def meant(weight):
    """(the matrix (N, K) that the words mean, what it is the sum of, without signs), in float64, bit by bit."""
    each, middle = 32 // weight.bits, 2 ** (weight.bits - 1)
    places = weight.bits * torch.arange(each)  # of the codes in a word
    codes = (weight.words.long().unsqueeze(-1) >> places & 2 * middle - 1).flatten(1)[:, : weight.K] - middle

    def wide(table):
        return table.double().repeat_interleave(weight.groupsize, dim=1)[:, : weight.K]

    scaled = codes * wide(weight.scales)
    zeros = torch.zeros_like(scaled) if weight.zeros is None else wide(weight.zeros)
    return scaled + zeros, scaled.abs() + zeros.abs()


def rounded(x):
    """x (..., K) as `Blocks` rounds it: each 32 numbers to whole 127ths of the largest, ties to even; float64."""
    groups = F.pad(x.float(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    most = groups.abs().amax(dim=-1, keepdim=True)
    turns = torch.where(most > 0, torch.full_like(most, 127) / most, 0)  # `127 / most` takes the inverse and rounds twice
    codes = (groups * turns).round()
    return (codes.double() * (most / 127).double()).flatten(-2)[..., : x.shape[-1]]


def product(weight, x, rounds=False):
    """(x W^T, the same sum of numbers without signs), float64, of x as it is or rounded."""
    (matrix, sizes), x = meant(weight), rounded(x) if rounds else x.double()
    return x @ matrix.T, x.abs() @ sizes.T


def roundings(found, weight, x, rounds=False):
    """How far `found` is from the product beyond its own last bit: in float32 roundings of all that is added up."""
    exact, size = product(weight, x, rounds)
    assert found.shape == exact.shape and found.dtype == x.dtype
    kind = torch.finfo(x.dtype)
    beyond = (found.double() - exact).abs() - kind.eps / 2 * exact.abs() - kind.smallest_normal * kind.eps
    return (beyond.clamp(min=0) / (ROUNDING * size + 1e-300)).nan_to_num(nan=1e300).amax().item() if found.numel() else 0


def ways_of(weight):
    """Each way in which this machine can multiply with `weight`, and of how many roundings its sums may be off."""
    ways = [(Plain(weight), 16)]
    if kernels.ready():
        both = Blocks(weight, exact=True), Blocks(weight, exact=False)
        ways += [(way, 6 if way.rounds else 16) for way in both]
    return [*ways, (Stock(weight), 16)] if Stock.takes(weight) else ways


def blocks_of(weight):
    """Our kernels alone: without and, where this CPU can, with rounding x."""
    return [Blocks(weight, exact) for exact in ((True, False) if kernels.rounds_activations() else (True,))]


def some(scheme, N=40, K=100):
    """A quantized matrix, some columns of it larger than the others, as in a model."""
    weight = random(N, K)
    weight[:, ::7] *= 10
    return scheme(weight)


class Names(TorchDispatchMode):
    """Notes the names of all operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name().partition("::")[2])
        return function(*args, **(kwargs or {}))


# ---------------------------------------------------------------- codes and words


@given(data=st.data(), bits=st.sampled_from([8, 4]), N=st.integers(1, 4), K=st.integers(1, 70))
@settings(deadline=None, max_examples=60)
def test_packing_loses_nothing(data, bits, N, K):
    """Each code is where Python's own whole numbers have it; what fills up the last word means 0."""
    middle, each = 2 ** (bits - 1), 32 // bits
    numbers = data.draw(st.lists(st.integers(-middle, middle - 1), min_size=N * K, max_size=N * K))
    codes = torch.tensor(numbers, dtype=torch.int8).view(N, K)
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (N, -(-K // each))
    assert torch.equal(unpack(words, bits, K), codes) and torch.equal(unpack(words.T.contiguous().T, bits, K), codes)
    for n in range(N):
        row = [*codes[n].tolist(), *[0] * (-K % each)]
        for i, word in enumerate(words[n].tolist()):
            raised = [code + middle for code in row[i * each : (i + 1) * each]]
            assert word % 2**32 == sum(code << bits * place for place, code in enumerate(raised))


def test_words_are_as_documented():
    """The first code in the lowest bits; the least code is 0."""
    assert pack(torch.arange(-8, 0, dtype=torch.int8)[None], 4).tolist() == [[0x76543210]]
    assert pack(torch.tensor([[-128, -127, -126, -1]], dtype=torch.int8), 8).tolist() == [[0x7F020100]]
    for bits in (8, 4):
        assert pack(torch.zeros(1, 1, dtype=torch.int8), bits).tolist() == [[packing.NOTHING[bits]]]


@each_scheme
@pytest.mark.parametrize("N, K", SHAPES)
def test_a_quantized_matrix_means_what_its_words_say(scheme, N, K):
    weight = some(scheme, N, K)
    exact, size = meant(weight)
    assert weight.shape == exact.shape == (N, K) and weight.codes().shape == (N, K)
    assert ((weight.dequantize() - exact).abs() <= 2 * ROUNDING * size).all()
    groups = 1 if scheme.bits == 8 else -(-K // scheme.groupsize)
    assert weight.words.shape == (N, -(-K * scheme.bits // 32)) and weight.scales.shape == (N, groups)
    assert (weight.zeros is not None) == scheme.asymmetric and weight.scales.dtype == torch.bfloat16


@each_scheme
@pytest.mark.parametrize("N, K", SHAPES)
def test_no_other_code_would_be_nearer(scheme, N, K):
    weight = random(N, K)
    weight[:, ::7] *= 10
    quantized = scheme(weight)
    exact, _ = meant(quantized)
    scales = quantized.scales.double().repeat_interleave(quantized.groupsize, dim=1)[:, :K].unsqueeze(-1)
    lowest = -127 if scheme.bits == 8 else -8
    zero = exact.unsqueeze(-1) - quantized.codes().unsqueeze(-1) * scales
    all_of_them = torch.arange(lowest, -(-lowest - 1) if scheme.bits == 4 else 128) * scales + zero  # (N, K, codes)
    best = (all_of_them - weight.double().unsqueeze(-1)).abs().amin(dim=-1)
    assert ((exact - weight).abs() - best <= 1e-6 * weight.abs().amax()).all()
    assert quantized.codes().min() >= lowest


def test_where_the_largest_number_goes():
    codes, scales = quantize_int8(torch.tensor([[0.5, -127 / 64, 1.0, 0.25]]))
    assert (codes.tolist(), scales.item()) == ([[32, -127, 64, 16]], 1 / 64)
    row = torch.tensor([[0.5, -2.0, 1.0, 0.25]])
    codes, scales = quantize_int4(row)
    assert (codes.tolist(), scales.item()) == ([[2, -8, 4, 1]], 0.25)
    codes, scales = quantize_int4(-row)  # a scale below zero, so that 2 is as exact as -2
    assert (codes.tolist(), scales.item()) == ([[2, -8, 4, 1]], -0.25)
    codes, scales, zeros = quantize_int4_asymmetric(torch.tensor([[-1.0, 2.75, 0.0, 0.25]]))
    assert (codes.tolist(), scales.item(), zeros.item()) == ([[-8, 7, -4, -3]], 0.25, 1.0)
    for scheme in SCHEMES:
        assert scheme(torch.zeros(3, 40)).dequantize().eq(0).all()


def test_a_group_of_equal_numbers():
    for K in (1, 32, 40, 256):
        row = torch.tensor([[0.01], [-3.0], [7.7], [1e-20]]).expand(4, K)
        for scheme in SCHEMES:
            assert ((scheme(row).dequantize() - row).abs() <= 2**-8 * row.abs()).all(), (name(scheme), K)


@some_schemes
def test_rows_of_a_quantized_matrix(scheme):
    whole = some(scheme, 30, 70)
    parts = [whole.rows(0, 7), whole.rows(7, 8), whole.rows(8, 30)]
    assert [part.shape for part in parts] == [(7, 70), (1, 70), (22, 70)]
    assert torch.equal(parts[2].dequantize(), whole.dequantize()[8:])
    again = stack(parts)
    assert torch.equal(again.words, whole.words) and torch.equal(again.dequantize(), whole.dequantize())
    weight = random(30, 70)
    assert torch.equal(stack([scheme(weight[:11]), scheme(weight[11:])]).dequantize(), scheme(weight).dequantize())
    assert parts[0].words.data_ptr() == whole.words.data_ptr(), "copied"


@pytest.mark.parametrize("arguments, words", [
    ((5,), "5 bits: give 8 or 4"), ((16,), "16 bits"), ((8, 32), "int8 has one scale a row"),
    ((8, None, True), "int8 has one scale a row"), ((4,), "the group size is None: give one of 32, 64, 128, 256"),
    ((4, 48), "the group size is 48"), ((4, 0), "the group size is 0"),
])  # fmt: skip
def test_schemes_that_there_are_not(arguments, words):
    with pytest.raises(InputError, match=words) as caught:
        Scheme(*arguments)
    assert "\n" not in str(caught.value)


@each_scheme
def test_what_is_no_number_has_no_code(scheme):
    for bad in (torch.nan, torch.inf, -torch.inf):
        weight = random(3, 40)
        weight[1, 39] = bad
        with pytest.raises(InputError, match="infinite"):
            scheme(weight)


# ---------------------------------------------------------------- products


@each_scheme
@pytest.mark.parametrize("N, K", SHAPES)
def test_each_way_computes_the_product(scheme, N, K):
    """In float32, to the rounding of its sums; where x is rounded, to the rounding of the sums after that."""
    weight = some(scheme, N, K)
    for way, most in ways_of(weight):
        tensors = way.pack(weight)
        for rows in (*range(1, 10), 20, 100):
            x = random(rows, K, seed=rows)
            x[:, ::5] *= 10
            assert roundings(way(x, tensors), weight, x, way.rounds) <= most, (type(way).__name__, way.rounds, rows)


@each_scheme
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_way_in_16_bits(scheme, dtype):
    """The same, and then the result is rounded. `Plain` rounds the weight, too, so it may be off by half a bit of each term."""
    for N, K in SHAPES:
        weight = some(scheme, N, K)
        for way, most in ways_of(weight):
            tensors = way.pack(weight)
            most = torch.finfo(dtype).eps / ROUNDING if type(way) is Plain else most
            for rows in (1, 2, 5, 8, 9, 20):
                x = random(rows, K, seed=rows).to(dtype)
                assert roundings(way(x, tensors), weight, x, way.rounds) <= most, (type(way).__name__, way.rounds, N, K, rows)


@each_scheme
def test_any_shape_of_x(scheme, both):
    linear = QuantizedLinear(96, 48, scheme=scheme, exact=True)
    linear.set_weight(random(48, 96))
    for shape in ((96,), (1, 96), (2, 1, 96), (2, 3, 4, 96), (0, 96), (3, 0, 96)):
        for dtype in DTYPES:
            y = linear(random(*shape, dtype=dtype))
            assert y.shape == (*shape[:-1], 48) and y.dtype == dtype
    whole = random(5, 4, 96)
    tall, wide = random(96, 5).T, random(6, 2 * 96)
    turned = whole.transpose(0, 1)
    for x in (turned, whole[:, 1:3], whole[::2], tall, wide[:, ::2], wide[:, 96:], tall[:, None].expand(5, 3, 96)):
        assert relative_error(linear(x), linear(x.contiguous())) < (1e-30 if both == "C++" else 1e-6)


@each_scheme
def test_every_code_in_every_place(scheme):
    """All codes there are, from the least on, read one by one: x picks a column, and scales are powers of two."""
    N, K, middle = 19, 300, 2 ** (scheme.bits - 1)
    codes = torch.arange(N * K).view(N, K) * 7 % (2 * middle) - middle
    groups = 1 if scheme.bits == 8 else -(-K // scheme.groupsize)
    scales = 2.0 ** (torch.arange(N * groups) % 5 - 2).view(N, groups)
    zeros = (torch.arange(N * groups) % 3 - 1.0).view(N, groups).bfloat16() if scheme.asymmetric else None
    weight = Quantized(pack(codes.to(torch.int8), scheme.bits), scales.bfloat16(), zeros, scheme.bits, scheme.groupsize or K, K)
    exact, _ = meant(weight)
    for way, most in ways_of(weight):
        tensors, x = way.pack(weight), torch.eye(K)
        found = way(x, tensors)
        if not way.rounds:
            assert torch.equal(found.double(), exact.T), type(way).__name__
        assert roundings(found, weight, x, way.rounds) <= most
        for signs in (torch.ones(K), -torch.ones(K), torch.ones(K).index_fill(0, torch.arange(0, K, 3), -1)):
            assert roundings(way(signs[None], tensors), weight, signs[None], way.rounds) <= most


@needs_kernels
@each_scheme
def test_a_row_does_not_know_how_many_come_with_it(scheme):
    """Bit by bit the same alone, in any batch, and with any number of threads."""
    weight, x = some(scheme, 700, 300), random(20, 300)
    before = torch.get_num_threads()
    for way in blocks_of(weight):
        tensors = way.pack(weight)
        together = way(x, tensors)
        for rows in range(1, 20):
            assert torch.equal(way(x[:rows], tensors), together[:rows])
            assert torch.equal(way(x[rows:], tensors), together[rows:])
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                assert torch.equal(way(x, tensors), together) and torch.equal(way(x[:1], tensors), together[:1])
        finally:
            torch.set_num_threads(before)


@each_scheme
def test_numbers_of_any_size(scheme):
    """Rows of 1e-30, 1e30 and nothing beside each other, and one large number among small ones."""
    weight = some(scheme)
    x = random(6, 100, seed=3)
    x[0] *= 1e-30
    x[1] *= 1e30
    x[2] = 0
    x[3, 50] = 1e20
    x[4, 64:96] = 0
    for dtype in DTYPES:
        given = x.to(dtype)
        for way, most in ways_of(weight):
            most = torch.finfo(dtype).eps / ROUNDING if type(way) is Plain and dtype != torch.float32 else most
            found = way(given, way.pack(weight))
            assert found[2].eq(0).all() and roundings(found, weight, given, way.rounds) <= most, type(way).__name__
    for tiny in (1e-36, 1e-37, 1e-38, 1e-40, 1e-45):  # less than float32 is good for: no more than nothing, and not none
        given = random(2, 100).abs().clamp(0.5, 1) * tiny
        for way, _ in ways_of(weight):
            exact, size = product(weight, given)
            assert ((way(given, way.pack(weight)) - exact).abs() <= size + 1e-44).all()


@each_scheme
def test_what_is_no_number_stays_none(scheme):
    """Wherever F.linear has no number or none that is finite, there is none; other rows of x are left alone."""
    weight, x = some(scheme, 20, 70), random(9, 70).abs() + 1
    for way, _ in ways_of(weight):
        tensors = way.pack(weight)
        sound = way(x, tensors)
        for place in (0, 31, 33, 69):
            bad = x.clone()
            bad[1, place], bad[4, place], bad[7, place] = torch.inf, torch.nan, -torch.inf
            found, expected = way(bad, tensors), F.linear(bad, weight.dequantize())
            assert not found[[1, 4, 7]][~expected[[1, 4, 7]].isfinite()].isfinite().any()
            rest = [0, 2, 3, 5, 6, 8]
            assert torch.equal(found[rest], sound[rest]), type(way).__name__
            if not way.rounds and weight.zeros is None:  # the same ones: infinite with its sign, or none
                assert torch.equal(found.isnan(), expected.isnan())
                assert torch.equal(found[found.isinf()], expected[expected.isinf()])


@each_scheme
def test_a_scale_that_is_no_number_spoils_its_row_alone(scheme):
    weight, x = some(scheme, 40, 300), random(5, 300)
    bad = weight.map(torch.clone)
    bad.scales[17, -1] = torch.nan
    bad.scales[39, 0] = torch.inf
    for (way, _), (other, _) in zip(ways_of(weight), ways_of(bad)):
        sound, found = way(x, way.pack(weight)), other(x, other.pack(bad))
        assert found[:, 17].isnan().all() and not found[:, 39].isfinite().any()
        rest = [n for n in range(40) if n not in (17, 39)]
        assert torch.equal(found[:, rest], sound[:, rest])


@needs_rounding
def test_what_rounding_costs():
    """Each number is off by half a step of 255 at most. And off it is: else nothing here would be rounded."""
    weight, x = some(Scheme(8), 64, 512), random(8, 512)
    way = Blocks(weight, exact=False)
    exact, size = product(weight, x)
    half = x.unflatten(-1, (-1, 32)).abs().amax(dim=-1).repeat_interleave(32, dim=-1) / 254
    error = (way(x, way.pack(weight)) - exact).abs()
    assert way.rounds and (error <= half.double() @ meant(weight)[1].T + 6 * ROUNDING * size).all()
    assert error.mean() > 1e-3 * exact.abs().mean()


# ---------------------------------------------------------------- what does not fit


def call(x, weight, N, exact=True):
    return torch.ops.llamabook.quantized_linear(x, weight, N, exact)


def packed(scheme, N=40, K=100):
    weight = some(scheme, N, K)
    return Blocks(weight, True).pack(weight)


def without(items, place):
    return [item for i, item in enumerate(items) if i != place]


@needs_kernels
@some_schemes
def test_tensors_that_do_not_fit_are_refused(scheme):
    x, weight, N = random(2, 100), packed(scheme), 40
    codes, scales = weight[:2]
    assert call(x, weight, N).shape == (2, N)
    for bad in (x.double(), x.half(), x.long(), x.bool(), x[0], x[None], F.pad(x, (0, 500)), torch.tensor(1.0)):
        with pytest.raises(RuntimeError):
            call(bad, weight, N)
    for bad in (0, -1, 16, 32, 49, 64, 2**40, -(2**62)):
        with pytest.raises(RuntimeError, match="don't fit"):
            call(x, weight, bad)
    for bad in ([], [codes], [codes, scales, scales, scales], [scales, codes], *(without([*weight, scales], i) for i in (0,))):
        with pytest.raises(RuntimeError):
            call(x, bad, N)
    of_codes = (
        codes.view(torch.int8), codes.int(), codes.flatten(1), codes.flatten(), codes[None, None], codes[:, :-1], codes[:-1],
        codes[..., :-4], codes[..., ::2], codes.transpose(0, 1), torch.cat([codes, codes]), codes[:0], torch.tensor(1).byte(),
    )  # fmt: skip
    of_tables = (
        scales.float(), scales.half(), scales.view(torch.int16), scales[0], scales[..., :8], scales[:-1], scales[:0],
        scales[:, :0], scales[:, :, :0], torch.cat([scales, scales]), torch.cat([scales] * 7, dim=1), scales.mT, scales[None],
        scales.mT.contiguous().mT[..., ::2], torch.tensor(1.0).bfloat16(),
    )  # fmt: skip
    for bad in of_codes:
        with pytest.raises(RuntimeError):
            call(x, [bad, *weight[1:]], N)
    for place in range(1, len(weight)):
        for bad in of_tables:
            if bad.numel() != scales.numel() or not bad.is_contiguous() or bad.dtype != scales.dtype or place == 1:
                with pytest.raises(RuntimeError):
                    call(x, [*weight[:place], bad, *weight[place + 1 :]], N)


SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 16, 64]), min_size=0, max_size=5)
KINDS = st.sampled_from([torch.uint8, torch.int8, torch.bfloat16, torch.float32, torch.int64])


@st.composite
def tensors(draw):
    x = torch.zeros(draw(SIZES), dtype=draw(KINDS))
    return x.transpose(0, -1) if x.dim() > 1 and draw(st.booleans()) else x


@st.composite
def nearly_right(draw):
    """Blocks that fit, or would but for one number."""
    blocks, groups, each, bits = (draw(st.sampled_from(n)) for n in ((1, 2), (1, 3), (32, 64, 128), (8, 4)))
    width = groups * each
    codes = torch.zeros((blocks, width // 4, 64) if bits == 8 else (blocks, groups, each // 8, 64), dtype=torch.uint8)
    x = torch.zeros(draw(st.integers(0, 10)), width + draw(st.integers(-3, 3)), dtype=draw(st.sampled_from(DTYPES)))
    more = [draw(st.sampled_from([0, 0, 0, 1, -1])) for _ in range(draw(st.sampled_from([1, 2])))]
    tables = [torch.zeros(blocks, groups + m, 16).bfloat16() for m in more]
    return x, [codes, *tables], 16 * blocks + draw(st.integers(-17, 2))


@needs_kernels
@settings(deadline=None, max_examples=300)
@given(
    arguments=st.one_of(
        st.tuples(tensors(), st.lists(tensors(), max_size=4), st.sampled_from([-1, 0, 1, 16, 2**62])), nearly_right()
    ),
    exact=st.booleans(),
)
def test_whatever_is_given_is_multiplied_or_refused(arguments, exact):
    """What passes the checks has the right shape; nothing else happens, and nothing ends the process."""
    x, weight, N = arguments
    if weight and weight[0].numel() == 0:
        return  # the next test
    try:
        y = call(x, weight, N, exact)
    except RuntimeError:
        return
    assert y.shape == (len(x), N) and y.dtype == x.dtype and y.eq(0).all()
    assert x.dtype in DTYPES and 16 * (len(weight[1]) - 1) < N <= 16 * len(weight[1])
    assert weight[0].dtype == torch.uint8 and {table.dtype for table in weight[1:]} == {torch.bfloat16}


@needs_kernels
def test_codes_of_no_columns_are_refused():
    for shape in ((1, 0, 64), (1, 1, 0, 64)):
        with pytest.raises(RuntimeError):
            call(torch.zeros(2, 0), [torch.zeros(shape, dtype=torch.uint8), torch.zeros(1, 1, 16).bfloat16()], 16)


@some_schemes
def test_x_of_another_width_is_refused(scheme, both):
    linear = QuantizedLinear(96, 48, scheme=scheme)
    linear.set_weight(random(48, 96))
    for K in (95, 97, 64, 48, 192, 1):
        with pytest.raises(RuntimeError):
            linear(random(2, K))


# ---------------------------------------------------------------- which way, and torch's operators


@each_scheme
def test_the_way_that_a_weight_takes(scheme, monkeypatch):
    """Ours where there are kernels, torch's operators where they can be trusted, and the formula elsewhere."""
    stocks, plains = (0, 0)
    for N, K in [*SHAPES, (48, 512)]:
        weight = some(scheme, N, K)
        if kernels.ready():
            assert type(choose(weight)) is Blocks and choose(weight).rounds == kernels.rounds_activations()
            assert type(choose(weight, exact=True)) is Blocks and not choose(weight, exact=True).rounds
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "_loaded", False)
            way = choose(weight)
        fits = K % 16 == 0 if scheme.bits == 8 else N % 16 == 0 and K % scheme.groupsize == 0
        assert type(way) is (Stock if fits else Plain) and not way.rounds, (N, K)
        stocks, plains = stocks + fits, plains + (not fits)
        assert type(choose(weight.map(lambda tensor: tensor.to("meta")))) is Plain
    assert stocks and plains


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_never_reads_past_the_end(dtype, monkeypatch):
    """Its int8 operator does so where K is no multiple of 16: then it must not be called. Where it is, it must."""
    monkeypatch.setattr(kernels, "_loaded", False)
    for K in (*range(1, 35), 48, 100):
        linear = QuantizedLinear(K, 16, scheme=Scheme(8))
        linear.set_weight(random(16, K))
        with Names() as calls:
            linear(random(3, K).to(dtype))
        assert ("_weight_int8pack_mm" in calls.names) == (K % 16 == 0), K


def test_groups_that_torch_does_not_know(monkeypatch):
    """int4 in groups of 16, int8 in groups: no scheme makes these, but a file may have them. The formula knows all."""
    monkeypatch.setattr(kernels, "_loaded", False)
    x = random(3, 64)
    for bits, groupsize in ((4, 16), (4, 8), (8, 32), (8, 16)):
        codes = torch.arange(32 * 64).view(32, 64) * 7 % 2**bits - 2 ** (bits - 1)
        scales = random(32, 64 // groupsize).bfloat16()
        weight = Quantized(pack(codes.to(torch.int8), bits), scales, None, bits, groupsize, 64)
        way = choose(weight)
        assert type(way) is Plain and roundings(way(x, way.pack(weight)), weight, x) < 16


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    device = property(lambda self: torch.device("cuda"))


def int4pack(halves, inner_k_tiles):
    """As CUDA's: bytes (N, K / 2), in each the even column's code, from 0 to 15, above the odd one's."""
    assert halves.dtype == torch.uint8 and halves.shape[0] % 8 == 0 and 2 * halves.shape[1] % (16 * inner_k_tiles) == 0
    return torch.stack([halves >> 4, halves & 15], dim=-1).flatten(1)


def int4pack_mm(x, codes, groupsize, tables):
    """As CUDA's: (code - 8) * scale + zero, tables (groups, N, 2), all in bf16."""
    assert x.dtype == tables.dtype == torch.bfloat16 and tables.is_contiguous() and groupsize in GROUP_SIZES
    scales, zeros = (table.repeat_interleave(groupsize, dim=0).float() for table in tables.unbind(-1))  # (K, N)
    return (x.float() @ ((codes.T.float() - 8) * scales + zeros)).bfloat16()


@pytest.mark.parametrize("scheme", SCHEMES[1:], ids=name)
def test_what_a_gpu_is_given(scheme, monkeypatch):
    """The order of the halves and the tables, with CUDA's two operators written as torch's own tests document them."""
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", int4pack, raising=False)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", int4pack_mm, raising=False)
    monkeypatch.setattr(Stock, "check", lambda *arguments: None)
    here = some(scheme, 24, 512)
    there = here.map(lambda tensor: tensor.as_subclass(Elsewhere))
    way = choose(there)
    assert type(way) is Stock and type(choose(some(scheme, 20, 512).map(lambda t: t.as_subclass(Elsewhere)))) is Plain
    assert type(choose(some(scheme, 24, 320).map(lambda t: t.as_subclass(Elsewhere)))) is Plain
    x = random(2, 3, 512).bfloat16()
    found = way(x.as_subclass(Elsewhere), way.pack(there)).as_subclass(torch.Tensor)
    assert roundings(found.flatten(0, 1), here, x.flatten(0, 1)) < 8


def test_int8_on_a_gpu():
    """A product that torch.compile fuses: codes in x's dtype, and the scales afterwards."""
    here, x = some(Scheme(8), 21, 70), random(4, 70)
    there = here.map(lambda tensor: tensor.as_subclass(Elsewhere))
    way = choose(there)
    found = way(x.as_subclass(Elsewhere), way.pack(there)).as_subclass(torch.Tensor)
    assert type(way) is Stock and roundings(found, here, x) < 16


def test_an_operator_that_changed_its_mind_is_found_out(monkeypatch):
    monkeypatch.setattr(packing, "_checked", set())
    weight, other = some(Scheme(4, 32), 32, 128), Scheme(4, 32)(random(32, 128, seed=1))
    way = Stock(weight)
    with pytest.raises(LlamaBookError, match=r"multiplies int4 otherwise on cpu: load with device='cpu'"):
        way.check(weight, way.pack(other))
    way.check(weight, way.pack(weight))
    way.check(weight, way.pack(other))  # once for each kind is enough


@some_schemes
def test_a_switch_turns_the_kernels_off(scheme, monkeypatch):
    monkeypatch.setenv("LLAMABOOK_KERNELS", "0")
    monkeypatch.setattr(kernels, "_loaded", None)
    for K, kind in ((64, Stock), (70, Plain)):
        linear, weight, x = QuantizedLinear(K, 32, scheme=scheme), random(32, K), random(9, K)
        linear.set_weight(weight)
        assert type(linear.way) is kind and not linear.for_layer() and not kernels.rounds_activations()
        assert roundings(linear(x), scheme(weight), x) < 16


# ---------------------------------------------------------------- compiling


@needs_kernels
@some_schemes
def test_the_operators_keep_torchs_rules(scheme):
    for dtype in DTYPES:
        arguments = (random(3, 100, dtype=dtype), packed(scheme), 40, False)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.llamabook.quantized_linear.default, arguments, test_utils=checks)
    block, inputs = a_layer(*LAYERS[0], torch.float32)
    x, cos, sin, input_pos, keys, values = inputs
    block, _ = quantize(block, [scheme] * 4)
    weights = block.for_layers(x, keys, values)
    arguments = (x, cos, sin, input_pos, [keys], [values], weights, *block.settings())
    torch.library.opcheck(torch.ops.llamabook.layers.default, arguments, test_utils=checks)


@pytest.mark.parametrize("scheme", FEW_SCHEMES[::2], ids=name)
def test_one_graph_for_any_number_of_rows(scheme, both):
    linear = QuantizedLinear(128, 48, scheme=scheme)
    linear.set_weight(random(48, 128))
    torch._dynamo.reset()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (1, 3, 30):
        x = random(rows, 2, 128, dtype=torch.bfloat16)
        with torch.no_grad():
            assert torch.equal(compiled(x), linear(x))
    torch._dynamo.reset()


@needs_kernels
def test_a_quantized_block_is_one_graph():
    block, inputs = a_layer(*LAYERS[1], torch.float32)
    block, _ = quantize(block, MIXED[0])
    torch._dynamo.reset()
    compiled, outputs = torch.compile(block, backend="aot_eager", fullgraph=True), []
    for forward in (compiled, block):
        given = copies(inputs, torch.float32)
        with torch.no_grad():
            outputs.append([forward(*given), given[4], given[5]])
    assert all(map(torch.equal, *outputs))
    torch._dynamo.reset()


# ---------------------------------------------------------------- the module


@each_scheme
def test_a_quantized_linear(scheme, both):
    weight, x = random(48, 128), random(3, 5, 128)
    linear = QuantizedLinear(128, 48, torch.bfloat16, scheme, exact=True)
    linear.set_weight(torch.nn.Parameter(weight))
    assert relative_error(linear(x), x.double() @ meant(scheme(weight))[0].T) < 1e-6
    assert not linear.state_dict() and not list(linear.parameters()) and not linear(x).requires_grad
    assert linear.tensors() and (linear.for_layer() == linear.tensors()) == (both == "C++")
    twin = copy.deepcopy(linear)
    linear.set_weight(2 * weight)
    assert relative_error(linear(x), 2 * twin(x)) < 1e-6
    other = QuantizedLinear(128, 48, exact=True)  # without a scheme, as a loader builds it
    other.set_quantized(scheme(weight))
    assert torch.equal(other(x), twin(x))


def test_another_weight_leaves_nothing_of_the_last():
    linear = QuantizedLinear(64, 32)
    for scheme in (Scheme(4, 32, asymmetric=True), Scheme(8)):
        linear.set_quantized(some(scheme, 32, 64))
        assert len(list(linear.buffers())) == len(linear.tensors())


@needs_rounding
def test_exact_is_a_choice():
    weight, x = random(48, 128), random(3, 128)
    outputs = []
    for exact in (True, False):
        linear = QuantizedLinear(128, 48, scheme=Scheme(8), exact=exact)
        linear.set_weight(weight)
        assert roundings(linear(x), Scheme(8)(weight), x, rounds=not exact) < 6
        outputs.append(linear(x))
    assert not torch.equal(*outputs)


@each_scheme
def test_shapes_without_memory(scheme):
    """A model is built on the meta device first: then there are no numbers to quantize."""
    with torch.device("meta"):
        linear = QuantizedLinear(64, 32, scheme=scheme)
        linear.set_weight(torch.empty(32, 64))
        assert linear.tensors() == []
        like = Quantized(
            torch.empty(32, 2 * scheme.bits, dtype=torch.int32), torch.empty(32, 2, dtype=torch.bfloat16), None,
            scheme.bits, 32, 64,
        )  # fmt: skip
        linear.set_quantized(like)
        assert linear(torch.empty(2, 3, 64)).shape == (2, 3, 32)
    linear.set_weight(random(32, 64))
    assert linear(random(2, 64)).shape == (2, 32)


# ---------------------------------------------------------------- a layer in one call

MIXED = [  # how wqkv, wo, w13 and w2 are kept; None: as they are
    [Scheme(4, 32, asymmetric=True), Scheme(8), None, Scheme(4, 64)],
    [None, Scheme(4, 32), Scheme(8), Scheme(4, 128, asymmetric=True)],
    [Scheme(8), None, Scheme(4, 256), None],
    [Scheme(8)] * 4,
    [Scheme(4, 32)] * 4,
]
FEW_LAYERS = LAYERS[:4]
each_mixture = pytest.mark.parametrize("schemes", MIXED, ids=lambda schemes: ", ".join(map(name, schemes)))


def quantize(block, schemes, exact=True):
    """(the block with its matrices kept so, the block in float64 with the numbers that these mean)."""
    block, truth = copy.deepcopy(block), copy.deepcopy(block).double()
    for scheme, path in zip(schemes, ("attention.wqkv", "attention.wo", "feed_forward.w13", "feed_forward.w2")):
        if scheme:
            part, weight = path.split("."), block.get_submodule(path).weight
            linear = QuantizedLinear(*reversed(weight.shape), scheme=scheme, exact=exact)
            linear.set_weight(weight)
            setattr(block.get_submodule(part[0]), part[1], linear)
            truth.get_submodule(path).weight.copy_(meant(scheme(weight))[0])
    return block, truth


@needs_kernels
@each_mixture
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_is_the_sum_of_its_parts_in_float64(schemes, dtype):
    for sizes in FEW_LAYERS:
        block, inputs = a_layer(*sizes, dtype)
        block, truth = quantize(block, schemes)
        assert block.for_layers(inputs[0], *inputs[4:])
        exact = copies(inputs, torch.float64)
        expected = truth(*exact)
        close(block(*inputs), expected, dtype, roundings=8)
        close(inputs[4], exact[4], dtype, roundings=3)
        close(inputs[5], exact[5], dtype, roundings=3)


@needs_kernels
@each_mixture
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_is_what_its_parts_are(schemes, exact, dtype, monkeypatch):
    """In one call and part by part: float32 to its rounding, bf16 bit by bit but for a few. Both round x, or none does."""
    called, layers = [], kernels.layers
    monkeypatch.setattr(kernels, "layers", lambda *inputs: called.append(1) or layers(*inputs))
    for sizes in FEW_LAYERS:
        block, inputs = a_layer(*sizes, dtype)
        block, _ = quantize(block, schemes, exact)
        again = copies(inputs, dtype)
        whole = block(*inputs)
        assert called.pop()
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "takes_layer", lambda *inputs: False)
            parts = block(*again)
        assert not called
        if dtype == torch.float32:
            for found, expected in ((whole, parts), (inputs[4], again[4]), (inputs[5], again[5])):
                assert relative_error(found, expected) < 3e-6
        else:
            assert (whole != parts).float().mean() < 0.02 and (inputs[4] != again[4]).float().mean() < 0.01


@needs_kernels
@each_mixture
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_layer_does_not_know_the_others(schemes, dtype):
    block, inputs = a_layer(*LAYERS[2], dtype)
    for exact in (True, False):
        quantized, _ = quantize(block, schemes, exact)
        alone = [quantized(*(part[row : row + 1] for part in copies(inputs, dtype))) for row in range(8)]
        assert torch.equal(quantized(*copies(inputs, dtype)), torch.cat(alone))


@needs_kernels
def test_a_layer_of_codes_that_do_not_fit_is_refused():
    block, inputs = a_layer(*LAYERS[1], torch.float32)
    block, _ = quantize(block, MIXED[4])
    norms = block.norm1.weight, block.norm2.weight

    def call(given=matrices(block), heads=block.heads, hidden=block.hidden):
        return layer(*copies(inputs, torch.float32), norms, given, heads, hidden, 0.1)

    call()
    bad_ones = (
        lambda m: m[:1], lambda m: [*m, m[1], m[1]], lambda m: [m[0][:-1], m[1][:-1]], lambda m: [m[0], m[1].float()],
        lambda m: [m[0][:, :-1].contiguous(), m[1][:, :-1].contiguous()], lambda m: [m[0].int(), m[1]], lambda m: [*m, m[0]],
    )  # fmt: skip
    for bad in bad_ones:
        for wrong in others(matrices(block), bad):
            with pytest.raises(RuntimeError):
                call(wrong)
    for heads in (1, 2, 8, 0, -4):
        with pytest.raises(RuntimeError):
            call(heads=heads)
    for hidden in (0, -16, block.hidden + 16, block.hidden - 16, block.hidden + 1):
        with pytest.raises(RuntimeError):
            call(hidden=hidden)


@needs_kernels
def test_a_layer_of_no_rows_is_empty():
    block, inputs = a_layer(*LAYERS[1], torch.float32)
    none, norms = [part[:0] for part in inputs], (block.norm1.weight, block.norm2.weight)
    assert layer(*none, norms, matrices(block), block.heads, block.hidden, 0.1).shape == none[0].shape


# ---------------------------------------------------------------- a whole model

LENGTH = 230


@pytest.fixture(scope="module")
def models():
    """(a Llama, texts (2, LENGTH), {scheme: its logits with the numbers that the codes mean, uncached, in float64})."""
    llama, idx, expected = random_weights(Llama3Model(SHORT)).bfloat16().float().eval(), token_ids(SHORT, LENGTH, 2), {}
    for scheme in FEW_SCHEMES:
        truth = copy.deepcopy(llama).double()
        truth.out_head.weight = torch.nn.Parameter(truth.out_head.weight.detach().clone())  # the look-up stays exact
        with torch.no_grad():
            for path, module in truth.named_modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.copy_(meant(scheme(llama.get_submodule(path).weight))[0])
            expected[scheme] = truth(idx)
    return llama, idx, expected


PIECES = [[LENGTH], [1] * LENGTH, [4] * 57 + [2], [100, 8, 1, 7, 114]]


@some_schemes
def test_a_quantized_model_is_its_matrices_however_it_is_read(scheme, models, both):
    """At once, token by token, in layers of one call, in chunks: uncached = cached = chunked = batched."""
    llama, idx, expected = models
    model = from_llama(llama, partial(QuantizedLinear, scheme=scheme, exact=True))
    assert torch.equal(model.embedding.weight, llama.tok_emb.weight)
    for pieces in PIECES if both == "C++" else [[LENGTH - 20, *[1] * 20], *PIECES[2:]]:
        assert relative_error(read(model, idx, pieces), expected[scheme]) < 2e-5, pieces
    assert relative_error(read(model, idx[1:], PIECES[2]), expected[scheme][1:]) < 2e-5


@needs_rounding
@some_schemes
def test_a_model_that_rounds_is_near_and_the_same_in_any_batch(scheme, models):
    llama, idx, expected = models
    model = from_llama(llama, partial(QuantizedLinear, scheme=scheme))
    together = read(model, idx, [1] * LENGTH)
    assert torch.equal(torch.cat([read(model, idx[row : row + 1], [1] * LENGTH) for row in range(2)]), together)
    for pieces in PIECES:
        error = (read(model, idx, pieces) - expected[scheme]).norm() / expected[scheme].norm()
        assert 1e-4 < error < 0.1, pieces


@some_schemes
def test_a_quantized_model_in_bfloat16(scheme, models, both):
    llama, idx, expected = models
    model = from_llama(llama, partial(QuantizedLinear, scheme=scheme, exact=True), dtype=torch.bfloat16)
    dense = from_llama(llama, dtype=torch.bfloat16)
    with torch.no_grad():
        usual = (read(dense, idx, [LENGTH]).double() - llama(idx)).norm() / llama(idx).norm()
    for pieces in PIECES[2:]:
        logits = read(model, idx, pieces)
        assert logits.dtype == torch.bfloat16
        assert (logits - expected[scheme]).norm() / expected[scheme].norm() < 1.5 * usual


# ---------------------------------------------------------------- mistakes that these tests must notice

MISTAKES = {  # what the kernels say, what they say then; the last ones are of the path that rounds x
    "codes in 8 bits are read with a sign": ("(Ints)(codes >> 8 * j & 255)", "(Ints)(codes << (24 - 8 * j)) >> 24"),
    "the middle is one off": ("- float(MIDDLE)) * x", "- float(MIDDLE - 1)) * x"),
    "even and odd columns are exchanged": ("ORDER[8] = {0, 2, 4, 6, 1, 3, 5, 7}", "ORDER[8] = {1, 3, 5, 7, 0, 2, 4, 6}"),
    "halves of a byte follow each other": ("ORDER[8] = {0, 2, 4, 6, 1, 3, 5, 7}", "ORDER[8] = {0, 1, 2, 3, 4, 5, 6, 7}"),
    "the upper half of a byte is read twice": (", first &= 0x0f0f0f0f;", ", first = second;"),
    "the first group's scale for all": ("g++, scales += TALL)", "g++)"),
    "zeros are ignored": ("for (int p = 0; zeros && p < PARTS; p++)", "for (int p = 0; zeros && p < 0; p++)"),
    "the first group's zero for all": ("load(zeros + g * TALL + p * LANES)", "load(zeros + p * LANES)"),
    "the first row's sum for all": ("p * LANES) * x.sums[i + t]", "p * LANES) * x.sums[i]"),
    "the last number of x is left out": ("for (int64_t j = 0; k + j < K; j++)", "for (int64_t j = 0; k + j + 1 < K; j++)"),
    "the last row of the last block is left out": ("(TALL, N - block * TALL); r++", "(TALL, N - block * TALL - 1); r++"),
    "all tiles write the first rows": ("y + (tile * MOST + t) * N", "y + t * N"),
    "the last blocks are left out": ("block < end; block++", "block + 1 < end; block++"),
    "x may be wider than the codes": (" && w.K >= K && ", " && "),
    "a layer never rounds x": ("rows, N, width, weights.exact)", "rows, N, width, true)"),
    "a layer always rounds x": ("rows, N, width, weights.exact)", "rows, N, width, false)"),
    "rounding ignores the middle": (": -middle * total;", ": 0;"),
    "the first row's step for all": ("* x.scales[i + t]", "* x.scales[i]"),
    "x is rounded towards zero": ("= __builtin_rintf(x[i] * turns)", "= x[i] * turns"),
    "rounded columns keep their order": ("middle == 8 ? every_other(eight) : eight,", "eight,"),
    "x without a sign, codes with one": ("_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(x))", "_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(x), (__m512i)codes)"),
    "what is no number is rounded to one": ("      scales[t] += add_up(odd);\n", ""),
    "exact and rounded are exchanged": ("exact ? multiply_codes<Exact>", "!exact ? multiply_codes<Exact>"),
}  # fmt: skip
ONLY_ROUNDING = list(MISTAKES)[list(MISTAKES).index("a layer never rounds x") :]


@pytest.mark.long
@needs_kernels
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_known_mistake_is_noticed(mistake, tmp_path):
    if mistake in ONLY_ROUNDING and not kernels.rounds_activations():
        pytest.skip("this CPU has no path that rounds x")
    is_noticed(*MISTAKES[mistake], __file__, tmp_path)
