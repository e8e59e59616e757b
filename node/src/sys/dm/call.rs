//! The calls themselves: one ioctl each, on a buffer that [`Message`] lays out.

use std::ffi::c_void;
use std::fs::File;
use std::path::Path;

use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};

use super::message::{self, Message, RawTarget, Which};
use super::{CRYPT, Crypt, LONG_TABLE, Mapping, Target};
use crate::sys::Error;

/// `_IOWR(0xfd, nr, struct dm_ioctl)`; the same on x86_64 and aarch64.
const DM_IOCTL: u32 = 0xc138_fd00;
/// An answer's first room: a crypt table with its key takes 400 bytes, a listed device some 100.
pub(super) const ANSWER_BYTES: usize = 16 << 10;
/// Its last: 10,000 mappings; as many targets of one mapping.
const MAX_ANSWER_BYTES: usize = 1 << 20;

pub(super) fn status(control: &File, which: Which<'_>, subject: &Path) -> Result<Option<Mapping>, Error> {
    let answer = match ask_much(control, Nr::TableStatus, which, message::STATUS_TABLE | message::SECURE_DATA, subject) {
        Err(error) if error.errno == Errno::NXIO => return Ok(None),
        answer => answer?,
    };
    let (header, targets) = match answer {
        Ok(answer) => (answer.header(), answer.targets().into_iter().map(target).collect()),
        // Neither ours nor in our way: one target of dm-crypt takes less than the first room. What is below it, the kernel does not give
        // to us as long as that one has it.
        Err(begun) => (begun.header(), vec![Target { start_sectors: 0, length_sectors: 0, kind: LONG_TABLE.into(), crypt: None }]),
    };
    let is = |flag| header.flags & flag != 0;
    Ok(Some(Mapping {
        dev: header.dev,
        open_count: header.open_count,
        is_suspended: is(message::SUSPEND),
        read_only: is(message::READONLY),
        has_other_table: is(message::INACTIVE_PRESENT),
        targets,
        name: header.name,
        uuid: header.uuid,
    }))
}

/// For the fuzz target: an answer of the kernel, all of whose readers must agree that it can be read; and what its crypt targets say, printed again.
#[cfg(fuzzing)]
#[must_use]
pub fn fuzz(answer: &[u8]) -> Vec<(Target, Option<zeroize::Zeroizing<String>>)> {
    let message = Message::of(answer.to_vec());
    let _ = (message.header(), message.devices(), message.version());
    let targets = message.targets().into_iter().map(target);
    targets.map(|target| (target.clone(), target.crypt.map(|crypt| crypt.print()))).collect()
}

pub(super) fn target(raw: RawTarget) -> Target {
    let crypt = if raw.kind == CRYPT { Crypt::parse(&raw.params) } else { None };
    Target { start_sectors: raw.start_sectors, length_sectors: raw.length_sectors, kind: raw.kind, crypt }
}

/// A call with an answer. EFBIG: it is longer than is read.
pub(super) fn ask(control: &File, nr: Nr, which: Which<'_>, flags: u32, subject: &Path) -> Result<Message, Error> {
    let too_long = |_| Error { call: nr.call(), subject: subject.into(), errno: Errno::FBIG };
    ask_much(control, nr, which, flags, subject)?.map_err(too_long)
}

/// In a buffer that grows until the answer fits. The inner error: what there is room for of a longer one; its header holds.
fn ask_much(control: &File, nr: Nr, which: Which<'_>, flags: u32, subject: &Path) -> Result<Result<Message, Message>, Error> {
    let mut room = ANSWER_BYTES;
    loop {
        let mut message = message(which, flags, 0, room, nr.call(), subject)?;
        call(control, nr, subject, &mut message)?;
        if message.header().flags & message::BUFFER_FULL == 0 {
            return Ok(Ok(message));
        }
        room *= 4;
        if room > MAX_ANSWER_BYTES {
            return Ok(Err(message));
        }
    }
}

pub(super) fn message(
    which: Which<'_>,
    flags: u32,
    event_nr: u32,
    answer_bytes: usize,
    call: &'static str,
    subject: &Path,
) -> Result<Message, Error> {
    let refused = || Error { call, subject: subject.into(), errno: Errno::NAMETOOLONG };
    Message::new(which, flags, event_nr, answer_bytes).ok_or_else(refused)
}

/// The calls that we make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Nr {
    ListDevices = 2,
    DevCreate = 3,
    DevRemove = 4,
    DevSuspend = 6,
    TableLoad = 9,
    TableClear = 10,
    TableStatus = 12,
    GetTargetVersion = 17,
}

impl Nr {
    pub(super) fn call(self) -> &'static str {
        match self {
            Self::ListDevices => "ioctl(DM_LIST_DEVICES)",
            Self::DevCreate => "ioctl(DM_DEV_CREATE)",
            Self::DevRemove => "ioctl(DM_DEV_REMOVE)",
            Self::DevSuspend => "ioctl(DM_DEV_SUSPEND)",
            Self::TableLoad => "ioctl(DM_TABLE_LOAD)",
            Self::TableClear => "ioctl(DM_TABLE_CLEAR)",
            Self::TableStatus => "ioctl(DM_TABLE_STATUS)",
            Self::GetTargetVersion => "ioctl(DM_GET_TARGET_VERSION)",
        }
    }
}

/// A device-mapper call on a buffer that begins with a `struct dm_ioctl`.
struct Call<'a> {
    nr: Nr,
    buffer: &'a mut [u8],
}

// SAFETY: every device-mapper opcode takes a `struct dm_ioctl` and, behind it, as many bytes as its `data_size` says, all to
// be read and written; `Message` sets `data_size` to the length of the very buffer whose pointer is given here, which is
// borrowed mutably until the call has returned. The kernel keeps no pointer, and any bytes are a value of `[u8]`.
#[allow(unsafe_code, reason = "ioctls that rustix lacks")]
unsafe impl Ioctl for Call<'_> {
    type Output = ();

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        DM_IOCTL | self.nr as Opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.buffer.as_mut_ptr().cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

#[allow(unsafe_code, reason = "ioctls that rustix lacks")]
pub(super) fn call(control: &File, nr: Nr, subject: &Path, message: &mut Message) -> Result<(), Error> {
    // SAFETY: the descriptor is the control node's (its number is checked when it is opened), so these opcodes are
    // device-mapper's, and `Call` says rightly what it does with its argument (above).
    unsafe { ioctl(control, Call { nr, buffer: message.bytes_mut() }) }.map_err(Error::at(nr.call(), subject))
}
