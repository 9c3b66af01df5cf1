"""The CUDA sources by NVIDIA's own compiler, which needs no GPU: they compile, and fit the GPUs they are for."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from distconv.kernels.gpu.arithmetic import CAPABILITY
from distconv.kernels.gpu.convolution import PASSES, PRECISIONS, Convolution
from distconv.kernels.gpu.launcher import THREADS, source
from tests.emulator import signatures

GPUS = (CAPABILITY, 90)
SHARED_BYTES, REGISTERS = 48 * 1024, 64 * 1024  # what a block of threads can have of each on all of them
SPILLED = 32  # bytes a thread: eight numbers that wait for the next tile; what a loop works with must not lie in memory
OPTIONS = ("-std=c++17", "-ftz=true")  # as CuPy

LAYERS = (  # of deepconvnet
    Convolution(28, 28, 1, 16, 3, 1, 1, relu=True),
    Convolution(28, 28, 16, 16, 3, 1, 1, relu=True, pooled=True),
    Convolution(14, 14, 16, 32, 3, 1, 1, relu=True),
    Convolution(14, 14, 32, 32, 3, 1, 2, relu=True, pooled=True),
    Convolution(8, 8, 32, 64, 3, 1, 1, relu=True),
    Convolution(8, 8, 64, 64, 3, 1, 1, relu=True, pooled=True),
    Convolution(1, 1, 1024, 50, 1, 1, 0, relu=True),
    Convolution(1, 1, 50, 10, 1, 1, 0, relu=False),
)
KINDS = [(gpu, precision) for gpu in GPUS for precision in PRECISIONS]


USAGE = re.compile(
    r"Function properties for (?P<name>\w+)\n.*?(?P<spilled>\d+) bytes spill stores.*?\n"
    r".*?Used (?P<registers>\d+) registers, used \d+ barriers(?:, (?P<shared>\d+) bytes smem)?"
)


@dataclass(frozen=True)
class Compiler:
    """capabilities: of the GPUs that it compiles for. compiled(source, options, folder) -> the program, the report."""

    capabilities: Sequence[int]
    compiled: Callable[[str, Sequence[str], Path], tuple[bytes, str]]


def nvrtc(path: str) -> Compiler:
    """The compiler that CuPy calls, a library."""
    library = ctypes.CDLL(path)

    def text(program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        library[f"nvrtcGet{what}Size"](program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        library[f"nvrtcGet{what}"](program, content)
        return content.raw

    def compiled(code: str, options: Sequence[str], folder: Path) -> tuple[bytes, str]:
        program, options = ctypes.c_void_p(), [*options, "--ptxas-options=--verbose"]
        library.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"kernels.cu", 0, None, None)
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = library.nvrtcCompileProgram(program, len(options), array)
        report = text(program, "ProgramLog").decode()
        assert not failed, report
        content = text(program, "CUBIN")
        library.nvrtcDestroyProgram(ctypes.byref(program))
        return content, report

    count = ctypes.c_int()
    library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    capabilities = (ctypes.c_int * count.value)()
    library.nvrtcGetSupportedArchs(capabilities)
    return Compiler(tuple(capabilities), compiled)


def nvcc() -> Compiler:
    """The same compiler as a command."""

    def compiled(code: str, options: Sequence[str], folder: Path) -> tuple[bytes, str]:
        (folder / "kernels.cu").write_text(code)
        command = ["nvcc", "-cubin", "--resource-usage", *options, "kernels.cu", "-o", "kernels.cubin"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return (folder / "kernels.cubin").read_bytes(), done.stderr

    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return Compiler([int(capability) for capability in re.findall(r"compute_(\d+)$", known, re.MULTILINE)], compiled)


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations or () if packages else ():
        for path in Path(folder).glob("*/lib/libnvrtc.so.*"):
            return nvrtc(str(path))
    if shutil.which("nvcc"):
        return nvcc()
    if path := ctypes.util.find_library("nvrtc"):
        return nvrtc(path)
    pytest.skip("CUDA's compiler is not at hand, neither nvcc nor the NVRTC of pip install 'distconv[cuda13]'")


def assert_fits(
    compiler: Compiler, gpu: int, file: str, folder: Path, macros: tuple[tuple[str, int], ...] = (), threads: int = 0
) -> None:
    """Compile a file for a GPU; its kernels must be there and find room. threads: of a block of `product`."""
    options = [*OPTIONS, f"-arch=sm_{gpu}", *(f"-D{name}={value}" for name, value in macros)]
    program, report = compiler.compiled(source(file), options, folder)
    kernels = set(signatures(source(file)))
    usage = list(USAGE.finditer(report))
    assert {kernel["name"] for kernel in usage} == kernels, report
    for kernel in usage:
        name, registers = kernel["name"], -(-int(kernel["registers"]) // 8) * 8  # handed out by eights
        assert f".text.{name}\0".encode() in program
        assert int(kernel["shared"] or 0) <= SHARED_BYTES, f"{name} takes {kernel['shared']} bytes of shared memory"
        assert registers * (threads if name == "product" else THREADS) <= REGISTERS, f"{name}: {registers} registers"
        assert int(kernel["spilled"]) <= SPILLED, f"{name} has too few registers: {kernel['spilled']} bytes in memory"


def test_the_layers_are_those_of_deepconvnet() -> None:
    assert sum((layer.K**2 * layer.C + 1) * layer.F for layer in LAYERS) == 123_552


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("file", ["layers", "normalization", "updates", "wire"])
def test_files(compiler: Compiler, file: str, gpu: int, tmp_path: Path) -> None:
    assert_fits(compiler, gpu, file, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize(("gpu", "precision"), KINDS)
def test_convolution(compiler: Compiler, gpu: int, precision: str, which: str, tmp_path: Path) -> None:
    """Every pass for every GPU and precision, and every pass of every layer, but not all of that times the other."""
    number = KINDS.index((gpu, precision)) + 3 * PASSES[which]
    layer = LAYERS[number % len(LAYERS)]
    aligned = number % 2 == 0
    plans = [layer.plan(which, 100, precision, aligned), layer._indirect(which, 100, precision, aligned)]
    for plan in plans:
        assert_fits(compiler, gpu, plan.file, tmp_path, plan.defines, plan.threads)


def test_deepconvnet_is_for_the_direct_kernels() -> None:
    """The six convolutions; with one channel, no gradient of the images is asked for."""
    for layer in LAYERS[:6]:
        files = {which: layer.plan(which, 100, "tf32", aligned=True).file for which in PASSES}
        assert files == {"forward": "direct", "input": "direct", "filters": "direct_filters"}
