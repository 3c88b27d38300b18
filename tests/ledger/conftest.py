"""Settings for the folder: each test on a database of its own, with connections for fifty calls truly at once."""

from pathlib import Path

import pytest

from app.settings import Settings, load

CROWD = 50


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return load(
        database_url=database_url,
        scratch=tmp_path,
        pool_size=CROWD,
        max_overflow=0,
        worker="worker-1",
        revision="revision-1",
    )
