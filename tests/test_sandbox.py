"""The sandbox of tools.py, claim by claim.

    pytest tests/test_sandbox.py           less than a minute
    pytest tests/test_sandbox.py -m slow   the whole hostile corpus, as two users, and the load
    python tests/test_sandbox.py           the corpus alone

Canaries (files, listeners on loopback, a secret in the environment) stand in a temporary folder.
"""
import contextlib
import importlib.util
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

HERE = pathlib.Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

import tools  # noqa: E402
from tools import Observation, PythonTool, SilentTool, ToolCall  # noqa: E402

try:
    import pytest
except ImportError:  # run as a script by an interpreter that has none
    class pytest:  # noqa: N801
        mark = fixture = type("Any", (), {"__getattr__": lambda s, n: lambda *a, **k: lambda f: f,
                                          "__call__": lambda s, *a, **k: lambda f: f})()

CORPUS = HERE.parents[2] / "shared" / "hostile_snippets.jsonl"


@pytest.fixture(scope="module")
def tool():
    with PythonTool(timeout=0.8) as tool:
        yield tool


@pytest.fixture(scope="module")
def quick_tool():
    """For programs that have to be stopped: all at once, after half a second."""
    with PythonTool(timeout=0.3, workers=8, modules=()) as tool:
        yield tool


def run(tool, code, stdin="", **options):
    return tool.run([textwrap.dedent(code)], [stdin], **options)[0]


# --- Text ---------------------------------------------------------------------------------

TEXTS = [
    ("6 * 7", "42"),
    ("x = [2, 1]\nx.sort()", "[no output]"),
    ("", "[no output]"),
    ("from __future__ import annotations\n1 + 1", "2"),
    ("import sys\nprint(1)\nprint(2, file=sys.stderr)\nprint(3)", "1\n2\n3"),
    ("This is it:\n```python\nprint('fenced')\n```\nDone.", "fenced"),
    ("s = '''\n```\nno fence\n```\n'''\nlen(s)", "18"),
    ("object()", "<object object at 0x0>"),
    ("print(__name__)", "__main__"),
    ("class D:\n    def __del__(self): print('gone', f())\ndef f(): return 1\nd = D()", "gone 1"),
    ("import atexit\natexit.register(print, 'bye')\nprint('hi')", "hi\nbye"),
    ("import sys, io\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer)\nprint('kept')", "kept"),
    ("len(str(10 ** 5000))", "5001"),
    ("def f():\n    return 1 / 0\nprint('before')\nf()",
     'before\nTraceback (most recent call last):\n  File "<code>", line 4, in <module>\n    f()\n'
     '  File "<code>", line 2, in f\n    return 1 / 0\nZeroDivisionError: division by zero'),
    ("import statistics\nstatistics.mean([])",
     'Traceback (most recent call last):\n  File "<code>", line 2, in <module>\n'
     "    statistics.mean([])\n"
     "statistics.StatisticsError: mean requires at least one data point"),
    ("import sys\nsys.exit(3)", "[exit status 3]"),
    ("import sys\nsys.exit('no solution')", "no solution"),
]


@pytest.mark.parametrize("code, text", TEXTS)
def test_text_is_what_a_notebook_would_show(tool, code, text):
    shown = run(tool, code).text
    assert re.sub(r"\n *[~^]+$", "", shown, flags=re.M) == text  # 3.11 underlines, 3.10 does not


def test_two_sandboxes_say_the_same(tool):
    codes = ["import random\nrandom.random()", "hash('a')", "{'a', 'b', 'c'}", "1 / 0",
             "import os\nsorted(os.environ), os.getcwd()", "import sys\nsys.argv"]
    if run(tool, "import numpy").outcome == "ok":
        codes += ["import numpy\nnumpy.random.rand()",
                  "import numpy\nnumpy.random.default_rng().random()"]
    with PythonTool(timeout=0.8, modules=("numpy",)) as other:
        assert [o.text for o in tool.run(codes)] == [o.text for o in other.run(codes)]


def test_cut_text_says_how_much_is_gone(tool):
    assert run(tool, "print('a' * 5000 + 'z')").text == (
        "a" * 1000 + "\n[... 3,001 characters left out ...]\n" + "a" * 999 + "z")


def test_raw_text_is_stdout_alone(tool):
    code = "import sys\nprint(input())\nprint('log', file=sys.stderr)\n5"
    assert run(tool, code, "a b\n", raw=True).text == "a b\n"
    assert run(tool, "print('y' * 50_000)", raw=True).text == "y" * 50_000 + "\n"
    assert run(tool, "print(len(open(0).read()))", "x" * 300_000, raw=True).text == "300000\n"


def test_output_survives_what_ends_the_program(quick_tool):
    ends = {"timeout": "while True: pass", "crashed": "import ctypes; ctypes.string_at(0)",
            "memory": "bytearray(10 ** 12)", "error": "1 / 0", "ok": "import os; os._exit(0)",
            "output_truncated": "while True: print('x' * 9999)"}
    observations = quick_tool.run([f"print('kept', end=' ')\n{end}" for end in ends.values()])
    assert [one.outcome for one in observations] == list(ends)
    assert all(one.text.startswith("kept ") for one in observations)


def test_no_text_makes_it_raise(tool):
    texts = ["\ud800", "\0", "print('\ud800')", "\ufeffprint(1)", "(" * 10_000,
             "x = '" + "a" * 10 ** 6, "```", "```python", "\r\n\x0c",
             "import sys\nsys.stdout.buffer.write(bytes(range(256)))", "print('\\ud800')",
             "-" * 100_000 + "1", "[" * 90 + "]" * 90, "print('\\r\\0\\x1b[0m')"]
    for observation in tool.run(texts, ["\ud800\0"] * len(texts)):
        assert observation.outcome != "sandbox_error"
        json.dumps(observation.text).encode() and observation.text.encode()


# --- Outcomes -----------------------------------------------------------------------------

HOSTILE = {
    "ok": ["import builtins\nfor n in ('len', 'print', 'isinstance', 'exec'): delattr(builtins, n)",
           "import os\nfor n in list(vars(os)): delattr(os, n)",
           "import sys\ndel sys.stdout, sys.stderr",
           "import gc, types\nfor o in gc.get_objects():\n"
           "    if isinstance(o, types.FunctionType):\n        o.__code__ = (lambda: 0).__code__",
           "import threading as t\nt.Thread(target=t.Event().wait, daemon=True).start()",
           "import os\nfor fd in range(3, 256):\n"
           "    try: os.write(fd, b'[\"\", \"crashed\", 0]\\n')\n    except OSError: pass",
           "import os\nos.closerange(0, 256)",
           "import socket\na, b = socket.socketpair()\na.send(b'x')",
           "import asyncio\nasyncio.run(asyncio.sleep(0))"],
    "error": ["import os\nos._exit(7)", "raise KeyboardInterrupt", "raise GeneratorExit",
              "import os\nos._exit(201)", "import sys\nsys.exit(192)",
              "class E(Exception):\n    def __str__(self): 1 / 0\nraise E",
              "class R:\n    def __repr__(self): 1 / 0\nR()", "input()", "def f(): f()\nf()",
              "import sys\nsys.modules.clear()\n1 / 0",
              "import builtins\nbuiltins.__import__ = None\nimport math",
              "import sys\nsys.excepthook = sys.exit = None\n1 / 0",
              "import sys\nf = sys._getframe()\nwhile f := f.f_back: f.f_globals.clear()",
              "import os\nos.fork()", "import subprocess\nsubprocess.run(['true'])",
              "import os\nos.execv('/bin/true', ['true'])", "import socket\nsocket.socket()",
              "import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
              "import os\nos.kill(os.getppid(), 0)", "import os\nos.kill(-1, 0)",
              "import os\nos.kill(0, 0)", "import os\nos.sched_setaffinity(os.getppid(), {0})",
              "import os\nos.nice(1)", "import os\nos.memfd_create('x')",
              "import os\nos.mkdir('/tmp/x')",
              "open('/etc/passwd')", "open('/proc/self/maps')", "open('/dev/null', 'w')",
              "import os\nos.listdir('/')", "import os\nos.chmod(1, 0)",
              "import os\nos.utime('/tmp')",
              "import os\nos.setuid(0)", "import os\nos.chroot('/')", "import os\nos.setsid()",
              "import os\nos.pidfd_open(os.getppid())",
              "import os\nos.posix_spawn('/bin/true', [''], {})",
              "import fcntl, os\nfcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
              "import fcntl\nfcntl.ioctl(0, 0x8901, b'1234')",
              "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
              "import mmap\n[mmap.mmap(-1, 10 ** 8) for _ in range(99)]",
              "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)"],
    "timeout": ["import signal as s\ns.pthread_sigmask(s.SIG_BLOCK, range(1, 65))\n"
                "while True: pass",
                "import time\ntime.sleep(99)",
                "import atexit, time\natexit.register(time.sleep, 99)",
                "import os\nos.closerange(0, 99)\nwhile True: pass", "sum(iter(int, 1))",
                "import threading\nthreading.Thread(target=sum, args=[iter(int, 1)]).start()",
                "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"],
    "memory": ["'a' * 10 ** 11", "raise MemoryError", "[0] * 10 ** 10", "1 << 10 ** 11",
               "import os\nos.kill = os.getpid = None\nraise MemoryError"],
    "crashed": ["import os\nos.abort()", "import os, signal\nos.kill(os.getpid(), signal.SIGXCPU)",
                "import faulthandler\nfaulthandler._sigsegv()"],
    "output_truncated": ["import os\nwhile True: os.write(2, b'x' * 99999)"],
}


@pytest.mark.parametrize("outcome", HOSTILE)
def test_hostile_programs_get_their_own_outcome_and_no_other(tool, quick_tool, outcome):
    tool = quick_tool if outcome == "timeout" else tool
    observations = tool.run(HOSTILE[outcome])
    wrong = [c for c, one in zip(HOSTILE[outcome], observations) if one.outcome != outcome]
    assert (wrong, run(tool, "1").text) == ([], "1")


def test_a_library_that_needs_files_of_the_machine_is_said_to_be_not_available(tool):
    there = run(tool, "raise OSError('libpthread.so.0: cannot open shared object file')").text
    assert there.endswith("\n[this library is not available here: it needs files that programs may "
                          "not read]")
    if importlib.util.find_spec("torch"):
        assert run(tool, "import torch").text.endswith(there[-40:])


def test_calls_share_no_state(tool):
    run(tool, "import math, builtins\nmath.sqrt = builtins.len = None\nleft = 1")
    code = "import math\nprint(math.sqrt(9), len('ab'), 'left' in globals())"
    assert run(tool, code).text == "3.0 2 False"


def test_foreign_abi_and_calls_off_the_list_find_no_way_in(tool):
    numbers = "(101, 317, 321, 425, 434, 435, 443, 999, 0x40000000 + 39)"  # the last: x32 getpid
    code = f"import ctypes\nset(ctypes.CDLL(None).syscall(n, 0, 0, 0, 0) for n in {numbers})"
    assert run(tool, code).text == "{-1}"


def test_numbers_of_calls_are_those_of_the_kernel_headers():
    header = pathlib.Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no kernel headers here")
    true = dict(re.findall(r"#define __NR_(\w+) (\d+)", header.read_text()))
    assert {name: int(true[name]) for name in tools.NUMBERS} == tools.NUMBERS


def test_every_guarantee_holds_here():
    assert [*tools.guarantees().values()] == [True] * 7


def test_another_machine_lacks_the_locks(monkeypatch):
    monkeypatch.setattr(tools.platform, "machine", lambda: "aarch64")
    assert tools.missing_locks() == "Linux on x86_64"


def test_where_a_lock_is_missing_it_refuses_unless_told(monkeypatch):
    monkeypatch.setattr(tools, "missing_locks", lambda: "Landlock")
    with PythonTool() as tool, pytest.raises(RuntimeError, match="missing: Landlock.*unsafe=True"):
        tool.run(["1"])
    ends = {"ok": "6 * 7", "error": "1 / 0", "timeout": "import os\nos.fork()\nwhile True: pass",
            "output_truncated": "print('x' * 10 ** 7)", "memory": "bytearray(10 ** 12)",
            "crashed": "import os\nos.abort()"}
    with PythonTool(unsafe=True, timeout=0.3, modules=()) as tool:
        assert [one.outcome for one in tool.run([*ends.values()])] == [*ends]
        assert run(tool, "input()", "typed").text == "'typed'"
        assert not any(descendants(worker.process.pid) for worker in tool._workers)
    assert [name for name, held in tools.guarantees().items() if held] == ["bounded memory"]


def test_a_worker_that_does_not_start_is_named_and_unsafe_is_no_advice(monkeypatch):
    monkeypatch.setattr(tools, "PYTHON", [sys.executable, "-c", "raise SystemExit(3)"])
    with PythonTool() as tool, pytest.raises(RuntimeError, match="ended with status 3") as refused:
        tool.run(["1"])
    assert "unsafe" not in str(refused.value)


# --- Descriptors and answers ----------------------------------------------------------------


@contextlib.contextmanager
def open_files(number):
    """While the body runs, this process has so many files open beside its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, number + 500), hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(number)]
    try:
        yield
    finally:
        [os.close(file) for file in files]
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


OPEN = """
import os, time
def is_open(fd):
    try: return bool(os.fstat(fd))
    except OSError: return False
time.sleep(1)  # so that no worker is idle before the last program begins
[fd for fd in range(4097) if is_open(fd)]
"""


@pytest.mark.parametrize("files, programs", [(1100, 2), (0, 32)])
def test_a_program_holds_stdin_stdout_stderr_and_no_other_descriptor(files, programs):
    with open_files(files), PythonTool(workers=programs, modules=()) as tool:
        assert {one.text for one in tool.run([OPEN] * programs)} == {"[0, 1, 2]"}
        assert len(tool._workers) == programs


MALFORMED = [  # an answer, and the file that comes with it
    *((answer, b"+7") for answer in (
        "5", "null", "no JSON", "[" * 100_000, "[]", '[0, "", 0.1]', '[1, 0, ""]',
        '[1, 0, "", 0.1, 0]', '[1, "0", "", 0.1]', '[1, 0, null, 0.1]', '[1, 0, "forged", 0.1]',
        '[1, 0, ["timeout"], 0.1]', '[1, 0, "", "soon"]', '[0, 0, "", 0.1]')),  # 0: a late answer
    ('[1, 0, "", 0.1]', None), ('[1, 0, "", 0.1]', b""), ('[1, 1, "", 0.1]', b"MemoryError: "),
]


@contextlib.contextmanager
def answering(worker, answer, content):
    """In the body, such an answer is what the trainer receives from this worker."""
    kept = worker.socket
    worker.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    worker.asked = 0
    with worker.socket, theirs, tools.memory_file(content or b"") as file:
        socket.send_fds(theirs, [answer.encode()], [] if content is None else [file.fileno()])
        yield
    worker.socket = kept


def test_a_worker_with_a_malformed_or_late_answer_is_replaced_and_the_call_tried_again(capfd):
    with PythonTool(workers=1, modules=()) as tool:
        assert run(tool, "6 * 7").text == "42"
        worker, = tool._workers
        for answer, content in MALFORMED:
            with answering(worker, answer, content):
                with pytest.raises((OSError, ValueError, RecursionError)):
                    worker.ask(("6 * 7", "", False))
        with answering(worker, *MALFORMED[-1]):
            assert (run(tool, "6 * 7").text, tool.retried) == ("42", 1)
        assert worker.process.returncode and worker not in tool._workers
        worker.close()
    said = "sandbox: no program was begun (MemoryError: ); the call is tried again\n"
    assert capfd.readouterr().err == said


# Every page of memory next to an object of the interpreter. A pipe refuses to take what is not
# mapped, where reading it would be a crash.
SCAN = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.sbrk.restype = ctypes.c_void_p
out, into = os.pipe()
def page(n):
    return os.read(out, 4096) if libc.write(into, ctypes.c_void_p(n << 12), 4096) > 0 else b""
places = [id(thing) for module in list(sys.modules.values()) for thing in vars(module).values()]
read, found = set(), set()
for place in [libc.sbrk(0) - 1, *places]:
    for step in (-1, 1):
        n = (place >> 12) + (step == 1)
        while n not in read and (text := page(n)):
            read.add(n)
            found |= {part for part in ("code", "stdin", "output", "own text")
                      if b"the %s of " % part.encode() + b"a program" in text}
            n += step
print(len(read) > 1000, *sorted(found))
"""


def test_a_program_finds_nothing_of_an_earlier_one_in_its_memory():
    printing = "print('the {} of a program\\n'.format('output') * 40_000)"
    code = "# the code of a program\n" * 1000 + printing
    with PythonTool(workers=1, modules=()) as tool:
        assert run(tool, code, "the stdin of a program\n" * 1000).outcome == "ok"
        assert run(tool, SCAN + "# the own text of a program").text == "True own text"


# --- Threads --------------------------------------------------------------------------------


def test_3000_threads_end_in_an_error_at_once(tool):
    observation = run(tool, """
        import threading
        threading.stack_size(32768)
        for n in range(3000):
            threading.Thread(target=threading.Event().wait, daemon=True).start()
    """)
    assert observation.outcome == "error" and "can't start new thread" in observation.text
    assert observation.seconds < 2


CLONES = """
    import ctypes, mmap, os, threading
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    # long clone(flags, stack); the new thread calls pause for ever
    page.write(bytes.fromhex("b838000000 0f05 85c0 7509 b822000000 0f05 ebf7 c3"))
    start = ctypes.addressof(ctypes.c_char.from_buffer(page))
    clone = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, ctypes.c_long)(start)
    threading.stack_size(1 << 18)
    def bomb():
        ready.wait()
        for _ in range(200): clone(0x50f00, start + 4000)
    ready = threading.Barrier({bombers})
    bombers = [threading.Thread(target=bomb) for _ in range({bombers})]
    [bomber.start() for bomber in bombers]
    [bomber.join() for bomber in bombers]
    print(os.stat("/proc/self/task").st_nlink - 2)
    os._exit(0)
"""


@pytest.mark.parametrize("bombers, most", [(1, 64), (60, 128)])
def test_threads_that_c_code_starts_are_counted_too(bombers, most):
    with PythonTool(workers=1, modules=()) as tool:
        observation = run(tool, CLONES.replace("{bombers}", str(bombers)))
    assert observation.outcome == "ok" and 1 < int(observation.text) <= most


def test_32_threads_at_once_do_their_work_and_a_thousand_in_turn(tool):
    pool = """
        from concurrent.futures import ThreadPoolExecutor
        import threading
        all_there = threading.Barrier(32)
        with ThreadPoolExecutor(32) as pool:
            print(sum(pool.map(lambda n: all_there.wait() * 0 + n, range(64))))
    """
    turns = """
        import threading
        for _ in range(1000):
            one = threading.Thread(target=int)
            one.start()
            one.join()
        print("done")
    """
    assert (run(tool, pool).text, run(tool, turns).text) == ("2016", "done")


# --- Calls ----------------------------------------------------------------------------------


def test_a_malformed_call_is_answered_by_its_fault_and_further_calls_are_named(tool):
    fault = tools.parse_tool_call("<tool_call>x</tool_call>")
    assert tool.submit(fault).result() == Observation(fault.message, "not_json", 0.0)
    note = "\n(Only the first call of this turn ran; 2 did not.)"
    assert tool.submit(ToolCall("6 * 7", ignored=2)).result().text == "42" + note
    assert tool.submit(ToolCall("6 * 7")).result().text == "42"


def test_silence_is_a_chain_of_its_place_alone():
    with SilentTool(0.1, 0.5, modules=()) as tool:
        chains = [[tool.is_silent((0, "train", i, 5, k)) for k in range(4)] for i in range(4000)]
        share = [sum(turn) / 4000 for turn in zip(*chains)]
        assert all(abs(a - b) < 0.02 for a, b in zip(share, (0.1, 0.14, 0.156, 0.1624)))
        after = [chain[k + 1] for chain in chains for k in range(3) if chain[k]]
        assert abs(sum(after) / len(after) - 0.5) < 0.06
        places = [(0, "train", i, 5, 2) for i in range(40)]
        answers = [tool.submit(ToolCall("6 * 7"), place).result() for place in places]
        assert [one.outcome == "timeout" for one in answers] == [chain[2] for chain in chains[:40]]
        assert {one.text for one in answers} == {"42", tools.TIMEOUT_TEXT}
        fault = tools.parse_tool_call("<tool_call>x</tool_call>")
        assert {tool.submit(fault, place).result().outcome for place in places} == {"not_json"}


def test_the_command_line_takes_no_option():
    done = subprocess.run([sys.executable, tools.SELF, "--help"], capture_output=True, text=True)
    assert done.returncode == 1 and "python tools.py" in done.stderr


# --- Faults of the sandbox itself ----------------------------------------------------------


def descendants(root):
    """The processes below root, zombies included."""
    parents = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            stat = pathlib.Path("/proc", entry, "stat").read_text()
            parents[int(entry)] = int(stat.rsplit(")", 1)[1].split()[1])
    found, frontier = [], [root]
    while frontier:
        frontier = [pid for pid, parent in parents.items() if parent in frontier]
        found += frontier
    return found


def test_workers_killed_in_mid_call_are_replaced():
    with PythonTool(workers=2, modules=()) as tool:
        tool.run(["1"])
        kill = threading.Timer(0.2, lambda: [w.process.kill() for w in list(tool._workers)])
        kill.start()
        answers = tool.run(["import time\ntime.sleep(0.5)\nprint('answer')"] * 3)
    assert [one.text for one in answers] == ["answer"] * 3 and tool.retried


def test_16_callers_at_once_get_their_own_answers(tool):
    answers = {}
    threads = [threading.Thread(target=lambda i=i: answers.update(
        {i: [one.text for one in tool.run([f"{i} * 3", str(i)])]})) for i in range(16)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert answers == {i: [str(3 * i), str(i)] for i in range(16)}


def trainer(script):
    """A trainer in a process group of its own, half a second after it began the script."""
    begin = f"""
        import sys
        sys.path.insert(0, {str(HERE.parents[1])!r})
        import tools
        tool = tools.PythonTool(timeout=3, modules=())
        tool.run(["1"])
        print("started", flush=True)
    """
    script = textwrap.dedent(begin) + textwrap.dedent(script)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True,
                               start_new_session=True)
    assert process.stdout.readline() == "started\n"
    time.sleep(0.5)
    return process


def test_ctrl_c_stops_a_batch_and_the_tool_goes_on():
    process = trainer("""
        try:
            tool.run(["import time\\ntime.sleep(1)"] * 60)
        except KeyboardInterrupt:
            print(tool.run(["6 * 7"])[0].text)
    """)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=20)[0] == "42\n" and process.returncode == 0


def test_nothing_outlives_a_killed_trainer():
    process = trainer('tool.run(["while True: pass"] * 4)')
    below = descendants(process.pid)
    assert len(below) >= 3
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{pid}") for pid in below):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_nothing_is_left_after_close():
    with PythonTool(modules=()) as first:
        first.run(["1"])
    descriptors = len(os.listdir("/proc/self/fd"))
    before = descendants(os.getpid())
    with PythonTool(modules=(), timeout=0.2) as tool:
        tool.run(["1", "import os\nos.fork()", "import time\ntime.sleep(9)"])
        assert len(descendants(os.getpid())) > len(before)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert set(descendants(os.getpid())) <= set(before)
    with pytest.raises(RuntimeError, match="closed"):
        tool.run(["1"])


# --- The hostile corpus --------------------------------------------------------------------


LISTENERS = [(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 47123)),
             (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 47124)),
             (socket.AF_UNIX, socket.SOCK_STREAM, "{root}/sock"),
             (socket.AF_UNIX, socket.SOCK_STREAM, "\0canary47123")]


@contextlib.contextmanager
def canaries():
    """Files, listeners and a secret that no program may touch: (their folder, what was touched)."""
    root, touched = pathlib.Path(tempfile.mkdtemp()), []
    (root / "project").mkdir()
    (root / "drop").mkdir()
    (root / "drop").chmod(0o777)
    for name in ("secret.txt", "project/.env", "project/train.py"):
        (root / name).write_text("CANARY-SECRET")
    os.environ["CANARY"] = "CANARY-SECRET"

    def files():
        return {path: (path.stat().st_mode, path.is_file() and path.read_text())
                for path in root.rglob("*") if not path.is_socket()}
    before = files()
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket(*kind)) for *kind, _ in LISTENERS]
        for listener, (_, kind, address) in zip(listeners, LISTENERS):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address.format(root=root) if isinstance(address, str) else address)
            listener.setblocking(False)
            if kind == socket.SOCK_STREAM:
                listener.listen()
        yield root, touched
        for listener in listeners:
            with contextlib.suppress(BlockingIOError):
                tcp = listener.type == socket.SOCK_STREAM
                touched.append(listener.accept() if tcp else listener.recvfrom(9))
    touched += ["files"] if files() != before else []
    shutil.rmtree(root)
    del os.environ["CANARY"]


def faults(row, observation):
    """What is wrong with one answer, as a list of sentences."""
    allowed = [word.replace("killed", "crashed") for word in [row["expect"], *row.get("also", [])]]
    wrong = [] if observation.outcome in allowed else [f"{observation.outcome}, not {allowed}"]
    wrong += [f"lacks {row['stdout']!r}"] if row.get("stdout", "") not in observation.text else []
    wrong += [f"shows {text!r}" for text in row.get("must_not", []) if text in observation.text]
    wrong += ["slow"] if observation.seconds > row.get("max_s", 30) else []
    return [f"{row['name']}: {fault}" for fault in wrong]


def run_corpus(rows, **options):
    """Every fault of a run over the corpus, and over what it must have left alone."""
    before = set(descendants(os.getpid()))
    with canaries() as (root, touched):
        with PythonTool(**options) as tool:
            rows = [row for row in rows
                    if "needs" not in row or run(tool, f"import {row['needs']}").outcome == "ok"]
            codes = [row["code"].replace("@CANARY@", str(root)) for row in rows]
            wrong = sum(map(faults, rows, tool.run(codes)), [])
            wrong += ["the tool is dead"] if run(tool, "6 * 7").text != "42" else []
    wrong += [f"canaries touched: {touched}"] if touched else []
    wrong += ["processes left"] if set(descendants(os.getpid())) - before else []
    return wrong


def corpus():
    if not CORPUS.exists():
        pytest.skip(f"no hostile corpus beside the project ({CORPUS.name})")
    return [json.loads(line) for line in CORPUS.read_text().splitlines()]


@pytest.mark.slow
def test_quick_part_of_the_hostile_corpus_32_programs_at_once():
    patient = ("time", "memory", "library")
    rows = [row for row in corpus() if row["category"] not in patient and row["expect"] != "timeout"
            and "timeout" not in row.get("also", []) and "sleep" not in row["code"]]
    assert len(rows) > 120
    assert run_corpus(rows, timeout=3, workers=32) == []


@pytest.mark.slow
@pytest.mark.parametrize("files", [0, 1100])
def test_hostile_corpus(files):
    with open_files(files):
        assert run_corpus(corpus(), timeout=3) == []


@pytest.mark.slow
def test_hostile_corpus_as_an_unprivileged_user():
    rows, home = corpus(), pathlib.Path(tempfile.mkdtemp())
    python, nobody = unprivileged_python()
    for source in (tools.SELF, HERE, CORPUS):
        shutil.copy(source, home)
    subprocess.run(["chmod", "-R", "a+rX", home], check=True)
    done = subprocess.run([*nobody, python, home / HERE.name], capture_output=True, text=True,
                          cwd="/")
    shutil.rmtree(home)
    assert (done.stdout, len(rows)) == ("[]\n", 208), done.stderr


def unprivileged_python():
    """An interpreter that a user without rights can start, and how."""
    if os.getuid():
        return sys.executable, []
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", "HOME=/tmp"]
    for python in (sys.executable, "/usr/bin/python3"):
        check = "import sys; sys.exit(sys.version_info < (3, 11))"
        with contextlib.suppress(OSError):
            if subprocess.run([*nobody, python, "-c", check], capture_output=True).returncode == 0:
                return python, nobody
    pytest.skip("no interpreter here that an unprivileged user can start")


# --- Load ----------------------------------------------------------------------------------


def resident(pids):
    return sum(int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)


@pytest.mark.slow
def test_10000_calls_leave_no_growth():
    def sizes():
        below = descendants(os.getpid())
        descriptors = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in [os.getpid(), *below])
        return len(below), descriptors, resident([os.getpid(), *below])
    with PythonTool() as tool:
        codes = [f"import numpy\nprint({i})" for i in range(1000)]
        tool.run(codes)
        processes, descriptors, pages = sizes()
        for _ in range(9):
            assert [o.text for o in tool.run(codes)] == [str(i) for i in range(1000)]
        assert sizes()[:2] == (processes, descriptors)
        assert sizes()[2] - pages < 2048  # 8 MB


@pytest.mark.slow
def test_a_trainer_that_burns_every_core_condemns_nobody():
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        with PythonTool(timeout=2) as tool:
            honest = tool.run(["sum(i * i for i in range(2_000_000))"] * 8)
        assert {one.outcome for one in honest} == {"ok"}
    finally:
        [burner.kill() or burner.wait() for burner in burners]


if __name__ == "__main__":
    CORPUS = CORPUS if CORPUS.exists() else HERE.parent / CORPUS.name
    print(run_corpus(corpus(), timeout=3))
