"""A W&B server of the few answers that a run needs, for tests of what happens when it goes away."""

from __future__ import annotations

import gzip
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

HANGS_S = 30.0


class FakeServer:
    """Answers on a port of this machine; ``hangs`` names paths that are never answered."""

    def __init__(self, hangs: tuple[str, ...] = ()) -> None:
        self.hangs = set(hangs)
        self.queries: list[str] = []
        self.lines = 0
        """Lines of history that have arrived."""
        self.stored: list[str] = []
        """Paths of files that have arrived."""
        self.artifacts: list[str] = []
        """Names of artifacts: tables, charts, checkpoints."""
        self.left = threading.Event()
        """Set by GET /leave."""
        self.closing = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/leave":
                    fake.left.set()
                self._answer({})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if any(path in self.path for path in fake.hangs):
                    fake.closing.wait(HANGS_S)
                    return
                if "/store/" in self.path:
                    fake.stored.append(unquote(self.path))
                body = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
                known = "graphql" in self.path or "file_stream" in self.path  # the rest is W&B's own telemetry
                self._answer(fake.answer(self.path, json.loads(body)) if known else {})

            do_PUT = do_POST

            def _answer(self, content: dict[str, Any]) -> None:
                body = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if "graphql" not in path:
            self.lines += len(body.get("files", {}).get("wandb-history.jsonl", {}).get("content", []))
            return {"exitcode": None, "limits": {}}
        query = body.get("query", "")
        self.queries.append(query)
        if "upsertBucket" in query:
            entity = {"id": "e", "name": "me"}
            bucket = {
                "id": "b",
                "name": body["variables"].get("name"),
                "displayName": "run",
                "description": None,
                "config": "{}",
            }
            bucket |= {"sweepName": None, "historyLineCount": 0, "project": {"id": "p", "name": "mf", "entity": entity}}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/store/{name}"} for name in body["variables"]["files"]]
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        if "createArtifact(" in query:  # as if a server had its files already
            self.artifacts.append(body["variables"].get("input", body["variables"]).get("artifactCollectionName", ""))
            sequence = {"id": "s", "latestArtifact": None}
            return {"data": {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}}}}
        if "viewer" in query:
            return {"data": {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}}
        return {"data": {"model": None, "project": None, "serverInfo": {"features": []}}}

    def close(self) -> None:
        """Stop answering: connections are refused from now on."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        time.sleep(0.05)
