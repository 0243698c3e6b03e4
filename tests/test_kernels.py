"""The kernels against float64 and torch's operators, and their build: once, quietly, and never fatal."""

import copy
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llamabook.fast import kernels
from llamabook.fast.kernels import build as building
from llamabook.fast.linear import Linear
from llamabook.fast.model import Block
from llamabook.llama2 import rope_tables

PACKAGE = Path(kernels.__file__).resolve().parents[3]
DTYPES = [torch.float32, torch.bfloat16]
BEYOND = {torch.float32: 2e-6, torch.bfloat16: 6e-3}  # of the largest result: rounding, and no more

needs_kernels = pytest.mark.skipif(not kernels.ready(), reason="no C++ compiler here: torch's operators are in use")


@pytest.fixture(params=["C++", "torch"])
def both(request, monkeypatch):
    """Run a test with our kernels, and with what takes their place."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "_loaded", False)
    elif not kernels.ready():
        pytest.skip("no C++ compiler here")
    return request.param


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def close(found, expected, dtype, roundings=1):
    assert found.dtype == dtype and found.shape == expected.shape
    assert ((found.double() - expected).abs().max() <= roundings * BEYOND[dtype] * expected.abs().max()).item()


# ---------------------------------------------------------------- products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, K", [(96, 256), (1, 64), (33, 70), (7, 31), (5, 1), (300, 1000), (70, 2500)])
def test_a_product_is_that_of_float64(N, K, dtype, both):
    weight = random(N, K, dtype=dtype)
    for rows in (*range(1, 10), 20):
        x = random(rows, K, dtype=dtype, seed=1)
        close(kernels.linear(x, weight), x.double() @ weight.double().T, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_dimensions_and_none_of_rows(dtype, both):
    weight = random(40, 64, dtype=dtype)
    for shape in ((64,), (1, 64), (2, 1, 64), (2, 2, 2, 64), (0, 64), (3, 0, 64)):
        x = random(*shape, dtype=dtype)
        assert kernels.linear(x, weight).shape == F.linear(x, weight).shape == (*shape[:-1], 40)
    assert kernels.linear(random(2, 64, dtype=dtype), weight[:0]).shape == (2, 0)
    assert torch.equal(kernels.linear(random(2, 0, dtype=dtype), weight[:, :0]), torch.zeros(2, 40, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_and_views_of_matrices(dtype, both):
    whole, x = random(64, 256, dtype=dtype), random(4, 6, 128, dtype=dtype)
    inputs = [x[0, :3], x[:, 2], x.transpose(0, 1)[1], x[::2, 0]]
    for weight in (whole[:, :128], whole[3:40, 128:], whole[::2, 64:192], whole[:, ::2]):
        for rows in inputs:
            close(kernels.linear(rows, weight), rows.double() @ weight.double().T, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [64, 70])
def test_what_is_no_number_stays_none(K, dtype, both):
    """As in F.linear: 0 * inf is NaN, inf stays inf with its sign, and other rows and columns are left alone."""
    for place in (0, K - 1):
        x, weight = random(3, K, dtype=dtype).abs() + 1, random(8, K, dtype=dtype).abs() + 1
        x[0, place], x[1, place], weight[2, place] = torch.inf, -torch.inf, torch.nan
        weight[4, place] = 0
        found, expected = kernels.linear(x, weight), F.linear(x, weight)
        assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().sum() == 5
        assert torch.equal(found.isinf(), expected.isinf())
        assert torch.equal(found[found.isinf()], expected[expected.isinf()])


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_know_how_many_come_with_it(dtype):
    """Bit by bit the same alone, in any batch, and with any number of threads."""
    x, weight = random(8, 1000, dtype=dtype), random(700, 1000, dtype=dtype)
    together = kernels.linear(x, weight)
    for rows in range(1, 8):
        assert torch.equal(kernels.linear(x[:rows], weight), together[:rows])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(kernels.linear(x, weight), together)
    finally:
        torch.set_num_threads(before)


def test_what_the_kernels_do_not_take_goes_to_torch(both):
    x, weight = random(2, 64), random(40, 64)
    assert torch.equal(kernels.linear(random(9, 64), weight), F.linear(random(9, 64), weight)), "many rows"
    half = kernels.linear(x.half(), weight.half())
    assert half.dtype == torch.float16
    with pytest.raises(RuntimeError):
        kernels.linear(x, weight.bfloat16())
    with pytest.raises(RuntimeError):
        kernels.linear(x, weight[:, :60])
    leaf = weight.clone().requires_grad_()
    kernels.linear(x, leaf).sum().backward()
    assert torch.allclose(leaf.grad, x.sum(0).expand(40, 64), atol=1e-5)
    meta = kernels.linear(x.to("meta"), weight.to("meta"))
    assert meta.shape == (2, 40) and meta.device.type == "meta"


# ---------------------------------------------------------------- attention


def attention(q, keys, values, input_pos):
    """The definition, query by query, in float64: nothing but softmax and sums."""
    B, T, H, d = q.shape
    each = H // keys.shape[1]
    out = torch.empty(B, T, H, d, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                seen = int(input_pos[b, t]) + 1
                scores = keys[b, h // each, :seen].double() @ q[b, t, h].double() / d**0.5
                out[b, t, h] = torch.softmax(scores, 0) @ values[b, h // each, :seen].double()
    return out


SHAPES = [  # B, T, H, G, d, S
    (1, 1, 4, 1, 64, 40), (2, 1, 8, 2, 64, 700), (3, 3, 6, 3, 128, 530), (2, 2, 4, 4, 16, 300), (1, 8, 2, 1, 80, 257),
    (1, 2, 2, 1, 256, 1025), (1, 1, 2, 2, 48, 1), (2, 5, 2, 2, 64, 300), (1, 3, 2, 2, 128, 70),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, T, H, G, d, S", SHAPES)
def test_attention_is_that_of_float64(B, T, H, G, d, S, dtype, both):
    q, keys, values = 3 * random(B, T, H, d), random(B, G, S, d, seed=1), random(B, G, S, d, seed=2)
    q, keys, values = q.to(dtype), keys.to(dtype), values.to(dtype)
    input_pos = torch.randint(0, S, (B, T), generator=torch.Generator().manual_seed(S))
    input_pos[0, 0], input_pos[-1, -1] = S - 1, 0 if B * T > 1 else S - 1
    close(kernels.decode_attention(q, keys, values, input_pos), attention(q, keys, values, input_pos), dtype)


def test_attention_at_every_length_around_a_chunk(both):
    q, keys, values = 3 * random(1, 1, 2, 16), random(1, 1, 520, 16, seed=1), random(1, 1, 520, 16, seed=2)
    for position in (0, 1, 14, 15, 16, 17, 254, 255, 256, 257, 511, 512, 519):
        input_pos = torch.tensor([[position]])
        close(kernels.decode_attention(q, keys, values, input_pos), attention(q, keys, values, input_pos), torch.float32)


def test_attention_reads_views(both):
    """A cache cut to its first slots, and queries cut from a wider product, as the engine has them."""
    whole = random(2, 3, 8 + 2 * 2, 64)
    q = whole[:, :, :8]
    keys, values = random(2, 2, 100, 128, seed=1)[:, :, :50, 64:], random(2, 50, 2, 64, seed=2).transpose(1, 2)
    input_pos = torch.tensor([[47, 48, 49], [3, 4, 5]])
    close(kernels.decode_attention(q, keys, values, input_pos), attention(q, keys, values, input_pos), torch.float32)


def test_large_scores_do_not_overflow(both):
    """The largest score is taken off before e is raised to it; where all weight is on one slot, its value comes out."""
    q, keys, values = torch.full((1, 1, 1, 16), 30.0), torch.zeros(1, 1, 600, 16), random(1, 1, 600, 16)
    for slot in (0, 255, 256, 599):
        keys.zero_()[0, 0, slot] = 30.0  # a score of 3600 among zeros
        found = kernels.decode_attention(q, keys, values, torch.tensor([[599]]))
        assert torch.equal(found[0, 0, 0], values[0, 0, slot])
        found = kernels.decode_attention(-q, keys, values, torch.tensor([[599]]))  # -3600 among zeros
        close(found, attention(-q, keys, values, torch.tensor([[599]])), torch.float32)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_no_query_may_see_is_not_read(dtype):
    q, keys, values = random(2, 1, 4, 64, dtype=dtype), random(2, 2, 600, 64, dtype=dtype), random(2, 2, 600, 64, dtype=dtype)
    input_pos = torch.tensor([[300], [7]])
    expected = kernels.decode_attention(q, keys, values, input_pos)
    for row, position in enumerate([300, 7]):
        keys[row, :, position + 1 :] = torch.nan
        values[row, :, position + 1 :] = torch.nan
    assert torch.equal(kernels.decode_attention(q, keys, values, input_pos), expected)


@needs_kernels
def test_attention_does_not_know_its_batch_either():
    q, keys, values = random(3, 1, 4, 64), random(3, 2, 900, 64), random(3, 2, 900, 64)
    input_pos = torch.tensor([[899], [12], [400]])
    together = kernels.decode_attention(q, keys, values, input_pos)
    for row in range(3):
        part = slice(row, row + 1)
        assert torch.equal(kernels.decode_attention(q[part], keys[part], values[part], input_pos[part]), together[part])


@needs_kernels
def test_what_is_no_number_spreads_as_far_as_it_is_seen():
    q, keys, values = random(1, 2, 2, 64), random(1, 1, 600, 64), random(1, 1, 600, 64)
    keys[0, 0, 500, 3] = torch.nan
    found = kernels.decode_attention(q, keys, values, torch.tensor([[499, 500]]))
    assert found[0, 0].isfinite().all() and found[0, 1].isnan().all()


@needs_kernels
def test_a_position_outside_the_cache_is_refused():
    q, cache = random(1, 2, 2, 64), random(1, 1, 20, 64)
    for position in (20, -1, 2**40):
        with pytest.raises(RuntimeError, match=f"position {position} is outside a cache of 20"):
            kernels.decode_attention(q, cache, cache, torch.tensor([[0, position]]))


@needs_kernels
def test_the_operators_keep_torchs_rules():
    """Schema, shapes without data, and tracing."""
    for dtype in DTYPES:
        x, weight = random(3, 64, dtype=dtype), random(40, 64, dtype=dtype)
        q, cache = random(2, 1, 4, 64, dtype=dtype), random(2, 2, 20, 64, dtype=dtype)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.llamabook.linear.default, (x, weight), test_utils=checks)
        arguments = (q.transpose(0, 1).contiguous().transpose(0, 1), cache, cache, torch.tensor([[3], [19]]))
        torch.library.opcheck(torch.ops.llamabook.decode_attention.default, arguments, test_utils=checks)


@needs_kernels
def test_one_graph_under_torch_compile():
    """With the backend that runs the graph as it is: no C++ of the compiler's own is needed to see that it is one."""

    def step(x, weight, q, keys, values, input_pos):
        return kernels.linear(x, weight), kernels.decode_attention(q, keys, values, input_pos)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True, dynamic=True)
    for rows in (1, 3, 30):
        x, weight, q = random(rows, 1, 64), random(40, 64), random(rows, 1, 4, 64)
        keys, input_pos = random(rows, 2, 20 + rows, 64), torch.full((rows, 1), 11)
        with torch.no_grad():
            found, expected = (f(x, weight, q, keys, keys, input_pos) for f in (compiled, step))
        assert all(map(torch.equal, found, expected))
    torch._dynamo.reset()


@needs_kernels
def test_reading_all_reads_all():
    x = torch.zeros(5000)
    same = kernels.read_all(x)
    assert torch.equal(kernels.read_all(torch.zeros(5000)), same)
    for place in (0, 1, 2499, 2500, 4500, 4863):  # whole steps of 256 bytes
        y = x.clone()
        y[place] = 1.0
        assert not torch.equal(kernels.read_all(y), same), place
    assert kernels.read_all(x[::2]).numel() == 1, "what is not contiguous is read by torch"


# ---------------------------------------------------------------- the build


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and nothing loaded yet."""
    monkeypatch.setenv("LLAMABOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLAMABOOK_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "_loaded", None)
    return tmp_path / "cache" / "kernels"


def source(folder: Path, text: str = "int answer() { return 42; }\n") -> Path:
    path = folder / "tiny.cpp"
    path.write_text(text)
    return path


def test_importing_builds_nothing(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(PACKAGE), "LLAMABOOK_CACHE": str(tmp_path), "CXX": "/no/such/compiler"}
    words = "from llamabook import fast; from llamabook.fast import kernels; print(kernels._loaded)"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, env=environment, timeout=300)
    assert (done.stdout.strip(), done.stderr) == ("None", "")
    assert not any(tmp_path.iterdir())


@needs_kernels
def test_a_library_is_built_once(cache, tmp_path, monkeypatch):
    tiny = source(tmp_path)
    library = building.build(tiny)
    assert library.parent == cache and sorted(path.suffix for path in cache.iterdir()) == [".lock", ".so"]
    monkeypatch.setattr(building, "compile_", lambda *paths: pytest.fail("built again"))
    assert building.build(tiny) == library


def test_its_name_is_that_of_source_flags_torch_and_cpu(tmp_path, monkeypatch):
    tiny = source(tmp_path)
    names = {building.name_of(tiny)}
    assert building.name_of(tiny) in names and re.fullmatch(r"tiny-[0-9a-f]{16}\.so", *names)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99.0")
        names.add(building.name_of(tiny))
    with monkeypatch.context() as patch:
        patch.setattr(building, "cpu", lambda: "another")
        names.add(building.name_of(tiny))
    with monkeypatch.context() as patch:
        patch.setattr(building, "flags", lambda: ["-O1"])
        names.add(building.name_of(tiny))
    names.add(building.name_of(source(tmp_path, "int other;")))
    assert len(names) == 5


def test_two_at_once_build_once(cache, tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    tiny, built = source(tmp_path), []

    def slowly(source, library):
        built.append(library)
        time.sleep(0.3)
        library.write_bytes(b"a library")

    monkeypatch.setattr(building, "compile_", slowly)
    threads = [threading.Thread(target=building.build, args=(tiny,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def one_line(capsys, *words):
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("llamabook: no CPU kernels"), err
    for word in words:
        assert word in err


def test_without_a_compiler_a_line_says_so_and_torch_computes(cache, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert kernels.ready() is False
    one_line(capsys, "there is no C++ compiler")
    x, weight = random(2, 64), random(40, 64)
    assert torch.equal(kernels.linear(x, weight), F.linear(x, weight))
    assert kernels.ready() is False and capsys.readouterr() == ("", ""), "said once"


@needs_kernels
def test_a_compiler_that_fails_is_quoted(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(building, "SOURCE", source(tmp_path, "int answer() { return fourty_two; }\n"))
    assert kernels.ready() is False
    one_line(capsys, "failed", "fourty_two")
    assert [path.suffix for path in cache.iterdir()] == [".lock"], "nothing half-built stays"


def test_a_damaged_library_does_not_stop_anything(cache, monkeypatch, capsys):
    library = cache / building.name_of(building.SOURCE)
    library.parent.mkdir(parents=True)
    library.write_bytes(b"\x7fELF but no more")
    assert kernels.ready() is False
    one_line(capsys, library.name)


@pytest.mark.skipif(os.name == "nt" or getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write anywhere")
def test_a_folder_that_can_not_be_written(tmp_path, monkeypatch, capsys):
    tmp_path.chmod(0o500)
    monkeypatch.setenv("LLAMABOOK_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "_loaded", None)
    assert kernels.ready() is False
    one_line(capsys, "can't be written")


def test_a_switch_turns_them_off(cache, monkeypatch, capsys):
    monkeypatch.setenv("LLAMABOOK_KERNELS", "0")
    assert kernels.ready() is False
    assert capsys.readouterr() == ("", "") and not cache.exists()


# ---------------------------------------------------------------- a layer in one call

LAYERS = [  # B, T, D, H, G, d, F, S
    (1, 1, 64, 4, 2, 16, 112, 20), (2, 3, 128, 4, 1, 64, 144, 30), (8, 1, 96, 2, 2, 32, 80, 9), (1, 8, 64, 3, 1, 48, 64, 8),
    (2, 2, 1040, 2, 1, 128, 2064, 600),
]  # fmt: skip


def a_layer(B, T, D, H, G, d, F_, S, dtype):
    """A block with random weights, and what it is called with: x, cos, sin, input_pos, keys, values."""
    cfg = {"emb_dim": D, "n_heads": H, "n_kv_groups": G, "hidden_dim": F_, "head_dim": d, "dtype": dtype, "norm_eps": 0.1}
    block = Block(cfg).requires_grad_(False)
    for i, parameter in enumerate(block.parameters()):
        new = random(*parameter.shape, seed=i) / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else None
        parameter.copy_(1.5 + random(*parameter.shape, seed=i).tanh() if new is None else new)
    start = torch.randint(0, S - T + 1, (B, 1), generator=torch.Generator().manual_seed(S))
    input_pos = start + torch.arange(T)
    cos, sin = (table.unsqueeze(2) for table in rope_tables(input_pos, random(d // 2).abs()))
    keys, values = random(B, G, S + 3, d, dtype=dtype)[:, :, :S], random(B, G, S + 3, d, seed=1, dtype=dtype)[:, :, :S]
    return block, [random(B, T, D, dtype=dtype) / 3, cos, sin, input_pos, keys, values]


def copies(inputs, dtype):
    """Those that are given in `dtype`, and caches that nobody else writes."""
    x, cos, sin, input_pos, keys, values = inputs
    return [x.to(dtype), cos, sin, input_pos, keys.to(dtype).clone(), values.to(dtype).clone()]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", LAYERS)
def test_a_layer_is_the_sum_of_its_parts_in_float64(sizes, dtype):
    block, inputs = a_layer(*sizes, dtype)
    assert block.for_layers(inputs[0], *inputs[4:])
    before, exact = copies(inputs, dtype), copies(inputs, torch.float64)
    expected = copy.deepcopy(block).double()(*exact)  # no kernel takes float64
    close(block(*inputs), expected, dtype, roundings=8)
    close(inputs[4], exact[4], dtype, roundings=3)  # the cache: what is new, and where
    close(inputs[5], exact[5], dtype, roundings=3)
    assert torch.equal(inputs[0], before[0]), "x stays as it was"


@needs_kernels
def test_a_layer_in_bfloat16_rounds_where_its_parts_do(monkeypatch):
    block, inputs = a_layer(*LAYERS[1], torch.bfloat16)
    others = copies(inputs, torch.bfloat16)
    whole = block(*inputs)
    monkeypatch.setattr(kernels, "takes_layer", lambda *inputs: False)
    parts = block(*others)
    assert (whole != parts).float().mean() < 0.02 and torch.equal(inputs[4], others[4])


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_layer_does_not_know_the_others(dtype):
    block, inputs = a_layer(*LAYERS[2], dtype)
    alone = [block(*(part[row : row + 1] for part in copies(inputs, dtype))) for row in range(8)]
    assert torch.equal(block(*inputs), torch.cat(alone))


def matrices(block):
    """What the kernel reads of each of the four."""
    return [linear.for_layer() for linear in block.linears()]


def layer(x, cos, sin, input_pos, keys, values, norms, matrices, heads, F, eps, exact=False):
    """`kernels.layers` for one layer."""
    (norm1, norm2), (wqkv, wo, w13, w2) = norms, matrices
    weights = [norm1, *wqkv, *wo, norm2, *w13, *w2]
    return kernels.layers(x, cos, sin, input_pos, [keys], [values], weights, heads, F, eps, exact)


def what_fits(sizes, dtype=torch.float32):
    """All arguments of `layer`, by name, for a layer that the kernel takes."""
    block, inputs = a_layer(*sizes, dtype)
    names = ("x", "cos", "sin", "input_pos", "keys", "values")
    return dict(zip(names, inputs)) | {
        "norms": (block.norm1.weight, block.norm2.weight), "matrices": matrices(block), "heads": block.heads,
        "F": block.hidden, "eps": block.norm1.eps,
    }  # fmt: skip


def others(items, new):
    """For each place, `items` with that one changed."""
    return [[new(item) if i == place else item for i, item in enumerate(items)] for place in range(len(items))]


@needs_kernels
def test_a_layer_that_does_not_fit_is_refused():
    fits = what_fits(LAYERS[0])
    layer(**fits)
    refusals = [("outside a cache of 20", {"input_pos": fits["input_pos"] + 20})]
    for new in (lambda weight: weight[:-16], lambda weight: weight.bfloat16()):
        refusals += [("don't fit", {"norms": norms}) for norms in others(fits["norms"], new)]
        refusals += [("don't fit", {"matrices": m}) for m in others(fits["matrices"], lambda matrix: [new(matrix[0])])]
    refusals += [("don't fit", {"matrices": m}) for m in others(fits["matrices"], lambda matrix: [matrix[0][:, :-16]])]
    refusals += [("don't fit", {"matrices": m}) for m in others(fits["matrices"], lambda matrix: [])]
    refusals += [("don't fit", {"matrices": m}) for m in others(fits["matrices"], lambda matrix: matrix * 2)]
    refusals += [("don't fit", {"heads": heads}) for heads in (0, -4, 2, 3, 6)]
    refusals += [("don't fit", {"F": F_}) for F_ in (0, -16, 96, 111)]
    for name in ("cos", "sin"):
        refusals += [("cos and sin must be", {name: bad}) for bad in (fits[name][..., :-2], fits[name].double())]
    for words, wrong in refusals:
        with pytest.raises(RuntimeError, match=words):
            layer(**fits | wrong)


@needs_kernels
def test_a_layer_takes_few_rows_whole_vectors_and_known_matrices():
    fits = what_fits(LAYERS[0])

    def takes(**other):
        given = fits | other
        return kernels.takes_layer(*(given[name] for name in ("x", "keys", "values", "matrices", "F")))

    x, keys = fits["x"], fits["keys"]
    assert takes() and takes(x=x.expand(8, -1, -1)) and takes(x=x.expand(2, 4, -1))
    assert not takes(x=x.expand(9, -1, -1)) and not takes(x=x[:, :0]) and not takes(x=x[..., :-1])
    assert not takes(keys=keys[..., :8]) and not takes(keys=keys.half()) and not takes(x=x.to("meta"))
    assert not takes(F=fits["F"] - 1)
    for new in (lambda matrix: [], lambda matrix: [matrix[0].bfloat16()]):
        assert not any(takes(matrices=matrices) for matrices in others(fits["matrices"], new))


@needs_kernels
def test_matrices_of_another_class_are_left_to_it(monkeypatch):
    """A class that says nothing of `kernels.layers`, or computes something else than `Linear`, does its own products."""
    block, inputs = a_layer(*LAYERS[1], torch.float32)
    expected = block(*copies(inputs, torch.float32))

    class Half(Linear):
        def forward(self, x):
            return super().forward(x) / 2

    half = Half(*reversed(block.feed_forward.w2.weight.shape))
    half.set_weight(block.feed_forward.w2.weight * 2)
    silent = torch.nn.Linear(*reversed(half.weight.shape), bias=False).requires_grad_(False)
    silent.weight = block.feed_forward.w2.weight
    monkeypatch.setattr(kernels, "layers", lambda *inputs: pytest.fail("one of the matrices is unknown"))
    for other in (half, silent):
        block.feed_forward.w2 = other
        close(block(*copies(inputs, torch.float32)), expected.double(), torch.float32)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_in_one_call_are_layers_one_by_one(dtype):
    blocks, inputs = zip(*(a_layer(2, 3, 128, 4, 1, 64, 144, 30, dtype) for _ in range(3)))
    for number, block in enumerate(blocks):
        for i, parameter in enumerate(block.parameters()):
            parameter.copy_(random(*parameter.shape, seed=10 * number + i, dtype=dtype) / 10)
    x, cos, sin, input_pos, *_ = inputs[0]
    caches = [[(k.clone(), v.clone()) for *_, k, v in inputs] for _ in range(2)]
    expected = x
    for block, (keys, values) in zip(blocks, caches[0]):
        expected = block(expected, cos, sin, input_pos, keys, values)
    keys, values = map(list, zip(*caches[1]))
    weights = [weight for block in blocks for weight in block.for_layers(x, keys[0], values[0])]
    assert torch.equal(kernels.layers(x, cos, sin, input_pos, keys, values, weights, *blocks[0].settings()), expected)
    for (k, v), found in zip(caches[0], zip(keys, values)):
        assert torch.equal(k, found[0]) and torch.equal(v, found[1])
    for wrong in (weights[:-1], weights + weights[:1], weights[1:], weights[:6]):
        with pytest.raises(RuntimeError, match="don't fit"):
            kernels.layers(x, cos, sin, input_pos, keys, values, wrong, *blocks[0].settings())
    for k, v in ((keys[:2], values), ([], []), ([keys[0], keys[1][:, :, :1], keys[2]], values)):
        with pytest.raises(RuntimeError):
            kernels.layers(x, cos, sin, input_pos, k, v, weights, *blocks[0].settings())


# ---------------------------------------------------------------- memory


def test_large_pages_change_no_number(monkeypatch):
    """Nor any object, on any device and of any size; what is asked for lies within the tensor."""
    asked = []

    class System:
        def __init__(self, name):
            assert name is None

        @staticmethod
        def madvise(begin, length, advice):
            asked.append((begin.value, length.value))

    monkeypatch.setattr(kernels.ctypes, "CDLL", System)
    monkeypatch.setattr(kernels.sys, "platform", "linux")
    for x in (torch.zeros(0), torch.zeros(100), torch.ones(3, 2**20)[1:], torch.ones(2**21, device="meta")):
        assert kernels.large_pages(x) is x
    whole = torch.ones(3 * 2**20 + 5)
    assert kernels.large_pages(whole) is whole and torch.equal(whole, torch.ones(3 * 2**20 + 5))
    begin, length = asked[-1]
    assert whole.data_ptr() <= begin and begin + length <= whole.data_ptr() + whole.nbytes
    assert begin % 2**21 == length % 2**21 == 0 and length >= whole.nbytes - 2 * 2**21


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells")
def test_large_pages_are_large():
    def large():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages"))

    choice = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not choice.exists() or "[never]" in choice.read_text():
        pytest.skip("this system has no large pages")
    before = large()
    x = kernels.large_pages(torch.empty(2**25))  # 128 MB
    x.fill_(1.0)
    if large() == before:
        pytest.skip("there is no large page free")
    assert large() - before >= 2**26


# ---------------------------------------------------------------- mistakes that these tests must notice

MISTAKES = {
    "a query sees one slot too few": ("+ 1 - first;", "- first;"),
    "the heads of a group are interleaved": ("h = g * each + m % each;\n        const E* from", "h = m % each * G + g;\n        const E* from"),
    "parts are joined as if they had one maximum": ("std::exp(first.maximum[c * step] - maximum)", "1.0f"),
    "scores are not scaled": ("const float scale = 1 / std::sqrt(float(d));", "const float scale = 1;"),
    "the rest of a row is left out": ("if (k < K) {", "if (k > K) {"),
    "a part of a row takes the place of those before": ("std::memcpy(sum, sums, sizeof sum);", "std::memset(sum, 0, sizeof sum);"),
    "the last rows of a matrix are left out": ("for (; n < bottom; n++, sum", "for (; n > bottom; n++, sum"),
    "x is packed row by row": ("How::number(x[t * K + k + i])", "How::number(x[k * T + t * How::count + i])"),
    "neighbours are the same one twice": ("even + 1)", "even)"),
    "the last keys are read where the first stand": ("rest + (j - s) * d, keys + j * key_stride", "rest + (j - s) * d, keys + (j - s) * key_stride"),
    "a chunk's last value is left out": ("for (int64_t s = 0; s < count; s++) {", "for (int64_t s = 0; s + 1 < count; s++) {"),
    "a share of the rows is left out": ("first < count;) {\n", "first + least < count;) {\n"),
    "the norm forgets eps": ("/ D + eps)", "/ D)"),
    "pairs are turned the other way": ("first * cos[i] - second", "first * cos[i] + second"),
    "SiLU of the wrong half": ("x = load(both + i), e", "x = load(both + F + i), e"),
    "what comes in does not go on": ("store(load(x + i) + load(&y[i])", "store(load(&y[i])"),
    "all values in the first row's cache": ("V + row / T * values.stride(0)", "V + 0 * values.stride(0)"),
    "queries that fill no group are left out": ("if (Q > 1 && M % Q)", "if (Q > M)"),
    "bf16 is cut and not rounded": ("(bits + 0x7fff + (bits >> 16 & 1)) >> 16", "bits >> 16"),
    "a matrix's rows follow each other": ("weight + n * stride", "weight + n * K"),
}  # fmt: skip


def is_noticed(right, wrong, tests, tmp_path):
    """Builds the kernels with one mistake, some seconds, and runs the quick tests of a file on them: one must fail."""
    text = building.SOURCE.read_text(encoding="utf-8")
    assert text.count(right) >= 1
    package = tmp_path / "pkg"
    subprocess.run(["cp", "-r", str(PACKAGE), str(package)], check=True)
    (package / "llamabook/fast/kernels/kernels.cpp").write_text(text.replace(right, wrong), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(package), "LLAMABOOK_CACHE": str(tmp_path / "cache")}
    words = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", f"pythonpath={package}", "-m", "not long", tests]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout[-500:]


@pytest.mark.long
@needs_kernels
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_known_mistake_is_noticed(mistake, tmp_path):
    is_noticed(*MISTAKES[mistake], __file__, tmp_path)
