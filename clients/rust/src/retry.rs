use std::{
    hash::{BuildHasher, RandomState},
    sync::Mutex,
    time::Duration,
};

use serde_json::Value;
use tonic::{Code, Response, Status};

/// The retry policy of the service config, for unary calls that fail with UNAVAILABLE; tonic reads no service config.
pub(crate) struct Retry {
    timeout: Duration,
    attempts: u64,
    first: Duration,
    longest: Duration,
    factor: f64,
    most: f64,
    ratio: f64,
    /// From 0 to most: a failure takes one, a success gives ratio back. No retry with half of them or less.
    tokens: Mutex<f64>,
}

impl Retry {
    pub(crate) fn new() -> Retry {
        let config: Value =
            serde_json::from_str(include_str!("../service_config.json")).expect("the service config is JSON");
        let method = &config["methodConfig"][0];
        let (policy, throttling) = (&method["retryPolicy"], &config["retryThrottling"]);
        let number = |v: &Value| v.as_f64().expect("a number in the service config");
        let seconds = |v: &Value| {
            let text = v.as_str().and_then(|s| s.strip_suffix('s'));
            Duration::from_secs_f64(text.and_then(|s| s.parse().ok()).expect("seconds in the service config"))
        };
        Retry {
            timeout: seconds(&method["timeout"]),
            attempts: number(&policy["maxAttempts"]) as u64,
            first: seconds(&policy["initialBackoff"]),
            longest: seconds(&policy["maxBackoff"]),
            factor: number(&policy["backoffMultiplier"]),
            most: number(&throttling["maxTokens"]),
            ratio: number(&throttling["tokenRatio"]),
            tokens: Mutex::new(number(&throttling["maxTokens"])),
        }
    }

    /// Makes a call, and makes it again as the policy says.
    pub(crate) async fn unary<R, F>(&self, call: impl Fn() -> F) -> Result<R, Status>
    where
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let attempts = async {
            for attempt in 1.. {
                let status = match call().await {
                    Ok(response) => {
                        self.count(self.ratio);
                        return Ok(response.into_inner());
                    }
                    Err(status) => settled(status),
                };
                if status.code() != Code::Unavailable || !self.count(-1.0) || attempt >= self.attempts {
                    return Err(status);
                }
                let wait = match status.metadata().get("grpc-retry-pushback-ms").map(|ms| ms.to_str().ok()?.parse().ok()) {
                    None => self
                        .longest
                        .min(self.first.mul_f64(self.factor.powi(attempt as i32 - 1)))
                        .mul_f64(0.8 + 0.4 * random()),
                    Some(Some(ms)) => Duration::from_millis(ms),
                    Some(None) => return Err(status), // the server wants no retry
                };
                tokio::time::sleep(wait).await;
            }
            unreachable!()
        };
        let late = |_| Err(Status::deadline_exceeded(format!("no answer within {:?}", self.timeout)));
        tokio::time::timeout(self.timeout, attempts).await.unwrap_or_else(late)
    }

    /// Counts a success or a failure, and tells whether a retry is allowed after it.
    fn count(&self, change: f64) -> bool {
        let mut tokens = self.tokens.lock().expect("nothing panics with it");
        *tokens = (*tokens + change).clamp(0.0, self.most);
        *tokens > self.most / 2.0
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
}
