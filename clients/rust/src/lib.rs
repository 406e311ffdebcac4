//! Follows an access token of a [Token Broker](https://github.com/tokenbroker/tokenbroker), from each to its successor.
//!
//! ```no_run
//! use token_broker_client::{Config, TokenSource};
//!
//! # async fn example() -> Result<(), token_broker_client::Error> {
//! let source = TokenSource::new(Config::new("invoices"))?;
//! let token = source.token().await?; // a look into memory, but for the first time
//! println!("{token:?} ends at {:?}", token.expire_time); // shows its id only
//! # Ok(())
//! # }
//! ```

#[rustfmt::skip]
#[allow(clippy::all, unreachable_pub, dead_code)]
#[path = "tokenbroker.v1.rs"]
mod v1;

mod connection;
mod error;
mod retry;
mod source;
mod token;

pub use connection::{Config, Job};
pub use error::Error;
pub use http::HeaderValue;
pub use source::TokenSource;
pub use token::Token;
pub use tonic::Code;
