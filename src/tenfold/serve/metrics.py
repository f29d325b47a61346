"""What Prometheus reads: vLLM's metrics by vLLM's names, with the prefix `tenfold_`.

Latencies are measured here, where the client waits for them. Everything about the engine is read from its own counters
when Prometheus asks; they start again from zero when the engine is restarted, which Prometheus expects of counters.
"""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tenfold.engine.outputs import EngineStats
from tenfold.runtime.engine_process import EngineProcess

_FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
_NEXT_TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0),
)
_REQUEST_BUCKETS = (
    *(0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0),
    *(15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
)


class Metrics:
    """The metrics of one server, in a registry of their own.

    Args:
        model_name: label of every metric.
        engine: whose counters are read.
    """

    def __init__(self, model_name: str, engine: EngineProcess) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(model_name, engine))
        self.first_token = self._histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            model_name,
            _FIRST_TOKEN_BUCKETS,
        )
        self.next_token = self._histogram(
            "inter_token_latency_seconds", "Between a sequence's tokens.", model_name, _NEXT_TOKEN_BUCKETS
        )
        self.request = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its last token.", model_name, _REQUEST_BUCKETS
        )
        finished = Counter(
            "tenfold_request_success",
            "Completions that ended, by how: stop, length, abort (the client went away) or error (the engine died).",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._finished = {r: finished.labels(model_name, r) for r in ("stop", "length", "abort", "error")}

    def count_finished(self, reason: str) -> None:
        """Count a completion that ended."""
        self._finished[reason].inc()

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, model_name: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"tenfold_{name}", text, ("model_name",), registry=self._registry, buckets=buckets)
        return histogram.labels(model_name)


class _EngineCollector(Collector):
    """The engine's counters, read when they are asked for."""

    def __init__(self, model_name: str, engine: EngineProcess) -> None:
        self._model_name = model_name
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        for name, text, value in _gauges(stats):
            yield self._filled(GaugeMetricFamily(f"tenfold_{name}", text, labels=["model_name"]), value)
        yield self._filled(
            GaugeMetricFamily("tenfold_engine_healthy", "Alive and making progress.", labels=["model_name"]),
            float(self._engine.healthy),
        )
        counters = (*_counters(stats), ("engine_restarts", "Engines that died or stalled.", self._engine.restarts))
        for name, text, value in counters:
            yield self._filled(CounterMetricFamily(f"tenfold_{name}", text, labels=["model_name"]), value)

    def _filled(self, family: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        family.add_metric([self._model_name], value)
        return family


def _gauges(stats: EngineStats) -> tuple[tuple[str, str, float], ...]:
    return (
        ("num_requests_running", "Sequences in the running batch.", stats.running),
        ("num_requests_waiting", "Sequences in the queue.", stats.waiting),
        ("kv_cache_usage_perc", "Share of the cache's pages in use, from 0 to 1.", _share(stats)),
        ("kv_cache_pages_used", "Cache pages that sequences own.", stats.pages_used),
        ("kv_cache_pages", "Cache pages there are.", stats.pages_total),
    )


def _counters(stats: EngineStats) -> tuple[tuple[str, str, float], ...]:
    return (
        ("prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens),
        ("generation_tokens", "Tokens generated.", stats.generated_tokens),
        ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
        ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits),
        ("num_preemptions", "Sequences that gave their pages back and started over.", stats.preemptions),
        ("engine_steps", "Steps of the engine.", stats.steps),
        ("compilations_since_ready", "XLA compilations while serving; anything but 0 is a bug.", stats.compilations),
    )


def _share(stats: EngineStats) -> float:
    return stats.pages_used / stats.pages_total if stats.pages_total else 0.0


class RequestTimer:
    """Measures one prompt's latencies.

    Args:
        metrics: receives them.
        arrived: `time.perf_counter()` when the request came.
    """

    def __init__(self, metrics: Metrics, arrived: float) -> None:
        self._metrics = metrics
        self._arrived = arrived
        self._last: dict[int, float] = {}

    def tokens(self, index: int, count: int) -> None:
        """`count` more tokens of completion `index` have come, together."""
        now = time.perf_counter()
        last = self._last.get(index)
        self._last[index] = now
        if last is None:
            if len(self._last) == 1:
                self._metrics.first_token.observe(now - self._arrived)
            return
        for _ in range(count):
            self._metrics.next_token.observe((now - last) / count)

    def finished(self, reason: str) -> None:
        """A completion has ended."""
        self._metrics.request.observe(time.perf_counter() - self._arrived)
        self._metrics.count_finished(reason)
