"""The `learn` commands as a user types them, from raw files to a verified bundle with the user's own encoder."""

from __future__ import annotations

import json
import tomllib

import pytest
import torch
from conftest import write_movielens
from live_server import serving
from safetensors.torch import load_file

from learn.cli import main
from learn.models import weights_file
from learn.models.pch import PchConfig
from learn.serving import bundle_check, fixture_bundles
from learn.training import content_skip
from research import record_files
from research.ranking.result_files import RankingStudy


def test_all_commands_work_with_a_custom_encoder_and_refuse_mismatched_inputs(tmp_path, capsys):
    films = [(i, f"Film number {i}", "Drama|War" if i % 2 else "Comedy") for i in range(1, 21)]
    ratings = [(u, (u * 3 + i) % 20 + 1, 5.0 if (u + i) % 2 else 2.0, i) for u in range(1, 13) for i in range(8)]
    write_movielens(tmp_path / "ml", ratings, films)
    torch.manual_seed(0)
    fixture_bundles.encoder_model().save_pretrained(tmp_path / "encoder")
    fixture_bundles.byte_tokenizer().save(str(tmp_path / "encoder" / "tokenizer.json"))
    run_options = ["--data", tmp_path / "ml", "--run", tmp_path / "run", "--encoder", tmp_path / "encoder"]
    bundle_options = ["--out", tmp_path / "out", "--name", "own", "--bundle-version", "7", "--source", "made up"]
    assert main(["all", *map(str, run_options + bundle_options), "--steps", "3", "--threads", "1"]) == 0

    manifest = tomllib.loads((tmp_path / "out" / "manifest.toml").read_text())
    assert (manifest["name"], manifest["version"]) == ("own", "7")
    assert manifest["encoder"]["dim"] == 32
    assert manifest["history"] == {"actions": [], "keeps": "all", "order": "oldest_first"}
    # The encoder's weights are a file of the bundle that the graph links to; no file is fetched from a package.
    assert not any("pypi" in entry for entry in manifest["files"])
    sizes = {entry["path"]: entry["bytes"] for entry in manifest["files"]}
    assert sizes["model.safetensors"] > 2 * sizes["encoder.onnx"]
    assert manifest["provenance"]["data"] == "made up"
    assert manifest["provenance"]["metrics"]["n_users"] == 12
    bundle_check.verify(tmp_path / "out")

    towers = (tmp_path / "run" / "towers.safetensors").read_bytes()
    (tmp_path / "tuned.toml").write_text(
        "[cvr]\ntune_towers = true\nhistory = 'liked'\nepochs = 1\n[train]\nsteps = 3\n"
    )
    config = ["--config", str(tmp_path / "tuned.toml"), "--threads", "1"]
    for _ in range(2):
        assert main(["cvr", *map(str, run_options[2:]), *config]) == 0
    assert main(["export", *map(str, run_options[2:] + bundle_options), *config]) == 1
    assert "metrics.json is missing; `learn evaluate` writes it" in capsys.readouterr().err
    for step, more in (("evaluate", []), ("export", bundle_options)):
        assert main([step, *map(str, run_options[2:] + more), *config]) == 0
    assert (tmp_path / "run" / "towers.safetensors").read_bytes() == towers
    tuned, trained = (load_file(tmp_path / "run" / f"{stem}.safetensors") for stem in ("tuned", "towers"))
    assert not torch.equal(tuned["projection.weight"], trained["projection.weight"])
    bundle_check.verify(tmp_path / "out")
    _check_what_the_manifest_says_of_histories(
        tmp_path, list(map(str, run_options[2:] + bundle_options)), config, capsys
    )
    # Towers that were trained for one split are not evaluated on another.
    (tmp_path / "other.toml").write_text("[split]\nn_test = 2\n")
    assert main(["evaluate", *map(str, run_options[2:]), "--config", str(tmp_path / "other.toml")]) == 1
    assert "its towers were trained with {'split': {'n_test': 1" in capsys.readouterr().err
    _check_training_from_other_towers(tmp_path, run_options, capsys)
    # Training new towers removes the tuned towers and the head, which belong to the old towers.
    assert main(["train", *map(str, run_options[2:]), *config]) == 0
    assert {path.stem for path in (tmp_path / "run").glob("*.*") if path.suffix in (".pt", ".safetensors")} == {
        "towers"
    }


def _check_what_the_manifest_says_of_histories(tmp_path, export_options, config, capsys):
    """The head's training decides, not the settings of the export, unless an earlier version trained the head.

    Then the settings are assumed to be those of that training, and the output says so.
    """

    def keeps():
        return tomllib.loads((tmp_path / "out" / "manifest.toml").read_text())["history"]["keeps"]

    assert keeps() == "liked"
    assert main(["export", *export_options, "--threads", "1"]) == 0
    assert keeps() == "liked"
    assert "is assumed" not in capsys.readouterr().out
    # An earlier version wrote files of PyTorch, without these two entries.
    for stem in ("towers", "tuned", "cvr"):
        saved = weights_file.read(tmp_path / "run" / f"{stem}.safetensors")
        saved["sizes"].pop("actions", None)
        saved.pop("history", None)
        torch.save(saved, tmp_path / "run" / f"{stem}.pt")
        (tmp_path / "run" / f"{stem}.safetensors").unlink()
    assert main(["export", *export_options, "--threads", "1"]) == 0
    assert keeps() == "all"
    assert 'history.keeps = "all" is assumed, from cvr.history of the settings' in capsys.readouterr().out
    assert main(["export", *export_options, *config]) == 0
    assert keeps() == "liked"
    assert 'history.keeps = "liked" is assumed, from cvr.history of the settings' in capsys.readouterr().out


def _write_encoder_with_seed_1(folder):
    torch.manual_seed(1)
    fixture_bundles.encoder_model().save_pretrained(folder)
    fixture_bundles.byte_tokenizer().save(str(folder / "tokenizer.json"))


def _check_training_from_other_towers(tmp_path, run_options, capsys):
    """Checks `train --from` with other items; one step with a tiny learning rate shows which towers it started from."""
    films = [(i, f"Another film {i}", "Horror") for i in range(1, 16)]
    ratings = [(u, (u * 5 + i) % 15 + 1, 5.0 if (u + i) % 2 else 2.0, i) for u in range(1, 9) for i in range(6)]
    write_movielens(tmp_path / "other", ratings, films)
    (tmp_path / "still.toml").write_text("[train]\nsteps = 1\nlearning_rate = 1e-12\nweight_decay = 0.0\n")
    next_run_options = ["--run", str(tmp_path / "next"), "--encoder", str(tmp_path / "encoder"), "--threads", "1"]
    next_run_options += ["--config", str(tmp_path / "still.toml")]
    assert main(["prepare", "--data", str(tmp_path / "other"), *next_run_options]) == 0
    assert main(["train", *next_run_options, "--from", str(tmp_path / "run")]) == 0
    # The first are in a file of an earlier version; see `_check_what_the_manifest_says_of_histories`.
    saved = [weights_file.read(tmp_path / name) for name in ("run/tuned.pt", "next/towers.safetensors")]
    assert [past["run"] for past in saved[1]["lineage"]] == ["run", "next"]
    before, after = (found["weights"] for found in saved)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    # Towers of other sizes, and towers that were trained on events that this run holds out, are refused.
    other = ["--config", str(tmp_path / "other-sizes.toml"), "--from", str(tmp_path / "run")]
    for setting, message in (
        ("ffn = 128", "its towers have ffn = 256, but this run needs 128"),
        ('item_tower = "adapted"', "its towers have item_tower = 'sequence', but this run needs 'adapted'"),
    ):
        (tmp_path / "other-sizes.toml").write_text(f"[pch]\n{setting}\n")
        assert main(["train", *next_run_options[:-2], *other]) == 1
        assert message in capsys.readouterr().err
    leaky = ["--run", str(tmp_path / "leaky"), "--encoder", str(tmp_path / "encoder")]
    leaky += ["--config", str(tmp_path / "other.toml")]
    assert main(["prepare", *map(str, run_options[:2]), *leaky]) == 0
    # The leak is reported before anything is encoded, also when it comes from an earlier run of the lineage.
    for start in ("run", "next"):
        assert main(["train", *leaky, "--from", str(tmp_path / start)]) == 1
        error = capsys.readouterr().err
        assert "trained in the run run on the same events" in error and "may have seen its test events" in error
    assert not (tmp_path / "leaky" / "cache").exists()
    (tmp_path / "encoder" / "again").mkdir()
    _write_encoder_with_seed_1(tmp_path / "encoder" / "again")
    assert (
        main(
            [
                "train",
                *next_run_options,
                "--encoder",
                str(tmp_path / "encoder" / "again"),
                "--from",
                str(tmp_path / "run"),
            ]
        )
        == 1
    )
    assert "its towers have encoder = 'encoder " in capsys.readouterr().err
    # The manifest names the run that the towers started from, and the export may use another dtype than earlier steps.
    half = ["--dtype", "bfloat16"]
    start, out = ["--from", tmp_path / "run"], ["--out", tmp_path / "second"]
    for step, more in (("train", half + start), ("cvr", half), ("evaluate", half), ("export", out)):
        assert main([step, *next_run_options, *map(str, more)]) == 0
    assert tomllib.loads((tmp_path / "second" / "manifest.toml").read_text())["provenance"]["started_from"] == ["run"]
    assert main(["train", *next_run_options, "--from", str(tmp_path / "nowhere")]) == 1
    assert "nowhere/towers.safetensors is missing; `learn train` writes it" in capsys.readouterr().err


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


def test_a_csv_log_becomes_a_bundle_a_ranking_model_and_a_report(tmp_path, capsys):
    """Runs the steps that the README gives a new user, then the study and the report."""
    lines = ["user,item,timestamp,value"]
    for user in range(24):
        lines += [f"u{user},i{(user * 7 + at * 3) % 30},{user * 50 + at * 10},{(user + at) % 2}" for at in range(14)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "interactions.csv").write_text("\n".join(lines) + "\n")
    items = [f'{{"id": "i{number}", "title": "Thing number {number}"}}' for number in range(30)]
    (tmp_path / "in" / "items.jsonl").write_text("\n".join(items) + "\n")
    (tmp_path / "encoder").mkdir()
    _write_encoder_with_seed_1(tmp_path / "encoder")
    run_options = [
        "--run",
        str(tmp_path / "run"),
        "--encoder",
        str(tmp_path / "encoder"),
        "--threads",
        "1",
        "--steps",
        "3",
    ]
    (tmp_path / "shop.toml").write_text("[cvr]\nliked_from = 1\nepochs = 1\n")
    config = ["--config", str(tmp_path / "shop.toml")]
    bundle_options = ["--out", str(tmp_path / "bundle"), "--name", "shop"]
    assert main(["all", "--data", str(tmp_path / "in"), *run_options, *bundle_options, *config]) == 0
    bundle_check.verify(tmp_path / "bundle")
    # The server returns the vectors that PyTorch computes for users of this run.
    with serving(tmp_path / "bundle", tmp_path) as server:
        verify = ["verify", "--server", server.grpc, "--admin", server.admin, "--users", "5", *run_options, *config]
        assert main(verify) == 0
        assert "mid_emb" in capsys.readouterr().out
    # Labels are 0 and 1, so with the default cvr.liked_from no event is a conversion; the message names the setting.
    assert main(["rank", *run_options, "--seed", "1"]) == 1
    assert "have a value of cvr.liked_from = 4 or more" in capsys.readouterr().err
    for name, split_settings in (("run", ""), ("by-time", "[time_split]\nfractions = [0.6, 0.8]\n")):
        (tmp_path / "rank.toml").write_text((tmp_path / "shop.toml").read_text() + split_settings)
        rank_options = ["--run", str(tmp_path / name), *run_options[2:], "--config", str(tmp_path / "rank.toml")]
        assert main(["prepare", "--data", str(tmp_path / "in"), *rank_options]) == 0
        assert main(["rank", *rank_options, "--seed", "1"]) == 0
        assert "uauc" in capsys.readouterr().out
        ranking = record_files.read(tmp_path / name / "ranking" / "ranking.npz", RankingStudy)
        assert (
            ranking.split["kind"] == ("global_time" if split_settings else "per_user")
            and len(set(ranking.label.tolist())) == 2
        )
    (tmp_path / "study.toml").write_text(SHOP_STUDY)
    study_options = [
        "--config",
        str(tmp_path / "study.toml"),
        "--encoders",
        str(tmp_path),
        "--run",
        str(tmp_path / "studied"),
    ]
    study_options += ["--out", str(tmp_path / "results"), "--workers", "1"]
    assert main(["study", "--data", str(tmp_path / "in"), *study_options]) == 0
    assert main(["report", "--results", str(tmp_path / "results"), "--out", str(tmp_path)]) == 0
    assert "Study `shop`: 24 users, 30 items, 336 events" in (tmp_path / "REPORT.md").read_text()


def test_an_error_that_the_user_can_fix_is_printed_on_one_line(tmp_path, capsys):
    assert main(["prepare", "--data", str(tmp_path / "nowhere"), "--run", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("learn: ") and "nowhere" in error and error.count("\n") == 1


def test_a_broken_manifest_in_the_output_folder_is_refused_before_anything_is_encoded(tmp_path, capsys):
    ratings = [(u, (u * 3 + i) % 9 + 1, 5.0 if (u + i) % 2 else 2.0, i) for u in range(1, 7) for i in range(6)]
    write_movielens(tmp_path / "in", ratings, [(i, f"Film {i}", "Drama") for i in range(1, 10)])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.toml").write_text("format = [")
    whole = ["--data", str(tmp_path / "in"), "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert main(["all", *whole]) == 1
    assert f"learn: {tmp_path / 'out' / 'manifest.toml'}: Invalid value" in capsys.readouterr().err
    assert (tmp_path / "run" / "data").exists() and not (tmp_path / "run" / "cache").exists()


def _write_shop(folder, columns, row):
    """Writes a log of six users and nine items; `row(user, at)` gives the columns after user, item and timestamp."""
    folder.mkdir(exist_ok=True)
    rows = [f"u{user},i{(user * 3 + at) % 9},{at}{row(user, at)}" for user in range(6) for at in range(6)]
    (folder / "interactions.csv").write_text("\n".join([f"user,item,timestamp{columns}", *rows]) + "\n")
    items = [f'{{"id": "i{number}", "title": "Item {number}"}}' for number in range(9)]
    (folder / "items.jsonl").write_text("\n".join(items) + "\n")


def test_actions_that_the_log_does_not_say_are_refused_before_anything_is_encoded(tmp_path, capsys):
    config = tmp_path / "actions.toml"
    run_options = ["--run", str(tmp_path / "run"), "--config", str(config)]
    whole = ["all", "--data", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *run_options]
    likes = "[pch]\nactions = ['like', 'view']\n"
    values, names = (",value", lambda user, at: f",{4.5 - (user + at) % 3}"), ("", lambda user, at: "")
    actions = (",action", lambda user, at: f",{('like', 'purchase', '')[(user + at) % 3]}")
    for (columns, row), text, message in (
        (values, "[pch]\nactions = ['love']\n", "actions has 'love', but must be some of view, click, like"),
        (values, likes, "the log has no column `action`: say from which value on a user likes an item"),
        (names, likes + "[actions]\nliked_from = 1\n", "the log has neither a column `action` nor values; leave"),
        (values, likes + "[actions]\nliked_from = 4\n", "no event of the log is 'view', so the towers could not"),
        (actions, likes, "no event of the log is 'view', so the towers could not learn what that means"),
        (values, "[actions]\ndisliked_to = 4\n", "disliked_to is 4, but there is no liked_from; give both"),
        (values, "[actions]\nliked_from = 4\ndisliked_to = 4\n", "disliked_to is 4; expected less than liked_from"),
    ):
        _write_shop(tmp_path / "in", columns, row)
        config.write_text(text)
        assert main(whole) == 1
        assert message in capsys.readouterr().err
    assert (tmp_path / "run" / "data").exists() and not (tmp_path / "run" / "cache").exists()


@pytest.mark.parametrize("source", ["values", "column"])
def test_towers_learn_actions_from_the_log_and_the_server_reads_the_same(tmp_path, capsys, monkeypatch, source):
    """Actions from values, or from the log's own column, end in a bundle with which a server answers like PyTorch.

    The towers have a content skip, whose weight would be chosen by chance on so few events.
    """
    monkeypatch.setattr(content_skip, "WEIGHTS", (0.3,))
    names = ("", "click", "like", "dislike")
    rows = {
        "values": (",value", lambda user, at: f",{4.5 - (user + at) % 3}"),
        "column": (",value,action", lambda user, at: f",{4.5 - (user + at) % 3},{names[(user * at) % 4]}"),
    }
    _write_shop(tmp_path / "in", *rows[source])
    (tmp_path / "encoder").mkdir()
    _write_encoder_with_seed_1(tmp_path / "encoder")
    item_tower = "sequence" if source == "values" else "adapted"
    pch = f"[pch]\nactions = ['like', 'dislike']\nskip_dim = 8\nitem_tower = '{item_tower}'\n"
    head = "[head]\nproduct = true\ndot = true\n"
    cvr = "[cvr]\nepochs = 1\nwithin_user_weight = 1\ntune_towers = true\ntune_layers = 'last'\ntune_epochs = 1\n"
    cvr += "tune_next_weight = 0.3\n[train]\nsteps = 2\nusers = 4\nn_uniform = 4\n"
    thresholds = "[actions]\nliked_from = 4\ndisliked_to = 2.5\n" if source == "values" else ""
    (tmp_path / "shop.toml").write_text(pch + head + cvr + thresholds)
    steps = ["--run", str(tmp_path / "run"), "--encoder", str(tmp_path / "encoder"), "--threads", "1"]
    config = ["--config", str(tmp_path / "shop.toml")]
    assert main(["all", "--data", str(tmp_path / "in"), "--out", str(tmp_path / "bundle"), *steps, *config]) == 0
    bundle_check.verify(tmp_path / "bundle")
    manifest = tomllib.loads((tmp_path / "bundle" / "manifest.toml").read_text())
    assert manifest["history"]["actions"] == ["like", "dislike"]
    assert manifest["user_tower"]["inputs"] == ["adapted", "mask", "action"]
    sizes = PchConfig()
    assert manifest["user_tower"]["dim"] == manifest["item_tower"]["dim"] == sizes.out_dim + 8
    assert manifest["item_tower"]["adapted_dim"] == sizes.width + 8
    saved = weights_file.read(tmp_path / "run" / "tuned.safetensors")
    assert saved["sizes"]["skip_dim"] == 8 and float(saved["weights"]["skip.weight"]) == pytest.approx(0.3)
    golden = json.loads((tmp_path / "bundle" / "golden.json").read_text())
    assert sum("actions" in user for user in golden["users"]) >= 3
    assert manifest["provenance"]["metrics"].keys() >= {"ndcg_at_10_before_cvr", "cvr_tune_epoch"}
    origin = weights_file.read(tmp_path / "run" / "towers.safetensors")["origin"]
    if source == "values":
        assert origin["actions"] == {"liked_from": 4.0, "disliked_to": 2.5}
    else:
        assert "actions" not in origin
    with serving(tmp_path / "bundle", tmp_path) as server:
        assert main(["verify", "--server", server.grpc, "--users", "4", *steps, *config]) == 0
    capsys.readouterr()
    # Other thresholds would give the later steps other actions than the towers learned.
    (tmp_path / "shop.toml").write_text(pch + head + cvr + "[actions]\nliked_from = 3\n")
    assert main(["cvr", *steps, *config]) == (1 if source == "values" else 0)
    if source == "values":
        assert "'actions': {'liked_from': 4.0, 'disliked_to': 2.5}}, but the settings say" in capsys.readouterr().err


def test_a_skip_that_cannot_be_is_refused_before_training_and_one_that_does_not_help_is_left_out(
    tmp_path, capsys, monkeypatch
):
    _write_shop(tmp_path / "in", ",value", lambda user, at: f",{4.5 - (user + at) % 3}")
    (tmp_path / "encoder").mkdir()
    _write_encoder_with_seed_1(tmp_path / "encoder")
    run = ["--run", str(tmp_path / "run"), "--encoder", str(tmp_path / "encoder"), "--threads", "1"]
    run += ["--config", str(tmp_path / "shop.toml"), "--steps", "1"]
    (tmp_path / "shop.toml").write_text("[pch]\nskip_dim = 33\n")
    assert main(["prepare", "--data", str(tmp_path / "in"), *run]) == 0
    assert main(["train", *run]) == 1
    assert "skip_dim is 33, but content embeddings have 32 numbers" in capsys.readouterr().err
    assert not (tmp_path / "run" / "train.jsonl").exists()
    (tmp_path / "shop.toml").write_text("[pch]\nskip_dim = 8\n")
    monkeypatch.setattr(content_skip, "WEIGHTS", (0.0,))
    assert main(["train", *run]) == 0
    saved = weights_file.read(tmp_path / "run" / "towers.safetensors")
    assert saved["sizes"]["skip_dim"] == 0 and not [name for name in saved["weights"] if name.startswith("skip")]


def test_a_log_of_events_alone_trains_a_head_for_clicks(tmp_path, capsys):
    _write_shop(tmp_path / "in", "", lambda user, at: "")
    (tmp_path / "encoder").mkdir()
    _write_encoder_with_seed_1(tmp_path / "encoder")
    (tmp_path / "click.toml").write_text("[cvr]\ntask = 'click'\nepochs = 1\n[train]\nsteps = 2\nusers = 4\n")
    options = ["--run", str(tmp_path / "run"), "--encoder", str(tmp_path / "encoder"), "--threads", "1"]
    options += ["--config", str(tmp_path / "click.toml"), "--data", str(tmp_path / "in"), "--out", str(tmp_path / "b")]
    assert main(["all", *options]) == 0
    bundle_check.verify(tmp_path / "b")
    assert weights_file.read(tmp_path / "run" / "cvr.safetensors")["task"] == "click"
    assert (
        tomllib.loads((tmp_path / "b" / "manifest.toml").read_text())["provenance"]["metrics"]["cvr_base_rate"] == 0.2
    )


def test_a_log_with_impressions_trains_clicks_and_conversions_and_one_without_is_refused(tmp_path, capsys):
    actions = ("view", "click", "purchase", "")
    _write_shop(tmp_path / "in", ",action", lambda user, at: f",{actions[(user + at) % 4]}")
    (tmp_path / "encoder").mkdir()
    _write_encoder_with_seed_1(tmp_path / "encoder")
    (tmp_path / "shop.toml").write_text(
        "[cvr]\ntask = 'click_and_conversion'\nconversions = ['purchase']\nepochs = 1\n"
        "[pch]\nactions = ['view', 'click', 'purchase']\n[train]\nsteps = 2\nusers = 4\n"
    )
    options = ["--run", str(tmp_path / "run"), "--encoder", str(tmp_path / "encoder"), "--threads", "1"]
    options += ["--config", str(tmp_path / "shop.toml"), "--data", str(tmp_path / "in"), "--out", str(tmp_path / "b")]
    assert main(["all", *options]) == 0
    bundle_check.verify(tmp_path / "b")
    actions = ("like", "click", "purchase", "")
    _write_shop(tmp_path / "in", ",action", lambda user, at: f",{actions[(user + at) % 4]}")
    (tmp_path / "shop.toml").write_text("[cvr]\ntask = 'click_and_conversion'\nconversions = ['purchase']\n")
    assert main(["all", *options]) == 1
    assert "0 of 36 events have an action of cvr.impressions = ['view', 'skip']" in capsys.readouterr().err


def test_liked_histories_of_a_log_with_actions_need_to_know_which_actions_convert(tmp_path, capsys):
    _write_shop(tmp_path / "in", ",value,action", lambda user, at: f",{4.5 - (user + at) % 3},like")
    (tmp_path / "liked.toml").write_text("[cvr]\nhistory = 'liked'\n")
    options = ["--run", str(tmp_path / "run"), "--config", str(tmp_path / "liked.toml")]
    assert main(["all", "--data", str(tmp_path / "in"), "--out", str(tmp_path / "b"), *options]) == 1
    assert 'cvr.history is "liked", and the log has a column `action`' in capsys.readouterr().err


def test_a_log_without_both_labels_is_refused_before_anything_is_trained(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    rows = [f"u{user},i{(user + at) % 9},{at}" for user in range(6) for at in range(6)]
    (tmp_path / "in" / "interactions.csv").write_text("\n".join(["user,item,timestamp", *rows]) + "\n")
    items = [f'{{"id": "i{number}", "title": "Item {number}"}}' for number in range(9)]
    (tmp_path / "in" / "items.jsonl").write_text("\n".join(items) + "\n")
    run_options = ["--data", str(tmp_path / "in"), "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert main(["all", *run_options]) == 1
    assert "0 of 36 events have a value of cvr.liked_from = 4 or more" in capsys.readouterr().err
    assert not (tmp_path / "run" / "cache").exists()
    (tmp_path / "low.toml").write_text("[cvr]\nliked_from = 1\n")
    assert main(["all", *run_options, "--config", str(tmp_path / "low.toml")]) == 1
    assert "36 of 36 events have a value of cvr.liked_from = 1 or more" in capsys.readouterr().err
    # Both labels occur, but the last event of every user has the same label, so the head could not be evaluated.
    rows = [f"u{user},i{(user + at) % 9},{at},{at % 2}" for user in range(6) for at in range(6)]
    (tmp_path / "in" / "interactions.csv").write_text("\n".join(["user,item,timestamp,value", *rows]) + "\n")
    assert main(["all", *run_options, "--config", str(tmp_path / "low.toml")]) == 1
    assert "0 of the 6 validation events have a value of cvr.liked_from = 1" in capsys.readouterr().err
    (tmp_path / "low.toml").write_text("[cvr]\nliked_from = 1\n[split]\nn_test = 0\nn_validation = 2\n")
    assert main(["all", *run_options, "--config", str(tmp_path / "low.toml")]) == 1
    assert "0 of the 0 test events have a value" in capsys.readouterr().err
