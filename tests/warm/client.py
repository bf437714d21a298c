# The body of a program of `Warm.folder`, after the line that sets ADDRESS and FIRST. Imports little: it starts often.
import array
import json
import os
import signal
import socket
import sys

server = socket.socket(socket.AF_UNIX)
server.connect(ADDRESS)  # noqa: F821
request = {
    "words": FIRST + sys.argv[1:],  # noqa: F821
    "folder": os.getcwd(),
    "environment": dict(os.environ),
}
text = json.dumps(request).encode()
streams = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))
server.sendmsg([len(text).to_bytes(8, "big")], [streams])
server.sendall(text)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: server.sendall(bytes([number])))
code = int.from_bytes(server.recv(4), "big", signed=True)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
