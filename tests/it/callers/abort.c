/* While the file named by ABORT holds a port, connections to it are aborted: receiving fails as it does when the kernel was told to
 * end a connection, which no peer can be made to do. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

ssize_t recv(int socket, void *buffer, size_t length, int flags) {
  static ssize_t (*next)(int, void *, size_t, int);
  if (!next) next = dlsym(RTLD_NEXT, "recv");
  int port = 0;
  FILE *file = fopen(getenv("ABORT"), "r");
  if (file) {
    if (fscanf(file, "%d", &port) != 1) port = 0;
    fclose(file);
  }
  struct sockaddr_in own = {0};
  socklen_t size = sizeof own;
  if (port && getsockname(socket, (struct sockaddr *)&own, &size) == 0 && ntohs(own.sin_port) == port) {
    errno = ECONNABORTED;
    return -1;
  }
  return next(socket, buffer, length, flags);
}
