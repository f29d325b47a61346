"""`tenfold serve`: an OpenAI-compatible server for one model."""

from tenfold.cli import options
from tenfold.cli.options import GenerationConfig, LogLevel
from tenfold.engine.config import EngineConfig


def serve(
    model: options.Model = None,
    served_model_name: options.ServedModelName = None,
    tokenizer: options.Tokenizer = None,
    revision: options.Revision = None,
    chat_template: options.ChatTemplate = None,
    generation_config: options.Generation = GenerationConfig.AUTO,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    api_key: options.ApiKey = None,
    root_path: options.RootPath = "",
    ssl_keyfile: options.SslKeyfile = None,
    ssl_certfile: options.SslCertfile = None,
    max_request_bytes: options.MaxRequestBytes = "16MiB",
    shutdown_timeout: options.ShutdownTimeout = 30.0,
    disable_access_log: options.DisableAccessLog = False,
    uvicorn_log_level: options.UvicornLogLevel = LogLevel.INFO,
    log_level: options.Level = LogLevel.INFO,
    dtype: options.Dtype = EngineConfig.dtype,
    quantization: options.Quantization = EngineConfig.quantization,
    kv_cache_dtype: options.KvCacheDtype = EngineConfig.kv_cache_dtype,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = EngineConfig.max_num_seqs,
    max_num_batched_tokens: options.MaxNumBatchedTokens = str(EngineConfig.max_num_batched_tokens),
    block_size: options.BlockSize = EngineConfig.block_size,
    kv_cache_memory_bytes: options.KvCacheMemory = None,
    gpu_memory_utilization: options.MemoryUtilization = EngineConfig.memory_utilization,
    enable_prefix_caching: options.EnablePrefixCaching = EngineConfig.enable_prefix_caching,
    max_waiting: options.MaxWaiting = EngineConfig.max_waiting,
    seed: options.Seed = EngineConfig.seed,
) -> None:
    """Serve a model over the OpenAI API, until Ctrl-C.

    Options have vLLM's names where both have them. Without MODEL, the built-in model is served.
    """
    from tenfold.cli.launch import ModelChoice, configure_logging, serve_model
    from tenfold.cli.quantities import parse_bytes, parse_count
    from tenfold.serve.server import HttpOptions

    configure_logging(log_level, uvicorn_log_level)
    serve_model(
        ModelChoice(
            model=model,
            names=tuple(served_model_name or ()),
            tokenizer=tokenizer,
            revision=revision,
            chat_template=chat_template,
            own_sampling=generation_config is GenerationConfig.AUTO,
        ),
        EngineConfig(
            max_model_len=None if max_model_len is None else parse_count(max_model_len),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=parse_count(max_num_batched_tokens),
            block_size=block_size,
            cache_memory=None if kv_cache_memory_bytes is None else parse_bytes(kv_cache_memory_bytes),
            memory_utilization=gpu_memory_utilization,
            enable_prefix_caching=enable_prefix_caching,
            max_waiting=max_waiting,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            seed=seed,
        ),
        HttpOptions(
            host=host,
            port=port,
            root_path=root_path,
            ssl_keyfile=ssl_keyfile,
            ssl_certfile=ssl_certfile,
            access_log=not disable_access_log,
        ),
        api_keys=tuple(api_key or ()),
        max_request_bytes=parse_bytes(max_request_bytes),
        shutdown_timeout_s=shutdown_timeout,
    )
