// Load: HTTP/1.1 keep-alive POSTs over many connections, one thread, epoll. Prints one line of JSON.
//
//   load --port P --body FILE [--path PATH] [--connections N] and one of
//     --seconds S [--warm S] [--rate R] [--watch PID]   answers within a window of S seconds
//     --requests N                                      exactly N requests
//     --hold                                            one request on each connection, then idle until stdin ends
//     --first -- COMMAND...                             from exec of COMMAND to its first answer
//
// Without --rate the loop is closed: each connection sends again when it has its answer. With --rate requests are
// due at start + k/R, and latency counts from when a request was due, not from when it could be sent. The window
// opens after --warm seconds and at least one answer on each connection, so that connecting is not in it. --watch
// reads the CPU clock of a process, all its threads, at both ends of the window. At the end nothing new is sent and
// all answers are awaited: "answered" counts every answer since the start, so that it can be held against what
// the proxy and the upstream counted. A connection that breaks ends the run with status 1.
//
// Each request assigns another task: the digits of the body's first number are counted up.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { ANSWER_MAX = 8192, SAMPLES_MAX = 8000000, WAIT_MS = 10000 };

typedef struct {
    int fd;
    int length; // bytes of the answer so far
    long answers;
    double due;
    char answer[ANSWER_MAX + 1];
} Connection;

static char *request;
static size_t request_length;
static char *task; // the last of its digits
static struct sockaddr_in address;
static Connection *connections;
static int epoll, count = 1;
static long answered, bad, in_flight;

static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "load: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

// CPU time of another process, all its threads, those that ended included (the kernel's per-process clock).
static double cpu(int pid) {
    struct timespec t;
    if (!pid) return 0;
    if (clock_gettime((clockid_t)(~(unsigned)pid << 3 | 2), &t)) die("no CPU clock of process %d", pid);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void read_request(const char *path, const char *file) {
    FILE *f = fopen(file, "rb");
    static char body[1 << 20];
    if (!f) die("%s: %s", file, strerror(errno));
    size_t length = fread(body, 1, sizeof body, f);
    fclose(f);
    request = malloc(length + 1024);
    request_length = sprintf(request,
        "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nAccept: */*\r\n"
        "User-Agent: load/1\r\nContent-Length: %zu\r\n\r\n", path, length);
    memcpy(request + request_length, body, length);
    // From the time on, so that no run sends what another one has sent.
    char *digits = request + request_length + strcspn(body, "123456789");
    size_t size = strspn(digits, "0123456789");
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    char first[32];
    sprintf(first, "%018ld", (t.tv_sec * 1000000000L + t.tv_nsec) / 10);
    if (size != strlen(first)) die("%s: the first number needs %zu digits", file, strlen(first));
    memcpy(digits, first, size);
    task = digits + size - 1;
    request_length += length;
}

static void next_task(void) {
    char *digit = task;
    while (++*digit > '9') *digit-- = '0';
}

static int try_connect(void) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    if (fd < 0) die("socket: %s", strerror(errno));
    if (connect(fd, (void *)&address, sizeof address)) {
        close(fd);
        return -1;
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return fd;
}

static void open_connections(void) {
    epoll = epoll_create1(EPOLL_CLOEXEC);
    connections = calloc(count, sizeof *connections);
    for (int i = 0; i < count; i++) {
        connections[i].fd = try_connect();
        if (connections[i].fd < 0) die("connection %d of %d: %s", i + 1, count, strerror(errno));
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &connections[i]};
        epoll_ctl(epoll, EPOLL_CTL_ADD, connections[i].fd, &event);
    }
}

static void send_request(Connection *c, double due) {
    c->due = due;
    c->length = 0;
    in_flight++;
    next_task();
    for (size_t sent = 0; sent < request_length;) {
        ssize_t n = send(c->fd, request + sent, request_length - sent, MSG_NOSIGNAL);
        if (n < 0) die("send: %s", strerror(errno));
        sent += n;
    }
}

// Reads what is there; true once the answer is whole.
static int read_answer(Connection *c) {
    ssize_t n = recv(c->fd, c->answer + c->length, ANSWER_MAX - c->length, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN) return 0;
    if (n <= 0) die("a connection closed (%s) after %ld answers", n ? strerror(errno) : "end", answered);
    c->length += n;
    c->answer[c->length] = 0;
    char *end = strstr(c->answer, "\r\n\r\n");
    if (!end) return 0;
    char *field = strcasestr(c->answer, "\r\ncontent-length:");
    if (field && field < end) {
        if (c->length < end + 4 - c->answer + atol(field + 17)) return 0;
    } else if (!strstr(end, "\r\n0\r\n\r\n")) {
        return 0; // chunked, and not at its end
    }
    in_flight--;
    answered++;
    c->answers++;
    if (strncmp(c->answer + 9, "200", 3) && ++bad <= 3) fprintf(stderr, "load: not 200: %.300s\n", c->answer);
    return 1;
}

static int wait_events(struct epoll_event *events, int max) {
    int n = epoll_wait(epoll, events, max, WAIT_MS);
    if (n == 0) die("no answer for %d s; %ld in flight", WAIT_MS / 1000, in_flight);
    return n;
}

static int by_size(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

// Connections that wait for a request to be due, and requests that are due and wait for a connection.
static Connection **idle;
static double *waiting;
static int idle_count;
static long waiting_first, waiting_end;
enum { WAITING_MAX = 1 << 20 };

static void request_is_due(double due) {
    if (idle_count) send_request(idle[--idle_count], due);
    else waiting[waiting_end++ % WAITING_MAX] = due;
}

static int timer(double first, double rate) {
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct itimerspec spec = {
        .it_interval = {.tv_nsec = 1e9 / rate},
        .it_value = {.tv_sec = first, .tv_nsec = (first - (long)first) * 1e9},
    };
    if (rate <= 1) die("--rate must be more than 1");
    timerfd_settime(fd, TFD_TIMER_ABSTIME, &spec, 0);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = 0};
    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
    return fd;
}

static int all_answered(void) {
    static int next; // those before it have been seen to have an answer
    while (next < count && connections[next].answers) next++;
    return next == count;
}

static void run_window(double seconds, double warm, double rate, int pid) {
    enum { WARM, OPEN, DRAIN } phase = WARM;
    struct epoll_event events[1024];
    float *samples = malloc(SAMPLES_MAX * sizeof *samples);
    long sample_count = 0, before = 0, due_count = 0;
    double first = now() + 0.01, opened = 0, cpu_before = 0, took = 0, spent = 0;
    long in_window = 0;
    int clock = -1;
    idle = malloc(count * sizeof *idle);
    waiting = malloc(WAITING_MAX * sizeof *waiting);
    for (int i = 0; i < count; i++) send_request(&connections[i], now());
    if (rate > 0) clock = timer(first, rate);
    while (phase != DRAIN || in_flight) { // nothing waits for a connection when none is busy
        int n = wait_events(events, 1024);
        for (int i = 0; i < n; i++) {
            Connection *c = events[i].data.ptr;
            if (!c) {
                unsigned long periods = 0;
                if (read(clock, &periods, sizeof periods) != sizeof periods) continue;
                while (periods--) {
                    double due = first + due_count++ / rate;
                    if (phase == WARM || due < opened + seconds) request_is_due(due);
                }
                continue;
            }
            if (!read_answer(c)) continue;
            double t = now();
            // With a rate, what was due within the window is a sample, however late its answer comes.
            int is_sample = rate > 0 ? phase != WARM && c->due >= opened && c->due < opened + seconds : phase == OPEN;
            if (is_sample && sample_count < SAMPLES_MAX) samples[sample_count++] = t - c->due;
            if (rate > 0 && waiting_first < waiting_end) send_request(c, waiting[waiting_first++ % WAITING_MAX]);
            else if (rate > 0) idle[idle_count++] = c;
            else if (phase != DRAIN) send_request(c, t);
        }
        double t = now();
        if (phase == WARM && t >= first + warm && all_answered()) {
            phase = OPEN;
            cpu_before = cpu(pid);
            opened = now();
            before = answered;
        } else if (phase == OPEN && t >= opened + seconds) {
            phase = DRAIN;
            spent = cpu(pid) - cpu_before;
            took = now() - opened;
            in_window = answered - before;
        }
    }
    qsort(samples, sample_count, sizeof *samples, by_size);
#define PERCENTILE(x) (sample_count ? samples[(long)((sample_count - 1) * (x))] * 1e6 : 0)
    printf("{\"answered\":%ld,\"bad\":%ld,\"window\":%ld,\"seconds\":%.6f,\"cpu_us\":%.1f,\"p50\":%.1f,\"p99\":%.1f}\n",
        answered, bad, in_window, took, spent * 1e6, PERCENTILE(.5), PERCENTILE(.99));
}

static void run_requests(long requests) {
    struct epoll_event events[1024];
    long sent = 0;
    for (int i = 0; i < count && sent < requests; i++, sent++) send_request(&connections[i], 0);
    while (in_flight) {
        int n = wait_events(events, 1024);
        for (int i = 0; i < n; i++) {
            Connection *c = events[i].data.ptr;
            if (read_answer(c) && sent < requests) {
                send_request(c, 0);
                sent++;
            }
        }
    }
    printf("{\"answered\":%ld,\"bad\":%ld}\n", answered, bad);
}

static void run_hold(void) {
    struct epoll_event events[1024];
    int sent = 0;
    do { // sixteen at once: what is idle is to be measured, not a burst
        while (sent < count && in_flight < 16) send_request(&connections[sent++], 0);
        int n = wait_events(events, 1024);
        for (int i = 0; i < n; i++) read_answer(events[i].data.ptr);
    } while (sent < count || in_flight);
    printf("{\"answered\":%ld,\"bad\":%ld}\n", answered, bad);
    fflush(stdout);
    char byte;
    while (read(0, &byte, 1) > 0) {}
}

// One attempt: an answer of any status, or nothing.
static int first_answer(Connection *c) {
    c->fd = try_connect();
    if (c->fd < 0) return 0;
    send_request(c, 0);
    while (!read_answer(c)) {
        fd_set set;
        FD_ZERO(&set);
        FD_SET(c->fd, &set);
        select(c->fd + 1, &set, 0, 0, 0);
    }
    close(c->fd);
    return !strncmp(c->answer + 9, "200", 3);
}

// The command runs on core 0, this process stays where it is.
static void run_first(char **command) {
    static Connection c;
    double start = now(), end;
    pid_t pid = fork();
    if (!pid) {
        cpu_set_t core;
        CPU_ZERO(&core);
        CPU_SET(0, &core);
        sched_setaffinity(0, sizeof core, &core);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(2, 1); // our stdout is for the result
        execvp(command[0], command);
        die("%s: %s", command[0], strerror(errno));
    }
    while (!first_answer(&c)) {
        if (waitpid(pid, 0, WNOHANG) == pid) die("%s ended before it answered", command[0]);
        if (now() > start + WAIT_MS / 1000.0) die("%s does not answer", command[0]);
        usleep(100);
    }
    end = now();
    kill(pid, SIGTERM);
    for (int i = 0; i < 1000 && waitpid(pid, 0, WNOHANG) != pid; i++) usleep(10000);
    kill(pid, SIGKILL); // in vain if it has ended, as it should
    printf("{\"answered\":%ld,\"bad\":%ld,\"ms\":%.3f}\n", answered, bad, (end - start) * 1e3);
}

int main(int argc, char **argv) {
    enum { WINDOW, REQUESTS, HOLD, FIRST } mode = WINDOW;
    const char *path = "/apiaccess/CCSQM/rest/ccisqm/v1/qualitytask/appointQualityTask", *body = 0;
    double seconds = 1, warm = 0.1, rate = 0;
    long requests = 0;
    int port = 0, pid = 0, option;
    static const struct option options[] = {
        {"port", 1, 0, 'p'}, {"body", 1, 0, 'b'}, {"path", 1, 0, 'u'}, {"connections", 1, 0, 'c'},
        {"seconds", 1, 0, 's'}, {"warm", 1, 0, 'w'}, {"rate", 1, 0, 'r'}, {"watch", 1, 0, 'i'},
        {"requests", 1, 0, 'n'}, {"hold", 0, 0, 'h'}, {"first", 0, 0, 'f'}, {0, 0, 0, 0},
    };
    while ((option = getopt_long(argc, argv, "+", options, 0)) != -1) switch (option) {
        case 'p': port = atoi(optarg); break;
        case 'b': body = optarg; break;
        case 'u': path = optarg; break;
        case 'c': count = atoi(optarg); break;
        case 's': seconds = atof(optarg); break;
        case 'w': warm = atof(optarg); break;
        case 'r': rate = atof(optarg); break;
        case 'i': pid = atoi(optarg); break;
        case 'n': mode = REQUESTS; requests = atol(optarg); break;
        case 'h': mode = HOLD; break;
        case 'f': mode = FIRST; break;
        default: return 2;
    }
    if (!port || !body || count < 1) die("--port, --body and at least one connection are needed");
    address = (struct sockaddr_in){
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    read_request(path, body);
    if (mode == FIRST) {
        run_first(argv + optind);
        return 0;
    }
    open_connections();
    if (mode == WINDOW) run_window(seconds, warm, rate, pid);
    if (mode == REQUESTS) run_requests(requests);
    if (mode == HOLD) run_hold();
    return 0;
}
