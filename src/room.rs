//! How many connections there may be: in all, and for each address that may not name people.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often it is told that there is no room.
const TELL_AGAIN: Duration = Duration::from_secs(60);

/// Room for connections.
#[derive(Debug)]
pub struct Room {
    most: usize,
    most_each: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    strangers: usize,
    each: HashMap<IpAddr, usize>,
    /// When it was told last that there is no room.
    told: Option<Instant>,
}

/// There is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full {
    /// Whether it is worth a line in the log: people are turned away, and that has not just been told.
    pub tell: bool,
}

impl Room {
    /// Room for `most` connections, and for `most_each` of one stranger's address.
    pub fn new(most: usize, most_each: usize) -> Arc<Room> {
        Arc::new(Room {
            most,
            most_each,
            taken: Mutex::default(),
        })
    }

    /// Connections that there are.
    pub fn taken(&self) -> usize {
        self.lock().all
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a connection. `stranger` is its address where that may not name people.
    ///
    /// # Errors
    /// When there is none.
    pub fn enter(self: &Arc<Room>, stranger: Option<IpAddr>) -> Result<Place, Full> {
        let stranger = stranger.map(network);
        let mut taken = self.lock();
        let full = taken.all >= self.most;
        if let Some(ip) = stranger {
            // Half of the room is kept for the edge, whoever else pushes in.
            let crowded = taken.strangers >= self.most / 2;
            let of_this = taken.each.get(&ip).copied().unwrap_or(0);
            if full || crowded || of_this >= self.most_each {
                return Err(Full { tell: false });
            }
            taken.strangers += 1;
            taken.each.insert(ip, of_this + 1);
        } else if full {
            let tell = taken.told.is_none_or(|at| at.elapsed() > TELL_AGAIN);
            if tell {
                taken.told = Some(Instant::now());
            }
            return Err(Full { tell });
        }
        taken.all += 1;
        Ok(Place {
            room: self.clone(),
            stranger,
        })
    }
}

/// A place for a connection, given back when dropped.
#[derive(Debug)]
pub struct Place {
    room: Arc<Room>,
    stranger: Option<IpAddr>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.room.lock();
        taken.all -= 1;
        let Some(ip) = self.stranger else { return };
        taken.strangers -= 1;
        if let Some(count) = taken.each.get_mut(&ip) {
            *count -= 1;
            if *count == 0 {
                taken.each.remove(&ip);
            }
        }
    }
}

/// What counts as one address: a household with IPv6 has 2^64 of them.
pub(crate) fn network(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into(),
        ip => ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_so_many_places_and_gets_them_back() {
        let room = Room::new(100, 2);
        let mallory = Some("192.0.2.1".parse().unwrap());
        let first = room.enter(mallory).unwrap();
        let _second = room.enter(mallory).unwrap();
        assert!(room.enter(mallory).is_err());
        assert!(room.enter(Some("192.0.2.2".parse().unwrap())).is_ok());
        drop(first);
        assert!(room.enter(mallory).is_ok());
        let edge: Vec<_> = (0..90).map(|_| room.enter(None).unwrap()).collect();
        drop(edge);
        let taken = room.lock();
        assert_eq!((taken.all, taken.strangers, taken.each.len()), (1, 1, 1));
    }

    #[test]
    fn half_of_the_room_is_the_edges() {
        let room = Room::new(8, 100);
        let stranger = |last: u8| Some(IpAddr::from([192, 0, 2, last]));
        let _strangers: Vec<_> = (0..4).map(|i| room.enter(stranger(i)).unwrap()).collect();
        assert!(room.enter(stranger(9)).is_err());
        let _edge: Vec<_> = (0..4).map(|_| room.enter(None).unwrap()).collect();
        assert_eq!(room.enter(None).err(), Some(Full { tell: true }));
        assert_eq!(room.enter(None).err(), Some(Full { tell: false }));
    }

    #[test]
    fn one_household_is_one_address() {
        let network = |ip: &str| super::network(ip.parse().unwrap()).to_string();
        assert_eq!(network("192.0.2.1"), "192.0.2.1");
        assert_eq!(network("::ffff:192.0.2.1"), "192.0.2.1");
        assert_eq!(network("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
    }
}
