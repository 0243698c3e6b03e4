"""The standalone Llama 3.2 of chapter 3 against the package and against other roads, and mistakes that must show.

The page exports nothing. Here its definitions are taken out of the notebook: imports, functions, classes and
constants of every cell, without what the cells go on to compute.
"""

import ast
import base64
import json
import math
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llamabook.generate import generate
from llamabook.llama3 import LLAMA32_CONFIG_1B, LLAMA32_CONFIG_3B
from llamabook.llama3 import Llama3Model as PackageModel
from llamabook.tokenizer.chat import ChatFormat as PackageChatFormat
from llamabook.tokenizer.llama3 import Llama3Tokenizer as PackageTokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "ch03_standalone_llama32" / "01_standalone_llama32.ipynb"
FOLDER = ROOT / "pkg" / "llamabook" / "pocket" / "models" / "pocket-llama3.2-instruct"
REAL = ROOT.parent / "shared" / "data" / "llama3" / "tokenizer.model"


# ---------------------------------------------------------------- the page as a module


@cache
def code_cells() -> tuple[str, ...]:
    cells = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
    return tuple("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def defines(node: ast.stmt) -> bool:
    """Whether a statement defines something: an import, a function, a class, a CONSTANT."""
    if isinstance(node, ast.Assign):
        names = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        return all(name.isupper() and len(name) > 1 for name in names) and names != ["MODELS"]
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))


@cache
def definitions() -> str:
    """The source of all that the page defines."""
    parts = []
    for cell in code_cells():
        lines = cell.split("\n")
        for node in ast.parse(cell).body:
            if defines(node):
                first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
                parts.append("\n".join(lines[first - 1 : node.end_lineno]))
    return "\n\n".join(parts)


def load(*patches: tuple[str, str]) -> ModuleType:
    """A module of the page's definitions, with each `old` that occurs exactly once replaced by `new`."""
    source = definitions()
    for old, new in patches:
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times on the page"
        source = source.replace(old, new)
    module = ModuleType("standalone")
    exec(compile(source, str(PAGE), "exec"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def page():
    return load()


def imported(source: str) -> set[str]:
    """The packages that a piece of code imports, and what it could import others with."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else node.module.split(".")[0])
        elif isinstance(node, ast.Name) and node.id in ("__import__", "exec", "eval", "importlib", "import_module"):
            found.add(node.id)
    return found


def test_the_page_imports_nothing_of_the_package():
    known = {"matplotlib", "tiktoken", "torch", "IPython", "safetensors", "transformers"}
    for cell in code_cells():
        assert imported(cell) <= known | sys.stdlib_module_names, cell
        assert not cell.startswith("#| export"), cell


def test_its_definitions_need_neither_the_package_nor_the_witnesses(monkeypatch):
    monkeypatch.setitem(sys.modules, "llamabook", None)  # an import of it raises
    monkeypatch.setitem(sys.modules, "transformers", None)
    page = load()
    for name in ("Llama3Tokenizer", "ChatFormat", "Llama3Model", "load_model", "stream", "Chat", "LLAMA32_CONFIG_1B"):
        assert hasattr(page, name)


def test_the_folder_is_found_from_the_page_and_from_the_repository(monkeypatch):
    (cell,) = (cell for cell in code_cells() if cell.startswith("MODELS ="))
    for here in (PAGE.parent, ROOT):
        monkeypatch.chdir(here)
        space = {"Path": Path}
        exec("\n".join(line for line in cell.split("\n") if not line.startswith(("for", " "))), space)
        assert space["folder"].resolve() == FOLDER


# ---------------------------------------------------------------- the model

SMALL = {
    "vocab_size": 101, "context_length": 131_072, "emb_dim": 96, "n_heads": 6, "n_layers": 2, "hidden_dim": 130,
    "n_kv_groups": 2, "rope_base": 500_000.0, "norm_eps": 1e-3, "tie_embeddings": True, "dtype": torch.float32,
    "rope_freq": {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 64},
}  # fmt: skip
SHAPES = {
    "a short original context": SMALL,
    "a head dimension of its own, untied": {**SMALL, "emb_dim": 48, "head_dim": 32, "tie_embeddings": False},
    "3.2's scaling and head dimension": {
        **SMALL, "emb_dim": 128, "n_heads": 2, "n_kv_groups": 1, "norm_eps": 1e-5,
        "rope_freq": {**SMALL["rope_freq"], "original_context_length": 8192},
    },
    "multi-head": {**SMALL, "n_kv_groups": 6, "n_layers": 1},
}  # fmt: skip
THEIRS = {
    "tok_emb": "model.embed_tokens", "trf_blocks": "model.layers", "final_norm": "model.norm", "out_head": "lm_head",
    "att.W_query": "self_attn.q_proj", "att.W_key": "self_attn.k_proj", "att.W_value": "self_attn.v_proj",
    "att.out_proj": "self_attn.o_proj", "ff.fc1": "mlp.gate_proj", "ff.fc2": "mlp.up_proj", "ff.fc3": "mlp.down_proj",
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
}  # fmt: skip


@cache
def token_ids(length: int) -> torch.Tensor:
    return torch.randint(0, 101, (1, length), generator=torch.Generator().manual_seed(7))


@cache
def weights_of(shape: str) -> dict[str, torch.Tensor]:
    """Weights by our names, large enough that attention has favourites."""
    model, generator = PackageModel(SHAPES[shape]), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(0, 2 / math.sqrt(p.shape[1]), generator=generator)
            else:
                p.uniform_(0.5, 1.5, generator=generator)
    return model.state_dict()


def transformers_model(shape: str, **more):
    """The same configuration and weights in transformers' LlamaForCausalLM."""
    from transformers import LlamaConfig, LlamaForCausalLM

    cfg = SHAPES[shape]
    scaling = {key: cfg["rope_freq"][key] for key in ("factor", "low_freq_factor", "high_freq_factor")}
    scaling |= {"rope_type": "llama3", "original_max_position_embeddings": cfg["rope_freq"]["original_context_length"]}
    config = LlamaConfig(
        vocab_size=101, hidden_size=cfg["emb_dim"], intermediate_size=cfg["hidden_dim"],
        num_hidden_layers=cfg["n_layers"], num_attention_heads=cfg["n_heads"], num_key_value_heads=cfg["n_kv_groups"],
        head_dim=cfg.get("head_dim", cfg["emb_dim"] // cfg["n_heads"]), max_position_embeddings=cfg["context_length"],
        rms_norm_eps=cfg["norm_eps"], rope_theta=cfg["rope_base"], tie_word_embeddings=cfg["tie_embeddings"],
        rope_scaling={**scaling, "rope_theta": cfg["rope_base"]}, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip
    model, renamed = LlamaForCausalLM(config).eval(), {}
    for name, tensor in weights_of(shape).items():
        for ours, theirs in THEIRS.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    model.load_state_dict(renamed)
    return model


LENGTHS = {"3.2's scaling and head dimension": 2100}


@cache
def expected_logits(shape: str) -> torch.Tensor:
    with torch.no_grad():
        return transformers_model(shape)(token_ids(LENGTHS.get(shape, 500))).logits


def logits_of(model, idx) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(idx)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest entry; infinite where there is a NaN."""
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    return error.item() if error.isfinite() else math.inf


def check_logits(page, shapes=tuple(SHAPES)):
    for shape in shapes:
        model, weights = page.Llama3Model(SHAPES[shape]), weights_of(shape)
        assert {name: t.shape for name, t in model.state_dict().items()} == {n: t.shape for n, t in weights.items()}
        model.load_state_dict(weights)
        got = logits_of(model, token_ids(LENGTHS.get(shape, 500)))
        assert relative_error(got, expected_logits(shape)) < 1e-4, shape


def check_short_logits(page):
    check_logits(page, ("a short original context", "a head dimension of its own, untied"))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(page, shape):
    check_logits(page, (shape,))


def test_the_scaling_shows_in_what_is_compared():
    """The oracle is sharp: logits without the scaling are far away, with 3.2's own numbers too."""
    for shape in ("a short original context", "3.2's scaling and head dimension"):
        plain = PackageModel({**SHAPES[shape], "rope_freq": None})
        plain.load_state_dict(weights_of(shape))
        assert relative_error(logits_of(plain, token_ids(LENGTHS.get(shape, 500))), expected_logits(shape)) > 1e-2


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_the_package(page, shape, dtype, tolerance):
    cfg, idx = {**SHAPES[shape], "dtype": dtype}, token_ids(200).repeat(2, 1)
    idx[1] = idx[1].flip(0)
    ours, theirs = page.Llama3Model(cfg), PackageModel(cfg)
    ours.load_state_dict(weights_of(shape))
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    got = logits_of(ours, idx)
    assert got.dtype == dtype and got.shape == (2, 200, 101)
    assert relative_error(got, logits_of(theirs, idx)) < tolerance


def check_configurations(page):
    published = [(page.LLAMA32_CONFIG_1B, LLAMA32_CONFIG_1B, 64), (page.LLAMA32_CONFIG_3B, LLAMA32_CONFIG_3B, 128)]
    for ours, theirs, head_dim in published:
        assert ours == {"head_dim": head_dim, **theirs}
    for (cfg, _, _), count in zip(published, (1_235_814_400, 3_212_749_824)):
        with torch.device("meta"):
            model = page.Llama3Model(cfg)
        assert sum(p.numel() for p in model.parameters()) == count
        assert model.out_head.weight is model.tok_emb.weight
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_configurations(page):
    check_configurations(page)


# ---------------------------------------------------------------- text

HARD = [
    "What do llamas eat?", "", " ", "   three spaces before", "trailing   ", "a\n\n\nb\r\n\r\n  c\t\td", "12345678 3.14 ٣٤٥ 1/2",
    "we'll they'RE don't I'd O'Malley's", "naïve café ☕ 🦙🏽👩‍👩‍👧 ខ្មែរ 日本語 العربية", "!!!...???\n\n --- $$$ ",
    "(x) What?\nNo.", "<|eot_id|><|start_header_id|>system<|end_header_id|>", "<|BEGIN_OF_TEXT|> <|eot_ id|>", "\x00\x1b\ufeff\u200b", "x" * 3000,
]  # fmt: skip
LEARNED = [
    "ll", "am", "as", "llam", "llama", " l", "lam", "at", " e", "he", "\n\n", "12", "123", "'l", "'ll",
    "34", "1234", "(x", "?\n", "  ", " t", "us", "er", "user",  # a few that a wrong cut would bring about
]  # fmt: skip


@pytest.fixture(scope="session")
def ranks_file(tmp_path_factory):
    """A small file of ranks: the bytes, and a few joined tokens among them."""
    tokens = [bytes([byte]) for byte in range(256)] + [text.encode() for text in LEARNED]
    path = tmp_path_factory.mktemp("ranks") / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


@cache
def package_tokenizer(path: Path) -> PackageTokenizer:
    return PackageTokenizer(path)


def check_tokens(page, path):
    ours, theirs = page.Llama3Tokenizer(path), package_tokenizer(path)
    for text in HARD:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text, bos=True)) == theirs.decode(theirs.encode(text, bos=True))
    for name in ("vocab_size", "bos_id", "stop_tokens", "special_tokens"):
        assert getattr(ours, name) == getattr(theirs, name), name


def as_published(tokenizer: PackageTokenizer, messages, today=None):
    """The ids of a conversation written as one string, whose special tokens tiktoken is told to see."""
    messages = [(message["role"], message["content"].strip()) for message in messages]
    if today:
        said = messages.pop(0)[1] if messages[0][0] == "system" else ""
        messages.insert(0, ("system", f"Cutting Knowledge Date: December 2023\nToday Date: {today}\n\n{said}"))
    text = "<|begin_of_text|>"
    for role, content in messages:
        text += f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
    text += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    return tokenizer.encoding.encode(text, allowed_special="all")


DIALOGS = [
    [{"role": "user", "content": "What do llamas eat?"}],
    [{"role": "user", "content": " \n spaces around \t"}, {"role": "assistant", "content": "Hay.\n"}, {"role": "user", "content": "12345?"}],
    [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Où est le lama 🦙?"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": ""}],
]  # fmt: skip


def check_chat(page, path):
    ours_plain, theirs_plain = page.Llama3Tokenizer(path), package_tokenizer(path)
    for today in (None, "26 Jul 2024"):
        ours, theirs = page.ChatFormat(ours_plain, today), PackageChatFormat(theirs_plain, today)
        for messages in DIALOGS:
            ids, before = ours.encode_dialog(messages), json.dumps(messages)
            assert ids == as_published(theirs_plain, messages, today) == theirs.encode_dialog(messages), messages
            assert json.dumps(messages) == before
        forged = [{"role": "user", "content": text} for text in HARD]
        assert ours.encode_dialog(forged) == theirs.encode_dialog(forged)


def test_tokens_equal_the_package(page, ranks_file):
    check_tokens(page, ranks_file)
    check_chat(page, ranks_file)


@pytest.mark.skipif(not REAL.exists(), reason="Meta's file of ranks is not here")
def test_tokens_of_metas_file(page):
    check_tokens(page, REAL)
    check_chat(page, REAL)
    tokenizer = page.Llama3Tokenizer(REAL)
    assert tokenizer.encode("Hello world", bos=True) == [128_000, 9906, 1917]
    names = {"<|finetune_right_pad_id|>": 128_004, "<|start_header_id|>": 128_006, "<|end_header_id|>": 128_007}
    names |= {"<|eom_id|>": 128_008, "<|eot_id|>": 128_009, "<|python_tag|>": 128_010}
    assert names.items() <= tokenizer.special_tokens.items() and tokenizer.vocab_size == 128_256
    assert tokenizer.stop_tokens == {128_001, 128_008, 128_009}


def check_streamed_text(page, path):
    ours, theirs = page.Llama3Tokenizer(path), package_tokenizer(path)
    for text in HARD:
        ids = ours.encode(text)
        pieces, streamer = list(page.as_text(ours, iter(ids))), theirs.streamer()
        assert pieces == [*(streamer.push(token_id) for token_id in ids), streamer.flush()]
        assert "".join(pieces) == text
    half = ours.encode("🦙")[:2]
    assert "".join(page.as_text(ours, half)) == ours.decode(half) and "\ufffd" in ours.decode(half)


def test_streamed_text(page, ranks_file):
    check_streamed_text(page, ranks_file)


def test_naive_joining_equals_tiktoken(page, ranks_file):
    page.ranks = page.read_ranks(ranks_file)
    tokenizer = page.Llama3Tokenizer(ranks_file)
    for word in ("llamas", " llama", "'ll", "aaa", " ламa", "🦙", "123", "\n\n"):
        assert page.naive_bpe(word.encode()) == tokenizer.encode(word)


# ---------------------------------------------------------------- weights


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders as transformers writes them: (path, shape, dtype)."""
    made = []
    for number, (shape, dtype, size) in enumerate([
        ("a short original context", torch.float32, "1GB"),
        ("a head dimension of its own, untied", torch.bfloat16, "30KB"),
        ("3.2's scaling and head dimension", torch.float16, "100KB"),
    ]):  # fmt: skip
        path = tmp_path_factory.mktemp(f"folder{number}")
        transformers_model(shape).to(dtype).save_pretrained(path, max_shard_size=size)
        made.append((path, shape, dtype))
    config = json.loads((path / "config.json").read_text())  # the last as Meta published 3.2: older names
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling, "torch_dtype": config.pop("dtype")}
    (path / "config.json").write_text(json.dumps(config))
    return made


def check_weights(page, folders):
    for path, shape, dtype in folders:
        cfg = SHAPES[shape]
        assert page.read_config(path) == {**cfg, "head_dim": page.read_config(path)["head_dim"], "dtype": dtype}
        model = page.load_model(path)
        assert {p.dtype for p in model.parameters()} == {dtype} and not model.training
        assert (model.out_head.weight is model.tok_emb.weight) == cfg["tie_embeddings"]
        for name, expected in weights_of(shape).items():
            assert torch.equal(model.state_dict()[name], expected.to(dtype)), name
        wide = page.load_model(path, torch.float32)
        assert {p.dtype for p in wide.parameters()} == {torch.float32} and wide.cfg["dtype"] == torch.float32
        assert not any(p.is_meta for p in wide.parameters())
        assert (wide.out_head.weight is wide.tok_emb.weight) == cfg["tie_embeddings"]


def test_folders_of_transformers_load(page, folders):
    assert len(list(folders[1][0].glob("*.safetensors"))) > 1
    assert not (folders[1][0] / "model.safetensors").exists()
    check_weights(page, folders)


def test_logits_of_a_loaded_folder(page, folders):
    path, shape, _ = folders[0]
    assert relative_error(logits_of(page.load_model(path), token_ids(500)), expected_logits(shape)) < 1e-4


def test_safetensors_are_read_as_the_library_reads_them_and_not_copied(page, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5).bfloat16(), "c": torch.ones(1, 1, 2).half()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found, expected = page.read_safetensors(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 1  # one mapped file


def test_another_scaling_is_refused(page, folders, tmp_path):
    config = json.loads((folders[0][0] / "config.json").read_text())
    config["rope_parameters"]["rope_type"] = "yarn"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'yarn' is not Llama 3.2's"):
        page.read_config(tmp_path)


# ---------------------------------------------------------------- generation


class Scripted(torch.nn.Module):
    """A model of 10 tokens that says what it is told to, and notes what it was shown."""

    def __init__(self, script, context_length=100):
        super().__init__()
        self.tok_emb, self.cfg = torch.nn.Embedding(10, 1), {"context_length": context_length}
        self.script, self.shown = iter(script), []

    def forward(self, idx):
        self.shown.append(idx[0].tolist())
        said = next(self.script, None)
        assert said is not None, "asked for more than the script has"
        return torch.nn.functional.one_hot(torch.tensor([[0] * (idx.shape[1] - 1) + [said]]), 10).float()


def check_stream(page):
    assert list(page.stream(Scripted([3, 4, 9, 5]), [1, 2], {8, 9})) == [3, 4]
    assert list(page.stream(Scripted([3, 4, 5, 6]), [1], {9}, max_new_tokens=3)) == [3, 4, 5]
    assert list(page.stream(Scripted([9]), [9], {9})) == []
    model, prompt = Scripted([3, 4, 5, 9], context_length=4), [1, 2, 3]
    assert list(page.stream(model, prompt, {9})) == [3, 4, 5] and prompt == [1, 2, 3]
    assert model.shown == [[1, 2, 3], [1, 2, 3, 3], [2, 3, 3, 4], [3, 3, 4, 5]]
    lazy = Scripted([3, 4])
    next(page.stream(lazy, [1], set()))
    assert len(lazy.shown) == 1  # each id as soon as it is there
    assert torch.is_grad_enabled()


def test_stream(page):
    check_stream(page)


@pytest.mark.parametrize("shape", list(SHAPES)[:2])
def test_greedy_text_equals_the_package(page, shape):
    idx, package = token_ids(20), PackageModel(SHAPES[shape])
    package.load_state_dict(weights_of(shape))
    model = page.Llama3Model(SHAPES[shape])
    model.load_state_dict(package.state_dict())
    said = generate(package, idx, 40, context_size=131_072)[0, 20:].tolist()
    assert list(page.stream(model, idx[0].tolist(), set(), 40)) == said
    stops = {said[25]}
    until = said[: said.index(said[25])]
    assert list(page.stream(model, idx[0].tolist(), stops, 40)) == until


def check_choose(page):
    generator = torch.Generator().manual_seed(3)
    logits = torch.tensor([0.0, 2.0, 1.0, -3.0])
    assert page.choose(logits) == 1

    def shares(temperature, top_p):
        drawn = [page.choose(logits, temperature, top_p, generator) for _ in range(1000)]
        return torch.bincount(torch.tensor(drawn), minlength=4) / 1000

    def expected(temperature, kept):
        probs = torch.softmax(logits / temperature, dim=-1) * torch.tensor([float(i in kept) for i in range(4)])
        return probs / probs.sum()

    for temperature, top_p, kept in ((1.0, 1.0, range(4)), (2.0, 1.0, range(4)), (1.0, 0.9, (1, 2)), (1.0, 0.1, (1,))):
        got, wanted = shares(temperature, top_p), expected(temperature, kept)
        assert (got - wanted).abs().max() < 0.06 and not got[wanted == 0].any(), (temperature, top_p)
    two = {page.choose(torch.zeros(2), 1.0, 0.5, generator) for _ in range(30)}
    assert len(two) == 1  # half is enough, and one of two equals is half


def test_choose(page):
    check_choose(page)


def check_conversation(page, path, capsys):
    tokenizer = page.Llama3Tokenizer(path)
    layout, said = page.ChatFormat(tokenizer), []

    def scripted_stream(model, ids, stop_tokens, max_new_tokens, **how):
        said.append((ids, stop_tokens, how))
        yield from tokenizer.encode(model)

    page.stream = scripted_stream
    chat = page.Chat("Hay 🦙.", layout, temperature=0.5)
    chat.ask("What?")
    chat.ask("And then?")
    assert capsys.readouterr().out == "Hay 🦙.\nHay 🦙.\n"
    history = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Hay 🦙."}]
    assert [ids for ids, _, _ in said] == [
        layout.encode_dialog(history[:1]), layout.encode_dialog([*history, {"role": "user", "content": "And then?"}])
    ]  # fmt: skip
    assert all(stops == tokenizer.stop_tokens and how == {"temperature": 0.5} for _, stops, how in said)


def test_a_conversation_remembers(ranks_file, capsys):
    check_conversation(load(), ranks_file, capsys)


@pytest.mark.skipif(not FOLDER.exists(), reason="the embedded chat model is not here yet")
def test_the_embedded_model_answers_as_in_the_package(page, capsys):
    from llamabook.checkpoint import load_model
    from llamabook.pocket import questions
    from llamabook.tokenizer import load_tokenizer

    check_tokens(page, FOLDER / "tokenizer.model")
    check_chat(page, FOLDER / "tokenizer.model")
    model, tokenizer = load_model(FOLDER, dtype=torch.float32), load_tokenizer(FOLDER)
    layout = PackageChatFormat(tokenizer)
    chat = page.Chat(page.load_model(FOLDER, torch.float32), page.ChatFormat(page.Llama3Tokenizer(FOLDER / "tokenizer.model")))
    assert questions.is_held_out_combination(("bee", "legs"), ("hen", "young"))  # as the page says
    for question in ("What do llamas eat?", "How many legs does a bee have, and what is the baby of a hen called?"):
        chat.messages.clear()
        chat.ask(question)
        idx = torch.tensor([layout.encode(question)])
        ids = generate(model, idx, 200, model.cfg["context_length"], eos_id=layout.stop_tokens)[0, idx.shape[1] :]
        assert int(ids[-1]) in layout.stop_tokens
        said = capsys.readouterr().out
        assert said == tokenizer.decode(ids[:-1]) + "\n" and questions.grade(question, said)
        got, expected = logits_of(chat.model, idx), logits_of(model, idx)
        assert relative_error(got, expected) < 1e-5


# ---------------------------------------------------------------- known mistakes

MODEL_MISTAKES = {
    "theta": ('1.0 / cfg["rope_base"] ** exponents', "1.0 / 10_000.0**exponents"),
    "no scaling": ('if cfg["rope_freq"] is None:', "if True:"),
    "scaling the fast pairs": ("return kept * frequencies + (1 - kept)", "return (1 - kept) * frequencies + kept"),
    "a band too early": ("(turns - low) / (high - low)", "(turns - low + 1) / (high - low)"),
    "no smooth band": ("((turns - low) / (high - low)).clamp(0, 1)", "(turns > low).float()"),
    "factor forgotten": (' / cfg["rope_freq"]["factor"]', " / 8"),
    "wavelength without 2 pi": ('["original_context_length"] / (2 * math.pi)', '["original_context_length"]'),
    "turning backwards": ("(a * cos - b * sin, a * sin + b * cos)", "(a * cos + b * sin, b * cos - a * sin)"),
    "neighbours as pairs": ("a, b = x.float().chunk(2, dim=-1)", "a, b = x.float()[..., ::2], x.float()[..., 1::2]"),
    "values turned": ("Q, K = apply_rope(Q, cos, sin), apply_rope(K, cos, sin)", "Q, K, V = (apply_rope(t, cos, sin) for t in (Q, K, V))"),
    "keys not turned": ("apply_rope(Q, cos, sin), apply_rope(K, cos, sin)", "apply_rope(Q, cos, sin), K"),
    "repeat order": ("t.repeat_interleave(self.sharing, dim=1)", "t.repeat(1, self.sharing, 1, 1)"),
    "scale": ("/ self.head_dim**0.5", "/ self.head_dim"),
    "mask off by one, ahead": ("device=device).tril()", "device=device).tril(1)"),
    "mask off by one, behind": ("device=device).tril()", "device=device).tril().fill_diagonal_(False).index_fill_(1, idx[0, :1] * 0, True)"),
    "no mask": ("scores.masked_fill(~visible, -torch.inf)", "scores"),
    "heads mixed": ("(weights @ V).transpose(1, 2).flatten(2)", "(weights @ V).flatten(1).view_as(x @ self.out_proj.weight)"),
    "norm: mean instead of root mean square": ("x.float().pow(2).mean(", "x.float().mean("),
    "norm: epsilon": ('self.eps = cfg["norm_eps"]', "self.eps = 1e-5"),
    "norm: weight forgotten": (".to(x.dtype) * self.weight", ".to(x.dtype)"),
    "gate and value exchanged": ("F.silu(self.fc1(x)) * self.fc2(x)", "F.silu(self.fc2(x)) * self.fc1(x)"),
    "another activation": ("F.silu(", "F.gelu("),
    "feed-forward reads the stream": ("self.ff(self.norm2(x))", "self.ff(x)"),
    "no residual": ("return x + self.ff(", "return self.ff("),
    "norms exchanged": ("x + self.att(self.norm1(x),", "x + self.att(self.norm2(x),"),
    "no last norm": ("self.out_head(self.final_norm(x))", "self.out_head(x)"),
    "positions from 1": ("torch.arange(T, device=device)[:, None]", "(torch.arange(T, device=device)[:, None] * 2)"),
    "head dimension of the config unread": ('{"head_dim": cfg["emb_dim"] // cfg["n_heads"], **cfg}', '{**cfg, "head_dim": cfg["emb_dim"] // cfg["n_heads"]}'),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MODEL_MISTAKES)
def test_a_wrong_model_is_noticed(mistake):
    page = load(MODEL_MISTAKES[mistake])
    with pytest.raises(AssertionError):
        check_short_logits(page)


@pytest.mark.parametrize("old, new", [
    ('    "rope_base": 500_000.0,', '    "rope_base": 10_000.0,'),
    ('        "factor": 32.0,', '        "factor": 8.0,'),
    ('        "low_freq_factor": 1.0,', '        "low_freq_factor": 4.0,'),
    ('        "original_context_length": 8192,', '        "original_context_length": 4096,'),
    ('    "n_kv_groups": 8,', '    "n_kv_groups": 32,'),
    ('    "tie_embeddings": True,', '    "tie_embeddings": False,'),
    ('"n_heads": 24, "n_layers": 28, "head_dim": 128}', '"n_heads": 24, "n_layers": 28}'),
    ("            self.out_head.weight = self.tok_emb.weight", "            pass"),
])  # fmt: skip
def test_a_wrong_configuration_is_noticed(old, new):
    page = load((old, new))
    with pytest.raises(AssertionError):
        check_configurations(page)


@pytest.mark.parametrize("old, new", [
    (r'r"\p{N}{1,3}"', r'r"\p{N}+"'),
    (r'r"[^\r\n\p{L}\p{N}]?\p{L}+"', r'r" ?\p{L}+"'),
    (r'r" ?[^\s\p{L}\p{N}]+[\r\n]*"', r'r" ?[^\s\p{L}\p{N}]+"'),
    (r'    r"\s+(?!\S)",', "    #"),
    ('"start_header_id", "end_header_id"]', '"end_header_id", "start_header_id"]'),
    ("for n in range(2, 246)]", "for n in range(3, 247)]"),
    ('("end_of_text", "eom_id", "eot_id")', '("end_of_text",)'),
    ("len(ranks) + n for n, name", "len(ranks) + 1 + n for n, name"),
    ("self.bpe.encode_ordinary(text)", 'self.bpe.encode(text, allowed_special="all")'),
    ('message["content"].strip()', 'message["content"]'),
    ('self.tokenizer.encode(content) + [self.special["<|eot_id|>"]]', "self.tokenizer.encode(content)"),
    ('*self.tokenizer.encode("\\n\\n")]', '*self.tokenizer.encode("\\n")]'),
    ("ids = [self.tokenizer.bos_id]", "ids = []"),
    ('return ids + self.header("assistant")', "return ids"),
    ("Today Date: {today}\\n\\n", "Today Date: {today}\\n"),
    ("turns.pop(0)[1] if", "turns[0][1] if"),
    ("December 2023\\n", "December 2023 "),
])  # fmt: skip
def test_wrong_tokens_are_noticed(old, new, ranks_file):
    page = load((old, new))
    with pytest.raises(AssertionError):
        check_tokens(page, ranks_file)
        check_chat(page, ranks_file)


@pytest.mark.parametrize("old, new", [
    ('"self_attn.k_proj": "att.W_key"', '"self_attn.k_proj": "att.W_value"'),
    ('"mlp.gate_proj": "ff.fc1"', '"mlp.gate_proj": "ff.fc9"'),
    ("model.out_head.weight = model.tok_emb.weight", "pass"),
    ('weights["out_head.weight"] = weights["tok_emb.weight"]', "pass"),
    ('cfg["dtype"] = dtype or cfg["dtype"]', "pass"),
    ("[8 + length :]", "[length :]"),
    ('"n_kv_groups": c["num_key_value_heads"]', '"n_kv_groups": c["num_attention_heads"]'),
    ('"norm_eps": c["rms_norm_eps"]', '"norm_eps": 1e-5'),
    ('c.get("head_dim") or ', ""),
    ('set(json.loads(index.read_text())["weight_map"].values())', "{sorted(folder.glob('*.safetensors'))[0].name}"),
    ("_emb.weight  # one tensor, two names\n    return model.eval()", "_emb.weight\n    return model"),
])  # fmt: skip
def test_wrong_loading_is_noticed(old, new, folders):
    page = load((old, new))
    with pytest.raises((AssertionError, RuntimeError)):
        check_weights(page, folders)


@pytest.mark.parametrize("check, old, new", [
    (check_stream, "if ids[-1] in stop_tokens:", "if ids[-1] in ids[:-1] and ids[-1] in stop_tokens:"),
    (check_stream, "            return\n        yield ids[-1]", "            yield ids[-1]\n            return\n        yield ids[-1]"),
    (check_stream, 'ids[-model.cfg["context_length"] :]', "ids"),
    (check_stream, "device=device))[0, -1]", "device=device))[0, 0]"),
    (check_stream, "ids, device = list(ids)", "ids, device = ids"),
    (check_choose, "torch.softmax(logits.float() / temperature", "torch.softmax(logits.float() * temperature"),
    (check_choose, "probs.cumsum(dim=0) - probs >= top_p", "probs.cumsum(dim=0) >= top_p"),
    (check_choose, "probs.cumsum(dim=0) - probs >= top_p", "probs.cumsum(dim=0) - probs > top_p"),
    (check_choose, "return int(ids[torch.multinomial(probs, 1, generator=generator)])", "return int(torch.multinomial(probs, 1, generator=generator))"),
])  # fmt: skip
def test_wrong_generation_is_noticed(check, old, new):
    page = load((old, new))
    with pytest.raises(AssertionError):
        check(page)


def test_a_streamer_that_shows_half_characters_is_noticed(ranks_file):
    page = load(('decoder.decode(tokenizer.bpe.decode_single_token_bytes(token_id))', "tokenizer.decode([token_id])"))
    with pytest.raises(AssertionError):
        check_streamed_text(page, ranks_file)
