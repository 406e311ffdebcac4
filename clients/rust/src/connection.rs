use std::{
    env, fs, io,
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream, lookup_host},
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    },
};
use tonic::{
    Code, Request, Status,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};
use tower::service_fn;

use crate::Error;

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

/// A unit of batch work.
#[derive(Clone, Debug)]
pub struct Job {
    pub id: String,
    /// Asks for a token of the job's own.
    pub dedicated: bool,
}

impl Config {
    /// All that a profile allows, at the broker that the environment names.
    pub fn new(profile: impl Into<String>) -> Config {
        let file = |name| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        Config {
            profile: profile.into(),
            scopes: Vec::new(),
            min_lifetime: Duration::ZERO,
            job: None,
            address: env::var("BROKER_ADDRESS").unwrap_or_else(|_| "127.0.0.1:7443".into()),
            ca: file("BROKER_CA"),
            certificate: file("BROKER_CERTIFICATE"),
            private_key: file("BROKER_PRIVATE_KEY"),
            token_file: file("BROKER_TOKEN_FILE"),
        }
    }

    fn host(&self) -> &str {
        let host = self.address.rsplit_once(':').map_or(&*self.address, |(host, _)| host);
        host.trim_start_matches('[').trim_end_matches(']')
    }

    /// Tells whether TLS is not needed: nothing asks for it, and the broker is on this machine.
    fn plain(&self) -> bool {
        let host = self.host();
        let local = self.address.starts_with("unix:")
            || host == "localhost"
            || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        local && self.ca.is_none() && self.certificate.is_none() && self.private_key.is_none()
    }

    /// Reads the files.
    fn tls(&self) -> Result<ClientConfig, Box<dyn std::error::Error + Send + Sync>> {
        let read = |path: &PathBuf, e: &dyn std::fmt::Display| format!("reading {}: {e}", path.display());
        let certificates = |path: &PathBuf| {
            let all = CertificateDer::pem_file_iter(path)
                .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                .map_err(|e| read(path, &e))?;
            if all.is_empty() { Err(read(path, &"no certificate")) } else { Ok(all) }
        };
        let mut roots = RootCertStore::empty();
        match &self.ca {
            Some(path) => certificates(path)?.into_iter().try_for_each(|c| roots.add(c)).map_err(|e| read(path, &e))?,
            None => drop(roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs)),
        }
        let config = ClientConfig::builder_with_provider(ring::default_provider().into())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots);
        let mut config = match (&self.certificate, &self.private_key) {
            (Some(certificate), Some(key)) => config
                .with_client_auth_cert(
                    certificates(certificate)?,
                    PrivateKeyDer::from_pem_file(key).map_err(|e| read(key, &e))?,
                )
                .map_err(|e| read(certificate, &e))?,
            (None, None) => config.with_no_client_auth(),
            _ => return Err("certificate and private_key go together".into()),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Makes channels to one broker.
pub(crate) struct Connector {
    config: Arc<Config>,
    endpoint: Endpoint,
    /// Which address of the broker's name is next: connections go round.
    next: Arc<AtomicUsize>,
}

impl Connector {
    /// Checks all that can be wrong before a connection is made.
    pub(crate) fn new(config: Arc<Config>) -> Result<Connector, Error> {
        let wrong = |e: &dyn std::fmt::Display| Error::new(Code::InvalidArgument, format!("broker {}: {e}", config.address));
        if !config.plain() {
            config.tls().map_err(|e| wrong(&e))?;
        }
        let unix = config.address.starts_with("unix:");
        let authority = if unix { "localhost" } else { &config.address };
        // TLS is the connector's: the scheme that the endpoint has keeps tonic, should it be built with TLS, from adding more.
        let scheme = if config.plain() { "http" } else { "https" };
        let endpoint = Endpoint::try_from(format!("http://{authority}")).map_err(|e| wrong(&e))?;
        let origin = format!("{scheme}://{authority}").parse().map_err(|e| wrong(&e))?;
        let endpoint = endpoint
            .origin(origin)
            .user_agent("token-broker-client-rust")
            .map_err(|e| wrong(&e))?
            .connect_timeout(Duration::from_secs(10))
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(10));
        Ok(Connector { endpoint, next: Arc::new(AtomicUsize::new((crate::retry::random() * 1e6) as usize)), config })
    }

    /// Opens a channel. It connects when it is used, and again when the connection is lost.
    pub(crate) fn open(&self) -> Channel {
        let (config, next) = (self.config.clone(), self.next.clone());
        self.endpoint.connect_with_connector_lazy(service_fn(move |_| connect(config.clone(), next.clone())))
    }

    /// Makes a request of a message, with the bearer token if there is one.
    pub(crate) fn request<T>(&self, message: T) -> Result<Request<T>, Status> {
        let mut request = Request::new(message);
        if let Some(path) = &self.config.token_file {
            let refused = |e: &dyn std::fmt::Display| Status::unauthenticated(format!("reading {}: {e}", path.display()));
            let token = fs::read_to_string(path).map_err(|e| refused(&e))?;
            let mut value =
                MetadataValue::try_from(format!("Bearer {}", token.trim())).map_err(|_| refused(&"not a token"))?;
            value.set_sensitive(true);
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }
}

async fn connect(
    config: Arc<Config>,
    next: Arc<AtomicUsize>,
) -> Result<TokioIo<Box<dyn Io>>, Box<dyn std::error::Error + Send + Sync>> {
    let stream: Box<dyn Io> = match config.address.strip_prefix("unix:") {
        Some(path) => Box::new(UnixStream::connect(path.strip_prefix("//").unwrap_or(path)).await?),
        None => Box::new(dial(&config.address, next.fetch_add(1, Ordering::Relaxed)).await?),
    };
    if config.plain() {
        return Ok(TokioIo::new(stream));
    }
    let host = if config.address.starts_with("unix:") { "localhost" } else { config.host() };
    let connector = TlsConnector::from(Arc::new(config.tls()?));
    let stream = connector.connect(ServerName::try_from(host.to_owned())?, stream).await?;
    if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
        return Err("the server does not speak HTTP/2 over TLS".into());
    }
    Ok(TokioIo::new(Box::new(stream)))
}

/// Tries the addresses of a name, beginning with another one each time.
async fn dial(address: &str, first: usize) -> io::Result<TcpStream> {
    let mut addresses: Vec<_> = lookup_host(address).await?.collect();
    let n = addresses.len().max(1);
    addresses.rotate_left(first % n);
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for one in addresses {
        match TcpStream::connect(one).await {
            Ok(stream) => return stream.set_nodelay(true).map(|()| stream),
            Err(e) => failed = e,
        }
    }
    Err(failed)
}
