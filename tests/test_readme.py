"""The front page keeps its word: links lead somewhere, code runs, and what it says works now does."""

import importlib
import json
import re
from pathlib import Path

import pytest

from llamabook import llama2
from llamabook.bench.report import paired
from llamabook.cli import main
from llamabook.cli.app import Commands, app
from llamabook.fast.scaling import GPUS, Plan
from llamabook.pocket.questions import grade

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = [line.split("|")[1:-1] for line in README.splitlines() if line.startswith("| ") and line.count("|") == 4]
NOW = [here for _, here, when in ROWS if when.strip() == "now"]


def commands() -> list[str]:
    import typer

    group = typer.main.get_command(app)
    assert isinstance(group, Commands)
    return list(group.commands)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("https://"):
            assert (ROOT / target).exists(), target


def test_the_code_runs(capsys):
    story, answer = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
    exec(compile(story, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("One sunny morning,")
    exec(compile(answer, "README.md", "exec"), {})
    assert grade("What do llamas eat?", capsys.readouterr().out)


def test_make_has_the_targets_that_the_pages_name():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pages = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:`|^)make ([a-z-]+)", pages, re.M)):
        assert re.search(rf"^(\.PHONY:.*\b{target}\b|{target}[ :])", makefile, re.M), target


def test_the_table_of_commands_is_complete():
    table = README.split("| command | what it does |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `([\w-]+)` \|", table, re.M) == commands()


@pytest.mark.parametrize("command", ["generate", "chat", "draft-eval", "plan"])
def test_the_table_names_all_flags(command):
    import typer

    row = re.search(rf"^\| `{command}` \|.*$", README, re.M)[0]
    parameters = typer.main.get_command(app).commands[command].params
    assert set(re.findall(r"--\w+", row)) == {f"--{parameter.name}" for parameter in parameters}


def test_what_works_now_is_there():
    """Commands and imports in the rows that say *now*."""
    assert len(NOW) > 8
    for here in NOW:
        for command in re.findall(r"python -m llamabook (\w[\w-]*)", here):
            assert command in commands(), here
        for module, names in re.findall(r"from (llamabook[\w.]*) import ([\w, ]+)", here):
            for name in names.split(","):
                assert hasattr(importlib.import_module(module), name.strip()), here


def test_each_row_says_when():
    assert all(re.fullmatch(r"now|now, \d|\d|\d, \d|when|-+|state|coming|complete", when.strip()) for *_, when in ROWS)


def test_no_output_block_is_empty():
    """A block after an `output:` comment is filled from a real run."""
    for name, block in re.findall(r"<!-- output: (.+?) -->\n```\n(.*?)```", README, re.S):
        assert block.strip(), name


def test_the_plan_is_what_the_command_prints(capsys):
    block = README.split("<!-- output: plan -->\n```\n")[1].split("```")[0]
    command = re.search(r"^python -m llamabook (plan .+)$", README, re.M)[1]
    assert main(command.split()) == 0
    assert capsys.readouterr().out == block


def test_the_plans_are_as_far_off_as_the_table_says():
    """As gpt-fast ran: a cache of 208 tokens, embedding and head whole on each GPU."""
    lines = README.split("| Llama 2 on GPUs |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(lines) == 7
    for line in lines:
        size, number, predicted, published, error = re.findall(r"[\d.]+", line)
        cfg = {"7": llama2.LLAMA2_CONFIG_7B, "70": llama2.LLAMA2_CONFIG_70B}[size]
        plan = Plan(cfg, GPUS["a100"], int(number), context=208, split_vocabulary=False)
        assert f"{1 / plan.seconds:.1f}" == predicted
        assert f"{abs(100 / plan.seconds / float(published) - 100):.0f}" == error


def test_the_speeds_are_those_of_the_file():
    """Row for row as it was measured: median, spread, share of the memory, and the paired ratio."""
    rows = json.loads((ROOT / "ch04_kv_cache_and_compile/speed/peers.json").read_text(encoding="utf-8"))
    table = README.split("### How fast it decodes")[1].split("| our engine, ")[1].split("\n\n")[0].splitlines()
    assert len(table) == len(rows)
    for row, line in zip(rows, table):
        speeds = [row[f"tokens_per_s{end}"] for end in ("", "_min", "_max")]
        expected = "| {:.1f} ({:.1f} to {:.1f}) | {:.0f} % |".format(*speeds, 100 * row["share_of_bandwidth"])
        assert expected in line
        if row["mode"] != "static":
            assert "{:.2f} ({:.2f} to {:.2f})".format(*paired(rows, "static", row["mode"])) in line


def test_the_speeds_with_few_bits_are_those_of_the_file():
    rows = json.loads((ROOT / "ch05_quantization_speculative/speed/few_bits.json").read_text(encoding="utf-8"))
    table = README.split("| with few bits |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) == len(rows)
    for row, line in zip(rows, table):
        speeds = [row[f"tokens_per_s{end}"] for end in ("", "_min", "_max")]
        assert "| {:.1f} ({:.1f} to {:.1f}) | {:.0f} % |".format(*speeds, 100 * row["share_of_bandwidth"]) in line
        assert f"| {row['check_cost']:.2f} |" in line if "check_cost" in row else "| |" in line
        ours = "static_int8" if "8" in row["mode"] else "static_int4"
        if not row["mode"].startswith("static"):
            assert "{:.2f} ({:.2f} to {:.2f})".format(*paired(rows, ours, row["mode"])) in line


def test_what_speculation_gains_is_that_of_the_files():
    lines = README.split("| speculation |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(lines) == 11
    for line in lines:
        target, draft, size, *cells = [cell.strip() for cell in line.strip("| ").split("|")]
        end = ("_80m" if "80M" in draft else "") + {"bf16": "", "int8": "_int8"}.get(target, "_int4")
        path = ROOT / f"ch05_quantization_speculative/speed/draft_eval{end}.json"
        report = json.loads(path.read_text(encoding="utf-8"))
        (batch,) = (batch for batch in report["batches"] if batch["batch_size"] == int(size))
        adaptive, best = batch["adaptive"], max(batch["rows"], key=lambda row: row["speedup"])
        gains = [adaptive[name] for name in ("speedup", "speedup_low", "speedup_high")]
        errors = [abs(row["error"]) for row in batch["rows"]]
        assert cells == [
            f"{batch['alpha']:.0%}", "{:.2f} ({:.2f} to {:.2f})".format(*gains), f"k = {best['speculate_k']}: {best['speedup']:.2f}",
            f"{sum(errors) / len(errors):.0%}, {max(errors):.0%}",
        ]  # fmt: skip


def test_the_cost_of_few_bits_is_that_of_the_file():
    """Each cell is what the report has for the path that rounds activations, which is the one that was timed."""
    rows = json.loads((ROOT / "ch05_quantization_speculative/quality/quality.json").read_text(encoding="utf-8"))
    found = {
        (row["model"], row["precision"], row["method"], row["groupsize"]): "{:.2f} ± {:.2f}".format(
            100 * row["added"], 100 * row["added_error"]
        )
        for row in rows
        if row["activations"] == "rounded"
    }
    lines = README.split("| loss added, % |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(lines) == 5
    for line, size in zip(lines, (None, 32, 64, 128, 256)):
        for model in ("pocket-llama3.2", "pocket-llama2"):
            for method in ("rounding", "GPTQ") if size else ("rounding",):
                assert found[model, "int4" if size else "int8", method, size] in line
