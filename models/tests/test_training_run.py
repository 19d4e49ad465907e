"""From raw files to a verified bundle with somebody else's encoder, by the commands that a person would type."""

from __future__ import annotations

import tomllib

import torch
from conftest import write_movielens
from live_server import serving

from learn.cli import main
from learn.serving import bundle, fixture_bundles
from research import record_files
from research.ranking.result_files import RankingStudy


def test_every_step_in_one_go_with_an_encoder_of_ones_own(tmp_path, capsys):
    films = [(i, f"Film number {i}", "Drama|War" if i % 2 else "Comedy") for i in range(1, 21)]
    ratings = [(u, (u * 3 + i) % 20 + 1, 5.0 if (u + i) % 2 else 2.0, i) for u in range(1, 13) for i in range(8)]
    write_movielens(tmp_path / "ml", ratings, films)
    torch.manual_seed(0)
    fixture_bundles.encoder_model().save_pretrained(tmp_path / "encoder")
    fixture_bundles.byte_tokenizer().save(str(tmp_path / "encoder" / "tokenizer.json"))
    where = ["--data", tmp_path / "ml", "--run", tmp_path / "run", "--encoder", tmp_path / "encoder"]
    made = ["--out", tmp_path / "out", "--name", "own", "--bundle-version", "7", "--source", "made up"]
    assert main(["all", *map(str, where + made), "--steps", "3", "--threads", "1"]) == 0

    manifest = tomllib.loads((tmp_path / "out" / "manifest.toml").read_text())
    assert (manifest["name"], manifest["version"]) == ("own", "7")
    assert manifest["encoder"]["dim"] == 32
    # Its weights lie in the bundle and are linked; nothing is said to come from a package.
    assert not any("pypi" in entry for entry in manifest["files"])
    sizes = {entry["path"]: entry["bytes"] for entry in manifest["files"]}
    assert sizes["model.safetensors"] > 2 * sizes["encoder.onnx"]
    assert manifest["provenance"]["data"] == "made up"
    assert manifest["provenance"]["metrics"]["n_users"] == 12
    bundle.verify(tmp_path / "out")

    towers = (tmp_path / "run" / "towers.pt").read_bytes()
    (tmp_path / "tuned.toml").write_text("[cvr]\ntune_towers = true\nepochs = 1\n[train]\nsteps = 3\n")
    config = ["--config", str(tmp_path / "tuned.toml"), "--threads", "1"]
    for _again in range(2):
        assert main(["cvr", *map(str, where[2:]), *config]) == 0
    assert main(["export", *map(str, where[2:] + made), *config]) == 1
    assert "metrics.json is missing; `learn evaluate` writes it" in capsys.readouterr().err
    for step, more in (("evaluate", []), ("export", made)):
        assert main([step, *map(str, where[2:] + more), *config]) == 0
    assert (tmp_path / "run" / "towers.pt").read_bytes() == towers
    tuned = torch.load(tmp_path / "run" / "tuned.pt")["weights"]
    assert not torch.equal(
        tuned["projection.weight"], torch.load(tmp_path / "run" / "towers.pt")["weights"]["projection.weight"]
    )
    bundle.verify(tmp_path / "out")
    # What was trained for one split is not measured on another.
    (tmp_path / "other.toml").write_text("[split]\nn_test = 2\n")
    assert main(["evaluate", *map(str, where[2:]), "--config", str(tmp_path / "other.toml")]) == 1
    assert "its towers were trained with {'split': {'n_test': 1" in capsys.readouterr().err
    _begin_with_other_towers(tmp_path, where, capsys)
    # New towers: what was tuned, and the head, belong to the old ones.
    assert main(["train", *map(str, where[2:]), *config]) == 0
    assert not (tmp_path / "run" / "tuned.pt").exists() and not (tmp_path / "run" / "cvr.pt").exists()


def _another_encoder(folder):
    torch.manual_seed(1)
    fixture_bundles.encoder_model().save_pretrained(folder)
    fixture_bundles.byte_tokenizer().save(str(folder / "tokenizer.json"))


def _begin_with_other_towers(tmp_path, where, capsys):
    """`--from`: other items, towers of the first run; a step too small to move them shows where they began."""
    films = [(i, f"Another film {i}", "Horror") for i in range(1, 16)]
    ratings = [(u, (u * 5 + i) % 15 + 1, 5.0 if (u + i) % 2 else 2.0, i) for u in range(1, 9) for i in range(6)]
    write_movielens(tmp_path / "other", ratings, films)
    (tmp_path / "still.toml").write_text("[train]\nsteps = 1\nlearning_rate = 1e-12\nweight_decay = 0.0\n")
    own = ["--run", str(tmp_path / "next"), "--encoder", str(tmp_path / "encoder"), "--threads", "1"]
    own += ["--config", str(tmp_path / "still.toml")]
    assert main(["prepare", "--data", str(tmp_path / "other"), *own]) == 0
    assert main(["train", *own, "--from", str(tmp_path / "run")]) == 0
    assert [past["run"] for past in torch.load(tmp_path / "next" / "towers.pt")["lineage"]] == ["run", "next"]
    before, after = (torch.load(tmp_path / name)["weights"] for name in ("run/tuned.pt", "next/towers.pt"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    # Neither other sizes nor towers that have seen what is held out.
    (tmp_path / "wide.toml").write_text("[pch]\nffn = 128\n")
    assert main(["train", *own[:-2], "--config", str(tmp_path / "wide.toml"), "--from", str(tmp_path / "run")]) == 1
    assert "its towers have ffn = 256, but this run needs 128" in capsys.readouterr().err
    leaky = ["--run", str(tmp_path / "leaky"), "--encoder", str(tmp_path / "encoder")]
    leaky += ["--config", str(tmp_path / "other.toml")]
    assert main(["prepare", *map(str, where[:2]), *leaky]) == 0
    # Told before anything is encoded, and also of a run that lies further back.
    for start in ("run", "next"):
        assert main(["train", *leaky, "--from", str(tmp_path / start)]) == 1
        error = capsys.readouterr().err
        assert "trained in the run run on the same events" in error and "may have seen its test events" in error
    assert not (tmp_path / "leaky" / "cache").exists()
    (tmp_path / "encoder" / "again").mkdir()
    _another_encoder(tmp_path / "encoder" / "again")
    assert main(["train", *own, "--encoder", str(tmp_path / "encoder" / "again"), "--from", str(tmp_path / "run")]) == 1
    assert "its towers have encoder = 'encoder " in capsys.readouterr().err
    # A bundle of towers that began elsewhere says so.
    # And its dtype need not be the one that all the steps before it had.
    half = ["--dtype", "bfloat16"]
    start, out = ["--from", tmp_path / "run"], ["--out", tmp_path / "second"]
    for step, more in (("train", half + start), ("cvr", half), ("evaluate", half), ("export", out)):
        assert main([step, *own, *map(str, more)]) == 0
    assert tomllib.loads((tmp_path / "second" / "manifest.toml").read_text())["provenance"]["started_from"] == ["run"]
    assert main(["train", *own, "--from", str(tmp_path / "nowhere")]) == 1
    assert "nowhere/towers.pt is missing; `learn train` writes it" in capsys.readouterr().err


SHOP_STUDY = """
study = "shop"
seeds = [1, 2]
[train]
steps = 2
users = 4
warmup = 1
n_uniform = 8
[contents.minilm]
encoder = "encoder"
[models.popularity]
kind = "popularity"
label = "Popularity"
[models.sasrec]
kind = "sasrec"
label = "SASRec"
sizes = { width = 8, max_history = 6 }
[models.learn-text]
kind = "learn"
label = "LEARN"
family = "learn"
sizes = { width = 8, layers = 1, heads = 2, ffn = 8, out_dim = 8, max_history = 6, adaptor_hidden = 8 }
"""


def test_a_shop_of_ones_own_from_its_csv_to_bundle_ranking_model_and_report(tmp_path, capsys):
    """What README promises a newcomer, and the study and report after it."""
    lines = ["user,item,timestamp,value"]
    for user in range(24):
        lines += [f"u{user},i{(user * 7 + at * 3) % 30},{user * 50 + at * 10},{(user + at) % 2}" for at in range(14)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "interactions.csv").write_text("\n".join(lines) + "\n")
    items = [f'{{"id": "i{number}", "title": "Thing number {number}"}}' for number in range(30)]
    (tmp_path / "in" / "items.jsonl").write_text("\n".join(items) + "\n")
    (tmp_path / "encoder").mkdir()
    _another_encoder(tmp_path / "encoder")
    where = ["--run", str(tmp_path / "run"), "--encoder", str(tmp_path / "encoder"), "--threads", "1", "--steps", "3"]
    (tmp_path / "shop.toml").write_text("[cvr]\nliked_from = 1\nepochs = 1\n")
    config = ["--config", str(tmp_path / "shop.toml")]
    made = ["--out", str(tmp_path / "bundle"), "--name", "shop"]
    assert main(["all", "--data", str(tmp_path / "in"), *where, *made, *config]) == 0
    bundle.verify(tmp_path / "bundle")
    # The server gives the vectors that PyTorch gives for this run's own users.
    with serving(tmp_path / "bundle", tmp_path) as server:
        verify = ["verify", "--server", server.grpc, "--admin", server.admin, "--users", "5", *where, *config]
        assert main(verify) == 0
        assert "mid_emb" in capsys.readouterr().out
    # Labels are 0 and 1: without the setting nothing is a conversion, and the message says which setting.
    assert main(["rank", *where, "--seed", "1"]) == 1
    assert "have a value of cvr.liked_from = 4 or more" in capsys.readouterr().err
    for name, cut in (("run", ""), ("by-time", "[time_split]\nfractions = [0.6, 0.8]\n")):
        (tmp_path / "rank.toml").write_text((tmp_path / "shop.toml").read_text() + cut)
        own = ["--run", str(tmp_path / name), *where[2:], "--config", str(tmp_path / "rank.toml")]
        assert main(["prepare", "--data", str(tmp_path / "in"), *own]) == 0
        assert main(["rank", *own, "--seed", "1"]) == 0
        assert "uauc" in capsys.readouterr().out
        ranking = record_files.read(tmp_path / name / "ranking" / "ranking.npz", RankingStudy)
        assert ranking.split["kind"] == ("global_time" if cut else "per_user") and len(set(ranking.label.tolist())) == 2
    (tmp_path / "study.toml").write_text(SHOP_STUDY)
    study = ["--config", str(tmp_path / "study.toml"), "--encoders", str(tmp_path), "--run", str(tmp_path / "studied")]
    study += ["--out", str(tmp_path / "results"), "--workers", "1"]
    assert main(["study", "--data", str(tmp_path / "in"), *study]) == 0
    assert main(["report", "--results", str(tmp_path / "results"), "--out", str(tmp_path)]) == 0
    assert "Study `shop`: 24 users, 30 items, 336 events" in (tmp_path / "REPORT.md").read_text()


def test_what_a_user_can_mend_is_one_line(tmp_path, capsys):
    assert main(["prepare", "--data", str(tmp_path / "nowhere"), "--run", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("learn: ") and "nowhere" in error and error.count("\n") == 1


def test_a_log_without_conversions_is_refused_before_anything_is_trained(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    rows = [f"u{user},i{(user + at) % 9},{at}" for user in range(6) for at in range(6)]
    (tmp_path / "in" / "interactions.csv").write_text("\n".join(["user,item,timestamp", *rows]) + "\n")
    items = [f'{{"id": "i{number}", "title": "Item {number}"}}' for number in range(9)]
    (tmp_path / "in" / "items.jsonl").write_text("\n".join(items) + "\n")
    where = ["--data", str(tmp_path / "in"), "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert main(["all", *where]) == 1
    assert "0 of 36 events have a value of cvr.liked_from = 4 or more" in capsys.readouterr().err
    assert not (tmp_path / "run" / "cache").exists()
    (tmp_path / "low.toml").write_text("[cvr]\nliked_from = 1\n")
    assert main(["all", *where, "--config", str(tmp_path / "low.toml")]) == 1
    assert "36 of 36 events have a value of cvr.liked_from = 1 or more" in capsys.readouterr().err
    # Both kinds are there, but the last event of every user is of one: the head could not be measured.
    rows = [f"u{user},i{(user + at) % 9},{at},{at % 2}" for user in range(6) for at in range(6)]
    (tmp_path / "in" / "interactions.csv").write_text("\n".join(["user,item,timestamp,value", *rows]) + "\n")
    assert main(["all", *where, "--config", str(tmp_path / "low.toml")]) == 1
    assert "0 of the 6 validation events have a value of cvr.liked_from = 1" in capsys.readouterr().err
    (tmp_path / "low.toml").write_text("[cvr]\nliked_from = 1\n[split]\nn_test = 0\nn_validation = 2\n")
    assert main(["all", *where, "--config", str(tmp_path / "low.toml")]) == 1
    assert "0 of the 0 test events have a value" in capsys.readouterr().err
