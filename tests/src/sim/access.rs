//! Who asks, and what they may: tokens, tickets, roles and the ACL (`reference/proxmox-api.md` §2).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::answer::ApiError;
use super::describe::{Acl, Description, User};
use super::sha1;
use super::version::Version;

/// A ticket's lifetime.
const TICKET_LIFETIME: Duration = Duration::from_secs(2 * 3600);

/// Who a request comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    /// `user@realm`
    pub(crate) user: String,
    /// The token's name, where it is one.
    pub(crate) token: Option<String>,
}

impl Caller {
    /// `user@realm` or `user@realm!token`: the identity as Proxmox writes it.
    pub(crate) fn id(&self) -> String {
        match &self.token {
            Some(token) => format!("{}!{token}", self.user),
            None => self.user.clone(),
        }
    }

    /// root@pam with a ticket; a token of root is not root.
    pub(crate) fn is_root(&self) -> bool {
        self.token.is_none() && self.user == "root@pam"
    }
}

/// A privilege and whether it propagates.
pub(crate) type Privileges = BTreeMap<String, bool>;

/// Users, roles, ACL.
#[derive(Debug, Default)]
pub(crate) struct Access {
    users: BTreeMap<String, User>,
    roles: BTreeMap<String, Vec<String>>,
    acl: Vec<Acl>,
    /// Ticket (its random part) to user and time of issue.
    tickets: BTreeMap<String, (String, Duration)>,
    issued: u64,
}

/// What a request carries to prove who it is.
#[derive(Debug, Default)]
pub(crate) struct Credentials<'a> {
    pub(crate) authorization: Option<&'a str>,
    pub(crate) cookie: Option<&'a str>,
    pub(crate) csrf: Option<&'a str>,
    pub(crate) reads_only: bool,
}

const ALL_PRIVILEGES: [&str; 39] = [
    "Datastore.Allocate",
    "Datastore.AllocateSpace",
    "Datastore.AllocateTemplate",
    "Datastore.Audit",
    "Group.Allocate",
    "Mapping.Audit",
    "Mapping.Modify",
    "Mapping.Use",
    "Permissions.Modify",
    "Pool.Allocate",
    "Pool.Audit",
    "Realm.Allocate",
    "Realm.AllocateUser",
    "SDN.Allocate",
    "SDN.Audit",
    "SDN.Use",
    "Sys.AccessNetwork",
    "Sys.Audit",
    "Sys.Console",
    "Sys.Incoming",
    "Sys.Modify",
    "Sys.PowerMgmt",
    "Sys.Syslog",
    "User.Modify",
    "VM.Allocate",
    "VM.Audit",
    "VM.Backup",
    "VM.Clone",
    "VM.Config.CDROM",
    "VM.Config.CPU",
    "VM.Config.Cloudinit",
    "VM.Config.Disk",
    "VM.Config.HWType",
    "VM.Config.Memory",
    "VM.Config.Network",
    "VM.Config.Options",
    "VM.Migrate",
    "VM.PowerMgmt",
    "VM.Snapshot",
];

impl Access {
    pub(crate) fn new(description: &Description) -> Access {
        let mut roles = description.roles.clone();
        roles.insert("Administrator".to_owned(), ALL_PRIVILEGES.map(str::to_owned).to_vec());
        roles.insert("PVEDatastoreUser".to_owned(), ["Datastore.AllocateSpace", "Datastore.Audit"].map(str::to_owned).to_vec());
        roles.insert(
            "PVEDatastoreAdmin".to_owned(),
            ["Datastore.AllocateSpace", "Datastore.Audit", "Datastore.Allocate", "Datastore.AllocateTemplate"].map(str::to_owned).to_vec(),
        );
        roles.insert("PVEAuditor".to_owned(), ["Datastore.Audit", "Pool.Audit", "Sys.Audit", "VM.Audit"].map(str::to_owned).to_vec());
        roles.insert("NoAccess".to_owned(), Vec::new());
        let users = description.users.iter().map(|user| (user.id.clone(), user.clone())).collect();
        Access { users, roles, acl: description.acl.clone(), ..Access::default() }
    }

    pub(crate) fn set_acl(&mut self, acl: Vec<Acl>) {
        self.acl = acl;
    }

    pub(crate) fn set_role(&mut self, role: &str, privileges: &[&str]) {
        self.roles.insert(role.to_owned(), privileges.iter().map(|privilege| (*privilege).to_owned()).collect());
    }

    pub(crate) fn add_user(&mut self, user: User) {
        self.users.insert(user.id.clone(), user);
    }

    /// Precedence: cookie, then the Authorization header. A refusal is the 401's reason phrase.
    pub(crate) fn authenticate(&self, credentials: &Credentials<'_>, now: Duration, version: Version) -> Result<Caller, String> {
        let cookie = credentials.cookie.and_then(|cookies| {
            cookies.split(';').filter_map(|cookie| cookie.trim().split_once('=')).find(|(name, _)| *name == "PVEAuthCookie")
        });
        if let Some((_, ticket)) = cookie {
            return self.by_ticket(&percent_decode(ticket), credentials, now);
        }
        let Some(authorization) = credentials.authorization else { return Err("No ticket".to_owned()) };
        let Some(token) = authorization.strip_prefix("PVEAPIToken") else { return Err("No ticket".to_owned()) };
        let value = percent_decode(token.strip_prefix(['=', ' ']).unwrap_or(token));
        let value = value.split(';').next().unwrap_or_default().trim();
        self.by_token(value).map_err(|why| if version.hides_why_unauthorised() { "Authentication failed!".to_owned() } else { why })
    }

    fn by_ticket(&self, ticket: &str, credentials: &Credentials<'_>, now: Duration) -> Result<Caller, String> {
        let (user, issued) = self.tickets.get(ticket).ok_or_else(|| "permission denied - invalid PVE ticket".to_owned())?;
        if now.saturating_sub(*issued) > TICKET_LIFETIME {
            return Err("permission denied - invalid PVE ticket".to_owned());
        }
        if !credentials.reads_only && credentials.csrf != Some(csrf(ticket).as_str()) {
            return Err("Permission denied - invalid csrf token".to_owned());
        }
        Ok(Caller { user: user.clone(), token: None })
    }

    fn by_token(&self, value: &str) -> Result<Caller, String> {
        let malformed = || format!("'{value}' is not a valid token ID - not able to split into user and token parts");
        let (id, secret) = value.rsplit_once('=').ok_or_else(|| "no tokenid specified".to_owned())?;
        let (user_id, token_id) = id.split_once('!').ok_or_else(malformed)?;
        let user = self.user(user_id)?;
        let token = user
            .tokens
            .iter()
            .find(|token| token.id == token_id)
            .ok_or_else(|| format!("no such token '{token_id}' for user '{user_id}'"))?;
        if token.expired {
            return Err(format!("token '{token_id}' access expired"));
        }
        if token.secret != secret {
            return Err("invalid token value!".to_owned());
        }
        Ok(Caller { user: user_id.to_owned(), token: Some(token_id.to_owned()) })
    }

    fn user(&self, id: &str) -> Result<&User, String> {
        let user = self.users.get(id).ok_or_else(|| format!("no such user ('{id}')"))?;
        if user.disabled {
            return Err(format!("user '{id}' is disabled"));
        }
        if user.expired {
            return Err(format!("user '{id}' access expired"));
        }
        Ok(user)
    }

    /// Ticket and CSRF token, for a password or for a ticket that is still good.
    pub(crate) fn login(&mut self, user_id: &str, password: &str, now: Duration) -> Option<(String, String)> {
        let user = self.user(user_id).ok()?;
        let renews =
            self.tickets.get(password).is_some_and(|(owner, issued)| owner == user_id && now.saturating_sub(*issued) <= TICKET_LIFETIME);
        if !renews && user.password.as_deref() != Some(password) {
            return None;
        }
        self.issued += 1;
        let seed = format!("{user_id} {} {}", self.issued, now.as_nanos());
        let ticket = format!("PVE:{user_id}:{:08X}::{}", self.issued, sha1::hex(seed.as_bytes()));
        self.tickets.insert(ticket.clone(), (user_id.to_owned(), now));
        let token = csrf(&ticket);
        Some((ticket, token))
    }

    /// What `caller` holds on `path`; the value says whether it propagates.
    pub(crate) fn privileges(&self, caller: &Caller, path: &str) -> Privileges {
        let owner = if caller.user == "root@pam" {
            ALL_PRIVILEGES.iter().map(|privilege| ((*privilege).to_owned(), true)).collect()
        } else {
            self.own(&caller.user, path)
        };
        let Some(token) = &caller.token else { return owner };
        let separated =
            self.users.get(&caller.user).and_then(|user| user.tokens.iter().find(|own| own.id == *token)).is_none_or(|own| own.privsep);
        if !separated {
            return owner;
        }
        self.own(&caller.id(), path).into_iter().filter(|(privilege, _)| owner.contains_key(privilege)).collect()
    }

    /// From `/` down: what is found deeper replaces what is above; above the last level only what propagates counts.
    fn own(&self, who: &str, path: &str) -> Privileges {
        let mut levels = vec!["/".to_owned()];
        let mut at = String::new();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            at.push('/');
            at.push_str(part);
            levels.push(at.clone());
        }
        let mut roles: Vec<(&str, bool)> = Vec::new();
        for level in &levels {
            let is_last = levels.last() == Some(level);
            let here: Vec<(&str, bool)> = self
                .acl
                .iter()
                .filter(|entry| entry.who == who && entry.path == *level && (is_last || entry.propagate))
                .map(|entry| (entry.role.as_str(), entry.propagate))
                .collect();
            if !here.is_empty() {
                roles = here;
            }
        }
        if roles.iter().any(|(role, _)| *role == "NoAccess") {
            return Privileges::new();
        }
        let mut privileges = Privileges::new();
        for (role, propagate) in roles {
            for privilege in self.roles.get(role).into_iter().flatten() {
                let entry = privileges.entry(privilege.clone()).or_insert(false);
                *entry = *entry || propagate;
            }
        }
        privileges
    }

    pub(crate) fn may(&self, caller: &Caller, path: &str, any_of: &[&str]) -> bool {
        let held = self.privileges(caller, path);
        any_of.iter().any(|privilege| held.contains_key(*privilege))
    }

    pub(crate) fn require(&self, caller: &Caller, path: &str, any_of: &[&str]) -> Result<(), ApiError> {
        if self.may(caller, path, any_of) {
            return Ok(());
        }
        Err(ApiError::forbidden(&format!("{path}, {}", any_of.join("|"))))
    }

    /// The paths that GET /access/permissions lists.
    pub(crate) fn listed_paths(&self) -> BTreeSet<String> {
        ["/", "/access", "/access/groups", "/nodes", "/pool", "/sdn", "/storage", "/vms"]
            .into_iter()
            .map(str::to_owned)
            .chain(self.acl.iter().map(|entry| entry.path.clone()))
            .collect()
    }

    pub(crate) fn parse_identity(id: &str) -> Caller {
        match id.split_once('!') {
            Some((user, token)) => Caller { user: user.to_owned(), token: Some(token.to_owned()) },
            None => Caller { user: id.to_owned(), token: None },
        }
    }
}

fn csrf(ticket: &str) -> String {
    format!("CSRF:{}", sha1::hex(ticket.as_bytes()))
}

/// Decodes `%41`, once; a stray `%` stays.
pub(crate) fn percent_decode(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let hex = (*first == b'%').then(|| tail.get(..2)).flatten().and_then(|two| std::str::from_utf8(two).ok());
        match hex.and_then(|two| u8::from_str_radix(two, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = tail.get(2..).unwrap_or_default();
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, who: &str, role: &str, propagate: bool) -> Acl {
        Acl { path: path.to_owned(), who: who.to_owned(), role: role.to_owned(), propagate }
    }

    #[test]
    fn a_deeper_entry_replaces_and_only_propagating_ones_reach_down() {
        let mut access = Access::new(&Description::standard());
        access.set_role("Audit", &["VM.Audit"]);
        access.set_role("Disk", &["VM.Config.Disk"]);
        access.set_acl(vec![
            entry("/vms", "a@pve", "Audit", true),
            entry("/vms/9999", "a@pve", "Disk", true),
            entry("/", "a@pve", "Disk", false),
        ]);
        let caller = Access::parse_identity("a@pve");
        assert!(access.may(&caller, "/vms/100", &["VM.Audit"]));
        assert!(!access.may(&caller, "/vms/9999", &["VM.Audit"]), "replaced, not added");
        assert!(access.may(&caller, "/", &["VM.Config.Disk"]));
        assert!(!access.may(&caller, "/storage/x", &["VM.Config.Disk"]), "/ does not propagate");
    }
}
