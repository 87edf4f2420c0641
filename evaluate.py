"""Put models against benchmarks: average@k with its interval, and a verdict on two models.

    python evaluate.py                                    the embedded models, half a minute
    python evaluate.py --model Qwen/Qwen3-0.6B --data aime2024 aime2025
    python evaluate.py --compare FILE_A FILE_B            two files of samples: which is better?
    python evaluate.py --rescore FILE                     grade stored samples again
    python evaluate.py --page runs/NAME 1 25              iterations of a run, as a web page

Each model on each benchmark has one file of samples, a JSON line a sample, named after everything
that decides what is in it. The same command continues an interrupted file, and ends with the same
table: what is random depends on the seed and the place in the file alone.

Notation
    P, R, k     problems, runs (each with random numbers of its own), samples of a problem in a run
    n, c        samples of one problem, right ones among them
    score       share of right samples of one problem
    correct     (R, P, k) of 0 and 1, or P rows of samples in the functions of one number
"""
import argparse
import base64
import csv
import hashlib
import html
import io
import json
import math
import os
import pickle
import random
import re
import sys
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import sod_mini as sod
import tools
from tools import UserError

# --- Settings --------------------------------------------------------------------------------

WORLD = sod.Config  # its defaults
BOUNDS = {**sod.BOUNDS, "k": (1, math.inf), "runs": (1, math.inf),
          "top_p": sod.BOUNDS["eval_top_p"]}


@dataclass
class EvalConfig(sod.Sampling):
    """How to evaluate. Defaults are those of the embedded world; PAPER is for all other data."""
    k: int = WORLD.eval_samples                   # samples a problem in one run: average@k
    runs: int = 1                                 # runs, as the paper has them: mean and deviation
    limit: int = 0                                # first problems to take, 0 for all
    temperature: float = WORLD.eval_temperature   # of sampling
    top_p: float = WORLD.eval_top_p               # nucleus of sampling
    benchmarks: str = "benchmarks"                # folder of downloaded benchmarks
    out: str = "runs/evaluate"                    # folder of the files of samples

    def __post_init__(self):
        sod.check_values(self, BOUNDS)


PAPER = {name: value for name, value in sod.PRESETS["paper"].items()
         if name in sod.Sampling.__annotations__}
PAPER.update(k=32, runs=5, temperature=1.0, top_p=0.6, max_prompt=4096, rollout_batch=64)


def benchmark_config(data, given):
    """The settings of one benchmark: the world's or the paper's, then the command line's."""
    is_world = data == "world" or Path(os.path.realpath(data)).parent == Path(sod.WORLD).resolve()
    return EvalConfig(**{**(dict(limit=WORLD.eval_problems) if is_world else PAPER), **given})


def stored_settings(config):
    """All settings but the folders, which decide nothing about a sample."""
    return {k: v for k, v in vars(config).items() if k not in ("benchmarks", "out")}


# --- Benchmarks: what they are and where they lie ----------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """A file that other people's numbers come from."""
    rows: int           # what the whole file holds
    repo: str           # data set on the Hub
    file: str           # file of that data set
    months: tuple = ()  # first and last month of the contests that count
    paper: str = ""     # average@32 in %, mean of 5 runs: SOD 0.6B, SOD 1.7B, their 4B teacher


BENCHMARKS = {
    "aime2024": Benchmark(30, "math-ai/aime24", "test-00000-of-00001.parquet",
                          paper="20.84, 50.83, 67.60"),
    "aime2025": Benchmark(30, "math-ai/aime25", "test.jsonl", paper="26.13, 41.72, 60.42"),
    "gpqa_diamond": Benchmark(198, "Idavidrein/gpqa", "gpqa_diamond.csv",
                              paper="22.19, 38.72, 55.19"),
    # The sixth file has 175 rows from 2025-01 on; how many lie in these months is told.
    "livecodebench_v6": Benchmark(175, "livecodebench/code_generation_lite", "test6.jsonl",
                                  ("2025-02", "2025-05"), "27.72, 40.63, 63.13"),
    "gsm8k": Benchmark(1319, "openai/gsm8k", "main/test-00000-of-00001.parquet"),
    "math500": Benchmark(500, "HuggingFaceH4/MATH-500", "test.jsonl"),
}
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def find_file(data, folder):
    """The file of a benchmark's name, or the file itself."""
    if data == "world":
        return Path(WORLD.eval_data)
    if data not in BENCHMARKS:
        if not Path(data).exists():
            raise UserError(f"{data} is neither a file nor a benchmark; the benchmarks are world, "
                            + ", ".join(BENCHMARKS))
        return Path(data)
    benchmark, place = BENCHMARKS[data], Path(folder) / data
    paths = [Path(f"{place}{suffix}") for suffix in SUFFIXES] + [place / benchmark.file]
    existing = [path for path in paths if path.exists()]
    if not existing:
        raise UserError(f"found no file {place} with an ending {', '.join(SUFFIXES)}; put it "
                        f"there, or fetch it: hf download {benchmark.repo} {benchmark.file} "
                        f"--repo-type dataset --local-dir {place}")
    return existing[0]


def load_benchmark(data, config):
    """The problems of a benchmark or a file, its count checked, its repairs told."""
    path, benchmark = find_file(data, config.benchmarks), BENCHMARKS.get(data)
    rows = list(read_rows(path))
    if benchmark and len(rows) != benchmark.rows:
        raise UserError(f"{path}: found {len(rows)} of {benchmark.rows} problems; the file is "
                        "truncated or another one, fetch it again.")
    if benchmark and benchmark.months:
        first, last = benchmark.months
        rows = [row for row in rows if first <= str(row[1].get("contest_date"))[:7] <= last]
        print(f"{len(rows)} of {benchmark.rows} problems of {data} are dated {first} to {last}",
              file=sys.stderr)
    problems = tools.read_problems(path, rows, read_row)
    twice = [name for name, times in Counter(p.id for p in problems).items() if times > 1]
    if twice:
        raise UserError(f"{path}: the id {twice[0]} stands in several rows; ids tell problems "
                        "apart, so make them unique or delete the column.")
    return problems[:config.limit or None]


# --- Files to rows, rows to problems -----------------------------------------------------------


def read_rows(path):
    """(line number, row) of any file; parquet counts rows."""
    if path.suffix == ".parquet" and path.exists():
        return enumerate(read_parquet(path), start=1)
    text = tools.read_text(path, SUFFIXES)
    return read_csv(path, text) if path.suffix == ".csv" else tools.read_json(path, text)


def read_csv(path, text):
    """Yield (number of the row's last line, row)."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"the row has not the header's {len(reader.fieldnames)} cells")
            yield reader.line_num, row
    except csv.Error as fault:
        raise UserError(f"{path}, line {reader.line_num}: found broken CSV ({fault}); check the "
                        "quotes, or fetch the file again.") from fault


def read_parquet(path):
    """Rows as plain dicts, by pyarrow where it happens to be installed."""
    try:
        from pyarrow import parquet
    except ImportError as fault:
        raise UserError(f"{path}: found parquet, and pyarrow is not installed; run `pip install "
                        "pyarrow`, or convert the file to .jsonl elsewhere.") from fault
    return parquet.read_table(path).to_pylist()


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
        raise UserError("found an empty cell; needed a question and four options; fetch it again.")
    order = random.Random(question).sample(range(4), 4)
    listed = "\n".join(f"{letter}) {options[index]}" for letter, index in zip("ABCD", order))
    question += f"\n\n{listed}\n\nGive the letter of the right option in \\boxed{{}}."
    return tools.Problem(question, "ABCD"[order.index(0)], "choice",
                         id=tools.first_text(row, "record id"))


def read_livecodebench(row):
    """Public and private tests, stdin or functional; the starter code becomes part of the task."""
    function = json.loads(row.get("metadata") or "{}").get("func_name", "")
    tests = [test for name in ("public_test_cases", "private_test_cases")
             for test in tools.read_tests(unpack(row.get(name)), function)]
    if not tests:
        raise UserError("found no test cases; needed public_test_cases or private_test_cases.")
    task = "Write a Python program that reads from standard input and prints the answer."
    if starter := tools.first_text(row, "starter_code"):
        task = f"Complete this code:\n```python\n{starter.rstrip()}\n```"
    task += "\nGive the whole program in one ```python block."
    return tools.Problem(f"{row['question_content']}\n\n{task}", "", "program", tests=tests,
                         id=tools.first_text(row, "question_id"))


def unpack(packed):
    """Test cases from JSON, or from JSON pickled, in zlib, in base64, as in the official files."""
    if not isinstance(packed, str) or not packed.strip():
        return packed
    if packed.lstrip()[0] in "[{":
        return json.loads(packed)
    try:
        data = zlib.decompress(base64.b64decode(packed, validate=True))
        return json.loads(TextOnly(io.BytesIO(data)).load())
    except Exception as fault:  # a hostile pickle can raise anything; all of it means one thing
        raise UserError(f"found test cases that cannot be unpacked ({fault}); needed JSON, or a "
                        "pickled JSON string in zlib in base64; fetch the file again.") from fault


class TextOnly(pickle.Unpickler):
    """Unpickles plain data. A pickle that names a class or function, to call it, fails."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}")


# --- Metrics: one number from graded samples, and which of two models is better -----------------


def pass_at_k(n, c, k):
    """Chance that k of n samples, drawn without replacement, hold one of the c right ones.

    1 - C(n-c, k) / C(n, k), unbiased for 1 - (1-p)^k (Chen et al. 2021, Eq. 1). Integers until
    the last division, so nothing overflows or cancels.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise UserError(f"found n={n}, c={c}, k={k}; needed 0 <= c <= n and 1 <= k <= n, since "
                        "n samples say nothing about more than n tries.")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def majority(answers, correct):
    """Whether the most frequent of k answers to a problem is right: maj@k is its mean over them.

    answers  k texts, None for a sample without an answer: it has no vote
    correct  k of 0 and 1

    Answers that the grader calls equal are one, however they are spelled. Of two that tie for
    first, one of them right, 1/2 counts, the expectation of a coin. Without votes it is 0.

    >>> majority(["7", "x = 7", "8"], [1, 1, 0]), majority(["7", "8", None], [1, 0, 0])
    (1.0, 0.5)
    """
    votes = defaultdict(list)
    for answer, right in zip(tools.group_answers(answers), correct, strict=True):
        if answer is not None:
            votes[answer].append(right)
    most = max(map(len, votes.values()), default=0)
    first = [np.mean(grades) for grades in votes.values() if len(grades) == most]
    return float(np.mean(first)) if first else 0.0


def mean_and_std(runs):
    """(mean, standard deviation with ddof 1) of R values, one a run; nan for the std of one.

    >>> mean_and_std([0.25, 0.75, 0.5])
    (0.5, 0.25)
    """
    return float(np.mean(runs)), float(np.std(runs, ddof=1)) if len(runs) > 1 else math.nan


def t_interval(values):
    """(mean, low, high): Student's 95% interval of the mean; one value alone has none, only nan.

    >>> mean, low, high = t_interval([1.0, 2.0, 3.0])
    >>> round(mean, 2), round(low, 2), round(high, 2)  # 2 -+ 4.303 / sqrt(3)
    (2.0, -0.48, 4.48)
    """
    mean, std = mean_and_std(values)
    reach = sod.t_975(len(values) - 1) * std / math.sqrt(len(values)) if std == std else math.nan
    return mean, mean - reach, mean + reach


# Where two models score alike on all but n problems, chance lets one of them win all n with a
# probability of 2 / 2^n: 1 in 16 for 5 of them, more often than the 1 in 20 a 95% interval allows.
FEWEST_DIFFERING = 6


@dataclass
class Comparison:
    """B minus A over the problems both answered, in points (0.01 of a fraction of 1)."""
    problems: int
    differing: int  # problems with two different scores
    difference: float
    low: float      # of the 95% interval
    high: float


def skew_interval(values):
    """(mean, low, high): at each end the farther of two 95% intervals of the mean. Student's, and
    that of Hall (1992), which takes the skewness out of Student's t:

        g(t) = t + a t^2 / 3 + a^2 t^3 / 27 + a / 6,    a = skewness / sqrt(n)

    Where few values are large and all others are a little on the other side of 0, a sample that has
    missed the large ones lies on that side with too small a spread; its skewness tells.
    """
    mean, low, high = t_interval(values)
    n = len(values)
    if n < 3 or low == high:
        return mean, low, high
    z = (np.asarray(values) - mean) / np.std(values)
    a = round(float(np.mean(z ** 3)) * math.sqrt(n - 1) / (n - 2), 9)  # 0, or too large to cancel
    t, error = sod.t_975(n - 1), (high - mean) / sod.t_975(n - 1)
    inverse = lambda g: 3 / a * (np.cbrt(1 + a * (g - a / 6)) - 1) if a else g
    return (mean, float(min(low, mean - error * inverse(t))),
            float(max(high, mean - error * inverse(-t))))


def compare(a, b, names=("A", "B")):
    """The paired difference by problem, with its interval over problems (skew_interval).

    a, b  {problem: score} of two models on the same problems

    Pairing takes out how hard the problems are: only the differences b_p - a_p count. Two equal
    models are called different in at most about one comparison of twenty, from 6 problems on. Where
    they are equal on average alone, it hangs on the law of the differences: over 8, 30 and 100
    problems (tests/test_metrics.py simulates it), and what it would be by Student's interval alone:

        normal                                        3%,  5%,  5%     5%,  5%,  5%
        exponential, less its mean                    6%,  4%,  4%    11%,  7%,  6%
        lognormal, less its mean                      8%,  6%,  4%    17%, 12%,  8%
        gamma(1/4), less its mean                     9%,  4%,  4%    23%, 13%,  8%
        .4 on one problem of five, else about -.1    17%,  1%,  3%    18%,  7%,  5%
        .95 on one of twenty, else about -.05        65%, 22%,  1%    67%, 22%, 10%

    The last two show what no interval mends: problems of a rare kind that the sample has not met.
    """
    if a.keys() != b.keys() or not a:
        raise UserError(f"{names[0]} has {len(a.keys() - b.keys())} problems that {names[1]} "
                        f"lacks, {names[1]} has {len(b.keys() - a.keys())} that {names[0]} lacks; "
                        "a paired comparison needs the same problems, in the same words, in both, "
                        "at least one.")
    differences = 100 * np.array([b[problem] - a[problem] for problem in a], dtype=float)
    differences = differences.round(9) + 0.0  # 0.1 + 0.2 - 0.3 is no difference, nor is -0.0
    mean, low, high = skew_interval(differences)
    low, high = (max(low, -100.0), min(high, 100.0)) if len(a) > 1 else (-100.0, 100.0)
    return Comparison(len(a), int(np.count_nonzero(differences)), mean, low, high)


def verdict(result, names=("A", "B")):
    """The sentence of a comparison; the interval is always given, also when it decides nothing."""
    low, high, size = (round(x, 1) + 0.0 for x in (result.low, result.high, result.difference))
    excludes_0 = result.low > 0 or result.high < 0
    if excludes_0 and result.differing >= FEWEST_DIFFERING:
        better = names[1] if result.low > 0 else names[0]
        low, high = sorted((abs(low), abs(high)))
        return f"{better} is better by {abs(size):.1f} points, 95% interval {low:.1f} to {high:.1f}"
    problems = "1 problem" if result.problems == 1 else f"{result.problems} problems"
    sentence = (f"{problems} cannot tell these apart ({names[1]} minus {names[0]}: {size:+.1f} "
                f"points, 95% interval {low:.1f} to {high:.1f})")
    if not result.differing:
        return f"{sentence}: both score the same on every problem"
    if excludes_0:
        sentence += (f": the interval excludes 0, but the scores differ on {result.differing} of "
                     f"them only, and below {FEWEST_DIFFERING} chance alone does that too often")
    return sentence


# --- Files of samples --------------------------------------------------------------------------


@dataclass
class Evaluation:
    """One model on one benchmark, as its file holds it."""
    model: str       # folder or Hub id
    data: str        # benchmark or file
    problems: int    # P: those that were put to the model
    skipped: int     # those whose prompt is longer than max_prompt
    weights: int     # CRC of the model's parameters
    questions: list  # digests_of the problems that were put to the model
    settings: dict   # EvalConfig, without the folders
    rows: list = field(default_factory=list)  # samples, by run, problem, sample

    @property
    def header(self):
        """The first line of the file: everything that decides what the others are."""
        return {name: value for name, value in vars(self).items() if name != "rows"}

    @property
    def expected(self):
        return self.settings["runs"] * self.problems * self.settings["k"]

    def cells(self, name):
        """One column of the rows, (R, P, k)."""
        values = np.array([row[name] for row in self.rows], dtype=object)
        return values.reshape(self.settings["runs"], self.problems, self.settings["k"])

    def correct(self):
        """(P, R k) of 0 and 1: all samples of a problem, its runs side by side."""
        return np.concatenate(self.cells("correct").astype(float), axis=1)

    def scores(self):
        """{digest of a problem: share of right samples}; its id may hang on the file's name."""
        if not isinstance(self.questions, list):
            raise UserError(f"the samples of {self.model} on {self.data} were stored by an older "
                            "version, without what was asked; use --rescore on their file first")
        return dict(zip(self.questions, self.correct().mean(1)))


COLUMNS = {"run", "problem", "sample", "correct", "reason", "vote", "final", "finish_reason",
           "calls", "tokens"}


def lines_of(path):
    """[(where, line)] of a log. A last line without its end, still being written, is left out."""
    lines = tools.read_text(path).split("\n")[:-1] if path.is_file() else []
    return [(f"{path}, line {n}", line) for n, line in enumerate(lines, start=1)]


def parse_line(where, line):
    """A JSON object; NaN and infinity, which JSON does not know, become null."""
    try:
        row = json.loads(line, parse_constant=lambda name: None)
    except ValueError as fault:
        raise UserError(f"{where}: found broken JSON ({fault}); cut the file off there") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: found a {type(row).__name__}; needed a JSON object")
    return row


def read_samples(path, finished=True):
    """The Evaluation in a file, which must hold every sample unless it need not be finished."""
    lines = lines_of(Path(path))
    header, *rows = [parse_line(*line) for line in lines] or [{}]
    try:
        evaluation = Evaluation(**header, rows=rows)
        expected = evaluation.expected
    except (TypeError, KeyError):
        raise UserError(f"{path} is no file of samples of evaluate.py, or one of another version; "
                        "its first line must hold model, data and all settings") from None
    for (where, _), row in zip(lines[1:], rows):
        if lacking := COLUMNS - row.keys():
            raise UserError(f"{where}: found no sample, for it lacks {', '.join(sorted(lacking))};"
                            " cut the file off there")
    if finished and len(rows) != expected:
        raise UserError(f"{path} holds {len(rows)} of {expected} samples: the evaluation was "
                        "interrupted; give its command again and it continues.")
    return evaluation


def write_samples(path, evaluation):
    """Write a whole file, which never carries its name while it is half written."""
    lines = [evaluation.header, *evaluation.rows]
    tools.write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))


def file_of(evaluation, folder):
    """The file's name says whose samples it holds; its last word changes with any setting."""
    digest = zlib.crc32(json.dumps(evaluation.header, sort_keys=True).encode())
    words = [*Path(evaluation.model).parts[-2:], *Path(evaluation.data).parts[-2:]]
    name = re.sub(r"[^\w.-]+", "-", "-".join(words)).strip(".-")
    return Path(folder) / f"{name}-{digest:08x}.jsonl"


def digests_of(problems):
    """A word for each problem that changes with what is asked and what counts as right, and with
    nothing else. Of two problems that are alike the second has a word of its own."""
    digests, seen = [], Counter()
    for p in problems:
        text = repr((p.question, p.messages, p.kind, p.answer, p.tests))
        seen[text] += 1
        whole = f"{seen[text]} {text}".encode("utf-8", "surrogatepass")
        digests.append(hashlib.sha256(whole).hexdigest()[:12])
    return digests


# --- Sampling ----------------------------------------------------------------------------------


def sample_benchmark(name, data, problems, model, tokenizer, config):
    """Sample what the file lacks, a line a sample; the finished Evaluation and its path."""
    prompts, skipped = sod.fitting_prompts(problems, tokenizer, config)
    used = stored_settings(config) | {"device": model.device.type,
                                      "dtype": str(model.dtype).removeprefix("torch.")}
    evaluation = Evaluation(name, data, len(prompts), skipped, sod.weights_crc(model),
                            digests_of([problem for problem, _ in prompts]), used)
    path = file_of(evaluation, config.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    evaluation.rows = sod.all_gather(resume(path, evaluation))[0]  # those of rank 0
    if evaluation.rows:  # an edit of the scripts since then changes nothing in them
        print(f"{len(evaluation.rows)} of {evaluation.expected} samples were in {path} already; to "
              "sample them again, as after an edit, delete that file", file=sys.stderr)
    print(f"{data}  {sod.how_sampled(tokenizer, config, config.temperature, config.top_p)}")
    agent = sod.Agent(config, model, None, tokenizer, sod.load_tool(config)[0])
    bar = tqdm(total=evaluation.expected, initial=len(evaluation.rows), unit="sample",
               desc=path.stem, disable=True if sod.RANK else None)
    with agent.tool, open(os.devnull if sod.RANK else path, "a", encoding="utf-8") as file, bar:
        for rows in sample_the_rest(agent, evaluation, prompts):
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            evaluation.rows += rows
            bar.update(len(rows))
    return evaluation, path


@sod.on_rank_0
def resume(path, evaluation):
    """Begin the file with the rows that an interrupted evaluation has written; these rows.

    Only whole batches are kept: a sample's random numbers are its own, but the last digits of its
    scores may depend on who is sampled beside it.
    """
    if lines_of(path):  # else it was killed within its header, or never began
        evaluation.rows = read_samples(path, finished=False).rows
    done, batch = len(evaluation.rows), evaluation.settings["rollout_batch"]
    if batch and done < evaluation.expected:
        done -= done % batch
    evaluation.rows = evaluation.rows[:done]
    write_samples(path, evaluation)
    return evaluation.rows


def sample_the_rest(agent, evaluation, prompts):
    """Yield the missing samples in the order of the file, as rows, a batch at a time."""
    config, k = agent.config, agent.config.k
    order = [(run, prompt, sample) for run in range(config.runs) for prompt in prompts
             for sample in range(k)]
    batch, key = config.rollout_batch or len(order), (config.seed, "benchmark", 0)
    for start in range(len(evaluation.rows), len(order), batch):
        numbers = range(start, min(start + batch, len(order)))
        rollouts = sod.sample_rollouts(agent, agent.student, [order[n][1] for n in numbers], key,
                                       numbers, config.temperature, config.top_p)
        yield [sample_row(rollout, order[n][0], order[n][2], config.calls)
               for rollout, n in zip(rollouts, numbers)]


def sample_row(r, run, sample, calls="hermes"):
    """One sample as it is stored. Without a final turn there is nothing to grade: final is "".

    A final turn that the sandbox failed to judge is stored all the same, to be judged later.
    """
    ended = r.finish_reason in ("answer", "infrastructure") and not r.turns[-1].outcome
    final = sod.final_text(replace(r, finish_reason="answer"), calls) if ended else ""
    return {"run": run, "problem": r.problem.id, "sample": sample, "correct": r.correct,
            "reason": r.reason, "vote": tools.voted_answer(r.problem, final), "final": final,
            "finish_reason": r.finish_reason,
            "calls": [turn.outcome for turn in r.turns if turn.outcome],
            "tokens": sum(len(turn.ids) for turn in r.turns)}


def rescore(path, given):
    """Grade the stored final turns again, as graders and answers are today; what to print."""
    old = read_samples(path)
    known = {f.name: old.settings[f.name] for f in fields(EvalConfig) if f.name in old.settings}
    config = EvalConfig(**{**known, **given})
    problems = {problem.id: problem for problem in load_benchmark(old.data, config)}
    if missing := {row["problem"] for row in old.rows} - problems.keys():
        raise UserError(f"{old.data} lacks {len(missing)} problems of {path} ({min(missing)}, "
                        "...); rescoring needs the file that was evaluated")
    with sod.load_tool(config)[0] as tool:
        rows = [graded_again(row, problems[row["problem"]], tool)
                for row in tqdm(old.rows, disable=None)]
    changed = sum(a["correct"] != b["correct"] for a, b in zip(old.rows, rows))
    asked = [problems[name] for name in old.cells("problem")[0, :, 0]]
    new = replace(old, settings=stored_settings(config), questions=digests_of(asked), rows=rows)
    rescored = Path(path).with_suffix(".rescored.jsonl")
    write_samples(rescored, new)
    return f"{changed} of {len(rows)} verdicts changed\nsamples  {rescored}\n\n{report([new])}"


def graded_again(row, problem, tool):
    """The row with the verdict of today. Without a final turn there is nothing to judge."""
    if not row["final"]:
        return row
    seen = tools.grade(problem, row["final"], tool)
    finish = "infrastructure" if "sandbox_error" in seen.reason else "answer"
    return row | {"correct": seen.correct, "reason": seen.reason, "finish_reason": finish,
                  "vote": tools.voted_answer(problem, row["final"])}


# --- Reports -----------------------------------------------------------------------------------


def report(evaluations):
    """Everything about some models on one benchmark, as markdown."""
    first, s = evaluations[0], evaluations[0].settings
    lines = [f"average@{s['k']}, {s['runs']} x {first.problems} problems of {first.data}",
             f"temperature {s['temperature']}, top-p {s['top_p']}, {s['max_turns']} turns, prompt "
             f"{s['max_prompt']}, response {s['max_response']} tokens, silent tool "
             f"{s['silent_rate']:.0%}, seed {s['seed']}, {s['dtype']} on {s['device']}", ""]
    lines += [sod.results_table({one.model: one.correct() for one in evaluations})]
    if first.data in BENCHMARKS and BENCHMARKS[first.data].paper:
        lines += ["", "the paper (average@32, 5 runs), SOD 0.6B, SOD 1.7B, their 4B teacher: "
                  f"{BENCHMARKS[first.data].paper}"]
    details = [detail(one) for one in evaluations]
    lines += ["", f"| | {' | '.join(one.model for one in evaluations)} |",
              "|---" * (len(evaluations) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(one[name] for one in details)} |" for name in details[0]]
    for other in evaluations[1:]:
        try:
            lines += ["", verdict_of(first, other, (first.model, other.model))]
        except ValueError as error:  # the prompts of one model left out other problems
            lines += ["", f"no verdict: {error}"]
    return "\n".join(lines)


def verdict_of(a, b, names):
    """The sentence that compares two evaluations of the same problems."""
    others = [f"{name} {a.settings.get(name)!r} and {value!r}"
              for name, value in b.settings.items() if a.settings.get(name) != value]
    note = f"; NOTE: the settings differ, too: {', '.join(others)}" if others else ""
    return verdict(compare(a.scores(), b.scores(), names), names) + note


def detail(one):
    """{what: text} of one model on one benchmark."""
    correct, P, samples = one.correct(), one.problems, len(one.rows)
    n, counts = correct.shape[1], correct.sum(1).astype(int).tolist()
    mean, std = mean_and_std([100 * np.mean(run) for run in one.cells("correct")])
    finish = Counter(row["finish_reason"] for row in one.rows)
    wrong = Counter(row["reason"] for row in one.rows if not row["correct"])
    calls = Counter(outcome for row in one.rows for outcome in row["calls"])
    # What the machine failed is no failure of the model's.
    failed = {name: n for name, n in calls.items()
              if name not in (*sod.OK_OUTCOMES, "sandbox_error")}
    k_s = [2 ** e for e in range(n.bit_length()) if 2 ** e < n] + [n]
    votes, right = (one.cells(name).reshape(-1, one.settings["k"]) for name in ("vote", "correct"))
    majorities = [majority(*cell) for cell in zip(votes.tolist(), right.tolist())]
    return {
        "problems left out, prompt too long": str(one.skipped),
        "mean ± std over runs": f"{mean:.2f} ± {std:.2f}" if std == std else "1 run",
        f"pass@k, k = {', '.join(map(str, k_s))}": ", ".join(
            f"{100 * sum(pass_at_k(n, c, k) for c in counts) / P:.1f}" for k in k_s),
        f"maj@{one.settings['k']}": f"{100 * np.mean(majorities):.1f}" if votes.any() else "none",
        "tool calls a trajectory": f"{calls.total() / samples:.2f}",
        "failed calls": shares(failed, max(calls.total(), 1)),
        "cut off, by": shares({"length": finish["length"], "turns": finish["turns"]}, samples),
        "sampled tokens a trajectory": f"{np.mean([row['tokens'] for row in one.rows]):,.0f}",
        "not right, because": shares(wrong, samples),
        "samples the sandbox failed, counted as not right": str(finish["infrastructure"]),
    }


def shares(counts, total):
    """12.0% (timeout 9.5%, error 2.5%): all of them, then each, the most frequent first."""
    counts = sorted(((n, name) for name, n in counts.items() if n), reverse=True)
    parts = ", ".join(f"{name} {n / total:.1%}" for n, name in counts)
    return f"{sum(n for n, _ in counts) / total:.1%}" + f" ({parts})" * bool(parts)


# --- The page: the rollouts of a run, to look at ------------------------------------------------

TEMPLATE = Path(__file__).with_name("data") / "page.html"


def patterns(outcomes):
    """The pattern of each step of a rollout, from what became of its calls alone.

    stable     no call has failed so far
    erroneous  the newest call that ran has failed
    recovery   a call has failed before, and the newest one worked

    d and w take no part in it, so that what they do in each pattern can be looked at.

    >>> patterns(["ok", "timeout", "error", "ok", ""])
    ['stable', 'erroneous', 'erroneous', 'recovery', 'recovery']
    """
    names = ["stable"]
    for outcome in outcomes:
        worked = outcome in ("ok", "output_truncated") and names[-1] != "stable"
        names.append("erroneous" if outcome not in sod.OK_OUTCOMES else
                     "recovery" if worked else names[-1])
    return names[1:]


def write_page(folder, *iterations):
    """Write rollouts.html of a run, one file that asks for no other; its path and a summary."""
    data, path = page_data(Path(folder), iterations), Path(folder) / "rollouts.html"
    tools.write_whole(path, page_html(data))
    return (f"{path}  iterations {', '.join(data['iterations']) or 'none'}, "
            f"{path.stat().st_size / 2**20:.1f} MiB")


def page_data(folder, iterations):
    """Everything the page shows, as plain values; every number stands in the files of the run."""
    stored = parse_line(folder / "config.json", tools.read_text(folder / "config.json"))
    # Not a sod.Config, which refuses what cannot be run: a method that is gone can be looked at.
    config = SimpleNamespace(**{f.name: f.default for f in fields(sod.Config)} | stored)
    curves = [parse_line(*line) for line in lines_of(folder / "metrics.jsonl")]
    stored = defaultdict(list)  # as text, since all of a long run would fill the memory
    for where, line in lines_of(folder / "rollouts.jsonl"):
        stored[str(rollout(where, line)["iteration"])].append((where, line))
    chosen = choose_iterations(list(stored), iterations, folder)
    return {"name": config.name or folder.name, "curves": curves,
            "about": f"{about(config)} Shown: {len(chosen)} of {len(stored)} iterations.",
            "scored": any("d" in m for m in curves),
            "delta": config.delta, "worth": worth(config),
            "iterations": {n: [rollout(*line) for line in stored[n]] for n in chosen}}


def rollout(where, line):
    """One rollout, with the pattern of each step. One that the machine failed has no numbers, for
    nobody scored it; older versions stored d 0 and w 1."""
    row = parse_line(where, line)
    try:
        outcomes = [turn["outcome"] for turn in row["turns"]]
        if row.get("finish_reason") == "infrastructure":
            row["turns"] = [{name: turn.get(name) for name in ("text", "outcome", "tool")}
                            for turn in row["turns"]]
        return row | {"iteration": row["iteration"], "patterns": patterns(outcomes)}
    except (KeyError, TypeError):
        raise UserError(f"{where}: found no rollout with iteration, turns and their outcomes; "
                        "delete the line") from None


def choose_iterations(known, asked, folder):
    """Those asked for, else the first, the middle and the last."""
    if unknown := [n for n in asked if n not in known]:
        raise UserError(f"iteration {unknown[0]} is not in {folder / 'rollouts.jsonl'}; choose "
                        f"from {', '.join(known) or 'none'}")
    places = {0, len(known) // 2, len(known) - 1}
    return [n for i, n in enumerate(known) if (n in asked if asked else i in places)]


def about(config):
    """Where the page's numbers come from, in a sentence."""
    method = sod.METHODS.get(config.method)
    if not method:
        return f"Method {config.method}, which is not known here; student {config.student}."
    scorer = {"": "nobody", "teacher": config.teacher}.get(method.scorer, "its own frozen start")
    weights = f" with the weights {config.weights}" * method.weighted
    return f"Method {config.method}{weights}, student {config.student}, scored by {scorer}."


def worth(config):
    """The token advantage of this run as a formula; the template explains its words."""
    method = sod.METHODS.get(config.method)
    if not method:
        return "what that method has given it"
    term = f"{config.opd_coef} · w · (log p teacher − log p student)"
    distils = bool(method.scorer) and config.kl == "sampled"
    return (" + ".join(["advantage"] * method.outcome + [term] * distils)
            or "0, for the exact KL is a loss of its own")


def page_html(data):
    """The page. Its policy lets the browser fetch nothing.

    Text that a model wrote is data: escaped here, so that it cannot close the element it stands
    in, and put into the page as text nodes by the script.
    """
    text = json.dumps(data, allow_nan=False)  # ASCII, so U+2028 and U+2029 are escaped as well
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    template = TEMPLATE.read_text(encoding="utf-8")
    name = html.escape(data["name"]).encode("ascii", "xmlcharrefreplace").decode()
    parts = {"NAME": name, "DATA": text}
    return re.sub(r"@([A-Z_]+)@", lambda slot: parts[slot[1]], template)  # once: data stay data


# --- The command -------------------------------------------------------------------------------

TAKES = {  # the options of the commands that sample nothing
    "compare": set(), "page": set(),
    "rescore": {"benchmarks", "tool_timeout", "tool_chars", "tool_modules", "tool_unsafe"}}


def make_parser():
    """The command line: what to do, on which data, and an option for each setting."""
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
                      help="two files of samples: the verdict")
    what.add_argument("--rescore", metavar="FILE", help="grade the samples of a file again")
    what.add_argument("--page", nargs="+", metavar=("FOLDER", "ITERATION"),
                      help="write rollouts.html of a run, by default with three iterations")
    parser.add_argument("--data", nargs="+", help="files, or names: world, "
                        + ", ".join(BENCHMARKS) + "; default: world")
    sod.add_options(parser, EvalConfig, sod.choices())
    return parser


def parse(argv=None):
    """(arguments, {name: value} of the given settings); wrong ones end with status 2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields(EvalConfig) if hasattr(args, f.name)}
    if command := next((name for name in TAKES if getattr(args, name)), ""):
        idle = given.keys() - TAKES[command] | ({"data"} if args.data else set())
        if idle:
            parser.error(f"--{command} does not use {', '.join(sorted(idle))}; leave it out")
    return args, given


def evaluate_all(models, datas, given):
    """Every model on every benchmark; a report of each benchmark."""
    sod.transformers.utils.logging.disable_progress_bar()
    configs = {data: benchmark_config(data, given) for data in datas}
    loaded = {data: load_benchmark(data, config) for data, config in configs.items()}
    tokenizers = {}
    for name in models:  # what would end the evaluation in an hour is said in seconds
        for config in configs.values():
            tokenizers[name] = sod.load_tokenizer(name, config.thinking)
            sod.check_model(name, sod.skeleton(name), tokenizers[name], config)
    device, dtype = sod.choose_device(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    finished = defaultdict(list)
    for name in models:
        model = sod.load_model(name, device, dtype)
        for data, config in configs.items():
            one, path = sample_benchmark(name, data, loaded[data], model, tokenizers[name], config)
            print(f"samples  {path}")
            finished[data].append(one)
    for ones in finished.values():
        print("\n" + report(ones))


def run(args, given):
    """Do what the command says."""
    if args.page:
        print(write_page(*args.page))
    elif args.rescore:
        print(rescore(args.rescore, given))
    elif args.compare:
        print(verdict_of(*map(read_samples, args.compare), args.compare))
    else:
        with sod.process_group():
            evaluate_all(dict.fromkeys(args.model), args.data or ["world"], given)


def main(argv=None):
    """The exit status: 0 done, 1 stopped with a sentence, 2 wrong options."""
    return sod.run_command(lambda: run(*parse(argv)),
                           "the same command continues where this one stopped")


if __name__ == "__main__":
    sys.exit(main())
