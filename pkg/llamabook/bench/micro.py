"""Our kernels and torch's operators alone, written by hand: how many bytes a second does each of them read?

One process, in turns: for each kernel a call on memory that no cache of the CPU holds, and before each call a reading
of that same memory. `python -m llamabook bench --kernels`.
"""

import statistics
import time
from collections.abc import Callable

from llamabook.bench.report import aligned, median_interval

BYTES = 512 * 1024**2  # of the weights, and of the keys and values; more than any cache of a CPU
ROWS = (1, 2, 4, 8, 16)
SLOTS = (512, 2048, 8192, 32768)


def measure(rounds: int, size: int = BYTES, say: Callable[[str], None] = lambda text: None) -> list[dict]:
    """One row for each kernel and size: GB/s of what it must read, beside the speed of reading alone, bf16, CPU."""
    import torch
    from torch.nn import functional as F

    from llamabook.bench.worker import fill, machine, versions
    from llamabook.fast import kernels

    K = 2048
    holder = torch.nn.Linear(K, size // (2 * K), bias=False, dtype=torch.bfloat16).requires_grad_(False)
    weight = fill(holder).weight
    places = {"device": "cpu", "versions": versions(torch.device("cpu")), "machine": machine(torch.device("cpu"))}
    results = []
    for rows in ROWS:
        x = weight[:rows] * 50
        contenders = {"torch": lambda: F.linear(x, weight), "ours": lambda: ours(x, weight)}
        say(f"linear, {rows} rows")
        for by, row in compare(contenders, weight, weight.nbytes, rounds).items():
            results.append({"what": "linear", "by": by, "rows": rows, **row, **places})
    for slots in SLOTS:
        layers = size // (2 * 8 * slots * 64 * 2)  # each with keys and values of its own, as in a model
        if not layers:
            continue
        keys, values = weight.view(-1)[: 2 * layers * 8 * slots * 64].view(2, layers, 1, 8, slots, 64)
        q, input_pos = weight.view(-1)[: 32 * 64].view(1, 1, 32, 64) * 50, torch.tensor([[slots - 1]])
        visible = torch.ones(1, 1, 1, slots, dtype=torch.bool)

        def stock():
            for layer in range(layers):
                F.scaled_dot_product_attention(
                    q.transpose(1, 2), keys[layer], values[layer], attn_mask=visible, enable_gqa=True
                )

        def own():
            for layer in range(layers):
                kernels.decode_attention(q, keys[layer], values[layer], input_pos)

        say(f"attention, {slots} slots")
        for by, row in compare({"torch": stock, "ours": own}, keys, 2 * keys.nbytes, rounds).items():
            results.append({"what": "attention", "by": by, "slots": slots, **row, **places})
    return results


def ours(x, weight):
    """Our product, for any number of rows."""
    import torch

    from llamabook.fast import kernels

    return torch.ops.llamabook.linear(x, weight) if kernels.ready() else kernels.linear(x, weight)


def compare(contenders: dict[str, Callable], memory, read: int, rounds: int) -> dict[str, dict]:
    """Each contender's speed in GB/s over `read` bytes, and that of reading `memory` before and after, in turns."""
    from llamabook.fast import kernels

    speeds = {by: [] for by in contenders}
    limits = {by: [] for by in contenders}
    for number in range(rounds + 1):  # the first warms up
        for by, call in contenders.items():
            before = gb_per_s(lambda: kernels.read_all(memory), memory.nbytes)
            speed = gb_per_s(call, read)
            after = gb_per_s(lambda: kernels.read_all(memory), memory.nbytes)
            if number:
                speeds[by].append(speed)
                limits[by].append((before + after) / 2)
    rows = {}
    for by in contenders:
        shares = [speed / limit for speed, limit in zip(speeds[by], limits[by])]
        low, high = median_interval(shares)
        rows[by] = {
            "gb_per_s": statistics.median(speeds[by]), "gb_per_s_min": min(speeds[by]), "gb_per_s_max": max(speeds[by]),
            "read_bandwidth_gb_per_s": statistics.median(limits[by]), "share_of_bandwidth": statistics.median(shares),
            "share_low": low, "share_high": high, "rounds": [list(pair) for pair in zip(speeds[by], limits[by])],
        }  # fmt: skip
    return rows


def gb_per_s(call: Callable, read: int) -> float:
    start = time.perf_counter()
    call()
    return read / 1e9 / (time.perf_counter() - start)


def table(rows: list[dict]) -> str:
    """The rows for a terminal."""
    lines = [("kernel", "by", "GB/s", "reading alone", "share")]
    for row in rows:
        size = f"{row['rows']} rows" if row["what"] == "linear" else f"{row['slots']} slots"
        speed = f"{row['gb_per_s']:.1f} ({row['gb_per_s_min']:.1f}-{row['gb_per_s_max']:.1f})"
        share = f"{row['share_of_bandwidth']:.0%} ({row['share_low']:.0%}-{row['share_high']:.0%})"
        lines.append((f"{row['what']}, {size}", row["by"], speed, f"{row['read_bandwidth_gb_per_s']:.1f}", share))
    return aligned(lines)
