//! What the token may do, against the table of what the driver needs. Pure.

use serde_json::Value;

/// The table that the `pveum` lines, the OpenTofu module and the documents are compared with, too.
const TABLE: &str = include_str!("../../../../deploy/proxmox/privileges.tsv");

/// One line of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Needed {
    pub(super) privilege: &'static str,
    pub(super) path: &'static str,
    /// `always`, or the feature that needs it.
    pub(super) feature: &'static str,
    pub(super) what_for: &'static str,
}

/// How a line of it is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Held {
    /// On that path and all below it.
    Yes,
    /// Not at all.
    No,
    /// Not there, but on these paths below it.
    OnlyOn(Vec<String>),
    /// There, but not on these paths below it: a role there replaces what is inherited.
    ButNotOn(Vec<String>),
    /// On that path alone: without propagation.
    NotBelow,
}

pub(super) fn table() -> impl Iterator<Item = Needed> {
    TABLE.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
        let mut fields = line.split('\t');
        Some(Needed { privilege: fields.next()?, path: fields.next()?, feature: fields.next()?, what_for: fields.next()? })
    })
}

/// Whether the token holds anything at all of the table.
pub(super) fn has_any(permissions: &Value) -> bool {
    let paths = permissions.as_object();
    paths.into_iter().flat_map(|paths| paths.values()).any(|held| table().any(|one| held.get(one.privilege).is_some()))
}

/// By `GET /access/permissions`: path → privilege → whether it is propagated. A path that is not listed has what its nearest listed parent
/// propagates.
pub(super) fn held(permissions: &Value, needed: &Needed) -> Held {
    let flag = |path: &str| permissions.get(path).map(|held| held.get(needed.privilege).map(propagates));
    let at = match flag(needed.path) {
        Some(at) => at,
        None => flag("/").flatten().filter(|propagated| *propagated),
    };
    let is_below = |path: &str| path.strip_prefix(needed.path).is_some_and(|rest| rest.starts_with('/') && rest.len() > 1);
    let below = |has: bool| -> Vec<String> {
        let paths = permissions.as_object().into_iter().flat_map(|paths| paths.keys());
        paths.filter(|path| needed.path != "/" && is_below(path) && flag(path).flatten().is_some() == has).cloned().collect()
    };
    match at {
        Some(false) if needed.path != "/" => Held::NotBelow,
        Some(_) => Some(below(false)).filter(|paths| !paths.is_empty()).map_or(Held::Yes, Held::ButNotOn),
        None => Some(below(true)).filter(|paths| !paths.is_empty()).map_or(Held::No, Held::OnlyOn),
    }
}

fn propagates(value: &Value) -> bool {
    value.as_u64() == Some(1) || value.as_bool() == Some(true) || value.as_str() == Some("1")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_table_is_read() {
        assert!(table().count() >= 6);
        assert!(table().all(|one| one.privilege.contains('.') && one.path.starts_with('/') && !one.what_for.is_empty()));
        assert!(table().any(|one| one.feature == "always") && table().any(|one| one.feature != "always"));
    }

    #[test]
    fn a_privilege_is_held_on_its_path_and_all_below_or_it_is_said_where() {
        let needed = Needed { privilege: "VM.Audit", path: "/vms", feature: "always", what_for: "" };
        for (permissions, expected) in [
            (json!({"/": {"VM.Audit": 1}}), Held::Yes),
            (json!({"/": {"VM.Audit": 0}}), Held::No),
            (json!({"/": {}, "/vms": {"VM.Audit": 1}}), Held::Yes),
            (json!({"/": {"VM.Audit": 1}, "/vms": {}}), Held::No),
            (json!({"/vms": {"VM.Audit": 0}}), Held::NotBelow),
            (json!({"/": {"VM.Audit": 1}, "/vms/101": {}}), Held::ButNotOn(vec!["/vms/101".into()])),
            (json!({"/vms/102": {"VM.Audit": 1}, "/vmsx/1": {"VM.Audit": 1}}), Held::OnlyOn(vec!["/vms/102".into()])),
            (json!({}), Held::No),
            (json!([]), Held::No),
        ] {
            assert_eq!(held(&permissions, &needed), expected, "{permissions}");
        }
        let on_root = Needed { privilege: "Sys.Audit", path: "/", ..needed };
        assert_eq!(held(&json!({"/": {"Sys.Audit": 0}}), &on_root), Held::Yes, "for itself alone is enough");
        assert_eq!(held(&json!({"/vms": {"VM.Audit": 1}}), &on_root), Held::No);
        assert!(!has_any(&json!({"/": {"Pool.Audit": 1}})) && has_any(&json!({"/x": {"VM.Audit": 0}})));
    }
}
