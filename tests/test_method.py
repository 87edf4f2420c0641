"""The method as pure functions, held against numbers worked out by hand and against plain loops."""
import doctest
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sod_mini as sod

T64 = dict(dtype=torch.float64)


def test_docstring_examples_are_true():
    assert doctest.testmod(sod).failed == 0


# --- Eq. 6 and 7 ------------------------------------------------------------------------------


@pytest.mark.parametrize("d, w", [
    ([0.3, 0.6, 0.2], [1.0, 0.5, 1.2]),
    ([0.3, 0.1, 0.6], [1.0, 1.2, 0.5]),   # a clipped running product would give .2 at the end
    ([0.218, 1.284], [1.0, 0.1698]),
])
def test_drifted_step_is_damped_and_recovery_is_capped(d, w):
    assert sod.step_weights(torch.tensor([d]))[0].tolist() == pytest.approx(w, abs=1e-4)


def test_weights_equal_the_running_product_of_the_paper():
    torch.manual_seed(0)
    d, epsilon, delta = torch.rand(50, 9, **T64) * 3, 1e-6, 0.2
    for row, got in zip(d.tolist(), sod.step_weights(d, epsilon, delta).tolist()):
        product = 1.0
        for k in range(len(row)):
            if k:
                product *= (row[k - 1] + epsilon) / (row[k] + epsilon)
            assert got[k] == pytest.approx(min(product, 1 + delta), rel=1e-9)


def test_first_step_known_by_heart_switches_distillation_off_afterwards():
    w = sod.step_weights(torch.tensor([[0.0, 0.5, 0.5]]))
    assert w[0, 0] == 1 and (w[0, 1:] < 1e-5).all()


def test_divergence_is_the_mean_gap_within_each_step_and_ignores_everything_else():
    logp_s = torch.tensor([[9.0, -1.0, -2.0, math.nan, -3.0], [0.0, -1.0, 5.0, 5.0, 5.0]])
    logp_t = torch.tensor([[0.0, -1.5, -1.0, math.inf, -7.0], [0.0, -2.0, 0.0, 0.0, 0.0]])
    step_id = torch.tensor([[-1, 0, 0, -1, 1], [-1, 0, -1, -1, -1]])
    d = sod.step_divergence(logp_s, logp_t, step_id)
    assert d.tolist() == [[0.75, 4.0], [1.0, 0.0]]  # (.5 + 1) / 2; 4; 1; absent step


def test_divergence_equals_a_loop_over_tokens():
    torch.manual_seed(1)
    logp_s, logp_t = torch.randn(6, 40, **T64), torch.randn(6, 40, **T64)
    step_id = torch.randint(-1, 5, (6, 40))
    d = sod.step_divergence(logp_s, logp_t, step_id)
    for b, k in itertools.product(range(6), range(5)):
        gaps = [abs(float(logp_s[b, t] - logp_t[b, t])) for t in range(40) if step_id[b, t] == k]
        assert float(d[b, k]) == pytest.approx(sum(gaps) / max(len(gaps), 1))


def test_a_rollout_without_any_step_has_no_divergence():
    none = torch.full((2, 3), -1)
    assert sod.step_divergence(torch.randn(2, 3), torch.randn(2, 3), none).tolist() == [[0.], [0.]]


def test_ablation_weights_start_after_the_first_failed_call():
    failed = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    assert sod.decay_weights(failed, 0.9)[0].tolist() == pytest.approx([1, 1, .9, .81, .729])
    assert sod.mask_after_error(failed).tolist() == [[1, 1, 0, 0, 0], [1] * 5, [1, 0, 0, 0, 0]]
    w = sod.unclipped_weights(torch.tensor([[0.6, 0.1]]))
    assert float(w[0, 1]) == pytest.approx(6, rel=1e-4)


def test_every_weight_scheme_of_the_ablation_has_the_shape_of_d():
    d, failed, tokens = torch.rand(3, 4), torch.rand(3, 4) > 0.5, torch.ones(3, 4)
    for scheme in sod.WEIGHTS.values():
        assert scheme(d, failed, tokens, sod.Config()).shape == d.shape


def weigh(scheme, d, tokens=((1, 1, 1),), **options):
    d = torch.tensor(d)
    w = sod.WEIGHTS[scheme](d, d > 9, torch.tensor(tokens), sod.Config(**options))
    return w[0].tolist() if len(w) == 1 else w.tolist()


def test_constant_and_rescaled_split_sod_into_its_scale_and_its_shape():
    # SOD gives 1 .5 1.2 and 1 .2 (a step that is not there would get 1.2: it has no tokens)
    d, tokens = [[.3, .6, .2], [.2, 1., 0.]], [[10, 20, 5], [10, 5, 0]]
    mean = (10 + 20 * .5 + 5 * 1.2 + 10 + 5 * .2) / 50  # of a token: .74
    assert weigh("constant", d, tokens) == [pytest.approx([mean] * 3, abs=1e-5)] * 2
    one, two = weigh("rescaled", d, tokens)
    assert one == pytest.approx([1 / mean, .5 / mean, 1.2 / mean], abs=1e-5)
    assert two[:2] == pytest.approx([1 / mean, .2 / mean], abs=1e-5)
    assert sum(n * w for n, w in zip([10, 20, 5, 10, 5], one + two[:2])) / 50 == pytest.approx(1)


def test_a_first_step_known_by_heart_switches_off_sod_but_neither_floor_nor_median():
    d = [[0.0, .4, .1, .8]]
    assert weigh("sod", d, [[1] * 4])[1:] == pytest.approx([0, 0, 0], abs=1e-4)
    assert weigh("floor", d, [[1] * 4], floor=.2) == pytest.approx([1, .5, 1, .25], abs=1e-4)
    # medians of the first 1, 2, 3, 4: 0, .2, .1, .25
    assert weigh("median", d, [[1] * 4]) == pytest.approx([1, .5, 1, .3125], abs=1e-4)
    assert weigh("median", [[.3, .1]], [[1, 1]]) == pytest.approx([1, 1.2], abs=1e-4)  # the cap


def test_tokens_of_a_step_are_counted_without_prompt_and_tool_text():
    step_id = torch.tensor([[-1, 0, 0, -1, 1, -1], [-1, -1, 0, -1, -1, -1]])
    assert sod.step_tokens(step_id, 3).tolist() == [[2, 1, 0], [1, 0, 0]]


# --- Advantages -------------------------------------------------------------------------------


def test_group_advantage_is_the_z_score_with_ddof_1():
    A = sod.group_advantages(torch.tensor([1.0, -1, -1, 1, 1, 1, 1, -1]), 4)
    assert A[:4].tolist() == pytest.approx([.8660, -.8660, -.8660, .8660], abs=1e-4)
    assert A[4:].tolist() == pytest.approx([.5, .5, .5, -1.5], abs=1e-4)


def test_a_group_that_agrees_has_no_advantage_at_all():
    assert sod.group_advantages(torch.full((48,), -0.7), 16).eq(0).all()  # its fp32 mean is not -.7
    assert sod.group_advantages(torch.tensor([0.3]), 1).tolist() == [0.0]


def test_methods_differ_only_in_view_and_token_advantage():
    A, w = torch.tensor([2.0]), torch.tensor([[1.0, 0.5]])
    logp_s = torch.tensor([[0.0, -1.0, 0.0, -2.0]])
    logp_t = torch.tensor([[0.0, -3.0, math.nan, -1.0]])
    step_id = torch.tensor([[-1, 0, -1, 1]])
    one, two = torch.ones_like(w), slice(1, 4, 2)
    rows = {"grpo": [2, 2], "opd": [2 - 2, 2 + 1], "opd_only": [-2, 1], "opsd_gt": [0, 3],
            "opsd_hint": [0, 3], "sod": [2 - 2, 2 + 0.5], "sod_only": [-2, 0.5]}
    assert set(rows) == set(sod.METHODS)
    for method, expected in rows.items():
        weights = w if sod.METHODS[method].weights == "sod" else one
        got = sod.token_advantages(method, A, logp_s, logp_t, step_id, weights)
        assert got[0, two].tolist() == expected, method
        assert got[0, ::2].tolist() == [0, 0], method  # tool tokens, NaN or not
    half = sod.token_advantages("sod", A, logp_s, logp_t, step_id, w, opd_coef=0.5)
    assert half[0, two].tolist() == [1, 2.25]


def test_token_advantages_carry_no_gradient():
    logp_s = torch.randn(1, 3, requires_grad=True)
    step_id = torch.tensor([[0, 0, -1]])
    got = sod.token_advantages("sod", torch.ones(1), logp_s, torch.randn(1, 3), step_id,
                               torch.ones(1, 1))
    assert not got.requires_grad


# --- Policy loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio, A, loss", [
    (1.0, 2.0, -2.0),
    (1.5, 2.0, -2.56),     # clipped above at 1.28
    (0.5, 2.0, -1.0),      # a good token that became unlikely is not clipped
    (0.5, -2.0, 1.6),      # clipped below at .8
    (2.0, -2.0, 4.0),
    (9.0, -2.0, 6.0),      # dual clip: at most 3 |A|
    (math.exp(30), -1.0, 3.0),
])
def test_surrogate_clips_low_high_and_dual(ratio, A, loss):
    logp = torch.tensor([[math.log(ratio)]])
    got = sod.policy_loss(logp, torch.zeros(1, 1), torch.tensor([[A]]), torch.tensor([[True]]))
    assert float(got) == pytest.approx(loss, rel=1e-5)


def test_loss_ignores_masked_tokens_even_when_they_are_not_finite():
    logp = torch.tensor([[-1.0, math.nan, -math.inf]], requires_grad=True)
    old = torch.tensor([[-1.0, 0.0, math.inf]])
    loss = sod.policy_loss(logp, old, torch.tensor([[1.0, math.nan, 1.0]]),
                           torch.tensor([[True, False, False]]))
    loss.backward()
    assert float(loss.detach()) == -1.0 and logp.grad.tolist() == [[-1.0, 0.0, 0.0]]


def test_empty_mask_gives_zero_not_nan():
    none = torch.zeros(2, 2, dtype=torch.bool)
    assert float(sod.policy_loss(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2), none)) == 0


def test_token_mean_does_not_depend_on_how_the_step_is_cut():
    torch.manual_seed(2)
    logp, old, A = torch.randn(3, 6, 7, **T64).unbind()
    mask = torch.rand(6, 7) > 0.4
    whole = sod.policy_loss(logp, old, A, mask)
    for cut in (1, 2, 6):
        parts = [sod.policy_loss(*(x[i:i + 6 // cut] for x in (logp, old, A, mask)),
                                 num_tokens=int(mask.sum())) for i in range(0, 6, 6 // cut)]
        assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-12)


# --- Log-probabilities ------------------------------------------------------------------------


def problem(B=2, T=5, V=700, D=8):
    torch.manual_seed(3)
    return (torch.randn(B, T, D, **T64, requires_grad=True),
            torch.randn(V, D, **T64, requires_grad=True), torch.randint(0, V, (B, T)))


@pytest.mark.parametrize("keep", [0, 2 ** 25])
@pytest.mark.parametrize("tile", [256, 2 ** 25])
def test_token_logprobs_equal_log_softmax_and_its_gradient(monkeypatch, tile, keep):
    monkeypatch.setattr(sod, "TILE_ELEMENTS", tile)  # 3 tiles of 256, or one
    monkeypatch.setattr(sod, "KEEP_ELEMENTS", keep)  # computed again in backward, or kept
    hidden, weight, targets = problem()
    logp, entropy = sod.token_logprobs(hidden, weight, targets, temperature=0.7, entropy=True)
    full = torch.log_softmax(hidden @ weight.T / 0.7, -1)
    expected = full.gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(logp, expected)
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1))
    assert not entropy.requires_grad
    g = torch.randn_like(logp)
    got = torch.autograd.grad((logp * g).sum(), (hidden, weight))
    want = torch.autograd.grad((expected * g).sum(), (hidden, weight))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("tile", [256, 2 ** 25])
def test_reverse_kl_equals_the_sum_over_the_vocabulary_and_its_gradient(monkeypatch, tile):
    monkeypatch.setattr(sod, "TILE_ELEMENTS", tile)
    hidden, weight, _ = problem()
    hidden_t, weight_t = torch.randn(2, 5, 6, **T64), torch.randn(700, 6, **T64)
    kl = sod.reverse_kl(hidden, weight, hidden_t, weight_t, temperature=1.3)
    log_p = torch.log_softmax(hidden @ weight.T / 1.3, -1)
    log_q = torch.log_softmax(hidden_t @ weight_t.T / 1.3, -1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(kl, expected)
    g = torch.rand_like(kl)
    got = torch.autograd.grad((kl * g).sum(), (hidden, weight))
    want = torch.autograd.grad((expected * g).sum(), (hidden, weight))
    torch.testing.assert_close(got, want)


def test_both_functions_pass_gradcheck(monkeypatch):
    monkeypatch.setattr(sod, "KEEP_ELEMENTS", 0)  # kept tiles serve the first backward only
    hidden, weight, targets = problem(B=1, T=2, V=5, D=3)
    other, head = torch.randn(1, 2, 4, **T64), torch.randn(5, 4, **T64)
    check = torch.autograd.gradcheck
    assert check(lambda h, w: sod.token_logprobs(h, w, targets), (hidden, weight))
    assert check(lambda h, w: sod.reverse_kl(h, w, other, head), (hidden, weight))


def test_softmax_is_taken_in_fp32_even_for_bf16_states():
    hidden, weight, targets = problem(V=4000, D=64)
    hidden, weight = (3 * hidden.detach()).bfloat16(), weight.detach().bfloat16()
    exact = torch.log_softmax(hidden.double() @ weight.double().T, -1)
    exact = exact.gather(-1, targets[..., None])[..., 0]
    got = sod.token_logprobs(hidden, weight, targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("keep", [0, 2 ** 25])
def test_gradient_of_a_confident_token_survives_16_bits(monkeypatch, keep):
    """p is .999 or so: bf16 has no number between .996 and 1 to write it down as."""
    monkeypatch.setattr(sod, "KEEP_ELEMENTS", keep)
    torch.manual_seed(5)
    hidden, weight = torch.randn(40, 64).bfloat16(), (0.3 * torch.randn(700, 64)).bfloat16()
    targets = torch.arange(40)
    weight[:40] = hidden * 0.26
    grads = []
    for dtype in (torch.float64, torch.bfloat16):
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        logp = sod.token_logprobs(h, w, targets)
        assert 0.9 < logp.exp().median() and logp.exp().max() > 0.9999
        grads.append([g.double()[:40] for g in torch.autograd.grad(logp.sum(), (h, w))])
    for exact, got in zip(*grads):  # token by token; with p - 1 in bf16 the worst is 1.4
        error = (got - exact).norm(dim=1) / exact.norm(dim=1)
        assert error.median() < 0.01 and error.max() < 0.15


# --- What the estimator estimates -------------------------------------------------------------
# A policy over sequences of 3 tokens from 2, small enough to list all 8 of them.


def tiny_policies():
    torch.manual_seed(4)
    student = torch.randn(7, 2, **T64, requires_grad=True)  # a row of logits for every prefix
    teacher = torch.randn(7, 2, **T64)
    sequences = list(itertools.product(range(2), repeat=3))
    prefix = [[0, 1 + s[0], 3 + 2 * s[0] + s[1]] for s in sequences]
    return student, teacher, torch.tensor(sequences), torch.tensor(prefix)


def logprobs_of_all(logits, sequences, prefix):
    return torch.log_softmax(logits, -1)[prefix].gather(-1, sequences[..., None])[..., 0]  # (8, 3)


def expected_gradient(student, logp, advantages):
    """Gradient of the expectation over sequences of the loss on one whole batch of all of them."""
    probability = logp.sum(1).exp().detach()
    loss = sum(p * sod.policy_loss(logp[i:i + 1], logp[i:i + 1].detach(), advantages[i:i + 1],
                                   torch.ones(1, 3, dtype=torch.bool), num_tokens=1)
               for i, p in enumerate(probability))
    return torch.autograd.grad(loss, student, retain_graph=True)[0]


def test_sampled_advantage_with_reward_to_go_is_the_gradient_of_the_reverse_kl():
    student, teacher, sequences, prefix = tiny_policies()
    logp_s, logp_t = (logprobs_of_all(x, sequences, prefix) for x in (student, teacher))
    kl = (logp_s.sum(1).exp() * (logp_s - logp_t).sum(1)).sum()
    gap = (logp_t - logp_s).detach()
    to_go = gap.flip(1).cumsum(1).flip(1)  # this token's gap and all later ones
    torch.testing.assert_close(expected_gradient(student, logp_s, to_go),
                               torch.autograd.grad(kl, student)[0])


def test_the_papers_per_token_advantage_is_the_gradient_of_each_tokens_own_kl():
    """Its expected gradient is that of sum_t KL(student || teacher | prefix), prefixes held fixed:
    the advantage of a token leaves out what the token does to later ones."""
    student, teacher, sequences, prefix = tiny_policies()
    logp_s, logp_t = (logprobs_of_all(x, sequences, prefix) for x in (student, teacher))
    step_id = torch.zeros_like(sequences)
    advantages = sod.token_advantages("opd_only", torch.zeros(8), logp_s, logp_t, step_id,
                                      torch.ones(8, 1))
    kl_at = (student.log_softmax(-1).exp()
             * (student.log_softmax(-1) - teacher.log_softmax(-1))).sum(-1)  # (7,) by prefix
    weight = logp_s.sum(1).exp().detach()
    own_kl = sum(p * kl_at[prefix[i]].sum() for i, p in enumerate(weight))
    own = torch.autograd.grad(own_kl, student, retain_graph=True)[0]
    torch.testing.assert_close(expected_gradient(student, logp_s, advantages), own)
    true_kl = (logp_s.sum(1).exp() * (logp_s - logp_t).sum(1)).sum()
    assert not torch.allclose(own, torch.autograd.grad(true_kl, student)[0])  # and not the joint's


def test_step_weights_and_length_only_scale_each_prefix_of_the_expected_gradient():
    """With w_k fixed by the step, the gradient at a prefix of step k is w_k / length times the
    unweighted one: the direction at each prefix stays that of its reverse KL."""
    student, teacher, sequences, prefix = tiny_policies()
    logp_s, logp_t = (logprobs_of_all(x, sequences, prefix) for x in (student, teacher))
    step_id, w = torch.tensor([[0, 1, 2]] * 8), torch.tensor([[1.0, 0.4, 1.2]] * 8, **T64)
    weighted = sod.token_advantages("sod_only", torch.zeros(8, **T64), logp_s, logp_t, step_id, w)
    plain = sod.token_advantages("opd_only", torch.zeros(8, **T64), logp_s, logp_t, step_id,
                                 torch.ones(8, 3, **T64))
    got = expected_gradient(student, logp_s, weighted / 3)
    want = expected_gradient(student, logp_s, plain)
    scale = torch.tensor([1.0, 0.4, 0.4, 1.2, 1.2, 1.2, 1.2], **T64)[:, None] / 3
    torch.testing.assert_close(got, want * scale)


def test_clipping_stops_the_gradient_only_of_tokens_that_have_already_moved():
    """On the first optimiser step ratio is 1 and nothing clips; later a token that its advantage
    has pushed past the clip gets no more gradient, which biases the estimate towards 0."""
    logp = torch.tensor([[0.0, 0.5, -0.5, 0.5]], requires_grad=True)
    A = torch.tensor([[1.0, 1.0, 1.0, -1.0]])
    sod.policy_loss(logp, torch.zeros(1, 4), A, torch.ones(1, 4).bool(), num_tokens=1).backward()
    grad = logp.grad[0].tolist()
    assert grad == pytest.approx([-1.0, 0.0, -math.exp(-0.5), math.exp(0.5)])


def test_one_cut_of_full_kl_and_sampled_kl_agree_in_expectation():
    """kl="full" differentiates the KL at each prefix; its gradient is the sampled one's mean."""
    student, teacher, sequences, prefix = tiny_policies()
    eye = torch.eye(2, **T64)
    kl = sod.reverse_kl(student, eye, teacher, eye)  # hidden states that are the logits
    logp_s, logp_t = (logprobs_of_all(x, sequences, prefix) for x in (student, teacher))
    weight = logp_s.sum(1).exp().detach()
    full = sum(p * kl[prefix[i]].sum() for i, p in enumerate(weight))
    sampled = expected_gradient(student, logp_s, (logp_t - logp_s).detach())
    torch.testing.assert_close(torch.autograd.grad(full, student, retain_graph=True)[0], sampled)
