"""Tables and figures of the study: study.py does the runs, this file shows their results.

Results are {row: {seed: run}}; what a run holds is written by `run_one` in study.py.
"""
import html
import math
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import numpy as np

import premises
import sod_mini as sod
import tools
from evaluate import mean_and_std
from sod_mini import t_interval

LINES = ("no failed call", "fails from step 2 on", "failed at step 2, recovered")
PATTERNS = ("stable", "recovery", "erroneous")
SUSPECTS = ("sod", "faults_10", "scored_10", "faults_30", "scored_30", "told_as_success",
            "unshaped", "lr_tenfold", "after_failure")  # of a collapse
DRAWN = ("faults_30", "scored_30", "told_as_success", "lr_tenfold", "after_failure")
APART = ("practice",)  # a dial that has a table of its own
NO_SCHEMES = ("vanilla", "teacher", "sft", "signal", *SUSPECTS[1:-1])  # rows of another kind
OF_PAPER = ("grpo", "opd", "opd_only", "opsd_gt", "opsd_hint", "sod", "sod_only", "decay",
            "mask_after_error", "unclipped")
# A backslash joins the two parts of a row that is longer than a line of code.
OTHERS = """
What others published by November 2026. OPD and SOD by independent hands:

| source | OPD | with SOD's weights | without a teacher |
|---|---|---|---|
| GATS: 1.5B from 7B, 1.5B from 14B, 3B from 7B, each with GRPO | 39.1, 40.9, 51.2 | \
42.1, 39.4, 53.2 | GRPO 53.0, 61.9, 53.0 |
| OG-OPD (2609.35319): ScienceWorld, WebShop, 3 seeds | 13.0 ± 1.4, 28.0 ± 2.6 | \
3.8 ± 1.1, 32.0 ± 2.6 | |
| ATOD (2606.27814): 0.6B, 1.7B, 4B | 67.7, 64.9, 68.1 | 65.7, 65.6, 68.3 | |

Collapse (issues 22 and 24 of the authors' code): between updates 10 and 20 tool calls a rollout
fall from 3.7, in another run from 2.1, to .5, and AIME 2024 from 30.5 to 5.0. The controls come
from 2605.07865 (`vopd`), 2605.10889 (`wrong_only`), 2608.31046 (`negative`) and 2609.04108
(`then`).

What their authors report of the other rows, in percent right and averages over their benchmarks.
None of these papers could be read whole: the last column says what was. `random_keep`,
`constant_d1` and the rows with `sod_` before their name are of this study alone.

| row | source | what its authors report | read |
|---|---|---|---|
| agree | OPDVR, 2608.24696 | 6 of maths, Qwen3-4B: 49.1, OPD 47.8, teacher 50.4; Qwen3-1.7B-Base: \
22.8, OPD 20.9; 40 to 50% of the tokens are left out; the gate turned round is worse than OPD | \
another's notes |
| aligned | RA-OPD, 2608.27960 | 7 of maths, Qwen3-8B-Base: 49.4, OPD 44.3; \
R1-Distill-Qwen-7B: 69.3, OPD 64.4 | abstract; figures and formula in another's notes |
| dial | DIAL-OPD, 2610.11659 | 7 of maths, 4 pairs: with 40% of each rollout's tokens up to 5.25 \
points over OPD on all of them | notes of three others |
| residual | Residual Advantage, 2610.11519 | 3 of maths, Qwen3-1.7B and 4B from 8B: average@8 1.7 \
to 3.6 points over GRPO or REINFORCE++ without a teacher, better in 24 of 24 comparisons | \
notes of two others |
| lead | GATS | the table above; TGOPD (2609.02998), which also tries the teacher on each prompt, \
reports gains over OPD in 6 of 6 settings | GATS was not found, its formula is second-hand; TGOPD: \
abstract |
| return_9, return_99 | 2603.25562 | no scores; the more a token gets of later ones, the noisier \
the gradient and the less stable the learning, in a toy study | abstract |
| opd_full | PowerOPD, 2606.17199 | 6 of maths, 4 pairs: its own method is up to 6.37 points over \
sampled OPD and up to 2.59 over the exact KL | abstract |"""

# --- Tables -------------------------------------------------------------------------------------


def score(run):
    """average@k of a run, in percent."""
    return 100 * np.mean(run["correct"])


def against(results, row, rival):
    """How many points a row is ahead of its rival, paired by seed, as a table cell."""
    mine, other = results.get(row, {}), results.get(rival, {})
    seeds = sorted(mine.keys() & other.keys())
    if len(seeds) < 2 or rival == row:
        return ""
    mean, low, high = t_interval([score(mine[s]) - score(other[s]) for s in seeds])
    word = "better" if low > 0 else "worse" if high < 0 else "open"
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}) {word}"


def average(results, row):
    """mean ± std over seeds, with their number, as a table cell."""
    runs = results.get(row, {}).values()
    if not runs:
        return ""
    mean, std = mean_and_std([score(run) for run in runs])
    return f"{mean:.1f}" + (f" ± {std:.1f}" if std == std else "") + f" ({len(runs)})"


def tables(results, budget, dials):
    """The tables of all that has been run, as markdown."""
    runs = [run for row in results.values() for run in row.values()]
    hours = sum(run["seconds_all"] for run in runs) / 3600
    lines = ["# The study: the paper's methods in the embedded world", "",
             "Made by `python data/study.py`, with figures of the [learning curves](learning.svg), "
             "[drift after a failed call](drift.svg) beside the paper's Fig. 1, [patterns of "
             "rollouts](patterns.svg), [weights along a rollout](weights.svg), [all schemes]"
             "(schemes.svg) in order, the [dials of the world](dials.svg), the [teacher's lead]"
             "(lead.svg) and the [suspects of a collapse](collapse.svg).", "",
             f"average@{budget['eval_samples']} on {budget['eval_problems']} held-out problems, in "
             "percent, mean ± std over seeds (their number); "
             f"{budget['iterations']} iterations of "
             f"{budget['prompts'] * budget['group_size']} rollouts. {len(runs)} runs, "
             f"{hours:.1f} hours of one thread in all.", "",
             "Paired by seed: difference in points, 95% t interval over seeds, and what it says; "
             "of twenty such verdicts one is expected to be wrong.", "",
             "| row | average | minus opd | minus sod | minus grpo | tokens sampled | seconds |",
             "|---|---:|---|---|---|---:|---:|"]
    lines += [row_line(results, row) for row in results if row != "signal" and "@" not in row]
    lines += gate_lines(results) + drift_lines(results.get("sod", {}))
    turned = [dial_lines(results, what, rows_of(results, dial, values, usual))
              for dial, (what, values, usual) in dials.items() if dial not in APART]
    if any(turned):
        lines += ["", "Dials of the world. B and M: nats of a clean later step on check digits and "
                  "on all other tokens, means at the first iteration. B / (B + M): mean over these "
                  "steps of that B with the M of each; most have hardly any M and a few have much, "
                  "so that it is more than the two means give. w: mean weight there; lost: d "
                  "after two failures over d_1.", *sum(turned, [])]
    return "\n".join([*lines, *lead_lines(results, dials), *collapse_lines(results),
                      *signal_lines(results.get("signal", {})), OTHERS])


def rows_of(results, dial, values, usual):
    """{value: {row: runs}} of the rows that were run at each value of a dial."""
    ends = {value: "" if value == usual else f"@{dial}-{value}" for value in values}
    return {value: {row.partition("@")[0]: runs for row, runs in results.items()
                    if row[len(row.partition("@")[0]):] == end} for value, end in ends.items()}


def row_line(results, row):
    """One row of the first table."""
    tokens, seconds = (np.mean([run[name] for run in results[row].values()])
                       for name in ("tokens", "seconds"))
    return (f"| {row} | {average(results, row)} | {against(results, row, 'opd')} | "
            f"{against(results, row, 'sod')} | {against(results, row, 'grpo')} | {tokens:,.0f} | "
            f"{seconds:.0f} |")


def run_lines(results):
    """A line of runs.csv for each run, so that other tables can be made of runs that are gone."""
    return ["row,seed,percent", *(f"{row},{seed},{score(run):.3f}" for row, runs in results.items()
                                 if row != "signal" for seed, run in runs.items())]


def gate_lines(results):
    """What others put in place of the teacher's signal: alone, and with SOD's weights."""
    pairs = [(row, f"sod_{row}") for row in results if f"sod_{row}" in results]
    lines = ["", "What others put in place of the signal, alone and with the weights of SOD, also "
             "against the control that each mask needs: a random 80% of the tokens.", "",
             "| row | alone | minus opd | minus random_keep | with SOD's weights | minus sod | "
             "minus sod_random_keep |", "|---|---:|---|---|---:|---|---|"]
    for alone, weighted in pairs:
        cells = [cell for row, rivals in ((alone, ("opd", "random_keep")),
                                          (weighted, ("sod", "sod_random_keep")))
                 for cell in (average(results, row), *(against(results, row, r) for r in rivals))]
        lines.append(f"| {alone} | " + " | ".join(cells) + " |")
    return lines if pairs else []


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


def dial_lines(results, heading, values):
    """What a dial changes: d_1, the law of w on clean steps, and which method is ahead.

    values  {value of the dial: {row: runs}}
    """
    lines = ["", f"| {heading} | d_1 | B | M | B / (B + M) | w | lost | start | opd | sod | "
             "mask_after_error | sod minus opd | sod minus mask | sod_full minus sod |",
             "|---:" * 11 + "|---" * 3 + "|"]
    for value, rows in values.items():
        if runs := rows.get("sod", {}).values():
            laws = [f"{np.mean([run['first']['law'][name] for run in runs]):.2f}"
                    for name in ("d_1", "B", "M", "B/(B+M)", "w")]
            laws.append(f"{np.mean([lostness(run) for run in runs]):.1f}")
            # Where a dial changes only the teacher, the start is that of the usual world.
            cells = [average(rows if "vanilla" in rows else results, "vanilla"),
                     *(average(rows, row) for row in ("opd", "sod", "mask_after_error"))]
            cells += [against(rows, *pair) for pair in (
                ("sod", "opd"), ("sod", "mask_after_error"), ("sod_full", "sod"))]
            lines.append(f"| {value} | " + " | ".join(laws + cells) + " |")
    return lines if len(lines) > 4 else []


def lostness(run):
    """d after two failures and more over d of first steps, at the first iteration."""
    drift = run["first"]["drift"]
    return drift["after more"][1] / drift["first"][1]


# Others' gain of OPD over GRPO in points, by the teacher's lead over the student in points (GATS).
PUBLISHED = ((-10, -20.8), (-1, -3.0), (10, 2.2), (41, 14.1))


def leads(results, dials):
    """{share of practice: (lead of the teacher in points, {row: runs})}, by lead."""
    start = np.mean([score(run) for run in results.get("vanilla", {}).values()] or [math.nan])
    found = {value: (np.mean([score(run) for run in rows["teacher"].values()]) - start, rows)
             for value, rows in rows_of(results, "practice", *dials["practice"][1:]).items()
             if "teacher" in rows}
    return dict(sorted(found.items(), key=lambda item: item[1][0]))


def lead_lines(results, dials):
    """What distillation adds to GRPO, by the teacher's lead over the student."""
    lines = ["", "What a teacher is worth by its lead over the student: gain over `grpo`, which "
             "has none.", "",
             "| teacher's practice | teacher | lead | opd minus grpo | sod minus grpo |",
             "|---:|---|---:|---|---|"]
    for value, (lead, rows) in leads(results, dials).items():
        gains = [against(rows | {"grpo": results.get("grpo", {})}, row, "grpo")
                 for row in ("opd", "sod")]
        if any(gains):
            lines.append(f"| {value} | {average(rows, 'teacher')} | {lead:+.1f} | "
                         + " | ".join(gains) + " |")
    published = ", ".join(f"{lead:+d}: {gain:+.1f}" for lead, gain in PUBLISHED)
    return lines + ["", f"Published, opd minus grpo by the teacher's lead: {published} (GATS)."] \
        if len(lines) > 5 else []


def collapse_lines(results):
    """Tool calls a rollout and success along training, for each suspect of a collapse."""
    lines = ["", "Suspects of a collapse: tool calls a rollout and right rollouts in percent, in "
             "training, without those that the sandbox failed; means over seeds of the first "
             "iteration, of the lowest one (which) and of the last. The sandbox fails in "
             "iterations 4 to 9; `faults` leaves out the rollouts that it fails, `scored` scores "
             "them as wrong.", "",
             "| row | seeds | tool calls | right | average afterwards | minus sod |",
             "|---|---:|---|---|---|---|"]
    for row in SUSPECTS:
        runs = [run for run in results.get(row, {}).values() if "tool_calls" in run["curve"][0]]
        if runs:
            cells = [path_of([[m[name] for m in run["curve"]] for run in runs], form)
                     for name, form in (("tool_calls", ".1f"), ("correct", ".0%"))]
            lines.append(f"| {row} | {len(runs)} | {cells[0]} | {cells[1]} | "
                         f"{average(results, row)} | {against(results, row, 'sod')} |")
    return lines if len(lines) > 5 else []


def path_of(curves, form):
    """The first, the lowest and the last value of the mean curve, as a table cell."""
    mean = np.mean(curves, axis=0)
    lowest = int(mean.argmin())
    return f"{mean[0]:{form}}, {mean[lowest]:{form}} ({lowest + 1}), {mean[-1]:{form}}"


def variance_lines(found, student, batches):
    """The table of `variance` in study.py: {estimate: (noise, power, cosine)}."""
    exact = found["full"][0]
    lines = [f"Gradient of distillation alone of {student}, over {batches} batches. noise: "
             "variance of a batch's gradient, over that of the exact KL (`full`). batches: how "
             "many must be averaged until the noise is as large as the mean gradient. cosine: of "
             "the mean gradient to that of `full`.", "",
             "| estimate | noise | batches | cosine |", "|---|---:|---:|---:|"]
    return lines + [f"| {name} | {noise / exact:.2f} | "
                    + (f"{noise / power:.1f}" if power > 0 else "not seen") + f" | {cosine:.2f} |"
                    for name, (noise, power, cosine) in found.items()]


def signal_lines(runs):
    """The table of signal_of in study.py: success after one move along the teacher's signal."""
    if not runs:
        return []
    lines = ["", "One move of equal length along logp_t - logp_s of some tokens, from the start: "
             "change of success in points, 95% t interval over seeds.", "",
             "| tokens of steps | share of tokens | mean signal, nats | in right, wrong rollouts | "
             "change of success |", "|---|---:|---:|---:|---|"]
    cell = lambda values, form: format(np.mean([v for v in values if v is not None] or [math.nan]),
                                       form)
    for name in next(iter(runs.values()))["signal"]:
        moves = [(run["signal"][name], run) for run in runs.values()]
        mean, low, high = t_interval([100 * (move["correct"] - np.mean(run["correct"]))
                                      for move, run in moves])
        share = cell([move["tokens"] / run["tokens"] for move, run in moves], ".0%")
        both, right, wrong = (cell([move[part] for move, _ in moves], "+.2f")
                              for part in ("mean", "in_right", "in_wrong"))
        lines.append(f"| {name} | {share} | {both} | {right}, {wrong} | "
                     f"{mean:+.1f}" + f" ({low:+.1f} to {high:+.1f})" * (low == low) + " |")
    return lines


# --- Figures ------------------------------------------------------------------------------------


# The paper's Fig. 1 as read from its picture, within about .05: mean d at steps 1 to 4 of rollouts
# with a wrong call at step 2; the teacher's entropy over that of step 1 in erroneous rollouts.
PAPER = {1: (0.22, 0.93, 1.67, 2.93), 2: (0.0, 0.22, 0.19, 0.26, 0.42, 0.56, 0.65)}


def figures(results, dials):
    """{file name: SVG} of what the finished runs can show."""
    shown = [row for row in ("sod", "opd", "mask_after_error", "grpo", "sod_only")
             if results.get(row)]
    drawn = {}
    if shown:
        drawn["learning.svg"] = line_chart(
            "Learning curves", "Right rollouts by iteration; mean and std over seeds.",
            [curve_panel(results, shown, "Right rollouts", "correct", 100, "%")])
    if runs := list(results.get("sod", {}).values()):
        drawn["drift.svg"] = drift_chart(runs)
        drawn["patterns.svg"] = patterns_chart(results)
        for example in [run["example"] for run in runs if run["example"]][:1]:
            drawn["weights.svg"] = weights_picture(example)
    if schemes := [row for row in results if row not in NO_SCHEMES and "@" not in row]:
        drawn["schemes.svg"] = schemes_chart(
            {row: [score(run) for run in results[row].values()] for row in schemes})
    panels = [dial_panel(what, rows_of(results, dial, values, usual))
              for dial, (what, values, usual) in dials.items()
              if dial not in APART]
    if panels := [panel for panel in panels if any(len(line) > 1 for line in panel[3].values())]:
        drawn["dials.svg"] = line_chart("The dials of the world", "Success after training by the "
                                        "value of each dial; mean and std over seeds.", panels)
    if lines := lead_curves(results, dials):
        drawn["lead.svg"] = line_chart(
            "What a teacher is worth", "Gain over GRPO by the teacher's lead over the student, 95% "
            "intervals over seeds; beside it what others published.",
            [("Gain over GRPO", "teacher's lead, points", "points", lines)])
    if suspects := [row for row in DRAWN if row in results
                    and "tool_calls" in next(iter(results[row].values()))["curve"][0]]:
        drawn["collapse.svg"] = line_chart(
            "Suspects of a collapse", "Along training; in iterations 4 to 9 of faults_30 and "
            "scored_30 the sandbox fails at 30% of calls. Mean and std over seeds.",
            [curve_panel(results, suspects, *what) for what in (
                ("Tool calls a rollout", "tool_calls", 1, ""),
                ("Right rollouts", "correct", 100, "%"), ("Entropy", "entropy", 1, "nats/token"))])
    return drawn


def curve_panel(results, rows, heading, name, scale, unit):
    """A panel of one number along training."""
    curves = {row: [[scale * m[name] for m in run["curve"]] for run in results[row].values()
                    if name in run["curve"][0]] for row in rows}
    return heading, "iteration", unit, {row: band(found) for row, found in curves.items()}


def dial_panel(heading, values):
    """A panel of success by the value of a dial."""
    lines = {row: [(value, *band([[score(run)] for run in rows[row].values()])[0][1:])
                   for value, rows in values.items() if row in rows]
             for row in ("vanilla", "sod", "opd", "mask_after_error")}
    return "Right after training", heading, "%", {
        row: line for row, line in lines.items() if line}


def lead_curves(results, dials):
    """{name: [(lead, gain over grpo, low, high)]} here, and as published."""
    grpo, lines = results.get("grpo", {}), {}
    for row in ("opd", "sod"):
        line = []
        for lead, rows in leads(results, dials).values():
            seeds = rows.get(row, {}).keys() & grpo.keys()
            if len(seeds) > 1:
                line.append((lead, *t_interval([score(rows[row][s]) - score(grpo[s])
                                                for s in sorted(seeds)])))
        if len(line) > 1:
            lines[f"{row}, here"] = line
    return lines and lines | {"opd, published": [(x, y, y, y) for x, y in PUBLISHED]}


def drift_chart(runs, fewest=20, of="training rollouts of SOD, mean and std over seeds"):
    """The paper's Fig. 1 beside ours; fewest: see drift_line."""
    paper = lambda column: [(k, y, y, y) for k, y in enumerate(PAPER[column], 1)]
    return line_chart(
        "Drift after a failed call", "d_k and the teacher's entropy by step of the rollout, in all "
        f"{of}; beside it the paper's Fig. 1, a wrong call at step 2.",
        [(what, "step k", "nats/token", {**{line: drift_line(runs, number, column, fewest)
                                            for number, line in enumerate(LINES)},
                                         "paper, wrong call": paper(column)})
         for what, column in (("Divergence d_k", 1), ("Teacher's entropy over step 1's", 2))])


def patterns_chart(results):
    """Shares of PATTERNS by iteration; none is below 0."""
    shares = lambda row, n: [(x, mean, max(low, 0.0), high) for x, mean, low, high in band(
        [[100 * batch[n] for batch in run["patterns"]] for run in results[row].values()])]
    return line_chart(
        "Patterns of rollouts over training", "Shares of stable, recovering and erroneous "
        "rollouts by iteration; mean and std over seeds.",
        [(row, "iteration", "%", {name: shares(row, n) for n, name in enumerate(PATTERNS)})
         for row in ("sod", "opd") if results.get(row)])


def band(curves):
    """Curves of several seeds -> [(x, mean, low, high)], a standard deviation either side."""
    mean = np.mean(curves, axis=0)
    std = np.std(curves, axis=0, ddof=1) if len(curves) > 1 else 0 * mean
    return [(x, m, m - s, m + s) for x, (m, s) in enumerate(zip(mean, std), 1)]


def drift_line(runs, kind, column, fewest):
    """[(k, mean, low, high)] over seeds, for each k at which every seed has `fewest` steps."""
    line, K = [], max(len(table[kind]) for run in runs for table in run["steps"])
    for k in range(K):
        cells = np.array([np.sum([table[kind][k] for table in run["steps"] if k < len(table[kind])],
                                 axis=0) for run in runs])  # (seeds, 3)
        if cells[:, 0].min() >= fewest:
            ((_, *point),) = band((cells[:, column] / cells[:, 0])[:, None])
            line.append((k + 1, *point))
    return line


# The panels of a figure stand one below the other, so that it is narrow: on a telephone with 360
# pixels it is shown at two thirds of its size, and its words can still be read.
WIDTH, LEFT, WIDE, TALL = 560, 56, 480, 240
STYLE = """<style>
text{font:16px system-ui,sans-serif;fill:#24292f}.title{font-weight:600}.small{font-size:15px}
.page{fill:#fff}.grid{stroke:#d8dee4}.line{fill:none;stroke-width:2}.band{opacity:.18}
svg{display:block;margin:auto;max-width:100%;height:auto}
@media(prefers-color-scheme:dark){text{fill:#dde3ea}.page{fill:#0d1117}.grid{stroke:#30363d}}
</style>"""
COLOURS = ("#2f81f7", "#d9730d", "#2da44e", "#bf4fb5", "#8b949e")  # seen on white and on black
DASHES = ("", "7 3", "2 3", "9 3 2 3", "1 4")  # so that lines differ also without colour
LETTER = 9.6  # pixels of a letter, at most on average: .6 of its height


def svg(height, title, description, body):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" role="img" aria-labelledby="t d">\n<title id="t">'
            f'{html.escape(title)}</title>\n<desc id="d">{html.escape(description)}</desc>\n'
            f'{STYLE}\n<rect class="page" width="{WIDTH}" height="{height}"/>\n'
            + "\n".join(body) + "\n</svg>\n")


def label(x, y, text, more=' class="small"'):
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{html.escape(str(text))}</text>'


def line_chart(title, description, panels):
    """Panels below one legend, each (heading, x label, y label, {name: [(x, y, low, high)]})."""
    names = dict.fromkeys(name for *_, lines in panels for name in lines)
    pens = {name: f'class="line" stroke="{colour}" stroke-dasharray="{dash}"'
            for name, colour, dash in zip(names, COLOURS, DASHES)}
    body, bottom = legend(pens)
    for panel in panels:
        body += [f'<g transform="translate(0 {bottom})">', *panel_of(*panel, pens), "</g>"]
        bottom += TALL + 96
    return svg(bottom, title, description, body)


def legend(pens):
    """Names beside a piece of their lines, in as many rows as they need; and where it ends."""
    body, x, y = [], 16, 22
    for name, pen in pens.items():
        end = x + 34 + LETTER * len(name)
        if end > WIDTH and x > 16:
            x, y, end = 16, y + 22, end - x + 16
        body += [f'<path {pen} d="M{x:.1f} {y - 5}h28"/>', label(x + 34, y, name)]
        x = end + 14
    return body, y + 8


def panel_of(heading, x_label, y_label, lines, pens, up=46):
    """A grid that holds 0, and for each name a band and a line, or a dot where it has one point."""
    points = [point for line in lines.values() for point in line] or [(1, 0.0, 0.0, 0.0)]
    first, last = min(p[0] for p in points), max(p[0] for p in points)
    whole = all(p[0] % 1 == 0 for p in points)
    levels = ticks(min(0.0, *(p[2] for p in points)), max(p[3] for p in points))
    x_of = lambda x: LEFT + WIDE * (x - first) / ((last - first) or 1)
    y_of = lambda y: up + TALL * (levels[-1] - y) / (levels[-1] - levels[0])
    body = [label(LEFT, 18, heading, ' class="title"'), label(LEFT, 37, y_label),
            label(LEFT + WIDE / 2, up + TALL + 42, x_label, ' class="small" text-anchor="middle"')]
    for y in levels:
        body += [f'<path class="grid" d="M{LEFT} {y_of(y):.1f}h{WIDE}"/>',
                 label(LEFT - 6, y_of(y) + 5, f"{y:g}", ' class="small" text-anchor="end"')]
    body += [label(x_of(x), up + TALL + 20, f"{x:g}", ' class="small" text-anchor="middle"')
             for x in ticks(first, last, 8) if first <= x <= last and (x % 1 == 0 or not whole)]
    colours = dict(zip(pens, COLOURS))
    for name, line in lines.items():
        path = lambda column: [f"{x_of(p[0]):.1f},{y_of(p[column]):.1f}" for p in line]
        body += [f'<polygon class="band" fill="{colours[name]}" points="'
                 f'{" ".join(path(2) + path(3)[::-1])}"/>',
                 f'<polyline {pens[name]} points="{" ".join(path(1))}"/>']
        body += [f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="4" fill="{colours[name]}"/>'
                 for x, y, _, _ in line if len(line) == 1]
    return body


def ticks(low, high, most=5):
    """Round numbers that enclose low and high, at most `most` intervals within.

    >>> ticks(0, 73), ticks(-3, 14)
    ([0.0, 20.0, 40.0, 60.0, 80.0], [-5.0, 0.0, 5.0, 10.0, 15.0])
    """
    span = (high - low) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / most))
    gap = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m * most >= 0.999 * span)
    ends = math.floor(low / gap + 1e-6), max(math.ceil(high / gap - 1e-6), 1)
    return [round(gap * n, 9) for n in range(ends[0], ends[1] + 1)]


def schemes_chart(scores, left=166, right=470, pitch=23):
    """A line for each row of {row: [percent of each seed]}, the best one on top: mean and 95%
    interval, and the mean and the number of seeds. That of two seeds is too wide to be drawn. A row
    below half of the best one is an arrow to the left, so that the others can be told apart."""
    rows = {row: t_interval(values) if len(values) > 2 else (np.mean(values),) * 3
            for row, values in scores.items()}
    rows = dict(sorted(rows.items(), key=lambda item: -item[1][0]))
    colours = {"of the paper": COLOURS[0], "of others, or ours": COLOURS[4],
               "random_keep": COLOURS[1]}
    body, up = legend({name: f'class="line" stroke="{colour}"' for name, colour in colours.items()
                       if name in rows or name != "random_keep"})
    least = max(mean for mean, *_ in rows.values()) / 2
    near = [row for row in rows.values() if row[0] >= least]
    levels = ticks(min(low for _, low, _ in near), max(high for *_, high in near))
    wide = (right - left) / ((levels[-1] - levels[0]) or 1)
    x_of = lambda x: left + wide * (x - levels[0])
    top, foot = up + 12, up + 18 + pitch * len(rows)
    for x in levels:
        body += [f'<path class="grid" d="M{x_of(x):.1f} {top}V{foot}"/>',
                 label(x_of(x), foot + 18, f"{x:g}", ' class="small" text-anchor="middle"')]
    if "random_keep" in rows:  # for all others to be held against
        body.append(f'<path class="line" stroke="{colours["random_keep"]}" stroke-dasharray="7 3" '
                    f'd="M{x_of(rows["random_keep"][0]):.1f} {top}V{foot}"/>')
    for n, (row, (mean, low, high)) in enumerate(rows.items()):
        y = up + 26 + pitch * n
        colour = colours.get(row.removeprefix("sod_")) or colours[
            "of the paper" if row in OF_PAPER else "of others, or ours"]
        drawn = [f'<path class="line" stroke="{colour}" d="M{x_of(low):.1f} {y}H{x_of(high):.1f}"/>',
                 f'<circle cx="{x_of(mean):.1f}" cy="{y}" r="5" fill="{colour}"/>']
        if mean < least:
            drawn = [f'<path fill="{colour}" d="M{left} {y}l10 -5v10z"/>']
        body += [label(left - 10, y + 5, row, ' class="small" text-anchor="end"'), *drawn,
                 label(right + 6, y + 5, f"{mean:.1f} ({len(scores[row])})")]
    body.append(label((left + right) / 2, foot + 40, "right after training, percent",
                      ' class="small" text-anchor="middle"'))
    return svg(foot + 48, "Every scheme in order", "Success after training, mean and 95% interval "
               "over seeds (their number); no interval for one or two seeds; an arrow is "
               "a row far below.", body)


def weights_picture(row):
    """w_k along one rollout: a bar a step, beside what was called and what came of it."""
    asked = textwrap.wrap(f"“{row['question']}”", 54)
    body = [label(16, 26 + 20 * n, line, ' class="title"') for n, line in enumerate(asked)]
    up = 30 + 20 * len(asked)
    body += [label(16, up, "step k"), label(320, up, "d_k"),
             label(366, up, "w_k: trust in teacher")]
    for k, turn in enumerate(row["turns"]):
        call, y = tools.parse_tool_call(turn["text"]), up + 30 + 46 * k
        said = call.code if call and not call.fault else turn["text"]
        answer = ((turn["tool"] or "the answer").strip().splitlines() or [""])[-1]
        bad, length = turn["outcome"] not in sod.OK_OUTCOMES, 115 * turn["w"]
        body += [label(16, y, f"{k + 1}  {said.strip()[:28]}", ""),
                 label(32, y + 19, ("✗ " if bad else "→ ") + answer[:50]),
                 label(320, y, f"{turn['d']:.2f}", ""),
                 f'<rect x="366" y="{y - 15}" width="{length:.1f}" height="18" rx="3" '
                 f'fill="{COLOURS[1 if bad else 0]}"/>',
                 label(372 + length, y, f"{turn['w']:.2f}", "")]
    return svg(up + 22 + 46 * len(row["turns"]), "w_k along a rollout that recovers",
               "Each step's call, divergence d_k and weight w_k; ✗ marks failed calls.", body)
