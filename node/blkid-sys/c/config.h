/*
 * What libblkid's C asks about the system it is built for, answered for Linux with glibc or musl (64 bits).
 *
 * Ours: facts about the two C libraries, in place of a run of configure. Anything not named here is absent on
 * purpose. No floppy and no CD-ROM header: a volume is neither, and there libblkid forgives unreadable sectors.
 */
#define _GNU_SOURCE 1

#define LIBBLKID_VERSION "2.38.1"
#define LIBBLKID_DATE "04-Aug-2022"
#define PACKAGE_STRING "util-linux 2.38.1"
#define CONFIG_ADJTIME_PATH "/etc/adjtime"

#define HAVE_BYTESWAP_H 1
#define HAVE_ENDIAN_H 1
#define HAVE_ERRNO_H 1
#define HAVE_ERR_H 1
#define HAVE_LINUX_BLKZONED_H 1
#define HAVE_LOCALE_H 1
#define HAVE_LANGINFO_H 1
#define HAVE_PATHS_H 1
#define HAVE_STDLIB_H 1
#define HAVE_SYS_IOCTL_H 1
#define HAVE_SYS_PRCTL_H 1
#define HAVE_SYS_STAT_H 1
#define HAVE_SYS_SYSMACROS_H 1
#define HAVE_SYS_TYPES_H 1
#define HAVE_UNISTD_H 1

#define HAVE_DECL_DIRFD 1
#define HAVE_DIRFD 1
#define HAVE_ENVIRON_DECL 1
#define HAVE_ERR 1
#define HAVE_ERRX 1
#define HAVE_FSYNC 1
#define HAVE_GETRLIMIT 1
#define HAVE_LOFF_T 1
#define HAVE_MEMPCPY 1
#define HAVE_MKOSTEMP 1
#define HAVE_NANOSLEEP 1
#define HAVE_OPENAT 1
#define HAVE_POSIX_FADVISE 1
#define HAVE_PRCTL 1
#define HAVE_PROGRAM_INVOCATION_SHORT_NAME 1
#define HAVE_SECURE_GETENV 1
#define HAVE_STRNDUP 1
#define HAVE_STRNLEN 1
#define HAVE_STRUCT_STAT_ST_MTIM_TV_NSEC 1
#define HAVE_SYSCONF 1
#define HAVE_TLS 1
#define HAVE_WARN 1
#define HAVE_WARNX 1
