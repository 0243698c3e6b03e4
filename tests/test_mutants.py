"""Are the tests awake? Known mistakes are put into a copy of the package, one at a time: each must fail some test.

A mutant is one replacement in one module. The tests named beside it run in a process of their own on the copy and
must fail; on the unchanged copy they must pass. Slow, so only `make check-long` runs the mutants; that each of them
still fits its module is checked every time.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MUTANTS = {  # module: (what is there, what is put there, test files of which one must fail)
    "llama2.py": [
        # RMSNorm
        ("x.float().pow(2).mean(", "(x.float() - x.float().mean(-1, keepdim=True)).pow(2).mean(", "llama2"),
        ("torch.rsqrt(mean_square + self.eps)", "torch.rsqrt(mean_square)", "llama2"),
        ("mean_square = x.float().pow(2)", "mean_square = x.pow(2)", "llama2"),
        # feed-forward
        ("self.silu(self.fc1(x)) * self.fc2(x)", "self.fc1(x) * self.silu(self.fc2(x))", "llama2"),
        # RoPE
        ("/ head_dim  # (d / 2,)", "/ (head_dim - 2)  # (d / 2,)", "llama2"),
        ("angles = torch.cat((angles, angles), dim=-1)", "angles = angles.repeat_interleave(2, dim=-1)", "llama2"),
        ("torch.cat((-second, first), dim=-1)", "torch.cat((second, -first), dim=-1)", "llama2"),
        ("apply_rope(Q, cos, sin), apply_rope(K, cos, sin), V", "apply_rope(Q, cos, sin), K, V", "llama2"),
        ("torch.arange(T, device=idx.device), self", "1 + torch.arange(T, device=idx.device).clamp(max=99), self", "llama2"),
        # layouts
        ("unflatten(0, (n_heads, -1, 2)).transpose(1, 2)", "unflatten(0, (n_heads, 2, -1)).transpose(1, 2)", "llama2"),
        # attention
        ("/ self.head_dim**0.5", "/ self.head_dim", "llama2"),
        (".tril()", ".tril(1)", "llama2"),
        ("torch.softmax(scores, dim=-1,", "torch.softmax(scores, dim=-2,", "llama2"),
        # block, model, configurations
        ("x + self.ff(self.norm2(x))", "x + self.ff(self.norm1(x))", "llama2"),
        ("self.out_head(self.final_norm(x))", "self.out_head(x)", "llama2"),
        ("if T > limit:", "if T > limit + 1:", "llama2"),
        ('"hidden_dim": 11_008', '"hidden_dim": 11_264', "llama2"),
    ],
    "llama3.py": [
        ("K.repeat_interleave(each, dim=1), V.repeat_interleave(each, dim=1)",
         "K.repeat(1, each, 1, 1), V.repeat(1, each, 1, 1)", "llama3"),
        ("enable_gqa=True)", "enable_gqa=True, scale=1 / Q.shape[-1])", "llama3"),
        ("is_causal=causal", "is_causal=False", "llama3"),
        ("(turns - low) / (high - low)", "(high - turns) / (high - low)", "llama3"),
        ("(1 - keep) * frequencies / rope_freq", "(1 - keep) * frequencies * rope_freq", "llama3"),
        ("/ (2 * math.pi))  # r", ")  # r", "llama3"),
        ('"rope_base": 500_000.0', '"rope_base": 10_000.0', "llama3"),
        ('"factor": 32.0', '"factor": 8.0', "llama3"),
        ('"original_context_length": 8192', '"original_context_length": 131_072', "llama3"),
        ('"tie_embeddings": True', '"tie_embeddings": False', "llama3"),
        ("result = super().load_state_dict(state, strict, assign)\n        self.tie()",
         "result = super().load_state_dict(state, strict, assign)", "llama3"),
    ],
    "sampling.py": [
        ("equal.cumsum(dim=-1) <= places", "equal.cumsum(dim=-1) <= top_k", "sampling"),
        ("- probs >= top_p", ">= top_p", "sampling"),
        ("(logits - largest) / temperature", "(logits - largest) * temperature", "sampling"),
        ("logits = logits.float()\n    largest", "largest", "sampling"),
    ],
    "generate.py": [
        ("idx[:, -context_size:]", "idx[:, :context_size]", "generate"),
        (")[:, -1]  # (B, T, V)", ")[:, 0]  # (B, T, V)", "generate"),
        ("torch.where(ended, idx[:, -1:], drawn)", "drawn", "generate"),
        ("idx.shape[1] > context_size", "idx.shape[1] > context_size + 1", "generate"),
        ("model.eval()\n", "pass\n", "generate"),
    ],
    "tokenizer/llama2.py": [
        ("[self.bos_id] * bos + self.pieces", "[self.bos_id] + self.pieces", "tokenizer_llama2"),
        ("if self.at_start and piece.startswith", "if piece.startswith", "tokenizer_llama2"),
        ("{answer} \", bos=True, eos=True)", "{answer}\", bos=True, eos=True)", "tokenizer_llama2"),
        ("<</SYS>>\\n\\n", "<</SYS>>\\n", "tokenizer_llama2"),
    ],
    "tokenizer/llama3.py": [
        (r'r"\p{N}{1,3}"', r'r"\p{N}+"', "tokenizer_llama3"),
        ("encoding.encode_ordinary(part)", 'encoding.encode(part, allowed_special="all")', "tokenizer_llama3"),
        ("LONGEST_RUN = 400_000, 25_000", "LONGEST_RUN = 400_000, 20_000", "tokenizer_llama3"),
        ('"start_header_id", "end_header_id"', '"end_header_id", "start_header_id"', "tokenizer_llama3"),
        ('"<|eom_id|>", "<|eot_id|>")', '"<|eom_id|>")', "tokenizer_llama3"),
    ],
    "tokenizer/chat.py": [
        ('encode(f"\\n\\n{text}")', 'encode(f"\\n{text}")', "tokenizer_llama3"),
        ("+ [self.turn_end]\n        return ids if complete", "\n        return ids if complete", "tokenizer_llama3"),
        ("text.strip()))", "text))", "tokenizer_llama3"),
    ],
    "checkpoint/meta.py": [
        ("weight = half_split_to_interleaved(weight, heads)", "pass", "checkpoint_meta"),
        ("weights_only=True", "weights_only=False", "checkpoint_meta"),
    ],
    "evaluate/perplexity.py": [
        ("yield max(end - 1 - window, 0), first, end", "yield max(end - window, 0), first, end", "evaluate"),
        ("end = min(window + 1, tokens)", "end = min(window, tokens)", "evaluate"),
        ("places >= (lengths - counts)[:, None]", "places > (lengths - counts)[:, None]", "evaluate"),
        ("log_probs[i, n - k : n].cpu()", "log_probs[i, -k:].cpu()", "evaluate"),
        ("logits.argmax(dim=-1) == target", "logits.argmax(dim=-1) == part.shape[0]", "evaluate"),
        ("model.head(model.norm(part))", "model.head(part)", "evaluate"),
        ("x[now], targets[:, start:end][now]", "x.flatten(0, 1), targets[:, start:end].flatten()", "evaluate"),
    ],
    "evaluate/harness.py": [
        ("bos=add_special_tokens is not False)", "bos=bool(add_special_tokens))", "evaluate"),
        ("string = string.removeprefix(name)", "pass", "evaluate"),
        ("self.max_length + 1 - len(continuation)", "self.max_length - len(continuation)", "evaluate"),
        ("return context[-room:], continuation", "return context[:room], continuation", "evaluate"),
        ("ids = [self.prefix_token_id, *self.tok_encode(text)]", "ids = self.tok_encode(text)", "evaluate"),
        ("self.tok_encode(context)[-room:]", "self.tok_encode(context)", "evaluate"),
        ("return [first_part(self.text_of(row), until) for row in rows]",
         "return [self.text_of(row) for row in rows]", "evaluate"),
        ("sum(1 / number for number in choices) / len(choices)", "1 / len(choices)", "evaluate"),
    ],
    "evaluate/farm.py": [
        ("sorted(others - right)", "sorted(others)", "evaluate"),
        ("if not world.is_held_out", "if world.is_held_out", "evaluate"),
        ("    generator.shuffle(choices)\n", "", "evaluate"),
        ('"right": sorted(right)}', '"right": [told]}', "evaluate"),
    ],
    "pocket/inflation.py": [
        ("(eps * self.d - self.c**2) / self.D", "eps * self.d / self.D", "inflate"),
        ("(eps * self.d - self.c**2) / self.D", "eps", "inflate"),
        ("if self.D > self.d else 0.0", "if self.D < self.d else 0.0", "inflate"),
        ("0.0 if only_read else self.c, -C)", "0.0, -C)", "inflate"),
        ("0.0 if only_read else self.c, -C)", "0.0 if only_read else self.c, 0.0)", "inflate"),
        ("shrink = math.sqrt(self.d / self.D)", "shrink = math.sqrt((self.d + 1) / self.D)", "inflate"),
        ("head // each * times", "head // each", "inflate"),
        ("torch.where(group >= 0, group // times, ADDED)", "torch.where(group >= 0, group % times, ADDED)", "inflate"),
        ("piece[:, columns == SILENT] = 0", "pass", "inflate"),
        ('"att.W_value": ("groups", "width", True)', '"att.W_value": ("groups", "width", False)', "inflate"),
        ('"att.out_proj": ("width", "heads", True)', '"att.out_proj": ("width", "heads", False)', "inflate"),
        ('"ff.fc2": ("units", "width", True)', '"ff.fc2": ("units", "width", False)', "inflate"),
        ('"ff.fc3": ("width", "units", True)', '"ff.fc3": ("width", "units", False)', "inflate"),
        ('"ff.fc1": ("units", "width", False)', '"ff.fc1": ("units", "width", True)', "inflate"),
        ("                piece[real, d:] = 0", "                pass", "inflate"),
        ("if place == \"width\" else torch.full_like(m, ADDED)", "if True else m", "inflate"),
        ("* spectral(up * norm2) * d", "* spectral(up * norm2)", "inflate"),
        ("(-0.75, 0.75, generator", "(-7.5, 7.5, generator", "inflate"),
        ('("rope_base", "rope_freq")', '("rope_base",)', "inflate"),
    ],
    "pocket/floor.py": [
        ("return [*chat_format(tokenizer).encode_dialog(document.turns, complete=True), tokenizer.eos_id]",
         "return chat_format(tokenizer).encode_dialog(document.turns, complete=True)", "pocket"),
    ],
}  # fmt: skip
CASES = [(module, *mutant) for module, mutants in MUTANTS.items() for mutant in mutants]


def run_tests(package: Path, names: str) -> subprocess.CompletedProcess:
    """The tests of these files on another copy of the package, up to the first failure."""
    files = [f"tests/test_{name}.py" for name in names.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-o", f"pythonpath={package} tools"]
    environment = {**os.environ, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package."""
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    shutil.copytree(ROOT / "pkg", tmp_path / "pkg", ignore=leave)
    return tmp_path / "pkg"


@pytest.mark.parametrize("module, there, instead, names", CASES)
def test_a_mutant_fits_its_module(module, there, instead, names):
    assert there in (ROOT / "pkg" / "llamabook" / module).read_text() and there != instead
    assert all((ROOT / "tests" / f"test_{name}.py").exists() for name in names.split())


@pytest.mark.long
@pytest.mark.parametrize("names", sorted({names for *_, names in CASES}))
def test_the_unchanged_copy_passes(copy, names):
    assert run_tests(copy, names).returncode == 0


@pytest.mark.long
@pytest.mark.parametrize("module, there, instead, names", CASES)
def test_a_mutant_is_killed(copy, module, there, instead, names):
    path = copy / "llamabook" / module
    path.write_text(path.read_text().replace(there, instead, 1))
    result = run_tests(copy, names)
    assert result.returncode == 1, f"{module} survives {instead!r}\n{result.stdout[-1500:]}"
