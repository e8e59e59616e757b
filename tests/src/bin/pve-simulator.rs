//! A Proxmox VE cluster to try things on: starts the simulator, prints where it is and what to ask it, and runs until Ctrl-C.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use testbed::sim::{Builder, Description, Latency, Simulator, Time, Version};

const HELP: &str = "\
pve-simulator: a Proxmox VE cluster's API, simulated; images are real files, nothing else is.

  --listen ADDRESS     where to listen                 [127.0.0.1:8006]
  --https              with a certificate made now; its PEM goes to ROOT/certificate.pem
  --root FOLDER        keep the images here            [a temporary folder, removed at the end]
  --description FILE   YAML or JSON, as tests/src/sim/describe.rs says
                       [one cluster fsn1, host pve1, running VMs 101 and 102,
                        storages local (dir), local-lvm (lvmthin), local-zfs (zfspool), thick-lvm (lvm),
                        token csi@pve!csi with the driver's role]
  --version RELEASE    8.2, 8.4, 9.0 or 9.2            [9.2]
  --fast               no added waits, and jump over those that Proxmox has (3 s on 401, 10 s on locks, 30 s to a 596)
  --help
";

struct Arguments {
    builder: Builder,
    standard: bool,
    https: bool,
}

fn read_arguments(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<Option<Arguments>> {
    let mut listen: SocketAddr = SocketAddr::from(([127, 0, 0, 1], 8006));
    let (mut https, mut fast) = (false, false);
    let (mut root, mut description): (Option<PathBuf>, Option<PathBuf>) = (None, None);
    let mut version = Version::default();
    while let Some(argument) = arguments.next() {
        let (name, inline) = argument.split_once('=').map_or((argument.as_str(), None), |(name, value)| (name, Some(value.to_owned())));
        let mut value = || inline.clone().or_else(|| arguments.next()).with_context(|| format!("{name} needs a value; see --help"));
        match name {
            "--help" | "-h" => return Ok(None),
            "--https" => https = true,
            "--fast" => fast = true,
            "--listen" => listen = value()?.parse().context("--listen: an address such as 127.0.0.1:8006")?,
            "--root" => root = Some(value()?.into()),
            "--description" => description = Some(value()?.into()),
            "--version" => version = value()?.parse().map_err(anyhow::Error::msg)?,
            _ => bail!("unknown argument {argument:?}; see --help"),
        }
    }
    let standard = description.is_none();
    let described = match description {
        Some(file) => {
            let text = std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
            serde_yaml::from_str(&text).with_context(|| format!("understand {}", file.display()))?
        }
        None => Description::standard(),
    };
    let mut builder = Simulator::builder(described).version(version).listen(listen);
    if !fast {
        builder = builder.time(Time::Real).latency(Latency::RECORDED);
    }
    if https {
        builder = builder.https();
    }
    if let Some(root) = root {
        builder = builder.root(root);
    }
    Ok(Some(Arguments { builder, standard, https }))
}

fn greet(sim: &Simulator, standard: bool, https: bool) -> anyhow::Result<()> {
    let (url, base) = (sim.url(), sim.url().trim_end_matches("/api2/json"));
    println!("url    {url}");
    println!("images {}", sim.root().display());
    let mut trust = String::new();
    if let Some(pem) = sim.certificate_pem() {
        let file = sim.root().join("certificate.pem");
        std::fs::write(&file, pem).with_context(|| format!("write {}", file.display()))?;
        println!("cert   {}", file.display());
        trust = format!("--cacert {} ", file.display());
    }
    let flags = if https { trust } else { String::new() };
    if standard {
        let token = sim.token();
        println!("token  {token}\n\ntry:\n  auth='Authorization: PVEAPIToken={token}'");
        println!("  curl {flags}-H \"$auth\" {url}/cluster/resources");
        println!("  curl {flags}-H \"$auth\" {url}/nodes/pve1/storage/local-lvm/content -d vmid=9999 -d filename=vm-9999-try -d size=1G");
        println!("  curl {flags}-H \"$auth\" -X PUT {url}/nodes/pve1/qemu/101/config -d scsi1=local-lvm:vm-9999-try");
        println!("  curl {flags}-H \"$auth\" {url}/nodes/pve1/qemu/101/status/current   # blockstat: what is really plugged");
    }
    println!("  curl {flags}{base}/_sim/counters    # also /_sim/vms, /_sim/requests, /_sim/tasks");
    println!(
        "  curl {flags}{base}/_sim/faults -d '{{\"method\":\"PUT\",\"path\":\"/nodes/*/qemu/*/config\",\"effect\":{{\"answer\":{{\"status\":500,\"reason\":\"no\"}}}}}}'"
    );
    Ok(())
}

async fn run() -> anyhow::Result<()> {
    let Some(arguments) = read_arguments(std::env::args().skip(1))? else {
        print!("{HELP}");
        return Ok(());
    };
    let sim = arguments.builder.start().await?;
    greet(&sim, arguments.standard, arguments.https)?;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted?,
        _ = terminate.recv() => {}
    }
    Ok(())
}

fn main() -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("pve-simulator: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pve-simulator: {error:#}");
            ExitCode::FAILURE
        }
    }
}
