"""/v1/files and /v1/batches over HTTP, mostly through the openai client, over a scripted engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response

from server.api.app import create_app
from server.api.dialects.dialect import dialect_of
from server.api.inprocess import InProcess
from server.api.tenancy import Tenants
from server.batches.vault import Vault
from server.errors import Overloaded
from server.tenants import add_key, read_tenants
from server.types import FinishReason
from tests.unit.api_fake import FakeEngine, client, make_app, make_service
from tests.unit.batch_fake import becomes, open_vault, running, until
from tests.unit.tool_fake import HERMES_NOW, NOW, World

ENDED = ("completed", "failed", "expired", "cancelled")
CHAT = "/v1/chat/completions"
RESPONSES, EMBEDDINGS = "/v1/responses", "/v1/embeddings"


@dataclass
class Site:
    """One application with a vault, and what is around it."""

    engine: FakeEngine
    vault: Vault
    app: Any

    def sdk(self, key: str = "none") -> openai.AsyncOpenAI:
        http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://terrace/v1")
        return openai.AsyncOpenAI(base_url="http://terrace/v1", api_key=key, http_client=http, max_retries=0)


@asynccontextmanager
async def site(
    path: Path,
    *,
    keys: tuple[str, ...] = (),
    tenants: Tenants | None = None,
    work: bool = True,
    world: World | None = None,
    **limits: Any,
) -> AsyncIterator[Site]:
    """`work`: a runner is at work. `world`: a model that calls tools, instead of one that says the prompt backwards."""
    engine = world.engine if world else FakeEngine()
    vault = open_vault(path, **limits)
    model: dict[str, Any] = {"tokenizer": world.tokenizer, "dialect": dialect_of(world.tokenizer)} if world else {}
    service = make_service(engine, keys=keys, tenants=tenants, vault=vault, **model)
    try:
        if work:
            async with running(vault, InProcess(service)):
                yield Site(engine, vault, create_app(service))
        else:
            yield Site(engine, vault, create_app(service))
    finally:
        await vault.aclose()


def request(number: int, url: str = CHAT, **body: Any) -> dict[str, Any]:
    if not body:
        body = {"messages": [{"role": "user", "content": f"hi {number}"}], "max_tokens": 4}
    return {"custom_id": f"r{number}", "method": "POST", "url": url, "body": body}


def jsonl(*requests: dict[str, Any]) -> bytes:
    return "\n".join(json.dumps(one) for one in requests).encode()


async def run(sdk: openai.AsyncOpenAI, content: bytes, endpoint: Any = CHAT, **more: Any) -> Any:
    """A batch over `content`, at its end."""
    file = await sdk.files.create(file=("in.jsonl", content), purpose="batch")
    batch = await sdk.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)
    assert batch.status == "validating"
    while batch.status not in ENDED:
        batch = await sdk.batches.retrieve(batch.id)
    return batch


async def read(sdk: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(line) for line in (await sdk.files.content(file_id)).text.splitlines()]


async def test_a_batch_through_the_openai_client(tmp_path: Path) -> None:
    """Upload, create, wait, read: each answer is what the route itself gives, in the background service class."""
    async with site(tmp_path) as here:
        sdk = here.sdk()
        content = jsonl(*(request(number) for number in range(5)))
        batch = await run(sdk, content, metadata={"night": "1"})
        assert (batch.status, batch.object, batch.metadata, batch.model) == (
            "completed",
            "batch",
            {"night": "1"},
            "fake",
        )
        assert batch.request_counts.model_dump() == {"total": 5, "completed": 5, "failed": 0}
        assert batch.error_file_id is None
        assert batch.expires_at - batch.created_at == 86_400
        output = await read(sdk, batch.output_file_id)
        assert [line["custom_id"] for line in output] == [f"r{number}" for number in range(5)]
        async with client(here.app) as http:
            direct = (await http.post(CHAT, json=request(3)["body"])).json()
        body = output[3]["response"]["body"]
        same = ("object", "created", "model", "choices", "usage")
        assert {key: body[key] for key in same} == {key: direct[key] for key in same}
        assert body["id"].startswith("chatcmpl-")
        usages = [line["response"]["body"]["usage"] for line in output]
        assert batch.usage.output_tokens == sum(usage["completion_tokens"] for usage in usages) == 20
        assert batch.usage.input_tokens == sum(usage["prompt_tokens"] for usage in usages)
        assert batch.usage.total_tokens == batch.usage.input_tokens + 20
        *lines, online = here.engine.submitted
        assert all(spec.service.background for spec in lines)
        assert not online.service.background
        assert here.engine.open == {}


async def test_completions_and_their_errors(tmp_path: Path) -> None:
    """The other route; what only running can tell is an error of the line, with its HTTP status."""
    async with site(tmp_path) as here:
        sdk = here.sdk()
        content = jsonl(
            request(1, "/v1/completions", prompt="abc", max_tokens=3),
            request(2, "/v1/completions", prompt="x" * 600),
            request(3, "/v1/completions", prompt=["a", "b"], max_tokens=2, n=2, ttft_target_ms=1, service_tier="auto"),
        )
        batch = await run(sdk, content, "/v1/completions")
        assert batch.request_counts.model_dump() == {"total": 3, "completed": 2, "failed": 1}
        first, third = await read(sdk, batch.output_file_id)
        assert first["response"]["body"]["choices"][0]["text"] == "cba"
        assert len(third["response"]["body"]["choices"]) == 4
        assert all(spec.service.background and spec.service.targets.ttft_s > 1e9 for spec in here.engine.submitted)
        (second,) = await read(sdk, batch.error_file_id)
        assert second["custom_id"] == "r2"
        assert second["response"]["status_code"] == 400
        error = second["response"]["body"]["error"]
        assert error["code"] == "context_length_exceeded"
        assert set(error) == {"message", "type", "param", "code"}


async def test_responses_with_tools_and_their_errors(tmp_path: Path) -> None:
    """Items as the route itself gives them, calls among them, in the background whatever the line says."""
    ask = {"input": "hi", "tools": [{"type": "function", **NOW["function"]}]}
    content = jsonl(
        request(1, RESPONSES, **ask),
        request(2, RESPONSES, **ask, service_tier="default", ttft_target_ms=1),
        request(3, RESPONSES, input="x" * 9000),
        request(4, RESPONSES, input="hi", tools=ask["tools"], tool_choice={"type": "function", "name": "other"}),
    )
    world = World("hermes", f"<think>hm</think>So.\n{HERMES_NOW}")
    async with site(tmp_path, world=world) as here, client(here.app) as http:
        batch = await run(here.sdk(), content, RESPONSES)
        assert batch.request_counts.model_dump() == {"total": 4, "completed": 2, "failed": 2}
        lines = here.engine.submitted[:]
        assert all(spec.service.background and spec.service.targets.ttft_s > 1e9 for spec in lines)
        output = [line["response"]["body"] for line in await read(here.sdk(), batch.output_file_id)]
        direct = (await http.post(RESPONSES, json=ask | {"service_tier": "flex"})).json()
        for body in output:
            Response.model_validate(body)
            assert [item["type"] for item in body["output"]] == ["reasoning", "message", "function_call"]
            same = body.keys() - {"id", "output"}
            assert {key: body[key] for key in same} == {key: direct[key] for key in same}
        assert batch.usage.output_tokens == sum(body["usage"]["output_tokens"] for body in output)
        errors = [line["response"] for line in await read(here.sdk(), batch.error_file_id)]
        assert [error["status_code"] for error in errors] == [400, 400]
        assert [error["body"]["error"]["param"] for error in errors] == ["input", "tool_choice.name"]


async def test_embeddings_and_their_errors(tmp_path: Path) -> None:
    """Vectors as the route itself gives them, in the background; usage counts prompts and nothing generated."""
    content = jsonl(
        request(1, EMBEDDINGS, input=["ab", "c"], encoding_format="base64", dimensions=2),
        request(2, EMBEDDINGS, input="ab", service_tier="default"),
        request(3, EMBEDDINGS, input="x" * 600),
    )
    async with site(tmp_path) as here, client(here.app) as http:
        batch = await run(here.sdk(), content, EMBEDDINGS)
        assert batch.request_counts.model_dump() == {"total": 3, "completed": 2, "failed": 1}
        assert all(spec.service.background for spec in here.engine.submitted)
        first, second = [line["response"]["body"] for line in await read(here.sdk(), batch.output_file_id)]
        for body, line in ((first, 0), (second, 1)):
            sent = json.loads(content.splitlines()[line])["body"]
            assert body == (await http.post(EMBEDDINGS, json=sent)).json()
        assert (batch.usage.input_tokens, batch.usage.output_tokens, batch.usage.total_tokens) == (8, 0, 8)
        [error] = await read(here.sdk(), batch.error_file_id)
        assert error["response"]["status_code"] == 400
        assert error["response"]["body"]["error"]["code"] == "context_length_exceeded"
        assert here.engine.open == {}


@pytest.mark.parametrize(
    ("url", "body", "param"),
    [
        (RESPONSES, {"input": "hi", "stream": True}, "body.stream"),
        (RESPONSES, {"input": "hi", "background": True}, "body.background"),
        (RESPONSES, {"input": [{"type": "function_call"}]}, "body.input[0].call_id"),
        (EMBEDDINGS, {"input": "hi", "stream": True}, "body.stream"),
        (EMBEDDINGS, {"input": []}, "body.input"),
        (EMBEDDINGS, {"input": "hi", "model": "other"}, "model"),
    ],
)
async def test_a_line_of_the_other_routes_is_checked_too(
    tmp_path: Path, url: str, body: dict[str, Any], param: str
) -> None:
    """Before anything runs, with line and field."""
    async with site(tmp_path) as here:
        batch = await run(here.sdk(), jsonl(request(1, url, **body)), url)
        assert batch.status == "failed"
        assert [(error.line, error.param) for error in batch.errors.data] == [(1, param)]
        assert here.engine.submitted == []


@pytest.mark.parametrize(
    ("wrong", "param", "words"),
    [
        (request(2) | {"method": "GET"}, "method", "'POST'"),
        (request(2) | {"url": "/v1/completions"}, "url", "the batch's endpoint, /v1/chat/completions"),
        (request(2) | {"custom_id": ""}, "custom_id", "at least 1"),
        ({"custom_id": "a", "method": "POST", "url": CHAT}, "body", "required"),
        (request(2) | {"extra": 1}, "extra", "not a parameter"),
        (request(2, messages=[]), "body.messages", "at least 1"),
        (request(2, messages=[{"role": "user", "content": "x"}], stream=True), "body.stream", "must be false"),
        (request(2, messages=[{"role": "user", "content": "x"}], top_q=1), "body.top_q", "did you mean"),
        (request(2, messages=[{"role": "user", "content": "x"}], model="other"), "model", "does not exist"),
        (request(1), "custom_id", "line 1 has the same"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
async def test_an_invalid_line_fails_the_batch(tmp_path: Path, wrong: dict[str, Any], param: str, words: str) -> None:
    """What can be told without running is told before anything runs, with the line's number and the field."""
    async with site(tmp_path) as here:
        batch = await run(here.sdk(), jsonl(request(1), wrong))
        assert batch.status == "failed"
        assert batch.errors.object == "list"
        (error,) = batch.errors.data
        assert (error.line, error.param) == (2, param)
        assert words in error.message
        assert here.engine.submitted == []


async def test_a_full_queue_is_waited_out(tmp_path: Path) -> None:
    """What the engine refuses for now is run later, and is no error."""
    async with site(tmp_path) as here:
        here.engine.refuse = Overloaded("full", retry_after_s=1)
        sdk = here.sdk()
        file = await sdk.files.create(file=("in.jsonl", jsonl(request(1))), purpose="batch")
        batch = await sdk.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        await becomes(here.vault, batch.id, lambda record: record.status == "in_progress")
        here.engine.refuse = None
        await becomes(here.vault, batch.id, lambda record: record.status == "completed")
        assert (await here.vault.batch(batch.id)).completed == 1


async def test_what_the_model_fails_on_is_an_error_of_its_line(tmp_path: Path) -> None:
    """A step that fails is tried three times; then the line has a 500, and the batch goes on to its end."""
    async with site(tmp_path) as here:
        here.engine.failure = FinishReason.ERROR
        batch = await run(
            here.sdk(), jsonl(request(1), request(2, messages=[{"role": "user", "content": "x"}], max_tokens=1))
        )
        assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 1, 1)
        (line,) = await read(here.sdk(), batch.error_file_id)
        assert (line["custom_id"], line["response"]["status_code"]) == ("r1", 500)
        assert line["response"]["body"]["error"]["code"] == "step_failed"
        assert len(here.engine.submitted) == 4


async def test_cancel_aborts_what_runs(tmp_path: Path) -> None:
    """The engine holds nothing of a cancelled batch; what was done before can be read."""
    async with site(tmp_path, batch_lines_in_flight=2) as here:
        sdk = here.sdk()
        here.engine.gate.clear()
        file = await sdk.files.create(file=("in.jsonl", jsonl(*map(request, range(4)))), purpose="batch")
        batch = await sdk.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        await until(lambda: len(here.engine.open) == 2)
        with pytest.raises(openai.ConflictError, match=batch.id):
            await sdk.files.delete(file.id)
        assert (await sdk.batches.cancel(batch.id)).status == "cancelling"
        await becomes(here.vault, batch.id, lambda record: record.status == "cancelled")
        assert here.engine.open == {}
        assert here.engine.aborted == 2
        batch = await sdk.batches.retrieve(batch.id)
        assert batch.request_counts.model_dump() == {"total": 4, "completed": 0, "failed": 4}
        (first, *_) = await read(sdk, batch.error_file_id)
        assert (first["response"], first["error"]["code"]) == (None, "batch_cancelled")
        with pytest.raises(openai.ConflictError):
            await sdk.batches.cancel(batch.id)


async def test_files_through_the_openai_client(tmp_path: Path) -> None:
    """Create, retrieve, list page by page, read, delete: OpenAI's objects, byte for byte what was sent."""
    async with site(tmp_path, work=False) as here:
        sdk = here.sdk()
        contents = [bytes(range(256)) * 4096, b"", b"--boundary\r\n\r\nno end"]
        made = [await sdk.files.create(file=(f"naïve {n}.jsonl", c), purpose="batch") for n, c in enumerate(contents)]
        assert made[0].model_dump() == {
            "id": made[0].id,
            "object": "file",
            "bytes": 2**20,
            "created_at": 1_700_000_000,
            "expires_at": 1_700_000_000 + 30 * 86_400,
            "filename": "naïve 0.jsonl",
            "purpose": "batch",
            "status": "processed",
            "status_details": None,
        }
        for file, content in zip(made, contents, strict=True):
            assert (await sdk.files.content(file.id)).content == content
            assert await sdk.files.retrieve(file.id) == file
        ids = [file.id for file in made]
        assert [file.id async for file in sdk.files.list(limit=1, order="asc")] == ids
        assert [file.id async for file in sdk.files.list(limit=2, purpose="batch")] == ids[::-1]
        assert (await sdk.files.list(purpose="batch_output")).data == []
        assert (await sdk.files.delete(ids[1])).deleted
        for gone in (sdk.files.retrieve(ids[1]), sdk.files.content(ids[1]), sdk.files.delete(ids[1])):
            with pytest.raises(openai.NotFoundError):
                await gone
        short = await sdk.files.create(
            file=("a", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert short.expires_at == short.created_at + 3600


async def test_batches_are_listed_newest_first(tmp_path: Path) -> None:
    """Page by page, each once; limits are those of OpenAI."""
    async with site(tmp_path, work=False) as here:
        sdk = here.sdk()
        file = await sdk.files.create(file=("in.jsonl", jsonl(request(1))), purpose="batch")
        made = [
            (await sdk.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")).id
            for _ in range(5)
        ]
        assert [batch.id async for batch in sdk.batches.list(limit=2)] == made[::-1]
        for wrong in ({"limit": 0}, {"limit": 101}, {"after": "batch_nothing"}):
            with pytest.raises(openai.BadRequestError):
                await sdk.batches.list(**wrong)


async def test_tenants_do_not_see_each_other(tmp_path: Path) -> None:
    """With another key every id is unknown and every list is empty; results run under the tenant's own salt."""
    async with site(tmp_path, keys=("one", "two")) as here:
        sdk, other = here.sdk("one"), here.sdk("two")
        batch = await run(sdk, jsonl(request(1)))
        (spec,) = here.engine.submitted
        assert spec.service.tenant
        assert spec.cache_salt.startswith(spec.service.tenant)
        for strange in (
            other.files.retrieve(batch.input_file_id),
            other.files.content(batch.output_file_id),
            other.files.delete(batch.input_file_id),
            other.batches.retrieve(batch.id),
            other.batches.cancel(batch.id),
            other.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"),
        ):
            with pytest.raises(openai.NotFoundError):
                await strange
        assert (await other.files.list()).data == []
        assert (await other.batches.list()).data == []
        with pytest.raises(openai.AuthenticationError):
            await here.sdk("three").batches.list()


async def test_tenants_of_a_file_do_not_see_each_other(tmp_path: Path) -> None:
    """Whatever one tenant asks of another's files and batches is answered as if they were not there, word for word;
    both keys of one tenant see the same."""
    file = tmp_path / "tenants.toml"
    keys = {who: add_key(file, who.rstrip("2"), {}) for who in ("acme", "acme2", "spy")}
    tenants = Tenants()
    tenants.replace(read_tenants(file))
    async with site(tmp_path / "data", tenants=tenants) as here, client(here.app) as http:
        batch = await run(here.sdk(keys["acme"]), jsonl(request(1)))
        here.engine.gate.clear()
        mine = here.sdk(keys["acme"])
        input_file = await mine.files.create(file=("in.jsonl", jsonl(request(1), request(2))), purpose="batch")
        going_on = await mine.batches.create(input_file_id=input_file.id, endpoint=CHAT, completion_window="24h")
        await until(lambda: len(here.engine.open) == 2)

        async def ask(who: str, method: str, path: str, body: Any = None) -> tuple[int, str]:
            answer = await http.request(method, path, json=body, headers={"authorization": f"Bearer {keys[who]}"})
            return answer.status_code, answer.text

        batches, files = (batch.id, going_on.id), (batch.input_file_id, batch.output_file_id, input_file.id)
        for path, ids, absent, calls in (
            ("/v1/batches", batches, "batch_nothing", (("GET", ""), ("POST", "/cancel"))),
            ("/v1/files", files, "file-nothing", (("GET", ""), ("GET", "/content"), ("DELETE", ""))),
        ):
            for method, end in calls:
                status, nothing = await ask("spy", method, f"{path}/{absent}{end}")
                assert status == 404
                for name in ids:
                    answer = await ask("spy", method, f"{path}/{name}{end}")
                    assert answer == (404, nothing.replace(absent, name))
            _, page = await ask("spy", "GET", path)
            assert json.loads(page)["data"] == []
            assert (await ask("spy", "GET", f"{path}?after={ids[0]}"))[0] == 400
            _, page = await ask("acme2", "GET", path)
            assert {*ids} == {entry["id"] for entry in json.loads(page)["data"]}
        body = {"input_file_id": input_file.id, "endpoint": CHAT, "completion_window": "24h"}
        assert (await ask("spy", "POST", "/v1/batches", body))[0] == 404
        here.engine.gate.set()
        await becomes(here.vault, going_on.id, lambda record: record.status == "completed")
        assert len({spec.service.tenant for spec in here.engine.submitted}) == 1
        assert (await ask("acme2", "DELETE", f"/v1/files/{input_file.id}"))[0] == 200


async def test_a_wrong_create_names_the_field(tmp_path: Path) -> None:
    """Each field of POST /v1/batches has its 400, an unknown file its 404."""
    async with site(tmp_path, work=False) as here, client(here.app) as http:
        file = (await here.sdk().files.create(file=("a", b"{}"), purpose="batch")).id
        good = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
        cases: list[tuple[dict[str, Any], int, str]] = [
            ({"endpoint": "/v1/images/generations"}, 400, "endpoint"),
            ({"completion_window": "48h"}, 400, "completion_window"),
            ({"metadata": {"k" * 65: "v"}}, 400, "metadata"),
            ({"metadata": {"k": "v" * 513}}, 400, "metadata.k"),
            ({"metadata": {str(n): "" for n in range(17)}}, 400, "metadata"),
            ({"output_expires_after": {"anchor": "created_at", "seconds": 3599}}, 400, "output_expires_after.seconds"),
            ({"input_file_id": "file-nothing"}, 404, "file_id"),
            ({"model": "x"}, 400, "model"),
        ]
        for wrong, status, param in cases:
            answer = await http.post("/v1/batches", json=good | wrong)
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
        answer = await http.post("/v1/batches", json=good | {"output_expires_after": None, "metadata": None})
        assert answer.status_code == 200


BOUND = {"content-type": "multipart/form-data; boundary=b"}


def form(*parts: tuple[str, bytes]) -> bytes:
    """A form of (Content-Disposition's parameters, data), without its last boundary."""
    return b"".join(
        f"--b\r\nContent-Disposition: form-data; {about}\r\n\r\n".encode() + data + b"\r\n" for about, data in parts
    )


FILE, PURPOSE, END = ('name="file"; filename="a"', b"{}\n"), ('name="purpose"', b"batch"), b"--b--\r\n"


@pytest.mark.parametrize(
    ("content", "headers", "status", "what"),
    [
        (b"{}", {"content-type": "application/json"}, 415, "content-type"),
        (form(FILE, PURPOSE) + END, BOUND | {"content-encoding": "gzip"}, 415, "content-encoding"),
        (form(FILE, PURPOSE) + END, {"content-type": "multipart/form-data"}, 400, "content-type"),
        (b"nonsense", BOUND, 400, "invalid_form"),
        (form(FILE, PURPOSE), BOUND, 400, "incomplete_body"),
        (form(PURPOSE) + END, BOUND, 400, "file"),
        (form(('name="file"', b"{}"), PURPOSE) + END, BOUND, 400, "file"),
        (form(FILE) + END, BOUND, 400, "purpose"),
        (form(FILE, ('name="purpose"', b"assistants")) + END, BOUND, 400, "purpose"),
        (form(FILE, FILE, PURPOSE) + END, BOUND, 400, "file"),
        (form(FILE, PURPOSE, ('name="more"', b"1")) + END, BOUND, 400, "more"),
        (form(FILE, ('name="purpose"', b"x" * 300)) + END, BOUND, 400, "purpose"),
        (form(FILE, PURPOSE, ('name="expires_after[seconds]"', b"3600")) + END, BOUND, 400, "expires_after"),
        (form(('name="file"; filename="a"', b"x" * 3000), PURPOSE) + END, BOUND, 413, "file"),
        (form(('name="file"; filename="a"', b"\n" * 21), PURPOSE) + END, BOUND, 413, "file"),
    ],
)
async def test_a_wrong_upload_is_refused_whole(
    tmp_path: Path, content: bytes, headers: dict[str, str], status: int, what: str
) -> None:
    """Whatever is wrong with the form: its own 4xx, in one piece or byte by byte, and nothing is kept."""

    async def drops() -> AsyncIterator[bytes]:
        for start in range(0, len(content), 7):
            yield content[start : start + 7]

    async with site(tmp_path, work=False, max_file_bytes=2048, max_batch_lines=20) as here, client(here.app) as http:
        for body in (content, drops()):
            answer = await http.post("/v1/files", content=body, headers=headers)
            error = answer.json()["error"]
            assert answer.status_code == status, answer.text
            assert what in (error["param"], error["code"]), answer.text
        assert (await http.get("/v1/files")).json()["data"] == []
        assert list((tmp_path / "batches" / "content").iterdir()) == []


async def test_fields_may_come_in_any_order(tmp_path: Path) -> None:
    """The file first, as curl sends it, or last; names and text in any bytes."""
    async with site(tmp_path, work=False) as here, client(here.app) as http:
        for parts in ((FILE, PURPOSE), (PURPOSE, ('name="file"; filename="../../é"', b"--b"))):
            answer = await http.post("/v1/files", content=form(*parts) + END, headers=BOUND)
            assert answer.status_code == 200, answer.text
        assert answer.json()["filename"] == "../../é"
        assert (await http.get(f"/v1/files/{answer.json()['id']}/content")).content == b"--b"


async def test_without_a_data_path_the_routes_say_so() -> None:
    """Every route is a 404 that names the setting, and no series of batches is shown."""
    async with client(make_app(FakeEngine())) as http:
        for method, path in (
            ("POST", "/v1/files"),
            ("GET", "/v1/files"),
            ("GET", "/v1/files/a"),
            ("DELETE", "/v1/files/a"),
            ("GET", "/v1/files/a/content"),
            ("POST", "/v1/batches"),
            ("GET", "/v1/batches"),
            ("GET", "/v1/batches/a"),
            ("POST", "/v1/batches/a/cancel"),
        ):
            answer = await http.request(method, path)
            assert answer.status_code == 404, path
            assert answer.json()["error"]["code"] == "batch_api_off"
            assert "--data-path" in answer.json()["error"]["message"]
        assert "terrace_batch" not in (await http.get("/metrics")).text


async def test_metrics_count_batches_and_lines(tmp_path: Path) -> None:
    """Every status and outcome has its series from the start; they follow what happens."""
    async with site(tmp_path) as here, client(here.app) as http:
        before = (await http.get("/metrics")).text
        assert before.count("terrace_batches{") == 8
        assert before.count("terrace_batch_lines_total{") == 4
        await run(here.sdk(), jsonl(request(1), request(2)))
        await run(here.sdk(), b"{")
        after = (await http.get("/metrics")).text
        for series in (
            'terrace_batches{model_name="fake",status="completed"} 1.0',
            'terrace_batches{model_name="fake",status="failed"} 1.0',
            'terrace_batch_lines_total{model_name="fake",outcome="completed"} 2.0',
        ):
            assert series in after
