"""The report waits for what the shipped configs train. A claim on a model that no config has would never be tested."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import MODELS

from learn.evaluation import metrics
from research.report.claims import AheadOfAll, RetrievalClaim, read_claims
from research.report.expected_models import expected_models
from research.report.number_format import METRIC_NAMES
from research.report.verdicts import MAIN, MAIN_BY_TIME
from research.retrieval.arms import WITHOUT_RANDOMNESS
from research.retrieval.study import Study, read_study

CLAIMS = [claim for claim in read_claims().claims() if isinstance(claim, RetrievalClaim)]
NAME = read_claims().main_study
NAMES = {MAIN: NAME, MAIN_BY_TIME: f"{NAME}-by-time"}
GROUPS = metrics.groups(np.zeros(1), np.zeros(1))


def config_of(study: str) -> Study:
    """The config of a study; categories of Amazon without one of their own are run with that of Scientific."""
    name = NAMES.get(study, study)
    path = MODELS / "configs" / f"{name}.toml"
    return read_study(path if path.is_file() or not name.startswith("amazon-") else path.with_stem("amazon-scientific"))


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_a_claim_names_models_that_its_study_trains_with_two_seeds_or_more(claim):
    study = config_of(claim.study)
    assert set(claim.models) <= set(study.models)
    trained = [model for model in claim.models if study.models[model].kind not in WITHOUT_RANDOMNESS]
    assert trained and all(len(study.seeds_of(study.models[model])) > 1 for model in trained)
    assert claim.metric in METRIC_NAMES and claim.group in GROUPS


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if isinstance(claim, AheadOfAll)], ids=lambda c: c.id)
def test_every_other_model_is_every_model_that_is_no_ablation(claim):
    models = config_of(claim.study).models
    assert {claim.model, *claim.against} == {name for name, arm in models.items() if arm.family != "ablation"}


@pytest.mark.parametrize("name", NAMES.values())
def test_the_report_waits_for_the_models_and_ablations_of_the_configs(name):
    config, expected = config_of(name), expected_models()
    baselines = {name for name, arm in config.models.items() if arm.family != "ablation"}
    assert baselines == {model.id for model in expected.models}
    questions = {name: arm.question for name, arm in config.models.items() if arm.family == "ablation"}
    assert questions == {
        ablation.id: ablation.question for ablation in expected.ablations if NAMES[ablation.study] == name
    }


def test_every_remark_is_on_a_question_of_an_ablation():
    assert set(expected_models().remarks) <= {ablation.question for ablation in expected_models().ablations}
