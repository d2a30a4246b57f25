"""Anthropic's messages as chat completions, and back."""

import json
import uuid
from typing import Any, Iterator, Optional

from .checks import Refused, brief_json

STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
SAME = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "stream",
    "sparsity",
    "cache_prompt",
    "keep",
)
ERRORS = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}
Event = tuple[str, dict[str, Any]]


def chat(body: dict[str, Any]) -> dict[str, Any]:
    """A messages request as a chat completion request; raises Refused."""
    out: dict[str, Any] = {k: body[k] for k in SAME if body.get(k) is not None}
    model = body.get("model", "default_model")
    # agents ask for models of these names whatever the base URL
    hosted = isinstance(model, str) and model.startswith("claude")
    out["model"] = "default_model" if hosted else model
    out["messages"] = [*_system(body.get("system")), *_messages(body.get("messages"))]
    if stop := body.get("stop_sequences"):
        out["stop"] = stop
    choice = body.get("tool_choice") or {}
    if (tools := body.get("tools")) and choice != {"type": "none"}:
        out["tools"] = [_tool(t) for t in _listed(tools, "tools")]
    thinking = body.get("thinking")
    if isinstance(thinking, dict):
        enabled = thinking.get("type") != "disabled"
        out["chat_template_kwargs"] = {"enable_thinking": enabled}
    if out.get("stream"):
        out["stream_options"] = {"include_usage": True}
    return out


def _system(system: Any) -> list[dict[str, Any]]:
    if not system:
        return []
    return [{"role": "system", "content": _text(system, "system")}]


def _messages(messages: Any) -> Iterator[dict[str, Any]]:
    for message in _listed(messages, "messages"):
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant"):
            raise Refused(
                400, f"a message's role must be user or assistant, got {role}."
            )
        blocks = (
            [{"type": "text", "text": content}]
            if isinstance(content, str)
            else _listed(content, "content")
        )
        results = [b for b in blocks if b.get("type") == "tool_result"]
        for result in results:
            yield {
                "role": "tool",
                "tool_call_id": result.get("tool_use_id"),
                "content": _text(result.get("content") or "", "tool_result"),
            }
        calls = [_call(b) for b in blocks if b.get("type") == "tool_use"]
        skipped = ("tool_result", "tool_use", "thinking", "redacted_thinking")
        said = [b for b in blocks if b.get("type") not in skipped]
        if said or not results:
            more = {"tool_calls": calls} if calls else {}
            yield {"role": role, "content": _text(said, "content"), **more}


def _listed(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise Refused(
            400, f"{name} must be a list of objects, got {brief_json(value)}."
        )
    return value


def _text(content: Any, name: str) -> str:
    """The text of a content; images and documents are refused."""
    if isinstance(content, str):
        return content
    texts = []
    for block in _listed(content, name):
        if block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise Refused(
                400,
                f"{name}: only text is supported, got a block of type {block.get('type')}.",
            )
        texts.append(block["text"])
    return "\n".join(texts)


def _call(block: dict[str, Any]) -> dict[str, Any]:
    function = {"name": block.get("name"), "arguments": block.get("input") or {}}
    return {"id": block.get("id"), "type": "function", "function": function}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    name, schema = tool.get("name"), tool.get("input_schema")
    if not isinstance(name, str) or not isinstance(schema, dict):
        raise Refused(
            400, f"a tool needs a name and an input_schema, got {brief_json(tool)}."
        )
    about = {"name": name, "description": tool.get("description") or ""}
    return {"type": "function", "function": {**about, "parameters": schema}}


def message(response: dict[str, Any]) -> dict[str, Any]:
    """A whole chat completion as a message."""
    (choice,) = response["choices"]
    said, content = choice["message"], []
    if said.get("reasoning"):
        content.append(
            {"type": "thinking", "thinking": said["reasoning"], "signature": ""}
        )
    if said.get("content"):
        content.append({"type": "text", "text": said["content"]})
    for call in said.get("tool_calls") or []:
        content.append(_tool_use(call, json.loads(call["function"]["arguments"])))
    return {
        **_empty(response["model"]),
        "content": content,
        "stop_reason": STOPS[choice["finish_reason"]],
        "usage": _usage(response["usage"]),
    }


def _empty(model: str) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 0, "output_tokens": 0},
    }


def _tool_use(call: dict[str, Any], input: Any) -> dict[str, Any]:
    name = call["function"]["name"]
    return {"type": "tool_use", "id": call["id"], "name": name, "input": input}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage["completion_tokens"],
        "ttft_s": usage["ttft_s"],
        "ffn_sparsity": usage["ffn_sparsity"],
        **{k: usage[k] for k in ("read_tokens", "note") if k in usage},
    }


def error(status: int, message: str) -> dict[str, Any]:
    kind = ERRORS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


class Events:
    """Takes what mlx-lm streams to a client and passes on Anthropic's events.

    Text, thinking and tool calls are blocks that follow each other.
    """

    def __init__(self, out: Any, model: str):
        self.out = out
        self.index, self.kind = -1, ""
        self.stop: Optional[str] = None
        self.send(("message_start", {"message": _empty(model)}))

    def __getattr__(self, name: str) -> Any:  # flush, close, closed
        return getattr(self.out, name)

    def write(self, data: bytes) -> int:
        if data.startswith(b"data: {"):
            for event in self.events(json.loads(data[6:])):
                self.send(event)
        elif data.startswith(b":"):
            self.send(("ping", {}))
        elif data.startswith(b"event: "):
            self.out.write(data)
        return len(data)

    def send(self, event: Event) -> None:
        name, fields = event
        line = json.dumps({"type": name, **fields})
        self.out.write(f"event: {name}\ndata: {line}\n\n".encode())
        self.out.flush()

    def events(self, chunk: dict[str, Any]) -> Iterator[Event]:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if text := delta.get("reasoning"):
                yield from self.say("thinking", text)
            if text := delta.get("content"):
                yield from self.say("text", text)
            for call in delta.get("tool_calls") or []:
                yield from self.open("tool_use", _tool_use(call, {}))
                arguments = call["function"]["arguments"]
                yield self.delta("input_json_delta", "partial_json", arguments)
            self.stop = choice["finish_reason"] or self.stop
        if usage := chunk.get("usage"):
            yield from self.close_block()
            reason = {"stop_reason": STOPS[self.stop or "stop"], "stop_sequence": None}
            yield "message_delta", {"delta": reason, "usage": _usage(usage)}
            yield "message_stop", {}

    def say(self, kind: str, text: str) -> Iterator[Event]:
        if self.kind != kind:
            more = {"signature": ""} if kind == "thinking" else {}
            yield from self.open(kind, {"type": kind, kind: "", **more})
        yield self.delta(f"{kind}_delta", kind, text)

    def open(self, kind: str, block: dict[str, Any]) -> Iterator[Event]:
        yield from self.close_block()
        self.index, self.kind = self.index + 1, kind
        yield "content_block_start", {"index": self.index, "content_block": block}

    def delta(self, kind: str, name: str, value: str) -> Event:
        delta = {"type": kind, name: value}
        return "content_block_delta", {"index": self.index, "delta": delta}

    def close_block(self) -> Iterator[Event]:
        if self.kind:
            self.kind = ""
            yield "content_block_stop", {"index": self.index}
