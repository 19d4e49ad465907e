"""Verdicts on claims: made results whose answer is known, and the correction of p worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic_results import FAST, estimates, synthetic_curve, synthetic_run, write_synthetic_study

from research.bootstrap import Bootstrap, Estimate
from research.ranking.arms import CONTROL
from research.ranking.summary import Row
from research.report import retrieval_tables
from research.report.answer import Report, tally
from research.report.claims import ClaimList, Section
from research.report.document import build
from research.report.expected_models import expected_models
from research.report.verdicts import MAIN_BY_TIME, Finding, Studies, Verdict, findings
from research.retrieval import result_files
from research.retrieval.estimates import StudyEstimates, is_still_improving
from research.retrieval.result_files import CurvePoint

HOLDS, DOES_NOT_HOLD, NOT_SHOWN, NOT_TESTED = Verdict


def studies_of(folder, skills, seeds=(1, 2, 3)) -> Studies:
    return Studies({"ml-small": estimates(folder, skills, seeds=seeds)}, "ml-small", {})


def claims_of(*claims: dict) -> ClaimList:
    words = {"text": "text", "source": "source", "whose": "ours"}
    named = [words | {"id": str(place)} | claim for place, claim in enumerate(claims)]
    return ClaimList(main_study="ml-small", sections=[Section(title="One", claims=named)])


def found(studies: Studies, *claims: dict) -> list[Finding]:
    return list(findings(claims_of(*claims), studies).values())


def difference(model: str, against: str, **more) -> dict:
    pair = {"model": model, "against": against}
    return {"test": "difference", "study": "main", "metric": "ndcg_at_10"} | pair | more


def published(test: str, figure: float, **more) -> dict:
    claim = {"test": test, "study": "ml-small", "model": "sasrec", "metric": "hr_at_10", "published": figure}
    return claim | ({"tolerance": 0.015} if test == "reproduces" else {}) | more


def gain(arm: str, group: str = "all", **more) -> dict:
    return {"test": "ranking-gain", "study": "main", "metric": "uauc", "arm": arm, "group": group} | more


def studies_with_p(*values: float, n_seeds: int = 5, sign: float = 1.0) -> Studies:
    """A ranking study whose arms a0, a1, .. have gains with these p, all .02 (or its negative)."""
    rows = [Row(CONTROL, "all", "uauc", 0.7, None, 50)]
    for place, p in enumerate(values):
        value = 0.02 * sign
        estimate = Estimate(value, value - 0.01, value + 0.01, p, 400, 50, n_seeds)
        rows.append(Row(f"a{place}", "all", "uauc", 0.7 + value, estimate, 50))
    return Studies({}, "ml-small", {"ml-small": rows})


# --- the correction --------------------------------------------------------------------------------------------------


def test_q_is_that_of_benjamini_and_hochberg():
    # p in ascending order times 4 / place: .005 * 4, .02 * 2, .03 * 4 / 3 = .04, .6; then the running minimum from
    # the largest: .02, .04, .04, .6.
    results = found(studies_with_p(0.03, 0.005, 0.6, 0.02), *(gain(f"a{place}") for place in range(4)))
    assert [result.q for result in results] == pytest.approx([0.04, 0.02, 0.6, 0.04])
    assert [result.verdict for result in results] == [HOLDS, HOLDS, NOT_SHOWN, HOLDS]
    assert results[0].result == "UAUC .7000 -> .7200: **+.0200 [+.0100, +.0300], p .030, q .040**; 5 seeds"


def test_a_p_below_the_level_with_a_q_above_it_shows_nothing():
    alone = found(studies_with_p(0.03, 0.6), gain("a0"))
    assert (alone[0].verdict, alone[0].q) == (HOLDS, 0.03)
    together = found(studies_with_p(0.03, 0.6), gain("a0"), gain("a1"))
    assert (together[0].verdict, together[0].q) == (NOT_SHOWN, pytest.approx(0.06))
    assert "p .030, q .060;" in together[0].result and "**" not in together[0].result


def test_families_are_the_claims_of_a_section_and_an_owner():
    studies = studies_with_p(0.03, 0.6)
    of_paper = found(studies, gain("a0"), gain("a1", whose="paper"))
    assert [result.q for result in of_paper] == pytest.approx([0.03, 0.6])
    sections = claims_of(gain("a0"), gain("a1")).sections
    two = [Section(title=str(place), claims=[claim]) for place, claim in enumerate(sections[0].claims)]
    assert findings(ClaimList(main_study="ml-small", sections=two), studies)["0"].q == pytest.approx(0.03)
    # Claims of two sections are one family if they say so.
    joined = [
        Section(title=str(place), claims=[claim.model_copy(update={"family": "x"})])
        for place, claim in enumerate(sections[0].claims)
    ]
    assert findings(ClaimList(main_study="ml-small", sections=joined), studies)["0"].q == pytest.approx(0.06)


def test_claims_without_a_test_are_not_counted_in_the_family(tmp_path):
    studies = studies_of(tmp_path, {"sasrec": 2.5})
    studies = Studies(studies.retrieval, "ml-small", studies_with_p(0.03).ranking)
    others = [published("reproduces", 0.1), difference("sasrec", "gru4rec"), {"test": "none", "reason": "no traffic"}]
    results = found(studies, gain("a0"), *others)
    assert (results[0].q, [result.q for result in results[1:]]) == (pytest.approx(0.03), [None, None, None])


def test_the_paper_s_claims_are_counted_apart_from_ours(tmp_path):
    claims = claims_of(gain("a0", whose="paper"), gain("a1"), gain("a2"), gain("a3", whose="paper"))
    studies = studies_with_p(0.001, 0.5, 0.001)
    report = Report(studies, claims, findings(claims, studies), FAST, tmp_path, [])
    assert tally(report) == [
        "The paper's 2 claims: 1 hold, 0 do not hold, 0 not shown, 1 not tested here",
        "Our own 2 claims: 1 hold, 0 do not hold, 1 not shown, 0 not tested here",
    ]


# --- the tests -------------------------------------------------------------------------------------------------------


def test_a_verdict_flips_when_the_figures_do(tmp_path):
    claim = difference("learn-text", "sasrec")
    for name, text, expected in (("a", 4.0, HOLDS), ("b", 1.2, DOES_NOT_HOLD), ("c", 2.0, NOT_SHOWN)):
        assert found(studies_of(tmp_path / name, {"learn-text": text, "sasrec": 2.0}), claim)[0].verdict is expected
    # One seed decides nothing, however far apart the two are.
    one_seed = found(studies_of(tmp_path / "d", {"learn-text": 4.0, "sasrec": 2.0}, seeds=(1,)), claim)[0]
    assert (one_seed.verdict, one_seed.q) == (NOT_SHOWN, None)
    assert one_seed.result.endswith("; one seed") and ", p " in one_seed.result and "**" not in one_seed.result


def test_a_claim_on_a_model_that_was_not_run_names_the_model(tmp_path):
    result = found(studies_of(tmp_path, {"learn-text": 2.0}), difference("learn-text", "learn-text/lora"))[0]
    assert (result.verdict, result.result) == (
        NOT_TESTED,
        "`learn-text/lora` not run yet in the study `ml-small`",
    )


def test_published_figures_are_judged_by_tolerance_and_interval(tmp_path):
    studies = studies_of(tmp_path / "three", {"sasrec": 2.5})
    mean = studies.study("ml-small").mean("sasrec", "hr_at_10")
    near = found(studies, *(published("reproduces", mean.value + gap) for gap in (0.014, -0.014, 0.016)))
    assert [result.verdict for result in near] == [HOLDS, HOLDS, DOES_NOT_HOLD]
    bounds = (mean.low - 0.001, mean.value, mean.high + 0.001)
    above = found(studies, *(published("exceeds", bound) for bound in bounds))
    assert [result.verdict for result in above] == [HOLDS, NOT_SHOWN, DOES_NOT_HOLD]
    assert found(studies, published("exceeds", 0.1, study="ml-1m"))[0].verdict is NOT_TESTED
    one_seed = studies_of(tmp_path / "one", {"sasrec": 2.5}, seeds=(1,))
    mean = one_seed.study("ml-small").mean("sasrec", "hr_at_10")
    assert found(one_seed, published("reproduces", mean.value))[0].verdict is NOT_SHOWN
    assert found(one_seed, published("exceeds", 0.0))[0].verdict is NOT_SHOWN


def test_a_group_with_too_few_users_or_no_events_decides_nothing(tmp_path):
    studies = studies_of(tmp_path, {"learn-text": 4.0, "sasrec": 1.5})
    assert int(studies.study("ml-small").groups["item 5-19"].sum()) in range(1, 10)
    few, none = found(
        studies,
        *(difference("learn-text", "sasrec", metric="hr_at_100", group=f"item {name}") for name in ("5-19", "1-4")),
    )
    assert (few.verdict, few.q) == (NOT_SHOWN, None) and "too few users" in few.result
    assert none.verdict is NOT_TESTED


def not_behind(margin: float, **more) -> dict:
    return difference("learn-text", "content-mean", test="not-behind", relative_margin=margin) | more


def test_not_behind_holds_if_ahead_or_if_the_interval_rules_out_the_margin(tmp_path):
    ahead = found(studies_of(tmp_path / "a", {"learn-text": 4.0, "content-mean": 2.0}), not_behind(0.02))[0]
    assert ahead.verdict is HOLDS and ahead.q < 0.05
    behind = found(studies_of(tmp_path / "b", {"learn-text": 2.0, "content-mean": 4.0}), not_behind(0.02))[0]
    assert behind.verdict is DOES_NOT_HOLD
    studies = studies_of(tmp_path / "c", {"learn-text": 2.0, "content-mean": 2.0})
    study = studies.study("ml-small")
    gap, reference = (
        study.difference("learn-text", "content-mean", "ndcg_at_10"),
        study.mean("content-mean", "ndcg_at_10"),
    )
    assert gap.low < 0 < gap.high
    just_wide_enough, just_too_narrow = (-gap.low / reference.value * factor for factor in (1.01, 0.99))
    wide, narrow = found(studies, not_behind(just_wide_enough), not_behind(just_too_narrow))
    assert (wide.verdict, narrow.verdict) == (HOLDS, NOT_SHOWN)
    assert wide.q > 0.05 and "; the margin of " in wide.result


def test_ahead_of_all_is_decided_by_the_closest_rival(tmp_path):
    rivals = ["sasrec", "hstu", "popularity"]
    claim = {"test": "ahead-of-all", "study": "main", "metric": "ndcg_at_10", "model": "learn-id", "against": rivals}
    skills = {"learn-id": 4.0, "sasrec": 2.0, "hstu": 1.8, "popularity": 1.2}
    studies = studies_of(tmp_path / "a", skills)
    first = found(studies, claim)[0]
    assert first.verdict is HOLDS and first.result.startswith("of 3 rivals, `sasrec` is the closest: NDCG@10 .")
    # To be ahead of each is harder than to be ahead of one, so p needs no correction.
    assert first.q == studies.study("ml-small").difference("learn-id", "sasrec", "ndcg_at_10").p
    studies = studies_of(tmp_path / "b", skills | {"hstu": 8.0})
    second = found(studies, claim)[0]
    assert second.verdict is DOES_NOT_HOLD and "`hstu` is the closest" in second.result
    # The rival was chosen among three for its figure.
    p = studies.study("ml-small").difference("learn-id", "hstu", "ndcg_at_10").p
    assert second.q == pytest.approx(3 * p)
    even = found(studies_of(tmp_path / "c", skills | {"sasrec": 4.0}), claim)[0]
    assert even.verdict is NOT_SHOWN
    absent = found(studies_of(tmp_path / "d", {"learn-id": 4.0, "sasrec": 2.0, "hstu": 1.8}), claim)[0]
    assert (absent.verdict, absent.result) == (NOT_TESTED, "`popularity` not run yet in the study `ml-small`")


def test_ahead_by_is_a_test_on_the_ratio(tmp_path):
    studies = studies_of(tmp_path, {"learn-text": 4.0, "sasrec": 3.0})
    study = studies.study("ml-small")
    ratio = study.ratio("learn-text", "sasrec", "ndcg_at_10")
    means = [study.mean(model, "ndcg_at_10").value for model in ("learn-text", "sasrec")]
    assert ratio.value == pytest.approx(means[0] / means[1]) and ratio.low < ratio.value < ratio.high
    claim = difference("learn-text", "sasrec", test="ahead-by")
    shares = (0.0, ratio.low * 0.9 - 1, ratio.value - 1, ratio.high * 1.1 - 1)
    verdicts = [found(studies, claim | {"share": share})[0].verdict for share in shares]
    assert verdicts == [HOLDS, HOLDS, NOT_SHOWN, DOES_NOT_HOLD]
    ahead = found(studies, claim | {"share": 0.0})[0]
    assert f"**× {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}], tested against 1.00, p " in ahead.result
    # Against 1, it is the test of the difference.
    assert ahead.q == found(studies, difference("learn-text", "sasrec"))[0].q


def test_a_gain_of_a_ranking_model_is_judged_by_its_sign():
    for sign, expected in ((1.0, HOLDS), (-1.0, DOES_NOT_HOLD)):
        assert found(studies_with_p(0.01, sign=sign), gain("a0"))[0].verdict is expected
    assert found(studies_with_p(0.01), gain("a0", "cold-start users"))[0].verdict is NOT_TESTED
    assert found(studies_with_p(0.01, n_seeds=1), gain("a0"))[0].verdict is NOT_SHOWN
    by_time = found(studies_with_p(0.01), gain("a0", study=MAIN_BY_TIME))[0]
    assert (by_time.verdict, by_time.result) == (
        NOT_TESTED,
        "the ranking study `ml-small-by-time` has not been run yet",
    )


# --- how long models were trained ------------------------------------------------------------------------------------


@pytest.fixture
def lora(tmp_path):
    """A study whose LoRA arm had 60 steps, and whose SASRec was still improving in two of three runs."""
    root = tmp_path / "results"
    study = write_synthetic_study(root, {"learn-text": 4.0, "sasrec": 2.0})
    for seed in (1, 2, 3):
        config = {"width": 64, "seed": seed, "train": {"steps": 60, "users": 16}}
        ablation = {"family": "ablation", "reference": "learn-text", "question": "frozen or tuned", "config": config}
        result_files.write_run(root, synthetic_run(study, "learn-text/lora", seed, 1.5, **ablation))
        curve = synthetic_curve(0.1, 0.2, 0.3 if seed > 1 else 0.1)
        result_files.write_run(root, synthetic_run(study, "sasrec", seed, 2.0, curve=curve))
    return root


def test_a_claim_on_a_model_whose_budget_decides_is_not_tested(lora):
    estimates = StudyEstimates(result_files.read(lora).retrieval["ml-small"], FAST)
    result = found(Studies({"ml-small": estimates}, "ml-small", {}), difference("learn-text", "learn-text/lora"))[0]
    assert (result.verdict, result.q) == (NOT_TESTED, None)
    assert result.result.startswith("LoRA was trained for 60 steps of 16 users; ")
    assert "As far as it was trained: NDCG@10 ." in result.result and "p " not in result.result.split("trained: ")[1]
    assert "- LEARN-TEXT/LORA: LoRA was trained for 60 steps of 16 users; " in retrieval_tables.budgets(estimates)
    assert expected_models().budget("learn-text", {"train": {"steps": 60, "users": 16}}) == ""


def test_models_that_were_still_improving_are_named(lora, tmp_path):
    estimates = StudyEstimates(result_files.read(lora).retrieval["ml-small"], FAST)
    assert [estimates.n_still_improving(model) for model in ("sasrec", "learn-text")] == [2, 0]
    result = found(Studies({"ml-small": estimates}, "ml-small", {}), difference("learn-text", "sasrec"))[0]
    note = "still improving at the last check: `sasrec` (2 of 3 seeds)"
    assert result.verdict is HOLDS and result.result.endswith(f"; 3 seeds; {note}")
    build(lora, tmp_path / "REPORT.md", FAST)
    sections = (tmp_path / "REPORT.md").read_text().split("\n## ")
    assert "claims on these models say so: SASREC (2 of 3 seeds)." in sections[5]
    costs = {line.split(" | ")[0]: line.split(" | ")[4] for line in sections[8].splitlines() if " | " in line}
    assert (costs["| SASREC"], costs["| LEARN-TEXT"]) == ("2 of 3", "0 of 3")


def test_noise_at_the_end_of_a_curve_is_no_improvement():
    def verdict(*values: float) -> bool:
        return is_still_improving([CurvePoint.model_validate(point) for point in synthetic_curve(*values)])

    assert verdict(0.1, 0.2, 0.3, 0.31)
    assert not verdict(0.1, 0.2, 0.3, 0.303)
    assert not verdict(0.1, 0.3, 0.2)
    # Nothing is known of a run with one check, and a model without a curve was not trained.
    assert verdict(0.1) and not verdict()


# --- ratios ----------------------------------------------------------------------------------------------------------


def test_a_ratio_has_the_draws_of_the_difference():
    rng, user = np.random.default_rng(4), np.repeat(np.arange(60), 3)
    runs, other = ({seed: rng.random(180) + shift for seed in range(4)} for shift in (0.05, 0.0))
    bootstrap = Bootstrap(user)
    before = bootstrap.difference(runs, other)
    ratio = bootstrap.ratio(runs, other)
    assert ratio.value == pytest.approx(np.mean(list(runs.values())) / np.mean(list(other.values())))
    assert (ratio.p, ratio.n_users, ratio.n_seeds) == (before.p, 60, 4)
    assert bootstrap.difference(runs, other) == before
    doubled = bootstrap.ratio({seed: 2 * values for seed, values in other.items()}, other, null=2.0)
    assert (doubled.value, doubled.low, doubled.high, doubled.p) == pytest.approx((2.0, 2.0, 2.0, 1.0))
    assert bootstrap.ratio(runs, {1: np.zeros(180)}) is None


def test_the_interval_of_a_ratio_covers_the_truth_about_as_often_as_its_level():
    rng, user, n_hits = np.random.default_rng(8), np.arange(80), 0
    bootstrap = Bootstrap(user, FAST)
    for _ in range(300):
        level = rng.gamma(4.0, 0.25, 80)
        runs, other = ({1: level * factor + rng.normal(0, 0.2, 80)} for factor in (1.25, 1.0))
        ratio = bootstrap.ratio(runs, other)
        n_hits += ratio.low <= 1.25 <= ratio.high
    assert 0.90 <= n_hits / 300 <= 0.98
