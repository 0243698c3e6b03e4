"""One mode in a process of its own, written by hand: `python -m llamabook.bench.worker`.

It talks in lines of JSON. The first line that it reads names mode and job; it loads, makes its first tokens and
answers with what that took. For each further line, "round", it measures once and answers. Answers begin with @@, so
that nothing a library prints is mistaken for one. Another program that speaks so can join the rotation: see --peer.
"""

import json
import os
import sys
import threading
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from llamabook.bench.job import COMPILED, Job, bytes_per_step, config_of, parts_of, weight_bytes

ANSWER = "@@"
FIRST_TOKENS = 3  # of the first run: prefill, a first decoding step, and one that nothing new has to be built for
PROBES = 5
CHECKS = 7  # steps of each kind, in turn


def main(guest: "type[Subject] | None" = None) -> None:
    """Serve stdin until it ends with the mode that its first line names, or with `guest`, whatever that is called."""
    sys.stdout.reconfigure(line_buffering=True)
    order = json.loads(sys.stdin.readline())
    with Memory() as memory:
        kind = guest or KINDS[parts_of(order["mode"])[0]]
        subject = kind(order["mode"], Job(**order["job"]), memory)
        answer(subject.start())
        for line in sys.stdin:
            if line.strip() == "round":
                answer(subject.round())


def answer(content: dict) -> None:
    print(ANSWER + json.dumps(content), flush=True)


class Subject:
    """A loaded mode: how it starts, and how fast it is. A kind of it says how to `make` the model and `run` it."""

    packages: tuple[str, ...] = ()  # whose versions belong to the numbers, beside our own and torch's

    def __init__(self, mode: str, job: Job, memory: "Memory"):
        import torch

        self.job, self.memory, self.compiled, self.precision = job, memory, mode.endswith(COMPILED), parts_of(mode)[1]
        self.device = torch.device(job.device)
        if self.compiled:  # what compiling brings along is no cost of the model's
            torch.compile(lambda x: x + 1)(torch.ones(1, device=self.device))
        memory.begin(self.device)
        self.config = config_of(job)
        self.prompt = self.make_prompt().to(self.device)
        with torch.no_grad():
            self.model = self.make()

    def make_prompt(self):
        """The ids (B, T) that all modes read: random ones, or with a draft, which is right as often as a text lets it be, text."""
        import torch

        job, generator = self.job, torch.Generator().manual_seed(0)
        if job.draft_checkpoint_path is None:
            return torch.randint(0, self.config["vocab_size"], (job.batch_size, job.prompt_tokens), generator=generator)
        from llamabook.bench.texts import rows_of_text
        from llamabook.tokenizer import load_tokenizer, tokenizer_folder

        tokenizer = load_tokenizer(tokenizer_folder(Path(job.checkpoint_path)))
        return torch.tensor(rows_of_text(tokenizer, job.batch_size, job.prompt_tokens))

    def make(self):
        """The model, with the checkpoint's weights or random ones."""
        raise NotImplementedError

    def run(self, n: int) -> list[float]:
        """Generate n tokens greedily in each row; the times of the beginning and after each step."""
        raise NotImplementedError

    def start(self) -> dict:
        """The first run of this process, then the same again; what both took, and where."""
        first, again = self.run(FIRST_TOKENS), self.run(FIRST_TOKENS)
        return {
            "first_token_s": first[1] - first[0],
            "compile_s": max(0.0, (first[-1] - first[0]) - (again[-1] - again[0])) if self.compiled else 0.0,
            "matmul_gflop_per_s": self.matmul_speed(),
            "weight_bytes": self.weight_bytes(),
            "versions": versions(self.device) | {name: version(name) for name in self.packages},
            "machine": machine(self.device),
        }

    def round(self) -> dict:
        """One timed run between two readings of the weights' memory."""
        before = self.bandwidth()
        times = self.run(self.job.max_new_tokens)
        after = self.bandwidth()
        steps = len(times) - 2
        return {
            "prefill_s": times[1] - times[0],
            "step_s": (times[-1] - times[1]) / steps,
            "read_gb_per_s": [before, after],
            "peak_memory_gb": self.memory.peak_gb(),
            **self.check(),
        }

    def check(self) -> dict:
        """{"check_cost": what a step with `check_tokens` tokens in each row costs, in steps with one}, if it was asked."""
        return {}

    def weight_bytes(self) -> int:
        """What one forward reads of the weights."""
        return weight_bytes(self.config)

    def bandwidth(self) -> float:
        """GB/s of reading the `largest` matrix, the median of a few times."""
        from llamabook.fast import kernels

        largest, speeds = self.largest(), []
        for _ in range(PROBES):
            start = self.now()
            kernels.read_all(largest)
            speeds.append(largest.nbytes / 1e9 / (self.now() - start))
        return sorted(speeds)[PROBES // 2]

    def largest(self):
        """The largest matrix of the model, or one of its size where no tensor of torch's holds it."""
        return max(self.model.parameters(), key=lambda parameter: parameter.nbytes).detach()

    def matmul_speed(self) -> float:
        """GFLOP/s of a product of two large matrices in the job's dtype, the best of a few: the other limit."""
        import torch

        n = 2048 if self.device.type == "cpu" else 8192
        a, b = torch.ones(2, n, n, dtype=self.config["dtype"], device=self.device)
        seconds = []
        for _ in range(PROBES):
            start = self.now()
            a @ b
            seconds.append(self.now() - start)
        return 2 * n**3 / 1e9 / min(seconds)

    def now(self) -> float:
        """The time when all that was asked of the device is done."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()


class Plain(Subject):
    """The models and loops of chapters 1, 2 and 4."""

    module, name = "llamabook.llama3", "Llama3Model"
    loop = "llamabook.generate"

    def make(self):
        import torch

        kind = getattr(import_module(self.module), self.name)
        with torch.device("meta"):
            model = kind(self.config)
        if self.job.checkpoint_path is None:
            model = fill(model.to_empty(device=self.device))
        else:
            from llamabook.checkpoint import load_model

            loaded = load_model(Path(self.job.checkpoint_path), device=self.device, dtype=self.config["dtype"])
            model.load_state_dict(loaded.state_dict(), assign=True)
        model = model.eval().requires_grad_(False)
        return torch.compile(model) if self.compiled else model

    def run(self, n: int) -> list[float]:
        stream = import_module(self.loop).stream
        times = [self.now()]
        for _ in stream(self.model, self.prompt, n, self.config["context_length"]):
            times.append(self.now())
        return times


class Fast(Plain):
    name = "Llama3ModelFast"


class Cached(Plain):
    module, loop = "llamabook.kv_cache.llama3", "llamabook.kv_cache.generate"


class Static(Subject):
    """The engine."""

    def make(self):
        from functools import partial

        from llamabook import fast
        from llamabook.checkpoint import load_model
        from llamabook.fast.linear import Linear
        from llamabook.fast.model import Transformer, from_llama
        from llamabook.fast.quantize import QuantizedLinear, scheme_of

        linear = partial(QuantizedLinear, scheme=scheme_of(self.precision)) if self.precision else Linear
        if self.precision:
            self.config["tie_embeddings"] = False  # the table stays in the job's dtype
        if self.job.checkpoint_path is not None:
            path, to = Path(self.job.checkpoint_path), {"dtype": self.config["dtype"], "device": self.device}
            return from_llama(load_model(path), linear, **to) if self.precision else fast.load(path, **to)[0]
        with self.device:
            return fill(Transformer(self.config, linear)).eval()

    def linears(self) -> list:
        """The model's matrices."""
        return [self.model.head, *(m for m in self.model.blocks.modules() if hasattr(m, "for_layer"))]

    def weight_bytes(self) -> int:
        tensors = [tensor for linear in self.linears() for tensor in (*linear.parameters(), *linear.buffers())]
        norms = [p for name, p in self.model.named_parameters() if "norm" in name]
        return sum(tensor.nbytes for tensor in (*tensors, *norms))

    def largest(self):
        tensors = [tensor for linear in self.linears() for tensor in (*linear.parameters(), *linear.buffers())]
        return max(tensors, key=lambda tensor: tensor.nbytes).detach()

    def check(self) -> dict:
        import statistics

        import torch

        from llamabook.fast.cache import StaticCache
        from llamabook.fast.decode import forward

        job, seconds = self.job, {1: [], self.job.check_tokens: []}
        if not job.check_tokens:
            return {}
        end = job.prompt_tokens + job.max_new_tokens
        cache = StaticCache(self.model.cfg, job.batch_size, end, self.device)
        for _ in range(CHECKS):
            for count in seconds:
                idx = self.prompt[:, :1].expand(-1, count)
                input_pos = torch.arange(end - count, end, device=self.device).expand(job.batch_size, -1)
                start = self.now()
                forward(self.model, idx, input_pos, cache, compiled=self.compiled)
                seconds[count].append(self.now() - start)
        return {"check_cost": statistics.median(seconds[job.check_tokens]) / statistics.median(seconds[1])}

    def run(self, n: int, **options) -> list[float]:
        from llamabook import fast

        times, lengths = [self.now()], [0] * self.job.batch_size

        def note(row: int, token: int) -> None:
            lengths[row] += 1
            if min(lengths) == len(times):  # now each row has one more
                times.append(self.now())

        fast.generate(self.model, self.prompt.tolist(), n, compile=self.compiled, on_token=note, **options)
        return times


class Speculative(Static):
    """The engine with a draft. What the draft takes to read the prompts is among the steps."""

    def make(self):
        from llamabook import fast

        self.draft = fast.load_draft(self.job.draft_checkpoint_path, self.config["dtype"], self.device)
        return super().make()

    def start(self) -> dict:
        found = super().start()
        self.run(self.job.max_new_tokens)  # how many tokens pay is learned before anything is timed
        return found

    def run(self, n: int, **options) -> list[float]:
        from llamabook import fast

        self.done = fast.Statistics()
        return super().run(n, draft=self.draft, speculate_k=self.job.speculate_k, statistics=self.done, **options)

    def round(self) -> dict:
        """As without a draft, and what speculation did: passes of each model, and all that they read and wrote, by step."""
        found, job, done = super().round(), self.job, self.done
        passes = ((done.target_passes, done.target_bytes, self.model.cfg), (done.draft_passes, done.draft_bytes, self.draft.cfg))
        moved = sum(number * bytes_per_step("static", job, cfg, weights) for number, weights, cfg in passes)
        return found | {
            "step_bytes": moved / (job.max_new_tokens - 1),
            "drafts": sorted(done.drafts.items()),
            **({"acceptance": done.acceptance, "mean_accepted": done.mean_accepted} if done.reached else {}),
        }


KINDS = {"regular": Plain, "fast": Fast, "kv_cache": Cached, "static": Static, "speculative": Speculative}


def fill(model):
    """Random weights in memory of their own, in large pages, at the speed of copying: a million numbers, over and over."""
    import torch

    from llamabook.fast import kernels

    numbers = torch.empty(1_000_003).normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        parameter.data = repeat(numbers.to(parameter), kernels.large_pages(torch.empty_like(parameter)))
    words = torch.randint(-(2**31), 2**31, (1_000_003,), generator=torch.Generator().manual_seed(1)).int()
    for module in model.modules():
        if hasattr(module, "set_quantized"):
            module.set_quantized(random_codes(module, words))
    return model


def repeat(pattern, into):
    """`into`, filled with `pattern` over and over."""
    flat = into.view(-1)
    whole = len(flat) // len(pattern) * len(pattern)
    flat[:whole].view(-1, len(pattern)).copy_(pattern.expand(whole // len(pattern), -1))
    flat[whole:].copy_(pattern[: len(flat) - whole])
    return into


def random_codes(linear, words):
    """A quantized matrix for `linear`, of these words over and over, with numbers as large as those of `fill`."""
    import torch

    from llamabook.fast.quantize import Quantized

    N, K, scheme = linear.out_features, linear.in_features, linear.scheme
    groupsize = scheme.groupsize or K
    codes = repeat(words, torch.empty(N, -(-K * scheme.bits // 32), dtype=torch.int32))
    scales = torch.full((N, -(-K // groupsize)), 0.02 / (2**scheme.bits / 12**0.5), dtype=torch.bfloat16)
    return Quantized(codes, scales, None, scheme.bits, groupsize, K)


# ---- the process and the machine


class Memory:
    """The most memory that this process held since `begin`, above what it held then.

    On a CPU its own pages (RssAnon), looked at every few milliseconds: files that are mapped do not count. On a GPU
    what torch has allocated there.
    """

    def __init__(self):
        self.base = self.peak = 0
        self.device, self.done = None, threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *error) -> None:
        self.done.set()

    def begin(self, device) -> None:
        self.device, self.base = device, anonymous_bytes()
        self.watcher.start()

    def watch(self) -> None:
        while not self.done.wait(0.005):
            self.peak = max(self.peak, anonymous_bytes())

    def peak_gb(self) -> float:
        import torch

        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return max(0, self.peak - self.base) / 1e9


def anonymous_bytes() -> int:
    """The pages of this process that no file stands behind; elsewhere than on Linux, the most it ever held."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions(device) -> dict:
    """What was measured, by version."""
    import platform

    import torch

    import llamabook
    from llamabook.fast import kernels

    found = {"llamabook": llamabook.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cpu":
        found["kernels"] = "C++" if kernels.ready() else "none"
    if device.type == "cuda":
        found["cuda"] = torch.version.hip or torch.version.cuda
    return found


def machine(device) -> dict:
    """Where it was measured."""
    import platform

    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    found = {
        "cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(), "system": platform.system(),
    }  # fmt: skip
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


if __name__ == "__main__":
    main()
