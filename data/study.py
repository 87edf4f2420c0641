"""The study: the paper's methods in the embedded world, over seeds, and two dials of that world.

    python data/study.py                               everything, about 4 hours on two cores
    python data/study.py --rows sod opd mask_after_error grpo --seeds 5     half an hour

Each row and seed is one run in a process of its own, stored in runs/study. The same command
continues an interrupted study. It ends with tables and figures in runs/study, of all runs that are
stored there; those that are shown in data/study were made so.

A row is a method or a weight scheme. row@condition is the same in a changed world:
    @digits-N  programs end in N check digits in place of 3. They are what student and teacher
               differ by at every call, so N turns d_1.
    @brief, @lasting  a silent tool stays silent with a chance of .3, .8 in place of .5
"""
import argparse
import copy
import html
import json
import math
import os
import random
import subprocess
import sys
import time
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import numpy as np
import torch

import make_world
import premises
import sod_mini as sod
import tools
from evaluate import mean_and_std, patterns, t_interval

# --- Weight schemes of the study alone ----------------------------------------------------------


def token_mean(w, tokens):
    """Mean weight of a sampled token of the batch: (B, K) and (B, K) tokens a step -> scalar.

    >>> token_mean(torch.tensor([[1.0, 0.5, 9.9]]), torch.tensor([[1, 3, 0]]))
    tensor(0.6250)
    """
    return (w * tokens).sum() / tokens.sum().clamp(min=1)


def mean_weight(batch, c):
    """The mean over the sampled tokens of the batch of the weights that SOD would give."""
    tokens = sod.step_tokens(batch.step_id, batch.d.shape[1])
    return token_mean(sod.WEIGHTS["sod"](batch, c), tokens)


# Is it the scale of w or its shape? SOD's mean on every token; SOD's shape at mean 1.
sod.WEIGHTS["constant"] = lambda batch, c: mean_weight(batch, c).expand(batch.d.shape)
sod.WEIGHTS["rescaled"] = lambda batch, c: sod.WEIGHTS["sod"](batch, c) / mean_weight(batch, c)
# Is it the lost teacher or the wrong student? Eq. 7 on what only the former changes, the
# teacher's entropy.
sod.WEIGHTS["confident"] = lambda batch, c: sod.step_weights(premises.step_entropy(batch), 0.1,
                                                             c.delta)

# --- Rows ---------------------------------------------------------------------------------------

WORLD = sod.Config()
BUDGET = dict(             # sod_mini's settings of every run; the other ones are its defaults
    iterations=16,         # with the next two: 2,048 rollouts and 32 updates
    prompts=16,
    group_size=8,
    eval_problems=400,     # many problems, few samples: the smallest error for 800 rollouts
    eval_samples=2)
ROWS = {
    "vanilla": dict(method="vanilla"),
    "teacher": dict(method="vanilla", student=WORLD.teacher),
    **{name: dict(method=name) for name in sod.METHODS if name != "vanilla"},
    "sft": dict(method="sft", sft_epochs=1, sft_lr=WORLD.lr),  # see learn: an equal budget
    **{name: dict(weights=name) for name in sod.WEIGHTS if name not in ("sod", "uniform")},
    "opd_full": dict(method="opd", kl="full"), "sod_full": dict(kl="full"),
    "signal": dict(iterations=1, prompts=64, updates=1, lr=1e-12, eval_samples=4),
}
DIGITS, PERSIST = {0: "digits-0", 1: "digits-1", 2: "digits-2", 3: "", 5: "digits-5"}, {
    0.3: "brief", 0.5: "", 0.8: "lasting"}  # the dials: value -> condition, "" for the world as is
DECISIVE = ("sod", "opd", "decay", "mask_after_error", "grpo", "sod_only", "opd_only", "constant",
            "rescaled", "confident")
DIALLED = ("vanilla", "sod", "opd", "mask_after_error")
STUDY = {**{row: 10 if row in DECISIVE else 5 for row in ROWS},  # row: how many seeds
         **{f"{row}@{world}": 5 for dial in (DIGITS, PERSIST) for world in dial.values() if world
            for row in DIALLED}}
PATTERNS = ("stable", "recovery", "erroneous")


def config_of(row, seed, folder, budget):
    """sod_mini's settings of one run."""
    name, _, world = row.partition("@")
    conditions = {"", *DIGITS.values(), *PERSIST.values()}
    if name not in ROWS or world not in conditions:
        raise ValueError(f"the study has no row {row}; choose from {', '.join(STUDY)}")
    changes = {**budget, **ROWS[name]}
    if world in DIGITS.values() and world:
        changes |= premises.files_of(world_folder(folder, world))
    changes |= {"silent_persist": value for value, name in PERSIST.items() if name == world}
    rollouts = changes["prompts"] * budget["group_size"]
    return sod.Config(**changes, seed=seed,
                      sft_batch=rollouts // changes.get("updates", WORLD.updates))


def file_of(row, seed, folder, budget):
    """Where one run is stored; the name changes with any setting."""
    text = json.dumps(asdict(config_of(row, seed, folder, budget)), sort_keys=True)
    return Path(folder) / f"{row}-{seed}-{zlib.crc32(text.encode()):08x}.json"


def world_folder(folder, world):
    """Where the world of a condition such as digits-5 lies."""
    return Path(folder) / "worlds" / world


def make_missing_worlds(rows, folder):
    """Teach the embedded models other numbers of check digits, where these rows ask for it."""
    for digits, world in DIGITS.items():
        place = world_folder(folder, world)
        if world and any(row.endswith(f"@{world}") for row in rows) and not place.exists():
            print(f"making {place}, about 3 minutes", flush=True)
            with tools.whole_folder(place) as aside:
                subprocess.run([sys.executable, make_world.__file__, "--digits", str(digits),
                                "--start", ROOT / "world", "--out", aside], check=True)


# --- One run ------------------------------------------------------------------------------------


def run_one(row, seed, folder, budget):
    """Train and measure one row from one seed; its file is written once all is measured."""
    path, config = file_of(row, seed, folder, budget), config_of(row, seed, folder, budget)
    clock, agent = time.perf_counter(), sod.load_agent(config)
    with agent.tool:
        result = (signal_of if row.startswith("signal") else learn)(agent)
        problems = sod.eval_problems(agent.tokenizer, config)
        result["right"] = sod.evaluate(agent, agent.student, problems).astype(int).tolist()
    tools.write_whole(path, json.dumps({"row": row, "seed": seed, **result,
                                        "seconds_all": time.perf_counter() - clock}))


def learn(agent):
    """Train; the numbers of each iteration that the tables and the figures need."""
    config, clock, best = agent.config, time.perf_counter(), 0.0
    result = {"curve": [], "steps": [], "patterns": [], "example": None, "tokens": 0}
    if config.method == "sft":  # as many conversations as the others have rollouts
        count = min(config.iterations * config.prompts * config.group_size, len(agent.practice))
        agent.practice = random.Random(config.seed).sample(agent.practice, count)
        result["tokens"] = sum(len(turn.ids) for r in agent.practice for turn in r.turns)
    for m, batch in sod.train(agent):
        result["tokens"] += m.get("tokens", 0)
        result["curve"].append({name: m[name] for name in ("right", "reward", "d", "w", "entropy")
                                if name in m})
        if sod.METHODS[config.method].view == "teacher":
            result["steps"].append(steps_after_a_failure(batch))
            result["patterns"].append(pattern_shares(batch))
            result["law"] = law(batch, agent.tokenizer)
            result.setdefault("first", {"drift": premises.drift(batch), "law": result["law"]})
            rises = recoveries(batch)
            if max(rises) > best:
                best, i = max(rises), int(np.argmax(rises))
                rows = sod.rollout_rows(batch, m["iteration"], agent.tokenizer, with_tokens=0)
                result["example"] = list(rows)[i]
    if result["steps"]:
        result["last"] = {"drift": premises.drift(batch), "law": result.pop("law")}
    return result | {"seconds": time.perf_counter() - clock}


LINES = ("no failed call", "fails from step 2 on", "failed at step 2, recovered")


def line_of(failed, k):
    """Index into LINES for step k of a rollout, or None. failed: [did the call of step j fail?]"""
    before = failed[:k]
    if not any(before) and not failed[1:2] == [True]:
        return 0
    if failed[1:2] == [True] and not failed[0]:
        return 1 if all(before[1:]) else None if before[-1] else 2
    return None


def steps_after_a_failure(batch):
    """For each of LINES and each k: [steps, sum of d, sum of the teacher's entropy over step 1's].

    What the paper's Fig. 1 shows: how both rise along a rollout whose second call fails.
    """
    entropy = premises.step_entropy(batch)
    table = np.zeros((len(LINES), batch.d.shape[1], 3))
    for i, rollout in enumerate(batch.rollouts):
        failed = [turn.failed for turn in rollout.turns]
        for k in range(len(failed)):
            if (line := line_of(failed, k)) is not None:
                table[line, k] += 1, batch.d[i, k], entropy[i, k] - entropy[i, 0]
    return table.tolist()


def law(batch, tokenizer):
    """Does w = B / (B + M) hold on clean later steps? The means over them, and the median of d_1.

    B  nats a step of |logp_s - logp_t| on check digits, which no learning takes away
    M  nats a step on all other tokens; where a step has a mistake it is many, else hardly any, so
       B / (B + M) is the mean over steps of the mean B with the M of each
    """
    gap, rows = (batch.logp_s - batch.logp_t).abs(), []
    for i, rollout in enumerate(batch.rollouts):
        for k, pattern in enumerate(premises.step_patterns(rollout)):
            if pattern == "clean":
                worth = make_world.token_worth(tokenizer, rollout.turns[k].ids, 0.0)
                nats, digit = gap[i, batch.step_id[i] == k], torch.tensor(worth) == 0
                rows.append([float(nats[digit].sum()), float(nats[~digit].sum()),
                             float(batch.w[i, k])])
    B, M, w = np.array(rows or [[math.nan] * 3]).T
    return {"d_1": float(batch.d[:, 0].median()), "B": B.mean(), "M": M.mean(),
            "B/(B+M)": (B.mean() / (B.mean() + M)).mean(), "w": w.mean()}


def pattern_shares(batch):
    """Shares of PATTERNS in a batch; a rollout has the pattern of its last step."""
    last = Counter(patterns([turn.outcome for turn in r.turns])[-1] for r in batch.rollouts)
    return [last[name] / len(batch.rollouts) for name in PATTERNS]


def recoveries(batch):
    """How far SOD's weight rises again in each right rollout with a failed call; 0 in others."""
    w = sod.step_weights(batch.d)
    return [float(w[i, len(r.turns) - 1] - w[i, :len(r.turns)].min())
            if r.right and batch.failed[i].any() and 5 <= len(r.turns) <= 8 else 0.0
            for i, r in enumerate(batch.rollouts)]


# --- Does the teacher's signal point the right way? ---------------------------------------------


def signal_of(agent):
    """One move along logp_t - logp_s of some tokens only, from the start: what does success do?

    The classes are the patterns of steps (premises.py). All moves change each parameter by lr, as
    AdamW's first update does, so only their directions are compared. Success is average@k on
    held-out problems, sampled with the same random numbers each time.
    """
    config, clock = agent.config, time.perf_counter()
    problems = sod.eval_problems(agent.tokenizer, config)
    start = copy.deepcopy(agent.student.state_dict())
    _, batch = next(sod.train(agent))  # samples and scores; its own update is too small to count
    signal, result = batch.logp_t - batch.logp_s, {}  # (B, T)
    right = torch.tensor([r.right for r in batch.rollouts])[:, None]
    mean = lambda mask: float(signal[mask].mean()) if mask.any() else None
    for name, tokens in signal_classes(batch).items():
        move_along(agent.student, batch, torch.where(tokens, signal, 0.0), config)
        result[name] = {"tokens": int(tokens.sum()), "mean": mean(tokens),
                        "in_right": mean(tokens & right), "in_wrong": mean(tokens & ~right),
                        "right": float(sod.evaluate(agent, agent.student, problems).mean())}
        agent.student.load_state_dict(start)
    return {"signal": result, "tokens": int((batch.step_id >= 0).sum()),
            "seconds": time.perf_counter() - clock}


def signal_classes(batch):
    """{class: (B, T) bool}: all tokens, then those of the steps of each pattern."""
    number = [[premises.PATTERNS.index(p) for p in premises.step_patterns(r)]
              for r in batch.rollouts]
    kind = sod.pad(number, -1, batch.ids.device).gather(1, batch.step_id.clamp(min=0))
    sampled = batch.step_id >= 0
    return {"all": sampled, **{name: sampled & (kind == n)
                               for n, name in enumerate(premises.PATTERNS)}}


def move_along(model, batch, signal, config, lr=WORLD.lr):
    """Move each parameter by lr towards a larger sum of signal * log pi over the tokens.

    signal  (B, T) what each token is worth, 0 for those that do not count
    """
    weights = list(model.parameters())
    totals = [torch.zeros_like(p) for p in weights]
    for rows in sod.micro_batches(batch.lengths, config.micro_batch_tokens):
        part = batch.rows(rows)
        logp, _ = sod.sampled_logprobs(model, part.ids, part.step_id, config.temperature)
        worth = (signal[rows, :part.ids.shape[1]] * logp).sum()
        totals = [old + new for old, new in zip(totals, torch.autograd.grad(worth, weights))]
    with torch.no_grad():
        for p, total in zip(weights, totals):
            p += lr * total.sign()


# --- Many runs at a time, and again after an interruption ---------------------------------------


def study(rows, seeds, jobs, folder="runs/study", budget=BUDGET):
    """Run what is missing, `jobs` at a time, each in its own process; then tables and figures.

    rows     {row: how many seeds}, of which at most `seeds` are run
    returns  the number of runs that failed
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    plan = {(row, seed): file_of(row, seed, folder, budget)
            for seed in range(seeds) for row, most in rows.items() if seed < most}
    make_missing_worlds(rows, folder)
    todo = [job for job, path in plan.items() if not path.exists()]
    print(f"{len(rows)} rows, {len(plan)} runs, {len(plan) - len(todo)} done; "
          "after an interruption the same command continues", flush=True)
    failed = run_all(todo, jobs, plan, budget)
    results = read_runs({**STUDY, **rows}, folder, budget)
    text = report(results, budget)
    tools.write_whole(folder / "README.md", text + "\n")
    for name, svg in figures(results).items():
        tools.write_whole(folder / name, svg)
    print(f"\n{text}\n\ntables and figures  {folder}")
    return failed


def read_runs(rows, folder, budget, most=20):
    """{row: {seed: run}} of all that is stored with these settings."""
    results = defaultdict(dict)
    for row in rows:
        for seed in range(most):
            path = file_of(row, seed, folder, budget)
            if path.exists():
                results[row][seed] = json.loads(path.read_text())
    return results


def run_all(todo, jobs, plan, budget):
    """Run (row, seed) after (row, seed), `jobs` at a time; returns how many failed."""
    with ThreadPoolExecutor(jobs) as pool:
        runs = [pool.submit(run_apart, job, plan, budget) for job in todo]
        try:
            return sum(not run.result() for run in as_completed(runs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run_apart(job, plan, budget):
    """One run in a process of its own, with one thread: two runs side by side are faster than one
    after the other on two cores. Says what came of it; True if it is stored."""
    (row, seed), path = job, plan[job]
    order = json.dumps({"row": row, "seed": seed, "folder": str(path.parent), "budget": budget})
    done = subprocess.run([sys.executable, __file__, "--worker", order], text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode or not path.exists():
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"{row} seed {seed} FAILED with status {done.returncode}: {last}", flush=True)
        return False
    result = json.loads(path.read_text())
    print(f"{sum(path.exists() for path in plan.values())}/{len(plan)}  {row} seed {seed}: "
          f"{100 * np.mean(result['right']):.1f}% in {result['seconds_all']:.0f} s", flush=True)
    return True


# --- Tables -------------------------------------------------------------------------------------


def score(run):
    """average@k of a run, in percent."""
    return 100 * np.mean(run["right"])


def against(results, row, rival):
    """Points by which a row beats its rival in the same world, paired by seed, as a table cell."""
    _, sign, world = row.partition("@")
    other = results.get(f"{rival}{sign}{world}", {})
    seeds = sorted(results.get(row, {}).keys() & other.keys())
    if len(seeds) < 2 or f"{rival}{sign}{world}" == row:
        return ""
    mean, low, high = t_interval([score(results[row][s]) - score(other[s]) for s in seeds])
    word = "better" if low > 0 else "worse" if high < 0 else "open"
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}) {word}"


def average(results, row):
    """mean ± std over seeds, with their number, as a table cell."""
    runs = results.get(row, {}).values()
    if not runs:
        return ""
    mean, std = mean_and_std([score(run) for run in runs])
    return f"{mean:.1f}" + (f" ± {std:.1f}" if std == std else "") + f" ({len(runs)})"


def report(results, budget):
    """The tables of all that has been run, as markdown."""
    runs = [run for row in results.values() for run in row.values()]
    hours = sum(run["seconds_all"] for run in runs) / 3600
    lines = ["# The study: the paper's methods in the embedded world", "",
             "Made by `python data/study.py`, with figures of the [learning curves](learning.svg), "
             "[drift after a failed call](drift.svg) beside the paper's Fig. 1, [patterns of "
             "rollouts](patterns.svg), [weights along a rollout](weights.svg) and the dials of "
             "[check digits](digits.svg) and [lasting failures](persist.svg).", "",
             f"average@{budget['eval_samples']} on {budget['eval_problems']} held-out problems, in "
             "percent, mean ± std over seeds (their number); "
             f"{budget['iterations']} iterations of "
             f"{budget['prompts'] * budget['group_size']} rollouts. {len(runs)} runs, "
             f"{hours:.1f} hours of one thread in all.", "",
             "Paired by seed: difference in points, 95% t interval over seeds, and what it says; "
             "of twenty such verdicts one is expected to be wrong.", "",
             "| row | average | minus opd | minus sod | tokens sampled | seconds |",
             "|---|---:|---|---|---:|---:|"]
    lines += [row_line(results, row) for row in results if row != "signal" and "@" not in row]
    return "\n".join([*lines, *drift_lines(results.get("sod", {})),
                      *dial_lines(results, "check digits", DIGITS),
                      *dial_lines(results, "chance that silence lasts", PERSIST),
                      *signal_lines(results.get("signal", {}))])


def row_line(results, row):
    """One row of the first table."""
    tokens, seconds = (np.mean([run[name] for run in results[row].values()])
                       for name in ("tokens", "seconds"))
    return (f"| {row} | {average(results, row)} | {against(results, row, 'opd')} | "
            f"{against(results, row, 'sod')} | {tokens:,.0f} | {seconds:.0f} |")


def drift_lines(runs):
    """d, w and the teacher's entropy by pattern, at the first and the last iteration of sod."""
    if not runs:
        return []
    lines = ["", "Patterns of steps at the first and the last iteration of `sod`, means over seeds "
             "of: median d, mean w, the teacher's entropy (nats a token).", "",
             "| step | first iteration: d, w, entropy | last iteration: d, w, entropy |",
             "|---|---|---|"]
    for pattern in premises.PATTERNS:
        cells = [np.nanmean([run[when]["drift"][pattern][1:] for run in runs.values()], axis=0)
                 for when in ("first", "last")]
        lines.append(f"| {pattern} | " + " | ".join(
            ", ".join(f"{x:.2f}" for x in cell) for cell in cells) + " |")
    return lines


def dial_lines(results, heading, dial):
    """What a dial does: the scale of d_1, the law of w on clean steps, and who is ahead."""
    lines = ["", "B and M: nats of a clean later step on check digits and on all other tokens, at "
             "the first iteration; w: mean weight there.", "",
             f"| {heading} | d_1 | B | M | B / (B + M) | w | start | opd | sod | "
             "mask_after_error | sod minus opd | sod minus mask |", "|---:" * 10 + "|---|---|"]
    for value, world in dial.items():
        row = lambda name: f"{name}@{world}" if world else name
        if runs := results.get(row("sod"), {}).values():
            laws = [f"{np.mean([run['first']['law'][name] for run in runs]):.2f}"
                    for name in ("d_1", "B", "M", "B/(B+M)", "w")]
            cells = [average(results, row(name)) for name in ("vanilla", *DIALLED[2:0:-1],
                                                              DIALLED[3])]
            cells += [against(results, row("sod"), rival) for rival in ("opd", "mask_after_error")]
            lines.append(f"| {value} | " + " | ".join(laws + cells) + " |")
    return lines if len(lines) > 5 else []


def signal_lines(runs):
    """What one move along the teacher's signal of some tokens does to success, as a table."""
    if not runs:
        return []
    lines = ["", "One move of equal length along logp_t - logp_s of some tokens, from the start: "
             "change of success in points, 95% t interval over seeds.", "",
             "| tokens of steps | share of tokens | mean signal, nats | in right, wrong rollouts | "
             "change of success |", "|---|---:|---:|---:|---|"]
    cell = lambda values, form: format(np.mean([v for v in values if v is not None] or [math.nan]),
                                       form)
    for name in next(iter(runs.values()))["signal"]:
        ones = [run["signal"][name] for run in runs.values()]
        mean, low, high = t_interval([100 * (one["right"] - np.mean(run["right"]))
                                      for one, run in zip(ones, runs.values())])
        share = cell([o["tokens"] / run["tokens"] for o, run in zip(ones, runs.values())], ".0%")
        both, right, wrong = (cell([one[part] for one in ones], "+.2f")
                              for part in ("mean", "in_right", "in_wrong"))
        lines.append(f"| {name} | {share} | {both} | {right}, {wrong} | "
                     f"{mean:+.1f}" + f" ({low:+.1f} to {high:+.1f})" * (low == low) + " |")
    return lines


# --- Figures ------------------------------------------------------------------------------------


# The paper's Fig. 1 as read from its picture, within about .05: mean d at steps 1 to 4 of rollouts
# with a wrong call at step 2; the teacher's entropy over that of step 1 in erroneous rollouts.
PAPER = {1: (0.22, 0.93, 1.67, 2.93), 2: (0.0, 0.22, 0.19, 0.26, 0.42, 0.56, 0.65)}


def figures(results):
    """{file name: SVG} of what the finished runs can show."""
    shown = [row for row in ("sod", "opd", "mask_after_error", "grpo", "sod_only")
             if results.get(row)]
    drawn = {}
    if shown:
        curve = lambda run: [100 * m["right"] for m in run["curve"]]
        drawn["learning.svg"] = line_chart(
            "Learning curves", "Right rollouts by iteration; mean and std over seeds.",
            [("Right rollouts", "iteration", "%",
              {row: band([curve(run) for run in results[row].values()]) for row in shown})])
    if runs := list(results.get("sod", {}).values()):
        drawn["drift.svg"] = drift_chart(runs)
        drawn["patterns.svg"] = patterns_chart(results)
        for example in [run["example"] for run in runs if run["example"]][:1]:
            drawn["weights.svg"] = weights_picture(example)
    for name, heading, dial, times in (("digits", "check digits", DIGITS, 1), (
            "persist", "chance that silence lasts, tenths", PERSIST, 10)):
        lines = {row: dial_line(results, row, dial, times) for row in DIALLED}
        if any(len(line) > 1 for line in lines.values()):
            drawn[f"{name}.svg"] = line_chart(
                f"The dial: {heading}", "average@k after training; mean and std over seeds.",
                [("Success", heading, "%", lines)])
    return drawn


def drift_chart(runs):
    """The paper's Fig. 1 beside ours."""
    paper = lambda column: [(k, y, y, y) for k, y in enumerate(PAPER[column], 1)]
    return line_chart(
        "Drift after a failed call", "d_k and the teacher's entropy by step of the rollout, in all "
        "training rollouts of SOD, mean and std over seeds; beside it the paper's Fig. 1, a wrong "
        "call at step 2.",
        [(what, "step k", "nats/token", {**{line: drift_line(runs, number, column)
                                            for number, line in enumerate(LINES)},
                                         "paper, wrong call": paper(column)})
         for what, column in (("Divergence d_k", 1), ("Teacher's entropy over step 1's", 2))])


def patterns_chart(results):
    """Shares of PATTERNS by iteration."""
    shares = lambda row, n: band([[100 * batch[n] for batch in run["patterns"]]
                                  for run in results[row].values()])
    return line_chart(
        "Patterns of rollouts over training", "Shares of stable, recovering and erroneous "
        "rollouts by iteration; mean and std over seeds.",
        [(row, "iteration", "%", {name: shares(row, n) for n, name in enumerate(PATTERNS)})
         for row in ("sod", "opd") if results.get(row)])


def dial_line(results, row, dial, times):
    """[(value of the dial, mean, low, high)] of a row's score, a standard deviation either side."""
    runs = {value: results.get(f"{row}@{world}" if world else row) for value, world in dial.items()}
    return [(round(times * value), *band([[score(run)] for run in found.values()])[0][1:])
            for value, found in runs.items() if found]


def band(curves):
    """Curves of several seeds -> [(x, mean, low, high)], a standard deviation either side."""
    mean = np.mean(curves, axis=0)
    std = np.std(curves, axis=0, ddof=1) if len(curves) > 1 else 0 * mean
    return [(x, m, m - s, m + s) for x, (m, s) in enumerate(zip(mean, std), 1)]


def drift_line(runs, kind, column, fewest=20):
    """[(k, mean, low, high)] over seeds; only where each seed has seen enough steps to average."""
    line, K = [], max(len(table[kind]) for run in runs for table in run["steps"])
    for k in range(K):
        cells = np.array([np.sum([table[kind][k] for table in run["steps"] if k < len(table[kind])],
                                 axis=0) for run in runs])  # (seeds, 3)
        if cells[:, 0].min() >= fewest:
            ((_, *point),) = band((cells[:, column] / cells[:, 0])[:, None])
            line.append((k + 1, *point))
    return line


STYLE = """<style>
text{font:13px system-ui,sans-serif;fill:#24292f}.title{font-weight:600}.small{font-size:12px}
.page{fill:#fff}.grid{stroke:#d8dee4}.line{fill:none;stroke-width:2}.band{opacity:.18}
@media(prefers-color-scheme:dark){text{fill:#dde3ea}.page{fill:#0d1117}.grid{stroke:#30363d}}
</style>"""
COLOURS = ("#2f81f7", "#d9730d", "#2da44e", "#bf4fb5", "#8b949e")  # seen on white and on black
DASHES = ("", "7 3", "2 3", "9 3 2 3", "1 4")  # and told apart without colour


def svg(width, height, title, description, body):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" role="img" aria-labelledby="t d">\n<title id="t">'
            f'{html.escape(title)}</title>\n<desc id="d">{html.escape(description)}</desc>\n'
            f'{STYLE}\n<rect class="page" width="{width}" height="{height}"/>\n'
            + "\n".join(body) + "\n</svg>\n")


def label(x, y, text, more=' class="small"'):
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{html.escape(str(text))}</text>'


def line_chart(title, description, panels, width=440, height=300):
    """Panels side by side, each (heading, x label, y label, {name: [(x, y, low, high)]})."""
    body = [f'<g transform="translate({n * width} 0)">\n' + "\n".join(panel_of(*panel)) + "\n</g>"
            for n, panel in enumerate(panels)]
    return svg(width * len(panels), height, title, description, body)


def panel_of(heading, x_label, y_label, lines, left=48, up=44, wide=270, tall=210):
    """A grid from 0, and for each name a band, a line and its word beside the grid."""
    points = [point for line in lines.values() for point in line] or [(1, 0.0, 0.0, 0.0)]
    first, last = min(p[0] for p in points), max(p[0] for p in points)
    levels = ticks(max(p[3] for p in points) or 1.0)
    x_of = lambda x: left + wide * (x - first) / max(last - first, 1)
    y_of = lambda y: up + tall * (1 - max(y, 0) / levels[-1])
    body = [label(left, 18, heading, ' class="title"'), label(left, 35, y_label),
            label(left + wide / 2, up + tall + 36, x_label)]
    for y in levels:
        body += [f'<path class="grid" d="M{left} {y_of(y):.1f}h{wide}"/>',
                 label(left - 6, y_of(y) + 4, f"{y:g}", ' class="small" text-anchor="end"')]
    body += [label(x_of(x) - 3, up + tall + 18, x)
             for x in range(first, last + 1, max(1, math.ceil((last - first) / 8)))]
    for n, ((name, line), colour, dash) in enumerate(zip(lines.items(), COLOURS, DASHES)):
        path = lambda column: [f"{x_of(p[0]):.1f},{y_of(p[column]):.1f}" for p in line]
        body += [f'<polygon class="band" fill="{colour}" points="'
                 f'{" ".join(path(2) + path(3)[::-1])}"/>',
                 f'<polyline class="line" stroke="{colour}" stroke-dasharray="{dash}" '
                 f'points="{" ".join(path(1))}"/>',
                 f'<path class="line" stroke="{colour}" stroke-dasharray="{dash}" '
                 f'd="M{left + wide + 8} {up + 18 * n}h18"/>',
                 label(left + wide + 30, up + 18 * n + 4, name)]
    return body


def ticks(top, most=5):
    """Round numbers from 0 to at least `top`, at most `most` intervals."""
    unit = 10.0 ** math.floor(math.log10(top / most))
    gap = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m * most >= top)
    return [gap * n for n in range(math.ceil(round(top / gap, 6)) + 1)]


def weights_picture(row):
    """w_k along one rollout: a bar a step, beside what was called and what came of it."""
    body = [label(16, 26, f"“{row['question']}”", ' class="title"'), label(16, 50, "step k"),
            label(330, 50, "d_k"), label(380, 50, "w_k: how far the teacher is trusted")]
    for k, turn in enumerate(row["turns"]):
        call, y = tools.parse_tool_call(turn["text"]), 80 + 44 * k
        said = call.code if call and not call.fault else turn["text"]
        answer = ((turn["tool"] or "the answer").strip().splitlines() or [""])[-1]
        bad, length = turn["outcome"] not in sod.FINE, 200 * turn["w"]
        body += [label(16, y, f"{k + 1}  {said.strip()[:38]}", ""),
                 label(30, y + 17, ("✗ " if bad else "→ ") + answer[:44]),
                 label(330, y, f"{turn['d']:.2f}", ""),
                 f'<rect x="380" y="{y - 13}" width="{length:.1f}" height="18" rx="3" '
                 f'fill="{COLOURS[1 if bad else 0]}"/>',
                 label(388 + length, y, f"{turn['w']:.2f}", "")]
    return svg(680, 76 + 44 * len(row["turns"]), "w_k along a rollout that recovers",
               "Each step's call, divergence d_k and weight w_k; ✗ marks failed calls.", body)


# --- The command --------------------------------------------------------------------------------


def command(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rows", nargs="+", default=list(STUDY), metavar="ROW",
                        help=f"rows of the study: {', '.join(STUDY)}")
    parser.add_argument("--seeds", type=int, default=10,
                        help="most seeds of a row [10]; rows that decide nothing have 5")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time [2]")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)  # one run
    args = parser.parse_args(argv)
    if args.worker:
        run_one(**args.worker)
        return 0
    if min(args.seeds, args.jobs) < 1:
        parser.error("--seeds and --jobs must be at least 1")
    rows = {row: STUDY.get(row, args.seeds) for row in args.rows}
    return int(study(rows, args.seeds, args.jobs) > 0)


def main(argv=None):
    """The exit status: 0 done, 1 something failed, 2 wrong options, 128 and more by a signal."""
    return sod.ends_with_a_sentence(partial(command, argv),
                                    "the same command continues where this one stopped")


if __name__ == "__main__":
    sys.exit(main())
