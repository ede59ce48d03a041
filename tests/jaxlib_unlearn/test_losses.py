"""Array-level losses against float64 loops, published numbers, and each other."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlib_unlearn import losses

B, W, V = 4, 6, 7
LENGTHS = (6, 3, 0, 1)  # ragged, with a padding row


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    mask = np.zeros((B, W))
    for row, length in enumerate(LENGTHS):
        mask[row, rng.permutation(W)[:length]] = 1
    return {
        "logits": rng.normal(size=(B, W, V)) * 2,
        "teacher": rng.normal(size=(B, W, V)) * 2,
        "targets": rng.integers(V, size=(B, W)),
        "mask": mask,
        "sums": -rng.uniform(1, 9, B),
        "other": -rng.uniform(1, 9, B),
        "ref": -rng.uniform(1, 9, B),
        "ref_other": -rng.uniform(1, 9, B),
        "lengths": np.array([4.0, 2, 3, 1]),
        "rows": np.array([1, 1, 0, 1]),
    }


# ---- oracles: plain loops over Python floats -------------------------------------------------


def log_softmax(z):
    top = max(z)
    log_total = top + math.log(sum(math.exp(x - top) for x in z))
    return [x - log_total for x in z]


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def pref(margin, beta, scale=2.0):
    return scale / beta * softplus(-beta * margin)


def labels(d):
    return [(b, w) for b in range(B) for w in range(W) if d["mask"][b, w]]


def kl_at(d, b, w):
    p, q = log_softmax(d["teacher"][b, w]), log_softmax(d["logits"][b, w])
    return sum(math.exp(x) * (x - y) for x, y in zip(p, q, strict=True))


def oracle_nll(d):
    values = [-log_softmax(d["logits"][b, w])[d["targets"][b, w]] for b, w in labels(d)]
    return sum(values), len(values)


def oracle_kl(d):
    return sum(kl_at(d, b, w) for b, w in labels(d)), len(labels(d))


def oracle_kl_everywhere(d):
    return sum(kl_at(d, b, w) for b in range(B) for w in range(W)), B * W


def oracle_asu(d, skip=False):
    rows = []
    for b in range(B):
        slots = [w for w in range(W) if d["mask"][b, w]][1 if skip else 0 :]
        if slots:
            rows.append(sum(kl_at(d, b, w) for w in slots) / len(slots))
    return sum(rows), len(rows)


def kept(d):
    return [b for b in range(B) if d["rows"][b]]


def oracle_npo(d, beta=0.1):
    return sum(pref(d["ref"][b] - d["sums"][b], beta) for b in kept(d)), len(kept(d))


def oracle_npo_batch_mean(d, beta=0.1):
    n = len(kept(d))
    return pref(sum(d["ref"][b] - d["sums"][b] for b in kept(d)) / n, beta) * n, n


def oracle_npo_token_mean(d, beta=0.1):
    count = sum(d["lengths"][b] for b in kept(d))
    margin = sum(d["ref"][b] - d["sums"][b] for b in kept(d)) / count
    return pref(margin, beta) * len(kept(d)), len(kept(d))


def oracle_simnpo(d, beta=2.5, delta=0.4):
    rows = [pref(-d["sums"][b] / d["lengths"][b] - delta, beta) for b in kept(d)]
    return sum(rows), len(rows)


def oracle_simnpo_token_mean(d, beta=2.5, delta=0.4):
    mean = -sum(d["sums"][b] for b in kept(d)) / sum(d["lengths"][b] for b in kept(d))
    return pref(mean - delta, beta) * len(kept(d)), len(kept(d))


def oracle_dpo(d, beta=0.1):
    margins = [d["sums"][b] - d["ref"][b] - d["other"][b] + d["ref_other"][b] for b in kept(d)]
    return sum(pref(m, beta) for m in margins), len(margins)


def oracle_dpo_no_factor(d, beta=0.1):
    total, weight = oracle_dpo(d, beta)
    return total * beta / 2, weight


def oracle_ap(d, beta=0.1):
    return sum(pref(d["sums"][b] - d["other"][b], beta, 1.0) for b in kept(d)), len(kept(d))


def oracle_npo_raw(d, beta=0.3):
    values = [
        sum(pref(r - z, beta) for z, r in zip(d["logits"][i], d["teacher"][i], strict=True)) / V
        for i in labels(d)
    ]
    return sum(values), len(values)


def oracle_simnpo_raw(d, beta=0.7, delta=0.2):
    values = [sum(pref(-z - delta, beta) for z in d["logits"][i]) / V for i in labels(d)]
    return sum(values), len(values)


def negative(oracle):
    return lambda d: (-oracle(d)[0], oracle(d)[1])


def by_logits(name, **options):
    return "logits", lambda z, d: getattr(losses, name)(z, d["targets"], d["mask"], **options)


def by_teacher(name, mask="mask", **options):
    return "logits", lambda z, d: getattr(losses, name)(d["teacher"], z, d.get(mask), **options)


# name -> (differentiated input, loss(x, data) -> Term, oracle(data) -> (sum, weight), additive)
LOSSES = {
    "nll": (*by_logits("nll"), oracle_nll, True),
    "idk": (*by_logits("idk"), oracle_nll, True),
    "gradient_ascent": (*by_logits("gradient_ascent"), negative(oracle_nll), True),
    "kl": (*by_teacher("kl"), oracle_kl, True),
    "kl, all positions": (*by_teacher("kl", mask="none"), oracle_kl_everywhere, True),
    "asu, seq_mean": (*by_teacher("asu_forget"), oracle_asu, True),
    "asu, token_mean": (*by_teacher("asu_forget", reduction="token_mean"), oracle_kl, True),
    "asu, skip_first": (
        *by_teacher("asu_forget", skip_first=True),
        lambda d: oracle_asu(d, skip=True),
        True,
    ),
    "npo": ("sums", lambda x, d: losses.npo(x, d["ref"], d["rows"]), oracle_npo, True),
    "npo, batch_mean": (
        "sums",
        lambda x, d: losses.npo(x, d["ref"], d["rows"], compat="batch_mean"),
        oracle_npo_batch_mean,
        False,
    ),
    "npo, token_mean": (
        "sums",
        lambda x, d: losses.npo(x, d["ref"], d["rows"], compat="token_mean", lengths=d["lengths"]),
        oracle_npo_token_mean,
        False,
    ),
    "npo, raw_logits": (
        "logits",
        lambda z, d: losses.masked_sum(losses.npo_raw_logits(z, d["teacher"], beta=0.3), d["mask"]),
        oracle_npo_raw,
        True,
    ),
    "simnpo": (
        "sums",
        lambda x, d: losses.simnpo(x, d["lengths"], d["rows"], beta=2.5, delta=0.4),
        oracle_simnpo,
        True,
    ),
    "simnpo, token_mean": (
        "sums",
        lambda x, d: losses.simnpo(
            x, d["lengths"], d["rows"], beta=2.5, delta=0.4, compat="token_mean"
        ),
        oracle_simnpo_token_mean,
        False,
    ),
    "simnpo, raw_logits": (
        "logits",
        lambda z, d: losses.masked_sum(losses.simnpo_raw_logits(z, delta=0.2), d["mask"]),
        oracle_simnpo_raw,
        True,
    ),
    "dpo": (
        "sums",
        lambda x, d: losses.dpo(x, d["other"], d["ref"], d["ref_other"], d["rows"]),
        oracle_dpo,
        True,
    ),
    "dpo, no_factor": (
        "sums",
        lambda x, d: losses.dpo(
            x, d["other"], d["ref"], d["ref_other"], d["rows"], compat="no_factor"
        ),
        oracle_dpo_no_factor,
        True,
    ),
    "answer_preservation": (
        "sums",
        lambda x, d: losses.answer_preservation(x, d["other"], d["rows"]),
        oracle_ap,
        True,
    ),
}
MASKED = [name for name in LOSSES if "all positions" not in name]
every_loss = pytest.mark.parametrize("name", LOSSES)
every_masked_loss = pytest.mark.parametrize("name", MASKED)


def value(term):
    return term[0] / term[1]


@functools.cache
def jitted(name):
    """`(x, data) -> ((value, (sum, weight)), gradient of the value)`, compiled once per shape."""
    _, loss, _, _ = LOSSES[name]

    def fn(x, data):
        term = loss(x, data)
        return value(term), term

    return jax.jit(jax.value_and_grad(fn, has_aux=True))


def run(name, data, x=None):
    data = {k: jnp.asarray(v) for k, v in data.items()}
    return jitted(name)(data[LOSSES[name][0]] if x is None else jnp.asarray(x), data)


@every_loss
def test_equals_the_loop(name, data):
    key, loss, oracle, _ = LOSSES[name]
    (_, term), _ = run(name, data)
    want, count = oracle(data)
    assert term[0].dtype == term[1].dtype == jnp.float64
    assert float(term[1]) == count
    np.testing.assert_allclose(term[0], want, rtol=1e-12)
    np.testing.assert_allclose(loss(data[key], data), term, rtol=1e-12)  # jit == eager


@every_loss
def test_gradient_equals_finite_differences(name, data):
    x = data[LOSSES[name][0]]
    step = np.random.default_rng(1).normal(size=x.shape)
    got = jnp.sum(run(name, data)[1] * step)
    ends = [run(name, data, x + eps * step)[0][0] for eps in (1e-5, -1e-5)]
    np.testing.assert_allclose(got, (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-10)


@every_masked_loss
@pytest.mark.parametrize("poison", [np.nan, -np.inf, np.inf])
def test_masked_entries_reach_neither_value_nor_gradient(name, poison, data):
    key = LOSSES[name][0]
    hidden = (data["mask"] if key == "logits" else data["rows"]) == 0
    spoiled = {k: np.array(v) for k, v in data.items()}
    for k in ("logits", "teacher") if key == "logits" else ("sums", "ref", "ref_other", "other"):
        spoiled[k][hidden] = poison
    (got, _), grad = run(name, spoiled)
    np.testing.assert_array_equal(got, run(name, data)[0][0])
    if "raw_logits" not in name:  # those are per position: their caller masks the logits
        assert not np.any(np.asarray(grad)[hidden])
        assert np.all(np.isfinite(grad))


@every_loss
def test_sums_over_micro_batches(name, data):
    additive = LOSSES[name][3]
    whole = run(name, data)[0][1]
    parts = []
    for rows in (slice(0, 2), slice(2, 4)):
        part = {k: v[rows] for k, v in data.items()}
        parts.append(run(name, part)[0][1])
    total, weight = losses.merge_terms(*parts)
    assert float(weight) == float(whole[1])
    assert np.isclose(total, whole[0], rtol=1e-12) == additive


@every_masked_loss
def test_padding_changes_nothing(name, data):
    padded = {}
    for k, v in data.items():
        grow = [(0, 2)] + ([(0, 3)] if v.ndim > 1 else []) + [(0, 0)] * (v.ndim - 2)
        fill = 0 if k in ("mask", "rows", "targets") else 3
        padded[k] = np.pad(v, grow, constant_values=fill)
    np.testing.assert_allclose(run(name, padded)[0][1], run(name, data)[0][1], rtol=1e-12)


def test_the_legacy_kl_over_all_positions_depends_on_padding(data):
    pad = [(0, 0), (0, 3), (0, 0)]
    short = losses.kl(data["teacher"], data["logits"])
    long = losses.kl(np.pad(data["teacher"], pad), np.pad(data["logits"], pad))
    assert float(value(long)) < 0.9 * float(value(short))


@every_loss
def test_low_precision_is_upcast_first(name, data):
    low = {k: jnp.asarray(v, jnp.bfloat16) if v.dtype == float else v for k, v in data.items()}
    high = {k: v.astype(jnp.float32) if v.dtype == jnp.bfloat16 else v for k, v in low.items()}
    (_, got), grad = run(name, low)
    (_, want), exact = run(name, high)
    assert got[0].dtype == got[1].dtype == jnp.float32 and grad.dtype == jnp.bfloat16
    assert float(got[1]) == float(want[1])
    # Had the log-softmax run in bfloat16, this would be off by 1e-3.
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(grad.astype(float), exact.astype(float), rtol=1e-2, atol=1e-6)


@every_loss
@pytest.mark.parametrize("scale", [1e3, 1e5])
def test_finite_at_extreme_inputs(name, scale, data):
    big = {k: v.astype(np.float32) if v.dtype == float else v for k, v in data.items()}
    for k in ("logits", "teacher", "sums", "other", "ref", "ref_other"):
        big[k] = big[k] * np.float32(scale)
    (got, _), grad = run(name, big)
    assert np.isfinite(got) and np.all(np.isfinite(grad))


@every_masked_loss
def test_a_batch_without_labels_is_zero_over_zero(name, data):
    empty = {**data, "mask": np.zeros((B, W)), "rows": np.zeros_like(data["rows"])}
    assert [float(x) for x in run(name, empty)[0][1]] == [0.0, 0.0]


@pytest.mark.parametrize("spec", [("data", None, None), ("data", None, "model")])
@pytest.mark.parametrize("name", ["nll", "kl", "asu, seq_mean", "npo, raw_logits"])
def test_eight_devices_agree_with_one(name, spec):
    rng = np.random.default_rng(2)
    mask = rng.integers(2, size=(8, W))
    data = {
        "logits": rng.normal(size=(8, W, 16)),
        "teacher": rng.normal(size=(8, W, 16)),
        "targets": rng.integers(16, size=(8, W)),
        "mask": mask,
    }
    shape = (8, 1) if spec[2] is None else (4, 2)
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = {
        k: jax.device_put(v, NamedSharding(mesh, PartitionSpec(*spec[: v.ndim])))
        for k, v in data.items()
    }
    _, loss, _, _ = LOSSES[name]
    fn = jax.jit(jax.value_and_grad(lambda d: value(loss(d["logits"], d)), allow_int=True))
    got, want = fn(placed), fn(data)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
    np.testing.assert_allclose(got[1]["logits"], want[1]["logits"], rtol=1e-10, atol=1e-16)


# ---- published and hand-computed numbers -----------------------------------------------------


def arr(*values):
    return jnp.array(values, jnp.float64)


@pytest.mark.parametrize(
    ("make", "want"),
    [
        (lambda: losses.npo(arr(-5), arr(-4), beta=0.1), 12.8879332),
        (lambda: losses.npo(arr(-5, -9), arr(-4, -6), beta=0.1), 11.9875190),
        (lambda: losses.npo(arr(-5, -9), arr(-4, -6), beta=0.1, compat="batch_mean"), 11.9627774),
        (lambda: losses.npo(arr(-7), arr(-7), beta=0.3), 2 / 0.3 * math.log(2)),
        (lambda: losses.simnpo(arr(-8), arr(4), beta=2.5, delta=0.5), 0.0185964),
        (lambda: losses.dpo(arr(-3), arr(-5), arr(-6), arr(-4), beta=0.1), 10.2603050),
        (lambda: losses.answer_preservation(arr(-4), arr(-6), beta=0.1), 5.9813887),
        (lambda: losses.kl(jnp.log(arr(0.5, 0.3, 0.2)), jnp.log(arr(0.7, 0.2, 0.1))), 0.0920329),
        (lambda: losses.kl(jnp.log(arr(0.7, 0.2, 0.1)), jnp.log(arr(0.5, 0.3, 0.2))), 0.0851228),
    ],
)
def test_known_values(make, want):
    np.testing.assert_allclose(value(make()), want, atol=6e-8)


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_npo_at_the_reference_is_ascent_on_sequence_sums(beta):
    sums = arr(-5, -9, -2)
    grad = jax.grad(lambda x: value(losses.npo(x, sums, beta=beta)))(sums)
    np.testing.assert_allclose(grad, np.full(3, 1 / 3), rtol=1e-12)


def test_npo_tends_to_ascent_and_its_weight_falls_once_forgotten():
    ref, sums = arr(-4, -6, -3), arr(-5, -1, -90)
    grad = jax.grad(lambda x: value(losses.npo(x, ref, beta=1e-4)))(sums)
    np.testing.assert_allclose(grad, np.full(3, 1 / 3), rtol=5e-3)
    np.testing.assert_allclose(grad[:2], np.full(2, 1 / 3), rtol=1e-3)
    gaps = jnp.linspace(-50.0, 50.0, 21)  # log pi_ref - log pi, S - S_ref
    weights = jax.grad(lambda x: losses.npo(x, jnp.zeros(21), beta=0.1)[0])(-gaps)
    assert np.all(weights > 0) and np.all(weights < 2) and np.all(np.diff(weights) < 0)


def test_npo_batch_mean_is_below_the_sequence_form():
    rng = np.random.default_rng(3)
    for _ in range(20):
        sums, ref = -rng.uniform(0, 40, 5), -rng.uniform(0, 40, 5)
        each = value(losses.npo(sums, ref, beta=0.3))
        assert value(losses.npo(sums, ref, beta=0.3, compat="batch_mean")) <= each + 1e-12


def test_simnpo_ignores_length_and_npo_does_not():
    once = losses.simnpo(arr(-8), arr(4)), losses.npo(arr(-8), arr(-4))
    twice = losses.simnpo(arr(-16), arr(8)), losses.npo(arr(-16), arr(-8))
    np.testing.assert_allclose(once[0][0], twice[0][0], rtol=1e-14)
    assert not np.isclose(once[1][0], twice[1][0])


def test_dpo_swap_flips_the_margin():
    args = arr(-3), arr(-5), arr(-6), arr(-4)
    one, swapped = losses.dpo(*args), losses.dpo(args[1], args[0], args[3], args[2])
    # softplus(x) - softplus(-x) = x, with x = -beta * margin and margin = 4
    np.testing.assert_allclose(one[0] - swapped[0], -2 * 4, rtol=1e-12)


def test_dpo_at_the_reference_has_a_gradient_free_of_beta():
    args = arr(-3, -4), arr(-5, -2)
    for beta in (0.1, 1.0):
        fn = jax.grad(lambda x, y, b=beta: value(losses.dpo(x, y, *args, beta=b)), (0, 1))
        chosen, rejected = fn(*args)
        np.testing.assert_allclose(chosen, np.full(2, -0.5), rtol=1e-12)
        np.testing.assert_allclose(rejected, np.full(2, 0.5), rtol=1e-12)


def test_kl_is_not_negative_and_zero_with_zero_gradient_at_the_teacher(data):
    values = losses.token_kl(data["teacher"], data["logits"])
    assert np.all(values > 0)
    term, grad = jax.value_and_grad(lambda z: losses.kl(data["teacher"], z, data["mask"])[0])(
        data["teacher"]
    )
    assert abs(float(term)) < 1e-14 and np.abs(grad).max() < 1e-15


def test_asu_gradient_is_student_minus_teacher(data):
    def loss(teacher, student):
        return value(losses.asu_forget(teacher, student, data["mask"]))

    to_teacher, grad = jax.grad(loss, (0, 1))(data["teacher"], data["logits"])
    count = data["mask"].sum(1, keepdims=True)
    rows = (count > 0).sum()
    scale = data["mask"] / np.maximum(count, 1) / rows
    want = (jax.nn.softmax(data["logits"]) - jax.nn.softmax(data["teacher"])) * scale[..., None]
    np.testing.assert_allclose(grad, want, atol=1e-14)
    assert not np.any(to_teacher)


def test_asu_reductions_differ_on_ragged_batches_only(data):
    def both(mask):
        return [
            float(value(losses.asu_forget(data["teacher"], data["logits"], mask, reduction=r)))
            for r in ("seq_mean", "token_mean")
        ]

    assert abs(np.subtract(*both(data["mask"]))) > 1e-3
    np.testing.assert_allclose(*both(np.ones((B, W))), rtol=1e-12)
    with pytest.raises(ValueError, match="unknown reduction"):
        losses.asu_forget(data["teacher"], data["logits"], data["mask"], reduction="mean")


def test_skip_first_takes_one_label_from_each_row(data):
    left = losses.skip_first_label(data["mask"])
    assert left.sum(1).tolist() == [max(n - 1, 0) for n in LENGTHS]
    for before, after in zip(data["mask"], np.asarray(left), strict=True):
        gone = np.flatnonzero(before != after)
        assert gone.tolist() == np.flatnonzero(before)[:1].tolist()


def test_a_teacher_may_forbid_tokens():
    teacher, student = jnp.array([[0.0, -jnp.inf, 1.0]]), jnp.array([[0.0, -jnp.inf, 3.0]])
    got, grad = jax.value_and_grad(lambda z: losses.kl(teacher, z)[0])(student)
    want = losses.kl(teacher[:, ::2], student[:, ::2])[0]
    np.testing.assert_allclose(got, want, rtol=1e-14)
    assert np.all(np.isfinite(grad)) and grad[0, 1] == 0


def test_raw_logit_forms_move_with_a_constant_and_npo_does_not(data):
    z, ref, shift = data["logits"], data["teacher"], 1.5
    assert not np.allclose(losses.npo_raw_logits(z + shift, ref), losses.npo_raw_logits(z, ref))
    np.testing.assert_allclose(
        losses.token_log_probs(z + shift, data["targets"]),
        losses.token_log_probs(z, data["targets"]),
        rtol=1e-12,
    )


def test_tofu_concat_is_one_token_mean(data):
    short = losses.idk(data["logits"][1:], data["targets"][1:], data["mask"][1:])
    long = losses.nll(data["logits"][:1], data["targets"][:1], data["mask"][:1])
    whole = losses.nll(data["logits"], data["targets"], data["mask"])
    np.testing.assert_allclose(value(losses.merge_terms(short, long)), value(whole), rtol=1e-12)


def test_log_probs_stay_exact_where_logits_are_large():
    z = jnp.array([[1e4, 1e4 - 1, 1e4 - 2]], jnp.float32)
    want = log_softmax([0.0, -1.0, -2.0])
    for target in range(3):
        got = losses.token_log_probs(z, jnp.array([target]))
        np.testing.assert_allclose(got, want[target], rtol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda d: losses.nll(d["logits"], d["targets"], d["mask"][:, :1]),
        lambda d: losses.npo(d["sums"], d["ref"], d["rows"][:, None]),
        lambda d: losses.kl(d["teacher"][:, :1], d["logits"], d["mask"]),
    ],
)
def test_shapes_never_broadcast(call, data):
    with pytest.raises((AssertionError, ValueError)):
        call(data)


@pytest.mark.parametrize(
    "call",
    [
        lambda: losses.npo(arr(-1), arr(-1), compat="batchmean"),
        lambda: losses.npo(arr(-1), arr(-1), compat="token_mean"),
        lambda: losses.simnpo(arr(-1), arr(1), compat="batch_mean"),
        lambda: losses.dpo(arr(-1), arr(-1), arr(-1), arr(-1), compat="tofu"),
    ],
)
def test_unknown_compat_forms_are_errors(call):
    with pytest.raises(ValueError, match="compat"):
        call()
