"""The report from small made-up runs: it says what the runs say, says what is missing, and is the same every time."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from made_results import made_run, write_made
from PIL import Image

from learn.data import DataError
from research.bootstrap import BootstrapConfig
from research.ranking.study import Row
from research.report import document, ranking_table
from research.report.answer import Report, headlines
from research.report.claims import BY_TIME, SECTIONS, Above, Ahead, Claim, Near, Ranked
from research.report.notes import Notes, read_notes
from research.report.number_format import prose_table
from research.report.retrieval_tables import ladder, ladder_table, main_table
from research.report.verdicts import Record, Verdict, find
from research.retrieval import result_files
from research.retrieval.estimates import Evidence

FAST = BootstrapConfig(n_resamples=300)
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
    """A report of one study, with remarks; read by several tests, changed by none."""
    folder = tmp_path_factory.mktemp("built")
    write_made(folder / "results", SKILLS)
    (folder / "results" / "notes.toml").write_text(
        '[claims]\namazon = "No such data here"\n[questions]\n"item tower" = "Items stand alone in serving."\n'
    )
    written = document.build(folder / "results", folder / "REPORT.md", FAST)
    return folder, (folder / "REPORT.md").read_text(), written


def row(text: str, begin: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {begin}"))


def test_every_section_and_every_claim_is_there(built):
    _, text, _ = built
    assert re.findall(r"^## (\d)\.", text, re.MULTILINE) == list("123456789")
    for section in SECTIONS:
        assert f"### {section.title}" in text
        for claim in section.claims:
            assert claim.text in text or claim.key.startswith("amazon-")


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
    again = document.build(folder / "results", folder / "again" / "REPORT.md", FAST)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]


def test_figures_in_the_text_are_those_of_the_runs(built):
    folder, text, _ = built
    runs = result_files.read(folder / "results").retrieval["ml-small"].runs["sasrec"].values()
    mean = np.mean([run.metrics["all"]["hr_at_10"] for run in runs])
    assert row(text, "SASREC | 3 ").split("|")[3].split()[0] == f"{mean:.4f}"[1:]


def test_what_is_missing_is_named(built):
    _, text, _ = built
    assert row(text, "HSTU, with time").split("|")[2].strip() == "*not run yet*"
    assert "`learn-text/lora` not run yet in the study `ml-small`" in text
    assert "- sampling: `learn-text/uniform-sampling`." in text
    assert "## 7. A ranking model with and without the mid-emb\n\n*Not run yet.*" in text


def test_remarks_stand_beside_their_claim_and_question(built):
    _, text, _ = built
    amazon = row(text, "LEARN beats SASRec on six")
    assert "not tested here. No such data here" in amazon
    # The same comparison on the data that are there.
    found = re.search(r"on `ml-small` in their place, Recall@10 (\.\d{4}) against (\.\d{4}): \*\*−", amazon)
    runs = result_files.read(built[0] / "results").retrieval["ml-small"].runs
    for model, shown in zip(("learn-text", "sasrec"), found.groups(), strict=True):
        mean = np.mean([run.metrics["all"]["recall_at_10"] for run in runs[model].values()])
        assert shown == f"{mean:.4f}"[1:]
    assert "no study of them has been run yet. No such data here." in text.split("## 9.")[1]
    assert "\n\nItems stand alone in serving." in text


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
    ranking = {"ml-small": rank_rows(1), "ml-small-by-time": rank_rows(-1)}
    whole = Report(Record({}, "ml-small", ranking), Notes(), {}, FAST, Path(), [])
    plain, by_time = headlines(whole)[-2:]
    gain = "**+.0200 [+.0100, +.0300], p .010**"
    assert plain == f"- What the mid-emb adds to the UAUC of a ranking model: all {gain}; cold-start items {gain}."
    assert by_time.startswith("- Cut by time: What the mid-emb adds")
    assert "all **−.0200 [−.0300, −.0100], p .010**" in by_time


# --- verdicts --------------------------------------------------------------------------------------------------------


def record(folder, skills, rows=(), seeds=(1, 2, 3)) -> Record:
    write_made(folder, skills, seeds=seeds)
    studies = {name: Evidence(study, FAST) for name, study in result_files.read(folder).retrieval.items()}
    return Record(studies, "ml-small", {"ml-small": list(rows)})


def verdict(test, evidence: Record) -> Verdict:
    return find(Claim("key", "text", "paper", test), evidence).verdict


def test_a_verdict_flips_when_the_figures_do(tmp_path):
    test = Ahead("learn-text", "sasrec", "ndcg_at_10")
    assert verdict(test, record(tmp_path / "a", {"learn-text": 4.0, "sasrec": 2.0})) is Verdict.HOLDS
    assert verdict(test, record(tmp_path / "b", {"learn-text": 2.0, "sasrec": 4.0})) is Verdict.DOES_NOT_HOLD
    assert verdict(test, record(tmp_path / "c", {"learn-text": 2.0, "sasrec": 2.0})) is Verdict.NOT_SHOWN
    assert verdict(test, record(tmp_path / "d", {"learn-text": 2.0})) is Verdict.NOT_TESTED
    # One seed decides nothing, however far apart the two are.
    one = record(tmp_path / "e", {"learn-text": 4.0, "sasrec": 2.0}, seeds=(1,))
    assert verdict(test, one) is Verdict.NOT_SHOWN
    assert find(Claim("key", "text", "paper", test), one).found.endswith("**; one seed")


def test_an_ablation_is_held_against_the_run_that_it_names(tmp_path):
    evidence = record(tmp_path, {"learn-text": 3.5, "learn-text/variant-2": 1.5})
    assert verdict(Ahead("reference", "learn-text/variant-2", "hr_at_100"), evidence) is Verdict.HOLDS
    assert verdict(Ahead("learn-text/variant-2", "reference", "hr_at_100"), evidence) is Verdict.DOES_NOT_HOLD
    gone = find(Claim("key", "text", "paper", Ahead("reference", "learn-text/lora", "hr_at_100")), evidence)
    assert (gone.verdict, gone.found) == (
        Verdict.NOT_TESTED,
        "`learn-text/lora` not run yet in the study `ml-small`",
    )


def test_published_figures_are_reproduced_or_passed_or_not(tmp_path):
    evidence = record(tmp_path, {"sasrec": 2.5})
    figure = evidence.study("ml-small").figure("sasrec", "hr_at_10")
    near = [Near("sasrec", "hr_at_10", figure.value + gap, 0.015, "ml-small") for gap in (0.014, -0.014, 0.016)]
    assert [verdict(test, evidence) for test in near] == [Verdict.HOLDS, Verdict.HOLDS, Verdict.DOES_NOT_HOLD]
    bounds = (figure.low - 0.001, figure.value, figure.high + 0.001)
    passed = [verdict(Above("sasrec", "hr_at_10", bound, "ml-small"), evidence) for bound in bounds]
    assert passed == [Verdict.HOLDS, Verdict.NOT_SHOWN, Verdict.DOES_NOT_HOLD]
    assert verdict(Above("sasrec", "hr_at_10", 0.1, "ml-1m"), evidence) is Verdict.NOT_TESTED
    one = record(tmp_path / "one", {"sasrec": 2.5}, seeds=(1,))
    figure = one.study("ml-small").figure("sasrec", "hr_at_10")
    assert verdict(Near("sasrec", "hr_at_10", figure.value, 0.015, "ml-small"), one) is Verdict.NOT_SHOWN
    assert verdict(Above("sasrec", "hr_at_10", 0.0, "ml-small"), one) is Verdict.NOT_SHOWN


def test_a_group_with_too_few_users_or_no_events_shows_nothing(tmp_path):
    evidence = record(tmp_path, {"learn-text": 4.0, "sasrec": 1.5})
    assert int(evidence.study("ml-small").groups["item 5-19"].sum()) in range(1, 10)
    assert verdict(Ahead("learn-text", "sasrec", "hr_at_100", "item 5-19"), evidence) is Verdict.NOT_SHOWN
    assert verdict(Ahead("learn-text", "sasrec", "hr_at_100", "item 1-4"), evidence) is Verdict.NOT_TESTED


def test_two_ranking_studies_of_one_name_are_an_error(tmp_path):
    for folder in ("ranking-a", "ranking-b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test_events.json").write_text('{"study": "default"}')
    with pytest.raises(ValueError, match="ranking-b: another folder holds a ranking study called 'default'"):
        ranking_table.read_all([tmp_path / "ranking-a", tmp_path / "ranking-b"], 10)


def test_a_study_by_time_stands_beside_the_main_one(tmp_path):
    write_made(tmp_path / "results", SKILLS, "ml-small-by-time")
    write_made(tmp_path / "results", SKILLS | {"learn-text": 4.0})
    document.build(tmp_path / "results", tmp_path / "REPORT.md", FAST)
    text = (tmp_path / "REPORT.md").read_text()
    # Its figures are its own: text is ahead in the one and behind in the other.
    assert "**holds**" in row(text, "LEARN, text only, beats SASRec | said so")
    assert "**does not hold**" in row(text, "LEARN, text only, beats SASRec on all test events, cut by time")
    assert "- Cut by time: New items, NDCG@10: LEARN-TEXT " in text
    popularity = text.split("## 4.")[1].split("## 5.")[0]
    assert popularity.index("(report/buckets.png)") < popularity.index("### Study `ml-small-by-time`")
    assert "(report/buckets-by-time.png)" in popularity


# --- parts -----------------------------------------------------------------------------------------------------------


def test_the_ladder_goes_from_weak_to_strong_and_ends_at_the_goal(tmp_path):
    evidence = record(tmp_path, SKILLS).study("ml-small")
    values = [evidence.figure(model, "ndcg_at_10").value for model in ladder(evidence)]
    assert values == sorted(values)
    table = ladder_table(evidence)
    assert row(table, "CONTENT-MEAN").endswith("| 0 % |")
    assert row(table, "**ID-TOWERS**").endswith("| – | 100 % |")
    # Of the two ID models the stronger one is the goal.
    assert row(table, "SASREC").endswith(" % |") and not row(table, "SASREC").endswith(" 100 % |")


def test_a_model_that_nobody_expected_has_a_row_too(tmp_path):
    evidence = record(tmp_path, {"sasrec": 2.0, "gru4rec": 2.0}).study("ml-small")
    assert "| GRU4REC | 3 |" in main_table(evidence)


def test_a_curve_keeps_the_steps_that_all_seeds_have(tmp_path):
    study = write_made(tmp_path, {"sasrec": 2.0}, seeds=(1,))
    short = made_run(study, "sasrec", 2, 2.0)
    result_files.write_run(tmp_path, short.model_copy(update={"curve": short.curve[:2]}))
    curve = document._curve(Evidence(result_files.read(tmp_path).retrieval["ml-small"], FAST), "sasrec")
    assert curve.step.tolist() == [100, 200]
    assert curve.figure.shape == (2, 2)


def test_a_table_cell_cannot_break_the_table():
    assert prose_table(["a"], [["x | y\nz"]]).splitlines()[-1] == "| x \\| y z |"


def rank_rows(sign: float, n_seeds: int = 5) -> list[Row]:
    rows = []
    for group in ("all", "cold-start items"):
        for metric in ("auc", "uauc", "wuauc"):
            rows.append(Row("base", group, metric, 0.7, None, None, None, None, 50, 400, n_seeds))
            gap = (sign * 0.02, sign * 0.02 - 0.01, sign * 0.02 + 0.01, 0.01)
            rows.append(Row("mid_emb", group, metric, 0.7 + sign * 0.02, *gap, 50, 400, n_seeds))
    return rows


def test_rows_of_the_ranking_study_become_tables_and_verdicts(tmp_path):
    assert ranking_table.control(rank_rows(1)) == "base"
    assert row(ranking_table.figures_table(rank_rows(1)), "`mid_emb`") == (
        "| `mid_emb` | .7200 | **+.0200 [+.0100, +.0300], p .010** "
        "| .7200 | **+.0200 [+.0100, +.0300], p .010** "
        "| .7200 | **+.0200 [+.0100, +.0300], p .010** |"
    )
    assert "| cold-start items | 50 |" in ranking_table.groups_table(rank_rows(1), "uauc")
    for sign, expected in ((1, Verdict.HOLDS), (-1, Verdict.DOES_NOT_HOLD)):
        evidence = Record({}, "ml-small", {"ml-small": rank_rows(sign)})
        assert verdict(Ranked("mid_emb", "uauc", "cold-start items"), evidence) is expected
    assert verdict(Ranked("mid_emb", "uauc", "cold-start users"), evidence) is Verdict.NOT_TESTED
    one = Record({}, "ml-small", {"ml-small": rank_rows(1, n_seeds=1)})
    assert verdict(Ranked("mid_emb", "uauc", "all"), one) is Verdict.NOT_SHOWN
    by_time = find(Claim("key", "text", "paper", Ranked("mid_emb", "uauc", "all", BY_TIME)), evidence)
    assert (by_time.verdict, by_time.found) == (
        Verdict.NOT_TESTED,
        "the ranking study `ml-small-by-time` has not been run yet",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[claims]\nlora = 'x'", "column claims.lora: no such claim; known are"),
        ("[claims]\nrevenue = 3", "column claims.revenue: expected a text, got 3"),
        ("claims = 3", "column claims: expected a table"),
        ("[cliams]", "column cliams: unknown"),
        ("[claims", "notes.toml: "),
    ],
)
def test_notes_that_would_be_lost_are_errors(tmp_path, text, expected):
    (tmp_path / "notes.toml").write_text(text)
    with pytest.raises(DataError, match=re.escape(expected)):
        read_notes(tmp_path / "notes.toml")


def test_a_main_study_that_is_not_there_is_an_error(tmp_path):
    write_made(tmp_path, {"sasrec": 2.0}, seeds=(1,))
    (tmp_path / "notes.toml").write_text('main = "ml-tiny"')
    with pytest.raises(ValueError, match="main is 'ml-tiny', but the studies are ml-small"):
        document.build(tmp_path, tmp_path / "REPORT.md", FAST)
