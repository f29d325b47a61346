"""/metrics says what happened, in the text that Prometheus reads."""

from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from tests.serve.conftest import ServerProcess, until

URL = "/v1/completions"


def test_everything_is_counted(start_server: Callable[..., ServerProcess]):
    server = start_server(script={"step_s": 0.02}, server={"max_events_per_s": 1e9})
    server.post(URL, {"prompt": "abc", "max_tokens": 10})
    server.events(URL, {"prompt": "abc", "max_tokens": 20})
    server.post(URL, {"prompt": "abc", "stop": "f"})
    server.post(URL, {"prompt": "abc", "n": 2, "max_tokens": 5})
    server.post(URL, {"prompt": "abc", "max_tokens": -1})
    until(lambda: server.metrics()["tenfold_num_requests_running"] == 0)
    metrics = server.metrics()
    assert metrics['tenfold_request_success_total{finished_reason="length"}'] == 4
    assert metrics['tenfold_request_success_total{finished_reason="stop"}'] == 1
    assert metrics['tenfold_request_success_total{finished_reason="abort"}'] == 0
    assert metrics["tenfold_time_to_first_token_seconds_count"] == 4  # prompts
    assert metrics["tenfold_e2e_request_latency_seconds_count"] == 5  # completions
    assert metrics["tenfold_generation_tokens_total"] >= 10 + 20 + 3 + 5 + 5
    # Between a completion's tokens: at most one less than there are, and fewer if its first came together.
    gaps = metrics["tenfold_inter_token_latency_seconds_count"]
    assert 10 <= gaps <= metrics["tenfold_generation_tokens_total"] - 5
    assert metrics["tenfold_inter_token_latency_seconds_sum"] / gaps > 0.01
    assert metrics["tenfold_time_to_first_token_seconds_sum"] > 4 * 0.02
    assert metrics["tenfold_kv_cache_usage_perc"] == metrics["tenfold_kv_cache_pages_used"] == 0
    assert metrics["tenfold_kv_cache_pages"] > 0
    assert metrics["tenfold_engine_healthy"] == 1
    for name in (
        *("num_requests_waiting", "prompt_tokens_total", "prefix_cache_queries_total", "prefix_cache_hits_total"),
        *("num_preemptions_total", "compilations_since_ready_total", "engine_restarts_total", "engine_steps_total"),
    ):
        assert f"tenfold_{name}" in metrics


def test_the_text_is_prometheus_own(server: ServerProcess):
    response = server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert families["tenfold_time_to_first_token_seconds"].type == "histogram"
    assert families["tenfold_num_requests_running"].type == "gauge"
    assert families["tenfold_generation_tokens"].type == "counter"
    assert {s.labels["model_name"] for f in families.values() for s in f.samples} == {"letters"}
