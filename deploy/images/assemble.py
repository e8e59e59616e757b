"""Container images from finished binaries, as OCI archives, with nothing but Python: the same input gives the same bytes.

Layers are not compressed, so that a digest does not depend on a compressor's version. No file has a time, an owner or a name of this machine.
Called by scripts/images, from the top of the tree.
"""

import argparse
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import uuid

import yaml

ARCHITECTURES = {"amd64": "x86_64-unknown-linux-musl", "arm64": "aarch64-unknown-linux-musl"}
# Uncompressed, all files of an image.
LIMITS = {"node": 2_200_000, "controller": 4_500_000}
ROLES = {
    "node": "Node agent of a Kubernetes storage driver for Proxmox VE",
    "controller": "Controller of a Kubernetes storage driver for Proxmox VE",
}
# The agent mounts and formats; the controller is nobody.
USERS = {"node": "0:0", "controller": "65532:65532"}
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
NEVER = "1970-01-01T00:00:00Z"
# No part of the SBOM's or the binary's bytes: anything fixed will do.
NAMESPACE = uuid.UUID("6f0e8c1e-0e0b-5d5e-9d55-3a6c0d1c5b1a")


def read(path):
    with open(path, "rb") as file:
        return file.read()


def crates(role, triple):
    """What is linked into the binary: [{name, version, license, folder, source}], without what only runs while compiling."""
    tree = subprocess.run(
        ["cargo", "tree", "--locked", "-p", f"proxmox-csi-{role}", "--target", triple, "-e", "normal,no-proc-macro", "--prefix", "none", "--format", "{p}|{l}"],
        check=True, capture_output=True, text=True,
    ).stdout
    metadata = json.loads(subprocess.run(["cargo", "metadata", "--locked", "--format-version", "1"], check=True, capture_output=True, text=True).stdout)
    folders = {(one["name"], one["version"]): one for one in metadata["packages"]}
    found = {}
    for line in tree.splitlines():
        match = re.match(r"(\S+) v(\S+)(?: \(.*\))?\|(.*?)(?: \(\*\))?$", line)
        if match:
            one = folders[match[1], match[2]]
            folder = os.path.dirname(one["manifest_path"])
            found[match[1], match[2]] = {"name": match[1], "version": match[2], "license": (one["license"] or match[3]).replace("/", " OR ").replace("  ", " "), "folder": folder, "source": one["source"]}
    return [found[key] for key in sorted(found)]


def checksums():
    """Of every crate, as Cargo.lock has it."""
    text = read("Cargo.lock").decode()
    return {(m[1], m[2]): m[3] for m in re.finditer(r'name = "([^"]+)"\nversion = "([^"]+)"\nsource = "[^"]+"\nchecksum = "([0-9a-f]+)"', text)}


def notice(role, linked):
    """Every part that is not ours, with its licence's own text; equal texts once."""
    lines = [
        f"proxmox-csi-{role}",
        "",
        "This program is under the Apache License, version 2.0 (LICENSE). It contains the following, each under its own terms.",
        "Where a licence gives the choice, the Apache License 2.0 is taken, else MIT. Sources: https://crates.io/crates/NAME/VERSION for each.",
        "",
        "Rust's standard library and musl's C library: MIT (Rust: also Apache-2.0). musl is Copyright (c) 2005-2020 Rich Felker, et al.",
    ]
    if role == "node":
        lines += ["libblkid 2.38.1 of util-linux: LGPL-2.1-or-later, statically linked: RELINK.md and LGPL-2.1.txt.", "libblkid-rs is under MPL-2.0: its source, unchanged, is at the address above."]
    else:
        lines += ["etc/ssl/certs/ca-certificates.crt: Mozilla's list of roots as certifi packs it, MPL-2.0; its source is https://pypi.org/project/certifi."]
    lines.append("")
    texts = {}
    for one in linked:
        if one["source"] is None:
            continue
        lines.append(f"{one['name']} {one['version']}: {one['license']}")
        choice = [name for name in sorted(os.listdir(one["folder"])) if re.match(r"(?i)^(licen[cs]e|copying|notice)", name) and os.path.isfile(os.path.join(one["folder"], name))]
        # The Apache License is there once, as our own; its NOTICE files and every other text go along.
        if "Apache-2.0" in one["license"]:
            choice = [name for name in choice if re.match(r"(?i)^notice", name)]
        for name in choice:
            text = read(os.path.join(one["folder"], name)).decode("utf-8", "replace").replace("\r\n", "\n").strip()
            texts.setdefault(text, []).append(f"{one['name']} {one['version']}")
    for text, names in texts.items():
        lines += ["", "-" * 80, f"{', '.join(names)}:", "", text]
    return ("\n".join(lines) + "\n").encode()


def rootfs(role, architecture, given):
    """path → (mode, bytes) of all files of the image, and what is linked."""
    triple = ARCHITECTURES[architecture]
    binary = read(os.path.join(given.binaries, triple, "release", f"proxmox-csi-{role}"))
    linked = crates(role, triple)
    files = {
        f"proxmox-csi-{role}": (0o755, binary),
        "licenses/LICENSE": (0o644, read("LICENSE")),
        "licenses/NOTICE": (0o644, notice(role, linked)),
    }
    if role == "node":
        files["licenses/LGPL-2.1.txt"] = (0o644, read(given.lgpl))
        files["licenses/RELINK.md"] = (0o644, read("deploy/images/RELINK.md"))
    else:
        files["etc/ssl/certs/ca-certificates.crt"] = (0o644, read(given.roots))
    size = sum(len(content) for _, content in files.values())
    if size > LIMITS[role]:
        sys.exit(f"images: the {role} image for {architecture} has {size} bytes, over its limit of {LIMITS[role]}")
    return files, linked


def layer(files):
    """A tar of the files and the folders they are in, by name."""
    folders = {path[:at] for path in files for at in range(len(path)) if path[at] == "/"}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(folders | files.keys()):
            entry = tarfile.TarInfo(path)
            if path in folders:
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(entry)
            else:
                entry.mode, entry.size = files[path][0], len(files[path][1])
                tar.addfile(entry, io.BytesIO(files[path][1]))
    return out.getvalue()


class Layout:
    """An OCI image layout in the making: blobs by digest."""

    def __init__(self):
        self.blobs = {}

    def add(self, content, media_type, **more):
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return {"mediaType": media_type, "digest": digest, "size": len(content), **more}

    def add_json(self, value, media_type, **more):
        return self.add(json.dumps(value, separators=(",", ":"), sort_keys=True).encode(), media_type, **more)

    def write(self, path, descriptor, name):
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [{**descriptor, "annotations": {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name.rsplit(":", 1)[1]}}]}
        files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": json.dumps(index, separators=(",", ":"), sort_keys=True).encode()}
        files |= {f"blobs/sha256/{digest[7:]}": content for digest, content in self.blobs.items()}
        with open(path, "wb") as out:
            out.write(layer({name: (0o644, content) for name, content in files.items()}))


def image(layout, role, architecture, given, version):
    files, linked = rootfs(role, architecture, given)
    content = layer(files)
    packed = layout.add(content, LAYER)
    labels = {
        "org.opencontainers.image.title": f"proxmox-csi-{role}",
        "org.opencontainers.image.description": ROLES[role],
        "org.opencontainers.image.licenses": "Apache-2.0" + (" AND LGPL-2.1-or-later AND MPL-2.0" if role == "node" else " AND MPL-2.0"),
        "org.opencontainers.image.version": version,
    }
    config = layout.add_json(
        {
            "architecture": architecture, "os": "linux", "created": NEVER,
            "config": {"User": USERS[role], "Entrypoint": [f"/proxmox-csi-{role}"], "WorkingDir": "/", "Labels": labels},
            "rootfs": {"type": "layers", "diff_ids": [packed["digest"]]},
            "history": [{"created": NEVER, "created_by": "scripts/images"}],
        },
        CONFIG,
    )
    manifest = layout.add_json({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [packed], "annotations": labels}, MANIFEST, platform={"architecture": architecture, "os": "linux"})
    return manifest, files, linked


def sbom(role, architecture, version, files, linked, digest):
    """CycloneDX 1.5: the binary's parts. No time, no random number."""
    sums = checksums()

    def crate(one):
        license_ = {"expression": one["license"]}
        component = {"type": "library", "bom-ref": f"pkg:cargo/{one['name']}@{one['version']}", "name": one["name"], "version": one["version"], "purl": f"pkg:cargo/{one['name']}@{one['version']}", "licenses": [license_]}
        if (one["name"], one["version"]) in sums:
            component["hashes"] = [{"alg": "SHA-256", "content": sums[one["name"], one["version"]]}]
        return component

    components = [crate(one) for one in linked]
    if role == "node":
        components.append({
            "type": "library", "bom-ref": "pkg:generic/util-linux@2.38.1#libblkid", "name": "libblkid", "version": "2.38.1", "purl": "pkg:generic/util-linux@2.38.1#libblkid",
            "licenses": [{"license": {"id": "LGPL-2.1-or-later"}}],
            "hashes": [{"alg": "SHA-256", "content": "60492a19b44e6cf9a3ddff68325b333b8b52b6c59ce3ebd6a0ecaa4c5117e84f"}],
        })
    for path, (_, content) in sorted(files.items()):
        components.append({"type": "file", "bom-ref": f"file:/{path}", "name": f"/{path}", "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(content).hexdigest()}]})
    name = f"proxmox-csi-{role}"
    return {
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, digest)}",
        "metadata": {"component": {"type": "container", "bom-ref": f"{name}@{digest}", "name": name, "version": version, "description": f"linux/{architecture}", "hashes": [{"alg": "SHA-256", "content": digest[7:]}]}},
        "components": components,
        "dependencies": [{"ref": f"{name}@{digest}", "dependsOn": [one["bom-ref"] for one in components]}],
    }


def main():
    parser = argparse.ArgumentParser()
    for name in ("binaries", "lgpl", "roots", "to"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--rootfs", choices=ARCHITECTURES, help="only the files of both images, for this architecture")
    given = parser.parse_args()
    with open("deploy/chart/files/images.yaml", encoding="utf-8") as text:
        names = yaml.safe_load(text)["driver"]
    os.makedirs(given.to, exist_ok=True)
    if given.rootfs:
        for role in LIMITS:
            for path, (mode, content) in rootfs(role, given.rootfs, given)[0].items():
                target = os.path.join(given.to, role, path)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with open(target, "wb") as out:
                    out.write(content)
                os.chmod(target, mode)
        return
    lines = []
    for role in ("controller", "node"):
        repository, version = names[role]["repository"], names[role]["tag"]
        both, manifests = Layout(), []
        for architecture in ARCHITECTURES:
            alone = Layout()
            manifest, files, linked = image(alone, role, architecture, given, version)
            stem = os.path.join(given.to, f"proxmox-csi-{role}-linux-{architecture}")
            alone.write(f"{stem}.oci.tar", manifest, f"{repository}:{version}")
            with open(f"{stem}.cdx.json", "w", encoding="utf-8") as out:
                json.dump(sbom(role, architecture, version, files, linked, manifest["digest"]), out, indent=1, sort_keys=True)
                out.write("\n")
            both.blobs |= alone.blobs
            manifests.append(manifest)
            size = sum(len(content) for _, content in files.values())
            print(f"{role:11}{architecture:6}{manifest['digest']} {size} bytes of {LIMITS[role]}")
        index = both.add_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}, INDEX)
        both.write(os.path.join(given.to, f"proxmox-csi-{role}.oci.tar"), index, f"{repository}:{version}")
        print(f"{role:11}index {index['digest']}")
        lines.append(f"{role} {repository} {version} {index['digest']} " + " ".join(one["digest"] for one in manifests))
    with open(os.path.join(given.to, "digests"), "w", encoding="utf-8") as out:
        out.write("".join(f"{line}\n" for line in lines))


main()
