"""Who may use the server, and how much: keys, rates, images at once, other origins."""

from __future__ import annotations

import asyncio
import logging
import socket

import httpx
import openai
import pytest

from tests.waiting import HANG_S, until
from tetriserve.config import AccessConfig, ServerConfig
from tetriserve.core.errors import ConfigError, InvalidRequest
from tetriserve.logs import JsonFormatter
from tetriserve.server import EngineSlot, create_app, serve
from tetriserve.server.limits import Allowance, OverLimit, TokenBucket

URL = "/v1/images/generations"
BODY = {"prompt": "a lighthouse", "size": "64x64"}
KEYS = ("sk-first-secret", "sk-second-secret")


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
async def guarded(engine, connect):
    async with connect(EngineSlot(engine), api_keys=KEYS) as client:
        yield client


@pytest.mark.parametrize("key", KEYS)
async def test_each_key_opens_the_api(guarded, key):
    assert (await guarded.post(URL, json=BODY, headers=bearer(key))).status_code == 200
    assert (await guarded.get("/v1/models", headers={"Authorization": f"bearer  {key}"})).status_code == 200


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "send an API key in the header Authorization: Bearer KEY"),
        (bearer(""), "this API key is not known here"),
        (bearer("sk-first-secre"), "this API key is not known here"),
        (bearer("sk-first-secret2"), "this API key is not known here"),
        (bearer("SK-FIRST-SECRET"), "this API key is not known here"),
        ({"Authorization": "Basic sk-first-secret"}, "this API key is not known here"),
        ({"Authorization": "sk-first-secret"}, "this API key is not known here"),
        ({"Authorization": b"Bearer \xff\xfe"}, "this API key is not known here"),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", URL), ("GET", "/v1/models"), ("GET", "/debug/trace")])
async def test_without_a_key_there_is_a_401_in_the_envelope(guarded, method, path, headers, message):
    response = await guarded.request(method, path, headers=headers)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert response.headers["X-Request-Id"]
    assert response.json() == {
        "error": {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
    }


async def test_whatever_is_not_named_as_open_is_guarded(guarded):
    opened = [
        path for path in ("/health", "/ready", "/metrics", "/openapi.json") if (await guarded.get(path)).is_success
    ]
    assert opened == ["/health", "/ready", "/metrics", "/openapi.json"]
    for path in ("/v1", "/v1/", "/V1/models", "/no/such/path", "/health/", "//v1/models", "/v1%2Fmodels"):
        assert (await guarded.get(path)).status_code == 401


async def test_the_description_says_where_a_key_is_needed(guarded, client):
    described = (await guarded.get("/openapi.json")).json()
    assert described["components"]["securitySchemes"] == {"HTTPBearer": {"type": "http", "scheme": "bearer"}}
    needs_key = {path for path, item in described["paths"].items() if any("security" in each for each in item.values())}
    assert needs_key == {
        URL,
        "/v1/images/edits",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/{model_id}",
        "/v1/quotes",
        *(f"/v1/videos{rest}" for rest in ("", "/sync", "/{video_id}", "/{video_id}/content", "/{video_id}/remix")),
        "/debug/trace",
    }
    assert "securitySchemes" not in (await client.get("/openapi.json")).json()["components"]


async def test_metrics_can_be_guarded_too(engine, connect):
    async with connect(EngineSlot(engine), api_keys=KEYS, guard_metrics=True) as client:
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/metrics", headers=bearer(KEYS[0]))).status_code == 200
        assert (await client.get("/health")).status_code == 200


async def test_a_stranger_is_refused_before_the_body_is_read(guarded):
    async def endless():
        yield b"{"
        pytest.fail("the body of a stranger was read")

    response = await guarded.post(URL, content=endless(), headers={"Content-Type": "application/json"})
    assert response.status_code == 401


async def test_without_configured_keys_everyone_is_welcome(client):
    assert (await client.post(URL, json=BODY)).status_code == 200
    assert (await client.post(URL, json=BODY, headers=bearer("whatever"))).status_code == 200


async def test_no_key_is_ever_logged(guarded, caplog):
    with caplog.at_level(logging.DEBUG):
        await guarded.post(URL, json=BODY, headers=bearer(KEYS[1]))
        await guarded.post(URL, json=BODY, headers=bearer("sk-guessed-secret"))
        await guarded.post(URL, json={"n": 0}, headers=bearer(KEYS[0]))
        logging.getLogger("tetriserve").info("%s", ServerConfig(access=AccessConfig(api_keys=KEYS)))
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("tetriserve")]
    assert "key=2" in ours[0]
    assert "code=invalid_api_key" in ours[1]
    assert "key=1" in ours[2]
    assert len(ours) == 4
    for formatter in (JsonFormatter(), logging.Formatter("%(message)s")):
        assert not [record for record in caplog.records if "secret" in formatter.format(record)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api_keys": ("good", "")}, "api-key 2 is empty; allowed: 1 or more printable ASCII characters"),
        ({"api_keys": ("se cret",)}, "api-key 1 holds a space or a character outside ASCII; allowed: "),
        ({"api_keys": ("secrét",)}, "api-key 1 holds a space or a character outside ASCII; allowed: "),
        ({"api_keys": ("secret\n",)}, "api-key 1 holds a space or a character outside ASCII; allowed: "),
        ({"rate_limit": 0}, "rate-limit is 0; allowed: 1 to 1000000"),
        ({"max_concurrency": -1}, "max-concurrency is -1; allowed: 1 to 1000000"),
        ({"guard_metrics": True}, "guard-metrics is set without a key to ask for; add --api-key"),
        ({"cors_origins": ("example.org",)}, "cors-origin is 'example.org'; write an origin such as https://example"),
        ({"cors_origins": ("https://example.org/",)}, "cors-origin is 'https://example.org/'; write an origin"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_without_the_key(settings, message):
    with pytest.raises(ConfigError) as error:
        AccessConfig(**settings)
    assert str(error.value).startswith(message)
    assert "secr" not in str(error.value)


def test_a_bucket_gives_a_minutes_worth_at_once_and_then_its_rate():
    bucket = TokenBucket(6)
    assert [bucket.take(1, 0.0) for _ in range(6)] == [0.0] * 6
    assert bucket.take(1, 0.0) == pytest.approx(10.0)
    assert bucket.take(2, 5.0) == pytest.approx(15.0)
    assert bucket.take(1, 10.0) == 0.0
    assert bucket.take(1, 10.0) == pytest.approx(10.0)
    assert bucket.take(6, 1000.0) == 0.0
    assert bucket.take(1, 1000.0) == pytest.approx(10.0)


def test_what_is_pending_counts_until_it_ends_even_badly():
    allowance = Allowance(None, 2)
    with pytest.raises(ZeroDivisionError), allowance.admitted(2, 0.0):
        with pytest.raises(OverLimit) as refused, allowance.admitted(1, 0.0):
            pass
        raise ZeroDivisionError
    assert refused.value.code == "concurrency_limit_exceeded"
    with allowance.admitted(2, 0.0):
        pass
    with pytest.raises(InvalidRequest, match="n is 3; your key may have 2 images at once"), allowance.admitted(3, 0.0):
        pass


def test_a_refusal_for_concurrency_uses_up_no_rate():
    allowance = Allowance(2, 1)
    with allowance.admitted(1, 0.0), pytest.raises(OverLimit), allowance.admitted(1, 0.0):
        pass
    with allowance.admitted(1, 0.0):
        pass


async def test_the_rate_is_each_keys_own_and_counts_images(engine, connect):
    async with connect(EngineSlot(engine), api_keys=KEYS, rate_limit=3) as client:
        assert (await client.post(URL, json={**BODY, "n": 2}, headers=bearer(KEYS[0]))).status_code == 200
        refused = await client.post(URL, json={**BODY, "n": 2}, headers=bearer(KEYS[0]))
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert "3 images per minute" in refused.json()["error"]["message"]
        assert 1 <= int(refused.headers["Retry-After"]) <= 20
        assert (await client.post(URL, json=BODY, headers=bearer(KEYS[0]))).status_code == 200
        assert (await client.post(URL, json={**BODY, "n": 3}, headers=bearer(KEYS[1]))).status_code == 200
        never = await client.post(URL, json={**BODY, "n": 4}, headers=bearer(KEYS[1]))
        assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
        assert (await client.get("/v1/models", headers=bearer(KEYS[1]))).status_code == 200


async def test_images_at_once_are_each_keys_own(engine, executor, connect):
    async with connect(EngineSlot(engine), api_keys=KEYS, max_concurrency=2) as client:
        executor.gate.clear()
        pending = asyncio.create_task(client.post(URL, json={**BODY, "n": 2}, headers=bearer(KEYS[0])))
        await until(lambda: len(engine.state.trajectories) == 2)
        refused = await client.post(URL, json=BODY, headers=bearer(KEYS[0]))
        assert refused.status_code == 429
        assert refused.headers["Retry-After"] == "1"
        assert refused.json()["error"]["code"] == "concurrency_limit_exceeded"
        assert "2 of your images are unanswered, of at most 2" in refused.json()["error"]["message"]
        other = asyncio.create_task(client.post(URL, json=BODY, headers=bearer(KEYS[1])))
        await until(lambda: len(engine.state.trajectories) == 3)
        executor.gate.set()
        assert [(await answer).status_code for answer in (pending, other)] == [200, 200]
        assert (await client.post(URL, json=BODY, headers=bearer(KEYS[0]))).status_code == 200


async def test_without_keys_all_clients_share_one_allowance(engine, connect):
    async with connect(EngineSlot(engine), rate_limit=1) as client:
        answers = [await client.post(URL, json=BODY, headers=headers) for headers in ({}, bearer("other"))]
        assert [answer.status_code for answer in answers] == [200, 429]


async def test_the_openai_package_sends_its_key(engine, connect):
    async with connect(EngineSlot(engine), api_keys=KEYS) as http:
        for key, is_known in ((KEYS[0], True), ("sk-other", False)):
            ai = openai.AsyncOpenAI(base_url="http://server/v1", api_key=key, http_client=http, max_retries=0)
            if is_known:
                assert len((await ai.models.list()).data) == 1
            else:
                with pytest.raises(openai.AuthenticationError) as error:
                    await ai.models.list()
                assert error.value.code == "invalid_api_key"


PREFLIGHT = {
    "Origin": "https://board.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


async def test_pages_of_other_origins_are_not_helped_by_default(client):
    answer = await client.post(URL, json=BODY, headers={"Origin": "https://board.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert (await client.options(URL, headers=PREFLIGHT)).status_code == 405


async def test_pages_of_allowed_origins_may_call_with_a_key(engine, connect):
    async with connect(EngineSlot(engine), api_keys=KEYS, cors_origins=("https://board.example",)) as client:
        preflight = await client.options(URL, headers=PREFLIGHT)
        assert preflight.status_code == 200
        assert preflight.headers["Access-Control-Allow-Origin"] == "https://board.example"
        assert "authorization" in preflight.headers["Access-Control-Allow-Headers"].lower()
        headers = {"Origin": "https://board.example", **bearer(KEYS[0])}
        answer = await client.post(URL, json=BODY, headers=headers)
        assert answer.headers["Access-Control-Allow-Origin"] == "https://board.example"
        assert "X-Request-Id" in answer.headers["Access-Control-Expose-Headers"]
        stranger = await client.post(URL, json=BODY, headers={**headers, "Origin": "https://evil.example"})
        assert "Access-Control-Allow-Origin" not in stranger.headers
        assert (await client.options(URL, headers={**PREFLIGHT, "Origin": "https://evil.example"})).status_code == 400


async def test_a_refusal_for_the_key_is_readable_by_an_allowed_page(engine, connect):
    async with connect(EngineSlot(engine), api_keys=KEYS, cors_origins=("*",)) as client:
        answer = await client.post(URL, json=BODY, headers={"Origin": "https://board.example"})
        assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (401, "*")


def test_the_server_is_for_this_machine_alone_unless_told_otherwise():
    assert ServerConfig().host == "127.0.0.1"
    assert ServerConfig().access == AccessConfig(api_keys=(), cors_origins=())


@pytest.mark.parametrize(
    ("host", "keys", "is_warned"),
    [
        ("0.0.0.0", (), True),
        ("0.0.0.0", KEYS, False),
        ("127.0.0.1", (), False),
        ("127.0.0.2", (), False),
        ("localhost", (), False),
        ("::1", (), False),
        ("[::1]", (), False),
        ("0:0:0:0:0:0:0:1", (), False),
    ],
)
async def test_a_server_open_to_others_without_a_key_says_so(host, keys, is_warned, caplog):
    if ":" in host:
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("no IPv6 here")

    async def launch():
        raise ConfigError("no model")

    config = ServerConfig(host=host, port=0, access=AccessConfig(api_keys=keys))
    with pytest.raises(ConfigError, match="no model"):
        await serve(config, launch)
    assert ("anyone who reaches 0.0.0.0 can use this server; --api-key guards it" in caplog.text) is is_warned
    assert ("anyone who reaches" in caplog.text) is is_warned


REBOUND = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "192.0.2.1",
    "",
    "[::2]",
]
LOCAL = [
    "localhost",
    "LOCALHOST:80",
    "localhost.",
    "tetri.localhost",
    "127.0.0.1:8000",
    "127.1.2.3",
    "[::1]:8000",
    "[::1]",
]


@pytest.fixture
async def local(engine):
    """A client of a server on loopback without keys."""
    transport = httpx.ASGITransport(create_app(EngineSlot(engine), is_local=True))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@pytest.mark.parametrize("host", REBOUND)
@pytest.mark.parametrize("path", ["/", "/board/events", "/v1/models", "/metrics", "/debug/trace", "/health"])
async def test_on_loopback_a_page_whose_name_was_rebound_is_told_nothing(local, path, host):
    answer = await local.get(path, headers={"Host": host})
    assert (answer.status_code, answer.json()["error"]["code"]) == (421, "host_not_served")


@pytest.mark.parametrize("host", LOCAL)
async def test_on_loopback_this_machine_is_served_by_each_of_its_names(local, host):
    assert (await local.get("/v1/models", headers={"Host": host})).status_code == 200


async def test_with_a_key_or_for_other_machines_any_name_is_served(engine, connect):
    host = {"Host": "images.example"}
    app = create_app(EngineSlot(engine), AccessConfig(api_keys=KEYS), is_local=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        assert (await client.get("/v1/models", headers=host | bearer(KEYS[0]))).status_code == 200
    async with connect(EngineSlot(engine)) as client:
        assert (await client.get("/v1/models", headers=host)).status_code == 200


async def test_a_server_on_loopback_asks_for_a_name_of_loopback(live):
    async with httpx.AsyncClient(base_url=await live.url, timeout=HANG_S) as client:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/board/events", headers={"Host": "evil.example"})).status_code == 421
