"""Builds kernels.cpp on first use and keeps what it built; written by hand.

The library is made for this CPU and this torch, so its folder's name is a hash of both, of the flags and of the
source: after a change of any of them it is built anew, and two machines that share a home do not mix. It needs a C++
compiler and nothing else: no ninja, and no Python headers. It takes a few seconds.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from llamabook.errors import LlamaBookError

SOURCE = Path(__file__).with_name("kernels.cpp")
STABLE_SINCE = "0x020b000000000000"  # the oldest torch whose stable interface the source uses: 2.11


class NoKernels(LlamaBookError):
    """The kernels can't be built or loaded here; the message is one line that says why."""


def build(source: Path) -> Path:
    """The path of the library built from `source`, now or earlier. Raises NoKernels where that can't be done."""
    library = cache_folder() / name_of(source)
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        if not library.exists():
            with locked(library.with_suffix(".lock")):
                if not library.exists():  # another process may have built it while we waited
                    compile_(source, library)
    except OSError as error:
        raise NoKernels(f"{error.filename or library} can't be written ({error.strerror})") from error
    return library


def cache_folder() -> Path:
    """Where libraries are kept: LLAMABOOK_CACHE, or `llamabook` in the user's cache folder."""
    if "LLAMABOOK_CACHE" in os.environ:
        return Path(os.environ["LLAMABOOK_CACHE"]).expanduser() / "kernels"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "llamabook" / "kernels"


def name_of(source: Path) -> str:
    """A file name that is the same only for the same source, flags, torch and CPU."""
    parts = (source.read_text(encoding="utf-8"), *flags(), os.environ.get("CXX", ""), torch.__version__, cpu())
    return f"{source.stem}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"


def cpu() -> str:
    """What this CPU can do, in words that differ where compiled code may."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.lower().startswith(("flags", "features", "model name"))}))


def flags() -> list[str]:
    """How the compiler is called, but for the files. The sums' order is in the source: no -ffast-math."""
    home = Path(torch.__file__).parent
    tune = "-mcpu=native" if platform.machine().lower() in ("arm64", "aarch64") else "-march=native"
    links = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    return [
        "-std=c++20", "-O3", tune, "-ffp-contract=fast", "-fPIC", "-shared", "-w", f"-DTORCH_TARGET_VERSION={STABLE_SINCE}",
        f"-I{home / 'include'}", f"-L{home / 'lib'}", "-ltorch_cpu", *links,
    ]  # fmt: skip


def compiler() -> str:
    """The C++ compiler: CXX, or the first of the usual names. Raises NoKernels where there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None or sys.platform == "win32":
        raise NoKernels("there is no C++ compiler that they know (GCC or Clang)")
    return found


def compile_(source: Path, library: Path) -> None:
    """Compile `source` into `library`, which gets its name when it is whole; one line of progress on a terminal."""
    program, start = compiler(), time.perf_counter()
    temporary = library.with_suffix(f".{os.getpid()}.tmp")
    say("Building the CPU kernels, once: ", end="")
    try:
        done = subprocess.run(
            [program, str(source), *flags(), "-o", str(temporary)], capture_output=True, text=True, errors="replace"
        )
        if done.returncode or not temporary.exists():
            say("failed.")
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
            raise NoKernels(f"{Path(program).name} failed: {(lines or ['without a word'])[0].strip()}")
        temporary.replace(library)
        say(f"{time.perf_counter() - start:.0f} s.")
    finally:
        temporary.unlink(missing_ok=True)


def say(text: str, end: str = "\n") -> None:
    """Say how the work goes, to someone who watches."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(text, end=end, file=sys.stderr, flush=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock ends with its process. Where there are no such locks, the last one wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield
