output "config" {
  description = "config.yaml for the Secret proxmox-csi-plugin."
  value       = local.config
  sensitive   = true
}
