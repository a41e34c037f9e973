"""The answers of the dashboard. All addresses in it are relative, so it works behind a prefix."""

from __future__ import annotations

import math
import re
import socket
import time
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from jaxtrain.dashboard import details, logs
from jaxtrain.dashboard.comparing import compare
from jaxtrain.dashboard.curves import AXES, Curves, Question, curves, events
from jaxtrain.dashboard.guard import Json, error
from jaxtrain.dashboard.overview import Row
from jaxtrain.dashboard.runs_index import RunsIndex
from jaxtrain.dashboard.stream import Streams
from jaxtrain.errors import WorkdirError
from jaxtrain.host.folder import Folder, reason

_TYPES = {
    "html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "png": "image/png",
    "woff2": "font/woff2",
}  # fmt: skip
_PICTURE = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox"}
_MOST_COLUMNS, _MOST_POINTS, _MOST_COMPARED, _MOST_ENTRIES = 64, 20_000, 32, 2000


class Dashboard:
    """Answers from an index of runs."""

    def __init__(self, index: RunsIndex):
        """Answers from `index`, which has been started."""
        self._index, self._curves, self.streams = index, Curves(), Streams(index)
        self._files = {
            f"{address}/{name}": content
            for address, package in (("static", "jaxtrain.dashboard"), ("charts", "jaxtrain.charts"))
            for name, content in _package_files(package, "static" if address == "static" else "").items()
        }

    def app(self) -> Starlette:
        """The application, without its guard."""
        run = "/api/runs/{run}"
        routes = [
            Route("/", self.page),
            Route("/api/runs", self.runs),
            Route("/api/compare", self.compare),
            Route("/api/stream", self.stream),
            Route(run, self.run),
            Route(f"{run}/series", self.series),
            Route(f"{run}/events", self.events),
            Route(f"{run}/logs", self.logs),
            Route(f"{run}/schedule.svg", self.schedule),
            Route(f"{run}/evaluation/{{name}}", self.evaluation),
            Route("/{folder}/{name}", self.file),
        ]
        handlers: dict[Any, Any] = {
            HTTPException: _refused,
            WorkdirError: _damaged,
            RecursionError: _too_deep,
            Exception: _broken,
        }
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return app

    def page(self, request: Request) -> Response:
        """The page."""
        return self._file("static/index.html")

    def file(self, request: Request) -> Response:
        """A file of the page or of the charts: one of those that are there, by its name; no path is made of it."""
        return self._file("{folder}/{name}".format(**request.path_params))

    def _file(self, name: str) -> Response:
        if name not in self._files:
            raise HTTPException(404, "There is no such page.")
        return Response(self._files[name], media_type=_TYPES[name.rpartition(".")[2]])

    def runs(self, request: Request) -> Response:
        """The overview."""
        changes = self._index.since(-1)
        server = {"time": time.time(), "root": str(self._index.root), "host": socket.gethostname()}
        return Json(
            {
                "server": {**server, **self._index.progress()},
                "runs": [vars(row) for row in changes.rows],
            }
        )

    def run(self, request: Request) -> Response:
        """One run."""
        folder, row = self._run(request.path_params["run"])
        return Json(details.run_details(folder, row, self._curves.columns(folder)))

    def series(self, request: Request) -> Response:
        """Curves of one run."""
        folder, row = self._run(request.path_params["run"])
        columns = _words(request, "columns", _MOST_COLUMNS)
        points = _number(request, "points", 1500, 2, _MOST_POINTS)
        first, last = _place(request, "from", -math.inf), _place(request, "to", math.inf)
        question = Question(columns, _axis(request), first, last, points, _word(request, "since"))
        try:
            return Json(curves(self._curves, folder, row, question))
        except FileNotFoundError:
            missing = {"id": row.id, "x": question.axis, "missing": columns, "series": {}, "complete": 1.0}
            return Json({**missing, "cursor": "", "reset": bool(question.since), "size": 0})
        except OSError as problem:
            raise WorkdirError(f"metrics.jsonl cannot be read ({reason(problem)}).") from None

    def events(self, request: Request) -> Response:
        """What happened to one run."""
        folder, _ = self._run(request.path_params["run"])
        return Json(events(folder, _word(request, "since")))

    def logs(self, request: Request) -> Response:
        """A page of the logs of one run."""
        folder, _ = self._run(request.path_params["run"])
        limit, query, level = (
            _number(request, "limit", 200, 1, _MOST_ENTRIES),
            _word(request, "query"),
            _word(request, "level"),
        )
        if level and level not in logs.LEVELS:
            raise HTTPException(400, f"level={level}: must be one of {', '.join(logs.LEVELS)}.")
        since, before = _word(request, "since"), _word(request, "before")
        try:
            if since:
                return Json(logs.after(folder, since, limit, query, level))
            if before:
                return Json(logs.before(folder, before, limit, query, level))
        except ValueError:
            raise HTTPException(400, "since and before take the cursor of an earlier answer.") from None
        return Json(logs.newest(folder, limit, query, level))

    def schedule(self, request: Request) -> Response:
        """The timeline of a run's pipeline. Nothing in the picture can run, or fetch anything."""
        picture = details.schedule(self._run(request.path_params["run"])[0])
        if picture is None:
            raise HTTPException(404, "This run has no pipeline.")
        return Response(picture, media_type="image/svg+xml", headers=_PICTURE)

    def evaluation(self, request: Request) -> Response:
        """The report of an evaluation of one run."""
        report = details.evaluation(self._run(request.path_params["run"])[0], request.path_params["name"])
        if report is None:
            raise HTTPException(404, "This run has no such evaluation; jaxtrain evaluate RUN --report makes it.")
        return Json(report)

    def compare(self, request: Request) -> Response:
        """One column of several runs, and the settings in which they differ."""
        runs = {identifier: self._run(identifier) for identifier in _words(request, "runs", _MOST_COMPARED)}
        points = _number(request, "points", 600, 2, _MOST_POINTS)
        question = Question([_word(request, "column") or "val/accuracy"], _axis(request), points=points)
        return Json(compare(self._curves, runs, question))

    async def stream(self, request: Request) -> Response:
        """What is new, as it comes."""
        if request.method == "HEAD":  # it would never end
            return Response(media_type="text/event-stream")
        if self.streams.full:
            return error(503, "Too many pages are open; close some, or reload this one to see what is new.")
        run = _word(request, "run")
        if run:
            self._run(run)
        return StreamingResponse(self.streams.events(run), media_type="text/event-stream")

    def _run(self, identifier: str) -> tuple[Folder, Row]:
        """A run that the index has found."""
        folder, row = self._index.folder(identifier), self._index.row(identifier)
        if folder is None or row is None:
            raise HTTPException(404, "There is no such run; it may have been deleted or moved.")
        return folder, row


def _package_files(package: str, below: str) -> dict[str, bytes]:
    folder = resources.files(package)
    folder = folder / below if below else folder
    return {
        each.name: each.read_bytes()
        for each in (folder.iterdir() if folder.is_dir() else ())
        if each.is_file() and each.name.rpartition(".")[2] in _TYPES
    }


def _word(request: Request, name: str) -> str:
    return request.query_params.get(name) or ""


def _words(request: Request, name: str, most: int) -> list[str]:
    words = list(dict.fromkeys(word for word in _word(request, name).split(",") if word))
    if not 0 < len(words) <= most:
        raise HTTPException(400, f"{name}: takes 1 to {most} names, with commas between them.")
    return words


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    text = _word(request, name)
    if not text:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise HTTPException(400, f"{name}={text}: must be a whole number from {least} to {most}.")
    return int(text)


def _place(request: Request, name: str, default: float) -> float:
    text = _word(request, name)
    try:
        place = float(text) if text else default
    except ValueError:
        place = math.nan
    if math.isnan(place):
        raise HTTPException(400, f"{name}={text}: must be a number.")
    return place


def _axis(request: Request) -> str:
    axis = _word(request, "x") or "step"
    if axis not in AXES:
        raise HTTPException(400, f"x={axis}: must be one of {', '.join(AXES)}.")
    return axis


def _refused(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    return error(problem.status_code, problem.detail)


def _damaged(request: Request, problem: Exception) -> Response:
    """A file of the run cannot be read: the page shows why, and goes on."""
    return error(422, str(problem))


def _too_deep(request: Request, problem: Exception) -> Response:
    return error(422, "A file of this run is nested too deeply to be shown.")


def _broken(request: Request, problem: Exception) -> Response:
    """The server prints the traceback, and goes on."""
    return error(500, f"This could not be shown ({type(problem).__name__}); jaxtrain dashboard has printed why.")
