"""Answers to chapter 5's exercises on GPTQ: known wrong ones (test_exercises.py says how to read them), right ones."""

import torch

MUTANTS = {
    "input_hessian": [
        ("2 * total / n", "total / n", "The factor is 2 / n"),
        ("2 * total / n", "2 * total", "divide by n"),
        ("x[real].float()", "x.flatten(0, 1).float()", "only fill up a row"),
        ("x[real].float()", "(x * real[..., None]).flatten(0, 1).float()", "number of real tokens"),
        (
            [("x[real].float()", "(x * real[..., None]).flatten(0, 1).float()"), ("len(rows)", "int(real.sum())")],
            "0 times infinity",
        ),
        ("len(rows)", "x.shape[0] * x.shape[1]", "number of real tokens"),
        ("len(rows)", "len(x)", "here two"),
        (
            [("total = total + rows.T @ rows", "total = total + rows.T @ rows / len(rows)"), ("n += len(rows)", "n += 1")],
            "counts twice",
        ),
        (
            [("total = total + rows.T @ rows", "total = total + rows.T @ rows / len(rows)"), ("n += len(rows)", "n = 1")],
            "not to be added up",
        ),
        ("total = total + rows", "total = rows", "over all 9"),
        ([("total = total + rows", "total = rows"), ("n += len", "n = len")], "only one of the batches"),
        ("x[real].float()", "x[real]", "Add up in float32"),
        (
            [("x[real].float()", "x[real]"), ("2 * total / n", "(2 * total / n).float()")],
            "float32 before the product",
        ),
        ("rows.T @ rows", "(rows * rows).sum(dim=0)", "every number of x with every other"),
        ("rows.T @ rows", "rows @ rows.T", "H is|has shape"),
    ],
    "make_up": [
        ("(new - W[:, q])", "(W[:, q] - new)", "column 0 is to become 0"),
        ("result[:, places] += change", "result[:, places] -= change\n    result[:, q] = new", "the other way round"),
        ("result[:, places] += change", "result[:, q] = new", "Nothing else has moved"),
        (" / inverse[at, at]", "", "column 0 is to become 0"),
        (
            "inverse = torch.linalg.inv(H[places][:, places])",
            "inverse = -H[places][:, places]\n    inverse.diagonal().neg_()",
            "inverse of H",
        ),
        ("(~fixed)", "(~fixed & (torch.arange(len(fixed)) >= q))", "may move, too"),
        ("(~fixed)", "torch.ones_like(fixed)", "are fixed, and column"),
        (
            [("(~fixed)", "torch.ones_like(fixed)"), ("    return result", "    result[:, fixed] = W[:, fixed]\n    return result")],
            "strike these out",
        ),
        ("torch.linalg.inv(H[places][:, places])", "torch.linalg.inv(H)[places][:, places]", "strike these out"),
        ("at = (places == q).nonzero().item()", "at = q", "stopped with IndexError|move wrongly|fixed, and"),
        ("W.clone()", "W", "changes its arguments"),
        ("    return result", "    return result.double()", "want float32"),
        ("inverse[at] / inverse[at, at]", "inverse[at, at] / inverse[at]", "becomes 1.5"),
    ],
    "round_cheapest": [
        ([(".argmin()", ".argmax()"), ("torch.inf", "-torch.inf")], "the dearest"),
        ("off.square() / (2 * inverse.diagonal())", "off.abs()", "after the others have helped|inputs of unequal size"),
        ("off.square() / (2 * inverse.diagonal())", "off.square() * H.diagonal()", "costs"),
        ("off.square() / (2 * inverse.diagonal())", "torch.arange(len(w)).float()", "GPTQ's order"),
        ("        now = now + off[q] * inverse[q] / inverse[q, q]\n", "", "what the column is by then|costs"),
        ("now + off[q]", "now - off[q]", "by then|costs"),
        (
            "        inverse = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]\n",
            "",
            "costs|by then",
        ),
        ("(now / step).round() * step - now", "now.round() - now", "costs|becomes"),
        ("        done[q] = True\n", "", "each of the columns"),
        ("    return row, torch.tensor(order)", "    return row[order], torch.tensor(order)", "order of the columns"),
        ("    return row, torch.tensor(order)", "    return row", "two things"),
        ("    return row, torch.tensor(order)", "    return torch.tensor(order), row", "the order"),
        ("    return row, torch.tensor(order)", "    return row, torch.tensor(order).argsort()", "turn|costs"),
        ("    return row, torch.tensor(order)", "    return row, torch.tensor(order) + 1", "Column 0 is the first"),
        ("        row[q] = now[q] + off[q]\n", "        row[q] = now[q]\n", "Is it rounded"),
        ("row[q] = now[q] + off[q]", "row[q] = (w[q] / step).round() * step", "not what it was"),
    ],
}  # fmt: skip


def by_joining(batches):
    rows = torch.cat([x.double()[real] for x, real in batches])
    return (torch.einsum("ti,tj->ij", rows, rows) * 2 / len(rows)).float()


def by_solving(W, H, fixed, q, new):
    free = [k for k in range(len(H)) if not fixed[k] and k != q]
    result, off = W.double().clone(), new.double() - W[:, q].double()
    result[:, q] = new.double()
    if free:
        result[:, free] -= torch.outer(off, torch.linalg.solve(H[free][:, free].double(), H[free, q].double()))
    return result.float()


def by_inverses(w, H, step):
    w, H, left, order = w.double().clone(), H.double(), list(range(len(w))), []
    while left:
        inverse = torch.linalg.inv(H[left][:, left])
        off = (w[left] / step).round() * step - w[left]
        at = int((off.square() / inverse.diagonal()).argmin())
        w[left] += off[at] * inverse[at] / inverse[at, at]
        order.append(left.pop(at))
    return ((w / step).round() * step).float(), torch.tensor(order)


OTHERS = {"input_hessian": by_joining, "make_up": by_solving, "round_cheapest": by_inverses}
