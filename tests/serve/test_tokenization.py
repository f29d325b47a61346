"""/tokenize and /detokenize in vLLM's shapes, and the endpoints that say who and how the server is."""

from tests.serve.conftest import ServerProcess
from tests.serve.letters import BOS, END, ids


def test_tokenize_a_prompt(server: ServerProcess):
    assert server.post("/tokenize", {"prompt": "abc"}).json() == {
        "count": 4,
        "max_model_len": 4096,
        "tokens": [BOS, *ids("abc")],
        "token_strs": None,
    }
    asked = {"model": "letters", "prompt": "ab", "add_special_tokens": False, "return_token_strs": True}
    answer = server.post("/tokenize", asked).json()
    assert (answer["tokens"], answer["token_strs"]) == (ids("ab"), ["a", "b"])
    assert server.post("/tokenize", {"prompt": "", "add_special_tokens": False}).json()["tokens"] == []


def test_tokenize_a_conversation(server: ServerProcess):
    talk = {"messages": [{"role": "user", "content": "hi"}]}
    assert server.post("/tokenize", talk).json()["tokens"] == [2, *ids("hi"), END, 4]
    assert server.post("/tokenize", talk | {"add_generation_prompt": False}).json()["tokens"] == [2, *ids("hi"), END]
    # What /tokenize counts is what the chat endpoint bills.
    chat = server.post("/v1/chat/completions", talk | {"max_tokens": 1}).json()
    assert chat["usage"]["prompt_tokens"] == server.post("/tokenize", talk).json()["count"]


def test_detokenize(server: ServerProcess):
    assert server.post("/detokenize", {"tokens": [BOS, *ids("abc"), END]}).json() == {"prompt": "<|bos|>abc<|end|>"}
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    response = server.post("/detokenize", {"tokens": [261]})
    assert response.status_code == 400
    assert "261" in response.json()["error"]["message"]


def test_models(server: ServerProcess):
    models = server.get("/v1/models").json()
    assert models["object"] == "list"
    assert [card["id"] for card in models["data"]] == ["letters", "alphabet"]
    assert all(card["object"] == "model" and card["max_model_len"] == 4096 for card in models["data"])
    assert server.get("/v1/models/alphabet").json()["id"] == "alphabet"


def test_status(server: ServerProcess):
    assert server.get("/health").json() == server.get("/ready").json() == {"status": "ok"}
    assert set(server.get("/version").json()) == {"version"}
