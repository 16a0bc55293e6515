"""Builds the compiled modules without torch, by ninja.

perceiver_kernels._cpu: each kernel file once per instruction set. perceiver_kernels._cuda: each kernel file once, for
all GPUs of CUDA_ARCHS; where there is no nvcc it is left out.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CPU = ROOT / "csrc" / "cpu"
CUDA = ROOT / "csrc" / "cuda"

KERNELS = [
    "absorbed_attention",
    "cross_attention",
    "latent_attention",
    "linear",
    "separable_attention",
    "separable_attention_tokens",
    "separable_layer_norm",
    "separable_query_attention",
    "separable_query_attention_backward",
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

# GPUs that get machine code, as nvcc names them; of the last one also code that newer GPUs compile for themselves.
# PERCEIVER_KERNELS_CUDA_ARCHS="86;89;120" replaces the list.
CUDA_ARCHS = "80;90a;100"
LEAST_ARCH = 80

CUDA_FLAGS = [
    "-std=c++17",
    "-O3",
    "-cudart=static",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
]


class BuildWithNinja(build_ext):
    """Writes one ninja file per module and runs it: objects build in parallel and only when their sources changed."""

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        nvcc = find_nvcc() if name == "_cuda" else None
        if name == "_cuda" and not nvcc:
            self.leave_out(ext)
            return
        build = Path(self.build_temp, name).resolve()
        build.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(cuda_ninja_file(target, nvcc) if nvcc else cpu_ninja_file(target))
        done = subprocess.run([ninja_command(), "-C", str(build)], check=False)
        if done.returncode == 0:
            return
        if name == "_cuda" and not cuda_demanded():
            print("perceiver_kernels: CUDA kernels left out, nvcc failed; PERCEIVER_KERNELS_CUDA=1 insists on them")
            self.leave_out(ext)
            return
        raise SystemExit(f"perceiver_kernels: building {ext.name} failed, see the compiler's message above")

    def leave_out(self, ext: Extension) -> None:
        """No module of an earlier build stays, neither where this one would be nor where installs in place copy it."""
        target = Path(self.get_ext_fullpath(ext.name))
        in_place = ROOT / ext.name.partition(".")[0] / target.name
        for stale in (target, in_place):
            stale.unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        return [output for output in super().get_outputs() if Path(output).exists()]


def cuda_demanded() -> bool:
    return os.environ.get("PERCEIVER_KERNELS_CUDA") == "1"


def find_nvcc() -> str | None:
    """The CUDA compiler, unless PERCEIVER_KERNELS_CUDA=0; without one a line says what follows from that."""
    wanted = os.environ.get("PERCEIVER_KERNELS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"PERCEIVER_KERNELS_CUDA is {wanted!r}, must be 0 (off), 1 (insist) or unset")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    if nvcc is None and wanted == "1":
        raise SystemExit("PERCEIVER_KERNELS_CUDA is 1, but there is no nvcc in CUDA_HOME/bin or on the PATH")
    if nvcc is None:
        print("perceiver_kernels: CUDA kernels left out, there is no nvcc in CUDA_HOME/bin or on the PATH")
    return nvcc


def ninja_command() -> str:
    try:
        import ninja
    except ImportError:
        return "ninja"
    return str(Path(ninja.BIN_DIR) / "ninja")


def escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def host_rule() -> list[str]:
    includes = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
    return [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        f"flags = {shlex.join(FLAGS + includes)} {os.environ.get('CXXFLAGS', '')}",
        "rule compile",
        "  command = $cxx -MD -MF $out.d $flags $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
    ]


def cpu_ninja_file(target: Path) -> str:
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    libraries = [] if sys.platform == "darwin" else ["-ldl", "-pthread"]
    lines = [
        *host_rule(),
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


def cuda_archs() -> list[str]:
    asked = os.environ.get("PERCEIVER_KERNELS_CUDA_ARCHS") or CUDA_ARCHS
    archs = [arch.strip() for arch in asked.replace(",", ";").split(";")]
    if all(re.fullmatch(r"\d{2,3}[af]?", arch) and int(arch.rstrip("af")) >= LEAST_ARCH for arch in archs):
        return archs
    raise SystemExit(
        f"PERCEIVER_KERNELS_CUDA_ARCHS is {asked!r}, must be architectures as nvcc names them, {LEAST_ARCH} or newer, "
        f"with ; between them: {CUDA_ARCHS!r}"
    )


def gencode_flags() -> list[str]:
    archs = cuda_archs()
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = archs[-1].rstrip("af")  # what stands for one GPU only, newer ones could not compile
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def cuda_ninja_file(target: Path, nvcc: str) -> str:
    lines = [
        *host_rule(),
        f"nvcc = {shlex.quote(nvcc)}",
        f"cuda_flags = {shlex.join(CUDA_FLAGS)} {shlex.join(gencode_flags())}",
        "rule compile_cuda",
        "  command = $nvcc -MD -MF $out.d $cuda_flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        "  command = $nvcc -shared $cuda_flags $in -o $out",
        "  description = link $out",
    ]
    objects = ["bindings.o"]
    archs = shlex.quote(f'-DPERCEIVER_KERNELS_CUDA_ARCHS="{";".join(cuda_archs())}"')
    lines += [f"build bindings.o: compile {escaped((CUDA / 'bindings.cpp').resolve())}", f"  extra = {archs}"]
    for source in sorted(CUDA.glob("*.cu")):
        objects.append(f"{source.stem}.cu.o")
        lines.append(f"build {objects[-1]}: compile_cuda {escaped(source.resolve())}")
    lines += [f"build {escaped(target)}: link {' '.join(objects)}", f"default {escaped(target)}", ""]
    return "\n".join(lines)


setup(
    ext_modules=[
        Extension("perceiver_kernels._cpu", sources=[]),
        Extension("perceiver_kernels._cuda", sources=[], optional=True),  # an install in place then does without it
    ],
    cmdclass={"build_ext": BuildWithNinja},
)
