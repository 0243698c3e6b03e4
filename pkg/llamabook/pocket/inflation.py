"""A small Llama in a large shape, computing the same function. Written by hand; `pocket.inflate` is the way in.

What a large model costs depends on its shape, what it says on its weights. So a small model that was taught something is
laid into the large shape: d of D dimensions of the residual stream, some heads, some hidden units, the first layers and
tokens are the small model's, and all that is added computes exact zeros. Three things make that exact:

- RMSNorm. Added dimensions are 0, but for dimension d, which holds a constant c at every position. The norm then
  sees (sum x^2 + c^2) / D + eps'. Where c^2 + eps' D = eps d, that is d/D times the small model's sum x^2 / d + eps:
  the constant takes the place of part of epsilon. Norm weights are sqrt(d/D) times the small model's, and 0 for
  added dimensions.
- Zeros times noise. Behind the norm added dimensions are 0, so all that reads them may be noise. The values of added heads
  and the up projection of added hidden units read nothing else and are 0, so what leads back from them may be noise, too.
  Only what would write into added dimensions, or read real ones there, has to be 0: a few per cent of all weights.
- Added tokens. The final norm lets the constant through, and added rows of the head have -C against it: each is a copy of
  a real row, at least GAP below it. The first rows all have c there (where the head is the token table), which shifts all
  logits alike and no probability.

Noise is at most as large as the root mean square of its row's real weights, so it does not coarsen the scale that
quantization picks, and at least a quarter of it, so codes of 4 bits still see it.
"""

import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from shutil import copyfile

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llamabook import pocket
from llamabook.checkpoint import load_model
from llamabook.checkpoint.convert import check_space, companions_of, token_ids, whole
from llamabook.checkpoint.huggingface import build_llama, huggingface_names, to_config, write_json
from llamabook.checkpoint.streaming import TensorWriter
from llamabook.errors import InputError
from llamabook.llama2 import Llama2Model, head_dim_of

GAP = 150.0  # nats; the probability exp(-150) is 0 in float32
C = 2.0**15  # large, so that the constant need not be, and half of what float16 holds
BLOCK = 2**21  # numbers of a weight that are made at a time
ADDED, SILENT = -1, -2  # where no row or column of the small model stands: noise, or zeros
PLACES = {  # what rows and columns are, and whether added rows have to be 0 in the columns that are not added
    "att.W_query": ("heads", "width", False),
    "att.W_key": ("groups", "width", False),
    "att.W_value": ("groups", "width", True),
    "att.out_proj": ("width", "heads", True),
    "ff.fc1": ("units", "width", False),
    "ff.fc2": ("units", "width", True),
    "ff.fc3": ("width", "units", True),
}
NOTE = """# {name}, inflated

This checkpoint has the shape and the cost of a larger model and computes what {name} computes: the added weights
are noise that meets zeros. It is for measuring speed, quantization and speculation. Nothing was trained at this size.
"""


def inflate(
    model: str | Path | nn.Module, config: dict, output: str | Path | None = None, *, force: bool = False
) -> nn.Module | Path:
    """As `pocket.inflate`, which says it."""
    source = None
    if isinstance(model, (str, Path)):
        source = pocket.path(str(model)) if str(model) in pocket.names() else Path(model)
        model = load_model(source, dtype=torch.float32)
    elif not isinstance(model, Llama2Model):
        known = ", ".join(pocket.names())
        raise InputError(f"model is a {type(model).__name__}: give a Llama, a folder, or one of {known}")
    inflation = Inflation(source.resolve().name if source else "a model in memory", model, config)
    return inflation.model() if output is None else inflation.write(source, Path(output), force)


class Inflation:
    """A small model in a large shape, weight by weight.

    Args: name and model, the small one; config, the shape, as LLAMA32_CONFIG_1B. Raises InputError if the one does
    not fit into the other, ConfigError if the shape is none.
    """

    def __init__(self, name: str, model: nn.Module, config: dict):
        self.name, self.small = name, model.cfg
        self.old = {key: weight.detach().cpu().float() for key, weight in model.state_dict().items()}
        own = {key: self.small[key] for key in ("rope_base", "rope_freq")}
        large = empty({**config, **own}).cfg  # refuses what is no shape
        check_fit(name, self.small, large)
        self.d, self.D, eps = self.small["emb_dim"], large["emb_dim"], self.small.get("norm_eps", 1e-5)
        half = math.sqrt(eps * self.d / 2) if self.D > self.d else 0.0
        self.c = torch.tensor(half).to(large["dtype"]).item()  # rounded first: epsilon takes the rest
        self.cfg = {**large, "norm_eps": (eps * self.d - self.c**2) / self.D}
        self.tied = self.cfg.get("tie_embeddings", False)
        self.names = {ours: theirs for theirs, ours in huggingface_names(self.cfg["n_layers"]).items()}
        if self.tied:  # the head is the table
            del self.names["out_head.weight"]
        e, (query, groups) = head_dim_of(large), heads(self.small, large)
        self.maps = {
            "width": along(self.d, self.D),
            "units": along(self.small["hidden_dim"], large["hidden_dim"]),
            "heads": rows_of(query, e),
            "groups": rows_of(groups, e),
        }

    def model(self) -> Llama2Model:
        """The large model in memory."""
        model = empty(self.cfg).to_empty(device="cpu")
        state = model.state_dict()
        for name, first, rows in self.pieces():
            state[name][first : first + len(rows)] = rows
        return model.eval()

    def write(self, source: Path | None, output: Path, force: bool) -> Path:
        """The large model as a Hugging Face folder, a few rows in memory at a time, with the tokenizer of `source`."""
        shapes, said = empty(self.cfg).state_dict(), {"inflated_from": self.name}
        plan = {theirs: shapes[ours] for ours, theirs in self.names.items()}
        with whole(source, output, force) as part:
            companions = companions_of(source) if source else []
            metadata = (token_ids(source, companions) if source else {}) | said
            writer = TensorWriter(part, plan, metadata=said)
            check_space(writer.left, companions, output)
            part.mkdir(parents=True)
            with writer, tqdm(total=writer.left, unit="B", unit_scale=True, leave=False, disable=None) as bar:
                for ours, first, rows in self.pieces():
                    writer.write(self.names[ours], rows, first)
                    bar.update(rows.nbytes)
            with (part / "config.json").open("wb") as file:
                write_json(file, to_config(self.cfg, metadata))
            (part / "README.md").write_text(NOTE.format(name=self.name), encoding="utf-8")
            for file in companions:
                copyfile(file, part / file.name)
        return output

    def pieces(self) -> Iterator[tuple[str, int, Tensor]]:
        """All weights, a few rows at a time: our name, the number of the first row, and the rows in the shape's dtype."""
        for name in self.names:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            for first, rows in self.rows(name, generator):
                yield name, first, rows.to(self.cfg["dtype"])

    def rows(self, name: str, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
        """One weight in blocks of rows."""
        if name in ("tok_emb.weight", "out_head.weight"):
            return self.vocabulary(name, generator)
        if name == "final_norm.weight":
            return self.norm(self.old[name], through=True)
        _, layer, part, *_ = re.split(r"\.(\d+)\.(.+)\.", name)
        last = self.small["n_layers"] - 1  # an added layer has weights of the last one's size
        old = self.old[f"trf_blocks.{min(int(layer), last)}.{part}.weight"]
        if old.dim() == 1:
            return self.norm(old)
        *places, cut = PLACES[part]
        maps = [self.maps[place] for place in places]
        if int(layer) > last:  # all of its heads and hidden units are added
            maps = [m if place == "width" else torch.full_like(m, ADDED) for place, m in zip(places, maps)]
        return matrix(old, *maps, cut, generator)

    def norm(self, old: Tensor, through: bool = False) -> Iterator[tuple[int, Tensor]]:
        """A norm's weight; `through`: the constant passes, as h, with C h = GAP where the stream is loudest."""
        shrink = math.sqrt(self.d / self.D)
        weight = torch.zeros(self.D, dtype=torch.float64)
        weight[: self.d] = old.double() * shrink
        if through and self.c:
            weight[self.d] = GAP / C * loudest(self.old, self.small) * shrink / self.c
        yield 0, weight

    def vocabulary(self, name: str, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
        """The token table or the head: rows of the small model, then copies of them that carry -C."""
        old, d, v = self.old[name], self.d, self.small["vocab_size"]
        only_read = name == "out_head.weight" and not self.tied  # what it has in added dimensions meets zeros
        sizes = size_of(old)
        for first, ids in blocks(self.cfg["vocab_size"], self.D):
            real = ids < v
            piece = noise(len(ids), self.D, generator) * torch.where(real[:, None], sizes[ids % v], C)
            piece[:, :d] = old[ids % v]
            if not only_read:
                piece[real, d:] = 0
            if self.c:
                piece[:, d] = torch.where(real, 0.0 if only_read else self.c, -C)
            yield first, piece


def matrix(
    old: Tensor, rows: Tensor, columns: Tensor, cut: bool, generator: torch.Generator
) -> Iterator[tuple[int, Tensor]]:
    """A matrix (N, K) in blocks of rows, with rows and columns of `old` where `rows` (N,) and `columns` (K,) say so.

    cut: added rows are 0 in the columns that are the small model's.
    """
    real, sizes = columns >= 0, size_of(old)
    kept = old[:, columns[real]]
    for first, numbers in blocks(len(rows), len(columns)):
        here = rows[numbers, None] >= 0  # (rows of this block, 1)
        source = rows[numbers].clamp(min=0)
        piece = noise(len(numbers), len(columns), generator) * torch.where(here, sizes[source], sizes.mean())
        piece[:, real] = torch.where(here, kept[source], 0.0 if cut else piece[:, real])
        piece[:, columns == SILENT] = 0
        yield first, piece


def noise(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Numbers from 1/4 to 1, and as many below zero."""
    drawn = torch.empty(rows, columns).uniform_(-0.75, 0.75, generator=generator)
    return drawn + torch.copysign(torch.tensor(0.25), drawn)


def size_of(old: Tensor) -> Tensor:
    """The root mean square of each row, (N, 1); for a row of zeros, which any scale suits, that of all."""
    square = old.pow(2).mean(dim=1, keepdim=True)
    return torch.where(square > 0, square, square.mean()).sqrt()


def blocks(rows: int, columns: int) -> Iterator[tuple[int, Tensor]]:
    """The numbers of so many rows in blocks, each with its first one."""
    for numbers in torch.arange(rows).split(max(BLOCK // columns, 1)):
        yield int(numbers[0]), numbers


def along(n: int, N: int) -> Tensor:
    """(N,): 0 to n - 1, then ADDED."""
    return torch.cat((torch.arange(n), torch.full((N - n,), ADDED)))


def heads(small: dict, large: dict) -> tuple[Tensor, Tensor]:
    """Which of the small model's query heads and groups stand where in the large one, (H,) and (G,).

    A small group takes as many large ones as its query heads fill, each with its keys and values. Query heads that are
    left over in the last of them are SILENT, since its values are real.
    """
    each, room = (cfg["n_heads"] // cfg["n_kv_groups"] for cfg in (small, large))
    times = -(-each // room)  # large groups for each small one
    group = along(small["n_kv_groups"] * times, large["n_kv_groups"])
    group = torch.where(group >= 0, group // times, ADDED)
    query = torch.where(group >= 0, SILENT, ADDED).repeat_interleave(room)
    for head in range(small["n_heads"]):
        query[(head // each * times + head % each // room) * room + head % each % room] = head
    return query, group


def rows_of(heads: Tensor, e: int) -> Tensor:
    """The rows of e for each head, (len(heads) * e,); what is no head stays as it is."""
    return torch.where(heads[:, None] >= 0, heads[:, None] * e + torch.arange(e), heads[:, None]).flatten()


def loudest(old: dict[str, Tensor], cfg: dict) -> float:
    """A bound for the root mean square of the residual stream, whatever the model reads.

    A normalized vector is sqrt(d) long at most. Attention averages values, and |silu(g) u| is |g| |u| at most, so
    spectral norms bound what each layer adds.
    """

    def spectral(matrix: Tensor) -> float:
        return torch.linalg.matrix_norm(matrix, ord=2).item()

    d, length = cfg["emb_dim"], old["tok_emb.weight"].norm(dim=1).amax().item()
    for layer in range(cfg["n_layers"]):
        norm1, O, V, norm2, gate, up, down = (
            old[f"trf_blocks.{layer}.{part}.weight"]
            for part in ("norm1", "att.out_proj", "att.W_value", "norm2", "ff.fc1", "ff.fc2", "ff.fc3")
        )
        length += spectral(O) * math.sqrt(cfg["n_heads"]) * spectral(V * norm1) * math.sqrt(d)
        length += spectral(down * (gate * norm2).norm(dim=1)) * spectral(up * norm2) * d
    return length / math.sqrt(d)


def empty(cfg: dict) -> Llama2Model:
    """The model of `cfg` on the meta device, which has shapes and no memory. Raises ConfigError."""
    with torch.device("meta"):
        return build_llama(cfg)


def check_fit(name: str, small: dict, large: dict) -> None:
    """Raises InputError, which says what number is too small, unless the small model fits into the large shape."""

    def refuse(what: str, advice: str) -> None:
        raise InputError(f"{name} does not fit into the shape: {what}: {advice}")

    if head_dim_of(small) != head_dim_of(large):
        what = f"its head_dim is {head_dim_of(small)}, the shape's {head_dim_of(large)}"
        refuse(what, "give a shape with the same head_dim")
    for key in ("vocab_size", "emb_dim", "n_layers", "hidden_dim"):
        if large[key] < small[key]:
            refuse(f"{key} is {large[key]}", f"give {small[key]} or more")
    each, room = (cfg["n_heads"] // cfg["n_kv_groups"] for cfg in (small, large))
    needed = small["n_kv_groups"] * -(-each // room)
    if large["n_kv_groups"] < needed:
        what = f"n_kv_groups is {large['n_kv_groups']}, with {room} query heads each"
        refuse(what, f"give {needed} or more groups of that kind")
    if large["emb_dim"] == small["emb_dim"] and large["vocab_size"] > small["vocab_size"]:
        what = f"emb_dim {large['emb_dim']} has no dimension left that keeps added tokens from being drawn"
        refuse(what, f"give {small['emb_dim'] + 1} or more, or vocab_size {small['vocab_size']}")
    if large.get("tie_embeddings", False) and not small.get("tie_embeddings", False):
        refuse("its head is not its token table, the shape ties them", "give a shape with tie_embeddings False")
