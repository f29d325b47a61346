"""Token sampling and logprobs on the device, for a batch that mixes every kind of request.

One compiled program serves all requests of a batch size: what a row asks for is data, and each costly part sits
behind a `lax.cond` on "does any row want it", so an all-greedy batch pays for an argmax and nothing else.

The order of operations is vLLM V1's: bias, repetition penalty, frequency and presence penalties; then, for rows that
are not greedy, temperature, min-p, top-k, top-p and one draw.

**A row's result depends on that row's inputs alone, bit for bit**, whatever the batch holds and however large it is:
- every sum over the vocabulary is a sum of integers (likelihoods in fixed point, see `_Mass`), and every count is a
  float32 below 2**24, so both are exact and the order in which a compiler adds them cannot matter;
- everything else is element by element, or a maximum;
- where two algorithms can give an answer, the row's own data picks the one that is used.

The draw is the Gumbel-max trick in its exponential form: of the kept tokens, the one with the largest p / E wins,
where E is exponential noise (log p - log E is log p plus Gumbel noise). The noise of a token is a pure function of
(seed, position, token id): the 64 bits of `fold_in(fold_in(key(seed), position), token id)` under threefry2x32, read
as a binary fraction u in (0, 1), give E = -log1p(-u). Winners have small E, hence small u, and that is where this form
is finest: 24 significant bits down to 2**-64. Noise by token id lets a row draw from a few candidates and get the very
token that it would get from the whole vocabulary.

Logits are made total first: NaN counts as -inf and +inf as the largest finite float32. A row whose every logit is
-inf yields token 0.

Dims: S rows (sequences that sample), V vocabulary, B bias entries, N history slots, T history length, K candidates,
k logprobs; R and L are the vocabulary folded into R rows of L lanes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy (vLLM's epsilon)."""

_LANES = 128
_HISTORY_CHUNK = 512
_INT32_MAX = np.int32(2**31 - 1)
_FLOAT32_MAX = np.finfo(np.float32).max
_FLOAT32_TINY = np.finfo(np.float32).tiny


class SamplingBatch(NamedTuple):
    """What each row wants, one row per sequence that samples a token in this step.

    A row of padding is greedy with everything off: all zeros but `top_p` 1, `repetition_penalty` 1, `bias_ids` -1.
    """

    temperature: Float[Array, " S"]
    """Divides the logits; below `GREEDY_BELOW` the row is greedy and ignores min-p, top-k, top-p and its seed."""
    top_p: Float[Array, " S"]
    """Keep the smallest set of likeliest tokens whose mass reaches this (ties: lower ids first); 1 = off."""
    min_p: Float[Array, " S"]
    """Keep tokens at least this many times as likely as the likeliest; 0 = off."""
    repetition_penalty: Float[Array, " S"]
    """Positive logits are divided and others multiplied by it for tokens of the prompt or output; 1 = off."""
    presence_penalty: Float[Array, " S"]
    """Subtracted from the logit of each token in the output; 0 = off."""
    frequency_penalty: Float[Array, " S"]
    """Subtracted once for each time that the token is in the output; 0 = off."""
    top_k: Int[Array, " S"]
    """Keep the k largest logits and all that equal the k-th; 0 or less, or V or more = off."""
    seed: UInt[Array, "S 2"]
    """Words of the row's threefry key."""
    position: Int[Array, " S"]
    """Index, in its sequence, of the token being sampled."""
    slot: Int[Array, " S"]
    """The row's row of the history."""
    prompt_length: Int[Array, " S"]
    """Tokens of the prompt, which come first in the history."""
    length: Int[Array, " S"]
    """Tokens known: prompt and output. The history beyond is ignored."""
    bias_ids: Int[Array, "S B"]
    """Tokens whose logits get a bias; -1 (or any id outside the vocabulary) marks an empty entry."""
    bias_values: Float[Array, "S B"]
    """The biases. -inf forbids a token; entries for one token add up, in order of their columns."""


def sample(
    logits: Float[Array, "S V"],
    batch: SamplingBatch,
    history: Int[Array, "N T"],
    *,
    candidates: int = 128,
) -> Int[Array, " S"]:
    """Choose the next token of each row.

    Args:
        logits: the model's, of any scale; computed with in float32.
        batch: what each row asks for.
        history: token ids by slot, read only for rows with a penalty. Ids outside the vocabulary are skipped.
        candidates: how many of the largest logits to extract (static). A row whose kept tokens lie among them never
            searches the vocabulary. Use 0 where extraction (`lax.top_k`) is slower than the search.

    Returns: token ids, int32.
    """
    logits = logits.astype(jnp.float32)
    is_random = jnp.any(_is_random(batch))
    biased = jnp.any(_has_bias(batch, logits.shape[1]))
    penalised = jnp.any(_is_penalised(batch))

    def process() -> Int[Array, " S"]:
        adjusted = _adjust(logits, batch, history, biased, penalised)
        greedy = _first_largest(adjusted)
        return lax.cond(is_random, lambda: _draw(adjusted, greedy, batch, candidates), lambda: greedy)

    return lax.cond(is_random | biased | penalised, process, lambda: _first_largest(_make_total(logits)))


def logprobs(
    logits: Float[Array, "S V"], tokens: Int[Array, " S"], *, k: int
) -> tuple[Float[Array, " S"], Int[Array, " S"], Int[Array, "S k"], Float[Array, "S k"]]:
    """Log-probabilities of the model itself, before temperature, penalties and bias (vLLM's `raw_logprobs`).

    Args:
        logits: as the model gave them.
        tokens: one id per row.
        k: how many of the likeliest tokens to report (static, at most V; 0 gives empty arrays).

    Returns: the token's logprob; its rank, 1-based, the number of tokens at least as likely (so ties rank last, as in
        vLLM); the ids of the k likeliest tokens, likeliest first and lower ids first among equals; their logprobs.
    """
    logits = _make_total(logits.astype(jnp.float32))
    peak = jnp.maximum(jnp.max(logits, axis=1), -_FLOAT32_MAX)
    mass = _Mass.of(jnp.exp(logits - peak[:, None])).total()
    log_mass = jnp.log(jnp.maximum(mass, 1))  # the likeliest token alone has mass 1, unless every logit is -inf
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1, mode="clip")
    rank = jnp.sum(_ones(logits >= chosen), axis=1).astype(jnp.int32)
    top, top_ids = lax.top_k(logits, k)
    return (
        chosen[:, 0] - peak - log_mass,
        rank,
        top_ids.astype(jnp.int32),
        top - peak[:, None] - log_mass[:, None],
    )


# --- bias and penalties ---------------------------------------------------------------------------------------------


def _adjust(
    logits: Float[Array, "S V"],
    batch: SamplingBatch,
    history: Int[Array, "N T"],
    biased: Bool[Array, ""],
    penalised: Bool[Array, ""],
) -> Float[Array, "S V"]:
    """Apply bias and penalties, which change what a greedy row chooses too. Logits are total before and after.

    Starting from a fresh array lets XLA change it in place: a branch that hands back its operand, or scatters into it,
    would otherwise cost a copy of the model's logits, taken whether or not the branch runs.
    """
    logits = _make_total(logits)
    if batch.bias_ids.shape[1] > 0:
        logits = lax.cond(biased, lambda logits: _add_bias(logits, batch), lambda logits: logits, logits)
    return lax.cond(penalised, lambda logits: _penalise(logits, batch, history), lambda logits: logits, logits)


def _is_penalised(batch: SamplingBatch) -> Bool[Array, " S"]:
    return (batch.repetition_penalty != 1) | (batch.presence_penalty != 0) | (batch.frequency_penalty != 0)


def _has_bias(batch: SamplingBatch, vocab: int) -> Bool[Array, "S B"]:
    return (batch.bias_ids >= 0) & (batch.bias_ids < vocab)


def _add_bias(logits: Float[Array, "S V"], batch: SamplingBatch) -> Float[Array, "S V"]:
    """Add the biases. Entries for one token are summed column by column first, and each of them then writes the same
    sum: a scatter-add would add in an order that is not fixed on every platform."""
    ids, valid = batch.bias_ids, _has_bias(batch, logits.shape[1])
    values = jnp.where(valid, batch.bias_values, 0)
    columns = jnp.max(jnp.where(valid, lax.broadcasted_iota(jnp.int32, ids.shape, 1) + 1, 0))

    def add_column(column: Int[Array, ""], totals: Float[Array, "S B"]) -> Float[Array, "S B"]:
        column_ids = lax.dynamic_index_in_dim(ids, column, axis=1)
        return totals + jnp.where(ids == column_ids, lax.dynamic_index_in_dim(values, column, axis=1), 0)

    totals = lax.fori_loop(0, columns, add_column, jnp.zeros_like(values))
    updated = _make_total(jnp.take_along_axis(logits, ids, axis=1, mode="clip") + totals)
    rows = lax.broadcasted_iota(jnp.int32, ids.shape, 0)
    return logits.at[rows, jnp.where(valid, ids, logits.shape[1])].set(updated, mode="drop")


def _penalise(logits: Float[Array, "S V"], batch: SamplingBatch, history: Int[Array, "N T"]) -> Float[Array, "S V"]:
    """Repetition penalty (Keskar et al. 2019, CTRL, section 4.1), then OpenAI's frequency and presence penalties.

    Rows that are not penalised are counted as empty, and pass through unchanged.
    """
    length = jnp.where(_is_penalised(batch), jnp.minimum(batch.length, history.shape[1]), 0)
    in_prompt, in_output = _count_tokens(history, batch._replace(length=length), logits.shape[1])
    repetition = batch.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(in_prompt + in_output > 0, repeated, logits)
    logits = logits - batch.frequency_penalty[:, None] * in_output.astype(jnp.float32)
    return _make_total(logits - jnp.where(in_output > 0, batch.presence_penalty[:, None], 0))


def _count_tokens(
    history: Int[Array, "N T"], batch: SamplingBatch, vocab: int
) -> tuple[Int[Array, "S V"], Int[Array, "S V"]]:
    """How often each token stands in the prompt and in the output. Costs the longest length, not the history's T."""
    rows = batch.slot.shape[0]
    row = lax.broadcasted_iota(jnp.int32, (rows, _HISTORY_CHUNK), 0)
    offset = lax.broadcasted_iota(jnp.int32, (rows, _HISTORY_CHUNK), 1)
    longest = jnp.max(batch.length)

    def count_chunk(state: tuple[Array, Array]) -> tuple[Array, Array]:
        start, counts = state
        position = start + offset
        tokens = history.at[batch.slot[:, None], position].get(mode="clip")
        known = (position < batch.length[:, None]) & (tokens >= 0)
        is_output = (position >= batch.prompt_length[:, None]).astype(jnp.int32)
        counts = counts.at[is_output, row, jnp.where(known, tokens, vocab)].add(1, mode="drop")
        return start + _HISTORY_CHUNK, counts

    start = (jnp.int32(0), jnp.zeros((2, rows, vocab), jnp.int32))
    counts = lax.while_loop(lambda state: state[0] < longest, count_chunk, start)[1]
    return counts[0], counts[1]


# --- the draw -------------------------------------------------------------------------------------------------------


def _is_random(batch: SamplingBatch) -> Bool[Array, " S"]:
    return batch.temperature >= GREEDY_BELOW


def _is_filtered(batch: SamplingBatch, vocab: int) -> Bool[Array, " S"]:
    return _is_random(batch) & ((_effective_top_k(batch, vocab) < vocab) | (batch.top_p < 1) | (batch.min_p > 0))


def _effective_top_k(batch: SamplingBatch, vocab: int) -> Int[Array, " S"]:
    return jnp.where((batch.top_k > 0) & (batch.top_k < vocab), batch.top_k, vocab)


def _draw(
    logits: Float[Array, "S V"], greedy: Int[Array, " S"], batch: SamplingBatch, candidates: int
) -> Int[Array, " S"]:
    """Draw for the rows that are not greedy: those without filters from the whole vocabulary; those with, from
    candidates where they suffice, else after a search for each filter's threshold."""
    vocab = logits.shape[1]
    scaled = _scale(logits, batch)
    filtered = _is_filtered(batch, vocab)
    unfiltered = _is_random(batch) & ~filtered

    def draw_unfiltered() -> Int[Array, " S"]:
        return jnp.where(unfiltered, _race(jnp.exp(scaled), batch), greedy)

    def draw_from_candidates() -> tuple[Int[Array, " S"], Bool[Array, " S"]]:
        likelihood, ids, sufficed = filter_candidates(scaled, batch, width=min(candidates, vocab))
        return jnp.where(filtered, _race(likelihood, batch, ids), tokens), filtered & ~sufficed

    tokens = lax.cond(jnp.any(unfiltered), draw_unfiltered, lambda: greedy)
    if candidates > 0:
        tokens, filtered = lax.cond(jnp.any(filtered), draw_from_candidates, lambda: (tokens, filtered))
    return lax.cond(jnp.any(filtered), lambda: _draw_by_search(scaled, batch, tokens, filtered), lambda: tokens)


def _draw_by_search(
    scaled: Float[Array, "S V"], batch: SamplingBatch, tokens: Int[Array, " S"], wanted: Bool[Array, " S"]
) -> Int[Array, " S"]:
    """Replace the tokens of the rows that are `wanted`."""

    def each_row() -> Int[Array, " S"]:
        def draw(row: Int[Array, ""]) -> Int[Array, ""]:
            alone, request = jax.tree.map(lambda values: lax.dynamic_slice_in_dim(values, row, 1), (scaled, batch))
            return _race(filter_vocabulary(alone, request), request)[0]

        def visit(row: Int[Array, ""]) -> Int[Array, ""]:
            return lax.cond(wanted[row], lambda: draw(row), lambda: tokens[row])

        return lax.map(visit, jnp.arange(tokens.shape[0], dtype=jnp.int32))

    def all_rows() -> Int[Array, " S"]:
        return jnp.where(wanted, _race(filter_vocabulary(scaled, batch), batch), tokens)

    # Few rows search, and a CPU keeps one row in its cache; elsewhere a launch costs more than a row.
    return lax.platform_dependent(cpu=each_row, default=all_rows)


def _scale(logits: Float[Array, "S V"], batch: SamplingBatch) -> Float[Array, "S V"]:
    """Logits over temperature, less the largest: at most 0. Subtracting first keeps low temperatures from overflowing.
    The peak is kept finite, so that a row of -inf gives no NaN; subnormals become 0, as in `_make_total`."""
    peak = jnp.maximum(jnp.max(logits, axis=1), -_FLOAT32_MAX)
    temperature = jnp.where(_is_random(batch), jnp.minimum(batch.temperature, _FLOAT32_MAX), 1)
    scaled = (logits - peak[:, None]) / temperature[:, None]
    return jnp.where(scaled > -_FLOAT32_TINY, 0, scaled)


def _race(
    likelihood: Float[Array, "S X"], batch: SamplingBatch, ids: Int[Array, "S X"] | None = None
) -> Int[Array, " S"]:
    """Draw a token in proportion to its likelihood, which need not be normalised (see the module's docstring).

    Args:
        likelihood: 0 for tokens that must not win.
        batch: gives the seed and position.
        ids: the token of each likelihood; the whole vocabulary in order where None.
    """
    if ids is None:
        ids = lax.broadcasted_iota(jnp.int32, likelihood.shape, 1)
    keys = jax.random.wrap_key_data(batch.seed, impl="threefry2x32")
    keys = jax.random.key_data(jax.vmap(jax.random.fold_in)(keys, batch.position.astype(jnp.uint32)))
    first, second = _threefry2x32(keys, ids.astype(jnp.uint32))
    uniform = first.astype(jnp.float32) * 2.0**-32 + second.astype(jnp.float32) * 2.0**-64
    noise = -jnp.log1p(-jnp.clip(uniform, 2.0**-65, 1 - 2.0**-24))
    scores = likelihood / noise
    best = jnp.max(scores, axis=1, keepdims=True)
    return jnp.min(jnp.where(scores == best, ids, jnp.int32(2**31 - 1)), axis=1)


def _threefry2x32(
    keys: UInt[Array, "S 2"], counters: UInt[Array, "S X"]
) -> tuple[UInt[Array, "S X"], UInt[Array, "S X"]]:
    """`key_data(fold_in(key, counter))` for each row's key and each counter: Threefry-2x32 with 20 rounds (Salmon et
    al. 2011) of the block (0, counter). Written out so that the compiler fuses it with what uses the bits."""
    words = keys[:, 0][:, None], keys[:, 1][:, None]
    schedule = (*words, words[0] ^ words[1] ^ jnp.uint32(0x1BD11BDA))
    first, second = jnp.broadcast_to(schedule[0], counters.shape), counters + schedule[1]
    for block in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
            first = first + second
            second = ((second << rotation) | (second >> (32 - rotation))) ^ first
        first = first + schedule[(block + 1) % 3]
        second = second + schedule[(block + 2) % 3] + jnp.uint32(block + 1)
    return first, second


def filter_candidates(
    scaled: Float[Array, "S V"], batch: SamplingBatch, *, width: int
) -> tuple[Float[Array, "S K"], Int[Array, "S K"], Bool[Array, " S"]]:
    """Apply min-p, top-k and top-p to the `width` largest logits, for rows whose kept tokens all lie among them.

    Args:
        scaled: logits over temperature, less the row's largest.
        batch: what each row asks for.
        width: K, static, at most V.

    Returns: likelihoods relative to the largest, 0 for tokens that the filters drop; the candidates' ids; and whether
        the candidates sufficed. Where they did not, the row's likelihoods are meaningless.
    """
    vocab = scaled.shape[1]
    values, ids = lax.top_k(scaled, width)
    likelihood = jnp.exp(values)
    top_k = _effective_top_k(batch, vocab)
    kth = jnp.take_along_axis(values, jnp.minimum(top_k, width)[:, None] - 1, axis=1)
    in_top_k = (values >= kth) | (top_k > width)[:, None]
    likelihood = jnp.where(in_top_k, _apply_min_p(likelihood, batch), 0)

    # Candidates come in descending order, so a set that leaves the last one out has no member beyond it.
    everything = width == vocab
    closed = everything | (likelihood[:, -1] == 0)
    needs_full_mass = ~closed & (top_k == vocab) & (batch.top_p < 1)
    running = _Mass.of(likelihood, lanes=1).running_total()
    full = lax.cond(
        jnp.any(needs_full_mass),
        lambda: _Mass.of(_apply_min_p(jnp.exp(scaled), batch)).total(),
        lambda: running[:, -1],
    )
    target = batch.top_p * jnp.where(needs_full_mass, full, running[:, -1])
    before = jnp.pad(running[:, :-1], ((0, 0), (1, 0)))
    is_first = lax.broadcasted_iota(jnp.int32, ids.shape, 1) == 0
    in_top_p = is_first | (before < target[:, None]) | (batch.top_p >= 1)[:, None]
    likelihood = jnp.where(in_top_p, likelihood, 0)
    sufficed = (closed | (top_k == vocab)) & (everything | (likelihood[:, -1] == 0))
    return likelihood, ids, sufficed


def _apply_min_p(likelihood: Float[Array, "S X"], batch: SamplingBatch) -> Float[Array, "S X"]:
    """Likelihoods are relative to the largest, which is 1 and always stays."""
    return jnp.where(likelihood >= jnp.minimum(batch.min_p, 1)[:, None], likelihood, 0)


# --- threshold search -----------------------------------------------------------------------------------------------


def filter_vocabulary(scaled: Float[Array, "S V"], batch: SamplingBatch) -> Float[Array, "S V"]:
    """Apply min-p, top-k and top-p to the whole vocabulary, bisecting for the thresholds with no sort.

    Takes what `filter_candidates` takes and returns its likelihoods, for all V tokens in order and for every row.

    Thresholds are bits of -scaled, which are integers in its order. Each pass reads the vocabulary once, and at most 31
    passes settle a threshold.
    """
    rows, vocab = scaled.shape
    distance = _fold(_distance(scaled), _INT32_MAX)
    farthest = jnp.full((rows,), _distance(jnp.float32(-jnp.inf)))
    likelihood = _fold(_apply_min_p(jnp.exp(scaled), batch), 0)

    top_k = _effective_top_k(batch, vocab)
    top_k_boundary = _bisect(
        lambda limit: _compare(_count(distance <= limit[:, None, None]), top_k),
        jnp.where(top_k < vocab, -1, farthest - 1),
        farthest,
    )
    likelihood = jnp.where(distance <= top_k_boundary[:, None, None], likelihood, 0)

    mass = _Mass.of_folded(likelihood)
    target = batch.top_p * mass.total()
    boundary = _bisect(
        lambda limit: (mass.total(distance <= limit[:, None, None]) >= target, jnp.zeros((rows,), jnp.bool_)),
        jnp.where(batch.top_p < 1, -1, top_k_boundary - 1),
        top_k_boundary,
    )

    # Of the tokens at the boundary, top-p needs only so many, lower ids first.
    tied = distance == boundary[:, None, None]
    tie_likelihood = jnp.max(jnp.where(tied, likelihood, _FLOAT32_TINY), axis=(1, 2))
    missing = target - mass.total(distance < boundary[:, None, None])
    needed = jnp.clip(jnp.ceil(missing / tie_likelihood), 1, vocab).astype(jnp.int32)
    ids = _fold(lax.broadcasted_iota(jnp.int32, scaled.shape, 1), _INT32_MAX)
    last_tie = _bisect(
        lambda limit: _compare(_count(tied & (ids <= limit[:, None, None])), needed),
        jnp.where((batch.top_p < 1) & (needed < _count(tied)), -1, vocab - 2),
        jnp.full((rows,), vocab - 1, jnp.int32),
    )
    kept = (distance < boundary[:, None, None]) | (tied & (ids <= last_tie[:, None, None]))
    return jnp.where(kept, likelihood, 0).reshape(rows, -1)[:, :vocab]


def _bisect(
    holds: Callable[[Int[Array, " S"]], tuple[Bool[Array, " S"], Bool[Array, " S"]]],
    low: Int[Array, " S"],
    high: Int[Array, " S"],
) -> Int[Array, " S"]:
    """The smallest integer above `low`, at most `high`, for which `holds`, per row.

    `holds` must be monotone, and true at `high`. Its second result stops a row early: the limit just tried is as good
    as the smallest. A row where low is high - 1 is settled from the start, and a settled row never changes.
    """

    def halve(state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = state
        middle = low + ((high - low) >> 1)
        held, stop = holds(middle)
        active = low + 1 < high
        low = jnp.where(active & stop, middle - 1, jnp.where(active & ~held, middle, low))
        return low, jnp.where(active & held, middle, high)

    return lax.while_loop(lambda state: jnp.any(state[0] + 1 < state[1]), halve, (low, high))[1]


def _compare(count: Int[Array, " S"], wanted: Int[Array, " S"]) -> tuple[Bool[Array, " S"], Bool[Array, " S"]]:
    """For `_bisect`: a limit that takes in exactly as many as wanted is as good as the smallest that does."""
    return count >= wanted, count == wanted


def _count(mask: Bool[Array, "S R L"]) -> Int[Array, " S"]:
    return jnp.sum(_ones(mask), axis=(1, 2)).astype(jnp.int32)


def _distance(scaled: Float[Array, "*X"]) -> Int[Array, "*X"]:
    """The bits of -scaled: non-negative integers, 0 for the likeliest token and more for less likely ones."""
    return lax.bitcast_convert_type(jnp.abs(scaled), jnp.int32)


class _Mass(NamedTuple):
    """Likelihoods in [0, 1] as fixed-point numbers of two int32 words, whose sums are exact in any order.

    At V = 262,144 a likelihood keeps 38 bits after the point, so what a sum loses by truncation stays under 2**-20 of
    the likeliest token's share. Words are narrow enough that a column of R of them cannot overflow.
    """

    high: Int[Array, "S R L"]
    low: Int[Array, "S R L"]

    @staticmethod
    def of(likelihood: Float[Array, "S X"], lanes: int = _LANES) -> "_Mass":
        return _Mass.of_folded(_fold(likelihood, 0, lanes))

    @staticmethod
    def of_folded(likelihood: Float[Array, "S R L"]) -> "_Mass":
        unit = 2.0 ** _word_bits(likelihood.shape[1])
        scaled = likelihood * unit
        high = scaled.astype(jnp.int32)
        return _Mass(high, ((scaled - high.astype(jnp.float32)) * unit).astype(jnp.int32))

    def total(self, mask: Bool[Array, "S R L"] | None = None) -> Float[Array, " S"]:
        """The sum of the numbers that the mask selects, rounded to float32 at the very end."""

        def add(words: Int[Array, "S R L"]) -> Float[Array, " S"]:
            columns = jnp.sum(words if mask is None else jnp.where(mask, words, 0), axis=1, dtype=jnp.int32)
            upper = jnp.sum(columns >> 15, axis=1, dtype=jnp.int32).astype(jnp.float32)
            lower = jnp.sum(columns & 0x7FFF, axis=1, dtype=jnp.int32).astype(jnp.float32)
            return upper * 2.0**15 + lower

        return self._join(add(self.high), add(self.low))

    def running_total(self) -> Float[Array, "S R"]:
        """The sums of the first 1, 2, ... R numbers, for a single lane."""
        return self._join(*(jnp.cumsum(words[:, :, 0], axis=1, dtype=jnp.int32).astype(jnp.float32) for words in self))

    def _join(self, high: Float[Array, "..."], low: Float[Array, "..."]) -> Float[Array, "..."]:
        unit = 2.0 ** -_word_bits(self.high.shape[1])
        return high * unit + low * (unit * unit)


def _word_bits(terms: int) -> int:
    """The widest word, at most a float32's precision, of which so many add up to less than 2**31."""
    return min(23, 31 - terms.bit_length())


def _fold(values: Array, fill: int | np.int32, lanes: int = _LANES) -> Array:
    """Reshape [S, V] to [S, R, L], padded with `fill`. A sum over R then runs in L parallel lanes."""
    rows, vocab = values.shape
    padded = jnp.pad(values, ((0, 0), (0, -vocab % lanes)), constant_values=fill)
    return padded.reshape(rows, -1, lanes)


def _make_total(logits: Float[Array, "S V"]) -> Float[Array, "S V"]:
    """Leave only comparable values: NaN becomes -inf, +inf the largest float, and subnormals and -0 become 0 (whether
    a subnormal equals 0 depends on the processor's mode)."""
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, jnp.minimum(logits, _FLOAT32_MAX))
    return jnp.where(jnp.abs(logits) < _FLOAT32_TINY, 0, logits)


def _first_largest(scores: Float[Array, "S V"]) -> Int[Array, " S"]:
    """Argmax, lowest id among equals, as two plain reductions: on a CPU these vectorise and XLA's argmax does not."""
    ids = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    largest = jnp.max(scores, axis=1, keepdims=True)
    return jnp.min(jnp.where(scores == largest, ids, scores.shape[1] - 1), axis=1)


def _ones(mask: Bool[Array, "*X"]) -> Float[Array, "*X"]:
    """1 where true, as float32: sums of these are exact below 2**24, and faster on a CPU than sums of integers."""
    return jnp.where(mask, jnp.float32(1), jnp.float32(0))
