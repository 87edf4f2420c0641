"""How fast the sandbox is, beside a subprocess that imports numpy.

    python tests/bench_sandbox.py              about a minute
    python tests/bench_sandbox.py sympy        the same with sympy beside it

Both sides run 64 calls at once, as many at a time as there are cores, in turns; medians of 5.
"""
import os
import pathlib
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import tools  # noqa: E402

CALLS, ROUNDS = 64, 5
PROGRAMS = {"numpy": "import numpy\nprint(numpy.arange(5).sum())",
            "sympy": "import sympy\nprint(sympy.solve(sympy.Symbol('x') - 10))"}


def by_subprocess(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout.strip()


def rate(work):
    """Calls a second; the answers are checked, for a wrong one costs nothing."""
    started = time.perf_counter()
    answers = work()
    assert set(answers) <= {"10", "[10]"} and len(answers) == CALLS, set(answers)
    return CALLS / (time.perf_counter() - started)


def side_by_side(library):
    codes = [PROGRAMS[library]] * CALLS
    modules = ("numpy",) if library == "numpy" else ("numpy", "sympy")
    with tools.PythonTool(modules=modules) as tool, ThreadPoolExecutor(tool.limits.workers) as pool:
        tool.run(codes[:2])  # starts the zygote, which both sides may leave out of the count
        ours, theirs = [], []
        for _ in range(ROUNDS):
            ours.append(rate(lambda: [seen.text for seen in tool.run(codes)]))
            theirs.append(rate(lambda: list(pool.map(by_subprocess, codes))))
    ours, theirs = statistics.median(ours), statistics.median(theirs)
    print(f"{library}: tool {ours:.0f} calls/s, subprocess {theirs:.1f} calls/s, "
          f"ratio {ours / theirs:.0f}x ({CALLS} calls at once, medians of {ROUNDS})")


if __name__ == "__main__":
    side_by_side(sys.argv[1] if sys.argv[1:] else "numpy")
