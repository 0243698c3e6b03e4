"""What the numbers of a benchmark say, written by hand: rows, a table, a file and a figure."""

import json
import math
import statistics
from collections import Counter
from pathlib import Path

from llamabook.bench.job import QUANTIZED, UNCACHED, Job, bytes_per_step, parts_of, static_of
from llamabook.files import replacing


SPEEDS = (  # of which a row has the median, least and most
    "tokens_per_s", "prefill_tokens_per_s", "gb_per_s", "read_bandwidth_gb_per_s", "share_of_bandwidth", "check_cost",
    "acceptance", "mean_accepted",
)  # fmt: skip


def rows_of(results: list[dict], job: Job, config: dict, rounds_in: str) -> list[dict]:
    """One row for each mode, with the median, least and most of its rounds, and the rounds themselves."""
    rows = []
    for result in results:
        mode, start, cold = result["mode"], result["start"], result["cold"]
        step = bytes_per_step(mode, job, config, start.get("weight_bytes"))
        rounds = [one_round(step, measured, job) for measured in result["rounds"]]
        row = {"mode": mode}
        for name in SPEEDS:
            values = [one[name] for one in rounds if name in one]
            if not values:
                continue
            row |= {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
        if any("drafts" in one for one in result["rounds"]):
            step = statistics.median(one["step_bytes"] for one in result["rounds"])
            row["drafts"] = sorted(sum((Counter(dict(one["drafts"])) for one in result["rounds"]), Counter()).items())
        row |= {
            "bytes_per_token": step / job.batch_size,
            "first_token_s": (cold or start)["first_token_s"],
            "compile_s": (cold or start)["compile_s"],
            "first_token_warm_s": start["first_token_s"],
            "compile_warm_s": start["compile_s"],
            "peak_memory_gb": max(one.get("peak_memory_gb", 0.0) for one in result["rounds"]),
            "matmul_gflop_per_s": start.get("matmul_gflop_per_s"),
            **job.as_dict(),
            "measured": rounds_in,
            "versions": start["versions"],
            "machine": start["machine"],
            "rounds": rounds,
        }
        rows.append(row)
    return rows


def one_round(step_bytes: float, measured: dict, job: Job) -> dict:
    """Speeds of one timed run."""
    steps_per_s = 1 / measured["step_s"]
    moved = measured.get("step_bytes", step_bytes) * steps_per_s / 1e9
    limit = statistics.mean(measured["read_gb_per_s"])
    return {
        "round": measured["round"],
        "tokens_per_s": job.batch_size * steps_per_s,
        "prefill_tokens_per_s": job.batch_size * job.prompt_tokens / measured["prefill_s"],
        "gb_per_s": moved,
        "read_bandwidth_gb_per_s": limit,
        "share_of_bandwidth": moved / limit,
        **{name: measured[name] for name in ("check_cost", "acceptance", "mean_accepted") if name in measured},
    }


def median_interval(values: list[float], confidence: float = 0.9) -> tuple[float, float]:
    """Between which two of the values the true median lies, with at least this confidence, whatever they are drawn from.

    The chance that fewer than k of n values are below the median is that of fewer than k heads in n tosses. With too
    few values for the confidence, the least and the most.
    """
    n, ordered, below, k = len(values), sorted(values), 0.0, 0
    while k < n // 2:
        below += math.comb(n, k) / 2**n
        if 2 * below > 1 - confidence:
            break
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def paired(rows: list[dict], mode: str, base: str, what: str = "tokens_per_s") -> tuple[float, float, float]:
    """Median and 90 % interval of the ratio `mode` / `base`, round by round."""
    of = {row["mode"]: {one["round"]: one[what] for one in row["rounds"]} for row in rows}
    ratios = [value / of[base][number] for number, value in of[mode].items() if number in of[base]]
    return statistics.median(ratios), *median_interval(ratios)


def table(rows: list[dict]) -> str:
    """The rows for a terminal; speeds as median (least-most), beside the ratio to the first mode."""
    head = ("mode", "tokens/s", "times the first", "prefill/s", "first s", "compile s", "GB/token", "GB/s", "of memory", "peak GB")
    checked, drafted = rows[0].get("check_tokens", 0), any("drafts" in row for row in rows)
    speculation = ("times static", "right", "kept", "k") if drafted else ()
    lines = [(*head, *([f"cost of {checked}"] if checked else []), *speculation)]
    for row in rows:
        ratio, low, high = paired(rows, row["mode"], rows[0]["mode"])
        lines.append((
            row["mode"],
            f"{row['tokens_per_s']:.2f} ({row['tokens_per_s_min']:.2f}-{row['tokens_per_s_max']:.2f})",
            "1" if row is rows[0] else f"{ratio:.2f} ({low:.2f}-{high:.2f})",
            f"{row['prefill_tokens_per_s']:.1f}",
            f"{row['first_token_s']:.2f}",
            f"{row['compile_s']:.1f}",
            f"{row['bytes_per_token'] / 1e9:.3f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['share_of_bandwidth']:.0%}",
            f"{row['peak_memory_gb']:.2f}",
            *([f"{row['check_cost']:.2f}" if "check_cost" in row else "-"] if checked else []),
            *(speculation_of(row, rows) if drafted else []),
        ))  # fmt: skip
    return aligned(lines)


def speculation_of(row: dict, rows: list[dict]) -> tuple[str, ...]:
    """Four words: the speed against the same without a draft, the share of right tokens, how many of a draft were kept, and
    how many were drafted most often.
    """
    if "drafts" not in row:
        return ("-",) * 4
    base = static_of(row["mode"])
    times = "-" if base not in (other["mode"] for other in rows) else "{:.2f} ({:.2f}-{:.2f})".format(*paired(rows, row["mode"], base))
    often = max(row["drafts"], key=lambda pair: pair[1])[0]
    right = (f"{row['acceptance']:.0%}", f"{row['mean_accepted']:.2f}") if "acceptance" in row else ("-", "-")
    return times, *right, str(often)


def aligned(lines: list[tuple[str, ...]]) -> str:
    """Words in columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip() for line in lines)


def write_json(rows: list[dict], path: Path) -> None:
    """Write the rows, whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(rows, indent=1) + "\n").encode())


def draw(rows: list[dict]):
    """A matplotlib figure: how many tokens each mode makes, and how many the memory allows."""
    from llamabook.figures import COLORS, figure

    fig, axes = figure(height=1.2 + 0.5 * len(rows))
    for place, row in enumerate(rows):
        speed, low, high = (row[f"tokens_per_s{end}"] for end in ("", "_min", "_max"))
        ours = row["mode"].startswith(QUANTIZED)
        axes.barh(place, speed, color=COLORS["llama" if ours else "gpt"], height=0.6)
        axes.plot([low, high], [place, place], color=COLORS["floor"], lw=1.2, marker="|")
        if parts_of(row["mode"])[0] not in UNCACHED:
            limit = speed / row["share_of_bandwidth"]
            axes.plot([limit, limit], [place - 0.4, place + 0.4], color=COLORS["floor"], ls="--", lw=1.5)
            if speed / 2 < limit < 2 * high:
                high = max(high, limit)  # the number stands behind both
        axes.annotate(f" {speed:.1f}", (high, place), va="center", textcoords="offset points", xytext=(3, 0))
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_yticks(range(len(rows)), [row["mode"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s while decoding\nthin line: least to most; dashed: what the memory allows")
    name = rows[0]["shape"] or Path(rows[0]["checkpoint_path"]).name
    axes.set_title(f"How fast does {name} decode? ({rows[0]['dtype']}, batch {rows[0]['batch_size']})")
    return fig
