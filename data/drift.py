"""The paper's Fig. 1 for a run of your own, from its rollouts.jsonl.

    python data/drift.py runs/NAME [FIGURE.svg]

It prints a table of d, w and the teacher's entropy: by what became of the calls before a step (the
patterns of premises.py), and by what became of its own call. It says how far apart the methods are
on these tokens. It writes a figure of d and entropy by step, beside the paper's. Rollouts that the
machine failed are left out: they have no scores.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import numpy as np
import torch
import torch.nn.functional as F

import evaluate
import premises
import report
import sod_mini as sod
import study
import tools


def read(folder):
    """(the stored rows of the rollouts, how many more the machine failed)."""
    path = folder / "rollouts.jsonl"
    rows = [evaluate.read_rollout(*line) for line in evaluate.lines_of(path)]
    found = [row for row in rows if row.get("finish_reason") != "infrastructure"]
    if not found or any(turn.get(name) is None for row in found for turn in row["turns"]
                        for name in ("d", "w", "entropy_t")):
        raise sod.UserError(f"{path} holds no rollouts with d, w and entropy_t of each step; give "
                            "the folder of a run with a teacher")
    return found, len(rows) - len(found)


def steps_of(rows):
    """[(Rollout, [(d, w, entropy) of each step])]; of its turns a Rollout has only the outcomes."""
    return [(sod.Rollout(None, [], [sod.Turn(outcome=turn["outcome"]) for turn in row["turns"]]),
             [tuple(map(turn.get, ("d", "w", "entropy_t"))) for turn in row["turns"]])
            for row in rows]


def cosines(rows):
    """(cosine of the token advantages of sod to those of opd, and to those of grpo, tokens), over
    all tokens that are stored with their log-probabilities, w by Eq. 7 with the paper's settings.
    With a cosine near 1 it takes very many seeds to tell two methods apart."""
    signals = {"sod": [], "opd": [], "grpo": []}
    for row in rows:
        turns, A = row["turns"], torch.tensor([row["advantage"]])
        of_tokens = lambda name: [x for turn in turns for x in turn.get(name) or []]
        logp_s, logp_t = (torch.tensor([of_tokens(name)]) for name in ("logp_s", "logp_t"))
        step_id = torch.tensor([[k for k, turn in enumerate(turns, start=1)
                                 for _ in turn.get("logp_s") or []]], dtype=torch.long)
        w = sod.step_weights(torch.tensor([[turn["d"] for turn in turns]]))
        for method, found in signals.items():
            w_k = w if sod.METHODS[method].weighted else torch.ones_like(w)
            found.append(sod.token_advantages(method, A, logp_s, logp_t, step_id, w_k)[0])
    of_sod, of_opd, of_grpo = map(torch.cat, signals.values())
    return (float(F.cosine_similarity(of_sod, of_opd, 0)),
            float(F.cosine_similarity(of_sod, of_grpo, 0)), len(of_sod))


def by_pattern(rollouts):
    """{pattern: (steps, share of them whose call fails, median d, mean w, mean entropy)}. A step
    without a call, such as a final answer, counts as one whose call does not fail."""
    steps = {name: [] for name in (*premises.PATTERNS, "its call works", "its call fails")}
    for rollout, values in rollouts:
        for pattern, turn, step in zip(premises.step_patterns(rollout), rollout.turns, values):
            row = (turn.failed, *step)
            steps[pattern].append(row)
            if turn.outcome:
                steps["its call fails" if turn.failed else "its call works"].append(row)
    return {name: (len(rows), *np.mean(rows, 0)[:1], np.median(rows, 0)[1], *np.mean(rows, 0)[2:])
            for name, rows in steps.items() if rows}


def table(rollouts):
    return "\n".join(["| step | steps | its call fails | median d | mean w | teacher's entropy |",
                      "|---|---:|---:|---:|---:|---:|",
                      *(f"| {name} | {n} | {failed:.0%} | {d:.2f} | {w:.2f} | {entropy:.2f} |"
                        for name, (n, failed, d, w, entropy) in by_pattern(rollouts).items())])


def figure(rollouts, fewest=3):
    """An SVG; a point is a mean over at least `fewest` steps."""
    sums = np.zeros((len(report.LINES), max(len(steps) for _, steps in rollouts), 3))
    for rollout, steps in rollouts:
        failed = [turn.failed for turn in rollout.turns]
        for k, (d, _, entropy) in enumerate(steps):
            if (line := study.line_of(failed, k)) is not None:
                sums[line, k] += 1, d, entropy - steps[0][2]
    return report.drift_chart([{"steps": [sums.tolist()]}], fewest, f"{len(rollouts):,} rollouts")


def command(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a run")
    parser.add_argument("figure", type=Path, nargs="?", help="[drift.svg in that folder]")
    given = parser.parse_args(argv)
    (rows, failed), path = read(given.folder), given.figure or given.folder / "drift.svg"
    rollouts = steps_of(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    tools.write_whole(path, figure(rollouts))
    print(f"{len(rows)} rollouts of {given.folder}, without {failed} that the machine failed\n"
          f"\n{table(rollouts)}\n")
    to_opd, to_grpo, tokens = cosines(rows)
    if tokens:
        print("cosine of the token advantages of sod to those of opd "
              f"{to_opd:.3f}, to those of grpo {to_grpo:.3f} ({tokens:,} tokens; 1: the same "
              "direction, so that the two teach the same)\n")
    print(f"figure  {path}")


def main(argv=None):
    """The exit status, as in sod_mini.py."""
    return sod.run_command(partial(command, argv), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
