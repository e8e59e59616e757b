"""What holds between the chart, the Kustomize bases, the rendered manifests and the reference driver's objects.

Run by scripts/deploy-check, from the top of the tree, with helm and kustomize in PATH. Each check says what is wrong in one sentence.
"""

import functools
import json
import os
import re
import subprocess
import sys

import yaml

CHART = "deploy/chart"
# Only Helm writes these; Kustomize's users have other ways to know what made an object.
HELMS_OWN = ("helm.sh/chart", "app.kubernetes.io/managed-by")
IMAGE = re.compile(r"^[^\s@]+@sha256:[0-9a-f]{64}$")
wrong = []


def check(holds, sentence):
    if not holds:
        wrong.append(sentence)


def documents(text):
    return [one for one in yaml.safe_load_all(text) if one]


@functools.cache
def run(*command, text=None):
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def helm(*arguments, kubernetes="1.37.0", namespace="csi-proxmox", values=None):
    """The chart's objects; `values` is a path or a dict."""
    command = ["helm", "template", "proxmox-csi-plugin", CHART, "--namespace", namespace, "--kube-version", kubernetes, *arguments]
    if isinstance(values, dict):
        return run(*command, "--values", "-", text=yaml.safe_dump(values))
    return run(*command, *(["--values", values] if values else []))


def rendered(*arguments, **settings):
    code, out, err = helm(*arguments, **settings)
    if code != 0:
        sys.exit(f"helm {arguments} {settings}: {err}")
    return documents(out)


def built(folder):
    code, out, err = run("kustomize", "build", folder)
    if code != 0:
        sys.exit(f"kustomize build {folder}: {err}")
    return documents(out)


def key(document):
    metadata = document["metadata"]
    return document["apiVersion"], document["kind"], metadata.get("namespace", ""), metadata["name"]


def by_key(objects):
    return {key(one): one for one in objects}


def plain(one):
    """Without what only Helm writes, and independent of the order of a map."""
    one = json.loads(json.dumps(one))
    labels = one["metadata"].get("labels", {})
    for name in HELMS_OWN:
        labels.pop(name, None)
    if not labels:
        one["metadata"].pop("labels", None)
    return one


def same(what, ours, theirs):
    ours, theirs = by_key(ours), by_key(theirs)
    check(ours.keys() == theirs.keys(), f"{what}: objects differ: {sorted(ours.keys() ^ theirs.keys())}")
    for one in ours.keys() & theirs.keys():
        check(plain(ours[one]) == plain(theirs[one]), f"{what}: {one} differs")


def helm_and_kustomize():
    """The same settings give the same objects."""
    control_plane = {
        "createNamespace": True,
        "nodeSelector": {"node-role.kubernetes.io/control-plane": ""},
        "tolerations": [{"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}],
    }
    pairs = [
        ("deploy/base", {"values": {"createNamespace": True}}),
        ("deploy/overlays/kubernetes-1.30", {"values": {"createNamespace": True}, "kubernetes": "1.33.0"}),
        ("deploy/overlays/kubernetes-1.30", {"values": {"createNamespace": True}, "kubernetes": "1.30.0"}),
        ("deploy/overlays/kube-system", {"namespace": "kube-system"}),
        ("talos/overlays/talos", {"values": control_plane}),
        ("talos/overlays/kubernetes-1.30", {"values": control_plane, "kubernetes": "1.32.0"}),
    ]
    for folder, settings in pairs:
        same(f"{folder} and Helm with {settings}", built(folder), rendered(**settings))
    for file, folder in [
        ("deploy/install.yaml", "deploy/base"),
        ("deploy/install-1.30.yaml", "deploy/overlays/kubernetes-1.30"),
        ("talos/proxmox-csi.yaml", "talos/overlays/talos"),
        ("talos/proxmox-csi-1.30.yaml", "talos/overlays/kubernetes-1.30"),
    ]:
        with open(file, encoding="utf-8") as text:
            same(f"{file} and {folder}", documents(text.read()), built(folder))


def at(document, path):
    for part in path.split("."):
        document = document.get(part) if isinstance(document, dict) else None
    return document


def in_place_switch():
    """No object of the reference driver's has an immutable field that ours would change."""
    with open("deploy/compat/reference.yaml", encoding="utf-8") as text:
        sources = yaml.safe_load(text)["sources"]
    fields = 0
    for source in sources:
        if "values" in source:
            objects = rendered(values=source["values"])
        else:
            files = source["manifest"] if isinstance(source["manifest"], list) else [source["manifest"]]
            objects = [one for file in files for one in documents(open(file, encoding="utf-8").read())]
        for wanted in source["objects"] + source.get("classes", []):
            name = f"{source['what']}: {wanted['kind']} {wanted['name']}"
            found = [
                one
                for one in objects
                if (one["kind"], one["metadata"]["name"], one["metadata"].get("namespace")) == (wanted["kind"], wanted["name"], wanted.get("namespace"))
            ]
            check(len(found) == 1, f"{name} in {wanted.get('namespace')}: there are {len(found)} of ours")
            for path, value in wanted.items():
                if found and path not in ("kind", "name", "namespace"):
                    fields += 1
                    check(at(found[0], path) == value, f"{name}: {path} is {at(found[0], path)!r}, the reference driver's is {value!r}")
    check(fields > 40, f"only {fields} immutable fields were compared")


def images_of(one):
    if isinstance(one, dict):
        for name, value in one.items():
            if name == "image" and isinstance(value, str):
                yield value
            else:
                yield from images_of(value)
    elif isinstance(one, list):
        for value in one:
            yield from images_of(value)


def images_by_digest():
    """No image without a digest, and none that is not in the chart's files/images.yaml."""
    with open(f"{CHART}/files/images.yaml", encoding="utf-8") as text:
        table = yaml.safe_load(text)

    def names(group):
        return {f"{one['repository']}:{one['tag']}@{one['digest']}" for one in group.values()}

    driver, new, old = names(table["driver"]), names(table["sidecars"]["1.34"]), names(table["sidecars"]["1.30"])
    for kubernetes in range(30, 38):
        used = set(images_of(rendered(kubernetes=f"1.{kubernetes}.0")))
        check(used == driver | (new if kubernetes >= 34 else old), f"Kubernetes 1.{kubernetes}: images {sorted(used)}")
    for folder, _, files in [step for top in ("deploy", "talos") for step in os.walk(top)]:
        for file in files:
            path = os.path.join(folder, file)
            if not path.endswith((".yaml", ".yml")) or path.startswith((f"{CHART}/templates", "deploy/tests/values")):
                continue
            with open(path, encoding="utf-8") as text:
                for image in images_of(documents(text.read())):
                    check(IMAGE.match(image), f"{path}: image {image} has no digest")
    for values in ("default", "talos", "edge"):
        for image in images_of(rendered(values=f"deploy/tests/values/reference-{values}.yaml")):
            check(IMAGE.match(image) and "sergelogvinov" not in image, f"reference-{values}.yaml: image {image}")
    mirror = {"controller": {"plugin": {"image": {"repository": "registry.example.com/csi/controller"}}, "attacher": {"image": {"repository": "registry.example.com/csi/attacher"}}}}
    found = set(images_of(rendered(values=mirror)))
    for image in ("registry.example.com/csi/controller", "registry.example.com/csi/attacher"):
        check(any(one.startswith(image + ":") and IMAGE.match(one) for one in found), f"a mirror's {image} has no digest: {sorted(found)}")


REFUSED = [
    ({"replicas": 3}, "replicas"),
    ({"storageClass": [{"name": "a", "storage": "b", "fsType": "xfs"}]}, "storageClass/0"),
    ({"storageClass": [{"name": "a"}]}, "storageClass/0"),
    ({"storageClass": [{"name": "a", "storage": "b", "volumeBindingMode": "immediate"}]}, "storageClass/0/volumeBindingMode"),
    ({"node": {"kubeletdir": "/x"}}, "node"),
    ({"kubeletDir": "/x"}, "kubeletDir"),
    ({"replicaCount": "two"}, "replicaCount"),
    ({"config": {"features": {"controllerVMID": 9000}}}, "config/features"),
    ({"config": {"clusters": [{"url": "https://x", "region": "a", "tokenID": "x"}]}}, "config/clusters/0"),
    ({"provisionerName": "csi.example.com"}, "provisionerName"),
    ({"controller": {"attacher": {"image": {"digest": "latest"}}}}, "controller/attacher/image/digest"),
    ({"controller": {"snapshotter": {"enabled": True}}}, "controller.snapshotter.enabled: snapshots are not built yet"),
    ({"config": {"features": {"provider": "proxmox"}}}, "config/features/provider"),
    ({"storageClass": [{"name": "a", "storage": "b", "extraParameters": {"replicate": "true"}}]}, "storageClass[0].extraParameters.replicate: replicated volumes are not built yet"),
    ({"storageClass": [{"name": "a", "storage": "b", "extraParameters": {"replicateZones": "x"}}]}, "storageClass[0].extraParameters.replicateZones"),
    ({"node": {"plugin": {"image": {"repository": "registry.example.com/node", "tag": "v9.9.9"}}}}, "node.plugin.image.tag"),
]


def wrong_values_are_refused():
    for values, path in REFUSED:
        code, _, err = helm(values=values)
        check(code != 0 and path in err, f"values {values}: not refused with {path!r}: {err.strip() or 'accepted'}")
    code, _, err = helm(kubernetes="1.29.9")
    check(code != 0 and "1.30" in err, f"Kubernetes 1.29 is not refused: {err}")


def values_have_their_effect():
    """What the reference chart's users set arrives where they expect it."""
    objects = by_key(rendered(values="deploy/tests/values/reference-full.yaml"))
    deployment = objects["apps/v1", "Deployment", "csi-proxmox", "proxmox-csi-plugin-controller"]
    pod = deployment["spec"]["template"]
    arguments = {one["name"]: one["args"] for one in pod["spec"]["containers"]}
    for wanted, container in [
        ("--default-fstype=xfs", "csi-attacher"),
        ("--worker-threads=20", "csi-attacher"),
        ("--timeout=5m", "csi-resizer"),
        ("--handle-volume-inuse-error=false", "csi-resizer"),
        ("--metrics-address=:9090", "proxmox-csi-plugin-controller"),
    ]:
        check(wanted in arguments[container], f"{container} is not given {wanted}: {arguments[container]}")
    check("--default-fstype=ext4" not in arguments["csi-attacher"], "attacher: an argument of the user's does not replace ours")
    check("--enable-capacity" not in arguments["csi-provisioner"], "options.enableCapacity has no effect")
    check(pod["metadata"]["annotations"] == {"c": "d", "prometheus.io/scrape": "true", "prometheus.io/port": "9090"}, f"annotations {pod['metadata'].get('annotations')}")
    check(pod["metadata"]["labels"].get("e") == "f", "controller.podLabels has no effect")
    for name in ("initContainers", "hostAliases", "affinity", "imagePullSecrets"):
        check(pod["spec"].get(name), f"{name} has no effect")
    check(any(volume["name"] == "ca" for volume in pod["spec"]["volumes"]), "extraVolumes has no effect")
    secret = objects["v1", "Secret", "csi-proxmox", "proxmox-csi-plugin"]
    import base64

    config = yaml.safe_load(base64.b64decode(secret["data"]["config.yaml"]))
    check([one["region"] for one in config["clusters"]] == ["one", "two"] and config["features"]["controllerVmID"] == 9000, f"config {config}")
    node = objects["apps/v1", "DaemonSet", "csi-proxmox", "proxmox-csi-plugin-node"]["spec"]["template"]["spec"]
    check(len(node["containers"]) == 1 and not node.get("initContainers"), "the node's pod has more than one container")
    check(any(volume.get("hostPath", {}).get("path") == "/var/lib/k0s/kubelet" for volume in node["volumes"]), "node.kubeletDir has no effect")
    check("--kubelet-dir=/var/lib/k0s/kubelet" in node["containers"][0]["args"], "node.kubeletDir does not reach the agent")
    storage_class = objects["storage.k8s.io/v1", "StorageClass", "", "encrypted"]
    check(storage_class["mountOptions"] == ["discard"] and storage_class["allowedTopologies"], "mountOptions or allowedTopologies have no effect")
    check(storage_class["metadata"]["annotations"]["storageclass.kubernetes.io/is-default-class"] == "true", "annotations of a class have no effect")
    check(not objects["storage.k8s.io/v1", "CSIDriver", "", "csi.proxmox.sinextra.dev"]["spec"]["storageCapacity"], "CSIDriver storageCapacity with enableCapacity false")


def probes():
    """kubelet asks the port that the controller listens at, whatever it is; 0 is off."""
    for arguments, port in [((), 9808), (("--set", "metrics.enabled=true"), 8080), (("--set", "controller.healthPort=0"), None)]:
        pod = by_key(rendered(*arguments))["apps/v1", "Deployment", "csi-proxmox", "proxmox-csi-plugin-controller"]["spec"]["template"]["spec"]
        container = pod["containers"][0]
        listens = [one for one in container["args"] if one.startswith("--metrics-address")]
        check(listens == ([f"--metrics-address=:{port}"] if port else []), f"{arguments}: {listens}")
        ports = {one["name"]: one["containerPort"] for one in container.get("ports", [])}
        for probe, path in [("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")]:
            asked = container.get(probe, {}).get("httpGet")
            check((asked is not None) == bool(port), f"{arguments}: {probe}")
            check(not asked or (asked["path"], ports.get(asked["port"])) == (path, port), f"{arguments}: {probe} asks {asked}")


def confined():
    """Controller: no root, no capability, nothing writable. Node: no memory limit, no account's token."""
    objects = by_key(rendered())
    pod = objects["apps/v1", "Deployment", "csi-proxmox", "proxmox-csi-plugin-controller"]["spec"]["template"]["spec"]
    check(pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 65532, "the controller may be root")
    for container in pod["containers"]:
        context = container["securityContext"]
        holds = (
            context["readOnlyRootFilesystem"]
            and not context["allowPrivilegeEscalation"]
            and context["capabilities"] == {"drop": ["ALL"]}
            and context["seccompProfile"]["type"] == "RuntimeDefault"
        )
        check(holds, f"{container['name']}: {context}")
    node = objects["apps/v1", "DaemonSet", "csi-proxmox", "proxmox-csi-plugin-node"]["spec"]["template"]["spec"]
    check(node["automountServiceAccountToken"] is False, "the agent is given a token that it does not use")
    check("limits" not in node["containers"][0]["resources"], "the agent has a limit: a volume of the reference driver may need 1 GiB to open")
    bound = {one["metadata"]["name"] for one in objects.values() if one["kind"] in ("ClusterRoleBinding", "RoleBinding")}
    check(bound == {"proxmox-csi-plugin-controller"}, f"accounts with rights: {bound}")


def versions():
    """Fields are there where the API has them, and nowhere else."""
    for minor in range(30, 38):
        driver = by_key(rendered(kubernetes=f"1.{minor}.0"))["storage.k8s.io/v1", "CSIDriver", "", "csi.proxmox.sinextra.dev"]["spec"]
        check(("nodeAllocatableUpdatePeriodSeconds" in driver) == (minor >= 34), f"1.{minor}: nodeAllocatableUpdatePeriodSeconds")
        check(driver["fsGroupPolicy"] == "File", f"1.{minor}: fsGroupPolicy")


def a_daemonset_per_zone():
    """Before Kubernetes 1.35, agents of several Proxmox nodes are told their place; no two DaemonSets want one pod."""
    zones = [{"region": "one", "zone": "pve-1"}, {"region": "one", "zone": "pve_2.b"}]
    sets = [one for one in rendered(values={"node": {"zones": zones, "nodeSelector": {"a": "b"}}}, kubernetes="1.32.0") if one["kind"] == "DaemonSet"]
    check([one["metadata"]["name"] for one in sets] == ["proxmox-csi-plugin-node-pve-1", "proxmox-csi-plugin-node-pve-2-b"], f"DaemonSets {[one['metadata']['name'] for one in sets]}")
    check(len({json.dumps(one["spec"]["selector"], sort_keys=True) for one in sets}) == 2, "two DaemonSets have the same selector")
    for place, one in zip(zones, sets):
        pod = one["spec"]["template"]
        wanted = {"a": "b", "topology.kubernetes.io/region": place["region"], "topology.kubernetes.io/zone": place["zone"]}
        check(pod["spec"]["nodeSelector"] == wanted, f"{place}: nodeSelector {pod['spec']['nodeSelector']}")
        check({f"--region={place['region']}", f"--zone={place['zone']}"} <= set(pod["spec"]["containers"][0]["args"]), f"{place}: arguments")
        check(one["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items(), f"{place}: labels")


def labels_by_an_init_container():
    """Before Kubernetes 1.35: an init container reads the Node's labels; the agent gets the file, and no token."""
    objects = by_key(rendered("--set", "node.readNodeLabels=true", kubernetes="1.32.0"))
    pod = objects["apps/v1", "DaemonSet", "csi-proxmox", "proxmox-csi-plugin-node"]["spec"]["template"]["spec"]
    reader, agent = pod["initContainers"][0], pod["containers"][0]
    with open("controller/src/commands.rs", encoding="utf-8") as text:
        flags = set(re.findall(r'Flag::(?:value|switch)\("([^"]+)"', text.read()))
    check(reader["args"][0] == "node-labels" and {one.lstrip("-").split("=")[0] for one in reader["args"][1:]} <= flags, f"node-labels: arguments {reader['args']}")
    written = next(one for one in reader["args"] if one.startswith("--to=")).split("=")[1]
    check(f"--labels-file={written}" in agent["args"], f"the agent does not read {written}: {agent['args']}")
    mounts = {name: {one["name"]: one["mountPath"] for one in container["volumeMounts"]} for name, container in [("reader", reader), ("agent", agent)]}
    check(mounts["reader"]["labels"] == mounts["agent"]["labels"] == os.path.dirname(written), f"mounts {mounts}")
    check("token" in mounts["reader"] and "token" not in mounts["agent"] and pod["automountServiceAccountToken"] is False, "the agent is given a token")
    role = objects["rbac.authorization.k8s.io/v1", "ClusterRole", "", "proxmox-csi-plugin-node"]
    check(role["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]}], f"the agent's account may {role['rules']}")


def constant(name, file):
    with open(file, encoding="utf-8") as text:
        found = re.search(rf"const {name}: &\[&str\] =\s*&\[(.*?)\];", text.read(), re.S)
    return set(re.findall(r'"([^"]+)"', found[1])) if found else set()


def keys_are_the_code_s():
    """The schema's keys of the Proxmox configuration are those that the controller reads; arguments are flags that the binaries have."""
    with open(f"{CHART}/values.schema.json", encoding="utf-8") as text:
        config = json.load(text)["properties"]["config"]["properties"]
    code = "controller/src/config.rs"
    for what, keys, name in [("features", config["features"]["properties"], "FEATURE_KEYS"), ("clusters", config["clusters"]["items"]["properties"], "CLUSTER_KEYS")]:
        check(set(keys) == constant(name, code), f"values.schema.json, config.{what}: differs from {name} in {code} by {sorted(set(keys) ^ constant(name, code))}")
    objects = by_key(rendered("--set", "metrics.enabled=true", "--set", "node.region=a", "--set", "node.zone=b"))
    for kind, name, crate in [("Deployment", "controller", "controller"), ("DaemonSet", "node", "node")]:
        with open(f"{crate}/src/main.rs", encoding="utf-8") as text:
            flags = set(re.findall(r'Flag::(?:value|switch)\("([^"]+)"', text.read()))
        container = objects["apps/v1", kind, "csi-proxmox", f"proxmox-csi-plugin-{name}"]["spec"]["template"]["spec"]["containers"][0]
        for argument in container["args"]:
            check(argument.lstrip("-").split("=")[0] in flags, f"{crate} has no flag {argument}")


def privileges():
    """The Proxmox privileges are the same in the table, the pveum lines, the documents and the module."""
    with open("deploy/proxmox/privileges.tsv", encoding="utf-8") as text:
        rows = [line.rstrip("\n").split("\t") for line in text if not line.startswith("#")]
    names = [row[0] for row in rows]
    for file in ("pveum.sh", "README.md"):
        with open(f"deploy/proxmox/{file}", encoding="utf-8") as text:
            found = re.findall(r'-privs "([^"]*)"', text.read())
        check(found and all(one.split() == names for one in found), f"deploy/proxmox/{file}: privileges {found}")
    with open("deploy/proxmox/README.md", encoding="utf-8") as text:
        table = re.findall(r"^\| (\S+\.\S+) \| (.*?) \| (.*?) \| (.*?) \|$", text.read(), re.M)
    check([list(row) for row in table] == rows, "deploy/proxmox/README.md: the table differs from privileges.tsv")
    with open("deploy/proxmox/opentofu/main.tf", encoding="utf-8") as text:
        module = re.findall(r'"([A-Z]\w+\.[A-Z][\w.]*)"', text.read())
    check(module == names, f"deploy/proxmox/opentofu/main.tf: privileges {module}")


def source_text():
    """All our code, with the strings that are broken over lines made whole."""
    text = ""
    for top in ("proto", "node", "controller"):
        for folder, folders, files in os.walk(top):
            folders[:] = [name for name in folders if name != "target"]
            for file in files:
                if file.endswith(".rs"):
                    with open(os.path.join(folder, file), encoding="utf-8") as code:
                        text += code.read()
    return re.sub(r"\\\n\s*", "", text).replace('\\"', '"')


def documents_are_true():
    """Every sentence quoted in docs/troubleshooting.md is in the code, every link leads somewhere, every parameter is the code's."""
    code = source_text()
    quoted = 0
    with open("docs/troubleshooting.md", encoding="utf-8") as text:
        for line in text:
            match = re.match(r"^(?:- |  )?> (.*)$", line.rstrip())
            if match:
                for piece in match[1].split("…"):
                    quoted += 1
                    check(not piece.strip() or piece.strip() in code, f"docs/troubleshooting.md quotes {piece.strip()!r}, which the code does not say")
    check(quoted > 40, f"only {quoted} pieces of quoted sentences were found")
    pages = ["README.md"] + [os.path.join(folder, file) for top in ("docs", "deploy", "talos") for folder, _, files in os.walk(top) for file in files if file.endswith(".md")]
    for page in pages:
        with open(page, encoding="utf-8") as text:
            for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text.read()):
                if "://" not in link:
                    check(os.path.exists(os.path.join(os.path.dirname(page), link)), f"{page}: {link} is not there")
    with open("docs/storageclass.md", encoding="utf-8") as text:
        keys = set(re.findall(r"^\| `([^`]+)` \|", text.read(), re.M))
    with open("controller/src/parameters.rs", encoding="utf-8") as text:
        known = re.search(r"const KNOWN: &\[&str\] = &\[(.*?)\];", text.read(), re.S)[1]
    with open("proto/src/lib.rs", encoding="utf-8") as text:
        constants = dict(re.findall(r'pub const (\w+): &str = "([^"]+)"', text.read()))
    names = set(re.findall(r'"([^"]+)"', known)) | {constants[one] for one in re.findall(r"volume_context::(\w+)", known)}
    check(keys - {"csi.storage.k8s.io/fstype"} == names, f"docs/storageclass.md differs from the code's parameters by {sorted((keys - {'csi.storage.k8s.io/fstype'}) ^ names)}")


def commands_of_documents():
    """What the documents tell people to run on our files works as far as it goes without a cluster."""
    ran = 0
    for page in ["README.md", "docs/install.md", "docs/migration.md", "docs/operations.md", "deploy/verify/README.md", "talos/README.md"]:
        with open(page, encoding="utf-8") as text:
            text = text.read()
        for line in re.findall(r"^(?:kubectl|helm|scripts/).*$", "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)), re.M):
            words = line.split()
            for flag in ("-k", "-f"):
                if words[0] == "kubectl" and flag in words:
                    path, ran = words[words.index(flag) + 1], ran + 1
                    if flag == "-k":
                        code, _, err = run("kustomize", "build", path)
                        check(code == 0, f"{page}: {line}: {err}")
                    else:
                        check(os.path.exists(path) and documents(open(path, encoding="utf-8").read()), f"{page}: {line}: {path} is not there")
            if words[:2] == ["helm", "upgrade"]:
                ran += 1
                words = [word for word in words if word not in ("helm", "upgrade", "--install")]
                words = ["deploy/tests/values/reference-full.yaml" if word.endswith("values.yaml") else word for word in words]
                code, _, err = run("helm", "template", *words, "--kube-version", "1.37.0")
                check(code == 0, f"{page}: {line}: {err}")
        for script in set(re.findall(r"`(scripts/[a-z0-9-]+)", text)):
            ran += 1
            check(os.access(script, os.X_OK), f"{page}: {script} is not there")
    check(ran > 10, f"only {ran} commands were found in the documents")


CHECKS = [helm_and_kustomize, in_place_switch, images_by_digest, wrong_values_are_refused, values_have_their_effect, probes, confined, versions, a_daemonset_per_zone, labels_by_an_init_container, keys_are_the_code_s, privileges, documents_are_true, commands_of_documents]

if __name__ == "__main__":
    for one in CHECKS:
        before = len(wrong)
        one()
        print(f"{'ok' if len(wrong) == before else 'FAILED':8}{one.__name__.replace('_', ' ')}", flush=True)
    for sentence in wrong:
        print(f"deploy-check: {sentence}")
    sys.exit(1 if wrong else 0)
