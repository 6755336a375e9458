"""The Batch API of the tests' teacher server: /files, /batches and the files of results, as OpenAI documents them."""

from __future__ import annotations

import email
import hashlib
import json
import threading
import time
from typing import Any

# Of a request in a batch: not executed in time, an error of the server, a refusal, no line at all.
BATCH_FAULTS = ("expired", "500", "filter", "missing")


class Batches:
    """Uploaded files and batches, in memory; the server's options say how they fail."""

    def __init__(self, server: Any):
        self.server = server
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self._polls: dict[str, int] = {}
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def post(self, handler: Any, raw: bytes) -> None:
        """Take a file, or create a batch."""
        if handler.path == "/v1/files":
            kind = handler.headers["Content-Type"].encode()
            parts = email.message_from_bytes(b"Content-Type: " + kind + b"\r\n\r\n" + raw).get_payload()
            fields = {part.get_param("name", header="content-disposition"): part for part in parts}
            assert fields["purpose"].get_payload().strip() == "batch"
            with self._lock:
                file_id = self._store(fields["file"].get_payload(decode=True))
            self.server.log({"event": "file", "id": file_id})
            handler._send(200, self._file(file_id))
            return
        body = json.loads(raw)
        options = self.server.options
        with self._lock:
            batch = self._created(body)
            is_first = len(self.batches) == 1
        self.server.log({"event": "batch", "id": batch["id"], "requests": len(self._lines(batch))})
        time.sleep(options.batch_hold)
        if options.batch_silent and is_first:
            handler.close_connection = True
            return
        handler._send(200, batch)

    def get(self, handler: Any) -> None:
        """Send a batch, the list of all, or a file."""
        path = handler.path.partition("?")[0].removeprefix("/v1/")
        with self._lock:
            if path == "batches":
                found = list(reversed(self.batches.values()))
                return handler._send(200, {"object": "list", "data": found, "has_more": False})
            kind, _, name = path.partition("/")
            if kind == "batches" and name in self.batches:
                self._polls[name] = self._polls.get(name, 0) + 1
                batch = self.batches[name]
                if batch["status"] == "in_progress" and self._polls[name] > self.server.options.batch_polls:
                    self._finish(batch)
                return handler._send(200, batch)
            file_id = name.removesuffix("/content")
            if kind == "files" and file_id in self.files:
                return handler._send_raw(200, self.files[file_id], "application/octet-stream")
        return handler._send(404, {"error": {"message": f"no such path: {handler.path}"}})

    def _store(self, content: bytes) -> str:
        file_id = f"file-{len(self.files)}"
        self.files[file_id] = content
        return file_id

    def _file(self, file_id: str) -> dict[str, Any]:
        size = len(self.files[file_id])
        more = {"created_at": 1_800_000_000, "filename": "x.jsonl", "purpose": "batch", "status": "processed"}
        return {"id": file_id, "object": "file", "bytes": size, **more}

    def _created(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["endpoint"] == "/v1/chat/completions" and body["completion_window"] == "24h"
        assert body["input_file_id"] in self.files
        batch = {
            "id": f"batch_{len(self.batches)}",
            "object": "batch",
            "endpoint": body["endpoint"],
            "errors": None,
            "input_file_id": body["input_file_id"],
            "completion_window": "24h",
            "status": "in_progress",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": 1_800_000_000,
            "metadata": body.get("metadata"),
        }
        self.batches[batch["id"]] = batch
        return batch

    def _lines(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]

    def _finish(self, batch: dict[str, Any]) -> None:
        options = self.server.options
        if options.batch_fail:
            errors = {"object": "list", "data": [{"code": "invalid", "message": options.batch_fail}]}
            batch.update(status="failed", errors=errors)
            return
        outputs, errors, status = [], [], "completed"
        for line in self._lines(batch):
            assert line["method"] == "POST" and line["url"] == batch["endpoint"]
            result, fault = self._result(line["body"])
            status = "expired" if fault == "expired" else status
            if result is not None:
                chosen = outputs if fault == "" else errors
                chosen.append({"id": "x", "custom_id": line["custom_id"], **result})
        outputs.reverse()  # in any order, as documented
        for name, lines in (("output_file_id", outputs), ("error_file_id", errors)):
            if lines:
                batch[name] = self._store("".join(json.dumps(line) + "\n" for line in lines).encode())
        batch["status"] = status

    def _result(self, body: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
        completion, read_request = self.server.tools

        if refused := next((name for name in self.server.options.refuses if name in body), None):
            message = f"Unsupported parameter: '{refused}' is not supported with this model."
            message += " Use 'max_completion_tokens' instead." * (refused == "max_tokens")
            error = {"message": message, "param": refused, "code": "unsupported_parameter"}
            return {"response": {"status_code": 400, "body": {"error": error}}, "error": None}, "refused"
        question, image, key = read_request(body)
        fault = self._fault(key)
        if fault == "missing":
            return None, fault
        if fault == "expired":
            message = "This request could not be executed before the completion window expired."
            return {"response": None, "error": {"code": "batch_expired", "message": message}}, fault
        if fault in ("500", "filter"):
            error = {"message": "trouble"} if fault == "500" else {"message": "flagged", "code": "content_filter"}
            status = 500 if fault == "500" else 400
            return {"response": {"status_code": status, "body": {"error": error}}, "error": None}, fault
        text, tokens = self.server.answer(body, question, image)
        self.server.log({"event": "billed", "key": key})
        answer = completion(body, text, len(question) // 4 + 64, tokens)
        return {"response": {"status_code": 200, "request_id": "r", "body": answer}, "error": None}, ""

    def _fault(self, key: str) -> str:
        """Return the fault of a request, which comes at its first arrival; empty for none."""
        options = self.server.options
        is_new = key not in self._seen
        self._seen.add(key)
        digest = hashlib.sha256(key.encode()).digest()
        if not is_new or digest[0] >= 256 * options.batch_faults:
            return ""
        return str(options.batch_kinds[digest[1] % len(options.batch_kinds)])
