"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from distconv.kernels.gpu.arithmetic import Gpu
from tests.gpu import DEVICES, new_device

HERE = Path(__file__).parent

hypothesis.settings.register_profile("no clock", deadline=None)  # the first example may compile a kernel
hypothesis.settings.load_profile("no clock")


@pytest.fixture(scope="session")
def mnist_folder() -> Path:
    """The real MNIST: from DISTCONV_DATA_DIR, or shared/data/mnist beside the checkout."""
    for folder in (os.environ.get("DISTCONV_DATA_DIR"), HERE.parent.parent / "shared/data/mnist"):
        if folder and Path(folder).is_dir():
            return Path(folder)
    pytest.skip("the real MNIST is not at hand: set DISTCONV_DATA_DIR to a folder with its four files")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a run may make its folder."""
    return tmp_path / "run"


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Any:
    """An emulated GPU, and a real one."""
    return new_device(request.param)


@pytest.fixture
def gpu(device: Any) -> Gpu:
    return Gpu(device)
