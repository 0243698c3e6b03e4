"""gpt-fast's quantized files: every code where it belongs, and what does not show its layout is refused.

The files are made here as gpt-fast makes them: codes between the least and the largest number of a group, and packed
word by word as the documented layouts of torch's operator say, or by that operator itself for a CPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import LLAMA2, UNTIED, gptfast_tensors, make_oracle, refused, tensors_of
from safetensors.torch import load_file

from llamabook import fast
from llamabook.checkpoint import load_config, load_model
from llamabook.checkpoint.convert import convert
from llamabook.checkpoint.gptfast import load_gptfast
from llamabook.errors import CheckpointError, InputError
from llamabook.fast.quantize import gptfast
from llamabook.fast.quantize.files import load_engine, quantize, read_quantized
from llamabook.fast.quantize.gptfast import LAYOUTS, Packed, find_layout, from_amd, from_nvidia, this_cpu
from llamabook.fast.quantize.weight import Scheme
from test_quantize_files import logits_of

SAID = {**UNTIED, "vocab_size": 192, "intermediate_size": 256}  # rows of all matrices are divisible by 16
HAS_CPU = bool(this_cpu())


def rounded(weight, groupsize):
    """Codes (N, K) from 0 to 15, and scales and zeros (groups, N, 2), bfloat16: (code - 8) * scale + zero."""
    groups = weight.float().unflatten(1, (-1, groupsize))
    least, most = groups.amin(-1), groups.amax(-1)
    scales = ((most - least) / 15).clamp(min=1e-6).bfloat16()
    zeros = (least + 8 * scales.float()).bfloat16()
    codes = (groups - zeros.float()[..., None]) / scales.float()[..., None] + 8
    return codes.round().clamp(0, 15).flatten(1).int(), torch.stack([scales, zeros], -1).transpose(0, 1).contiguous()


def words_of(codes, inner, lanes):
    """Words (N / 8, K / 16 inner, 32, inner / 2), one after the other: `lanes(lane, pair)` is a row and eight columns."""
    N, K = codes.shape
    rows = 8 if lanes is nvidia else 16
    words = []
    for tile in range(0, N, rows):
        for step in range(0, K, 16 * inner):
            for lane in range(4 * rows):
                for pair in range(0, inner, 2):
                    row, columns = lanes(lane)
                    eight = [int(codes[tile + row, step + 16 * pair + column]) for column in columns]
                    word = sum(code << 4 * place for place, code in zip((0, 4, 1, 5, 2, 6, 3, 7), eight))
                    words.append(word - 2**32 if word >= 2**31 else word)
    return torch.tensor(words, dtype=torch.int32).view(N // 8, K // (16 * inner), 32, inner // 2)


def nvidia(lane):
    first = lane % 4 * 2
    return lane // 4, [first + shift for shift in (0, 1, 8, 9, 16, 17, 24, 25)]


def amd(lane):
    first = lane // 16 * 4
    return lane % 16, [first + shift for shift in (0, 1, 2, 3, 16, 17, 18, 19)]


def cpu(codes, inner):
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, inner)


PACKERS = {"NVIDIA": lambda codes, inner: words_of(codes, inner, nvidia), "AMD": lambda codes, inner: words_of(codes, inner, amd)}
PACKERS |= {"CPU": cpu} if HAS_CPU else {}


def write_int8(folder: Path, said: dict, tensors: dict, name: str = "model_int8.pth") -> tuple[Path, Path]:
    """gpt-fast's file in 8 bits, and a folder with the numbers that it means."""
    stored, meant = {}, {}
    for key, weight in gptfast_tensors(said, tensors).items():
        stored[key] = meant[key] = weight
        if weight.ndim == 2 and "tok_embeddings" not in key:
            scales = (weight.float().abs().amax(1) / 127.5).bfloat16()
            codes = (weight.float() / scales.float()[:, None]).round().clamp(-128, 127)
            stored |= {key: codes.to(torch.int8), key.replace("weight", "scales"): scales}
            meant[key] = codes * scales.float()[:, None]
    return write_pair(folder, said, stored, meant, name)


def write_int4(folder: Path, said: dict, tensors: dict, packer, groupsize=32, inner=8, name="model_int4.g32.pth", fill=0.0):
    """gpt-fast's file in 4 bits; where K is no multiple of 16 `inner`, filled up to one of 1024."""
    stored, meant = {}, {}
    for key, weight in gptfast_tensors(said, tensors).items():
        stored[key] = meant[key] = weight
        if weight.ndim == 2 and "tok_embeddings" not in key:
            K = weight.shape[1]
            wide = K if K % (16 * inner) == K % groupsize == 0 else -(-K // 1024) * 1024
            codes, tables = rounded(torch.nn.functional.pad(weight.float(), (0, wide - K), value=fill), groupsize)
            stored |= {key: packer(codes, inner), key.replace("weight", "scales_and_zeros"): tables}
            scales, zeros = (tables[..., i].T.float().repeat_interleave(groupsize, 1) for i in (0, 1))
            meant[key] = ((codes - 8) * scales + zeros)[:, :K]
    return write_pair(folder, said, stored, meant, name)


def write_pair(folder, said, stored, meant, name):
    plain = folder.with_name(folder.name + " plain")
    for place, content, file in ((folder, stored, name), (plain, meant, "model.pth")):
        place.mkdir(parents=True)
        torch.save({key: tensor.clone() for key, tensor in content.items()}, place / file)
        (place / "config.json").write_text(json.dumps(said))
    return folder, plain


@pytest.fixture(scope="module")
def tensors():
    return tensors_of(make_oracle(SAID), torch.bfloat16)


def check(folder: Path, plain: Path, label: str, out: Path):
    """Both ways of loading, and the converted folder, have the very numbers of the plain one."""
    want = load_gptfast(plain, dtype=torch.float32)
    for path in (folder, next(folder.glob("*.pth"))):
        model = load_model(path, dtype=torch.float32)
        assert model.cfg == want.cfg
        for name, weight in want.state_dict().items():
            assert torch.equal(model.state_dict()[name], weight), name
    dst = convert(folder, out)
    assert str(read_quantized(dst).kind) == str(read_quantized(folder).kind) == label
    assert read_quantized(dst).config == read_quantized(folder).config == load_config(folder)
    again = load_model(dst, dtype=torch.float32)
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in want.state_dict().items())
    tokens = torch.arange(80).view(2, 40) % 90
    with torch.no_grad():
        logits = want(tokens)
    for path in (folder, dst):
        model = load_engine(read_quantized(path), dtype=torch.float32, exact=True)
        assert model.quantization == label
        assert (logits_of(model, tokens) - logits).abs().max() < 1e-4 * logits.abs().max()
    return dst


# ---------------------------------------------------------------- the files


@pytest.mark.parametrize("said", [SAID, LLAMA2], ids=["llama3", "llama2"])
def test_int8(tmp_path, said):
    folder, plain = write_int8(tmp_path / "a", said, tensors_of(make_oracle(said), torch.bfloat16))
    dst = check(folder, plain, "int8", tmp_path / "dst")
    stored = load_file(dst / "model.safetensors")
    assert stored["model.layers.0.self_attn.q_proj.weight_packed"].dtype == torch.int32


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("groupsize, inner", [(32, 2), (64, 4)])
def test_int4(tmp_path, tensors, packer, groupsize, inner):
    name = f"model_int4.g{groupsize}.pth"
    folder, plain = write_int4(tmp_path / "a", SAID, tensors, PACKERS[packer], groupsize, inner, name)
    check(folder, plain, f"int4.g{groupsize}", tmp_path / "dst")


def test_int4_that_was_filled_up(tmp_path, tensors):
    """64 columns as 1024: what stands in the others does not matter."""
    wide = PACKERS["NVIDIA"] if not HAS_CPU else cpu
    folder, plain = write_int4(tmp_path / "a", SAID, tensors, wide, 32, 8, "model_int4-gptq.g32.pth", fill=0.3)
    sizes = {key: tuple(t.shape) for key, t in torch.load(next(folder.glob("*.pth")), weights_only=True).items()}
    assert sizes["output.scales_and_zeros"] == (32, 192, 2)
    check(folder, plain, "int4-gptq.g32", tmp_path / "dst")


def test_matrices_that_gpt_fast_left_out(tmp_path, tensors):
    """Without padding it skips a width that does not divide."""
    folder, plain = write_int4(tmp_path / "a", SAID, tensors, PACKERS["NVIDIA"], 32, 2)
    stored, file = torch.load(folder / "model_int4.g32.pth", weights_only=True), folder / "model_int4.g32.pth"
    meant = torch.load(plain / "model.pth", weights_only=True)
    source = gptfast_tensors(SAID, tensors)
    for key in [key for key in stored if "wqkv.scales" in key or "w2.scales" in key]:
        del stored[key]
        key = key.replace("scales_and_zeros", "weight")
        stored[key] = meant[key] = source[key].clone()
    torch.save(stored, file)
    torch.save(meant, plain / "model.pth")
    dst = check(folder, plain, "int4.g32", tmp_path / "dst")
    ignore = json.loads((dst / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.1.mlp.down_proj" in ignore and len(ignore) == 2 * 4


def test_the_rest_may_have_another_dtype(tmp_path, tensors):
    folder, plain = write_int8(tmp_path / "a", SAID, tensors)
    dst = convert(folder, tmp_path / "dst", dtype=torch.float32)
    assert load_config(dst)["dtype"] == torch.float32 == load_model(dst).tok_emb.weight.dtype
    gptfast_again = convert(folder, tmp_path / "dense", layout="gptfast")
    want = load_gptfast(plain, dtype=torch.bfloat16)
    assert all(torch.equal(w, load_model(gptfast_again).state_dict()[n]) for n, w in want.state_dict().items())
    with pytest.raises(InputError, match=r"is quantized already \(int8\)"):
        quantize(folder, tmp_path / "more", Scheme(4, 32))


def test_the_parameters_of_meta_beside_it(tmp_path, tensors):
    from checkpoints import meta_params

    folder, plain = write_int8(tmp_path / "a", SAID, tensors)
    for place in (folder, plain):
        (place / "config.json").unlink()
        (place / "params.json").write_text(json.dumps(meta_params(SAID)))
    want = load_gptfast(plain, dtype=torch.float32)
    model = load_model(folder, dtype=torch.float32)
    assert model.cfg == want.cfg and all(torch.equal(w, model.state_dict()[n]) for n, w in want.state_dict().items())


# ---------------------------------------------------------------- which layout


@pytest.mark.parametrize("groupsize", [32, 64, 128, 256])
@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("N", [96, 144])
def test_the_layout_shows_in_the_numbers(groupsize, packer, N):
    generator = torch.Generator().manual_seed(0)
    codes, tables = rounded(torch.randn(N, 512, generator=generator), groupsize)
    matrix = Packed(PACKERS[packer](codes, 8), tables, 512)
    assert matrix.groupsize == groupsize
    assert torch.equal(matrix.codes(find_layout(Path("x"), [matrix])).int(), codes)


def test_the_layouts_are_those_of_the_gpus():
    codes = torch.randint(0, 16, (32, 128), generator=torch.Generator().manual_seed(0))
    for inner in (2, 4, 8):
        assert torch.equal(from_nvidia(words_of(codes, inner, nvidia), 32, 128).int(), codes.int())
        assert torch.equal(from_amd(words_of(codes, inner, amd), 32, 128).int(), codes.int())


CPU = """
import torch
from llamabook.fast.quantize.gptfast import this_cpu
codes = torch.randint(0, 16, (208, 96), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
((name, unpack),) = this_cpu().items()
assert torch.equal(unpack(packed, 208, 96).int(), codes)
found = []
for k in range(96):  # the products of unit vectors are the columns
    x = torch.zeros(1, 96).bfloat16()
    x[0, k] = 1
    tables = torch.stack([torch.ones(3, 208), torch.zeros(3, 208)], -1).bfloat16()
    found.append(torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, tables)[0])
assert torch.equal(torch.stack(found, 1).int() + 8, codes)
print(name, unpack.args)
"""


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="goes down from there")
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_the_layouts_of_other_cpus(capability):
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", CPU], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("CPU, ")


@pytest.mark.skipif(not HAS_CPU, reason="torch packs no int4 for this CPU")
def test_another_kind_of_cpu(monkeypatch):
    codes, tables = rounded(torch.randn(128, 512, generator=torch.Generator().manual_seed(0)), 32)
    matrix = Packed(cpu(codes, 1), tables, 512)
    other = "CPU, 32" if "CPU, 64" in this_cpu() else "CPU, 64"
    monkeypatch.setattr(gptfast, "this_cpu", lambda: {other: LAYOUTS[other]})
    with pytest.raises(CheckpointError, match="packed for another kind of CPU: convert it there"):
        find_layout(Path("x"), [matrix])


def test_what_shows_no_layout_is_refused(tmp_path, tensors):
    def noise(codes, inner):
        return torch.randint(-(2**31), 2**31, (len(codes) // 8, codes.shape[1] // 16 // inner, 32, inner // 2)).int()

    folder, _ = write_int4(tmp_path / "a", SAID, tensors, noise, 32, 2)
    refused(folder, "does not show for which kind of processor", "quantize the original with `llamabook quantize`")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("layers.1.feed_forward.w2.weight"), "layers.1.feed_forward.w2.weight is (0,)"),
        (lambda t: t.update({"output.scales": torch.ones(5).bfloat16()}), "output.weight is (192, 64) in torch.int8, and its scales (5,)"),
        (lambda t: t.update({"output.weight": torch.ones(192, 64)}), "output.weight is (192, 64) in torch.float32"),
        (lambda t: t.update({"output.weight": torch.ones(192, 63, dtype=torch.int8)}), "has 63 columns, the configuration wants 64"),
        (lambda t: t.update({"layers.0.attention.wqkv.scales": torch.ones(96).int()}), "wqkv.weight is (96, 64) in torch.int8"),
        (lambda t: t.update({"output.scales_and_zeros": torch.ones(2, 192, 2)}), "matrices in 8 and in 4 bits"),
        (lambda t: t.update({"more.scales": torch.ones(192)}), "more.weight is (0,)"),
        (lambda t: t.pop("norm.weight"), "lacks norm.weight"),
        (lambda t: t.update({"layers.0.attention.wo.weight": torch.ones(48, 64, dtype=torch.int8)}), "do not fit together"),
    ],
)
def test_damage_is_named(tmp_path, tensors, change, words):
    folder, _ = write_int8(tmp_path / "a", SAID, tensors)
    stored = torch.load(folder / "model_int8.pth", weights_only=True)
    change(stored)
    torch.save(stored, folder / "model_int8.pth")
    refused(folder, str(folder / "model_int8.pth"), words)
    with pytest.raises(CheckpointError):
        fast.load(folder)


@pytest.mark.parametrize(
    "key, tensor, words",
    [
        ("output.scales_and_zeros", torch.ones(4, 192, 2).bfloat16(), "groups of 16, 32 columns"),
        ("output.scales_and_zeros", torch.ones(3, 192, 2).bfloat16(), "do not fit together"),
        ("output.scales_and_zeros", torch.ones(2, 192, 3).bfloat16(), "do not fit together"),
        ("output.scales_and_zeros", torch.ones(2, 96, 2).bfloat16(), "do not fit together"),
        ("output.weight", torch.ones(24, 2, 64, 1).int(), "do not fit together"),
        ("output.weight", torch.ones(192, 32).int(), "do not fit together"),
    ],
)
def test_damage_in_four_bits_is_named(tmp_path, tensors, key, tensor, words):
    folder, _ = write_int4(tmp_path / "a", SAID, tensors, PACKERS["NVIDIA"], 32, 2)
    stored = torch.load(folder / "model_int4.g32.pth", weights_only=True)
    torch.save(stored | {key: tensor}, folder / "model_int4.g32.pth")
    refused(folder, words)


def test_a_cut_file(tmp_path, tensors):
    folder, _ = write_int8(tmp_path / "a", SAID, tensors)
    data = (folder / "model_int8.pth").read_bytes()
    (folder / "model_int8.pth").write_bytes(data[:-100])
    refused(folder, "damaged or cut off")


def test_scales_that_we_can_not_keep(tmp_path, tensors):
    folder, plain = write_int8(tmp_path / "a", SAID, tensors)
    stored = torch.load(folder / "model_int8.pth", weights_only=True)
    stored = {key: t.float() * 1.001 if key.endswith("scales") else t for key, t in stored.items()}
    torch.save(stored, folder / "model_int8.pth")
    assert load_model(folder, dtype=torch.float32).out_head.weight.abs().sum() > 0
    with pytest.raises(CheckpointError, match="scales in torch.float32, which the engine can't multiply"):
        convert(folder, tmp_path / "dst")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a plain"]
