"""Studies, claims and the report. Not installed with `learn`: its command line imports this package where it is there.

bootstrap            paired comparison of two models over users and seeds

baselines            the models that LEARN is compared with
    sasrec, hstu     self-attention over item ids
    lora             the language model tuned, in place of a transformer over its vectors

retrieval
    study            several models and seeds, a JSON per run (`learn study`)
    result_files     what stands in those JSONs
    estimates        means and differences from them, with their intervals
    manifest_figures what a study says of one model, for the manifest of a bundle

ranking
    study            arms with and without mid-emb
    event_parts      how the log is cut
    features         what the ranking model knows without LEARN
    learn_features   what LEARN adds
    ranker           the ranking model
    auc_metrics      its metrics
    run_command      `learn rank`

report
    claims           what the paper and its public record claim, each with the test that decides it here
    verdicts         what each test found
    document         REPORT.md (`learn report`); answer, notes, number_format, plots, ranking_table, retrieval_tables
"""
