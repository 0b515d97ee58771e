"""The engine for chat servers: what it asks, how much at once, and every way in which an answer fails to come."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from captioning.canary import CanaryError, check_engine
from captioning.config import DESCRIBE, CaptioningConfig
from captioning.engines.openai_engine import OpenAIEngine
from captioning.engines.protocol import Caption, Refusal
from encoders.chat_config import ChatServerConfig
from encoders.chat_server import ChatServer, Patience, ServerError
from tests.chat_server import ScriptedServer, describe, fail, image_of, prompt_of, requests, say
from tests.raw_shards import photo


def make_engine(base_url: str, *, key: str = "", **server: Any) -> OpenAIEngine:
    table = {"base_url": base_url, "max_backoff_seconds": 0.02, "patience_seconds": 60, "num_requests": 4, **server}
    config = CaptioningConfig.model_validate({"engine": "openai", "model": "toy", "server": table})
    return OpenAIEngine(config, api_key=key)


def test_requests_say_what_the_recipe_says(tmp_path) -> None:
    with ScriptedServer(describe) as server:
        engine = make_engine(server.base_url, key="secret", image_short_side_pixels=32)
        asked = [
            dataclasses.replace(requests(1)[0], image=photo(1, 128, 64), prompt="a <image></s> dog <|im_end|> <b>")
        ]
        [caption] = engine.caption(engine.prepare(asked))
    [body] = server.requests
    assert isinstance(caption, Caption) and caption.num_tokens == 9
    assert server.keys == {"Bearer secret"}
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("toy", 0.0, 256)
    assert body["seed"] == 2**60 & (2**31 - 1) and "top_p" not in body and "repetition_penalty" not in body
    assert prompt_of(body).split() == ["a", "dog", "<b>"]
    assert image_of(body).size == (64, 32)
    whole = make_engine("http://127.0.0.1:1/v1").prepare(requests(1))[0]
    body["messages"][0]["content"][0]["image_url"]["url"] = whole.image_url
    assert np.array_equal(np.asarray(image_of(body)), np.asarray(photo(0, 96, 96))), "the pixels arrive as they are"


def test_sampling_and_penalties_are_sent_as_each_server_wants_them() -> None:
    with ScriptedServer(describe) as server:
        for parameter in ("repetition_penalty", "frequency_penalty"):
            engine = make_engine(server.base_url, penalty_parameter=parameter)
            engine._config = engine._config.model_copy(update={"temperature": 0.2})
            engine.caption(engine.prepare(requests(1)), repetition_penalty=1.25)
    first, second = server.requests
    assert (first["temperature"], first["top_p"], first["repetition_penalty"]) == (0.2, 1.0, 1.25)
    assert second["frequency_penalty"] == pytest.approx(0.25) and "repetition_penalty" not in second


def test_requests_in_flight_are_bounded_and_order_is_kept() -> None:
    with ScriptedServer(describe, seconds=0.02) as server:
        many, one = make_engine(server.base_url, num_requests=5), make_engine(server.base_url, num_requests=1)
        together = many.caption(many.prepare(requests(20)))
        assert 1 < server.most_in_flight <= 5
        assert together == one.caption(one.prepare(requests(20)))


def test_one_image_the_server_refuses_or_fails_on_is_a_reject() -> None:
    """400 is the last word on an image; 500 is tried again, and counts against the image only while others pass."""

    def answer(body: dict, number: int) -> Any:
        if prompt_of(body) == "refuse":
            return fail(400, "cannot identify image file")
        return fail(500, "division by zero") if prompt_of(body) == "fail" else describe(body, number)

    asked = requests(6)
    asked[1], asked[4] = (dataclasses.replace(asked[n], prompt=p) for n, p in ((1, "refuse"), (4, "fail")))
    with ScriptedServer(answer) as server:
        engine = make_engine(server.base_url, max_attempts=3)
        captions = engine.caption(engine.prepare(asked))
    refused = {index: c.reason for index, c in enumerate(captions) if isinstance(c, Refusal)}
    assert refused == {1: "refused_by_server", 4: "server_failed"}
    assert [prompt_of(body) for body in server.requests].count("fail") == 3


def test_a_server_that_fails_on_everything_is_waited_for_and_not_blamed_on_images() -> None:
    """Busy, starting and broken for the first twelve requests; then every image has its caption."""
    faults = [429, 503, 500, 502] * 3
    with ScriptedServer(lambda body, n: fail(faults[n - 1], "not now") if n <= 12 else describe(body, n)) as server:
        engine = make_engine(server.base_url, max_attempts=2, patience_seconds=120)
        captions = engine.caption(engine.prepare(requests(5)))
    assert all(isinstance(caption, Caption) for caption in captions)
    with ScriptedServer(lambda body, n: fail(500, "out of memory")) as server:
        engine = make_engine(server.base_url, max_attempts=2, patience_seconds=0.3)
        with pytest.raises(
            ServerError, match=r"has not answered for .*patience_seconds 0.3; .*500.*what is done stays"
        ):
            engine.caption(engine.prepare(requests(5)))


def test_an_answer_that_does_not_come_is_a_failure() -> None:
    with ScriptedServer(describe, seconds=0.5) as server:
        engine = make_engine(server.base_url, timeout_seconds=0.1, max_attempts=2, patience_seconds=0.3)
        with pytest.raises(ServerError, match=r"has not answered for .*APITimeoutError"):
            engine.caption(engine.prepare(requests(2)))


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "OPENAI_API_KEY"), (403, "api_key_variable"), (404, "does not know captioning.model 'toy'")],
)
def test_a_wrong_key_or_model_ends_the_job_at_once(status: int, message: str) -> None:
    with ScriptedServer(lambda body, n: fail(status, "no")) as server:
        engine = make_engine(server.base_url, key="sk-secret", num_requests=1, patience_seconds=600)
        with pytest.raises(ServerError, match=message) as error:
            engine.caption(engine.prepare(requests(3)))
    assert "sk-secret" not in str(error.value) and len(server.requests) == 1


def test_a_blind_server_stops_the_job() -> None:
    with ScriptedServer(lambda body, n: say("A room.")) as server, pytest.raises(CanaryError, match="does not see"):
        check_engine(make_engine(server.base_url), photo(0), DESCRIBE)


def patience_of(*, clock: Callable[[], float], **server: float) -> Patience:
    config = ChatServerConfig.model_validate(server)
    return Patience(ChatServer(config=config, table="captioning", model="toy"), clock=clock)


def test_pauses_grow_within_their_bounds_and_patience_counts_silence_only() -> None:
    now = [0.0]
    patience = patience_of(max_backoff_seconds=4.0, patience_seconds=0.05, clock=lambda: now[0])
    pauses = [[patience.backoff_seconds(attempt) for _ in range(50)] for attempt in range(8)]
    for attempt, some in enumerate(pauses):
        bound = min(4.0, 0.5 * 2**attempt)
        assert bound / 2 <= min(some) < max(some) <= bound
    assert patience.backoff_seconds(0, 100.0) <= 4.0
    patience = patience_of(max_backoff_seconds=0.001, patience_seconds=10, clock=lambda: now[0])
    patience.wait(0, "x")
    now[0] = 9.0
    patience.wait(0, "x")
    patience.heard()
    now[0] = 100.0
    patience.wait(0, "x")
    now[0] = 111.0
    with pytest.raises(ServerError, match="has not answered for 11 s"):
        patience.wait(0, "x")
