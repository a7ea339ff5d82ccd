#!/usr/bin/env bash
# Credentials in Docker's config.json may be "username" and "password" in place of "auth", the base64 of both: the
# docker command line takes either form since 19.03 (docker/cli, pull requests 2122 and 2264). The docker SDK for
# Python (7.2.0) takes such an entry for an empty one, and pulls as nobody; docker/auth.py, parse_auth: `if 'auth' not
# in entry`. It warns of nothing, so all that is seen is a registry's refusal.
#
# The "daemon" here is a few lines of http.server on the loopback address that print the credentials they are sent.
set -euo pipefail

directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT

python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check docker==7.2.0

DOCKER_CONFIG=$directory "$directory/venv/bin/python" - <<'PYTHON'
import base64
import http.server
import json
import os
import sys
import threading
from pathlib import Path

import docker

FORMS = {
    "auth": {"auth": base64.b64encode(b"someone:secret").decode()},
    "username and password": {"username": "someone", "password": "secret"},
}
sent = []


class Daemon(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        header = self.headers["X-Registry-Auth"]
        sent.append(header and json.loads(base64.urlsafe_b64decode(header)))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Daemon)
threading.Thread(target=server.serve_forever, daemon=True).start()
print("docker SDK", docker.__version__)
for form, entry in FORMS.items():
    (Path(os.environ["DOCKER_CONFIG"]) / "config.json").write_text(json.dumps({"auths": {"registry.example": entry}}))
    client = docker.APIClient(base_url=f"http://127.0.0.1:{server.server_port}", version="1.41", timeout=20)
    client.pull("registry.example/image", tag="latest")
    client.close()
    print(f"config.json has {form}; the daemon is sent {sent[-1]}")
server.shutdown()

with_auth, plain = sent
if (with_auth["username"], with_auth["password"]) == ("someone", "secret") and not plain:
    print("As described: the plain form is dropped.")
else:
    sys.exit("This has changed: expected the credentials of the first form, and none of the second.")
PYTHON
