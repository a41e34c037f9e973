"""What a run measures of its machine: fake NVML and psutil, sources that hang, a slow device, `/metrics` of a real run."""

import collections
import contextlib
import datetime
import io
import itertools
import json
import random
import sys
import threading
import time
import urllib.request
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from PIL import Image
from runs import SMALL, here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jaxtrain import load_config
from jaxtrain.config import TelemetryConfig, from_dict, nested_dicts
from jaxtrain.data.augment import Preprocess, train_inputs
from jaxtrain.data.order import batch_indices
from jaxtrain.errors import ConfigError
from jaxtrain.host.gpus import Gpus
from jaxtrain.host.usage import HostUsage
from jaxtrain.observability import slow_device
from jaxtrain.observability.clock import CATEGORIES, StepClock
from jaxtrain.observability.gpu_health import GpuHealth, describe
from jaxtrain.observability.prometheus import PrometheusServer
from jaxtrain.observability.sampler import Sampler
from jaxtrain.observability.slow_device import DeviceTime, SlowDevices
from jaxtrain.parallel.device_probe import DeviceProbe
from jaxtrain.step.train_state import AUGMENT, role_key
from jaxtrain.training import session
from jaxtrain.training.setup import load_data
from jaxtrain.training.telemetry import PROBE_SHARE, Telemetry
from jaxtrain.trees import path_of

# ------------------------------------------------------------------------------------------------------------- NVML

NVML = """
class NVMLError(Exception): pass
NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = nvmlEventTypeXidCriticalError = 1
class Of:
    def __init__(self, **fields): vars(self).update(fields)
events, reasons = [], {}
unsaid = set()  # names of functions that this GPU does not support
def answer(name, value):
    if name in unsaid: raise NVMLError("Not Supported")
    return value
def nvmlInit(): pass
def nvmlDeviceGetCount(): return 4
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetUUID(handle): return f"GPU-{handle}"
def nvmlDeviceGetName(handle): return "H100"
def nvmlDeviceGetMemoryInfo(handle, *_): return Of(total=80 << 30, used=(handle + 1) << 30)
def nvmlDeviceGetTotalEccErrors(handle, *_): return 0
def nvmlDeviceGetUtilizationRates(handle): return answer("utilization", Of(gpu=90 + handle))
def nvmlDeviceGetTemperature(handle, sensor): return answer("temperature", 60 + handle)
def nvmlDeviceGetPowerUsage(handle): return answer("power", 650_000)
def nvmlDeviceGetClockInfo(handle, kind): return {1: 1980, 2: 2619}[kind]
def nvmlDeviceGetCurrentClocksThrottleReasons(handle): return answer("reasons", reasons.get(handle, 0x1))
def nvmlEventSetCreate(): return object()
def nvmlDeviceRegisterEvents(*_): pass
def nvmlEventSetWait_v2(events_, _):
    if not events: raise NVMLError("timeout")
    return events.pop(0)
"""


@pytest.fixture
def nvml(monkeypatch):
    made = runs.module("pynvml", NVML)
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return made


def test_the_readings_are_those_of_the_gpus_that_the_devices_are(nvml, monkeypatch):
    """By UUID or number in CUDA_VISIBLE_DEVICES; keys have the device's number in the run."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-3,1")
    nvml.reasons[1] = 0x40 | 0x4
    values = GpuHealth({6: 0, 7: 1})()
    assert {key.split("/")[0] for key in values} == {"device6", "device7"}
    assert values["device6/temperature"] == 63  # GPU-3
    assert values["device7/temperature"] == 61
    assert values["device6/utilization"] == pytest.approx(0.93)
    assert values["device7/memory_used"] == 2 << 30
    assert (values["device6/power"], values["device6/clock"], values["device6/memory_clock"]) == (650.0, 1980, 2619)
    throttled = {key for key, value in values.items() if "throttled" in key and value}
    assert throttled == {"device7/throttled_power_cap", "device7/throttled_temperature"}
    assert describe(values, 7) == "NVML says power cap, temperature, clock 1980 MHz"
    assert describe(values, 6) == "NVML says nothing slows its clocks down, clock 1980 MHz"
    assert describe({}, 6) == ""


def test_what_a_gpu_does_not_say_is_missing(nvml):
    nvml.unsaid |= {"power", "reasons"}
    values = GpuHealth({0: 0})()
    assert "device0/temperature" in values
    assert not [key for key in values if "power" in key or "throttled" in key]
    reading = Gpus().read("GPU-0")
    assert (reading.power, reading.throttles) == (None, None)


def test_each_xid_is_said_once(nvml, caplog):
    health = GpuHealth({4: 2})
    assert health()["device4/xids"] == 0
    nvml.events += [nvml.Of(device=2, eventData=13), nvml.Of(device=1, eventData=79), nvml.Of(device=2, eventData=94)]
    assert [health()["device4/xids"] for _ in range(2)] == [2, 2]
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "device 4 (GPU-2) reports Xid 13",
        "device 4 (GPU-2) reports Xid 94",
    ]


def test_gpus_without_nvml_are_named_as_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(RuntimeError, match=r"NVML shows 0 GPUs.*is nvidia-ml-py installed"):
        GpuHealth({0: 0})


# ------------------------------------------------------------------------------------------------------------- host

Times = collections.namedtuple("Times", "user system idle iowait guest")


class Psutil:
    """What psutil answers at two moments, a reading each."""

    def __init__(self, *, hides=False):
        self.reading, self.hides = 0, hides

    def cpu_times(self):
        return [Times(10.0, 5.0, 20.0, 0.0, 9.0), Times(13.0, 5.0, 24.0, 1.0, 12.0)][self.reading]

    def virtual_memory(self):
        return SimpleNamespace(percent=25.0)

    def disk_io_counters(self):
        return None if self.hides else SimpleNamespace(read_bytes=1000 + 400 * self.reading, write_bytes=7)

    def net_io_counters(self):
        if self.hides:
            raise OSError("hidden")
        return SimpleNamespace(bytes_recv=10 + 20 * self.reading, bytes_sent=5 + 8 * self.reading)

    def Process(self):
        return SimpleNamespace(
            cpu_times=lambda: SimpleNamespace(user=1.0 + self.reading, system=2.0 + 2 * self.reading),
            memory_info=lambda: SimpleNamespace(rss=12345),
        )


def test_rates_of_the_host_are_those_since_the_reading_before():
    ps, now = Psutil(), iter([100.0, 104.0])
    usage = HostUsage(lambda: next(now), ps)
    ps.reading = 1
    assert usage() == {
        "cpu": pytest.approx(3 / 8),  # 3 s busy of 8; what waits for a disk is idle, a guest is in `user`
        "memory": 0.25,
        "process_memory": 12345.0,
        "process_cpu": pytest.approx(3 / 4),
        "disk_read": 100.0,
        "disk_write": 0.0,
        "network_received": 5.0,
        "network_sent": 2.0,
    }


def test_what_a_container_hides_is_missing():
    ps, now = Psutil(hides=True), iter([100.0, 104.0])
    usage = HostUsage(lambda: next(now), ps)
    ps.reading = 1
    assert set(usage()) == {"cpu", "memory", "process_memory", "process_cpu"}


# ---------------------------------------------------------------------------------------------------------- sampling


def eventually(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_source_that_fails_or_hangs_stops_neither_the_others_nor_the_end(caplog):
    answers, hung, now = itertools.count(1), threading.Event(), [0.0]

    def hangs():
        hung.set()
        threading.Event().wait()

    def fails():
        raise OSError("the driver is gone")

    sources = {"good": lambda: lambda: {"good": next(answers)}, "bad": lambda: fails, "stuck": lambda: hangs}
    sampler = Sampler(sources, 0.005, lambda: now[0])
    eventually(lambda: sampler.values().get("good", 0) > 5 and hung.is_set())
    assert set(sampler.values()) == {"good"}
    now[0] = 60.0
    assert [set(sampler.values()) for _ in range(3)] == [{"good"}] * 3
    said = sorted(record.getMessage() for record in caplog.records)
    assert len(said) == 2  # once each
    assert said[0].startswith("telemetry: bad gives no numbers (OSError: the driver is gone)")
    assert said[1].startswith("telemetry: stuck gives no numbers (it has not answered for 60 s)")
    sampler.close()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("telemetry")] == [
        "telemetry: stuck"
    ]


# ---------------------------------------------------------------------------------------------------- the slow device


class Stopwatch:
    """A clock for `DeviceProbe`: each device's programs take what `seconds` says, whatever they really take."""

    def __init__(self, seconds):
        self.seconds, self._now, self._calls = seconds, 0.0, 0

    def __call__(self):
        if self._calls % 2:  # the end of a program; three a device
            self._now += self.seconds(self._calls // 2 // 3)
        self._calls += 1
        return self._now


class ProbedRun:
    """Probes four real devices by an injected clock."""

    def __init__(self):
        self._devices, self._watch = jax.devices()[:4], Stopwatch(lambda _: 0.0)
        self._probe = DeviceProbe(self._devices, self._watch)

    def found(self, noise, slow_from=10**9, steps=400, every=slow_device.EVERY):
        """Pairs of a step and what was said. Device 2 takes 20 % longer from `slow_from` on."""
        now, found, slow = [0], [], SlowDevices()

        def seconds(count):
            slowed = count % len(self._devices) == 2 and now[0] >= slow_from
            return 1e-3 * (1.2 if slowed else 1.0) * (1 + noise())

        self._watch.seconds = seconds
        for now[0] in range(every, steps + 1, every):
            times = [
                DeviceTime(device.id, "h1", each) for device, each in zip(self._devices, self._probe(), strict=True)
            ]
            found += [(now[0], text) for text in slow.observe(times)]
        return found


@pytest.fixture(scope="module")
def probed():
    return ProbedRun()


@pytest.mark.parametrize("slow_from", [1, 51, 149])
def test_a_device_that_slows_down_by_a_fifth_is_named_within_200_steps(probed, slow_from):
    draw = random.Random(slow_from)
    ((step, text),) = probed.found(lambda: draw.uniform(0, 0.02), slow_from)
    assert step - slow_from <= 200 - slow_device.EVERY  # with several processes process 0 hears of it a round later
    assert text.startswith("slow device: device 2 on h1 needs 1.2")
    assert "NVML gives no reason" in text


@pytest.mark.parametrize("when", ["compiling", "running"])
def test_a_probe_that_fails_is_said_once_and_ends_nothing(caplog, when):
    class Failing(DeviceProbe):
        def _compile(self):
            if when == "compiling":
                raise RuntimeError("RESOURCE_EXHAUSTED: no room")
            return super()._compile()

        def _time(self, program, inputs):
            raise RuntimeError("RESOURCE_EXHAUSTED: no room")

    config = TelemetryConfig(every=0, probe_every=2)
    with contextlib.closing(Telemetry(config, jax.devices()[:2], Failing)) as telemetry:
        eventually(telemetry._probe.ready)
        for step in range(1, 9):
            telemetry._began = -1e9  # long ago: the share of the time leaves room
            telemetry.after(range(step, step + 1), jax.numpy.zeros(()), StepClock())
    assert caplog.text.count("devices are not probed: the probe failed (RESOURCE_EXHAUSTED: no room)") == 1


def test_twenty_runs_without_a_slow_device_give_no_alarm(probed):
    for seed in range(20):
        draw = random.Random(seed)
        assert probed.found(lambda draw=draw: abs(draw.gauss(0, 0.04)), steps=1000) == []


def test_one_slow_round_is_none_and_a_device_is_named_again_only_after_it_recovered():
    slow, quick = SlowDevices(), [DeviceTime(k, "h1", 1.0) for k in range(3)]
    late = [*quick, DeviceTime(3, "h2", 1.3, "NVML says temperature, clock 900 MHz")]
    fine = [*quick, DeviceTime(3, "h2", 1.1)]
    said = [bool(slow.observe(times)) for times in (late, fine, late, late, late, [], late, fine, late, late)]
    assert said == [False, False, False, True, False, False, False, False, False, True]
    slow = SlowDevices()
    slow.observe(late)
    (text,) = slow.observe(late)
    assert "device 3 on h2" in text
    assert "30% more" in text
    assert "NVML says temperature, clock 900 MHz" in text


def test_of_two_devices_the_slow_one_is_named_and_a_wide_spread_is_no_alarm():
    slow = SlowDevices()
    two = [DeviceTime(0, "h", 1.0), DeviceTime(1, "h", 1.2)]
    assert [len(slow.observe(two)) for _ in range(2)] == [0, 1]
    wide = [DeviceTime(k, "h", seconds) for k, seconds in enumerate((1.0, 1.1, 0.8, 1.25, 0.9, 1.3))]
    slow = SlowDevices()
    assert [slow.observe(wide) for _ in range(4)] == [[], [], [], []]
    assert SlowDevices().observe(two[:1]) == []


class SlowSecond:
    """A probe whose last device is slow; `work` is done meanwhile."""

    def __init__(self, devices, work=lambda: None):
        self.count, self.work, self.probes = len(devices), work, 0

    def ready(self):
        return True

    def __call__(self):
        self.probes += 1
        self.work()
        return [1e-3] * (self.count - 1) + [1.4e-3]

    def close(self):
        pass


def test_a_probe_takes_no_more_than_its_share_of_the_time(monkeypatch):
    """Steps may be much shorter than the probe: then most of those that are due are left out."""
    now, made = [1000.0], []

    def wait(seconds):
        now[0] += seconds

    def probe(devices):
        made.append(SlowSecond(devices, lambda: wait(0.01)))
        return made[0]

    monkeypatch.setattr("jaxtrain.training.telemetry.time", SimpleNamespace(monotonic=lambda: now[0]))
    telemetry = Telemetry(TelemetryConfig(every=0.0, probe_every=1), jax.devices()[:2], probe)
    result = jnp.zeros(())
    for step in range(1, 10_001):
        wait(1e-3)
        telemetry.after(range(step, step + 1), result, StepClock())
    telemetry.close()
    most = PROBE_SHARE * (now[0] - 1000.0) / 0.01
    assert most - 2 <= made[0].probes <= most + 1


# ---------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_names_its_slow_device_and_its_rows_have_what_was_measured(tmp_path, monkeypatch):
    """A real run of two devices, with an injected probe. The times add up to the wall time."""
    monkeypatch.setattr(session, "Telemetry", lambda config, devices: Telemetry(config, devices, SlowSecond))
    fields = SMALL | {"telemetry.every": 0.01, "telemetry.probe_every": 2, "train.epochs": 8}
    here(tmp_path, fields, devices=2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["phase"] == "train"]
    last = trained[-1]
    for name in ("host0/memory", "host0/process_memory", "flops_per_second"):
        assert last[name] > 0, name
    for name in (
        "host0/cpu",
        "host0/process_cpu",
    ):  # a sample is as short as a tick of the system's clock, which may miss it
        assert name in last
        assert max(row[name] for row in trained if name in row) > 0, name
    assert last["device1/probe_seconds"] == 1.4e-3
    assert "mfu" not in last  # the peak of a CPU is not known
    for name in ("grad_norm", "param_norm", "update_norm", "learning_rate"):
        assert last[name] > 0, name
    log = (tmp_path / "logs" / "process_0.log").read_text()
    assert log.count("slow device: device 1 on") == 1
    assert "40% more than the 1 ms of the others" in log
    first, written = (
        datetime.datetime.fromisoformat(line.split()[0])
        for line in log.splitlines()
        if " work directory: " in line or " result: " in line
    )
    wall = (written - first).total_seconds()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["seconds"].keys() == set(CATEGORIES)
    assert sum(result["seconds"].values()) == pytest.approx(wall, rel=0.01)
    assert sum(last[f"time/{name}"] for name in CATEGORIES) <= wall


def test_prometheus_shows_a_real_run_on_the_loopback_interface(tmp_path, monkeypatch):
    port, seen = runs.free_port(), []
    close = Telemetry.close

    def read_and_close(telemetry):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            seen.append(answer.read().decode())
        close(telemetry)

    monkeypatch.setattr(Telemetry, "close", read_and_close)
    here(tmp_path, SMALL | {"telemetry.port": port, "telemetry.every": 0.01})
    shown = dict(line.rsplit(" ", 1) for line in seen[0].splitlines() if not line.startswith("#"))
    last = runs.rows(tmp_path)[-1]
    assert float(shown["jaxtrain_step"]) == 12
    assert float(shown["jaxtrain_loss"]) == pytest.approx(last["loss"])
    assert float(shown["jaxtrain_time_step"]) > 0
    assert float(shown['jaxtrain_host_process_memory{host="0"}']) > 1e6
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60)


def test_a_port_that_is_taken_is_a_config_error():
    server = PrometheusServer(port := runs.free_port(), lambda: {})
    try:
        with pytest.raises(
            ConfigError, match=rf"config\.telemetry\.port={port}: cannot be listened at .*choose another"
        ):
            Telemetry(TelemetryConfig(every=0.0, port=port), jax.devices()[:1])
    finally:
        server.close()


def test_without_telemetry_rows_have_none(tmp_path):
    here(tmp_path, SMALL | {"telemetry.every": 0.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert not [key for row in rows for key in row if key.startswith(("host", "device"))]


def train_events(workdir):
    return EventAccumulator(
        str(workdir / "tensorboard" / "train"), size_guidance={"images": 0, "histograms": 0}
    ).Reload()


@pytest.mark.parametrize("layout", [{}, {"layout.zero": 3, "layout.microbatches": 2}])
def test_tensorboard_shows_the_first_examples_and_histograms_of_the_weights(tmp_path, layout):
    fields = SMALL | layout | {
        "data.augmentation": "light",
        "data.mixup": 0.2,
        "telemetry.images": 5,
        "telemetry.histograms_every": 6,
    }  # fmt: skip
    result = here(tmp_path, fields, devices=2)
    seen = train_events(tmp_path)
    (shown,) = seen.Images("first examples")
    picture = np.asarray(Image.open(io.BytesIO(shown.encoded_image_string)))
    assert (shown.step, shown.width, shown.height) == (0, 24, 16)  # 3 x 2 tiles of 8 x 8
    assert picture.shape == (16, 24, 3)
    assert not picture[8:, 16:].any()  # the sixth
    config = load_config(runs.RECIPE, fields)
    data = load_data(from_dict(nested_dicts(config)).data).train
    pixels, labels = data.read(batch_indices(len(data), 0, 0, 32))
    key = jax.random.fold_in(role_key(0, AUGMENT), 0)
    pre = Preprocess(image_size=8, augmentation="light", mean=(0.0,), std=(1.0,), num_classes=10, mixup=0.2)
    wanted, _ = train_inputs(pre, pixels, labels, np.arange(32, dtype=np.int32), key)
    tiles = picture[..., 0].reshape(2, 8, 3, 8).transpose(0, 2, 1, 3).reshape(6, 8, 8)
    np.testing.assert_allclose(tiles[:5], 255 * wanted[:5, ..., 0], atol=1)
    params = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(result.state.params)}
    assert set(seen.Tags()["histograms"]) == {f"params/{path}" for path in params}
    for path, leaf in params.items():
        events = seen.Histograms(f"params/{path}")
        assert [event.step for event in events] == [6, 12]
        last, values = events[-1].histogram_value, np.asarray(leaf)
        assert (last.min, last.max, last.num) == (values.min(), values.max(), values.size)
        assert last.sum == pytest.approx(values.sum(), abs=1e-4)
        assert last.sum_squares == pytest.approx(np.square(values).sum(), rel=1e-5)
        counts, edges = np.histogram(values, 30)
        np.testing.assert_allclose(last.bucket_limit, edges[1:], atol=1e-6)
        assert np.abs(np.asarray(last.bucket) - counts).sum() <= 4  # a value on an edge may be on either side of it


def test_a_run_that_goes_on_shows_no_examples_again(tmp_path):
    here(tmp_path, SMALL | {"telemetry.images": 2, "train.epochs": 1})
    here(tmp_path, SMALL | {"telemetry.images": 2, "train.epochs": 2})
    assert len(train_events(tmp_path).Images("first examples")) == 1
