"""Builds perceiver_kernels._cpu without torch: each kernel file once per instruction set, by ninja, into one module."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CPU = ROOT / "csrc" / "cpu"

KERNELS = [
    "latent_attention",
    "linear",
    "separable_attention",
    "separable_attention_tokens",
    "separable_layer_norm",
    "fourier_encode",
    "exp_rate",
]
PLAIN = [ROOT / "csrc" / "bindings.cpp", CPU / "levels.cpp", CPU / "parallel.cpp"]

# level -> (bytes per vector, compiler flags); levels.cpp lists the same names.
LEVELS: dict[str, tuple[int, list[str]]] = {"generic": (16, [])}
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS["avx2"] = (32, ["-mavx2", "-mfma", "-mf16c"])
    LEVELS["avx512"] = (
        64,
        ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
    )

FLAGS = [
    "-std=c++17",
    "-O2",
    "-fvect-cost-model=dynamic",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wno-psabi",
]


class BuildWithNinja(build_ext):
    """Writes one ninja file and runs it: objects build in parallel and only when their sources changed."""

    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(target))
        subprocess.run([ninja_command(), "-C", str(build)], check=True)


def ninja_command() -> str:
    try:
        import ninja
    except ImportError:
        return "ninja"
    return str(Path(ninja.BIN_DIR) / "ninja")


def escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(target: Path) -> str:
    includes = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    libraries = [] if sys.platform == "darwin" else ["-ldl", "-pthread"]
    lines = [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        f"flags = {shlex.join(FLAGS + includes)} {os.environ.get('CXXFLAGS', '')}",
        "rule compile",
        "  command = $cxx -MD -MF $out.d $flags $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = $cxx {shlex.join(shared)} $in -o $out {shlex.join(libraries)}",
        "  description = link $out",
    ]
    objects = []
    for source in PLAIN:
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {escaped(source.resolve())}")
    for level, (vector_bytes, level_flags) in LEVELS.items():
        for kernel in KERNELS:
            objects.append(f"{kernel}.{level}.o")
            lines += [
                f"build {objects[-1]}: compile {escaped((CPU / kernel).resolve())}.cpp",
                f"  extra = -DPK_LEVEL={level} -DPK_VECTOR_BYTES={vector_bytes} {shlex.join(level_flags)}",
            ]
    lines += [f"build {escaped(target)}: link {' '.join(objects)}", f"default {escaped(target)}", ""]
    return "\n".join(lines)


setup(
    ext_modules=[Extension("perceiver_kernels._cpu", sources=[])],
    cmdclass={"build_ext": BuildWithNinja},
)
