"""Sampling against a float64 oracle that sorts, batch invariance bit for bit, and the distribution of the draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tenfold.kernels.sampling import SamplingBatch, filter_candidates, filter_vocabulary, logprobs, sample

ROWS, VOCAB, WIDTH = 16, 300, 24
SLOTS, HISTORY = 4, 1100
SEEDS = st.integers(0, 2**32 - 1)

# --- reference ------------------------------------------------------------------------------------------------------


def reference_threefry2x32(key, counter):
    """Threefry-2x32 with 20 rounds, from the paper (Salmon et al. 2011): two uint32 words each way."""

    def rotate(x, by):
        return (x << np.uint32(by)) | (x >> np.uint32(32 - by))

    with np.errstate(over="ignore"):
        k = [np.uint32(key[0]), np.uint32(key[1])]
        k.append(k[0] ^ k[1] ^ np.uint32(0x1BD11BDA))
        x = [np.asarray(counter[0], np.uint32) + k[0], np.asarray(counter[1], np.uint32) + k[1]]
        for i in range(20):
            x[0] = x[0] + x[1]
            x[1] = rotate(x[1], (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]) ^ x[0]
            if i % 4 == 3:
                j = i // 4 + 1
                x = [x[0] + k[j % 3], x[1] + k[(j + 1) % 3] + np.uint32(j)]
    return x


def reference_noise(seed, position, vocab):
    """Exponential noise of every token: -log(1 - u), u the binary fraction of the 64 bits."""
    key = reference_threefry2x32(seed, (0, position))
    high, low = reference_threefry2x32(key, (np.zeros(vocab), np.arange(vocab)))
    return -np.log1p(-(high.astype(np.float64) * 2.0**-32 + low * 2.0**-64))


def reference_adjust(logits, row, history):
    """Bias, then repetition, frequency and presence penalties, of one row in float64."""
    logits = logits.astype(np.float64)
    for token, value in zip(row.bias_ids, row.bias_values, strict=True):
        if token >= 0:
            logits[token] += value
    known = history[row.slot][: row.length]
    output = known[row.prompt_length :]
    for token in set(known.tolist()):
        logits[token] = (
            logits[token] / row.repetition_penalty if logits[token] > 0 else logits[token] * row.repetition_penalty
        )
    for token in set(output.tolist()):
        logits[token] -= row.frequency_penalty * (output == token).sum() + row.presence_penalty
    return logits


def reference_scale(logits, temperature):
    """In float32, in the order that the operation documents, so that both sides see the same ties."""
    return ((logits - logits.max()) / np.float32(temperature)).astype(np.float32)


def reference_keep(scaled, row):
    """The tokens that min-p, top-k and top-p keep, by sorting; and how near each threshold was to going otherwise."""
    vocab = scaled.size
    likelihood = np.exp(scaled.astype(np.float64))
    keep = likelihood >= row.min_p
    margin = np.min(np.abs(likelihood - row.min_p)) if row.min_p not in (0, 1) else 1.0
    if 0 < row.top_k < vocab:
        keep &= scaled >= np.sort(scaled)[-row.top_k]
    if row.top_p < 1:
        order = np.lexsort((np.arange(vocab), -scaled))
        mass = np.where(keep, likelihood, 0)[order]
        before = (np.cumsum(mass) - mass) / mass.sum()
        first_out = max(1, np.searchsorted(before, row.top_p))
        keep[order[first_out:]] = False
        margin = min(margin, np.min(np.abs(before[1:] - row.top_p)))
    return keep, margin


def reference_sample(logits, row, history):
    """The token, and by what factor its score beats the next: within rounding of 1 either may win."""
    adjusted = reference_adjust(logits, row, history)
    if row.temperature < 1e-5:
        first, second = np.sort(adjusted)[[-1, -2]]
        return int(np.argmax(adjusted)), np.exp(min(first - second, 1.0))
    scaled = reference_scale(adjusted.astype(np.float32), row.temperature)
    keep, margin = reference_keep(scaled, row)
    if margin < 2e-6:
        return int(np.argmax(scaled)), 1.0
    noise = reference_noise(row.seed, row.position, logits.size)
    scores = np.where(keep, np.exp(scaled.astype(np.float64)), 0) / noise
    first, second = np.sort(scores)[[-1, -2]]
    return int(np.argmax(scores)), (first / second if second > 0 else np.inf)


# --- making batches -------------------------------------------------------------------------------------------------


def make_batch(rows=ROWS, bias_entries=3, **fields):
    """A batch of greedy rows with everything off, except as given; scalars are repeated for each row."""
    off = {
        "temperature": 0.0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "top_k": 0,
        "seed": np.stack([np.arange(rows), np.arange(rows) + 7], axis=1),
        "position": np.arange(rows),
        "slot": 0,
        "prompt_length": 0,
        "length": 0,
        "bias_ids": np.full((rows, bias_entries), -1),
        "bias_values": np.zeros((rows, bias_entries)),
    }
    kinds = {
        name: np.uint32
        if name == "seed"
        else np.float32
        if name in ("temperature", "top_p", "min_p", "bias_values") or name.endswith("penalty")
        else np.int32
        for name in off
    }
    assert set(fields) <= set(off)
    values = {name: np.asarray(fields.get(name, value)).astype(kinds[name]) for name, value in off.items()}
    return SamplingBatch(
        **{name: np.broadcast_to(v, (rows, *v.shape)) if v.ndim == 0 else v for name, v in values.items()}
    )


def row_of(batch, row):
    return SamplingBatch(*(field[row] for field in batch))


def make_logits(rng, rows, vocab, scale=3.0):
    """Rows of every awkward kind, in turn."""
    logits = (rng.normal(size=(rows, vocab)) * scale).astype(np.float32)
    for row in range(rows):
        match rng.integers(8):
            case 0:
                logits[row] = np.round(logits[row])  # many ties
            case 1:
                logits[row] = np.asarray(jnp.asarray(logits[row]).astype(jnp.bfloat16).astype(jnp.float32))
            case 2:
                logits[row] = 1.25  # nothing but ties
            case 3:
                logits[row, rng.random(vocab) < 0.7] = -np.inf
            case 4:
                logits[row] *= 1e30
            case 5:
                logits[row, rng.integers(vocab)] += 15  # one token takes nearly all
            case _:
                pass
    return logits


def make_random_batch(rng, rows=ROWS, vocab=VOCAB):
    """Requests of every kind, mixed."""

    def some(values, neutral, share=0.5):
        return np.where(rng.random(rows) < share, values, neutral)

    length = rng.integers(1, rng.choice([8, 64, HISTORY]) + 1, rows)
    return make_batch(
        rows,
        temperature=some(rng.choice([0.2, 0.7, 1.0, 1.7, 5.0], rows), 0, 0.85),
        top_p=some(rng.choice([1e-9, 0.1, 0.5, 0.9, 0.95, 0.999], rows), 1),
        min_p=some(rng.choice([0.01, 0.1, 0.5, 1.0], rows), 0, 0.3),
        top_k=some(rng.choice([1, 2, 5, 20, WIDTH, 40, vocab - 1, vocab, 10**6], rows), 0),
        repetition_penalty=some(rng.choice([0.8, 1.1, 1.5], rows), 1, 0.3),
        presence_penalty=some(rng.choice([-1.0, 0.6], rows), 0, 0.3),
        frequency_penalty=some(rng.choice([-0.3, 0.2], rows), 0, 0.3),
        seed=rng.integers(0, 2**32, (rows, 2)),
        position=length,
        slot=rng.integers(0, SLOTS, rows),
        prompt_length=rng.integers(1, length + 1),
        length=length,
        bias_ids=np.where(rng.random((rows, 3)) < 0.2, rng.integers(0, vocab, (rows, 3)), -1),
        bias_values=rng.choice([-np.inf, -5.0, 3.0], (rows, 3)),
    )


@functools.cache
def compiled_logprobs(k=5):
    return jax.jit(functools.partial(logprobs, k=k))


@functools.cache
def compiled_sample(candidates=WIDTH):
    return jax.jit(functools.partial(sample, candidates=candidates))


NO_HISTORY = np.zeros((SLOTS, HISTORY), np.int32)


def run(logits, batch, history=NO_HISTORY, candidates=WIDTH):
    return np.asarray(compiled_sample(candidates)(np.asarray(logits, np.float32), batch, history))


# --- the reference itself -------------------------------------------------------------------------------------------


def test_reference_threefry_matches_published_vectors():
    # Random123's known-answer tests for threefry2x32, 20 rounds
    for key, counter, expected in [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]:
        assert tuple(int(word) for word in reference_threefry2x32(key, counter)) == expected


def test_reference_noise_is_fold_in_of_seed_position_and_token():
    key = jax.random.wrap_key_data(jnp.asarray([3, 2**31], jnp.uint32), impl="threefry2x32")
    words = jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, 17), 5))
    fraction = (int(words[0]) * 2**32 + int(words[1])) / 2**64
    assert reference_noise((3, 2**31), 17, 6)[5] == pytest.approx(-np.log1p(-fraction), rel=1e-12)


# --- greedy ---------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_largest_logit_and_the_lowest_id_among_equals():
    logits = np.zeros((ROWS, VOCAB), np.float32)
    logits[1, [250, 40, 299]] = 2
    logits[2] = -1e30
    logits[2, 299] = -1e29
    logits[3, 7] = np.inf
    logits[4, 9] = 3e38
    assert run(logits, make_batch())[:5].tolist() == [0, 40, 299, 7, 9]


def test_temperatures_below_vllm_epsilon_are_greedy():
    logits = np.zeros((ROWS, VOCAB), np.float32)
    logits[:, 5] = 1e-3
    assert (run(logits, make_batch(temperature=9e-6)) == 5).all()
    assert len(set(run(logits, make_batch(temperature=1.1)).tolist())) > 4


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}, {"top_k": 200, "top_p": 0.999}])
def test_nan_counts_as_minus_infinity_and_a_dead_row_gives_a_valid_token(temperature, filters):
    logits = np.full((ROWS, VOCAB), np.nan, np.float32)
    logits[1] = -np.inf
    logits[2, 11] = -50.0
    logits[3, 12] = -np.inf
    logits[3, 13] = -3e38
    logits[4, [20, 21]] = np.inf
    tokens = run(logits, make_batch(temperature=temperature, **filters))
    assert tokens[:4].tolist() == [0, 0, 11, 13]
    assert tokens[4] in (20, 21)
    assert (tokens >= 0).all() and (tokens < VOCAB).all()


# --- filters --------------------------------------------------------------------------------------------------------


@functools.cache
def compiled_filters():
    def both(scaled, batch):
        likelihood, ids, sufficed = filter_candidates(scaled, batch, width=WIDTH)
        rows = jnp.arange(scaled.shape[0])[:, None]
        spread = jnp.zeros_like(scaled).at[rows, ids].set(likelihood)
        return filter_vocabulary(scaled, batch), spread, sufficed

    return jax.jit(both)


def check_filters(scaled, batch):
    """Hold both implementations to the oracle; returns how many rows were decided by candidates."""
    searched, from_candidates, sufficed = map(np.asarray, compiled_filters()(scaled, batch))
    for row in range(scaled.shape[0]):
        keep, margin = reference_keep(scaled[row], row_of(batch, row))
        if margin < 2e-6:
            continue
        expected = np.where(keep, np.exp(scaled[row].astype(np.float64)), 0)
        np.testing.assert_allclose(searched[row], expected, rtol=1e-5, atol=1e-37)
        if sufficed[row]:
            np.testing.assert_allclose(from_candidates[row], expected, rtol=1e-5, atol=1e-37)
        else:
            before_top_p, _ = reference_keep(scaled[row], row_of(batch, row)._replace(top_p=1.0))
            assert before_top_p.sum() >= WIDTH
    return int(sufficed.sum())


@given(SEEDS)
@settings(max_examples=60)
def test_filters_keep_what_sorting_in_float64_keeps(seed):
    rng = np.random.default_rng(seed)
    logits = make_logits(rng, ROWS, VOCAB, scale=rng.choice([0.3, 1.0, 3.0, 10.0]))
    batch = make_random_batch(rng)
    temperature = np.maximum(batch.temperature, 0.1)
    check_filters(np.stack([reference_scale(*pair) for pair in zip(logits, temperature, strict=True)]), batch)


def test_filters_with_exact_thresholds():
    """Powers of two add up exactly, so these cases have one right answer even at the threshold."""
    scaled = np.full((ROWS, VOCAB), -np.inf, np.float32)
    scaled[:, [5, 7, 9, 100]] = 0
    cases = [
        ({"top_p": 0.5}, [5, 7]),  # two of four equals reach a half
        ({"top_p": 0.500001}, [5, 7, 9]),
        ({"top_p": 1e-9}, [5]),  # at least one, always
        ({"top_p": 0.0}, [5]),
        ({"top_k": 1}, [5, 7, 9, 100]),  # ties with the k-th stay
        ({"top_k": 1, "top_p": 0.25}, [5]),
        ({"min_p": 1.0}, [5, 7, 9, 100]),
        ({"min_p": 1.0, "top_k": 2, "top_p": 0.75}, [5, 7, 9]),
    ]
    for fields, expected in cases:
        searched, from_candidates, sufficed = map(np.asarray, compiled_filters()(scaled, make_batch(**fields)))
        assert sufficed.all()
        for kept in (searched, from_candidates):
            assert np.flatnonzero(kept[0]).tolist() == expected, fields


def test_filters_cut_ties_that_outnumber_the_candidates():
    scaled = np.zeros((ROWS, VOCAB), np.float32)
    scaled[:, ::3] = -1
    equals = np.flatnonzero(scaled[0] == 0)
    share = np.float32(0.25 + 1e-4)
    batch = make_batch(top_p=share)
    searched, _, sufficed = map(np.asarray, compiled_filters()(scaled, batch))
    mass = equals.size + (VOCAB - equals.size) * np.exp(-1)
    assert not sufficed.any()
    assert np.flatnonzero(searched[0]).tolist() == equals[: int(np.ceil(share * mass))].tolist()


def test_filters_at_a_real_vocabulary():
    rng = np.random.default_rng(5)
    logits = (rng.normal(size=(6, 50_257)) * 2).astype(np.float32)
    scaled = np.stack([reference_scale(row, 1.0) for row in logits])
    batch = make_batch(
        6, top_k=[0, 2000, 0, 0, 10, 50_256], top_p=[0.9, 0.7, 0.999999, 1, 0.9, 0.5], min_p=[0, 0, 0, 1e-4, 0, 0]
    )
    kept = np.asarray(jax.jit(filter_vocabulary)(scaled, batch)) > 0
    for row in range(6):
        expected, _ = reference_keep(scaled[row], row_of(batch, row))
        likelihood = np.exp(scaled[row].astype(np.float64))
        # tokens whose threshold lies within float32's rounding of p may go either way
        assert likelihood[kept[row] != expected].sum() < 2e-7 * likelihood.sum()
        assert np.count_nonzero(kept[row] != expected) < 50


def test_a_vocabulary_of_candidates_always_suffices():
    rng = np.random.default_rng(1)
    scaled = np.stack([reference_scale(row, 1.0) for row in make_logits(rng, ROWS, 20)])
    batch = make_random_batch(rng, vocab=20)
    likelihood, ids, sufficed = map(np.asarray, jax.jit(functools.partial(filter_candidates, width=20))(scaled, batch))
    assert sufficed.all()
    for row in range(ROWS):
        keep, margin = reference_keep(scaled[row], row_of(batch, row))
        assert margin < 2e-6 or sorted(ids[row][likelihood[row] > 0]) == np.flatnonzero(keep).tolist()


# --- the draw -------------------------------------------------------------------------------------------------------


@given(SEEDS)
@settings(max_examples=40)
def test_sample_is_the_reference_token_for_token(seed):
    rng = np.random.default_rng(seed)
    logits, batch = make_logits(rng, ROWS, VOCAB), make_random_batch(rng)
    history = rng.integers(0, VOCAB, (SLOTS, HISTORY)).astype(np.int32)
    tokens = run(logits, batch, history)
    for row in range(ROWS):
        expected, lead = reference_sample(logits[row], row_of(batch, row), history)
        if lead > 1.001:
            assert tokens[row] == expected


@pytest.mark.parametrize(
    ("fields", "keep"),
    [({}, 20), ({"top_k": 8}, 8), ({"top_p": 0.999999, "top_k": 299}, 20), ({"temperature": 0.5, "top_k": 12}, 12)],
    ids=["unfiltered", "from candidates", "by search", "temperature"],
)
def test_draws_follow_the_softmax(fields, keep):
    rng = np.random.default_rng(2)
    logits = np.full(VOCAB, -np.inf, np.float32)
    support = rng.permutation(VOCAB)[:20]
    logits[support] = np.linspace(2.0, -2.0, 20)
    if "top_p" in fields:
        logits[support] = np.linspace(0.3, -0.3, 20)
    fields = {"temperature": 1.0, **fields}
    counts = np.zeros(VOCAB)
    draws = 600
    for step in range(draws):
        batch = make_batch(position=step, seed=np.stack([np.arange(ROWS), np.full(ROWS, 99)], axis=1), **fields)
        counts += np.bincount(run(np.tile(logits, (ROWS, 1)), batch), minlength=VOCAB)
    chances = np.exp(logits[support[:keep]].astype(np.float64) / fields["temperature"])
    expected = chances / chances.sum() * draws * ROWS
    assert counts.sum() == counts[support[:keep]].sum()
    assert stats.chisquare(counts[support[:keep]], expected).pvalue > 1e-3


def test_noise_depends_on_seed_and_position_only():
    logits = np.zeros((ROWS, VOCAB), np.float32)
    same = np.tile([[5, 6]], (ROWS, 1))
    assert len(set(run(logits, make_batch(temperature=1.0, seed=same, position=3)).tolist())) == 1
    assert len(set(run(logits, make_batch(temperature=1.0, seed=same)).tolist())) > 8
    assert len(set(run(logits, make_batch(temperature=1.0, position=3)).tolist())) > 8


# --- bias and penalties ---------------------------------------------------------------------------------------------


def test_bias_adds_up_and_forbids():
    logits = np.zeros((ROWS, VOCAB), np.float32)
    logits[:, 3] = 1
    ids, values = np.full((ROWS, 3), -1), np.zeros((ROWS, 3))
    ids[0], values[0] = [8, 8, 299], [0.6, 0.6, 1.1]
    ids[1], values[1] = (
        [3, 3, -1],
        [100, -np.inf, 50],
    )  # forbidden whatever else is added; the empty entry's value is unread
    ids[2], values[2] = [3, VOCAB, -1], [-2, 50, 50]  # ids outside the vocabulary are empty too
    assert run(logits, make_batch(bias_ids=ids, bias_values=values))[:4].tolist() == [8, 0, 0, 3]


def test_a_batch_needs_no_bias_entries():
    tokens = jax.eval_shape(sample, np.zeros((ROWS, VOCAB), np.float32), make_batch(bias_entries=0), NO_HISTORY)
    assert (tokens.shape, tokens.dtype) == ((ROWS,), jnp.int32)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    history = np.full((SLOTS, HISTORY), -1, np.int32)
    history[1, :3] = [4, 5, 4]
    history[1, 1050] = 6  # a long way in
    logits = np.full((ROWS, VOCAB), -10.0, np.float32)
    logits[0, [4, 9]] = [3.0, 2.9]  # 3 / 1.1 < 2.9
    logits[1, [4, 9]] = [3.0, 2.6]  # 3 / 1.1 > 2.6
    logits[2, [4, 9]] = [-2.0, -2.1]  # -2 * 1.1 < -2.1
    logits[3, [6, 9]] = [3.0, 2.9]  # beyond the length
    logits[4, [6, 9]] = [3.0, 2.9]
    length = np.full(ROWS, 3)
    length[4] = 1051
    batch = make_batch(repetition_penalty=1.1, slot=1, prompt_length=2, length=length)
    assert run(logits, batch, history)[:5].tolist() == [9, 4, 9, 6, 9]


def test_presence_and_frequency_penalties_count_the_output_only():
    history = np.full((SLOTS, HISTORY), 7, np.int32)
    history[0, :8] = [1, 1, 2, 3, 3, 3, 7, 7]
    logits = np.zeros((ROWS, VOCAB), np.float32)
    logits[:, [1, 3, 9]] = [0.5, 1.0, 0.65]
    presence, frequency = np.zeros(ROWS), np.zeros(ROWS)
    presence[0] = 0.3  # 3: 0.7
    presence[1] = 0.4  # 3: 0.6
    frequency[2] = 0.1  # 3: 0.7
    frequency[3] = 0.15  # 3: 0.55
    frequency[4], presence[4] = 0.1, 0.1  # 3: 0.6
    batch = make_batch(
        prompt_length=3,
        length=6,
        presence_penalty=presence,
        frequency_penalty=frequency,
        temperature=np.arange(ROWS) * 0,
    )
    assert run(logits, batch, history)[:6].tolist() == [3, 9, 3, 9, 9, 3]


# --- invariance -----------------------------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from([(1, WIDTH), (5, 0), (ROWS, WIDTH)]))
@settings(max_examples=40)
def test_a_row_gives_the_same_token_in_any_batch(seed, program):
    rng = np.random.default_rng(seed)
    logits, batch = make_logits(rng, ROWS, VOCAB), make_random_batch(rng)
    history = rng.integers(0, VOCAB, (SLOTS, HISTORY)).astype(np.int32)
    tokens = run(logits, batch, history)
    rows, candidates = program  # without candidates every filtered row searches, and must find the same
    chosen = rng.integers(0, ROWS, rows)  # a subset, out of order, with repetitions
    again = run(logits[chosen], SamplingBatch(*(field[chosen] for field in batch)), history, candidates)
    np.testing.assert_array_equal(again, tokens[chosen])


def test_searching_all_rows_at_once_gives_the_bits_of_searching_each():
    rng = np.random.default_rng(4)
    logits, batch = make_logits(rng, ROWS, VOCAB), make_random_batch(rng)
    scaled = np.stack([reference_scale(row, 1.0) for row in logits])
    together = np.asarray(compiled_filters()(scaled, batch)[0])
    alone = jax.jit(filter_vocabulary)
    for row in range(ROWS):
        one = np.asarray(alone(scaled[row : row + 1], SamplingBatch(*(field[row : row + 1] for field in batch))))
        np.testing.assert_array_equal(one[0], together[row])


def test_logprobs_have_the_same_bits_alone():
    vocab = 32_001
    rng = np.random.default_rng(6)
    logits, tokens = make_logits(rng, ROWS, vocab), rng.integers(0, vocab, ROWS).astype(np.int32)
    together = compiled_logprobs()(logits, tokens)
    for row in range(ROWS):
        for part, whole in zip(compiled_logprobs()(logits[row][None], tokens[row][None]), together, strict=True):
            np.testing.assert_array_equal(np.asarray(part)[0], np.asarray(whole)[row])


# --- logprobs -------------------------------------------------------------------------------------------------------


def test_logprobs_match_float64():
    rng = np.random.default_rng(8)
    logits, tokens = make_logits(rng, ROWS, VOCAB), rng.integers(0, VOCAB, ROWS).astype(np.int32)
    logits[0, 3] = np.nan
    logprob, rank, top_ids, top = map(np.asarray, compiled_logprobs()(logits, tokens))
    clean = np.where(np.isnan(logits), -np.inf, logits).astype(np.float64)
    with np.errstate(divide="ignore"):
        shifted = clean - clean.max(axis=1, keepdims=True)
        expected = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rows = np.arange(ROWS)
    np.testing.assert_allclose(logprob, expected[rows, tokens], rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(rank, (clean >= clean[rows, tokens][:, None]).sum(axis=1))
    order = np.argsort(-clean, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(top_ids, order)
    np.testing.assert_allclose(top, np.take_along_axis(expected, order, axis=1), rtol=1e-6, atol=1e-5)
    assert logprob.dtype == top.dtype == np.float32
    assert rank.dtype == top_ids.dtype == np.int32


def test_logprobs_of_a_row_with_no_likely_token():
    logits = np.full((ROWS, VOCAB), -np.inf, np.float32)
    logits[1, 4] = 2
    tokens = np.full(ROWS, 4, np.int32)
    logprob, rank, top_ids, top = map(np.asarray, compiled_logprobs()(logits, tokens))
    assert logprob[:2].tolist() == [-np.inf, 0.0]
    assert rank[:2].tolist() == [VOCAB, 1]
    assert top_ids[:2].tolist() == [[0, 1, 2, 3, 4], [4, 0, 1, 2, 3]]
    assert top[:2, 0].tolist() == [-np.inf, 0.0]


def test_logprobs_of_no_alternatives():
    shapes = jax.eval_shape(
        functools.partial(logprobs, k=0), np.zeros((ROWS, VOCAB), np.float32), np.zeros(ROWS, np.int32)
    )
    assert [part.shape for part in shapes] == [(ROWS,), (ROWS,), (ROWS, 0), (ROWS, 0)]
