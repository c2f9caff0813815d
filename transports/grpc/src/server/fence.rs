//! What keeps a write that came over a lost connection from landing after one that came over the next.
//!
//! When a connection breaks, requests may still be in progress here, or unread in a socket. The client, which was told
//! that they failed, connects again and goes on. So each new connection of a client's link first shuts the gates of the
//! link's earlier ones: no write passes any more, and those that have are waited for.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use tokio::sync::{OwnedRwLockReadGuard, RwLock};
use tonic::Status;

/// The name of a client's link.
pub(crate) type LinkId = [u8; 16];

/// Through which every change goes that comes over one connection.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    shut: Arc<RwLock<bool>>,
    link: OnceLock<LinkId>,
}

/// A change that is in progress.
#[derive(Debug)]
#[must_use = "the change is over when this is dropped"]
pub(crate) struct Passing {
    _open: OwnedRwLockReadGuard<bool>,
}

impl Gate {
    /// Lets a change pass.
    ///
    /// # Errors
    /// If the gate is shut.
    pub(crate) async fn pass(&self) -> Result<Passing, Status> {
        let open = self.shut.clone().read_owned().await;
        match *open {
            true => Err(Status::unavailable("the client has connected again")),
            false => Ok(Passing { _open: open }),
        }
    }

    /// Lets no further change pass, and waits for those that have.
    async fn shut(&self) {
        *self.shut.write().await = true;
    }
}

/// The gates of all links.
#[derive(Debug, Default)]
pub(crate) struct Fences(Mutex<HashMap<LinkId, Vec<Connection>>>);

/// The number of a connection among those of its link, and its gate.
type Connection = (u64, Weak<Gate>);

impl Fences {
    /// `gate` belongs to the connection number `epoch` of a link: shuts the gates of the earlier ones, or this one if
    /// there is a later one.
    ///
    /// # Errors
    /// If the connection belongs to another link already.
    pub(crate) async fn join(&self, link: LinkId, epoch: u64, gate: &Arc<Gate>) -> Result<(), Status> {
        if *gate.link.get_or_init(|| link) != link {
            return Err(Status::invalid_argument("the connection belongs to another link"));
        }
        let others = self.others(link, epoch, gate);
        if others.iter().any(|(other, _)| *other > epoch) {
            gate.shut().await;
        }
        for (_, other) in others.iter().filter(|(other, _)| *other < epoch) {
            other.shut().await;
        }
        Ok(())
    }

    /// The living gates of a link but `gate`, which is added. Forgets dead ones.
    fn others(&self, link: LinkId, epoch: u64, gate: &Arc<Gate>) -> Vec<(u64, Arc<Gate>)> {
        let mut links = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        links.retain(|_, gates| {
            gates.retain(|(_, gate)| gate.strong_count() > 0);
            !gates.is_empty()
        });
        let gates = links.entry(link).or_default();
        gates.retain(|(_, other)| !std::ptr::eq(other.as_ptr(), Arc::as_ptr(gate)));
        let others = gates.iter().filter_map(|(epoch, gate)| Some((*epoch, gate.upgrade()?))).collect();
        gates.push((epoch, Arc::downgrade(gate)));
        others
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn the_next_connection_waits_for_changes_of_all_earlier_ones() {
        let fences = Fences::default();
        let [first, second, third] = [(); 3].map(|()| Arc::new(Gate::default()));
        fences.join([1; 16], 1, &first).await.unwrap();
        let passing = first.pass().await.unwrap();
        assert!(fences.join([1; 16], 2, &second).now_or_never().is_none(), "given up while it waited");
        let mut joining = Box::pin(fences.join([1; 16], 3, &third));
        assert!(joining.as_mut().now_or_never().is_none());
        drop(passing);
        joining.await.unwrap();
        assert!(first.pass().await.is_err() && second.pass().await.is_err());
        assert!(third.pass().await.is_ok());
    }

    #[tokio::test]
    async fn a_connection_that_comes_late_shuts_only_itself() {
        let fences = Fences::default();
        let [late, newest, other] = [(); 3].map(|()| Arc::new(Gate::default()));
        fences.join([1; 16], 2, &newest).await.unwrap();
        fences.join([1; 16], 1, &late).await.unwrap();
        fences.join([2; 16], 9, &other).await.unwrap();
        assert!(late.pass().await.is_err());
        assert!(newest.pass().await.is_ok() && other.pass().await.is_ok());
        assert!(fences.join([3; 16], 1, &other).await.is_err());
    }

    #[tokio::test]
    async fn gates_are_forgotten_with_their_connections() {
        let fences = Fences::default();
        for link in 0..10 {
            fences.join([link; 16], 1, &Arc::default()).await.unwrap();
        }
        assert_eq!(fences.0.lock().unwrap().len(), 1);
    }
}
