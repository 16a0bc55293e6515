"""Kernels' machine code, no GPU needed, and what it shows of their cost.

Triton kernels are compiled ahead of time as GPUs get them, so not where TRITON_INTERPRET is set: tests ask for
`figures`, which runs this file in a process of its own. Those in CUDA C++ are in the module that the install compiled:
`built`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from perceiver_kernels.backends.triton import runtime

TESTS = Path(__file__).parent


OLDEST_TRITON = (3, 6)


def _missing_triton() -> str | None:
    """Why there is no machine code of Triton's to judge; test_extra.py says when it should be installed and is not."""
    if runtime.unavailable():
        return "Triton is not installed"
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TRITON:
        return f"the limits are of Triton 3.6 and later, this is {version}, whose code is another"
    return None


needs_triton = pytest.mark.skipif(bool(_missing_triton()), reason=_missing_triton() or "")


@dataclass(frozen=True)
class Build:
    """A kernel and what it is compiled for.

    Attributes:
        kernel: "module:function", the module under perceiver_kernels.backends.triton.
        signature: argument -> Triton's type ("*fp32", "i32", "fp32" ...), constexpr arguments left out.
        constants: the constexpr arguments.
        arch: 80 or 90.
        warps, stages: as at launch.
        aligned: arguments that are divisible by 16, as pointers of torch and common sizes are.
    """

    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    arch: int = 90
    warps: int = 4
    stages: int = 2
    aligned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figures:
    """What machine code shows.

    Attributes:
        registers, shared: per thread; bytes per program.
        spills: local loads and stores in the code.
        loop: machine instructions in the busiest loop: the innermost one with the most exponentials, or where there are
            none with the most instructions.
        exponentials: MUFU.EX2 in that loop; one stands for a pair.
        shuffles: SHFL in that loop.
        tensor_core: HMMA, HGMMA and the like in the whole code.
        operations: how often each operation occurs in the whole code.
        shortest: instructions of the shortest way round the smallest loop that has the most exponentials, and how many
            it meets: what pairs cost where nothing rare happens. A loop within counts once, or where it may be skipped
            not at all.
    """

    registers: int
    shared: int
    spills: int
    loop: int
    exponentials: int
    shuffles: int
    tensor_core: int
    operations: dict[str, int]
    shortest: tuple[int, int]

    @property
    def per_pair(self) -> float:
        return self.loop / self.exponentials

    @property
    def per_pair_at_best(self) -> float:
        return self.shortest[0] / self.shortest[1]


def figures(build: Build) -> Figures:
    """Compiles in a process without the interpreter; once per build."""
    return _figures(json.dumps(asdict(build), sort_keys=True))


@functools.cache
def _figures(request: str) -> Figures:
    compiler = _compiler()
    assert compiler.stdin and compiler.stdout
    print(request, file=compiler.stdin, flush=True)
    answer = compiler.stdout.readline()
    if not answer:
        _compiler.cache_clear()
    assert answer, f"the compiling process ended with {compiler.wait()}"
    result = json.loads(answer)
    assert "error" not in result, result["error"]
    return Figures(**result)


@functools.cache
def _compiler() -> subprocess.Popen[str]:
    """This file as a process that answers each line, a build, with one, its figures; it ends with ours."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, env=environment, text=True)


def cuda_module() -> Path | None:
    """The file of the compiled perceiver_kernels._cuda, where the install had nvcc."""
    spec = importlib.util.find_spec("perceiver_kernels")
    assert spec is not None and spec.origin is not None
    return next(Path(spec.origin).parent.glob("_cuda.*.so"), None)


def built(kernel: str, arch: str, arguments: str = "") -> Figures:
    """Figures of the one kernel in perceiver_kernels._cuda, for sm_<arch>, whose mangled name contains both strings.

    Skips the test where the install had no nvcc or was not built for such GPUs.
    """
    assembly, usage = _code_of(kernel, arch, arguments)
    shared = re.search(r"SHARED:(\d+)", usage)
    assert shared, usage
    return _read_figures(assembly, _registers(usage), int(shared.group(1)))


def built_loops(kernel: str, arch: str, arguments: str = "") -> list[list[str]]:
    """The operations of each innermost loop of that kernel."""
    return innermost_loops(*read(_code_of(kernel, arch, arguments)[0]))


def _code_of(kernel: str, arch: str, arguments: str) -> tuple[str, str]:
    found = {name: code for name, code in _module_code(arch).items() if kernel in name and arguments in name}
    assert len(found) == 1, f"{kernel!r} and {arguments!r} are in {sorted(found)}"
    return found.popitem()[1]


@functools.cache
def _module_code(arch: str) -> dict[str, tuple[str, str]]:
    """Of every kernel in perceiver_kernels._cuda its assembly and its line of resource usage."""
    module = cuda_module()
    if module is None:
        pytest.skip("the CUDA module is not built")
    tools = _tools_of_nvcc()
    if f".sm_{arch}.cubin" not in _said_by(tools / "cuobjdump", "-lelf", module):
        pytest.skip(f"the CUDA module is not built for sm_{arch}")
    code: dict[str, str] = {}
    usage: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        _said_by(tools / "cuobjdump", "-xelf", f"sm_{arch}", module, cwd=folder)
        for cubin in Path(folder).iterdir():
            for section in disassembled(cubin, tools).split("\t.section\t.text.")[1:]:
                name, _, body = section.partition(",")
                code[name] = body.partition("\t.section\t")[0]
            usage |= _resources(cubin, tools)
    return {name: (body, usage[name]) for name, body in code.items()}


def _tools_of_triton() -> Path:
    """The folder with cuobjdump and nvdisasm."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _tools_of_nvcc() -> Path:
    """Those that came with it, else Triton's."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    beside = Path(nvcc or "").resolve().parent
    return beside if all((beside / tool).exists() for tool in ("cuobjdump", "nvdisasm")) else _tools_of_triton()


def _said_by(*command: str | Path, cwd: str | None = None) -> str:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


def disassembled(cubin: Path, tools: Path) -> str:
    return _said_by(tools / "nvdisasm", "-c", cubin)


def _resources(cubin: Path, tools: Path) -> dict[str, str]:
    """By kernel the line of its resource usage."""
    return dict(re.findall(r"Function (\S+):\s+(REG:.*)", _said_by(tools / "cuobjdump", "-res-usage", cubin)))


def _registers(usage: str) -> int:
    return int(usage.removeprefix("REG:").split()[0])


def compiled(build: Build) -> Any:
    """Triton's compiled kernel: asm["cubin"], asm["ttgir"], metadata."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = build.kernel.split(":")
    kernel = getattr(importlib.import_module(f"perceiver_kernels.backends.triton.{module}"), function)
    signature = {name: build.signature.get(name, "constexpr") for name in kernel.arg_names}
    missing = [name for name in kernel.arg_names if name not in build.signature and name not in build.constants]
    assert not missing, f"{build.kernel}: no type for {missing}"
    pointers = [name for name, kind in build.signature.items() if kind.startswith("*")]
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in dict.fromkeys((*pointers, *build.aligned))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=build.constants, attrs=attributes)
    options = {"num_warps": build.warps, "num_stages": build.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", build.arch, 32), options=options)


LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*);")


def read(assembly: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(operation, operands) in order, and where each label stands."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        label = LABEL.match(line)
        if label:
            labels[label.group(1)] = len(instructions)
        found = INSTRUCTION.match(line)
        if found:
            instructions.append((found.group(1), found.group(2)))
    return instructions, labels


def busiest_loop(instructions: list[tuple[str, str]], labels: dict[str, int]) -> list[str]:
    """The operations of the innermost loop with the most exponentials, else with the most instructions."""
    bodies = innermost_loops(instructions, labels)
    return max(bodies, key=lambda body: (count(body, "MUFU.EX2"), len(body)), default=[])


def innermost_loops(instructions: list[tuple[str, str]], labels: dict[str, int]) -> list[list[str]]:
    """The operations of each."""
    loops = []
    for at, (operation, operands) in enumerate(instructions):
        target = re.search(r"(\.L_x_\d+)", operands)
        if operation.startswith("BRA") and target and labels.get(target.group(1), at + 1) <= at:
            loops.append((labels[target.group(1)], at + 1))
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [[operation for operation, _ in instructions[start:end] if operation != "NOP"] for start, end in innermost]


BRANCH = re.compile(r"/\s+(@\S+\s+)?(BRA|CALL)\S*\s+([!~]?\w+, )?`\((\.L_x_\d+)\)")


def shortest_round(assembly: str) -> tuple[int, int]:
    """Figures.shortest; the way leads through the loop's first block with the most exponentials."""
    instructions, labels = read(assembly)
    following: list[list[int]] = []
    for line in filter(INSTRUCTION.match, assembly.splitlines()):
        at, branch = len(following), BRANCH.search(line)
        leaves = branch and branch[2] == "BRA" and not (branch[1] or branch[3])
        following.append([] if leaves else [at + 1])
        following[at] += [labels[branch[4]]] if branch else []
    weights = [int(operation.startswith("MUFU.EX2")) for operation, _ in instructions]
    loops = [(to, at + 1) for at, targets in enumerate(following) for to in targets if to <= at]
    start, end = max(loops, key=lambda loop: (sum(weights[slice(*loop)]), loop[0] - loop[1]), default=(0, 0))
    borders = {start, end, *labels.values(), *(at + 1 for at, targets in enumerate(following) if targets != [at + 1])}
    blocks = list(itertools.pairwise(sorted(at for at in borders if start <= at <= end)))
    busiest = max(blocks, key=lambda block: sum(weights[slice(*block)]), default=(0, 0))[0]

    def way(source: int, target: int) -> list[int]:
        before, queue = {source: source}, [source]
        for at in queue:
            new = [to for to in following[at] if to < len(following) and to not in before]
            before |= dict.fromkeys(new, at)
            queue += new
        back = [target]
        while back[-1] != source:
            back.append(before[back[-1]])
        return back

    if not any(weights[start:end]):
        return 0, 0
    taken = [*way(start, busiest)[1:], *way(busiest, end - 1)]
    return sum(instructions[at][0] != "NOP" for at in taken), sum(weights[at] for at in taken)


def count(operations: list[str], prefix: str) -> int:
    return sum(operation.startswith(prefix) for operation in operations)


def measured(build: Build) -> Figures:
    kernel, tools = compiled(build), _tools_of_triton()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        assembly, usage = disassembled(cubin, tools), _resources(cubin, tools)[kernel.metadata.name]
    return _read_figures(assembly, _registers(usage), kernel.metadata.shared)


def _read_figures(assembly: str, registers: int, shared: int) -> Figures:
    instructions, labels = read(assembly)
    operations = [operation for operation, _ in instructions]
    loop = busiest_loop(instructions, labels)
    return Figures(
        registers=registers,
        shared=shared,
        spills=count(operations, "LDL") + count(operations, "STL"),
        loop=len(loop),
        exponentials=count(loop, "MUFU.EX2"),
        shuffles=count(loop, "SHFL"),
        tensor_core=count(operations, "HMMA") + count(operations, "HGMMA") + count(operations, "IMMA"),
        operations=dict(Counter(operations)),
        shortest=shortest_round(assembly),
    )


def answer_requests() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print is no answer
    for request in sys.stdin:
        try:
            answer = asdict(measured(Build(**json.loads(request))))
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    answer_requests()
