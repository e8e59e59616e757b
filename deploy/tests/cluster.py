#!/usr/bin/env python3
"""A real Kubernetes control plane (etcd, API server, controllers, scheduler) and the real sidecars, with the objects and arguments of
deploy/install.yaml and our controller, against the Proxmox simulator: three hosts, six nodes that have no kubelet. What is judged is what
others do with our answers: claims bound where their pods can run, disks attached, grown and detached, room told to the scheduler, a
controller killed, and each account's rights. Called by `scripts/soak kubernetes`; nodes' own work is the guest's (tests/tests/node).

  cluster.py KUBERNETES CONTROLLER SIMULATOR    the folder of Kubernetes' binaries (scripts/tools kubernetes), our two
"""

import collections
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

NAMESPACE = "csi-proxmox"
DRIVER = "csi.proxmox.sinextra.dev"
HOSTS = ["pve1", "pve2", "pve3"]
VMS = {100 * (1 + host) + nth: HOSTS[host] for host in range(3) for nth in (1, 2)}
SECRET = "c5100000-0000-4000-8000-00000000c510"
CLAIMS = 20
# A loaded machine of two cores takes its time.
PATIENCE_SECONDS = 300
GIB = 1 << 30


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def openssl(*arguments):
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


class Process:
    """A program that is started again when it ends, as kubelet does, until it is stopped."""

    def __init__(self, name, arguments, work, env=None, restart=True):
        self.name, self.arguments, self.env, self.restart = name, arguments, {**os.environ, **(env or {})}, restart
        self.log = os.path.join(work, name.replace("/", "-") + ".log")
        self.stopped, self.starts, self.child = False, 0, None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        with open(self.log, "ab", buffering=0) as log:
            while not self.stopped:
                self.starts += 1
                self.child = subprocess.Popen(self.arguments, stdout=log, stderr=log, env=self.env, start_new_session=True)
                self.child.wait()
                if not self.restart:
                    return
                time.sleep(1)

    def said(self):
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return log.read()

    def kill(self, how=signal.SIGKILL):
        if self.child and self.child.poll() is None:
            os.killpg(self.child.pid, how)

    def stop(self):
        self.stopped = True
        self.kill(signal.SIGTERM)
        try:
            self.child.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()


class Cluster:
    def __init__(self, kubernetes, controller, simulator, work):
        self.kubernetes, self.controller, self.work = kubernetes, controller, work
        self.processes, self.api_port = {}, free_port()
        self.start_proxmox(simulator)
        self.start_control_plane()

    def start(self, name, *arguments, env=None, restart=True):
        self.processes[name] = Process(name, [str(one) for one in arguments], self.work, env, restart)
        return self.processes[name]

    def binary(self, name):
        return os.path.join(self.kubernetes, name)

    def path(self, name):
        return os.path.join(self.work, name)

    def write(self, name, text):
        with open(self.path(name), "w", encoding="utf-8") as file:
            file.write(text if isinstance(text, str) else json.dumps(text))
        return self.path(name)

    # --- Proxmox ---

    def start_proxmox(self, simulator):
        vm = lambda vmid, host: {"vmid": vmid, "node": host, "running": True, "config": {
            "name": f"worker-{vmid}", "ostype": "l26", "scsihw": "virtio-scsi-single", "boot": "order=scsi0", "hotplug": "disk,network,usb",
            "scsi0": f"local:{vmid}/vm-{vmid}-disk-0.raw,size=1G"}}
        description = {
            "cluster": "fsn1",
            "nodes": [{"name": host} for host in HOSTS],
            "storages": [
                {"id": "local", "type": "dir", "options": {"path": "/var/lib/vz"}},
                {"id": "fast", "type": "lvmthin", "options": {"vgname": "pve", "thinpool": "data"}},
                {"id": "san", "type": "lvm", "shared": True, "options": {"vgname": "san"}},
            ],
            "vms": [vm(vmid, host) for vmid, host in VMS.items()],
            "users": [{"id": "csi@pve", "tokens": [{"id": "csi", "secret": SECRET, "privsep": False}]}],
            "roles": {"CSI": ["VM.Audit", "VM.Config.Disk", "Datastore.Audit", "Datastore.AllocateSpace", "Datastore.Allocate", "Sys.Audit"]},
            "acl": [{"path": "/", "who": "csi@pve", "role": "CSI"}],
        }
        address = f"127.0.0.1:{free_port()}"
        self.proxmox_url = f"http://{address}/api2/json"
        proxmox = self.start("proxmox", simulator, "--listen", address, "--fast", "--description", self.write("proxmox.json", description), restart=False)
        until("the simulator", lambda: "url " in proxmox.said())

    def proxmox(self, path):
        request = urllib.request.Request(self.proxmox_url + path, headers={"Authorization": f"PVEAPIToken=csi@pve!csi={SECRET}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["data"]

    def volumes(self):
        """Where each of our volumes is: its name to hosts."""
        found = collections.defaultdict(set)
        for host in HOSTS:
            for storage in ("fast", "san", "local"):
                for one in self.proxmox(f"/nodes/{host}/storage/{storage}/content?content=images"):
                    if "9999" in one["volid"]:
                        found[one["volid"]].add(host)
        return found

    def plugged(self):
        """Our drives: volid to VMIDs."""
        found = collections.defaultdict(list)
        for vmid, host in VMS.items():
            for key, value in self.proxmox(f"/nodes/{host}/qemu/{vmid}/config").items():
                if key.startswith("scsi") and key[4:].isdigit() and "9999" in str(value):
                    found[value.split(",")[0]].append(vmid)
        return found

    # --- Kubernetes ---

    def start_control_plane(self):
        etcd, peer = f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
        self.start("etcd", self.binary("etcd"), "--data-dir", self.path("etcd"), "--unsafe-no-fsync", "--listen-client-urls", etcd, "--advertise-client-urls", etcd,
                   "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}", "--log-level", "error", restart=False)
        key, ca, request, certificate = (self.path(name) for name in ("key.pem", "ca.pem", "request.pem", "certificate.pem"))
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", self.path("ca-key.pem"), "-out", ca, "-days", "2", "-subj", "/CN=ca",
                "-addext", "basicConstraints=critical,CA:TRUE")
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request, "-subj", "/CN=kube-apiserver")
        names = self.write("names", "subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        openssl("x509", "-req", "-in", request, "-CA", ca, "-CAkey", self.path("ca-key.pem"), "-CAcreateserial", "-out", certificate, "-days", "2", "-extfile", names)
        tokens = {"admin": "system:masters", "system:kube-controller-manager": "", "system:kube-scheduler": ""}
        self.write("tokens.csv", "".join(f'token-{user.rsplit(":")[-1]},{user},{user},"{groups}"\n' for user, groups in tokens.items()))
        configs = {user: self.kubeconfig(user.rsplit(":")[-1], f'token-{user.rsplit(":")[-1]}') for user in tokens}
        self.admin = configs["admin"]
        self.start("kube-apiserver", self.binary("kube-apiserver"), "--etcd-servers", etcd, "--bind-address", "127.0.0.1", "--secure-port", self.api_port,
                   "--tls-cert-file", certificate, "--tls-private-key-file", key, "--token-auth-file", self.path("tokens.csv"), "--authorization-mode", "Node,RBAC",
                   "--service-account-key-file", key, "--service-account-signing-key-file", key, "--service-account-issuer", "https://kubernetes.default.svc",
                   "--service-cluster-ip-range", "10.0.0.0/24", "--disable-admission-plugins", "TaintNodesByCondition", "--anonymous-auth=false", "--allow-privileged")
        until("the API server", lambda: self.kubectl("get", "--raw", "/readyz", check=False).stdout == "ok")
        self.start("kube-controller-manager", self.binary("kube-controller-manager"), "--kubeconfig", configs["system:kube-controller-manager"], "--use-service-account-credentials",
                   "--service-account-private-key-file", key, "--root-ca-file", ca, "--controllers", "*,-node-lifecycle-controller,-taint-eviction-controller", "--secure-port=0",
                   "--leader-elect=false")
        self.start("kube-scheduler", self.binary("kube-scheduler"), "--kubeconfig", configs["system:kube-scheduler"], "--secure-port=0", "--leader-elect=false")

    def kubeconfig(self, name, token):
        return self.write(f"{name}.kubeconfig", {
            "apiVersion": "v1", "kind": "Config", "current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}],
            "clusters": [{"name": "c", "cluster": {"server": f"https://127.0.0.1:{self.api_port}", "certificate-authority": self.path("ca.pem")}}],
            "users": [{"name": "u", "user": {"token": token}}]})

    def kubectl(self, *arguments, given=None, check=True):
        done = subprocess.run([self.binary("kubectl"), "--kubeconfig", self.admin, *arguments], input=given, capture_output=True, text=True, timeout=120)
        if check and done.returncode != 0:
            raise Failed(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done

    def apply(self, *objects):
        self.kubectl("apply", "--validate=strict", "-f", "-", given="\n---\n".join(json.dumps(one) for one in objects))

    def get(self, *what):
        return json.loads(self.kubectl("get", "-o", "json", *what).stdout)["items"]

    def events(self, reason):
        return [one for one in self.get("events", "-A") if one["reason"] == reason]

    def install(self):
        """deploy/install.yaml as it is; nodes as their kubelets would make them."""
        self.kubectl("apply", "--validate=strict", "-f", "deploy/install.yaml")
        nodes = []
        for vmid, host in VMS.items():
            name = f"worker-{vmid}"
            labels = {"topology.kubernetes.io/region": "fsn1", "topology.kubernetes.io/zone": host, "kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}
            nodes.append({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels,
                          "annotations": {"volumes.kubernetes.io/controller-managed-attach-detach": "true"}}})
        self.apply(*nodes)
        room = {"cpu": "64", "memory": "256Gi", "pods": "200"}
        for vmid in VMS:
            status = {"status": {"capacity": room, "allocatable": room, "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}]}}
            self.kubectl("patch", "node", f"worker-{vmid}", "--subresource=status", "--type=merge", "-p", json.dumps(status))
        self.apply(*({"apiVersion": "storage.k8s.io/v1", "kind": "CSINode", "metadata": {"name": f"worker-{vmid}"}, "spec": {"drivers": [{
            "name": DRIVER, "nodeID": f"worker-{vmid}", "topologyKeys": ["topology.kubernetes.io/region", "topology.kubernetes.io/zone"],
            "allocatable": {"count": 29}}]}} for vmid in VMS))
        for name, binding, storage in (("wait", "WaitForFirstConsumer", "fast"), ("now", "Immediate", "fast"), ("shared", "WaitForFirstConsumer", "san")):
            self.apply({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": name}, "provisioner": DRIVER, "allowVolumeExpansion": True,
                        "volumeBindingMode": binding, "parameters": {"storage": storage}})

    def run_controllers(self):
        """Each pod of the Deployment, its containers as programs, by the account's own token."""
        deployment = next(one for one in self.get("deployments", "-n", NAMESPACE))
        until("the Deployment's pods", lambda: len(self.pods("controller")) == deployment["spec"]["replicas"])
        token = self.kubectl("create", "token", deployment["spec"]["template"]["spec"]["serviceAccountName"], "-n", NAMESPACE, "--duration=4h").stdout.strip()
        config = self.kubeconfig("controller", token)
        clusters = self.write("config.yaml", {"clusters": [{"url": self.proxmox_url, "region": "fsn1", "token_id": "csi@pve!csi", "token_secret": SECRET}]})
        for pod in self.pods("controller"):
            socket_folder = self.path(pod)
            os.mkdir(socket_folder)
            for container in deployment["spec"]["template"]["spec"]["containers"]:
                ours = container["name"] == "proxmox-csi-plugin-controller"
                arguments = [one.replace("unix:///csi/", f"unix://{socket_folder}/").replace("/etc/proxmox/config.yaml", clusters) for one in container["args"]]
                # Two pods on one machine.
                arguments = [f"{one.split('=')[0]}=127.0.0.1:{free_port()}" if "-address=:" in one else one for one in arguments]
                arguments += ["--kubeconfig", config]
                if not ours:
                    arguments += ["--leader-election-namespace", NAMESPACE]
                program = self.controller if ours else self.binary(container["name"])
                self.start(f"{pod}/{container['name']}", program, *arguments, env={"POD_NAME": pod, "NAMESPACE": NAMESPACE})

    def pods(self, component):
        return [one["metadata"]["name"] for one in self.get("pods", "-n", NAMESPACE, "-l", f"app.kubernetes.io/component={component}")]

    def claim(self, name, storage_class, size="1Gi"):
        return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name, "namespace": "default", "labels": {"class": storage_class}},
                "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": storage_class, "resources": {"requests": {"storage": size}}}}

    def pod(self, name, storage_class):
        return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default", "labels": {"class": storage_class}}, "spec": {
            "containers": [{"name": "c", "image": "none", "volumeMounts": [{"name": "data", "mountPath": "/data"}]}],
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": name}}]}}

    def attached(self, storage_class):
        claims = {one["spec"].get("volumeName") for one in self.get("pvc", "-n", "default", "-l", f"class={storage_class}")}
        return [one for one in self.get("volumeattachments") if one["spec"]["source"]["persistentVolumeName"] in claims and one.get("status", {}).get("attached")]

    def stop(self):
        for process in reversed(list(self.processes.values())):
            process.stop()


class Failed(Exception):
    pass


def until(what, holds, seconds=PATIENCE_SECONDS):
    end, last = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            if holds():
                return
            last = None
        except (Failed, OSError, subprocess.TimeoutExpired) as why:
            last = why
        time.sleep(0.5)
    raise Failed(f"{what} did not come within {seconds} s{f': {last}' if last else ''}")


# --- what is judged ---


def the_scheduler_is_told_how_much_room_there_is(cluster):
    def told():
        room = {(one["storageClassName"], one["nodeTopology"]["matchLabels"].get("topology.kubernetes.io/zone")): one.get("capacity", "0")
                for one in cluster.get("csistoragecapacities", "-A")}
        return all(room.get(("wait", host), "0") != "0" for host in HOSTS)
    until("the room of each host", told)
    owners = {one["metadata"]["ownerReferences"][0]["kind"] for one in cluster.get("csistoragecapacities", "-A")}
    assert owners == {"Deployment"}, owners


def claims_and_pods_of_one_moment(cluster, storage_class):
    """As Velero restores: all at once. Bound, and attached each to one VM; how many of them each host has."""
    names = [f"{storage_class}-{nth}" for nth in range(CLAIMS)]
    cluster.apply(*(cluster.claim(name, storage_class) for name in names), *(cluster.pod(name, storage_class) for name in names))
    until(f"{CLAIMS} attached volumes of class {storage_class}", lambda: len(cluster.attached(storage_class)) == CLAIMS)
    plugged = cluster.plugged()
    assert all(len(vmids) == 1 for vmids in plugged.values()), plugged
    volumes = {one["spec"]["source"]["persistentVolumeName"] for one in cluster.attached(storage_class)}
    ours = [vmid for volid, (vmid,) in plugged.items() if any(volid.endswith(volume) for volume in volumes)]
    assert len(ours) == CLAIMS, plugged
    return collections.Counter(VMS[vmid] for vmid in ours), collections.Counter(VMS[vmid] for (vmid,) in plugged.values())


def claims_that_wait_for_their_pods(cluster):
    # The scheduler has chosen.
    return dict(claims_and_pods_of_one_moment(cluster, "wait")[0])


def claims_that_do_not_wait(cluster):
    """We have chosen, and made even what the scheduler had not."""
    theirs, all_of_them = claims_and_pods_of_one_moment(cluster, "now")
    assert max(all_of_them.values()) <= 0.4 * sum(all_of_them.values()), (theirs, all_of_them)
    return f"{dict(theirs)}, with those before {dict(all_of_them)}"


def volumes_of_a_shared_storage_have_no_zone(cluster):
    cluster.apply(cluster.claim("shared-0", "shared"), cluster.pod("shared-0", "shared"))
    until("the shared volume", lambda: len(cluster.attached("shared")) == 1)
    volume = next(one for one in cluster.get("pv") if one["spec"]["storageClassName"] == "shared")
    assert volume["spec"]["csi"]["volumeHandle"].startswith("fsn1//san/"), volume["spec"]["csi"]


def a_claim_grows(cluster):
    cluster.kubectl("patch", "pvc", "wait-0", "-n", "default", "--type=merge", "-p", '{"spec":{"resources":{"requests":{"storage":"3Gi"}}}}')
    volume = cluster.get("pvc", "-n", "default", "--field-selector", "metadata.name=wait-0")[0]["spec"]["volumeName"]
    until("the volume's new size", lambda: any(one["metadata"]["name"] == volume and one["spec"]["capacity"]["storage"] == "3Gi" for one in cluster.get("pv")))
    sizes = [one["size"] for host in HOSTS for one in cluster.proxmox(f"/nodes/{host}/storage/fast/content?content=images") if one["volid"].endswith(volume)]
    assert max(sizes) == 3 * GIB, sizes


def a_controller_that_is_killed_is_replaced(cluster):
    lease = lambda: next(one for one in cluster.get("leases", "-n", NAMESPACE) if one["metadata"]["name"] == DRIVER)
    holder = lease()["spec"]["holderIdentity"]
    active = next(pod for pod in cluster.pods("controller") if holder.startswith(pod))
    process = cluster.processes[f"{active}/proxmox-csi-plugin-controller"]
    process.restart = False
    process.kill()
    cluster.apply(cluster.claim("after", "wait"), cluster.pod("after", "wait"))
    until("a volume by the other controller", lambda: any(one["spec"]["source"]["persistentVolumeName"] == next(
        claim["spec"].get("volumeName") for claim in cluster.get("pvc", "-n", "default") if claim["metadata"]["name"] == "after") for one in cluster.attached("wait")))
    assert lease()["spec"]["holderIdentity"] != holder, "the dead one has the Lease"


def all_of_it_is_taken_down(cluster):
    """Detached first, then deleted; nothing is left on Proxmox."""
    cluster.kubectl("delete", "pods", "-n", "default", "--all", "--force", "--grace-period=0", "--wait=false")
    until("all detached", lambda: not cluster.get("volumeattachments") and not cluster.plugged())
    cluster.kubectl("delete", "pvc", "-n", "default", "--all", "--wait=false")
    until("all deleted", lambda: not cluster.get("pv"))
    left = {volid for volid in cluster.volumes()}
    assert not left, left


def every_account_had_its_rights(cluster):
    """Nothing that the manifest's accounts asked for was forbidden, nothing panicked."""
    for name, process in cluster.processes.items():
        if "/" in name:
            wrong = [line for line in process.said().splitlines() if "is forbidden" in line or "panicked" in line or "Forbidden" in line]
            assert not wrong, f"{name}: {wrong[:3]}"


CHECKS = [the_scheduler_is_told_how_much_room_there_is, claims_that_wait_for_their_pods, claims_that_do_not_wait, volumes_of_a_shared_storage_have_no_zone, a_claim_grows,
          a_controller_that_is_killed_is_replaced, all_of_it_is_taken_down, every_account_had_its_rights]


def main(kubernetes, controller, simulator):
    work = tempfile.mkdtemp(prefix="csi-kubernetes-")
    cluster, failed, begun = None, 0, time.monotonic()
    try:
        cluster = Cluster(kubernetes, controller, simulator, work)
        cluster.install()
        cluster.run_controllers()
        for one in CHECKS:
            start = time.monotonic()
            try:
                said = one(cluster)
                print(f"ok      {one.__name__.replace('_', ' ')}{f': {said}' if said else ''} ({time.monotonic() - start:.0f} s)", flush=True)
            except (Failed, AssertionError) as why:
                failed += 1
                print(f"FAILED  {one.__name__.replace('_', ' ')}: {why!s}"[:2000], flush=True)
                break
    finally:
        if cluster:
            cluster.stop()
        if failed or os.environ.get("PROXMOX_CSI_KEEP_LOGS"):
            print(f"logs in {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} in {time.monotonic() - begun:.0f} s" if not failed else "stopped at the first that failed")
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
