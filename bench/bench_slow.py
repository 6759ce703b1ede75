#!/usr/bin/env python3
"""Clients that take their time: thousands that send a header byte every two seconds, or a body byte, or read nothing of a long answer. Each must be cut
by its deadline (10, 15, 10 s) while /health goes on answering.

    bench/bench_slow.py SHARDS [--clients 4000] [--readers 60]

Needs the standard library only. One line per kind: when they were cut, and /health's times meanwhile. Ends with 1 when one was not, or late.
"""
import argparse
import json
import resource
import select
import socket
import sys
import threading
import time

from serve_client import Server

LIMITS_S = {"header": 10, "body": 15, "reader": 10}
LATE_S = 2.5  # a loaded machine; and the readers' answers are made first


def request(kind):
    if kind == "header":
        return b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "
    if kind == "body":
        return b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
    body = json.dumps({"prompt": "And the LORD said unto Moses, " * 10000}).encode()  # the answer is larger still
    return b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body


class Health(threading.Thread):
    def __init__(self, port):
        super().__init__(daemon=True)
        self.port, self.times, self.bad, self.over = port, [], 0, False

    def run(self):
        while not self.over:
            began = time.perf_counter()
            try:
                with socket.create_connection(("127.0.0.1", self.port), 5) as s:
                    s.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                    self.bad += not s.recv(100).startswith(b"HTTP/1.1 200")
            except OSError:
                self.bad += 1
            self.times.append(time.perf_counter() - began)
            time.sleep(0.02)

    def end(self):
        self.over = True
        self.join()
        self.times.sort()
        return self.times[len(self.times) * 99 // 100], self.times[-1]


def attack(port, kind, count):
    """Seconds until each client was cut, from its first byte."""
    poll, clients, cut = select.epoll(), {}, []
    data = request(kind)
    for _ in range(count):
        s = socket.socket()
        if kind == "reader":
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.connect(("127.0.0.1", port))
        s.sendall(data)
        s.setblocking(False)
        clients[s.fileno()] = (s, time.monotonic())
        poll.register(s, 0 if kind == "reader" else select.EPOLLIN | select.EPOLLRDHUP)
    end, next_byte = time.monotonic() + LIMITS_S[kind] + 15, 0
    while clients and time.monotonic() < end:
        for fd, events in poll.poll(0.05):
            s, began = clients[fd]
            if kind == "reader" or events & (select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR):
                cut.append(time.monotonic() - began)
                poll.unregister(fd)
                s.close()
                del clients[fd]
            else:
                s.recv(4096)
        if kind != "reader" and time.monotonic() > next_byte:
            next_byte = time.monotonic() + 2
            for s, _ in clients.values():
                try:
                    s.send(b"a")
                except OSError:
                    pass
    for s, _ in clients.values():
        s.close()
    return sorted(cut)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("--clients", type=int, default=4000, help="with slow headers, then with slow bodies")
    parser.add_argument("--readers", type=int, default=60, help="that read nothing")
    args = parser.parse_args()
    needed = max(args.clients, args.readers) + 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(needed, resource.getrlimit(resource.RLIMIT_NOFILE)[0]), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    wrong = 0
    with Server(args.shards, "--max-connections", max(args.clients, args.readers) + 100) as server:
        for kind, limit_s in LIMITS_S.items():
            count = args.readers if kind == "reader" else args.clients
            health = Health(server.port)
            health.start()
            cut = attack(server.port, kind, count)
            p99, most = health.end()
            rss, descriptors = server.figures()
            good = len(cut) == count and limit_s - 0.5 <= cut[0] and cut[-1] <= limit_s + LATE_S and not health.bad
            wrong += not good
            print(f"slow kind={kind} clients={count} cut={len(cut)} first_s={cut[0] if cut else -1:.2f} last_s={cut[-1] if cut else -1:.2f} "
                  f"health_p99_ms={1e3 * p99:.1f} health_max_ms={1e3 * most:.1f} health_bad={health.bad} rss_mib={rss / 1024:.0f} "
                  f"descriptors={descriptors} {'ok' if good else 'WRONG'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
