"""mlx-lm's request handler: more routes, our statistics, and every refusal one line of one form."""

import hmac
import io
import json
import logging
import select
import socket
import sys
from pathlib import Path
from typing import Any, Callable, Optional
from urllib.parse import urlsplit

from huggingface_hub.constants import HF_HUB_CACHE
from mlx_lm.server import APIHandler

from ..errors import LoadProblem, brief, printable
from . import anthropic
from .checks import Refused, check_body, parsed
from .generator import Generator, ThreadDied
from .requests import Asked, ClientGone

LARGEST = 64 << 20  # bytes of a body
PAGE = Path(__file__).parent / "page.html"
OPENAI = ("/v1/completions", "/v1/chat/completions", "/chat/completions")
ANTHROPIC = ("/v1/messages", "/v1/messages/count_tokens")
ROUTES = {"/", "/health", "/metrics", "/v1/models", *OPENAI, *ANTHROPIC}
OPEN = ("/", "/health")  # need no key


class Handler(APIHandler):
    """One request of one client."""

    timeout = 60  # seconds that a client may neither send nor read
    response_generator: Generator
    asked: Asked
    body: dict[str, Any]
    style = "openai"
    translate = False  # the stream that follows the headers
    headers_sent = False
    status = 0
    _headers_buffer: list[bytes]

    # Routes

    def do_GET(self) -> None:
        pages: dict[str, Callable[[], None]] = {
            "/": lambda: self.send("text/html; charset=utf-8", PAGE.read_bytes()),
            "/health": self.handle_health_check,
            "/metrics": lambda: self.send(
                "text/plain; version=0.0.4", self.response_generator.metrics.text()
            ),
        }
        self.answer(pages.get(self.route, super().do_GET))

    def do_POST(self) -> None:
        routes = {
            "/v1/messages": self.messages,
            "/v1/messages/count_tokens": self.count_tokens,
            **dict.fromkeys(OPENAI, self.completion),
        }
        if self.route.startswith("/v1/messages"):
            self.style = "anthropic"
        self.answer(routes.get(self.route, self.no_such_route))

    @property
    def route(self) -> str:
        return urlsplit(self.path).path

    def no_such_route(self) -> None:
        raise Refused(404, f"no such route: {self.route}")

    def answer(self, route: Callable[[], None]) -> None:
        """Run a route; whatever goes wrong is one line to the client, and one to the log."""
        asked_for = self.route
        try:
            self.check_key()
            route()
        except (ClientGone, ConnectionError, socket.timeout):
            self.status = 499  # as others log it
            logging.info("the client went away")
        except Refused as e:
            self.refuse(e.status, str(e))
        except ThreadDied as e:
            self.refuse(503, str(e))
        except Exception as e:
            logging.exception("a request failed")
            self.refuse(500, brief(e))
        known = asked_for in ROUTES and self.status not in (401, 404)
        counted = asked_for if known else "other"
        self.response_generator.metrics.requests.labels(counted, self.status).inc()

    def completion(self) -> None:
        """mlx-lm's own way, over a body that was checked."""
        self.body = parsed(self.read_body())
        self.path = self.route
        self.complete()

    def complete(self) -> None:
        body, generator = self.body, self.response_generator
        body.setdefault("model", "default_model")
        generator.drop_lines(body)
        check_body(
            body, self.vocabulary if body.keys() & {"logit_bias", "top_k"} else None
        )
        try:
            generator.model_provider.check(
                body["model"], body.get("adapters"), body.get("draft_model")
            )
        except LoadProblem as e:
            raise Refused(404, str(e)) from None
        raw = json.dumps(body).encode()
        if body.get("keep", 1) < 1 and generator.model_provider.reader is None:
            raise Refused(400, "keep needs a server that runs with --prefill-draft.")
        self.rfile = io.BytesIO(raw)
        self.headers.replace_header("Content-Length", str(len(raw)))
        super().do_POST()

    @property
    def vocabulary(self) -> Optional[int]:
        """Tokens of the loaded model."""
        tokenizer = self.response_generator.model_provider.tokenizer
        return None if tokenizer is None else max(tokenizer.get_vocab().values()) + 1

    def messages(self) -> None:
        """Anthropic's messages, as a chat completion and back."""
        asked = parsed(self.read_body())
        self.body = anthropic.chat(asked)
        self.path = "/v1/chat/completions"
        self.complete()

    def count_tokens(self) -> None:
        body = anthropic.chat({"max_tokens": 1, **parsed(self.read_body())})
        self.response_generator.drop_lines(body)
        check_body(body, None)
        try:
            tokens = self.response_generator.count(body)
        except Exception as e:  # templates raise whatever they like
            raise Refused(400, brief(e)) from None
        self.send("application/json", json.dumps({"input_tokens": tokens}).encode())

    def handle_models_request(self) -> None:
        Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # or it cannot be listed
        super().handle_models_request()

    def handle_health_check(self) -> None:
        generator = self.response_generator
        good = generator.is_healthy
        state = {
            "status": "ok" if good else "unavailable",
            "restarts": generator.deaths,
        }
        self.send("application/json", json.dumps(state).encode(), 200 if good else 503)

    # In

    def check_key(self) -> None:
        key = self.response_generator.cli_args.api_key
        if not key or self.route in OPEN:
            return
        given = self.headers.get("x-api-key") or ""
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        if scheme.lower() == "bearer":
            given = token.strip()
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise Refused(401, "wrong or missing API key.")

    def read_body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is None:
            raise Refused(411, "the request needs a Content-Length.")
        if not length.isdecimal():
            raise Refused(400, "Content-Length must be a number of bytes.")
        if int(length) > LARGEST:
            raise Refused(413, f"a body may have at most {LARGEST >> 20} MB.")
        raw = self.rfile.read(int(length))
        if len(raw) < int(length):
            raise ClientGone("the body ended early")
        return raw

    def handle_chat_completions(self) -> Asked:
        return self.ask(super().handle_chat_completions())

    def handle_text_completions(self) -> Asked:
        return self.ask(super().handle_text_completions())

    def ask(self, request: Any) -> Asked:
        self.asked = Asked(
            **vars(request),
            sparsity=self.body.get("sparsity"),
            fresh=not self.body.get("cache_prompt", True),
            keep=self.body.get("keep"),
            gone=self.client_gone,
        )
        return self.asked

    def client_gone(self) -> bool:
        """Whether the client closed its end, as far as anybody can know."""
        try:
            ready, _, _ = select.select([self.connection], [], [], 0)
            return bool(ready) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    # Out

    def generate_response(self, *args: Any, **kwargs: Any) -> dict:
        response = self.with_report(super().generate_response(*args, **kwargs))
        if self.style == "anthropic" and not self.stream:
            return anthropic.message(response)
        return response

    def completion_usage_response(self, *args: Any, **kwargs: Any) -> dict:
        return self.with_report(super().completion_usage_response(*args, **kwargs))

    def with_report(self, response: dict) -> dict:
        extra = self.asked.report.rounded()
        if usage := response.get("usage"):
            del extra["cached_tokens"]  # mlx-lm has it where OpenAI does
            usage.update(extra)
        elif response["choices"][0]["finish_reason"] is not None:
            response["fastforward"] = extra
        return response

    def send(self, kind: str, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self._set_cors_headers()
        self.end_headers()
        self.wfile.write(content)

    def send_response(self, code: int, message: Optional[str] = None) -> None:
        self.status = int(code)
        super().send_response(code, message)

    def end_headers(self) -> None:
        super().end_headers()
        self.headers_sent = True
        if self.translate:
            self.wfile = anthropic.Events(self.wfile, self.body["model"])  # type: ignore

    def _set_completion_headers(self, status_code: int = 200) -> None:
        """Where mlx-lm is about to refuse, refuse in our form."""
        if status_code >= 400:
            cause = sys.exc_info()[1]
            if isinstance(cause, (Refused, ClientGone, ThreadDied)):
                raise cause
            if status_code == 404 and cause is not None:
                status_code = 404 if isinstance(cause, LoadProblem) else 400
            reason = brief(cause) if cause else f"no such route: {self.route}"
            raise Refused(status_code, reason)
        super()._set_completion_headers(status_code)

    def _set_stream_headers(self, status_code: int = 200) -> None:
        super()._set_stream_headers(status_code)
        self.translate = self.style == "anthropic"

    def refuse(self, status: int, message: str) -> None:
        """Say no; where an answer has begun, at the end of its stream."""
        error = anthropic.error if self.style == "anthropic" else _error
        line = json.dumps(error(status, printable(message)))
        try:
            if self.headers_sent:
                self.wfile.write(f"event: error\ndata: {line}\n\n".encode())
                return
            self._headers_buffer = []  # of an answer that does not come
            self.send("application/json", line.encode(), status)
        except OSError:
            pass


def _error(status: int, message: str) -> dict[str, Any]:
    """As OpenAI's clients expect it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status}}
