"""A rank that asks for long time slices gets them, with its threads, and keeps its priority."""

from __future__ import annotations

import subprocess
import sys

import pytest

from distconv.process.time_slices import TIME_SLICE

ASK = """
import ctypes, os, threading
os.nice({nice})
from distconv.process.time_slices import GET, Attributes, take_long_time_slices
def show():
    found = Attributes()
    ctypes.CDLL(None).syscall(GET, 0, ctypes.byref(found), ctypes.sizeof(found), 0)
    print(found.policy, found.flags, found.nice, found.priority, found.runtime)
show()
print(take_long_time_slices())
show()
thread = threading.Thread(target=show)
thread.start()
thread.join()
"""


@pytest.mark.parametrize("nice", [0, 5])
def test_long_time_slices_leave_everything_else_as_it_is(nice: int) -> None:
    out = subprocess.run([sys.executable, "-c", ASK.format(nice=nice)], capture_output=True, text=True, check=True)
    before, has_them, *after = out.stdout.splitlines()
    expected = " ".join([*before.split()[:-1], str(TIME_SLICE)])
    assert after == ([expected, expected] if has_them == "True" else [before, before])
