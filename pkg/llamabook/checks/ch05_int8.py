"""Checks of chapter 5's exercises on int8: scales of rows, products of whole numbers, moving a difficulty.

Written by hand. No check calls the package's own functions: each has an oracle of its own, in Python's whole
numbers and float64.
"""

import torch

from llamabook.checks.core import Student, close, exercise, numbers, off_by, require, several, tensor


@exercise("absmax_rows", chapter=5, title="A scale for each row", minutes=8, difficulty="warm-up", points=5)
def check_absmax_rows(your: Student) -> None:
    def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        N, K = weight.shape
        two = several(your(weight), 2, "return two tensors: first the codes, then the scales.")
        kinds = [getattr(one, "dtype", None) for one in two]
        require(kinds != [torch.float32, torch.int8], "the other way round: first the codes, then the scales.")
        codes = tensor(two[0], (N, K), torch.int8, what="the first result, the codes,")
        shapes = {(N,): "Keep the dimension, so that codes * scales works.", (1, K): "That is a scale for each column.",
                  (): "That is one for all.", (1, 1): "That is one for all."}  # fmt: skip
        hint = "0 / 0? A row of zeros has the scale 1."
        scales = tensor(two[1], (N, 1), torch.float32, what="the second, the scales,", shapes=shapes, finite=hint)
        return codes, scales

    weight = torch.tensor([[0.5, -1.27, 0.004], [12.7, -3.3, 0.06]])
    codes, scales = quantized(weight)
    steps = [round(s, 4) for s in scales.flatten().tolist()]
    hint = "The largest number becomes 127, not 128." if steps == [0.0099, 0.0992] else ""
    hint = "Do you look at numbers without their sign?" if steps[0] < 0.005 else hint
    hint = "The second row's scale must not matter to the first." if steps[0] == steps[1] else hint
    require(
        steps == [0.01, 0.1], f"rows with the largest 1.27 and 12.7 have the scales 0.01 and 0.1, yours {steps}. {hint}"
    )
    want = [[50, -127, 0], [127, -33, 1]]
    hint = "0.06 of a step of 0.1 is nearer to 1: conversion to int8 cuts off, round first." if codes[1, 2] == 0 else ""
    require(codes.tolist() == want, f"{weight.tolist()} has the codes {want}, yours {codes.tolist()}. {hint}")
    weight = numbers(5, 40) * torch.tensor([[1e-3], [1.0], [50.0], [1.0], [7.0]])
    codes, scales = quantized(weight)
    for row, found, scale in zip(weight.tolist(), codes.tolist(), scales.flatten().tolist()):
        most = max(abs(number) for number in row)
        require(
            abs(127 * scale - most) < 1e-5 * most,
            f"a row's scale is its largest number / 127: {most / 127:.4g}, yours {scale:.4g}.",
        )
        worst = max(abs(code * scale - number) for code, number in zip(found, row)) / scale
        require(worst < 0.5001, f"no number may be off by more than half a step; one of yours is off by {worst:.2f}.")
    weight = numbers(3, 4)
    weight[1] = 0
    codes, scales = quantized(weight)
    require(codes[1].tolist() == [0] * 4, f"a row of zeros has codes of 0, yours {codes[1].tolist()}.")
    require(scales[1] == 1, f"a row of zeros has the scale 1, yours {scales[1].item():.4g}.")
    weight = (100 * numbers(4, 30, seed=2)).bfloat16()
    codes, scales = quantized(weight)
    most = weight.double().abs().amax(dim=1, keepdim=True)
    require(close(127 * scales / most, torch.ones(4, 1), 1e-5), "for bfloat16 weights go to float32 before you divide.")
    want = (weight.double() / most * 127).round()
    same = torch.equal(codes.double(), want)
    require(same, "for bfloat16 weights go to float32 before you divide: some codes differ.")


@exercise(
    "whole_number_product", chapter=5, title="A product in whole numbers", minutes=20, difficulty="core", points=10
)
def check_whole_number_product(your: Student) -> None:
    def product(q: list, t: list, raised: list, s: list) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = torch.tensor(q).to(torch.int8), torch.tensor(t)[:, None]
        tensors += torch.tensor(raised).to(torch.uint8), torch.tensor(s)[:, None]
        T, N = len(q), len(raised)
        shapes = {(N, T): "Rows are tokens: (T, N)."}
        got = tensor(your(*tensors), (T, N), torch.float32, shapes=shapes, kind="Whole numbers end before the scales.")
        rows = [[sum(a * (b - 128) for a, b in zip(x, w)) for w in raised] for x in q]  # exact
        return got, torch.tensor([[tt * ss * c for ss, c in zip(s, row)] for tt, row in zip(t, rows)])

    got, want = product([[1, 0], [0, 1]], [1.0, 1.0], [[128, 130], [131, 128], [129, 127]], [1.0, 1.0, 1.0])
    raw = torch.tensor([[128.0, 131, 129], [130, 128, 127]])
    hint = "A byte of 128 means the code 0." if close(got, raw) else ""
    hint = "In a byte there is no room: are bytes subtracted as bytes?" if float(got.max()) > 200 else hint
    require(close(got, want), f"bytes [[128, 130], [131, 128], [129, 127]] are codes [[0, 2], [3, 0], [1, -1]]. {hint}")
    got, want = product([[127] * 8, [-127] * 8], [1.0, 1.0], [[255] * 8, [1] * 8], [1.0, 1.0])
    hint = "Which dtype do you add up in?"
    require(close(got, want, 1e-6), f"8 products of 127 · 127 are 129032, yours {got[0, 0]:.0f}. {hint}")
    q = (50 * numbers(2, 70)).round().clamp(-127, 127).long().tolist()
    raised = (128 + 40 * numbers(3, 70, seed=1)).round().clamp(1, 255).long().tolist()
    got, want = product(q, [0.5, 2.0], raised, [1.0, 1.0, 1.0])
    missing = close(got, want / torch.tensor([[0.5], [2.0]]))
    hint = "A token's scale belongs to its row of the result." if missing else ""
    require(close(got, want), f"tokens with the scales 0.5 and 2: wrong ({off_by(got, want)}). {hint}")
    got, want = product(q, [1.0, 1.0], raised, [0.01, 1.0, 3.0])
    hint = "Each belongs to a column of the result."
    require(close(got, want), f"weights' rows with the scales 0.01, 1 and 3: wrong. {hint}")
    got, want = product(q, [0.5, 2.0], raised[:2], [3.0, 0.25])
    require(close(got, want), "as many tokens as rows of the weight: now scales are mixed up.")
    n = 120_000  # one way up to 1.9 thousand million, and back: more than 2^24, less than 2^31
    got, want = product([[127] * n + [-127] * n + [1]], [1.0], [[255] * (2 * n) + [133]], [1.0])
    require(
        got.item() == want.item(),
        f"a sum of {2 * n + 1} products is exactly {want.item():.0f}, yours {got.item():.0f}. Float32 counts only to "
        "2^24; whole numbers of 32 bits are exact here.",
    )


@exercise("smooth", chapter=5, title="Moving a difficulty", minutes=25, difficulty="stretch", points=20)
def check_smooth(your: Student) -> None:
    def smoothed(x: torch.Tensor, weight: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
        K = x.shape[1]
        two = several(your(x, weight, alpha), 2, "return two tensors: the new weight, then the factors.")
        finite = "A column whose x or weights are all 0 has the factor 1."
        new = tensor(two[0], tuple(weight.shape), torch.float32, what="the new weight", finite=finite,
                     shapes={(K,): "First the weight, then the factors."})  # fmt: skip
        shapes = {(1, K): "Want (K,).", (len(x),): "A factor for each column of x, not for each token."}
        factors = tensor(two[1], (K,), torch.float32, what="the second, the factors,", shapes=shapes, finite=finite)
        return new, factors

    x, weight = numbers(6, 10), numbers(7, 10, seed=1)
    x[:, 3] *= 100
    new, factors = smoothed(x, weight, 0.5)
    require(bool((factors > 0).all()), "factors must be positive. Look at numbers without their sign.")
    want = x.double() @ weight.double().T
    got = (x.double() / factors.double()) @ new.double().T
    hint = "Divided by twice?" if close((x.double() * factors.double()) @ new.double().T, want) else ""
    require(close(got, want), f"(x / factors) @ new.T must be x @ weight.T: it is not ({off_by(got, want)}). {hint}")
    large = factors[3] > 4 * factors.median()
    require(large, "column 3 of x is a hundred times the others, and its factor is not the largest.")
    for alpha in (0.5, 0.25, 0.8):
        new, factors = smoothed(x, weight, alpha)
        most_x = [max(abs(v) for v in column) for column in x.T.tolist()]
        most_w = [max(abs(v) for v in column) for column in weight.T.tolist()]
        by_hand = torch.tensor([a**alpha / b ** (1 - alpha) for a, b in zip(most_x, most_w)])
        other = torch.tensor([a ** (1 - alpha) / b**alpha for a, b in zip(most_x, most_w)])
        hint = "Are alpha and 1 - alpha exchanged?" if close(factors, other) else ""
        hint = hint or "It is the largest of a column, without its sign."
        require(close(factors, by_hand), f"alpha {alpha}: the factors are not those of the formula. {hint}")
    _, factors = smoothed(x, weight, 1.0)
    got = (x / factors).abs().amax(dim=0)
    require(close(got, torch.ones(10)), "alpha 1 moves all of it: the largest of each column of x / factors is 1.")
    new, _ = smoothed(x, weight, 0.0)
    require(close(new.abs().amax(dim=0), torch.ones(10)), "alpha 0: the largest of each column of the new weight is 1.")
    alive = torch.ones(10)
    alive[5] = 0
    less_x, less_w = x * alive, weight * alive
    for what, a, b in (("x", less_x, weight), ("the weight", x, less_w), ("both", less_x, less_w)):
        new, factors = smoothed(a, b, 0.5)
        require(factors[5] == 1, f"column 5 of {what} is 0, so its factor is 1; yours {factors[5].item():.3g}.")
        require(close(new[:, 5], b[:, 5]), "a column with the factor 1 stays as it is.")
