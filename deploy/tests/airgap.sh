#!/usr/bin/env bash
# Without internet: images and bundle of the release binaries, pushed to a registry on loopback, pulled by containerd through a mirror configuration, and run by runc:
# the controller as uid 65532 on a read-only root against the Proxmox simulator, the node agent answering Probe. Called by scripts/deploy-check.
#   deploy/tests/airgap.sh BINARIES SIMULATOR
set -euo pipefail
cd "$(dirname "$0")/../.."
binaries=$1 simulator=$2
# shellcheck source=/dev/null
. <(scripts/tools paths deploy)
work=$(mktemp -d /tmp/airgap.XXXXXX)
pids=()
finish() {
  # Ours alone, newest first; containerd's shims go with their tasks.
  for id in node controller; do ctr_ tasks kill -s KILL "$id"; ctr_ tasks delete -f "$id"; ctr_ containers delete "$id"; done >/dev/null 2>&1 || true
  for ((index = ${#pids[@]} - 1; index >= 0; index--)); do kill "${pids[index]}" 2>/dev/null || true; wait "${pids[index]}" 2>/dev/null || true; done
  rm -rf "$work"
}
trap finish EXIT
ctr_() { ctr -a "$work/containerd.sock" -n airgap "$@"; }
port() { /usr/bin/python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
# until_ SECONDS WHAT COMMAND…: waits for a condition, up to a limit.
until_() {
  local end=$((SECONDS + $1)) what=$2; shift 2
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$end" ] || { echo "airgap: $what did not come"; tail -n 5 "$work"/*.log; return 1; }
    sleep 0.1
  done
}
said() { printf 'ok      %s\n' "$*"; }

# The same bytes each time, within their sizes (assemble.py fails above).
scripts/images --binaries "$binaries" --to "$work/images" >"$work/images.txt"
scripts/images --binaries "$binaries" --to "$work/again" >/dev/null
diff -r "$work/images" "$work/again" >/dev/null || { echo "airgap: two runs of scripts/images differ"; exit 1; }
rm -r "$work/again"
scripts/images --binaries "$binaries" --rootfs amd64 --to "$work/rootfs"
mkdir "$work/layout"; tar -C "$work/layout" -xf "$work/images/proxmox-csi-node-linux-amd64.oci.tar"
layer=$(find "$work/layout/blobs/sha256" -type f -size +1M)
[ "$(tar -tf "$layer" | grep -v '/$' | LC_ALL=C sort)" = "$(cd "$work/rootfs/node" && find . -type f -printf '%P\n' | LC_ALL=C sort)" ] ||
  { echo "airgap: the Containerfile's files are not the image's"; exit 1; }
cat "$work/images.txt"; said "images: the same bytes twice"

scripts/bundle --images "$work/images" --to "$work" | sed 's/^SKIPPED/  SKIPPED/'
mkdir "$work/unpacked"; tar -C "$work/unpacked" -xf "$work"/*.bundle.tar
bundle=$(echo "$work"/unpacked/*)
(cd "$bundle" && sha256sum -c --quiet SHA256SUMS)
[ "$(grep -c -E '^[^ @]+:[^ @]+@sha256:[0-9a-f]{64}$' "$bundle/images.txt")" = "$(wc -l <"$bundle/images.txt")" ] || { echo "airgap: images.txt: a line without a digest"; exit 1; }
for manifest in "$bundle"/manifests/install*.yaml "$bundle"/talos/proxmox-csi*.yaml; do
  while read -r image; do grep -qxF "$image" "$bundle/images.txt" || { echo "airgap: $manifest runs $image, which images.txt does not have"; exit 1; }; done \
    < <(sed -nE 's/^ *(- )?image: //p' "$manifest")
done
helm template x "$bundle"/*.tgz --kube-version 1.37.0 | sed -nE 's/^ *(- )?image: //p' | while read -r image; do
  grep -qxF "$image" "$bundle/images.txt" || { echo "airgap: the bundle's chart runs $image, which images.txt does not have"; exit 1; }
done
said "bundle: every image by digest, in images.txt, checksums right"

# One byte more on its way, a file that went, a line of another image: nothing is pushed.
for damage in byte gone line; do
  cp -r "$bundle" "$work/damaged"
  case $damage in
    byte) printf x >>"$work/damaged/images/proxmox-csi-node.oci.tar" ;;
    gone) rm "$work/damaged/images/proxmox-csi-controller.oci.tar" ;;
    line) sed -i '1s/sha256:./sha256:x/' "$work/damaged/images.txt" ;;
  esac
  if scripts/mirror --insecure 127.0.0.1:9 "$work/damaged" >"$work/damaged.txt" 2>&1; then echo "airgap: a damaged bundle ($damage) is pushed"; exit 1; fi
  grep -q '^mirror: the bundle is damaged' "$work/damaged.txt" || { cat "$work/damaged.txt"; exit 1; }
  rm -r "$work/damaged"
done
said "mirror: a bundle that is damaged is refused before anything is pushed"

registry=127.0.0.1:$(port)
registry -port "${registry#*:}" >"$work/registry.log" 2>&1 & pids+=($!)
until_ 20 "the registry" curl -sf "http://$registry/v2/"
# The sidecars are not in a bundle made here: those lines are not ours to fail.
scripts/mirror --insecure "$registry" "$work"/*.bundle.tar >"$work/mirror.txt" 2>"$work/mirror.log" || ! grep -q WRONG "$work/mirror.txt"
[ "$(grep -c "^pushed $registry/proxmox-csi/" "$work/mirror.txt")" = 2 ] || { cat "$work/mirror.txt"; exit 1; }
sed -E 's/^NOT PUSHED ([^:]*:[^@]*).*/  SKIPPED: \1 cannot be fetched here/; s/^pushed/ok      pushed/' "$work/mirror.txt"

# What a node's containerd has with machine.registries.mirrors or RegistryMirrorConfig.
mkdir -p "$work/hosts/ghcr.io"
printf 'server = "https://ghcr.io"\n[host."http://%s"]\n  capabilities = ["pull", "resolve"]\n' "$registry" >"$work/hosts/ghcr.io/hosts.toml"
printf 'version = 2\nroot = "%s/root"\nstate = "%s/state"\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\n  address = "%s/containerd.sock"\n[ttrpc]\n  address = "%s/ttrpc.sock"\n' "$work" "$work" "$work" "$work" >"$work/containerd.toml"
containerd -c "$work/containerd.toml" >"$work/containerd.log" 2>&1 & pids+=($!)
until_ 20 containerd ctr_ version
driver=$(sed -nE 's#^ghcr.io/proxmox-csi/#&#p' "$bundle/images.txt")
[ "$(wc -l <<<"$driver")" = 2 ] || { echo "airgap: images.txt does not have both images: $driver"; exit 1; }
for image in $driver; do ctr_ images pull --snapshotter native --hosts-dir "$work/hosts" "$image" >"$work/pull.log" 2>&1 || { tail -n 3 "$work/pull.log"; exit 1; }; done
said "containerd pulled both by digest through the mirror, with no way to ghcr.io"

api=127.0.0.1:$(port)
"$simulator" --listen "$api" --fast >"$work/simulator.log" 2>&1 & pids+=($!)
until_ 30 "the simulator" grep -q "^token" "$work/simulator.log"
mkdir -p "$work"/{controller,config,node,kubelet/plugins_registry}
chown 65532:65532 "$work/controller"; chmod 755 "$work"
token=$(sed -n 's/^token *//p' "$work/simulator.log")
cat >"$work/config/config.yaml" <<CONFIG
clusters:
  - url: http://$api/api2/json
    token_id: "${token%%=*}"
    token_secret: "${token#*=}"
    region: fsn1
CONFIG
controller=$(grep controller <<<"$driver") node=$(grep proxmox-csi-node <<<"$driver")
bind() { echo "type=bind,src=$1,dst=$2,options=rbind:$3"; }
# The user is the image's own; ctr takes the whole command where it is given arguments.
ctr_ run -d --snapshotter native --read-only --net-host --mount "$(bind "$work/controller" /csi rw)" --mount "$(bind "$work/config" /etc/proxmox ro)" "$controller" controller \
  /proxmox-csi-controller -v=2 --csi-address=unix:///csi/csi.sock --cloud-config=/etc/proxmox/config.yaml >"$work/controller.log" 2>&1 ||
  { echo "airgap: runc: $(tail -n 3 "$work/controller.log")"; exit 1; }
ctr_ run -d --snapshotter native --read-only --privileged --net-host --mount "$(bind "$work/node" /csi rw)" --mount "$(bind "$work/kubelet" "$work/kubelet" rw)" "$node" node \
  /proxmox-csi-node -v=2 --csi-address=unix:///csi/csi.sock --node-id=airgap --region=fsn1 --zone=pve1 --kubelet-dir="$work/kubelet" >"$work/node.log" 2>&1 ||
  { echo "airgap: runc: $(tail -n 3 "$work/node.log")"; exit 1; }
until_ 20 "the controller's socket" test -S "$work/controller/csi.sock"
until_ 20 "the node's socket" test -S "$work/node/csi.sock"
pid=$(ctr_ tasks ls | awk '$1 == "controller" { print $2 }')
[ "$(awk '/^Uid:/ { print $2 $3 $4 $5 }' "/proc/$pid/status")" = 65532655326553265532 ] || { echo "airgap: the controller is not uid 65532"; exit 1; }
awk '$5 == "/" && $6 ~ /(^|,)ro(,|$)/ { found = 1 } END { exit !found }' "/proc/$pid/mountinfo" || { echo "airgap: the controller's root is writable"; exit 1; }
[ "$(stat -c %s "/proc/$pid/root/etc/ssl/certs/ca-certificates.crt")" -gt 100000 ] || { echo "airgap: the CA roots are missing"; exit 1; }
[ -s "/proc/$pid/root/licenses/NOTICE" ] || { echo "airgap: the licences are missing"; exit 1; }

sanity() { "$CSI_SANITY" --csi.endpoint="unix://$1" --ginkgo.no-color --ginkgo.focus="$2" "${@:3}" >"$work/sanity.log" 2>&1 || { tail -n 60 "$work/sanity.log"; return 1; }; grep -oE 'Ran [0-9]+ of' "$work/sanity.log" | grep -qv 'Ran 0'; }
sanity "$work/node/csi.sock" 'Identity Service.*' || { echo "airgap: the node agent does not answer Probe"; exit 1; }
said "runc: the node agent answers Probe"
printf 'storage: local-lvm\n' >"$work/parameters.yaml"
sanity "$work/controller/csi.sock" 'Identity Service.*' || { echo "airgap: the controller does not answer Probe"; exit 1; }
sanity "$work/node/csi.sock" 'CreateVolume.*(should fail when no name|should return appropriate values SingleNodeWriter)|GetCapacity' \
  --csi.controllerendpoint="unix://$work/controller/csi.sock" --csi.testvolumesize=67108864 --csi.mountdir="$work/kubelet/mount" --csi.stagingdir="$work/kubelet/staging" --csi.testvolumeparameters="$work/parameters.yaml" || { echo "airgap: the controller does not do its work"; exit 1; }
curl -s "http://$api/_sim/requests" | grep -q 'storage/local-lvm/content' || { echo "airgap: the simulator was not asked for a volume"; exit 1; }
said "runc: the controller as uid 65532 on a read-only root: $(grep -oE 'Ran [0-9]+ of' "$work/sanity.log" | grep -oE '[0-9]+') of csi-sanity's specs, against the simulator"
