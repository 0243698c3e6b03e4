"""What the numbers of the draft laboratory say, written by hand: a table for each batch size, a file and a figure."""

import math

from llamabook.bench.report import aligned


def foretold(batch: dict) -> str:
    """Line by line, from costs alone: how often a draft must be right to pay."""
    costs, B = batch["costs"], batch["batch_size"]
    needs = {row["speculate_k"]: row["needs_alpha"] for row in costs["rows"]}
    paying = {k: need for k, need in needs.items() if need is not None}
    said = f"Batch {B}, from what steps cost: plain {ms(costs['plain_step_s'])} ms, a drafted token {costs['draft_cost']:.2f} of that."
    if not paying:
        return f"{said}\nNo draft that costs so much pays, however often it is right."
    best = min(paying, key=paying.get)
    each = ", ".join(f"{k}: {percent(need)}" for k, need in needs.items())
    return f"{said}\nA draft must be right {percent(paying[best])} of the time to pay, at k = {best} (k = {each})."


def table(batch: dict) -> str:
    """One batch size for a terminal: a line for each k, and one for the k that runs choose themselves."""
    lines = [("k", "draft ms", "check ms", "right by place", "right", "needs", "kept", "predicted", "measured (90 %)", "tokens/s")]
    for row in batch["rows"]:
        lines.append((
            str(row["speculate_k"]), ms(row["draft_step_s"]), ms(row["check_s"]), by_place(row), percent(row["alpha"]),
            percent(row["needs_alpha"]), f"{row['mean_accepted']:.2f}", f"{row['predicted']:.2f}", *measured(row),
        ))  # fmt: skip
    row = batch["adaptive"]
    rounds = sum(number for _, number in row["chosen"])
    often = sorted(row["chosen"], key=lambda pair: -pair[1])[:3]
    right = percent(row["alpha"]) if row["reached"] else "-"
    kept = f"{row['mean_accepted']:.2f}" if row["reached"] else "-"
    lines.append(("adaptive", "", "", by_place(row), right, "", kept, "", *measured(row)))
    chose = ", ".join(f"k = {k} in {percent(number / rounds)}" for k, number in often)
    head = f"Batch {batch['batch_size']}: plain {ms(row['plain_step_s'])} ms a step; the draft is right {percent(batch['alpha'])} of the time"
    return f"{head}\n{aligned(lines)}\nadaptive: {chose} of its rounds"


def measured(row: dict) -> tuple[str, str]:
    return f"{row['speedup']:.2f} ({row['speedup_low']:.2f}-{row['speedup_high']:.2f})", f"{row['tokens_per_s']:.1f}"


def by_place(row: dict) -> str:
    """Of the tokens that were tried at each place of a draft, from 1 on, the share that was kept."""
    return " ".join(f"{100 * stayed / reached:.0f}" for stayed, reached in zip(row["stayed"], row["reached"]))


def percent(share: float | None) -> str:
    return "never" if share is None else f"{100 * share:.0f} %"


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"


def accuracy(batches: list[dict]) -> dict:
    """How far the formula's speed-ups were from the measured ones: relative, mean and worst, and where that was."""
    errors = {(batch["batch_size"], row["speculate_k"]): row["error"] for batch in batches for row in batch["rows"]}
    B, k = max(errors, key=lambda place: abs(errors[place]))
    mean = sum(map(abs, errors.values())) / len(errors)
    return {"mean": mean, "worst": abs(errors[B, k]), "worst_batch_size": B, "worst_speculate_k": k}


def last_line(error: dict) -> str:
    where = f"batch {error['worst_batch_size']}, k = {error['worst_speculate_k']}"
    return f"The formula is off by {100 * error['mean']:.1f} % on average, by {100 * error['worst']:.1f} % at worst ({where})."


def draw(report: dict):
    """A matplotlib figure: speed-up by batch size and k, measured large, predicted small."""
    from matplotlib.colors import LinearSegmentedColormap

    from llamabook.figures import COLORS, figure

    batches = report["batches"]
    columns = [str(row["speculate_k"]) for row in batches[0]["rows"]] + ["adaptive"]
    cells = [[*batch["rows"], batch["adaptive"]] for batch in batches]
    values = [[math.log2(row["speedup"]) for row in line] for line in cells]
    reach = max(0.5, *(abs(value) for line in values for value in line))
    colors = LinearSegmentedColormap.from_list("worth", [COLORS["gpt"], "white", COLORS["llama"]])  # white: as fast as without
    fig, axes = figure(width=max(6.0, 1.8 + 0.85 * len(columns)), height=1.9 + 0.62 * len(batches))
    image = axes.imshow(values, cmap=colors, vmin=-reach, vmax=reach, aspect="auto")
    for y, line in enumerate(cells):
        for x, row in enumerate(line):
            ink = "white" if abs(values[y][x]) > 0.6 * reach else COLORS["floor"]
            axes.annotate(f"{row['speedup']:.2f}", (x, y), (0, 5), textcoords="offset points", ha="center", va="center",
                          color=ink, fontsize=11, fontweight="bold")  # fmt: skip
            below = f"predicted {row['predicted']:.2f}" if "predicted" in row else "its own k"
            axes.annotate(below, (x, y), (0, -9), textcoords="offset points", ha="center", va="center", color=ink, fontsize=7)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(batches)), [str(batch["batch_size"]) for batch in batches])
    axes.grid(False)
    axes.set_xlabel("drafted tokens a round")
    axes.set_ylabel("texts at once")
    axes.set_title(f"How much faster is {report['target']['name']} with {report['draft']['name']}?")
    bar = fig.colorbar(image, ax=axes, label="times plain decoding")
    bar.locator, bar.formatter = ticks(reach), lambda value, _: f"{2**value:.2g}"
    bar.update_ticks()
    return fig


def ticks(reach: float):
    """Round speed-ups within the scale, as places on it."""
    from matplotlib.ticker import FixedLocator

    return FixedLocator([math.log2(x) for x in (0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8) if abs(math.log2(x)) <= reach])
