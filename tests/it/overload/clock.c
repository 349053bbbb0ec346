/* A wall clock that obeys a test, preloaded into the gateway: it is ahead by the seconds in the file named by CLOCK.
 * The monotonic clock goes on as it does; so it is with a machine that was suspended. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static time_t ahead(void) {
  long seconds = 0;
  FILE *file = fopen(getenv("CLOCK"), "r");
  if (!file) return 0;
  if (fscanf(file, "%ld", &seconds) != 1) seconds = 0;
  fclose(file);
  return seconds;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int result = real(clock, time);
  if (result == 0 && clock == CLOCK_REALTIME) time->tv_sec += ahead();
  return result;
}
