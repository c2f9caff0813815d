//! A place where calls wait until the test lets them go.

use std::sync::Arc;

use tokio::sync::watch;

/// Holds calls, so that a test can arrange a race: wait until a call is inside, do something else, let it go. Cloning
/// gives another handle. A call that is dropped while it is held is held no longer.
#[derive(Debug, Clone, Default)]
pub struct Pause(Arc<watch::Sender<State>>);

#[derive(Debug, Default)]
struct State {
    held: usize,
    tickets: usize,
    open: bool,
}

impl Pause {
    /// A place that holds every call that comes.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits until at least `calls` are held.
    pub async fn wait_held(&self, calls: usize) {
        self.wait_for(|state| state.held >= calls).await;
    }

    /// How many calls are held now.
    #[must_use]
    pub fn held(&self) -> usize {
        self.0.borrow().held
    }

    /// Lets go all that are held, and all that come.
    pub fn release(&self) {
        self.0.send_modify(|state| state.open = true);
    }

    /// Lets `calls` go, of those that are held or come.
    pub fn let_go(&self, calls: usize) {
        self.0.send_modify(|state| state.tickets += calls);
    }

    /// Holds again what comes from now on.
    pub fn hold(&self) {
        self.0.send_modify(|state| *state = State { held: state.held, ..State::default() });
    }

    pub(super) async fn pass(&self) {
        self.0.send_modify(|state| state.held += 1);
        let _held = Held(self);
        loop {
            self.wait_for(|state| state.open || state.tickets > 0).await;
            if self.0.send_if_modified(State::leave) {
                return;
            }
        }
    }

    async fn wait_for(&self, what: impl FnMut(&State) -> bool) {
        let waited = self.0.subscribe().wait_for(what).await.map(|_| ());
        waited.expect("the sender lives as long as we do");
    }
}

impl State {
    fn leave(&mut self) -> bool {
        let leaves = self.open || self.tickets > 0;
        if !self.open {
            self.tickets = self.tickets.saturating_sub(1);
        }
        leaves
    }
}

struct Held<'a>(&'a Pause);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.0.send_modify(|state| state.held -= 1);
    }
}
