"""Reports on small synthetic runs give the figures of the runs, name what is missing, and are reproducible."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic_results import FAST, estimates, synthetic_run, write_synthetic_study

from learn.data import DataError
from learn.evaluation.metrics import event_values
from research import record_files
from research.bootstrap import Estimate
from research.ranking import summary
from research.ranking.arms import CONTROL
from research.ranking.result_files import RankingStudy
from research.ranking.summary import Row
from research.report import document, ranking_table, study_sections
from research.report.answer import Report, headlines
from research.report.claims import read_claims
from research.report.expected_models import expected_models
from research.report.number_format import prose_table
from research.report.retrieval_tables import ladder, ladder_table, main_table, text_ladder
from research.report.verdicts import Studies
from research.retrieval import result_files
from research.retrieval.estimates import StudyEstimates

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
    study = write_synthetic_study(folder / "results", SKILLS)
    ablation = {"family": "ablation", "reference": "learn-text", "question": "loss"}
    result_files.write_run(folder / "results", synthetic_run(study, "learn-text/other-loss", 1, 1.5, **ablation))
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
    assert "- The paper's 28 claims: " in text and "- Our own 40 claims: " in text


def test_plots_are_small_valid_pngs_that_the_text_shows(built):
    folder, text, written = built
    shown = re.findall(r"!\[[^\]]+\]\((report/[a-z]+\.png)\)", text)
    assert sorted(folder / name for name in shown) == sorted(written[1:])
    assert {path.stem for path in written[1:]} == {"buckets", "curves", "ablations"}  # The main study's have no suffix.
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
    assert "- sampling, as published: `learn-text/published-uniform`." in text
    # Another study waits for this one.
    assert "`learn-text/no-skip`" not in text
    assert "## 7. A ranking model with and without the mid-emb\n\n*Not run yet.*" in text


def test_remarks_stand_beside_their_claim_and_question(built, tmp_path):
    _, text, _ = built
    remarks = {claim.id: claim.remark for claim in CLAIMS.claims()}
    assert row(text, "An LLM's embeddings beat").endswith(f"{remarks['llm-over-bert']} |")
    assert row(text, "LEARN, text only, beats SASRec on Amazon").endswith(f"{remarks['amazon-scientific']} |")
    assert f"\n\n{expected_models().remarks['loss']}" in text
    # Remarks on the main study are about one study. A report whose main study is another one has only those on others.
    document.build(built[0] / "results", tmp_path / "REPORT.md", FAST)
    other = (tmp_path / "REPORT.md").read_text()
    assert "Study `ml-small`" in other and remarks["llm-over-bert"] not in other
    assert remarks["amazon-scientific"] in other and expected_models().remarks["loss"] not in other


def test_categories_without_data_share_one_row(built):
    _, text, _ = built
    shared = next(section.until_tested for section in CLAIMS.sections if section.until_tested)
    assert row(text, shared.text).endswith(f"| {shared.result} | not tested here |")
    assert f"- {shared.text}: {shared.result}." in text.split("## 9.")[1]


def test_significant_differences_are_bold_and_others_are_not(built):
    _, text, _ = built
    number = r"[+−]?\.\d{4}"
    found = re.findall(rf"(\**){number} \[{number}, {number}\], p (< )?(\.\d{{3}})(?:, q (< )?(\.\d{{3}}))?(\**)", text)
    assert len(found) > 50 and any(q for *_, q, _ in found)
    for before, p_is_less, p, q_is_less, q, after in found:
        # A claim is decided by q, all else by p.
        is_bold = float(q) < 0.05 or q_is_less if q else float(p) < 0.05 or p_is_less
        assert (before, after) == (("**", "**") if is_bold else ("", ""))


def test_without_any_run_the_report_says_so(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "stale.png").write_bytes(b"of an earlier build")
    assert document.build(tmp_path / "results", tmp_path / "REPORT.md", FAST) == [tmp_path / "REPORT.md"]
    text = (tmp_path / "REPORT.md").read_text()
    assert "- The paper's 28 claims: 0 hold, 0 do not hold, 0 not shown, 28 not tested here." in text
    assert "- No study has been run yet." in text
    assert not list((tmp_path / "report").iterdir())


def test_the_short_answer_has_a_line_on_each_ranking_model():
    ranking = {"ml-small": ranking_rows(1), "ml-small-by-time": ranking_rows(-1)}
    whole = Report(Studies({}, "ml-small", ranking), CLAIMS, {}, FAST, Path(), [])
    plain, by_time = headlines(whole)
    gain = "**+.0200 [+.0100, +.0300], p .010**"
    assert plain == f"- Ranking study `ml-small`: gain in UAUC by the mid-emb: all {gain}; cold-start items {gain}."
    assert by_time.startswith("- Ranking study `ml-small-by-time`: gain in UAUC by the mid-emb: all **−.0200 [")


def test_a_report_on_another_study_than_the_main_one_is_complete(tmp_path):
    write_synthetic_study(tmp_path / "results", SKILLS, "amazon-scientific")
    # Made runs do not have the settings of the config of this study.
    written = document.build(tmp_path / "results", tmp_path / "REPORT.md", FAST, configs=tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    assert "No study has been run yet" not in text and "there is no retrieval study" not in text
    assert "- Study `amazon-scientific`:\n  - All test events, NDCG@10: LEARN-ID " in text
    sections = dict(zip("123456789", re.split(r"^## \d\..*$", text, flags=re.MULTILINE)[1:], strict=True))
    for section in "34568":
        assert "### Study `amazon-scientific`" in sections[section]
    assert "LEARN-TEXT/VARIANT-3" in sections["6"] and "| **SASREC** |" not in sections["6"]
    assert {path.stem for path in written[1:]} == {
        f"{kind}-amazon-scientific" for kind in ("buckets", "curves", "ablations")
    }
    assert "× " in row(text, "LEARN, text only, is ahead of SASRec by at least 25 %")
    # Models that the main study waits for are not waited for in others.
    assert "*not run yet*" not in sections["3"] + sections["6"]
    # The five other categories are rows of their own only if one of them was run.
    assert "LEARN beats SASRec on Amazon Games" not in text
    assert "LEARN beats SASRec on five more categories" in text


CLAIM_TOML = """
main_study = "ml-small"
[[sections]]
title = "One"
[[sections.claims]]
id = "first"
text = "Text beats SASRec"
whose = "ours"
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
        (
            'whose = "ours"',
            'whose = "theirs"',
            "sections.0.claims.0.difference.whose: Input should be 'paper' or 'ours'",
        ),
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


@pytest.fixture(scope="module")
def built_by_time(tmp_path_factory):
    folder = tmp_path_factory.mktemp("by-time")
    write_synthetic_study(folder / "results", SKILLS, "ml-small-by-time")
    write_synthetic_study(folder / "results", SKILLS | {"learn-text": 4.0})
    document.build(folder / "results", folder / "REPORT.md", FAST, CLAIMS)
    return folder, (folder / "REPORT.md").read_text()


def test_a_study_by_time_stands_beside_the_main_one(built_by_time):
    _, text = built_by_time
    # Each study has its own figures: text is ahead in one and behind in the other.
    assert "**holds**" in row(text, "LEARN, text only, beats SASRec | paper | claimed")
    assert "**does not hold**" in row(text, "LEARN, text only, beats SASRec on all test events, split by time")
    assert "- Study `ml-small-by-time`:\n  - All test events, NDCG@10: LEARN-ID " in text
    popularity = text.split("## 4.")[1].split("## 5.")[0]
    assert popularity.index("(report/buckets.png)") < popularity.index("### Study `ml-small-by-time`")
    assert "(report/buckets-ml-small-by-time.png)" in popularity


def test_each_main_study_waits_for_its_own_ablations(built_by_time):
    _, text = built_by_time
    main, by_time = text.split("## 6.")[1].split("## 7.")[0].split("### Study `ml-small-by-time`")
    assert "- content skip: `learn-text/no-skip`, `learn-text/skip-128`." in by_time and "no-skip" not in main
    assert "- adaptor: `learn-text/linear-adaptor`." in main and "linear-adaptor" not in by_time
    assert f"`learn-text/unseen-negatives`. {expected_models().remarks['negatives']}" in by_time


def test_claims_of_a_study_by_time_are_tested_without_the_main_study(tmp_path):
    write_synthetic_study(tmp_path / "results", SKILLS, "ml-small-by-time")
    document.build(tmp_path / "results", tmp_path / "REPORT.md", FAST, CLAIMS)
    text = (tmp_path / "REPORT.md").read_text()
    assert "**does not hold**" in row(text, "LEARN, text only, beats SASRec on all test events, split by time")
    assert "the study `ml-small` has not been run yet" in row(text, "LEARN, text only, beats SASRec | paper | claimed")


def test_claims_on_ranking_models_are_tested_without_a_retrieval_study():
    assert document._main_study(["ml-small"], CLAIMS) == "ml-small"
    assert document._main_study(["mine-by-time", "mine"], CLAIMS) == "mine"
    assert document._main_study(["amazon-scientific"], CLAIMS) is None


def test_a_study_by_time_has_means_over_users_beside_those_over_events(built_by_time):
    folder, text = built_by_time
    models = text.split("## 3.")[1].split("## 4.")[0]
    main, by_time = models.split("### Study `ml-small-by-time`")
    assert "by user" not in main.lower()
    # Five users have ten events each and five of the others two: 60 of 120.
    assert "The 10 users with the most test events have 50 % of all of them" in by_time
    assert "| model | seeds | HR@10 | NDCG@10 | NDCG@10 by user |" in by_time
    assert "NDCG@10 by user − SASREC" in by_time
    study = result_files.read(folder / "results").retrieval["ml-small-by-time"]
    values = [event_values(run.rank, "ndcg_at_10") for run in study.runs["sasrec"].values()]
    by_user = np.mean([[run[study.study.user == user].mean() for user in range(40)] for run in values])
    assert row(by_time, "SASREC | 3 ").split("|")[5].split()[0] == f"{by_user:.4f}"[1:]


# --- parts -----------------------------------------------------------------------------------------------------------


def test_the_ladder_goes_from_weak_to_strong_and_ends_at_the_goal(tmp_path):
    study = estimates(tmp_path, SKILLS)
    values = [study.mean(model, "ndcg_at_10").value for model in ladder(study)]
    assert values == sorted(values)
    table = ladder_table(study)
    assert row(table, "CONTENT-MEAN").endswith("| 0 % |")
    assert row(table, "**ID-TOWERS**").endswith("| – | 100 % |")
    # Of the two ID models the stronger one is the goal.
    assert row(table, "SASREC").endswith(" % |") and not row(table, "SASREC").endswith(" 100 % |")


def test_baselines_over_text_count_as_text_alone(tmp_path):
    study = estimates(tmp_path, SKILLS | {"sasrec-text": 2.4, "learn-id/no-skip": 3.0})
    assert set(text_ladder(study)) == {"content-mean", "learn-text", "learn-text/variant-3", "sasrec-text"}
    assert text_ladder(study)[-1] == "sasrec-text"


def test_a_model_that_is_not_expected_has_a_row_too(tmp_path):
    study = estimates(tmp_path, {"sasrec": 2.0, "gru4rec": 2.0})
    assert "| GRU4REC | 3 |" in main_table(study)


def test_a_curve_keeps_the_steps_that_all_seeds_have(tmp_path):
    study = write_synthetic_study(tmp_path, {"sasrec": 2.0}, seeds=(1,))
    short = synthetic_run(study, "sasrec", 2, 2.0)
    result_files.write_run(tmp_path, short.model_copy(update={"curve": short.curve[:2]}))
    curve = study_sections.curve_of(StudyEstimates(result_files.read(tmp_path).retrieval["ml-small"], FAST), "sasrec")
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
