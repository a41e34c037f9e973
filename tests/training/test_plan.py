"""Plans of a layout: what they call legal a run takes, what they choose fits, and a run that chooses keeps its choice."""

import dataclasses
import itertools
import json
import xml.etree.ElementTree

import jax
import jax.numpy as jnp
import pytest
from runs import SMALL, command_line, here

from jaxtrain import config as config_lib
from jaxtrain import load_config, plan
from jaxtrain.config import Config
from jaxtrain.data import registry
from jaxtrain.errors import ConfigError, DeviceMemoryError
from jaxtrain.host.targets import cpu_target
from jaxtrain.models.layers import relu
from jaxtrain.parallel.topology import compiler_problem
from jaxtrain.recipes import change
from jaxtrain.step.footprint import layer_footprint
from jaxtrain.step.pipeline import schedule as schedules
from jaxtrain.training.jax_settings import settings
from jaxtrain.training.plan.auto import memory_remedies
from jaxtrain.training.plan.candidates import Axes, Legal, candidates, in_flight
from jaxtrain.training.plan.picture import picture
from jaxtrain.training.plan.problem import Machine
from jaxtrain.training.plan.search import make_problem
from jaxtrain.training.setup import make_run_spec
from jaxtrain.training.startup_report import layout_table

# Six layers with BatchNorm, dropout and mixup; widths that some axes divide and others do not.
VARIED = {
    "data.name": "synthetic", "data.examples": 480, "data.global_batch": 48, "data.mixup": 0.2, "model.name": "tiny:resnet",
    "model.width": 4, "model.bn_groups": 4,
}  # fmt: skip


def config_of(fields) -> Config:
    return config_lib.from_dict(config_lib.nested_dicts(load_config("configs/mlp_synthetic.py", fields)))


def mlp(**fields) -> Config:
    return change(config_of({"model.width": 64, "data.global_batch": 64}), **fields)


def table_of(config: Config, dataset, devices):
    """Where every leaf of the run lies; or the `ConfigError` of what does not go together."""
    run = make_run_spec(config, dataset, devices)
    return layout_table(run, jax.eval_shape(run.init, 0))


# ------------------------------------------------------------------------------------------------------------- formulas


def test_the_footprint_of_a_layer_is_what_its_products_read_and_write():
    def layer(w, x):
        return relu(x @ w)

    w, x = jax.ShapeDtypeStruct((64, 128), jnp.float32), jax.ShapeDtypeStruct((8, 64), jnp.float32)
    found = layer_footprint(layer, w, x, first=False, platform="cuda")
    weights, before, after = 4 * 64 * 128, 4 * 8 * 64, 4 * 8 * 128
    assert found.output == after
    assert found.keeps_input
    assert found.stored + after * found.keeps_output == after  # ReLU's mask needs the product or its result, not both
    assert found.forward.flops == 2 * 8 * 64 * 128
    assert found.backward.flops == 2 * found.forward.flops
    assert found.forward.product_bytes == weights + before  # its result is written by the kernel of ReLU
    assert found.forward.moved == weights + before + after
    rematerialized = layer_footprint(jax.checkpoint(layer), w, x, first=False, platform="cuda")
    assert rematerialized.stored == 0
    assert not rematerialized.keeps_output
    assert rematerialized.backward.flops == 3 * found.forward.flops


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved_1f1b"])
def test_microbatches_in_flight_are_those_of_the_schedule(name):
    for stages, rounds in itertools.product((2, 3, 4), (1, 2, 5)):
        chunks = 2 if name == "interleaved_1f1b" else 1
        axes = Axes(stages, 1, 1, 1, 0, name, chunks)
        expected = schedules.in_flight(schedules.make_pipeline_schedule(name, stages, stages * rounds, chunks))
        assert in_flight(axes, stages * rounds) == expected


# -------------------------------------------------------------------------------------------------------- what is legal


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(VARIED, marks=pytest.mark.parity),
        pytest.param(VARIED | {"model.bn_groups": 1, "optim.name": "adamw"}, marks=pytest.mark.parity),
        {"model.width": 36, "data.global_batch": 40, "layout.tensor": 2},
        {"model.width": 64, "layout.keep": ("zero",), "data.mixup": 0.5},
        {"model.width": 64, "layout.keep": ("zero",), "optim.sync_every": 2, "optim.outer_momentum": 0.9},
        {"model.width": 36, "layout.keep": ("zero",), "optim.compress": "powersgd"},
    ],
    ids=["BatchNorm", "one group", "tensor kept", "zero kept", "local SGD", "compressed"],
)
def test_what_is_called_legal_a_run_takes_and_what_is_refused_it_refuses(fields):
    config = change(config_of(fields), **{"train.precision": "f32"})
    problem = make_problem(config, Machine.of(cpu_target(1, 8)))
    dataset, devices, legal, refused = registry.outline(config.data), jax.devices()[:8], 0, 0
    with settings(config):
        for each in itertools.islice(candidates(problem), 0, None, 5 if "data.examples" in fields else 1):
            layout = {f"layout.{name}": value for name, value in dataclasses.asdict(each.axes).items()}
            if isinstance(each, Legal):
                layout["layout.microbatches"] = each.microbatches[-1]
                table = table_of(change(config, **layout), dataset, devices)
                found = {tree: [leaf.bytes_per_device for leaf in leaves] for tree, leaves in table.items()}
                assert found == {
                    tree: [leaf.bytes_per_device for leaf in leaves] for tree, leaves in each.table.items()
                }
                legal += 1
            elif "no leaf of" not in each.why:  # that is what the audit of the compiled run says
                with pytest.raises(ConfigError):
                    table_of(change(config, **layout), dataset, devices)
                refused += 1
    assert legal > 3
    assert refused > 0 or fields.get("layout.tensor") == 2


def test_what_shards_keep_for_themselves_counts_and_what_they_send_seldom_does_not():
    """Of four devices with the whole model each: local weights and moments, or residuals; a sync every hundredth step."""
    kept = {
        "layout.data": 4,
        "layout.zero": 0,
        "layout.keep": ("data", "zero", "tensor", "stages", "microbatches", "remat"),
    }

    def planned(**fields):
        (row,) = plan(mlp(**kept, **fields), cpu_target(1, 4), compiled=0)["layouts"]
        return row["memory"]["optimizer"], row["wire_bytes"]["data"]

    (plain, sent), (local, seldom), (held, _) = (
        planned(), planned(**{"optim.sync_every": 100}), planned(**{"optim.compress": "topk"})
    )  # fmt: skip
    assert local > 2 * plain
    assert held > 1.4 * plain
    assert seldom == pytest.approx(sent / 100)


def test_kept_fields_stay_and_the_others_are_chosen():
    report = plan(mlp(**{"layout.zero": 2, "layout.keep": ("stages",)}), cpu_target(1, 4), compiled=0)
    assert report["kept"] == ["stages", "zero"]
    legal = [row for row in report["layouts"] if row["step_seconds"]]
    assert {(row["fields"]["layout.zero"], row["fields"]["layout.stages"]) for row in legal} == {(2, 1)}
    assert len({row["fields"]["layout.tensor"] for row in legal}) > 1


def test_a_plan_is_the_same_twice_and_says_why_not_in_a_few_words():
    first, second = (plan(mlp(), "2x4xh100", compiled=0) for _ in range(2))
    assert first == second
    assert first["best"] == first["layouts"][0]
    assert first["best"]["why_not"] == ""
    assert all(0 < len(row["why_not"].split()) <= 8 for row in first["layouts"][1:])
    legal = [row for row in first["layouts"] if row["step_seconds"]]
    for row in legal:
        assert row["peak_bytes"] == sum(row["memory"].values())
        assert row["step_seconds"] == pytest.approx(sum(row["seconds"].values()))


def test_a_slower_link_between_hosts_changes_the_order():
    wide = mlp(**{"model.width": 4096, "data.global_batch": 4096})
    names = {}
    for link in ("infiniband-ndr", "ethernet-10"):
        report = plan(wide, "8x8xh100", links=[f"between={link}"], compiled=0)
        legal = [row for row in report["layouts"] if row["step_seconds"] and row["fits"]]
        names[link] = [row["flags"] for row in legal]
        data = next(row for row in legal if row["mesh"]["data"] == 64 and row["fields"]["layout.zero"] == 0)
        sent = 2 * 63 / 64 * sum(4 * size for size in (4096 * 784 + 4096, 4096 * 2048 + 2048, 2048 * 10 + 10))
        assert data["wire_bytes"]["data"] == pytest.approx(sent, rel=0.5)
    assert sorted(names["infiniband-ndr"]) == sorted(names["ethernet-10"])
    assert names["infiniband-ndr"] != names["ethernet-10"]


# ------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parity
def test_what_is_predicted_to_fit_a_limit_fits_it_and_what_is_not_does_not():
    """The limit is between what two layouts need, as compiled for this machine's CPU devices."""
    free = mlp(**{"model.width": 512, "layout.keep": ("stages", "tensor", "replica", "microbatches")})
    needs = {}
    for zero in (0, 3):
        one = change(free, **{"layout.zero": zero, "layout.keep": (*free.layout.keep, "zero")})
        needs[zero] = plan(one, cpu_target(1, 4), compiled=1)
    sizes = {zero: report["layouts"][0]["peak_bytes"] for zero, report in needs.items()}
    assert all(report["layouts"][0]["compiled"] for report in needs.values())
    assert sizes[3] < sizes[0]
    limit = (sizes[0] + sizes[3]) / 2 / 2**30
    report = plan(change(free, **{"layout.memory_limit": limit}), cpu_target(1, 4), compiled=2)
    fits = {row["fields"]["layout.zero"]: row["fits"] for row in report["layouts"] if row["compiled"]}
    assert fits[0] is False
    assert fits[3] is True
    assert report["best"]["fields"]["layout.zero"] > 0
    assert report["best"]["peak_bytes"] <= limit * 2**30


@pytest.mark.parity
def test_a_layout_that_does_not_fit_as_compiled_gets_more_microbatches():
    one = mlp(
        **{
            "model.width": 64,
            "data.global_batch": 4096,
            "layout.keep": ("zero", "stages", "tensor", "replica", "remat"),
        }
    )
    whole, parts = (
        plan(
            change(one, **{"layout.microbatches": count, "layout.keep": (*one.layout.keep, "microbatches")}),
            cpu_target(1, 1),
            compiled=1,
        )
        for count in (1, 8)
    )
    least, most = (report["layouts"][0]["peak_bytes"] for report in (parts, whole))
    limit = (least + most) / 2 / 2**30
    report = plan(change(one, **{"layout.memory_limit": limit}), cpu_target(1, 1), compiled=1)
    assert report["best"]["compiled"]
    assert report["best"]["peak_bytes"] <= limit * 2**30
    assert report["best"]["fields"]["layout.microbatches"] > 1


def test_remedies_of_a_run_without_memory_need_less_and_are_flags_that_it_takes():
    config = mlp(**{"model.width": 512, "data.global_batch": 1024})
    found = memory_remedies(config, jax.devices()[:4])
    assert found
    for flags in found:
        pairs = [flag.removeprefix("--config.") for flag in flags.split()]
        fields = dict(pair.split("=") for pair in pairs)
        run = change(config, **{name: type(_field(config, name))(value) for name, value in fields.items()})
        make_run_spec(change(run, **{"train.precision": "f32"}), registry.outline(config.data), jax.devices()[:4])


def _field(config: Config, name: str):
    return config_lib.flatten(config_lib.to_dict(config))[name]


COMPILED = {
    "mlp": {"model.width": 2048, "data.global_batch": 2048},
    "mlp, 4 microbatches": {"model.width": 2048, "data.global_batch": 2048, "layout.zero": 2, "layout.microbatches": 4},
    "vgg11": {"model.name": "vgg11", "model.width": 32, "data.global_batch": 512, "data.image_size": 64},
    "resnet18, zero3": {
        "model.name": "resnet18",
        "model.width": 32,
        "data.global_batch": 512,
        "layout.zero": 3,
        "model.bn_groups": 2,
    },
}


@pytest.mark.skipif(bool(compiler_problem()), reason="needs XLA's GPU compiler: pip install -e '.[gpu-compiler]'")
@pytest.mark.gpu_program
@pytest.mark.parametrize("case", COMPILED)
def test_estimates_are_near_the_compiled_program(case):
    every = ("replica", "tensor", "zero", "microbatches", "stages", "schedule", "chunks", "remat")
    report = plan(config_of(COMPILED[case] | {"layout.keep": every}), "2xh100", compiled=1)
    (row,) = report["layouts"]
    assert row["compiled"]
    assert row["kernels"] > 0
    assert row["estimated_peak_bytes"] == pytest.approx(row["peak_bytes"], rel=0.35)


# ---------------------------------------------------------------------------------------------------------------- auto

AUTO = SMALL | {"layout.strategy": "auto", "train.epochs": 1}


def test_a_run_chooses_its_layout_and_keeps_it_on_the_same_devices(tmp_path):
    workdir = tmp_path / "run"
    here(workdir, AUTO | {"layout.keep": ("stages",)}, devices=2)
    stored = json.loads((workdir / "config.json").read_text())
    chosen = json.loads((workdir / "plan.json").read_text())
    assert stored["layout"]["strategy"] == "manual"
    assert {f"layout.{key}": value for key, value in stored["layout"].items()}.items() >= {
        key: value for key, value in chosen["fields"].items() if key.startswith("layout.")
    }.items()
    log = workdir / "logs" / "process_0.log"
    assert "layout chosen for 2xcpu" in log.read_text()
    here(workdir, AUTO | {"layout.keep": ("stages",), "train.epochs": 2}, devices=2)
    assert "layout (chosen at an earlier start, for the same devices)" in log.read_text()
    here(workdir, AUTO | {"layout.keep": ("stages",), "train.epochs": 3}, devices=1)
    assert "layout chosen for 1xcpu" in log.read_text()


@pytest.mark.faults
def test_a_run_that_fits_nowhere_says_what_needs_least(tmp_path):
    with pytest.raises(
        DeviceMemoryError, match=r"no layout of 2xcpu fits 1.0 MiB a device; what needs least, .* needs"
    ):
        here(
            tmp_path / "run",
            AUTO | {"layout.memory_limit": 2**-10, "model.width": 512, "layout.keep": ("stages", "tensor", "remat")},
            devices=2,
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.batch_per_device": 8}, "data.batch_per_device=8: a plan keeps the global batch"),
        ({"layout.tensor": 3}, "No layout of 2 devices is possible for this run"),
    ],
)
def test_what_auto_cannot_do_is_said(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        here(tmp_path / "run", AUTO | fields, devices=2)


# ------------------------------------------------------------------------------------------------------------- command

MLP = ("--config", "configs/mlp_synthetic.py")


def test_the_command_prints_a_table_json_and_a_picture(tmp_path, capsys):
    drawing = tmp_path / "plan.svg"
    assert command_line(["plan", *MLP, "--target", "8xh100", "--compile", "0", "--picture", str(drawing)]) == 0
    text = capsys.readouterr().out
    assert "formulas alone" in text
    assert "best: " in text
    assert "--config.layout.strategy=auto" in text
    assert xml.etree.ElementTree.fromstring(drawing.read_text()).tag.endswith("svg")
    assert command_line(["plan", *MLP, "--target", "8xh100", "--compile", "0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["best"]["fits"] is True
    assert picture(report) == drawing.read_text()


def test_the_command_finds_the_fewest_gpus_and_their_cost(capsys):
    words = ["plan", *MLP, "--target", "l4", "--fit", "--price", "0.8", "--json"]
    assert command_line(words) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["devices"] == 1
    assert row["cost"] == pytest.approx(0.8 * row["gpu_hours"])
    assert command_line([*words, "--config.layout.memory_limit=1.0001"]) == 1  # 1 GiB is cuDNN's
    (row,) = json.loads(capsys.readouterr().out)
    assert row["devices"] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "8xh100", "--link", "fast"], "--link fast: must be within=LINK"),
        (["--target", "8xh100", "--link", "between=etherne-10"], "ethernet-10"),
        (["--target", "8xh100", "--price", "2"], "--price is for --fit"),
        (["--target", "8xh100", "--fit"], "--fit counts GPUs itself"),
        (["--target", "h100", "--fit", "--price", "x"], "must be a price of a GPU an hour"),
        (["--target", "h100", "--fit", "--price", "h1000=2"], "there is no such GPU"),
        (
            ["--target", "8xh100", "--config.layout.keep=('zeros',)"],
            "config.layout.keep=('zeros',): must be names among",
        ),
    ],
)
def test_wrong_words_end_in_a_sentence(words, said, capsys):
    assert command_line(["plan", *MLP, *words]) == 64
    assert said in capsys.readouterr().err


def test_what_needs_one_layout_refuses_auto(capsys):
    assert command_line(["layout", *MLP, "--config.layout.strategy=auto"]) == 64
    assert "jaxtrain plan shows what it would choose" in capsys.readouterr().err
