"""The README's curl examples work as they are printed."""

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.local.stack import Stack
from tests.system.conftest import ended

README = Path(__file__).parents[1] / "README.md"
SECTION = re.search(r"^## By curl\n(.*?)^A test runs the commands above", README.read_text(), re.MULTILINE | re.DOTALL)
ANSWERS = [[202], [200, 200, 200, 200, 202, 409], [200, 200], [200, 200, 200]]
"""Of each block's calls. 409: in an evaluation that has succeeded there is nothing to retry."""

TELLING = """curl() { command curl -w '%{stderr}%{http_code}\\n' "$@"; }\n"""
"""The same curl, with the answer's status on stderr."""


async def shell(script: str, id: str, stack: Stack) -> tuple[str, list[int]]:
    """What it printed, and the statuses of its calls. `id`: what a block before has found out."""
    here = stack.url.removeprefix("http://127.0.0.1")
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euc", f"{TELLING}ID={id}\n{script.replace('localhost:8080', f'localhost{here}')}\necho; echo $ID"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode(), [int(status) for status in err.split()]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")
async def test_the_curl_examples_work_as_they_are_printed(stack: Stack, client: httpx.AsyncClient) -> None:
    assert SECTION
    blocks = re.findall(r"^```sh\n(.*?)^```", SECTION[1], re.MULTILINE | re.DOTALL)
    id, answers = "", []
    submitted: dict[str, Any] = {}
    for block in blocks:
        printed, statuses = await shell(block, id, stack)
        answers.append(statuses)
        if not submitted:
            submitted = json.loads(printed.strip())
            await ended(client, submitted["id"])
        id = printed.strip().splitlines()[-1] if "ID=" in block else id
    assert answers == ANSWERS
    assert id == submitted["id"]
