"""Put models against benchmarks: average@k with its interval, and a verdict on two models.

    python evaluate.py                                    the embedded models, under two minutes
    python evaluate.py --model Qwen/Qwen3-0.6B --data aime2024 aime2025
    python evaluate.py --compare runs/a/checkpoint runs/b/checkpoint --data gsm8k
    python evaluate.py --compare FILE_A FILE_B            two files of samples: which is better?
    python evaluate.py --rescore FILE                     grade stored samples again
    python evaluate.py --table 0.6B/sod=FILE FILE         the paper's table with these rows beside
    python evaluate.py --download aime2024                fetch a benchmark into benchmarks/
    python evaluate.py --page runs/NAME --step 1 25       the rollouts of a run, as a web page
    python evaluate.py --study                            the embedded world's table, an hour

Each model on each benchmark has one file of samples, a JSON line a sample, named after everything
that decides what is in it. The same command continues an interrupted file, and ends with the same
table: what is random depends on the seed, the run and the place in the file alone.

Notation
    P, R, k     problems, runs (seeds), samples of each problem in one run
    n, c        samples of one problem, right ones among them
    score       share of right samples of one problem
    correct     (R, P, k) of 0 and 1, or P rows of samples in the functions of one number
"""
import argparse
import base64
import copy
import csv
import fcntl
import hashlib
import html
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import sod_mini as sod
import tools

# --- Settings --------------------------------------------------------------------------------

WORLD = sod.Config()


@dataclass
class Config:
    """How to evaluate. Defaults are those of the embedded world; PAPER is for all other data."""
    k: int = WORLD.eval_samples                   # samples a problem in one run: average@k
    runs: int = 1                                 # runs, each with another seed: mean and std
    limit: int = 0                                # first problems to take, 0 for all
    dates: str = ""                               # contest dates that count, as in 2025-02:2025-05
    temperature: float = WORLD.eval_temperature   # of sampling
    top_p: float = WORLD.eval_top_p               # nucleus of sampling
    max_turns: int = WORLD.max_turns              # assistant turns in a trajectory
    max_prompt: int = WORLD.max_prompt            # tokens; longer prompts are left out, and counted
    max_response: int = WORLD.max_response        # tokens after the prompt, tool answers included
    system: str = ""                              # system message of problems that bring none
    silent_rate: float = WORLD.silent_rate        # chance that the tool stops answering, each call
    silent_persist: float = WORLD.silent_persist  # chance that a silent tool stays so
    tool_timeout: float = WORLD.tool_timeout      # seconds a program may take, graded ones too
    tool_chars: int = WORLD.tool_chars            # longest tool answer; the cut is marked
    tool_modules: str = ""                        # imported once for all programs
    tool_unsafe: bool = False                     # run programs even where they escape
    rollout_batch: int = WORLD.rollout_batch      # trajectories sampled side by side
    rollout_engine: str = WORLD.rollout_engine    # slots: a kept KV cache, Qwen3; generate: HF's
    chunk: int = WORLD.chunk                      # generate: sampled tokens until ended rows leave
    look: int = WORLD.look                        # slots: sampled tokens until ended rows are seen
    tool_wait: float = WORLD.tool_wait            # slots: seconds a look waits for a slow tool
    device: str = "auto"                          # auto: cuda where there is one, else cpu
    dtype: str = "auto"                           # auto: bfloat16 on cuda, float32 on cpu
    seed: int = 0                                 # of all runs
    transcripts: bool = False                     # store all turns and tool answers, not the last
    benchmarks: str = "benchmarks"                # folder of downloaded benchmarks
    out: str = "runs/evaluate"                    # folder of the files of samples

    def __post_init__(self):
        self.sampling()  # rejects impossible values of what the two classes share
        for name, low, high in (("k", 1, math.inf), ("runs", 1, math.inf), ("limit", 0, math.inf),
                                ("rollout_batch", 1, math.inf),
                                ("top_p", 1e-12, 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}"
                                 + f" and at most {high}" * (high == 1))
        if self.dates and not re.fullmatch(r"\d{4}(-\d\d){0,2}:\d{4}(-\d\d){0,2}", self.dates):
            raise ValueError(f"dates is {self.dates!r}; write FIRST:LAST, as in 2025-02:2025-05")

    def sampling(self):
        """The same settings as sod_mini's functions take them."""
        shared = {f.name for f in fields(sod.Config)} & {f.name for f in fields(self)} - {"out"}
        return sod.Config(**{name: getattr(self, name) for name in shared})


PAPER = dict(k=32, runs=5, temperature=1.0, top_p=0.6, max_turns=16, max_prompt=4096,
             max_response=20_480, system=sod.SYSTEM, silent_rate=0.0, tool_modules="numpy,sympy",
             rollout_batch=64, rollout_engine="generate", chunk=512, tool_wait=0.0)
EMBEDDED = dict(limit=WORLD.eval_problems)


def settings(data, given):
    """The Config of one benchmark: the world's or the paper's values, then the command line's."""
    is_world = data == "world" or Path(os.path.realpath(data)).parent == Path(sod.WORLD).resolve()
    return Config(**{**(EMBEDDED if is_world else PAPER), **given})


# --- Benchmarks: what they are and where they lie ----------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """A file that other people's numbers come from."""
    column: str       # its name in the paper's table, else its own
    rows: int         # what the whole file holds
    repo: str         # data set on the Hub
    file: str         # file of that data set
    window: str = ""  # contest dates that count


BENCHMARKS = {
    "aime2024": Benchmark("AIME24", 30, "math-ai/aime24", "test-00000-of-00001.parquet"),
    "aime2025": Benchmark("AIME25", 30, "math-ai/aime25", "test.jsonl"),
    "gpqa_diamond": Benchmark("GPQA-Diamond", 198, "Idavidrein/gpqa", "gpqa_diamond.csv"),
    # The sixth file has 175 rows from 2025-01 on; how many lie in the window is told, not checked.
    "livecodebench_v6": Benchmark("LiveCodeBench-v6", 175, "livecodebench/code_generation_lite",
                                  "test6.jsonl", "2025-02:2025-05"),
    "gsm8k": Benchmark("GSM8K", 1319, "openai/gsm8k", "main/test-00000-of-00001.parquet"),
    "math500": Benchmark("MATH-500", 500, "HuggingFaceH4/MATH-500", "test.jsonl"),
}
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def find_file(data, folder):
    """The file of a benchmark's name, or the file itself."""
    if data == "world":
        return Path(WORLD.eval_data)
    if data not in BENCHMARKS:
        if not Path(data).exists():
            raise ValueError(f"{data} is neither a file nor a benchmark; the benchmarks are world, "
                             + ", ".join(BENCHMARKS))
        return Path(data)
    paths = [Path(folder) / (data + suffix) for suffix in SUFFIXES]
    found = next((path for path in paths if path.exists()), None)
    if found is None:
        raise ValueError(f"found no file {Path(folder) / data} with an ending {', '.join(SUFFIXES)}"
                         f"; put it there, or fetch it: python evaluate.py --download {data}")
    return found


def download(data, folder):
    """Fetch a benchmark from the Hub to where find_file looks for it; returns the path."""
    if data not in BENCHMARKS:
        raise ValueError(f"{data} cannot be downloaded; choose from {', '.join(BENCHMARKS)}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError
    benchmark, page = BENCHMARKS[data], f"https://huggingface.co/datasets/{BENCHMARKS[data].repo}"
    place = Path(folder) / (data + Path(benchmark.file).suffix)
    try:
        fetched = hf_hub_download(benchmark.repo, benchmark.file, repo_type="dataset")
    except GatedRepoError:
        raise ValueError(f"{data} is gated: accept its conditions at {page}, log in with `hf auth "
                         f"login`, try again; or put its file at {place}.") from None
    except Exception as error:  # the Hub's client raises a dozen kinds when it is cut off
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise ValueError(f"cannot fetch {data}: {first.strip()} Without a way to the Hub, fetch "
                         f"{benchmark.file} from {page} elsewhere and put it at {place}."
                         ) from error
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(fetched, place.with_suffix(".part"))  # half a file never carries the name
    return place.with_suffix(".part").replace(place)


def load_benchmark(data, config):
    """The problems of a benchmark or a file, its count checked, its repairs told."""
    path, benchmark = find_file(data, config.benchmarks), BENCHMARKS.get(data)
    rows = list(read_rows(path))
    if benchmark and len(rows) != benchmark.rows:
        raise ValueError(f"{path}: found {len(rows)} of {benchmark.rows} problems; the file is "
                         "truncated or another one, fetch it again.")
    dates = config.dates or (benchmark.window if benchmark else "")
    dated = [row for row in rows if within(row[1].get("contest_date"), dates)]
    if len(dated) < len(rows):
        print(f"{len(dated)} of {len(rows)} problems of {data} are dated {dates}", file=sys.stderr)
    if rows and not dated:
        raise ValueError(f"{path}: found no problem dated {dates}; choose other --dates")
    with warnings.catch_warnings(record=True) as repairs:
        warnings.simplefilter("always")
        problems = tools.read_problems(path, dated, read_row)
    for repair in repairs:
        print(f"note: {repair.message}", file=sys.stderr)
    twice = [name for name, times in Counter(p.id for p in problems).items() if times > 1]
    if twice:
        raise ValueError(f"{path}: the id {twice[0]} stands in several rows; ids tell problems "
                         "apart, so make them unique or delete the column.")
    return problems[:config.limit or None]


# --- Files to rows, rows to problems -----------------------------------------------------------


def read_rows(path):
    """(line number, row, whether its JSON was mended) of any file; parquet counts rows."""
    if path.suffix == ".parquet" and path.exists():
        return ((number, row, False) for number, row in enumerate(read_parquet(path), start=1))
    text = tools.read_text(path, SUFFIXES)
    return read_csv(path, text) if path.suffix == ".csv" else tools.read_json(path, text)


def read_csv(path, text):
    """Yield (number of the row's last line, row, False)."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"the row has not the header's {len(reader.fieldnames)} cells")
            yield reader.line_num, row, False
    except csv.Error as fault:
        raise ValueError(f"{path}, line {reader.line_num}: found broken CSV ({fault}); check the "
                         "quotes, or fetch the file again.") from fault


def read_parquet(path):
    """Rows as plain dicts, by pyarrow or pandas where one of them happens to be installed."""
    try:
        import pandas
        return json.loads(pandas.read_parquet(path).to_json(orient="records"))
    except ImportError:
        pass  # pyarrow can do without pandas
    try:
        from pyarrow import parquet
        return parquet.read_table(path).to_pylist()
    except ImportError as fault:
        raise ValueError(f"{path}: found parquet, and neither pyarrow nor pandas is installed; run "
                         "`pip install pyarrow`, or convert the file where they are: pandas."
                         "read_parquet(file).to_json(\"rows.jsonl\", orient=\"records\", "
                         "lines=True).") from fault


def within(date, dates):
    """True if an ISO date lies in FIRST:LAST, each given to the year, month or day."""
    if not dates or not date:
        return True
    first, last = dates.split(":")
    return first <= str(date)[:len(first)] and str(date)[:len(last)] <= last


def read_row(row):
    """The Problem of a row, understood by its columns; their names are in lower case."""
    if "correct answer" in row:
        return read_gpqa(row)
    return read_livecodebench(row) if "question_content" in row else tools.read_general(row)


def read_gpqa(row):
    """Four options in an order drawn from the question: the same in every run, on any machine."""
    names = ["correct answer", *(f"incorrect answer {number}" for number in (1, 2, 3))]
    options = [tools.first_text(row, name).strip() for name in names]
    question = tools.first_text(row, "question").strip()
    if not question or not all(options):
        columns = zip(["question", *names], [question, *options])
        missing = ", ".join(name for name, text in columns if not text)
        raise ValueError(f"found nothing in {missing}; needed a question and four options.")
    order = random.Random(question).sample(range(4), 4)
    listed = "\n".join(f"{letter}) {options[index]}" for letter, index in zip("ABCD", order))
    question += f"\n\n{listed}\n\nGive the letter of the right option in \\boxed{{}}."
    return tools.Problem(question, "ABCD"[order.index(0)], "choice",
                         id=tools.first_text(row, "record id"))


def read_livecodebench(row):
    """Public and private tests, stdin or functional; the starter code becomes part of the task."""
    metadata = row.get("metadata") or {}
    metadata = metadata if isinstance(metadata, dict) else json.loads(metadata)
    tests = [test for name in ("public_test_cases", "private_test_cases")
             for test in tools.read_tests(unpack(row.get(name)), metadata.get("func_name", ""))]
    if not tests:
        raise ValueError("found no test cases; needed public_test_cases or private_test_cases.")
    task = "Write a Python program that reads from standard input and prints the answer."
    if starter := tools.first_text(row, "starter_code"):
        task = f"Complete this code:\n```python\n{starter.rstrip()}\n```"
    task += "\nGive the whole program in one ```python block."
    return tools.Problem(f"{row['question_content']}\n\n{task}", "", "program", tests=tests,
                         id=tools.first_text(row, "question_id"),
                         difficulty=tools.read_level(row))


MAX_TESTS = 2**30  # bytes of unpacked tests of one problem; stops a decompression bomb


def unpack(packed):
    """Test cases from JSON, or from JSON pickled, in zlib, in base64, as in the official files."""
    if not isinstance(packed, str) or not packed.strip():
        return packed
    if packed.lstrip()[0] in "[{":
        return json.loads(packed)
    try:
        unzip = zlib.decompressobj()
        data = unzip.decompress(base64.b64decode(packed, validate=True), MAX_TESTS)
        if not unzip.eof:
            raise ValueError("truncated, or larger than a gigabyte")
        text = TextOnly(io.BytesIO(data)).load()
        if not isinstance(text, str):
            raise ValueError(f"the pickle holds a {type(text).__name__}, not a string")
        return json.loads(text)
    except Exception as fault:  # a hostile pickle can raise anything; all of it means one thing
        raise ValueError(f"found test cases that cannot be unpacked ({fault}); needed JSON, or a "
                         "pickled JSON string in zlib in base64; fetch the file again.") from fault


class TextOnly(pickle.Unpickler):
    """Unpickles plain data. A pickle that names a class or function, to call it, fails."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}")


# --- Metrics: one number from graded samples ---------------------------------------------------


def average_at_k(correct):
    """Mean over problems of the share of right samples: (1/P) sum_p c_p / n_p, a fraction of 1.

    correct  P rows of samples, 0 or 1; rows may differ in length

    >>> average_at_k([[1, 0, 0, 0], [1, 1, 1, 0]])
    0.5
    """
    if len(correct) == 0 or any(len(row) == 0 for row in correct):
        raise ValueError("found no samples for a problem; needed at least one problem, and one "
                         "graded sample of each.")
    return float(np.mean([np.mean(row) for row in correct]))


def pass_at_k(n, c, k):
    """Chance that k of n samples, drawn without replacement, hold one of the c right ones.

    1 - C(n-c, k) / C(n, k), unbiased for 1 - (1-p)^k (Chen et al. 2021, Eq. 1). Integers until
    the last division, so nothing overflows or cancels.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"found n={n}, c={c}, k={k}; needed 0 <= c <= n and 1 <= k <= n, since "
                         "n samples say nothing about more than n tries.")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def majority_at_k(answers, correct):
    """Fraction of problems whose most frequent answer is right.

    answers  P rows of k answers, None for a sample without one: it has no vote
    correct  P rows of k samples, 0 or 1

    All k samples vote once. Answers that tie for first share the problem: two tied answers, one
    of them right, count 1/2, the expectation of a coin. No votes at all count 0.

    >>> majority_at_k([["7", "7", "8"], ["7", "8", None]], [[1, 1, 0], [1, 0, 0]])
    0.75
    """
    if len(answers) != len(correct) or not len(answers):
        raise ValueError(f"found answers to {len(answers)} problems and grades of {len(correct)}; "
                         "needed the same number, at least one.")
    return float(np.mean([majority(*row) for row in zip(answers, correct)]))


def majority(answers, correct):
    """One problem's share of `majority_at_k`, between 0 and 1."""
    votes = defaultdict(list)
    for answer, right in zip(answers, correct, strict=True):
        if answer is not None:
            votes[answer].append(right)
    most = max(map(len, votes.values()), default=0)
    first = [np.mean(grades) for grades in votes.values() if len(grades) == most]
    return float(np.mean(first)) if first else 0.0


def vote(problem, final_turn):
    """The answer of a final turn in a form in which equal answers are equal; None without one.

    Programs have no vote: no two are alike.
    """
    answer = tools.last_boxed(final_turn)
    if problem.kind == "choice":
        said = (f"\\boxed{{{answer}}}" if answer is not None else
                final_turn[-tools.MAX_ANSWER:].replace("\\boxed", ""))  # boxes that never close
        return next((letter for letter in "ABCDEFGHIJ"
                     if tools.grade_choice(said, letter).right), None)
    if problem.kind == "program" or answer is None or len(answer) > tools.MAX_ANSWER:
        return None
    try:
        value = tools.number(tools.clean(answer))
        return f"{value[0]} {value[1]}".strip() if value else tools.canonical(tools.clean(answer))
    except Exception:  # as in the grader, which counts it as its error
        return answer


def mean_and_std(runs):
    """(mean, standard deviation with ddof 1) of R values, one a run; nan for the std of one.

    >>> mean_and_std([0.25, 0.75, 0.5])
    (0.5, 0.25)
    """
    return float(np.mean(runs)), float(np.std(runs, ddof=1)) if len(runs) > 1 else math.nan


# --- Metrics: which of two models is better ----------------------------------------------------

# Even if one model wins every one of five problems, chance does that in 1 of 16 (two sides),
# more often than the 1 of 20 a 95% interval allows.
FEWEST_PROBLEMS = 6


@dataclass
class Comparison:
    """B minus A over the problems both answered, in points (0.01 of a fraction of 1)."""
    problems: int
    difference: float
    low: float
    high: float
    verdict: str  # one sentence


def compare(a, b, names=("A", "B"), draws=10_000):
    """Paired difference by problem, its 95% interval from resampling problems, and a sentence.

    a, b  {problem id: score} of two models on the same problems

    Pairing takes out how hard the problems are: only the differences b_p - a_p are resampled.
    """
    if a.keys() != b.keys() or not a:
        raise ValueError(f"{names[0]} has {len(a.keys() - b.keys())} problems that {names[1]} "
                         f"lacks, {names[1]} has {len(b.keys() - a.keys())} that {names[0]} lacks; "
                         "a paired comparison needs the same problems in both, at least one.")
    differences = 100 * np.array([b[problem] - a[problem] for problem in a], dtype=float)
    differences = differences.round(9) + 0.0  # 0.1 + 0.2 - 0.3 is no difference, nor is -0.0
    low, high = np.quantile(sod.resampled_means(differences, draws), [0.025, 0.975])
    found = Comparison(len(a), float(differences.mean()), float(low), float(high), "")
    found.verdict = verdict(found, names)
    return found


def verdict(found, names):
    """The sentence of a comparison; the interval is always given, also when it decides nothing."""
    low, high, size = (round(x, 1) + 0.0 for x in (found.low, found.high, found.difference))
    if found.problems >= FEWEST_PROBLEMS and (found.low > 0 or found.high < 0):
        better = names[1] if found.low > 0 else names[0]
        low, high = sorted((abs(low), abs(high)))
        return (f"{better} is better by {abs(size):.1f} points, "
                f"95% interval {low:.1f} to {high:.1f}")
    problems = "1 problem" if found.problems == 1 else f"{found.problems} problems"
    return (f"{problems} cannot tell these apart ({names[1]} minus {names[0]}: {size:+.1f} points, "
            f"95% interval {low:.1f} to {high:.1f})")


# --- Files of samples --------------------------------------------------------------------------


@dataclass
class Evaluation:
    """One model on one benchmark, as its file holds it."""
    model: str      # folder or Hub id
    data: str       # benchmark or file
    problems: int   # P: those that were put to the model
    skipped: int    # those whose prompt is longer than max_prompt
    weights: int    # CRC of the model's parameters
    questions: int  # CRC of the problems
    settings: dict  # Config, without the folders
    rows: list = field(default_factory=list)  # samples, by run, problem, sample
    cut: bool = False                         # the file's last line was not written to its end

    @property
    def header(self):
        """The first line of the file: everything that decides what the others are."""
        return {name: value for name, value in vars(self).items() if name not in ("rows", "cut")}

    @property
    def expected(self):
        return self.settings["runs"] * self.problems * self.settings["k"]

    def cells(self, name):
        """One column of the rows as nested lists, (R, P, k)."""
        flat, k, P = [row[name] for row in self.rows], self.settings["k"], self.problems
        groups = [flat[start:start + k] for start in range(0, len(flat), k)]
        return [groups[start:start + P] for start in range(0, len(groups), P)]

    def correct(self):
        """(P, R k) of 0 and 1: all samples of a problem, its runs side by side."""
        return np.concatenate(np.array(self.cells("right"), dtype=float), axis=1)

    def over_runs(self):
        """(mean, standard deviation) of average@k over the runs, in percent."""
        return mean_and_std([100 * np.mean(run) for run in self.cells("right")])

    def scores(self):
        """{problem id: share of right samples}"""
        ids = [group[0] for group in self.cells("problem")[0]]
        return dict(zip(ids, self.correct().mean(1)))


FOLDERS = ("benchmarks", "out")  # settings that decide nothing about a sample
COLUMNS = {"run": int, "problem": str, "sample": int, "right": bool, "reason": str,
           "vote": (str, type(None)), "final": str, "finish": str, "calls": list, "tokens": int}


def read_samples(path):
    """The Evaluation in a file. A last line without its end is left out, and remembered."""
    *lines, rest = tools.read_text(Path(path)).split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as fault:
            raise ValueError(f"{path}, line {number}: found broken JSON ({fault}); delete the line "
                             "and all after it, and the evaluation continues there.") from None
    if not rows or not is_header(rows[0]):
        raise ValueError(f"{path} is no file of samples of evaluate.py; its first line must hold "
                         "model, data and all settings")
    for number, row in enumerate(rows[1:], start=2):
        if not isinstance(row, dict) or any(not isinstance(row.get(name), kind)
                                            for name, kind in COLUMNS.items()):
            raise ValueError(f"{path}, line {number}: found no sample; needed {', '.join(COLUMNS)}")
    return Evaluation(**rows[0], rows=rows[1:], cut=bool(rest))


def is_header(row):
    """True for the first line of a file of samples."""
    kinds = {f.name: f.type for f in fields(Evaluation)[:-2]}
    try:
        return (row.keys() == kinds.keys() and row["problems"] > 0
                and all(isinstance(row[name], kind) for name, kind in kinds.items())
                and row["settings"].keys() == asdict(Config(**row["settings"])).keys() - {*FOLDERS})
    except (ValueError, TypeError, AttributeError):  # of another shape, or impossible settings
        return False


def read_finished(path):
    """read_samples of a file that holds every sample, else a sentence."""
    found = read_samples(path)
    if len(found.rows) != found.expected:
        raise ValueError(f"{path} holds {len(found.rows)} of {found.expected} samples"
                         + ", and its last line is cut off" * found.cut + ": the evaluation was "
                         "interrupted; give its command again and it continues.")
    return found


def write_samples(path, evaluation):
    """Write the file beside its place and rename it, so that a half-written one has no name."""
    lines = [evaluation.header, *evaluation.rows]
    aside = path.with_suffix(".part")
    aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    aside.replace(path)


# --- Sampling ----------------------------------------------------------------------------------


def load_model(name, config):
    """(model, tokenizer), on the device and in the numbers of the settings."""
    device, dtype, _ = sod.choose_device(config)
    tokenizer = sod.load_tokenizer(name)
    return sod.load_model(name, device, dtype), tokenizer


def evaluate(name, data, problems, model, tokenizer, config):
    """Sample what the file lacks, a line a sample; the finished Evaluation and its path."""
    sampling = config.sampling()
    sod.check_window(name, model, config)
    tool, _ = sod.load_tool(sampling)
    agent = sod.Agent(sampling, model, None, tokenizer, tool)
    prompts, skipped = sod.fitting_prompts(agent, problems)
    used = {key: value for key, value in asdict(config).items() if key not in FOLDERS}
    used |= {"device": model.device.type, "dtype": str(model.dtype).removeprefix("torch.")}
    found = Evaluation(name, data, len(prompts), skipped, weights_crc(model),
                       crc_of(problems), used)
    path, plan = file_of(found, config.out), chunks(len(prompts), config)
    path.parent.mkdir(parents=True, exist_ok=True)
    with agent.tool, open(path, "a", encoding="utf-8") as file:
        todo = plan[resume(file, found, plan):]
        with tqdm(total=found.expected, initial=len(found.rows), unit="sample",
                  desc=f"{short(name)} on {short(data)}") as bar:
            for run, start, stop in todo:
                rows = sample_chunk(agent, prompts[start:stop], config, run, start)
                file.writelines(json.dumps(row) + "\n" for row in rows)
                file.flush()
                found.rows += rows
                bar.set_postfix(right=f"{np.mean([row['right'] for row in found.rows]):.1%}")
                bar.update(len(rows))
    return found, path


def crc_of(problems):
    """A number that changes with any word of a question, answer or test."""
    return zlib.crc32(repr(problems).encode())


def weights_crc(model):
    """A number that changes with any parameter: a trained model does not continue an older one."""
    crc = 0
    for weight in model.parameters():
        crc = zlib.crc32(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def short(name):
    """The last parts of a path, without characters that file names should not hold."""
    parts = [part for part in Path(name).parts if part not in ("/", "..")]
    last = 2 if parts[-1:] == ["checkpoint"] else 1
    return re.sub(r"[^\w.-]+", "-", "-".join(parts[-last:]).removesuffix(".jsonl"))


def file_of(evaluation, folder):
    """The file's name says whose samples it holds; its last word changes with any setting."""
    digest = zlib.crc32(json.dumps(evaluation.header, sort_keys=True).encode())
    return Path(folder) / f"{short(evaluation.model)}-{short(evaluation.data)}-{digest:08x}.jsonl"


def chunks(problems, config):
    """[(run, first problem, last + 1)] of what is sampled side by side, in the file's order."""
    size = max(1, config.rollout_batch // config.k)
    return [(run, start, min(start + size, problems))
            for run in range(config.runs) for start in range(0, problems, size)]


def resume(file, evaluation, plan):
    """Take over the whole chunks an interrupted evaluation has written; their number.

    What is left of the next chunk is cut away: it is sampled again, with the same outcome.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"{file.name} is being written by another process; let it end") from None
    lines = Path(file.name).read_text(encoding="utf-8").splitlines(keepends=True)
    if len(lines) > 1:  # else it was killed within its header, or never began
        evaluation.rows = read_samples(file.name).rows
    sizes = [evaluation.settings["k"] * (stop - start) for _, start, stop in plan]
    ends = np.cumsum([0] + sizes)
    done = int(np.searchsorted(ends, len(evaluation.rows), side="right")) - 1
    evaluation.rows = evaluation.rows[:ends[done]]
    file.truncate(sum(map(len, lines[:1 + ends[done]])) if done else 0)  # ASCII: bytes = letters
    if not done:
        file.write(json.dumps(evaluation.header) + "\n")
        file.flush()
    return done


def sample_chunk(agent, prompts, config, run, start):
    """k samples of some problems, as rows. Their randomness is the place's, whatever came before"""
    rng = sod.random_numbers(config.seed, f"run {run}", start)
    rollouts = sod.sample_rollouts(agent.student, agent.tokenizer,
                                   [prompt for prompt in prompts for _ in range(config.k)],
                                   agent.tool, agent.config, rng,
                                   config.temperature, config.top_p)
    return [sample_row(rollout, run, number % config.k, config.transcripts)
            for number, rollout in enumerate(rollouts)]


def sample_row(r, run, sample, transcripts):
    """One sample as it is stored. Without a final turn there is nothing to grade: final is ""."""
    final = r.turns[-1] if r.finish == "answer" else ""
    row = {"run": run, "problem": r.problem.id, "sample": sample, "right": r.right,
           "reason": r.reason, "vote": vote(r.problem, final), "truth": r.problem.answer,
           "final": final, "finish": r.finish, "calls": [o for o in r.outcomes if o],
           "tokens": sum(k >= 0 for k in r.step_id)}
    return row | ({"turns": r.turns, "answers": r.answers} if transcripts else {})


def rescore(path, given):
    """Grade the stored final turns again, with the graders and answers of today."""
    old = read_finished(path)
    config = Config(**{**old.settings, **given})
    loaded = load_benchmark(old.data, config)
    problems = {problem.id: problem for problem in loaded}
    missing = {row["problem"] for row in old.rows} - problems.keys()
    if missing:
        raise ValueError(f"{old.data} lacks {len(missing)} problems of {path} ({min(missing)}, "
                         "...); rescoring needs the file that was evaluated")
    with sod.load_tool(config.sampling())[0] as tool:
        rows = [graded_again(row, problems[row["problem"]], tool)
                for row in tqdm(old.rows, unit="sample", desc=f"rescoring {short(path)}")]
    changed = sum(a["right"] != b["right"] for a, b in zip(old.rows, rows))
    print(f"{changed} of {len(rows)} verdicts changed")
    given = {name: value for name, value in given.items() if name not in FOLDERS}
    new = Evaluation(**old.header | {"settings": old.settings | given,
                                     "questions": crc_of(loaded)}, rows=rows)
    place = Path(path).with_suffix(".rescored.jsonl")
    write_samples(place, new)
    return new, place


def graded_again(row, problem, tool):
    seen = tools.grade(problem, row["final"], tool)
    return row | {"right": seen.right, "reason": seen.reason, "truth": problem.answer,
                  "vote": vote(problem, row["final"])}


# --- Reports -----------------------------------------------------------------------------------


def report(found):
    """Everything about some models on one benchmark, as markdown."""
    first, s = found[0], found[0].settings
    runs = "1 run" if s["runs"] == 1 else f"{s['runs']} runs"
    lines = [f"average@{s['k']} of {runs} on {first.problems} problems of {first.data}",
             f"temperature {s['temperature']}, top-p {s['top_p']}, {s['max_turns']} turns, prompt "
             f"{s['max_prompt']}, response {s['max_response']} tokens, silent tool "
             f"{s['silent_rate']:.0%}, seed {s['seed']}, {s['dtype']} on {s['device']}", ""]
    lines += [sod.results_table({one.model: one.correct() for one in found}), ""]
    details = [detail(one) for one in found]
    lines += [f"| | {' | '.join(one.model for one in found)} |", "|---" * (len(found) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(one[name] for one in details)} |" for name in details[0]]
    for other in found[1:]:
        try:
            lines += ["", verdict_of(first, other)]
        except ValueError as error:  # the prompts of one model left out other problems
            lines += ["", f"no verdict: {error}"]
    return "\n".join(lines).strip()


def verdict_of(a, b, names=()):
    """The sentence that compares two evaluations of the same problems."""
    if a.questions != b.questions:
        raise ValueError(f"{a.data} and {b.data} are different problems, or in another wording; "
                         "only answers to the same questions can be compared")
    return compare(a.scores(), b.scores(), names or (a.model, b.model)).verdict


def detail(one):
    """{what: text} of one model on one benchmark."""
    correct, P = one.correct(), one.problems
    n, counts = correct.shape[1], correct.sum(1).astype(int).tolist()
    mean, std = one.over_runs()
    finish = Counter(row["finish"] for row in one.rows)
    calls = Counter(outcome for row in one.rows for outcome in row["calls"])
    bad = {o: m for o, m in calls.items() if o not in (*sod.FINE, "sandbox_error")}
    broken = sum("sandbox_error" in row["calls"] or "sandbox_error" in row["reason"]
                 for row in one.rows)
    wrong = Counter(row["reason"] for row in one.rows if not row["right"])
    samples, tried = len(one.rows), max(sum(calls.values()), 1)
    k_s = [2 ** e for e in range(n.bit_length()) if 2 ** e < n] + [n]
    votes = [majority_at_k(v, c) for v, c in zip(one.cells("vote"), one.cells("right"))]
    has_votes = any(row["vote"] is not None for row in one.rows)
    return {
        "problems left out, prompt too long": str(one.skipped),
        "mean ± std over runs": f"{mean:.2f} ± {std:.2f}" if std == std else "1 run",
        f"pass@k, k = {', '.join(map(str, k_s))}": ", ".join(
            f"{100 * sum(pass_at_k(n, c, k) for c in counts) / P:.1f}" for k in k_s),
        f"maj@{one.settings['k']}": f"{100 * np.mean(votes):.1f}" if has_votes else "no votes",
        "tool calls a trajectory": f"{sum(calls.values()) / samples:.2f}",
        "failed calls": shares(bad, tried),
        "cut off, by": shares({"budget": finish["budget"], "turns": finish["turns"]}, samples),
        "sampled tokens a trajectory": f"{np.mean([row['tokens'] for row in one.rows]):,.0f}",
        "not right, because": shares(wrong, samples),
        "samples the sandbox failed": str(broken),
    }


def shares(counts, total):
    """12.0% (timeout 9.5%, error 2.5%): all of them, then each, the most frequent first."""
    counts = sorted(((n, name) for name, n in counts.items() if n), reverse=True)
    parts = ", ".join(f"{name} {n / total:.1%}" for n, name in counts)
    return f"{sum(n for n, _ in counts) / total:.1%}" + f" ({parts})" * bool(parts)


# --- The paper's table -------------------------------------------------------------------------

PAPER_COLUMNS = ("AIME24", "AIME25", "GPQA-Diamond", "LiveCodeBench-v6")

# average@32 in %, mean of 5 runs, and the mean over the benchmarks (arXiv 2605.07725).
PAPER_ROWS = """
0.6B  vanilla     7.71 12.81 13.24 14.89 12.16
0.6B  sft         5.67  5.42 15.20  9.61  8.97
0.6B  grpo        4.06  4.90 20.38 15.95 11.32
0.6B  opd        16.82 22.95 17.76 22.65 20.04
0.6B  opsd_gt    12.63 17.04 17.32 16.73 15.93
0.6B  opsd_hint   9.77 14.12 15.98 12.65 13.13
0.6B  sod        20.84 26.13 22.19 27.72 24.22
1.7B  vanilla     9.90  8.96 26.80 22.73 17.10
1.7B  sft        26.77 22.40 29.85 24.63 25.91
1.7B  grpo       25.63 21.67 33.55 20.70 25.39
1.7B  opd        43.86 37.04 31.73 32.45 36.27
1.7B  opsd_gt    33.85 24.69 35.02 22.73 29.07
1.7B  opsd_hint  34.42 21.43 33.46 23.12 28.11
1.7B  sod        50.83 41.72 38.72 40.63 42.98
4B    teacher    67.60 60.42 55.19 63.13 61.59
"""


# Settings that make a number another number: told where they are not the usual ones.
DECISIVE = ("limit", "dates", "temperature", "top_p", "max_turns", "max_prompt", "max_response",
            "system", "silent_rate", "tool_timeout")


def paper_table(files):
    """The paper's results as markdown, each measured row (bold) under the one it belongs to.

    files  FILE, or SIZE/METHOD=FILE for the row of the paper it belongs under; files of one model
           and equal settings share a row

    The mean of a row stands only where all four of the paper's benchmarks were measured, as it
    compares with nothing otherwise. Other benchmarks get columns of their own.
    """
    published = [line.split() for line in PAPER_ROWS.split("\n") if line]
    keys, measured = ["/".join(row[:2]) for row in published], defaultdict(dict)
    for name in files:
        beside, _, path = name.rpartition("=") if not Path(name).exists() else ("", "", name)
        if beside and beside not in keys:
            raise ValueError(f"{beside} is not in the paper's table; choose from {', '.join(keys)}")
        one = read_finished(path)
        cells, column = measured[beside, label_of(one)], column_of(one.data)
        if column in cells:
            raise ValueError(f"{path} and a file before it measure {column} in the same way; name "
                             "one of them")
        cells[column] = cell(one)
    others = [c for c in dict.fromkeys(c for row in measured.values() for c in row)
              if c not in PAPER_COLUMNS]
    columns = ["model", "method", *PAPER_COLUMNS, "mean", *others]
    table = [columns, ["---", "---", *["---:"] * (len(columns) - 2)]]
    for key, row in zip(keys + [""], published + [None]):
        table += [row + [""] * len(others)] if row else []
        table += [measured_row(key, *item, others) for item in measured.items()
                  if item[0][0] == key]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def label_of(one):
    """The model, the samples, and every setting that is not the one of the paper (or the world)."""
    usual = asdict(settings(one.data, {}))
    changed = [f"{name} {one.settings[name]}" for name in DECISIVE
               if one.settings[name] != usual[name]]
    parts = [one.model, f"average@{one.settings['k']} of {one.settings['runs']}", *changed]
    return ", ".join(parts).replace("|", "\\|")


def column_of(data):
    return BENCHMARKS[data].column if data in BENCHMARKS else short(data)


def cell(one):
    """(average@k in percent, "20.84 ± 0.51 (9.2 to 34.0)": std over runs, interval)."""
    mean, low, high = sod.average_with_interval(one.correct())
    _, std = one.over_runs()
    spread = f" ± {std:.2f}" if std == std else ""
    return mean, f"{mean:.2f}{spread} ({low:.1f} to {high:.1f})"


def measured_row(key, label, cells, others):
    """The cells of one measured row, as text."""
    size, _, _ = key.partition("/")
    four = [cells[column][0] for column in PAPER_COLUMNS if column in cells]
    mean = f"{np.mean(four):.2f}" if len(four) == len(PAPER_COLUMNS) else ""
    return [size, f"**{label[1]}**", *(cells.get(c, (0, ""))[1] for c in PAPER_COLUMNS), mean,
            *(cells.get(c, (0, ""))[1] for c in others)]


# --- The page: the rollouts of a run, to look at ------------------------------------------------

CURVES = ("step", "reward", "right", "entropy", "tool_fail", "loss", "grad_norm")
TEACHER_CURVES = ("reverse_kl", "teacher_entropy", "w_quantiles", "d_by_step")
NUMBER, MAYBE = (int, float), (int, float, type(None))  # null: it was not finite
ROLLOUT = {"question": str, "truth": str, "right": bool, "reward": NUMBER, "advantage": NUMBER,
           "finish": str, "turns": list}
TURN = {"text": str, "outcome": str, "d": MAYBE, "w": MAYBE, "tool": (str, type(None))}
SCORES = ("logp_s", "logp_t", "token_advantages")  # of each token; no logp_t where nobody scored
SCHEMES = {"sod": "min(d of step 1 / d of this step, 1 + delta)", "uniform": "1",
           "decay": "decay ^ (steps since the first failed call)",
           "mask_after_error": "0 after the first failed call, else 1",
           "unclipped": "d of step 1 / d of this step",
           "constant": "the mean over the batch's tokens of what sod would give",
           "rescaled": "what sod would give, divided by its mean over the batch's tokens",
           "floor": "as sod, no d below the floor", "median": "as sod, with the median d so far in "
           "place of d of step 1"}


def patterns(outcomes):
    """The pattern of each step of a rollout, from what became of its calls alone.

    stable     no call has failed so far
    erroneous  the newest call that ran has failed
    recovery   a call has failed before, and the newest one worked

    The pattern of a rollout is that of its last step. d and w take no part in the definition, so
    that what they do in each pattern can be looked at.

    >>> patterns(["ok", "timeout", "error", "ok", ""])
    ['stable', 'erroneous', 'erroneous', 'recovery', 'recovery']
    """
    found = ["stable"]
    for outcome in outcomes:
        worked = outcome in ("ok", "output_truncated") and found[-1] != "stable"
        found.append("erroneous" if outcome not in sod.FINE else
                     "recovery" if worked else found[-1])
    return found[1:]


def write_page(folder, steps=()):
    """Write rollouts.html of a run, one file that asks for no other; its path and a summary.

    steps  training steps to show; default: the first, the middle and the last
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; name the folder of a run, as in runs/NAME")
    data = page_data(folder, steps)
    place, aside = folder / "rollouts.html", folder / "rollouts.html.part"
    aside.write_text(page_html(data), encoding="utf-8")
    aside.replace(place)
    return (f"{place}  training steps {', '.join(data['steps']) or 'none'}, "
            f"{sum(map(len, data['steps'].values()))} rollouts, "
            f"{place.stat().st_size / 2**20:.1f} MiB")


def page_data(folder, steps):
    """Everything the page shows, as plain values; every number stands in the files of the run."""
    given = parse_line(folder / "config.json", tools.read_text(folder / "config.json"))
    config = sod.Config(**{f.name: given[f.name] for f in fields(sod.Config) if f.name in given})
    method = sod.METHODS.get(config.method, sod.METHODS["grpo"])  # sft: nobody scores either
    names = CURVES + TEACHER_CURVES * bool(method.view)
    curves = [{name: row[name] for name in names if name in row}
              for row in (parse_line(*line) for line in lines_of(folder / "metrics.jsonl"))]
    stored = defaultdict(list)  # {training step: its lines}; parsed where shown, as runs are long
    for where, line in lines_of(folder / "rollouts.jsonl"):
        start = re.match(r'\{"step": (\d+), ', line)
        if not start:
            raise ValueError(f'{where}: found no rollout; needed a line that begins {{"step": ')
        stored[int(start[1])].append((where, line))
    if not stored and not curves:
        raise ValueError(f"{folder} holds neither rollouts nor metrics; a run writes both, from "
                         "its first step on")
    known = list(stored)
    for step in steps:
        if step not in stored:
            raise ValueError(f"step {step} is not in {folder / 'rollouts.jsonl'}; choose from "
                             f"{', '.join(map(str, known)) or 'none'}")
    chosen = sorted({*steps} or {known[i] for i in (0, len(known) // 2, -1) if known})
    return {"name": config.name or folder.name, "words": words(config, method),
            "about": about(config, method, len(chosen), len(known)), "curves": curves,
            "scored": bool(method.view), "delta": config.delta,
            "steps": {str(step): [rollout(*line) for line in stored[step]] for step in chosen}}


def about(config, method, shown, stored):
    """Where the page's numbers come from, in two sentences."""
    scorer = {"": "nobody", "teacher": config.teacher}.get(
        method.view, f"its own frozen start, told the {method.view}")
    return (f"Method {config.method}, student {config.student}, scored by {scorer}. "
            + (f"Shown: {shown} of {stored} training steps." if stored else "No rollouts stored."))


def words(config, method):
    """{word: what it means on the page of this run}"""
    distils = method.view and config.kl == "sampled"
    term = f"{config.opd_coef} · w · (log p teacher − log p student)"
    worth = " + ".join(["advantage"] * method.outcome + [term] * bool(distils))
    scheme = SCHEMES[config.weights if method.weights == "sod" else "uniform"]
    return {"step": "one assistant turn: what the student wrote between two answers of the tool",
            "stable": "no call has failed so far",
            "erroneous": "the newest call that ran has failed",
            "recovery": "a call has failed before, and the newest one worked; the pattern of a "
                        "rollout is that of its last step",
            "advantage": "how far the reward (+1 right, about −1 wrong) lies above the mean of "
                         "all rollouts of this problem, in their standard deviations",
            "token advantage": (worth or "0, for the exact KL is a loss of its own")
                               + "; training makes a token likelier where this is above 0",
            **({"d": "mean over the tokens of a step of |log p student − log p teacher|, nats",
                "w": f"trust in the teacher, in this run {scheme}"} if method.view else {})}


def lines_of(path):
    """[(where, line)] of a file of this project; none where there is no file."""
    lines = tools.read_text(path).split("\n") if path.exists() else []
    return [(f"{path}, line {n}", line) for n, line in enumerate(lines, start=1) if line]


def parse_line(where, line):
    """A JSON object; NaN and infinity, which JSON does not know, become null."""
    try:
        row = json.loads(line, parse_constant=lambda name: None)
    except ValueError as fault:
        raise ValueError(f"{where}: found broken JSON ({fault}); delete the line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found a {type(row).__name__}; needed a JSON object")
    return row


def rollout(where, line):
    """One rollout, checked to its last token, with the pattern of each step."""
    row = parse_line(where, line)
    check_columns(where, "rollout", row, ROLLOUT)
    for turn in row["turns"]:
        check_columns(where, "step", turn, TURN)
        tokens, lists = turn.get("tokens", []), [turn[name] for name in SCORES if name in turn]
        if (not all(isinstance(text, str) for text in tokens)
                or not all(len(values) == len(tokens) for values in lists)
                or not all(isinstance(v, MAYBE) for values in lists for v in values)):
            raise ValueError(f"{where}: the lists of a step do not hold a number for each token; "
                             "delete the line")
    return row | {"patterns": patterns([turn["outcome"] for turn in row["turns"]])}


def check_columns(where, what, row, kinds):
    wrong = [name for name, kind in kinds.items()
             if not isinstance(row, dict) or not isinstance(row.get(name, ...), kind)]
    if wrong:
        raise ValueError(f"{where}: found no {what}; its {', '.join(wrong)} cannot be used")


def page_html(data):
    """The page. Its policy lets the browser fetch nothing and run one script, known by its hash.

    Text that a model wrote is data: escaped here, so that it cannot close the element it stands
    in, and put into the page as text nodes by the script.
    """
    text = json.dumps(data, allow_nan=False)  # ASCII, so U+2028 and U+2029 are escaped as well
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    digest = lambda code: base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    parts = {"STYLE": STYLE, "SCRIPT": SCRIPT, "DATA": text,
             "STYLE_HASH": digest(STYLE), "SCRIPT_HASH": digest(SCRIPT)}
    return re.sub(r"@([A-Z_]+)@", lambda slot: parts[slot[1]], PAGE)  # one pass: data stay data


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; base-uri 'none';
 form-action 'none'; style-src 'sha256-@STYLE_HASH@'; script-src 'sha256-@SCRIPT_HASH@'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Rollouts</title>
<style>@STYLE@</style>
<header><h1 id="name">Rollouts</h1><p id="about"></p></header>
<noscript>This page draws itself with a script of its own; allow it to run.</noscript>
<nav id="choice" aria-label="Rollouts">
<label>Training step <select id="step"></select></label>
<label>Show <select id="show"></select></label>
<button id="back">Previous</button>
<label>Rollout <input id="at" type="number" min="1"></label>
<output id="count"></output>
<button id="next">Next</button>
<small>Keys: ← and → change the rollout, or the token in focus; Esc leaves the token.</small>
</nav>
<p id="legend"></p>
<main id="rollout"></main>
<output id="readout"></output>
<section id="run" aria-label="Curves"><h2>The run, by training step</h2>
<div id="curves"></div></section>
<section id="glossary" aria-label="Glossary"><h2>What the words mean</h2>
<dl id="words"></dl></section>
<script type="application/json" id="data">@DATA@</script>
<script type="module">@SCRIPT@</script>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #5c5c5c; --line: #c4c4c4;
  --less: 230 97 0; --more: 30 120 255 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --paper: #141414; --soft: #ababab; --line: #4c4c4c } }
body { color: var(--ink); background: var(--paper); font: 1rem/1.5 system-ui, sans-serif;
  max-width: 66rem; margin: 0 auto; padding: 0 1rem 5rem }
h1 { font-size: 1.4rem; margin: 1rem 0 0 } h2 { font-size: 1.15rem; margin: 1.5rem 0 .5rem }
h3 { font-size: 1rem } h3, p, dl, dd, figure { margin: 0 } ol { list-style: none; padding: 0 }
#about, small, dt, figcaption, li > b { color: var(--soft); font-size: .85rem }
nav, .head { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center }
nav, li { border-top: 1px solid var(--line); padding: .6rem 0; margin-top: .5rem }
select, button, input { font: inherit; max-width: 100% } input { width: 4.5rem }
:focus-visible { outline: 3px solid rgb(var(--more)); outline-offset: 1px }
.head { gap: 0 .9rem } .head dl { display: contents } meter { width: 4rem; margin-left: .4rem }
.head dl div { display: flex; gap: .35rem; font-size: .85rem }
.said { font: .9rem/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
b + .said { border-left: 3px dashed var(--line); padding-left: .7rem; color: var(--soft) }
.less { text-decoration: underline 2px } .more { text-decoration: overline 2px }
.line::before { content: "↵"; color: var(--soft) }
#legend { font-size: .85rem } #legend span { padding: 0 .35rem } [hidden] { display: none }
#readout { position: fixed; inset: auto 0 0; background: var(--paper); padding: .5rem 1rem;
  border-top: 1px solid var(--line); font-size: .9rem; overflow-wrap: anywhere }
#curves { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)) }
svg { width: 100% } text { font-size: 11px; fill: var(--soft) }
path { fill: none; stroke: var(--ink); stroke-width: 1.5 } .axes { stroke: var(--line) }
.band { fill: rgb(var(--more) / .25); stroke: none } .dashed { stroke-dasharray: 4 3 }
"""

SCRIPT = r"""
const $ = id => document.getElementById(id)
const data = JSON.parse($("data").textContent)

// The only way onto the page: append() takes strings as text, never as markup.
function el(tag, attributes, ...children) {
  const node = ["svg", "path", "text"].includes(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value)
  node.append(...children)
  return node
}

const known = x => x !== null && x !== undefined
const show = (x, digits = 2) => !known(x) ? "not finite"
  : x.toFixed(digits).replace(/^-(?=[0.]+$)/, "").replace("-", "−")  // −0.00 is 0.00

// --- Tokens; gap = log p teacher - log p student, nats ---

function shade(node, gap) {  // the strongest colour from 3 nats on; marks, for eyes without colour
  const strength = Math.min(Math.abs(gap) / 3, 1) * .55
  node.style.background = `rgb(var(--${gap < 0 ? "less" : "more"}) / ${strength})`
  if (Math.abs(gap) >= 1) node.classList.add(gap < 0 ? "less" : "more")
  return node
}

function tokenOf(turn, gaps, t) {
  const piece = turn.tokens[t], node = el("span", {tabindex: t ? -1 : 0}, piece || "…")
  if (/^\s*\n\s*$/.test(piece)) node.classList.add("line")  // else there is nothing to point at
  node.told = [`“${piece || "part of a character"}”`,
    `log p student ${show(turn.logp_s[t], 3)}`,
    ...gaps ? [`log p teacher ${show(turn.logp_t[t], 3)}`, `difference ${show(gaps[t], 3)}`] : [],
    `token advantage ${show(turn.token_advantages[t], 3)}`].join(" · ")
  return gaps ? shade(node, gaps[t] ?? 0) : node
}

// --- One rollout ---

const given = (who, text) => el("li", {}, el("b", {}, who, ", not trained on"),
  el("div", {class: "said"}, text))

function stepOf(rollout, k) {
  const turn = rollout.turns[k], last = k + 1 === rollout.turns.length
  const gaps = turn.logp_t?.map((logp, t) => known(logp) && known(turn.logp_s[t])
    ? logp - turn.logp_s[t] : null)
  const widest = gaps?.reduce((a, gap, t) => Math.abs(gap) > Math.abs(gaps[a]) ? t : a, 0)
  const meter = el("meter", {max: 1 + data.delta, value: turn.w ?? 0, "aria-hidden": true})
  const facts = {
    ...data.scored && {d: [show(turn.d, 3)], w: [show(turn.w, 3), meter]},
    call: [{"": "none", not_run: "not run: limit reached"}[turn.outcome] ?? turn.outcome],
    pattern: [rollout.patterns[k]], reward: [show(rollout.reward)],
    advantage: [show(rollout.advantage)],
    ...gaps && {"widest difference": [`${show(gaps[widest])} at “${turn.tokens[widest]}”`]},
    ...!turn.tokens && {tokens: ["not stored, see --store_tokens"]}}
  const step = el("li", {}, el("div", {class: "head"}, el("h3", {}, `Step ${k + 1}`), el("dl", {},
    ...Object.entries(facts).map(([name, value]) =>
      el("div", {}, el("dt", {}, name), el("dd", {}, ...value))))),
    el("div", {class: "said"},
      ...turn.tokens?.map((_, t) => tokenOf(turn, gaps, t)) ?? [turn.text]))
  return turn.tool === null ? [step]
    : [step, given(last ? "Tool, past the token budget and unseen" : "Tool", turn.tool)]
}

const ends = {answer: "answered", turns: "cut off: turn limit", budget: "cut off: token budget"}

function draw(rollout) {
  $("rollout").replaceChildren(
    el("h2", {}, rollout.right ? "✓ right" : "✗ not right", `, ${rollout.patterns.at(-1)}, `,
      ends[rollout.finish] ?? rollout.finish),
    el("p", {}, `The right answer: ${rollout.truth || "a program that passes"}`),
    el("ol", {}, given("Problem", rollout.question),
      ...rollout.turns.flatMap((_, k) => stepOf(rollout, k))))
  $("readout").textContent = "Point at a token, tap it or focus it: its numbers, in nats."
}

// --- Choosing ---

const drift = rollout => Math.max(...rollout.turns.map(turn => turn.d ?? Infinity))
const kinds = {
  ...data.scored && {"most drifted first": rows => [...rows].sort((a, b) => drift(b) - drift(a))},
  "all, as sampled": rows => rows,
  "not right": rows => rows.filter(r => !r.right),
  "recovered from a failed call": rows => rows.filter(r => r.patterns.at(-1) === "recovery"),
  "cut off": rows => rows.filter(r => r.finish !== "answer"),
}
let rows = [], at = 0

function go(to) {
  at = Math.max(0, Math.min(to, rows.length - 1))
  $("at").value = at + 1
  $("count").textContent = `${rows.length && at + 1} of ${rows.length}`
  $("back").disabled = at === 0
  $("next").disabled = at >= rows.length - 1
  if (rows.length) draw(rows[at])
  else $("rollout").replaceChildren("No rollout of this training step is of this kind.")
}

function choose() {
  const all = data.steps[$("step").value]
  for (const option of $("show").options)
    option.textContent = `${option.value} (${kinds[option.value](all).length})`
  rows = kinds[$("show").value](all)
  go(0)
  curves()
}

function tell({target}) {
  if (target.told) $("readout").textContent = target.told
}

function press(event) {
  const {key, target} = event, way = {ArrowLeft: -1, ArrowRight: 1}[key]
  if (key === "Escape" && target.told) target.blur()
  if (!way || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return
  if (target.matches("select, input")) return
  event.preventDefault()
  if (target.told) (way > 0 ? target.nextSibling : target.previousSibling)?.focus()
  else go(at + way)
}

// --- Curves of the run ---

function chart(title, xs, solid, dashed = [], band = []) {
  const ys = [...solid, ...dashed, ...band.flat()].filter(known)
  if (!ys.length) return []
  const low = Math.min(...ys), high = Math.max(...ys), [first, last] = [xs[0], xs.at(-1)]
  const at = (v, i) => `${40 + 252 * (xs[i] - first) / (last - first || 1)} ` +
    (8 + 94 * (high - v) / (high - low || 1))
  const points = values => values.map((v, i) => known(v) ? at(v, i) : "").filter(Boolean)
  const path = (name, d) => el("path", {class: name, d})
  const line = (name, values) => points(values).length
    ? [path(name, `M${points(values).join("L")}${points(values).length > 1 ? "" : "h4"}`)] : []
  const write = (word, x, y, anchor) => el("text", {x, y, "text-anchor": anchor}, `${word}`)
  const ends = [solid[0], solid.at(-1), low, high].map(v => show(v))
  const said = `from ${ends[0]} to ${ends[1]}, on a scale from ${ends[2]} to ${ends[3]}`
  return [el("figure", {}, el("figcaption", {}, title), el("svg",
    {viewBox: "0 0 300 120", role: "img", "aria-label": `${title}: ${said}`},
    path("axes", "M40 8V102H292"), ...band.length ? [path("band",
      `M${[...points(band[0]), ...points(band[1]).reverse()].join("L")}Z`)] : [],
    ...line("", solid), ...line("dashed", dashed),
    write(show(high), 36, 16, "end"), write(show(low), 36, 102, "end"),
    write(first, 40, 116, "start"), write(last, 292, 116, "end")))]
}

function curves() {
  const of = key => data.curves.map(row => row[key]), xs = of("step")
  const w = i => data.curves.map(row => row.w_quantiles?.[i])
  const drifts = step => data.curves.find(row => row.step === step)?.d_by_step ?? []
  const [start, now] = [xs[0], +$("step").value], longest = [drifts(now), drifts(start)]
    .reduce((a, b) => a.length > b.length ? a : b)
  $("curves").replaceChildren(
    ...chart("reward, mean; dashed: share right", xs, of("reward"), of("right")),
    ...chart("reverse KL, nats", xs, of("reverse_kl")),
    ...chart("w: median, and from 10% to 90%", xs, w(2), [], [w(0), w(4)]),
    ...chart(`d by step of a rollout, at training step ${now}; dashed: ${start}`,
      longest.map((_, k) => k + 1), drifts(now), drifts(start)),
    ...chart("entropy, nats" + (data.scored ? "; dashed: the teacher's" : ""), xs,
      of("entropy"), of("teacher_entropy")),
    ...chart("tool calls that failed, share", xs, of("tool_fail")),
    ...chart("loss", xs, of("loss")), ...chart("norm of the gradient", xs, of("grad_norm")))
}

// --- The start ---

document.title = $("name").textContent = `Rollouts of ${data.name}`
$("about").textContent = data.about
$("words").append(...Object.entries(data.words).flatMap(([word, meaning]) =>
  [el("dt", {}, word), el("dd", {}, meaning)]))
$("legend").append(...!data.scored ? [] : ["log p teacher − log p student, nats: ",
  ...[-3, -2, -1, 0, 1, 2, 3].map(gap => shade(el("span", {}, show(gap, 0)), gap)),
  " underlined: the teacher finds it less likely, by 1 or more; overlined: likelier"])
$("step").append(...Object.keys(data.steps).map(step => el("option", {}, step)))
$("show").append(...Object.keys(kinds).map(name => el("option", {value: name}, name)))
$("step").onchange = $("show").onchange = choose
$("at").onchange = () => go($("at").value - 1)
$("back").onclick = () => go(at - 1)
$("next").onclick = () => go(at + 1)
$("rollout").onpointerover = $("rollout").onclick = tell
$("rollout").addEventListener("focusin", tell)
$("run").hidden = !data.curves.length
if ($("step").value) {
  document.onkeydown = press
  choose()
} else {
  for (const part of ["choice", "legend", "readout", "glossary"]) $(part).hidden = true
  curves()
}
"""
# --- The study: the paper's rows in the embedded world, over seeds ------------------------------

STUDY = dict(       # sod_mini's settings of every run; the other ones are its defaults
    steps=16,               # with the next two: 1,024 rollouts and 32 optimiser steps,
    prompts_per_step=8,     # enough to triple the start's score, not enough to reach the ceiling,
    group_size=8,           # in under a minute of one CPU thread
    eval_problems=200,      # many problems, few samples: the smallest error for 400 rollouts
    eval_samples=2)
STUDY_SECONDS = 55          # of one run, where none has been measured yet
ROWS = {
    "vanilla": dict(method="vanilla"),
    "teacher": dict(method="vanilla", student=WORLD.teacher),
    "sft": dict(method="sft", sft_epochs=1, sft_lr=WORLD.lr),  # see learn: an equal budget
    **{name: dict(method=name) for name in sod.METHODS},
    **{name: dict(weights=name) for name in sod.WEIGHTS if name not in ("sod", "uniform")},
    "opd_full": dict(method="opd", kl="full"), "sod_full": dict(kl="full"),
    "seasoned": dict(method="grpo", student=WORLD.teacher, steps=48, lr=1e-4),
    "signal": dict(steps=1, prompts_per_step=64, updates_per_step=1, lr=1e-12, eval_samples=4),
}
CONDITIONS = {  # row@condition: the world, or the teacher, is another one
    "": {}, "quiet": dict(silent_rate=0.0), "loud": dict(silent_rate=0.3),
    "seasoned": {},  # the teacher is the row "seasoned": it has practised with a failing tool
}
STUDY_ROWS = ["seasoned", *(row for row in ROWS if row != "seasoned"),
              *(f"{row}@{world}" for world in ("quiet", "loud")
                for row in ("vanilla", "opd", "sod")), "opd@seasoned", "sod@seasoned"]
CLASSES = ("no failed call yet", "its call fails", "after a failed call")


def study_config(row, seed, folder, budget):
    """sod_mini's settings of one run."""
    name, _, world = row.partition("@")
    if name not in ROWS or world not in CONDITIONS:
        raise ValueError(f"the study has no row {row}; choose from {', '.join(STUDY_ROWS)}")
    changes = {**budget, **ROWS[name], **CONDITIONS[world]}
    if name == "seasoned":
        changes["steps"] = 3 * budget["steps"]
    if world == "seasoned":
        changes["teacher"] = str(study_file("seasoned", 0, folder, budget).with_suffix("")
                                 / "checkpoint")
    rollouts = changes["prompts_per_step"] * budget["group_size"]
    return sod.Config(**changes, seed=seed,
                      sft_batch=rollouts // changes.get("updates_per_step", WORLD.updates_per_step))


def study_file(row, seed, folder, budget):
    """Where one run is stored; the name changes with any setting."""
    text = json.dumps(asdict(study_config(row, seed, folder, budget)), sort_keys=True)
    return Path(folder) / f"{row}-{seed}-{zlib.crc32(text.encode()):08x}.json"


def study_run(row, seed, folder, budget):
    """Train and measure one row from one seed; its file is written once all is measured."""
    path, config = study_file(row, seed, folder, budget), study_config(row, seed, folder, budget)
    clock, agent = time.perf_counter(), sod.load_agent(config)
    with agent.tool:
        found = (signal_of if row == "signal" else learn)(agent, config)
        problems = sod.eval_problems(agent, config)
        found["right"] = sod.evaluate(agent.student, agent, problems, config).astype(int).tolist()
    if row == "seasoned":
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)  # of a run that was cut off
        path.with_suffix("").mkdir()
        sod.save_checkpoint(agent, path.with_suffix(""))
    path.with_suffix(".part").write_text(json.dumps(
        {"row": row, "seed": seed, **found, "seconds_all": time.perf_counter() - clock}))
    path.with_suffix(".part").replace(path)  # half a run never carries the name


def learn(agent, config):
    """Train; the numbers of each step that the table and the figures need."""
    found = {"curve": [], "drift": [], "patterns": [], "example": None, "tokens": 0}
    clock, best = time.perf_counter(), 0.0
    if config.method == "sft":  # as many conversations as the others have rollouts
        pairs, skipped = agent.practice
        count = min(config.steps * config.prompts_per_step * config.group_size, len(pairs))
        agent.practice = random.Random(config.seed).sample(pairs, count), skipped
        found["tokens"] = sum(k >= 0 for _, step_id in agent.practice[0] for k in step_id)
    for m in sod.train(config, agent):
        found["tokens"] += m.get("tokens", 0)
        found["curve"].append({k: m[k] for k in ("right", "reward", "d", "w", "entropy") if k in m})
        if getattr(sod.METHODS.get(config.method), "view", "") == "teacher":
            rises = recoveries(agent.scored)
            found["drift"].append(drift_table(agent.scored))
            found["patterns"].append(pattern_shares(agent.scored))
            if max(rises) > best:
                best, i = max(rises), int(np.argmax(rises))
                found["example"] = list(sod.rollout_rows(agent.scored, m["step"], agent.tokenizer,
                                                          with_tokens=0))[i]
    return found | {"seconds": time.perf_counter() - clock}


def failed_calls(scored):
    """(B, K) bool: the call of step k failed; and: one before step k did."""
    return scored.failed, scored.failed.cumsum(1) - scored.failed.long() > 0


def drift_table(scored):
    """For each of CLASSES and each k: [steps, sum of d, sum of the teacher's mean entropy]."""
    (failed, before), K = failed_calls(scored), scored.d.shape[1]
    tokens = sod.step_tokens(scored.step_id, K)
    inside = torch.where(scored.step_id >= 0, scored.entropy_t, 0.0)
    entropy = sod.step_sums(inside, scored.step_id, K) / tokens.clamp(min=1)
    kinds = torch.where(before, 2, failed.long())  # index into CLASSES
    return [[[int(at.sum()), float(scored.d[at, k].sum()), float(entropy[at, k].sum())]
             for k in range(K) for at in [(kinds[:, k] == kind) & (tokens[:, k] > 0)]]
            for kind in range(len(CLASSES))]


PATTERNS = ("stable", "recovery", "erroneous")


def pattern_shares(scored):
    """Shares of the three patterns in a batch; a rollout has that of its last step."""
    seen = Counter(patterns(r.outcomes)[-1] for r in scored.rollouts)
    return [seen[name] / len(scored.rollouts) for name in PATTERNS]


def recoveries(scored):
    """How far SOD's weight rises again in each right rollout with a failed call; 0 in others."""
    w, (failed, _) = sod.step_weights(scored.d), failed_calls(scored)
    return [float(w[i, len(r.outcomes) - 1] - w[i, :len(r.outcomes)].min())
            if r.right and failed[i].any() and 5 <= len(r.outcomes) <= 8 else 0.0
            for i, r in enumerate(scored.rollouts)]


# --- The study: does the teacher's signal point the right way? ----------------------------------

def signal_of(agent, config):
    """One step along logp_t - logp_s of some tokens only, from the start: what becomes of success?

    The classes differ in step index and in whether a call failed before. All steps move each
    parameter by lr, as AdamW's first step does, so only their directions are compared. Success is
    average@k on held-out problems, sampled with the same random numbers each time.
    """
    clock, problems = time.perf_counter(), sod.eval_problems(agent, config)
    start = copy.deepcopy(agent.student.state_dict())
    next(sod.train(config, agent))  # samples and scores a batch; its own step is too small to count
    scored, found = agent.scored, {}
    signal = scored.logp_t - scored.logp_s  # (B, T)
    right = torch.tensor([r.right for r in scored.rollouts])[:, None]
    mean = lambda at: float(signal[at].mean()) if at.any() else None
    for name, tokens in signal_classes(scored).items():
        step_along(agent.student, scored, torch.where(tokens, signal, 0.0), config)
        found[name] = {"tokens": int(tokens.sum()), "mean": mean(tokens),
                       "in_right": mean(tokens & right), "in_wrong": mean(tokens & ~right),
                       "right": float(sod.evaluate(agent.student, agent, problems, config).mean())}
        agent.student.load_state_dict(start)
    return {"signal": found, "tokens": int((scored.step_id >= 0).sum()),
            "seconds": time.perf_counter() - clock}


def signal_classes(scored):
    """{class: (B, T) bool}: all tokens, then by step index and by a failed call before the step."""
    k = scored.step_id
    before = failed_calls(scored)[1].gather(1, k.clamp(min=0))
    places = {"step 1": k == 0, "step 2": k == 1, "step 3": k == 2, "step 4 and later": k > 2}
    classes = {f"{CLASSES[2 * after]}, {place}": at & (before == bool(after))
               for after in (0, 1) for place, at in places.items()}
    del classes[f"{CLASSES[2]}, step 1"]  # nothing comes before the first step
    return {"all": k >= 0, **classes}


def step_along(model, scored, signal, config, lr=WORLD.lr):
    """Move each parameter by lr towards a larger sum of signal * log pi over the tokens.

    signal  (B, T) what each token is worth, 0 for those that do not count
    """
    weights = list(model.parameters())
    grads = [torch.zeros_like(p) for p in weights]
    for rows in sod.micro_batches([len(r.ids) for r in scored.rollouts], config.micro_batch_tokens):
        ids = sod.pad([scored.rollouts[i].ids for i in rows], 0, model.device)
        step_id = scored.step_id[rows, :ids.shape[1]]
        logp = sod.sampled_logprobs(model, ids, step_id, config.temperature)
        found = torch.autograd.grad((signal[rows, :ids.shape[1]] * logp).sum(), weights)
        grads = [g + new for g, new in zip(grads, found)]
    with torch.no_grad():
        for p, g in zip(weights, grads):
            p += lr * g.sign()


# --- The study: many runs at a time, and again after an interruption ----------------------------


def study(rows, seeds, jobs, folder="runs/study", budget=STUDY):
    """Run what is missing, `jobs` at a time, each in its own process; then the table and figures.

    returns  the number of runs that failed
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    rows = list(dict.fromkeys(rows + ["seasoned"] * any("@seasoned" in row for row in rows)))
    plan = {(row, seed): study_file(row, seed, folder, budget)
            for seed in range(seeds) for row in sorted(rows, key=lambda row: row != "seasoned")
            if row != "seasoned" or seed == 0}
    todo = [job for job, path in plan.items() if not path.exists()]
    print(f"{len(rows)} rows x {seeds} seeds: {len(plan)} runs, {len(plan) - len(todo)} done; "
          f"about {minutes_left(plan, todo, jobs):.0f} minutes for the others, {jobs} at a time; "
          "after an interruption the same command continues", flush=True)
    failed = run_jobs(plan, todo, jobs, folder, budget)
    results = defaultdict(dict)
    for (row, seed), path in plan.items():
        if path.exists():
            results[row][seed] = json.loads(path.read_text())
    text = study_report(results, rows, seeds, len(plan), budget)
    (Path(folder) / "study.md").write_text(text + "\n", encoding="utf-8")
    for name, svg in study_figures(results).items():
        (Path(folder) / name).write_text(svg, encoding="utf-8")
    print(f"\n{text}\n\ntable and figures  {folder}")
    return failed


def minutes_left(plan, todo, jobs):
    """From the median seconds of each row's finished runs, or of all of them, or a guess."""
    seconds = defaultdict(list)
    for (row, _), path in plan.items():
        if path.exists():
            seconds[row].append(json.loads(path.read_text())["seconds_all"])
    known = {row: np.median(times) for row, times in seconds.items()}
    usual = np.median(list(known.values())) if known else STUDY_SECONDS
    return sum(known.get(row, usual) for row, _ in todo) / jobs / 60


def run_jobs(plan, todo, jobs, folder, budget):
    """A process a run; one that fails is told, and loses only its own run. Returns how many."""
    todo, running, failed = list(todo), {}, 0
    ready = lambda row: "@seasoned" not in row or plan["seasoned", 0].exists()
    try:
        while running or any(ready(row) for row, _ in todo):
            for job in [job for job in todo if ready(job[0])][:jobs - len(running)]:
                todo.remove(job)
                running[job] = start_job(*job, plan[job], folder, budget)
            time.sleep(0.1)
            for job in [job for job, process in running.items() if process.poll() is not None]:
                failed += not end_job(plan, job, running.pop(job), todo, jobs)
    finally:
        for process in running.values():
            process.kill()
    return failed + len(todo)  # what is left waited for a teacher that failed


def start_job(row, seed, path, folder, budget):
    """One thread each: two runs side by side are faster than one after the other on two cores."""
    order = json.dumps({"row": row, "seed": seed, "folder": str(folder), "budget": budget})
    with open(path.with_suffix(".log"), "w", encoding="utf-8") as log:
        return subprocess.Popen([sys.executable, __file__, "--worker", order], stdout=log,
                                stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def end_job(plan, job, process, todo, jobs):
    """Say what came of a run; True if it is stored."""
    path, (row, seed) = plan[job], job
    if process.returncode or not path.exists():
        last = (path.with_suffix(".log").read_text().strip().splitlines() or ["no output"])[-1]
        print(f"{row} seed {seed} FAILED with status {process.returncode}: {last}", flush=True)
        return False
    path.with_suffix(".log").unlink()
    found, done = json.loads(path.read_text()), sum(path.exists() for path in plan.values())
    print(f"{done}/{len(plan)}  {row} seed {seed}: {100 * np.mean(found['right']):.1f}% in "
          f"{found['seconds_all']:.0f} s | {minutes_left(plan, todo, jobs):.0f} min left",
          flush=True)
    return True

# --- The study: table and figures ---------------------------------------------------------------


def t_interval(values):
    """(mean, low, high) of values, one a seed: the 95% interval of Student's t with n - 1 degrees.

    >>> mean, low, high = t_interval([1.0, 2.0, 3.0])
    >>> round(mean, 2), round(low, 2), round(high, 2)  # 2 -+ 4.303 / sqrt(3)
    (2.0, -0.48, 4.48)
    """
    mean, std = mean_and_std(values)
    reach = t_975(len(values) - 1) * std / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return mean, mean - reach, mean + reach


def t_975(freedom):
    """The 97.5% quantile of Student's t: where its density, summed from 0, reaches .475."""
    t = np.linspace(0, 13, 130_001)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    density = math.exp(log_scale) / math.sqrt(freedom * math.pi) * (
        1 + t * t / freedom) ** (-(freedom + 1) / 2)
    area = np.cumsum((density[1:] + density[:-1]) / 2) * t[1]
    return float(np.interp(0.475, area, t[1:]))


def against(results, row, rival):
    """Points by which a row beats its rival in the same world, paired by seed, as a table cell."""
    _, at, world = row.partition("@")
    other = results.get(f"{rival}{at}{world}", {})
    seeds = sorted(results[row].keys() & other.keys())
    if len(seeds) < 2 or f"{rival}{at}{world}" == row:
        return ""
    score = lambda run: 100 * np.mean(run["right"])
    mean, low, high = t_interval([score(results[row][s]) - score(other[s]) for s in seeds])
    word = "better" if low > 0 else "worse" if high < 0 else "open"
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}) {word}"


def study_report(results, rows, seeds, planned, budget):
    """The table of all rows and the table of the signal, as markdown."""
    runs = [run for row in results.values() for run in row.values()]
    spent = sum(run["seconds_all"] for run in runs)
    lines = [f"average@{budget['eval_samples']} on {budget['eval_problems']} held-out problems, in "
             f"percent, mean ± std over {seeds} seeds (or the number in brackets); "
             f"{budget['steps']} steps of {budget['prompts_per_step'] * budget['group_size']} "
             "rollouts.",
             f"{len(runs)} of {planned} runs, {spent / 60:.0f} minutes of one thread in all.",
             "Paired by seed: difference in points, 95% t interval over seeds, and what it says; "
             "of twenty such verdicts one is expected to be wrong.", "",
             "| row | average | minus opd | minus sod | tokens sampled | seconds |",
             "|---|---:|---|---|---:|---:|"]
    for row in [row for row in rows if results.get(row) and row != "signal"]:
        found = results[row].values()
        mean, std = mean_and_std([100 * np.mean(run["right"]) for run in found])
        tokens, seconds = (np.mean([run[name] for run in found]) for name in ("tokens", "seconds"))
        lines.append(f"| {row} | {mean:.1f}" + (f" ± {std:.1f}" if std == std else "")
                     + f" ({len(found)})" * (len(found) < seeds)
                     + f" | {against(results, row, 'opd')} | {against(results, row, 'sod')} | "
                     f"{tokens:,.0f} | {seconds:.0f} |")
    return "\n".join(lines + signal_report(results.get("signal", {})))


def signal_report(runs):
    """What one step along the teacher's signal of some tokens does to success, as a table."""
    if not runs:
        return []
    lines = ["", "One step of equal length along logp_t - logp_s of some tokens, from the start: "
             "change of success in points, 95% t interval over seeds.", "",
             "| tokens of steps | share of tokens | mean signal, nats | in right, wrong rollouts | "
             "change of success |", "|---|---:|---:|---:|---|"]
    cell = lambda values, form: format(np.mean([v for v in values if v is not None] or [math.nan]),
                                       form)
    for name in next(iter(runs.values()))["signal"]:
        found = [run["signal"][name] for run in runs.values()]
        mean, low, high = t_interval([100 * (one["right"] - np.mean(run["right"]))
                                      for one, run in zip(found, runs.values())])
        share = [one["tokens"] / run["tokens"] for one, run in zip(found, runs.values())]
        lines.append(f"| {name} | {cell(share, '.0%')} | {cell([o['mean'] for o in found], '+.2f')}"
                     f" | {cell([o['in_right'] for o in found], '+.2f')}, "
                     f"{cell([o['in_wrong'] for o in found], '+.2f')} | "
                     f"{mean:+.1f} ({low:+.1f} to {high:+.1f}) |")
    return lines


def study_figures(results):
    """{file name: SVG} of what the finished runs can show."""
    figures, percent = {}, lambda run, name: [100 * step[name] for step in run["curve"]]
    shown = [row for row in ("sod", "opd", "grpo", "opd_only", "sod_only") if results.get(row)]
    if shown:
        lines = {row: band([percent(run, "right") for run in results[row].values()])
                 for row in shown}
        figures["learning.svg"] = chart(
            "Learning curves", "Right rollouts by training step; mean and std over seeds.",
            [("Right rollouts", "training step", "%", lines)])
    if results.get("sod"):
        runs = list(results["sod"].values())
        figures["drift.svg"] = chart(
            "Drift after a failed call", "d_k and the teacher's entropy by step of the rollout, "
            "in all training rollouts of SOD; mean and std over seeds.",
            [(what, "step k", "nats/token", {kind: drift_line(runs, c, column)
                                             for c, kind in enumerate(CLASSES)})
             for what, column in (("Divergence d_k", 1), ("Entropy of the teacher", 2))])
        shares = lambda row, n: band([[100 * step[n] for step in run["patterns"]]
                                      for run in results[row].values()])
        figures["patterns.svg"] = chart(
            "Patterns of rollouts over training", "Shares of stable, recovering and erroneous "
            "rollouts by training step; mean and std over seeds.",
            [(row, "training step", "%", {name: shares(row, n) for n, name in enumerate(PATTERNS)})
             for row in ("sod", "opd") if results.get(row)])
        example = next((run["example"] for run in runs if run["example"]), None)
        if example:
            figures["weights.svg"] = weights_picture(example)
    return figures


def band(curves):
    """Curves of several seeds -> [(x, mean, low, high)], a standard deviation either side."""
    mean = np.mean(curves, axis=0)
    std = np.std(curves, axis=0, ddof=1) if len(curves) > 1 else 0 * mean
    return [(x, m, m - s, m + s) for x, (m, s) in enumerate(zip(mean, std), 1)]


def drift_line(runs, kind, column, fewest=20):
    """[(k, mean, low, high)] over seeds; only where each seed has seen enough steps to average."""
    line, K = [], max(len(table[kind]) for run in runs for table in run["drift"])
    for k in range(K):
        cells = np.array([np.sum([table[kind][k] for table in run["drift"] if k < len(table[kind])],
                                 axis=0) for run in runs])  # (seeds, 3)
        if cells[:, 0].min() >= fewest:
            mean, std = mean_and_std(cells[:, column] / cells[:, 0])
            std = 0.0 if math.isnan(std) else std
            line.append((k + 1, mean, mean - std, mean + std))
    return line


FIGURE_STYLE = """<style>
text{font:13px system-ui,sans-serif;fill:#24292f}.title{font-weight:600}.small{font-size:12px}
.page{fill:#fff}.grid{stroke:#d8dee4}.line{fill:none;stroke-width:2}.band{opacity:.18}
@media(prefers-color-scheme:dark){text{fill:#dde3ea}.page{fill:#0d1117}.grid{stroke:#30363d}}
</style>"""
COLOURS = ("#2f81f7", "#d9730d", "#2da44e", "#bf4fb5", "#8b949e")  # seen on white and on black
DASHES = ("", "7 3", "2 3", "9 3 2 3", "1 4")  # and told apart without colour


def svg(width, height, title, description, body):
    escape = html.escape
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" role="img" aria-labelledby="t d">\n<title id="t">{escape(title)}'
            f'</title>\n<desc id="d">{escape(description)}</desc>\n{FIGURE_STYLE}\n'
            f'<rect class="page" width="{width}" height="{height}"/>\n' + "\n".join(body)
            + "\n</svg>\n")


def label(x, y, text, more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{html.escape(str(text))}</text>'


def chart(title, description, panels, width=440, height=300):
    """Panels side by side, each (heading, x label, y label, {name: [(x, y, low, high)]})."""
    body = [f'<g transform="translate({n * width} 0)">\n' + "\n".join(axes_and_lines(*panel))
            + "\n</g>" for n, panel in enumerate(panels)]
    return svg(width * len(panels), height, title, description, body)


def ticks(top, most=5):
    """Round numbers from 0 to at least `top`, at most `most` steps."""
    unit = 10.0 ** math.floor(math.log10(top / most))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m * most >= top)
    return [step * n for n in range(math.ceil(round(top / step, 6)) + 1)]


def axes_and_lines(heading, x_label, y_label, lines, box=(48, 44, 270, 210)):
    """One panel: grid from 0, a band and a line for each name, the name at the line's end."""
    (left, up, wide, tall), points = box, [p for line in lines.values() for p in line]
    last, levels = max(p[0] for p in points), ticks(max(p[3] for p in points))
    x_of = lambda x: left + wide * (x - 1) / max(last - 1, 1)
    y_of = lambda y: up + tall * (1 - max(y, 0) / levels[-1])
    body = [label(left, 18, heading, ' class="title"'), label(left, 35, y_label, ' class="small"'),
            label(left + wide / 2, up + tall + 36, x_label, ' class="small" text-anchor="middle"')]
    for y in levels:
        body += [f'<path class="grid" d="M{left} {y_of(y):.1f}h{wide}"/>',
                 label(left - 6, y_of(y) + 4, f"{y:g}", ' class="small" text-anchor="end"')]
    for x in range(1, last + 1, max(1, math.ceil(last / 8))):
        body += [label(x_of(x), up + tall + 18, x, ' class="small" text-anchor="middle"')]
    ends = spread_out([y_of(line[-1][1]) if line else 0 for line in lines.values()])
    for (name, line), y, colour, dash in zip(lines.items(), ends, COLOURS, DASHES):
        if line:
            path = lambda column: [f"{x_of(p[0]):.1f},{y_of(p[column]):.1f}" for p in line]
            body += [f'<polygon class="band" fill="{colour}" points="'
                     f'{" ".join(path(2) + path(3)[::-1])}"/>',
                     f'<polyline class="line" stroke="{colour}" stroke-dasharray="{dash}" '
                     f'points="{" ".join(path(1))}"/>',
                     label(left + wide + 8, y + 4, name, f' style="fill:{colour}"')]
    return body


def spread_out(heights, gap=16):
    """The same heights, moved down where labels would cover each other."""
    placed, lowest = {}, -math.inf
    for n in sorted(range(len(heights)), key=lambda n: heights[n]):
        placed[n] = lowest = max(heights[n], lowest + gap)
    return [placed[n] for n in range(len(heights))]


def weights_picture(row):
    """w_k along one rollout: a bar a step, beside what was called and what came of it."""
    body = [label(16, 26, f"“{row['question']}”", ' class="title"'),
            label(16, 50, "step k", ' class="small"'), label(330, 50, "d_k", ' class="small"'),
            label(380, 50, "w_k: how far the teacher is trusted", ' class="small"')]
    for k, turn in enumerate(row["turns"]):
        call, y = tools.parse_tool_call(turn["text"]), 80 + 44 * k
        said = call.code if call and not call.fault else turn["text"]
        answer = (turn["tool"] or "the answer").strip().splitlines()[-1]
        bad = turn["outcome"] not in sod.FINE
        body += [label(16, y, f"{k + 1}  {said.strip()[:38]}"),
                 label(30, y + 17, ("✗ " if bad else "→ ") + answer[:44], ' class="small"'),
                 label(330, y, f"{turn['d']:.2f}"),
                 f'<rect x="380" y="{y - 13}" width="{200 * turn["w"]:.1f}" height="18" rx="3" '
                 f'fill="{COLOURS[1 if bad else 0]}"/>',
                 label(388 + 200 * turn["w"], y, f"{turn['w']:.2f}")]
    return svg(680, 76 + 44 * len(row["turns"]), "w_k along a rollout that recovers",
               "Each step's call, divergence d_k and weight w_k; ✗ marks failed calls.", body)


# --- The command -------------------------------------------------------------------------------


TAKES = {  # settings that mean something to the commands that sample nothing
    "download": {"benchmarks"}, "table": set(), "page": set(), "study": set(), "worker": set(),
    "rescore": {"benchmarks", "tool_timeout", "tool_chars", "tool_modules", "tool_unsafe"},
}


def parse(argv=None):
    """(arguments, {name: value} of the given settings); wrong ones end with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        usage="python evaluate.py [--model MODEL ...] [--data DATA ...] [--OPTION VALUE ...]",
        epilog="Data other than world: " + ", ".join(f"{name} {value!r}" for name, value
                                                     in PAPER.items() if name != "system"),
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=100))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", nargs="+", default=[WORLD.student, WORLD.teacher],
                      help="folders or Hub ids; default: the embedded student and teacher")
    what.add_argument("--compare", nargs=2, metavar=("A", "B"),
                      help="two models, or two files of samples: the verdict")
    what.add_argument("--rescore", metavar="FILE", help="grade the samples of a file again")
    what.add_argument("--table", nargs="+", metavar="FILE", help="the paper's table with the rows "
                      "of these files beside; SIZE/METHOD=FILE puts one under a row of the paper")
    what.add_argument("--download", metavar="NAME", help="fetch a benchmark from the Hub")
    what.add_argument("--page", metavar="FOLDER", help="write rollouts.html of a run")
    parser.add_argument("--step", nargs="+", type=int, default=[], help="training steps on the "
                        "page; default: the first, the middle and the last")
    what.add_argument("--study", action="store_true", help="every method in the embedded world, "
                      "over seeds: table and figures in runs/study; resumable")
    what.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)  # one run of the study
    parser.add_argument("--rows", nargs="+", default=STUDY_ROWS, metavar="ROW",
                        help=f"rows of the study: {', '.join(STUDY_ROWS)}")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the study [5]")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time of the study [2]")
    parser.add_argument("--data", nargs="+", help="files, or names: world, "
                        + ", ".join(BENCHMARKS) + "; default: world")
    sod.add_options(parser, Config, __file__, sod.choices())
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    for command, takes in TAKES.items():
        useless = given.keys() - takes | ({"data"} if args.data else set())
        if getattr(args, command) and useless:
            parser.error(f"--{command} makes no use of --{min(useless)}")
    if args.step and not args.page:
        parser.error("--step goes with --page FOLDER")
    args.data = list(dict.fromkeys(args.data or ["world"]))
    try:
        for data in args.data:
            settings(data, given)
    except ValueError as error:
        parser.error(str(error))
    return args, given


def evaluate_all(models, datas, given):
    """Every model on every benchmark; a report of each benchmark and the macro average."""
    found = defaultdict(list)
    loaded = {data: load_benchmark(data, settings(data, given)) for data in datas}
    for name in models:  # all of them are looked at before the first one is sampled from
        sod.load_tokenizer(name)
        for data in datas:
            sod.check_window(name, sod.skeleton(name), settings(data, given))
    for name in models:
        model, tokenizer = load_model(name, settings(datas[0], given))
        for data in datas:
            one, path = evaluate(name, data, loaded[data], model, tokenizer,
                                 settings(data, given))
            print(f"samples  {path}")
            found[data].append(one)
    for ones in found.values():
        print("\n" + report(ones))
    if len(datas) > 1:
        print(f"\nmean of {len(datas)} benchmarks, each counted once")
        for rows in zip(*found.values()):
            print(f"{np.mean([100 * average_at_k(one.correct()) for one in rows]):.2f}%  "
                  f"{rows[0].model}")


def run(args, given):
    """Do what the command says; the exit status."""
    if args.worker:
        study_run(**args.worker)
    elif args.study:
        return int(study(args.rows, args.seeds, args.jobs) > 0)
    elif args.download:
        config = settings(args.download, given)
        path = download(args.download, config.benchmarks)
        print(f"{path}  {len(load_benchmark(args.download, config))} problems")
    elif args.page:
        print(write_page(args.page, args.step))
    elif args.table:
        print(paper_table(args.table))
    elif args.rescore:
        one, path = rescore(args.rescore, given)
        print(f"samples  {path}\n\n{report([one])}")
    elif args.compare and all(Path(name).is_file() for name in args.compare):
        a, b = map(read_finished, args.compare)
        print(verdict_of(a, b, args.compare if a.model == b.model else ()))
    else:
        evaluate_all(list(dict.fromkeys(args.compare or args.model)), args.data, given)
    return 0


def main(argv=None):
    """Exit status: 0 done, 1 stopped with a sentence, 2 wrong options, 130 interrupted."""
    args, given = parse(argv)
    try:
        return run(args, given)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues where this one stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
