/*
 * Ours, in place of util-linux's include/cctype.h, which is under the GPL: the two functions that libblkid (iso9660.c) uses,
 * character handling in the C locale.
 */
#ifndef PROXMOX_CSI_CCTYPE_H
#define PROXMOX_CSI_CCTYPE_H

static inline int c_isupper(int c) { return c >= 'A' && c <= 'Z'; }
static inline int c_toupper(int c) { return c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c; }

#endif
