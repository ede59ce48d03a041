"""Vision transformers: against a float64 reference that reads the files by itself, and in files."""

import functools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlib_unlearn import objectives
from jaxlib_unlearn.errors import UserError
from jaxlib_unlearn.objectives import Context
from jaxlib_unlearn.optim.matrices import labels
from jaxlib_unlearn.optim.zeroth_order.leaves import layout_of
from jaxlib_unlearn.optim.zeroth_order.perturbations import Factored
from models.decoder import lora, selection
from models.files import vit_files
from models.files.vit_files import LoadedViT
from models.files.weights import flatten
from models.layout import path_str
from models.learner import AskedClassifier
from models.vision.vit import ViT, ViTConfig, ViTLearner

SIDE, PATCH, COLOURS, WIDTH, MLP, LAYERS, HEADS, CLASSES = 8, 4, 3, 12, 20, 3, 3, 5
CONFIG = ViTConfig(
    SIDE, PATCH, COLOURS, WIDTH, MLP, LAYERS, HEADS, CLASSES, norm_eps=1e-6,
    activation="gelu_new", mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2),
)  # fmt: skip
NAMES = tuple("abcde")


def random_params(vit):
    draw = np.random.default_rng(0)

    def one(path, leaf):
        value = 0.3 * draw.standard_normal(leaf.shape) + path_str(path).endswith("scale")
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(one, vit.shapes())


@pytest.fixture(scope="module")
def loaded():
    return LoadedViT(CONFIG, random_params(ViT(CONFIG)), NAMES)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (4, SIDE, SIDE, COLOURS)).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(loaded, tmp_path_factory):
    return vit_files.export(loaded, tmp_path_factory.mktemp("vit") / "model")


@functools.partial(jax.jit, static_argnums=0)
def run(vit, params, images):
    return vit.logits(params, images)


def logits(loaded, images):
    return np.asarray(run(ViT(loaded.config), loaded.params, jnp.asarray(images)))


def norm(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def reference(t, image):
    """One image in float64, from the arrays of an ImageNet-21k file."""
    x = (image / 255 - np.array(CONFIG.mean)) / np.array(CONFIG.std)
    rows = [t["cls"][0, 0]]
    for top in range(0, SIDE, PATCH):
        for left in range(0, SIDE, PATCH):
            patch = x[top : top + PATCH, left : left + PATCH]
            rows.append(
                np.einsum("xyc,xycd->d", patch, t["embedding/kernel"]) + t["embedding/bias"]
            )
    x = np.stack(rows) + t["Transformer/posembed_input/pos_embedding"][0]
    for i in range(LAYERS):
        at = f"Transformer/encoderblock_{i}"
        attention = f"{at}/MultiHeadDotProductAttention_1"
        y = norm(x, t[f"{at}/LayerNorm_0/scale"], t[f"{at}/LayerNorm_0/bias"])
        out = t[f"{attention}/out/bias"]
        for h in range(HEADS):
            q, k, v = (
                y @ t[f"{attention}/{n}/kernel"][:, h] + t[f"{attention}/{n}/bias"][h]
                for n in ("query", "key", "value")
            )
            scores = q @ k.T / np.sqrt(WIDTH // HEADS)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out = out + weights @ v @ t[f"{attention}/out/kernel"][h]
        x = x + out
        y = norm(x, t[f"{at}/LayerNorm_2/scale"], t[f"{at}/LayerNorm_2/bias"])
        y = y @ t[f"{at}/MlpBlock_3/Dense_0/kernel"] + t[f"{at}/MlpBlock_3/Dense_0/bias"]
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + y @ t[f"{at}/MlpBlock_3/Dense_1/kernel"] + t[f"{at}/MlpBlock_3/Dense_1/bias"]
    x = norm(x[0], t["Transformer/encoder_norm/scale"], t["Transformer/encoder_norm/bias"])
    return x @ t["head/kernel"] + t["head/bias"]


def published(classes=CLASSES):
    """The arrays of a checkpoint in ImageNet-21k's layout."""
    draw, heads = np.random.default_rng(2), (HEADS, WIDTH // HEADS)
    shapes = {
        "cls": (1, 1, WIDTH),
        "Transformer/posembed_input/pos_embedding": (1, (SIDE // PATCH) ** 2 + 1, WIDTH),
        "embedding/kernel": (PATCH, PATCH, COLOURS, WIDTH),
        "embedding/bias": (WIDTH,),
        "Transformer/encoder_norm/scale": (WIDTH,),
        "Transformer/encoder_norm/bias": (WIDTH,),
        "pre_logits/kernel": (WIDTH, WIDTH),
        "pre_logits/bias": (WIDTH,),
        "head/kernel": (WIDTH, classes),
        "head/bias": (classes,),
    }
    for i in range(LAYERS):
        at = f"Transformer/encoderblock_{i}"
        for name in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{at}/{name}/scale": (WIDTH,), f"{at}/{name}/bias": (WIDTH,)}
        for name, wide in (("Dense_0", (WIDTH, MLP)), ("Dense_1", (MLP, WIDTH))):
            shapes[f"{at}/MlpBlock_3/{name}/kernel"] = wide
            shapes[f"{at}/MlpBlock_3/{name}/bias"] = wide[1:]
        attention = f"{at}/MultiHeadDotProductAttention_1"
        for name in ("query", "key", "value"):
            shapes[f"{attention}/{name}/kernel"] = (WIDTH, *heads)
            shapes[f"{attention}/{name}/bias"] = heads
        shapes[f"{attention}/out/kernel"] = (*heads, WIDTH)
        shapes[f"{attention}/out/bias"] = (WIDTH,)
    return {
        name: (0.3 * draw.standard_normal(shape) + name.endswith("scale")).astype(np.float32)
        for name, shape in shapes.items()
    }


def test_a_published_checkpoint_against_the_reference(tmp_path, images):
    arrays = published()
    np.savez(tmp_path / "ViT.npz", **arrays)
    found = vit_files.load(tmp_path / "ViT.npz", NAMES)
    assert found.config.image_size == SIDE and found.config.activation == "gelu_new"
    shape = found.config.__class__(**{**vars(found.config), "mean": CONFIG.mean, "std": CONFIG.std})
    want = np.stack([reference(arrays, image) for image in images])
    ours = logits(found._replace(config=shape), images)
    assert np.abs(want).max() > 0.5
    assert np.abs(ours - want).max() <= 1e-5 * np.abs(want).max()
    # As a folder it is the same model.
    again = vit_files.load(vit_files.export(found, tmp_path / "folder"))
    assert (again.config, again.names) == (found.config, NAMES)
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)


def test_another_number_of_classes_starts_with_a_head_of_zeros(tmp_path, folder, loaded, images):
    np.savez(tmp_path / "ViT.npz", **published(classes=21))
    for path in (tmp_path / "ViT.npz", folder):
        found = vit_files.load(path, ("cat", "dog"))
        assert found.config.num_classes == 2 and not np.any(logits(found, images))
    assert np.any(logits(vit_files.load(folder, NAMES), images))


def test_a_head_is_kept_for_its_own_classes_alone(tmp_path, folder, loaded, images):
    """As many of other names get zeros, the same ones in another order their own logits."""
    want = logits(loaded, images)
    for names, columns in ((NAMES, range(5)), ("cbaed", (2, 1, 0, 4, 3)), (5, range(5))):
        found = vit_files.load(folder, names)
        np.testing.assert_array_equal(logits(found, images), want[:, list(columns)])
        assert ("in another order" in found.note) == (names == "cbaed")
        assert found.names == (tuple(names) if names != 5 else NAMES)
    for names in ("abcdf", "aabcd", "01234"):
        found = vit_files.load(folder, tuple(names))
        assert not np.any(logits(found, images)) and "is of other classes" in found.note
    # A .npz file names no classes: their number is all there is.
    np.savez(tmp_path / "ViT.npz", **published())
    found = vit_files.load(tmp_path / "ViT.npz", tuple("vwxyz"))
    assert np.any(logits(found, images)) and found.note == ""


def test_an_export_is_the_same_to_the_last_bit(folder, loaded):
    found = vit_files.load(folder)
    assert (found.config, found.names) == (CONFIG, NAMES)
    jax.tree.map(np.testing.assert_array_equal, found.params, loaded.params)
    assert vit_files.is_vit(folder) and not vit_files.is_vit(folder.parent)
    half = vit_files.export(loaded, folder.parent / "half", dtype="bfloat16", card=lambda at: "hi")
    assert (half / "README.md").read_text() == "hi"
    kernel = vit_files.load(half).params["layers"]["mlp"]["up"]["kernel"]
    assert np.abs(kernel - loaded.params["layers"]["mlp"]["up"]["kernel"]).max() < 0.01
    vit_files.export(loaded, half)  # in its place
    (half / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"no earlier export \(notes.txt\)"):
        vit_files.export(loaded, half)


def broken(name, folder, tmp_path):
    """A model that cannot be read."""
    if name.endswith("npz"):
        arrays, path = published(), tmp_path / "ViT.npz"
        if name == "objects.npz":
            arrays["cls"] = np.array([[{"a": 1}]])
        elif name == "missing.npz":
            del arrays["Transformer/encoderblock_1/LayerNorm_0/bias"]
        elif name == "no block.npz":
            arrays = {k: v for k, v in arrays.items() if "encoderblock_1/" not in k}
        np.savez(path, **arrays)
        if name == "cut.npz":
            path.write_bytes(path.read_bytes()[:-50])
        elif name == "pickle.npz":
            path.write_bytes(pickle.dumps([1, 2]))
        return path
    path, config = tmp_path / "folder", json.loads((folder / "config.json").read_text())
    path.mkdir()
    tensors = load_file(folder / "model.safetensors")
    if name == "tensors":
        tensors["vit.embeddings.cls_token"] = np.zeros((1, 1, 4), np.float32)
        tensors["vit.odd"] = tensors.pop("vit.layernorm.bias")
    save_file(tensors, path / "model.safetensors")
    changes = {"type": {"model_type": "bert"}, "activation": {"hidden_act": "quick_gelu"}}
    changes |= {"patch": {"patch_size": 3}, "typo": {"num_chanels": 3}, "sides": {}}
    config |= changes.get(name, {})
    if name == "sides":
        config["image_size"] = [8, 12]
    elif name == "typo":
        del config["num_channels"]
    (path / "config.json").write_text(json.dumps(config))
    return path


BROKEN = {
    "objects.npz": "cls holds Python objects, which are never unpickled",
    "missing.npz": "missing: Transformer/encoderblock_1/LayerNorm_0/bias; use",
    "no block.npz": "a block is missing",
    "cut.npz": "cannot be read, truncated or damaged",
    "pickle.npz": "cannot be read, truncated or damaged",
    "tensors": r"missing: vit.layernorm.bias; wrong shape: .* unknown: vit.odd",
    "type": "model_type 'bert' is no vision transformer",
    "activation": "hidden_act 'quick_gelu' is not supported",
    "patch": "3 does not divide 8",
    "typo": "'num_chanels' is unknown, and 'num_channels' is absent",
    "sides": "no square",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read(name, folder, tmp_path):
    with pytest.raises(UserError, match=BROKEN[name]) as caught:
        vit_files.load(broken(name, folder, tmp_path), NAMES)
    assert "\n" not in str(caught.value)


def test_pixels_are_normalised_in_the_model(loaded, images):
    floats = (images / 255 - np.array(CONFIG.mean)) / np.array(CONFIG.std)
    np.testing.assert_allclose(
        logits(loaded, images), logits(loaded, floats.astype(np.float32)), rtol=2e-5, atol=2e-6
    )
    with pytest.raises(ValueError, match="the model reads"):
        logits(loaded, images[:, 1:])


def test_optimizers_see_its_matrices(loaded):
    found = flatten(labels(loaded.params))
    muon = {path for path, label in found.items() if label == "muon"}
    assert muon == {
        f"layers/{name}/kernel"
        for name in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/up", "mlp/down")
    }
    leaves = {leaf.path: leaf for leaf in layout_of(loaded.params).leaves}
    for path, (fan_in, fan_out) in {
        "patch_embed/kernel": (PATCH * PATCH * COLOURS, WIDTH),  # a kernel, not a table
        "positions/embedding": (WIDTH, (SIDE // PATCH) ** 2 + 1),
        "head/kernel": (WIDTH, CLASSES),
        "layers/mlp/up/kernel": (WIDTH, MLP),
    }.items():
        axes = leaves[path].axes
        assert axes is not None and axes.sizes(leaves[path].shape) == (1, fan_in, fan_out)


def batch_of(images):
    return {"image": jnp.asarray(images), "gold": jnp.arange(len(images)) % CLASSES}


@functools.partial(jax.jit, static_argnames=("layer_map", "train_from"))
def loss(params, batch, **options):
    row, settings = objectives.resolve("classes", objectives.LEARNING)
    learner = ViTLearner(ViT(CONFIG))
    context = learner.context(params, None, {"train": batch}, row.questions(settings), **options)
    assert isinstance(context, Context)
    total, rows = row.loss(context, {"train": batch}, settings)["train"]
    return total / rows


def test_its_objective_is_the_cross_entropy(loaded, images):
    batch = batch_of(images)
    found = np.asarray(logits(loaded, images), np.float64)
    want = np.mean(
        [np.log(np.exp(z).sum()) - z[g] for z, g in zip(found, batch["gold"], strict=True)]
    )
    assert float(loss(loaded.params, batch)) == pytest.approx(want, rel=1e-5)


def test_adapters_and_chosen_blocks(loaded, images):
    batch = batch_of(images)
    adapters = lora.init(loaded.params, 2, ["q", "down"])
    params, layer_map = lora.bind(adapters, loaded.params, scale=1.0)
    same = loss(params, batch, layer_map=layer_map)
    assert float(same) == float(loss(loaded.params, batch))  # B is zero

    chosen = selection.select(loaded.params, ["mlp/up", "head/kernel"], [1, 2])
    assert chosen.train_from == 1
    assert selection.select(loaded.params, ["patch_embed", "up"]).train_from == 0
    trainable, rest = selection.split(loaded.params, chosen)

    def chosen_loss(trainable):
        params, layer_map = selection.bind(trainable, rest, chosen=chosen, dtype=jnp.float32)
        return loss(params, batch, layer_map=layer_map, train_from=1)

    found = jax.jit(jax.grad(chosen_loss))(trainable)
    want = jax.jit(jax.grad(loss))(loaded.params, batch)
    for mine, whole in (
        (found["layers"]["mlp"]["up"]["kernel"], want["layers"]["mlp"]["up"]["kernel"][1:]),
        (found["head"]["kernel"], want["head"]["kernel"]),
    ):
        assert np.linalg.norm(mine - whole) <= 1e-6 * np.linalg.norm(whole) > 0


def test_factored_leaves_are_their_sums(loaded, images):
    draw = np.random.default_rng(3)

    def factored(x, table):
        left, right = (draw.standard_normal((n, 2)).astype(np.float32) for n in x.shape)
        return Factored(x, 0.1 * left, right), x + 0.1 * left @ right.T

    moved, summed = dict(loaded.params), dict(loaded.params)
    for path in ViTLearner.factored:
        owner, name = path.split("/")
        pair = factored(loaded.params[owner][name], name == "embedding")
        moved[owner], summed[owner] = (loaded.params[owner] | {name: x} for x in pair)
    vit = ViT(CONFIG)
    np.testing.assert_allclose(
        run(vit, moved, images), run(vit, summed, images), rtol=1e-4, atol=1e-4
    )


def test_asked_twice_it_computes_once(loaded, images, monkeypatch):
    batch, calls = batch_of(images), []
    real = ViT.logits
    monkeypatch.setattr(ViT, "logits", lambda *a, **k: calls.append(1) or real(*a, **k))
    model = AskedClassifier(functools.partial(ViT(CONFIG).logits, loaded.params))
    assert model.classes(batch) is model.classes(batch) and len(calls) == 1
