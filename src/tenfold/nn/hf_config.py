"""Reading Hugging Face `config.json` fields, as written by transformers 4 and by transformers 5."""

from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.base.errors import ConfigError, UnsupportedModelError
from tenfold.nn import rope
from tenfold.nn.layers import activation
from tenfold.nn.rope import Rope

HFConfig = Mapping[str, Any]
LAYER_TYPES = ("full_attention", "sliding_attention")


def require(hf: HFConfig, key: str) -> Any:
    """The value of a key that a family cannot do without. Raises ConfigError when it is missing or null."""
    value = hf.get(key)
    if value is None:
        raise ConfigError(f"config.json has no {key!r}, which {hf.get('model_type', 'this model')} needs")
    return value


def head_dim(hf: HFConfig) -> int:
    """`head_dim`, or the width divided by the number of heads where the config leaves it out."""
    return int(hf.get("head_dim") or require(hf, "hidden_size") // require(hf, "num_attention_heads"))


def kv_heads(hf: HFConfig) -> int:
    """`num_key_value_heads`; absent means one per query head. Raises ConfigError unless they share them evenly."""
    heads = int(require(hf, "num_attention_heads"))
    shared = int(hf.get("num_key_value_heads") or heads)
    if heads % shared:
        raise ConfigError(f"config.json has {heads} attention heads, not a multiple of its {shared} key-value heads")
    return shared


def read_num_experts(hf: HFConfig, *keys: str, default: int) -> int:
    """How many experts a mixture has, by the first of `keys` that is set. Raises ConfigError for none."""
    key = next((key for key in keys if hf.get(key) is not None), keys[0])
    experts = int(default if hf.get(key) is None else hf[key])
    if experts < 1:
        raise ConfigError(f"config.json has {key}={experts}; a mixture needs experts")
    return experts


def read_top_k(hf: HFConfig, experts: int, *, default: int) -> int:
    """How many experts a token chooses. Raises ConfigError for more than there are, or none."""
    top_k = int(default if hf.get("num_experts_per_tok") is None else hf["num_experts_per_tok"])
    if not 0 < top_k <= experts:
        raise ConfigError(f"config.json has num_experts_per_tok={top_k} of {experts} experts")
    return top_k


def refuse(hf: HFConfig, **only: Any) -> None:
    """Raises UnsupportedModelError if a key has any value but the given one, null, or none at all.

    A checkpoint that asks for what a family does not implement must not load and answer wrongly.
    """
    for key, implemented in only.items():
        value = hf.get(key)
        if value is not None and value != implemented:
            but = "" if implemented is None else f"; only {implemented!r} is"
            model = hf.get("model_type", "this model")
            raise UnsupportedModelError(f"config.json sets {key}={value!r}, which is not implemented for {model}{but}")


def refuse_unknown_modes(hf: HFConfig, *, per_layer: bool = False) -> None:
    """Raises UnsupportedModelError for what a config may ask of any architecture and no family implements.

    `per_layer`: the family reads `per_layer_config`.
    """
    refuse(hf, is_encoder_decoder=False, add_cross_attention=False)
    if not per_layer:
        refuse(hf, per_layer_config=None)


def read_activation(hf: HFConfig, key: str = "hidden_act", *, default: str = "silu") -> str:
    """The name of the feed-forward's activation. Raises UnsupportedModelError for one that is not implemented."""
    name = str(hf.get(key) or default)
    activation(name)
    return name


def read_rope(hf: HFConfig, *, default_theta: float = 10_000.0, layer_type: str | None = None) -> Rope:
    """The rotary embedding of the model, or of one layer type where layers differ.

    transformers 5 writes `rope_parameters`, flat or keyed by layer type; transformers 4 writes `rope_theta`,
    `rope_scaling` and `partial_rotary_factor`.

    Raises:
        ConfigError: if both spellings scale, or `rope_parameters` are keyed by layer type where the family's layers
            share one rotation, or flat where they do not.
    """
    where, parameters = "rope_scaling", dict(hf.get("rope_scaling") or {})
    if hf.get("rope_parameters"):
        if parameters:
            raise ConfigError("config.json has both rope_parameters and rope_scaling: merge them into rope_parameters")
        where, parameters = _rope_parameters(hf["rope_parameters"], layer_type)
    if parameters.get("rope_theta") is None:
        parameters["rope_theta"] = hf.get("rope_theta") or default_theta
    if parameters.get("partial_rotary_factor") is None:
        parameters["partial_rotary_factor"] = hf.get("partial_rotary_factor")
    if hf.get("original_max_position_embeddings"):  # Phi-3 keeps it outside
        parameters["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
    max_len = require(hf, "max_position_embeddings")
    return rope.read(parameters, head_dim=head_dim(hf), max_len=max_len, where=where)


def _rope_parameters(given: Mapping[str, Any], layer_type: str | None) -> tuple[str, dict[str, Any]]:
    nested = any(key in LAYER_TYPES for key in given)
    if layer_type is None:
        if nested:
            raise ConfigError("rope_parameters are keyed by layer type, but this family's layers share one rotation")
        return "rope_parameters", dict(given)
    if not nested:
        raise ConfigError(f"rope_parameters must be keyed by layer type ({', '.join(LAYER_TYPES)}) for this family")
    return f"rope_parameters.{layer_type}", dict(given.get(layer_type) or {})


def read_sliding_rope(hf: HFConfig, *, theta_key: str, default_theta: float) -> Rope:
    """The rotary embedding of the sliding layers where it is not that of the full ones.

    transformers 4 writes its base as `theta_key`, and means `rope_scaling` for the full layers alone.
    """
    own = {**hf, "rope_scaling": None, "rope_theta": hf.get(theta_key)}
    return read_rope(own, default_theta=default_theta, layer_type="sliding_attention")


def read_layer_types(hf: HFConfig, *, period: int, num_layers: int) -> tuple[str, ...]:
    """ "full_attention" or "sliding_attention" for each layer.

    `layer_types` says so outright; older configs have `sliding_window_pattern`, and the oldest nothing: then every
    `period`-th layer attends to everything.
    """
    types = read_given_layer_types(hf, num_layers)
    if types is not None:
        return types
    pattern = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or period
    return tuple("sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(num_layers))


def read_given_layer_types(hf: HFConfig, num_layers: int, known: Sequence[str] = LAYER_TYPES) -> tuple[str, ...] | None:
    """What `layer_types` says for each layer, one of `known`, or None where the config has none."""
    if not hf.get("layer_types"):
        return None
    types = tuple(hf["layer_types"])
    unknown = sorted(set(types) - set(known))
    if unknown:
        raise UnsupportedModelError(f"config.json has layer types {unknown}; implemented: {', '.join(known)}")
    if len(types) != num_layers:
        raise ConfigError(f"config.json lists {len(types)} layer_types for {num_layers} layers")
    return types


def read_windows(layer_types: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """The window of each layer: `window` where it is "sliding_attention", None where it sees everything.

    Raises ConfigError when there is a sliding layer and no window.
    """
    if window is None and "sliding_attention" in layer_types:
        raise ConfigError("config.json has sliding_attention layers but no sliding_window for them (or disables it)")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def read_hybrid_types(
    hf: HFConfig, num_layers: int, known: Sequence[str] = ("full_attention", "linear_attention")
) -> tuple[str, ...] | None:
    """What `layer_types`, or `layers_block_type`, says for each layer of a hybrid; None where the config has neither.

    transformers 4 writes "attention" and "mamba" for the first two of `known`.
    """
    types = hf.get("layer_types") or hf.get("layers_block_type")
    older = {"attention": "full_attention", "mamba": "linear_attention"}
    return read_given_layer_types({"layer_types": [older.get(kind, kind) for kind in types or ()]}, num_layers, known)


def read_mamba_head_dim(hf: HFConfig, inner: int, heads: int) -> int:
    """`mamba_d_head`, by default ("auto") the heads' share of the inner width. Raises ConfigError unless it is."""
    given = hf.get("mamba_d_head")
    dim = inner // heads if given in (None, "auto") else int(given)
    if dim * heads != inner:
        raise ConfigError(f"config.json has {heads} mamba_n_heads of {dim} for an inner width of {inner}")
    return dim


def read_time_step_limits(hf: HFConfig) -> tuple[float, float]:
    """What the time steps of a state space model are clipped to."""
    low, high = hf.get("time_step_limit") or (0.0, float("inf"))
    return float(low), float(high)


def read_cache_sources(layer_types: Sequence[str], num_shared: int) -> tuple[int | None, ...]:
    """For each of the last `num_shared` layers the one whose keys and values it reads: the last one before them that is
    of its type. None for the others.

    Raises ConfigError if there is no such layer.
    """
    own = max(0, len(layer_types) - num_shared)
    last = {kind: i for i, kind in enumerate(layer_types[:own])}
    for kind in layer_types[own:]:
        if kind not in last:
            raise ConfigError(f"config.json has num_kv_shared_layers={num_shared}, but no {kind} layer before those")
    return (*(None for _ in range(own)), *(last[kind] for kind in layer_types[own:]))
