"""Links between devices: how fast, and how long a hop takes. For a cost model of collectives, before there are devices.

None of the figures here was measured by us; `jaxtrain bench comm --save-fit FILE` measures those of one's own links, into a
file that `parse_link` reads. The sources are NCCL 2.30.7 (github.com/NVIDIA/nccl at 5067397, `src/graph`), which chooses its
algorithms by these figures, and NVIDIA's data sheets:

- *bandwidth*: what NCCL expects to get of a link, not the nominal rate that a comment gives beside it.
- *latency*: of a hop of the ring (`hwLatencies` of `tuning.cc`), of the protocol that reaches over 90 % of the bandwidth with
  the shortest hop: LL128 over NVLink and InfiniBand, Simple where NCCL has no LL128. What NCCL adds once for a collective
  (`baseLatencies`: 6.6 us under LL, 14 us under LL128, 8.4 us under Simple) is not in it, nor is LL, which halves the bandwidth
  and makes a hop of NVLink take 0.6 us: a small all-reduce of many devices is quicker than these figures say.

Each device is taken to have a network card of its own, as in DGX machines. Where n devices share one, a link of one's own has
1/n of its bandwidth.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtrain.errors import ConfigError
from jaxtrain.host.files import parse_json
from jaxtrain.host.text import did_you_mean


@dataclasses.dataclass(frozen=True)
class Link:
    """What joins a device to its neighbour.

    Attributes:
      name: as it is chosen.
      bandwidth: bytes a second in one direction, for one device.
      latency: seconds of a hop.
    """

    name: str
    bandwidth: float
    latency: float


LINKS: dict[str, Link] = {
    link.name: link
    for link in (
        # Inside a host. NVLink: links of a GPU x `SM80_NVLINK_BW`, `SM90_NVLINK_BW`, `SM100_NVLINK_BW` of topo.h; ring, LL128.
        Link("nvlink3", 12 * 20.0e9, 1.9e-6),  # A100: 12 links, 600 GB/s both ways
        Link("nvlink4", 18 * 20.6e9, 1.9e-6),  # H100, H200: 18 links, 900 GB/s both ways
        Link("nvlink5", 18 * 40.1e9, 1.9e-6),  # B200: 18 links, 1.8 TB/s both ways
        # `kvDictPciGen` of topo.cc: 120 and 240 x 100 Mb/s for each of 16 lanes, of 16 and 32 GT/s; ring, Simple.
        Link("pcie4", 16 * 120 * 1e8 / 8, 5.7e-6),
        Link("pcie5", 16 * 240 * 1e8 / 8, 5.7e-6),
        # Between hosts: `speedArrayInter` of search.cc, which is 96 % of the line rate (`NET_BW` of topo.h: 12.0 for 100 Gb/s).
        Link("infiniband-hdr", 24.0e9, 4.0e-6),  # ConnectX-6: 200 Gb/s; ring over NET, LL128
        Link("infiniband-ndr", 48.0e9, 4.0e-6),  # ConnectX-7: 400 Gb/s
        # Ring over NET, Simple. NCCL has no row for TCP, whose hop through two kernels takes longer: measure yours.
        Link("ethernet-10", 1.2e9, 14.0e-6),
        Link("ethernet-25", 3.0e9, 14.0e-6),
        Link("ethernet-100", 12.0e9, 14.0e-6),
    )
}


DEFAULT_FITTED = "auto"
"""Which link of a file is meant where none is named: that of XLA's own reduction."""


def parse_link(text: str) -> Link:
    """One of `LINKS`, one's own, or one that was measured.

    One's own is GIGABYTES_PER_SECOND:MICROSECONDS, such as `46:9.5` (1e9 bytes a second; of a hop). A measured one is
    FILE.json, of `links_text`, or FILE.json:NAME for a link of the file other than `auto`.

    Raises:
      ConfigError: it is none of them, a number is not above 0 and finite, or the file has no such link.
    """
    if text in LINKS:
        return LINKS[text]
    file, dot, name = text.rpartition(".json")
    if dot and (not name or name.startswith(":")):
        return _measured(text, Path(file + dot), name[1:] or DEFAULT_FITTED)
    bandwidth, _, latency = text.partition(":")
    try:
        link = Link(text, float(bandwidth) * 1e9, float(latency) * 1e-6)
    except ValueError:
        link = Link(text, math.nan, math.nan)
    if all(0 < value < math.inf for value in (link.bandwidth, link.latency)):
        return link
    raise ConfigError(
        f"--link {text}: must be one of {', '.join(LINKS)}, a FILE.json of `jaxtrain bench comm --save-fit`, or "
        "GIGABYTES_PER_SECOND:MICROSECONDS, both above 0 and finite, for example 46:9.5."
        f"{did_you_mean(text.lower(), LINKS)}"
    )


def links_text(links: Mapping[str, Link], about: Mapping[str, Any]) -> str:
    """JSON that `parse_link` reads.

    Args:
      links: by name.
      about: what else the file says, such as what was measured.
    """
    rows = {name: {"bandwidth": link.bandwidth, "latency": link.latency} for name, link in links.items()}
    return json.dumps({**about, "links": rows}, indent=1) + "\n"


def _measured(text: str, path: Path, name: str) -> Link:
    try:
        links = parse_json(path.read_bytes())["links"]
        found = {key: Link(text, float(row["bandwidth"]), float(row["latency"])) for key, row in links.items()}
    except OSError as error:
        raise ConfigError(f"--link {text}: {path} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--link {text}: {path} is no file of links; `jaxtrain bench comm --save-fit FILE` writes one."
        ) from error
    if name not in found:
        raise ConfigError(f"--link {text}: {path} has no link {name!r}, only {', '.join(found) or 'none'}.")
    link = found[name]
    if not (0 < link.bandwidth < math.inf and 0 <= link.latency < math.inf):
        raise ConfigError(f"--link {text}: the link {name!r} of {path} has no bandwidth above 0, or a latency below 0.")
    return link
