use std::{
    fmt,
    time::{Duration, SystemTime},
};

use http::HeaderValue;
use tonic::Status;

use crate::v1;

/// An access token. It hides itself: its Debug shows the id, which is safe to log.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// The first 16 hexadecimal digits of its SHA-256.
    pub id: String,
    /// How to present it, usually `Bearer`.
    pub token_type: String,
    /// When it was asked for.
    pub issue_time: SystemTime,
    /// When its successor is due.
    pub refresh_time: SystemTime,
    /// When it ends.
    pub expire_time: SystemTime,
    /// What it allows.
    pub scopes: Vec<String>,
    access_token: String,
    authorization: HeaderValue,
}

impl Token {
    /// The secret, to be sent as it is.
    pub fn access_token(&self) -> &str {
        &self.access_token
    }

    /// The value of the header `authorization`, marked as sensitive.
    pub fn authorization(&self) -> HeaderValue {
        self.authorization.clone()
    }

    /// Tells whether it is good: not within 10 seconds of its end, or a tenth of its life if that is less.
    pub(crate) fn good(&self) -> bool {
        let life = self.expire_time.duration_since(self.issue_time).unwrap_or_default();
        SystemTime::now() + (life / 10).min(Duration::from_secs(10)) < self.expire_time
    }

    /// Tells whether the broker would call a report of it too soon.
    pub(crate) fn young(&self) -> bool {
        SystemTime::now() < self.issue_time + Duration::from_secs(10)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("id", &self.id).field("expire_time", &self.expire_time).finish_non_exhaustive()
    }
}

impl TryFrom<Option<v1::Token>> for Token {
    type Error = Status;

    fn try_from(t: Option<v1::Token>) -> Result<Token, Status> {
        let unfit = |what: &str| Status::internal(format!("the broker's answer has no usable {what}"));
        let t = t.ok_or_else(|| unfit("token"))?;
        let time = |t: Option<prost_types::Timestamp>, what| t.and_then(|t| t.try_into().ok()).ok_or_else(|| unfit(what));
        let mut authorization =
            HeaderValue::try_from(format!("{} {}", t.token_type, t.access_token)).map_err(|_| unfit("access_token"))?;
        authorization.set_sensitive(true);
        Ok(Token {
            issue_time: time(t.issue_time, "issue_time")?,
            refresh_time: time(t.refresh_time, "refresh_time")?,
            expire_time: time(t.expire_time, "expire_time")?,
            access_token: t.access_token,
            token_type: t.token_type,
            authorization,
            id: t.id,
            scopes: t.scopes,
        })
    }
}

/// The message hides it, too.
impl fmt::Debug for v1::Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("id", &self.id).finish_non_exhaustive()
    }
}
