"""What the server starts ends with it, also when nothing of it can run any more."""

import subprocess
import sys

import psutil

PARENT = """
import subprocess, sys, time
from server import link
asleep = [sys.executable, "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(asleep, preexec_fn=link.bound_to_this_process())
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_killed_server_leaves_no_superlink_behind() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
    gone, left = psutil.wait_procs([child], timeout=30)
    assert not left and gone
