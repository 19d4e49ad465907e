//! What a user did with the items of the history, and visitors without an id.

use crate::harness::{
    BrokenBundle, Server, config, films, fixture, floats, history_statuses, midemb, page, reencoded, retrained,
    run_to_end, shipped, statuses,
};
use midemb_client::proto::{Action, GetMidEmbRequest, GetMidEmbResponse, GetModelInfoRequest, Item};
use std::collections::BTreeSet;

const UNKNOWN: &str = "never seen";

async fn ask(server: &Server, history: Vec<Item>, actions: &[Action]) -> GetMidEmbResponse {
    let history_actions = actions.iter().map(|action| i32::from(*action)).collect();
    let request = GetMidEmbRequest { history_actions, ..page(history, films("c", 2)) };
    server.client().await.get_mid_emb(request).await.unwrap().into_inner()
}

#[tokio::test]
async fn a_model_reads_the_actions_that_it_was_trained_with() {
    use Action::{Click, Dislike, Like, Purchase, Unspecified, View};
    let server = Server::start();
    let history = films("h", 2);
    let info = server.client().await.get_model_info(GetModelInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.models[0].history_actions().collect::<Vec<_>>(), [Click, Like, Dislike, Purchase]);
    assert_eq!((info.models[0].adapted_dim, info.models[0].history_keeps.as_str()), (40, "all"));
    assert_eq!((info.models[0].history_liked_from, info.models[0].history_disliked_to), (None, None));

    let none = ask(&server, history.clone(), &[]).await;
    for (actions, is_same) in [
        ([Unspecified, Unspecified], true),
        // The fixture was not trained with views.
        ([View, View], true),
        ([Like, Unspecified], false),
        ([Unspecified, Like], false),
        ([Like, Dislike], false),
        ([Dislike, Like], false),
    ] {
        // Twice, as the second answer reads the user cache.
        for turn in ["computed", "cached"] {
            let answer = ask(&server, history.clone(), &actions).await;
            assert_eq!(answer.user_emb == none.user_emb, is_same, "{actions:?}, {turn}");
            assert_eq!(answer.mid_emb == none.mid_emb, is_same, "{actions:?}, {turn}");
            assert_eq!(answer.item_emb, none.item_emb, "an action reached a candidate");
        }
    }
    let user_runs = server.scrape().sum("midemb_batch_items_count", &["stage=\"user_tower\""]);
    assert_eq!(user_runs, 5.0, "one run for no action and one for each of the four other histories");
}

#[tokio::test]
async fn a_model_that_was_trained_on_values_says_what_they_mean() {
    let server = Server::start_with(&retrained(), "");
    let info = server.client().await.get_model_info(GetModelInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.models[0].history_liked_from, info.models[0].history_disliked_to), (Some(4.0), Some(2.0)));
    let inspected = run_to_end(midemb().args(["bundle", "inspect"]).arg(retrained()));
    let text = String::from_utf8(inspected.stdout).unwrap();
    let expected = "actions: click, like, dislike, purchase, from values: 4 or more is a like, 2 or less a dislike";
    assert!(text.contains(expected), "{text}");
}

/// An action stays with its item when others are left out.
#[tokio::test]
async fn an_item_that_is_not_used_takes_its_action_with_it() {
    use Action::{Dislike, Like, Purchase};
    let server = Server::start();
    let [first, second] = <[Item; 2]>::try_from(films("h", 2)).unwrap();
    let unknown = Item { id: UNKNOWN.to_owned(), text: None };
    let with_unknown = vec![first.clone(), unknown, second.clone()];
    let answer = ask(&server, with_unknown, &[Like, Dislike, Purchase]).await;
    assert_eq!(history_statuses(&answer), ["OK", "UNKNOWN_ITEM", "OK"]);
    let without = ask(&server, vec![first, second], &[Like, Purchase]).await;
    assert_eq!(answer.user_emb, without.user_emb);

    // The fixture reads the newest 8 items.
    let long = films("long", 11);
    let actions: Vec<Action> = [Like, Dislike, Purchase].into_iter().cycle().take(11).collect();
    let newest = ask(&server, long[3..].to_vec(), &actions[3..]).await;
    let all = ask(&server, long, &actions).await;
    assert_eq!((all.history_used, newest.history_used), (8, 8));
    assert_eq!(all.user_emb, newest.user_emb);
}

#[tokio::test]
async fn a_model_without_actions_takes_calls_that_send_them() {
    let server = Server::start_with(&reencoded(), "");
    let info = server.client().await.get_model_info(GetModelInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.models[0].history_actions, [0; 0]);
    let without = ask(&server, films("h", 2), &[]).await;
    let with = ask(&server, films("h", 2), &[Action::Like, Action::Dislike]).await;
    assert_eq!((&with.user_emb, statuses(&with)), (&without.user_emb, vec!["OK"; 2]));
    assert_eq!(server.scrape().sum("midemb_cache_lookups_total", &["cache=\"user\"", "result=\"hit\""]), 1.0);
}

#[tokio::test]
async fn the_shipped_model_knows_likes_from_dislikes_and_takes_histories_without_actions() {
    use Action::{Click, Dislike, Like};
    let server = Server::start_with(&shipped(), "");
    let info = server.client().await.get_model_info(GetModelInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.models[0].history_actions().collect::<Vec<_>>(), [Click, Like, Dislike]);
    assert_eq!((info.models[0].history_liked_from, info.models[0].history_disliked_to), (Some(4.0), Some(2.5)));
    let mut users = Vec::new();
    for actions in [vec![], vec![Like, Like], vec![Dislike, Dislike]] {
        let answer = ask(&server, films("h", 2), &actions).await;
        assert_eq!(statuses(&answer), ["OK"; 2]);
        users.push(floats(&answer.user_emb));
    }
    assert!(users[0] != users[1] && users[1] != users[2]);
}

/// Traffic would find out, not the load: an action that the tower has no row for, or a list in another order than the trainer's.
#[test]
fn a_list_of_actions_that_is_not_the_towers_is_refused() {
    for (actions, reason) in [
        ("actions = [\"click\", \"like\", \"dislike\", \"purchase\", \"cart\"]", "indices element out of data bounds"),
        (
            "actions = [\"click\", \"like\", \"dislike\", \"cart\"]",
            "history.actions cannot be checked: no golden user has the action cart",
        ),
        ("actions = [\"like\", \"click\", \"dislike\", \"purchase\"]", "golden check failed: user "),
        ("actions = [\"like\", \"like\", \"dislike\", \"purchase\"]", "history.actions names like twice"),
        ("actions = [\"love\"]", "unknown variant `love`"),
        ("actions = []", "user_tower has 3 inputs and 1 outputs, it must have 2 and 1"),
    ] {
        let bundle = BrokenBundle::new();
        bundle.edit("manifest.toml", |manifest| {
            let (before, rest) = manifest.split_once("actions = [").unwrap();
            let (_old, after) = rest.split_once("\n]\n").unwrap();
            format!("{before}{actions}\n{after}")
        });
        let output = run_to_end(midemb().args(["bundle", "verify"]).arg(bundle.folder()));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && stderr.contains(reason), "{actions}: {stderr}");
    }
}

/// A visitor without an id is the coldest start of all.
#[tokio::test]
async fn a_visitor_without_an_id_is_routed_by_history_and_without_one_at_random() {
    let (folder, file) = config(&fixture(), "");
    let (one, other) = (std::fs::read_to_string(&file).unwrap(), retrained().display().to_string());
    std::fs::write(&file, format!("{one}share = 50\n[[models]]\nname = \"other\"\nbundle = {other:?}\nshare = 50\n"))
        .unwrap();
    let server = Server::start_from(folder, file);
    let mut client = server.client().await;
    let mut models_of = async |history: Vec<Item>| {
        let mut names = BTreeSet::new();
        for _ in 0..40 {
            let request = GetMidEmbRequest { user_id: String::new(), ..page(history.clone(), films("c", 1)) };
            let answer = client.get_mid_emb(request).await.unwrap().into_inner();
            assert_eq!((statuses(&answer), floats(&answer.user_emb).len()), (vec!["OK"], 16));
            names.insert(answer.model.unwrap().name);
        }
        names
    };
    let mut by_history = BTreeSet::new();
    for i in 0..20 {
        let names = models_of(films(&format!("h{i}"), 3)).await;
        assert_eq!(names.len(), 1, "the same history was answered by {names:?}");
        by_history.extend(names);
    }
    let both = BTreeSet::from(["learn".to_owned(), "other".to_owned()]);
    assert_eq!((by_history, models_of(vec![]).await), (both.clone(), both));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn query_sends_actions() {
    let server = Server::start();
    let query = |more: &[&str]| {
        let items = shipped().join("sample_items.jsonl");
        let mut command = midemb();
        command.args(["query", "--server", &server.grpc, "--json", "--history", "3", "--items"]).arg(items).args(more);
        run_to_end(&mut command)
    };
    let user_emb = |more: &[&str]| {
        let output = query(more);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()["user_emb"].clone()
    };
    let none = user_emb(&[]);
    let liked = user_emb(&["--history-actions", "like", "--user", ""]);
    assert_ne!(liked, none);
    assert_eq!(user_emb(&["--history-actions", "like,LIKE,like"]), liked);
    assert_ne!(user_emb(&["--history-actions", "like,like,purchase"]), liked);
    for (actions, reason) in [
        ("like,purchase", "--history-actions names 2 actions for 3 history items: give one for all, or one each"),
        ("love", "it is not an action, use unspecified, view, click"),
    ] {
        let output = query(&["--history-actions", actions]);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && stderr.contains(reason), "{stderr}");
    }
}
