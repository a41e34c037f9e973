"""`jaxtrain bench comm`: sums are right and send their bytes, links are fitted, and `jaxtrain plan` plans with them."""

from __future__ import annotations

import csv
import dataclasses
import json
import xml.etree.ElementTree

import jax
import pytest
import runs
from runs import command_line
from test_gpu_program import compiles

from jaxtrain.errors import ConfigError
from jaxtrain.host.links import Link, links_text, parse_link
from jaxtrain.parallel.bench import methods
from jaxtrain.parallel.bench.fit import fit_link
from jaxtrain.parallel.bench.measure import measure
from jaxtrain.parallel.bench.methods import METHODS
from jaxtrain.parallel.bench.programs import Case
from jaxtrain.recipes import resolve
from jaxtrain.training.plan.search import plan

# The error of a compressed sum without feedback; of the others 1e-6.
NEAR = {"bf16": 1e-2, "int8": 5e-2, "topk": 0.9, "randomk": 1.0, "powersgd": 1.0}
SENT = {"bf16": 1 / 2, "int8": 1 / 4, "randomk": 1 / 10, "powersgd": 4 * (64 + 64) / 4096}  # of the bytes of a ring
COMM = ["bench", "comm"]


@pytest.mark.parametrize("mesh", [(1, 3), (2, 2)], ids=str)
def test_each_method_adds_up_and_sends_its_bytes(mesh):
    replica, data = mesh
    n, numbers = replica * data, methods.numbers(1 << 14, replica, data)
    cases = [Case(method, replica, data, numbers) for method in METHODS.values()]
    results = list(measure(cases, jax.devices(), 2))
    assert [result.program.case for result in results] == cases
    for name, result in zip(METHODS, results, strict=True):
        assert 0 < result.error < NEAR.get(name, 1e-6) or n == 1
        assert len(result.seconds) == 2
        ring = 2 * (n - 1) / n * 4 * numbers
        if name == "tree" and n == 3:
            ring = 2 * 4 * numbers  # half of it twice, and all of it once
        if name == "topk":
            ring = (n - 1) * 8 * numbers / 10  # values and positions, to all others
        if name == "powersgd" and n == 3:
            continue  # 4098 numbers are 2049 x 2: of rank 2, nothing is saved
        assert result.program.sent == pytest.approx(SENT.get(name, 1) * ring, rel=0.01)


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    files = {option: tmp_path / name for option, name in (("csv", "c.csv"), ("plot", "p.svg"), ("save-fit", "f.json"))}
    words = [word for option, path in files.items() for word in (f"--{option}", str(path))]
    asked = [
        "--sizes",
        "1KiB,16KiB",
        "--axes",
        "2,2x2",
        "--reduce",
        "auto,ring",
        "--compress",
        "none,int8",
        "--repeats",
        "1",
    ]
    assert command_line([*COMM, *asked, *words]) == 0
    said = capsys.readouterr().out
    rows = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert len(rows) == 2 * 2 * 3
    assert {(row["replica"], row["data"], row["bytes"]) for row in rows} == {
        (*mesh, size) for mesh in (("1", "2"), ("2", "2")) for size in ("1024", "16384")
    }
    assert rows[1]["collectives"] == "2 x collective-permute of 512 B"
    assert all(f"{1e3 * float(row['seconds']):.3f}" in said for row in rows)
    drawing = xml.etree.ElementTree.fromstring(files["plot"].read_text())
    assert len(drawing.findall(".//{*}circle")) == len(rows)
    fitted = json.loads(files["save-fit"].read_text())
    for name in fitted["links"]:
        assert parse_link(f"{files['save-fit']}:{name}").bandwidth == fitted["links"][name]["bandwidth"]
        assert name in said


def test_a_program_that_sends_other_bytes_is_an_error(capsys, monkeypatch):
    ring, tree = METHODS["ring"], METHODS["tree"]
    double = dataclasses.replace(ring, add_up=lambda x, key: (ring.add_up(x, key) + tree.add_up(x, key)) / 2)
    monkeypatch.setitem(METHODS, "ring", double)
    assert command_line([*COMM, "--axes", "2", "--reduce", "ring", "--compress", "none", "--sizes", "1KiB"]) == 70
    said = capsys.readouterr().err
    assert "The program of ring over 1 x 2 devices sends 2,048 bytes a device and should send 1,024" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--reduce", "rings"], "--reduce rings: must be among auto, ring, tree, hierarchical."),
        (["--compress", "int4"], "--compress int4: must be among none, bf16, int8, topk, randomk, powersgd."),
        (["--sizes", "1KB"], "--sizes 1KB: must be bytes from 4 B to 4 GiB"),
        (["--sizes", "1KiB,0"], "--sizes 0: must be bytes"),
        (["--axes", "1"], "--axes 1: must be DATA or REPLICAxDATA"),
        (["--axes", "2x"], "--axes 2x: must be DATA"),
        (["--axes", "3x4"], "--axes 3x4 needs 12 devices, not 8 devices."),
        (["--devices", "1"], "A sum needs at least two devices, not 1 device"),
        (["--repeats", "0"], "--repeats 0: must be at least 1."),
        (["--csv", "nowhere/c.csv"], "--csv nowhere/c.csv: there is no such directory."),
        (["--save-fit", "links"], "--save-fit links: must be a file that ends with .json."),
        (["--target", "8xh100", "--plot", "p.svg"], "--plot is of times, and --target 8xh100 measures none."),
        (["--target", "8xh100", "--devices", "2"], "--target has its own devices"),
        (["--target", "8xh1000"], "there is no GPU 'h1000'"),
    ],
)
def test_wrong_words_end_in_a_sentence(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command_line([*COMM, *words]) == 64
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------- links


def test_a_link_is_found_from_its_times():
    messages, sent = [2, 2, 14, 14], [1e3, 1e7, 1e3, 1e7]
    link = Link("true", 5e9, 20e-6)
    times = [count * link.latency + size / link.bandwidth for count, size in zip(messages, sent, strict=True)]
    found = fit_link("found", messages, sent, times)
    assert found is not None
    assert found.link.bandwidth == pytest.approx(link.bandwidth)
    assert found.link.latency == pytest.approx(link.latency)
    assert found.median_error == pytest.approx(0, abs=1e-9)
    slower = fit_link("found", messages, sent, [2 * times[0], *times[1:]])
    assert slower is not None
    assert slower.median_error > 0.01


def test_no_link_where_the_times_do_not_say_one():
    assert fit_link("one", [2], [1e3], [1.0]) is None
    assert fit_link("flat", [2, 2], [1e3, 1e6], [1.0, 1e-3]) is None  # larger sums are faster
    free = fit_link("no latency", [2, 2], [1e3, 1e6], [1e-6, 1.1e-3])
    assert free is not None
    assert free.link.latency == 0


def test_a_plan_has_the_times_of_a_measured_link(tmp_path):
    """All of a step's collectives take twice as long on a link of half the speed."""
    file = tmp_path / "mine.json"
    fast, slow = Link("", 1e9, 20e-6), Link("", 0.5e9, 40e-6)
    file.write_text(links_text({"auto": fast, "ring": slow}, {"measured": "by hand"}))
    assert (parse_link(str(file)).bandwidth, parse_link(f"{file}:ring").latency) == (1e9, 40e-6)
    config = resolve(
        "mlp_synthetic", [("layout.keep", "('zero','tensor','replica','stages','microbatches','remat')")]
    ).config
    times = []
    for text in (str(file), f"{file}:ring"):
        report = plan(config, "4xl4", links=[f"within={text}"], compiled=0)
        assert report["within"] == text
        times.append(report["layouts"][0]["seconds"]["data collectives"])
    assert times[1] == pytest.approx(2 * times[0], rel=0.01)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "is no file of links; `jaxtrain bench comm --save-fit FILE` writes one."),
        ('{"links": {"auto": {"bandwidth": 1}}}', "is no file of links"),
        ('{"links": {"ring": {"bandwidth": 1, "latency": 0}}}', "has no link 'auto', only ring."),
        ('{"links": {"auto": {"bandwidth": 0, "latency": 0}}}', "has no bandwidth above 0"),
        ('{"links": {"auto": {"bandwidth": 1, "latency": NaN}}}', "or a latency below 0"),
    ],
)
def test_a_file_that_has_no_such_link_is_said(content, said, tmp_path):
    file = tmp_path / "links.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError) as error:
        parse_link(str(file))
    assert said in str(error.value)


# ----------------------------------------------------------------------------------------------- processes and targets


def test_two_processes_measure_together_and_one_speaks(tmp_path):
    words = ["--sizes", "1KiB", "--reduce", "auto,ring", "--compress", "none", "--repeats", "1", "--csv", "c.csv"]
    command = ["-m", "jaxtrain", "launch", "--nproc", "2", "--", *COMM, *words]
    with runs.Started(tmp_path / "output", command, cwd=tmp_path) as job:
        assert job.end() == 0, job.output
    rows = list(csv.DictReader((tmp_path / "c.csv").read_text().splitlines()))
    assert [(row["reduce"], row["data"]) for row in rows] == [("auto", "2"), ("ring", "2")]
    assert all(float(row["error"]) < 1e-6 for row in rows)
    assert job.output.count("every program sends the bytes of its formula") == 1


@compiles
@pytest.mark.gpu_program
@pytest.mark.parametrize("target", ["8xh100", "2x3xh200"])
def test_the_programs_of_gpus_send_their_bytes(target, tmp_path, capfd):
    assert command_line([*COMM, "--target", target, "--sizes", "1MiB", "--csv", str(tmp_path / "c.csv")]) == 0
    assert "compiled, not measured" in capfd.readouterr().out
    rows = {
        row["reduce"] if row["compress"] == "none" else row["compress"]: row
        for row in csv.DictReader((tmp_path / "c.csv").open())
    }
    assert list(rows) == list(METHODS)
    kinds = {name: {part.split()[2] for part in row["collectives"].split(", ")} for name, row in rows.items()}
    assert kinds["auto"] == {"all-reduce"}
    assert kinds["ring"] == kinds["tree"] == kinds["hierarchical"] == {"collective-permute"}
    assert kinds["bf16"] == kinds["int8"] == {"all-to-all", "all-gather"}
    assert kinds["topk"] == {"all-gather"}
    assert kinds["randomk"] == kinds["powersgd"] == {"all-reduce"}
    ring = 2 * (int(rows["ring"]["data"]) * int(rows["ring"]["replica"]) - 1)
    assert rows["ring"]["collectives"].startswith(f"{ring} x collective-permute")
    assert rows["hierarchical"]["sent_bytes"] == rows["auto"]["sent_bytes"]
