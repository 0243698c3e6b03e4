"""A wheel built from `pkg/` holds the package and its models, nothing else, and speaks far from the repository."""

import email
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFTOVERS = shutil.ignore_patterns("build", "dist", "*.egg-info")  # an old build would leak into the wheel


def call(*words, **options) -> str:
    """Run a program and give back its stdout; a failure shows all it said."""
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, encoding="utf-8", **options)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this working tree, built beside it."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "pkg", folder / "pkg", ignore=LEFTOVERS)
    here = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []  # then no network is needed
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *here, "-w", folder, folder / "pkg")
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def metadata(wheel) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    package = ROOT / "pkg" / "llamabook"
    expected = {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in path.relative_to(package).parts)
    }
    assert {"llamabook/llama2.py", "llamabook/cli/app.py", "llamabook/tokenizer/llama2.py"} <= expected
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert inside == expected


def test_the_wheel_brings_the_embedded_models(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
    for model, weights, params in (
        ("pocket-llama2", "consolidated.00.pth", "params.json"),
        ("pocket-gpt", "model.pth", "config.json"),
    ):
        for file in (weights, params, "tokenizer.model", "training_log.json"):
            assert sum(name.endswith(f"/{model}/{file}") for name in inside) == 1, f"{model}/{file}"


def test_the_metadata_names_what_a_user_needs(metadata, wheel):
    import llamabook

    assert metadata["Name"] == "llamabook"
    assert metadata["Version"] == llamabook.__version__
    needs = {line.split(";")[0].split("<")[0].split(">")[0].split("=")[0].split("~")[0].strip()
             for line in metadata.get_all("Requires-Dist") or () if "extra ==" not in line}  # fmt: skip
    assert {"torch", "sentencepiece"} <= needs
    assert not needs & {"pytest", "jupyterlab", "nbval", "transformers", "matplotlib", "hypothesis"}
    with zipfile.ZipFile(wheel) as archive:
        (points,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        assert "llamabook = llamabook.cli:main" in archive.read(points).decode()


def test_the_installed_wheel_speaks_outside_the_clone(wheel, tmp_path):
    """torch and the other needs come from this environment; the package must come from the wheel."""
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    call(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel)
    options = {"cwd": elsewhere, "env": os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}}
    where = call(sys.executable, "-c", "import llamabook; print(llamabook.__file__)", **options)
    assert Path(where.strip()).resolve().is_relative_to(target.resolve())
    text = call(sys.executable, "-m", "llamabook", "generate", "--max_new_tokens", 20, **options)
    assert text.startswith("One sunny morning,") and len(text.split()) > 8
    assert not any(elsewhere.iterdir())


@pytest.mark.long
def test_an_empty_environment_speaks(wheel, tmp_path):
    """Installs torch and all other needs into a new environment, as a user does; this takes minutes and a network."""
    venv.create(tmp_path / "env", with_pip=True)
    programs = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    options = {"cwd": tmp_path, "env": environment}
    torch = f"torch=={importlib.metadata.version('torch')}"  # 2.13.0+cpu, say: the build that is in use here
    index = ["--extra-index-url", "https://download.pytorch.org/whl/cpu", "--retries", "1"]
    call(programs / "python", "-m", "pip", "install", "-q", torch, *index, **options)
    call(programs / "python", "-m", "pip", "install", "-q", wheel, **options)
    assert call(programs / "llamabook", "--version", **options).startswith("llamabook ")
    for command in ([programs / "llamabook"], [programs / "python", "-m", "llamabook"]):
        text = call(*command, "generate", "--max_new_tokens", 20, **options)
        assert text.startswith("One sunny morning,") and len(text.split()) > 8
