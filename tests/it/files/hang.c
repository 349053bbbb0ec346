/* A mount that is dead, preloaded into the gateway: while the file named by HANG exists, whoever opens or looks at a file
 * whose path contains the text in it waits. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int hangs(const char *path) {
  char text[4096];
  const char *name = getenv("HANG");
  int file = name ? (int)syscall(SYS_openat, AT_FDCWD, name, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return 0;
  long length = syscall(SYS_read, file, text, sizeof text - 1);
  syscall(SYS_close, file);
  if (length <= 0) return 0;
  text[length] = 0;
  return strstr(path, text) != NULL;
}

static void wait_for(const char *path) {
  while (path && hangs(path)) usleep(5000);
}

#define MODE(last) \
  mode_t mode = 0; \
  if (flags & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, last); mode = va_arg(list, mode_t); va_end(list); }

int open(const char *path, int flags, ...) {
  MODE(flags)
  wait_for(path);
  return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...) {
  MODE(flags)
  wait_for(path);
  return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

int statx(int at, const char *restrict path, int flags, unsigned mask, struct statx *restrict found) {
  wait_for(path);
  return (int)syscall(SYS_statx, at, path, flags, mask, found);
}

int stat64(const char *restrict path, struct stat64 *restrict found) {
  static int (*real)(const char *, struct stat64 *);
  if (!real) real = dlsym(RTLD_NEXT, "stat64");
  wait_for(path);
  return real(path, found);
}
