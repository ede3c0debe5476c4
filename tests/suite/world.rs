//! The usual surroundings of a test: alice's instance speaks 0.0.33, bob's 0.0.24.

use std::path::Path;

use tempfile::TempDir;

use crate::common::dispatcher::{Dispatcher, Setup};
use crate::common::instance::{Instance, Version};
use crate::common::mint;

pub struct World {
    pub dispatcher: Dispatcher,
    pub alice: Instance,
    pub bob: Instance,
    pub base: TempDir,
}

impl World {
    pub async fn new() -> World {
        World::with(|setup| setup).await
    }

    /// A world whose settings differ.
    pub async fn with(change: impl FnOnce(Setup) -> Setup) -> World {
        let base = TempDir::new().unwrap();
        let alice = Instance::start(&mint::home(base.path(), "alice"), Version::V0_0_33).await;
        let bob = Instance::start(&mint::home(base.path(), "bob"), Version::V0_0_24).await;
        let setup = Setup::new(base.path(), mint::working(base.path()))
            .user("alice", "alice", alice.port())
            .user("bob", "bob", bob.port());
        let dispatcher = change(setup).start().await;
        World {
            dispatcher,
            alice,
            bob,
            base,
        }
    }

    pub fn base(&self) -> &Path {
        self.base.path()
    }

    /// Mints for alice so far.
    pub fn mints(&self) -> usize {
        mint::count(self.base(), "alice")
    }
}

/// The headers of a request of `user`'s, with their cookie, as the edge sends it.
pub fn from<'a>(user: &'a str, cookie: &'a str) -> [(&'a str, &'a str); 2] {
    [("X-authentik-username", user), ("Cookie", cookie)]
}
