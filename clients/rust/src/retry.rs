use std::{
    hash::{BuildHasher, RandomState},
    sync::Mutex,
    time::Duration,
};

use tonic::{Code, Response, Status};

// What service_config.json says; tonic reads none.
const TIMEOUT: Duration = Duration::from_secs(40);
const ATTEMPTS: u32 = 4;
const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(2);
const MOST: f64 = 10.0;
const RATIO: f64 = 0.1;

/// Unary calls that fail with UNAVAILABLE are tried again. It has from 0 to MOST tokens: a failure takes one, a success gives
/// RATIO back. No retry with half of them or less.
pub(crate) struct Retry(Mutex<f64>);

impl Retry {
    pub(crate) fn new() -> Retry {
        Retry(Mutex::new(MOST))
    }

    /// Makes a call, and makes it again as the policy says.
    pub(crate) async fn unary<R, F>(&self, call: impl Fn() -> F) -> Result<R, Status>
    where
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let attempts = async {
            for attempt in 0.. {
                let status = match call().await {
                    Ok(response) => {
                        self.count(RATIO);
                        return Ok(response.into_inner());
                    }
                    Err(status) => settled(status),
                };
                if status.code() != Code::Unavailable || !self.count(-1.0) || attempt + 1 == ATTEMPTS {
                    return Err(status);
                }
                let wait = match status.metadata().get("grpc-retry-pushback-ms").map(|ms| ms.to_str().ok()?.parse().ok()) {
                    None => LONGEST.min(FIRST * 2u32.pow(attempt)).mul_f64(0.8 + 0.4 * random()),
                    Some(Some(ms)) => Duration::from_millis(ms),
                    Some(None) => return Err(status), // the server wants no retry
                };
                tokio::time::sleep(wait).await;
            }
            unreachable!()
        };
        let late = |_| Err(Status::deadline_exceeded(format!("no answer within {TIMEOUT:?}")));
        tokio::time::timeout(TIMEOUT, attempts).await.unwrap_or_else(late)
    }

    /// Counts a success or a failure, and tells whether a retry is allowed after it.
    fn count(&self, change: f64) -> bool {
        let mut tokens = self.0.lock().expect("nothing panics with it");
        *tokens = (*tokens + change).clamp(0.0, MOST);
        *tokens > MOST / 2.0
    }
}

/// A call that the connection has broken is UNKNOWN to tonic, and UNAVAILABLE to all other stacks.
pub(crate) fn settled(status: Status) -> Status {
    match std::error::Error::source(&status) {
        Some(cause) if status.code() == Code::Unknown => Status::unavailable(format!("{}: {cause}", status.message())),
        _ => status,
    }
}

/// From 0 to 1, seeded by the system.
pub(crate) fn random() -> f64 {
    RandomState::new().hash_one(()) as f64 / u64::MAX as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn failing<'a>(
        calls: &'a Cell<u32>,
        status: impl Fn() -> Status + 'a,
    ) -> impl Fn() -> std::future::Ready<Result<Response<()>, Status>> + 'a {
        move || {
            calls.set(calls.get() + 1);
            std::future::ready(Err(status()))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn only_unavailable_is_tried_four_times_and_not_when_all_fails() {
        let retry = Retry::new();
        let calls = Cell::new(0);
        retry.unary(failing(&calls, || Status::resource_exhausted(""))).await.unwrap_err();
        assert_eq!(calls.take(), 1);
        retry.unary(failing(&calls, || Status::unavailable(""))).await.unwrap_err();
        assert_eq!(calls.take(), 4);
        retry.unary(failing(&calls, || Status::unavailable(""))).await.unwrap_err();
        assert_eq!(calls.take(), 1, "half of the throttle's tokens are gone");
    }

    #[tokio::test(start_paused = true)]
    async fn the_server_says_when_or_never() {
        for (pushback, want) in [("250", 4), ("-1", 1)] {
            let (retry, calls, began) = (Retry::new(), Cell::new(0), tokio::time::Instant::now());
            let status = || {
                let mut status = Status::unavailable("");
                status.metadata_mut().insert("grpc-retry-pushback-ms", pushback.parse().unwrap());
                status
            };
            retry.unary(failing(&calls, status)).await.unwrap_err();
            assert_eq!(calls.get(), want);
            assert_eq!(began.elapsed(), Duration::from_millis(250) * (want - 1));
        }
    }

    #[test]
    fn it_is_what_the_service_config_says() {
        let config: serde_json::Value = serde_json::from_str(include_str!("../service_config.json")).unwrap();
        let (method, throttling) = (&config["methodConfig"][0], &config["retryThrottling"]);
        let mut policy = method["retryPolicy"].clone();
        policy["timeout"] = method["timeout"].clone();
        let seconds = |d: Duration| format!("{}s", d.as_secs_f64());
        assert_eq!(*throttling, serde_json::json!({"maxTokens": MOST as u32, "tokenRatio": RATIO}));
        let want = serde_json::json!({"maxAttempts": ATTEMPTS, "initialBackoff": seconds(FIRST), "maxBackoff": seconds(LONGEST),
            "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"], "timeout": seconds(TIMEOUT)});
        assert_eq!(policy, want);
    }
}
