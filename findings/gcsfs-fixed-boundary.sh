#!/usr/bin/env bash
# gcsfs 2026.7.0: an upload of less than 5 MiB whose content has a line `--==0==` arrives cut off at that line, and is
# reported as done.
#
# Small uploads are one multipart/related request whose boundary is always `==0==`, whatever the content; a server that
# reads the request as RFC 2046 says ends the part at the first line that is the boundary. The size that the server
# answers is not compared with what was sent (gcsfs' default consistency check is "none").
# Here the server is one on this machine that takes the request apart with Python's own e-mail parser.
# Seen: of 34 bytes written 11 arrive; pipe_file() raises nothing.
#
# Exits 0 while this is so, 1 once it has changed. Needs Python 3.11 to 3.13 and pip; some 20 s.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check gcsfs==2026.7.0 fsspec==2026.6.0
cd "$folder"
cat >upload.py <<'PYTHON'
import email
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # else it asks Google what kind of bucket this is
import gcsfs

CONTENT = b"first line\n\n--==0==\n\nand the rest\n"
arrived = []


class Store(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        head = f"Content-Type: {self.headers['Content-Type']}\n\n".encode()
        metadata, content = email.message_from_bytes(head + body).get_payload()[:2]
        stored = content.get_payload(decode=True)
        arrived.append(stored)
        answer = json.loads(metadata.get_payload()) | {"bucket": "b", "size": str(len(stored))}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
threading.Thread(target=server.serve_forever, daemon=True).start()
store = gcsfs.GCSFileSystem(token="anon", project="p", endpoint_url=f"http://127.0.0.1:{server.server_port}")
store.pipe_file("b/notes.txt", CONTENT)
(stored,) = arrived
print(f"{len(CONTENT)} bytes written, {len(stored)} arrived: {stored!r}")
sys.exit(0 if len(stored) < len(CONTENT) and CONTENT.startswith(stored) else 1)
PYTHON
"$folder/venv/bin/python" upload.py
