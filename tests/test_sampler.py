"""Top-k and the sampler against float64 numpy from the definitions, and what is drawn against what should be."""

import functools
import math

import numpy as np
import pytest
from _pydflash import ffi, lib

from tests.chi_square import chi_square_p

NO_IDS = (ffi.NULL, 0, 0)  # for penalties, which are not tested here


def message():
    return ffi.string(lib.pf_last_error()).decode()


def floats(values):
    return ffi.from_buffer("float[]", np.ascontiguousarray(values, np.float32))


def make_params(*, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0):
    params = ffi.new("pf_generate_params *")
    lib.pf_generate_params_default(params)
    params.temperature, params.top_k, params.top_p, params.min_p = temperature, top_k, top_p, min_p
    params.seed = seed
    return params


def top_k(logits, k):
    ids, logp = np.zeros(k, np.int32), np.zeros(k, np.float32)
    status = lib.pf_top_k(
        floats(logits), len(logits), k, ffi.from_buffer("int32_t[]", ids), ffi.from_buffer("float[]", logp)
    )
    assert status == lib.PF_OK, message()
    return ids, logp


def probabilities(logits, **settings):
    out = np.full(len(logits), np.nan)
    status = lib.pf_sample_probs(
        floats(logits), len(logits), make_params(**settings), *NO_IDS, ffi.from_buffer("double[]", out)
    )
    assert status == lib.PF_OK, message()
    return out


def sampler(logits, **settings):
    """draw(seed, position) -> token."""
    row, n_vocab, params = floats(logits), len(logits), make_params(**settings)
    token = ffi.new("int32_t *")

    def draw(seed, position):
        params.seed = seed
        assert lib.pf_sample(row, n_vocab, params, *NO_IDS, position, token) == lib.PF_OK, message()
        return token[0]

    return draw


# ---- the definitions, again -------------------------------------------------------------------------------------


def log_softmax(logits):
    logits = np.asarray(logits, np.float32).astype(np.float64)
    shifted = logits - logits.max()
    return shifted - math.log(np.exp(shifted).sum())


def by_likelihood(logits):
    """Ids, likeliest first, ties by id."""
    return np.lexsort((np.arange(len(logits)), -np.asarray(logits, np.float32).astype(np.float64)))


def expected_probabilities(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Temperature, top-k, top-p, min-p: each a filter on the distribution that the former left."""
    n = len(logits)
    order = by_likelihood(logits)
    if temperature == 0:
        return np.eye(n)[order[0]]
    scaled = np.asarray(logits, np.float32).astype(np.float64) / float(np.float32(temperature))
    kept = np.ones(n, bool)

    def distribution():
        weights = np.where(kept, np.exp(scaled - scaled[kept].max()), 0)
        return weights / weights.sum()

    if top_k:
        kept[order[top_k:]] = False
    if top_p < 1:
        before = np.concatenate([[0], np.cumsum(distribution()[order])[:-1]])
        dropped = before >= float(np.float32(top_p))
        dropped[0] = False
        kept[order[dropped]] = False
    if min_p:
        p = distribution()
        kept &= p >= float(np.float32(min_p)) * p.max()
    return distribution()


def philox(counter, key):
    """Philox4x32-10 as published."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def uniform(seed, position):
    words = philox([position & 0xFFFFFFFF, position >> 32, 0, 0], [seed & 0xFFFFFFFF, seed >> 32])
    return (words[0] << 32 | words[1]) >> 11


# ---- top-k -------------------------------------------------------------------------------------------------------


def check_top_k(logits, k):
    ids, logp = top_k(logits, k)
    expected = by_likelihood(logits)[:k]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(logp, log_softmax(logits)[expected], rtol=2e-7, atol=3e-7)


@pytest.mark.parametrize("n_vocab", [1, 2, 3, 7, 64, 255, 256, 257, 1000, 5000])
def test_top_k(n_vocab):
    rng = np.random.default_rng(n_vocab)
    for k in {1, 2, 8, 63, 64, 65, n_vocab // 8, n_vocab // 8 + 1, n_vocab - 1, n_vocab}:
        if 1 <= k <= n_vocab:
            for scale in (0.01, 1, 10, 1000):
                check_top_k(rng.normal(0, scale, n_vocab), k)
            check_top_k(rng.integers(-3, 3, n_vocab), k)  # ties
            check_top_k(np.arange(n_vocab), k)
            check_top_k(-np.arange(n_vocab), k)
            check_top_k(rng.choice([0.0, -0.0], n_vocab), k)


@pytest.mark.parametrize("mean", [0.0, -50.0, 50.0])
def test_log_probabilities_are_exact_over_a_large_vocabulary(mean):
    rng = np.random.default_rng(0)
    for spread in (0.1, 3, 8):
        check_top_k(rng.normal(mean, spread, 248_320), 64)
    check_top_k(np.full(248_320, mean), 64)  # the sum of 248,320 equal terms


def test_top_k_of_masked_rows():
    logits = np.full(300, -np.inf)
    logits[[5, 200]] = 1.0, 2.0
    ids, logp = top_k(logits, 4)
    assert ids.tolist() == [200, 5, 0, 1]
    np.testing.assert_allclose(logp[:2], log_softmax([1.0, 2.0])[::-1], rtol=1e-6)
    assert np.isneginf(logp[2:]).all()


def test_top_k_of_extreme_logits():
    assert top_k([1e30, -1e30, 0], 3)[0].tolist() == [0, 2, 1]
    # The difference is twice float's largest number; a token that is not masked keeps a finite one.
    assert top_k([3e38, -3e38], 2)[1].tolist() == [0, -np.finfo(np.float32).max]


# ---- the distribution --------------------------------------------------------------------------------------------

FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 400},
    {"top_k": 10_000},
    {"top_p": 0.0},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.02},
    {"min_p": 0.5},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 40, "min_p": 0.3},
    {"top_p": 0.7, "min_p": 0.1},
    {"top_k": 20, "top_p": 0.95, "min_p": 0.05},
    {"top_k": 700, "top_p": 0.5, "min_p": 0.001},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.5])
def test_probabilities(filters, temperature):
    rng = np.random.default_rng(1)
    for n_vocab in (2, 50, 999):
        for spread in (0.2, 1, 4):
            logits = rng.normal(rng.normal(0, 20), spread, n_vocab).astype(np.float32)
            logits[rng.random(n_vocab) < 0.1] = -np.inf
            logits[0] = 1
            settings = {"temperature": temperature, **filters}
            expected = expected_probabilities(logits, **settings)
            actual = probabilities(logits, **settings)
            np.testing.assert_array_equal(actual > 0, expected > 1e-38)
            np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-7)
            assert actual.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("filters", [{"top_p": 0.95}, {"top_k": 50}, {"min_p": 0.01}, {"top_p": 0.4, "min_p": 0.01}])
def test_probabilities_over_a_large_vocabulary(filters):
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 3, 248_320).astype(np.float32)
    expected = expected_probabilities(logits, **filters)
    actual = probabilities(logits, **filters)
    # Where thousands of tokens have nearly one weight, a rounding may move top-p's border by a token.
    assert ((actual > 0) != (expected > 0)).sum() <= 2
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-6)


def test_ties_stay_by_lowest_id():
    ties = np.zeros(8)
    assert probabilities(ties, top_k=3).tolist() == [1 / 3] * 3 + [0] * 5
    assert probabilities(ties, top_p=0.5).tolist() == [1 / 4] * 4 + [0] * 4
    assert probabilities(ties, top_p=0.51).tolist() == [1 / 5] * 5 + [0] * 3
    assert probabilities(ties, min_p=1.0).tolist() == [1 / 8] * 8
    assert probabilities([0.0, 1.0, 1.0, 0.0], min_p=1.0).tolist() == [0, 0.5, 0.5, 0]
    assert probabilities([-0.0, 0.0], top_k=1).tolist() == [1, 0]


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"top_p": 0.0}, {"temperature": 1e-45}], ids=str
)
def test_settings_that_leave_the_argmax(settings):
    rng = np.random.default_rng(3)
    for n_vocab in (1, 5, 16, 33, 600):
        logits = rng.permutation(n_vocab) * 0.01
        draw = sampler(logits, **settings)
        assert {draw(seed, 0) for seed in range(20)} == {int(np.argmax(logits))}
    tied = np.zeros(40)
    tied[[9, 17, 39]] = 1
    if settings != {"temperature": 1e-45}:  # which leaves the three of them
        assert {sampler(tied, **settings)(seed, 0) for seed in range(20)} == {9}


def test_extreme_logits():
    assert probabilities([1e30, 0, -1e30]).tolist() == [1, 0, 0]
    assert probabilities([3e38, -3e38], temperature=0.01).tolist() == [1, 0]
    assert probabilities([0, 1, 2], temperature=1e30).tolist() == [1 / 3] * 3
    one = np.full(1000, -np.inf)
    one[777] = -1e30
    for filters in FILTERS:
        assert probabilities(one, **filters)[777] == 1
        assert sampler(one, **filters)(5, 5) == 777
    # Far below what exp can hold in a float, and tokens of no weight are never drawn.
    assert probabilities([0, -200]).tolist() == [1, 0]
    assert probabilities([-200, 0], top_p=0.99).tolist() == [0, 1]


# ---- the draw ----------------------------------------------------------------------------------------------------


def test_philox_as_published():
    """Known answers from Random123's kat_vectors, for the Python version that the next test holds the library to."""
    ones, pi = 0xFFFFFFFF, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox(pi[:4], pi[4:]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_one_philox_number_for_seed_and_position():
    # Equal weights cut [0, 1) into 65,536 exact parts: the token is the number's first 16 bits.
    draw = sampler(np.zeros(65_536))
    rng = np.random.default_rng(4)
    pairs = [(0, 0), (1, 0), (0, 1), (2**64 - 1, 2**63 - 1), (2**32, 2**32)]
    pairs += [(int(rng.integers(2**64, dtype=np.uint64)), int(rng.integers(2**40))) for _ in range(50)]
    for seed, position in pairs:
        assert draw(seed, position) == uniform(seed, position) >> 37
    # All the bits count: two tokens with the border just below and just above the number.
    for seed, position in pairs:
        u = uniform(seed, position) / 2**53
        if 1e-3 < u < 1 - 1e-3:
            for border, token in ((u - 2e-7, 1), (u + 2e-7, 0)):
                assert sampler([math.log(border / (1 - border)), 0.0])(seed, position) == token


LOGITS = np.array([0.3, -1.2, 2.0, 1.9, -np.inf, 0.0, -0.4, 1.1, 0.3, -3.0, 2.0, 0.9], np.float32)
N_DRAWS = 20_000
SETTINGS = [
    {},
    {"temperature": 0.6, "top_k": 6},
    {"temperature": 1.5, "top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 1.2, "top_k": 8, "top_p": 0.9, "min_p": 0.15},
]


@functools.cache
def drawn(index):
    """Counts over seeds at one position."""
    draw = sampler(LOGITS, **SETTINGS[index])
    return np.bincount([draw(seed, 3) for seed in range(N_DRAWS)], minlength=len(LOGITS))


@pytest.mark.parametrize("index", range(len(SETTINGS)))
def test_draws_over_seeds_follow_the_distribution(index):
    expected = expected_probabilities(LOGITS, **SETTINGS[index])
    assert chi_square_p(drawn(index), N_DRAWS * expected) > 1e-3


def test_draws_over_positions_follow_the_distribution():
    draw = sampler(LOGITS)
    counts = np.bincount([draw(11, position) for position in range(N_DRAWS)], minlength=len(LOGITS))
    assert chi_square_p(counts, N_DRAWS * expected_probabilities(LOGITS)) > 1e-3


def test_this_many_draws_tell_a_temperature_of_1_from_one_of_1_1():
    assert chi_square_p(drawn(0), N_DRAWS * expected_probabilities(LOGITS, temperature=1.1)) < 1e-9


@pytest.mark.parametrize("step", [(1, 0), (0, 1), (1, -1), (2**32, 0), (0, 2**32)], ids=str)
def test_neighbouring_draws_are_independent(step):
    logits = LOGITS[:6]
    draw = sampler(logits)
    joint = np.zeros((6, 6))
    for i in range(N_DRAWS // 2):
        seed, position = i % 100, 1 + i // 100
        joint[draw(seed, position), draw(seed + step[0], position + step[1])] += 1
    p = expected_probabilities(logits)
    assert chi_square_p(joint, joint.sum() * np.outer(p, p)) > 1e-3


def test_the_same_draw_whatever_came_before():
    draw = sampler(LOGITS)
    first = [draw(5, position) for position in range(200)]
    assert [draw(5, position) for position in reversed(range(200))] == first[::-1]
    assert len(set(first)) > 5


def test_a_change_in_the_last_digit_hardly_ever_changes_a_draw():
    # 300 tokens in nearly equal pairs swap places in likelihood; draws by likelihood would change every other time.
    rng = np.random.default_rng(6)
    logits = np.repeat(rng.normal(0, 1, 150), 2).astype(np.float32)
    up = logits + np.tile(np.float32([1e-6, 0]), 150)
    down = logits + np.tile(np.float32([0, 1e-6]), 150)
    for filters in ({}, {"top_p": 0.9}, {"top_k": 100}):
        draws = [sampler(row, **filters) for row in (up, down)]
        changed = sum(draws[0](seed, 0) != draws[1](seed, 0) for seed in range(2000))
        assert changed <= 2


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 3, 255, 256, 1000])
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
def test_logits_that_are_no_numbers(value, position):
    logits = np.zeros(1001)
    logits[position] = value
    buffers = ffi.new("int32_t[1001]"), ffi.new("float[1001]"), ffi.new("double[1001]")
    for k in (1, 64, 1000):
        assert lib.pf_top_k(floats(logits), 1001, k, buffers[0], buffers[1]) == lib.PF_ERR_ARGUMENT
        assert "NaN" in message()
    for settings in ({"temperature": 0.0}, *FILTERS):
        params = make_params(**settings)
        assert lib.pf_sample(floats(logits), 1001, params, *NO_IDS, 0, buffers[0]) == lib.PF_ERR_ARGUMENT
        assert lib.pf_sample_probs(floats(logits), 1001, params, *NO_IDS, buffers[2]) == lib.PF_ERR_ARGUMENT
        assert "NaN" in message()


def test_nothing_but_masked_tokens():
    logits = np.full(20, -np.inf)
    for settings in ({"temperature": 0.0}, {}, {"top_k": 3}):
        status = lib.pf_sample(floats(logits), 20, make_params(**settings), *NO_IDS, 0, ffi.new("int32_t *"))
        assert status == lib.PF_ERR_ARGUMENT
        assert "-inf" in message()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": math.nan}, "min_p"),
    ],
)
def test_settings_out_of_range(settings, word):
    status = lib.pf_sample(floats([1, 2]), 2, make_params(**settings), *NO_IDS, 0, ffi.new("int32_t *"))
    assert status == lib.PF_ERR_ARGUMENT
    assert word in message()


def test_arguments_out_of_range():
    row, params, token = floats([1, 2]), make_params(), ffi.new("int32_t *")
    logp, probs = ffi.new("float[2]"), ffi.new("double[2]")
    null = ffi.NULL
    for status in (
        lib.pf_sample(row, 2, params, *NO_IDS, -1, token),
        lib.pf_sample(row, 0, params, *NO_IDS, 0, token),
        lib.pf_sample(row, -5, params, *NO_IDS, 0, token),
        lib.pf_sample(null, 2, params, *NO_IDS, 0, token),
        lib.pf_sample(row, 2, null, *NO_IDS, 0, token),
        lib.pf_sample(row, 2, params, *NO_IDS, 0, null),
        lib.pf_sample(row, 2, ffi.new("pf_generate_params *"), *NO_IDS, 0, token),  # its size was not filled in
        lib.pf_sample_probs(row, 2, params, *NO_IDS, null),
        lib.pf_sample_probs(null, 2, params, *NO_IDS, probs),
        lib.pf_top_k(row, 2, 0, token, logp),
        lib.pf_top_k(row, 2, 3, token, logp),
        lib.pf_top_k(row, 0, 1, token, logp),
        lib.pf_top_k(null, 2, 1, token, logp),
        lib.pf_top_k(row, 2, 1, null, logp),
        lib.pf_top_k(row, 2, 1, token, null),
    ):
        assert status == lib.PF_ERR_ARGUMENT
