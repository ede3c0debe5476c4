//! From a leg's host to addresses. Each connection asks anew and nothing is kept: an edge that moved must be found.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hickory_resolver::Resolver;
use hickory_resolver::config::{
    LookupIpStrategy, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts,
};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;

use super::reason::{Failure, Reason};
use super::settings::{Leg, Resolve};
use crate::config::url::Target;

/// Whether there is a name to look up at all.
pub fn is_needed(leg: &Leg) -> bool {
    match leg.resolve {
        Resolve::System => leg.url.host.parse::<IpAddr>().is_err(),
        Resolve::Pinned(..) => false,
        Resolve::Https(_) => true,
    }
}

/// The leg's addresses in the order in which to try them, never none. `tls` is for the server of DNS over HTTPS.
///
/// # Errors
/// When there is none within `limit`.
pub async fn addresses(
    leg: &Leg,
    tls: &ClientConfig,
    limit: Duration,
) -> Result<Vec<SocketAddr>, Failure> {
    let url = &leg.url;
    let found = match &leg.resolve {
        Resolve::Pinned(ip, port) => {
            return Ok(vec![SocketAddr::new(*ip, port.unwrap_or(url.port))]);
        }
        Resolve::System => timeout(limit, by_system(&url.host, url.port)).await,
        Resolve::Https(server) => timeout(limit, by_https(url, server, tls, limit)).await,
    };
    let said = match found {
        Ok(Ok(addresses)) if !addresses.is_empty() => return Ok(addresses),
        Ok(Ok(_)) => "there is no address".into(),
        Ok(Err(said)) => said,
        Err(_) => format!("no answer within {limit:?}"),
    };
    let what = format!("{} by {}: {said}", url.host, leg.resolve);
    Err(Failure::new(Reason::DnsFailed, what))
}

/// The resolver does not say why it cannot reach its server, so it is tried by hand.
async fn why_unreachable(at: &[SocketAddr], server: &Target, tls: ClientConfig) -> String {
    let attempt = async {
        let stream = TcpStream::connect(at).await?;
        let name = ServerName::try_from(server.host.clone()).map_err(io::Error::other)?;
        TlsConnector::from(Arc::new(tls))
            .connect(name, stream)
            .await
    };
    match attempt.await {
        Ok(_) => "the server speaks no DNS over HTTPS that we know".into(),
        Err(error) => format!("the server cannot be reached: {error}"),
    }
}

async fn by_system(host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
    lookup_host((host, port))
        .await
        .map(Iterator::collect)
        .map_err(|error| error.to_string())
}

/// Asks over a connection of its own.
async fn by_https(
    url: &Target,
    server: &Target,
    tls: &ClientConfig,
    limit: Duration,
) -> Result<Vec<SocketAddr>, String> {
    let at = by_system(&server.host, server.port)
        .await
        .map_err(|error| format!("its own name: {error}"))?;
    let servers = at.iter().map(|address| {
        let mut one = NameServerConfig::https(
            address.ip(),
            server.host.as_str().into(),
            Some(server.path.as_str().into()),
        );
        for connection in &mut one.connections {
            connection.port = server.port;
        }
        one
    });
    let mut options = ResolverOpts::default();
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    // Split-horizon names in the hosts file are just what this is to avoid.
    options.use_hosts_file = ResolveHosts::Never;
    options.cache_size = 0;
    options.attempts = 0;
    // One of the two that hangs leaves time for the other.
    options.timeout = limit / 2;
    options.edns0 = true;
    let mut tls = tls.clone();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let resolver = Resolver::builder_with_config(
        ResolverConfig::from_name_servers(servers.collect()),
        TokioRuntimeProvider::default(),
    )
    .with_options(options)
    .with_tls_config(tls.clone())
    .build()
    .map_err(|error| error.to_string())?;
    // With a dot at its end, no search domain is added to it.
    let name = format!("{}.", url.host.trim_end_matches('.'));
    let found = match resolver.lookup_ip(name).await {
        Ok(found) => found,
        Err(error) if error.is_nx_domain() => return Err("there is no such name".into()),
        Err(error) if error.is_no_records_found() => return Err("there is no address".into()),
        Err(NetError::NoConnections) => return Err(why_unreachable(&at, server, tls).await),
        Err(error) => return Err(error.to_string()),
    };
    let mut addresses: Vec<SocketAddr> = found
        .iter()
        .map(|ip| SocketAddr::new(ip, url.port))
        .collect();
    addresses.sort_by_key(SocketAddr::is_ipv6);
    Ok(addresses)
}
