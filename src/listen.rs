//! Places to listen at: TCP addresses, and Unix sockets with their mode and group.

use std::fs::Permissions;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Group};
use pingora::listeners::{L4BufferSettings, ListenerConfig, TcpSocketOptions};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};

use crate::config::{Dispatch, Listen};
use crate::forward::keepalive;

/// Read buffer of a client's connection: none. It is of use under TLS; here it would copy what comes once more, and every idle
/// WebSocket would keep one.
const READ_BUFFER: usize = 0;

/// Write buffer of a client's connection: [`crate::unsent`] is one.
const WRITE_BUFFER: usize = 0;

/// Why one cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// An address is not ours to listen on.
    #[error("{key}: cannot listen on {address}: {error}")]
    Address {
        /// The setting that names the address.
        key: &'static str,
        /// The address.
        address: Listen,
        /// What the system said.
        error: io::Error,
    },
    /// There is no such group.
    #[error("dispatch.listen_group: there is no group {0:?} on this machine")]
    NoGroup(String),
    /// A socket that is listened on has no file any more.
    #[error("dispatch.listen: {}: {error}; a restart makes it anew", path.display())]
    Gone {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A socket cannot be given to its group.
    #[error(
        "dispatch.listen_group: {} cannot be given to the group: {error}; the service's user must be a member of it",
        path.display()
    )]
    Group {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

/// Who may connect to the Unix sockets among the places.
#[derive(Debug, Clone, Copy)]
pub struct Access {
    mode: u32,
    group: Option<Gid>,
}

impl Access {
    /// As the settings say.
    ///
    /// # Errors
    /// When the group does not exist.
    pub fn new(settings: &Dispatch) -> Result<Access, ListenError> {
        let find = |name: &String| match Group::from_name(name) {
            Ok(Some(group)) => Ok(group.gid),
            _ => Err(ListenError::NoGroup(name.clone())),
        };
        Ok(Access {
            mode: settings.listen_mode,
            group: settings.listen_group.as_ref().map(find).transpose()?,
        })
    }

    /// Gives the sockets to their group. Until then it is the service's own.
    ///
    /// # Errors
    /// When the system does not let us, or a socket that was handed over has no file any more, so that nobody can connect.
    pub fn grant(&self, places: &[Listen]) -> Result<(), ListenError> {
        for place in places {
            if let Listen::Unix(path) = place {
                std::fs::symlink_metadata(path).map_err(|error| ListenError::Gone {
                    path: path.clone(),
                    error,
                })?;
                self.give(path)?;
            }
        }
        Ok(())
    }

    fn give(&self, path: &Path) -> Result<(), ListenError> {
        let Some(group) = self.group else {
            return Ok(());
        };
        chown(path, None, Some(group.as_raw())).map_err(|error| ListenError::Group {
            path: path.to_owned(),
            error,
        })
    }
}

/// The name under which Pingora hands a listening socket over.
pub fn key(place: &Listen) -> String {
    match place {
        Listen::Tcp(address) => address.to_string(),
        Listen::Unix(path) => path.display().to_string(),
    }
}

/// Whether what has this key is free to be listened at.
///
/// # Errors
/// When it is not.
pub fn is_free(key: &str) -> io::Result<()> {
    if key.starts_with('/') {
        try_socket(Path::new(key))
    } else {
        let address = key.parse().map_err(io::Error::other)?;
        try_address(address)
    }
}

/// A place as Pingora is told of it.
pub fn endpoint(place: &Listen, access: &Access) -> ListenerConfig {
    let config = match place {
        Listen::Tcp(_) => {
            let mut options = TcpSocketOptions::default();
            options.tcp_keepalive = Some(keepalive());
            ListenerConfig::tcp(key(place)).tcp_socket_options(options)
        }
        Listen::Unix(_) => {
            ListenerConfig::uds(key(place)).permissions(Permissions::from_mode(access.mode))
        }
    };
    let buffers = L4BufferSettings::default().read(READ_BUFFER);
    config.l4_buffer(buffers.write(WRITE_BUFFER))
}

/// Finds out whether all places can be listened at. Pingora retries for half a minute and then panics; the operator
/// deserves a sentence.
///
/// # Errors
/// The first that cannot.
pub fn try_all(settings: &Dispatch, access: &Access) -> Result<(), ListenError> {
    let places = settings.listen.iter().cloned();
    let places = places.map(|place| ("dispatch.listen", place));
    let admin = ("dispatch.admin", Listen::Tcp(settings.admin));
    for (key, address) in places.chain([admin]) {
        let tried = match &address {
            Listen::Tcp(address) => try_address(*address),
            Listen::Unix(path) => try_socket(path),
        };
        if let Err(error) = tried {
            return Err(ListenError::Address {
                key,
                address,
                error,
            });
        }
        if let Listen::Unix(path) = &address {
            let trial = path.with_file_name(format!(".{}", std::process::id()));
            let given = UnixListener::bind(&trial)
                .map_err(|error| ListenError::Address {
                    key,
                    address: address.clone(),
                    error,
                })
                .and_then(|_| access.give(&trial));
            let _ = std::fs::remove_file(&trial);
            given?;
        }
    }
    Ok(())
}

/// Whether an address can be taken. It is not listened on for that: whoever connected meanwhile would be cut off.
fn try_address(address: SocketAddr) -> io::Result<()> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    Ok(bind(&socket, &address)?)
}

/// Whether a socket can be made there. Pingora removes what is in the way.
fn try_socket(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(file) if !file.file_type().is_socket() => Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "there is something else than a socket",
        )),
        Ok(_) if UnixStream::connect(path).is_ok() => Err(io::ErrorKind::AddrInUse.into()),
        Ok(_) => Ok(()),
    }
}
