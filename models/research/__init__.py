"""Studies, claims and the report.

This package is not installed with `learn`; the command line of `learn` imports it if it is there.

bootstrap            paired comparison of two models over users and seeds
record_files         how results are stored: a JSON header and integer columns in one `.npz` file
provenance           the commit of the code that a record was made with

baselines            the models that LEARN is compared with
    item_to_item     EASE and ItemKNN: a matrix between items, computed from counts
    sasrec, hstu     self-attention over item ids
    sasrec_text      SASRec over content embeddings in place of ids
    unisrec          the same with a mixture of experts as adaptor
    relative_towers  the towers of LEARN with relative positions and time gaps
    lora             a tuned language model in place of a transformer over frozen vectors

retrieval            full-ranking studies
    study            several models and seeds under one protocol (`learn study`)
    arms             the models of a study: how its TOML describes one, and how it is built
    study_parts      a study with fewer seeds or steps
    prepare_once     prepares the data of a study, unless nothing has changed
    workers          the processes of the runs
    progress         which run is under way, and how long the rest takes
    tuning           equally many trials for every model, on validation alone (`learn tune`)
    result_files     what their files hold
    estimates        means and differences with their intervals
    manifest_figures the figures of one model, for the manifest of a bundle

ranking              studies of a ranking model with and without the mid-emb
    study            trains every arm with every seed (`learn rank`, through run_command)
    arms             the arms and their extra features
    event_parts      the parts of the log
    features         the ranking model's own features
    tower_runs       the features that LEARN adds: towers of the past, their bundle, `learn features`
    model_inputs     what ranking models read, and what they have in common
    ranker           DCN-V2
    boosted_ranker   LightGBM
    auc_metrics      their metrics, and gains of one arm over another
    result_files     what the files of a study hold
    summary          all gains of a study in rows

cvr                  studies of the CVR head (`learn cvr-study`, through run_command)
    study            trains every arm with every seed
    towers           the towers that the arms start from
    result_files     what the files of a study hold
    summary          each arm against the item means

report               REPORT.md and its plots (`learn report`)
    claims.toml      the claims of LEARN and the test of each; claims.py reads them
    expected_models.toml   the models that tables wait for; expected_models.py reads them
    verdicts         tests the claims
    stale_records    runs that today's config does not describe are refused
    study_sections   the sections that every retrieval study has
    document         the other sections, and their order (answer, retrieval_tables, ranking_table, plots, number_format)
"""
