//! Stand-ins for dashmap's table and tokio's `watch`, built on loom's locks, for checking `flight` under all interleavings.
//!
//! They have the methods that `flight` uses, with the same meaning. One lock guards the whole table, where dashmap has one lock per
//! group of keys; for a single key this is the same. `wait_for` blocks its thread instead of suspending its task.

use loom::sync::{Mutex, MutexGuard};
use std::{collections::HashMap, hash::Hash, ops::Deref, sync::PoisonError};

#[derive(Debug)]
pub(super) struct DashMap<K, V>(Mutex<HashMap<K, V>>);

/// An entry of the table, which stays locked.
pub(super) struct OccupiedEntry<'a, K, V> {
    table: MutexGuard<'a, HashMap<K, V>>,
    key: K,
}

/// The place of a missing entry in the table, which stays locked.
pub(super) struct VacantEntry<'a, K, V> {
    table: MutexGuard<'a, HashMap<K, V>>,
    key: K,
}

pub(super) enum Entry<'a, K, V> {
    Occupied(OccupiedEntry<'a, K, V>),
    Vacant(VacantEntry<'a, K, V>),
}

impl<K, V> Default for DashMap<K, V> {
    fn default() -> Self {
        DashMap(Mutex::new(HashMap::new()))
    }
}

impl<K: Copy + Eq + Hash, V> DashMap<K, V> {
    pub(super) fn get(&self, key: &K) -> Option<OccupiedEntry<'_, K, V>> {
        match self.entry(*key) {
            Entry::Occupied(entry) => Some(entry),
            Entry::Vacant(_) => None,
        }
    }

    pub(super) fn entry(&self, key: K) -> Entry<'_, K, V> {
        let table = lock(&self.0);
        if table.contains_key(&key) {
            Entry::Occupied(OccupiedEntry { table, key })
        } else {
            Entry::Vacant(VacantEntry { table, key })
        }
    }

    pub(super) fn remove(&self, key: &K) -> Option<(K, V)> {
        self.remove_if(key, |_, _| true)
    }

    pub(super) fn remove_if(&self, key: &K, matches: impl FnOnce(&K, &V) -> bool) -> Option<(K, V)> {
        let mut table = lock(&self.0);
        if matches(key, table.get(key)?) { table.remove_entry(key) } else { None }
    }
}

impl<K: Eq + Hash, V> OccupiedEntry<'_, K, V> {
    pub(super) fn get(&self) -> &V {
        &self.table[&self.key]
    }
}

impl<K: Eq + Hash, V> Deref for OccupiedEntry<'_, K, V> {
    type Target = V;

    fn deref(&self) -> &V {
        self.get()
    }
}

impl<'a, K: Copy + Eq + Hash, V> VacantEntry<'a, K, V> {
    pub(super) fn insert(mut self, value: V) -> OccupiedEntry<'a, K, V> {
        self.table.insert(self.key, value);
        OccupiedEntry { table: self.table, key: self.key }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) mod watch {
    use super::lock;
    use loom::sync::{Condvar, Mutex, MutexGuard};
    use std::{
        ops::Deref,
        sync::{Arc, PoisonError},
    };

    #[derive(Debug)]
    struct Channel<T> {
        state: Mutex<State<T>>,
        changed: Condvar,
    }

    #[derive(Debug)]
    struct State<T> {
        value: T,
        has_sender: bool,
    }

    #[derive(Debug)]
    pub(in crate::content::flight) struct Sender<T>(Arc<Channel<T>>);

    #[derive(Debug)]
    pub(in crate::content::flight) struct Receiver<T>(Arc<Channel<T>>);

    /// The value, which stays locked.
    pub(in crate::content::flight) struct Ref<'a, T>(MutexGuard<'a, State<T>>);

    #[derive(Debug)]
    pub(in crate::content::flight) struct SenderDropped;

    pub(in crate::content::flight) fn channel<T>(value: T) -> (Sender<T>, Receiver<T>) {
        let state = Mutex::new(State { value, has_sender: true });
        let channel = Arc::new(Channel { state, changed: Condvar::new() });
        (Sender(Arc::clone(&channel)), Receiver(channel))
    }

    impl<T> Sender<T> {
        pub(in crate::content::flight) fn send_replace(&self, value: T) -> T {
            let replaced = std::mem::replace(&mut lock(&self.0.state).value, value);
            self.0.changed.notify_all();
            replaced
        }
    }

    impl<T> Drop for Sender<T> {
        fn drop(&mut self) {
            lock(&self.0.state).has_sender = false;
            self.0.changed.notify_all();
        }
    }

    impl<T> Clone for Receiver<T> {
        fn clone(&self) -> Self {
            Receiver(Arc::clone(&self.0))
        }
    }

    impl<T> Receiver<T> {
        pub(in crate::content::flight) fn has_changed(&self) -> Result<(), SenderDropped> {
            if lock(&self.0.state).has_sender { Ok(()) } else { Err(SenderDropped) }
        }

        pub(in crate::content::flight) fn borrow(&self) -> Ref<'_, T> {
            Ref(lock(&self.0.state))
        }

        pub(in crate::content::flight) async fn wait_for(
            &mut self,
            is_awaited: impl Fn(&T) -> bool,
        ) -> Result<(), SenderDropped> {
            let mut state = lock(&self.0.state);
            loop {
                if is_awaited(&state.value) {
                    return Ok(());
                }
                if !state.has_sender {
                    return Err(SenderDropped);
                }
                state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    impl<T> Deref for Ref<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            &self.0.value
        }
    }
}
