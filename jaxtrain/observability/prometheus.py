"""Shows a run's latest numbers to Prometheus, on the loopback interface. The one module that knows its client."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from jaxtrain.errors import ConfigError

_NUMBERED = re.compile(r"(?P<what>[a-z]+)(?P<number>\d+)/(?P<name>.*)")


class PrometheusServer:
    """Serves `/metrics` at 127.0.0.1 until it is closed."""

    def __init__(self, port: int, values: Callable[[], Mapping[str, float]]):
        """Starts the server, in a thread.

        Args:
          port: where; `config.telemetry.port`.
          values: asked at each scrape, from that thread. `device3/power` is shown as `jaxtrain_device_power{device="3"}`,
            `time/step` as `jaxtrain_time_step`.

        Raises:
          ConfigError: the port is taken, or is not for this user.
        """
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Values(values))
        try:
            self._server, self._thread = start_http_server(port, addr="127.0.0.1", registry=registry)
        except OSError as error:
            raise ConfigError(
                f"config.telemetry.port={port}: cannot be listened at ({error.strerror}); choose another, or 0 for none."
            ) from None

    def close(self) -> None:
        """Ends the server; may be called twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Values(Collector):
    def __init__(self, values: Callable[[], Mapping[str, float]]):
        self._values = values

    def collect(self) -> Iterator[GaugeMetricFamily]:
        families: dict[str, GaugeMetricFamily] = {}
        for key, value in self._values().items():
            numbered = _NUMBERED.fullmatch(key)
            name = f"{numbered['what']}_{numbered['name']}" if numbered else key
            name = "jaxtrain_" + re.sub(r"\W", "_", name)
            if name not in families:
                labels = [numbered["what"]] if numbered else []
                families[name] = GaugeMetricFamily(name, key if not numbered else numbered["name"], labels=labels)
            families[name].add_metric([numbered["number"]] if numbered else [], value)
        yield from families.values()
