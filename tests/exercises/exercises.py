"""An hour with a pencil: eight functions of SOD, without their bodies, in the order in which one
learns them. Write them, and let the judge say what is right and which mistake it was:

    python -m pytest tests/exercises -q

Take one at a time: `-k step_weights`. Each has its equation, its shapes and a worked example, which
you can check by hand. The hints are in regions, which editors fold. sod_mini.py has the answers.

    logp_s, logp_t   log-probabilities of the sampled tokens: student, teacher     nats
    step_id          k for a token that the student sampled in step k, else 0
    G, B, T, K, V, D group size, rollouts, tokens, steps, vocabulary, width        sizes
"""
import torch


def group_advantages(rewards, group_size):
    """1. How much better a rollout did than the others of its problem (GRPO):

        A_i = (r_i - mean(r)) / (std(r) + 1e-6)      over the G rollouts of its group

    The standard deviation is that of a sample: it divides by G - 1.

    rewards     (B,) the G rollouts of one problem side by side
    group_size  G, a divisor of B
    returns     (B,)

    rewards 1 0 0 | 0 0 0 with G = 3: the first group has mean 1/3 and std .577; so 1.155 -.577 -.577
    | 0 0 0.
    """
    # region Hint
    # View the rewards as (P, G), take mean and std over each row, and flatten again.
    # endregion
    raise NotImplementedError


def step_divergence(logp_s, logp_t, step_id, K):
    """2. How far student and teacher differ at each step (Eq. 6):

        d_k = 1 / |S_k| * sum over t in S_k of |logp_s_t - logp_t_t|       S_k: tokens of step k

    logp_s, logp_t  (B, T)
    step_id         (B, T) 1..K, or 0: the prompt, answers of the tool, padding
    K               steps
    returns         (B, K) nats a token; 0 for a step that the rollout does not have

    step_id 0 1 1 0 2, gaps 5 1 -3 9 2 (logp_s - logp_t): d = 2 2. The 5 and the 9 are no step's.
    """
    # region Hint
    # For one k: mask = step_id == k, then a sum over the mask, divided by the mask's sum.
    # endregion
    raise NotImplementedError


def step_weights(d, epsilon, delta):
    """3. Trust in the teacher at each step (Eq. 7):

        w_1 = 1,   w_k = min( prod_{u<k} (d_u + epsilon) / (d_{u+1} + epsilon),  1 + delta )

    d        (B, K)
    returns  (B, K)

    d = .3 .6 .2 with delta .2, epsilon 0: the products are 1, .5 and .5 * 3 = 1.5; so w = 1 .5 1.2.
    """
    # region Hint
    # Write the product of three steps out on paper: neighbours cancel.
    # endregion
    raise NotImplementedError


def token_advantages(A, logp_s, logp_t, step_id, w):
    """4. What each sampled token is worth in SOD (Eq. 8): outcome, and distillation weighted by step.

        A_it = A_i + w_k (logp_t_it - logp_s_it)       for a token t of step k

    A                 (B,)
    logp_s, logp_t    (B, T)
    step_id           (B, T)
    w                 (B, K)
    returns           (B, T), 0 outside the steps; a number, through which no gradient flows

    A = 1, w = 1 .5, step_id 0 1 2, logp_t - logp_s = 7 -1 -1: A_it = 0 0 .5.
    """
    # region Hint
    # w has K columns for steps 1..K: gather with step_id - 1, and hide the tokens of no step.
    # endregion
    raise NotImplementedError


def policy_loss(logp, logp_old, advantages, mask, clip_low, clip_high):
    """5. The clipped loss (PPO), whose gradient makes tokens of positive advantage likelier:

        ratio = exp(logp - logp_old)
        loss  = mean over the mask of  max( -A ratio,  -A clamp(ratio, 1 - clip_low, 1 + clip_high) )

    logp, logp_old, advantages, mask   (B, T); the mask is bool
    returns                            a scalar

    ratio 2 with A = 1 and clip_high .28: max(-2, -1.28) = -1.28: no more gain for going farther.
    ratio 2 with A = -1: max(2, 1.28) = 2: a bad token that became likelier is pulled back.
    """
    # region Hint
    # A mean over the mask is a sum over the mask divided by the number of its tokens.
    # endregion
    raise NotImplementedError


def token_logprobs(hidden, weight, targets, temperature):
    """6. Log-probability of each target token, as it was sampled:

        logits = hidden @ weight.T / temperature
        logp_t = log softmax(logits_t) at the target

    hidden   (T, D) state at each position, from which the *next* token is predicted
    weight   (V, D) of the output layer
    targets  (T,) the token at each position: position t predicts token t + 1
    returns  (T - 1,) of tokens 1 .. T - 1
    """
    # region Hint
    # hidden[:-1] goes with targets[1:].
    # endregion
    raise NotImplementedError


def reverse_kl(logits_s, logits_t):
    """7. The exact KL(student || teacher) at each position, of which (logp_s - logp_t) of a sampled
    token is an estimate:

        KL = sum over v of p_s(v) (log p_s(v) - log p_t(v))

    logits_s, logits_t  (T, V)
    returns             (T,) nats, never negative

    p_s = .5 .5, p_t = .9 .1: .5 log(.5 / .9) + .5 log(.5 / .1) = .511.
    """
    # region Hint
    # log_softmax twice; the probabilities are its exp. The student's are the weights.
    # endregion
    raise NotImplementedError


def put_together(prompt, turns):
    """8. A rollout as the models read it, and which token belongs to which step.

    prompt   ids
    turns    [(ids that the student sampled, its end token included; ids of the tool's answer), ...]
    returns  (ids, step_id), two lists of the same length

    prompt 7 8, turns ([1 2], [9 9]) and ([3], []): ids 7 8 1 2 9 9 3, step_id 0 0 1 1 0 0 2.
    """
    # region Hint
    # The student did not sample the prompt and the tool's answers: no step, no loss on them.
    # endregion
    raise NotImplementedError
