"""The API's description as a page: Swagger UI, from this service alone, with no script that is not a file of its own."""

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

from app.errors import NotFound

router = APIRouter(prefix="/docs", include_in_schema=False)

PAGES = Path(__file__).with_name("pages")
SWAGGER_UI = Path(str(files("fastapi_offline"))) / "static"
"""Swagger UI 5 as that package ships it; nothing else of it is used."""

FILES = {
    "start.js": PAGES / "docs.js",
    "swagger-ui-bundle.js": SWAGGER_UI / "swagger-ui-bundle.js",
    "swagger-ui.css": SWAGGER_UI / "swagger-ui.css",
    "favicon.png": SWAGGER_UI / "favicon.png",
}
KEPT = {"Cache-Control": "private, max-age=3600"}
"""For files of 1.5 MB that change with a release only."""


@router.get("")
async def page() -> FileResponse:
    return FileResponse(PAGES / "docs.html")


@router.get("/{name}")
async def file(name: str) -> FileResponse:
    if name not in FILES:
        raise NotFound(f"There is no file {name!r} of the API's page.")
    return FileResponse(FILES[name], headers=KEPT)
