"""Plans of a text-to-image model: what is trained, what is drawn, and the work of both."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from jaxlib_unlearn.errors import UserError
from models.diffusion import layers as diffusion_layers
from models.diffusion.clip_text import ClipTextConfig
from models.diffusion.unet import UNetConfig
from models.diffusion.vae import VAEConfig
from models.files.diffusers_parts import PARTS
from models.files.weights import flatten
from train import plan
from train.costs import flops
from train.planning import diffusion_programs as programs
from train.planning.planned import PLANNERS, planned_diffusion

on_devices = pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
without_libtpu = importlib.util.find_spec("libtpu") is None
TINY = {
    "text_encoder": ClipTextConfig(12, 8, 16, 1, 2, num_positions=5),
    "unet": UNetConfig(
        4, channels=(8,), attends=(True,), layers_per_block=1, num_heads=2, cross_attention_dim=8,
        norm_groups=4,
    ),
    "vae": VAEConfig(8, channels=(4, 8), layers_per_block=1, norm_groups=2),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The configurations of a small model, without a tensor."""
    where = tmp_path_factory.mktemp("tiny")
    index = {name: [part.library, part.kind] for name, part in PARTS.items()}
    index |= {"_class_name": "StableDiffusionPipeline"}
    (where / "model_index.json").write_text(json.dumps(index))
    for name in ("scheduler", "tokenizer", *PARTS):
        (where / name).mkdir()
    for name, config in TINY.items():
        (where / name / "config.json").write_text(json.dumps(PARTS[name].write(config)))
    return where


def read(*args: str) -> programs.DiffusionPlanConfig:
    return programs.read_arguments(["sd14", *args], program="train.plan")


def planned(folder, *args: str):
    """The programs of the small model by name; nothing is compiled."""
    config = read("--topology", "cpu:4", "--model.path", str(folder), *args)
    programs.check(config)
    found, _ = planned_diffusion(config, jax.devices()[:4])
    return {program.name: program for program in found.programs}, found


def test_the_sizes_are_those_of_stable_diffusion():
    models = programs.models_of(read())
    denoiser = models.denoiser.shapes()
    count = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in denoiser.items()}
    assert count == {"text_encoder": 123_060_480, "unet": 859_520_964}
    assert sum(x.size for x in jax.tree.leaves(models.vae.shapes())) == 83_653_863
    assert models.denoiser.unet.config.dtype == models.vae.config.dtype == "bfloat16"


def test_the_work_of_a_forward_pass(monkeypatch):
    """Within 2 % of the count of another program; what is more are products with padding."""
    models = programs.models_of(read("--model.dtype", "float32"))
    work = programs.forward_work(models)
    for name, counted in (("UNet", 790e9), ("VAE decoder", 2505e9)):
        assert work[name]["counted"] == counted
        assert work[name]["flops"] == pytest.approx(counted, rel=0.02)
    # XLA leaves the padding out, and counts the body of a loop once: attention without a loop.
    monkeypatch.setattr(diffusion_layers, "MOST_SCORES", 2**40)
    unet = models.denoiser.unet
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 64, 64, 4), (1,), (1, 77, 768))
    ]
    cost = jax.jit(unet.apply).lower(unet.shapes(), *shapes).cost_analysis()
    assert cost is not None and cost["flops"] == pytest.approx(790e9, rel=0.005)


def test_other_sizes_have_no_other_count(folder):
    work = programs.forward_work(programs.models_of(read("--model.path", str(folder))))
    assert all(part["flops"] > 0 and part["counted"] is None for part in work.values())
    lines = plan.table({**RESULT, "forward": work}).splitlines()
    assert lines[-1].startswith("VAE decoder, one row forward: ") and "counts" not in lines[-1]


RESULT = {
    "preset": "sd14", "model": "m", "optimizer": "adamw", "topology": "cpu:4", "chips": 4,
    "mesh": {}, "hbm_bytes_per_chip": 2**30, "programs": {}, "knobs": [],
}  # fmt: skip


@on_devices
def test_an_erasing_step_trains_cross_attention(folder):
    found, all_of_it = planned(folder, "--programs", "train")
    state, _, frozen, batches = found["train"].args
    trained = flatten(state.params)
    assert trained and all("/attn2/" in path for path in trained)
    # The frozen model shares all other leaves with it.
    assert flatten(frozen["start"]).keys() == trained.keys()
    everything = flatten(programs.models_of(read("--model.path", str(folder))).denoiser.shapes())
    assert flatten(frozen["rest"]).keys() == everything.keys() - trained.keys()
    assert all(x.sharding is not None for x in jax.tree.leaves((state.params, frozen)))
    assert batches.keys() == {"forget", "retain"}
    assert batches["forget"]["latents"].shape == (8, 4, 4, 4)
    assert batches["forget"].keys() - batches["retain"].keys() == {"other_tokens"}
    assert "2 x 8 rows" in found["train"].unit
    alone, _ = planned(folder, "--programs", "train", "--objective.keep", "none")
    assert alone["train"].args[3].keys() == {"forget"}
    update, shapes = all_of_it.update()
    jax.eval_shape(update, *shapes)


@on_devices
def test_an_attack_step_has_no_gradient_of_the_model(folder):
    found, _ = planned(folder, "--programs", "attack", "--model.remat", "none")
    program = found["attack"]
    state, _, frozen, batches = program.args
    assert {path.split("/")[0] for path in flatten(state.params)} == {"network"}
    assert frozen["rest"].keys() == {"text_encoder", "unet", "basis"} and frozen["start"] is None
    assert frozen["rest"]["basis"]["embedding"].shape == (8, 5)
    assert batches["train"]["latents"].shape == (6, 4, 4, 4)
    # Forward, and back to the prompts: a gradient of the kernels would be a third of that.
    models = programs.models_of(read("--model.path", str(folder)))
    forward = programs.forward_work(models)["UNet"]["flops"]
    asked = flops.count_jaxpr(program.call.trace(*program.args).jaxpr).flops / 6
    assert 1.5 * forward < asked < 2.5 * forward


@on_devices
@pytest.mark.slow  # two large traces
def test_an_attack_step_is_less_work_than_a_training_step():
    """At the sizes of v1.4, for as many rows: there is no gradient of the model's weights."""
    args = ("--topology", "cpu:4", "--mesh.data", "1", "--mesh.tp", "1", "--model.remat", "none")
    whole = ("--objective.name", "denoise", "--train.leaves", "None", "--erase.batch-size", "6")
    work = {}
    for name, more in (("attack", ()), ("train", whole)):
        found, _ = planned_diffusion(read(*args, "--programs", name, *more), jax.devices()[:4])
        (program,) = found.programs
        work[name] = flops.count_jaxpr(program.call.trace(*program.args).jaxpr).flops
    assert work["attack"] <= 0.75 * work["train"]


@on_devices
def test_samples_are_guided_in_one_scan(folder):
    # With `tp` the decoder's only head would be padded to two.
    args = ("--mesh.data", "4", "--mesh.tp", "1", "--sample.images", "4")
    found, _ = planned(folder, "--programs", "sample", "decode", *args)
    assert list(found) == ["sample", "decode"]
    models = programs.models_of(read("--model.path", str(folder)))
    work = programs.forward_work(models)

    def asked(program):
        return flops.count_jaxpr(program.call.trace(*program.args).jaxpr).flops

    passes = 50 * 2 * 4 * work["UNet"]["flops"]  # beside these, each text is encoded once
    assert passes < asked(found["sample"]) < 1.05 * passes
    assert asked(found["decode"]) == 4 * work["VAE decoder"]["flops"]
    assert "50 passes over 8 rows" in found["sample"].unit
    assert found["decode"].unit == "4 images of 8 x 8"
    assert found["decode"].args[0].keys() == {"post_quant_conv", "decoder"}
    more, _ = planned(folder, "--programs", "sample", "--sample.sampler", "pndm")
    assert "51 passes" in more["sample"].unit


@on_devices
def test_a_plan_for_virtual_devices(folder):
    args = ("--topology", "cpu:4", "--model.path", str(folder), "--programs", "sample", "decode")
    found = plan.plan(read(*args))
    assert list(found["programs"]) == ["sample", "decode"] and found["fits"]
    for program in found["programs"].values():
        assert program["compiled"] and program["peak_bytes"] >= program["argument_bytes"] > 0
        # Of a 3 x 3 convolution over 4 x 4 pixels 11 / 36 are padding, which the compiled program's
        # count leaves out.
        assert program["flops_per_chip"] >= 25 / 36 * program["asked_flops_per_chip"] > 0
    json.dumps(found)
    text = plan.table(found)
    assert f"sd14: {folder} in bfloat16, adamw, on cpu:4" in text
    assert "UNet, one row forward: " in text


@on_devices
@pytest.mark.slow  # a minute of compilation
def test_steps_for_virtual_devices(folder):
    args = ("--topology", "cpu:4", "--model.path", str(folder), "--programs", "train", "attack")
    found = plan.plan(read(*args))
    assert list(found["programs"]) == ["train", "attack"] and found["fits"]
    assert found["programs"]["train"]["asked_optimizer_flops_per_chip"] == 0  # of AdamW, products


@on_devices
def test_what_does_not_fit_has_knobs(folder):
    _, found = planned(folder, "--model.remat", "none")
    bad, good = {"fits": False}, {"fits": True}
    assert found.knobs({"train": good, "sample": good}) == []
    advice = found.knobs({"train": bad, "attack": bad, "decode": bad})
    assert {"--model.remat full", "--erase.accumulate 2", "--sample.images: fewer"} <= {*advice}
    assert "--attack.accumulate 2" not in advice  # three rows a device are not halved
    assert advice[-1] == "a larger --topology"
    assert found.knobs({"sample": bad}) == ["--sample.images: fewer", "a larger --topology"]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ((), ("--topology", "v5e:8x8")),
        (("--programs", "tarin"), ("tarin", "did you mean", "train")),
        (("--programs", "score"), ("score", "train", "decode")),
        (("--model.path", "nowhere"), ("nowhere: no such folder", "model_index.json")),
        (("--model.dtype", "float61"), ("--model.dtype", "bfloat16")),
        (("--model.remat", "half"), ("--model.remat", "full")),
        (("--train.leaves", "atn2"), ("--train.leaves atn2", "attn2")),
        (("--train.blocks", "1"), ("--train.blocks 1", "no stack of blocks")),
        (("--attack.batch-size", "5"), ("attack batch size 5", "multiple of 2")),
        (("--attack.tokens", "768"), ("--attack.tokens 768", "767")),
        (("--attack.tokens", "0"), ("--attack.tokens", "at least 1")),
        (("--erase.batch-size", "3"), ("erasing batch size 3", "multiple of 2")),
        (("--mesh.data", "1", "--mesh.tp", "16"), ("needs 16 devices", "4 are present")),
        (("--sample.images", "3"), ("sample batch size 3", "multiple of 2")),
        (("--sample.steps", "2000"), ("2000 steps", "1 to 1000")),
        (("--sample.sampler", "ddmi"), ("--sample.sampler", "ddim")),
        (("--objective.name", "npo"), ("npo", "esd")),
        (("--optimizer.name", "teon"), ("teon", "--optimizer.name muon")),
        (("--optimizer.name", "rowwise"), ("rowwise", "--mesh.data")),
        (("--combine", "blur", "--objective.keep", "none"), ("--combine blur", "forget alone")),
        (("--erase.batch", "3"), ("--erase.batch", "did you mean --erase.batch-size")),
    ],
)
@on_devices
def test_bad_input_is_one_line_before_anything_is_compiled(args, parts, monkeypatch):
    monkeypatch.setattr(plan, "account", lambda *a: pytest.fail("compiled"))
    where = ("--topology", "cpu:4") if args else ()
    with pytest.raises(UserError) as error:
        plan.main(["sd14", *where, *args])
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value)


def test_parts_of_two_models_are_refused(folder, tmp_path):
    for path in folder.rglob("*"):
        here = tmp_path / path.relative_to(folder)
        here.mkdir(parents=True, exist_ok=True) if path.is_dir() else here.write_bytes(
            path.read_bytes()
        )
    wide = json.loads((tmp_path / "unet" / "config.json").read_text()) | {"cross_attention_dim": 16}
    (tmp_path / "unet" / "config.json").write_text(json.dumps(wide))
    with pytest.raises(UserError, match="cross_attention_dim 16, .*hidden_size 8"):
        programs.check(read("--model.path", str(tmp_path)))


def test_the_preset_is_listed(capsys):
    plan.main(["--help"])
    assert "sd14" in capsys.readouterr().out
    assert PLANNERS["train.diffuse"].presets.keys() == {"sd14"}


# For TPUs, with libtpu


@pytest.mark.libtpu
@pytest.mark.skipif(without_libtpu, reason="needs libtpu: make tpu")
@pytest.mark.slow  # minutes
def test_a_small_model_on_a_small_slice(folder):
    args = ("--topology", "v5e:2x2", "--model.path", str(folder))
    found = plan.plan(read(*args))
    assert found["fits"] and found["chips"] == 4
    assert list(found["programs"]) == ["train", "attack", "sample", "decode"]
    for program in found["programs"].values():
        assert all(seconds > 0 for seconds in program["roofline_seconds"].values())


@pytest.mark.libtpu
@pytest.mark.skipif(without_libtpu, reason="needs libtpu: make tpu")
@pytest.mark.slow  # 2 to 16 minutes each; the compiler needs more than 13 GB for train
@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_stable_diffusion_on_four_chips(name):
    """Every program within the memory of a chip, and no device repeats most of the work."""
    found = plan.plan(read("--topology", "v5e:2x2", "--programs", name))
    program = found["programs"][name]
    assert program["fits"] and program["peak_bytes"] < 15.75 * 2**30
    assert program["flops_per_chip"] < 1.5 * program["asked_flops_per_chip"]
