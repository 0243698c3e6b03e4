"""Meta's weight files: loaded to the logits that transformers computes, written back, and refused in one line each.

The files are written here from a transformers model, with an interleaving of our own, so that the loader is never
held against the saver alone.
"""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from llamabook import llama2
from llamabook.checkpoint import load_config, load_model, meta
from llamabook.checkpoint.meta import join, load_meta, read_params, save_meta, to_params
from llamabook.errors import CheckpointError, ConfigError, InputError
from llamabook.llama2 import Llama2Model

SIZES = dict(dim=64, n_layers=2, n_heads=8, vocab_size=96, norm_eps=1e-5)
HIDDEN, CONTEXT = 176, 256  # 176 = 2/3 of 4 * 64, rounded up to a multiple of 16
PARAMS = SIZES | {"multiple_of": 16, "max_seq_len": CONTEXT}


@pytest.fixture(scope="module")
def oracle():
    """A transformers model with weights large enough that positions, masks and layouts matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=HIDDEN, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if "norm" in name else noise / weight.shape[-1] ** 0.5 * 1.5)
    return model


def interleave(weight, heads):
    """Row 2i of a head is Hugging Face's row i, row 2i + 1 its row i + d/2: written as one list of row numbers."""
    d = weight.shape[0] // heads
    rows = [head * d + i + half for head in range(heads) for i in range(d // 2) for half in (0, d // 2)]
    return weight[rows]


def meta_tensors(oracle):
    """The weights by Meta's names and in Meta's row order."""
    source = {name: weight.detach().clone() for name, weight in oracle.state_dict().items()}
    tensors = {
        "tok_embeddings.weight": source["model.embed_tokens.weight"],
        "norm.weight": source["model.norm.weight"],
        "output.weight": source["lm_head.weight"],
        "rope.freqs": torch.ones(4),
    }
    for n in range(2):
        here, there = f"layers.{n}", f"model.layers.{n}"
        tensors[f"{here}.attention.wq.weight"] = interleave(source[f"{there}.self_attn.q_proj.weight"], 8)
        tensors[f"{here}.attention.wk.weight"] = interleave(source[f"{there}.self_attn.k_proj.weight"], 8)
        tensors[f"{here}.attention.wv.weight"] = source[f"{there}.self_attn.v_proj.weight"]
        tensors[f"{here}.attention.wo.weight"] = source[f"{there}.self_attn.o_proj.weight"]
        tensors[f"{here}.feed_forward.w1.weight"] = source[f"{there}.mlp.gate_proj.weight"]
        tensors[f"{here}.feed_forward.w2.weight"] = source[f"{there}.mlp.down_proj.weight"]
        tensors[f"{here}.feed_forward.w3.weight"] = source[f"{there}.mlp.up_proj.weight"]
        tensors[f"{here}.attention_norm.weight"] = source[f"{there}.input_layernorm.weight"]
        tensors[f"{here}.ffn_norm.weight"] = source[f"{there}.post_attention_layernorm.weight"]
    return tensors


def write(folder, tensors, shards=1, params=PARAMS):
    """Cut as Meta's fairscale layers do: rows of wq wk wv w1 w3 output, columns of wo w2 tok_embeddings."""
    folder.mkdir(exist_ok=True)
    for rank in range(shards):
        part = {}
        for name, weight in tensors.items():
            if any(key in name for key in ("wq.", "wk.", "wv.", "w1.", "w3.", "output.")):
                size = weight.shape[0] // shards
                weight = weight[rank * size : (rank + 1) * size]
            elif any(key in name for key in ("wo.", "w2.", "tok_embeddings.")):
                size = weight.shape[1] // shards
                weight = weight[:, rank * size : (rank + 1) * size]
            part[name] = weight.clone()
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.fixture
def tensors(oracle):
    return meta_tensors(oracle)


@pytest.fixture
def folder(tmp_path, tensors):
    return write(tmp_path / "model", tensors)


TOKENS = (torch.arange(2 * 200) * 37 % 96).view(2, 200)


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_same_logits_as_transformers(tmp_path, oracle, tensors, shards):
    model = load_model(write(tmp_path / "model", tensors, shards))
    with torch.no_grad():
        want, got = oracle(TOKENS).logits, model(TOKENS)
    assert want.abs().max() > 1 and not model.training
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_configuration(folder):
    config = load_config(folder)
    assert config == read_params(folder) == {
        "vocab_size": 96, "context_length": 256, "emb_dim": 64, "n_heads": 8, "n_layers": 2, "hidden_dim": 176,
        "n_kv_groups": 8, "rope_base": 10_000.0, "rope_freq": None, "norm_eps": 1e-5, "dtype": torch.float32,
    }  # fmt: skip
    assert load_model(folder).cfg == config


@pytest.mark.parametrize("shards", [1, 2])
def test_what_metas_own_params_json_leaves_out(tmp_path, tensors, shards):
    params = {"dim": 64, "multiple_of": 16, "n_heads": 8, "n_layers": 2, "norm_eps": 1e-6, "vocab_size": -1}
    config = load_config(write(tmp_path / "model", tensors, shards, params))
    assert (config["vocab_size"], config["context_length"], config["hidden_dim"]) == (96, 4096, HIDDEN)
    assert (config["rope_base"], config["norm_eps"], config["n_kv_groups"]) == (10_000.0, 1e-6, 8)


def test_rope_theta_and_own_configuration(tmp_path, tensors):
    folder = write(tmp_path / "model", tensors, params=PARAMS | {"rope_theta": 1e6})
    config = load_config(folder)
    assert config["rope_base"] == 1e6
    (folder / "params.json").unlink()
    assert load_model(folder, config=config | {"rope_base": 500.0}).cfg["rope_base"] == 500.0
    assert config["rope_base"] == 1e6


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16])
def test_dtype(tmp_path, tensors, stored, asked):
    folder = write(tmp_path / "model", {name: weight.to(stored) for name, weight in tensors.items()})
    model = load_model(folder, dtype=asked)
    want = asked or stored
    assert {weight.dtype for weight in model.parameters()} == {want} == {model.cfg["dtype"]}
    assert all(weight.requires_grad and weight.device.type == "cpu" for weight in model.parameters())
    assert torch.equal(model.out_head.weight, tensors["output.weight"].to(stored).to(want))


def test_a_path_may_be_a_string_or_one_of_the_files(folder):
    for path in (str(folder), folder / "consolidated.00.pth", folder / "params.json"):
        assert load_model(path).cfg["emb_dim"] == 64


def test_another_model_class(folder):
    seen = []

    class Recording(Llama2Model):
        def __init__(self, cfg):
            seen.append(cfg)
            super().__init__(cfg)

    assert isinstance(load_meta(folder, model_class=Recording), Recording) and seen[0]["n_heads"] == 8


# ---------------------------------------------------------------- mutants: each known mistake must be noticed


def swapped(one, other):
    """PARTS with what two of Meta's names stand for exchanged."""
    return meta.PARTS | {one: meta.PARTS[other], other: meta.PARTS[one]}


def cut(name, dim):
    return meta.PARTS | {name: (meta.PARTS[name][0], dim)}


MUTANTS = {  # name: (what is patched in checkpoint/meta.py, how)
    "not permuted": ("interleaved_to_half_split", lambda weight, heads: weight),
    "permuted the wrong way": ("interleaved_to_half_split", llama2.half_split_to_interleaved),
    "permuted across heads": ("interleaved_to_half_split", lambda w, heads: llama2.interleaved_to_half_split(w, 1)),
    "only queries permuted": ("rotated_heads", lambda name, cfg: 8 if "W_query" in name else 0),
    "values permuted, too": ("rotated_heads", lambda name, cfg: 8 if "att.W_" in name else 0),
    "gate and value exchanged": ("PARTS", swapped("feed_forward.w1", "feed_forward.w3")),
    "norms exchanged": ("PARTS", swapped("attention_norm", "ffn_norm")),
    "keys and values exchanged": ("PARTS", swapped("attention.wk", "attention.wv")),
    "wo joined by rows": ("PARTS", cut("attention.wo", 0)),
    "wv joined by columns": ("PARTS", cut("attention.wv", 1)),
    "only the first shard": ("join", lambda where, parts, dim: parts[0]),
    "shards in the wrong order": ("join", lambda where, parts, dim: join(where, parts[::-1], dim)),
    "shards averaged": ("join", lambda where, parts, dim: sum(parts) / len(parts)),
}


def agrees(oracle, folders):
    """Whether all folders load to the oracle's logits."""
    with torch.no_grad():
        want = oracle(TOKENS).logits
        try:
            logits = [load_model(folder)(TOKENS) for folder in folders]
        except CheckpointError:
            return False
    return all((got - want).abs().max() <= 1e-4 * want.abs().max() for got in logits)


@pytest.mark.parametrize("name", [None, *MUTANTS])
def test_a_wrong_loader_is_noticed(tmp_path, monkeypatch, oracle, tensors, name):
    folders = [write(tmp_path / str(shards), tensors, shards) for shards in (1, 2)]
    if name is not None:
        monkeypatch.setattr(meta, *MUTANTS[name])
    assert agrees(oracle, folders) == (name is None)


# ---------------------------------------------------------------- memory


def mapped_ranges(name):
    """The address ranges of this process that show the file `name`."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(name):
            low, high = line.split()[0].split("-")
            yield range(int(low, 16), int(high, 16))


needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")


@needs_proc
def test_weights_stay_in_the_file(folder):
    model = load_model(folder)
    ranges = list(mapped_ranges(str(folder / "consolidated.00.pth")))
    mapped = {n for n, w in model.named_parameters() if any(w.data_ptr() in range_ for range_ in ranges)}
    copied = {name for name, _ in model.named_parameters()} - mapped
    assert copied == {f"trf_blocks.{n}.att.W_{which}.weight" for n in range(2) for which in ("query", "key")}


def anonymous_mb():
    """Memory of this process that is not the content of a mapped file, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


@needs_proc
@pytest.mark.parametrize("shards", [1, 2])
def test_loading_never_holds_the_weights_twice(tmp_path, folder, shards):
    """The peak of anonymous memory while 80 MB of float32 become 40 MB of bfloat16."""
    import threading
    import time

    cfg = dict(vocab_size=4096, context_length=64, emb_dim=1024, n_heads=16, n_layers=1, hidden_dim=2816)
    cfg |= dict(n_kv_groups=16, rope_base=10_000.0, rope_freq=None, dtype=torch.float32)
    with torch.device("meta"):
        model = Llama2Model(cfg)
    model.to_empty(device="cpu").load_state_dict({name: torch.ones(w.shape) for name, w in model.state_dict().items()})
    save_meta(model, tmp_path / "model", shards)
    held = 2 * sum(weight.numel() for weight in model.parameters()) / 2**20
    del model
    load_model(folder, dtype=torch.bfloat16)  # what torch imports and sets up once
    peak, done = [anonymous_mb()], threading.Event()
    before = peak[0]

    def watch():
        while not done.is_set():
            peak.append(anonymous_mb())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(tmp_path / "model", dtype=torch.bfloat16)
    done.set()
    watcher.join()
    largest = 4 * model.out_head.weight.numel() / 2**20  # in float32, joined from its shards
    growth = max(peak) - before
    assert held > 40 and growth < held + largest + 8, f"{growth:.0f} MB for {held:.0f} MB of weights"


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_saved_and_loaded_again(tmp_path, oracle, folder, shards):
    model = load_model(folder)
    save_meta(model, tmp_path / "new" / "model", shards)
    again = load_model(tmp_path / "new" / "model")
    assert again.cfg == model.cfg
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
    files = sorted(path.name for path in (tmp_path / "new" / "model").iterdir())
    assert files == [f"consolidated.{rank:02d}.pth" for rank in range(shards)] + ["params.json"]


def test_saved_files_are_what_meta_would_write(tmp_path, folder, tensors):
    save_meta(load_model(folder), tmp_path / "new", 2)
    write(tmp_path / "want", {name: weight for name, weight in tensors.items() if name != "rope.freqs"}, 2)
    for rank in range(2):
        name = f"consolidated.{rank:02d}.pth"
        got, want = torch.load(tmp_path / "new" / name), torch.load(tmp_path / "want" / name)
        assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
        assert os.path.getsize(tmp_path / "new" / name) < 1.1 * os.path.getsize(tmp_path / "want" / name)


def metas_hidden_width(params):
    """How Meta's model code computes the width from params.json."""
    width = int(2 * (4 * params["dim"]) / 3)
    width = int(params.get("ffn_dim_multiplier", 1) * width)
    return params["multiple_of"] * ((width + params["multiple_of"] - 1) // params["multiple_of"])


@pytest.mark.parametrize("dim, hidden", [(4096, 11008), (8192, 28672), (5120, 13824), (256, 768), (256, 512), (64, 7)])
def test_params_json_gives_meta_the_same_hidden_width(dim, hidden):
    cfg = dict(vocab_size=9, context_length=4096, emb_dim=dim, n_heads=2, n_layers=1, hidden_dim=hidden)
    params = to_params(cfg | dict(n_kv_groups=2, rope_base=10_000.0, rope_freq=None, dtype=torch.float32))
    assert metas_hidden_width(params) == hidden
    assert not {"rope_theta", "max_seq_len", "n_kv_heads"} & set(params)  # Meta's Llama 2 code knows no such keys


def test_params_json_of_the_published_models():
    small, large = to_params(llama2.LLAMA2_CONFIG_7B), to_params(llama2.LLAMA2_CONFIG_70B)
    assert small == {
        "dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 32000, "norm_eps": 1e-5, "multiple_of": 256,
    }  # fmt: skip
    assert (large["n_kv_heads"], large["ffn_dim_multiplier"]) == (8, 1.3)


def test_saving_over_the_files_that_are_mapped(folder):
    model = load_model(folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    save_meta(model, folder)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(torch.equal(weight, before[name]) for name, weight in load_model(folder).state_dict().items())


def test_saving_with_fewer_shards_leaves_no_old_ones(tmp_path, folder):
    model = load_model(folder)
    save_meta(model, tmp_path / "new", 8)
    save_meta(model, tmp_path / "new", 2)
    assert load_model(tmp_path / "new").cfg == model.cfg


def test_an_interrupted_save_leaves_the_old_files(tmp_path, folder, monkeypatch):
    model = load_model(folder)
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls, real = [], torch.save

    def save(part, file):
        calls.append(file)
        if len(calls) == 2:
            file.write(b"half")
            raise KeyboardInterrupt
        real(part, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        save_meta(model, folder, 2)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old


@pytest.mark.parametrize("shards", [0, -1, 3, 16])
def test_a_model_that_does_not_divide(tmp_path, folder, shards):
    with pytest.raises(InputError, match="do not divide"):
        save_meta(load_model(folder), tmp_path / "new", shards)
    assert not (tmp_path / "new").exists()


def test_what_the_format_can_not_hold(tmp_path, folder):
    model = load_model(folder)
    model.cfg["head_dim"] = 16
    with pytest.raises(ConfigError, match="no place for head_dim"):
        save_meta(model, tmp_path / "new")


# ---------------------------------------------------------------- bad files


def refused(path, *words, **arguments):
    """The message of the CheckpointError that loading raises: one line with the path and all of `words`."""
    with pytest.raises(CheckpointError) as error:
        load_model(path, **arguments)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


def test_no_such_path(tmp_path):
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "does not exist")


def test_an_empty_folder_and_other_folders(tmp_path):
    refused(tmp_path, "no model.safetensors, consolidated.00.pth or model.pth", "it holds nothing")
    (tmp_path / "notes.txt").write_text("hay in the barn")
    refused(tmp_path, "no model.safetensors, consolidated.00.pth or model.pth", "it holds notes.txt")
    refused(tmp_path / "notes.txt", "notes.txt is cut off, or not what its name says")


HTML = b'\n<!DOCTYPE html>\n<html lang="en"><head><title>Access denied</title></head></html>\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:9e55\nsize 13476925163\n"


@pytest.mark.parametrize("name", ["consolidated.00.pth", "params.json"])
@pytest.mark.parametrize(
    "content, words",
    [(b"", "is empty"), (HTML, "is a web page, most likely a login page"), (POINTER, "is a Git LFS pointer")],
)
def test_files_that_a_failed_download_leaves(folder, name, content, words):
    (folder / name).write_bytes(content)
    refused(folder, str(folder / name), words)


@pytest.mark.parametrize("keep", [100, 5_000, -1])
def test_a_truncated_file(folder, keep):
    path = folder / "consolidated.00.pth"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "consolidated.00.pth is damaged or cut off")


@pytest.mark.parametrize("content", [b"Dear reader", b"PK\x03\x04 and then nothing", pickle.dumps({"a": 1})])
def test_other_files_by_that_name(folder, content):
    (folder / "consolidated.00.pth").write_bytes(content)
    refused(folder, "consolidated.00.pth is ")


class Hostile:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_not_executed(tmp_path, folder, zipped):
    victim = tmp_path / "owned"
    content = {"tok_embeddings.weight": Hostile(victim)}
    torch.save(content, folder / "consolidated.00.pth", _use_new_zipfile_serialization=zipped)
    message = refused(folder, "consolidated.00.pth")
    assert not victim.exists() and (not zipped or "unsafe" in message and ".mkdir" in message)
    with pytest.raises(FileExistsError):  # the file is hostile indeed
        victim.mkdir()
        torch.load(folder / "consolidated.00.pth", weights_only=False)


@pytest.mark.parametrize("content", [torch.ones(3), [torch.ones(3)], {"a": 1}, {"a": torch.ones(3, dtype=torch.int8)}])
def test_a_file_without_weights(folder, content):
    torch.save(content, folder / "consolidated.00.pth")
    refused(folder, "consolidated.00.pth is no dictionary of floating-point tensors")


@pytest.mark.parametrize(
    "name, shape, want",
    [
        ("layers.1.feed_forward.w2.weight", (64, 175), (64, 176)),
        ("layers.0.attention.wq.weight", (63, 64), (64, 64)),
        ("norm.weight", (65,), (64,)),
        ("output.weight", (95, 64), (96, 64)),
        ("layers.1.attention_norm.weight", (), (64,)),
    ],
)
def test_a_wrong_shape_is_named(tmp_path, tensors, name, shape, want):
    folder = write(tmp_path / "model", tensors | {name: torch.zeros(shape)})
    refused(folder, f"{name} is {shape}", f"wants {want}")


def test_tensors_too_few_or_too_many(tmp_path, tensors):
    less = {name: weight for name, weight in tensors.items() if "w3" not in name}
    refused(write(tmp_path / "less", less), "lacks layers.0.feed_forward.w3.weight and 1 more")
    more = tensors | {"layers.2.ffn_norm.weight": torch.ones(64)}
    refused(write(tmp_path / "more", more), "has the unexpected layers.2.ffn_norm.weight:")
    refused(write(tmp_path / "other", {"model.embed_tokens.weight": torch.ones(96, 64)}), "model.embed_tokens.weight")
    refused(write(tmp_path / "nothing", {}), "but nothing")


def test_missing_shards(tmp_path, tensors):
    first = write(tmp_path / "first", tensors, 2)
    (first / "consolidated.01.pth").unlink()
    refused(first, "has 1 of 2 shards: consolidated.01.pth is missing")
    middle = write(tmp_path / "middle", tensors, 8)
    (middle / "consolidated.03.pth").unlink()
    refused(middle, "has consolidated.04.pth but not consolidated.03.pth")
    last = write(tmp_path / "last", tensors, 8)
    (last / "consolidated.07.pth").unlink()
    refused(last, "has 7 of 8 shards: consolidated.07.pth is missing")


def test_shards_of_different_models(tmp_path, tensors):
    two = write(tmp_path / "two", tensors, 2)
    write(tmp_path / "other", tensors | {"norm.weight": torch.zeros(64)}, 2)
    (tmp_path / "other" / "consolidated.01.pth").replace(two / "consolidated.01.pth")
    refused(two, "norm.weight differs between shards")
    write(tmp_path / "whole", tensors)
    (tmp_path / "whole" / "consolidated.00.pth").replace(two / "consolidated.01.pth")
    refused(two, "tok_embeddings.weight has shards of (96, 32), (96, 64)")


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is no JSON"),
        ("[64]", "has no 'dim'"),
        ('{"dim": 64, "n_layers": 2}', "has no 'n_heads'"),
        (json.dumps(PARAMS | {"n_layers": -2}), "n_layers is -2"),
        (json.dumps(PARAMS | {"dim": "64"}), "dim is '64'"),
        (json.dumps(PARAMS | {"n_heads": True}), "n_heads is True"),
        (json.dumps(PARAMS | {"norm_eps": float("nan")}), "norm_eps is nan"),
        (json.dumps(PARAMS | {"vocab_size": 97}), "vocab_size is 97"),
        (json.dumps(PARAMS | {"n_heads": 7, "n_kv_heads": 7}), "n_heads 7"),
        (json.dumps(PARAMS | {"dim": 32}), "(96, 64), the configuration wants (96, 32)"),
    ],
)
def test_a_broken_params_json(folder, text, words):
    (folder / "params.json").write_text(text)
    refused(folder, words, str(folder))


def test_params_json_that_is_not_there(folder):
    (folder / "params.json").unlink()
    refused(folder, "params.json does not exist")
    (folder / "params.json").write_bytes(b"\xff\xfe\x00")
    refused(folder, "params.json is no JSON")


def test_grouped_query_attention_needs_chapter_2s_class(tmp_path, tensors):
    tensors = {n: w[:16] if "wk" in n or "wv" in n else w for n, w in tensors.items()}
    folder = write(tmp_path / "model", tensors, params=PARAMS | {"n_kv_heads": 2})
    with pytest.raises(CheckpointError, match="8 query heads share 2 key-value heads.*chapter 2"):
        load_meta(folder)
    assert load_config(folder)["n_kv_groups"] == 2 and type(load_model(folder)).__name__ == "Llama3Model"


@pytest.mark.parametrize("params", [PARAMS | {"n_kv_heads": None, "head_dim": 8}, {**PARAMS, "vocab_size": None}])
def test_null_in_params_json_is_silence(tmp_path, tensors, params):
    config = load_config(write(tmp_path / "model", tensors, params=params))
    assert (config["n_kv_groups"], config["vocab_size"]) == (8, 96) and "head_dim" not in config


def test_an_own_configuration_that_does_not_fit(folder):
    config = load_config(folder)
    refused(folder, "w1.weight is (176, 64)", "wants (99, 64)", config=config | {"hidden_dim": 99})
    config.pop("rope_base")
    refused(folder, "rope_base", config=config)
