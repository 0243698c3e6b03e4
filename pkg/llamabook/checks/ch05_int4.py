"""Checks of chapter 5's exercises on int4: foreign nibbles, scales that are searched for, products group by group.

Written by hand. No check calls the package's own functions: each has an oracle of its own, in Python's whole
numbers and float64.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llamabook.checks.core import Student, close, exercise, numbers, off_by, require, tensor


@exercise("signed_nibbles", chapter=5, title="Another library's nibbles", minutes=10, difficulty="warm-up", points=5)
def check_signed_nibbles(your: Student) -> None:
    def codes(packed: list, K: int) -> list:
        N, B = len(packed), len(packed[0])
        shapes = {(N, 2 * B): f"{K} columns are asked for; the last nibble only fills a byte.",
                  (N, B): "There are two codes in a byte."}  # fmt: skip
        got = your(torch.tensor(packed).to(torch.uint8), K)
        return tensor(got, (N, K), torch.int8, shapes=shapes, kind="Codes are signed bytes.").tolist()

    got = codes([[0x12, 0x34]], 4)
    hint = "The first code is in the high nibble." if got == [[2, 1, 4, 3]] else ""
    hint = "Neighbours belong together: first both of one byte." if got in ([[1, 3, 2, 4]], [[2, 4, 1, 3]]) else hint
    hint = "These codes are not raised by 8." if sorted(got[0]) == [-7, -6, -5, -4] else hint
    require(got == [[1, 2, 3, 4]], f"bytes 0x12, 0x34 are the codes [1, 2, 3, 4], yours {got[0]}. {hint}")
    got = codes([[0x78, 0xF0]], 4)
    hint = "From 8 on nibbles mean 16 less." if got == [[7, 8, 15, 0]] else ""
    require(got == [[7, -8, -1, 0]], f"bytes 0x78, 0xF0 are the codes [7, -8, -1, 0], yours {got[0]}. {hint}")
    got = codes([[0xA5, 0x30], [0x5A, 0xC0]], 3)
    require(got == [[-6, 5, 3], [5, -6, -4]], f"two rows of three codes, [-6, 5, 3] and [5, -6, -4]; yours {got}.")
    every = [[byte for byte in range(256)]]
    want = [int.from_bytes(bytes([nibble * 16]), signed=True, byteorder="big") // 16
            for byte in range(256) for nibble in (byte >> 4, byte & 15)]  # fmt: skip
    require(codes(every, 512) == [want], "of all 256 bytes, some come out wrong.")


@exercise("search_scale", chapter=5, title="A scale that is searched for", minutes=20, difficulty="core", points=10)
def check_search_scale(your: Student) -> None:
    def scales(groups: torch.Tensor, shares: list[float]) -> torch.Tensor:
        N, G, g = groups.shape
        finite = "0 / 0? A group of zeros has the scale 1."
        shapes = {(N, G, 1): "Want (N, groups).", (N,): "A scale for each group, not for each row."}
        return tensor(your(groups, torch.tensor(shares)), (N, G), torch.float32, shapes=shapes, finite=finite)

    def loss(group: list[float], scale: float, cut: bool = True) -> float:
        codes = [round(number / scale) for number in group]
        codes = [max(-8, min(7, code)) for code in codes] if cut else codes
        return sum((code * scale - number) ** 2 for code, number in zip(codes, group))

    group = torch.tensor([[[0.8, -0.3, 0.1, 0.2]]])
    got = scales(group, [1.0]).item()
    hint = "The largest number becomes -8." if abs(abs(got) - 0.8 / 7) < 1e-6 else ""
    hint = "With its sign: a positive one needs a negative scale." if abs(got - 0.1) < 1e-6 else hint
    require(
        abs(got + 0.1) < 1e-6,
        f"the largest of the group is 0.8: with the share 1 alone the scale is -0.1, yours {got:.4g}. {hint}",
    )
    groups = numbers(6, 5, 16)
    shares = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6]
    got = scales(groups, shares)
    found = []  # for each group: the place of its share, the losses of all shares, the same without an end of the codes
    for group, scale in zip(groups.flatten(0, 1).tolist(), got.flatten().tolist()):
        first = max(group, key=abs) / -8
        near = [abs(first * share - scale) < 1e-5 * abs(first) for share in shares]
        require(any(near), f"a scale is one of the candidates, {first:.4g} times a share; yours is {scale:.4g}.")
        losses, uncut = ([loss(group, first * share, cut) for share in shares] for cut in (True, False))
        found.append((near.index(True), losses, uncut))
    hint = "Do you search for each group by itself, and by the sum of squares?"
    if all(losses[mine] == max(losses) for mine, losses, _ in found):
        hint = "That is the worst of all."
    elif all(mine == 0 for mine, _, _ in found):
        hint = "Is there a search?"
    elif all(uncut[mine] == min(uncut) for mine, _, uncut in found):
        hint = "Codes end at -8 and 7: what is cut off counts."
    for i, (mine, losses, _) in enumerate(found):
        best = shares[losses.index(min(losses))]
        require(
            losses[mine] < 1.0001 * min(losses),
            f"group {i % 5} of row {i // 5}: the share {best} has the least squared error, you take {shares[mine]}. "
            f"{hint}",
        )
    got = scales(torch.tensor([[[1.0, 0.0, 0.5, 0.0]]]), [1.0, 2.0, 0.5])
    found = got.item()
    require(abs(found + 0.125) < 1e-6, f"shares 1 and 2 are equally good: take the first, -0.125; yours {found:.4g}.")
    groups = numbers(2, 2, 4)
    groups[1, 0] = 0
    got = scales(groups, [1.0, 0.5])
    require(got[1, 0] == 1, f"a group of zeros has the scale 1, yours {got[1, 0].item():.4g}.")


class Largest(TorchDispatchMode):
    """The most numbers that one new floating-point tensor has had."""

    numbers = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if not operation.is_view:
            made = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.is_floating_point()]
            self.numbers = max([self.numbers, *made])
        return result


@exercise(
    "product_in_groups", chapter=5, title="A product without the matrix", minutes=25, difficulty="stretch", points=20
)
def check_product_in_groups(your: Student) -> None:
    def product(x, codes, scales, zeros, g: int) -> tuple[torch.Tensor, torch.Tensor]:
        T, (N, K) = len(x), codes.shape
        shapes = {(N, T): "Rows are tokens: (T, N).", (T, N, scales.shape[1]): "Add the groups up."}
        got = tensor(your(x, codes, scales, zeros, g), (T, N), torch.float32, shapes=shapes)
        want = torch.zeros(T, N, dtype=torch.float64)
        for k in range(K):  # column by column
            column = codes[:, k].double() * scales[:, k // g].double()
            column = column if zeros is None else column + zeros[:, k // g].double()
            want += x[:, k, None].double() * column
        return got, want

    ones, codes = torch.ones(1, 4), torch.tensor([[1, 2, 3, -4]]).to(torch.int8)
    got, _ = product(ones, codes, torch.tensor([[10.0, 100.0]]), None, 2)
    hint = "Each group has a scale of its own." if got.item() in (20.0, 200.0, 110.0, 220.0) else ""
    found = got.item()
    require(found == -70, f"codes [1, 2 | 3, -4], scales 10 and 100, x ones: 30 - 100 = -70; yours {found:g}. {hint}")
    got, _ = product(ones, codes, torch.tensor([[10.0, 100.0]]), torch.tensor([[0.5, 3.0]]), 2)
    found = got.item()
    hint = {-70: "Where are the zeros?", -66.5: "Each zero counts once for every column of its group.",
            -77: "Zeros are added, not taken away."}.get(found, "")  # fmt: skip
    hint = "Are the zeros scaled? They are numbers already." if abs(found) > 200 else hint
    require(found == -63, f"the same with zeros 0.5 and 3: -70 + 2 · 0.5 + 2 · 3 = -63, yours {found:g}. {hint}")
    codes = (4 * numbers(5, 24)).round().clamp(-8, 7).to(torch.int8)
    x, scales, zeros = numbers(3, 24, seed=1), numbers(5, 3, seed=2), numbers(5, 3, seed=3)
    for given, what in ((None, "without zeros"), (zeros, "with zeros")):
        got, want = product(x, codes, scales, given, 8)
        require(close(got, want), f"3 tokens, 5 rows, 3 groups of 8, {what}: wrong ({off_by(got, want)}).")
    got, want = product(x[:, :20], codes[:, :20], scales, zeros, 8)
    require(close(got, want), f"20 columns, so the last group has 4: wrong ({off_by(got, want)}).")
    codes = (4 * numbers(64, 512)).round().clamp(-8, 7).to(torch.int8)
    x, scales, zeros = numbers(2, 512, seed=1), numbers(64, 16, seed=2), numbers(64, 16, seed=3)
    with Largest() as largest:
        got, want = product(x, codes, scales, zeros, 32)
    require(close(got, want), f"64 rows of 512 columns: wrong ({off_by(got, want)}).")
    require(
        largest.numbers <= 64 * 512 // 4,
        f"right, but you make a tensor of {largest.numbers} floating-point numbers; the matrix has {64 * 512}. It "
        "shall never be written out: take a group at a time.",
    )
