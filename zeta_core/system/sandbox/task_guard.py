"""The guard of `task_limit`: a program that imports nothing but the standard library, so that it starts quickly.

``python task_guard.py LIMIT [FILE]``. Standard input is a socket, from which it gets the descriptor of seccomp's
notifications (seccomp_unotify(2)), and the number, device and inode of the descriptor that marks the processes of the
sandbox, which they can't close.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import struct
import sys
from contextlib import suppress

_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV and _SEND
_NOTIFICATION = struct.Struct("QII64x")  # seccomp_notif: id, pid, flags, data
_RESPONSE = struct.Struct("QqiI")  # seccomp_notif_resp: id, value, error, flags
_CONTINUE = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE: execute the call
_PARENT, _NUM_THREADS = 1, 17  # fields of /proc/PID/stat after the name
_KILL_MILLISECONDS = 20  # between two rounds of signals


class Guard:
    def __init__(self, listener: int, mark: int, file: tuple[int, int], limit: int) -> None:
        self._listener, self._mark, self._file, self._limit = listener, mark, file, limit
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)

    def run(self) -> bool:
        """Allow new processes and threads; returns whether their number has exceeded the limit.

        The number is an upper bound, because ends are not reported; the exact one is only counted if it is too large.
        """
        number = 1
        while not self._events(None) & select.POLLHUP:
            request = bytearray(_NOTIFICATION.size)
            try:
                fcntl.ioctl(self._listener, _RECEIVE, request)
            except OSError:
                continue  # the process that asked was killed
            if number >= self._limit:
                number = self._count()
            if number >= self._limit:
                return True
            number += 1
            answer = _RESPONSE.pack(_NOTIFICATION.unpack(request)[0], 0, 0, _CONTINUE)
            with suppress(OSError):  # it was killed
                fcntl.ioctl(self._listener, _SEND, answer)
        return False

    def kill_all(self) -> None:
        """Kill the processes of the sandbox until none is left."""
        while not self._events(0) & select.POLLHUP:
            for pid in _processes():
                with suppress(OSError):  # it has exited
                    process = os.pidfd_open(pid)
                    try:
                        if self._is_marked(pid):
                            signal.pidfd_send_signal(process, signal.SIGKILL)
                    finally:
                        os.close(process)
            select.select([], [], [], _KILL_MILLISECONDS / 1000)

    def _events(self, milliseconds: int | None) -> int:
        """Wait for a notification; ``POLLHUP`` if no process of the sandbox is left."""
        found = self._poll.poll(milliseconds)
        return found[0][1] if found else 0

    def _count(self) -> int:
        """The number of threads of all processes of the sandbox and their descendants, such as zombies."""
        threads, children, members = dict[int, int](), dict[int, list[int]](), list[int]()
        for pid in _processes():
            try:
                with open(f"/proc/{pid}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue  # it has exited
            threads[pid] = max(1, int(fields[_NUM_THREADS]))
            children.setdefault(int(fields[_PARENT]), []).append(pid)
            if self._is_marked(pid):
                members.append(pid)
        counted = set[int]()
        while members:
            pid = members.pop()
            if pid not in counted and pid != os.getpid():
                counted.add(pid)
                members += children.get(pid, ())
        return sum(threads[pid] for pid in counted)

    def _is_marked(self, pid: int) -> bool:
        try:
            file = os.stat(f"/proc/{pid}/fd/{self._mark}")
        except OSError:
            return False
        return (file.st_dev, file.st_ino) == self._file


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _write(file: str, content: str) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    os.write(descriptor, content.encode())
    os.close(descriptor)


def main(limit: int, file: str | None) -> None:
    os.close(1)  # it may be a pipe that is read to its end
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # such as the lock of the run
    message, descriptors, _, _ = socket.recv_fds(socket.socket(fileno=0), 100, 1)
    if not descriptors:
        return  # the sandbox could not be entered
    mark, device, inode = map(int, message.split())
    guard = Guard(descriptors[0], mark, (device, inode), limit)
    if guard.run():
        if file is not None:
            with suppress(OSError):  # a full disk, or the sandbox has created it
                _write(file, f"{limit}")
        guard.kill_all()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
