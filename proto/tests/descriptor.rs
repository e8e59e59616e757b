//! Our .proto files against the official ones: every message, field, number, enum and RPC.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may fail by panicking")]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;

use prost::Message;
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet};

/// A file as facts: a path to what stands there, comments and custom options aside.
fn facts(file: &FileDescriptorProto) -> BTreeMap<String, String> {
    let mut facts = BTreeMap::new();
    for message in &file.message_type {
        message_facts(&mut facts, "", message);
    }
    for enumeration in &file.enum_type {
        enum_facts(&mut facts, "", enumeration);
    }
    for service in &file.service {
        for method in &service.method {
            let streams = (method.client_streaming(), method.server_streaming());
            facts.insert(
                format!("rpc {}.{}", service.name(), method.name()),
                format!("{} -> {} {streams:?}", method.input_type(), method.output_type()),
            );
        }
    }
    facts
}

fn message_facts(facts: &mut BTreeMap<String, String>, parent: &str, message: &DescriptorProto) {
    let path = format!("{parent}.{}", message.name());
    facts.insert(format!("message {path}"), String::new());
    for field in &message.field {
        let oneof = field.oneof_index.map(|index| message.oneof_decl[usize::try_from(index).unwrap()].name().to_string());
        facts.insert(
            format!("field {path}.{}", field.name()),
            format!("{} {:?} {:?} {} {oneof:?}", field.number(), field.label(), field.r#type(), field.type_name()),
        );
    }
    for nested in &message.nested_type {
        message_facts(facts, &path, nested);
    }
    for enumeration in &message.enum_type {
        enum_facts(facts, &path, enumeration);
    }
}

fn enum_facts(facts: &mut BTreeMap<String, String>, parent: &str, enumeration: &EnumDescriptorProto) {
    for value in &enumeration.value {
        facts.insert(format!("enum {parent}.{}.{}", enumeration.name(), value.name()), value.number().to_string());
    }
}

fn file_of(set: FileDescriptorSet, package: &str) -> FileDescriptorProto {
    set.file.into_iter().find(|file| file.package() == package).unwrap()
}

/// What we left out of our file on purpose: two services that we do not serve, and what only they use.
fn left_out(fact: &str) -> bool {
    let top = fact.split_once(' ').map_or(fact, |(_, path)| path.trim_start_matches('.'));
    let top = top.split('.').next().unwrap_or(top);
    top.contains("Group") || top.contains("GetMetadata") || top.contains("BlockMetadata") || top == "SnapshotMetadata"
}

/// The facts of the official file and of ours; `None`, after saying so, where the official one was not fetched.
fn both(official: &str, package: &str) -> Option<[BTreeMap<String, String>; 2]> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("PROXMOX_CSI_CACHE")
        .unwrap_or_else(|| set("XDG_CACHE_HOME").unwrap_or_else(|| set("HOME").unwrap().join(".cache")).join("proxmox-csi"));
    let official = cache.join(official);
    if !official.exists() {
        assert!(std::env::var_os("CI").is_none(), "{} is missing: run scripts/tools test", official.display());
        // Past the test runner's capture, so that it is seen although the test passes.
        let _ = std::io::stderr().write_all(format!("SKIPPED: {} is missing: run scripts/tools test\n", official.display()).as_bytes());
        return None;
    }
    let theirs = facts(&file_of(protox::compile([&official], [&cache]).unwrap(), package));
    let ours = facts(&file_of(FileDescriptorSet::decode(proto::csi::DESCRIPTORS).unwrap(), package));
    Some([ours, theirs])
}

fn assert_same(ours: &BTreeMap<String, String>, theirs: &BTreeMap<String, String>) {
    let mut differences: Vec<String> = Vec::new();
    for (fact, value) in ours {
        if theirs.get(fact) != Some(value) {
            differences.push(format!("{fact}: ours {value:?}, official {:?}", theirs.get(fact)));
        }
    }
    for fact in theirs.keys() {
        if !ours.contains_key(fact) && !left_out(fact) {
            differences.push(format!("{fact}: official only"));
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn our_csi_proto_is_the_official_contract() {
    let Some([ours, theirs]) = both("csi-v1.12.0.proto", "csi.v1") else { return };
    assert!(ours.len() > 300, "only {} facts: the comparison compares nothing", ours.len());
    assert_same(&ours, &theirs);
}

#[test]
fn our_registration_proto_is_kubelets() {
    let Some([ours, theirs]) = both("pluginregistration-v0.34.0.proto", "pluginregistration") else { return };
    assert!(ours.len() >= 12, "only {} facts: the comparison compares nothing", ours.len());
    assert_same(&ours, &theirs);
}

#[test]
fn messages_with_secrets_cannot_be_printed() {
    // skip_debug left them without Debug; the generated source says so.
    let source = include_str!(concat!(env!("OUT_DIR"), "/csi.v1.rs"));
    for message in ["NodeStageVolumeRequest", "CreateVolumeRequest", "NodeExpandVolumeRequest", "ControllerPublishVolumeRequest"] {
        let at = source.find(&format!("pub struct {message} ")).unwrap();
        let before: String = source[..at].chars().rev().take(200).collect::<String>().chars().rev().collect();
        let attributes = before.rsplit('}').next().unwrap();
        assert!(attributes.contains("skip_debug"), "{message}: {attributes}");
    }
}
