use std::{
    fmt,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use http::HeaderValue;
use tokio::{
    sync::{Mutex as AsyncMutex, watch},
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tonic::{Code, Status};

use crate::{
    Config, Error, Job, Token,
    connection::Good,
    retry::{Retry, random, settled},
    v1,
};

const PATIENCE: Duration = Duration::from_secs(40);
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// How long a stream must have stood for its end to be no sign of trouble.
const STEADY: Duration = Duration::from_secs(10);
/// How long a report that failed holds off the next, at least.
const QUIET: Duration = Duration::from_secs(10);
/// A broker that has no streams is not asked more often.
const OFTEN: Duration = Duration::from_secs(1);

/// Follows one token of the broker, from each to its successor.
///
/// Its first use connects; from then on asking for the token is a look into memory, and goes on working while the broker is
/// away and the token is good. A clone is the same source. The last one that is dropped ends the stream and the connection.
#[derive(Clone)]
pub struct TokenSource(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
    follower: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        if let Some(follower) = self.follower.get_mut().expect("nothing panics with it") {
            follower.abort();
        }
    }
}

/// What the source, the task that follows and those that report have in common.
struct Shared {
    config: Config,
    request: v1::WatchTokenRequest,
    good: Good,
    retry: Retry,
    state: watch::Sender<State>,
    /// Held while a report is made; has until when none is, and what those who wait until then are told.
    report: AsyncMutex<Option<(Instant, Option<Error>)>>,
}

#[derive(Clone)]
struct State {
    token: Option<Arc<Token>>,
    /// How many attempts have failed, and how the last one did; none after one that brought a token.
    failures: u64,
    failure: Option<Error>,
    /// When the next attempt is due.
    again: Instant,
    /// From then on it waits for somebody who asks.
    parked: bool,
    /// The id of the token that was reported.
    replaced: String,
}

impl State {
    fn good(&self) -> bool {
        self.token.as_ref().is_some_and(|t| t.good())
    }
}

impl TokenSource {
    /// Makes a source. It connects when it is used. Fails if a file is missing or damaged.
    pub fn new(config: Config) -> Result<TokenSource, Error> {
        let good = Good::default();
        config.check(&good)?;
        let (again, replaced) = (Instant::now(), String::new());
        let state = State { token: None, failures: 0, failure: None, again, parked: false, replaced };
        let shared = Arc::new(Shared {
            request: v1::WatchTokenRequest {
                profile: config.profile.clone(),
                scopes: config.scopes.clone(),
                min_lifetime: config.min_lifetime.try_into().ok(),
                job: config.job.clone().map(|Job { id, dedicated }| v1::Job { id, dedicated }),
            },
            config,
            good,
            retry: Retry::new(),
            state: watch::Sender::new(state),
            report: AsyncMutex::default(),
        });
        Ok(TokenSource(Arc::new(Handle { shared, follower: Mutex::default() })))
    }

    /// Returns the token, and waits for it up to 40 seconds if none is at hand.
    pub async fn token(&self) -> Result<Arc<Token>, Error> {
        self.token_within(PATIENCE).await
    }

    /// Returns the token, and waits for it if none is at hand. Fails with the broker's error, or DEADLINE_EXCEEDED.
    pub async fn token_within(&self, patience: Duration) -> Result<Arc<Token>, Error> {
        let shared = &self.0.shared;
        {
            let state = shared.state.borrow();
            if let (Some(token), false) = (&state.token, state.parked)
                && token.good()
            {
                return Ok(token.clone());
            }
        }
        self.follow();
        let mut states = shared.state.subscribe();
        let mut before = None;
        shared.state.send_if_modified(|state| {
            let left = state.again.saturating_duration_since(Instant::now());
            let asked = state.parked && left.is_zero();
            state.parked &= !asked;
            // If the next attempt is too far away, the last failure is the answer.
            let stands = state.parked || left > patience;
            before = Some(state.failures).filter(|_| !stands);
            asked
        });
        let done = |state: &State| state.good() || state.failure.is_some() && Some(state.failures) != before;
        let _ = timeout(patience, states.wait_for(done)).await;
        let state = shared.state.borrow();
        match (&state.token, &state.failure) {
            (Some(token), _) if token.good() => Ok(token.clone()),
            (_, Some(failure)) => Err(failure.clone()),
            _ => Err(Error::new(
                Code::DeadlineExceeded,
                format!("{}: no good token has come within {patience:?}", shared.doing()),
            )),
        }
    }

    /// Reports that a resource server has answered 401 to a token: to the broker once, however many report the same.
    /// Returns the successor, or none if the token is so young that another one would hardly fare better.
    pub async fn rejected(&self, rejected: &Token) -> Result<Option<Arc<Token>>, Error> {
        let (shared, id, young) = (self.0.shared.clone(), rejected.id.to_owned(), rejected.young());
        if let Some(other) = shared.other_than(&id) {
            return Ok(Some(other));
        }
        // It is everybody's: it does not end with who was first.
        let report = tokio::spawn(async move { shared.report(&id, young).await });
        report.await.unwrap_or_else(|e| Err(Error::new(Code::Cancelled, format!("reporting a token: {e}"))))
    }

    /// Makes a request with the token. If its answer is a 401 the token is reported, and the request made once more with the
    /// successor, if there is one; then the answer is the caller's whatever it is.
    ///
    /// `request` gets the value of the header `authorization`, and makes the body anew each time; where that cannot be, use
    /// [`token`](Self::token) and [`rejected`](Self::rejected). `refused` says whether an answer is a 401. With reqwest:
    ///
    /// ```ignore
    /// let answer = source
    ///     .send(|authorization| client.get(url).header(AUTHORIZATION, authorization).send(),
    ///           |answer| answer.as_ref().is_ok_and(|a| a.status() == 401))
    ///     .await??;
    /// ```
    pub async fn send<R, F>(&self, request: impl Fn(HeaderValue) -> F, refused: impl Fn(&R) -> bool) -> Result<R, Error>
    where
        F: Future<Output = R>,
    {
        let token = self.token().await?;
        let answer = request(token.authorization()).await;
        if refused(&answer)
            && let Ok(Some(successor)) = self.rejected(&token).await
        {
            return Ok(request(successor.authorization()).await);
        }
        Ok(answer)
    }

    /// Starts the task that follows the token, if it is not there.
    fn follow(&self) {
        let mut follower = self.0.follower.lock().expect("nothing panics with it");
        if follower.as_ref().is_none_or(JoinHandle::is_finished) {
            let shared = self.0.shared.clone();
            *follower = Some(tokio::spawn(async move { shared.follow().await }));
        }
    }
}

impl fmt::Debug for TokenSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenSource").field("config", &self.0.shared.config).finish_non_exhaustive()
    }
}

impl Shared {
    fn doing(&self) -> String {
        format!("watching the token of profile {}", self.config.profile)
    }

    fn take(&self, token: Token) {
        self.state.send_if_modified(|state| {
            // A replica that has not heard of a report may still send what was reported.
            let other = token.id != state.replaced;
            if other {
                (state.token, state.failure) = (Some(token.into()), None);
            }
            other
        });
    }

    fn other_than(&self, id: &str) -> Option<Arc<Token>> {
        self.state.borrow().token.clone().filter(|t| t.id != id && t.good())
    }

    /// Attempts, each with a stream, for as long as the source is there.
    async fn follow(&self) {
        let mut tries = 0;
        loop {
            let (began, mut brought) = (Instant::now(), false);
            let outcome = self.attempt(&mut brought).await;
            let stood = brought && began.elapsed() >= STEADY;
            if stood || outcome.is_ok() {
                tries = 0;
            }
            match outcome {
                Ok(()) => sleep(self.refresh_due().unwrap_or_default().max(OFTEN)).await,
                Err(e) if stood && !is_final(e.code) && e.retry_after.is_none() => {}
                Err(e) => {
                    let wait = back_off(tries).max(e.retry_after.unwrap_or_default());
                    tries += 1;
                    self.rest(e, wait).await;
                }
            }
        }
    }

    /// In how long the successor of the token at hand is due; none if it has been, or there is no token.
    fn refresh_due(&self) -> Option<Duration> {
        self.state.borrow().token.as_ref()?.refresh_time.duration_since(SystemTime::now()).ok()
    }

    /// Returns how the stream ended, or nothing if there are no streams and a call has brought the token.
    async fn attempt(&self, brought: &mut bool) -> Result<(), Error> {
        let status = match self.watch(brought).await {
            Ok(()) => Status::unavailable("the stream has ended"),
            Err(status) => settled(status),
        };
        if status.code() != Code::Unimplemented {
            return Err(Error::of(&self.doing(), &status));
        }
        let issued = self.retry.unary(|| async {
            let v1::WatchTokenRequest { profile, scopes, min_lifetime, job } = self.request.clone();
            let request = v1::IssueTokenRequest { profile, scopes, min_lifetime, job };
            self.config.connect(&self.good).await?.issue_token(self.config.request(request)?).await
        });
        let doing = |status| Error::of(&format!("requesting a token for profile {}", self.config.profile), &status);
        self.take(issued.await.and_then(|r| r.token.try_into()).map_err(doing)?);
        Ok(())
    }

    async fn watch(&self, brought: &mut bool) -> Result<(), Status> {
        let request = self.config.request(self.request.clone())?;
        let mut stream = self.config.connect(&self.good).await?.watch_token(request).await?.into_inner();
        while let Some(next) = stream.message().await? {
            self.take(next.token.try_into()?);
            *brought = true;
        }
        Ok(())
    }

    /// Waits before the next attempt, and tells who waits for a token how the last one ended.
    async fn rest(&self, e: Error, wait: Duration) {
        let parked = is_final(e.code);
        self.state.send_modify(|state| {
            if e.reason == "JOB_ENDED" {
                state.token = None; // it was revoked
            }
            state.failures = state.failures.wrapping_add(1);
            (state.failure, state.again, state.parked) = (Some(e), Instant::now() + wait, parked);
        });
        sleep(wait).await;
        if parked {
            let mut states = self.state.subscribe();
            let asked = states.wait_for(|state| !state.parked);
            match self.refresh_due() {
                Some(due) => drop(timeout(due, asked).await),
                None => drop(asked.await),
            }
            self.state.send_modify(|state| state.parked = false);
        }
    }

    async fn report(&self, id: &str, young: bool) -> Result<Option<Arc<Token>>, Error> {
        let mut hold = self.report.lock().await;
        if let Some(other) = self.other_than(id) {
            return Ok(Some(other));
        }
        match &*hold {
            Some((until, told)) if Instant::now() < *until => return told.clone().map_or(Ok(None), Err),
            _ if young => return Ok(None),
            _ => {}
        }
        let refreshed = self.retry.unary(|| async {
            let v1::WatchTokenRequest { profile, scopes, min_lifetime, job } = self.request.clone();
            let request = v1::RefreshTokenRequest { profile, scopes, min_lifetime, job, rejected_token_id: id.to_owned() };
            self.config.connect(&self.good).await?.refresh_token(self.config.request(request)?).await
        });
        match refreshed.await.and_then(|r| Token::try_from(r.token)) {
            Ok(successor) => {
                self.state.send_modify(|state| state.replaced = id.to_owned());
                if self.other_than(id).is_none() {
                    // else the stream was faster
                    self.take(successor);
                }
                Ok(self.other_than(id))
            }
            Err(status) => {
                let e = Error::of(&format!("reporting token {id} of profile {}", self.config.profile), &status);
                let told = Some(e.clone()).filter(|e| e.reason != "REFRESH_TOO_SOON");
                *hold = Some((Instant::now() + e.retry_after.unwrap_or_default().max(QUIET), told.clone()));
                told.map_or(Ok(None), Err)
            }
        }
    }
}

/// Tells whether coming back at once is of no use.
fn is_final(code: Code) -> bool {
    matches!(code, Code::InvalidArgument | Code::PermissionDenied | Code::Unauthenticated | Code::FailedPrecondition)
}

fn back_off(attempt: u32) -> Duration {
    let whole = LONGEST_WAIT.min(FIRST_WAIT * 2u32.pow(attempt.min(10)));
    whole.mul_f64(0.5 + 0.5 * random())
}
