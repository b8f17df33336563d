"""What the tests of a served run share."""

from __future__ import annotations

import openai
import pytest


@pytest.fixture(scope="module")
def client(server):
    """OpenAI's own client of the module's server."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
