"""A rank that asks for long turns gets them, with its threads, and keeps its priority."""

from __future__ import annotations

import subprocess
import sys

import pytest

from distconv.comm.turns import TURN

ASK = """
import ctypes, os, threading
os.nice({nice})
from distconv.comm.turns import GET, Attributes, take_long_turns
print(take_long_turns())
def show():
    found = Attributes()
    ctypes.CDLL(None).syscall(GET, 0, ctypes.byref(found), ctypes.sizeof(found), 0)
    print(found.policy, found.nice, found.runtime)
show()
thread = threading.Thread(target=show)
thread.start()
thread.join()
"""


@pytest.mark.parametrize("nice", [0, 5])
def test_long_turns_leave_the_priority_as_it_is(nice: int) -> None:
    out = subprocess.run([sys.executable, "-c", ASK.format(nice=nice)], capture_output=True, text=True, check=True)
    asked, *seen = out.stdout.splitlines()
    if asked != "True":
        pytest.skip("this system does not let a process ask")
    old, new = f"0 {nice} 0", f"0 {nice} {TURN}"  # an older Linux takes no notice
    assert seen in ([old, old], [new, new])
