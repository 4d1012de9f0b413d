"""Stands for a Python that tests/forked_server.py forks: `python forked_client.py SOCKET ARGUMENTS…`."""

import json
import os
import signal
import socket
import sys


def main() -> None:
    """Have the server run the program, and end as it does."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(sys.argv[1])
    request = {"arguments": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ)}  # noqa: PTH109 (pathlib is slow to import)
    data = json.dumps(request).encode()
    socket.send_fds(server, [len(data).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(data)
    for file in (0, 1, 2):
        os.close(file)  # its own alone: whoever reads them waits for the program
    answers = server.makefile()
    program = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(program, number))
    code = int(answers.readline() or -signal.SIGKILL)
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
