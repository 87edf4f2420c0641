"""Step-wise on-policy distillation (SOD, arXiv 2605.07725) for small tool-using language models.

    python sod_mini.py                          the whole method on the embedded world, on a CPU
    python sod_mini.py --method grpo --lr 1e-4  every line of Config below is an option
    python sod_mini.py --student Qwen/Qwen3-0.6B --teacher youngzhong/SOD-GRPO_teacher-4B \\
                       --train_data gsm8k.jsonl

A student solves problems in several turns with a Python tool. A teacher scores every token that
the student sampled. Where the student has drifted from the teacher, the teacher is trusted less.

Notation (code: paper)
    logp_s, logp_t   log pi_theta, log pi_teacher of the sampled token      nats
    A                outcome advantage of a rollout within its group       no unit
    d[k], w[k]       divergence (Eq. 6) and weight (Eq. 7) of step k        nats/token, no unit
    step k           one assistant turn: the tokens sampled until its end, or until its tool call
    step_id          k = 0..K-1 for a token of step k, -1 for every token the student did not write
    iteration        one batch of rollouts and its updates; an update moves the weights once
    B, T, K, V, D    rollouts, tokens, steps, vocabulary, width             sizes
"""
import argparse
import copy
import functools
import gc
import importlib.util
import inspect
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter, deque
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache,
                          GenerationConfig, LogitsProcessor)
from transformers.cache_utils import DynamicLayer

import tools

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
WORLD = os.path.relpath(Path(__file__).resolve().parent / "data" / "world")

# --- Settings --------------------------------------------------------------------------------


@dataclass
class Sampling:
    """How a model is put to problems: the options that training shares with evaluate.py."""
    system: str = ""                        # system message of problems that bring none
    thinking: bool = False                  # thinking mode, in templates that have one (Qwen3)
    max_turns: int = 12                     # assistant turns in a rollout
    max_prompt: int = 128                   # tokens; longer prompts are skipped, and counted
    max_response: int = 384                 # tokens after the prompt, tool answers included
    tool_timeout: float = 5.0               # CPU seconds for a program, thrice as much on the clock
    tool_chars: int = 4096                  # longest tool answer; the cut is marked
    tool_modules: str = ""                  # imported once for all programs, as in numpy,sympy
    tool_unsafe: bool = False               # run programs even where they cannot be contained
    silent_rate: float = 0.1                # chance that the tool stops answering, at each call
    silent_persist: float = 0.5             # chance that a silent tool stays so at the next call
    rollout_engine: str = "slots"           # slots: a kept KV cache; generate: HF's, plain
    rollout_batch: int = 256                # rollouts sampled side by side; 0: all of them
    micro_batch_tokens: int = 2048          # tokens read side by side, with padding; 0: 65,536
    look: int = 8                           # slots: tokens between two checks for ended turns
    tool_wait: float = 60.0                 # slots: seconds such a check waits for slow tools
    device: str = "auto"                    # auto: cuda where there is one, else cpu
    dtype: str = "auto"                     # auto: bfloat16 on cuda, float32 on cpu
    threads: int = 1                        # CPU threads of torch; 0: as many as it likes
    seed: int = 0                           # of sampling, data order and tool silence


@dataclass
class Config(Sampling):
    """Every knob: name, value, reason. Defaults train the embedded student on a CPU in minutes.

    A run halves rollout_batch and micro_batch_tokens where memory runs out (see `phase`).
    """
    method: str = "sod"                     # vanilla only measures, sft imitates; see METHODS
    weights: str = "sod"                    # step weights of sod and sod_only: see WEIGHTS
    kl: str = "sampled"                     # sampled: the paper's; full: the exact KL, as a loss
    student: str = f"{WORLD}/student"       # the model we train: a folder or a Hub id
    teacher: str = f"{WORLD}/teacher"       # the model that scores: a folder or a Hub id
    init: str = "pretrained"                # or random: the student's shape without its weights
    train_data: str = f"{WORLD}/train.jsonl"             # problems to practise on
    eval_data: str = f"{WORLD}/heldout.jsonl"            # problems to measure on, "" for none
    demonstrations: str = f"{WORLD}/demonstrations.jsonl"  # conversations to imitate (method sft)
    iterations: int = 30                    # batches of rollouts to sample and learn from
    prompts: int = 16                       # P: problems in a batch
    group_size: int = 8                     # G: rollouts of each problem
    updates: int = 2                        # parts of a batch; each moves the weights once
    temperature: float = 1.0                # of rollouts, and of both models when they score
    epsilon: float = 1e-6                   # keeps the ratio of Eq. 7 finite
    delta: float = 0.2                      # w_k <= 1 + delta (Eq. 7)
    floor: float = 0.2                      # least d of the weight scheme "floor", nats/token
    opd_coef: float = 1.0                   # distillation against outcome (Eq. 8)
    clip_low: float = 0.2                   # ratio >= 1 - clip_low
    clip_high: float = 0.28                 # ratio <= 1 + clip_high
    clip_dual: float = 3.0                  # where A_it < 0 the loss is at most clip_dual * |A_it|
    tool_shaping: bool = True               # wrong answers cost .1 less for each of up to 4 calls
    overlong: int = 64                      # last tokens of the budget: reward falls by up to 1
    lr: float = 3e-4                        # AdamW step size
    warmup: int = 0                         # updates from 0 to lr; constant afterwards
    beta1: float = 0.9                      # AdamW: memory of the gradient
    beta2: float = 0.999                    # AdamW: memory of its square
    weight_decay: float = 0.01              # AdamW
    grad_clip: float = 1.0                  # largest norm of the gradient
    sft_epochs: int = 3                     # passes over the demonstrations
    sft_batch: int = 32                     # demonstrations an update
    sft_lr: float = 2e-3                    # peak; 10% warm-up, then a cosine towards 0
    eval_problems: int = 200                # held-out problems to measure on
    eval_samples: int = 4                   # samples a problem: average@k
    eval_temperature: float = 1.0           # as the paper
    eval_top_p: float = 1.0                 # the paper's .6 would hide this student's unreliability
    offload: str = "none"                   # to the CPU while idle: teacher; all: optimiser too
    gradient_checkpointing: bool = False    # recompute activations in backward: less memory
    preflight: bool = True                  # false: go on though memory or a model look wrong
    out: str = "runs"                       # folder of all outputs
    name: str = ""                          # folder of this run; default: method and time
    show_every: int = 10                    # iterations between two rollouts shown, 0 for never
    store_tokens: int = 128                 # rollouts an iteration stored with their tokens
    save_every: int = 5                     # iterations between two saves, 0: only at a stop
    resume: str = ""                        # go on with an interrupted run: its folder or name

    def __post_init__(self):
        check_values(self)
        method, explores = METHODS[self.method], self.method not in ("sft", "vanilla")
        for wrong, sentence in [
            (Path(self.name).name != self.name or not self.name.isprintable(),
             f"name is {self.name!r}; needed the name of one folder (--out says where it is made)"),
            (method.weights != "sod" and self.weights != "sod",
             f"method {self.method} fixes its own weights; use --weights with sod or sod_only"),
            (self.kl == "full" and not method.view,
             f"method {self.method} has no teacher to compare with; use --kl sampled"),
            (self.kl == "full" and self.offload != "none",
             "kl full needs the teacher in every update; use --offload none or --kl sampled"),
            (self.method == "grpo" and self.group_size == 1,
             "group_size is 1, and grpo compares the rollouts of a group: use 2 or more"),
            (self.method == "vanilla" and not self.eval_data,
             "method vanilla only measures: name problems with --eval_data"),
            (self.prompts % (self.updates * RANKS) and explores,
             f"prompts {self.prompts} does not divide into {self.updates} updates"
             + f" of {RANKS} processes" * (RANKS > 1)),
            (self.method == "sft" and self.sft_batch % RANKS,
             f"sft_batch {self.sft_batch} does not divide into {RANKS} processes"),
            (self.method == "sft" and not self.demonstrations.strip(),
             "method sft imitates demonstrations, and none are named: use --demonstrations FILE"),
            (explores and not self.train_data.strip(),
             f"method {self.method} needs problems to practise on: use --train_data FILE"),
            (explores and self.overlong > self.max_response,
             f"overlong {self.overlong} is more than max_response {self.max_response}: lower it"),
        ]:
            if wrong:
                raise ValueError(sentence)


def check_values(config):
    """Each option alone: one of its words, or of its kind and within its bounds."""
    for f in fields(config):
        value, (low, high) = getattr(config, f.name), BOUNDS.get(f.name, (0, math.inf))
        words = choices().get(f.name, [value])
        if value not in words:
            raise ValueError(f"{f.name} is {value!r}; choose from {', '.join(words)}")
        if type(value) not in ((int, float) if f.type is float else (f.type,)):  # True is an int
            raise ValueError(f"{f.name} is {value!r}; needed {f.type.__name__}")
        if f.type in (int, float) and not low <= value < high:
            raise ValueError(f"{f.name} is {value}; it must be at least {low} and below {high}")


def choices():
    """Options that take one of a few words."""
    return {"method": list(METHODS), "weights": list(WEIGHTS), "kl": ["sampled", "full"],
            "init": ["pretrained", "random"], "rollout_engine": list(ENGINES),
            "offload": ["none", "teacher", "all"], "dtype": ["auto", "float32", "bfloat16"]}


# What is not "at least 0 and finite": name -> (lowest, first value that is too high).
TINY = 1e-12
BOUNDS = {
    **dict.fromkeys(["iterations", "prompts", "group_size", "updates", "max_turns", "max_prompt",
                     "max_response", "sft_epochs", "sft_batch", "eval_problems", "eval_samples",
                     "look"], (1, math.inf)),
    **dict.fromkeys(["temperature", "eval_temperature", "epsilon", "lr", "sft_lr", "grad_clip",
                     "tool_timeout"], (TINY, math.inf)),
    **dict.fromkeys(["beta1", "beta2", "clip_low", "silent_rate", "silent_persist"], (0, 1)),
    "eval_top_p": (TINY, 1 + TINY), "clip_dual": (1, math.inf), "tool_chars": (64, math.inf),
    "seed": (0, 2**32), "threads": (0, 1025),
}

SYSTEM = ("Solve the problem. Use the code_interpreter tool for every calculation. "
          "Put the final answer in \\boxed{}.")
GPU = dict(demonstrations="", eval_data="", system=SYSTEM, iterations=120, prompts=8, max_turns=8,
           max_prompt=1024, max_response=4096, overlong=512, lr=1e-6, sft_lr=1e-5, silent_rate=0.0,
           tool_modules="numpy,sympy", eval_top_p=0.6,
           threads=0, rollout_batch=0, micro_batch_tokens=0,
           gradient_checkpointing=True, show_every=1, store_tokens=16)
# Named sets of values; "world" is Config itself. The paper's run took eight GPUs two to three days.
PRESETS = {
    "world": {},
    "gpu": GPU,
    "paper": dict(GPU, prompts=64, group_size=16, updates=4, max_turns=16, max_prompt=2560,
                  max_response=20_480, overlong=1024, sft_epochs=5, sft_batch=128,
                  eval_samples=32),
}

# --- The method, step by step (Sec. 4) ---------------------------------------------------------


def group_advantages(rewards, group_size):
    """How much better a rollout did than the others of its problem: (r - mean) / std (GRPO).

    rewards     (B,) with the rollouts of one problem side by side; nan for a rollout that the
                machine failed, which is not counted in its group
    group_size  G, a divisor of B
    returns     (B,) (r - mean) / (std + 1e-6) within the group, std with ddof 1; 0 for nan

    >>> group_advantages(torch.tensor([1.0, -1.0, float("nan"), 0.6, 0.6, 0.6]), 3)
    tensor([ 0.7071, -0.7071,  0.0000,  0.0000,  0.0000,  0.0000])
    """
    r = rewards.view(-1, group_size)                             # (P, G)
    # Minus the maximum: equal rewards become exactly 0, and not a rounding error over 1e-6.
    r = r - r.nan_to_num(-math.inf).amax(1, keepdim=True)
    centred = r - r.nanmean(1, keepdim=True)
    count = (~r.isnan()).sum(1, keepdim=True)                    # (P, 1)
    std = (centred.square().nansum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return (centred / (std + 1e-6)).nan_to_num(0.0).flatten()


def step_divergence(logp_s, logp_t, step_id, K=None):
    """How far student and teacher differ at each step (Eq. 6).

    logp_s, logp_t  (B, T) log-probabilities of the sampled tokens, nats
    step_id         (B, T) k = 0..K-1, or -1
    K               where it is known; looking it up in step_id waits for the device
    returns         (B, K) d_k = mean over step k of |logp_s - logp_t|, nats/token; 0 for no step
    """
    K = K or max(int(step_id.max()) + 1, 1)
    gap = torch.where(step_id >= 0, (logp_s - logp_t).abs(), 0.0)
    return step_sums(gap, step_id, K) / step_tokens(step_id, K).clamp(min=1)


def step_sums(values, step_id, K):
    """(B, T) values -> (B, K) their sum over the tokens of each step."""
    column = step_id + 1  # column 0 collects what belongs to no step
    return values.new_zeros(len(values), K + 1).scatter_add_(1, column, values)[:, 1:]


def step_tokens(step_id, K):
    """(B, T) step ids -> (B, K) how many tokens each step has, 0 for no step."""
    return step_sums(torch.ones_like(step_id, dtype=torch.float32), step_id, K)


def step_weights(d, epsilon=1e-6, delta=0.2):
    """Trust in the teacher at each step of a rollout (Eq. 7).

    d        (B, K) divergence of each step, nats/token
    returns  (B, K) w_k = min(prod_{u<k} (d_u + eps) / (d_{u+1} + eps), 1 + delta), w_1 = 1

    >>> step_weights(torch.tensor([[0.3, 0.6, 0.2]]))
    tensor([[1.0000, 0.5000, 1.2000]])
    """
    # Neighbours cancel in the product, so only the first and the k-th step remain. The cap is on
    # the weight, not on the running product: a step after a capped one does not suffer from it.
    return ((d[:, :1] + epsilon) / (d + epsilon)).clamp(max=1 + delta)


def steps_since_failure(failed):
    """How many steps after its first failed call each step comes; 0 up to and at that call.

    failed   (B, K) bool: the tool call of step k failed

    >>> steps_since_failure(torch.tensor([[False, True, False, False]]))
    tensor([[0, 0, 1, 2]])
    """
    return ((failed.cumsum(1) > 0).cumsum(1) - 1).clamp(min=0)


# The paper's ablation, and one scheme of ours: functions of a Batch and Config to (B, K) weights.
WEIGHTS = {
    "sod": lambda batch, c: step_weights(batch.d, c.epsilon, c.delta),
    "uniform": lambda batch, c: torch.ones_like(batch.d),
    # .9^(k - k_err) after the first failed call k_err, 1 up to it
    "decay": lambda batch, c: 0.9 ** steps_since_failure(batch.failed).float(),
    # 0 after the first failed call, 1 up to it
    "mask_after_error": lambda batch, c: (steps_since_failure(batch.failed) == 0).float(),
    "unclipped": lambda batch, c: step_weights(batch.d, c.epsilon, math.inf),
    # Not in the paper: a first step that is known by heart (d_1 near 0) cannot switch off the rest.
    "floor": lambda batch, c: step_weights(batch.d.clamp(min=c.floor), c.epsilon, c.delta),
}


# --- The method, as a family: who scores, and what a token is worth ----------------------------


@dataclass(frozen=True)
class Method:
    """What tells apart the methods that train on rollouts (vanilla and sft do not)."""
    view: str      # who scores: "" nobody, "teacher", or the frozen start with "answer" or "hint"
    outcome: bool  # does the token advantage hold the group advantage A_i?
    weights: str   # factor of logp_t - logp_s: "" none, "uniform", "sod" (then Config.weights)


METHODS = {
    "vanilla":   Method("",        False, ""),         # no training: the student is measured
    "sft":       Method("",        False, ""),         # cross-entropy on demonstrations
    "grpo":      Method("",        True,  ""),         # A_i
    "opd":       Method("teacher", True,  "uniform"),  # A_i +     (logp_t - logp_s)
    "opd_only":  Method("teacher", False, "uniform"),  #            logp_t - logp_s
    "opsd_gt":   Method("answer",  True,  "uniform"),  # A_i +     (logp_t - logp_s), our reading
    "opsd_hint": Method("hint",    True,  "uniform"),  # A_i +     (logp_t - logp_s), our reading
    "sod":       Method("teacher", True,  "sod"),      # A_i + w_k (logp_t - logp_s)
    "sod_only":  Method("teacher", False, "sod"),      #       w_k (logp_t - logp_s)
}


def token_advantages(method, A, logp_s, logp_t, step_id, w, opd_coef=1.0):
    """What each sampled token is worth (Eq. 8-10): outcome plus weighted distillation.

    method           a key of METHODS
    A                (B,) outcome advantage of each rollout
    logp_s, logp_t   (B, T) log-probabilities of the sampled tokens, nats; grpo takes None
    step_id          (B, T) k, or -1 for tokens that get no advantage
    w                (B, K) weight of each step; methods without distillation take None
    returns          (B, T) A_it, 0 outside the steps, detached
    """
    A_it = torch.zeros(step_id.shape, device=step_id.device)  # (B, T)
    if METHODS[method].outcome:
        A_it = A_it + A[:, None]
    if METHODS[method].view:
        A_it = A_it + opd_coef * per_token(w, step_id) * (logp_t - logp_s)
    # where, not a product: tool tokens may hold any value, and 0 * inf is not 0.
    return torch.where(step_id >= 0, A_it, 0.0).detach()


def per_token(w, step_id):
    """(B, K) weights of steps -> (B, T): a token has the weight of its step."""
    return w.gather(1, step_id.clamp(min=0))


def policy_loss(logp, logp_old, advantages, mask, clip_low=0.2, clip_high=0.28, clip_dual=3.0,
                num_tokens=None):
    """Clipped surrogate on token advantages, with the dual clip where they are negative.

    logp, logp_old  (B, T) log-probabilities now (with gradient) and when sampled, nats
    advantages      (B, T) A_it
    mask            (B, T) bool: tokens the student sampled
    num_tokens      tokens of the whole update; default: those of this mask
    returns         scalar, the sum over `mask` divided by `num_tokens`

    Differs from the authors' code, which takes a token mean in each micro-batch: here is one over
    the update, so the gradient does not depend on how the update was cut into micro-batches.
    """
    log_ratio = torch.where(mask, logp - logp_old, 0.0).clamp(-20, 20)  # exp stays finite
    advantages = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.exp()  # (B, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    # A very unlikely old token makes the ratio, and so the loss of a bad token, unbounded.
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * clip_dual), loss)
    return loss.sum() / max(mask.sum() if num_tokens is None else num_tokens, 1)


# --- Log-probabilities without the (B, T, V) logits -------------------------------------------
# At 20,480 tokens and 151,936 vocabulary entries the logits alone take 11.6 GiB in fp32. So
# token_logprobs and reverse_kl walk over tiles of them, some tokens by some entries, and compute
# each tile a second time in backward. Each step costs a pass over the tile: few steps, in place.

TILE_ELEMENTS, TILE_TOKENS = 2 ** 24, 4096  # of one fp32 tile (64 MiB); its tokens at most


def _tiles(tokens, vocabulary):
    """Slices of the tokens and of the vocabulary; one of each is a tile."""
    rows = max(min(tokens, TILE_TOKENS), 1)
    width = max(TILE_ELEMENTS // rows // 256 * 256, 256)  # aligned for tensor cores
    return _slices(tokens, rows), _slices(vocabulary, width)


def _slices(total, size):
    return [slice(n, min(n + size, total)) for n in range(0, max(total, 1), size)]


def _logits(a, b, temperature, term=None):
    """a @ b.T / temperature, at least fp32: the softmax is never taken in 16 bits.

    a, b     (n, D) and (m, D), hidden states and rows of the head, or the other way round
    term     from _term, to add to each column
    returns  (n, m)
    """
    if term is not None and a.element_size() == 2:
        a = torch.cat([a, a.new_ones(len(a), term.shape[1])], 1)
        b = torch.cat([b, term], 1)
    if a.dtype in (torch.float32, torch.float64):
        z = a @ b.T if term is None else (a @ b.T).add_(term.T)
    elif a.is_cuda:  # the GEMM adds up in fp32 anyway; do not round its result
        z = torch.mm(a, b.T, out_dtype=torch.float32)
    else:
        z = a.float() @ b.float().T
    return z if temperature == 1 else z.div_(temperature)


def _term(values, dtype):
    """Columns (N, k) of `dtype` that add up to values, (N,). Beside 16-bit hidden states, and with
    ones to meet them, they are a term of each dot product, where to add it later costs two passes.
    Such a number holds a third of the digits: three columns do, and eight keep rows aligned."""
    columns = []
    for _ in range(8 if dtype.itemsize == 2 else 1):
        columns.append(values.to(dtype))
        values = values - columns[-1]
    return torch.stack(columns, 1)


def _add_product(total, a, b):
    """total += a @ b; 16-bit factors give an fp32 product, not rounded before it is added."""
    if total.dtype != a.dtype and a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _sums(z, at, x=None):
    """(N,) log of the sum of exp(z), and (N,) mean of x under the softmax of z, of a tile (N, n).
    The log is read off column `at`, (N, 1): where that is a likely one it is the least rounded."""
    logp = z.log_softmax(1)
    lse = (z.gather(1, at) - logp.gather(1, at))[:, 0]
    return lse, lse if x is None else torch.linalg.vecdot(logp.exp_(), x)


def _joined(lse, mean):
    """(N,) lse and (N,) mean of whole rows, from those of their tiles."""
    lse, mean = torch.stack(lse), torch.stack(mean)
    total = lse.logsumexp(0)
    return total, ((lse - total).exp() * mean).sum(0)


def _head_gradients(d_logits, scale, hidden, weight):
    """Gradients (N, D) and (V, D) of hidden states and head, from those of tiles of logits.

    d_logits  function: slices of tokens and vocabulary -> (n, N), but for each token's factor
    scale     (N,) that factor: it joins the (N, D) matrices, not the far larger tiles
    """
    d_weight, d_hidden = torch.zeros_like(weight), torch.zeros_like(hidden, dtype=scale.dtype)
    blocks, tiles = _tiles(*map(len, (hidden, weight)))
    for tile in tiles:
        total = d_weight[tile].to(scale.dtype)
        for rows in blocks:
            dz = d_logits(rows, tile)
            _add_product(total, dz, (hidden[rows] * scale[rows, None]).to(hidden.dtype))
            _add_product(d_hidden[rows], dz.T, weight[tile])
            del dz  # before the next tile takes its place
        d_weight[tile] = total
    return d_hidden.mul_(scale[:, None]).to(hidden.dtype), d_weight


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, want_entropy):
        blocks, tiles = _tiles(*map(len, (hidden, weight)))
        width = tiles[0].stop
        at = (targets % width)[:, None]  # in its own tile; elsewhere, any column

        def sums(rows, tile):
            z = _logits(hidden[rows], weight[tile], temperature)  # (N, n)
            column = at[rows].clamp(max=z.shape[1] - 1)
            return *_sums(z, column, z if want_entropy else None), z.gather(1, column)[:, 0]
        whole = []
        for rows in blocks:
            lse, mean, found = zip(*(sums(rows, tile) for tile in tiles))
            chosen = torch.stack(found, 1).gather(1, targets[rows, None] // width)[:, 0]
            whole.append((*_joined(lse, mean), chosen))
        lse, mean, chosen = map(torch.cat, zip(*whole))
        logp, entropy = chosen - lse, lse - mean
        ctx.save_for_backward(hidden, weight, targets, lse, logp)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)  # a metric, not a loss
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, lse, logp = ctx.saved_tensors
        # Where p is near 1, p - 1 does not survive 16 bits: it comes from logp, in fp32.
        less_one = logp.expm1().to(hidden.dtype)
        minus_lse = _term(lse * -ctx.temperature, hidden.dtype)

        def d_logits(rows, tile):
            """p - one-hot; the minus of d logp / dz is in the scale below."""
            z = _logits(weight[tile], hidden[rows], ctx.temperature, minus_lse[rows])  # log p
            p = hidden.new_empty(len(z) + 1, z.shape[1])
            torch.exp(z, out=p[:-1])
            place = (targets[rows] - tile.start) % len(weight)  # in the tile, or behind it:
            p.scatter_(0, place.clamp(max=len(z))[None], less_one[None, rows])  # a row to drop
            return p[:-1]

        return *_head_gradients(d_logits, grad / -ctx.temperature, hidden, weight), None, None, None


def token_logprobs(hidden, lm_head_weight, targets, temperature=1.0, entropy=False):
    """Log-probability of each target token, straight from the hidden states.

    hidden          (..., D) last hidden states; position t predicts token t+1
    lm_head_weight  (V, D)
    targets         (...) ids
    returns         (...) log softmax(hidden @ W^T / temperature)[target], nats, fp32 or better;
                    with entropy=True also the entropy of each position, nats, without gradient
    """
    shape = targets.shape
    logp, h = _TokenLogProbs.apply(hidden.reshape(-1, hidden.shape[-1]), lm_head_weight,
                                   targets.reshape(-1), temperature, entropy)
    return (logp.view(shape), h.view(shape)) if entropy else logp.view(shape)


class _ReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_s, weight_s, hidden_t, weight_t, temperature):
        def sums(rows, tile):
            z_s = _logits(hidden_s[rows], weight_s[tile], temperature)  # (N, n)
            z_t = _logits(hidden_t[rows], weight_t[tile], temperature)
            at = torch.zeros_like(z_s[:, :1], dtype=torch.long)
            lse_t, _ = _sums(z_t, at)
            return *_sums(z_s, at, torch.sub(z_s, z_t, out=z_t)), lse_t
        blocks, tiles = _tiles(*map(len, (hidden_s, weight_s)))
        whole = []
        for rows in blocks:
            lse_s, gap, lse_t = zip(*(sums(rows, tile) for tile in tiles))
            whole.append((*_joined(lse_s, gap), torch.stack(lse_t).logsumexp(0)))
        lse_s, gap, lse_t = map(torch.cat, zip(*whole))
        kl = gap - lse_s + lse_t  # E_p[log p - log q] = E_p[z_s - z_t] - lse_s + lse_t
        ctx.save_for_backward(hidden_s, weight_s, hidden_t, weight_t, lse_s, lse_t, kl)
        ctx.temperature = temperature
        return kl

    @staticmethod
    def backward(ctx, grad):
        hidden_s, weight_s, hidden_t, weight_t, lse_s, lse_t, kl = ctx.saved_tensors
        term_s = _term(lse_s * -ctx.temperature, hidden_s.dtype)
        term_t = _term((kl - lse_t) * ctx.temperature, hidden_t.dtype)

        def d_logits(rows, tile):
            """p_v (log p_v - log q_v - KL)."""
            log_p = _logits(weight_s[tile], hidden_s[rows], ctx.temperature, term_s[rows])
            gap = _logits(weight_t[tile], hidden_t[rows], ctx.temperature, term_t[rows])
            gap = torch.sub(log_p, gap, out=gap)
            return torch.mul(log_p.exp_(), gap, out=torch.empty_like(gap, dtype=hidden_s.dtype))

        return (*_head_gradients(d_logits, grad / ctx.temperature, hidden_s, weight_s),
                None, None, None)


def reverse_kl(hidden_s, weight_s, hidden_t, weight_t, temperature=1.0):
    """Exact KL(student || teacher) at each position, over the whole vocabulary (kl="full"). Beyond
    the paper, whose term is a one-sample estimate of this one's gradient.

    hidden_s, hidden_t  (..., D_s), (..., D_t) last hidden states
    weight_s, weight_t  (V, D_s), (V, D_t) of the two heads; the same V
    returns             (...) nats, fp32 or better, differentiable in the student's two arguments
    """
    kl = _ReverseKL.apply(hidden_s.reshape(-1, hidden_s.shape[-1]), weight_s,
                          hidden_t.reshape(-1, hidden_t.shape[-1]), weight_t, temperature)
    return kl.view(hidden_s.shape[:-1])


# --- Conversation: text to ids, once ----------------------------------------------------------

CUT = "\ufdd0"  # a code point no text may hold: marks where a control string is cut in two


def defuse(tokenizer, text):
    """Mark `text` so that encode() treats control strings in it as ordinary text: a tool that
    prints "<|im_end|>" must not end the turn."""
    control = "|".join(map(re.escape, sorted(tokenizer.get_added_vocab(), key=len, reverse=True)))
    return re.sub(f"(?=(?:{control}))(.)", rf"\1{CUT}", text.replace(CUT, "\ufffd"), flags=re.S)


def encode(tokenizer, text):
    """Ids of `text`, control strings as control tokens except where defuse() has cut them."""
    return [i for piece in text.split(CUT)
            for i in tokenizer.encode(piece, add_special_tokens=False)]


def told_besides(problem, view):
    """What a self-teacher is told behind the question (methods opsd_gt and opsd_hint)."""
    return {"answer": f"\nThe answer is {problem.answer}.",
            "hint": f"\nHint: {problem.hint}"}.get(view, "")


def encode_prompt(tokenizer, problem, system="", view=""):
    """Ids up to and including the header of the first assistant turn. Differs from the authors'
    code: there row 0 decides for a whole file how prompts are made."""
    messages = problem.messages or [{"role": "user", "content": problem.question}]
    extra = told_besides(problem, view)
    last = max(i for i, m in enumerate(messages) if m["role"] == "user")
    messages = [{**m, "content": defuse(tokenizer, m["content"] + extra * (i == last))}
                for i, m in enumerate(messages)]
    if system and messages[0]["role"] != "system":
        # Whoever starts the run wrote it: a worked call in it is the tokens a model has to write.
        messages = [{"role": "system", "content": system}, *messages]
    return encode(tokenizer, tokenizer.apply_chat_template(
        messages, tools=[tools.TOOL_SCHEMA], add_generation_prompt=True, tokenize=False))


def render_tool_turn(tokenizer, text):
    """What the template writes after the text of an assistant turn, its end token first. Only this
    is rendered: in a whole conversation Qwen3's template drops earlier thoughts."""
    anchor = "ANCHOR"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": anchor},
         {"role": "tool", "content": defuse(tokenizer, text)}],
        add_generation_prompt=True, tokenize=False)
    return rendered.split(anchor, 1)[1]


def encode_tool_turn(tokenizer, text):
    """Ids of everything between the student's end-of-turn token and its next turn. Differs from the
    authors' code: there each tool turn loses two tokens."""
    return encode(tokenizer, render_tool_turn(tokenizer, text).removeprefix(tokenizer.eos_token))


def encode_demonstration(tokenizer, problem, messages, system=""):
    """A finished conversation as a Rollout, put together exactly as a rollout grows. Differs from
    the authors' code: there the loss mask is off by one token.

    messages  the turns after the question: assistant, tool, assistant, ...
    """
    turns = []
    for message in messages:
        if message["role"] == "assistant":
            turns.append(Turn(encode(tokenizer, message["content"] + tokenizer.eos_token),
                              message["content"]))
        else:
            turns[-1].answer_ids = encode_tool_turn(tokenizer, message["content"])
    return Rollout(problem, encode_prompt(tokenizer, problem, system), turns)


# --- Phases of an iteration: sampling, scoring, back-propagation ------------------------------


def phase(option, extent):
    """Decorates a phase of an iteration: it is timed, and where memory runs out it runs again with
    half of its option. It is the same work: no weight has moved, random numbers belong to rollouts.

    option  rollout_batch or micro_batch_tokens: how much is worked on side by side
    extent  the phase's arguments -> the smallest and the largest value of it that makes sense
    """
    def decorate(work):
        @functools.wraps(work)
        def run(agent, *args, **kwargs):
            started = time.perf_counter()
            try:
                return work(agent, *args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            finally:
                agent.seconds[work.__name__] += time.perf_counter() - started
            # Behind the except: its traceback, which held every tensor of the attempt, is gone.
            halve(agent, option, *extent(*args))
            return run(agent, *args, **kwargs)
        return run
    return decorate


def halve(agent, option, least, most):
    """Forget the gradient of a failed attempt, and halve the option."""
    agent.student.zero_grad()
    if agent.optimizer:
        agent.optimizer.adamw.zero_grad()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    size = min(getattr(agent.config, option) or most, most)
    if size <= least:
        raise ValueError("out of memory with one rollout at a time; lower --max_response, and try "
                         "--gradient_checkpointing true or --offload all")
    setattr(agent.config, option, max(size // 2, least))
    agent.halvings += 1


def out_of_memory(error):
    """Is it this error? Every device, and each library on it, says so in its own way."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED"))


# --- Rollouts ---------------------------------------------------------------------------------

FINE = ("", "ok", "output_truncated", "not_run")  # every other outcome of a call is a failure


@dataclass
class Turn:
    """Step k of a rollout: what the student wrote, and what came back."""
    ids: list[int] = field(default_factory=list)         # as sampled, the end token included
    text: str = ""                                       # the same, without special tokens
    outcome: str = ""                                    # of its call (tools.py); "" without one
    answer: str = ""                                     # the tool's text
    answer_ids: list[int] = field(default_factory=list)  # the tool turn as the model saw it

    @property
    def failed(self):
        return self.outcome not in FINE


@dataclass(eq=False)
class Rollout:
    """One attempt at one problem, recorded while it is sampled."""
    problem: tools.Problem
    prompt: list[int]
    turns: list[Turn]      # the last one is under way until `finish` is set
    key: tuple = ()        # names its random numbers: seed, purpose, iteration, which of the batch
    noise: np.ndarray | None = None  # (max_response,) uniform: noise[n] picks response token n
    finish: str = ""       # answer, turns (limit), budget (cut off), infrastructure (not its fault)
    right: bool = False    # the grader's verdict on the last turn
    reason: str = ""       # and its reason
    reward: float = 0.0    # +1 right, about -1 wrong; see outcome_reward

    @property
    def ids(self):
        """Prompt, turns and tool answers, as the model saw them."""
        return self.prompt + [i for turn in self.turns for i in turn.ids + turn.answer_ids]

    @property
    def step_id(self):
        """k for a token sampled in step k, -1 for every other token."""
        marks = [-1] * len(self.prompt)
        for k, turn in enumerate(self.turns):
            marks += [k] * len(turn.ids) + [-1] * len(turn.answer_ids)
        return marks

    @property
    def response_len(self):
        return sum(len(turn.ids) + len(turn.answer_ids) for turn in self.turns)

    def next_noise(self, n):
        """(n,) numbers of the next n response tokens; 0 beyond the token budget."""
        noise = self.noise[self.response_len:self.response_len + n]
        return np.pad(noise, (0, n - len(noise)))


def random_numbers(seed, purpose, *place):
    """The generator of one place in a run, such as (0, "rollouts", 17, 3): rollout 3 of iteration
    17 of seed 0. Nothing random is carried along, so a run can be continued anywhere."""
    return np.random.default_rng([seed, *place, *purpose.encode()])


@phase("rollout_batch", lambda model, prompts, *_: (1, len(prompts)))
def sample_rollouts(agent, model, prompts, key, numbers=None, temperature=None, top_p=1.0):
    """Let a model solve problems in several turns with the tool.

    prompts  [(Problem, prompt ids), ...], one for each rollout
    key      (seed, purpose, iteration), which with a rollout's number names its random numbers
    numbers  that of each rollout; by default 0, 1, 2 and so on
    returns  [Rollout, ...] in the same order, graded and rewarded
    """
    config = agent.config
    rollouts = []
    for i, (problem, ids) in zip(numbers or range(len(prompts)), prompts):
        noise = random_numbers(*key, i).random(config.max_response)
        rollouts.append(Rollout(problem, ids, [Turn()], (*key, i), noise))
    pick = partial(pick_tokens, temperature=temperature or config.temperature, top_p=top_p)
    # generate() on a model in train() with checkpointing drops its cache: wrong tokens, no warning.
    ENGINES[config.rollout_engine](agent, model.eval(), rollouts, pick)
    for r in rollouts:
        grade_rollout(r, agent.tool, config)
    return rollouts


def sample_by_generate(agent, model, rollouts, pick):
    """The plain engine: turn by turn, all rollouts wait for the slowest, then for their tools."""
    ends, config = end_ids(model, agent.tokenizer), agent.config
    size = config.rollout_batch or len(rollouts)
    while active := [r for r in rollouts if not r.finish]:
        for start in range(0, len(active), size):
            rows = active[start:start + size]
            tokens = max(config.max_response - r.response_len for r in rows)
            for r, ids in zip(rows, sample_tokens(model, agent.tokenizer, rows, tokens, pick)):
                r.turns[-1].ids += ids[:config.max_response - r.response_len]
        calls = [(r, call) for r in active if (call := end_turn(agent, r, ends))]
        runs = [agent.tool.submit(call, (*r.key, len(r.turns) - 1)) for r, call in calls]
        for (r, _), run in zip(calls, runs):
            take_answer(agent, r, run.result())


@torch.no_grad()
def sample_tokens(model, tokenizer, rollouts, tokens, pick):
    """At most `tokens` new ids of each rollout, up to an end id, from HF generate."""
    assert not model.training, "call model.eval() before sampling"
    ends, rows = end_ids(model, tokenizer), [r.ids for r in rollouts]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])  # (B, width)
    # The mask is not optional: the pad id may be an end id, and so cannot be told from text.
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    noise = torch.tensor(np.stack([r.next_noise(tokens) for r in rollouts]), device=model.device)
    settings = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=ends,
                                pad_token_id=pad_id)
    out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device),
                         generation_config=settings, logits_processor=[OwnNoise(noise, pick)])
    return [up_to_end(new, ends) for new in out[:, width:].tolist()]


class OwnNoise(LogitsProcessor):
    """Makes HF generate pick the tokens of each row by the row's own numbers."""

    def __init__(self, noise, pick):
        self.noise, self.pick, self.t = noise, pick, 0  # noise: (B, tokens)

    def __call__(self, ids, logits):
        chosen = self.pick(logits, self.noise[:, self.t])
        self.t += 1
        return torch.full_like(logits, -math.inf).scatter_(1, chosen[:, None], 0.0)


def pick_tokens(logits, noise, temperature=1.0, top_p=1.0):
    """The token at which the cumulated distribution passes a uniform number (inverse CDF).

    logits   (B, V)
    noise    (B,) uniform in [0, 1), fp64
    top_p    keep the likeliest tokens whose share before them is below top_p
    returns  (B,) ids
    """
    p = (logits.float() / temperature).softmax(-1)  # (B, V)
    if top_p < 1:
        ranked, order = p.sort(-1, descending=True)
        ranked = torch.where(ranked.cumsum(-1) - ranked < top_p, ranked, 0.0)
        # Back in the order of the vocabulary: rounding may exchange neighbours in the ranking.
        p = torch.zeros_like(p).scatter_(1, order, ranked)
    edges = p.cumsum(-1, dtype=torch.float64)  # fp32 would lose the rare tokens of a large V
    chosen = torch.searchsorted(edges, noise[:, None] * edges[:, -1:], right=True)
    return chosen.clamp(max=p.shape[1] - 1)[:, 0]


def end_ids(model, tokenizer):
    """Every id that ends a turn: the tokenizer's and those of the model's shipped settings."""
    shipped = getattr(model, "shipped_generation", model.generation_config).eos_token_id
    shipped = shipped if isinstance(shipped, list) else [shipped]
    return sorted({i for i in [tokenizer.eos_token_id, *shipped] if i is not None})


def up_to_end(ids, ends):
    """The ids up to and including the first end id."""
    return ids[:next((n + 1 for n, i in enumerate(ids) if i in ends), len(ids))]


def end_turn(agent, r, ends):
    """Record the turn that r has just sampled. Returns its tool call, or None where r ends here."""
    turn = r.turns[-1]
    turn.text = agent.tokenizer.decode(turn.ids, skip_special_tokens=True)
    call = tools.parse_tool_call(turn.text)
    if turn.ids[-1] not in ends:
        r.finish = "budget"
    elif call is None:
        r.finish = "answer"
    elif len(r.turns) == agent.config.max_turns:
        r.finish = "turns"
    if call and r.finish:
        turn.outcome = "not_run"
    return None if r.finish else call


def take_answer(agent, r, seen):
    """Append what the tool said; a rollout whose budget it does not fit is cut off here."""
    turn, ids = r.turns[-1], encode_tool_turn(agent.tokenizer, seen.text)
    turn.outcome, turn.answer = seen.outcome, seen.text
    if seen.outcome == "sandbox_error":  # tried again and again: the machine's fault
        r.finish = "infrastructure"
    elif r.response_len + len(ids) >= agent.config.max_response:
        r.finish = "budget"
    else:
        turn.answer_ids = ids
        r.turns.append(Turn())


def grade_rollout(r, tool, config):
    """Set the verdict on the final turn, and the reward."""
    if r.finish == "infrastructure":
        return
    verdict = tools.grade(r.problem, r.turns[-1].text if r.finish == "answer" else "", tool)
    r.right, r.reason = verdict.right, verdict.reason
    r.reward = outcome_reward(r, verdict, config)
    if "sandbox_error" in verdict.reason:
        r.finish = "infrastructure"


def outcome_reward(rollout, verdict, config):
    """+1 right, -1 wrong, wrong shaped by tool calls; less near the end of the token budget.
    Differs from the authors' code: there the shaping has no effect, and every wrong answer gets
    -1.1."""
    if rollout.problem.kind == "program":
        reward = verdict.score  # share of tests passed; -1 without a program
    else:
        reward = 1.0 if verdict.right else -1.0
    if config.tool_shaping and reward == -1.0:
        reward += 0.1 * min(sum(turn.outcome != "" for turn in rollout.turns), 4)
    over = rollout.response_len - (config.max_response - config.overlong)
    return reward - (min(max(over / config.overlong, 0.0), 1.0) if config.overlong else 0.0)


# --- Scoring: log-probabilities of exactly the ids that were sampled ---------------------------


@dataclass
class Batch:
    """Rollouts as tensors on the training device, padded on the right: (B, T) unless said."""
    rollouts: list[Rollout]
    lengths: list[int]    # tokens of each
    ids: torch.Tensor
    step_id: torch.Tensor      # k for a token sampled in step k, else -1
    failed: torch.Tensor       # (B, K) bool: the call of step k failed
    reward: torch.Tensor       # (B,) nan where the machine failed the rollout
    logp_s: torch.Tensor = None      # the old policy, nats
    entropy_s: torch.Tensor = None   # nats
    logp_t: torch.Tensor = None      # the teacher, nats; None in methods without one
    entropy_t: torch.Tensor = None   # nats
    d: torch.Tensor = None           # (B, K) Eq. 6, nats/token
    w: torch.Tensor = None           # (B, K) Eq. 7
    A: torch.Tensor = None           # (B,) within its group
    advantages: torch.Tensor = None  # A_it; None for demonstrations

    def rows(self, chosen):
        """The Batch of some rows, cut to the longest of them: (n, t)."""
        lengths = [self.lengths[i] for i in chosen]

        def cut(name):
            x = getattr(self, name)
            return x if x is None else x[chosen, :max(lengths)] if name in PER_TOKEN else x[chosen]
        tensors = {f.name: cut(f.name) for f in fields(self)[2:]}
        return Batch([self.rollouts[i] for i in chosen], lengths, **tensors)


PER_TOKEN = ("ids", "step_id", "logp_s", "entropy_s", "logp_t", "entropy_t", "advantages")


def collate(rollouts, device, prompts=None):
    """Rollouts as a Batch, after other prompts than their own where these are given. One that the
    machine failed has no tokens of the student's: nothing is learnt from it."""
    prompts = prompts or [r.prompt for r in rollouts]
    ids, step_ids = [], []
    for r, prompt in zip(rollouts, prompts):
        response = r.step_id[len(r.prompt):]
        marks = [-1] * len(response) if r.finish == "infrastructure" else response
        ids.append(prompt + r.ids[len(r.prompt):])
        step_ids.append([-1] * len(prompt) + marks)
    rewards = [math.nan if r.finish == "infrastructure" else r.reward for r in rollouts]
    return Batch(rollouts, [len(row) for row in ids], pad(ids, 0, device),
                 pad(step_ids, -1, device), pad([[t.failed for t in r.turns] for r in rollouts],
                                                False, device), torch.tensor(rewards).to(device))


def pad(rows, value, device):
    """Lists of unequal length -> (B, T), padded on the right."""
    rows = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, True, value).to(device)


def micro_batches(lengths, budget):
    """Cut rows into batches of at most `budget` padded tokens (0: 65,536), rows of like length
    together. A longer row is a batch of its own."""
    order, rows = sorted(range(len(lengths)), key=lambda i: lengths[i]), []
    for i in order:
        if rows and (len(rows) + 1) * lengths[i] > (budget or 2**16):
            yield rows
            rows = []
        rows.append(i)
    if rows:
        yield rows


def hidden_states(model, ids):
    """(B, T) ids -> (B, T, D). Right padding needs no mask: a causal model never looks at it."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def sampled_hidden(model, ids, step_id):
    """(B, T) ids -> (N, D): the states from which the N sampled tokens were predicted, row by row.
    Other tokens are never multiplied with the vocabulary."""
    hidden = hidden_states(model, ids).flatten(0, 1)  # (B * T, D)
    predicts = F.pad(step_id[:, 1:] >= 0, (0, 1))     # (B, T): position t predicts token t+1
    return hidden.index_select(0, predicts.flatten().nonzero()[:, 0])


def head(model):
    """(V, D) output matrix."""
    return model.get_output_embeddings().weight


def spread(values, mask):
    """(N,) values at the N places of a (B, T) mask, 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def sampled_logprobs(model, ids, step_id, temperature):
    """(B, T) log-probability of each sampled token, with gradient, and (B, T) entropy of what it
    was drawn from, without; nats, 0 for every other token."""
    mask = step_id >= 0
    logp, entropy = token_logprobs(sampled_hidden(model, ids, step_id), head(model), ids[mask],
                                   temperature, entropy=True)
    return spread(logp, mask), spread(entropy, mask)


@phase("micro_batch_tokens", lambda model, batch: (batch.ids.shape[1], batch.ids.numel()))
@torch.no_grad()
def score(agent, model, batch):
    """sampled_logprobs of a whole batch, without gradient."""
    logp, entropy = (torch.zeros(batch.ids.shape, device=batch.ids.device) for _ in range(2))
    for rows in micro_batches(batch.lengths, agent.config.micro_batch_tokens):
        part = batch.rows(rows)
        width = part.ids.shape[1]
        logp[rows, :width], entropy[rows, :width] = sampled_logprobs(
            model, part.ids, part.step_id, agent.config.temperature)
    return logp, entropy


def score_by_teacher(agent, batch):
    """The teacher's log-probabilities and entropies: (B, T) and (B, T), where the student's are."""
    seen = as_teacher_sees(agent, batch)
    with visiting(agent.teacher, batch.ids.device):
        scores = score(agent, agent.teacher, seen)
    # Sampled tokens come in the same order in both, whatever prompt stands before them.
    return [spread(x[seen.step_id >= 0], batch.step_id >= 0) for x in scores]


def as_teacher_sees(agent, batch):
    """The same rollouts after the teacher's prompt: the student's own, or one that tells more."""
    view = METHODS[agent.config.method].view
    if view == "teacher":
        return batch
    prompts = [encode_prompt(agent.tokenizer, r.problem, agent.config.system, view)
               for r in batch.rollouts]
    return collate(batch.rollouts, batch.ids.device, prompts)


@contextmanager
def visiting(model, device):
    """The model on `device` for a while, and then back home (option offload)."""
    home = model.device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


# --- Update -----------------------------------------------------------------------------------


class Optimizer:
    """AdamW on fp32 masters, whatever the model computes in: at lr 1e-6 an update is far below the
    spacing of bf16 numbers, so a weight that is updated in place never moves. The gradients of
    micro-batches add up in fp32, too. With offload "all" all of this lies in the CPU's memory."""

    def __init__(self, model, learning_rate, config):
        self.learning_rate = learning_rate  # function of the number of the update, 1 and up
        self.updates, self.grad_clip = 0, config.grad_clip
        home = torch.device("cpu") if config.offload == "all" else model.device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 and p.device == home else
                        p.detach().to(home, torch.float32) for p in self.parameters]
        kind = torch.optim.AdamW if RANKS == 1 else adamw_in_shares
        self.adamw = kind(self.masters, betas=(config.beta1, config.beta2),
                          weight_decay=config.weight_decay)
        self.hooks = [p.register_post_accumulate_grad_hook(partial(self._collect, master))
                      for p, master in self.apart()]

    def apart(self):
        """(weight, master) where these are two tensors."""
        return [(p, master) for p, master in zip(self.parameters, self.masters) if p is not master]

    def detach(self):
        """Come off the model, which then may have another optimiser."""
        for hook in self.hooks:
            hook.remove()

    @staticmethod
    def _collect(master, p):
        """Add the gradient of a micro-batch to the master's, in fp32, and free it."""
        grad = p.grad.to(master.device, torch.float32)
        master.grad = grad if master.grad is None else master.grad.add_(grad)
        p.grad = None

    @torch.no_grad()
    def step(self, loss):
        """Move the weights once; returns the norm of the gradient before clipping. Where this or
        the loss is not finite the weights stay."""
        norm = math.nan
        if math.isfinite(loss):
            norm = float(torch.nn.utils.clip_grad_norm_(self.masters, self.grad_clip))
        if math.isfinite(norm):
            self.updates += 1
            for group in self.adamw.param_groups:
                group["lr"] = self.learning_rate(self.updates)
            self.adamw.step()
            for p, master in self.apart():
                p.copy_(master)
        self.adamw.zero_grad()
        return norm

    def state_dict(self):
        """What to keep beside the model's own weights."""
        return {"updates": self.updates, "adamw": self.adamw.state_dict(),
                "masters": [master for _, master in self.apart()]}

    @torch.no_grad()
    def load_state_dict(self, state):
        self.updates = state["updates"]
        (stored,), (options,) = state["adamw"]["param_groups"], self.adamw.param_groups
        options = {**options, "params": stored["params"]}  # this run's, which may be new ones
        self.adamw.load_state_dict({**state["adamw"], "param_groups": [options]})
        for (_, mine), theirs in zip(self.apart(), state["masters"], strict=True):
            mine.copy_(theirs)


def make_optimizer(agent):
    """The optimiser of a run, with its learning rate: constant, or sft's cosine."""
    config, total = agent.config, num_iterations(agent)
    constant = lambda n: config.lr * min(1.0, n / max(config.warmup, 1))
    cosine = lambda n: config.sft_lr * cosine_scale(n, total)
    return Optimizer(agent.student, cosine if config.method == "sft" else constant, config)


def num_iterations(agent):
    """Iterations of the whole run: an option, but for sft, which passes over its data."""
    config = agent.config
    if config.method != "sft":
        return config.iterations
    return math.ceil(config.sft_epochs * len(agent.practice) / config.sft_batch)


def cosine_scale(n, total):
    """Share of the learning rate in update n of `total`: 10% warm-up, then down, never to 0."""
    warm = max(0.1 * total, 1)
    return min(n / warm, 0.5 + 0.5 * math.cos(math.pi * max(n - warm, 0) / (total - warm + 1)))


@phase("micro_batch_tokens", lambda batch, *_: (batch.ids.shape[1], batch.ids.numel()))
def backpropagate(agent, batch, num_tokens=None):
    """Leave the gradient of some rollouts with the optimiser; returns their loss and their share of
    clipped tokens, means over `num_tokens`: their own, or those of all ranks."""
    config, student = agent.config, agent.student
    num_tokens = int((batch.step_id >= 0).sum()) if num_tokens is None else num_tokens
    if not num_tokens:  # the machine failed all of them
        return 0.0, 0.0
    temperature = 1.0 if batch.advantages is None else config.temperature  # that of sampling
    totals = torch.zeros(2, device=student.device)  # read once: each read waits for the GPU
    for rows in micro_batches(batch.lengths, config.micro_batch_tokens):
        part = batch.rows(rows)
        mask = part.step_id >= 0  # (B, T), with N tokens
        hidden = sampled_hidden(student, part.ids, part.step_id)  # (N, D)
        logp = spread(token_logprobs(hidden, head(student), part.ids[mask], temperature), mask)
        if part.advantages is None:  # demonstrations: cross-entropy
            loss, clipped = -logp.sum() / num_tokens, torch.zeros(())
        else:
            loss = policy_loss(logp, part.logp_s, part.advantages, mask, config.clip_low,
                               config.clip_high, config.clip_dual, num_tokens)
            ratio = torch.where(mask, logp.detach() - part.logp_s, 0.0).exp()
            left = ratio != ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            clipped = left.sum() / num_tokens
        if part.advantages is not None and config.kl == "full":
            w = per_token(part.w, part.step_id)[mask]  # (N,)
            loss = loss + config.opd_coef * (w * full_kl(agent, part, hidden)).sum() / num_tokens
        loss.backward()
        totals += torch.stack([loss.detach(), clipped.to(totals.device)])
    return totals.tolist()


def full_kl(agent, batch, hidden):
    """Exact KL(student || teacher) where each sampled token was drawn: (N,) nats (kl="full")."""
    seen = as_teacher_sees(agent, batch)
    with torch.no_grad():
        hidden_t = sampled_hidden(agent.teacher, seen.ids, seen.step_id)
    return reverse_kl(hidden, head(agent.student), hidden_t, head(agent.teacher),
                      agent.config.temperature)


# --- Training ---------------------------------------------------------------------------------


@dataclass
class Agent:
    """A run in memory: models, tool, data, and how far it has come."""
    config: Config
    student: torch.nn.Module | None
    teacher: torch.nn.Module | None  # frozen; None where the method has none
    tokenizer: object
    tool: object                     # submit(call, place) -> Future of an Observation; run
    practice: list = field(default_factory=list)  # (Problem, prompt ids), or sft's Rollouts
    held_out: list = field(default_factory=list)  # Problems to measure on
    optimizer: Optimizer | None = None
    iteration: int = 0               # iterations done: where a resumed run goes on
    halvings: int = 0                # how often memory ran out
    seconds: Counter = field(default_factory=Counter)  # of each phase, since they were last read


def train(agent):
    """Train the student with any method of METHODS, from where it stands: yields (numbers, Batch)
    of each iteration, for sft (numbers, None). Printing, files and evaluation live outside."""
    config = agent.config
    if config.method == "vanilla":
        return
    agent.optimizer = agent.optimizer or make_optimizer(agent)
    for iteration in range(agent.iteration + 1, num_iterations(agent) + 1):
        torch.manual_seed((config.seed << 32) + iteration)  # of dropout, in models that have it
        yield imitate(agent, iteration) if config.method == "sft" else distil(agent, iteration)


def distil(agent, iteration):
    """An iteration of Algorithm 1: sample, reward, score, weigh, update."""
    config, student, method = agent.config, agent.student, METHODS[agent.config.method]
    prompts = draw(agent.practice, config, iteration, config.prompts, config.group_size)
    mine = np.arange(len(prompts)).reshape(-1, config.group_size)[RANK::RANKS].flatten().tolist()
    with together():
        rollouts = sample_rollouts(agent, student, [prompts[i] for i in mine],
                                   (config.seed, "rollouts", iteration), mine)
        batch = collate(rollouts, student.device)                           # with their rewards

        student.train()  # as in the update, so that the ratio begins at 1 even with dropout
        batch.logp_s, batch.entropy_s = score(agent, student, batch)        # the old policy
        if method.view:
            batch.logp_t, batch.entropy_t = score_by_teacher(agent, batch)  # on the same ids
            batch.d = step_divergence(batch.logp_s, batch.logp_t, batch.step_id,
                                      batch.failed.shape[1])                # Eq. 6
            scheme = config.weights if method.weights == "sod" else "uniform"
            batch.w = WEIGHTS[scheme](batch, config)                        # Eq. 7
        batch.A = group_advantages(batch.reward, config.group_size)
        coef = config.opd_coef if config.kl == "sampled" else 0.0  # full: the KL joins as a loss
        batch.advantages = token_advantages(config.method, batch.A, batch.logp_s,  # Eq. 8-10
                                            batch.logp_t, batch.step_id, batch.w, coef)
    check_sandbox(rollouts)

    parts = np.arange(len(rollouts)).reshape(config.updates, -1).tolist()  # neighbouring groups
    updates = [update(agent, batch.rows(rows)) for rows in parts]
    agent.iteration = iteration
    batch = from_all_ranks(batch, mine)
    return batch_metrics(agent, batch, updates) if batch else update_metrics(updates), batch


def update(agent, batch):
    """Move the weights once; (loss, norm of the gradient, share of clipped tokens)."""
    num_tokens = sum(told_by_ranks(int((batch.step_id >= 0).sum())))
    with together():
        sums = backpropagate(agent, batch, num_tokens)
    loss, clipped = add_up_ranks(agent.optimizer, sums)
    return loss, agent.optimizer.step(loss), clipped


def check_sandbox(rollouts):
    """Stop, before anything moves, where the machine has failed every rollout."""
    if all(told_by_ranks(all(r.finish == "infrastructure" for r in rollouts))):
        raise ValueError("the sandbox failed a program of every rollout: see `python tools.py`, "
                         "and whether the machine has memory and disk left")


def imitate(agent, iteration):
    """An update of supervised fine-tuning on demonstrations (sft): the cold start before SOD."""
    config, student = agent.config, agent.student.train()
    rows = draw(agent.practice, config, iteration, config.sft_batch)
    made = update(agent, collate(rows[RANK::RANKS], student.device))
    agent.iteration = iteration
    return {"iteration": iteration, "iterations": num_iterations(agent),
            **update_metrics([made]), **machine_metrics(agent)}, None


def draw(items, config, iteration, count, times=1):
    """The `count` items of an iteration, each `times` in a row, from an endless list: all items,
    shuffled anew each epoch."""
    N, start, drawn = len(items), (iteration - 1) * count, []
    for n in range(start, start + count):
        order = shuffled(config.seed, n // N, N)
        drawn += [items[order[n % N]]] * times
    return drawn


@functools.lru_cache(maxsize=2)
def shuffled(seed, epoch, N):
    """The order of N items in one epoch."""
    return random_numbers(seed, "order", epoch).permutation(N)


# ==============================================================================================
# The method ends here. What follows is plumbing: the fast engine, the numbers of an iteration,
# health, evaluation, loading with its checks, files, the command.
# ==============================================================================================

# --- Several processes: torchrun --nproc_per_node N sod_mini.py ... ---------------------------
# Each rank samples, scores and back-propagates whole groups of its own, with the random numbers that
# these have in one process. Gradients are summed, so weights stay the same on all ranks; files and
# the screen are rank 0's. One process exchanges nothing.


def start_ranks():
    """Find the other ranks, if there are any."""
    if RANKS > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()


def exchange(work, *args):
    """A collective operation of torch.distributed, which a dead rank ends with a sentence."""
    try:
        work(*args)
    except RuntimeError as error:
        raise ValueError("another rank has ended, so this one ends, too; resume from the last save "
                         f"({str(error).splitlines()[0]:.60})") from None


def told_by_ranks(value):
    """[value of rank 0, value of rank 1, ...], on every rank."""
    values = [value] * RANKS
    if RANKS > 1:
        exchange(dist.all_gather_object, values, value)
    return values


@contextmanager
def together():
    """Work that each rank does alone: an error or a signal that ends it on one ends it on all."""
    together.alone, stop = True, None
    try:
        yield
    except BaseException as error:
        stop = error
    together.alone = RANKS == 1
    if stops := [error for error in told_by_ranks(stop) if error]:
        raise stop or stops[0]


together.alone = True  # may a signal be obeyed at once? Not while other ranks wait for this one


def adamw_in_shares(parameters, **options):
    """AdamW of which each rank keeps, and steps with, its share of the moments."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # slow to import
    return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, **options)


def add_up_ranks(optimizer, numbers):
    """Sum the gradient, and these numbers, over all ranks."""
    told = told_by_ranks((numbers, optimizer.masters[0].grad is not None))
    if RANKS > 1 and any(has_gradient for _, has_gradient in told):
        for master in optimizer.masters:
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad
            exchange(dist.all_reduce, master.grad)
    return np.sum([numbers for numbers, _ in told], axis=0).tolist()


def from_all_ranks(batch, mine):
    """The Batch of all ranks in the order of one process, on rank 0; None elsewhere. `mine` is
    where this rank's rollouts stand in that order."""
    if RANKS == 1:
        return batch
    parts, on_cpu = [None] * RANKS if RANK == 0 else None, replace(batch, **{
        name: x.cpu() for name, x in vars(batch).items() if isinstance(x, torch.Tensor)})
    exchange(dist.gather_object, (mine, on_cpu), parts)
    if RANK:
        return None
    order = np.argsort(np.concatenate([numbers for numbers, _ in parts]))

    def joined(name):
        column = [row for _, part in parts for row in getattr(part, name)]
        column = [column[i] for i in order]
        if not isinstance(column[0], torch.Tensor):
            return column
        return torch.stack(column) if column[0].dim() == 0 else torch.nn.utils.rnn.pad_sequence(
            column, True, -1 if name == "step_id" else 0)
    return Batch(**{name: joined(name) for name, x in vars(batch).items() if x is not None})


# --- The fast engine: rollouts keep their keys and values from turn to turn ---------------------


class RaggedLayer(DynamicLayer):
    """The cache of one layer: a row for each slot, and each row is written where it ends."""

    def __init__(self, slots):
        super().__init__()
        self.slots = slots

    def update(self, keys, values, *args, **kwargs):
        """Write new keys and values, (R, heads, n, head_dim); returns all that these rows hold."""
        if not self.is_initialized:  # (slots, heads, positions, head_dim)
            self.keys, self.values = (x.new_zeros(
                len(self.slots.rollouts), x.shape[1], 0, x.shape[3]) for x in (keys, values))
            self.is_initialized = True
        room, length = self.keys.shape[2], self.slots.length
        if length > room:  # grow by half, so that this is seldom
            more = max(length, room * 3 // 2) - room
            if self.slots.graphs:
                self.slots.graphs.clear()  # they write to the old place
            self.keys, self.values = (F.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))
        rows, positions, held = self.slots.places
        self.keys[rows, :, positions] = keys.transpose(1, 2)
        self.values[rows, :, positions] = values.transpose(1, 2)
        return self.keys[held], self.values[held]


class Slots:
    """Room for some rollouts under way, each with its own row of the model's KV cache: an answer of
    the tool is read in where the last turn ended, and one that waits for it takes no part."""

    def __init__(self, model, size):
        check_slots(model)
        assert not model.training, "call model.eval() before sampling"
        self.model, self.device = model, model.device
        self.window = getattr(model.config, "max_position_embeddings", None) or 2 ** 31
        self.rollouts = [None] * size  # the rollout in each slot
        self.read = [0] * size         # how many of its ids the cache holds
        self.length = 0                # positions to attend to
        self.places = None             # (rows, positions, held) that RaggedLayer.update writes to
        # Through a proxy: in a cycle, gigabytes would outlive the last turn until the next gc.
        self.cache = Cache(layer_class_to_replicate=partial(RaggedLayer, weakref.proxy(self)))
        # What a pass of `sample` reads and writes, always in the same place: (slots,)
        self.last = torch.zeros(size, dtype=torch.long, device=self.device)  # ids not read yet
        self.start = torch.zeros_like(self.last)                             # their positions
        self.noise = torch.zeros(size, dtype=torch.float64, device=self.device)
        self.graphs = {} if self.device.type == "cuda" else None  # {(rows, length): a pass}

    def reach(self, length):
        """Attend to `length` positions from now on."""
        step = 64 if self.graphs is None else 256  # few shapes: few graphs, a kinder allocator
        self.length = -(-length // step) * step

    def seat(self, queue):
        """Give free slots to the next rollouts of the queue."""
        for i, r in enumerate(self.rollouts):
            if queue and (r is None or r.finish):
                self.rollouts[i], self.read[i] = queue.popleft(), 0

    def to_front(self, ready):
        """Exchange slots until those of `ready` come first, so that a batch is a plain slice."""
        front, n = [r in ready for r in self.rollouts], len(ready)
        holes = [i for i in range(n) if not front[i]]
        strays = [i for i in range(n, len(front)) if front[i]]
        for i, j in zip(holes, strays):
            for column in (self.rollouts, self.read):
                column[i], column[j] = column[j], column[i]
        for layer in self.cache.layers:
            for x in (layer.keys, layer.values):
                x[holes + strays] = x[strays + holes]

    def catch_up(self, n, budget):
        """Read what is unread in the first n slots, all but the last id: prompts, tool answers."""
        unread = [r.ids[self.read[i]:-1] for i, r in enumerate(self.rollouts[:n])]
        behind = [i for i, ids in enumerate(unread) if ids]
        for batch in micro_batches([len(unread[i]) for i in behind], budget):
            rows = [behind[b] for b in batch]
            ids = pad([unread[i] for i in rows], 0, self.device)
            start = [self.read[i] for i in rows]
            self.reach(max(start) + ids.shape[1])
            self.forward(ids, torch.tensor(start, device=self.device),
                         torch.tensor(rows, device=self.device))

    def sample(self, n, tokens, pick):
        """(n, tokens) new ids of the first n slots; what follows an end id has no meaning."""
        # Graphs take 16, 32, ... rows. What those behind n write is overwritten before it is read:
        # they have an unread last id, too, and go on from there.
        rows = n if self.graphs is None else min(-(-n // 16) * 16, len(self.rollouts))
        ids = [r.ids for r in self.rollouts[:rows]]
        self.last[:rows] = torch.tensor([row[-1] for row in ids], device=self.device)
        self.start[:rows] = torch.tensor([len(row) - 1 for row in ids], device=self.device)
        noise = torch.tensor(np.stack([r.next_noise(tokens) for r in self.rollouts[:rows]]),
                             device=self.device)
        self.reach(max(map(len, ids)) + tokens)
        sampled = []
        for t in range(tokens):  # without waiting for the device
            self.noise[:rows] = noise[:, t]
            self.next_ids(rows, pick) if self.graphs is None else self.replay(rows, pick)
            sampled.append(self.last[:rows].clone())
        return torch.stack(sampled, 1)[:n].tolist()

    def next_ids(self, rows, pick):
        """Read the last id of the first slots and put the next one in its place."""
        logits = self.forward(self.last[:rows, None], self.start[:rows])
        self.last[:rows] = pick(logits, self.noise[:rows])
        self.start[:rows] += 1

    def replay(self, rows, pick):
        """next_ids as a CUDA graph, one launch in place of a thousand: the first pass of a shape
        warms up, the second is recorded, and from then on it is replayed."""
        work, shape = partial(self.next_ids, rows, pick), (rows, self.length)
        if shape not in self.graphs:
            work()
            self.graphs[shape] = None
            return
        try:
            self.graphs[shape] = self.graphs[shape] or record(work, self.graphs.values())
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            tqdm.write(f"no CUDA graph of a decode pass ({str(error).splitlines()[0]}): sampling "
                       "goes on, and is slower")
            self.graphs = None
            return work()
        self.graphs[shape].replay()

    def forward(self, ids, start, rows=None):
        """Feed ids to slots; each attends to all that its slot holds before it.

        ids      (R, n), for positions start[r] .. start[r] + n - 1
        rows     (R,) slots, or None for the first R
        returns  (R, V) logits behind the last id
        """
        R, n = ids.shape
        # Padding lies behind a row's last id: later ids overwrite what it writes, unseen. Only the
        # window it must not leave, whose last place no id needs: the last id is never read.
        positions = (start[:, None] + torch.arange(n, device=ids.device)).clamp(max=self.window - 1)
        written = (torch.arange(R, device=ids.device) if rows is None else rows)[:, None]
        held = slice(R) if rows is None else rows
        self.places = written, positions, (held, slice(None), slice(self.length))
        mask = torch.arange(self.length, device=ids.device) <= positions[:, :, None]  # (R, n, L)
        return self.model(ids, attention_mask=mask[:, None], position_ids=positions, use_cache=True,
                          past_key_values=self.cache, logits_to_keep=1).logits[:, -1]


def record(work, graphs):
    """A CUDA graph that does what work() does, at the same addresses, when it is replayed."""
    graph, others = torch.cuda.CUDAGraph(), [g.pool() for g in graphs if g]
    with torch.cuda.graph(graph, pool=others[0] if others else None):  # they share their scratch
        work()
    return graph


def check_slots(model):
    """Refuse a model that is not known to read rows of different length side by side: every layer
    must obey the positions and the mask, and nothing may depend on the longest row of the batch."""
    config = model.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "")
    if (config.model_type not in ("qwen3", "qwen2", "llama", "gpt2")
            or any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers)
            or rope in ("dynamic", "longrope") or config._attn_implementation != "sdpa"):
        raise ValueError("rollout_engine slots serves Qwen3, Qwen2, Llama and GPT-2 with full "
                         "attention and fixed rotary frequencies, not this "
                         f"{config.model_type} model; use --rollout_engine generate")


@torch.inference_mode()  # 6% faster than no_grad with 64 rollouts of the world
def sample_by_slots(agent, model, rollouts, pick):
    """The fast engine: a kept KV cache (Slots), and nobody waits for another one's tool.

    A call runs while the others sample `look` tokens; then its answer is read. Where it takes more
    than `tool_wait` seconds longer, the others go on without it. The rollouts are those of
    sample_by_generate, but for the rounding of sums, which depends on who is sampled beside whom;
    the clock has a say in that only where a program takes longer than `tool_wait`.
    """
    config, ends, queue = agent.config, end_ids(model, agent.tokenizer), deque(rollouts)
    slots = Slots(model, min(config.rollout_batch or len(rollouts), len(rollouts)))
    runs, new_runs = {}, []  # Rollout -> Future of its call's answer; those of the last look
    while not all(r.finish for r in rollouts):
        slots.seat(queue)
        ready = {r for r in slots.rollouts if r and not r.finish} - runs.keys()
        slots.to_front(ready)
        over = sample_a_look(slots, len(ready), ends, config, pick)
        if new_runs:
            wait(new_runs, config.tool_wait)
        elif not ready:
            wait(runs.values(), return_when=FIRST_COMPLETED)
        for r in [r for r, run in runs.items() if run.done()]:
            take_answer(agent, r, runs.pop(r).result())
        calls = [(r, call) for r in over if (call := end_turn(agent, r, ends))]
        new_runs = [agent.tool.submit(call, (*r.key, len(r.turns) - 1)) for r, call in calls]
        runs.update(zip([r for r, _ in calls], new_runs))


def sample_a_look(slots, n, ends, config, pick):
    """Sample `look` tokens in the first n slots; returns the rollouts whose turn is over."""
    if not n:
        return []
    slots.catch_up(n, config.micro_batch_tokens)
    for i, (r, ids) in enumerate(zip(slots.rollouts, slots.sample(n, config.look, pick))):
        r.turns[-1].ids += up_to_end(ids, ends)[:config.max_response - r.response_len]
        slots.read[i] = len(r.ids) - 1
    return [r for r in slots.rollouts[:n]
            if r.turns[-1].ids[-1] in ends or r.response_len >= config.max_response]


ENGINES = {"slots": sample_by_slots, "generate": sample_by_generate}


# --- Metrics: what an iteration looks like in numbers -------------------------------------------


def batch_metrics(agent, batch, updates):
    """The numbers of an iteration. Rollouts that the machine failed are counted, and left out."""
    config = agent.config
    rollouts = [r for r in batch.rollouts if r.finish != "infrastructure"]
    share = lambda *finish: float(np.mean([r.finish in finish for r in rollouts]))
    token = batch.step_id >= 0
    m = {
        "iteration": agent.iteration,
        "reward": float(np.mean([r.reward for r in rollouts])),
        "right": float(np.mean([r.right for r in rollouts])),      # share of right rollouts
        "entropy": float(batch.entropy_s[token].mean()),           # of the student, nats a token
        "turns": float(np.mean([len(r.turns) for r in rollouts])),
        **call_metrics([turn for r in rollouts for turn in r.turns], len(rollouts)),
        "cut_budget": share("budget"), "cut_turns": share("turns"),  # shares cut off
        "infrastructure": len(batch.rollouts) - len(rollouts),     # lost to the machine
        "grader_errors": sum("grader error" in r.reason for r in rollouts),  # these count as wrong
        "tokens": int(token.sum()),                                # sampled
    }
    if METHODS[config.method].outcome:  # share of groups whose rewards are all equal: A = 0
        m["groups_agree"] = float((batch.A.view(-1, config.group_size) == 0).all(1).float().mean())
    if batch.d is not None:
        m |= teacher_metrics(batch, config)
    return {**m, **update_metrics(updates), **machine_metrics(agent)}


def call_metrics(turns, num_rollouts):
    """Tool calls: how many a rollout, the share that failed, and how each kind of them ended."""
    outcomes = Counter(turn.outcome for turn in turns if turn.outcome)
    calls = sum(outcomes.values())
    return {"tool_calls": calls / num_rollouts, "outcomes": dict(outcomes),
            "tool_fail": sum(turn.failed for turn in turns) / max(calls, 1)}


def teacher_metrics(batch, config):
    """How far student and teacher are apart, and what follows for w."""
    token, K = batch.step_id >= 0, batch.d.shape[1]
    step = step_tokens(batch.step_id, K) > 0  # (B, K) there is such a step
    w = batch.w[step]
    m = {
        "reverse_kl": float((batch.logp_s - batch.logp_t)[token].mean()),  # estimate, nats a token
        "teacher_entropy": float(batch.entropy_t[token].mean()),           # nats a token
        "d": float(batch.d[step].mean()), "w": float(w.mean()),            # means over steps
        "w_quantiles": np.quantile(w.tolist(), [0.1, 0.25, 0.5, 0.75, 0.9]).tolist(),
        "d_by_step": (torch.where(step, batch.d, 0.0).sum(0) / step.sum(0)).tolist(),
    }
    if METHODS[config.method].weights == "sod" and config.weights == "sod":
        several = step.sum(1) > 1  # (B,) rollouts with later steps, whose w_k hang on d_1
        low = several & (batch.d[:, 0] < NEAR_0)
        m["d1_near_0"] = float(low.sum() / several.sum().clamp(min=1))      # share of those
        capped = (w >= 1 + config.delta - 1e-6) & (config.delta > 0)
        m["w_capped"] = float(capped.float().mean())                        # share of steps
    return m


def update_metrics(updates):
    """Means over the (loss, norm, share of clipped tokens) of an iteration's updates."""
    losses, norms, clipped = np.array(updates).T
    return {"loss": float(losses.mean()), "grad_norm": float(norms.mean()),
            "clipped": float(clipped.mean()), "not_taken": int((~np.isfinite(norms)).sum())}


def machine_metrics(agent):
    """What the machine did; everything else depends on the seed alone."""
    config, seconds = agent.config, {f"seconds_{name}": s for name, s in agent.seconds.items()}
    agent.seconds.clear()
    return {**seconds, "out_of_memory": agent.halvings, "rollout_batch": config.rollout_batch,
            "micro_batch_tokens": config.micro_batch_tokens,
            "tool_retries": getattr(agent.tool, "retried", 0)}


MACHINE = ("seconds", "out_of_memory", "rollout_batch", "micro_batch_tokens", "tool_retries")


# --- Health: what the numbers of a run say, in words -------------------------------------------

NEAR_0 = 0.02  # nats/token: a usual d_k of .2 then gets w_k = .1 or less
WINDOW = 10    # iterations that are looked back upon
HEALTH = {  # metric: (lowest, highest value without a word, the sentence)
    # Cut rollouts have no answer, and are all wrong alike.
    "cut_budget": (0, 0.3, "{:.0%} of rollouts were cut at the token budget: raise --max_response"),
    "cut_turns": (0, 0.3, "{:.0%} of rollouts ran out of turns: raise --max_turns"),
    # The outcome advantage of a group that agrees is 0.
    "groups_agree": (0, 0.9, "{:.0%} of groups agree, so GRPO learns nothing from them: raise "
                     "--group_size, or take problems that are sometimes solved"),
    # A cap that is met so often has become the weight.
    "w_capped": (0, 0.4, "w is at its cap in {:.0%} of steps: raise --delta to tell them apart"),
    # Their later w_k are near 0, whatever the student does.
    "d1_near_0": (0, 0.3, "d_1 is near 0 in {:.0%} of rollouts: distillation is off after their "
                  "first step; compare --weights floor"),
    # Where a third of the calls fail, many turns teach little.
    "tool_fail": (0, 0.3, "{:.0%} of tool calls fail: see the outcomes in metrics.jsonl"),
    "tool_calls": (0.1, math.inf, "the tool is called {:.2f} times a rollout: say in --system how, "
                   "or imitate first: --method sft"),
    # The student has left what was sampled.
    "clipped": (0, 0.2, "{:.0%} of tokens left the clip range: lower --lr or --updates"),
    # At .1 nats one token in fifty is open; the paper's lost teacher has 2.4 nats.
    "entropy": (0.1, math.inf, "entropy fell to {:.2f} nats: the student has stopped exploring; "
                "lower --lr, or raise --temperature"),
    "teacher_entropy": (0, 2.0, "the teacher is lost, its entropy is {:.1f} nats: does it know "
                        "this system text and tool?"),
    "not_taken": (0, 0, "{:.0f} updates were not taken, for a score, the loss or the gradient was "
                  "not finite: lower --lr, or try --dtype float32"),
    "grader_errors": (0, 0, "the grader broke down on {:.0f} answers, which count as wrong: see "
                      "their reason in rollouts.jsonl"),
    "infrastructure": (0, 0, "the sandbox failed in {:.0f} rollouts, which are left out: see "
                       "`python tools.py`, and whether the machine has memory left"),
}


def health(history):
    """{metric: sentence} of what deserves a word, from the numbers of all iterations so far."""
    m = history[-1] if history else {}
    said = {name: sentence.format(m[name]) for name, (low, high, sentence) in HEALTH.items()
            if m.get(name, low) < low or m.get(name, high) > high}
    right = [m["right"] for m in history[-WINDOW:] if "right" in m]
    if len(right) == WINDOW and max(right) == 0:
        said["right"] = (f"no rollout was right for {WINDOW} iterations: take easier problems, "
                         "imitate first (--method sft), or check the answers in the data")
    calls = [m["tool_calls"] for m in history[-WINDOW:] if "tool_calls" in m]
    if calls and calls[-1] < max(calls) / 2:  # others saw success follow, and never come back
        said["calls"] = (f"tool calls a rollout fell from {max(calls):.1f} to {calls[-1]:.1f} in "
                         f"{WINDOW} iterations: stop, and read in rollouts.jsonl what the student "
                         "writes and the tool answers; then lower --lr")
    return said


def news(history):
    """The sentences about the last iteration, but for what was said of the one before, too."""
    before = health(history[:-1])
    return [sentence for name, sentence in health(history).items() if name not in before]


# --- Evaluation -------------------------------------------------------------------------------


def evaluate(agent, model, problems):
    """Sample every problem `eval_samples` times: a (problems, samples) array of right or wrong.
    Seeds and silences of the tool are the same for every model."""
    config = agent.config
    prompts, _ = fitting_prompts(problems, agent.tokenizer, config)
    repeated = [prompt for prompt in prompts for _ in range(config.eval_samples)]
    with together():
        rollouts = sample_rollouts(agent, model, repeated[RANK::RANKS],
                                   (config.seed, "evaluation", 0),
                                   range(RANK, len(repeated), RANKS),
                                   config.eval_temperature, config.eval_top_p)
    agent.seconds.clear()  # training has its own clock
    check_sandbox(rollouts)
    seen, right = told_by_ranks([(r.right, r.finish) for r in rollouts]), [None] * len(repeated)
    for rank, samples in enumerate(seen):
        right[rank::RANKS] = samples
    if lost := sum(finish == "infrastructure" for _, finish in right):
        print(f"NOTE: the sandbox failed in {lost} of {len(right)} samples, counted as wrong")
    return np.array([r for r, _ in right]).reshape(len(prompts), config.eval_samples)


def average_with_interval(correct):
    """average@k in percent with its 95% interval over problems.

    correct  (problems, k) of 0 and 1; the samples of one problem stay together, for they are alike
    returns  mean, low, high: at each end the farthest of three intervals. Student's; Wilson's with
             the same spread, for few easy problems among many hard ones; and what P problems say at
             least: a mean m shows P zeros with a chance of at most (1 - m)^P
    """
    scores = np.asarray(correct, float).mean(1)
    P, m = len(scores), scores.mean()
    least = 1 - 0.025 ** (1 / P)
    error = t_975(P - 1) * scores.std(ddof=1) / math.sqrt(P) if P > 1 else float(0 < m < 1)
    q = error ** 2 / (m * (1 - m)) if error else 0.0  # Wilson's z^2 / n
    centre, half = (m + q / 2) / (1 + q), math.sqrt(error ** 2 + q ** 2 / 4) / (1 + q)
    low = max(min(m - error, centre - half, 1 - least), 0.0)
    high = min(max(m + error, centre + half, least), 1.0)
    return 100 * m, 100 * low, 100 * high


@functools.lru_cache
def t_975(freedom):
    """The 97.5% quantile of Student's t: where its density, summed from 0, reaches .475.

    >>> round(t_975(4), 3)
    2.776
    """
    t = np.linspace(0, 13, 130_001)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    density = math.exp(log_scale) / math.sqrt(freedom * math.pi) * (
        1 + t * t / freedom) ** (-(freedom + 1) / 2)
    area = np.cumsum((density[1:] + density[:-1]) / 2) * t[1]
    return float(np.interp(0.475, area, t[1:]))


# --- Loading: what can be known in seconds is known before the weights --------------------------

GIB = 2 ** 30


def preflight(config):
    """An Agent without its models' weights, or one sentence that says why this run cannot work."""
    device, dtype = choose_device(config)
    print(f"device  {device}, {str(dtype).removeprefix('torch.')}; seed {config.seed}")
    tokenizer = load_tokenizer(config.student, config.thinking)
    student = skeleton(config.student)
    check_model(config.student, student, tokenizer, config)
    view, teacher, notes = METHODS[config.method].view, None, []
    if view == "teacher":
        other = load_tokenizer(config.teacher, config.thinking)
        teacher = skeleton(config.teacher)
        check_model(config.teacher, teacher, tokenizer, config)
        notes = [check_pair(student, teacher, tokenizer, other, config)]
    elif view:  # self-distillation: the frozen start, told more
        teacher = student
    if config.rollout_engine == "slots":
        for model in [student] + [teacher] * (view == "teacher" and bool(config.eval_data)):
            check_slots(model)
    print("rollouts  " + how_sampled(tokenizer, config, config.temperature, 1.0))
    if config.eval_data:
        print("evaluation  " + how_sampled(tokenizer, config, config.eval_temperature,
                                           config.eval_top_p))
    agent = Agent(config, None, None, tokenizer, None)
    agent.practice = load_practice(tokenizer, config)
    agent.held_out = eval_problems(tokenizer, config)
    note_shared_problems(agent)
    agent.tool, milliseconds = load_tool(config)
    notes += [f"{len(agent.practice):,} rows to learn from",
              f"tool answers in {milliseconds:.0f} ms",
              check_memory(config, student, teacher, device, dtype)]
    print("preflight  " + ", ".join(notes))
    return agent


def load_agent(config):
    """Student, teacher, tool and data, after a preflight."""
    agent, (device, dtype) = preflight(config), choose_device(config)
    torch.manual_seed(config.seed)  # of --init random
    if config.threads:  # the embedded model is too small to share; the tool takes the other cores
        torch.set_num_threads(config.threads)
    agent.student = load_model(config.student, device, dtype, config.init)
    describe("student", config.student, agent.student, config.init == "pretrained", agent)
    if config.gradient_checkpointing:
        enable_checkpointing(agent.student)
    view = METHODS[config.method].view
    if view:
        agent.teacher = (load_model(config.teacher, device, dtype) if view == "teacher" else
                         copy.deepcopy(agent.student).eval())
        agent.teacher.requires_grad_(False)
        name = config.teacher if view == "teacher" else f"the student's start, told the {view}"
        describe("teacher", name, agent.teacher,
                 view == "teacher" or config.init == "pretrained", agent)
        agent.teacher.to(device if config.offload == "none" else "cpu")
    return agent


def choose_device(config):
    """(device, dtype): bf16 has half the memory and full speed on a GPU, and neither on a CPU."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used ({str(error).splitlines()[0]:.80}); use "
                         "--device cpu, or cuda where torch sees a GPU") from None
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, default if config.dtype == "auto" else getattr(torch, config.dtype)


def load_pretrained(read, path, **options):
    """read(path), such as from_pretrained, with one sentence in place of its traceback."""
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path))
    if not os.path.isdir(path) and (os.path.exists(path) or not is_hub_id):
        raise ValueError(f"there is no folder {path!r}; name a folder that holds a model, "
                         "or a Hub id such as Qwen/Qwen3-0.6B")
    try:  # without the last option, transformers asks on the terminal, or runs the folder's code
        return read(path, **options, trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen kinds for files it cannot use
        first = (str(error).strip() or repr(error)).splitlines()[0].rstrip(":.")
        raise ValueError(f"cannot load {path}: {first}; a folder must hold config, weights and "
                         "tokenizer, and no code of its own; a Hub id needs a machine that can "
                         "reach the Hub") from error


def skeleton(path, dtype=None, device="meta"):
    """A model without its weights: on the meta device at once, whatever its size."""
    def read(path, **options):
        with torch.device(device):
            return AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(path, **options), dtype=dtype, **options)
    return load_pretrained(read, path)


def load_model(path, device, dtype, init="pretrained"):
    """A causal language model whose shipped sampling settings cannot reach our rollouts."""
    if init == "random":
        model = skeleton(path, dtype, "cpu")  # with random numbers
    else:
        model, read = load_pretrained(AutoModelForCausalLM.from_pretrained, path, dtype=dtype,
                                      output_loading_info=True, ignore_mismatched_sizes=True)
        # transformers fills what a file lacks with random numbers, and only warns.
        other_size = {name for name, *_ in read["mismatched_keys"]}
        if wrong := read["missing_keys"] | read["unexpected_keys"] | other_size:
            raise ValueError(f"weights and config of {path} differ in {len(wrong)} tensors, such "
                             f"as {min(wrong)}; load the folder again")
    # generate() fills what we leave open from model.generation_config: Qwen3 ships temperature .6,
    # top-k 20 and top-p .95. Of these we keep the ids that end a turn.
    model.shipped_generation = model.generation_config
    model.generation_config = GenerationConfig()
    return model.to(device).eval()


def enable_checkpointing(model):
    """Recompute activations in backward; transformers 5.17 knows only the older name."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


@torch.no_grad()
def describe(role, name, model, pretrained, agent):
    """Print what was loaded, once its logits have proved to be hidden @ head^T, which is what we
    compute, and a plain tool call in its own template likelier than chance."""
    batch = collate([encode_demonstration(agent.tokenizer, *EXAMPLE)], model.device)
    logp, _ = sampled_logprobs(model, batch.ids, batch.step_id, 1.0)
    own = model(input_ids=batch.ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    own = own.gather(2, batch.ids[:, 1:, None])[batch.step_id[:, 1:] >= 0][:, 0]
    ours = logp[batch.step_id >= 0]
    if (own - ours).abs().mean() > (0.002 if model.dtype == torch.float32 else 0.1):
        raise ValueError(f"{name} does more to its logits than hidden states times head (a cap, a "
                         "scale or a bias), so its tokens would be scored wrongly; use Qwen3, "
                         "Qwen2, Llama or another model with a plain head")
    mean, chance = float(ours.mean()), -math.log(len(head(model)))
    if pretrained and not mean > 0.9 * chance and agent.config.preflight:  # NaN too
        raise ValueError(f"{name} gives a plain tool call in its own template {mean:.2f} nats a "
                         f"token, and chance is {chance:.2f}: its weights are random, damaged or "
                         "for another tokenizer; load them again, or use --init random or "
                         "--preflight false")
    least = agent.tokenizer.decode(batch.ids[batch.step_id >= 0][ours.argmin()])
    print(f"{role} {name}, {count_weights(model):,} parameters; {mean:.2f} nats a token of a plain "
          f"tool call, the least {float(ours.min()):.2f} for {least!r}; chance {chance:.2f}")


EXAMPLE = (tools.Problem("Start with 12. Add 30.", "42"), [
    {"role": "assistant", "content": tools.render_tool_call("print(12 + 30)")},
    {"role": "tool", "content": "42"}, {"role": "assistant", "content": "\\boxed{42}"}])
PROBES = [
    "Solve 12 + 3045 = ?\n\t1,024.50", "naïve 東京 🙂 e\u0301", "  print( 'x' )\r\n\n",
    "\\boxed{\\frac{1}{2}}", "<think>\n\n</think>",
    '<tool_call>\n{"a": 1}\n</tool_call><tool_response></tool_response>',
    "<|im_start|>user<|im_end|><|endoftext|>"]


def load_tokenizer(path, thinking=False):
    """The tokenizer, checked for what a conversation with a tool needs. Where its template has a
    thinking mode, which Qwen3's turns on unless it is told, `thinking` becomes its default."""
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, path)
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} has no chat template or no end-of-turn token; "
                         "use a chat model such as Qwen/Qwen3-0.6B")
    template = tokenizer.get_chat_template(tools=[tools.TOOL_SCHEMA])
    if thinking and "enable_thinking" not in template:
        raise ValueError(f"the chat template of {path} has no thinking mode; use --thinking false")
    if "enable_thinking" in template:  # a save of ours has such a line already: take it out
        template = re.sub(r"^{%- set enable_thinking = .*?%}", "", template)
        default = "true" if thinking else "false"
        tokenizer.chat_template = ("{%- set enable_thinking = enable_thinking | default("
                                   f"{default}) %}}{template}")
    probe = "the text of a tool"
    try:
        shown = tokenizer.decode(encode_prompt(tokenizer, EXAMPLE[0])
                                 + encode_tool_turn(tokenizer, probe))
        after = render_tool_turn(tokenizer, probe)
    except Exception as error:  # a template may raise anything
        shown, after = f"an error ({error})", tokenizer.eos_token
    if tools.TOOL_NAME not in shown or probe not in shown:
        raise ValueError(f"the chat template of {path} does not show a tool or its answers: it "
                         f"gave {shown!r}; use a model whose template knows tools")
    if not after.startswith(tokenizer.eos_token):
        raise ValueError(f"the chat template of {path} ends a turn with {after[:12]!r} and its "
                         f"tokenizer with {tokenizer.eos_token!r}: set eos_token in "
                         "tokenizer_config.json to what the template writes")
    return tokenizer


def how_sampled(tokenizer, config, temperature, top_p):
    """What a success depends on besides the model, as a line for the screen."""
    shown = tokenizer.decode(encode_prompt(tokenizer, EXAMPLE[0]))
    marks = "|".join(map(re.escape, tokenizer.get_added_vocab()))
    roles = re.findall(f"(?:{marks})(system|developer|user)",
                       shown[:shown.index(tools.TOOL_NAME)])
    return (f"temperature {temperature}, top-p {top_p}, no top-k; at most {config.max_turns} turns "
            f"and {config.max_response:,} tokens; thinking {'on' if config.thinking else 'off'}; "
            f"system text {config.system!r}; tool schema in the {(roles or ['first'])[-1]} turn")


def check_model(path, model, tokenizer, config):
    """Each id that the tokenizer can write needs a row, each position of a rollout a place."""
    rows, largest = len(head(model)), max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(f"the tokenizer writes ids up to {largest} and {path} has {rows} "
                         "vocabulary rows; use the tokenizer that the model was trained with")
    window = getattr(model.config, "max_position_embeddings", None) or math.inf
    if config.max_prompt + config.max_response > window:
        raise ValueError(f"{path} reads {window} tokens; max_prompt {config.max_prompt} and "
                         f"max_response {config.max_response} are more: lower one of them")


def check_pair(student, teacher, tokenizer_s, tokenizer_t, config):
    """Refuse two sides that write different ids for one text; returns what was found."""
    for text in PROBES:
        if encode(tokenizer_s, text) != encode(tokenizer_t, text):
            raise ValueError(f"{config.student} and {config.teacher} give different ids for "
                             f"{text!r}, and SOD compares log-probabilities id by id; use two "
                             "models of one family")
    rows_s, rows_t = len(head(student)), len(head(teacher))
    if config.kl == "full" and rows_s != rows_t:
        raise ValueError(f"student and teacher have {rows_s} and {rows_t} vocabulary rows; "
                         "--kl full compares row by row, so use --kl sampled")
    same = f"same ids on {len(PROBES)} probes"
    if len({tuple(encode_demonstration(t, *EXAMPLE).ids) for t in (tokenizer_s, tokenizer_t)}) > 1:
        return f"{same}, NOTE: the teacher has another template, and scores the student's"
    return f"{same}, same template"


def check_memory(config, student, teacher, device, dtype):
    """Weights, moments, gradient and masters against what is free. Activations and caches come on
    top; they shrink by themselves (see `phase`)."""
    N, M = count_weights(student), count_weights(teacher) if teacher is not None else 0
    need, free = dtype.itemsize * (N + M) / GIB, free_memory(device) / GIB
    if config.method != "vanilla" and config.offload != "all":
        need += (12 * N + 4 * N * (dtype != torch.float32)) / GIB  # fp32: its own master
    if need > free and config.preflight:
        raise ValueError(f"models, optimiser and gradient take {need:.3f} GiB, and {free:.3f} are "
                         f"free on {device}; choose smaller models, try --offload all, or go on "
                         "all the same: --preflight false")
    return f"{need:.3f} GiB on {device} for weights, AdamW and gradient"


def count_weights(model):
    return sum(p.numel() for p in model.parameters())


def free_memory(device):
    """Bytes a run could take: of the GPU, else of this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])


def load_practice(tokenizer, config):
    """What the student learns from: [(Problem, prompt ids), ...], or for sft [Rollout, ...]."""
    if config.method == "vanilla":
        return []
    if config.method == "sft":
        rows = [encode_demonstration(tokenizer, problem, turns, config.system)
                for problem, turns in tools.load_demonstrations(config.demonstrations)]
        pairs, skipped = fitting([(row, row.ids) for row in rows],
                                 config.max_prompt + config.max_response)
        kept = [row for row, _ in pairs]
    else:
        problems = tools.load_problems(config.train_data)
        view = METHODS[config.method].view
        if view in ("answer", "hint") and not all(getattr(p, view) for p in problems):
            raise ValueError(f"{config.train_data} has problems without {view}; method "
                             f"{config.method} needs one in every row")
        kept, skipped = fitting_prompts(problems, tokenizer, config)
    if skipped:
        print(f"{skipped} problems or demonstrations are too long and skipped: max_prompt "
              f"{config.max_prompt}, max_response {config.max_response}")
    return kept


def fitting_prompts(problems, tokenizer, config):
    """[(Problem, ids)] of the problems whose prompt fits the budget, and how many do not."""
    return fitting([(p, encode_prompt(tokenizer, p, config.system)) for p in problems],
                   config.max_prompt)


def fitting(rows, limit):
    """The rows [(item, ids), ...] of at most `limit` ids, and how many others there are."""
    kept = [(item, ids) for item, ids in rows if len(ids) <= limit]
    if not kept:
        raise ValueError(f"all {len(rows)} rows are longer than {limit} tokens (the shortest has "
                         f"{min(len(ids) for _, ids in rows)}); raise --max_prompt")
    return kept, len(rows) - len(kept)


def load_tool(config):
    """The sandbox, which refuses to start where it cannot contain a program, and the milliseconds
    that a call takes."""
    modules = tuple(filter(None, config.tool_modules.split(",")))
    for name in modules:
        if not name.isidentifier() or importlib.util.find_spec(name) is None:
            raise ValueError(f"tool_modules names {name!r}, which is not installed; pip install "
                             "it, or leave it out of --tool_modules")
    options = dict(timeout=config.tool_timeout, max_chars=config.tool_chars, modules=modules,
                   unsafe=config.tool_unsafe)
    tool = (tools.SilentTool(config.silent_rate, config.silent_persist, **options)
            if config.silent_rate else tools.PythonTool(**options))
    try:
        _, seen = [tool.run(["print(1 + 1)"])[0] for _ in range(2)]  # the first call starts it
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    if seen.text.strip() != "2":
        raise ValueError(f"the tool answers {seen.text.strip()!r} ({seen.outcome}) to "
                         "print(1 + 1), not 2; see what `python tools.py` says, or raise "
                         "--tool_timeout")
    return tool, 1000 * seen.seconds


# --- Files ------------------------------------------------------------------------------------

LOGS = ("metrics.jsonl", "clock.jsonl", "rollouts.jsonl")  # they grow by lines each iteration
VERSIONS = {"sod-mini": "0.2", "torch": torch.__version__, "transformers": transformers.__version__}


def open_run_folder(config):
    """runs/NAME, new and writable with the settings in it, or one to go on with."""
    name = config.name or f"{config.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.resume or Path(config.out) / name)
    try:
        folder.mkdir(parents=True, exist_ok=bool(config.resume))
        if not config.resume:
            write_config(config, folder)
    except FileExistsError:
        raise ValueError(f"{folder} exists already; give this run another --name, or go on with "
                         f"that one: --resume {folder}") from None
    if (folder / "checkpoint").exists() and not (folder / "saves").exists():
        raise ValueError(f"{folder} is finished; to train its result further, start a run with "
                         f"--student {folder / 'checkpoint'}")
    return folder


def settings(config):
    """What a run was made with, as JSON can hold it; whether it was resumed makes no difference."""
    return {**{k: v for k, v in asdict(config).items() if k != "resume"}, "versions": VERSIONS}


def write_config(config, folder):
    tools.write_whole(folder / "config.json", json.dumps(settings(config), indent=1) + "\n")


def resumed_config(given):
    """The settings of an interrupted run, and what `given`, the options of the command line with
    "resume" among them, changes in them."""
    folder = Path(given["resume"])
    if not (folder / "config.json").exists():  # the name of a run
        folder = Path(given.get("out", Config.out)) / folder
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        before = Config(**{name: stored[name] for name in stored.keys() - {"versions"}})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} holds no run that can be resumed ({error}); name its folder, "
                         "such as runs/NAME") from None
    for name, value in given.items():
        if name != "resume" and getattr(before, name) != value:
            print(f"changed: {name} {value!r}, was {getattr(before, name)!r}")
    return Config(**{**asdict(before), **given, "resume": str(folder)})


def write_iteration(agent, m, batch, folder):
    """The numbers and rollouts of an iteration, as lines of the logs. What the machine did goes to
    a file of its own, so that the others depend on the seed alone."""
    clock = {k: v for k, v in m.items() if k.startswith(MACHINE)}
    rows = ([{k: plain(v) for k, v in m.items() if k not in clock}],
            [{"iteration": m["iteration"], **clock}],
            list(rollout_rows(batch, m["iteration"], agent.tokenizer, agent.config.store_tokens))
            if batch else [])
    with tools.writing(folder):
        for name, new in zip(LOGS, rows):
            tools.append_rows(folder / name, new)


def plain(value, digits=None):
    """A value or list as JSON can hold it: it knows neither NaN nor infinity, they become null."""
    if isinstance(value, list):
        return [plain(v, digits) for v in value]
    if not isinstance(value, float) or digits is None and math.isfinite(value):
        return value
    return round(value, digits) + 0.0 if math.isfinite(value) else None  # + 0.0: no -0.0


def rollout_rows(batch, iteration, tokenizer, with_tokens):
    """A batch as JSON-ready dicts, one a rollout; d, w and the teacher's entropy (nats a token) of a
    step are null without a teacher. The first `with_tokens` rollouts also have the tokens of each
    step (token_row)."""
    entropy_t = step_entropy(batch)
    for i, r in enumerate(batch.rollouts):
        d, w, h = ([None] * len(r.turns) if x is None else plain(x[i].tolist(), 4)
                   for x in (batch.d, batch.w, entropy_t))
        turns = [{"text": turn.text, "outcome": turn.outcome,
                  "d": d[k], "w": w[k], "entropy_t": h[k],
                  "tool": turn.answer if turn.outcome not in ("", "not_run") else None}
                 | (token_row(batch, i, k, tokenizer) if i < with_tokens else {})
                 for k, turn in enumerate(r.turns)]
        yield {"iteration": iteration, "question": r.problem.question, "truth": r.problem.answer,
               "right": r.right, "reason": r.reason, "reward": round(r.reward, 4),
               "advantage": round(float(batch.A[i]), 4), "finish": r.finish, "turns": turns}


def step_entropy(batch):
    """(B, K) the teacher's mean entropy at each step, nats a token; None without a teacher."""
    if batch.entropy_t is None:
        return None
    tokens = step_tokens(batch.step_id, batch.d.shape[1])
    return step_sums(batch.entropy_t, batch.step_id, batch.d.shape[1]) / tokens.clamp(min=1)


def token_row(batch, i, k, tokenizer):
    """The tokens of step k of rollout i, log-probabilities and advantages to three decimals."""
    step = batch.step_id[i] == k  # (T,)
    row = {"tokens": [tokenizer.decode([token]) for token in batch.ids[i, step].tolist()]}
    for name, values in (("logp_s", batch.logp_s), ("logp_t", batch.logp_t),
                         ("token_advantages", batch.advantages)):
        if values is not None:
            row[name] = plain(values[i, step].tolist(), 3)
    return row


def save_checkpoint(agent, folder, results={}):
    """The trained student and its card, as folder/checkpoint."""
    with tools.writing(folder), tools.whole_folder(folder / "checkpoint") as aside:
        write_model(agent, aside, results)


def write_model(agent, folder, results):
    """Fill a folder that AutoModelForCausalLM.from_pretrained and HF-compatible servers load."""
    agent.student.save_pretrained(folder)
    # A server samples as this file says. The base model's settings are not those the student is
    # measured with: Qwen2.5-Coder's repetition penalty of 1.1 spoils the copying of numbers.
    shipped, config = agent.student.shipped_generation, agent.config
    GenerationConfig(eos_token_id=shipped.eos_token_id, pad_token_id=shipped.pad_token_id,
                     do_sample=True, temperature=config.eval_temperature, top_p=config.eval_top_p,
                     top_k=0).save_pretrained(folder)
    agent.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(agent.config, results), encoding="utf-8")


def save_run(agent, folder):
    """Save all that the rest of the run depends on: a model folder, with the state of the optimiser
    beside the weights. The newest two saves are kept."""
    save = folder / "saves" / f"iteration-{agent.iteration}"
    if told_by_ranks(save.exists())[0]:
        return
    if RANKS > 1:
        exchange(agent.optimizer.adamw.consolidate_state_dict)
    if RANK:
        return
    with tools.writing(folder), tools.whole_folder(save) as aside:
        write_config(agent.config, folder)  # with the sizes that have been halved
        write_model(agent, aside, {})
        torch.save({"iteration": agent.iteration, "optimizer": agent.optimizer.state_dict(),
                    "lengths": {name: (folder / name).stat().st_size for name in LOGS
                                if (folder / name).exists()}}, aside / "state.pt")
    for old in tools.numbered(folder / "saves")[:-2]:
        tools.remove(old)


def restore(agent, folder):
    """Take over the newest save, and cut the logs back to where they were at the time."""
    saves, state = tools.numbered(folder / "saves"), {}
    try:
        if saves:
            state = torch.load(saves[-1] / "state.pt", map_location="cpu", weights_only=True)
            saved = load_model(saves[-1], "cpu", agent.student.dtype)
            agent.student.load_state_dict(saved.state_dict())
            agent.optimizer = make_optimizer(agent)
            agent.optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise ValueError(f"{saves[-1]} cannot be taken over ({repr(error):.200}); resume with the "
                         "--student, --dtype and --offload that it began with, or remove that "
                         "folder to go on from the save before it") from error
    agent.iteration = state.get("iteration", 0)
    for name in LOGS if RANK == 0 else ():
        if note := tools.cut_back(folder / name, state.get("lengths", {}).get(name, 0)):
            print(note)
    if RANK == 0:
        write_config(agent.config, folder)
    print(f"resumed {folder} after iteration {agent.iteration}")


def model_card(config, results):
    """What the checkpoint is, how it was trained and measured: Hub metadata and markdown."""
    measured = (f"average@{config.eval_samples} on `{config.eval_data}`, 95% interval over "
                f"problems:\n\n{results_table(results)}") if results else "Not evaluated."
    return f"""---
base_model: {config.student}
library_name: transformers
pipeline_tag: text-generation
tags: [sod, on-policy-distillation, tool-use]
---

{config.student} trained with sod-mini, method `{config.method}`, to solve problems in several turns
with a Python tool (Hermes tool calls, one tool named `code_interpreter`). Its licence is that of
{config.student}.

{measured}

Settings: {json.dumps(settings(config))}
"""


# --- The command ------------------------------------------------------------------------------


def results_table(results):
    """{name: (problems, k) array} as a markdown table of average@k with its interval."""
    lines = ["| model | average@k | 95% interval |", "|---|---|---|"]
    for name, correct in results.items():
        mean, low, high = average_with_interval(correct)
        lines.append(f"| {name} | {mean:.1f}% | {low:.1f} to {high:.1f} |")
    return "\n".join(lines)


SHOWN = {"reward": "reward {:+.2f}", "right": "right {:.0%}", "reverse_kl": "kl {:.2f}",
         "d": "d {:.2f}", "w": "w {:.2f}", "tool_fail": "tool fail {:.0%}",
         "cut_budget": "cut {:.0%}", "tokens": "{:,} tokens", "loss": "loss {:.3f} nats",
         "grad_norm": "grad {:.2f}"}


def progress_line(m, config):
    """One dense line an iteration: the numbers that its method has."""
    parts = [f"iteration {m['iteration']}/{m.get('iterations', config.iterations)}"]
    parts += [text.format(m[name]) for name, text in SHOWN.items() if name in m]
    parts.append(f"{sum(v for name, v in m.items() if name.startswith('seconds')):.1f} s")
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.max_memory_allocated() / GIB:.1f} GiB")
    if m["tool_retries"]:
        parts.append(f"{m['tool_retries']} tool calls tried again so far")
    if m["out_of_memory"]:
        parts.append(f"{m['out_of_memory']} times out of memory so far: rollout_batch "
                     f"{m['rollout_batch']}, micro_batch_tokens {m['micro_batch_tokens']}")
    return " | ".join(parts)


def show_rollout(batch):
    """A rollout with d and w beside each turn: if there is one, that recovered from a failure."""
    i = max(range(len(batch.rollouts)), key=lambda i: (
        any(turn.failed for turn in batch.rollouts[i].turns), batch.rollouts[i].right))
    r = batch.rollouts[i]
    lines = [f"    {r.problem.question}  [truth {r.problem.answer}, reward {r.reward:+.1f}]"]
    for k, turn in enumerate(r.turns):
        call = tools.parse_tool_call(turn.text)
        said = call.code if call and call.code else turn.text
        came = (turn.answer or r.finish).strip().rpartition("\n")[2]
        trust = "" if batch.d is None else f"d {batch.d[i, k]:.2f}  w {batch.w[i, k]:.2f}  "
        lines.append(f"    turn {k + 1}  {trust}{said.strip()[:60]!r} -> {came[:50]}")
    return "\n".join(lines)


def as_bool(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def add_options(parser, kind, words):
    """An option for each field of a dataclass; its comment in the source is the help.

    words  {field: [allowed, ...]} for those that take one of a few
    """
    source = "".join(inspect.getsource(cls) for cls in kind.__mro__[:-1])
    for name, comment in re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", source, re.M):
        f = kind.__dataclass_fields__[name]
        parser.add_argument(f"--{name}", type=as_bool if f.type is bool else f.type,
                            default=argparse.SUPPRESS,
                            metavar=" | ".join(words.get(name, [f.type.__name__])),
                            help=f"{comment} [{f.default}]".replace("%", "%%"))
    parser.add_argument("--version", action="version", version=", ".join(
        f"{name} {number}" for name, number in VERSIONS.items()))


def parse_config(argv=None):
    """Config from defaults, a preset and the command line, in this order; (config, preset)."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        usage="python sod_mini.py [--preset NAME] [--OPTION VALUE ...]    (--help lists them)",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=100))
    parser.add_argument("--preset", choices=PRESETS, help="set of values to start from; default: "
                        "world, or gpu (one GPU, untried) where data of your own are named")
    add_options(parser, Config, choices())
    given = vars(parser.parse_args(argv))
    data = [given[k] for k in ("train_data", "eval_data", "demonstrations") if given.get(k)]
    embedded = all(Path(os.path.realpath(d)).is_relative_to(Path(WORLD).resolve()) for d in data)
    preset = given.pop("preset", None)
    try:
        if given.get("resume"):
            return resumed_config({**PRESETS[preset or "world"], **given}), preset or "as before"
        preset = preset or ("world" if embedded else "gpu")
        return Config(**{**PRESETS[preset], **given}), preset
    except ValueError as error:
        parser.error(str(error))


def run(config, preset):
    """Load, measure, train, measure again, save, and say what came of it."""
    transformers.utils.logging.disable_progress_bar()
    start_ranks()
    with together():
        folder = open_run_folder(config) if RANK == 0 else None
    folder = told_by_ranks(folder)[0]
    with tools.locked(folder) if RANK == 0 else nullcontext():
        print(f"preset  {preset}; " + ", ".join(f"{k} {v}" for k, v in VERSIONS.items()))
        try:
            with together():
                agent = load_agent(config)
                if config.resume:
                    restore(agent, folder)
        except BaseException:
            if not config.resume:  # nothing has been made yet, so nothing is left behind
                shutil.rmtree(folder, ignore_errors=True)
            raise
        try:
            measure_and_train(agent, folder)
        except BaseException:
            if folder.exists() and RANK == 0:
                print(f"to go on: python sod_mini.py --resume {folder}", file=sys.stderr)
            raise
    if RANKS > 1:
        dist.destroy_process_group()


def measure_and_train(agent, folder):
    """The run itself, from wherever it stands."""
    config, file = agent.config, folder / "results.json"
    stored = json.loads(file.read_text()) if file.exists() else {}
    asked = (len(agent.held_out), config.eval_samples)  # a resumed run may ask for others
    results = {name: np.array(correct, float) for name, correct in stored.items()
               if np.shape(correct) == asked}

    def measure(name, model):
        if agent.held_out and name not in results:
            results[name] = evaluate(agent, model, agent.held_out)
            if RANK == 0:
                with tools.writing(folder):
                    tools.write_whole(file, json.dumps({k: v.tolist() for k, v in results.items()}))

    if agent.iteration == 0:
        measure("student before", agent.student)
    if config.method != "vanilla":
        train_to_files(agent, folder)
        measure("student after", agent.student)
        if METHODS[config.method].view == "teacher":
            with visiting(agent.teacher, agent.student.device):
                measure("teacher", agent.teacher)
        if RANK == 0:
            save_checkpoint(agent, folder, results)
            tools.remove(folder / "saves")
            print(f"checkpoint {folder / 'checkpoint'}")
            write_page(folder)
    if results:
        print(f"\naverage@{config.eval_samples} on {len(agent.held_out)} problems of "
              f"{config.eval_data}\n" + results_table(results))


def write_page(folder):
    """Have evaluate.py write the page of a run, in a process of its own: it imports this file."""
    script = Path(__file__).with_name("evaluate.py")
    subprocess.run([sys.executable, script, "--page", folder])


def train_to_files(agent, folder):
    """Run the training loop: lines to the screen, numbers and rollouts to files, saves. A signal is
    obeyed at once, but for the middle of updates: there the iteration ends first."""
    config, history = agent.config, []
    done = lambda: (agent.iteration, agent.optimizer.updates if agent.optimizer else 0)
    written = done()
    settled = lambda: done() == written
    try:
        with tools.stoppable(lambda: settled() and together.alone) as asked:
            for m, batch in tqdm(train(agent), initial=agent.iteration, unit="iteration",
                                 desc=config.method,  # no bar where nobody watches
                                 disable=True if RANK else None):
                if RANK == 0:
                    write_iteration(agent, m, batch, folder)
                written = done()
                if any(told_by_ranks(bool(asked))):
                    raise KeyboardInterrupt(*asked[:1])
                history.append(m)
                if RANK == 0:
                    show_iteration(m, batch, history, config)
                stop_if_refused(history)
                if config.save_every and agent.iteration % config.save_every == 0:
                    save_run(agent, folder)
        save_run(agent, folder)
    except tools.WriteError:
        raise
    except BaseException:  # Ctrl-C or an error; in the middle of an update nothing can be saved
        if agent.iteration and settled():
            save_run(agent, folder)
            if RANK == 0:
                print(f"saved {folder / 'saves' / f'iteration-{agent.iteration}'}", file=sys.stderr)
        raise


def show_iteration(m, batch, history, config):
    """Write to the screen: the line of an iteration, health, now and then a rollout."""
    if batch or m["not_taken"] or m["iteration"] % 20 == 0 or m["iteration"] == m["iterations"]:
        tqdm.write(progress_line(m, config))
    for sentence in news(history):
        tqdm.write(f"    health: {sentence}")
    if batch and config.show_every and (m["iteration"] - 1) % config.show_every == 0:
        tqdm.write(show_rollout(batch))


def stop_if_refused(history, most=3):
    """After so many iterations in a row with updates not taken, no better one will follow."""
    if len(history) >= most and all(m["not_taken"] for m in history[-most:]):
        raise ValueError(f"{most} iterations in a row had updates that could not be taken; resume "
                         "with a lower --lr, or begin anew with --dtype float32")


def eval_problems(tokenizer, config):
    """The held-out problems that fit the prompt budget, at most eval_problems of them."""
    if not config.eval_data:
        return []
    problems = tools.load_problems(config.eval_data)[:config.eval_problems]
    kept, skipped = fitting_prompts(problems, tokenizer, config)
    if skipped:
        print(f"{skipped} held-out prompts are longer than {config.max_prompt} tokens and skipped")
    return [problem for problem, _ in kept]


def note_shared_problems(agent):
    """Say how many problems to measure on are also among those to learn from."""
    learnt = {(item.problem if isinstance(item, Rollout) else item[0]).question
              for item in agent.practice}
    if shared := sum(problem.question in learnt for problem in agent.held_out):
        print(f"NOTE: {shared} of the {len(agent.held_out)} problems to measure on are also among "
              "those to learn from, so the results say little about others")


def prepare_output():
    """Show each line as it comes, and never die of a character or of a closed screen."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None or RANK and name == "stdout":  # rank 0 speaks for all
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(line_buffering=True, errors="backslashreplace")


def ends_with_a_sentence(work, after_a_signal):
    """Run a command, and return its exit status: 0 done, 1 error, 128 and more by a signal."""
    prepare_output()
    try:
        with tools.stoppable(lambda: True):
            return work() or 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads any more
        print("error: the reader of this output has gone, so the command stopped", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print("error: not enough memory for the models; choose smaller ones, or try --offload all",
              file=sys.stderr)
    except KeyboardInterrupt as stop:
        print(f"interrupted; {after_a_signal}", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    return 1


def main(argv=None):
    """The exit status, as above."""
    return ends_with_a_sentence(lambda: run(*parse_config(argv)), "files written so far are whole")


if __name__ == "__main__":
    sys.exit(main())
