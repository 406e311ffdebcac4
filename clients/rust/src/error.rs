use std::{collections::HashMap, fmt, time::Duration};

use tonic::{Code, Status};
use tonic_types::StatusExt;

/// Why there is no token. Programs act on the reason, people read the message.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Error {
    /// The canonical code.
    pub code: Code,
    /// One of the broker's reasons, such as `CALLER_DENIED`; empty if the error is not the broker's.
    pub reason: String,
    /// What the broker adds, such as `profile` and `request_id`.
    pub metadata: HashMap<String, String>,
    /// How long to wait before asking again; none if waiting does not help.
    pub retry_after: Option<Duration>,
    message: String,
}

impl Error {
    pub(crate) fn new(code: Code, message: String) -> Error {
        Error { code, reason: String::new(), metadata: HashMap::new(), retry_after: None, message }
    }

    /// Reads the status, and its details, of a call that failed while doing something.
    pub(crate) fn of(doing: &str, status: &Status) -> Error {
        let info = status.get_details_error_info().filter(|info| info.domain == "tokenbroker.v1");
        let (reason, metadata) = info.map(|info| (info.reason, info.metadata)).unwrap_or_default();
        let kind = if reason.is_empty() { format!("{:?}", status.code()) } else { reason.clone() };
        Error {
            code: status.code(),
            message: format!("{doing}: {} ({kind})", status.message()),
            reason,
            metadata,
            retry_after: status.get_details_retry_info().and_then(|info| info.retry_delay),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
