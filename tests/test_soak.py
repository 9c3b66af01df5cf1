"""A supervised run comes to its end over kills at any moment, as if nothing had happened. The long form is soak.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak import soak


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    killed = soak(kills=10, seed=0, folder=tmp_path)
    assert sum(killed.values()) == 10
