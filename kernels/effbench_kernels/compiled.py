"""The C sources as a library: compiled once by the machine's own compiler, found again in a cache.

It lies in ``EFFBENCH_KERNELS_CACHE`` (else ``XDG_CACHE_HOME``, else ``~/.cache``) under a digest of sources, compiler, flags, the
OpenMP library of torch and the processor. Nothing else of the machine is touched.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC")


class Unavailable(RuntimeError):
    """There is no library to be had here; the message says why."""


def library_path() -> Path:
    """The compiled library, made if it is not in the cache. Raises Unavailable."""
    cc, threads = compiler(), _openmp()
    if not cc:
        raise Unavailable("there is no C compiler; install gcc")
    version = subprocess.run([cc, "--version"], capture_output=True, text=True, check=False).stdout
    texts = {path.name: path.read_text() for path in sorted(SOURCES.iterdir())}
    parts = (*texts.items(), version, *FLAGS, threads, platform.machine(), _processor())
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:20]
    cache = Path(os.environ.get("EFFBENCH_KERNELS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"))
    path = cache / "effbench_kernels" / f"experts-{digest}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [cc, *FLAGS, *map(str, sorted(SOURCES.glob("*.c"))), threads, "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
            if done.returncode:
                raise Unavailable(f"{cc} could not compile them: {done.stderr.strip()[:500]}")
            made.replace(path)
    return path


def compiler() -> str:
    """The path of the C compiler: the one that CC names, gcc, or clang; "" for none."""
    return next((path for name in (os.environ.get("CC"), "gcc", "clang") if name and (path := shutil.which(name))), "")


def _openmp() -> str:
    """The OpenMP library that torch has loaded: a second one would bring threads of its own. Raises Unavailable."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    found = sorted({line.split()[-1] for line in lines if any(name in line for name in ("libgomp", "libiomp5", "libomp"))})
    if not found:
        raise Unavailable("torch has loaded no OpenMP library whose threads could be shared")
    return found[0]


def _processor() -> str:
    """What the processor can do, since the library is built for it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
