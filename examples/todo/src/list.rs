//! A to-do list in an arena: items that point to one another.

use anyhow::{Context, Result};
use zerocopy::byteorder::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::arena::{Arena, At};

/// Where the list begins.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Root {
    first: At<Item>,
    last: At<Item>,
    /// The number of the last item that was added.
    number: U64,
    /// How many there are.
    count: U64,
}

/// Something to do.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Item {
    number: U64,
    next: At<Item>,
    text: At<u8>,
    text_len: U64,
    done: u8,
}

/// The list.
pub(crate) struct List<'a> {
    arena: Arena<'a>,
    root: At<Root>,
}

impl<'a> List<'a> {
    /// Takes a region that has a list, or nothing but zeros.
    pub(crate) fn open(bytes: &'a mut [u8]) -> Result<Self> {
        let (arena, root) = Arena::open(bytes)?;
        Ok(Self { arena, root })
    }

    /// Adds something to do; its number.
    pub(crate) fn add(&mut self, text: &str) -> Result<u64> {
        let number = self.arena.get(self.root)?.number.get() + 1;
        let at = self.arena.put_text(text)?;
        let (next, text_len) = (At::NOTHING, U64::new(text.len() as u64));
        let item = self.arena.put(Item { number: number.into(), next, text: at, text_len, done: 0 })?;
        match self.arena.get(self.root)?.last.some() {
            Some(last) => self.arena.get_mut(last)?.next = item,
            None => self.arena.get_mut(self.root)?.first = item,
        }
        let root = self.arena.get_mut(self.root)?;
        (root.last, root.number, root.count) = (item, number.into(), (root.count.get() + 1).into());
        Ok(number)
    }

    /// It is done.
    pub(crate) fn done(&mut self, number: u64) -> Result<()> {
        let (_, at) = self.find(number)?;
        self.arena.get_mut(at)?.done = 1;
        Ok(())
    }

    /// Takes it off the list.
    pub(crate) fn remove(&mut self, number: u64) -> Result<()> {
        let (before, at) = self.find(number)?;
        let item = *self.arena.get(at)?;
        match before {
            Some(before) => self.arena.get_mut(before)?.next = item.next,
            None => self.arena.get_mut(self.root)?.first = item.next,
        }
        let root = self.arena.get_mut(self.root)?;
        root.count = (root.count.get() - 1).into();
        if item.next.some().is_none() {
            root.last = before.unwrap_or(At::NOTHING);
        }
        self.arena.drop_text(item.text, item.text_len.get())?;
        self.arena.drop_at(at)
    }

    /// A line for each, in the order in which they were added.
    pub(crate) fn lines(&self) -> Result<Vec<String>> {
        self.items().map(|found| found.and_then(|(_, at)| self.line(at))).collect()
    }

    fn line(&self, at: At<Item>) -> Result<String> {
        let item = self.arena.get(at)?;
        let text = self.arena.text(item.text, item.text_len.get())?;
        let mark = if item.done == 0 { ' ' } else { 'x' };
        Ok(format!("[{mark}] {} {}", item.number, String::from_utf8_lossy(text)))
    }

    /// The item with that number, and the one before it.
    fn find(&self, number: u64) -> Result<(Option<At<Item>>, At<Item>)> {
        let of_that_number = |found: &Result<(Option<At<Item>>, At<Item>)>| {
            let number_at = |at| self.arena.get(at).is_ok_and(|item: &Item| item.number.get() == number);
            found.as_ref().map_or(true, |(_, at)| number_at(*at))
        };
        self.items().find(of_that_number).with_context(|| format!("there is no number {number}"))?
    }

    /// All items, each with the one before it. No more than there are, so that a damaged list does not lead around in
    /// circles.
    fn items(&self) -> impl Iterator<Item = Result<(Option<At<Item>>, At<Item>)>> + '_ {
        let root = self.arena.get(self.root);
        let count = root.as_ref().map_or(0, |root| root.count.get());
        let mut next = root.map_or(At::NOTHING, |root| root.first);
        let mut before = None;
        (0..count).map(move |_| {
            let at = next.some().context("the list is damaged")?;
            let found = (before, at);
            (before, next) = (Some(at), self.arena.get(at)?.next);
            Ok(found)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_what_was_done_to_it() {
        let mut bytes = vec![0; 1 << 16];
        let mut list = List::open(&mut bytes).unwrap();
        for (number, text) in (1..).zip(["one", "two", "three", "four"]) {
            assert_eq!(list.add(text).unwrap(), number);
        }
        list.done(2).unwrap();
        for number in [1, 4, 3] {
            list.remove(number).unwrap();
        }
        assert_eq!(list.add("five").unwrap(), 5);
        for gone in [0, 1, 6] {
            assert!(list.done(gone).is_err() && list.remove(gone).is_err());
        }
        // It is in the bytes, and nowhere else.
        let mut elsewhere = bytes.clone();
        assert_eq!(List::open(&mut elsewhere).unwrap().lines().unwrap(), ["[x] 2 two", "[ ] 5 five"]);
        let mut list = List::open(&mut bytes).unwrap();
        [5, 2].iter().for_each(|number| list.remove(*number).unwrap());
        assert!(list.lines().unwrap().is_empty());
        assert_eq!(list.add("six").unwrap(), 6);
        assert_eq!(list.lines().unwrap(), ["[ ] 6 six"]);
    }
}
