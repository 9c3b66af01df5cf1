"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def mnist_folder() -> Path:
    """The real MNIST: from DISTCONV_DATA_DIR, or shared/data/mnist beside the checkout."""
    for folder in (os.environ.get("DISTCONV_DATA_DIR"), HERE.parent.parent / "shared/data/mnist"):
        if folder and Path(folder).is_dir():
            return Path(folder)
    pytest.skip("the real MNIST is not at hand: set DISTCONV_DATA_DIR to a folder with its four files")
