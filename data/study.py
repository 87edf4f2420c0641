"""The study: the paper's methods in the embedded world, over seeds, beside what others found.

    python data/study.py --list                        the plan: each row, its seeds, the hours
    python data/study.py                               everything
    python data/study.py --rows sod opd mask_after_error grpo --seeds 5     20 minutes
    python data/study.py --variance                    how noisy the gradient of the signal is
    python data/study.py --variance --student runs/default       and how noisy after a run

Each row and seed is one run in a process of its own, stored in runs/study. The same command
continues an interrupted study, and names the stored runs that other scripts have made. At its end
it writes tables and figures (report.py) of all runs that are stored there, and their results, a
line a run, as runs.csv. Of what lies in data/study, runs.csv and schemes.svg are the newest, with
signals.md, which explains them; the tables in README.md are of an earlier version.

A row is a method, a weight scheme, or one of the changes below: controls, and suspects, which might
be what makes a run collapse. A control stands alone, with uniform weights (agree), or with the
weights of SOD (sod_agree). row@dial-value is the same row in a changed world:
    digits     check digits of a program. Student and teacher differ by them at every call, so that
               their number decides how large d_1 is.
    persist    chance that a silent tool stays silent
    sure       chance that the teacher has learnt from a right turn after two failures in a row; in
               the world as it is it has not, and is lost there
    practice   share of its practice that the teacher has had
"""
import argparse
import copy
import hashlib
import json
import os
import random
import subprocess
import sys
import time
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import partial
from math import nan
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import numpy as np
import torch
import torch.nn.functional as F

import make_world
import premises
import report
import sod_mini as sod
import tools
from evaluate import patterns

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


# Does the scale of w matter, or its shape? "constant" has SOD's mean on every token, "rescaled" has
# SOD's shape with a mean of 1.
sod.WEIGHTS["constant"] = lambda batch, c: mean_weight(batch, c).expand(batch.d.shape)
sod.WEIGHTS["rescaled"] = lambda batch, c: sod.WEIGHTS["sod"](batch, c) / mean_weight(batch, c)
# Does w fall because the teacher is lost or because the student is wrong? "confident" is Eq. 7 on
# the teacher's entropy, which only the teacher changes.
sod.WEIGHTS["confident"] = lambda batch, c: sod.step_weights(sod.step_entropy(batch), 0.1,
                                                             c.delta)

# Is the d_1 of each rollout needed? "constant_d1" is Eq. 7 with one number in its place, also at
# the first step, so that w_1 is not 1: a step 0 of this divergence is put before the rollout. The
# number is the median d_1 of a first iteration, mean of seeds 0 to 4. Their mean d_1 is .62, for
# some are very large; with it most steps would have the largest weight.
D_1 = 0.29  # nats a token
sod.WEIGHTS["constant_d1"] = lambda batch, c: sod.step_weights(
    F.pad(batch.d, (1, 0), value=D_1), c.epsilon, c.delta)[:, 1:]

# Where is distillation needed? Here only on wrong rollouts, or only after a failed call.
sod.WEIGHTS["wrong_only"] = lambda batch, c: torch.tensor(
    [[0.0 if r.correct else 1.0] for r in batch.rollouts]).expand(batch.d.shape)
sod.WEIGHTS["after_failure"] = lambda batch, c: (
    sod.steps_since_failure(batch.failed) > 0).float()

# --- Controls: what else could stand in place of the teacher's log-probabilities -----------------
# A control returns (B, T) what takes the place of logp_t in the token advantage A + w gap with
# gap = logp_t - logp_s. The teacher's own d and w are known by then and stay as they are.


def clip(agent, batch, logp_t):
    """logp_t - logp_s is cut to between -1 and 1 nat."""
    return batch.logp_s + (logp_t - batch.logp_s).clamp(-1, 1)


@torch.no_grad()
def at_each_token(agent, batch, function):
    """(B, T) of function(agent, Batch, (N, D) student's hidden states), which gives one number for
    each of N sampled tokens from the whole distributions of both models."""
    found = torch.zeros(batch.ids.shape, device=batch.ids.device)
    for rows in sod.micro_batches(batch.lengths, agent.config.micro_batch_tokens):
        part = batch.select(rows)
        hidden = sod.sampled_hidden(agent.student, part)
        found[rows, :part.ids.shape[1]] = sod.scatter_to_mask(function(agent, part, hidden),
                                                              part.sampled)
    return found


def vopd(agent, batch, logp_t):
    """With a control variate (2605.07865): the exact KL(student || teacher) at each token is added.
    The term is then 0 on average, and its expected gradient is the same."""
    return logp_t + at_each_token(agent, batch, sod.full_kl)


def negative(agent, batch, logp_t):
    """No teacher (2608.31046): the least likely fifth of the sampled tokens are worth -.5."""
    bar = batch.logp_s[batch.step_id > 0].quantile(0.2)
    return batch.logp_s - 0.5 * (batch.logp_s < bar)


def then(agent, batch, logp_t):
    """The teacher for half of the iterations, then the outcome alone (2609.04108)."""
    iteration = batch.rollouts[0].key[2]
    return logp_t if iteration <= agent.config.iterations // 2 else batch.logp_s


def where(keep, batch, logp_t):
    """The teacher's signal on the tokens that are kept, none on the others. These still count in
    the mean over tokens and keep their outcome advantage."""
    return torch.where(keep, logp_t, batch.logp_s)


def outcome_sign(batch):
    """(B, 1): 1 for a right rollout, -1 for a wrong one. Unlike the sign of A, it is not 0 in a
    group whose rollouts are all right or all wrong."""
    return torch.tensor([[1.0 if r.correct else -1.0] for r in batch.rollouts])


def agree(agent, batch, logp_t):
    """A gap counts where it points as the outcome does (2608.24696): upwards in a right rollout,
    downwards in a wrong one."""
    return where((logp_t - batch.logp_s) * outcome_sign(batch) > 0, batch, logp_t)


def aligned(agent, batch, logp_t):
    """A rollout's gaps count where their sum does not point against the outcome (2608.27960)."""
    total = torch.where(batch.sampled, logp_t - batch.logp_s, 0.0).sum(1, keepdim=True)
    return where(total * outcome_sign(batch) >= 0, batch, logp_t)


def dial(agent, batch, logp_t):
    """In each rollout, the 40% of the tokens with the largest |p_t - p_s| count (2610.11659, with
    its beta 1): not those that both models find unlikely, where a gap is easily large."""
    score = (logp_t.exp() - batch.logp_s.exp()).abs()
    score = torch.where(batch.sampled, score, -1.0)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0: largest
    return where(rank < 0.4 * batch.sampled.sum(1, keepdim=True), batch, logp_t)


def random_keep(agent, batch, logp_t):
    """A random 80% of the tokens count. A mask that does no better has not found the right ones."""
    iteration = batch.rollouts[0].key[2]
    numbers = sod.random_numbers(agent.config.seed, "keep", iteration).random(logp_t.shape)
    return where(torch.tensor(numbers) < 0.8, batch, logp_t)


def residual(agent, batch, logp_t):
    """Probabilities in place of their logarithms (2610.11519): p_t - p_s, less its mean over what
    the student could have said there, and then less its mean over the rollout."""
    a = logp_t.exp() - batch.logp_s.exp() - at_each_token(agent, batch, mean_residual)
    a = torch.where(batch.sampled, a, 0.0)
    return batch.logp_s + a - a.sum(1, keepdim=True) / batch.sampled.sum(1, keepdim=True).clamp(1)


def mean_residual(agent, batch, hidden_s):
    """(N,) mean of p_t - p_s over the student's own distribution at each sampled token."""
    hidden_t = sod.sampled_hidden(agent.teacher, sod.teacher_batch(agent, batch))
    p_s, p_t = ((hidden @ sod.lm_head_weight(model).T / agent.config.temperature).softmax(-1)
                for model, hidden in ((agent.student, hidden_s), (agent.teacher, hidden_t)))
    return (p_s * (p_t - p_s)).sum(-1)


def lead(agent, batch, logp_t):
    """The gap times max(1 - S / T, 0) (GATS). S is the share of right rollouts of the problem, T
    that of the teacher over the problems of the same difficulty. It tries each problem of the batch
    once, which is an eighth more to sample."""
    G, (_, _, iteration, _) = agent.config.group_size, batch.rollouts[0].key
    firsts, right = batch.rollouts[::G], defaultdict(list)
    for r in sod.sample_rollouts(agent, agent.teacher, [(r.problem, r.prompt) for r in firsts],
                                 (agent.config.seed, "teacher", iteration)):
        right[r.problem.difficulty].append(float(r.correct))
    T = torch.tensor([np.mean(right[r.problem.difficulty]) for r in firsts]).float()  # (P,)
    S = torch.tensor([float(r.correct) for r in batch.rollouts]).view(-1, G).mean(1)
    ahead = torch.where(T > S, 1 - S / T, 0.0).repeat_interleave(G)  # (B,)
    return batch.logp_s + ahead[:, None] * (logp_t - batch.logp_s)


def returns(agent, batch, logp_t, gamma):
    """A token gets its own gap and, discounted, those of all later tokens of its rollout. Gamma 1
    would be the whole policy gradient of the KL of sequences; the usual signal is gamma 0."""
    gap, later = logp_t - batch.logp_s, torch.zeros(len(logp_t))
    found = batch.logp_s.clone()
    for t in reversed(range(gap.shape[1])):
        later = torch.where(batch.sampled[:, t], gap[:, t] + gamma * later, later)
        found[:, t] += later
    return found


CONTROLS = {f.__name__: f for f in (clip, vopd, negative, then, agree, aligned, dial, random_keep,
                                    residual, lead)}
CONTROLS |= {"return_9": partial(returns, gamma=0.9), "return_99": partial(returns, gamma=0.99)}

# --- Suspects of a collapse: faults of the machine, and answers that say nothing -----------------

FAULTY = range(4, 10)  # the iterations in which the sandbox fails calls
FAULTS = {"faults_10": (0.1, False), "scored_10": (0.1, True), "faults_30": (0.3, False),
          "scored_30": (0.3, True)}  # row: (share of calls, is the rollout scored as wrong?)


def break_down(tool, rate):
    """Let the sandbox fail at a share of the calls that are made in training."""
    works = tool.submit

    def submit(call, place):  # seed, purpose, iteration, rollout, turn
        breaks = random.Random(f"fault {place}").random() < rate
        if place[1] == "rollouts" and place[2] in FAULTY and breaks:
            return tools.finished(tools.Observation("the sandbox failed", "sandbox_error", 0.0))
        return works(call, place)
    tool.submit = submit


def grade_faults(r, tool, text):
    """As in the authors' code, a rollout that the machine failed is graded: as a wrong answer."""
    if r.lost:
        r.finish_reason, text = "answer", r.turns[-1].text  # which is a tool call
    sod.grade_rollout(r, tool, text)


def say_nothing(tool):
    """As in the authors' code, a call that timed out is answered by `no stdout here` and counts as
    success."""
    works = tool.submit

    def submit(call, place):
        run = works(call, place)
        silent = place[1] == "rollouts" and tool.is_silent(place)
        return tools.finished(tools.Observation("no stdout here", "ok", 0.0)) if silent else run
    tool.submit = submit


def change(agent, row):
    """The changes of a row that are not settings of sod_mini."""
    if control := CONTROLS.get(row.removeprefix("sod_")):
        weighted = sod.METHODS[agent.config.method].weighted
        scheme = agent.config.weights if weighted else "uniform"
        weigh = sod.WEIGHTS[scheme]

        def weigh_and_replace(batch, c):
            """Weights are asked for when d is known and the advantages are not: here logp_t can be
            replaced without a change of either d or w."""
            w = weigh(batch, c)
            batch.logp_t = control(agent, batch, batch.logp_t)
            return w
        sod.WEIGHTS[scheme] = weigh_and_replace  # of this process, which runs one row alone
    if row in FAULTS:
        rate, scored = FAULTS[row]
        break_down(agent.tool, rate)
        agent.grade = grade_faults if scored else sod.grade_rollout
    if row == "told_as_success":
        say_nothing(agent.tool)


# --- Rows ---------------------------------------------------------------------------------------

WORLD = sod.Config()
BUDGET = dict(             # settings of every run; the other ones are sod_mini's defaults
    iterations=16,         # with the next two: 2,048 rollouts and 32 updates
    prompts=16,
    group_size=8,
    eval_problems=400,     # many problems, few samples: the smallest error for 800 rollouts
    eval_samples=2)
SUSPECTS = {"told_as_success": {}, "unshaped": dict(tool_shaping=False),
            "lr_tenfold": dict(lr=10 * WORLD.lr), "after_failure": dict(weights="after_failure")}
ROWS = {
    "vanilla": dict(method="vanilla"),
    "teacher": dict(method="vanilla", student=WORLD.teacher),
    **{name: dict(method=name) for name in sod.METHODS if name != "vanilla"},
    "sft": dict(method="sft", sft_epochs=1, sft_lr=WORLD.lr),  # the budget is equal: see learn
    **{name: dict(weights=name) for name in sod.WEIGHTS if name not in ("sod", "uniform")},
    "opd_full": dict(method="opd", kl="full"), "sod_full": dict(kl="full"),
    "sod_only_full": dict(method="sod_only", kl="full"),
    **{name: dict(method="opd") for name in CONTROLS},
    **{f"sod_{name}": {} for name in CONTROLS if name != "negative"},  # which has no teacher
    **{name: {} for name in FAULTS}, **SUSPECTS,
    "signal": dict(iterations=1, prompts=64, num_minibatches=1, lr=1e-12, eval_samples=4),
}
DIALS = {  # name: (what it turns, the values that are compared, that of the world as it is)
    "digits": ("check digits", (0, 1, 2, 3, 5), 3),
    "persist": ("chance that silence lasts", (0.3, 0.5, 0.8), 0.5),
    "sure": ("chance that the teacher learnt in bursts", (0, 0.5, 1), 0),
    "practice": ("share of the teacher's practice", (0.4, 0.7, 0.8, 1), 1)}
DECISIVE = ("sod", "opd", "decay", "mask_after_error", "grpo", "sod_only", "opd_only", "constant",
            "rescaled", "confident", "sod_full", "opd_full", "sod_only_full", "constant_d1")
METHODS = ("sod", "opd", "mask_after_error", "sod_full")
DIALLED = {"digits": ("vanilla", *METHODS, "opd_full", "floor"), "persist": ("vanilla", *METHODS),
           "sure": METHODS, "practice": ("teacher", "sod", "opd")}
STUDY = {**{row: 10 if row in DECISIVE else 5 for row in ROWS},  # row: how many seeds
         **{f"{row}@{dial}-{value}": 8 for dial, (_, values, usual) in DIALS.items()
            for value in values if value != usual for row in DIALLED[dial]}}


def config_of(row, seed, folder, budget):
    """sod_mini's settings of one run."""
    if row not in STUDY:
        raise sod.UserError(f"the study has no row {row}; choose from {', '.join(STUDY)}")
    name, _, world = row.partition("@")
    dial, _, value = world.rpartition("-")
    changes = {**budget, **ROWS[name]}
    if dial == "persist":
        changes["silent_persist"] = float(value)
    elif dial == "digits":
        changes |= premises.files_of(world_folder(folder, world))
    elif dial:  # of the teacher alone
        changes["student" if name == "teacher" else "teacher"] = str(
            world_folder(folder, world) / "teacher")
    rollouts = changes["prompts"] * budget["group_size"]
    return sod.Config(**changes, seed=seed,
                      sft_batch=rollouts // changes.get("num_minibatches", WORLD.num_minibatches))


def file_of(row, seed, folder, budget):
    """Where one run is stored. The name changes with any setting."""
    text = json.dumps(asdict(config_of(row, seed, folder, budget)), sort_keys=True)
    return Path(folder) / f"{row}-{seed}-{zlib.crc32(text.encode()):08x}.json"


def world_folder(folder, world):
    """The folder of the world of a dial, such as digits-5."""
    return Path(folder) / "worlds" / world


def make_missing_worlds(rows, folder):
    """Make the changed worlds of these rows, as far as they need other models."""
    for world in sorted({row.partition("@")[2] for row in rows}):
        dial, _, value = world.rpartition("-")
        place = world_folder(folder, world)
        if dial not in ("", "persist") and not place.exists():
            print(f"making {place}, about 3 minutes", flush=True)
            how = ["--start", ROOT / "world"] * (dial != "practice")
            how += ["--only", "teacher"] * (dial in ("sure", "practice"))
            with tools.whole_folder(place) as aside:
                subprocess.run([sys.executable, make_world.__file__, f"--{dial}", value, *how,
                                "--out", aside], check=True)


# --- One run ------------------------------------------------------------------------------------


def run_one(row, seed, folder, budget):
    """Train and measure one row from one seed. Its file is written at the end, all at once."""
    path, config = file_of(row, seed, folder, budget), config_of(row, seed, folder, budget)
    clock, agent = time.perf_counter(), sod.load_agent(config)
    change(agent, row.partition("@")[0])
    with agent.tool:
        result = (signal_of if row.startswith("signal") else learn)(agent)
        result["correct"] = sod.measure(agent, agent.student).tolist()
    tools.write_whole(path, json.dumps({"row": row, "seed": seed, "scripts": SCRIPTS, **result,
                                        "seconds_all": time.perf_counter() - clock}))


def learn(agent):
    """Train; returns the numbers of each iteration that the tables and the figures need."""
    config, clock, best = agent.config, time.perf_counter(), 0.0
    result = {"curve": [], "steps": [], "patterns": [], "example": None, "tokens": 0}
    if config.method == "sft":  # as many conversations as the others have rollouts
        count = min(config.iterations * config.prompts * config.group_size, len(agent.train_set))
        agent.train_set = random.Random(config.seed).sample(agent.train_set, count)
        result["tokens"] = sum(len(turn.ids) for r in agent.train_set for turn in r.turns)
    for m, batch in sod.train(agent):
        if batch:
            batch = premises.without_lost(batch)
        result["tokens"] += m.get("tokens", 0)
        result["curve"].append({name: m[name] for name in ("reward", "d", "w", "entropy")
                                if name in m} | (of_the_student(batch) if batch else {}))
        if sod.METHODS[config.method].scorer == "teacher":
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


def of_the_student(batch):
    """Share of correct rollouts and tool calls a rollout, where the sandbox has not failed."""
    kept = [([turn.outcome for turn in r.turns if turn.outcome], r.correct)
            for r in batch.rollouts]
    kept = [(calls, correct) for calls, correct in kept if "sandbox_error" not in calls]
    return {"correct": float(np.mean([correct for _, correct in kept])),
            "tool_calls": float(np.mean([len(calls) for calls, _ in kept]))}


def line_of(failed, k):
    """Index into report.LINES for step k of a rollout, or None.

    failed  for each step of the rollout: did its call fail?
    """
    before = failed[:k]
    if not any(before) and not failed[1:2] == [True]:
        return 0
    if failed[1:2] == [True] and not failed[0]:
        return 1 if all(before[1:]) else None if before[-1] else 2
    return None


def steps_after_a_failure(batch):
    """[steps, sum of d, sum of the teacher's entropy less that of step 1] for each of report.LINES
    and each k.

    The paper's Fig. 1 shows these: both rise along a rollout whose second call fails.
    """
    entropy = sod.step_entropy(batch)
    table = np.zeros((len(report.LINES), batch.d.shape[1], 3))
    for i, rollout in enumerate(batch.rollouts):
        failed = [turn.failed for turn in rollout.turns]
        for k in range(len(failed)):
            if (line := line_of(failed, k)) is not None:
                table[line, k] += 1, batch.d[i, k], entropy[i, k] - entropy[i, 0]
    return table.tolist()


def law(batch, tokenizer):
    """Does w = B / (B + M) hold on clean later steps? Means over these steps, and the median d_1.

    B  nats a step of |logp_s - logp_t| on check digits, which the student cannot learn
    M  nats a step on all other tokens: many where a step has a mistake, else hardly any. Therefore
       B / (B + M) is the mean over steps of the mean B with the M of each.
    """
    gap, rows = (batch.logp_s - batch.logp_t).abs(), []
    for i, rollout in enumerate(batch.rollouts):
        for k, pattern in enumerate(premises.step_patterns(rollout)):
            if pattern == "clean":
                worth = make_world.token_worth(tokenizer, rollout.turns[k].ids, 0.0)
                nats, digit = gap[i, batch.step_id[i] == k + 1], torch.tensor(worth) == 0
                rows.append([float(nats[digit].sum()), float(nats[~digit].sum()),
                             float(batch.w[i, k])])
    B, M, w = np.array(rows or [[nan] * 3]).T
    return {"d_1": float(batch.d[:, 0].median()), "B": B.mean(), "M": M.mean(),
            "B/(B+M)": (B.mean() / (B.mean() + M)).mean(), "w": w.mean()}


def pattern_shares(batch):
    """Shares of report.PATTERNS in a batch. A rollout has the pattern of its last step."""
    last = Counter(patterns([turn.outcome for turn in r.turns])[-1] for r in batch.rollouts)
    return [last[name] / len(batch.rollouts) for name in report.PATTERNS]


def recoveries(batch):
    """How far SOD's weight rises again in each correct rollout with a failed call; 0 in others."""
    w = sod.step_weights(batch.d)
    return [float(w[i, len(r.turns) - 1] - w[i, :len(r.turns)].min())
            if r.correct and batch.failed[i].any() and 5 <= len(r.turns) <= 8 else 0.0
            for i, r in enumerate(batch.rollouts)]


# --- Does the teacher's signal point the right way? ---------------------------------------------


def signal_of(agent):
    """How does success change after one move along logp_t - logp_s of some of the tokens?

    Each move begins at the student as it is loaded. The classes of tokens are the patterns of steps
    (premises.py). All moves change each parameter by lr, as AdamW's first update does, so that only
    their directions are compared. Success is average@k on held-out problems, sampled with the same
    random numbers each time.
    """
    config, clock = agent.config, time.perf_counter()
    start = copy.deepcopy(agent.student.state_dict())
    _, batch = next(sod.train(agent))  # samples and scores; at this lr its update changes nothing
    batch = premises.without_lost(batch)
    signal, result = batch.logp_t - batch.logp_s, {}  # (B, T)
    right = torch.tensor([r.correct for r in batch.rollouts])[:, None]
    mean = lambda mask: float(signal[mask].mean()) if mask.any() else None
    for name, tokens in signal_classes(batch).items():
        move_along(agent.student, batch, torch.where(tokens, signal, 0.0), config)
        result[name] = {"tokens": int(tokens.sum()), "mean": mean(tokens),
                        "in_right": mean(tokens & right), "in_wrong": mean(tokens & ~right),
                        "correct": float(sod.measure(agent, agent.student).mean())}
        agent.student.load_state_dict(start)
    return {"signal": result, "tokens": int((batch.step_id > 0).sum()),
            "seconds": time.perf_counter() - clock}


def signal_classes(batch):
    """{class: (B, T) bool}: all sampled tokens, then those in the steps of each pattern."""
    number = [[premises.PATTERNS.index(p) for p in premises.step_patterns(r)]
              for r in batch.rollouts]
    kind = sod.pad(number, -1, batch.ids.device).gather(1, (batch.step_id - 1).clamp(min=0))
    sampled = batch.sampled
    return {"all": sampled, **{name: sampled & (kind == n)
                               for n, name in enumerate(premises.PATTERNS)}}


def move_along(model, batch, signal, config, lr=WORLD.lr):
    """Move each parameter by lr towards a larger sum of signal * log pi over the tokens.

    signal  (B, T) weight of each token, 0 for those that do not count
    """
    weights = list(model.parameters())
    totals = [torch.zeros_like(p) for p in weights]
    for rows in sod.micro_batches(batch.lengths, config.micro_batch_tokens):
        part = batch.select(rows)
        logp, _ = sod.sampled_logprobs(model, part, config.temperature)
        worth = (signal[rows, :part.ids.shape[1]] * logp).sum()
        totals = [old + new for old, new in zip(totals, torch.autograd.grad(worth, weights))]
    with torch.no_grad():
        for p, total in zip(weights, totals):
            p += lr * total.sign()


# --- How noisy is the gradient of the signal? ---------------------------------------------------


ESTIMATES = ("sampled", "vopd", "return_9", "return_99", "full")  # of one gradient, or nearly


def variance(batches, student=WORLD.student, budget=BUDGET):
    """How much does the gradient of distillation alone differ between batches of a student?

    Each batch of rollouts gives one gradient by each of ESTIMATES: of the signal at the sampled
    tokens (sampled), of a control in its place, or of the exact KL at the same tokens (full).
    returns  {estimate: (noise: sum over parameters of the variance of a batch's gradient,
              power: squared length of the mean gradient, cosine of its mean to that of full)}
    """
    agent = sod.load_agent(sod.Config(method="opd_only", student=student, **budget | dict(
        iterations=batches, num_minibatches=1, lr=1e-12)))  # at this lr the student stays as it is
    mean, power = dict.fromkeys(ESTIMATES, 0.0), dict.fromkeys(ESTIMATES, 0.0)
    with agent.tool:
        for _, batch in sod.train(agent):
            for name in ESTIMATES:
                gradient = gradient_of(agent, batch, name)
                mean[name] = mean[name] + gradient / batches
                power[name] += float(gradient @ gradient) / batches
    found = {}
    for name, g in mean.items():
        noise = (power[name] - float(g @ g)) * batches / (batches - 1)
        # The noise that is left in a mean of so many batches is no part of the signal's length.
        found[name] = (noise, float(g @ g) - noise / batches,
                       float(F.cosine_similarity(g, mean["full"], 0)))
    return found


def gradient_of(agent, batch, name):
    """(parameters,) the gradient of a batch by one of ESTIMATES, as training would compute it."""
    config, exact = agent.config, name == "full"
    logp_t = CONTROLS[name](agent, batch, batch.logp_t) if name in CONTROLS else batch.logp_t
    batch.advantages = sod.token_advantages("opd_only", batch.A, batch.logp_s, logp_t,
                                            batch.step_id, batch.w, 0.0 if exact else 1.0)
    agent.config = replace(config, kl="full" if exact else "sampled")
    agent.student.zero_grad()
    sod.backpropagate(agent, batch)
    agent.config = config
    found = torch.cat([p.grad.flatten() for p in agent.student.parameters()]).double()
    agent.student.zero_grad()  # so that nothing of it gets into an update
    return found


# --- Many runs at a time, and again after an interruption ---------------------------------------


SECONDS = 122  # of a run, mean of the 228 runs of data/study, which two cores did side by side


def planned(rows, seeds, folder, budget=BUDGET):
    """{(row, seed): its file} of the runs that are wanted, stored or not.

    rows  {row: how many seeds}, of which at most `seeds` are wanted
    """
    return {(row, seed): file_of(row, seed, folder, budget)
            for seed in range(seeds) for row, most in rows.items() if seed < most}


# A digest of the scripts that decide what a run does, as they are now.
SCRIPTS = hashlib.sha256(b"".join(Path(script).read_bytes() for script in (
    sod.__file__, tools.__file__, __file__))).hexdigest()[:12]


def notes_on(plan):
    """Yield a NOTE where stored runs are of other scripts: an edit since then is not in them."""
    stored = [job for job, path in plan.items() if path.exists()
              and json.loads(path.read_text()).get("scripts") != SCRIPTS]
    if stored:
        yield (f"NOTE: sod_mini.py, tools.py or study.py has changed since {len(stored)} of the "
               f"stored runs were made ({', '.join(dict.fromkeys(row for row, _ in stored))}); "
               "delete their files in runs/study to run them again")


def listing(plan, jobs):
    """Yield a line for each row with the seeds that are stored, last the hours that are missing.

    A run takes as long as the stored runs of its row, else of all rows, else SECONDS.
    """
    stored = {job: json.loads(path.read_text())["seconds_all"]
              for job, path in plan.items() if path.exists()}
    usual = np.mean(list(stored.values())) if stored else SECONDS
    missing = 0.0
    for row in dict.fromkeys(row for row, _ in plan):
        wanted = sum(name == row for name, _ in plan)
        seeds = [seed for name, seed in stored if name == row]
        seconds = np.mean([stored[row, seed] for seed in seeds]) if seeds else usual
        missing += (wanted - len(seeds)) * seconds
        yield (f"{row:32} {len(seeds):2} of {wanted:2} seeds stored, {seconds:4.0f} s a run"
               + f": {' '.join(map(str, seeds))}" * bool(seeds))
    source = (f"the {len(stored)} stored runs" if stored else
              f"{SECONDS} s a run, as those of data/study took, since none is stored")
    yield (f"{len(plan) - len(stored)} of {len(plan)} runs are missing: about "
           f"{missing / jobs / 3600:.1f} hours, {jobs} at a time, by {source}; each world of a "
           "dial that is still to be made takes about 3 minutes")


def study(rows, seeds, jobs, folder="runs/study", budget=BUDGET):
    """Run what is missing, `jobs` at a time, each in its own process; then write the tables.

    rows     {row: how many seeds}, of which at most `seeds` are run
    returns  the number of runs that failed
    """
    folder = Path(folder).resolve()
    plan = planned(rows, seeds, folder, budget)
    folder.mkdir(parents=True, exist_ok=True)
    make_missing_worlds(rows, folder)
    todo = [job for job, path in plan.items() if not path.exists()]
    for note in notes_on(plan):
        print(note)
    print(f"{len(rows)} rows, {len(plan)} runs, {len(plan) - len(todo)} done; "
          "after an interruption the same command continues", flush=True)
    failed = run_all(todo, jobs, plan, budget)
    results = read_runs(folder, budget)
    text = report.tables(results, budget, DIALS)
    tools.write_whole(folder / "README.md", text + "\n")
    tools.write_whole(folder / "runs.csv", "\n".join(report.run_lines(results)) + "\n")
    for name, svg in report.figures(results, DIALS).items():
        tools.write_whole(folder / name, svg)
    print(f"\n{text}\n\ntables and figures  {folder}")
    return failed


def read_runs(folder, budget, most=20):
    """{row: {seed: run}} of all runs that are stored with these settings."""
    results = defaultdict(dict)
    for row in STUDY:
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
    """Do one run in a process of its own and print its result; True if it is stored. It has one
    thread, because on two cores two such runs side by side take less time than one after the
    other."""
    (row, seed), path = job, plan[job]
    task = json.dumps({"row": row, "seed": seed, "folder": str(path.parent), "budget": budget})
    done = subprocess.run([sys.executable, __file__, "--worker", task], text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode or not path.exists():
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"{row} seed {seed} FAILED with status {done.returncode}: {last}", flush=True)
        return False
    result = json.loads(path.read_text())
    print(f"{sum(path.exists() for path in plan.values())}/{len(plan)}  {row} seed {seed}: "
          f"{100 * np.mean(result['correct']):.1f}% in {result['seconds_all']:.0f} s", flush=True)
    return True


# --- The command --------------------------------------------------------------------------------


def command(argv):
    whole = sum(STUDY.values())
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"The whole study is {whole} runs of {len(STUDY)} rows, about {SECONDS} s each: "
               f"{whole * SECONDS / 2 / 3600:.0f} hours on two cores.")
    parser.add_argument("--rows", nargs="+", default=list(STUDY), metavar="ROW",
                        help="rows of the study, by default all; --list names them")
    parser.add_argument("--seeds", type=int, default=10,
                        help="most seeds of a row [10]; many rows have fewer")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time [2]")
    parser.add_argument("--list", action="store_true",
                        help="only say what these rows have stored and how long the rest will take")
    parser.add_argument("--variance", type=int, nargs="?", const=64, metavar="BATCHES",
                        help="only measure the noise of the signal's gradient over so many batches "
                             "[64, about 15 minutes of one core]")
    parser.add_argument("--student", metavar="MODEL",
                        help="whose batches --variance takes, by default the embedded student's")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)  # one run
    args = parser.parse_args(argv)
    if args.worker:
        run_one(**args.worker)
        return 0
    if min(args.seeds, args.jobs) < 1 or args.variance is not None and args.variance < 2:
        parser.error("--seeds and --jobs must be at least 1, --variance at least 2")
    if args.student and not args.variance:
        parser.error("--student is the model of --variance; rows of the study have their own")
    rows, folder = {row: STUDY.get(row, args.seeds) for row in args.rows}, Path("runs/study")
    if args.list:
        plan = planned(rows, args.seeds, folder.resolve())
        print(*listing(plan, args.jobs), *notes_on(plan), sep="\n")
        return 0
    if args.variance:
        folder.mkdir(parents=True, exist_ok=True)
        student = args.student or WORLD.student
        found = variance(args.variance, student)
        text = "\n".join(report.variance_lines(found, student, args.variance))
        path = folder / f"variance-{Path(student).name}.md"
        tools.write_whole(path, text + "\n")
        print(f"\n{text}\n\ntable  {path}")
        return 0
    return int(study(rows, args.seeds, args.jobs, folder) > 0)


def main(argv=None):
    """The exit status: 0 done, 1 something failed, 2 wrong options, 128 and more by a signal."""
    return sod.run_command(partial(command, argv),
                           "the same command continues where this one stopped")


if __name__ == "__main__":
    sys.exit(main())
