//! What the source does at a real broker, over mTLS. The tests share the stage: one at a time.

mod stage;

use std::{
    fs,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::{Duration, Instant, SystemTime},
};

use stage::{calls, get, post, until};
use token_broker_client::{Code, Config, Job, Token, TokenSource};
use tokio::{sync::Barrier, task::JoinSet};

fn invoices() -> TokenSource {
    TokenSource::new(Config::new("invoices")).unwrap()
}

async fn id(source: &TokenSource) -> String {
    source.token().await.unwrap().id.to_owned()
}

/// Asks for some time: the token at hand is good enough for everybody.
async fn stays(source: &TokenSource, id: &str) {
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(500) {
        assert_eq!(source.token_within(Duration::ZERO).await.unwrap().id, id);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_million_tokens_are_one_call() {
    let (watched, source) = (get("/calls").await, invoices());
    let first = id(&source).await;
    let began = Instant::now();
    for _ in 0..1_000_000 {
        assert_eq!(source.token().await.unwrap().id, first);
    }
    println!("1,000,000 tokens in {:?}", began.elapsed());
    let now = get("/calls").await;
    let new = |method: &str| now[method].as_u64().unwrap_or(0) - watched[method].as_u64().unwrap_or(0);
    assert_eq!([new("WatchToken"), new("IssueToken"), new("RefreshToken")], [1, 0, 0]);
}

#[tokio::test]
async fn asked_at_once_by_many_it_makes_one_call() {
    let (watched, source) = (calls("WatchToken").await, invoices());
    let mut asks = JoinSet::new();
    for _ in 0..100 {
        let source = source.clone();
        asks.spawn(async move { id(&source).await });
    }
    let ids = asks.join_all().await;
    assert!(ids.iter().all(|id| *id == ids[0]));
    assert_eq!(calls("WatchToken").await - watched, 1);
}

#[tokio::test]
async fn a_successor_arrives() {
    let source = invoices();
    let first = id(&source).await;
    assert_eq!(post("/revoke").await["token_id"], first);
    until("a successor", async || id(&source).await != first).await;
}

#[tokio::test]
async fn the_broker_goes_away_and_comes_back() {
    let source = invoices();
    for end in ["/broker/stop", "/broker/kill"] {
        let first = id(&source).await;
        post(end).await;
        stays(&source, &first).await;
        let nobody = invoices().token().await.unwrap_err();
        assert_eq!(nobody.code, Code::Unavailable, "{nobody}");
        post("/broker/start").await; // with nothing in its memory
        until("the token of the new broker", async || id(&source).await != first).await;
        let second = id(&source).await;
        post("/revoke").await;
        until("a successor from the new broker", async || id(&source).await != second).await;
    }
}

#[tokio::test]
async fn a_new_certificate_is_used() {
    let source = invoices();
    let first = id(&source).await;
    let seen = get("/callers").await.as_array().unwrap().len();
    post("/broker/stop").await;
    post("/certificate?as=worker2").await;
    post("/broker/start").await; // with nothing in its memory
    until("the token of the new broker", async || source.token_within(Duration::ZERO).await.unwrap().id != first).await;
    post("/broker/stop").await; // a stream has its line in the audit log when it ends
    let callers = get("/callers").await;
    assert!(callers.as_array().unwrap()[seen..].contains(&"spiffe://clients.test/worker2".into()), "{callers}");
    post("/certificate?as=worker").await;
    post("/broker/start").await;
}

#[tokio::test]
async fn files_that_were_good_are_used_while_they_are_not() {
    let certificate = std::env::var("BROKER_CERTIFICATE").unwrap();
    let ca = format!("{certificate}.ca");
    fs::copy(std::env::var("BROKER_CA").unwrap(), &ca).unwrap();
    let config = Config { ca: Some((&ca).into()), ..Config::new("invoices") };
    let source = TokenSource::new(config.clone()).unwrap();
    id(&source).await;
    let was = (fs::read(&certificate).unwrap(), fs::read(&ca).unwrap());
    for spoil in ["missing", "half written", "no authority", "of another pair"] {
        post("/broker/stop").await;
        match spoil {
            "missing" => fs::remove_file(&certificate).unwrap(),
            "half written" => fs::write(&certificate, &was.0[..was.0.len() - 40]).unwrap(),
            "no authority" => fs::write(&ca, "").unwrap(),
            _ => {
                post("/certificate?as=worker2").await;
                fs::write(&certificate, &was.0).unwrap();
            }
        }
        let e = TokenSource::new(config.clone()).unwrap_err();
        let file = if spoil == "no authority" { &ca } else { &certificate };
        assert!(e.code == Code::InvalidArgument && e.to_string().contains(file), "{spoil}: {e}");
        let watched = calls("WatchToken").await;
        post("/broker/start").await;
        until(spoil, async || calls("WatchToken").await > watched).await;
        fs::write(&certificate, &was.0).unwrap();
        fs::write(&ca, &was.1).unwrap();
    }
    post("/certificate?as=worker").await;
}

#[tokio::test]
async fn a_denied_profile_is_not_hammered() {
    let (watched, source) = (calls("WatchToken").await, TokenSource::new(Config::new("secret")).unwrap());
    let began = Instant::now();
    for _ in 0..1000 {
        let e = source.token().await.unwrap_err();
        assert_eq!((e.code, &*e.reason, e.retry_after), (Code::PermissionDenied, "CALLER_DENIED", None));
        assert_eq!(e.metadata["profile"], "secret");
        assert_eq!(e.metadata["caller"], "spiffe://clients.test/worker");
    }
    // The first wait is 50 ms or more, and the next ones are longer.
    let most = 1 + began.elapsed().as_millis() as u64 / 50;
    assert!(began.elapsed() < Duration::from_secs(5), "1000 errors took {:?}", began.elapsed());
    let made = calls("WatchToken").await - watched;
    assert!(made <= most.min(6), "{made} calls, want at most {most}");
    until("it tries again when asked after the wait", async || {
        let _ = source.token().await;
        calls("WatchToken").await - watched > made
    })
    .await;
}

#[tokio::test]
async fn a_throttled_profile_waits_as_told() {
    let (watched, source) = (calls("WatchToken").await, TokenSource::new(Config::new("throttled")).unwrap());
    let began = Instant::now();
    for patience in [Duration::from_secs(20), Duration::from_secs(20), Duration::from_millis(300)] {
        let e = source.token_within(patience).await.unwrap_err();
        assert_eq!((e.code, &*e.reason), (Code::ResourceExhausted, "ENDPOINT_THROTTLED"), "{e}");
        let wait = e.retry_after.unwrap();
        assert!(wait > Duration::from_secs(20) && wait <= Duration::from_secs(33), "retry after {wait:?}");
    }
    assert_eq!(calls("WatchToken").await - watched, 1);
    assert!(began.elapsed() < Duration::from_secs(15), "it waits in vain");
}

#[tokio::test]
async fn the_token_of_a_job_that_has_ended_is_of_no_use() {
    let job = Some(Job { id: "nightly".into(), dedicated: true });
    let source = TokenSource::new(Config { job, ..Config::new("invoices") }).unwrap();
    let token = id(&source).await;
    assert_eq!(post("/revoke?job=nightly").await["token_id"], token);
    until("an error", async || source.token().await.is_err_and(|e| e.reason == "JOB_ENDED")).await;
}

#[tokio::test]
async fn a_right_that_is_withdrawn_leaves_the_token() {
    let (watched, source) = (calls("WatchToken").await, invoices());
    let first = id(&source).await;
    post("/policy?allow=false").await;
    until("the source is denied", async || {
        assert_eq!(source.token_within(Duration::ZERO).await.unwrap().id, first);
        calls("WatchToken").await - watched > 2
    })
    .await;
    assert_eq!(invoices().token().await.unwrap_err().reason, "CALLER_DENIED");
    assert_eq!(id(&source).await, first);
    post("/policy?allow=true").await;
    post("/revoke").await;
    until("the source follows again", async || id(&source).await != first).await;
}

/// Sends 20 requests at once; each waits with its first one for the others. Returns the statuses and the tokens' ids.
async fn twenty(source: &TokenSource) -> Vec<(u16, String)> {
    let (together, asked) = (std::sync::Arc::new(Barrier::new(20)), std::sync::Arc::new(AtomicUsize::new(0)));
    let mut requests = JoinSet::new();
    for _ in 0..20 {
        let (source, together, asked) = (source.clone(), together.clone(), asked.clone());
        requests.spawn(async move {
            let post = async |authorization: token_broker_client::HeaderValue| {
                if asked.fetch_add(1, Relaxed) < 20 {
                    together.wait().await;
                }
                stage::request("POST", "/resource", authorization.to_str().unwrap(), "some body").await
            };
            let (status, answer) = source.send(post, |(status, _)| *status == 401).await.unwrap();
            assert_eq!(answer["body_length"], 9);
            (status, answer["token_id"].as_str().unwrap().to_owned())
        });
    }
    requests.join_all().await
}

/// Returns what has happened since, as [RefreshToken, accepted, refused].
async fn since(before: [u64; 3]) -> [u64; 3] {
    let resource = get("/resource/calls").await;
    let count = |name: &str| resource[name].as_u64().unwrap();
    let now = [calls("RefreshToken").await, count("accepted"), count("refused")];
    [now[0] - before[0], now[1] - before[1], now[2] - before[2]]
}

/// Waits until the broker takes a report of the token.
async fn grown_up(source: &TokenSource) -> std::sync::Arc<Token> {
    let token = source.token().await.unwrap();
    until("the token is 10 s old", async || SystemTime::now() > token.issue_time + Duration::from_millis(10_200)).await;
    source.token().await.unwrap()
}

#[tokio::test]
async fn a_refused_token_is_reported_once() {
    let [source, other] = ["report1", "report2"].map(|profile| TokenSource::new(Config::new(profile)).unwrap());
    other.token().await.unwrap();
    let old = grown_up(&source).await;
    twenty(&source).await;
    post("/resource/refuse?tokens=seen").await;
    let before = since([0; 3]).await;
    let answers = twenty(&source).await;
    assert!(answers.iter().all(|(status, id)| *status == 200 && *id != old.id), "{answers:?}");
    assert_eq!(since(before).await, [1, 20, 20]);
    let at_hand = source.rejected(&old).await.unwrap().unwrap();
    assert_eq!(at_hand.id, answers[0].1, "an old report gets the token at hand");
    assert_eq!(since(before).await, [1, 20, 20]);

    post("/resource/refuse?tokens=all").await;
    let before = since([0; 3]).await;
    assert!(twenty(&source).await.iter().all(|(status, _)| *status == 401));
    assert_eq!(since(before).await, [0, 0, 20], "a young token is not reported");

    grown_up(&other).await;
    assert!(twenty(&other).await.iter().all(|(status, _)| *status == 401));
    assert_eq!(since(before).await, [1, 0, 60], "one report, two requests each");
    post("/resource/refuse?tokens=none").await;
}

#[tokio::test]
async fn dropped_it_leaves_nothing() {
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let sockets = || {
        let files = fs::read_dir("/proc/self/fd").unwrap().flatten();
        files.filter(|f| fs::read_link(f.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"))).count()
    };
    let before = (tasks(), sockets());
    for _ in 0..20 {
        let source = invoices();
        id(&source).await;
        assert!(tasks() > before.0);
    }
    until("all tasks and connections are gone", async || (tasks(), sockets()) == before).await;
}

#[tokio::test]
async fn nothing_shows_the_token() {
    let source = invoices();
    let token = source.token().await.unwrap();
    let shown = format!("{token:?} {:?} {source:?} {:?}", token.authorization(), source.rejected(&token).await);
    assert!(!shown.contains(token.access_token()) && shown.contains(&token.id), "{shown}");
    assert!(token.authorization().to_str().unwrap().ends_with(token.access_token()));
}
