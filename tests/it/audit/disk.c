/* A disk that obeys a test, preloaded into the gateway: fdatasync and fsync end here, writes are watched. The folder named by DISK
 * holds what the test asks for and what it wants to know:
 *
 *   hang        while this file exists, no call returns
 *   slow        holds the milliseconds that a call takes
 *   fail        while this file exists, every call fails
 *   fail-once   the next call fails, and removes the file
 *   fail-name   so does the next call for a directory
 *   fail-cuts   while this file exists, no file is cut
 *   hang-writes while this file exists, no write returns
 *   fail-writes holds the number of the error with which writing, cutting and opening for that fail in a folder `audit`
 *   log         a line when a call begins, and one when it ends: nanoseconds, what, call, path
 *   platter/    what a power cut leaves: the bytes of each file at its last good call, by inode; `names`: those
 *               of the directory that was synced last
 *
 *   lost        the bytes that failed calls lost, as inode, begin and end
 *
 * After a failed call the kernel may drop the pages that were to be written and believe them clean. So here: what
 * a failed call should have brought to the disk stays zeros there, whatever later calls say, until it is written
 * again.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const char *place(const char *name) {
  static __thread char path[4][4200]; /* for calls that name several */
  static __thread int turn;
  turn = (turn + 1) % 4;
  snprintf(path[turn], sizeof path[turn], "%s/%s", getenv("DISK"), name);
  return path[turn];
}

static void note(const char *what, const char *call, const char *path) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  char line[4400];
  int length = snprintf(line, sizeof line, "%lld %s %s %s\n", now.tv_sec * 1000000000LL + now.tv_nsec, what, call, path);
  int log = open(place("log"), O_WRONLY | O_CREAT | O_APPEND, 0600);
  if (write(log, line, length) != length) abort();
  close(log);
}

static void wait_as_asked(void) {
  while (access(place("hang"), F_OK) == 0) usleep(1000);
  FILE *slow = fopen(place("slow"), "r");
  int milliseconds = 0;
  if (slow && fscanf(slow, "%d", &milliseconds) == 1) usleep(milliseconds * 1000);
  if (slow) fclose(slow);
}

static int fails(int is_directory) {
  if (is_directory && unlink(place("fail-name")) == 0) return 1;
  return unlink(place("fail-once")) == 0 || access(place("fail"), F_OK) == 0;
}

/* Bytes that failed calls lost, of this process and those before it. */
static struct { unsigned long long file; long long from, to; } lost[256];
static int losses = -1;

static void add_loss(unsigned long long file, long long from, long long to) {
  if (losses == 256) abort();
  lost[losses].file = file;
  lost[losses].from = from;
  lost[losses++].to = to;
}

static void load_losses(void) {
  if (losses >= 0) return;
  losses = 0;
  FILE *known = fopen(place("lost"), "r");
  unsigned long long file;
  long long from, to;
  while (known && fscanf(known, "%llu %lld %lld", &file, &from, &to) == 3) add_loss(file, from, to);
  if (known) fclose(known);
}

static void save_losses(void) {
  FILE *known = fopen(place("lost"), "w");
  for (int i = 0; i < losses; i++) fprintf(known, "%llu %lld %lld\n", lost[i].file, lost[i].from, lost[i].to);
  fclose(known);
}

/* What is written is no longer lost: the next call brings it to the disk. */
static void written(ino_t file, long long from, long long to) {
  load_losses();
  int known = losses, changed = 0;
  for (int i = 0; i < known; i++) {
    if (lost[i].file != file || lost[i].to <= from || to <= lost[i].from) continue;
    if (lost[i].to > to) add_loss(file, to, lost[i].to);
    lost[i].to = lost[i].from < from ? from : lost[i].from;
    changed = 1;
  }
  if (changed) save_losses();
}

static const char *on_platter(ino_t file) {
  char name[64];
  snprintf(name, sizeof name, "platter/%llu", (unsigned long long)file);
  return place(name);
}

static void lose(const struct stat *file) {
  struct stat known = {0};
  off_t from = stat(on_platter(file->st_ino), &known) == 0 ? known.st_size : 0;
  add_loss(file->st_ino, from, file->st_size);
  save_losses();
}

static void keep_bytes(int fd, const struct stat *file) {
  char self[64];
  snprintf(self, sizeof self, "/proc/self/fd/%d", fd); /* it may be open for writing only */
  char *bytes = malloc(file->st_size + 1);
  int source = open(self, O_RDONLY), target = open(place("platter/bytes.new"), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  if (pread(source, bytes, file->st_size, 0) != file->st_size) abort();
  for (int i = 0; i < losses; i++)
    for (long long at = lost[i].from; lost[i].file == file->st_ino && at < lost[i].to && at < file->st_size; at++)
      bytes[at] = 0;
  if (write(target, bytes, file->st_size) != file->st_size) abort();
  close(source);
  close(target);
  rename(place("platter/bytes.new"), on_platter(file->st_ino)); /* all or nothing, like a call that is cut off */
  free(bytes);
}

static void keep_names(int fd) {
  char self[64];
  snprintf(self, sizeof self, "/proc/self/fd/%d", fd);
  FILE *names = fopen(place("platter/names.new"), "w");
  DIR *directory = opendir(self);
  for (struct dirent *entry; (entry = readdir(directory));)
    if (entry->d_type == DT_REG) fprintf(names, "%llu %s\n", (unsigned long long)entry->d_ino, entry->d_name);
  closedir(directory);
  fclose(names);
  rename(place("platter/names.new"), place("platter/names"));
}

static int sync_as_asked(int fd, const char *call) {
  char self[64], path[4096] = {0};
  snprintf(self, sizeof self, "/proc/self/fd/%d", fd);
  if (readlink(self, path, sizeof path - 1) < 0) abort();
  note("begins", call, path);
  wait_as_asked();
  struct stat file;
  if (fstat(fd, &file)) abort();
  load_losses();
  if (fails(S_ISDIR(file.st_mode))) {
    lose(&file);
    note("failed", call, path);
    errno = EIO;
    return -1;
  }
  if (S_ISDIR(file.st_mode)) keep_names(fd);
  else keep_bytes(fd, &file);
  note("done", call, path);
  return 0;
}

int fdatasync(int fd) { return sync_as_asked(fd, "fdatasync"); }
int fsync(int fd) { return sync_as_asked(fd, "fsync"); }

/* Fails as asked, with errno. */
static int refuses_writes(void) {
  FILE *asked = fopen(place("fail-writes"), "r");
  int number = 0;
  if (asked && fscanf(asked, "%d", &number) != 1) number = 0;
  if (asked) fclose(asked);
  if (number) errno = number;
  return number;
}

int open64(const char *path, int flags, ...) {
  static int (*real)(const char *, int, ...);
  if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open64");
  va_list rest;
  va_start(rest, flags);
  mode_t mode = va_arg(rest, mode_t);
  va_end(rest);
  if ((flags & O_ACCMODE) != O_RDONLY && strstr(path, "/audit/") && refuses_writes()) return -1;
  return real(path, flags, mode);
}

int ftruncate64(int fd, off64_t length) {
  static int (*real)(int, off64_t);
  if (!real) real = (int (*)(int, off64_t))dlsym(RTLD_NEXT, "ftruncate64");
  if (access(place("fail-cuts"), F_OK) == 0) {
    errno = EIO;
    return -1;
  }
  return refuses_writes() ? -1 : real(fd, length);
}

ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t offset) {
  static ssize_t (*real)(int, const void *, size_t, off64_t);
  if (!real) real = (ssize_t (*)(int, const void *, size_t, off64_t))dlsym(RTLD_NEXT, "pwrite64");
  while (access(place("hang-writes"), F_OK) == 0) usleep(1000);
  if (refuses_writes()) return -1;
  ssize_t done = real(fd, bytes, length, offset);
  struct stat file;
  if (done > 0 && fstat(fd, &file) == 0) written(file.st_ino, offset, offset + done);
  return done;
}
