"""What a request may hold, checked before it waits in line: each mistake is one line and a 400."""

import json
from typing import Any, NoReturn, Optional

from ..errors import brief


class Refused(Exception):
    """A request that gets an HTTP status and one line instead of an answer."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def parsed(raw: bytes) -> dict[str, Any]:
    """A body as JSON, without what is null: clients mean the default; raises Refused."""

    def no_number(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON number")

    try:
        body = json.loads(raw.decode(), parse_constant=no_number)
    except (ValueError, RecursionError) as e:
        raise Refused(400, f"the body is not valid JSON: {brief(e)}") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object.")
    return {k: v for k, v in body.items() if v is not None}


def check_body(body: dict[str, Any], vocabulary: Optional[int]) -> None:
    """What mlx-lm takes on trust; raises Refused.

    Args:
        vocabulary: Tokens of the loaded model.
    """
    _expect(body, "sparsity", (int, float), "a number from 0 to below 1")
    sparsity = body.get("sparsity")
    if sparsity is not None:
        if not 0 <= sparsity < 1:
            raise Refused(
                400, f"sparsity must be at least 0 and below 1, got {sparsity}."
            )
        body["sparsity"] = min(round(float(sparsity), 2), 0.99)
    _expect(body, "keep", (int, float), "a number above 0, at most 1")
    if not 0 < body.get("keep", 1) <= 1:
        raise Refused(400, f"keep must be above 0 and at most 1, got {body['keep']}.")
    if not isinstance(body.get("cache_prompt", True), bool):
        raise Refused(400, "cache_prompt must be true or false.")
    for name in ("prompt", "model", "adapters", "draft_model"):
        _expect(body, name, str, "a text")
    for name in ("chat_template_kwargs", "role_mapping", "stream_options"):
        _expect(body, name, dict, "an object")
    if body.get("stream_options") is not None:
        wanted = bool(body["stream_options"].get("include_usage"))
        body["stream_options"] = {"include_usage": wanted}
    _strings(body)
    _objects(body, "tools")
    _objects(body, "messages")
    if "messages" in body:
        if not body["messages"]:
            raise Refused(400, "messages must not be empty.")
        for message in body["messages"]:
            _check_message(message)
    _check_sampling(body, vocabulary)


def _check_sampling(body: dict[str, Any], vocabulary: Optional[int]) -> None:
    """What mlx-lm's samplers would raise on in the midst of others' answers."""
    _expect(body, "xtc_threshold", (int, float), "a number from 0 to 0.5")
    if not 0 <= body.get("xtc_threshold", 0) <= 0.5:
        raise Refused(400, "xtc_threshold must be from 0 to 0.5.")
    _expect(body, "top_k", int, "a whole number")
    if vocabulary and body.get("top_k", 0) >= vocabulary:
        del body["top_k"]  # all of them
    bias = body.get("logit_bias")
    if isinstance(bias, dict) and vocabulary:
        for token, value in bias.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise Refused(400, f"logit_bias: {brief_json(value)} is no number.")
            if not str(token).isdecimal() or int(token) >= vocabulary:
                raise Refused(
                    400, f"logit_bias: {token!r} is no token below {vocabulary}."
                )


def _expect(body: dict[str, Any], name: str, kind: Any, noun: str) -> None:
    value = body.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
        raise Refused(400, f"{name} must be {noun}, got {brief_json(value)}.")


def _strings(body: dict[str, Any]) -> None:
    stop = body.get("stop")
    words = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(words, list) or not all(w and isinstance(w, str) for w in words):
        raise Refused(
            400, f"stop must be a text or a list of texts, got {brief_json(stop)}."
        )
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise Refused(400, "stop holds half of a character.") from None


def _objects(body: dict[str, Any], name: str) -> None:
    found = body.get(name) or []
    if not isinstance(found, list) or not all(isinstance(m, dict) for m in found):
        raise Refused(
            400, f"{name} must be a list of objects, got {brief_json(body[name])}."
        )


def _check_message(message: dict[str, Any]) -> None:
    if not isinstance(message.get("role"), str):
        raise Refused(400, "every message needs a role: system, user, assistant, tool.")
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    good = content is None or isinstance(content, (str, list))
    if not good or not all(isinstance(p, dict) for p in parts):
        raise Refused(
            400,
            f"a message's content must be a text or a list of parts, got {brief_json(content)}.",
        )
    for part in parts:
        if part.get("type") == "text" and not isinstance(part.get("text"), str):
            raise Refused(400, "a text part needs a text.")
        if part.get("type") == "image_url":
            _check_image(part["image_url"] if "image_url" in part else None)
    _objects(message, "tool_calls")


def _check_image(image: Any) -> None:
    """The server fetches nothing for anybody."""
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str) or not url.startswith("data:"):
        raise Refused(400, "an image must be a data: URL.")


def brief_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
