"""/docs: the server's manual, as Swagger UI, from files on this machine.

Knows nothing of the endpoints: the application describes itself in openapi.json. The files are of
the distribution `fastapi-offline`, found by its list of files and never imported; nothing is
fetched from anywhere else, and the page's security policy forbids it.
"""

from html import escape
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse, HTMLResponse

from .guard import GUARDED

DISTRIBUTION = "fastapi-offline"
FILES = ("swagger-ui-bundle.js", "swagger-ui.css")
A_DAY = 86_400  # seconds

# Pictures may be data: because Swagger UI's arrows are. Nothing in the page itself may run.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

# Addresses are relative, so that the page also works behind a proxy that adds a prefix.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="icon" href="data:,">
</head>
<body>
<noscript>This needs JavaScript; <a href="openapi.json">openapi.json</a> says the same.</noscript>
<div id="manual"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""

# Without validatorUrl: null, Swagger UI would send the description to a server of its makers.
START = """const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", follow);
follow();
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#manual",
  deepLinking: true,
  validatorUrl: null,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  defaultModelExpandDepth: 2,
  displayRequestDuration: true,
});
"""


def add_manual(app: FastAPI, *, with_key: bool = False) -> None:
    """Adds /docs and its files to an application made with docs_url=None and redoc_url=None.

    Where callers need a key, the description says so, and the page has a place to type it.
    """
    assert app.docs_url is None, "FastAPI's own /docs fetches its files from a CDN"
    page = PAGE.format(title=escape(app.title))

    @app.get("/docs", include_in_schema=False)
    async def manual() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    @app.get("/docs/start.js", include_in_schema=False)
    async def start() -> Response:
        return Response(START, media_type="text/javascript")

    for name in FILES:
        _add_file(app, f"/docs/{name}", _find(name))
    if with_key:
        _ask_for_key(app)


def _add_file(app: FastAPI, address: str, path: Path) -> None:
    @app.get(address, include_in_schema=False)
    async def file() -> Response:
        return FileResponse(path, headers={"Cache-Control": f"max-age={A_DAY}"})


def _find(name: str) -> Path:
    """Where a file of Swagger UI lies; ImportError where it is not installed."""
    try:
        found = [path for path in distribution(DISTRIBUTION).files or [] if path.name == name]
    except PackageNotFoundError as error:
        raise ImportError("the server is an extra: pip install 'gptsmith[serve]'") from error
    if not found:
        raise ImportError(
            f"the installed {DISTRIBUTION} holds no {name}: pip install 'gptsmith[serve]'"
        )
    return Path(found[0].locate())


def _ask_for_key(app: FastAPI) -> None:
    """Writes into openapi.json that what lies under /v1 takes a key."""
    describe = app.openapi

    def described() -> dict[str, Any]:
        whole = describe()
        schemes = whole.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["key"] = {"type": "http", "scheme": "bearer"}
        for path, operations in whole["paths"].items():
            if path.startswith(GUARDED):
                for operation in operations.values():
                    operation["security"] = [{"key": []}]
        return whole

    app.openapi = described  # type: ignore[method-assign]
