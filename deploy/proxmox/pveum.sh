#!/bin/sh
# The driver's role, user and token, on any node of the Proxmox cluster, as root. Prints the token's secret once: it goes into config.yaml (deploy/examples/secret.yaml).
set -eu
pveum role add CSI -privs "VM.Audit VM.Config.Disk Datastore.Audit Datastore.AllocateSpace Datastore.Allocate Sys.Audit"
pveum user add kubernetes-csi@pve
pveum aclmod / -user kubernetes-csi@pve -role CSI
pveum user token add kubernetes-csi@pve csi -privsep 0
