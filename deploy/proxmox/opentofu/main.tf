locals {
  paths = setunion(var.paths, var.pool == null ? [] : ["/pool/${var.pool}"])
  config = yamlencode({
    clusters = [{
      url          = var.url
      insecure     = var.insecure
      token_id     = "${var.user}!${var.token}"
      token_secret = split("=", proxmox_virtual_environment_user_token.csi.value)[1]
      region       = var.region
    }]
  })
}

resource "proxmox_virtual_environment_role" "csi" {
  role_id = var.role
  privileges = [
    "VM.Audit",
    "VM.Config.Disk",
    "Datastore.Audit",
    "Datastore.AllocateSpace",
    "Datastore.Allocate",
    "Sys.Audit",
  ]
}

resource "proxmox_virtual_environment_user" "csi" {
  user_id = var.user
  comment = "Kubernetes storage driver"
}

resource "proxmox_virtual_environment_acl" "user" {
  for_each  = local.paths
  path      = each.value
  user_id   = proxmox_virtual_environment_user.csi.user_id
  role_id   = proxmox_virtual_environment_role.csi.role_id
  propagate = true
}

resource "proxmox_virtual_environment_user_token" "csi" {
  user_id               = proxmox_virtual_environment_user.csi.user_id
  token_name            = var.token
  comment               = "Kubernetes storage driver"
  privileges_separation = var.privileges_separation
}

# With separation, the token has what it is given itself and its user has, too.
resource "proxmox_virtual_environment_acl" "token" {
  for_each  = var.privileges_separation ? local.paths : toset([])
  path      = each.value
  token_id  = proxmox_virtual_environment_user_token.csi.id
  role_id   = proxmox_virtual_environment_role.csi.role_id
  propagate = true
}

resource "kubernetes_namespace_v1" "csi" {
  count = var.kubernetes_secret ? 1 : 0
  metadata {
    name = var.namespace
    labels = {
      "pod-security.kubernetes.io/enforce" = "privileged"
      "pod-security.kubernetes.io/audit"   = "baseline"
      "pod-security.kubernetes.io/warn"    = "baseline"
    }
  }
}

resource "kubernetes_secret_v1" "csi" {
  count = var.kubernetes_secret ? 1 : 0
  metadata {
    name      = "proxmox-csi-plugin"
    namespace = kubernetes_namespace_v1.csi[0].metadata[0].name
  }
  data = {
    "config.yaml" = local.config
  }
}
