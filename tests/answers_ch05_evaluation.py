"""Answers to chapter 5's exercises on evaluation: known wrong ones (test_exercises.py says how to read them), other right ones."""

import math

MUTANTS = {
    "choose": [
        ("sums.index(max(sums)), shares.index(max(shares))", "shares.index(max(shares)), sums.index(max(sums))", "choice 0"),
        ("sums.index(max(sums))", "sums.index(min(sums))", "the least likely"),
        ("sum(row) for row", "sum(row) / len(row) for row", "another rule|choice 1"),
        ("total / len(text)", "total / len(row)", "per character|stopped with"),
        ([("total / len(text) for total, text in zip(sums, choices)", "total / len(row) for total, row in zip(sums, log_probs)")],
         "number of tokens"),
        ("len(text)", "len(text.encode())", "not the bytes"),
        ("len(text)", "len(text.replace(' ', ''))", "spaces are characters"),
        ("shares.index(max(shares))", "sums.index(max(sums))", "per character"),
        ("sums.index(max(sums)), ", "len(sums) - 1 - sums[::-1].index(max(sums)), ", "the first is chosen"),
        ("max(sums)), shares", "max(sums)) + 1, shares", "choice 1, yours 2"),
        ("return sums.index(max(sums)), ", "return ", "two places"),
        ("total / len(text)", "total * len(text)", "per character"),
    ],
    "sliding_nats": [
        ("done = min(window + 1, len(row))", "done = min(window, len(row))", "windows|stopped with|needs one to read"),
        ("min(done + stride, len(row))", "done + stride", "not scored|more than once|stopped with|more or fewer|times"),
        ("max(end - window - 1, 0)", "max(end - window, 0)", "windows are short|not scored|needs one to read"),
        ("max(end - window - 1, 0)", "max(end - window - 2, 0)", "a part has at most"),
        ("max(end - window - 1, 0)", "max(done + stride - window - 1, 0)", "more or fewer"),
        ("max(end - window - 1, 0)", "done - 1", "more or fewer"),
        ("losses[len(losses) - (end - done) :].sum()", "losses.sum()", "more than once"),
        ("losses[len(losses) - (end - done) :].sum()", "losses[-1]", "not scored"),
        ("losses[len(losses) - (end - done) :].sum()", "losses[-stride:].sum()", "more than once"),
        ("    return total", "    return total / (len(row) - 1)", "not the mean"),
        ("total = float(token_nats(row[:done]).sum())", "total = 0.0", "not scored"),
        ("end = min(done + stride, len(row))", "end = done + 1", "times|more or fewer"),
        ("    return total", "    return torch.tensor(total)", "want a float"),
    ],
    "verdict": [
        ("one.double() - other.double()", "other.double() - one.double()", "First minus second"),
        ("difference.std()", "(one.double().var() + other.double().var()) ** 0.5", "different questions"),
        ("difference.std() / len(difference) ** 0.5", "difference.std()", "divide by the root"),
        ("difference.std()", "difference.std(correction=0)", "n - 1"),
        (">= abs(b - c)", "> abs(b - c)", "luck alone"),
        ("if abs(2 * k - m) >= abs(b - c)", "if 2 * k - m >= abs(b - c)", "both sides"),
        ("if abs(2 * k - m) >= abs(b - c)", "if abs(2 * k - m) < abs(b - c)", "probability of less"),
        ("ways / 2**m", "2 * sum(math.comb(m, k) for k in range(min(b, c) + 1)) / 2**m", "no probability"),
        ("ways / 2**m", "math.erfc(abs(difference.mean().item()) / max(error.item(), 1e-9) / 2**0.5)", "normal curve"),
        ("ways / 2**m", "ways / 2.0**m", "stopped with OverflowError"),
        ("    m = b + c\n", "    m = len(difference)\n", "luck alone"),
        ("return difference.mean().item(), error.item(), ", "return difference.mean().item(), ", "three numbers"),
        ("difference.mean().item(), error", "difference.mean(), error", "want floats"),
        ("ways / 2**m", "ways / 2**m if m else float('nan')", "not finite"),
    ],
}  # fmt: skip


def by_sorting(log_probs, choices):
    sums = [math.fsum(row) for row in log_probs]
    places = range(len(sums))
    return min(places, key=lambda i: (-sums[i], i)), min(places, key=lambda i: (-sums[i] / len(choices[i]), i))


def by_filling(row, window, stride, token_nats):
    losses, done = [None] * len(row), 1
    while done < len(row):
        end = min(done + (window if done == 1 else stride), len(row))
        start = max(0, end - 1 - window)
        for place, loss in enumerate(token_nats(row[start:end]).tolist(), start=start + 1):
            if losses[place] is None:
                losses[place] = loss
        done = end
    return math.fsum(losses[1:])


def by_tails(one, other):
    b, c = int((one > other).sum()), int((other > one).sum())
    n, m = len(one), b + c
    mean = (b - c) / n
    error = math.sqrt((m - n * mean**2) / (n - 1) / n)
    tail = sum(math.comb(m, k) for k in range(min(b, c) + 1))
    return mean, error, 1.0 if b == c else 2 * tail / 2**m


OTHERS = {"choose": by_sorting, "sliding_nats": by_filling, "verdict": by_tails}
