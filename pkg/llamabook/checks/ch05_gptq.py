"""Checks of chapter 5's exercises on GPTQ: a Hessian from padded batches, making up for one column, OBQ's own order.

Written by hand. No check calls the package's own functions: each has an oracle of its own, in float64 and by
solving for the columns that may move, where an answer would use an inverse.
"""

import torch

from llamabook.checks.core import Student, close, exercise, numbers, off_by, require, several, tensor


@exercise("input_hessian", chapter=5, title="What has come in", minutes=10, difficulty="warm-up", points=5)
def check_input_hessian(your: Student) -> None:
    def hessian(batches: list, K: int) -> torch.Tensor:
        finite = "Padding may hold anything, and 0 times infinity is NaN: leave it out, don't multiply it away."
        shapes = {(K,): "x x^T is a matrix: every number of x with every other."}
        return tensor(your(batches), (K, K), torch.float32, shapes=shapes, finite=finite, kind="Add up in float32.")

    def oracle(batches: list, both: bool = False) -> torch.Tensor:
        rows = [row for x, real in batches for text, marks in zip(x.double(), real.tolist())
                for row, mark in zip(text, marks) if mark or both]  # fmt: skip
        return 2 * sum(torch.outer(row, row) for row in rows) / len(rows)

    x = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]])
    got = hessian([(x, torch.tensor([[True, True]]))], 2).tolist()
    hints = {5: "The factor is 2 / n.", 20: "It is a mean: divide by n, the number of tokens, here two."}
    hint = hints.get(got[0][0], "")
    require(
        got == [[10, 2], [2, 4]],
        f"two tokens, [1, 2] and [3, 0]: H is [[10, 2], [2, 4]], yours {got}. {hint}",
    )
    full, half = numbers(2, 3, 4), numbers(2, 3, 4, seed=1)
    marks = torch.tensor([[True, True, False], [True, False, False]])
    batches = [(half, marks)]
    got, want = hessian(batches, 4), oracle(batches)
    hint = "Are tokens counted that only fill up a row?" if close(got, oracle(batches, both=True)) else ""
    if close(got * 6, want * 3) and not hint:
        hint = "n is the number of real tokens, not of places."
    require(close(got, want), f"3 of 6 places hold a token: H is theirs alone ({off_by(got, want)}). {hint}")
    batches = [(full, torch.ones(2, 3).bool()), (half, marks)]
    got, want = hessian(batches, 4), oracle(batches)
    hint = "A batch with twice the tokens counts twice." if close(got, sum(oracle([b]) for b in batches) / 2) else ""
    hint = "Is only one of the batches in it?" if any(close(got, oracle([b])) for b in batches) else hint
    hint = "Each batch's mean is not to be added up." if close(got, sum(oracle([b]) for b in batches)) else hint
    require(close(got, want), f"batches of 6 and of 3 tokens: the mean is over all 9 ({off_by(got, want)}). {hint}")
    spoilt = half.clone()
    spoilt[~marks] = torch.inf
    require(close(hessian([(spoilt, marks)], 4), oracle([(half, marks)])), "padding that is infinite must change nothing.")
    large = (numbers(1, 300, 3) + 3).bfloat16()
    batches = [(large, torch.ones(1, 300).bool())]
    got, want = hessian(batches, 3), oracle(batches)
    require(close(got, want, 1e-3), f"bfloat16 inputs: go to float32 before the product ({off_by(got, want)}).")


def best_change(H: torch.Tensor, free: list[int], q: int) -> torch.Tensor:
    """How all columns change (K,), float64, when column q changes by 1 and those in `free` may: by the normal equations."""
    change = torch.zeros(len(H), dtype=torch.float64)
    change[q] = 1
    if free:
        change[free] = torch.linalg.solve(H[free][:, free].double(), -H[free, q].double())
    return change


def positive(K: int, seed: int = 0) -> torch.Tensor:
    """A Hessian (K, K) whose inputs go together."""
    x = numbers(3 * K, K, seed=seed) + numbers(3 * K, 1, seed=seed + 1)
    return 2 * x.T @ x / len(x)


@exercise("make_up", chapter=5, title="The others make up for it", minutes=20, difficulty="core", points=10)
def check_make_up(your: Student) -> None:
    def made_up(W, H, fixed: list[bool], q: int, new) -> torch.Tensor:
        got = tensor(your(W, H, torch.tensor(fixed), q, new), tuple(W.shape), torch.float32)
        return got.double()

    def wanted(W, H, fixed: list[bool], q: int, new) -> torch.Tensor:
        free = [k for k, stays in enumerate(fixed) if not stays and k != q]
        return W.double() + (new.double() - W[:, q].double())[:, None] * best_change(H, free, q)

    W, H = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    got = made_up(W, H, [False, False], 0, torch.tensor([0.0]))
    require(got[0, 0] == 0, f"column 0 is to become 0, yours is {got[0, 0].item():.4g}.")
    found = got[0, 1].item()
    hint = "Nothing else has moved." if found == 1 else ""
    hint = "Is it the other way round? The weight has lost 1, so the other must gain." if abs(found - 0.5) < 1e-5 else hint
    require(
        abs(found - 1.5) < 1e-5,
        f"H = [[2, 1], [1, 2]], weights [1, 1], the first becomes 0: the second becomes 1.5, yours {found:.4g}. {hint}",
    )
    W, H, new = numbers(4, 6), positive(6), numbers(4, seed=3)
    none = [False] * 6
    got, want = made_up(W, H, none, 2, new), wanted(W, H, none, 2, new)
    by_h = W.double() - (new - W[:, 2]).double()[:, None] * (H[2] / H[2, 2]).double() * (torch.arange(6) != 2)
    hint = "It takes the inverse of H." if close(got[:, [0, 1, 3, 4, 5]], by_h[:, [0, 1, 3, 4, 5]]) else ""
    columns = [k for k in range(6) if k > 2]
    if not hint and close(got[:, :2], W[:, :2]) and not close(got[:, columns], W[:, columns]):
        hint = "Columns before column 2 may move, too."
    require(
        close(got, want),
        f"4 rows, 6 columns, none fixed, column 2 gets new numbers: wrong ({off_by(got, want)}). {hint}",
    )
    fixed = [True, False, True, False, False, True]
    got, want = made_up(W, H, fixed, 3, new), wanted(W, H, fixed, 3, new)
    moved = [k for k in range(6) if fixed[k] and not close(got[:, k], W[:, k])]
    require(not moved, f"columns 0, 2 and 5 are fixed, and column {moved[0] if moved else 0} has moved.")
    put_back = wanted(W, H, none, 3, new)
    put_back[:, fixed] = W[:, fixed].double()
    hint = "Those that may move can't count on the others: strike these out of H before the inverse."
    hint = hint if close(got, put_back) else ""
    require(close(got, want), f"columns 0, 2 and 5 are fixed: the others move wrongly ({off_by(got, want)}). {hint}")
    got, want = made_up(W, H, [True] * 5 + [False], 5, new), wanted(W, H, [True] * 5 + [False], 5, new)
    require(close(got, want), "the last column has nobody to help: it gets its new numbers, and that is all.")
    got = made_up(W, H, none, 4, W[:, 4].clone())
    require(close(got, W), "a column that gets the numbers it has changes nothing.")


def obq_costs(w: torch.Tensor, H: torch.Tensor, left: list[int], step: float) -> list[float]:
    """What rounding each column of `left` would cost, the others of them making up for it: from e H e^T itself."""
    costs = []
    for q in left:
        off = (w[q] / step).round() * step - w[q]
        e = off * best_change(H, [k for k in left if k != q], q)
        costs.append(float(e @ H.double() @ e / 2))
    return costs


@exercise("round_cheapest", chapter=5, title="The cheapest weight first", minutes=30, difficulty="stretch", points=20)
def check_round_cheapest(your: Student) -> None:
    def rounded(w: torch.Tensor, H: torch.Tensor, step: float) -> tuple[torch.Tensor, list[int]]:
        K = len(w)
        got = several(your(w, H, step), 2, "return two things: the rounded row, and the order of the columns.")
        order = tensor(got[1], (K,), torch.int64, what="the order", kind="Columns are counted in int64.").tolist()
        require(
            sorted(order) == list(range(K)),
            f"the order has each of the columns 0 to {K - 1} once, yours is {order}. Column 0 is the first of the row.",
        )
        return tensor(got[0], (K,), torch.float32, what="the row").double(), order

    def walk(w: torch.Tensor, H: torch.Tensor, step: float, what: str) -> None:
        got, order = rounded(w, H, step)
        now, left, turns = w.double().clone(), list(range(len(w))), []
        for turn, q in enumerate(order):
            costs = obq_costs(now, H, left, step)
            mine, best = costs[left.index(q)], left[costs.index(min(costs))]
            offs = {k: abs((now[k] / step).round() * step - now[k]).item() for k in left}
            hint = "Left to right is GPTQ's order." if order == sorted(order) else ""
            hint = "That is the dearest." if mine == max(costs) and len(left) > 2 else hint
            if offs[q] == min(offs.values()):
                hint = "Its error is the least, but what counts is the cost after the others have helped."
            require(
                mine <= min(costs) * 1.001 + 1e-9,
                f"{what}, turn {turn}: column {best} costs {min(costs):.4g}, and you take column {q}, for {mine:.4g}. "
                f"{hint}",
            )
            value = (now[q] / step).round() * step
            turns.append((q, now[q].item(), value.item()))
            left.remove(q)
            now += (value - now[q]) * best_change(H, left, q)
        row = torch.tensor([value for _, _, value in sorted(turns)])
        require(
            close(got, row) or not close(got, row[order]),
            f"{what}: the row becomes {row.tolist()}, yours {got.tolist()}. It has the order of the columns, not that of "
            "the turns.",
        )
        for turn, (q, by_then, value) in enumerate(turns):
            was = (w[q].double() / step).round() * step
            hint = "Round what the column is by then, not what it was." if abs(got[q] - was) < 1e-3 * step else ""
            hint = "Is it rounded?" if abs(got[q] - by_then) < 1e-3 * step else hint
            require(
                abs(got[q] - value) < 1e-3 * step,
                f"{what}, turn {turn}: column {q} is {by_then:.4g} by then and becomes {value:.4g}, yours {got[q]:.4g}. "
                f"{hint}",
            )

    walk(torch.tensor([0.3, 0.1, 0.45]), 2 * torch.eye(3), 1.0, "independent inputs, weights 0.3, 0.1, 0.45")
    walk(torch.tensor([0.4, 0.3]), torch.tensor([[2.0, 1.8], [1.8, 2.0]]), 1.0, "two inputs that are nearly alike")
    walk(torch.tensor([0.3, 0.45]), torch.tensor([[20.0, 0.0], [0.0, 1.0]]), 1.0, "inputs of unequal size")
    for seed in (4, 5, 6):
        walk(2 * numbers(7, seed=seed), positive(7, seed), 1.0, "7 columns")
    walk(2 * numbers(5, seed=7), positive(5, 8), 0.25, "5 columns, a step of 0.25")
    got, order = rounded(torch.tensor([1.0, -2.0, 3.0]), positive(3), 1.0)
    require(order == [0, 1, 2], f"three whole numbers cost nothing: of equal costs take the first; yours {order}.")
