//! The guest's one interface, set up over rtnetlink: there is no `ip` here, and the kernel has no `ip=`.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, bail};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

// include/uapi/linux/rtnetlink.h and netlink.h
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const HEADER_BYTES: usize = 16;
const AF_INET: u8 = 2;
const IFF_UP: u32 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;

/// Gives `name` its address and the default route; brings `lo` up.
pub(crate) fn up(name: &str, address: Ipv4Addr, prefix: u8, gateway: Ipv4Addr) -> Result<()> {
    // NETLINK_ROUTE is protocol 0, which rustix writes as None.
    let socket =
        rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None).context("socket(AF_NETLINK)")?;
    let index = index_of(name)?;
    call(&socket, RTM_NEWLINK, &link_up(index_of("lo")?)).context("lo up")?;
    call(&socket, RTM_NEWLINK, &link_up(index)).with_context(|| format!("{name} up"))?;
    // struct ifaddrmsg: family, prefix length, flags, scope, index.
    let mut message = vec![AF_INET, prefix, 0, 0];
    message.extend(index.to_ne_bytes());
    attribute(&mut message, IFA_LOCAL, &address.octets());
    attribute(&mut message, IFA_ADDRESS, &address.octets());
    call(&socket, RTM_NEWADDR, &message).with_context(|| format!("address {address}/{prefix} on {name}"))?;
    // struct rtmsg: family, destination, source and TOS 0, table, protocol, scope, type, flags.
    let mut message = vec![AF_INET, 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, 0, RTN_UNICAST, 0, 0, 0, 0];
    attribute(&mut message, RTA_GATEWAY, &gateway.octets());
    attribute(&mut message, RTA_OIF, &index.to_ne_bytes());
    call(&socket, RTM_NEWROUTE, &message).with_context(|| format!("default route by {gateway}"))
}

fn index_of(name: &str) -> Result<u32> {
    let path = format!("/sys/class/net/{name}/ifindex");
    std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?.trim().parse().with_context(|| format!("parse {path}"))
}

/// struct ifinfomsg: family, padding, type, index, flags, change mask.
fn link_up(index: u32) -> Vec<u8> {
    let mut message = vec![0; 4];
    for word in [index, IFF_UP, IFF_UP] {
        message.extend(word.to_ne_bytes());
    }
    message
}

/// struct rtattr: length with its 4 bytes of header, kind, value; our values are all 4 bytes long, so nothing is padded.
fn attribute(message: &mut Vec<u8>, kind: u16, value: &[u8; 4]) {
    message.extend(8_u16.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
}

/// struct nlmsghdr: length, type, flags, sequence, port; the kernel acknowledges with an NLMSG_ERROR that carries the errno or 0.
fn call(socket: &OwnedFd, kind: u16, payload: &[u8]) -> Result<()> {
    let mut message = u32::try_from(HEADER_BYTES + payload.len())?.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(payload);
    rustix::net::sendto(socket, &message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0)).context("send to rtnetlink")?;
    let mut answer = [0_u8; 4096];
    let (received, _) = rustix::net::recv(socket, answer.as_mut_slice(), RecvFlags::empty()).context("receive from rtnetlink")?;
    let answer = answer.get(..received).unwrap_or_default();
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    let error = answer.get(HEADER_BYTES..HEADER_BYTES + 4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, error) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(error)) => Err(std::io::Error::from_raw_os_error(error.saturating_neg()).into()),
        _ => bail!("rtnetlink answered {received} bytes of type {kind:?}"),
    }
}
