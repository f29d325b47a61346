"""How an engine is sized. Names are vLLM's where it has them."""

from dataclasses import dataclass

from tenfold.base.errors import ConfigError

KV_CACHE_DTYPES = {"auto": None, "int8": "int8", "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes of one engine.

    Attributes:
        max_model_len: longest sequence, prompt and output together; None takes the model's own, bounded so that the
            cache holds at least one such sequence.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: token budget of a step; longer prompts are computed in chunks of it.
        block_size: tokens of a cache page.
        cache_memory: bytes of the paged cache; None takes `memory_utilization` of what the device has left.
        memory_utilization: share of the device's memory for weights and cache together.
        enable_prefix_caching: keep and reuse pages of earlier prompts with the same beginning.
        state_interval: recurrent layers keep the state after every so many tokens of a prompt, rounded up to whole
            pages: what a prompt with the same beginning can start from.
        decode_slowdown: a step that also computes part of a prompt may take this many times as long as its decodes
            alone; inf lets prompts take the whole budget.
        max_waiting: sequences that may wait for a slot; more are refused.
        dtype: "auto" computes in the fastest type at the checkpoint's precision on this device.
        quantization: "int8" or "int4" rounds the weights when they are loaded; None takes them as they are.
        kv_cache_dtype: "auto" holds keys and values in the type that is computed in; "int8" and "fp8" ("fp8_e4m3") in 8
            bits with a scale for each token and head.
        seed: of the seeds drawn for requests that bring none.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    block_size: int = 32
    cache_memory: int | None = None
    memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    state_interval: int = 512
    decode_slowdown: float = 1.75
    max_waiting: int = 1024
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "state_interval", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; it is {getattr(self, name)}.")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"max_model_len must be at least 2; it is {self.max_model_len}.")
        if not self.decode_slowdown > 1:
            raise ConfigError(f"decode_slowdown must be above 1; it is {self.decode_slowdown}.")
        if not 0 < self.memory_utilization <= 1:
            raise ConfigError(f"memory_utilization is a share, above 0 and at most 1; it is {self.memory_utilization}.")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(
                f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}; it is {self.kv_cache_dtype!r}."
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running sequence takes a token a step."
            )
