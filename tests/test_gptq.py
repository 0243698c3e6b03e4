"""GPTQ against the textbook: optimal brain quantization, one column after the other, with the inverse written out."""

import math

import pytest
import torch

from llamabook.errors import InputError
from llamabook.fast.quantize import gptq as module
from llamabook.fast.quantize.gptq import Hessian, column_blocks, gptq, inverse_factor
from llamabook.fast.quantize.weight import Scheme

SCHEMES = [Scheme(4, 32), Scheme(4, 64), Scheme(4, 32, asymmetric=True), Scheme(4, 128, asymmetric=True), Scheme(8)]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(n, K, seed=1):
    """(n, K) that depend on each other, some much larger than others: as what comes out of a layer."""
    mix = torch.eye(K) + 2 * numbers(K, K, seed=seed + 1) / math.sqrt(K)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    return numbers(n, K, seed=seed) @ mix * torch.logspace(-1, 1, K)[order]


def hessian_of(x, dtype=torch.float64):
    hessian = Hessian(x.shape[1], dtype)
    for part in x.split(100):
        hessian.add(part)
    return hessian.matrix()


def damped(H, percdamp=0.01):
    return H.double() + percdamp * H.double().diagonal().mean() * torch.eye(len(H))


def grid(weight, scheme):
    """Of one group of a row: scale and zero, as the book's first quantizers choose them, in Python's numbers."""
    if scheme.bits == 8:
        scale = weight.abs().max() / 127
    elif scheme.asymmetric:
        scale = (weight.max() - weight.min()) / 15
    else:
        scale = weight[weight.abs().argmax()] / -8
    scale = scale.float().bfloat16().double()
    scale = scale if scale != 0 else torch.ones(()).double()
    zero = (weight.min() + 8 * scale).float().bfloat16().double() if scheme.asymmetric else 0 * scale
    return scale, zero


def textbook(weight, H, scheme, percdamp=0.01, order=None):
    """What is meant (N, K), and the codes, float64: row by row, the inverse of what is left found anew for each column.

    Eq. 2 of the paper: the weights that are left change by -(w - q) / [H^-1]_qq times the inverse's row, where H is that
    of the columns that are left, and q the first of them.
    """
    N, K = weight.shape
    groupsize, order = scheme.groupsize or K, list(range(K)) if order is None else order.tolist()
    static = order != sorted(order)
    H, meant, codes = damped(H, percdamp), torch.zeros(N, K).double(), torch.zeros(N, K).double()
    inverses = [torch.linalg.inv(H[order[j:]][:, order[j:]]) for j in range(K)]
    for n in range(N):
        row, grids = weight[n].double().clone(), {}
        if static:
            grids = {g: grid(row[g * groupsize : (g + 1) * groupsize], scheme) for g in range(-(-K // groupsize))}
        for j, column in enumerate(order):
            if column // groupsize not in grids:
                grids[column // groupsize] = grid(row[column : column + groupsize], scheme)
            scale, zero = grids[column // groupsize]
            least = -127 if scheme.bits == 8 else -8
            codes[n, column] = ((row[column] - zero) / scale).round().clamp(least, 127 if scheme.bits == 8 else 7)
            meant[n, column] = codes[n, column] * scale + zero
            row[order[j:]] -= (row[column] - meant[n, column]) / inverses[j][0, 0] * inverses[j][0]
    return meant, codes


def cost(weight, meant, x):
    """The mean square that the outputs are off by."""
    return ((weight.double() - meant.double()) @ x.double().T).square().mean().item()


def share(found, wanted):
    """The share of numbers that differ."""
    return (found.double() != wanted.double()).double().mean().item()


def names(scheme):
    return f"{scheme}{'a' if scheme.asymmetric else ''}"


# --- the Hessian ---


def test_hessian_is_the_mean_of_all_inputs_however_they_come(monkeypatch):
    monkeypatch.setattr(module, "TILE", 7)
    x = inputs(60, 24)
    hessian = Hessian(24, torch.float64)
    for part in (x[:1], x[1:33].reshape(4, 8, 24), x[33:].bfloat16()):
        hessian.add(part)
    x[33:] = x[33:].bfloat16().float()
    wanted = 2 * torch.stack([torch.outer(row, row) for row in x.double()]).mean(dim=0)
    assert hessian.n == 60 and torch.allclose(hessian.matrix(), wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(hessian.matrix(), hessian.matrix().T)


def test_hessian_is_the_second_derivative_of_the_mean_square():
    x, e = inputs(50, 6).double(), numbers(6).double()
    second = torch.autograd.functional.hessian(lambda e: (x @ e).square().mean(), e)
    assert torch.allclose(hessian_of(x), second)


def test_factor_of_the_inverse():
    H = hessian_of(inputs(300, 40))
    U = inverse_factor(H, 0.05)
    assert U.dtype == torch.float32 and torch.equal(U, U.triu()) and (U.diagonal() > 0).all()
    assert torch.allclose(U.T.double() @ U.double() @ damped(H, 0.05), torch.eye(40).double(), atol=1e-4)


# --- the algorithm ---


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
@pytest.mark.parametrize("act_order", [False, True])
def test_it_is_the_textbook_s(scheme, act_order):
    N, K = 4, 150 if scheme.groupsize == 128 else 90  # the last group is short
    weight, x = numbers(N, K), inputs(400, K)
    H = hessian_of(x)
    order = H.diagonal().argsort(descending=True, stable=True) if act_order else None
    meant, codes = textbook(weight, H, scheme, order=order)
    found = gptq(weight, H, scheme, act_order=act_order)
    assert found.shape == (N, K) and (found.bits, found.groupsize) == (scheme.bits, scheme.groupsize or K)
    assert (found.zeros is not None) == scheme.asymmetric
    assert share(found.codes(), codes) < 0.02  # ties, and what follows from one
    assert cost(weight, found.dequantize(), x) == pytest.approx(cost(weight, meant, x), rel=0.02)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_it_beats_rounding_on_every_row(scheme):
    for seed in range(5):
        weight, x = numbers(16, 128, seed=seed), inputs(500, 128, seed=10 * seed)
        H = hessian_of(x)
        for act_order, bound in ((False, 0.75), (True, 0.55)):
            found = gptq(weight, H, scheme, act_order=act_order)
            assert cost(weight, found.dequantize(), x) < bound * cost(weight, scheme(weight).dequantize(), x)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
@pytest.mark.parametrize("act_order", [False, True])
def test_independent_inputs_are_plain_rounding(scheme, act_order):
    weight, sizes = numbers(7, 90), torch.rand(90, generator=torch.Generator().manual_seed(3)) + 0.1
    for H in (torch.eye(90), torch.diag(sizes)):
        found, wanted = gptq(weight, H, scheme, act_order=act_order), scheme(weight)
        for one, two in ((found.words, wanted.words), (found.scales, wanted.scales), (found.zeros, wanted.zeros)):
            assert (one is None and two is None) or torch.equal(one, two)


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 128), Scheme(4, 256, asymmetric=True), Scheme(8)], ids=names)
@pytest.mark.parametrize("act_order", [False, True])
def test_block_size_does_not_matter(scheme, act_order):
    weight, H = numbers(6, 300), hessian_of(inputs(900, 300), torch.float32)
    wanted = gptq(weight, H, scheme, act_order=act_order, blocksize=300).codes()
    for blocksize in (1, 48, 100, 128, 1000):
        assert share(gptq(weight, H, scheme, act_order=act_order, blocksize=blocksize).codes(), wanted) < 0.001


def test_blocks_are_whole_groups_or_parts_of_one():
    assert column_blocks(10, 2, 5) == [(0, 4), (4, 8), (8, 10)]
    assert column_blocks(10, 8, 3) == [(0, 3), (3, 6), (6, 8), (8, 10)]
    assert column_blocks(10, 10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert column_blocks(5, 32, 128) == [(0, 5)]


def test_rows_know_nothing_of_each_other(monkeypatch):
    weight, H = numbers(20, 64), hessian_of(inputs(200, 64), torch.float32)
    wanted = gptq(weight, H, Scheme(4, 32))
    monkeypatch.setattr(module, "ROWS", 7)
    assert torch.equal(gptq(weight, H, Scheme(4, 32)).words, wanted.words)
    assert torch.equal(gptq(weight[3:5], H, Scheme(4, 32)).words, wanted.words[3:5])


def test_float32_is_enough_and_nothing_given_is_changed():
    weight, x = numbers(16, 256).bfloat16(), inputs(1000, 256)
    exact, H = hessian_of(x), hessian_of(x, torch.float32)
    before = weight.clone(), H.clone()
    assert share(gptq(weight, H, Scheme(4, 64)).codes(), gptq(weight, exact, Scheme(4, 64)).codes()) < 0.02
    assert torch.equal(weight, before[0]) and torch.equal(H, before[1])


# --- inputs that say nothing, or the same twice ---


def test_inputs_that_were_always_0_are_rounded_and_change_nothing():
    weight, x = numbers(5, 128), inputs(400, 128)
    x[:, 32:64] = 0  # a whole group, so that the others are as if it were not there
    rest = torch.arange(128) // 32 != 1
    found, scheme = gptq(weight, hessian_of(x), Scheme(4, 32)), Scheme(4, 32)
    H = hessian_of(x)
    ratio = 96 / 128  # the mean of a diagonal with as many zeros, by which is damped
    alone = gptq(weight[:, rest], H[rest][:, rest], scheme, percdamp=0.01 * ratio)
    assert torch.equal(found.codes()[:, rest], alone.codes())
    assert torch.equal(found.codes()[:, 32:64], scheme(weight).codes()[:, 32:64])
    assert torch.equal(gptq(weight, torch.zeros(128, 128), scheme).words, scheme(weight).words)


def test_fewer_inputs_than_columns(capsys):
    weight, x = numbers(8, 96), inputs(20, 96)
    H = hessian_of(x, torch.float32)
    found = gptq(weight, H, Scheme(4, 32))
    assert cost(weight, found.dequantize(), x) < 0.3 * cost(weight, Scheme(4, 32)(weight).dequantize(), x)
    assert capsys.readouterr().err == ""


def test_a_singular_hessian_is_damped_more_and_that_is_said(capsys):
    x = numbers(50, 1) * numbers(1, 64).double()  # all inputs are one, times a number
    H, weight = hessian_of(x) - 1e-3 * torch.eye(64), numbers(4, 64)
    found = gptq(weight, H, Scheme(4, 32), percdamp=0)
    said = capsys.readouterr().err
    assert said.startswith("llamabook: ") and "percdamp becomes 0.0" in said and said.count("\n") == 1
    assert cost(weight, found.dequantize(), x) < cost(weight, Scheme(4, 32)(weight).dequantize(), x)


# --- bad input ---


@pytest.mark.parametrize("change, what", [
    (lambda ask: ask | {"hessian": torch.eye(63)}, "(4, 64), the Hessian (63, 63)"),
    (lambda ask: ask | {"hessian": torch.ones(64)}, "give (N, K) and (K, K)"),
    (lambda ask: ask | {"weight": torch.ones(64)}, "give (N, K) and (K, K)"),
    (lambda ask: ask | {"weight": torch.full((4, 64), torch.nan)}, "the weight has infinite numbers or NaN"),
    (lambda ask: ask | {"hessian": torch.full((64, 64), torch.inf)}, "the Hessian has infinite numbers or NaN"),
    (lambda ask: ask | {"hessian": -torch.eye(64)}, "no inverse, however much it is damped"),
    (lambda ask: ask | {"percdamp": -0.1}, "percdamp is -0.1"),
    (lambda ask: ask | {"percdamp": math.nan}, "percdamp is nan"),
    (lambda ask: ask | {"percdamp": "much"}, "percdamp is 'much'"),
    (lambda ask: ask | {"blocksize": 0}, "blocksize is 0"),
    (lambda ask: ask | {"blocksize": 12.5}, "blocksize is 12.5"),
])  # fmt: skip
def test_what_it_refuses(change, what):
    ask = {"weight": numbers(4, 64), "hessian": torch.eye(64), "scheme": Scheme(4, 32)}
    with pytest.raises(InputError) as caught:
        gptq(**change(ask))
    assert what in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_hessian_refuses():
    hessian = Hessian(8)
    for x, what in ((torch.ones(3, 9), "9 wide, the Hessian 8"), (torch.full((3, 8), torch.nan), "infinite numbers or NaN")):
        with pytest.raises(InputError, match=what):
            hessian.add(x)
    with pytest.raises(InputError, match="one text at least"):
        hessian.matrix()
