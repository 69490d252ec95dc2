"""How the process gets memory: in a process of its own, because it is for good."""

import subprocess
import sys

COUNT_HEAPS = """
import ctypes, sys, tempfile, threading
from server.memory import share_one_heap
if sys.argv[1] == "shared":
    share_one_heap()
libc = ctypes.CDLL(None)
together = threading.Barrier(4)
def allocate():
    together.wait()
    libc.free(ctypes.c_void_p(libc.malloc(5000)))
    together.wait()
libc.malloc.restype = ctypes.c_void_p
threads = [threading.Thread(target=allocate) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
libc.fopen.restype = ctypes.c_void_p
with tempfile.NamedTemporaryFile() as file:
    stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    print(file.read().count(b"<heap nr="))
"""


def heaps(how, **environment):
    done = subprocess.run(
        [sys.executable, "-c", COUNT_HEAPS, how], env=environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_threads_share_one_heap_unless_the_variable_says_otherwise():
    assert heaps("own") > 1
    assert heaps("shared") == 1
    assert heaps("shared", MALLOC_ARENA_MAX="8") > 1
