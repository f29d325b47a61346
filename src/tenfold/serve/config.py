"""What the server is told when it starts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tenfold.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How one model is served.

    Attributes:
        model_names: ids that requests may ask for; responses carry the first.
        sampling_defaults: fields of SamplingParams for requests that leave them out, from the model's
            `generation_config.json`.
        api_keys: who may ask; with none, everyone.
        max_request_bytes: longest request body.
        max_pending: requests that may be in the server at once, in the engine's queue or before it; more are refused.
        shutdown_timeout_s: how long requests in flight may take to finish once the server is asked to stop.
        max_events_per_s: of all streams together. Tokens that a fast engine makes sooner share an event, because one
            per token would cost more than making the token, here and in the client. First and last events do not wait.
            None allows what is a small part of this machine's time, if the engine shares its cores, and else 2,000.
    """

    model_names: tuple[str, ...]
    sampling_defaults: Mapping[str, float | int] = field(default_factory=dict[str, float | int])
    api_keys: tuple[str, ...] = ()
    max_request_bytes: int = 16 * 2**20
    max_pending: int = 1056
    shutdown_timeout_s: float = 30.0
    max_events_per_s: float | None = None

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise ConfigError("a served model needs a name, and no name may be empty; check --served-model-name.")
        if not all(self.api_keys):
            raise ConfigError("an API key must not be empty; check --api-key and TENFOLD_API_KEY.")
        for name in ("max_request_bytes", "max_pending", "max_events_per_s"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ConfigError(f"{name} must be at least 1; it is {getattr(self, name)}.")
        if not self.shutdown_timeout_s >= 0:
            raise ConfigError(f"the shutdown timeout must not be negative; it is {self.shutdown_timeout_s}.")
