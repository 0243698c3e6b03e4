"""How fast a Llama decodes on several GPUs, foretold from data sheets. Written by hand.

With tensor parallelism, a GPU's step reads its cut of the weights and of the cache, runs the kernels of all
layers one after the other, and adds partial sums up over all GPUs, twice a layer. Each has a price that is
known before: bytes over bandwidth, so many kernels, so many all-reduces. What is on no data sheet comes from
published runs on one GPU, from NCCL's own model of an all-reduce, or is counted on paper. Nothing is fitted to
runs on several GPUs, so these can judge it.
"""

import math
from dataclasses import dataclass

from llamabook.errors import InputError
from llamabook.llama2 import head_dim_of


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet. A GB is 10^9 bytes; link and network: GB/s that one GPU sends, one way."""

    name: str
    memory: float  # GB
    bandwidth: float  # GB/s, of its memory
    flops: float  # 10^12 a second, bf16, without sparsity
    link: float  # GB/s to the other GPUs of its node
    hop: str  # what that link is: nvlink (and AMD's Infinity Fabric) or pcie
    network: float  # GB/s to other nodes


# From the makers' data sheets. network: what a GPU has for itself in DGX, HGX and Frontier; for the last two
# 100 Gb/s are assumed. An MI250X is two GPUs to a program; this is one of them.
# GPUs on PCIe that may not read each other's memory (GeForce) go through the host's, and pay more than this.
GPUS = {
    "a100": Gpu("A100 SXM 80 GB", 80, 2039, 312, 300, "nvlink", 25),
    "h100": Gpu("H100 SXM", 80, 3350, 989, 450, "nvlink", 50),
    "h200": Gpu("H200 SXM", 141, 4800, 989, 450, "nvlink", 50),
    "b200": Gpu("B200 SXM", 180, 8000, 2250, 900, "nvlink", 50),
    "mi250x": Gpu("MI250X, one of its two dies", 64, 1638, 191.5, 50, "nvlink", 12.5),
    "mi300x": Gpu("MI300X", 192, 5300, 1307, 448, "nvlink", 50),
    "l40s": Gpu("L40S", 48, 864, 362, 32, "pcie", 12.5),
    "rtx4090": Gpu("GeForce RTX 4090", 24, 1008, 165, 32, "pcie", 12.5),
}


@dataclass(frozen=True)
class Precision:
    """What a weight of the matrices takes, and how well kernels for it use the memory.

    efficiency: of the data sheet's bandwidth, what decoding reached on one GPU beside the kernels' price.
    group: so many columns share a scale and can't be cut apart; 1 where none do.
    """

    bytes: float
    efficiency: float
    group: int = 1


# The efficiencies and KERNEL solve gpt-fast's rows for one A100 (its README): seconds = bytes / (efficiency *
# bandwidth) + layers * KERNELS * KERNEL. Llama 2 7B made 104.9, 155.58 and 196.80 tokens/s in bf16, int8 and
# int4, 70B 19.13 and 25.25 in int8 and int4. The two int8 rows give 55 us a layer, the two int4 rows 49.
PRECISIONS = {
    "bf16": Precision(2, 0.84),
    "int8": Precision(1, 0.70),
    "int4": Precision(0.5 + 2 / 32, 0.59, 32),  # 32 weights share a scale in bf16
}
KERNELS = 11  # of a layer: norm, qkv, rotation and cache, scores, softmax, values, out; norm, w1, w3, w2
KERNEL = 5e-6  # seconds that each takes beside reading: to start, to get going, to drain
AROUND = 2  # such prices around an all-reduce: the copy that it sums in, and to NCCL's stream and back
CACHE_BYTES = 2  # of a number in the cache, which stays bf16

# NCCL's own model of a tree all-reduce (src/graph/tuning.cc, as of 2.28), by protocol: seconds to start,
# seconds a hop by what is crossed, and the share of the links' bandwidth. LL sends a flag with every word;
# LL128 sends one with every 128 bytes and needs links that keep them together; Simple sends blocks.
PROTOCOLS = {
    "LL": (6.8e-6, {"nvlink": 0.6e-6, "pcie": 1.0e-6, "network": 5.0e-6}, 1 / 3.8),
    "LL128": (14.0e-6, {"nvlink": 1.25e-6, "network": 8.5e-6}, 7 / 9),
    "Simple": (8.4e-6, {"nvlink": 4.0e-6, "pcie": 4.0e-6, "network": 14.0e-6}, 0.92),
}


def sizes_that_work(cfg: dict, precision: Precision) -> list[int]:
    """How many GPUs can split a shape: whole heads and groups of columns, KV heads whole or repeated."""
    H, G, F = cfg["n_heads"], cfg["n_kv_groups"], cfg["hidden_dim"]
    by_row = (H * head_dim_of(cfg), F)  # the matrices that are cut along their columns
    return [
        n
        for n in range(1, H + 1)
        if H % n == 0 and (G % n == 0 or n % G == 0) and all(K % (n * precision.group) == 0 for K in by_row)
    ]


def all_reduce_time(gpu: Gpu, num_gpus: int, gpus_per_node: int, size: float) -> tuple[float, float]:
    """Seconds to add `size` bytes up over all GPUs: latency and transfer, with NCCL's fastest protocol.

    In a node the sum walks along a chain of GPUs, between nodes up a tree, and then all the way back, so it
    has half of the bandwidth. Between nodes, the GPUs of a node share their network cards.
    """
    if num_gpus == 1:
        return 0.0, 0.0
    here, nodes = min(num_gpus, gpus_per_node), -(-num_gpus // gpus_per_node)
    bus = 1e9 * (gpu.link if nodes == 1 else min(gpu.link, here * gpu.network))
    found = []
    for start, hops, share in PROTOCOLS.values():
        if gpu.hop in hops:
            along, up = (here - 1) * hops[gpu.hop], math.ceil(math.log2(nodes)) * hops["network"]
            found.append((start + 2 * (along + up), 2 * size / (share * bus)))
    return min(found, key=sum)


@dataclass(frozen=True)
class Plan:
    """A Llama of configuration cfg, split over GPUs by tensor parallelism, and decoding.

    context: tokens of each text, all in the cache. split_vocabulary: embedding and head are cut, too;
    gpt-fast leaves them whole. Raises InputError for a split that can't be.
    """

    cfg: dict
    gpu: Gpu
    num_gpus: int = 1
    gpus_per_node: int = 8
    precision: Precision = PRECISIONS["bf16"]
    batch_size: int = 1
    context: int = 4096
    split_vocabulary: bool = True

    def __post_init__(self):
        for name in ("num_gpus", "gpus_per_node", "batch_size", "context"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"{name} is {value}: give 1 or more")
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            raise InputError(f"{self.num_gpus} GPUs fill no nodes of {self.gpus_per_node}: give a multiple")
        check_split(self.cfg, self.num_gpus, self.precision)

    @property
    def seconds(self) -> float:
        """Of a step, which makes one token for each text."""
        return sum(step_terms(self).values())

    @property
    def fits(self) -> bool:
        """By the data sheet's GB; the few % that a GPU has above are for the program and activations."""
        return sum(memory(self).values()) <= 1e9 * self.gpu.memory


def check_split(cfg: dict, num_gpus: int, precision: Precision) -> None:
    """Raise InputError, with the numbers that would work, if this shape can't be split over so many GPUs."""
    if num_gpus not in (sizes := sizes_that_work(cfg, precision)):
        H, G, F = cfg["n_heads"], cfg["n_kv_groups"], cfg["hidden_dim"]
        groups = f", groups of {precision.group} columns" if precision.group > 1 else ""
        heads = f"{H} heads, {G} KV heads, hidden width {F}{groups}"
        known = ", ".join(map(str, sizes[:-1])) + " or " * (len(sizes) > 1) + str(sizes[-1])
        raise InputError(f"{num_gpus} GPUs can't split this shape ({heads}): use {known}")


def weights(plan: Plan) -> dict[str, float]:
    """How many numbers one GPU holds: its cut of the layers' matrices; KV heads that other GPUs hold as well;
    the head, which is as large as the embedding; the norms.
    """
    cfg, n = plan.cfg, plan.num_gpus
    L, D, F, H, G = (cfg[key] for key in ("n_layers", "emb_dim", "hidden_dim", "n_heads", "n_kv_groups"))
    d = head_dim_of(cfg)
    return {
        "layers": L * (2 * D * d * (H + G) + 3 * D * F) / n,
        "repeated": L * 2 * D * d * max(1 - G / n, 0),
        "head": D * (-(-cfg["vocab_size"] // n) if plan.split_vocabulary else cfg["vocab_size"]),
        "norms": (2 * L + 1) * D,
    }


def memory(plan: Plan) -> dict[str, float]:
    """Bytes on one GPU: its cut of the weights, what other GPUs hold as well, and the cache of all texts.

    The embedding stays bf16. It is the head, too, where the shape ties them and nothing is quantized.
    """
    held, per_weight = weights(plan), plan.precision.bytes
    shared = plan.cfg.get("tie_embeddings", False) and plan.precision.bytes == 2
    tables = held["head"] * (per_weight + 2 * (not shared))
    cut = plan.num_gpus > 1 and not plan.split_vocabulary
    return {
        "weights": held["layers"] * per_weight + tables * (not cut),
        "replicated": held["repeated"] * per_weight + held["norms"] * 2 + tables * cut,
        "cache": cache_per_token(plan) * plan.batch_size * plan.context,
    }


def cache_per_token(plan: Plan) -> float:
    """Bytes that one token takes in the cache of one GPU, which holds its KV heads, at least one."""
    heads = max(plan.cfg["n_kv_groups"] / plan.num_gpus, 1)
    return 2 * plan.cfg["n_layers"] * heads * head_dim_of(plan.cfg) * CACHE_BYTES


def step_terms(plan: Plan) -> dict[str, float]:
    """Seconds of one step on each GPU, by cause; they add up.

    compute: what multiplying takes longer than reading, in large batches. latency, links: of the all-reduces,
    two a layer, and with a cut vocabulary three more, for embedding, logits and the token that was drawn.
    """
    gpu, held, B, L = plan.gpu, weights(plan), plan.batch_size, plan.cfg["n_layers"]
    read = held["layers"] + held["repeated"] + held["head"]
    reading = read * plan.precision.bytes / (gpu.bandwidth * 1e9 * plan.precision.efficiency)
    multiplying = 2 * B * read / (gpu.flops * 1e12)
    caching = memory(plan)["cache"] / (gpu.bandwidth * 1e9 * PRECISIONS["bf16"].efficiency)
    sums = (2 * L + 3 * plan.split_vocabulary) * (plan.num_gpus > 1)
    size = B * plan.cfg["emb_dim"] * 2  # a row of the residual stream for each text, in bf16
    latency, links = all_reduce_time(gpu, plan.num_gpus, plan.gpus_per_node, size)
    return {
        "weights": reading,
        "compute": max(multiplying - reading, 0.0),
        "cache": caching,
        "kernels": L * KERNELS * KERNEL,
        "latency": sums * (latency + AROUND * KERNEL),
        "links": sums * links,
    }
