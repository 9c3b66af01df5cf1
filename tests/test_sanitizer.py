"""Training under compute-sanitizer: `python -m pytest -m sanitizer`. Apart from `-m gpu`, as a run takes minutes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distconv.kernels.gpu import device as cuda
from tests import jobs


@pytest.mark.sanitizer
@pytest.mark.timeout(300)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("model", ["deepconvnet", "tests.test_gpu_networks:small_googlenet"])  # all kernels of layers
def test_the_sanitizer_finds_nothing(model: str, tool: str, tmp_path: Path) -> None:
    try:
        cuda.visible()
    except RuntimeError as error:
        pytest.skip(str(error))
    if not (sanitizer := shutil.which("compute-sanitizer")):
        pytest.skip("compute-sanitizer is not on PATH")
    command = ["-m", "distconv.train", "--device", "cuda", "--data", "digits", "--epochs", "1", "--limit-train", "250"]
    command += ["--model", model, "--out", str(tmp_path / "out")]
    result = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, *command],
        cwd=jobs.ROOT, env=jobs.ENVIRONMENT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
