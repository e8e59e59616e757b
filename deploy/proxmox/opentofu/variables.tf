variable "url" {
  description = "The Proxmox API as the cluster's pods reach it, with /api2/json."
  type        = string
}

variable "region" {
  description = "The Proxmox cluster's name in Kubernetes: the nodes' label topology.kubernetes.io/region."
  type        = string
}

variable "insecure" {
  description = "Whether the certificate is left unverified."
  type        = bool
  default     = false
}

variable "role" {
  description = "The role's name."
  type        = string
  default     = "CSI"
}

variable "user" {
  description = "The user, with its realm."
  type        = string
  default     = "kubernetes-csi@pve"
}

variable "token" {
  description = "The token's name."
  type        = string
  default     = "csi"
}

variable "privileges_separation" {
  description = "Whether the token has rights of its own, beside its user's."
  type        = bool
  default     = false
}

variable "paths" {
  description = "Where the role is given. Sys.Audit counts on / only."
  type        = set(string)
  default     = ["/"]
}

variable "pool" {
  description = "A pool of VMs and storages that the role is given on, beside paths. Every VM that could hold a volume has to be seen by the driver."
  type        = string
  default     = null
}

variable "kubernetes_secret" {
  description = "Whether to make the namespace and the Secret in Kubernetes, too."
  type        = bool
  default     = false
}

variable "namespace" {
  description = "The driver's namespace."
  type        = string
  default     = "csi-proxmox"
}
