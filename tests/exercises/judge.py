"""What judges the exercises: sod_mini's own functions, on cases that tell the usual mistakes apart.

A mistake is a wrong function with a sentence. What gives the results of one on every case has made
it, so the judge can say which mistake it was.
"""
import inspect

import torch

import sod_mini as sod


def ids_of(prompt, turns):
    """put_together by the project's own Rollout."""
    r = sod.Rollout(None, prompt, [sod.Turn(ids, tool_ids=answer) for ids, answer in turns])
    return r.ids, r.step_id


def naive_logprobs(hidden, weight, targets, temperature):
    return sod.token_logprobs(hidden[:-1], weight, targets[1:], temperature)


def exact_kl(logits_s, logits_t):
    """sod_mini's takes hidden states and an output layer; here the layer is the identity."""
    eye = torch.eye(logits_s.shape[1])
    return sod.reverse_kl(logits_s, eye, logits_t, eye)


ANSWERS = {
    "group_advantages": sod.group_advantages,
    "step_divergence": sod.step_divergence,
    "step_weights": sod.step_weights,
    "token_advantages": lambda A, logp_s, logp_t, step_id, w: sod.token_advantages(
        "sod", A, logp_s, logp_t, step_id, w),
    "policy_loss": lambda *given: sod.policy_loss(*given, dual_clip=1e9),
    "token_logprobs": naive_logprobs,
    "reverse_kl": exact_kl,
    "put_together": ids_of,
}

# --- Cases: arguments of each function ----------------------------------------------------------

R = torch.tensor
GAPS = (R([[-1.0, -2, -5, -1, -3, 0, -4]]), R([[-6.0, -1, -2, -9, -5, 0, -1]]),
        R([[0, 1, 1, 0, 2, 0, 2]]))
LAYER = torch.linspace(-2, 2, 20).sin().view(5, 4)  # (V, D)
STATES = torch.linspace(0, 9, 12).cos().view(3, 4)  # (T, D)


def cases():
    """{function: [arguments, ...]}, made anew, for some ask for gradients."""
    loss = lambda ratio, A, mask: (R([ratio]).log().requires_grad_(), torch.zeros(1, len(ratio)),
                                   R([A]), R([mask]), 0.2, 0.28)
    return {
        "group_advantages": [(R([1.0, 0, 0, 0, 0, 0]), 3), (R([3.0, 1, -1, 0.5, 0.7, 0.4]), 3),
                             (R([1.0, 0, 3, 5]), 2)],
        "step_divergence": [(*GAPS, 2), (*GAPS, 4)],
        "step_weights": [(R([[0.3, 0.6, 0.2]]), 0.0, 0.2), (R([[0.5, 0.1, 0.8, 0.4]]), 1e-6, 0.2),
                         (R([[0.2, 0.0, 0.4], [0.0, 0.4, 0.1]]), 1e-2, 0.5)],
        "token_advantages": [(R([1.0]), R([[0.0, -1, -2]]).requires_grad_(), R([[7.0, -2, -3]]),
                              R([[0, 1, 2]]), R([[1.0, 0.5]])),
                             (R([0.5, -2.0]), R([[-1.0, -2, -3]] * 2), R([[-2.0, -4, -1]] * 2),
                              R([[1, 0, 2], [1, 1, 0]]), R([[1.0, 1.2], [1.0, 0.0]]))],
        "policy_loss": [loss([2.0, 1.0, 0.5], [1.0, 1.0, 1.0], [True, True, True]),
                        loss([2.0, 0.5, 1.1], [-1.0, -2.0, -1.0], [True, True, True]),
                        loss([1.0, 1.5, 0.9, 0.7], [1.0, 3.0, -1.0, 2.0],
                             [True, False, True, True])],
        "token_logprobs": [(STATES, LAYER, R([4, 0, 2]), 1.0), (STATES, LAYER, R([1, 3, 0]), 0.5)],
        "reverse_kl": [(R([[0.5, 0.5]]).log(), R([[0.9, 0.1]]).log()),
                       (R([[2.0, 0, 1], [5, 1, 0]]), R([[0.0, 1, 3], [1, 1, 1]]))],
        "put_together": [([7, 8], [([1, 2], [9, 9]), ([3], [])]),
                         ([5], [([1, 2, 3], [6]), ([4], [6, 6]), ([2, 2], [])])],
    }


# --- Usual mistakes: sentence -> wrong function -------------------------------------------------


def groups(r, G, ddof=1, eps=1e-6, divide=True):
    r = r.view(-1, G)
    r = r - r.mean(1, keepdim=True)
    return (r / (r.pow(2).sum(1, keepdim=True).div(G - ddof).sqrt() + eps) if divide else r
            ).flatten()


def divergence(gap, step_id, K, count):
    return torch.stack([torch.where(step_id == k, gap, 0.0).sum(1) / count(step_id, k).clamp(min=1)
                        for k in range(1, K + 1)], 1)


def of_step(step_id, k):
    return (step_id == k).sum(1)


def running(d, epsilon, delta):
    """The product is capped on its way, so that a step after a capped one suffers from it."""
    w = [torch.ones(len(d))]
    for k in range(1, d.shape[1]):
        w.append((w[-1] * (d[:, k - 1] + epsilon) / (d[:, k] + epsilon)).clamp(max=1 + delta))
    return torch.stack(w, 1)


def worth(A, s, t, step_id, w, detach=True, hide=True, at=1):
    gap, k = t - (s.detach() if detach else s), (step_id - at).clamp(0, w.shape[1] - 1)
    value = A[:, None] + w.gather(1, k) * gap
    return torch.where(step_id > 0, value, 0.0) if hide else value


def clipped(logp, old, A, mask, low, high, pick=torch.maximum, sign=-1, mean=None, both=False):
    ratio = (logp - old).exp()
    cut = ratio.clamp(1 - high, 1 + low) if both else ratio.clamp(1 - low, 1 + high)
    loss = pick(sign * A * ratio, sign * A * cut)
    return loss.mean() if mean == "all" else (loss * mask).sum() / (
        1 if mean == "sum" else mask.sum())


def logp_of(hidden, weight, targets, temperature):
    return (hidden @ weight.T / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def kl(p, q, weights):
    return (weights.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)


def steps(prompt, turns, of_prompt=0, of_tool=lambda k: 0, first=1, ends=True):
    ids, step_id = list(prompt), [of_prompt] * len(prompt)
    for k, (sampled, answer) in enumerate(turns, first):
        ids += sampled + answer
        own = [k] * len(sampled) if ends else [k] * (len(sampled) - 1) + [0]
        step_id += own + [of_tool(k)] * len(answer)
    return ids, step_id


MISTAKES = {
    "group_advantages": {
        "the standard deviation divides by G, and a sample's divides by G - 1":
            lambda r, G: groups(r, G, ddof=0),
        "mean and std are those of the whole batch, and not of each group":
            lambda r, G: groups(r, len(r)),
        "the difference from the mean is not divided by the standard deviation":
            lambda r, G: groups(r, G, divide=False),
        "the sign is wrong: the better rollout must get the larger advantage":
            lambda r, G: -groups(r, G),
        "groups are neighbours: view(P, G), and not every P-th rollout":
            lambda r, G: groups(r.view(G, -1).T.flatten(), G).view(-1, G).T.flatten()},
    "step_divergence": {
        "the absolute value comes after the mean: gaps of both signs cancel":
            lambda s, t, k, K: divergence(s - t, k, K, of_step).abs(),
        "the gaps keep their sign, and Eq. 6 takes |logp_s - logp_t|":
            lambda s, t, k, K: divergence(s - t, k, K, of_step),
        "a step's sum is divided by all tokens of the row, and not by those of the step":
            lambda s, t, k, K: divergence((s - t).abs(), k, K, lambda k, _: torch.full(
                (len(k),), k.shape[1])),
        "a step's sum is divided by the sampled tokens of the rollout, not by those of the step":
            lambda s, t, k, K: divergence((s - t).abs(), k, K, lambda k, _: (k > 0).sum(1)),
        "tokens of no step (step_id 0) are counted as a step":
            lambda s, t, k, K: divergence((s - t).abs(), k + 1, K, of_step),
        "it is the sum over a step, and Eq. 6 is the mean: long steps would look drifted":
            lambda s, t, k, K: divergence((s - t).abs(), k, K, lambda k, _: torch.ones(len(k)))},
    "step_weights": {
        "the running product is capped, and only the weight is: a step after a capped one suffers":
            running,
        "the ratio is upside down: a step that drifted more must weigh less":
            lambda d, e, delta: ((d + e) / (d[:, :1] + e)).clamp(max=1 + delta),
        "the cap is missing":
            lambda d, e, delta: (d[:, :1] + e) / (d + e),
        "each step is compared with the one before it alone: the product over all u < k is missing":
            lambda d, e, delta: torch.cat([torch.ones(len(d), 1), (d[:, :-1] + e) / (d[:, 1:] + e)],
                                          1).clamp(max=1 + delta),
        "the cap is 1, and Eq. 7 allows 1 + delta":
            lambda d, e, delta: ((d[:, :1] + e) / (d + e)).clamp(max=1),
        "the cap is delta, and Eq. 7 has 1 + delta":
            lambda d, e, delta: ((d[:, :1] + e) / (d + e)).clamp(max=delta)},
    "token_advantages": {
        "the sign of the gap is wrong: a token that the teacher likes better must gain":
            lambda A, s, t, k, w: worth(A, t.detach(), s, k, w).detach(),
        "the weight is that of the step after: step k stands in column k - 1 of w":
            lambda *given: worth(*given, at=0),
        "a gradient flows through it: detach logp_s":
            lambda *given: worth(*given, detach=False),
        "tokens of no step get an advantage, and must get 0":
            lambda *given: worth(*given, hide=False),
        "w also scales the outcome: only the gap is weighted":
            lambda A, s, t, k, w: worth(A * 0, s, t, k, w) + torch.where(
                k > 0, A[:, None] * w.gather(1, (k - 1).clamp(min=0)), 0.0),
        "the outcome A is missing":
            lambda A, *rest: worth(A * 0, *rest),
        "the weights are missing: that is uniform distillation, opd":
            lambda A, s, t, k, w: worth(A, s, t, k, torch.ones_like(w))},
    "policy_loss": {
        "min in place of max: a loss is the negative of PPO's objective, so its min is a max here":
            lambda *given: clipped(*given, pick=torch.minimum),
        "the sign is wrong: going down this loss makes good tokens less likely":
            lambda *given: clipped(*given, pick=torch.minimum, sign=1),
        "the mean is over all tokens, and not over the mask":
            lambda *given: clipped(*given, mean="all"),
        "it is a sum over the mask, and not a mean":
            lambda *given: clipped(*given, mean="sum"),
        "clip_low and clip_high are exchanged":
            lambda *given: clipped(*given, both=True),
        "nothing is clipped":
            lambda *given: clipped(*given, pick=lambda plain, cut: plain),
        "the clipped ratio is taken always: a bad token that became likelier gets no gradient":
            lambda *given: clipped(*given, pick=lambda plain, cut: cut)},
    "token_logprobs": {
        "position t predicts token t + 1: hidden[:-1] goes with targets[1:]":
            lambda h, W, y, tau: logp_of(h, W, y, tau)[1:],
        "one position too far: hidden[1:] is paired with targets[:-1]":
            lambda h, W, y, tau: logp_of(h[1:], W, y[:-1], tau),
        "the temperature is missing: tokens were sampled with it, so they are scored with it":
            lambda h, W, y, tau: logp_of(h[:-1], W, y[1:], 1.0),
        "logits are multiplied with the temperature, and it divides them":
            lambda h, W, y, tau: logp_of(h[:-1], W, y[1:], 1 / tau),
        "these are probabilities, and not their logarithms":
            lambda h, W, y, tau: logp_of(h[:-1], W, y[1:], tau).exp(),
        "these are logits: the softmax is missing":
            lambda h, W, y, tau: (h[:-1] @ W.T / tau).gather(1, y[1:, None])[:, 0]},
    "reverse_kl": {
        "that is KL(teacher || student): the student's probabilities are the weights":
            lambda s, t: kl(t, s, t),
        "the sign is wrong: a KL is never negative":
            lambda s, t: -kl(s, t, s),
        "the teacher's probabilities weigh the student's difference":
            lambda s, t: kl(s, t, t),
        "it is summed over the positions, too":
            lambda s, t: kl(s, t, s).sum(),
        "it is the mean over the vocabulary, and a KL is a sum":
            lambda s, t: kl(s, t, s) / s.shape[1]},
    "put_together": {
        "the tool's answer counts as the student's: it would be trained to imitate the tool":
            lambda *given: steps(*given, of_tool=lambda k: k),
        "the prompt counts as step 1":
            lambda *given: steps(*given, of_prompt=1),
        "steps count from 1, and 0 is no step":
            lambda *given: steps(*given, first=0),
        "the end token is left out: the student sampled it, and learns from it to stop":
            lambda *given: steps(*given, ends=False),
        "the tool's answers are missing among the ids":
            lambda prompt, turns: steps(prompt, [(ids, []) for ids, _ in turns])},
}

# --- The judge ----------------------------------------------------------------------------------


def result(function, arguments):
    """What a function returns, as lists that can be compared; with a loss also its gradient."""
    leaf = next((x for x in arguments if torch.is_tensor(x) and x.requires_grad), None)
    found = function(*arguments)
    if not torch.is_tensor(found):
        return found
    flows = found.requires_grad and leaf is not None
    gradient = torch.autograd.grad(found.sum(), leaf)[0] if flows else None
    return [found.detach(), gradient]


def same(a, b):
    """Equal lists, or tensors of one shape and, but for rounding, one value."""
    if torch.is_tensor(a) and torch.is_tensor(b):
        return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-4)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def judge(name, function):
    """"" where `function` solves the exercise, else what is wrong with it."""
    given = cases()[name]
    try:
        found = [result(function, arguments) for arguments in given]
    except NotImplementedError:
        return "not written yet"
    right = [result(ANSWERS[name], arguments) for arguments in given]
    if same(found, right):
        return ""
    for sentence, wrong in MISTAKES[name].items():
        if same(found, [result(wrong, arguments) for arguments in given]):
            return sentence
    n = next(n for n in range(len(given)) if not same(found[n], right[n]))
    names = inspect.signature(ANSWERS[name]).parameters
    told = ", ".join(f"{k} = {v}" for k, v in zip(names, given[n]))
    return f"for {told}\nit gives {found[n]}\nand not  {right[n]}"
