"""Metrics against hand-computed values, and intervals against simulated truth."""
import doctest
import math

import numpy as np
import pytest

import sod_mini as sod
import evaluate
from evaluate import compare, majority, mean_and_std, pass_at_k, verdict


def interval(scores):
    """(low, high) in fractions of 1, of one score a problem."""
    _, low, high = sod.mean_ci(np.array(scores)[:, None])
    return low / 100, high / 100


# --- One number -------------------------------------------------------------------------------

@pytest.mark.parametrize("n, c, k, value", [
    (4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 2, 2, 5 / 6), (4, 0, 4, 0.0), (4, 4, 1, 1.0),
    (4, 1, 4, 1.0), (5, 2, 3, 0.9), (10, 3, 5, 11 / 12), (1, 1, 1, 1.0), (4, 3, 2, 1.0),
    (20_000, 1, 1, 1 / 20_000), (10**6, 1, 3, 3e-6), (20_000, 5000, 10_000, 1.0)])
def test_pass_at_k_by_hand_without_overflow_or_cancellation(n, c, k, value):
    assert pass_at_k(n, c, k) == pytest.approx(value, rel=1e-15, abs=0)


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0), (0, 0, 1)])
def test_pass_at_k_refuses_the_impossible(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}; needed"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize("answers, correct, value", [
    (["7", "7", "8"], [1, 1, 0], 1.0), (["8", "8", "7"], [0, 0, 1], 0.0), (["7", "8"], [1, 0], 0.5),
    (["7", "8", "9"], [1, 0, 0], 1 / 3), (["8", "9"], [0, 0], 0.0),
    ([None, None, "7"], [0, 0, 1], 1.0), ([None, None], [0, 0], 0.0), (["7"], [1], 1.0),
    (["7", "7", "8", "8", "9"], [1, 1, 0, 0, 0], 0.5)])
def test_majority_by_hand_with_ties_shared(answers, correct, value):
    assert majority(answers, correct) == pytest.approx(value)


@pytest.mark.parametrize("spellings", [
    ["5", "x = 5", "5 cm", "5 dollars", "5.0"], ["50%", "50"], ["x^2", "y = x^2"],
    [r"\frac12", "1/2", ".5"], ["(1, 2)", r"\left(1,2\right)"], [r"\{2, 1\}", "1, 2"]])
def test_spellings_that_the_grader_calls_equal_are_one_vote(spellings):
    """As one answer they outvote another one that is given once less often."""
    n = len(spellings)
    answers = spellings + ["77"] * (n - 1)
    assert majority(answers, [1] * n + [0] * (n - 1)) == 1.0
    assert majority(spellings + ["77"], [1] * n + [0]) == 1.0


def test_each_vote_has_its_grade_and_comparisons_need_problems():
    with pytest.raises(ValueError):
        majority(["7", "8"], [1])
    with pytest.raises(ValueError, match="at least one"):
        compare({}, {})


def test_mean_and_std_over_runs_by_hand():
    mean, std = mean_and_std([1, 2, 3, 4, 5])
    assert mean == 3 and std == pytest.approx(math.sqrt(2.5))
    assert math.isnan(mean_and_std([0.5])[1])


def test_t_interval_is_that_of_the_textbook():
    assert [sod.t_975(n) for n in (1, 4, 29)] == pytest.approx([12.706, 2.776, 2.045], abs=1e-3)
    # 1..5: mean 3, std sqrt(2.5), so 3 -+ 2.776 sqrt(2.5 / 5)
    assert sod.t_interval([1, 2, 3, 4, 5]) == pytest.approx((3, 1.0368, 4.9632), abs=1e-3)
    mean, low, high = sod.t_interval([7])
    assert mean == 7 and math.isnan(low) and math.isnan(high)


# --- The interval of an average ---------------------------------------------------------------

def test_interval_of_a_coin_matches_the_normal_formula():
    half = 1.96 * 0.5 / math.sqrt(399)  # 4.9 points
    assert interval([0, 1] * 200) == pytest.approx((0.5 - half, 0.5 + half), abs=0.001)


def test_all_wrong_or_all_right_is_not_certainty_and_nor_is_one_right_sample():
    low, high = interval([0.0] * 30)
    assert (low, high) == pytest.approx((0, 1 - 0.025 ** (1 / 30)))
    assert high == pytest.approx(0.1157, abs=1e-4)
    assert interval([1.0] * 30) == pytest.approx((1 - high, 1.0))
    assert interval([0.5]) == (0.0, 1.0)
    assert interval([0.0]) == pytest.approx((0, 0.975))
    # 1 of 960 right says no more than 0 of 960
    assert interval([1 / 32] + [0.0] * 29) == pytest.approx((0, high), abs=1e-4)
    assert interval([31 / 32] + [1.0] * 29) == pytest.approx((1 - high, 1), abs=1e-4)


BETA = lambda a, b: (lambda rng, shape: rng.beta(a, b, shape), a / (a + b))
FEW_EASY = lambda share, easy, hard: (
    lambda rng, shape: np.where(rng.random(shape) < share, easy, hard),
    share * easy + (1 - share) * hard)
LAWS = {"beta(2, 2)": BETA(2, 2), "beta(.5, .5)": BETA(.5, .5), "beta(.4, 1.6)": BETA(.4, 1.6),
        "beta(.1, .9)": BETA(.1, .9), "beta(.9, .1)": BETA(.9, .1),
        "beta(.05, .95)": BETA(.05, .95),
        "5% at .9, else .01": FEW_EASY(.05, .9, .01), "20% at .9, else .05": FEW_EASY(.2, .9, .05),
        "15% at 1, else 0": FEW_EASY(.15, 1.0, 0.0)}


def coverage(law, P, k, trials):
    """How often the interval holds the mean of the law that P problems are drawn from."""
    draw, truth = LAWS[law]
    rng, hits = np.random.default_rng(P), 0
    for chance in draw(rng, (trials, P)):
        low, high = interval(rng.binomial(k, chance) / k)
        hits += low <= truth <= high
    return hits / trials


@pytest.mark.parametrize("law", ["beta(2, 2)", "beta(.1, .9)", "5% at .9, else .01"])
def test_intervals_cover_the_true_mean_as_often_as_they_say(law):
    assert coverage(law, 30, 32, 400) >= 0.92  # .95 would have a standard error of .011


@pytest.mark.slow
@pytest.mark.parametrize("P", [6, 30, 200])
@pytest.mark.parametrize("law", LAWS)
def test_intervals_cover_the_true_mean_whatever_the_skew(law, P):
    found = {k: coverage(law, P, k, 4000) for k in (1, 4, 32)}
    print(law, P, found)
    assert min(found.values()) >= 0.93


# --- Which of two is better -------------------------------------------------------------------

def scores_of(rng, law, P, k, models, lead=0.0):
    """{problem: share of k right samples} of some models, the last of which may have a lead."""
    chance = LAWS[law][0](rng, P) * (1 - lead)
    return [dict(enumerate(rng.binomial(k, chance + lead * (model == models - 1)) / k))
            for model in range(models)]


def wrong_verdicts(law, P, k, trials):
    """How often one of two equal models is called better."""
    rng = np.random.default_rng(P)
    return np.mean(["is better" in verdict(compare(*scores_of(rng, law, P, k, 2)))
                    for _ in range(trials)])


def test_two_equal_models_are_told_apart_at_most_one_time_in_twenty():
    assert wrong_verdicts("beta(2, 2)", 8, 32, 600) <= 0.07  # it was .11; standard error .009
    assert 0.02 <= wrong_verdicts("beta(2, 2)", 30, 8, 600) <= 0.07


MIX = lambda share, size: lambda rng, shape: (
    np.where(rng.random(shape) < share, size, -size * share / (1 - share))
    + rng.uniform(-0.05, 0.05, shape))
SKEWED = {  # laws with a mean of 0, and how often a verdict may come at P = 8, 30, 100
    "normal": (lambda rng, shape: rng.normal(0, .15, shape), .05, .06, .06),
    "exponential": (lambda rng, shape: .1 * rng.exponential(1, shape) - .1, .075, .06, .055),
    "lognormal": (lambda rng, shape: .05 * rng.lognormal(0, 1, shape) - .05 * math.exp(.5),
                  .10, .08, .06),
    "gamma(1/4)": (lambda rng, shape: .2 * rng.gamma(.25, 1, shape) - .05, .11, .06, .05),
    ".4 on one of five": (MIX(.2, .4), .21, .03, .05),
    ".95 on one of twenty": (MIX(.05, .95), .70, .25, .03)}


def called_one_way(law, P, trials):
    """How often the mean of P differences of such a law is called other than 0."""
    found = [compare(dict.fromkeys(range(P), 0), dict(enumerate(d)))
             for d in SKEWED[law][0](np.random.default_rng(P), (trials, P))]
    return np.mean(["is better" in verdict(one) for one in found])


@pytest.mark.parametrize("law", SKEWED)
def test_skewed_differences_without_a_mean_are_called_better_as_seldom_as_compare_says(law):
    for P, most in zip((8, 30, 100), SKEWED[law][1:]):
        assert called_one_way(law, P, 1000) <= most, P  # standard error .007 at .05


def test_the_interval_allows_for_skewness_and_is_students_where_there_is_none():
    even = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert evaluate.skew_interval(even) == pytest.approx(sod.t_interval(even))
    # skewness 8/3, so a = 8/3 sqrt(9) / 8 = 1; error 1; Hall's g(-6.3789) = -6.3789 + 13.5635
    # - 9.6134 + .1667 = -2.2622, which is t with 9 degrees of freedom
    assert evaluate.skew_interval([0.0] * 9 + [10.0]) == pytest.approx(
        (1, 1 - 2.2622, 1 + 6.3789), abs=1e-3)
    assert evaluate.skew_interval([2.0] * 4) == (2, 2, 2) == evaluate.skew_interval([2.0] * 2)


@pytest.mark.slow
@pytest.mark.parametrize("P", [6, 8, 10, 30, 200])
def test_two_equal_models_are_told_apart_at_most_one_time_in_twenty_whatever_the_skew(P):
    found = {(law, k): wrong_verdicts(law, P, k, 3000)
             for law in ("beta(2, 2)", "beta(.5, .5)", "beta(.1, .9)", "20% at .9, else .05")
             for k in (4, 32)}
    print(P, found)
    assert max(found.values()) <= 0.062  # .05 with a standard error of .004, eight times


def test_paired_intervals_cover_the_true_difference():
    rng, hits, wrong = np.random.default_rng(1), 0, 0
    for _ in range(400):
        result = compare(*scores_of(rng, "beta(2, 2)", 30, 8, 2, lead=0.1))
        hits += result.low <= 10.0 <= result.high
        wrong += result.high < 0
    assert 0.92 <= hits / 400 <= 0.98 and wrong == 0


def test_comparison_by_hand():
    a = {n: 0.25 for n in range(100)}
    b = {n: 0.25 + 0.1 * (n % 2) for n in range(100)}  # differences 0 and 10 points
    result = compare(a, b)
    assert (result.problems, result.differing) == (100, 50)
    half = 1.984 * 5 / math.sqrt(99)
    assert (result.difference, result.low) == pytest.approx((5.0, 5 - half), abs=1e-3)
    assert verdict(result) == "B is better by 5.0 points, 95% interval 4.0 to 6.0"
    assert verdict(compare(b, a)) == "A is better by 5.0 points, 95% interval 4.0 to 6.0"
    assert verdict(compare(b, a), ("sod", "opd")).startswith("sod is better by 5.0")


def test_pairing_finds_what_two_separate_intervals_hide():
    rng = np.random.default_rng(3)
    hard = rng.uniform(0, 0.9, 30)
    a, b = dict(enumerate(hard)), dict(enumerate(hard + 0.05 + rng.uniform(-0.02, 0.02, 30)))
    assert interval([*a.values()])[1] > interval([*b.values()])[0]  # they overlap
    assert verdict(compare(a, b)).startswith("B is better by 5.")


def won(problems, times):
    """A verdict where B is right and A wrong on so many of some problems."""
    return verdict(compare({n: 0 for n in range(problems)},
                           {n: float(n < times) for n in range(problems)}))


def test_too_little_evidence_is_no_verdict_and_the_reason_is_told():
    same = {n: 0.5 for n in range(30)}
    assert verdict(compare(same, same)) == (
        "30 problems cannot tell these apart (B minus A: +0.0 points, 95% interval 0.0 to 0.0): "
        "both score the same on every problem")
    assert "5 problems cannot tell" in won(5, 5) and "B is better by 100.0" in won(6, 6)
    assert won(30, 5).startswith("30 problems cannot tell these apart") and won(30, 5).endswith(
        ": the interval excludes 0, but the scores differ on 5 of them only, and below 6 chance "
        "alone does that too often")
    assert "better" in won(30, 6) and won(30, 2).endswith("-2.8 to 43.3)")  # it holds 0
    assert won(1, 1).startswith("1 problem cannot") and "-100.0 to 100.0" in won(1, 1)
    rounding = verdict(compare({n: 0.1 + 0.2 for n in range(30)}, {n: 0.3 for n in range(30)}))
    assert "cannot tell" in rounding and "-0.0" not in rounding
    with pytest.raises(ValueError, match="A has 1 problems that B lacks, B has 2 that A lacks"):
        compare({1: 0, 2: 0}, {1: 0, 3: 0, 4: 0})


def test_examples_in_the_docstrings():
    assert doctest.testmod(evaluate) == doctest.TestResults(failed=0, attempted=4)
