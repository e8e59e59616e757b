use super::super::{Plugin, Room, Seen, Want, candidates};
use super::*;
use crate::pve::api::{Resources, Storage};
use proptest::prelude::*;
use std::sync::Arc;

const GIB: u64 = 1 << 30;

/// Go: `h := fnv.New32(); h.Write([]byte(name)); h.Sum32()`, by its published test values, and the number added.
#[test]
fn the_provisioners_rotation() {
    // FNV-1 of "a" is 0x050c5d7e, of "foobar" 0x31f0b262.
    assert_eq!(rotation("a", 1_000_003), 0x050c_5d7e % 1_000_003);
    assert_eq!(rotation("foobar", 7), 0x31f0_b262 % 7);
    assert_eq!(rotation("foobar-3", 7), (0x31f0_b262 + 3) % 7);
    assert_eq!(rotation("data-foobar-3", 7), rotation("logs-foobar-3", 7), "the claims of one pod go together");
    assert_ne!(rotation("data-foobar-3", 7), rotation("data-foobar-4", 7));
    assert_eq!((rotation("", 3), rotation("-", 1), rotation("x", 0)), (0x811c_9dc5_usize % 3, 0, 0));
}

fn term(zone: &str) -> Term {
    Term { region: Some("r".into()), zone: Some(zone.into()) }
}

/// As external-provisioner sends them: sorted, then rotated to the selected node's zone, or by the claim's name.
fn preferred(zones: &[&str], claim: &str, selected: Option<usize>) -> Vec<Term> {
    let mut terms: Vec<Term> = zones.iter().map(|zone| term(zone)).collect();
    terms.sort();
    terms.rotate_left(selected.unwrap_or_else(|| rotation(claim, zones.len())));
    terms
}

#[test]
fn a_selected_node_is_a_wish_unless_it_could_be_a_rotation() {
    let zones = ["a", "b", "c"];
    for selected in 0..3 {
        let expected = if rotation("data", 3) == selected { Order::Either } else { Order::Wish };
        assert_eq!(Order::of(&preferred(&zones, "data", Some(selected)), Some("data")), expected);
    }
    assert_eq!(Order::of(&preferred(&zones, "data", None), Some("data")), Order::Either);
    assert_eq!(Order::of(&preferred(&zones, "data", None), None), Order::Wish, "whose claim it is was not said");
    assert_eq!(Order::of(&[term("a")], Some("data")), Order::Wish);
    assert_eq!(Order::of(&[], Some("data")), Order::Free);
}

/// Places `claims` one after the other, none of them seen in the storage's numbers; which zone has how many.
fn place(claims: &[(Vec<Term>, Order)], free_gib: &[(&str, u64)]) -> BTreeMap<String, usize> {
    let storage = |(host, free): &(&str, u64)| Storage {
        storage: "ds".into(),
        host: (*host).into(),
        plugin: "lvmthin".into(),
        active: true,
        shared: false,
        images: true,
        total_bytes: 1000 * GIB,
        used_bytes: (1000 - free) * GIB,
    };
    let resources = Resources { storages: free_gib.iter().map(storage).collect(), ..Resources::default() };
    let regions = BTreeMap::from([("r".to_string(), Arc::new(resources))]);
    let mut loads = Loads::new();
    for (terms, order) in claims {
        let want = Want {
            storage: "ds".into(),
            required_bytes: GIB,
            limit_bytes: None,
            terms: terms.clone(),
            order: *order,
            format: None,
            room: Room::default(),
        };
        let found = candidates(&want, Seen { regions: &regions, promised: &super::super::Promised::default(), loads: &loads }).unwrap();
        let chosen = found.first().unwrap();
        assert_eq!(chosen.plugin, Plugin::Lvm);
        let load = loads.entry((chosen.region.clone(), chosen.zone.clone())).or_default();
        load.volumes += 1;
        load.unseen_bytes += chosen.size_bytes;
    }
    loads.into_iter().map(|((_, zone), load)| (zone, load.volumes)).collect()
}

#[test]
fn room_decides_where_the_spread_is_even() {
    let one = vec![(vec![], Order::Free)];
    assert_eq!(place(&one, &[("a", 300), ("b", 700), ("c", 500)]), BTreeMap::from([("b".into(), 1)]));
    // What keeps less than a tenth free takes none, as long as others have room; then what there is.
    let ten = vec![(vec![], Order::Free); 10];
    assert_eq!(place(&ten, &[("a", 90), ("b", 700), ("c", 500)]), BTreeMap::from([("b".into(), 5), ("c".into(), 5)]));
    assert_eq!(place(&ten, &[("a", 9), ("b", 6)]).values().sum::<usize>(), 10);
}

#[test]
fn a_selected_node_is_followed_as_long_as_it_has_room() {
    let claims = vec![(vec![term("b"), term("c"), term("a")], Order::Wish); 20];
    assert_eq!(place(&claims, &[("a", 900), ("b", 50), ("c", 900)]), BTreeMap::from([("b".into(), 20)]));
    assert_eq!(place(&claims, &[("a", 900), ("b", 0), ("c", 900)]), BTreeMap::from([("c".into(), 20)]));
}

proptest! {
    /// Velero's restore: 20 claims at once, none bound. Whatever they are called and in whatever order they come, no zone of three
    /// gets more than 40 %, as the provisioner rotates them (Immediate) and as it says nothing at all.
    #[test]
    fn of_twenty_claims_no_zone_has_more_than_eight(
        names in proptest::collection::vec("[a-z]{1,6}(-[a-z]{1,6})?(-[0-9]{1,2})?", 20),
        free in proptest::collection::vec(150u64..1000, 3),
        is_known in any::<bool>(),
    ) {
        let zones = ["pve1", "pve10", "pve2"];
        let free: Vec<(&str, u64)> = zones.iter().copied().zip(free).collect();
        let claim = |name: &String| {
            let terms = preferred(&zones, name, None);
            let order = Order::of(&terms, Some(name));
            // Kubernetes says that no node is selected.
            (terms, if is_known { Order::Free } else { order })
        };
        let claims: Vec<_> = names.iter().map(claim).collect();
        let placed = place(&claims, &free);
        prop_assert_eq!(placed.values().sum::<usize>(), 20);
        prop_assert!(placed.values().all(|volumes| *volumes <= 8), "{:?}", placed);
    }

    /// The scheduler spreads the pods: each volume is where its pod is, also where that could have been a rotation.
    #[test]
    fn a_spread_selection_is_followed(names in proptest::collection::vec("[a-z]{1,8}", 20), first in 0usize..3) {
        let zones = ["pve1", "pve2", "pve3"];
        let claim = |(at, name): (usize, &String)| {
            let terms = preferred(&zones, name, Some((first + at) % 3));
            let order = Order::of(&terms, Some(name));
            (terms, order)
        };
        let claims: Vec<_> = names.iter().enumerate().map(claim).collect();
        let mut expected = BTreeMap::<String, usize>::new();
        for at in 0..20 {
            *expected.entry(zones[(first + at) % 3].into()).or_default() += 1;
        }
        prop_assert_eq!(place(&claims, &[("pve1", 500), ("pve2", 400), ("pve3", 900)]), expected);
    }

    #[test]
    fn no_claims_name_panics(name in "\\PC{0,40}", zones in 0usize..5) {
        prop_assert!(rotation(&name, zones) < zones.max(1));
    }
}
