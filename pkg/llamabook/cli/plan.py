"""`llamabook plan`, written by hand: does a model fit on so many GPUs, and how fast will it decode?"""

import difflib
import json

from llamabook.errors import ContextError, InputError

CONTEXT = 4096  # where none is asked for and the shape knows as many
CAUSES = {
    "weights": "reading the weights",
    "compute": "multiplying, beyond reading",
    "cache": "reading the cache",
    "kernels": "starting kernels",
    "latency": "waiting for all-reduces",
    "links": "sending what they carry",
}


def foretell(
    *,
    shape: str,
    gpu: str,
    num_gpus: int,
    gpus_per_node: int,
    precision: str,
    batch_size: int,
    context: int | None,
    as_json: bool,
) -> None:
    """Print whether it fits, the memory of a GPU, the speed and what limits it, and the same for other numbers of GPUs."""
    from llamabook.bench.job import shapes
    from llamabook.fast.scaling import GPUS, PRECISIONS, Plan

    cfg, sheet = pick("shape", shape, shapes()), pick("gpu", gpu, GPUS)
    kind = pick("precision", precision, PRECISIONS)
    if context is not None and context > cfg["context_length"]:
        raise ContextError(f"--context is {context}, {shape} knows {cfg['context_length']}: ask for fewer")
    length = min(CONTEXT, cfg["context_length"]) if context is None else context
    ask = {"gpus_per_node": gpus_per_node, "precision": kind, "batch_size": batch_size, "context": length}
    plan = Plan(cfg, sheet, num_gpus, **ask)
    asked_for = {"shape": shape, "gpu": gpu, "gpus_per_node": gpus_per_node, "precision": precision}
    report = {**asked_for, "batch_size": batch_size, "context": length, **described(plan)}
    others = sorted({num_gpus, *(2**i for i in range(max(2 * num_gpus, gpus_per_node).bit_length()))})
    report["table"] = [row(cfg, sheet, n, ask) for n in others]
    print(json.dumps(report, indent=1) if as_json else told(report, plan))


def pick(flag: str, name: str, known: dict):
    """What `name` stands for. Raises InputError with the nearest names there are, or all."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"this version has {', '.join(known)}"
        raise InputError(f"there is no {flag} {name!r}: {hint}")
    return known[name]


def row(cfg: dict, gpu, num_gpus: int, ask: dict) -> dict:
    """`described` for another number of GPUs, or why it can't be."""
    from llamabook.fast.scaling import Plan

    try:
        return described(Plan(cfg, gpu, num_gpus, **ask))
    except InputError as error:
        return {"num_gpus": num_gpus, "error": str(error)}


def described(plan) -> dict:
    """A plan in numbers, for JSON: bytes, seconds, tokens per second."""
    from llamabook.fast.scaling import memory, step_terms

    held, terms = memory(plan), step_terms(plan)
    return {
        "num_gpus": plan.num_gpus,
        "nodes": -(-plan.num_gpus // plan.gpus_per_node),
        "fits": plan.fits,
        "memory_bytes": {**held, "together": sum(held.values()), "available": 1e9 * plan.gpu.memory},
        "step_s": {**terms, "together": plan.seconds},
        "tokens_per_s_of_a_text": 1 / plan.seconds,
        "tokens_per_s": plan.batch_size / plan.seconds,
        "most_time": max(terms, key=terms.get),
    }


def told(report: dict, plan) -> str:
    """The report for a terminal."""
    from llamabook.bench.report import aligned

    B, n, nodes, G = plan.batch_size, plan.num_gpus, report["nodes"], plan.cfg["n_kv_groups"]
    where = f"{n} x {plan.gpu.name}" + (f", {nodes} nodes of {plan.gpus_per_node}" if nodes > 1 else "")
    texts = f"{B} text{'s' * (B > 1)} of {report['context']} tokens"
    held, step, speed = report["memory_bytes"], report["step_s"], report["tokens_per_s"]
    verdict = "it fits" if report["fits"] else f"it does not fit{enough(report['table'])}"
    shares = [(gb(held[part]), part) for part in ("weights", "replicated", "cache")]
    times = [(ms(step[cause]), f"{step[cause] / step['together']:.0%}", said) for cause, said in CAUSES.items() if step[cause]]
    lines = [
        f"{report['shape']} in {report['precision']} on {where}; {texts}",
        "",
        f"Memory of a GPU: {gb(held['together'])} of {plan.gpu.memory:g} GB: {verdict}.",
        indented(aligned(shares)),
    ]
    if n > G:
        lines.append(f"  {G} KV heads on {n} GPUs: each is held by {n // G}, its cache too.")
    lines += ["", f"A step: {ms(step['together'])}, most of it {CAUSES[report['most_time']]}.", indented(aligned(times)), ""]
    whole = f", all {B} together {speed:.1f}" if B > 1 else ""
    lines.append(f"Predicted: {report['tokens_per_s_of_a_text']:.1f} tokens/s for a text{whole}{'' if report['fits'] else ', if it fitted'}.")
    lines += ["", aligned(table(report["table"])), ""]
    lines.append("Foretold, not measured: with full contexts, and nobody late. Of the seven speeds that gpt-fast published for")
    lines.append("A100s, six came out within 20 %.")
    return "\n".join(lines)


def table(rows: list[dict]) -> list[tuple[str, ...]]:
    """A line for each number of GPUs."""
    lines = [("GPUs", "GB a GPU", "fits", "ms a step", "tokens/s", "most of a step")]
    for found in rows:
        if "error" in found:
            lines.append((str(found["num_gpus"]), "-", "no", "-", "-", "can't be split so"))
            continue
        size = f"{found['memory_bytes']['together'] / 1e9:.1f}"
        if not found["fits"]:
            lines.append((str(found["num_gpus"]), size, "no", "-", "-", "-"))
            continue
        step = f"{1e3 * found['step_s']['together']:.2f}"
        lines.append((str(found["num_gpus"]), size, "yes", step, f"{found['tokens_per_s']:.1f}", CAUSES[found["most_time"]]))
    return lines


def enough(rows: list[dict]) -> str:
    """How many of the GPUs in the table would do."""
    fitting = [found["num_gpus"] for found in rows if found.get("fits")]
    return f", {min(fitting)} would do" if fitting else ", nor on any number in the table"


def indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
