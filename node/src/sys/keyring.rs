//! Volume keys in the kernel's keyrings (keyrings(7)), for dm-crypt to take them from.
//!
//! Each mapping has a keyring of its own, linked into the user keyring of root, with one key of type `logon` in it: no
//! process can read that one back, and a clone, whose LUKS header has the UUID of its source, never meets its source's key.
//! The user keyring outlives this process and its container (whose session keyring does not), so a mapping can be grown
//! without its passphrase until it is closed or the machine restarts. dm-crypt looks a key up through the keyrings of the
//! thread that loads the table: [`Held`] links the mapping's keyring into this thread's for that moment.

use std::ffi::{CString, c_char, c_int, c_long};
use std::marker::PhantomData;
use std::path::Path;

use rustix::io::Errno;

use super::Error;

// include/uapi/linux/keyctl.h
const THREAD_KEYRING: c_int = -1;
const USER_KEYRING: c_int = -4;
const KEYCTL_DESCRIBE: c_int = 6;
const KEYCTL_LINK: c_int = 8;
const KEYCTL_UNLINK: c_int = 9;
const KEYCTL_SEARCH: c_int = 10;
const KEYCTL_READ: c_int = 11;

/// Begins the names of our keyrings.
const PREFIX: &str = "proxmox-csi:";
/// Keys that are looked through in root's user keyring: root may have a million, and who has so many has other troubles.
const MAX_KEYS: usize = 65_536;
/// `keyring;uid;gid;permissions;name`; a name has at most 4096 bytes.
const MAX_DESCRIPTION_BYTES: usize = 4200;

/// A mapping's keyring, found by what this thread does as long as this lives.
#[derive(Debug)]
pub struct Held {
    serial: c_int,
    /// The thread's own keyring is meant.
    stays_on_its_thread: PhantomData<*const ()>,
}

impl Drop for Held {
    fn drop(&mut self) {
        // It goes with the thread at the latest.
        let _ = keyctl(KEYCTL_UNLINK, self.serial, THREAD_KEYRING);
    }
}

/// Gives the kernel the key of the mapping with this dm UUID, under the name by which its table is to call it.
///
/// # Errors
/// ENOSYS: no keyrings in this kernel. EPERM, EACCES: a seccomp filter or LSM is against it. EDQUOT: root's quota
/// (`/proc/sys/kernel/keys/root_maxkeys`, `root_maxbytes`) is used up. The key then has to go into the table itself.
pub fn hold(uuid: &str, description: &str, key: &[u8]) -> Result<Held, Error> {
    let name = format!("{PREFIX}{uuid}");
    let ring = add_key(c"keyring", &name, &[], THREAD_KEYRING).map(held)?;
    add_key(c"logon", description, key, ring.serial)?;
    // Found again later by its name. Where that is refused, the key is there for this table alone.
    let _ = keyctl(KEYCTL_LINK, ring.serial, USER_KEYRING);
    Ok(ring)
}

/// The key that an earlier [`hold`] gave to the kernel, by this process or one before it.
///
/// # Errors
/// ENOKEY: there is none.
pub fn find(uuid: &str) -> Result<Held, Error> {
    search(uuid, THREAD_KEYRING).map(held)
}

/// Takes the mapping's key out of the kernel's keyrings, which wipes it. dm-crypt's own copy goes with the mapping.
///
/// # Errors
/// There being none is no error; anything else is.
pub fn forget(uuid: &str) -> Result<(), Error> {
    match search(uuid, 0).and_then(|serial| unlink(uuid, serial)) {
        Err(error) if matches!(error.errno, Errno::NOKEY | Errno::NOENT | Errno::KEYREVOKED | Errno::KEYEXPIRED) => Ok(()),
        done => done,
    }
}

/// The dm UUIDs of mappings whose keys we have left in the kernel.
///
/// # Errors
/// Keyrings cannot be read here.
pub fn left() -> Result<Vec<String>, Error> {
    let at = Error::at("keyctl(KEYCTL_READ)", Path::new("user keyring"));
    let mut serials: Vec<c_int> = vec![0; 64];
    for _ in 0..2 {
        let bytes = keyctl_into(KEYCTL_READ, USER_KEYRING, &mut serials).map_err(&at)?;
        let count = usize::try_from(bytes).unwrap_or_default() / size_of::<c_int>();
        let fits = count <= serials.len();
        serials.resize(count.min(MAX_KEYS), 0);
        if fits {
            break;
        }
    }
    // A key that has gone meanwhile has no name any more.
    Ok(serials.into_iter().filter_map(describe).filter_map(|text| uuid_in(&text)).collect())
}

/// `keyring;0;0;3f010000;proxmox-csi:CRYPT-LUKS2-…`
fn uuid_in(description: &str) -> Option<String> {
    let mut parts = description.splitn(5, ';');
    (parts.next()? == "keyring").then_some(())?;
    Some(parts.nth(3)?.strip_prefix(PREFIX)?.to_owned())
}

fn describe(serial: c_int) -> Option<String> {
    let mut buffer = vec![0_u8; MAX_DESCRIPTION_BYTES];
    let length = usize::try_from(keyctl_into(KEYCTL_DESCRIBE, serial, &mut buffer).ok()?).ok()?;
    // With its NUL.
    Some(String::from_utf8_lossy(buffer.get(..length.checked_sub(1)?)?).into_owned())
}

fn held(serial: c_int) -> Held {
    Held { serial, stays_on_its_thread: PhantomData }
}

fn unlink(uuid: &str, serial: c_int) -> Result<(), Error> {
    keyctl(KEYCTL_UNLINK, serial, USER_KEYRING).map_err(Error::at("keyctl(KEYCTL_UNLINK)", Path::new(uuid)))
}

fn answer(answer: c_long) -> Result<c_long, Errno> {
    if answer >= 0 { Ok(answer) } else { Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)) }
}

fn serial(number: c_long) -> c_int {
    c_int::try_from(number).unwrap_or_default()
}

#[allow(unsafe_code, reason = "a system call that rustix lacks")]
fn add_key(kind: &std::ffi::CStr, description: &str, payload: &[u8], ring: c_int) -> Result<c_int, Error> {
    let at = Error::at("add_key", Path::new(description));
    let text = CString::new(description).map_err(|_| at(Errno::INVAL))?;
    let (kind, text): (*const c_char, *const c_char) = (kind.as_ptr(), text.as_ptr());
    // SAFETY: add_key(type, description, payload, plen, keyring): the kernel reads two C strings and `payload.len()` bytes,
    // copies them and writes nothing of ours; all of it lives until the call returns.
    let added = unsafe { libc::syscall(libc::SYS_add_key, kind, text, payload.as_ptr(), payload.len(), c_long::from(ring)) };
    answer(added).map(serial).map_err(at)
}

#[allow(unsafe_code, reason = "a system call that rustix lacks")]
fn search(uuid: &str, link_to: c_int) -> Result<c_int, Error> {
    let at = Error::at("keyctl(KEYCTL_SEARCH)", Path::new(uuid));
    let text = CString::new(format!("{PREFIX}{uuid}")).map_err(|_| at(Errno::INVAL))?;
    let (kind, name): (*const c_char, *const c_char) = (c"keyring".as_ptr(), text.as_ptr());
    let [operation, ring, link_to] = [KEYCTL_SEARCH, USER_KEYRING, link_to].map(c_long::from);
    // SAFETY: keyctl(KEYCTL_SEARCH, keyring, type, description, destination): the kernel reads two C strings, which live until
    // the call returns, writes nothing of ours and keeps neither.
    let found = unsafe { libc::syscall(libc::SYS_keyctl, operation, ring, kind, name, link_to) };
    answer(found).map(serial).map_err(at)
}

/// For operations on two keys that touch no memory.
#[allow(unsafe_code, reason = "a system call that rustix lacks")]
fn keyctl(operation: c_int, key: c_int, ring: c_int) -> Result<(), Errno> {
    let [operation, key, ring] = [operation, key, ring].map(c_long::from);
    // SAFETY: KEYCTL_LINK and KEYCTL_UNLINK take numbers alone; the kernel reads and writes no memory of ours.
    answer(unsafe { libc::syscall(libc::SYS_keyctl, operation, key, ring) }).map(|_| ())
}

/// KEYCTL_READ and KEYCTL_DESCRIBE: answers how many bytes there are, which may be more than fitted.
#[allow(unsafe_code, reason = "a system call that rustix lacks")]
fn keyctl_into<T: Copy>(operation: c_int, key: c_int, buffer: &mut [T]) -> Result<c_long, Errno> {
    let [operation, key] = [operation, key].map(c_long::from);
    // SAFETY: the kernel writes at most the given number of bytes into the buffer, which is plain numbers (`c_int`, `u8`: any
    // bytes are a value) and borrowed mutably until the call returns; it keeps nothing.
    answer(unsafe { libc::syscall(libc::SYS_keyctl, operation, key, buffer.as_mut_ptr(), size_of_val(buffer)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_keyrings_are_known_by_their_names() {
        assert_eq!(uuid_in("keyring;0;0;3f010000;proxmox-csi:CRYPT-LUKS2-0a-csi-1").as_deref(), Some("CRYPT-LUKS2-0a-csi-1"));
        for other in ["", "keyring", "keyring;0;0;3f010000;_uid.0", "logon;0;0;3d010000;proxmox-csi:x", "keyring;0;0;x"] {
            assert_eq!(uuid_in(other), None, "{other:?}");
        }
    }

    #[test]
    #[ignore = "needs a kernel with keyrings: the guest test runs it"]
    fn kernel_a_key_is_found_until_it_is_forgotten() {
        let uuid = "CRYPT-LUKS2-00000000000000000000000000000001-test";
        assert_eq!(find(uuid).unwrap_err().errno, Errno::NOKEY);
        drop(hold(uuid, "cryptsetup:test-d0", &[1; 64]).unwrap());
        // Another thread has another keyring of its own; the key is root's.
        std::thread::spawn(move || drop(find(uuid).unwrap())).join().unwrap();
        assert_eq!(left().unwrap(), [uuid]);
        // Given once more: still one.
        drop(hold(uuid, "cryptsetup:test-d0", &[2; 64]).unwrap());
        assert_eq!(left().unwrap(), [uuid]);
        forget(uuid).unwrap();
        forget(uuid).unwrap();
        assert_eq!((find(uuid).unwrap_err().errno, left().unwrap()), (Errno::NOKEY, Vec::new()));
    }
}
