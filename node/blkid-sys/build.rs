//! Compiles libblkid from util-linux's release as `scripts/tools build` unpacked it, checksum checked. Nothing of it is in this tree.
//!
//! Only files under the LGPL, BSD-3 or in the public domain are compiled (docs/decisions.md). Same input, same bytes: no path of
//! this machine and no date gets into the objects.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs};

const RELEASE: &str = "util-linux-2.38.1";

/// The parts of util-linux's own common code that libblkid calls.
const COMMON: &[&str] = &["blkdev", "canonicalize", "crc32", "crc32c", "encode", "env", "fileutils", "md5", "path", "strutils", "sysfs"];

/// libblkid's folders, compiled whole.
const LIBBLKID: &[&str] = &["libblkid/src", "libblkid/src/superblocks", "libblkid/src/partitions", "libblkid/src/topology"];

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => {
            eprintln!("{sentence}");
            ExitCode::FAILURE
        }
    }
}

/// Where scripts/tools keeps what it fetches.
fn cache() -> Result<PathBuf, String> {
    for name in ["PROXMOX_CSI_CACHE", "XDG_CACHE_HOME", "HOME"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("PROXMOX_CSI_CACHE")
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("proxmox-csi")))
        .or_else(|| Some(set("HOME")?.join(".cache/proxmox-csi")))
        .ok_or_else(|| "none of PROXMOX_CSI_CACHE, XDG_CACHE_HOME and HOME is set: where is libblkid's source?".to_owned())
}

fn build() -> Result<(), String> {
    let release = cache()?.join(RELEASE);
    let complete = release.join(".complete");
    println!("cargo:rerun-if-changed={}", complete.display());
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=c");
    if !complete.exists() {
        return Err(format!("libblkid's source is not in {}: run `scripts/tools build`", release.display()));
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo set no OUT_DIR")?);
    write_header(&release, &out)?;

    let probe = release.join("libblkid/src/probe.c");
    let sources = sources(&release)?;
    let mut whole = compiler(&release, &out);
    whole.files(sources.iter().filter(|source| **source != probe));
    // probe.c is the one file that reads the device: src/witness.rs sees each read.
    let mut witnessed = compiler(&release, &out);
    witnessed.file(&probe);
    for call in ["read", "lseek", "calloc"] {
        witnessed.define(call, format!("proxmox_csi_blkid_{call}").as_str());
    }
    for object in witnessed.try_compile_intermediates().map_err(|cause| cause.to_string())? {
        whole.object(object);
    }
    whole.try_compile("blkid").map_err(|cause| cause.to_string())
}

fn compiler(release: &Path, out: &Path) -> cc::Build {
    let mut build = cc::Build::new();
    build
        .opt_level_str("s")
        .debug(false)
        .warnings(false)
        .include("c")
        .include(out)
        .include(release.join("include"))
        .include(release.join("libblkid/src"))
        // cc's own `-include` flag, before every file.
        .flag("-include")
        .flag("c/config.h")
        .flag("-std=gnu11")
        .flag("-w")
        // What is on a disk is written by strangers.
        .flag("-fstack-protector-strong")
        // A distribution's default would turn `read` into a macro of its own.
        .flag("-U_FORTIFY_SOURCE")
        .flag(format!("-ffile-prefix-map={}={RELEASE}", release.display()))
        .flag(format!("-ffile-prefix-map={}=out", out.display()));
    build
}

/// `blkid.h` comes as a template with its version left out.
fn write_header(release: &Path, out: &Path) -> Result<(), String> {
    let template = release.join("libblkid/src/blkid.h.in");
    let text = fs::read_to_string(&template).map_err(|cause| format!("{}: {cause}", template.display()))?;
    let text = text.replace("@LIBBLKID_VERSION@", "2.38.1").replace("@LIBBLKID_DATE@", "04-Aug-2022");
    fs::write(out.join("blkid.h"), text).map_err(|cause| format!("{}: {cause}", out.display()))
}

/// Sorted: a folder lists its files in no order, and the archive keeps ours.
fn sources(release: &Path) -> Result<Vec<PathBuf>, String> {
    let mut sources: Vec<PathBuf> = COMMON.iter().map(|name| release.join("lib").join(format!("{name}.c"))).collect();
    for folder in LIBBLKID {
        let folder = release.join(folder);
        let entries = fs::read_dir(&folder).map_err(|cause| format!("{}: {cause}", folder.display()))?;
        for entry in entries {
            let path = entry.map_err(|cause| format!("{}: {cause}", folder.display()))?.path();
            if path.extension().is_some_and(|extension| extension == "c") {
                sources.push(path);
            }
        }
    }
    sources.sort();
    Ok(sources)
}
