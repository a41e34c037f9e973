"""Pipeline schedules: each is complete and can be run, holds what theory says it holds, and takes the time it says it takes."""

import dataclasses
import random
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from jaxtrain.errors import ConfigError, JaxtrainError
from jaxtrain.step.pipeline.plot import svg
from jaxtrain.step.pipeline.schedule import (
    SCHEDULES,
    Op,
    PipelineSchedule,
    ScheduleError,
    check,
    gpipe,
    in_flight,
    interleaved,
    make_pipeline_schedule,
    one_forward_one_backward,
    total_order,
)
from jaxtrain.step.pipeline.timeline import Event, Timeline, ideal_bubble, simulate

TABLE = [
    (name, stages, microbatches, chunks)
    for name in SCHEDULES
    for stages in range(1, 7)
    for microbatches in range(1, 13)
    for chunks in (range(1, 4) if name == "interleaved_1f1b" else (1,))
    if name != "interleaved_1f1b" or microbatches % stages == 0
]


def read(text):
    """'F2.1 B0.3': the forward of chunk 2 on microbatch 1, then the backward of chunk 0 on microbatch 3."""
    return tuple(Op(word[0], *map(int, word[1:].split("."))) for word in text.split())


def needs(op, model_chunks):
    """The dependencies, written out a second time."""
    found = [("F", op.chunk - 1)] if op.kind == "F" else [("F", op.chunk), ("B", op.chunk + 1)]
    return [Op(kind, chunk, op.microbatch) for kind, chunk in found if 0 <= chunk < model_chunks]


def changed(schedule, stage, ops):
    rows = list(schedule.ops)
    rows[stage] = tuple(ops)
    return dataclasses.replace(schedule, ops=tuple(rows))


# ------------------------------------------------------------------------------------------------------------- orders


def test_small_schedules_are_those_of_the_papers():
    assert gpipe(2, 2).ops == (read("F0.0 F0.1 B0.0 B0.1"), read("F1.0 F1.1 B1.0 B1.1"))
    assert one_forward_one_backward(2, 3).ops == (
        read("F0.0 F0.1 B0.0 F0.2 B0.1 B0.2"),
        read("F1.0 B1.0 F1.1 B1.1 F1.2 B1.2"),
    )
    assert interleaved(2, 4, 2).ops == (
        read("F0.0 F0.1 F2.0 F2.1  F0.2 B2.0 F0.3 B2.1 F2.2 B0.0 F2.3 B0.1  B2.2 B2.3 B0.2 B0.3"),
        read("F1.0 F1.1  F3.0 B3.0 F3.1 B3.1 F1.2 B1.0 F1.3 B1.1 F3.2 B3.2 F3.3 B3.3  B1.2 B1.3"),
    )


def test_interleaving_begins_and_ends_as_in_figure_4_of_narayanan():
    first, last = interleaved(4, 8, 2).ops[0], interleaved(4, 8, 2).ops[3]
    assert first[:14] == read("F0.0 F0.1 F0.2 F0.3 F4.0 F4.1 F4.2 F4.3 F0.4 F0.5 F0.6 B4.0 F0.7 B4.1")
    assert first[-5:] == read("B4.7 B0.4 B0.5 B0.6 B0.7")
    assert last[:10] == read("F3.0 F3.1 F3.2 F3.3 F7.0 B7.0 F7.1 B7.1 F7.2 B7.2")


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 3), (2, 4), (4, 4), (3, 12)])
def test_interleaving_of_one_chunk_is_1f1b(stages, microbatches):
    assert interleaved(stages, microbatches, 1).ops == one_forward_one_backward(stages, microbatches).ops


def test_every_schedule_is_complete_and_can_be_run():
    for case in TABLE:
        schedule = make_pipeline_schedule(*case)
        check(schedule)
        name, stages, microbatches, chunks = case
        assert (schedule.name, schedule.stages, schedule.microbatches, schedule.chunks) == (
            name, stages, microbatches, chunks,
        )  # fmt: skip
        for stage, ops in enumerate(schedule.ops):
            chunks_here = range(stage, stages * chunks, stages)
            assert sorted(ops) == sorted(Op(k, c, m) for k in "FB" for c in chunks_here for m in range(microbatches))


def test_every_chunk_takes_the_microbatches_in_order():
    for case in TABLE:
        schedule = make_pipeline_schedule(*case)
        for ops in schedule.ops:
            for kind, chunk in {(op.kind, op.chunk) for op in ops}:
                order = [op.microbatch for op in ops if (op.kind, op.chunk) == (kind, chunk)]
                assert order == list(range(schedule.microbatches)), case


def test_in_flight_is_what_the_theory_says():
    for name, stages, microbatches, chunks in TABLE:
        after = [stages - stage - 1 for stage in range(stages)]
        if name == "gpipe":
            want = [microbatches] * stages
        elif chunks == 1:
            want = [min(microbatches, hops + 1) for hops in after]
        else:
            want = [min(chunks * microbatches, (chunks - 1) * stages + 2 * hops + 1) for hops in after]
        assert in_flight(make_pipeline_schedule(name, stages, microbatches, chunks)) == tuple(want), (
            name,
            stages,
            microbatches,
            chunks,
        )


def test_total_order_keeps_every_order_and_dependency():
    for case in TABLE:
        schedule = make_pipeline_schedule(*case)
        order = total_order(schedule)
        place = {op: i for i, op in enumerate(order)}
        assert len(order) == len(place) == sum(map(len, schedule.ops))
        for ops in schedule.ops:
            assert [place[op] for op in ops] == sorted(place[op] for op in ops), case
        for op in order:
            assert all(place[need] < place[op] for need in needs(op, schedule.model_chunks)), (case, op)


def test_total_order_is_by_start_then_stage():
    # Starts at 0, 1, 1, 2, 4, 4, 5, 6, 7, 7, 8, 10.
    want = "F0.0 F0.1 F1.0 B1.0 B0.0 F1.1 B1.1 F0.2 B0.1 F1.2 B1.2 B0.2"
    assert total_order(one_forward_one_backward(2, 3)) == read(want)


def test_total_order_is_the_same_in_every_process():
    code = (
        "from jaxtrain.step.pipeline.schedule import make_pipeline_schedule, total_order; "
        "print(total_order(make_pipeline_schedule('interleaved_1f1b', 3, 6, 2)))"
    )
    here = str(total_order(make_pipeline_schedule("interleaved_1f1b", 3, 6, 2)))
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        assert there.stdout.strip() == here


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("interleaved_1f1b", 4, 6, 2), ["layout.microbatches=6", "layout.stages=4", "are 4 and 8", "microbatches=8"]),
        (("interleaved_1f1b", 4, 3, 2), ["layout.microbatches=3", "nearest is 4,", "--config.layout.microbatches=4"]),
        (("1f1b", 4, 8, 2), ["layout.chunks=2", "layout.schedule=1f1b", "--config.layout.schedule=interleaved_1f1b"]),
        (("gpipe", 4, 8, 3), ["layout.chunks=3", "layout.schedule=gpipe", "--config.layout.chunks=1"]),
        (("interleaved", 4, 8, 2), ["layout.schedule='interleaved'", "gpipe, 1f1b, interleaved_1f1b", "Did you mean"]),
        (("gpipe", 0, 8, 1), ["layout.stages=0", "at least 1"]),
        (("1f1b", 2, 0, 1), ["layout.microbatches=0", "at least 1"]),
        (("interleaved_1f1b", 2, 4, 0), ["layout.chunks=0", "at least 1"]),
    ],
)
def test_numbers_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(ConfigError) as caught:
        make_pipeline_schedule(*arguments)
    for word in words:
        assert word in str(caught.value)


_GOOD = one_forward_one_backward(2, 3)  # stage 0: F0 F1 B0 F2 B1 B2; stage 1: F0 B0 F1 B1 F2 B2

BROKEN = {
    "missing": (changed(_GOOD, 1, _GOOD.ops[1][:-1]), "lacks B(chunk 1, microbatch 2) on stage 1"),
    "twice": (changed(_GOOD, 0, _GOOD.ops[0] + _GOOD.ops[0][:1]), "F(chunk 0, microbatch 0) twice on stage 0"),
    "wrong stage": (
        changed(_GOOD, 0, (*_GOOD.ops[0], Op("F", 1, 0))),
        "F(chunk 1, microbatch 0) on stage 0, but chunk 1 lives on stage 1",
    ),
    "chunk": (
        changed(_GOOD, 0, (*_GOOD.ops[0], Op("F", 2, 0))),
        "F(chunk 2, microbatch 0) on stage 0, which is no operation of 2 chunks and 3 microbatches",
    ),
    "microbatch": (changed(_GOOD, 0, (*_GOOD.ops[0], Op("B", 0, 3))), "B(chunk 0, microbatch 3) on stage 0, which is"),
    "kind": (changed(_GOOD, 0, (*_GOOD.ops[0], Op("W", 0, 0))), "W(chunk 0, microbatch 0) on stage 0, which is"),
    "stages": (dataclasses.replace(_GOOD, ops=_GOOD.ops[:1]), "orders for 1 stages, but stages=2"),
    "backward before its forward": (
        changed(_GOOD, 1, read("B1.0 F1.0 F1.1 B1.1 F1.2 B1.2")),
        "stage 1 at B(chunk 1, microbatch 0) waits for F(chunk 1, microbatch 0).",
    ),
    "ring of two": (
        PipelineSchedule("own", 2, 1, 2, (read("F0.0 B0.0 F0.1 B0.1"), read("F1.0 F1.1 B1.0 B1.1"))),
        "schedule 'own' deadlocks: stage 0 at B(chunk 0, microbatch 0) waits for B(chunk 1, microbatch 0), "
        "stage 1 at F(chunk 1, microbatch 1) waits for F(chunk 0, microbatch 1).",
    ),
    "ring that others wait for": (
        PipelineSchedule(
            "own", 3, 1, 2,
            (read("F0.0 F0.1 B0.0 B0.1"), read("F1.0 B1.0 F1.1 B1.1"), read("F2.0 F2.1 B2.0 B2.1")),
        ),
        "deadlocks: stage 1 at B(chunk 1, microbatch 0) waits for B(chunk 2, microbatch 0), "
        "stage 2 at F(chunk 2, microbatch 1) waits for F(chunk 1, microbatch 1).",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_schedules_are_refused(name):
    schedule, words = BROKEN[name]
    with pytest.raises(ScheduleError, match=re.escape(words)):
        check(schedule)
    assert issubclass(ScheduleError, JaxtrainError)


def test_a_slow_order_is_no_deadlock():
    check(changed(_GOOD, 0, read("F0.0 B0.0 F0.1 B0.1 F0.2 B0.2")))


@pytest.mark.parametrize("run", [total_order, lambda s: simulate(s, (1, 1), (1, 1))], ids=["total_order", "simulate"])
def test_what_runs_a_schedule_refuses_a_deadlock(run):
    with pytest.raises(ScheduleError, match="deadlocks"):
        run(BROKEN["ring of two"][0])
    with pytest.raises(ScheduleError, match="waits for"):
        run(changed(_GOOD, 1, _GOOD.ops[1][1:]))  # never checked: its first forward is missing


# --------------------------------------------------------------------------------------------------------------- time


def test_the_bubble_of_equal_stages_is_the_ideal_one():
    for name, stages, microbatches, chunks in TABLE:
        count = stages * chunks
        timeline = simulate(make_pipeline_schedule(name, stages, microbatches, chunks), [0.25] * count, [0.5] * count)
        ideal = ideal_bubble(name, stages, microbatches, chunks)
        assert ideal == pytest.approx((stages - 1) / (chunks * microbatches + stages - 1), rel=1e-12)
        assert timeline.bubble == pytest.approx(ideal, rel=1e-12, abs=1e-12), (name, stages, microbatches, chunks)
        assert timeline.makespan == 0.75 * (chunks * microbatches + stages - 1)
        assert timeline.busy == (0.75 * chunks * microbatches,) * stages


def test_ideal_bubbles_at_fixed_points():
    assert ideal_bubble("gpipe", 4, 8) == ideal_bubble("1f1b", 4, 8) == 3 / 11
    assert ideal_bubble("interleaved_1f1b", 4, 8, 2) == 3 / 19
    assert ideal_bubble("1f1b", 1, 5) == 0.0
    with pytest.raises(ConfigError, match=r"layout\.schedule='pipedream'"):
        ideal_bubble("pipedream", 4, 8)


def relaxed(schedule, costs, transfer):
    """Ends of all operations, by repeating the definition until nothing changes: no queue, no order of visits."""
    ends = {op: 0.0 for ops in schedule.ops for op in ops}
    while True:
        before = dict(ends)
        for stage, ops in enumerate(schedule.ops):
            free = 0.0
            for op in ops:
                arrivals = [
                    ends[need] + (transfer if need.chunk % schedule.stages != stage else 0.0)
                    for need in needs(op, schedule.model_chunks)
                ]
                free = ends[op] = max([free, *arrivals]) + costs[op.kind][op.chunk]
        if ends == before:
            return ends


@pytest.mark.parametrize("transfer", [0.0, 0.3])
def test_unequal_costs_end_when_the_definition_says(transfer):
    random_ = random.Random(0)
    for case in random_.sample(TABLE, 60):
        schedule = make_pipeline_schedule(*case)
        count = schedule.model_chunks
        costs = {kind: [random_.uniform(0.1, 2.0) for _ in range(count)] for kind in "FB"}
        timeline = simulate(schedule, costs["F"], costs["B"], transfer)
        assert {event.op: event.end for event in timeline.events} == relaxed(schedule, costs, transfer), case
        for event in timeline.events:
            assert event.stage == event.op.chunk % schedule.stages
            assert event.end - event.start == pytest.approx(costs[event.op.kind][event.op.chunk], rel=1e-9)


@pytest.mark.parametrize("transfer", [0.0, 0.3])
def test_unequal_costs_take_no_less_than_the_lower_bounds(transfer):
    random_ = random.Random(1)
    for case in random_.sample(TABLE, 100):
        schedule = make_pipeline_schedule(*case)
        count, stages = schedule.model_chunks, schedule.stages
        costs = [[random_.uniform(0.1, 2.0) for _ in range(count)] for _ in "FB"]
        timeline = simulate(schedule, *costs, transfer)
        hop = transfer if stages > 1 else 0.0
        chain = sum(map(sum, costs)) + 2 * (count - 1) * hop  # one microbatch, there and back
        assert timeline.makespan >= chain - 1e-9, case
        for stage in range(stages):  # its first input comes through the stages before it, its last gradient goes back
            work = schedule.microbatches * sum(map(sum, (column[stage::stages] for column in costs)))
            assert timeline.busy[stage] == pytest.approx(work, rel=1e-9)
            assert timeline.makespan >= sum(map(sum, (column[:stage] for column in costs))) + work - 1e-9, case
        assert 0.0 <= timeline.bubble < 1.0
        ends = [0.0] * stages
        for event in sorted(timeline.events, key=lambda event: event.start):
            assert event.start >= ends[event.stage]
            ends[event.stage] = event.end


def test_a_transfer_is_paid_between_stages_only():
    one, two = interleaved(1, 1, 3), gpipe(2, 1)
    assert simulate(one, [1] * 3, [2] * 3, transfer=10).makespan == 9
    assert simulate(two, [1] * 2, [2] * 2, transfer=10).makespan == 1 + 10 + 1 + 2 + 10 + 2


def test_operations_that_take_no_time_keep_their_order():
    schedule = one_forward_one_backward(3, 4)
    timeline = simulate(schedule, [0.0] * 3, [0.0] * 3)
    for stage, ops in enumerate(schedule.ops):
        assert tuple(event.op for event in timeline.events if event.stage == stage) == ops
    assert (timeline.makespan, timeline.bubble) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("costs", "words"),
    [
        (([1.0], [1.0, 1.0]), "forward has 1 costs: must have 2"),
        (([1.0, 1.0], [1.0] * 3), "backward has 3 costs: must have 2"),
        (([1.0, -1.0], [1.0, 1.0]), "at least 0"),
        (([1.0, 1.0], [float("nan"), 1.0]), "finite"),
        (([1.0, 1.0], [1.0, 1.0], float("inf")), "finite"),
    ],
)
def test_costs_that_do_not_fit_are_refused(costs, words):
    with pytest.raises(ValueError, match=words):
        simulate(gpipe(2, 2), *costs)


def test_a_measured_timeline_counts_from_its_first_start():
    events = (Event(Op("F", 0, 0), 0, 5.0, 6.0), Event(Op("F", 1, 0), 1, 6.0, 7.0))
    timeline = Timeline(2, events)
    assert (timeline.start, timeline.makespan, timeline.busy, timeline.bubble) == (5.0, 2.0, (1.0, 1.0), 0.5)


# ------------------------------------------------------------------------------------------------------------ drawing

SVG = "{http://www.w3.org/2000/svg}"


def panels(second=1e-3, microbatches=6):
    made = [
        make_pipeline_schedule("gpipe", 3, microbatches),
        make_pipeline_schedule("interleaved_1f1b", 3, microbatches, 2),
    ]
    costs = [(6 * second / s.chunks, 12 * second / s.chunks) for s in made]
    return [
        (s.name, simulate(s, [f] * s.model_chunks, [b] * s.model_chunks)) for s, (f, b) in zip(made, costs, strict=True)
    ]


def boxes(root):
    return [rect for rect in root.iter(SVG + "rect") if rect.get("class") == "op"]


def texts(root):
    return ["".join(text.itertext()) for text in root.iter(SVG + "text")]


def test_svg_has_one_box_an_operation_on_one_time_scale():
    drawn = panels()
    found = boxes(root := ElementTree.fromstring(svg(drawn)))
    events = [event for _, timeline in drawn for event in timeline.events]
    assert len(found) == len(events) == 2 * 3 * 6 + 2 * 6 * 6
    lefts = [float(box.get("x")) for box in found]
    scale = (lefts[1] - lefts[0]) / (events[1].start - events[0].start)
    for box, left, event in zip(found, lefts, events, strict=True):
        assert left == pytest.approx(lefts[0] + scale * event.start, abs=0.1)
        assert float(box.get("width")) == pytest.approx(scale * (event.end - event.start), abs=1.0)
        assert box.find(SVG + "title").text.startswith(f"{event.op} on stage {event.stage}: ")
    width = float(root.get("width"))
    assert max(left + float(box.get("width")) for box, left in zip(found, lefts, strict=True)) < width
    rows = {(float(box.get("y")), event.stage) for box, event in zip(found, events, strict=True)}
    assert len(rows) == len({y for y, _ in rows}) == 6  # a row for each stage of each panel
    colours = {(box.get("fill"), event.op.kind, event.op.chunk // 3) for box, event in zip(found, events, strict=True)}
    assert len(colours) == len({fill for fill, _, _ in colours}) == 4


def test_svg_says_makespan_and_bubble():
    words = texts(ElementTree.fromstring(svg(panels())))
    assert "gpipemakespan 144 ms · bubble 25.0%" in words
    assert "interleaved_1f1bmakespan 126 ms · bubble 14.3%" in words
    assert words.count("stage 2") == 2


@pytest.mark.parametrize(
    ("second", "unit", "makespan"),
    [(1.0, "s", "144 s"), (1e-2, "s", "1.44 s"), (1e-5, "ms", "1.44 ms"), (1e-7, "µs", "14.4 µs")],
)
def test_svg_counts_time_in_a_sensible_unit(second, unit, makespan):
    words = texts(ElementTree.fromstring(svg(panels(second))))
    assert unit in words
    assert f"gpipemakespan {makespan} · bubble 25.0%" in words


def test_svg_labels_boxes_where_the_number_fits():
    def labels(count):
        drawn = panels(microbatches=count)[:1]
        return [text for text in texts(ElementTree.fromstring(svg(drawn))) if text.isdigit()]

    assert [label for label in labels(6) if int(label) < 6].count("5") == 2 * 3
    assert len(labels(300)) < 20  # the ticks are left


def test_svg_is_safe_standalone_and_the_same_every_time():
    title = 'a <b> & "c"\x00'
    drawn = [(title, timeline) for _, timeline in panels()]
    text = svg(drawn)
    root = ElementTree.fromstring(text)
    assert any(word.startswith('a <b> & "c" makespan') for word in texts(root))
    assert svg(drawn) == text
    outside = re.findall(r"(?:href|src|url\(|@import|<script)[^>]{0,40}", text)
    assert outside == []
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]


@pytest.mark.parametrize("timeline", [Timeline(2, ()), simulate(gpipe(2, 2), [0, 0], [0, 0])], ids=["empty", "no time"])
def test_svg_draws_what_took_no_time(timeline):
    assert len(boxes(ElementTree.fromstring(svg([("nothing", timeline)])))) == len(timeline.events)


def test_svg_needs_a_panel():
    with pytest.raises(ValueError, match="at least one panel"):
        svg([])
