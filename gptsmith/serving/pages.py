"""The web pages: to write with the model, to label texts, to look inside, and to try the API.

Knows nothing of the endpoints: the application describes itself in openapi.json. The pages load
nothing from other servers; their Content-Security-Policy forbids it.
"""

import re
from base64 import b64encode
from collections.abc import Awaitable, Callable
from hashlib import sha256
from html import escape
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, HTMLResponse, Response

from ..machine.pages import read_page

WRITING = Path(__file__).with_name("page.html")
LABELLING = Path(__file__).with_name("labels.html")
# The package whose Swagger UI files are served; its code is never imported.
DISTRIBUTION = "fastapi-offline"
FILES = ("swagger-ui-bundle.js", "swagger-ui.css")
A_DAY = 86_400  # seconds

# Images may be data: URLs, because Swagger UI's arrows are. Inline scripts may not run.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

# Addresses are relative, so that the page also works behind a proxy that adds a prefix.
DOCS = """<!doctype html>
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
<noscript>This page needs JavaScript; see <a href="openapi.json">openapi.json</a>.</noscript>
<div id="manual"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""

# Without validatorUrl: null, Swagger UI would send the description to its makers' server.
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


def add_page(app: FastAPI, path: str, page: Path) -> None:
    """Add a page, whose policy allows its own scripts and styles, and requests to this server."""
    text = read_page(page)
    policy = (
        f"default-src 'none'; script-src {hashes(text, 'script')}; "
        f"style-src {hashes(text, 'style')}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    response = HTMLResponse(text, headers={"Content-Security-Policy": policy})
    app.add_api_route(path, always(response), include_in_schema=False)


def add_docs(app: FastAPI) -> None:
    """Add /docs to an application without FastAPI's docs_url and redoc_url."""
    assert app.docs_url is None, "FastAPI's own /docs fetches its files from a CDN"
    manual, kept = DOCS.format(title=escape(app.title)), {"Cache-Control": f"max-age={A_DAY}"}
    responses = {
        "/docs": HTMLResponse(manual, headers={"Content-Security-Policy": POLICY}),
        "/docs/start.js": Response(START, media_type="text/javascript"),
        **{f"/docs/{name}": FileResponse(find(name), headers=kept) for name in FILES},
    }
    for path, response in responses.items():
        app.add_api_route(path, always(response), include_in_schema=False)


def always(response: Response) -> Callable[[], Awaitable[Response]]:
    """Return an endpoint that always answers the same."""

    async def endpoint() -> Response:
        return response

    return endpoint


def hashes(page: str, tag: str) -> str:
    """Return the policy source that allows the contents of a page's elements, or 'none'."""
    found = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page, flags=re.DOTALL)
    sums = (b64encode(sha256(text.encode()).digest()).decode() for text in found)
    return " ".join(f"'sha256-{sum}'" for sum in sums) or "'none'"


def find(name: str) -> Path:
    """Return the path of a Swagger UI file; ImportError if it is not installed."""
    try:
        found = [path for path in distribution(DISTRIBUTION).files or [] if path.name == name]
    except PackageNotFoundError as error:
        raise ImportError("the server is an extra: pip install 'gptsmith[serve]'") from error
    if not found:
        raise ImportError(
            f"the installed {DISTRIBUTION} has no {name}: pip install 'gptsmith[serve]'"
        )
    return Path(found[0].locate())
