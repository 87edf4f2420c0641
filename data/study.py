"""The study: the paper's rows in the embedded world, over seeds, and the teacher's signal.

    python data/study.py                    five seeds of every row, about 80 minutes on two cores
    python data/study.py --rows sod opd     some rows

Each row and seed is one run in a process of its own, stored in runs/study. The same command
continues an interrupted study. It ends with table and figures in runs/study; those that are shown
in data/study were made so.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

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


def median_weights(d, epsilon=1e-6, delta=0.2):
    """Eq. 7 with the median of d_1..d_k in place of d_1: one easy step cannot switch off the rest.

    >>> median_weights(torch.tensor([[0.0, 0.4, 0.2]]))
    tensor([[1.0000, 0.5000, 1.0000]])
    """
    middle = torch.stack([d[:, :k].quantile(0.5, dim=1) for k in range(1, d.shape[1] + 1)], 1)
    return ((middle + epsilon) / (d + epsilon)).clamp(max=1 + delta)


# Is it the scale of w or its shape? SOD's mean on every token; SOD's shape at mean 1.
sod.WEIGHTS["constant"] = lambda batch, c: mean_weight(batch, c).expand(batch.d.shape)
sod.WEIGHTS["rescaled"] = lambda batch, c: sod.WEIGHTS["sod"](batch, c) / mean_weight(batch, c)
sod.WEIGHTS["median"] = lambda batch, c: median_weights(batch.d, c.epsilon, c.delta)

# --- Rows ---------------------------------------------------------------------------------------

WORLD = sod.Config()
BUDGET = dict(             # sod_mini's settings of every run; the other ones are its defaults
    iterations=16,         # with the next two: 1,024 rollouts and 32 updates, enough to triple the
    prompts=8,             # start's score, not enough to reach the ceiling, in under a minute of
    group_size=8,          # one CPU thread
    eval_problems=200,     # many problems, few samples: the smallest error for 400 rollouts
    eval_samples=2)
ROWS = {
    "vanilla": dict(method="vanilla"),
    "teacher": dict(method="vanilla", student=WORLD.teacher),
    **{name: dict(method=name) for name in sod.METHODS},
    "sft": dict(method="sft", sft_epochs=1, sft_lr=WORLD.lr),  # see learn: an equal budget
    **{name: dict(weights=name) for name in sod.WEIGHTS if name not in ("sod", "uniform")},
    "opd_full": dict(method="opd", kl="full"), "sod_full": dict(kl="full"),
    "seasoned": dict(method="grpo", student=WORLD.teacher, lr=1e-4),
    "signal": dict(iterations=1, prompts=64, updates=1, lr=1e-12, eval_samples=4),
}
CONDITIONS = {  # row@condition: the world, or the teacher, is another one
    "": {}, "quiet": dict(silent_rate=0.0), "loud": dict(silent_rate=0.3),
    "seasoned": {},  # the teacher is the row "seasoned": it has practised with a failing tool
}
STUDY_ROWS = ["seasoned", *(row for row in ROWS if row != "seasoned"),
              *(f"{row}@{world}" for world in ("quiet", "loud")
                for row in ("vanilla", "opd", "sod")), "opd@seasoned", "sod@seasoned"]
CLASSES = ("no failed call yet", "its call fails", "after a failed call")
PATTERNS = ("stable", "recovery", "erroneous")


def config_of(row, seed, folder, budget):
    """sod_mini's settings of one run."""
    name, _, world = row.partition("@")
    if name not in ROWS or world not in CONDITIONS:
        raise ValueError(f"the study has no row {row}; choose from {', '.join(STUDY_ROWS)}")
    changes = {**budget, **ROWS[name], **CONDITIONS[world]}
    if name == "seasoned":
        changes["iterations"] = 3 * budget["iterations"]
    if world == "seasoned":
        path = file_of("seasoned", 0, folder, budget)
        changes["teacher"] = str(path.with_suffix("") / "checkpoint")
    rollouts = changes["prompts"] * budget["group_size"]
    return sod.Config(**changes, seed=seed,
                      sft_batch=rollouts // changes.get("updates", WORLD.updates))


def file_of(row, seed, folder, budget):
    """Where one run is stored; the name changes with any setting."""
    text = json.dumps(asdict(config_of(row, seed, folder, budget)), sort_keys=True)
    return Path(folder) / f"{row}-{seed}-{zlib.crc32(text.encode()):08x}.json"


# --- One run ------------------------------------------------------------------------------------


def run_one(row, seed, folder, budget):
    """Train and measure one row from one seed; its file is written once all is measured."""
    path, config = file_of(row, seed, folder, budget), config_of(row, seed, folder, budget)
    clock, agent = time.perf_counter(), sod.load_agent(config)
    with agent.tool:
        result = (signal_of if row == "signal" else learn)(agent)
        problems = sod.eval_problems(agent.tokenizer, config)
        result["right"] = sod.evaluate(agent, agent.student, problems).astype(int).tolist()
    if row == "seasoned":
        path.with_suffix("").mkdir(exist_ok=True)
        sod.save_checkpoint(agent, path.with_suffix(""))
    tools.write_whole(path, json.dumps({"row": row, "seed": seed, **result,
                                        "seconds_all": time.perf_counter() - clock}))


def learn(agent):
    """Train; the numbers of each iteration that the table and the figures need."""
    config, clock, best = agent.config, time.perf_counter(), 0.0
    result = {"curve": [], "drift": [], "patterns": [], "example": None, "tokens": 0}
    if config.method == "sft":  # as many conversations as the others have rollouts
        count = min(config.iterations * config.prompts * config.group_size, len(agent.practice))
        agent.practice = random.Random(config.seed).sample(agent.practice, count)
        result["tokens"] = sum(len(turn.ids) for r in agent.practice for turn in r.turns)
    for m, batch in sod.train(agent):
        result["tokens"] += m.get("tokens", 0)
        result["curve"].append({name: m[name] for name in ("right", "reward", "d", "w", "entropy")
                                if name in m})
        if sod.METHODS[config.method].view == "teacher":
            result["drift"].append(drift_table(batch))
            result["patterns"].append(pattern_shares(batch))
            rises = recoveries(batch)
            if max(rises) > best:
                best, i = max(rises), int(np.argmax(rises))
                rows = sod.rollout_rows(batch, m["iteration"], agent.tokenizer, with_tokens=0)
                result["example"] = list(rows)[i]
    return result | {"seconds": time.perf_counter() - clock}


def failed_before(batch):
    """(B, K) bool: a call before step k failed."""
    return batch.failed.cumsum(1) - batch.failed.long() > 0


def drift_table(batch):
    """For each of CLASSES and each k: [steps, sum of d, sum of the teacher's mean entropy]."""
    K = batch.d.shape[1]
    tokens = sod.step_tokens(batch.step_id, K)
    inside = torch.where(batch.step_id >= 0, batch.entropy_t, 0.0)
    entropy = sod.step_sums(inside, batch.step_id, K) / tokens.clamp(min=1)
    kinds = torch.where(failed_before(batch), 2, batch.failed.long())  # index into CLASSES
    return [[[int(rows.sum()), float(batch.d[rows, k].sum()), float(entropy[rows, k].sum())]
             for k in range(K) for rows in [(kinds[:, k] == kind) & (tokens[:, k] > 0)]]
            for kind in range(len(CLASSES))]


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

    The classes differ in step index and in whether a call failed before. All moves change each
    parameter by lr, as AdamW's first update does, so only their directions are compared. Success
    is average@k on held-out problems, sampled with the same random numbers each time.
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
    """{class: (B, T) bool}: all tokens, then by step index and by a failed call before the step."""
    k = batch.step_id
    before = failed_before(batch).gather(1, k.clamp(min=0))
    places = {"step 1": k == 0, "step 2": k == 1, "step 3": k == 2, "step 4 and later": k > 2}
    classes = {f"{CLASSES[2 * after]}, {place}": mask & (before == bool(after))
               for after in (0, 1) for place, mask in places.items()}
    del classes[f"{CLASSES[2]}, step 1"]  # nothing comes before the first step
    return {"all": k >= 0, **classes}


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
    """Run what is missing, `jobs` at a time, each in its own process; then the table and figures.

    returns  the number of runs that failed
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(dict.fromkeys(["seasoned"] * any("@seasoned" in row for row in rows) + rows))
    plan = {(row, seed): file_of(row, seed, folder, budget) for seed in range(seeds)
            for row in rows if row != "seasoned" or seed == 0}
    todo = [job for job, path in plan.items() if not path.exists()]
    print(f"{len(rows)} rows x {seeds} seeds: {len(plan)} runs, {len(plan) - len(todo)} done; "
          "after an interruption the same command continues", flush=True)
    failed = run_all(in_order(todo), jobs, plan, budget)
    results = defaultdict(dict)
    for (row, seed), path in plan.items():
        if path.exists():
            results[row][seed] = json.loads(path.read_text())
    text = report(results, rows, seeds, len(plan), budget)
    tools.write_whole(folder / "README.md", text + "\n")
    for name, svg in figures(results).items():
        tools.write_whole(folder / name, svg)
    print(f"\n{text}\n\ntable and figures  {folder}")
    return failed


def in_order(todo):
    """The teacher "seasoned" comes first and its pupils last, so that hardly anybody waits."""
    return sorted(todo, key=lambda job: (job[0] != "seasoned", "@seasoned" in job[0]))


def run_all(todo, jobs, plan, budget):
    """Run (row, seed) after (row, seed), `jobs` at a time; returns how many failed."""
    with ThreadPoolExecutor(jobs) as pool:
        runs = {}
        for job in todo:
            runs[job] = pool.submit(run_apart, job, plan, budget, runs.get(("seasoned", 0)))
        try:
            return sum(not run.result() for run in as_completed(runs.values()))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run_apart(job, plan, budget, seasoned):
    """One run in a process of its own, with one thread: two runs side by side are faster than one
    after the other on two cores. Says what came of it; True if it is stored."""
    (row, seed), path = job, plan[job]
    if "@seasoned" in row and seasoned:
        seasoned.result()  # its teacher
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


def against(results, row, rival):
    """Points by which a row beats its rival in the same world, paired by seed, as a table cell."""
    _, sign, world = row.partition("@")
    other = results.get(f"{rival}{sign}{world}", {})
    seeds = sorted(results[row].keys() & other.keys())
    if len(seeds) < 2 or f"{rival}{sign}{world}" == row:
        return ""
    score = lambda run: 100 * np.mean(run["right"])
    mean, low, high = t_interval([score(results[row][s]) - score(other[s]) for s in seeds])
    word = "better" if low > 0 else "worse" if high < 0 else "open"
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}) {word}"


def report(results, rows, seeds, planned, budget):
    """The table of all rows and the table of the signal, as markdown."""
    runs = [run for row in results.values() for run in row.values()]
    minutes = sum(run["seconds_all"] for run in runs) / 60
    lines = ["# The study: the paper's rows in the embedded world", "",
             "Made by `python data/study.py`, with figures of the "
             "[learning curves](learning.svg), [drift after a failed call](drift.svg), "
             "[patterns of rollouts](patterns.svg) and [weights along a rollout](weights.svg).", "",
             f"average@{budget['eval_samples']} on {budget['eval_problems']} held-out problems, in "
             f"percent, mean ± std over {seeds} seeds (or the number in brackets); "
             f"{budget['iterations']} iterations of {budget['prompts'] * budget['group_size']} "
             f"rollouts. {len(runs)} of {planned} runs, {minutes:.0f} minutes of one thread in "
             "all.", "",
             "Paired by seed: difference in points, 95% t interval over seeds, and what it says; "
             "of twenty such verdicts one is expected to be wrong.", "",
             "| row | average | minus opd | minus sod | tokens sampled | seconds |",
             "|---|---:|---|---|---:|---:|"]
    lines += [row_line(results, row, seeds) for row in rows
              if results.get(row) and row != "signal"]
    return "\n".join(lines + signal_lines(results.get("signal", {})))


def row_line(results, row, seeds):
    """One row of the first table."""
    runs = results[row].values()
    mean, std = mean_and_std([100 * np.mean(run["right"]) for run in runs])
    tokens, seconds = (np.mean([run[name] for run in runs]) for name in ("tokens", "seconds"))
    return (f"| {row} | {mean:.1f}" + (f" ± {std:.1f}" if std == std else "")
            + f" ({len(runs)})" * (len(runs) < seeds)
            + f" | {against(results, row, 'opd')} | {against(results, row, 'sod')} | "
            f"{tokens:,.0f} | {seconds:.0f} |")


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


def figures(results):
    """{file name: SVG} of what the finished runs can show."""
    drawn, curve = {}, lambda run: [100 * m["right"] for m in run["curve"]]
    shown = [row for row in ("sod", "opd", "grpo", "opd_only", "sod_only") if results.get(row)]
    if shown:
        drawn["learning.svg"] = line_chart(
            "Learning curves", "Right rollouts by iteration; mean and std over seeds.",
            [("Right rollouts", "iteration", "%",
              {row: band([curve(run) for run in results[row].values()]) for row in shown})])
    if results.get("sod"):
        runs = list(results["sod"].values())
        drawn["drift.svg"] = line_chart(
            "Drift after a failed call", "d_k and the teacher's entropy by step of the rollout, "
            "in all training rollouts of SOD; mean and std over seeds.",
            [(what, "step k", "nats/token", {kind: drift_line(runs, number, column)
                                             for number, kind in enumerate(CLASSES)})
             for what, column in (("Divergence d_k", 1), ("Entropy of the teacher", 2))])
        shares = lambda row, n: band([[100 * batch[n] for batch in run["patterns"]]
                                      for run in results[row].values()])
        drawn["patterns.svg"] = line_chart(
            "Patterns of rollouts over training", "Shares of stable, recovering and erroneous "
            "rollouts by iteration; mean and std over seeds.",
            [(row, "iteration", "%", {name: shares(row, n) for n, name in enumerate(PATTERNS)})
             for row in ("sod", "opd") if results.get(row)])
        for example in [run["example"] for run in runs if run["example"]][:1]:
            drawn["weights.svg"] = weights_picture(example)
    return drawn


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
    last, levels = max(p[0] for p in points), ticks(max(p[3] for p in points) or 1.0)
    x_of = lambda x: left + wide * (x - 1) / max(last - 1, 1)
    y_of = lambda y: up + tall * (1 - max(y, 0) / levels[-1])
    body = [label(left, 18, heading, ' class="title"'), label(left, 35, y_label),
            label(left + wide / 2, up + tall + 36, x_label)]
    for y in levels:
        body += [f'<path class="grid" d="M{left} {y_of(y):.1f}h{wide}"/>',
                 label(left - 6, y_of(y) + 4, f"{y:g}", ' class="small" text-anchor="end"')]
    body += [label(x_of(x) - 3, up + tall + 18, x)
             for x in range(1, last + 1, max(1, math.ceil(last / 8)))]
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
    parser.add_argument("--rows", nargs="+", default=STUDY_ROWS, metavar="ROW",
                        help=f"rows of the study: {', '.join(STUDY_ROWS)}")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each row [5]")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time [2]")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)  # one run
    args = parser.parse_args(argv)
    if args.worker:
        run_one(**args.worker)
        return 0
    if min(args.seeds, args.jobs) < 1:
        parser.error("--seeds and --jobs must be at least 1")
    return int(study(args.rows, args.seeds, args.jobs) > 0)


def main(argv=None):
    """The exit status: 0 done, 1 something failed, 2 wrong options, 128 and more by a signal."""
    return sod.ends_with_a_sentence(partial(command, argv),
                                    "the same command continues where this one stopped")


if __name__ == "__main__":
    sys.exit(main())
