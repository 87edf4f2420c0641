"""Step-wise on-policy distillation (SOD, arXiv 2605.07725) for small tool-using language models.

    python sod_mini.py                          the whole method on the embedded world, on a CPU
    python sod_mini.py --method grpo --lr 1e-4  every line of Config below is an option
    python sod_mini.py --student Qwen/Qwen3-0.6B --teacher youngzhong/SOD-GRPO_teacher-4B \\
                       --train_data gsm8k.jsonl

A student solves problems in several turns with a Python tool. A teacher scores every token that
the student sampled. Where the student has drifted from the teacher, the teacher is trusted less.

Notation (code: paper)
    logp_s, logp_t   log pi_theta, log pi_teacher of the sampled token      nats
    A                outcome advantage of a rollout within its group       none
    d[k], w[k]       divergence (Eq. 6) and weight (Eq. 7) of step k        nats/token, none
    step k           one assistant turn: the tokens sampled between two tool answers. A training
                     step is one batch of rollouts, an optimiser step one move of the weights
    step_id          k = 0..K-1 for a token of step k, -1 for every token the student did not write
    B, T, K, V, D    rollouts, tokens, steps, vocabulary, width             sizes
"""
import argparse
import copy
import gc
import hashlib
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig,
                          LogitsProcessor)
from transformers.utils import logging as transformers_logging

import tools

WORLD = os.path.relpath(Path(__file__).resolve().parent / "data" / "world")

# --- Settings --------------------------------------------------------------------------------


@dataclass
class Config:
    """Every knob: name, value, reason. Defaults train the embedded student on a CPU in minutes."""
    method: str = "sod"                     # vanilla only measures, sft imitates; see METHODS
    weights: str = "sod"                    # step weights of sod and sod_only: see WEIGHTS
    kl: str = "sampled"                     # sampled: the paper's; full: the exact KL, as a loss
    student: str = f"{WORLD}/student"       # the model we train: a folder or a Hub id
    teacher: str = f"{WORLD}/teacher"       # the model that scores: a folder or a Hub id
    init: str = "pretrained"                # or random: the student's shape without its weights
    train_data: str = f"{WORLD}/train.jsonl"             # problems to practise on
    eval_data: str = f"{WORLD}/heldout.jsonl"            # problems to measure on, "" for none
    demonstrations: str = f"{WORLD}/demonstrations.jsonl"  # conversations to imitate (method sft)
    system: str = ""                        # system message of problems that bring none
    steps: int = 25                         # batches of rollouts to sample and learn from
    prompts_per_step: int = 16              # P: problems in a batch
    group_size: int = 8                     # G: rollouts of each problem
    updates_per_step: int = 2               # optimiser steps that share one batch of rollouts
    max_turns: int = 12                     # assistant turns in a rollout
    max_prompt: int = 128                   # tokens; longer prompts are skipped, and counted
    max_response: int = 384                 # tokens after the prompt, tool answers included
    temperature: float = 1.0                # of rollouts, and of both models when they score
    epsilon: float = 1e-6                   # keeps the ratio of Eq. 7 finite
    delta: float = 0.2                      # w_k <= 1 + delta (Eq. 7)
    decay: float = 0.9                      # factor a step of the weight scheme "decay"
    floor: float = 0.2                      # least d of the weight scheme "floor", nats/token
    opd_coef: float = 1.0                   # distillation against outcome (Eq. 8)
    clip_low: float = 0.2                   # ratio >= 1 - clip_low
    clip_high: float = 0.28                 # ratio <= 1 + clip_high
    clip_dual: float = 3.0                  # bound of the loss, in |A_it|, where A_it < 0
    tool_shaping: bool = True               # wrong answers cost .1 less for each of up to 4 calls
    overlong: int = 64                      # last tokens of the budget: reward falls by up to 1
    lr: float = 5e-4                        # AdamW step size
    warmup: int = 0                         # optimiser steps from 0 to lr; constant afterwards
    beta1: float = 0.9                      # AdamW: memory of the gradient
    beta2: float = 0.999                    # AdamW: memory of its square
    weight_decay: float = 0.01              # AdamW
    grad_clip: float = 1.0                  # largest norm of the gradient
    sft_epochs: int = 3                     # passes over the demonstrations
    sft_batch: int = 32                     # demonstrations an optimiser step
    sft_lr: float = 2e-3                    # peak; 10% warm-up, then a cosine to 0
    tool_timeout: float = 5.0               # CPU seconds a program may take; thrice on the clock
    tool_chars: int = 4096                  # longest tool answer; the cut is marked
    tool_modules: str = ""                  # imported once for all programs, as in numpy,sympy
    tool_unsafe: bool = False               # run programs even where they cannot be contained
    silent_rate: float = 0.1                # chance that the tool stops answering, at each call
    silent_persist: float = 0.5             # chance that a silent tool stays so at the next call
    eval_problems: int = 200                # held-out problems to measure on
    eval_samples: int = 4                   # samples a problem: average@k
    eval_temperature: float = 1.0           # as the paper
    eval_top_p: float = 1.0                 # the paper's .6 would hide this student's unreliability
    device: str = "auto"                    # auto: cuda where there is one, else cpu
    teacher_device: str = "same"            # same as the student's, or another
    dtype: str = "auto"                     # auto: bfloat16 on cuda, float32 on cpu
    offload: str = "none"                   # to the CPU while idle: teacher; all: optimiser too
    threads: int = 1                        # CPU threads of torch; 0: as many as it likes
    rollout_batch: int = 256                # rollouts sampled side by side; 0: as memory allows
    rollout_engine: str = "slots"           # slots: a kept KV cache, Qwen3; generate: HF's, plain
    chunk: int = 24                         # generate: sampled tokens until ended rows leave
    look: int = 8                           # slots: sampled tokens until ended rows are seen to
    tool_wait: float = 60.0                 # slots: seconds a look waits for a slow tool's answer
    micro_batch_tokens: int = 2048          # in a micro-batch, with padding; 0: as memory allows
    gradient_checkpointing: bool = False    # recompute activations in backward: less memory
    preflight: bool = True                  # false: go on though disk, memory or a model look wrong
    seed: int = 0                           # of sampling, data order and tool silence
    out: str = "runs"                       # folder of all outputs
    name: str = ""                          # folder of this run; default: method and time
    show_every: int = 10                    # steps between two rollouts shown, 0 for never
    store_tokens: int = 128                 # rollouts a step whose tokens go to rollouts.jsonl
    page: bool = True                       # write rollouts.html at the end
    max_refused: int = 3                    # steps in a row that could not be taken: then stop
    save_every: int = 5                     # steps between two saves, 0: only when interrupted
    resume: str = ""                        # go on with an interrupted run: its folder or name
    change: bool = False                    # on resume: take options that differ from the run's

    def __post_init__(self):
        for name, allowed in choices().items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; "
                                 f"choose from {', '.join(allowed)}")
        for f in fields(self):
            value, (low, high) = getattr(self, f.name), BOUNDS.get(f.name, (0, math.inf))
            if f.type in (int, float) and not low <= value < high:
                raise ValueError(f"{f.name} is {value}; it must be at least {low} and below {high}")
        if Path(self.name).name != self.name or not self.name.isprintable():
            raise ValueError(f"name is {self.name!r}; needed one folder name, such as first-try "
                             "(--out says where it is made)")
        if not self.system.isascii() and self.system != self.system.encode(
                errors="replace").decode():
            raise ValueError(f"system holds bytes that are no UTF-8 ({self.system!r:.60}); type it "
                             "again in UTF-8")
        if self.method not in ("sod", "sod_only") and self.weights != "sod":
            raise ValueError(f"method {self.method} fixes its own weights; "
                             f"--weights {self.weights} goes with --method sod or sod_only")
        if self.kl == "full" and not getattr(METHODS.get(self.method), "view", ""):
            raise ValueError(f"method {self.method} has no teacher, and kl full compares with one; "
                             "use --kl sampled")
        if self.kl == "full" and self.offload != "none":
            raise ValueError(f"kl full needs the teacher in every update, and offload "
                             f"{self.offload} sends it away; use --offload none or --kl sampled")
        if self.teacher_device != "same" and self.offload != "none":
            raise ValueError(f"teacher_device {self.teacher_device} has a place for the teacher, "
                             f"and offload {self.offload} sends it away; choose one of the two")
        if self.prompts_per_step % self.updates_per_step:
            raise ValueError(f"prompts_per_step {self.prompts_per_step} does not divide into "
                             f"{self.updates_per_step} optimiser steps; choose a multiple")


def choices():
    """Options that take one of a few words."""
    return {"method": ["vanilla", "sft", *METHODS], "weights": list(WEIGHTS),
            "kl": ["sampled", "full"], "init": ["pretrained", "random"],
            "rollout_engine": list(ENGINES),
            "offload": ["none", "teacher", "all"], "dtype": ["auto", "float32", "bfloat16"]}


# What is not "at least 0 and finite": name -> (lowest, first value that is too high).
TINY = 1e-12
BOUNDS = {
    **dict.fromkeys(["steps", "prompts_per_step", "group_size", "updates_per_step", "max_turns",
                     "max_prompt", "max_response", "sft_epochs", "sft_batch", "eval_problems",
                     "eval_samples", "chunk", "look", "max_refused"], (1, math.inf)),
    **dict.fromkeys(["temperature", "eval_temperature", "epsilon", "lr", "sft_lr", "grad_clip",
                     "tool_timeout"], (TINY, math.inf)),
    **dict.fromkeys(["beta1", "beta2", "clip_low", "silent_rate", "silent_persist"], (0, 1)),
    "eval_top_p": (TINY, 1 + TINY), "clip_dual": (1, math.inf), "tool_chars": (64, math.inf),
    "decay": (0, 1 + TINY),
}

SYSTEM = ("Solve the problem. Use the code_interpreter tool for every calculation. "
          "Put the final answer in \\boxed{}.")
GPU = dict(demonstrations="", eval_data="", system=SYSTEM, steps=120, prompts_per_step=8,
           max_turns=8, max_prompt=1024, max_response=4096, overlong=512, lr=1e-6, sft_lr=1e-5,
           silent_rate=0.0, tool_modules="numpy,sympy", eval_top_p=0.6, chunk=512,
           rollout_engine="generate", tool_wait=0.0, threads=0, rollout_batch=0,
           micro_batch_tokens=0, gradient_checkpointing=True, show_every=1,
           store_tokens=16)  # of 64: each token takes some 34 bytes
# Named sets of values; "world" is Config itself. The paper's run took eight GPUs two to three days.
PRESETS = {
    "world": {},
    "gpu": GPU,
    "paper": dict(GPU, prompts_per_step=64, group_size=16, updates_per_step=4, max_turns=16,
                  max_prompt=2560, max_response=20_480, overlong=1024, sft_epochs=5, sft_batch=128,
                  eval_samples=32),
}

# --- The method, as a family (Sec. 4): teacher's view and token advantage ---------------------


@dataclass(frozen=True)
class Method:
    """What tells the methods of the paper's tables apart."""
    view: str      # who scores: "" nobody, "teacher", or the frozen start with "answer" or "hint"
    outcome: bool  # does the token advantage hold the group advantage A_i?
    weights: str   # factor of logp_t - logp_s: "" none, "uniform", "sod" (then Config.weights)


METHODS = {
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
    A_it = A[:, None].expand(step_id.shape) * float(METHODS[method].outcome)  # (B, T)
    if METHODS[method].view:
        w_it = w.gather(1, step_id.long().clamp(min=0))  # (B, T); a token has its step's weight
        A_it = A_it + opd_coef * w_it * (logp_t - logp_s)
    # where, not a product: tool tokens may hold any value, and 0 * inf is not 0.
    return torch.where(step_id >= 0, A_it, 0.0).detach()


# --- The method, step by step -----------------------------------------------------------------


def group_advantages(rewards, group_size, valid=None):
    """How much better a rollout did than the others of its problem (GRPO).

    rewards     (B,) with the rollouts of one problem side by side
    group_size  G, a divisor of B
    valid       (B,) bool, False for rollouts that the machine failed: they are not in their group
    returns     (B,) (r - mean) / (std + 1e-6) within the group, std with ddof 1; 0 if not valid

    A group that agrees gets exactly 0: rounding in its mean would be blown up by 1e6.
    """
    groups = rewards.view(-1, group_size) * 1.0  # (P, G), whole numbers become fractions
    valid = torch.ones_like(groups, dtype=bool) if valid is None else valid.view_as(groups)
    size = valid.sum(1, keepdim=True)  # (P, 1)
    mean = torch.where(valid, groups, 0.0).sum(1, keepdim=True) / size.clamp(min=1)
    centred = torch.where(valid, groups - mean, 0.0)
    std = centred.square().sum(1, keepdim=True).div((size - 1).clamp(min=1)).sqrt()
    highest = torch.where(valid, groups, -math.inf).amax(1, keepdim=True)
    agree = highest <= torch.where(valid, groups, math.inf).amin(1, keepdim=True)
    return torch.where(agree, 0.0, centred / (std + 1e-6)).flatten()


def step_divergence(logp_s, logp_t, step_id, num_steps=None):
    """How far student and teacher differ at each step (Eq. 6).

    logp_s, logp_t  (B, T) log-probabilities of the sampled tokens, nats
    step_id         (B, T) k = 0..K-1, or -1
    num_steps       K where known; looking it up in step_id waits for the device
    returns         (B, K) d_k = mean over step k of |logp_s - logp_t|, nats/token; 0 for no step
    """
    K = num_steps or max(int(step_id.max()) + 1, 1)
    gap = torch.where(step_id >= 0, (logp_s - logp_t).abs(), 0.0)
    return step_sums(gap, step_id, K) / step_tokens(step_id, K).clamp(min=1)


def step_sums(values, step_id, K):
    """(B, T) values -> (B, K) their sum over the tokens of each step."""
    slot = step_id.long() + 1  # slot 0 collects what belongs to no step
    return values.new_zeros(len(values), K + 1).scatter_add_(1, slot, values)[:, 1:]


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
    # the weight, not on the running product, so a step after a capped one does not suffer from it.
    return ((d[:, :1] + epsilon) / (d + epsilon)).clamp(max=1 + delta)


def unclipped_weights(d, epsilon=1e-6):
    """Eq. 7 without its cap: (B, K) -> (B, K)."""
    return step_weights(d, epsilon, math.inf)


def steps_since_failure(failed):
    """How many steps after its first failed call each step comes; 0 up to and at that call.

    failed   (B, K) bool: the tool call of step k failed
    returns  (B, K) int

    >>> steps_since_failure(torch.tensor([[False, True, False, False]]))
    tensor([[0, 0, 1, 2]])
    """
    return ((failed.cumsum(1) > 0).cumsum(1) - 1).clamp(min=0)


def decay_weights(failed, decay=0.9):
    """decay^(k - k_err) after the first failed call k_err, 1 before: (B, K) -> (B, K)."""
    return decay ** steps_since_failure(failed).float()


def mask_after_error(failed):
    """0 after the first failed call, 1 up to it: (B, K) -> (B, K)."""
    return (steps_since_failure(failed) == 0).float()


def token_mean(w, tokens):
    """Mean weight of a sampled token of the batch: (B, K) and (B, K) tokens a step -> scalar.

    >>> token_mean(torch.tensor([[1.0, 0.5, 9.9]]), torch.tensor([[1, 3, 0]]))
    tensor(0.6250)
    """
    return (w * tokens).sum() / tokens.sum().clamp(min=1)


def rescaled_weights(w, tokens):
    """The same weights with mean 1 over the sampled tokens of the batch: (B, K) -> (B, K)."""
    return w / token_mean(w, tokens)


def median_weights(d, epsilon=1e-6, delta=0.2):
    """Eq. 7 with the median of d_1..d_k in place of d_1: one easy step cannot switch off the rest.

    >>> median_weights(torch.tensor([[0.0, 0.4, 0.2]]))
    tensor([[1.0000, 0.5000, 1.0000]])
    """
    middle = torch.stack([d[:, :k].quantile(0.5, dim=1) for k in range(1, d.shape[1] + 1)], 1)
    return ((middle + epsilon) / (d + epsilon)).clamp(max=1 + delta)


# Functions of d, (B, K) failed calls, (B, K) tokens of each step and Config.
WEIGHTS = {
    "sod": lambda d, failed, tokens, c: step_weights(d, c.epsilon, c.delta),
    # the paper's ablation
    "uniform": lambda d, failed, tokens, c: torch.ones_like(d),
    "decay": lambda d, failed, tokens, c: decay_weights(failed, c.decay),
    "mask_after_error": lambda d, failed, tokens, c: mask_after_error(failed),
    "unclipped": lambda d, failed, tokens, c: unclipped_weights(d, c.epsilon),
    # ours: is it the scale of w or its shape (SOD's mean on every token; SOD's shape at mean 1),
    # and does a first step that is known by heart (d_1 near 0) do harm?
    "constant": lambda d, failed, tokens, c: token_mean(
        step_weights(d, c.epsilon, c.delta), tokens).expand(d.shape),
    "rescaled": lambda d, failed, tokens, c: rescaled_weights(
        step_weights(d, c.epsilon, c.delta), tokens),
    "floor": lambda d, failed, tokens, c: step_weights(d.clamp(min=c.floor), c.epsilon, c.delta),
    "median": lambda d, failed, tokens, c: median_weights(d, c.epsilon, c.delta),
}
BATCHWIDE = ("constant", "rescaled")  # these need the whole batch at once


def policy_loss(logp, logp_old, advantages, mask, clip_low=0.2, clip_high=0.28, clip_dual=3.0,
                num_tokens=None):
    """Clipped surrogate on token advantages, with the dual clip where they are negative.

    logp, logp_old  (B, T) log-probabilities now (with gradient) and when sampled, nats
    advantages      (B, T) A_it
    mask            (B, T) tokens the student sampled
    num_tokens      tokens of the whole optimiser step; default: those of this mask
    returns         scalar, the sum over `mask` divided by `num_tokens`

    Differs from the authors' code: one token mean over the optimiser step, so the gradient does
    not depend on how the step was cut into micro-batches.
    """
    mask = mask.bool()
    log_ratio = torch.where(mask, logp - logp_old, 0.0).clamp(-20, 20)
    advantages = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.exp()  # (B, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    # A very unlikely old token makes the ratio, and so the loss of a bad token, unbounded.
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * clip_dual), loss)
    total = mask.sum().clamp(min=1) if num_tokens is None else max(num_tokens, 1)
    return loss.sum() / total


# --- Log-probabilities without the (B, T, V) logits -------------------------------------------
# At 20,480 tokens and 151,936 vocabulary entries the logits alone take 11.6 GiB in fp32. Both
# functions below, token_logprobs and reverse_kl, walk over tiles of the vocabulary, all tokens at
# once, and compute each tile a second time in backward (small inputs keep theirs): a row of the
# head's gradient is finished by one product, in place. A tile is worked on in place too, since
# reading and writing it is what costs beside the products.

TILE_ELEMENTS = 2 ** 24  # of one fp32 tile: 64 MiB
KEEP_ELEMENTS = 2 ** 26  # up to 256 MiB of tiles wait for backward, which then is a product sooner


def _tiles(tokens, vocabulary):
    width = max(TILE_ELEMENTS // max(tokens, 1) // 256 * 256, 256)  # aligned for tensor cores
    return [slice(v, min(v + width, vocabulary)) for v in range(0, vocabulary, width)]


def _logits(hidden, weight, temperature):
    """(N, D) and (n, D) -> (N, n), at least fp32: the softmax is never taken in 16 bits."""
    if hidden.dtype in (torch.float32, torch.float64):
        z = hidden @ weight.T
    elif hidden.is_cuda:  # the GEMM adds up in fp32 anyway; do not round its result
        z = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        z = hidden.float() @ weight.float().T
    return z if temperature == 1 else z.div_(temperature)


def _add_product(total, a, b):
    """total += a @ b; 16-bit factors give an fp32 product, not rounded before it is added."""
    if total.dtype != a.dtype and a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _no_sums(hidden):
    """What _add_tile starts from: (N,) top -inf, sum 0, weighted sum 0."""
    zero = hidden.new_zeros(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return zero - math.inf, zero, zero


def _add_tile(sums, z, x=None):
    """Add a tile of logits (N, n) to the running sums of a softmax.

    sums     (N,) top, the largest logit so far, sum of exp(z - top), and sum of exp(z - top) x
    returns  the same, of all tiles so far; z then holds exp(z - top), and x is overwritten
    """
    old, total, weighted = sums
    top = torch.maximum(old, z.amax(1))
    fade, e = (old - top).exp(), z.sub_(top[:, None]).exp_()
    total = total * fade + e.sum(1)
    return top, total, weighted if x is None else weighted * fade + x.mul_(e).sum(1)


def _head_gradients(d_logits, scale, hidden, weight, needs_weight):
    """Gradients (N, D) and (V, D) of hidden states and head, from those of a tile of logits.

    d_logits  slice of the vocabulary -> (N, n), but for the factor of each row
    scale     (N,) that factor: it joins the (N, D) matrices, not the far larger tiles
    """
    d_weight = torch.empty_like(weight) if needs_weight else None
    scaled = (hidden * scale[:, None]).to(hidden.dtype)
    d_hidden = torch.zeros_like(hidden, dtype=scale.dtype)
    for tile in _tiles(len(hidden), len(weight)):
        dz = d_logits(tile)
        _add_product(d_hidden, dz, weight[tile])
        if needs_weight:
            torch.mm(dz.T, scaled, out=d_weight[tile])
        del dz  # before the next tile takes its place
    return d_hidden.mul_(scale[:, None]).to(hidden.dtype), d_weight


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, want_entropy):
        sums, ctx.kept = _no_sums(hidden), []
        chosen = sums[1]
        for tile in _tiles(len(hidden), len(weight)):
            z = _logits(hidden, weight[tile], temperature)  # (N, n)
            at, inside = _columns(targets, tile)
            chosen = torch.where(inside, z.gather(1, at), chosen[:, None])[:, 0]
            sums = _add_tile(sums, z, z.clone() if want_entropy else None)
            if len(hidden) * len(weight) <= KEEP_ELEMENTS:
                ctx.kept.append((z, sums[0]))
        top, total, weighted = sums  # weighted / total: the mean logit under the softmax
        lse = top + total.log()
        logp, entropy = chosen - lse, lse - weighted / total
        ctx.save_for_backward(hidden, weight, targets, lse, logp)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)  # a metric, not a loss
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, lse, logp = ctx.saved_tensors

        def d_logits(tile):
            """p - one-hot; the minus of d logp / dz is in the scale below."""
            if ctx.kept:
                e, top = ctx.kept.pop(0)
                p = e.mul_((top - lse).exp()[:, None]).to(hidden.dtype)
            else:
                z = _logits(hidden, weight[tile], ctx.temperature).sub_(lse[:, None])
                p = torch.exp(z, out=torch.empty_like(z, dtype=hidden.dtype))
            at, inside = _columns(targets, tile)
            # Where p is near 1, p - 1 does not survive 16 bits: it comes from logp, in fp32.
            new = torch.where(inside, logp.expm1().to(p.dtype)[:, None], p.gather(1, at))
            return p.scatter_(1, at, new)

        d_hidden, d_weight = _head_gradients(d_logits, grad / -ctx.temperature, hidden, weight,
                                             ctx.needs_input_grad[1])
        return d_hidden, d_weight, None, None, None


def _columns(targets, tile):
    """(N, 1) column of each target in a tile, and whether it is there at all."""
    at = (targets - tile.start)[:, None]
    width = tile.stop - tile.start
    return at.clamp(0, width - 1), (at >= 0) & (at < width)


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
        sums_s, sums_t = _no_sums(hidden_s), _no_sums(hidden_t)
        for tile in _tiles(len(hidden_s), len(weight_s)):
            z_s = _logits(hidden_s, weight_s[tile], temperature)  # (N, n)
            z_t = _logits(hidden_t, weight_t[tile], temperature)
            gap = z_s - z_t
            sums_s, sums_t = _add_tile(sums_s, z_s, gap), _add_tile(sums_t, z_t)
        (top_s, total_s, weighted), (top_t, total_t, _) = sums_s, sums_t
        lse_s, lse_t = top_s + total_s.log(), top_t + total_t.log()
        # KL = E_p[log p - log q] = E_p[z_s - z_t] - lse_s + lse_t
        kl = weighted / total_s - lse_s + lse_t
        ctx.save_for_backward(hidden_s, weight_s, hidden_t, weight_t, lse_s, lse_t, kl)
        ctx.temperature = temperature
        return kl

    @staticmethod
    def backward(ctx, grad):
        hidden_s, weight_s, hidden_t, weight_t, lse_s, lse_t, kl = ctx.saved_tensors

        def d_logits(tile):
            """p_v (log p_v - log q_v - KL)."""
            log_p = _logits(hidden_s, weight_s[tile], ctx.temperature).sub_(lse_s[:, None])
            gap = _logits(hidden_t, weight_t[tile], ctx.temperature).sub_((lse_t - kl)[:, None])
            gap = torch.sub(log_p, gap, out=gap)
            return torch.mul(log_p.exp_(), gap, out=torch.empty_like(gap, dtype=hidden_s.dtype))

        d_hidden, d_weight = _head_gradients(d_logits, grad / ctx.temperature, hidden_s, weight_s,
                                             ctx.needs_input_grad[1])
        return d_hidden, d_weight, None, None, None


def reverse_kl(hidden_s, weight_s, hidden_t, weight_t, temperature=1.0):
    """Exact KL(student || teacher) at each position, over the whole vocabulary (kl="full").

    hidden_s, hidden_t  (..., D_s), (..., D_t) last hidden states
    weight_s, weight_t  (V, D_s), (V, D_t) of the two heads; the same V
    returns             (...) nats, fp32 or better, differentiable in the student's two arguments

    Beyond the paper, whose term is a one-sample estimate of this one's gradient.
    """
    kl = _ReverseKL.apply(hidden_s.reshape(-1, hidden_s.shape[-1]), weight_s,
                          hidden_t.reshape(-1, hidden_t.shape[-1]), weight_t, temperature)
    return kl.view(hidden_s.shape[:-1])


# --- Conversation: text to ids, once ----------------------------------------------------------

CUT = "\ufdd0"  # a code point no text may hold: marks where a control string is cut in two


def defuse(tokenizer, text):
    """Mark `text` so that encode() spells control strings in it letter by letter.

    A tool that prints "<|im_end|>" must not end the turn, nor "</tool_response>" its answer.
    """
    control = "|".join(map(re.escape, sorted(tokenizer.get_added_vocab(), key=len, reverse=True)))
    return re.sub(f"(?=(?:{control}))(.)", rf"\1{CUT}", text.replace(CUT, "\ufffd"), flags=re.S)


def encode(tokenizer, text):
    """Ids of `text`, control strings as control tokens except where defuse() has cut them."""
    return [i for piece in text.split(CUT)
            for i in tokenizer.encode(piece, add_special_tokens=False)]


def view_question(problem, view):
    """The question, with what a self-teacher is told besides (methods opsd_gt and opsd_hint)."""
    extra = {"answer": f"\nThe answer is {problem.answer}.", "hint": f"\nHint: {problem.hint}"}
    return problem.question + extra.get(view, "")


def encode_prompt(tokenizer, problem, system="", view=""):
    """Ids up to and including the header of the first assistant turn."""
    messages = problem.messages or [{"role": "user", "content": problem.question}]
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    extra = view_question(problem, view)[len(problem.question):]
    last = max(i for i, m in enumerate(messages) if m["role"] == "user")
    messages = [{**m, "content": defuse(tokenizer, m["content"] + extra * (i == last))}
                for i, m in enumerate(messages)]
    return encode(tokenizer, tokenizer.apply_chat_template(
        messages, tools=[tools.TOOL_SCHEMA], add_generation_prompt=True, tokenize=False))


def encode_tool_turn(tokenizer, text):
    """Ids of everything between the student's end-of-turn token and its next turn.

    Only this text is rendered. Rendering the whole conversation again would change what the
    student wrote: Qwen3's template drops the thoughts of earlier turns.
    """
    anchor = "ANCHOR"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": anchor},
         {"role": "tool", "content": defuse(tokenizer, text)}],
        add_generation_prompt=True, tokenize=False)
    return encode(tokenizer, rendered.split(anchor, 1)[1].removeprefix(tokenizer.eos_token))


def encode_demonstration(tokenizer, problem, messages, system=""):
    """A finished conversation as ids and step ids, put together exactly as a rollout grows.

    messages  the turns after the question: assistant, tool, assistant, ...
    returns   ids, step_id, two lists of one length
    """
    ids = encode_prompt(tokenizer, problem, system)
    step_id, k = [-1] * len(ids), 0
    for message in messages:
        if message["role"] == "assistant":
            turn = encode(tokenizer, message["content"] + tokenizer.eos_token)
            step_id += [k] * len(turn)
            k += 1
        else:
            turn = encode_tool_turn(tokenizer, message["content"])
            step_id += [-1] * len(turn)
        ids += turn
    return ids, step_id


# --- Rollouts ---------------------------------------------------------------------------------

FINE = ("", "ok", "output_truncated", "not_run")  # every other outcome of a call is a failure


@dataclass(eq=False)
class Rollout:
    """One attempt at one problem, recorded while it is sampled."""
    problem: tools.Problem
    ids: list[int]        # prompt, turns and tool answers, as the model saw them
    step_id: list[int]    # k for a token sampled in step k, -1 for every other token
    prompt_len: int       # tokens of the prompt
    turns: list[str] = field(default_factory=list)     # text of each step
    answers: list[str] = field(default_factory=list)   # the tool's, to each call
    outcomes: list[str] = field(default_factory=list)  # of each step's call; "" without a call
    finish: str = ""      # answer, turns (limit), budget (cut off), infrastructure (not its fault)
    silent: bool = False  # the tool has stopped answering (embedded world)
    right: bool = False   # the grader's verdict on the last turn
    reason: str = ""      # and its reason
    reward: float = 0.0   # +1 right, about -1 wrong; see outcome_reward
    noise: np.ndarray | None = None  # (max_response,) uniform: noise[n] picks response token n
    luck: np.ndarray | None = None   # (max_turns,) uniform: luck[k] decides if the tool is silent

    @property
    def response_len(self):
        return len(self.ids) - self.prompt_len

    def extend(self, ids, k):
        self.ids += ids
        self.step_id += [k] * len(ids)

    def next_noise(self, n):
        """(n,) numbers of the next n response tokens; 0 beyond the token budget."""
        noise = self.noise[self.response_len:self.response_len + n]
        return np.pad(noise, (0, n - len(noise)))


def random_numbers(seed, purpose, at):
    """The generator of one place in a run, such as (0, "rollouts", 17): step 17 of seed 0.

    Nothing random is carried from step to step. A run can be continued anywhere, a batch sampled
    again comes out the same, and no rollout depends on who happens to be beside it.
    """
    return np.random.default_rng([seed, at, *purpose.encode()])


def end_ids(model, tokenizer):
    """Every id that ends a turn: the tokenizer's and those of the model's shipped settings."""
    shipped = getattr(model, "shipped_generation", model.generation_config).eos_token_id
    shipped = shipped if isinstance(shipped, list) else [shipped]
    return sorted({i for i in [tokenizer.eos_token_id, *shipped] if i is not None})


def pick_tokens(logits, noise, temperature=1.0, top_p=1.0):
    """The token at which the cumulated distribution passes a uniform number (inverse CDF).

    logits   (B, V)
    noise    (B,) uniform in [0, 1), fp64
    top_p    keep the likeliest tokens whose share before them is below top_p
    returns  (B,) ids
    """
    p = (logits.float() / temperature).softmax(-1)  # (B, V)
    if top_p < 1:
        p, order = p.sort(-1, descending=True)
        p = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)
    edges = p.cumsum(-1, dtype=torch.float64)  # fp32 would lose the rare tokens of a large V
    at = torch.searchsorted(edges, noise[:, None] * edges[:, -1:], right=True)
    at = at.clamp(max=p.shape[1] - 1)  # (B, 1)
    return (order.gather(1, at) if top_p < 1 else at)[:, 0]


class OwnNoise(LogitsProcessor):
    """Makes HF generate pick each row's tokens by the row's own numbers."""

    def __init__(self, noise, pick):
        self.noise, self.pick, self.t = noise, pick, 0  # noise: (B, tokens)

    def __call__(self, ids, logits):
        chosen = self.pick(logits, self.noise[:, self.t])
        self.t += 1
        return torch.full_like(logits, -math.inf).scatter_(1, chosen[:, None], 0.0)


@torch.no_grad()
def sample_tokens(model, tokenizer, rollouts, tokens, pick):
    """At most `tokens` new ids of each rollout, up to an end id, from HF generate."""
    # generate on a model in train() with checkpointing drops its cache: wrong tokens, no warning.
    assert not model.training, "call model.eval() before sampling"
    ends, width = end_ids(model, tokenizer), max(len(r.ids) for r in rollouts)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    ids = torch.tensor([[pad_id] * (width - len(r.ids)) + r.ids for r in rollouts])  # (B, width)
    # The mask is not optional: the pad id may be an end id, and so cannot be told from text.
    mask = torch.tensor([[0] * (width - len(r.ids)) + [1] * len(r.ids) for r in rollouts])
    noise = torch.tensor(np.stack([r.next_noise(tokens) for r in rollouts]), device=model.device)
    settings = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=ends,
                                pad_token_id=pad_id)
    out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device),
                         generation_config=settings, logits_processor=[OwnNoise(noise, pick)])
    return [up_to_end(new, ends) for new in out[:, width:].tolist()]


def up_to_end(ids, ends):
    """The ids up to and including the first end id."""
    return ids[:next((n + 1 for n, i in enumerate(ids) if i in ends), len(ids))]


def sample_turns(model, tokenizer, rollouts, config, pick):
    """Sample the next turn of each rollout: up to an end id, or to the token budget.

    Rows that have ended leave the batch after every config.chunk ids, so that one long turn does
    not hold up the others.
    """
    ends, active = end_ids(model, tokenizer), rollouts
    while active:
        tokens = min(config.chunk, max(config.max_response - r.response_len for r in active))
        for r, ids in zip(active, sample_tokens(model, tokenizer, active, tokens, pick)):
            r.extend(ids[:config.max_response - r.response_len], len(r.turns))
        active = [r for r in active if not turn_is_over(r, ends, config)]


def turn_is_over(rollout, ends, config):
    return rollout.ids[-1] in ends or rollout.response_len >= config.max_response


def sample_rollouts(model, tokenizer, prompts, tool, config, rng, temperature=None, top_p=1.0):
    """Let the model solve problems in several turns with the tool.

    prompts  [(Problem, prompt ids), ...], one for each rollout
    tool     has run(codes) -> observations
    rng      see random_numbers
    returns  [Rollout, ...] in the same order, graded and rewarded
    """
    noise = rng.random((len(prompts), config.max_response))
    luck = rng.random((len(prompts), config.max_turns))
    rollouts = [Rollout(problem, list(ids), [-1] * len(ids), len(ids), noise=n, luck=u)
                for (problem, ids), n, u in zip(prompts, noise, luck)]
    pick = partial(pick_tokens, temperature=temperature or config.temperature, top_p=top_p)
    ENGINES[config.rollout_engine](model, tokenizer, rollouts, tool, config, pick)
    grade_rollouts(rollouts, tool, config)
    return rollouts


def sample_by_generate(model, tokenizer, rollouts, tool, config, pick):
    """The plain engine: turn by turn, all rollouts wait for the slowest, then for their tools."""
    ends = end_ids(model, tokenizer)
    while active := [r for r in rollouts if not r.finish]:
        for start in range(0, len(active), config.rollout_batch):
            sample_turns(model, tokenizer, active[start:start + config.rollout_batch], config, pick)
        calls = [(r, call) for r in active if (call := end_turn(tokenizer, r, ends, config))]
        # A call is a pure function of its code, and rollouts of a problem often agree: once each.
        codes = list(dict.fromkeys(call.code for r, call in calls if must_run(r, call)))
        results = dict(zip(codes, tool.run(codes)))
        for r, call in calls:
            take_answer(tokenizer, r, observe(r, call, results.get(call.code)), config)


def end_turn(tokenizer, r, ends, config):
    """Record the turn that r has just sampled. Returns its tool call, or None where r ends here."""
    k = len(r.turns)
    r.turns.append(tokenizer.decode(r.ids[r.step_id.index(k):], skip_special_tokens=True))
    call = tools.parse_tool_call(r.turns[-1])
    if r.ids[-1] not in ends:
        r.finish = "budget"
    elif call is None:
        r.finish = "answer"
    elif len(r.turns) == config.max_turns:
        r.finish = "turns"
    r.outcomes.append("not_run" if call and r.finish else "")
    r.silent = r.luck[k] < (config.silent_persist if r.silent else config.silent_rate)
    return None if r.finish else call


def must_run(r, call):
    return not call.fault and not r.silent


def observe(r, call, result):
    """What the model is told about its call: the fault of the call, silence, or the `result`."""
    if call.fault:
        seen = tools.Observation(call.message, call.fault, 0.0)
    elif r.silent:
        seen = tools.Observation(tools.TIMEOUT_TEXT, "timeout", 0.0)
    else:
        seen = result
    note = f"\n(Only the first call of this turn ran; {call.ignored} did not.)"
    return replace(seen, text=seen.text + note) if call.ignored else seen


def take_answer(tokenizer, r, seen, config):
    """Append what the tool said; a rollout whose budget it does not fit is cut off here."""
    r.outcomes[-1] = seen.outcome
    r.answers.append(seen.text)
    answer = encode_tool_turn(tokenizer, seen.text)
    if seen.outcome == "sandbox_error":  # tried again and again: the machine's fault
        r.finish = "infrastructure"
    elif r.response_len + len(answer) >= config.max_response:
        r.finish = "budget"
    else:
        r.extend(answer, -1)


def grade_rollouts(rollouts, tool, config):
    """Grade the final turns and set the rewards."""
    for r in rollouts:
        verdict = tools.grade(r.problem, r.turns[-1] if r.finish == "answer" else "", tool)
        r.right, r.reason = verdict.right, verdict.reason
        r.reward = outcome_reward(r, verdict, config)
        if r.finish == "infrastructure" or "sandbox_error" in verdict.reason:  # never judged
            r.finish, r.step_id = "infrastructure", [-1] * len(r.ids)  # nothing to learn from here


def outcome_reward(rollout, verdict, config):
    """+1 right, -1 wrong, wrong shaped by tool calls; less near the end of the token budget."""
    if rollout.problem.kind == "program":
        reward = verdict.score  # share of tests passed; -1 without a program
    else:
        reward = 1.0 if verdict.right else -1.0
    if config.tool_shaping and reward == -1.0:
        reward += 0.1 * min(sum(o != "" for o in rollout.outcomes), 4)
    over = rollout.response_len - (config.max_response - config.overlong)
    return reward - (min(max(over / config.overlong, 0.0), 1.0) if config.overlong else 0.0)


# --- Rollouts, sooner: each keeps its keys and values from turn to turn ------------------------


class Slots:
    """A KV cache with one row, a slot, for each rollout under way (Qwen3 models).

    HF generate reads the whole conversation again at each turn, and its rows move in lockstep. Here
    every slot has its own length: a tool's answer is read in where the last turn ended, a finished
    rollout makes room for the next, and one that waits for its tool takes no part. The forward pass
    is Qwen3's own on its own weights, with torch's one kernel for RMSNorm in place of six: in small
    models starting the kernels takes longer than their work.
    """

    def __init__(self, model, size):
        check_slots(model)
        c = model.config
        # generate()'s trap, here too: dropout and checkpointing belong to training.
        assert not model.training, "call model.eval() before sampling"
        self.model, self.device = model, model.device
        self.seats = [None] * size  # the rollout in each slot
        self.fed = [0] * size       # how many of its ids the cache holds
        self.length = 0             # positions to attend to
        shape = (c.num_hidden_layers, size, 0, c.num_key_value_heads, c.head_dim)
        self.keys = torch.empty(shape, dtype=model.dtype, device=model.device)
        self.values = torch.empty_like(self.keys)

    def reach(self, length):
        """Attend to `length` positions from now on; make room for them."""
        self.length = -(-length // 64) * 64  # few different shapes: kinder to the allocator
        more = max(self.length, self.keys.shape[2] * 3 // 2) - self.keys.shape[2]
        if self.length > self.keys.shape[2]:
            self.keys, self.values = (F.pad(x, (0, 0, 0, 0, 0, more))
                                      for x in (self.keys, self.values))

    def seat(self, queue):
        """Give free slots to the next rollouts of the queue."""
        for i, r in enumerate(self.seats):
            if queue and (r is None or r.finish):
                self.seats[i], self.fed[i] = queue.popleft(), 0

    def to_front(self, ready):
        """Exchange slots until those of `ready` come first, so that a batch is a plain slice."""
        front, n = [r in ready for r in self.seats], len(ready)
        holes = [i for i in range(n) if not front[i]]
        strays = [i for i in range(n, len(front)) if front[i]]
        for i, j in zip(holes, strays):
            for column in (self.seats, self.fed):
                column[i], column[j] = column[j], column[i]
        for x in (self.keys, self.values):
            x[:, holes + strays] = x[:, strays + holes]

    def catch_up(self, n, budget):
        """Read what is new in the first n slots, all but the last id: prompts, tool answers."""
        behind = [i for i in range(n) if self.fed[i] < len(self.seats[i].ids) - 1]
        news = [self.seats[i].ids[self.fed[i]:-1] for i in behind]
        for batch in micro_batches([len(ids) for ids in news], budget):
            rows, ids = [behind[b] for b in batch], pad([news[b] for b in batch], 0, self.device)
            at = [self.fed[i] for i in rows]
            self.reach(max(at) + ids.shape[1])
            # What padding writes lies behind the row's last id; later ids overwrite it unseen.
            self.read(ids, torch.tensor(at, device=self.device),
                      torch.tensor(rows, device=self.device))

    def sample(self, n, tokens, pick):
        """(n, tokens) new ids of the first n slots; what follows an end id has no meaning."""
        seats = self.seats[:n]
        last = torch.tensor([r.ids[-1] for r in seats], device=self.device)  # (n,) not read yet
        at = torch.tensor([len(r.ids) - 1 for r in seats], device=self.device)  # its position
        noise = torch.tensor(np.stack([r.next_noise(tokens) for r in seats]), device=self.device)
        self.reach(max(len(r.ids) for r in seats) + tokens)
        sampled = []
        for t in range(tokens):  # without waiting for the device
            hidden = self.read(last[:, None], at + t)  # (n, 1, D)
            last = pick(self.model.lm_head(hidden[:, 0]), noise[:, t])
            sampled.append(last)
        return torch.stack(sampled, 1).tolist()

    @torch.no_grad()
    def read(self, ids, at, rows=None):
        """Feed ids to slots; each attends to all that its slot holds before it.

        ids      (R, n), for positions at[r] .. at[r] + n - 1
        rows     (R,) slots, or None for the first R
        returns  (R, n, D) last hidden states
        """
        core, (R, n), L = self.model.model, ids.shape, self.length
        where = at[:, None] + torch.arange(n, device=ids.device)  # (R, n)
        into = (torch.arange(R, device=ids.device) if rows is None else rows)[:, None], where
        held = (slice(R) if rows is None else rows, slice(L))
        x = core.embed_tokens(ids)
        cos, sin = (part[:, :, None] for part in core.rotary_emb(x, where))  # (R, n, 1, head_dim)
        seen = torch.arange(L, device=ids.device) <= where[:, :, None]  # (R, n, L)
        heads = self.model.config.num_attention_heads // self.keys.shape[3]
        seen = seen.repeat_interleave(heads, 1)[:, None]  # (R, 1, n * heads of a group, L)
        for layer, keys, values in zip(core.layers, self.keys, self.values):
            a, h = layer.self_attn, rms_norm(x, layer.input_layernorm)
            q, k, v = (part(h).unflatten(-1, (-1, a.head_dim)) for part in
                       (a.q_proj, a.k_proj, a.v_proj))  # (R, n, heads, head_dim)
            keys[into], values[into] = rotate(rms_norm(k, a.k_norm), cos, sin), v
            q = rotate(rms_norm(q, a.q_norm), cos, sin)
            # Query heads that share a key head are put side by side, as if they were positions.
            q = q.unflatten(2, (-1, heads)).transpose(1, 2).flatten(2, 3)  # (R, kv, n * heads, .)
            mixed = F.scaled_dot_product_attention(q, keys[held].transpose(1, 2),
                                                   values[held].transpose(1, 2), attn_mask=seen)
            x = x + a.o_proj(mixed.unflatten(2, (n, heads)).transpose(1, 2).flatten(2))
            x = x + layer.mlp(rms_norm(x, layer.post_attention_layernorm))
        return rms_norm(x, core.norm)


def check_slots(model):
    c = model.config
    if c.model_type != "qwen3" or set(c.layer_types) != {"full_attention"}:
        raise ValueError(f"rollout_engine slots knows Qwen3 models with full attention, and "
                         f"this is a {c.model_type} model; use --rollout_engine generate")


def rms_norm(x, norm):
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def rotate(x, cos, sin):
    """Rotary position embedding of (R, n, heads, head_dim)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


CALLS_AT_ONCE = 32  # threads that wait for tools


def sample_by_slots(model, tokenizer, rollouts, tool, config, pick):
    """The fast engine: a kept KV cache (Slots), and nobody waits for another one's tool.

    A call runs while the others sample `look` tokens; then its answer is read. Where it takes more
    than `tool_wait` seconds longer, the others go on without it. The rollouts are those of
    sample_by_generate, token for token, up to the rounding of sums. While tool_wait is longer than
    any program, they are also the same bit by bit each time; else the clock decides who is sampled
    beside whom, and so the rounding.
    """
    ends, queue = end_ids(model, tokenizer), deque(rollouts)
    slots = Slots(model, min(config.rollout_batch, len(rollouts)))
    called, late, runs = {}, {}, {}  # Rollout -> (call, Future) twice, code -> Future
    with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
        while not all(r.finish for r in rollouts):
            slots.seat(queue)
            ready = {r for r in slots.seats if r and not r.finish} - called.keys() - late.keys()
            slots.to_front(ready)
            over = sample_a_look(slots, len(ready), ends, config, pick)
            wait_for_tools(called, late, ready, config)
            late |= called
            for r in [r for r, (_, run) in late.items() if run is None or run.done()]:
                call, run = late.pop(r)
                take_answer(tokenizer, r, observe(r, call, run and run.result()), config)
            called = {}
            for r in over:
                if call := end_turn(tokenizer, r, ends, config):
                    if must_run(r, call) and (call.code not in runs or gave_out(runs[call.code])):
                        runs[call.code] = pool.submit(lambda code: tool.run([code])[0], call.code)
                    called[r] = call, runs[call.code] if must_run(r, call) else None


def gave_out(run):
    """Equal programs run once, but nobody inherits a time-out or a fault of the machine."""
    return run.done() and run.result().outcome in ("timeout", "sandbox_error")


def sample_a_look(slots, n, ends, config, pick):
    """Sample `look` tokens in the first n slots; the rollouts whose turn is over."""
    if not n:
        return []
    slots.catch_up(n, config.micro_batch_tokens)
    for i, (r, ids) in enumerate(zip(slots.seats, slots.sample(n, config.look, pick))):
        ids = up_to_end(ids, ends)[:config.max_response - r.response_len]
        r.extend(ids, len(r.turns))
        slots.fed[i] = len(r.ids) - 1
    return [r for r in slots.seats[:n] if turn_is_over(r, ends, config)]


def wait_for_tools(called, late, ready, config):
    """Wait for the calls of the last look; for any call where nothing else is left to do."""
    runs = [run for _, run in called.values() if run]
    if runs:
        wait(runs, config.tool_wait)
    elif not ready and not called:
        wait([run for _, run in late.values()], return_when=FIRST_COMPLETED)


ENGINES = {"slots": sample_by_slots, "generate": sample_by_generate}


# --- Scoring: log-probabilities of exactly the ids that were sampled ---------------------------


def micro_batches(lengths, budget):
    """Cut rows into batches of at most `budget` padded tokens, rows of like length together.

    A row that is longer than the budget is a batch of its own.
    """
    order, batch = sorted(range(len(lengths)), key=lambda i: lengths[i]), []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def pad(rows, value, device):
    """Lists or 1-D tensors of unequal length -> (B, T), padded on the right."""
    rows = [torch.as_tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, True, value).to(device)


def hidden_states(model, ids):
    """(B, T) ids -> (B, T, D). Right padding needs no mask: a causal model never looks at it."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def sampled_hidden(model, ids, step_id):
    """The hidden states from which the student's tokens were, or might have been, predicted.

    ids      (B, T)
    step_id  (B, T) on the CPU, where finding the tokens makes no one wait for a GPU
    returns  (N, D) for the N tokens with step_id >= 0, row by row, and their places in (B, T).
             Prompts and tool answers are read, but never multiplied with the vocabulary
    """
    hidden = hidden_states(model, ids)  # (B, T, D)
    rows, columns = (x.to(ids.device) for x in (step_id[:, 1:] >= 0).nonzero(as_tuple=True))
    at = rows * ids.shape[1] + columns  # position t predicts token t+1
    return hidden.flatten(0, 1).index_select(0, at), (rows, columns + 1)


def sampled_logprobs(model, ids, step_id, temperature, entropy=False):
    """(B, T) log-probability of each sampled token given all before it; 0 for every other token.

    With entropy=True also the (B, T) entropy of the distributions they were drawn from, nats.
    """
    hidden, places = sampled_hidden(model, ids, step_id)
    found = token_logprobs(hidden, model.get_output_embeddings().weight, ids[places], temperature,
                           entropy)
    return tuple(spread(x, places, ids) for x in found) if entropy else spread(found, places, ids)


def spread(values, places, like):
    """(N,) values at their places in a (B, T) of zeros."""
    return values.new_zeros(like.shape).index_put(places, values)


@torch.no_grad()
def score(model, rollouts, config, prompts=None):
    """Log-probability and entropy of each sampled token, on the ids that were sampled.

    prompts  prompt ids of each rollout where the scorer sees another prompt than the student
    returns  (B, T) logp and (B, T) entropy in nats, on the CPU, aligned with the student's ids
    """
    width = max(len(r.ids) for r in rollouts)
    logp, entropy = torch.zeros(len(rollouts), width), torch.zeros(len(rollouts), width)
    rows, marks = as_seen(rollouts, prompts)
    for batch in micro_batches([len(row) for row in rows], config.micro_batch_tokens):
        ids = pad([rows[i] for i in batch], 0, model.device)
        step_id = pad([marks[i] for i in batch], -1, "cpu")
        found = sampled_logprobs(model, ids, step_id, config.temperature, entropy=True)
        for i, *row in zip(batch, *(x.float().cpu() for x in found)):
            r, response = rollouts[i], slice(len(rows[i]) - rollouts[i].response_len, len(rows[i]))
            logp[i, r.prompt_len:len(r.ids)] = row[0][response]
            entropy[i, r.prompt_len:len(r.ids)] = row[1][response]
    return logp, entropy


def as_seen(rollouts, prompts=None):
    """ids and step ids of each rollout, after other prompts than its own where these are given."""
    if prompts is None:
        return [r.ids for r in rollouts], [r.step_id for r in rollouts]
    return ([p + r.ids[r.prompt_len:] for p, r in zip(prompts, rollouts)],
            [[-1] * len(p) + r.step_id[r.prompt_len:] for p, r in zip(prompts, rollouts)])


@dataclass
class Scored:
    """A batch of rollouts with everything the update needs; (B, T) unless said otherwise."""
    rollouts: list[Rollout]
    step_id: torch.Tensor     # k or -1
    failed: torch.Tensor      # (B, K) bool: the call of step k failed
    A: torch.Tensor           # (B,)
    logp_t: torch.Tensor      # the teacher, nats; equal to logp_s where there is none
    entropy_t: torch.Tensor   # nats
    logp_s: torch.Tensor      # the old policy, nats
    entropy_s: torch.Tensor   # nats
    d: torch.Tensor           # (B, K) nats/token
    w: torch.Tensor           # (B, K)
    advantages: torch.Tensor  # A_it
    fresh: bool               # the old policy is still the student: its update fills in the rest


def valid_rows(rollouts):
    """(B,) bool: False where the machine failed the rollout."""
    return torch.tensor([r.finish != "infrastructure" for r in rollouts])


def score_batch(agent, rollouts, config):
    """Lines 3 to 6 of README's method: log-probabilities, A, d, w and the token advantages."""
    valid = valid_rows(rollouts)
    if not valid.any():
        raise ValueError("the sandbox failed a program of every rollout of this step, four times "
                         "each; see what this machine lacks (processes, memory), then resume")
    step_id = pad([r.step_id for r in rollouts], -1, "cpu")  # (B, T)
    failed = pad([[o not in FINE for o in r.outcomes] for r in rollouts], False, "cpu")  # (B, K)
    A = group_advantages(torch.tensor([r.reward for r in rollouts]), config.group_size, valid)
    # With one update a batch, that update's own forward pass is the old policy's: no second one.
    # Weights that are relative to the batch's mean must know all of the batch before.
    fresh = config.updates_per_step == 1 and config.weights not in BATCHWIDE
    logp_s, entropy_s = (torch.zeros(step_id.shape) for _ in range(2)) if fresh else score(
        agent.student, rollouts, config)
    logp_t, entropy_t = logp_s, entropy_s
    if METHODS[config.method].view:
        with visiting(agent.teacher, agent.student.device, config.offload != "none"):
            logp_t, entropy_t = score(agent.teacher, rollouts, config,
                                      teacher_prompts(agent, rollouts))
    empty = (torch.zeros(shape) for shape in (failed.shape, failed.shape, step_id.shape))
    scored = Scored(rollouts, step_id, failed, A, logp_t, entropy_t, logp_s, entropy_s,
                    *empty, fresh)
    if not fresh:
        weigh(scored, slice(None), config)
    return scored


def weigh(scored, at, config):
    """Lines 5 and 6 of README's method on some rows: divergence, weights, token advantages."""
    method, step_id = METHODS[config.method], scored.step_id[at]
    logp_s, logp_t = scored.logp_s[at], scored.logp_t[at]
    d = step_divergence(logp_s, logp_t, step_id, scored.d.shape[1])
    scheme = config.weights if method.weights == "sod" else "uniform"
    w = WEIGHTS[scheme](d, scored.failed[at], step_tokens(step_id, d.shape[1]), config)
    coef = config.opd_coef if config.kl == "sampled" else 0.0  # full: the KL joins as a loss
    scored.d[at], scored.w[at] = d, w
    scored.advantages[at] = token_advantages(config.method, scored.A[at], logp_s, logp_t, step_id,
                                             w, coef)


@contextmanager
def visiting(model, device, wanted=True):
    """The model on `device` for a while, where it is `wanted` there, then back home."""
    home = model.device
    if wanted:
        model.to(device)
    try:
        yield
    finally:
        model.to(home)


def teacher_prompts(agent, rollouts):
    """The prompt as the scorer sees it: the student's own, or one with privileged text."""
    view = METHODS[agent.config.method].view
    if view == "teacher":
        return None
    return [encode_prompt(agent.tokenizer, r.problem, agent.config.system, view) for r in rollouts]


# --- Update -----------------------------------------------------------------------------------


class Optimizer:
    """AdamW on fp32 weights, whatever the model computes in.

    At lr 1e-6 a step is far below the spacing of bf16 numbers (2^-8 of the weight), so a bf16
    weight that is updated in place never moves. A weight is therefore fp32, in two halves: the
    bf16 number that the model computes with, and in `low` the 16 bits that rounding took off. With
    the gradient and both moments in fp32 that is 16 bytes a parameter, and no bit less exact than
    AdamW on an fp32 model. With offload "all", 10 of the 16 lie in the CPU's memory and come over
    one piece after the other.
    """

    def __init__(self, model, lr, config):
        self.lr, self.taken, self.config = lr, 0, config
        self.weights = [p for p in model.parameters() if p.requires_grad]
        place = torch.device("cpu") if config.offload == "all" else model.device
        zeros = lambda dtype: [torch.zeros_like(p, dtype=dtype, device=place) for p in self.weights]
        self.m, self.v = zeros(torch.float32), zeros(torch.float32)
        self.low = zeros(torch.int16)
        for i, p in enumerate(self.weights):
            if p.dtype == torch.float32:
                self.low[i] = None
            p.register_post_accumulate_grad_hook(partial(self._collect, i))
        self.clear()

    def clear(self):
        """Forget the gradient."""
        self.grads = [None] * len(self.weights)

    def _collect(self, i, p):
        """Add p.grad to the fp32 sum over micro-batches, and free it."""
        if self.grads[i] is None:
            self.grads[i] = p.grad.float()
        else:
            self.grads[i] += p.grad
        p.grad = None

    @torch.no_grad()
    def step(self, scale=1.0):
        """Take one step with `scale` * lr; returns the gradient's norm before clipping.

        A step whose norm is not finite is not taken.
        """
        norm = float(torch.stack([g.norm() for g in self.grads if g is not None]).norm())
        if math.isfinite(norm):
            self.taken += 1
            shrink = min(1.0, self.config.grad_clip / (norm + 1e-6))
            for p, grad, *state in zip(self.weights, self.grads, self.low, self.m, self.v):
                for start in range(0, p.numel() if grad is not None else 0, PIECE):
                    piece = lambda x: None if x is None else x.view(-1)[start:start + PIECE]
                    self._adamw(piece(p), piece(grad), map(piece, state), scale * self.lr, shrink)
        self.clear()
        return norm

    def _adamw(self, p, grad, state, lr, shrink):
        """AdamW on one piece: flat views, changed in place."""
        c, t, g = self.config, self.taken, grad.mul_(shrink)
        state = list(state)
        low, m, v = (None if x is None else x.to(p.device) for x in state)  # offload "all": copies
        w = p if low is None else join(p, low)
        m.lerp_(g, 1 - c.beta1)
        v.mul_(c.beta2).addcmul_(g, g, value=1 - c.beta2)
        size = (v.sqrt() / math.sqrt(1 - c.beta2 ** t)).add_(1e-8)
        w.mul_(1 - lr * c.weight_decay).addcdiv_(m, size, value=-lr / (1 - c.beta1 ** t))
        if low is not None:
            split(w, p, low)
        for x, new in zip(state, (low, m, v)):
            if x is not new:
                x.copy_(new)

    def state_dict(self):
        """What to keep beside the model's own weights."""
        return {"taken": self.taken, "low": self.low, "m": self.m, "v": self.v}

    def load_state_dict(self, state):
        self.taken = state["taken"]
        for mine, theirs in ((self.low, state["low"]), (self.m, state["m"]), (self.v, state["v"])):
            for x, y in zip(mine, theirs, strict=True):
                if x is not None:
                    x.copy_(y)
        self.clear()


PIECE = 2 ** 24  # weights at a time: an fp32 copy of a whole embedding would take 1.2 GiB


def join(p, low):
    """bf16 weights and the bits they lost -> the fp32 weights, exactly."""
    return ((p.view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def split(w, p, low):
    """fp32 weights -> the nearest bf16 into p, and what it lacks, -32768..32767, into low."""
    bits = w.view(torch.int32)
    nearest = (bits + 2 ** 15) >> 16
    p.view(torch.int16).copy_(nearest)
    low.copy_(bits - (nearest << 16))


def update(agent, scored, rows, config):
    """One optimiser step on some rollouts of a batch: (norm, loss, share of clipped tokens)."""
    lengths = [len(scored.rollouts[i].ids) for i in rows]
    num_tokens = int((scored.step_id[rows] >= 0).sum())
    if not num_tokens:  # the machine failed all of them
        return 0.0, 0.0, 0.0
    loss, clipped = surviving(agent, config, "micro_batch_tokens", lengths,
                              lambda c: gradient(agent, scored, rows, lengths, num_tokens, c))
    scale = min(1.0, (agent.optimizer.taken + 1) / max(config.warmup, 1))
    return take_step(agent, loss, scale), loss, clipped / num_tokens


def gradient(agent, scored, rows, lengths, num_tokens, config):
    """Leave the gradient of some rollouts with the optimiser; (loss, number of clipped tokens)."""
    totals = torch.zeros(2, device=agent.student.device)  # read once: each read waits for the GPU
    for batch in micro_batches(lengths, config.micro_batch_tokens):
        loss, clipped = batch_loss(agent, scored, [rows[i] for i in batch], num_tokens, config)
        loss.backward()
        totals += torch.stack([loss.detach(), clipped])
    return totals.tolist()


def take_step(agent, loss, scale):
    """Move the weights, unless loss or gradient is not finite; the norm, nan if it was the loss."""
    if math.isfinite(loss):
        return agent.optimizer.step(scale)
    agent.optimizer.clear()
    return math.nan


def batch_loss(agent, scored, at, num_tokens, config):
    """Loss of the rows `at`, as their share of the step's, and their number of clipped tokens."""
    device, width = agent.student.device, max(len(scored.rollouts[i].ids) for i in at)
    ids = pad([scored.rollouts[i].ids for i in at], 0, device)
    step_id = scored.step_id[at, :width]
    hidden, places = sampled_hidden(agent.student, ids, step_id)  # (N, D)
    head = agent.student.get_output_embeddings().weight
    logp = token_logprobs(hidden, head, ids[places], config.temperature, entropy=scored.fresh)
    if scored.fresh:
        logp, entropy = logp
        scored.logp_s[at, :width] = spread(logp.detach(), places, ids).cpu()
        scored.entropy_s[at, :width] = spread(entropy, places, ids).cpu()
        weigh(scored, at, config)
    logp = spread(logp, places, ids)  # (B, T)
    old, advantages = (x[at, :width].to(device) for x in (scored.logp_s, scored.advantages))
    mask = step_id.to(device) >= 0
    loss = policy_loss(logp, old, advantages, mask, config.clip_low, config.clip_high,
                       config.clip_dual, num_tokens)
    if config.kl == "full" and METHODS[config.method].view:
        kl = full_kl(agent, [scored.rollouts[i] for i in at], hidden, config)  # (N,)
        w = scored.w[at].to(device)[places[0], step_id.to(device)[places]]  # of each token's step
        loss = loss + config.opd_coef * (w * kl).sum() / max(num_tokens, 1)
    ratio = torch.where(mask, logp.detach() - old, 0.0).exp()
    return loss, ((ratio < 1 - config.clip_low) | (ratio > 1 + config.clip_high)).sum()


def full_kl(agent, rollouts, hidden, config):
    """Exact KL(student || teacher) where each sampled token was drawn: (N,) nats (kl="full")."""
    rows, marks = as_seen(rollouts, teacher_prompts(agent, rollouts))
    with torch.no_grad():
        seen, _ = sampled_hidden(agent.teacher, pad(rows, 0, agent.teacher.device),
                                 pad(marks, -1, "cpu"))
    head_s, head_t = (m.get_output_embeddings().weight.to(hidden.device)
                      for m in (agent.student, agent.teacher))
    return reverse_kl(hidden, head_s, seen.to(hidden.device), head_t, config.temperature)


# --- Steps that survive -----------------------------------------------------------------------

SMALLEST = ("out of memory with one rollout at a time; lower --max_response, and try "
            "--gradient_checkpointing true, --offload all or --rollout_engine generate")


def surviving(agent, config, option, lengths, work):
    """work(config); where memory runs out, again with half of an option, until it suffices.

    option   rollout_batch or micro_batch_tokens: how much is worked on side by side
    lengths  what each rollout takes of it; one at a time is the least there is

    It is the same step again, with the same samples and, up to the rounding of sums, the same
    gradient: no weight has moved, and every random number belongs to its rollout. The new size is
    kept for the rest of the run.
    """
    while True:
        smaller = replace(config, **agent.smaller)
        try:
            return work(smaller)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # Behind the except: its traceback, which held on to every tensor of the attempt, is gone.
        forget_gradient(agent)
        size = min(getattr(smaller, option), max(lengths) * len(lengths))
        if size <= max(lengths):
            raise ValueError(SMALLEST)
        agent.smaller[option] = max(size // 2, max(lengths))
        agent.shortages += 1


def out_of_memory(error):
    """Is it this error? Every device, and each library on it, says so in its own way."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED"))


def forget_gradient(agent):
    for p in agent.student.parameters():
        p.grad = None
    if agent.optimizer:
        agent.optimizer.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fault_of_scores(scored):
    """Where a log-probability is not finite, in a sentence; "" if all of them are."""
    for name, logp in (("student", scored.logp_s), ("teacher", scored.logp_t)):
        bad = ((scored.step_id >= 0) & ~logp.isfinite()).nonzero().tolist()
        if bad:
            i, t = bad[0]
            return (f"the {name}'s log-probability of token {t} of rollout {i} (its turn "
                    f"{int(scored.step_id[i, t]) + 1}) is {float(logp[i, t])}, as of {len(bad)} "
                    f"tokens in all; {REMEDIES[name]}")
    return ""


def fault_of_updates(updates):
    """The same of (norm, loss, ...) of optimiser steps."""
    for norm, loss, *_ in updates:
        for name, value in (("loss", loss), ("norm of the gradient", norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}; {REMEDIES['update']}"
    return ""


REMEDIES = {
    "student": "its weights are broken: begin anew with a lower --lr",
    "teacher": "it gives no chance to a token that was sampled, or its weights do not suit --dtype",
    "update": "lower --lr, or try --dtype float32",
}
NOT_TAKEN = (math.nan,) * 3  # what update() would have returned


def judge(agent, fault, **batch):
    """Count the steps in a row that could not be taken; keep the newest one's batch for study."""
    agent.refused = agent.refused + 1 if fault else 0
    agent.aside = {"fault": fault, **batch} if fault else None


def stop_if_refused(agent, config):
    if agent.refused >= config.max_refused:
        raise ValueError(f"{agent.refused} steps in a row could not be taken; in the last one "
                         f"{agent.aside['fault']}")


# --- Training ---------------------------------------------------------------------------------


@dataclass
class Agent:
    """Everything a run holds on to."""
    config: Config
    student: torch.nn.Module | None  # None until its weights are loaded
    teacher: torch.nn.Module | None  # frozen; None where the method has none
    tokenizer: object
    tool: object                     # run(codes) -> observations
    practice: tuple = ([], 0)        # (problems or demonstrations as ids, how many were too long)
    notes: list = field(default_factory=list)  # what preflight found, as lines
    predicted: int = 0               # bytes at the peak of the memory plan
    before: int = 0                  # bytes taken before anything was loaded
    history: list = field(default_factory=list)  # the numbers of each step, for the health line
    told: dict = field(default_factory=dict)     # what it has said, and when
    optimizer: Optimizer | None = None
    scored: Scored | None = None     # the newest batch, for files and eyes
    step: int = 0                    # steps done: where a resumed run goes on
    saved: int = 0                   # the step of the newest save
    settled: bool = True             # the weights are those after `step` steps, and files say so
    stop: int = 0                    # number of the signal that asked this run to stop
    smaller: dict = field(default_factory=dict)  # options lowered where memory ran out
    shortages: int = 0               # how often it did
    refused: int = 0                 # steps in a row that could not be taken
    aside: dict | None = None        # why the newest one could not, and its batch


def train(config, agent=None):
    """Train the student with any method of METHODS, or imitate demonstrations (sft).

    A generator: yields one dict of numbers a step (README, Metrics to watch). Printing, files
    and evaluation live outside. Without `agent` it loads what `config` names; an agent that has
    done some steps goes on after them.
    """
    if agent is None:
        agent = load_agent(config)
        config = agent.config  # with the sizes that were left to the memory plan
    if config.method == "sft":
        yield from imitate(agent, config)
    elif config.method != "vanilla":
        yield from distil(agent, config)


def new_optimizer(agent, config):
    return Optimizer(agent.student, config.sft_lr if config.method == "sft" else config.lr, config)


def distil(agent, config):
    """Algorithm 1: sample, reward, score, weigh, update."""
    prompts, skipped = agent.practice
    agent.optimizer = agent.optimizer or new_optimizer(agent, config)
    for step in range(agent.step + 1, config.steps + 1):
        clock = [time.perf_counter()]
        seed_dropout(config, step)
        chosen = [p for p in draw(prompts, config.seed, (step - 1) * config.prompts_per_step,
                                  config.prompts_per_step) for _ in range(config.group_size)]
        agent.student.eval()
        rollouts = surviving(
            agent, config, "rollout_batch", [1] * len(chosen),
            lambda c: sample_rollouts(agent.student, agent.tokenizer, chosen, agent.tool, c,
                                      random_numbers(c.seed, "rollouts", step)))
        clock.append(time.perf_counter())
        agent.student.train()  # old and new policy are computed alike
        scored = agent.scored = surviving(
            agent, config, "micro_batch_tokens", [len(r.ids) for r in rollouts],
            lambda c: score_batch(agent, rollouts, c))
        clock.append(time.perf_counter())
        agent.settled = False  # until the weights have moved and the step is written down
        updates = updates_of(agent, scored, config)
        clock.append(time.perf_counter())
        agent.step = step
        yield {"step": step, **batch_metrics(scored, config), **update_metrics(updates),
               "skipped": skipped, **machine_metrics(clock, scored, agent)}
        stop_if_refused(agent, config)


def updates_of(agent, scored, config):
    """The optimiser steps on one batch; none is taken on scores that are not finite."""
    size = len(scored.rollouts) // config.updates_per_step
    parts = [list(range(i, i + size)) for i in range(0, len(scored.rollouts), size)]
    fault = fault_of_scores(scored)
    updates = [NOT_TAKEN if fault else update(agent, scored, rows, config) for rows in parts]
    judge(agent, fault or fault_of_scores(scored) or fault_of_updates(updates),
          ids=[r.ids for r in scored.rollouts], step_id=scored.step_id, logp_s=scored.logp_s,
          logp_t=scored.logp_t, advantages=scored.advantages)
    return updates


def imitate(agent, config):
    """Supervised fine-tuning on demonstrations (method sft): the cold start before SOD."""
    pairs, skipped = agent.practice
    agent.optimizer = agent.optimizer or new_optimizer(agent, config)
    agent.student.train()
    total = math.ceil(config.sft_epochs * len(pairs) / config.sft_batch)
    for step in range(agent.step + 1, total + 1):
        clock = time.perf_counter()
        seed_dropout(config, step)
        batch = draw(pairs, config.seed, (step - 1) * config.sft_batch, config.sft_batch)
        warm, done = max(0.1 * total, 1), step / total
        scale = min(step / warm, 0.5 * (1 + math.cos(math.pi * max(done - 0.1, 0) / 0.9)))
        agent.settled = False
        loss, norm = imitation_step(agent, batch, config, scale)
        judge(agent, fault_of_updates([(norm, loss)]), ids=[ids for ids, _ in batch],
              step_id=[step_id for _, step_id in batch])
        agent.step = step
        yield {"step": step, "steps": total, "loss": loss, "grad_norm": norm,
               "not_taken": int(agent.refused > 0), "skipped": skipped,
               "seconds": time.perf_counter() - clock, **trouble_metrics(agent)}
        stop_if_refused(agent, config)


def imitation_step(agent, batch, config, scale=1.0):
    """One optimiser step on (ids, step_id) pairs: mean cross-entropy of the assistant's tokens."""
    loss = surviving(agent, config, "micro_batch_tokens", [len(ids) for ids, _ in batch],
                     lambda c: imitation_gradient(agent, batch, c))
    return loss, take_step(agent, loss, scale)


def imitation_gradient(agent, batch, config):
    """Leave the gradient with the optimiser; the loss."""
    num_tokens, total = max(sum(k >= 0 for _, step_id in batch for k in step_id), 1), 0.0
    for at in micro_batches([len(ids) for ids, _ in batch], config.micro_batch_tokens):
        ids = pad([batch[i][0] for i in at], 0, agent.student.device)
        step_id = pad([batch[i][1] for i in at], -1, "cpu")
        loss = -sampled_logprobs(agent.student, ids, step_id, 1.0).sum() / num_tokens
        loss.backward()
        total += float(loss.detach())
    return total


def seed_dropout(config, step):
    """Dropout, in models that have it, is the only thing that torch's own generators decide."""
    torch.manual_seed(config.seed * 2**32 + step)


def draw(items, seed, start, count):
    """`count` items from place `start` of an endless list: all items, shuffled anew each epoch."""
    N = len(items)
    order = {epoch: random_numbers(seed, "order", epoch).permutation(N)
             for epoch in range(start // N, (start + count - 1) // N + 1)}
    return [items[order[n // N][n % N]] for n in range(start, start + count)]


def batch_metrics(scored, config):
    """What a batch of rollouts looks like; documented as a table in README.md.

    Rollouts that the machine failed are counted, and otherwise left out.
    """
    rollouts = [r for r in scored.rollouts if r.finish != "infrastructure"]
    token, K = scored.step_id >= 0, scored.d.shape[1]
    valid = valid_rows(scored.rollouts)
    turns = torch.tensor([len(r.outcomes) for r in scored.rollouts]) * valid
    step = torch.arange(K) < turns[:, None]  # (B, K)
    outcomes = Counter(o for r in rollouts for o in r.outcomes if o)
    calls, several = max(sum(outcomes.values()), 1), step.sum(1) > 1  # (B,) with later steps
    groups = scored.A.view(-1, config.group_size)
    mean = lambda x, where: float(x[where].mean())
    return {
        "reward": float(np.mean([r.reward for r in rollouts])),
        "right": float(np.mean([r.right for r in rollouts])),
        "groups_agree": float((groups == 0).all(1).float().mean()),
        "reverse_kl": mean(scored.logp_s - scored.logp_t, token),
        "entropy": mean(scored.entropy_s, token),
        "teacher_entropy": mean(scored.entropy_t, token),
        "d": mean(scored.d, step), "w": mean(scored.w, step),
        "w_quantiles": quantiles(scored.w[step]), "d_by_step": means_by_step(scored.d, step),
        "w_capped": mean((scored.w >= 1 + config.delta - 1e-6).float(), step),
        "d1_near_0": float((several & (scored.d[:, 0] < NEAR_0)).sum() / max(several.sum(), 1)),
        "turns": float(np.mean([len(r.turns) for r in rollouts])),
        "tool_calls": sum(outcomes.values()) / len(rollouts),
        "tool_fail": sum(n for o, n in outcomes.items() if o not in FINE) / calls,
        "outcomes": dict(outcomes), "faults": dict(Counter(faults(rollouts))),
        "cut_budget": float(np.mean([r.finish == "budget" for r in rollouts])),
        "cut_turns": float(np.mean([r.finish == "turns" for r in rollouts])),
        "infrastructure": int((~valid).sum()),
        "tokens": int(token.sum()),
    }


def quantiles(x):
    """(N,) -> its 10%, 25%, 50%, 75% and 90% quantiles."""
    return np.quantile(x.tolist(), [0.1, 0.25, 0.5, 0.75, 0.9]).tolist()


def means_by_step(x, step):
    """(B, K), and which of it are steps -> K means over the rollouts that have a k-th step."""
    return (torch.where(step, x, 0.0).sum(0) / step.sum(0)).tolist()


def faults(rollouts):
    """What went wrong in each failed call: the Python error by name, else the outcome."""
    for r in rollouts:
        called = [o for o in r.outcomes if o not in ("", "not_run")]
        for outcome, answer in zip(called, r.answers):
            error = re.search(r"^(\w+)(?::.*)?\s*\Z", answer.rstrip().rpartition("\n")[2])
            if outcome not in FINE:
                yield error[1] if outcome == "error" and error else outcome


def update_metrics(updates):
    """Means over the optimiser steps of one batch; steps with a non-finite norm are counted."""
    norms, losses, clipped = zip(*updates)
    return {"loss": float(np.mean(losses)), "clipped": float(np.mean(clipped)),
            "grad_norm": float(np.mean(norms)),
            "not_taken": sum(not math.isfinite(norm) for norm in norms)}


def machine_metrics(clock, scored, agent):
    """What the machine did; everything else depends on the seed alone."""
    rollout, scoring, updating = np.diff(clock).tolist()
    return {"seconds": clock[-1] - clock[0], "seconds_rollout": rollout, "seconds_score": scoring,
            "seconds_update": updating, "tokens_per_second":
            int((scored.step_id >= 0).sum()) / (clock[-1] - clock[0]), **trouble_metrics(agent)}


def trouble_metrics(agent):
    return {"out_of_memory": agent.shortages, "smaller": dict(agent.smaller),
            "tool_retries": getattr(agent.tool, "retried", 0)}


MACHINE = ("seconds", "tokens_per_second", "out_of_memory", "smaller", "tool_retries")


# --- Health: what the numbers of a run say, in words -------------------------------------------

NEAR_0 = 0.02  # nats/token: a usual d_k of .2 then gets w_k = .1 or less
WINDOW = 10    # steps in which a trend shows, and before a sentence is said again
HEALTH = {  # metric: (highest value without a word, why there, the sentence)
    "cut_budget": (0.3, "cut rollouts have no answer, and are all wrong alike",
                   "{:.0%} of rollouts were cut at the token budget: raise --max_response"),
    "cut_turns": (0.3, "the same", "{:.0%} of rollouts ran out of turns: raise --max_turns"),
    "groups_agree": (0.9, "the outcome advantage of a group that agrees is 0",
                     "{:.0%} of groups agree, so GRPO has nothing to learn from in them: raise "
                     "--group_size, or take problems that are sometimes solved"),
    "w_capped": (0.4, "a cap that is met so often has become the weight",
                 "w is at its cap in {:.0%} of steps: d falls after the first step; raise --delta "
                 "to tell those steps apart"),
    "d1_near_0": (0.3, "their later w_k are near 0 whatever the student does",
                  "d_1 is near 0 in {:.0%} of rollouts: distillation is off after their first "
                  "step; compare --weights floor"),
    "tool_fail": (0.3, "a third of all turns then teaches little", "tool failures {:.0%}{}"),
    "clipped": (0.2, "a clipped token has no gradient", "{:.0%} of tokens left the clip range: "
                "lower --lr or --updates_per_step"),
    "not_taken": (0, "rare in sound runs", "{:.0f} optimiser steps were not taken, a score, the "
                  "loss or the gradient was not finite: lower --lr, and look at runs/NAME/refused"),
    "teacher_entropy": (2.0, "the paper's lost teacher has 2.4 nats", "the teacher is lost, its "
                        "entropy is {:.1f} nats: does it know this system text and tool?"),
}


def health(history, config):
    """{topic: sentence} of what deserves a word, from the metrics of all steps so far."""
    m, found = history[-1], {}
    silent = silent_topics(config)
    for name, (limit, _, sentence) in HEALTH.items():
        if m.get(name, 0) > limit and name not in silent:
            found[name] = sentence.format(m[name], common_fault(m))
    if m.get("entropy", 1) < 0.1:  # one token in fifty is open
        found["entropy"] = (f"entropy fell below 0.1 nats ({m['entropy']:.2f}): the student has "
                            "stopped exploring; lower --lr, or raise --temperature")
    if m.get("tool_calls", 1) < 0.1:
        found["tool_calls"] = (f"the tool is hardly called ({m['tool_calls']:.2f} times a "
                               "rollout): say in --system how, or imitate first: --method sft")
    if m.get("infrastructure", 0):
        found["infrastructure"] = (f"the sandbox itself failed in {m['infrastructure']} rollouts, "
                                   "which are left out: see `python tools.py`, and whether the "
                                   "machine has memory left")
    if not math.isfinite(m.get("loss", 0)):
        found["loss"] = f"the loss is {m['loss']}: lower --lr, and start from an earlier checkpoint"
    return found | trends(history[-WINDOW:])


def silent_topics(config):
    """What means nothing to this method."""
    method = METHODS.get(config.method, METHODS["grpo"])
    agree = [] if method.outcome and config.group_size > 1 else ["groups_agree"]
    agree += [] if method.view else ["teacher_entropy"]
    sod = method.weights == "sod" and config.weights == "sod" and config.delta > 0
    return agree if sod else [*agree, "w_capped", "d1_near_0"]


def news(history, told, config):
    """The sentences of health() that were not said in the last WINDOW steps.

    told  {topic: step at which it was last said}, kept up to date
    """
    step = history[-1]["step"]
    for topic, sentence in health(history, config).items():
        if step >= told.get(topic, -WINDOW) + WINDOW:
            told[topic] = step
            yield sentence


def trends(window):
    """The sentences that need WINDOW steps of history."""
    found, values = {}, lambda name: [m[name] for m in window if name in m]
    if len(window) == WINDOW and rises(values("reverse_kl")):
        first, last = window[0]["reverse_kl"], window[-1]["reverse_kl"]
        found["reverse_kl"] = (f"reverse KL rises for {WINDOW} steps, {first:.2f} to {last:.2f}: "
                               "lower --lr")
    if len(window) == WINDOW and values("right") and max(values("right")) == 0:
        found["right"] = (f"no rollout was right for {WINDOW} steps: take easier problems, imitate "
                          "first (--method sft), or check the answers in the data")
    if len(window) == WINDOW and values("right") and min(values("right")) == 1:
        found["right"] = f"every rollout was right for {WINDOW} steps: take harder problems"
    return found


def rises(values):
    """True where nearly every later value is above nearly every earlier one, by a tenth in all."""
    pairs = [b > a for i, a in enumerate(values) for b in values[i + 1:]]
    half = len(values) // 2
    return bool(pairs) and np.mean(pairs) >= 0.85 and (
        np.mean(values[half:]) > 1.1 * np.mean(values[:half]) > 0)


def common_fault(m):
    """", 20 of 25 SyntaxError", from the counts of one step."""
    counts = Counter(m.get("faults", {})).most_common(1)
    return f", {counts[0][1]} of {sum(m['faults'].values())} {counts[0][0]}" if counts else ""


# --- Evaluation -------------------------------------------------------------------------------


def evaluate(model, agent, problems, config):
    """Sample every problem `eval_samples` times: a (problems, samples) array of right or wrong.

    The seeds are the same for every model; the tool falls silent at the same rate.
    """
    prompts, _ = fitting_prompts(agent, problems)
    model.eval()
    repeated = [p for p in prompts for _ in range(config.eval_samples)]
    rollouts = surviving(
        agent, config, "rollout_batch", [1] * len(repeated),
        lambda c: sample_rollouts(model, agent.tokenizer, repeated, agent.tool, c,
                                  random_numbers(c.seed, "evaluation", 0), c.eval_temperature,
                                  c.eval_top_p))
    return np.array([r.right for r in rollouts]).reshape(len(prompts), config.eval_samples)


def average_with_interval(correct, draws=10_000):
    """average@k in percent with its 95% interval from resampling problems.

    correct  (problems, k) of 0 and 1
    returns  mean, low, high; the samples of one problem stay together, since they are alike

    Where every sample is wrong (or right), resampling would claim certainty. A mean m shows P
    zeros with a chance of at most (1 - m)^P, so the high end is 1 - .025^(1/P): 11.6% for P = 30.
    """
    by_problem = np.asarray(correct, float).mean(1)
    P, mean = len(by_problem), by_problem.mean()
    if P == 1 or mean in (0, 1):
        reach = 1 - 0.025 ** (1 / P) if mean in (0, 1) else 1.0
        low, high = max(0.0, mean - reach), min(1.0, mean + reach)
    else:
        low, high = np.percentile(resampled_means(by_problem, draws), [2.5, 97.5]).clip(0, 1)
    return 100 * mean, 100 * low, 100 * high


def resampled_means(values, draws=10_000):
    """(draws,) means of P values drawn with replacement from the P given ones, spread to fit.

    Plain resampling has the variance of the biased estimator, 1/P in place of 1/(P - 1): too
    narrow for few problems. sqrt(P / (P - 1)) around the mean puts that right.
    """
    values, generator = np.asarray(values, float), np.random.default_rng(0)
    P, blocks = len(values), range(0, draws, 1000)  # in blocks, to bound the memory
    means = np.concatenate([values[generator.integers(0, P, (min(1000, draws - start), P))].mean(1)
                            for start in blocks])
    return values.mean() + math.sqrt(P / max(P - 1, 1)) * (means - values.mean())


# --- Memory: what a run will hold, before anything is loaded -----------------------------------
# From the shapes alone, for the worst case: every rollout fills its budget. The five moments of
# PHASES never overlap, so the peak is that of the fullest.

GIB = 2 ** 30
STATE_BYTES = {4: 8, 2: 10}  # a weight: AdamW's two moments; bf16 weights: their low halves too
PHASES = ("sampling", "forward", "scoring", "loss", "backward")
MARGIN = 0.1  # of the device stays free: an allocator cannot use every gap between its blocks


@dataclass(frozen=True)
class Shape:
    """What the memory of a decoder depends on."""
    weights: int  # how many
    layers: int
    V: int        # rows of the output matrix
    D: int        # width of the residual stream
    F: int        # width inside the MLP
    q: int        # query heads * head_dim
    kv: int       # key heads * head_dim; as many for the values
    heads: int    # of queries and of keys

    @classmethod
    def of(cls, model):
        c, heads = model.config, model.config.num_attention_heads
        kv_heads = getattr(c, "num_key_value_heads", None) or heads
        dim = getattr(c, "head_dim", None) or c.hidden_size // heads
        inner = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
        return cls(sum(p.numel() for p in model.parameters()), c.num_hidden_layers,
                   len(model.get_output_embeddings().weight), c.hidden_size, inner,
                   heads * dim, kv_heads * dim, heads + kv_heads)

    def kept(self, b):
        """Bytes a token that autograd keeps of one layer of Qwen3, in numbers of b bytes."""
        norms = 2 * (4 + 2 * b) * self.D          # two of them: fp32, divided by rms, scaled
        heads = (4 + 3 * b) * (self.q + self.kv)  # q, k: the same, rotated; v; what attention gives
        mlp = 4 * b * self.F                      # gate, silu(gate), up, their product
        return norms + heads + mlp + 4 * (2 + self.heads)  # 1 / rms of each norm

    def passing(self, b):
        """Bytes a token at the fullest moment of a forward pass without gradient."""
        mlp, rotation = 4 * self.D + 3 * self.F, self.D + 4 * (self.q + self.kv)
        return max(b * mlp, b * rotation, 3 * b * self.D + (8 + b) * self.q)  # or q's norm, in fp32


def skeleton(path):
    """A model on the meta device: every shape and no numbers, at once, whatever its size."""
    def read(path):
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    return load_pretrained(read, path)


def most_rollouts(config):
    """Rollouts that are ever asked for at once, in training or evaluation."""
    return max(config.prompts_per_step * config.group_size,
               config.eval_problems * config.eval_samples * bool(config.eval_data))


def memory_plan(config, student, teacher, b):
    """What a run holds at each of PHASES: {part: five numbers of bytes}.

    student, teacher  Shapes; teacher None where the method has none
    b                 bytes of a number the models compute in
    """
    s, t, width = student, teacher or student, config.max_prompt + config.max_response
    rows = min(config.rollout_batch, most_rollouts(config))
    tokens = max(config.micro_batch_tokens, width)  # one row alone may be longer than the budget
    cache = 2 * s.layers * s.kv * b * rows * width  # keys and values
    if config.rollout_engine == "slots":  # grows by half, beside the old; masks (tokens, width)
        cache, masks = int(2.5 * cache), min(tokens, rows * width) * (1 + (1 + b) * s.q // s.kv)
        reading = min(tokens, rows * width) * s.passing(b)
    else:  # generate() reads the whole prefix at each chunk; masks (rows, width, width)
        cache, masks = cache * (s.layers + 1) // s.layers, rows * width * (1 + b)
        reading = rows * width * s.passing(b)
    saved = s.layers * (b * s.D if config.gradient_checkpointing else s.kept(b))
    saved += (4 + 3 * b) * s.D  # the last norm
    again = s.kept(b) * config.gradient_checkpointing  # one layer is computed a second time
    sampled = tokens * config.max_response // width  # only these meet the vocabulary
    tile = 4 * min(TILE_ELEMENTS, sampled * s.V)  # of token_logprobs, fp32
    kept = 4 * sampled * s.V if sampled * s.V <= KEEP_ELEMENTS else tile
    beside = {4: 0 if kept > tile or kept < 4 * TILE_ELEMENTS else tile, 2: 3 * tile // 2}[b]
    tiles = (kept + beside) * (1 + (config.kl == "full"))
    gradient = 4 * s.weights + b * s.V * s.D  # summed in fp32, and the head's on its way
    state = (STATE_BYTES[b] if config.offload != "all" else 0) * s.weights
    at_home = config.offload == "none"
    plan = {
        "student": [b * s.weights] * 5,
        "AdamW": [state] * 5,
        "gradient": [0, 0, 0, gradient, gradient],
        "teacher": [n * b * t.weights * (teacher is not None)
                    for n in (at_home, True, True, at_home, at_home)],
        "KV cache": [cache, 0, 0, 0, 0],
        "activations": [reading + masks * width, tokens * max(s.passing(b), t.passing(b)),
                        (tokens + sampled) * b * max(s.D, t.D), tokens * saved,
                        tokens * (saved + again + 2 * b * s.F)],
        "logits": [28 * rows * s.V, 0, kept + tile, tiles + (4 + 2 * b) * s.D * sampled, 0],
    }
    if config.method == "vanilla":  # it samples, and no more
        plan = {part: plan[part][:1] for part in ("student", "KV cache", "activations", "logits")}
    return plan


def peak(plan, phases=slice(None)):
    """The sum at the fullest of some phases, bytes."""
    return max([sum(parts) for parts in zip(*plan.values())][phases])


def sized(config, student, teacher, b, room):
    """The config with each size that is 0 set to the largest power of two that fits in `room`."""
    most = {"micro_batch_tokens": (1 << 16, slice(1, None)),
            "rollout_batch": (most_rollouts(config), slice(1))}
    for name, (largest, phases) in most.items():
        size = 1 << largest.bit_length() - 1
        while size > 1 and getattr(config, name) == 0 and peak(memory_plan(
                replace(config, **{name: size}), student, teacher, b), phases) > room:
            size //= 2
        config = replace(config, **{name: getattr(config, name) or size})
    return config


def memory_table(plan):
    """The plan as lines: a row a part, a column a phase, GiB."""
    together = {"together": [sum(parts) for parts in zip(*plan.values())]}
    shown = {part: n for part, n in plan.items() if max(n) > 0.01 * peak(plan)}
    head = f"memory, GiB{'':6}" + "".join(f"{p:>10}" for p in PHASES[:len(together["together"])])
    return [head] + [f"  {part:15}" + "".join(f"{n / GIB:10.2f}" for n in numbers)
                     for part, numbers in (shown | together).items()]


def free_memory(device):
    """Bytes a run could take: of the GPU, else of this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])


def memory_taken(device):
    """The most bytes held so far: by tensors on a GPU, else by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- Loading ----------------------------------------------------------------------------------


def choose_device(config):
    """(device, dtype, the reason for both)."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in (device, getattr(config, "teacher_device", device).replace("same", device)):
        try:
            torch.device(name)
        except RuntimeError:
            raise ValueError(f"device {name!r} is none that torch knows; use cpu, cuda or cuda:1"
                             ) from None
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device} was asked for and no CUDA GPU is visible; "
                         "use --device cpu")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16,
             "auto": torch.bfloat16 if device.startswith("cuda") else torch.float32}[config.dtype]
    reason = ("as asked" if config.dtype != "auto" else
              "half the memory and full speed; the optimiser keeps fp32 weights"
              if dtype == torch.bfloat16 else "exact; bf16 is for GPUs")
    return torch.device(device), dtype, reason


def load_pretrained(read, path, **options):
    """read(path), such as from_pretrained, with one sentence in place of its traceback."""
    if Path(path).is_file():
        raise ValueError(f"{path} is a file; name the folder that holds the model")
    is_hub_id = str(path).count("/") == 1 and not str(path).startswith((".", "/"))
    if not path or not Path(path).exists() and not is_hub_id:
        raise ValueError(f"there is no folder {path!r}; name a folder that holds a model, "
                         "or a Hub id such as Qwen/Qwen3-0.6B")
    try:
        return read(path, **options)
    except Exception as error:  # transformers raises a dozen kinds for files it cannot use
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise ValueError(f"cannot load {path}: {first.strip()} A Hub id needs a machine that can "
                         "reach the Hub; a folder must hold a config, weights and a tokenizer."
                         ) from error


def load_model(path, device, dtype, init="pretrained"):
    """A causal language model whose shipped sampling settings cannot reach our rollouts."""
    if init == "random":
        config = load_pretrained(AutoConfig.from_pretrained, path)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model, read = load_pretrained(AutoModelForCausalLM.from_pretrained, path, dtype=dtype,
                                      output_loading_info=True)
        check_weights(path, read)
    # generate() fills every setting we leave open from model.generation_config: Qwen3 ships
    # temperature .6, top-k 20 and top-p .95. Keep them for the saved checkpoint only.
    model.shipped_generation = model.generation_config
    model.generation_config = GenerationConfig()
    return model.to(device).eval()


def check_weights(path, read):
    """transformers fills what a file lacks with random numbers, and only warns."""
    for verb, names in (("lack", read["missing_keys"]), ("hold", read["unexpected_keys"])):
        if names:
            raise ValueError(f"the weights of {path} {verb} {len(names)} tensors that its config "
                             f"does{' not' * (verb == 'hold')} name, such as {min(names)}; load "
                             "the folder again, or mend its config.json")


def check_window(name, model, config):
    window = getattr(model.config, "max_position_embeddings", None) or math.inf
    if config.max_prompt + config.max_response > window:
        raise ValueError(f"{name} reads {window} tokens; max_prompt {config.max_prompt} and "
                         f"max_response {config.max_response} are more: lower one of them")


def load_tokenizer(path):
    """The tokenizer, checked for what a conversation with a tool needs."""
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, path)
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} has no chat template or no end-of-turn token; "
                         "use a chat model such as Qwen/Qwen3-0.6B")
    probe = "a tool's text"
    try:
        seen = tokenizer.decode(encode_tool_turn(tokenizer, probe))
    except Exception as error:  # a template may raise anything
        seen = f"nothing ({error})"
    if probe not in seen:
        raise ValueError(f"the chat template of {path} does not show tool answers: it gave {seen}; "
                         "use a model whose template knows the role tool")
    if tools.TOOL_NAME not in tokenizer.decode(encode_prompt(tokenizer, EXAMPLE[0])):
        raise ValueError(f"the chat template of {path} does not tell the model of its tool, "
                         f"{tools.TOOL_NAME}; use a model whose template shows tools")
    return tokenizer


PROBES = [
    "Solve 12 + 3045 = ?\n\t1,024.50", "naïve 東京 🙂 e\u0301", "  print( 'x' )\r\n\n",
    "\\boxed{\\frac{1}{2}}", "<think>\n\n</think>",
    '<tool_call>\n{"a": 1}\n</tool_call><tool_response></tool_response>',
    "<|im_start|>user<|im_end|><|endoftext|>"]
EXAMPLE = (tools.Problem("Start with 12. Add 30.", "42"), [
    {"role": "assistant", "content": tools.render_tool_call("print(12 + 30)")},
    {"role": "tool", "content": "42"}, {"role": "assistant", "content": "\\boxed{42}"}])


def check_same_ids(student, teacher, tokenizer_s, tokenizer_t):
    """SOD compares log-probabilities id by id, so both sides must write the same ids."""
    for probe in PROBES:
        ids_s, ids_t = encode(tokenizer_s, probe), encode(tokenizer_t, probe)
        if ids_s != ids_t:
            at = next((i for i, (a, b) in enumerate(zip(ids_s, ids_t)) if a != b),
                      min(len(ids_s), len(ids_t)))
            where = f"they differ from token {at} of {probe!r}, {tokenizer_s.decode(ids_s[at:])!r}"
            break
    else:
        if tokenizer_s.eos_token_id == tokenizer_t.eos_token_id:
            return
        where = (f"their end-of-turn tokens differ, {tokenizer_s.eos_token} and "
                 f"{tokenizer_t.eos_token}")
    raise ValueError(f"{student} and {teacher} give different ids for the same text ({where}); "
                     "SOD compares log-probabilities id by id. Use two models of one family.")


def enable_checkpointing(model):
    """Recompute activations in backward; newer releases of transformers have a newer name."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def preflight(config):
    """All that can be known in seconds, before the weights: an Agent that still lacks its models.

    Every mismatch stops here with a sentence; what was found is in agent.notes. Sizes that were
    left to the memory plan are set in agent.config.
    """
    device, dtype, _ = choose_device(config)
    tokenizer, student = load_tokenizer(config.student), skeleton(config.student)
    check_vocabulary(config.student, student, tokenizer)
    check_window(config.student, student, config)
    if config.rollout_engine == "slots":
        check_slots(student)
    view, teacher, notes = getattr(METHODS.get(config.method), "view", ""), None, []
    if view == "teacher":
        other, teacher = load_tokenizer(config.teacher), skeleton(config.teacher)
        check_same_ids(config.student, config.teacher, tokenizer, other)
        check_vocabulary(config.teacher, teacher, tokenizer)
        check_window(config.teacher, teacher, config)
        check_rows(student, teacher, config)
        notes = [f"same ids on {len(PROBES)} probes", same_template(tokenizer, other)]
    elif view:  # self-distillation: the frozen start, told more
        teacher = student
    agent = Agent(config, None, None, tokenizer, None)
    agent.practice = load_practice(agent)
    agent.tool, milliseconds = load_tool(config)
    notes += [f"{len(agent.practice[0]):,} rows to learn from"] * (config.method != "vanilla")
    notes += [f"tool answers in {milliseconds:.0f} ms", room_on_disk(config, student, dtype)]
    agent.notes = ["preflight  " + ", ".join(notes)]
    plan_memory(agent, student, teacher, device, dtype)
    return agent


def load_agent(config, agent=None):
    """Student, teacher, tool and data, after a preflight unless `agent` has had it."""
    agent = agent or preflight(config)
    config = agent.config
    torch.manual_seed(config.seed)
    if config.threads:  # the embedded model is too small to share; the tool takes the other cores
        torch.set_num_threads(config.threads)
    device, dtype, _ = choose_device(config)
    student = agent.student = load_model(config.student, device, dtype, config.init)
    if config.init == "pretrained":
        check_likelihood(config.student, student, agent)
    if config.gradient_checkpointing:
        enable_checkpointing(student)
    view = getattr(METHODS.get(config.method), "view", "")
    if view == "teacher":
        agent.teacher = load_model(config.teacher, device, dtype)
        check_likelihood(config.teacher, agent.teacher, agent)
    elif view:  # self-distillation: the frozen start, told more
        agent.teacher = copy.deepcopy(student).eval()
    if agent.teacher is not None:
        agent.teacher.requires_grad_(False)
        there = device if config.teacher_device == "same" else config.teacher_device
        agent.teacher.to("cpu" if config.offload != "none" else there)
    return agent


def load_practice(agent):
    """What the student learns from, as ids: (problems or demonstrations, how many are too long)."""
    config = agent.config
    if config.method == "vanilla":
        return [], 0
    if config.method == "sft":
        return fitting_demonstrations(agent, tools.load_demonstrations(config.demonstrations))
    problems = tools.load_problems(config.train_data)
    check_view(problems, config)
    return fitting_prompts(agent, problems)


def load_tool(config):
    """The sandbox, tried once, and the milliseconds a call takes.

    It refuses to start where it cannot contain a program.
    """
    modules = tuple(filter(None, config.tool_modules.split(",")))
    for name in modules:
        if not name.isidentifier() or importlib.util.find_spec(name) is None:
            raise ValueError(f"tool_modules names {name!r}, which is not installed; pip install "
                             "it, or leave it out of --tool_modules")
    tool = tools.PythonTool(timeout=config.tool_timeout, max_chars=config.tool_chars,
                            modules=modules,
                            unsafe=config.tool_unsafe)
    try:
        tool.run(["1"])  # starts it
    except RuntimeError as error:
        raise ValueError(f"{error} On the command line: --tool_unsafe true.") from None
    seen = tool.run(["print(1 + 1)"])[0]
    if seen.text.strip() != "2":
        raise ValueError(f"the tool answers {seen.text.strip()!r} ({seen.outcome}) to "
                         "print(1 + 1), not 2; see what `python tools.py` says, or raise "
                         "--tool_timeout")
    return tool, 1000 * seen.seconds


def check_vocabulary(path, model, tokenizer):
    """Each id the tokenizer can write needs a row of the model."""
    rows, largest = len(model.get_output_embeddings().weight), max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(f"the tokenizer writes ids up to {largest} and {path} has {rows} "
                         "vocabulary rows; use the tokenizer that the model was trained with")


def check_rows(student, teacher, config):
    rows_s, rows_t = (len(m.get_output_embeddings().weight) for m in (student, teacher))
    if config.kl == "full" and rows_s != rows_t:
        raise ValueError(f"student and teacher have {rows_s} and {rows_t} vocabulary rows; "
                         "--kl full compares row by row, so use --kl sampled")


def same_template(tokenizer_s, tokenizer_t):
    """Whether the teacher's own template writes what the student's does; what to expect if not."""
    ids_s, ids_t = (encode_demonstration(t, *EXAMPLE)[0] for t in (tokenizer_s, tokenizer_t))
    if ids_s == ids_t:
        return "same template"
    at = next((i for i, (a, b) in enumerate(zip(ids_s, ids_t)) if a != b),
              min(len(ids_s), len(ids_t)))
    return (f"NOTE: their templates differ from token {at} on "
            f"({tokenizer_s.decode(ids_s[at:at + 8])!r}, the teacher's "
            f"{tokenizer_t.decode(ids_t[at:at + 8])!r}), and the teacher scores the student's")


def room_on_disk(config, student, dtype):
    """Two checkpoints with the optimiser's state, a third while it is written, and the weights."""
    each = (dtype.itemsize + STATE_BYTES[dtype.itemsize]) * Shape.of(student).weights
    need, place = 3 * each + dtype.itemsize * Shape.of(student).weights, Path(config.out).resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < need and config.preflight and config.method != "vanilla":
        raise ValueError(f"{free / GIB:.1f} GiB are free in {place} and the checkpoints need "
                         f"{need / GIB:.1f}; make room, choose another --out, or go on all the "
                         "same: --preflight false")
    return f"{free / GIB:.0f} GiB free on disk of {need / GIB:.2f} needed"


def plan_memory(agent, student, teacher, device, dtype):
    """Set the sizes left open, note the plan, refuse one that does not fit."""
    config, b, free = agent.config, dtype.itemsize, free_memory(device)
    shapes = [Shape.of(student), Shape.of(teacher) if teacher is not None else None]
    if config.teacher_device != "same":
        shapes[1] = None  # another device's memory
    room = (1 - MARGIN) * free
    config = agent.config = sized(config, *shapes, b, room)
    plan = memory_plan(config, *shapes, b)
    agent.predicted, agent.before = peak(plan), memory_taken(device)
    there = f"{room / GIB:.1f} GiB ({free / GIB:.1f} free on {device}, less {MARGIN:.0%})"
    agent.notes += memory_table(plan)
    agent.notes.append(f"  peak {peak(plan) / GIB:.2f} of {there}; rollout_batch "
                       f"{config.rollout_batch}, micro_batch_tokens {config.micro_batch_tokens}")
    if peak(plan) > room and config.preflight:
        part = max(plan, key=lambda name: max(plan[name]))
        raise ValueError(
            f"the run needs {peak(plan) / GIB:.1f} GiB of {there}; most of it is {part}, "
            f"{max(plan[part]) / GIB:.1f} GiB. Lower --max_response, --rollout_batch or "
            "--micro_batch_tokens, set --gradient_checkpointing true, or go on all the same: "
            "--preflight false")


def memory_verdict(agent):
    """The plan against what was taken, once the optimiser's state exists."""
    device = agent.student.device
    taken = memory_taken(device) - (0 if device.type == "cuda" else agent.before)
    how = "by its tensors" if device.type == "cuda" else "growth of the whole process"
    return (f"memory  peak of the plan {agent.predicted / GIB:.2f} GiB, measured {taken / GIB:.2f} "
            f"({how})")


@torch.no_grad()
def check_likelihood(path, model, agent):
    """A model that knows its own template finds a simple conversation likelier than chance."""
    ids, step_id = encode_demonstration(agent.tokenizer, *EXAMPLE)
    ids, step_id = torch.tensor([ids], device=model.device), torch.tensor([step_id])
    logp = sampled_logprobs(model, ids, step_id, 1.0).cpu()
    mean = float(logp[step_id >= 0].mean())
    chance = -math.log(len(model.get_output_embeddings().weight))
    if not mean > 0.9 * chance and agent.config.preflight:  # NaN too; chance varies by some percent
        raise ValueError(f"{path} gives a plain tool call in its own template {mean:.2f} nats a "
                         f"token, and chance is {chance:.2f}: its weights are random, damaged or "
                         "for another tokenizer; load them again, use --init random for a student "
                         "that is to start from nothing, or go on all the same: --preflight false")
    agent.notes.append(f"likelihood  {path}: {mean:.2f} nats a token of its own turns, chance "
                       f"{chance:.2f}")


def fitting_prompts(agent, problems):
    """[(Problem, ids)] of the problems whose prompt fits the budget, and how many do not."""
    limit = agent.config.max_prompt
    prompts = [(p, encode_prompt(agent.tokenizer, p, agent.config.system)) for p in problems]
    kept = [(p, ids) for p, ids in prompts if len(ids) <= limit]
    if not kept:
        raise ValueError(f"all {len(prompts)} prompts are longer than {limit} tokens (the shortest "
                         f"has {min(len(ids) for _, ids in prompts)}); raise --max_prompt")
    return kept, len(prompts) - len(kept)


def fitting_demonstrations(agent, rows):
    """[(ids, step_id)] of the conversations that fit both budgets, and how many do not."""
    limit = agent.config.max_prompt + agent.config.max_response
    pairs = [encode_demonstration(agent.tokenizer, problem, turns, agent.config.system)
             for problem, turns in rows]
    kept = [pair for pair in pairs if len(pair[0]) <= limit]
    if not kept:
        raise ValueError(f"all {len(pairs)} demonstrations are longer than {limit} tokens; "
                         "raise --max_response")
    return kept, len(pairs) - len(kept)


def check_view(problems, config):
    """Self-distillation needs something to tell the teacher."""
    view = METHODS[config.method].view
    missing = sum(not getattr(p, view, "") for p in problems)
    if view in ("answer", "hint") and missing:
        raise ValueError(f"{missing} of {len(problems)} problems in {config.train_data} have no "
                         f"{view}; method {config.method} needs one in every row")


# --- Files ------------------------------------------------------------------------------------


LOGS = ("metrics.jsonl", "clock.jsonl", "rollouts.jsonl")  # they grow by lines with each step


def open_run_folder(config):
    """runs/NAME, new and writable with the settings in it, or one to go on with."""
    name = config.name or f"{config.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.resume or Path(config.out) / name)
    try:
        folder.mkdir(parents=True, exist_ok=bool(config.resume))
        if not config.resume:
            write_config(config, folder)
    except FileExistsError:
        raise ValueError(f"{folder} exists already; go on with it by --resume {folder}, or give "
                         "this run another --name") from None
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; choose another --out"
                         ) from None
    if (folder / "checkpoint").exists() and not (folder / "saves").exists():
        raise ValueError(f"{folder} is finished; to train its result further, start a run with "
                         f"--student {folder / 'checkpoint'}")
    return folder


def write_config(config, folder):
    settings = {k: v for k, v in asdict(config).items() if k not in ("resume", "change")}
    tools.write_whole(folder / "config.json", json.dumps(settings, indent=1) + "\n")


def resumed_config(given):
    """The settings of an interrupted run, and what is given now; a difference must be wanted.

    given  {option: value} of the command line, "resume" among them
    """
    folder = Path(given["resume"])
    if not (folder / "config.json").exists():  # not a folder: the name of a run
        folder = Path(given.get("out", Config.out)) / folder
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{given['resume']} holds no run to resume (no config.json that can be "
                         "read); name its folder, such as runs/NAME") from None
    known = {f.name: f.default for f in fields(Config)}
    if stored.keys() - known.keys():
        raise ValueError(f"{folder}/config.json has options unknown to this version: "
                         f"{', '.join(sorted(stored.keys() - known.keys()))}")
    settings = {**known, **stored, "resume": str(folder), "change": given.get("change", False)}
    left_open = [k for k in ("rollout_batch", "micro_batch_tokens") if given.get(k) == 0]
    changed = {k: v for k, v in given.items()
               if k not in ["resume", *left_open] and settings[k] != v}
    if changed and not given.get("change"):
        listed = ", ".join(f"{k} {v!r} (was {settings[k]!r})" for k, v in changed.items())
        raise ValueError(f"{folder} ran with other options: {listed}; leave them out to go on as "
                         "before, or add --change true to go on with the new ones")
    return Config(**{**settings, **changed})


def write_step(agent, m, folder):
    """The numbers and rollouts of a step, as lines of the logs; a batch not taken, for study.

    What the machine did goes to a file of its own, so that the others depend on the seed alone.
    """
    clock = {k: v for k, v in m.items() if k.startswith(MACHINE)}
    rows = ([{k: plain(v) for k, v in m.items() if k not in clock}], [{"step": m["step"], **clock}],
            list(rollout_rows(agent.scored, m["step"], agent.tokenizer, agent.config.store_tokens))
            if agent.scored else [])
    with tools.writing(folder):
        for name, new in zip(LOGS, rows):
            tools.append_rows(folder / name, new)
        if agent.aside:
            (folder / "refused").mkdir(exist_ok=True)
            with open(folder / "refused" / f"step-{m['step']}.pt", "wb") as file:
                torch.save(agent.aside, file)


def token_pieces(tokenizer, ids):
    """The text of each token; joined, the text of all, control tokens included.

    A byte-level token may end inside a character: it gets "", and the token that completes the
    character gets both.
    """
    pieces, pending = [], []
    for i in ids:
        pending.append(i)
        text = tokenizer.decode(pending)
        whole = not text.endswith("\ufffd")  # what stands for the bytes of half a character
        pieces.append(text if whole else "")
        pending = [] if whole else pending
    if pending:  # bytes that no token completed
        pieces[-1] = tokenizer.decode(pending)
    return pieces


def plain(value):
    """A number or list as JSON can hold it: it knows neither NaN nor infinity, they become null."""
    if isinstance(value, list):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rounded(values, digits):
    """(N,) tensor -> numbers that JSON can hold."""
    return [plain(round(v, digits) + 0.0) for v in values.tolist()]  # + 0.0: no -0.0


def token_row(scored, i, k, tokenizer):
    """The tokens of step k of rollout i, log-probabilities and advantages to three decimals."""
    r, at = scored.rollouts[i], scored.step_id[i] == k  # (T,)
    ids = [token for token, step in zip(r.ids, r.step_id) if step == k]
    row = {"tokens": token_pieces(tokenizer, ids), "logp_s": rounded(scored.logp_s[i, at], 3)}
    if scored.logp_t is not scored.logp_s:  # somebody has scored
        row["logp_t"] = rounded(scored.logp_t[i, at], 3)
    return row | {"token_advantages": rounded(scored.advantages[i, at], 3)}


def rollout_rows(scored, step, tokenizer, with_tokens):
    """A batch as JSON-ready dicts, one a rollout, one entry a step; numbers to four decimals.

    with_tokens  of so many rollouts each step also holds its tokens (token_row)
    """
    for i, r in enumerate(scored.rollouts):
        answers, d, w = iter(r.answers), rounded(scored.d[i], 4), rounded(scored.w[i], 4)
        turns = [{"text": text, "outcome": outcome, "d": d[k], "w": w[k],
                  "tool": next(answers) if outcome not in ("", "not_run") else None}
                 | (token_row(scored, i, k, tokenizer) if i < with_tokens else {})
                 for k, (text, outcome) in enumerate(zip(r.turns, r.outcomes))]
        yield {"step": step, "question": r.problem.question, "truth": r.problem.answer,
               "right": r.right, "reason": r.reason, "reward": round(r.reward, 4),
               "advantage": round(float(scored.A[i]), 4), "finish": r.finish, "turns": turns}


def save_checkpoint(agent, folder, results={}):
    """The trained student and its card, as folder/checkpoint."""
    with tools.writing(folder), tools.whole_folder(folder / "checkpoint") as place:
        write_model(agent, place, results)


def write_model(agent, folder, results):
    """Fill a folder that AutoModelForCausalLM.from_pretrained and HF-compatible servers load."""
    student, ours = agent.student, agent.student.generation_config
    student.generation_config = student.shipped_generation
    try:
        student.save_pretrained(folder)
    finally:
        student.generation_config = ours
    agent.tokenizer.save_pretrained(folder)
    write_card(folder, agent.config, results)


def save_run(agent, folder):
    """Save all that the rest of the run depends on; the newest two saves are kept.

    A save is a model folder with the state of the optimiser beside the weights. No state of a
    random generator is in it: every random number is a function of seed and step.
    """
    if agent.saved == agent.step:
        return
    with (tools.writing(folder),
          tools.whole_folder(folder / "saves" / f"step-{agent.step}") as place):
        for name in LOGS:
            tools.sync(folder / name)
        state = {"step": agent.step, "optimizer": agent.optimizer.state_dict(),
                 "data": digest(agent.practice), "smaller": agent.smaller,
                 "shortages": agent.shortages, "refused": agent.refused,
                 "lengths": {name: (folder / name).stat().st_size for name in LOGS}}
        write_model(agent, place, {})
        with open(place / "state.pt", "wb") as file:
            torch.save(state, file)
        tools.seal(place)
    for old in tools.numbered(folder / "saves")[:-2]:
        tools.remove(old)
    agent.saved = agent.step


def digest(practice):
    """A word that changes with any problem, demonstration or token id to be trained on."""
    return hashlib.sha256(repr(practice).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def restore(agent, config, folder):
    """Take over the newest whole save, and cut the logs back to where they were at the time."""
    place, faults = tools.newest_whole(folder / "saves")
    for path, fault in faults.items():
        print(f"{path} is damaged ({fault}): an older save is used")
    if place is None and faults:
        raise ValueError(f"no whole save is left in {folder / 'saves'}; begin anew under another "
                         "--name")
    state = take_over(agent, config, place) if place else {"lengths": {}}
    for name in LOGS:
        tools.cut_back(folder / name, state["lengths"].get(name, 0))
    for path in faults:
        tools.remove(path)
    write_config(config, folder)
    print(f"resumed {place}" if place else f"resumed {folder}, which has no save yet: from step 1")


def take_over(agent, config, place):
    """Weights, optimiser and counters of a save; returns its state."""
    state = torch.load(place / "state.pt", map_location="cpu", weights_only=True, mmap=True)
    if state["data"] != digest(agent.practice) and not config.change:
        raise ValueError("the training data are not those that this run began with; bring them "
                         "back, or add --change true to go on with the new ones")
    saved = load_model(place, "cpu", agent.student.dtype)
    try:
        agent.student.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        raise ValueError(f"the weights of {place} do not fit the student {config.student}: "
                         f"{str(error).splitlines()[-1].strip()}") from None
    agent.optimizer = new_optimizer(agent, config)
    agent.optimizer.load_state_dict(state["optimizer"])
    agent.step = agent.saved = state["step"]
    agent.smaller, agent.shortages = state["smaller"], state["shortages"]
    agent.refused = state["refused"]
    return state


def write_card(folder, config, results):
    """The model card; results are {name: (problems, k) array} of what was measured."""
    (folder / "README.md").write_text(model_card(config, results), encoding="utf-8")


CARD = """---
license: apache-2.0
base_model: {base}
library_name: transformers
pipeline_tag: text-generation
tags:
- sod
- on-policy-distillation
- tool-use
---

# {title}

{base} trained with sod-mini, method `{method}`{teacher}. It solves problems in several turns with a
Python tool (Hermes tool calls, one tool named `code_interpreter`).

## Training

{training}

## Results

{results}
"""
MEASURED = """average@{k} on {n} problems of `{data}`, temperature {temperature}, top-p {top_p}; 95%
interval from resampling problems. Measured by this run; nothing else was measured.

{table}"""


def model_card(config, results):
    """What the checkpoint is, how it was trained, what was measured: Hub metadata and markdown."""
    view = getattr(METHODS.get(config.method), "view", "")
    teacher = {"": "", "teacher": f" and teacher {config.teacher}"}.get(
        view, f", its own start with the {view} in the prompt as teacher")
    keys = (["sft_epochs", "sft_batch", "sft_lr"] if config.method == "sft" else
            ["steps", "prompts_per_step", "group_size", "updates_per_step", "lr", "weights", "kl",
             "opd_coef", "epsilon", "delta", "clip_low", "clip_high", "clip_dual", "max_turns",
             "max_response"])
    measured = MEASURED.format(
        k=config.eval_samples, n=len(next(iter(results.values()))), data=config.eval_data,
        temperature=config.eval_temperature, top_p=config.eval_top_p,
        table=results_table(results)) if results else "Not evaluated."
    return CARD.format(
        base=config.student, title=config.name or config.method, method=config.method,
        teacher=teacher, results=measured,
        training=", ".join(f"{k} {getattr(config, k)}" for k in ["seed", *keys]) + ".")


# --- The command ------------------------------------------------------------------------------


def results_table(results):
    """{name: (problems, k) array} as a markdown table of average@k with its interval."""
    lines = ["| model | average@k | 95% interval |", "|---|---|---|"]
    for name, correct in results.items():
        mean, low, high = average_with_interval(correct)
        lines.append(f"| {name} | {mean:.1f}% | {low:.1f} to {high:.1f} |")
    return "\n".join(lines)


def progress_line(m, config):
    """One dense line a step."""
    if config.method == "sft":
        return (f"step {m['step']}/{m['steps']} | loss {m['loss']:.3f} nats | "
                f"grad {m['grad_norm']:.2f} | {m['seconds']:.2f} s{troubles(m)}")
    memory = (f" | {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
              if torch.cuda.is_available() else "")
    return (f"step {m['step']}/{config.steps} | reward {m['reward']:+.2f} | "
            f"right {m['right']:.0%} | kl {m['reverse_kl']:.2f} | d {m['d']:.2f} | "
            f"w {m['w']:.2f} | "
            f"tool fail {m['tool_fail']:.0%} | cut {m['cut_budget'] + m['cut_turns']:.0%} | "
            f"{m['tokens_per_second']:,.0f} tok/s | {m['seconds']:.1f} s{memory}{troubles(m)}")


def troubles(m):
    """What a progress line adds where something went wrong."""
    smaller = ", ".join(f"{k} {v}" for k, v in m["smaller"].items())
    said = {"not taken": m["not_taken"], "lost to infrastructure": m.get("infrastructure", 0),
            "tool calls retried": m["tool_retries"],
            f"times out of memory: {smaller}": m["out_of_memory"]}
    return "".join(f" | {n} {words}" for words, n in said.items() if n)


def show_rollout(scored):
    """A rollout with d and w beside each turn: if there is one, that recovered from a failure."""
    i = max(range(len(scored.rollouts)), key=lambda i: (
        any(o not in FINE for o in scored.rollouts[i].outcomes), scored.rollouts[i].right))
    r, answers = scored.rollouts[i], iter(scored.rollouts[i].answers)
    lines = [f"    {r.problem.question}  [truth {r.problem.answer}, reward {r.reward:+.1f}]"]
    for k, (text, outcome) in enumerate(zip(r.turns, r.outcomes)):
        call = tools.parse_tool_call(text)
        said = call.code if call and not call.fault else text
        answer = next(answers) if outcome not in ("", "not_run") else r.finish
        last_line = (answer.strip().splitlines() or [""])[-1]
        lines.append(f"    turn {k + 1}  d {scored.d[i, k]:.2f}  w {scored.w[i, k]:.2f}  "
                     f"{said.strip()[:60]!r} -> {last_line[:50]}")
    return "\n".join(lines)


def as_bool(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def add_options(parser, kind, path, words):
    """An option for each field of the dataclass `kind`; its comment in the file is the help.

    words  {field: [allowed, ...]} for those that take one of a few
    """
    source = Path(path).read_text(encoding="utf-8")
    comments = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", source, re.M))
    for f in fields(kind):
        parser.add_argument(f"--{f.name}", type=as_bool if f.type is bool else f.type,
                            default=argparse.SUPPRESS,
                            metavar=" | ".join(words.get(f.name, [f.type.__name__])),
                            help=f"{comments[f.name]} [{f.default}]".replace("%", "%%"))


def parse_config(argv=None):
    """Config from defaults, a preset and the command line, in this order; (config, preset)."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        usage="python sod_mini.py [--preset NAME] [--OPTION VALUE ...]    (--help lists them)",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=100))
    parser.add_argument("--preset", choices=PRESETS, help="set of values to start from; default: "
                        "world, or gpu (one GPU, untried) where data of your own are named")
    add_options(parser, Config, __file__, choices())
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
    device, dtype, reason = choose_device(config)
    folder = open_run_folder(config)
    with tools.locked(folder):
        print(f"device  {device}, {str(dtype).removeprefix('torch.')} ({reason}); preset {preset}")
        try:
            agent, problems = load_in_two_parts(config, folder)
            config = agent.config
        except BaseException:
            if not config.resume:
                shutil.rmtree(folder)  # nothing has been made yet, so nothing is left behind
            raise
        try:
            measure_and_train(agent, config, folder, problems)
        except BaseException:
            print(f"to go on: python sod_mini.py --resume {folder}", file=sys.stderr)
            raise


def load_in_two_parts(config, folder):
    """(agent, held-out problems): first what takes seconds, all of it, then the weights."""
    agent = preflight(config)
    config, problems = agent.config, eval_problems(agent, agent.config)
    print(*agent.notes, sep="\n")
    agent.notes.clear()
    if not config.resume:
        write_config(config, folder)  # now with the sizes that were left to the memory plan
    load_agent(config, agent)
    print(*agent.notes, sep="\n")
    describe(agent, config)
    return agent, problems


def measure_and_train(agent, config, folder, problems):
    """The run itself, from wherever it stands."""
    results = {} if config.change else read_results(folder)

    def measure(name, model):
        if problems and model is not None and name not in results:
            results[name] = evaluate(model, agent, problems, config)
            listed = {name: correct.tolist() for name, correct in results.items()}
            tools.write_whole(folder / "results.json", json.dumps(listed) + "\n")

    measure("student before", agent.student)
    if config.method != "vanilla":
        if config.resume:
            restore(agent, config, folder)
        train_to_files(agent, config, folder)
        measure("student after", agent.student)
        if METHODS.get(config.method, METHODS["grpo"]).view == "teacher":
            with visiting(agent.teacher, agent.student.device, config.offload != "none"):
                measure("teacher", agent.teacher)
        save_checkpoint(agent, folder, results)
        tools.remove(folder / "saves")
        print(f"checkpoint  {folder / 'checkpoint'}\nmetrics     {folder / 'metrics.jsonl'}")
    if config.method not in ("vanilla", "sft"):
        print(f"rollouts    {folder / 'rollouts.jsonl'}")
    if config.page and config.method != "vanilla":
        print(f"page        {page_of(folder)}")
    if results:
        print(f"\naverage@{config.eval_samples} on {len(problems)} problems of {config.eval_data}\n"
              + results_table(results))


def read_results(folder):
    """What an interrupted run has measured: {name: (problems, samples) array}."""
    path = folder / "results.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: np.array(correct) for name, correct in found.items()}


def page_of(folder):
    """Have evaluate.py write the page of a run; its path and size, or why there is none.

    A process of its own, for imports go one way: evaluate.py imports this file. The run is done
    and saved, so whatever happens there is told and does no harm.
    """
    script = Path(__file__).with_name("evaluate.py")
    done = subprocess.run([sys.executable, script, "--page", folder],
                          capture_output=True, text=True)
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return said[-1] if done.returncode == 0 and said else (
        f"not written ({said[-1] if said else f'exit status {done.returncode}'}); to try again: "
        f"python evaluate.py --page {folder}")


def train_to_files(agent, config, folder):
    """Run the training loop; one line a step to the screen, the numbers and rollouts to files."""
    total = config.steps if config.method in METHODS else None
    try:
        with tools.stoppable(agent):
            for m in tqdm(train(config, agent), total=total, initial=agent.step, unit="step",
                          desc=config.method, disable=None):  # no bar where nobody watches
                write_step(agent, m, folder)
                agent.settled = True
                if agent.stop:
                    raise KeyboardInterrupt(agent.stop)
                show_step(agent, m, config)
                if config.save_every and m["step"] % config.save_every == 0:
                    save_run(agent, folder)
        save_run(agent, folder)
    except tools.WriteError:
        raise
    except BaseException:  # Ctrl-C or an error; in the middle of an update nothing can be saved
        if agent.settled and agent.step:
            save_run(agent, folder)
            print(f"saved {folder / 'saves' / f'step-{agent.step}'}", file=sys.stderr)
        raise


def show_step(agent, m, config):
    """What of a step goes to the screen."""
    if m["step"] == 1 and m["skipped"]:
        tqdm.write(f"{m['skipped']} problems or demonstrations are too long and skipped: "
                   f"max_prompt {config.max_prompt}, max_response {config.max_response}")
    if agent.scored or m["not_taken"] or m["step"] % 20 == 0 or m["step"] == m["steps"]:
        tqdm.write(progress_line(m, config))
    if m["step"] == 2 and agent.scored:  # now the optimiser's state exists
        tqdm.write(memory_verdict(agent))
    agent.history.append(m)
    for sentence in news(agent.history, agent.told, config):
        tqdm.write(f"    health: {sentence}")
    if agent.scored and config.show_every and (m["step"] - 1) % config.show_every == 0:
        tqdm.write(show_rollout(agent.scored))


def describe(agent, config):
    """What was loaded."""
    size = lambda model: f"{sum(p.numel() for p in model.parameters()):,} parameters"
    print(f"student {config.student}, {size(agent.student)}"
          + (", random weights" if config.init == "random" else ""))
    if agent.teacher is not None:
        view = METHODS[config.method].view
        name = config.teacher if view == "teacher" else f"the student's start, told the {view}"
        print(f"teacher {name}, {size(agent.teacher)}")
    data = config.demonstrations if config.method == "sft" else config.train_data
    if config.method != "vanilla":
        print(f"data    {data}")


def eval_problems(agent, config):
    """The held-out problems that fit the prompt budget, at most eval_problems of them."""
    if not config.eval_data and config.method == "vanilla":
        raise ValueError("method vanilla only measures, and there is nothing to measure on; name "
                         "problems with --eval_data")
    if not config.eval_data:
        return []
    problems = tools.load_problems(config.eval_data)[:config.eval_problems]
    kept, skipped = fitting_prompts(agent, problems)
    if skipped:
        print(f"{skipped} held-out prompts are longer than {config.max_prompt} tokens and skipped")
    return [problem for problem, _ in kept]


def main(argv=None):
    """Exit status: 0 done, 1 stopped with a sentence, 2 wrong options, 130 interrupted."""
    config, preset = parse_config(argv)
    transformers_logging.disable_progress_bar()  # a bar a file, for files read in milliseconds
    try:
        run(config, preset)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print(f"error: not enough memory for the models ({str(error).splitlines()[0]}); choose "
              "smaller ones, or try --offload all", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print("interrupted; files written so far are whole", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line as it comes
    sys.exit(main())
