"""Evaluate models on benchmarks: average@k with its interval, and which of two models is better.

    python evaluate.py                                    the embedded models, half a minute
    python evaluate.py --model Qwen/Qwen3-0.6B --data aime2024 aime2025
    python evaluate.py --compare FILE_A FILE_B            two files of samples: which is better?
    python evaluate.py --rescore FILE                     grade stored samples again
    python evaluate.py --page runs/NAME 1 25              iterations of a run, as a web page
    python evaluate.py --page FILE                        what a model wrote in an evaluation
    python evaluate.py --ask "Start with 19. Multiply by 7."    one question, and what comes of it

The samples of one model on one benchmark are stored in one file, a JSON line for each sample. The
name of the file changes with everything that decides what is in it. The same command continues an
interrupted file and ends with the same table, because the random numbers of a sample depend only
on the seed and on its place in the file.

Notation
    P, R, k     problems, runs (each with random numbers of its own), samples of a problem in a run
    n, c        samples of one problem, correct ones among them
    score       share of correct samples of one problem
"""
import argparse
import contextlib
import hashlib
import html
import json
import math
import os
import random
import re
import sys
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace

import tools

if __name__ == "__main__":  # the imports that follow take seconds
    tools.end_quietly_at_ctrl_c()

import numpy as np
import torch
from tqdm import tqdm

import sod_mini as sod
from tools import UserError

# --- Settings --------------------------------------------------------------------------------

BOUNDS = {**sod.BOUNDS, "k": (1, math.inf), "runs": (1, math.inf),
          "top_p": sod.BOUNDS["eval_top_p"]}


@dataclass
class EvalConfig(sod.Sampling):
    """How to evaluate. The defaults are for the embedded world, PAPER is for all other data."""
    k: int = sod.Config.eval_samples                   # samples of a problem in one run: average@k
    runs: int = 1                                      # runs; the deviation is taken over them
    limit: int = 0                                     # how many problems to take, 0 for all
    temperature: float = sod.Config.eval_temperature   # of sampling
    top_p: float = sod.Config.eval_top_p               # nucleus of sampling
    benchmarks: str = "benchmarks"                     # folder of downloaded benchmarks
    out: str = "runs/evaluate"                         # folder of the files of samples

    def __post_init__(self):
        sod.check_values(self, BOUNDS)


PAPER = {name: value for name, value in sod.PRESETS["paper"].items()
         if name in sod.Sampling.__annotations__}
PAPER.update(k=32, runs=5, temperature=1.0, top_p=0.6, max_prompt=4096, rollout_batch=64)


def benchmark_config(data, given):
    """The settings of one benchmark: the world's or the paper's, then the command line's."""
    is_world = data == "world" or sod.is_embedded(data)
    defaults = dict(limit=sod.Config.eval_problems) if is_world else PAPER
    return EvalConfig(**{**defaults, **given})


def asking_config(model, given):
    """The settings of one question: those of the run that the model comes from, so that it is asked
    as it was trained; else the world's for an embedded model, and the paper's for others."""
    folder = Path(sod.model_folder(model))
    for run in folder.parents[:2]:  # of RUN/checkpoint and RUN/saves/iteration-N
        if sod.is_run(run):
            stored = parse_line(run / "config.json", tools.read_text(run / "config.json"))
            shared = {f.name: stored[f.name] for f in fields(sod.Sampling) if f.name in stored}
            return EvalConfig(**{**shared, **given})
    return benchmark_config(model, given)


def stored_settings(config):
    """All settings but the folders, which do not change any sample."""
    return {k: v for k, v in vars(config).items() if k not in ("benchmarks", "out")}


# --- Benchmarks: what they are and where they are ----------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """A benchmark on which other people have published results."""
    rows: int           # of the whole file
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
    # The sixth file begins in January 2025, and the paper's months in February.
    "livecodebench_v6": Benchmark(175, "livecodebench/code_generation_lite", "test6.jsonl",
                                  ("2025-02", "2025-05"), "27.72, 40.63, 63.13"),
    "gsm8k": Benchmark(1319, "openai/gsm8k", "main/test-00000-of-00001.parquet"),
    "math500": Benchmark(500, "HuggingFaceH4/MATH-500", "test.jsonl"),
}


def find_file(data, folder):
    """The file of a benchmark's name, or the file itself."""
    if data == "world":
        return tools.locate(sod.Config.eval_data)
    if data not in BENCHMARKS:
        if not tools.locate(data).exists():
            raise UserError(f"{data} is neither a file nor a benchmark; the benchmarks are world, "
                            + ", ".join(BENCHMARKS))
        return tools.locate(data)
    benchmark, place = BENCHMARKS[data], tools.locate(folder) / data
    for path in [*(Path(f"{place}{suffix}") for suffix in tools.SUFFIXES), place / benchmark.file]:
        if path.exists():
            return path
    raise UserError(f"found no file {place} with an ending {', '.join(tools.SUFFIXES)}; put it "
                    f"there, or fetch it: hf download {benchmark.repo} {benchmark.file} "
                    f"--repo-type dataset --local-dir {place}")


def load_benchmark(data, config):
    """The problems of a benchmark or a file. The number of rows of a benchmark is checked."""
    path, benchmark = find_file(data, config.benchmarks), BENCHMARKS.get(data)
    rows = list(tools.read_rows(path))
    if benchmark and len(rows) != benchmark.rows:
        raise UserError(f"{path}: found {len(rows)} of {benchmark.rows} problems; the file is "
                        "truncated or another one, fetch it again.")
    if benchmark and benchmark.months:
        first, last = benchmark.months
        rows = [row for row in rows if first <= str(row[1].get("contest_date"))[:7] <= last]
        print(f"{len(rows)} of {benchmark.rows} problems of {data} are dated {first} to {last}",
              file=sys.stderr)
    problems = tools.read_problems(path, rows, sod.call_form(config.calls, config.tools))
    repeated = [name for name, times in Counter(p.id for p in problems).items() if times > 1]
    if repeated:
        raise UserError(f"{path}: the id {repeated[0]} stands in several rows; ids tell problems "
                        "apart, so make them unique or delete the column.")
    return problems[:config.limit or None]


# --- Metrics: one number from graded samples, and which of two models is better -----------------


def pass_at_k(n, c, k):
    """The chance that k of n samples, drawn without replacement, hold one of the c correct ones.

    1 - C(n-c, k) / C(n, k), unbiased for 1 - (1-p)^k (Chen et al. 2021, Eq. 1). All is integer
    until the last division, so that nothing overflows or cancels.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise UserError(f"found n={n}, c={c}, k={k}; needed 0 <= c <= n and 1 <= k <= n, since "
                        "n samples say nothing about more than n tries.")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def majority(answers, correct):
    """Whether the most frequent of k answers to a problem is correct: maj@k is its mean.

    answers  k texts, None for a sample without an answer: it has no vote
    correct  k of 0 and 1

    Spellings that the grader calls equal are one answer. Where several answers are the most
    frequent, the result is the share of correct ones among them, as if a coin decided. Without any
    vote it is 0.

    >>> majority(["7", "x = 7", "8"], [1, 1, 0]), majority(["7", "8", None], [1, 0, 0])
    (1.0, 0.5)
    """
    votes = defaultdict(list)
    for answer, grade in zip(tools.group_answers(answers), correct, strict=True):
        if answer is not None:
            votes[answer].append(grade)
    most = max(map(len, votes.values()), default=0)
    first = [np.mean(grades) for grades in votes.values() if len(grades) == most]
    return float(np.mean(first)) if first else 0.0


def mean_and_std(values):
    """(mean, standard deviation with ddof 1); the deviation of one value is nan.

    >>> mean_and_std([0.25, 0.75, 0.5])
    (0.5, 0.25)
    """
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def skew_interval(values):
    """(mean, low, high): at each end the farther of two 95% intervals of the mean. One is
    Student's. The other one, Hall's (1992), takes the skewness out of Student's t:

        g(t) = t + a t^2 / 3 + a^2 t^3 / 27 + a / 6,    a = skewness / sqrt(n)

    It is needed where a few values are large and all others lie a little on the other side of 0: a
    sample with too few of the large ones has its mean too far on that side and too small a spread.
    """
    mean, low, high = sod.t_interval(values)
    n = len(values)
    if n < 3 or low == high:
        return mean, low, high
    z = (np.asarray(values) - mean) / np.std(values)
    a = float(np.mean(z ** 3)) * math.sqrt(n - 1) / (n - 2)
    a = round(a, 9)  # a skewness of 1e-12 is a rounding error, and 1 / a would make it large
    t, error = sod.t_975(n - 1), (high - mean) / sod.t_975(n - 1)
    inverse = lambda g: 3 / a * (np.cbrt(1 + a * (g - a / 6)) - 1) if a else g
    return (mean, float(min(low, mean - error * inverse(t))),
            float(max(high, mean - error * inverse(-t))))


@dataclass
class Comparison:
    """B minus A over the problems that both answered, in points (0.01 of a fraction of 1)."""
    problems: int
    differing: int  # problems with two different scores
    difference: float
    low: float      # of the 95% interval
    high: float


def compare(a, b, names=("A", "B")):
    """The paired difference by problem, with its interval over problems (skew_interval).

    a, b  {problem: score} of two models on the same problems

    Only the differences b_p - a_p count, so that it does not matter how hard the problems are. From
    6 problems on, two equal models are called different in at most about one comparison of twenty.
    Where they are equal only on average, it depends on the law of the differences. In simulations
    (tests/test_metrics.py) it was between 3% and 9% for laws from the normal to gamma(1/4). It was
    17% over 8 problems and 3% over 100 where one problem of five made the whole difference, and
    65%, 22% and 1% over 8, 30 and 100 problems where one of twenty did: no interval can know about
    problems of a rare kind that are not in the sample.
    """
    if a.keys() != b.keys() or not a:
        raise UserError(f"{names[0]} has {len(a.keys() - b.keys())} problems that {names[1]} "
                        f"lacks, {names[1]} has {len(b.keys() - a.keys())} that {names[0]} lacks; "
                        "a paired comparison needs the same problems, in the same words, in both, "
                        "at least one.")
    differences = 100 * np.array([b[problem] - a[problem] for problem in a], dtype=float)
    differences = differences.round(9) + 0.0  # 0.1 + 0.2 - 0.3 becomes 0, and -0.0 becomes 0.0
    mean, low, high = skew_interval(differences)
    low, high = (max(low, -100.0), min(high, 100.0)) if len(a) > 1 else (-100.0, 100.0)
    return Comparison(len(a), int(np.count_nonzero(differences)), mean, low, high)


def verdict(result, names=("A", "B")):
    """The sentence of a comparison. It gives the interval also where this decides nothing."""
    low, high, size = (round(x, 1) + 0.0 for x in (result.low, result.high, result.difference))
    excludes_0 = result.low > 0 or result.high < 0
    if excludes_0 and result.differing >= sod.FEWEST_DIFFERING:
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
                     f"them only, and below {sod.FEWEST_DIFFERING} chance alone does that too "
                     "often")
    return sentence


# --- Files of samples --------------------------------------------------------------------------


@dataclass
class Evaluation:
    """One model on one benchmark, as its file holds it."""
    model: str       # folder or Hub id
    data: str        # benchmark or file
    problems: int    # P: how many the model was asked
    skipped: int     # how many were left out, because the prompt is longer than max_prompt
    weights: int     # CRC of the model's parameters
    questions: list  # digests_of the P problems
    settings: dict   # stored_settings of the EvalConfig, with the true device and dtype
    rows: list = field(default_factory=list)  # samples, by run, problem, sample
    read: str = ""   # digest of all that the model reads: template, examples, tools, problems

    @property
    def header(self):
        """The first line of the file: all that decides what the samples are."""
        return {name: value for name, value in vars(self).items() if name != "rows"}

    @property
    def expected(self):
        """How many samples the finished file holds."""
        return self.settings["runs"] * self.problems * self.settings["k"]

    def column(self, name):
        """(R, P, k) of one value of every row."""
        values = np.array([row[name] for row in self.rows], dtype=object)
        return values.reshape(self.settings["runs"], self.problems, self.settings["k"])

    def correct(self):
        """(P, R k) of 0 and 1: all samples of a problem, its runs side by side."""
        return np.concatenate(self.column("correct").astype(float), axis=1)

    def scores(self):
        """{digest of a problem: its score}; an id would not do, for it may hold the file's name."""
        if not isinstance(self.questions, list):
            raise UserError(f"the samples of {self.model} on {self.data} were stored by an older "
                            "version, without what was asked; use --rescore on their file first")
        return dict(zip(self.questions, self.correct().mean(1)))


COLUMNS = {"run", "problem", "sample", "correct", "reason", "vote", "final", "finish_reason",
           "calls", "tokens"}


def lines_of(path):
    """[(place, line)] of a log. A last line without its end is still being written: it is left
    out."""
    lines = tools.read_text(path).split("\n")[:-1] if path.is_file() else []
    return [(f"{path}, line {n}", line) for n, line in enumerate(lines, start=1)]


def parse_line(place, line):
    """A JSON object. NaN and infinity, which JSON does not know, become null."""
    try:
        row = json.loads(line, parse_constant=lambda name: None)
    except ValueError as fault:
        raise UserError(f"{place}: found broken JSON ({fault}); cut the file off there") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: found a {type(row).__name__}; needed a JSON object")
    return row


def read_samples(path, finished=True):
    """The Evaluation in a file. Samples may be missing only where it need not be finished."""
    if not Path(path).exists():
        raise UserError(f"{path} does not exist; name a file of samples, which evaluate.py has "
                        f"written to {EvalConfig.out} or to its --out")
    lines = lines_of(Path(path))
    header, *rows = [parse_line(*line) for line in lines] or [{}]
    try:
        evaluation = Evaluation(**header, rows=rows)
        expected = evaluation.expected
    except (TypeError, KeyError):
        raise UserError(f"{path} is no file of samples of evaluate.py, or one of another version; "
                        "its first line must hold model, data and all settings") from None
    for (place, _), row in zip(lines[1:], rows):
        if lacking := COLUMNS - row.keys():
            raise UserError(f"{place}: found no sample, for it lacks {', '.join(sorted(lacking))};"
                            " cut the file off there")
    if finished and len(rows) != expected:
        raise UserError(f"{path} holds {len(rows)} of {expected} samples: the evaluation was "
                        "interrupted; give its command again and it continues.")
    return evaluation


def write_samples(path, evaluation):
    """Write the whole file at once, so that nobody ever finds half of it."""
    lines = [evaluation.header, *evaluation.rows]
    tools.write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))


def file_of(evaluation, folder):
    """Where the samples are stored. The last word of the name changes with the header."""
    digest = zlib.crc32(json.dumps(evaluation.header, sort_keys=True).encode())
    words = [*Path(evaluation.model).parts[-2:], *Path(evaluation.data).parts[-2:]]
    name = re.sub(r"[^\w.-]+", "-", "-".join(words)).strip(".-")
    return Path(folder) / f"{name}-{digest:08x}.jsonl"


def digests_of(problems):
    """A word for each problem. It changes with the question and with what counts as correct, and
    with nothing else. Where a problem is repeated, each copy has a word of its own."""
    digests, copies = [], Counter()
    for p in problems:
        text = repr((p.question, p.messages, p.kind, p.answer, p.tests))
        copies[text] += 1
        numbered = f"{copies[text]} {text}".encode("utf-8", "surrogatepass")
        digests.append(hashlib.sha256(numbered).hexdigest()[:12])
    return digests


# --- Sampling ----------------------------------------------------------------------------------


def sample_benchmark(name, data, problems, model, tokenizer, config):
    """Sample what the file lacks and add it, a line a sample; the finished Evaluation, its path."""
    prompts, skipped = sod.fitting_prompts(problems, tokenizer, config)
    settings = stored_settings(config) | {"device": model.device.type,
                                          "dtype": str(model.dtype).removeprefix("torch.")}
    # The settings have only the names of files. Their contents are in the prompts, except what a
    # function of the user's does, which its answers show.
    functions = [tool.source for tool in sod.call_form(config.calls, config.tools).known]
    read = repr((functions, [ids for _, ids in prompts])).encode("utf-8", "surrogatepass")
    evaluation = Evaluation(name, data, len(prompts), skipped, sod.weights_crc(model),
                            digests_of([problem for problem, _ in prompts]), settings,
                            read=hashlib.sha256(read).hexdigest()[:12])
    path = file_of(evaluation, config.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    evaluation.rows = sod.all_gather(resume(path, evaluation))[0]  # those of rank 0
    if evaluation.rows:  # an edit of the scripts since then changes nothing in them
        print(f"{len(evaluation.rows)} of {evaluation.expected} samples were in {path} already; to "
              "sample them again, as after an edit, delete that file", file=sys.stderr)
    print(f"{data}  {sod.how_sampled(tokenizer, config, config.temperature, config.top_p)}")
    agent = sod.Agent(config, model, None, tokenizer, sod.load_tool(config)[0])
    place = os.devnull if sod.RANK else path
    sole_writer = contextlib.nullcontext() if sod.RANK else tools.locked(path)
    bar = tqdm(total=evaluation.expected, initial=len(evaluation.rows), unit="sample",
               desc=path.stem, disable=True if sod.RANK else None)
    with agent.tool, sole_writer, open(place, "a", encoding="utf-8") as file, bar:
        for rows in sample_the_rest(agent, evaluation, prompts):
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            evaluation.rows += rows
            bar.update(len(rows))
    return evaluation, path


@sod.on_rank_0
def resume(path, evaluation):
    """Begin the file with the rows that an interrupted evaluation has written; these rows.

    Only whole batches are kept. A sample has random numbers of its own, but the last digits of a
    model's output may depend on which samples are computed beside it.
    """
    path.touch()
    with tools.locked(path):  # another evaluation may be writing to it
        if lines_of(path):  # there are none where the first line is not finished
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
    batch, key = config.rollout_batch or len(order), (config.seed, "evaluation", 0)
    for start in range(len(evaluation.rows), len(order), batch):
        numbers = range(start, min(start + batch, len(order)))
        rollouts = sod.sample_rollouts(agent, agent.student, [order[n][1] for n in numbers], key,
                                       numbers, config.temperature, config.top_p)
        yield [sample_row(rollout, order[n][0], order[n][2], config.calls)
               for rollout, n in zip(rollouts, numbers)]


def sample_row(r, run, sample, calls="hermes"):
    """One sample as it is stored. Its "final" is the final turn, "" where there is none to grade.

    A final turn that the sandbox failed to judge is stored, too, so that it can be judged later.
    No text is stored twice: a last turn that is the "final" one is null in "turns", and only the
    first sample of a problem has its question.
    """
    ended = r.finish_reason in ("answer", "infrastructure") and not r.turns[-1].outcome
    final = sod.final_text(replace(r, finish_reason="answer"), calls) if ended else ""
    turns = [sod.turn_row(turn) for turn in r.turns]
    if final == turns[-1]["text"]:
        turns[-1]["text"] = None
    asked = {"question": r.problem.question, "answer": r.problem.answer}
    return {"run": run, "problem": r.problem.id, "sample": sample, "correct": r.correct,
            "reason": r.reason, "vote": tools.voted_answer(r.problem, final), "final": final,
            "finish_reason": r.finish_reason,
            "calls": [turn.outcome for turn in r.turns if turn.outcome],
            "tokens": sum(len(turn.ids) for turn in r.turns),
            "turns": turns, **({} if run or sample else asked)}


def rescore(path, given):
    """Grade the stored final turns by today's graders and answers; returns what to print."""
    old = read_samples(path)
    known = {f.name: old.settings[f.name] for f in fields(EvalConfig) if f.name in old.settings}
    config = EvalConfig(**{**known, **given})
    problems = {problem.id: problem for problem in load_benchmark(old.data, config)}
    if missing := {row["problem"] for row in old.rows} - problems.keys():
        raise UserError(f"{old.data} lacks {len(missing)} problems of {path} ({min(missing)}, "
                        "...); rescoring needs the file that was evaluated")
    for row in old.rows:  # rows without an id of their own are counted by line
        asked = problems[row["problem"]].question
        if row.get("question", asked) != asked:
            raise UserError(f"{row['problem']} of {old.data} has another question than in {path}; "
                            "rescoring needs the file as it was evaluated, with no row added, "
                            "taken out or moved (an id in each row allows for that)")
    with sod.load_tool(config)[0] as tool:
        rows = [grade_again(row, problems[row["problem"]], tool)
                for row in tqdm(old.rows, disable=None)]
    changed = sum(a["correct"] != b["correct"] for a, b in zip(old.rows, rows))
    asked = [problems[name] for name in old.column("problem")[0, :, 0]]
    new = replace(old, settings=stored_settings(config), questions=digests_of(asked), rows=rows)
    rescored = Path(path).with_suffix(".rescored.jsonl")
    write_samples(rescored, new)
    return f"{changed} of {len(rows)} grades changed\nsamples  {rescored}\n\n{markdown([new])}"


def grade_again(row, problem, tool):
    """The row with today's grade of its final turn, if it has one."""
    if not row["final"]:
        return row
    grade = tools.grade(problem, row["final"], tool)
    finish = "infrastructure" if "sandbox_error" in grade.reason else "answer"
    return row | {"correct": grade.correct, "reason": grade.reason, "finish_reason": finish,
                  "vote": tools.voted_answer(problem, row["final"])}


# --- One question ------------------------------------------------------------------------------


class ShownTool:
    """A tool that writes each call and its answer to the screen."""

    def __init__(self, tool):
        self.tool = tool

    def submit(self, call, place):
        run = self.tool.submit(call, place)
        self.show(place[-1] + 1, call.code or "a call that cannot be read", run.result().text)
        return run

    @staticmethod
    def show(k, wrote, answer):
        for mark, text in ((f"step {k}", wrote), ("    ->", answer)):
            print(f"{mark}  " + "\n        ".join(map(tools.printable, text.splitlines())))


def ask(question, model, teacher, config):
    """Show one conversation as it is sampled; with a teacher also d and w of each step."""
    asked = {f.name: getattr(config, f.name) for f in fields(sod.Sampling)}
    run = sod.Config(**asked, student=model, teacher=teacher or "", temperature=config.temperature,
                     overlong_buffer=0)
    calls, (device, dtype) = sod.student_context(run).calls, sod.choose_device(run)
    tokenizer, *other = [sod.load_tokenizer(name, run.thinking, calls)
                         for name in (model, teacher) if name]
    student, *scorer = [sod.load_model(name, device, dtype) for name in (model, teacher) if name]
    sod.check_model(model, student, tokenizer, run)
    if teacher:
        sod.check_pair(student, *scorer, tokenizer, *other, run)
    prompts, _ = sod.fitting_prompts([tools.Problem(question, "")], tokenizer, run)
    with sod.load_tool(run)[0] as tool:
        agent = sod.Agent(run, student, None, tokenizer, ShownTool(tool),
                          grade=lambda *_: None)  # nobody knows the answer
        rollouts = sod.sample_rollouts(agent, student, prompts, (run.seed, "ask", 0),
                                       top_p=config.top_p)
    last = rollouts[0].turns[-1]
    if not last.tool_text:  # else it has been shown
        ShownTool.show(len(rollouts[0].turns), last.text, "(no call)")
    print(f"ended by {rollouts[0].finish_reason}")
    if teacher:
        batch = sod.collate(rollouts, device)
        d = sod.step_divergence(*(sod.score(agent, m, batch)[0] for m in (student, *scorer)),
                                batch.step_id)
        for name, values in (("d", d), ("w", sod.step_weights(d))):
            print(f"{name:6}  " + "  ".join(f"{x:.2f}" for x in values[0].tolist()))


# --- Tables ------------------------------------------------------------------------------------


def markdown(evaluations):
    """All that is known about some models on one benchmark."""
    first, s = evaluations[0], evaluations[0].settings
    lines = [f"average@{s['k']}, {s['runs']} x {first.problems} problems of {first.data}",
             f"temperature {s['temperature']}, top-p {s['top_p']}, {s['max_turns']} turns, prompt "
             f"{s['max_prompt']}, response {s['max_response']} tokens, silent tool "
             f"{s['silent_rate']:.0%}, seed {s['seed']}, {s['dtype']} on {s['device']}", "",
             sod.results_table({each.model: each.correct() for each in evaluations})]
    if first.data in BENCHMARKS and BENCHMARKS[first.data].paper:
        lines += ["", "the paper (average@32, 5 runs), SOD 0.6B, SOD 1.7B, their 4B teacher: "
                  f"{BENCHMARKS[first.data].paper}"]
    columns = [details(each) for each in evaluations]
    lines += ["", f"| | {' | '.join(each.model for each in evaluations)} |",
              "|---" * (len(evaluations) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(column[name] for column in columns)} |"
              for name in columns[0]]
    for other in evaluations[1:]:
        try:
            lines += ["", compare_evaluations(first, other, (first.model, other.model))]
        except UserError as error:  # the two tokenizers left out other problems
            lines += ["", f"no verdict: {error}"]
    return "\n".join(lines)


def compare_evaluations(a, b, names):
    """The verdict on two evaluations of the same problems, with the settings that differ."""
    others = [f"{name} {a.settings.get(name)!r} and {value!r}"
              for name, value in b.settings.items() if a.settings.get(name) != value]
    note = f"; NOTE: the settings differ, too: {', '.join(others)}" if others else ""
    return verdict(compare(a.scores(), b.scores(), names), names) + note


def details(evaluation):
    """{what: text} of one model on one benchmark."""
    rows, correct = evaluation.rows, evaluation.correct()
    n, counts, k = correct.shape[1], correct.sum(1).astype(int), evaluation.settings["k"]
    mean, std = mean_and_std([100 * np.mean(run) for run in evaluation.column("correct")])
    finish = Counter(row["finish_reason"] for row in rows)
    wrong = Counter(row["reason"] for row in rows if not row["correct"])
    calls = Counter(outcome for row in rows for outcome in row["calls"])
    # A call that the sandbox failed is not a failure of the model.
    failed = {name: times for name, times in calls.items()
              if name not in (*sod.OK_OUTCOMES, "sandbox_error")}
    sizes = [2 ** e for e in range(n.bit_length()) if 2 ** e < n] + [n]
    votes, grades = (evaluation.column(name).reshape(-1, k) for name in ("vote", "correct"))
    majorities = [majority(*cell) for cell in zip(votes.tolist(), grades.tolist())]
    return {
        "problems left out, prompt too long": str(evaluation.skipped),
        "mean ± std over runs": f"{mean:.2f} ± {std:.2f}" if std == std else "1 run",
        f"pass@k, k = {', '.join(map(str, sizes))}": ", ".join(
            f"{100 * np.mean([pass_at_k(n, int(c), size) for c in counts]):.1f}"
            for size in sizes),
        f"maj@{k}": f"{100 * np.mean(majorities):.1f}" if votes.any() else "none",
        "tool calls a trajectory": f"{calls.total() / len(rows):.2f}",
        "failed calls": shares(failed, max(calls.total(), 1)),
        "cut off, by": shares({name: finish[name] for name in ("length", "turns")}, len(rows)),
        "sampled tokens a trajectory": f"{np.mean([row['tokens'] for row in rows]):,.0f}",
        "not correct, because": shares(wrong, len(rows)),
        "samples the sandbox failed, counted as not correct": str(finish["infrastructure"]),
    }


def shares(counts, total):
    """Their sum, then each of them, the most frequent first: 12.0% (timeout 9.5%, error 2.5%)."""
    counts = sorted(((n, name) for name, n in counts.items() if n), reverse=True)
    parts = ", ".join(f"{name} {n / total:.1%}" for n, name in counts)
    return f"{sum(n for n, _ in counts) / total:.1%}" + f" ({parts})" * bool(parts)


# --- The page: a run or an evaluation, to look at ----------------------------------------------

TEMPLATE = Path(__file__).with_name("data") / "page.html"


def patterns(outcomes):
    """The pattern of each step of a rollout, from what became of its calls alone.

    stable     no call has failed so far
    erroneous  the newest call that ran has failed
    recovery   a call has failed before, and the newest one worked

    d and w are not used, so that one can see what they do in each pattern.

    >>> patterns(["ok", "timeout", "error", "ok", ""])
    ['stable', 'erroneous', 'erroneous', 'recovery', 'recovery']
    """
    names = ["stable"]
    for outcome in outcomes:
        worked = outcome in ("ok", "output_truncated") and names[-1] != "stable"
        names.append("erroneous" if outcome not in sod.OK_OUTCOMES else
                     "recovery" if worked else names[-1])
    return names[1:]


def write_page(source, *asked, out=sod.Config.out):
    """Write the page of a run or of a file of samples: one file, which needs no other one.

    source   folder of a run, or its name below `out`: its rollouts.html; or FILE.jsonl: FILE.html
    asked    iterations, or passes over the problems; without any the first, the middle, the last
    returns  its path and what it holds, as a line of text
    """
    is_file = str(source).endswith(".jsonl")
    source = Path(source) if is_file else sod.find_run(source, out)
    data = (samples_data if is_file else page_data)(source, asked)
    path = source.with_suffix(".html") if is_file else source / "rollouts.html"
    tools.write_whole(path, page_html(data))
    return (f"{path}  {data['unit'].lower()}s {', '.join(data['iterations']) or 'none'}, "
            f"{path.stat().st_size / 2**20:.1f} MiB")


def page_data(folder, asked):
    """All that the page of a run shows, as plain values: the numbers of its files, and those that
    sod_mini makes of them."""
    stored = parse_line(folder / "config.json", tools.read_text(folder / "config.json"))
    if "model_type" in stored:
        raise UserError(f"{folder} is a model, not a run; name the folder of a run, as runs/NAME")
    # A sod.Config would refuse a method that no longer exists, and its page can still be made.
    config = SimpleNamespace(**{f.name: f.default for f in fields(sod.Config)} | stored)
    curves = [parse_line(*line) for line in lines_of(folder / "metrics.jsonl")]
    lines = defaultdict(list)  # parsed only where they are shown: a long run would take a minute
    for place, line in lines_of(folder / "rollouts.jsonl"):
        start = re.match(r'{"iteration": (\d+),', line)
        n = start[1] if start else str(read_rollout(place, line)["iteration"])
        lines[n].append((place, line))
    chosen = choose(list(lines), asked, folder / "rollouts.jsonl")
    about, worth = describe_method(config)
    return {"name": f"Run {config.name or folder.name}", "unit": "Iteration", "curves": curves,
            "about": f"{about} {describe_progress(config, curves, len(lines), len(chosen))}",
            "news": {m.get("iteration"): sentences for n, m in enumerate(curves)
                     if (sentences := said_then(curves[max(n - sod.WINDOW, 0):n + 1]))},
            "results": results_of(folder / "results.json"), "worth": worth,
            "scored": any("d" in m for m in curves), "rollouts": config.prompts * config.group_size,
            "settings": {name: getattr(config, name) for name in KNOBS if hasattr(config, name)},
            "checks": checks(), "delta": config.delta,
            "iterations": {n: [read_rollout(*line) for line in lines[n]] for n in chosen}}


def samples_data(path, asked):
    """The same of a file of samples. Pass n has the n-th sample of every problem."""
    evaluation, passes, questions = read_samples(path, finished=False), defaultdict(list), {}
    for row in evaluation.rows:
        if "question" in row:
            questions[row["problem"]] = {name: row[name] for name in ("question", "answer")}
        if "turns" in row:
            n = row["run"] * evaluation.settings["k"] + row["sample"] + 1
            asked_for = questions.get(row["problem"], {"question": row["problem"], "answer": ""})
            passes[str(n)].append(row | {"iteration": n} | asked_for)
    if not passes:
        raise UserError(f"{path} holds no transcripts, as files of older versions; to see what the "
                        "model writes, remove it and give its command again")
    chosen = choose(list(passes), asked, path)
    for row in (row for n in chosen for row in passes[n]):
        row["turns"] = [turn | {"text": row["final"]} if turn["text"] is None else turn
                        for turn in row["turns"]]
        row["patterns"] = patterns([turn["outcome"] for turn in row["turns"]])
    finished = len(evaluation.rows) == evaluation.expected
    results = [[evaluation.model, *sod.mean_ci(evaluation.correct())]] if finished else []
    about = (f"{len(evaluation.rows)} of {evaluation.expected} samples, of {evaluation.problems} "
             f"problems. Pass n shows the n-th sample of each. Shown: {len(chosen)} of "
             f"{len(passes)} passes.")
    return {"name": f"{evaluation.model} on {evaluation.data}", "unit": "Pass", "about": about,
            "curves": [], "news": {}, "scored": False, "worth": "", "settings": {}, "checks": [],
            "delta": 0, "rollouts": 0, "results": results,
            "iterations": {n: passes[n] for n in chosen}}


def choose(known, asked, path):
    """The iterations of a page, in the order of the file."""
    if unknown := [n for n in asked if n not in known]:
        raise UserError(f"iteration {unknown[0]} is not in {path}; choose from "
                        f"{', '.join(known) or 'none'}")
    usual = {*known[:1], *known[len(known) // 2:][:1], *known[-1:]}
    return [n for n in known if n in (asked or usual)]


def said_then(history):
    """What sod_mini.news said after these iterations; what was not finite is left out."""
    return sod.news([sod.finite(m) for m in history])


def results_of(path):
    """[name, mean, low, high] of each model that a run has measured, in percent."""
    stored = parse_line(path, tools.read_text(path)) if path.exists() else {}
    return [[name, *sod.mean_ci(np.array(result["correct"]))] for name, result in stored.items()]


def describe_progress(config, curves, known, shown):
    """How far the run has come, and what of it is on the page."""
    last = curves[-1] if curves else {}
    now, total = last.get("iteration", 0), last.get("iterations", config.iterations)
    text = f"Iteration {now} of {total}" + "; reload the page for later ones" * (now < total)
    if config.method == "sft":
        return f"{text}. It imitates demonstrations, so there are curves and no rollouts."
    return f"{text}. Rollouts shown: {shown} of {known} iterations."


# What the page's ledger of one token takes; its examples are drawn between these two.
KNOBS = {"d_1": (0, 2), "d_k": (0, 2), "epsilon": (1e-6, 0.1), "delta": (0, 0.5),
         "logp_s": (-5, 0), "logp_t": (-5, 0), "A": (-2, 2), "opd_coef": (0.5, 1.5),
         "ratio": (0.1, 5), "clip_low": (0, 0.5), "clip_high": (0, 0.5), "dual_clip": (1, 4)}


def ledger(x):
    """What a token is worth, with sod_mini's functions, from values for all KNOBS."""
    tensor = lambda *row: torch.tensor([row], dtype=torch.float64)
    d, step, logp_s = tensor(x["d_1"], x["d_k"]), torch.tensor([[2]]), tensor(x["logp_s"])
    w = sod.step_weights(d, x["epsilon"], x["delta"])
    worth = lambda A, coef: sod.token_advantages("sod", tensor(A)[0], logp_s, tensor(x["logp_t"]),
                                                 step, w, coef)
    A_it = worth(x["A"], x["opd_coef"])
    loss = sod.policy_loss(logp_s + math.log(x["ratio"]), logp_s, A_it, step > 0, x["clip_low"],
                           x["clip_high"], x["dual_clip"])
    values = {"quotient": sod.step_weights(d, x["epsilon"], math.inf)[0, 1], "w_k": w[0, 1],
              "distillation": worth(0.0, 1.0), "A_it": A_it, "loss": loss}
    return {name: float(value) for name, value in values.items()}


def checks(count=12):
    """[values for KNOBS, their ledger]: with these the page checks its own arithmetic."""
    drawn = random.Random(1)  # this one meets the cap, both clips and the dual clip
    points = [{name: drawn.uniform(*bounds) for name, bounds in KNOBS.items()}
              for _ in range(count)]
    return [[x, ledger(x)] for x in points]


def read_rollout(place, line):
    """One rollout, with the pattern of each step. Where the machine failed it, nobody scored it:
    the numbers that older versions stored for it are left out."""
    row = parse_line(place, line)
    try:
        outcomes = [turn["outcome"] for turn in row["turns"]]
        if row.get("finish_reason") == "infrastructure":
            row["turns"] = [{name: turn.get(name) for name in ("text", "outcome", "tool")}
                            for turn in row["turns"]]
        return row | {"iteration": row["iteration"], "patterns": patterns(outcomes)}
    except (KeyError, TypeError):
        raise UserError(f"{place}: found no rollout with iteration, turns and their outcomes; "
                        "delete the line") from None


def describe_method(config):
    """Two texts: who has made and scored the rollouts, and the token advantage as a formula."""
    method = sod.METHODS.get(config.method)
    if not method:
        return (f"Method {config.method}, which is not known here; student {config.student}.",
                "what that method has given it")
    scorer = {"": "nobody", "teacher": config.teacher}.get(method.scorer, "its own frozen start")
    weights = f" with the weights {config.weights}" * method.weighted
    distils = bool(method.scorer) and config.kl == "sampled"  # else the exact KL is in the loss
    terms = ["advantage"] * method.outcome + [
        f"{config.opd_coef} · w · (log p teacher − log p student)"] * distils
    return (f"Method {config.method}{weights}, student {config.student}, scored by {scorer}.",
            " + ".join(terms) or "0, for the exact KL is a loss of its own")


def page_html(data):
    """The page, whose policy forbids the browser to fetch anything.

    Text that a model wrote stays data: its < > & are escaped here, so that it cannot close the
    element it stands in, and the script puts it into the page as text, never as markup.
    """
    text = json.dumps(data, allow_nan=False)  # ASCII, so U+2028 and U+2029 are escaped as well
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    name = html.escape(data["name"]).encode("ascii", "xmlcharrefreplace").decode()
    parts = {"NAME": name, "DATA": text}
    # All places are filled in one pass, so that a @DATA@ in the data is left as it is.
    return re.sub(r"@([A-Z_]+)@", lambda match: parts[match[1]],
                  TEMPLATE.read_text(encoding="utf-8"))


# --- The command -------------------------------------------------------------------------------

TAKES = {  # the options that the commands which sample nothing take
    "compare": set(), "page": {"out"},
    "rescore": {"benchmarks", "tool_timeout", "tool_chars", "tool_modules", "tool_unsafe"}}


def parse(argv=None):
    """(arguments, {name: value} of the given settings); wrong ones end with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        usage="python evaluate.py [--model MODEL ...] [--data DATA ...] [--OPTION VALUE ...]",
        epilog="Data other than world: " + ", ".join(f"{name} {value!r}" for name, value
                                                     in PAPER.items() if name != "system"),
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=100))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", nargs="+",
                      help="folders, of a run its checkpoint, or Hub ids; default: the embedded "
                      "student and teacher")
    what.add_argument("--compare", nargs=2, metavar=("A", "B"),
                      help="two files of samples: the verdict")
    what.add_argument("--rescore", metavar="FILE", help="grade the samples of a file again")
    what.add_argument("--page", nargs="+", metavar=("RUN", "ITERATION"),
                      help="write rollouts.html of a run, by default with three iterations; or "
                      "FILE.html of a file of samples")
    parser.add_argument("--ask", metavar="QUESTION", help="one question to the first model, by "
                        "default the embedded student: the conversation, as it is sampled; the "
                        "model of a run is asked as it was trained")
    parser.add_argument("--teacher", metavar="MODEL", help="with --ask: d and w of each step")
    parser.add_argument("--data", nargs="+", help="files, or names: world, "
                        + ", ".join(BENCHMARKS) + "; default: world")
    sod.add_options(parser, EvalConfig, sod.choices())
    args = sod.parse_options(parser, argv)
    command = next((name for name in TAKES if getattr(args, name)), "")
    asks = args.ask is not None
    if args.teacher and not asks or asks and (args.data or command or not args.ask.strip()):
        parser.error("--ask takes a question and perhaps a --teacher, and no --data or other "
                     "command; the teacher is for --ask alone")
    given = {f.name: getattr(args, f.name) for f in fields(EvalConfig) if hasattr(args, f.name)}
    if command:
        idle = given.keys() - TAKES[command] | ({"data"} if args.data else set())
        if idle:
            parser.error(f"--{command} does not use {', '.join(sorted(idle))}; leave it out")
    return args, given


def evaluate_all(models, datas, given):
    """Every model on every benchmark; a table for each benchmark."""
    sod.transformers.utils.logging.disable_progress_bar()
    configs = {data: benchmark_config(data, given) for data in datas}
    problems = {data: load_benchmark(data, config) for data, config in configs.items()}
    tokenizers = {}
    for name in models:  # all models are checked before the first one samples for an hour
        for config in configs.values():
            tokenizers[name] = sod.load_tokenizer(name, config.thinking,
                                                  sod.student_context(config).calls)
            sod.check_model(name, sod.skeleton(name), tokenizers[name], config)
    device, dtype = sod.choose_device(config)
    threads, finished = torch.get_num_threads(), defaultdict(list)
    torch.set_num_threads(config.threads or threads)  # loading a model takes threads, too
    for name in models:
        model = sod.load_model(name, device, dtype)
        for data, config in configs.items():
            torch.set_num_threads(config.threads or threads)
            evaluation, path = sample_benchmark(name, data, problems[data], model,
                                                tokenizers[name], config)
            print(f"samples  {path}")
            finished[data].append(evaluation)
    for evaluations in finished.values():
        print("\n" + markdown(evaluations))


def run(args, given):
    """Do what the command says."""
    if args.page:
        print(write_page(*args.page, **given))
    elif args.rescore:
        print(rescore(args.rescore, given))
    elif args.compare:
        print(compare_evaluations(*map(read_samples, args.compare), args.compare))
    elif args.ask:
        sod.transformers.utils.logging.disable_progress_bar()
        model = (args.model or [sod.Config.student])[0]
        ask(args.ask, model, args.teacher, asking_config(model, given))
    else:
        models = args.model or [sod.Config.student, sod.Config.teacher]
        with sod.process_group():
            evaluate_all(dict.fromkeys(models), args.data or ["world"], given)


def main(argv=None):
    """The exit status: 0 done, 1 stopped with a sentence, 2 wrong options."""
    return sod.run_command(lambda: run(*parse(argv)),
                           "the same command continues where this one stopped")


if __name__ == "__main__":
    sys.exit(main())
