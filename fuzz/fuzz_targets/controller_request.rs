//! Requests to the controller as they come off the wire: the first byte says which, the rest is protobuf.
#![no_main]

use controller::parameters::Parameters;
use controller::request::{Capacity, Create, Expand, NodeId, Publish, Unpublish};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;
use proto::csi;

const LONGEST_SENTENCE: usize = 64 << 10;

fn said<T>(judged: Result<T, controller::error::Error>) -> Option<T> {
    judged.map_err(|why| assert!(why.to_string().len() < LONGEST_SENTENCE)).ok()
}

/// A node's name goes into searches, its number into URLs.
fn is_node(node: &NodeId, given: &str) {
    assert_eq!(node.to_string(), given);
}

fuzz_target!(init: fuzz::limit_memory(), |data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 5 {
        0 => {
            let Ok(given) = csi::CreateVolumeRequest::decode(data) else { return };
            let name = given.name.clone();
            let Some(create) = said(Create::try_from(given)) else { return };
            assert!(create.name == name && create.want.storage == create.parameters.storage);
            assert!(create.want.limit_bytes.is_none_or(|limit| limit >= create.want.required_bytes));
            // What CreateVolume tells ControllerPublish is read as the same.
            let context = create.parameters.volume_context();
            let read = Parameters::of_context(&context).expect("our own volume context");
            assert_eq!(read.volume_context(), context);
        }
        1 => {
            let Ok(given) = csi::ControllerPublishVolumeRequest::decode(data) else { return };
            let (id, node) = (given.volume_id.clone(), given.node_id.clone());
            let Some(publish) = said(Publish::try_from(given)) else { return };
            assert_eq!(publish.handle.to_string(), id);
            is_node(&publish.node, &node);
            let drive = publish.parameters.drive(&publish.handle, 1, publish.readonly);
            assert_eq!(drive.to_string().parse().as_ref(), Ok(&drive), "{drive}");
        }
        2 => {
            let Ok(given) = csi::ControllerUnpublishVolumeRequest::decode(data) else { return };
            let (id, node) = (given.volume_id.clone(), given.node_id.clone());
            let Some(unpublish) = said(Unpublish::try_from(given)) else { return };
            assert_eq!(unpublish.handle.to_string(), id);
            match &unpublish.node {
                Some(found) => is_node(found, &node),
                None => assert!(node.is_empty(), "detached from every node instead of {node:?}"),
            }
        }
        3 => {
            let Ok(given) = csi::ControllerExpandVolumeRequest::decode(data) else { return };
            let id = given.volume_id.clone();
            let Some(expand) = said(Expand::try_from(given)) else { return };
            assert!(expand.handle.to_string() == id && expand.limit_bytes.is_none_or(|limit| limit >= expand.required_bytes));
        }
        _ => {
            let Ok(given) = csi::GetCapacityRequest::decode(data) else { return };
            let _ = said(Capacity::try_from(given));
        }
    }
});
