#!/usr/bin/env bash
# huggingface_hub 2.4.0: a hub answers 401 for a repository that is not there (or private). Over https
# that is RepositoryNotFoundError; from an HF_ENDPOINT without TLS, such as a mirror on one's own
# network, the same answer is a bare HfHubHTTPError, because the pattern of model addresses begins
# with https:// (those of buckets and jobs take http as well).
# efficient_vlm/families/hub_errors.py takes both for missing (tests/families/test_hub.py).
# Seen with Python 3.11, huggingface_hub 2.4.0:
#   HfHubHTTPError
#   http False, https True
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'huggingface_hub==2.4.0'
HF_HOME="$folder/home" "$folder/venv/bin/python" -W ignore - <<'PY'
import http.server
import os
import threading


class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_address[1]}"

import huggingface_hub
from huggingface_hub.utils import _http

print("huggingface_hub", huggingface_hub.__version__)
try:
    huggingface_hub.model_info("org/missing")
except huggingface_hub.errors.HfHubHTTPError as error:
    kind = type(error).__name__
print(kind)
address = "://hub.example/api/models/org/missing"
known = [bool(_http.REPO_API_REGEX.search(scheme + address)) for scheme in ("http", "https")]
print(f"http {known[0]}, https {known[1]}")
assert (kind, known) == ("HfHubHTTPError", [False, True]), "changed"
PY
