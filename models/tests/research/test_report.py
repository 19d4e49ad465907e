"""Reports on small synthetic runs give the figures of the runs, name what is missing, and are reproducible."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic_results import synthetic_run, write_synthetic_study

from learn.data import DataError
from learn.evaluation.metrics import event_values
from research import record_files
from research.bootstrap import BootstrapConfig, Estimate
from research.ranking import summary
from research.ranking.arms import CONTROL
from research.ranking.result_files import RankingStudy
from research.ranking.summary import Row
from research.report import document, ranking_table
from research.report.answer import Report, headlines
from research.report.claims import Difference, Exceeds, RankingGain, Reproduces, read_claims
from research.report.expected_models import expected_models
from research.report.number_format import prose_table
from research.report.retrieval_tables import ladder, ladder_table, main_table
from research.report.verdicts import MAIN_BY_TIME, Studies, Verdict, decide
from research.retrieval import result_files
from research.retrieval.estimates import StudyEstimates

FAST = BootstrapConfig(n_resamples=300)
# The synthetic study becomes the main one, because the report prints remarks about the main study only.
CLAIMS = read_claims().model_copy(update={"main_study": "ml-small"})
SKILLS = {
    "popularity": 1.5,
    "content-mean": 1.2,
    "sasrec": 2.5,
    "hstu": 2.6,
    "id-towers": 2.6,
    "learn-text": 2.0,
    "learn-id": 3.6,
    "learn-text/variant-3": 1.3,
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A report on one study, which the remarks are about. Several tests read it, and none changes it."""
    folder = tmp_path_factory.mktemp("built")
    write_synthetic_study(folder / "results", SKILLS)
    written = document.build(folder / "results", folder / "REPORT.md", FAST, CLAIMS)
    return folder, (folder / "REPORT.md").read_text(), written


def row(text: str, begin: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {begin}"))


def test_every_section_and_every_claim_is_in_the_report(built):
    _, text, _ = built
    assert re.findall(r"^## (\d)\.", text, re.MULTILINE) == list("123456789")
    for section in CLAIMS.sections:
        assert f"### {section.title}" in text
        for claim in section.claims:
            assert claim.text in text or section.until_tested is not None


def test_plots_are_small_valid_pngs_that_the_text_shows(built):
    folder, text, written = built
    shown = re.findall(r"!\[[^\]]+\]\((report/[a-z]+\.png)\)", text)
    assert sorted(folder / name for name in shown) == sorted(written[1:])
    assert {path.stem for path in written[1:]} == {"buckets", "curves", "ablations"}
    for path in written[1:]:
        assert path.stat().st_size < 60_000
        with Image.open(path) as picture:
            picture.verify()
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert len(np.unique(np.asarray(picture.convert("L")))) > 10


def test_the_same_files_give_the_same_bytes(built):
    folder, _, written = built
    again = document.build(folder / "results", folder / "again" / "REPORT.md", FAST, CLAIMS)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]


def test_figures_in_the_text_are_those_of_the_runs(built):
    folder, text, _ = built
    runs = result_files.read(folder / "results").retrieval["ml-small"].runs["sasrec"].values()
    mean = np.mean([event_values(run.rank, "hr_at_10").mean() for run in runs])
    assert row(text, "SASREC | 3 ").split("|")[3].split()[0] == f"{mean:.4f}"[1:]


def test_what_is_missing_is_named(built):
    _, text, _ = built
    assert row(text, "HSTU, with time").split("|")[2].strip() == "*not run yet*"
    assert "`learn-text/lora` not run yet in the study `ml-small`" in text
    assert "- sampling: `learn-text/uniform-sampling`." in text
    assert "## 7. A ranking model with and without the mid-emb\n\n*Not run yet.*" in text


def test_remarks_stand_beside_their_claim_and_question(built, tmp_path):
    _, text, _ = built
    remark = next(section.until_tested for section in CLAIMS.sections if section.until_tested).remark
    amazon = row(text, "LEARN beats SASRec on six")
    assert f"not tested here. {remark}" in amazon
    # The row also gives the same comparison on the data that have been studied.
    shown = re.search(r"on `ml-small` instead, Recall@10 (\.\d{4}) against (\.\d{4}): \*\*−", amazon)
    estimates = StudyEstimates(result_files.read(built[0] / "results").retrieval["ml-small"], FAST)
    means = [estimates.mean(model, "recall_at_10").value for model in ("learn-text", "sasrec")]
    assert list(shown.groups()) == [f"{mean:.4f}"[1:] for mean in means]
    assert f"no study of them has been run yet. {remark}" in text.split("## 9.")[1]
    assert f"\n\n{expected_models().remarks['item tower']}" in text
    # Remarks are about one study. A report whose main study is another one has none.
    document.build(built[0] / "results", tmp_path / "REPORT.md", FAST)
    other = (tmp_path / "REPORT.md").read_text()
    assert "Study `ml-small`" in other and remark not in other and expected_models().remarks["item tower"] not in other


def test_significant_differences_are_bold_and_others_are_not(built):
    _, text, _ = built
    for found in re.findall(r"(\**)[+−]?\.\d{4} \[[+−]?\.\d{4}, [+−]?\.\d{4}\], p (< )?(\.\d{3})(\**)", text):
        bold = "**" if float(found[2]) < 0.05 or found[1] else ""
        assert (found[0], found[3]) == (bold, bold)


def test_without_any_run_the_report_says_so(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "stale.png").write_bytes(b"of an earlier build")
    assert document.build(tmp_path / "results", tmp_path / "REPORT.md", FAST) == [tmp_path / "REPORT.md"]
    text = (tmp_path / "REPORT.md").read_text()
    assert "0 hold, 0 do not hold, 0 not shown" in text
    assert "The main study has not been run yet." in text
    assert not list((tmp_path / "report").iterdir())


def test_the_short_answer_has_a_line_on_the_ranking_model():
    ranking = {"ml-small": ranking_rows(1), "ml-small-by-time": ranking_rows(-1)}
    whole = Report(Studies({}, "ml-small", ranking), CLAIMS, {}, FAST, Path(), [])
    plain, by_time = headlines(whole)[-2:]
    gain = "**+.0200 [+.0100, +.0300], p .010**"
    assert plain == f"- Gain of a ranking model in UAUC by the mid-emb: all {gain}; cold-start items {gain}."
    assert by_time.startswith("- Split by time: Gain of a ranking model")
    assert "all **−.0200 [−.0300, −.0100], p .010**" in by_time


# --- verdicts --------------------------------------------------------------------------------------------------------


def synthetic_studies(folder, skills, seeds=(1, 2, 3)) -> Studies:
    write_synthetic_study(folder, skills, seeds=seeds)
    results = result_files.read(folder).retrieval
    return Studies({name: StudyEstimates(study, FAST) for name, study in results.items()}, "ml-small", {})


WORDS = {"id": "id", "text": "text", "source": "paper"}


def difference_claim(model: str, against: str, metric: str, group: str = "all") -> Difference:
    pair = {"model": model, "against": against}
    return Difference(test="difference", study="main", metric=metric, group=group, **pair, **WORDS)


def reproduces_claim(published: float, study: str = "ml-small") -> Reproduces:
    figure = {"model": "sasrec", "metric": "hr_at_10", "published": published, "tolerance": 0.015}
    return Reproduces(test="reproduces", study=study, **figure, **WORDS)


def exceeds_claim(published: float, study: str = "ml-small") -> Exceeds:
    return Exceeds(test="exceeds", study=study, model="sasrec", metric="hr_at_10", published=published, **WORDS)


def ranking_gain_claim(group: str, study: str = "main") -> RankingGain:
    return RankingGain(test="ranking-gain", study=study, metric="uauc", group=group, arm="mid_emb", **WORDS)


def verdict(claim, studies: Studies) -> Verdict:
    return decide(claim, studies).verdict


def test_a_verdict_flips_when_the_figures_do(tmp_path):
    claim = difference_claim("learn-text", "sasrec", "ndcg_at_10")
    assert verdict(claim, synthetic_studies(tmp_path / "a", {"learn-text": 4.0, "sasrec": 2.0})) is Verdict.HOLDS
    assert (
        verdict(claim, synthetic_studies(tmp_path / "b", {"learn-text": 2.0, "sasrec": 4.0})) is Verdict.DOES_NOT_HOLD
    )
    assert verdict(claim, synthetic_studies(tmp_path / "c", {"learn-text": 2.0, "sasrec": 2.0})) is Verdict.NOT_SHOWN
    # One seed decides nothing, however far apart the two are.
    one_seed = synthetic_studies(tmp_path / "d", {"learn-text": 4.0, "sasrec": 2.0}, seeds=(1,))
    assert verdict(claim, one_seed) is Verdict.NOT_SHOWN
    assert decide(claim, one_seed).result.endswith("**; one seed")


def test_a_claim_on_a_model_that_was_not_run_names_the_model(tmp_path):
    studies = synthetic_studies(tmp_path, {"learn-text": 2.0})
    finding = decide(difference_claim("learn-text", "learn-text/lora", "hr_at_100"), studies)
    assert (finding.verdict, finding.result) == (
        Verdict.NOT_TESTED,
        "`learn-text/lora` not run yet in the study `ml-small`",
    )


def test_published_figures_are_judged_by_tolerance_and_interval(tmp_path):
    studies = synthetic_studies(tmp_path / "three", {"sasrec": 2.5})
    mean = studies.study("ml-small").mean("sasrec", "hr_at_10")
    near = [verdict(reproduces_claim(mean.value + gap), studies) for gap in (0.014, -0.014, 0.016)]
    assert near == [Verdict.HOLDS, Verdict.HOLDS, Verdict.DOES_NOT_HOLD]
    bounds = (mean.low - 0.001, mean.value, mean.high + 0.001)
    above = [verdict(exceeds_claim(bound), studies) for bound in bounds]
    assert above == [Verdict.HOLDS, Verdict.NOT_SHOWN, Verdict.DOES_NOT_HOLD]
    assert verdict(exceeds_claim(0.1, "ml-1m"), studies) is Verdict.NOT_TESTED
    one_seed = synthetic_studies(tmp_path / "one", {"sasrec": 2.5}, seeds=(1,))
    mean = one_seed.study("ml-small").mean("sasrec", "hr_at_10")
    assert verdict(reproduces_claim(mean.value), one_seed) is Verdict.NOT_SHOWN
    assert verdict(exceeds_claim(0.0), one_seed) is Verdict.NOT_SHOWN


def test_a_group_with_too_few_users_or_no_events_decides_nothing(tmp_path):
    studies = synthetic_studies(tmp_path, {"learn-text": 4.0, "sasrec": 1.5})
    assert int(studies.study("ml-small").groups["item 5-19"].sum()) in range(1, 10)
    assert verdict(difference_claim("learn-text", "sasrec", "hr_at_100", "item 5-19"), studies) is Verdict.NOT_SHOWN
    assert verdict(difference_claim("learn-text", "sasrec", "hr_at_100", "item 1-4"), studies) is Verdict.NOT_TESTED


CLAIM_TOML = """
main_study = "ml-small"
[[sections]]
title = "One"
[[sections.claims]]
id = "first"
text = "Text beats SASRec"
source = "no figure"
test = "difference"
study = "main"
metric = "ndcg_at_10"
model = "learn-text"
against = "sasrec"
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('against = "sasrec"', 'agianst = "sasrec"', "sections.0.claims.0.difference.against: Field required"),
        ('test = "difference"', 'test = "diference"', "sections.0.claims.0: Input tag 'diference'"),
        ("[[sections]]", "[[sections]]]", "claims.toml: "),
        ("[[sections.claims]]", CLAIM_TOML.split('One"')[1] + "[[sections.claims]]", "two claims are called 'first'"),
    ],
)
def test_a_mistake_in_the_claims_is_reported_with_its_field(tmp_path, old, new, message):
    path = tmp_path / "claims.toml"
    path.write_text(CLAIM_TOML)
    assert read_claims(path).claims()[0].group == "all"
    path.write_text(CLAIM_TOML.replace(old, new))
    with pytest.raises(DataError, match=re.escape(message)):
        read_claims(path)


def test_two_ranking_studies_with_the_same_name_are_an_error(tmp_path):
    columns = {name: np.array([0, 1]) for name in ("user", "label", "item_train_count", "user_train_count")}
    study = RankingStudy(study="default", label_meaning="proxy", split={}, groups={}, n_events={}, **columns)
    for folder in ("ranking-a", "ranking-b"):
        record_files.write(tmp_path / folder / "ranking.npz", study)
    with pytest.raises(ValueError, match=r"ranking-b: .*ranking-a also holds a ranking study called 'default'"):
        ranking_table.read_all([tmp_path / "ranking-a", tmp_path / "ranking-b"], FAST)


def test_a_study_by_time_stands_beside_the_main_one(tmp_path):
    write_synthetic_study(tmp_path / "results", SKILLS, "ml-small-by-time")
    write_synthetic_study(tmp_path / "results", SKILLS | {"learn-text": 4.0})
    document.build(tmp_path / "results", tmp_path / "REPORT.md", FAST, CLAIMS)
    text = (tmp_path / "REPORT.md").read_text()
    # Each study has its own figures: text is ahead in one and behind in the other.
    assert "**holds**" in row(text, "LEARN, text only, beats SASRec | claimed")
    assert "**does not hold**" in row(text, "LEARN, text only, beats SASRec on all test events, split by time")
    assert "- Split by time: New items, NDCG@10: LEARN-TEXT " in text
    popularity = text.split("## 4.")[1].split("## 5.")[0]
    assert popularity.index("(report/buckets.png)") < popularity.index("### Study `ml-small-by-time`")
    assert "(report/buckets-by-time.png)" in popularity


# --- parts -----------------------------------------------------------------------------------------------------------


def test_the_ladder_goes_from_weak_to_strong_and_ends_at_the_goal(tmp_path):
    study = synthetic_studies(tmp_path, SKILLS).study("ml-small")
    values = [study.mean(model, "ndcg_at_10").value for model in ladder(study)]
    assert values == sorted(values)
    table = ladder_table(study)
    assert row(table, "CONTENT-MEAN").endswith("| 0 % |")
    assert row(table, "**ID-TOWERS**").endswith("| – | 100 % |")
    # Of the two ID models the stronger one is the goal.
    assert row(table, "SASREC").endswith(" % |") and not row(table, "SASREC").endswith(" 100 % |")


def test_a_model_that_is_not_expected_has_a_row_too(tmp_path):
    study = synthetic_studies(tmp_path, {"sasrec": 2.0, "gru4rec": 2.0}).study("ml-small")
    assert "| GRU4REC | 3 |" in main_table(study)


def test_a_curve_keeps_the_steps_that_all_seeds_have(tmp_path):
    study = write_synthetic_study(tmp_path, {"sasrec": 2.0}, seeds=(1,))
    short = synthetic_run(study, "sasrec", 2, 2.0)
    result_files.write_run(tmp_path, short.model_copy(update={"curve": short.curve[:2]}))
    curve = document._curve(StudyEstimates(result_files.read(tmp_path).retrieval["ml-small"], FAST), "sasrec")
    assert curve.step.tolist() == [100, 200]
    assert curve.metric.shape == (2, 2)


def test_a_table_cell_cannot_break_the_table():
    assert prose_table(["a"], [["x | y\nz"]]).splitlines()[-1] == "| x \\| y z |"


def ranking_rows(sign: float, n_seeds: int = 5) -> list[Row]:
    rows = []
    for group in ("all", "cold-start items"):
        for metric in ("auc", "uauc", "wuauc"):
            rows.append(Row(CONTROL, group, metric, 0.7, None, 50))
            gain = Estimate(sign * 0.02, sign * 0.02 - 0.01, sign * 0.02 + 0.01, 0.01, 400, 50, n_seeds)
            rows.append(Row("mid_emb", group, metric, 0.7 + sign * 0.02, gain, 50))
    return rows


def test_rows_of_the_ranking_study_become_tables_and_verdicts():
    assert row(ranking_table.means_table(ranking_rows(1)), "`mid_emb`") == (
        "| `mid_emb` | .7200 | **+.0200 [+.0100, +.0300], p .010** "
        "| .7200 | **+.0200 [+.0100, +.0300], p .010** "
        "| .7200 | **+.0200 [+.0100, +.0300], p .010** |"
    )
    assert "| cold-start items | 50 |" in ranking_table.groups_table(ranking_rows(1), "uauc")
    assert ranking_table.groups_table(summary.corrected(ranking_rows(1)), "uauc").endswith(
        "After Holm's correction over 2 gains, of all events and by popularity of the item: "
        "`mid_emb` on all (+.0200, p .020), `mid_emb` on cold-start items (+.0200, p .020)."
    )
    for sign, expected in ((1, Verdict.HOLDS), (-1, Verdict.DOES_NOT_HOLD)):
        studies = Studies({}, "ml-small", {"ml-small": ranking_rows(sign)})
        assert verdict(ranking_gain_claim("cold-start items"), studies) is expected
    assert verdict(ranking_gain_claim("cold-start users"), studies) is Verdict.NOT_TESTED
    one_seed = Studies({}, "ml-small", {"ml-small": ranking_rows(1, n_seeds=1)})
    assert verdict(ranking_gain_claim("all"), one_seed) is Verdict.NOT_SHOWN
    by_time = decide(ranking_gain_claim("all", MAIN_BY_TIME), studies)
    assert (by_time.verdict, by_time.result) == (
        Verdict.NOT_TESTED,
        "the ranking study `ml-small-by-time` has not been run yet",
    )
