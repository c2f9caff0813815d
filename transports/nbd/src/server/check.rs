//! Which requests are refused before anything is received or done for them (proto.md, "Request types" and "Error
//! values").

use crate::server::export::Served;
use crate::wire::{Command, CommandFlags, Errno, Framing, Request};

/// What was agreed on for a connection.
pub(crate) struct Terms {
    pub(crate) framing: Framing,
    /// Whether `base:allocation` was selected for the export.
    pub(crate) allocation: bool,
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) errno: Errno,
    pub(crate) reason: String,
}

impl Refusal {
    pub(crate) fn new(errno: Errno, reason: impl Into<String>) -> Self {
        Self { errno, reason: reason.into() }
    }
}

/// The flags that a command may have. `FUA` is fine everywhere, as some clients set it on everything.
fn known_flags(command: Command, terms: &Terms) -> CommandFlags {
    use CommandFlags as Flags;
    let extended = terms.framing == Framing::Extended;
    let own = match command {
        Command::Read if terms.framing >= Framing::Structured => Flags::DF,
        Command::Write if extended => Flags::PAYLOAD_LEN,
        Command::WriteZeroes => Flags::NO_HOLE | Flags::FAST_ZERO,
        Command::BlockStatus if extended => Flags::REQ_ONE | Flags::PAYLOAD_LEN,
        Command::BlockStatus => Flags::REQ_ONE,
        _ => Flags::empty(),
    };
    own | Flags::FUA
}

/// Checks a request against its export and what was agreed on. A `BLOCK_STATUS` with a payload has its length in there,
/// which is checked by [`check_range`] when it has arrived.
pub(crate) fn check(request: &Request, export: &Served, terms: &Terms) -> Result<(), Refusal> {
    let Request { flags, command, .. } = *request;
    let invalid = |reason: &str| Err(Refusal::new(Errno::Inval, reason));
    if let Command::Unknown(code) = command {
        return Err(Refusal::new(Errno::Inval, format!("unknown command {code}")));
    }
    let unknown = flags.difference(known_flags(command, terms));
    if !unknown.is_empty() {
        return Err(Refusal::new(Errno::Inval, format!("flags {:#x} do not go with this command", unknown.bits())));
    }
    let has_payload = request.payload_len(terms.framing) > 0;
    match command {
        Command::Flush if (request.offset, request.length) != (0, 0) => return invalid("a flush takes no range"),
        Command::Trim if !export.trims && !export.read_only => return invalid("the export cannot trim"),
        Command::BlockStatus if !terms.allocation => return invalid("no metadata context was selected"),
        Command::BlockStatus if has_payload => return check_status_payload(request, export),
        _ => {}
    }
    let changes = matches!(command, Command::Write | Command::Trim | Command::WriteZeroes);
    if changes && export.read_only {
        return Err(Refusal::new(Errno::Perm, "the export is read-only"));
    }
    check_range(command, request.offset, request.length, export)?;
    check_length(request, export, terms)
}

fn check_status_payload(request: &Request, export: &Served) -> Result<(), Refusal> {
    match request.length {
        ..=4096 if request.offset <= export.size => Ok(()),
        ..=4096 => Err(Refusal::new(Errno::Inval, "past the end of the export")),
        _ => Err(Refusal::new(Errno::Inval, "too many metadata contexts")),
    }
}

/// Checks that a range lies inside the export.
pub(crate) fn check_range(command: Command, offset: u64, length: u64, export: &Served) -> Result<(), Refusal> {
    if offset.checked_add(length).is_some_and(|end| end <= export.size) {
        return match (command, length) {
            (Command::BlockStatus, 0) => Err(Refusal::new(Errno::Inval, "no bytes have no status")),
            _ => Ok(()),
        };
    }
    let errno = match command {
        Command::Write | Command::WriteZeroes => Errno::NoSpc,
        _ => Errno::Inval,
    };
    Err(Refusal::new(errno, format!("past the end of the export, which has {} bytes", export.size)))
}

fn check_length(request: &Request, export: &Served, terms: &Terms) -> Result<(), Refusal> {
    let limit = export.sizes.maximum;
    if request.length <= u64::from(limit) {
        return Ok(());
    }
    let errno = match request.command {
        Command::Read if terms.framing >= Framing::Structured => Errno::Overflow,
        Command::Read | Command::Write => Errno::Inval,
        _ => return Ok(()),
    };
    Err(Refusal::new(errno, format!("longer than {limit} bytes; split it")))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use r3map_testkit::store::Store;

    use super::*;
    use crate::server::export::ServerExport;

    const SIZE: u64 = 10_000;
    const MAX: u32 = 4096;

    fn served(store: Store) -> Served {
        Served::new(ServerExport::new("", Arc::new(store)), MAX).unwrap()
    }

    fn outcome(
        store: Store,
        framing: Framing,
        command: Command,
        flags: CommandFlags,
        range: (u64, u64),
    ) -> Option<Errno> {
        let terms = Terms { framing, allocation: framing >= Framing::Structured };
        let request = Request { flags, command, cookie: 0, offset: range.0, length: range.1 };
        check(&request, &served(store), &terms).err().map(|refusal| refusal.errno)
    }

    #[test]
    fn commands_that_cannot_be_are_refused_as_the_protocol_says() {
        use Command::{BlockStatus, Cache, Flush, Read, Trim, Unknown, Write, WriteZeroes};
        let none = CommandFlags::empty();
        for (framing, command, flags, range, errno) in [
            (Framing::Simple, Read, none, (0, 4096), None),
            (Framing::Simple, Read, CommandFlags::FUA, (SIZE, 0), None),
            (Framing::Simple, Read, none, (SIZE - 1, 2), Some(Errno::Inval)),
            (Framing::Simple, Read, none, (u64::MAX, 2), Some(Errno::Inval)),
            (Framing::Simple, Read, none, (0, 4097), Some(Errno::Inval)),
            (Framing::Structured, Read, none, (0, 4097), Some(Errno::Overflow)),
            (Framing::Simple, Read, CommandFlags::DF, (0, 1), Some(Errno::Inval)),
            (Framing::Structured, Read, CommandFlags::DF, (0, 1), None),
            (Framing::Simple, Write, CommandFlags::FUA, (0, 1), None),
            (Framing::Simple, Write, none, (SIZE, 1), Some(Errno::NoSpc)),
            (Framing::Simple, Write, none, (0, 4097), Some(Errno::Inval)),
            (Framing::Structured, Write, CommandFlags::PAYLOAD_LEN, (0, 1), Some(Errno::Inval)),
            (Framing::Extended, Write, CommandFlags::PAYLOAD_LEN, (0, 1), None),
            (Framing::Extended, Write, none, (0, 1), None),
            (Framing::Simple, Trim, none, (0, SIZE), None),
            (Framing::Simple, Trim, CommandFlags::NO_HOLE, (0, 1), Some(Errno::Inval)),
            (Framing::Simple, Trim, none, (1, SIZE), Some(Errno::Inval)),
            (Framing::Simple, WriteZeroes, CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO, (0, SIZE), None),
            (Framing::Simple, WriteZeroes, none, (1, SIZE), Some(Errno::NoSpc)),
            (Framing::Simple, Flush, CommandFlags::FUA, (0, 0), None),
            (Framing::Simple, Flush, none, (0, 1), Some(Errno::Inval)),
            (Framing::Simple, Cache, none, (0, SIZE), None),
            (Framing::Simple, Cache, CommandFlags::REQ_ONE, (0, 1), Some(Errno::Inval)),
            (Framing::Simple, BlockStatus, none, (0, 1), Some(Errno::Inval)),
            (Framing::Structured, BlockStatus, CommandFlags::REQ_ONE, (0, SIZE), None),
            (Framing::Structured, BlockStatus, none, (0, 0), Some(Errno::Inval)),
            (Framing::Structured, BlockStatus, none, (0, SIZE + 1), Some(Errno::Inval)),
            (Framing::Extended, BlockStatus, CommandFlags::PAYLOAD_LEN, (0, 12), None),
            (Framing::Extended, BlockStatus, CommandFlags::PAYLOAD_LEN, (SIZE + 1, 12), Some(Errno::Inval)),
            (Framing::Extended, BlockStatus, CommandFlags::PAYLOAD_LEN, (0, 4100), Some(Errno::Inval)),
            (Framing::Simple, Unknown(8), none, (0, 0), Some(Errno::Inval)),
            (Framing::Simple, Read, CommandFlags::from_bits_retain(1 << 9), (0, 1), Some(Errno::Inval)),
        ] {
            let found = outcome(Store::new(SIZE), framing, command, flags, range);
            assert_eq!(found, errno, "{framing:?} {command:?} {flags:?} {range:?}");
        }
    }

    #[test]
    fn changes_are_refused_where_nothing_can_be_changed() {
        for command in [Command::Write, Command::Trim, Command::WriteZeroes] {
            let store = Store::new(SIZE).read_only();
            let found = outcome(store, Framing::Simple, command, CommandFlags::empty(), (0, 1));
            assert_eq!(found, Some(Errno::Perm), "{command:?}");
        }
        let found = outcome(Store::new(SIZE).plain(), Framing::Simple, Command::Trim, CommandFlags::empty(), (0, 1));
        assert_eq!(found, Some(Errno::Inval));
    }
}
