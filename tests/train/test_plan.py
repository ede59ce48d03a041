"""Plans: slices that exist, FLOPs against closed forms, errors before anything is compiled."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_unlearn.errors import UserError
from models.decoder import labels
from models.files.architectures import ALIASES, ARCHITECTURES, config_of
from models.files.weights import find_smollm2
from train import plan
from train.costs import collectives, flops, hlo, hlo_flops, topology
from train.plan import needed_bytes
from train.planning import programs
from train.planning.planned import PLANNERS, PlanConfig
from train.presets import PRESETS, arguments
from train.runtime import sharding

on_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
without_libtpu = importlib.util.find_spec("libtpu") is None
KEYS = {
    "chips",
    "hbm_bytes_per_chip",
    "argument_bytes",
    "temp_bytes",
    "peak_bytes",
    "flops_per_chip",
    "optimizer_flops_per_chip",
    "collectives",
    "roofline_seconds",
    "fits",
}
SMALL = ("--unlearn.batch-size", "8", "--length", "32", "--model.vocab-size", "256")


def config(*args: str, preset: str = "quickstart") -> PlanConfig:
    return arguments.read_arguments(arguments.UNLEARN, [preset, *args], PlanConfig, "train.plan")


def run(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "train.plan", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


# Slices


@pytest.mark.parametrize(
    "name", [f"{k}:{s}" for k, shapes in topology.SLICES.items() for s in shapes]
)
def test_slices_are_known_and_have_chips(name):
    kind, shape = topology.check_topology(name)
    assert kind in topology.TPUS
    assert len(shape.split("x")) == (2 if kind in ("v5e", "v6e") else 3)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("v5e:32x32", ("v5e:32x32 does not exist", "v5e:8x8", "v5e:16x16")),
        ("v5e:8x8x8", ("does not exist", "v5e:8x8")),
        ("v5p:8x8", ("does not exist", "v5p:8x8x8")),
        ("v5x:8x8", ("v5x", "did you mean", "v5e")),
        ("cpu:none", ("cpu:8",)),
        ("gpu:0", ("gpu:8",)),
    ],
)
def test_a_slice_that_does_not_exist_names_those_that_do(name, parts):
    with pytest.raises(UserError) as error:
        topology.check_topology(name)
    assert all(part in str(error.value) for part in parts), error.value


def test_without_libtpu_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[tpu\]'"):
        topology.find_topology("v5e:8x8")


@on_devices
def test_gpus_that_are_not_there():
    with pytest.raises(UserError, match="no GPU is present"):
        topology.find_topology("gpu:8")


# Models without weights


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_shapes_read(name):
    shape = config_of(name)
    assert shape.num_heads % shape.num_kv_heads == 0


def parameters(name: str) -> float:
    """Billions of parameters, from the shapes alone."""
    from models import Decoder

    return sum(x.size for x in jax.tree.leaves(Decoder(config_of(name)).shapes())) / 1e9


def test_published_numbers_of_parameters():
    """Those on the models' cards, to the digits given there."""
    assert round(parameters("meta-llama/Meta-Llama-3-8B-Instruct"), 2) == 8.03
    assert round(parameters("meta-llama/Meta-Llama-3-70B-Instruct"), 1) == 70.6
    assert round(parameters("meta-llama/Llama-3.2-1B-Instruct"), 2) == 1.24
    assert round(parameters("meta-llama/Llama-3.2-3B-Instruct"), 2) == 3.21
    assert round(parameters("Qwen/Qwen2.5-Math-7B"), 2) == 7.62
    assert round(parameters("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"), 1) == 14.8
    assert round(parameters(ALIASES["smollm2"]), 4) == 0.1345


def test_smollm2_is_what_its_file_says():
    path = find_smollm2()
    if path is None:
        pytest.skip("needs make smollm2")
    from models.files.gguf_files import opened

    with opened(path) as (shape, _, _):
        assert config_of("smollm2") == shape


def test_an_unknown_model_names_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"config\.json.*meta-llama/Meta-Llama-3-8B-Instruct"):
        config_of(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(ARCHITECTURES[ALIASES["smollm2"]]))
    assert config_of(str(tmp_path)) == config_of("smollm2")


# Work


def closed_form(shape, batch: int, length: int, labels: int) -> int:
    """Products of one forward pass: kernels, attention scores and values, head at the labels."""
    tokens, wide = batch * length, shape.num_heads * shape.head_dim
    kernels = shape.hidden_size * (2 * wide + 2 * shape.num_kv_heads * shape.head_dim)
    kernels += 3 * shape.hidden_size * shape.intermediate_size
    attention = 2 * wide * length
    layers = 2 * tokens * shape.num_layers * (kernels + attention)
    return layers + 2 * batch * labels * shape.hidden_size * shape.vocab_size


@on_devices
def test_the_walker_and_the_compiled_program_give_the_closed_form():
    """A scanned model: `cost_analysis` would count one layer of four."""
    run_config = config("--topology", "cpu:8", *SMALL)
    decoder = programs.decoder_of(run_config)
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 8, 1))
    program = programs.score_program(run_config, decoder, mesh, 32, 16)
    rows = program.args[2]["tokens"].shape[0]
    traced = program.call.trace(*program.args)
    wanted = closed_form(decoder.config, rows, 32, 16)
    assert flops.count_jaxpr(traced.jaxpr).flops == wanted
    compiled = traced.lower().compile()
    assert 8 * hlo_flops.device_flops(compiled).flops == wanted
    assert compiled.cost_analysis()["flops"] < wanted / 8  # what we must not use


def test_unused_work_is_not_counted():
    def both(x):
        return x @ x, jnp.sum(x @ x @ x)

    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert flops.flops(lambda x: both(x)[0], x) == 2 * 4**3
    assert flops.flops(both, x) == 3 * 2 * 4**3


# A projection to 32 heads as on TPUs, and a conditional.
HEADS = "window={size=32 pad=31_31 rhs_reversal=1}, dim_labels=bf0_0oi->b0f"
SCOPE = 'metadata={op_name="jit(f)/optimizer/dot_general"}'
TPU_TEXT = f"""HloModule m
%fused (p0: bf16[512,64,1], p1: bf16[32,128,64]) -> bf16[512,32,128] {{
  %p0 = bf16[512,64,1]{{1,0,2}} parameter(0)
  %p1 = bf16[32,128,64]{{2,1,0}} parameter(1)
  ROOT %c = bf16[512,32,128]{{0,2,1}} convolution(%p0, %p1), {HEADS}
}}

%small (p: f32[8,8]) -> f32[8,8] {{
  %p = f32[8,8]{{1,0}} parameter(0)
  ROOT %d = f32[8,8]{{1,0}} convolution(%p, %p), dim_labels=bf_io->bf, {SCOPE}
}}

%large (p: f32[8,8]) -> f32[8,8] {{
  %p = f32[8,8]{{1,0}} parameter(0)
  %d = f32[8,8]{{1,0}} convolution(%p, %p), dim_labels=bf_io->bf
  ROOT %e = f32[8,8]{{1,0}} convolution(%d, %p), dim_labels=bf_oi->bf
}}

ENTRY %main (x: f32[8,8], i: s32[], a: bf16[512,64,1], b: bf16[32,128,64]) -> f32[8,8] {{
  %x = f32[8,8]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
  %a = bf16[512,64,1]{{1,0,2}} parameter(2)
  %b = bf16[32,128,64]{{2,1,0}} parameter(3)
  %f = bf16[512,32,128]{{0,2,1}} fusion(%a, %b), kind=kOutput, calls=%fused
  ROOT %r = f32[8,8]{{1,0}} conditional(%i, %x, %x), branch_computations={{%small, %large}}
}}
"""


def test_products_in_the_text_of_a_tpu_program():
    """Batched products are convolutions in which all but one tap of a window covers padding."""
    projection = 2 * 512 * 64 * 32 * 128
    assert hlo_flops.device_flops(TPU_TEXT).flops == projection + 2 * 2 * 8**3
    assert hlo_flops.device_flops(TPU_TEXT, "optimizer").flops == 2 * 8**3


WINDOWED_TEXT = """HloModule jit_f, is_scheduled=true

%cond (c: (u32[], s32[], bf16[2,512,8,128,1])) -> pred[] {
  %limit = u32[]{:T(128)} constant(4)
  %c = (u32[], s32[], bf16[2,512,8,128,1]) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %go = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (c: (u32[], s32[], bf16[2,512,8,128,1])) -> (u32[], s32[], bf16[2,512,8,128,1]) {
  %two = u32[]{:T(128)} constant(2)
  %c = (u32[], s32[], bf16[2,512,8,128,1]) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%c), index=0
  %here = u32[]{:T(128)S(6)} copy(%i)
  %next = u32[]{:T(128)} add(%here, %two), backend_config={"flag_configs":[]}
  %n = s32[] get-tuple-element(%c), index=1
  %x = bf16[2,512,2,512,1]{3,1,0,2,4} constant({...})
  %w = bf16[8,128,2,512,1]{3,1,2,0,4} constant({...})
  %y = bf16[2,512,8,128,1]{3,1,4,2,0} convolution(%x, %w), window={size=1x8x2 pad=0_0x7_7x0_0 rhs_reversal=0x1x0}, dim_labels=0b2f1_1o2i0->0b1f2
  ROOT %t = (u32[], s32[], bf16[2,512,8,128,1]) tuple(%next, /*index=1*/%n, %y)
}

ENTRY %main (c: (u32[], s32[], bf16[2,512,8,128,1])) -> (u32[], s32[], bf16[2,512,8,128,1]) {
  %c = (u32[], s32[], bf16[2,512,8,128,1]) parameter(0)
  ROOT %r = (u32[], s32[], bf16[2,512,8,128,1]) while(%c), condition=%cond, body=%body
}
"""  # noqa: E501


@pytest.mark.parametrize(("step", "trips"), [(2, 2), (1, 4), (3, 2)])
def test_a_product_whose_operand_goes_round(step, trips):
    """The partitioner's loop for a collective matmul: two steps per trip, axes in any order."""
    text = WINDOWED_TEXT.replace("constant(2)", f"constant({step})")
    found = hlo_flops.device_flops(text)
    assert found.flops == trips * 2 * (2 * 512 * 8 * 128) * (2 * 512)
    assert not found.unknown_loops
    # A count that the text does not give is not guessed.
    assert hlo_flops.device_flops(
        text.replace("add(%here, %two)", "multiply(%here, %two)")
    ).unknown_loops


def test_a_conditional_counts_as_its_dearest_branch():
    def fn(i, x):
        return jax.lax.switch(i, [lambda x: x @ x, lambda x: x @ x @ x, lambda x: x], x)

    text = jax.jit(fn).lower(jnp.int32(0), jnp.ones((16, 16))).compile()
    assert hlo_flops.device_flops(text).flops == 2 * 2 * 16**3


def test_traffic_of_slices_and_updates_counts_the_slice():
    """A scan reads and writes one row of its stacks per trip, not the whole stacks."""

    def fn(xs):
        return jax.lax.scan(lambda c, x: (c, jnp.sin(x)), 0.0, xs)[1]

    program = hlo.parse(jax.jit(fn).lower(jnp.ones((64, 1024))).compile())
    whole = 64 * 1024 * 4
    assert 2 * whole <= hlo_flops.device_bytes(program) < 6 * whole


# Plans


@on_devices
@pytest.mark.parametrize(
    ("optimizer", "names"),
    [
        ("muon", ("train", "score", "generate")),
        *(pytest.param(n, ("train",), marks=pytest.mark.slow) for n in ("adamw", "sift", "mezo")),
    ],
)
def test_a_plan_for_virtual_devices(optimizer, names):
    args = ("--topology", "cpu:8", "--optimizer.name", optimizer, "--mesh.fsdp", "8", *SMALL)
    found = plan.plan(config(*args, "--programs", *names))
    assert found.keys() >= KEYS
    assert found["chips"] == 8 and found["fits"] and found["compiled"]
    all_of_them = ["train", "score", "prefill", "decode"]
    assert list(found["programs"]) == all_of_them[: 1 if names == ("train",) else None]
    assert found["peak_bytes"] >= found["argument_bytes"] > 0
    assert found["roofline_seconds"] == {"compute": None, "hbm": None, "interconnect": None}
    step = found["programs"]["train"]
    # A device does at least its share of the work.
    assert step["flops_per_chip"] >= 0.95 * step["asked_flops_per_chip"] > 0
    if optimizer in ("muon", "sift"):
        asked = step["asked_optimizer_flops_per_chip"]
        assert 0.5 * asked <= step["optimizer_flops_per_chip"] <= 1.05 * asked
        assert "all-to-all" in step["optimizer_collectives"]
    json.dumps(found)
    assert "fits" in plan.table(found)


@on_devices
def test_weights_are_not_gathered_once_a_label_chunk():
    """The head is gathered once for all of a stream's labels; gradients come back in parts."""
    args = ("--topology", "cpu:8", "--mesh.fsdp", "8", "--objective.name", "npo", *SMALL)
    step = plan.plan(config(*args, "--programs", "train"))["programs"]["train"]
    decoder = programs.decoder_of(config(*args))
    size = sum(4 * x.size for x in jax.tree.leaves(decoder.shapes()))
    moved = sum(c["bytes"] for c in step["collectives"].values())
    # Two streams: weights forward and backward, gradients (as all-reduces on CPUs), activations.
    assert moved < 2 * 5 * size, (moved, size)


@on_devices
def test_the_head_travels_twice_however_many_chunks_and_streams(monkeypatch):
    """To every device, and its gradient back: chunks and streams are summed on the devices."""
    monkeypatch.setattr(labels, "LOGITS_BYTES", 4 * 256 * 8)  # eight labels
    args = ("--topology", "cpu:8", "--mesh.fsdp", "8", "--objective.name", "npo", *SMALL)
    planned = config(*args)
    decoder = programs.decoder_of(planned)
    mesh = sharding.make_mesh(planned.mesh, jax.devices()[:8])
    program = programs.train_program(planned, decoder, mesh, 32, 32)
    text = program.call.lower(*program.args, **program.static).compile().as_text()
    head = 4 * decoder.shapes()["embed"]["embedding"].size
    assert text.count("while(") >= 4  # layers and chunks, forward and backward
    # A layer's matrices are larger; some sums of small gradients share the head's all-reduce.
    moved = [c for c in collectives.collectives(text) if head <= c.bytes < 1.1 * head]
    found = sorted((c.kind, c.times) for c in moved)
    assert found == [("all-gather", 1), ("all-reduce", 1)], moved


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ((), ("--topology", "v5e:8x8")),
        (("--topology", "cpu:8", "--mesh.tp", "8"), ("--mesh.tp 8", "4 attention heads")),
        (("--topology", "cpu:8", "--mesh.fsdp", "16"), ("needs 16 devices", "8 are present")),
        (("--topology", "cpu:8", "--unlearn.batch-size", "12"), ("does not divide", "multiple")),
        (("--topology", "cpu:8", "--programs", "tarin"), ("tarin", "train")),
        (("--topology", "cpu:8", "--labels", "900"), ("--labels 900",)),
        (("--topology", "cpu:8", "--model.path", "nowhere"), ("nowhere", "config.json")),
        (("--topolgy", "cpu:8"), ("--topolgy", "did you mean --topology")),
    ],
)
@on_devices
def test_bad_input_is_one_line_before_anything_is_compiled(args, parts, monkeypatch):
    monkeypatch.setattr(plan, "account", lambda *a: pytest.fail("compiled"))
    with pytest.raises(UserError) as error:
        plan.main(["quickstart", *args])
    assert all(part in str(error.value) for part in parts), error.value


# What of a preset's run is as large as its step, for each program.
OF_PROGRAMS = {
    "epic-tiny": (
        *("--model.hidden-size", "48", "--data.row-tokens", "32"),
        *("--train.batch-size", "2"),
    ),
    "sst2-opt-13b": ("--length", "16", "--options", "3"),
    "sst2-smollm2": ("--length", "16", "--lora.rank", "2", "--optimizer.name", "adamw"),
}


@on_devices
@pytest.mark.parametrize("preset", OF_PROGRAMS)
def test_the_steps_of_other_programs(preset, monkeypatch):
    """The step that is planned takes the shapes that are asked for; it is not compiled here."""
    row = next(row for row in PLANNERS.values() if preset in row.presets)
    args = [preset, *OF_PROGRAMS[preset], "--topology", "cpu:2"]
    config = row.read(args, row.config, "train.plan")
    plan.check(config)
    found, mesh = row.planned(config, jax.devices()[:2])
    (program,) = found.programs
    state, _, frozen, batches = program.args
    rows = config.train.batch_size
    width = {"epic-tiny": 32, "sst2-opt-13b": 15, "sst2-smollm2": 15}[preset]
    tokens = batches["train"]["tokens"].shape
    assert tokens[0] == rows and width <= tokens[1] <= max(width, 16)
    assert f"{rows} rows of {max(width, 16)} tokens" in program.unit
    size = sum(x.size for x in jax.tree.leaves(state.params))
    if preset == "sst2-opt-13b":
        assert batches["train"]["options"].shape == (rows, 3)
        assert round(size / 1e9, 1) == 12.9 and found.update() is None
    if preset == "sst2-smollm2":  # adapters, beside the frozen model
        assert size < 1e6 < 1e8 < sum(x.size for x in jax.tree.leaves(frozen))
    program.call.lower(*program.args)
    assert found.knobs({"train": {"fits": True}}) == []
    advice = found.knobs({"train": {"fits": False}})
    assert advice[-1] == "a larger --topology"
    assert ("--lora.rank 16" in advice) == (preset == "sst2-opt-13b")
    # Without a backward pass there is nothing to compute again.
    assert ("--model.remat full" in advice) == (preset != "sst2-opt-13b")


@on_devices
def test_images_are_not_planned():
    with pytest.raises(UserError, match="--task fashion-mnist is not planned; .* sst2, rte"):
        plan.main(["vit-fashion", "--topology", "cpu:2"])


def test_the_command_line_prints_one_object_or_one_line():
    done = run("quickstart", "--topology", "cpu:2", "--programs", "score", "--json", *SMALL)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() >= KEYS - {"optimizer_flops_per_chip"}
    failed = run("quickstart", "--topology", "v5e:3x3")
    assert failed.returncode == 2
    assert failed.stdout == "" and failed.stderr.count("\n") == 1 and "v5e:2x2" in failed.stderr


def test_what_a_compiler_that_ran_out_of_memory_needed():
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (19.38G) exceeds available HBM (15.75G)."
    )
    assert needed_bytes(said) == int(19.38 * 2**30)
    assert needed_bytes("INVALID_ARGUMENT: something else") is None


@pytest.mark.parametrize("name", ["tofu-npo-llama3-8b", "tofu-npo-llama3-70b"])
def test_presets_of_large_models(name):
    preset = PRESETS[name].PRESET
    decoder = programs.decoder_of(preset)
    assert preset.preset == name and preset.model.dtype == "bfloat16"
    assert decoder.config.num_layers == (32 if "8b" in name else 80)
    assert preset.objective.name == "npo" and preset.mesh.fsdp == -1
    for optimizer, dtype in (("adamw", None), ("muon", "bfloat16"), ("teon", "bfloat16")):
        found = config("--topology", "cpu:8", "--optimizer.name", optimizer, preset=name)
        assert getattr(found.optimizer, "comm_dtype", None) == dtype


# For TPUs, with libtpu


@pytest.mark.libtpu
@pytest.mark.skipif(without_libtpu, reason="needs libtpu: make tpu")
@pytest.mark.parametrize("name", [f"{k}:{s[0]}" for k, s in topology.SLICES.items()] + ["v4:4x4x4"])
def test_slices_have_the_devices_that_programs_see(name):
    found = topology.find_topology(name)
    assert len(found.devices) == found.chips * found.chip.devices


@pytest.mark.libtpu
@pytest.mark.skipif(without_libtpu, reason="needs libtpu: make tpu")
def test_meshes_follow_the_links():
    """A torus line is an axis; two slices are joined by the outermost axis, and by no other."""
    topology.find_topology("v5e:2x2")  # libtpu's environment
    from jax.experimental import topologies

    def devices(name, **options):
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices

    mesh = sharding.make_mesh(sharding.MeshConfig(4, 8, 1), list(devices("v5e:4x8"))[::-1])
    for line in mesh.devices.reshape(4, 8):
        assert len({d.coords[0] for d in line}) == 1 or len({d.coords[1] for d in line}) == 1
    two = list(devices("v5e:2x4", num_slices=2))
    for sizes in ((2, 8), (4, 4), (-1, 2), (1, 8, 1, 2)):
        mesh = sharding.make_mesh(sharding.MeshConfig(*sizes), two[::-1])
        halves = np.split(mesh.devices.reshape(-1), 2)
        assert [{d.slice_index for d in half} for half in halves] == [{0}, {1}]
    with pytest.raises(UserError, match="2 TPU slices .* --mesh.data"):
        sharding.make_mesh(sharding.MeshConfig(1, 16, 1), two)


@pytest.mark.libtpu
@pytest.mark.skipif(without_libtpu, reason="needs libtpu: make tpu")
@pytest.mark.parametrize("optimizer", ["muon", "sift"])
def test_a_plan_for_a_small_slice(optimizer):
    args = ("--topology", "v5e:2x2", "--optimizer.name", optimizer, "--mesh.fsdp", "4", *SMALL)
    found = plan.plan(config(*args))
    assert found.keys() >= KEYS and found["fits"] and found["chips"] == 4
    assert all(seconds > 0 for seconds in found["roofline_seconds"].values())
    step = found["programs"]["train"]
    assert step["flops_per_chip"] >= 0.9 * step["asked_flops_per_chip"]
    if optimizer == "muon":  # the text also shows the products inside SIFT's decompositions
        assert step["flops_per_chip"] <= 1.1 * step["asked_flops_per_chip"]


@pytest.mark.libtpu
@pytest.mark.skipif(without_libtpu, reason="needs libtpu: make tpu")
def test_matrices_travel_as_narrow_as_they_are_told_to():
    """CPUs widen every bfloat16 collective, so this is seen on TPUs alone."""
    args = ("--topology", "v5e:2x2", "--optimizer.name", "muon", "--mesh.fsdp", "4", *SMALL)
    moved = {}
    for dtype in ("float32", "bfloat16"):
        more = ("--programs", "train", "--optimizer.comm-dtype", dtype)
        step = plan.plan(config(*args, *more))["programs"]["train"]
        assert step["optimizer_collectives"].keys() == {"all-to-all"}
        moved[dtype] = step["optimizer_collectives"]["all-to-all"]
    assert moved["float32"]["count"] == moved["bfloat16"]["count"]
    assert moved["float32"]["bytes"] == 2 * moved["bfloat16"]["bytes"] > 0


@pytest.mark.libtpu
@pytest.mark.skipif(without_libtpu, reason="needs libtpu: make tpu")
@pytest.mark.slow
def test_llama3_8b_on_64_chips():
    """NPO with a cached reference: fits, and Muon costs at most 1.15 times a step without it."""
    args = ("--topology", "v5e:8x8", "--programs", "train")
    found = plan.plan(config(*args, "--optimizer.name", "muon", preset="tofu-npo-llama3-8b"))
    assert found["fits"] and found["peak_bytes"] < 15.75 * 2**30
    rest = found["flops_per_chip"] - found["optimizer_flops_per_chip"]
    assert found["flops_per_chip"] / rest <= 1.15
    # The peer, one matrix after the other.
    peer = plan.plan(config(*args, "--optimizer.name", "optax-muon", preset="tofu-npo-llama3-8b"))
    assert peer["peak_bytes"] > 1.5 * found["peak_bytes"]
