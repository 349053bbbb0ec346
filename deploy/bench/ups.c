// Upstream: a small HTTP/1.1 server, one thread, epoll: ups PORT
//
// Answers every request with the vendor's success. Counts requests, and those that lack authorization, x-app-key
// or x-userid; GET /_counts tells both and is not counted itself. Bodies by Content-Length or chunked.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

enum { BUFFER = 16384 };

static const char ANSWER[] =
    "HTTP/1.1 200 OK\r\nContent-Type: application/json;charset=UTF-8\r\nContent-Length: 64\r\n\r\n"
    "{\"resultCode\": \"0409000\", \"resultDesc\": \"Operation successful.\"}";

typedef struct {
    int fd;
    int length;
    long rest; // of a body that does not fit the buffer
    char *buffer;
} Connection;

static unsigned long requests, missing;

static void answer(Connection *c) {
    requests++;
    send(c->fd, ANSWER, sizeof ANSWER - 1, MSG_NOSIGNAL);
}

static void tell(Connection *c) {
    char body[128], text[256];
    int length = sprintf(body, "{\"requests\":%lu,\"missing\":%lu}", requests, missing);
    length = sprintf(text, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", length, body);
    send(c->fd, text, length, MSG_NOSIGNAL);
}

static void finish(Connection *c) {
    close(c->fd);
    free(c->buffer);
    free(c);
}

// Takes one request out of the buffer; 0 when there is no whole one.
static int take(Connection *c) {
    char *end = memmem(c->buffer, c->length, "\r\n\r\n", 4), *field;
    if (!end) return 0;
    *end = 0;
    long head = end + 4 - c->buffer, body = 0;
    int is_question = !strncmp(c->buffer, "GET /_counts", 12), is_chunked = 0;
    if ((field = strcasestr(c->buffer, "\r\ncontent-length:"))) body = atol(field + 17);
    else is_chunked = strcasestr(c->buffer, "\r\ntransfer-encoding:") != 0;
    int lacks = !strcasestr(c->buffer, "\r\nauthorization:") || !strcasestr(c->buffer, "\r\nx-app-key:") ||
                !strcasestr(c->buffer, "\r\nx-userid:");
    *end = '\r';
    if (is_chunked) {
        char *last = memmem(end + 2, c->length - head + 2, "\r\n0\r\n\r\n", 7);
        if (!last) return 0;
        body = last + 7 - c->buffer - head;
    }
    if (head + body > BUFFER) {
        missing += lacks;
        c->rest = head + body - c->length;
        c->length = 0;
        return 0;
    }
    if (c->length < head + body) return 0;
    c->length -= head + body;
    memmove(c->buffer, c->buffer + head + body, c->length);
    if (is_question) {
        tell(c);
    } else {
        missing += lacks;
        answer(c);
    }
    return c->length > 0;
}

static void serve(Connection *c) {
    static char sink[65536];
    ssize_t n;
    if (c->rest) {
        n = recv(c->fd, sink, c->rest < (long)sizeof sink ? c->rest : (long)sizeof sink, MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN) return;
        if (n <= 0) return finish(c);
        if (!(c->rest -= n)) answer(c);
        return;
    }
    n = recv(c->fd, c->buffer + c->length, BUFFER - c->length, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) return finish(c);
    c->length += n;
    while (take(c)) {}
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    struct sockaddr_in address = {
        .sin_family = AF_INET,
        .sin_port = htons(argc > 1 ? atoi(argv[1]) : 0),
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, 4096)) {
        perror("ups");
        return 1;
    }
    int epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = 0}, events[512];
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int n = epoll_wait(epoll, events, 512, -1);
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr) {
                serve(events[i].data.ptr);
                continue;
            }
            int fd = accept4(listener, 0, 0, SOCK_NONBLOCK);
            if (fd < 0) continue;
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
            Connection *c = calloc(1, sizeof *c);
            c->fd = fd;
            c->buffer = malloc(BUFFER);
            event.data.ptr = c;
            epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
        }
    }
}
