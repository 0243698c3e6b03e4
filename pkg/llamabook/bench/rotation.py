"""The processes of a benchmark, and their turns, written by hand."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from llamabook.bench.job import COMPILED, Job, cache_bytes_per_slot, weight_bytes
from llamabook.bench.worker import ANSWER
from llamabook.errors import LlamaBookError

WORKER = (sys.executable, "-m", "llamabook.bench.worker")
OVERHEAD = 0.8e9  # of a process that has imported torch and compiles


class BenchError(LlamaBookError):
    """A process of the benchmark ended before its answer."""


class Process:
    """A mode in its process: it is told what to do in lines, and answers in lines. A context manager that ends it."""

    def __init__(self, name: str, job: Job, command: tuple[str, ...], environment: dict | None = None):
        self.name = name
        self.log: IO = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, encoding="utf-8",
            env=os.environ | (environment or {}),
        )  # fmt: skip
        self.tell(json.dumps({"mode": name, "job": job.as_dict()}))

    def tell(self, line: str) -> None:
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended: `answer` says so

    def answer(self) -> dict:
        """Wait for its next answer. Raises BenchError with the last line it said if it ends instead."""
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line[len(ANSWER) :])
        self.process.wait()
        self.log.seek(0)
        said = [line.strip() for line in self.log.read().splitlines() if line.strip()] or ["it said nothing"]
        raise BenchError(f"{self.name} ended with code {self.process.returncode}: {said[-1][:300]}")

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *error) -> None:
        if error[0] is not None:
            self.process.kill()
        try:
            self.process.stdin.close()  # its loop over stdin ends
        except OSError:
            pass
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


def cold_start(mode: str, job: Job, cache: Path) -> dict:
    """What a mode's first tokens take with nothing compiled before; afterwards `cache` holds what it compiled."""
    with Process(mode, job, WORKER, compile_cache(cache)) as process:
        return process.answer()


def compile_cache(folder: Path) -> dict:
    """The environment in which torch.compile keeps its results in `folder`."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder)}


def waves(modes: list[str], job: Job, config: dict, free: float | None) -> list[list[str]]:
    """The modes in groups that fit into `free` bytes together; all in one group where that is not known."""
    slots = job.prompt_tokens + job.max_new_tokens
    one = 1.15 * (weight_bytes(config) + job.batch_size * slots * cache_bytes_per_slot(config)) + OVERHEAD
    each = len(modes) if free is None else max(1, int(free // one))
    return [modes[i : i + each] for i in range(0, len(modes), each)]


def free_bytes(device: str) -> float | None:
    """The memory that is free on the device, None where nobody says."""
    if device.startswith("cuda"):
        import torch

        return float(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def measure(
    modes: list[str], job: Job, config: dict, rounds: int, cold: bool = True,
    peers: dict[str, tuple[str, ...]] | None = None, say: Callable[[str], None] = lambda text: None,
) -> list[dict]:  # fmt: skip
    """Measure each mode and peer; for each {"mode", "cold", "start", "rounds"}, as the processes answered.

    All of a wave are loaded before its first round. Each round begins one mode further on.
    """
    results = []
    with tempfile.TemporaryDirectory(prefix="llamabook-bench-") as folder:
        caches = {mode: Path(folder) / mode for mode in modes if mode.endswith(COMPILED)}
        colds = {}
        for mode, cache in caches.items() if cold else ():
            say(f"{mode}: compiling for the first time")
            colds[mode] = cold_start(mode, job, cache)
        for wave in waves([*modes, *(peers or ())], job, config, free_bytes(job.device)):
            processes: list[Process] = []
            try:
                for mode in wave:
                    say(f"{mode}: loading")
                    environment = compile_cache(caches[mode]) if cold and mode in caches else None
                    processes.append(Process(mode, job, (peers or {}).get(mode, WORKER), environment))
                    processes[-1].start = processes[-1].answer()
                measured = [
                    {"mode": process.name, "cold": colds.get(process.name), "start": process.start, "rounds": []}
                    for process in processes
                ]
                for number in range(rounds):
                    for turn in range(len(processes)):
                        at = (number + turn) % len(processes)
                        say(f"round {number + 1} of {rounds}: {processes[at].name}")
                        processes[at].tell("round")
                        measured[at]["rounds"].append(processes[at].answer() | {"round": number})
                results += measured
            finally:
                for process in processes:
                    process.__exit__(*sys.exc_info())
    return results
