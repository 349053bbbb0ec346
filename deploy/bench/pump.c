// Blind pump: copies bytes both ways between each caller and a connection of its own to the upstream, and looks at
// none: pump PORT UPSTREAM_PORT. One thread, edge-triggered epoll. What a proxy costs beyond it is its own work.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

typedef struct Side {
    int fd;
    struct Side *other;
} Side;

static struct sockaddr_in loopback(int port) {
    return (struct sockaddr_in){
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

static void accept_one(int epoll, int listener, struct sockaddr_in upstream) {
    int on = 1, fds[2] = {accept4(listener, 0, 0, SOCK_NONBLOCK), -1};
    if (fds[0] < 0) return;
    fds[1] = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fds[1], (void *)&upstream, sizeof upstream)) {
        close(fds[0]);
        close(fds[1]);
        return;
    }
    Side *sides = calloc(2, sizeof *sides);
    for (int i = 0; i < 2; i++) {
        sides[i] = (Side){fds[i], &sides[1 - i]};
        setsockopt(fds[i], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    }
    for (int i = 0; i < 2; i++) {
        struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.ptr = &sides[i]};
        epoll_ctl(epoll, EPOLL_CTL_ADD, fds[i], &event);
    }
}

static void copy(Side *side) {
    static char buffer[65536];
    ssize_t n = recv(side->fd, buffer, sizeof buffer, MSG_DONTWAIT);
    if (n > 0) {
        send(side->other->fd, buffer, n, MSG_NOSIGNAL | MSG_DONTWAIT);
    } else if (n == 0 && side->fd >= 0) {
        // The pair is not freed: an event of the other side may already wait. It goes with the process.
        close(side->fd);
        close(side->other->fd);
        side->fd = side->other->fd = -1;
    }
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    signal(SIGPIPE, SIG_IGN);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    struct sockaddr_in address = loopback(atoi(argv[1])), upstream = loopback(atoi(argv[2]));
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, 4096)) {
        perror("pump");
        return 1;
    }
    int epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = 0}, events[512];
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int n = epoll_wait(epoll, events, 512, -1);
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr) copy(events[i].data.ptr);
            else accept_one(epoll, listener, upstream);
        }
    }
}
