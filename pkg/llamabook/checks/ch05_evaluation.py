"""Checks of chapter 5's exercises on evaluation: choices by length, sliding windows, a verdict on two models.

Written by hand. No check calls the package's own functions: each has an oracle of its own. The "model" of the second
check is a function that notes what it is given to read.
"""

import math
import random
import statistics
from fractions import Fraction
from typing import Any

import torch

from llamabook.checks.core import Student, Wrong, exercise, numbers, present, require, several, whole

# --- 1. Choices ---


@exercise("choose", chapter=5, title="Short answers and long ones", minutes=10, difficulty="warm-up", points=5)
def check_choose(your: Student) -> None:
    def chosen(log_probs: list[list[float]], choices: list[str]) -> tuple[int, int]:
        got = several(your(log_probs, choices), 2, "return two places: the likeliest choice, the likeliest per character.")
        for place in got:
            whole(place, "a place")
        return tuple(got)

    log_probs, choices = [[-0.5, -3.0], [-2.0, -0.5, -0.5], [-4.0]], ["grass", "hay and more", "oats"]
    got = chosen(log_probs, choices)
    require(got != (0, 1)[::-1], "first the likeliest choice, then the likeliest per character; yours are swapped.")
    hint = "Did you take the least likely?" if got[0] == 2 else ""
    require(got[0] == 1, f"sums -3.5, -3.0, -4.0: the likeliest is choice 1, yours {got[0]}. {hint}")
    require(got[1] == 1, f"-3.5 / 5, -3.0 / 12, -4.0 / 4: per character it is choice 1, yours {got[1]}.")
    got = chosen([[-3.0], [-1.0, -1.0, -1.0, -1.0]], ["hay", "some fresh alfalfa"])
    hint = "A sum of logarithms is that of the whole choice; the mean per token is another rule." if got[0] == 1 else ""
    require(got[0] == 0, f"ln p = -3.0 against four times -1.0: the likelier is choice 0, yours {got[0]}. {hint}")
    require(got[1] == 1, f"-3.0 / 3 against -4.0 / 18: per character it is choice 1, yours {got[1]}.")
    got = chosen([[-1.0, -1.0, -1.0], [-2.5]], ["oat", "barley"])
    require(got[1] == 1, "-3.0 / 3 against -2.5 / 6: per character it is choice 1. The number of tokens does not matter.")
    got = chosen([[-1.0, -1.1], [-3.0]], ["a b c d", "abcdefghi"])
    require(got[1] == 0, "-2.1 / 7 against -3.0 / 9: per character it is choice 0; spaces are characters, too.")
    got = chosen([[-3.0], [-3.3]], ["ñandú", "llama!"])
    require(got[1] == 1, "-3.0 / 5 against -3.3 / 6: count characters, not the bytes of UTF-8.")
    got = chosen([[-2.0, -2.0], [-1.0, -3.0], [-4.0]], ["abcd", "efgh", "ijkl"])
    require(got == (0, 0), f"of equal ones the first is chosen, yours are {got}.")
    generator = random.Random(5)
    for _ in range(20):
        rows = [[-round(4 * generator.random(), 3) for _ in range(generator.randint(1, 6))] for _ in range(4)]
        words = ["x" * generator.randint(1, 30) for _ in range(4)]
        sums = [math.fsum(row) for row in rows]
        want = max(range(4), key=sums.__getitem__), max(range(4), key=lambda i: sums[i] / len(words[i]))
        require(chosen(rows, words) == want, f"four choices with the sums {[round(s, 3) for s in sums]} and lengths "
                f"{[len(word) for word in words]}: want {want}.")  # fmt: skip


# --- 2. Windows ---


@exercise("sliding_nats", chapter=5, title="A text through a window", minutes=25, difficulty="core", points=10)
def check_sliding_nats(your: Student) -> None:
    def run(length: int, window: int, stride: int) -> tuple[float, list[list[int]]]:
        row, read = list(range(1000, 1000 + length)), []

        def token_nats(part: list[int]) -> torch.Tensor:
            """A model whose loss shows which token is scored, and how many stand before it in the part."""
            present(part)
            part = [int(token) for token in part]
            read.append(part)
            if len(part) < 2:
                raise Wrong(f"token_nats was given {len(part)} tokens: it needs one to read and one to score.")
            if part != list(range(part[0], part[0] + len(part))) or part[0] < 1000 or part[-1] >= 1000 + length:
                raise Wrong("token_nats was given tokens that don't stand side by side in the row.")
            if len(part) > window + 1:
                raise Wrong(f"a window reads {window} tokens, and with the last one, which is scored, a part has at "
                            f"most {window + 1}; yours has {len(part)}.")  # fmt: skip
            return torch.tensor([loss(token, token - part[0]) for token in part[1:]], dtype=torch.float64)

        value = your(row, window, stride, token_nats)
        present(value)
        require(
            isinstance(value, (int, float)) and not isinstance(value, bool),
            f"the result is a {type(value).__name__}; want a float, the sum of the losses.",
        )
        require(math.isfinite(value), "the result is no finite number.")
        return float(value), read

    def loss(token: int, before: int) -> float:
        return (token - 990) ** 1.5 + 1e-3 / before

    def wanted(length: int, window: int, stride: int) -> float:
        """Token by token: in which window is it scored, and what stands before it there?"""
        total = 0.0
        for place in range(1, length):
            number = 0 if place <= window else -(-(place - window) // stride)  # of its window
            last = min(window + number * stride, length - 1)
            total += loss(1000 + place, place - max(last - window, 0))
        return total

    def hint(got: float, length: int, window: int, stride: int, read: list[list[int]]) -> str:
        once = math.fsum(loss(1000 + place, 10**9) for place in range(1, length))
        if abs(got * (length - 1) - wanted(length, window, stride)) < 1e-3:
            return "Return the sum, not the mean."
        if got < once - 1:
            return "Some tokens are not scored."
        if got > once + length * 1e-3 + 1:
            return "Some tokens are scored more than once."
        if max(map(len, read)) < min(window + 1, length):
            return f"Every token is scored once, but your windows are short: a full one has {window + 1} tokens with the last."
        return "Every token is scored once, but some with more or fewer tokens before them than the window allows."

    for length, window, stride in (
        (6, 10, 3), (6, 5, 5), (2, 1, 1), (11, 5, 5), (12, 5, 2), (20, 8, 3), (21, 8, 1), (9, 8, 8), (33, 7, 6), (30, 1, 1),
    ):  # fmt: skip
        got, read = run(length, window, stride)
        want = wanted(length, window, stride)
        require(
            abs(got - want) <= 2e-6,
            f"{length} tokens, a window of {window}, a stride of {stride}: the sum is {want:.6f}, yours {got:.6f}. "
            f"{hint(got, length, window, stride, read)}",
        )
        most = 1 + max(-(-(length - 1 - window) // stride), 0)
        require(len(read) == most, f"{length} tokens, a window of {window}, a stride of {stride} need {most} windows; "
                f"yours asks the model {len(read)} times.")  # fmt: skip


# --- 3. Two models ---


@exercise("verdict", chapter=5, title="Is it better, or was it luck?", minutes=25, difficulty="stretch", points=20)
def check_verdict(your: Student) -> None:
    def judged(one: list[int], other: list[int]) -> tuple[float, float, float]:
        got = several(
            your(torch.tensor(one), torch.tensor(other)), 3,
            "return three numbers: the difference, its standard error, the probability.",
        )  # fmt: skip
        return tuple(number(value) for value in got)

    def number(value: Any) -> float:
        present(value)
        require(
            isinstance(value, (int, float)) and not isinstance(value, bool),
            f"one of your numbers is a {type(value).__name__}; want floats, as .item() gives.",
        )
        require(math.isfinite(value), "one of your numbers is not finite. What if the models never differ?")
        return float(value)

    def answers(first: int, second: int, both: int, none: int) -> tuple[list[int], list[int]]:
        """Questions that only the first, only the second, both, and neither model has right."""
        one = [1] * first + [0] * second + [1] * both + [0] * none
        other = [0] * first + [1] * second + [1] * both + [0] * none
        order = list(range(len(one)))
        random.Random(len(one)).shuffle(order)
        return [one[i] for i in order], [other[i] for i in order]

    def luck(first: int, second: int) -> float:
        """By all outcomes of as many coins as there are questions on which they differ."""
        coins = first + second
        ways = [1]
        for _ in range(coins):
            ways = [a + b for a, b in zip([0, *ways], [*ways, 0])]
        far = sum(w for heads, w in enumerate(ways) if abs(2 * heads - coins) >= abs(first - second))
        return float(Fraction(far, 2**coins))

    for first, second, both, none in (
        (12, 4, 380, 4), (4, 12, 5, 9), (9, 0, 40, 1), (0, 6, 3, 1), (5, 5, 7, 3), (1, 0, 3, 2), (40, 25, 100, 35),
        (2, 1, 0, 0), (0, 0, 6, 2), (90, 60, 200, 50), (0, 60, 1, 1),
    ):  # fmt: skip
        one, other = answers(first, second, both, none)
        what = f"{len(one)} questions, {first} that only the first has right, {second} that only the second: "
        differences = [a - b for a, b in zip(one, other)]
        error = statistics.stdev(differences) / math.sqrt(len(one))
        unpaired = math.sqrt((statistics.variance(one) + statistics.variance(other)) / len(one))
        got = judged(one, other)
        mean = statistics.fmean(differences)
        flipped = " First minus second." if abs(got[0] + mean) < 1e-6 else ""
        require(abs(got[0] - mean) < 1e-6, f"{what}the difference of the scores is {mean:.4f}, yours {got[0]:.4f}.{flipped}")
        hints = {
            unpaired: "That is the error for models that answered different questions.",
            error * math.sqrt(len(one)): "That is the scatter of one question: divide by the root of their number.",
            statistics.pstdev(differences) / math.sqrt(len(one)): "Divide the squares by n - 1.",
        }
        hint = next((words for value, words in hints.items() if abs(got[1] - value) < 1e-6), "")
        require(abs(got[1] - error) < 1e-6, f"{what}the standard error is {error:.5f}, yours {got[1]:.5f}. {hint}")
        want = luck(first, second)
        hints = {
            want / 2: "Luck can favour either: count both sides.",
            1 - want: "That is the probability of less.",
            math.erfc(abs(mean) / error / math.sqrt(2)) if error else -1: "That is the normal curve; count coins.",
        }
        hint = next((words for value, words in hints.items() if abs(got[2] - value) < 1e-6), "")
        hint = "More than 1 is no probability." if got[2] > 1 else hint
        require(
            abs(got[2] - want) <= 1e-6 + 1e-4 * want,
            f"{what}the probability that luck alone does this, or more, is {want:.6g}, yours {got[2]:.6g}. {hint}",
        )
    one, other = (numbers(3000, seed=seed) > 0 for seed in (1, 2))
    first, second = int((one & ~other).sum()), int((other & ~one).sum())
    got = judged(one.int().tolist(), other.int().tolist())
    require(
        abs(got[2] - luck(first, second)) < 1e-6,
        f"{first} and {second} of 3000 questions: the probability is {luck(first, second):.6g}, yours {got[2]:.6g}. Sums "
        "of whole numbers don't overflow in Python; divide at the end.",
    )
