use std::{
    env,
    fmt::Display,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use tokio::net::lookup_host;
use tonic::{
    Code, Request, Status,
    metadata::MetadataValue,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use crate::{Error, retry::random, v1::token_broker_client::TokenBrokerClient};

/// A connection that is silent this long is asked for a sign of life, which has to come within PATIENCE.
const SILENCE: Duration = Duration::from_secs(30);
const PATIENCE: Duration = Duration::from_secs(10);

/// What to follow, and where. `Config { scopes: vec!["read".into()], ..Config::new("invoices") }` changes some of it.
#[derive(Clone, Debug)]
pub struct Config {
    /// The profile's name.
    pub profile: String,
    /// Some of the profile's scopes. Default: empty, all of them.
    pub scopes: Vec<String>,
    /// How long each token must still live when it comes. Default: zero, valid is enough.
    pub min_lifetime: Duration,
    /// The job on whose behalf the token is needed. Default: none.
    pub job: Option<Job>,
    /// The broker: `host:port`, or `unix:/path`. Default: `BROKER_ADDRESS`, or `127.0.0.1:7443`.
    pub address: String,
    /// Certificates that the broker's is checked against, a PEM file. Default: `BROKER_CA`, or the system's.
    pub ca: Option<PathBuf>,
    /// The client certificate, a PEM file, read for each connection. Default: `BROKER_CERTIFICATE`, or none.
    pub certificate: Option<PathBuf>,
    /// Its private key, a PEM file, read for each connection. Default: `BROKER_PRIVATE_KEY`, or none.
    pub private_key: Option<PathBuf>,
    /// A file with a bearer token that says who calls, read for each call. Default: `BROKER_TOKEN_FILE`, or none.
    pub token_file: Option<PathBuf>,
}

/// What the files of TLS held when they last were good.
pub(crate) type Good = Mutex<Option<ClientTlsConfig>>;

/// A unit of batch work.
#[derive(Clone, Debug)]
pub struct Job {
    /// The same for a retry of the same work.
    pub id: String,
    /// Asks for a token of the job's own.
    pub dedicated: bool,
}

impl Config {
    /// All that a profile allows, at the broker that the environment names.
    pub fn new(profile: impl Into<String>) -> Config {
        let set = |name| env::var_os(name).filter(|v| !v.is_empty());
        let file = |name| set(name).map(PathBuf::from);
        Config {
            profile: profile.into(),
            scopes: Vec::new(),
            min_lifetime: Duration::ZERO,
            job: None,
            address: set("BROKER_ADDRESS").map_or("127.0.0.1:7443".into(), |a| a.to_string_lossy().into()),
            ca: file("BROKER_CA"),
            certificate: file("BROKER_CERTIFICATE"),
            private_key: file("BROKER_PRIVATE_KEY"),
            token_file: file("BROKER_TOKEN_FILE"),
        }
    }

    /// Checks all that can be wrong before a connection is made.
    pub(crate) fn check(&self, good: &Good) -> Result<(), Error> {
        self.endpoint(&self.address, good).map(drop).map_err(|e| Error::new(Code::InvalidArgument, e))
    }

    /// Makes a connection with the files as they are now or last were good, to any of the addresses that the broker's name has.
    pub(crate) async fn connect(&self, good: &Good) -> Result<TokenBrokerClient<Channel>, Status> {
        let failed = |e: &dyn Display| Status::unavailable(format!("connecting to {}: {e}", self.address));
        let mut addresses = vec![self.address.clone()];
        if !self.unix() {
            addresses = lookup_host(&self.address).await.map_err(|e| failed(&e))?.map(|a| a.to_string()).collect();
            let first = (addresses.len() as f64 * random()) as usize;
            addresses.rotate_left(first);
        }
        let mut status = failed(&"the name has no address");
        for address in addresses {
            match self.endpoint(&address, good).map_err(|e| failed(&e))?.connect().await {
                Ok(channel) => return Ok(TokenBrokerClient::new(channel)),
                Err(e) => status = failed(&chain(&e)),
            }
        }
        Err(status)
    }

    /// Makes a request of a message, with the bearer token if there is one.
    pub(crate) fn request<T>(&self, message: T) -> Result<Request<T>, Status> {
        let mut request = Request::new(message);
        if let Some(path) = &self.token_file {
            // Somebody may be replacing it.
            let failed = |e: &dyn Display| Status::unavailable(format!("reading {}: {e}", path.display()));
            let text = fs::read_to_string(path).map_err(|e| failed(&e))?;
            let token = text.strip_suffix('\n').unwrap_or(&text);
            let token = token.strip_suffix('\r').unwrap_or(token);
            let sound = !token.is_empty() && token.bytes().all(|b| b.is_ascii_graphic());
            let value = Some(format!("Bearer {token}")).filter(|_| sound).and_then(|v| MetadataValue::try_from(v).ok());
            let mut value = value.ok_or_else(|| failed(&"it does not hold one token and nothing else"))?;
            value.set_sensitive(true);
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }

    fn unix(&self) -> bool {
        self.address.starts_with("unix:")
    }

    /// How an address of the broker is reached.
    fn endpoint(&self, address: &str, good: &Good) -> Result<Endpoint, String> {
        let host = self.address.rsplit_once(':').map_or(&*self.address, |(host, _)| host).trim_matches(['[', ']']);
        let local =
            self.unix() || host.eq_ignore_ascii_case("localhost") || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        let plain = local && self.ca.is_none() && self.certificate.is_none() && self.private_key.is_none();
        let scheme = if plain { "http" } else { "https" };
        let uri = |address: &str| if self.unix() { address.into() } else { format!("{scheme}://{address}") };
        let wrong = |e: &dyn std::error::Error| format!("{}: {}", self.address, chain(e));
        let mut endpoint = Endpoint::from_shared(uri(address)).map_err(|e| wrong(&e))?;
        if !self.unix() {
            endpoint = endpoint.origin(uri(&self.address).parse().map_err(|e| wrong(&e))?);
        }
        if !plain {
            let with = |tls: &ClientTlsConfig| {
                endpoint
                    .clone()
                    .tls_config(tls.clone().domain_name(host))
                    .map_err(|e| format!("{}: {}", self.files(), chain(&e)))
            };
            let mut good = good.lock().expect("nothing panics with it");
            let fresh = self.tls().and_then(|tls| Ok((with(&tls)?, tls)));
            endpoint = match (fresh, &*good) {
                (Ok((endpoint, tls)), _) => {
                    *good = Some(tls);
                    endpoint
                }
                (Err(_), Some(tls)) => with(tls)?,
                (Err(e), None) => return Err(e),
            };
        }
        let endpoint = endpoint.user_agent("token-broker-client-rust").map_err(|e| wrong(&e))?;
        Ok(endpoint.connect_timeout(PATIENCE).http2_keep_alive_interval(SILENCE).keep_alive_timeout(PATIENCE))
    }

    /// The files of TLS, for people.
    fn files(&self) -> String {
        let paths = [&self.ca, &self.certificate, &self.private_key].into_iter().flatten();
        paths.map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
    }

    fn tls(&self) -> Result<ClientTlsConfig, String> {
        let read = |path: &Path| {
            let pem = fs::read(path).map_err(|e| format!("reading {}: {e}", path.display()))?;
            let count = |edge: &[u8]| pem.windows(edge.len()).filter(|w| *w == edge).count();
            let whole = count(b"-----BEGIN ") > 0 && count(b"-----BEGIN ") == count(b"-----END ");
            if whole { Ok(pem) } else { Err(format!("{} is not a whole PEM file", path.display())) }
        };
        let tls = match &self.ca {
            Some(path) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(path)?)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        match (&self.certificate, &self.private_key) {
            (Some(certificate), Some(key)) => Ok(tls.identity(Identity::from_pem(read(certificate)?, read(key)?))),
            (None, None) => Ok(tls),
            _ => Err("certificate and private_key go together".into()),
        }
    }
}

/// An error with its causes.
fn chain(e: &dyn std::error::Error) -> String {
    e.source().map_or(e.to_string(), |cause| format!("{e}: {}", chain(cause)))
}
