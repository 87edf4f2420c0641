"""The method as pure functions, held against numbers worked out by hand and against plain loops."""
import doctest
import itertools
import math

import pytest
import torch

import sod_mini as sod

T64 = dict(dtype=torch.float64)


# --- Eq. 6 and 7 ------------------------------------------------------------------------------


@pytest.mark.parametrize("d, w", [
    ([0.3, 0.6, 0.2], [1.0, 0.5, 1.2]),
    ([0.3, 0.1, 0.6], [1.0, 1.2, 0.5]),   # a clipped running product would give .2 at the end
    ([0.218, 1.284], [1.0, 0.1698]),
    ([0.0, 0.5, 0.5], [1.0, 0.0, 0.0]),   # a first step known by heart switches the rest off
])
def test_drifted_step_is_damped_and_recovery_is_capped(d, w):
    assert sod.step_weights(torch.tensor([d]))[0].tolist() == pytest.approx(w, abs=1e-4)


def test_weights_equal_the_running_product_of_the_paper():
    torch.manual_seed(0)
    d, epsilon, delta = torch.rand(50, 9, **T64) * 3, 1e-6, 0.2
    for row, got in zip(d.tolist(), sod.step_weights(d, epsilon, delta).tolist()):
        ratios = [(a + epsilon) / (b + epsilon) for a, b in itertools.pairwise(row)]
        products = itertools.accumulate(ratios, lambda x, y: x * y, initial=1.0)
        assert got == pytest.approx([min(p, 1 + delta) for p in products], rel=1e-9)


def test_divergence_is_the_mean_gap_within_each_step_and_ignores_everything_else():
    logp_s = torch.tensor([[9.0, -1.0, -2.0, math.nan, -3.0], [0.0, -1.0, 5.0, 5.0, 5.0]])
    logp_t = torch.tensor([[0.0, -1.5, -1.0, math.inf, -7.0], [0.0, -2.0, 0.0, 0.0, 0.0]])
    step_id = torch.tensor([[0, 1, 1, 0, 2], [0, 1, 0, 0, 0]])
    d = sod.step_divergence(logp_s, logp_t, step_id)
    assert d.tolist() == [[0.75, 4.0], [1.0, 0.0]]  # (.5 + 1) / 2; 4; 1; absent step
    assert sod.step_divergence(logp_s, logp_t, step_id, 3).tolist() == [[.75, 4, 0], [1, 0, 0]]
    assert sod.step_divergence(logp_s, logp_t, torch.zeros_like(step_id)).tolist() == [[0], [0]]
    assert sod.step_tokens(step_id, 3).tolist() == [[2, 1, 0], [1, 0, 0]]


# What each scheme makes of one rollout: d, and that its second of four calls failed.
@pytest.mark.parametrize("scheme, d, w", [
    ("sod", [.3, .6, .2, .3], [1, .5, 1.2, 1]),
    ("uniform", [.3, .6, .2, .3], [1, 1, 1, 1]),
    ("decay", [.3, .6, .2, .3], [1, 1, .9, .81]),
    ("mask_after_error", [.3, .6, .2, .3], [1, 1, 0, 0]),
    ("unclipped", [.6, .1, .6, .2], [1, 6, 1, 3]),
    ("sod", [0., .4, .1, .8], [1, 0, 0, 0]),
    ("floor", [0., .4, .1, .8], [1, .5, 1, .25]),  # d_1 near 0 does not switch off the rest
    ("floor", [.6, .1, .6, .3], [1, 1.2, 1, 1.2]),
])
def test_weight_schemes(scheme, d, w):
    batch = sod.Batch([], [], 0, None, None, torch.tensor([[False, True, False, True]]), None,
                      d=torch.tensor([d]))
    assert sod.WEIGHTS[scheme](batch, sod.Config())[0].tolist() == pytest.approx(w, abs=2e-4)


def test_the_first_failed_call_counts_and_not_the_later_ones():
    failed = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    assert sod.steps_since_failure(failed).tolist() == [[0, 0, 1, 2, 3], [0] * 5, [0, 1, 2, 3, 4]]


# --- Advantages -------------------------------------------------------------------------------


def test_group_advantage_is_the_z_score_with_ddof_1():
    A = sod.group_advantages(torch.tensor([1.0, -1, -1, 1, 1, 1, 1, -1]), 4)
    assert A[:4].tolist() == pytest.approx([.8660, -.8660, -.8660, .8660], abs=1e-4)
    assert A[4:].tolist() == pytest.approx([.5, .5, .5, -1.5], abs=1e-4)


@pytest.mark.parametrize("rewards, G", [
    ([-0.7] * 48, 16),  # its fp32 mean is not -.7
    ([0.3], 1), ([math.nan] * 4, 4), ([0.1, math.nan, 0.1, 0.1], 4), ([math.nan, -0.9], 2)])
def test_a_group_that_agrees_has_no_advantage_at_all(rewards, G):
    assert sod.group_advantages(torch.tensor(rewards), G).tolist() == [0.0] * len(rewards)


@pytest.mark.parametrize("method, A_it, half", [
    ("vanilla", [0, 0], [0, 0]), ("sft", [0, 0], [0, 0]), ("grpo", [2, 2], [2, 2]),
    ("opd", [2 - 2, 2 + 1], [1, 2.5]), ("opd_only", [-2, 1], [-1, .5]),
    ("opsd_gt", [0, 3], [1, 2.5]), ("opsd_hint", [0, 3], [1, 2.5]),
    ("sod", [2 - 2, 2 + 0.5], [1, 2.25]), ("sod_only", [-2, 0.5], [-1, .25])])
def test_methods_differ_only_in_token_advantage(method, A_it, half):
    A, w = torch.tensor([2.0]), torch.tensor([[1.0, 0.5]])
    logp_s = torch.tensor([[0.0, -1.0, 0.0, -2.0]], requires_grad=True)
    logp_t = torch.tensor([[0.0, -3.0, math.nan, -1.0]])
    step_id = torch.tensor([[0, 1, 0, 2]])
    weights = w if sod.METHODS[method].weighted else torch.ones_like(w)
    for coefficient, expected in ((1.0, A_it), (0.5, half)):
        got = sod.token_advantages(method, A, logp_s, logp_t, step_id, weights, coefficient)
        assert got[0, 1::2].tolist() == expected
        assert got[0, ::2].tolist() == [0, 0]  # tool tokens, NaN or not
        assert not got.requires_grad


def test_with_coefficient_0_a_gap_that_is_not_finite_does_not_reach_the_outcome():
    step_id, logp_s = torch.tensor([[0, 1]]), torch.tensor([[0.0, -1.0]])
    logp_t = torch.tensor([[0.0, -math.inf]])
    got = sod.token_advantages("sod", torch.tensor([2.0]), logp_s, logp_t, step_id,
                               torch.ones(1, 1), opd_coef=0.0)
    assert got.tolist() == [[0, 2]]


def test_an_advantage_may_be_of_rollouts_or_of_tokens_and_nothing_else():
    step_id, A = torch.tensor([[0, 1, 1], [0, 1, 0]]), torch.tensor([2.0, -1.0])
    of_rollouts = sod.token_advantages("grpo", A, None, None, step_id, None)
    assert of_rollouts.tolist() == [[0, 2, 2], [0, -1, 0]]
    each = torch.tensor([[9.0, 1, 2], [9, 3, 9]])
    assert sod.token_advantages("grpo", each, None, None, step_id, None).tolist() == [
        [0, 1, 2], [0, 3, 0]]
    for wrong in (A[:, None], A[:1], each[:, :2]):
        with pytest.raises(AssertionError, match=r"of rollouts \(2,\) or of tokens \(2, 3\)"):
            sod.token_advantages("grpo", wrong, None, None, step_id, None)
    with pytest.raises(AssertionError, match="weights are of steps"):
        sod.token_advantages("sod", A, each, each, step_id, A)


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


def test_token_mean_does_not_depend_on_how_the_update_is_cut():
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


def assert_same_value_and_gradient(got, expected, inputs):
    torch.testing.assert_close(got, expected)
    g = torch.randn_like(got)
    torch.testing.assert_close(torch.autograd.grad((got * g).sum(), inputs),
                               torch.autograd.grad((expected * g).sum(), inputs))


@pytest.fixture(params=[True, False], ids=["tiles", "one"])
def tiles(request, monkeypatch):
    """Tiles of 4 tokens x 256 entries, or one of all."""
    if request.param:
        monkeypatch.setattr(sod, "TILE_TOKENS", 4)
        monkeypatch.setattr(sod, "TILE_ELEMENTS", 4 * 256)


def test_token_logprobs_equal_log_softmax_and_its_gradient(tiles):
    hidden, weight, targets = problem()
    logp, entropy = sod.token_logprobs(hidden, weight, targets, temperature=0.7, entropy=True)
    full = torch.log_softmax(hidden @ weight.T / 0.7, -1)
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1))
    assert not entropy.requires_grad
    assert_same_value_and_gradient(logp, full.gather(-1, targets[..., None])[..., 0],
                                   (hidden, weight))


def test_reverse_kl_equals_the_sum_over_the_vocabulary_and_its_gradient(tiles):
    hidden, weight, _ = problem()
    hidden_t, weight_t = torch.randn(2, 5, 6, **T64), torch.randn(700, 6, **T64)
    kl = sod.reverse_kl(hidden, weight, hidden_t, weight_t, temperature=1.3)
    log_p = torch.log_softmax(hidden @ weight.T / 1.3, -1)
    log_q = torch.log_softmax(hidden_t @ weight_t.T / 1.3, -1)
    assert_same_value_and_gradient(kl, (log_p.exp() * (log_p - log_q)).sum(-1), (hidden, weight))


def test_softmax_is_taken_in_fp32_even_for_bf16_states():
    hidden, weight, targets = problem(V=4000, D=64)
    hidden, weight = (3 * hidden.detach()).bfloat16(), weight.detach().bfloat16()
    exact = torch.log_softmax(hidden.double() @ weight.double().T, -1)
    exact = exact.gather(-1, targets[..., None])[..., 0]
    got = sod.token_logprobs(hidden, weight, targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, atol=1e-4, rtol=1e-5)


def test_gradient_of_a_confident_token_survives_16_bits():
    """p is .999 or so: bf16 has no number between .996 and 1 to write it down as."""
    torch.manual_seed(5)
    hidden, weight = torch.randn(40, 64).bfloat16(), (0.3 * torch.randn(700, 64)).bfloat16()
    weight[:40] = hidden * 0.26
    grads = []
    for dtype in (torch.float64, torch.bfloat16):
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        logp = sod.token_logprobs(h, w, torch.arange(40))
        assert 0.9 < logp.exp().median() and logp.exp().max() > 0.9999
        grads.append([g.double()[:40] for g in torch.autograd.grad(logp.sum(), (h, w))])
    for exact, got in zip(*grads):  # token by token; with p - 1 in bf16 the worst is 1.4
        error = (got - exact).norm(dim=1) / exact.norm(dim=1)
        assert error.median() < 0.01 and error.max() < 0.15


# --- What the estimator estimates -------------------------------------------------------------
# A policy over sequences of 3 tokens from 2, small enough to list all 8 of them.


class Policies:
    """Student and teacher: a row of logits for each of the 7 prefixes."""

    def __init__(self):
        torch.manual_seed(4)
        self.student = torch.randn(7, 2, **T64, requires_grad=True)
        self.teacher = torch.randn(7, 2, **T64)
        self.sequences = torch.tensor(list(itertools.product(range(2), repeat=3)))
        self.prefix = torch.tensor([[0, 1 + a, 3 + 2 * a + b] for a, b, _ in self.sequences])
        self.logp_s, self.logp_t = self.logp(self.student), self.logp(self.teacher)
        self.share = self.logp_s.sum(1).exp()  # (8,) probability of each sequence

    def logp(self, logits):
        every = torch.log_softmax(logits, -1)[self.prefix]
        return every.gather(-1, self.sequences[..., None])[..., 0]  # (8, 3)

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.student, retain_graph=True)[0]

    def expected_gradient(self, advantages):
        """Gradient of the expectation of the policy loss over all sequences."""
        one = lambda x, i: x[i:i + 1]
        mask = torch.ones(1, 3, dtype=torch.bool)
        return self.gradient(sum(p * sod.policy_loss(
            one(self.logp_s, i), one(self.logp_s, i).detach(), one(advantages, i), mask,
            num_tokens=1) for i, p in enumerate(self.share.detach())))

    def advantages(self, method, step_id, w):
        return sod.token_advantages(method, torch.zeros(8, **T64), self.logp_s, self.logp_t,
                                    torch.tensor([step_id] * 8), torch.tensor([w] * 8, **T64))

    def kl_with_prefixes_held_fixed(self, kl):
        """kl: (7,) at each prefix."""
        return sum(p * kl[self.prefix[i]].sum() for i, p in enumerate(self.share.detach()))


def test_sampled_advantage_with_reward_to_go_is_the_gradient_of_the_reverse_kl():
    tiny = Policies()
    gap = (tiny.logp_t - tiny.logp_s).detach()
    to_go = gap.flip(1).cumsum(1).flip(1)  # this token's gap and all later ones
    kl = (tiny.share * (tiny.logp_s - tiny.logp_t).sum(1)).sum()
    torch.testing.assert_close(tiny.expected_gradient(to_go), tiny.gradient(kl))


def test_the_papers_per_token_advantage_is_the_gradient_of_each_tokens_own_kl():
    """Its expected gradient is that of sum_t KL(student || teacher | prefix), prefixes held fixed:
    the advantage of a token leaves out what the token does to later ones."""
    tiny = Policies()
    log_p, log_q = tiny.student.log_softmax(-1), tiny.teacher.log_softmax(-1)
    own = tiny.gradient(tiny.kl_with_prefixes_held_fixed((log_p.exp() * (log_p - log_q)).sum(-1)))
    torch.testing.assert_close(
        tiny.expected_gradient(tiny.advantages("opd_only", [1, 1, 1], [1.0])), own)
    joint = (tiny.share * (tiny.logp_s - tiny.logp_t).sum(1)).sum()
    assert not torch.allclose(own, tiny.gradient(joint))
    # kl="full" differentiates the KL at each prefix: the same gradient, without sampling
    eye = torch.eye(2, **T64)  # hidden states that are the logits
    full = tiny.kl_with_prefixes_held_fixed(sod.reverse_kl(tiny.student, eye, tiny.teacher, eye))
    torch.testing.assert_close(tiny.gradient(full), own)


def test_docstring_examples_are_true():
    failed, tried = doctest.testmod(sod)
    assert tried and not failed
