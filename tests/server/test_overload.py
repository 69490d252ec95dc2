"""More than fits is told to come back; what waits too long on a hung engine shows in the health."""

import asyncio
import time

import pytest

from server.engine.scheduler import SchedulerConfig

SHORT = {"model": "some", "prompt": "x", "max_tokens": 1}
LONG = {"model": "some", "prompt": "x", "max_tokens": 300, "ignore_eos": True}


@pytest.fixture
def small(serve, tmp_path):
    with serve(
        tmp_path, SchedulerConfig(max_running=1, max_waiting=2, prefill_chunk=64, step_tokens=64)
    ) as running:
        yield running


def test_a_full_queue_is_503_with_retry_after(small):
    async def flood():
        async with small.client() as client:
            return await asyncio.gather(*(client.post("/v1/completions", json=LONG) for _ in range(8)))

    answers = asyncio.run(flood())
    refused = [a for a in answers if a.status_code == 503]
    assert {a.status_code for a in answers} == {200, 503}
    for answer in refused:
        assert answer.json()["error"]["code"] == "server_overloaded"
        assert int(answer.headers["Retry-After"]) >= 1
    assert (
        f'requests_rejected_total{{reason="server_overloaded"}} {float(len(refused))}'
        in small.get("/metrics").text
    )


def test_a_stream_is_refused_by_status_not_by_event(small):
    async def flood():
        async with small.client() as client:
            return await asyncio.gather(
                *(client.post("/v1/completions", json=LONG | {"stream": True}) for _ in range(8))
            )

    assert {a.status_code for a in asyncio.run(flood())} == {200, 503}


def test_more_answers_than_the_queue_holds_are_refused_for_good(small):
    error = small.post("/v1/completions", SHORT | {"n": 3}).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "n")


def test_a_draining_server_refuses_and_is_not_ready(small):
    small.runner.begin_drain()
    answer = small.post("/v1/completions", SHORT)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "draining"
    assert "Retry-After" in answer.headers
    ready = small.get("/health/ready")
    assert ready.status_code == 503
    assert ready.json()["error"]["code"] == "draining"
    assert small.get("/health/live").status_code == 200


def test_a_stream_cut_off_by_the_shutdown_ends_with_an_error_event(small, log_lines):
    async def cut_off():
        async with small.client() as client:
            asking = asyncio.ensure_future(
                client.post("/v1/completions", json=LONG | {"stream": True, "max_tokens": 4000})
            )
            while not small.runner.running():
                await asyncio.sleep(0.01)
            await asyncio.to_thread(small.runner.stop, 0.0)
            return await asking

    events = asyncio.run(cut_off()).text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert events[-2].startswith('data: {"error":{')
    assert '"internal_error"' in events[-2]


def test_a_failed_step_is_a_500_and_the_server_goes_on(small, monkeypatch, log_lines):
    step = small.engine.model.step
    monkeypatch.setattr(small.engine.model, "step", lambda segments: 1 / 0)
    answer = small.post("/v1/completions", SHORT)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    monkeypatch.setattr(small.engine.model, "step", step)
    assert small.post("/v1/completions", SHORT).status_code == 200


def test_health_is_good_while_the_engine_beats(small):
    assert small.get("/health/live").json() == {"status": "live"}
    assert small.get("/health/ready").json() == {"status": "ready", "reasons": []}
    assert small.get("/health").json()["version"] == "0.0.test"


def test_a_hung_engine_is_not_live(serve, tmp_path, monkeypatch, wait_until):
    with serve(tmp_path, heartbeat_s=0.4) as running:
        step = running.engine.step
        release = []

        def hang():
            while not release:
                time.sleep(0.01)
            step()

        monkeypatch.setattr(running.engine, "step", hang)

        async def ask_and_look():
            async with running.client() as client:
                asking = asyncio.ensure_future(client.post("/v1/completions", json=SHORT))
                await asyncio.sleep(0.4)
                early = await client.get("/health/live")
                await asyncio.sleep(1.2)
                late = [await client.get(path) for path in ("/health/live", "/health/ready", "/health")]
                release.append(True)
                await asking
                return early, late

        early, late = asyncio.run(ask_and_look())
        assert early.status_code == 200
        assert [answer.status_code for answer in late] == [503] * 3
        assert late[0].json()["error"]["code"] == "not_ready"
        wait_until(lambda: running.get("/health/live").status_code == 200)


def test_an_engine_that_never_ran_is_not_live(serve, tmp_path):
    with serve(tmp_path, start=False) as running:
        assert running.get("/health/live").status_code == 503


def test_a_degraded_server_stays_ready_and_says_why(serve, tmp_path):
    with serve(tmp_path, degraded=lambda: ["key store of 'some': IOError"]) as running:
        ready = running.get("/health/ready")
        assert ready.status_code == 200
        assert ready.json() == {"status": "degraded", "reasons": ["key store of 'some': IOError"]}
