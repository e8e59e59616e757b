//! libblkid 2.38.1 as Rust sees it: every function, type and constant of `blkid.h`.
//!
//! Generated once by bindgen 0.72.1 (allow-list `blkid_*`, `BLKID_*`) for x86_64 glibc, x86_64 musl and aarch64 musl: the three
//! answers differ only in the name of `dev_t`'s type, which is 64 bits wide in all. Written down, so that a build needs no libclang.

pub const BLKID_VERSION: &[u8; 7] = b"2.38.1\0";
pub const BLKID_DATE: &[u8; 12] = b"04-Aug-2022\0";
pub const BLKID_DEV_FIND: u32 = 0;
pub const BLKID_DEV_CREATE: u32 = 1;
pub const BLKID_DEV_VERIFY: u32 = 2;
pub const BLKID_DEV_NORMAL: u32 = 3;
pub const BLKID_SUBLKS_LABEL: u32 = 2;
pub const BLKID_SUBLKS_LABELRAW: u32 = 4;
pub const BLKID_SUBLKS_UUID: u32 = 8;
pub const BLKID_SUBLKS_UUIDRAW: u32 = 16;
pub const BLKID_SUBLKS_TYPE: u32 = 32;
pub const BLKID_SUBLKS_SECTYPE: u32 = 64;
pub const BLKID_SUBLKS_USAGE: u32 = 128;
pub const BLKID_SUBLKS_VERSION: u32 = 256;
pub const BLKID_SUBLKS_MAGIC: u32 = 512;
pub const BLKID_SUBLKS_BADCSUM: u32 = 1024;
pub const BLKID_SUBLKS_DEFAULT: u32 = 106;
pub const BLKID_FLTR_NOTIN: u32 = 1;
pub const BLKID_FLTR_ONLYIN: u32 = 2;
pub const BLKID_USAGE_FILESYSTEM: u32 = 2;
pub const BLKID_USAGE_RAID: u32 = 4;
pub const BLKID_USAGE_CRYPTO: u32 = 8;
pub const BLKID_USAGE_OTHER: u32 = 16;
pub const BLKID_PARTS_FORCE_GPT: u32 = 2;
pub const BLKID_PARTS_ENTRY_DETAILS: u32 = 4;
pub const BLKID_PARTS_MAGIC: u32 = 8;
pub const BLKID_PROBREQ_LABEL: u32 = 2;
pub const BLKID_PROBREQ_LABELRAW: u32 = 4;
pub const BLKID_PROBREQ_UUID: u32 = 8;
pub const BLKID_PROBREQ_UUIDRAW: u32 = 16;
pub const BLKID_PROBREQ_TYPE: u32 = 32;
pub const BLKID_PROBREQ_SECTYPE: u32 = 64;
pub const BLKID_PROBREQ_USAGE: u32 = 128;
pub const BLKID_PROBREQ_VERSION: u32 = 256;
pub type dev_t = u64;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct blkid_struct_dev {
    _unused: [u8; 0],
}
pub type blkid_dev = *mut blkid_struct_dev;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct blkid_struct_cache {
    _unused: [u8; 0],
}
pub type blkid_cache = *mut blkid_struct_cache;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct blkid_struct_probe {
    _unused: [u8; 0],
}
pub type blkid_probe = *mut blkid_struct_probe;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct blkid_struct_topology {
    _unused: [u8; 0],
}
pub type blkid_topology = *mut blkid_struct_topology;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct blkid_struct_partlist {
    _unused: [u8; 0],
}
pub type blkid_partlist = *mut blkid_struct_partlist;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct blkid_struct_partition {
    _unused: [u8; 0],
}
pub type blkid_partition = *mut blkid_struct_partition;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct blkid_struct_parttable {
    _unused: [u8; 0],
}
pub type blkid_parttable = *mut blkid_struct_parttable;
pub type blkid_loff_t = i64;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct blkid_struct_tag_iterate {
    _unused: [u8; 0],
}
pub type blkid_tag_iterate = *mut blkid_struct_tag_iterate;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct blkid_struct_dev_iterate {
    _unused: [u8; 0],
}
pub type blkid_dev_iterate = *mut blkid_struct_dev_iterate;
unsafe extern "C" {
    pub fn blkid_init_debug(mask: core::ffi::c_int);
    pub fn blkid_put_cache(cache: blkid_cache);
    pub fn blkid_get_cache(cache: *mut blkid_cache, filename: *const core::ffi::c_char) -> core::ffi::c_int;
    pub fn blkid_gc_cache(cache: blkid_cache);
    pub fn blkid_dev_devname(dev: blkid_dev) -> *const core::ffi::c_char;
    pub fn blkid_dev_iterate_begin(cache: blkid_cache) -> blkid_dev_iterate;
    pub fn blkid_dev_set_search(
        iter: blkid_dev_iterate,
        search_type: *const core::ffi::c_char,
        search_value: *const core::ffi::c_char,
    ) -> core::ffi::c_int;
    pub fn blkid_dev_next(iterate: blkid_dev_iterate, dev: *mut blkid_dev) -> core::ffi::c_int;
    pub fn blkid_dev_iterate_end(iterate: blkid_dev_iterate);
    pub fn blkid_devno_to_devname(devno: dev_t) -> *mut core::ffi::c_char;
    pub fn blkid_devno_to_wholedisk(dev: dev_t, diskname: *mut core::ffi::c_char, len: usize, diskdevno: *mut dev_t) -> core::ffi::c_int;
    pub fn blkid_probe_all(cache: blkid_cache) -> core::ffi::c_int;
    pub fn blkid_probe_all_new(cache: blkid_cache) -> core::ffi::c_int;
    pub fn blkid_probe_all_removable(cache: blkid_cache) -> core::ffi::c_int;
    pub fn blkid_get_dev(cache: blkid_cache, devname: *const core::ffi::c_char, flags: core::ffi::c_int) -> blkid_dev;
    pub fn blkid_get_dev_size(fd: core::ffi::c_int) -> blkid_loff_t;
    pub fn blkid_verify(cache: blkid_cache, dev: blkid_dev) -> blkid_dev;
    pub fn blkid_get_tag_value(
        cache: blkid_cache,
        tagname: *const core::ffi::c_char,
        devname: *const core::ffi::c_char,
    ) -> *mut core::ffi::c_char;
    pub fn blkid_get_devname(
        cache: blkid_cache,
        token: *const core::ffi::c_char,
        value: *const core::ffi::c_char,
    ) -> *mut core::ffi::c_char;
    pub fn blkid_tag_iterate_begin(dev: blkid_dev) -> blkid_tag_iterate;
    pub fn blkid_tag_next(
        iterate: blkid_tag_iterate,
        type_: *mut *const core::ffi::c_char,
        value: *mut *const core::ffi::c_char,
    ) -> core::ffi::c_int;
    pub fn blkid_tag_iterate_end(iterate: blkid_tag_iterate);
    pub fn blkid_dev_has_tag(dev: blkid_dev, type_: *const core::ffi::c_char, value: *const core::ffi::c_char) -> core::ffi::c_int;
    pub fn blkid_find_dev_with_tag(cache: blkid_cache, type_: *const core::ffi::c_char, value: *const core::ffi::c_char) -> blkid_dev;
    pub fn blkid_parse_tag_string(
        token: *const core::ffi::c_char,
        ret_type: *mut *mut core::ffi::c_char,
        ret_val: *mut *mut core::ffi::c_char,
    ) -> core::ffi::c_int;
    pub fn blkid_parse_version_string(ver_string: *const core::ffi::c_char) -> core::ffi::c_int;
    pub fn blkid_get_library_version(
        ver_string: *mut *const core::ffi::c_char,
        date_string: *mut *const core::ffi::c_char,
    ) -> core::ffi::c_int;
    pub fn blkid_encode_string(str_: *const core::ffi::c_char, str_enc: *mut core::ffi::c_char, len: usize) -> core::ffi::c_int;
    pub fn blkid_safe_string(str_: *const core::ffi::c_char, str_safe: *mut core::ffi::c_char, len: usize) -> core::ffi::c_int;
    pub fn blkid_send_uevent(devname: *const core::ffi::c_char, action: *const core::ffi::c_char) -> core::ffi::c_int;
    pub fn blkid_evaluate_tag(
        token: *const core::ffi::c_char,
        value: *const core::ffi::c_char,
        cache: *mut blkid_cache,
    ) -> *mut core::ffi::c_char;
    pub fn blkid_evaluate_spec(spec: *const core::ffi::c_char, cache: *mut blkid_cache) -> *mut core::ffi::c_char;
    pub fn blkid_new_probe() -> blkid_probe;
    pub fn blkid_new_probe_from_filename(filename: *const core::ffi::c_char) -> blkid_probe;
    pub fn blkid_free_probe(pr: blkid_probe);
    pub fn blkid_reset_probe(pr: blkid_probe);
    pub fn blkid_probe_reset_buffers(pr: blkid_probe) -> core::ffi::c_int;
    pub fn blkid_probe_hide_range(pr: blkid_probe, off: u64, len: u64) -> core::ffi::c_int;
    pub fn blkid_probe_set_device(pr: blkid_probe, fd: core::ffi::c_int, off: blkid_loff_t, size: blkid_loff_t) -> core::ffi::c_int;
    pub fn blkid_probe_get_devno(pr: blkid_probe) -> dev_t;
    pub fn blkid_probe_get_wholedisk_devno(pr: blkid_probe) -> dev_t;
    pub fn blkid_probe_is_wholedisk(pr: blkid_probe) -> core::ffi::c_int;
    pub fn blkid_probe_get_size(pr: blkid_probe) -> blkid_loff_t;
    pub fn blkid_probe_get_offset(pr: blkid_probe) -> blkid_loff_t;
    pub fn blkid_probe_get_sectorsize(pr: blkid_probe) -> core::ffi::c_uint;
    pub fn blkid_probe_set_sectorsize(pr: blkid_probe, sz: core::ffi::c_uint) -> core::ffi::c_int;
    pub fn blkid_probe_get_sectors(pr: blkid_probe) -> blkid_loff_t;
    pub fn blkid_probe_get_fd(pr: blkid_probe) -> core::ffi::c_int;
    pub fn blkid_probe_set_hint(pr: blkid_probe, name: *const core::ffi::c_char, value: u64) -> core::ffi::c_int;
    pub fn blkid_probe_reset_hints(pr: blkid_probe);
    pub fn blkid_known_fstype(fstype: *const core::ffi::c_char) -> core::ffi::c_int;
    pub fn blkid_superblocks_get_name(idx: usize, name: *mut *const core::ffi::c_char, usage: *mut core::ffi::c_int) -> core::ffi::c_int;
    pub fn blkid_probe_enable_superblocks(pr: blkid_probe, enable: core::ffi::c_int) -> core::ffi::c_int;
    pub fn blkid_probe_set_superblocks_flags(pr: blkid_probe, flags: core::ffi::c_int) -> core::ffi::c_int;
    pub fn blkid_probe_reset_superblocks_filter(pr: blkid_probe) -> core::ffi::c_int;
    pub fn blkid_probe_invert_superblocks_filter(pr: blkid_probe) -> core::ffi::c_int;
    pub fn blkid_probe_filter_superblocks_type(
        pr: blkid_probe,
        flag: core::ffi::c_int,
        names: *mut *mut core::ffi::c_char,
    ) -> core::ffi::c_int;
    pub fn blkid_probe_filter_superblocks_usage(pr: blkid_probe, flag: core::ffi::c_int, usage: core::ffi::c_int) -> core::ffi::c_int;
    pub fn blkid_probe_enable_topology(pr: blkid_probe, enable: core::ffi::c_int) -> core::ffi::c_int;
    pub fn blkid_probe_get_topology(pr: blkid_probe) -> blkid_topology;
    pub fn blkid_topology_get_alignment_offset(tp: blkid_topology) -> core::ffi::c_ulong;
    pub fn blkid_topology_get_minimum_io_size(tp: blkid_topology) -> core::ffi::c_ulong;
    pub fn blkid_topology_get_optimal_io_size(tp: blkid_topology) -> core::ffi::c_ulong;
    pub fn blkid_topology_get_logical_sector_size(tp: blkid_topology) -> core::ffi::c_ulong;
    pub fn blkid_topology_get_physical_sector_size(tp: blkid_topology) -> core::ffi::c_ulong;
    pub fn blkid_topology_get_dax(tp: blkid_topology) -> core::ffi::c_ulong;
    pub fn blkid_known_pttype(pttype: *const core::ffi::c_char) -> core::ffi::c_int;
    pub fn blkid_partitions_get_name(idx: usize, name: *mut *const core::ffi::c_char) -> core::ffi::c_int;
    pub fn blkid_probe_enable_partitions(pr: blkid_probe, enable: core::ffi::c_int) -> core::ffi::c_int;
    pub fn blkid_probe_reset_partitions_filter(pr: blkid_probe) -> core::ffi::c_int;
    pub fn blkid_probe_invert_partitions_filter(pr: blkid_probe) -> core::ffi::c_int;
    pub fn blkid_probe_filter_partitions_type(
        pr: blkid_probe,
        flag: core::ffi::c_int,
        names: *mut *mut core::ffi::c_char,
    ) -> core::ffi::c_int;
    pub fn blkid_probe_set_partitions_flags(pr: blkid_probe, flags: core::ffi::c_int) -> core::ffi::c_int;
    pub fn blkid_probe_get_partitions(pr: blkid_probe) -> blkid_partlist;
    pub fn blkid_partlist_numof_partitions(ls: blkid_partlist) -> core::ffi::c_int;
    pub fn blkid_partlist_get_table(ls: blkid_partlist) -> blkid_parttable;
    pub fn blkid_partlist_get_partition(ls: blkid_partlist, n: core::ffi::c_int) -> blkid_partition;
    pub fn blkid_partlist_get_partition_by_partno(ls: blkid_partlist, n: core::ffi::c_int) -> blkid_partition;
    pub fn blkid_partlist_devno_to_partition(ls: blkid_partlist, devno: dev_t) -> blkid_partition;
    pub fn blkid_partition_get_table(par: blkid_partition) -> blkid_parttable;
    pub fn blkid_partition_get_name(par: blkid_partition) -> *const core::ffi::c_char;
    pub fn blkid_partition_get_uuid(par: blkid_partition) -> *const core::ffi::c_char;
    pub fn blkid_partition_get_partno(par: blkid_partition) -> core::ffi::c_int;
    pub fn blkid_partition_get_start(par: blkid_partition) -> blkid_loff_t;
    pub fn blkid_partition_get_size(par: blkid_partition) -> blkid_loff_t;
    pub fn blkid_partition_get_type(par: blkid_partition) -> core::ffi::c_int;
    pub fn blkid_partition_get_type_string(par: blkid_partition) -> *const core::ffi::c_char;
    pub fn blkid_partition_get_flags(par: blkid_partition) -> core::ffi::c_ulonglong;
    pub fn blkid_partition_is_logical(par: blkid_partition) -> core::ffi::c_int;
    pub fn blkid_partition_is_extended(par: blkid_partition) -> core::ffi::c_int;
    pub fn blkid_partition_is_primary(par: blkid_partition) -> core::ffi::c_int;
    pub fn blkid_parttable_get_type(tab: blkid_parttable) -> *const core::ffi::c_char;
    pub fn blkid_parttable_get_id(tab: blkid_parttable) -> *const core::ffi::c_char;
    pub fn blkid_parttable_get_offset(tab: blkid_parttable) -> blkid_loff_t;
    pub fn blkid_parttable_get_parent(tab: blkid_parttable) -> blkid_partition;
    pub fn blkid_do_probe(pr: blkid_probe) -> core::ffi::c_int;
    pub fn blkid_do_safeprobe(pr: blkid_probe) -> core::ffi::c_int;
    pub fn blkid_do_fullprobe(pr: blkid_probe) -> core::ffi::c_int;
    pub fn blkid_probe_numof_values(pr: blkid_probe) -> core::ffi::c_int;
    pub fn blkid_probe_get_value(
        pr: blkid_probe,
        num: core::ffi::c_int,
        name: *mut *const core::ffi::c_char,
        data: *mut *const core::ffi::c_char,
        len: *mut usize,
    ) -> core::ffi::c_int;
    pub fn blkid_probe_lookup_value(
        pr: blkid_probe,
        name: *const core::ffi::c_char,
        data: *mut *const core::ffi::c_char,
        len: *mut usize,
    ) -> core::ffi::c_int;
    pub fn blkid_probe_has_value(pr: blkid_probe, name: *const core::ffi::c_char) -> core::ffi::c_int;
    pub fn blkid_do_wipe(pr: blkid_probe, dryrun: core::ffi::c_int) -> core::ffi::c_int;
    pub fn blkid_probe_step_back(pr: blkid_probe) -> core::ffi::c_int;
    pub fn blkid_probe_set_request(pr: blkid_probe, flags: core::ffi::c_int) -> core::ffi::c_int;
    pub fn blkid_probe_filter_usage(pr: blkid_probe, flag: core::ffi::c_int, usage: core::ffi::c_int) -> core::ffi::c_int;
    pub fn blkid_probe_filter_types(pr: blkid_probe, flag: core::ffi::c_int, names: *mut *mut core::ffi::c_char) -> core::ffi::c_int;
    pub fn blkid_probe_invert_filter(pr: blkid_probe) -> core::ffi::c_int;
    pub fn blkid_probe_reset_filter(pr: blkid_probe) -> core::ffi::c_int;
}
