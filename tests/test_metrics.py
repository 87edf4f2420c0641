"""Metrics against hand-computed values, and intervals against simulated truth."""

import doctest
import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import evaluate
import sod_mini as sod
from evaluate import average_at_k, compare, majority_at_k, mean_and_std, pass_at_k


def interval(scores, draws=10_000):
    """(low, high) in fractions of 1, of one score a problem."""
    _, low, high = sod.average_with_interval(np.array(scores)[:, None], draws)
    return low / 100, high / 100



# --- One number -------------------------------------------------------------------------------

def test_average_weighs_problems_equally_whatever_their_number_of_samples():
    assert average_at_k([[True, False], [True, True]]) == 0.75
    assert average_at_k([[1, 0, 0, 0], [1]]) == 0.625  # not 2/5
    assert average_at_k(np.zeros((30, 32))) == 0.0


@pytest.mark.parametrize("n, c, k, value", [
    (4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 2, 2, 5 / 6), (4, 0, 4, 0.0), (4, 4, 1, 1.0),
    (4, 1, 4, 1.0),
    (5, 2, 3, 0.9), (10, 3, 5, 11 / 12), (1, 1, 1, 1.0), (4, 3, 2, 1.0),
])
def test_pass_at_k_by_hand(n, c, k, value):
    assert pass_at_k(n, c, k) == pytest.approx(value, abs=1e-15)


def test_pass_at_k_is_the_mean_over_all_subsets():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_neither_overflows_nor_cancels():
    assert pass_at_k(20_000, 1, 1) == 1 / 20_000
    assert pass_at_k(10**6, 1, 3) == 3e-6
    assert pass_at_k(20_000, 5000, 10_000) == 1.0
    assert average_at_k([[1, 0, 0]]) == pass_at_k(3, 1, 1)


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0), (0, 0, 1)])
def test_pass_at_k_refuses_the_impossible(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}; needed"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize("answers, correct, value", [
    (["7", "7", "8"], [1, 1, 0], 1.0), (["8", "8", "7"], [0, 0, 1], 0.0), (["7", "8"], [1, 0], 0.5),
    (["7", "8", "9"], [1, 0, 0], 1 / 3), (["8", "9"], [0, 0], 0.0),
    ([None, None, "7"], [0, 0, 1], 1.0),
    ([None, None], [0, 0], 0.0), (["7"], [1], 1.0),
    (["7", "7", "8", "8", "9"], [1, 1, 0, 0, 0], 0.5),
])
def test_majority_by_hand_with_ties_shared(answers, correct, value):
    assert majority_at_k([answers], [correct]) == pytest.approx(value)
    assert majority_at_k([answers, ["1"]], [correct, [1]]) == pytest.approx((value + 1) / 2)


def test_empty_input_stops_with_a_sentence():
    for empty in (lambda: average_at_k([]), lambda: average_at_k([[]]),
                  lambda: majority_at_k([], []), lambda: compare({}, {})):
        with pytest.raises(ValueError, match="needed|needs"):
            empty()
    with pytest.raises(ValueError):
        majority_at_k([["7", "8"]], [[1]])


# --- Uncertainty ------------------------------------------------------------------------------

def test_mean_and_std_over_runs_by_hand():
    mean, std = mean_and_std([1, 2, 3, 4, 5])
    assert mean == 3 and std == pytest.approx(math.sqrt(2.5))
    assert math.isnan(mean_and_std([0.5])[1])


def test_interval_of_a_coin_matches_the_normal_formula():
    scores = [0, 1] * 200
    low, high = interval(scores)
    half = 1.96 * 0.5 / math.sqrt(399)  # 4.9 points
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.004)


def test_an_interval_is_the_same_each_time():
    scores = np.random.default_rng(0).uniform(size=30)
    assert interval(scores) == interval(scores)


def test_resampled_means_have_the_unbiased_variance():
    means = sod.resampled_means([0, 1, 1, 2], draws=40_000)
    assert means.mean() == pytest.approx(1.0, abs=0.01)
    assert means.var() == pytest.approx((2 / 3) / 4, rel=0.03)  # s^2 / P; 1/8 without the factor


def test_all_wrong_or_all_right_is_not_certainty():
    low, high = interval([0.0] * 30)
    assert (low, high) == pytest.approx((0, 1 - 0.025 ** (1 / 30)))
    assert high == pytest.approx(0.1157, abs=1e-4)
    assert interval([1.0] * 30) == pytest.approx((1 - high, 1.0))
    assert interval([0.5]) == (0.0, 1.0)
    assert interval([0.0]) == pytest.approx((0, 0.975))


@pytest.mark.parametrize("shape", [(2.0, 2.0), (0.5, 0.5), (0.4, 1.6)])
def test_intervals_cover_the_true_mean_about_as_often_as_they_say(shape):
    """Thirty problems whose difficulty is drawn from a beta law, eight samples of each."""
    generator, hits, trials = np.random.default_rng(0), 0, 400
    for _ in range(trials):
        chance = generator.beta(*shape, size=30)
        low, high = interval(generator.binomial(8, chance) / 8, draws=600)
        hits += low <= shape[0] / sum(shape) <= high
    assert 0.91 <= hits / trials <= 0.98  # 0.95 with a standard error of 0.011


def test_paired_intervals_cover_the_true_difference():
    generator, hits, wrong, trials = np.random.default_rng(1), 0, 0, 400
    for _ in range(trials):
        chance = generator.beta(1, 1, size=30) * 0.9
        a = dict(enumerate(generator.binomial(8, chance) / 8))
        b = dict(enumerate(generator.binomial(8, chance + 0.1) / 8))
        found = compare(a, b, draws=600)
        hits += found.low <= 10.0 <= found.high
        wrong += found.high < 0
    assert 0.91 <= hits / trials <= 0.98 and wrong == 0


def test_two_equal_models_are_told_apart_about_one_time_in_twenty():
    generator, told = np.random.default_rng(2), 0
    for _ in range(400):
        chance = generator.beta(1, 1, size=30)
        a, b = (dict(enumerate(generator.binomial(8, chance) / 8)) for _ in range(2))
        told += "is better" in compare(a, b, draws=600).verdict
    assert 0.02 <= told / 400 <= 0.09


def test_comparison_by_hand():
    a = {n: 0.25 for n in range(100)}
    b = {n: 0.25 + 0.1 * (n % 2) for n in range(100)}  # differences 0 and 10 points
    found = compare(a, b)
    assert found.problems == 100 and found.difference == pytest.approx(5.0)
    half = 1.96 * 5 / math.sqrt(99)
    assert found.low == pytest.approx(5 - half, abs=0.06)
    assert found.verdict == "B is better by 5.0 points, 95% interval 4.0 to 6.0"
    assert compare(b, a).verdict == "A is better by 5.0 points, 95% interval 4.0 to 6.0"
    assert compare(b, a, names=("sod", "opd")).verdict.startswith("sod is better by 5.0")


def test_pairing_finds_what_two_separate_intervals_hide():
    generator = np.random.default_rng(3)
    hard = generator.uniform(0, 0.9, 30)
    a, b = dict(enumerate(hard)), dict(enumerate(hard + 0.05 + generator.uniform(-0.02, 0.02, 30)))
    assert interval([*a.values()])[1] > interval([*b.values()])[0]  # they overlap
    assert compare(a, b).verdict.startswith("B is better by 5.")


def test_too_little_evidence_is_no_verdict():
    same = {n: 0.5 for n in range(30)}
    assert compare(same, same).verdict == (
        "30 problems cannot tell these apart (B minus A: +0.0 points, 95% interval 0.0 to 0.0)")
    five, six = ({n: score for n in range(count)} for count, score in ((5, 0.0), (6, 0.0)))
    assert "5 problems cannot tell" in compare(five, dict.fromkeys(five, 1.0)).verdict
    assert "B is better by 100.0" in compare(six, dict.fromkeys(six, 1.0)).verdict
    noise = {n: 0.1 + 0.2 for n in range(30)}, {n: 0.3 for n in range(30)}
    assert "cannot tell" in compare(*noise).verdict and "-0.0" not in compare(*noise).verdict
    assert compare({1: 0}, {1: 1}).verdict.startswith("1 problem cannot")
    with pytest.raises(ValueError, match="A has 1 problems that B lacks, B has 2 that A lacks"):
        compare({1: 0, 2: 0}, {1: 0, 3: 0, 4: 0})


def test_thirteen_hundred_problems_take_less_than_a_second():
    start = time.perf_counter()
    interval(np.random.default_rng(0).uniform(size=1319))
    assert time.perf_counter() - start < 1.5


def test_examples_in_the_docstrings():
    assert doctest.testmod(evaluate) == doctest.TestResults(failed=0, attempted=7)
