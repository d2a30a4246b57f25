"""The server in a process of its own, asked by real clients."""

import io
import json
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from commands import bad, run
from serving import KEY, PATIENCE, Server, metric, until

from mlx_fastforward.demo import MODEL as DEMO
from mlx_fastforward.server.anthropic import Events, message

STORY = "Keawe was poor, brave, and active; he could read and write. "
FACTS = "The secret code of Felix is 4821. The secret code of Mabel is 7306. "
MABEL = FACTS + STORY * 4 + "\n\nWhat is the secret code of Mabel?"
LONG = STORY * 50  # some 750 tokens: long enough to be sparse


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


# Settings


def test_what_is_said_at_the_start(server: Server) -> None:
    assert f"model     {server.model}\n" in server.banner
    assert "50% of FFN neurons dropped per 128 tokens, selector probe" in server.banner
    out = run("serve", "--help").output
    for flag in ("--prompt-cache-bytes", "--draft-model", "--sparsity", "--api-key"):
        assert flag in out  # mlx-lm's, and ours


def test_wrong_flags(server: Server, tmp_path: Path) -> None:
    assert "--sparsity must be a number" in bad(2, "serve", "--sparsity", "much")
    assert "sparsity must be at least 0" in bad(2, "serve", "--sparsity", "1")
    assert "unrecognized arguments: --spam" in bad(2, "serve", "--spam")
    assert "is no pattern" in bad(2, "serve", "--drop-line", "(")
    assert "keep must be above 0" in bad(2, "serve", "--keep", "2")
    assert "prune_tokens" in bad(2, "serve", "--prune-tokens", "1")
    draft = ("--prefill-draft", "self", "--draft-model", "x")
    assert "--draft-model does not go with" in bad(2, "serve", *draft)
    assert "try another --port" in bad(1, "serve", "--port", server.port)
    assert "holds no config.json" in bad(1, "serve", "--port", 0, "--model", tmp_path)


# OpenAI's clients


def test_openai_client(server: Server) -> None:
    """The demo model finds the fact, and says what became of the prompt; again, from the cache."""
    asked: dict[str, Any] = dict(model=str(DEMO), messages=user(MABEL), max_tokens=8)
    chat = server.openai.chat.completions
    answer = chat.create(**asked)
    text, usage = answer.choices[0].message.content, answer.usage
    assert text.strip() == "7306"
    assert usage.ttft_s > 0 and usage.ffn_sparsity == 0  # a short one
    assert usage.prompt_tokens_details.cached_tokens == 0
    more = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(chat.create(**asked, **more))
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    usage, last = chunks[-1].usage, chunks[-2]
    assert streamed == text and last.choices[0].finish_reason == "stop"
    report = last.model_extra["fastforward"]
    assert report["ttft_s"] == usage.ttft_s > 0
    cached = usage.prompt_tokens_details.cached_tokens
    assert report["cached_tokens"] == cached == usage.prompt_tokens - 2


def test_sparsity_of_a_request(server: Server) -> None:
    shares = [
        server.chat(f"{i} " + LONG, **more)["usage"]["ffn_sparsity"]
        for i, more in enumerate([{"sparsity": 0.7}, {}, {"sparsity": 0}])
    ]
    assert 0.01 < shares[1] < shares[0] and shares[2] == 0
    again = server.chat("1 " + LONG, cache_prompt=False)["usage"]
    assert again["ffn_sparsity"] == shares[1]
    assert again["prompt_tokens_details"]["cached_tokens"] == 0


def test_text_completions_logprobs_and_a_seed(server: Server) -> None:
    done = server.openai.completions.create(
        model="default_model", prompt=STORY, max_tokens=4, seed=1
    )
    assert done.usage and done.usage.completion_tokens == 4
    got = server.chat(logprobs=True, top_logprobs=2, temperature=None, stop=None)
    assert len(got["choices"][0]["logprobs"]["content"]) == 3


# Anthropic's clients


def test_anthropic_client(server: Server) -> None:
    """The same answer as over OpenAI's route, whole and streamed, whatever the model's name."""
    system = "x-anthropic-billing-header: cch={};\nBe brief. " + STORY * 4
    asked: dict[str, Any] = dict(model="claude-x", messages=user("Who?"), max_tokens=5)
    whole = server.anthropic.messages.create(**asked, system=system.format(1))
    with server.anthropic.messages.stream(**asked, system=system.format(22)) as stream:
        pieces = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    wanted = server.chat(
        max_tokens=5,
        messages=[
            {"role": "system", "content": system.partition("\n")[2]},
            *user("Who?"),
        ],
    )
    said = wanted["choices"][0]["message"]["content"]
    assert whole.content[0].text == streamed.content[0].text == pieces == said
    assert whole.stop_reason == streamed.stop_reason == "max_tokens"
    tokens = wanted["usage"]["prompt_tokens"]
    cached = whole.usage.cache_read_input_tokens  # by an earlier prompt's first tokens
    assert whole.usage.input_tokens + (cached or 0) == tokens
    assert whole.usage.output_tokens == 5
    # the line that changed spoiled nothing
    assert streamed.usage.cache_read_input_tokens == tokens - 2
    assert streamed.usage.input_tokens == 2 and whole.usage.ttft_s > 0  # type: ignore[attr-defined]
    counted = server.anthropic.messages.count_tokens(
        model="x", messages=user("Who?"), system=system.format(3)
    )
    assert counted.input_tokens == tokens


def test_anthropic_tools_and_refusals(server: Server) -> None:
    import anthropic

    call = {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": "it"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "Found."}
    tool: Any = {"name": "look", "input_schema": {"type": "object"}}
    messages: Any = [
        *user("Look."),
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}, call]},
        {"role": "user", "content": [result]},
    ]
    asked: dict[str, Any] = dict(model="claude-x", max_tokens=3)
    done = server.anthropic.messages.create(**asked, messages=messages, tools=[tool])
    assert done.usage.output_tokens == 3
    image: Any = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}
    with pytest.raises(anthropic.BadRequestError, match="only text is supported, got"):
        server.anthropic.messages.create(
            **asked, messages=[{"role": "user", "content": [image]}]
        )
    with pytest.raises(anthropic.BadRequestError, match="at least 1"):
        server.anthropic.messages.create(
            model="claude-x", messages=user("Who?"), max_tokens=0
        )
    with pytest.raises(anthropic.NotFoundError, match="neither a local folder nor"):
        server.anthropic.messages.create(model="a b", messages=user("?"), max_tokens=1)


def test_tool_calls_become_blocks() -> None:
    """The demo model calls no tools: from what mlx-lm says of one that does."""
    function = {"name": "look", "arguments": '{"at": "it"}'}
    call = {"id": "t1", "type": "function", "function": function}
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "ttft_s": 1, "ffn_sparsity": 0}
    usage["prompt_tokens_details"] = {"cached_tokens": 3}
    deltas: list[dict[str, Any]] = [
        {"reasoning": "So"},
        {"reasoning": " what"},
        {"content": "Look"},
        {"content": "ing."},
        {"tool_calls": [call, {**call, "id": "t2"}]},
    ]
    chunks = [{"choices": [{"delta": d, "finish_reason": None}]} for d in deltas]
    chunks += [{"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}]
    chunks += [{"choices": [], "usage": usage}]
    out = io.BytesIO()
    events = Events(out, "x")
    for chunk in chunks:
        events.write(f"data: {json.dumps(chunk)}\n\n".encode())
    events.write(b": keepalive 1/2\n\n")
    events.write(b"data: [DONE]\n\n")
    parts = out.getvalue().decode().strip().split("\n\n")
    named = [(p.split("\n")[0][7:], json.loads(p.split("\n")[1][6:])) for p in parts]
    assert all(name == data["type"] for name, data in named)
    assert [n for n, _ in named][-3:] == ["message_delta", "message_stop", "ping"]
    blocks: list[Any] = []
    for name, data in named:
        if name == "content_block_start":
            blocks.append([data["content_block"]["type"], ""])
            assert data["index"] == len(blocks) - 1
        elif name == "content_block_delta":
            (value,) = [v for k, v in data["delta"].items() if k != "type"]
            blocks[data["index"]][1] += value
    assert [n for n, _ in named].count("content_block_stop") == 4
    arguments = function["arguments"]
    assert blocks == [
        ["thinking", "So what"],
        ["text", "Looking."],
        ["tool_use", arguments],
        ["tool_use", arguments],
    ]
    said = {"content": "Looking.", "reasoning": "So what", "tool_calls": [call]}
    whole = message(
        {
            "model": "x",
            "choices": [{"message": said, "finish_reason": "tool_calls"}],
            "usage": usage,
        }
    )
    assert [b["type"] for b in whole["content"]] == ["thinking", "text", "tool_use"]
    assert whole["content"][2]["input"] == {"at": "it"}
    assert whole["stop_reason"] == named[-3][1]["delta"]["stop_reason"] == "tool_use"
    tokens = {"input_tokens": 6, "cache_read_input_tokens": 3, "output_tokens": 4}
    assert whole["usage"].items() >= tokens.items()
    assert named[-3][1]["usage"] == whole["usage"]


# Health, limits and mistakes


def test_curl(server: Server) -> None:
    """Open routes need no key, all others do."""

    def curl(path: str, *more: str) -> tuple[str, str]:
        command = ["curl", "-s", "-w", "\n%{http_code}", f"{server.url}{path}", *more]
        out = subprocess.run(command, capture_output=True, text=True).stdout
        body, _, status = out.rpartition("\n")
        return status, body

    assert curl("/health") == ("200", '{"status": "ok", "restarts": 0}')
    status, page = curl("/")
    assert status == "200" and "/v1/chat/completions" in page
    assert not re.findall(r"(?:src|href)\s*=", page)  # nothing from outside
    listed = server.openai.models.list().data
    assert server.model in [m.id for m in listed]
    status, body = curl("/v1/models")
    assert (status, json.loads(body)["error"]["code"]) == ("401", 401)
    assert curl("/metrics", "-H", "x-api-key: open sesam")[0] == "401"
    status, text = curl("/metrics", "-H", f"x-api-key: {KEY}")
    assert status == "200" and "fastforward_queue 0.0" in text
    body = json.dumps({"prompt": STORY, "max_tokens": 2})
    more = ("-d", body, "-H", f"Authorization: Bearer {KEY}")
    assert json.loads(curl("/v1/completions", *more)[1])["usage"]["total_tokens"] > 2
    assert curl("/nowhere", *more)[0] == "404"


@pytest.mark.parametrize(
    "body, wanted",
    [
        (b"{", "400 the body is not valid JSON"),
        (b"\xff", "400 the body is not valid JSON"),
        (b"[" * 100_000, "400 the body is not valid JSON"),
        (b'{"temperature": NaN}', "400 the body is not valid JSON: NaN"),
        ([1], "400 the body must be a JSON object"),
        ({}, "400 .*messages"),
        ({"messages": []}, "400 messages must not be empty"),
        ({"messages": "Who?"}, '400 messages must be a list of objects, got "Who'),
        ({"messages": [{"content": "Who?"}]}, "400 every message needs a role"),
        ({"messages": [{"role": "user", "content": 3}]}, "400 .* got 3"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "400 .*list of parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "400 .*'text'",
        ),
        ({"sparsity": 1}, "400 sparsity must be at least 0 and below 1, got 1"),
        ({"sparsity": True}, "400 sparsity must be a number .* got true"),
        ({"sparsity": "0.5"}, "400 sparsity must be a number"),
        ({"stop": [3]}, "400 stop must be"),
        ({"cache_prompt": 1}, "400 cache_prompt must be"),
        ({"keep": 0}, "400 keep must be above 0"),
        ({"keep": 0.5}, "400 keep needs a server that runs with --prefill-draft"),
        ({"max_tokens": 0}, "400 max_tokens must be at least 1"),
        ({"max_tokens": "5"}, "400 max_tokens must be of type int"),
        ({"temperature": -1}, "400 temperature"),
        ({"model": 3}, "400 model must be a text, got 3"),
        ({"draft_model": []}, "400 draft_model must be a text"),
        ({"draft_model": "/nowhere"}, "404 /nowhere"),
        ({"model": "no model"}, "404 no model is neither a local folder nor"),
        ({"adapters": "/nowhere"}, "404 /nowhere holds no adapters"),
        ({"logit_bias": {"99999": 1}}, "400 logit_bias: '99999' is no token"),
        ({"logit_bias": {"a": 1}}, "400 logit_bias"),
        ({"logit_bias": {"5": None}}, "400 logit_bias: null is no number"),
        ({"xtc_threshold": 0.9, "xtc_probability": 1}, "400 xtc_threshold must be"),
        ({"stop": ["\ud83d"]}, "400 stop holds half of a character"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "http://a/b"}}
                        ],
                    }
                ]
            },
            "400 an image must be a data: URL",
        ),
        ({"stream_options": 1}, "400 stream_options must be an object"),
        ({"tools": ["look"]}, "400 tools must be a list of objects"),
        ({"chat_template_kwargs": []}, "400 chat_template_kwargs must be an object"),
    ],
)
def test_mistakes(server: Server, body: Any, wanted: str) -> None:
    if isinstance(body, dict) and body and "messages" not in body:
        body = {"messages": user("Who?"), **body}
    assert re.match(wanted, server.refusal(body))


def test_mistakes_below_the_body(server: Server) -> None:
    assert "404 no such route: /v1/chat" in server.refusal({}, "/v1/chat")
    assert re.match("400 .*prompt", server.refusal({}, "/v1/completions"))
    assert "the prompt is empty" in server.refusal({"prompt": ""}, "/v1/completions")
    for head, status in (
        ("Content-Length: 99999999999", 413),
        ("Content-Length: -1", 400),
        ("X: y", 411),
    ):
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            key = f"x-api-key: {KEY}"
            s.sendall(
                f"POST /v1/completions HTTP/1.1\r\n{key}\r\n{head}\r\n\r\n".encode()
            )
            assert f" {status} ".encode() in s.recv(100)
    assert server.chat()["usage"]["completion_tokens"] == 3


def test_clients_that_go_away(server: Server) -> None:
    """While a prompt is read: nobody goes on with it."""
    gone = 'fastforward_requests_total{path="/v1/chat/completions",status="499"}'
    answered = "fastforward_prompt_tokens_count"
    before = server.http.get("/metrics").text
    body = json.dumps({"messages": user(STORY * 1500), "max_tokens": 5})
    for stream in (False, True):
        raw = body.replace("{", f'{{"stream": {json.dumps(stream)}, ', 1).encode()
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as s:
            head = f"x-api-key: {KEY}\r\nContent-Length: {len(raw)}"
            s.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n".encode())
            s.sendall(raw)
            while stream and b"keepalive" not in s.recv(4096):
                pass  # what is streamed is in hand then, the other may be in line
    assert server.chat()["usage"]["completion_tokens"] == 3
    until(lambda: server.metric(gone) == metric(before, gone) + 2)
    assert server.metric(answered) == metric(before, answered) + 1
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(f"POST /v1/completions HTTP/1.1\r\nx-api-key: {KEY}\r\n".encode())
        s.sendall(b"Content-Length: 50\r\n\r\n{")  # and no more
    assert server.http.get("/health").status_code == 200


def test_metrics(server: Server) -> None:
    before = server.http.get("/metrics").text
    server.chat("metrics " + LONG)
    requests = 'fastforward_requests_total{path="/v1/chat/completions",status="200"}'
    until(
        lambda: server.metric(requests) > metric(before, requests)
    )  # after it is sent
    for name, least in (
        ('fastforward_ttft_seconds_count{prefill="sparse"}', 1),
        ("fastforward_prompt_tokens_sum", 512),
        ("fastforward_ffn_sparsity_sum", 0.01),
    ):
        assert server.metric(name) >= metric(before, name) + least, name
