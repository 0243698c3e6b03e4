"""Answers to chapter 5's exercises on int8: known wrong ones (test_exercises.py says how to read them), right ones."""

import torch

MUTANTS = {
    "absmax_rows": [
        ("/ 127", "/ 128", "becomes 127, not 128"),
        (".round()", "", "conversion to int8 cuts off"),
        (".round()", ".floor()", "has the codes|nearer to 1"),
        ("weight.abs()", "weight", "without their sign"),
        ("weight.abs()", "(-weight)", "without their sign|0.01 and 0.1"),
        ("amax(dim=1, keepdim=True)", "amax()", "is one for all"),
        ("amax(dim=1, keepdim=True)", "amax().expand(len(weight), 1)", "must not matter to the first"),
        ("amax(dim=1, keepdim=True)", "amax(dim=0, keepdim=True)", "a scale for each column"),
        (
            "    return (weight / scales).round().to(torch.int8), scales",
            "    return (weight / scales).round().to(torch.int8), scales[:, 0]",
            "Keep the dimension",
        ),
        ("    scales = torch.where(scales == 0, 1.0, scales)\n", "", "of zeros has"),
        ("scales == 0, 1.0", "scales == 0, 1e-8", "has the scale 1"),
        ("    weight = weight.float()\n", "", "go to float32|want float32"),
        ("torch.int8), scales", "torch.int16), scales", "want int8"),
        (
            "return (weight / scales).round().to(torch.int8), scales",
            "return scales, (weight / scales).round().to(torch.int8)",
            "the other way round",
        ),
        ("abs().amax(dim=1, keepdim=True) / 127", "abs().mean(dim=1, keepdim=True) / 127", "0.01 and 0.1"),
        ("return (weight / scales).round().to(torch.int8), scales", "return (weight / scales).round().to(torch.int8)",
         "return two tensors"),
    ],
    "whole_number_product": [
        (".to(torch.int32) - 128", ".to(torch.int32)", "A byte of 128 means the code 0"),
        ("raised.to(torch.int32) - 128", "(raised - 128).to(torch.int32)", "are bytes subtracted as bytes|codes"),
        ("q.to(torch.int32) @ codes.T", "q @ codes.to(torch.int8).T", "Which dtype do you add up in"),
        ("- 128", "- 127", "codes [[0, 2], [3, 0], [1, -1]]"),
        (" * scales.T", " * scales[:len(t)]", "stopped with|to a column of the result|mixed up"),
        (" * scales.T", "", "a column of the result"),
        (" * t ", " ", "token's scale belongs to its row"),
        ("sums.float() * t * scales.T", "(sums * t.int()).float() * scales.T", "scales 0.5 and 2"),
        ("return sums.float() * t * scales.T", "return (sums.float() * t * scales.T).T", "Rows are tokens"),
        ("return sums.float() * t * scales.T", "return sums * t.double() * scales.T", "want float32"),
        ("q.to(torch.int32) @ codes.T", "q.float() @ codes.float().T", "counts only to 2"),
        ("* t * scales.T", "* t.T * scales", "stopped with|mixed up|belongs"),
    ],
    "smooth": [
        ("return weight * factors, factors", "return weight / factors, factors", "must be x @ weight.T"),
        ("return weight * factors, factors", "return weight * factors, 1 / factors", "must be x @ weight.T"),
        ("return weight * factors, factors", "return weight, factors", "must be x @ weight.T"),
        ("most_x**alpha / most_w ** (1 - alpha)", "most_x ** (1 - alpha) / most_w**alpha", "Are alpha and 1 - alpha"),
        ("x.abs().amax(dim=0)", "x.abs().mean(dim=0)", "the largest of a column"),
        ("weight.abs().amax(dim=0)", "weight.abs().amax()", "not those of the formula"),
        ("x.abs().amax(dim=0)", "x.amax(dim=0)", "without its sign"),
        ("    factors = torch.where((most_x == 0) | (most_w == 0), 1.0, factors)\n", "", "the factor 1|factor is 1"),
        ("(most_x == 0) | (most_w == 0)", "most_x == 0", "has the factor 1|factor is 1"),
        ("(most_x == 0) | (most_w == 0)", "most_w == 0", "factor is 1"),
        ("/ most_w ** (1 - alpha)", "* most_w ** (1 - alpha)", "not those of the formula"),
        ("return weight * factors, factors", "return factors, weight * factors", "First the weight"),
        ("return weight * factors, factors", "return weight * factors, factors[None]", "Want (K,)"),
        ("most_x**alpha / most_w ** (1 - alpha)", "(most_x / most_w) ** alpha", "not those of the formula"),
        ("most_x**alpha / most_w ** (1 - alpha)", "(most_x / most_w) ** 0.5", "not those of the formula"),
    ],
}  # fmt: skip


def by_rows(weight):
    codes, scales = [], []
    for row in weight.float():
        scale = max(abs(number) for number in row.tolist()) / 127 or 1.0
        codes.append([round(number / scale) for number in row.tolist()])
        scales.append([scale])
    return torch.tensor(codes).to(torch.int8), torch.tensor(scales)


def by_offset(q, t, raised, scales):
    """As the kernel does it: what is too much, 128 times the sum of q, is taken back at the end."""
    q = q.long()
    sums = q @ raised.long().T - 128 * q.sum(dim=1, keepdim=True)
    return (sums.double() * (t @ scales.T).double()).float()


def by_columns(x, weight, alpha):
    factors = []
    for a, b in zip(x.T, weight.T):
        a, b = float(a.abs().max()), float(b.abs().max())
        factors.append(a**alpha * b ** (alpha - 1) if a and b else 1.0)
    factors = torch.tensor(factors)
    return weight @ factors.diag(), factors


OTHERS = {"absmax_rows": by_rows, "whole_number_product": by_offset, "smooth": by_columns}
