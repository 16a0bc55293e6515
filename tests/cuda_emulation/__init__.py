"""Kernels of csrc/cuda on the host: g++ compiles the very sources against headers that emulate a GPU's blocks.

`install` makes the result the module perceiver_kernels._cuda of this process, where there is no GPU; the backend "cuda"
then takes tensors of the CPU, for whoever asks for it by name.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CUDA = ROOT / "csrc" / "cuda"
ARCH = "PERCEIVER_KERNELS_EMULATED_ARCH"  # 800 or 900
SANITIZE = "PERCEIVER_KERNELS_EMULATED_SANITIZE"  # 1: with the address and the undefined-behaviour sanitizer

FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-Wall",
]
# Unoptimised: most of the time is the compiler's.
SANITIZERS = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


# Why the module that the environment asks for is not installed although there is a compiler.
failure = ""


def compiler() -> list[str]:
    """The words that call it, none where there is none."""
    words = shlex.split(os.environ.get("CXX") or "g++")
    return words if shutil.which(words[0]) else []


def sanitizer_libraries() -> list[str]:
    """The sanitizers' shared libraries, which a process must load first; none where the compiler has none."""
    found = []
    for name in ("libasan.so", "libubsan.so"):
        command = [*compiler(), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        found += [path] if Path(path).is_absolute() else []
    return found if len(found) == 2 else []


def sanitizer_environment() -> dict[str, str]:
    """What a process that loads a sanitized library needs; Python itself leaks."""
    return {
        "LD_PRELOAD": ":".join(sanitizer_libraries()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        SANITIZE: "1",
    }


def build(arch: int = 900, sanitize: bool = False) -> Path:
    """The module, built where a source is newer than it."""
    import fcntl

    import pybind11

    command = shlex.join(compiler())
    folder = ROOT / "build" / f"cuda_emulation-{arch}{'-sanitized' if sanitize else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{HERE}", f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
    flags = [*FLAGS, *includes, f"-DEMULATED_ARCH={arch}", *(SANITIZERS if sanitize else [])]
    sources = [*sorted(CUDA.glob("*.cu")), CUDA / "bindings.cpp", HERE / "emulation.cpp"]
    lines = [
        f"flags = {shlex.join(flags)}",
        "rule compile",
        f"  command = {command} -x c++ -MD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {command} -shared $flags $in -o $out",
        *(f"build {source.stem}.o: compile {_escaped(source)}" for source in sources),
        f"build {_escaped(target)}: link {' '.join(f'{source.stem}.o' for source in sources)}",
        "",
    ]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines))
        done = subprocess.run([_ninja(), "-C", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the emulated CUDA module does not compile:\n{done.stdout[-8000:]}{done.stderr[-2000:]}")
    return target


def _escaped(path: Path) -> str:
    return str(path.resolve()).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja() -> str:
    try:
        import ninja
    except ImportError:
        return "ninja"
    return str(Path(ninja.BIN_DIR) / "ninja")


def install() -> None:
    """Builds the module that the environment asks for and loads it as perceiver_kernels._cuda, or says in `failure`
    why not: then there are no tests of the backend but one, which fails."""
    global failure
    try:
        path = build(int(os.environ.get(ARCH, "900")), os.environ.get(SANITIZE) == "1")
    except (ImportError, OSError, RuntimeError) as error:
        failure = str(error)
        return
    spec = importlib.util.spec_from_file_location("perceiver_kernels._cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["perceiver_kernels._cuda"] = module


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Within, blocks and threads run in another order than that of their numbers, 0. On a GPU no two runs are alike."""
    module = sys.modules.get("perceiver_kernels._cuda")
    if module is None or not module.emulated:
        yield
        return
    library = ctypes.CDLL(module.__file__)
    library.emulation_shuffle(ctypes.c_uint(seed))
    try:
        yield
    finally:
        library.emulation_shuffle(ctypes.c_uint(0))


def launched() -> tuple[set[str], set[str]]:
    """The kernels that have run in this process, and all that there are; instances of templates count each."""
    library = ctypes.CDLL(sys.modules["perceiver_kernels._cuda"].__file__)
    symbols = subprocess.run(["nm", library._name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"(\w+) [tT] (\S*_kernel\S*|emulation_launched)\n", symbols)
    places = {name: int(place, 16) for place, name in found}
    function = library.emulation_launched
    start = (ctypes.cast(function, ctypes.c_void_p).value or 0) - places.pop("emulation_launched")
    return {name for name, place in places.items() if function(ctypes.c_void_p(start + place))}, set(places)
